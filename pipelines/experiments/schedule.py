"""Plans the steps of a study, estimates their time, and runs the unfinished ones in order."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vlm2rec.embedder.contract import schema, storage
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ConfigError, Vlm2RecError, did_you_mean
from vlm2rec.pipelines.config import StudyConfig
from vlm2rec.pipelines.console import headline, log, regular_lines
from vlm2rec.pipelines.experiments import controls, ledger, results, selection
from vlm2rec.pipelines.experiments.domains import shared_targets
from vlm2rec.pipelines.experiments.methods import CROSS_DOMAIN, LOOKS, Json, Run, Step, Study, Target, read_study, runs
from vlm2rec.pipelines.experiments.selection import Search
from vlm2rec.pipelines.experiments.workers import workers

# Seconds for one unit of work before any step was timed: the small backbone and small recommenders on one core.
_ROUGH_SECONDS = {
    "finetune": 0.042,  # a user in a training step
    "export-items": 0.004,  # an item
    "import-vectors": 0.001,
    "encoder": 0.02,  # an item, by export-items
    "question": 0.1,
    "evaluate": 0.005,  # a user
    "probe-images": 0.002,  # an item whose image the export has read
    "SASRec": 0.00016,  # an interaction in an epoch
    "GRU4Rec": 0.00009,
    "BERT4Rec": 0.00025,
    "VBPR": 0.00002,
    "FREEDOM": 0.00002,
    "LATTICE": 0.00004,
    "SLMRec": 0.0001,
}


@dataclass
class Failure:
    """A step that failed; the steps that need its output were not run."""

    run: Run
    step: Step
    error: Vlm2RecError


@dataclass
class Pace:
    """Seconds per unit of work, by kind of step: a rough guess until one step of a kind is done, then measured."""

    units: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, step: Step, seconds: float, data: Dataset) -> None:
        """Add the time of a step that ran without interruption."""
        self.units[kind_of(step)] += _work(step, data)
        self.seconds[kind_of(step)] += seconds

    def of(self, step: Step, data: Dataset) -> float:
        """Return the estimated seconds of a step."""
        kind = kind_of(step)
        rate = self.seconds[kind] / self.units[kind] if self.units[kind] else _ROUGH_SECONDS.get(kind, 0.01)
        return 0.5 + rate * _work(step, data)


@dataclass
class Schedule:
    """A study that can be run: its runs and its datasets.

    With `--select valid`, `runs` have the settings that are chosen already. The runs of `undecided` methods cannot
    begin: they wait for the trials of `searches`.
    """

    study: Study
    out: Path
    home: Target
    domains: list[Target]
    runs: list[Run]
    datasets: dict[Path, Dataset]
    marks: dict[Path, str]
    searches: list[Search] = field(default_factory=list)
    undecided: frozenset[str] = frozenset()
    pace: Pace = field(default_factory=Pace)

    def settings(self, step: Step) -> Json:
        """Return a step's settings in the form that is recorded and compared."""
        return ledger.identity(step, self.out, self.marks[step.config.data])

    def trials_for(self, runs: Sequence[Run]) -> list[Run]:
        """Return the trials that choose the settings of these runs."""
        of = {selection.source_of_settings(self.study, run.method).name for run in runs}
        return [trial.run for search in self.searches if search.method.name in of for trial in search.trials]

    def collect(self) -> None:
        """Write the Parquet files of the results so far."""
        trials = selection.trial_rows(self.out, self.searches)
        search = selection.about_searches(self.study, self.searches)
        results.collect(self.study, self.out, self.runs, self.home, self.domains, trials, search)

    def unfinished(self, runs: Sequence[Run]) -> list[tuple[Run, Step]]:
        """Return the steps to run, in order: the unfinished ones, and all that read their output."""
        stale: set[Path] = set()
        found = []
        for run in runs:
            for step in run.steps:
                if stale.intersection(step.after) or not ledger.is_finished(run, step):
                    stale.add(step.folder)
                    found.append((run, step))
        return found


def plan_schedule(config: StudyConfig, more: Json | None = None) -> Schedule:
    """Read the study and its datasets and plan the runs; write nothing.

    Args:
        config: flags of the command.
        more: settings of a command; they override the default study, and the YAML overrides them.
    """
    assert config.data is not None and config.backbone is not None
    data = Dataset(config.data).warm()
    study = _with_looks(read_study(config, len(data.user_ids), more), data)
    home = Target(data.name, config.data)
    searches: list[Search] = []
    undecided: frozenset[str] = frozenset()
    if config.select == "valid":
        searches = selection.plan_searches(study, config.out, home, config.backbone, config.device)
        chosen = selection.chosen(config.out, searches)
        study = _with_looks(read_study(config, len(data.user_ids), more, chosen), data)
        waiting = {search.method.name for search in searches} - chosen.keys()
        undecided = frozenset(
            method.name
            for method in study.methods
            if selection.source_of_settings(study, study.method(method.vectors_of or method.name)).name in waiting
        )
    domains = _domains(study, data)
    datasets = {target.data: Dataset(target.data).warm() for target in (home, *domains)}
    planned = runs(study, config.out, home, domains, config.backbone, config.device)
    marks = {path: mark_of(dataset) for path, dataset in datasets.items()}
    shuffled = controls.shuffled_folder(config.out)  # it has the same items and users
    datasets[shuffled], marks[shuffled] = datasets[home.data], controls.shuffled_mark(marks[home.data])
    return Schedule(study, config.out, home, domains, planned, datasets, marks, searches, undecided)


