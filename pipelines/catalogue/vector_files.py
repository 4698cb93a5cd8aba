"""Reads vectors from Parquet, CSV or npy. Every file is checked before any vector is used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ConfigError, DataError, did_you_mean
from vlm2rec.embedder.export.plan import duplicates

_CONVERT = "save it as Parquet (item_id and a list column) or as .npy with numpy.save"


@dataclass(frozen=True)
class VectorFile:
    """Ids and vectors of one source: row i of every view belongs to `item_ids[i]`."""

    item_ids: list[str]
    views: dict[str, np.ndarray]  # view → (N, d) float32
    present: dict[str, np.ndarray]  # view → (N,) bool: the source has a vector, not null
    columns: dict[str, str]  # view → its name in the source


def read_parquet(path: Path, id_column: str, column: str | None, view: str) -> VectorFile:
    """Read ids and vectors from one Parquet file.

    Args:
        path: The file.
        id_column: Strings or whole numbers, each once.
        column: Column of lists to read as `view`. None takes the columns named fused, text and image; without these,
            the only column of lists, as `view`.
        view: The view that a single column holds.

    Raises:
        DataError: no such file or column, ids that are null or occur twice, lists of different lengths.
    """
    found = _parquet_schema(path)
    _require_column(path, id_column, found.names, "--item-id-column")
    columns = _vector_columns(path, found, id_column, column, view)
    table = pq.read_table(path, columns=[id_column, *columns.values()])
    ids = _as_ids(table[id_column], f"column {id_column!r} of {path}")
    return _views_of(path, table, ids, columns)


def read_csv(path: Path, id_column: str, column: str | None, view: str) -> VectorFile:
    """Read ids and vectors from a CSV file with a header, tab-separated if its name ends in .tsv.

    Args:
        path: The file.
        id_column: Each id once; "007" and "NA" do not change.
        column: Column of lists (`[0.1, 0.2]`) to read as `view`. None takes the columns named fused, text and image,
            or the only column of lists. Without lists, all columns are numbers, and a row is a vector.
        view: The view that a single column, or a row of numbers, holds.

    Raises:
        DataError: no such file or column, text instead of numbers, or an incomplete vector.
    """
    table = _csv_table(path, id_column, column)
    ids = _as_ids(table[id_column], f"column {id_column!r} of {path}")
    others = [name for name in table.column_names if name != id_column]
    texts = [name for name in others if pa.types.is_string(table[name].type)]
    if not texts:
        vectors, present = _matrix(_rows(table.select(others), ids, path), ids, str(path))
        return VectorFile(ids, {view: vectors}, {view: present}, {view: path.name})
    lists = pa.table({name: _parsed(table[name], ids, f"column {name!r} of {path}") for name in texts})
    columns = _vector_columns(path, lists.schema, id_column, column, view)
    return _views_of(path, lists, ids, columns)


def _views_of(path: Path, table: pa.Table, ids: list[str], columns: dict[str, str]) -> VectorFile:
    read = {name: _matrix(table[source], ids, f"column {source!r} of {path}") for name, source in columns.items()}
    lengths = {columns[name]: vectors.shape[1] for name, (vectors, _) in read.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(
            f"{path} has vectors of different lengths: {', '.join(f'{name} {size}' for name, size in lengths.items())}",
            "one length for all views of an embeddings folder",
            "import one view at a time with --column, each into its own folder",
        )
    views = {name: vectors for name, (vectors, _) in read.items()}
    return VectorFile(ids, views, {name: present for name, (_, present) in read.items()}, columns)


def _csv_table(path: Path, id_column: str, column: str | None) -> pa.Table:
    _require_file(path)
    as_text = {name: pa.string() for name in (id_column, column) if name}
    delimiter = "\t" if path.suffix == ".tsv" else ","
    try:
        table = pyarrow.csv.read_csv(
            path,
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=as_text, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
            ),
        )
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read as CSV ({error})", "UTF-8 with a header, and as many values in every row", _CONVERT
        ) from None
    _require_column(path, id_column, table.column_names, "--item-id-column")
    if column is None:
        return table
    _require_column(path, column, table.column_names, "--column")
    return table.select([id_column, column])


def _parsed(texts: pa.ChunkedArray, ids: Sequence[str], where: str) -> pa.Array:
    """Return texts such as `[0.1, 0.2]` as lists."""
    values: list[list[float] | None] = []
    for item_id, text in zip(ids, texts.to_pylist(), strict=True):
        try:
            values.append(None if text is None else [float(value) for value in json.loads(text)])
        except (ValueError, TypeError):
            raise DataError(
                f"{where} holds {text[:40]!r} for item {item_id!r}",
                "numbers, or lists of numbers such as [0.1, 0.2]",
                "name the column of lists with --column, or leave other columns out of the file",
            ) from None
    return pa.array(values, pa.list_(pa.float32()))


def _rows(table: pa.Table, ids: Sequence[str], path: Path) -> pa.ChunkedArray:
    """Return the rows of a table of numbers as lists, null if a row is empty."""
    if not table.num_columns:
        raise DataError(f"{path} has ids and nothing else", "a column for each dimension", _CONVERT)
    for name in table.column_names:
        kind = table[name].type
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
            raise DataError(f"column {name!r} of {path} is {kind}", "numbers", "leave it out of the file")
    given = np.stack([column.is_valid().to_numpy() for column in table.columns], 1)  # (N, d)
    in_part = np.flatnonzero(given.any(1) & ~given.all(1))
    if len(in_part):
        raise DataError(
            f"{path} has {int(given[in_part[0]].sum())} of {given.shape[1]} numbers for item {ids[int(in_part[0])]!r}",
            "all of them, or none if an item has no vector",
            "correct the row",
        )
    matrix = np.stack([column.cast(pa.float32()).to_numpy() for column in table.columns], 1)
    kind = pa.list_(pa.float32(), matrix.shape[1])
    mask = pa.array(~given.any(1))
    return pa.chunked_array([pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), type=kind, mask=mask)])


def read_npy(path: Path, item_ids: Sequence[str], view: str, ids_from: str) -> VectorFile:
    """Read an .npy matrix whose row i belongs to `item_ids[i]`.

    Raises:
        DataError: no such file, not a matrix of numbers, or another number of rows than ids.
    """
    vectors = _load_npy(path)
    if vectors.ndim != 2 or not vectors.shape[1] or vectors.dtype.kind not in "fiu":
        raise DataError(
            f"{path} holds {vectors.dtype} of shape {vectors.shape}", "numbers of shape (items, d)", "save the matrix"
        )
    if len(vectors) != len(item_ids):
        one_more = ": row 0 may be a padding row; cut it off" if len(vectors) == len(item_ids) + 1 else ""
        raise DataError(
            f"{path} has {len(vectors)} rows and {ids_from} has {len(item_ids)}{one_more}",
            "one row for each id, in the same order",
            "give the ids of these rows with --ids",
        )
    values = _float32(vectors)
    return VectorFile(list(item_ids), {view: values}, {view: np.ones(len(values), bool)}, {view: path.name})


def read_ids(path: Path, id_column: str) -> list[str]:
    """Read ids in order: .npy of strings or whole numbers, .txt with one per line, .json, or a column in Parquet.

    Raises:
        DataError: no such file, ids that are null or occur twice.
        ConfigError: another kind of file.
    """
    if path.suffix == ".parquet":
        _require_column(path, id_column, _parquet_schema(path).names, "--item-id-column")
        return _as_ids(pq.read_table(path, columns=[id_column])[id_column], f"column {id_column!r} of {path}")
    if path.suffix == ".npy":
        values = _load_npy(path)
        if values.ndim != 1 or values.dtype.kind not in "Uiu":
            raise DataError(
                f"{path} holds {values.dtype} of shape {values.shape}", "a list of strings or whole numbers", _CONVERT
            )
        return _as_ids(pa.array(values.tolist()), str(path))
    if path.suffix == ".txt":
        _require_file(path)
        try:
            # not splitlines(): an id may hold one of the rarer line breaks of Unicode
            lines = path.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 ({error})", "one id per line", "save it as UTF-8") from None
        return _as_ids(pa.array(lines[:-1] if lines[-1] == "" else lines, pa.string()), str(path))
    if path.suffix == ".json":
        _require_file(path)
        try:
            return _as_ids(pa.array(json.loads(path.read_text(encoding="utf-8"))), str(path))
        except (ValueError, TypeError, pa.ArrowException) as error:
            raise DataError(f"{path} is not a list of ids ({error})", 'one list, like ["a", "b"]', _CONVERT) from None
    raise ConfigError(
        f"--ids {path} ends in {path.suffix!r}", ".npy, .txt, .json or .parquet", "save the ids as one of these"
    )


def require_finite(source: VectorFile, rows: np.ndarray, where: Path) -> None:
    """Raise `DataError` naming the first item among `rows` whose vector holds NaN or infinity."""
    for view, vectors in source.views.items():
        wanted = rows[source.present[view][rows]]
        bad = wanted[~np.isfinite(vectors[wanted]).all(1)]
        if len(bad):
            raise DataError(
                f"{where} holds NaN or infinity in the {view} vectors of {len(bad)} items, the first is item"
                f" {source.item_ids[int(bad[0])]!r}",
                "finite numbers; null in a Parquet file if an item has no vector",
                "compute these vectors again, or leave the items out: they become rows with a reason",
            )


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path} is not a file", "a file of vectors or ids", "check the path")


def _parquet_schema(path: Path) -> pa.Schema:
    _require_file(path)
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error})", "an undamaged Parquet file", _CONVERT) from None


def _require_column(path: Path, column: str, found: Sequence[str], flag: str) -> None:
    if column not in found:
        raise DataError(
            f"{path} has no column {column!r}{did_you_mean(column, found)}; its columns are {', '.join(found)}",
            f"a column {column!r}",
            f"name the column with {flag}",
        )


def _vector_columns(path: Path, found: pa.Schema, id_column: str, column: str | None, view: str) -> dict[str, str]:
    """Return view → column."""
    lists = [field.name for field in found if field.name != id_column and _holds_vectors(field.type)]
    if column is not None:
        _require_column(path, column, found.names, "--column")
        if column not in lists:
            raise DataError(
                f"column {column!r} of {path} is {found.field(column).type}",
                "lists of numbers",
                "choose another --column",
            )
        return {view: column}
    named = {name: name for name in schema.VIEWS if name in lists}
    if named:
        return named
    if len(lists) == 1:
        return {view: lists[0]}
    raise DataError(
        f"{path} has {len(lists)} columns of lists of numbers{': ' if lists else ''}{', '.join(lists)}",
        "one, or columns called fused, text or image",
        "name one with --column" if lists else _CONVERT,
    )


def _holds_vectors(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return False
    return pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)


def _matrix(column: pa.ChunkedArray, ids: Sequence[str], where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (N, d) float32 of a list column, NaN where null, and the (N,) mask of rows that are not null."""
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.float64)  # NaN where null
    present = np.flatnonzero(~np.isnan(lengths))
    if not len(present):
        raise DataError(f"{where} holds only null", "vectors", "choose another --column")
    dim = int(lengths[present[0]])
    other = present[lengths[present] != dim]
    if len(other) or not dim:
        row = int(other[0]) if len(other) else int(present[0])
        raise DataError(
            f"{where} holds vectors of different lengths: item {ids[present[0]]!r} has {dim}, item {ids[row]!r} has"
            f" {int(lengths[row])}"
            if dim
            else f"{where} holds an empty vector, that of item {ids[row]!r}",
            "vectors of one length",
            "compute the vectors again, with null for an item without one",
        )
    matrix = np.full((len(column), dim), np.nan, np.float32)
    start = 0
    for chunk in column.chunks:
        values = chunk.flatten().to_numpy(zero_copy_only=False)  # of the rows that are not null
        rows = present[(present >= start) & (present < start + len(chunk))]
        matrix[rows] = _float32(values).reshape(len(rows), dim)
        start += len(chunk)
    return matrix, ~np.isnan(lengths)


def _float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # becomes infinity, which `require_finite` reports
        return np.asarray(values, np.float32)


def _as_ids(values: pa.Array | pa.ChunkedArray, where: str) -> list[str]:
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"the ids in {where} are {kind}", "strings or whole numbers", "convert them first")
    if values.null_count:
        raise DataError(f"{values.null_count} ids in {where} are null", "an id for every row", "remove these rows")
    ids = [str(value) for value in values.to_pylist()]
    twice = duplicates(ids)
    if twice:
        raise DataError(
            f"{len(twice)} ids occur more than once in {where}, among them {', '.join(map(repr, twice[:5]))}",
            "every id once",
            "remove the duplicate rows",
        )
    return ids


def _load_npy(path: Path) -> np.ndarray:
    _require_file(path)
    try:
        loaded: Any = np.load(path, allow_pickle=False, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise DataError(
            f"{path} cannot be read as .npy ({str(error).splitlines()[0] if str(error) else type(error).__name__})",
            "one array of numbers or strings, written by numpy.save; pickled objects are never loaded",
            "save the plain array",
        ) from None
    if not isinstance(loaded, np.ndarray):
        raise DataError(f"{path} is an archive of several arrays", "one array, written by numpy.save", "save one array")
    return loaded
