"""The adapter folder: standard PEFT on disk, strict on the way in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from drawn_lora import draw_lora, without_checksums
from peft import PeftModel
from tiny_models import ADAPTED, FAMILIES
from transformers import AutoModelForImageTextToText

from vlm2rec.embedder.adapters import lora
from vlm2rec.embedder.backbones import model_files
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ConfigError, ModelError, Vlm2RecError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.settings import fingerprint_of

Tiny = Callable[[str], Path]


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
    assert len(names) == ADAPTED.get(family, 14) * 2  # of two layers
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
    with pytest.raises(Vlm2RecError, match=rf"(?s){file}.*fine-tune again, or copy the adapter") as refusal:
        load(tiny, adapter)
    # what is no JSON any more may never have been ours
    assert refusal.value.exit_code == 5 or (file == schema.ADAPTER_FILE and refusal.value.exit_code == 4)


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


# --- strangers ----------------------------------------------------------------------------------------------------
def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "expression", ["(a|a)*" * 20 + "$", r"(.*.*.*.*.*.*)*x", "[", "(?=" * 500, "no_such_layer", ["q_proj"], None, 3]
)
def test_an_expression_in_a_stranger_s_config_is_never_matched(tiny: Tiny, adapter: Path, expression: Any) -> None:
    before = load(tiny, adapter).encode_items(["red chair"], [None]).text
    without_checksums(adapter)
    edit(adapter / lora.CONFIG_FILE, target_modules=expression, exclude_modules=expression, layers_pattern=expression)
    assert np.array_equal(load(tiny, adapter).encode_items(["red chair"], [None]).text, before)


@pytest.mark.parametrize("rank", [10**9, 10**30, 5, 0, -4, "4", None, 4.0, True])
def test_a_rank_that_is_not_that_of_the_weights_is_refused_before_anything_is_made(
    tiny: Tiny, adapter: Path, rank: Any
) -> None:
    without_checksums(adapter)
    edit(adapter / lora.CONFIG_FILE, r=rank)
    with pytest.raises(ModelError, match=r"has shape \(|says r = "):
        load(tiny, adapter)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("lora_alpha", value) for value in (0, float("nan"), float("inf"), "8", None, [8])),
        *(("use_dora", True), ("rank_pattern", {"q_proj": 10**9}), ("alpha_pattern", {"(a+)+$": 1})),
        *(("modules_to_save", ["lm_head"]), ("peft_type", "IA3"), ("bias", "all"), ("layer_replication", [[0, 10**9]])),
    ],
)
def test_more_than_plain_lora_is_refused_by_name(tiny: Tiny, adapter: Path, key: str, value: Any) -> None:
    without_checksums(adapter)
    edit(adapter / lora.CONFIG_FILE, **{key: value})
    with pytest.raises(ModelError, match=f"adapter_config.json says .*{key} = .*plain LoRA"):
        load(tiny, adapter)


def test_another_alpha_is_another_adapter(tiny: Tiny, adapter: Path) -> None:
    before = fingerprint_of(str(tiny("qwen2_5_vl")), adapter, device="cpu")
    without_checksums(adapter)
    edit(adapter / lora.CONFIG_FILE, lora_alpha=8.001)
    after = fingerprint_of(str(tiny("qwen2_5_vl")), adapter, device="cpu")
    assert {key for key in before if before[key] != after[key]} == {"adapter_scale"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *((lora.CONFIG_FILE, text) for text in ("{", "[]", "\x00", "[" * 100_000)),
        *((schema.ADAPTER_FILE, text) for text in ('{"encoder": 3}', '{"encoder": {"fusion": "both"}}')),
        *((schema.ADAPTER_FILE, f'{{"encoder": {{{setting}}}}}') for setting in (
            *('"max_pixels": 1e400', '"max_pixels": "x"', '"max_title_tokens": -1', '"max_title_tokens": 99999999999'),
            *('"nothing": 1', '"pooling": ["last"]'),
        )),
    ],
)  # fmt: skip
def test_settings_that_are_damaged_or_strange_are_a_model_error(
    tiny: Tiny, adapter: Path, name: str, text: str
) -> None:
    without_checksums(adapter)
    (adapter / name).write_text(text)
    with pytest.raises(ModelError):
        load(tiny, adapter)


@pytest.mark.parametrize("titles", ["[]", '["a"]', "[1, 2, 3, 4]", "null", "["])
def test_a_canary_that_proves_nothing_is_refused(tiny: Tiny, adapter: Path, titles: str) -> None:
    without_checksums(adapter)
    tensors = safetensors.torch.load_file(adapter / lora.CANARY_FILE)
    if titles == "[]":
        tensors = {name: tensor[:0] for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, adapter / lora.CANARY_FILE, metadata={"titles": titles})
    with pytest.raises(ModelError, match=r"canary\.safetensors is damaged"):
        load(tiny, adapter)


@pytest.mark.parametrize("left", [{lora.CONFIG_FILE}, {lora.WEIGHTS_FILE}])
def test_half_of_a_peft_folder_is_refused(tiny: Tiny, adapter: Path, left: set[str]) -> None:
    for path in adapter.iterdir():
        if path.name not in left:
            path.unlink()
    (adapter / "README.md").write_text("made elsewhere")
    with pytest.raises(ModelError, match=r"has no adapter_(config|model)\.\w+. .*as PEFT writes them"):
        load(tiny, adapter)


def test_a_pickled_peft_adapter_is_refused_unopened(tiny: Tiny, adapter: Path) -> None:
    for path in adapter.iterdir():
        path.unlink()
    (adapter / lora.CONFIG_FILE).write_text("{}")
    (adapter / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ModelError, match="merge_and_unload"):
        load(tiny, adapter)


def test_an_adapter_works_with_its_backbone_under_another_name(tiny: Tiny, adapter: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny("qwen2_5_vl"), tmp_path / "moved" / "elsewhere")
    found = ItemEncoder.load(copy, adapter, dtype="float32", device="cpu")
    known = load(tiny, adapter)
    assert np.array_equal(*(encoder.encode_items(["x"], [None]).text for encoder in (found, known)))
    assert {**found.fingerprint, "made_with": 0} == {**known.fingerprint, "made_with": 0}


# --- half precision -------------------------------------------------------------------------------------------


def test_a_canary_of_the_merged_model_is_what_an_export_in_half_precision_gives(tiny: Tiny, tmp_path: Path) -> None:
    encoder = ItemEncoder.load(str(tiny("qwen2_5_vl")), dtype="bfloat16", device="cpu")
    wrapped = lora.add_lora(encoder.backbone, rank=4, alpha=8, dropout=0.0, seed=0)
    draw_lora(wrapped, "lora_B", 0.5, seed=0)  # an update as large as the weights
    titles, images = lora.canary_items()
    beside = encoder.encode_items(titles, images).fused
    assert lora.merge_in_place(wrapped)
    merged = encoder.encode_items(titles, images).fused
    canary = lora.Canary(titles, images, merged, "bfloat16")
    settings = {"encoder": encoder.settings.stored()}
    lora.save_adapter(wrapped, tmp_path / "adapter", settings, canary, {"train": [], "valid": []}, "card")
    again = ItemEncoder.load(str(tiny("qwen2_5_vl")), tmp_path / "adapter", dtype="bfloat16", device="cpu")
    found = again.encode_items(titles, images).fused  # it keeps the prompts' common start, which rounds once more
    assert lora.cosine(found, merged).min() > max(0.9997, lora.cosine(beside, merged).min())
    assert lora.read_canary(tmp_path / "adapter").dtype == "bfloat16"


@pytest.mark.parametrize(
    ("angle", "saved", "now", "accepted"),
    [
        (0.03, "float32", "float32", True),
        (0.1, "float32", "float32", False),
        (0.1, "", "float32", False),
        (0.1, "", "bfloat16", True),
        (0.1, "bfloat16", "float32", True),
        (0.1, "float32", "bfloat16", True),
        (0.2, "bfloat16", "bfloat16", False),
    ],
)
def test_how_near_a_canary_has_to_be_depends_on_both_number_formats(
    angle: float, saved: str, now: str, accepted: bool
) -> None:
    stored = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]], np.float32)
    canary = lora.Canary(["a", "b"], [], stored, saved)
    before = np.array([[0.5, 0.5], [0.5, 0.5]], np.float32)
    with nullcontext() if accepted else pytest.raises(ModelError, match="gives other vectors than when it was saved"):
        lora.check_canary(canary, before, stored @ turn, Path("adapter"), now)
    if accepted and angle > 0.05:  # an adapter that hardly does anything has to be found out as well
        closer = np.array([[1.0, angle / 2], [-angle / 2, 1.0]], np.float32)
        with pytest.raises(ModelError, match="gives other vectors"):
            lora.check_canary(canary, stored @ closer, stored @ turn, Path("adapter"), now)
