"""One view alone (`--views text`, `--views image`): through fine-tuning, export, both tasks, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
from drawn_lora import without_checksums

from vlm2rec.downstream.table import EmbeddingTable
from vlm2rec.embedder.adapters import lora
from vlm2rec.embedder.backbones.backbone import Backbone
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, ModelError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.settings import EncoderSettings, fingerprint_of
from vlm2rec.embedder.export import worker
from vlm2rec.embedder.export.verify import verify
from vlm2rec.pipelines import evaluate, export_items, finetune, train_recommender
from vlm2rec.pipelines.config import EvaluateConfig, ExportConfig, FinetuneConfig, TrainRecommenderConfig

Tiny = Callable[[str], Path]


def training(data: Path, backbone: Path, out: Path, **more: Any) -> FinetuneConfig:
    values: dict[str, Any] = {"loss": "sft", "max_pixels": 56 * 56, "learning_rate": 1e-3, "max_steps": 3}
    values |= {"valid_users": 5, "probe_users": 0, "log_steps": 1, "device": "cpu"} | more
    return FinetuneConfig(data=data, backbone=str(backbone), out=out, **values)


def exporting(data: Path, backbone: Path, out: Path, **more: Any) -> ExportConfig:
    return ExportConfig(data=data, backbone=str(backbone), out=out, dtype="float32", device="cpu", **more)


def table(folder: Path) -> dict[str, list[Any]]:
    return pq.read_table(sorted(folder.glob("part-*.parquet"))[0]).to_pydict()


@pytest.fixture(scope="module")
def data(drawn_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn dataset in a folder of its own, whose images a test may take away."""
    folder = tmp_path_factory.mktemp("views") / "data"
    shutil.copytree(drawn_dataset, folder)
    images = folder.parent / "images"
    meta = json.loads((folder / "dataset.json").read_text())
    shutil.copytree(drawn_dataset / meta["image_root"], images)
    (folder / "dataset.json").write_text(json.dumps(meta | {"image_root": "../images"}))
    return folder


