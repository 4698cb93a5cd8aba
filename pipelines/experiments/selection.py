"""Selection without peeking (`study --select valid`): settings are chosen on validation, with equally many trials each.

Every method that trains has the same number of trials: settings drawn from its own grid, trained with one seed, each in
a folder of its own (`METHOD/trial-N`). A trial's score is its best N@20 on validation users, whose second to last item
is ranked among candidates drawn for validation alone (`catalogue.negatives`). `selection.json` holds the trials, their
scores and the choice; only then do the runs of all seeds begin, with the chosen settings, and only they meet the test.

The grid of a method is the study's `search.grid`, as far as the method has such settings, and its own `search`. A
method that is `tuned_like` another takes that one's chosen settings, below its own, and has no trials. The methods of a
grid over one setting (few-shot, sensitivity, families) take those of their base, except for what they vary.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.checksums import is_intact, sealed
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, did_you_mean
from vlm2rec.embedder.training.recipes import check_settings, unread
from vlm2rec.pipelines.config import FinetuneConfig
from vlm2rec.pipelines.experiments import controls, ledger
from vlm2rec.pipelines.experiments.methods import (
    SOURCES,
    Json,
    Method,
    Run,
    RunContext,
    Step,
    Study,
    Target,
    seeds_of,
    training_method,
)
from vlm2rec.pipelines.experiments.results import COMPARED, FinishedStep

SELECTION_FILE = "selection.json"  # of a study folder
OWN_CANDIDATES = "own"
_ONLY_MEASURED: Json = {"gradient_steps": 0, "probe_users": 0}  # what costs time and changes neither weights nor score
# the study sets these, or they decide what a score means
_NOT_SEARCHED = {
    *("data", "backbone", "out", "images", "revision", "method", "device", "resume", "seed", "vision_cache"),
    *("valid_users", "valid_candidates", "users", "dry_run"),
}
_WHAT = "the choice of a study's settings"
_CHOOSE_AGAIN = "remove it and run the study again: it is written again from the finished trials"


@dataclass(frozen=True)
class Trial:
    """One setting of a method's grid, trained with the seed of the search."""

    number: int  # from 1
    settings: Json
    run: Run

    @property
    def step(self) -> Step:
        """Return the training."""
        return self.run.steps[0]


@dataclass(frozen=True)
class Search:
    """The trials of one method."""

    method: Method
    grid: dict[str, tuple[Any, ...]]
    combinations: int
    seed: int
    trials: tuple[Trial, ...]

    def described(self) -> Json:
        """Return what decides the trials, in the form that reading the file gives."""
        return dict(
            json.loads(
                json.dumps(
                    {
                        "grid": self.grid,
                        "seed": self.seed,
                        "trials": [{"trial": each.number, "settings": each.settings} for each in self.trials],
                    }
                )
            )
        )


# --- planning -----------------------------------------------------------------------------------------------


def plan_searches(study: Study, out: Path, home: Target, backbone: str, device: str) -> list[Search]:
    """Return the trials of every method that has its own.

    Raises:
        ConfigError: a grid has fewer settings than the study has trials, or a setting that cannot be searched.
    """
    needed = {source_of_settings(study, method).name for method in study.methods if seeds_of(study, method)}
    found = []
    for method in study.methods:
        if method.name in needed and SOURCES[method.source].train is not None and method.vectors_of is None:
            data = controls.shuffled_folder(out) if method.shuffle_images else home.data
            context = RunContext(study, method, study.search.seed, data, method.backbone or backbone, device, out)
            found.append(_search(context))
    wanted = study.search.trials
    small = [search for search in found if search.combinations < wanted]
    if small:
        text = ", ".join(f"{search.method.name} {search.combinations} ({grid_text(search.grid)})" for search in small)
        raise ConfigError(
            f"--select valid with {wanted} trials of every method, but these methods have fewer settings to try:"
            f" {text}",
            f"{wanted} or more settings in the grid of every method that trains, so that all have equally many trials",
            f"give them more values (`search` of the method, or `search: {{grid: ...}}` for all), let them be"
            f" `tuned_like` another method, or lower `search: {{trials: {wanted}}}`",
        )
    return found


def source_of_settings(study: Study, method: Method) -> Method:
    """Return the method whose trials choose this method's settings: itself, or the one that it follows."""
    while followed := method.tuned_like or method.of:
        method = study.method(followed)
    return method


