"""Read one catalogue image safely: whatever the file holds, the result is an RGB picture or a reason.

Image files are not trusted. Nothing outside the image root is opened, no URL is fetched, and only regular files are
read. Only the formats below are decoded; the file's bytes decide the format, never its name, so nothing reaches
Ghostscript or a TIFF reader. Before a single pixel is decoded, the headers are checked: size, scans, blocks. What is
left is bounded by its size; an image that may take more than about a second is decoded in a process that can be
killed. Large images wait until the memory that all readers share is free.
"""

from __future__ import annotations

import errno
import io
import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, JpegImagePlugin, UnidentifiedImageError, features

from vlm2rec.embedder.backbones import image_limits
from vlm2rec.embedder.backbones.image_limits import ImageError as ImageError
from vlm2rec.embedder.backbones.image_limits import Survey
from vlm2rec.embedder.backbones.image_process import Decoders, serve
from vlm2rec.embedder.contract.beneath import NotRegularError, OutsideError, open_beneath
from vlm2rec.embedder.contract.storage import Location, StorePath

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", *(("AVIF",) if features.check("avif") else ()))
MAX_PIXELS = 100_000_000
MAX_SIDE = 65_535
MAX_BYTES = 256 * 2**20
MAX_ASPECT = 150  # Qwen's processors refuse more than 200
HEAVY = 25_000_000  # pixels: a picture of more is decoded in a process of its own; scans and slow decoders count too
_BAND = 2**20  # pixels that are converted at once, if the picture is shrunk afterwards

_ORIENTATION = 0x0112
_TURNS = {  # EXIF orientation → the operation that makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_IGNORED = (
    # our own limit on pixels is checked right after the header is read
    ("ignore", None, Image.DecompressionBombWarning, re.compile(r"PIL\.Image$"), 0),
    # damaged EXIF, multi-picture or animation data in a file whose picture can be read
    ("ignore", None, UserWarning, re.compile(r"PIL\.(Jpeg|Png|Tiff)ImagePlugin$"), 0),
)


def open_image(root: Location, relative: str, target_pixels: int | None = None) -> Image.Image:
    """Return the image at `root / relative`, upright, RGB, on white.

    Animated files give their first frame, 16-bit grey is scaled to 8 bits, and transparency becomes white. A picture
    more than 150 times as long as wide gets a white margin until it is not. Safe to call from threads.

    Args:
        root: Image root, on a disk or in an object store; links inside it must not lead out of it.
        relative: Path below the root.
        target_pixels: Area the caller will shrink the picture to. A much larger picture is decoded at a lower
            resolution, but never to less than twice the target's sides.

    Raises:
        ImageError: the image cannot be used. Nothing else is raised for a bad file.
    """
    return decode(io.BytesIO(read_file(root, relative)), target_pixels)


def read_file(root: Location, relative: str) -> bytes:
    """Return the bytes of a file below the root, or raise `ImageError`."""
    with opened(root, relative) as file:
        content = file.read(MAX_BYTES + 1)
    if not content:
        raise ImageError("the image file is empty")
    if len(content) > MAX_BYTES:  # in a store, the size was not checked before; on a disk, the file has grown since
        raise ImageError(f"the image file has more than {MAX_BYTES} bytes; larger files are not read")
    return content


@contextmanager
def opened(root: Location, relative: str) -> Iterator[BinaryIO]:
    """Open a regular file below the root. What fails, also while it is read, is an `ImageError`."""
    path_below_root(relative)
    try:
        if isinstance(root, StorePath):  # a store has no links, so checking the spelling is enough
            yield io.BytesIO((root / relative).read_bytes(MAX_BYTES + 1))
            return
        with open_beneath(root, relative) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise ImageError(f"the image file has {size} bytes; at most {MAX_BYTES} are read")
            yield file
    except OutsideError:
        raise ImageError("the image path leads out of the image root") from None
    except NotRegularError:
        raise ImageError("the image path is not a regular file") from None
    except FileNotFoundError:
        raise ImageError("the image file does not exist") from None
    except PermissionError:
        raise ImageError("the image may not be read (permission denied)") from None
    except (NotADirectoryError, ValueError) as error:  # the name cannot be encoded
        raise ImageError(f"the image path cannot be followed ({type(error).__name__})") from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise ImageError(f"the image path cannot be followed ({error.strerror})") from None
        raise ImageError(f"the image cannot be read ({error.strerror or error})") from None


def decode(file: BinaryIO, target_pixels: int | None = None) -> Image.Image:
    """Return the picture in a file's bytes; see `open_image`."""
    image_limits.current().decoding = True
    return _decode(file, target_pixels, apart=True)


def decode_here(file: BinaryIO, target_pixels: int | None = None) -> Image.Image:
    """Like `decode`, but in this process, however long it takes."""
    return _decode(file, target_pixels, apart=False)


