"""`vlm2rec run`: the whole pipeline, stage by stage, from one YAML file. What is done is skipped.

Each command knows by itself whether its output is complete, and goes on or refuses in its own words. A record beside
the YAML holds what the output folders do not say: the settings of `prepare`, `evaluate` and `build-index`, the state
of the files that a stage read, and the time it took. A stage is skipped if its output is there and its record is the
same.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, Vlm2RecError, did_you_mean
from vlm2rec.embedder.contract.provenance import created
from vlm2rec.embedder.contract.storage import Location, StorePath
from vlm2rec.embedder.export.lock import writing
from vlm2rec.pipelines import config as settings
from vlm2rec.pipelines import console
from vlm2rec.pipelines.commands import module_of
from vlm2rec.pipelines.config import RunConfig
from vlm2rec.pipelines.read_config import read_config, read_yaml

WRITER = "vlm2rec run"
STAGES: dict[str, tuple[type, str]] = {
    "prepare": (settings.PrepareConfig, schema.DATASET_FILE),
    "finetune": (settings.FinetuneConfig, schema.ADAPTER_FILE),
    "export-items": (settings.ExportConfig, schema.MANIFEST_FILE),
    "evaluate": (settings.EvaluateConfig, schema.METRICS_FILE),
    "train-recommender": (settings.TrainRecommenderConfig, schema.METRICS_FILE),
    "build-index": (settings.BuildIndexConfig, schema.INDEX_FILE),
}
"""Every stage in its order: its settings, and the file that it writes last."""

# settings that change neither vectors nor metrics
_NOT_COMPARED = {
    "device",
    "resume",
    "checkpoint_steps",
    "log_steps",
    "token_budget",
    "vision_cache",
    "num_workers",
    "engine",
    "dry_run",
}
_LAST_FILES = tuple(dict.fromkeys(last for _, last in STAGES.values()))
_DONE, _SKIPPED, _KEPT = "done", "was done", "kept: it was trained on earlier data"
_LEFT, _FAILED, _WAITING = "not asked for", "failed", "not reached"


@dataclass
class Stage:
    """One stage of the file, and what became of it."""

    name: str
    config: Any
    state: str = _WAITING
    seconds: float | None = None

    @property
    def out(self) -> Location:
        """The folder that the stage writes."""
        folder: Location = self.config.out
        return folder

    def is_complete(self) -> bool:
        """Tell whether the file that the stage writes last is there."""
        return self._last_file().is_file()

    def mark(self) -> str:
        """Return a digest of the file that the stage writes last; it tells whether someone else has written since."""
        return hashlib.sha256(self._last_file().read_bytes()).hexdigest()

    def _last_file(self) -> Location:
        return schema.file_of(self.out, STAGES[self.name][1])


def run(config: RunConfig) -> dict[str, Any]:
    """Run the stages of the file in their order, and return what became of each.

    Raises:
        ConfigError: an unknown stage or setting in the file or the flags; the whole file is read before a stage runs.
        Vlm2RecError: the error of the first stage that fails; the stages behind it are not run.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "`vlm2rec run` was started by a launcher, several times",
            "one process; finetune alone can be trained by several",
            "start `vlm2rec finetune` with the launcher, and then `vlm2rec run --from export-items` without it",
        )
    stages = read_stages(config.config)
    asked = _asked(config, [stage.name for stage in stages])
    record = Record(config.config)
    with writing(config.config.resolve().parent, lock_file=f"{config.config.stem}.run.lock"):
        try:
            for number, stage in enumerate(stages, 1):
                if stage.name not in asked:
                    stage.state, stage.seconds = _LEFT, record.seconds(stage)
                    continue
                _run_stage(stage, record, f"{number}/{len(stages)}", again=bool(config.from_stage or config.only))
        finally:
            _summarise(config, stages)
    return {
        "stages": [
            {"stage": each.name, "state": each.state, "seconds": each.seconds, "out": str(each.out)} for each in stages
        ]
    }