@pytest.fixture(scope="module")
def without_images(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("no-images") / "data"
    shutil.copytree(data, folder)
    assert not (folder.parent / "images").exists()
    return folder


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen2"])
def text_adapter(
    request: pytest.FixtureRequest, tiny: Tiny, without_images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Backbone and an adapter of titles alone: on a vision-language model, and on a text model."""
    backbone, out = tiny(request.param), tmp_path_factory.mktemp("text") / "adapter"
    finetune.run(training(without_images, backbone, out, views="text", max_steps=5))
    return backbone, out


# --- settings -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "columns"),
    [
        (EncoderSettings(), ("fused", "text", "image")),
        (EncoderSettings(fusion="internal"), ("fused",)),
        (EncoderSettings(views="text"), ("fused", "text")),
        (EncoderSettings(views="image"), ("fused", "image")),
    ],
)
def test_columns_of_an_export_tell_its_settings(settings: EncoderSettings, columns: tuple[str, ...]) -> None:
    assert settings.columns == columns
    exported = vars(settings) | {"views": list(columns), "dim": 64}
    assert EncoderSettings.of_export(exported) == settings


def test_with_both_views_a_fingerprint_has_no_key_of_the_setting(tiny: Tiny) -> None:
    settings = fingerprint_of(str(tiny("qwen2_5_vl")), device="cpu")
    assert set(settings) == {
        *(
            "made_with",
            "backbone_hash",
            "processor_hash",
            "model_type",
            "adapter",
            "prompt_hash",
            "dim",
            "pooling",
            "dtype",
        ),
        *("views", "fusion", "fusion_norm", "prompt_mode", "max_pixels", "max_title_tokens"),
    }
    assert settings["views"] == ["fused", "text", "image"]


@pytest.mark.parametrize("views", ["text", "image"])
def test_vlm2rec_with_one_view_is_refused_and_told_why(tiny: Tiny, data: Path, tmp_path: Path, views: str) -> None:
    config = training(data, tiny("qwen2_5_vl"), tmp_path / "out", loss="vlm2rec", views=views)
    with pytest.raises(ConfigError, match=rf"--views {views} with --loss vlm2rec.*nothing to compare.*--loss sft"):
        finetune.run(config)
    with pytest.raises(ConfigError, match=rf"--gradient-steps with .*--views {views}"):
        finetune.run(replace(config, loss="sft", gradient_steps=1))


def test_internal_fusion_of_one_view_is_refused(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--fusion internal with --views text"):
        finetune.run(training(data, tiny("qwen2_5_vl"), tmp_path / "a", fusion="internal", views="text"))
    with pytest.raises(ConfigError, match="--fusion internal with --views image"):
        export_items.run(exporting(data, tiny("qwen2_5_vl"), tmp_path / "b", fusion="internal", views="image"))


@pytest.mark.parametrize("views", ["both", "image"])
def test_a_text_model_trains_and_exports_text_only(tiny: Tiny, data: Path, tmp_path: Path, views: Any) -> None:
    with pytest.raises(ConfigError, match="is a text model"):
        finetune.run(training(data, tiny("qwen2"), tmp_path / "a", views=views))
    with pytest.raises(ConfigError, match="is a text model"):
        export_items.run(exporting(data, tiny("qwen2"), tmp_path / "b", views=views))
    assert not (tmp_path / "b").exists()


# --- fine-tuning --------------------------------------------------------------------------------------------
def test_text_alone_is_trained_without_an_image_folder_and_the_adapter_says_so(
    text_adapter: tuple[Path, Path],
) -> None:
    _, adapter = text_adapter
    saved = json.loads((adapter / "vlm2rec.json").read_text())
    assert saved["encoder"]["views"] == saved["config"]["views"] == "text"
    assert saved["backbone_settings"]["views"] == ["fused", "text"]
    rows = json.loads((adapter / "curves.json").read_text())["train"]
    assert len(rows) == 5
    for row in rows:
        assert "margin_text" in row
        assert not {"margin_image", "weak_is_image", "norm_ratio_user", "norm_ratio_item", "wpcl"} & row.keys()
    card = (adapter / "README.md").read_text()
    assert "- text: `" in card and "- image: `" not in card


@pytest.mark.parametrize(("family", "views"), [("qwen2", "text"), ("qwen3", "text"), ("qwen2_5_vl", "image")])
def test_training_lowers_the_loss(tiny: Tiny, data: Path, tmp_path: Path, family: str, views: Any) -> None:
    config = training(data, tiny(family), tmp_path / "out", views=views, max_steps=24, lora_dropout=0.0)
    result = finetune.run(replace(config, learning_rate=3e-3))
    assert result is not None
    losses = [row["loss"] for row in result.curves["train"]]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.1


def test_an_interrupted_run_goes_on_with_its_views_and_with_no_others(
    tiny: Tiny, without_images: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = training(without_images, tiny("qwen2"), tmp_path / "whole", views="text", max_steps=6, checkpoint_steps=2)
    cut = replace(whole, out=tmp_path / "cut")
    steps: list[int] = []

    def stop(advance: Any, shown: Any) -> Callable[..., None]:
        def on_step(step: int, of: int, latest: dict[str, float]) -> None:
            steps.append(step)
            if step == 5:
                raise KeyboardInterrupt

        return on_step

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "_reporter", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune.run(cut)
    with pytest.raises(ConfigError, match="begun with views = 'text', now it is 'both'"):
        finetune.run(replace(cut, views="both"))
    results = [finetune.run(cut), finetune.run(whole)]
    rows = [result.curves["train"] for result in results if result]
    assert steps == [1, 2, 3, 4, 5]
    assert [row["step"] for row in rows[0]] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows[0]] == pytest.approx([row["loss"] for row in rows[1]], rel=1e-5)
    weights = [safetensors.torch.load_file(config.out / lora.WEIGHTS_FILE) for config in (cut, whole)]
    assert all(np.allclose(tensor, weights[1][name], atol=1e-6) for name, tensor in weights[0].items())


def test_an_adapter_from_before_the_setting_is_one_of_both_views(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    config = training(data, tiny("qwen2_5_vl"), tmp_path / "out", max_steps=1)
    finetune.run(config)
    saved = json.loads((config.out / "vlm2rec.json").read_text())
    del saved["config"]["views"], saved["encoder"]["views"]
    (config.out / "vlm2rec.json").write_text(json.dumps(saved))
    without_checksums(config.out)
    assert finetune.run(config) is None
    assert EncoderSettings.resolve(config.out).views == "both"


def test_a_changed_adapter_of_one_view_is_refused_by_keys_and_by_canary(
    text_adapter: tuple[Path, Path], tiny: Tiny, tmp_path: Path
) -> None:
    backbone, adapter = text_adapter
    shutil.copytree(adapter, tmp_path / "adapter")
    without_checksums(tmp_path / "adapter")
    file = tmp_path / "adapter" / lora.WEIGHTS_FILE
    weights = safetensors.torch.load_file(file)

    def load(changed: dict[str, Any]) -> ItemEncoder:
        safetensors.torch.save_file(changed, file, metadata={"format": "pt"})
        return ItemEncoder.load(str(backbone), tmp_path / "adapter", device="cpu", dtype="float32")

    assert load(weights).views == ("fused", "text")
    with pytest.raises(ModelError, match="other vectors than when it was saved"):
        load({name: tensor * 30 for name, tensor in weights.items()})
    with pytest.raises(ModelError, match="28 keys missing, 28 unexpected"):
        load({name.replace("layers", "blocks"): tensor for name, tensor in weights.items()})
    with pytest.raises(ModelError, match="has no effect"):
        load({name: tensor * ("lora_A" in name) for name, tensor in weights.items()})


# --- export, Task 1, Task 2 ---------------------------------------------------------------------------------
def test_the_whole_line_on_titles_alone(
    text_adapter: tuple[Path, Path], without_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any) -> None:
        raise AssertionError("an image was asked for")

    monkeypatch.setattr(worker, "open_image", never)
    monkeypatch.setattr(Backbone, "run_vision_tower", never)
    backbone, adapter = text_adapter
    out = tmp_path / "embeddings"
    manifest = export_items.run(exporting(without_images, backbone, out, adapter=adapter))
    assert manifest["views"] == ["fused", "text"] and manifest["counts"]["ok"] == manifest["num_items"] == 40
    assert not {"images", "images_by"} & manifest["settings"].keys()
    rows = table(out)
    assert rows["fused"] == rows["text"] and rows["image"] == [None] * 40
    assert verify(out) == []
    assert EmbeddingTable.open(out).present.all()

    shared = {"data": without_images, "embeddings": out}
    encoder = {"backbone": str(backbone), "adapter": adapter, "dtype": "float32", "device": "cpu"}
    for name, more in (("sequence", encoder), ("mean", {})):
        result = evaluate.run(EvaluateConfig(**shared, out=tmp_path / name, **more))  # type: ignore[arg-type]
        assert result["users_from"] == name
        assert list(result["candidates"]) == list(result["full"]) == ["f2f", "t2f", "t2t"]
        assert result["candidates"]["f2f"] == result["candidates"]["t2t"]
        assert set(result["geometry"]) == {"fused", "text"}
        views = pq.read_table(tmp_path / name / "users.parquet")["view"].unique().to_pylist()
        assert views == ["f2f", "t2f", "t2t"]

    recommender = TrainRecommenderConfig(
        **shared,  # type: ignore[arg-type]
        out=tmp_path / "sasrec",
        model="SASRec",
        column="fused",
        max_epochs=1,
        hidden_size=16,
        device="cpu",
    )
    metrics = train_recommender.run(recommender)
    assert (metrics["start"], metrics["missing"]) == ("fused", 0)
    with pytest.raises(ArtifactError, match="no vector in column 'image'"):
        train_recommender.run(replace(recommender, column="image", out=tmp_path / "no"))


def test_the_adapter_decides_the_views_of_an_export(
    text_adapter: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    backbone, adapter = text_adapter
    config = exporting(data, backbone, tmp_path / "out", adapter=adapter)
    for views in ("both", "image"):
        with pytest.raises(ConfigError, match=rf"--views is '{views}', but the adapter .* was trained with 'text'"):
            export_items.run(replace(config, views=views))  # type: ignore[arg-type]
    assert export_items.run(replace(config, views="text")) == export_items.run(config)


def test_text_alone_gives_the_text_vectors_of_both_and_another_fingerprint(
    tiny: Tiny, data: Path, without_images: Path, tmp_path: Path
) -> None:
    both = export_items.run(exporting(data, tiny("qwen2_5_vl"), tmp_path / "both", max_pixels=56 * 56))
    alone = exporting(without_images, tiny("qwen2_5_vl"), tmp_path / "text", max_pixels=56 * 56, views="text")
    assert export_items.run(alone)["fingerprint"] != both["fingerprint"]
    rows = [table(tmp_path / name)["text"] for name in ("both", "text")]
    np.testing.assert_allclose(*rows, atol=1e-4)
    with pytest.raises(ArtifactError, match=r"views was \['fused', 'text', 'image'\], now \['fused', 'text'\]"):
        export_items.run(replace(alone, data=data, out=tmp_path / "both"))


def test_the_whole_line_on_images_alone(
    tiny: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any) -> None:
        raise AssertionError("a title was asked for")

    monkeypatch.setattr(Backbone, "prepare_title", never)
    backbone, adapter, out = tiny("qwen2_5_vl"), tmp_path / "adapter", tmp_path / "embeddings"
    finetune.run(training(data, backbone, adapter, views="image"))
    train_rows = json.loads((adapter / "curves.json").read_text())["train"]
    assert "margin_image" in train_rows[0] and "margin_text" not in train_rows[0]
    manifest = export_items.run(exporting(data, backbone, out, adapter=adapter))
    assert manifest["views"] == ["fused", "image"] and "titles" not in manifest["settings"]
    rows = table(out)
    assert rows["fused"] == rows["image"] and rows["text"] == [None] * 40 and rows["status"] == ["ok"] * 40
    assert verify(out) == []
    encoder: dict[str, Any] = {"backbone": str(backbone), "adapter": adapter, "dtype": "float32", "device": "cpu"}
    result = evaluate.run(EvaluateConfig(data=data, embeddings=out, out=tmp_path / "task1", **encoder))
    assert list(result["candidates"]) == ["f2f", "v2f", "v2v"]
    assert set(result["geometry"]) == {"fused", "image"}


def test_a_broken_image_fails_the_row_of_images_alone_and_is_not_noticed_by_text_alone(
    tiny: Tiny, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "dataset" / "data"
    shutil.copytree(data, folder)
    shutil.copytree(data.parent / "images", folder.parent / "images")
    items = pq.read_table(folder / schema.ITEMS_FILE).to_pylist()
    (folder.parent / "images" / items[7]["image_path"]).write_bytes(b"<html>404</html>")
    pictures = exporting(folder, tiny("qwen2_5_vl"), tmp_path / "image", views="image", max_failures=0.1)
    pictures = replace(pictures, max_pixels=56 * 56)
    assert export_items.run(pictures)["counts"] == {"ok": 39, "truncated": 0, "text_only": 0, "failed": 1}
    assert table(tmp_path / "image")["fused"][7] is None and verify(tmp_path / "image") == []
    with pytest.raises(ConfigError, match=r"--on-image-error text_only needs a text vector.*--views image"):
        export_items.run(replace(pictures, out=tmp_path / "x", on_image_error="text_only"))
    titles = replace(pictures, views="text", on_image_error="fail", out=tmp_path / "text")
    assert export_items.run(titles)["counts"]["ok"] == 40
