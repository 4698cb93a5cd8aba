"""One writer at a time for an output folder, or several that each have a share of it, across processes and hosts.

On a disk the lock is the kernel's, with signs of life for hosts that it does not know of. In an object store, which has
no locks, it is an object that is put there if there is none, and put again as a sign of life.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from vlm2rec.embedder.contract.errors import ArtifactError
from vlm2rec.embedder.contract.publish import process_runs, require_folder, temporary_name
from vlm2rec.embedder.contract.storage import Location, StorePath

LOCK_FILE = "export.lock"
_OF_A_WORKER = re.compile(r"export\.worker-(\d+)-of-(\d+)\.lock")
BEAT = 15.0  # seconds between two signs of life
SILENCE = 120.0  # seconds without one after which a writer on another host is taken to be dead
SETTLE = 2.0  # seconds in which two that take over the same object notice each other

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


def _is_rival(name: str, share: Share | None) -> bool:
    """Tell whether a file name is that of the lock of somebody who makes the same shards."""
    division = _OF_A_WORKER.fullmatch(name)
    own = name == (share.lock_file if share else LOCK_FILE)
    return is_lock(name) and not own and not (share and division and int(division[2]) == share.workers)


class Hold:
    """What a writer has while it writes a folder."""

    def __init__(self, folder: Location, is_ours: Callable[[], bool] = lambda: True) -> None:
        self._folder, self._is_ours = folder, is_ours

    def require(self) -> None:
        """Raise `ArtifactError` where another has taken the folder over, as one that is asleep for long must expect."""
        if not self._is_ours():
            raise ArtifactError(
                f"another writer has taken {self._folder} over, as this one gave no sign of life for long",
                "one writer at a time",
                "let the other one end; then run the same command again: it checks what is there",
            )


def is_writing(temporary: Location) -> bool:
    """Tell whether somebody may still be writing a temporary file, whose name ends in the number of its process."""
    if process_runs(temporary.name.split(".")[-2]):
        return True
    try:
        hosts = [_text_of(path) for path in temporary.parent.iterdir() if is_lock(path.name)]
        if all(socket.gethostname() in text for text in hosts):
            return False
        return time.time() - temporary.stat().st_mtime < SILENCE  # a process of another host looks like none at all
    except OSError:
        return False


def _text_of(path: Location) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return socket.gethostname()  # gone meanwhile


@contextmanager
def writing(folder: Location, share: Share | None = None) -> Iterator[Hold]:
    """Make `folder` if needed and hold it for one writer; the lock of a dead writer is taken over.

    A writer on this host is dead when its process is; one on another host when it has given no sign of life for two
    minutes. The writers of different shares of one division hold the folder together.

    Raises:
        ArtifactError: not a folder, not writable, or another writer holds it.
    """
    if isinstance(folder, StorePath):
        with _writing_objects(folder, share) as hold:
            yield hold
        return
    path = folder / (share.lock_file if share else LOCK_FILE)
    require_folder(folder, ArtifactError)
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
        yield Hold(folder)
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
        if not _is_rival(path.name, share):
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
    return _still_alive(_now(path.parent) - os.fstat(descriptor).st_mtime)


def _still_alive(silent: float) -> str:
    """Return what speaks for the life of an owner that has been silent for some seconds, nothing if it is dead."""
    if silent > SILENCE:
        return ""
    return f"its last sign of life came {silent:.0f} s ago: after {SILENCE:.0f} s it counts as dead"


def _now(folder: Path) -> float:
    """Return the time by the clock of the file system, which is what a sign of life is measured by."""
    probe = folder / temporary_name(LOCK_FILE)
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
    return _parsed(os.pread(descriptor, 4096, 0))


def _parsed(lock: bytes) -> dict[str, Any]:
    try:
        found = json.loads(lock)
        return {"host": str(found["host"]), "pid": int(found["pid"]), "processes": found.get("processes")}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _held(path: Location, owner: dict[str, Any], state: str) -> ArtifactError:
    return ArtifactError(
        f"{path.parent} is being written by process {owner.get('pid', '?')} on host {owner.get('host', '?')}; {state}",
        "one writer at a time",
        f"wait for it, or, if that process is gone, delete {path}",
    )


# --- object stores ------------------------------------------------------------------------------------------


@contextmanager
def _writing_objects(folder: StorePath, share: Share | None) -> Iterator[Hold]:
    """Hold a folder of an object store; see `writing`."""
    path, ended = folder / (share.lock_file if share else LOCK_FILE), threading.Event()
    with _reached(folder):
        lock = _put_lock(path)
    beating = threading.Thread(target=_beat_object, args=(path, lock, ended), name="lock", daemon=True)
    try:
        with _reached(folder):
            _refuse_other_objects(folder, share)
        beating.start()
        yield Hold(folder, lambda: path.is_file() and path.read_bytes() == lock)
    finally:
        ended.set()
        if beating.ident is not None:
            beating.join()  # its sign of life would bring the lock back
        with suppress(OSError):  # the silence will tell
            if path.read_bytes() == lock:
                path.unlink()


@contextmanager
def _reached(folder: StorePath) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"{folder} cannot be written ({error.strerror or error})",
            "a bucket that is there, and credentials that may write to it",
            "choose another --out, or mend the store's address and credentials",
        ) from None


def _put_lock(path: StorePath) -> bytes:
    """Put our lock there, and return its content."""
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "processes": _processes(), "writer": uuid.uuid4().hex}
    lock = json.dumps(owner).encode()
    while not path.create(lock):
        try:
            there = path.read_bytes()
            if state := _object_alive(path, _parsed(there)):
                raise _held(path, _parsed(there), state)
        except FileNotFoundError:
            continue  # its writer has just finished and removed it
        logger.warning("%s: taking over from process %s, which is gone", path.parent, _parsed(there).get("pid", "?"))
        path.write_bytes(lock)
        time.sleep(SETTLE)  # whoever takes it over at this very moment has put a lock by then, and the last one counts
        break
    if (there := path.read_bytes()) != lock:
        raise _held(path, _parsed(there), "it was a moment faster")
    return lock


def _beat_object(path: StorePath, lock: bytes, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):  # the store does not answer: the next sign may come through
            if path.read_bytes() != lock:
                logger.error("%s: another writer has taken it over", path.parent)
                return
            path.write_bytes(lock)


def _refuse_other_objects(folder: StorePath, share: Share | None) -> None:
    """As `_refuse_others`."""
    for path in folder.iterdir():
        if not _is_rival(path.name, share):
            continue
        with suppress(FileNotFoundError):  # its writer has just finished and removed it
            owner = _parsed(path.read_bytes())
            if state := _object_alive(path, owner):
                raise _held(path, owner, state)
            path.unlink()


def _object_alive(path: StorePath, owner: dict[str, Any]) -> str:
    """Return what speaks for the life of a lock's owner, nothing if it is dead."""
    if owner and owner["processes"] and owner["processes"] == _processes() and not process_runs(owner["pid"]):
        return ""
    return _still_alive(_store_time(path.parent) - path.stat().st_mtime)


def _store_time(folder: StorePath) -> float:
    """Return the time by the clock of the store, which is what a sign of life is measured by."""
    probe = folder / temporary_name(f"{LOCK_FILE}.{uuid.uuid4().hex[:8]}")  # hosts may share a number
    try:
        probe.write_bytes(b"?")
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _processes() -> str | None:
    """Return what names the process ids that this process sees: a machine since its start, and a container on it."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None
