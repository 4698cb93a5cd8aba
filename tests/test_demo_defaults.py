"""The demo as a newcomer runs it: default flags, a process of its own, and figures that say the line works."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # test_demo.py runs a tenth of it


Ended = tuple[Path, subprocess.CompletedProcess[str]]


def run(folder: Path, *flags: str) -> Ended:
    """The folder of `vlm2rec demo`, and how the process ended."""
    program = Path(sys.executable).with_name("vlm2rec")
    done = subprocess.run([program, "demo", *flags], cwd=folder, capture_output=True, text=True, check=False)
    return folder / "runs" / "demo", done


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    return run(tmp_path_factory.mktemp("demo"))


def n20(run: Path, folder: str) -> float:
    """N@20 among the stored candidates: of f2f in Task 1, of the recommender in Task 2."""
    candidates = json.loads((run / folder / "metrics.json").read_text())["candidates"]
    return float(candidates.get("f2f", candidates)["N@20"])


def test_it_ends_well_and_names_its_pages(demo: Ended) -> None:
    folder, done = demo
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("rank\titem_id\tcosine\ttitle\n1\tP")  # what `search` found, and nothing else
    assert len(done.stdout.splitlines()) == 6
    assert "Traceback" not in done.stderr
    page = (folder / "report.html").resolve()
    first, last = done.stderr.index(f"open {page}"), done.stderr.index(f"Open {page}")
    assert first < done.stderr.index("adapter") < last
    assert page.stat().st_size > 400_000


def test_fine_tuning_on_histories_ranks_better_than_the_vanilla_backbone(demo: Ended) -> None:
    folder, _ = demo
    vanilla = n20(folder, "vanilla/seed-any/evaluate")
    assert vanilla > 0.12  # a random order of 101 candidates has .070
    assert n20(folder, "vlm2rec/seed-0/evaluate") > vanilla + 0.01


def test_sasrec_learns_from_vectors_as_fast_as_from_ids(demo: Ended) -> None:
    folder, _ = demo
    from_ids = n20(folder, "id/seed-0/recommender-SASRec")
    assert from_ids > 0.2
    for start in ("vanilla", "vlm2rec"):
        assert n20(folder, f"{start}/seed-0/recommender-SASRec") > from_ids - 0.02  # a difference of one seed


def test_full_goes_on_with_the_contrastive_loss_and_gru4rec(demo: Ended) -> None:
    folder, done = run(demo[0].parents[1], "--full")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "make-backbone" not in done.stderr
    assert n20(folder, "sft/seed-0/evaluate") > n20(folder, "vanilla/seed-any/evaluate") + 0.01
    from_ids = n20(folder, "id/seed-0/recommender-GRU4Rec")
    for start in ("vanilla", "sft", "vlm2rec"):
        assert n20(folder, f"{start}/seed-0/recommender-GRU4Rec") > from_ids
