"""Writes files and folders whole or not at all: first under a temporary name beside the target, then renamed.

Before that, it checks that the output folder is free or ours.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from vlm2rec.embedder.contract import process
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, Vlm2RecError
from vlm2rec.embedder.contract.storage import Location, StorePath, sha256_file

_OTHER_OUT = "choose another --out"


# --- is the folder ours? --------------------------------------------------------------------------------------
def require_folder(out: Location, error: type[Vlm2RecError] = ConfigError) -> None:
    """Raise `error` if `out` exists and is not a folder."""
    if out.exists() and not out.is_dir():
        raise error(f"--out {out} is a file", "a folder, or a path where one can be made", _OTHER_OUT)


def require_ours(
    out: Location,
    what: str,
    *,
    ours: bool,
    only: Collection[str] | None = None,
    ignored: Callable[[str], bool] = lambda name: False,
    error: type[Vlm2RecError] = ConfigError,
) -> None:
    """Raise `error` unless the output folder is free (new or empty) or an earlier one of ours, to continue or replace.

    Args:
        out: the output folder.
        what: what it may be if it is not free, in the words of the message: `an earlier index`.
        ours: whether the caller recognised it as that.
        only: all names that a folder of ours may hold; None if it may hold any.
        ignored: tells which names do not count: locks and temporary files.
        error: the class of the exception.
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
    """Return a hidden name under which this process may write `name` before the rename.

    It names host, boot, process and a random part: no two writers ever have the same, wherever they run.
    """
    return f".{name}.{process.token()}.{ending}"


def writer_of(temporary: str) -> process.Process | None:
    """Return the process that a temporary name names; None if it is not one that `temporary_name` made."""
    return process.process_of_token(temporary.split(".")[-2]) if temporary.count(".") > 1 else None


def is_temporary(name: str, *of: str) -> bool:
    """Tell whether a file name is the temporary name of a file whose name is, or begins with, one of these."""
    return name.startswith(tuple(f".{final}" for final in of)) and name.endswith(".tmp")


# --- folders --------------------------------------------------------------------------------------------------
@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield a new folder beside `out`; at the end it is flushed and replaces `out`, after an error it is removed.

    The folder is made before the work starts. An old `out` stays until it is replaced, in one step where the system
    can do that. Folders that killed processes of this machine left beside `out` are removed.

    Raises:
        ConfigError: the folder cannot be written.
    """
    folder = out.with_name(temporary_name(out.name, "building"))
    with plain_disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with _held(out.parent):  # so that nobody finds a new folder without its lock
            for left in out.parent.glob(f".{glob.escape(out.name)}.*.building"):
                if _is_abandoned(left):
                    shutil.rmtree(left, ignore_errors=True)
            folder.mkdir()
            held = os.open(folder, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield folder
        with plain_disk_errors(out):
            for path in folder.rglob("*"):
                if path.is_file():
                    path.chmod(folder.stat().st_mode & 0o666)  # some writers make files that only the owner can read
                    sync(path)
            _replace_folder(folder, out)
    finally:
        os.close(held)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the kernel's lock of a folder, where the file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_abandoned(folder: Path) -> bool:
    """Tell whether the process that built a folder has ended for certain.

    A process of another container cannot be seen. If it runs on the same kernel, the kernel knows its lock.
    """
    writer = writer_of(folder.name)
    if writer is None or writer.lives():
        return False
    if writer.has_ended():
        return True
    if not writer.is_of_this_boot():
        return False
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


@contextmanager
def plain_disk_errors(out: Path, error: type[Vlm2RecError] = ConfigError, to_do: str = _OTHER_OUT) -> Iterator[None]:
    """Raise `error`, which says what `to_do`, if `out` cannot be written; a full disk is an `ArtifactError`."""
    try:
        yield
    except (OSError, RuntimeError) as caught:  # FAISS reports a full disk as RuntimeError
        if disk_is_full(caught):
            raise full_disk(out, caught) from None
        raise error(
            f"{out} cannot be written ({caught})", "a folder that you may write to, with enough free space", to_do
        ) from None


@contextmanager
def full_disk_errors(out: Location) -> Iterator[None]:
    """Raise `ArtifactError` for whatever a library raises when the disk of `out` is full; let all else pass."""
    try:
        yield
    except Exception as caught:  # safetensors and TensorBoard have their own
        if disk_is_full(caught):
            raise full_disk(out, caught) from None
        raise


def require_writable(out: Path) -> None:
    """Make the output folder and write a file in it, before the work; raise as `plain_disk_errors`."""
    with plain_disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        with draft(out / "probe") as probe:
            probe.write_bytes(b"?")


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_is_full(error: BaseException) -> bool:
    """Tell whether an error says that a disk, a quota or the largest allowed file is full."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return any(os.strerror(number) in str(error) for number in _FULL)


def full_disk(out: Location | None, error: BaseException) -> ArtifactError:
    """Return the error of a full disk; `out` is what was being written, None if that is not known."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ArtifactError(
        f"{out or 'a file'} cannot be written ({reason})",
        "enough free space on the disk",
        "free some space, or choose a folder on another disk, and run the same command again",
    )


def _replace_folder(new: Path, target: Path) -> None:
    """Move folder `new` to `target`; afterwards `new` is the old folder, if there was one."""
    if target.exists() and not _exchange(new, target):
        aside = new.with_suffix(".replaced")
        target.rename(aside)
        new.rename(target)
        aside.rename(new)
    elif not target.exists():
        new.rename(target)
    sync_folder(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, as Linux can; return False if the system or file system cannot."""
    try:
        swap = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(swap(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


# --- files ----------------------------------------------------------------------------------------------------
@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file name; at the end the file is flushed and replaces `path`, after an error it is removed.

    The file gets the mode that the umask gives a new one, whatever its writer (safetensors) has set.
    """
    with draft(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777
        yield temporary
        if temporary.stat().st_mode & 0o777 != mode:
            temporary.chmod(mode)
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
    """Yield the name of a local file for what will be published as `path`; the file is removed at the end."""
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
    """Publish a flushed draft under its final name, whole or not at all.

    Args:
        temporary: the draft.
        path: its final name.
        sha256: of the draft; the content that a store gives back must have the same.

    Raises:
        OSError: writing failed, or a store gives back other bytes than it was given.
    """
    if isinstance(path, StorePath):
        path.upload(temporary)
        if sha256_file(path) != (sha256 or sha256_file(temporary)):
            raise OSError(errno.EIO, "the object does not read back as it was written")
        return
    temporary.replace(path)
    sync_folder(path.parent)


def rename(folder: Location, before: str, now: str) -> None:
    """Give a small file another name, replacing a file of that name. In a store, both are there for a moment."""
    if isinstance(folder, StorePath):
        (folder / now).write_bytes((folder / before).read_bytes())
        (folder / before).unlink(missing_ok=True)
        return
    (folder / before).replace(folder / now)
    sync_folder(folder)


def discard(path: Path) -> None:
    """Remove a file and its left-over temporary files, in a folder that only one process at a time writes."""
    path.unlink(missing_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)


def flush(file: BinaryIO) -> None:
    """Flush an open file's content all the way to the disk."""
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
