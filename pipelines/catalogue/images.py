"""Finds the image file of each item. Folders are listed, but no image is opened."""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path

import polars as pl

from vlm2rec.embedder.backbones.images import FORMATS
from vlm2rec.embedder.contract.errors import DataError, did_you_mean
from vlm2rec.embedder.contract.schema import IMAGE_PATH, ITEM_ID

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "jfif", "jpe", *(("avif",) if "AVIF" in FORMATS else ()))
"""Endings of `<item_id>.<ending>`; the first existing one is used; case does not matter."""


@dataclass(frozen=True)
class FoundImages:
    """The image of each item, in the order of the items."""

    paths: pl.Series  # `image_path`: relative to the root; null if the item has no image
    reasons: pl.Series  # why there is none; null if there is one


def find_images(root: Path, items: pl.DataFrame, column: str | None = None) -> FoundImages:
    """Return the path of each item's image below `root`, or why there is none.

    A column of paths names the files; without one they are `<item_id>.<ending>` in `root`, or else in one of its
    folders. A name that is only spelled otherwise (Unicode NFD or NFC, case, backslashes in a path) is the same name,
    if one file alone has it. Each folder is listed once; no file is opened. URLs, absolute paths elsewhere, `..` and
    links that leave `root` do not count.

    Args:
        root: the folder with the images.
        items: item_id, and other columns.
        column: the column of paths. Default: `image_path`, if the items have it.

    Raises:
        DataError: `root` is not a folder, there is no such column, or it is not text.
    """
    if not root.is_dir():
        raise DataError(
            f"{root} is {'not a folder' if root.exists() else 'missing'}",
            "the folder with the catalogue's images",
            f"correct --images; {_HOW_TO_GET_IMAGES}",
        )
    real_root = Path(os.path.realpath(root))
    named_by = _path_column(items, column)
    if named_by is None:
        found = _ByItem(real_root, items[ITEM_ID].to_list()).find()
    else:
        by_path = _ByPath(real_root)
        found = [by_path.find(path) for path in items[named_by]]
    return FoundImages(
        pl.Series(IMAGE_PATH, [path for path, _ in found], dtype=pl.String),
        pl.Series("reason", [reason for _, reason in found], dtype=pl.String),
    )


def no_images(items: pl.DataFrame) -> FoundImages:
    """Return that no item has an image, as there is no folder of images."""
    none = pl.repeat(None, items.height, dtype=pl.String, eager=True)
    reasons = pl.repeat("--images is not given", items.height, dtype=pl.String, eager=True)
    return FoundImages(none.alias(IMAGE_PATH), reasons.alias("reason"))


def _path_column(items: pl.DataFrame, column: str | None) -> str | None:
    if column is not None and column not in items.columns:
        raise DataError(
            f"the items have no column {column!r}{did_you_mean(column, items.columns)};"
            f" their columns are {', '.join(items.columns)}",
            "the column with each image's path",
            "correct --image-column, or leave it out if the files are <item_id>.jpg",
        )
    named_by = column or (IMAGE_PATH if IMAGE_PATH in items.columns else None)
    if named_by is not None and items.schema[named_by] not in (pl.String, pl.Null):
        raise DataError(
            f"column {named_by!r} of the items holds {items.schema[named_by]}",
            "one path as text for each item",
            "store one path per item, name another column with --image-column, or rename it to use <item_id>.jpg",
        )
    return named_by


_HOW_TO_GET_IMAGES = (
    "vlm2rec downloads nothing: download the images with img2dataset (pip install img2dataset); then name each"
    f" file <item_id>.<{'|'.join(IMAGE_SUFFIXES)}>, or give the files' paths, relative to --images, in an"
    f" {IMAGE_PATH} column of the items"
)


def no_images_error(root: Path, items: pl.DataFrame, found: FoundImages, column: str | None = None) -> DataError:
    """Return the error for a catalogue of which no item has an image, with an item and its reason."""
    with os.scandir(root) as entries:
        sample = sorted(entry.name for entry in islice(entries, 1000))
    holds = f"holds {', '.join(sample[:3])}{' …' if len(sample) > 3 else ''}" if sample else "is empty"
    named_by = _path_column(items, column)
    wanted = f"{items[ITEM_ID][0]}.jpg" if named_by is None else items[named_by][0]
    return DataError(
        f"no item of the catalogue has an image in {root}, which {holds}; item {items[ITEM_ID][0]!r}:"
        f" {found.reasons[0]}",
        f"files such as {wanted}; or, for a catalogue without images, --require title",
        _HOW_TO_GET_IMAGES + _url_hint(items),
    )


def _url_hint(items: pl.DataFrame) -> str:
    for name, dtype in items.schema.items():
        if dtype == pl.String:
            first = items[name].drop_nulls().head(1)
            if len(first) and first[0].startswith(("http://", "https://")):
                return f" (column {name!r} of the items holds URLs)"
    return ""


# --- the files below the root ---------------------------------------------------------------------------------
_LEADS_OUT = "a link that leads out of the image folder"


