"""Items per second on a GPU in the exact shape of Qwen2.5-VL-3B with random weights, and the training step beside it.

python tests/benchmarks/gpu_export.py [--items 512] [--tiny]     (from the repository; vlm2rec need not be installed)

Needs torch, transformers, peft, pyarrow and Pillow; no model, no data, no polars, faiss or RecBole. Images are of 224²
pixels (256 patches, 64 tokens), titles as long as those of shops. `--tiny` runs the same code in a small shape, as a
machine without a GPU does, to see that it works.

    naive           one item at a time, the whole model, all hidden states
    padded          batches of 32, padded; the model's own attention; without the language-model head
    packed          vlm2rec: packed rows, shared prefix, last layer for last tokens
    packed, warm    the same, with what the vision tower says of the images known from an earlier export

MFU counts the operations of the prompts' own tokens (without prefix, padding and head) and of the vision tower, against
the rate of a large matrix product on the same device.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from qwen_shape import Shape
from torch import Tensor

ROOT = Path(__file__).parents[2]
HISTORY, USERS = 10, 8
FIRST_ID = 1000  # ids below are the special tokens of this script
IMAGE, VISION_START, VISION_END, PAD = range(4)
PREFIX = tuple(range(10, 22))  # twelve tokens, as "Describe this item text sequence in one word, 0)"
IMAGE_PREFIX = (*range(30, 43), VISION_START)


def import_vlm2rec() -> None:
    """Make `vlm2rec.embedder` importable from the checkout where the package is not installed."""
    try:
        import vlm2rec.embedder.backbones.backbone  # noqa: F401
    except ImportError:
        links = Path(tempfile.mkdtemp()) / "vlm2rec"
        links.mkdir()
        for part in ("embedder", "downstream", "pipelines"):
            (links / part).symlink_to(ROOT / part)
        sys.path.insert(0, str(links.parent))


TINY = Shape(128, 3, 256, 4, 2, 2000, 64, 4, 128, 4, (1, 3), 112)


def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a model with random weights."""
    ids = {"image": IMAGE, "video": 5, "vision_start": VISION_START, "vision_end": VISION_END, "eos": None, "pad": PAD}
    config = shape.config(ids)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
    return model.requires_grad_(False).eval()


@dataclass
class Items:
    """Drawn items: token ids of the text prompts, patches of the images."""

    texts: list[list[int]]
    patches: list[Tensor]  # (P, 1176) each, float32 on the CPU
    grid: Tensor  # (1, 3)


def draw(count: int, shape: Shape) -> Items:
    """Draw titles of 5 to 60 tokens, 17 in the middle, and images of noise."""
    random = torch.Generator().manual_seed(1)
    lengths = torch.exp(2.85 + 0.5 * torch.randn(count, generator=random)).round().clamp(5, 60).int().tolist()
    texts = [
        [*PREFIX, *torch.randint(FIRST_ID, shape.vocabulary, (length,), generator=random).tolist()]
        for length in lengths
    ]
    side = shape.side // 14
    patches = [torch.randn(shape.patches, 1176, generator=random) for _ in range(count)]
    return Items(texts, patches, torch.tensor([[1, side, side]]))


def image_ids(shape: Shape, count: int = 1) -> list[int]:
    """Return the token ids of an image prompt."""
    ids = [*IMAGE_PREFIX[:-1]]
    for number in range(count):
        ids += [*([] if number == 0 else [50, 51, 52]), VISION_START, *[IMAGE] * shape.tokens, VISION_END]
    return ids


def naive(model: Any, items: Items, shape: Shape, count: int) -> Tensor:
    """Encode one item after the other with the whole model."""
    device, found = model.device, []
    picture = torch.tensor([image_ids(shape)], device=device)
    for text, patches in zip(items.texts[:count], items.patches[:count], strict=True):
        ids = torch.tensor([text], device=device)
        with torch.no_grad():
            t = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
            v = model(
                input_ids=picture,
                pixel_values=patches.to(device, model.dtype),
                image_grid_thw=items.grid.to(device),
                mm_token_type_ids=(picture == IMAGE).int(),
                output_hidden_states=True,
            ).hidden_states[-1][0, -1]
        found.append(t.float() + v.float())
    return torch.stack(found)


