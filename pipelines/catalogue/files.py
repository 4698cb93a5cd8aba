"""Readers of items and interactions in the usual file formats.

Items and interactions come from Parquet, CSV (any of `,` `;` tab `|`), JSON lines, or the Amazon Reviews files as
published (2014: metadata as Python literals and 5-core reviews; 2018 and 2023: metadata and reviews as JSON lines);
text files may be gzipped. The bytes and columns of a file decide its format, not its name. Ids are always strings.
Nothing is downloaded, and no code in a file is run.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl

from vlm2rec.embedder.contract.errors import DataError
from vlm2rec.embedder.contract.schema import ITEM_ID, TITLE, USER_ID
from vlm2rec.pipelines import console
from vlm2rec.pipelines.catalogue import amazon
from vlm2rec.pipelines.catalogue.csv_files import csv_columns, open_csv
from vlm2rec.pipelines.catalogue.ids import ROW, clean_ids, ids_of
from vlm2rec.pipelines.catalogue.parts import parquet_schema, parts_of, refuse_bomb, require_same
from vlm2rec.pipelines.catalogue.records import (
    Kind,
    build_frame,
    cast_value,
    encoding_error,
    id_as_text,
    kind_of,
    line_blocks,
    open_text,
    parse_lines,
    read_records,
    record_schema,
    require_columns,
    time_as_text,
)
from vlm2rec.pipelines.catalogue.times import Times, times_of

TIME = "time"

_FIRST_RECORDS = 100  # whose keys tell what a file of records holds
_RATINGS = ("rating", "ratings", "rating_score", "overall", "score", "stars")
# a JSON value that is no id reads so as text, and half of a character as NUL
_ODD_ID = r"^(?:true$|false$|[\[{]|-?\d+\.\d)|\x00"


@dataclass(frozen=True)
class ColumnNames:
    """The names of the columns in the input files."""

    item_id: str = "item_id"
    title: str = "title"
    user_id: str = "user_id"
    time: str | None = "timestamp"  # None: the file's order is the time

    @property
    def wanted(self) -> set[str]:
        """All columns that may be looked for."""
        amazons = {name for item in amazon.ID_COLUMNS for name in (item, *amazon.review_columns(item))}
        return {self.item_id, self.title, self.user_id, *({self.time} if self.time else ()), *amazons}


@dataclass(frozen=True)
class Items:
    """The catalogue: item_id and title (strings, title may be null), then the file's other columns."""

    frame: pl.DataFrame
    format: str


@dataclass(frozen=True)
class Interactions:
    """The interactions, as a lazy frame in the file's order: row (from 0), user_id, item_id, time (a number).

    Ids are text and follow the rule of `ids`; a null stands where a row has no id or no time.
    """

    frame: pl.LazyFrame
    format: str
    rows: int
    path: Path
    has_unit: bool  # the times are numbers of an unknown unit
    rating: str | None = None  # a column of ratings that the file has, and that nothing reads


# --- items --------------------------------------------------------------------------------------------------


