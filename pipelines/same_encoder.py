"""Whether an encoder is the one that made an embeddings folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ArtifactError


def require_same_encoder(
    encoder: Mapping[str, Any],
    exported: Mapping[str, Any],
    where: object,
    backbone: object,
    revision: str | None = None,
) -> None:
    """Raise `ArtifactError` naming the first setting in which an encoder differs from that of an export.

    Args:
        encoder: the encoder's fingerprint.
        exported: the settings of the export.
        where: the embeddings folder, or an index of it.
        backbone: the model's folder or hub id.
        revision: of a hub backbone.
    """
    from vlm2rec.embedder.backbones.model_files import hash_like

    for name, value in encoder.items():
        # a table exported in bf16 on a GPU may be compared with float32 vectors from a CPU
        if name in ("dtype", schema.MADE_WITH) or name not in exported or exported[name] == value:
            continue
        # a table of an earlier version has another kind of hash
        if name == "backbone_hash" and exported[name] == hash_like(exported[name], str(backbone), revision):
            continue
        raise ArtifactError(
            f"{where} was exported with {name} = {exported[name]!r}, this encoder has {value!r}",
            "the same backbone and adapter for users and items, and for searches",
            "give the --backbone and --adapter of the export, or export again",
        )


def is_folder(named: object) -> bool:
    """Tell whether a folder of this name is on this machine."""
    try:
        return isinstance(named, str | Path) and Path(named).is_dir()
    except (OSError, ValueError):  # no name that a file can have
        return False
