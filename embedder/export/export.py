"""The export: encodes every item of a dataset once, shard by shard, and writes the manifest last."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from vlm2rec.embedder.contract import publish, schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ConfigError, DataError
from vlm2rec.embedder.contract.storage import Location
from vlm2rec.embedder.encoders.item_text import columns_read, item_texts, without_text
from vlm2rec.embedder.export import shards
from vlm2rec.embedder.export.distribute import ALONE, Distribution, ItemJob, Job, Maker, Work
from vlm2rec.embedder.export.lock import Hold, writing
from vlm2rec.embedder.export.plan import Plan, plan_shards, read_inputs
from vlm2rec.embedder.export.reuse import (
    REUSE_NOTHING,
    EarlierRows,
    Reuse,
    open_earlier_rows,
    plan_work,
    require_same_start,
)
from vlm2rec.embedder.export.short import Kept, short_settings
from vlm2rec.embedder.export.worker import Encoder, ShardMaker
from vlm2rec.embedder.options import ImagePolicy, ImagesBy, Storage
from vlm2rec.embedder.progress import SILENT, Reporter


def export(
    dataset: Dataset,
    out: Location,
    settings: Mapping[str, Any],
    load_encoder: Callable[[], Encoder],
    *,
    shard_size: int = 4096,
    storage: Storage = "float32",
    on_image_error: ImagePolicy = "null",
    images_by: ImagesBy = "mtime",
    reuse: Reuse = REUSE_NOTHING,
    image_timeout: float = 60.0,
    distribution: Distribution = ALONE,
    reporter: Reporter = SILENT,
    dim: int | None = None,
    encoder: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Encode every item that is not in `out` yet, publish shard by shard, and write the manifest last.

    Args:
        dataset: The items.
        out: Embeddings folder, new or of an earlier run with the same settings.
        settings: What `load_encoder().fingerprint` will be; known before the weights are read.
        load_encoder: Called only if there is something to encode.
        shard_size: Items in one Parquet file.
        storage: Number format on disk.
        on_image_error: What becomes of an item whose image cannot be used.
        images_by: How a changed image is recognised when an interrupted run continues.
        reuse: Which earlier rows are kept if the input has changed.
        image_timeout: Seconds after which reading an image is given up.
        distribution: Who makes the shards. For other processes and Ray, `load_encoder` must be picklable.
        reporter: Receives progress and messages.
        dim: Store the first `dim` numbers of each vector, one long; None stores vectors as they are.
        encoder: How the encoder is loaded again, as JSON, for the manifest: a search encodes its query with it.

    Returns:
        The manifest; None for one of several workers while other workers still have shards to make.
    """
    plan = plan_export(dataset, out, settings, shard_size, storage, on_image_error, images_by, reuse, reporter, dim)
    some = dataset.catalogue_size if dataset.catalogue_size > len(plan.item_ids) else None
    plan = replace(plan, encoder=encoder or {}, catalogue=some)

    def job(earlier: EarlierRows | None, hold: Hold) -> ItemJob:
        return ItemJob(out, plan, hold, dataset, load_encoder, settings, earlier, image_timeout)

    return fill_folder(plan, out, job, data=dataset.path, reuse=reuse, distribution=distribution, reporter=reporter)


