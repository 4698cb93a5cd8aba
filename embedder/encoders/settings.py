"""Everything that decides a vector, before any weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypedDict, Unpack, get_args, get_type_hints

from transformers import AutoConfig

from vlm2rec.embedder import prompts
from vlm2rec.embedder.adapters import lora
from vlm2rec.embedder.backbones import model_files
from vlm2rec.embedder.backbones.devices import pick_device, pick_dtype
from vlm2rec.embedder.backbones.families import checked_files, load_processor, read_model_config
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ConfigError, ModelError
from vlm2rec.embedder.options import (
    HISTORY_STYLES,
    Attention,
    DeviceName,
    DtypeName,
    FusionMode,
    FusionNorm,
    LateFusion,
    Pooling,
    PromptMode,
    PromptStyle,
    ViewChoice,
    defaults_of_style,
)

_LARGEST = 2**31  # of a number in an adapter's settings
_LONGEST = 1000  # characters of a list of columns
# settings that came later: with the default, they are left out of a fingerprint, so that earlier exports can continue
_LATER = ("prompt_style", "attention", "late_fusion", "item_text", "instruction")


@dataclass(frozen=True)
class EncoderSettings:
    """The settings that decide a vector, apart from weights. An adapter folder stores them; an export reads them."""

    fusion: FusionMode = "external"  # two prompts summed, or one interleaved prompt
    fusion_norm: FusionNorm = "raw"
    prompt_mode: PromptMode = "raw"
    max_pixels: int = 224 * 224
    max_title_tokens: int = 64
    views: ViewChoice = "both"  # with one modality, its vector is the fused vector, and the other one is not read
    pooling: Pooling = "last"
    prompt_style: PromptStyle = "vlm2rec"  # whose prompts; see `options.HISTORY_STYLES`
    attention: Attention = "causal"  # bidirectional: a token sees those after it, too
    late_fusion: LateFusion = "off"  # NoteLLM-2's gate, whose weights are part of an adapter
    item_text: str = schema.TITLE  # columns of the catalogue in the prompts, with commas between; see `item_texts`
    instruction: str = ""  # what the system's turn says, in the style of Qwen3-VL-Embedding; empty: its default

    def __post_init__(self) -> None:
        if not all(name.strip() for name in self.item_text.split(",")) or len(self.item_text) > _LONGEST:
            raise ConfigError(
                f"--item-text {self.item_text[:80]!r}",
                "columns of the catalogue with commas between, such as title,category,brand, or attributes, or all",
                "correct --item-text",
            )
        if self.item_text != schema.TITLE and self.views == schema.IMAGE:
            raise ConfigError(
                f"--item-text {self.item_text} with --views image, which reads no text",
                "--views text or both",
                "leave --item-text out",
            )
        if self.prompt_style == "qwen3-vl-embedding" and (self.prompt_mode, self.pooling) != ("chat", "last"):
            raise ConfigError(
                f"--prompt-style qwen3-vl-embedding with --prompt-mode {self.prompt_mode} and --pooling"
                f" {self.pooling}: its prompts are turns of a chat, and its vector is the state of the last"
                " token",
                "--prompt-mode chat and --pooling last",
                "leave --prompt-mode and --pooling out",
            )
        if self.instruction and (self.prompt_style != "qwen3-vl-embedding" or len(self.instruction) > _LONGEST):
            raise ConfigError(
                f"--instruction of {len(self.instruction)} characters with --prompt-style {self.prompt_style}",
                f"at most {_LONGEST} characters, with --prompt-style qwen3-vl-embedding or --strategy question",
                "leave --instruction out, or choose one of these",
            )
        notes = self.prompt_style in ("notellm2", "notellm2-basic")
        if notes and (self.fusion != "internal" or self.pooling != "last"):
            raise ConfigError(
                f"--prompt-style {self.prompt_style} with --fusion {self.fusion} and --pooling {self.pooling}:"
                " it puts image and text into one prompt, and its vector is the state of the last token",
                "--fusion internal and --pooling last",
                "change them, or choose another --prompt-style",
            )
        if self.prompt_style == "llm2rec" and self.views != schema.TEXT:
            raise ConfigError(
                f"--prompt-style llm2rec with --views {self.views}: its prompt is the title alone",
                "--views text",
                "change --views or --prompt-style",
            )
        if self.late_fusion == "gate" and not notes:
            raise ConfigError(
                f"--late-fusion gate with --prompt-style {self.prompt_style}: the gate joins a vector of NoteLLM-2's"
                " prompt",
                "--late-fusion off, or --method notellm2",
                "leave --late-fusion out",
            )
        if self.fusion == "internal" and self.prompt_style == "sda":
            raise ConfigError(
                "--fusion internal with --prompt-style sda, which has no prompt for a title and an image together",
                "--fusion external, or --prompt-style vlm2rec",
                "change --fusion or --prompt-style",
            )
        if self.item_text == "attributes" and self.prompt_style != "sda":
            raise ConfigError(
                f"--item-text attributes with --prompt-style {self.prompt_style}, whose prompts are about titles",
                "--prompt-style sda, or --item-text title",
                "change --item-text or --prompt-style",
            )
        if self.fusion == "internal" and self.views != "both":
            raise ConfigError(
                f"--fusion internal with --views {self.views}: the interleaved prompt holds titles and images",
                "--fusion external, or --views both",
                "change --fusion or --views",
            )

    @property
    def reads_histories(self) -> bool:
        """Whether there is a prompt for a sequence of items; if not, a user is the mean of the history's items."""
        return self.prompt_style in HISTORY_STYLES

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the embedding table that an encoder fills."""
        if self.fusion == "internal":
            return (schema.FUSED,)
        return schema.VIEWS if self.views == "both" else (schema.FUSED, self.views)

    @classmethod
    def of_export(cls, exported: Mapping[str, Any]) -> EncoderSettings:
        """Return the settings of a finished export, from the `settings` of its manifest."""
        names = {schema.stored_name(field.name): field.name for field in fields(cls)}
        known = {name: exported[key] for key, name in names.items() if key in exported}
        modalities = schema.modalities_of(exported.get("views", schema.VIEWS))
        return cls(**(known | {"views": modalities[0] if len(modalities) == 1 else "both"}))

    @classmethod
    def of_adapter(cls, stored: Mapping[str, Any]) -> EncoderSettings:
        """Return the settings of an adapter, from `encoder` of its `vlm2rec.json`."""
        names = {schema.stored_name(field.name): field.name for field in fields(cls)}
        known = {names.get(key, key): value for key, value in stored.items()}
        hints = get_type_hints(cls)
        for name, value in known.items():
            choices = get_args(hints.get(name))
            fits = value in choices if choices else type(value) is int and 0 < value <= _LARGEST
            fits |= hints.get(name) is str and isinstance(value, str)
            if name not in hints or not fits:
                raise ModelError(
                    f"the adapter was trained with {name} = {str(value)[:80]!r}",
                    f"one of {', '.join(choices)}" if choices else "settings that this version knows",
                    "install a newer vlm2rec, or fine-tune again",
                )
        return cls(**known)

    def stored(self) -> dict[str, Any]:
        """Return the settings under the keys that folders use."""
        return {schema.stored_name(name): value for name, value in asdict(self).items()}

    @classmethod
    def resolve(cls, adapter: Path | None, **given: Unpack[GivenSettings]) -> EncoderSettings:
        """Return the adapter's settings, or the defaults without one, with the explicitly given ones.

        An adapter that another program made has no settings: the given ones and the defaults apply.

        Raises:
            ConfigError: a given setting differs from the one that the adapter was trained with.
            ModelError: the adapter folder is unfinished.
        """
        if adapter is not None and lora.is_foreign(adapter):
            if given.get("late_fusion") == "gate":
                found = f"--late-fusion gate with {adapter}, an adapter that another program made"
                raise ConfigError(
                    found, "an adapter of --method notellm2, which holds a gate", "leave --late-fusion out"
                )
            adapter = None
        base = cls() if adapter is None else cls.of_adapter(lora.read_adapter(adapter)["encoder"])
        chosen = {name: value for name, value in given.items() if value is not None}
        if strange := chosen.keys() - {field.name for field in fields(cls)}:
            raise TypeError(f"{', '.join(sorted(strange))}: not a setting of an encoder")
        for name, value in chosen.items():
            trained = getattr(base, name)
            if adapter is not None and value != trained:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(
                    f"{flag} is {value!r}, but the adapter {adapter} was trained with {trained!r}",
                    f"{trained!r}",
                    f"leave {flag} out",
                )
        of_style = {} if adapter is not None else defaults_of_style(chosen.get("prompt_style"))
        return cls(**(asdict(base) | of_style | chosen))


class GivenSettings(TypedDict, total=False):
    """Fields of `EncoderSettings` that a caller may give; None means the adapter's, or the default."""

    fusion: FusionMode | None
    fusion_norm: FusionNorm | None
    prompt_mode: PromptMode | None
    max_pixels: int | None
    max_title_tokens: int | None
    views: ViewChoice | None
    pooling: Pooling | None
    prompt_style: PromptStyle | None
    attention: Attention | None
    late_fusion: LateFusion | None
    item_text: str | None
    instruction: str | None


