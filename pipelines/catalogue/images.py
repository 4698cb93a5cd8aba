"""Finds the image file of each item. Folders are listed, but no image is opened."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

import polars as pl

from vlm2rec.embedder.contract.errors import DataError
from vlm2rec.embedder.contract.schema import IMAGE_PATH, ITEM_ID

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
"""Endings of `<item_id>.<ending>`; the first existing one is used; case does not matter."""


def find_images(root: Path, items: pl.DataFrame) -> pl.Series:
    """Return the path of each item's image below `root`, or null if there is no such file.

    An `image_path` column names the files; without one they are `<item_id>.<ending>` in `root` itself. Each folder is
    listed once; no file is opened. URLs, absolute paths elsewhere, `..` and links that leave `root` do not count.

    Raises:
        DataError: `root` is not a folder, `image_path` is not text, or no item has an image.
    """
    if not root.is_dir():
        raise DataError(
            f"{root} is {'not a folder' if root.exists() else 'missing'}",
            "the folder with the catalogue's images",
            f"correct --images; {_HOW_TO_GET_IMAGES}",
        )
    real_root = Path(os.path.realpath(root))
    if IMAGE_PATH in items.columns:
        if items.schema[IMAGE_PATH] not in (pl.String, pl.Null):
            raise DataError(
                f"column {IMAGE_PATH!r} of the items holds {items.schema[IMAGE_PATH]}",
                "one path as text for each item",
                "store one path per item, or rename the column to use <item_id>.jpg",
            )
        given = items[IMAGE_PATH].to_list()
        found = _images_by_path(real_root, [_inside(path, real_root) for path in given])
    else:
        by_id = _images_by_name(real_root)
        found = [by_id.get(item) for item in items[ITEM_ID]]
    if not any(found):
        raise _no_images_error(root, items)
    return pl.Series(IMAGE_PATH, found, dtype=pl.String)


_HOW_TO_GET_IMAGES = (
    "vlm2rec downloads nothing: download the pictures with img2dataset (pip install img2dataset), then name each"
    f" file <item_id>.<{'|'.join(IMAGE_SUFFIXES)}>, or give the files' paths, relative to --images, in an"
    f" {IMAGE_PATH} column of the items"
)


def _no_images_error(root: Path, items: pl.DataFrame) -> DataError:
    with os.scandir(root) as entries:
        sample = sorted(entry.name for entry in islice(entries, 1000))
    holds = f"holds {', '.join(sample[:3])}{' …' if len(sample) > 3 else ''}" if sample else "is empty"
    wanted = f"{items[ITEM_ID][0]}.jpg" if IMAGE_PATH not in items.columns else items[IMAGE_PATH][0]
    return DataError(
        f"no item of the catalogue has a picture in {root}, which {holds}",
        f"files such as {wanted}",
        _HOW_TO_GET_IMAGES + _url_hint(items),
    )


def _url_hint(items: pl.DataFrame) -> str:
    for name, dtype in items.schema.items():
        if dtype == pl.String:
            first = items[name].drop_nulls().head(1)
            if len(first) and first[0].startswith(("http://", "https://")):
                return f" (column {name!r} of the items holds URLs)"
    return ""


def _images_by_name(root: str | Path) -> dict[str, str]:
    """Return {stem: file name} of the image files in `root`, with the first ending of each stem in `IMAGE_SUFFIXES`."""
    order = {suffix: rank for rank, suffix in enumerate(IMAGE_SUFFIXES)}
    best: dict[str, tuple[int, str]] = {}
    for name in _files(Path(root), Path(root)):
        stem, _, suffix = name.rpartition(".")
        rank = order.get(suffix.lower())
        if stem and rank is not None and (stem not in best or (rank, name) < best[stem]):
            best[stem] = (rank, name)
    return {stem: name for stem, (_, name) in best.items()}


def _images_by_path(root: Path, paths: list[str | None]) -> list[str | None]:
    listings: dict[str, set[str]] = {}
    found: list[str | None] = []
    for path in paths:
        if path is None:
            found.append(None)
            continue
        folder, name = os.path.split(path)
        if folder not in listings:
            listings[folder] = _files(root / folder, root)
        found.append(path if name in listings[folder] else None)
    return found


def _inside(path: str | None, root: Path) -> str | None:
    """Return the path relative to `root` in normal form, or None if it leaves the root or is a URL."""
    if path is None or not path.strip() or "://" in path or "\0" in path:
        return None
    relative = os.path.relpath(path, root) if Path(path).is_absolute() else os.path.normpath(path)
    return None if relative in (".", "..") or relative.startswith("../") else relative


def _files(folder: Path, root: Path) -> set[str]:
    """Return the names of the regular files in `folder`; links count if they stay below `root`."""
    if not _is_below(os.path.realpath(folder), root):
        return set()
    try:
        with os.scandir(folder) as entries:
            return {
                entry.name
                for entry in entries
                if entry.is_file(follow_symlinks=False)
                or (entry.is_symlink() and entry.is_file() and _is_below(os.path.realpath(entry.path), root))
            }
    except OSError:
        return set()  # a folder that is missing or may not be read has no images


def _is_below(real_path: str, real_root: Path) -> bool:
    return real_path == str(real_root) or real_path.startswith(f"{real_root}/".replace("//", "/"))
