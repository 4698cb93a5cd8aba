"""The linear probe on vectors with known labels, and `vlm2rec probe-images` on drawn pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image
from study_world import settings as study_settings

from vlm2rec.downstream.evaluation.linear_probe import linear_probe
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ConfigError, DataError
from vlm2rec.pipelines import probe_images, study
from vlm2rec.pipelines.config import ProbeImagesConfig
from vlm2rec.pipelines.experiments import ledger, results
from vlm2rec.pipelines.experiments.schedule import plan_schedule

Tiny = Callable[[str], Path]
COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 200)}


def labelled(count: int, dim: int, seed: int = 0) -> tuple[np.ndarray, list[str | None]]:
    """Vectors whose label is the largest of their first three numbers."""
    vectors = np.random.default_rng(seed).standard_normal((count, dim))
    return vectors, [f"c{place}" for place in vectors[:, :3].argmax(axis=1)]


@pytest.mark.parametrize("dim", [8, 1000])  # 1000: more numbers than training vectors
def test_a_linear_label_is_read_and_a_random_one_is_not(dim: int) -> None:
    vectors, labels = labelled(800, dim)
    vectors[:, :3] *= 10 if dim > 100 else 1
    found = linear_probe(vectors, labels)
    assert (found.labels, found.train, found.held_out) == (3, 600, 200)
    assert found.gain.mean == pytest.approx(found.accuracy - found.commonest) and found.gain.low > 0
    random = [str(each) for each in np.random.default_rng(1).integers(3, size=800)]
    none = linear_probe(vectors, random)
    assert none.gain.low <= 0.05 and none.gain.mean < 0.1


def test_both_ways_to_solve_agree() -> None:
    from vlm2rec.downstream.evaluation.linear_probe import _said

    vectors, labels = labelled(60, 59)
    truth = np.unique(labels, return_inverse=True)[1]
    rows = np.arange(60)
    wide = np.concatenate([vectors, np.zeros((60, 10))], axis=1)  # zeros add nothing, but make it wider than long
    assert np.array_equal(_said(vectors, truth, rows, rows, 1.0), _said(wide, truth, rows, rows, 1.0))


def test_missing_and_rare_labels_and_equal_vectors_do_not_count() -> None:
    vectors, labels = labelled(400, 5)
    labels[:40] = [None] * 20 + [""] * 20
    labels[40:45] = ["rare"] * 5
    vectors[50] = vectors[51]
    found = linear_probe(vectors, labels)
    assert (found.labels, found.train + found.held_out) == (3, 400 - 45 - 1)


@pytest.mark.parametrize(
    ("count", "labels"),
    [(400, ["same"] * 400), (400, [None] * 400), (60, ["a", "b"] * 30), (400, [str(n) for n in range(400)])],
)
def test_too_few_labels_or_vectors_are_refused(count: int, labels: list[str | None]) -> None:
    with pytest.raises(DataError, match="different vectors with"):
        linear_probe(np.random.default_rng(0).standard_normal((count, 4)), labels)
    with pytest.raises(DataError, match="vectors of shape"):
        linear_probe(np.full((count, 4), np.nan), labels)


@pytest.fixture(scope="module")
def coloured(drawn_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 120 items whose picture has the colour that the column `looks` names; one picture is broken."""
    folder = tmp_path_factory.mktemp("coloured")
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    meta = json.loads((drawn_dataset / "dataset.json").read_text())
    known = pl.read_parquet(drawn_dataset / "items.parquet")
    rows = []
    for place in range(120):
        name = random.choice(list(COLOURS))
        colour = np.clip(np.array(COLOURS[name]) + random.integers(-30, 30, (56, 56, 3)), 0, 255)
        Image.fromarray(colour.astype(np.uint8)).save(folder / "images" / f"{place}.png")
        item = known["item_id"][place] if place < len(known) else f"more-{place}"
        rows.append({"item_id": item, "title": f"thing {place}", "image_path": f"{place}.png", "looks": name})
    (folder / "images" / "107.png").write_bytes(b"no picture")
    rows[108]["image_path"] = None
    pl.DataFrame(rows).with_columns(kinds=pl.concat_list("looks")).write_parquet(folder / "items.parquet")
    for name in ("sequences.parquet", "negatives.parquet"):
        (folder / name).write_bytes((drawn_dataset / name).read_bytes())
    meta |= {"image_root": "images", "sha256": {}, "cold_items": 120 - len(known)}
    (folder / "dataset.json").write_text(json.dumps(meta))
    return folder


