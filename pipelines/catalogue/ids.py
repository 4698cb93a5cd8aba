"""What an id is: the one rule for items and users, in the catalogue and in the interactions.

An id is text. White space at its ends does not count. A whole number is its digits without a decimal point. Null, NaN
and blank text are no id. Everything else counts: `007` and `7` are two ids, and so are `b07` and `B07`. The words nan,
None and <NA> are ids like any other among users with names, and whoever meets them is told, as they often stand for
nothing; among users who are all whole numbers they are no ids.

An interaction whose id is not in the catalogue, but is the same whole number written with `.0`, names that item:
tables of floats are written so. No other spelling is guessed; `explain` says which one would fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from vlm2rec.embedder.contract.errors import DataError
from vlm2rec.embedder.contract.schema import ITEM_ID

ROW = "row"
ITEM = "item"  # the row of an item in the catalogue
WORDS_FOR_NOTHING = ("nan", "NaN", "None", "<NA>", "NaT", "null", "NULL")
"""How programs write a missing value as text."""

_EXACT_DIGITS: dict[type[pl.DataType], float] = {pl.Float32: 2.0**24, pl.Float64: 2.0**53}
_FLOAT_SPELLING = r"\.0+$"


def examples(rows: Sequence[tuple[int, object]]) -> str:
    """Return `'x' (row 3), 'y' (row 7)` of up to three (row counted from 0, value)."""
    return ", ".join(f"{value!r} (row {row + 1:,})" for row, value in rows[:3])


def clean_ids(ids: pl.Expr) -> pl.Expr:
    """Return text ids without white space at their ends; blank ones become null."""
    ids = ids.str.strip_chars()
    return pl.when(ids != "").then(ids)


def ids_of(source: pl.LazyFrame, column: str, dtype: pl.DataType, path: Path, what: str) -> pl.Expr:
    """Return a column as text ids, by the rule above; `source` has the rows' numbers in the column `row`.

    Raises:
        DataError: the column holds neither text nor numbers, or numbers that are not whole or have lost digits.
    """
    if isinstance(dtype, (pl.String, pl.Categorical, pl.Enum)):
        return clean_ids(pl.col(column).cast(pl.String))
    if dtype.is_integer() or dtype == pl.Null:
        return pl.col(column).cast(pl.String)
    if dtype.is_float():
        value = pl.col(column).fill_nan(None)
        bad = (value != value.round()) | (value.abs() > _EXACT_DIGITS.get(type(dtype), 2.0**11))
        found = source.filter(bad).select(ROW, column).head(3).collect(engine="streaming")
        if found.height:
            raise DataError(
                f"column {column!r} of {path} holds {dtype}, and some are not whole numbers or so large that digits"
                f" are lost: {examples(found.rows())}",
                f"text or whole numbers as {what}",
                "store the ids as text where the file is made",
            )
        return value.cast(pl.Int64).cast(pl.String)
    raise DataError(
        f"column {column!r} of {path} holds {dtype}", f"text or whole numbers as {what}", "store the ids as text"
    )


def words_for_nothing(texts: pl.Series) -> pl.DataFrame:
    """Return (word, rows) of the texts that are words such as `nan`, most frequent first."""
    found = texts.filter(texts.is_in(WORDS_FOR_NOTHING))
    return found.value_counts(sort=True, name="rows").rename({found.name: "word"})


def without_words_among_numbers(ids: pl.Series) -> pl.Series:
    """Return distinct ids without words such as `nan`, if all others are whole numbers; else the same ids."""
    words = ids.is_in(WORDS_FOR_NOTHING)
    if not words.any() or words.all():
        return ids
    others = ids.filter(~words)
    return others if others.str.contains(r"^-?\d+(?:\.0+)?$").all() else ids


def explain(unknown: pl.DataFrame, catalogue: pl.Series) -> pl.DataFrame:
    """Say of ids that are not in the catalogue which spelling would be, if any.

    Args:
        unknown: item_id (distinct) and other columns.
        catalogue: The catalogue's ids.

    Returns:
        The same rows with `item` (the row of the catalogue's item if the id is that item's whole number written with
        `.0`, or without, else null), `near` (the catalogue's id that is spelled alike, else null) and `why`.
    """
    known = pl.DataFrame({"known": catalogue, ITEM: np.arange(len(catalogue), dtype=np.int32)})
    found = unknown.with_columns(item=pl.lit(None, pl.Int32), near=pl.lit(None, pl.String), why=pl.lit(None, pl.String))
    for why, spell in _SPELLINGS:
        waiting = found.filter(pl.col("near").is_null()).select(ITEM_ID)
        if waiting.is_empty():
            break
        spelled = known.select("known", ITEM, key=spell(pl.col("known")))
        alike = (
            waiting.with_columns(key=spell(pl.col(ITEM_ID)))
            .join(spelled, on="key", how="inner")
            .group_by(ITEM_ID)
            .agg(
                pl.col("known").min().alias("_near"),
                pl.when(pl.len() == 1).then(pl.col(ITEM).min()).alias("_item"),
            )
        )
        found = found.join(alike, on=ITEM_ID, how="left", maintain_order="left").with_columns(
            pl.coalesce("near", "_near").alias("near"),
            pl.when(pl.col("near").is_null() & pl.col("_near").is_not_null())
            .then(pl.lit(why))
            .otherwise("why")
            .alias("why"),
            pl.coalesce(ITEM, pl.col("_item") if why == _AS_FLOAT else pl.lit(None, pl.Int32)).alias(ITEM),
        )
        found = found.drop("_near", "_item")
    scientific = pl.col("why").is_null() & pl.col(ITEM_ID).str.contains(r"^\d(?:\.\d+)?[eE]\+\d+$")
    return found.with_columns(why=pl.when(scientific).then(pl.lit(_SCIENTIFIC)).otherwise("why"))


_AS_FLOAT = "the same whole number written with .0"
_SCIENTIFIC = "a number in scientific notation, whose last digits are lost"


def _whole(ids: pl.Expr) -> pl.Expr:
    """Return the digits of whole numbers, null for other ids."""
    return pl.when(ids.str.contains(r"^-?\d+(?:\.0+)?$")).then(ids.str.replace(_FLOAT_SPELLING, ""))


def _visible(ids: pl.Expr) -> pl.Expr:
    """Return ids in Unicode's compatible composed form, without characters that cannot be seen, and without quotes."""
    return ids.str.normalize("NFKC").str.replace_all(r"[\p{Cf}\p{Cc}]", "").str.strip_chars(" \"'")


def _padded(ids: pl.Expr) -> pl.Expr:
    return _whole(ids).str.strip_chars_start("0")


_SPELLINGS = (
    (_AS_FLOAT, _whole),
    ("leading zeros differ", _padded),
    ("characters that cannot be seen, or quotes, differ", _visible),
    ("upper and lower case differ", lambda ids: _visible(ids).str.to_lowercase()),
)
