"""`vlm2rec study`: what it refuses, what it says before it starts, and what a failing step leaves."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import re
import signal
from pathlib import Path

import polars as pl
import pytest
from study_world import METHODS, Tiny, settings

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, DataError
from vlm2rec.pipelines import console, study
from vlm2rec.pipelines.config import StudyConfig, VerifyConfig
from vlm2rec.pipelines.experiments.methods import Method, Run, Step
from vlm2rec.pipelines.experiments.workers import workers
from vlm2rec.pipelines.synthetic import laboratory


@pytest.mark.usefixtures("undrawn")
def test_a_step_that_fails_leaves_out_only_what_needs_it(
    tiny: Tiny,
    drawn_dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", 0.02)
    methods = [
        {"name": "broken", "source": "vectors", "file": str(tmp_path / "absent.parquet")},
        {"name": "VLM2Rec", "source": "backbone"},
        {"name": "VLM2Rec with ids", "vectors_of": "VLM2Rec", "recommender": {"mode": "fuse"}},
    ]
    plan = {"main": {"seeds": [0], "tasks": [1, 2], "models": ["SASRec"]}}
    config = settings(tiny, drawn_dataset, tmp_path, methods=methods, grids=[], analyses=["main"], plan=plan)
    with pytest.raises((DataError, ConfigError), match=r"absent\.parquet"):
        study.run(config)
    results = pl.read_parquet(config.out / "results.parquet")
    tasks = {(row["method"], row["task"]) for row in results.iter_rows(named=True)}
    assert tasks == {("VLM2Rec", 1), ("VLM2Rec", 2), ("VLM2Rec with ids", 2)}
    assert (config.out / "report.html").is_file()
    printed = capsys.readouterr().err
    assert "failed" in printed
    assert re.search(r"^ {10}VLM2Rec(, seed 0)?: [\w -]+: \S", printed, re.MULTILINE)  # how far a step is, now and then


def test_a_plan_is_printed_and_nothing_is_written(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study.run(settings(tiny, drawn_dataset, tmp_path, {"plan_only": True, "quick": True}))
    assert not (tmp_path / "study").exists()
    printed = capsys.readouterr().err
    assert "0 already done" in printed and "finetune" in printed and "estimate" in printed


def test_a_strangers_folder_and_missing_material_are_refused(tiny: Tiny, drawn_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="not a study that `vlm2rec study` began"):
        study.run(StudyConfig(out=tmp_path, data=drawn_dataset, backbone=str(tiny("qwen2_5_vl"))))
    with pytest.raises(ConfigError, match="--data is missing"):
        study.run(StudyConfig(out=tmp_path / "new", backbone="x"))
    with pytest.raises(ArtifactError, match=r"results\.parquet does not exist"):
        study.run(StudyConfig(out=tmp_path, report_only=True))


def test_a_demo_takes_the_laboratory_and_the_backbone_that_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[tuple[laboratory.Laboratory, bool]] = []

    def draw(folder: Path, wanted: laboratory.Laboratory, redo: bool, backbone: bool) -> None:
        drawn.append((wanted, backbone))
        folder.mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(laboratory, "draw_laboratory", draw)
    own = study._with_laboratory(StudyConfig(out=tmp_path, demo=True, laboratory="looks", backbone="BB"))
    small = study._with_laboratory(StudyConfig(out=tmp_path, demo=True))
    assert drawn == [(laboratory.LOOKS, False), (laboratory.STUDY, True)]
    assert own.backbone == "BB" and small.backbone == str(tmp_path / "laboratory" / "backbone")
    assert own.data == small.data == tmp_path / "laboratory" / "data"
    with pytest.raises(ConfigError, match="--demo with --data"):
        study.run(StudyConfig(out=tmp_path / "new", demo=True, data=tmp_path))


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_quick_study_of_two_methods_and_two_seeds_has_a_report(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path
) -> None:
    flags = {"quick": True, "methods": ("SFT (external)", "VLM2Rec"), "analyses": ("main",)}
    config = StudyConfig(
        out=tmp_path / "study", data=drawn_dataset, backbone=str(tiny("qwen2_5_vl")), device="cpu", **flags
    )
    report = study.run(config)
    results = pl.read_parquet(config.out / "results.parquet")
    assert set(results["method"]) == {"SFT (external)", "VLM2Rec"}
    assert set(results["seed"]) == {0, 1}
    assert set(results["model"].drop_nulls()) == {"SASRec", "GRU4Rec"}
    assert "numbers mean nothing" in report.read_text(encoding="utf-8")


def test_fault_44_a_killed_worker_of_a_study_is_an_error_and_no_hang(tmp_path: Path) -> None:
    step = Step("prepared", "verify", VerifyConfig(embeddings=tmp_path), schema.MANIFEST_FILE, ())
    run = Run(Method(name="any", source="backbone"), 0, tmp_path, (step,))
    with workers(2) as pool:
        pool.start((run, step))
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(ArtifactError, match=r"a worker of the study was killed.*give the same command again"):
            pool.next()


@pytest.mark.usefixtures("undrawn")
def test_the_control_deals_the_images_anew_and_changes_nothing_else(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path
) -> None:
    methods = [{**each, "shuffle_images": True} for each in METHODS if each["name"] == "vanilla"]
    plan = {"main": {"seeds": [0], "tasks": [1], "models": []}}
    config = settings(tiny, drawn_dataset, tmp_path, methods=methods, reference="vanilla", grids=[], plan=plan)
    study.run(dataclasses.replace(config, analyses=("main",)))
    control, home = Dataset(config.out / "shuffled-images"), Dataset(drawn_dataset)
    own, dealt = (data.items[schema.IMAGE_PATH].to_pylist() for data in (home, control))
    assert own != dealt and sorted(own) == sorted(dealt)
    assert control.items.drop_columns(schema.IMAGE_PATH) == home.items.drop_columns(schema.IMAGE_PATH)
    assert control.sequences == home.sequences and control.image_root == home.image_root
    rows = pl.read_parquet(config.out / "results.parquet")
    assert set(rows["dataset"]) == {home.name}, "the control has the users and items of the dataset"
    before = (config.out / "shuffled-images" / "dataset.json").stat().st_mtime_ns
    study.run(dataclasses.replace(config, analyses=("main",)))
    assert (config.out / "shuffled-images" / "dataset.json").stat().st_mtime_ns == before
