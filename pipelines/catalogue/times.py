"""What a time is: a number or a date, of one form and one unit in the whole column.

Dates become microseconds, times with an offset UTC. Numbers keep their unit: only their order matters. What would put
histories out of order is refused with examples: two units or two forms in one column, digits lost in short floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from vlm2rec.embedder.contract.errors import DataError
from vlm2rec.pipelines.catalogue.ids import ROW, WORDS_FOR_NOTHING, examples

_FORMATS = (
    "%Y-%m-%d",
    "%Y-%m-%d %H:%M:%S%.f",
    "%Y-%m-%d %H:%M",
    "%Y-%m-%dT%H:%M:%S%.f",
    "%Y-%m-%dT%H:%M:%S%.fZ",
    "%+",
)
_UNITS = {"seconds": 1.0, "milliseconds": 1e3, "microseconds": 1e6, "nanoseconds": 1e9}
_EARLY, _LATE = 631_152_000, 4_102_444_800  # 1990 and 2100, in seconds
_LARGEST_EXACT_FLOAT32 = 2.0**24
_SPACING = 128  # between neighbouring float32 numbers at today's seconds
_HOUR = 3600
_WITHOUT_TIMES = "if the rows of each user stand in their order, give --order file"


@dataclass(frozen=True)
class Times:
    """A time column as numbers in time order; null where there is no time."""

    number: pl.Expr
    has_unit: bool  # numbers of an unknown unit; dates have none


def times_of(source: pl.LazyFrame, column: str, dtype: pl.DataType, path: Path) -> Times:
    """Return a time column as numbers; `source` has the rows' numbers in the column `row`.

    Raises:
        DataError: the column's type holds no times, has lost their last digits, or its texts have different forms.
    """
    value = pl.col(column)
    if dtype.is_integer() and dtype != pl.UInt64:
        return Times(value.cast(pl.Int64), has_unit=True)
    if dtype.is_float() or dtype.is_decimal() or dtype == pl.UInt64:
        number = value.cast(pl.Float64)
        if dtype.is_float() and dtype != pl.Float64:
            _refuse_lost_digits(source, number, column, str(dtype), path)
        return Times(pl.when(number.is_finite()).then(number), has_unit=True)
    if isinstance(dtype, (pl.Datetime, pl.Date)):
        return Times(value.cast(pl.Int64), has_unit=False)
    if dtype == pl.Null:
        return Times(value.cast(pl.Int64), has_unit=False)
    if dtype != pl.String:
        raise DataError(
            f"column {column!r} of {path} holds {dtype}",
            "times as numbers, dates or text",
            "name the right column with --time-column",
        )
    return _text_as_number(source, column, path)


def _refuse_lost_digits(source: pl.LazyFrame, number: pl.Expr, column: str, dtype: str, path: Path) -> None:
    large = source.filter(number.is_finite() & (number.abs() > _LARGEST_EXACT_FLOAT32))
    found = large.select(ROW, number.alias(column)).head(3).collect(engine="streaming")
    if found.height:
        raise DataError(
            f"column {column!r} of {path} holds {dtype}, which has about seven digits: times up to"
            f" {_SPACING} seconds apart are equal, such as {examples(found.rows())}",
            "times as whole numbers, Float64 or dates",
            f"store the times as integers where the file is made; {_WITHOUT_TIMES}",
        )


def _text_as_number(source: pl.LazyFrame, column: str, path: Path) -> Times:
    text = pl.col(column).str.strip_chars()
    given = pl.col(column).is_not_null() & (text != "")
    number = text.cast(pl.Float64, strict=False)
    whole, real = text.cast(pl.Int64, strict=False), pl.when(number.is_finite()).then(number)
    # %+ reads a time with any UTC offset; all times become microseconds
    readings = [(whole, True), (real, True)] + [
        (
            text.str.to_datetime(form, strict=False, time_unit="us", time_zone="UTC" if form == "%+" else None).cast(
                pl.Int64
            ),
            False,
        )
        for form in _FORMATS
    ]
    words = text.is_in(WORDS_FOR_NOTHING)
    first = source.filter(given & ~words).select(ROW, column).head(1).collect(engine="streaming")
    if first.is_empty():
        return Times(pl.lit(None, pl.Int64), has_unit=False)
    fitting = [pair for pair in readings if first.select(pair[0]).item() is not None]
    failed = source.filter(given & ~words).select(ROW, column)
    for reading, has_unit in fitting:
        failed = source.filter(given & reading.is_null())
        if not failed.head(1).collect(engine="streaming").is_empty():
            failed = failed.filter(~words)  # a word such as NaT is no time
            if not failed.head(1).collect(engine="streaming").is_empty():
                continue
        if reading is real:
            _refuse_cut_digits(source, text, number, column, path)
        return Times(reading, has_unit)
    bad = failed.select(ROW, column).head(3).collect(engine="streaming").rows()
    unlike = f", while {examples(first.rows())} is of another form" if fitting else ""
    raise DataError(
        f"column {column!r} of {path} has times such as {examples(bad)}{unlike}",
        "the same form in every row: a number (seconds, milliseconds) or a date like 2014-07-01 12:00:00,"
        " with a time zone in all rows or in none",
        _advice(str(bad[0][1])) + f"correct the rows, or name the right column with --time-column; {_WITHOUT_TIMES}",
    )


def _advice(text: str) -> str:
    parts = text.replace(".", "/").replace("-", "/").split()[0].split("/") if text.strip() else []
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        return ""
    if len(parts[0]) == 4:
        return f"write {text!r} with hyphens, year-month-day; "
    return (
        f"{text!r} does not say which number is the day and which the month: write it as year-month-day,"
        " 2020-04-03 for 3 April 2020; "
    )


def _refuse_cut_digits(source: pl.LazyFrame, text: pl.Expr, number: pl.Expr, column: str, path: Path) -> None:
    """Refuse `1.7E+09`: a program that writes large numbers so has cut their last digits."""
    mantissa = text.str.extract(r"^[-+]?([\d.]+)[eE]").str.replace(".", "", literal=True)
    cut = (number.abs() >= 1e8) & (mantissa.str.len_chars() < number.abs().log10().floor() + 1)
    found = source.filter(cut).select(ROW, column).head(3).collect(engine="streaming")
    if found.height:
        raise DataError(
            f"column {column!r} of {path} has times in scientific notation with too few digits:"
            f" {examples(found.rows())}",
            "every digit of a time",
            f"write the times as whole numbers where the file is made; {_WITHOUT_TIMES}",
        )


# --- one unit -------------------------------------------------------------------------------------------------
def check_unit(times: np.ndarray, rows: np.ndarray, path: Path) -> list[str]:
    """Refuse numbers of which some are of another unit than the rest.

    A unit shows only in numbers that are dates between 1990 and 2100 in it; if less than half of the numbers are
    dates in some unit, they are counters of some kind, and nothing is said.

    Args:
        times: The times of all rows that have one, (n,), int64 or float64.
        rows: Their rows in the file, counted from 0, (n,).
        path: The file, for messages.

    Returns:
        Warnings: of times of zero and before among dates, and of times that look like rounded ones.

    Raises:
        DataError: with up to three examples of each unit.
    """
    if not len(times):
        return []
    lowest, highest = float(times.min()), float(times.max())
    for scale in _UNITS.values():
        if _EARLY * scale <= lowest and highest < _LATE * scale:
            return _warn_of_rounding(times, scale, path)
    inside = {unit: (times >= _EARLY * scale) & (times < _LATE * scale) for unit, scale in _UNITS.items()}
    counts = {unit: int(np.count_nonzero(mask)) for unit, mask in inside.items()}
    positive = int(np.count_nonzero(times > 0))
    if 2 * sum(counts.values()) < positive or not positive:
        return []
    lead = max(counts, key=lambda unit: counts[unit])
    scale = _UNITS[lead]
    # far beyond any date in this unit: other units, and dates like 20231115
    far = (times > 2 * _LATE * scale) | ((times > 0) & (times < _EARLY / 10 * scale))
    if far.any():
        others = {unit: mask for unit, mask in inside.items() if unit != lead and counts[unit]}
        strange = far.copy()
        for mask in others.values():
            strange &= ~mask
        told = [f"{count:,} in {unit}" for unit, count in counts.items() if count]
        told += [f"{np.count_nonzero(strange):,} in none of these"] if strange.any() else []
        shown = [f"{unit}: {_shown(times, rows, mask)}" for unit, mask in {lead: inside[lead], **others}.items()]
        shown += [f"none: {_shown(times, rows, strange)}"] if strange.any() else []
        raise DataError(
            f"the times of {path} are of more than one unit ({', '.join(told)}), such as {'; '.join(shown)}",
            "one unit, such as seconds, in every row",
            "bring all times to one unit where the file is made; if these are not times, "
            + _WITHOUT_TIMES.removeprefix("if "),
        )
    before = times <= 0
    if before.any():
        return [
            f"{np.count_nonzero(before):,} of {len(times):,} times of {path} are zero or less, the others {lead}:"
            f" {_shown(times, rows, before)}. They stand first in their histories; if they mean that there is no time,"
            " leave the field empty."
        ]
    return []


def _shown(times: np.ndarray, rows: np.ndarray, mask: np.ndarray) -> str:
    places = np.flatnonzero(mask)[:3]
    return examples([(int(rows[place]), times[place].item()) for place in places])


def _warn_of_rounding(times: np.ndarray, scale: float, path: Path) -> list[str]:
    """Say so if all times in seconds are whole multiples of float32's spacing, and are not whole hours."""
    if scale != 1 or len(times) < 20 or (times[:1000] % _SPACING).any() or (times % _SPACING).any():
        return []
    if not (times % _HOUR).any():
        return []
    return [
        f"all times of {path} are multiples of {_SPACING} seconds, as if they had once been stored as float32: events"
        f" less than {_SPACING} seconds apart may be out of order. Make the file again from the original times."
    ]
