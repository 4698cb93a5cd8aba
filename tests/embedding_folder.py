"""A finished embeddings folder written by hand, for tests of what reads one."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vlm2rec.embedder.contract import schema, storage
from vlm2rec.embedder.export.shard_file import ROW_GROUP_ROWS, write_parquet

View = np.ndarray | None


def write_embeddings(
    folder: Path,
    ids: Sequence[str],
    fused: np.ndarray,
    text: View = None,
    image: View = None,
    *,
    shard_size: int = 4096,
    row_group_size: int | None = None,
    dtype: str = "float32",
    **manifest_extras: Any,
) -> dict[str, Any]:
    """Write a finished embeddings folder as `export-items` does, and return its manifest.

    A row whose vector holds a NaN gets a null in that view; an item that is null in every given view is a failure row.

    Args:
        folder: Folder to create.
        ids: (N,) item ids.
        fused: (N, d) vectors.
        text: (N, d) vectors, or None to leave the whole column null.
        image: As `text`.
        shard_size: Rows of one Parquet file.
        row_group_size: Rows of one row group; default: one per shard.
        dtype: "float32" or "float16", on disk.
        **manifest_extras: Keys of the manifest to add or replace, for instance `data`, `settings`, `fingerprint`.
    """
    folder.mkdir(parents=True)
    dim = int(fused.shape[1])
    given = {schema.FUSED: fused, schema.TEXT: text, schema.IMAGE: image}
    views = [name for name in schema.VIEWS if given[name] is not None]
    absent = np.all([np.isnan(given[name]).any(1) for name in views], axis=0)
    status = np.where(absent, schema.STATUS_FAILED, schema.STATUS_OK)
    shards = []
    for number, start in enumerate(range(0, len(ids), shard_size)):
        rows = slice(start, start + shard_size)
        columns = [
            pa.array(list(ids[rows]), pa.string()),
            *(_vectors(given[name], len(ids[rows]), rows, dim, dtype) for name in schema.VIEWS),
            pa.array(status[rows].tolist(), pa.string()),
            pa.array(["unreadable image" if gone else None for gone in absent[rows]], pa.string()),
            pa.nulls(len(ids[rows]), pa.string()),
        ]
        path = folder / schema.shard_name(number)
        table = pa.Table.from_arrays(columns, schema=schema.embedding_schema(dim, dtype))
        write_parquet(table, path, row_group_size or ROW_GROUP_ROWS)
        shards.append(
            {
                "file": path.name,
                "rows": table.num_rows,
                "bytes": path.stat().st_size,
                "sha256": storage.sha256_file(path),
            }
        )
    settings = manifest_extras.pop("settings", {"backbone": "by hand", "vectors": _digest(given)})
    manifest: dict[str, Any] = {
        "schema_version": schema.SCHEMA_VERSION,
        "dim": dim,
        "dtype": dtype,
        "views": views,
        "num_items": len(ids),
        "counts": {name: int((status == name).sum()) for name in schema.STATUSES if (status == name).any()},
        "shards": shards,
        "settings": settings,
        "fingerprint": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"vlm2rec": "0.1.0"},
        "data": None,
        "seconds": 0.0,
        **manifest_extras,
    }
    schema.write_json(folder / schema.MANIFEST_FILE, manifest)
    return manifest


def _vectors(values: View, rows: int, part: slice, dim: int, dtype: str) -> pa.Array:
    kind = schema.embedding_schema(dim, dtype).field(schema.FUSED).type
    if values is None:
        return pa.nulls(rows, kind)
    wanted = np.ascontiguousarray(values[part], np.dtype(dtype))
    gone = np.isnan(wanted).any(1)
    return pa.FixedSizeListArray.from_arrays(
        pa.array(np.where(gone[:, None], 0, wanted).astype(dtype).ravel()), type=kind, mask=pa.array(gone)
    )


def _digest(given: dict[str, View]) -> str:
    joined = b"".join(name.encode() + values.tobytes() for name, values in given.items() if values is not None)
    return hashlib.sha256(joined).hexdigest()
