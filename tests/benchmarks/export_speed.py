"""Items per CPU-second of three views (text, image, fused), side by side, with a random Qwen2.5-VL of middling size.

python tests/benchmarks/export_speed.py [--items items.parquet --images folder] [--threads 1]

    naive                  one item at a time, the whole model, all hidden states: the script one writes first
    sentence-transformers  `encode` of the same folder, if it is installed (pip install sentence-transformers)
    vlm2rec                `ItemEncoder.encode_items`, memory kept as in `export-items`; warm: what the tower says
                           of the images is known from an earlier export

The others multiply float32 as torch does by default, with MKL; vlm2rec takes oneDNN where that is faster.

The last column is the share of the processor's own rate at a large matrix product that useful work reaches: the
operations of the prompts' own tokens, without prefix, padding and language-model head.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from middle_size import MIDDLE, read_items, write_model
from PIL import Image
from qwen_shape import Shape
from transformers import AutoModelForImageTextToText

from vlm2rec.embedder import prompts
from vlm2rec.embedder.backbones.families import load_processor
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.export.processes import keep_freed_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"


@dataclasses.dataclass
class Run:
    """One way to encode, measured."""

    name: str
    dtype: str
    items: int
    seconds: float  # of the processor
    fused: np.ndarray
    useful: float = 0.0  # operations

    @property
    def rate(self) -> float:
        """Items per CPU-second."""
        return self.items / self.seconds


def measured(name: str, dtype: str, count: int, encode: Callable[[], np.ndarray]) -> Run:
    """Run `encode` and time it in CPU-seconds."""
    begun = time.process_time()
    vectors = encode()
    return Run(name, dtype, count, time.process_time() - begun, vectors)


def naive(folder: Path, titles: list[str], pictures: list[Image.Image], dtype: str) -> Run:
    """Encode item after item with the whole model."""
    processor = load_processor(str(folder), None, 224 * 224)  # AutoProcessor wants torchvision for videos
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=DTYPES[dtype]).eval()

    def vector(text: str, picture: Image.Image | None) -> np.ndarray:
        inputs = processor(text=[text], images=None if picture is None else [picture], return_tensors="pt")
        if picture is not None:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        with torch.no_grad():
            return model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1].float().numpy()

    def encode() -> np.ndarray:
        image = "".join(PLACEHOLDER if part is None else part for part in prompts.image_prompt(1))
        return np.stack(
            [
                vector("".join(p or "" for p in prompts.text_prompt([title])), None) + vector(image, picture)
                for title, picture in zip(titles, pictures, strict=True)
            ]
        )

    return measured("naive", dtype, len(titles), encode)


def sentence_transformers(folder: Path, titles: list[str], pictures: list[Image.Image], dtype: str) -> Run | None:
    """Encode the same prompts with sentence-transformers, batches of 32; None where it is not installed."""
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    except ImportError:
        return None
    own = load_processor(str(folder), None, 224 * 224)  # transformers' own loader wants torchvision, for videos
    with patch("transformers.AutoProcessor.from_pretrained", lambda *_, **__: own):
        transformer = Transformer(str(folder), model_kwargs={"dtype": DTYPES[dtype]})
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
    model = SentenceTransformer(modules=[transformer, pooling], device="cpu")
    texts = ["".join(p or "" for p in prompts.text_prompt([title])) for title in titles]
    images: list[Any] = [{"text": prompts.IMAGE_INSTRUCTION, "image": picture} for picture in pictures]

    def encode() -> np.ndarray:
        return model.encode(texts, batch_size=32) + model.encode(images, batch_size=32)

    return measured("sentence-transformers", dtype, len(titles), encode)


def ours(folder: Path, titles: list[str], pictures: list[Image.Image], dtype: str, shape: Shape) -> list[Run]:
    """Encode with vlm2rec, then once more with the images' features known."""
    keep_freed_memory()
    encoder = ItemEncoder.load(str(folder), dtype=dtype, device="cpu")  # type: ignore[arg-type]
    encoder.encode_items(titles[:2], pictures[:2])  # the shared prefixes
    cold = measured("vlm2rec", dtype, len(titles), lambda: encoder.encode_items(titles, pictures).fused)
    known = encoder.encode_images(pictures)
    warm = measured("vlm2rec, warm", dtype, len(titles), lambda: encoder.encode_items(titles, known).fused)
    cold.useful, warm.useful = useful_operations(encoder, titles, known, shape)
    return [cold, warm]


