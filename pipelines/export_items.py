"""`vlm2rec export-items`: every item of a dataset once through the encoder, into an embeddings folder.

`export` takes any encoder and can be called from Python; `run` is the command, with `ItemEncoder`.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from vlm2rec.embedder import schema, shards
from vlm2rec.embedder.dataset import Dataset
from vlm2rec.embedder.encode import EncodedItems, ItemEncoder, Picture, encoder_settings
from vlm2rec.embedder.errors import ConfigError, DataError, FailureLimitError, ModelError
from vlm2rec.embedder.export_plan import Plan, input_settings, plan_shards
from vlm2rec.embedder.images import ImageError, open_image
from vlm2rec.embedder.lora import backbone_licence
from vlm2rec.embedder.verify import effective_ranks
from vlm2rec.embedder.writer_lock import writing
from vlm2rec.pipelines import console
from vlm2rec.pipelines.config import EncodeFrozenConfig, EncodePromptedConfig, ExportConfig, ImagePolicy
from vlm2rec.pipelines.export_estimate import estimate, told
from vlm2rec.pipelines.image_readers import Readers, Reading
from vlm2rec.pipelines.verify import warn_of_collapse
from vlm2rec.pipelines.vision_cache import use_vision_cache

ITEMS_AT_ONCE = 128  # decoded together, and sorted into batches together
READERS = min(8, os.cpu_count() or 1)
_ENCODER_ARGUMENTS = (
    "revision",
    "views",
    "fusion",
    "fusion_norm",
    "prompt_mode",
    "max_pixels",
    "max_title_tokens",
    "dtype",
    "device",
)


class Encoder(Protocol):
    """What `export` needs of an encoder; `ItemEncoder` is one."""

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides a vector, as JSON: `dim`, `views`, `max_pixels` and whatever else."""

    def encode_items(self, titles: Sequence[str], images: Sequence[Picture]) -> EncodedItems:
        """Return the vectors of n items; rows of NaN where a view is absent."""


@dataclass(frozen=True)
class Rows:
    """What becomes of some items: their vectors, NaN where they have none, and their status."""

    vectors: dict[str, np.ndarray]  # view → (n, d) float32
    status: list[str]
    error: list[str | None]


def run(config: ExportConfig) -> dict[str, Any]:
    """Export every item of a dataset and return the manifest; an interrupted export goes on where it stopped.

    With `dry_run` nothing is written: what would be done is measured, printed and returned.

    Raises:
        DataError: the dataset cannot be used, or an image cannot and the policy is `fail`.
        ModelError, ConfigError: as `ItemEncoder.load`.
        ArtifactError: the output folder is of another export, in use, not writable, or full.
        FailureLimitError: the export is complete, but more items failed than `max_failures` allows.
    """
    given: dict[str, Any] = {name: getattr(config, name) for name in _ENCODER_ARGUMENTS}
    settings = encoder_settings(config.backbone, config.adapter, **given)
    if config.dry_run:
        return _dry_run(config, settings, given)
    return export_as_told(
        config,
        settings,
        lambda dataset: _load(config, dataset, given),
        config.on_image_error,
    )


def _load(config: ExportConfig, dataset: Dataset, given: Mapping[str, Any]) -> ItemEncoder:
    encoder = ItemEncoder.load(config.backbone, config.adapter, token_budget=config.token_budget, **given)
    use_vision_cache(config.vision_cache, dataset, encoder, config.backbone, config.revision)
    return encoder


