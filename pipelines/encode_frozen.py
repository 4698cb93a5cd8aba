"""`vlm2rec encode-frozen`: every item once through a small frozen encoder, into an embeddings folder."""

from __future__ import annotations

from typing import Any

from vlm2rec.embedder.frozen_encoders import frozen_settings, load_frozen
from vlm2rec.pipelines.config import EncodeFrozenConfig
from vlm2rec.pipelines.export_items import export_as_told


def run(config: EncodeFrozenConfig) -> dict[str, Any] | None:
    """Encode every item of a dataset and return the manifest; an interrupted run goes on where it stopped.

    Raises:
        DataError: the dataset cannot be used, or an image cannot and the policy is `fail`.
        ModelError, ConfigError: as `load_frozen`.
        ArtifactError: the output folder is of another export, in use, not writable, or full.
        FailureLimitError: the folder is complete, but more items failed than `max_failures` allows.
    """
    given: dict[str, Any] = {
        "kind": config.kind,
        "pooling": config.pooling,
        "fusion_norm": config.fusion_norm,
        "dtype": config.dtype,
        "device": config.device,
    }
    return export_as_told(
        config,
        frozen_settings(config.encoder, **given),
        lambda _: load_frozen(config.encoder, token_budget=config.token_budget, **given),
        config.on_image_error,
    )
