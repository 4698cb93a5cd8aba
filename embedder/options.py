"""The choices of every setting that takes one of a few words, each defined once. No torch in here.

The command line, `ItemEncoder`, the trainer and the export all take their choices from this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, get_args

# --- the model and where it runs ------------------------------------------------------------------------------
DtypeName = Literal["auto", "float32", "bfloat16"]
DeviceName = Literal["auto", "cpu", "cuda", "mps"]

# --- from an item to a vector ---------------------------------------------------------------------------------
PromptMode = Literal["raw", "chat"]
PromptStyle = Literal["vlm2rec", "qwen3-vl-embedding", "sda", "notellm2", "notellm2-basic", "llm2rec"]
"""Whose prompts: VLM2Rec's, or those that Qwen3-VL-Embedding was trained with, both for histories and single items;
those of SDA, NoteLLM-2 and LLM2Rec (the title alone) are for single items only."""
HISTORY_STYLES: Final[tuple[PromptStyle, ...]] = ("vlm2rec", "qwen3-vl-embedding")
"""Those with a prompt for a sequence of items."""


def defaults_of_style(prompt_style: Any) -> dict[str, Any]:
    """Return the settings that a prompt style brings along unless others are given; none for an unknown style."""
    return {"prompt_mode": "chat"} if prompt_style == "qwen3-vl-embedding" else {}


Attention = Literal["causal", "bidirectional"]
"""Whether a token sees only those before it, or all of its prompt (LLM2Rec)."""
LateFusion = Literal["off", "gate"]
"""Whether NoteLLM-2's gate adds what the vision tower saw to a vector of its prompt."""
FusionMode = Literal["external", "internal"]
FusionNorm = Literal["raw", "normalised"]
ViewChoice = Literal["both", "text", "image"]
Pooling = Literal["last", "mean"]
Strategy = Literal["visual", "textual", "prompt1", "prompt2", "dual"]
STRATEGIES: Final[tuple[Strategy, ...]] = get_args(Strategy)
"""The prompts of the VLM2Vec feature study."""
StrategyChoice = Literal[Strategy, "question"]
"""One of the study's prompts, or a question about title and image together."""
QuestionMode = Literal["auto", PromptMode]
"""`auto`: chat if the model has a chat template."""
EncoderKind = Literal["auto", "sentence", "clip", "image"]
"""Of a frozen encoder: titles alone, titles and images in one space, or images alone; `auto`: what its folder holds."""
EncoderPooling = Literal["auto", "mean", "cls", "last"]
"""Of a frozen text encoder; `auto`: what its folder says, else the mean."""

# --- training -------------------------------------------------------------------------------------------------
Alignment = Literal["paper", "reference", "off", "reference-off"]
"""SDA's CMSA: as in its paper, as in its public code; without the soft target, or so as in its public code."""
SDA_PROBED: Final = ("q_proj", "k_proj")
"""Projections of the last layer where SDA's gradients of text and image are compared (its section 3.3.3)."""
SamplesMode = Literal["last", "random", "all"]
Negatives = Literal["local", "global"]
Quantize = Literal["none", "nf4"]
"""Number format of the language model's matrices while an adapter is trained."""
Sharding = Literal["none", "fsdp"]
"""What each of several processes holds of the language model: all of it, or a part of every layer (FSDP2)."""
Schedule = Literal["constant", "linear", "cosine"]
ValidCandidates = Literal["own", "stored"]
"""What validation items are ranked among: items drawn for validation alone, or the first set stored for the test."""
TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
TRACKERS: Final[tuple[TrackerName, ...]] = get_args(TrackerName)
Reduction = Literal["paper", "mean"]
"""How VLM2Rec's two losses are balanced in a batch: as the paper's equations, or both as means."""


def with_former_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded settings of a fine-tuning, with what it did where a setting did not exist yet.

    Only settings whose default has become another one are added.
    """
    balances = (settings.get("method", "vlm2rec"), settings.get("loss", "vlm2rec")) == ("vlm2rec", "vlm2rec")
    return {"valid_candidates": "stored", **({"reduction": "mean"} if balances else {}), **settings}


# --- the export -----------------------------------------------------------------------------------------------
Storage = Literal["float32", "float16", "int8", "binary"]
FloatStorage = Literal["float32", "float16"]
ImagePolicy = Literal["fail", "null", "text_only"]
ImagesBy = Literal["mtime", "bytes"]
EngineName = Literal["local", "ray"]

# --- reading what was exported --------------------------------------------------------------------------------
View = Literal["fused", "text", "image"]
Column = Literal[View, "concat"]
"""A view, or text and image end to end, which every reader makes of a table with both."""
Split = Literal["valid", "test"]
"""Which of a user's last two items is held out and ranked."""
