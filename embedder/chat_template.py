"""Applies the chat template of a model: the same text as transformers makes, from a process that cannot run away."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm2rec.embedder import chat_template_process
from vlm2rec.embedder.contract.errors import ModelError

SECONDS = 10.0  # of computing, for one template or one prompt
_LONGEST = 2**20  # characters of a template; published ones have some thousands


def apply(template: str, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, Any]) -> str:
    """Return a conversation as one prompt, with the assistant's turn opened.

    Args:
        template: jinja source.
        messages: plain JSON, with `role` and `content`.
        tokens: the tokenizer's special tokens by name, for the template.

    Raises:
        ModelError: the template fails, or takes far more time or memory than a prompt needs.
    """
    return _process(template, json.dumps(tokens, default=str), os.getpid()).ask({"messages": list(messages)})


@functools.lru_cache(maxsize=4)
def _process(template: str, tokens: str, parent: int) -> _Process:
    """Return the process of a template; after a fork, the child has one of its own."""
    if len(template) > _LONGEST:
        raise _refused(f"it has {len(template)} characters")
    process = _Process()
    process.ask({"template": template, "tokens": json.loads(tokens)})
    return process


class _Process:
    """A running `chat_template_process`, ended with this object or with this program."""

    def __init__(self) -> None:
        folders = {str(Path(str(_origin(name))).parent.parent) for name in ("jinja2", "markupsafe")}
        self._child = subprocess.Popen(
            [sys.executable, "-I", str(chat_template_process.__file__), str(SECONDS), *sorted(folders)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._lock = threading.Lock()
        self._end = weakref.finalize(self, _end, self._child, os.getpid())

    def ask(self, question: Mapping[str, Any]) -> str:
        """Return the answer's text; raise `ModelError` if there is none."""
        assert self._child.stdin is not None and self._child.stdout is not None
        with self._lock:
            answer = b""
            with contextlib.suppress(BrokenPipeError):
                self._child.stdin.write(json.dumps(question).encode() + b"\n")
                self._child.stdin.flush()
                answer = self._child.stdout.readline()
        if not answer.endswith(b"\n"):
            self._end()
            _process.cache_clear()
            raise _refused(f"it takes more than {SECONDS:g} seconds, or too much memory")
        found: dict[str, str] = json.loads(answer)
        if "error" in found:
            raise _refused(found["error"])
        return found["text"]


def _origin(name: str) -> str | None:
    found = importlib.util.find_spec(name)
    return None if found is None else found.origin


def _end(child: subprocess.Popen[bytes], parent: int) -> None:
    if os.getpid() != parent:
        return  # a fork: the process belongs to the parent
    for pipe in (child.stdin, child.stdout):
        with contextlib.suppress(OSError):
            assert pipe is not None
            pipe.close()
    child.kill()
    child.wait()


def _refused(why: str) -> ModelError:
    return ModelError(
        f"the chat template of this backbone cannot be used ({why})",
        "a template that turns a message into a prompt",
        "use --prompt-mode raw, or a backbone whose chat template works",
    )
