"""Collects the results of a study's runs in Parquet files; every table and figure is drawn from these files only.

results.parquet      one row per method, seed, dataset, task, model, protocol, view, user group and metric
users.parquet        metrics per user, means over candidate sets; the bootstrap resamples these
comparisons.parquet  the reference against every other method: t-test over seeds with Holm, interval over users
geometry.parquet     A_pos, A_neg, U, S per view; U over pairs of users and of items, the offset of their means
views.parquet        per user of the study's dataset: N@20 of each pair of views, A_pos and A_neg of each view
curves.parquet       training, validation, probes and gradients over the steps
warnings.parquet     warnings of the collapse monitor
cost.parquet         seconds of every step
trials.parquet       the trials of `--select valid`, with their scores on validation and the chosen ones
neighbours.parquet   neighbours of some items in each view; common.parquet and pictures.parquet belong to it
methods.parquet      the methods, in order
about.parquet        dataset, versions, settings
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.table import Table

from vlm2rec.downstream.evaluation.metrics import bound_check, expected_metrics, tail_users
from vlm2rec.downstream.evaluation.protocol import PAIRS, SAME_VIEW, item_frequency
from vlm2rec.downstream.evaluation.statistics import compare, holm, spread
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.checksums import first_damage, is_intact
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError
from vlm2rec.embedder.contract.publish import whole_file
from vlm2rec.pipelines.console import log
from vlm2rec.pipelines.experiments import controls, ledger
from vlm2rec.pipelines.experiments.domains import shared_facts, shared_targets
from vlm2rec.pipelines.experiments.methods import (
    PROBE_IMAGES,
    SOURCES,
    Json,
    Run,
    Step,
    Study,
    Target,
    seeds_of,
    varied_value,
)
from vlm2rec.pipelines.experiments.neighbours import neighbour_tables

STUDY_FILE = "study.json"  # of a study folder: the study and its settings
RESULTS_FILE = "results.parquet"
ALL_USERS = "all"
TAIL_USERS = "tail"
"""Users whose target item has fewer than `metrics.TAIL` interactions (`tail_over`); independent of the buckets."""
MAIN_VIEW = "f2f"
COMPARED = "N@20"
DRAWS = 10_000
GEOMETRY = ("A_pos", "A_neg", "U", "S")
DISPERSION = ("U_users", "U_items", "offset")

_RESULT: dict[str, Any] = {
    "method": pl.String,
    "seed": pl.Int32,
    "dataset": pl.String,
    "task": pl.Int8,
    "model": pl.String,
    "protocol": pl.String,
    "view": pl.String,
    "user_group": pl.String,
    "metric": pl.String,
    "value": pl.Float64,
    "users": pl.Int32,
}
_KEY = ("method", "seed", "dataset", "task", "model")
_TABLES: dict[str, dict[str, Any]] = {
    "results": _RESULT,
    "users": {
        **{name: _RESULT[name] for name in _KEY},
        schema.USER_ID: pl.String,
        "frequency": pl.Int32,
        **dict.fromkeys(schema.METRICS, pl.Float64),
    },
    "comparisons": {
        **{name: _RESULT[name] for name in ("dataset", "task", "model")},
        "reference": pl.String,
        "method": pl.String,
        "family": pl.String,  # the tests that one Holm correction covers
        "metric": pl.String,
        "seeds": pl.Int32,
        "users": pl.Int32,
        **dict.fromkeys(("difference", "t", "p", "p_holm", "low", "high"), pl.Float64),
    },
    "geometry": {
        **{name: _RESULT[name] for name in ("method", "seed", "dataset", "view")},
        **dict.fromkeys((*GEOMETRY, *DISPERSION), pl.Float64),  # evaluations of earlier versions lack the latter
    },
    "views": {
        **{name: _RESULT[name] for name in ("method", "seed")},
        schema.USER_ID: pl.String,
        **dict.fromkeys(PAIRS, pl.Float64),
        **{f"{name}_{view}": pl.Float64 for name in schema.DISTANCES for view in schema.VIEWS},
    },
    "curves": {
        **{name: _RESULT[name] for name in ("method", "seed")},
        "kind": pl.String,
        "step": pl.Int32,
        "name": pl.String,
        "value": pl.Float64,
    },
    "warnings": {
        **{name: _RESULT[name] for name in ("method", "seed", "view")},
        "step": pl.Int32,
        "until": pl.Int32,
        "rule": pl.String,
        "message": pl.String,
    },
    "cost": {
        **{name: _RESULT[name] for name in ("method", "seed", "dataset")},
        "step": pl.String,
        "command": pl.String,
        "seconds": pl.Float64,
        "attempts": pl.Int32,
        "items": pl.Int32,
        "epochs": pl.Float64,
        "users": pl.Int32,
    },
    "trials": {
        "method": pl.String,
        "trial": pl.Int32,
        "seed": pl.Int32,
        "settings": pl.String,  # JSON
        "step": pl.Int32,  # of the best validation
        "score": pl.Float64,  # its N@20
        "chosen": pl.Boolean,
        "seconds": pl.Float64,
    },
    "methods": {
        "name": pl.String,
        "slug": pl.String,
        "source": pl.String,
        "analyses": pl.List(pl.String),
        "paper": pl.String,
        "varies": pl.String,
        "of": pl.String,
        "values": pl.String,
        "fixed": pl.Boolean,
        "role": pl.String,
    },
    "about": {"key": pl.String, "value": pl.String},
}
TABLE_NAMES = (*_TABLES, "neighbours", "common", "pictures")
ADDED = ("views", "trials")
"""Tables that studies of earlier versions do not have."""


@dataclass(frozen=True)
class FinishedStep:
    """A finished step of a method, with the seeds that its output is valid for."""

    run: Run
    step: Step
    dataset: str
    seeds: tuple[int, ...]

    def read(self, name: str) -> Json:
        """Return a JSON file of the step's folder.

        Raises:
            ArtifactError: it is missing, or does not have the content that was written.
        """
        folder = self.step.folder
        what, fix = f"a file that `vlm2rec {self.step.command}` writes", f"remove {folder} and run the study again"
        found = schema.read_json(schema.file_of(folder, name), what, fix)
        damage = None if is_intact(found) else f"{name} does not have the content that was written"
        if name == schema.CURVES_FILE:
            recorded = self.read(schema.ADAPTER_FILE).get("files", {})  # older adapters have none
            damage = first_damage(folder, {name: recorded[name]} if name in recorded else {})
        if damage:
            raise ArtifactError(f"{folder} is damaged: {damage}", what, fix)
        return found


def collect(
    study: Study,
    out: Path,
    runs: Sequence[Run],
    home: Target,
    domains: Sequence[Target],
    trials: Iterable[Json] = (),
    search: Json | None = None,
) -> None:
    """Read every finished run and write the Parquet files, each whole or not at all.

    Args:
        study: the study.
        out: its folder.
        runs: all runs, finished or not.
        home: the dataset of the study.
        domains: the target domains.
        trials: rows of `trials.parquet`.
        search: facts about the search that the trials belong to.

    Raises:
        ArtifactError: a row breaks the N@20 - N@10 bound, or a run's output cannot be read.
    """
    names = {target.data: target.name for target in (home, *domains)} | {controls.shuffled_folder(out): home.name}
    done = [
        FinishedStep(run, step, names[step.config.data], _seeds(study, run))
        for run in runs
        for step in run.steps
        if ledger.is_finished(run, step)
    ]
    datasets = {target.name: Dataset(target.data).warm() for target in (home, *domains)}
    embedded = _first_embeddings(done, home)
    measured = [each for each in done if each.step.command in ("evaluate", "train-recommender")]
    left_out = _left_out(study, domains, datasets[home.name], datasets)
    rows = list(_users(measured, datasets, left_out))
    of_views = list(_views(each for each in measured if each.dataset == home.name))
    users = pl.concat(rows) if rows else pl.DataFrame(schema=_TABLES["users"])
    tail = _tail_users(study, datasets)
    results = pl.concat(
        [_frame("results", _results(measured, left_out)), _group_metrics(users, study.cold_start, tail)]
    )
    require_bound(results)
    tables = {
        "results": results,
        "users": users,
        "comparisons": _frame("comparisons", _comparisons(study, users)),
        "geometry": _frame("geometry", _geometry(measured)),
        "views": pl.concat(of_views) if of_views else _frame("views", ()),
        "curves": _frame("curves", _curves(done)),
        "warnings": _frame("warnings", _warnings(done)),
        "cost": _frame("cost", _cost(done, datasets)),
        "trials": _frame("trials", trials),
        "methods": _frame("methods", _methods(study)),
        "about": _frame("about", _about(study, out, runs, home, domains, datasets, embedded, search, _looks(done))),
        **neighbour_tables(study, [(each.run.method, each.step.folder) for each in embedded], home.data),
    }
    for name, table in tables.items():
        _write(table, out / f"{name}.parquet")


def read_all(out: Path) -> dict[str, pl.DataFrame]:
    """Read every Parquet file of a study; those that its version did not write yet are empty."""
    found = {name: read(out, name) for name in TABLE_NAMES if name not in ADDED}
    earlier = "role" not in found["methods"].columns
    for name in ADDED:
        absent = earlier and not (out / f"{name}.parquet").exists()
        found[name] = _frame(name, ()) if absent else read(out, name)
    return found


def read(out: Path, name: str) -> pl.DataFrame:
    """Read one of the study's Parquet files."""
    path = out / f"{name}.parquet"
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist", "the results of a study", "run `vlm2rec study` first")
    try:
        return pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ArtifactError(f"{path} is damaged ({error})", "the results of a study", _STUDY_AGAIN) from None


