"""Readers of items and interactions in the usual file formats.

Items and interactions come from Parquet, CSV (any of `,` `;` tab `|`), JSON lines, or the Amazon Reviews files as
published (2014: metadata as Python literals and 5-core reviews; 2023: metadata and reviews as JSON lines); text files
may be gzipped. The bytes and columns of a file decide its format, not its name. Ids are always strings.
Nothing is downloaded, and no code in a file is run.
"""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl

from vlm2rec.embedder.contract.errors import DataError
from vlm2rec.embedder.contract.schema import ITEM_ID, TITLE, USER_ID
from vlm2rec.pipelines.catalogue.records import (
    Kind,
    build_frame,
    cast_value,
    csv_header,
    encoding_error,
    id_as_text,
    kind_of,
    line_blocks,
    open_text,
    parse_lines,
    read_records,
    record_schema,
    require_columns,
    unpack_csv,
)

TIME = "time"
ROW = "row"

_AMAZON_YEARS = {"asin": 2014, "parent_asin": 2023}
_AMAZON_TIMES = {"asin": "unixReviewTime", "parent_asin": "timestamp"}
_AMAZON_USERS = {"asin": "reviewerID", "parent_asin": "user_id"}
_LARGEST_EXACT_FLOAT = 2.0**53
_TIME_FORMATS = (
    "%Y-%m-%d",
    "%Y-%m-%d %H:%M:%S%.f",
    "%Y-%m-%d %H:%M",
    "%Y-%m-%dT%H:%M:%S%.f",
    "%Y-%m-%dT%H:%M:%S%.fZ",
    "%+",
)


@dataclass(frozen=True)
class ColumnNames:
    """The names of the columns in the input files."""

    item_id: str = "item_id"
    title: str = "title"
    user_id: str = "user_id"
    time: str = "timestamp"


@dataclass(frozen=True)
class Items:
    """The catalogue: item_id and title (strings, title may be null), then the file's other columns."""

    frame: pl.DataFrame
    format: str


@dataclass(frozen=True)
class Interactions:
    """The interactions, as a lazy frame in the file's order: user_id, item_id (strings), time (a number)."""

    frame: pl.LazyFrame
    format: str
    rows: int


# --- items --------------------------------------------------------------------------------------------------


def read_items(path: Path, names: ColumnNames | None = None) -> Items:
    """Read a catalogue.

    Amazon metadata is recognised by its id column (`asin` or `parent_asin`, if there is no `item_id`) and
    reduced to title, categories, brand or store, description, price and the image's URL; HTML entities are resolved.

    Raises:
        DataError: missing or empty file, wrong encoding, broken row, missing column, missing or duplicate id.
    """
    names = names or ColumnNames()
    kind = kind_of(path)
    if kind in ("JSON lines", "Python literal lines"):
        frame, label = _items_from_records(path, kind, names)
    else:
        frame, label = _items_from_table(path, kind, names)
    if frame.is_empty():
        raise DataError(f"{path} has columns but no items", "one row per item", "check the file")
    _refuse_bad_ids(frame[ITEM_ID], path, ITEM_ID)
    _refuse_duplicates(frame, path)
    return Items(frame, label)


def _items_from_table(path: Path, kind: Kind, names: ColumnNames) -> tuple[pl.DataFrame, str]:
    with _polars_errors(path, kind):
        if kind == "CSV":
            # every column is read as text: a type guessed from the first rows would turn "007" into 7
            with open_text(path) as file:
                header, separator = csv_header(path, file)
                file.seek(0)
                source = file.read()
            frame = pl.read_csv(source, separator=separator, infer_schema=False)
            frame = frame.filter(~pl.all_horizontal(pl.all().is_null()))
            columns = header
        else:
            frame = pl.read_parquet(path)
            columns = frame.columns
        item, label = _item_column(columns, names, kind)
        require_columns(path, columns, {item: "--item-id-column", names.title: "--title-column"})
        ids = _as_ids(frame.lazy().with_row_index(ROW), item, frame.schema[item], path, ITEM_ID)
        id_column = frame.lazy().select(ids.alias(ITEM_ID)).collect()[ITEM_ID]
        title = frame[names.title].cast(pl.String)
    extra = frame.drop(item, names.title) if names.title != item else frame.drop(item)
    extra = extra.rename({c: name for c, name in _source_names(extra.columns).items() if c in extra.columns})
    if "Amazon" in label:
        title = pl.Series([None if t is None else html.unescape(t) for t in title], dtype=pl.String)
    return pl.DataFrame([id_column, title.alias(TITLE), *extra.get_columns()]), label


