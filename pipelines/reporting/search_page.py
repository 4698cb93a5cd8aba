"""The page of `vlm2rec search --html`: what was asked for, and the items found, with their pictures inside the file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vlm2rec.embedder.contract.storage import Location

TEMPLATE = "search.html.j2"
_SIDE = 320  # pixels, of a picture in the page


@dataclass(frozen=True)
class Picture:
    """An item in the page; `source` is its picture as a data address, or empty with a reason."""

    item_id: str
    title: str
    source: str = ""
    reason: str = "no image"
    cosine: float = 0.0


def render(title: str, about: str, asked: Sequence[Picture], found: Sequence[Picture]) -> str:
    """Return the page as HTML, which needs no other file; all text is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(title=title, about=about, asked=asked, found=found)


def thumbnail(root: Location, relative: str) -> tuple[str, str]:
    """Return a small copy of a picture as a data address and "", or "" and the reason why there is none."""
    from vlm2rec.embedder.backbones.images import ImageError, open_image

    try:
        picture = open_image(root, relative, _SIDE * _SIDE)
    except ImageError as error:
        return "", str(error)
    picture.thumbnail((_SIDE, _SIDE))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}", ""