_STUDY_AGAIN = "run `vlm2rec study` (or `demo`) again: it writes them from the finished runs"


def require_bound(results: pl.DataFrame) -> None:
    """Raise `ArtifactError` if no ranking can have the metrics of a row (`metrics.bound_check`)."""
    keys = [name for name in _RESULT if name not in ("metric", "value", "users")]
    wide = results.pivot("metric", index=keys, values="value")
    for row in wide.iter_rows(named=True):
        if not bound_check({name: row[name] for name in schema.METRICS}):
            raise ArtifactError(
                f"{ {key: row[key] for key in keys} } has {[row[name] for name in schema.METRICS]}",
                "N@20 - N@10 between 0.2277 and 0.2789 of H@20 - H@10",
                "remove the run's folder and run the study again",
            )


def _frame(name: str, rows: Iterable[Json]) -> pl.DataFrame:
    return pl.DataFrame(list(rows), schema=_TABLES[name], orient="row")


def _write(table: pl.DataFrame, path: Path) -> None:
    with whole_file(path) as temporary:
        table.write_parquet(temporary, compression="zstd")


def _seeds(study: Study, run: Run) -> tuple[int, ...]:
    """Return the seeds that a run's output is valid for: all of its method, if it uses no random numbers."""
    return seeds_of(study, run.method) if run.seed is None else (run.seed,)