def _source_names(columns: Collection[str]) -> dict[str, str]:
    """Return new names for the catalogue's own columns called as ours, `source_item_id`, that no column has yet."""
    return {ours: free_name(f"source_{ours}", columns) for ours in {ITEM_ID, TITLE} & {*columns}}


def free_name(wanted: str, columns: Collection[str]) -> str:
    """Return the name, with a number behind it if a column has it."""
    numbers = ("", *(f"_{n}" for n in range(2, len(columns) + 3)))
    return next(name for number in numbers if (name := f"{wanted}{number}") not in columns)


def _items_from_records(path: Path, kind: Kind, names: ColumnNames) -> tuple[pl.DataFrame, str]:
    first = next(iter(read_records(path, kind)), None)
    if first is None:
        raise DataError(f"{path} holds no record", "one object per line", "check the file")
    item, label = _item_column(list(first[1]), names, kind)
    if "Amazon" in label:
        year = _AMAZON_YEARS[item]
        clean = _amazon_2014 if year == 2014 else _amazon_2023
        schema: dict[str, Any] = dict.fromkeys(clean({}, item), pl.String)
        return build_frame(path, kind, schema, lambda row, record: clean(record, item)), label
    schema = record_schema(path, kind)
    require_columns(path, list(schema), {item: "--item-id-column", names.title: "--title-column"})
    renamed = {**{column: column for column in schema}, **_source_names(schema)}
    renamed.update({names.title: TITLE, item: ITEM_ID})
    types: dict[str, Any] = {ITEM_ID: pl.String, TITLE: pl.String}
    types.update({renamed[c]: dtype for c, dtype in schema.items() if renamed[c] not in types})

    def clean_record(row: int, record: Mapping[str, Any]) -> dict[str, Any]:
        values = {renamed[c]: cast_value(record.get(c), types[renamed[c]]) for c in schema if c != item}
        values[ITEM_ID] = id_as_text(record.get(item), path, row)
        return values

    return build_frame(path, kind, types, clean_record), label


def _item_column(columns: list[str], names: ColumnNames, kind: Kind) -> tuple[str, str]:
    """Return the id column and the file's kind for messages."""
    if names.item_id in columns or names.item_id != ColumnNames.item_id:
        return names.item_id, kind
    for column in ("parent_asin", "asin"):
        if column in columns:
            return column, f"Amazon {_AMAZON_YEARS[column]} metadata ({kind})"
    return names.item_id, kind


def _amazon_2014(record: Mapping[str, Any], item: str) -> dict[str, Any]:
    paths = record.get("categories") or []
    flat = [name for part in paths for name in (part if isinstance(part, list) else [part])]
    return {
        ITEM_ID: record.get(item),
        TITLE: _plain_text(record.get(TITLE)),
        "categories": _joined(flat),
        "brand": _plain_text(record.get("brand")),
        "description": _joined(record.get("description"), " "),
        "price": _plain_text(record.get("price")),
        "imUrl": record.get("imUrl"),
    }


