"""Threads that read images ahead of the model. A read that gets no answer is given up, and costs its image alone."""

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
MOST_STUCK = 64  # reads without an answer at once: then it is the disk, and not an image


@dataclass(eq=False)
class Reading(Generic[T]):
    """One read that was asked for."""

    work: Callable[[], T]
    answer: Future[T] = field(default_factory=Future)
    begun: float | None = None  # seconds of the monotonic clock; None while it waits for a thread
    given_up: bool = False


class Readers:
    """A few threads that read in the order of asking; what they read is to be taken in that order too.

    A thread cannot be stopped while the system lets it wait (a network disk that is gone, for one): its read is given
    up after `timeout` seconds, another thread takes its place, and nothing ever waits for it, not even the end of the
    process. That is why they are daemon threads and no `ThreadPoolExecutor`.
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
        """Have a thread do `work` when it comes to it."""
        reading = Reading(work)
        self._asked.put(reading)
        return reading

    def take(self, reading: Reading[T]) -> T:
        """Return what was read, or raise what the work raised.

        Raises:
            ImageError: it took longer than `timeout`, counted from when a thread began with it.
            DataError: so many reads are without an answer that the disk itself must be gone.
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
        """Let the threads go, without waiting for any."""
        while not self._asked.empty():
            self._asked.get()
        for _ in range(self._count):
            self._asked.put(None)

    def _give_up(self, reading: Reading) -> None:
        reading.given_up = True
        self._stuck += 1
        if self._stuck > MOST_STUCK:
            raise DataError(
                f"{self._stuck} images at once give no answer within {self._timeout:g} s",
                "a disk that answers",
                "see whether the disk of the images is there, or raise --image-timeout, and run the same command again",
            )
        self._start()

    def _read(self) -> None:
        while reading := self._asked.get():
            reading.begun = time.monotonic()
            try:
                reading.answer.set_result(reading.work())
            except BaseException as error:  # whoever takes it has to hear of it, or would wait for ever
                reading.answer.set_exception(error)
            if reading.given_up:
                self._stuck -= 1
                return  # another thread has its place
