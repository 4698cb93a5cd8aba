"""Writes the files of a dataset folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import DataError
from vlm2rec.pipelines import console
from vlm2rec.pipelines.catalogue.negatives import Sequences, draw_candidates, untouched_counts
from vlm2rec.pipelines.config import PrepareConfig

_USERS_PER_GROUP = 16_384
_ITEMS_PER_GROUP = 65_536
_WHOLE_DICTIONARY = 65_536  # ids of a catalogue that are written whole with every group: half a megabyte


def write_items(catalogue: pl.DataFrame, path: Path) -> None:
    """Write `items.parquet`: id, title and image first, then the catalogue's other columns."""
    first = [schema.ITEM_ID, schema.TITLE, schema.IMAGE_PATH]
    catalogue = catalogue.with_columns(pl.col(schema.TITLE).fill_null(""))  # kept by choice: `--require image`
    table = catalogue.select(*first, *(c for c in catalogue.columns if c not in first))
    arrow_schema = pa.schema(
        [
            pa.field(f.name, pa.string() if pa.types.is_large_string(f.type) else f.type)
            for f in _arrow(table[:0]).schema
        ]
    )
    with pq.ParquetWriter(path, arrow_schema, compression="zstd", write_page_checksum=True) as writer:
        for start in range(0, table.height, _ITEMS_PER_GROUP):
            writer.write_table(_arrow(table[start : start + _ITEMS_PER_GROUP]).cast(arrow_schema))


def _arrow(table: pl.DataFrame) -> pa.Table:
    return table.to_arrow(compat_level=pl.CompatLevel.oldest())


def write_sequences(
    sequences: Sequences, user_ids: pl.Series, item_ids: pl.Series, path: Path, split: str = schema.LEAVE_ONE_OUT
) -> None:
    """Write `sequences.parquet`: each user's items in time order, split into train, valid and test."""
    items, users = _arrow_ids(item_ids), _arrow_ids(user_ids)
    if split == schema.TEMPORAL:
        _write_temporal(sequences, users, items, path)
        return
    columns = [(schema.USER_ID, users.type), (schema.TRAIN, _LISTS), (schema.VALID, _CODED), (schema.TEST, _CODED)]
    with _id_writer(path, columns) as writer:
        for start in range(0, len(sequences), _USERS_PER_GROUP):
            ends = sequences.offsets[start : start + _USERS_PER_GROUP + 1]
            rows = sequences.items[ends[0] : ends[-1]]
            last = ends[1:] - ends[0] - 1
            train = np.ones(len(rows), bool)
            train[last] = train[last - 1] = False
            offsets = ends - ends[0] - 2 * np.arange(len(ends))
            writer.write_table(
                pa.Table.from_arrays(
                    [
                        users.slice(start, len(last)),
                        pa.ListArray.from_arrays(offsets.astype(np.int32), _coded(rows[train], items)),
                        _coded(rows[last - 1], items),
                        _coded(rows[last], items),
                    ],
                    schema=writer.schema,
                )
            )


def _write_temporal(sequences: Sequences, users: pa.Array, items: pa.Array, path: Path) -> None:
    parts = (schema.TRAIN, schema.VALID, schema.TEST)
    with _id_writer(path, [(schema.USER_ID, users.type), *((name, _LISTS) for name in parts)]) as writer:
        for start in range(0, len(sequences), _USERS_PER_GROUP):
            ends = sequences.offsets[start : start + _USERS_PER_GROUP + 1]
            rows = sequences.items[ends[0] : ends[-1]]
            counts = np.stack(temporal_counts(np.diff(ends)), 1)  # (users, 3)
            of_part = np.repeat(np.tile(np.arange(3), len(counts)), counts.ravel())  # the part of each interaction
            columns = [users.slice(start, len(counts))]
            for part, of_users in enumerate(counts.T):
                offsets = np.concatenate([[0], np.cumsum(of_users)]).astype(np.int32)
                columns.append(pa.ListArray.from_arrays(offsets, _coded(rows[of_part == part], items)))
            writer.write_table(pa.Table.from_arrays(columns, schema=writer.schema))


