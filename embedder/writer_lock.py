"""One writer at a time for an output folder, across processes and hosts."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vlm2rec.embedder.errors import ArtifactError

LOCK_FILE = "export.lock"

logger = logging.getLogger(__name__)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Make `folder` if needed and hold it for one writer; the lock of a dead writer on this host is taken over.

    Raises:
        ArtifactError: not a folder, not writable, or another writer holds it.
    """
    path = folder / LOCK_FILE
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} is a file", "a folder, or a place to make one", "choose another --out")
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(path)
    except OSError as error:
        raise ArtifactError(
            f"{folder} cannot be written ({error.strerror})",
            "a folder, or a place to make one",
            "choose another --out, or mend its permissions",
        ) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        if made:
            with suppress(OSError):  # it holds something by now, as it should
                folder.rmdir()


def _lock(path: Path) -> int:
    """Return a descriptor that holds the lock. The kernel lets go of it when the process dies, however it dies."""
    here = socket.gethostname()
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            taken = _flock(descriptor)
            owner = _owner(descriptor)
            if taken == "by another":
                raise _held(path.parent, owner, "it is at work")
            if not _is_at(descriptor, path):
                os.close(descriptor)  # its writer has just finished and removed it
                continue
            if owner and (owner["host"] != here or taken == "unknown"):
                raise _held(path.parent, owner, "whether it is alive cannot be seen from here")
            if owner:
                logger.warning("%s: taking over from process %s, which is gone", path.parent, owner["pid"])
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"host": here, "pid": os.getpid()}).encode(), 0)
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise


def _flock(descriptor: int) -> str:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "by another"
    except OSError:  # a file system without locks
        return "unknown"
    return "by us"


def _owner(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        return {"host": str(found["host"]), "pid": int(found["pid"])}
    except (ValueError, TypeError, KeyError):
        return {}


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _held(folder: Path, owner: dict[str, Any], state: str) -> ArtifactError:
    return ArtifactError(
        f"{folder} is being written by process {owner.get('pid', '?')} on host {owner.get('host', '?')}; {state}",
        "one writer at a time",
        f"wait for it, or, if that process is gone, delete {folder / LOCK_FILE}",
    )
