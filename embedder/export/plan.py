"""The plan of an export: which item goes into which shard, and the settings that make vectors comparable."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vlm2rec.embedder.backbones.images import ImageError, path_below_root, read_file
from vlm2rec.embedder.backbones.model_files import is_older_kind
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ArtifactError, DataError
from vlm2rec.embedder.contract.storage import Location, Stat
from vlm2rec.embedder.export.shard_file import ITEM_VECTORS, Layout
from vlm2rec.embedder.options import ImagesBy

INPUT_SETTINGS = ("items", "item_ids", "titles", "images", "images_by")


@dataclass(frozen=True)
class Plan:
    """Which item goes into which shard, and the settings that all shards share.

    `settings` holds everything that changes a vector, as JSON, including `dim`, `views` and `storage`.
    """

    item_ids: list[str]
    shard_size: int
    settings: dict[str, Any]
    bounds: tuple[int, ...]  # shard i holds the rows from bounds[i] to bounds[i + 1]
    inputs: Inputs | None = None
    made_with: Mapping[str, Any] = field(default_factory=dict)  # names and origin of the model, which decide no vector
    dataset_version: Sequence[int] = ()  # of the files that the inputs were read from: `Dataset.items_version`
    layout: Layout = ITEM_VECTORS
    catalogue: int | None = None  # items in the dataset, if the export holds some of them alone
    encoder: Mapping[str, Any] = field(default_factory=dict)  # how to load it again: paths, which decide no vector

    def __getstate__(self) -> dict[str, Any]:
        """Leave the Arrow schema out: pickling loses that the elements of its lists are never null."""
        return {key: value for key, value in self.__dict__.items() if key != "schema"}

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def rows(self, number: int) -> range:
        """Return the positions in `item_ids` of shard `number`."""
        return range(self.bounds[number], self.bounds[number + 1])

    def keys(self, number: int) -> tuple[list[str], list[str | None]]:
        """Return the ids of a shard, and its column `input`."""
        rows = self.rows(number)
        return self.item_ids[rows.start : rows.stop], self.made_from(rows)

    def made_from(self, rows: Iterable[int]) -> list[str | None]:
        """Return the column `input` at some positions: a hash of what each row is made from."""
        return [None if self.inputs is None else self.inputs.of(row) for row in rows]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the settings."""
        return fingerprint(self.settings)

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the settings and of how the items are divided: which plan a shard was made for."""
        return _identity(self.settings, self.shard_size, [len(self.rows(number)) for number in range(len(self))])

    @cached_property
    def schema(self) -> pa.Schema:
        """Arrow schema of every shard; its metadata holds the settings that decide a vector, whatever the item."""
        settings = without_inputs(self.settings)
        texts = {f"vlm2rec.{key}": _text(value) for key, value in flatten(settings).items()}
        texts["vlm2rec.fingerprint"] = fingerprint(settings)
        return self.layout.arrow_schema(self.settings, texts)


def plan_shards(
    item_ids: Sequence[str],
    shard_size: int,
    settings: Mapping[str, Any],
    inputs: Inputs | None = None,
    begun: Sequence[int] = (),
    dataset_version: Sequence[int] = (),
    layout: Layout = ITEM_VECTORS,
) -> Plan:
    """Return the plan of an export.

    Args:
        item_ids: the items in order.
        shard_size: items in one shard.
        settings: everything that decides a vector, and under `schema.MADE_WITH` what the manifest says of the model
            besides; the hashes of `inputs` are added.
        inputs: what the items are made from.
        begun: row counts of the shards that an earlier export into this folder planned (`shards.rows_of_shards`). If
            items were appended, the last of those shards stays as short as it is.
        dataset_version: `Dataset.items_version` of the dataset that the inputs come from.
        layout: how the rows lie in the shards; those of users have user ids in place of item ids.

    Raises:
        DataError: an id is null, not a string, or occurs twice.
    """
    ids = list(item_ids)
    for row, item_id in enumerate(ids):
        if not isinstance(item_id, str):
            raise DataError(f"the item id in row {row} is {item_id!r}", "a string", "correct items.parquet")
    twice = duplicates(ids)
    if twice:
        raise DataError(
            f"item ids occur more than once: {', '.join(map(repr, twice[:5]))}",
            "every item id once",
            "remove the duplicate rows and prepare the dataset again",
        )
    settings, made_with = dict(settings), dict(settings.get(schema.MADE_WITH, {}))
    settings.pop(schema.MADE_WITH, None)
    version = schema.version_for(settings.get("storage"))
    full = {"schema_version": version, **settings, **(inputs.settings if inputs else {})}
    bounds = [0]
    for rows in begun if sum(begun) <= len(ids) else ():
        bounds.append(bounds[-1] + rows)
    while bounds[-1] < len(ids):
        bounds.append(min(bounds[-1] + shard_size, len(ids)))
    return Plan(
        ids, shard_size, json.loads(_canonical(full)), tuple(bounds), inputs, made_with, dataset_version, layout
    )


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the settings as JSON with sorted keys."""
    return hashlib.sha256(_canonical(settings).encode()).hexdigest()


def identity_of(known: Mapping[str, Any]) -> str:
    """Return the `Plan.identity` of the plan that a manifest, or the state file of an export, was written for."""
    return _identity(known.get("settings", {}), known.get("shard_size"), row_counts(known))


def row_counts(known: Mapping[str, Any]) -> list[int]:
    """Return the row count of each shard, from a manifest or the state file of an export."""
    return [shard["rows"] for shard in known["shards"]] if "shards" in known else list(known.get("rows", []))


def _identity(settings: Mapping[str, Any], shard_size: object, rows: Sequence[int]) -> str:
    return fingerprint({"settings": settings, "shard_size": shard_size, "rows": list(rows)})


