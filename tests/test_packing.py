"""Packed rows: nothing lost, nothing shared that should not be, and not a bit of a vector from its neighbours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn_lora import draw_lora
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn.attention import varlen
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from vlm2rec.embedder import prompts
from vlm2rec.embedder.adapters import lora
from vlm2rec.embedder.backbones import packing
from vlm2rec.embedder.backbones.backbone import Backbone, EncodedPrompt, ImageFeatures
from vlm2rec.embedder.backbones.devices import batches_by_tokens, matmul_precision
from vlm2rec.embedder.backbones.packing import IndependentRows, Layout
from vlm2rec.embedder.contract.errors import ModelError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder

Tiny = Callable[[str], Path]
TITLES = ["Red mug", "Oak lamp, 40 cm", "x", "The Old Clock (1987)"]


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 500))
def test_every_prompt_is_in_one_row_and_no_row_is_too_long(lengths: list[int], budget: int) -> None:
    rows = list(batches_by_tokens(lengths, budget, padded=False))
    assert sorted(position for row in rows for position in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= budget or len(row) == 1 for row in rows)


@pytest.mark.parametrize("prefix", [0, 5])
def test_attention_is_that_of_each_prompt_alone(prefix: int) -> None:
    torch.manual_seed(0)
    lengths = (3, 3, 1, 7, 3)
    query = torch.randn(1, 4, sum(lengths), 8)
    key, value = torch.randn(2, 1, 2, prefix + sum(lengths), 8)  # two heads for four: each is shared by two
    layout = Layout(lengths, prefix)
    packed, _ = packing._attend(torch.nn.Module(), query, key, value, None, scaling=0.3, packed_layout=layout)
    start = 0
    for length in lengths:
        own = torch.cat([torch.arange(prefix), torch.arange(prefix + start, prefix + start + length)])
        k, v = (states[:, :, own].repeat_interleave(2, dim=1) for states in (key, value))
        scores = 0.3 * query[:, :, start : start + length] @ k.transpose(2, 3)
        seen = torch.ones(length, prefix + length).tril(prefix).bool()
        expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        torch.testing.assert_close(packed[:, start : start + length], expected.transpose(1, 2))
        start += length
    assert layout.last.tolist() == [2, 5, 6, 13, 16]


@pytest.mark.parametrize("prefix", [0, 5])
def test_attention_that_is_trained_in_half_precision_is_that_of_float32(prefix: int) -> None:
    torch.manual_seed(0)
    layout = Layout((3, 3, 1, 70, 3), prefix)
    exact = [torch.randn(1, heads, length, 8) for heads, length in ((4, 80), (2, prefix + 80), (2, prefix + 80))]
    seen = torch.randn(1, 80, 4, 8)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        states = [part.to(dtype).requires_grad_() for part in exact]
        out, _ = packing._attend(torch.nn.Module(), *states, None, scaling=0.3, packed_layout=layout)
        assert out.dtype == dtype
        found.append([out, *torch.autograd.grad(out, states, seen.to(dtype))])
    for half, whole in zip(found[1], found[0], strict=True):
        assert (half - whole).abs().max() < 0.02 * whole.abs().max()


@pytest.mark.parametrize("at_once", [1, 2**19])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("heads", [1, 2, 6])
def test_attention_in_three_steps_is_torchs_own(
    heads: int, masked: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients, for heads that share a key, whole or a prompt at a time."""
    monkeypatch.setattr(packing, "_SCORES_AT_ONCE", at_once)
    torch.manual_seed(0)
    query = torch.randn(3, 6, 7, 8, dtype=torch.float64)
    key, value = torch.randn(2, 3, heads, 11, 8, dtype=torch.float64)
    mask = torch.ones(7, 11, dtype=torch.bool).tril(4) if masked else None
    seen = torch.randn(3, 6, 7, 8, dtype=torch.float64)
    found = []
    for attend in (packing._attend_openly, own_attention):
        states = [part.clone().requires_grad_() for part in (query, key, value)]
        out = attend(*states, mask, 0.3)
        found.append([out, *torch.autograd.grad(out, states, seen)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)  # the softmax is in float32


def own_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """What torch documents, with its own kernel."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)


def test_attention_in_three_steps_is_for_short_prompts_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_taken(dtype: torch.dtype, keys: int, dropout: float = 0.0, tiles: bool = False, onednn: bool = True) -> bool:
        monkeypatch.setattr(packing, "has_tiles", lambda: tiles)
        monkeypatch.setattr(packing, "onednn_multiplies_float32", lambda: onednn)
        return packing._is_faster_openly(torch.empty(1, 1, 2, 4, dtype=dtype), torch.empty(1, 1, keys, 4), dropout)

    short, long = packing._LONGEST_OPENLY, packing._LONGEST_OPENLY + 1
    for dtype in (torch.float32, torch.bfloat16):
        assert is_taken(dtype, short)
        assert not is_taken(dtype, long) and not is_taken(dtype, short, dropout=0.1)
    assert not is_taken(torch.float32, short, onednn=False), "MKL is faster within torch's own"
    assert is_taken(torch.bfloat16, short, tiles=True), "torch's own is slow to differentiate"
    with torch.no_grad():
        assert not is_taken(torch.bfloat16, short, tiles=True) and is_taken(torch.bfloat16, short)


def plain_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):  # type: ignore[no-untyped-def]
    """What torch's GPU kernel documents, in a loop: nobody can run the kernel itself without a GPU."""
    parts = []
    for row in range(len(cu_q) - 1):
        own = [t[b[row] : b[row + 1]] for t, b in ((q, cu_q), (k, cu_k), (v, cu_k))]
        assert len(own[0]) <= max_q and len(own[1]) <= max_k
        if enable_gqa:
            own[1:] = [t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in own[1:]]
        scores = scale * torch.einsum("qhd,khd->hqk", own[0], own[1])
        if window_size == (-1, 0):  # the last query sees the last key
            scores = scores.masked_fill(~torch.ones_like(scores[0]).tril(len(own[1]) - len(own[0])).bool(), -torch.inf)
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), own[2]))
    return torch.cat(parts)


