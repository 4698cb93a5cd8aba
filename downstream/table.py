"""The embedding table, read from an embeddings folder. Needs pyarrow and NumPy only."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlm2rec.embedder.contract import precision, schema
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError
from vlm2rec.embedder.contract.storage import Location, location, readable

_EXPORT_AGAIN = "run the command that wrote it (for example `vlm2rec export-items`) again: it repairs damaged shards"

_BATCH = 1024  # rows read at a time: few enough to stay in the processor's cache while they are copied
_READERS = min(8, os.cpu_count() or 1)
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class EmbeddingTable:
    """One view of an embeddings folder in memory: ids and vectors share a row.

    `vectors` is (N, d) float32 with rows of NaN for items without a vector in this view; `present` says which have one.
    """

    item_ids: list[str]
    vectors: np.ndarray  # (N, d) float32
    present: np.ndarray  # (N,) bool
    column: str
    manifest: dict[str, Any]

    @property
    def dim(self) -> int:
        """Length d of a vector."""
        return int(self.vectors.shape[1])

    @classmethod
    def open(cls, folder: Location | str, column: str = schema.FUSED) -> EmbeddingTable:
        """Read one view of a finished embeddings folder, on a disk or in an object store (`s3://bucket/folder`).

        Raises:
            ArtifactError: no manifest, a damaged or foreign shard, or no vector at all in this view.
        """
        folder = location(folder)
        _require_view(column)
        manifest = schema.read_manifest(folder)
        dim = schema.dim_of(manifest, column)
        counts = [int(shard["rows"]) for shard in manifest["shards"]]
        starts, expected = np.cumsum([0, *counts]), sum(counts)
        vectors, present = np.empty((expected, dim), np.float32), np.empty(expected, bool)

        def read(number: int) -> list[str]:
            ids: list[str] = []
            for batch_ids, batch, has_vector in _read_shard(folder, manifest, number, column, _BATCH):
                rows = slice(starts[number] + len(ids), starts[number] + len(ids) + len(batch_ids))
                ids.extend(batch_ids)
                if len(ids) <= counts[number]:
                    vectors[rows], present[rows] = batch, has_vector
            return ids

        by_shard = _every_shard(manifest, column, read)
        if [len(ids) for ids in by_shard] != counts:
            raise ArtifactError(
                f"the shards of {folder} do not hold the {expected} rows that its manifest counts",
                "the folder as exported",
                _EXPORT_AGAIN,
            )
        table = cls([item_id for ids in by_shard for item_id in ids], vectors, present, column, manifest)
        if not table.present.any():
            raise _nothing_in(folder, column)
        return table

    def rows_of(self, item_ids: list[str] | pa.Array) -> np.ndarray:
        """Return the row of each wanted item, (M,) int64; -1 where the table lacks it or has no vector for it."""
        wanted = pa.array(item_ids, pa.string()) if isinstance(item_ids, list) else item_ids
        found = pc.index_in(wanted, value_set=pa.array(self.item_ids, pa.string()))
        rows = pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)
        rows[(rows >= 0) & ~self.present[rows]] = -1
        return rows

    def take(self, item_ids: list[str] | pa.Array, otherwise: str = "") -> np.ndarray:
        """Return the vectors of `item_ids` in that order, (M, d) float32; raise `ArtifactError` when one is missing.

        `otherwise` is what the error advises besides.
        """
        rows = self.rows_of(item_ids)
        if (rows < 0).any():
            missing = [str(item_ids[i]) for i in np.flatnonzero(rows < 0)[:5]]
            raise ArtifactError(
                f"{int((rows < 0).sum())} of {len(rows)} items have no {self.column} vector, among them {missing}",
                "a vector for every item",
                "export the dataset that these items come from, or repair the failed items and export again"
                + otherwise,
            )
        return self.vectors[rows]


def read_in_order(folder: Location, column: str, item_ids: list[str], vectors: np.ndarray) -> np.ndarray:
    """Read the vectors of some items directly into a given array; the table itself is never in memory.

    Args:
        folder: a finished embeddings folder.
        column: which view.
        item_ids: M different ids.
        vectors: (M, d) float32 to fill; rows of items without a vector do not change.

    Returns:
        Which items have a vector, (M,) bool.

    Raises:
        ArtifactError: as `EmbeddingTable.open`.
    """
    manifest = schema.read_manifest(folder)
    row_of = {item_id: row for row, item_id in enumerate(item_ids)}
    found = np.zeros(len(item_ids), bool)

    def read(number: int) -> bool:
        anything = False
        for ids, batch, present in _read_shard(folder, manifest, number, column, _BATCH):
            rows = np.array([row_of.get(item_id, -1) for item_id in ids], np.int64)
            anything = anything or bool(present.any())
            wanted = present & (rows >= 0)
            if not wanted.all():
                rows, batch = rows[wanted], batch[wanted]
            in_order = len(rows) > 0 and bool((np.diff(rows) == 1).all())
            vectors[slice(rows[0], rows[-1] + 1) if in_order else rows] = batch
            found[rows] = True
        return anything

    if not any(_every_shard(manifest, column, read)):
        raise _nothing_in(folder, column)
    return found


def read_rows(folder: Location, column: str, rows: np.ndarray) -> EmbeddingTable:
    """Read some rows of a finished embeddings folder; the others are never in memory.

    Args:
        folder: a finished embeddings folder.
        column: which view.
        rows: M positions in the folder, rising.

    Returns:
        The rows as a table of M rows; perhaps none of them has a vector.

    Raises:
        ArtifactError: as `EmbeddingTable.open`.
    """
    manifest = schema.read_manifest(folder)
    dim = schema.dim_of(manifest, column)
    starts = np.cumsum([0, *(int(shard["rows"]) for shard in manifest["shards"])])
    ends = np.searchsorted(rows, starts)
    vectors, present = np.full((len(rows), dim), np.nan, np.float32), np.zeros(len(rows), bool)

    def read(number: int) -> list[str]:
        ids: list[str] = []
        first, start = ends[number], starts[number]
        if first == ends[number + 1]:
            return ids
        for batch_ids, batch, has_vector in _read_shard(folder, manifest, number, column, _BATCH):
            last = first + np.searchsorted(rows[first : ends[number + 1]], start + len(batch_ids))
            places = rows[first:last] - start
            vectors[first:last], present[first:last] = batch[places], has_vector[places]
            ids.extend(batch_ids[place] for place in places)
            first, start = last, start + len(batch_ids)
        return ids

    ids = [item_id for of_shard in _every_shard(manifest, column, read) for item_id in of_shard]
    if len(ids) != len(rows):
        raise ArtifactError(
            f"{folder} does not hold all the rows that its manifest counts", "the folder as exported", _EXPORT_AGAIN
        )
    return EmbeddingTable(ids, vectors, present, column, manifest)


def read_items(
    folder: Location, column: str, item_ids: list[str], vectors: np.ndarray, *, all_needed: bool, advice: str
) -> np.ndarray:
    """Read the vectors of a dataset's items for a recommender: as `read_in_order`, and finite.

    Args:
        folder: a finished embeddings folder.
        column: which view.
        item_ids: M different ids.
        vectors: (M, d) float32 of zeros to fill; rows of items without a vector stay zero.
        all_needed: an item without a vector is an error.
        advice: how to fill such items, for that error.

    Returns:
        Which items have a vector, (M,) bool.

    Raises:
        ArtifactError: no item has a vector, one lacks it though all are needed, or a vector is not finite.
    """
    where = f"{folder}, column {column},"
    found = read_in_order(folder, column, item_ids, vectors)
    if not found.any():
        raise ArtifactError(f"{where} has none of the dataset's items", "vectors of these items", "export this dataset")
    if all_needed and not found.all():
        lacking = [item_ids[i] for i in np.flatnonzero(~found)[:5]]
        raise ArtifactError(
            f"{folder} has no {column} vector for {int((~found).sum())} of {len(item_ids)} items, among them"
            f" {', '.join(map(repr, lacking))}",
            "a vector for every item of the dataset",
            f"export the dataset of these items, or fill them with {advice}",
        )
    with np.errstate(all="ignore"):
        total = vectors.sum()  # may overflow: all elements are looked at only then
    if not np.isfinite(total) and not np.isfinite(vectors).all():
        raise ArtifactError(f"{where} holds values that are not finite", "finite vectors", "export again")
    return found


def _nothing_in(folder: Location, column: str) -> ArtifactError:
    return ArtifactError(
        f"{folder} has no vector in column {column!r}: all its rows are null",
        "at least one vector",
        "choose another column, or check the status and error columns of the export",
    )


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Return `vectors` (..., d) at length 1 in their own dtype, so that dot products are cosines; zeros stay zero."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)


def read_batches(
    folder: Location,
    column: str,
    batch_size: int = 16_384,
    table: str = schema.ITEMS_TABLE,
    shards: Iterable[int] | None = None,
) -> Iterator[tuple[list[str], np.ndarray, np.ndarray]]:
    """Stream (ids, vectors (n, d) float32 with NaN rows for nulls, present (n,) bool) shard by shard.

    Memory holds one batch, whatever the catalogue's size. Each shard's size is compared with the manifest, and
    Parquet's page checksums are checked; `vlm2rec verify` also compares SHA-256. The rows have to be those of `table`,
    items or users. `shards` are the numbers of those to read; default: all.
    """
    _require_view(column)
    manifest = schema.read_manifest(folder, table=table)
    for number in range(len(manifest["shards"])) if shards is None else shards:
        yield from _read_shard(folder, manifest, number, column, batch_size)


def read_part(
    folder: Location, number: int, column: str, table: str = schema.ITEMS_TABLE
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return one shard as `read_batches` streams it."""
    _require_view(column)
    manifest = schema.read_manifest(folder, table=table)
    rows = max(1, int(manifest["shards"][number]["rows"]))
    parts = list(_read_shard(folder, manifest, number, column, rows))
    if len(parts) == 1:
        return parts[0]
    empty = np.empty((0, schema.dim_of(manifest, column)), np.float32)
    ids = [row_id for part_ids, _, _ in parts for row_id in part_ids]
    return (
        ids,
        np.concatenate([empty, *(p[1] for p in parts)]),
        np.concatenate([np.empty(0, bool), *(p[2] for p in parts)]),
    )