def without_inputs(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide a vector of any item: those that describe the items are left out."""
    return {key: value for key, value in settings.items() if key not in INPUT_SETTINGS}


def refuse_older_hashes(folder: Location, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise `ArtifactError` if an earlier version made a folder, whose hash of the model cannot vouch for it."""
    for name in ("backbone_hash", "encoder_hash"):
        if name in old and is_older_kind(old[name]) and name in new and not is_older_kind(new[name]):
            raise ArtifactError(
                f"an earlier vlm2rec wrote {folder}: its {name} covers only part of the weights, and neither"
                " tokenizer nor image processor; so nothing can tell whether its vectors come from the same"
                " model",
                "vectors of one model in one folder",
                "choose a new --out folder, without --changed-since; the old folder stays readable for every command"
                " that only reads it",
            )


@dataclass(frozen=True)
class Inputs:
    """What the vectors of an export are made from, in order; None for what no vector depends on.

    Every worker encodes these, and not what the dataset's files hold by then.
    """

    item_ids: Sequence[str]
    titles: Sequence[str] | None
    image_paths: Sequence[str] | None
    stamps: Sequence[str] | None  # of each image: size and time, or SHA-256
    images_by: ImagesBy
    image_root: Location | None = None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Hashes of the ordered input, for the settings: another order, title or image makes another export."""
        found: dict[str, Any] = {"items": len(self.item_ids), "item_ids": _hash_strings(self.item_ids)}
        if self.titles is not None:
            found["titles"] = _hash_strings(self.titles)
        if self.image_paths is not None and self.stamps is not None:
            images = zip(self.image_paths, self.stamps, strict=True)
            found["images"] = _hash_strings(f"{path}\0{stamp}" for path, stamp in images)
            found["images_by"] = self.images_by
        return found

    def of(self, row: int) -> str:
        """Return the hash of one item's title and image, 32 hexadecimal digits."""
        parts = [] if self.titles is None else [self.titles[row]]
        if self.image_paths is not None and self.stamps is not None:
            # by content, a file may move; by size and time, the path has to be the same
            parts += [self.stamps[row]] if self.images_by == "bytes" else [self.image_paths[row], self.stamps[row]]
        return _hash_strings(parts)[:32]

    def first(self, count: int) -> Inputs:
        """Return the inputs of the first items."""
        lists = (self.item_ids, self.titles, self.image_paths, self.stamps)
        ids, titles, paths, stamps = (None if values is None else values[:count] for values in lists)
        return Inputs(ids or [], titles, paths, stamps, self.images_by, self.image_root)

    def image_has_changed(self, row: int) -> bool:
        """Tell whether an item's image is another one by now."""
        if self.image_paths is None or self.stamps is None or self.image_root is None:
            return False
        return _stamp_now(self.image_root, self.image_paths[row], self.images_by) != self.stamps[row]


def read_inputs(
    item_ids: Sequence[str],
    titles: Sequence[str],
    image_paths: Sequence[str],
    image_root: Location | None,
    images_by: ImagesBy = "mtime",
    modalities: Sequence[str] = schema.MODALITIES,
) -> Inputs:
    """Return what vectors are made from.

    Args:
        item_ids: Ids in order.
        titles: Titles in order.
        image_paths: Paths below the root, in order.
        image_root: Folder of the images; None if no vector depends on them.
        images_by: `mtime` recognises a changed image by size and modification time, `bytes` by content.
        modalities: What the vectors are made of. Titles or images that no vector depends on are not read.
    """
    root = image_root if schema.IMAGE in modalities else None
    return Inputs(
        item_ids,
        titles if schema.TEXT in modalities else None,
        None if root is None else image_paths,
        None if root is None else _image_stamps(root, image_paths, images_by),
        images_by,
        root,
    )


def _image_stamps(root: Location, paths: Sequence[str], images_by: ImagesBy) -> list[str]:
    if images_by == "bytes":
        return [_image_digest(root, path) for path in paths]
    if isinstance(root, Path):
        return [_image_stamp(root, path) for path in paths]
    objects = root.tree()
    return [_object_stamp(objects, path) for path in paths]


def _stamp_now(root: Location, relative: str, images_by: ImagesBy) -> str:
    if images_by == "bytes" or isinstance(root, Path):
        return _image_stamps(root, [relative], images_by)[0]
    try:
        name = posixpath.normpath(path_below_root(relative))
        return _object_stamp({name: (root / name).stat()}, relative)
    except (ImageError, OSError):
        return "unreadable"


def _object_stamp(objects: Mapping[str, Stat], relative: str) -> str:
    try:
        found = objects.get(posixpath.normpath(path_below_root(relative)))
    except ImageError:
        return "unreadable"
    return f"{found.st_size} {found.st_mtime_ns}" if found else "unreadable"


def _image_stamp(root: Path, relative: str) -> str:
    try:
        found = os.stat(f"{root}/{path_below_root(relative)}")  # noqa: PTH116 - a Path costs more than the call
    except (ImageError, OSError, ValueError):
        return "unreadable"
    return f"{found.st_size} {found.st_mtime_ns}"


def _image_digest(root: Location, relative: str) -> str:
    try:
        return hashlib.sha256(read_file(root, relative)).hexdigest()
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


def duplicates(ids: Sequence[str]) -> list[str]:
    """Return the ids that occur more than once, sorted.

    Their hashes are compared first, which takes an eighth of the memory of a set.
    """
    hashes = np.sort(np.fromiter(map(hash, ids), np.int64, len(ids)))
    again = {*hashes[1:][hashes[1:] == hashes[:-1]].tolist()}
    if not again:
        return []
    counted = Counter(each for each in ids if hash(each) in again)
    return sorted(each for each, count in counted.items() if count > 1)
