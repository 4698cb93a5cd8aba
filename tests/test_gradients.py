"""Gradient alignment against finite differences, and that looking at gradients leaves the step as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from drawn_lora import draw_lora
from torch import Tensor

from vlm2rec.embedder.adapters.lora import add_lora
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.item_features import ItemFeatures
from vlm2rec.embedder.training.gradients import gradient_alignment, modality_losses
from vlm2rec.embedder.training.losses import (
    VLM2RecLoss,
    VLM2RecObjective,
    contrastive,
    cosines,
    margins,
    other_items,
    topology_divergence,
)
from vlm2rec.embedder.training.vlm2rec import HistoryModel

TARGETS = [3, 7, 11, 3]
HISTORIES = [[1, 2], [5], [8, 9, 10], [12, 4]]
NAMES = ("total", "text", "image")
PAIRS = (("total", "text"), ("total", "image"), ("text", "image"))


def five_point(values: Sequence[float], step: float) -> float:
    """Return a derivative from the values at +1, -1, +2 and -2 steps; the error falls with step⁴."""
    return (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * step)


# --- in float64, with vectors of a small function -------------------------------------------------------------


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_cosines_equal_those_of_finite_differences_in_float64(stop_gradient: bool) -> None:
    random = torch.Generator().manual_seed(0)
    inputs = {
        (side, view): torch.randn(4, 5, generator=random, dtype=torch.float64)
        for side in "ui"
        for view in schema.MODALITIES
    }
    start = torch.randn(30, generator=random, dtype=torch.float64)
    targets, loss = (
        torch.tensor([0, 1, 2, 1]),
        VLM2RecLoss(learnable=False, stop_gradient=stop_gradient, reduction="mean").double(),
    )
    others = other_items(targets)

    def vectors(weights: Tensor) -> list[dict[str, Tensor]]:
        return [{view: (inputs[side, view] @ weights.view(5, 6)).tanh() for view in schema.MODALITIES} for side in "ui"]

    def total(weights: Tensor) -> Tensor:
        users, items = vectors(weights)
        return loss(users["text"], users["image"], items["text"], items["image"], targets).total

    def margins_of(weights: Tensor) -> list[Tensor]:
        users, items = vectors(weights)
        return [margins(cosines(users[view], items[view]), others) for view in schema.MODALITIES]

    strong = torch.maximum(*margins_of(start))

    def total_with_fixed_strong_margin(weights: Tensor) -> Tensor:
        """The total with M_strong held at its value: what a stopped gradient is the gradient of."""
        users, items = vectors(weights)
        weight = 1 + torch.nn.functional.softplus(strong - torch.minimum(*margins_of(weights)))
        fused = cosines(users["text"] + users["image"], items["text"] + items["image"])
        each = [cosines(users[view], items[view]) for view in schema.MODALITIES]
        crtr = topology_divergence(each[0], each[1], others, 0.1).mean()
        return contrastive(fused, others, 0.1, weight).mean() + 0.1 * crtr

    def values(weights: Tensor) -> dict[str, Tensor]:
        trained = total_with_fixed_strong_margin if stop_gradient else total
        return {"total": trained(weights), **modality_losses(*vectors(weights), targets, 0.1)}

    weights = start.clone().requires_grad_()
    found = gradient_alignment({**values(weights), "total": total(weights)}, [weights])
    numeric: dict[str, list[float]] = {name: [] for name in NAMES}
    for axis in torch.eye(30, dtype=torch.float64):
        around = [values(start + factor * 1e-3 * axis) for factor in (1, -1, 2, -2)]
        for name in NAMES:
            numeric[name].append(five_point([float(each[name]) for each in around], 1e-3))
    gradients = {name: torch.tensor(values, dtype=torch.float64) for name, values in numeric.items()}
    assert list(found) == [*(f"norm_{name}" for name in NAMES), *(f"cos_{a}_{b}" for a, b in PAIRS)]
    for name in NAMES:
        assert found[f"norm_{name}"] == pytest.approx(float(gradients[name].norm()), rel=1e-6)
    for a, b in PAIRS:
        cosine = float(gradients[a] @ gradients[b] / gradients[a].norm() / gradients[b].norm())
        assert found[f"cos_{a}_{b}"] == pytest.approx(cosine, abs=1e-6)


def test_a_cosine_with_a_gradient_of_zero_is_left_out() -> None:
    weight, unused = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    losses = {"a": (weight**2).sum(), "b": (3 * weight).sum(), "none": torch.tensor(1.0), "flat": (0 * weight).sum()}
    assert gradient_alignment(losses, [weight, unused]) == pytest.approx(
        {
            **{"norm_a": math.sqrt(20), "norm_b": math.sqrt(18), "norm_none": 0.0, "norm_flat": 0.0},
            "cos_a_b": 18 / math.sqrt(20 * 18),
        }
    )


# --- through the tiny model ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Path], drawn_dataset: Path) -> HistoryModel:
    """A tiny Qwen2.5-VL whose LoRA matrices B are not zero, as they are before training: gradients reach A too."""
    encoder = ItemEncoder.load(str(tiny("qwen2_5_vl")), max_pixels=56 * 56, dtype="float32", device="cpu")
    items = ItemFeatures(Dataset(drawn_dataset), encoder)
    wrapped = add_lora(encoder.backbone, 2, 4.0, 0.2, 0)
    draw_lora(wrapped, "lora_", 0.1, seed=1)
    return HistoryModel(encoder, wrapped, items, VLM2RecObjective(0.5, 0.5, stop_gradient=False), 0.5)


def lora_weights(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in module.named_parameters() if "lora_" in name]


def losses_of(model: HistoryModel) -> dict[str, Tensor]:
    """Return the three losses with the weights of the moment."""
    targets = torch.tensor(TARGETS)
    users, items = model.encode(HISTORIES), model.encode([[row] for row in TARGETS])
    total, *_ = model(HISTORIES, targets)
    return {"total": total, **modality_losses(users, items, targets, 0.5)}


def gradients_of(model: HistoryModel) -> dict[str, Tensor]:
    """Return each loss's gradient by all LoRA weights as one vector, float64."""
    weights = lora_weights(model)
    return {
        name: torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights, retain_graph=True)]).double()
        for name, loss in losses_of(model).items()
    }


