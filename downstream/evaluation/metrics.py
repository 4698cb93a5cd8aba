"""Hit rate and NDCG with ties in expectation, full ranking, and the comparison of two systems. NumPy only.

A ranking is given by two counts per user: how many rivals score strictly higher than the positive, and how many score
the same. With ties, a metric is the mean over all their orders. A scorer that gives every candidate the same score
therefore gets k/(N + 1) at H@k, not 0 or 1.

Full ranking leaves out, for each user, the items of the user before the target:

    valid: the train sequence (the later test item competes like any other)
    test:  the train sequence and the validation item

The whole sequence counts, not only the last `max_history` items that a model may see. The target itself is never left
out, even if it also occurs earlier in the sequence. `seen_items` builds these lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from vlm2rec.embedder.contract.errors import ConfigError, DataError

CUTOFFS = (10, 20)


class Counts(NamedTuple):
    """The counts that decide the metrics of a ranking."""

    higher: np.ndarray  # (U,) int64: rivals with a higher score than the positive
    ties: np.ndarray  # (U,) int64: rivals with the same score


class Difference(NamedTuple):
    """Mean per-user difference of two systems with its bootstrap interval."""

    mean: float
    low: float
    high: float


# --- metrics ------------------------------------------------------------------------------------------------
def rank_metrics(positive: np.ndarray, negatives: np.ndarray, k: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """Return {"H@10", "N@10", "H@20", "N@20"} (for the default k), means over users.

    Args:
        positive: score of each user's held-out item, (U,). Only the order of scores matters.
        negatives: scores of each user's other candidates, (U, N), computed the same way: see `candidate_scores`.
        k: cut-offs.

    Raises:
        DataError: a score is NaN, there is no user, or the shapes do not fit.
    """
    return mean_over_users(user_metrics(positive, negatives, k))


def user_metrics(positive: np.ndarray, negatives: np.ndarray, k: Sequence[int] = CUTOFFS) -> dict[str, np.ndarray]:
    """Return the metrics of `rank_metrics` for each user, (U,) float64 each."""
    positive, negatives = np.asarray(positive), np.asarray(negatives)
    if positive.ndim != 1 or negatives.ndim != 2 or len(positive) != len(negatives):
        raise DataError(f"positive scores are {positive.shape}, negative scores {negatives.shape}", "(U,) and (U, N)")
    _refuse_nan(positive, "positive scores")
    _refuse_nan(negatives, "negative scores")
    higher = np.count_nonzero(negatives > positive[:, None], axis=1)
    ties = np.count_nonzero(negatives == positive[:, None], axis=1)
    return expected_metrics(higher, ties, k)


def expected_metrics(higher: np.ndarray, ties: np.ndarray, k: Sequence[int] = CUTOFFS) -> dict[str, np.ndarray]:
    """Return expected hit and NDCG per user, (U,) float64 each, over all orders of the tied items.

    With h rivals higher and t tied, the positive has each of the ranks h+1 ... h+t+1 equally often. A rank r within
    k is a hit and has NDCG 1/log2(r + 1), as there is one relevant item and the ideal DCG is 1.

    Args:
        higher: rivals with a strictly higher score, (U,) integers.
        ties: rivals with the same score, (U,) integers.
        k: cut-offs, 1 or above.
    """
    higher, ties = np.asarray(higher, np.int64), np.asarray(ties, np.int64)
    metrics: dict[str, np.ndarray] = {}
    for cutoff in k:
        if cutoff < 1:
            raise ConfigError(f"cut-off {cutoff}", "an integer of 1 or above", "correct the list of cut-offs")
        rank = np.arange(1, cutoff + 1)
        possible = (rank > higher[:, None]) & (rank <= (higher + ties + 1)[:, None])  # (U, k)
        metrics[f"H@{cutoff}"] = possible.sum(axis=1) / (ties + 1)
        metrics[f"N@{cutoff}"] = possible @ (1 / np.log2(rank + 1)) / (ties + 1)
    return metrics


def random_order(
    items: int, targets: np.ndarray, seen_rows: np.ndarray, seen_offsets: np.ndarray
) -> dict[str, np.ndarray]:
    """Return what a random order of the whole catalogue gives each user, (U,) float64 each: an expectation, not drawn.

    Args:
        items: items in the catalogue, I.
        targets: row of each user's held-out item, (U,).
        seen_rows: rows left out for user u are `seen_rows[seen_offsets[u]:seen_offsets[u + 1]]`, save the target.
        seen_offsets: (U + 1,).
    """
    users = np.arange(len(targets))
    user, row = _distinct_pairs(np.repeat(users, np.diff(seen_offsets)), np.asarray(seen_rows), items)
    left_out = np.bincount(user[row != np.asarray(targets)[user]], minlength=len(users))
    return expected_metrics(np.zeros_like(left_out), items - 1 - left_out)


def retrieval_metrics(means: Mapping[str, float]) -> dict[str, float]:
    """Return recall, NDCG and precision at 20 of the whole catalogue, as the multimodal recommenders are compared by.

    With one relevant item per user, recall is the hit rate, and precision is a twentieth of it.
    """
    return {"R@20": means["H@20"], "N@20": means["N@20"], "P@20": means["H@20"] / 20}


def set_metrics(higher: np.ndarray, ties: np.ndarray, offsets: np.ndarray, k: int = 20) -> dict[str, np.ndarray]:
    """Return recall, NDCG and precision among the first k for users with several targets, (U,) float64 each.

    With n targets of a user, of which the first k hold m: recall m / n, precision m / k, and NDCG the sum of
    1/log2(r + 1) over the ranks r of these m, over that sum for the ranks 1 ... min(n, k): MMRec's formulas. A target
    competes with the user's other targets, and ties count in expectation.

    Args:
        higher: for each target, other items with a strictly higher score, (T,) integers, the other targets too.
        ties: for each target, other items with the same score, (T,) integers.
        offsets: user u's targets are those from offsets[u] to offsets[u + 1], at least one, (U + 1,).
        k: cut-off.
    """
    of_targets = expected_metrics(higher, ties, (k,))
    hits, gain = (np.add.reduceat(of_targets[f"{name}@{k}"], offsets[:-1]) for name in "HN")
    count = np.diff(offsets)
    ideal = np.cumsum(1 / np.log2(np.arange(2, k + 2)))[np.minimum(count, k) - 1]
    return {f"R@{k}": hits / count, f"N@{k}": gain / ideal, f"P@{k}": hits / k}


def mean_over_users(metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the mean of each per-user metric; raise `DataError` when there is no user."""
    return {name: _mean(values) for name, values in metrics.items()}


