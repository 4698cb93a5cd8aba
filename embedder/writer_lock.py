"""One writer at a time for an output folder, or several that each have a share of it, across processes and hosts."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from vlm2rec.embedder.errors import ArtifactError

LOCK_FILE = "export.lock"
_OF_A_WORKER = re.compile(r"export\.worker-(\d+)-of-(\d+)\.lock")
BEAT = 15.0  # seconds between two signs of life
SILENCE = 120.0  # seconds without one after which a writer on another host is taken to be dead

logger = logging.getLogger(__name__)


class Share(NamedTuple):
    """What one of several writers of a folder makes: the shards whose number leaves this remainder."""

    worker: int  # from 0
    workers: int

    @property
    def lock_file(self) -> str:
        """Name of its lock."""
        return f"export.worker-{self.worker}-of-{self.workers}.lock"


def is_lock(name: str) -> bool:
    """Tell whether a file name is that of a writer's lock."""
    return name == LOCK_FILE or _OF_A_WORKER.fullmatch(name) is not None


@contextmanager
def writing(folder: Path, share: Share | None = None) -> Iterator[None]:
    """Make `folder` if needed and hold it for one writer; the lock of a dead writer is taken over.

    A writer on this host is dead when its process is; one on another host when it has given no sign of life for two
    minutes. The writers of different shares of one division hold the folder together.

    Raises:
        ArtifactError: not a folder, not writable, or another writer holds it.
    """
    path = folder / (share.lock_file if share else LOCK_FILE)
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
    ended = threading.Event()
    try:
        _refuse_others(folder, share)
        threading.Thread(target=_beat, args=(descriptor, ended), name="lock", daemon=True).start()
        yield
    finally:
        ended.set()
        path.unlink(missing_ok=True)
        os.close(descriptor)
        if made:
            with suppress(OSError):  # it holds something by now, as it should
                folder.rmdir()


def _beat(descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):  # closed a moment ago
            os.utime(descriptor)


def _lock(path: Path) -> int:
    """Return a descriptor that holds the lock. The kernel lets go of it when the process dies, however it dies."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            owner = _owner(descriptor)
            if state := _alive(descriptor, owner, path):
                raise _held(path, owner, state)
            if not _is_at(descriptor, path):
                os.close(descriptor)  # its writer has just finished and removed it
                continue
            if owner:
                logger.warning("%s: taking over from process %s, which is gone", path.parent, owner["pid"])
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise


def _refuse_others(folder: Path, share: Share | None) -> None:
    """Raise `ArtifactError` where a live writer makes the same shards; remove the locks of dead ones."""
    for path in folder.glob("export*.lock"):
        division = _OF_A_WORKER.fullmatch(path.name)
        own = path.name == (share.lock_file if share else LOCK_FILE)
        if own or not is_lock(path.name) or (share and division and int(division[2]) == share.workers):
            continue
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            owner = _owner(descriptor)
            if state := _alive(descriptor, owner, path):
                raise _held(path, owner, state)
            path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _alive(descriptor: int, owner: dict[str, Any], path: Path) -> str:
    """Return what speaks for the life of a lock's owner, nothing if it is dead; a dead one's lock is ours then."""
    taken = _flock(descriptor)
    if taken == "by another":
        return "it is at work"
    if not owner or (taken == "by us" and owner["host"] == socket.gethostname()):
        return ""
    # what the kernel says of a lock may hold for this host alone
    silent = _now(path.parent) - os.fstat(descriptor).st_mtime
    return (
        ""
        if silent > SILENCE
        else f"its last sign of life came {silent:.0f} s ago: after {SILENCE:.0f} s it counts as dead"
    )


def _now(folder: Path) -> float:
    """Return the time by the clock of the file system, which is what a sign of life is measured by."""
    probe = folder / f".export.lock.{os.getpid()}.tmp"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


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


def _held(path: Path, owner: dict[str, Any], state: str) -> ArtifactError:
    return ArtifactError(
        f"{path.parent} is being written by process {owner.get('pid', '?')} on host {owner.get('host', '?')}; {state}",
        "one writer at a time",
        f"wait for it, or, if that process is gone, delete {path}",
    )
