"""`vlm2rec finetune --method sda` on a drawn catalogue: what it leaves, what comes of it, what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from item_training import Tiny, curves, cut_off, require_same, settings_of

from vlm2rec.downstream.table import EmbeddingTable, unit_rows
from vlm2rec.embedder import distributed, prompts
from vlm2rec.embedder.adapters import lora, moda
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ConfigError, DataError, ModelError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.item_features import ItemFeatures, encode_users_together
from vlm2rec.embedder.encoders.settings import fingerprint_of
from vlm2rec.embedder.training.gradients import conflict
from vlm2rec.embedder.training.sda import ItemAlignment, ItemModel, ItemSamples, probed
from vlm2rec.pipelines import convert, evaluate, export_items, finetune
from vlm2rec.pipelines.config import ConvertConfig, EvaluateConfig, ExportConfig, FinetuneConfig
from vlm2rec.pipelines.read_config import read_config


def settings(tiny: Tiny, data: Path, out: Path, **more: Any) -> FinetuneConfig:
    return settings_of("sda", tiny("qwen2_5_vl"), data, out, **({"max_pixels": 56 * 56} | more))


def exporting(tiny: Tiny, data: Path, out: Path, adapter: Path, **more: Any) -> ExportConfig:
    backbone = str(tiny("qwen2_5_vl"))
    return ExportConfig(data=data, backbone=backbone, out=out, adapter=adapter, dtype="float32", device="cpu", **more)


@pytest.fixture(scope="module")
def trained(tiny: Tiny, drawn_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "adapter"
    finetune.run(settings(tiny, drawn_dataset, out, max_steps=6, gradient_steps=2, probe_users=4))
    return out


@pytest.fixture(scope="module")
def exported(tiny: Tiny, drawn_dataset: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "embeddings"
    export_items.run(exporting(tiny, drawn_dataset, out, trained))
    return out


# --- training -----------------------------------------------------------------------------------------------
def test_defaults_are_the_papers_where_nothing_is_given(tmp_path: Path) -> None:
    flags = {"method": "sda", "data": tmp_path, "backbone": "b", "out": tmp_path}
    found = read_config(FinetuneConfig, flags=flags)
    assert (found.pooling, found.prompt_style, found.lora_rank, found.experts) == ("mean", "sda", 8, 8)
    assert (found.batch_size, found.lora_alpha, found.lora_dropout, found.cmsa) == (32, 32.0, 0.1, "paper")
    # of its public code
    assert (found.learning_rate, found.prompt_mode, found.item_text) == (2e-4, "chat", "attributes")
    assert found.max_title_tokens == 128
    assert read_config(FinetuneConfig, flags={**flags, "lora_rank": 16}).lora_rank == 16
    vlm2rec = read_config(FinetuneConfig, flags=flags | {"method": "vlm2rec"})
    assert (vlm2rec.pooling, vlm2rec.prompt_style, vlm2rec.lora_rank, vlm2rec.batch_size) == ("last", "vlm2rec", 16, 8)
    assert (vlm2rec.learning_rate, vlm2rec.prompt_mode, vlm2rec.item_text) == (1e-5, "raw", "title")


def test_the_adapter_says_what_it_was_trained_with(trained: Path) -> None:
    saved = json.loads((trained / "vlm2rec.json").read_text())
    assert (saved["kind"], saved["moda"]["experts"], saved["moda"]["rank"]) == ("moda", 8, 8)
    assert (saved["encoder"]["pooling"], saved["encoder"]["wording"]) == ("mean", "sda")
    assert saved["training"]["method"] == "sda" and saved["training"]["loss"] == "sda, cmsa, moda"
    assert saved["training"]["effective_negatives"] == 7.0 and saved["dataset"]["samples"] == 40
    card = (trained / "README.md").read_text()
    said = "The product has the following attributes: title is TITLE; category is CATEGORY; brand is BRAND"
    assert said in card and "the mean of all tokens' states" in card
    assert (saved["encoder"]["item_text"], saved["encoder"]["prompt_mode"]) == ("attributes", "chat")
    assert (saved["dataset"]["category"], saved["dataset"]["brand"]) == ("category", "brand")
    assert "MoDA" in card and "library_name: peft" not in card


def test_curves_show_how_often_an_image_finds_its_own_text(trained: Path) -> None:
    found = curves(trained)
    assert {"loss", "own_text_first", "own_cosine", "tau", "norm_ratio_item"} <= found["train"][0].keys()
    assert [row["step"] for row in found["valid"]] == [0, 5, 6]  # 40 items are five batches
    assert [row["step"] for row in found["probe"]] == [0, 6] and "S_text" in found["probe"][0]
    rows = found["gradients"]
    assert [(row["step"], row["fixed_batch"]) for row in rows] == [(0, 8), (2, 8), (4, 8)]
    # at the first step B is zero, and so is the gradient of A: the cosine is that of B alone
    assert all(-1 <= row[f"cos_text_image_{name}"] <= 1 for row in rows for name in ("q_proj", "k_proj"))


@pytest.mark.parametrize("cmsa", ["paper", "off", "reference", "reference-off"])
def test_training_lowers_the_loss(tiny: Tiny, drawn_dataset: Path, tmp_path: Path, cmsa: str) -> None:
    more: dict[str, Any] = {
        "max_steps": 24,
        "learning_rate": 3e-3,
        "lora_dropout": 0.0,
        "gradient_checkpointing": False,
    }
    result = finetune.run(settings(tiny, drawn_dataset, tmp_path / "a", cmsa=cmsa, epochs=100.0, **more))
    assert result is not None
    losses = [row["loss"] for row in result.curves["train"]]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    taus = [row["tau"] for row in result.curves["train"]]
    assert (taus[0] != taus[-1]) == cmsa.startswith("reference")


def test_one_expert_leaves_a_standard_peft_adapter_with_the_settings_of_sda(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path
) -> None:
    finetune.run(settings(tiny, drawn_dataset, tmp_path / "a", experts=1, gradient_steps=1))
    assert lora.kind(tmp_path / "a") == "lora" and (tmp_path / "a" / lora.WEIGHTS_FILE).is_file()
    assert json.loads((tmp_path / "a" / "vlm2rec.json").read_text())["training"]["loss"] == "sda, cmsa, lora"
    assert "cos_text_image_q_proj" in curves(tmp_path / "a")["gradients"][1]
    encoder = ItemEncoder.load(str(tiny("qwen2_5_vl")), tmp_path / "a", dtype="float32", device="cpu")
    assert encoder.settings.prompt_style == "sda"


def test_a_run_that_was_cut_off_ends_like_an_uninterrupted_one(tiny: Tiny, drawn_dataset: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"max_steps": 7, "checkpoint_steps": 3, "cmsa": "reference"}
    cut, whole = (settings(tiny, drawn_dataset, tmp_path / name, **more) for name in ("cut", "whole"))
    cut_off(cut, 5)
    finetune.run(cut)
    finetune.run(whole)
    require_same(cut, whole, 7, [lora.MODA_FILE])


@pytest.mark.parametrize("chunk", [3, 8])
def test_items_in_chunks_have_the_gradients_of_the_whole_batch(tiny: Tiny, drawn_dataset: Path, chunk: int) -> None:
    gradients = []
    for size in (0, chunk):
        model = item_model(tiny, drawn_dataset, size)
        loss, _, _ = model(rows=torch.arange(8))
        gradients.append(torch.autograd.grad(loss, model.adapted))
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-4)


def item_model(tiny: Tiny, data: Path, chunk: int = 0) -> ItemModel:
    encoder = ItemEncoder.load(
        str(tiny("qwen2_5_vl")), pooling="mean", prompt_style="sda", max_pixels=56 * 56, dtype="float32", device="cpu"
    )
    wrapped = moda.add_moda(encoder.backbone, moda.ModaSettings(4, 8, 32.0, 0.0), seed=0)
    return ItemModel(encoder, wrapped, ItemFeatures(Dataset(data), encoder), ItemAlignment("off"), chunk)


# --- gradients ----------------------------------------------------------------------------------------------
def test_conflict_is_the_cosine_of_the_gradients_in_the_named_part() -> None:
    a, b = torch.ones(2, 2, requires_grad=True), torch.ones(2, requires_grad=True)
    losses = {
        "text": (a * torch.tensor([[3.0, 9.0], [0.0, 9.0]])).sum() + 4 * b[0],
        "image": (a * torch.tensor([[4.0, -9.0], [0.0, 9.0]])).sum() + -3 * b[0],
    }
    everything, first = slice(None), slice(1)
    parts = {
        "both": [(a, (everything, first)), (b, (everything,))],  # (3, 0, 4, 0) and (4, 0, -3, 0)
        "a": [(a, (everything, first))],
        "nothing": [(b, (slice(1, 2),))],
    }
    assert conflict(losses, parts) == pytest.approx({"cos_text_image_both": 0.0, "cos_text_image_a": 1.0})


def test_the_probe_looks_at_the_first_expert_of_the_last_layer(tiny: Tiny, drawn_dataset: Path) -> None:
    model = item_model(tiny, drawn_dataset)
    last = model.encoder.backbone.language_model.layers[-1].self_attn
    found = probed(model.encoder.backbone)
    assert list(found) == ["q_proj", "k_proj"]
    (a, rows), (b, columns) = found["k_proj"]
    assert a is last.k_proj.lora_A and b is last.k_proj.lora_B
    assert (a[rows].shape, b[columns].shape) == ((2, 64), (32, 2))


def test_looking_at_the_gradients_changes_nothing(tiny: Tiny, drawn_dataset: Path, tmp_path: Path) -> None:
    losses = []
    for every in (0, 1):
        result = finetune.run(settings(tiny, drawn_dataset, tmp_path / str(every), gradient_steps=every))
        assert result is not None
        losses.append([row["loss"] for row in result.curves["train"]])
    assert losses[0] == losses[1]


# --- export and both tasks ----------------------------------------------------------------------------------
def test_the_exported_vectors_are_those_of_the_unfolded_model(
    tiny: Tiny, drawn_dataset: Path, trained: Path, exported: Path
) -> None:
    encoder = ItemEncoder.load(
        str(tiny("qwen2_5_vl")),
        **{"pooling": "mean", "prompt_style": "sda", "prompt_mode": "chat", "item_text": "attributes"},
        **{"max_title_tokens": 128, "max_pixels": 56 * 56, "dtype": "float32", "device": "cpu"},
    )
    lora.load_moda(encoder.backbone, trained)
    encoder.backbone.share_prefixes()
    assert moda.layers(encoder.backbone.model), "experts, not folded weights"
    dataset = Dataset(drawn_dataset)
    images = [encoder.open_image(dataset.image_root, path) for path in dataset.image_paths]
    texts = [
        f"title is {row['title']}; category is {row['category']}; brand is {row['brand']}"
        for row in dataset.items.to_pylist()
    ]
    unfolded = encoder.encode_items(texts, images)
    for view in schema.VIEWS:
        folded = EmbeddingTable.open(exported, view).take(dataset.item_ids)
        np.testing.assert_allclose(folded, getattr(unfolded, view), atol=1e-5, rtol=1e-5)


def test_the_vision_cache_serves_an_export_with_two_sets_of_weights(
    tiny: Tiny, drawn_dataset: Path, trained: Path, exported: Path, tmp_path: Path
) -> None:
    export_items.run(exporting(tiny, drawn_dataset, tmp_path / "off", trained, vision_cache="off"))
    ids = Dataset(drawn_dataset).item_ids
    with_cache, without = (EmbeddingTable.open(folder, "image").take(ids) for folder in (exported, tmp_path / "off"))
    assert np.array_equal(with_cache, without)


def test_task_1_takes_the_mean_of_the_history_even_where_a_backbone_is_given(
    tiny: Tiny, drawn_dataset: Path, trained: Path, exported: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"data": drawn_dataset, "embeddings": exported, "device": "cpu"}
    given |= {"backbone": str(tiny("qwen2_5_vl")), "adapter": trained}
    result = evaluate.run(EvaluateConfig(out=tmp_path / "a", **given))
    assert result["users_from"] == "mean"
    with pytest.raises(ConfigError, match=r"--users-from sequence.*are for single items"):
        evaluate.run(EvaluateConfig(out=tmp_path / "b", users_from="sequence", **given))
    # what validation ranks by during training is the same vector
    dataset, histories = Dataset(drawn_dataset), Dataset(drawn_dataset).histories("test")
    table = EmbeddingTable.open(exported, "fused")
    encoder = ItemEncoder.load(given["backbone"], trained, dtype="float32", device="cpu")
    sequences = [histories.of(user).tolist() for user in range(5)]
    users = encode_users_together(encoder, ItemFeatures(dataset, encoder), sequences)["fused"]
    ids = dataset.item_ids
    expected = np.stack([table.take([ids[row] for row in sequence]).mean(0) for sequence in sequences])
    np.testing.assert_allclose(unit_rows(users), unit_rows(expected), atol=1e-5)
    assert users.dtype == np.float32


def test_the_vanilla_row_of_the_paper_needs_no_adapter(tiny: Tiny, drawn_dataset: Path, tmp_path: Path) -> None:
    config = ExportConfig(
        data=drawn_dataset,
        backbone=str(tiny("qwen2_5_vl")),
        out=tmp_path / "vanilla",
        pooling="mean",
        prompt_style="sda",
        max_pixels=56 * 56,
        dtype="float32",
        device="cpu",
    )
    export_items.run(config)
    settings = schema.read_manifest(tmp_path / "vanilla")["settings"]
    assert (settings["pooling"], settings["wording"], settings["adapter"]) == ("mean", "sda", None)


def test_sentence_transformers_cannot_hold_it_and_says_so(
    tiny: Tiny, trained: Path, exported: Path, tmp_path: Path
) -> None:
    backbone = str(tiny("qwen2_5_vl"))
    config = ConvertConfig(
        embeddings=exported, to="sentence-transformers", out=tmp_path / "st", backbone=backbone, adapter=trained
    )
    with pytest.raises(ModelError, match="another method's prompts or pooling"):
        convert.run(config)


# --- the text prompt ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("title", "category", "brand", "text"),
    [
        ("Lamp", "Home, Lights", "Acme", "title is Lamp; category is Home, Lights; brand is Acme"),
        ("Lamp", "", "Acme", "title is Lamp; brand is Acme"),
        ("", "Home", "", "category is Home"),
        (" \n", "", "", ""),
        ("a;b\n  c", "", "x; y", "title is a.b c; brand is x. y"),
        ("é" * 150, "Home", "", f"title is {'é' * 100}; category is Home"),
    ],
)
def test_the_text_names_what_there_is_and_leaves_out_the_rest(title: str, category: str, brand: str, text: str) -> None:
    assert prompts.attributes_text(title, category, brand) == text


def without_columns(data: Path, to: Path, *columns: str, **renamed: str) -> Path:
    """Copy a dataset folder whose items lack some columns, or have them under other names."""
    shutil.copytree(data, to)
    items = pl.read_parquet(to / "items.parquet").drop(columns).rename(renamed)
    items.write_parquet(to / "items.parquet")
    meta = json.loads((to / "dataset.json").read_text()) | {"image_root": str(Dataset(data).image_root)}
    (to / "dataset.json").write_text(json.dumps(meta))
    return to


def test_training_and_export_read_the_attributes_that_the_catalogue_has(
    tiny: Tiny, drawn_dataset: Path, trained: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = without_columns(drawn_dataset, tmp_path / "plain", "category", "brand")
    other = without_columns(drawn_dataset, tmp_path / "other", "category", brand="store")
    row = Dataset(drawn_dataset).items.to_pylist()[3]
    title = f"title is {row['title']}"
    for data, said in ((plain, title), (other, f"{title}; brand is {row['brand']}")):
        encoder = ItemEncoder.load(str(tiny("qwen2_5_vl")), trained, dtype="float32", device="cpu")
        assert ItemFeatures(Dataset(data), encoder).titles([3]) == [said]
    vectors = []
    for data, column in ((plain, None), (other, "store"), (drawn_dataset, "brand")):
        out = exported if data == drawn_dataset else tmp_path / f"vectors of {data.name}"
        if data != drawn_dataset:
            export_items.run(exporting(tiny, data, out, trained))
        described = schema.read_manifest(out)["settings"]
        assert (described["item_text"], described["brand"]) == ("attributes", column)
        assert described["category"] == ("category" if data == drawn_dataset else None)
        vectors.append(EmbeddingTable.open(out, "text").take(Dataset(data).item_ids))
    assert "brand column: store" in capsys.readouterr().err
    assert not np.allclose(vectors[0], vectors[1]) and not np.allclose(vectors[1], vectors[2])


def test_an_adapter_from_before_keeps_its_prompt_and_its_fingerprint(
    tiny: Tiny, drawn_dataset: Path, trained: Path, tmp_path: Path
) -> None:
    """Its folder says nothing of what a prompt holds: that was the title."""
    old = shutil.copytree(trained, tmp_path / "old")
    described = json.loads((old / "vlm2rec.json").read_text())
    del described["encoder"]["item_text"], described["seal"]
    described["encoder"] |= {"prompt_mode": "raw", "max_title_tokens": 64}
    (old / "vlm2rec.json").write_text(json.dumps(described))
    backbone = str(tiny("qwen2_5_vl"))
    found = fingerprint_of(backbone, old, dtype="float32", device="cpu")
    assert (found["wording"], found["prompt_mode"]) == ("sda", "raw") and "item_text" not in found
    assert found["prompt_hash"] == prompts.prompt_hash("raw", None, "sda")
    with pytest.raises(ConfigError, match=r"--item-text is 'attributes', but the adapter .* was trained with 'title'"):
        fingerprint_of(backbone, old, dtype="float32", device="cpu", item_text="attributes")
    today = fingerprint_of(backbone, trained, dtype="float32", device="cpu")
    assert today["item_text"] == "attributes" and today["prompt_hash"] != found["prompt_hash"]


def test_a_run_that_began_with_titles_is_not_continued_with_attributes(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path
) -> None:
    before = {"item_text": "title", "prompt_mode": "raw", "max_title_tokens": 64, "learning_rate": 1e-3}
    finetune.run(settings(tiny, drawn_dataset, tmp_path / "a", **before))
    saved = json.loads((tmp_path / "a" / "vlm2rec.json").read_text())
    assert "category" not in saved["dataset"]
    del saved["config"]["item_text"], saved["seal"]  # as an earlier version left it
    (tmp_path / "a" / "vlm2rec.json").write_text(json.dumps(saved))
    assert finetune.run(settings(tiny, drawn_dataset, tmp_path / "a", **before)) is None, "complete"
    with pytest.raises(ConfigError, match=r"begun with item_text = 'title', now it is 'attributes'"):
        finetune.run(settings(tiny, drawn_dataset, tmp_path / "a", **before | {"item_text": "attributes"}))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"prompt_style": "vlm2rec", "item_text": "attributes"}, "--item-text attributes with --prompt-style vlm2rec"),
        ({"prompt_style": None, "item_text": "attributes"}, "--item-text attributes with --prompt-style vlm2rec"),
        ({"strategy": "textual", "item_text": "attributes"}, "--item-text attributes with --strategy textual"),
    ],
)
def test_attributes_belong_to_the_prompts_of_sda(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    config = ExportConfig(
        data=drawn_dataset, backbone=str(tiny("qwen2_5_vl")), out=tmp_path / "e", device="cpu", **more
    )
    with pytest.raises(ConfigError, match=message):
        export_items.run(config)


# --- refusals -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tau_wpcl": 0.5}, r"--tau-wpcl with --method sda, which has no such setting"),
        ({"loss": "sft"}, r"--loss with --method sda"),
        ({"method": "vlm2rec", "experts": 4}, r"--experts with --method vlm2rec"),
        ({"method": "vlm2rec", "prompt_style": "sda"}, r"--prompt-style sda with --method vlm2rec"),
        ({"views": "text"}, r"--method sda with --fusion external and --views text"),
        ({"fusion": "internal"}, r"--method sda with --fusion internal"),
    ],
)
def test_settings_of_the_other_method_are_refused(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        finetune.run(settings(tiny, drawn_dataset, tmp_path / "a", **more))


def test_a_rank_that_experts_cannot_share_is_refused(tiny: Tiny, drawn_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--lora-rank 8 cannot be divided among --experts 3"):
        finetune.run(settings(tiny, drawn_dataset, tmp_path / "a", experts=3))


def test_a_single_item_is_refused() -> None:
    with pytest.raises(DataError, match="the catalogue has 1 items"):
        ItemSamples(1)


def test_several_processes_are_refused(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "count", lambda: 2)
    with pytest.raises(ConfigError, match=r"--method sda in 2 processes"):
        finetune.run(settings(tiny, drawn_dataset, tmp_path / "a"))


@pytest.mark.slow
def test_several_processes_of_a_launcher_are_refused(tiny: Tiny, drawn_dataset: Path, tmp_path: Path) -> None:
    programs = Path(sys.executable).parent
    command = [programs / "torchrun", "--nproc-per-node", "2", "--no-python", programs / "vlm2rec", "finetune"]
    command += ["--method", "sda", "--data", drawn_dataset, "--backbone", tiny("qwen2_5_vl"), "--out", tmp_path / "a"]
    ran = subprocess.run([str(part) for part in [*command, "--device", "cpu"]], capture_output=True, text=True)
    assert ran.returncode != 0 and "--method sda in 2 processes" in ran.stderr


def test_training_anew_with_the_other_adapter_leaves_nothing_of_the_one_before(
    tiny: Tiny, drawn_dataset: Path, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "a")
    finetune.run(settings(tiny, drawn_dataset, tmp_path / "a", experts=1, resume=False, max_steps=1))
    assert not (tmp_path / "a" / lora.MODA_FILE).exists() and lora.kind(tmp_path / "a") == "lora"
