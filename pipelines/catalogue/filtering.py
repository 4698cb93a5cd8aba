"""Filters a log of interactions down to the k-core."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import DataError
from vlm2rec.pipelines import console
from vlm2rec.pipelines.catalogue import files
from vlm2rec.pipelines.catalogue.ids import ITEM, ROW, WORDS_FOR_NOTHING, examples, explain, without_words_among_numbers
from vlm2rec.pipelines.catalogue.rejects import Rejects
from vlm2rec.pipelines.catalogue.times import check_unit
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
    row: np.ndarray  # (n,) uint32, in the file, counted from 0

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: np.ndarray) -> Log:
        """Return the rows that an index or a mask selects."""
        return Log(self.user[rows], self.item[rows], self.time[rows], self.row[rows])


def read_log(
    found: files.Interactions, catalogue: pl.DataFrame, rejects: Rejects
) -> tuple[pl.Series, Log, list[Count]]:
    """Read the interactions of catalogue items; the other rows go to the rejects.

    Returns:
        All user ids, sorted; the interactions (`user` a row of the ids, `item` a row of `catalogue`); the counts.

    Raises:
        DataError: nothing is left, a good part of the ids is spelled otherwise than in the catalogue, or the times
            have more than one unit.
    """
    user_ids, log, steps, unknown = known_interactions(found, catalogue, rejects)
    if not len(log):
        raise _no_known_item(unknown, [*steps[:-1], Count(_KNOWN, 0, catalogue.height, 0)], catalogue)
    return user_ids, log, steps


def known_interactions(
    found: files.Interactions, catalogue: pl.DataFrame, rejects: Rejects
) -> tuple[pl.Series, Log, list[Count], pl.DataFrame]:
    """Do what `read_log` does, and return the ids that the catalogue lacks, too; perhaps nothing is left.

    Of an unknown id, `rows` says how often it occurs, and `row` where first.
    """
    user_ids = found.frame.select(schema.USER_ID).unique().collect(engine="streaming")[schema.USER_ID]
    user_ids = user_ids.drop_nulls().sort()
    numbers = without_words_among_numbers(user_ids)
    if len(numbers) < len(user_ids):  # text such as NaN in a column of numbers, as CSV files have it
        user_ids, given = numbers, pl.col(schema.USER_ID)
        found = replace(found, frame=found.frame.with_columns(pl.when(~given.is_in(WORDS_FOR_NOTHING)).then(given)))
    users, items = _lookup(user_ids, "user"), _lookup(catalogue[schema.ITEM_ID], ITEM)
    matched = _matched(found.frame, items, users)
    table = matched.select(_CODES).collect(engine="streaming")
    counts = _reason_counts(table)
    unknown = pl.DataFrame()
    if counts[UNKNOWN]:
        unknown = explain(_unknown_ids(matched), catalogue[schema.ITEM_ID])
        written_with_point = unknown.filter(pl.col(ITEM).is_not_null())
        if written_with_point.height:
            items = pl.concat([items, written_with_point.select(schema.ITEM_ID, ITEM).lazy()])
            matched = _matched(found.frame, items, users)
            table = matched.select(_CODES).collect(engine="streaming")
            counts = _reason_counts(table)
            unknown = unknown.filter(pl.col(ITEM).is_null())
            _say_of_points(written_with_point)
    steps = [Count("as read", len(user_ids), catalogue.height, found.rows)]
    if any(counts.values()):
        rejects.stream_interactions(_with_reasons(matched), counts)
        table = _complete(table, counts, catalogue.height, steps)
    if unknown.height:
        _report_unknown(unknown, found, counts[UNKNOWN])
    if found.has_unit and not table.is_empty():
        for warning in check_unit(table[files.TIME].to_numpy(), table[ROW].to_numpy(), found.path):
            console.TERMINAL.say(warning, warning=True)
    user, time = table["user"].to_numpy(), table[files.TIME].to_numpy()
    order = np.lexsort((time, user))  # stable: equal times stay in the file's order
    log = Log(user[order], table[ITEM].to_numpy()[order], time[order], table[ROW].to_numpy()[order])
    steps.append(Count(_KNOWN, _distinct(log.user), catalogue.height, len(log)))
    _warn_of_words(user_ids, log)
    return user_ids, log, steps, unknown


_KNOWN = "interactions of known items"
INCOMPLETE = ("no user id", "no item id", "no time")
UNKNOWN = "item not in the catalogue"
_REASONS = (*INCOMPLETE, UNKNOWN)
_REASON = "reason"
_CODES = (ROW, "user", ITEM, files.TIME, _REASON)
_ALIKE = 0.01  # of the interactions: so many ids that are only spelled otherwise are an error


def _matched(frame: pl.LazyFrame, items: pl.LazyFrame, users: pl.LazyFrame) -> pl.LazyFrame:
    """Return the interactions with the rows of user and item, and the number of the reason to leave them out."""
    missing = (schema.USER_ID, schema.ITEM_ID, files.TIME, ITEM)
    reason = pl.lit(None, pl.UInt8)
    for number, column in reversed(list(enumerate(missing))):
        reason = pl.when(pl.col(column).is_null()).then(pl.lit(number, pl.UInt8)).otherwise(reason)
    return (
        frame.join(items, on=schema.ITEM_ID, how="left", maintain_order="left")
        .join(users, on=schema.USER_ID, how="left", maintain_order="left")
        .with_columns(reason.alias(_REASON))
    )


def _reason_counts(table: pl.DataFrame) -> dict[str, int]:
    found = dict.fromkeys(_REASONS, 0)
    numbers = table[_REASON].drop_nulls().value_counts()
    return found | {_REASONS[number]: count for number, count in numbers.iter_rows()}


def _with_reasons(matched: pl.LazyFrame) -> pl.LazyFrame:
    """Return the rows to leave out: row, item_id, user_id, reason."""
    words = pl.col(_REASON).replace_strict(dict(enumerate(_REASONS)), return_dtype=pl.String)
    return matched.filter(pl.col(_REASON).is_not_null()).select(
        ROW, schema.ITEM_ID, schema.USER_ID, words.alias(_REASON)
    )


def _unknown_ids(matched: pl.LazyFrame) -> pl.DataFrame:
    """Return (item_id, rows, first row) of the ids that the catalogue lacks, most frequent first."""
    rows = matched.filter(pl.col(_REASON) == _REASONS.index(UNKNOWN))
    counted = rows.group_by(schema.ITEM_ID).agg(pl.len().alias("rows"), pl.col(ROW).min())
    return counted.collect(engine="streaming").sort(["rows", ROW], descending=[True, False])


def _complete(table: pl.DataFrame, counts: dict[str, int], items: int, steps: list[Count]) -> pl.DataFrame:
    """Return the rows without a reason to leave them out; say what the incomplete ones lack, and count the rest."""
    incomplete = {reason: counts[reason] for reason in INCOMPLETE if counts[reason]}
    for reason, count in incomplete.items():
        rows = table.filter(pl.col(_REASON) == _REASONS.index(reason))[ROW].head(3).to_list()
        console.TERMINAL.say(
            f"{count:,} of {table.height:,} interactions have {reason} and are left out: row"
            f" {', '.join(f'{row + 1:,}' for row in rows)}{' …' if count > len(rows) else ''}",
            warning=True,
        )
    if incomplete:
        whole = table.filter(pl.col(_REASON).is_null() | (pl.col(_REASON) == _REASONS.index(UNKNOWN)))
        steps.append(Count("rows with user, item and time", whole["user"].n_unique(), items, whole.height))
    return table.filter(pl.col(_REASON).is_null())


def _say_of_points(ids: pl.DataFrame) -> None:
    shown = examples(ids.select(ROW, schema.ITEM_ID).rows())
    console.TERMINAL.say(
        f"{ids['rows'].sum():,} interactions name {ids.height:,} items by the same whole number with or without .0:"
        f" {shown}. They were matched."
    )


def _report_unknown(unknown: pl.DataFrame, found: files.Interactions, count: int) -> None:
    """Say which items the catalogue lacks, and why if it shows; refuse if most differ in their spelling only."""
    alike = unknown.filter(pl.col("near").is_not_null() | pl.col("why").is_not_null())
    alike_rows = int(alike["rows"].sum())
    told = [
        f"{'' if near is None else f'the catalogue has {near!r} for '}{given!r} (row {row + 1:,}; {why})"
        for given, row, near, why in alike.select(schema.ITEM_ID, ROW, "near", "why").head(3).iter_rows()
    ]
    if alike_rows >= _ALIKE * found.rows and 2 * alike_rows >= count:
        raise DataError(
            f"{count:,} of {found.rows:,} interactions of {found.path} name items that are not in the catalogue, and"
            f" {alike_rows:,} of these differ from a known id only in spelling: {'; '.join(told)}",
            "the same ids, letter by letter, in both files",
            "write the ids as text in both files (for example pandas.read_csv(..., dtype=str)), or remove these rows",
        )
    console.TERMINAL.say(
        f"{count:,} of {found.rows:,} interactions name {unknown.height:,} items that are not in the catalogue and are"
        f" left out, such as {examples(unknown.select(ROW, schema.ITEM_ID).head(3).rows())}"
        + (f". Of these, {alike_rows:,} may be known items in another spelling: {'; '.join(told)}" if told else ""),
        warning=True,
    )


def _no_known_item(unknown: pl.DataFrame, steps: list[Count], catalogue: pl.DataFrame) -> DataError:
    if unknown.is_empty():
        return _nothing_left(steps, "no row has a user, an item and a time", "fill the rows, or name the right columns")
    given, ours = unknown.sort(ROW)[schema.ITEM_ID].head(3).to_list(), catalogue[schema.ITEM_ID].head(3).to_list()
    return _nothing_left(
        steps,
        f"the interactions name items such as {given}, the catalogue holds {ours}",
        "use two files of the same catalogue, or name the right columns with --items-id-column and"
        " --interactions-item-column",
    )


def _warn_of_words(user_ids: pl.Series, log: Log) -> None:
    """Say so if a user is called nan, None or the like: all users without id may have become that one."""
    words = user_ids.is_in(WORDS_FOR_NOTHING).arg_true()
    for code in words:
        count = int(np.count_nonzero(log.user == code))
        console.TERMINAL.say(
            f"the user {user_ids[code]!r} has {count:,} of {len(log):,} interactions. It is kept, as the column holds"
            " text; if it stands for users without an id, leave the field empty.",
            warning=True,
        )


def _lookup(ids: pl.Series, name: str) -> pl.LazyFrame:
    return pl.DataFrame([ids, pl.Series(name, np.arange(len(ids), dtype=np.int32))]).lazy()


def _distinct(codes: np.ndarray) -> int:
    return int(np.count_nonzero(np.bincount(codes))) if len(codes) else 0


@dataclass(frozen=True)
class Kept:
    """The rows that were kept, of the user ids and of the catalogue."""

    users: np.ndarray
    items: np.ndarray  # with an interaction
    catalogue: np.ndarray  # of the dataset: these and, by choice, the cold ones
    variants: tuple[Count, ...] = ()  # what other filters would have kept


def filter_log(
    log: Log,
    user_ids: pl.Series,
    catalogue: pl.DataFrame,
    image_reasons: pl.Series,
    config: PrepareConfig,
    steps: list[Count],
    rejects: Rejects,
    compare: bool = False,
) -> tuple[Log, Kept, list[Count]]:
    """Drop items that lack what is required, exact duplicates, and all outside the k-core; renumber the rest.

    With `min_user` and `min_item`, users and items with fewer interactions go first, both counted in the same log.
    With `truncate`, only each user's latest interactions come before the core. What is dropped goes to the rejects;
    `image_reasons` says of each item why it has no image. With `compare`, what other filters would keep is counted.

    Returns:
        The remaining interactions (users and items renumbered, order unchanged), the kept rows, and the counts.

    Raises:
        DataError: naming the step after which nothing is left.
    """
    steps = list(steps)

    def keep(mask: np.ndarray, reason: str) -> Log:
        out = log.take(~mask)
        order = np.argsort(out.row, kind="stable")
        out = out.take(order)
        rejects.add_interactions(out.row, (catalogue[schema.ITEM_ID], out.item), (user_ids, out.user), reason)
        return log.take(mask)

    alive = np.ones(catalogue.height, bool)
    needs = required(config)
    for thing, name, details in (("title", "a title", None), ("image", "an image", image_reasons)):
        if thing not in needs:
            continue
        has = given(catalogue, thing)
        _reject_items(alive & ~has, catalogue, f"no {thing}", details, rejects)
        alive &= has
        log = keep(alive[log.item], f"item without {name}")
        steps.append(Count(f"items with {name}", _distinct(log.user), int(alive.sum()), len(log)))
        if not len(log):
            why = f"{int(has.sum()):,} of {len(has):,} items are items with {name}"
            raise _nothing_left(steps, why, "check the catalogue")
    log = keep(first_occurrences(log), "copy of an earlier row (user, item and time)")
    steps.append(Count("exact duplicates removed", _distinct(log.user), int(alive.sum()), len(log)))
    others = tuple(variants(log)) if compare else ()
    if config.min_user or config.min_item:
        minima = _minima(config)
        log = keep(often_enough(log, config.min_user, config.min_item), f"not among {minima}")
        steps.append(Count(f"{minima}, once", _distinct(log.user), _distinct(log.item), len(log)))
        if not len(log):
            raise _nothing_left(steps, "every interaction has a user or an item with fewer", "lower the minima")
    if config.truncate:
        log = keep(latest(log, config.truncate), _TRUNCATED.format(config.truncate))
        steps.append(Count(_truncation(config.truncate), _distinct(log.user), int(alive.sum()), len(log)))
    core = np.zeros(len(log), bool)
    core[core_rows(log, max(config.core, SHORTEST), config.core)] = True
    shortest = f", users with {SHORTEST} interactions" if config.core < SHORTEST else ""
    log = keep(core, f"outside the {config.core}-core{shortest}")
    steps.append(Count(f"{config.core}-core{shortest}", _distinct(log.user), _distinct(log.item), len(log)))
    if not len(log):
        raise _nothing_left(
            steps,
            f"no group of users with {max(config.core, SHORTEST)} and items with {config.core} interactions is left",
            f"lower --core (now {config.core}), or add interactions",
        )
    users, user = np.unique(log.user, return_inverse=True)
    items, item = np.unique(log.item, return_inverse=True)
    listed = np.flatnonzero(alive) if config.cold_items == "keep" else items
    outside = alive.copy()
    outside[listed] = False
    rejects.add_items(np.flatnonzero(outside), catalogue[schema.ITEM_ID], f"outside the {config.core}-core")
    kept = Log(user.astype(np.int32), item.astype(np.int32), log.time, log.row)
    return kept, Kept(users, items, listed, others), steps


def _minima(config: PrepareConfig) -> str:
    """Return the minima in words, such as `users with 5 and items with 3 interactions`."""
    minima = ((config.min_user, "users"), (config.min_item, "items"))
    return " and ".join(f"{who} with {least}" for least, who in minima if least) + " interactions"


def often_enough(log: Log, user_least: int, item_least: int) -> np.ndarray:
    """Return a mask, (n,) bool, of the interactions whose user and item occur often enough in the log as it is.

    It is one pass, and no k-core: users and items may be left with fewer interactions than that.
    """
    return np.asarray((np.bincount(log.user) >= user_least)[log.user] & (np.bincount(log.item) >= item_least)[log.item])


_TRUNCATED = "before the user's latest {}"


def _truncation(count: int) -> str:
    return f"the latest {count} interactions of each user"


def variants(log: Log) -> list[Count]:
    """Return the counts of a log under the filters that a published average length may come from.

    As it is, the 5-core, and both of the latest ten interactions of each user; users with fewer than three
    interactions are never counted.
    """
    found = []
    for count in (0, 10):
        for core in (1, 5):
            rows = np.flatnonzero(latest(log, count)) if count else np.arange(len(log))
            part = log.take(rows)
            part = part.take(core_rows(part, max(core, SHORTEST), core))
            name = "as it is" if core == 1 else f"{core}-core"
            flags = f"--core {core}" + (f" --truncate {count}" if count else "")
            step = f"{_truncation(count)}, {name}" if count else name
            found.append(Count(f"{step} ({flags})", _distinct(part.user), _distinct(part.item), len(part)))
    return found


def latest(log: Log, count: int) -> np.ndarray:
    """Return a mask, (n,) bool, of each user's latest `count` interactions; of equal times, the later in the file."""
    ends = np.cumsum(np.bincount(log.user)) if len(log) else np.empty(0, np.int64)
    return np.asarray(np.arange(len(log)) >= ends[log.user] - count)


