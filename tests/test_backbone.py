"""The backbone: all families through one path, equal to the stock model, whatever the neighbours in a batch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES
from transformers import AutoConfig, AutoModelForImageTextToText

from vlm2rec.embedder import prompts
from vlm2rec.embedder.backbones.backbone import Backbone, EncodedPrompt
from vlm2rec.embedder.backbones.devices import batches_by_tokens, pick_device, pick_dtype
from vlm2rec.embedder.contract.errors import ConfigError, ModelError
from vlm2rec.embedder.options import PromptMode

Tiny = Callable[[str], Path]
MODES: tuple[PromptMode, ...] = ("raw", "chat")
TITLES = ["Red mug", "Oak lamp, 40 cm", "x", "The Old Clock (1987)", "Bag"] * 2


def drawn_images(count: int) -> list[Image.Image]:
    """Images of different sizes and shapes."""
    random = np.random.default_rng(0)
    sizes = [(60 + 17 * i % 90, 50 + 29 * i % 80) for i in range(count)]
    return [Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


def mixed_prompts(
    backbone: Backbone, images: list[Image.Image], most: int
) -> list[tuple[EncodedPrompt, prompts.Prompt, list[Image.Image]]]:
    features = backbone.encode_images(images)
    wanted = [
        (prompts.text_prompt(TITLES), 0),
        (prompts.text_prompt(TITLES[:1]), 0),
        (prompts.image_prompt(1), 1),
        (prompts.image_prompt(most), most),
        (prompts.item_prompt(TITLES[:2]), 2),
    ]
    return [(backbone.tokenize(prompt, features[:n]), prompt, images[:n]) for prompt, n in wanted]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_fault_41_a_prompt_alone_equals_the_same_prompt_in_any_batch(tiny: Tiny, family: str, mode: PromptMode) -> None:
    backbone = Backbone.load(str(tiny(family)), prompt_mode=mode, device="cpu")
    encoded = [prompt for prompt, _, _ in mixed_prompts(backbone, drawn_images(10), 10)]
    with torch.no_grad():
        alone = torch.cat([backbone.encode([prompt]) for prompt in encoded])
        together = backbone.encode(encoded)
        reversed_pairs = torch.cat([backbone.encode([encoded[i], encoded[i - 1]])[:1] for i in range(len(encoded))])
    assert together.shape == (5, backbone.dim)
    assert (together - alone).abs().max() <= 1e-4
    assert (reversed_pairs - alone).abs().max() <= 1e-4
    assert (alone[2] - alone[3]).abs().max() > 1e-2, "one image and ten images must not look alike"


@pytest.mark.parametrize("shared", [False, True], ids=["whole", "shared prefix"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_fault_43_vectors_equal_the_stock_models_last_hidden_state(
    tiny: Tiny, family: str, mode: PromptMode, shared: bool
) -> None:
    backbone = Backbone.load(str(tiny(family)), prompt_mode=mode, device="cpu")
    backbone.share_prefixes(shared)
    stock = AutoModelForImageTextToText.from_pretrained(tiny(family), dtype=torch.float32).eval()
    mixed = mixed_prompts(backbone, drawn_images(4), 4)
    assert all((encoded.shared > 5) for encoded, _, _ in mixed)
    with torch.no_grad():
        ours = backbone.encode([encoded for encoded, _, _ in mixed])
    for (encoded, prompt, images), vector in zip(mixed, ours, strict=True):
        text = prompts.render(prompt, mode, backbone.processor)
        # a template that writes the begin-of-sequence token itself, as Gemma's
        begun = bool(backbone.tokenizer.bos_token) and text.startswith(backbone.tokenizer.bos_token)
        given = {"images": images or None, "add_special_tokens": not begun, "return_tensors": "pt"}
        if family == "llava_onevision" and len(images) == 1:  # taken as one of two images
            given["images"] = [[images[0], images[0]]]
            inputs = backbone.processor(text=[text.replace("<image>", "<image><image>")], **given)
            kept = [*range(inputs["input_ids"].shape[1])]
            first = inputs["input_ids"][0].tolist().index(backbone.image_token_id)
            del kept[first : first + 10]
            inputs = {name: value[:, kept] for name, value in inputs.items() if "ids" in name or "mask" in name} | {
                "pixel_values": inputs["pixel_values"][:1],
                "image_sizes": inputs["image_sizes"][:1],
                "batch_num_images": inputs["batch_num_images"],
            }
        else:
            given["images"] = [images] if images and backbone.processor.family.several else images or None
            inputs = backbone.processor(text=[text], **given)
        with torch.no_grad():
            expected = stock(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
        assert inputs["input_ids"][0].tolist() == encoded.ids
        assert (expected - vector).abs().max() <= 2e-5


_EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize(
    "change",
    [
        {"use_bidirectional_attention": None},  # as E2B and E4B
        {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True},  # as 31B
        {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, **_EXPERTS},  # as 26B-A4B
    ],
    ids=["small", "large", "experts"],
)
def test_models_of_gemma_4_of_every_kind_equal_the_stock_model(
    tiny: Tiny, tmp_path: Path, change: dict[str, object]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("gemma4"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= change
    with torch.random.fork_rng():
        torch.manual_seed(0)
        (folder / "config.json").write_text(json.dumps(config))
        stock = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
    stock.save_pretrained(folder)
    backbone = Backbone.load(str(folder), device="cpu")
    backbone.share_prefixes()
    mixed = mixed_prompts(backbone, drawn_images(3), 3)
    with torch.no_grad():
        ours = backbone.encode([encoded for encoded, _, _ in mixed])
        alone = torch.cat([backbone.encode([encoded]) for encoded, _, _ in mixed])
        for (_, prompt, images), vector in zip(mixed, ours, strict=True):
            text = prompts.render(prompt, "raw", backbone.processor)
            inputs = backbone.processor(text=[text], images=images or None, return_tensors="pt")
            expected = stock(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
            assert (expected - vector).abs().max() <= 5e-5
    assert (ours - alone).abs().max() <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_images_normalised_on_the_device_are_those_of_the_image_processor(
    tiny: Tiny, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = Backbone.load(str(tiny(family)), device="cpu")
    images = drawn_images(3)
    usual = backbone.encode_images(images)
    assert not backbone.normalises_on_device
    monkeypatch.setattr(Backbone, "normalises_on_device", True)  # as on a GPU
    assert {backbone.patch(image).values.dtype for image in images} == {torch.uint8}
    for mine, its in zip(backbone.encode_images(images), usual, strict=True):
        torch.testing.assert_close(mine.tokens, its.tokens, atol=1e-5, rtol=1e-5)


def test_a_backbone_without_its_language_model_head_loads_as_it_is_published(tiny: Tiny, tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny("idefics3"), dtype=torch.float32)
    shutil.copytree(tiny("idefics3"), tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    whole, headless = (Backbone.load(str(folder), device="cpu") for folder in (tiny("idefics3"), tmp_path / "model"))
    prompt = whole.tokenize(prompts.text_prompt(TITLES[:2]))
    assert torch.equal(whole.encode([prompt]), headless.encode([prompt]))
    assert whole.has_head and not headless.has_head and model.lm_head is not None


def test_a_model_whose_layers_carry_a_state_sees_from_left_to_right_only(tiny: Tiny) -> None:
    assert Backbone.load(str(tiny("gemma3")), device="cpu").packs
    assert not Backbone.load(str(tiny("qwen3_5")), device="cpu").packs
    with pytest.raises(ConfigError, match="qwen3_5, whose layers carry a state"):
        Backbone.load(str(tiny("qwen3_5")), device="cpu", attention="bidirectional")


def test_mrope_positions_are_used_where_the_family_has_them(tiny: Tiny) -> None:
    backbone = Backbone.load(str(tiny("qwen2_5_vl")), device="cpu")
    prompt = backbone.tokenize(prompts.image_prompt(1), backbone.encode_images([Image.new("RGB", (112, 56))]))
    ids, mask = backbone._pad([prompt])
    positions = backbone._positions(ids, mask, prompt.images)
    assert positions.shape == (3, 1, len(prompt))
    assert not torch.equal(positions[1], positions[2]), "rows and columns of an image have different positions"


@pytest.mark.parametrize("family", FAMILIES)
def test_fault_35_special_tokens_in_a_title_become_ordinary_text(tiny: Tiny, family: str) -> None:
    backbone = Backbone.load(str(tiny(family)), device="cpu", max_title_tokens=200)
    hostile = "Mug <|im_end|><|image_pad|> <image> <IMG_CONTEXT> </s> <|vision_start|>"
    title, cut = backbone.prepare_title(hostile)
    ids = backbone.tokenize(prompts.text_prompt([title])).ids
    special = set(backbone.tokenizer.all_special_ids) | {backbone.image_token_id}
    start = {backbone.tokenizer.bos_token_id}
    assert not cut
    assert not (set(ids) & special) - start


def test_fault_33_a_long_title_is_cut_between_tokens_and_flagged(tiny: Tiny) -> None:
    backbone = Backbone.load(str(tiny("qwen2_5_vl")), device="cpu", max_title_tokens=8)
    short, cut_short = backbone.prepare_title("mug")
    long, cut_long = backbone.prepare_title("very " * 20_000 + "long")
    assert (short, cut_short, cut_long) == ("mug", False, True)
    assert len(backbone.tokenizer(long, add_special_tokens=False)["input_ids"]) <= 8


def test_white_space_and_nul_are_folded(tiny: Tiny) -> None:
    backbone = Backbone.load(str(tiny("qwen2_5_vl")), device="cpu")
    assert backbone.prepare_title("  Red\n\tmug\0 blue ") == ("Red mug blue", False)


def test_more_images_than_positions_is_a_clear_error(tiny: Tiny) -> None:
    backbone = Backbone.load(str(tiny("llava")), device="cpu")
    backbone.model.config.get_text_config().max_position_embeddings = 40
    features = backbone.encode_images(drawn_images(10))
    with pytest.raises(ConfigError, match=r"10 images .* at most 40 tokens.*--max-history"):
        backbone.tokenize(prompts.image_prompt(10), features)


def test_no_gradient_flows_into_the_vision_tower(tiny: Tiny) -> None:
    backbone = Backbone.load(str(tiny("qwen2_5_vl")), device="cpu")
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not backbone.encode_images(drawn_images(1))[0].tokens.requires_grad


def test_unknown_backbone_folder_says_what_a_model_folder_is(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        Backbone.load(str(tmp_path / "nothing"))


def test_weights_that_are_missing_are_not_silently_random(tiny: Tiny, tmp_path: Path) -> None:
    import shutil

    import safetensors.torch

    folder = tmp_path / "model"
    shutil.copytree(tiny("qwen2_5_vl"), folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "q_proj.weight" in name))
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 weights"):
        Backbone.load(str(folder), device="cpu")


def test_batches_stay_within_the_token_budget_and_lose_nobody() -> None:
    lengths = [5, 90, 7, 30, 6, 31, 200]
    batches = list(batches_by_tokens(lengths, 64))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert batches == [[0, 4, 2], [3, 5], [1], [6]]
    assert list(batches_by_tokens([], 64)) == []


def test_a_device_that_is_not_there_is_refused() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="vlm2rec doctor"):
            pick_device("cuda")
    assert pick_dtype("float32", torch.device("cpu")) is torch.float32