def padded(model: Any, items: Items, shape: Shape, count: int, size: int = 32) -> Tensor:
    """Encode padded batches with the model without its head."""
    device, found = model.device, []
    for start in range(0, count, size):
        texts = items.texts[start : min(start + size, count)]
        longest = max(map(len, texts))
        ids = torch.tensor([[*text, *[PAD] * (longest - len(text))] for text in texts], device=device)
        mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts], device=device)
        picture = torch.tensor([image_ids(shape)] * len(texts), device=device)
        pixels = torch.cat(items.patches[start : start + len(texts)]).to(device, model.dtype)
        with torch.no_grad():
            hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
            t = hidden[torch.arange(len(texts)), mask.sum(1) - 1]
            v = model.model(
                input_ids=picture,
                pixel_values=pixels,
                image_grid_thw=items.grid.expand(len(texts), 3).to(device),
                mm_token_type_ids=(picture == IMAGE).int(),
            ).last_hidden_state[:, -1]
        found.append(t.float() + v.float())
    return torch.cat(found)


class Packed:
    """vlm2rec's own path, with token ids in place of a tokenizer."""

    def __init__(self, model: Any, shape: Shape) -> None:
        from vlm2rec.embedder.backbones import backbone

        tokenizer = types.SimpleNamespace(pad_token_id=PAD)
        processor = types.SimpleNamespace(tokenizer=tokenizer, image_token_id=IMAGE)
        self.backbone = backbone.Backbone(model, processor)
        self.backbone.share_prefixes()
        self.budget = backbone.pick_token_budget(self.backbone)
        self.shape = shape

    def encode_images(self, items: Items, count: int) -> list[Any]:
        """Return what the vision tower says of the images."""
        from vlm2rec.embedder.backbones.backbone import Patches

        return self.backbone.encode_images([Patches(patches, items.grid) for patches in items.patches[:count]])

    def encode(self, items: Items, known: list[Any]) -> Tensor:
        """Return the fused vectors."""
        from vlm2rec.embedder.backbones.backbone import EncodedPrompt

        texts = [EncodedPrompt(text, (), len(PREFIX)) for text in items.texts[: len(known)]]
        ids = image_ids(self.shape)
        pictures = [EncodedPrompt(ids, (image,), len(IMAGE_PREFIX)) for image in known]
        return self._rows(texts) + self._rows(pictures)

    def _rows(self, prompts: list[Any]) -> Tensor:
        from vlm2rec.embedder.backbones.devices import batches_by_tokens

        found = torch.empty(len(prompts), self.shape.width, device=self.backbone.device)
        with torch.no_grad():
            for row in batches_by_tokens([len(prompt) for prompt in prompts], self.budget, padded=False):
                found[row] = self.backbone.encode([prompts[i] for i in row]).float()
        return found


