"""Causal text models as backbones: the same path as the vision-language models, with text prompts alone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from tiny_models import TEXT_FAMILIES

from vlm2rec.embedder import prompts
from vlm2rec.embedder.adapters import lora
from vlm2rec.embedder.backbones.backbone import Backbone
from vlm2rec.embedder.backbones.families import TEXT_FAMILIES as FAMILY_TABLE
from vlm2rec.embedder.contract.errors import ConfigError, ModelError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.settings import fingerprint_of
from vlm2rec.embedder.options import PromptMode

Tiny = Callable[[str], Path]
MODES: tuple[PromptMode, ...] = ("raw", "chat")
TITLES = ["Red mug", "Oak lamp, 40 cm", "x", "The Old Clock (1987)", "Bag"]
HISTORIES = [TITLES, TITLES[:1], TITLES[2:3], TITLES[1:4] * 3]


def test_every_text_family_of_the_table_is_tested() -> None:
    assert set(FAMILY_TABLE) == set(TEXT_FAMILIES)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_a_prompt_alone_equals_the_same_prompt_in_any_batch(tiny: Tiny, family: str, mode: PromptMode) -> None:
    backbone = Backbone.load(str(tiny(family)), prompt_mode=mode, device="cpu")
    encoded = [backbone.tokenize(prompts.text_prompt(titles)) for titles in HISTORIES]
    with torch.no_grad():
        alone = torch.cat([backbone.encode([prompt]) for prompt in encoded])
        together = backbone.encode(encoded)
        pairs = torch.cat([backbone.encode([encoded[i], encoded[i - 1]])[:1] for i in range(len(encoded))])
    assert together.shape == (4, backbone.dim) == (4, 64)
    assert (together - alone).abs().max() <= 1e-4
    assert (pairs - alone).abs().max() <= 1e-4
    assert (alone[1] - alone[2]).abs().max() > 1e-2, "two titles must not look alike"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_vectors_equal_the_stock_models_last_hidden_state(tiny: Tiny, family: str, mode: PromptMode) -> None:
    folder = tiny(family)
    backbone = Backbone.load(str(folder), prompt_mode=mode, device="cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for titles in HISTORIES:
        prompt = prompts.text_prompt(titles)
        (text,) = prompt
        if mode == "raw":
            ids = tokenizer(text)["input_ids"]
        else:
            messages = [{"role": "user", "content": text}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        encoded = backbone.tokenize(prompt)
        assert encoded.ids == ids
        with torch.no_grad():
            stock = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][:, -1]
            ours = backbone.encode([encoded])
        assert (stock - ours).abs().max() <= 1e-4


def test_a_window_of_keys_is_that_of_the_stock_model(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny("mistral"), tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"sliding_window": 9}))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    backbone, whole = (Backbone.load(str(folder), device="cpu") for folder in (tmp_path / "model", tiny("mistral")))
    encoded = [backbone.tokenize(prompts.text_prompt(titles)) for titles in HISTORIES]
    backbone.share_prefixes()
    with torch.no_grad():
        shared = backbone.encode(encoded)
        backbone.share_prefixes(False)
        plain = backbone.encode(encoded)
        for row, prompt in enumerate(encoded):
            stock = model(input_ids=torch.tensor([prompt.ids]), output_hidden_states=True).hidden_states[-1][0, -1]
            assert (stock - plain[row]).abs().max() <= 1e-5
        assert (whole.encode(encoded) - plain).abs().max() > 1e-3, "the window is shorter than a prompt"
    assert (shared - plain).abs().max() <= 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_begins_once_whoever_writes_the_begin_token(tiny: Tiny, mode: PromptMode) -> None:
    backbone = Backbone.load(str(tiny("llama")), prompt_mode=mode, device="cpu")
    ids = backbone.tokenize(prompts.text_prompt(["Red mug"])).ids
    assert ids.count(backbone.tokenizer.bos_token_id) == 1 and ids[0] == backbone.tokenizer.bos_token_id


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_special_tokens_in_a_title_become_ordinary_text(tiny: Tiny, family: str) -> None:
    backbone = Backbone.load(str(tiny(family)), device="cpu", max_title_tokens=200)
    title, cut = backbone.prepare_title("Mug <|im_end|><|endoftext|> </s> <s> <|im_start|>")
    ids = backbone.tokenize(prompts.text_prompt([title])).ids
    assert not cut
    assert not set(ids[1:]) & set(backbone.tokenizer.all_special_ids)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_lora_covers_the_seven_projections_of_every_layer_and_nothing_else(tiny: Tiny, family: str) -> None:
    backbone = Backbone.load(str(tiny(family)), device="cpu")
    wrapped = lora.add_lora(backbone, 4, 8.0, 0.0, seed=0)
    adapted = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    places = {re.sub(r"^base_model\.model\.|\.lora_.*$", "", name) for name in adapted}
    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    layer = attention | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert places == {f"model.layers.{number}.{name}" for number in (0, 1) for name in layer}


@pytest.mark.parametrize("views", [None, "both", "image"])
def test_a_text_model_is_refused_where_images_are_wanted(tiny: Tiny, views: str | None) -> None:
    with pytest.raises(ConfigError, match=r"is a text model \(qwen2\), and --views (both|image) .*give --views text"):
        fingerprint_of(str(tiny("qwen2")), views=views, device="cpu")


def test_an_encoder_of_a_text_model_takes_no_images(tiny: Tiny) -> None:
    encoder = ItemEncoder.load(str(tiny("qwen3")), views="text", device="cpu", dtype="float32")
    items = encoder.encode_items(TITLES, [None] * 5)
    assert encoder.fingerprint["views"] == ["fused", "text"] and encoder.fingerprint["model_type"] == "qwen3"
    assert (items.fused == items.text).all()


def test_a_folder_without_the_unused_head_loads_but_one_without_a_layer_does_not(tiny: Tiny, tmp_path: Path) -> None:
    whole = Backbone.load(str(tiny("llama")), device="cpu")
    folder = tmp_path / "headless"
    shutil.copytree(tiny("llama"), folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    assert weights.pop("lm_head.weight").shape == (whole.model.config.vocab_size, 64)
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    prompt = whole.tokenize(prompts.text_prompt(TITLES))
    with torch.no_grad():
        vectors = [backbone.encode([prompt]) for backbone in (whole, Backbone.load(str(folder), device="cpu"))]
    assert torch.equal(*vectors)
    weights.pop("model.layers.1.mlp.up_proj.weight")
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights, among them model\.layers\.1\.mlp\.up_proj"):
        Backbone.load(str(folder), device="cpu")


def test_an_unknown_text_family_is_refused_with_the_known_ones(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("qwen2"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(ModelError, match=r"'gpt2'.* for --views text one of qwen2, qwen3, llama, mistral"):
        Backbone.load(str(folder), device="cpu")


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template"])
def test_a_missing_tokenizer_or_chat_template_is_named(tiny: Tiny, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    if name == "tokenizer.json":
        (folder / name).unlink()
        with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
            Backbone.load(str(folder), device="cpu")
    else:
        (folder / "chat_template.jinja").unlink()
        with pytest.raises(ConfigError, match="no chat template"):
            Backbone.load(str(folder), prompt_mode="chat", device="cpu")