@dataclass
class _Folder:
    """The entries of one folder: what may be used, and why the rest may not."""

    files: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)  # without links
    refused: dict[str, str] = field(default_factory=dict)  # name → what it is

    def named(self, name: str, among: str = "files") -> str | None:
        """Return the entry with this name, else the only one whose name is the same in NFC, else without case."""
        if name in getattr(self, among):
            return name
        for spelling, known in zip(_SPELLINGS, self._spelled[among], strict=True):
            if len(same := known.get(spelling(name), [])) == 1:
                return same[0]
        return None

    @cached_property
    def _spelled(self) -> dict[str, list[dict[str, list[str]]]]:
        return {
            among: [_grouped(getattr(self, among), spelling) for spelling in _SPELLINGS]
            for among in ("files", "folders", "refused")
        }


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _without_case(name: str) -> str:
    return _composed(_composed(name).casefold())


_SPELLINGS = (_composed, _without_case)


def _grouped(names: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(key(name), []).append(name)
    return groups


def _listing(path: str, root: Path) -> _Folder:
    """List a folder; links count if they stay below `root`."""
    found = _Folder()
    if not _is_below(os.path.realpath(path), root):
        return found
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                _sort_in(entry, root, found)
    except OSError:
        pass  # a folder that is missing or may not be read has no images
    return found


def _sort_in(entry: os.DirEntry[str], root: Path, found: _Folder) -> None:
    if entry.is_file(follow_symlinks=False):
        found.files.add(entry.name)
    elif entry.is_dir(follow_symlinks=False):
        found.folders.add(entry.name)
    elif not entry.is_symlink():
        found.refused[entry.name] = "not a regular file"
    elif not _is_below(os.path.realpath(entry.path), root):
        found.refused[entry.name] = _LEADS_OUT
    elif entry.is_file():
        found.files.add(entry.name)
    else:
        found.refused[entry.name] = "a link to a folder" if entry.is_dir() else "a link to nothing"


def _is_below(real_path: str, real_root: Path) -> bool:
    return real_path == str(real_root) or real_path.startswith(f"{real_root}/".replace("//", "/"))


# --- images named after the items -----------------------------------------------------------------------------
_RANK = {suffix: rank for rank, suffix in enumerate(IMAGE_SUFFIXES)}
_Found = tuple[str | None, str | None]  # the path, or why there is none


class _ByItem:
    """Finds `<item_id>.<ending>`: in the root, else in its folders."""

    def __init__(self, root: Path, items: list[str]) -> None:
        self._root, self._items = root, items
        self._top = _listing(str(root), root)
        self._refused = {_stem(name): (name, why) for name, why in sorted(self._top.refused.items())}
        self._unread: list[str] = []  # folders that were not searched, and why

    def find(self) -> list[_Found]:
        by_stem = _best_endings(self._top.files)
        found: list[_Found] = [(by_stem.get(item), None) for item in self._items]
        missing = [row for row, (path, _) in enumerate(found) if path is None]
        if missing:
            taken = {path for path, _ in found if path is not None}
            for row, outcome in zip(missing, self._elsewhere(missing, taken), strict=True):
                found[row] = outcome
        return found

    def _elsewhere(self, rows: list[int], taken: set[str]) -> Iterator[_Found]:
        """Yield what there is for items without a file of exactly their name in the root."""
        files = [*self._top.files, *self._below()]
        usable = [path for path in files if _rank(path) is not None and path not in taken]
        composed = _grouped(usable, lambda path: _composed(_stem(path)))
        caseless = _grouped(usable, lambda path: _without_case(_stem(path)))
        by_name = _grouped(usable, lambda path: _composed(posixpath.basename(path)))
        other = {_stem(path): path for path in files if _rank(path) is None}
        bare = _grouped(usable, lambda path: _stem(path).lstrip("0"))
        same_but_for_case = Counter(_without_case(item) for item in self._items)
        own = {_composed(item) for item in self._items}
        for row in rows:
            item = self._items[row]
            candidates = composed.get(_composed(item)) or by_name.get(_composed(item), [])
            if not candidates and same_but_for_case[_without_case(item)] == 1:
                # a file with exactly another item's name is that item's
                alike = caseless.get(_without_case(item), [])
                candidates = [path for path in alike if _composed(_stem(path)) not in own]
            if item.strip() and candidates:
                yield _one_of(candidates)
            else:
                yield None, self._reason(item, other, bare)

    def _below(self) -> Iterator[str]:
        """Yield the files of all folders below the root; hidden ones and those of macOS archives are left out."""
        waiting = sorted(self._top.folders)
        self._note_links("", self._top)
        while waiting:
            folder = waiting.pop()
            if posixpath.basename(folder).startswith(".") or posixpath.basename(folder) == "__MACOSX":
                continue
            path = f"{self._root}/{folder}"
            if not os.access(path, os.R_OK | os.X_OK):
                self._unread.append(f"{folder} may not be read")
                continue
            found = _listing(path, self._root)
            self._note_links(folder, found)
            for name, why in found.refused.items():
                self._refused.setdefault(_stem(name), (f"{folder}/{name}", why))
            yield from (f"{folder}/{name}" for name in sorted(found.files))
            waiting += sorted(f"{folder}/{name}" for name in found.folders)

    def _note_links(self, folder: str, found: _Folder) -> None:
        for name, why in sorted(found.refused.items()):
            place = f"{folder}/{name}" if folder else name
            if why == _LEADS_OUT and _rank(name) is None and (self._root / place).is_dir():
                self._unread.append(f"{place} is {_LEADS_OUT}")

    def _reason(self, item: str, other: dict[str, str], bare: dict[str, list[str]]) -> str:
        if refused := self._refused.get(item) or self._refused.get(_composed(item)):
            return f"{refused[0]} is {refused[1]}"
        if item in other:
            return f"{other[item]} has no ending of an image ({', '.join(IMAGE_SUFFIXES)})"
        near = bare.get(item.lstrip("0"), [])
        hint = f"; {near[0]} differs in its leading zeros" if near and item else ""
        hint += f"; {self._unread[0]} and was not searched" if self._unread else ""
        return f"no file {item}.{IMAGE_SUFFIXES[0]}, or with another ending, in the image folder or below it{hint}"


def _stem(path: str) -> str:
    return posixpath.basename(path).rpartition(".")[0]


def _rank(path: str) -> int | None:
    return _RANK.get(path.rpartition(".")[2].lower()) if _stem(path) else None


def _best_endings(names: Iterable[str]) -> dict[str, str]:
    """Return {stem: file name} of the image files, with the first ending of each stem in `IMAGE_SUFFIXES`."""
    best: dict[str, tuple[int, str]] = {}
    for name in names:
        stem, rank = _stem(name), _rank(name)
        if rank is not None and (stem not in best or (rank, name) < best[stem]):
            best[stem] = (rank, name)
    return {stem: name for stem, (_, name) in best.items()}


def _one_of(paths: list[str]) -> _Found:
    """Return the file to use; files in several folders are refused, as they may show different things."""
    folders = {posixpath.dirname(path) for path in paths}
    if "" in folders:
        paths = [path for path in paths if not posixpath.dirname(path)]
    elif len(folders) > 1:
        return None, f"{len(paths)} files have its name: {', '.join(paths[:3])}"
    return min(paths, key=lambda path: (_rank(path), path)), None


# --- images named by a column of paths ------------------------------------------------------------------------
class _ByPath:
    """Finds files by their paths, relative to the root; remembers what each folder holds."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._listings: dict[str, _Folder] = {}
        self._spelled: dict[str, str | None] = {"": ""}

    def find(self, path: str | None) -> _Found:
        if path is None or not path.strip():
            return None, "no path is given"
        if "://" in path:
            return None, f"{path} is a URL; vlm2rec downloads nothing"
        if "\0" in path:
            return None, "the path holds a NUL character"
        first, reason = self._find(path)
        if first is None:
            plain = path.strip().replace("\\", "/")
            if plain != path:
                first, other = self._find(plain)
                reason = other if "\\" in path else reason
        return first, None if first is not None else reason

    def _find(self, path: str) -> _Found:
        if path[1:3] in (":/", ":\\"):
            return None, f"{path} is a path of Windows"
        relative = _inside(path, self._root)
        if relative is None:
            return None, f"{path} leads out of the image folder"
        folder, name = os.path.split(relative)
        spelled = self._folder(folder)
        if spelled is None:
            why = self._refused_folder(folder)
            return None, f"{why}" if why else f"the image folder has no folder {folder}"
        listing = self._list(spelled)
        if (file := listing.named(name)) is not None:
            return (f"{spelled}/{file}" if spelled else file), None
        if (refused := listing.named(name, "refused")) is not None:
            return None, f"{relative} is {listing.refused[refused]}"
        if listing.named(name, "folders") is not None:
            return None, f"{relative} is a folder"
        return None, f"no file {relative} in the image folder"

    def _list(self, folder: str) -> _Folder:
        if folder not in self._listings:
            self._listings[folder] = _listing(f"{self._root}/{folder}", self._root)
        return self._listings[folder]

    def _folder(self, folder: str) -> str | None:
        """Return the folder in the spelling of the disk, or None if there is none below the root."""
        if folder not in self._spelled:
            path = self._root / folder
            if path.is_dir():  # the disk knows this spelling; the folder may be a link
                self._spelled[folder] = folder if _is_below(os.path.realpath(path), self._root) else None
            else:
                above, name = os.path.split(folder)
                parent = self._folder(above)
                known = None if parent is None else self._list(parent).named(name, "folders")
                self._spelled[folder] = None if known is None else f"{parent}/{known}" if parent else known
        return self._spelled[folder]

    def _refused_folder(self, folder: str) -> str:
        parts = folder.split("/")
        for count in range(1, len(parts) + 1):
            place = "/".join(parts[:count])
            if not _is_below(os.path.realpath(f"{self._root}/{place}"), self._root):
                return f"{place} is {_LEADS_OUT}"
        return ""


def _inside(path: str, root: Path) -> str | None:
    """Return the path relative to `root` in normal form, or None if it leaves the root."""
    relative = os.path.relpath(path, root) if Path(path).is_absolute() else os.path.normpath(path)
    return None if relative in (".", "..") or relative.startswith("../") else relative
