"""Files of records: Parquet, CSV, JSON lines and Python literals, plain or compressed, block by block."""

from __future__ import annotations

import ast
import codecs
import gzip
import json
import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import polars as pl

from vlm2rec.embedder.contract.errors import DataError, did_you_mean
from vlm2rec.pipelines import console
from vlm2rec.pipelines.catalogue.parts import parts_of, refuse_bomb

Kind = Literal["Parquet", "CSV", "JSON lines", "Python literal lines"]
_BOM = codecs.BOM_UTF8
_BLOCK_BYTES = 32 << 20
_LONGEST_LINE = 16 << 20
_LONGEST_LITERAL = 1 << 20
_RECORDS_PER_FRAME = 20_000
LARGEST_EXACT_FLOAT = 2.0**53
# the first bytes of what is not read, its name, and what decompresses it
_ARCHIVES = {
    b"PK\x03\x04": ("zip", "unzip"),
    b"BZh": ("bzip2", "bunzip2 --keep"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", "unzstd"),
    b"\xfd7zX": ("xz", "unxz --keep"),
    b"7z\xbc\xaf": ("7-Zip", "7z x"),
}


def kind_of(path: Path) -> Kind:
    """Return the kind of a file, or of all parts in a folder, from their first bytes."""
    if path.is_dir():
        kinds: dict[Kind, Path] = {}
        for part in parts_of(path):
            kinds.setdefault(kind_of(part), part)
        if len(kinds) > 1:
            found = " and ".join(f"{part.name} ({kind})" for kind, part in kinds.items())
            raise DataError(f"{path} holds {found}", "parts of one kind", "give a folder that holds one table")
        return next(iter(kinds))
    if not path.is_file():
        raise DataError(
            f"{path} is {'no regular file' if path.exists() else 'missing'}",
            "a Parquet, CSV or JSON-lines file, or a folder of such parts",
            "correct the path",
        )
    try:
        with path.open("rb") as raw:
            magic = raw.read(4)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror})", "a readable file", "check its permissions"
        ) from None
    if magic == b"PAR1":
        return "Parquet"
    for first, (what, command) in _ARCHIVES.items():
        if magic.startswith(first):
            raise DataError(
                f"{path} is compressed with {what}",
                "a Parquet, CSV or JSON-lines file, plain or compressed with gzip",
                f"decompress it, for example with `{command} {path.name}`",
            )
    with open_text(path) as file:
        head = file.read(1 << 16)
        text = head.removeprefix(_BOM).lstrip()
        if not text:
            raise DataError(f"{path} is empty", "a file with rows", "check how it was made")
        if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head:
            raise encoding_error(path, 1, head.find(b"\0") if b"\0" in head else 0, "UTF-16 or not text")
        if text[:1] == b"[":
            raise DataError(
                f"{path} begins with '[': it holds one JSON array",
                "JSON lines, one object per line",
                f"rewrite it, for example with `jq -c '.[]' {path.name}`",
            )
        if text[:1] != b"{":
            return "CSV"
        file.seek(0)
        while not (line := file.readline(_LONGEST_LINE)).removeprefix(_BOM).strip():
            pass
    if len(line) == _LONGEST_LINE:
        raise _long_line(path, 1)
    line = line.removeprefix(_BOM)
    try:
        json.loads(line)
    except UnicodeDecodeError:
        return "JSON lines"  # the reader names the row
    except ValueError:
        return "Python literal lines" if isinstance(_literal(line), dict) else "JSON lines"
    return "JSON lines"


@contextmanager
def open_text(path: Path) -> Iterator[IO[bytes]]:
    """Open a text file to read bytes; gzip is unpacked."""
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            yield file  # type: ignore[misc]
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path} cannot be unpacked ({str(error).rstrip('.')})", "a complete gzip file", "download it again"
        ) from None


