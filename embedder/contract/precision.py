"""Number formats of vectors on disk, and short vectors. NumPy and pyarrow only.

    float32, float16   the numbers
    int8               codes from -127 to 127; a column beside the view has each row's scale: vector = scale · codes
    binary             one bit for each number, 1 where it is above 0, eight to a byte, the first in the highest bit:
                       vector = ±1/√d, so that a cosine is 1 − 2 · (differing bits)/d

A short vector is the first `dim` numbers of a vector, made one long again.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

FLOATS = {"float32": pa.float32(), "float16": pa.float16()}
_CODES = {"int8": pa.int8(), "binary": pa.uint8()}
PRECISIONS = (*FLOATS, *_CODES)
_LARGEST_CODE = 127


class Stored(NamedTuple):
    """Vectors as a file holds them."""

    values: np.ndarray  # (n, d) of the format's type; (n, ⌈d/8⌉) bytes of binary
    scales: np.ndarray | None  # (n,) float32 of int8; None of the others


def stored_type(precision: str, dim: int) -> pa.FixedSizeListType:
    """Return the Arrow type of vectors of length `dim` on disk."""
    element = pa.field("element", (FLOATS | _CODES)[precision], nullable=False)
    return pa.list_(element, -(-dim // 8) if precision == "binary" else dim)


def has_scale(precision: str) -> bool:
    """Tell whether each vector has a scale in a column of its own."""
    return precision == "int8"


def bytes_of(precision: str, dim: int) -> int:
    """Return how many bytes a vector of length `dim` takes, before compression."""
    kind = stored_type(precision, dim)
    return int(kind.list_size * kind.value_type.bit_width // 8) + 4 * has_scale(precision)


def largest(precision: str) -> float:
    """Return the largest number that fits."""
    return float(np.finfo("float16" if precision == "float16" else "float32").max)


def shortened(vectors: np.ndarray, dim: int) -> np.ndarray:
    """Return the first `dim` numbers of each vector, (n, dim) float32, one long; rows of NaN stay NaN, zeros zero."""
    first = np.asarray(vectors[:, :dim], np.float64)
    lengths = np.sqrt((first * first).sum(axis=1, keepdims=True))
    return np.asarray(first / np.where(lengths > 0, lengths, 1), np.float32)


def to_stored(vectors: np.ndarray, precision: str) -> Stored:
    """Return finite vectors (n, d) float32 as a file holds them."""
    if precision == "binary":
        return Stored(np.packbits(vectors > 0, axis=1), None)
    if precision == "int8":
        scales = np.abs(vectors).max(axis=1, initial=0).astype(np.float32) / np.float32(_LARGEST_CODE)
        codes = np.rint(vectors / np.where(scales > 0, scales, 1)[:, None])
        return Stored(np.clip(codes, -_LARGEST_CODE, _LARGEST_CODE).astype(np.int8), scales)
    return Stored(vectors.astype(precision), None)


def to_floats(stored: Stored, precision: str, dim: int) -> np.ndarray:
    """Return the vectors (n, dim) float32 that stored ones stand for."""
    if precision == "binary":
        bits = np.unpackbits(np.ascontiguousarray(stored.values), axis=1, count=dim)
        side = np.float32(1 / np.sqrt(dim))
        return np.where(bits == 1, side, -side)
    floats = stored.values.astype(np.float32, copy=False)
    return floats if stored.scales is None else floats * stored.scales[:, None]


def floats_of(
    column: pa.FixedSizeListArray, scales: pa.Array | None, precision: str, dim: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the vectors of a column of a file, (n, dim) float32 with rows of NaN for nulls, and which there are, (n,).

    `scales` is the column of scales, for a format that has them.
    """
    values, present = raw_of(column)
    factors = None if scales is None else np.asarray(scales.fill_null(0).to_numpy(zero_copy_only=False), np.float32)
    vectors = to_floats(Stored(values, factors), precision, dim)
    if not present.all():
        vectors = np.where(present[:, None], vectors, np.float32(np.nan))
    return vectors, present


def raw_of(column: pa.FixedSizeListArray) -> tuple[np.ndarray, np.ndarray]:
    """Return (n, width) values as stored, anything where null, and the (n,) mask of rows that have a vector."""
    width = column.type.list_size
    present = column.is_valid().to_numpy(zero_copy_only=False)
    # not `.flatten()`: it leaves null rows out and shifts every row after them
    values = column.values.slice(column.offset * width, len(column) * width)
    if values.null_count and pa.types.is_integer(
        values.type
    ):  # as Parquet reads a null vector; NumPy has no such codes
        values = values.fill_null(0)
    return values.to_numpy(zero_copy_only=False).reshape(len(column), width), present
