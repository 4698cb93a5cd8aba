"""One writer at a time for an output folder, or several with different shards, across processes, containers and hosts.

A lock is a file, or an object of a store, that names its writer. On a disk the writer also holds the kernel's lock of
it; a store creates an object only if there is none. A lock is taken over when its writer is certainly dead. Either its
own machine and container can see that the process has ended, or the kernel has released the lock. Where neither can be
seen, the lock is watched. A writer changes its lock every few seconds as a sign of life. If a lock does not change for
two minutes, by the watcher's own clock, its writer is dead. No two clocks are compared.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vlm2rec.embedder.contract.errors import ArtifactError
from vlm2rec.embedder.contract.process import process_of, this_process, token
from vlm2rec.embedder.contract.publish import require_folder
from vlm2rec.embedder.contract.storage import Location, StorePath

LOCK_FILE = "_export.lock"
TURN_FILE = "_export.turn.lock"  # held by the one of several workers that begins or finishes the folder
_OF_A_WORKER = re.compile(r"_export\.worker-(\d+)-of-(\d+)\.lock")
FORMER_LOCK_FILE = "export.lock"  # in an earlier version, which does not know the other names
_FORMER_LOCK = re.compile(r"export(\.turn|\.worker-\d+-of-\d+)?\.lock")
BEAT = 15.0  # seconds between two signs of life
SILENCE = 120.0  # seconds; a writer that cannot be seen counts as dead when its lock was watched so long in vain
# seconds to wait until two writers that take over the same lock notice each other, where nothing else tells
SETTLE = 2.0
_LOOK = (0.1, 5.0)  # seconds between two looks at a lock: first, and at most

logger = logging.getLogger(__name__)


class Share(NamedTuple):
    """The shards of one of several writers of a folder: those whose number modulo `workers` is `worker`."""

    worker: int  # from 0
    workers: int

    @property
    def lock_file(self) -> str:
        """Name of this writer's lock file."""
        return f"_export.worker-{self.worker}-of-{self.workers}.lock"


def is_lock(name: str) -> bool:
    """Tell whether a file name is that of a writer's lock, of this version or an earlier one."""
    return _is_todays_lock(name) or is_former_lock(name)


def is_former_lock(name: str) -> bool:
    """Tell whether a file name is that of the lock of a writer of an earlier version."""
    return _FORMER_LOCK.fullmatch(name) is not None


def _is_todays_lock(name: str) -> bool:
    return name in (LOCK_FILE, TURN_FILE) or _OF_A_WORKER.fullmatch(name) is not None


def _is_rival(name: str, share: Share | None) -> bool:
    """Tell whether a file name is the lock of another writer that may make the same shards."""
    division = _OF_A_WORKER.fullmatch(name)
    own = name in (share.lock_file if share else LOCK_FILE, TURN_FILE)
    return _is_todays_lock(name) and not own and not (share and division and int(division[2]) == share.workers)


@dataclass(frozen=True)
class Hold:
    """A writer's lock on a folder, while it writes there. It can be pickled: the writer's helpers check it, too."""

    path: Location  # of the lock
    writer: str  # whose name it bears

    def require(self) -> None:
        """Raise `ArtifactError` if another writer took the folder over, as can happen after a long suspension."""
        with _reported(self.path.parent):
            found = _owner_of(self.path)
        if found.get("writer") != self.writer:
            raise ArtifactError(
                f"another writer has taken {self.path.parent} over, as this one gave no sign of life for too long",
                "one writer at a time",
                "wait until the other one ends; then run the same command again: it checks what is there",
            )


@contextmanager
def writing(folder: Location, share: Share | None = None, lock_file: str = LOCK_FILE) -> Iterator[Hold]:
    """Make `folder` if needed and lock it for one writer; the lock of a dead writer is taken over.

    Writers with different shares and the same number of workers write together. It waits up to two minutes where it
    cannot see whether the writer of a lock is alive. `lock_file` is the name of the lock of a single writer.

    Raises:
        ArtifactError: not a folder, not writable, or another writer holds it.
    """
    require_folder(folder, ArtifactError)
    made = isinstance(folder, Path) and not folder.exists()
    with _reported(folder):
        if isinstance(folder, Path):
            folder.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(folder / (share.lock_file if share else lock_file)) as hold:
            with _reported(folder):
                _refuse_others(folder, lambda name: _is_rival(name, share))
                if share is None:
                    (folder / TURN_FILE).unlink(missing_ok=True)  # no worker is at work
            yield hold
    finally:
        if made and isinstance(folder, Path):
            with suppress(OSError):  # it is not empty by now, as it should be
                folder.rmdir()


@contextmanager
def turn(folder: Location, share: Share | None) -> Iterator[None]:
    """Wait until no other worker begins or finishes this folder, and keep the others waiting inside the block.

    Call it inside `writing(folder, share)`. A single writer has no others: nothing is locked.
    """
    with _locked(folder / TURN_FILE, wait=True) if share else nullcontext():
        yield


