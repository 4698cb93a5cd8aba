"""The prompts of section 2.2.1, as the paper prints them, and those of other methods for single items.
No model code.

A prompt is a tuple of parts: text, `IMAGE_HERE` in place of an image, or a `SystemMessage` at its start. It becomes a
string in one of two modes: `raw` joins the parts, so that the last token of the prompt is the last token of the last
item; `chat` puts them into the family's chat template and opens the assistant's turn, so that the answer would follow
the last token.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Final

from vlm2rec.embedder import chat_template
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.embedder.options import PromptMode, PromptStyle, Strategy

Prompt = tuple[str | None, ...]

IMAGE_HERE: Final = None


class SystemMessage(str):
    """The first part of a prompt that has one: what the system's turn of the chat says."""


READ_HERE: Final = "\0"
"""A part after whose previous token the state is read, too; no title holds this character."""
QWEN3_VL_EMBEDDING_INSTRUCTION = "Represent the user's input."
_NOTHING = "NULL"  # what Qwen3-VL-Embedding is given where there is nothing
TEXT_INSTRUCTION = "Describe this item text sequence in one word, "
IMAGE_INSTRUCTION = "Describe this item image sequence in one word, "
ITEM_INSTRUCTION = "Describe this item sequence in one word, "
SDA_TEXT_INSTRUCTION = "The product has the following attributes: "
SDA_IMAGE_INSTRUCTION = "The product has the image: "
NOTELLM2_START = 'Item: {"image": "'
_ONE_WORD = '"}, compress this item into one word: "'
CONSTANT_STARTS: Final = (
    *(f"{instruction}0) " for instruction in (TEXT_INSTRUCTION, IMAGE_INSTRUCTION, ITEM_INSTRUCTION)),
    SDA_TEXT_INSTRUCTION,
    SDA_IMAGE_INSTRUCTION,
    NOTELLM2_START,
)
"""The constant starts of the prompts, one for each kind."""


def text_prompt(titles: Sequence[str], prompt_style: PromptStyle = "vlm2rec", instruction: str = "") -> Prompt:
    """Return P_T: `Describe this item text sequence in one word, 0) <title>, 1) <title>`, oldest item first.

    In the style of Qwen3-VL-Embedding the instruction is the system's message, a single item is its title alone, and
    a sequence is `0) <title>, 1) <title>`. In the style of SDA, for a single item: `The product has the following
    attributes: <text>`; in that of LLM2Rec the title alone, a blank if there is none.
    """
    if prompt_style == "llm2rec":
        return (titles[_single_item(len(titles))] or " ",)
    if prompt_style == "sda":
        return (SDA_TEXT_INSTRUCTION + titles[_single_item(len(titles))],)
    if prompt_style == "qwen3-vl-embedding":
        said = titles[0] if len(titles) == 1 else _numbered(titles)
        return (_system(instruction), said or _NOTHING)
    return (TEXT_INSTRUCTION + _numbered(titles),)


def _numbered(titles: Sequence[str]) -> str:
    return ", ".join(f"{i}) {title}" for i, title in enumerate(titles))


def _system(instruction: str) -> SystemMessage:
    """Return an instruction as Qwen3-VL-Embedding has it: with a punctuation mark at its end."""
    text = instruction.strip() or QWEN3_VL_EMBEDDING_INSTRUCTION
    return SystemMessage(text if unicodedata.category(text[-1]).startswith("P") else f"{text}.")


def attributes_text(title: str, category: str, brand: str) -> str:
    """Return `title is <title>; category is <category>; brand is <brand>`, the text of an item in SDA's prompt.

    What is blank is left out; see `listed_attributes`.
    """
    return listed_attributes({"title": title, "category": category, "brand": brand})


def listed_attributes(attributes: Mapping[str, str]) -> str:
    """Return `title is ...; category is ...; brand is ...`, without the attributes that are blank (LLMEmb, SDA).

    As in their code, each value has at most 100 characters, so that a long title leaves room for the rest. A semicolon
    in a value becomes a full stop.
    """
    said = ((name, " ".join(value.split()).replace(";", ".")[:_VALUE].rstrip()) for name, value in attributes.items())
    return "; ".join(f"{name} is {value}" for name, value in said if value)


_VALUE = 100  # characters


def image_prompt(count: int, prompt_style: PromptStyle = "vlm2rec", instruction: str = "") -> Prompt:
    """Return P_V for `count` images: `Describe this item image sequence in one word, 0) <image>, 1) <image>`.

    In the style of Qwen3-VL-Embedding, after the system's message: `<image>` for a single item, else
    `0) <image>, 1) <image>`. In the style of SDA: `The product has the image: <image>`, in the order that its paper
    prints; in the chat messages of its code the image comes first.
    """
    if prompt_style == "sda":
        _single_item(count)
        return (SDA_IMAGE_INSTRUCTION, IMAGE_HERE)
    if prompt_style == "qwen3-vl-embedding":
        return (_system(instruction), *([IMAGE_HERE] if count == 1 else _with_images("", [""] * count)))
    return _with_images(IMAGE_INSTRUCTION, [""] * count)