def _keys(done: FinishedStep) -> Iterator[Json]:
    task = 1 if done.step.command == "evaluate" else 2
    model = None if task == 1 else done.step.config.model
    for seed in done.seeds:
        yield {
            "method": done.run.method.name,
            "seed": seed,
            "dataset": done.dataset,
            "task": task,
            "model": model,
        }


def _first_embeddings(done: Iterable[FinishedStep], home: Target) -> list[FinishedStep]:
    """Return the step with each method's embeddings of the first seed, on the dataset of the study."""
    found: dict[str, FinishedStep] = {}
    for each in done:
        shuffled = each.run.method.shuffle_images
        if not shuffled and each.step.done == schema.MANIFEST_FILE and each.dataset == home.name:
            found.setdefault(each.run.method.name, each)
    return list(found.values())


# --- metrics ------------------------------------------------------------------------------------------------


def _left_out(
    study: Study, domains: Sequence[Target], home: Dataset, datasets: dict[str, Dataset]
) -> dict[str, list[str]]:
    """Return, by target domain, the users that `shared_items: drop` leaves out; domains without any are absent."""
    found = {}
    for target in domains if study.shared_items == "drop" else ():
        domain = datasets[target.name]
        users = list(itertools.compress(domain.user_ids, shared_targets(home, domain)))
        if users:
            found[target.name] = users
    return found


