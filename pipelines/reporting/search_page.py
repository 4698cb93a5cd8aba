"""The page of `vlm2rec search --html`: what was asked for, and the items found, with their pictures inside the file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vlm2rec.downstream.index.index import ItemIndex, Neighbour
from vlm2rec.embedder.contract import publish, schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, DataError
from vlm2rec.embedder.contract.storage import Location
from vlm2rec.pipelines.config import SearchConfig
from vlm2rec.pipelines.queries import dataset_for, described

TEMPLATE = "search.html.j2"
_SIDE = 320  # pixels, of a picture in the page


@dataclass(frozen=True)
class Picture:
    """An item in the page; `source` is its picture as a data address, or empty with a reason."""

    item_id: str
    title: str
    source: str = ""
    reason: str = "no picture"
    cosine: float = 0.0


def write_page(index: ItemIndex, config: SearchConfig, found: Sequence[Neighbour]) -> Path:
    """Write the page of a search to `config.html`, whole or not at all.

    Raises:
        ConfigError: the path is a folder, or its folder does not exist.
    """
    assert config.html is not None
    if config.html.is_dir() or not config.html.parent.is_dir():
        raise ConfigError(
            f"--html {config.html} is {'a folder' if config.html.is_dir() else 'in a folder that is not there'}",
            "a file to write",
            "correct the path",
        )
    pictures = _Pictures(index, config)
    asked = [pictures.of(item_id, pictures.title_of(item_id)) for item_id in config.history]
    if config.item is not None:
        asked = [pictures.of(config.item, pictures.title_of(config.item))]
    if config.image is not None:
        whole = config.image.expanduser().resolve()
        asked = [Picture("", config.image.name, *_thumbnail(whole.parent, whole.name))]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(TEMPLATE).render(
        title=f"Nearest to {described(config)}",
        about=f"{len(found)} of {len(index):,} items, by their {config.against or index.meta['column']} vectors"
        + (f"; {pictures.reason}" if pictures.reason else ""),
        asked=asked,
        found=[pictures.of(each.item_id, each.title, each.cosine) for each in found],
    )
    with publish.plain_disk_errors(config.html):
        schema.write_text(config.html, page)
    return config.html


class _Pictures:
    """The pictures of items, if the dataset and its images are at hand."""

    def __init__(self, index: ItemIndex, config: SearchConfig) -> None:
        self.reason, self._index = "", index
        self._dataset: Dataset | None = None
        try:
            dataset = dataset_for(index, config)
            self._root: Location = dataset.image_root
            self._paths = dict(zip(dataset.item_ids, dataset.image_paths, strict=True))
            self._dataset = dataset
        except (ArtifactError, DataError) as error:
            if config.data is not None and isinstance(error, ArtifactError):
                raise
            self.reason = f"without pictures: {error.found}"

    def title_of(self, item_id: str) -> str:
        """Return an item's title."""
        return str(self._index.ids[schema.TITLE][self._index.row_of(item_id.strip())].as_py())

    def of(self, item_id: str, title: str, cosine: float = 0.0) -> Picture:
        """Return an item's entry in the page."""
        path = self._paths.get(item_id.strip()) if self._dataset is not None else None
        source, reason = _thumbnail(self._root, path) if path else ("", "no picture")
        return Picture(item_id, title, source, reason, cosine)


def _thumbnail(root: Location, relative: str) -> tuple[str, str]:
    """Return a small copy of a picture as a data address, or an empty text and the reason."""
    from vlm2rec.embedder.backbones.images import ImageError, open_image

    try:
        picture = open_image(root, relative, _SIDE * _SIDE)
    except ImageError as error:
        return "", str(error)
    picture.thumbnail((_SIDE, _SIDE))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}", ""