def _amazon_2023(record: Mapping[str, Any], item: str) -> dict[str, Any]:
    images = [image for image in record.get("images") or [] if isinstance(image, dict)]
    main = next((image for image in images if image.get("variant") == "MAIN"), images[0] if images else {})
    return {
        ITEM_ID: record.get(item),
        TITLE: _plain_text(record.get(TITLE)),
        "categories": _joined(record.get("categories")) or _plain_text(record.get("main_category")),
        "store": _plain_text(record.get("store")),
        "description": _joined(record.get("description"), " "),
        "price": _plain_text(record.get("price")),
        "image_url": main.get("large") or main.get("hi_res") or main.get("thumb"),
    }


def _plain_text(value: Any) -> str | None:
    return None if value is None else html.unescape(str(value))


def _joined(values: Any, between: str = ", ") -> str | None:
    if not isinstance(values, list):
        return _plain_text(values)
    # dict.fromkeys: an item may be in several category paths with the same start
    return between.join(dict.fromkeys(html.unescape(str(value)) for value in values)) or None


def _refuse_bad_ids(ids: pl.Series, path: Path, what: str) -> None:
    missing = (ids.is_null() | (ids.str.strip_chars() == "")).arg_true()
    if len(missing):
        raise DataError(
            f"row {missing[0] + 1:,} of {path} has no {what} ({len(missing):,} such rows)",
            f"a {what} in every row",
            "fill or remove these rows",
        )


def _refuse_duplicates(frame: pl.DataFrame, path: Path) -> None:
    twice = frame[ITEM_ID].is_duplicated()
    if twice.any():
        rows = frame.with_row_index(ROW).filter(twice)
        one = rows[ITEM_ID][0]
        places = rows.filter(pl.col(ITEM_ID) == one)[ROW].head(2)
        raise DataError(
            f"item id {one!r} occurs in rows {places[0] + 1:,} and {places[1] + 1:,} of {path};"
            f" {rows[ITEM_ID].n_unique():,} ids occur more than once",
            "every item id once",
            "remove the duplicates; keep the row with the right title and picture",
        )


# --- interactions -------------------------------------------------------------------------------------------


def scan_interactions(path: Path, names: ColumnNames | None = None, *, scratch: Path) -> Interactions:
    """Open the interactions and check every row; the rows stay on disk until the frame is collected.

    Args:
        path: The file.
        names: The columns' names.
        scratch: Folder for unpacked files; it must exist as long as the frame is used.

    Raises:
        DataError: missing or empty file, wrong encoding, broken row, missing column, or a row without user,
            item or time; the message names the row.
    """
    names = names or ColumnNames()
    kind = kind_of(path)
    with _polars_errors(path, kind):
        if kind == "Parquet":
            source = pl.scan_parquet(path)
            columns = list(source.collect_schema())
        elif kind == "CSV":
            with open_text(path) as file:
                columns, separator = csv_header(path, file)
            source = pl.scan_csv(unpack_csv(path, scratch), separator=separator, infer_schema=False)
        else:
            columns = list(dict.fromkeys(key for _, record in islice(read_records(path, kind), 100) for key in record))
            if not columns:
                raise DataError(f"{path} holds no record", "one object per line", "check the file")
    user, item, time, label = _interaction_columns(columns, names, kind)
    require_columns(path, columns, {user: "--user-id-column", item: "--item-id-column", time: "--time-column"})
    with _polars_errors(path, kind):
        if kind in ("JSON lines", "Python literal lines"):
            source = pl.scan_parquet(_condensed(path, kind, [user, item, time], scratch))
        frame, rows = _checked(source.select(user, item, time), user, item, time, path)
    return Interactions(frame, label, rows)


def _interaction_columns(columns: list[str], names: ColumnNames, kind: Kind) -> tuple[str, str, str, str]:
    plain = (names.user_id, names.item_id, names.time, kind)
    if names.item_id in columns or names.item_id != ColumnNames.item_id:
        return plain
    for item in ("parent_asin", "asin"):
        if item in columns:
            user = names.user_id if names.user_id in columns else _AMAZON_USERS[item]
            time = names.time if names.time in columns else _AMAZON_TIMES[item]
            return user, item, time, f"Amazon {_AMAZON_YEARS[item]} reviews ({kind})"
    return plain


