"""What layers and image tokens of the small pretrained backbone cost: a training step and an exported item.

    python tests/benchmarks/backbone_cost.py --data DATASET [--layers 6 10 30] [--tokens 4 9 25] [--dtype bfloat16]

The folders are those of `pretrained_backbone.py` with towers that have learned nothing: time does not depend on what
the weights are. A step is one of VLM2Rec: eight users with histories of up to ten items, LoRA of rank 16, no gradient
checkpointing; its images have been looked at before, as in every epoch after the first. An item is exported with text,
image and fused vectors, its image read and looked at for the first time. CPU-seconds of one thread, the least of two.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from pretrained_backbone import PATCHES, WIDTH, language_model, save, vision_config
from training_step import build

from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder

ITEMS, TIMES = 64, 2


def least(work: Callable[[], Any]) -> float:
    """Return the CPU-seconds of the quicker of two calls."""
    found = []
    for _ in range(TIMES):
        begun = time.process_time()
        work()
        found.append(time.process_time() - begun)
    return min(found)


def write(out: Path, layers: int, tokens: int) -> None:
    """Write a backbone folder of this shape, with a tower and a projector as they are drawn."""
    model, tokenizer = language_model()
    torch.manual_seed(0)
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision_config(tokens)))
    width = model.config.hidden_size
    projector = nn.Sequential(nn.Linear(WIDTH, width), nn.GELU(), nn.Linear(width, width))
    save(out, model, tokenizer, tower, projector, layers, tokens)


def measure(folder: Path, data: Path, dtype: str) -> tuple[float, float, float]:
    """Return CPU-seconds of a step and of an item, and the peak of this process in GiB."""
    torch.set_num_threads(1)
    encoder = ItemEncoder.load(str(folder), dtype=dtype, device="cpu")
    dataset = Dataset(data)
    known = [row for row, path in enumerate(dataset.image_paths) if path is not None][:ITEMS]
    titles = [dataset.titles[row] for row in known]
    pictures = []
    for row in known:
        with Image.open(dataset.image_root / dataset.image_paths[row]) as opened:
            pictures.append(opened.convert("RGB"))
    item = least(lambda: encoder.encode_items(titles, pictures)) / len(known)
    model, histories, targets = build(encoder, dataset)
    model.items.features([[*history, int(t)] for history, t in zip(histories, targets, strict=True)])

    def step() -> None:
        model.zero_grad()
        model(histories, targets)[0].backward()

    return least(step), item, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Print a row for each shape; each is measured in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a dataset folder with images")
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 10, 30])
    parser.add_argument("--tokens", type=int, nargs="+", default=sorted(PATCHES), choices=sorted(PATCHES))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder is not None:
        print("found", *measure(given.folder, given.data, given.dtype))
        return
    print("| layers | image tokens | a step, CPU-s | an item, CPU-s | peak, GiB |\n|---|---|---|---|---|")
    for layers, tokens in itertools.product(given.layers, given.tokens):
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), layers, tokens)
            command = [sys.executable, __file__, "--data", str(given.data), "--dtype", given.dtype, "--folder", folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        step, item, peak = map(float, done.stdout.split("found")[1].split())
        print(f"| {layers} | {tokens} | {step:.1f} | {item:.3f} | {peak:.1f} |", flush=True)


if __name__ == "__main__":
    main()
