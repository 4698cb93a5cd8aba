"""The plan of an export: which item goes into which shard, and the settings whose hash says what can be mixed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from vlm2rec.embedder import schema
from vlm2rec.embedder.errors import DataError
from vlm2rec.embedder.images import ImageError, locate, path_below_root


@dataclass(frozen=True)
class Plan:
    """Which item goes into which shard, and the settings that all shards share.

    `settings` hold everything that changes a vector, as JSON, among it `dim`, `views` and `storage`.
    """

    item_ids: list[str]
    shard_size: int
    settings: dict[str, Any]

    def __len__(self) -> int:
        return -(-len(self.item_ids) // self.shard_size)

    def rows(self, number: int) -> range:
        """Return the positions in `item_ids` of shard `number`."""
        start = number * self.shard_size
        return range(start, min(start + self.shard_size, len(self.item_ids)))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the settings."""
        return fingerprint(self.settings)

    @cached_property
    def schema(self) -> pa.Schema:
        """Arrow schema of every shard, with the settings as file metadata."""
        texts = {f"vlm2rec.{key}": _text(value) for key, value in flatten(self.settings).items()}
        texts["vlm2rec.fingerprint"] = self.fingerprint
        return schema.embedding_schema(self.settings["dim"], self.settings["storage"], texts)


def plan_shards(item_ids: Sequence[str], shard_size: int, settings: Mapping[str, Any]) -> Plan:
    """Return the plan of an export.

    Raises:
        DataError: an id is null, no string, or stands twice.
    """
    ids = list(item_ids)
    for row, item_id in enumerate(ids):
        if not isinstance(item_id, str):
            raise DataError(f"the item id in row {row} is {item_id!r}", "a string", "mend items.parquet")
    twice = duplicates(ids)
    if twice:
        raise DataError(
            f"item ids stand twice: {', '.join(map(repr, twice[:5]))}",
            "every item id once",
            "remove the double rows and prepare the dataset again",
        )
    full = {"schema_version": schema.SCHEMA_VERSION, **settings}
    return Plan(ids, shard_size, json.loads(_canonical(full)))


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the settings as JSON with sorted keys."""
    return hashlib.sha256(_canonical(settings).encode()).hexdigest()


def input_settings(
    item_ids: Sequence[str],
    titles: Sequence[str],
    image_paths: Sequence[str],
    image_root: Path,
    images_by: Literal["mtime", "bytes"] = "mtime",
    modalities: Sequence[str] = schema.MODALITIES,
) -> dict[str, Any]:
    """Return hashes of the ordered input, for the settings: another order, title or image is another export.

    Args:
        item_ids: Ids in order.
        titles: Titles in order.
        image_paths: Paths below the root, in order.
        image_root: Folder of the images.
        images_by: `mtime` tells a changed image by its size and modification time, `bytes` by its content.
        modalities: Of what the vectors are made: titles or images that no vector depends on are left out, unread.
    """
    settings: dict[str, Any] = {"items": len(item_ids), "item_ids": _hash_strings(item_ids)}
    if schema.TEXT in modalities:
        settings["titles"] = _hash_strings(titles)
    if schema.IMAGE in modalities:
        describe = _image_stamp if images_by == "mtime" else _image_digest
        settings["images"] = _hash_strings(f"{path}\0{describe(image_root, path)}" for path in image_paths)
        settings["images_by"] = images_by
    return settings


def _image_stamp(root: Path, relative: str) -> str:
    try:
        found = os.stat(f"{root}/{path_below_root(relative)}")  # noqa: PTH116 - a Path per image costs more than the call
    except (ImageError, OSError, ValueError):
        return "unreadable"
    return f"{found.st_size} {found.st_mtime_ns}"


def _image_digest(root: Path, relative: str) -> str:
    try:
        return schema.sha256_file(locate(root, relative))
    except (ImageError, OSError):
        return "unreadable"


def _hash_strings(values: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for value in values:
        data = (value or "").encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))  # so that "a", "bc" is not "ab", "c"
        digest.update(data)
    return digest.hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def duplicates(ids: Iterable[str]) -> list[str]:
    """Return the ids that stand more than once, sorted."""
    seen: set[str] = set()
    twice: set[str] = set()
    for item_id in ids:
        (twice if item_id in seen else seen).add(item_id)
    return sorted(twice)
