"""Makes the rows of one shard: reads images, encodes items, and reuses earlier rows that are still right."""

from __future__ import annotations

import copy
import functools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from vlm2rec.embedder.backbones.image_readers import Readers, Reading
from vlm2rec.embedder.backbones.images import ImageError, open_image
from vlm2rec.embedder.contract import precision, schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, DataError, ModelError
from vlm2rec.embedder.contract.storage import Location
from vlm2rec.embedder.encoders.item_encoder import EncodedItems, ItemEncoder, Picture
from vlm2rec.embedder.encoders.item_text import item_texts
from vlm2rec.embedder.export import shard_file, short
from vlm2rec.embedder.export.plan import Inputs, Plan
from vlm2rec.embedder.export.reuse import EarlierRows
from vlm2rec.embedder.options import ImagePolicy, Storage

ITEMS_AT_ONCE = 128  # whose images are read together, and which are sorted into batches together
READERS = min(8, os.cpu_count() or 1)


class Encoder(Protocol):
    """What `export` needs of an encoder; `ItemEncoder` is one."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides a vector, as JSON: `dim`, `views`, `max_pixels` and the rest."""

    def encode_items(self, titles: Sequence[str], images: Sequence[Picture]) -> EncodedItems:
        """Return the vectors of n items; rows of NaN where a view is absent."""


@dataclass(frozen=True)
class EncodedRows:
    """The result for some items: vectors (NaN where there are none), status, and reason of a failure."""

    vectors: dict[str, np.ndarray]  # view → (n, d) float32
    status: list[str]
    error: list[str | None]


