from __future__ import annotations

import math

import numpy as np
import pytest

from vlm2rec.downstream.evaluation.geometry import dispersion, effective_rank, geometry, geometry_from_rows
from vlm2rec.embedder.contract.errors import DataError


def world(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Users, items, each user's positive row and negative rows; positives lean towards their users."""
    generator = np.random.default_rng(seed)
    users, items = generator.normal(size=(12, 6)), generator.normal(size=(30, 6))
    positives, negatives = np.arange(12), generator.integers(12, 30, (12, 5))
    items[:12] += users
    return users.astype(np.float32), items.astype(np.float32), positives, negatives


def reference(users: np.ndarray, positives: np.ndarray, negatives: np.ndarray) -> dict[str, float]:
    """Eqs. 4-5 pair by pair."""

    def distance(a: list[float], b: list[float]) -> float:
        la, lb = math.sqrt(sum(x * x for x in a)), math.sqrt(sum(x * x for x in b))
        return sum((x / la - y / lb) ** 2 for x, y in zip(a, b, strict=True))

    near = [distance(u, p) for u, p in zip(users.tolist(), positives.tolist(), strict=True)]
    far = [distance(u, n) for u, ns in zip(users.tolist(), negatives.tolist(), strict=True) for n in ns]
    pull, push = sum(near) / len(near), sum(far) / len(far)
    uniformity = math.log(sum(math.exp(-2 * d) for d in far) / len(far))
    return {"A_pos": pull, "A_neg": push, "U": uniformity, "S": push / (pull + 1e-8)}


def test_geometry_equals_the_equations() -> None:
    users, items, positives, negatives = world()
    found = geometry(users, items[positives], items[negatives])
    assert list(found) == ["A_pos", "A_neg", "U", "S"]
    assert found == pytest.approx(reference(users, items[positives], items[negatives]), abs=1e-12)


def test_a_hand_written_table() -> None:
    users = np.array([[2.0, 0.0], [0.0, 5.0]])
    positives = np.array([[1.0, 0.0], [1.0, 0.0]])  # same direction: 0; a right angle: 2
    negatives = np.array([[[0.0, 3.0], [-1.0, 0.0]], [[0.0, -7.0], [0.0, 1.0]]])  # 2 and 4; 4 and 0
    found = geometry(users, positives, negatives, eps=0.25)
    assert found["A_pos"] == pytest.approx(1.0) and found["A_neg"] == pytest.approx(2.5)
    assert found["U"] == pytest.approx(math.log((math.exp(-4) + 2 * math.exp(-8) + 1) / 4))
    assert found["S"] == pytest.approx(2.0)


@pytest.mark.parametrize("block", [1, 100, 10**6])
def test_rows_give_what_gathered_vectors_give(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    users, items, positives, negatives = world(1)
    expected = geometry(users, items[positives], items[negatives])
    monkeypatch.setattr("vlm2rec.downstream.evaluation.geometry._BLOCK", block)
    assert geometry_from_rows(users, items, positives, negatives) == expected
    assert geometry(users, items[positives], items[negatives]) == expected


def test_length_of_vectors_does_not_matter() -> None:
    users, items, positives, negatives = world(2)
    scale = np.random.default_rng(3).uniform(0.01, 100, 30)[:, None]
    found = geometry_from_rows(7 * users, scale * items, positives, negatives)
    assert found == pytest.approx(geometry_from_rows(users, items, positives, negatives), rel=1e-6)


def test_a_collapsed_space_has_no_spread() -> None:
    point = np.random.default_rng(4).normal(size=6).astype(np.float32)
    users, items = np.tile(point, (3, 1)), np.tile(2 * point, (8, 1))
    found = geometry_from_rows(users, items, np.arange(3), np.array([[4, 5]] * 3))
    assert found == pytest.approx({"A_pos": 0, "A_neg": 0, "U": 0, "S": 0}, abs=1e-6)


def test_a_nearly_collapsed_space_is_still_measured() -> None:
    # the item is turned away from the user by 1e-4 or 2e-4: squared distances 1e-8 and 4e-8
    def at(angle: float) -> list[float]:
        return [math.cos(angle), math.sin(angle)]

    found = geometry(np.array([at(0)]), np.array([at(1e-4)]), np.array([[at(2e-4)]]), eps=0.0)
    assert found["A_pos"] == pytest.approx(1e-8, rel=1e-6) and found["S"] == pytest.approx(4, rel=1e-6)


def test_vectors_spread_at_random_are_two_apart() -> None:
    generator = np.random.default_rng(5)
    users, positives = generator.normal(size=(2, 200, 256))
    found = geometry(users, positives, generator.normal(size=(200, 20, 256)))
    assert found["A_pos"] == pytest.approx(2, abs=0.05) and found["A_neg"] == pytest.approx(2, abs=0.02)
    assert found["S"] == pytest.approx(1, abs=0.03)
    # Jensen: log E exp(-2d) is at least -2 E d, and near it where all pairs are about as far apart
    assert -2 * found["A_neg"] <= found["U"] <= -2 * found["A_neg"] + 0.1


def test_zero_vectors_count_as_the_origin() -> None:
    users, positives = np.array([[0.0, 0.0], [1.0, 0.0]]), np.array([[3.0, 0.0], [0.0, 0.0]])
    found = geometry(users, positives, np.zeros((2, 1, 2)))
    assert found["A_pos"] == 1.0 and found["A_neg"] == 0.5  # origin to unit vector 1; origin to origin 0


def test_impossible_input_is_refused() -> None:
    users, items, positives, negatives = world(6)
    with pytest.raises(DataError, match=r"\(U, N, d\)"):
        geometry(users, items[positives], items[positives])
    with pytest.raises(DataError, match=r"\(I, d\)"):
        geometry_from_rows(users, items[:, :3], positives, negatives)
    with pytest.raises(DataError, match="0 users"):
        geometry_from_rows(users[:0], items, positives[:0], negatives[:0])
    with pytest.raises(DataError, match="0 negatives"):
        geometry_from_rows(users, items, positives, negatives[:, :0])
    items[negatives[0, 0]] = np.nan
    with pytest.raises(DataError, match="not finite"):
        geometry_from_rows(users, items, positives, negatives)


def test_effective_rank_counts_directions_that_are_used_alike() -> None:
    axes = np.concatenate([np.eye(8), -np.eye(8)])
    for used in (1, 3, 8):
        assert effective_rank(5 * axes[:, :8][np.abs(axes[:, :used]).any(axis=1)]) == pytest.approx(used)
    # variances 4 and 1 about the mean: exp of the entropy of (.8, .2)
    angle = np.array([[2.0, 0], [-2.0, 0], [0, 1.0], [0, -1.0]]) * 1e-3
    cloud = np.concatenate([np.ones((4, 1)), angle], axis=1)
    assert effective_rank(cloud) == pytest.approx(0.8**-0.8 * 0.2**-0.2, rel=1e-5)


def test_effective_rank_ignores_length_and_the_common_direction() -> None:
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(50, 6))
    assert effective_rank(rows * generator.uniform(1, 9, (50, 1))) == pytest.approx(effective_rank(rows))
    narrow = np.concatenate([100 * np.ones((50, 1)), rows], axis=1)
    assert 5 < effective_rank(narrow) <= 6


def test_effective_rank_of_equal_vectors_is_0_whatever_their_rounding() -> None:
    noise = np.random.default_rng(0).normal(size=(20, 8))
    assert effective_rank((np.ones((20, 8)) + 1e-8 * noise).astype(np.float32)) == 0.0
    assert effective_rank(np.zeros((3, 4))) == 0.0


@pytest.mark.parametrize("wrong", [np.ones(4), np.empty((0, 4)), np.array([[1.0, np.nan]])])
def test_effective_rank_refuses_what_is_not_a_table_of_numbers(wrong: np.ndarray) -> None:
    with pytest.raises(DataError):
        effective_rank(wrong)


# --- pairs of one kind --------------------------------------------------------------------------------------


def uniformity_of_pairs(vectors: np.ndarray) -> float:
    units = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float64)
    pairs = [(a, b) for a in range(len(units)) for b in range(len(units)) if a != b]
    return math.log(np.mean([math.exp(-2 * float(np.sum((units[a] - units[b]) ** 2))) for a, b in pairs]))


