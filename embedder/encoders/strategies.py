"""The five strategies of the VLM2Vec feature study to make an item's vectors: their prompts, and an encoder.

    visual    the image alone                                                          fused = image
    textual   `[TITLE], category: [CATEGORY]`                                          fused = text
    prompt1   image, text, and the instruction to unify them                           fused
    prompt2   the same after a sentence that states the purpose                        fused
    dual      visual and textual, separately; fused is text and image end to end       fused (2d), text, image

After "Evaluating Vision-Language Model Embeddings for Multimodal Recommendation", section 3.1. The paper prints the
parts of its prompts but not what is between them: here each part has its own line. If a catalogue has no category, the
text is the title. The vector is the final-layer state of the prompt's last token, which is what VLM2Vec's own code
means by EOS pooling. Single items only: a user is the mean of the history's items.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlm2rec.embedder.adapters import lora
from vlm2rec.embedder.backbones.backbone import ImageFeatures
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.settings import fingerprint_of
from vlm2rec.embedder.options import Strategy
from vlm2rec.embedder.prompts import joint_prompt, product_text, textual_prompt, visual_prompt

SOURCE = "strategy"  # the manifest's settings.source

MAX_TEXT_TOKENS = 128  # space for a category after a title of the usual 64

# the settings of an item encoder that a strategy decides
_SETTINGS: Mapping[Strategy, Mapping[str, str]] = {
    "visual": {"views": schema.IMAGE},
    "textual": {"views": schema.TEXT},
    "prompt1": {"fusion": "internal"},
    "prompt2": {"fusion": "internal"},
    "dual": {},
}


class StrategyEncoder(ItemEncoder):
    """Encodes items by a strategy. Use `load_strategy`."""

    def __init__(self, strategy: Strategy, encoder: ItemEncoder) -> None:
        provenance = encoder.provenance | _described(strategy, encoder.provenance)
        super().__init__(encoder.backbone, encoder.settings, provenance, encoder.token_budget)
        self.strategy = strategy

    def encode_sequences(
        self,
        titles: Sequence[Sequence[str]],
        images: Sequence[Sequence[ImageFeatures]],
        token_budget: int | None = None,
    ) -> dict[str, Tensor]:
        """Encode n items, each as a sequence of one; returns as `ItemEncoder` does, `fused` (n, 2d) with `dual`.

        A vector is NaN if its text is blank or its image missing.
        """
        if any(len(sequence) > 1 for sequence in (*titles, *images)):
            raise ValueError("a strategy's prompts hold one item")
        backbone, count, budget = self.backbone, len(titles), token_budget or self.token_budget
        texts = {row: sequence[0] for row, sequence in enumerate(titles) if sequence and sequence[0]}
        seen = {row: sequence for row, sequence in enumerate(images) if sequence}
        if self.settings.fusion == "internal":
            joint = {row: joint_prompt(self.strategy, titles[row][0]) for row in seen}
            prompts = {row: backbone.tokenize(prompt, seen[row]) for row, prompt in joint.items()}
            absent = torch.full((count, self.dim), torch.nan, device=backbone.device)
            fused = self._encode_rows(prompts, count, budget)
            return {schema.FUSED: fused, schema.TEXT: absent, schema.IMAGE: absent.clone()}
        written = {row: backbone.tokenize(textual_prompt(text)) for row, text in texts.items()}
        shown = {row: backbone.tokenize(visual_prompt(), features) for row, features in seen.items()}
        text, image = self._encode_rows(written, count, budget), self._encode_rows(shown, count, budget)
        return {schema.FUSED: self._fuse(text, image), schema.TEXT: text, schema.IMAGE: image}

    def _fuse(self, text: Tensor, image: Tensor) -> Tensor:
        """Return the only view, or with `dual` text and image end to end, NaN if one of them is missing."""
        if self.strategy != "dual":
            return super()._fuse(text, image)
        parts = (text, image)
        if self.settings.fusion_norm == "normalised":
            parts = (torch.nn.functional.normalize(text, dim=1), torch.nn.functional.normalize(image, dim=1))
        whole = torch.cat(parts, dim=1)  # (n, 2d)
        return whole.masked_fill(whole.isnan().any(dim=1, keepdim=True), torch.nan)


def load_strategy(backbone: str, strategy: Strategy, *, token_budget: int = 0, **given: Any) -> StrategyEncoder:
    """Load a backbone as an encoder by a strategy.

    Args:
        backbone: hub id or local folder.
        strategy: which prompts to use.
        token_budget: tokens in one packed row; 0 chooses a number that suits the device.
        given: `revision`, `adapter` (of another program), `prompt_mode`, `max_pixels`, `max_title_tokens`, `dtype` and
            `device` as `ItemEncoder.load` takes them; with `dual` also `fusion_norm`: concatenates raw vectors, or unit
            vectors.

    Raises:
        ModelError: the backbone cannot be loaded.
        ConfigError: as `strategy_fingerprint`.
    """
    arguments = _arguments(strategy, given)
    return StrategyEncoder(strategy, ItemEncoder.load(backbone, token_budget=token_budget, **arguments))


def strategy_fingerprint(backbone: str, strategy: Strategy, **given: Any) -> dict[str, Any]:
    """Return what `load_strategy(...).fingerprint` will be, from config files alone.

    Raises:
        ConfigError: a setting that the strategy decides, such as `views`, or an adapter that brings its own.
        ModelError: the backbone's files cannot be read.
    """
    settings = fingerprint_of(backbone, **_arguments(strategy, given))
    return settings | _described(strategy, settings)


def _arguments(strategy: Strategy, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments for the strategy's item encoder; refuse those that contradict the strategy."""
    lora.require_promptless(given.get("adapter"), f"--strategy {strategy}")
    idle = ("views", "fusion", "item_text", *(() if strategy == "dual" else ("fusion_norm",)))
    for name in idle:
        if given.get(name) is not None:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} {given[name]} with --strategy {strategy}, which decides it",
                "one of the two",
                f"leave {flag} out",
            )
    chosen = {name: value for name, value in given.items() if value is not None}
    return {"max_title_tokens": MAX_TEXT_TOKENS, **chosen, **_SETTINGS[strategy]}


def _described(strategy: Strategy, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a strategy changes in, or adds to, those of its item encoder."""
    prompts = (visual_prompt(), textual_prompt(product_text("{}", "{}")), joint_prompt(strategy, "{}"))
    wording = f"{settings['prompt_hash']}\0{strategy}\0{prompts!r}"
    changed: dict[str, Any] = {
        "source": SOURCE,
        "strategy": strategy,
        "prompt_hash": hashlib.sha256(wording.encode()).hexdigest()[:16],
    }
    if strategy == "dual":
        dim = settings["dim"]
        changed |= {"fusion": "concatenated", "dim": 2 * dim}
        changed |= {"dims": {schema.FUSED: 2 * dim, schema.TEXT: dim, schema.IMAGE: dim}}
    return changed