@pytest.mark.parametrize("gqa", [True, False])
@pytest.mark.parametrize("prefix", [0, 5])
def test_the_gpu_kernel_is_given_what_it_documents(monkeypatch: pytest.MonkeyPatch, prefix: int, gqa: bool) -> None:
    def without_gqa(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, is_causal=False):  # type: ignore[no-untyped-def]
        return plain_varlen(
            q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=(-1, 0) if is_causal else (-1, -1)
        )

    monkeypatch.setattr(varlen, "varlen_attn", plain_varlen if gqa else without_gqa)
    torch.manual_seed(0)
    layout = Layout((3, 3, 1, 7, 3), prefix)
    query = torch.randn(1, 4, 17, 8)
    key, value = torch.randn(2, 1, 2, prefix + 17, 8)
    expected = packing._attend_by_runs(query, key, value, layout, scaling=0.3)
    torch.testing.assert_close(packing._attend_by_kernel(query, key, value, layout, 0.3), expected)
    assert not packing._kernel_works(torch.device("cpu"), torch.bfloat16, 8)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
def test_windows_of_the_vision_tower_are_attended_as_one_by_one(tiny: Tiny, family: str) -> None:
    backbone = Backbone.load(str(tiny(family)), device="cpu")
    stock = AutoModelForImageTextToText.from_pretrained(tiny(family), dtype=torch.float32).eval()
    random = np.random.default_rng(0)
    sizes = [(140, 84), (84, 84), (200, 112), (84, 84)]  # the first and third end in windows of other sizes
    images = [Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    inputs = backbone.processor.image_processor(images=images, return_tensors="pt")
    with torch.no_grad():
        expected = stock.model.get_image_features(**inputs, return_dict=True).pooler_output
    assert backbone.model.model.visual.config._attn_implementation == packing.VISION_ATTENTION
    assert stock.model.visual.config._attn_implementation == "sdpa"
    for ours, theirs in zip(backbone.encode_images(images), expected, strict=True):
        torch.testing.assert_close(ours.tokens, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava", "qwen3", "llama"])
def test_a_prepared_model_still_does_what_its_own_code_does(tiny: Tiny, family: str) -> None:
    loader = AutoModelForCausalLM if family in ("qwen3", "llama") else AutoModelForImageTextToText
    backbone = Backbone.load(str(tiny(family)), device="cpu")
    stock = loader.from_pretrained(tiny(family), dtype=torch.float32).eval()
    ids = torch.tensor([[5, 9, 3, 7, 8], [0, 0, 4, 6, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids, attention_mask=mask).logits for model in (backbone.model, stock))
        written = [
            m.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False) for m in (backbone.model, stock)
        ]
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], atol=1e-5, rtol=1e-5)
    assert torch.equal(*written)


def test_a_shared_prefix_is_forgotten_when_weights_begin_to_change(tiny: Tiny) -> None:
    encoder = ItemEncoder.load(str(tiny("qwen2_5_vl")), dtype="float32", device="cpu")
    before = encoder.encode_items(TITLES, [None] * 4).text
    wrapped = lora.add_lora(encoder.backbone, rank=4, alpha=8, dropout=0.0, seed=0)
    draw_lora(wrapped, "lora_B", 0.05, seed=0)
    prompt = encoder.backbone.tokenize(prompts.text_prompt(TITLES[:1]))
    with torch.no_grad():
        expected = encoder.backbone.encode([prompt])[0].numpy()
    after = encoder.encode_items(TITLES, [None] * 4).text
    assert np.abs(after - before).max() > 1e-2
    np.testing.assert_allclose(after[0], expected, atol=1e-6)


