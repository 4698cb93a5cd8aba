"""Amazon Reviews files as published: how those of 2014, 2018 and 2023 are told apart, and what is kept of an item."""

from __future__ import annotations

import html
from collections.abc import Callable, Collection, Mapping
from typing import Any

from vlm2rec.embedder.contract.schema import IMAGE_PATH, ITEM_ID, TITLE
from vlm2rec.pipelines.catalogue.records import is_missing

ID_COLUMNS = ("parent_asin", "asin")  # 2023 has both, and the first is the item's

_METADATA_OF_2018 = {"category", "imageURL", "imageURLHighRes", "also_buy", "also_view", "main_cat", "tech1", "feature"}
_METADATA_OF_2014 = {"categories", "imUrl", "salesRank", "related"}
_REVIEWS_OF_2018 = {"verified", "vote", "style"}


def is_amazon(columns: Collection[str]) -> bool:
    """Tell whether columns are those of an Amazon file: only their titles hold HTML entities."""
    return any(column in columns for column in ID_COLUMNS)


def year_of_metadata(item: str, columns: Collection[str]) -> int:
    """Return the year of metadata, from its id column and the others."""
    if item == "parent_asin":
        return 2023
    return 2018 if _METADATA_OF_2018 & {*columns} and not _METADATA_OF_2014 & {*columns} else 2014


def year_of_reviews(item: str, columns: Collection[str]) -> int:
    """Return the year of reviews, from their item column and the others."""
    if item == "parent_asin":
        return 2023
    return 2018 if _REVIEWS_OF_2018 & {*columns} else 2014


def review_columns(item: str) -> tuple[str, str]:
    """Return the columns of the user and the time that go with an item column."""
    return ("user_id", "timestamp") if item == "parent_asin" else ("reviewerID", "unixReviewTime")


def cleaner(item: str, columns: Collection[str]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Return the function that reduces a record of metadata to what is kept of it.

    `item` is the id column, `columns` are the keys of the first records: a column of image paths is kept, too.
    """
    clean = {2014: _of_2014, 2018: _of_2018, 2023: _of_2023}[year_of_metadata(item, columns)]
    if IMAGE_PATH not in columns:
        return lambda record: clean(record, item)
    return lambda record: {**clean(record, item), IMAGE_PATH: record.get(IMAGE_PATH)}


def _of_2014(record: Mapping[str, Any], item: str) -> dict[str, Any]:
    paths = _list(record.get("categories"))
    flat = [name for part in paths for name in (part if isinstance(part, list) else [part])]
    return {
        ITEM_ID: record.get(item),
        TITLE: plain_text(record.get(TITLE)),
        "categories": _joined(flat),
        "brand": plain_text(record.get("brand")),
        "description": _joined(record.get("description"), " "),
        "price": plain_text(record.get("price")),
        "imUrl": _text(record.get("imUrl")),
    }


def _of_2018(record: Mapping[str, Any], item: str) -> dict[str, Any]:
    main = plain_text(record.get("main_cat"))
    return {
        ITEM_ID: record.get(item),
        TITLE: plain_text(record.get(TITLE)),
        # main_cat is the picture of a logo in some records
        "categories": _joined(record.get("category")) or (main if main and not main.startswith("<") else None),
        "brand": plain_text(record.get("brand")),
        "description": _joined(record.get("description"), " "),
        "price": plain_text(record.get("price")),
        "image_url": _first(record.get("imageURLHighRes")) or _first(record.get("imageURL")),
    }


def _of_2023(record: Mapping[str, Any], item: str) -> dict[str, Any]:
    return {
        ITEM_ID: record.get(item),
        TITLE: plain_text(record.get(TITLE)),
        "categories": _joined(record.get("categories")) or plain_text(record.get("main_category")),
        "store": plain_text(record.get("store")),
        "description": _joined(record.get("description"), " "),
        "price": plain_text(record.get("price")),
        "image_url": image_url(record.get("images")),
    }


def image_url(images: Any) -> str | None:
    """Return the address of the main picture: of a list of objects, or of one object of lists (Hugging Face)."""
    if isinstance(images, Mapping):
        lists = {key: _list(values) for key, values in images.items()}
        length = max(map(len, lists.values()), default=0)
        images = [{key: values[n] for key, values in lists.items() if n < len(values)} for n in range(length)]
    pictures = [picture for picture in _list(images) if isinstance(picture, Mapping)]
    pictures.sort(key=lambda picture: picture.get("variant") != "MAIN")  # stable: the others stay in their order
    found = (_text(picture.get(size)) for picture in pictures for size in ("large", "hi_res", "thumb"))
    return next((address for address in found if address), None)


def _list(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [] if is_missing(values) else [values]


def _first(values: Any) -> str | None:
    return next((text for text in map(_text, _list(values)) if text), None)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value != "None" else None


def plain_text(value: Any) -> str | None:
    """Return a value as text with HTML entities resolved; None and NaN are no text."""
    return None if is_missing(value) else html.unescape(str(value))


def _joined(values: Any, between: str = ", ") -> str | None:
    if not isinstance(values, list):
        return plain_text(values)
    # dict.fromkeys: an item may be in several category paths with the same start
    texts = dict.fromkeys(html.unescape(str(value)) for value in values if not is_missing(value))
    return between.join(texts) or None
