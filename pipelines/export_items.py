"""`vlm2rec export-items`: every item of a dataset once through the encoder, into an embeddings folder.

`export` takes any encoder and can be called from Python; `run` is the command, with `ItemEncoder`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import numpy as np

from vlm2rec.downstream.evaluation.geometry import effective_ranks
from vlm2rec.embedder.backbones.lora import backbone_licence
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import FailureLimitError
from vlm2rec.embedder.contract.storage import Location
from vlm2rec.embedder.encoders.cache_choice import use_vision_cache
from vlm2rec.embedder.encoders.frozen import frozen_fingerprint, load_frozen
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.prompted import PromptedEncoder, prompted_fingerprint
from vlm2rec.embedder.encoders.settings import fingerprint_of
from vlm2rec.embedder.encoders.strategies import load_strategy, strategy_fingerprint
from vlm2rec.embedder.export import shards
from vlm2rec.embedder.export.distribute import ALONE, Distribution
from vlm2rec.embedder.export.estimate import describe, estimate
from vlm2rec.embedder.export.export import _plan, export
from vlm2rec.embedder.export.reuse import Reuse, _earlier_rows, _work
from vlm2rec.embedder.export.worker import Encoder, ShardMaker
from vlm2rec.embedder.options import ImagePolicy
from vlm2rec.pipelines import console
from vlm2rec.pipelines.config import EncodeFrozenConfig, EncodePromptedConfig, ExportConfig
from vlm2rec.pipelines.console import TERMINAL
from vlm2rec.pipelines.verify import warn_of_collapse

_ENCODER_ARGUMENTS = (
    "revision",
    "views",
    "fusion",
    "fusion_norm",
    "prompt_mode",
    "max_pixels",
    "max_title_tokens",
    "pooling",
    "prompt_style",
    "dtype",
    "device",
)


def run(config: ExportConfig) -> dict[str, Any] | None:
    """Export every item of a dataset and return the manifest; an interrupted export goes on where it stopped.

    One of several workers that somebody else has started returns None while others have not made all their shards. With
    `dry_run` nothing is written: what would be done is measured, printed and returned.

    Raises:
        DataError: the dataset cannot be used, or an image cannot and the policy is `fail`.
        ModelError, ConfigError: as `ItemEncoder.load`.
        ArtifactError: the output folder is of another export, in use, not writable, or full.
        FailureLimitError: the export is complete, but more items failed than `max_failures` allows.
    """
    given: dict[str, Any] = {name: getattr(config, name) for name in _ENCODER_ARGUMENTS}
    settings = _settings(config, given)
    distribution = Distribution(config.engine, config.num_workers, config.worker, config.gpus)
    if config.dry_run:
        return _dry_run(config, settings, given, distribution)
    return run_export(config, settings, functools.partial(_load, config, given), config.on_image_error, distribution)


def _settings(config: ExportConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    if config.strategy is None:
        return fingerprint_of(config.backbone, config.adapter, **given)
    return strategy_fingerprint(config.backbone, config.strategy, adapter=config.adapter, **given)


def _encoder(config: ExportConfig, given: Mapping[str, Any]) -> ItemEncoder:
    if config.strategy is None:
        return ItemEncoder.load(config.backbone, config.adapter, token_budget=config.token_budget, **given)
    return load_strategy(config.backbone, config.strategy, token_budget=config.token_budget, **given)


def _load(config: ExportConfig, given: Mapping[str, Any], dataset: Dataset) -> ItemEncoder:
    encoder = _encoder(config, given)
    use_vision_cache(config.vision_cache, dataset, encoder, config.backbone, config.revision, TERMINAL)
    return encoder


def _dry_run(
    config: ExportConfig, settings: Mapping[str, Any], given: Mapping[str, Any], distribution: Distribution
) -> dict[str, Any]:
    """Print what the export would do and take, from a few of its items, which are encoded and not kept."""
    dataset, out = Dataset(config.data), config.out
    reuse = _reuse(config)
    plan = _plan(
        dataset,
        out,
        settings,
        config.shard_size,
        config.storage,
        config.on_image_error,
        config.images_by,
        reuse,
        TERMINAL,
    )
    finished = shards.recorded(out, plan, reuse.revises)
    earlier = _earlier_rows(out, plan, finished, reuse)
    work = _work(plan, shards.shards_of(plan, distribution.share), finished, earlier, reuse)
    rows = [plan.rows(number)[place] for number, reuse_rows in work.items() for place in np.flatnonzero(reuse_rows < 0)]
    encoder = _encoder(config, given)
    with closing(ShardMaker(dataset, plan, lambda: encoder, image_timeout=config.image_timeout)) as maker:
        found = estimate(plan, out, rows, len(work), maker.encoded, encoder.backbone.device)
    console.summary("dry run: nothing was written", describe(found) | {"licence": backbone_licence(config.backbone)})
    return found


def run_export(
    config: ExportConfig | EncodeFrozenConfig | EncodePromptedConfig,
    settings: Mapping[str, Any],
    load_encoder: Callable[[Dataset], Encoder],
    on_image_error: ImagePolicy,
    distribution: Distribution = ALONE,
) -> dict[str, Any] | None:
    """Do what every command with an encoder does: export, print what came out, and refuse too many failures.

    Args:
        config: the command's settings.
        settings: as of `export`.
        load_encoder: as of `export`, for the dataset that the settings name.
        on_image_error: as of `export`.
        scale: as of `export`.

    Returns:
        The manifest; None where workers are at work that somebody else has started.
    """
    dataset = Dataset(config.data)
    manifest = export(
        dataset,
        config.out,
        settings,
        functools.partial(load_encoder, dataset),
        shard_size=config.shard_size,
        storage=config.storage,
        on_image_error=on_image_error,
        images_by=config.images_by,
        reuse=_reuse(config),
        image_timeout=config.image_timeout,
        distribution=distribution,
        reporter=TERMINAL,
    )
    if manifest is None:
        return None
    print_summary(manifest, config.out)
    warn_of_collapse(effective_ranks(config.out))
    check_failures(manifest, config.out, config.max_failures)
    return manifest


def _reuse(config: ExportConfig | EncodeFrozenConfig | EncodePromptedConfig) -> Reuse:
    return Reuse(config.extend, config.retry_failed, config.changed_since)


def print_summary(manifest: Mapping[str, Any], out: Location) -> None:
    """Print what an embeddings folder holds."""
    timed = [shard for shard in manifest["shards"] if shard["seconds"]]
    seconds = sum(shard["seconds"] for shard in timed)
    rate = f", {sum(shard['rows'] for shard in timed) / seconds:.1f} items/s" if seconds else ""
    dims = schema.dims_of(manifest)
    shapes = ", ".join(f"{view}[{dims[view]}]" for view in manifest["views"])
    console.summary(
        "embeddings",
        {
            "items": f"{manifest['num_items']:,} in {len(manifest['shards'])} shards{rate}",
            **{status: f"{count:,}" for status, count in manifest["counts"].items() if count},
            "vectors": f"{shapes}: {manifest['dtype']}",
            "size": f"{sum(shard['bytes'] for shard in manifest['shards']) / 2**20:.1f} MiB",
            "folder": out,
        },
    )


def check_failures(manifest: Mapping[str, Any], out: Location, max_failures: float) -> None:
    """Raise `FailureLimitError` when more than that share of the items failed."""
    failed, items = manifest["counts"][schema.STATUS_FAILED], manifest["num_items"]
    if failed > max_failures * items:
        raise FailureLimitError(
            f"the export is complete, but {failed} of {items} items failed ({failed / items:.1%})",
            f"at most {max_failures:.1%}",
            f"`vlm2rec failures {out}` lists them; mend these items and run the command again with"
            " --retry-failed, or raise --max-failures",
        )


def run_frozen(config: EncodeFrozenConfig) -> dict[str, Any] | None:
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
    return run_export(
        config,
        frozen_fingerprint(config.encoder, **given),
        lambda _: load_frozen(config.encoder, token_budget=config.token_budget, **given),
        config.on_image_error,
    )


def run_prompted(config: EncodePromptedConfig) -> dict[str, Any] | None:
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
    return run_export(
        config,
        prompted_fingerprint(config.backbone, **given),
        lambda _: PromptedEncoder.load(config.backbone, token_budget=config.token_budget, **given),
        "null",
    )
