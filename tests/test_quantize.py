"""`finetune --quantize nf4`: training beside matrices in four bits, an adapter for the unquantised backbone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from test_finetune import settings
from torch import nn

from vlm2rec.embedder.adapters.lora import cosine
from vlm2rec.embedder.backbones import quantized
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ConfigError, MissingDependencyError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.training.recipes import METHODS, check_settings
from vlm2rec.pipelines import finetune
from vlm2rec.pipelines.config import FinetuneConfig
from vlm2rec.pipelines.read_config import read_config

Tiny = Callable[[str], Path]
needs_library = pytest.mark.skipif(find_spec(quantized.LIBRARY) is None, reason="bitsandbytes is not installed")


def test_without_the_library_it_is_refused_by_name(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "LIBRARY", "bitsandbytes_that_is_not_there")
    with pytest.raises(MissingDependencyError, match="--quantize nf4 needs") as refused:
        finetune.run(settings(tiny, drawn_dataset, tmp_path / "adapter", quantize="nf4"))
    assert refused.value.exit_code == 7 and not (tmp_path / "adapter").exists()


def test_where_the_library_does_not_work_the_device_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_library.py").write_text("raise RuntimeError('no kernel for this device')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(quantized, "LIBRARY", "broken_library")
    with pytest.raises(ConfigError, match=r"device cpu, where broken_library does not work \(.*no kernel") as refused:
        quantized.require(torch.device("cpu"))
    assert refused.value.exit_code == 2
    sys.modules.pop("broken_library", None)


@pytest.mark.parametrize("method", [name for name, recipe in METHODS.items() if "quantize" not in recipe.own])
def test_other_methods_refuse_it_by_name(method: str) -> None:
    given = {"data": "d", "backbone": "b", "out": "o", "method": method, "quantize": "nf4"}
    with pytest.raises(ConfigError, match=f"--quantize with --method {method}"):
        check_settings(read_config(FinetuneConfig, None, (), given))


@needs_library
def test_only_the_language_model_s_matrices_are_in_four_bits(tiny: Tiny) -> None:
    loading = {"max_pixels": 56 * 56, "dtype": "float32", "device": "cpu"}
    whole = ItemEncoder.load(str(tiny("qwen2_5_vl")), **loading)  # type: ignore[arg-type]
    small = ItemEncoder.load(str(tiny("qwen2_5_vl")), quantize="nf4", **loading)  # type: ignore[arg-type]
    layers = {name: layer for name, layer in small.backbone.model.named_modules() if isinstance(layer, nn.Linear)}
    in_four_bits = {name for name, layer in layers.items() if layer.weight.dtype == torch.uint8}
    assert in_four_bits == {name for name in layers if ".language_model." in name}
    text, other = (each.encode_items(["a red chair", "blue mug"], [None, None]).text for each in (whole, small))
    assert 0.5 < cosine(text, other).min() < 1 - 1e-6
    assert whole.fingerprint == small.fingerprint


@needs_library
def test_the_adapter_is_one_of_the_unquantised_backbone(tiny: Tiny, drawn_dataset: Path, tmp_path: Path) -> None:
    given = settings(tiny, drawn_dataset, tmp_path / "adapter", max_steps=2, checkpoint_steps=1, quantize="nf4")
    finetune.run(given)
    saved = json.loads((given.out / schema.ADAPTER_FILE).read_text())
    assert saved["config"]["quantize"] == saved["training"]["loss_settings"]["quantize"] == "nf4"
    assert "bitsandbytes" in saved["versions"]
    plain = ItemEncoder.load(str(tiny("qwen2_5_vl")), given.out, device="cpu", dtype="float32")  # checks the canary
    assert np.isfinite(plain.encode_items(["a red chair"], [None]).text).all()
    assert finetune.run(given) is None
    with pytest.raises(ConfigError, match="begun with quantize = 'nf4', now it is 'none'"):
        finetune.run(settings(tiny, drawn_dataset, given.out, max_steps=2, checkpoint_steps=1))
