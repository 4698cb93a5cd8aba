"""`vlm2rec finetune --method llmemb` on a drawn catalogue: what it learns from, what it leaves, what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from item_training import Tiny, curves, cut_off, require_same, settings_of

from vlm2rec.downstream.table import EmbeddingTable
from vlm2rec.embedder.adapters import lora
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ConfigError, DataError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.item_features import ItemFeatures
from vlm2rec.embedder.encoders.item_text import attributes_of, item_texts, without_text
from vlm2rec.embedder.encoders.settings import EncoderSettings
from vlm2rec.embedder.training.llmemb import AttributeModel, AttributeSamples, TextContrast, dropped
from vlm2rec.pipelines import evaluate, export_items, finetune
from vlm2rec.pipelines.config import EvaluateConfig, ExportConfig, FinetuneConfig
from vlm2rec.pipelines.read_config import read_config


def settings(tiny: Tiny, data: Path, out: Path, **more: Any) -> FinetuneConfig:
    return settings_of("llmemb", tiny("qwen2"), data, out, **more)


@pytest.fixture(scope="module")
def trained(tiny: Tiny, drawn_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "adapter"
    more: dict[str, Any] = {"max_steps": 6, "probe_users": 4, "item_text": "title,category,brand,material"}
    finetune.run(settings(tiny, drawn_dataset, out, **more))
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, drawn_dataset: Path) -> Path:
    """The drawn dataset with titles only, and a rationale for every second item."""
    folder = tmp_path_factory.mktemp("plain") / "data"
    shutil.copytree(drawn_dataset, folder)
    items = pq.read_table(folder / "items.parquet", columns=["item_id", "title", "image_path"])
    texts = [None if row % 2 else f"Fits someone who likes number {row}." for row in range(len(items))]
    pq.write_table(items.append_column("rationale", pa.array(texts)), folder / "items.parquet")
    return folder


# --- the loss, and what it learns from ------------------------------------------------------------------------
@pytest.mark.parametrize(("rows", "tau"), [([4, 7, 9], 0.02), ([4, 7, 4], 0.5)])
def test_the_contrast_is_that_of_its_equation_in_float64(rows: list[int], tau: float) -> None:
    random = np.random.default_rng(0)
    first, second = random.normal(size=(2, 3, 5))

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    def one_way(queries: np.ndarray, keys: np.ndarray) -> float:
        total = 0.0
        for i in range(3):
            kept = [j for j in range(3) if j == i or rows[j] != rows[i]]
            weights = [math.exp(cosine(queries[i], keys[j]) / tau) for j in kept]
            total -= math.log(weights[kept.index(i)] / sum(weights))
        return total / 3

    expected = 0.5 * (one_way(first, second) + one_way(second, first))
    loss = TextContrast(tau)
    found = loss(torch.from_numpy(first), torch.from_numpy(second), torch.tensor(rows))
    assert found.item() == pytest.approx(expected, rel=1e-6)
    found.backward()
    assert loss.temperature.log_tau.grad is not None and loss.temperature().item() == pytest.approx(tau)


@pytest.mark.parametrize(
    ("count", "ratio", "expected"),
    [(5, 0.4, 2), (8, 0.4, 3), (2, 0.4, 1), (1, 0.4, 0), (3, 1.0, 2), (4, 0.0, 0), (1, 1.0, 0)],
)
def test_so_many_attributes_are_dropped(count: int, ratio: float, expected: int) -> None:
    assert dropped(count, ratio) == expected


def test_two_texts_are_drawn_of_each_item_and_anew_in_each_epoch() -> None:
    attributes = [{name: f"{name}{row}" for name in ("title", "category", "brand", "size", "use")} for row in range(6)]
    attributes[3] = {}
    attributes[4] = {"title": "alone"}
    samples = AttributeSamples(attributes, 0.4, seed=1)
    assert len(samples) == 5 and [samples[place].row for place in range(5)] == [0, 1, 2, 4, 5]
    for place in range(5):
        row, first, second = samples[place]
        for text in (first, second):
            parts = text.split("; ")
            assert len(parts) == (1 if row == 4 else 3)
            assert {*parts} <= {f"{name} is {value}" for name, value in attributes[row].items()}
    before = [samples[place] for place in range(5)]
    assert [samples[place] for place in range(5)] == before, "a run that goes on draws the same"
    assert any(first != second for _, first, second in before)
    samples.set_epoch(1)
    assert [samples[place] for place in range(5)] != before
    assert "1 without an attribute are left out; 1 have one alone" in samples.summary()["items"]
    with pytest.raises(DataError, match="of 2 items 2 have an attribute, and 0 have two or more"):
        AttributeSamples([{"title": "a"}, {"title": "b"}])


def test_the_text_of_an_item_is_made_of_the_columns_that_the_settings_name(drawn_dataset: Path, plain: Path) -> None:
    dataset = Dataset(drawn_dataset)
    assert item_texts(dataset, {}) == dataset.titles
    assert item_texts(dataset, {"item_text": "brand"}) == dataset.items["brand"].to_pylist()
    row = {name: dataset.items[name][0].as_py() for name in ("title", "category", "brand")}
    expected = f"title is {row['title']}; category is {row['category']}; brand is {row['brand']}"
    assert item_texts(dataset, {"item_text": "title, category ,brand"})[0] == expected
    names = list(attributes_of(dataset, "all")[0])
    assert names[:3] == ["title", "category", "brand"] and not {"item_id", "image_path", "model"} & {*names}
    assert attributes_of(dataset, "model,title")[0]["model"] == str(dataset.items["model"][0].as_py())
    rationales = Dataset(plain)
    texts = item_texts(rationales, {"item_text": "rationale"})
    assert texts[0].startswith("Fits someone") and texts[1] == rationales.titles[1], "nobody is without a text"
    assert without_text(rationales, {"item_text": "rationale"}) == 20 and without_text(rationales, {}) == 0
    with pytest.raises(DataError, match=r"no column 'brnd' .did you mean 'brand'.") as refused:
        item_texts(dataset, {"item_text": "title,brnd"})
    assert "--item-text" in str(refused.value)


def test_long_attributes_are_cut_and_lists_are_joined(plain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(plain, folder)
    items = pq.read_table(folder / "items.parquet").drop_columns(["rationale"])
    items = items.append_column("description", pa.array(["long " * 100] * len(items)))
    items = items.append_column("categories", pa.array([["Toys", "Games"]] * len(items)))
    pq.write_table(items.append_column("codes", pa.array([[1, 2]] * len(items))), folder / "items.parquet")
    found = attributes_of(Dataset(folder), "all")[0]
    assert list(found) == ["title", "categories", "description"] and found["categories"] == "Toys, Games"
    text = item_texts(Dataset(folder), {"item_text": "all"})[0]
    assert text.endswith(f"; description is {('long ' * 20).strip()}") and "; categories is Toys, Games; " in text
    assert list(attributes_of(Dataset(folder), "category")[0]) == ["categories"]


# --- training -------------------------------------------------------------------------------------------------
def test_defaults_are_llmembs_where_nothing_is_given(tmp_path: Path) -> None:
    flags = {"method": "llmemb", "data": tmp_path, "backbone": "b", "out": tmp_path}
    found = read_config(FinetuneConfig, flags=flags)
    assert (found.views, found.item_text, found.pooling, found.prompt_style) == ("text", "all", "mean", "sda")
    assert (found.drop_ratio, found.lora_rank, found.learning_rate, found.batch_size) == (0.4, 8, 2e-4, 32)
    assert read_config(FinetuneConfig, flags={**flags, "item_text": "title,brand"}).item_text == "title,brand"
    assert read_config(FinetuneConfig, flags=flags | {"method": "vlm2rec"}).item_text == "title"


def test_the_adapter_says_what_it_was_trained_with(trained: Path) -> None:
    saved = json.loads((trained / "vlm2rec.json").read_text())
    assert saved["kind"] == "lora" and saved["encoder"]["item_text"] == "title,category,brand,material"
    assert saved["training"]["loss"] == "llmemb, scft, 0.4 dropped"
    assert saved["training"]["loss_settings"] == {"drop_ratio": 0.4, "tau_scft": 0.02}
    assert saved["training"]["effective_negatives"] == 7.0 and saved["dataset"]["samples"] == 40
    card = (trained / "README.md").read_text()
    assert "The product has the following attributes: ATTRIBUTES" in card and "IMAGE" not in card
    rows = curves(trained)
    assert {"loss", "own_text_first", "own_cosine", "tau"} <= rows["train"][0].keys()
    assert [row["step"] for row in rows["valid"]] == [0, 5, 6] and "S_text" in rows["probe"][0]


def test_training_lowers_the_loss_and_learns_the_temperature(tiny: Tiny, drawn_dataset: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"max_steps": 20, "learning_rate": 3e-3, "gradient_checkpointing": False, "epochs": 100.0}
    result = finetune.run(settings(tiny, drawn_dataset, tmp_path / "a", **more))
    assert result is not None
    rows = result.curves["train"]
    assert np.mean([row["loss"] for row in rows[-4:]]) < np.mean([row["loss"] for row in rows[:4]])
    assert rows[0]["tau"] == pytest.approx(0.02) and rows[-1]["tau"] != rows[0]["tau"]


@pytest.mark.slow
def test_a_run_that_was_cut_off_ends_like_an_uninterrupted_one(tiny: Tiny, drawn_dataset: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"max_steps": 9, "checkpoint_steps": 3}
    cut, whole = (settings(tiny, drawn_dataset, tmp_path / name, **more) for name in ("cut", "whole"))
    cut_off(cut, 8)  # in the second epoch
    finetune.run(cut)
    finetune.run(whole)
    require_same(cut, whole, 9, [lora.WEIGHTS_FILE])
    assert finetune.run(cut) is None, "it is complete"
    with pytest.raises(ConfigError, match=r"was begun with drop_ratio = 0.4, now it is 0.2"):
        finetune.run(settings(tiny, drawn_dataset, tmp_path / "cut", drop_ratio=0.2, **more))


@pytest.mark.parametrize("chunk", [3, 8])
def test_texts_in_chunks_have_the_gradients_of_the_whole_batch(tiny: Tiny, drawn_dataset: Path, chunk: int) -> None:
    gradients = []
    for size in (0, chunk):
        encoder = ItemEncoder.load(
            str(tiny("qwen2")), pooling="mean", prompt_style="sda", views="text", dtype="float32", device="cpu"
        )
        wrapped = lora.add_lora(encoder.backbone, 4, 8.0, 0.0, seed=0)
        items = ItemFeatures(Dataset(drawn_dataset), encoder)
        model = AttributeModel(encoder, wrapped, items, TextContrast(), size)
        samples = AttributeSamples(attributes_of(Dataset(drawn_dataset), "all"))
        loss, _, _ = model(**model.collate([samples[place] for place in range(6)]))
        gradients.append(torch.autograd.grad(loss, model.adapted))
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-4)


# --- export and evaluation ------------------------------------------------------------------------------------
def test_the_export_encodes_the_attributes_that_were_trained_on(
    tiny: Tiny, drawn_dataset: Path, trained: Path, tmp_path: Path
) -> None:
    backbone = str(tiny("qwen2"))
    config = ExportConfig(
        data=drawn_dataset, backbone=backbone, out=tmp_path / "e", adapter=trained, dtype="float32", device="cpu"
    )
    manifest = export_items.run(config)
    assert manifest is not None and manifest["settings"]["item_text"] == "title,category,brand,material"
    assert manifest["views"] == ["fused", "text"]
    encoder = ItemEncoder.load(backbone, trained, dtype="float32", device="cpu")
    dataset = Dataset(drawn_dataset)
    texts = item_texts(dataset, encoder.fingerprint)
    table = EmbeddingTable.open(tmp_path / "e", "fused")
    found = table.vectors[table.rows_of(dataset.item_ids)]
    assert np.array_equal(found, encoder.encode_items(texts, [None] * len(texts)).fused)
    assert not np.array_equal(found, encoder.encode_items(dataset.titles, [None] * len(texts)).fused)
    assert export_items.run(config) is not None, "the same command again finds it complete"
    with pytest.raises(ConfigError, match="--item-text is 'title', but the adapter"):
        export_items.run(ExportConfig(**{**vars(config), "item_text": "title", "out": tmp_path / "f"}))
    result = evaluate.run(
        EvaluateConfig(
            data=drawn_dataset, embeddings=tmp_path / "e", out=tmp_path / "m", backbone=backbone, adapter=trained
        )
    )
    assert result["users_from"] == "mean"


def test_a_plain_backbone_exports_another_column_and_says_who_has_none(
    tiny: Tiny, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The row "w/o SCFT" and SLIM: the untrained backbone's vectors of such a text."""
    given: dict[str, Any] = {"data": plain, "backbone": str(tiny("qwen2")), "views": "text", "device": "cpu"}
    manifest = export_items.run(ExportConfig(**given, out=tmp_path / "a", item_text="rationale", dtype="float32"))
    assert manifest is not None and manifest["counts"][schema.STATUS_OK] == 40
    assert "20 items have nothing in rationale: their titles are used" in " ".join(capsys.readouterr().err.split())
    titles = export_items.run(ExportConfig(**given, out=tmp_path / "b", dtype="float32"))
    assert titles is not None and "item_text" not in titles["settings"], "as exports before this setting"
    assert EncoderSettings.of_export(titles["settings"]).item_text == "title"
    one, other = (EmbeddingTable.open(tmp_path / name, "fused").vectors for name in "ab")
    same = (one == other).all(axis=1)
    assert same.sum() == 20 and list(same) == [bool(row % 2) for row in range(40)]
    with pytest.raises(DataError, match="no column 'rational'"):
        export_items.run(ExportConfig(**given, out=tmp_path / "c", item_text="rational"))