def line_blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number of the first line counted from 1, a block of whole lines) of a file.

    Raises:
        DataError: a line of more than 16 MB, or a file that unpacks to far more than its size.
    """
    with open_text(path) as file:
        number, rest, unpacked = 1, b"", 0
        while block := file.read(_BLOCK_BYTES):
            unpacked += len(block)
            lines, newline, rest = (rest + block).rpartition(b"\n")
            if newline:
                yield number, lines + newline
                number += lines.count(b"\n") + 1
            if len(rest) > _LONGEST_LINE:
                raise _long_line(path, number)
            refuse_bomb(path, unpacked)
        if rest.strip():
            yield number, rest


def read_records(path: Path, kind: Kind) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number counted from 1, record) of a file, or of all parts in a folder, one after the other."""
    for part in parts_of(path):
        for number, lines in line_blocks(part):
            yield from parse_lines(part, kind, number, lines)


def parse_lines(path: Path, kind: Kind, number: int, lines: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, record) of a block of lines; `number` is that of its first line."""
    for row, line in enumerate(lines.split(b"\n"), number):
        line = line.removeprefix(_BOM)  # files with a mark, one after the other
        if not line.strip():
            continue
        if len(line) > (_LONGEST_LINE if kind == "JSON lines" else _LONGEST_LITERAL):
            raise _long_line(path, row)
        try:
            record = json.loads(line, object_pairs_hook=_object) if kind == "JSON lines" else _literal(line)
        except UnicodeDecodeError as error:
            raise encoding_error(path, row, error.start) from None
        except (ValueError, RecursionError) as error:
            raise _broken_row(path, row, str(error), line) from None
        if not isinstance(record, dict):
            raise _broken_row(path, row, "not an object", line)
        if isinstance(record, _Twice):
            raise _broken_row(path, row, f"it has the key {record.key!r} twice", line)
        yield row, record


class _Twice(dict[str, Any]):
    """An object in which a key occurs twice."""

    key: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) == len(pairs):
        return record
    names = [name for name, _ in pairs]
    twice = _Twice(record)
    twice.key = next(name for name in names if names.count(name) > 1)
    return twice


def _literal(line: bytes) -> Any:
    """Return the Python literal on a line, or None if it is not one; names and calls are never run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as "\d" in a description
            return ast.literal_eval(line.decode("utf-8").strip())
    except UnicodeDecodeError:
        raise
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None


def record_schema(path: Path, kind: Kind) -> dict[str, Any]:
    """Return a Polars type for every key that occurs: a plain type if all values have it, else text."""
    seen: dict[str, set[str]] = {}
    for row, record in read_records(path, kind):
        for key, value in record.items():
            kinds = seen[key] if key in seen else seen.setdefault(_whole_text(key, path, row), set())
            if value is not None:
                kinds.add("nan" if is_missing(value) else _value_kind(value))
    types: dict[frozenset[str], Any] = {
        frozenset({"int"}): pl.Int64,
        frozenset({"float"}): pl.Float64,
        frozenset({"int", "float"}): pl.Float64,
        frozenset({"bool"}): pl.Boolean,
        frozenset({"texts"}): pl.List(pl.String),
    }

    def type_of(kinds: set[str]) -> Any:
        if kinds <= {"int", "float", "nan"} and "nan" in kinds:
            return pl.Float64
        return types.get(frozenset(kinds - {"nan"}), pl.String)

    return {key: type_of(kinds) for key, kinds in seen.items()}


def is_missing(value: Any) -> bool:
    """Tell whether a value stands for nothing: None, or NaN, which pandas writes in its place."""
    return value is None or (isinstance(value, float) and value != value)


def _value_kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if -(2**63) <= value < 2**63 else "other"
    if isinstance(value, float):
        return "float"
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "texts"
    return "other"


def cast_value(value: Any, dtype: Any) -> Any:
    """Return a value for a column of this type: in a column of text, other values become JSON, and NaN is nothing."""
    if is_missing(value):
        return value if dtype == pl.Float64 else None
    if dtype != pl.String or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def id_as_text(value: Any, path: Path, row: int) -> str | None:
    """Return an id as text, None for NaN, or raise `DataError` if it cannot be one."""
    if is_missing(value):
        return None
    if isinstance(value, str):
        return _whole_text(value, path, row)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer() and abs(value) <= LARGEST_EXACT_FLOAT:
        return str(int(value))
    raise DataError(
        f"line {row:,} of {path} has {value!r} where an id belongs", "text or a whole number", "store the ids as text"
    )


