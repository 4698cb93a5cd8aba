"""`vlm2rec demo`: the whole line on a drawn catalogue, in process, from pictures to a report."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import platform
import shutil
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.pipelines.config import DemoConfig
from vlm2rec.pipelines.console import log
from vlm2rec.pipelines.reporting.style import DEMO_FILE, ID, METRICS_FILE, VLM2REC, Json, method_name
from vlm2rec.pipelines.synthetic.laboratory import MODELS, TABLES, Stage, plan

LIBRARIES = ("vlm2rec", "torch", "transformers", "peft", "recbole", "faiss-cpu", "polars", "pyarrow", "numpy")
WRITTEN_BY = "vlm2rec demo"


def run(config: DemoConfig) -> Path:
    """Draw a catalogue, run every stage on it, and return the path of the report.

    An earlier demo in the same folder is replaced; `demo.json` says what ran, with what settings and how long.

    Raises:
        ConfigError: the run folder holds something that is not an earlier demo.
    """
    start_clean(config.out)
    stages = plan(config)
    record: Json = {
        "written_by": WRITTEN_BY,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "finished": False,
        "settings": {key: value for key, value in dataclasses.asdict(config).items() if key != "out"},
        "versions": library_versions(),
        "stages": [],
        "seconds": 0.0,
    }
    schema.write_json(config.out / DEMO_FILE, record)
    begun = time.perf_counter()
    for number, stage in enumerate(stages, 1):
        _headline(number, len(stages), stage, time.perf_counter() - begun)
        started = time.perf_counter()
        stage.call()
        record["stages"].append(
            {
                "stage": stage.command,
                "what": stage.what,
                "output": stage.output,
                "seconds": round(time.perf_counter() - started, 2),
            }
        )
        record["seconds"] = round(time.perf_counter() - begun, 2)
        record["finished"] = number == len(stages)
        schema.write_json(config.out / DEMO_FILE, record)
    report = config.out / "report.html"
    _summary(config.out, record["seconds"], report)
    return report


# --- the run folder -----------------------------------------------------------------------------------------


def start_clean(folder: Path) -> None:
    """Make the run folder ready: remove what an earlier demo wrote there, and nothing else.

    Raises:
        ConfigError: the folder holds files, and no `demo.json` of an earlier demo among them.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file", "a folder to write", "choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        return
    if not _is_demo(folder):
        raise ConfigError(
            f"--out {folder} is not empty and holds no {DEMO_FILE} of an earlier demo",
            "an empty folder, a new one, or that of an earlier demo, which is replaced",
            "choose another --out",
        )
    for output in sorted({stage.output for stage in plan(DemoConfig(out=folder)) if stage.output} | {"figures"}):
        _remove(folder / output)


def _is_demo(folder: Path) -> bool:
    """Whether `demo.json` is there and ours: a stranger's file of that name gives no right to remove anything."""
    if not (folder / DEMO_FILE).is_file():
        return False
    fix = "choose another --out, or remove the folder yourself"
    return bool(schema.read_json(folder / DEMO_FILE, f"the {DEMO_FILE} of a demo", fix).get("written_by") == WRITTEN_BY)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide what comes out."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


# --- what the person sees -----------------------------------------------------------------------------------


def _headline(number: int, total: int, stage: Stage, elapsed: float) -> None:
    log.rule(
        f"[bold]{number}/{total}  {stage.command}[/]  [dim]{stage.what} · {_clock(elapsed)}[/]",
        align="left",
        style="dim",
    )


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def _summary(run: Path, seconds: float, report: Path) -> None:
    """Print N@20 of every method in both tasks, and where the report lies."""
    table = Table(
        title="N@20 on 101 candidates (a random order: .070)", title_justify="left", box=None, padding=(0, 3, 0, 0)
    )
    table.add_column("start", style="bold")
    for name in ("Task 1", *(f"Task 2, {model}" for model in MODELS)):
        table.add_column(name, justify="right")
    for method in (ID, *TABLES):
        cells = [_n20(run / f"evaluate-{method}", "f2f")]
        cells += [_n20(run / f"recommender-{model}-{method}") for model in MODELS]
        table.add_row(method_name(method), *cells, style="bold" if method == VLM2REC else None)
    log.print(table)
    log.print(f"{_clock(seconds)} minutes. Open {report.resolve()}", soft_wrap=True, markup=False)


def _n20(folder: Path, *view: str) -> str:
    if not (folder / METRICS_FILE).is_file():
        return "–"
    values: Any = schema.read_json(folder / METRICS_FILE, "metrics", "run the demo again")["candidates"]
    for key in view:
        values = values[key]
    return f"{values['N@20']:.3f}"
