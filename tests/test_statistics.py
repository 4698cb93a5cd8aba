"""Paired tests against numbers worked out by hand and against SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from vlm2rec.downstream.evaluation.statistics import compare, holm, paired_t_test, spread, t_tail
from vlm2rec.embedder.contract.errors import DataError


def test_the_spread_divides_by_n_minus_one() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5, math.sqrt(5 / 3), 4))
    assert spread([0.25]) == (0.25, 0.0, 1)


def test_a_paired_t_test_worked_out_by_hand() -> None:
    # differences 1, 2, 3: mean 2, standard deviation 1, t = 2 / (1/√3) = 2√3; df 2 has p = 1 - t/√(2 + t²)
    found = paired_t_test([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert found.difference == pytest.approx(2.0)
    assert found.t == pytest.approx(2 * math.sqrt(3))
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14))


def test_one_degree_of_freedom_is_the_cauchy_distribution() -> None:
    assert t_tail(1.0, 1) == pytest.approx(0.5)  # a quarter of the mass lies above 1
    assert t_tail(0.0, 1) == pytest.approx(1.0)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 9, 10, 29, 200])
@pytest.mark.parametrize("t", [0.0, 0.1, -1.0, 2.776, 12.0, -60.0])
def test_the_tail_is_that_of_scipy(df: int, t: float) -> None:
    assert t_tail(t, df) == pytest.approx(2 * scipy.stats.t.sf(abs(t), df), rel=1e-6, abs=3e-15)


def test_the_paired_t_test_is_that_of_scipy() -> None:
    random = np.random.default_rng(0)
    for count in (2, 3, 5, 8):
        a, b = random.normal(0.3, 0.01, (2, count))
        theirs = scipy.stats.ttest_rel(a, b)
        ours = paired_t_test(a, b)
        assert (ours.t, ours.p) == pytest.approx((theirs.statistic, theirs.pvalue))


def test_differences_without_spread_have_a_plain_answer() -> None:
    same = paired_t_test([0.3, 0.4], [0.3, 0.4])
    assert same.p == 1.0 and math.isnan(same.t) and same.difference == 0.0
    constant = paired_t_test([0.5, 0.75], [0.25, 0.5])
    assert constant.p == 0.0 and constant.t == math.inf
    assert paired_t_test([0.25, 0.5], [0.5, 0.75]).t == -math.inf


def test_a_single_seed_gives_a_difference_and_no_verdict() -> None:
    found = paired_t_test([0.4], [0.3])
    assert found.difference == pytest.approx(0.1)
    assert math.isnan(found.t) and math.isnan(found.p)


def test_holm_worked_out_by_hand() -> None:
    # sorted .01 .02 .03 .04, times 4 3 2 1: .04 .06 .06 .04, made monotone: .04 .06 .06 .06
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.5]) == pytest.approx([1.0, 1.0])
    assert holm([0.04]) == pytest.approx([0.04])


def test_holm_leaves_out_tests_that_were_not_possible() -> None:
    found = holm([math.nan, 0.02, 0.01])
    assert math.isnan(found[0])
    assert found[1:] == pytest.approx([0.02, 0.02])


def test_holm_never_says_less_than_the_plain_p_value() -> None:
    p = np.random.default_rng(1).uniform(0, 1, 40)
    adjusted = holm(p)
    assert (adjusted >= p).all() and (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()


def test_comparing_takes_seeds_for_the_t_test_and_users_for_the_interval() -> None:
    random = np.random.default_rng(2)
    b = random.uniform(0, 1, (5, 200))
    a = b + 0.1 + random.normal(0, 0.2, (5, 200))
    found = compare(a, b, draws=2000)
    theirs = scipy.stats.ttest_rel(a.mean(axis=1), b.mean(axis=1))
    assert found.seeds.p == pytest.approx(theirs.pvalue)
    user_means = (a - b).mean(axis=0)
    assert found.users.mean == pytest.approx(user_means.mean())
    # the percentile interval of a mean is close to mean ± 1.96 standard errors
    error = user_means.std(ddof=1) / math.sqrt(200)
    assert found.users.low == pytest.approx(user_means.mean() - 1.96 * error, abs=0.3 * error)
    assert found.users.high == pytest.approx(user_means.mean() + 1.96 * error, abs=0.3 * error)
    assert found.users.low > 0


def test_runs_that_do_not_pair_are_refused() -> None:
    with pytest.raises(DataError, match="the same seeds"):
        paired_t_test([0.1, 0.2], [0.1])
    with pytest.raises(DataError, match="seeds, users"):
        compare(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(DataError, match="NaN"):
        spread([0.1, math.nan])
    with pytest.raises(DataError, match="between 0 and 1"):
        holm([0.1, 1.2])