def read_items(path: Path, names: ColumnNames | None = None) -> Items:
    """Read a catalogue.

    Amazon metadata is recognised by its id column (`asin` or `parent_asin`, if there is no `item_id`) and
    reduced to title, categories, brand or store, description, price and the image's URL; HTML entities are resolved.
    The ids follow the rule of `ids`; a NaN title is none.

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
    if nul := [name for name, dtype in frame.schema.items() if _names_nul(name, dtype)]:
        raise DataError(
            f"{path} has a column whose name holds a NUL character: {nul[0]!r}",
            "names that Arrow and Parquet can hold",
            "rename or remove the column; if you do not know it, the file is damaged",
        )
    frame = frame.with_columns(clean_ids(pl.col(ITEM_ID)))
    _refuse_bad_ids(frame[ITEM_ID], path, ITEM_ID)
    _refuse_duplicates(frame, path)
    return Items(frame, label)


def _names_nul(name: str, dtype: pl.DataType) -> bool:
    """Tell whether the name of a column, or of a field inside it, holds a NUL character: Polars panics at it."""
    if isinstance(dtype, pl.Struct):
        return "\0" in name or any(_names_nul(field.name, field.dtype) for field in dtype.fields)  # type: ignore[arg-type]
    inner = getattr(dtype, "inner", None)
    return "\0" in name or (inner is not None and _names_nul("", inner))


def _items_from_table(path: Path, kind: Kind, names: ColumnNames) -> tuple[pl.DataFrame, str]:
    with polars_errors(path, kind):
        columns = columns_of(path, kind, names)
        item, label = _item_column(columns, names, kind)
        require_columns(path, columns, {item: "--item-id-column", names.title: "--title-column"})
        with tempfile.TemporaryDirectory(prefix="vlm2rec-") as scratch:
            source, records = scan_table(path, kind, names, columns, Path(scratch))
            frame = source.collect()
        require_all(path, records, frame.height)
        if kind == "Parquet":
            refuse_bomb(path, sum(map(text_bytes, frame.get_columns())), "holds text of")
        ids = ids_of(frame.lazy().with_row_index(ROW), item, frame.schema[item], path, ITEM_ID)
        id_column = frame.lazy().select(ids.alias(ITEM_ID)).collect()[ITEM_ID]
        title = frame[names.title]
        title = (title.fill_nan(None) if title.dtype.is_float() else title).cast(pl.String)
    extra = frame.drop(item, names.title) if names.title != item else frame.drop(item)
    extra = extra.rename({c: name for c, name in _source_names(extra.columns).items() if c in extra.columns})
    if amazon.is_amazon(columns):
        title = pl.Series([amazon.plain_text(t) for t in title], dtype=pl.String)
        if "images" in extra.columns and "image_url" not in extra.columns and extra["images"].dtype.is_nested():
            addresses = [amazon.image_url(images) for images in extra["images"].to_list()]
            extra = extra.with_columns(pl.Series("image_url", addresses, dtype=pl.String))
    return pl.DataFrame([id_column, title.alias(TITLE), *extra.get_columns()]), label


def _source_names(columns: Collection[str]) -> dict[str, str]:
    """Return new names for the catalogue's own columns called as ours, `source_item_id`, that no column has yet."""
    return {ours: free_name(f"source_{ours}", columns) for ours in {ITEM_ID, TITLE} & {*columns}}


def free_name(wanted: str, columns: Collection[str]) -> str:
    """Return the name, with a number behind it if a column has it."""
    numbers = ("", *(f"_{n}" for n in range(2, len(columns) + 3)))
    return next(name for number in numbers if (name := f"{wanted}{number}") not in columns)


def _items_from_records(path: Path, kind: Kind, names: ColumnNames) -> tuple[pl.DataFrame, str]:
    columns = first_keys(path, kind)
    item, label = _item_column(columns, names, kind)
    schema: dict[str, Any]
    if "Amazon" in label:
        clean = amazon.cleaner(item, columns)
        schema = dict.fromkeys(clean({}), pl.String)
        return build_frame(
            path, kind, schema, lambda row, record: {**clean(record), ITEM_ID: id_as_text(record.get(item), path, row)}
        ), label
    schema = record_schema(path, kind)
    require_columns(path, list(schema), {item: "--item-id-column", names.title: "--title-column"})
    renamed = {**{column: column for column in schema}, **_source_names(schema)}
    renamed.update({names.title: TITLE, item: ITEM_ID})
    types: dict[str, Any] = {ITEM_ID: pl.String, TITLE: pl.String}
    types.update({renamed[c]: dtype for c, dtype in schema.items() if renamed[c] not in types})

    entities = amazon.is_amazon(schema)

    def clean_record(row: int, record: Mapping[str, Any]) -> dict[str, Any]:
        values = {renamed[c]: cast_value(record.get(c), types[renamed[c]]) for c in schema if c != item}
        values[ITEM_ID] = id_as_text(record.get(item), path, row)
        if entities:
            values[TITLE] = amazon.plain_text(values[TITLE])
        return values

    return build_frame(path, kind, types, clean_record), label


def _item_column(columns: list[str], names: ColumnNames, kind: Kind) -> tuple[str, str]:
    """Return the id column and the file's kind for messages."""
    item = _amazon_column(columns, names)
    if item is None:
        return names.item_id, kind
    return item, f"Amazon {amazon.year_of_metadata(item, columns)} metadata ({kind})"


def _amazon_column(columns: list[str], names: ColumnNames) -> str | None:
    """Return the id column of an Amazon file, None if the file or the settings have another id column."""
    if names.item_id in amazon.ID_COLUMNS:
        return names.item_id if names.item_id in columns else None
    if names.item_id in columns or names.item_id != ColumnNames.item_id:
        return None
    return next((column for column in amazon.ID_COLUMNS if column in columns), None)


def first_keys(path: Path, kind: Kind) -> list[str]:
    """Return the keys of a file's first records."""
    keys = list(dict.fromkeys(key for _, record in islice(read_records(path, kind), _FIRST_RECORDS) for key in record))
    if not keys:
        raise DataError(f"{path} holds no record", "one object per line", "check the file")
    return keys


