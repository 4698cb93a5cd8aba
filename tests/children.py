"""Processes of their own: Python code that a test runs, waits for, and kills."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).parent


def python_path() -> str:
    """Return PYTHONPATH with this folder in front."""
    return os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])


def child(code: str | Path, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Run Python code, or a file of it, in a process, with the modules of this folder at hand."""
    program = [str(code)] if isinstance(code, Path) else ["-c", code]
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": python_path(), **environment},
    )


def waited(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} seconds"
        time.sleep(0.01)
