"""One shard: its table, how it is written, and how its rows are read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.storage import Location, readable

if TYPE_CHECKING:
    from vlm2rec.embedder.export.plan import Plan

ROW_GROUP_ROWS = 8192
_READ_ROWS = 2048


class Layout(Protocol):
    """How the rows of a plan lie in the table of a shard, and what the manifest says of them."""

    def arrow_schema(self, settings: Mapping[str, Any], metadata: dict[str, str]) -> pa.Schema:
        """Return the Arrow schema of every shard."""

    def row_bytes(self, settings: Mapping[str, Any]) -> int:
        """Return how long a row is, uncompressed."""

    def described(self, plan: Plan) -> dict[str, Any]:
        """Return the keys of the manifest that tell what the folder holds."""

    def write(self, table: pa.Table, file: Any) -> None:
        """Write a shard's table to an open file."""

    def statuses(self, table: pa.Table) -> pa.ChunkedArray:
        """Return the status of each row of the plan."""

    def read(self, path: Location, views: Sequence[str]) -> ShardContent:
        """Read a shard batch by batch, and return ids, statuses and inputs of the plan's rows, and problems."""

    def read_keys(self, path: Location) -> tuple[list[str], list[str | None]]:
        """Return ids and inputs of the plan's rows."""


@dataclass(frozen=True)
class VectorLayout:
    """Each row is an item, or a user, with its vectors."""

    table: str = schema.ITEMS_TABLE

    def arrow_schema(self, settings: Mapping[str, Any], metadata: dict[str, str]) -> pa.Schema:
        """See `Layout`."""
        return schema.embedding_schema(schema.dims_of(settings), settings["storage"], metadata, self.table)

    def row_bytes(self, settings: Mapping[str, Any]) -> int:
        """See `Layout`."""
        dims = schema.dims_of(settings)
        return int(np.dtype(settings["storage"]).itemsize) * sum(dims[view] for view in settings["views"])

    def described(self, plan: Plan) -> dict[str, Any]:
        """See `Layout`."""
        return {
            "dim": plan.settings["dim"],
            **({"dims": plan.settings["dims"]} if "dims" in plan.settings else {}),
            "dtype": plan.settings["storage"],
            "views": plan.settings["views"],
            "num_items": len(plan.item_ids),
        }

    def write(self, table: pa.Table, file: Any) -> None:
        """See `Layout`."""
        write_parquet(table, file)

    def statuses(self, table: pa.Table) -> pa.ChunkedArray:
        """See `Layout`."""
        return table[schema.STATUS]

    def read(self, path: Location, views: Sequence[str]) -> ShardContent:
        """See `Layout`."""
        return read_rows(path, views, self.table)

    def read_keys(self, path: Location) -> tuple[list[str], list[str | None]]:
        """See `Layout`."""
        with readable(path) as source, pq.ParquetFile(source, page_checksum_verification=True) as file:
            names = [schema.id_column(self.table), schema.INPUT]
            columns = file.read(names)
        ids, inputs = (columns[name].to_pylist() for name in names)
        return ids, inputs


ITEM_VECTORS = VectorLayout()


def shard_table(
    plan: Plan,
    rows: Sequence[int],
    vectors: Mapping[str, np.ndarray],
    status: Sequence[str],
    error: Sequence[str | None],
) -> pa.Table:
    """Return the Arrow table of one shard, or of some rows of one.

    Args:
        plan: The plan.
        rows: The n positions in the plan.
        vectors: (n, d) for each view; a row of NaN becomes null, a missing view is null in every row.
        status: One of `schema.STATUSES` for each row.
        error: The reason, or None, for each row.
    """
    ids = [plan.item_ids[row] for row in rows]
    columns = [pa.array(ids, pa.string())]
    for view in schema.VIEWS:
        kind = plan.schema.field(view).type
        columns.append(_vector_array(vectors[view], kind) if view in vectors else pa.nulls(len(ids), kind))
    columns += [pa.array(list(values), pa.string()) for values in (status, error, plan.made_from(rows))]
    return pa.Table.from_arrays(columns, schema=plan.schema)