def _checked(source: pl.LazyFrame, user: str, item: str, time: str, path: Path) -> tuple[pl.LazyFrame, int]:
    """Return (user_id, item_id, time) with ids as strings and times as numbers, and the number of rows."""
    types = source.collect_schema()
    source = source.with_row_index(ROW)
    if all(types[column] == pl.String for column in (user, item, time)):
        # a blank line at the end of a CSV file with \r\n is read as an empty row
        source = source.filter(~pl.all_horizontal(pl.col(user, item, time).is_null()))
    frame = source.select(
        ROW,
        _as_ids(source, user, types[user], path, USER_ID).alias(USER_ID),
        _as_ids(source, item, types[item], path, ITEM_ID).alias(ITEM_ID),
        _as_number(source, time, types[time], path).alias(TIME),
    )
    missing = {
        USER_ID: _blank(USER_ID),
        ITEM_ID: _blank(ITEM_ID),
        TIME: pl.col(TIME).is_null(),
    }
    found = frame.select(
        pl.len().alias("rows"),
        *(pl.col(ROW).filter(bad).min().alias(column) for column, bad in missing.items()),
        *(bad.sum().alias(f"{column} count") for column, bad in missing.items()),
    ).collect(engine="streaming")
    for column, given in ((USER_ID, user), (ITEM_ID, item), (TIME, time)):
        if found[column][0] is not None:
            raise DataError(
                f"row {found[column][0] + 1:,} of {path} has no {given} ({found[f'{column} count'][0]:,} such rows)",
                "a user, an item and a time in every row",
                "fill or remove these rows",
            )
    rows = int(found["rows"][0])
    if rows == 0:
        raise DataError(f"{path} has columns but no interactions", "one row per interaction", "check the file")
    return frame.drop(ROW), rows


def _blank(column: str) -> pl.Expr:
    return pl.col(column).is_null() | (pl.col(column).str.strip_chars() == "")


def _as_ids(source: pl.LazyFrame, column: str, dtype: pl.DataType, path: Path, what: str) -> pl.Expr:
    """Return the column as string ids: text unchanged, whole numbers without a decimal point."""
    if isinstance(dtype, (pl.String, pl.Categorical, pl.Enum)) or dtype.is_integer():
        return pl.col(column).cast(pl.String)
    if dtype.is_float():
        value = pl.col(column).fill_nan(None)
        bad = (value != value.round()) | (value.abs() > _LARGEST_EXACT_FLOAT)
        first = source.filter(bad).select(ROW, column).head(1).collect(engine="streaming")
        if first.height:
            raise DataError(
                f"row {first[ROW][0] + 1:,} of {path} has the {what} {first[column][0]!r} in column {column!r}",
                "text or whole numbers as ids",
                "store the ids as text",
            )
        return value.cast(pl.Int64).cast(pl.String)
    raise DataError(
        f"column {column!r} of {path} holds {dtype}", f"text or whole numbers as {what}", "store the ids as text"
    )


def _as_number(source: pl.LazyFrame, column: str, dtype: pl.DataType, path: Path) -> pl.Expr:
    """Return the time column as numbers in time order, in any unit."""
    value = pl.col(column)
    if dtype.is_integer() and dtype != pl.UInt64:
        return value.cast(pl.Int64)
    if dtype.is_float() or dtype.is_decimal() or dtype == pl.UInt64:
        number = value.cast(pl.Float64)
        return pl.when(number.is_finite()).then(number)
    if isinstance(dtype, (pl.Datetime, pl.Date)):
        return value.cast(pl.Int64)
    if dtype == pl.Null:
        return value.cast(pl.Int64)
    if dtype != pl.String:
        raise DataError(
            f"column {column!r} of {path} holds {dtype}",
            "times as numbers, dates or text",
            "name the right column with --time-column",
        )
    return _text_as_number(source, column, path)


