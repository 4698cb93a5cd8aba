"""The demo as a newcomer runs it: default flags, a process of its own, and figures that say the line works."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # `test_demo` runs the same line at a tenth of its size


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder of `vlm2rec demo`, and how the process ended."""
    folder = tmp_path_factory.mktemp("demo")
    program = Path(sys.executable).with_name("vlm2rec")
    return folder / "runs" / "demo", subprocess.run(
        [program, "demo"], cwd=folder, capture_output=True, text=True, check=False
    )


def n20(run: Path, folder: str) -> float:
    """N@20 among the stored candidates: of f2f in Task 1, of the recommender in Task 2."""
    candidates = json.loads((run / folder / "metrics.json").read_text())["candidates"]
    return float(candidates.get("f2f", candidates)["N@20"])


def test_it_ends_well_and_names_its_report(demo: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run, done = demo
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("rank\titem_id\tcosine\ttitle\n1\tP")  # what `search` found, and nothing else
    assert len(done.stdout.splitlines()) == 6
    assert "Traceback" not in done.stderr
    assert f"Open {(run / 'report.html').resolve()}" in done.stderr
    assert (run / "report.html").stat().st_size > 500_000


def test_fine_tuning_on_histories_ranks_better_than_the_vanilla_backbone(
    demo: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    run, _ = demo
    vanilla = n20(run, "vanilla/seed-any/evaluate")
    assert vanilla > 0.12  # a random order of 101 candidates has .070
    assert n20(run, "sft/seed-0/evaluate") > vanilla + 0.02
    assert n20(run, "vlm2rec/seed-0/evaluate") > vanilla + 0.01


@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec"])
def test_recommenders_learn_faster_from_vectors_than_from_ids(
    model: str, demo: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    run, _ = demo
    from_ids = n20(run, f"id/seed-0/recommender-{model}")
    for start in ("vanilla", "sft", "vlm2rec"):
        assert n20(run, f"{start}/seed-0/recommender-{model}") > from_ids
