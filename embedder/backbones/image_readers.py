"""Threads that read images ahead of the model. An image that takes too long is given up, and it alone fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Generic, TypeVar

from vlm2rec.embedder.backbones.image_limits import ImageError, Timing, work_on
from vlm2rec.embedder.contract.errors import DataError

T = TypeVar("T")
MOST_STUCK = 64  # reads that hang at the same time: more than that is a fault of the disk, not of images
LAST_IMAGES = 2.0  # seconds for the images in hand when nobody wants more; a thread that a disk blocks takes longer


@dataclass(eq=False)
class Reading(Generic[T]):
    """One requested read."""

    work: Callable[[], T]
    timing: Timing
    answer: Future[T] = field(default_factory=Future)
    replaced: bool = False  # another thread reads on in place of the one that this read blocks


class Readers:
    """A few threads that read in the order of the requests; take the results in that order too.

    A thread cannot be stopped while the system blocks it, for example on a network disk that is gone. Its read is
    given up after `timeout` seconds, and another thread replaces it. The end of the process does not wait for a
    blocked thread; therefore these are daemon threads and not a `ThreadPoolExecutor`. An image whose decoding takes
    too long is given up too. Decoding ends by itself or is killed (see `images.decode`), so its thread stays, and it
    does not count as a fault of the disk.
    """

    def __init__(self, count: int, timeout: float) -> None:
        self._count, self._timeout = count, timeout
        self._asked: SimpleQueue[Reading | None] = SimpleQueue()
        self._stuck = 0
        self._threads: list[threading.Thread] = []
        self.waited = 0.0  # seconds that `take` waited
        for _ in range(count):
            self._start()

    def _start(self) -> None:
        self._threads.append(threading.Thread(target=self._read, name="image", daemon=True))
        self._threads[-1].start()

    def ask(self, work: Callable[[], T]) -> Reading[T]:
        """Queue `work` for the next free thread."""
        reading = Reading(work, Timing(self._timeout))
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
                begun = reading.timing.begun
                passed = 0.0 if begun is None else time.monotonic() - begun
                if passed >= self._timeout:
                    self._give_up(reading)
                    raise ImageError(f"reading the image took longer than {self._timeout:g} s")
                wait([reading.answer], self._timeout - passed)
            return reading.answer.result()
        finally:
            self.waited += time.monotonic() - started

    def close(self) -> None:
        """Tell the threads to end, and wait `LAST_IMAGES` seconds at most for those that work on an image.

        A process aborts if it ends while one of its daemon threads is inside torch, where images become patches
        (https://github.com/pytorch/pytorch/issues/38228).
        """
        while not self._asked.empty():
            self._asked.get()
        for _ in range(self._count):
            self._asked.put(None)
        latest = time.monotonic() + LAST_IMAGES
        for thread in self._threads:
            thread.join(max(0.0, latest - time.monotonic()))

    def _give_up(self, reading: Reading) -> None:
        if reading.timing.decoding:
            return
        reading.replaced = True
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
            work_on(reading.timing)
            reading.timing.begun = time.monotonic()
            try:
                reading.answer.set_result(reading.work())
            except BaseException as error:  # `take` raises it; otherwise it would wait for ever
                reading.answer.set_exception(error)
            if reading.replaced:
                self._stuck -= 1
                return  # another thread has replaced this one
