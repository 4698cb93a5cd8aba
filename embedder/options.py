"""The choices of every setting that takes one of a few words, each once. No torch in here.

The command line, `ItemEncoder`, the trainer and the export all take their words from this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

# --- the model and where it runs ------------------------------------------------------------------------------
DtypeName = Literal["auto", "float32", "bfloat16"]
DeviceName = Literal["auto", "cpu", "cuda", "mps"]

# --- from an item to a vector ---------------------------------------------------------------------------------
PromptMode = Literal["raw", "chat"]
PromptStyle = Literal["vlm2rec", "sda"]
"""Whose prompts: those of VLM2Rec, or those of SDA, which know single items only."""
FusionMode = Literal["external", "internal"]
FusionNorm = Literal["raw", "normalised"]
ViewChoice = Literal["both", "text", "image"]
Pooling = Literal["last", "mean"]
Strategy = Literal["visual", "textual", "prompt1", "prompt2", "dual"]
STRATEGIES: Final[tuple[Strategy, ...]] = get_args(Strategy)
"""The prompts of the VLM2Vec feature study."""

# --- training -------------------------------------------------------------------------------------------------
MethodName = Literal["vlm2rec", "sda"]


@dataclass(frozen=True)
class MethodOptions:
    """What a training method changes in the settings of `finetune`.

    Args:
        own: names of settings that mean something to this method; with a method that does not name them, they are
            refused. What no method names belongs to all of them.
        defaults: its own, where they differ from those of `FinetuneConfig`.
    """

    own: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)


METHOD_OPTIONS: Final[dict[str, MethodOptions]] = {
    "vlm2rec": MethodOptions(
        own=(
            *("loss", "tau_wpcl", "tau_crtr", "lam", "alpha", "beta", "learnable", "stop_gradient", "penalty", "wpcl"),
            *("crtr", "negatives", "samples", "users"),
        )
    ),
    "sda": MethodOptions(
        own=("cmsa", "tau_cmsa", "experts"),
        defaults={
            "pooling": "mean",
            "prompt_style": "sda",
            "lora_rank": 8,
            "lora_dropout": 0.1,
            "batch_size": 32,
        },
    ),
}
"""By method: the half of its recipe (`training.recipes`) that reading settings and `--help` need."""
LossName = Literal["vlm2rec", "sft"]
Alignment = Literal["paper", "reference", "off"]
"""SDA's CMSA: as its paper writes it, as its public code has it, or without the soft target."""
SamplesMode = Literal["last", "random", "all"]
Negatives = Literal["local", "global"]
Schedule = Literal["constant", "linear", "cosine"]

# --- the export -----------------------------------------------------------------------------------------------
Storage = Literal["float32", "float16"]
ImagePolicy = Literal["fail", "null", "text_only"]
ImagesBy = Literal["mtime", "bytes"]
EngineName = Literal["local", "ray"]

# --- reading what was exported --------------------------------------------------------------------------------
View = Literal["fused", "text", "image"]
Split = Literal["valid", "test"]
"""Which of a user's last two items is held out and ranked."""
