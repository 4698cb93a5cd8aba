"""`vlm2rec import-adapter`: a PEFT adapter of another program in, an adapter folder like those of finetune out.

The adapter's two files are copied as they are. Added are the settings of the encoder, which nobody but the user knows,
vectors of a few generated items (the canary), and where the adapter comes from.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from vlm2rec.embedder.adapters import lora, peft_folder
from vlm2rec.embedder.contract import provenance, publish, schema
from vlm2rec.embedder.contract.checksums import checksums
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.settings import EncoderSettings
from vlm2rec.pipelines.config import ImportAdapterConfig
from vlm2rec.pipelines.console import summary

_NOT_THEIRS = ("late_fusion",)  # a gate of ours, which no adapter of another program has


def run(config: ImportAdapterConfig) -> dict[str, Any]:
    """Write the adapter folder, whole or not at all; return what its `vlm2rec.json` says.

    Raises:
        ConfigError: the adapter is one of ours already, or --out holds something else than an earlier import.
        ModelError: adapter or backbone cannot be loaded, or do not fit each other; the adapter has no effect.
    """
    _require_foreign(config.adapter)
    _require_free(config.out, config.adapter)
    encoder = ItemEncoder.load(
        config.backbone,
        config.adapter,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        **{
            field.name: getattr(config, field.name)
            for field in fields(EncoderSettings)
            if field.name not in _NOT_THEIRS
        },
    )
    titles, images = lora.canary_items()
    canary = lora.Canary(titles, images, encoder.encode_items(titles, images).fused, encoder.provenance["dtype"])
    with publish.whole_folder(config.out) as folder, publish.plain_disk_errors(config.out):
        settings = _provenance(config, encoder)
        lora.save_imported(config.adapter, folder, settings, canary, _card(settings))
    about = settings["imported"]
    summary(
        "Adapter imported",
        {
            "adapter": f"{about['peft']}, rank {about['rank']}, α {about['alpha']:g}, of {config.adapter}",
            "trained on": about.get("base_model_name_or_path", "its config does not say; nothing here can tell"),
            "backbone": f"{config.backbone} (licence: {settings['licence']})",
            "folder": config.out,
        },
    )
    return settings


def _require_foreign(folder: Path) -> None:
    if lora.is_foreign(folder):
        return
    found = f"{folder} is no PEFT folder of another program"
    if not folder.is_dir():
        found = f"there is no folder {folder}"
    elif (folder / schema.ADAPTER_FILE).is_file():
        found = f"{folder} is an adapter folder of vlm2rec already"
    raise ConfigError(
        found,
        f"a folder with {peft_folder.CONFIG_FILE} and {peft_folder.WEIGHTS_FILE}, as PEFT writes it",
        "check the path; export-items takes a folder of vlm2rec as --adapter as it is",
    )


def _require_free(out: Path, plain: Path) -> None:
    """Raise `ConfigError` unless `out` is free, or an earlier import with nothing else in it."""
    if out.resolve() == plain.resolve():
        raise ConfigError(f"--out {out} is the folder of the adapter itself", "a new folder", "choose another --out")
    try:
        ours = "imported" in schema.read_json(out / schema.ADAPTER_FILE, "", "")
    except ArtifactError:
        ours = False
    publish.require_ours(out, "an earlier import", ours=ours, only=(schema.ADAPTER_FILE, *lora.FILES) if ours else None)


def _provenance(config: ImportAdapterConfig, encoder: ItemEncoder) -> dict[str, Any]:
    """Return the content of `vlm2rec.json`, but for the hashes of the folder's files."""
    about = peft_folder.described(config.adapter)
    return {
        "schema_version": schema.SCHEMA_VERSION,
        "backbone": config.backbone,
        "licence": lora.backbone_licence(config.backbone),
        "backbone_settings": encoder.fingerprint,
        "encoder": encoder.settings.stored(),
        "training": {"method": "imported", "loss": f"another program's ({about['peft']})"},
        "imported": {
            "folder": str(config.adapter.resolve()),
            "sha256": checksums(config.adapter, (peft_folder.CONFIG_FILE, peft_folder.WEIGHTS_FILE)),
            "created": provenance.created(),
            **about,
        },
        "versions": provenance.library_versions(provenance.OURS, "torch", "transformers", "peft"),
    }


def _card(settings: dict[str, Any]) -> str:
    """Return the README of the folder."""
    about, backbone = settings["imported"], settings["backbone"]
    base = about.get("base_model_name_or_path", "an unnamed model")
    return f"""---
library_name: peft
tags: [vlm2rec, lora, embeddings]
---

# Imported adapter ({about["peft"]}, rank {about["rank"]})

Made by another program on `{base}`; `vlm2rec import-adapter` added prompts, canary and origin for `{backbone}`.
The licences of the adapter and of the backbone apply ({settings["licence"]}).

    vlm2rec export-items --data DATA --backbone {backbone} --adapter THIS_FOLDER --out EMBEDDINGS
"""
