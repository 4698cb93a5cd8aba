"""Ranking metrics against typed-out tables and against counting every order of the tied items."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from vlm2rec.downstream.evaluation.metrics import (
    bound_check,
    candidate_scores,
    counts_among_all,
    distinct_rows,
    expected_metrics,
    full_ranking_counts,
    mean_over_users,
    paired_bootstrap,
    rank_metrics,
    seen_items,
    user_metrics,
)
from vlm2rec.downstream.table import unit_rows
from vlm2rec.embedder.contract.errors import ConfigError, DataError


def brute_force(positive: float, negatives: list[float], k: int) -> tuple[float, float]:
    """Hit and NDCG at k as means over every order of the candidates that is sorted by score."""
    candidates = [("positive", positive), *((f"n{j}", s) for j, s in enumerate(negatives))]
    hits, gains = [], []
    for order in itertools.permutations(candidates):
        scores = [score for _, score in order]
        if scores == sorted(scores, reverse=True):
            rank = [name for name, _ in order].index("positive") + 1
            hits.append(1.0 if rank <= k else 0.0)
            gains.append(1 / math.log2(rank + 1) if rank <= k else 0.0)
    return sum(hits) / len(hits), sum(gains) / len(gains)


# --- values -------------------------------------------------------------------------------------------------
def test_a_hand_written_table() -> None:
    positive = np.array([0.9, 0.5, 0.5, 0.1])
    negatives = np.array(
        [
            [0.1, 0.2, 0.3, 0.4],  # rank 1: gain 1
            [0.6, 0.4, 0.3, 0.2],  # rank 2: gain 1/log2(3) = 0.6309
            [0.5, 0.6, 0.7, 0.1],  # rank 3 or 4: gains 0.5 and 0.4307
            [0.4, 0.3, 0.2, 0.9],  # rank 5
        ]
    )
    users = user_metrics(positive, negatives, k=(1, 3, 5))
    assert users["H@1"].tolist() == [1, 0, 0, 0]
    assert users["H@3"].tolist() == [1, 1, 0.5, 0]
    assert users["H@5"].tolist() == [1, 1, 1, 1]
    assert users["N@3"].tolist() == pytest.approx([1, 0.6309297536, 0.25, 0])
    assert users["N@5"].tolist() == pytest.approx([1, 0.6309297536, 0.4653382790, 0.3868528072])
    means = rank_metrics(positive, negatives, k=(1, 3, 5))
    assert list(means) == ["H@1", "N@1", "H@3", "N@3", "H@5", "N@5"]
    assert means["H@3"] == 0.625 and means["N@5"] == pytest.approx(0.6207802100)


@pytest.mark.parametrize("seed", range(6))
def test_ties_equal_the_mean_over_all_their_orders(seed: int) -> None:
    generator = np.random.default_rng(seed)
    positive = generator.integers(0, 3, 6).astype(float)
    negatives = generator.integers(0, 3, (6, 5)).astype(float)  # three values among six candidates: ties everywhere
    found = user_metrics(positive, negatives, k=(1, 2, 4, 10))
    for u in range(6):
        for k in (1, 2, 4, 10):
            hit, gain = brute_force(positive[u], negatives[u].tolist(), k)
            assert found[f"H@{k}"][u] == pytest.approx(hit, abs=1e-12)
            assert found[f"N@{k}"][u] == pytest.approx(gain, abs=1e-12)


@pytest.mark.parametrize("users", [1, 3, 49, 610, 4097])
def test_a_constant_scorer_scores_exactly_ten_of_101(users: int) -> None:
    found = rank_metrics(np.zeros(users), np.zeros((users, 100)))
    assert found["H@10"] == 10 / 101 and found["H@20"] == 20 / 101
    assert found["N@10"] == pytest.approx(4.543559338 / 101, abs=1e-9)  # 4.5436 = sum of 1/log2(r + 1), r = 1 ... 10
    assert list(found) == ["H@10", "N@10", "H@20", "N@20"]


def test_a_random_scorer_stands_at_the_floor() -> None:
    generator = np.random.default_rng(0)
    found = rank_metrics(generator.random(40_000), generator.random((40_000, 100)))
    # four standard errors: 4·sqrt(p(1 - p)/40000)
    assert found["H@10"] == pytest.approx(0.0990, abs=0.006)
    assert found["H@20"] == pytest.approx(0.1980, abs=0.008)


def test_more_cutoff_than_candidates_is_a_sure_hit() -> None:
    assert rank_metrics(np.array([0.0]), np.array([[1.0, 2.0]]), k=(10,)) == {"H@10": 1.0, "N@10": 0.5}


def test_only_the_order_of_scores_matters() -> None:
    generator = np.random.default_rng(1)
    positive, negatives = generator.normal(size=30), generator.normal(size=(30, 100))
    assert rank_metrics(positive, negatives) == rank_metrics(np.exp(positive), np.exp(negatives))
    order = generator.permutation(30)
    assert rank_metrics(positive[order], negatives[order][:, ::-1]) == rank_metrics(positive, negatives)


def test_infinite_scores_are_ordered_and_nan_is_refused() -> None:
    assert rank_metrics(np.array([-np.inf]), np.array([[-np.inf, 0.0]]), k=(2,))["H@2"] == 0.5
    for positive, negatives in (([np.nan], [[0.0]]), ([0.0], [[np.nan]])):
        with pytest.raises(DataError, match=r"1 of 1 .* are NaN"):
            rank_metrics(np.array(positive), np.array(negatives))


def test_impossible_input_is_refused() -> None:
    with pytest.raises(DataError, match="no user"):
        rank_metrics(np.empty(0), np.empty((0, 100)))
    with pytest.raises(DataError, match=r"\(3,\)"):
        rank_metrics(np.zeros(3), np.zeros((2, 100)))
    with pytest.raises(ConfigError, match="cut-off 0"):
        expected_metrics(np.zeros(1, int), np.zeros(1, int), k=(0,))


# --- the self-check -----------------------------------------------------------------------------------------
def test_every_real_ranking_passes_the_bound_check() -> None:
    generator = np.random.default_rng(2)
    users = expected_metrics(generator.integers(0, 40, 500), generator.integers(0, 30, 500))
    assert bound_check(users) and bound_check(mean_over_users(users))


@pytest.mark.parametrize(("rank", "gain", "beyond"), [(11, 0.2789429456, 0.001), (20, 0.2276702487, -0.001)])
def test_the_bounds_are_reached_at_ranks_11_and_20(rank: int, gain: float, beyond: float) -> None:
    found = mean_over_users(expected_metrics(np.array([rank - 1]), np.array([0])))
    assert found["H@10"] == 0 and found["H@20"] == 1 and found["N@20"] == pytest.approx(gain)
    assert bound_check(found)
    assert bound_check({**found, "N@20": gain - beyond})
    assert not bound_check({**found, "N@20": gain + beyond})


def test_the_bound_check_tells_sound_printed_tables_from_unsound_ones() -> None:
    sound = {"H@10": 0.5644, "H@20": 0.6822, "N@10": 0.3824, "N@20": 0.4121}  # four decimals
    assert bound_check(sound, tolerance=1.3e-4)
    assert not bound_check({**sound, "N@20": 0.3700}, tolerance=1.3e-4)  # NDCG falls as k grows
    assert not bound_check({**sound, "N@20": 0.4300}, tolerance=1.3e-4)  # more gain than the new hits can bring
    assert not bound_check({**sound, "H@20": 0.5500}, tolerance=1.3e-4)  # hits fall as k grows


def test_one_unsound_user_among_sound_ones_is_found() -> None:
    users = expected_metrics(np.array([0, 12, 30]), np.array([0, 0, 0]))
    assert bound_check(users)
    users["N@20"][1] += 0.1
    assert not bound_check(users)


# --- scores -------------------------------------------------------------------------------------------------
def world(users: int, items: int, dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(users, dim)).astype(np.float32), generator.normal(size=(items, dim)).astype("f4")


def test_candidate_scores_are_dot_products() -> None:
    users, items = world(5, 9, 4, seed=3)
    positives, negatives = np.array([0, 1, 2, 3, 4]), np.array([[5, 6], [6, 7], [7, 8], [8, 5], [0, 0]])
    positive, negative = candidate_scores(users, items, positives, negatives)
    for u in range(5):
        assert positive[u] == pytest.approx(float(users[u] @ items[positives[u]]), abs=1e-5)
        assert negative[u].tolist() == pytest.approx([float(users[u] @ items[j]) for j in negatives[u]], abs=1e-5)


# shapes at which OpenBLAS gives equal columns of one product different last bits
@pytest.mark.parametrize(("users", "items", "dim"), [(1, 101, 7), (1, 203, 16), (3, 105, 33), (33, 203, 100)])
def test_a_collapsed_table_ranks_like_a_constant_scorer(users: int, items: int, dim: int) -> None:
    vectors, point = world(users, 1, dim, seed=4)
    table = np.repeat(point, items, axis=0)
    targets = np.arange(users)
    higher, ties = full_ranking_counts(vectors, table, targets, np.empty(0, int), np.zeros(users + 1, int))
    assert higher.tolist() == [0] * users and ties.tolist() == [items - 1] * users
    assert mean_over_users(expected_metrics(higher, ties))["H@10"] == 10 / items
    negatives = np.tile(np.arange(items - 100, items), (users, 1))
    assert rank_metrics(*candidate_scores(vectors, table, targets, negatives))["H@10"] == 10 / 101


def test_identical_vectors_among_others_tie_exactly() -> None:
    users, items = world(20, 301, 33, seed=5)
    items[[3, 150, 299, 300]] = items[0]
    nothing = np.empty(0, np.int64), np.zeros(21, np.int64)
    _, ties = full_ranking_counts(users, items, np.full(20, 300), *nothing)
    assert ties.tolist() == [4] * 20
    positive, negatives = candidate_scores(users, items, np.zeros(20, int), np.tile([3, 7, 150, 300], (20, 1)))
    assert (negatives == positive[:, None]).sum(axis=1).tolist() == [3] * 20


def test_distinct_rows_reconstruct_the_table() -> None:
    table = np.array([[1, 2], [3, 4], [1, 2], [0, 9], [3, 4]], np.float32)
    rows, position = distinct_rows(table)
    assert len(rows) == 3 and np.array_equal(rows[position], table)
    rows, position = distinct_rows(table[[0, 1, 3]])
    assert np.array_equal(rows, table[[0, 1, 3]]) and position.tolist() == [0, 1, 2]


def test_unit_rows_leave_zero_and_dtype_alone() -> None:
    found = unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32))
    assert found.dtype == np.float32 and found.tolist() == [pytest.approx([0.6, 0.8]), [0, 0]]


# --- full ranking -------------------------------------------------------------------------------------------
def test_full_ranking_on_a_hand_written_table() -> None:
    items = np.array([[5.0], [4.0], [3.0], [3.0], [2.0], [1.0]])
    users = np.array([[1.0], [1.0], [-1.0]])
    targets = np.array([3, 4, 1])
    seen = seen_items([np.array([0]), np.array([0, 1, 0]), np.array([1, 5])])  # user 1 saw item 0 twice,
    found = full_ranking_counts(users, items, targets, *seen)  # and user 2's target is one of the items they had seen
    assert found.higher.tolist() == [1, 2, 3]  # item 1; items 2, 3; items 2, 3, 4 (item 5 was seen)
    assert found.ties.tolist() == [1, 0, 0]  # item 2 has item 3's vector


@pytest.mark.parametrize("max_scores", [1, 40, 100, 10**6])
def test_full_ranking_equals_counting_item_by_item(max_scores: int) -> None:
    generator = np.random.default_rng(6)
    # small whole numbers: exact in float32, with ties by the dozen
    users, items = generator.integers(-2, 3, (17, 3)).astype("f4"), generator.integers(-2, 3, (40, 3)).astype("f4")
    targets = generator.integers(0, 40, 17)
    histories = [generator.integers(0, 40, generator.integers(0, 12)) for _ in range(17)]
    found = full_ranking_counts(users, items, targets, *seen_items(histories), max_scores=max_scores)
    for u in range(17):
        rivals = [j for j in range(40) if j != targets[u] and j not in set(histories[u].tolist())]
        own = users[u] @ items[targets[u]]
        assert found.higher[u] == sum(bool(users[u] @ items[j] > own) for j in rivals)
        assert found.ties[u] == sum(bool(users[u] @ items[j] == own) for j in rivals)
    assert found.ties.sum() > 20


def test_counts_among_all_takes_a_recommenders_scores_and_leaves_them_unchanged() -> None:
    scores = np.array([[0.1, 0.5, 0.5, 0.9], [0.4, 0.3, 0.2, 0.1]])
    before = scores.copy()
    found = counts_among_all(scores, np.array([1, 3]), np.array([3, 0, 0, 1]), np.array([0, 1, 4]))
    assert found.higher.tolist() == [0, 1] and found.ties.tolist() == [1, 0]
    assert np.array_equal(scores, before)
    with pytest.raises(DataError, match="NaN"):
        counts_among_all(np.array([[np.nan, 0.0]]), np.array([1]), np.empty(0, int), np.array([0, 0]))


def test_seen_items_are_the_sequence_and_what_came_later() -> None:
    train = [np.array([4, 2]), np.array([], int), np.array([7])]
    rows, offsets = seen_items(train)
    assert rows.tolist() == [4, 2, 7] and offsets.tolist() == [0, 2, 2, 3]
    rows, offsets = seen_items(train, np.array([1, 2, 3]))
    assert rows.tolist() == [4, 2, 1, 2, 7, 3] and offsets.tolist() == [0, 3, 4, 6]


def test_vectors_that_are_not_finite_are_refused_by_row() -> None:
    users, items = world(2, 4, 3, seed=7)
    items[2, 1] = np.nan
    with pytest.raises(DataError, match="1 of 4 item vectors are not finite, the first at row 2"):
        full_ranking_counts(users, items, np.array([0, 1]), np.empty(0, int), np.zeros(3, int))
    with pytest.raises(DataError, match="item vectors"):
        candidate_scores(users, items, np.array([0, 1]), np.array([[1], [0]]))


# --- comparison ---------------------------------------------------------------------------------------------
def test_bootstrap_interval_of_equal_systems_is_a_point() -> None:
    values = np.random.default_rng(8).random(50)
    assert paired_bootstrap(values, values) == (0.0, 0.0, 0.0)
    shifted = paired_bootstrap(np.ones(50), np.full(50, 0.75))
    assert shifted == pytest.approx((0.25, 0.25, 0.25))


def test_bootstrap_agrees_with_resampling_user_by_user() -> None:
    generator = np.random.default_rng(9)
    a, b = generator.integers(0, 2, 200).astype(float), generator.integers(0, 2, 200) * 0.63
    means = (a - b)[generator.integers(0, 200, (20_000, 200))].mean(axis=1)
    low, high = np.quantile(means, [0.05, 0.95])
    found = paired_bootstrap(a, b, draws=20_000, level=0.9)
    assert found.mean == pytest.approx((a - b).mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=3e-3)
    assert found.low < found.mean < found.high


def test_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(10)
    covered = 0
    for seed in range(300):
        a, b = generator.normal(0.2, 1, 100), generator.normal(0, 1, 100)
        _, low, high = paired_bootstrap(a, b, draws=400, seed=seed, level=0.9)
        covered += low <= 0.2 <= high
    assert 0.84 <= covered / 300 <= 0.95


def test_bootstrap_depends_on_the_seed_alone() -> None:
    generator = np.random.default_rng(11)
    a, b = generator.random(3000), generator.random(3000)
    first = paired_bootstrap(a, b, draws=3000, seed=1)  # more than one block of draws
    order = generator.permutation(3000)
    assert paired_bootstrap(a[order], b[order], draws=3000, seed=1) == first
    assert paired_bootstrap(a, b, draws=3000, seed=2) != first
    wider = paired_bootstrap(a, b, draws=3000, seed=1, level=0.99)
    assert wider.low < first.low and wider.high > first.high


def test_bootstrap_refuses_unpaired_input() -> None:
    with pytest.raises(DataError, match="same users"):
        paired_bootstrap(np.zeros(3), np.zeros(4))
    with pytest.raises(DataError, match="NaN"):
        paired_bootstrap(np.array([0.0, np.nan]), np.zeros(2))
    with pytest.raises(DataError, match="no user"):
        paired_bootstrap(np.empty(0), np.empty(0))
    with pytest.raises(ConfigError, match="level"):
        paired_bootstrap(np.zeros(3), np.zeros(3), level=95)