def _every_shard(manifest: Mapping[str, Any], column: str, read: Callable[[int], _Read]) -> list[_Read]:
    """Read the shards in several threads, as decoding releases Python's lock; results come in the shards' order."""
    _require_view(column)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="shard") as pool:
        return list(pool.map(read, range(len(manifest["shards"]))))


def _require_view(column: str) -> None:
    if column not in schema.COLUMNS:
        raise ConfigError(
            f"{column!r} is not a view", f"one of {', '.join(schema.COLUMNS)}", "correct the column's name"
        )


def _read_shard(
    folder: Location, manifest: Mapping[str, Any], number: int, column: str, batch_size: int
) -> Iterator[tuple[list[str], np.ndarray, np.ndarray]]:
    """Stream one shard as `read_batches` does."""
    id_column = schema.id_column(schema.table_of(manifest))
    shard, stored = manifest["shards"][number], schema.stored_columns(column)
    dims, dtype = {name: schema.dim_of(manifest, name) for name in stored}, manifest["dtype"]
    path = folder / shard["file"]
    try:
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            raise ArtifactError(
                f"{path} is missing or has another size than the manifest says",
                f"{shard['bytes']} bytes",
                _EXPORT_AGAIN,
            )
        with readable(path) as source, pq.ParquetFile(source, page_checksum_verification=True) as file:
            for name, dim in dims.items():
                _require_vectors(file.schema_arrow, id_column, name, dim, dtype, path)
            columns = [id_column, *schema.read_columns(stored, dtype)]
            for batch in file.iter_batches(batch_size, columns=columns):
                vectors, present = _end_to_end([schema.vectors_of(batch, *each, dtype) for each in dims.items()])
                yield batch[id_column].to_pylist(), vectors, present
    except (pa.ArrowException, OSError) as error:
        raise ArtifactError(f"{path} is damaged ({error})", "the shard as exported", _EXPORT_AGAIN) from None


def _require_vectors(found: pa.Schema, id_column: str, column: str, dim: int, dtype: str, path: Location) -> None:
    """Raise `ArtifactError` unless the shard has ids and vectors of the manifest's length in `column`."""
    wanted = [id_column, *schema.read_columns([column], dtype)]
    schema.require_columns(found.names, wanted, str(path), _EXPORT_AGAIN)
    kind, planned = found.field(column).type, precision.stored_type(dtype, dim)
    fits = pa.types.is_fixed_size_list(kind) and kind.list_size == planned.list_size
    if not fits or (dtype not in precision.FLOATS and kind.value_type != planned.value_type):
        raise ArtifactError(
            f"column {column!r} of {path} is {kind}",
            f"vectors of {dim} dimensions ({dtype}), as the manifest says",
            _EXPORT_AGAIN,
        )


def _end_to_end(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return (vectors, present) of several columns end to end: a row without one of them has no vector."""
    if len(parts) == 1:
        return parts[0]
    present = np.logical_and.reduce([has for _, has in parts])
    vectors = np.concatenate([part for part, _ in parts], axis=1)
    vectors[~present] = np.nan
    return vectors, present
