"""What is written appears whole or not at all: first under another name beside its place, then there by a rename.

And before that: whose is the folder that is to be written?
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vlm2rec.embedder.contract.errors import ConfigError, Vlm2RecError
from vlm2rec.embedder.contract.storage import Location, StorePath, sha256_file

_OTHER_OUT = "choose another --out"


# --- whose folder is it? --------------------------------------------------------------------------------------
def require_folder(out: Location, error: type[Vlm2RecError] = ConfigError) -> None:
    """Raise `error` where `out` is there and is no folder."""
    if out.exists() and not out.is_dir():
        raise error(f"--out {out} is a file", "a folder, or a place to make one", _OTHER_OUT)


def require_ours(
    out: Location,
    what: str,
    *,
    ours: bool,
    only: Collection[str] | None = None,
    ignored: Callable[[str], bool] = lambda name: False,
    error: type[Vlm2RecError] = ConfigError,
) -> None:
    """Raise `error` unless a folder to write is free (new or empty) or ours, to be gone on with or replaced.

    Args:
        out: the folder that was asked for.
        what: what it may be if it is not free, as the message says it: `an earlier index`.
        ours: it has what shows that it is that.
        only: all names that a folder of ours may hold; None if it may hold any.
        ignored: tells which names do not count: locks, what is temporary.
        error: the exception.
    """
    require_folder(out, error)
    names = sorted(path.name for path in out.iterdir() if not ignored(path.name)) if out.is_dir() else []
    strange = [name for name in names if only is not None and name not in only]
    if names and (strange or not ours):
        shown = strange or names
        raise error(
            f"--out {out} is not empty and not {what}: it holds {', '.join(shown[:3])}{' …' * (len(shown) > 3)}",
            f"a new or empty folder, or {what}",
            _OTHER_OUT,
        )


# --- temporary names ------------------------------------------------------------------------------------------
def temporary_name(name: str, ending: str = "tmp") -> str:
    """Return the name of what this process writes before it is `name`: hidden, with the number of the process."""
    return f".{name}.{os.getpid()}.{ending}"


def is_temporary(name: str, *of: str) -> bool:
    """Tell whether a file name is the temporary one of a file whose name is, or begins with, one of these."""
    return name.startswith(tuple(f".{final}" for final in of)) and name.endswith(".tmp")


def process_runs(number: int | str) -> bool:
    """Tell whether a process of this number is there, on this machine and as far as this process can see."""
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:  # it is somebody else's
        return True
    return True


# --- folders --------------------------------------------------------------------------------------------------
@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Give a folder beside `out` to write; it takes the place of `out` in the end, flushed, or is gone after an error.

    The folder is made before the work starts, and what was at `out` stays there until it is replaced, in one step
    where the system can. What killed processes left beside `out` is removed.

    Raises:
        ConfigError: the disk refuses the folder.
    """
    owner = f"{out.name}.{socket.gethostname()}"
    folder = out.with_name(temporary_name(owner, "building"))
    with plain_disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in out.parent.glob(f".{owner}.*.building"):
            if not process_runs(left.name.split(".")[-2]):
                shutil.rmtree(left, ignore_errors=True)
        folder.mkdir()
    try:
        yield folder
        with plain_disk_errors(out):
            for path in folder.rglob("*"):
                if path.is_file():
                    sync(path)
            _replace_folder(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def plain_disk_errors(out: Path) -> Iterator[None]:
    """Raise `ConfigError` where the disk refuses what is written for `out`."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # FAISS reports a full disk as RuntimeError
        raise ConfigError(
            f"{out} cannot be written ({error})", "a place you may write to, with room", _OTHER_OUT
        ) from None


def _replace_folder(new: Path, target: Path) -> None:
    """Put folder `new` at `target`; what was there is at `new` afterwards, or gone."""
    if target.exists() and not _exchange(new, target):
        aside = new.with_suffix(".replaced")
        target.rename(aside)
        new.rename(target)
        aside.rename(new)
    elif not target.exists():
        new.rename(target)
    sync_folder(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, as Linux can; False where the system or file system cannot."""
    try:
        swap = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(swap(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


# --- files ----------------------------------------------------------------------------------------------------
@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give the name of a file to write; it is flushed and takes the place of `path` in the end, or is gone."""
    with draft(path) as temporary:
        yield temporary
        sync(temporary)
        put_in_place(temporary, path)


def write_whole(path: Location, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it."""
    if isinstance(path, StorePath):
        path.write_bytes(content)
        return
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def draft(path: Location) -> Iterator[Path]:
    """Give the name of a local file in which to write what will be published as `path`; it is removed in the end."""
    if isinstance(path, StorePath):
        with tempfile.TemporaryDirectory(prefix="vlm2rec-") as folder:
            yield Path(folder) / path.name
        return
    temporary = path.with_name(temporary_name(path.name))
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def put_in_place(temporary: Path, path: Location, sha256: str | None = None) -> None:
    """Make a flushed draft appear under its name, whole or not at all.

    Args:
        temporary: the draft.
        path: its place.
        sha256: of the draft, which a store has to give back.

    Raises:
        OSError: it could not be written, or a store gives back other bytes than it was given.
    """
    if isinstance(path, StorePath):
        path.upload(temporary)
        if sha256_file(path) != (sha256 or sha256_file(temporary)):
            raise OSError(errno.EIO, "the object does not read back as it was written")
        return
    temporary.replace(path)
    sync_folder(path.parent)


def discard(path: Path) -> None:
    """Remove a file, and what killed processes left of it: in a folder that one process at a time writes."""
    path.unlink(missing_ok=True)
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)


def flush(file: BinaryIO) -> None:
    """Have an open file's content on the disk, not only on its way there."""
    file.flush()
    os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Flush a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
