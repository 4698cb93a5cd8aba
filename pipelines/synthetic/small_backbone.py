"""A small Qwen2.5-VL that understands one catalogue: built and trained in minutes, loaded like any other model folder.

It is for the demo, for tests and for trying settings out; it knows nothing outside its catalogue. An encoder reads
the last token of a prompt that asks for one word, and training uses the same token. The loss there is cross-entropy
against the words of the items' captions, all with equal probability. In expectation this is next-token training on a
randomly drawn word. The last hidden state therefore learns what the words say.

The vision tower starts from random weights too, and through the language model hardly any gradient reaches it in a few
hundred steps. So a second loss makes the mean of an image's tokens predict the words, with the same output matrix.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
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

from vlm2rec.embedder.backbones.backbone import Backbone, ImageFeatures
from vlm2rec.embedder.backbones.devices import quiet
from vlm2rec.embedder.backbones.images import open_image
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ConfigError
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
VISION_LAYERS = 2
PATCH = 14  # pixels; an image token is 2 × 2 patches
# Much wider than the usual 0.02. At this width and depth, and with tied embeddings, small weights would spend a third
# of the training on growing.
WEIGHT_SPREAD = 0.09

# Shares of the training steps by kind of prompt, and by items in a prompt. Images are slower to learn than titles.
KINDS = {"text": 0.25, "image": 0.6, "item": 0.15}
ITEMS_IN_A_PROMPT = {1: 0.8, 2: 0.1, 4: 0.05, 10: 0.05}
TEXTS_PER_IMAGE = 4  # a text prompt costs a fraction of an image prompt, so a step takes more of them
CHAT_SHARE = 0.15
WARMUP_STEPS = 40
LAST_RATE = 0.02  # share of the learning rate in the last step
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.05
HELD_OUT = 0.1
LARGEST_TEST = 256  # held-out items that are scored
SCORED_AT_ONCE = 32
PROVENANCE_FILE = "vlm2rec.json"
WRITTEN_BY = "vlm2rec make-backbone"
MODEL_FILES = (
    *(
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
    ),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", PROVENANCE_FILE),
)
"""Every file that a model folder may hold."""


@dataclass(frozen=True)
class SmallBackboneSettings:
    """Shape and training of a small backbone."""

    hidden_size: int = 128
    layers: int = 4
    vocabulary: int = 4000
    max_pixels: int = 84 * 84
    minutes: float = 2.5
    max_steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 1e-3
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
    """One training item."""

    title: str
    words: tuple[str, ...]  # distinct words of its caption
    picture: np.ndarray | None = None  # (H, W, 3) uint8, already at the size that the processor gives it


@dataclass(frozen=True)
class Score:
    """The answers to prompts of single items: mean loss, and how often the likeliest word is one of the item's.

    `majority` is this share if the answer is always the one word that suits most items.
    """

    loss: float
    accuracy: float
    majority: float
    items: int


@dataclass(frozen=True)
class Training:
    """The result of a training; a score is None if no item could be held out for it."""

    steps: int
    seconds: float
    text: Score | None
    image: Score | None


# --- words --------------------------------------------------------------------------------------------------

_WORD = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*")


def caption_words(captions: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the distinct words of each caption, in order, without those in more than half of all captions.

    Words end at white space and punctuation (`Adventure|Sci-Fi` has two). A caption whose words are all so common keeps
    them all.
    """
    split = [tuple(dict.fromkeys(_WORD.findall(caption))) for caption in captions]
    counts = Counter(word for words in split for word in words)
    common = {word for word, count in counts.items() if count > max(len(captions) / 2, 1)}
    return [tuple(word for word in words if word not in common) or words for words in split]


