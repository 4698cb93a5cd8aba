"""`vlm2rec study`: a matrix of methods and seeds, resumable step by step, and every table and figure drawn from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from vlm2rec.embedder import schema, storage
from vlm2rec.embedder.dataset import Dataset
from vlm2rec.embedder.errors import ConfigError, Vlm2RecError
from vlm2rec.embedder.writer_lock import LOCK_FILE, writing
from vlm2rec.pipelines import study_cells, study_report, study_results
from vlm2rec.pipelines.config import StudyConfig
from vlm2rec.pipelines.console import log, summary
from vlm2rec.pipelines.demo import library_versions
from vlm2rec.pipelines.study_laboratory import draw_laboratory
from vlm2rec.pipelines.study_methods import CROSS_DOMAIN, Cell, Json, Step, Study, Target, cells, read_study
from vlm2rec.pipelines.study_workers import workers

STUDY_FILE = "study.json"
WRITTEN_BY = "vlm2rec study"

# Seconds for one unit of work before anything is measured: the small backbone and small recommenders on one core.
_ROUGH = {
    "finetune": 0.042,  # a user in a training step
    "export-items": 0.004,  # an item
    "import-vectors": 0.001,
    "encode-frozen": 0.02,
    "encode-prompted": 0.1,
    "evaluate": 0.005,  # a user
    "SASRec": 0.00016,  # an interaction in an epoch
    "GRU4Rec": 0.00009,
    "BERT4Rec": 0.00025,
}


@dataclass
class Failure:
    """A step that could not be done; the rest of its cell was left out."""

    cell: Cell
    step: Step
    error: Vlm2RecError


@dataclass
class Pace:
    """Seconds per unit of work, by command: rough at first, measured as soon as one step of a kind is done."""

    units: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, step: Step, seconds: float, data: Dataset) -> None:
        """Learn from a step that was done in one go."""
        self.units[_kind(step)] += _work(step, data)
        self.seconds[_kind(step)] += seconds

    def of(self, step: Step, data: Dataset) -> float:
        """Return how long a step may take, in seconds."""
        kind = _kind(step)
        rate = self.seconds[kind] / self.units[kind] if self.units[kind] else _ROUGH.get(kind, 0.01)
        return 0.5 + rate * _work(step, data)


@dataclass
class Course:
    """A study under way: its cells, and what they are measured on."""

    study: Study
    out: Path
    home: Target
    domains: list[Target]
    cells: list[Cell]
    datasets: dict[Path, Dataset]
    marks: dict[Path, str]
    pace: Pace = field(default_factory=Pace)

    def settings(self, step: Step) -> Json:
        """Return a step's settings as they are remembered and compared."""
        return study_cells.identity(step, self.out, self.marks[step.config.data])

    def unfinished(self, cells: Sequence[Cell]) -> list[tuple[Cell, Step]]:
        """Return the steps that have to run, in order; what follows an unfinished step has to run as well."""
        stale: set[Path] = set()
        found = []
        for cell in cells:
            for step in cell.steps:
                if stale.intersection(step.after) or not study_cells.is_finished(cell, step):
                    stale.add(step.folder)
                    found.append((cell, step))
        return found


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
            course, wanted = _planned(config)
            _announce(course, wanted, course.unfinished(wanted), config.jobs)
            return config.out
    with writing(config.out):
        config = draw_laboratory(config) if config.demo else config
        course, wanted = _planned(config)
        _settle_changes(course, config.redo)
        todo = course.unfinished(wanted)
        _announce(course, wanted, todo, config.jobs)
        if config.plan_only:
            return config.out
        _remember(course, config)
        failures = _run_steps(course, todo, config.jobs)
        study_results.collect(course.study, course.out, course.cells, course.home, course.domains)
        report = study_report.run(config.out)
    _summarise(course, wanted, failures, report)
    if failures:
        raise failures[0].error
    return report


def _require_material(config: StudyConfig) -> None:
    for name, value in (("--data", config.data), ("--backbone", config.backbone)):
        if value is None:
            raise ConfigError(
                f"{name} is missing", "a dataset folder and a backbone", f"give {name}, or --demo to draw both"
            )


def _planned(config: StudyConfig) -> tuple[Course, list[Cell]]:
    """Return the whole course, and the cells of the methods that --methods picks."""
    course = plan_course(config)
    picked = {method.name for method in course.study.picked(config.methods)}
    return course, [cell for cell in course.cells if cell.method.name in picked]


