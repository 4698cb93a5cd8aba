"""How much of the vectors semantic ids keep."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm2rec.downstream.index.unit_vectors import UnitBatch
from vlm2rec.downstream.semantic_ids.codebook import Codebook


@dataclass
class Scatter:
    """Sums over a stream of vectors from which variances follow, all in float64."""

    count: int
    total: np.ndarray  # (d,)
    squares: float
    left: np.ndarray  # (L,) squared distance to what the first 1, 2, ... levels say

    @classmethod
    def of(cls, codebook: Codebook) -> Scatter:
        """Return empty sums."""
        return cls(0, np.zeros(codebook.dim), 0.0, np.zeros(codebook.levels))

    def add(self, vectors: np.ndarray, codes: np.ndarray, codebook: Codebook) -> None:
        """Take vectors (n, d) and their codes (n, L)."""
        self.count += len(vectors)
        self.total += vectors.sum(axis=0, dtype=np.float64)
        self.squares += float(np.square(vectors, dtype=np.float64).sum())
        rest = vectors.astype(np.float32, copy=True)
        for level, words in enumerate(codebook.codewords):
            rest -= words[codes[:, level]]
            self.left[level] += float(np.square(rest, dtype=np.float64).sum())

    @property
    def explained(self) -> list[float]:
        """Share of the variance that the first 1, 2, ... levels reconstruct; 1 if there is no variance."""
        variance = self.squares - float(np.square(self.total).sum()) / max(1, self.count)
        return [1.0 - float(left) / variance if variance > 1e-12 * self.squares else 1.0 for left in self.left]


def nearest_rows(batches: Iterable[UnitBatch], queries: np.ndarray, own: np.ndarray, k: int) -> np.ndarray:
    """Return the rows of the k nearest items by cosine of each query, without itself, (S, k) int64.

    Args:
        batches: all unit vectors.
        queries: (S, d) unit vectors.
        own: (S,) their rows.
        k: fewer than the items; with 0 the stream is only read.
    """
    best = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.full((len(queries), k), -1, np.int64)
    for batch in batches:
        scores = queries @ batch.vectors.T  # (S, n)
        here = (own >= batch.first) & (own < batch.first + len(batch.vectors))
        scores[here, own[here] - batch.first] = -np.inf
        every = np.concatenate([best, scores], axis=1)
        numbers = np.broadcast_to(batch.first + np.arange(scores.shape[1]), scores.shape)
        place = np.argpartition(-every, max(k - 1, 0), axis=1)[:, :k]
        best = np.take_along_axis(every, place, axis=1)
        rows = np.take_along_axis(np.concatenate([rows, numbers], axis=1), place, axis=1)
    return rows


def found_by_codes(
    codebook: Codebook, codes: np.ndarray, queries: np.ndarray, own: np.ndarray, true: np.ndarray
) -> float:
    """Return which share of the true neighbours are nearest by what the codes stand for, recall@k.

    Args:
        codebook: the codebook.
        codes: of all items, (N, L).
        queries: (S, d) unit vectors.
        own: (S,) their rows.
        true: (S, k) rows of their neighbours.
    """
    decoded = codebook.decode(codes)
    decoded /= np.maximum(np.linalg.norm(decoded, axis=1, keepdims=True), 1e-12)
    hits = 0
    for start in range(0, len(queries), 64):
        part = slice(start, start + 64)
        scores = queries[part] @ decoded.T
        scores[np.arange(len(scores)), own[part]] = -np.inf
        found = np.argpartition(-scores, true.shape[1] - 1, axis=1)[:, : true.shape[1]]
        hits += sum(len(np.intersect1d(one, other)) for one, other in zip(found, true[part], strict=True))
    return hits / true.size


def describe(codebook: Codebook, codes: np.ndarray, explained: list[float], own: np.ndarray, true: np.ndarray) -> Any:
    """Return the table of a coding, as in `semantic_ids.json`.

    Args:
        codebook: the codebook.
        codes: of all items, (N, L), without the last level that tells equal ones apart.
        explained: share of the variance, by level.
        own: rows of the sampled items, (S,).
        true: rows of their k nearest neighbours, (S, k); k may be 0.
    """
    levels = []
    for level in range(codebook.levels):
        share = np.bincount(codes[:, level], minlength=codebook.size) / len(codes)
        used = share[share > 0]
        prefix = np.unique(codes[:, : level + 1], axis=0, return_inverse=True)[1].reshape(-1)
        groups = np.bincount(prefix) / len(codes)
        levels.append(
            {
                "used": len(used),
                "even": float(np.exp(-(used * np.log(used)).sum()) / codebook.size),
                "explained": explained[level],
                "neighbours": float((prefix[own][:, None] == prefix[true]).mean()) if true.size else None,
                "chance": float(np.square(groups).sum()),
            }
        )
    _, sizes = np.unique(codes, axis=0, return_counts=True)
    return {
        "levels": levels,
        "distinct": len(sizes),
        "sharing": int(sizes[sizes > 1].sum()),
        "largest": int(sizes.max()),
        "sampled": len(own),
        "k": int(true.shape[1]),
    }