def _text_as_number(source: pl.LazyFrame, column: str, path: Path) -> pl.Expr:
    text = pl.col(column).str.strip_chars()
    given = pl.col(column).is_not_null() & (text != "")
    number = text.cast(pl.Float64, strict=False)
    readings = [text.cast(pl.Int64, strict=False), pl.when(number.is_finite()).then(number)]
    # %+ reads a time with any UTC offset; all times become microseconds
    readings += [
        text.str.to_datetime(form, strict=False, time_unit="us", time_zone="UTC" if form == "%+" else None).cast(
            pl.Int64
        )
        for form in _TIME_FORMATS
    ]
    first = source.filter(given).select(column).head(1).collect(engine="streaming")
    if first.is_empty():
        return readings[0]
    fitting = [reading for reading in readings if first.select(reading).item() is not None]
    failed = source.filter(given).select(ROW, column).head(1)
    for reading in fitting:
        failed = source.filter(given & reading.is_null()).select(ROW, column).head(1)
        if failed.collect(engine="streaming").is_empty():
            return reading
    bad = failed.collect(engine="streaming")
    raise DataError(
        f"row {bad[ROW][0] + 1:,} of {path} has the time {bad[column][0]!r} in column {column!r}",
        "the same form in every row: a number (seconds, milliseconds) or a date like 2014-07-01 12:00:00",
        "correct the row, or name the right column with --time-column",
    )


def _condensed(path: Path, kind: Kind, columns: list[str], scratch: Path) -> list[Path]:
    """Write the needed columns of a file of records, as text, into Parquet files of one block each."""
    parts: list[Path] = []
    for number, lines in line_blocks(path):
        if not lines.strip():
            continue
        frame = _block_frame(path, kind, columns, number, lines)
        part = scratch / f"{path.name}.{len(parts):05d}.parquet"
        frame.write_parquet(part, compression="lz4", statistics=False)
        parts.append(part)
    return parts


def _block_frame(path: Path, kind: Kind, columns: list[str], number: int, lines: bytes) -> pl.DataFrame:
    schema = dict.fromkeys(columns, pl.String())
    if kind == "JSON lines":
        try:
            return pl.read_ndjson(io.BytesIO(lines), schema=schema)
        except pl.exceptions.PolarsError:
            pass  # Python's slower reader names the row, or can read it
    rows = []
    for row, record in parse_lines(path, kind, number, lines):
        rows.append({c: id_as_text(record.get(c), path, row) for c in columns})
    return pl.DataFrame(rows, schema=schema)


# --- files --------------------------------------------------------------------------------------------------


# --- errors -------------------------------------------------------------------------------------------------


@contextmanager
def _polars_errors(path: Path, kind: Kind) -> Iterator[None]:
    """Turn an error of Polars about a file into one that names the row."""
    try:
        yield
    except (pl.exceptions.PolarsError, OSError) as error:
        if "No space left" in str(error):
            raise DataError(
                f"the disk is full: no space to unpack {path}", "", "free some space on the disk of --out"
            ) from None
        if kind == "CSV":
            _explain_csv(path)
        raise DataError(
            f"{path} cannot be read as {kind}: {str(error).splitlines()[0]}", "an undamaged file", "create it again"
        ) from None


def _explain_csv(path: Path) -> None:
    """Raise the error of the first line that is not UTF-8 or has more fields than the header; return if there is none.

    It is slow and only used after reading has failed.
    """
    with open_text(path) as file:
        columns, separator = csv_header(path, file)
        file.seek(0)
        for row, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise encoding_error(path, row, error.start) from None
        file.seek(0)
        reader = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=separator)
        for fields in reader:
            if len(fields) > len(columns):
                raise DataError(
                    f"line {reader.line_num:,} of {path} has {len(fields)} fields, the header has {len(columns)}",
                    "as many fields as columns",
                    "quote the fields that hold the separator",
                )
