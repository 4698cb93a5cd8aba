"""The encoder of whole histories, as Task 1 and `export-users` use it: that of the embeddings folder, and no other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError
from vlm2rec.embedder.options import HISTORY_STYLES
from vlm2rec.pipelines.config import EvaluateConfig, ExportUsersConfig
from vlm2rec.pipelines.console import TERMINAL, log
from vlm2rec.pipelines.same_encoder import require_same_encoder

if TYPE_CHECKING:
    from vlm2rec.embedder.encoders.item_encoder import ItemEncoder

UserSource = Literal["sequence", "mean"]


EncoderChoice = EvaluateConfig | ExportUsersConfig


def user_source(config: EncoderChoice, manifest: Mapping[str, Any]) -> UserSource:
    """Return whence the users' vectors come: the encoder of sequences, or the mean of the history's items.

    Raises:
        ConfigError: `sequence` without a backbone, or with prompts that are about single items.
    """
    single_items = manifest["settings"].get(schema.stored_name("prompt_style"), "vlm2rec") not in HISTORY_STYLES
    if config.users_from == "auto":
        return "mean" if config.backbone is None or single_items else "sequence"
    if config.users_from == "sequence" and single_items:
        raise ConfigError(
            f"--users-from sequence with {config.embeddings}, whose prompts are for single items",
            "--users-from mean",
            "leave --users-from out",
        )
    if config.users_from == "sequence" and config.backbone is None:
        raise ConfigError(
            "--users-from sequence without --backbone",
            "the backbone of the export",
            "give --backbone and its --adapter",
        )
    return config.users_from


def encoder_fingerprint(config: EncoderChoice, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fingerprint that `history_encoder` will have; no weights are read.

    Raises:
        ArtifactError, ModelError, ConfigError: as `history_encoder`, as far as it can be known without the weights.
    """
    from vlm2rec.embedder.encoders.settings import fingerprint_of

    assert config.backbone is not None
    given = _settings(config, manifest)
    found = fingerprint_of(
        config.backbone, config.adapter, revision=config.revision, dtype=config.dtype, device=config.device, **given
    )
    _require(found, manifest, config)
    return found


def _settings(config: EncoderChoice, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the table; none if the adapter has its own."""
    from vlm2rec.embedder.adapters.lora import is_foreign
    from vlm2rec.embedder.encoders.settings import EncoderSettings

    exported = manifest["settings"]
    if "source" in exported:  # imported vectors, those of a frozen encoder, or of prompts about one item
        raise ArtifactError(
            f"--backbone with {config.embeddings}, whose vectors come from another source ({exported['source']})",
            "an embeddings folder that export-items wrote without --strategy: only its encoder can read histories",
            "leave --backbone out: a user's vector is then the mean of the history's item vectors",
        )
    settings = asdict(EncoderSettings.of_export(exported))
    return settings if config.adapter is None or is_foreign(config.adapter) else {}


def history_encoder(config: EncoderChoice, dataset: Dataset, manifest: Mapping[str, Any]) -> ItemEncoder:
    """Load the sequence encoder; it must be the encoder that made the table.

    Raises:
        ArtifactError: the table has another source, or this encoder has other settings.
        DataError: the encoder reads images, and they are not there.
        ModelError, ConfigError: as `ItemEncoder.load`.
    """
    from vlm2rec.embedder.encoders.cache_choice import use_vision_cache
    from vlm2rec.embedder.encoders.item_encoder import ItemEncoder

    settings = _settings(config, manifest)
    if schema.IMAGE in schema.modalities_of(manifest["views"]):
        dataset.require_images()
    assert config.backbone is not None
    encoder = ItemEncoder.load(
        config.backbone,
        config.adapter,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        token_budget=config.token_budget,
        **settings,
    )
    _require(encoder.fingerprint, manifest, config)
    use_vision_cache(config.vision_cache, dataset, encoder, config.backbone, config.revision, TERMINAL)
    return encoder


def say_of_unreadable(unreadable: Mapping[str, str]) -> None:
    """Say how many images of histories could not be read."""
    for name, reason in list(unreadable.items())[:1]:
        log.print(f"{len(unreadable)} unreadable images were replaced by white ones; item {name}: {reason}")


def _require(found: Mapping[str, Any], manifest: Mapping[str, Any], config: EncoderChoice) -> None:
    from vlm2rec.embedder.export.short import full_settings

    require_same_encoder(
        found, full_settings(manifest["settings"]), config.embeddings, config.backbone, config.revision
    )
