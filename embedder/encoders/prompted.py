"""Zero-shot prompting: one question about title and image together; the vector is the state before the answer.

This is the paper's VLM_Prompt row: no training, and single items only (a user's vector is the mean of the item
vectors). Title and image are in one prompt, so there is only a fused vector. The paper prints no prompt for it; ours
asks for attributes in JSON, and any other question may be given. The vector is the final-layer state of the prompt's
last token; in chat mode the assistant's answer would follow this token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlm2rec.embedder.adapters import lora
from vlm2rec.embedder.backbones.backbone import Backbone
from vlm2rec.embedder.backbones.devices import batches_by_tokens
from vlm2rec.embedder.backbones.families import TextProcessor, checked_files, load_processor
from vlm2rec.embedder.backbones.model_files import Source
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.embedder.encoders.item_encoder import EncodedItems, Picture, to_numpy
from vlm2rec.embedder.encoders.settings import fingerprint_of
from vlm2rec.embedder.options import DeviceName, DtypeName, PromptMode, QuestionMode
from vlm2rec.embedder.prompts import DEFAULT_QUESTION, question

SOURCE = "prompt"  # the manifest's settings.source
_ITEMS_AT_ONCE = 256  # images whose features are on the device together


class PromptedEncoder:
    """Encodes items by asking a backbone a question about each. Use `PromptedEncoder.load`."""

    def __init__(self, backbone: Backbone, instruction: str, settings: dict[str, Any], token_budget: int) -> None:
        self.backbone, self.instruction, self.token_budget = backbone, instruction, token_budget
        self._fingerprint = settings

    @classmethod
    def load(
        cls,
        backbone: str,
        adapter: Path | None = None,
        *,
        revision: str | None = None,
        instruction: str | None = None,
        prompt_mode: QuestionMode = "auto",
        max_pixels: int = 224 * 224,
        max_title_tokens: int = 64,
        dtype: DtypeName = "auto",
        device: DeviceName = "auto",
        token_budget: int = 4096,
    ) -> PromptedEncoder:
        """Load a backbone; the arguments are those of `prompted_fingerprint`, and padded tokens in a batch.

        Raises:
            ModelError: the backbone or the adapter cannot be loaded, or the adapter has no effect.
            ConfigError: as `prompted_fingerprint`.
        """
        files = checked_files(backbone, revision)
        settings = prompted_fingerprint(
            files,
            adapter,
            instruction=instruction,
            prompt_mode=prompt_mode,
            max_pixels=max_pixels,
            max_title_tokens=max_title_tokens,
            dtype=dtype,
            device=device,
        )
        model = Backbone.load(
            files,
            prompt_mode=settings["prompt_mode"],
            max_pixels=max_pixels,
            max_title_tokens=max_title_tokens,
            dtype=dtype,
            device=device,
        )
        encoder = cls(model, settings["instruction"], settings, token_budget)
        if adapter is not None:
            titles, images = lora.canary_items()
            before = encoder.encode_items(titles, images).fused
            lora.merge_adapter(model, adapter)
            lora.require_effect(before, encoder.encode_items(titles, images).fused, adapter)
        return encoder

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything about the encoder that belongs in an export's fingerprint."""
        return self._fingerprint

    @torch.no_grad()
    def encode_items(self, titles: Sequence[str], images: Sequence[Picture]) -> EncodedItems:
        """Return fused vectors of n items, NaN for an item without an image; text and image vectors are all NaN."""
        backbone = self.backbone
        prepared = [backbone.prepare_title(title) for title in titles]
        fused = np.full((len(titles), backbone.dim), np.nan, np.float32)
        complete = [row for row, image in enumerate(images) if isinstance(image, Image.Image)]
        pictures = [image for image in images if isinstance(image, Image.Image)]
        for start in range(0, len(complete), _ITEMS_AT_ONCE):
            rows = complete[start : start + _ITEMS_AT_ONCE]
            features = backbone.encode_images(pictures[start : start + _ITEMS_AT_ONCE])
            questions = [question(prepared[row][0], self.instruction, backbone.prompt_mode) for row in rows]
            encoded = [backbone.tokenize(prompt, [image]) for prompt, image in zip(questions, features, strict=True)]
            for batch in batches_by_tokens([len(prompt) for prompt in encoded], self.token_budget):
                fused[[rows[i] for i in batch]] = to_numpy(backbone.encode([encoded[i] for i in batch]))
        absent = np.full_like(fused, np.nan)
        return EncodedItems(fused, absent, absent, np.array([cut for _, cut in prepared], bool))


def prompted_fingerprint(
    backbone: Source,
    adapter: Path | None = None,
    *,
    revision: str | None = None,
    instruction: str | None = None,
    prompt_mode: QuestionMode = "auto",
    max_pixels: int = 224 * 224,
    max_title_tokens: int = 64,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
) -> dict[str, Any]:
    """Return what `PromptedEncoder.load(...).fingerprint` will be, from config files alone.

    Args:
        backbone: hub id or local folder.
        adapter: a PEFT folder that another program made.
        revision: of a hub backbone.
        instruction: the question; None is `DEFAULT_QUESTION`.
        prompt_mode: `auto` is chat where the model has a chat template, else raw.
        max_pixels: largest image area.
        max_title_tokens: titles are cut to this many tokens.
        dtype: number format of the model.
        device: where it will run.

    Raises:
        ConfigError: an empty instruction, chat mode without a chat template, a model that takes no images, or an
            adapter that was trained with other prompts.
        ModelError: the files of the backbone or the adapter cannot be read.
    """
    lora.require_promptless(adapter, "--strategy question")
    full_question = DEFAULT_QUESTION if instruction is None else instruction.strip()
    files = checked_files(backbone, revision)
    processor = load_processor(files, None, max_pixels)
    if isinstance(processor, TextProcessor):
        raise ConfigError(
            f"{files.source} is a text model ({processor.family.model_type})",
            "a vision-language model: the question is about an item's image and title",
            "choose another --backbone",
        )
    if not full_question or processor.image_token in full_question:
        raise ConfigError(
            f"--instruction {instruction!r}",
            "a question in words; the image is put before it",
            "write the question as --instruction",
        )
    by_template: PromptMode = "chat" if processor.chat_template else "raw"
    mode: PromptMode = by_template if prompt_mode == "auto" else prompt_mode
    if mode == "chat" and not processor.chat_template:
        raise ConfigError(f"{files.source} has no chat template", "a model with one", "use --prompt-mode raw")
    settings = fingerprint_of(
        files,
        adapter,
        dtype=dtype,
        device=device,
        fusion="internal",
        prompt_mode=mode,
        max_pixels=max_pixels,
        max_title_tokens=max_title_tokens,
    )
    wording = "\0".join(
        [repr(question("", full_question, mode)), mode, (processor.chat_template or "") * (mode == "chat")]
    )
    changed = {
        "source": SOURCE,
        "fusion": SOURCE,
        "views": [schema.FUSED],
        "instruction": full_question,
        "prompt_hash": hashlib.sha256(wording.encode()).hexdigest()[:16],
    }
    return settings | changed
