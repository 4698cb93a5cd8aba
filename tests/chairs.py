"""A dataset of chairs, and an encoder whose vectors anybody can compute: the world of the export's tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vlm2rec.embedder.backbones.images import ImageError
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.encoders.item_encoder import EncodedItems

ITEMS = 20


def write_dataset(folder: Path, items: int = ITEMS, broken: Sequence[int] = (), **columns: list[Any]) -> Path:
    """Items with a title and a coloured square each."""
    (folder / "images").mkdir(parents=True)
    random = np.random.default_rng(0)
    for row in range(items):
        image = folder / "images" / f"{row}.png"
        if row in broken:
            image.write_bytes(b"<html>404</html>")
        else:
            block = random.integers(0, 255, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(block).resize((60, 60), Image.Resampling.NEAREST).save(image)
    table = {
        "item_id": [f"{row:03d}" for row in range(items)],
        "title": [f"{['red', 'small', 'wooden'][row % 3]} chair {row}" for row in range(items)],
        "image_path": [f"{row}.png" for row in range(items)],
    } | columns
    pq.write_table(pa.table(table), folder / "items.parquet")
    meta = {"schema_version": 1, "name": "chairs", "image_root": "images", "max_history": 10}
    (folder / "dataset.json").write_text(json.dumps(meta))
    return folder


def edit_items(folder: Path, change: Callable[[dict[str, list[Any]]], dict[str, list[Any]]]) -> Dataset:
    """Change the columns of the items, as `prepare` would: the file is replaced."""
    table = pq.read_table(folder / "items.parquet").to_pydict()
    pq.write_table(pa.table(change(table)), folder / "new.parquet")
    (folder / "new.parquet").replace(folder / "items.parquet")
    return Dataset(folder)


def retitle(folder: Path, *rows: int) -> Dataset:
    """Give some items another title."""

    def change(table: dict[str, list[Any]]) -> dict[str, list[Any]]:
        titles = [f"another title of {row}" if row in rows else title for row, title in enumerate(table["title"])]
        return {**table, "title": titles}

    return edit_items(folder, change)


class ShadeEncoder:
    """Vectors made of the title's length and the picture's mean colour; `spoil` may put something else there."""

    def __init__(self, views: Sequence[str] = schema.VIEWS, spoil: dict[str, Callable[[int], float]] | None = None):
        self.fingerprint: dict[str, Any] = {"dim": 3, "views": list(views), "max_pixels": 112 * 112, "model": "shade"}
        self.spoil = spoil or {}
        self.calls: list[list[str]] = []

    def encode_items(self, titles: Sequence[str], images: Sequence[Image.Image | ImageError | None]) -> EncodedItems:
        self.calls.append(list(titles))
        text = np.array([[len(title), len(title) % 7, 1] for title in titles], np.float32)
        for row, title in enumerate(titles):
            if title in self.spoil:
                text[row, 1] = self.spoil[title](len(titles))
        image = np.full_like(text, np.nan)
        for row, picture in enumerate(images):
            if isinstance(picture, Image.Image):
                image[row] = np.asarray(picture).mean((0, 1)) / 255
        truncated = np.array([title.startswith("wooden") for title in titles])
        return EncodedItems(text + image, text, image, truncated)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for part in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]


def parts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part-*.parquet"))}
