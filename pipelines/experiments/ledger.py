"""The record of each run: which steps are finished, with which settings, and how long they took.

`steps.json` in a run's folder holds for every step its settings, its seconds, and a mark that is new each time the step
runs. A step is finished if its record says so, its settings are the same, the file it writes last exists, and the steps
whose output it reads have not run again since.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from vlm2rec.embedder.contract import schema, storage
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.embedder.contract.provenance import created
from vlm2rec.embedder.options import with_former_defaults
from vlm2rec.pipelines.experiments.methods import Json, Run, Step

STEPS_FILE = "steps.json"
LOG_FILE = "log.txt"
_TAIL = 4096  # bytes at the end of a log that hold its last line
_BACKBONE = "contents of backbone"
# settings that may change when a run continues, because they change neither vectors nor metrics
_NOT_COMPARED = {
    *("out", "device", "resume", "checkpoint_steps", "log_steps", "token_budget", "vision_cache", "dry_run"),
}


@dataclass(frozen=True)
class Change:
    """A recorded step whose setting has changed."""

    run: Run
    step: Step
    setting: str
    before: Any
    now: Any


def records(folder: Path) -> dict[str, Json]:
    """Return the records of a run's steps, by the name of the step."""
    if not (folder / STEPS_FILE).is_file():
        return {}
    fix = f"remove {folder}, to run its steps again"
    return schema.read_json(folder / STEPS_FILE, "a record of the finished steps of a run", fix)


def last_line(run: Run) -> str:
    """Return the last line that the steps of a run have written to its log; "" if there is none."""
    with contextlib.suppress(OSError), (run.folder / LOG_FILE).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
        lines = file.read().decode("utf-8", "replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
    return ""


def identity(step: Step, study: Path, data_mark: str) -> Json:
    """Return the settings that decide what a step writes, as JSON; paths in the study folder are relative to it."""
    values = {
        schema.stored_name(f.name): _plain(getattr(step.config, f.name), study)
        for f in dataclasses.fields(step.config)
        if f.name not in _NOT_COMPARED
    }
    return {**values, "contents of data": data_mark, **_contents(step.config)}


def _contents(config: Any) -> dict[str, str]:
    """Return digests of the backbone and of the files that a step reads, as content may change under the same name."""
    found = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.name == "backbone" and value is not None and (Path(value) / "config.json").is_file():
            found[_BACKBONE] = _backbone_mark(str(value))
        elif isinstance(value, Path) and value.is_file():
            found[f"contents of {f.name}"] = storage.sha256_file(value)
    return found


@functools.cache
def _backbone_mark(folder: str) -> str:
    from vlm2rec.embedder.backbones.model_files import backbone_hash, processor_hash

    return f"{backbone_hash(folder)} {processor_hash(folder)}"


def _same_older_mark(recorded: Any, folder: str) -> bool:
    """Tell whether a record of an earlier version, which marked backbones otherwise, is of this backbone."""
    from vlm2rec.embedder.backbones.model_files import is_older_kind, older_backbone_hash

    return is_older_kind(recorded) and bool(recorded == older_backbone_hash(folder))


def _plain(value: Any, study: Path) -> Any:
    if isinstance(value, Path):
        value, study = value.resolve(), study.resolve()
        return str(value.relative_to(study)) if value.is_relative_to(study) else str(value)
    return list(value) if isinstance(value, tuple) else value


def change(run: Run, step: Step, now: Json) -> Change | None:
    """Return the first setting in which the record of a step differs from `now`; None if there is none."""
    record = records(run.folder).get(step.name)
    if record is None:
        return None
    recorded = _current_settings(record)
    defaults = {
        schema.stored_name(f.name): f.default for f in dataclasses.fields(step.config) if f.default is not MISSING
    }
    for name, value in now.items():
        if name not in recorded and name not in defaults:
            continue  # the program did not record it when the step ran
        # a setting that did not exist when the step ran had the value that is now its default
        before = recorded.get(name, _plain(defaults.get(name), Path()))
        if name == _BACKBONE and _same_older_mark(before, step.config.backbone):
            continue
        if name == "backbone" and _BACKBONE in recorded and _BACKBONE in now:
            continue  # its contents are compared, wherever they lie
        if before != value:
            return Change(run, step, name, before, value)
    return None


def _current_settings(record: Json) -> Json:
    """Return a step's recorded settings in today's words, if an earlier version recorded them."""
    settings: Json = record["settings"]
    if record["command"] == "finetune":
        return with_former_defaults(settings)
    if record["command"] == "encode-frozen":
        return settings | {"encoder_kind": settings.get("kind", "auto")}
    return settings | {"strategy": "question"} if record["command"] == "encode-prompted" else settings


def is_finished(run: Run, step: Step) -> bool:
    """Tell whether a step with unchanged settings need not run."""
    record = records(run.folder).get(step.name, {})
    if not record.get("finished") or not schema.file_of(step.folder, step.done).is_file():
        return False
    return bool(record["read"] == _marks(step.after))


def _marks(folders: Sequence[Path]) -> dict[str, str | None]:
    """Return the marks of the steps that wrote these folders."""
    return {folder.name: records(folder.parent).get(folder.name, {}).get("mark") for folder in folders}


def begin(run: Run, step: Step, settings: Json) -> None:
    """Record that a step starts, and remove its earlier output if its inputs have changed."""
    run.folder.mkdir(parents=True, exist_ok=True)
    known = records(run.folder)
    before = known.get(step.name, {})
    reads = _marks(step.after)
    if before and before["read"] != reads:
        clear(step.folder)
        before = {}
    known[step.name] = {
        "command": step.command,
        "settings": settings,
        "read": reads,
        "mark": uuid.uuid4().hex,
        "started": created(),
        "finished": None,
        "seconds": None,
        "attempts": before.get("attempts", 0) + 1,
    }
    schema.write_json(run.folder / STEPS_FILE, known)


def end(run: Run, step: Step, seconds: float) -> None:
    """Record that a step is done."""
    known = records(run.folder)
    known[step.name] |= {"finished": created(), "seconds": round(seconds, 3)}
    schema.write_json(run.folder / STEPS_FILE, known)


def forget(run: Run, step: Step) -> None:
    """Remove a step's output and its record."""
    clear(step.folder)
    known = records(run.folder)
    known.pop(step.name, None)
    schema.write_json(run.folder / STEPS_FILE, known)


def clear(folder: Path) -> None:
    """Remove a step's folder."""
    if folder.is_symlink():
        raise ConfigError(f"{folder} is a symbolic link", "a folder of the study", "remove the link")
    if folder.is_dir():
        shutil.rmtree(folder)
