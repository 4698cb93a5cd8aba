"""The text of an item that a prompt holds: its title, or what else the catalogue says of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.prompts import attributes_text, product_text


def item_text(dataset: Dataset, settings: Mapping[str, Any], row: int) -> str:
    """Return the text of an item in the prompts of an encoder with these settings.

    It is the title; with a strategy of the VLM2Vec study the title and the category; with `item_text: attributes`
    title, category and brand. What the catalogue lacks is left out.
    """
    title = dataset.titles[row] or ""
    if "strategy" in settings:
        return product_text(title, dataset.categories[row])
    if reads_attributes(settings):
        return attributes_text(title, dataset.categories[row], dataset.brands[row])
    return title


def reads_attributes(settings: Mapping[str, Any]) -> bool:
    """Tell whether an encoder with these settings reads category and brand beside the title, as SDA does."""
    return bool(settings.get("item_text") == "attributes")


def columns_read(dataset: Dataset, settings: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the columns of `items.parquet`, besides the title, that the texts come from; None where there is none."""
    if "strategy" in settings:
        return {"category": dataset.category_column}
    if reads_attributes(settings):
        return {"category": dataset.category_column, "brand": dataset.brand_column}
    return {}
