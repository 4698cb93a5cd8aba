"""`vlm2rec export-items`: every item of a dataset once through the encoder, into an embeddings folder.

`export` takes any encoder and can be called from Python; `run` is the command, with `ItemEncoder`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from vlm2rec.embedder import schema, shards
from vlm2rec.embedder.dataset import Dataset
from vlm2rec.embedder.earlier_rows import EarlierRows
from vlm2rec.embedder.encode import ItemEncoder, encoder_settings
from vlm2rec.embedder.errors import ArtifactError, ConfigError, FailureLimitError
from vlm2rec.embedder.export_plan import ImagesBy, Inputs, Plan, plan_shards, read_inputs
from vlm2rec.embedder.lora import backbone_licence
from vlm2rec.embedder.storage import Location
from vlm2rec.embedder.strategies import item_text, load_strategy, strategy_settings
from vlm2rec.embedder.verify import effective_ranks
from vlm2rec.embedder.writer_lock import writing
from vlm2rec.pipelines import console
from vlm2rec.pipelines.config import EncodeFrozenConfig, EncodePromptedConfig, ExportConfig, ImagePolicy
from vlm2rec.pipelines.export_engines import ALONE, Held, Job, Scale
from vlm2rec.pipelines.export_estimate import estimate, told
from vlm2rec.pipelines.shard_maker import Encoder, ShardMaker
from vlm2rec.pipelines.verify import warn_of_collapse
from vlm2rec.pipelines.vision_cache import use_vision_cache

_ENCODER_ARGUMENTS = (
    "revision",
    "views",
    "fusion",
    "fusion_norm",
    "prompt_mode",
    "max_pixels",
    "max_title_tokens",
    "pooling",
    "wording",
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
    scale = Scale(config.engine, config.num_workers, config.worker, config.gpus)
    if config.dry_run:
        return _dry_run(config, settings, given, scale)
    return export_as_told(config, settings, functools.partial(_load, config, given), config.on_image_error, scale)


def _settings(config: ExportConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    if config.strategy is None:
        return encoder_settings(config.backbone, config.adapter, **given)
    return strategy_settings(config.backbone, config.strategy, adapter=config.adapter, **given)


def _encoder(config: ExportConfig, given: Mapping[str, Any]) -> ItemEncoder:
    if config.strategy is None:
        return ItemEncoder.load(config.backbone, config.adapter, token_budget=config.token_budget, **given)
    return load_strategy(config.backbone, config.strategy, token_budget=config.token_budget, **given)


def _load(config: ExportConfig, given: Mapping[str, Any], dataset: Dataset) -> ItemEncoder:
    encoder = _encoder(config, given)
    use_vision_cache(config.vision_cache, dataset, encoder, config.backbone, config.revision)
    return encoder


def _dry_run(
    config: ExportConfig, settings: Mapping[str, Any], given: Mapping[str, Any], scale: Scale
) -> dict[str, Any]:
    """Print what the export would do and take, from a few of its items, which are encoded and not kept."""
    dataset, out = Dataset(config.data), config.out
    reuse = _reuse(config)
    plan = _plan(
        dataset, out, settings, config.shard_size, config.storage, config.on_image_error, config.images_by, reuse
    )
    finished = shards.recorded(out, plan, reuse.revises)
    earlier = _earlier_rows(out, plan, finished, reuse)
    work = _work(plan, shards.shards_of(plan, scale.share), finished, earlier, reuse)
    rows = [plan.rows(number)[place] for number, held in work.items() for place in np.flatnonzero(held < 0)]
    encoder = _encoder(config, given)
    with closing(ShardMaker(dataset, plan, lambda: encoder, image_timeout=config.image_timeout)) as maker:
        found = estimate(plan, out, rows, len(work), maker.encoded, encoder.backbone.device)
    console.summary("dry run: nothing was written", told(found) | {"licence": backbone_licence(config.backbone)})
    return found


def export_as_told(
    config: ExportConfig | EncodeFrozenConfig | EncodePromptedConfig,
    settings: Mapping[str, Any],
    load_encoder: Callable[[Dataset], Encoder],
    on_image_error: ImagePolicy,
    scale: Scale = ALONE,
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
        scale=scale,
    )
    if manifest is None:
        return None
    print_summary(manifest, config.out)
    warn_of_collapse(effective_ranks(config.out))
    check_failures(manifest, config.out, config.max_failures)
    return manifest


@dataclass(frozen=True)
class Reuse:
    """What of earlier work is kept where the input has changed; by default, a changed input is refused.

    Args:
        extend: items were appended to those of the folder.
        retry_failed: make anew what failed, and what has changed since.
        changed_since: a finished embeddings folder whose vectors are taken over for items that have not changed.
    """

    extend: bool = False
    retry_failed: bool = False
    changed_since: Location | None = None

    def __post_init__(self) -> None:
        """Refuse two sources of the same vectors."""
        if self.changed_since and (self.extend or self.retry_failed):
            raise ConfigError(
                "--changed-since beside --extend or --retry-failed",
                "one of them: --changed-since fills a new folder, the others go on with the one there is",
                "leave one out",
            )

    @property
    def revises(self) -> bool:
        """Whether a folder may be of other inputs."""
        return self.extend or self.retry_failed


def _reuse(config: ExportConfig | EncodeFrozenConfig | EncodePromptedConfig) -> Reuse:
    return Reuse(config.extend, config.retry_failed, config.changed_since)


def export(
    dataset: Dataset,
    out: Location,
    settings: Mapping[str, Any],
    load_encoder: Callable[[], Encoder],
    *,
    shard_size: int = 4096,
    storage: Literal["float32", "float16"] = "float32",
    on_image_error: ImagePolicy = "null",
    images_by: ImagesBy = "mtime",
    reuse: Reuse = Reuse(),
    image_timeout: float = 60.0,
    scale: Scale = ALONE,
) -> dict[str, Any] | None:
    """Encode every item that is not in `out` yet, publish shard by shard, and write the manifest last.

    Args:
        dataset: The items.
        out: Embeddings folder, new or of an earlier run with the same settings.
        settings: What `load_encoder().settings` will be; known before the weights are read.
        load_encoder: Called only if there is something to encode.
        shard_size: Items in one Parquet file.
        storage: Number format on disk.
        on_image_error: What becomes of an item whose image cannot be used.
        images_by: What tells that an image has changed since an interrupted run.
        reuse: What is kept where the input has changed.
        image_timeout: Seconds after which the read of an image is given up.
        scale: Who makes the shards. With other workers or Ray, `load_encoder` has to be one that can be pickled.

    Returns:
        The manifest; None for one of several workers, while others have not made all their shards.
    """
    plan = _plan(dataset, out, settings, shard_size, storage, on_image_error, images_by, reuse)
    with writing(out, scale.share) as hold:
        finished = shards.begin(out, plan, reuse.revises, scale.share)
        earlier = _earlier_rows(out, plan, finished, reuse)
        work = _work(plan, shards.shards_of(plan, scale.share), finished, earlier, reuse)
        if work:
            shards.require_space(out, plan, sum(len(plan.rows(number)) for number in work))
            job = Job(dataset, out, plan, load_encoder, settings, earlier, image_timeout)
            try:
                _publish_all(job, work, finished, scale)
            except (KeyboardInterrupt, SystemExit):
                console.log.print(
                    f"stopped: {len(finished)} of {len(plan)} shards are finished and kept; run the same command again"
                    " to go on"
                )
                raise
        elif (out / schema.MANIFEST_FILE).exists():
            console.log.print(f"{out} is already complete")
        if scale.share is not None:
            finished |= shards.recorded_shards(out, plan)
            if not (out / schema.MANIFEST_FILE).exists() and (missing := len(plan) - len(finished)):
                console.log.print(
                    f"worker {scale.worker} of {scale.num_workers} has made its shards; {missing} of {len(plan)} are"
                    " still to be made by others, the last of whom completes the folder"
                )
                return None
        hold.require()
        return shards.finish(out, plan, finished, dataset.path)


def _plan(
    dataset: Dataset,
    out: Location,
    settings: Mapping[str, Any],
    shard_size: int,
    storage: str,
    on_image_error: ImagePolicy,
    images_by: ImagesBy,
    reuse: Reuse,
) -> Plan:
    if on_image_error == "text_only" and (schema.TEXT not in settings["views"] or "dims" in settings):
        raise ConfigError(
            "--on-image-error text_only needs a text vector that can stand for the fused one; internal fusion,"
            " --views image and the strategies with images have none",
            "fail or null with these",
            "choose one of the two, or external fusion of both views",
        )
    modalities = schema.modalities_of(settings["views"])
    inputs = read_inputs(
        dataset.item_ids,
        [item_text(dataset, settings, row) for row in range(len(dataset.item_ids))],
        dataset.image_paths,
        dataset.image_root,
        images_by,
        modalities,
    )
    choices: dict[str, Any] = {"storage": storage, "on_image_error": on_image_error}
    if "strategy" in settings and schema.TEXT in modalities:
        choices["category"] = dataset.category_column
        console.log.print(f"category of an item: {dataset.category_column or 'none in this catalogue'}")
    if reuse.revises:
        _require_same_start(out, inputs, reuse)
    return plan_shards(dataset.item_ids, shard_size, {**settings, **choices}, inputs, shards.rows_of_shards(out))


def _require_same_start(out: Location, inputs: Inputs, reuse: Reuse) -> None:
    """Raise `ArtifactError` unless the folder's items are the first ones of the input, as the choices promise."""
    known = shards.known_settings(out)
    if known is None:
        return
    count = int(known["items"])
    first = inputs.first(count).settings if count <= len(inputs.item_ids) else None
    if first is None or first["item_ids"] != known["item_ids"]:
        raise ArtifactError(
            f"{out} holds {count} items, which are not the first {count} of the dataset's {len(inputs.item_ids)}",
            "the same items in the same order, and new ones after them",
            "export into a new folder; --changed-since takes over what has not changed",
        )
    if len(inputs.item_ids) > count and not reuse.extend:
        raise ArtifactError(
            f"{out} holds {count} items, the dataset {len(inputs.item_ids)}",
            "the same items",
            "add --extend, which makes the new ones too",
        )
    changed = [key for key in first if key != "items" and first[key] != known.get(key)]
    if changed and not reuse.retry_failed:
        raise ArtifactError(
            f"the {' and '.join(changed)} of items that {out} holds have changed",
            "new items after those that are there, and nothing else",
            "add --retry-failed, which makes what has changed anew",
        )


