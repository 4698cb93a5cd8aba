"""One shard: its table, how it is written, and how its rows are read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm2rec.embedder.contract import precision, schema
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
        return sum(precision.bytes_of(settings["storage"], dims[view]) for view in settings["views"])

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
    columns, scales = [pa.array(ids, pa.string())], []
    dtype = plan.settings["storage"]
    for view in schema.VIEWS:
        kind = plan.schema.field(view).type
        if view in vectors:
            stored, of_view = _stored_arrays(vectors[view], kind, dtype)
        else:
            stored, of_view = pa.nulls(len(ids), kind), pa.nulls(len(ids), pa.float32())
        columns.append(stored)
        scales.append(of_view)
    columns += scales if precision.has_scale(dtype) else []
    columns += [pa.array(list(values), pa.string()) for values in (status, error, plan.made_from(rows))]
    return pa.Table.from_arrays(columns, schema=plan.schema)


def _stored_arrays(
    vectors: np.ndarray, kind: pa.FixedSizeListType, dtype: str
) -> tuple[pa.FixedSizeListArray, pa.Array | None]:
    """Return the column of a view and, if the number format has them, that of its scales."""
    absent = np.isnan(vectors).all(1)
    stored = precision.to_stored(np.where(absent[:, None], np.float32(0), vectors), dtype)
    if not np.isfinite(stored.values).all() or not np.isfinite(vectors[~absent]).all():
        raise ValueError("a vector holds NaN or infinity")
    mask = pa.array(absent)
    column = pa.FixedSizeListArray.from_arrays(pa.array(stored.values.ravel()), type=kind, mask=mask)
    return column, None if stored.scales is None else pa.array(stored.scales, mask=absent)


def write_parquet(table: pa.Table, file: Any, row_group_size: int = ROW_GROUP_ROWS) -> None:
    """Write a shard's table to a path or an open file, in the encoding of all shards."""
    kinds = {view: table.schema.field(view).type.value_type for view in schema.VIEWS}
    leaves = {f"{view}.list.element": pa.types.is_floating(kind) for view, kind in kinds.items()}
    pq.write_table(
        table,
        file,
        row_group_size=row_group_size,
        compression="zstd",
        compression_level=1,
        # Neighbouring floats have similar exponents and different mantissas: split into byte streams, they compress
        # better. The encoding has to name the leaf below the list, and a dictionary would override it. A code of int8
        # or binary would take four bytes in Parquet; with a dictionary it takes one.
        use_dictionary=[schema.STATUS, *(leaf for leaf, is_float in leaves.items() if not is_float)],
        column_encoding={leaf: "BYTE_STREAM_SPLIT" for leaf, is_float in leaves.items() if is_float},
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
        values, present = precision.raw_of(batch[view])
        report(present & ~np.isfinite(values).all(1), f"hold NaN or infinity in {view}")
        if schema.scale_of(view) in batch.schema.names:
            scales = batch[schema.scale_of(view)].to_numpy(zero_copy_only=False).astype(np.float32)
            report(present & ~(np.isfinite(scales) & (scales >= 0)), f"have no usable scale of {view}")
        expected = ~failed & ~(text_only & (view == schema.IMAGE)) if view in views else np.zeros(len(status), bool)
        report(expected & ~present, f"have no vector in {view}, though their status promises one")
        report(present & ~expected, f"have a vector in {view}, though their status or the manifest excludes it")
    has_reason = batch[schema.ERROR].is_valid().to_numpy(zero_copy_only=False)
    report(failed & ~has_reason, "failed without a reason")
    return problems
