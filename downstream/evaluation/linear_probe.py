"""Can a linear classifier read labels from vectors? Held-out accuracy against the commonest label. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlm2rec.downstream.evaluation.metrics import Difference, paired_bootstrap
from vlm2rec.embedder.contract.errors import DataError

LEAST_OF_A_LABEL = 8
LEAST_HELD_OUT = 20
_HELD_OUT = 0.25
_STRENGTHS = (1e-1, 1.0, 1e1, 1e2, 1e3, 1e4)  # of the ridge penalty, on standardised vectors


class LinearProbe(NamedTuple):
    """What a linear classifier reads."""

    accuracy: float  # on held-out vectors
    commonest: float  # that of always saying the label that is commonest in training
    gain: Difference  # accuracy - commonest, with its bootstrap interval over the held-out vectors
    labels: int
    train: int
    held_out: int


def linear_probe(vectors: np.ndarray, labels: Sequence[str | None], seed: int = 0) -> LinearProbe:
    """Train a ridge classifier on three quarters of the labelled vectors, and measure it on the others.

    Vectors without a label, and of labels that fewer than `LEAST_OF_A_LABEL` vectors have, are left out. Of equal
    vectors only the first counts: the classifier would know the second. The penalty is chosen within the training part.

    Args:
        vectors: n vectors, (n, d).
        labels: their labels; None or "" is no label.
        seed: seed of the split.

    Raises:
        DataError: a vector is not finite, or there are too few labelled vectors or only one label.
    """
    vectors = np.asarray(vectors, np.float64)
    if vectors.ndim != 2 or len(vectors) != len(labels) or not np.isfinite(vectors).all():
        raise DataError(f"vectors of shape {vectors.shape}, {len(labels)} labels", "as many finite vectors as labels")
    _, first = np.unique(vectors, axis=0, return_index=True)
    rows = np.array([row for row in np.sort(first) if labels[row]], np.int64)
    _, truth, counts = np.unique([labels[row] for row in rows], return_inverse=True, return_counts=True)
    common = counts >= LEAST_OF_A_LABEL
    rows, truth = rows[common[truth]], truth[common[truth]]
    held = int(len(rows) * _HELD_OUT)
    if common.sum() < 2 or held < LEAST_HELD_OUT:
        raise DataError(
            f"{len(rows)} different vectors with {common.sum()} labels, counting only labels of"
            f" {LEAST_OF_A_LABEL} or more vectors",
            f"at least two such labels and {round(LEAST_HELD_OUT / _HELD_OUT)} vectors",
        )
    _, truth = np.unique(truth, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(rows))
    test, train = order[:held], order[held:]
    inner = len(train) // 4
    strength = max(
        _STRENGTHS,
        key=lambda each: (
            _said(vectors[rows], truth, train[inner:], train[:inner], each) == truth[train[:inner]]
        ).mean(),
    )
    right = (_said(vectors[rows], truth, train, test, strength) == truth[test]).astype(float)
    plain = (truth[test] == np.bincount(truth[train]).argmax()).astype(float)
    return LinearProbe(
        float(right.mean()),
        float(plain.mean()),
        paired_bootstrap(right, plain),
        int(common.sum()),
        len(train),
        len(test),
    )


def _said(vectors: np.ndarray, truth: np.ndarray, train: np.ndarray, test: np.ndarray, strength: float) -> np.ndarray:
    """Return the labels that a ridge classifier trained on some rows gives to others."""
    mean, spread = vectors[train].mean(axis=0), vectors[train].std(axis=0)
    scaled = (vectors - mean) / np.where(spread > 0, spread, 1)
    answers = np.eye(truth.max() + 1)[truth[train]]
    level = answers.mean(axis=0)
    x = scaled[train]
    if x.shape[1] <= x.shape[0]:
        weights = np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ (answers - level))
    else:  # the same solution, from the smaller matrix
        weights = x.T @ np.linalg.solve(x @ x.T + strength * np.eye(x.shape[0]), answers - level)
    return np.asarray((scaled[test] @ weights + level).argmax(axis=1))
