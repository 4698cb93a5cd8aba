"""The text of an item that a prompt holds: its title, or what else the catalogue says of it.

`--item-text title` is the title, `attributes` SDA's sentence of title, category and brand. Any column of the catalogue
may stand in the title's place (`--item-text rationale`, as in SLIM); several, or `all`, make `title is ...; category
is ...; brand is ...` (LLMEmb). With a strategy of the VLM2Vec study it is the title and the category.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.prompts import attributes_text, listed_attributes, product_text


def item_texts(dataset: Dataset, settings: Mapping[str, Any]) -> Sequence[str]:
    """Return the text of every item in the prompts of an encoder with these settings, in the order of `items.parquet`.

    What the catalogue lacks is left out. An item that has nothing in the named columns has its title instead
    (`without_text` counts these).

    Raises:
        DataError: the catalogue lacks a column that the settings name.
    """
    titles = [title or "" for title in dataset.titles]
    if "strategy" in settings:
        return [product_text(*each) for each in zip(titles, dataset.categories, strict=True)]
    if reads_attributes(settings):
        return [attributes_text(*each) for each in zip(titles, dataset.categories, dataset.brands, strict=True)]
    if not _names_columns(settings):
        return titles
    return [own or title for own, title in zip(_own_texts(dataset, settings), titles, strict=True)]


def text_of_words(words: str, settings: Mapping[str, Any]) -> str:
    """Return the text of an item whose title is these words, and of which nothing else is known."""
    if "strategy" in settings:
        return product_text(words, "")
    chosen = str(settings.get("item_text", schema.TITLE))
    if reads_attributes(settings) or chosen == schema.ALL_COLUMNS or "," in chosen:
        return listed_attributes({schema.TITLE: words})
    return words


def without_text(dataset: Dataset, settings: Mapping[str, Any]) -> int:
    """Return how many items have nothing in the columns of `--item-text`, and so have their title in the prompt."""
    return sum(not text for text in _own_texts(dataset, settings)) if _names_columns(settings) else 0


def reads_attributes(settings: Mapping[str, Any]) -> bool:
    """Tell whether an encoder with these settings reads category and brand beside the title, as SDA does."""
    return bool(settings.get("item_text") == "attributes")


def columns_read(dataset: Dataset, settings: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the columns of `items.parquet`, besides the title, that the texts come from; None where there is none.

    Raises:
        DataError: the catalogue lacks a column that the settings name.
    """
    if "strategy" in settings:
        return {"category": dataset.category_column}
    if reads_attributes(settings):
        return {"category": dataset.category_column, "brand": dataset.brand_column}
    if _names_columns(settings):
        return {"text": ", ".join(dataset.attributes(columns_of(settings["item_text"])))}
    return {}


def attributes_of(dataset: Dataset, item_text: str) -> list[dict[str, str]]:
    """Return each item's attributes by name, without blank ones, from the columns that `item_text` names.

    Raises:
        DataError: the catalogue lacks a column that it names.
    """
    columns = dataset.attributes(columns_of(item_text))
    rows = zip(*columns.values(), strict=True)
    return [{name: value for name, value in zip(columns, row, strict=True) if value.strip()} for row in rows]


def columns_of(item_text: str) -> list[str]:
    """Return the names of columns in the setting `item_text`."""
    return [name.strip() for name in item_text.split(",")]


def _names_columns(settings: Mapping[str, Any]) -> bool:
    return "strategy" not in settings and settings.get("item_text", schema.TITLE) not in (schema.TITLE, "attributes")


def _own_texts(dataset: Dataset, settings: Mapping[str, Any]) -> Sequence[str]:
    chosen = str(settings["item_text"])
    if chosen == schema.ALL_COLUMNS or "," in chosen:
        return [listed_attributes(attributes) for attributes in attributes_of(dataset, chosen)]
    (texts,) = dataset.attributes([chosen]).values()
    return texts
