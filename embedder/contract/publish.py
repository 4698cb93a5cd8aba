"""A finished folder appears at once, or not at all: it is written beside its place, and put there by a rename."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.embedder.contract.storage import Location, StorePath, sha256_file


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """Give a folder beside `out` to write to, made before the work starts; it is gone afterwards, whatever happens."""
    mark = f".{out.name}.{socket.gethostname()}."
    folder = out.with_name(f"{mark}{os.getpid()}.building")
    with plain_disk_errors(out):
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
def plain_disk_errors(out: Path) -> Iterator[None]:
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
    sync_folder(target.parent)


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


def write_whole(path: Location, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it."""
    if isinstance(path, StorePath):
        path.write_bytes(content)
        return
    with draft(path) as temporary:
        with temporary.open("wb") as file:
            file.write(content)
            flush(file)
        temporary.replace(path)
    sync_folder(path.parent)


@contextmanager
def draft(path: Location) -> Iterator[Path]:
    """Give the name of a local file in which to write what will be published as `path`; it is removed in the end."""
    if isinstance(path, StorePath):
        with tempfile.TemporaryDirectory(prefix="vlm2rec-") as folder:
            yield Path(folder) / path.name
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def put_in_place(temporary: Path, path: Location, sha256: str) -> None:
    """Make a draft appear under its name, whole or not at all.

    Raises:
        OSError: it could not be written, or a store gives back other bytes than it was given.
    """
    if isinstance(path, StorePath):
        path.upload(temporary)
        if sha256_file(path) != sha256:
            raise OSError(errno.EIO, "the object does not read back as it was written")
        return
    temporary.replace(path)
    sync_folder(path.parent)


def flush(file: BinaryIO) -> None:
    """Have an open file's content on the disk, not only on its way there."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