def _search(context: RunContext) -> Search:
    method, plan = context.method, context.study.search
    grid = _grid(context.study, method)
    combinations = math.prod(len(values) for values in grid.values())
    if plan.trials < combinations:
        places = np.random.default_rng(plan.seed).permutation(combinations)[: plan.trials].tolist()
    else:
        places = list(range(combinations))
    every = list(itertools.product(*grid.values()))
    trials = [
        _trial(context, number, dict(zip(grid, every[place], strict=True))) for number, place in enumerate(places, 1)
    ]
    return Search(method, grid, combinations, plan.seed, tuple(trials))


def _grid(study: Study, method: Method) -> dict[str, tuple[Any, ...]]:
    """Return the values to try of each setting of a method."""
    kind = training_method(study, method)
    others = unread(kind)
    merged = {**{name: values for name, values in study.search.grid.items() if name not in others}, **method.search}
    known = [f.name for f in dataclasses.fields(FinetuneConfig)]
    for name, values in merged.items():
        where = f"the search of method {method.name!r}"
        if name not in known or name in _NOT_SEARCHED:
            near = did_you_mean(name, [each for each in known if each not in _NOT_SEARCHED])
            raise ConfigError(
                f"{name!r} in {where}{near}",
                "settings of finetune that decide what is learned",
                "remove it from the search",
            )
        if not isinstance(values, list | tuple) or not values:
            raise ConfigError(f"{name} = {values!r} in {where}", "a list of values to try", "correct the YAML")
        if any(value in values[:place] for place, value in enumerate(values)):
            raise ConfigError(f"{name} = {list(values)} in {where}", "each value once", "correct the YAML")
    return {name: tuple(values) for name, values in merged.items()}


def _trial(context: RunContext, number: int, settings: Json) -> Trial:
    method = context.method
    tried = dataclasses.replace(method, finetune={**method.finetune, **settings, **_ONLY_MEASURED})
    folder = context.folder / method.slug / f"trial-{number}"
    train = SOURCES[method.source].train
    assert train is not None
    step = train(dataclasses.replace(context, method=tried, folder=folder))
    check_settings(step.config)
    if step.config.valid_candidates != OWN_CANDIDATES:
        raise ConfigError(
            f"--select valid, and method {method.name!r} has valid_candidates {step.config.valid_candidates}: the test"
            " would rank among the items that the choice was made with",
            f"valid_candidates {OWN_CANDIDATES}",
            "leave it out of `finetune`",
        )
    return Trial(number, settings, Run(method, context.seed, folder, (step,), number))


# --- the choice ---------------------------------------------------------------------------------------------


def read_selection(out: Path) -> dict[str, Json]:
    """Return what `selection.json` says of each method, by its name; empty without the file.

    Raises:
        ArtifactError: the file does not have the content that was written.
    """
    path = out / SELECTION_FILE
    if not path.is_file():
        return {}
    found = schema.read_json(path, _WHAT, _CHOOSE_AGAIN)
    if not is_intact(found) or not isinstance(found.get("methods"), dict):
        raise ArtifactError(f"{path} does not have the content that was written", _WHAT, _CHOOSE_AGAIN)
    return dict(found["methods"])


def chosen(out: Path, searches: Iterable[Search]) -> dict[str, Json]:
    """Return the chosen settings by method, of methods whose choice was made from the trials as they are now."""
    written = read_selection(out)
    found = {}
    for search in searches:
        entry = written.get(search.method.name)
        if entry and _tried(entry) == search.described() and entry["runs"] == _runs_of(search):
            found[search.method.name] = dict(entry["settings"])
    return found


def _tried(entry: Json) -> Json:
    trials = [{key: each[key] for key in ("trial", "settings")} for each in entry["trials"]]
    return {"grid": entry["grid"], "seed": entry["seed"], "trials": trials}


def _runs_of(search: Search) -> list[str | None]:
    """Return the marks of the trials' trainings, which are new whenever one is trained again; None: not finished."""
    return [
        ledger.records(each.run.folder)[each.step.name]["mark"] if ledger.is_finished(each.run, each.step) else None
        for each in search.trials
    ]


