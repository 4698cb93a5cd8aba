"""SHA-256 of large files that rarely change, such as a backbone's weights: read once, then remembered.

The cache is one small JSON file in the user's cache folder. What it says of a file counts only while the file has the
same path, size, inode, and times of change to the nanosecond; the time of the last change of the inode is among them,
which no tool can set back. Without a home folder, or with one that cannot be written, every call reads the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from vlm2rec.embedder.contract import publish, storage

_FILE = "sha256.json"
_SMALLEST = 2**20  # bytes; smaller files are hashed faster than the cache is read
_MOST = 1024  # files that are remembered
_SETTLED = 2_000_000_000  # nanoseconds: a younger file may change again without another time stamp


def cache_folder() -> Path | None:
    """Return the folder of vlm2rec's caches of this user, which need not exist; None without a home folder."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(given) if Path(given).is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return root / "vlm2rec" if root.is_absolute() else None


def sha256(path: Path) -> str:
    """Return the hex SHA-256 of all bytes of a file, from the cache if the file has not changed since.

    Raises:
        OSError: the file cannot be read.
    """
    before = _stamp(path)
    if before["size"] < _SMALLEST:
        return storage.sha256_file(path)
    name, cache = str(path.resolve()), cache_folder()
    known = {} if cache is None else _read(cache / _FILE)
    entry = known.get(name)
    if isinstance(entry, dict) and entry == {**before, "sha256": entry.get("sha256")}:
        return str(entry["sha256"])
    begun = time.time_ns()
    found = storage.sha256_file(path)
    settled = max(before["mtime_ns"], before["ctime_ns"]) + _SETTLED < begun
    if cache is not None and settled and _stamp(path) == before:
        _remember(cache / _FILE, name, {**before, "sha256": found})
    return found


def _stamp(path: Path) -> dict[str, Any]:
    found = path.stat()
    return {
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
        "inode": found.st_ino,
        "device": found.st_dev,
    }


def _read(file: Path) -> dict[str, Any]:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # no cache yet, or a damaged one: files are read again
    return known if isinstance(known, dict) else {}


def _remember(file: Path, name: str, entry: dict[str, Any]) -> None:
    known = _read(file)
    known.pop(name, None)
    newest = dict([*known.items(), (name, entry)][-_MOST:])
    with contextlib.suppress(OSError):  # the cache only saves time
        file.parent.mkdir(parents=True, exist_ok=True)
        publish.write_whole(file, json.dumps(newest, indent=1).encode())
