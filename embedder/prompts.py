"""The prompts of section 2.2.1, as the paper prints them. No model code.

A prompt is a tuple of parts: text, or `IMAGE_HERE` where an image goes. It becomes a string in one of two modes:
`raw` joins the parts, so that the last token of the prompt is the last token of the last item; `chat` puts them into
the family's chat template and opens the assistant's turn, so that the last token is the one the answer follows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final, Literal

PromptMode = Literal["raw", "chat"]
Prompt = tuple[str | None, ...]

IMAGE_HERE: Final = None
TEXT_INSTRUCTION = "Describe this item text sequence in one word, "
IMAGE_INSTRUCTION = "Describe this item image sequence in one word, "
ITEM_INSTRUCTION = "Describe this item sequence in one word, "
CONSTANT_STARTS: Final = tuple(
    f"{instruction}0) " for instruction in (TEXT_INSTRUCTION, IMAGE_INSTRUCTION, ITEM_INSTRUCTION)
)
"""What prompts of one kind all begin with."""


def text_prompt(titles: Sequence[str]) -> Prompt:
    """Return P_T: `Describe this item text sequence in one word, 0) <title>, 1) <title>`, oldest item first."""
    return (TEXT_INSTRUCTION + ", ".join(f"{i}) {title}" for i, title in enumerate(titles)),)


def image_prompt(count: int) -> Prompt:
    """Return P_V for `count` images: `Describe this item image sequence in one word, 0) <image>, 1) <image>`."""
    return _with_images(IMAGE_INSTRUCTION, [""] * count)


def item_prompt(titles: Sequence[str]) -> Prompt:
    """Return the interleaved prompt of internal fusion: `..., 0) <title> <image>, 1) <title> <image>`."""
    return _with_images(ITEM_INSTRUCTION, [f"{title} " for title in titles])


def _with_images(instruction: str, before_image: Sequence[str]) -> Prompt:
    parts: list[str | None] = []
    for i, text in enumerate(before_image):
        parts += [f"{instruction if i == 0 else ', '}{i}) {text}", IMAGE_HERE]
    return tuple(parts)


def render(prompt: Prompt, mode: PromptMode, processor: Any) -> str:
    """Return the prompt as one string with one image token of the family for each image."""
    if mode == "raw":
        return "".join(processor.family.placeholder if part is IMAGE_HERE else part for part in prompt)
    content = [{"type": "image"} if part is IMAGE_HERE else {"type": "text", "text": part} for part in prompt]
    messages = [{"role": "user", "content": content}]
    return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def prompt_hash(mode: PromptMode, chat_template: str | None) -> str:
    """Return a short hash of everything that decides a prompt's wording, for fingerprints."""
    texts = [TEXT_INSTRUCTION, IMAGE_INSTRUCTION, ITEM_INSTRUCTION, mode, (chat_template or "") * (mode == "chat")]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