def _refuse_bad_ids(ids: pl.Series, path: Path, what: str) -> None:
    missing = ids.is_null().arg_true()
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
            "every item id once; white space at an id's ends does not count",
            "remove the duplicates; keep the row with the right title and image",
        )


# --- interactions -------------------------------------------------------------------------------------------


def scan_interactions(path: Path, names: ColumnNames | None = None, *, scratch: Path) -> Interactions:
    """Open the interactions and check every row; the rows stay on disk until the frame is collected.

    Args:
        path: The file.
        names: The columns' names.
        scratch: Folder for unpacked files; it must exist as long as the frame is used.

    Raises:
        DataError: missing or empty file, wrong encoding, broken row, missing column, a column without any value, or
            values that cannot be ids or times; the message names up to three.
    """
    names = names or ColumnNames()
    kind = kind_of(path)
    with polars_errors(path, kind):
        columns = columns_of(path, kind, names) if kind in ("Parquet", "CSV") else first_keys(path, kind)
    user, item, time, label = _interaction_columns(columns, names, kind)
    flags = {user: "--user-id-column", item: "--interactions-item-column, or with --item-id-column for both files"}
    if time is not None:
        flags[time] = "--time-column, or give --order file if the rows of each user stand in their order"
    require_columns(path, columns, flags)
    needed = [column for column in (user, item, time) if column is not None]
    with polars_errors(path, kind):
        if kind in ("Parquet", "CSV"):
            source, records = scan_table(path, kind, names, columns, scratch)
        else:
            source, records = pl.scan_parquet(_condensed(path, kind, needed, scratch)), None
        source = source.select(needed)
        types = source.collect_schema()
        texts = [pl.col(column).str.len_bytes().cast(pl.Int64).sum() for column in needed if types[column] == pl.String]
        if kind == "Parquet" and texts:
            refuse_bomb(path, sum(source.select(texts).collect(engine="streaming").row(0)), "holds text of")
        source = source.with_row_index(ROW)
        if time is None:
            times = Times(pl.col(ROW).cast(pl.Int64), has_unit=False)
        else:
            times = times_of(source, time, types[time], path)
        frame = source.select(
            ROW,
            ids_of(source, user, types[user], path, USER_ID).alias(USER_ID),
            ids_of(source, item, types[item], path, ITEM_ID).alias(ITEM_ID),
            times.number.alias(TIME),
        )
        rows = _count(frame, {USER_ID: user, ITEM_ID: item, TIME: time or ""}, path)
    require_all(path, records, rows)
    rating = next((column for column in columns if column.strip().lower() in _RATINGS), None)
    return Interactions(frame, label, rows, path, times.has_unit, rating if rating not in needed else None)


def _interaction_columns(columns: list[str], names: ColumnNames, kind: Kind) -> tuple[str, str, str | None, str]:
    """Return the columns of user, item and time, and the file's kind for messages."""
    item = _amazon_column(columns, names)
    if item is None:
        return names.user_id, names.item_id, names.time, kind
    amazon_user, amazon_time = amazon.review_columns(item)
    user = names.user_id if names.user_id in columns else amazon_user
    time = names.time if names.time is None or names.time in columns else amazon_time
    return user, item, time, f"Amazon {amazon.year_of_reviews(item, columns)} reviews ({kind})"


def _count(frame: pl.LazyFrame, given: Mapping[str, str], path: Path) -> int:
    """Return the number of rows, or raise if there is none, or none with a user, an item or a time."""
    found = frame.select(pl.len(), *(pl.col(column).count().alias(column) for column in given))
    counts = found.collect(engine="streaming").row(0, named=True)
    rows = int(counts["len"])
    if rows == 0:
        raise DataError(f"{path} has columns but no interactions", "one row per interaction", "check the file")
    for column, name in given.items():
        if not counts[column]:
            raise DataError(
                f"none of the {rows:,} rows of {path} has a value in {name!r}",
                "a user, an item and a time in the rows",
                "name the right column" + ("; without times, give --order file" if column == TIME else ""),
            )
    return rows


def _condensed(path: Path, kind: Kind, columns: list[str], scratch: Path) -> list[Path]:
    """Write the columns of user, item and perhaps time of a file of records, as text, into Parquet files of a block."""
    parts: list[Path] = []
    for file in parts_of(path):
        for number, lines in line_blocks(file):
            if not lines.strip():
                continue
            frame = _block_frame(file, kind, columns, number, lines)
            part = scratch / f"{path.name}.{len(parts):05d}.parquet"
            frame.write_parquet(part, compression="lz4", statistics=False)
            parts.append(part)
    return parts


def _quoted(key: str) -> bytes:
    return json.dumps(key, ensure_ascii=False).encode()


