"""A random Qwen2.5-VL of middling size, and items for it: what the speed benchmarks run on."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import polars as pl
import torch
import transformers
from PIL import Image
from qwen_shape import Shape

from vlm2rec.embedder.backbones.images import ImageError, open_image
from vlm2rec.pipelines.synthetic import small_backbone
from vlm2rec.pipelines.synthetic.drawn_catalogue import draw_catalogue

MIDDLE = Shape(
    width=768,
    layers=16,
    inner=3072,
    heads=12,
    vision_width=512,
    vision_layers=12,
    vision_inner=1368,
    vision_heads=8,
    full_layers=(5, 11),
)
"""The vocabulary is that of Qwen2.5, of which the tokenizer here uses the first few thousand."""


def write_model(
    folder: Path,
    titles: list[str],
    shape: Shape,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> None:
    """Write a model folder with random weights, drawn on that device, and a tokenizer that has seen the titles."""
    tokenizer = small_backbone.train_tokenizer(titles, [("word",)], 4000)
    settings = small_backbone.SmallBackboneSettings(hidden_size=64, layers=1, max_pixels=224 * 224, seed=seed)
    small_backbone.write_random_model(folder, tokenizer, settings)  # the files around the weights
    ids = tokenizer.get_vocab()
    config = shape.config(
        {
            "eos": ids["<|im_end|>"],
            "pad": ids["<|endoftext|>"],
            "image": ids["<|image_pad|>"],
            "video": ids["<|video_pad|>"],
            "vision_start": ids["<|vision_start|>"],
            "vision_end": ids["<|vision_end|>"],
        }
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
    small_backbone.save_weights(model, folder)


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