def time_as_text(value: Any, path: Path, row: int) -> str | None:
    """Return a time as text, None for NaN and infinity, or raise `DataError` if it cannot be one."""
    if is_missing(value) or value in (math.inf, -math.inf):
        return None
    if isinstance(value, float) and abs(value) <= LARGEST_EXACT_FLOAT:
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return _whole_text(str(value), path, row)
    raise DataError(
        f"line {row:,} of {path} has {value!r} where a time belongs", "a number or a date as text", "correct the row"
    )


def _whole_text(text: str, path: Path, row: int) -> str:
    """Return text, or raise `DataError` if it holds half of a surrogate pair, as an emoji cut in two leaves it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"line {row:,} of {path} holds an unpaired surrogate, which is half of a character: {text!r}",
            "valid Unicode in ids and times",
            "correct the line",
        ) from None
    return text


def build_frame(
    path: Path, kind: Kind, schema: Mapping[str, Any], clean: Callable[[int, Mapping[str, Any]], dict[str, Any]]
) -> pl.DataFrame:
    """Return the cleaned records as one frame, built in blocks, so that few Python objects exist at a time."""
    records = (clean(row, record) for row, record in read_records(path, kind))
    frames = [pl.DataFrame(schema=schema)]
    with console.progress(f"reading {path.name}", None) as advance:
        while block := list(islice(records, _RECORDS_PER_FRAME)):
            columns = {name: [record.get(name) for record in block] for name in schema}
            try:
                frames.append(pl.DataFrame(columns, schema=schema, strict=False))
            except UnicodeEncodeError:  # "\ud800" alone is valid JSON but not a character
                columns = {name: [_encodable(value) for value in values] for name, values in columns.items()}
                frames.append(pl.DataFrame(columns, schema=schema, strict=False))
            advance(len(block))
    return pl.concat(frames, rechunk=True)


def _encodable(value: Any) -> Any:
    if isinstance(value, list):
        return [_encodable(part) for part in value]
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value


def require_columns(path: Path, columns: list[str], wanted: Mapping[str, str]) -> None:
    """Raise `DataError` naming the first needed column that a file lacks, and the flag that chooses another."""
    for column, flag in wanted.items():
        if column not in columns:
            shown = ", ".join(columns[:20]) + (" …" if len(columns) > 20 else "")
            raise DataError(
                f"{path} has no column {column!r}{did_you_mean(column, columns)}; its columns are {shown}",
                f"the columns {', '.join(wanted)}",
                f"rename the column, or name yours with {flag}",
            )


def encoding_error(path: Path, row: int, byte: int, what: str = "not UTF-8") -> DataError:
    """Return the error of a line that is not text, with the byte's position."""
    return DataError(
        f"{path} is {what}: line {row:,}, byte {byte + 1:,} of that line",
        "text in UTF-8",
        f"convert it, for example with `iconv -f LATIN1 -t UTF-8 {path.name}` (or -f UTF-16)",
    )


def _broken_row(path: Path, row: int, why: str, line: bytes) -> DataError:
    text = line[:400].decode("utf-8", "replace")
    return DataError(
        f"line {row:,} of {path} is not an object: {why}; it reads {(text[:100] + '…' if len(text) > 100 else text)!r}",
        "one JSON object per line",
        "correct or remove the line",
    )


def _long_line(path: Path, row: int) -> DataError:
    return DataError(
        f"line {row:,} of {path} is longer than a record can be ({_LONGEST_LINE >> 20} MB,"
        f" {_LONGEST_LITERAL >> 20} MB for a Python literal)",
        "lines with one record each",
        "check where the file comes from, or write its records one per line",
    )
