"""One view of an embeddings folder as a stream of unit vectors, and a random sample of that stream."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from vlm2rec.downstream.table import read_batches
from vlm2rec.embedder.contract.storage import Location

BATCH = 8_192  # vectors in memory at a time


class UnitBatch(NamedTuple):
    """Items that have a vector: `vectors` (n, d) float32 of length one; `first` is the index row of the first."""

    first: int
    item_ids: list[str]
    vectors: np.ndarray
    absent: int  # rows of this batch without a vector
    unusable: int  # rows whose vector is zero or not finite and has no direction
    every: list[str]  # all items of this batch, in the order of the export
    keep: np.ndarray  # which of them have a vector, (len(every),) bool


Watch = Callable[[str, Iterable[UnitBatch]], Iterable[UnitBatch]]
"""Wraps a pass over the vectors, to show its progress: called with a description and the pass."""


def unit_batches(embeddings: Location, column: str, shards: Iterable[int] | None = None) -> Iterator[UnitBatch]:
    """Stream one view, or some of its shards, as unit vectors; memory holds one batch."""
    first = 0
    for ids, vectors, present in read_batches(embeddings, column, BATCH, shards=shards):
        lengths = np.linalg.norm(vectors, axis=1)
        keep = present & np.isfinite(lengths) & (lengths > 0)
        unit = np.ascontiguousarray(vectors[keep] / lengths[keep, None])
        kept = [name for name, good in zip(ids, keep, strict=True) if good]
        yield UnitBatch(first, kept, unit, int((~present).sum()), int((present & ~keep).sum()), ids, keep)
        first += len(kept)


def nearest_of(
    batches: Iterable[UnitBatch], vector: np.ndarray, k: int, without: Collection[str] = ()
) -> list[tuple[str, float]]:
    """Return the k items of a stream whose vectors have the largest cosine with a vector (d,), and these cosines.

    Nearest first; of equal ones, the first in the stream. Items in `without` do not count.
    """
    query = vector / (np.linalg.norm(vector) or 1)
    best: list[tuple[float, int, str]] = []
    for batch in batches:
        scores = batch.vectors @ query
        chosen = np.argsort(-scores, kind="stable")[: k + len(without)]
        here = [(-float(scores[row]), batch.first + int(row), batch.item_ids[row]) for row in chosen]
        best = sorted([*best, *(each for each in here if each[2] not in without)])[:k]
    return [(item_id, -cosine) for cosine, _, item_id in best]


class Reservoir:
    """A uniform random sample of a stream of unknown length.

    `rows` (n,) int64 and `vectors` (n, d) float32 hold the sample once all vectors were offered; n ≤ size.
    """

    def __init__(self, size: int, dim: int, seed: int) -> None:
        self._rows = np.empty(size, np.int64)
        self._vectors = np.empty((size, dim), np.float32)
        self._random = np.random.default_rng(seed)
        self._seen = 0

    def offer(self, vectors: np.ndarray) -> None:
        """Take the next vectors of the stream, (n, d)."""
        places = np.arange(self._seen, self._seen + len(vectors))
        # the t-th vector goes to a slot drawn from 0..t-1; a slot beyond the reservoir drops it
        slots = np.where(places < len(self._rows), places, self._random.integers(0, places + 1))
        kept = np.flatnonzero(slots < len(self._rows))
        self._rows[slots[kept]] = places[kept]  # of two vectors for one slot, the later one stays
        self._vectors[slots[kept]] = vectors[kept]
        self._seen += len(vectors)

    @property
    def rows(self) -> np.ndarray:
        """Positions in the stream, (n,) int64."""
        return self._rows[: self._seen]

    @property
    def vectors(self) -> np.ndarray:
        """The sampled vectors, (n, d) float32."""
        return self._vectors[: self._seen]
