"""Runs the steps of a study: in this process one after the other, or in several processes at a time."""

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
from vlm2rec.pipelines.console import inner_command
from vlm2rec.pipelines.experiments.ledger import LOG_FILE
from vlm2rec.pipelines.experiments.methods import Run, Step

Work = tuple[Run, Step]
Outcome = float | Vlm2RecError
"""Seconds that a step took, or the error that ended it."""


class Workers(Protocol):
    """Runs steps."""

    free: int

    def start(self, work: Work) -> None:
        """Start a step; call this only while `free` is above 0."""

    def next(self) -> tuple[Work, Outcome]:
        """Wait until a step has ended, and return it with its outcome."""


def perform(log: Path | None, step: Step) -> Outcome:
    """Run one step; its messages go to the file `log`, or to stderr if that is None."""
    started = time.perf_counter()
    try:
        with contextlib.ExitStack() as stack:
            if log is not None:
                file = stack.enter_context(log.open("a", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stderr(file))
                file.write(f"--- {step.name}: vlm2rec {step.command}\n")
            stack.enter_context(inner_command())
            module_of(step.command).run(step.config)
    except Vlm2RecError as error:
        return error
    finally:
        gc.collect()  # models sit in reference cycles; without this, two would be in memory at a time
    return time.perf_counter() - started


@contextlib.contextmanager
def workers(count: int, to_terminal: bool = False) -> Iterator[Workers]:
    """Open `count` workers; a single one runs the steps in this process, and can print their output to the terminal."""
    if count == 1:
        yield _InProcess(to_terminal)
        return
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), end_with_parent)
    with shared_cores(count):
        try:
            yield _Pool(pool, count)
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()  # next time, a running step continues from its last checkpoint
            raise
        finally:
            pool.shutdown(cancel_futures=True)


class _InProcess:
    """One worker in this process: it runs a step when `next` waits for it."""

    def __init__(self, to_terminal: bool) -> None:
        self.free = 1
        self._to_terminal = to_terminal
        self._taken: list[Work] = []

    def start(self, work: Work) -> None:
        self._taken.append(work)
        self.free = 0

    def next(self) -> tuple[Work, Outcome]:
        run, step = self._taken.pop()
        self.free = 1
        return (run, step), perform(None if self._to_terminal else run.folder / LOG_FILE, step)


class _Pool:
    """Workers in processes that start once, because importing torch takes seconds."""

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
                "a worker of the study was killed, perhaps because memory ran out",
                "workers that live until the study ends",
                "give the same command again, it continues; a smaller --jobs needs less memory",
            ) from None
