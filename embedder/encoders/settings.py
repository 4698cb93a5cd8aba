"""Everything that decides a vector, before any weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from vlm2rec.embedder import prompts
from vlm2rec.embedder.backbones import lora
from vlm2rec.embedder.backbones.devices import pick_device, pick_dtype
from vlm2rec.embedder.backbones.families import load_processor, read_model_config
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.embedder.options import (
    DeviceName,
    DtypeName,
    FusionMode,
    FusionNorm,
    Pooling,
    PromptMode,
    PromptStyle,
    ViewChoice,
)


@dataclass(frozen=True)
class EncoderSettings:
    """What decides a vector, apart from weights. Stored with the adapter; an export takes them from there."""

    fusion: FusionMode = "external"  # two prompts summed, or one interleaved prompt
    fusion_norm: FusionNorm = "raw"
    prompt_mode: PromptMode = "raw"
    max_pixels: int = 224 * 224
    max_title_tokens: int = 64
    views: ViewChoice = "both"  # one modality alone: its vector is the fused vector, the other one is not read
    pooling: Pooling = "last"
    wording: PromptStyle = "vlm2rec"  # the prompts of VLM2Rec, for sequences, or those of SDA, for single items

    def __post_init__(self) -> None:
        if self.fusion == "internal" and self.wording == "sda":
            raise ConfigError(
                "--fusion internal with --wording sda, which has no prompt for a title and an image together",
                "--fusion external, or --wording vlm2rec",
                "change one of the two",
            )
        if self.fusion == "internal" and self.views != "both":
            raise ConfigError(
                f"--fusion internal with --views {self.views}: the interleaved prompt holds titles and images",
                "--fusion external, or --views both",
                "change one of the two",
            )

    @property
    def reads_histories(self) -> bool:
        """Whether there is a prompt for a sequence of items; else a user is the mean of the history's items."""
        return self.wording == "vlm2rec"

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the embedding table that are filled."""
        if self.fusion == "internal":
            return (schema.FUSED,)
        return schema.VIEWS if self.views == "both" else (schema.FUSED, self.views)

    @classmethod
    def of_export(cls, exported: Mapping[str, Any]) -> EncoderSettings:
        """Return the settings of a finished export, from the `settings` of its manifest."""
        known = {field.name: exported[field.name] for field in fields(cls) if field.name in exported}
        modalities = schema.modalities_of(exported.get("views", schema.VIEWS))
        return cls(**(known | {"views": modalities[0] if len(modalities) == 1 else "both"}))

    @classmethod
    def resolve(cls, adapter: Path | None, **given: Any) -> EncoderSettings:
        """Return the adapter's settings, or the defaults without one, with what was given explicitly.

        Raises:
            ConfigError: a given setting differs from the adapter's: it was trained otherwise.
            ModelError: the adapter folder is unfinished.
        """
        base = cls(**lora.read_adapter(adapter)["encoder"]) if adapter is not None else cls()
        chosen = {name: value for name, value in given.items() if value is not None}
        for name, value in chosen.items():
            trained = getattr(base, name)
            if adapter is not None and value != trained:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(
                    f"{flag} is {value!r}, but the adapter {adapter} was trained with {trained!r}",
                    f"{trained!r}",
                    f"leave {flag} out",
                )
        return cls(**(asdict(base) | chosen))


def encoder_settings(
    backbone: str,
    adapter: Path | None = None,
    *,
    revision: str | None = None,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    **given: Any,
) -> dict[str, Any]:
    """Return what `ItemEncoder.load(...).settings` will be, from config files alone: no weights are read into a model.

    Two encoders with equal settings give equal vectors up to float noise.

    Raises:
        ModelError, ConfigError: as `ItemEncoder.load`, as far as it can be known without the weights.
    """
    settings = EncoderSettings.resolve(adapter, **given)
    processor = load_processor(backbone, revision, settings.max_pixels)
    model_type = read_model_config(backbone, revision)["model_type"]
    if processor.family.text_only and settings.views != schema.TEXT:
        raise ConfigError(
            f"{backbone} is a text model ({model_type}), and --views {settings.views} needs one that sees images",
            "--views text with a text model",
            "give --views text (in finetune with --loss sft), or a vision-language model as --backbone",
        )
    decisive = asdict(settings)
    if settings.wording == EncoderSettings.wording:  # exports from before it existed can go on
        del decisive["wording"]
    return {
        "backbone": backbone if not Path(backbone).is_dir() else Path(backbone).resolve().name,
        "revision": revision,
        "backbone_hash": lora.backbone_hash(backbone, revision),
        "model_type": model_type,
        "adapter": None if adapter is None else lora.adapter_hash(adapter),
        "prompt_hash": prompts.prompt_hash(settings.prompt_mode, processor.chat_template, settings.wording),
        "dim": int(AutoConfig.from_pretrained(backbone, revision=revision or "main").get_text_config().hidden_size),
        "dtype": str(pick_dtype(dtype, pick_device(device))).removeprefix("torch."),
        **decisive,
        "views": list(settings.columns),  # not the setting's one word: readers look for columns
    }
