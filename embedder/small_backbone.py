"""A small Qwen2.5-VL that understands one catalogue: built and trained in minutes, loaded like any other model folder.

It is for the demo, for tests and for trying settings out; it knows nothing outside its catalogue. An encoder reads
the last token of a prompt that asks for one word, so that is what is trained: at that token, cross-entropy against
the words of the items' captions, every one as likely as the others. In expectation this is next-token training on a
word drawn at random. What the last hidden state has to tell is then what the words tell.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from vlm2rec.embedder.backbone import Backbone, EncodedPrompt, ImageFeatures
from vlm2rec.embedder.errors import ConfigError, DataError
from vlm2rec.embedder.images import ImageError, open_image
from vlm2rec.embedder.prompts import (
    IMAGE_INSTRUCTION,
    ITEM_INSTRUCTION,
    TEXT_INSTRUCTION,
    Prompt,
    image_prompt,
    item_prompt,
    text_prompt,
)

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEAD_SIZE = 32
AUX=0
TEXTS=4
VDEPTH = 3
INIT = 0.02
B2 = 0.98
WD = 0.05
PATCH = 14  # pixels; an image token is 2 × 2 patches

# What a training step asks for: kind of prompt, and items in it.
KINDS = {"text": 0.35, "image": 0.5, "item": 0.15}
ITEMS_IN_A_PROMPT = {1: 0.7, 2: 0.1, 4: 0.1, 10: 0.1}
CHAT_SHARE = 0.15
WARMUP_STEPS = 40
HELD_OUT = 0.1
LARGEST_TEST = 256  # held-out items that are scored


@dataclass(frozen=True)
class SmallBackboneSettings:
    """Shape and training of a small backbone."""

    hidden_size: int = 128
    layers: int = 4
    vocabulary: int = 4000
    max_pixels: int = 112 * 112
    minutes: float = 2.0
    max_steps: int = 1500
    batch_size: int = 32
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.hidden_size % HEAD_SIZE:
            raise ConfigError(
                f"hidden_size is {self.hidden_size}", f"a multiple of {HEAD_SIZE}", "choose 64, 96, 128, 192 or 256"
            )
        if self.vocabulary < 512:
            raise ConfigError(
                f"vocabulary is {self.vocabulary}",
                "at least 512: 256 bytes, the special tokens and some words",
                "raise --vocabulary",
            )
        if self.max_pixels < (2 * PATCH) ** 2:
            raise ConfigError(
                f"max_pixels is {self.max_pixels}",
                f"at least {(2 * PATCH) ** 2}, one image token",
                "raise --max-pixels",
            )


@dataclass(frozen=True)
class CaptionedItem:
    """One item to learn from."""

    title: str
    words: tuple[str, ...]  # distinct words of its caption
    picture: np.ndarray | None = None  # (H, W, 3) uint8, already of the size the processor gives it


@dataclass(frozen=True)
class Score:
    """How well prompts of single items are answered: mean loss, and how often the likeliest word is one of the item's.

    `majority` is that share for the one word that suits most items, whatever the prompt.
    """

    loss: float
    accuracy: float
    majority: float
    items: int


# --- words --------------------------------------------------------------------------------------------------

_WORD = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*")


def caption_words(captions: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the distinct words of each caption, in order, without those that stand in more than half of all captions.

    Words end at white space and punctuation (`Adventure|Sci-Fi` holds two). Where every word of a caption is so
    common, it keeps them all.
    """
    split = [tuple(dict.fromkeys(_WORD.findall(caption))) for caption in captions]
    counts = Counter(word for words in split for word in words)
    common = {word for word, count in counts.items() if count > max(len(captions) / 2, 1)}
    return [tuple(word for word in words if word not in common) or words for words in split]


