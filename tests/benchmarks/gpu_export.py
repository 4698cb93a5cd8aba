"""Figures of a GPU in one call of ten minutes: export, training step, memory, in the exact shape of Qwen2.5-VL-3B.

python tests/benchmarks/gpu_export.py [--items 512] [--seconds 540] [--tiny]     (vlm2rec need not be installed)

Needs torch, transformers, peft, pyarrow and Pillow; no model, no data, no polars, faiss or RecBole. Weights are random,
images are of 224² pixels (256 patches, 64 tokens), titles as long as those of shops. `--tiny` runs the same code in a
small shape, as a machine without a GPU does, to see that it works.

First it is shown that the vectors are right; if they are not, nothing is timed. Then

    naive                   one item at a time, the whole model, all hidden states
    padded                  batches of 32, padded; the model's own attention; without the language-model head
    sentence-transformers   its loop re-made: longest first, batches of 32, padded, every batch copied to the CPU
    packed, cold            vlm2rec: packed rows, shared prefix, last layer for last tokens
    packed, warm            the same, with what the vision tower says of the images known from an earlier export

MFU counts the operations of the prompts' own tokens (without prefix, padding and head) and of the vision tower, against
the rate of a large matrix product on the same device. A figure that was not measured is a reason in words: no memory,
no time, no GPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
ROWS = range(4, 13)  # powers of two: image prompts in the largest row
BATCHES = (8, 16, 32, 64, 128, 256)  # users in the largest batch
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
            t = hidden[torch.arange(len(texts), device=device), mask.sum(1) - 1]
            v = model.model(
                input_ids=picture,
                pixel_values=pixels,
                image_grid_thw=items.grid.expand(len(texts), 3).to(device),
                mm_token_type_ids=(picture == IMAGE).int(),
            ).last_hidden_state[:, -1]
        found.append(t.float() + v.float())
    return torch.cat(found)


def like_sentence_transformers(model: Any, items: Items, shape: Shape, count: int) -> Tensor:
    """Encode longest titles first, as `SentenceTransformer.encode` does, and copy every batch to the CPU."""
    order = sorted(range(count), key=lambda row: -len(items.texts[row]))
    chosen = Items([items.texts[row] for row in order], [items.patches[row] for row in order], items.grid)
    found = torch.empty(count, shape.width)
    for start in range(0, count, 32):
        rows = order[start : start + 32]
        part = Items(chosen.texts[start : start + 32], chosen.patches[start : start + 32], items.grid)
        found[rows] = padded(model, part, shape, len(rows)).cpu()
    return found


class Packed:
    """vlm2rec's own path, with token ids in place of a tokenizer."""

    def __init__(self, model: Any, shape: Shape) -> None:
        from vlm2rec.embedder.backbones import backbone
        from vlm2rec.embedder.backbones.families import FAMILIES

        tokenizer = types.SimpleNamespace(pad_token_id=PAD)
        family = FAMILIES["qwen2_5_vl"]
        processor = types.SimpleNamespace(tokenizer=tokenizer, image_token_id=IMAGE, family=family)
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
        from vlm2rec.embedder.backbones.devices import batches_by_tokens, onto

        found = torch.empty(len(prompts), self.shape.width, device=self.backbone.device)
        with torch.no_grad():
            for row in batches_by_tokens([len(prompt) for prompt in prompts], self.budget, padded=False):
                place = onto(self.backbone.device, torch.tensor(row))
                found.index_copy_(0, place, self.backbone.encode([prompts[i] for i in row]).float())
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


