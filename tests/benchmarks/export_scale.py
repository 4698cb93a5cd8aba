"""Two workers against one: processes of this machine, and tasks on a local Ray cluster of two nodes.

python tests/benchmarks/export_scale.py [--data DATA --backbone BB] [--items 240] [--engines local,ray]

One thread each, without vision cache; by default drawn items and a random Qwen2.5-VL of middling size. A first export
of two workers is not counted: it brings files and libraries into memory. Times are those of the whole command, in which
each worker starts and loads the model; efficiency is time of one / (2 × time of two).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

os.environ["OMP_NUM_THREADS"] = "1"

import polars as pl
import ray
import ray.cluster_utils
from drawn_world import draw_dataset
from middle_size import MIDDLE, write_model

from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.export.verify import verify
from vlm2rec.pipelines import export_items
from vlm2rec.pipelines.config import ExportConfig


def seconds(engine: Literal["local", "ray"], workers: int, out: Path, chosen: argparse.Namespace) -> float:
    """Return how long an export takes with some workers."""
    config = ExportConfig(
        data=chosen.data,
        backbone=chosen.backbone,
        out=out,
        engine=engine,
        num_workers=workers,
        shard_size=chosen.shard_size,
        dtype="float32",
        device="cpu",
        vision_cache="off",
        max_failures=1.0,
    )
    begun = time.perf_counter()
    export_items.run(config)
    took = time.perf_counter() - begun
    if problems := verify(out):
        raise SystemExit(f"{out}: {problems[0]}")
    return took


def main() -> None:
    """Time each engine with one and two workers and print the efficiency."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--backbone")
    parser.add_argument("--items", type=int, default=240, help="about how many, if they are drawn")
    parser.add_argument("--layers", type=int, default=MIDDLE.layers, help="of the language model, if it is drawn")
    parser.add_argument("--shard-size", type=int, default=16)
    parser.add_argument("--engines", default="local,ray")
    chosen = parser.parse_args()
    cluster: Any = None
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        if chosen.data is None or chosen.backbone is None:
            chosen.data = draw_dataset(Path(temporary), chosen.items)
            chosen.backbone = str(Path(temporary) / "model")
            titles = pl.read_parquet(chosen.data / "items.parquet")["title"].to_list()
            write_model(Path(chosen.backbone), titles, dataclasses.replace(MIDDLE, layers=chosen.layers))
        items = len(Dataset(chosen.data).item_ids)
        for engine in chosen.engines.split(","):
            if engine == "ray":
                cluster = ray.cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
                for _ in range(2):
                    cluster.add_node(num_cpus=1)
                ray.init(address=cluster.address, log_to_driver=False)
            seconds(engine, 2, Path(temporary) / f"{engine}-first", chosen)
            times = [seconds(engine, n, Path(temporary) / f"{engine}-{n}", chosen) for n in (1, 2)]
            lines.append(
                f"{engine:<6} one worker {items / times[0]:6.1f} items/s, two {items / times[1]:6.1f} items/s:"
                f" efficiency {times[0] / times[1] / 2:.2f}"
            )
    print(f"{items:,} items, shards of {chosen.shard_size}")
    print("\n".join(lines))
    if cluster is not None:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
