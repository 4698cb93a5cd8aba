"""The prompt style of Qwen3-VL-Embedding: its vectors are those of its own way of asking, and VLM2Rec fine-tunes it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, processors
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from vlm2rec.embedder.adapters.lora import read_adapter
from vlm2rec.embedder.backbones.families import load_processor
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.settings import EncoderSettings, fingerprint_of
from vlm2rec.embedder.prompts import image_prompt, item_prompt, prompt_hash, render, text_prompt
from vlm2rec.pipelines import finetune
from vlm2rec.pipelines.config import FinetuneConfig
from vlm2rec.pipelines.read_config import read_config

Tiny = Callable[[str], Path]
STYLE = "qwen3-vl-embedding"
END = "<|endoftext|>"
TITLES = ["Red mug", "Oak lamp with a rather longer title", "x"]


@pytest.fixture(scope="module")
def model(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-VL whose tokenizer ends every text with a token of its own, as the published one does."""
    folder = tmp_path_factory.mktemp("qwen3-vl-embedding") / "model"
    shutil.copytree(tiny("qwen3_vl"), folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ending = [(END, tokenizer.token_to_id(END))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=ending)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def encoder(model: Path) -> ItemEncoder:
    return ItemEncoder.load(str(model), prompt_style=STYLE, dtype="float32", device="cpu")


def pictures(count: int) -> list[Image.Image]:
    """Images of a size that the processor leaves alone."""
    random = np.random.default_rng(3)
    return [Image.fromarray(random.integers(0, 256, (224, 224, 3), dtype=np.uint8)) for _ in range(count)]


def as_its_own_code_does(folder: Path, conversations: Sequence[dict[str, Any]]) -> np.ndarray:
    """Encode as the model's card describes: a chat, padded on the right, the last token's state, length 1.

    Written from that description with the stock classes; each conversation has `instruction`, `text` and `image`.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    images = AutoImageProcessor.from_pretrained(folder, backend="pil")
    stock = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    texts, patches, grids = [], [], []
    for each in conversations:
        content = [{"type": "image"}] * ("image" in each)
        content += [{"type": "text", "text": each["text"]}] if "text" in each else []
        system = [{"type": "text", "text": each.get("instruction", "Represent the user's input.")}]
        chat = [{"role": "system", "content": system}, {"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        if "image" in each:
            made = images(images=[each["image"]], do_resize=False, return_tensors="pt")
            patches.append(made["pixel_values"])
            grids.append(made["image_grid_thw"])
            count = int(grids[-1].prod()) // images.merge_size**2
            text = text.replace("<|image_pad|>", "<|image_pad|>" * count)
        texts.append(text)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    pad = stock.config.image_token_id
    more: dict[str, Any] = {}
    if patches:
        more = {"pixel_values": torch.cat(patches), "image_grid_thw": torch.cat(grids)}
        more["mm_token_type_ids"] = (batch["input_ids"] == pad).int()
    with torch.no_grad():
        states = stock.model(**batch, **more).last_hidden_state
    last = batch["attention_mask"].sum(1) - 1
    return torch.nn.functional.normalize(states[torch.arange(len(texts)), last], dim=-1).numpy()


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_an_item_has_the_vectors_of_the_models_own_code(model: Path, encoder: ItemEncoder) -> None:
    seen = pictures(3)
    found = encoder.encode_items(TITLES, seen)
    expected = as_its_own_code_does(model, [{"text": title} for title in TITLES])
    np.testing.assert_allclose(unit(found.text), expected, atol=2e-5)
    expected = as_its_own_code_does(model, [{"image": image} for image in seen])
    np.testing.assert_allclose(unit(found.image), expected, atol=2e-5)
    joint = ItemEncoder.load(str(model), prompt_style=STYLE, fusion="internal", dtype="float32", device="cpu")
    pairs = [{"text": title, "image": image} for title, image in zip(TITLES, seen, strict=True)]
    expected = as_its_own_code_does(model, pairs)
    np.testing.assert_allclose(unit(joint.encode_items(TITLES, seen).fused), expected, atol=2e-5)


def test_another_instruction_ends_with_a_mark_and_changes_the_vectors(model: Path, encoder: ItemEncoder) -> None:
    asked = "Find products that go with this one"
    other = ItemEncoder.load(str(model), prompt_style=STYLE, instruction=asked, dtype="float32", device="cpu")
    found = other.encode_items(TITLES, [None] * 3).text
    expected = as_its_own_code_does(model, [{"text": title, "instruction": f"{asked}."} for title in TITLES])
    np.testing.assert_allclose(unit(found), expected, atol=2e-5)
    assert np.abs(found - encoder.encode_items(TITLES, [None] * 3).text).max() > 1e-3
    assert other.fingerprint["instruction"] == asked and "instruction" not in encoder.fingerprint
    assert other.fingerprint["prompt_hash"] != encoder.fingerprint["prompt_hash"]
    ended = text_prompt(["Red mug"], STYLE, "Which one？")
    assert ended == ("Which one？", "Red mug")


def test_no_neighbour_and_no_shared_start_changes_a_bit(encoder: ItemEncoder) -> None:
    seen = pictures(3)
    encoder.backbone.share_prefixes(False)
    plain = encoder.encode_items(TITLES, seen)
    encoder.backbone.share_prefixes()
    shared = encoder.encode_items(TITLES, seen)
    for view in ("text", "image"):
        np.testing.assert_allclose(getattr(shared, view), getattr(plain, view), atol=1e-5)
        for row in range(3):
            alone = encoder.encode_items(TITLES[row : row + 1], seen[row : row + 1])
            np.testing.assert_array_equal(getattr(alone, view)[0], getattr(shared, view)[row])
    start = encoder.backbone.tokenize(text_prompt(["Oak lamp"], STYLE)).shared
    said = encoder.backbone.tokenizer.decode(encoder.backbone.tokenize(text_prompt(["Oak lamp"], STYLE)).ids[:start])
    assert said == "<|im_start|>system\nRepresent the user's input.<|im_end|>\n<|im_start|>user\n"


def test_a_history_is_numbered_and_a_single_item_stands_alone(model: Path) -> None:
    processor = load_processor(model)
    asked = "<|im_start|>system\nRepresent the user's input.<|im_end|>\n<|im_start|>user\n"
    answer = "<|im_end|>\n<|im_start|>assistant\n"
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    for prompt, said in (
        (text_prompt(["Red mug"], STYLE), "Red mug"),
        (text_prompt([""], STYLE), "NULL"),
        (text_prompt(["Red mug", "Oak lamp"], STYLE), "0) Red mug, 1) Oak lamp"),
        (image_prompt(1, STYLE), image),
        (image_prompt(2, STYLE), f"0) {image}, 1) {image}"),
        (item_prompt(["Red mug"], STYLE), f"{image}Red mug"),
        (item_prompt([""], STYLE), image),
        (item_prompt(["Red mug", "Oak lamp"], STYLE), f"0) Red mug {image}, 1) Oak lamp {image}"),
    ):
        assert render(prompt, "chat", processor) == f"{asked}{said}{answer}"


def test_the_style_brings_chat_along_and_refuses_what_it_cannot_be(model: Path, tmp_path: Path) -> None:
    flags = {"data": tmp_path, "backbone": str(model), "out": tmp_path / "out", "prompt_style": STYLE}
    assert read_config(FinetuneConfig, flags=flags).prompt_mode == "chat"
    assert fingerprint_of(str(model), prompt_style=STYLE, device="cpu")["prompt_mode"] == "chat"
    settings = EncoderSettings(prompt_style=STYLE, prompt_mode="chat", instruction="Say.")
    assert settings.reads_histories and EncoderSettings.of_adapter(settings.stored()) == settings
    for wrong in (
        {"prompt_style": STYLE, "prompt_mode": "raw"},
        {"prompt_style": STYLE, "prompt_mode": "chat", "pooling": "mean"},
        {"prompt_style": "vlm2rec", "instruction": "Find"},
        {"prompt_style": STYLE, "prompt_mode": "chat", "instruction": "a" * 1001},
    ):
        with pytest.raises(ConfigError):
            EncoderSettings(**wrong)
    with pytest.raises(ConfigError, match="prompt-mode raw"):
        render(text_prompt(["Red mug"], STYLE), "raw", load_processor(model))
    assert prompt_hash("chat", "t", STYLE) != prompt_hash("chat", "t", STYLE, instruction="Say.")


def test_vlm2rec_fine_tunes_it_and_the_adapter_says_how(model: Path, drawn_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    flags = {"data": drawn_dataset, "backbone": str(model), "out": out, "prompt_style": STYLE, "max_steps": 2}
    flags |= {"batch_size": 4, "device": "cpu", "valid_users": 4, "probe_users": 0, "instruction": "What next?"}
    finetune.run(read_config(FinetuneConfig, flags=flags))
    stored = read_adapter(out)["encoder"]
    assert (stored["wording"], stored["prompt_mode"], stored["instruction"]) == (STYLE, "chat", "What next?")
    card = (out / "README.md").read_text()
    assert "What next?" in card and "items numbered from 0" in card
    encoder = ItemEncoder.load(str(model), out, device="cpu", dtype="float32")
    assert encoder.settings.reads_histories and encoder.settings.prompt_style == STYLE
