"""Reads vectors from Parquet, CSV, JSON lines, RecBole's .itememb, or npy.

Every file is checked before any vector is used.
"""

from __future__ import annotations

import json
import re
import tempfile
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
from vlm2rec.pipelines.catalogue.csv_files import open_csv
from vlm2rec.pipelines.catalogue.records import id_as_text, is_missing, read_records

# how pandas, polars and R call a column of row numbers that nobody asked for
_ROW_NUMBERS = re.compile(
    r"(unnamed: \d+(\.\d+)?|(level|__index_level)_\d+(__)?|index|idx|row(_?(id|nr|number|names?))?|)", re.I
)
_FEWEST_ROWS = 10  # with fewer, whole numbers that all differ may well be a dimension
_CONVERT = "save it as Parquet (item_id and a list column) or as .npy with numpy.save"


@dataclass(frozen=True)
class VectorFile:
    """Ids and vectors of one source: row i of every view belongs to `item_ids[i]`."""

    item_ids: list[str]
    views: dict[str, np.ndarray]  # view → (N, d) float32, d of its own
    present: dict[str, np.ndarray]  # view → (N,) bool: the source has a vector, not null
    columns: dict[str, str]  # view → its name in the source
    left_out: tuple[str, ...] = ()  # columns of row numbers


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
    table = _read_columns(path, found, [id_column, *columns.values()])
    ids = _as_ids(table[id_column], f"column {id_column!r} of {path}")
    return _views_of(path, table, ids, columns)


def read_csv(path: Path, id_column: str, column: str | None, view: str) -> VectorFile:
    """Read ids and vectors from a CSV file with a header, plain or gzipped; its separator is found out.

    Args:
        path: The file.
        id_column: Each id once; "007" and "NA" do not change.
        column: Column of lists (`[0.1, 0.2]`) to read as `view`. None takes the columns named fused, text and image,
            or the only column of lists. Without lists, all columns are numbers, and a row is a vector; columns of row
            numbers, such as pandas' `Unnamed: 0`, are left out.
        view: The view that a single column, or a row of numbers, holds.

    Raises:
        DataError: no such file or column, lines with too many or too few fields, text instead of numbers, a column
            that numbers the rows without saying so, or an incomplete vector.
    """
    table = _csv_table(path, id_column, column)
    ids = _as_ids(table[id_column], f"column {id_column!r} of {path}")
    others = [name for name in table.column_names if name != id_column]
    texts = [name for name in others if pa.types.is_string(table[name].type)]
    if not texts:
        numbers = [name for name in others if _ROW_NUMBERS.fullmatch(name)]
        if len(numbers) == len(others):
            numbers = []
        dimensions = table.select([name for name in others if name not in numbers])
        _refuse_row_numbers(dimensions, path)
        vectors, present = _matrix(_rows(dimensions, ids, path), ids, str(path))
        return VectorFile(ids, {view: vectors}, {view: present}, {view: path.name}, tuple(numbers))
    lists = pa.table({name: _parsed(table[name], ids, f"column {name!r} of {path}") for name in texts})
    columns = _vector_columns(path, lists.schema, id_column, column, view)
    return _views_of(path, lists, ids, columns)


def _refuse_row_numbers(table: pa.Table, path: Path) -> None:
    """Raise if one column holds whole numbers that all differ, and the others fractions, or it counts the rows."""
    whole = [name for name in table.column_names if pa.types.is_integer(table[name].type)]
    for name in whole if table.num_rows >= _FEWEST_ROWS else []:
        values = np.sort(table[name].drop_null().to_numpy())
        counting = len(values) == table.num_rows and values[0] in (0, 1) and values[-1] - values[0] == len(values) - 1
        if len(np.unique(values)) == table.num_rows and (counting or len(whole) < table.num_columns):
            raise DataError(
                f"column {name!r} of {path} holds a whole number of its own in every row, {values[0]} to {values[-1]},"
                " as row numbers do",
                "dimensions of the vectors in all columns but the ids",
                "if it numbers the rows, leave it out of the file or call it index; if it is a dimension, write"
                " its values with a decimal point, or save a Parquet file with one column of lists",
            )


