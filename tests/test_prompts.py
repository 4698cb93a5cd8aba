"""Prompts: the paper's words, and titles that try to be more than words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vlm2rec.embedder.backbones.families import load_processor
from vlm2rec.embedder.prompts import IMAGE_HERE, image_prompt, item_prompt, prompt_hash, render, text_prompt

Tiny = Callable[[str], Path]


def test_text_prompt_numbers_items_from_zero_and_has_no_tail() -> None:
    assert text_prompt(["Red mug", "Oak lamp"]) == (
        "Describe this item text sequence in one word, 0) Red mug, 1) Oak lamp",
    )


def test_single_item_uses_index_zero_only() -> None:
    assert text_prompt(["Red mug"]) == ("Describe this item text sequence in one word, 0) Red mug",)
    assert image_prompt(1) == ("Describe this item image sequence in one word, 0) ", IMAGE_HERE)


def test_image_prompt_has_a_place_for_every_image() -> None:
    assert image_prompt(3) == (
        "Describe this item image sequence in one word, 0) ",
        IMAGE_HERE,
        ", 1) ",
        IMAGE_HERE,
        ", 2) ",
        IMAGE_HERE,
    )


def test_interleaved_prompt_puts_each_image_after_its_title() -> None:
    assert item_prompt(["Red mug", "Oak lamp"]) == (
        "Describe this item sequence in one word, 0) Red mug ",
        IMAGE_HERE,
        ", 1) Oak lamp ",
        IMAGE_HERE,
    )


def test_raw_mode_is_the_prompt_as_printed_with_the_familys_image_marks(tiny: Tiny) -> None:
    processor = load_processor(tiny("qwen2_5_vl"))
    assert render(image_prompt(2), "raw", processor) == (
        "Describe this item image sequence in one word, 0) <|vision_start|><|image_pad|><|vision_end|>"
        ", 1) <|vision_start|><|image_pad|><|vision_end|>"
    )


def test_chat_mode_ends_where_the_answer_begins(tiny: Tiny) -> None:
    text = render(text_prompt(["Red mug"]), "chat", load_processor(tiny("qwen2_5_vl")))
    assert text.endswith("0) Red mug<|im_end|>\n<|im_start|>assistant\n")


def test_prompt_hash_depends_on_the_mode_and_in_chat_mode_on_the_template() -> None:
    same = prompt_hash("raw", "template a") == prompt_hash("raw", "template b")
    other = prompt_hash("chat", "template a") == prompt_hash("chat", "template b")
    assert (same, other) == (True, False)
    assert prompt_hash("raw", None) != prompt_hash("chat", None)
