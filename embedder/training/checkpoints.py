"""Checkpoints of a training: all that is needed to continue as if it had never stopped, with checksums over all of it.

    run.json                        settings of the run (`pipelines.finetune`)
    checkpoint-<step>/
      trainable.safetensors         the trained weights
      best.safetensors              those of the best validation so far; absent before the first
      optimizer.safetensors         what the optimizer remembers; its settings and the schedule's step
      process-<rank>.safetensors    random states of each process, and what it has not logged yet
      trainer_state.json            step, epoch, and the curves so far
      checksums.json                SHA-256 of each of these files; written last

A folder without checksums.json is a checkpoint that a killed run was writing. None of the files is a pickle, and a file
that checksums.json does not name is never opened.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors.torch
from torch import Tensor

from vlm2rec.embedder import distributed
from vlm2rec.embedder.contract import publish, schema
from vlm2rec.embedder.contract.checksums import SEAL, checksums, first_damage, is_intact, sealed
from vlm2rec.embedder.contract.errors import ArtifactError
from vlm2rec.embedder.progress import SILENT, Reporter

CHECKPOINTS = "checkpoints"
RUN_FILE = "run.json"
WEIGHTS = "trainable.safetensors"
BEST = "best.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "trainer_state.json"
CHECKSUMS = "checksums.json"
KEPT = 2  # the newest, and one to go back to if it is damaged
GO_ON = "make room and run the same command again: it continues from the last whole checkpoint"
START_AGAIN = "--no-resume starts this training again"
_CHECKPOINT = re.compile(r"checkpoint-([0-9]+)")
# trainings before checksums.json kept these, as pickles
_PICKLES = re.compile(r"(optimizer|scheduler)\.pt|rng_state(_[0-9]+)?\.pth")
_WRITTEN = re.compile(
    rf"{_PICKLES.pattern}|process-[0-9]+\.safetensors|\.checksums\.json\.[^/]*\.tmp"
    + "".join("|" + re.escape(name) for name in (WEIGHTS, BEST, OPTIMIZER, STATE, CHECKSUMS))
)
_BESIDE = re.compile(r"run\.json|best\.safetensors|\.(run\.json|best\.safetensors)\.[^/]*\.tmp")


def process_file(rank: int) -> str:
    """Return the name of a process's own file."""
    return f"process-{rank}.safetensors"


def newest_whole(folder: Path, reporter: Reporter = SILENT) -> Path | None:
    """Return the newest whole checkpoint, or None; newer ones, unfinished or damaged, are reported and removed.

    Raises:
        ArtifactError: a checkpoint is from before there were checksums.
    """
    found = None
    passed = []
    for step, path in sorted(_checkpoints(folder).items(), reverse=True):
        if any(_PICKLES.fullmatch(inside.name) for inside in path.iterdir()) and not (path / CHECKSUMS).is_file():
            raise ArtifactError(
                f"{path} was written by an earlier version of vlm2rec, without checksums",
                f"a checkpoint with {CHECKSUMS}",
                f"{START_AGAIN}; the version that began it can finish it",
            )
        damage = damage_of(path)
        if damage is None:
            found = step
            break
        passed.append((path, damage))
    for path, damage in passed:
        onwards = "from the start" if found is None else f"from step {found}"
        reporter.say(f"{path} is damaged: {damage}. It is left out, and training continues {onwards}.")
        _discard_own(path)
    return None if found is None else folder / f"checkpoint-{found}"


def damage_of(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None if every file of it has the bytes that were written."""
    if not (path / CHECKSUMS).is_file():
        return f"it has no {CHECKSUMS}, which is written last"
    try:
        recorded = schema.read_json(path / CHECKSUMS, "", "")
    except ArtifactError as error:
        return error.found
    if SEAL not in recorded or not is_intact(recorded):
        return f"{CHECKSUMS} does not have the content that was written"
    del recorded[SEAL]
    if STATE not in recorded or not all(_WRITTEN.fullmatch(name) for name in recorded):
        return f"{CHECKSUMS} does not name its files"
    return first_damage(path, recorded)


def begin(path: Path) -> None:
    """Make the folder of a new checkpoint; every process then writes its files into it."""
    with disk(path):
        if distributed.is_main():
            _discard_own(path)
            path.mkdir(parents=True, exist_ok=True)
    distributed.wait()


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file of a checkpoint.

    Raises:
        ArtifactError: the disk is full or fails; the checkpoint is removed.
    """
    with disk(file.parent), file.open("wb") as opened:
        # not save_file, whose files only the owner can read
        opened.write(
            safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata)
        )
        publish.flush(opened)