@contextmanager
def earlier_versions_kept_out(folder: Location) -> Iterator[None]:
    """Keep writers of an earlier version, which look for locks of other names, out of a folder inside the block.

    Call it inside `turn`. The locks of dead ones are removed.

    Raises:
        ArtifactError: one of them is at work.
    """
    with _locked(folder / FORMER_LOCK_FILE):
        with _reported(folder):
            _refuse_others(folder, lambda name: is_former_lock(name) and name != FORMER_LOCK_FILE)
        yield


@contextmanager
def _locked(path: Location, wait: bool = False) -> Iterator[Hold]:
    """Hold a lock and give signs of life; with `wait`, wait for a living owner instead of refusing."""
    writer, descriptor = token(), None
    owner = this_process()._asdict() | {"writer": writer}
    with _reported(path.parent):
        if isinstance(path, StorePath):
            _put_lock(path, owner, wait)
        else:
            descriptor = _lock_file(path, owner, wait)
    ended = threading.Event()
    beat = _beat_of_object(path, owner) if isinstance(path, StorePath) else _beat_of_file(path, writer)
    beating = threading.Thread(target=_beat_until, args=(ended, beat, path.parent), name="lock", daemon=True)
    beating.start()
    try:
        yield Hold(path, writer)
    finally:
        ended.set()
        beating.join()  # a late sign of life would bring the lock of an object store back
        with suppress(OSError):  # the store does not answer: the lock is taken over when nobody renews it
            if _owner_of(path).get("writer") == writer:
                path.unlink(missing_ok=True)
        if descriptor is not None:
            os.close(descriptor)


def _beat_until(ended: threading.Event, beat: Callable[[], bool], folder: Location) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):  # the disk or the store does not answer: the next sign of life may arrive
            if not beat():
                logger.error("%s: another writer has taken it over", folder)
                return


@contextmanager
def _reported(folder: Location) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        expected, fix = (
            ("an existing bucket, and credentials that may write to it", "correct the store's address and credentials")
            if isinstance(folder, StorePath)
            else ("a folder, or a path where one can be made", "change its permissions")
        )
        raise ArtifactError(
            f"{folder} cannot be written ({error.strerror or error})", expected, f"choose another --out, or {fix}"
        ) from None


def _refuse_others(folder: Location, is_rival: Callable[[str], bool]) -> None:
    """Raise `ArtifactError` if the writer of a rival's lock is alive; remove the locks of dead ones."""
    unseen: list[Location] = []
    for path in [path for path in folder.iterdir() if is_rival(path.name)]:
        with suppress(FileNotFoundError):  # its writer has just finished and removed it
            if isinstance(path, StorePath):
                verdict = _verdict(_parsed(path.read_bytes()))
            else:
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    verdict = _verdict_of_file(descriptor)
                    if verdict == DEAD:
                        path.unlink(missing_ok=True)
                finally:
                    os.close(descriptor)
            if verdict == ALIVE:
                raise _in_use(path, "it is at work")
            if verdict == DEAD:
                path.unlink(missing_ok=True)
            else:
                unseen.append(path)
    if unseen:
        if (alive := _first_alive(unseen)) is not None:
            raise _in_use(alive, "it has just given a sign of life")
        for path in unseen:
            path.unlink(missing_ok=True)


# --- dead or alive ------------------------------------------------------------------------------------------
ALIVE, DEAD, UNSEEN = "alive", "dead", "unseen"


def _verdict(owner: dict[str, Any]) -> str:
    """Tell from its name whether the writer of a lock is alive, where that can be seen for certain."""
    process = process_of(owner)
    if process is None:
        return UNSEEN
    return ALIVE if process.lives() else DEAD if process.has_ended() else UNSEEN


def _first_alive(paths: Sequence[Location]) -> Location | None:
    """Watch locks and return the first that changes; None if all were silent, or their writers removed them."""
    before = {path: sign for path in paths if (sign := _sign(path)) is not None}
    for path in before:
        logger.warning(
            "%s: process %s on host %s cannot be seen from here: watching for a sign of life for up to %.0f s",
            path.parent,
            *_shown(_owner_of(path)),
            SILENCE,
        )
    silent, pause = 0.0, _LOOK[0]
    while before and silent < SILENCE:
        begun = time.monotonic()
        time.sleep(min(pause, BEAT / 3))
        for path in list(before):
            sign = _sign(path)
            if sign is None:
                del before[path]
            elif sign != before[path]:
                return path
        # a look that hangs shows nothing: the writer may hang with it
        silent += min(time.monotonic() - begun, 2 * pause)
        pause = min(2 * pause, _LOOK[1])
    return None


def _sign(path: Location) -> tuple[Any, ...] | None:
    """Return what a sign of life changes about a lock; None if the lock is not there."""
    try:
        if isinstance(path, StorePath):
            return (path.read_bytes(),)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # opening asks a network disk again
    except FileNotFoundError:
        return None
    try:
        found = os.fstat(descriptor)
        return found.st_ino, found.st_mtime_ns, os.pread(descriptor, 4096, 0)
    finally:
        os.close(descriptor)


