"""A backbone with its adapter merged, as a folder that `sentence_transformers.SentenceTransformer(path)` opens.

    config.json  model.safetensors  tokenizer.json ...     the merged model, its processor
    chat_template.jinja                                    the prompts of an item
    modules.json  sentence_bert_config.json  1_Pooling/    Transformer, then the last token's state

The folder holds no code, so none has to be trusted. sentence-transformers applies the folder's chat template to every
input. This template turns a title into P_T and an image into P_V. It prepares a title as `Backbone.prepare_title` does,
except for the cut to `max_title_tokens`, which a template cannot do. `encode(title)` is then the item's text vector and
`encode(image)` its image vector. With external fusion their sum is the fused vector; with internal fusion
`encode({"text": title, "image": image})` is.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

from vlm2rec.embedder import prompts
from vlm2rec.embedder.backbones.families import breakable_tokens
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ModelError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.prompts import Prompt

_TITLE = "\ue000"  # a private character: no prompt or template holds it
_MODULES = (
    ("0", "", "sentence_transformers.models.Transformer"),
    ("1", "1_Pooling", "sentence_transformers.models.Pooling"),
)
# settings that some processors keep outside their parts
_PROCESSOR_SETTINGS = (
    "image_seq_len",
    "image_seq_length",
    "image_token",
    "num_additional_image_tokens",
    "patch_size",
    "vision_feature_select_strategy",
)
_FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}


def write_sentence_transformer(encoder: ItemEncoder, out: Path, card: str) -> None:
    """Write the folder.

    Args:
        encoder: the encoder, with its adapter merged, on the CPU or a GPU.
        out: an existing folder.
        card: the text of its README.md.

    Raises:
        ModelError: the family's own way with a single image is not the encoder's.
    """
    backbone = encoder.backbone
    family = backbone.processor.family
    if family.several and schema.IMAGE in encoder.modalities:
        raise ModelError(
            f"sentence-transformers cuts an image that stands alone into tiles for {family.model_type}, and vlm2rec"
            " takes it whole",
            "a backbone of another family, or an adapter for titles alone (--views text)",
            "choose another --to",
        )
    backbone.model.save_pretrained(str(out))
    _save_processor(encoder, out)
    modules = [{"idx": int(name), "name": name, "path": path, "type": kind} for name, path, kind in _MODULES]
    schema.write_text(out / "modules.json", json.dumps(modules, indent=2) + "\n")
    modalities = dict.fromkeys(encoder.modalities, _FORWARD)
    transformer = {
        "transformer_task": "feature-extraction",
        "modality_config": {**modalities, "message": {**_FORWARD, "format": "structured"}},
        "module_output_name": "token_embeddings",
    }
    schema.write_json(out / "sentence_bert_config.json", transformer)
    (out / "1_Pooling").mkdir()
    pooling = {"embedding_dimension": encoder.dim, "pooling_mode": "lasttoken", "include_prompt": True}
    schema.write_json(out / "1_Pooling" / "config.json", pooling)
    schema.write_json(
        out / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    schema.write_text(out / "README.md", card)


def model_readme(
    encoder: ItemEncoder, backbone: str, adapter: str | None, licence: str, short: int | None = None
) -> str:
    """Return the README of the folder: where the model comes from, and how to call it.

    `short` is how many numbers of each vector the export kept, if it did not keep all.
    """
    fingerprint_of = encoder.settings
    if fingerprint_of.fusion == "internal":
        ask = 'model.encode({"text": title, "image": image})  # the item'
    else:
        calls = {schema.TEXT: "model.encode(title)", schema.IMAGE: "model.encode(image)"}
        ask = "\n".join(f"{calls[modality]}  # the {modality} vector" for modality in encoder.modalities)
        if len(encoder.modalities) == 2:
            unit = " of both at length 1" if fingerprint_of.fusion_norm == "normalised" else ""
            ask += f"\n# their sum{unit} is the fused vector"
    kept = (
        ""
        if short is None
        else f"""
The export kept the first {short} numbers of a vector, one long. To get the same, give the model `truncate_dim={short}`
and `encode` the argument `normalize_embeddings=True`.
"""
    )
    return f"""---
library_name: sentence-transformers
pipeline_tag: feature-extraction
license: other
license_name: {json.dumps(licence)}
tags: [vlm2rec, sentence-transformers, sequential-recommendation]
---

# Item embeddings of vlm2rec

