"""The items of a dataset as the backbone takes them: each title is prepared once, each image encoded once."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlm2rec.embedder import distributed
from vlm2rec.embedder.backbones.backbone import ImageFeatures
from vlm2rec.embedder.backbones.images import ImageError
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.encoders.item_text import item_texts

if TYPE_CHECKING:
    from vlm2rec.embedder.encoders.item_encoder import ItemEncoder, Picture

IMAGES_AT_ONCE = 64  # opened and encoded together
SEQUENCES_AT_ONCE = 64  # a history of ten items has ten images, and all features are on the device together


class ItemFeatures:
    """Prepared titles and image features by row of `items.parquet`.

    Features stay in memory, on the backbone's device, up to `cache_bytes`; the least recently used are dropped first.
    An unreadable image is replaced by a white one and noted in `unreadable`: a history of ten items is still useful
    if one picture is broken. (An export records a failure instead, because its row holds that item alone.)
    """

    def __init__(self, dataset: Dataset, encoder: ItemEncoder, cache_bytes: int = 2 * 2**30) -> None:
        self._dataset, self._encoder = dataset, encoder
        self._backbone = encoder.backbone
        self._cache_bytes, self._cached_bytes = cache_bytes, 0
        self._titles: dict[int, str] = {}
        self._features: OrderedDict[int, ImageFeatures] = OrderedDict()
        self.unreadable: dict[str, str] = {}

    def apart(self, cache_bytes: int = 2**28) -> ItemFeatures:
        """Return the same items with a cache of their own, for what is measured beside a training.

        It encodes images in other batches, whose rounding differs; a shared cache would pass those features to the
        training and change what is learned.
        """
        return ItemFeatures(self._dataset, self._encoder, cache_bytes)

    def kept_bytes(self, items: int) -> int:
        """Return what the features of so many items take, as far as they are kept; from those that are there."""
        mean = self._cached_bytes / len(self._features) if self._features else 0.0
        return int(min(self._cache_bytes, mean * items))

    def titles(self, rows: Iterable[int]) -> list[str]:
        """Return the prepared titles of `rows`."""
        return [self._title(int(row)) for row in rows]

    @cached_property
    def _texts(self) -> Sequence[str]:
        return item_texts(self._dataset, self._encoder.fingerprint)

    def _title(self, row: int) -> str:
        if row not in self._titles:
            self._titles[row] = self._backbone.prepare_title(self._texts[row])[0]
        return self._titles[row]

    def features(self, sequences: Sequence[Sequence[int]]) -> list[list[ImageFeatures]]:
        """Return the image features of every sequence of rows; an item in several sequences is encoded once."""
        wanted = list(dict.fromkeys(int(row) for rows in sequences for row in rows))
        found = {row: self._features[row] for row in wanted if row in self._features}
        missing = [row for row in wanted if row not in found]
        for start in range(0, len(missing), IMAGES_AT_ONCE):
            rows = missing[start : start + IMAGES_AT_ONCE]
            encoded = self._encoder.encode_images([self._open(row) for row in rows])
            found |= {row: feature for row, feature in zip(rows, encoded, strict=True) if feature is not None}
        self._remember(found)
        return [[found[int(row)] for row in rows] for rows in sequences]

    def _open(self, row: int) -> Picture:
        try:
            return self._encoder.open_image(self._dataset.image_root, self._dataset.image_paths[row])
        except ImageError as error:
            self._dataset.require_images()  # the disk may be gone: white pictures would teach nothing
            self.unreadable[self._dataset.item_ids[row]] = str(error)
            return Image.new("RGB", (112, 112), "white")

    def _remember(self, found: dict[int, ImageFeatures]) -> None:
        for row, features in found.items():
            if row in self._features:
                self._features.move_to_end(row)
            else:
                self._features[row] = features
                self._cached_bytes += features.bytes
        while self._cached_bytes > self._cache_bytes and len(self._features) > 1:
            self._cached_bytes -= self._features.popitem(last=False)[1].bytes


def encode(
    encoder: ItemEncoder, items: ItemFeatures, sequences: Sequence[Sequence[int]], token_budget: int | None = None
) -> dict[str, Tensor]:
    """Encode sequences of item rows; returns `fused`, `text`, `image`, each (n, d) float32 with NaN for absent views.

    Titles or images that the encoder's views do not need are not read.
    """
    nothing: list[list[str]] = [[] for _ in sequences]
    titles = [items.titles(rows) for rows in sequences] if schema.TEXT in encoder.modalities else nothing
    images = items.features(sequences) if schema.IMAGE in encoder.modalities else [[] for _ in sequences]
    return encoder.encode_sequences(titles, images, token_budget)


@torch.no_grad()
def encode_rows(
    encoder: ItemEncoder,
    items: ItemFeatures,
    sequences: Sequence[Sequence[int]],
    advance: Callable[[int], None] = lambda count: None,
    at_least: int = 0,
) -> dict[str, np.ndarray]:
    """Encode sequences of item rows, each a history or a single item; returns each view as (n, d) float32.

    `advance` receives the size of every finished batch of sequences. Without enough sequences for `at_least` of them,
    the last ones are empty.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, max(len(sequences), at_least * SEQUENCES_AT_ONCE), SEQUENCES_AT_ONCE):
        batch = sequences[start : start + SEQUENCES_AT_ONCE]
        for view, vectors in encode(encoder, items, batch).items():
            parts.setdefault(view, []).append(vectors.float().cpu().numpy())
        advance(len(batch))
    return {view: np.concatenate(blocks) for view, blocks in parts.items()}


