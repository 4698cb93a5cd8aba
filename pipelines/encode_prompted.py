"""`vlm2rec encode-prompted`: every item once through a prompted, untrained backbone, into an embeddings folder."""

from __future__ import annotations

from typing import Any

from vlm2rec.embedder.prompted import PromptedEncoder, prompted_settings
from vlm2rec.pipelines.config import EncodePromptedConfig
from vlm2rec.pipelines.export_items import export_as_told


def run(config: EncodePromptedConfig) -> dict[str, Any] | None:
    """Encode every item of a dataset and return the manifest; an interrupted run goes on where it stopped.

    An item without a readable image is a failure row: title and image are asked about together.

    Raises:
        DataError: the dataset cannot be used.
        ModelError, ConfigError: as `PromptedEncoder.load`.
        ArtifactError: the output folder is of another export, in use, not writable, or full.
        FailureLimitError: the folder is complete, but more items failed than `max_failures` allows.
    """
    given: dict[str, Any] = {
        "revision": config.revision,
        "instruction": config.instruction,
        "prompt_mode": config.prompt_mode,
        "max_pixels": config.max_pixels,
        "max_title_tokens": config.max_title_tokens,
        "dtype": config.dtype,
        "device": config.device,
    }
    return export_as_told(
        config,
        prompted_settings(config.backbone, **given),
        lambda _: PromptedEncoder.load(config.backbone, token_budget=config.token_budget, **given),
        "null",
    )
