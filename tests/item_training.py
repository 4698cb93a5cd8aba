"""Trainings of the methods that read single items, and runs of them that are cut off."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from vlm2rec.embedder.training import train
from vlm2rec.pipelines import finetune
from vlm2rec.pipelines.config import FinetuneConfig
from vlm2rec.pipelines.read_config import read_config

Tiny = Callable[[str], Path]


def settings_of(method: str, backbone: Path, data: Path, out: Path, /, **more: Any) -> FinetuneConfig:
    """Return a training of three steps that logs each of them."""
    flags: dict[str, Any] = {"method": method, "data": data, "backbone": str(backbone), "out": out}
    flags |= {"learning_rate": 1e-3, "batch_size": 8, "valid_users": 5, "probe_users": 0, "log_steps": 1}
    return read_config(FinetuneConfig, flags={**flags, "device": "cpu", "max_steps": 3, **more})


def curves(out: Path) -> dict[str, list[dict[str, Any]]]:
    return json.loads((out / "curves.json").read_text())


def cut_off(config: FinetuneConfig, step: int) -> None:
    """Run a training until it is interrupted before this step."""

    def interrupt(self: object, args: object, state: Any, control: object, **_: object) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train._Watch, "on_step_begin", interrupt, raising=False)
        with pytest.raises(KeyboardInterrupt):
            finetune.run(config)


def require_same(
    cut: FinetuneConfig, whole: FinetuneConfig, steps: int, files: Sequence[str], columns: Sequence[str] = ("loss",)
) -> None:
    """Assert that two trainings have the same curve and the same weights, to the bit: in float32 on a CPU."""
    rows = [[[row[name] for name in columns] for row in curves(config.out)["train"]] for config in (cut, whole)]
    assert len(rows[0]) == steps and rows[0] == rows[1]
    for file in files:
        one, other = (safetensors.torch.load_file(config.out / file) for config in (cut, whole))
        assert one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
