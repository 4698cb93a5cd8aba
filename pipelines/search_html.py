"""`vlm2rec search --html`: the query and the items found, with their titles and pictures, as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlm2rec.downstream.index.index import ItemIndex, Neighbour
from vlm2rec.embedder.contract import publish, schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, DataError
from vlm2rec.embedder.contract.storage import Location
from vlm2rec.pipelines.config import SearchConfig
from vlm2rec.pipelines.queries import dataset_for, described
from vlm2rec.pipelines.reporting.search_page import Picture, render, thumbnail

_BEGINNING = 256  # bytes in which a page says that it is one


def check_html(path: Path) -> None:
    """Raise `ConfigError` if there can be no file at this path, or there is one that is no page."""
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(
            f"--html {path} is {'a folder' if path.is_dir() else 'in a folder that is not there'}",
            "a file to write",
            "correct the path",
        )
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            if not file.read(_BEGINNING).lstrip().lower().startswith((b"<!doctype html", b"<html")):
                raise ConfigError(
                    f"--html {path} is a file that holds something else", "a new file, or a page", "correct the path"
                )


def write_page(index: ItemIndex, config: SearchConfig, found: Sequence[Neighbour]) -> None:
    """Write the page of a search to `config.html`, whole or not at all.

    Raises:
        ArtifactError: --data is no dataset folder. Without it, a page has no pictures if the dataset is gone.
    """
    assert config.html is not None
    pictures = _Pictures(index, config)
    asked = [pictures.of(item_id.strip()) for item_id in config.history]
    if config.item is not None:
        asked = [pictures.of(config.item)]
    if config.image is not None:
        whole = config.image.expanduser().resolve()
        asked = [Picture("", config.image.name, *thumbnail(whole.parent, whole.name))]
    about = f"{len(found)} of {len(index):,} items, by their {config.against or index.meta['column']} vectors"
    page = render(
        f"Nearest to {described(config)}",
        about + (f"; {pictures.reason}" if pictures.reason else ""),
        asked,
        [pictures.of(each.item_id, each.cosine) for each in found],
    )
    with publish.plain_disk_errors(config.html):
        schema.write_text(config.html, page)


class _Pictures:
    """The pictures of items, if the dataset and its images are at hand."""

    def __init__(self, index: ItemIndex, config: SearchConfig) -> None:
        self.reason, self._index = "", index
        self._root: Location | None = None
        self._paths: dict[str, str] = {}
        try:
            dataset: Dataset = dataset_for(index, config)
            self._paths = dict(zip(dataset.item_ids, dataset.image_paths, strict=True))
            self._root = dataset.image_root
        except (ArtifactError, DataError) as error:
            if config.data is not None and isinstance(error, ArtifactError):
                raise
            self.reason = f"without images: {error.found}"

    def of(self, item_id: str, cosine: float = 0.0) -> Picture:
        """Return an item's entry in the page."""
        title = str(self._index.ids[schema.TITLE][self._index.row_of(item_id)].as_py())
        path = self._paths.get(item_id)
        source, reason = thumbnail(self._root, path) if path and self._root is not None else ("", "no image")
        return Picture(item_id, title, source, reason, cosine)
