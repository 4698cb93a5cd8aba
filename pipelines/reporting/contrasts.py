"""Differences between methods and views with intervals: users are resampled, once for all differences of a study.

A quantity is a mean over users (N@20 of a pair of views) or a ratio of two (S of a view); each user's values are first
averaged over the seeds that both sides of a difference have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from vlm2rec.downstream.evaluation.protocol import PAIRS
from vlm2rec.downstream.evaluation.statistics import bootstrap_interval, bootstrap_p, resampled_means
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ArtifactError
from vlm2rec.pipelines.experiments.results import DRAWS
from vlm2rec.pipelines.reporting.tables import Results, number

_EPS = 1e-8  # of Eq. 5, as in `geometry`


@dataclass(frozen=True)
class Quantity:
    """What a method has: N@20 of a pair of views such as `v2f`, or S of a view, `S image`."""

    method: str
    name: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of `views.parquet` that it is made of."""
        view = self.name.removeprefix("S ")
        return (self.name,) if self.name in PAIRS else tuple(f"{name}_{view}" for name in schema.DISTANCES)

    def of(self, means: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return its value, from the means of its columns."""
        if self.name in PAIRS:
            return means[self.name]
        positive, negative = (means[column] for column in self.columns)
        return negative / (positive + _EPS)


@dataclass(frozen=True)
class Contrast:
    """One quantity minus another, or minus nothing."""

    first: Quantity
    second: Quantity | None = None

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """Both, or the only one."""
        return (self.first,) if self.second is None else (self.first, self.second)


@dataclass(frozen=True)
class Measured:
    """A contrast of a study, with its bootstrap interval over users."""

    values: tuple[float, ...]  # of the quantities
    difference: float
    low: float
    high: float
    p: float  # two-sided
    seeds: int
    above: int  # seeds in which the difference is above 0
    users: int

    @property
    def text(self) -> str:
        """The numbers as text: `.1612 − .1180 = +.0432 [+.0281, +.0579], 5 of 5 seeds above 0, 610 users`."""
        digits = 4 if max(self.values) < 1 and len(self.values) > 1 else 3
        interval = f"[{number(self.low, digits, True)}, {number(self.high, digits, True)}]"
        if len(self.values) == 1:
            return f"{number(self.values[0], 3)} [{number(self.low, 3)}, {number(self.high, 3)}], {self._size}"
        both = " − ".join(number(value, digits) for value in self.values)
        seeds = "1 seed" if self.seeds == 1 else f"above 0 in {self.above} of {self.seeds} seeds"
        return f"{both} = {number(self.difference, digits, True)} {interval}, {seeds}, {self.users:,} users"

    @property
    def _size(self) -> str:
        return f"{self.seeds} seed{'s' * (self.seeds > 1)}, {self.users:,} users"


def has(results: Results, quantity: Quantity) -> bool:
    """Tell whether a study has the users' values of a quantity."""
    rows = results.frames["views"].filter(pl.col("method") == quantity.method)
    return bool(rows.height) and not any(rows[column].null_count() for column in quantity.columns)


def measure(results: Results, contrasts: Iterable[Contrast]) -> dict[Contrast, Measured]:
    """Return the contrasts that the study has the users' values of.

    Raises:
        ArtifactError: two methods were evaluated on different users.
    """
    wanted = [each for each in dict.fromkeys(contrasts) if all(has(results, quantity) for quantity in each.quantities)]
    by_seed = {name: _by_seed(results, name) for each in wanted for name in (q.method for q in each.quantities)}
    columns: dict[tuple[str, str, tuple[int, ...]], np.ndarray] = {}
    seeds_of: dict[Contrast, tuple[int, ...]] = {}
    for each in wanted:
        seeds = set.intersection(*({*by_seed[quantity.method]} for quantity in each.quantities))
        if not seeds:
            continue
        seeds_of[each] = tuple(sorted(seeds))
        for quantity in each.quantities:
            for column in quantity.columns:
                of_seeds = [by_seed[quantity.method][seed][column] for seed in seeds_of[each]]
                columns.setdefault((quantity.method, column, seeds_of[each]), np.mean(of_seeds, axis=0))
    if not columns:
        return {}
    _require_same_users(results, {name for name, _, _ in columns})
    table = np.stack(list(columns.values()), axis=1)  # (U, k)
    means, draws = table.mean(axis=0), resampled_means(table, DRAWS)
    place = {key: number for number, key in enumerate(columns)}
    found = {}
    for each, seeds_both in seeds_of.items():

        def value(of: np.ndarray, each: Contrast = each, seeds: tuple[int, ...] = seeds_both) -> list[np.ndarray]:
            return [
                quantity.of({c: of[..., place[quantity.method, c, seeds]] for c in quantity.columns})
                for quantity in each.quantities
            ]

        values, resampled = value(means), value(draws)
        spread = resampled[0] - resampled[1] if len(resampled) > 1 else resampled[0]
        difference = values[0] - values[1] if len(values) > 1 else values[0]
        interval = bootstrap_interval(float(difference), spread)
        alone = [
            [float(q.of({c: by_seed[q.method][seed][c].mean() for c in q.columns})) for q in each.quantities]
            for seed in seeds_both
        ]
        found[each] = Measured(
            values=tuple(float(v) for v in values),
            difference=interval.mean,
            low=interval.low,
            high=interval.high,
            p=bootstrap_p(spread),
            seeds=len(seeds_both),
            above=sum(pair[0] > pair[-1] for pair in alone),
            users=len(table),
        )
    return found


def _require_same_users(results: Results, methods: set[str]) -> None:
    rows = results.frames["views"].filter(pl.col("method").is_in(methods)).sort(schema.USER_ID)
    users = [each[schema.USER_ID] for _, each in rows.group_by("method", "seed", maintain_order=True)]
    if not all(each.equals(users[0]) for each in users):
        raise ArtifactError(
            f"the methods of {results.out} were evaluated on different users",
            "the same users for every method and seed",
            "run `vlm2rec study` with --redo",
        )


def _by_seed(results: Results, method: str) -> dict[int, dict[str, np.ndarray]]:
    """Return a method's columns by seed, the users in the order of their ids."""
    rows = results.frames["views"].filter(pl.col("method") == method).sort(schema.USER_ID)
    names = [column for column in rows.columns if rows[column].dtype == pl.Float64]
    return {
        int(seed): {name: each[name].to_numpy() for name in names}
        for (seed,), each in rows.group_by("seed", maintain_order=True)
    }