def fill_folder(
    plan: Plan,
    out: Location,
    make_job: Callable[[EarlierRows | None, Hold], Job],
    *,
    data: Location | None = None,
    reuse: Reuse = REUSE_NOTHING,
    distribution: Distribution = ALONE,
    reporter: Reporter = SILENT,
    work_name: str = "encoding items",
    about: Mapping[str, Any] | None = None,
    left_out: bytes | None = None,
) -> dict[str, Any] | None:
    """Make the shards of a plan that are not in `out` yet, publish each, and write the manifest last.

    Args:
        plan: what the folder will hold.
        out: the folder, new or of an earlier run of the same plan.
        make_job: returns what makes the shards, given the earlier rows and the lock of the folder.
        data: the dataset folder, to be named in the manifest.
        reuse: which earlier rows are kept.
        distribution: who makes the shards.
        reporter: receives progress and messages.
        work_name: what the work is called, a verb and the rows: `encoding items`.
        about: further keys of the manifest.
        left_out: content of `LEFT_OUT_FILE`, if there is to be one.

    Returns:
        The manifest; None for one of several workers while other workers still have shards to make.
    """
    with writing(out, distribution.share) as hold:
        found = shards.begin(out, plan, reuse.revises, distribution.share, reuse.retry_failed)
        if left_out is not None and not (out / schema.MANIFEST_FILE).exists():
            publish.write_whole(out / schema.LEFT_OUT_FILE, left_out)
        finished = found.finished
        earlier = open_earlier_rows(out, plan, found, reuse)
        work = plan_work(plan, shards.shards_of(plan, distribution.share), found, earlier)
        finished |= shards.confirm(out, plan, {n: shard for n, shard in found.earlier.items() if n not in work})
        if work:
            shards.require_space(out, plan, sum(len(plan.rows(number)) for number in work))
            job = make_job(earlier, hold)
            try:
                _publish_all(job, work, finished, distribution, reporter, work_name)
            except (KeyboardInterrupt, SystemExit):
                reporter.say(
                    f"stopped: {len(finished)} of {len(plan)} shards are finished and kept; run the same command again"
                    " to continue"
                )
                raise
        elif (out / schema.MANIFEST_FILE).exists():
            reporter.say(f"{out} is already complete")
        hold.require()
        manifest = shards.finish(out, plan, finished, data, distribution.share, about)
        if manifest is None:
            missing = len(plan) - len(shards.recorded_shards(out, plan))
            reporter.say(
                f"worker {distribution.worker} of {distribution.num_workers} has made its shards;"
                f" other workers still have {missing} of {len(plan)} to make, and the last one completes the folder"
            )
        return manifest


def plan_export(
    dataset: Dataset,
    out: Location,
    settings: Mapping[str, Any],
    shard_size: int,
    storage: str,
    on_image_error: ImagePolicy,
    images_by: ImagesBy,
    reuse: Reuse,
    reporter: Reporter = SILENT,
    dim: int | None = None,
) -> Plan:
    """Return the plan that `export` makes from the same arguments.

    Raises:
        ConfigError: the image policy needs a text vector, which these settings do not make; or as `short_settings`.
        DataError: these settings read images, and the dataset has none or their folder is not there.
        ArtifactError: `out` holds other items, and `reuse` does not allow that.
    """
    if on_image_error == "text_only" and (schema.TEXT not in settings["views"] or "dims" in settings):
        raise ConfigError(
            "--on-image-error text_only needs a text vector in place of the fused one; internal fusion, --views"
            " image, a --strategy with images and an image encoder have none",
            "fail or null with these settings",
            "choose one of the two, or external fusion of both views",
        )
    modalities = schema.modalities_of(settings["views"])
    if schema.IMAGE in modalities:
        dataset.require_images()
        _tell_items_without_images(dataset, on_image_error, reporter)
    if schema.TEXT in modalities and (blank := without_text(dataset, settings)):
        reporter.say(f"{blank:,} items have nothing in {settings['item_text']}: their titles are used", warning=True)
    inputs = read_inputs(
        dataset.item_ids,
        item_texts(dataset, settings) if schema.TEXT in modalities else dataset.titles,
        dataset.image_paths,
        dataset.image_root if schema.IMAGE in modalities else None,
        images_by,
        modalities,
    )
    choices: dict[str, Any] = {"storage": storage, "on_image_error": on_image_error, **short_settings(settings, dim)}
    if schema.TEXT in modalities:
        columns = columns_read(dataset, settings)
        choices |= columns
        for name, column in columns.items():
            reporter.say(f"{name} column: {column or 'none in this catalogue'}")
    if reuse.revises:
        require_same_start(out, inputs, reuse)
    return plan_shards(
        dataset.item_ids, shard_size, {**settings, **choices}, inputs, shards.rows_of_shards(out), dataset.items_version
    )


