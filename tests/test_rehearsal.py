"""The code for GPUs on a fake CUDA device: every tensor is on the right one, and the numbers are those of the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from drawn_lora import draw_lora
from embedding_folder import write_embeddings
from fake_cuda import MixedDevicesError, fake_cuda
from item_training import curves, settings_of
from PIL import Image
from recommender_world import circle_vectors, cyclic_sequences, write_dataset

from vlm2rec.downstream.multimodal.recipes import MODELS
from vlm2rec.embedder.adapters.lora import add_lora
from vlm2rec.embedder.backbones import packing
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.encoders.item_encoder import EncodedItems, ItemEncoder
from vlm2rec.embedder.encoders.item_features import ItemFeatures
from vlm2rec.embedder.export import worker
from vlm2rec.embedder.export.estimate import estimate
from vlm2rec.embedder.training.losses import VLM2RecObjective
from vlm2rec.embedder.training.vlm2rec import HistoryModel
from vlm2rec.pipelines import finetune, train_recommender
from vlm2rec.pipelines.config import FinetuneConfig, TrainRecommenderConfig
from vlm2rec.pipelines.read_config import read_config

Tiny = Callable[[str], Path]
TITLES = ["red chair", "a very small blue lamp", "hat", "green shirt", "table with legs"]
FAMILIES = ["qwen2_5_vl", "qwen3_vl", "internvl", "llava", "gemma3", "idefics3", "qwen3_5"]


@pytest.fixture(autouse=True)
def fresh_devices() -> Iterator[None]:
    """What accelerate and the kernel's check remember of a device ends with the test."""
    for remembered in (AcceleratorState._reset_state, packing._kernel_works.cache_clear):
        remembered()
    yield
    for remembered in (AcceleratorState._reset_state, packing._kernel_works.cache_clear):
        remembered()


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 255, (side, 60, 3), dtype=np.uint8)) for side in (60, 90, 60, 112, 60)]


def encoded(encoder: ItemEncoder, pictures: list[Image.Image]) -> EncodedItems:
    return encoder.encode_items(TITLES, [encoder.backbone.patch(picture) for picture in pictures])


def far(one: EncodedItems, other: EncodedItems) -> float:
    """Return the largest difference of two unit vectors of the same item."""
    gaps = []
    for view in schema.VIEWS:
        pair = [getattr(found, view) for found in (one, other)]
        rows = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in pair]
        gaps.append(np.linalg.norm(rows[0] - rows[1], axis=1).max())
    return float(max(gaps))


@pytest.mark.parametrize(
    ("family", "dtype"), [("qwen2_5_vl", "float32"), *((family, "bfloat16") for family in FAMILIES)]
)
def test_an_export_on_the_card_has_the_vectors_of_the_cpu(
    tiny: Tiny, pictures: list[Image.Image], family: str, dtype: Any
) -> None:
    expected = encoded(ItemEncoder.load(str(tiny(family)), dtype=dtype, device="cpu"), pictures)
    with fake_cuda() as card:
        encoder = ItemEncoder.load(str(tiny(family)), dtype=dtype, device="cuda")
        found = encoded(encoder, pictures)
        again = encoded(encoder, pictures)  # with the prefixes that are known by now
    assert far(found, expected) < (1e-5 if dtype == "float32" else 0.1)
    assert far(found, again) == 0
    assert bool(card.kernels["varlen_attn"]) == (dtype == "bfloat16")
    assert card.kernels["scaled_dot_product_attention"] or family in ("qwen2_5_vl", "qwen3_vl")


