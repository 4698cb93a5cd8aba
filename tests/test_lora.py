"""The adapter folder: standard PEFT on disk, strict on the way in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from drawn_lora import draw_lora, without_checksums
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from vlm2rec.embedder.backbones import lora, model_files
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, ModelError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder

Tiny = Callable[[str], Path]
FAMILIES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "internvl", "llava")


def write_adapter(backbone: Path, folder: Path, scale: float = 0.02) -> np.ndarray:
    """Write an adapter with random B matrices; returns the canary vectors it gives."""
    encoder = ItemEncoder.load(str(backbone), dtype="float32", device="cpu")
    wrapped = lora.add_lora(encoder.backbone, rank=4, alpha=8, dropout=0.0, seed=0)
    draw_lora(wrapped, "lora_B", scale, seed=0)
    titles, images = lora.canary_items()
    vectors = encoder.encode_items(titles, images).fused
    settings = {"encoder": encoder.settings.stored()}
    lora.save_adapter(
        wrapped, folder, settings, lora.Canary(titles, images, vectors), {"train": [], "valid": []}, "card"
    )
    return vectors


@pytest.fixture
def adapter(tiny: Tiny, tmp_path: Path) -> Path:
    write_adapter(tiny("qwen2_5_vl"), tmp_path / "adapter")
    return tmp_path / "adapter"


def load(tiny: Tiny, adapter: Path, family: str = "qwen2_5_vl") -> ItemEncoder:
    return ItemEncoder.load(str(tiny(family)), adapter, dtype="float32", device="cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_touches_every_language_layer_and_no_vision_module(tiny: Tiny, family: str) -> None:
    encoder = ItemEncoder.load(str(tiny(family)), dtype="float32", device="cpu")
    wrapped = lora.add_lora(encoder.backbone, rank=4, alpha=8, dropout=0.0, seed=0)
    names = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    layers = encoder.backbone.model.config.get_text_config().num_hidden_layers
    assert len(names) == layers * 7 * 2
    assert not any("vis" in name for name in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_adapter_gives_the_vectors_of_the_unmerged_one(tiny: Tiny, tmp_path: Path, family: str) -> None:
    before = write_adapter(tiny(family), tmp_path / "adapter")
    titles, images = lora.canary_items()
    after = load(tiny, tmp_path / "adapter", family).encode_items(titles, images).fused
    np.testing.assert_allclose(after, before, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own call
def test_any_peft_user_can_load_the_folder(tiny: Tiny, adapter: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny("qwen2_5_vl"))
    names = [name for name, _ in PeftModel.from_pretrained(model, adapter).named_parameters() if "lora_B" in name]
    assert len(names) == 2 * 7


def rewrite(adapter: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    without_checksums(adapter)
    path = adapter / lora.WEIGHTS_FILE
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path, metadata={"format": "pt"})


def test_fault_42_renamed_keys_are_refused(tiny: Tiny, adapter: Path) -> None:
    rewrite(adapter, lambda w: {name.replace("language_model", "text_model"): tensor for name, tensor in w.items()})
    with pytest.raises(ModelError, match="28 keys missing, 28 unexpected"):
        load(tiny, adapter)


def test_one_missing_key_is_refused(tiny: Tiny, adapter: Path) -> None:
    rewrite(adapter, lambda w: dict(list(w.items())[1:]))
    with pytest.raises(ModelError, match="1 keys missing, 0 unexpected"):
        load(tiny, adapter)


def test_fault_42_an_adapter_of_zeros_is_refused(tiny: Tiny, adapter: Path) -> None:
    rewrite(adapter, lambda w: {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in w.items()})
    with pytest.raises(ModelError, match="no effect"):
        load(tiny, adapter)


def test_fault_42_another_base_is_refused(tiny: Tiny, adapter: Path) -> None:
    with pytest.raises(ModelError, match=r"does not fit this backbone|other vectors"):
        load(tiny, adapter, "qwen2_vl")


def test_changed_weights_are_caught_by_the_canary(tiny: Tiny, adapter: Path) -> None:
    rewrite(adapter, lambda w: {n: -t if "lora_B" in n else t for n, t in w.items()})
    with pytest.raises(ModelError, match="other vectors than when it was saved"):
        load(tiny, adapter)


def test_an_unfinished_folder_is_refused(tiny: Tiny, adapter: Path) -> None:
    (adapter / schema.ADAPTER_FILE).unlink()
    with pytest.raises(ModelError, match="not a finished adapter folder"):
        load(tiny, adapter)


def flipped(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


@pytest.mark.parametrize("file", [lora.WEIGHTS_FILE, lora.CONFIG_FILE, lora.CANARY_FILE, schema.ADAPTER_FILE])
@pytest.mark.parametrize("damage", [lambda b: b[:-2], lambda b: b[: len(b) // 2], lambda b: b"", flipped])
def test_a_damaged_file_of_an_adapter_is_named_with_the_cure(
    adapter: Path, file: str, damage: Callable[[bytes], bytes], tiny: Tiny
) -> None:
    (adapter / file).write_bytes(damage((adapter / file).read_bytes()))
    with pytest.raises(ArtifactError, match=rf"(?s){file}.*fine-tune again, or copy the adapter") as refusal:
        load(tiny, adapter)
    assert refusal.value.exit_code == 5


def test_a_missing_file_of_an_adapter_is_named(tiny: Tiny, adapter: Path) -> None:
    (adapter / lora.CANARY_FILE).unlink()
    with pytest.raises(ModelError, match=f"has no {lora.CANARY_FILE}"):
        load(tiny, adapter)


def test_an_adapter_from_before_there_were_checksums_loads_and_its_damage_is_still_told(
    tiny: Tiny, adapter: Path
) -> None:
    without_checksums(adapter)
    load(tiny, adapter)
    (adapter / lora.WEIGHTS_FILE).write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="damaged"):
        load(tiny, adapter)


def test_a_card_that_was_edited_hinders_nobody(tiny: Tiny, adapter: Path) -> None:
    (adapter / "README.md").write_text("my notes")
    load(tiny, adapter)
    assert lora.own_files(adapter).isdisjoint({"README.md", lora.MODA_FILE})


def test_encoding_otherwise_than_the_adapter_was_trained_is_refused(tiny: Tiny, adapter: Path) -> None:
    with pytest.raises(ConfigError, match=r"--prompt-mode is 'chat'.*trained with 'raw'"):
        ItemEncoder.load(str(tiny("qwen2_5_vl")), adapter, prompt_mode="chat", device="cpu")


def test_licence_is_read_from_a_local_readme(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert lora.backbone_licence(str(tmp_path)) == "apache-2.0"
    assert "no commercial use" in lora.backbone_licence("Qwen/Qwen2.5-VL-3B-Instruct")


def test_backbone_hash_changes_with_the_weights(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("qwen2_5_vl"), folder)
    before = model_files.backbone_hash(folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights[sorted(weights)[0]] += 1
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert before != model_files.backbone_hash(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen2_5_vl"