def _decode(file: BinaryIO, target_pixels: int | None, apart: bool) -> Image.Image:
    _ignore_pillow_warnings()
    content = file.read()
    try:
        counted = image_limits.survey(content)
        image = _opened_image(content)
        stored = image.size
        _draft(image, target_pixels)
        factor = _factor(image.size, target_pixels)
        with image_limits.memory.held(image_limits.memory_needed(image, stored, counted.scans, factor < 2)):
            heavy = apart and _weight(stored, counted) > HEAVY
            found = _decoders.decode(content, target_pixels) if heavy else None
            return _picture(image, target_pixels) if found is None else found
    except ImageError:
        raise
    except Exception as error:  # decoders raise almost any exception on a hostile file
        raise ImageError(f"the image cannot be decoded ({type(error).__name__}: {error})") from None


def _weight(size: tuple[int, int], counted: Survey) -> float:
    """Return the pixels that a plain PNG would have that takes as long."""
    return size[0] * size[1] * (1 + (counted.scans - 1) / 5) * counted.weight


def size_of(root: Location, relative: str) -> tuple[int, int]:
    """Return width and height from the header of a file, without decoding it; raises `ImageError` like `open_image`."""
    content = read_file(root, relative)
    _ignore_pillow_warnings()
    try:
        image_limits.survey(content)
        return Image.open(io.BytesIO(content), formats=FORMATS).size
    except ImageError:
        raise
    except Exception as error:  # as in `decode`
        raise ImageError(f"the image cannot be decoded ({type(error).__name__}: {error})") from None


def path_below_root(relative: str | None) -> str:
    """Return `relative` if its spelling stays below the root, else raise `ImageError`."""
    if not relative or not relative.strip():
        raise ImageError("the item has no image path")
    if "\0" in relative:
        raise ImageError("the image path holds a NUL character")
    if "://" in relative:
        raise ImageError("the image path is a URL; only local files are read")
    if relative.startswith(("/", "~")) or Path(relative).is_absolute() or ".." in Path(relative).parts:
        raise ImageError("the image path leads out of the image root")
    return relative


def _ignore_pillow_warnings() -> None:
    # plain filters: `warnings.catch_warnings` swaps global state and must not be used in reader threads
    for rule in _IGNORED:
        if rule not in warnings.filters:
            _, _, category, module, _ = rule
            warnings.filterwarnings("ignore", category=category, module=module.pattern)


def _opened_image(content: bytes) -> Image.Image:
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageError(f"the image is not a {', '.join(FORMATS)} (it starts with {content[:12]!r})") from None
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ImageError(
            f"the image has {width} × {height} pixels; at most {MAX_PIXELS} and {MAX_SIDE} on a side are decoded"
        )
    return image


def _draft(image: Image.Image, target_pixels: int | None) -> None:
    """Let a much larger JPEG be decoded at a lower resolution."""
    width, height = image.size
    # how many times longer than twice the target the sides are
    excess = math.sqrt(width * height / (4 * target_pixels)) if target_pixels else 1.0
    if excess >= 2 and isinstance(image, JpegImagePlugin.JpegImageFile):
        image.draft(None, (math.ceil(width / excess), math.ceil(height / excess)))


def _picture(image: Image.Image, target_pixels: int | None) -> Image.Image:
    image.load()
    turn = _TURNS.get(_orientation(image))
    rgb = _shrink(image, target_pixels)
    return _widen(rgb.transpose(turn) if turn is not None else rgb, target_pixels)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged EXIF block must not lose the picture
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow's own conversion clips 16-bit grey at 255: nearly everything turns white
        values = np.asarray(image)  # uint16, or int32 from an older Pillow
        grey = (np.clip(values, 0, 65_535) >> 8).astype(np.uint8)
        clear = image.info.get("transparency")
        if isinstance(clear, int):
            grey[values == clear] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _factor(size: tuple[int, int], target_pixels: int | None) -> int:
    """Return by how much sides may shrink while they stay at least twice the target's, as `draft` does for JPEG."""
    return int(math.sqrt(size[0] * size[1] / (4 * target_pixels))) if target_pixels else 1


def _shrink(image: Image.Image, target_pixels: int | None) -> Image.Image:
    """Convert to RGB, and average blocks of pixels if there are many more than the target's.

    A batch of decoded images then fits in memory, whatever their size on disk. A large picture is converted in bands of
    whole blocks: the result is the same, and no second picture of its size is made.
    """
    factor = _factor(image.size, target_pixels)
    if factor < 2:
        return _to_rgb(image)
    width, height = image.size
    rows = factor * max(1, _BAND // (width * factor))
    if rows >= height:
        return _to_rgb(image).reduce(factor)
    small = Image.new("RGB", (math.ceil(width / factor), math.ceil(height / factor)))
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(height, top + rows)))
        small.paste(_to_rgb(band).reduce(factor), (0, top // factor))
    return small


def _widen(image: Image.Image, target_pixels: int | None) -> Image.Image:
    """Centre a strip on white until its sides differ by no more than `MAX_ASPECT`."""
    shortest = math.ceil(max(image.size) / MAX_ASPECT)
    width, height = max(image.width, shortest), max(image.height, shortest)
    if (width, height) == image.size:
        return image
    factor = _factor((width, height), target_pixels)
    if factor >= 2:  # the canvas would be much larger than the target, which the strip itself is not
        return _widen(image.reduce((min(factor, image.width), min(factor, image.height))), None)
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas


_decoders = Decoders(__name__)
if __name__ == "__main__":
    serve(decode_here)