def test_the_host_does_not_wait_for_each_image(tiny: Tiny, pictures: list[Image.Image]) -> None:
    def counted(times: int) -> int:
        card.forget()
        few = [encoder.backbone.patch(picture) for picture in pictures] * times
        encoder.encode_items(TITLES * times, few)
        return sum(card.waits.values()) + sum(card.copies.values())

    with fake_cuda() as card:
        encoder = ItemEncoder.load(str(tiny("qwen2_5_vl")), dtype="bfloat16", device="cuda")
        encoded(encoder, pictures)
        assert counted(1) == counted(4) <= 20


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_bytes_without_values_are_those_with_values(
    tiny: Tiny, pictures: list[Image.Image], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the memory of large models, whose values would fit nowhere, can be computed: `benchmarks/gpu_memory.py`."""
    usual = packing._kernel_works
    monkeypatch.setattr(packing, "_kernel_works", lambda *_: True)
    monkeypatch.setattr(packing._kernel_works, "cache_clear", usual.cache_clear, raising=False)

    def counted(values: bool) -> tuple[int, int, int]:
        with fake_cuda(values) as card:
            encoder = ItemEncoder.load(str(tiny(family)), dtype="bfloat16", device="cuda")
            weights = card.held
            card.forget()
            encoded(encoder, pictures)
            return weights, card.peak, card.held

    assert counted(True) == counted(False)


class Planned(SimpleNamespace):
    """As much of a plan as the estimate reads."""

    def __len__(self) -> int:
        return 10


def test_a_dry_run_on_a_card_encodes_as_many_items_as_an_export_at_once(tmp_path: Path) -> None:
    """With fewer, the memory that it reports would be too small."""
    settings = {"views": ["fused"], "storage": "float32", "dim": 4}
    plan: Any = Planned(settings=settings, item_ids=range(1000), shard_size=100)
    asked: list[int] = []
    for device in ("cpu", "cuda"):
        with fake_cuda():
            out, place = tmp_path, torch.device(device)
            estimate(plan, out, range(1000), 10, lambda rows: asked.append(len(rows)), place)
    assert asked == [4, 64, 4, worker.ITEMS_AT_ONCE]


def test_a_dry_run_of_a_training_counts_on_a_card_what_it_counts_on_a_cpu(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card's allocator, and what torch's operations return."""
    monkeypatch.setattr(packing, "_LONGEST_OPENLY", 0)  # its block of a few MB on a CPU is more than this model needs
    about = {"data": drawn_dataset, "backbone": str(tiny("qwen2_5_vl")), "out": tmp_path / "adapter"}
    about |= {"max_pixels": 3136, "dtype": "float32", "batch_size": 2, "dry_run": True}  # type: ignore[dict-item]
    found: list[Any] = []
    for device in ("cpu", "cuda"):
        asked = FinetuneConfig(**about, device=device)  # type: ignore[arg-type]
        with fake_cuda() if device == "cuda" else nullcontext():
            found.append(finetune.run(asked))
    on_cpu, on_card = found
    for name in ("weights", "optimizer", "tokens", "images", "parameters", "steps"):
        assert on_cpu[name] == on_card[name], name
    for name in ("first", "more"):
        assert on_cpu[name] == pytest.approx(on_card[name], rel=0.1), name
    assert on_card["device"] == "cuda:0" and not (tmp_path / "adapter").exists()


def test_a_planted_index_on_the_cpu_is_found(
    tiny: Tiny, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    last = property(lambda layout: torch.tensor(layout.lengths).cumsum(0) - 1)
    monkeypatch.setattr(packing.Layout, "last", last)
    expected = ItemEncoder.load(str(tiny("qwen2_5_vl")), dtype="float32", device="cpu")
    encoded(expected, pictures)  # no fault on a CPU
    with fake_cuda(), pytest.raises(MixedDevicesError, match=r"cuda:0.*on cpu"):
        encoded(ItemEncoder.load(str(tiny("qwen2_5_vl")), dtype="float32", device="cuda"), pictures)


# --- training -----------------------------------------------------------------------------------------------

HISTORIES, TARGETS = [[1, 2, 3], [4, 5], [6]], torch.tensor([12, 1, 3])


@pytest.mark.parametrize("chunk", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_step_on_the_card_has_the_gradients_of_the_cpu(tiny: Tiny, drawn_dataset: Path, chunk: int) -> None:
    def step(device: Any) -> tuple[list[torch.Tensor], dict[str, float]]:
        encoder = ItemEncoder.load(str(tiny("qwen2_5_vl")), max_pixels=56 * 56, dtype="float32", device=device)
        wrapped = add_lora(encoder.backbone, 2, 4.0, 0.0, 0)
        draw_lora(wrapped, "lora_", 0.1, seed=1)
        items = ItemFeatures(Dataset(drawn_dataset), encoder)
        model = HistoryModel(encoder, wrapped, items, VLM2RecObjective(0.5, 0.5), 0.5, chunk_users=chunk)
        model.to(encoder.backbone.device).train()
        loss, _, alignment = model(HISTORIES, TARGETS.to(device), with_gradients=True)
        loss.backward()
        return [p.grad.cpu() for p in model.parameters() if p.grad is not None], alignment

    expected, aligned = step("cpu")
    with fake_cuda():
        found, also = step("cuda")
    assert len(found) == len(expected) > 10
    gaps = [float((a - b).norm() / b.norm().clamp_min(1e-6)) for a, b in zip(found, expected, strict=True)]
    assert max(gaps) < 1e-4
    assert also == pytest.approx(aligned, abs=1e-3)


TRAININGS: dict[str, dict[str, Any]] = {
    "vlm2rec": {
        **{"max_steps": 1, "gradient_steps": 1, "probe_users": 2},
        **{"chunk_users": 3, "gradient_checkpointing": True},
    },
    "sft": {"method": "vlm2rec", "loss": "sft"},
    "sda": {"gradient_steps": 2, "probe_users": 2},
}


@pytest.mark.parametrize("name", ["vlm2rec", *(pytest.param(each, marks=pytest.mark.slow) for each in ("sft", "sda"))])
def test_a_training_runs_on_the_card(
    tiny: Tiny, drawn_dataset: Path, pictures: list[Image.Image], tmp_path: Path, name: str
) -> None:
    """The whole command: batches on the device, validation, probe, gradients, checkpoint, adapter, canary.

    Then an export with the adapter, of which an item has NaN and is encoded again in float32.
    """
    more = {"max_pixels": 56 * 56, "batch_size": 4, "valid_users": 2, "max_steps": 2, **TRAININGS[name]}
    method = more.pop("method", name)
    config = settings_of(method, tiny("qwen2_5_vl"), drawn_dataset, tmp_path / "out", **more)
    with fake_cuda() as card:
        finetune.run(replace(config, device="cuda", dtype="bfloat16"))
        encoder = ItemEncoder.load(str(tiny("qwen2_5_vl")), tmp_path / "out", dtype="bfloat16", device="cuda")
        usual = encoder.encode_items

        def broken(titles: Any, images: Any) -> EncodedItems:
            found = usual(titles, images)
            if encoder.backbone.model.dtype == torch.bfloat16:
                found.fused[:1] = np.nan
            return found

        encoder.encode_items = broken  # type: ignore[method-assign]
        rows = worker.encode_rows(encoder, TITLES, [encoder.backbone.patch(picture) for picture in pictures])
    assert rows.status == [schema.STATUS_OK] * 5 and encoder.backbone.model.dtype == torch.bfloat16
    assert len(curves(tmp_path / "out")["train"]) == config.max_steps
    assert card.kernels and (tmp_path / "out" / "canary.safetensors").is_file()


# --- recommenders -------------------------------------------------------------------------------------------

ITEMS = [f"i{number}" for number in range(30)]


@pytest.mark.parametrize("name", MODELS)
def test_a_multimodal_recommender_trains_and_ranks_on_the_card(tmp_path: Path, name: str) -> None:
    data = write_dataset(tmp_path / "data", cyclic_sequences(ITEMS, 12), ITEMS)
    vectors = [circle_vectors(len(ITEMS), 8, seed) for seed in range(3)]
    write_embeddings(tmp_path / "embeddings", ITEMS, vectors[0], text=vectors[1], image=vectors[2])
    flags = {"model": name, "data": data, "embeddings": tmp_path / "embeddings", "hidden_size": 8, "batch_size": 64}

    def trained(device: str) -> dict[str, Any]:
        given = flags | {"max_epochs": 2, "eval_step": 1, "device": device, "out": tmp_path / device}
        return train_recommender.run(read_config(TrainRecommenderConfig, flags=given))

    expected = trained("cpu")
    with fake_cuda() as card:
        assert trained("cuda").keys() == expected.keys()
    assert card.operations
