"""One training step, side by side: the naive loop against vlm2rec, in time, peak memory and loss.

python tests/benchmarks/training_step.py [--items items.parquet --images folder] [--layers 6]

Eight users with histories of ten items and their targets. The naive loop encodes four padded batches (text and image
of users and of items), each with the vision tower, through the whole model with all hidden states. vlm2rec packs the
prompts, looks at each distinct image once in the whole training (the step measured finds them known) and leaves the
language-model head out. Both have LoRA on the same layers, without dropout, and no gradient checkpointing.
Each way runs in a process of its own, so that the peak of one is not that of the other.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from drawn_lora import draw_lora
from middle_size import MIDDLE, read_items, write_model
from PIL import Image

from vlm2rec.embedder import prompts
from vlm2rec.embedder.adapters.lora import add_lora
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.item_features import ItemFeatures
from vlm2rec.embedder.training.losses import VLM2RecObjective
from vlm2rec.embedder.training.vlm2rec import HistoryModel
from vlm2rec.pipelines import prepare
from vlm2rec.pipelines.config import PrepareConfig

USERS, HISTORY, STEPS = 8, 10, 2
PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"


def write_dataset(folder: Path, titles: list[str], pictures: list[Image.Image]) -> None:
    """Write a prepared dataset in which everybody has a history of ten and more."""
    (folder / "images").mkdir(parents=True)
    for number, picture in enumerate(pictures):
        picture.save(folder / "images" / f"{number}.png")
    ids = [str(number) for number in range(len(titles))]
    pl.DataFrame({"item_id": ids, "title": titles}).write_parquet(folder / "items.parquet")
    random = np.random.default_rng(0)
    users = range(40)
    rows = [
        (f"u{u}", ids[item], t) for u in users for t, item in enumerate(random.permutation(len(ids))[: HISTORY + 4])
    ]
    pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row").write_parquet(folder / "x.parquet")
    prepare.run(
        PrepareConfig(
            items=folder / "items.parquet",
            interactions=folder / "x.parquet",
            images=folder / "images",
            out=folder / "data",
            core=1,
            candidates=5,
        )
    )


def build(encoder: ItemEncoder, dataset: Dataset) -> tuple[HistoryModel, list[list[int]], torch.Tensor]:
    """Return the model, with LoRA matrices that are not zero, and one batch."""
    wrapped = add_lora(encoder.backbone, 16, 32.0, 0.0, 0)
    draw_lora(wrapped, "lora_B", 0.01, seed=1)
    model = HistoryModel(encoder, wrapped, ItemFeatures(dataset, encoder), VLM2RecObjective(), 0.1)
    sequences = dataset.train_sequences()[:USERS]
    histories = [[int(row) for row in items[-HISTORY - 1 : -1]] for items in sequences]
    return model, histories, torch.tensor([int(items[-1]) for items in sequences])


def naive_loss(model: HistoryModel, dataset: Dataset, histories: list[list[int]], targets: torch.Tensor) -> Any:
    """Return the loss of four padded encodes through the whole model."""
    backbone = model.encoder.backbone
    whole, processor = backbone.model, backbone.processor
    pictures = {
        row: Image.open(dataset.image_root / dataset.image_paths[row]).convert("RGB")
        for row in range(len(dataset.item_ids))
    }

    def encode(rows: list[list[int]], with_images: bool) -> torch.Tensor:
        if with_images:
            made = ["".join(PLACEHOLDER if p is None else p for p in prompts.image_prompt(len(r))) for r in rows]
            inputs = processor(
                text=made, images=[[pictures[row] for row in r] for r in rows], return_tensors="pt", padding=True
            )
        else:
            made = ["".join(p or "" for p in prompts.text_prompt([dataset.titles[row] for row in r])) for r in rows]
            inputs = processor(text=made, return_tensors="pt", padding=True)
        hidden = whole(**inputs, output_hidden_states=True).hidden_states[-1]
        last = inputs["attention_mask"].shape[1] - 1 - inputs["attention_mask"].flip(1).argmax(1)
        return hidden[torch.arange(len(rows)), last]

    items = [[int(row)] for row in targets]
    users, targeted = (
        {view: encode(rows, view == schema.IMAGE) for view in schema.MODALITIES} for rows in (histories, items)
    )
    return model.loss(users, targeted, targets)[0]


def measure(way: str, folder: Path) -> dict[str, float]:
    """Run a few steps one way; returns CPU-seconds of a step, the peak of this process and the loss."""
    torch.set_num_threads(1)
    encoder, dataset = ItemEncoder.load(str(folder / "model"), dtype="float32", device="cpu"), Dataset(folder / "data")
    model, histories, targets = build(encoder, dataset)
    model.eval()
    if way == "vlm2rec":
        model.items.features([[*history, int(t)] for history, t in zip(histories, targets, strict=True)])
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(STEPS):
        model.zero_grad()
        begun = time.process_time()
        loss = model(histories, targets)[0] if way == "vlm2rec" else naive_loss(model, dataset, histories, targets)
        loss.backward()
        seconds.append(time.process_time() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": min(seconds), "peak": peak / 2**20, "above_idle": (peak - idle) / 2**20, "loss": loss.item()}


def main() -> None:
    """Measure both ways and print their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--layers", type=int, default=6, help="of the language model; the naive loop takes minutes")
    parser.add_argument("--way", choices=("naive", "vlm2rec"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.way:
        print(json.dumps(measure(chosen.way, chosen.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        titles, pictures = read_items(chosen.items, chosen.images, 60)
        write_dataset(folder, titles, pictures)
        write_model(folder / "model", titles, dataclasses.replace(MIDDLE, layers=chosen.layers))
        found = {}
        for way in ("naive", "vlm2rec"):
            command = [sys.executable, __file__, "--way", way, "--folder", str(folder)]
            found[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"{'':<10}{'CPU-s a step':>14}{'users/CPU-s':>13}{'peak GiB':>10}{'above idle':>12}{'loss':>12}")
    for way, row in found.items():
        sizes = f"{row['peak']:>10.2f}{row['above_idle']:>12.2f}"
        print(f"{way:<10}{row['seconds']:>14.2f}{USERS / row['seconds']:>13.2f}{sizes}{row['loss']:>12.6f}")
    naive, ours = found["naive"], found["vlm2rec"]
    memory = ours["above_idle"] / naive["above_idle"]
    print(
        f"{naive['seconds'] / ours['seconds']:.2f} x as fast, {memory:.2f} x the memory above idle,"
        f" losses differ by {abs(naive['loss'] - ours['loss']):.1e}"
    )


if __name__ == "__main__":
    main()
