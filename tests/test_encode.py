"""`ItemEncoder`: what the vectors are, and what decides them."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import FAMILIES
from transformers import AutoModelForImageTextToText

from vlm2rec.embedder import prompts
from vlm2rec.embedder.backbones.images import ImageError
from vlm2rec.embedder.contract.errors import ConfigError, ModelError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.settings import EncoderSettings, fingerprint_of

Tiny = Callable[[str], Path]
TITLES = ["Red mug", "Oak lamp", "A rather longer title about a chair", "x", "Bag"]


def drawn_images(count: int) -> list[Image.Image]:
    random = np.random.default_rng(1)
    return [Image.fromarray(random.integers(0, 256, (56 + 28 * (i % 3), 84, 3), dtype=np.uint8)) for i in range(count)]


@pytest.fixture(scope="module")
def encoder(tiny: Tiny) -> ItemEncoder:
    return ItemEncoder.load(str(tiny("qwen2_5_vl")), dtype="float32", device="cpu")


def test_fused_is_the_sum_of_text_and_image(encoder: ItemEncoder) -> None:
    items = encoder.encode_items(TITLES, drawn_images(5))
    assert items.fused.shape == items.text.shape == items.image.shape == (5, encoder.dim)
    np.testing.assert_array_equal(items.fused, items.text + items.image)
    assert not items.truncated.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_fault_41_no_neighbour_and_no_budget_changes_a_bit_of_a_vector(tiny: Tiny, family: str) -> None:
    encoder = ItemEncoder.load(str(tiny(family)), dtype="float32", device="cpu")
    images = drawn_images(5)
    together = encoder.encode_items(TITLES, images)
    backward = encoder.encode_items(TITLES[::-1], images[::-1])
    for view in ("fused", "text", "image"):
        np.testing.assert_array_equal(getattr(together, view), getattr(backward, view)[::-1])
    for budget in (1, 100, 100_000):
        encoder.token_budget = budget
        for i in (0, 2, 4):
            alone = encoder.encode_items(TITLES[i : i + 1], images[i : i + 1])
            for view in ("fused", "text", "image"):
                np.testing.assert_array_equal(getattr(alone, view)[0], getattr(together, view)[i])


@pytest.mark.parametrize("side", ["left", "right"])
def test_fault_41_a_batch_of_eight_equals_the_stock_model_padded_on_either_side(tiny: Tiny, side: str) -> None:
    titles = [("chair " * (1 + 3 * row)).strip() for row in range(8)]
    encoder = ItemEncoder.load(str(tiny("qwen2_5_vl")), dtype="float32", device="cpu")
    found = encoder.encode_items(titles, [None] * 8).text
    stock = AutoModelForImageTextToText.from_pretrained(tiny("qwen2_5_vl"), dtype=torch.float32).eval()
    rows = [encoder.backbone.tokenize(prompts.text_prompt([title])).ids for title in titles]
    ids = torch.full((8, max(map(len, rows))), encoder.backbone.pad_id)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        place = slice(len(tokens)) if side == "right" else slice(-len(tokens), None)
        ids[row, place], mask[row, place] = torch.tensor(tokens), 1
    with torch.no_grad():
        states = stock(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    last = [len(tokens) - 1 if side == "right" else -1 for tokens in rows]
    assert np.abs(found - states[range(8), last].numpy()).max() <= 1e-4


def test_fault_41_in_bfloat16_a_batch_of_eight_agrees_with_each_item_alone(tiny: Tiny) -> None:
    encoder = ItemEncoder.load(str(tiny("qwen2_5_vl")), dtype="bfloat16", device="cpu")
    titles, images = [f"chair {'of wood ' * row}" for row in range(8)], drawn_images(8)
    together = encoder.encode_items(titles, images)
    for row in range(8):
        alone = encoder.encode_items(titles[row : row + 1], images[row : row + 1])
        for a, b in ((together.text[row], alone.text[0]), (together.image[row], alone.image[0])):
            assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) >= 0.999


def test_an_item_without_image_has_no_image_vector_and_its_text_as_fused(encoder: ItemEncoder) -> None:
    items = encoder.encode_items(["Red mug", "Oak lamp"], [None, ImageError("broken")])
    assert np.isnan(items.image).all()
    np.testing.assert_array_equal(items.fused, items.text)


def test_no_items_give_empty_arrays(encoder: ItemEncoder) -> None:
    assert encoder.encode_items([], []).fused.shape == (0, encoder.dim)


def test_normalised_fusion_adds_unit_vectors(tiny: Tiny) -> None:
    encoder = ItemEncoder.load(str(tiny("qwen2_5_vl")), fusion_norm="normalised", dtype="float32", device="cpu")
    items = encoder.encode_items(TITLES[:2], drawn_images(2))
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (items.text, items.image)]
    np.testing.assert_allclose(items.fused, unit[0] + unit[1], atol=1e-6)


def test_internal_fusion_fills_the_fused_view_alone(tiny: Tiny) -> None:
    encoder = ItemEncoder.load(str(tiny("qwen2_5_vl")), fusion="internal", dtype="float32", device="cpu")
    items = encoder.encode_items(TITLES[:2], [drawn_images(1)[0], None])
    assert encoder.views == ("fused",)
    assert np.isfinite(items.fused[0]).all() and np.isnan(items.fused[1]).all()
    assert np.isnan(items.text).all() and np.isnan(items.image).all()


def test_fault_41_bfloat16_agrees_with_float32_in_direction(tiny: Tiny, encoder: ItemEncoder) -> None:
    half = ItemEncoder.load(str(tiny("qwen2_5_vl")), dtype="bfloat16", device="cpu")
    a, b = (e.encode_items(TITLES, drawn_images(5)).fused for e in (half, encoder))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine.min() >= 0.999


def test_settings_are_known_without_the_weights_and_name_what_decides_a_vector(
    tiny: Tiny, encoder: ItemEncoder
) -> None:
    folder = str(tiny("qwen2_5_vl"))
    known = fingerprint_of(folder, dtype="float32", device="cpu")
    assert known == encoder.fingerprint
    for changed in (
        {"prompt_mode": "chat"},
        {"max_pixels": 112 * 112},
        {"fusion": "internal"},
        {"max_title_tokens": 5},
    ):
        assert fingerprint_of(folder, dtype="float32", device="cpu", **changed) != known
    assert (
        fingerprint_of(str(tiny("qwen3_vl")), dtype="float32", device="cpu")["backbone_hash"] != known["backbone_hash"]
    )


def test_unknown_chat_template_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    import json
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny("qwen2_5_vl"), folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            config = json.loads((folder / name).read_text())
            config.pop("chat_template", None)
            (folder / name).write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="no chat template"):
        ItemEncoder.load(str(folder), prompt_mode="chat", device="cpu")


def test_defaults_agree_with_the_command_line(tiny: Tiny) -> None:
    from dataclasses import fields

    from vlm2rec.pipelines.config import FinetuneConfig

    flags = {f.name: f.default for f in fields(FinetuneConfig)}
    for name, value in vars(EncoderSettings()).items():
        assert flags[name] == value


def test_a_pickled_encoder_is_loaded_once_by_another_process_and_gives_the_same_vectors(
    tiny: Tiny, tmp_path: Path
) -> None:
    encoder = ItemEncoder.load(str(tiny("qwen2_5_vl")), dtype="float32", device="cpu", max_pixels=112 * 112)
    sent = pickle.dumps(encoder)
    assert len(sent) < 20_000
    code = """
import pickle, sys
import numpy as np
content = open(sys.argv[1], "rb").read()
encoder = pickle.loads(content)
assert pickle.loads(content) is encoder
np.save(sys.argv[2], encoder.encode_items(["red chair"], [None]).text)
"""
    (tmp_path / "encoder").write_bytes(sent)
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "encoder"), str(tmp_path / "v.npy")], check=True)
    assert np.array_equal(np.load(tmp_path / "v.npy"), encoder.encode_items(["red chair"], [None]).text)


def test_an_encoder_whose_files_have_changed_is_not_unpickled(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("qwen2_5_vl"), folder)
    sent = pickle.dumps(ItemEncoder.load(str(folder), dtype="float32", device="cpu"))
    shutil.rmtree(folder)
    shutil.copytree(tiny("qwen2_vl"), folder)
    with pytest.raises(ModelError, match="differs from that of the process that pickled the encoder"):
        pickle.loads(sent)