def finish(path: Path, own: Sequence[str]) -> None:
    """Publish a checkpoint once every process has written its `own` files, and remove older ones."""
    with disk(path):
        for name in own:
            publish.sync(path / name)
        found = checksums(path, own)
    recorded = {name: value for part in distributed.from_all(found) for name, value in part.items()}
    if not distributed.is_main():
        return
    with disk(path):
        publish.sync_folder(path)
        schema.write_json(path / CHECKSUMS, sealed(dict(sorted(recorded.items()))))
        publish.sync_folder(path.parent)
    whole = [folder for _, folder in sorted(_checkpoints(path.parent).items()) if (folder / CHECKSUMS).is_file()]
    for old in whole[:-KEPT]:
        # first the file that makes it whole: what a killed run leaves of it is no checkpoint
        (old / CHECKSUMS).unlink(missing_ok=True)
        _discard_own(old)


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turn an error of the disk into words; the half-written checkpoint is removed, as its room may be needed."""
    try:
        yield
    except OSError as error:
        _discard_own(path)
        with publish.plain_disk_errors(path, ArtifactError, GO_ON):
            raise error


def newest_named(folder: Path) -> Path | None:
    """Return the folder of the newest checkpoint that was once whole, unread, or None."""
    whole = [path for _, path in sorted(_checkpoints(folder).items()) if (path / CHECKSUMS).is_file()]
    return whole[-1] if whole else None


def _checkpoints(folder: Path) -> dict[int, Path]:
    matches = ((_CHECKPOINT.fullmatch(path.name), path) for path in (folder.iterdir() if folder.is_dir() else ()))
    return {int(match[1]): path for match, path in matches if match and path.is_dir() and not path.is_symlink()}


def foreign(folder: Path) -> list[str]:
    """Return what a folder of checkpoints holds that no training has written, as paths below it."""
    if not folder.is_dir():
        return []
    own = set(_checkpoints(folder).values())
    strange = [path.name for path in folder.iterdir() if path not in own and not _BESIDE.fullmatch(path.name)]
    for checkpoint in own:
        strange += [
            f"{checkpoint.name}/{path.name}" for path in checkpoint.iterdir() if not _WRITTEN.fullmatch(path.name)
        ]
    return sorted(strange)


def clear(folder: Path) -> None:
    """Remove what trainings have written from a folder of checkpoints."""
    for checkpoint in _checkpoints(folder).values():
        _discard_own(checkpoint)
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if _BESIDE.fullmatch(path.name):
            path.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Remove what trainings have written from a folder of checkpoints, and the folder if nothing else is in it."""
    clear(folder)
    with suppress(OSError):  # it holds something else, is not there, or is a link
        folder.rmdir()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder of checkpoints for this process; the kernel gives it back when the process ends, however.

    Raises:
        ArtifactError: another training holds it, or it cannot be made.
    """
    new = [path for path in (folder, folder.parent) if not path.exists()]
    with publish.plain_disk_errors(folder, ArtifactError):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtifactError(
                f"another finetune is writing to {folder.parent}",
                "one at a time",
                "wait until it has ended, or choose another --out",
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)
        for path in new:  # of a run that ended before it had written anything
            with suppress(OSError):
                path.rmdir()


def _discard_own(folder: Path) -> None:
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if _WRITTEN.fullmatch(path.name) and not path.is_dir():
            path.unlink(missing_ok=True)
    with suppress(OSError):  # it holds something else, or is a link
        folder.rmdir()
