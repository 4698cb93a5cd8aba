"""Processes of this machine that work for one: they end when it ends, and share its cores."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Iterator


def end_with_parent() -> None:
    """Let no worker write to a folder that nobody leads any more; to be called in the worker."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Set a variable for the processes that are started meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def shared_cores(count: int) -> contextlib.AbstractContextManager[None]:
    """Give the workers their share of the cores: threads that outnumber them wait for one another."""
    name = "OMP_NUM_THREADS"
    return environment(name, os.environ.get(name) or str(max(1, (os.cpu_count() or 1) // count)))