`{backbone}`{f" with the adapter `{adapter}` merged" if adapter else ""}. The backbone's licence applies: {licence}.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("THIS_FOLDER")
{ask}
```
{kept}
The chat template holds the prompts (mode `{fingerprint_of.prompt_mode}`). It cannot cut titles: vlm2rec cuts them to
{fingerprint_of.max_title_tokens} tokens, so longer ones get another vector here. Images: up to
{fingerprint_of.max_pixels} pixels, or the backbone's fixed size. Qwen, InternVL, SmolVLM and Gemma 4 models need
torchvision (`pip install 'sentence-transformers[image]' torchvision`); its resize differs in the third decimal from
Pillow's, which vlm2rec takes.
"""


def _save_processor(encoder: ItemEncoder, out: Path) -> None:
    processor = encoder.backbone.processor
    tokenizer = copy.deepcopy(encoder.backbone.tokenizer)
    tokenizer.chat_template = chat_template(encoder)
    tokenizer.save_pretrained(str(out))
    family = processor.family
    if family.text_only:
        return
    processor.image_processor.save_pretrained(str(out))
    own = {name: getattr(processor, name) for name in _PROCESSOR_SETTINGS if hasattr(processor, name)}
    schema.write_json(out / "processor_config.json", {"processor_class": family.processor, **own})


def chat_template(encoder: ItemEncoder) -> str:
    """Return the Jinja template that turns one user message, a title or an image or both, into the item's prompt."""
    if encoder.settings.fusion == "internal":
        forms = {"title is not none and images == 1": prompts.item_prompt([_TITLE])}
    else:
        both = {
            schema.TEXT: ("title is not none and images == 0", prompts.text_prompt([_TITLE])),
            schema.IMAGE: ("title is none and images == 1", prompts.image_prompt(1)),
        }
        forms = dict(both[modality] for modality in encoder.modalities)
    tokens = breakable_tokens(encoder.backbone.tokenizer)
    lines = [
        "{%- set seen = namespace(title=none, images=0) -%}",
        "{%- for message in messages -%}{%- if message['content'] is string -%}",
        "{%- set seen.title = message['content'] -%}",
        "{%- else -%}{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}",
        "{%- set seen.images = seen.images + 1 -%}",
        "{%- elif part['type'] == 'text' -%}{%- set seen.title = part['text'] -%}{%- endif -%}",
        "{%- endfor -%}{%- endif -%}{%- endfor -%}",
        "{%- if seen.title is not none -%}",
        "{%- set seen.title = seen.title.replace('\\u0000', ' ').split() | join(' ') -%}",
        f"{{%- for token in {_literal(tokens)} -%}}",  # as in `neutralise`
        "{%- set seen.title = seen.title.replace(token, token[0] ~ ' ' ~ token[1:]) -%}{%- endfor -%}{%- endif -%}",
        "{%- set title = seen.title -%}{%- set images = seen.images -%}",
    ]
    branch = "if"
    for condition, prompt in forms.items():
        before, title, after = _rendered(encoder, prompt).partition(_TITLE)
        middle = " ~ title ~ " if title else " ~ "
        lines.append(f"{{%- {branch} {condition} -%}}{{{{- {_literal(before)}{middle}{_literal(after)} -}}}}")
        branch = "elif"
    takes = "title and its image together" if encoder.settings.fusion == "internal" else "title or one image"
    lines.append(f"{{%- else -%}}{{{{- raise_exception('this model takes one {takes}') -}}}}{{%- endif -%}}")
    return "".join(lines)


def _rendered(encoder: ItemEncoder, prompt: Prompt) -> str:
    """Return a prompt as text that gives the same tokens as in the encoder."""
    backbone, tokenizer = encoder.backbone, encoder.backbone.tokenizer
    text = prompts.render(prompt, encoder.settings.prompt_mode, backbone.processor)
    if not backbone.processor.family.text_only:  # a processor adds the begin-of-sequence token if it is missing
        return text
    wanted = tokenizer(text, add_special_tokens=not text.startswith(tokenizer.bos_token or "\0"))["input_ids"]
    # a tokenizer adds no such token before a template's text, and Llama's adds no space after one in the text
    for start in ("", tokenizer.bos_token or "", f"{tokenizer.bos_token or ''} "):
        if tokenizer(start + text, add_special_tokens=False)["input_ids"] == wanted:
            return start + text
    raise ModelError(
        "no chat template of this tokenizer gives the tokens of the prompt",
        "a tokenizer that adds at most a begin-of-sequence token before a text",
        "use vlm2rec itself to encode with this backbone",
    )


def _literal(value: str | list[str]) -> str:
    """Return a value as a Jinja literal; in ASCII only, as a template may be read in any encoding."""
    return json.dumps(value)
