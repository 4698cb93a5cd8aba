"""One writer at a time for an output folder, or several with different shards, across processes and hosts.

On a disk the lock is the kernel's; a writer also gives signs of life, for hosts whose kernel does not see its lock. An
object store has no locks. There the lock is an object: created only if there is none, and rewritten as a sign of life.
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
SILENCE = 120.0  # seconds; a writer on another host counts as dead after so long without one
SETTLE = 2.0  # seconds to wait until two writers that take over the same lock object notice each other

logger = logging.getLogger(__name__)


class Share(NamedTuple):
    """The shards of one of several writers of a folder: those whose number modulo `workers` is `worker`."""

    worker: int  # from 0
    workers: int

    @property
    def lock_file(self) -> str:
        """Name of this writer's lock file."""
        return f"export.worker-{self.worker}-of-{self.workers}.lock"


def is_lock(name: str) -> bool:
    """Tell whether a file name is that of a writer's lock."""
    return name == LOCK_FILE or _OF_A_WORKER.fullmatch(name) is not None


def _is_rival(name: str, share: Share | None) -> bool:
    """Tell whether a file name is the lock of another writer that may make the same shards."""
    division = _OF_A_WORKER.fullmatch(name)
    own = name == (share.lock_file if share else LOCK_FILE)
    return is_lock(name) and not own and not (share and division and int(division[2]) == share.workers)


class Hold:
    """A writer's lock on a folder, while it writes there."""

    def __init__(self, folder: Location, is_ours: Callable[[], bool] = lambda: True) -> None:
        self._folder, self._is_ours = folder, is_ours

    def require(self) -> None:
        """Raise `ArtifactError` if another writer took the folder over, as can happen after a long suspension."""
        if not self._is_ours():
            raise ArtifactError(
                f"another writer has taken {self._folder} over, as this one gave no sign of life for too long",
                "one writer at a time",
                "wait until the other one ends; then run the same command again: it checks what is there",
            )


def is_writing(temporary: Location) -> bool:
    """Tell whether a process may still be writing a temporary file; the name contains the process id."""
    if process_runs(temporary.name.split(".")[-2]):
        return True
    try:
        hosts = [_text_of(path) for path in temporary.parent.iterdir() if is_lock(path.name)]
        if all(socket.gethostname() in text for text in hosts):
            return False
        return time.time() - temporary.stat().st_mtime < SILENCE  # a process on another host cannot be seen
    except OSError:
        return False


def _text_of(path: Location) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return socket.gethostname()  # the lock has just gone: no sign of another host


@contextmanager
def writing(folder: Location, share: Share | None = None) -> Iterator[Hold]:
    """Make `folder` if needed and lock it for one writer; the lock of a dead writer is taken over.

    A writer on this host is dead when its process has ended. A writer on another host is dead when it has given no
    sign of life for two minutes. Writers with different shares and the same number of workers write together.

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
            "a folder, or a path where one can be made",
            "choose another --out, or change its permissions",
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
            with suppress(OSError):  # it is not empty by now, as it should be
                folder.rmdir()


def _beat(descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):  # it was closed a moment ago
            os.utime(descriptor)


def _lock(path: Path) -> int:
    """Return a descriptor that holds the lock. The kernel releases it when the process dies, however it dies."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            owner = _owner(descriptor)
            if state := _alive(descriptor, owner, path):
                raise _in_use(path, owner, state)
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
                raise _in_use(path, owner, state)
            path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _alive(descriptor: int, owner: dict[str, Any], path: Path) -> str:
    """Return why a lock's owner counts as alive; "" if it is dead, and then this process holds the lock."""
    taken = _flock(descriptor)
    if taken == "by another":
        return "it is at work"
    if not owner or (taken == "by us" and owner["host"] == socket.gethostname()):
        return ""
    # the kernel may see only the locks of this host
    return _still_alive(_now(path.parent) - os.fstat(descriptor).st_mtime)