@dataclass
class Run:
    """The device, and the time that is left for measurements."""

    device: torch.device
    ends: float

    def time(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Return seconds and result of `work`.

        Raises:
            NotMeasuredError: no time is left, or the device has too little memory.
        """
        if time.perf_counter() > self.ends:
            raise NotMeasuredError("no time was left")
        try:
            return seconds(work, self.device)
        except torch.OutOfMemoryError as error:
            raise NotMeasuredError("out of memory") from error

    def require_gpu(self) -> None:
        """Raise `NotMeasuredError` on a CPU."""
        if self.device.type != "cuda":
            raise NotMeasuredError("no GPU")


class NotMeasuredError(Exception):
    """Why a figure is missing."""


def row(name: str, measure: Callable[[], str]) -> None:
    """Print a row of the table: the figure, or why there is none."""
    try:
        found = measure()
    except NotMeasuredError as reason:
        found = f"not measured: {reason}"
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print(f"{name:<34}{found}", flush=True)


def least_cosine(one: Tensor, other: Tensor) -> float:
    """Return the smallest cosine of two vectors of the same item."""
    return float(F.cosine_similarity(one.float().cpu(), other.float().cpu(), dim=1).min())


def require_right_vectors(model: Any, other: Any, shape: Shape, device: torch.device) -> None:
    """Print how near the vectors of all ways are, and exit if they are not the same.

    Args:
        model: stays as it is.
        other: has the same weights, and gets vlm2rec's attention.
        shape: of both.
        device: that of both.
    """
    from vlm2rec.embedder.backbones import packing

    items, few = draw(8, shape), 8
    expected = naive(model, items, shape, few)
    found = {"padded": padded(model, items, shape, few)}
    packed = Packed(other, shape)
    known = packed.encode_images(items, few)
    found["packed"] = packed.encode(items, known)
    width = shape.width // shape.heads
    works = packing._kernel_works(device, model.dtype, width)
    if works:
        usual = packing._kernel_works
        packing._kernel_works = lambda *_: False  # type: ignore[assignment]
        packed.backbone.forget_prefixes()
        found["packed, without the kernel"] = packed.encode(items, packed.encode_images(items, few))
        packing._kernel_works = usual
    worst = {name: least_cosine(vectors, expected) for name, vectors in found.items()}
    for name, cosine in worst.items():
        print(f"{'cosine to naive, ' + name:<44}{cosine:.6f}")
    print(f"torch's kernel for packed rows: {'used' if works else 'not used'}")
    least = 0.9999 if model.dtype == torch.float32 else 0.98
    if not min(worst.values()) > least:
        raise SystemExit(f"vectors differ (cosine below {least}): nothing is timed")


def compare_exports(model: Any, shape: Shape, count: int, run: Run) -> None:
    """Print items per second of every way."""
    items, device = draw(count, shape), run.device
    few = max(4, min(64, count // 8))
    own = [len(text) - len(PREFIX) for text in items.texts]
    behind = len(image_ids(shape)) - len(IMAGE_PREFIX)
    language = sum(shape.language_operations(n, len(PREFIX)) for n in own)
    language += count * shape.language_operations(behind, len(IMAGE_PREFIX))
    everything = language + count * shape.vision_operations(shape.tokens)
    rate = product_rate(device, model.dtype)
    print(f"matrix product: {rate / 1e12:.2f} TFLOP/s; useful work: {everything / count / 1e12:.4f} TFLOP an item")
    first: list[float] = []  # seconds an item of the first way

    def figure(work: Callable[[int], Any], number: int, operations: float, rehearsed: int) -> str:
        run.time(lambda: work(rehearsed))  # libraries choose their kernels
        spent, _ = run.time(lambda: work(number))
        first.append(spent / number)
        share = operations / count / (spent / number) / rate
        times = f"{first[0] / (spent / number):.2f} x the first"
        return f"{number / spent:10.1f} items/s {times:>18} {share:6.1%} MFU {memory(device):>6} GiB"

    row("naive", lambda: figure(lambda n: naive(model, items, shape, n), few, everything, 2))
    some = min(32, count)
    row("padded", lambda: figure(lambda n: padded(model, items, shape, n), count, everything, some))
    row(
        "sentence-transformers",
        lambda: figure(lambda n: like_sentence_transformers(model, items, shape, n), count, everything, some),
    )
    packed = Packed(model, shape)  # from here on the model has vlm2rec's attention

    def cold(number: int) -> Tensor:
        return packed.encode(items, packed.encode_images(items, number))

    row("packed, cold", lambda: figure(cold, count, everything, min(64, count)))

    def warm() -> str:
        _, known = run.time(lambda: packed.encode_images(items, count))
        return figure(lambda n: packed.encode(items, known[:n]), count, language, min(64, count))

    row("packed, warm", warm)
    print(f"rows of {packed.budget} tokens. Where the time of a cold item goes, in milliseconds, each part by itself:")
    row("  decode, one thread", lambda: f"{1e3 * run.time(lambda: decode(64))[0] / 64:10.3f}")
    row("  copy to the device", lambda: f"{1e3 * copied(items, count, run) / count:10.3f}")

    def tower() -> str:
        spent, _ = run.time(lambda: packed.encode_images(items, count))
        return f"{1e3 * spent / count:10.3f}"

    def layers() -> str:
        known = packed.encode_images(items, count)
        return f"{1e3 * run.time(lambda: packed.encode(items, known))[0] / count:10.3f}"

    row("  vision tower, its copy included", tower)
    row("  language model", layers)

    def wider() -> str:
        with wide_perceptrons(model):
            return figure(cold, count, everything, min(64, count))

    row("packed, cold, tower in even widths", wider)
    row("largest row of an export", lambda: largest_row(packed, shape, run))


@contextmanager
def wide_perceptrons(model: Any) -> Iterator[None]:
    """Pad the vision tower's perceptrons with zeros to a multiple of 64: the same function, of which 3,420 is none.

    Matrix products in half precision are fast where rows begin at multiples of 16 bytes; those of 3,420 numbers do not.
    """
    padded: list[tuple[Any, Tensor]] = []  # parameters, and what they were
    for block in model.model.visual.blocks:
        gate, up, down = (getattr(block.mlp, f"{name}_proj") for name in ("gate", "up", "down"))
        more = -gate.out_features % 64
        sides = [(down.weight, (0, more)), *((layer.weight, (0, 0, 0, more)) for layer in (gate, up))]
        for parameter, pad in (*sides, (gate.bias, (0, more)), (up.bias, (0, more))):
            padded.append((parameter, parameter.data))
            parameter.data = F.pad(parameter.data, pad)
    try:
        yield
    finally:
        for parameter, usual in padded:
            parameter.data = usual


def decode(count: int) -> None:
    """Read JPEG files of 1,000 pixels to 224, as an export's threads do before the image processor."""
    import io

    from PIL import Image

    from vlm2rec.embedder.backbones.images import decode as read

    content = io.BytesIO()
    noise = torch.randint(0, 255, (125, 125, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).resize((1000, 1000)).save(content, "JPEG")
    for _ in range(count):
        read(io.BytesIO(content.getvalue()), 224 * 224).resize((224, 224))


def copied(items: Items, count: int, run: Run) -> float:
    """Return the seconds that copies of all patches take, as bytes, 64 images at a time."""
    run.require_gpu()
    from vlm2rec.embedder.backbones.devices import onto

    batch = torch.cat(items.patches[:64]).to(torch.uint8)
    spent, _ = run.time(lambda: [onto(run.device, batch) for _ in range(max(1, count // 64))])
    return spent / max(1, count // 64) * count / 64


def largest_row(packed: Packed, shape: Shape, run: Run) -> str:
    """Double the tokens of a packed row of image prompts until the memory ends."""
    run.require_gpu()
    (image,) = packed.encode_images(draw(1, shape), 1)
    from vlm2rec.embedder.backbones.backbone import EncodedPrompt

    prompt, tokens = EncodedPrompt(image_ids(shape), (image,)), 0
    for power in ROWS:
        try:
            with torch.no_grad():
                run.time(lambda number=1 << power: packed.backbone.encode([prompt] * number))
        except NotMeasuredError as reason:
            if not tokens:
                raise
            return f"{tokens:,} tokens fit, twice as many: {reason}"
        tokens = len(prompt) << power
    return f"at least {tokens:,} tokens"


def compare_steps(model: Any, shape: Shape, run: Run) -> None:
    """Print users per second of a training step: histories of ten items, LoRA, checkpointing."""
    from peft import LoraConfig, get_peft_model

    from vlm2rec.embedder.backbones.backbone import ADAPTED_LAYERS, EncodedPrompt
    from vlm2rec.embedder.training.losses import VLM2RecLoss

    device = run.device
    packed = Packed(model, shape)
    packed.backbone.share_prefixes(False)
    wrapped = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.2, target_modules=ADAPTED_LAYERS))
    wrapped.to(device)
    packed.backbone.language_model.train()
    language_model = packed.backbone.language_model
    enable = getattr(language_model, "activation_checkpointing_enable", None)
    (enable or language_model.gradient_checkpointing_enable)({"use_reentrant": False})
    loss = VLM2RecLoss().to(device)
    optimiser = torch.optim.AdamW([p for p in (*wrapped.parameters(), *loss.parameters()) if p.requires_grad], 1e-5)

    def step(items: Items, users: int, known: list[Any]) -> float:
        def text(rows: list[int]) -> EncodedPrompt:
            own = [items.texts[row][len(PREFIX) :] for row in rows]
            return EncodedPrompt([*PREFIX, *(token for ids in own for token in [50, 51, *ids])])

        def picture(rows: list[int]) -> EncodedPrompt:
            return EncodedPrompt(image_ids(shape, len(rows)), tuple(known[row] for row in rows))

        every = [list(range(n * (HISTORY + 1), (n + 1) * (HISTORY + 1))) for n in range(users)]
        vectors = [
            packed.backbone.encode([make(rows) for rows in side]).float()
            for side in ([rows[:-1] for rows in every], [rows[-1:] for rows in every])
            for make in (text, picture)
        ]
        parts = loss(*vectors, torch.arange(users, device=device))
        optimiser.zero_grad()
        parts.total.backward()
        optimiser.step()
        return float(parts.total.detach())

    items = draw(USERS * (HISTORY + 1), shape)
    known = packed.encode_images(items, len(items.texts))

    def figure(look: bool) -> str:
        def work() -> float:
            return step(items, USERS, packed.encode_images(items, len(items.texts)) if look else known)

        run.time(work)
        spent, value = run.time(work)
        return f"{USERS / spent:10.2f} users/s {memory(device):>6} GiB (loss {value:.4f})"

    print(f"training step, {USERS} users with {HISTORY} images each:")
    row("  vision known", lambda: figure(False))
    row("  images looked at", lambda: figure(True))

    def largest() -> str:
        run.require_gpu()
        users = 0
        for number in BATCHES:
            more = draw(number * (HISTORY + 1), shape)
            try:
                run.time(lambda: step(more, number, known[:1] * len(more.texts)))  # noqa: B023 - run at once
            except NotMeasuredError as reason:
                if not users:
                    raise
                return f"{users} users fit, {number}: {reason}"
            users = number
        return f"at least {users} users"

    row("  largest batch", largest)


def main() -> None:
    """Run everything on the GPU, or in a tiny shape on what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=540, help="after which nothing new is measured")
    parser.add_argument("--tiny", action="store_true", help="what a machine without a GPU does anyway")
    chosen = parser.parse_args()
    ends = time.perf_counter() + chosen.seconds
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
    require_right_vectors(model, build(shape, device, dtype), shape, device)
    run = Run(device, ends)
    compare_exports(model, shape, items, run)
    compare_steps(model, shape, run)


if __name__ == "__main__":
    main()
