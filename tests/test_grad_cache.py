"""GradCache (`--chunk-users`): the gradients of the whole batch from the memory of a chunk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from drawn_lora import draw_lora
from torch import Tensor

from vlm2rec.embedder.adapters.lora import add_lora
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.item_features import ItemFeatures, encode
from vlm2rec.embedder.training.losses import VLM2RecObjective
from vlm2rec.embedder.training.vlm2rec import HistoryModel
from vlm2rec.pipelines import finetune
from vlm2rec.pipelines.config import FinetuneConfig

Tiny = Callable[[str], Path]
HISTORIES = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10], [2, 6, 1], [3], [11, 12]]
TARGETS = torch.tensor([12, 1, 3, 5, 8, 12, 9])


@pytest.fixture
def model(tiny: Tiny, drawn_dataset: Path) -> HistoryModel:
    encoder = ItemEncoder.load(str(tiny("qwen2_5_vl")), max_pixels=56 * 56, dtype="float32", device="cpu")
    items = ItemFeatures(Dataset(drawn_dataset), encoder)
    wrapped = add_lora(encoder.backbone, 2, 4.0, 0.2, 0)
    draw_lora(wrapped, "lora_", 0.1, seed=1)
    return HistoryModel(encoder, wrapped, items, VLM2RecObjective(0.5, 0.5), 0.5)


def gradients(model: HistoryModel, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_the_gradients_are_those_of_the_whole_batch(model: HistoryModel, chunk: int) -> None:
    model.eval()  # without dropout: chunks draw theirs in another order
    whole, _, _ = model(HISTORIES, TARGETS)
    expected = gradients(model, whole)
    model.chunk_users = chunk
    total, log, _ = model(HISTORIES, TARGETS)
    assert total.item() == pytest.approx(whole.item(), abs=1e-6)
    assert float(log["effective_negatives"]) > chunk - 1 or chunk > 3, "negatives are those of the batch"
    found = gradients(model, total)
    assert (found - expected).abs().max() <= 1e-6 * max(1.0, float(expected.abs().max()))


def test_dropout_is_the_same_when_a_chunk_is_encoded_again(model: HistoryModel) -> None:
    model.train()
    torch.manual_seed(3)
    users, items = (
        [encode(model.encoder, model.items, rows[start : start + 3], 1 << 20) for start in range(0, len(rows), 3)]
        for rows in (HISTORIES, [[int(row)] for row in TARGETS.unique()])
    )
    joined = [{view: torch.cat([part[view] for part in parts]) for view in parts[0]} for parts in (users, items)]
    place = TARGETS.unique(return_inverse=True)[1]
    kept, _ = model.loss(joined[0], {view: vectors[place] for view, vectors in joined[1].items()}, TARGETS)
    expected = gradients(model, kept)
    torch.manual_seed(3)
    model.chunk_users = 3
    total, _, _ = model(HISTORIES, TARGETS)
    assert total.item() == kept.item()
    found = gradients(model, total)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    model.eval()
    assert model(HISTORIES, TARGETS)[0].item() != total.item(), "dropout was on"


def test_a_forward_pass_keeps_less_for_the_backward_pass(model: HistoryModel) -> None:
    def kept_bytes() -> int:
        kept: dict[int, int] = {}

        def pack(values: Tensor) -> Tensor:
            kept[values.untyped_storage().data_ptr()] = values.untyped_storage().nbytes()
            return values

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda values: values):
            model(HISTORIES, TARGETS)
        return sum(kept.values())

    whole = kept_bytes()
    model.chunk_users = 2
    assert kept_bytes() < whole / 4


def test_gradients_of_each_modality_are_compared_as_without_chunks(model: HistoryModel) -> None:
    model.eval()
    _, _, expected = model(HISTORIES, TARGETS, with_gradients=True)
    model.chunk_users = 3
    _, _, found = model(HISTORIES, TARGETS, with_gradients=True)
    assert found == pytest.approx(expected, rel=1e-4)


def test_finetune_learns_the_same_with_chunks(tiny: Tiny, drawn_dataset: Path, tmp_path: Path) -> None:
    curves = []
    for chunk in (0, 3):
        config = FinetuneConfig(
            data=drawn_dataset,
            backbone=str(tiny("qwen2_5_vl")),
            out=tmp_path / f"chunk-{chunk}",
            lora_dropout=0.0,
            chunk_users=chunk,
            max_steps=3,
            max_pixels=56 * 56,
            learning_rate=1e-2,
            log_steps=1,
            valid_users=20,
            vision_cache=str(tmp_path / "cache"),
        )
        training = finetune.run(config)
        assert training is not None
        curves.append([row["loss"] for row in training.curves["train"]])
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    assert curves[0][0] != curves[0][2]
