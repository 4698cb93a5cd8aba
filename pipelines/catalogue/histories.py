"""Histories of users as they come: a long table, or one row per user with a list. Users may be new, not so items.

    user_id  item_id  timestamp         user_id  history
    alice    42       1700000000        alice    ["7", "42", "9"]
    alice    7        1600000000        bob      []

Both are read from Parquet, CSV or JSON lines, by the readers and the rules of `prepare`. A list stands in order, oldest
item first; in a CSV it is JSON. Rows with an item that the catalogue lacks are left out, counted and named; a user of
whom nothing is left stays, with the reason.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from vlm2rec.embedder.contract.errors import DataError
from vlm2rec.embedder.contract.schema import ITEM_ID, USER_ID
from vlm2rec.pipelines.catalogue import amazon, files, filtering
from vlm2rec.pipelines.catalogue.files import TIME, ColumnNames, Interactions
from vlm2rec.pipelines.catalogue.ids import ROW, ids_of
from vlm2rec.pipelines.catalogue.parts import refuse_bomb
from vlm2rec.pipelines.catalogue.records import Kind, id_as_text, is_missing, kind_of, read_records, require_columns
from vlm2rec.pipelines.catalogue.rejects import INTERACTIONS, Rejects
from vlm2rec.pipelines.config import HistoryColumns

HISTORY = "history"  # the usual name of a column of lists
EMPTY = "the history is empty"
_ROWS_AT_A_TIME = 50_000
_NAMED = 20  # unknown items that are named, the most frequent first


@dataclass(frozen=True)
class GivenHistories:
    """Every user of a file, sorted by id, with the history, oldest first, as rows of a catalogue.

    User u's history is `rows[offsets[u]:offsets[u + 1]]`; `reasons` says of users without one why.
    """

    user_ids: list[str]
    rows: np.ndarray  # (n,) int32
    offsets: np.ndarray  # (U + 1,) int64
    reasons: dict[int, str]
    counts: dict[str, Any]  # for a manifest: interactions read, kept and left out, by reason; unknown items
    left_out: bytes  # a CSV of the rows that were left out

    def __len__(self) -> int:
        return len(self.user_ids)

    def of(self, user: int) -> np.ndarray:
        """Return the history of the user at position `user`, oldest item first."""
        return self.rows[self.offsets[user] : self.offsets[user + 1]]

    def latest(self, count: int | None) -> GivenHistories:
        """Return the histories cut to their last `count` items; None keeps all."""
        lengths = np.diff(self.offsets)
        if count is None or not (lengths > count).any():
            return self
        kept = np.minimum(lengths, count)
        ends = np.concatenate([[0], np.cumsum(kept)])
        places = np.arange(ends[-1]) - np.repeat(ends[:-1], kept)
        return replace(self, rows=self.rows[np.repeat(self.offsets[1:] - kept, kept) + places], offsets=ends)

    def digest(self, item_ids: Sequence[str]) -> str:
        """Return the SHA-256 of users, histories and reasons, whatever the order of the catalogue."""
        held = np.unique(self.rows)  # few of a large catalogue's items, where the users are few
        hashes = np.array([_short_hash(item_ids[row]) for row in held.tolist()], "<u8")
        found = hashlib.sha256(json.dumps([digest_of(self.user_ids), sorted(self.reasons.items())]).encode())
        found.update(np.ascontiguousarray(self.offsets, "<i8").tobytes())
        for start in range(0, len(self.rows), _ROWS_AT_A_TIME):
            places = np.searchsorted(held, self.rows[start : start + _ROWS_AT_A_TIME])
            found.update(hashes[places].tobytes())
        return found.hexdigest()


def digest_of(ids: Iterable[str]) -> str:
    """Return the SHA-256 of ids in their order."""
    found = hashlib.sha256()
    for each in ids:
        data = each.encode("utf-8", "surrogatepass")
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()


def _short_hash(item_id: str) -> int:
    digest = hashlib.blake2b(item_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def columns_in(path: Path, names: ColumnNames | None = None) -> list[str]:
    """Return the columns of a file of a kind that `read_histories` reads."""
    kind, names = kind_of(path), names or ColumnNames()
    with files.polars_errors(path, kind):
        return files.columns_of(path, kind, names) if kind in ("Parquet", "CSV") else files.first_keys(path, kind)


def read_histories(path: Path, item_ids: Sequence[str], columns: HistoryColumns, thing: str = "user") -> GivenHistories:
    """Read the histories of a file.

    Args:
        path: the file, or a folder of parts.
        item_ids: the catalogue; histories are rows of it.
        columns: the names of the columns.
        thing: what has a list of items, for messages; the user of a history.

    Raises:
        DataError: no such file or column, a broken row, values that are no ids or times, no user, a user in two rows
            of lists, most unknown ids only spelled otherwise, or no item of any history in the catalogue.
    """
    with tempfile.TemporaryDirectory(prefix="vlm2rec-") as scratch:
        found, empty = _open(path, columns, Path(scratch), thing)
        csv = Path(scratch) / "left_out.csv"
        with Rejects(csv) as rejects:
            catalogue = pl.DataFrame({ITEM_ID: pl.Series(item_ids, dtype=pl.String)})
            known, log, _, unknown = filtering.known_interactions(found, catalogue, rejects)
        if not len(log):
            flags = type(columns) is not HistoryColumns
            raise _nothing_known(found, unknown, item_ids, rejects.counts[INTERACTIONS], flags)
        users = pl.concat([known, empty]).unique().sort()
        user = log.user if len(users) == len(known) else _places(known, users)[log.user]
        lengths = np.bincount(user, minlength=len(users))
        reasons = dict.fromkeys(np.flatnonzero(lengths == 0).tolist(), EMPTY)
        if len(reasons) > len(empty):
            reasons |= _why_nothing(found, users, catalogue[ITEM_ID], [*reasons])
        left_out = rejects.counts[INTERACTIONS]
        if found.rows != len(log) + sum(left_out.values()):
            raise RuntimeError(f"{found.rows} interactions read, {len(log)} kept, left out: {left_out}")
        counts = {
            "read": found.rows,
            "kept": len(log),
            "left_out": left_out,
            "unknown_items": unknown.height,
            "unknown": unknown[ITEM_ID].head(_NAMED).to_list() if unknown.height else [],
        }
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return GivenHistories(users.to_list(), log.item, offsets, reasons, counts, csv.read_bytes())


def _places(ids: pl.Series, among: pl.Series) -> np.ndarray:
    """Return where each of `ids` stands in `among`, which has all of them and is sorted."""
    return np.asarray(among.search_sorted(ids).to_numpy(), np.int64)


def _nothing_known(
    found: Interactions, unknown: pl.DataFrame, item_ids: Sequence[str], left_out: Mapping[str, int], flags: bool
) -> DataError:
    """Return the error of a file of which nothing is left; `flags`: the command has flags for the columns' names."""
    if not found.rows:
        return DataError(
            f"{found.path} holds {EMPTY.partition(' is ')[2]} histories only", "items in them", "check the file"
        )
    if not unknown.height:  # what is wrong is not the items
        return DataError(
            f"none of the {found.rows:,} interactions of {found.path} can be used:"
            f" {'; '.join(f'{count:,} {reason}' for reason, count in left_out.items())}",
            "interactions with a user, an item and, in a long table, a time",
            "correct the file" + (", or name the right columns with --user-id-column or --item-id-column" * flags),
        )
    return DataError(
        f"none of the {found.rows:,} interactions of {found.path} names an item of the catalogue, such as"
        f" {', '.join(map(repr, unknown[ITEM_ID].head(3)))}",
        f"ids such as {', '.join(map(repr, item_ids[:3]))}",
        "use the catalogue that these items are of"
        + (", or name the right columns with --item-id-column or --history-column" * flags),
    )