def bound_check(metrics: Mapping[str, float | np.ndarray], tolerance: float = 1e-9) -> bool:
    """Return whether H@10, H@20, N@10 and N@20 can belong to one ranking with one relevant item per user.

    N@20 exceeds N@10 by the users whose item has a rank from 11 to 20, and each adds between 1/log2(21) = 0.2277 (rank
    20) and 1/log2(12) = 0.2789 (rank 11). As exactly H@20 - H@10 of the users have such a rank,

        (H@20 - H@10) / log2(21)  <=  N@20 - N@10  <=  (H@20 - H@10) / log2(12)

    for every user, for every mean over users and for every mean over tie orders. H@10 <= H@20 follows.

    Args:
        metrics: means, or per-user arrays, which must then all pass.
        tolerance: slack for rounding; 1.3e-4 suits figures printed with four decimals.
    """
    hits = np.asarray(metrics["H@20"], np.float64) - np.asarray(metrics["H@10"], np.float64)
    gain = np.asarray(metrics["N@20"], np.float64) - np.asarray(metrics["N@10"], np.float64)
    low, high = hits / np.log2(21), hits / np.log2(12)
    return bool(np.all((low - tolerance <= gain) & (gain <= high + tolerance)))


# --- groups of users ----------------------------------------------------------------------------------------
TAIL = 4
"""Items with fewer interactions are the long tail (section 3.1.1 of the SDA paper)."""


