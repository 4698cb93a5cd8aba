"""Residual k-means: each level codes what the levels before it have left over.

    r_1 = x,   c_l = argmin_k |r_l − e_l,k|²,   r_{l+1} = r_l − e_l,c_l,   x ≈ Σ_l e_l,c_l

This is RQ-VAE's quantiser (TIGER, arXiv 2305.05065) without the autoencoder around it, as FAISS trains it.
"""

from __future__ import annotations

from dataclasses import dataclass

import faiss
import numpy as np

from vlm2rec.embedder.contract.errors import ConfigError

_ROUNDS = 25  # of k-means
_BALANCED_ROUNDS = 5  # of balanced assignment and new means, after k-means
_BLOCK = 16_384  # vectors coded at a time


@dataclass(frozen=True)
class Codebook:
    """The codewords of every level, (L, K, d) float32."""

    codewords: np.ndarray

    @property
    def levels(self) -> int:
        """Number of levels L."""
        return len(self.codewords)

    @property
    def size(self) -> int:
        """Codewords K of a level."""
        return int(self.codewords.shape[1])

    @property
    def dim(self) -> int:
        """Length d of a vector."""
        return int(self.codewords.shape[2])

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Return the codes of vectors (n, d), (n, L) int32: the nearest codeword of each level."""
        codes = np.empty((len(vectors), self.levels), np.int32)
        for start in range(0, len(vectors), _BLOCK):
            rest = vectors[start : start + _BLOCK].astype(np.float32, copy=True)
            for level, words in enumerate(self.codewords):
                nearest = distances(rest, words).argmin(axis=1)
                codes[start : start + _BLOCK, level] = nearest
                rest -= words[nearest]
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Return what codes (n, l) stand for, (n, d) float32; with l < L, as far as these levels tell."""
        levels = range(codes.shape[1])
        return np.asarray(sum(self.codewords[level, codes[:, level]] for level in levels), np.float32)


def train(
    vectors: np.ndarray,
    levels: int,
    size: int,
    seed: int,
    *,
    balanced: bool = False,
) -> Codebook:
    """Train a codebook on vectors (n, d).

    Args:
        vectors: all items, or a sample.
        levels: L.
        size: K.
        seed: seed of k-means; level l takes seed + l.
        balanced: move the codewords to where `assign_evenly` puts them.

    Raises:
        ConfigError: fewer vectors than codewords.
    """
    if len(vectors) < size:
        raise ConfigError(
            f"--codebook {size} and {len(vectors):,} vectors",
            "at most one codeword for each vector, better for every two",
            f"use --codebook {max(1, len(vectors) // 2)} or fewer",
        )
    rest = np.ascontiguousarray(vectors, np.float32).copy()
    codewords = np.empty((levels, size, vectors.shape[1]), np.float32)
    for level in range(levels):
        means = faiss.Kmeans(
            vectors.shape[1],
            size,
            niter=_ROUNDS,
            seed=seed + level,
            min_points_per_centroid=1,
            max_points_per_centroid=len(rest),  # FAISS would draw a sample of its own
        )
        start = _means_of_groups(rest, size, seed + level) if level and not balanced else None
        means.train(rest, init_centroids=start)
        words = np.asarray(means.centroids, np.float32).reshape(size, -1)
        for _ in range(_BALANCED_ROUNDS if balanced else 0):
            words = _means(rest, assign_evenly(distances(rest, words)), words)
        codes = assign_evenly(distances(rest, words)) if balanced else distances(rest, words).argmin(axis=1)
        rest -= words[codes]
        codewords[level] = words
    return Codebook(codewords)


def _means_of_groups(rest: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Return where k-means starts on what an earlier level left over, (size, d): the means of as many random groups.

    Single vectors would be bad starts. What is left over points everywhere and its length varies: nearly all vectors
    are nearest to the shortest start, and most other codewords keep one vector each.
    """
    groups = np.random.default_rng(seed).permutation(len(rest)) % size
    return _means(rest, groups, np.zeros((size, rest.shape[1]), np.float32)).astype(np.float32)


def _means(rest: np.ndarray, codes: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Return the mean of the vectors with each code, (K, d); that of a code without any is its word."""
    counts = np.bincount(codes, minlength=len(words))
    sums = np.zeros_like(words)
    np.add.at(sums, codes, rest)
    return np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], words)


def distances(vectors: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Return squared L2 distances less |vector|², which is the same for all words, (n, K) float32."""
    far: np.ndarray = np.square(words).sum(axis=1) - 2 * vectors @ words.T
    return far.astype(np.float32, copy=False)


def assign_evenly(costs: np.ndarray) -> np.ndarray:
    """Assign items to codewords so that none has more than ⌈n / K⌉ of them, (n,) int.

    Deferred acceptance (Gale and Shapley): every item asks for the nearest codeword that has not turned it away, and a
    codeword keeps the nearest of those that ask. No item and codeword would both gain by leaving their own.

    Args:
        costs: (n, K) distances; overwritten.
    """
    count, size = costs.shape
    room = -(-count // size)
    choice = costs.argmin(axis=1)
    while True:
        order = np.lexsort((costs[np.arange(count), choice], choice))
        sorted_choice = choice[order]
        first = np.searchsorted(sorted_choice, sorted_choice)
        refused = order[np.arange(count) - first >= room]
        if not len(refused):
            return choice
        costs[refused, choice[refused]] = np.inf
        choice[refused] = costs[refused].argmin(axis=1)


def unique_level(codes: np.ndarray, taken: np.ndarray | None = None) -> np.ndarray:
    """Return a last code that tells items with the same codes apart: 0, 1, ... in their order, (n,) int32.

    Args:
        codes: (n, L).
        taken: codes of earlier items, with their last code, (m, L + 1); numbers go on where theirs end.
    """
    earlier = np.empty((0, codes.shape[1] + 1), codes.dtype) if taken is None else taken
    every = np.concatenate([earlier[:, :-1], codes])
    _, group = np.unique(every, axis=0, return_inverse=True)
    group = group.reshape(-1)
    begin = np.zeros(group.max(initial=-1) + 1, np.int64)
    np.maximum.at(begin, group[: len(earlier)], earlier[:, -1].astype(np.int64) + 1)
    own = group[len(earlier) :]
    order = np.argsort(own, kind="stable")
    place = np.empty(len(own), np.int64)
    place[order] = np.arange(len(own)) - np.searchsorted(own[order], own[order])
    return (begin[own] + place).astype(np.int32)