def test_a_title_that_changes_the_tokens_of_the_instruction_goes_without_the_prefix(tiny: Tiny) -> None:
    backbone = Backbone.load(str(tiny("qwen2_5_vl")), device="cpu")
    odd, plain = (backbone.tokenize(prompts.text_prompt([title])) for title in ("", "Red mug"))
    odd = dataclasses.replace(odd, shared=0)
    with torch.no_grad():
        whole = backbone.encode([odd, plain])
        backbone.share_prefixes()
        mixed = backbone.encode([odd, plain])
    torch.testing.assert_close(mixed, whole, atol=1e-5, rtol=1e-5)


def test_gradients_of_packed_rows_are_those_of_single_prompts(tiny: Tiny) -> None:
    backbone = Backbone.load(str(tiny("qwen2_5_vl")), device="cpu")
    weight = backbone.language_model.layers[0].self_attn.q_proj.weight
    weight.requires_grad_(True)
    features = backbone.encode_images([Image.new("RGB", (84, 84), "red")])
    encoded = [backbone.tokenize(prompts.text_prompt(TITLES[:n])) for n in (1, 3)]
    encoded.append(backbone.tokenize(prompts.image_prompt(1), features))
    (together,) = torch.autograd.grad(backbone.encode(encoded).square().sum(), weight)
    alone = sum(torch.autograd.grad(backbone.encode([p]).square().sum(), weight)[0] for p in encoded)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_in_any_company(threads: int) -> None:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        layer = torch.nn.Linear(1536, 512)
        rows = torch.randn(1, 1300, 1536)
        with torch.no_grad(), IndependentRows():
            together = layer(rows)
            for start, stop in ((0, 1), (7, 40), (500, 1012), (600, 1300)):
                assert torch.equal(layer(rows[:, start:stop]), together[:, start:stop])
        torch.testing.assert_close(together, F.linear(rows, layer.weight, layer.bias), atol=1e-4, rtol=1e-4)
    finally:
        torch.set_num_threads(before)


def test_where_a_product_depends_on_its_rows_all_products_get_the_same_number(monkeypatch: pytest.MonkeyPatch) -> None:
    true_product, asked = torch.mm, set()

    def uneven(rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        asked.add(len(rows))
        found = true_product(rows, weight) + 1e-3 * (len(rows) != 512)
        return found if out is None else out.copy_(found)

    monkeypatch.setattr(torch, "mm", uneven)
    packing.rows_of_product.cache_clear()
    try:
        layer, rows = torch.nn.Linear(40, 24), torch.randn(1, 1300, 40)
        assert packing.rows_of_product(40, 24, torch.get_num_threads(), matmul_precision()) == (
            512,
            512,
        )
        asked.clear()
        with torch.no_grad(), IndependentRows():
            together = layer(rows)
            assert torch.equal(layer(rows[:, 7:40]), together[:, 7:40])
        assert asked == {512}
    finally:
        packing.rows_of_product.cache_clear()


# --- when memory runs out ------------------------------------------------------------------------------------


def test_fault_40_out_of_memory_halves_the_rows_and_loses_nothing(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = ItemEncoder.load(str(tiny("qwen2_5_vl")), dtype="float32", device="cpu")
    images = [Image.new("RGB", (84, 84), colour) for colour in ("red", "blue", "green", "black")]
    expected = encoder.encode_items(TITLES, images)
    rows, pictures = Backbone.encode, Backbone.run_vision_tower

    def small(self: Backbone, batch: Sequence[EncodedPrompt]) -> torch.Tensor:
        if sum(len(prompt) for prompt in batch) > 60:
            raise torch.OutOfMemoryError("no room")
        return rows(self, batch)

    def one(self: Backbone, batch: Sequence[Image.Image]) -> list[ImageFeatures]:
        if len(batch) > 1:
            raise torch.OutOfMemoryError("no room")
        return pictures(self, batch)

    monkeypatch.setattr(Backbone, "encode", small)
    monkeypatch.setattr(Backbone, "run_vision_tower", one)
    found = encoder.encode_items(TITLES, images)
    for view in ("fused", "text", "image"):
        np.testing.assert_array_equal(getattr(found, view), getattr(expected, view))
    assert encoder.token_budget <= 60 and "out of memory: rows of" in caplog.text


def test_a_prompt_that_does_not_fit_by_itself_is_an_error(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    encoder = ItemEncoder.load(str(tiny("qwen2_5_vl")), dtype="float32", device="cpu")
    monkeypatch.setattr(Backbone, "encode", never)
    with pytest.raises(ModelError, match="too little memory for the model and a prompt of"):
        encoder.encode_items(TITLES, [None] * 4)
