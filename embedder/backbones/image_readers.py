"""Threads that read images ahead of the model. A read that takes too long is given up, and only its image fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Generic, TypeVar

from vlm2rec.embedder.backbones.images import ImageError
from vlm2rec.embedder.contract.errors import DataError

T = TypeVar("T")
MOST_STUCK = 64  # reads that hang at the same time: more than that is a fault of the disk, not of images


@dataclass(eq=False)
class Reading(Generic[T]):
    """One requested read."""

    work: Callable[[], T]
    answer: Future[T] = field(default_factory=Future)
    begun: float | None = None  # seconds of the monotonic clock; None while it waits for a thread
    given_up: bool = False


class Readers:
    """A few threads that read in the order of the requests; take the results in that order too.

    A thread cannot be stopped while the system blocks it, for example on a network disk that is gone. Its read is
    given up after `timeout` seconds, and another thread replaces it. Nothing waits for a blocked thread, not even the
    end of the process; therefore these are daemon threads and not a `ThreadPoolExecutor`.
    """

    def __init__(self, count: int, timeout: float) -> None:
        self._count, self._timeout = count, timeout
        self._asked: SimpleQueue[Reading | None] = SimpleQueue()
        self._stuck = 0
        self.waited = 0.0  # seconds that `take` waited
        for _ in range(count):
            self._start()

    def _start(self) -> None:
        threading.Thread(target=self._read, name="image", daemon=True).start()

    def ask(self, work: Callable[[], T]) -> Reading[T]:
        """Queue `work` for the next free thread."""
        reading = Reading(work)
        self._asked.put(reading)
        return reading

    def take(self, reading: Reading[T]) -> T:
        """Return what was read, or raise what the work raised.

        Raises:
            ImageError: the read took longer than `timeout` seconds after a thread began it.
            DataError: so many reads hang that the disk itself must be at fault.
        """
        started = time.monotonic()
        try:
            while not reading.answer.done():
                passed = 0.0 if reading.begun is None else time.monotonic() - reading.begun
                if passed >= self._timeout:
                    self._give_up(reading)
                    raise ImageError(f"reading the image took longer than {self._timeout:g} s")
                wait([reading.answer], self._timeout - passed)
            return reading.answer.result()
        finally:
            self.waited += time.monotonic() - started

    def close(self) -> None:
        """Tell the threads to end, without waiting for them."""
        while not self._asked.empty():
            self._asked.get()
        for _ in range(self._count):
            self._asked.put(None)

    def _give_up(self, reading: Reading) -> None:
        reading.given_up = True
        self._stuck += 1
        if self._stuck > MOST_STUCK:
            raise DataError(
                f"{self._stuck} images at the same time could not be read within {self._timeout:g} s",
                "a disk that answers",
                "check the disk of the images, or raise --image-timeout, and run the same command again",
            )
        self._start()

    def _read(self) -> None:
        while reading := self._asked.get():
            reading.begun = time.monotonic()
            try:
                reading.answer.set_result(reading.work())
            except BaseException as error:  # `take` raises it; otherwise it would wait for ever
                reading.answer.set_exception(error)
            if reading.given_up:
                self._stuck -= 1
                return  # another thread has replaced this one
