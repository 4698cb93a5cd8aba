"""Sends the curves of a training to trackers: TensorBoard, Weights & Biases, MLflow, trackio.

The trackers are accelerate's, so that a tracker's own environment variables apply: `WANDB_MODE=offline`,
`MLFLOW_TRACKING_URI` and so on. Where one keeps files on this machine, they lie in the folder of the logs.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import (
    GeneralTracker,
    MLflowTracker,
    TensorBoardTracker,
    TrackioTracker,
    WandBTracker,
)

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, MissingDependencyError, did_you_mean
from vlm2rec.embedder.options import TRACKERS, TrackerName
from vlm2rec.embedder.progress import SILENT, Reporter

PROJECT = "vlm2rec"
RUNS_FILE = "runs.json"
"""In the folder of the logs: the run that each tracker has, so that a training that goes on stays one run there."""


def parse_trackers(text: str) -> tuple[TrackerName, ...]:
    """Return the trackers of a list with commas between; `none` or nothing for no tracker.

    Raises:
        ConfigError: a name that is no tracker's.
        MissingDependencyError: a tracker whose library is not installed.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip() not in ("", "none")))
    found: list[TrackerName] = []
    for name in names:
        known = next((tracker for tracker in TRACKERS if tracker == name), None)
        if known is None:
            raise ConfigError(
                f"--report-to {name[:80]}{did_you_mean(name, TRACKERS)}",
                f"some of {', '.join(TRACKERS)}, with commas between",
                "correct it, or leave --report-to out",
            )
        if not find_spec(known):
            raise MissingDependencyError(
                f"--report-to {known} needs {known}, which is not installed", known, f"pip install {known}"
            )
        found.append(known)
    return tuple(found)


@dataclass(frozen=True)
class Tracking:
    """Which trackers a training reports to.

    Args:
        names: the trackers.
        folder: where those that keep files have them.
        run: the name of the run.
        settings: the settings of the training, which the trackers show.
    """

    names: tuple[TrackerName, ...]
    folder: Path
    run: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def started(self, step: int, reporter: Reporter = SILENT) -> Iterator[Trackers]:
        """Yield the trackers of a training that begins after `step`, and end their runs.

        Args:
            step: 0 for a training from the start.
            reporter: is told of a tracker that fails.

        Raises:
            ArtifactError: the folder cannot be written.
        """
        runs = self._runs() if step else {}
        trackers = Trackers([], reporter)
        try:
            if self.names:
                self.folder.mkdir(parents=True, exist_ok=True)
            for name in self.names:
                trackers.all.append(self._start(name, step, runs))
            if self.names:
                schema.write_json(self.folder / RUNS_FILE, runs)
        except OSError as error:
            raise ArtifactError(
                f"the trackers' files in {self.folder} cannot be written ({error.strerror or error})",
                "a writable folder beside --out",
                "correct it, or give another --log-dir",
            ) from error
        try:
            yield trackers
        finally:
            trackers.finish()

    def _runs(self) -> dict[str, str]:
        try:
            known = json.loads((self.folder / RUNS_FILE).read_text(encoding="utf-8"))
            return {name: run for name, run in known.items() if isinstance(run, str)}
        except (OSError, ValueError, AttributeError):
            return {}  # each tracker begins a new run

    def _start(self, name: TrackerName, step: int, runs: dict[str, str]) -> GeneralTracker:
        tracker: Any
        settings = {
            key: value if isinstance(value, int | float) else str(value) for key, value in self.settings.items()
        }
        known = runs.get(name)
        if name == "tensorboard":
            # the points from the step of the last checkpoint on are sent again
            tracker = TensorBoardTracker(self.run, self.folder, **({"purge_step": step} if step else {}))
            tracker.start()
            tracker.log({"settings": json.dumps(settings, indent=2)}, step=step)
        elif name == "mlflow":
            if "MLFLOW_TRACKING_URI" not in os.environ:
                import mlflow

                mlflow.set_tracking_uri(f"sqlite:///{(self.folder / 'mlflow.db').absolute()}")
            tracker = MLflowTracker(PROJECT, str(self.folder / "mlflow"), run_id=known, run_name=self.run)
            tracker.start()
            runs[name] = tracker.active_run.info.run_id
            if known is None:
                tracker.store_init_configuration(settings)
        else:
            more: dict[str, Any] = {"name": self.run, "resume": "allow"}
            if name == "wandb":
                more |= {"dir": str(self.folder), "id": known} if known else {"dir": str(self.folder)}
            tracker = WandBTracker(PROJECT, **more) if name == "wandb" else TrackioTracker(PROJECT, **more)
            tracker.start()
            runs[name] = str(getattr(tracker.tracker, "id", "") or self.run)
            tracker.store_init_configuration(settings)
        return tracker


@dataclass(frozen=True)
class Trackers:
    """Trackers whose runs have begun. One that fails is given up, and the training goes on."""

    all: list[GeneralTracker]
    reporter: Reporter = SILENT

    def log(self, kind: str, row: Mapping[str, Any]) -> None:
        """Send the numbers of a row, as `<kind>/<name>` at its `step`."""
        numbers = {
            f"{kind}/{name}": float(value)
            for name, value in row.items()
            if name not in ("step", "epoch") and isinstance(value, int | float) and math.isfinite(value)
        }
        for tracker in list(self.all) if numbers else ():
            self._try(tracker, functools.partial(tracker.log, numbers, step=int(row["step"])))

    def finish(self) -> None:
        """End the runs."""
        for tracker in list(self.all):
            self._try(tracker, tracker.finish)

    def _try(self, tracker: GeneralTracker, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # of a service, a network or a disk
            self.all.remove(tracker)
            told = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.reporter.say(f"{tracker.name} failed, and receives no more of the training curves: {told}")
