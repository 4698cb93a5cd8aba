"""The exception tree and the exit code of each branch.

A bad setting or a broken folder is an exception; a bad item is a row with a reason.
Every message is one paragraph in three parts: what was found, what was expected, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

from vlm2rec.embedder.contract.printable import without_keys


class Vlm2RecError(Exception):
    """Base of every error that a user can fix.

    `found`, `expected` and `fix` are joined into one paragraph. Keys inside addresses are not shown.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, found: str, expected: str = "", fix: str = "") -> None:
        self.found, self.expected, self.fix = found, expected, fix
        parts = [found]
        if expected:
            parts.append(f"Expected: {expected}")
        if fix:
            parts.append(f"To fix it: {fix}")
        message = " ".join(part if part.endswith((".", "?", "!")) else part + "." for part in parts)
        super().__init__(without_keys(message))


class ConfigError(Vlm2RecError):
    """A setting is unknown, missing or out of range."""

    exit_code = 2


class DataError(Vlm2RecError):
    """An input file is missing or empty, lacks a column, or holds impossible values."""

    exit_code = 3


class ModelError(Vlm2RecError):
    """A backbone or an adapter cannot be loaded, or does not do what its folder says."""

    exit_code = 4


class ArtifactError(Vlm2RecError):
    """A folder written by vlm2rec is unfinished, damaged or does not fit the other inputs."""

    exit_code = 5


class FailureLimitError(Vlm2RecError):
    """The work ended, but more items failed than `max_failures` allows."""

    exit_code = 6


class MissingDependencyError(Vlm2RecError):
    """An optional library that this command needs is not installed."""

    exit_code = 7


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the known name nearest to `name`, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


_FEW = 8  # names that a reader takes in at once


def one_of(name: str, known: Iterable[str], lists_all: str) -> str:
    """Return which names are known, for the part of an error that says what was expected.

    Few names are all given. Of many it is the three most similar to `name`, and `lists_all`, where all of them stand.
    """
    names = list(known)
    if len(names) <= _FEW:
        return f"one of {', '.join(names)}"
    near = difflib.get_close_matches(name, names, n=3, cutoff=0)
    return f"a known name; most similar are {', '.join(near)}, and {lists_all} lists all {len(names)}"