def _earlier_rows(out: Location, plan: Plan, finished: Mapping[int, shards.Shard], reuse: Reuse) -> EarlierRows | None:
    if reuse.changed_since is not None:
        return EarlierRows.of_export(reuse.changed_since, plan)
    if reuse.retry_failed and finished:
        return EarlierRows(out, [shard.file for shard in finished.values()])
    return None


def _work(
    plan: Plan,
    numbers: Iterable[int],
    finished: Mapping[int, shards.Shard],
    earlier: EarlierRows | None,
    reuse: Reuse,
) -> dict[int, np.ndarray]:
    """Return the shards to make, and where the earlier export has each of their rows: -1 for those to encode."""
    wanted = [number for number in numbers if number not in finished or reuse.retry_failed]
    rows = [plan.rows(number) for number in wanted]
    if earlier is None or not wanted:
        held = [np.full(len(of_shard), -1) for of_shard in rows]
    else:
        found = earlier.find(plan, [row for of_shard in rows for row in of_shard])  # once: it hashes all ids
        held = np.split(found, np.cumsum([len(of_shard) for of_shard in rows])[:-1])
    by_shard = zip(wanted, held, strict=True)
    return {number: its for number, its in by_shard if number not in finished or (its < 0).any()}


def _publish_all(job: Job, work: Held, finished: dict[int, shards.Shard], scale: Scale) -> None:
    """Have all shards made; `finished` holds what is published, whatever ends."""
    engine = scale.engine_to_use
    if engine is None:
        with closing(job.maker()) as make:
            _publish_here(make, job.out, work, finished)
        return
    begun = time.perf_counter()
    with console.progress("encoding items", sum(map(len, work.values()))) as advance:
        for count, (number, shard) in enumerate(engine.make(job, work), 1):
            finished[number] = shard
            advance(shard.rows)
            if not console.log.is_terminal:
                rate = shard.rows * count / (time.perf_counter() - begun)
                console.log.print(f"shard {count} of {len(work)}: {shard.rows} items, about {rate:.1f} items/s in all")


