"""`vlm2rec finetune --method notellm2` on a drawn catalogue: pairs, two places of a prompt, late fusion, refusals."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from item_training import Tiny, curves, cut_off, require_same, settings_of

from vlm2rec.downstream.table import EmbeddingTable
from vlm2rec.embedder.adapters import lora
from vlm2rec.embedder.adapters.late_fusion import LateFusion, mean_tokens_of
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, DataError, ModelError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.item_features import ItemFeatures
from vlm2rec.embedder.training.notellm2 import PairContrast, PairModel, PairSamples, related_items
from vlm2rec.pipelines import convert, evaluate, export_items, finetune
from vlm2rec.pipelines.config import ConvertConfig, EvaluateConfig, ExportConfig, FinetuneConfig


def settings(tiny: Tiny, data: Path, out: Path, **more: Any) -> FinetuneConfig:
    return settings_of("notellm2", tiny("qwen2_5_vl"), data, out, **({"max_pixels": 56 * 56} | more))


def note_encoder(tiny: Tiny, family: str = "qwen2_5_vl", **more: Any) -> ItemEncoder:
    given: dict[str, Any] = {"prompt_style": "notellm2", "fusion": "internal", **more}
    return ItemEncoder.load(str(tiny(family)), max_pixels=56 * 56, dtype="float32", device="cpu", **given)


@pytest.fixture(scope="module")
def trained(tiny: Tiny, drawn_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "adapter"
    finetune.run(settings(tiny, drawn_dataset, out, max_steps=6, probe_users=4))
    return out


# --- which items occur together -------------------------------------------------------------------------------
def reference_scores(sequences: list[list[int]], window: int) -> dict[tuple[int, int], float]:
    scores: dict[tuple[int, int], float] = {}
    for own in sequences:
        pairs = {
            (own[i], own[j])
            for i in range(len(own))
            for j in range(i + 1, min(i + window, len(own) - 1) + 1)
            if own[i] != own[j]
        }
        for pair in pairs:
            scores[pair] = scores.get(pair, 0.0) + 1 / len(set(own))
    return scores


@pytest.mark.parametrize(("window", "most", "at_once"), [(1, 10, 100), (3, 2, 100), (50, 1, 3)])
def test_related_items_are_scored_as_in_the_paper(
    monkeypatch: pytest.MonkeyPatch, window: int, most: int, at_once: int
) -> None:
    monkeypatch.setattr("vlm2rec.embedder.training.notellm2._USERS_AT_ONCE", at_once)
    random = np.random.default_rng(0)
    sequences = [random.integers(0, 9, size) for size in (0, 1, 2, 5, 8, 3, 12, 12)]
    expected = reference_scores([own.tolist() for own in sequences], window)
    found = related_items(sequences, window, most)
    for first in range(9):
        own = [(-score, b) for (a, b), score in expected.items() if a == first]
        mine = found.first == first
        pairs = list(zip(-found.score[mine], found.second[mine], strict=True))
        assert [b for _, b in pairs] == [b for _, b in sorted((round(s, 9), b) for s, b in own)[:most]]
        assert [s for s, _ in pairs] == pytest.approx([s for s, _ in sorted((round(s, 9), b) for s, b in own)[:most]])


def test_pairs_come_from_the_training_parts_alone_and_are_drawn_by_their_score(drawn_dataset: Path) -> None:
    dataset = Dataset(drawn_dataset)
    samples = PairSamples(dataset.train_sequences(), dataset.max_history, 10, seed=0)
    allowed = reference_scores([own.tolist() for own in dataset.train_sequences()], dataset.max_history)
    drawn = [samples[place] for place in range(len(samples))]
    assert {*drawn} <= {*allowed} and [samples[place] for place in range(len(samples))] == drawn
    samples.set_epoch(1)
    assert [samples[place] for place in range(len(samples))] != drawn
    # 0 is followed by 1 in three histories of two items, and by 2 in one of four
    few = PairSamples([np.array([0, 1])] * 3 + [np.array([0, 2, 1, 3])], 3, 10)
    counts = {1: 0, 2: 0, 3: 0}
    for epoch in range(300):
        few.set_epoch(epoch)
        counts[few[0].second] += 1
    assert [count / 300 for count in counts.values()] == pytest.approx(
        [1.75 / 2.25, 0.25 / 2.25, 0.25 / 2.25], abs=0.08
    )
    with pytest.raises(DataError, match="in the training sequences of 2 users, 0 items have a related item"):
        PairSamples([np.array([1]), np.array([2, 2])], 5, 10)


# --- the loss and the gate ------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 4, 1]])
def test_the_loss_is_that_of_its_equation_in_float64(rows: list[int]) -> None:
    random = np.random.default_rng(1)
    vectors = {view: random.normal(size=(6, 4)) for view in ("fused", "image")}
    partner = [*rows[3:], *rows[:3]]

    def one(view: str, tau: float) -> float:
        unit = vectors[view] / np.linalg.norm(vectors[view], axis=1, keepdims=True)
        total = 0.0
        for i in range(6):
            own = (i + 3) % 6
            kept = [j for j in range(6) if j != i and (j == own or rows[j] not in (rows[i], partner[i]))]
            weights = {j: math.exp(float(unit[i] @ unit[j]) / tau) for j in kept}
            total -= math.log(weights[own] / sum(weights.values()))
        return total / 6

    loss = PairContrast(0.2, 9.0)
    tensors = {view: torch.from_numpy(values) for view, values in vectors.items()}
    total, log = loss(tensors, torch.tensor(rows))
    parts = {view: one(view, 0.2) for view in vectors}
    assert total.item() == pytest.approx((parts["image"] + 9 * parts["fused"]) / 10, rel=1e-6)
    assert log["loss_image"].item() == pytest.approx(parts["image"], rel=1e-6)
    alone, log = loss({"fused": tensors["fused"]}, torch.tensor(rows))
    assert alone.item() == pytest.approx(parts["fused"], rel=1e-6) and "loss_fused" not in log
    only, _ = PairContrast(0.2, 0.0)(tensors, torch.tensor(rows))
    assert only.item() == pytest.approx(parts["image"], rel=1e-6)


def test_the_gate_is_that_of_its_equation_in_float64() -> None:
    gate = LateFusion(3, seed=5)
    seen, states = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
    p, g = (w.detach().double().numpy() for w in (gate.project.weight, gate.gate.weight))
    v, h = seen.double().numpy() @ p.T, states.double().numpy()
    z = 1 / (1 + np.exp(-np.concatenate([v, h], axis=1) @ g.T))
    np.testing.assert_allclose(gate(seen, states).detach(), z * v + (1 - z) * h, rtol=1e-5)
    before = torch.random.get_rng_state()
    assert torch.equal(LateFusion(3, seed=5).gate.weight, gate.gate.weight)
    assert torch.equal(torch.random.get_rng_state(), before), "making it draws nothing of the training"


# --- two places of one prompt ---------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl", "llava"])
@pytest.mark.parametrize("mode", ["raw", "chat"])
def test_the_visual_state_knows_nothing_of_the_text(tiny: Tiny, drawn_dataset: Path, family: str, mode: str) -> None:
    encoder = note_encoder(tiny, family, prompt_mode=mode)
    items = ItemFeatures(Dataset(drawn_dataset), encoder)
    images = [features for (features,) in items.features([[0], [0], [1]])]
    with torch.no_grad():
        found = encoder.read_items(["Red mug", "A lamp of glass, large", "Red mug"], images)
        whole = encoder.encode_sequences([["Red mug"], ["A lamp of glass, large"], ["Red mug"]], [[i] for i in images])
    torch.testing.assert_close(found["fused"], whole["fused"], atol=1e-5, rtol=1e-4)
    visual = found["image"]
    torch.testing.assert_close(visual[0], visual[1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(visual[0], visual[2], atol=1e-3), "it does know the image"
    assert not torch.allclose(found["fused"][0], found["fused"][1], atol=1e-3)
    prompt = encoder._tokenize_together(["Red mug"], images[:1])
    ids = prompt.ids[: prompt.reads[0] + 1]
    if family != "llava":  # its tiny tokenizer does not decode what it has encoded
        assert encoder.backbone.tokenizer.decode(ids).endswith('compress this item into one word: "')


def test_the_basic_prompt_has_no_visual_state(tiny: Tiny, drawn_dataset: Path) -> None:
    encoder = note_encoder(tiny, prompt_style="notellm2-basic")
    items = ItemFeatures(Dataset(drawn_dataset), encoder)
    assert list(encoder.read_items(["Red mug"], items.features([[0]])[0])) == ["fused"]
    with pytest.raises(ValueError, match="unpack"):
        encoder.encode_sequences([["a", "b"]], items.features([[0, 1]]))


# --- training -------------------------------------------------------------------------------------------------
def test_the_adapter_holds_its_gate_and_says_what_it_was_trained_with(trained: Path) -> None:
    saved = json.loads((trained / "vlm2rec.json").read_text())
    assert saved["kind"] == "lora" and lora.LATE_FUSION_FILE in saved["files"]
    assert (saved["encoder"]["wording"], saved["encoder"]["late_fusion"]) == ("notellm2", "gate")
    assert saved["training"]["loss"] == "notellm2, late fusion"
    assert saved["training"]["loss_settings"]["multimodal_weight"] == 9.0
    card = (trained / "README.md").read_text()
    assert 'Item: {"image": "IMAGE"}, compress this item into one word: "". Item: {"title": "TITLE"}' in card
    assert "late_fusion.safetensors" in card and "\0" not in card
    rows = curves(trained)
    assert {"loss", "loss_image", "loss_fused", "own_cosine", "tau"} <= rows["train"][0].keys()
    assert "S_fused" in rows["probe"][0] and rows["valid"][-1]["step"] == 6
    for row in rows["train"]:
        assert row["loss"] == pytest.approx((row["loss_image"] + 9 * row["loss_fused"]) / 10, rel=1e-4)


def test_training_lowers_the_loss_and_moves_the_gate(tiny: Tiny, drawn_dataset: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"max_steps": 24, "learning_rate": 3e-3, "epochs": 100.0, "lora_dropout": 0.0}
    result = finetune.run(settings(tiny, drawn_dataset, tmp_path / "a", gradient_checkpointing=False, **more))
    assert result is not None
    rows = [row["loss"] for row in result.curves["train"]]
    assert np.mean(rows[-5:]) < np.mean(rows[:5])
    stored = safetensors.torch.load_file(tmp_path / "a" / lora.LATE_FUSION_FILE)
    fresh = LateFusion(64).state_dict()
    assert stored.keys() == fresh.keys() and all(not torch.equal(stored[name], fresh[name]) for name in fresh)


def test_the_ablations_leave_out_what_they_say(tiny: Tiny, drawn_dataset: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"prompt_style": "notellm2-basic", "late_fusion": "off", "max_steps": 1}
    finetune.run(settings(tiny, drawn_dataset, tmp_path / "a", **more))
    saved = json.loads((tmp_path / "a" / "vlm2rec.json").read_text())
    assert saved["training"]["loss"] == "notellm2, basic prompt, no late fusion"
    assert not (tmp_path / "a" / lora.LATE_FUSION_FILE).exists()
    assert "loss_image" not in curves(tmp_path / "a")["train"][0]
    # a run into the same folder with the gate, then without: no file of the former stays
    finetune.run(settings(tiny, drawn_dataset, tmp_path / "a", max_steps=1, resume=False))
    assert (tmp_path / "a" / lora.LATE_FUSION_FILE).exists()
    finetune.run(settings(tiny, drawn_dataset, tmp_path / "a", resume=False, **more))
    assert not (tmp_path / "a" / lora.LATE_FUSION_FILE).exists()


@pytest.mark.slow
def test_a_run_that_was_cut_off_ends_like_an_uninterrupted_one(tiny: Tiny, drawn_dataset: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"max_steps": 8, "checkpoint_steps": 3}
    cut, whole = (settings(tiny, drawn_dataset, tmp_path / name, **more) for name in ("cut", "whole"))
    cut_off(cut, 7)  # in the second epoch
    finetune.run(cut)
    finetune.run(whole)
    require_same(cut, whole, 8, [lora.WEIGHTS_FILE, lora.LATE_FUSION_FILE])
    assert finetune.run(cut) is None, "it is complete"


@pytest.mark.parametrize("chunk", [3, 8])
def test_items_in_chunks_have_the_gradients_of_the_whole_batch(tiny: Tiny, drawn_dataset: Path, chunk: int) -> None:
    gradients = []
    for size in (0, chunk):
        encoder = note_encoder(tiny)
        wrapped = lora.add_lora(encoder.backbone, 4, 8.0, 0.0, seed=0)
        encoder.late_fusion = LateFusion(encoder.dim)
        model = PairModel(encoder, wrapped, ItemFeatures(Dataset(drawn_dataset), encoder), PairContrast(), size)
        loss, _, _ = model(torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5, 0, 6]))
        gradients.append(torch.autograd.grad(loss, model.adapted))
    assert len(gradients[0]) == 2 + 2 * 7 * 2
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-4)


# --- export and evaluation ------------------------------------------------------------------------------------
def test_the_export_has_fused_vectors_after_the_gate(
    tiny: Tiny, drawn_dataset: Path, trained: Path, tmp_path: Path
) -> None:
    backbone = str(tiny("qwen2_5_vl"))
    given: dict[str, Any] = {"data": drawn_dataset, "backbone": backbone, "adapter": trained, "device": "cpu"}
    manifest = export_items.run(ExportConfig(**given, out=tmp_path / "e", dtype="float32"))
    assert manifest is not None and manifest["views"] == ["fused"] and manifest["counts"][schema.STATUS_OK] == 40
    assert manifest["settings"]["late_fusion"] == "gate"
    encoder = ItemEncoder.load(backbone, trained, dtype="float32", device="cpu")
    dataset = Dataset(drawn_dataset)
    features = [image for (image,) in ItemFeatures(dataset, encoder).features([[row] for row in range(5)])]
    with torch.no_grad():
        found = encoder.read_items(dataset.titles[:5], features)["fused"]
        fusion, encoder.late_fusion = encoder.late_fusion, None
        plain = encoder.read_items(dataset.titles[:5], features)["fused"]
        assert fusion is not None
        torch.testing.assert_close(fusion(mean_tokens_of(features), plain), found)
    table = EmbeddingTable.open(tmp_path / "e", "fused")
    vectors = table.vectors[table.rows_of(dataset.item_ids[:5])]
    np.testing.assert_allclose(vectors, found, atol=1e-5)
    assert not np.allclose(vectors, plain, atol=1e-2)
    result = evaluate.run(
        EvaluateConfig(
            data=drawn_dataset, embeddings=tmp_path / "e", out=tmp_path / "m", backbone=backbone, adapter=trained
        )
    )
    assert result["users_from"] == "mean"
    to: dict[str, Any] = {"to": "sentence-transformers", "backbone": backbone, "adapter": trained}
    with pytest.raises(ModelError, match="another method's prompts or pooling"):
        convert.run(ConvertConfig(embeddings=tmp_path / "e", out=tmp_path / "s", **to))


def test_a_damaged_or_missing_gate_is_refused(tiny: Tiny, trained: Path, tmp_path: Path) -> None:
    backbone, folder = str(tiny("qwen2_5_vl")), tmp_path / "a"
    shutil.copytree(trained, folder)
    before = lora.adapter_hash(folder)
    file = folder / lora.LATE_FUSION_FILE
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=lora.LATE_FUSION_FILE):
        ItemEncoder.load(backbone, folder, dtype="float32", device="cpu")
    file.unlink()
    with pytest.raises(ArtifactError, match=lora.LATE_FUSION_FILE):
        lora.adapter_hash(folder)
    file.write_bytes(content)
    assert lora.adapter_hash(folder) == before != lora.storage.sha256_file(folder / lora.WEIGHTS_FILE)


# --- refusals -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"prompt_style": "vlm2rec"}, "--method notellm2 with --prompt-style vlm2rec"),
        ({"fusion": "external"}, "--prompt-style notellm2 with --fusion external and --pooling last"),
        ({"pooling": "mean"}, "--prompt-style notellm2 with --fusion internal and --pooling mean"),
        ({"views": "text"}, "--fusion internal with --views text"),
        ({"gradient_steps": 2}, "--gradient-steps with --fusion internal"),
        ({"negatives": "global"}, "--negatives with --method notellm2, which has no such setting"),
        ({"method": "vlm2rec", "late_fusion": "gate"}, "--late-fusion with --method vlm2rec.*--method notellm2"),
        ({"method": "vlm2rec", "prompt_style": "notellm2"}, "--prompt-style notellm2 with --method vlm2rec"),
        ({"method": "sda", "prompt_style": "notellm2"}, "--prompt-style notellm2 with --fusion external"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_words(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, more: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        finetune.run(settings(tiny, drawn_dataset, tmp_path / "a", **more))


def test_a_gate_without_an_adapter_and_a_text_model_are_refused(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"data": drawn_dataset, "out": tmp_path / "e", "device": "cpu", "fusion": "internal"}
    more: dict[str, Any] = {"prompt_style": "notellm2", "late_fusion": "gate"}
    with pytest.raises(ConfigError, match="--late-fusion gate without --adapter"):
        export_items.run(ExportConfig(**given, backbone=str(tiny("qwen2_5_vl")), **more))
    with pytest.raises(ConfigError, match="is a text model"):
        finetune.run(settings(tiny, drawn_dataset, tmp_path / "a", backbone=str(tiny("qwen2"))))