def _still_alive(silent: float) -> str:
    """Return why an owner counts as alive that was silent for some seconds; "" if it counts as dead."""
    if silent > SILENCE:
        return ""
    return f"its last sign of life came {silent:.0f} s ago: after {SILENCE:.0f} s it counts as dead"


def _now(folder: Path) -> float:
    """Return the time by the clock of the file system, by which signs of life are dated."""
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


def _in_use(path: Location, owner: dict[str, Any], state: str) -> ArtifactError:
    return ArtifactError(
        f"{path.parent} is being written by process {owner.get('pid', '?')} on host {owner.get('host', '?')}; {state}",
        "one writer at a time",
        f"wait for it, or, if that process is gone, delete {path}",
    )


# --- object stores ------------------------------------------------------------------------------------------


@contextmanager
def _writing_objects(folder: StorePath, share: Share | None) -> Iterator[Hold]:
    """Lock a folder of an object store; see `writing`."""
    path, ended = folder / (share.lock_file if share else LOCK_FILE), threading.Event()
    with _store_errors(folder):
        lock = _put_lock(path)
    beating = threading.Thread(target=_beat_object, args=(path, lock, ended), name="lock", daemon=True)
    try:
        with _store_errors(folder):
            _refuse_other_objects(folder, share)
        beating.start()
        yield Hold(folder, lambda: path.is_file() and path.read_bytes() == lock)
    finally:
        ended.set()
        if beating.ident is not None:
            beating.join()  # a late sign of life would bring the lock back
        with suppress(OSError):  # the store does not answer: the lock expires by itself
            if path.read_bytes() == lock:
                path.unlink()


@contextmanager
def _store_errors(folder: StorePath) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"{folder} cannot be written ({error.strerror or error})",
            "an existing bucket, and credentials that may write to it",
            "choose another --out, or correct the store's address and credentials",
        ) from None


def _put_lock(path: StorePath) -> bytes:
    """Create our lock object, and return its content."""
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "processes": _processes(), "writer": uuid.uuid4().hex}
    lock = json.dumps(owner).encode()
    while not path.create(lock):
        try:
            found = path.read_bytes()
            if state := _object_alive(path, _parsed(found)):
                raise _in_use(path, _parsed(found), state)
        except FileNotFoundError:
            continue  # its writer has just finished and removed it
        logger.warning("%s: taking over from process %s, which is gone", path.parent, _parsed(found).get("pid", "?"))
        path.write_bytes(lock)
        time.sleep(SETTLE)  # any other writer that takes over now has written its lock by then; the last one counts
        break
    if (found := path.read_bytes()) != lock:
        raise _in_use(path, _parsed(found), "it took the lock a moment earlier")
    return lock


def _beat_object(path: StorePath, lock: bytes, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):  # the store does not answer: the next sign of life may arrive
            if path.read_bytes() != lock:
                logger.error("%s: another writer has taken it over", path.parent)
                return
            path.write_bytes(lock)


def _refuse_other_objects(folder: StorePath, share: Share | None) -> None:
    """See `_refuse_others`."""
    for path in folder.iterdir():
        if not _is_rival(path.name, share):
            continue
        with suppress(FileNotFoundError):  # its writer has just finished and removed it
            owner = _parsed(path.read_bytes())
            if state := _object_alive(path, owner):
                raise _in_use(path, owner, state)
            path.unlink()


def _object_alive(path: StorePath, owner: dict[str, Any]) -> str:
    """Return why a lock's owner counts as alive; "" if it is dead."""
    if owner and owner["processes"] and owner["processes"] == _processes() and not process_runs(owner["pid"]):
        return ""
    return _still_alive(_store_time(path.parent) - path.stat().st_mtime)


def _store_time(folder: StorePath) -> float:
    """Return the time by the clock of the store, by which signs of life are dated."""
    probe = folder / temporary_name(f"{LOCK_FILE}.{uuid.uuid4().hex[:8]}")  # two hosts may have the same process id
    try:
        probe.write_bytes(b"?")
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _processes() -> str | None:
    """Return which process ids this process can see: those of one boot of a machine, in one container."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None