def _tell_items_without_images(dataset: Dataset, policy: ImagePolicy, reporter: Reporter) -> None:
    """Say what becomes of items that were prepared without an image; with the policy `fail`, refuse them."""
    without = [row for row, path in enumerate(dataset.image_paths) if not path]
    if not without:
        return
    shown = ", ".join(repr(dataset.item_ids[row]) for row in without[:3])
    found = f"{len(without):,} of {len(dataset.item_ids):,} items have no image, such as {shown}"
    if policy == "fail":
        raise DataError(found, "an image of every item", "choose --on-image-error text_only or null, or --views text")
    outcome = "they get their text vector" if policy == "text_only" else "they get no vector"
    advice = "" if policy == "text_only" else "; --on-image-error text_only gives them their text vector"
    reporter.say(f"{found}: {outcome}{advice}", warning=policy != "text_only")


def _publish_all(
    job: Job,
    work: Work,
    finished: dict[int, shards.Shard],
    distribution: Distribution,
    reporter: Reporter,
    work_name: str,
) -> None:
    """Make and publish all shards; `finished` receives each published shard, even if a later one fails."""
    engine = distribution.engine_to_use
    if engine is None:
        with closing(job.maker()) as make:
            _publish_here(make, job, work, finished, reporter, work_name)
        return
    begun, rows = time.perf_counter(), work_name.split()[-1]
    with reporter.progress(work_name, sum(map(len, work.values()))) as advance:
        for count, (number, shard) in enumerate(engine.make(job, work, reporter), 1):
            finished[number] = shard
            advance(shard.rows)
            if not reporter.draws_bars:
                rate = shard.rows * count / (time.perf_counter() - begun)
                reporter.say(f"shard {count} of {len(work)}: {shard.rows} {rows}, about {rate:.1f} {rows}/s in all")


def _publish_here(
    make: Maker, job: Job, work: Work, finished: dict[int, shards.Shard], reporter: Reporter, work_name: str
) -> None:
    """Encode each shard while a thread writes the previous one.

    At most two shards are in memory, so a slow disk slows the export down but does not fill the memory.
    """
    begun, for_disk = time.perf_counter(), 0.0
    with ThreadPoolExecutor(1, thread_name_prefix="writer") as writer:
        in_writing: tuple[int, Future[shards.Shard]] | None = None

        def wait_for_writer() -> None:
            nonlocal for_disk
            if in_writing is not None:
                started = time.perf_counter()
                finished[in_writing[0]] = in_writing[1].result()
                for_disk += time.perf_counter() - started

        try:
            for number, *made in _made_shards(make, work, reporter, work_name):
                wait_for_writer()
                in_writing = number, writer.submit(job.publish, number, *made)
        finally:
            wait_for_writer()
    total = max(time.perf_counter() - begun, 1e-9)
    if isinstance(make, ShardMaker):
        for_images = make.readers.waited
        reporter.say(
            f"the model waited {for_images / total:.0%} of the time for images and {for_disk / total:.0%} for the disk"
        )


def _made_shards(
    make: Maker, work: Mapping[int, np.ndarray], reporter: Reporter, work_name: str
) -> Iterator[tuple[int, pa.Table, float, Kept | None]]:
    """Yield each shard's number, its table, the seconds spent on it, and the neighbours that short vectors keep."""
    total = sum(int((reuse_rows < 0).sum()) for reuse_rows in work.values())
    rows = work_name.split()[-1]
    with reporter.progress(work_name, total) as advance:
        for count, (number, reuse_rows) in enumerate(work.items(), 1):
            start = time.perf_counter()
            table, kept = make.shard(number, reuse_rows, advance)
            seconds = time.perf_counter() - start
            yield number, table, seconds, kept
            if not reporter.draws_bars:  # a log file gets one line for each shard
                encoded = int((reuse_rows < 0).sum())
                reused = f" and {len(reuse_rows) - encoded} reused" if encoded < len(reuse_rows) else ""
                reporter.say(
                    f"shard {count} of {len(work)}: {encoded} {rows}{reused}, {encoded / seconds:.1f} {rows}/s"
                )