def item_prompt(titles: Sequence[str], prompt_style: PromptStyle = "vlm2rec", instruction: str = "") -> Prompt:
    """Return the interleaved prompt of internal fusion: `..., 0) <title> <image>, 1) <title> <image>`.

    In the style of Qwen3-VL-Embedding, after the system's message: `<image><title>` for a single item, as its own code
    orders the two, else as above.
    """
    if prompt_style == "qwen3-vl-embedding":
        if len(titles) == 1:
            return (_system(instruction), IMAGE_HERE, *(title for title in titles if title))
        return (_system(instruction), *_with_images("", [f"{title} " for title in titles]))
    return _with_images(ITEM_INSTRUCTION, [f"{title} " for title in titles])


def note_prompt(text: str, prompt_style: PromptStyle) -> Prompt:
    """Return the prompt of NoteLLM-2 for a single item: its image, then its text, each to be told in one word.

    The state before the text is that of the image alone. `notellm2-basic` is the paper's prompt without this division.
    """
    if prompt_style == "notellm2-basic":
        return (NOTELLM2_START, IMAGE_HERE, f'", "title": "{text}{_ONE_WORD}')
    return (NOTELLM2_START, IMAGE_HERE, _ONE_WORD, READ_HERE, f'". Item: {{"title": "{text}{_ONE_WORD}')


def _single_item(count: int) -> int:
    """Return 0, the row of a single item; raise `ValueError` for a sequence."""
    if count != 1:
        raise ValueError(f"a sequence of {count} items; these prompts are about one")
    return 0


def _with_images(instruction: str, before_image: Sequence[str]) -> Prompt:
    parts: list[str | None] = []
    for i, text in enumerate(before_image):
        parts += [f"{instruction if i == 0 else ', '}{i}) {text}", IMAGE_HERE]
    return tuple(parts)


def render(prompt: Prompt, mode: PromptMode, processor: Any) -> str:
    """Return the prompt as one string with one image token of the family for each image.

    Raises:
        ConfigError: a prompt with a system's message in raw mode, which has no turns.
        ModelError: as `chat_template.apply`.
    """
    if prompt and isinstance(prompt[0], SystemMessage):
        if mode == "raw":
            raise ConfigError(
                "a prompt with a system message and --prompt-mode raw", "--prompt-mode chat", "give --prompt-mode chat"
            )
        return _in_turns([("system", prompt[:1]), ("user", prompt[1:])], processor)
    if mode == "raw":
        return "".join(processor.family.placeholder if part is IMAGE_HERE else part for part in prompt)
    return _in_turns([("user", prompt)], processor)


def _in_turns(turns: Sequence[tuple[str, Prompt]], processor: Any) -> str:
    messages = []
    for role, prompt in turns:
        content: str | list[dict[str, str]]
        content = [{"type": "image"} if part is IMAGE_HERE else {"type": "text", "text": part} for part in prompt]
        if processor.family.text_only:  # text models take one string
            content = "".join(part["text"] for part in content)
        messages.append({"role": role, "content": content})
    template = processor.chat_template
    template = template.get("default", "") if isinstance(template, dict) else template
    tokens = processor.tokenizer.special_tokens_map
    return chat_template.apply(template, messages, tokens)


def prompt_hash(
    mode: PromptMode,
    chat_template: str | None,
    prompt_style: PromptStyle = "vlm2rec",
    item_text: str = "title",
    instruction: str = "",
) -> str:
    """Return a short hash of everything that decides the text of a prompt, for fingerprints."""
    instructions = {
        "vlm2rec": [TEXT_INSTRUCTION, IMAGE_INSTRUCTION, ITEM_INSTRUCTION],
        "qwen3-vl-embedding": [str(_system(instruction))],
        "sda": [SDA_TEXT_INSTRUCTION, SDA_IMAGE_INSTRUCTION],
        "llm2rec": ["{}"],
        "notellm2": [repr(note_prompt("", "notellm2"))],
        "notellm2-basic": [repr(note_prompt("", "notellm2-basic"))],
    }[prompt_style]
    texts = [*instructions, mode, (chat_template or "") * (mode == "chat")]
    if item_text == "attributes":
        texts.append(attributes_text("{}", "{}", "{}"))
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


JOINT_INSTRUCTION = "Generate a unified representation for this product."
FRAMING = "You are analyzing a product for retrieval purposes. Here is the product image:"
DETAILS = "Product details:"


def product_text(title: str, category: str) -> str:
    """Return `[TITLE], category: [CATEGORY]`, or only the part that is not blank."""
    return ", ".join(part for part in (title, category and f"category: {category}") if part)


def visual_prompt() -> Prompt:
    """Return the image alone."""
    return (IMAGE_HERE,)


def textual_prompt(text: str) -> Prompt:
    """Return the text alone."""
    return (text,)


def joint_prompt(strategy: Strategy, text: str) -> Prompt:
    """Return the prompt with image and text of `prompt1` or `prompt2`."""
    if strategy == "prompt1":
        return (IMAGE_HERE, f"\n{text}\n{JOINT_INSTRUCTION}")
    return (f"{FRAMING} ", IMAGE_HERE, f"\n{DETAILS} {text}\n{JOINT_INSTRUCTION}")


DEFAULT_QUESTION = (
    "What kind of item is this, and whom would it please? Answer in JSON with the keys category, theme, style, look,"
    " audience and use."
)
_ANSWER = "\nAnswer:"  # without a chat template, this marks where the answer would begin


def question(title: str, instruction: str, mode: PromptMode) -> Prompt:
    """Return the prompt: title, image, instruction, in this order."""
    return (f"Title: {title}\nImage: ", IMAGE_HERE, f"\n{instruction}{_ANSWER if mode == 'raw' else ''}")