def _owner_of(path: Location) -> dict[str, Any]:
    try:
        return _parsed(path.read_bytes())
    except FileNotFoundError:
        return {}


def _parsed(lock: bytes) -> dict[str, Any]:
    """Return what a lock says about its writer; nothing if it is torn."""
    try:
        found = json.loads(lock)
        return found if isinstance(found, dict) and {"host", "pid"} <= found.keys() else {}
    except ValueError:
        return {}


def _shown(owner: dict[str, Any]) -> tuple[Any, Any]:
    return owner.get("pid", "?"), owner.get("host", "?")


def _in_use(path: Location, state: str) -> ArtifactError:
    pid, host = _shown(_owner_of(path))
    return ArtifactError(
        f"{path.parent} is being written by process {pid} on host {host}; {state}",
        "one writer at a time",
        f"wait for it, or, if that process is gone, delete {path}",
    )


def _taking_over(path: Location, owner: dict[str, Any]) -> None:
    if owner:
        logger.warning("%s: taking over from process %s on host %s, which is gone", path.parent, *_shown(owner))


# --- files --------------------------------------------------------------------------------------------------
def _lock_file(path: Path, owner: dict[str, Any], wait: bool) -> int:
    """Return a descriptor that holds the lock. The kernel releases it when the process dies, however it dies."""
    pause = _LOOK[0]
    while True:
        descriptor, held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), False
        try:
            verdict, found = _verdict_of_file(descriptor), _parsed(os.pread(descriptor, 4096, 0))
            state = "it is at work"
            if verdict == UNSEEN:
                state = "it has just given a sign of life"
                verdict = DEAD if _first_alive([path]) is None else ALIVE
            if not _is_at(descriptor, path):
                continue  # its writer has just finished and removed it
            if verdict == ALIVE:
                if not wait:
                    raise _in_use(path, state)
                time.sleep(pause)
                pause = min(2 * pause, 1.0)
                continue
            _taking_over(path, found)
            certain = _flock(descriptor) == "by us" and (not found or _is_of_this_kernel(descriptor, found))
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(owner | {"device": os.fstat(descriptor).st_dev}).encode(), 0)
            os.utime(descriptor)
            if not certain:  # another host may do the same at this moment: the last one counts
                time.sleep(SETTLE)
            if _owner_of(path).get("writer") != owner["writer"]:
                if wait:
                    continue
                raise _in_use(path, "it took the lock a moment earlier")
            held = True
            return descriptor
        finally:
            if not held:
                os.close(descriptor)


def _verdict_of_file(descriptor: int) -> str:
    """Tell whether the writer of a lock file is alive; this process holds the kernel's lock if it is not."""
    taken, owner = _flock(descriptor), _parsed(os.pread(descriptor, 4096, 0))
    if taken == "by another":
        return ALIVE
    if not owner or (taken == "by us" and _is_of_this_kernel(descriptor, owner)):
        return DEAD
    return _verdict(owner)  # the kernel may see only the locks of its own host


def _is_of_this_kernel(descriptor: int, owner: dict[str, Any]) -> bool:
    """Tell whether a lock was written on this machine, through the same mount: then its kernel knows who holds it."""
    process = process_of(owner)
    return process is not None and process.is_of_this_boot() and owner.get("device") == os.fstat(descriptor).st_dev


def _flock(descriptor: int) -> str:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "by another"
    except OSError:  # a file system without locks
        return "unknown"
    return "by us"


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _beat_of_file(path: Path, writer: str) -> Callable[[], bool]:
    def beat() -> bool:
        if _owner_of(path).get("writer") != writer:
            return False
        os.utime(path)
        return True

    return beat


# --- objects of a store -------------------------------------------------------------------------------------
def _put_lock(path: StorePath, owner: dict[str, Any], wait: bool) -> None:
    """Create the lock object, or take over that of a dead writer."""
    lock, pause = json.dumps(owner | {"beat": 0}).encode(), _LOOK[0]
    while not path.create(lock):
        try:
            found = path.read_bytes()
        except FileNotFoundError:
            continue  # its writer has just finished and removed it
        verdict, state = _verdict(_parsed(found)), "it is at work"
        if verdict == UNSEEN:
            state = "it has just given a sign of life"
            verdict = DEAD if _first_alive([path]) is None else ALIVE
        if verdict == ALIVE:
            if not wait:
                raise _in_use(path, state)
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
        elif path.replace(found, lock):
            _taking_over(path, _parsed(found))
            time.sleep(SETTLE)  # a store may know no conditions: the last one that takes over counts
            break
    if _owner_of(path).get("writer") != owner["writer"]:
        if wait:
            return _put_lock(path, owner, wait)
        raise _in_use(path, "it took the lock a moment earlier")
    return None


def _beat_of_object(path: StorePath, owner: dict[str, Any]) -> Callable[[], bool]:
    beats = 0

    def beat() -> bool:
        nonlocal beats
        before, after = (json.dumps(owner | {"beat": number}).encode() for number in (beats, beats + 1))
        if not path.replace(before, after):
            return _owner_of(path).get("writer") == owner["writer"]
        beats += 1
        return True

    return beat
