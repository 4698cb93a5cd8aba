"""The frozen vision tower's features of each image, kept on disk: computed once for all trainings and exports.

A cache folder holds one folder for each vision tower, named after everything that decides its tokens: weights, image
processor and number format. In that folder, every writer has its own segment:

    about.json                     what decides the tokens, readable
    segment-<id>.tokens            tokens, image after image, in the tower's number format: nothing is rounded
    segment-<id>.index             a record for each image, written after its tokens

The SHA-256 of its file identifies an image. A changed image is therefore encoded again, and an image that two items
share is kept once. Any number of processes may read and write; a killed writer leaves at most tokens without a record.
Each record has a checksum over itself, its tokens and the name of its folder. If it does not match, the image is
encoded again: tokens that are damaged, cut short or of another vision tower are never used.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import uuid
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlm2rec.embedder.backbones.backbone import Backbone, ImageFeatures, Patches
from vlm2rec.embedder.backbones.images import decode, read_file
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.storage import Location

_FORMAT = 2
_RECORD = np.dtype(
    [
        ("image", "V32"),  # SHA-256 of the file
        ("offset", "<u8"),
        ("tokens", "<u4"),
        ("layers", "<u4"),  # the merged tokens, and one more for each early layer that Qwen3-VL feeds
        ("grid", "<i4", (3,)),  # zeros for families without it
        ("checksum", "<u4"),
    ]
)


@dataclass(frozen=True)
class NewImage:
    """An image that is not in the cache yet."""

    key: bytes
    image: Image.Image | Patches


class VisionCache:
    """Tokens of one vision tower on disk. Use `VisionCache.open`."""

    def __init__(self, folder: Path, dim: int, dtype: torch.dtype) -> None:
        self.folder = folder
        self.dim, self.dtype = dim, dtype
        # an image may be in several segments: two writers encoded it at the same time, or one segment is damaged
        self._known: dict[bytes, list[tuple[Path, np.void]]] = {}
        self._segment = folder / f"segment-{uuid.uuid4().hex[:12]}.tokens"  # created with the first image
        self._read: dict[Path, int] = {}  # records read so far from each index
        self._refresh()

    def _refresh(self) -> None:
        """Read the records that other writers have added; an index that cannot be read has none."""
        for path in sorted(self.folder.glob("segment-*.index")):
            tokens, read = path.with_suffix(".tokens"), self._read.get(path, 0)
            if tokens == self._segment:
                continue
            with suppress(OSError):
                whole = path.stat().st_size // _RECORD.itemsize  # a killed writer may have left part of a record
                if whole <= read:
                    continue
                for record in np.fromfile(path, _RECORD, count=whole - read, offset=read * _RECORD.itemsize):
                    self._known.setdefault(record["image"].tobytes(), []).append((tokens, record))
                self._read[path] = whole

    @classmethod
    def open(cls, root: Path, backbone: Backbone, weights: str) -> VisionCache:
        """Open the part of `root` that belongs to a backbone's vision tower.

        Args:
            root: cache folder; created if it is missing.
            backbone: the loaded backbone.
            weights: the hash of its weights (`model_files.backbone_hash`).

        Raises:
            OSError: the folder cannot be made.
        """
        about = {
            "format": _FORMAT,
            "weights": weights,
            "image_processor": backbone.processor.image_processor.to_dict(),
            "dtype": str(backbone.model.dtype).removeprefix("torch."),
            "dim": backbone.dim,
        }
        text = json.dumps(about, sort_keys=True, default=str)
        folder = root / hashlib.sha256(text.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "about.json").is_file():
            schema.write_json(folder / "about.json", json.loads(text))
        return cls(folder, backbone.dim, backbone.model.dtype)

    def __len__(self) -> int:
        return len(self._known)

    def image_bytes(self, tokens: int, layers: int = 1) -> int:
        """Return how many bytes an image with this many merged tokens takes."""
        return layers * tokens * self.dim * self.dtype.itemsize + _RECORD.itemsize

    def read(self, root: Location, relative: str, target_pixels: int | None = None) -> ImageFeatures | NewImage:
        """Return the cached features of the image at `root / relative`, or the image itself if there are none.

        Raises:
            ImageError: as `images.open_image`.
        """
        content = read_file(root, relative)
        key = hashlib.sha256(content).digest()
        return self.find(key) or NewImage(key, decode(io.BytesIO(content), target_pixels))

    def find(self, key: bytes) -> ImageFeatures | None:
        """Return the features of the image with this SHA-256, on the CPU, or None."""
        if key not in self._known:
            self._refresh()
        for path, record in self._known.get(key, ()):
            tokens, layers = int(record["tokens"]), int(record["layers"])
            size = layers * tokens * self.dim * self.dtype.itemsize
            content = _part_of(path, int(record["offset"]), size)
            if content is not None and self._checksum(record, content) == record["checksum"]:
                values = torch.frombuffer(content, dtype=self.dtype).view(layers, tokens, self.dim)
                grid = torch.from_numpy(record["grid"].astype(np.int64)) if record["grid"].any() else None
                return ImageFeatures(values[0], tuple(values[1:]), grid)
        return None

    def add(self, keys: Sequence[bytes], features: Sequence[ImageFeatures]) -> None:
        """Store the features of new images.

        Raises:
            OSError: the disk is full or fails; none of these images is kept.
        """
        records = np.zeros(len(keys), _RECORD)
        files = (self._segment.with_suffix(".index"), self._segment)
        before = [file.stat().st_size if file.exists() else 0 for file in files]
        try:
            self._write(records, keys, features)
        except OSError:
            for file, size in zip(files, before, strict=True):
                with suppress(OSError):
                    os.truncate(file, size)
            raise
        for record, key in zip(records, keys, strict=True):
            self._known.setdefault(key, []).append((self._segment, record))

    def _write(self, records: np.ndarray, keys: Sequence[bytes], features: Sequence[ImageFeatures]) -> None:
        with self._segment.open("ab") as tokens:
            for record, key, feature in zip(records, keys, features, strict=True):
                layers = [_bytes_of(layer) for layer in (feature.tokens, *feature.deepstack)]
                content = b"".join(layers)
                record["image"], record["offset"] = np.void(key), tokens.tell()
                record["tokens"], record["layers"] = len(feature.tokens), len(layers)
                record["grid"] = 0 if feature.grid is None else feature.grid.numpy()
                record["checksum"] = self._checksum(record, content)
                tokens.write(content)
        with self._segment.with_suffix(".index").open("ab") as index:  # after the tokens: no record lacks them
            index.write(records.tobytes())

    def _checksum(self, record: np.void, content: bytes | bytearray) -> int:
        about = b"".join(record[name].tobytes() for name in _RECORD.names or () if name != "checksum")
        return zlib.crc32(content, zlib.crc32(about, zlib.crc32(self.folder.name.encode())))


def _part_of(path: Path, start: int, size: int) -> bytearray | None:
    """Return part of a segment, or None if the segment is shorter than its index says."""
    try:
        if path.stat().st_size < start + size:  # before the memory is asked for: a damaged record may name any size
            return None
        content = bytearray(size)
        # not mapped: a file that is cut short while it is mapped ends the process
        with path.open("rb") as file:
            file.seek(start)
            return content if file.readinto(content) == size else None
    except OSError:
        return None


def _bytes_of(values: Tensor) -> bytes:
    return values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()  # NumPy has no bfloat16