def useful_operations(encoder: ItemEncoder, titles: list[str], known: list[Any], shape: Shape) -> tuple[float, float]:
    """Return the operations of all three views, and those of them outside the vision tower."""
    backbone = encoder.backbone
    language = vision = 0.0
    for title, image in zip(titles, known, strict=True):
        for prompt in (
            backbone.tokenize(prompts.text_prompt([title])),
            backbone.tokenize(prompts.image_prompt(1), [image]),
        ):
            language += shape.language_operations(len(prompt) - prompt.shared, prompt.shared)
        vision += shape.vision_operations(len(image.tokens))
    return language + vision, language


def product_rate(dtype: str, shape: Shape) -> float:
    """Return operations per CPU-second of a large matrix product."""
    left, right = (torch.randn(n, shape.width).to(DTYPES[dtype]) for n in (2048, shape.inner))
    for _ in range(3):
        left @ right.T
    begun, times = time.process_time(), 20
    for _ in range(times):
        left @ right.T
    return times * 2 * 2048 * shape.width * shape.inner / (time.process_time() - begun)


def main() -> None:
    """Measure every way in float32 and in the dtype that `auto` picks, and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--count", type=int, default=192, help="items that vlm2rec encodes; the others encode fewer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=MIDDLE.layers)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    shape = dataclasses.replace(MIDDLE, layers=chosen.layers)
    titles, pictures = read_items(chosen.items, chosen.images, chosen.count)
    few = max(8, len(titles) // 6)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_model(folder, titles, shape)
        print(
            f"{shape.language_weights / 1e6:.0f} M language weights, {shape.vision_weights / 1e6:.0f} M in the vision"
            f" tower, {len(titles)} items, {chosen.threads} threads, torch {torch.__version__}"
        )
        auto = str(ItemEncoder.load(str(folder), device="cpu").fingerprint["dtype"])
        torch.set_float32_matmul_precision("highest")  # vlm2rec chose for this process; the others have the default
        first = naive(folder, titles[:few], pictures[:few], "float32")
        half = slice(None, len(titles) // 2)
        table = [first, sentence_transformers(folder, titles[half], pictures[half], "float32")]
        table += ours(folder, titles, pictures, "float32", shape)
        if auto != "float32":
            table += ours(folder, titles, pictures, auto, shape)
    runs = [run for run in table if run is not None]
    rates = {dtype: product_rate(dtype, shape) for dtype in {run.dtype for run in runs}}
    other = next((run for run in runs if run.name == "sentence-transformers"), None)
    print(f"{'':<24}{'dtype':<10}{'items/CPU-s':>12}{'x naive':>9}{'x s-t':>8}{'cosine to naive':>17}{'of GEMM':>9}")
    for run in runs:
        against = min(cosine(a, b) for a, b in zip(run.fused, first.fused, strict=False))
        share = f"{run.useful / run.seconds / rates[run.dtype]:.2f}" if run.useful else ""
        beside = f"{run.rate / other.rate:.2f}" if other else ""
        same = "" if run.name == "sentence-transformers" else f"{against:.6f}"  # it has a chat format of its own
        rate = f"{run.rate:>12.2f}{run.rate / first.rate:>9.2f}"
        print(f"{run.name:<24}{run.dtype:<10}{rate}{beside:>8}{same:>17}{share:>9}")


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the cosine of two vectors."""
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
