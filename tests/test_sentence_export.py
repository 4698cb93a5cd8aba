"""The merged model as a folder that sentence-transformers opens, without code of ours, and that gives our vectors."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from drawn_lora import draw_lora
from embedding_folder import write_embeddings
from PIL import Image
from sentence_transformers import SentenceTransformer
from tiny_models import FAMILIES, TEXT_FAMILIES
from transformers.utils import is_torchvision_available

from vlm2rec.downstream.table import EmbeddingTable
from vlm2rec.embedder.adapters import lora
from vlm2rec.embedder.backbones.families import load_processor
from vlm2rec.embedder.backbones.images import open_image
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ConfigError, ModelError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.sentence_export import write_sentence_transformer
from vlm2rec.pipelines import convert, export_items
from vlm2rec.pipelines.config import ConvertConfig, ExportConfig

Tiny = Callable[[str], Path]
TITLES = ["Red  wooden\tchair", "a <|im_end|> lamp, <image> and <|image_pad|>", "x", 'Größe 7 "tee" {{ 1 }}', ""]
pytestmark = [
    # transformers says so when it is asked for the vision tower of a model whose processor is handed over
    pytest.mark.filterwarnings("ignore:.*torchvision.*"),
]


def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (40 + 30 * i, 90, 3), np.uint8)) for i in range(len(TITLES))]


def opened(folder: Path, max_pixels: int = 224 * 224) -> SentenceTransformer:
    """Open a folder as its user would.

    transformers loads the video part of six families with torchvision alone. Where that is not installed, the
    processor is put together from the same folder without it.
    """
    class_name = json.loads((folder / "config.json").read_text())["model_type"]
    handed: AbstractContextManager[Any] = nullcontext()
    if (
        class_name
        in {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "internvl", "smolvlm", "gemma4", "llava_onevision"}
        and not is_torchvision_available()
    ):
        own: Any = load_processor(folder, None, max_pixels)
        if class_name == "smolvlm":  # its chat asks the video part for these, whatever the chat is about
            own.video_processor = SimpleNamespace(num_frames=1, fps=1)
        handed = patch("transformers.AutoProcessor.from_pretrained", lambda *_, **__: own)
    with handed:
        return SentenceTransformer(str(folder), device="cpu", trust_remote_code=False)


def exported(encoder: ItemEncoder, folder: Path) -> SentenceTransformer:
    folder.mkdir()
    write_sentence_transformer(encoder, folder, "card")
    return opened(folder, encoder.settings.max_pixels)


def load(folder: Path, **settings: Any) -> ItemEncoder:
    return ItemEncoder.load(folder, dtype="float32", device="cpu", **settings)


@pytest.mark.parametrize("mode", ["raw", "chat"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llava_onevision"])
def test_titles_and_images_get_the_encoders_vectors(family: str, mode: str, tiny: Tiny, tmp_path: Path) -> None:
    encoder = load(tiny(family), prompt_mode=mode)
    items = encoder.encode_items(TITLES, pictures())
    model = exported(encoder, tmp_path / "model")
    assert lora.cosine(model.encode(TITLES, batch_size=3), items.text).min() > 0.999
    assert lora.cosine(model.encode(pictures(), batch_size=3), items.image).min() > 0.999


def test_llava_onevision_is_exported_for_titles_only(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "both").mkdir()
    with pytest.raises(ModelError, match=r"an image that stands alone.*--views text"):
        write_sentence_transformer(load(tiny("llava_onevision")), tmp_path / "both", "card")
    encoder = load(tiny("llava_onevision"), views="text")
    model = exported(encoder, tmp_path / "model")
    vectors = encoder.encode_items(TITLES, [None] * len(TITLES)).text
    assert lora.cosine(model.encode(TITLES, batch_size=3), vectors).min() > 0.999


@pytest.mark.parametrize("mode", ["raw", "chat"])
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_titles_get_the_vectors_of_a_text_model(family: str, mode: str, tiny: Tiny, tmp_path: Path) -> None:
    encoder = load(tiny(family), prompt_mode=mode, views="text")
    model = exported(encoder, tmp_path / "model")
    text = encoder.encode_items(TITLES, [None] * len(TITLES)).text
    assert lora.cosine(model.encode(TITLES, batch_size=3), text).min() > 0.9999


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_with_internal_fusion_title_and_image_together_get_the_fused_vector(
    family: str, tiny: Tiny, tmp_path: Path
) -> None:
    encoder = load(tiny(family), fusion="internal")
    model = exported(encoder, tmp_path / "model")
    both: list[Any] = [{"text": title, "image": image} for title, image in zip(TITLES, pictures(), strict=True)]
    fused = encoder.encode_items(TITLES, pictures()).fused
    assert lora.cosine(model.encode(both, batch_size=3), fused).min() > 0.999
    with pytest.raises(Exception, match="this model takes one title and its image together"):
        model.encode(TITLES)


def test_with_external_fusion_both_at_once_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    model = exported(load(tiny("llava")), tmp_path / "model")
    both: Any = [{"text": "red chair", "image": pictures()[0]}]
    with pytest.raises(Exception, match="this model takes one title or one image"):
        model.encode(both)


def test_the_folder_holds_no_code(tiny: Tiny, tmp_path: Path) -> None:
    exported(load(tiny("llava")), tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").rglob("*")}
    assert not {name for name in names if name.endswith((".py", ".bin", ".pt", ".pkl"))}
    assert "auto_map" not in (tmp_path / "model" / "config.json").read_text()


@pytest.fixture(scope="module")
def trained(tiny: Tiny, drawn_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A backbone, an adapter that changes it, and their export of a small catalogue."""
    folder, backbone = tmp_path_factory.mktemp("trained"), tiny("llava")
    encoder = load(backbone)
    wrapped = lora.add_lora(encoder.backbone, rank=4, alpha=8, dropout=0.0, seed=0)
    draw_lora(wrapped, "lora_B", 0.1, seed=0)
    titles, images = lora.canary_items()
    canary = lora.Canary(titles, images, encoder.encode_items(titles, images).fused)
    lora.save_adapter(wrapped, folder / "adapter", {"encoder": encoder.settings.stored()}, canary, {}, "card")
    export_items.run(
        ExportConfig(
            data=drawn_dataset,
            backbone=str(backbone),
            adapter=folder / "adapter",
            out=folder / "emb",
            dtype="float32",
            vision_cache="off",
        )
    )
    return backbone, folder / "adapter", folder / "emb"


