"""A random Qwen2.5-VL of middling size, and items for it: what the speed benchmarks run on."""

from __future__ import annotations

import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch
import transformers
from PIL import Image

from vlm2rec.embedder import small_backbone
from vlm2rec.embedder.images import ImageError, open_image
from vlm2rec.pipelines.catalogue import draw_catalogue


@dataclass(frozen=True)
class Shape:
    """Sizes of the language model and of the vision tower."""

    width: int = 768
    layers: int = 16
    inner: int = 3072
    heads: int = 12
    kv_heads: int = 2
    vision_width: int = 512
    vision_layers: int = 12
    vision_inner: int = 1368
    vision_heads: int = 8
    vocabulary: int = 151_936  # of Qwen2.5; the tokenizer here uses the first few thousand

    @property
    def language_weights(self) -> int:
        """Weights of the language model's linear layers."""
        kv_width = self.width * self.kv_heads // self.heads
        return self.layers * (2 * self.width**2 + 2 * self.width * kv_width + 3 * self.width * self.inner)

    @property
    def vision_weights(self) -> int:
        """Weights of the vision tower's linear layers, without patches and merger."""
        return self.vision_layers * (4 * self.vision_width**2 + 3 * self.vision_width * self.vision_inner)


def write_model(folder: Path, titles: list[str], shape: Shape, seed: int = 0) -> None:
    """Write a model folder with random weights and a tokenizer that has seen the titles."""
    tokenizer = small_backbone.train_tokenizer(titles, [("word",)], 4000)
    settings = small_backbone.SmallBackboneSettings(hidden_size=64, layers=1, max_pixels=224 * 224, seed=seed)
    small_backbone.write_random_model(folder, tokenizer, settings)  # the files around the weights
    ids = tokenizer.get_vocab()
    head = shape.width // shape.heads
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.width,
            "intermediate_size": shape.inner,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [head // 8, 3 * head // 16, 3 * head // 16],
            },
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": shape.vision_layers,
            "hidden_size": shape.vision_width,
            "intermediate_size": shape.vision_inner,
            "num_heads": shape.vision_heads,
            "out_hidden_size": shape.width,
            "window_size": 112,
            "fullatt_block_indexes": [shape.vision_layers // 2 - 1, shape.vision_layers - 1],
        },
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(seed)
    small_backbone.save_weights(transformers.Qwen2_5_VLForConditionalGeneration(config), folder)


def read_items(items: Path | None, images: Path | None, count: int) -> tuple[list[str], list[Image.Image]]:
    """Return titles and pictures of `count` items, 224 × 224 pixels: of a catalogue, or drawn."""
    if items is None or images is None:
        with tempfile.TemporaryDirectory() as drawn:
            draw_catalogue(Path(drawn), max(count, 200), 1)
            return read_items(Path(drawn) / "items.parquet", Path(drawn) / "images", count)
    titles, pictures = [], []
    for item_id, title in pl.read_parquet(items).select("item_id", "title").iter_rows():
        try:
            picture = open_image(images, f"{item_id}.jpg")
        except ImageError:
            continue
        # as a JPEG of the size that the model takes, like a catalogue's thumbnails
        file = io.BytesIO()
        picture.resize((224, 224)).save(file, "JPEG", quality=90)
        titles.append(title)
        pictures.append(Image.open(file).convert("RGB"))
        if len(titles) == count:
            break
    return titles, pictures
