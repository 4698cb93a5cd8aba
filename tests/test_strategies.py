"""The five strategies of the VLM2Vec study: their prompts, their tables, and every reader of a table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from recommender_world import load_as_mmrec

from vlm2rec.downstream.evaluation.geometry import effective_ranks, first_vectors
from vlm2rec.downstream.index.plan import plan_index
from vlm2rec.downstream.table import EmbeddingTable
from vlm2rec.embedder.backbones.images import open_image
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, ModelError
from vlm2rec.embedder.encoders.strategies import load_strategy, strategy_fingerprint
from vlm2rec.embedder.export.verify import verify
from vlm2rec.embedder.options import STRATEGIES, PromptMode, Strategy
from vlm2rec.embedder.prompts import Prompt, joint_prompt, product_text, render, textual_prompt, visual_prompt
from vlm2rec.pipelines import convert, evaluate, export_items, train_recommender
from vlm2rec.pipelines.config import ConvertConfig, EvaluateConfig, ExportConfig, TrainRecommenderConfig

Tiny = Callable[[str], Path]
PIXELS = 56 * 56
DIM = 64  # of the tiny models
SHAPES: dict[Strategy, dict[str, int]] = {
    "visual": {"fused": DIM, "image": DIM},
    "textual": {"fused": DIM, "text": DIM},
    "prompt1": {"fused": DIM},
    "prompt2": {"fused": DIM},
    "dual": {"fused": 2 * DIM, "text": DIM, "image": DIM},
}


@pytest.fixture(scope="module")
def data(drawn_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn dataset with images and categories of its own; the first item has none."""
    folder = tmp_path_factory.mktemp("strategies") / "data"
    shutil.copytree(drawn_dataset, folder)
    shutil.copytree(Dataset(drawn_dataset).image_root, folder / "images")
    meta = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(meta | {"image_root": "images"}))
    set_categories(folder, [None, *(["Home", f"Shelf {row}"] for row in range(1, 40))])
    return folder


def set_categories(data: Path, categories: list[Any]) -> None:
    items = pl.read_parquet(data / "items.parquet").drop("category", strict=False)  # that of the drawn catalogue
    items.with_columns(pl.Series("categories", categories)).write_parquet(data / "items.parquet")


def exporting(data: Path, backbone: Path, out: Path, strategy: Strategy, **more: Any) -> ExportConfig:
    values: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_pixels": PIXELS} | more
    return ExportConfig(data=data, backbone=str(backbone), out=out, strategy=strategy, **values)