def run(embeddings: Path, out: Path, backbone: Path | None, adapter: Path | None, **settings: Any) -> dict[str, Any]:
    text = str(backbone) if backbone else None
    return convert.run(
        ConvertConfig(
            embeddings=embeddings, to="sentence-transformers", out=out, backbone=text, adapter=adapter, **settings
        )
    )


def test_the_converted_model_gives_the_vectors_of_the_table(
    trained: tuple[Path, Path, Path], drawn_dataset: Path, tmp_path: Path
) -> None:
    backbone, adapter, embeddings = trained
    record = run(embeddings, tmp_path / "model", backbone, adapter)
    assert "modules.json" in record["files"] and record["left_out"] == 0
    model, dataset = opened(tmp_path / "model"), Dataset(drawn_dataset)
    images = [open_image(dataset.image_root, path, 224 * 224) for path in dataset.image_paths]
    tables = {view: EmbeddingTable.open(embeddings, view) for view in ("fused", "text", "image")}
    text, image = model.encode(dataset.titles), model.encode(images)
    assert lora.cosine(text, tables["text"].take(dataset.item_ids)).min() > 0.999
    assert lora.cosine(image, tables["image"].take(dataset.item_ids)).min() > 0.999
    assert lora.cosine(text + image, tables["fused"].take(dataset.item_ids)).min() > 0.999
    untrained = load(backbone).encode_items(dataset.titles, [None] * len(dataset.titles)).text
    assert lora.cosine(text, untrained).max() < 0.99
    assert "model.encode(title)" in (tmp_path / "model" / "README.md").read_text()


def test_it_serves_as_a_backbone_of_vlm2rec_too(trained: tuple[Path, Path, Path], tmp_path: Path) -> None:
    backbone, adapter, embeddings = trained
    run(embeddings, tmp_path / "model", backbone, adapter)
    merged = load(tmp_path / "model").encode_items(TITLES, pictures())
    np.testing.assert_allclose(merged.fused, load(backbone, adapter=adapter).encode_items(TITLES, pictures()).fused)


def test_another_model_than_that_of_the_export_is_refused(
    trained: tuple[Path, Path, Path], tiny: Tiny, tmp_path: Path
) -> None:
    backbone, adapter, embeddings = trained
    with pytest.raises(ModelError, match=r"exported with adapter '.*', this model has None"):
        run(embeddings, tmp_path / "model", backbone, None)
    with pytest.raises(ModelError, match="exported with backbone_hash"):
        run(embeddings, tmp_path / "model", tiny("qwen2_5_vl"), adapter)
    with pytest.raises(ConfigError, match="without --backbone"):
        run(embeddings, tmp_path / "model", None, adapter)
    write_embeddings(tmp_path / "emb", ["a", "b"], np.ones((2, 4), np.float32))
    with pytest.raises(ModelError, match="were not made by export-items"):
        run(tmp_path / "emb", tmp_path / "model", backbone, adapter)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("to", "settings", "message"),
    [
        ("sentence-transformers", {"columns": ("text",)}, "--columns with --to sentence-transformers"),
        ("npy", {"adapter": Path("adapter")}, "--adapter with --to npy"),
        ("cornac", {"data": Path("data")}, "--data with --to cornac"),
    ],
)
def test_a_setting_that_says_nothing_to_a_format_is_refused(
    to: Any, settings: dict[str, Any], message: str, trained: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        convert.run(ConvertConfig(embeddings=trained[2], to=to, out=tmp_path / "out", **settings))