def read_jsonl(path: Path, id_column: str, column: str | None, view: str) -> VectorFile:
    """Read ids and vectors from JSON lines such as `{"item_id": "a", "embedding": [0.1, 0.2]}`, plain or gzipped.

    Args:
        path: The file.
        id_column: Key of the ids, each once.
        column: Key of lists to read as `view`; None as for `read_parquet`.
        view: The view that a single list holds.

    Raises:
        DataError: no such file or key, a line that is no object, lists that hold anything but numbers.
    """
    _require_file(path)
    ids: list[str | None] = []
    lists: dict[str, list[np.ndarray | None]] = {}
    keys: dict[str, None] = {}
    for number, (line, record) in enumerate(read_records(path, "JSON lines")):
        keys |= dict.fromkeys(record)
        ids.append(id_as_text(record.get(id_column), path, line))
        for key, value in record.items():
            if isinstance(value, list) and key != id_column and column in (None, key):
                found = lists.setdefault(key, [])
                found += [None] * (number - len(found))
                found.append(_numbers(value, f"line {line:,} of {path} holds", key))
            elif key == column and not is_missing(value):
                raise _no_vector(f"line {line:,} of {path} holds", key, value)
    if not ids:
        raise DataError(f"{path} holds no record", "one object per line", "check the file")
    _require_column(path, id_column, list(keys), "--item-id-column")
    if column is not None:
        _require_column(path, column, list(keys), "--column")
    where = f"key {id_column!r} of {path}"
    texts = _as_ids(pa.array(ids, pa.string()), where)
    arrays = {
        key: pa.array([*found, *[None] * (len(ids) - len(found))], pa.list_(pa.float32()))
        for key, found in lists.items()
    }
    table = pa.table(arrays)
    return _views_of(path, table, texts, _vector_columns(path, table.schema, id_column, column, view))


def _numbers(values: list[Any], where: str, key: str) -> np.ndarray:
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise _no_vector(where, key, values)
    try:
        return _float32(np.array(values, np.float64))
    except OverflowError:  # a whole number of hundreds of digits
        raise _no_vector(where, key, values) from None


def _no_vector(where: str, key: str, value: Any) -> DataError:
    text = str(value)
    return DataError(
        f"{where} {text if len(text) <= 40 else text[:40] + '…'} as {key!r}",
        "a list of numbers, or null for an item without a vector",
        "name the key of the vectors with --column, or correct the line",
    )


def read_itememb(path: Path, id_column: str, column: str | None, view: str) -> VectorFile:
    """Read ids and vectors from one of RecBole's atomic files: tabs, a header such as `iid:token  emb:float_seq`.

    Args:
        path: The file.
        id_column: Name of the ids' field without its type; another field of tokens is taken if it is the only one.
        column: Name of the vectors' field without its type; None takes the only one of numbers.
        view: The view of the vectors.

    Raises:
        DataError: no such file, a header without types, no field that fits, or text instead of numbers.
    """
    _require_file(path)
    table = _text_table(path, ())
    types = {name.rpartition(":")[0]: name.rpartition(":")[2] for name in table.column_names}
    tokens = [name for name, kind in types.items() if kind == "token"]
    vectors = [name for name, kind in types.items() if kind == "float_seq"]
    if id_column not in tokens and len(tokens) == 1:
        id_column = tokens[0]
    if column is None and len(vectors) == 1:
        column = vectors[0]
    if id_column not in tokens or column is None or column not in vectors:
        raise DataError(
            f"the header of {path} is {', '.join(map(repr, table.column_names))}",
            f"one field of type token{'' if tokens else ', such as iid:token'}, and one of type float_seq with the"
            " vectors",
            "choose the fields with --item-id-column and --column",
        )
    ids = _as_ids(table[f"{id_column}:token"], f"field {id_column!r} of {path}")
    values: list[np.ndarray | None] = []
    for item_id, text in zip(ids, table[f"{column}:float_seq"].to_pylist(), strict=True):
        try:
            values.append(None if text is None else _float32(np.array(text.split(), np.float64)))
        except ValueError:
            raise _no_vector(f"item {item_id!r} of {path} has", column, text) from None
    name = f"{column}:float_seq"
    return _views_of(path, pa.table({name: pa.array(values, pa.list_(pa.float32()))}), ids, {view: name})


def _views_of(path: Path, table: pa.Table, ids: list[str], columns: dict[str, str]) -> VectorFile:
    read = {name: _matrix(table[source], ids, f"column {source!r} of {path}") for name, source in columns.items()}
    views = {name: vectors for name, (vectors, _) in read.items()}
    return VectorFile(ids, views, {name: present for name, (_, present) in read.items()}, columns)


def _csv_table(path: Path, id_column: str, column: str | None) -> pa.Table:
    _require_file(path)
    table = _text_table(path, [name for name in (id_column, column) if name], guess=True)
    _require_column(path, id_column, table.column_names, "--item-id-column")
    if column is None:
        return table
    _require_column(path, column, table.column_names, "--column")
    return table.select([id_column, column])


