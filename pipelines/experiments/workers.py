"""Where the steps of a study run: in this process one after the other, or in several processes at a time."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Protocol

from vlm2rec.embedder.contract.errors import ArtifactError, Vlm2RecError
from vlm2rec.embedder.export.processes import end_with_parent, shared_cores
from vlm2rec.pipelines.commands import module_of
from vlm2rec.pipelines.experiments.ledger import LOG_FILE
from vlm2rec.pipelines.experiments.methods import Run, Step

Work = tuple[Run, Step]
Outcome = float | Vlm2RecError
"""Seconds that a step took, or why it could not be done."""


class Workers(Protocol):
    """Runs steps."""

    free: int

    def start(self, work: Work) -> None:
        """Take a step; only while `free` is above 0."""

    def next(self) -> tuple[Work, Outcome]:
        """Wait until a step has ended."""


def perform(log: Path | None, step: Step) -> Outcome:
    """Run one step; what it says goes to the run's log, as the terminal shows the study, or without one to stderr."""
    started = time.perf_counter()
    try:
        with contextlib.ExitStack() as stack:
            if log is not None:
                file = stack.enter_context(log.open("a", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stderr(file))
                file.write(f"--- {step.name}: vlm2rec {step.command}\n")
            module_of(step.command).run(step.config)
    except Vlm2RecError as error:
        return error
    finally:
        gc.collect()  # models are held in cycles: two at a time would be one too many
    return time.perf_counter() - started


@contextlib.contextmanager
def workers(count: int, aloud: bool = False) -> Iterator[Workers]:
    """Open `count` workers; one works in this process, and with `aloud` speaks at the terminal."""
    if count == 1:
        yield _Here(aloud)
        return
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), end_with_parent)
    with shared_cores(count):
        try:
            yield _Pool(pool, count)
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()  # a step that is under way goes on from its last checkpoint next time
            raise
        finally:
            pool.shutdown(cancel_futures=True)


class _Here:
    """Works when it is waited for."""

    def __init__(self, aloud: bool) -> None:
        self.free = 1
        self._aloud = aloud
        self._taken: list[Work] = []

    def start(self, work: Work) -> None:
        self._taken.append(work)
        self.free = 0

    def next(self) -> tuple[Work, Outcome]:
        run, step = self._taken.pop()
        self.free = 1
        return (run, step), perform(None if self._aloud else run.folder / LOG_FILE, step)


class _Pool:
    """Works in processes that are started once: importing torch takes seconds."""

    def __init__(self, pool: ProcessPoolExecutor, count: int) -> None:
        self.free = count
        self._pool = pool
        self._under_way: dict[Future[Outcome], Work] = {}

    def start(self, work: Work) -> None:
        run, step = work
        self._under_way[self._pool.submit(perform, run.folder / LOG_FILE, step)] = work
        self.free -= 1

    def next(self) -> tuple[Work, Outcome]:
        ended = next(iter(wait(self._under_way, return_when=FIRST_COMPLETED).done))
        work = self._under_way.pop(ended)
        self.free += 1
        try:
            return work, ended.result()
        except BrokenProcessPool:
            raise ArtifactError(
                "a worker of the study was killed, perhaps for want of memory",
                "workers that live until the study ends",
                "give the same command again: it goes on where it was; with a smaller --jobs it takes less memory",
            ) from None