def _without(done: FinishedStep, users: Sequence[str]) -> Json:
    """Return the metrics of a step as `metrics.json` has them, of all users but some."""
    metrics = done.read(schema.METRICS_FILE)
    table = pl.read_parquet(done.step.folder / schema.USERS_FILE).filter(~pl.col(schema.USER_ID).is_in(users))
    by_seed = table.group_by("protocol", "view", schema.SEED, maintain_order=True).agg(pl.col(*schema.METRICS).mean())
    means = by_seed.group_by("protocol", "view", maintain_order=True).agg(pl.col(*schema.METRICS).mean())
    found: Json = {"candidates": {}, "full": {}}
    for row in means.iter_rows(named=True):
        values = {name: row[name] for name in schema.METRICS}
        if metrics["task"] == 1:
            found[row["protocol"]][row["view"]] = values
        else:
            found[row["protocol"]] = values
    return metrics | found | {"users": table[schema.USER_ID].n_unique()}


def _results(measured: Iterable[FinishedStep], left_out: dict[str, list[str]]) -> Iterator[Json]:
    for done in measured:
        users = left_out.get(done.dataset)
        metrics = _without(done, users) if users else done.read(schema.METRICS_FILE)
        for protocol in ("candidates", "full"):
            by_view = metrics[protocol] if metrics["task"] == 1 else {None: metrics[protocol]}
            for key in _keys(done):
                for view, values in by_view.items():
                    context = {**key, "protocol": protocol, "view": view, "user_group": ALL_USERS}
                    for metric in schema.METRICS:
                        yield {**context, "metric": metric, "value": values[metric], "users": metrics["users"]}


def _users(
    measured: Iterable[FinishedStep], datasets: dict[str, Dataset], left_out: dict[str, list[str]]
) -> Iterator[pl.DataFrame]:
    """Yield each run's metrics per user, means over candidate sets, and the training frequency of the user's target."""
    order = list(_TABLES["users"])
    frequency = {name: _target_frequency(dataset) for name, dataset in datasets.items()}
    for done in measured:
        table = pl.read_parquet(done.step.folder / schema.USERS_FILE)
        mine = table.filter(
            (pl.col("protocol") == "candidates")
            & (pl.col("view").is_null() | (pl.col("view") == MAIN_VIEW))
            & ~pl.col(schema.USER_ID).is_in(left_out.get(done.dataset, []))
        )
        means = mine.group_by(schema.USER_ID, maintain_order=True).agg(pl.col(*schema.METRICS).mean())
        means = means.join(frequency[done.dataset], on=schema.USER_ID, how="left", maintain_order="left")
        for key in _keys(done):
            constants = [pl.lit(value, _RESULT[name]).alias(name) for name, value in key.items()]
            yield means.with_columns(constants).select(order).cast(pl.Schema(_TABLES["users"]))


def _views(measured: Iterable[FinishedStep]) -> Iterator[pl.DataFrame]:
    """Yield each run's N@20 per user and pair of views, means over candidate sets, and the users' A_pos and A_neg."""
    order = list(_TABLES["views"])
    for done in measured:
        if done.step.command != "evaluate":
            continue
        table = pl.read_parquet(done.step.folder / schema.USERS_FILE).filter(pl.col("protocol") == "candidates")
        # an evaluation of an earlier version has no distances
        table = table.with_columns(
            pl.lit(None, pl.Float64).alias(n) for n in schema.DISTANCES if n not in table.columns
        )
        pairs = [pair for pair in PAIRS if (table["view"] == pair).any()]
        parts = [table.filter(pl.col("view") == pair).group_by(schema.USER_ID, maintain_order=True) for pair in pairs]
        wide = table.select(schema.USER_ID).unique(maintain_order=True)
        for pair, part in zip(pairs, parts, strict=True):
            wanted = [pl.col(COMPARED).mean().alias(pair)]
            if pair in SAME_VIEW:  # one candidate set has them
                wanted += [pl.col(name).mean().alias(f"{name}_{SAME_VIEW[pair]}") for name in schema.DISTANCES]
            wide = wide.join(part.agg(wanted), on=schema.USER_ID, how="left", maintain_order="left")
        wide = wide.with_columns(pl.lit(None, pl.Float64).alias(name) for name in order[3:] if name not in wide.columns)
        for key in _keys(done):
            constants = [pl.lit(key[name], _RESULT[name]).alias(name) for name in ("method", "seed")]
            yield wide.with_columns(constants).select(order).cast(pl.Schema(_TABLES["views"]))


def _target_frequency(dataset: Dataset) -> pl.DataFrame:
    """Return how often each user's test item occurs in the training sequences."""
    frequency = dataset.train_frequency()[dataset.histories("test").targets]
    return pl.DataFrame({schema.USER_ID: dataset.user_ids, "frequency": frequency.astype(np.int32)})


