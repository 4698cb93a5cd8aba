"""Is one method better than another? Paired tests over seeds and users, corrected for many comparisons. NumPy only.

Two questions, two tests. Over *seeds*, the paired t-test of the paper: would other training runs agree? Over *users*,
the paired bootstrap of `metrics.paired_bootstrap`: would other users agree? With five seeds the first has four degrees
of freedom. The second is the stronger test, but covers only the runs that were made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlm2rec.downstream.evaluation.metrics import Difference, paired_bootstrap
from vlm2rec.embedder.contract.errors import DataError


class Spread(NamedTuple):
    """Mean and standard deviation over runs."""

    mean: float
    std: float  # n - 1 in the denominator; 0 for a single run
    runs: int


class TTest(NamedTuple):
    """A two-sided paired t-test."""

    difference: float  # mean of a - b
    t: float  # NaN if the test is not defined
    p: float  # NaN with fewer than two pairs


class Comparison(NamedTuple):
    """Method a against method b in one metric."""

    seeds: TTest
    users: Difference


def spread(values: Sequence[float] | np.ndarray) -> Spread:
    """Return mean and sample standard deviation; raise `DataError` when there is no value or one is NaN."""
    numbers = _numbers(values, "values")
    if len(numbers) == 0:
        raise DataError("there is no run to average over", "at least one run")
    return Spread(float(numbers.mean()), float(numbers.std(ddof=1)) if len(numbers) > 1 else 0.0, len(numbers))


def paired_t_test(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> TTest:
    """Return the two-sided paired t-test of a - b, df = n - 1.

    If all differences are equal, p is 1 if they are 0, else p is 0 and t is ±infinity.

    Args:
        a: one method's metric, one value per seed.
        b: the other's for the same seeds in the same order.

    Raises:
        DataError: the two differ in length, are empty or hold NaN.
    """
    a, b = _numbers(a, "values"), _numbers(b, "values")
    if a.shape != b.shape or len(a) == 0:
        raise DataError(f"the two methods have {len(a)} and {len(b)} runs", "the same seeds in both, at least one")
    differences = a - b
    mean = float(differences.mean())
    if len(differences) == 1:
        return TTest(mean, math.nan, math.nan)
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    # equal differences may differ in their last bits by rounding, which must not count as spread
    if error <= 1e-14 * max(float(np.abs(a).max()), float(np.abs(b).max())):
        return TTest(mean, math.nan, 1.0) if abs(mean) <= 1e-14 else TTest(mean, math.copysign(math.inf, mean), 0.0)
    t = mean / error
    return TTest(mean, t, t_tail(t, len(differences) - 1))


def t_tail(t: float, df: int) -> float:
    """Return P(|T| >= |t|) of Student's t with `df` degrees of freedom, 1 or more."""
    from scipy.special import stdtr  # the function behind scipy.stats.t, which takes four times as long to load

    return 2 * float(stdtr(df, -abs(t)))


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return p-values adjusted by Holm's step-down method, in the given order; NaN stays NaN and does not count.

    The k-th smallest of m is multiplied by m - k + 1, and no adjusted value may be below the previous one.
    """
    p = np.asarray(p_values, np.float64)
    adjusted = np.full(p.shape, np.nan)
    known = np.flatnonzero(~np.isnan(p))
    if np.any((p[known] < 0) | (p[known] > 1)):
        raise DataError(f"p-values {p[known].tolist()}", "numbers between 0 and 1")
    order = known[np.argsort(p[known], kind="stable")]
    scaled = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return adjusted


def compare(a_runs: np.ndarray, b_runs: np.ndarray, draws: int = 10_000, seed: int = 0) -> Comparison:
    """Compare two methods run with the same seeds on the same users.

    Args:
        a_runs: one method's metric per seed and user, (S, U).
        b_runs: the other's, in the same order.
        draws: bootstrap resamples.
        seed: seed of the resampling.

    Returns:
        The t-test over the seeds' means, and the bootstrap interval over users of each user's mean over seeds.
    """
    a_runs, b_runs = np.asarray(a_runs, np.float64), np.asarray(b_runs, np.float64)
    if a_runs.ndim != 2 or a_runs.shape != b_runs.shape:
        raise DataError(f"the runs have shapes {a_runs.shape} and {b_runs.shape}", "(seeds, users), the same in both")
    over_seeds = paired_t_test(a_runs.mean(axis=1), b_runs.mean(axis=1))
    # rounded, so that equal differences count as equal even if they were summed in another order
    over_users = paired_bootstrap(a_runs.mean(axis=0).round(12), b_runs.mean(axis=0).round(12), draws, seed)
    return Comparison(over_seeds, over_users)


def resampled_means(columns: np.ndarray, draws: int = 10_000, seed: int = 0) -> np.ndarray:
    """Return the means of several columns over resamples of the users, (draws, k).

    A resampled user brings the values of all columns, so that any function of the means, such as the difference of two
    ratios, has its bootstrap distribution in the rows.

    Args:
        columns: k values per user, (U, k), finite.
        draws: resamples.
        seed: seed of the resampling; the same seed gives the same resamples of equally many users.

    Raises:
        DataError: there is no user, or a value is not finite.
    """
    columns = np.asarray(columns, np.float64)
    if columns.ndim != 2 or not len(columns) or not np.isfinite(columns).all():
        raise DataError(f"columns of shape {columns.shape}, or one value is not finite", "(users, k) finite numbers")
    users, generator, found = len(columns), np.random.default_rng(seed), []
    for start in range(0, draws, _RESAMPLES):
        counts = np.empty((min(_RESAMPLES, draws - start), users))
        for row in counts:  # how often this resample has each user
            row[:] = np.bincount(generator.integers(users, size=users), minlength=users)
        found.append(counts @ columns / users)
    return np.concatenate(found)


_RESAMPLES = 256  # in memory at a time


def bootstrap_interval(value: float, resamples: np.ndarray, level: float = 0.95) -> Difference:
    """Return a value with the percentile interval of its resamples, (draws,)."""
    low, high = np.quantile(np.round(resamples, 12), [(1 - level) / 2, (1 + level) / 2])
    return Difference(value, float(low), float(high))


def bootstrap_p(resamples: np.ndarray) -> float:
    """Return the two-sided p-value of "the value is 0" from its resamples, (draws,).

    Twice the smaller share of resamples on one side of 0, with 0 on both sides and one resample added: never 0.
    """
    rounded = np.round(resamples, 12)
    side = min(np.count_nonzero(rounded <= 0), np.count_nonzero(rounded >= 0))
    return min(1.0, 2 * (side + 1) / (len(rounded) + 1))


def t_quantile(share: float, df: int) -> float:
    """Return the value below which Student's t with `df` degrees of freedom is with probability `share`."""
    from scipy.special import stdtrit

    return float(stdtrit(df, share))


def _numbers(values: Sequence[float] | np.ndarray, what: str) -> np.ndarray:
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or np.isnan(numbers).any():
        raise DataError(f"{what} of shape {numbers.shape}, {int(np.isnan(numbers).sum())} NaN", "a row of numbers")
    return numbers