def plan_course(config: StudyConfig) -> Course:
    """Read the study and its datasets and lay out the cells; nothing is written."""
    assert config.data is not None and config.backbone is not None
    data = Dataset(config.data)
    study = read_study(config, users=len(data.user_ids))
    home = Target(data.name, config.data)
    domains = _domains(study, data)
    datasets = {target.data: Dataset(target.data) for target in (home, *domains)}
    laid = cells(study, config.out, home, domains, config.backbone, config.device)
    return Course(study, config.out, home, domains, laid, datasets, {p: mark_of(d) for p, d in datasets.items()})


def mark_of(data: Dataset) -> str:
    """Return what tells one dataset from another, whatever its path: a digest of its files' digests."""
    files = data.meta.get("sha256") or {
        name: storage.sha256_file(data.path / name)
        for name in (schema.ITEMS_FILE, schema.SEQUENCES_FILE, schema.NEGATIVES_FILE)
    }
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]


def _domains(study: Study, data: Dataset) -> list[Target]:
    if CROSS_DOMAIN not in study.analyses:
        return []
    found: list[Target] = []
    for number, path in enumerate(map(Path, study.cross_domain)):
        there = Dataset(path)
        require_other_domain(data, there, study.shared_users)
        found.append(Target(_other_name(there.name, data.name, found), path, f"cross-{number}-"))
    return found


def _other_name(name: str, home: str, found: Sequence[Target]) -> str:
    taken = {home, *(target.name for target in found)}
    return name if name not in taken else next(f"{name} {n}" for n in range(2, 1000) if f"{name} {n}" not in taken)


def require_other_domain(home: Dataset, there: Dataset, shared_users: str) -> None:
    """Refuse a target domain whose items, or users, occur in the training data.

    Raises:
        ConfigError: an item, or unless `shared_users` is "count" a user, is in both.
    """
    items = sorted(set(home.item_ids).intersection(there.item_ids))
    users = sorted(set(home.user_ids).intersection(there.user_ids))
    if items:
        raise ConfigError(
            f"{len(items)} items of {there.path} are in {home.path} too, for instance {items[0]!r}",
            "a target domain without items that a method was trained on",
            "prepare it without them, or under other ids if they are other things",
        )
    if users and shared_users == "refuse":
        raise ConfigError(
            f"{len(users)} users of {there.path} are in {home.path} too, for instance {users[0]!r}",
            "a target domain without users that a method was trained on",
            "prepare it without them, or set `shared_users: count` if these are other people or that is meant",
        )


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


def _settle_changes(course: Course, redo: bool) -> None:
    """Refuse cells whose settings changed, or with `redo` forget them, so that they are run again."""
    changed = []
    for cell in course.cells:
        for step in cell.steps:
            change = study_cells.change(cell, step, course.settings(step))
            if change is not None:
                changed.append(change)
    if changed and not redo:
        first = changed[0]
        raise ConfigError(
            f"{len(changed)} steps were run with other settings, the first {_title(first.cell)}, {first.step.name}:"
            f" {first.setting} was {first.before!r} and is now {first.now!r}",
            "the same settings, to go on with the study",
            "give another --out, or --redo to run these steps again",
        )
    for change in changed:
        study_cells.forget(change.cell, change.step)


def _remember(course: Course, config: StudyConfig) -> None:
    schema.write_json(
        course.out / STUDY_FILE,
        {
            "written_by": WRITTEN_BY,
            "command": {
                key: str(value) if isinstance(value, Path) else value
                for key, value in dataclasses.asdict(config).items()
            },
            "study": dataclasses.asdict(course.study),
            "data": str(course.home.data.resolve()),
            "contents of data": course.marks[course.home.data],
            "versions": library_versions(),
            "notes": list(course.study.notes),
        },
    )


# --- running ------------------------------------------------------------------------------------------------


def _run_steps(course: Course, todo: Sequence[tuple[Cell, Step]], jobs: int) -> list[Failure]:
    """Run the steps in order, `jobs` at a time; a failure leaves out what depends on it and nothing else."""
    failures: list[Failure] = []
    without: set[Path] = set()
    waiting, under_way = list(todo), list[tuple[Cell, Step]]()
    begun, number = time.perf_counter(), 0
    with workers(jobs) as hands:
        while waiting or under_way:
            while hands.free and (work := _next_to_start(waiting, under_way, without)) is not None:
                waiting.remove(work)
                number += 1
                left = sum(course.pace.of(s, course.datasets[s.config.data]) for _, s in (work, *waiting, *under_way))
                _headline(number, len(todo), *work, time.perf_counter() - begun, left / jobs)
                study_cells.begin(*work, course.settings(work[1]))
                under_way.append(work)
                hands.start(work)
            if not under_way:
                break  # what is left depends on what failed
            (cell, step), outcome = hands.next()
            under_way.remove((cell, step))
            if isinstance(outcome, Vlm2RecError):
                log.print(f"  failed: {outcome}", style="red", markup=False, soft_wrap=True)
                failures.append(Failure(cell, step, outcome))
                without.add(step.folder)
                continue
            study_cells.end(cell, step, outcome)
            if study_cells.records(cell.folder)[step.name]["attempts"] == 1:
                course.pace.add(step, outcome, course.datasets[step.config.data])
            if not any(cell.seed == other.seed for other, _ in (*waiting, *under_way)):
                # a round is complete: the tables hold one more seed of every method
                study_results.collect(course.study, course.out, course.cells, course.home, course.domains)
    return failures