def _with_looks(study: Study, data: Dataset) -> Study:
    """Return the study with the column of its looks: the one it names, else `LOOKS` if the items have it."""
    columns = data.items.column_names
    if study.looks is None:
        return replace(study, looks=LOOKS) if LOOKS in columns and data.has_images else study
    if study.looks not in columns:
        near = did_you_mean(study.looks, columns)
        raise ConfigError(
            f"looks: {study.looks}{near} is not a column of {data.path / schema.ITEMS_FILE}",
            f"one of {', '.join(columns)}",
            "correct the YAML, or leave it out: the gate of the looks is then not measured",
        )
    return study


def mark_of(data: Dataset) -> str:
    """Return a digest of the dataset's files: it identifies the dataset at any path."""
    files = data.meta.get("sha256") or {name: storage.sha256_file(data.path / name) for name in schema.DATASET_TABLES}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]


def _domains(study: Study, data: Dataset) -> list[Target]:
    if CROSS_DOMAIN not in study.analyses:
        return []
    found: list[Target] = []
    for number, path in enumerate(map(Path, study.cross_domain)):
        domain = Dataset(path).warm()
        require_other_domain(data, domain, study.shared_users, study.shared_items)
        found.append(Target(_free_name(domain.name, data.name, found), path, f"cross-{number}-"))
    return found


def _free_name(name: str, home: str, found: Sequence[Target]) -> str:
    taken = {home, *(target.name for target in found)}
    return name if name not in taken else next(f"{name} {n}" for n in range(2, 1000) if f"{name} {n}" not in taken)


def require_other_domain(home: Dataset, domain: Dataset, shared_users: str, shared_items: str = "refuse") -> None:
    """Refuse a target domain that shares items or users with the training data, unless the study allows it.

    Raises:
        ConfigError: an item or a user is in both, and `shared_items` or `shared_users` is "refuse"; or `shared_items`
            is "drop" and no user would be left.
    """
    items = sorted(set(home.item_ids).intersection(domain.item_ids))
    users = sorted(set(home.user_ids).intersection(domain.user_ids))
    if items and shared_items == "refuse":
        raise ConfigError(
            f"{len(items)} items of {domain.path} are in {home.path} too, for example {items[0]!r}",
            "a target domain without items that a method was trained on",
            "prepare it without them, or with other ids if they are different items; or set `shared_items:"
            " drop`, which leaves out the users whose next item is shared; or set `shared_items: count`, which"
            " measures them too",
        )
    if items and shared_items == "drop" and all(shared_targets(home, domain)):
        raise ConfigError(
            f"the next item of every user of {domain.path} is in {home.path} too, for example {items[0]!r}, and"
            " `shared_items` is drop",
            "a user whose next item no method was trained on",
            "choose another target domain, or set `shared_items: count`",
        )
    if users and shared_users == "refuse":
        raise ConfigError(
            f"{len(users)} users of {domain.path} are in {home.path} too, for example {users[0]!r}",
            "a target domain without users that a method was trained on",
            "prepare it without them, or set `shared_users: count` if they are different people or may be shared",
        )


def settle_changes(schedule: Schedule, redo: bool) -> None:
    """Refuse finished steps whose settings changed; with `redo`, remove their output, so that they run again.

    Whether the settings of `undecided` methods change, only the trials will tell.
    """
    decided = [run for run in schedule.runs if run.method.name not in schedule.undecided]
    _settle(schedule, decided, redo)


def settle_trials(schedule: Schedule, redo: bool) -> None:
    """Do for the search of `--select valid`, and its trials, what `settle_changes` does for the runs."""
    selection.settle_search(schedule.out, schedule.searches, redo)
    _settle(schedule, [trial.run for search in schedule.searches for trial in search.trials], redo)


def _settle(schedule: Schedule, runs: Sequence[Run], redo: bool) -> None:
    changed = []
    for run in runs:
        for step in run.steps:
            change = ledger.change(run, step, schedule.settings(step))
            if change is not None:
                changed.append(change)
    if changed and not redo:
        first = changed[0]
        raise ConfigError(
            f"{len(changed)} steps were run with other settings, the first {title_of(first.run)}, {first.step.name}:"
            f" {first.setting} was {first.before!r} and is now {first.now!r}",
            "the same settings, to continue the study",
            "give another --out, or --redo to run these steps again",
        )
    for change in changed:
        ledger.forget(change.run, change.step)