def _publish_here(make: ShardMaker, out: Location, work: Held, finished: dict[int, shards.Shard]) -> None:
    """Encode shard after shard while a thread writes the one before.

    At most two shards are in memory: a slow disk slows the export down, and does not fill the memory.
    """
    begun, for_disk = time.perf_counter(), 0.0
    with ThreadPoolExecutor(1, thread_name_prefix="writer") as writer:
        at_work: tuple[int, Future[shards.Shard]] | None = None

        def settle() -> None:
            nonlocal for_disk
            if at_work is not None:
                started = time.perf_counter()
                finished[at_work[0]] = at_work[1].result()
                for_disk += time.perf_counter() - started

        try:
            for number, table, seconds in _made(make, work):
                settle()
                at_work = number, writer.submit(shards.publish, out, make.plan, number, table, seconds)
        finally:
            settle()
    total, for_images = max(time.perf_counter() - begun, 1e-9), make.readers.waited
    console.log.print(
        f"the model waited {for_images / total:.0%} of the time for images and {for_disk / total:.0%} for the disk"
    )


def _made(make: ShardMaker, work: Mapping[int, np.ndarray]) -> Iterator[tuple[int, pa.Table, float]]:
    """Yield each shard's number, table and seconds."""
    total = sum(int((held < 0).sum()) for held in work.values())
    with console.progress("encoding items", total) as advance:
        for count, (number, held) in enumerate(work.items(), 1):
            start = time.perf_counter()
            table = make.shard(number, held, advance)
            seconds = time.perf_counter() - start
            yield number, table, seconds
            if not console.log.is_terminal:  # no bar is drawn: a log file gets a line a shard
                encoded = int((held < 0).sum())
                kept = f" and {len(held) - encoded} taken over" if encoded < len(held) else ""
                console.log.print(
                    f"shard {count} of {len(work)}: {encoded} items{kept}, {encoded / seconds:.1f} items/s"
                )


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