def fingerprint_of(
    backbone: model_files.Source,
    adapter: Path | None = None,
    *,
    revision: str | None = None,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    **given: Unpack[GivenSettings],
) -> dict[str, Any]:
    """Return what `ItemEncoder.load(...).fingerprint` will be, from config files alone: no weights are read.

    Two encoders with equal settings give equal vectors up to float noise. The key `MADE_WITH` holds what decides no
    vector, and is kept apart in a manifest: the names of backbone and adapter, and what the adapter learned from.

    Raises:
        ModelError, ConfigError: as `ItemEncoder.load`, as far as it can be known without the weights.
    """
    settings = EncoderSettings.resolve(adapter, **given)
    files = checked_files(backbone, revision)
    processor = load_processor(files, None, settings.max_pixels)
    model_type = read_model_config(files)["model_type"]
    if processor.family.text_only and settings.views != schema.TEXT:
        raise ConfigError(
            f"{files.source} is a text model ({model_type}), and --views {settings.views} needs one that takes images",
            "--views text with a text model",
            "give --views text (in finetune with --loss sft), or a vision-language model as --backbone",
        )
    decisive = settings.stored()
    for name in _LATER:
        if getattr(settings, name) == getattr(EncoderSettings, name):
            del decisive[schema.stored_name(name)]
    return {
        "backbone_hash": model_files.backbone_hash(files),
        "processor_hash": model_files.processor_hash(files),
        "model_type": model_type,
        **({"adapter": None} if adapter is None else lora.fingerprint(adapter)),
        "prompt_hash": prompts.prompt_hash(
            settings.prompt_mode,
            processor.chat_template,
            settings.prompt_style,
            settings.item_text,
            settings.instruction,
        ),
        "dim": int(text_config(files.folder).hidden_size),
        "dtype": str(pick_dtype(dtype, pick_device(device))).removeprefix("torch."),
        **decisive,
        "views": list(settings.columns),  # the columns, not the setting's one word, because readers need columns
        schema.MADE_WITH: files.described | ({} if adapter is None else {"adapter": lora.described(adapter)}),
    }


def text_config(folder: Path) -> Any:
    """Return the config of the language model in a model folder."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    except model_files.UNLOADABLE as error:
        raise ModelError(
            f"{folder / 'config.json'} cannot be used ({model_files.first_line(error)})",
            "the config of a supported model",
            "download the model folder again",
        ) from error