def _next_to_start(
    waiting: Sequence[tuple[Cell, Step]], under_way: Sequence[tuple[Cell, Step]], without: set[Path]
) -> tuple[Cell, Step] | None:
    """Return the first step that reads from nothing missing; a cell does one at a time, as it keeps one log."""
    busy = {cell.folder for cell, _ in under_way}
    missing = without | {step.folder for _, step in (*waiting, *under_way)}
    for cell, step in waiting:
        if cell.folder not in busy and not missing.intersection(step.after):
            return cell, step
    return None


def _kind(step: Step) -> str:
    return str(step.config.model) if step.command == "train-recommender" else step.command


def _work(step: Step, data: Dataset) -> float:
    """Return how much there is to do, in the units of `_ROUGH`."""
    config, users = step.config, len(data.user_ids)
    if step.command == "finetune":
        taken = min(config.users or users, users)
        rows = config.epochs * taken
        rows = min(rows, config.max_steps * config.batch_size) if config.max_steps else rows
        one_view = getattr(config, "views", "both") not in ("both", None) or config.fusion == "internal"
        return float(rows * (0.6 if one_view else 1.0))
    if step.command == "train-recommender":
        return float(config.max_epochs * data.meta.get("interactions", 10 * users))
    return float(users if step.command == "evaluate" else len(data.item_ids))


# --- what the person sees -----------------------------------------------------------------------------------


def _announce(course: Course, wanted: Sequence[Cell], todo: Sequence[tuple[Cell, Step]], jobs: int) -> None:
    """Say what will run and how long it may take."""
    _learn_pace(course)
    rows: dict[str, tuple[set[str], int, int, float]] = {}
    for cell, step in todo:
        kind = _kind(step)
        methods, count, _, seconds = rows.get(kind, (set(), 0, 0, 0.0))
        seconds += course.pace.of(step, course.datasets[step.config.data])
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
        f"Study of {len(names)} methods on {course.home.name}:"
        f" {steps} steps, {steps - len(todo)} done before, {len(todo)} to run.",
        markup=False,
    )
    if todo:
        log.print(table)
        if not course.pace.seconds:
            log.print("Nothing is measured yet: the times are those of the small backbone on one core.", style="dim")
        log.print("What the steps say is in log.txt of each cell.", style="dim")
    for note in course.study.notes:
        log.print(note, style="yellow", markup=False, soft_wrap=True)


def _learn_pace(course: Course) -> None:
    """Take the seconds of steps that were finished in one go."""
    for cell in course.cells:
        known = study_cells.records(cell.folder)
        for step in cell.steps:
            record = known.get(step.name, {})
            if record.get("finished") and record.get("attempts") == 1:
                course.pace.add(step, record["seconds"], course.datasets[step.config.data])


def _title(cell: Cell) -> str:
    return cell.method.name if cell.seed is None else f"{cell.method.name}, seed {cell.seed}"


def _headline(number: int, total: int, cell: Cell, step: Step, elapsed: float, left: float) -> None:
    log.print(
        f"{number:>4}/{total}  {_title(cell)}: {step.name}  ({clock(elapsed)} gone, about {clock(left)} left)",
        markup=False,
        soft_wrap=True,
    )


def clock(seconds: float) -> str:
    """`3725` → `1:02:05`."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _summarise(course: Course, wanted: Sequence[Cell], failures: Sequence[Failure], report: Path) -> None:
    left = len(course.unfinished(wanted))
    steps = sum(len(cell.steps) for cell in wanted)
    rows: dict[str, object] = {
        "steps": f"{steps - left} of {steps} done",
        "results": course.out / study_results.RESULTS_FILE,
        "figures": course.out / "figures",
        "report": report.resolve(),
    }
    if failures:
        rows["failed"] = "; ".join(f"{_title(f.cell)}, {f.step.name}" for f in failures)
    study_results.print_tables(course.out)
    summary("Study", rows)