def settle_search(out: Path, searches: Sequence[Search], redo: bool) -> None:
    """Refuse a search that is not the one of the written choice; with `redo`, forget that choice."""
    written = read_selection(out)
    changed = [
        search
        for search in searches
        if search.method.name in written and _tried(written[search.method.name]) != search.described()
    ]
    if changed and not redo:
        before, now = written[changed[0].method.name], changed[0].described()
        raise ConfigError(
            f"the settings of {changed[0].method.name} were chosen by another search: {_difference(before, now)}",
            f"the same grid, seed and number of trials as in {out / SELECTION_FILE}",
            "give another --out, or --redo to search and choose again",
        )
    if changed:
        _write(out, {name: entry for name, entry in written.items() if name not in {s.method.name for s in changed}})


def _difference(before: Json, now: Json) -> str:
    if before["grid"] != now["grid"]:
        return f"the grid was {grid_text(before['grid'])} and is now {grid_text(now['grid'])}"
    if len(before["trials"]) != len(now["trials"]):
        return f"it had {len(before['trials'])} trials and has now {len(now['trials'])}"
    return f"its seed was {before['seed']} and is now {now['seed']}"


def choose(out: Path, searches: Iterable[Search]) -> list[str]:
    """Choose the settings of every method whose trials are all finished, and write them to `selection.json`.

    The best N@20 of validation is chosen, of equal ones the first. Returns the methods that have a choice now.
    """
    searches = list(searches)
    made = chosen(out, searches)
    written = read_selection(out)
    for search in searches:
        runs = _runs_of(search)
        if search.method.name not in made and None not in runs:
            written[search.method.name] = _entry(search, runs)
    if written:
        _write(out, written)
    return [search.method.name for search in searches if search.method.name in written]


def _entry(search: Search, runs: Sequence[str | None]) -> Json:
    trials: list[Json] = []
    for trial in search.trials:
        step, score = _score(trial)
        trials.append({"trial": trial.number, "settings": trial.settings, "step": step, COMPARED: score})
    best = max(trials, key=lambda row: (row[COMPARED], -row["trial"]))
    described = {"grid": search.grid, "seed": search.seed, "combinations": search.combinations}
    return {**described, "trials": trials, "chosen": best["trial"], "settings": best["settings"], "runs": list(runs)}


def _score(trial: Trial) -> tuple[int, float]:
    """Return the step that a trial's adapter is of, the best of its validations, and its N@20 there."""
    done = FinishedStep(trial.run, trial.step, "", ())
    best = done.read(schema.ADAPTER_FILE)["training"]["best_step"]
    row = next(row for row in done.read(schema.CURVES_FILE)["valid"] if row["step"] == best)
    return int(best), float(row[COMPARED])


def _write(out: Path, methods: Mapping[str, Json]) -> None:
    about = {
        "select": "valid",
        "score": f"best {COMPARED} of the validations of a training: the second to last item of the users, ranked among"
        " candidates drawn for validation alone",
        "ties": "the first trial",
        "methods": methods,
    }
    schema.write_json(out / SELECTION_FILE, sealed(about))


# --- for the tables -----------------------------------------------------------------------------------------


def trial_rows(out: Path, searches: Iterable[Search]) -> Iterator[Json]:
    """Yield the rows of `trials.parquet`: the trials of every method that has a choice."""
    searches = list(searches)
    made, written = chosen(out, searches), read_selection(out)
    for search in searches:
        if search.method.name not in made:
            continue
        entry = written[search.method.name]
        for trial, row in zip(search.trials, entry["trials"], strict=True):
            yield {
                "method": search.method.name,
                "trial": trial.number,
                "seed": search.seed,
                "settings": json.dumps(trial.settings),
                "step": row["step"],
                "score": row[COMPARED],
                "chosen": trial.number == entry["chosen"],
                "seconds": ledger.records(trial.run.folder)[trial.step.name]["seconds"],
            }


def about_searches(study: Study, searches: Iterable[Search]) -> Json | None:
    """Return what the page says about the search; None without one."""
    searches = list(searches)
    if not searches:
        return None
    names = {search.method.name for search in searches}
    followed = {
        method.name: source.name
        for method in study.methods
        if (source := source_of_settings(study, method)) is not method and source.name in names and not method.of
    }
    return {
        "trials": study.search.trials,
        "seed": study.search.seed,
        "methods": {
            search.method.name: {"grid": search.grid, "combinations": search.combinations} for search in searches
        },
        "followed": followed,
    }


def grid_text(grid: Mapping[str, Sequence[Any]]) -> str:
    """Return a grid as text: `tau_wpcl 0.05, 0.1; lam 0.1, 0.5`."""
    return "; ".join(f"{name} {', '.join(map(str, values))}" for name, values in grid.items()) or "no setting"
