"""The model card of an adapter: a README with the front matter that PEFT and the Hugging Face hub read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from vlm2rec.embedder import prompts
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.options import HISTORY_STYLES
from vlm2rec.embedder.prompts import IMAGE_HERE, READ_HERE, Prompt

_TASK = "feature-extraction"
_KINDS = {
    "lora": "LoRA adapter",
    "moda": "MoDA adapter (experts with a gate for text and one for images; for vlm2rec alone, not for PEFT)",
}


def model_card(settings: dict[str, Any], metrics: Sequence[tuple[str, float]]) -> str:
    """Return the README of an adapter folder.

    Args:
        settings: the content of the adapter's `vlm2rec.json`.
        metrics: names and values of the best validation metrics.
    """
    encoder, training, data = settings["encoder"], settings["training"], settings["dataset"]
    backbone = settings["backbone"]
    made_of = settings.get("backbone_settings") or {}
    revision = made_of.get(schema.MADE_WITH, {}).get("commit") or made_of.get("revision")
    learned = ", ".join(f"{name} {value}" for name, value in training.get("loss_settings", {}).items())
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics)
    prompt_lines = "\n".join(f"- {view}: `{_shown(prompt)}`" for view, prompt in _prompts(encoder).items())
    versions = ", ".join(f"{name} {number}" for name, number in settings["versions"].items())
    command = f"vlm2rec export-items --data DATA --backbone {backbone} --adapter THIS_FOLDER --out EMBEDDINGS"
    return f"""---
{_front_matter(settings, metrics)}
---

# vlm2rec adapter ({training["loss"]}{_reduction(settings)})

{_KINDS[settings.get("kind", "lora")]} on `{backbone}`{f" at revision `{revision}`" if revision else ""}, fine-tuned on
the {"histories" if data["users"] else "items"} of `{data["name"]}` for item embeddings of recommenders.

**Licence.** The backbone's applies: {settings["licence"]}.

**Data.** `{data["name"]}`: {_samples(data)}. SHA-256 of the dataset's files:
{_hashes(data)}.

**Loss.** Method {training.get("method", "vlm2rec")}, loss {training["loss"]}{f" ({learned})" if learned else ""}.
{training["steps"]} steps, seed {training["seed"]}.

**Prompts** (mode `{encoder["prompt_mode"]}`), {_asked(encoder)}:

{prompt_lines}

Fusion `{encoder["fusion"]}` ({encoder["fusion_norm"]}){_gate(encoder)}.
Titles up to {encoder["max_title_tokens"]} tokens.

**Pixels.** Images keep their shape and are scaled to at most {encoder["max_pixels"]} pixels, or to the backbone's fixed
size.

| best validation, {_among(settings)} | |
|---|---|
{rows}

**Versions.** {versions}.

```sh
{command}
```

`canary.safetensors` holds generated items and their vectors: vlm2rec checks them on every load. Every setting is in
`vlm2rec.json`, the course of the training in `curves.json`.
"""


def _gate(encoder: dict[str, Any]) -> str:
    if encoder.get("late_fusion", "off") == "off":
        return ""
    return ", then the gate in `late_fusion.safetensors`, which vlm2rec adds and PEFT does not know"


def _reduction(settings: dict[str, Any]) -> str:
    chosen = settings.get("config", {}).get("reduction")
    return f", reduction `{chosen}`" if chosen and settings["training"]["loss"] == "vlm2rec" else ""


def _among(settings: dict[str, Any]) -> str:
    own = settings.get("config", {}).get("valid_candidates") == "own"
    return "among candidates of its own" if own else "among stored candidates"


def _samples(data: dict[str, Any]) -> str:
    return f"{data['samples']} samples of {data['users']} users" if data["users"] else f"{data['samples']} items"


def _hashes(data: dict[str, Any]) -> str:
    hashes = data.get("sha256")
    listed = [f"`{name}` {found}" for name, found in hashes.items()] if isinstance(hashes, dict) else []
    return ", ".join(listed) or "not recorded"


def _asked(encoder: dict[str, Any]) -> str:
    numbered = (
        "items numbered from 0"
        if encoder.get(schema.stored_name("prompt_style"), "vlm2rec") in HISTORY_STYLES
        else "of single items"
    )
    pooled = "the mean of all tokens' states" if encoder.get("pooling") == "mean" else "the last token's state"
    seen = "; each attends to all tokens of the prompt" if encoder.get("attention") == "bidirectional" else ""
    return f"{numbered}, the vector is {pooled}{seen}"


def _front_matter(settings: dict[str, Any], metrics: Sequence[tuple[str, float]]) -> str:
    licence, data = settings["licence"], settings["dataset"]
    known = licence.lower() if re.fullmatch(r"[A-Za-z]+-[\d.]+", licence) else None  # such as Apache-2.0
    backbone = settings["backbone"]
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", backbone) and not Path(backbone).exists()
    card = ModelCardData(
        model_name=f"vlm2rec adapter on {Path(backbone).name}",
        base_model=backbone if on_hub else Path(backbone).name,
        library_name="peft" if settings.get("kind", "lora") == "lora" else "vlm2rec",
        license=known or "other",
        license_name=None if known else licence,
        pipeline_tag=_TASK,
        tags=["vlm2rec", "lora", "sequential-recommendation", "embeddings"],
        eval_results=[
            EvalResult(
                task_type=_TASK,
                dataset_type="vlm2rec",
                dataset_name=f"{data['name']} (validation)",
                metric_type=name,
                metric_name=name,
                metric_value=round(value, 4),
            )
            for name, value in metrics
        ],
    )
    return card.to_yaml().strip()


def _prompts(encoder: dict[str, Any]) -> dict[str, Prompt]:
    style = encoder.get(schema.stored_name("prompt_style"), "vlm2rec")
    items = 2 if style in HISTORY_STYLES else 1
    asked = style, str(encoder.get("instruction", ""))
    text = str(encoder.get("item_text", schema.TITLE))
    placeholder = "ATTRIBUTES" if text == schema.ALL_COLUMNS or "," in text else text.upper()
    if text == "attributes":  # SDA's
        placeholder = prompts.attributes_text("TITLE", "CATEGORY", "BRAND")
    if encoder["fusion"] == "internal":
        together = (
            prompts.item_prompt([placeholder] * 2, *asked) if items > 1 else prompts.note_prompt(placeholder, style)
        )
        return {"title and image": together}
    both = {
        schema.TEXT: prompts.text_prompt([placeholder] * items, *asked),
        schema.IMAGE: prompts.image_prompt(items, *asked),
    }
    return {view: prompt for view, prompt in both.items() if encoder["views"] in (view, "both")}


def _shown(prompt: Prompt) -> str:
    return "".join("IMAGE" if part is IMAGE_HERE else part for part in prompt if part != READ_HERE)
