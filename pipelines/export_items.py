"""`vlm2rec export-items`: encodes every item of a dataset once, into an embeddings folder.

`SOURCES` lists the encoders and the settings that choose them. `embedder.export.export` takes any encoder and can be
called from Python.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm2rec.downstream.evaluation.geometry import effective_ranks, first_vectors
from vlm2rec.embedder.adapters.lora import backbone_licence
from vlm2rec.embedder.backbones.devices import pick_device
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ConfigError, FailureLimitError
from vlm2rec.embedder.contract.printable import size
from vlm2rec.embedder.contract.storage import Location
from vlm2rec.embedder.encoders.cache_choice import use_vision_cache
from vlm2rec.embedder.encoders.frozen import frozen_fingerprint, load_frozen
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.prompted import PromptedEncoder, prompted_fingerprint
from vlm2rec.embedder.encoders.settings import EncoderSettings, fingerprint_of
from vlm2rec.embedder.encoders.strategies import load_strategy, strategy_fingerprint
from vlm2rec.embedder.export import shards
from vlm2rec.embedder.export.distribute import Distribution
from vlm2rec.embedder.export.estimate import describe, estimate
from vlm2rec.embedder.export.export import export, plan_export
from vlm2rec.embedder.export.reuse import Reuse, open_earlier_rows, plan_work
from vlm2rec.embedder.export.worker import Encoder, ShardMaker
from vlm2rec.pipelines import console
from vlm2rec.pipelines.catalogue.vector_files import ID_FILES, read_ids
from vlm2rec.pipelines.config import ExportConfig
from vlm2rec.pipelines.console import TERMINAL
from vlm2rec.pipelines.verify import in_shards, of_catalogue, warn_of_collapse, warn_of_lengths


@dataclass(frozen=True)
class Source:
    """A source of vectors: an encoder, and the settings of the command that belong to it."""

    name: str  # the flag that chooses this source
    applies: Callable[[ExportConfig], bool]
    takes: tuple[str, ...]
    fingerprint: Callable[..., dict[str, Any]]
    load: Callable[..., Encoder]

    def given(self, config: ExportConfig) -> dict[str, Any]:
        """Return the arguments of `fingerprint` and `load`; settings that are None or auto keep their defaults."""
        names = {*self.takes, "dtype", "device"} - {"vision_cache"}  # the cache is opened after the encoder is loaded
        return {name: value for name in names if (value := getattr(config, name)) not in (None, "auto")}

    def again(self, config: ExportConfig) -> dict[str, Any]:
        """Return the settings that load the same encoder another time, as JSON; a local folder by its full path."""
        given = {name: value for name, value in self.given(config).items() if name not in ("dtype", "device")}
        return {name: _full_path(value) for name, value in given.items()}


def _full_path(value: Any) -> Any:
    local = isinstance(value, Path) or (isinstance(value, str) and "/" in value and Path(value).is_dir())
    return str(Path(value).expanduser().resolve()) if local else value


_BACKBONE = ("backbone", "revision", "prompt_mode", "max_pixels", "max_title_tokens")
_ITEMS = (*_BACKBONE, "adapter", *(field.name for field in dataclasses.fields(EncoderSettings)), "vision_cache")

# the first source that applies is used; a strategy itself refuses settings that it decides, such as --views
SOURCES = (
    Source(
        "--encoder",
        lambda config: config.encoder is not None,
        ("encoder", "encoder_kind", "image_encoder", "pooling", "fusion_norm"),
        frozen_fingerprint,
        load_frozen,
    ),
    Source(
        "--strategy question",
        lambda config: config.strategy == "question",
        (*_BACKBONE, "adapter", "instruction"),
        prompted_fingerprint,
        PromptedEncoder.load,
    ),
    Source(
        "--strategy",
        lambda config: config.strategy is not None,
        (*_ITEMS, "strategy"),
        strategy_fingerprint,
        load_strategy,
    ),
    Source("--backbone", lambda config: True, _ITEMS, fingerprint_of, ItemEncoder.load),
)


def source_of(config: ExportConfig) -> Source:
    """Return the source that the settings choose.

    Raises:
        ConfigError: neither backbone nor encoder, or a setting of another source.
    """
    if config.backbone is None and config.encoder is None:
        raise ConfigError(
            "neither --backbone nor --encoder is given",
            "a model that encodes the items",
            "give --backbone or --encoder",
        )
    source = next(source for source in SOURCES if source.applies(config))
    for field in dataclasses.fields(config):
        if getattr(config, field.name) not in (field.default, "auto", "off"):
            _require_own(source, field.name, getattr(config, field.name))
    if source.name != "--encoder" and config.pooling == "cls":
        raise ConfigError(
            "--pooling cls with --backbone", "last or mean", "choose last or mean, or leave --pooling out"
        )
    if config.late_fusion == "gate" and config.adapter is None:
        raise ConfigError(
            "--late-fusion gate without --adapter",
            "an adapter that holds the gate",
            "leave --late-fusion out, or give the adapter",
        )
    return source


def _require_own(source: Source, name: str, value: Any) -> None:
    """Refuse a setting that belongs to other sources and not to this one."""
    flag = "--" + name.replace("_", "-")
    takers = [other.name for other in SOURCES if name in other.takes]
    if not takers or name in source.takes or source.name.startswith(flag + " "):
        return
    only = takers[0] if len(takers) == 1 and takers[0] != flag else ""
    raise ConfigError(
        f"{flag} {value} with {source.name}",
        f"{flag} with {only}" if only else "one of the two",
        f"leave {flag} out" + (f", or give {only}" if only else ""),
    )


def run(config: ExportConfig) -> dict[str, Any] | None:
    """Export every item of a dataset and return the manifest; an interrupted export continues where it stopped.

    A worker (`--worker`) returns None while other workers still have shards to make. With `dry_run` nothing is written:
    the estimate is measured, printed and returned.

    Raises:
        DataError: the dataset cannot be used, or an image cannot be read and the policy is `fail`.
        ModelError, ConfigError, MissingDependencyError: as `source_of` and the source's functions.
        ArtifactError: the output folder belongs to another export, is in use or not writable, or the disk is full.
        FailureLimitError: the export is complete, but more items failed than `max_failures` allows.
    """
    source = source_of(config)
    fingerprint = source.fingerprint(**source.given(config))
    distribution = Distribution(config.engine, config.num_workers, config.worker, config.gpus)
    reuse = Reuse(config.extend, config.retry_failed, config.changed_since)
    if config.dry_run:
        return _dry_run(config, fingerprint, reuse, distribution)
    dataset = _dataset(config)
    manifest = export(
        dataset,
        config.out,
        fingerprint,
        functools.partial(_load, config, dataset),
        shard_size=config.shard_size,
        storage=config.storage,
        on_image_error=config.on_image_error,
        images_by=config.images_by,
        reuse=reuse,
        image_timeout=config.image_timeout,
        distribution=distribution,
        reporter=TERMINAL,
        dim=config.dim,
        encoder=source.again(config),
    )
    if manifest is None:
        return None
    print_summary(manifest, config.out)
    vectors = first_vectors(config.out)
    warn_of_collapse(effective_ranks(vectors))
    warn_of_lengths(manifest, vectors)
    check_failures(manifest, config.out, config.max_failures)
    return manifest


def _dataset(config: ExportConfig) -> Dataset:
    """Return the dataset, with the items of --items alone.

    Raises:
        ConfigError: --items names no item.
        DataError: it names one that the dataset lacks, or its file cannot be read.
    """
    dataset = Dataset(config.data, config.images)
    if config.items is None:
        return dataset
    if "," not in config.items and Path(config.items).suffix in ID_FILES:
        wanted = read_ids(Path(config.items), schema.ITEM_ID, "--items")
    else:
        wanted = [each for item in config.items.split(",") if (each := item.strip())]
        if len(wanted) == 1 and Path(wanted[0]).exists() and wanted[0] not in dataset.item_ids:
            raise ConfigError(
                f"--items {config.items} is a {'folder' if Path(wanted[0]).is_dir() else 'file'}, and no item",
                f"ids with commas between, or a file of them that ends in {', '.join(ID_FILES)}",
                "give the file another name, or make one of these of it",
            )
    if not wanted:
        raise ConfigError(
            f"--items {config.items} names no item", "ids of the dataset", "give item ids, or leave --items out"
        )
    return dataset.restricted_to(wanted)


def _load(config: ExportConfig, dataset: Dataset | None = None) -> Encoder:
    """Load the encoder; if a dataset is given, with its vision cache."""
    source = source_of(config)
    budget = {"token_budget": config.token_budget} if config.token_budget else {}
    encoder = source.load(**source.given(config), **budget)
    if dataset is not None and isinstance(encoder, ItemEncoder) and config.backbone is not None:
        use_vision_cache(config.vision_cache, dataset, encoder, config.backbone, config.revision, TERMINAL)
    return encoder


def _dry_run(
    config: ExportConfig, fingerprint: Mapping[str, Any], reuse: Reuse, distribution: Distribution
) -> dict[str, Any]:
    """Print what the export would do and what it would take, measured on a few items, whose vectors are not kept."""
    dataset, out = _dataset(config), config.out
    plan = plan_export(
        dataset,
        out,
        fingerprint,
        config.shard_size,
        config.storage,
        config.on_image_error,
        config.images_by,
        reuse,
        TERMINAL,
        config.dim,
    )
    found = shards.recorded(out, plan, reuse.revises, reuse.retry_failed)
    earlier = open_earlier_rows(out, plan, found, reuse)
    work = plan_work(plan, shards.shards_of(plan, distribution.share), found, earlier)
    rows = [plan.rows(number)[index] for number, reuse_rows in work.items() for index in np.flatnonzero(reuse_rows < 0)]
    encoder = _load(config)
    with closing(ShardMaker(dataset, plan, lambda: encoder, image_timeout=config.image_timeout)) as maker:
        estimated = estimate(plan, out, rows, len(work), maker.encoded, pick_device(config.device))
    licence = {} if config.backbone is None else {"licence": backbone_licence(config.backbone)}
    console.summary("Dry run: nothing was written", describe(estimated) | licence)
    return estimated


def print_summary(manifest: Mapping[str, Any], out: Location) -> None:
    """Print what an embeddings folder holds."""
    timed = [shard for shard in manifest["shards"] if shard["seconds"]]
    seconds = sum(shard["seconds"] for shard in timed)
    rate = f", {sum(shard['rows'] for shard in timed) / seconds:.1f} items/s" if seconds else ""
    dims = schema.dims_of(manifest)
    shapes = ", ".join(f"{view}[{dims[view]}]" for view in manifest["views"])
    console.summary(
        "Embeddings",
        {
            "items": f"{manifest['num_items']:,}{of_catalogue(manifest)} {in_shards(manifest)}{rate}",
            **{status: f"{count:,}" for status, count in manifest["counts"].items() if count},
            "vectors": f"{shapes}: {manifest['dtype']}",
            **_short_row(manifest),
            "size": size(sum(shard["bytes"] for shard in manifest["shards"])),
            "folder": out,
            **_adapter_row(manifest.get(schema.MADE_WITH) or {}),
        },
    )


def _short_row(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return a row about what short vectors keep, if the folder has any."""
    if schema.SHORT not in manifest:
        return {}
    found = manifest[schema.SHORT]
    if not found["recall@10"]:
        return {"recall@10": "not measured: no part has enough new items"}
    recall = ", ".join(f"{view} {value:.3f}" for view, value in found["recall@10"].items())
    return {"recall@10": f"{recall} of the full vectors' neighbours, among {found['among']}"}


def _adapter_row(made_with: Mapping[str, Any]) -> dict[str, str]:
    """Return a row about an adapter that another program made, if there is one: no canary proves that it fits."""
    adapter = made_with.get("adapter") or {}
    if adapter.get("canary") is not False:
        return {}
    base = adapter.get("base_model_name_or_path")
    told = f"its config names {base} as its base" if base else "its config does not name its base"
    return {"adapter": f"{adapter['name']} ({adapter['peft']}) has no canary to prove that it fits; {told}"}


_EXPORT_AGAIN = "repair these items and run the command again with --retry-failed"


def check_failures(
    manifest: Mapping[str, Any], out: Location, max_failures: float, repair: str = _EXPORT_AGAIN
) -> None:
    """Raise `FailureLimitError` when more than that share of the items failed; `repair` says what to do about them."""
    failed, items = manifest["counts"][schema.STATUS_FAILED], manifest["num_items"]
    if failed > max_failures * items:
        raise FailureLimitError(
            f"the export is complete, but {failed} of {items} items failed ({failed / items:.1%})",
            f"at most {max_failures:.1%}",
            f"`vlm2rec failures {out}` lists them; {repair}, or raise --max-failures",
        )