def train_tokenizer(titles: Sequence[str], words: Sequence[Sequence[str]], vocabulary: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer that splits text as Qwen's does, of at most `vocabulary` tokens.

    The prompts' own words and the frequent caption words, each with the space before it, become whole tokens as far as
    the vocabulary allows. So an answer is one token.
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
    """Return the first token of each word when it follows a space; two words may share one.

    Qwen's tokenizer separates the space from a number, and a space carries no meaning: numbers count only if there is
    no word.
    """
    first = [tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in words]
    return [token for token in first if tokenizer.decode([token]).strip()] or first


# --- the model folder ---------------------------------------------------------------------------------------


def write_random_model(folder: Path, tokenizer: Tokenizer, settings: SmallBackboneSettings) -> None:
    """Write an ordinary Qwen2.5-VL model folder with random weights drawn from the seed."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    schema.write_json(
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
    schema.write_json(folder / "preprocessor_config.json", _image_processor(settings.max_pixels))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = transformers.Qwen2_5_VLForConditionalGeneration(_config(tokenizer.get_vocab(), settings))
    save_weights(model, folder)


def save_weights(model: Any, folder: Path) -> None:
    """Write config.json and safetensors weights, without transformers' own progress bars."""
    with quiet():
        model.save_pretrained(folder)


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
        "initializer_range": WEIGHT_SPREAD,
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
        "depth": VISION_LAYERS,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_heads": heads,
        "out_hidden_size": width,
        "patch_size": PATCH,
        "window_size": 112,
        "fullatt_block_indexes": [VISION_LAYERS - 1],
        "initializer_range": WEIGHT_SPREAD,
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


# --- pictures -----------------------------------------------------------------------------------------------


def read_picture(root: Path, relative: str, processor: Any) -> np.ndarray:
    """Return an image at the size that the processor will give it, (H, W, 3) uint8, so that it is decoded only once.

    Raises:
        ImageError: the image cannot be used.
    """
    image = open_image(root, relative, int(processor.image_processor.size["longest_edge"]))
    _, rows, columns = processor.image_processor(images=[image])["image_grid_thw"][0]
    size = (int(columns) * PATCH, int(rows) * PATCH)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def moved(picture: np.ndarray, random: np.random.Generator) -> Image.Image:
    """Return the picture shifted by up to a twelfth of its sides and mirrored half the time.

    The model would memorise a few hundred pictures in a minute; moving them makes it learn their content.
    """
    down, right = (int(random.integers(-side // 12, side // 12 + 1)) for side in picture.shape[:2])
    rows = np.clip(np.arange(picture.shape[0]) - down, 0, picture.shape[0] - 1)
    columns = np.clip(np.arange(picture.shape[1]) - right, 0, picture.shape[1] - 1)
    if random.random() < 0.5:
        columns = columns[::-1]
    return Image.fromarray(picture[rows[:, None], columns])


# --- training -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """The prompts of one training step."""

    kind: str  # of KINDS
    rows: list[list[int]]  # items of each prompt
    chat: bool


Watch = Callable[[int, float], None]
"""Called after each step with the steps done and the step's loss."""


class Lesson:
    """The training of a backbone on captioned items. The model stays in evaluation mode: it has no dropout."""

    def __init__(self, backbone: Backbone, items: Sequence[CaptionedItem]) -> None:
        self.backbone = backbone
        self.chat = Backbone(backbone.model, backbone.processor, "chat", backbone.max_title_tokens)
        self.items = items
        self.titles = [backbone.prepare_title(item.title)[0] for item in items]
        self.tokens = [answer_tokens(backbone.tokenizer, item.words) for item in items]
        self.head: Any = backbone.model.get_output_embeddings()

    def target(self, rows: Sequence[int]) -> Tensor:
        """Return the targets of a prompt of items `rows`, (V,): the items equally likely, and the words of each."""
        target = torch.zeros(self.head.weight.shape[0])
        for row in rows:
            share = torch.full((len(self.tokens[row]),), 1.0 / (len(rows) * len(self.tokens[row])))
            target.index_add_(0, torch.tensor(self.tokens[row]), share)
        return target

    def targets(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Return the target distributions for several prompts, (B, V)."""
        return torch.stack([self.target(rows) for rows in prompts])

    def loss(self, step: Step, pictures: Sequence[Image.Image]) -> Tensor:
        """Return the loss of one step, a scalar: of the answers, plus that of the image tokens if there are any."""
        images = self.backbone.run_vision_tower(pictures) if pictures else []
        loss = F.cross_entropy(self._logits(step, images), self.targets(step.rows))
        if images:
            of_images = torch.stack([image.tokens.mean(dim=0) for image in images])  # (images, d)
            of_images = F.rms_norm(of_images, of_images.shape[-1:])
            own_words = self.targets([[row] for rows in step.rows for row in rows])
            loss = loss + F.cross_entropy(self.head(of_images), own_words)
        return loss

    @torch.no_grad()
    def score(self, rows: Sequence[int], kind: str, majority_token: int) -> Score | None:
        """Score single-item prompts of the items `rows`, in raw mode; None if there is no item."""
        losses, hits, majority = [], [], []
        for start in range(0, len(rows), SCORED_AT_ONCE):
            step = Step(kind, [[row] for row in rows[start : start + SCORED_AT_ONCE]], chat=False)
            pictures = [] if kind == "text" else [self._still(row) for (row,) in step.rows]
            logits = self._logits(step, self.backbone.run_vision_tower(pictures) if pictures else [])
            targets = self.targets(step.rows)
            losses.append(F.cross_entropy(logits, targets, reduction="none"))
            hits.append(targets.gather(1, logits.argmax(dim=1, keepdim=True))[:, 0] > 0)
            majority.append(targets[:, majority_token] > 0)
        if not losses:
            return None
        loss, accuracy, common = (torch.cat(values).float().mean().item() for values in (losses, hits, majority))
        return Score(loss, accuracy, common, items=len(rows))

    def _logits(self, step: Step, images: Sequence[ImageFeatures]) -> Tensor:
        """Return the logits of each answer's first token, (B, V)."""
        backbone = self.chat if step.chat else self.backbone
        left = iter(images)
        prompts = []
        for rows in step.rows:
            of_prompt = [] if step.kind == "text" else [next(left) for _ in rows]
            prompts.append(backbone.tokenize(self._prompt(step.kind, rows), of_prompt))
        return torch.as_tensor(self.head(backbone.encode(prompts)))

    def _prompt(self, kind: str, rows: Sequence[int]) -> Prompt:
        if kind == "image":
            return image_prompt(len(rows))
        titles = [self.titles[row] for row in rows]
        return text_prompt(titles) if kind == "text" else item_prompt(titles)

    def _still(self, row: int) -> Image.Image:
        picture = self.items[row].picture
        assert picture is not None
        return Image.fromarray(picture)


def train(
    backbone: Backbone, items: Sequence[CaptionedItem], settings: SmallBackboneSettings, watch: Watch | None = None
) -> Training:
    """Train every weight of a small backbone in place, on the CPU, and score it on a held-out tenth of the items.

    The learning rate warms up, then falls by a cosine over `max_steps`, or faster if the time runs out first. Only a
    training that ends by `max_steps` gives the same weights each time.

    Args:
        backbone: a backbone from `Backbone.load`, float32 on the CPU.
        items: at least one with words; items without a picture are used with their titles only.
        settings: the settings of the training.
        watch: called after every step.
    """
    random = np.random.default_rng(settings.seed)
    lesson = Lesson(backbone, items)
    order = random.permutation(len(items))
    tested = order[: int(HELD_OUT * len(items))]
    learnt = order[len(tested) :]
    started = time.monotonic()
    model = backbone.model.requires_grad_(True)
    steps = _train(lesson, learnt, settings, random, watch or (lambda step, loss: None))
    model.requires_grad_(False)
    counts = Counter(token for row in learnt for token in lesson.tokens[row])
    majority = counts.most_common(1)[0][0]
    pictured = [int(row) for row in tested if items[row].picture is not None]
    return Training(
        steps=steps,
        seconds=time.monotonic() - started,
        text=lesson.score(tested[:LARGEST_TEST].tolist(), "text", majority),
        image=lesson.score(pictured[:LARGEST_TEST], "image", majority),
    )


def _train(
    lesson: Lesson, rows: np.ndarray, settings: SmallBackboneSettings, random: np.random.Generator, watch: Watch
) -> int:
    """Run the training steps and return their number."""
    pictured = np.array([row for row in rows if lesson.items[row].picture is not None], np.int64)
    optimizer = torch.optim.AdamW(
        lesson.backbone.model.parameters(), lr=settings.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY
    )
    started = time.monotonic()
    for number in range(settings.max_steps):
        elapsed = (time.monotonic() - started) / (60 * settings.minutes)
        if elapsed >= 1:
            return number
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate(number, settings.max_steps, elapsed)
        step = draw_step(random, rows, pictured, settings.batch_size)
        image_rows = [] if step.kind == "text" else [row for prompt in step.rows for row in prompt]
        pictures = [moved(picture, random) for row in image_rows if (picture := lesson.items[row].picture) is not None]
        loss = lesson.loss(step, pictures)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lesson.backbone.model.parameters(), 1.0)
        optimizer.step()
        watch(number + 1, loss.item())
    return settings.max_steps


def draw_step(random: np.random.Generator, rows: np.ndarray, pictured: np.ndarray, batch_size: int) -> Step:
    """Return a step of `batch_size` items in all, in prompts of one kind and length.

    Args:
        random: the source of random numbers.
        rows: the training items.
        pictured: those with a picture; if there are none, all prompts are text prompts.
        batch_size: items of a step; text steps take `TEXTS_PER_IMAGE` times as many.
    """
    kind = str(random.choice(list(KINDS), p=list(KINDS.values()))) if len(pictured) else "text"
    length = int(random.choice(list(ITEMS_IN_A_PROMPT), p=list(ITEMS_IN_A_PROMPT.values())))
    pool = rows if kind == "text" else pictured
    prompts = max(1, batch_size * (TEXTS_PER_IMAGE if kind == "text" else 1) // length)
    chosen = random.choice(pool, size=(prompts, length), replace=prompts * length > len(pool))
    return Step(kind, chosen.tolist(), bool(random.random() < CHAT_SHARE))


def rate(step: int, steps: int, elapsed: float) -> float:
    """Return the share of the learning rate at a step: warm-up, cosine, and linearly to 0 over the last 30 % of time.

    Args:
        step: from 0.
        steps: number of planned steps.
        elapsed: used share of the time limit.
    """
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return warm * max(cosine, LAST_RATE) * min(1.0, (1 - elapsed) / 0.3)


# --- provenance ------------------------------------------------------------------------------------------


def write_provenance(folder: Path, settings: SmallBackboneSettings, training: Training, items: int, words: int) -> None:
    """Write the model's provenance into its folder; model loaders ignore this file."""
    schema.write_json(
        folder / PROVENANCE_FILE,
        {
            "written_by": WRITTEN_BY,
            "settings": dataclasses.asdict(settings),
            "items": items,
            "words": words,
            "training": dataclasses.asdict(training),
        },
    )