@pytest.mark.parametrize("block", [1, 100, 10**6])
def test_dispersion_equals_its_formulas(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm2rec.downstream.evaluation.geometry._BLOCK", block)
    users, items, *_ = world(2)
    found = dispersion(users, items)
    assert found["U_users"] == pytest.approx(uniformity_of_pairs(users), abs=1e-6)
    assert found["U_items"] == pytest.approx(uniformity_of_pairs(items), abs=1e-6)
    means = [np.mean(v / np.linalg.norm(v, axis=1, keepdims=True), axis=0) for v in (users, items)]
    assert found["offset"] == pytest.approx(float(np.sum((means[0] - means[1]) ** 2)), abs=1e-6)


def test_two_cones_have_a_low_offset_free_spread_and_a_large_offset() -> None:
    """E ‖s - i‖² = spread of the users + spread of the items + offset, where the spread is 1 - ‖mean‖²."""
    random = np.random.default_rng(3)
    users = np.eye(16)[0] + 0.1 * random.normal(size=(40, 16))
    items = np.eye(16)[1] + 0.1 * random.normal(size=(60, 16))
    found = dispersion(users, items)
    everything = geometry(users, users, np.broadcast_to(items, (40, 60, 16)))
    units = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (users, items)]
    spreads = [1 - float(np.sum(v.mean(axis=0) ** 2)) for v in units]
    assert everything["A_neg"] == pytest.approx(sum(spreads) + found["offset"])
    assert found["offset"] > 1.5 and found["U_items"] > -1 > everything["U"]


def test_of_many_vectors_a_sample_at_even_distances_counts() -> None:
    random = np.random.default_rng(4)
    users, items = random.normal(size=(11, 4)), random.normal(size=(101, 4))
    found = dispersion(users, items, most=11)
    assert found["U_items"] == pytest.approx(uniformity_of_pairs(items[::10]))
    assert found["U_users"] == pytest.approx(uniformity_of_pairs(users))


def test_equal_vectors_and_a_single_one_have_no_spread() -> None:
    found = dispersion(np.ones((1, 3)), np.ones((5, 3)))
    assert found == pytest.approx({"U_users": 0.0, "U_items": 0.0, "offset": 0.0}, abs=1e-12)
    assert dispersion(np.zeros((2, 3)), np.ones((2, 3)))["offset"] == pytest.approx(1.0)


@pytest.mark.parametrize(("users", "items"), [((0, 3), (2, 3)), ((2, 3), (2, 4)), ((3,), (2, 3))])
def test_dispersion_of_shapes_that_do_not_fit_is_refused(users: tuple[int, ...], items: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="users are"):
        dispersion(np.ones(users), np.ones(items))
    with pytest.raises(DataError, match="not finite"):
        dispersion(np.full((2, 3), np.nan), np.ones((2, 3)))
