"""What is read as one table: a file, or a folder of parts as Spark, Hive, Dask and DuckDB write them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlm2rec.embedder.contract.errors import DataError

_READ_TWICE = 1 << 24  # bytes of a Parquet file; to read a larger one once more takes longer than half a second
_SMALLEST_BOMB = 1 << 30
_LARGEST_RATIO = 250


def parts_of(path: Path) -> list[Path]:
    """Return the file itself, or the parts in a folder, by name.

    Names that begin with `_` or `.`, such as `_SUCCESS`, and files without a byte are no parts.

    Raises:
        DataError: the folder holds other folders, or no part.
    """
    if not path.is_dir():
        return [path]
    seen = sorted(entry for entry in path.iterdir() if entry.name[0] not in "_.")
    folders = [entry.name for entry in seen if entry.is_dir()]
    if folders:
        raise DataError(
            f"{path} is a folder that holds folders: {', '.join(folders[:3])}",
            "a file, or a folder with the parts of one table side by side",
            "give one of them, or write the table without partitions",
        )
    parts = [entry for entry in seen if entry.is_file() and entry.stat().st_size]
    if not parts:
        raise DataError(
            f"{path} is a folder without any part", "files of Parquet, CSV or JSON lines in it", "correct the path"
        )
    return parts


def require_same(path: Path, found: Mapping[Path, Mapping[str, Any]]) -> None:
    """Raise `DataError` naming two parts whose columns differ, given the columns and their types of each part."""
    (first, columns), *others = found.items()
    for part, other in others:
        if dict(columns) != dict(other):
            differing = {*columns.items()} ^ {*other.items()}
            names = ", ".join(sorted({name for name, _ in differing})[:5])
            raise DataError(
                f"{first.name} and {part.name} in {path} differ in the columns {names}",
                "the same columns of the same types in all parts",
                "write the parts again, or give one that holds all",
            )


def refuse_bomb(path: Path, unpacked: int, what: str = "unpacks to") -> None:
    """Raise `DataError` if a file or folder of parts holds so much that it is made to fill memory or disk."""
    size = sum(part.stat().st_size for part in parts_of(path)) if unpacked > _SMALLEST_BOMB else 0
    if unpacked > max(_SMALLEST_BOMB, _LARGEST_RATIO * size):
        raise DataError(
            f"{path} has {size:,} bytes and {what} {unpacked / 1e9:,.1f} GB or more",
            f"at most {_LARGEST_RATIO} times a file's size: real tables stay far below",
            "check where the file comes from; if it is right, write it in parts or uncompressed",
        )


def parquet_schema(path: Path) -> pa.Schema:
    """Return the schema of a Parquet file, having checked from its footer that its columns can be unpacked.

    Raises:
        DataError: the file is damaged, or would unpack to far more than its size.
    """
    with _as_parquet(path), pq.ParquetFile(path) as file:
        footer, schema = file.metadata, file.schema_arrow
        # of the groups, not of their columns: Arrow ends the process at a damaged entry of a column
        groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
        unpacked = sum(max(group.total_byte_size, 0) for group in groups)
        rows = footer.num_rows
        columns = [file.schema.column(number) for number in range(len(file.schema.names))]
        texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    refuse_bomb(path, max(unpacked, rows * 8 * len(schema.names)))
    if path.stat().st_size <= _READ_TWICE:
        _read_once(path, texts, rows)
    return schema


def _read_once(path: Path, texts: list[str], rows: int) -> None:
    """Read a file with Arrow, which raises at some untrue counts at which Polars ends the process.

    Args:
        path: of the file.
        texts: its columns of text, which stay in their dictionaries.
        rows: how many it says it has.
    """
    found = 0
    with _as_parquet(path), suppress(pa.ArrowNotImplementedError):  # what only Polars can read
        with pq.ParquetFile(path, read_dictionary=texts) as file:
            found = sum(batch.num_rows for batch in file.iter_batches())
        if found != rows:
            raise ValueError(f"it says that it has {rows:,} rows, and has {found:,}")


@contextmanager
def _as_parquet(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DataError(
            f"{path} cannot be read as Parquet: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            "an undamaged file",
            "create it again, or download it again if its end is missing",
        ) from None
