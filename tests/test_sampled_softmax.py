"""`train_softmax: sampled`: the logQ correction against float64, its expectation, and a run of every mode."""

from __future__ import annotations

import math
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recommender_world import write_circle
from torch import nn

from vlm2rec.downstream.recbole import item_embedding, softmax
from vlm2rec.downstream.recbole.item_embedding import FusedEmbedding, ItemEmbedding, standardise
from vlm2rec.downstream.recbole.softmax import SampledSoftmax, read_samples
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.pipelines import train_recommender
from vlm2rec.pipelines.config import TrainRecommenderConfig

WIDTH = 4


def world(items: int = 7, targets: tuple[int, ...] = (3, 5, 3)) -> tuple[nn.Embedding, torch.Tensor, torch.Tensor]:
    """A table with the padding, states and targets, in float64."""
    random = torch.Generator().manual_seed(2)
    table = nn.Embedding(items + 1, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        table.weight.copy_(torch.randn(items + 1, WIDTH, generator=random, dtype=torch.float64))
    states = torch.randn(len(targets), WIDTH, generator=random, dtype=torch.float64)
    return table, states, torch.tensor(targets)


def of_items(table: nn.Embedding, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The full softmax over the items, without the padding."""
    return nn.functional.cross_entropy(states @ table.weight[1:].T, targets - 1)


# --- the equation -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("targets", [(3, 5, 3), (1,), (7, 7, 7, 7)])
def test_the_loss_is_that_of_the_equation(targets: tuple[int, ...]) -> None:
    table, states, chosen = world(targets=targets)
    frequency, drawn, samples = [0, 4, 1, 6, 0, 3, 2, 5], [1, 3, 6], 3
    total, batch = sum(frequency), len(targets)
    held = [
        1 - (1 - samples / 7) * (1 - frequency[item] / (total - 1)) ** (batch - 1) for item in range(len(frequency))
    ]
    losses = []
    for state, target in zip(states.tolist(), targets, strict=True):
        score = {
            item: math.fsum(a * b for a, b in zip(state, table.weight[item].tolist(), strict=True)) for item in range(8)
        }
        others = math.fsum(math.exp(score[j]) / held[j] for j in {*drawn, *targets} - {target})
        losses.append(-score[target] + math.log(math.exp(score[target]) + others))
    loss = SampledSoftmax(torch.tensor(frequency), samples)
    found = loss.of(table, states, chosen, torch.unique(torch.tensor([*drawn, *targets])))
    assert found.item() == pytest.approx(sum(losses) / batch, rel=1e-12)


def test_float32_agrees_with_float64() -> None:
    table, states, targets = world(items=300, targets=tuple(range(1, 200, 7)))
    loss = SampledSoftmax(torch.arange(301), 40)
    candidates = torch.unique(torch.cat([loss.draw(), targets]))
    exact = loss.of(table, states, targets, candidates)
    assert loss.of(table.float(), states.float(), targets, candidates).item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("samples", [7, 8, 4096])
def test_with_every_item_drawn_it_is_the_full_softmax(samples: int) -> None:
    table, states, targets = world()
    loss = SampledSoftmax(torch.tensor([0, 4, 1, 6, 0, 3, 2, 5]), samples)
    for found, expected in zip(
        *(torch.autograd.grad(f(table, states, targets), table.weight) for f in (loss, of_items)), strict=True
    ):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(loss(table, states, targets), of_items(table, states, targets))


def test_the_expected_sum_is_that_of_all_items() -> None:
    """Every draw and every batch of a small world, with its probability: the estimate has no bias."""
    table, states, _ = world(items=4)
    target, others = 1, [1, 2, 4]  # of the training targets; item 3 is none of them
    frequency = torch.bincount(torch.tensor([target, *others]), minlength=5)
    loss = SampledSoftmax(frequency, 2)
    state, batch = states[:1], 3
    logits = (state @ table.weight[1:].T)[0]
    estimates = []
    for beside in product(others, repeat=batch - 1):
        for drawn in combinations(range(1, 5), 2):
            held = torch.unique(torch.tensor([*drawn, target, *beside]))
            found = loss.of(table, state.expand(batch, -1), torch.tensor([target] * batch), held)
            estimates.append(torch.exp(found + logits[target - 1]).item())
    assert sum(estimates) / len(estimates) == pytest.approx(torch.logsumexp(logits, 0).exp().item(), rel=1e-9)


def test_the_mean_gradient_approaches_that_of_the_full_softmax() -> None:
    table, _, _ = world(items=60)
    random = np.random.default_rng(0)
    data = torch.from_numpy(1 + random.permutation(np.repeat(np.arange(60), 60 // np.arange(1, 61))))
    states = torch.from_numpy(random.normal(size=(len(data), WIDTH))) / 2
    expected = torch.autograd.grad(of_items(table, states, data), table.weight)[0]
    frequency = torch.bincount(data, minlength=61)
    torch.manual_seed(0)

    def distance(samples: int, corrected: bool = True, epochs: int = 30) -> float:
        loss = SampledSoftmax(frequency, samples)
        other = loss if corrected else SampledSoftmax(frequency, 60)  # as if all were drawn, so π is 1
        total = torch.zeros_like(expected)
        for _ in range(epochs):
            for rows in torch.randperm(len(data)).split(16):
                candidates = torch.unique(torch.cat([loss.draw(), data[rows]]))
                part = other.of(table, states[rows], data[rows], candidates) * len(rows) / len(data)
                total += torch.autograd.grad(part, table.weight)[0] / epochs
        return float((total - expected).norm() / expected.norm())

    few, many = distance(8), distance(50)
    # what is left is noise, and the bias of the logarithm of an estimate, which shrinks with more candidates
    assert many < 0.04 and few < 0.2
    assert distance(8, corrected=False) > 2 * few


@pytest.mark.parametrize(("items", "samples"), [(10, 3), (10, 9), (10, 10), (1, 1), (5000, 400)])
def test_a_draw_is_of_different_items_and_uniform(items: int, samples: int) -> None:
    torch.manual_seed(1)
    loss = SampledSoftmax(torch.zeros(items + 1, dtype=torch.long), samples)
    times = torch.zeros(items + 1)
    for _ in range(300):
        drawn = loss.draw()
        assert len(drawn) == samples and len(torch.unique(drawn)) == samples
        times[drawn] += 1
    assert times[0] == 0
    share = samples / items
    assert (times[1:] - 300 * share).abs().max() <= 5.5 * math.sqrt(300 * share * (1 - share)) + 1e-9


# --- in a run -----------------------------------------------------------------------------------------------------
ITEMS = [f"i{number}" for number in range(40)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dataset whose users go round a circle of items, and vectors of the circle."""
    return write_circle(tmp_path_factory.mktemp("circle"), ITEMS, users=60)


@pytest.mark.parametrize(
    ("model", "mode", "positions"),
    [
        ("SASRec", None, "last"),
        ("SASRec", "fuse", "all"),
        ("GRU4Rec", "init", "last"),
        ("GRU4Rec", "adapter", "all"),
    ],
)
def test_it_learns_a_cycle(folders: tuple[Path, Path], tmp_path: Path, model: str, mode: Any, positions: Any) -> None:
    data, embeddings = folders
    start: dict[str, Any] = {} if mode is None else {"embeddings": embeddings, "mode": mode}
    config = TrainRecommenderConfig(
        data=data,
        out=tmp_path / "run",
        model=model,
        positions=positions,
        softmax="sampled",
        samples=8,
        hidden_size=32,
        max_epochs=10 if positions == "last" else 30,
        eval_step=10,
        batch_size=64,
        learning_rate=1e-2,
        device="cpu",
        **start,
    )
    metrics = train_recommender.run(config)
    assert metrics["full"]["N@10"] > 0.8 > 3 * metrics["popularity"]["full"]["N@10"]
    assert (metrics["softmax"], metrics["samples"]) == ("sampled", 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_softmax": "half"}, "one of full, sampled"),
        ({"train_softmax": "sampled", "model": "BERT4Rec"}, "one of SASRec, GRU4Rec"),
        ({"train_softmax": "sampled", "loss_type": "BPR"}, "negatives of its own"),
        ({"train_softmax": "sampled", "train_softmax_samples": 0}, "a number of items from 1"),
        ({"train_softmax": "sampled", "train_softmax_samples": True}, "a number of items from 1"),
        ({"train_softmax_samples": 64}, "which draws nothing"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_samples({"model": "SASRec"} | settings)


def test_a_multimodal_model_has_no_softmax(folders: tuple[Path, Path], tmp_path: Path) -> None:
    config = TrainRecommenderConfig(
        data=folders[0], embeddings=folders[1], out=tmp_path / "run", model="VBPR", softmax="sampled"
    )
    with pytest.raises(ConfigError, match="--softmax with VBPR"):
        train_recommender.run(config)


# --- a large table --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["linear", "mlp", "fuse"])
def test_a_table_in_blocks_is_the_same_table(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = standardise(torch.randn(50, 6))
    extra = torch.randn(2, WIDTH)
    if kind == "fuse":
        table: ItemEmbedding = FusedEmbedding(vectors, WIDTH, 0.1, extra, known=torch.arange(50) % 3 > 0, fuse="gate")
    else:
        table = ItemEmbedding(vectors, WIDTH, 0.1, extra, kind)
    whole = table.eval().weight.detach()
    monkeypatch.setattr(item_embedding, "_AT_ONCE", 7)
    with torch.no_grad():
        torch.testing.assert_close(table.weight, whole)
        torch.testing.assert_close(table(torch.tensor([0, 7, 8, 49, 51])), whole[[0, 7, 8, 49, 51]])


def test_a_step_adapts_only_the_rows_it_needs() -> None:
    table = ItemEmbedding(standardise(torch.randn(2001, 6)), WIDTH, 0.1).train()
    adapted = []
    table.linear.register_forward_hook(lambda module, inputs, output: adapted.append(len(output)))
    softmax.SampledSoftmax(torch.ones(2001, dtype=torch.long), 16)(
        table, torch.randn(3, WIDTH, requires_grad=True), torch.tensor([5, 6, 5])
    ).backward()
    assert len(adapted) == 1 and 16 <= adapted[0] <= 18
