"""LoRA layers as they are trained here, beside PEFT's own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from vlm2rec.embedder.adapters import adapted_layers
from vlm2rec.embedder.adapters.adapted_layers import dropout
from vlm2rec.embedder.backbones.packing import IndependentRows


def layers(dtype: torch.dtype, p: float = 0.0) -> tuple[Any, Any]:
    """Return PEFT's layer with drawn weights, and ours with the same."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=12, lora_dropout=p, target_modules=["0"], init_lora_weights=False)
        made.append(get_peft_model(nn.Sequential(nn.Linear(96, 80)).to(dtype), config))
    adapted_layers.prepare(made[1])
    return made[0], made[1]


def run(model: Any, states: Tensor) -> list[Tensor]:
    """Return the output, and the gradients of the input and of A and B."""
    states = states.clone().requires_grad_()
    out = model(states)
    weights = [p for p in model.parameters() if p.requires_grad]
    seen = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, [states, *weights], seen)]


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_output_and_gradients_are_those_of_peft(dtype: torch.dtype, near: float) -> None:
    theirs, ours = layers(dtype)
    for shape in ((1, 7, 96), (3, 5, 96)):
        states = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        for expected, found in zip(run(theirs, states), run(ours, states), strict=True):
            assert found.dtype == expected.dtype and found.shape == expected.shape
            assert (found - expected).abs().max() <= near * expected.abs().max()


def test_what_the_optimizer_sees_stays_in_float32() -> None:
    _, ours = layers(torch.bfloat16)
    run(ours, torch.ones(2, 96, dtype=torch.bfloat16))
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}


def test_a_switched_off_and_a_merged_adapter_act_as_in_peft() -> None:
    theirs, ours = layers(torch.float32)
    states = torch.ones(2, 96)
    with ours.disable_adapter(), torch.no_grad():
        assert torch.equal(ours(states), theirs.base_model.model[0].base_layer(states))
    before = ours(states).detach()
    ours.merge_adapter()
    assert (ours(states) - before).abs().max() < 1e-5


def test_without_gradients_a_row_does_not_depend_on_the_others() -> None:
    _, ours = layers(torch.float32)
    states = torch.randn(700, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), IndependentRows():
        assert torch.equal(ours(states)[:3], ours(states[:3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.05, 0.1, 0.2, 0.5])
def test_dropout_keeps_the_mean_and_drops_the_share(dtype: torch.dtype, p: float) -> None:
    torch.manual_seed(0)
    ones = torch.ones(1_000_003, dtype=dtype)  # not a multiple of four, the numbers that one draw serves
    found = dropout(ones, nn.Dropout(p)).double()
    factor = found.max().item()
    share = (found == 0).double().mean().item()
    assert factor == float(torch.tensor(1 / (1 - p), dtype=dtype)) and set(found.unique().tolist()) == {0.0, factor}
    deviation = factor * math.sqrt(p * (1 - p) / len(ones))
    assert abs(found.mean().item() - 1) < 4 * deviation + 2**-15
    assert abs(share - p) < 0.004


def test_neighbours_are_dropped_independently() -> None:
    torch.manual_seed(0)
    kept = (dropout(torch.ones(1 << 20), nn.Dropout(0.5)) > 0).double() - 0.5
    for apart in (1, 2, 3, 4, 5):
        assert abs((kept[apart:] * kept[:-apart]).mean().item() * 4) < 0.005


def test_dropout_is_that_of_the_seed_and_off_out_of_training() -> None:
    layer, states = nn.Dropout(0.3), torch.ones(50, 3)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(dropout(states, layer))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert dropout(states, layer.eval()) is states and dropout(states, nn.Identity()) is states