def _run_stage(stage: Stage, record: Record, number: str, again: bool) -> None:
    now = record.compared(stage)
    before = record.of(stage)
    same_settings = before is not None and _same(before["settings"], now["settings"], stage.config)
    same_inputs = before is not None and before["read"] == now["read"]
    same_output = before is not None and stage.is_complete() and before.get("wrote") == stage.mark()
    if before is not None and before["finished"] and same_settings and same_output:
        if same_inputs and not again:
            stage.state, stage.seconds = _SKIPPED, before["seconds"]
            console.log.print(f"{number}  {stage.name}  {stage.out} was done before", soft_wrap=True)
            return
        if stage.name == "finetune" and not same_inputs:
            stage.state, stage.seconds = _KEPT, before["seconds"]
            console.log.print(
                f"{stage.out} was trained on what {', '.join(_changed(before, now))} held before, and is kept as it is;"
                " to train again, give another out, or remove it",
                style="yellow",
                soft_wrap=True,
            )
            return
    begun_otherwise = before is not None and not before["finished"] and not same_inputs
    if before is not None and begun_otherwise and stage.name == "finetune" and (stage.out / "checkpoints").exists():
        raise ConfigError(
            f"the training in {stage.out} was begun, and {', '.join(_changed(before, now))} has changed since",
            "the same data and backbone, to continue it",
            f"give finetune another out, or remove {stage.out}",
        )
    console.headline(f"{number}  {stage.name}", str(stage.out))
    record.begin(stage, now)
    started = time.perf_counter()
    try:
        with console.inner_command():
            returned = module_of(stage.name).run(stage.config)
    except Vlm2RecError as error:
        stage.state = f"{_FAILED}, exit code {error.exit_code}"
        raise
    except BaseException as error:
        stage.state = f"{_FAILED}: {type(error).__name__}"
        raise
    finally:
        stage.seconds = round(time.perf_counter() - started, 3)
        gc.collect()  # models sit in reference cycles; without this, two would be in memory at a time
    if not stage.is_complete():
        stage.state = _FAILED
        raise ArtifactError(
            f"{stage.name} has ended, and {stage.out} is not complete",
            "a stage that does all of its work",
            "leave dry_run and worker out of the file, or wait for the other workers and run the same command again",
        )
    stage.state = _DONE
    if stage.name == "finetune" and returned is None:  # it was complete
        stage.state, stage.seconds = _SKIPPED, before["seconds"] if before else None
    record.end(stage)


def _summarise(config: RunConfig, stages: list[Stage]) -> None:
    def told(stage: Stage) -> str:
        seconds = "" if stage.seconds is None else f"  {console.clock(stage.seconds)}"
        return f"{stage.state}{seconds}  {stage.out}"

    console.summary(f"{config.config}", {stage.name: told(stage) for stage in stages})


# --- the file -------------------------------------------------------------------------------------------------
def read_stages(file: Path) -> list[Stage]:
    """Return the stages of a file with their checked settings, in the order in which they run.

    Raises:
        ConfigError: the file is missing, no YAML, or names an unknown stage or setting, or lacks a required one.
    """
    if not file.exists():
        raise ConfigError(
            f"there is no file {file}", "the settings of the stages", "write it with `vlm2rec init`, or give --config"
        )
    given = read_yaml(file)
    for name in given:
        _require_known(name, f"in {file}", STAGES)
    if not given:
        raise ConfigError(f"{file} names no stage", f"some of {', '.join(STAGES)}", "write one, or use `vlm2rec init`")
    return [Stage(name, _settings_of(name, given[name], file)) for name in STAGES if name in given]


def _settings_of(stage: str, values: Any, file: Path) -> Any:
    if values is not None and not isinstance(values, dict):
        raise ConfigError(
            f"{stage} in {file} holds a {type(values).__name__}",
            "the settings of the stage",
            "write `key: value` lines below it, two spaces further in",
        )
    where = f"{stage} of {file}"
    section = {str(key): value for key, value in (values or {}).items()}
    try:
        return read_config(STAGES[stage][0], section=(where, section))
    except ConfigError as error:
        if where in error.found:
            raise
        raise ConfigError(f"{where}: {error.found}", error.expected, error.fix) from None


def _require_known(name: str, where: str, known: Mapping[str, Any] | list[str]) -> None:
    if name not in known:
        raise ConfigError(
            f"unknown stage {name!r} {where}{did_you_mean(name, known)}",
            f"one of {', '.join(known)}",
            "correct it" + ("" if name in STAGES else ", or leave it out"),
        )


