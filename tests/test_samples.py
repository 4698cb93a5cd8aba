"""Training samples: a target is always the item that came next, and never one held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ConfigError, DataError
from vlm2rec.embedder.training.samples import Samples

SEQUENCES = [np.array([0, 1, 2, 3, 4]), np.array([5, 6]), np.array([7])]


def test_last_predicts_each_users_last_training_item_from_those_before() -> None:
    samples = Samples(SEQUENCES, max_history=3)
    assert [(s.user, s.history.tolist(), s.target) for s in samples] == [(0, [1, 2, 3], 4), (1, [5], 6)]
    assert samples.skipped == 1


def test_all_predicts_every_item_but_the_first() -> None:
    samples = Samples(SEQUENCES, max_history=2, mode="all")
    assert [(s.history.tolist(), s.target) for s in samples] == [
        ([0], 1),
        ([0, 1], 2),
        ([1, 2], 3),
        ([2, 3], 4),
        ([5], 6),
    ]


def test_random_moves_with_the_epoch_and_repeats_with_the_seed() -> None:
    long = [np.arange(50)]

    def targets(seed: int) -> list[int]:
        samples = Samples(long, max_history=10, mode="random", seed=seed)
        drawn = []
        for epoch in range(20):
            samples.set_epoch(epoch)
            sample = samples[0]
            assert sample.history[-1] == sample.target - 1
            drawn.append(sample.target)
        return drawn

    assert targets(0) == targets(0) != targets(1)
    assert len(set(targets(0))) > 5
    assert min(targets(0)) >= 1


def test_few_shot_takes_that_many_users_at_random() -> None:
    many = [np.arange(3) + u for u in range(100)]
    first, again, other = (Samples(many, 10, users=10, seed=seed).users.tolist() for seed in (0, 0, 1))
    assert len(first) == 10 and first == again != other


def test_more_users_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match="only 2 users"):
        Samples(SEQUENCES, 3, users=3)


def test_nothing_to_learn_from_is_an_error() -> None:
    with pytest.raises(DataError, match="none of 1 users"):
        Samples([np.array([1])], 3)


def test_held_out_items_never_enter_a_sample(drawn_dataset: Path) -> None:
    dataset = Dataset(drawn_dataset)
    held_out = [set(dataset.histories(split).targets.tolist()) for split in ("valid", "test")]
    sequences = dataset.train_sequences()
    for sample in Samples(sequences, dataset.max_history, "all"):
        train = set(sequences[sample.user].tolist())
        assert {sample.target, *sample.history.tolist()} <= train
    for user, sequence in enumerate(sequences):
        whole = [*sequence, dataset.histories("valid").targets[user], dataset.histories("test").targets[user]]
        assert dataset.histories("test").of(user).tolist() == whole[:-1][-dataset.max_history :]
    assert all(held_out)