def _text_table(path: Path, as_text: Sequence[str], *, guess: bool = False) -> pa.Table:
    """Read a CSV file: the columns `as_text` as text, the others as numbers if they `guess` so, else as text too."""
    with tempfile.TemporaryDirectory(prefix="vlm2rec-") as scratch:
        form = open_csv(path, Path(scratch), as_text)
        if not form.records:
            raise DataError(f"{path} has a header and no vectors", "one line for each item", "check the file")
        texts = as_text if guess else form.columns
        try:
            table = pyarrow.csv.read_csv(
                form.path,
                read_options=pyarrow.csv.ReadOptions(column_names=form.columns, skip_rows=form.first_lines),
                parse_options=pyarrow.csv.ParseOptions(delimiter=form.separator, newlines_in_values=True),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types=dict.fromkeys(texts, pa.string()),
                    null_values=[""],
                    strings_can_be_null=True,
                    quoted_strings_can_be_null=False,
                ),
            )
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path} cannot be read as CSV ({error})",
                "UTF-8 with a header, and as many values in every row",
                _CONVERT,
            ) from None
    if table.num_rows != form.records:
        raise DataError(
            f"{path} has {form.records:,} lines, of which {table.num_rows:,} were read", "every line once", _CONVERT
        )
    return table


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


ID_FILES = (".npy", ".txt", ".json", ".parquet")


def read_ids(path: Path, id_column: str, flag: str = "--ids") -> list[str]:
    """Read ids in order: .npy of strings or whole numbers, .txt with one per line, .json, or a column in Parquet.

    `flag` names the file in messages.

    Raises:
        DataError: no such file, ids that are null or occur twice.
        ConfigError: another kind of file.
    """
    if path.suffix == ".parquet":
        found = _parquet_schema(path)
        _require_column(path, id_column, found.names, "--item-id-column")
        return _as_ids(_read_columns(path, found, [id_column])[id_column], f"column {id_column!r} of {path}")
    if path.suffix == ".npy":
        values = _load_npy(path)
        if values.ndim != 1 or values.dtype.kind not in "Uiu":
            raise DataError(
                f"{path} holds {values.dtype} of shape {values.shape}", "a list of strings or whole numbers", _CONVERT
            )
        try:
            listed = pa.array(values.tolist())
        except (ValueError, SystemError) as error:  # numbers that are no characters, or half of one
            raise DataError(f"the ids in {path} are not text ({error})", "strings or whole numbers", _CONVERT) from None
        return _as_ids(listed, str(path))
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
            given = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(given, list):
                raise TypeError(f"it holds a {type(given).__name__}")
            return _as_ids(pa.array(given), str(path)) if given else []
        except (ValueError, TypeError, OverflowError, RecursionError, pa.ArrowException) as error:
            raise DataError(f"{path} is not a list of ids ({error})", 'one list, like ["a", "b"]', _CONVERT) from None
    raise ConfigError(
        f"{flag} {path} ends in {path.suffix!r}", ".npy, .txt, .json or .parquet", "save the ids as one of these"
    )


def require_finite(source: VectorFile, rows: np.ndarray, where: Path) -> None:
    """Raise `DataError` naming the first item among `rows` whose vector holds NaN or infinity."""
    for view, vectors in source.views.items():
        wanted = rows[source.present[view][rows]]
        bad = wanted[~np.isfinite(vectors[wanted]).all(1)]
        if len(bad):
            raise DataError(
                f"{where} holds NaN or infinity in the {view} vectors of {len(bad)} items,"
                f" {'the first are' if len(bad) > 1 else 'the first is'} item"
                f" {', '.join(repr(source.item_ids[int(row)]) for row in bad[:3])}",
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
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error})", "an undamaged Parquet file", _CONVERT) from None


def _read_columns(path: Path, found: pa.Schema, columns: Sequence[str]) -> pa.Table:
    """Read columns of a Parquet file whose schema is known; raise `DataError` if it is damaged behind its schema."""
    for column in columns:
        if found.names.count(column) > 1:
            raise DataError(f"{path} has several columns {column!r}", "one", "rename the others, or leave them out")
    try:
        return pq.read_table(path, columns=list(columns))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
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
        row = int(present[0])
        others = ", ".join(f"item {ids[row]!r} has {int(lengths[row])}" for row in other[:3])
        more = f" ({len(other):,} such items)" if len(other) > 3 else ""
        raise DataError(
            f"{where} holds vectors of different lengths: item {ids[row]!r} has {dim}, {others}{more}"
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
        raise DataError(
            f"the ids in {where} are {kind}", "strings or whole numbers", "convert the ids to strings or whole numbers"
        )
    if values.null_count:
        raise DataError(f"{values.null_count} ids in {where} are null", "an id for every row", "remove these rows")
    try:
        ids = [str(value) for value in values.to_pylist()]
    except UnicodeDecodeError as error:  # Arrow does not check text as it reads it
        raise DataError(f"the ids in {where} are not text ({error})", "text in UTF-8", "write the file again") from None
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
    except Exception as error:  # the header is a piece of Python: a damaged one can raise almost anything
        raise DataError(
            f"{path} cannot be read as .npy ({str(error).splitlines()[0] if str(error) else type(error).__name__})",
            "one array of numbers or strings, written by numpy.save; pickled objects are never loaded",
            "save the plain array",
        ) from None
    if not isinstance(loaded, np.ndarray):
        raise DataError(f"{path} is an archive of several arrays", "one array, written by numpy.save", "save one array")
    return loaded
