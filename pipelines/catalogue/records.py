"""Files of records: Parquet, CSV, JSON lines and Python literals, plain or compressed, block by block."""

from __future__ import annotations

import ast
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

Kind = Literal["Parquet", "CSV", "JSON lines", "Python literal lines"]
_BLOCK_BYTES = 32 << 20
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
    """Return the kind of a file, from its first bytes."""
    if not path.is_file():
        raise DataError(
            f"{path} is {'a folder' if path.is_dir() else 'missing'}",
            "a Parquet, CSV or JSON-lines file",
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
        text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
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
        line = next(line for line in file if line.removeprefix(b"\xef\xbb\xbf").strip())
    line = line.removeprefix(b"\xef\xbb\xbf")
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
    """Yield (number of the first line counted from 1, a block of whole lines)."""
    with open_text(path) as file:
        number, rest = 1, b""
        first = file.read(3)
        rest = b"" if first == b"\xef\xbb\xbf" else first
        while block := file.read(_BLOCK_BYTES):
            lines, newline, rest = (rest + block).rpartition(b"\n")
            if newline:
                yield number, lines + newline
                number += lines.count(b"\n") + 1
        if rest.strip():
            yield number, rest


def read_records(path: Path, kind: Kind) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number counted from 1, record)."""
    for number, lines in line_blocks(path):
        yield from parse_lines(path, kind, number, lines)


def parse_lines(path: Path, kind: Kind, number: int, lines: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, record) of a block of lines; `number` is that of its first line."""
    for row, line in enumerate(lines.split(b"\n"), number):
        if not line.strip():
            continue
        try:
            record = json.loads(line) if kind == "JSON lines" else _literal(line)
        except UnicodeDecodeError as error:
            raise encoding_error(path, row, error.start) from None
        except (ValueError, RecursionError) as error:
            raise _broken_row(path, row, str(error)) from None
        if not isinstance(record, dict):
            raise _broken_row(path, row, "not an object")
        yield row, record


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
    for _, record in read_records(path, kind):
        for key, value in record.items():
            kinds = seen.setdefault(key, set())
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
        return value
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
        return str(value)
    raise DataError(
        f"line {row:,} of {path} has {value!r} where a time belongs", "a number or a date as text", "correct the row"
    )


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


def _broken_row(path: Path, row: int, why: str) -> DataError:
    return DataError(
        f"line {row:,} of {path} is not an object: {why}", "one JSON object per line", "correct or remove the line"
    )
