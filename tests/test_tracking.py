"""Trackers: they get every point of the curves, once, however often the run was killed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, MissingDependencyError
from vlm2rec.embedder.training import tracking
from vlm2rec.embedder.training.tracking import Tracking, parse_trackers
from vlm2rec.pipelines import finetune
from vlm2rec.pipelines.config import FinetuneConfig

Tiny = Callable[[str], Path]


def settings(tiny: Tiny, data: Path, out: Path, **more: Any) -> FinetuneConfig:
    values = {"data": data, "backbone": str(tiny("qwen2_5_vl")), "out": out, "max_pixels": 56 * 56, "max_steps": 6}
    values |= {"batch_size": 8, "valid_users": 6, "probe_users": 4, "probe_steps": 2, "log_steps": 1, "device": "cpu"}
    return FinetuneConfig(**{**values, "vision_cache": "off", **more})


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the points that TensorBoard shows, by their names."""
    read = EventAccumulator(str(folder), {"scalars": 0})
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def check(found: dict[str, list[tuple[int, float]]], curves: dict[str, Any]) -> None:
    """Every number of the curves is there once."""
    for kind in ("train", "valid", "probe", "gradients"):
        for row in curves[kind]:
            for name, value in row.items():
                if name not in ("step", "epoch", "seconds") and isinstance(value, int | float):
                    at = [shown for step, shown in found[f"{kind}/{name}"] if step == row["step"]]
                    assert at == [pytest.approx(value, rel=1e-5)], (kind, name, row["step"])


def test_tensorboard_has_every_point_of_the_curves(tiny: Tiny, drawn_dataset: Path, tmp_path: Path) -> None:
    config = settings(tiny, drawn_dataset, tmp_path / "adapter", report_to="tensorboard", gradient_steps=3)
    training = finetune.run(config)
    assert training is not None
    found = scalars(tmp_path / "adapter-logs" / "adapter")
    check(found, training.curves)
    assert {name.split("/")[0] for name in found} == {"train", "valid", "probe", "gradients"}
    plain = finetune.run(dataclasses.replace(config, out=tmp_path / "plain", report_to="none"))
    assert plain is not None and plain.curves["train"] == training.curves["train"], "watching changes nothing"
    assert not (tmp_path / "plain-logs").exists()


class Killed(BaseException):
    """Stands for SIGKILL: nobody catches it."""


def test_a_killed_run_that_goes_on_shows_each_point_once(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(
        tiny, drawn_dataset, tmp_path / "adapter", report_to="tensorboard", checkpoint_steps=2, log_dir=tmp_path / "tb"
    )
    usual = tracking.Trackers.log

    def log(self: tracking.Trackers, kind: str, row: dict[str, Any]) -> None:
        usual(self, kind, row)
        if kind == "train" and row["step"] == 5:
            raise Killed

    monkeypatch.setattr(tracking.Trackers, "log", log)
    with pytest.raises(Killed):
        finetune.run(config)
    monkeypatch.undo()
    training = finetune.run(config)
    assert training is not None and training.steps == 6
    check(scalars(tmp_path / "tb" / "adapter"), training.curves)


@pytest.mark.filterwarnings("ignore")  # of the libraries beneath it
def test_mlflow_keeps_one_run_of_a_training_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    wanted = Tracking(("mlflow",), tmp_path / "logs", "adapter", {"learning_rate": 0.1, "data": "here"})
    for start in (0, 2):
        with wanted.started(start) as trackers:
            trackers.log("train", {"step": start + 1, "epoch": 0.5, "loss": 2.0 - start, "note": "no number"})
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/logs/mlflow.db")
    (experiment,) = (each for each in client.search_experiments() if each.name == "vlm2rec")
    (run,) = client.search_runs([experiment.experiment_id])
    points = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in points] == [(1, 2.0), (3, 0.0)]
    assert run.data.params["learning_rate"] == "0.1" and run.info.run_name == "adapter"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_others_take_the_same_rows_offline(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    PartialState(cpu=True)  # as in a training; accelerate's logs ask for it
    with Tracking((name,), tmp_path / "logs", "adapter", {"seed": 0}).started(0) as trackers:  # type: ignore[arg-type]
        trackers.log("valid", {"step": 0, "N@20": 0.25})
    PartialState._reset_state()
    assert name in json.loads((tmp_path / "logs" / tracking.RUNS_FILE).read_text())


def test_a_wrong_tracker_is_named_before_anything_is_done(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"--report-to tensorbord \(did you mean 'tensorboard'\?\)"):
        finetune.run(settings(tiny, drawn_dataset, tmp_path / "adapter", report_to="tensorbord"))
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"--report-to wandb needs wandb.*pip install wandb"):
        parse_trackers("wandb, mlflow")
    with pytest.raises(ConfigError, match="--log-dir without --report-to"):
        finetune.run(settings(tiny, drawn_dataset, tmp_path / "adapter", log_dir=tmp_path / "logs"))
    assert parse_trackers("none") == () and not (tmp_path / "adapter").exists()


def test_a_tracker_that_fails_does_not_end_the_training(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = tracking.TensorBoardTracker.log

    def log(self: Any, values: dict[str, Any], step: int | None = None) -> None:
        if "train/loss" in values and step == 3:
            raise ConnectionError("the service is away")
        usual(self, values, step=step)

    monkeypatch.setattr(tracking.TensorBoardTracker, "log", log)
    training = finetune.run(settings(tiny, drawn_dataset, tmp_path / "adapter", report_to="tensorboard"))
    assert training is not None and training.steps == 6
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("tensorboard failed, and receives no more of the training curves: the service is away") == 1
    assert [step for step, _ in scalars(tmp_path / "adapter-logs" / "adapter")["train/loss"]] == [1, 2]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    with (
        pytest.raises(ArtifactError, match=r"trackers' files in .*logs cannot be written"),
        Tracking(("tensorboard",), tmp_path / "logs", "adapter").started(0),
    ):
        pass
