"""`vlm2rec shorten`: a finished export again, with shorter vectors or smaller numbers; nothing is encoded."""

from __future__ import annotations

from typing import Any

from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.embedder.export.shorten import shorten
from vlm2rec.pipelines.config import ShortenConfig
from vlm2rec.pipelines.console import TERMINAL
from vlm2rec.pipelines.export_items import print_summary


def run(config: ShortenConfig) -> dict[str, Any]:
    """Write the folder of short vectors, print what it holds, and return its manifest.

    Raises:
        ConfigError: nothing would be shorter, or --dim does not fit the vectors.
        ArtifactError: the export is unfinished, damaged or short itself, or --out belongs to something else.
    """
    if config.dim is None and config.precision == "float32":
        raise ConfigError(
            "neither --dim nor --precision is given",
            "fewer dimensions, or a smaller number format",
            "give --dim, or --precision float16, int8 or binary",
        )
    manifest = shorten(config.embeddings, config.out, dim=config.dim, storage=config.precision, reporter=TERMINAL)
    print_summary(manifest, config.out)
    return manifest
