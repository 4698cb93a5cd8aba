"""`vlm2rec export-items`: every item of a dataset once through the encoder, into an embeddings folder.

`export` takes any encoder and can be called from Python; `run` is the command, with `ItemEncoder`.
"""

from __future__ import annotations

import functools
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from vlm2rec.embedder import schema, shards
from vlm2rec.embedder.dataset import Dataset
from vlm2rec.embedder.earlier_rows import EarlierRows
from vlm2rec.embedder.encode import EncodedItems, ItemEncoder, Picture, encoder_settings
from vlm2rec.embedder.errors import ArtifactError, ConfigError, DataError, FailureLimitError, ModelError
from vlm2rec.embedder.export_plan import ImagesBy, Inputs, Plan, plan_shards, read_inputs
from vlm2rec.embedder.images import ImageError, open_image
from vlm2rec.embedder.writer_lock import writing
from vlm2rec.pipelines import console
from vlm2rec.pipelines.config import EncodeFrozenConfig, EncodePromptedConfig, ExportConfig, ImagePolicy
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

    Raises:
        DataError: the dataset cannot be used, or an image cannot and the policy is `fail`.
        ModelError, ConfigError: as `ItemEncoder.load`.
        ArtifactError: the output folder is of another export, in use, not writable, or full.
        FailureLimitError: the export is complete, but more items failed than `max_failures` allows.
    """
    given: dict[str, Any] = {name: getattr(config, name) for name in _ENCODER_ARGUMENTS}
    return export_as_told(
        config,
        encoder_settings(config.backbone, config.adapter, **given),
        lambda dataset: _load(config, dataset, given),
        config.on_image_error,
    )


def _load(config: ExportConfig, dataset: Dataset, given: Mapping[str, Any]) -> ItemEncoder:
    encoder = ItemEncoder.load(config.backbone, config.adapter, token_budget=config.token_budget, **given)
    use_vision_cache(config.vision_cache, dataset, encoder, config.backbone, config.revision)
    return encoder


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
        reuse=Reuse(config.extend, config.retry_failed, config.changed_since),
    )
    print_summary(manifest, config.out)
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
    changed_since: Path | None = None

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


def export(
    dataset: Dataset,
    out: Path,
    settings: Mapping[str, Any],
    load_encoder: Callable[[], Encoder],
    *,
    shard_size: int = 4096,
    storage: Literal["float32", "float16"] = "float32",
    on_image_error: ImagePolicy = "null",
    images_by: ImagesBy = "mtime",
    reuse: Reuse = Reuse(),
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
        reuse: What is kept where the input has changed.
    """
    if on_image_error == "text_only" and schema.TEXT not in settings["views"]:
        raise ConfigError(
            "--on-image-error text_only needs a text vector, and neither internal fusion nor --views image has one",
            "fail or null with these",
            "choose one of the two, or external fusion of both views",
        )
    inputs = read_inputs(
        dataset.item_ids,
        dataset.titles,
        dataset.image_paths,
        dataset.image_root,
        images_by,
        schema.modalities_of(settings["views"]),
    )
    choices = {"storage": storage, "on_image_error": on_image_error}
    plan = plan_shards(
        dataset.item_ids,
        shard_size,
        {**settings, **choices},
        inputs,
        shards.rows_of_shards(out) if out.is_dir() else (),
    )
    with writing(out):
        if reuse.revises:
            _require_same_start(out, inputs, reuse)
        finished = shards.begin(out, plan, reuse.revises)
        earlier = _earlier_rows(out, plan, finished, reuse)
        work = _work(plan, finished, earlier, reuse)
        if work:
            shards.require_space(out, plan, sum(len(plan.rows(number)) for number in work))
            try:
                make = _Maker(dataset, plan, lambda: _same_settings(load_encoder(), settings), earlier)
                _publish_all(make, out, work, finished)
            except (KeyboardInterrupt, SystemExit):
                console.log.print(
                    f"stopped: {len(finished)} of {len(plan)} shards are finished and kept; run the same command again"
                    " to go on"
                )
                raise
        elif (out / schema.MANIFEST_FILE).exists():
            console.log.print(f"{out} is already complete")
        return shards.finish(out, plan, finished, dataset.path)


