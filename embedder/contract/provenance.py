"""What a folder records about how it was made: when, and with which library versions."""

from __future__ import annotations

import datetime
import platform
from importlib import metadata

OURS = "vlm2rec"


def created() -> str:
    """Return the current time, UTC, to the second: `2026-03-17T09:30:00+00:00`."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def version_of(library: str) -> str | None:
    """Return the version of an installed library, or of `python`; None if it is not installed."""
    if library == "python":
        return platform.python_version()
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def library_versions(*libraries: str, absent: str | None = None) -> dict[str, str]:
    """Return the version of each library; one that is not installed gets `absent`, or no entry if that is None."""
    found = {library: version_of(library) or absent for library in libraries}
    return {library: version for library, version in found.items() if version is not None}
