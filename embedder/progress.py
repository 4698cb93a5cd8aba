"""How long-running work reports its progress: a protocol that the command line implements; the default is silent.

Code in this package prints nothing. A function with something to report takes a `Reporter`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """Moves a progress bar forward; it may also change the bar's total and text."""

    def __call__(self, count: int, *, total: int | None = None, description: str | None = None) -> None:
        """Advance by `count` steps."""


class Reporter(Protocol):
    """Receives the messages and the progress of long-running work."""

    @property
    def draws_bars(self) -> bool:
        """Whether progress bars are visible; if not, the work reports its progress in lines."""

    def say(self, text: str, *, warning: bool = False) -> None:
        """Print one line of plain text."""

    def progress(self, description: str, total: int | None) -> AbstractContextManager[Advance]:
        """Show a bar with rate and time left; yields a function that advances it."""


class Silent:
    """A reporter that shows nothing."""

    draws_bars = True

    def say(self, text: str, *, warning: bool = False) -> None:
        """Do nothing."""

    @contextmanager
    def progress(self, description: str, total: int | None) -> Iterator[Advance]:
        """Yield a function that does nothing."""

        def advance(count: int, *, total: int | None = None, description: str | None = None) -> None: ...

        yield advance


SILENT = Silent()