def _require_same_start(out: Path, inputs: Inputs, reuse: Reuse) -> None:
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


def _earlier_rows(out: Path, plan: Plan, finished: Mapping[int, shards.Shard], reuse: Reuse) -> EarlierRows | None:
    if reuse.changed_since is not None:
        return EarlierRows.of_export(reuse.changed_since, plan)
    if reuse.retry_failed and finished:
        return EarlierRows(out, [shard.file for shard in finished.values()])
    return None


def _work(
    plan: Plan, finished: Mapping[int, shards.Shard], earlier: EarlierRows | None, reuse: Reuse
) -> dict[int, np.ndarray]:
    """Return the shards to make, and where the earlier export has each of their rows: -1 for those to encode."""
    work = {}
    for number in range(len(plan)):
        if number in finished and not reuse.retry_failed:
            continue
        rows = plan.rows(number)
        held = np.full(len(rows), -1) if earlier is None else earlier.find(plan, rows)
        if number not in finished or (held < 0).any():
            work[number] = held
    return work


def _publish_all(make: _Maker, out: Path, work: Mapping[int, np.ndarray], finished: dict[int, shards.Shard]) -> None:
    """Encode shard after shard while a thread writes the one before; `finished` holds what is published, whatever ends.

    At most two shards are in memory: a slow disk slows the export down, and does not fill the memory.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="writer") as writer:
        at_work: tuple[int, Future[shards.Shard]] | None = None

        def settle() -> None:
            if at_work is not None:
                started = time.perf_counter()
                finished[at_work[0]] = at_work[1].result()
                make.waits.for_disk += time.perf_counter() - started

        try:
            for number, table, seconds in _made(make, work):
                settle()
                at_work = number, writer.submit(shards.publish, out, make.plan, number, table, seconds)
        finally:
            settle()
    console.log.print(str(make.waits))


@dataclass
class Waits:
    """Where an export spent its time, in seconds."""

    begun: float = field(default_factory=time.perf_counter)
    for_images: float = 0.0
    for_disk: float = 0.0

    def __str__(self) -> str:
        """Say which side waited for which."""
        total = max(time.perf_counter() - self.begun, 1e-9)
        images, disk = self.for_images / total, self.for_disk / total
        return f"the model waited {images:.0%} of the time for images and {disk:.0%} for the disk"


def encode_rows(
    encoder: Encoder,
    titles: Sequence[str],
    images: Sequence[Picture],
    policy: ImagePolicy = "null",
    storage: Literal["float32", "float16"] = "float32",
) -> Rows:
    """Encode items; an item whose image or vectors cannot be used becomes a row with a reason.

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
    for row in [row for row in wanted if unusable(row)]:
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


def _made(make: _Maker, work: Mapping[int, np.ndarray]) -> Iterator[tuple[int, pa.Table, float]]:
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