def buckets(edges: Sequence[int]) -> list[tuple[str, int, int | None]]:
    """Return name, least and greatest training frequency of each bucket: `[5, 10]` → `0-5`, `6-10`, `11+`."""
    found: list[tuple[str, int, int | None]] = []
    low = 0
    for edge in sorted(edges):
        found.append((f"{low}-{edge}", low, edge))
        low = edge + 1
    return [*found, (f"{low}+", low, None)]


def _tail_users(study: Study, datasets: Mapping[str, Dataset]) -> pl.DataFrame:
    """Return (dataset, user_id) of the users whose test item is of the long tail."""
    found = [pl.DataFrame(schema={"dataset": pl.String, schema.USER_ID: pl.String})]
    for name, dataset in datasets.items():
        of_tail = tail_users(item_frequency(dataset, study.tail_over), dataset.histories("test").targets)
        ids = pl.DataFrame({schema.USER_ID: pl.Series(dataset.user_ids, dtype=pl.String)}).filter(of_tail)
        found.append(ids.select(pl.lit(name).alias("dataset"), schema.USER_ID))
    return pl.concat(found)


def _group_metrics(users: pl.DataFrame, edges: Sequence[int], tail: pl.DataFrame) -> pl.DataFrame:
    """Return the metrics of users grouped by the training frequency of their target (Fig. 3), and of the tail."""
    groups = []
    for name, low, high in buckets(edges):
        inside = pl.col("frequency") >= low
        groups.append((name, users.filter(inside if high is None else inside & (pl.col("frequency") <= high))))
    groups.append((TAIL_USERS, users.join(tail, on=tail.columns, how="semi", maintain_order="left")))
    parts = [pl.DataFrame(schema=_RESULT)]
    for name, group in groups:
        means = group.group_by(*_KEY, maintain_order=True).agg(
            pl.col(*schema.METRICS).mean(), pl.len().cast(pl.Int32).alias("users")
        )
        long = means.unpivot(schema.METRICS, index=[*_KEY, "users"], variable_name="metric", value_name="value")
        parts.append(
            long.with_columns(
                pl.lit("candidates").alias("protocol"),
                pl.when(pl.col("task") == 1).then(pl.lit(MAIN_VIEW)).alias("view"),
                pl.lit(name).alias("user_group"),
            )
            .select(list(_RESULT))
            .cast(pl.Schema(_RESULT))
        )
    return pl.concat(parts)


def _comparisons(study: Study, users: pl.DataFrame) -> Iterator[Json]:
    """Compare the reference with every other method, on the seeds that both have.

    One Holm correction covers the methods of one table: those whose first analysis is the same.
    """
    family = {method.name: method.analyses[0] for method in study.methods}
    for (dataset, task, model), runs in users.group_by("dataset", "task", "model", maintain_order=True):
        matrices = {str(name): _matrix(each) for (name,), each in runs.group_by("method", maintain_order=True)}
        reference = matrices.pop(study.reference, None)
        if reference is None:
            continue
        rows = []
        for name, other in matrices.items():
            seeds = sorted(reference.keys() & other.keys())
            if not seeds:
                continue
            ours, theirs = (np.stack([each[seed] for seed in seeds]) for each in (reference, other))
            found = compare(ours, theirs, draws=DRAWS)
            rows.append(
                {
                    "dataset": dataset,
                    "task": task,
                    "model": model,
                    "reference": study.reference,
                    "method": name,
                    "family": family[name],
                    "metric": COMPARED,
                    "seeds": len(seeds),
                    "users": ours.shape[1],
                    **{"difference": found.users.mean, "low": found.users.low, "high": found.users.high},
                    **{"t": found.seeds.t, "p": found.seeds.p},
                }
            )
        for one_family in dict.fromkeys(row["family"] for row in rows):
            mine = [row for row in rows if row["family"] == one_family]
            for row, adjusted in zip(mine, holm([row["p"] for row in mine]), strict=True):
                yield {**row, "p_holm": float(adjusted)}


def _matrix(runs: pl.DataFrame) -> dict[int, np.ndarray]:
    """Return one method's `COMPARED` metric by seed, an array over the users in the order of their ids."""
    return {
        int(seed): each.sort(schema.USER_ID)[COMPARED].to_numpy()
        for (seed,), each in runs.group_by("seed", maintain_order=True)
    }


