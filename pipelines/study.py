"""`vlm2rec study`: a matrix of methods and seeds, resumable step by step, and every table and figure drawn from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.embedder.export.lock import LOCK_FILE, writing
from vlm2rec.pipelines.config import StudyConfig
from vlm2rec.pipelines.console import log, summary
from vlm2rec.pipelines.demo import library_versions
from vlm2rec.pipelines.experiments import results as results_file
from vlm2rec.pipelines.experiments.methods import Run, Step
from vlm2rec.pipelines.experiments.schedule import (
    Failure,
    Schedule,
    _kind,
    _learn_pace,
    _run_steps,
    _settle_changes,
    _title,
    clock,
    plan_schedule,
)
from vlm2rec.pipelines.reporting import page as study_report
from vlm2rec.pipelines.synthetic.laboratory import draw_laboratory

STUDY_FILE = "study.json"
WRITTEN_BY = "vlm2rec study"


def run(config: StudyConfig) -> Path:
    """Run what is missing of a study, collect the results, draw the report and return its path.

    Raises:
        ConfigError: the study cannot be planned, or finished cells have other settings than those asked for.
        ArtifactError: a dataset is damaged, or another study writes to the same folder.
        Vlm2RecError: a step failed; everything that does not depend on it was run and is in the report.
    """
    if config.report_only:
        return study_report.run(config.out)
    _require_own_folder(config.out)
    if not config.demo:
        _require_material(config)
        if config.plan_only:
            schedule, wanted = _planned(config)
            _announce(schedule, wanted, schedule.unfinished(wanted), config.jobs)
            return config.out
    with writing(config.out):
        config = draw_laboratory(config) if config.demo else config
        schedule, wanted = _planned(config)
        _settle_changes(schedule, config.redo)
        todo = schedule.unfinished(wanted)
        _announce(schedule, wanted, todo, config.jobs)
        if config.plan_only:
            return config.out
        _remember(schedule, config)
        failures = _run_steps(schedule, todo, config.jobs)
        results_file.collect(schedule.study, schedule.out, schedule.cells, schedule.home, schedule.domains)
        report = study_report.run(config.out)
    _summarise(schedule, wanted, failures, report)
    if failures:
        raise failures[0].error
    return report


def _require_material(config: StudyConfig) -> None:
    for name, value in (("--data", config.data), ("--backbone", config.backbone)):
        if value is None:
            raise ConfigError(
                f"{name} is missing", "a dataset folder and a backbone", f"give {name}, or --demo to draw both"
            )


def _planned(config: StudyConfig) -> tuple[Schedule, list[Run]]:
    """Return the whole course, and the cells of the methods that --methods picks."""
    schedule = plan_schedule(config)
    picked = {method.name for method in schedule.study.picked(config.methods)}
    return schedule, [cell for cell in schedule.cells if cell.method.name in picked]


# --- the study folder ---------------------------------------------------------------------------------------


def _require_own_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file", "a folder to write", "choose another --out")
    if not out.is_dir() or all(path.name == LOCK_FILE for path in out.iterdir()):
        return
    own = (out / STUDY_FILE).is_file() or (out / "laboratory").is_dir()
    if not own:
        raise ConfigError(
            f"--out {out} is not empty and holds no {STUDY_FILE}",
            "a new folder, or that of an earlier study",
            "choose another --out",
        )


def _remember(schedule: Schedule, config: StudyConfig) -> None:
    schema.write_json(
        schedule.out / STUDY_FILE,
        {
            "written_by": WRITTEN_BY,
            "command": {
                key: str(value) if isinstance(value, Path) else value
                for key, value in dataclasses.asdict(config).items()
            },
            "study": dataclasses.asdict(schedule.study),
            "data": str(schedule.home.data.resolve()),
            "contents of data": schedule.marks[schedule.home.data],
            "versions": library_versions(),
            "notes": list(schedule.study.notes),
        },
    )


# --- running ------------------------------------------------------------------------------------------------


# --- what the person sees -----------------------------------------------------------------------------------


def _announce(schedule: Schedule, wanted: Sequence[Run], todo: Sequence[tuple[Run, Step]], jobs: int) -> None:
    """Say what will run and how long it may take."""
    _learn_pace(schedule)
    rows: dict[str, tuple[set[str], int, int, float]] = {}
    for cell, step in todo:
        kind = _kind(step)
        methods, count, _, seconds = rows.get(kind, (set(), 0, 0, 0.0))
        seconds += schedule.pace.of(step, schedule.datasets[step.config.data])
        rows[kind] = (methods | {cell.method.name}, count + 1, 0, seconds)
    table = Table(title="To run", title_justify="left", box=None, padding=(0, 3, 0, 0))
    for name in ("step", "methods", "runs", "about"):
        table.add_column(name, justify="left" if name == "step" else "right")
    for kind, (methods, count, _, seconds) in rows.items():
        table.add_row(kind, str(len(methods)), str(count), clock(seconds / jobs))
    total = sum(row[3] for row in rows.values()) / jobs
    steps = sum(len(cell.steps) for cell in wanted)
    table.add_row("all", "", str(len(todo)), clock(total), style="bold")
    names = {cell.method.name for cell in wanted}
    log.print(
        f"Study of {len(names)} methods on {schedule.home.name}:"
        f" {steps} steps, {steps - len(todo)} done before, {len(todo)} to run.",
        markup=False,
    )
    if todo:
        log.print(table)
        if not schedule.pace.seconds:
            log.print("Nothing is measured yet: the times are those of the small backbone on one core.", style="dim")
        log.print("What the steps say is in log.txt of each cell.", style="dim")
    for note in schedule.study.notes:
        log.print(note, style="yellow", markup=False, soft_wrap=True)


def _summarise(schedule: Schedule, wanted: Sequence[Run], failures: Sequence[Failure], report: Path) -> None:
    left = len(schedule.unfinished(wanted))
    steps = sum(len(cell.steps) for cell in wanted)
    rows: dict[str, object] = {
        "steps": f"{steps - left} of {steps} done",
        "results": schedule.out / results_file.RESULTS_FILE,
        "figures": schedule.out / "figures",
        "report": report.resolve(),
    }
    if failures:
        rows["failed"] = "; ".join(f"{_title(f.cell)}, {f.step.name}" for f in failures)
    results_file.print_tables(schedule.out)
    summary("Study", rows)