def config(tiny: Tiny, data: Path, out: Path, **more: object) -> ProbeImagesConfig:
    values: dict[str, object] = {"data": data, "backbone": str(tiny("qwen2_5_vl")), "column": "looks", "out": out}
    values |= {"max_pixels": 56 * 56, "device": "cpu", "dtype": "float32", **more}
    return ProbeImagesConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("column", ["looks", "kinds"])
def test_the_command_reads_a_colour_from_the_tokens_of_a_tower(
    tiny: Tiny, coloured: Path, tmp_path: Path, column: str
) -> None:
    found = probe_images.run(config(tiny, coloured, tmp_path / "out", column=column))
    assert found["labels"] == 3 and found["train"] + found["held_out"] == 118, "without the broken and the missing one"
    assert found["low"] > 0 and found["accuracy"] > 0.8 > found["commonest"]
    assert json.loads((tmp_path / "out" / "probe.json").read_text()) == found
    assert probe_images.run(config(tiny, coloured, tmp_path / "out", column=column)) == found
    sampled = probe_images.run(config(tiny, coloured, tmp_path / "few", items=90))
    assert sampled["train"] + sampled["held_out"] in (89, 90)


def test_too_few_labels_are_a_reason_and_other_mistakes_are_errors(tiny: Tiny, coloured: Path, tmp_path: Path) -> None:
    found = probe_images.run(config(tiny, coloured, tmp_path / "a", column="title"))
    assert "different vectors with" in found["reason"] and "accuracy" not in found
    with pytest.raises(ConfigError, match="did you mean 'looks'"):
        probe_images.run(config(tiny, coloured, tmp_path / "b", column="look"))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="is not empty"):
        probe_images.run(config(tiny, coloured, tmp_path / "c"))


@pytest.mark.usefixtures("undrawn")
def test_a_study_probes_the_untrained_backbone_once(tiny: Tiny, coloured: Path, tmp_path: Path) -> None:
    vanilla = {
        "name": "vanilla",
        "source": "backbone",
        "role": "vanilla",
        "export": {"max_pixels": 3136, "max_failures": 0.1},
    }
    keys = {"methods": [vanilla], "grids": [], "reference": "vanilla", "analyses": ["main"]}
    keys |= {"plan": {"main": {"seeds": [0, 1], "tasks": [1]}}}
    flags = study_settings(tiny, coloured, tmp_path, **keys)
    schedule = plan_schedule(flags)
    steps = [step for run in schedule.runs for step in run.steps]
    assert [step.name for step in steps] == ["embeddings", "evaluate", "image-probe"]
    assert steps[2].config.column == "looks" and steps[2].config.max_pixels == 3136
    study.run(flags)
    facts = results.facts(flags.out)
    assert facts["looks"]["column"] == "looks" and facts["looks"]["held_out"] > 0
    assert all(ledger.is_finished(schedule.runs[0], step) for step in steps), "and is not run again"
    found = json.loads((flags.out / "verdicts.json").read_text())
    assert found["weak view"] in ("text", "image")
    (tmp_path / "study.yaml").write_text((tmp_path / "study.yaml").read_text() + "looks: lokos\n")
    with pytest.raises(ConfigError, match=r"looks: lokos .did you mean 'looks'.. is not a column"):
        plan_schedule(flags)
    assert schema.PROBE_FILE == "probe.json"