def _vector_array(vectors: np.ndarray, kind: pa.FixedSizeListType) -> pa.FixedSizeListArray:
    absent = np.isnan(vectors).all(1)
    stored = np.where(absent[:, None], 0, vectors).astype(kind.value_type.to_pandas_dtype())
    if not np.isfinite(stored).all():
        raise ValueError("a vector holds NaN or infinity")
    return pa.FixedSizeListArray.from_arrays(pa.array(stored.ravel()), type=kind, mask=pa.array(absent))


def write_parquet(table: pa.Table, file: Any, row_group_size: int = ROW_GROUP_ROWS) -> None:
    """Write a shard's table to a path or an open file, in the encoding of all shards."""
    pq.write_table(
        table,
        file,
        row_group_size=row_group_size,
        compression="zstd",
        compression_level=1,
        # neighbouring floats have similar exponents and different mantissas: split into byte streams they compress. The
        # encoding has to be named for the leaf below the list, and a dictionary would override it
        use_dictionary=[schema.STATUS],
        column_encoding={f"{view}.list.element": "BYTE_STREAM_SPLIT" for view in schema.VIEWS},
        write_page_checksum=True,
    )


@dataclass(frozen=True)
class ShardContent:
    """What a pass over one shard finds."""

    ids: list[str]
    status: list[str]
    inputs: list[str | None]
    problems: list[str]


def read_rows(path: Location, views: Sequence[str], table: str = schema.ITEMS_TABLE) -> ShardContent:
    """Read one shard batch by batch: ids, statuses, and what is wrong with its rows."""
    id_column = schema.id_column(table)
    content = ShardContent([], [], [], [])
    with readable(path) as source, pq.ParquetFile(source, page_checksum_verification=True) as file:
        for batch in file.iter_batches(_READ_ROWS):
            status = batch[schema.STATUS].to_pylist()
            content.ids.extend(batch[id_column].to_pylist())
            content.status.extend(status)
            content.inputs.extend(batch[schema.INPUT].to_pylist())
            content.problems.extend(_row_problems(batch, batch[id_column], np.array(status, object), views))
    return content


def _row_problems(batch: pa.RecordBatch, ids: pa.Array, status: np.ndarray, views: Sequence[str]) -> list[str]:
    problems = []

    def report(rows: np.ndarray, what: str) -> None:
        if rows.any():
            first = ids[int(np.argmax(rows))].as_py()
            problems.append(f"{int(rows.sum())} rows {what}, the first is item {first!r}")

    report(~np.isin(status, schema.STATUSES), "have an unknown status")
    failed, text_only = status == schema.STATUS_FAILED, status == schema.STATUS_TEXT_ONLY
    for view in schema.VIEWS:
        values, present = vectors_of(batch[view])
        report(present & ~np.isfinite(values).all(1), f"hold NaN or infinity in {view}")
        expected = ~failed & ~(text_only & (view == schema.IMAGE)) if view in views else np.zeros(len(status), bool)
        report(expected & ~present, f"have no vector in {view}, though their status promises one")
        report(present & ~expected, f"have a vector in {view}, though their status or the manifest excludes it")
    has_reason = batch[schema.ERROR].is_valid().to_numpy(zero_copy_only=False)
    report(failed & ~has_reason, "failed without a reason")
    return problems


def vectors_of(column: pa.FixedSizeListArray) -> tuple[np.ndarray, np.ndarray]:
    """Return (n, d) values, anything where null, and the (n,) mask of rows that have a vector."""
    dim = column.type.list_size
    present = column.is_valid().to_numpy(zero_copy_only=False)
    # not `.flatten()`: it leaves null rows out and shifts every row after them
    values = column.values.slice(column.offset * dim, len(column) * dim).to_numpy(zero_copy_only=False)
    return values.reshape(len(column), dim), present