class _Maker:
    """Makes the shards of a plan: encodes what is new, and takes over what is not. Loads the encoder when it must.

    Args:
        dataset: the items.
        plan: which of them in which shard.
        load_encoder: called once, if there is something to encode.
        earlier: where other rows are taken from.
    """

    def __init__(
        self, dataset: Dataset, plan: Plan, load_encoder: Callable[[], Encoder], earlier: EarlierRows | None = None
    ) -> None:
        self.dataset, self.plan, self.earlier, self.waits = dataset, plan, earlier, Waits()
        self._encoder = functools.cache(load_encoder)

    def shard(self, number: int, held: np.ndarray, advance: Callable[[int], None]) -> pa.Table:
        """Return the table of a shard; `held` says where earlier rows lie, -1 for those to encode."""
        rows = np.array(self.plan.rows(number))
        new = self._encoded([int(row) for row in rows[held < 0]], advance) if (held < 0).any() else None
        if self.earlier is None or (held < 0).all():
            assert new is not None
            return new
        known = self.earlier.take(held[held >= 0]).cast(self.plan.schema)
        both = known if new is None else pa.concat_tables([new, known])
        return both.take(np.argsort(np.concatenate([np.flatnonzero(held < 0), np.flatnonzero(held >= 0)])))

    def _encoded(self, rows: Sequence[int], advance: Callable[[int], None]) -> pa.Table:
        policy, storage = self.plan.settings["on_image_error"], self.plan.settings["storage"]
        encoder, dataset = self._encoder(), self.dataset
        parts: list[Rows] = []
        with closing(_images_of(encoder, dataset, self.plan, rows, self.waits)) as pieces:
            for piece, images in pieces:
                if policy == "fail":
                    _require_images(dataset, piece, images)
                titles = [dataset.titles[row] or "" for row in piece]
                parts.append(encode_rows(encoder, titles, images, policy, storage))
                advance(len(piece))
        return shards.shard_table(
            self.plan,
            rows,
            {view: np.concatenate([part.vectors[view] for part in parts]) for view in self.plan.settings["views"]},
            [status for part in parts for status in part.status],
            [error for part in parts for error in part.error],
        )


def _pieces(rows: Sequence[int]) -> list[Sequence[int]]:
    return [rows[start : start + ITEMS_AT_ONCE] for start in range(0, len(rows), ITEMS_AT_ONCE)]


def _images_of(
    encoder: Encoder, dataset: Dataset, plan: Plan, rows: Sequence[int], waits: Waits
) -> Generator[tuple[Sequence[int], list[Picture]]]:
    """Yield pieces of some rows with their images; without opening any where the vectors are of text alone."""
    pieces = _pieces(rows)
    if schema.IMAGE in schema.modalities_of(plan.settings["views"]):
        opener = encoder.open_image if isinstance(encoder, ItemEncoder) else _plain_opener(plan.settings["max_pixels"])
        yield from _read_images(dataset, pieces, opener, waits)
    else:
        for piece in pieces:
            yield piece, [None] * len(piece)


Opener = Callable[[Path, str], Picture]


def _plain_opener(max_pixels: int) -> Opener:
    return lambda root, relative: open_image(root, relative, max_pixels)


def _read_images(
    dataset: Dataset, pieces: Iterable[Sequence[int]], opener: Opener, waits: Waits
) -> Generator[tuple[Sequence[int], list[Picture]]]:
    """Yield the images of each piece; threads read the next piece while this one is encoded."""
    root = dataset.image_root

    def read(row: int) -> Picture:
        try:
            return opener(root, dataset.image_paths[row])
        except ImageError as error:
            return error

    def collect(futures: Sequence[Future[Picture]]) -> list[Picture]:
        started = time.perf_counter()
        images = [future.result() for future in futures]
        waits.for_images += time.perf_counter() - started
        return images

    pool = ThreadPoolExecutor(READERS, thread_name_prefix="image")
    ahead: deque[tuple[Sequence[int], list[Future[Picture]]]] = deque()
    try:
        for piece in pieces:
            ahead.append((piece, [pool.submit(read, row) for row in piece]))
            if len(ahead) == 2:
                rows, futures = ahead.popleft()
                yield rows, collect(futures)
        for rows, futures in ahead:
            yield rows, collect(futures)
    finally:
        pool.shutdown(cancel_futures=True)


def _require_images(dataset: Dataset, rows: Sequence[int], images: Sequence[Picture]) -> None:
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
            f"`vlm2rec failures {out}` lists them; mend these items and run the command again with"
            " --retry-failed, or raise --max-failures",
        )