def _geometry(measured: Iterable[FinishedStep]) -> Iterator[Json]:
    for done in measured:
        if done.step.command == "evaluate":
            metrics = done.read(schema.METRICS_FILE)
            for view, values in metrics["geometry"].items():
                known = {**values, **metrics.get("dispersion", {}).get(view, {})}
                for key in _keys(done):
                    yield {**{k: key[k] for k in ("method", "seed", "dataset")}, "view": view, **known}


# --- training -----------------------------------------------------------------------------------------------


def _curves(done: Iterable[FinishedStep]) -> Iterator[Json]:
    for each in done:
        if each.step.command != "finetune":
            continue
        context = {"method": each.run.method.name, "seed": each.run.seed}
        for kind, points in each.read(schema.CURVES_FILE).items():
            for point in points if kind != "warnings" else []:
                for name, value in point.items():
                    if name != "step" and isinstance(value, int | float):
                        yield {**context, "kind": kind, "step": int(point["step"]), "name": name, "value": float(value)}


def _warnings(done: Iterable[FinishedStep]) -> Iterator[Json]:
    for each in done:
        if each.step.command == "finetune":
            for found in each.read(schema.CURVES_FILE).get("warnings", []):
                yield {
                    "method": each.run.method.name,
                    "seed": each.run.seed,
                    **{name: found.get(name) for name in ("step", "until", "view", "rule", "message")},
                }