class ShardMaker:
    """Makes the shards of a plan: encodes new rows and reuses earlier ones. Loads the encoder when it is first needed.

    Args:
        dataset: the items.
        plan: which of them goes into which shard.
        load_encoder: called once, if there is something to encode.
        earlier: the rows to reuse.
        image_timeout: seconds after which reading an image is given up.
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: Plan,
        load_encoder: Callable[[], Encoder],
        earlier: EarlierRows | None = None,
        image_timeout: float = 60.0,
    ) -> None:
        self.dataset, self.plan, self.earlier = dataset, plan, earlier
        self._version = plan.dataset_version
        self.readers = Readers(READERS, image_timeout)
        self._encoder = functools.cache(load_encoder)

    def close(self) -> None:
        """Stop the image readers."""
        self.readers.close()

    def shard(
        self, number: int, reuse_rows: np.ndarray, advance: Callable[[int], None]
    ) -> tuple[pa.Table, short.Kept | None]:
        """Return the table of a shard and, if all its rows are new, the neighbours that short vectors keep.

        `reuse_rows` holds positions of earlier rows, -1 for rows to encode.

        Raises:
            DataError: the dataset is no longer the one that was planned, or an image has changed since.
        """
        self._require_same_dataset()
        rows = np.array(self.plan.rows(number))
        new, kept = None, None
        if (reuse_rows < 0).any():
            new, kept = self._encoded([int(row) for row in rows[reuse_rows < 0]], advance)
        if self.earlier is None or (reuse_rows < 0).all():
            assert new is not None
            return new, kept
        # no cast: it refuses a null list whose elements may not be null, as in a view that is not exported
        known = self.earlier.take(reuse_rows[reuse_rows >= 0]).replace_schema_metadata(self.plan.schema.metadata)
        both = known if new is None else pa.concat_tables([new, known])
        # some rows alone tell little: the record of the part keeps what was measured when it was made
        order = np.concatenate([np.flatnonzero(reuse_rows < 0), np.flatnonzero(reuse_rows >= 0)])
        return both.take(np.argsort(order)), None

    def encoded(self, rows: Sequence[int], advance: Callable[[int], None] = lambda count: None) -> pa.Table:
        """Encode some items, and return their table."""
        return self._encoded(rows, advance)[0]

    def _encoded(self, rows: Sequence[int], advance: Callable[[int], None]) -> tuple[pa.Table, short.Kept | None]:
        policy, storage = self.plan.settings["on_image_error"], self.plan.settings["storage"]
        encoder, inputs = self._encoder(), self.plan.inputs
        assert inputs is not None
        parts: list[EncodedRows] = []
        for piece, images in _images_of(encoder, self.plan, inputs, rows, self.readers, self.dataset.require_images):
            if policy == "fail":
                _require_images(inputs, piece, images)
            titles = [inputs.titles[row] if inputs.titles is not None else "" for row in piece]
            parts.append(encode_rows(encoder, titles, images, policy, storage))
            advance(len(piece))
        settings = self.plan.settings
        full = {view: np.concatenate([part.vectors[view] for part in parts]) for view in settings["views"]}
        table = shard_file.shard_table(
            self.plan,
            rows,
            short.shorten_views(full, settings),
            [status for part in parts for status in part.status],
            [error for part in parts for error in part.error],
        )
        return table, short.measure(full, settings) if short.is_short(settings) else None

    def _require_same_dataset(self) -> None:
        """Hold the dataset against the plan. Its files are read again only if one of them was written since."""
        version = self.dataset.version_now()
        if version == self._version:
            return
        fresh = copy.copy(self.dataset)  # which reads the files again
        try:
            changes = _changes(fresh, self.plan)
        except ArtifactError as error:
            changes = [error.found]
        if changes:
            raise DataError(
                f"{self.dataset.path} was changed while its items were encoded: {'; '.join(changes)}",
                "the dataset that the export began with, until all workers have ended",
                "put the earlier items.parquet and dataset.json back and run the same command again, or export the new"
                " dataset into a new --out folder (--changed-since reuses what is the same)",
            )
        self._version = version


def _changes(dataset: Dataset, plan: Plan) -> list[str]:
    """Return what differs between a dataset and what was planned, with up to three examples."""
    inputs = plan.inputs
    assert inputs is not None
    found, planned = dataset.item_ids, plan.item_ids
    changes = [] if len(found) == len(planned) else [f"it has {len(found)} items, {len(planned)} were planned"]
    columns: list[tuple[str, Sequence[Any], Sequence[Any]]] = [("item", found, planned)]
    if inputs.titles is not None:
        texts = list(item_texts(dataset, plan.settings))
        columns.append(("title", texts, inputs.titles))
    if inputs.image_paths is not None:
        columns.append(("image", dataset.image_paths, inputs.image_paths))
        if str(dataset.image_root) != str(inputs.image_root):
            changes.append(f"its images are in {dataset.image_root}, and were in {inputs.image_root}")
    for name, now, then in columns:
        if now != then:
            pairs = enumerate(zip(now, then, strict=False))
            rows = [f"row {row} has {name} {new!r} in place of {old!r}" for row, (new, old) in pairs if new != old]
            return [*changes, *rows[:3]]
    return changes


def _pieces(rows: Sequence[int]) -> list[Sequence[int]]:
    return [rows[start : start + ITEMS_AT_ONCE] for start in range(0, len(rows), ITEMS_AT_ONCE)]


def _images_of(
    encoder: Encoder,
    plan: Plan,
    inputs: Inputs,
    rows: Sequence[int],
    readers: Readers,
    require_folder: Callable[[], object],
) -> Iterator[tuple[Sequence[int], list[Picture]]]:
    """Yield rows piece by piece with their images; no image is opened if the vectors are of text alone."""
    pieces = _pieces(rows)
    if schema.IMAGE in schema.modalities_of(plan.settings["views"]):
        opener = encoder.open_image if isinstance(encoder, ItemEncoder) else _plain_opener(plan.settings["max_pixels"])
        yield from _read_images(inputs, pieces, opener, readers, require_folder)
    else:
        for piece in pieces:
            yield piece, [None] * len(piece)


Opener = Callable[[Location, str], Picture]


def _plain_opener(max_pixels: int) -> Opener:
    return lambda root, relative: open_image(root, relative, max_pixels)


class _ChangedImageError(ImageError):
    """The image is another one than was planned."""


def _read_images(
    inputs: Inputs,
    pieces: Iterable[Sequence[int]],
    opener: Opener,
    readers: Readers,
    require_folder: Callable[[], object],
) -> Iterator[tuple[Sequence[int], list[Picture]]]:
    """Yield the images of each piece; threads read the next piece while this one is encoded."""
    root, paths = inputs.image_root, inputs.image_paths
    assert root is not None and paths is not None

    def read(row: int) -> Picture:
        picture = opener(root, paths[row])
        if inputs.image_has_changed(row):  # what was read is not what the row's hash stands for
            raise _ChangedImageError(paths[row])
        return picture

    def take(reading: Reading[Picture]) -> Picture:
        try:
            return readers.take(reading)
        except ImageError as error:
            return error

    def taken(readings: Sequence[Reading[Picture]]) -> list[Picture]:
        pictures = [take(reading) for reading in readings]
        if any(isinstance(picture, ImageError) for picture in pictures):
            require_folder()  # the disk may be gone: that is no fault of these items
        if changed := [str(picture) for picture in pictures if isinstance(picture, _ChangedImageError)]:
            raise DataError(
                f"images were changed while the items were encoded: {', '.join(changed[:3])}",
                "the images that the export began with, until it ends",
                "run the same command again: it says how to continue",
            )
        return pictures

    ahead: deque[tuple[Sequence[int], list[Reading[Picture]]]] = deque()
    for piece in pieces:
        ahead.append((piece, [readers.ask(functools.partial(read, row)) for row in piece]))
        if len(ahead) == 2:
            rows, readings = ahead.popleft()
            yield rows, taken(readings)
    for rows, readings in ahead:
        yield rows, taken(readings)


def _require_images(inputs: Inputs, rows: Sequence[int], images: Sequence[Picture]) -> None:
    for row, image in zip(rows, images, strict=True):
        if isinstance(image, ImageError):
            path = inputs.image_paths[row] if inputs.image_paths is not None else ""
            raise DataError(
                f"the image {path!r} of item {inputs.item_ids[row]!r} cannot be used: {image}",
                f"a readable image below {inputs.image_root} for every item",
                "repair it, or choose --on-image-error null or text_only, which stores the reason in the item's row",
            )


def load_same(load_encoder: Callable[[], Encoder], expected: Mapping[str, Any]) -> Encoder:
    """Load the encoder and require that it matches the plan: its files may have been replaced meanwhile."""
    encoder = load_encoder()
    found = encoder.fingerprint
    changed = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
    if changed:
        raise ModelError(
            f"the loaded encoder has other settings than its files said a moment ago ({', '.join(changed)})",
            "a backbone and an adapter that nobody changes during the export",
            "run the command again",
        )
    return encoder


def encode_rows(
    encoder: Encoder,
    titles: Sequence[str],
    images: Sequence[Picture],
    policy: ImagePolicy = "null",
    storage: Storage = "float32",
) -> EncodedRows:
    """Encode items; an item whose image or vectors cannot be used becomes a row with a reason.

    An item with NaN or infinity is encoded once more: alone, and in float32.

    With the policy `text_only`, an item without an image gets its text vector as fused vector; with the other
    policies it gets no vector.
    """
    bad = {row: image for row, image in enumerate(images) if isinstance(image, ImageError)}
    wanted = [row for row in range(len(titles)) if row not in bad or policy == "text_only"]
    views, dims = encoder.fingerprint["views"], schema.dims_of(encoder.fingerprint)
    vectors = {view: np.full((len(titles), dims[view]), np.nan, np.float32) for view in views}
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
        """Return why an expected vector cannot be stored, or an empty text."""
        promised = [view for view in views if row not in bad or view != schema.IMAGE]
        if broken := [view for view in promised if not np.isfinite(vectors[view][row]).all()]:
            return f"the model gives NaN or infinity ({', '.join(broken)})"
        if any(np.abs(vectors[view][row]).max() > precision.largest(storage) for view in promised):
            return f"a value is too large for {storage}; export with --storage float32"
        return ""

    if wanted:
        encode(wanted)
    reasons: dict[int, str] = {row: str(image) for row, image in bad.items()}
    failed = set(bad) - set(wanted)
    suspected = _suspected(vectors, precision.largest(storage))
    if broken := [row for row in wanted if suspected[row] and unusable(row)]:
        with encoder.in_float32() if isinstance(encoder, ItemEncoder) else nullcontext():
            for row in broken:
                encode([row])  # another item of the batch may have caused it
                if reason := unusable(row):
                    failed.add(row)
                    reasons[row] = reason
    for view in views:
        vectors[view][list(failed)] = np.nan
    status = [_status(row in failed, row in bad, bool(truncated[row])) for row in range(len(titles))]
    return EncodedRows(vectors, status, [reasons.get(row) for row in range(len(titles))])


def _suspected(vectors: Mapping[str, np.ndarray], limit: float) -> np.ndarray:
    """Return which rows hold NaN, infinity or a value above the limit in some view, (n,) bool.

    All rows at once: one at a time takes ten times as long, which shows where encoding costs little.
    """
    found = np.zeros(len(next(iter(vectors.values()))), bool)
    for values in vectors.values():
        with np.errstate(invalid="ignore"):
            found |= ~(np.abs(values).max(axis=1) <= limit)  # NaN is not below any limit
    return found


def _status(failed: bool, without_image: bool, truncated: bool) -> str:
    if failed:
        return schema.STATUS_FAILED
    if without_image:
        return schema.STATUS_TEXT_ONLY
    return schema.STATUS_TRUNCATED if truncated else schema.STATUS_OK