def temporal_counts(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return how many of each user's interactions, (U,), are for training, validation and test: 80, 10 and 10 %.

    As in MMRec's published splits, a fifth is held out, rounded down, of it half for validation, rounded down, and the
    rest for test; of fewer than ten interactions, one each.
    """
    held = np.maximum(2, lengths // 5)
    return lengths - held, held // 2, held - held // 2


def _require_untouched(sequences: Sequences, user_ids: pl.Series, num_items: int, count: int) -> None:
    if num_items - int(np.diff(sequences.offsets).max()) >= count:
        return  # no user has so many items, even without repeats
    left = untouched_counts(sequences, num_items)
    least, short = int(left.min()), int((left < count).sum())
    if short:
        raise DataError(
            f"{short:,} of {len(sequences):,} users have interacted with so many of the {num_items:,} items that"
            f" fewer than {count} are left to draw from; user {user_ids[int(left.argmin())]!r} has {least} left",
            f"for every user, at least {count} items without an interaction of the user",
            f"give --candidates {least} or less{'; with fewer than 20, H@20 is 1 for every model' * (least < 20)}"
            if least
            else "add items: this user has interacted with every one",
        )


def write_candidates(
    sequences: Sequences, user_ids: pl.Series, item_ids: pl.Series, config: PrepareConfig, path: Path
) -> None:
    """Write `negatives.parquet`: the candidates of every user, for each seed."""
    count, num_items, num_users = config.candidates, len(item_ids), len(sequences)
    _require_untouched(sequences, user_ids, num_items, count)
    items, users = _arrow_ids(item_ids), _arrow_ids(user_ids)
    columns = [(schema.SEED, pa.int32()), (schema.USER_ID, users.type), (schema.NEGATIVES, _LISTS)]
    total = num_users * len(config.candidate_seeds)
    with _id_writer(path, columns) as writer, console.progress("drawing candidates", total) as advance:
        for seed in sorted(config.candidate_seeds):
            for start in range(0, num_users, _USERS_PER_GROUP):
                group = range(start, min(start + _USERS_PER_GROUP, num_users))
                drawn = draw_candidates(sequences, group, num_items, count, seed)
                offsets = np.arange(len(group) + 1, dtype=np.int32) * np.int32(count)
                lists = pa.ListArray.from_arrays(offsets, _coded(drawn.ravel(), items))
                seeds = pa.array(np.full(len(group), seed, np.int32))
                writer.write_table(
                    pa.Table.from_arrays([seeds, users.slice(start, len(group)), lists], schema=writer.schema)
                )
                advance(len(group))


_CODED = pa.dictionary(pa.int32(), pa.string())
_LISTS = pa.list_(_CODED)


@contextmanager
def _id_writer(path: Path, columns: list[tuple[str, pa.DataType]]) -> Iterator[pq.ParquetWriter]:
    """Open a Parquet file whose item ids are written as codes, so that no id string is repeated 10⁸ times.

    The Arrow schema is not stored, so readers see plain strings and lists of strings.
    """
    coded = [name if kind == _CODED else f"{name}.list.element" for name, kind in columns if kind in (_CODED, _LISTS)]
    with pq.ParquetWriter(
        path,
        pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns]),
        compression="zstd",
        use_dictionary=coded,
        # least and greatest id are of no use to a reader, and finding them takes longer than all the rest
        write_statistics=[name for name, kind in columns if kind not in (_CODED, _LISTS)],
        dictionary_pagesize_limit=1 << 28,  # the default falls back to plain strings at 1 MB of ids
        write_page_checksum=True,
        store_schema=False,
    ) as writer:
        yield writer


def _coded(codes: np.ndarray, ids: pa.Array) -> pa.DictionaryArray:
    """Return the ids at these places as codes. Of a large catalogue only the ids that occur are in the dictionary.

    Parquet writes the dictionary of every column anew with every group of rows.
    """
    if len(ids) > max(len(codes), _WHOLE_DICTIONARY):
        occurs = np.zeros(len(ids), bool)
        occurs[codes] = True
        codes, ids = (np.cumsum(occurs, dtype=np.int32) - 1)[codes], ids.take(pa.array(np.flatnonzero(occurs)))
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), ids)


def _arrow_ids(ids: pl.Series) -> pa.Array:
    return ids.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(pa.string())