def _block_frame(path: Path, kind: Kind, columns: list[str], number: int, lines: bytes) -> pl.DataFrame:
    schema = dict.fromkeys(columns, pl.String())
    if kind == "JSON lines":
        try:
            frame = pl.read_ndjson(io.BytesIO(lines), schema=schema)
            records = sum(1 for line in lines.split(b"\n") if line.strip())
            # a key that occurs twice in a line, or two objects in one
            simple = frame.height == records and all(lines.count(_quoted(key)) <= records for key in columns)
            # Polars turns true, lists and 1.5 into text: Python's slower reader sees whether they were
            if simple and not frame.select(pl.any_horizontal(pl.col(columns[:2]).str.contains(_ODD_ID).any())).item():
                return frame
        except pl.exceptions.PolarsError:
            pass  # Python's slower reader names the row, or can read it
    rows = []
    for row, record in parse_lines(path, kind, number, lines):
        user, item, *times = (record.get(column) for column in columns)
        values = [
            id_as_text(user, path, row),
            id_as_text(item, path, row),
            *(time_as_text(t, path, row) for t in times),
        ]
        rows.append(dict(zip(columns, values, strict=True)))
    return pl.DataFrame(rows, schema=schema)


# --- tables -------------------------------------------------------------------------------------------------


def columns_of(path: Path, kind: Kind, names: ColumnNames) -> list[str]:
    """Return the columns of a Parquet or CSV file, or of all parts in a folder."""
    found: dict[Path, dict[str, Any]] = {}
    for part in parts_of(path):
        if kind == "CSV":
            found[part] = dict.fromkeys(csv_columns(part, names.wanted), "text")
        else:
            parquet_schema(part)
            found[part] = dict(pl.read_parquet_schema(part))
    require_same(path, found)
    return list(next(iter(found.values())))


def scan_table(
    path: Path, kind: Kind, names: ColumnNames, columns: list[str], scratch: Path
) -> tuple[pl.LazyFrame, int | None]:
    """Return the rows of all parts, and how many a parser of record has counted; None if it was not asked."""
    parts = parts_of(path)
    if kind == "Parquet":
        return pl.concat([pl.scan_parquet(part, glob=False).select(columns) for part in parts]), None
    tables = [open_csv(part, scratch, names.wanted) for part in parts]
    for table in tables:
        for what, count in table.left_out.items():
            console.log.print(f"{table.source}: {count:,} {what} left out", markup=False)
    # every column is read as text: a type guessed from the first rows would turn "007" into 7
    return pl.concat([table.scan().select(columns) for table in tables]), sum(table.records for table in tables)


def require_all(path: Path, records: int | None, rows: int) -> None:
    """Raise `DataError` unless as many rows were read as `scan_table` has counted records; None counts none."""
    if records not in (None, rows):
        raise DataError(
            f"{path} has {records:,} records, of which {rows:,} were read",
            "every record once",
            "write the table as Parquet or JSON lines",
        )


def text_bytes(values: pl.Series) -> int:
    """Return how long all texts of a column are together; Parquet stores one that occurs often only once."""
    dtype = values.dtype
    if isinstance(dtype, pl.String):
        return int(values.str.len_bytes().cast(pl.Int64).sum())
    if isinstance(dtype, (pl.Categorical, pl.Enum)):
        return int(values.cat.len_bytes().cast(pl.Int64).sum())
    if isinstance(dtype, pl.Binary):
        return int(values.bin.size().cast(pl.Int64).sum())
    if isinstance(dtype, (pl.List, pl.Array)):
        return text_bytes(values.explode())
    if isinstance(dtype, pl.Struct):
        return sum(map(text_bytes, values.struct.unnest().get_columns()))
    return 0


# --- errors -------------------------------------------------------------------------------------------------


@contextmanager
def polars_errors(path: Path, kind: Kind) -> Iterator[None]:
    """Turn an error of Polars about a file into one that names the row."""
    try:
        yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        if "No space left" in str(error):
            raise DataError(
                f"the disk is full: no space to unpack {path}",
                "enough space for the whole file",
                "free some space on the disk of --out",
            ) from None
        if kind == "CSV":
            _explain_csv(path)
        raise DataError(
            f"{path} cannot be read as {kind}: {str(error).splitlines()[0]}", "an undamaged file", "create it again"
        ) from None


def _explain_csv(path: Path) -> None:
    """Raise the error of the first line that is not UTF-8; return if there is none.

    It is slow and only used after reading has failed.
    """
    for part in parts_of(path):
        with open_text(part) as file:
            for row, line in enumerate(file, 1):
                try:
                    line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise encoding_error(part, row, error.start) from None