def _why_nothing(found: Interactions, users: pl.Series, catalogue: pl.Series, places: list[int]) -> dict[int, str]:
    """Return the reason of each user who has interactions, but none that can be used."""
    place_of = {users[place]: place for place in places}
    rows = found.frame.filter(pl.col(USER_ID).is_in(list(place_of))).select(USER_ID, ITEM_ID, TIME).collect()
    lacking = pl.when(pl.col(ITEM_ID).is_null()).then(pl.lit(filtering.INCOMPLETE[1]))
    why = (
        lacking.when(pl.col(TIME).is_null()).then(pl.lit(filtering.INCOMPLETE[2])).otherwise(pl.lit(filtering.UNKNOWN))
    )
    reasons: dict[int, Counter[str]] = {}
    examples: dict[int, str] = {}
    for user_id, item_id, reason in rows.select(USER_ID, ITEM_ID, why).iter_rows():
        place = place_of[user_id]
        reasons.setdefault(place, Counter())[reason] += 1
        if item_id is not None:
            examples.setdefault(place, item_id)
    told = {}
    for place, counted in reasons.items():
        such = f", such as item {examples[place]!r}" if place in examples else ""
        parts = ", ".join(f"{reason} ({count:,})" for reason, count in counted.most_common())
        told[place] = f"no interaction can be used: {parts}{such}"
    return told


