"""`vlm2rec study`: runs methods with several seeds, step by step, and draws every table and figure of the results."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.markup import escape
from rich.table import Table

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.embedder.contract.provenance import library_versions
from vlm2rec.embedder.contract.publish import require_ours
from vlm2rec.embedder.export.lock import writing
from vlm2rec.pipelines.config import StudyConfig
from vlm2rec.pipelines.console import log, summary
from vlm2rec.pipelines.experiments import results, selection
from vlm2rec.pipelines.experiments.methods import Run, Step
from vlm2rec.pipelines.experiments.schedule import (
    Failure,
    Schedule,
    clock,
    kind_of,
    learn_pace,
    plan_schedule,
    run_steps,
    settle_changes,
    settle_trials,
    title_of,
)
from vlm2rec.pipelines.read_config import read_yaml
from vlm2rec.pipelines.reporting import page
from vlm2rec.pipelines.synthetic import laboratory

WRITTEN_BY = "vlm2rec study"
LOCK_FILE = "export.lock"  # of a study folder; earlier versions look for this name
LIBRARIES = ("vlm2rec", "torch", "transformers", "peft", "recbole", "faiss-cpu", "polars", "pyarrow", "numpy")


def run(config: StudyConfig) -> Path:
    """Run the unfinished steps of a study, collect the results, draw the report and return its path.

    Raises:
        ConfigError: the study cannot be planned, or the settings of finished steps have changed.
        ArtifactError: a dataset is damaged, or another study writes to the same folder.
        Vlm2RecError: a step failed; every step that does not need it was run and is in the report.
    """
    if config.report_only:
        return page.run(config.out)
    require_own_folder(config.out, WRITTEN_BY)
    if config.demo and config.data is not None:
        raise ConfigError(
            f"--demo with --data {config.data}",
            "--demo, which draws its own dataset, or --data",
            "leave --demo or --data out",
        )
    if not config.demo:
        _require_inputs(config)
        if config.plan_only:
            _announce_plan(*_plan(config), config)
            return config.out
    with writing(config.out, lock_file=LOCK_FILE):
        config = _with_laboratory(config) if config.demo else config
        schedule, wanted = _settled_plan(config)
        _announce_plan(schedule, wanted, config)
        if config.plan_only:
            return config.out
        remember(schedule, config, WRITTEN_BY)
        trials = schedule.unfinished(schedule.trials_for(wanted))
        failures = run_steps(schedule, trials, config.jobs, later=schedule.unfinished(wanted))
        if schedule.searches:
            selection.choose(config.out, schedule.searches)
            schedule, wanted = _settled_plan(config)  # with what was chosen
            learn_pace(schedule)
            remember(schedule, config, WRITTEN_BY)
        decided = [each for each in wanted if each.method.name not in schedule.undecided]
        failures += run_steps(schedule, schedule.unfinished(decided), config.jobs, before=len(trials))
        report = draw_report(schedule)
    _summarise(schedule, [*schedule.trials_for(wanted), *wanted], failures, report)
    if failures:
        raise failures[0].error
    return report


def draw_report(schedule: Schedule) -> Path:
    """Collect the results of the runs in Parquet files, and draw the page from them."""
    schedule.collect()
    return page.run(schedule.out)


def _require_inputs(config: StudyConfig) -> None:
    for name, value in (("--data", config.data), ("--backbone", config.backbone)):
        if value is None:
            raise ConfigError(
                f"{name} is missing", "a dataset folder and a backbone", f"give {name}, or --demo to make both"
            )


def _with_laboratory(config: StudyConfig) -> StudyConfig:
    """Draw the missing parts of the laboratory and return the settings of a study of it."""
    folder = config.out / laboratory.FOLDER
    wanted = laboratory.laboratory_of(config.laboratory, config.quick)
    laboratory.draw_laboratory(folder, wanted, config.redo, backbone=config.backbone is None)
    file = folder / "study.yaml"
    own = {} if config.config is None else read_yaml(config.config)
    text = yaml.safe_dump({"cross_domain": [str(folder / "second-data")], **own})
    schema.write_text(file, text)
    backbone = config.backbone or str(folder / "backbone")
    return dataclasses.replace(config, data=folder / "data", backbone=backbone, config=file)


def _plan(config: StudyConfig) -> tuple[Schedule, list[Run]]:
    """Return the whole schedule, and the runs of the methods that --methods picks."""
    schedule = plan_schedule(config)
    picked = schedule.study.picked(config.methods)
    if config.methods:
        schedule.study.check_taking_part(picked)
    names = {name for method in picked for name in (method.name, method.vectors_of)}
    return schedule, [each for each in schedule.runs if each.method.name in names]


def _settled_plan(config: StudyConfig) -> tuple[Schedule, list[Run]]:
    """Return the plan after changed settings are refused, or with `--redo` what they made is removed."""
    schedule, wanted = _plan(config)
    if schedule.searches:
        settle_trials(schedule, config.redo)
        schedule, wanted = _plan(config)  # without the choices that this removed
    settle_changes(schedule, config.redo)
    return schedule, wanted


# --- the study folder ---------------------------------------------------------------------------------------


def require_own_folder(out: Path, written_by: str) -> None:
    """Raise `ConfigError` unless `out` is free, or the same command began a study in it."""
    if (out / results.STUDY_FILE).is_file():
        ours = schema.is_written_by(out / results.STUDY_FILE, written_by)
    else:  # a study that was interrupted before its first step has only a laboratory
        ours = laboratory.is_laboratory(out / laboratory.FOLDER)
    require_ours(out, f"a study that `{written_by}` began", ours=ours, ignored=lambda name: name == LOCK_FILE)


def remember(schedule: Schedule, config: StudyConfig, written_by: str, **more: Any) -> None:
    """Record the study and its settings in the study folder, with `more` facts for the page."""
    schema.write_json(
        schedule.out / results.STUDY_FILE,
        {
            "written_by": written_by,
            "command": {
                key: str(value) if isinstance(value, Path) else value
                for key, value in dataclasses.asdict(config).items()
            },
            "study": dataclasses.asdict(schedule.study),
            "data": str(schedule.home.data.resolve()),
            "contents of data": schedule.marks[schedule.home.data],
            "versions": library_versions("python", *LIBRARIES, absent="not installed"),
            "notes": list(schedule.study.notes),
            "before": laboratory.drawn_stages(schedule.out / laboratory.FOLDER),
            **more,
        },
    )


# --- output to the terminal ---------------------------------------------------------------------------------


def _announce_plan(schedule: Schedule, wanted: Sequence[Run], config: StudyConfig) -> None:
    """Print the trials and the steps to run, and an estimate of their time."""
    trials = schedule.trials_for(wanted)
    announce(schedule, [*trials, *wanted], schedule.unfinished([*trials, *wanted]), config.jobs)
    if trials:
        log.print(_trials_table(schedule, trials))
        plan = schedule.study.search
        log.print(
            f"{plan.trials} trials of each method with seed {plan.seed}, scored on validation users; the runs of all"
            f" seeds begin when the choice is written to {selection.SELECTION_FILE}.",
            markup=False,
            soft_wrap=True,
        )


def _trials_table(schedule: Schedule, trials: Sequence[Run]) -> Table:
    folders = {run.folder for run in trials}
    table = Table(title="Trials", title_justify="left", box=None, padding=(0, 3, 0, 0))
    for name in ("method", "trial", "of", "settings"):
        table.add_column(name, justify="right" if name in ("trial", "of") else "left")
    for search in schedule.searches:
        for trial in search.trials:
            if trial.run.folder in folders:
                text = ", ".join(f"{name} {value}" for name, value in trial.settings.items()) or "its own"
                table.add_row(escape(search.method.name), str(trial.number), str(search.combinations), escape(text))
    return table


def announce(
    schedule: Schedule,
    wanted: Sequence[Run],
    todo: Sequence[tuple[Run, Step]],
    jobs: int = 1,
    to_terminal: bool = False,
) -> None:
    """Print the steps to run and an estimate of their time."""
    learn_pace(schedule)
    rows: dict[str, tuple[set[str], int, float]] = {}
    for each, step in todo:
        kind = kind_of(step) if each.trial is None else f"{kind_of(step)} (trial)"
        methods, count, seconds = rows.get(kind, (set(), 0, 0.0))
        seconds += schedule.pace.of(step, schedule.datasets[step.config.data])
        rows[kind] = (methods | {each.method.name}, count + 1, seconds)
    table = Table(title="To run", title_justify="left", box=None, padding=(0, 3, 0, 0))
    for name in ("step", "methods", "runs", "estimate"):
        table.add_column(name, justify="left" if name == "step" else "right")
    for kind, (methods, count, seconds) in rows.items():
        table.add_row(kind, str(len(methods)), str(count), clock(seconds / jobs))
    total = sum(row[2] for row in rows.values()) / jobs
    steps = sum(len(each.steps) for each in wanted)
    table.add_row("all", "", str(len(todo)), clock(total), style="bold")
    names = {each.method.name for each in wanted}
    log.print(
        f"Study of {len(names)} methods on {schedule.home.name}:"
        f" {steps} steps, {steps - len(todo)} already done, {len(todo)} to run.",
        markup=False,
    )
    if todo:
        log.print(table)
        if not schedule.pace.seconds:
            log.print("No step has been timed yet: the estimates are for the small backbone on one core.", style="dim")
        if not to_terminal:
            log.print("Each run writes the output of its steps to log.txt in its folder.", style="dim")
    for note in schedule.study.notes:
        log.print(note, style="yellow", markup=False, soft_wrap=True)


def _summarise(schedule: Schedule, wanted: Sequence[Run], failures: Sequence[Failure], report: Path) -> None:
    left = len(schedule.unfinished(wanted))
    steps = sum(len(each.steps) for each in wanted)
    rows: dict[str, object] = {
        "steps": f"{steps - left} of {steps} done",
        "results": schedule.out / results.RESULTS_FILE,
        "figures": schedule.out / "figures",
        "report": report.resolve(),
    }
    if schedule.searches:
        rows["settings"] = f"chosen on validation, see {schedule.out / selection.SELECTION_FILE}"
    if failures:
        rows["failed"] = "; ".join(f"{title_of(f.run)}, {f.step.name}" for f in failures)
    results.print_tables(schedule.out)
    page.print_verdicts(report)
    summary("Study", rows)
