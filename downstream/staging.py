"""A finished folder appears at once, or not at all: it is written beside its place, and put there by a rename."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm2rec.embedder import storage
from vlm2rec.embedder.errors import ConfigError


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """Give a folder beside `out` to write to, made before the work starts; it is gone afterwards, whatever happens."""
    mark = f".{out.name}.{socket.gethostname()}."
    folder = out.with_name(f"{mark}{os.getpid()}.building")
    with told_plainly(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in out.parent.glob(f"{mark}*.building"):  # of a build that was killed
            if not _alive(left.name[len(mark) : -len(".building")]):
                shutil.rmtree(left, ignore_errors=True)
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def told_plainly(out: Path) -> Iterator[None]:
    """Raise `ConfigError` where the disk refuses what is written for `out`."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # FAISS reports a full disk as RuntimeError
        raise ConfigError(
            f"{out} cannot be written ({error})", "a place you may write to, with room", "choose another --out"
        ) from None


def sync(path: Path) -> None:
    """Flush a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def replace_folder(new: Path, target: Path) -> None:
    """Put folder `new` at `target`; what was there is at `new` afterwards, or gone."""
    if target.exists() and not _exchange(new, target):
        aside = new.with_suffix(".replaced")
        target.rename(aside)
        new.rename(target)
        aside.rename(new)
    elif not target.exists():
        new.rename(target)
    storage.sync_folder(target.parent)


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, as Linux can; False where the system or file system cannot."""
    try:
        swap = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(swap(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)
