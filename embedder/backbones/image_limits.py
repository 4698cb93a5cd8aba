"""What decoding an image may cost: counts from its headers, before a decoder sees it, and memory for all readers.

A file of one megabyte can keep a decoder busy for minutes: thousands of scans, or a million blocks before the picture.
"""

from __future__ import annotations

import re
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, JpegImagePlugin

MAX_SCANS = 100  # of a JPEG; cameras and shops write at most a dozen
MAX_BLOCKS = 100_000  # segments, chunks or extensions of a file; a decoder reads them one by one
MEMORY = 2**30  # bytes that all readers of a process may use together for large images
_SMALL = 2**24  # bytes; images that need less are not counted, so that they never wait for large ones

_RLE = (1, 2)  # BMP's run lengths, which Pillow decodes in Python
_SIZES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))  # SOF markers
_ALONE = (0x01, *range(0xD0, 0xD9))  # JPEG markers without a length
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_FILLING = re.compile(rb"\xff*")


class ImageError(Exception):
    """One image cannot be used; the message is the reason in the item's row."""


@dataclass(frozen=True)
class Survey:
    """What the headers of a file say."""

    scans: int = 1  # passes over the picture that a decoder makes
    weight: float = 1.0  # how much slower than an ordinary decoder each pass is


def survey(content: bytes) -> Survey:
    """Count what a decoder would go through; what is not an image is left for the decoder to refuse.

    Raises:
        ImageError: more scans or blocks than are read.
    """
    if content.startswith(b"\xff\xd8"):
        return _jpeg(content)
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        _count_png(content)
    elif content.startswith((b"GIF87a", b"GIF89a")):
        _count_gif(content)
    elif content.startswith(b"BM") and len(content) >= 34 and struct.unpack_from("<I", content, 30)[0] in _RLE:
        return Survey(weight=10.0)
    elif content[4:8] == b"ftyp":
        return Survey(weight=5.0)  # AVIF
    return Survey()


def _jpeg(content: bytes) -> Survey:
    """Walk the segments up to the first scan; count the scans of a picture that has several."""
    at, blocks, progressive, weight, components = 2, 0, False, 1.0, 0
    while (found := content.find(b"\xff", at)) >= 0:
        start = _FILLING.match(content, found).end()  # type: ignore[union-attr]  # it matches always
        blocks += 1 + start - 1 - at  # a decoder steps over garbage and filling bytes one by one
        _require_few(blocks)
        if start + 3 > len(content):
            break
        marker, size = content[start], int.from_bytes(content[start + 1 : start + 3], "big")
        if marker in (0x00, *_ALONE):
            at = start + 1
            continue
        if marker == 0xD9:
            break
        if marker in _SIZES and start + 8 < len(content):
            progressive, components = marker & 3 == 2, content[start + 8]
            weight = 5.0 if marker >= 0xC9 else 1.0  # arithmetic coding
        if marker == 0xDA:
            several = progressive or content[start + 3 : start + 4] != bytes([components])
            return Survey(_count_scans(content, start + 1 + size) if several else 1, weight)
        at = start + 1 + max(size, 2)
    return Survey(weight=weight)


def _count_scans(content: bytes, at: int) -> int:
    """Return the number of scans, of which the first one's data begin here."""
    if (most := 1 + content.count(b"\xff\xda", at)) <= MAX_SCANS:  # some may be data of other segments
        return most
    scans, blocks = 1, 0
    while found := _NEXT_MARKER.search(content, at):
        marker, at = content[found.end() - 1], found.end()
        if marker == 0xD9:
            break
        if marker not in _ALONE:
            at += max(int.from_bytes(content[at : at + 2], "big"), 2)
        scans, blocks = scans + (marker == 0xDA), blocks + 1
        if scans > MAX_SCANS:
            raise ImageError(f"the image has more than {MAX_SCANS} scans; real images have about a dozen")
        _require_few(blocks)
    return scans


def _count_png(content: bytes) -> None:
    at, blocks = 8, 0
    while at + 8 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, at)
        if kind == b"IEND":
            return
        at, blocks = at + 12 + size, blocks + 1
        _require_few(blocks)


def _count_gif(content: bytes) -> None:
    """Count the blocks before the first frame, the only one that is decoded."""
    if len(content) < 13:
        return
    flags, blocks = content[10], 0
    at = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    while at < len(content) and content[at] not in b",;":
        extension, at, blocks = content[at] == 0x21, at + 1, blocks + 1
        if extension:  # a label, and pieces that each begin with their length
            at += 1
            while at < len(content) and content[at]:
                at, blocks = at + 1 + content[at], blocks + 1
                _require_few(blocks)
            at += 1
        _require_few(blocks)


def _require_few(blocks: int) -> None:
    if blocks > MAX_BLOCKS:
        raise ImageError(f"the image has more than {MAX_BLOCKS} blocks; larger numbers are not read")


def memory_needed(image: Image.Image, stored: tuple[int, int], scans: int, whole: bool) -> int:
    """Return about how many bytes decoding takes at its peak, from the header of an opened image.

    Args:
        image: as Pillow opened it, at the size it will be decoded at.
        stored: the size in the file.
        scans: `Survey.scans`.
        whole: whether the picture is converted as a whole, and not in bands.
    """
    pixels = image.width * image.height
    depth = 1 if image.mode in ("1", "L", "P") else 2 if image.mode.startswith("I;16") else 4
    needed = pixels * depth
    if image.format in ("WEBP", "AVIF"):
        needed += 12 * pixels  # their decoders keep two canvases, and hand out a copy
    if isinstance(image, JpegImagePlugin.JpegImageFile) and scans > 1:
        needed += 2 * image.layers * stored[0] * stored[1]  # all coefficients stay until the last scan
    return needed + (12 * pixels if whole else _SMALL // 2)


class Memory:
    """Bytes that several threads share. Who needs more than there is waits until nobody else has any."""

    def __init__(self, size: int) -> None:
        self._size, self._free = size, size
        self._changed = threading.Condition()

    @contextmanager
    def held(self, needed: int) -> Iterator[None]:
        """Wait until this much is free, and keep it for the block. The time of waiting is not the image's."""
        if needed < _SMALL:
            yield
            return
        taken = min(needed, self._size)
        timing = current()
        begun, timing.begun = timing.begun, None
        with self._changed:
            self._changed.wait_for(lambda: self._free >= taken)
            self._free -= taken
        timing.begun = None if begun is None else time.monotonic()
        try:
            yield
        finally:
            with self._changed:
                self._free += taken
                self._changed.notify_all()


memory = Memory(MEMORY)


@dataclass(eq=False)
class Timing:
    """How long one image has been worked on, and how long that may take."""

    seconds: float = 60.0
    begun: float | None = None  # seconds of the monotonic clock; None while it waits for a thread or for memory
    decoding: bool = False  # its file has been read: what takes long now is the image and not the disk


_thread = threading.local()


def current() -> Timing:
    """Return the timing of the image that this thread works on."""
    if not hasattr(_thread, "timing"):
        _thread.timing = Timing()
    found: Timing = _thread.timing
    return found


def work_on(timing: Timing) -> None:
    """Make this the timing of the image that this thread works on."""
    _thread.timing = timing