def run_steps(
    schedule: Schedule,
    todo: Sequence[tuple[Run, Step]],
    jobs: int = 1,
    to_terminal: bool = False,
    before: int = 0,
    later: Sequence[tuple[Run, Step]] = (),
) -> list[Failure]:
    """Run the steps, `jobs` at a time; after a failure, only the steps that need its output are not run.

    Args:
        schedule: the study.
        todo: the steps, in order.
        jobs: the number of steps at a time.
        to_terminal: print the output of the steps to the terminal, instead of to the log of their run; for one job.
        before: how many steps of this call of the command are done, for the count that is printed.
        later: the steps that come after these, for the count and the time that are printed.
    """
    failures: list[Failure] = []
    unavailable: set[Path] = set()
    waiting, under_way = list(todo), list[tuple[Run, Step]]()
    begun, number, total = time.perf_counter(), before, before + len(todo) + len(later)
    shuffled = controls.shuffled_folder(schedule.out)
    if any(step.config.data == shuffled for _, step in todo):
        controls.shuffle_images(Dataset(schedule.home.data), shuffled, schedule.marks[shuffled])

    def lines() -> Iterator[str]:
        for run, step in tuple(under_way):
            yield f"          {title_of(run)}: {step.name}: {ledger.last_line(run)}"

    regular = contextlib.nullcontext() if to_terminal else regular_lines(lines)
    with workers(jobs, to_terminal) as pool, regular:
        while waiting or under_way:
            while pool.free and (work := _next_to_start(waiting, under_way, unavailable)) is not None:
                waiting.remove(work)
                number += 1
                left = sum(
                    schedule.pace.of(s, schedule.datasets[s.config.data])
                    for _, s in (work, *waiting, *under_way, *later)
                )
                _announce(number, total, *work, time.perf_counter() - begun, left / jobs, to_terminal)
                ledger.begin(*work, schedule.settings(work[1]))
                under_way.append(work)
                pool.start(work)
            if not under_way:
                break  # the remaining steps need the output of a failed one
            (run, step), outcome = pool.next()
            under_way.remove((run, step))
            if isinstance(outcome, Vlm2RecError):
                log.print(f"  failed: {outcome}", style="red", markup=False, soft_wrap=True)
                failures.append(Failure(run, step, outcome))
                unavailable.add(step.folder)
                continue
            ledger.end(run, step, outcome)
            if ledger.records(run.folder)[step.name]["attempts"] == 1:
                schedule.pace.add(step, outcome, schedule.datasets[step.config.data])
            # a trial changes no table, and until the choice is made nothing of the test is read
            if run.trial is None and not any(run.seed == other.seed for other, _ in (*waiting, *under_way)):
                schedule.collect()  # all runs of this seed are done
    return failures


def _next_to_start(
    waiting: Sequence[tuple[Run, Step]], under_way: Sequence[tuple[Run, Step]], unavailable: set[Path]
) -> tuple[Run, Step] | None:
    """Return the first step whose inputs are there; of each run one step at a time, because a run has one log."""
    busy = {run.folder for run, _ in under_way}
    missing = unavailable | {step.folder for _, step in (*waiting, *under_way)}
    for run, step in waiting:
        if run.folder not in busy and not missing.intersection(step.after):
            return run, step
    return None


def kind_of(step: Step) -> str:
    """Return the kind of a step, for estimates of time: its command, or the recommender that it trains."""
    if step.command == "export-items" and step.config.encoder is not None:
        return "encoder"
    if step.command == "export-items" and step.config.strategy == "question":
        return "question"
    return str(step.config.model) if step.command == "train-recommender" else step.command


def _work(step: Step, data: Dataset) -> float:
    """Return the size of a step in the units of `_ROUGH_SECONDS`."""
    config, users = step.config, len(data.user_ids)
    if step.command == "finetune":
        taken = min(config.users or users, users)
        rows = config.max_steps * config.batch_size if config.max_steps else config.epochs * taken
        one_view = getattr(config, "views", "both") not in ("both", None) or config.fusion == "internal"
        return float(rows * (0.6 if one_view else 1.0))
    if step.command == "train-recommender":
        return float(config.max_epochs * data.meta.get("interactions", 10 * users))
    return float(users if step.command == "evaluate" else len(data.item_ids))


def learn_pace(schedule: Schedule) -> None:
    """Learn the pace from the finished steps that ran without interruption."""
    for run in (*schedule.trials_for(schedule.runs), *schedule.runs):
        known = ledger.records(run.folder)
        for step in run.steps:
            record = known.get(step.name, {})
            if record.get("finished") and record.get("attempts") == 1:
                schedule.pace.add(step, record["seconds"], schedule.datasets[step.config.data])


def title_of(run: Run) -> str:
    """Return the name of a run at the terminal."""
    if run.trial is not None:
        return f"{run.method.name}, trial {run.trial}"
    return run.method.name if run.seed is None else f"{run.method.name}, seed {run.seed}"


def _announce(number: int, total: int, run: Run, step: Step, elapsed: float, left: float, to_terminal: bool) -> None:
    times = f"{clock(elapsed)} elapsed, about {clock(left)} left"
    if to_terminal:
        headline(f"{number}/{total}  {step.command}", f"{run.method.name}, {step.name} · {times}")
    else:
        log.print(f"{number:>4}/{total}  {title_of(run)}: {step.name}  ({times})", markup=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """Return seconds as hours, minutes and seconds: `3725` → `1:02:05`."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
