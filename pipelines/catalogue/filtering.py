"""Filters a log of interactions down to the k-core."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import polars as pl

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import DataError
from vlm2rec.pipelines.catalogue import files
from vlm2rec.pipelines.config import PrepareConfig

SHORTEST = 3  # one interaction to train on, one to validate, one to test


@dataclass(frozen=True)
class Count:
    """The numbers of users, items and interactions after one step."""

    step: str
    users: int
    items: int
    interactions: int


@dataclass(frozen=True)
class Log:
    """Interactions as integers, one row each, sorted by user and then time; equal times keep the file's order."""

    user: np.ndarray  # (n,) int32
    item: np.ndarray  # (n,) int32
    time: np.ndarray  # (n,) int64 or float64

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: np.ndarray) -> Log:
        """Return the rows that an index or a mask selects."""
        return Log(self.user[rows], self.item[rows], self.time[rows])


def read_log(found: files.Interactions, catalogue: pl.DataFrame) -> tuple[pl.Series, Log, list[Count]]:
    """Read the interactions of catalogue items.

    Returns:
        All user ids, sorted; the interactions (`user` a row of the ids, `item` a row of `catalogue`); the counts.
    """
    user_ids = found.frame.select(schema.USER_ID).unique().collect(engine="streaming")[schema.USER_ID].sort()
    users = _lookup(user_ids, "user")
    items = _lookup(catalogue[schema.ITEM_ID], "item")
    table = (
        found.frame.join(items, on=schema.ITEM_ID, how="inner", maintain_order="left")
        .join(users, on=schema.USER_ID, how="left", maintain_order="left")
        .select("user", "item", files.TIME)
        .collect(engine="streaming")
    )
    user, time = table["user"].to_numpy(), table[files.TIME].to_numpy()
    order = np.lexsort((time, user))  # stable: equal times stay in the file's order
    log = Log(user[order], table["item"].to_numpy()[order], time[order])
    steps = [
        Count("as read", len(user_ids), catalogue.height, found.rows),
        Count("interactions of known items", _distinct(log.user), catalogue.height, len(log)),
    ]
    if not len(log):
        given = found.frame.select(schema.ITEM_ID).head(3).collect()[schema.ITEM_ID].to_list()
        ours = catalogue[schema.ITEM_ID].head(3).to_list()
        raise _nothing_left(
            steps,
            f"the interactions name items such as {given}, the catalogue holds {ours}",
            "use two files of the same catalogue, or name the right columns with --item-id-column",
        )
    return user_ids, log, steps


def _lookup(ids: pl.Series, name: str) -> pl.LazyFrame:
    return pl.DataFrame([ids, pl.Series(name, np.arange(len(ids), dtype=np.int32))]).lazy()


def _distinct(codes: np.ndarray) -> int:
    return int(np.count_nonzero(np.bincount(codes))) if len(codes) else 0


@dataclass(frozen=True)
class Kept:
    """The rows that were kept, of the user ids and of the catalogue."""

    users: np.ndarray
    items: np.ndarray  # with an interaction
    catalogue: np.ndarray  # with what an item needs, whether or not anybody has touched it


def filter_log(
    log: Log, catalogue: pl.DataFrame, config: PrepareConfig, steps: list[Count]
) -> tuple[Log, Kept, list[Count]]:
    """Drop items that lack what is required, exact duplicates, and all outside the k-core; renumber the rest.

    Returns:
        The remaining interactions (users and items renumbered, order unchanged), the kept rows, and the counts.

    Raises:
        DataError: naming the step after which nothing is left.
    """
    steps = list(steps)
    alive = np.ones(catalogue.height, bool)
    for name, has in requirements(catalogue, required(config)):
        alive &= has
        log = log.take(alive[log.item])
        steps.append(Count(name, _distinct(log.user), int(alive.sum()), len(log)))
        if not len(log):
            raise _nothing_left(steps, f"{int(has.sum()):,} of {len(has):,} items are {name}", "check the catalogue")
    log = log.take(first_occurrences(log))
    steps.append(Count("exact duplicates removed", _distinct(log.user), int(alive.sum()), len(log)))
    log = log.take(core_rows(log, max(config.core, SHORTEST), config.core))
    shortest = f", users with {SHORTEST} interactions" if config.core < SHORTEST else ""
    steps.append(Count(f"{config.core}-core{shortest}", _distinct(log.user), _distinct(log.item), len(log)))
    if not len(log):
        raise _nothing_left(
            steps,
            f"no group of users with {max(config.core, SHORTEST)} and items with {config.core} interactions is left",
            f"lower --core (now {config.core}), or add interactions",
        )
    users, user = np.unique(log.user, return_inverse=True)
    items, item = np.unique(log.item, return_inverse=True)
    kept = Kept(users, items, np.flatnonzero(alive))
    return Log(user.astype(np.int32), item.astype(np.int32), log.time), kept, steps


