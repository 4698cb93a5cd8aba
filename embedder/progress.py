"""How long work tells what it does: a protocol that the command line fulfils, and silence for everybody else.

Code in this package prints nothing. What has something to say takes a `Reporter`; the default says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """Moves a progress bar on; the total and the text may be set along the way."""

    def __call__(self, count: int, *, total: int | None = None, description: str | None = None) -> None:
        """Advance by `count` steps."""


class Reporter(Protocol):
    """Where long work says what it does."""

    @property
    def draws_bars(self) -> bool:
        """Whether somebody watches a bar; where not, lines say how far the work is."""

    def say(self, text: str, *, warning: bool = False) -> None:
        """Print one line of plain text."""

    def progress(self, description: str, total: int | None) -> AbstractContextManager[Advance]:
        """Show a bar with rate and time left; yields a function that advances it."""


class Silent:
    """A reporter that says nothing."""

    draws_bars = True

    def say(self, text: str, *, warning: bool = False) -> None:
        """Say nothing."""

    @contextmanager
    def progress(self, description: str, total: int | None) -> Iterator[Advance]:
        """Yield a function that does nothing."""

        def advance(count: int, *, total: int | None = None, description: str | None = None) -> None: ...

        yield advance


SILENT = Silent()
