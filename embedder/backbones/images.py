"""Read one catalogue image safely: whatever the file holds, the result is an RGB picture or a reason.

Image files are not trusted. Nothing outside the image root is opened, no URL is fetched, and only regular files are
read. Only the formats below are decoded; the file's bytes decide the format, never its name, so nothing reaches
Ghostscript or a TIFF reader. The size in the header is checked before a single pixel is decoded.
"""

from __future__ import annotations

import io
import math
import os
import re
import stat
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, JpegImagePlugin, UnidentifiedImageError, features

from vlm2rec.embedder.contract.storage import Location, StorePath, readable

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", *(("AVIF",) if features.check("avif") else ()))
MAX_PIXELS = 100_000_000
MAX_SIDE = 65_535
MAX_BYTES = 256 * 2**20
MAX_ASPECT = 150  # Qwen's processors refuse more than 200

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


class ImageError(Exception):
    """One image cannot be used; the message is the reason in the item's row."""


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
    path = _named(root, relative) if isinstance(root, StorePath) else locate(root, relative)
    try:
        content = _first_bytes(path, MAX_BYTES + 1)
    except FileNotFoundError:
        raise ImageError("the image file does not exist") from None
    except PermissionError:
        raise ImageError("the image may not be read (permission denied)") from None
    except OSError as error:
        raise ImageError(f"the image cannot be read ({error.strerror or error})") from None
    if not content:
        raise ImageError("the image file is empty")
    if len(content) > MAX_BYTES:  # in a store, the size was not checked before; on a disk, the file has grown since
        raise ImageError(f"the image file has more than {MAX_BYTES} bytes; larger files are not read")
    return content


def decode(file: BinaryIO, target_pixels: int | None = None) -> Image.Image:
    """Return the picture in a file's bytes; see `open_image`."""
    _ignore_pillow_warnings()
    try:
        return _decode(file, target_pixels)
    except ImageError:
        raise
    except Exception as error:  # decoders raise almost any exception on a hostile file
        raise ImageError(f"the image cannot be decoded ({type(error).__name__}: {error})") from None


def size_of(root: Location, relative: str) -> tuple[int, int]:
    """Return width and height from the header of a file, without decoding it; raises `ImageError` like `open_image`."""
    path = locate(root, relative)
    _ignore_pillow_warnings()
    try:
        with readable(path) as source, Image.open(source, formats=FORMATS) as image:
            return image.size
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


def _named(root: StorePath, relative: str) -> StorePath:
    """Return the object of this name below the root; a store has no links, so checking the spelling is enough."""
    return root / path_below_root(relative)


def _first_bytes(path: Location, most: int) -> bytes:
    if isinstance(path, StorePath):
        return path.read_bytes(most)
    with path.open("rb") as file:
        return file.read(most)


def locate(root: Location, relative: str) -> Location:
    """Return the real path of a regular file below the root."""
    try:
        if isinstance(root, StorePath):
            path: Location = _named(root, relative)
            regular, size = path.is_file(), path.stat().st_size
        else:
            path = (root / path_below_root(relative)).resolve(strict=True)
            if not path.is_relative_to(root.resolve()):
                raise ImageError("the image path leads out of the image root")
            found = path.stat()
            regular, size = stat.S_ISREG(found.st_mode), found.st_size
    except FileNotFoundError:
        raise ImageError("the image file does not exist") from None
    except PermissionError:
        raise ImageError("the image may not be read (permission denied)") from None
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long or not encodable
        raise ImageError(f"the image path cannot be followed ({type(error).__name__})") from None
    if not regular:  # a FIFO would hang the run
        raise ImageError("the image path is not a regular file")
    if size == 0:
        raise ImageError("the image file is empty")
    if size > MAX_BYTES:
        raise ImageError(f"the image file has {size} bytes; at most {MAX_BYTES} are read")
    return path


def _ignore_pillow_warnings() -> None:
    # plain filters: `warnings.catch_warnings` swaps global state and must not be used in reader threads
    for rule in _IGNORED:
        if rule not in warnings.filters:
            _, _, category, module, _ = rule
            warnings.filterwarnings("ignore", category=category, module=module.pattern)


def _decode(file: BinaryIO, target_pixels: int | None) -> Image.Image:
    try:
        image: Image.Image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        file.seek(0, os.SEEK_SET)
        raise ImageError(f"the image is not a {', '.join(FORMATS)} (it starts with {file.read(12)!r})") from None
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ImageError(
            f"the image has {width} × {height} pixels; at most {MAX_PIXELS} and {MAX_SIDE} on a side are decoded"
        )
    # how many times longer than twice the target the sides are
    excess = math.sqrt(width * height / (4 * target_pixels)) if target_pixels else 1.0
    if excess >= 2 and isinstance(image, JpegImagePlugin.JpegImageFile):
        image.draft(None, (math.ceil(width / excess), math.ceil(height / excess)))
    image.load()
    turn = _TURNS.get(_orientation(image))
    rgb = _shrink(_to_rgb(image), target_pixels)
    return _widen(rgb.transpose(turn) if turn is not None else rgb)


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


def _shrink(image: Image.Image, target_pixels: int | None) -> Image.Image:
    """Average blocks of pixels while the sides stay at least twice the target's, as `draft` does for JPEG.

    A batch of decoded images then fits in memory, whatever their size on disk.
    """
    if not target_pixels:
        return image
    factor = int(math.sqrt(image.width * image.height / (4 * target_pixels)))
    return image.reduce(factor) if factor >= 2 else image


def _widen(image: Image.Image) -> Image.Image:
    """Centre a strip on white until its sides differ by no more than `MAX_ASPECT`."""
    shortest = math.ceil(max(image.size) / MAX_ASPECT)
    width, height = max(image.width, shortest), max(image.height, shortest)
    if (width, height) == image.size:
        return image
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas
