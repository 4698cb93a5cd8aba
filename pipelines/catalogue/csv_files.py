"""CSV files as people have them: which lines are records, and what stands in their fields.

A file is surveyed first, block by block. If its quotes are those of RFC 4180 and every record has as many fields as the
header, it is read as it is. Every other file is copied line by line into that form, if each record can be read in one
way only. If not, the file is refused, and the error names the lines. No line is left out, and no open quote swallows
the lines after it.
"""

from __future__ import annotations

import codecs
import re
from collections import Counter, deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
import polars as pl

from vlm2rec.embedder.contract.errors import DataError
from vlm2rec.pipelines.catalogue.parts import refuse_bomb
from vlm2rec.pipelines.catalogue.records import encoding_error, open_text

_BOM = codecs.BOM_UTF8
_SEPARATORS = ",\t;|"
_BLOCK_BYTES = 8 << 20
_LONGEST_HEADER = 1 << 20
_LONGEST_RECORD = 16 << 20
_LINES_OF_A_FIELD = 10_000
_EXAMPLES = 3
_SHOWN = 100
_QUOTE, _BACKSLASH, _NEWLINE, _RETURN = b'"\\\n\r'


@dataclass(frozen=True)
class CsvTable:
    """A CSV file in the form of RFC 4180."""

    source: Path
    """What was given."""
    path: Path
    """The file itself, or its copy."""
    columns: list[str]
    separator: str
    first_lines: int
    """Lines of `path` before the first record."""
    records: int
    left_out: dict[str, int]
    """What holds no record, such as empty lines, and how many lines it fills."""

    def scan(self) -> pl.LazyFrame:
        """Return the records, every column as text; an empty field is null, a quoted one is an empty text."""
        if not self.records:
            return pl.LazyFrame(schema=dict.fromkeys(self.columns, pl.String))
        return pl.scan_csv(
            self.path,
            has_header=False,
            skip_lines=self.first_lines,
            separator=self.separator,
            schema=dict.fromkeys(self.columns, pl.String),
        )


def open_csv(path: Path, scratch: Path, wanted: Collection[str] = ()) -> CsvTable:
    """Find out how a CSV file is written, and check that every line belongs to a record with all its fields.

    Args:
        path: The file, plain or gzipped.
        scratch: Folder for a copy, if one is needed; it must exist as long as the table is read.
        wanted: Columns that the header probably has; they decide between separators.

    Raises:
        DataError: lines that no reading makes a record of, with number and text; a header that is not text.
    """
    plain = _unpacked(path, scratch)
    with plain.open("rb") as file:
        form = _form_of(path, file, wanted)
        survey = _survey(file, form, escapes=False)
        if survey.sound:
            return CsvTable(path, plain, form.unique, form.separator, form.first_lines, survey.records, {})
        # Spark and MySQL write \" where RFC 4180 writes ""
        rule: _Escapes = "none"
        if not survey.fits:
            escaped = _survey(file, form, escapes=True)
            rule = "some lines" if not escaped.sound else "quotes" if escaped.lone_backslashes else "all"
        return _Copy(path, form, rule).write(file, scratch / f"{path.name}.copy")


def csv_columns(path: Path, wanted: Collection[str] = ()) -> list[str]:
    """Return the names in the header, those that occur again with a number."""
    with open_text(path) as file:
        return _form_of(path, file, wanted).unique


def _unpacked(path: Path, scratch: Path) -> Path:
    """Return the file itself, or an unpacked copy of a gzipped one in `scratch`."""
    with path.open("rb") as raw:
        if raw.read(2) != b"\x1f\x8b":
            return path
    target = scratch / f"{path.name}.csv"
    with open_text(path) as file, target.open("wb") as plain:
        while block := file.read(1 << 20):
            plain.write(block)
            refuse_bomb(path, plain.tell())
    return target


# --- the header ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """How a file is written."""

    columns: list[str]
    header: bytes  # its line, without mark and line end
    separator: str
    first_lines: int  # up to the header, and with it
    returns: bool  # lines end in \r alone
    start: int  # the byte of the first record

    @property
    def fields(self) -> int:
        return len(self.columns)

    @property
    def names(self) -> set[bytes]:
        """The columns, as bytes."""
        return {name.encode() for name in self.columns}

    @property
    def unique(self) -> list[str]:
        """The columns, the later ones of one name with a number."""
        names: list[str] = []
        for name in self.columns:
            free = (name, *(f"{name}_duplicated_{number}" for number in range(len(self.columns))))
            names.append(next(candidate for candidate in free if candidate not in names))
        return names


def _form_of(path: Path, file: IO[bytes], wanted: Collection[str]) -> _Form:
    file.seek(0)
    head = file.read(_LONGEST_HEADER)
    first = re.search(rb"\r*\n|\r", head)
    returns = first is not None and first[0] == b"\r"
    ends = re.compile(rb"\r\n|\r|\n" if returns else rb"\n")
    position, number, given = 0, 0, None
    while True:
        end = ends.search(head, position)
        if end is None and len(head) == _LONGEST_HEADER:
            raise DataError(
                f"line {number + 1:,} of {path} is longer than {len(head):,} bytes",
                "a first line with the columns' names",
                "check that it is a table in CSV",
            )
        line = head[position : end.start() if end else None].rstrip(b"\r").removeprefix(_BOM)
        position, number = end.end() if end else len(head), number + 1
        told = re.fullmatch(rb'"?sep=([^\w"])"?', line, re.IGNORECASE) if number == 1 else None  # Excel's own line
        if told:
            given = told[1].decode("latin-1")
        elif line.strip():
            break
        if end is None:
            raise DataError(f"{path} has no header", "a first line with the columns' names", "check the file")
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise encoding_error(path, number, error.start) from None
    sample = re.split(rb"\r\n|\r|\n", head[position : position + (1 << 16)])[:100]
    separator = given or _separator(line, sample, wanted)
    columns = [_value(part) for part in _Fields(separator).of(line)]
    return _Form(columns, line, separator, number, returns, position)


def _separator(header: bytes, sample: Collection[bytes], wanted: Collection[str]) -> str:
    """Return the separator that makes most of the wanted columns, then of the even lines, then of all columns."""

    def merit(separator: str) -> tuple[int, float, int]:
        fields = _Fields(separator)
        names = [_value(part) for part in fields.of(header)]
        even = [len(fields.of(line)) == len(names) for line in sample if line.strip()]
        return len({*names} & {*wanted}), sum(even) / max(1, len(even)) if len(names) > 1 else 0.0, len(names)

    return max(_SEPARATORS, key=merit)


def _value(part: bytes) -> str:
    if _quoted(part):
        part = part[1:-1].replace(b'""', b'"')
    return part.decode("utf-8", "replace")


def _quoted(part: bytes) -> bool:
    return len(part) > 1 and part[:1] == part[-1:] == b'"'


class _Fields:
    """Splits a line into fields, as they are written.

    A field is quoted if a quote begins it and the quote that closes it ends it; in all others quotes are text.
    """

    def __init__(self, separator: str) -> None:
        self.separator = separator.encode("latin-1")
        mark = re.escape(self.separator)
        self._plain = re.compile(rb'("[^"]*+(?:""[^"]*+)*+"(?=%b)|[^%b]*+)%b' % (mark, mark, mark))
        self._escaped = re.compile(
            rb'("[^"\\]*+(?:(?:\\.|"")[^"\\]*+)*+"(?=%b)|(?:\\.|[^%b\\])*+)%b' % (mark, mark, mark), re.DOTALL
        )
        self._strict = re.compile(rb'"[^"]*+(?:""[^"]*+)*+"|[^"]*+', re.DOTALL)
        self._strict_escaped = re.compile(rb'"[^"\\]*+(?:(?:\\.|"")[^"\\]*+)*+"|(?:\\.|[^"\\])*+', re.DOTALL)

    def of(self, line: bytes) -> list[bytes]:
        if b'"' not in line:
            return line.split(self.separator)
        return self._plain.findall(line + self.separator)

    def with_escapes(self, line: bytes) -> list[bytes]:
        """Return the fields if a backslash takes the next character's meaning away; none if the last has no end."""
        parts = self._escaped.findall(line + self.separator)
        return parts if sum(map(len, parts)) + len(parts) == len(line) + 1 else []

    def strict(self, parts: Collection[bytes], *, escapes: bool) -> bool:
        """Return whether quotes stand only around fields, or doubled or escaped in these."""
        rule = self._strict_escaped if escapes else self._strict
        return all(b'"' not in part or rule.fullmatch(part) for part in parts)


# --- the survey of a whole file -----------------------------------------------------------------------------


@dataclass
class _Survey:
    fits: bool = True  # quotes stand where the rules allow them, and every record has all fields
    sound: bool = True  # and nothing in it needs a look at single lines
    records: int = 0
    lone_backslashes: bool = False  # before anything but a quote, a separator or another one


def _survey(file: IO[bytes], form: _Form, *, escapes: bool) -> _Survey:
    """Count the records in blocks, and see whether the file is written by the rules."""
    survey = _Survey(fits=not form.returns and form.fields > 1)
    file.seek(form.start)
    rest = b""
    while survey.fits:
        block = file.read(_BLOCK_BYTES)
        text = rest + block
        if not block and text and not text.endswith(b"\n"):
            text += b"\n"
        used = _count_records(text, form, survey, escapes) if text else 0
        rest = text[used:]
        survey.sound &= not _odd(text, used, form)
        survey.fits &= len(rest) <= _LONGEST_RECORD and (bool(block) or not rest)
        if not block:
            break
    survey.sound &= survey.fits
    return survey


def _odd(text: bytes, used: int, form: _Form) -> bool:
    """Return whether there is a byte-order mark, a NUL, a carriage return within a line, or a header again."""
    return (
        text.find(_BOM, 0, used) >= 0
        or text.find(b"\0", 0, used) >= 0
        or (text.find(b"\r", 0, used) >= 0 and text.count(b"\r", 0, used) != text.count(b"\r\n", 0, used))
        or (text.find(max(form.names, key=len), 0, used) >= 0 and _has_header(text[:used], form))
    )


def _has_header(text: bytes, form: _Form) -> bool:
    """Return whether a line begins as the header does, or as it would with its columns in another order."""
    separator = form.separator.encode("latin-1")
    starts = [form.header, *(mark + name + mark + separator for name in form.names for mark in (b"", b'"'))]
    return any(text.startswith(start) or b"\n" + start in text for start in starts)


def _count_records(text: bytes, form: _Form, survey: _Survey, escapes: bool) -> int:
    """Check the whole records of a block that begins with one; return how many bytes they take."""
    data = np.frombuffer(text, np.uint8)
    separator, fields = ord(form.separator), form.fields
    quotes = np.flatnonzero(data == _QUOTE) if b'"' in text else np.empty(0, np.int64)
    if not len(quotes):
        data = data[: text.rfind(b"\n") + 1]
    marks = np.flatnonzero((data == separator) | (data == _NEWLINE))
    if escapes and b"\\" in text:
        quotes = quotes[~_escaped(data, quotes)]
        pairs = re.findall(rb'\\[\\"\r\n%b]' % re.escape(form.separator.encode("latin-1")), text)
        survey.lone_backslashes |= text.count(b"\\") != len(pairs) + pairs.count(b"\\\\")
    if len(quotes):
        marks = marks[np.searchsorted(quotes, marks) % 2 == 0]
    if escapes:
        marks = marks[~_escaped(data, marks)]
    newline = data[marks] == _NEWLINE
    ends = marks[newline]
    if not len(ends):
        return 0
    used = int(ends[-1]) + 1
    kept = int(np.flatnonzero(newline)[-1]) + 1
    quotes = quotes[: np.searchsorted(quotes, used)]
    records = len(ends)
    lengths = np.diff(ends, prepend=-1) - (data[ends - 1] == _RETURN)
    survey.fits &= (
        kept == records * fields
        and bool(newline[fields - 1 : kept : fields].all())
        and _strict(data, quotes, separator)
    )
    survey.sound &= (
        survey.fits
        and bool((lengths > fields).all())  # a line of separators holds nothing
        and not _may_be_several(data[:used], quotes, ends, separator, fields)
    )
    survey.records += records
    return used


def _escaped(data: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return whether an odd number of backslashes stands before each place."""
    escaped = np.zeros(len(places), bool)
    rows, back = np.arange(len(places)), 1
    while len(rows):
        at = places[rows] - back
        rows = rows[(at >= 0) & (data[at] == _BACKSLASH)]
        escaped[rows] ^= True
        back += 1
    return escaped


def _strict(data: np.ndarray, quotes: np.ndarray, separator: int) -> bool:
    """Return whether every quote opens or closes a field, or is one of two for one in a quoted field."""
    if not len(quotes):
        return True
    opening, closing = quotes[0::2], quotes[1::2]
    before, after = np.where(opening > 0, data[opening - 1], _NEWLINE), data[closing + 1]
    opens = (before == separator) | (before == _NEWLINE)
    closes = (after == separator) | (after == _NEWLINE) | (after == _RETURN)
    doubled = opening[1:] == closing[:-1] + 1
    opens[1:] |= doubled
    closes[:-1] |= doubled
    return bool(opens.all() and closes.all())


def _may_be_several(data: np.ndarray, quotes: np.ndarray, ends: np.ndarray, separator: int, fields: int) -> bool:
    """Return whether all lines of one record of several lines have as many fields as a record."""
    lines = np.flatnonzero(data == _NEWLINE)
    if len(lines) == len(ends):
        return False
    separators = np.flatnonzero(data == separator)
    line = np.searchsorted(lines, separators)
    starts = np.concatenate([[0], lines[:-1] + 1])
    within = (np.searchsorted(quotes, separators) - np.searchsorted(quotes, starts)[line]) % 2 == 1
    literal = np.bincount(line, minlength=len(lines))
    outside = literal - np.bincount(line[within], minlength=len(lines))
    even = (literal == fields - 1) | (outside == fields - 1)
    first = np.concatenate([[0], np.searchsorted(lines, ends)[:-1] + 1])
    several = np.diff(np.append(first, len(lines))) > 1
    return bool((np.logical_and.reduceat(even, first) & several).any())


# --- the copy, line by line ---------------------------------------------------------------------------------

_Line = tuple[int, bytes, bytes]  # its number, its text, its end
_Escapes = Literal["none", "some lines", "quotes", "all"]
"""What a backslash takes the meaning from: nothing, the quotes in some lines, those in all, or every character."""


class _Copy:
    """Writes the records of a file in the form of RFC 4180, and gathers the lines that are none."""

    def __init__(self, path: Path, form: _Form, escapes: _Escapes) -> None:
        self._path, self._form = path, form
        self._escapes = escapes
        self._escaped = escapes in ("quotes", "all")
        self._fields = _Fields(form.separator)
        self._comma = self._fields.separator
        self._names = form.names
        self._longest = max(form.names, key=len)
        self._waiting: deque[_Line] = deque()
        self._lines: Iterator[_Line] = iter(())
        self._bad: list[tuple[int, bytes, str]] = []
        self._bad_lines = self._good = self._one_more = 0
        self._left_out: Counter[str] = Counter()

    def write(self, file: IO[bytes], target: Path) -> CsvTable:
        self._lines = self._numbered(file)
        with target.open("wb") as out:
            while (line := self._next()) is not None:
                if self._is_plain(line[1]):
                    out.write(line[1] + b"\n")
                    self._good += 1
                    continue
                for parts in self._records(line):
                    out.write(self._comma.join(map(self._written, parts)) + b"\n")
                    self._good += 1
        if self._bad_lines:
            raise self._refusal()
        form = self._form
        return CsvTable(self._path, target, form.unique, form.separator, 0, self._good, dict(self._left_out))

    def _is_plain(self, line: bytes) -> bool:
        """Return whether nothing in a line needs a closer look: most lines of a file with a few odd ones."""
        return (
            line.count(self._comma) == self._form.fields - 1
            and len(line) >= self._form.fields
            and b'"' not in line
            and b"\r" not in line
            and b"\0" not in line
            and not (self._escaped and b"\\" in line)
            and not line.startswith(_BOM)
            and self._longest not in line
            and not line.isspace()
        )

    def _next(self) -> _Line | None:
        return self._waiting.popleft() if self._waiting else next(self._lines, None)

    def _numbered(self, file: IO[bytes]) -> Iterator[_Line]:
        file.seek(self._form.start)
        for number, (line, end) in enumerate(_split(file, self._form.returns), self._form.first_lines + 1):
            if len(line) > _LONGEST_RECORD:
                raise DataError(
                    f"line {number:,} of {self._path} is longer than {_LONGEST_RECORD >> 20} MB: {_shown(line)}",
                    "lines with one record each",
                    "check how the file was made",
                )
            if not line.isascii():
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise encoding_error(self._path, number, error.start) from None
            yield number, line, end

    def _records(self, numbered: _Line) -> list[list[bytes]]:
        """Return the records that begin in this line, at most one unless carriage returns stand in it."""
        number, line, end = numbered
        if line.startswith(_BOM):  # files with a mark, one after the other
            line = line.removeprefix(_BOM)
            numbered = number, line, end
        if not line.strip(self._comma) or (self._comma not in line and not line.strip()):
            self._left_out["empty lines"] += 1
        elif line == self._form.header:
            self._left_out["repeated headers"] += 1
        elif b"\0" in line:
            self._refuse(numbered, "holds a NUL byte")
        elif (parts := self._record(numbered)) is not None:
            if len(self._names) > 1 and self._names == {part.strip(b'"') for part in parts}:
                self._refuse(numbered, "holds the header's names in another order")
            else:
                return [parts]
        elif b"\r" in line and all(len(self._fields.of(piece)) == self._form.fields for piece in line.split(b"\r")):
            return [self._fields.of(piece) for piece in line.split(b"\r")]
        else:
            count = len(self._fields.of(line))
            self._one_more += count == self._form.fields + 1
            fields = f"has {count} field{'s' * (count != 1)}"
            self._refuse(numbered, f"{fields} and an open quote" if self._opens(self._fields.of(line)) else fields)
        return []

    def _record(self, numbered: _Line) -> list[bytes] | None:
        """Return the fields of the record that begins in this line, ready to be written, or None."""
        line, size = numbered[1], self._form.fields
        if self._escaped:
            parts = self._fields.with_escapes(line)
            if len(parts) == size and self._fields.strict(parts, escapes=True):
                return [self._unescaped(part) for part in parts]
            return self._of_lines(numbered, escapes=True)
        parts = self._fields.of(line)
        if len(parts) == size and (b'"' not in line or self._fields.strict(parts, escapes=False)):
            return parts
        if b'"' not in line:
            return None
        if self._escapes == "some lines" and b'\\"' in line:
            escaped = self._fields.with_escapes(line)
            if len(escaped) == size and self._fields.strict(escaped, escapes=True):
                return [self._unescaped(part) for part in escaped]
        several = self._of_lines(numbered, escapes=False) if self._opens(parts) else None
        if several is not None:
            return several
        return parts if len(parts) == size else None

    def _opens(self, parts: Collection[bytes]) -> bool:
        """Return whether a quote begins a field and no quote after it ends one."""
        return any(part[:1] == b'"' and b'"' not in part[1:].replace(b'""', b"") for part in parts)

    def _of_lines(self, numbered: _Line, *, escapes: bool) -> list[bytes] | None:
        """Return the fields of a record with line breaks in quoted fields, or None if there is none.

        The lines after the first are taken from the source only for a record. One whose lines would all be
        records by themselves is refused: a quote that was never closed looks the same.
        """
        size = self._form.fields
        taken, parts = [numbered], []
        text = bytearray(numbered[1])
        place = 0
        while place <= len(text):
            stop = None
            if text[place : place + 1] == b'"':
                stop = self._closing(text, place + 1, taken, escapes)
            if stop is None:
                stop = text.find(self._comma, place)
                stop = len(text) if stop < 0 else stop
                if text[place : place + 1] == b'"' and self._opens([bytes(text[place:stop])]):
                    break
            parts.append(bytes(text[place:stop]))
            place = stop + 1
        fits = place > len(text) and len(parts) == size and len(taken) > 1
        if fits and all(size in (len(self._fields.of(line)), line.count(self._comma) + 1) for _, line, _ in taken):
            last = taken[-1][0]
            self._refuse(numbered, f"opens a quote that line {last:,} closes, and all lines between look like records")
            return None
        if fits:
            return [self._unescaped(part) for part in parts] if escapes else parts
        self._waiting.extendleft(reversed(taken[1:]))
        return None

    def _closing(self, text: bytearray, start: int, taken: list[_Line], escapes: bool) -> int | None:
        """Return where the quoted field ends whose text begins at `start`, with more lines if it needs them."""
        place, lines = start, len(taken)
        wanted = re.compile(rb'\\.|"' if escapes else rb'"', re.DOTALL)
        while True:
            found = wanted.search(text, place)
            if found is None:
                line = None
                if len(text) <= _LONGEST_RECORD and len(taken) <= _LINES_OF_A_FIELD:
                    line = self._next()
                if line is None:
                    break
                place = len(text)
                text += taken[-1][2] + line[1]
                taken.append(line)
            elif found[0] != b'"':
                place = found.end()
            elif text[found.end() : found.end() + 1] == b'"':
                place = found.end() + 1
            elif found.end() == len(text) or text[found.end() : found.end() + 1] == self._comma:
                return found.end()
            else:
                break
        # not a quoted field: the lines go back
        while len(taken) > lines:
            line = taken.pop()
            del text[len(text) - len(line[1]) - len(taken[-1][2]) :]
            self._waiting.appendleft(line)
        return None

    def _unescaped(self, part: bytes) -> bytes:
        inner = part[1:-1].replace(b'""', b'"') if _quoted(part) else part
        text = re.sub(rb"\\(.)" if self._escapes == "all" else rb'\\(")', rb"\1", inner, flags=re.DOTALL)
        return b'"' + text.replace(b'"', b'""') + b'"' if text or _quoted(part) else text

    def _written(self, part: bytes) -> bytes:
        if b'"' not in part and b"\r" not in part:
            return part
        plain = _quoted(part) and self._fields.strict([part], escapes=False)
        return part if plain else b'"' + part.replace(b'"', b'""') + b'"'

    def _refuse(self, line: _Line, why: str) -> None:
        self._bad_lines += 1
        if len(self._bad) < _EXAMPLES:
            self._bad.append((line[0], line[1], why))

    def _refusal(self) -> DataError:
        header = f"the header has {self._form.fields}"
        told = [(f"line {number:,} ", f"{why}: {_shown(line)}") for number, line, why in self._bad]
        found = f"of {self._path} ".join(told[0]) + "".join(f"; {''.join(other)}" for other in told[1:])
        more = f" ({self._bad_lines:,} such lines)" if self._bad_lines > 1 else ""
        fix = "correct these lines, or write the table as Parquet or JSON lines"
        if self._one_more == self._bad_lines and not self._good:
            fix = "give the first column a name in the header, which row names (as R writes them) have not"
        return DataError(
            f"{found}{more}; {header}",
            f"in every line, as many fields as columns, separated by {self._form.separator!r}; a field with a"
            ' separator, a quote or a line break stands in quotes, and a quote in it is doubled ("")',
            fix,
        )


def _split(file: IO[bytes], returns: bool) -> Iterator[tuple[bytes, bytes]]:
    """Yield (line, its end): lines end in \n or \r\n, or also in \r alone. A line without end comes in pieces."""
    if not returns:
        while raw := file.readline(_LONGEST_RECORD + 3):
            line = raw.rstrip(b"\r\n")
            yield line, raw[len(line) :]
        return
    rest = b""
    while block := file.read(_BLOCK_BYTES):
        block += file.read(1) if block.endswith(b"\r") else b""
        *pieces, rest = re.split(rb"(\r\n|\r|\n)", rest + block)
        yield from zip(pieces[0::2], pieces[1::2], strict=True)
        if len(rest) > _LONGEST_RECORD:
            break
    if rest:
        yield rest, b""


def _shown(line: bytes) -> str:
    text = line.decode("utf-8", "replace")
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")