def _dry_run(config: ExportConfig, settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Print what the export would do and take, from a few of its items, which are encoded and not kept."""
    dataset = Dataset(config.data)
    plan = _plan(dataset, settings, config.shard_size, config.storage, config.on_image_error, config.images_by)
    encoder = ItemEncoder.load(config.backbone, config.adapter, token_budget=config.token_budget, **given)

    def encode(rows: range) -> None:
        with closing(Readers(READERS, config.image_timeout)) as readers:
            for piece, images in _images_of(encoder, dataset, plan, [rows], readers):
                encode_rows(encoder, [dataset.titles[row] or "" for row in piece], images, "null", config.storage)

    found = estimate(plan, config.out, encode, encoder.backbone.device)
    console.summary("dry run: nothing was written", told(found) | {"licence": backbone_licence(config.backbone)})
    return found


def export_as_told(
    config: ExportConfig | EncodeFrozenConfig | EncodePromptedConfig,
    settings: Mapping[str, Any],
    load_encoder: Callable[[Dataset], Encoder],
    on_image_error: ImagePolicy,
) -> dict[str, Any]:
    """Do what every command with an encoder does: export, print what came out, and refuse too many failures.

    Args:
        config: the command's settings.
        settings: as of `export`.
        load_encoder: as of `export`, for the dataset that the settings name.
        on_image_error: as of `export`.
    """
    dataset = Dataset(config.data)
    manifest = export(
        dataset,
        config.out,
        settings,
        lambda: load_encoder(dataset),
        shard_size=config.shard_size,
        storage=config.storage,
        on_image_error=on_image_error,
        images_by=config.images_by,
        image_timeout=config.image_timeout,
    )
    print_summary(manifest, config.out)
    warn_of_collapse(effective_ranks(config.out))
    check_failures(manifest, config.out, config.max_failures)
    return manifest


def export(
    dataset: Dataset,
    out: Path,
    settings: Mapping[str, Any],
    load_encoder: Callable[[], Encoder],
    *,
    shard_size: int = 4096,
    storage: Literal["float32", "float16"] = "float32",
    on_image_error: ImagePolicy = "null",
    images_by: Literal["mtime", "bytes"] = "mtime",
    image_timeout: float = 60.0,
) -> dict[str, Any]:
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
        image_timeout: Seconds after which the read of an image is given up.
    """
    plan = _plan(dataset, settings, shard_size, storage, on_image_error, images_by)
    with writing(out):
        finished = shards.begin(out, plan)
        unfinished = [number for number in range(len(plan)) if number not in finished]
        if unfinished:
            shards.require_space(out, plan, sum(len(plan.rows(number)) for number in unfinished))
            try:
                encoder = _same_settings(load_encoder(), settings)
                with closing(Readers(READERS, image_timeout)) as readers:
                    _publish_all(encoder, dataset, out, plan, unfinished, finished, readers)
            except (KeyboardInterrupt, SystemExit):
                console.log.print(
                    f"stopped: {len(finished)} of {len(plan)} shards are finished and kept; run the same command again"
                    " to go on"
                )
                raise
        elif (out / schema.MANIFEST_FILE).exists():
            console.log.print(f"{out} is already complete")
        return shards.finish(out, plan, finished, dataset.path)


def _plan(
    dataset: Dataset,
    settings: Mapping[str, Any],
    shard_size: int,
    storage: str,
    on_image_error: ImagePolicy,
    images_by: Literal["mtime", "bytes"],
) -> Plan:
    if on_image_error == "text_only" and schema.TEXT not in settings["views"]:
        raise ConfigError(
            "--on-image-error text_only needs a text vector, and neither internal fusion nor --views image has one",
            "fail or null with these",
            "choose one of the two, or external fusion of both views",
        )
    inputs = input_settings(
        dataset.item_ids,
        dataset.titles,
        dataset.image_paths,
        dataset.image_root,
        images_by,
        schema.modalities_of(settings["views"]),
    )
    choices = {"storage": storage, "on_image_error": on_image_error}
    return plan_shards(dataset.item_ids, shard_size, {**settings, **choices, **inputs})


def _publish_all(
    encoder: Encoder,
    dataset: Dataset,
    out: Path,
    plan: Plan,
    numbers: Sequence[int],
    finished: dict[int, shards.Shard],
    readers: Readers,
) -> None:
    """Encode shard after shard while a thread writes the one before; `finished` holds what is published, whatever ends.

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
            for number, table, seconds in _encoded(encoder, dataset, plan, numbers, readers):
                settle()
                at_work = number, writer.submit(shards.publish, out, plan, number, table, seconds)
        finally:
            settle()
    total = max(time.perf_counter() - begun, 1e-9)
    console.log.print(
        f"the model waited {readers.waited / total:.0%} of the time for images and {for_disk / total:.0%} for the disk"
    )


def encode_rows(
    encoder: Encoder,
    titles: Sequence[str],
    images: Sequence[Picture],
    policy: ImagePolicy = "null",
    storage: Literal["float32", "float16"] = "float32",
) -> Rows:
    """Encode items; an item whose image or vectors cannot be used becomes a row with a reason.

    NaN and infinity get a second chance: alone, and in float32.

    With the policy `text_only` an item without image has its text vector as fused vector, with the others none at all.
    """
    bad = {row: image for row, image in enumerate(images) if isinstance(image, ImageError)}
    wanted = [row for row in range(len(titles)) if row not in bad or policy == "text_only"]
    views, dim = encoder.settings["views"], encoder.settings["dim"]
    vectors = {view: np.full((len(titles), dim), np.nan, np.float32) for view in views}
    truncated = np.zeros(len(titles), bool)

    def encode(rows: Sequence[int]) -> None:
        found = encoder.encode_items([titles[row] for row in rows], [images[row] for row in rows])
        truncated[rows] = found.truncated
        for view in views:
            vectors[view][rows] = getattr(found, view)
        without_image = [row for row in rows if row in bad]
        if without_image:
            vectors[schema.IMAGE][without_image] = np.nan
            vectors[schema.FUSED][without_image] = vectors[schema.TEXT][without_image]

    def unusable(row: int) -> str:
        """Return why a vector that should be there cannot be stored, or an empty text."""
        promised = [view for view in views if row not in bad or view != schema.IMAGE]
        if broken := [view for view in promised if not np.isfinite(vectors[view][row]).all()]:
            return f"the model gives NaN or infinity ({', '.join(broken)})"
        if any(np.abs(vectors[view][row]).max() > np.finfo(storage).max for view in promised):
            return f"a value is too large for {storage}; export with --storage float32"
        return ""

    if wanted:
        encode(wanted)
    reasons: dict[int, str] = {row: str(image) for row, image in bad.items()}
    failed = set(bad) - set(wanted)
    if broken := [row for row in wanted if unusable(row)]:
        with encoder.in_float32() if isinstance(encoder, ItemEncoder) else nullcontext():
            for row in broken:
                encode([row])  # a neighbour in the batch may have caused it
                if reason := unusable(row):
                    failed.add(row)
                    reasons[row] = reason
    for view in views:
        vectors[view][list(failed)] = np.nan
    status = [_status(row in failed, row in bad, bool(truncated[row])) for row in range(len(titles))]
    return Rows(vectors, status, [reasons.get(row) for row in range(len(titles))])


def _status(failed: bool, without_image: bool, truncated: bool) -> str:
    if failed:
        return schema.STATUS_FAILED
    if without_image:
        return schema.STATUS_TEXT_ONLY
    return schema.STATUS_TRUNCATED if truncated else schema.STATUS_OK


def _encoded(
    encoder: Encoder, dataset: Dataset, plan: Plan, numbers: Sequence[int], readers: Readers
) -> Iterator[tuple[int, pa.Table, float]]:
    """Yield each shard's number, table and seconds."""
    total = sum(len(plan.rows(number)) for number in numbers)
    with console.progress("encoding items", total) as advance:
        for count, number in enumerate(numbers, 1):
            start = time.perf_counter()
            table = _encode_shard(encoder, dataset, plan, number, advance, readers)
            seconds = time.perf_counter() - start
            yield number, table, seconds
            if not console.log.is_terminal:  # no bar is drawn: a log file gets a line a shard
                console.log.print(
                    f"shard {count} of {len(numbers)}: {table.num_rows} items, {table.num_rows / seconds:.1f} items/s"
                )


def _encode_shard(
    encoder: Encoder, dataset: Dataset, plan: Plan, number: int, advance: Callable[[int], None], readers: Readers
) -> pa.Table:
    policy, storage = plan.settings["on_image_error"], plan.settings["storage"]
    parts: list[Rows] = []
    for rows, images in _images_of(encoder, dataset, plan, _pieces(plan.rows(number)), readers):
        if policy == "fail":
            _require_images(dataset, rows, images)
        titles = [dataset.titles[row] or "" for row in rows]
        parts.append(encode_rows(encoder, titles, images, policy, storage))
        advance(len(rows))
    return shards.shard_table(
        plan,
        number,
        {view: np.concatenate([part.vectors[view] for part in parts]) for view in plan.settings["views"]},
        [status for part in parts for status in part.status],
        [error for part in parts for error in part.error],
    )


def _pieces(rows: range) -> list[range]:
    return [rows[start : start + ITEMS_AT_ONCE] for start in range(0, len(rows), ITEMS_AT_ONCE)]


def _images_of(
    encoder: Encoder, dataset: Dataset, plan: Plan, pieces: Sequence[range], readers: Readers
) -> Iterator[tuple[range, list[Picture]]]:
    """Yield pieces of the rows with their images; without opening any where the vectors are of text alone."""
    if schema.IMAGE in schema.modalities_of(plan.settings["views"]):
        opener = encoder.open_image if isinstance(encoder, ItemEncoder) else _plain_opener(plan.settings["max_pixels"])
        yield from _read_images(dataset, pieces, opener, readers)
    else:
        for rows in pieces:
            yield rows, [None] * len(rows)


Opener = Callable[[Path, str], Picture]


def _plain_opener(max_pixels: int) -> Opener:
    return lambda root, relative: open_image(root, relative, max_pixels)


def _read_images(
    dataset: Dataset, pieces: Iterable[range], opener: Opener, readers: Readers
) -> Iterator[tuple[range, list[Picture]]]:
    """Yield the images of each piece; threads read the next piece while this one is encoded."""
    root = dataset.image_root

    def take(reading: Reading[Picture]) -> Picture:
        try:
            return readers.take(reading)
        except ImageError as error:
            return error

    ahead: deque[tuple[range, list[Reading[Picture]]]] = deque()
    for piece in pieces:
        ahead.append((piece, [readers.ask(partial(opener, root, dataset.image_paths[row])) for row in piece]))
        if len(ahead) == 2:
            rows, readings = ahead.popleft()
            yield rows, [take(reading) for reading in readings]
    for rows, readings in ahead:
        yield rows, [take(reading) for reading in readings]


def _require_images(dataset: Dataset, rows: range, images: Sequence[Picture]) -> None:
    for row, image in zip(rows, images, strict=True):
        if isinstance(image, ImageError):
            raise DataError(
                f"the image {dataset.image_paths[row]!r} of item {dataset.item_ids[row]!r} cannot be used: {image}",
                f"a readable image below {dataset.image_root} for every item",
                "mend it, or let it be a row with a reason: --on-image-error null or text_only",
            )


def _same_settings(encoder: Encoder, expected: Mapping[str, Any]) -> Encoder:
    """Return the encoder if it is what the plan was made for: its files may have been replaced meanwhile."""
    found = encoder.settings
    changed = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
    if changed:
        raise ModelError(
            f"the loaded encoder has other settings than its files said a moment ago ({', '.join(changed)})",
            "a backbone and an adapter that nobody changes meanwhile",
            "run the command again",
        )
    return encoder


def print_summary(manifest: Mapping[str, Any], out: Path) -> None:
    """Print what an embeddings folder holds."""
    timed = [shard for shard in manifest["shards"] if shard["seconds"]]
    seconds = sum(shard["seconds"] for shard in timed)
    rate = f", {sum(shard['rows'] for shard in timed) / seconds:.1f} items/s" if seconds else ""
    console.summary(
        "embeddings",
        {
            "items": f"{manifest['num_items']:,} in {len(manifest['shards'])} shards{rate}",
            **{status: f"{count:,}" for status, count in manifest["counts"].items() if count},
            "vectors": f"{', '.join(manifest['views'])}: {manifest['dtype']}[{manifest['dim']}]",
            "size": f"{sum(shard['bytes'] for shard in manifest['shards']) / 2**20:.1f} MiB",
            "folder": out,
        },
    )


def check_failures(manifest: Mapping[str, Any], out: Path, max_failures: float) -> None:
    """Raise `FailureLimitError` when more than that share of the items failed."""
    failed, items = manifest["counts"][schema.STATUS_FAILED], manifest["num_items"]
    if failed > max_failures * items:
        raise FailureLimitError(
            f"the export is complete, but {failed} of {items} items failed ({failed / items:.1%})",
            f"at most {max_failures:.1%}",
            f"look at the error column in {out}, mend these items and export again, or raise --max-failures",
        )