# --- the two forms ----------------------------------------------------------------------------------------------
def _open(path: Path, columns: HistoryColumns, scratch: Path, thing: str) -> tuple[Interactions, pl.Series]:
    """Return the interactions of a file of either form, and the users whose list is empty."""
    names = ColumnNames(
        item_id=columns.item_id_column,
        user_id=columns.user_id_column,
        time=columns.time_column if columns.order == "time" else None,
    )
    kind = kind_of(path)
    lists = columns.history_column or HISTORY
    found = columns_in(path, names)
    long = names.item_id in found or any(name in found for name in amazon.ID_COLUMNS)
    if long and columns.history_column is None:
        return files.scan_interactions(path, names, scratch=scratch), pl.Series(USER_ID, [], pl.String)
    if lists not in found and columns.history_column is None:
        raise DataError(
            f"{path} has neither a column {names.item_id!r} nor {lists!r}; its columns are {', '.join(found[:20])}",
            "a long table (user, item and time), or one row per user with a list of items",
            "name your column with --item-id-column, or with --history-column",
        )
    require_columns(path, found, {columns.user_id_column: "--user-id-column", lists: "--history-column"})
    return _lists(path, kind, found, names, lists, scratch, thing)


def _lists(
    path: Path, kind: Kind, found: list[str], names: ColumnNames, column: str, scratch: Path, thing: str
) -> tuple[Interactions, pl.Series]:
    """Return the interactions of a file with one row per user, whose number in the list is the time."""
    with files.polars_errors(path, kind):
        if kind in ("Parquet", "CSV"):
            table, records = files.scan_table(path, kind, names, found, scratch)
            source = table.select(names.user_id, column)
        else:
            source, records = pl.LazyFrame(), None
        types = source.collect_schema()
        if kind not in ("Parquet", "CSV"):
            parts = _parsed(_lists_of_records(path, kind, names.user_id, column), scratch)
            source = pl.scan_parquet(parts).rename({USER_ID: names.user_id, HISTORY: column})
        elif types[column] == pl.String:
            rows = _rows_of_text(source.collect(), path, names.user_id, column)
            parts = _parsed(rows, scratch)
            # the ids were read as they are; the rule for ids comes below
            texts = source.select(names.user_id).with_row_index(ROW)
            items = pl.scan_parquet(parts).with_row_index(ROW).select(ROW, HISTORY)
            source = texts.join(items, on=ROW, how="left", maintain_order="left").drop(ROW)
            source = source.rename({HISTORY: column})
        elif not isinstance(types[column], (pl.List, pl.Array)):
            raise DataError(
                f"column {column!r} of {path} holds {types[column]}",
                "a list of item ids in each row, oldest first",
                "name the column of the lists with --history-column, or leave it out for a long table",
            )
        types = source.collect_schema()
        source = source.with_columns(pl.col(column).cast(pl.List(types[column].inner)))  # type: ignore[attr-defined]
        if types[column].inner == pl.String:  # type: ignore[attr-defined]
            texts_of = pl.col(column).explode().str.len_bytes().cast(pl.Int64).sum()
            refuse_bomb(path, source.select(texts_of).collect(engine="streaming").item(), "holds text of")
        source = source.with_row_index(ROW)
        user = ids_of(source, names.user_id, types[names.user_id], path, USER_ID).alias(USER_ID)
        length = pl.col(column).list.len().fill_null(0).cast(pl.Int64)
        users = source.select(ROW, user, length.alias("length")).collect(engine="streaming")
        _refuse_twice(users, path, thing)
        exploded = source.filter(length > 0).with_columns(pl.int_ranges(length).alias(TIME)).explode(column, TIME)
        item = ids_of(exploded, column, types[column].inner, path, ITEM_ID)  # type: ignore[attr-defined]
        frame = exploded.select(ROW, user, item.alias(ITEM_ID), TIME)
    files.require_all(path, records, users.height)
    if users[USER_ID].null_count() == users.height:
        raise DataError(
            f"none of the {users.height:,} rows of {path} has a value in {names.user_id!r}",
            f"{'an' if thing == 'item' else 'a'} {thing} in each row",
            "name the right column with --user-id-column",
        )
    empty = users.filter((pl.col("length") == 0) & pl.col(USER_ID).is_not_null())[USER_ID]
    return Interactions(frame, f"{kind}, one row per {thing}", int(users["length"].sum()), path, False), empty


