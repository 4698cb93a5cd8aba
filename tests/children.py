"""Processes of their own: Python code that a test runs, waits for, and kills."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TextIO

TESTS = Path(__file__).parent
CHILDREN = multiprocessing.get_context("forkserver")
"""Makes processes out of one that has imported the libraries, and done nothing with them: an import takes seconds."""
CHILDREN.set_forkserver_preload(
    [
        *("vlm2rec.pipelines.cli", "vlm2rec.pipelines.finetune", "vlm2rec.pipelines.export_items"),
        *("vlm2rec.pipelines.evaluate", "vlm2rec.pipelines.train_recommender", "vlm2rec.pipelines.build_index"),
        *("vlm2rec.pipelines.recommend", "vlm2rec.pipelines.prepare", "vlm2rec.pipelines.verify"),
        *("faiss", "s3fs", "pytest"),
    ]
)
COMMAND = "from vlm2rec.pipelines.cli import main; main()"


def python_path() -> str:
    """Return PYTHONPATH with this folder in front."""
    return os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])


def child(code: str | Path, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Run Python code, or a file of it, in a new interpreter, with the modules of this folder at hand."""
    program = [str(code)] if isinstance(code, Path) else ["-c", code]
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": python_path(), **environment},
    )


def forked(function: Callable[..., None], *arguments: object) -> BaseProcess:
    """Return a process out of `CHILDREN` that calls a function, with the environment of today; it is not started."""
    return CHILDREN.Process(target=_called, args=(dict(os.environ), function, *arguments))


def _called(environment: dict[str, str], function: Callable[..., None], *arguments: object) -> None:
    os.environ.clear()
    os.environ.update(environment)
    function(*arguments)


class Forked:
    """Python code in a process of its own, out of `CHILDREN`: what `child` does, within milliseconds.

    For code that does not mind which modules are there already, nor how much memory they have.
    """

    def __init__(self, code: str, *arguments: object, cwd: Path | None = None, **environment: str) -> None:
        self.stdout, stdout = _pipe()
        self._stderr, stderr = _pipe()
        self._said: tuple[str, str] | None = None
        self._process = CHILDREN.Process(
            target=_run,
            args=(code, [*map(str, arguments)], str(cwd or Path.cwd()), {**os.environ, **environment}, stdout, stderr),
        )
        self._process.start()
        atexit.register(self._process.kill)  # else a failed test would be waited for
        stdout.close()
        stderr.close()
        self._errors: list[str] = []
        self._reader = threading.Thread(target=lambda: self._errors.append(self._stderr.read()), daemon=True)
        self._reader.start()  # a full pipe would stop it

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code, -N after signal N, None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()

    def wait(self) -> int:
        """Wait for its end and return the exit code."""
        self.communicate()
        assert self.returncode is not None
        return self.returncode

    def communicate(self) -> tuple[str, str]:
        """Wait for its end and return what it wrote to stdout and stderr."""
        if self._said is None:
            with self.stdout, self._stderr:
                out = self.stdout.read()
                self._reader.join()
                self._process.join()
            self._said = out, "".join(self._errors)
        return self._said


def _pipe() -> tuple[TextIO, Connection]:
    """Return the two ends of a pipe; the one to write to can be given to a process."""
    reader, writer = CHILDREN.Pipe(duplex=False)
    with reader:
        return os.fdopen(os.dup(reader.fileno()), encoding="utf-8"), writer


def _run(
    code: str, arguments: list[str], folder: str, environment: dict[str, str], stdout: Connection, stderr: Connection
) -> None:
    for number, pipe in ((1, stdout), (2, stderr)):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    # those of the server know its files, not these
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "<forked>", "exec"), names)


def command(*words: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `vlm2rec WORDS` in a process of its own and return how it ended."""
    running = Forked(COMMAND, *words, cwd=cwd, **environment)
    out, errors = running.communicate()
    return subprocess.CompletedProcess(["vlm2rec", *map(str, words)], running.wait(), out, errors)


def waited(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} seconds"
        time.sleep(0.01)
