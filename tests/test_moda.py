"""MoDA: the layer against its equations, two folded weights against the unfolded model, strict on the way in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from drawn_lora import draw_lora, without_checksums
from peft import PeftModel
from tiny_models import ADAPTED, FAMILIES
from transformers import AutoModelForImageTextToText

from vlm2rec.embedder.adapters import lora, moda
from vlm2rec.embedder.adapters.moda import MoDALinear, ModaSettings
from vlm2rec.embedder.backbones import modality
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, ModelError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder

Tiny = Callable[[str], Path]
SETTINGS = ModaSettings(experts=4, rank=8, alpha=32.0, dropout=0.1)


def load(tiny: Tiny, family: str = "qwen2_5_vl", adapter: Path | None = None) -> ItemEncoder:
    sda = {} if adapter else {"pooling": "mean", "prompt_style": "sda"}
    return ItemEncoder.load(str(tiny(family)), adapter, dtype="float32", device="cpu", **sda)  # type: ignore[arg-type]


def trained(tiny: Tiny, family: str = "qwen2_5_vl") -> ItemEncoder:
    """An encoder with experts that do something, unfolded."""
    encoder = load(tiny, family)
    model = moda.add_moda(encoder.backbone, SETTINGS, seed=0)
    draw_lora(model, "lora_B", 0.02, seed=0)
    model.eval()
    return encoder


def save(encoder: ItemEncoder, folder: Path) -> np.ndarray:
    titles, images = lora.canary_items()
    vectors = encoder.encode_items(titles, images).fused
    canary = lora.Canary(titles, images, vectors)
    lora.save_adapter(encoder.backbone.model, folder, {"encoder": encoder.settings.stored()}, canary, {}, "card")
    return vectors


@pytest.fixture
def adapter(tiny: Tiny, tmp_path: Path) -> Path:
    save(trained(tiny), tmp_path / "adapter")
    return tmp_path / "adapter"


# --- the layer ----------------------------------------------------------------------------------------------
def drawn_layer() -> MoDALinear:
    torch.manual_seed(0)
    layer = MoDALinear(torch.nn.Linear(6, 5), SETTINGS).eval()
    torch.nn.init.normal_(layer.lora_B)
    return layer


@pytest.mark.parametrize("name", schema.MODALITIES)
def test_the_output_is_the_weighted_sum_of_the_experts(name: str) -> None:
    layer, x = drawn_layer(), torch.randn(3, 6)
    logits = layer.gate @ layer.modality[schema.MODALITIES.index(name)]
    w = logits.exp() / logits.exp().sum()
    expected = x @ layer.base.weight.T + layer.base.bias
    for expert in range(4):  # each has rank 2 of the 8
        own = slice(2 * expert, 2 * expert + 2)
        expected = expected + 32 / 8 * w[expert] * (x @ layer.lora_A[own].T @ layer.lora_B[:, own].T)
    with modality.modality(name):
        torch.testing.assert_close(layer(x), expected)


def test_the_gate_knows_the_modality_and_nothing_else() -> None:
    layer = drawn_layer()
    text, image = (layer.weights(name).detach() for name in schema.MODALITIES)
    assert float(text.sum()) == pytest.approx(1.0) and float(image.sum()) == pytest.approx(1.0)
    assert float((text - image).abs().max()) > 0.01
    assert torch.equal(layer.weights("text").detach(), text)


def test_a_layer_is_not_called_without_a_modality() -> None:
    with pytest.raises(ModelError, match="without saying whether its input is text or an image"):
        drawn_layer()(torch.randn(1, 6))
    with modality.modality("text"):
        assert modality.current() == "text"
        with modality.modality("image"):
            assert modality.current() == "image"
        assert modality.current() == "text"
    assert modality.current() is None


def test_a_rank_that_experts_cannot_share_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--lora-rank 8 cannot be divided among --experts 3"):
        ModaSettings(experts=3, rank=8, alpha=32.0, dropout=0.0)


# --- in a model ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_every_language_layer_gets_experts_and_no_vision_module(tiny: Tiny, family: str) -> None:
    encoder = trained(tiny, family)
    model = encoder.backbone.model
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == ADAPTED.get(family, 14) * 4  # of two layers
    assert not any("vis" in name for name in names)
    assert set(names) == set(moda.weights(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_two_folded_deltas_give_the_vectors_of_the_unfolded_model(tiny: Tiny, tmp_path: Path, family: str) -> None:
    encoder = trained(tiny, family)
    save(encoder, tmp_path / "adapter")
    titles, images = lora.canary_items()
    before, after = (e.encode_items(titles, images) for e in (encoder, load(tiny, family, tmp_path / "adapter")))
    plain = load(tiny, family).encode_items(titles, images)
    for view in schema.VIEWS:
        np.testing.assert_allclose(getattr(after, view), getattr(before, view), atol=1e-5, rtol=1e-5)
        assert np.abs(getattr(after, view) - getattr(plain, view)).max() > 0.01


def test_one_expert_is_plain_lora(tiny: Tiny) -> None:
    with_experts, with_lora = load(tiny), load(tiny)
    model = moda.add_moda(with_experts.backbone, ModaSettings(1, 8, 32.0, 0.0), seed=0)
    wrapped = lora.add_lora(with_lora.backbone, 8, 32.0, 0.0, seed=0)
    draw_lora(model, "lora_B", 0.02, seed=0)
    own = moda.weights(model)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                key = name.removeprefix("base_model.model.").removesuffix(".default.weight")
                parameter.copy_(own[key])
    titles, images = lora.canary_items()
    a, b = (encoder.encode_items(titles, images) for encoder in (with_experts, with_lora))
    np.testing.assert_allclose(a.text, b.text, atol=1e-5)
    np.testing.assert_allclose(a.image, b.image, atol=1e-5)


def test_no_neighbour_changes_a_bit_of_a_vector(tiny: Tiny, adapter: Path) -> None:
    encoder = load(tiny, adapter=adapter)
    titles, images = lora.canary_items()
    together = encoder.encode_items(titles, images)
    alone = encoder.encode_items(titles[2:3], images[2:3])
    assert np.array_equal(together.text[2], alone.text[0]) and np.array_equal(together.image[2], alone.image[0])


def test_vectors_in_float32_come_from_weights_in_float32(tiny: Tiny, adapter: Path) -> None:
    encoder = ItemEncoder.load(str(tiny("qwen2_5_vl")), adapter, dtype="bfloat16", device="cpu")
    titles, images = lora.canary_items()
    usual = encoder.encode_items(titles, images)
    with encoder.in_float32():
        exact = encoder.encode_items(titles, images)
    assert not np.array_equal(usual.fused, exact.fused)
    assert lora.cosine(usual.fused, exact.fused).min() > 0.99
    assert np.array_equal(encoder.encode_items(titles, images).fused, usual.fused)


def test_gradient_checkpointing_finds_the_modality_of_the_first_run(tiny: Tiny) -> None:
    gradients = []
    for checkpointing in (False, True):
        encoder = trained(tiny)
        language_model = encoder.backbone.language_model.train()
        for layer in moda.layers(language_model).values():
            layer.dropout.p = 0.0
        if checkpointing:
            enable = language_model.gradient_checkpointing_enable
            if hasattr(language_model, "activation_checkpointing_enable"):
                enable = language_model.activation_checkpointing_enable
            enable({"use_reentrant": False, "context_fn": modality.remembered})
        titles, images = lora.canary_items()
        found = encoder.encode_sequences(
            [[title] for title in titles], [[f] for f in encoder.encode_images(images) if f]
        )
        loss = found["text"][:, 0].sum() + 2 * found["image"][:, 1].sum()
        parameters = [p for p in language_model.parameters() if p.requires_grad]
        torch.autograd.grad(loss, parameters, retain_graph=True)  # every layer runs again, twice
        gradients.append(torch.autograd.grad(loss, parameters))
        assert modality.current() is None
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-4, atol=1e-4)


# --- the folder ---------------------------------------------------------------------------------------------
def test_the_folder_says_what_it_is_to_us_and_to_peft(tiny: Tiny, adapter: Path) -> None:
    saved = json.loads((adapter / "vlm2rec.json").read_text())
    assert saved["kind"] == "moda"
    assert saved["moda"] == {"experts": 4, "rank": 8, "alpha": 32.0, "dropout": 0.1}
    assert not (adapter / "adapter_model.safetensors").exists()
    model = AutoModelForImageTextToText.from_pretrained(tiny("qwen2_5_vl"))
    with pytest.raises(KeyError, match="PEFT does not know: load this folder with vlm2rec"):
        PeftModel.from_pretrained(model, adapter)


def rewrite(adapter: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    without_checksums(adapter)
    path = adapter / lora.MODA_FILE
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: dict(list(w.items())[1:]), "1 keys missing, 0 unexpected"),
        (lambda w: {n.replace("gate", "router", 1): t for n, t in w.items()}, "keys missing"),
        (lambda w: {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in w.items()}, "no effect"),
        (lambda w: {n: t[:, :-1].contiguous() if "lora_A" in n else t for n, t in w.items()}, "has shape"),
        (lambda w: {n: -t if "lora_B" in n else t for n, t in w.items()}, "other vectors than when it was saved"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tiny: Tiny, adapter: Path, change: Callable, message: str) -> None:
    before = lora.adapter_hash(adapter)
    rewrite(adapter, change)
    assert lora.adapter_hash(adapter) != before
    with pytest.raises(ModelError, match=message):
        load(tiny, adapter=adapter)


def test_a_damaged_file_and_an_unfinished_folder_are_clear_errors(tiny: Tiny, adapter: Path) -> None:
    (adapter / lora.MODA_FILE).write_bytes(b"not safetensors")
    with pytest.raises(ArtifactError, match=r"moda.safetensors does not have the bytes that were written"):
        load(tiny, adapter=adapter)
    without_checksums(adapter)
    with pytest.raises(ModelError, match="damaged"):
        load(tiny, adapter=adapter)
    (adapter / schema.ADAPTER_FILE).unlink()
    with pytest.raises(ModelError, match="not a finished adapter folder"):
        load(tiny, adapter=adapter)


def test_a_kind_from_the_future_is_refused(tiny: Tiny, adapter: Path) -> None:
    without_checksums(adapter, kind="dora")
    with pytest.raises(ModelError, match=r"of kind 'dora'"):
        load(tiny, adapter=adapter)
