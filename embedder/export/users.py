"""The export of users: a vector of each history, in the shards of an export of items."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.export import shard_file
from vlm2rec.embedder.export.distribute import Job
from vlm2rec.embedder.export.plan import Plan, plan_shards
from vlm2rec.embedder.export.processes import keep_freed_memory
from vlm2rec.embedder.export.shard_file import VectorLayout

HISTORIES_AT_ONCE = 64  # encoded together, and the step of the progress
Views = Mapping[str, np.ndarray]  # view → (n, d) float32, rows of NaN where there is no vector


class HistoryEncoder(Protocol):
    """Turns histories into vectors; a vector does not depend on the other histories of a call."""

    def __call__(self, histories: Sequence[np.ndarray]) -> Views:
        """Return the views of n histories, each a row of items, oldest first, and none of them empty."""


@dataclass(frozen=True)
class UserHistories:
    """The users of a plan: user u's history is `rows[offsets[u]:offsets[u + 1]]`; `reasons` says why one has none."""

    rows: np.ndarray  # (n,) int32
    offsets: np.ndarray  # (U + 1,) int64
    reasons: Mapping[int, str]

    def of(self, user: int) -> np.ndarray:
        """Return a history, oldest item first."""
        return self.rows[self.offsets[user] : self.offsets[user + 1]]


def plan_users(user_ids: Sequence[str], shard_size: int, settings: Mapping[str, Any]) -> Plan:
    """Return the plan of a folder of users; `settings` are those of an export, and what tells the histories."""
    full = {schema.TABLE: schema.USERS_TABLE, **settings}
    return plan_shards(user_ids, shard_size, full, layout=VectorLayout(schema.USERS_TABLE))


@dataclass(frozen=True)
class UserJob(Job):
    """The job of an export of users; `load` is called once in each process, and can be pickled."""

    histories: UserHistories
    load: Callable[[], HistoryEncoder]

    def maker(self) -> UserMaker:
        """See `Job`."""
        keep_freed_memory()
        return UserMaker(self.plan, self.histories, self.load())


class UserMaker:
    """Makes the shards of a folder of users."""

    def __init__(self, plan: Plan, histories: UserHistories, encode: HistoryEncoder) -> None:
        self.plan, self.histories, self.encode = plan, histories, encode

    def close(self) -> None:
        """Nothing was opened."""

    def shard(self, number: int, reuse_rows: np.ndarray, advance: Callable[[int], None]) -> pa.Table:
        """Return the table of a shard; all of its rows are made."""
        users = self.plan.rows(number)
        views, dims = self.plan.settings["views"], schema.dims_of(self.plan.settings)
        vectors = {view: np.full((len(users), dims[view]), np.nan, np.float32) for view in views}
        given = [place for place, user in enumerate(users) if user not in self.histories.reasons]
        for start in range(0, len(given), HISTORIES_AT_ONCE):
            places = given[start : start + HISTORIES_AT_ONCE]
            found = self.encode([self.histories.of(users[place]) for place in places])
            for view in views:
                vectors[view][places] = found[view]
            advance(len(places))
        advance(len(users) - len(given))
        reasons = {place: self.histories.reasons.get(user) for place, user in enumerate(users)}
        status, error = judge(vectors, reasons, self.plan.settings["storage"])
        return shard_file.shard_table(self.plan, users, vectors, status, error)


def judge(
    vectors: dict[str, np.ndarray], reasons: Mapping[int, str | None], storage: str
) -> tuple[list[str], list[str | None]]:
    """Return status and reason of each row; vectors of rows that failed become NaN.

    A row without an image vector that has a text vector is `text_only`; without another vector, it has failed.

    Args:
        vectors: view → (n, d).
        reasons: of rows without a history.
        storage: number format on disk, which must hold the values.
    """
    absent = {view: np.isnan(values).all(1) for view, values in vectors.items()}
    needed = [view for view in vectors if view != schema.IMAGE or schema.TEXT not in vectors]
    failed = np.logical_or.reduce([absent[view] for view in needed])
    limit = float(np.finfo(storage).max)
    error: list[str | None] = []
    status = []
    for row in range(len(failed)):
        lacking = [view for view in vectors if absent[view][row]]
        present = [vectors[view][row] for view in vectors if not absent[view][row]]
        reason = reasons.get(row)
        if not reason and failed[row]:
            reason = _none_in(lacking)
        elif not reason and not all(np.isfinite(values).all() for values in present):
            reason = "the model gives NaN or infinity"
        elif not reason and any(np.abs(values).max() > limit for values in present):
            reason = f"a value is too large for {storage}"
        if reason:
            for values in vectors.values():
                values[row] = np.nan
        status.append(schema.STATUS_FAILED if reason else schema.STATUS_TEXT_ONLY if lacking else schema.STATUS_OK)
        error.append(reason or (_none_in(lacking) if lacking else None))
    return status, error


def _none_in(views: Iterable[str]) -> str:
    return f"no item of the history has a vector in {', '.join(views)}"
