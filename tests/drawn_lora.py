"""LoRA matrices that are drawn: those of a fresh adapter do nothing, as every B is zero."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def draw_lora(wrapped: torch.nn.Module, matrices: str, spread: float, seed: int) -> None:
    """Draw the matrices of an adapter from a normal distribution.

    Args:
        wrapped: a model with LoRA layers.
        matrices: part of the names of those that are drawn: `lora_B`, or `lora_` for A and B.
        spread: standard deviation.
        seed: of the draw.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if matrices in name:
                parameter.copy_(spread * torch.randn(parameter.shape, generator=random))


def without_checksums(adapter: Path, **changes: Any) -> None:
    """Make an adapter folder one from before there were checksums, which only keys, shapes and the canary guard."""
    file = adapter / "vlm2rec.json"
    settings = json.loads(file.read_text())
    settings.pop("files", None), settings.pop("seal", None)
    file.write_text(json.dumps(settings | changes))
