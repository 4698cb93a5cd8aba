"""Mean pooling: the mean of all tokens of a prompt, whatever is packed beside it and whether its start is shared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from vlm2rec.embedder import prompts
from vlm2rec.embedder.backbones.backbone import Backbone, EncodedPrompt
from vlm2rec.embedder.backbones.pooling import mean_tokens
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.settings import EncoderSettings, fingerprint_of

Tiny = Callable[[str], Path]
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava")
TITLES = ["Red mug", "Oak lamp, 40 cm", "x", "The Old Clock (1987)", ""]


def encoded(backbone: Backbone) -> list[EncodedPrompt]:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    texts = [backbone.tokenize(prompts.text_prompt([title], "sda")) for title in TITLES]
    return [*texts, backbone.tokenize(prompts.image_prompt(1, "sda"), backbone.encode_images([image]))]


def test_the_prompts_of_sda_are_those_of_the_paper_and_ask_about_one_item() -> None:
    assert prompts.text_prompt(["Red mug"], "sda") == ("The product has the following attributes: Red mug",)
    assert prompts.image_prompt(1, "sda") == ("The product has the image: ", None)
    with pytest.raises(ValueError, match="a sequence of 2 items"):
        prompts.text_prompt(["Red mug", "Oak lamp"], "sda")
    assert prompts.prompt_hash("raw", None, "sda") != prompts.prompt_hash("raw", None)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_masked_mean_of_the_stock_models_states_over_the_whole_prompt(tiny: Tiny, family: str) -> None:
    backbone = Backbone.load(str(tiny(family)), pooling="mean", device="cpu")
    stock = AutoModelForImageTextToText.from_pretrained(tiny(family), dtype=torch.float32).eval()
    texts = encoded(backbone)[: len(TITLES)]
    ids, mask = backbone._pad(texts)
    with torch.no_grad():
        states = stock(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        found = backbone.encode(texts)
    torch.testing.assert_close(found, mean_tokens(states, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_start_counts_as_if_it_stood_in_every_row(tiny: Tiny, family: str) -> None:
    backbone = Backbone.load(str(tiny(family)), pooling="mean", device="cpu")
    every = encoded(backbone)
    assert min(prompt.shared for prompt in every[:4]) > 3 and every[-1].shared > 3
    with torch.no_grad():
        whole = backbone.encode(every)
        backbone.share_prefixes()
        torch.testing.assert_close(backbone.encode(every), whole, atol=1e-5, rtol=1e-5)


def test_no_neighbour_changes_a_bit(tiny: Tiny) -> None:
    encoder = ItemEncoder.load(
        str(tiny("qwen2_5_vl")), pooling="mean", prompt_style="sda", dtype="float32", device="cpu"
    )
    pictures = [Image.new("RGB", (60 + 10 * n, 50), (40 * n, 90, 200)) for n in range(5)]
    together = encoder.encode_items(TITLES, pictures)
    for row in range(5):
        alone = encoder.encode_items(TITLES[row : row + 1], pictures[row : row + 1])
        assert np.array_equal(alone.fused[0], together.fused[row])


def test_the_mean_is_in_float32_in_half_precision_too(tiny: Tiny) -> None:
    half, full = (
        Backbone.load(str(tiny("qwen2_5_vl")), pooling="mean", dtype=dtype, device="cpu")
        for dtype in ("bfloat16", "float32")
    )
    with torch.no_grad():
        a, b = half.encode(encoded(half)), full.encode(encoded(full))
    assert a.dtype == torch.float32
    assert float(torch.cosine_similarity(a, b).min()) > 0.99


def test_settings_and_fingerprint_hold_pooling_and_wording(tiny: Tiny) -> None:
    plain = fingerprint_of(str(tiny("qwen2_5_vl")), device="cpu")
    sda = fingerprint_of(str(tiny("qwen2_5_vl")), pooling="mean", prompt_style="sda", device="cpu")
    assert (plain["pooling"], "wording" in plain) == ("last", False)
    assert (sda["pooling"], sda["wording"]) == ("mean", "sda")
    assert plain["prompt_hash"] != sda["prompt_hash"]
    for settings in (plain, sda):
        assert EncoderSettings.of_export(settings).pooling == settings["pooling"]
    assert EncoderSettings.of_export(sda).prompt_style == "sda" and not EncoderSettings.of_export(sda).reads_histories
    with pytest.raises(ConfigError, match="--fusion internal with --prompt-style sda"):
        EncoderSettings(fusion="internal", prompt_style="sda")