def train_tokenizer(titles: Sequence[str], words: Sequence[Sequence[str]], vocabulary: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer that cuts text as Qwen's does, of at most `vocabulary` tokens.

    The prompts' own words and the frequent caption words, each with the space before it, become whole tokens as far
    as the vocabulary reaches: an answer is then one token.
    """
    qwen = transformers.Qwen2Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = qwen.normalizer, qwen.pre_tokenizer
    tokenizer.decoder, tokenizer.post_processor = qwen.decoder, qwen.post_processor
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    prompts = [TEXT_INSTRUCTION, IMAGE_INSTRUCTION, ITEM_INSTRUCTION, "<|im_start|>user\nassistant\n"]
    answers = [" " + " ".join(of_one_item) for of_one_item in words]
    texts = [*titles, *answers * 4, *prompts * max(10, len(titles) // 10)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def answer_tokens(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """Return the first token of each word as it stands after a space; two words may share one."""
    return [tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in words]


# --- the model folder ---------------------------------------------------------------------------------------


def write_random_model(folder: Path, tokenizer: Tokenizer, settings: SmallBackboneSettings) -> None:
    """Write an ordinary Qwen2.5-VL model folder with random weights drawn from the seed."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "bos_token": None,
            "model_max_length": 4096,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    _write_json(folder / "preprocessor_config.json", _image_processor(settings.max_pixels))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = transformers.Qwen2_5_VLForConditionalGeneration(_config(tokenizer.get_vocab(), settings))
    save_weights(model, folder)


def save_weights(model: Any, folder: Path) -> None:
    """Write config.json and safetensors weights, without transformers' own progress bars."""
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _config(ids: dict[str, int], settings: SmallBackboneSettings) -> Any:
    width = settings.hidden_size
    heads = width // HEAD_SIZE
    quarter = HEAD_SIZE // 8
    text = {
        "vocab_size": len(ids),
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2 if heads % 2 == 0 else heads,
        "max_position_embeddings": 4096,
        "initializer_range": INIT,
        # time, height and width share the rotary frequencies as in the large models: 1/4, 3/8, 3/8
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [quarter, 3 * quarter // 2, 3 * quarter // 2],
        },
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    vision = {
        "depth": VDEPTH,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_heads": heads,
        "out_hidden_size": width,
        "patch_size": PATCH,
        "window_size": 112,
        "fullatt_block_indexes": [VDEPTH - 1],
        "initializer_range": INIT,
    }
    return transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def _image_processor(max_pixels: int) -> dict[str, Any]:
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": min(56 * 56, max_pixels),
        "max_pixels": max_pixels,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# --- pictures -----------------------------------------------------------------------------------------------


def read_picture(root: Path, relative: str, processor: Any) -> np.ndarray:
    """Return an image at the size the processor will give it, (H, W, 3) uint8, so that training decodes it once.

    Raises:
        ImageError: the image cannot be used.
    """
    image = open_image(root, relative, int(processor.image_processor.size["longest_edge"]))
    _, rows, columns = processor.image_processor(images=[image])["image_grid_thw"][0]
    size = (int(columns) * PATCH, int(rows) * PATCH)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def moved(picture: np.ndarray, random: np.random.Generator) -> Image.Image:
    """Return the picture shifted by up to a twelfth of its sides and mirrored half the time.

    A few hundred pictures are learnt by heart in a minute; moving them makes the model look at what is in them.
    """
    down, right = (int(random.integers(-side // 12, side // 12 + 1)) for side in picture.shape[:2])
    rows = np.clip(np.arange(picture.shape[0]) - down, 0, picture.shape[0] - 1)
    columns = np.clip(np.arange(picture.shape[1]) - right, 0, picture.shape[1] - 1)
    if random.random() < 0.5:
        columns = columns[::-1]
    return Image.fromarray(picture[rows[:, None], columns])


# --- training -----------------------------------------------------------------------------------------------


class Lesson:
    """A backbone in training on captioned items."""

    def __init__(self, backbone: Backbone, items: Sequence[CaptionedItem]) -> None:
        self.backbone = backbone
        self.chat = Backbone(backbone.model, backbone.processor, "chat", backbone.max_title_tokens)
        self.items = items
        self.titles = [backbone.prepare_title(item.title)[0] for item in items]
        self.tokens = [answer_tokens(backbone.tokenizer, item.words) for item in items]
        self.head = backbone.model.get_output_embeddings()

    def target(self, rows: Sequence[int]) -> Tensor:
        """Return the answer to a prompt of items `rows`: every word of an item equally likely, items equal, (V,)."""
        target = torch.zeros(self.head.weight.shape[0])
        for row in rows:
            share = torch.full((len(self.tokens[row]),), 1.0 / (len(rows) * len(self.tokens[row])))
            target.index_add_(0, torch.tensor(self.tokens[row]), share)
        return target

    def logits(self, kind: str, rows: Sequence[Sequence[int]], pictures: Sequence[Image.Image], chat: bool) -> Tensor:
        """Return the scores of the answer's first token for prompts of items `rows`, (B, V)."""
        backbone = self.chat if chat else self.backbone
        self.seen = self._look(pictures) if pictures else []
        seen = iter(self.seen)
        prompts = []
        for of_one_prompt in rows:
            images = [next(seen) for _ in of_one_prompt] if kind != "text" else []
            prompts.append(backbone.tokenize(self._prompt(kind, of_one_prompt), images))
        return self.head(backbone.encode(prompts))

    def _prompt(self, kind: str, rows: Sequence[int]) -> Prompt:
        titles = [self.titles[row] for row in rows]
        return {"text": text_prompt, "item": item_prompt}[kind](titles) if kind != "image" else image_prompt(len(rows))

    def _look(self, pictures: Sequence[Image.Image]) -> list[ImageFeatures]:
        """Run the vision tower with gradients, unlike `Backbone.look`."""
        inputs = self.backbone.processor.image_processor(images=list(pictures), return_tensors="pt")
        output = self.backbone.body.get_image_features(
            pixel_values=inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"], return_dict=True
        )
        grids = inputs["image_grid_thw"]
        return [ImageFeatures(tokens, (), grids[i]) for i, tokens in enumerate(output.pooler_output)]


@dataclass(frozen=True)
class Step:
    """One step of the training: which prompts are asked."""

    kind: str
    rows: list[list[int]]  # items of each prompt
    chat: bool


def draw_step(random: np.random.Generator, rows: np.ndarray, pictured: np.ndarray, batch_size: int) -> Step:
    """Return a step of `batch_size` items in all, in prompts of one kind and length."""
    kind = str(random.choice(list(KINDS), p=list(KINDS.values())))
    length = int(random.choice(list(ITEMS_IN_A_PROMPT), p=list(ITEMS_IN_A_PROMPT.values())))
    pool = rows if kind == "text" else pictured
    prompts = max(1, (batch_size * (TEXTS if kind == "text" else 1)) // length)
    chosen = random.choice(pool, size=(prompts, length), replace=prompts * length > len(pool))
    return Step(kind, chosen.tolist(), bool(random.random() < CHAT_SHARE))


def train(lesson, items, rows, settings, watch):
    random = np.random.default_rng(settings.seed)
    pictured = np.array([r for r in rows if items[r].picture is not None])
    model = lesson.backbone.model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, B2), weight_decay=WD)
    start = time.process_time()
    for step in range(settings.max_steps):
        elapsed = (time.process_time() - start) / (60 * settings.minutes)
        if elapsed >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate(step, settings.max_steps, elapsed)
        s = draw_step(random, rows, pictured, settings.batch_size)
        pictures = [] if s.kind == "text" else [moved(items[r].picture, random) for p in s.rows for r in p]
        logits = lesson.logits(s.kind, s.rows, pictures, s.chat)
        target = torch.stack([lesson.target(p) for p in s.rows])
        loss = F.cross_entropy(logits, target)
        main = loss
        if AUX and lesson.seen:
            pooled = torch.stack([f.tokens.mean(0) for f in lesson.seen])
            pooled = F.rms_norm(pooled, pooled.shape[-1:])
            t2 = torch.stack([lesson.target([r]) for p in s.rows for r in p])
            loss = loss + AUX * F.cross_entropy(lesson.head(pooled), t2)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        watch(step, s.kind, float(main.detach()))
    return step


def rate(step, steps, elapsed):
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return warm * max(cosine, 0.02) * min(1.0, (1 - elapsed) / 0.3)


@torch.no_grad()
def score(lesson, rows, kind):
    losses, hits = [], []
    for i in range(0, len(rows), 32):
        part = rows[i : i + 32]
        pics = [] if kind == "text" else [Image.fromarray(lesson.items[r].picture) for r in part]
        logits = lesson.logits(kind, [[r] for r in part], pics, False)
        target = torch.stack([lesson.target([r]) for r in part])
        losses.append(F.cross_entropy(logits, target, reduction="none"))
        hits.append(target.gather(1, logits.argmax(1, keepdim=True))[:, 0] > 0)
    return torch.cat(losses).mean().item(), torch.cat(hits).float().mean().item()
