"""Peak memory and time of an export as the catalogue grows, with an encoder that costs nothing.

python tests/benchmarks/export_memory.py [--sizes 10000 100000 1000000] [--dim 128]

Everything but the model is the real thing: dataset, plan, fingerprint, shards, read-back, manifest. Each size runs in a
process of its own. The vectors are of text alone, so that no million images have to be there.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.encoders.item_encoder import EncodedItems, Picture
from vlm2rec.embedder.export.export import export


class FreeEncoder:
    """Vectors from a table of a thousand, at no cost."""

    def __init__(self, dim: int) -> None:
        self.fingerprint: dict[str, Any] = {
            "dim": dim,
            "views": ["fused", "text"],
            "max_pixels": 50176,
            "pooling": "last",
        }
        self._table = np.random.default_rng(0).normal(size=(1000, dim)).astype(np.float32)

    def encode_items(self, titles: Sequence[str], images: Sequence[Picture]) -> EncodedItems:
        """See `ItemEncoder`."""
        text = self._table[[len(title) * 31 % 1000 for title in titles]]
        return EncodedItems(text, text, np.full_like(text, np.nan), np.zeros(len(titles), bool))


def write_dataset(folder: Path, items: int) -> None:
    """Write items with ids and titles of ordinary length."""
    folder.mkdir()
    table = pa.table(
        {
            "item_id": [f"B{number:09d}" for number in range(items)],
            "title": [f"A product of some kind, number {number}, in a box of {number % 97}" for number in range(items)],
            "image_path": [f"{number % 1000}/{number}.jpg" for number in range(items)],
        }
    )
    pq.write_table(table, folder / "items.parquet")
    meta = {"schema_version": 1, "name": "large", "image_root": "images", "max_history": 10}
    (folder / "dataset.json").write_text(json.dumps(meta))


def measure(folder: Path, dim: int) -> dict[str, float]:
    """Export the dataset in `folder`; returns seconds and the peak of this process in MiB."""
    encoder = FreeEncoder(dim)
    begun = time.perf_counter()
    export(Dataset(folder / "data"), folder / "embeddings", encoder.fingerprint, lambda: encoder)
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> None:
    """Measure every size and print what it takes beside the smallest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.folder:
        print(json.dumps(measure(chosen.folder, chosen.dim)))
        return
    print(f"{'items':>10}{'seconds':>10}{'items/s':>10}{'peak MiB':>10}{'grown MiB':>11}{'x items':>9}{'x time':>8}")
    first: dict[str, float] = {}
    for size in chosen.sizes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_dataset(folder / "data", size)
            command = [sys.executable, __file__, "--folder", str(folder), "--dim", str(chosen.dim)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        first = first or found
        grown, longer = found["peak"] - first["peak"], found["seconds"] / first["seconds"]
        print(
            f"{size:>10,}{found['seconds']:>10.1f}{size / found['seconds']:>10.0f}{found['peak']:>10.0f}{grown:>11.0f}"
            f"{size / chosen.sizes[0]:>9.0f}{longer:>8.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