def _refuse_twice(users: pl.DataFrame, path: Path, thing: str) -> None:
    known = users.filter(pl.col(USER_ID).is_not_null())
    twice = known.filter(pl.col(USER_ID).is_duplicated())
    if twice.height:
        first = twice[USER_ID][0]
        rows = twice.filter(pl.col(USER_ID) == first)[ROW].head(2)
        raise DataError(
            f"{thing} {first!r} has the rows {rows[0] + 1:,} and {rows[1] + 1:,} of {path};"
            f" {thing}s with more than one: {twice[USER_ID].n_unique():,}",
            f"one row per {thing}, with the whole list",
            "join the lists, or write a long table",
        )


def _lists_of_records(path: Path, kind: Kind, user: str, column: str) -> Iterator[tuple[str | None, list[str | None]]]:
    for row, record in read_records(path, kind):
        yield id_as_text(record.get(user), path, row), _ids_of_list(record.get(column), path, row, column)


def _rows_of_text(
    table: pl.DataFrame, path: Path, user: str, column: str
) -> Iterator[tuple[str | None, list[str | None]]]:
    for number, text in enumerate(table[column], 1):
        try:
            value = None if text is None or not text.strip() else json.loads(text)
        except (ValueError, RecursionError):
            value = text
        yield None, _ids_of_list(value, path, number, column)


def _ids_of_list(value: Any, path: Path, row: int, column: str) -> list[str | None]:
    if is_missing(value):
        return []
    if not isinstance(value, list):
        text = str(value)
        raise DataError(
            f"row {row:,} of {path} has {text if len(text) <= 40 else text[:40] + '…'!r} as {column!r}",
            'a list of item ids, oldest first, such as ["7", "42"]',
            "write the lists as JSON, or give a long table of user, item and time",
        )
    return [id_as_text(item, path, row) for item in value]


def _parsed(rows: Iterator[tuple[str | None, list[str | None]]], scratch: Path) -> list[Path]:
    """Write users and lists into Parquet files of a block, and return these."""
    parts: list[Path] = []
    block: list[tuple[str | None, list[str | None]]] = []

    def write() -> None:
        part = scratch / f"lists.{len(parts):05d}.parquet"
        frame = pl.DataFrame(block, schema={USER_ID: pl.String, HISTORY: pl.List(pl.String)}, orient="row")
        frame.write_parquet(part, compression="lz4", statistics=False)
        parts.append(part)
        block.clear()

    for row in rows:
        block.append(row)
        if len(block) == _ROWS_AT_A_TIME:
            write()
    if block or not parts:
        write()
    return parts