def seconds(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Run `work` and return wall seconds and what it returned."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    found = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun, found


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return operations per second of a large matrix product."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        left @ right
    times = 10
    spent, _ = seconds(lambda: [left @ right for _ in range(times)], device)
    return times * 2 * side**3 / spent


def memory(device: torch.device) -> str:
    """Return the peak of GPU memory since the last measurement."""
    return f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if device.type == "cuda" else "-"


def compare_exports(model: Any, shape: Shape, count: int, device: torch.device) -> None:
    """Print items per second of every way."""
    items = draw(count, shape)
    few = max(4, min(64, count // 8))
    own = [len(text) - len(PREFIX) for text in items.texts]
    behind = len(image_ids(shape)) - len(IMAGE_PREFIX)
    language = sum(shape.language_operations(n, len(PREFIX)) for n in own)
    language += count * shape.language_operations(behind, len(IMAGE_PREFIX))
    everything = language + count * shape.vision_operations(shape.tokens)
    rate = product_rate(device, model.dtype)
    print(f"matrix product: {rate / 1e12:.2f} TFLOP/s; useful work: {everything / count / 1e12:.4f} TFLOP an item")
    naive(model, items, shape, 2)
    slow, expected = seconds(lambda: naive(model, items, shape, few), device)
    naive_memory = memory(device)
    padded(model, items, shape, min(32, count))
    middling, _ = seconds(lambda: padded(model, items, shape, count), device)
    padded_memory = memory(device)
    packed = Packed(model, shape)  # from here on the model has vlm2rec's attention
    packed.encode(items, packed.encode_images(items, min(64, count)))
    cold, found = seconds(lambda: packed.encode(items, packed.encode_images(items, count)), device)
    cold_memory = memory(device)
    known = packed.encode_images(items, count)
    warm, _ = seconds(lambda: packed.encode(items, known), device)
    worst = float(F.cosine_similarity(expected, found[:few], dim=1).min())
    print(f"{'':<14}{'items/s':>10}{'x naive':>9}{'MFU':>7}{'GiB':>7}")
    for name, each, work, held in (
        ("naive", slow / few, everything, naive_memory),
        ("padded", middling / count, everything, padded_memory),
        ("packed", cold / count, everything, cold_memory),
        ("packed, warm", warm / count, language, memory(device)),
    ):
        share = work / count / each / rate
        print(f"{name:<14}{1 / each:>10.1f}{slow / few / each:>9.2f}{share:>7.0%}{held:>7}")
    print(f"packed against naive: cosine at least {worst:.6f}; rows of {packed.budget} tokens")


def compare_steps(model: Any, shape: Shape, device: torch.device) -> None:
    """Print users per second of a training step: histories of ten items, batches of eight, with and without cache."""
    from peft import LoraConfig, get_peft_model

    from vlm2rec.embedder.backbones.backbone import ADAPTED_LAYERS, EncodedPrompt
    from vlm2rec.embedder.training.losses import VLM2RecLoss

    items = draw(USERS * (HISTORY + 1), shape)
    packed = Packed(model, shape)
    packed.backbone.share_prefixes(False)
    wrapped = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.2, target_modules=ADAPTED_LAYERS))
    wrapped.to(device)
    packed.backbone.language_model.train()
    language_model = packed.backbone.language_model
    enable = getattr(language_model, "activation_checkpointing_enable", language_model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    loss = VLM2RecLoss().to(device)
    optimiser = torch.optim.AdamW([p for p in (*wrapped.parameters(), *loss.parameters()) if p.requires_grad], 1e-5)
    users = [list(range(n * (HISTORY + 1), (n + 1) * (HISTORY + 1))) for n in range(USERS)]

    def step(known: list[Any]) -> float:
        def text(rows: list[int]) -> EncodedPrompt:
            own = [items.texts[row][len(PREFIX) :] for row in rows]
            return EncodedPrompt([*PREFIX, *(token for ids in own for token in [50, 51, *ids])])

        def picture(rows: list[int]) -> EncodedPrompt:
            return EncodedPrompt(image_ids(shape, len(rows)), tuple(known[row] for row in rows))

        histories, targets = [rows[:-1] for rows in users], [rows[-1:] for rows in users]
        vectors = [
            packed.backbone.encode([make(rows) for rows in side]).float()
            for side in (histories, targets)
            for make in (text, picture)
        ]
        parts = loss(*vectors, torch.arange(USERS, device=device))
        optimiser.zero_grad()
        parts.total.backward()
        optimiser.step()
        return float(parts.total.detach())

    known = packed.encode_images(items, len(items.texts))
    step(known)
    warm, value = seconds(lambda: step(known), device)
    warm_memory = memory(device)
    cold, _ = seconds(lambda: step(packed.encode_images(items, len(items.texts))), device)
    print(f"training step, {USERS} users with {HISTORY} images each, LoRA, checkpointing (loss {value:.4f}):")
    print(f"  vision known {USERS / warm:.2f} users/s ({warm_memory} GiB); looked at {USERS / cold:.2f} users/s")


def main() -> None:
    """Run everything on the GPU, or in a tiny shape on what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=512)
    parser.add_argument("--tiny", action="store_true", help="what a machine without a GPU does anyway")
    chosen = parser.parse_args()
    import_vlm2rec()
    warnings.simplefilter("ignore", FutureWarning)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tiny = chosen.tiny or device.type == "cpu"  # three billion weights on a processor would take hours
    shape, dtype = (TINY if tiny else Shape()), torch.float32 if device.type == "cpu" else torch.bfloat16
    items = min(chosen.items, 64) if tiny else chosen.items
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, {dtype}")
    model = build(shape, device, dtype)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count / 1e9:.3f} billion weights, {shape.side}² images, {shape.tokens} tokens each, {items} items")
    compare_exports(model, shape, items, device)
    compare_steps(model, shape, device)


if __name__ == "__main__":
    main()
