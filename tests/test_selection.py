"""`study --select valid`: trials, the choice among them, and that nothing of the test decides it."""

from __future__ import annotations

import numpy as np
import pytest

from vlm2rec.embedder.contract.errors import DataError
from vlm2rec.pipelines.catalogue.negatives import (
    VALIDATION_SEED,
    Sequences,
    draw_candidates,
    draw_validation_candidates,
)

# --- candidates of validation -------------------------------------------------------------------------------


def drawn_users(count: int, items: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Return training sequences, with repeats, and validation items; the last item of the catalogue is in neither."""
    draw = np.random.default_rng(0)
    train = [draw.integers(0, items - 1, size=draw.integers(1, 9)).astype(np.int32) for _ in range(count)]
    return train, draw.integers(0, items - 1, size=count).astype(np.int32)


def test_candidates_of_validation_are_new_to_the_user_and_the_same_whoever_else_is_ranked() -> None:
    train, targets = drawn_users(200, 60)
    known = {int(item) for items in train for item in items} | set(targets.tolist())
    everyone = draw_validation_candidates(train, targets, np.arange(200), 30)
    assert everyone.shape == (200, 30)
    for user, row in enumerate(everyone.tolist()):
        assert len(set(row)) == 30 and set(row) <= known - {*train[user].tolist(), int(targets[user])}
    some = np.array([3, 17, 180])
    assert np.array_equal(draw_validation_candidates(train, targets, some, 30), everyone[some])


def test_candidates_of_validation_are_of_no_stored_set() -> None:
    train, targets = drawn_users(50, 60)
    own = draw_validation_candidates(train, targets, np.arange(50), 20)
    lengths = np.array([len(items) + 1 for items in train])
    items = np.concatenate([np.append(items, target) for items, target in zip(train, targets, strict=True)])
    sequences = Sequences(items.astype(np.int32), np.concatenate([[0], np.cumsum(lengths)]))
    for seed in range(20):
        assert not np.array_equal(np.sort(own), np.sort(draw_candidates(sequences, range(50), 59, 20, seed)))
    assert np.iinfo(np.int32).max < VALIDATION_SEED  # the type of the stored seeds


def test_a_user_with_few_untouched_items_has_fewer_candidates_and_one_with_none_is_an_error() -> None:
    train = [np.array([0, 1, 2, 2]), np.array([0])]
    targets = np.array([3, 4])
    assert draw_validation_candidates(train, targets, np.arange(2), 3).shape == (2, 1)
    assert draw_validation_candidates(train, targets, np.array([1]), 3).shape == (1, 3)
    with pytest.raises(DataError, match="touched every one of the 2 items"):
        draw_validation_candidates([np.array([0])], np.array([1]), np.arange(1), 3)
