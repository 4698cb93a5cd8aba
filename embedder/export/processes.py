"""Worker processes on this machine: they end with their parent, share its cores, and keep freed memory."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator


def end_with_parent() -> None:
    """End this worker when its parent ends, so that it does not write alone; call it in the worker."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for the processes that are started inside the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def shared_cores(count: int) -> contextlib.AbstractContextManager[None]:
    """Divide the cores among the workers: more threads than cores wait for one another."""
    name = "OMP_NUM_THREADS"
    return environment(name, os.environ.get(name) or str(max(1, (os.cpu_count() or 1) // count)))


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's names for mallopt


def keep_freed_memory() -> None:
    """Let this process keep the memory of freed tensors for the next ones, if the C library is glibc.

    Otherwise glibc returns the memory of large tensors to the system at once. The system then clears it page by page
    for the next tensor, thousands of times in an export or a training.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have no such function
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 2**30)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
