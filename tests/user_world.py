"""A small world of items, vectors and histories of users that no training has seen."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from embedding_folder import write_embeddings

from vlm2rec.embedder.export import distribute

ITEMS = [f"i{number}" for number in range(60)]
DIM = 12


def item_vectors(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(len(ITEMS), DIM)).astype(np.float32)


def write_items(folder: Path, seed: int = 0, **extras: Any) -> Path:
    """Write 60 items in three views; item i5 has no vector, item i7 no image vector."""
    text, image = item_vectors(seed), item_vectors(seed + 100)
    fused = text + image
    fused[7] = text[7]
    for view in (text, image, fused):
        view[5] = np.nan
    image[7] = np.nan
    counts = {"ok": len(ITEMS) - 2, "text_only": 1, "failed": 1}
    write_embeddings(folder, ITEMS, fused, text, image, shard_size=25, counts=counts, **extras)
    return folder


def draw_histories(users: int, seed: int = 0) -> dict[str, list[str]]:
    """Return histories of 1 to 9 items, with unknown items, and four odd users."""
    random, usual = np.random.default_rng(seed), [item for item in ITEMS if item != "i5"]
    found = {
        f"user {number:03d}": [usual[row] for row in random.integers(0, len(usual), random.integers(1, 10))]
        for number in range(users)
    }
    found["user 001"] += ["nowhere", ITEMS[3]]
    return found | {"=empty": [], "lost": ["nowhere", "elsewhere"], "without": ["i5"], "whole": list(ITEMS)}


def write_histories(path: Path, histories: dict[str, list[str]]) -> Path:
    lines = [json.dumps({"user_id": user, "history": items}) for user, items in histories.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


def die_after(shards: int) -> None:
    """Let this process be killed in place of publishing one more shard than so many."""
    publish = distribute.shards.publish_shard
    left = iter(range(shards))

    def dying(*arguments: Any) -> Any:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return publish(*arguments)

    distribute.shards.publish_shard = dying


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return all rows of a folder of shards, in order."""
    return [row for path in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


def parts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part-*.parquet"))}