def _asked(config: RunConfig, names: list[str]) -> list[str]:
    """Return the stages that the flags ask for."""
    if config.from_stage is not None and config.only is not None:
        raise ConfigError("--from and --only together", "one of the two", "leave --from or --only out")
    for flag, name in (("--from", config.from_stage), ("--only", config.only)):
        if name is not None:
            _require_known(name, f"with {flag}", STAGES)
            if name not in names:
                found = f"{flag} {name}, which {config.config} does not have"
                raise ConfigError(found, f"one of {', '.join(names)}", "choose one of them, or add it to the file")
    if config.only is not None:
        return [config.only]
    return names if config.from_stage is None else names[names.index(config.from_stage) :]


# --- the record -----------------------------------------------------------------------------------------------
class Record:
    """What `vlm2rec run` remembers of each stage, in a JSON file beside the YAML."""

    def __init__(self, file: Path) -> None:
        self.path = file.with_name(f"{file.stem}.run.json")
        self._stages: dict[str, Any] = {}
        if self.path.exists():
            fix = "remove it; finished stages then run again"
            found = schema.read_json(self.path, "the record of an earlier run", fix)
            if found.get("written_by") != WRITER:
                raise ConfigError(
                    f"{self.path} exists, and `vlm2rec run` has not written it",
                    "no file of that name, or one of `vlm2rec run`",
                    f"move or rename {self.path.name}",
                )
            self._stages = found["stages"]

    def of(self, stage: Stage) -> dict[str, Any] | None:
        """Return the record of a stage with this output folder."""
        found: dict[str, Any] | None = self._stages.get(stage.name)
        return found if found is not None and found["settings"].get("out") == str(stage.out) else None

    def seconds(self, stage: Stage) -> float | None:
        """Return how long a finished stage took."""
        found = self.of(stage)
        return found["seconds"] if found else None

    def compared(self, stage: Stage) -> dict[str, Any]:
        """Return what decides whether a stage is done: its settings, and the state of all that it reads."""
        fields = [f.name for f in dataclasses.fields(stage.config) if f.name not in _NOT_COMPARED]
        values = {name: getattr(stage.config, name) for name in fields}
        return {
            "settings": {name: _plain(value) for name, value in values.items()},
            "read": {name: state for name, value in values.items() if name != "out" for state in _states(value)},
        }

    def begin(self, stage: Stage, now: Mapping[str, Any]) -> None:
        """Record that a stage starts."""
        self._stages[stage.name] = {**now, "started": created(), "finished": None, "seconds": None}
        self._write()

    def end(self, stage: Stage) -> None:
        """Record that a stage is done."""
        self._stages[stage.name] |= {"finished": created(), "seconds": stage.seconds, "wrote": stage.mark()}
        self._write()

    def _write(self) -> None:
        schema.write_json(self.path, {"written_by": WRITER, "stages": self._stages})


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path | StorePath) else value


def _same(before: Mapping[str, Any], now: Mapping[str, Any], config: Any) -> bool:
    """Compare settings; one that did not exist when the stage ran had the value that is now its default."""
    defaults = {f.name: _plain(f.default) for f in dataclasses.fields(config)}
    return all(before.get(name, defaults[name]) == value for name, value in now.items())


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [name for name, state in now["read"].items() if before["read"].get(name) != state]


def _states(value: Any) -> Iterator[str]:
    """Yield the state of the file or folder that a setting names, if it names one.

    A folder of ours changes with the file that is written last; any other folder with names, sizes and times in it.
    """
    if isinstance(value, str) and "/" in value and "://" not in value:
        value = Path(value)
    if not isinstance(value, Path | StorePath):
        return
    for name in _LAST_FILES:
        if (file := schema.file_of(value, name)).is_file():
            yield hashlib.sha256(file.read_bytes()).hexdigest()
            return
    if isinstance(value, Path) and value.exists():
        files = sorted(os.scandir(value), key=lambda entry: entry.name) if value.is_dir() else [value]
        yield _digest(files)


def _digest(files: list[Any]) -> str:
    found = hashlib.sha256()
    for each in files:
        state = each.stat()
        found.update(os.fsencode(each.name) + f" {state.st_size} {state.st_mtime_ns}\n".encode())
    return found.hexdigest()
