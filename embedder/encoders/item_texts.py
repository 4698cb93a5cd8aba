"""The text of an item in its prompts: its title, another column of the catalogue, or several columns by name.

`--item-text title` is the title. Another column stands in its place (`--item-text rationale`, as in SLIM); several, or
`all`, make `title is ...; category is ...; brand is ...` (LLMEmb). With a strategy of the VLM2Vec study it is the title
and the category.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.prompts import attribute_text, product_text

LONGEST_ATTRIBUTE = 100
"""Characters of each of several attributes, as LLMEmb's public data cuts them."""


def item_texts(dataset: Dataset, settings: Mapping[str, Any]) -> Sequence[str]:
    """Return the text of every item, in the order of `items.parquet`.

    An item without any such text has its title instead (`without_text` counts these).

    Args:
        dataset: the items.
        settings: those of an encoder, or of an export.

    Raises:
        DataError: the catalogue lacks a column that the settings name.
    """
    titles = [title or "" for title in dataset.titles]
    if "strategy" in settings:
        return [product_text(title, category) for title, category in zip(titles, dataset.categories, strict=True)]
    return [own or title for own, title in zip(_own_texts(dataset, settings), titles, strict=True)]


def without_text(dataset: Dataset, settings: Mapping[str, Any]) -> int:
    """Return how many items have nothing in the columns of `--item-text`, and so have their title in the prompt."""
    return 0 if _is_title(settings) else sum(not text for text in _own_texts(dataset, settings))


def attributes_of(dataset: Dataset, item_text: str) -> list[dict[str, str]]:
    """Return each item's attributes by name, without blank ones, from the columns that `item_text` names.

    Raises:
        DataError: the catalogue lacks a column that it names.
    """
    columns = dataset.attributes(columns_of(item_text))
    rows = zip(*columns.values(), strict=True)
    return [
        {name: value[:LONGEST_ATTRIBUTE] for name, value in zip(columns, row, strict=True) if value} for row in rows
    ]


def columns_of(item_text: str) -> list[str]:
    """Return the names of columns in the setting `item_text`."""
    return [name.strip() for name in item_text.split(",")]


def _is_title(settings: Mapping[str, Any]) -> bool:
    return "strategy" in settings or settings.get("item_text", schema.TITLE) == schema.TITLE


def _own_texts(dataset: Dataset, settings: Mapping[str, Any]) -> Sequence[str]:
    if _is_title(settings):
        return [title or "" for title in dataset.titles]
    chosen = str(settings["item_text"])
    if chosen == schema.ALL_COLUMNS or "," in chosen:
        return [attribute_text(attributes) for attributes in attributes_of(dataset, chosen)]
    (texts,) = dataset.attributes([chosen]).values()
    return texts