@pytest.fixture(scope="module")
def exported(data: Path, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an embeddings folder of every strategy."""
    folder = tmp_path_factory.mktemp("exported")
    for strategy in STRATEGIES:
        export_items.run(exporting(data, tiny("qwen2_5_vl"), folder / strategy, strategy))
    return folder


# --- prompts ----------------------------------------------------------------------------------------------------
def test_the_prompts_are_the_papers() -> None:
    text = product_text("Red chair", "Home, Chairs")
    assert text == "Red chair, category: Home, Chairs"
    assert (product_text("Red chair", ""), product_text("", "Chairs")) == ("Red chair", "category: Chairs")
    assert visual_prompt() == (None,)
    assert textual_prompt(text) == (text,)
    assert joint_prompt("prompt1", text) == (
        None,
        "\nRed chair, category: Home, Chairs\nGenerate a unified representation for this product.",
    )
    assert joint_prompt("prompt2", text) == (
        "You are analyzing a product for retrieval purposes. Here is the product image: ",
        None,
        "\nProduct details: Red chair, category: Home, Chairs\nGenerate a unified representation for this product.",
    )


def states_of_the_stock_model(encoder: Any, prompt: Prompt, image: Any, mode: PromptMode) -> np.ndarray:
    processor = encoder.backbone.processor
    shown = {"images": [image]} if None in prompt else {}
    inputs = processor(text=[render(prompt, mode, processor)], return_tensors="pt", **shown)
    with torch.no_grad():
        state = encoder.backbone.model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
    return np.asarray(state)


@pytest.mark.parametrize("mode", ["raw", "chat"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "llava"])
def test_a_vector_is_the_stock_models_state_at_the_end_of_the_prompt(
    data: Path, tiny: Tiny, family: str, mode: PromptMode
) -> None:
    dataset = Dataset(data)
    image = open_image(dataset.image_root, dataset.image_paths[3], PIXELS)
    for strategy in STRATEGIES:
        encoder = load_strategy(
            str(tiny(family)), strategy, prompt_mode=mode, max_pixels=PIXELS, dtype="float32", device="cpu"
        )
        found = encoder.encode_items(["Red chair"], [image])
        if strategy in ("prompt1", "prompt2"):
            wanted = {"fused": joint_prompt(strategy, "Red chair")}
        else:
            wanted = {"text": textual_prompt("Red chair"), "image": visual_prompt()}
        parts = {
            view: states_of_the_stock_model(encoder, prompt, image, mode)
            for view, prompt in wanted.items()
            if view in SHAPES[strategy]
        }
        parts.setdefault("fused", np.concatenate(list(parts.values())))
        for view in schema.VIEWS:
            vector = getattr(found, view)[0]
            if view in SHAPES[strategy]:
                np.testing.assert_allclose(vector, parts[view], atol=1e-4, err_msg=f"{strategy} {view}")
            else:
                assert np.isnan(vector).all()


# --- tables -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_strategy_fills_its_columns_of_every_item(exported: Path, strategy: Strategy) -> None:
    folder = exported / strategy
    manifest = schema.read_manifest(folder)
    assert verify(folder) == []
    assert manifest["counts"] == {"ok": 40, "truncated": 0, "text_only": 0, "failed": 0}
    assert manifest["views"] == list(SHAPES[strategy])
    assert manifest["dim"] == SHAPES[strategy]["fused"]
    assert (manifest["settings"]["source"], manifest["settings"]["strategy"]) == ("strategy", strategy)
    tables = {view: EmbeddingTable.open(folder, view) for view in manifest["views"]}
    assert {view: table.vectors.shape for view, table in tables.items()} == {
        view: (40, dim) for view, dim in SHAPES[strategy].items()
    }
    assert {view: rank > 1 for view, rank in effective_ranks(first_vectors(folder)).items()} == dict.fromkeys(
        SHAPES[strategy], True
    )


def test_one_view_alone_is_fused_and_dual_is_both_end_to_end(exported: Path) -> None:
    def vectors(strategy: str, view: str) -> np.ndarray:
        return EmbeddingTable.open(exported / strategy, view).vectors

    np.testing.assert_array_equal(vectors("visual", "fused"), vectors("visual", "image"))
    np.testing.assert_array_equal(vectors("textual", "fused"), vectors("textual", "text"))
    np.testing.assert_array_equal(
        vectors("dual", "fused"), np.concatenate([vectors("textual", "text"), vectors("visual", "image")], 1)
    )
    np.testing.assert_array_equal(vectors("dual", "text"), vectors("textual", "text"))


def test_dual_may_give_both_halves_the_same_length(data: Path, tiny: Tiny, tmp_path: Path) -> None:
    config = exporting(data, tiny("qwen2_5_vl"), tmp_path / "out", "dual", fusion_norm="normalised")
    export_items.run(config)
    fused = EmbeddingTable.open(tmp_path / "out").vectors
    lengths = [np.linalg.norm(half, axis=1) for half in (fused[:, :DIM], fused[:, DIM:])]
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)


def test_the_category_stands_behind_the_title_where_there_is_one(exported: Path, data: Path, tiny: Tiny) -> None:
    dataset = Dataset(data)
    encoder = load_strategy(str(tiny("qwen2_5_vl")), "textual", dtype="float32", device="cpu")
    said = [dataset.titles[0], f"{dataset.titles[1]}, category: Home, Shelf 1"]
    found = EmbeddingTable.open(exported / "textual").vectors[:2]
    np.testing.assert_array_equal(found, encoder.encode_items(said, [None, None]).fused)
    settings = {name: schema.read_manifest(exported / name)["settings"] for name in STRATEGIES}
    assert {name: each.get("category") for name, each in settings.items()} == {
        **dict.fromkeys(("textual", "prompt1", "prompt2", "dual"), "categories"),
        "visual": None,
    }


def test_another_category_is_another_text_and_nothing_to_images_alone(data: Path, tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    configs = {name: exporting(folder, tiny("qwen2_5_vl"), tmp_path / name, name) for name in ("textual", "visual")}
    first = {name: export_items.run(config) for name, config in configs.items()}
    before = EmbeddingTable.open(tmp_path / "textual").vectors
    set_categories(folder, [None, ["Garden"], *(["Home", f"Shelf {row}"] for row in range(2, 40))])
    assert export_items.run(configs["visual"]) == first["visual"]
    with pytest.raises(ArtifactError, match="titles was"):
        export_items.run(configs["textual"])
    export_items.run(replace(configs["textual"], retry_failed=True))
    after = EmbeddingTable.open(tmp_path / "textual").vectors
    assert np.flatnonzero((before != after).any(1)).tolist() == [1]
    assert verify(tmp_path / "textual") == []


def test_an_item_without_image_fails_with_dual_until_it_has_one(data: Path, tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    image = folder / "images" / Dataset(folder).image_paths[7]
    whole = image.read_bytes()
    image.write_bytes(b"")
    config = exporting(folder, tiny("qwen2_5_vl"), tmp_path / "out", "dual", max_failures=0.1)
    with pytest.raises(
        ConfigError, match=r"--on-image-error text_only.*a --strategy with images and an image encoder have none"
    ):
        export_items.run(replace(config, on_image_error="text_only"))
    manifest = export_items.run(config)
    assert manifest is not None and manifest["counts"]["failed"] == 1
    assert np.isnan(EmbeddingTable.open(tmp_path / "out").vectors[7]).all() and verify(tmp_path / "out") == []
    image.write_bytes(whole)
    manifest = export_items.run(replace(config, retry_failed=True))
    assert manifest is not None and manifest["counts"]["ok"] == 40 and verify(tmp_path / "out") == []


def test_settings_are_known_before_the_weights_and_no_two_strategies_share_a_fingerprint(
    exported: Path, tiny: Tiny
) -> None:
    folder = str(tiny("qwen2_5_vl"))
    for strategy in STRATEGIES:
        settings = strategy_fingerprint(folder, strategy, device="cpu")
        assert load_strategy(folder, strategy, device="cpu").fingerprint == json.loads(json.dumps(settings)) == settings
    manifests = [schema.read_manifest(exported / strategy) for strategy in STRATEGIES]
    assert len({manifest["fingerprint"] for manifest in manifests}) == 5
    assert len({manifest["settings"]["prompt_hash"] for manifest in manifests}) == 5


def test_a_dry_run_counts_both_halves_of_dual(data: Path, tiny: Tiny, tmp_path: Path) -> None:
    found = export_items.run(exporting(data, tiny("qwen2_5_vl"), tmp_path / "out", "dual", dry_run=True))
    assert found is not None and found["bytes_left"] == 40 * 4 * DIM * 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("strategy", "given", "message"),
    [
        ("textual", {"adapter": Path("adapter")}, "--strategy textual with --adapter adapter, which says itself how"),
        ("prompt1", {"views": "text"}, "--views text with --strategy prompt1"),
        ("visual", {"fusion": "internal"}, "--fusion internal with --strategy visual"),
        ("dual", {"fusion": "external"}, "--fusion external with --strategy dual"),
        ("prompt2", {"fusion_norm": "raw"}, "leave --fusion-norm out"),
    ],
)
def test_what_a_strategy_decides_cannot_be_chosen_beside_it(
    strategy: Strategy, given: dict[str, Any], message: str, data: Path, tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        export_items.run(exporting(data, tiny("qwen2_5_vl"), tmp_path / "out", strategy, **given))
    assert list(tmp_path.iterdir()) == []


def test_a_text_model_takes_the_textual_strategy_and_no_other(data: Path, tiny: Tiny, tmp_path: Path) -> None:
    manifest = export_items.run(exporting(data, tiny("qwen2"), tmp_path / "out", "textual"))
    assert manifest is not None and manifest["counts"]["ok"] == 40
    for strategy in set(STRATEGIES) - {"textual"}:
        with pytest.raises(ConfigError, match="is a text model"):
            export_items.run(exporting(data, tiny("qwen2"), tmp_path / strategy, strategy))


# --- readers ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("strategy", "pairs"),
    [
        ("visual", ["f2f", "v2f", "v2v"]),
        ("textual", ["f2f", "t2f", "t2t"]),
        ("prompt1", ["f2f"]),
        ("prompt2", ["f2f"]),
        ("dual", ["f2f", "t2t", "v2v"]),  # a text vector is half as long as the fused one
    ],
)
def test_task_1_takes_the_mean_of_the_history_and_ranks_what_can_be_compared(
    exported: Path, data: Path, tiny: Tiny, tmp_path: Path, strategy: Strategy, pairs: list[str]
) -> None:
    config = EvaluateConfig(data=data, embeddings=exported / strategy, out=tmp_path / "out")
    result = evaluate.run(config)
    assert (list(result["candidates"]), result["users_from"]) == (pairs, "mean")
    assert set(result["geometry"]) == set(SHAPES[strategy])
    with pytest.raises(ArtifactError, match=r"another source \(strategy\).*leave --backbone out"):
        evaluate.run(replace(config, backbone=str(tiny("qwen2_5_vl"))))


@pytest.mark.parametrize(("column", "width"), [("fused", 2 * DIM), ("image", DIM)])
def test_task_2_and_an_index_start_from_either_length(
    exported: Path, data: Path, tmp_path: Path, column: Any, width: int
) -> None:
    assert plan_index(exported / "dual", column=column).dim == width
    result = train_recommender.run(
        TrainRecommenderConfig(
            data=data,
            out=tmp_path / "out",
            model="GRU4Rec",
            embeddings=exported / "dual",
            column=column,
            hidden_size=8,
            max_epochs=1,
            eval_step=1,
            device="cpu",
        )
    )
    assert 0 <= result["candidates"]["N@20"] <= 1


@pytest.mark.parametrize("to", ["npy", "safetensors", "lance"])
def test_a_conversion_keeps_each_views_own_length(exported: Path, tmp_path: Path, to: Any) -> None:
    record = convert.run(ConvertConfig(embeddings=exported / "dual", to=to, out=tmp_path / "out"))
    assert record["dims"] == {"fused": 2 * DIM, "text": DIM, "image": DIM}
    if to == "npy":
        found = {view: np.load(tmp_path / "out" / f"{view}.npy") for view in schema.VIEWS}
    elif to == "safetensors":
        from safetensors.numpy import load_file

        found = load_file(tmp_path / "out" / "vectors.safetensors")
    else:
        lance = pytest.importorskip("lance")
        rows = lance.dataset(str(tmp_path / "out" / "items.lance")).to_table()
        found = {view: np.stack(rows[view].to_numpy()) for view in schema.VIEWS}
    for view in schema.VIEWS:
        np.testing.assert_array_equal(found[view], EmbeddingTable.open(exported / "dual", view).vectors)


def test_other_prompts_are_not_sold_as_a_sentence_transformer(exported: Path, tiny: Tiny, tmp_path: Path) -> None:
    config = ConvertConfig(
        embeddings=exported / "textual",
        to="sentence-transformers",
        out=tmp_path / "out",
        backbone=str(tiny("qwen2_5_vl")),
    )
    with pytest.raises(ModelError, match=r"or made with --strategy \(strategy\)"):
        convert.run(config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("strategy", "columns", "kinds"),
    [
        ("visual", (), {"vision": "image"}),
        ("textual", (), {"text": "text"}),
        ("prompt1", (), {"text": "fused"}),
        ("prompt2", (), {"text": "fused"}),
        ("dual", (), {"vision": "image", "text": "text"}),
        ("dual", ("fused",), {"text": "fused"}),
    ],
)
def test_mmrec_loads_what_a_strategy_has(
    exported: Path, tmp_path: Path, strategy: Strategy, columns: tuple[str, ...], kinds: dict[str, str]
) -> None:
    config = ConvertConfig(embeddings=exported / strategy, to="mmrec", out=tmp_path / "toys", columns=columns)
    convert.run(config)
    _, features, _, items = load_as_mmrec(tmp_path / "toys", "toys")
    ids = (line.split("\t") for line in (tmp_path / "toys" / "i_id_mapping.csv").read_text().splitlines()[1:])
    wanted = [item_id for item_id, _ in ids]
    assert set(features) == set(kinds) and len(wanted) == items > 20
    for kind, view in kinds.items():
        matrix = features[kind]
        assert (matrix.shape, matrix.dtype) == ((items, SHAPES[strategy][view]), np.float32)
        np.testing.assert_array_equal(matrix, EmbeddingTable.open(exported / strategy, view).take(wanted))
        # what FREEDOM and LATTICE do first: cosines between all rows, without a guard against length 0
        unit = matrix / np.linalg.norm(matrix, axis=-1, keepdims=True)
        assert np.isfinite(unit @ unit.T).all()