def encode_users_together(
    encoder: ItemEncoder,
    items: ItemFeatures,
    histories: Sequence[Sequence[int]],
    told: Callable[[float], None] = lambda share: None,
) -> dict[str, np.ndarray]:
    """Return the users' vectors by view: their histories encoded as sequences, by all processes together.

    If the encoder reads only single items, a user's vector is the mean of the history's item vectors (§5.1.3). `told`
    receives the share that is done, 0 to 1, after every batch.
    """
    if encoder.settings.reads_histories:
        return encode_rows_together(encoder, items, histories, told)
    rows, index = np.unique(np.concatenate([np.asarray(history) for history in histories]), return_inverse=True)
    found = encode_rows_together(encoder, items, [[int(row)] for row in rows], told)
    starts = np.cumsum([0, *(len(history) for history in histories[:-1])])
    lengths = np.array([len(history) for history in histories], np.float32)[:, None]
    return {view: np.add.reduceat(vectors[index], starts, axis=0) / lengths for view, vectors in found.items()}


def encode_rows_together(
    encoder: ItemEncoder,
    items: ItemFeatures,
    sequences: Sequence[Sequence[int]],
    told: Callable[[float], None] = lambda share: None,
) -> dict[str, np.ndarray]:
    """Like `encode_rows`, but each of the processes that train together encodes a share; all get all vectors.

    `told` receives the share of this process's part that is done, 0 to 1, after every batch.
    """
    # as many batches as the first process, which has the largest share: a sharded model runs everywhere or nowhere
    largest = math.ceil(len(sequences) / distributed.count())
    batches = math.ceil(largest / SEQUENCES_AT_ONCE) if encoder.backbone.sharded else 0
    part, done = distributed.share(sequences), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        told(done / len(part) if part else 1.0)

    own = encode_rows(encoder, items, part, advance, at_least=batches)
    if distributed.count() == 1:
        return own
    nothing = np.empty((0, encoder.dim), np.float32)  # fewer sequences than processes
    device = encoder.backbone.device
    return {
        view: distributed.gather_shares(torch.from_numpy(own.get(view, nothing)).to(device)).cpu().numpy()
        for view in schema.VIEWS
    }