def slopes(model: HistoryModel, direction: Tensor, step: float) -> dict[str, float]:
    """Return each loss's slope along a direction of length 1 in all LoRA weights."""
    weights, found = lora_weights(model), []
    start, parts = [w.detach().clone() for w in weights], direction.float().split([w.numel() for w in weights])
    with torch.no_grad():
        for factor in (1, -1, 2, -2):
            for weight, origin, part in zip(weights, start, parts, strict=True):
                weight.copy_(origin + factor * step * part.view_as(weight))
            found.append({name: float(loss) for name, loss in losses_of(model).items()})
        for weight, origin in zip(weights, start, strict=True):
            weight.copy_(origin)
    return {name: five_point([each[name] for each in found], step) for name in NAMES}


def test_slopes_along_random_directions_equal_finite_differences_on_the_tiny_model(model: HistoryModel) -> None:
    model.eval()
    gradients = gradients_of(model)
    random = torch.Generator().manual_seed(2)
    for _ in range(3):
        direction = torch.randn(len(gradients["total"]), generator=random, dtype=torch.float64)
        direction /= direction.norm()
        expected = {name: float(gradient @ direction) for name, gradient in gradients.items()}
        assert max(map(abs, expected.values())) > 2e-3
        assert slopes(model, direction, 0.03) == pytest.approx(expected, abs=3e-5)


def test_logged_cosines_equal_slopes_along_the_gradients_on_the_tiny_model(model: HistoryModel) -> None:
    # the slope of b along a's unit gradient is |g_b| cos(g_a, g_b), and along its own it is |g_b|
    model.eval()
    _, _, row = model(HISTORIES, torch.tensor(TARGETS), with_gradients=True)
    along = {name: slopes(model, gradient / gradient.norm(), 0.01) for name, gradient in gradients_of(model).items()}
    for name in NAMES:
        assert row[f"norm_{name}"] == pytest.approx(along[name][name], rel=5e-3)
    for a, b in PAIRS:
        assert row[f"cos_{a}_{b}"] == pytest.approx(along[a][b] / along[b][b], abs=5e-3)
    assert abs(row["cos_total_text"] - row["cos_total_image"]) > 0.05, "the two must be told apart"


def test_comparing_gradients_leaves_those_of_the_step_as_they_are(model: HistoryModel) -> None:
    found = []
    for compare in (False, True):
        model.train()
        torch.manual_seed(5)
        loss, _, row = model(HISTORIES, torch.tensor(TARGETS), with_gradients=compare)
        assert all(weight.grad is None for weight in lora_weights(model))
        loss.backward()
        found.append(torch.cat([weight.grad.flatten() for weight in lora_weights(model) if weight.grad is not None]))
        model.zero_grad(set_to_none=True)
    assert torch.equal(*found)
    # and the gradient that was compared is the step's own, under the same dropout
    assert row["norm_total"] == pytest.approx(float(found[0].double().norm()), rel=1e-6)