def required(config: PrepareConfig) -> tuple[str, ...]:
    """Return what an item needs: image, title, or both. Without a folder of images, a title is enough."""
    return config.require or (("title",) if config.images is None else ("image", "title"))


def given(catalogue: pl.DataFrame, thing: str) -> np.ndarray:
    """Return which items have a title or an image, (I,) bool."""
    if thing == "image":
        return catalogue[schema.IMAGE_PATH].is_not_null().to_numpy()
    return (catalogue[schema.TITLE].str.strip_chars() != "").fill_null(False).to_numpy()


def _reject_items(
    mask: np.ndarray, catalogue: pl.DataFrame, lack: str, details: pl.Series | None, rejects: Rejects
) -> None:
    rows = np.flatnonzero(mask)
    say_of_items(rows, catalogue, f"have {lack} and are left out", details)
    rejects.add_items(rows, catalogue[schema.ITEM_ID], lack, details)


def say_of_items(rows: np.ndarray, catalogue: pl.DataFrame, what: str, details: pl.Series | None) -> None:
    """Print what some items are like, with three examples and, if they are known, the reasons."""
    if len(rows):
        first = [(int(row), catalogue[schema.ITEM_ID][int(row)]) for row in rows[:3]]
        text = f"{len(rows):,} of {catalogue.height:,} items {what}"
        if details is None:
            text += f", such as {examples(first)}"
        else:
            text += "".join(f"\n  {examples([one])}: {details[one[0]]}" for one in first)
        console.TERMINAL.say(text, warning=True)


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
