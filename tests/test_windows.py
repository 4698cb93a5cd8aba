"""`train_positions: all`: every target once, the loss of RecBole's rows, and clear refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recbole.data.interaction import Interaction
from recommender_world import cyclic_sequences, write_dataset

from vlm2rec.downstream.recbole import windows
from vlm2rec.downstream.recbole.run import run
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.pipelines import train_recommender
from vlm2rec.pipelines.config import TrainRecommenderConfig

ITEMS = [f"i{number}" for number in range(30)]
TINY = {"n_layers": 1, "n_heads": 1, "inner_size": 16, "num_layers": 1}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 12))
def test_every_target_is_learned_once_with_half_of_the_items_before_it(lengths: list[int], longest: int) -> None:
    begin = np.cumsum([0, *lengths[:-1]])
    items = np.arange(1, sum(lengths) + 1)
    found = windows.windows(begin, np.array(lengths), longest)
    read, targets = windows.lists(items, found, longest)
    assert sorted(targets[targets > 0].tolist()) == [
        items[first + place] for first, length in zip(begin, lengths, strict=True) for place in range(1, length)
    ]
    for row, target in zip(read, targets, strict=True):
        for place in np.flatnonzero(target):
            sequence = np.searchsorted(begin, target[place] - 1, side="right") - 1
            before = target[place] - 1 - begin[sequence]
            assert row[: place + 1].tolist() == list(range(target[place] - place - 1, target[place]))
            assert place + 1 >= min(before, -(-longest // 2), longest)
    assert (read > 0).sum(1).tolist() == found.length.tolist()


def outcome(tmp_path: Path, model: str, positions: str, lengths: tuple[int, ...] = (4, 5, 7, 6), **more: Any) -> Any:
    sequences = [whole[:length] for whole, length in zip(cyclic_sequences(ITEMS, len(lengths)), lengths, strict=True)]
    data = tmp_path / "data"
    if not data.exists():
        write_dataset(data, sequences, ITEMS, max_history=6)
    settings = TINY | {"model": model, "hidden_size": 16, "embedding_size": 16, "train_positions": positions}
    settings |= {"loss_type": "CE", "MAX_ITEM_LIST_LENGTH": 6, "epochs": 1, "topk": [5], "valid_metric": "NDCG@5"}
    return run(settings | more, tmp_path / f"{model}-{positions}", data=data, device="cpu")


@pytest.mark.parametrize("model", windows.CAUSAL)
def test_the_loss_is_that_of_recboles_rows(tmp_path: Path, model: str) -> None:
    trained = outcome(tmp_path, model, "all").model  # in evaluation mode: no dropout
    items = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]])
    targets = torch.tensor([[4, 5, 6, 7, 8], [9, 10, 11, 0, 0]])
    length = torch.tensor([5, 3])
    ours = trained.calculate_loss(
        Interaction({trained.ITEM_SEQ: items, trained.ITEM_SEQ_LEN: length, windows.TARGETS: targets})
    )
    rows = [(row, place) for row in range(2) for place in range(5) if targets[row, place]]
    prefixes = torch.stack([torch.where(torch.arange(5) <= place, items[row], 0) for row, place in rows])
    theirs = type(trained).calculate_loss(
        trained,
        Interaction(
            {
                trained.ITEM_SEQ: prefixes,
                trained.ITEM_SEQ_LEN: torch.tensor([place + 1 for _, place in rows]),
                trained.POS_ITEM_ID: torch.stack([targets[row, place] for row, place in rows]),
            }
        ),
    )
    torch.testing.assert_close(ours, theirs)
    gradients = [
        torch.autograd.grad(loss, [p for p in trained.parameters() if p.requires_grad]) for loss in (ours, theirs)
    ]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-4)


def test_validation_and_test_are_those_of_prefixes(tmp_path: Path) -> None:
    """Untrained, both kinds of rows leave the model, and so RecBole's own figures, the same."""
    both = [outcome(tmp_path, "SASRec", positions, learning_rate=1e-12) for positions in ("last", "all")]
    assert both[0].metrics["recbole"] == both[1].metrics["recbole"]
    assert both[0].metrics["full"] == both[1].metrics["full"]
    assert [each.metrics["positions"] for each in both] == ["last", "all"]


def test_a_batch_has_about_as_many_targets() -> None:
    lengths = np.full(100, 51)  # fifty targets each: ten, then eight times five
    assert windows.rows_in_batch(lengths, 10, 256) == round(256 * 9 / 50)
    assert windows.rows_in_batch(np.array([1, 2]), 10, 256) == 256


@pytest.mark.parametrize("model", windows.CAUSAL)
def test_it_learns_a_cycle(tmp_path: Path, model: str) -> None:
    sequences = cyclic_sequences(ITEMS, 60)
    data = write_dataset(tmp_path / "data", sequences, ITEMS, max_history=6, candidates=10)
    config = TrainRecommenderConfig(
        data=data,
        out=tmp_path / "run",
        model=model,
        positions="all",
        hidden_size=32,
        max_epochs=40,
        batch_size=64,
        learning_rate=1e-2,
        device="cpu",
    )
    metrics = train_recommender.run(config)
    assert metrics["full"]["N@10"] > 0.9 > 3 * metrics["popularity"]["full"]["N@10"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "BERT4Rec"}, "SASRec or GRU4Rec"),
        ({"loss_type": "BPR"}, "loss_type: CE"),
        ({"positions": "every"}, "one of last, all"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        outcome(tmp_path, **({"model": "SASRec", "positions": "all"} | change))
    assert message in str(error.value)


def test_a_dataset_of_recbole_is_refused() -> None:
    with pytest.raises(ConfigError, match="a dataset folder"):
        windows.read_positions({"model": "SASRec", "train_positions": "all"}, has_folder=False)
