"""Peak memory of exports and training steps on GPUs, computed: real code on a fake card, without values.

PYTHONPATH=tests python tests/benchmarks/gpu_memory.py [--measure]     (from the repository)

The models have the published sizes and no values; every tensor that the code makes on the card is counted while it
lives. Attention counts as torch's fused kernels do, which keep no scores. What a GPU needs beyond that, its context and
the allocator's gaps, is not counted: about a GiB and a tenth. `--measure` runs the same code, with random weights, on
the GPU of this machine, and prints beside each peak what the driver says is in use then, with context and gaps.
"""

from __future__ import annotations

import argparse
import gc
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import transformers
from fake_cuda import Card, fake_cuda
from gpu_export import IMAGE, PAD, PREFIX, VISION_END, VISION_START, image_ids
from peft import LoraConfig, get_peft_model
from qwen_shape import Shape

from vlm2rec.embedder.backbones import packing
from vlm2rec.embedder.backbones.backbone import ADAPTED_LAYERS, Backbone, EncodedPrompt, Patches, pick_token_budget
from vlm2rec.embedder.backbones.families import FAMILIES
from vlm2rec.embedder.memory import CARDS
from vlm2rec.embedder.training.losses import VLM2RecLoss

GIB = 2**30
IDS = {"image": IMAGE, "video": 5, "vision_start": VISION_START, "vision_end": VISION_END, "eos": None, "pad": PAD}
QWEN_7B = Shape(3584, 28, 18944, 28, 4, 152_064)


def qwen3_vl_2b() -> Any:
    """Return the config of Qwen3-VL-Embedding-2B."""
    text = {"hidden_size": 2048, "num_hidden_layers": 28, "intermediate_size": 6144, "num_attention_heads": 16}
    text |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "pad_token_id": PAD}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
    text["rope_parameters"]["mrope_interleaved"] = True
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2048}
    vision["deepstack_visual_indexes"] = [5, 11, 17]
    named = {f"{name}_token_id": IDS[name] for name in ("image", "video", "vision_start", "vision_end")}
    return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **named)


def model_of(name: str) -> tuple[Any, int, int]:
    """Return a model on the card, the numbers of a patch, and its side in pixels."""
    kind = transformers.Qwen3VLForConditionalGeneration
    if name.startswith("Qwen2.5"):
        kind = transformers.Qwen2_5_VLForConditionalGeneration
        config = (Shape() if "3B" in name else QWEN_7B).config(IDS)
        config.tie_word_embeddings = "3B" in name
    else:
        config = qwen3_vl_2b()
    with torch.device("cuda"):
        model = kind._from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    side = config.vision_config.patch_size
    return model.requires_grad_(False).eval(), 3 * 2 * side * side, side


class Gpu:
    """The GPU of this machine, asked what a fake card counts."""

    @property
    def held(self) -> int:
        """Bytes of living tensors."""
        return torch.cuda.memory_allocated()

    @property
    def peak(self) -> int:
        """Most of them since `forget`."""
        return torch.cuda.max_memory_allocated()

    def forget(self) -> None:
        """Count from zero; what is held stays held."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def this_gpu() -> Iterator[Gpu]:
    """Run on the GPU of this machine; the driver's figure is printed at the end, before anything is freed."""
    gpu = Gpu()
    gpu.forget()
    yield gpu
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    print(f"    the driver: {(total - free) / GIB:.1f} GiB in use", flush=True)
    gc.collect()
    torch.cuda.empty_cache()


class Rehearsed:
    """A backbone of which every image has 64 tokens."""

    def __init__(self, name: str) -> None:
        self.model, self.numbers, _ = model_of(name)
        family = FAMILIES["qwen2_5_vl" if name.startswith("Qwen2.5") else "qwen3_vl"]
        tokenizer = types.SimpleNamespace(pad_token_id=PAD)
        processor = types.SimpleNamespace(tokenizer=tokenizer, image_token_id=IMAGE, family=family)
        self.backbone = Backbone(self.model, processor)

    def images(self, count: int) -> list[Any]:
        """Return what the tower says of `count` images of 256 patches."""
        grid = torch.tensor([[1, 16, 16]])
        return self.backbone.encode_images([Patches(torch.zeros(256, self.numbers), grid) for _ in range(count)])


def export(name: str, place: AbstractContextManager[Card | Gpu]) -> tuple[float, float, int]:
    """Return the GiB of weights, the peak of an export, and the tokens of its rows on a card."""
    with place as card:
        rehearsed = Rehearsed(name)
        backbone = rehearsed.backbone
        backbone.share_prefixes()
        weights = card.held
        budget = pick_token_budget(backbone)
        card.forget()
        known = rehearsed.images(128)  # as many as an export encodes together
        prompt = image_ids(Shape())
        with torch.no_grad():
            backbone.encode([EncodedPrompt(prompt, (known[0],), 0)] * max(1, budget // len(prompt)))
        return weights / GIB, card.peak / GIB, budget


def step(name: str, place: AbstractContextManager[Card | Gpu], users: int, history: int, checkpointing: bool) -> float:
    """Return the peak GiB of a training step."""
    with place as card:
        rehearsed = Rehearsed(name)
        backbone = rehearsed.backbone
        wrapped = get_peft_model(
            rehearsed.model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.2, target_modules=ADAPTED_LAYERS)
        ).to("cuda")
        language_model = backbone.language_model.train()
        if checkpointing:
            enable = getattr(language_model, "activation_checkpointing_enable", None)
            (enable or language_model.gradient_checkpointing_enable)({"use_reentrant": False})
        loss = VLM2RecLoss().to("cuda")
        optimiser = torch.optim.AdamW([p for p in (*wrapped.parameters(), *loss.parameters()) if p.requires_grad], 1e-5)
        title = list(range(1000, 1020))
        known = rehearsed.images(64) * (users * (history + 1) // 64 + 1)
        card.forget()
        for _ in range(2):  # the optimiser's state is there from the second step on
            vectors = []
            for items in (history, 1):
                text = EncodedPrompt([*PREFIX, *(title * items)])
                picture = EncodedPrompt(image_ids(Shape(), items), tuple(known[:items]))
                vectors += [backbone.encode([prompt] * users).float() for prompt in (text, picture)]
            total = loss(*vectors, torch.arange(users, device="cuda")).total
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
            del vectors, total
        return card.peak / GIB


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="on the GPU of this machine instead of a fake card")
    measured = parser.parse_args().measure
    if measured:
        name, total = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1] / GIB
        print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}")
        cards = {name: round(total, 1)}
    else:
        cards = CARDS
        packing._kernel_works = lambda *_: True  # type: ignore[assignment]  # it compares values; there are none
    for name in ("Qwen3-VL-Embedding-2B", "Qwen2.5-VL-3B", "Qwen2.5-VL-7B"):
        for card, total in cards.items():
            place = this_gpu() if measured else fake_cuda(values=False, total=int(total * GIB))
            weights, peak, budget = export(name, place)
            row = f"weights {weights:.1f}, peak {peak:.1f} of {total} GiB, rows of {budget:,} tokens"
            print(f"{name}, export on {card}: {row}", flush=True)
        for users, checkpointing in ((1, True), (8, True), (32, True), (1, False)):
            place = this_gpu() if measured else fake_cuda(values=False)
            peak = step(name, place, users, 10, checkpointing)
            kept = "with" if checkpointing else "without"
            print(f"{name}, step of {users} users, {kept} checkpointing: {peak:.1f} GiB", flush=True)


if __name__ == "__main__":
    main()