def _cost(done: Iterable[FinishedStep], datasets: dict[str, Dataset]) -> Iterator[Json]:
    for each in done:
        record = ledger.records(each.run.folder)[each.step.name]
        epochs = users = None
        if each.step.command == "finetune":
            made = each.read(schema.ADAPTER_FILE)
            users = made["dataset"]["users"]
            per_epoch = -(-made["dataset"]["samples"] // each.step.config.batch_size)
            epochs = made["training"]["steps"] / per_epoch
        elif each.step.command == "train-recommender":
            epochs = float(each.read(schema.METRICS_FILE)["epochs"])
        yield {
            "method": each.run.method.name,
            "seed": each.run.seed,
            "dataset": each.dataset,
            "step": each.step.name,
            "command": each.step.command,
            "seconds": record["seconds"],
            "attempts": record["attempts"],
            "items": len(datasets[each.dataset].item_ids),
            "epochs": epochs,
            "users": users,
        }


# --- facts of the study -------------------------------------------------------------------------------------


def _methods(study: Study) -> Iterator[Json]:
    varied = sorted({method.varies for method in study.methods if method.varies})
    bases = {method.of for method in study.methods if method.of}
    for method in study.methods:
        values = {}
        if method.source == "finetune" and (method.of or method.name in bases):
            values = {name: varied_value(study, method, name) for name in varied}
        yield {
            "name": method.name,
            "slug": method.slug,
            "source": method.source,
            "analyses": [name for name in method.analyses if name in study.analyses],
            "paper": method.paper,
            "varies": method.varies,
            "of": method.of,
            "values": json.dumps(values),
            "fixed": SOURCES[method.source].train is None and SOURCES[method.source].embed is not None,
            "role": method.role,
        }


def _about(
    study: Study,
    out: Path,
    runs: Sequence[Run],
    home: Target,
    domains: Sequence[Target],
    datasets: dict[str, Dataset],
    embedded: Iterable[FinishedStep],
    search: Json | None,
    looks: Json | None,
) -> Iterator[Json]:
    data = datasets[home.name]
    written = schema.read_json(out / STUDY_FILE, "the settings of a study", "run the study again")
    shared = {target.name: shared_facts(data, datasets[target.name]) for target in domains}
    facts: Json = {
        "dataset": home.name,
        "reference": study.reference,
        "backbone": written["command"]["backbone"],
        "users": len(data.user_ids),
        "items": len(data.item_ids),
        "interactions": data.meta.get("interactions"),
        "average_length": data.meta.get("average_length"),
        "candidate sets": len(data.candidate_seeds),
        "candidates": data.meta["negatives"]["count"],
        "domains": [target.name for target in domains],
        "shared users": sum(each["users"] for each in shared.values()),
        "shared": shared,
        "shared items": study.shared_items,
        "tail_over": study.tail_over,
        "buckets": [name for name, _, _ in buckets(study.cold_start)],
        "plan": {name: asdict(plan) for name, plan in study.plan.items() if name in study.analyses},
        "finetune": study.finetune,
        "recommender": study.recommender,
        "quick": written["command"]["quick"],
        "versions": written["versions"],
        "notes": list(study.notes),
        "counts": data.meta.get("counts", []),
        "variants": data.meta.get("variants", []),
        "rules": data.meta.get("rules", {}),
        "dims": sorted({each.read(schema.MANIFEST_FILE)["dim"] for each in embedded}),
        "settings": _changed_settings(runs),
        "search": search,
        "looks": looks,
        **{name: written[name] for name in ("before", "after", "index", "demo") if name in written},
    }
    for key, value in facts.items():
        yield {"key": key, "value": json.dumps(value)}


def _looks(done: Iterable[FinishedStep]) -> Json | None:
    """Return what the probe of the image tokens found; None if there was none."""
    return next((each.read(schema.PROBE_FILE) for each in done if each.step.command == PROBE_IMAGES), None)


def _changed_settings(runs: Iterable[Run]) -> dict[str, dict[str, Json]]:
    """Return method → step → the settings that differ from the command's defaults, of each method's first seed."""
    found: dict[str, dict[str, Json]] = {}
    for run in runs:
        of_method = found.setdefault(run.method.name, {})
        for step in run.steps:
            if step.name not in of_method:
                of_method[step.name] = {
                    f.name: value if isinstance(value, int | float | str) or value is None else str(value)
                    for f in fields(step.config)
                    if (value := getattr(step.config, f.name)) != f.default and f.name not in _SET_BY_STUDY
                }
    return found


_SET_BY_STUDY = {"data", "backbone", "adapter", "embeddings", "out", "seed", "device", "model"}
"""Settings of a step that the study sets, not the method."""


def facts(out: Path) -> Json:
    """Return the facts of `about.parquet`."""
    about = read(out, "about")
    try:
        return {row["key"]: json.loads(row["value"]) for row in about.iter_rows(named=True)}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{out / 'about.parquet'} is damaged ({error!r})", "facts as JSON", _STUDY_AGAIN) from None


# --- tables at the terminal ---------------------------------------------------------------------------------


def print_tables(out: Path) -> None:
    """Print N@20 of every method in both tasks, mean and standard deviation over seeds."""
    methods = read(out, "methods")
    results = read(out, "results").filter(
        (pl.col("metric") == COMPARED)
        & (pl.col("protocol") == "candidates")
        & (pl.col("user_group") == ALL_USERS)
        & (pl.col("dataset") == facts(out)["dataset"])
        & (pl.col("view").is_null() | (pl.col("view") == MAIN_VIEW))
    )
    columns = results.select("task", "model").unique().sort("task", "model", descending=[False, True]).rows()
    candidates = facts(out)["candidates"] + 1
    floor = random_floor(COMPARED, candidates)
    log.result(
        f"{COMPARED} among {candidates} candidates, mean ± std over seeds (a random order: {floor:.3f})", soft_wrap=True
    )
    table = Table(box=None)
    table.add_column("method")
    for task, model in columns:
        table.add_column(f"Task {task}" + (f", {model}" if model else ""), justify="right")
    for name, fixed in methods.select("name", "fixed").iter_rows():
        mine = results.filter(pl.col("method") == name)
        cells = [_cell(mine, task, model, fixed and task == 1) for task, model in columns]
        if any(cells):
            table.add_row(name, *cells)
    log.result(table)


def random_floor(metric: str, candidates: int) -> float:
    """Return the expected `H@k` or `N@k` of a random order of this many candidates."""
    cutoff = int(metric.partition("@")[2])
    return float(expected_metrics(np.zeros(1, np.int64), np.array([candidates - 1]), [cutoff])[metric][0])


def _cell(rows: pl.DataFrame, task: int, model: str | None, fixed: bool) -> str:
    values = rows.filter((pl.col("task") == task) & pl.col("model").eq_missing(pl.lit(model)))["value"].to_numpy()
    if not len(values):
        return ""
    found = spread(values)
    return f"{found.mean:.4f}" + (f" ± {found.std:.4f}" if found.runs > 1 and not fixed else "         ")