# --- refusals -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"views": "both"}, "--method llmemb with --views both"),
        ({"prompt_style": "vlm2rec"}, "--method llmemb with --prompt-style vlm2rec"),
        ({"item_text": "title"}, "--item-text title, which does not name several columns"),
        ({"item_text": "attributes"}, "--item-text attributes, which does not name several columns"),
        ({"drop_ratio": 0.0, "lora_dropout": 0.0}, "--drop-ratio 0 with --lora-dropout 0"),
        ({"tau_wpcl": 0.5}, "--tau-wpcl with --method llmemb, which has no such setting"),
        ({"method": "vlm2rec", "drop_ratio": 0.5}, "--drop-ratio with --method vlm2rec.*--method llmemb"),
        ({"gradient_steps": 2}, "--gradient-steps with --fusion external and --views text"),
        ({"item_text": "title,,brand"}, "--item-text 'title,,brand'"),
        ({"item_text": "title,size"}, "no column 'size'"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_words(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, more: dict[str, Any], match: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=match):
        finetune.run(settings(tiny, drawn_dataset, tmp_path / "a", **more))


def test_a_catalogue_with_titles_alone_cannot_train_it(tiny: Tiny, plain: Path, tmp_path: Path) -> None:
    titles = tmp_path / "data"
    shutil.copytree(plain, titles)
    items = pq.read_table(titles / "items.parquet").drop_columns(["rationale"])
    pq.write_table(items, titles / "items.parquet")
    with pytest.raises(DataError, match="of 40 items 40 have an attribute, and 0 have two or more"):
        finetune.run(settings(tiny, titles, tmp_path / "a"))
