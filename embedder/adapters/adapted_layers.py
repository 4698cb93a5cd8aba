"""What makes LoRA layers cheap to train, on a CPU above all. They compute what PEFT's compute, but for rounding.

- *In the dtype of the layer.* PEFT keeps an adapter in float32, and computes with it in float32 as well. Beside a layer
  in bfloat16 that costs more than the layer. Here the weights are rounded for the product, as in mixed precision; the
  optimizer sees those in float32.
- *Dropout by sixteen random bits.* torch draws a double for every number on a CPU, which takes longer than a product.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn


def prepare(model: nn.Module) -> None:
    """Make PEFT's LoRA layers inside `model` cheap, in place."""
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.forward = types.MethodType(functools.partial(_forward, usual=layer.forward), layer)


def _forward(layer: Any, states: Tensor, *, usual: Any) -> Tensor:
    """Return W x + (α/r)·B A dropout(x), (..., in) to (..., out)."""
    if layer.merged or layer.disable_adapters:
        return torch.as_tensor(usual(states))
    (name,) = layer.active_adapters
    found: Tensor = layer.base_layer(states)
    a, b = (part[name].weight.to(found.dtype) for part in (layer.lora_A, layer.lora_B))
    low = F.linear(dropout(states, layer.lora_dropout[name]), a) * layer.scaling[name]
    if not torch.is_grad_enabled():
        return found + F.linear(low, b)  # as a linear layer, which `packing.IndependentRows` knows
    return torch.addmm(found.flatten(0, -2), low.flatten(0, -2), b.T).view_as(found)


def dropout(states: Tensor, layer: nn.Module) -> Tensor:
    """Return the states, each 0 with probability p or divided by 1 − p; out of training, the states as they are.

    Args:
        states: of any shape.
        layer: an `nn.Dropout`, which says p, or an `nn.Identity`. On a CPU p is rounded: to 1/65536, and so that
            1 / (1 − p) is a number of the dtype, because a rounded factor would change the mean.
    """
    p = getattr(layer, "p", 0.0)
    if states.device.type != "cpu" or not layer.training or not 0 < p < 1:
        return layer(states)
    factor = float(torch.tensor(1 / (1 - p), dtype=states.dtype))
    bits = torch.empty((states.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    kept = bits.view(torch.int16)[: states.numel()].view(states.shape) >= round((1 - 1 / factor) * 2**16) - 2**15
    return states * kept.to(states.dtype).mul_(factor)
