"""Decodes heavy images in processes of their own, which are killed when an image takes too long.

A thread cannot be stopped while a decoder works. A process can, and one that crashes takes nothing with it. What goes
through the pipes are the file's bytes and the picture's pixels, nothing that would have to be unpickled. A process is
started when the first heavy image comes, and used again; most datasets have none.
"""

from __future__ import annotations

import atexit
import io
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import IO, BinaryIO

from PIL import Image

from vlm2rec.embedder.backbones.image_limits import ImageError, Timing, current

_REQUEST, _ANSWER = struct.Struct("<QQ"), struct.Struct("<?IIQ")  # target, length; picture?, width, height, length


class _Decoder:
    """One process."""

    def __init__(self, module: str) -> None:
        path = os.pathsep.join(place for place in sys.path if place)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the export, which ends this process itself
        )

    def decode(self, content: bytes, target_pixels: int | None, timing: Timing) -> Image.Image:
        """Return the picture.

        Raises:
            ImageError: the image cannot be used, or took longer than it may: then the process was killed.
        """
        spent = 0.0 if timing.begun is None else time.monotonic() - timing.begun
        assert self._process.stdin is not None and self._process.stdout is not None
        late = threading.Event()

        def kill() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(max(0.01, timing.seconds - spent), kill)
        timer.daemon = True
        timer.start()
        try:
            self._process.stdin.write(_REQUEST.pack(target_pixels or 0, len(content)))
            self._process.stdin.write(content)
            self._process.stdin.flush()
            picture, width, height, length = _ANSWER.unpack(_exactly(self._process.stdout, _ANSWER.size))
            answer = _exactly(self._process.stdout, length)
        except (OSError, EOFError):
            self.end()
            if late.is_set():
                raise ImageError(f"reading the image took longer than {timing.seconds:g} s") from None
            raise ImageError(f"the image ended the process that decoded it (code {self._process.returncode})") from None
        except BaseException:  # it would answer the next request with this one's picture
            self.end()
            raise
        finally:
            timer.cancel()
        if late.is_set():  # just too late to be killed for this image
            self.end()
        if not picture:
            raise ImageError(answer.decode())
        return Image.frombytes("RGB", (width, height), answer)

    def running(self) -> bool:
        """Tell whether it can take another image."""
        return self._process.poll() is None

    def end(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):  # what was not written yet
                pipe.close()


class Decoders:
    """Processes that decode images; those without work wait for more.

    Args:
        module: the name of the module that calls `serve` when Python runs it.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._idle: list[_Decoder] = []
        self._lock = threading.Lock()
        atexit.register(self._end)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def decode(self, content: bytes, target_pixels: int | None) -> Image.Image | None:
        """Return the picture in a file's bytes; None if no process can be started.

        Raises:
            ImageError: the image cannot be used, or takes longer than `image_limits.current()` allows.
        """
        with self._lock:
            decoder = self._idle.pop() if self._idle else None
        try:
            decoder = decoder or _Decoder(self._module)
        except OSError:
            return None
        try:
            return decoder.decode(content, target_pixels, current())
        finally:
            if decoder.running():
                with self._lock:
                    self._idle.append(decoder)

    def _forget(self) -> None:
        """Leave the processes to the process that started them: this is a fork of it."""
        self._idle, self._lock = [], threading.Lock()

    def _end(self) -> None:
        while self._idle:
            self._idle.pop().end()


def serve(decode: Callable[[BinaryIO, int | None], Image.Image]) -> None:
    """Decode, in a process of `Decoders`, what comes in, until nothing more comes."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    while len(head := requests.read(_REQUEST.size)) == _REQUEST.size:
        target, length = _REQUEST.unpack(head)
        try:
            picture = decode(io.BytesIO(_exactly(requests, length)), target or None)
        except ImageError as error:
            reason = str(error).encode("utf-8", "backslashreplace")
            answers.write(_ANSWER.pack(False, 0, 0, len(reason)) + reason)
        else:
            pixels = picture.tobytes()
            answers.write(_ANSWER.pack(True, *picture.size, len(pixels)))
            answers.write(pixels)
        answers.flush()


def _exactly(file: IO[bytes], count: int) -> bytes:
    found = file.read(count)
    if len(found) < count:
        raise EOFError
    return found