def tail_users(frequency: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return which users have a target of the long tail, (U,) bool.

    Args:
        frequency: how often each item occurs, (I,): in training, or with the held-out items.
        targets: row of each user's target, (U,).
    """
    return np.asarray(frequency[targets] < TAIL)


def group_means(metrics: Mapping[str, np.ndarray], users: np.ndarray) -> dict[str, float]:
    """Return the mean of each per-user metric over some users, (U,) bool; empty if there are none."""
    return mean_over_users({name: values[users] for name, values in metrics.items()}) if users.any() else {}


# --- scores and counts --------------------------------------------------------------------------------------
def candidate_scores(
    users: np.ndarray, items: np.ndarray, positives: np.ndarray, negatives: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return dot products with the positive, (U,), and with the candidates, (U, N), both float32.

    Candidates whose vector equals the positive's bit for bit get exactly the positive's score. A matrix product alone
    does not ensure that: it sums in another order at the edge of a block, and rounding errors would then rank a
    collapsed table.

    Args:
        users: user vectors, (U, d); for cosines, apply `table.unit_rows` to users and items.
        items: item vectors, (I, d).
        positives: row in `items` of each user's held-out item, (U,).
        negatives: rows of the other candidates, (U, N).
    """
    users, items = _finite(users, "user vectors"), _finite(items, "item vectors")
    rows = np.concatenate([np.asarray(positives)[:, None], negatives], axis=1)  # (U, 1 + N)
    scores = np.empty(rows.shape, np.float32)
    block = max(1, _BLOCK // max(1, rows.shape[1] * items.shape[1]))
    for start in range(0, len(users), block):
        part = slice(start, start + block)
        scores[part] = np.matmul(items[rows[part]], users[part, :, None])[:, :, 0]
    _, vector = distinct_rows(items)
    twins = vector[rows[:, 1:]] == vector[rows[:, :1]]
    return scores[:, 0], np.where(twins, scores[:, :1], scores[:, 1:])


def full_ranking_counts(
    users: np.ndarray,
    items: np.ndarray,
    targets: np.ndarray,
    seen_rows: np.ndarray,
    seen_offsets: np.ndarray,
    *,
    max_scores: int = 2**26,
) -> Counts:
    """Rank each user's target against the whole catalogue by dot product.

    Args:
        users: user vectors, (U, d).
        items: item vectors, (I, d).
        targets: row in `items` of each user's held-out item, (U,).
        seen_rows: rows left out for user u are `seen_rows[seen_offsets[u]:seen_offsets[u + 1]]`, save the target.
        seen_offsets: (U + 1,).
        max_scores: scores held in memory at a time; the default is 256 MB of them.

    Raises:
        DataError: a vector is not finite.
    """
    users, items = _finite(users, "user vectors"), _finite(items, "item vectors")
    targets, seen_offsets = np.asarray(targets), np.asarray(seen_offsets)
    # Each distinct vector is scored once, and all items with this vector get the score, so identical vectors tie
    # exactly. Taking the target's score from the same product is not enough: BLAS sums in another order at the edge
    # of a block, so equal columns of one product may differ in the last bit.
    vectors, vector = distinct_rows(items)
    higher, ties = np.empty(len(users), np.int64), np.empty(len(users), np.int64)
    block = max(1, max_scores // max(1, len(items)))
    for start in range(0, len(users), block):
        part = slice(start, start + block)
        scores = users[part] @ vectors.T  # (block, distinct vectors)
        if len(vectors) < len(items):
            scores = scores[:, vector]  # (block, I)
        offsets = seen_offsets[start : start + block + 1]
        rows = np.asarray(seen_rows)[offsets[0] : offsets[-1]]
        higher[part], ties[part] = counts_among_all(scores, targets[part], rows, offsets - offsets[0])
    return Counts(higher, ties)


def counts_among_all(
    scores: np.ndarray, targets: np.ndarray, seen_rows: np.ndarray, seen_offsets: np.ndarray
) -> Counts:
    """Count each target's rivals in a block of full score rows, such as a recommender's output.

    Args:
        scores: score of every item for every user, (U, I); column i is item row i, with no padding column.
        targets: row of each user's held-out item, (U,).
        seen_rows: rows left out for user u are `seen_rows[seen_offsets[u]:seen_offsets[u + 1]]`, save the target.
        seen_offsets: (U + 1,).

    Raises:
        DataError: a score is NaN.
    """
    _refuse_nan(scores, "scores")
    users = np.arange(len(targets))
    own = scores[users, targets][:, None]  # (U, 1)
    higher = np.count_nonzero(scores > own, axis=1)
    ties = np.count_nonzero(scores == own, axis=1) - 1  # the target ties with itself
    user, row = _distinct_pairs(np.repeat(users, np.diff(seen_offsets)), np.asarray(seen_rows), scores.shape[1])
    rival = row != targets[user]
    user, row = user[rival], row[rival]
    left_out, bar = scores[user, row], own[user, 0]
    higher -= np.bincount(user[left_out > bar], minlength=len(users))
    ties -= np.bincount(user[left_out == bar], minlength=len(users))
    return Counts(higher, ties)


def seen_items(sequences: Sequence[np.ndarray], *later: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each user's items before the target, as (rows, offsets (U + 1,)).

    Args:
        sequences: each user's whole training sequence as item rows.
        later: further items, one per user, (U,) each: nothing to rank the validation item; the validation items to rank
            the test item.
    """
    parts = [np.concatenate([s, *(item[u : u + 1] for item in later)]) for u, s in enumerate(sequences)]
    offsets = np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64)
    rows = np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)
    return rows, offsets


def repeated_lists(rows: np.ndarray, offsets: np.ndarray, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lists of some users, who may occur several times, (rows, offsets (len(users) + 1,))."""
    lengths = np.diff(offsets)[users]
    ends = np.cumsum(lengths)
    inside = np.arange(lengths.sum()) - np.repeat(ends - lengths, lengths)
    return rows[np.repeat(offsets[users], lengths) + inside], np.concatenate([[0], ends]).astype(np.int64)


def distinct_rows(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (the distinct rows of `vectors`, each row's position among them (I,)); rows are compared bit by bit."""
    vectors = np.ascontiguousarray(vectors)
    keys = vectors.view(np.dtype((np.void, vectors.itemsize * vectors.shape[1])))[:, 0]
    _, first, position = np.unique(keys, return_index=True, return_inverse=True)
    if len(first) == len(vectors):  # all are distinct: return the table itself, not a sorted copy
        return vectors, np.arange(len(vectors))
    return vectors[first], position


# --- comparison ---------------------------------------------------------------------------------------------
def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, draws: int = 10_000, seed: int = 0, level: float = 0.95
) -> Difference:
    """Return the mean of a - b over users with its percentile bootstrap interval.

    A resampled user brings the values of both systems. If 0 is outside the interval, the difference is not explained by
    the choice of users.

    Args:
        a: one system's metric per user, (U,).
        b: the other's for the same users in the same order, (U,).
        draws: resamples.
        seed: seed of the resampling; the same seed gives the same interval.
        level: coverage of the interval, between 0 and 1.

    Raises:
        DataError: the arrays differ in shape, are empty or hold NaN.
        ConfigError: `draws` or `level` is out of range.
    """
    if draws < 1 or not 0 < level < 1:
        raise ConfigError(f"draws={draws}, level={level}", "draws of 1 or above and a level between 0 and 1")
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise DataError(f"the two systems have metrics of shapes {a.shape} and {b.shape}", "the same users in both")
    difference = a - b
    mean = _mean(difference)
    # Metrics take few distinct values. How often a resample holds each of them is multinomial: the same distribution
    # as drawing U users with replacement, without drawing them one by one.
    values, counts = np.unique(difference, return_counts=True)
    generator = np.random.default_rng(seed)
    block = max(1, 2**22 // len(values))
    means = [
        generator.multinomial(len(a), counts / len(a), size=min(block, draws - start)) @ values / len(a)
        for start in range(0, draws, block)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Difference(mean, float(low), float(high))


_BLOCK = 2**24  # float32 numbers of a gathered block: 64 MB


def _mean(values: np.ndarray) -> float:
    """Return the correctly rounded mean: equal values have exactly that mean, whatever the order of users."""
    if len(values) == 0:
        raise DataError("there is no user to average over", "at least one user")
    _refuse_nan(values, "metrics")
    distinct, counts = np.unique(values, return_counts=True)
    total = sum(Fraction(value) * count for value, count in zip(distinct.tolist(), counts.tolist(), strict=True))
    return float(total / len(values))


def _distinct_pairs(user: np.ndarray, row: np.ndarray, items: int) -> tuple[np.ndarray, np.ndarray]:
    """Drop repeats, so that an item that occurs twice is left out once."""
    user, row = np.divmod(np.unique(user.astype(np.int64) * items + row), items)
    return user, row


def _refuse_nan(values: np.ndarray, what: str) -> None:
    bad = int(np.isnan(values).sum())
    if bad:
        raise DataError(
            f"{bad} of {np.size(values)} {what} are NaN",
            "numbers",
            "check for items without a vector and for a training run that diverged",
        )


def _finite(vectors: np.ndarray, what: str) -> np.ndarray:
    """Return `vectors` as float32, or raise `DataError` naming the first row that is not finite."""
    vectors = np.asarray(vectors, np.float32)
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise DataError(
            f"{len(bad)} of {len(vectors)} {what} are not finite, the first at row {bad[0]}",
            "finite vectors",
            "leave out items without a vector, or export them again",
        )
    return vectors