def required(config: PrepareConfig) -> tuple[str, ...]:
    """Return what an item needs: image, title, or both. Without a folder of images, a title is enough."""
    return config.require or (("title",) if config.images is None else ("image", "title"))


def requirements(catalogue: pl.DataFrame, needs: Collection[str]) -> list[tuple[str, np.ndarray]]:
    """Return the conditions for keeping an item, each with its name and the items that meet it, (I,) bool."""
    titled = (catalogue[schema.TITLE].str.strip_chars() != "").fill_null(False).to_numpy()
    pictured = catalogue[schema.IMAGE_PATH].is_not_null().to_numpy()
    found = [("items with a title", titled)] if "title" in needs else []
    return [*found, ("items with an image", pictured)] if "image" in needs else found


def items_without(catalogue: pl.DataFrame, image_reasons: pl.Series, needs: Collection[str]) -> pl.DataFrame:
    """Return the items that lack what is required: source, row (of the items, from 1), id and reason."""
    met = dict(requirements(catalogue, ("title", "image")))
    reason = pl.lit(None, pl.String)
    if "image" in needs:
        reason = pl.when(~pl.Series(met["items with an image"])).then(image_reasons).otherwise(reason)
    if "title" in needs:
        reason = pl.when(~pl.Series(met["items with a title"])).then(pl.lit("it has no title")).otherwise(reason)
    rows = catalogue.select(
        pl.lit("items").alias("source"),
        pl.int_range(1, pl.len() + 1).alias(files.ROW),
        pl.col(schema.ITEM_ID).alias("id"),
        reason.alias("reason"),
    )
    return rows.filter(pl.col("reason").is_not_null())


def first_occurrences(log: Log) -> np.ndarray:
    """Return a mask, (n,) bool, that drops later copies of rows with the same user, item and time."""
    tied = np.zeros(len(log), bool)  # copies have the same user and time, so they are in adjacent rows
    tied[1:] = (log.user[1:] == log.user[:-1]) & (log.time[1:] == log.time[:-1])
    tied[:-1] |= tied[1:]
    rows = np.flatnonzero(tied)
    rows = rows[np.lexsort((log.time[rows], log.item[rows], log.user[rows]))]  # stable: the first copy comes first
    same = [field[rows[1:]] == field[rows[:-1]] for field in (log.user, log.item, log.time)]
    mask = np.ones(len(log), bool)
    mask[rows[1:][same[0] & same[1] & same[2]]] = False
    return mask


def core_rows(log: Log, user_least: int, item_least: int) -> np.ndarray:
    """Return the rows of the largest subset in which every user and item has enough interactions, in order.

    Users and items below their minimum are dropped in turn until there are none. The order does not change the result.
    """
    rows = np.arange(len(log))
    user, item = log.user, log.item
    while True:
        keep = (np.bincount(user) >= user_least)[user] if len(user) else np.empty(0, bool)
        keep &= (np.bincount(item) >= item_least)[item] if len(item) else keep
        if keep.all():
            return rows
        rows, user, item = rows[keep], user[keep], item[keep]


def _nothing_left(steps: list[Count], why: str, fix: str) -> DataError:
    before = next((step for step in reversed(steps[:-1]) if step.interactions), steps[0])
    return DataError(
        f"step {steps[-1].step!r} leaves nothing of {before.users:,} users, {before.items:,} items and"
        f" {before.interactions:,} interactions: {why}",
        "at least one user with three interactions",
        fix,
    )
