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


def _numbers(values: Sequence[float] | np.ndarray, what: str) -> np.ndarray:
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or np.isnan(numbers).any():
        raise DataError(f"{what} of shape {numbers.shape}, {int(np.isnan(numbers).sum())} NaN", "a row of numbers")
    return numbers
