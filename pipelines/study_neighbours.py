"""What text, image and both together find with the vectors of a few methods, as tables to draw a page from."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from vlm2rec.embedder import schema
from vlm2rec.embedder.dataset import Dataset
from vlm2rec.pipelines.report_neighbours import (
    AMONG,
    Pictures,
    Query,
    Views,
    attributes_of,
    disagreeing,
    in_common,
    look_up,
    read_views,
    spread_out,
)
from vlm2rec.pipelines.study_methods import Json, Method, Study

QUERIES = 6
DISAGREEMENTS = 4
NEIGHBOURS = 7
SHOWN = ("VLM2Rec", "VLM SFT (ext.)", "VLM vanilla (ext.)")  # rows of the paper whose vectors are shown

_NEIGHBOURS: dict[str, Any] = {
    "method": pl.String,
    "kind": pl.String,  # spread | disagreeing
    "query": pl.String,
    "place": pl.Int32,
    "view": pl.String,
    "rank": pl.Int32,
    schema.ITEM_ID: pl.String,
    "cosine": pl.Float64,
    "shared": pl.Int32,  # items that text and image have in common among the query's nearest ten
}
_COMMON: dict[str, Any] = {
    "method": pl.String,
    "attribute": pl.String,  # null: neighbours that text and image share
    "view": pl.String,
    "share": pl.Float64,
    "chance": pl.Float64,
}
_PICTURES: dict[str, Any] = {schema.ITEM_ID: pl.String, schema.TITLE: pl.String, "picture": pl.Binary}


def neighbour_tables(study: Study, embedded: Iterable[tuple[Method, Path]], data: Path) -> dict[str, pl.DataFrame]:
    """Look up the same items in the vectors of each shown method.

    Args:
        study: names the reference, which is shown first.
        embedded: methods with an embeddings folder.
        data: dataset folder.

    Returns:
        `neighbours`, `common` and `pictures`; without rows where no method is shown.
    """
    dataset = Dataset(data)
    folders = {method.name: folder for method, folder in embedded if _is_shown(study, method)}
    order = sorted(folders, key=lambda name: (name != study.reference, list(folders).index(name)))
    neighbours: list[Json] = []
    common: list[Json] = []
    queries: list[int] = []
    for name in order:
        views = read_views(folders[name], dataset)
        if views is None:
            continue
        queries = queries or _spread(views, dataset)
        neighbours += _rows(name, "spread", dataset, look_up(views, queries, NEIGHBOURS))
        if {*schema.MODALITIES} <= views.vectors.keys():
            worst, shared = disagreeing(views, DISAGREEMENTS)
            neighbours += _rows(name, "disagreeing", dataset, look_up(views, worst, NEIGHBOURS))
            common.append({"method": name, "share": shared / AMONG})
        for found in in_common(views, dataset, attributes_of(dataset)):
            common += [
                {"method": name, "attribute": found.attribute, "view": view, "share": share, "chance": found.chance}
                for view, share in found.share.items()
            ]
    shown = {row[column] for row in neighbours for column in ("query", schema.ITEM_ID)}
    return {
        "neighbours": pl.DataFrame(neighbours, schema=_NEIGHBOURS, orient="row"),
        "common": pl.DataFrame(common, schema=_COMMON, orient="row"),
        "pictures": pl.DataFrame(list(_pictures(dataset, shown)), schema=_PICTURES, orient="row"),
    }


def _is_shown(study: Study, method: Method) -> bool:
    return method.name == study.reference or (method.paper in SHOWN and method.of is None)


def _spread(views: Views, dataset: Dataset) -> list[int]:
    base = views.vectors.get(schema.FUSED, next(iter(views.vectors.values())))
    first = int(np.argmax(dataset.train_frequency()[views.rows]))
    return [int(views.rows[place]) for place in spread_out(base, first, QUERIES)]


def _rows(method: str, kind: str, dataset: Dataset, queries: Iterable[Query]) -> list[Json]:
    return [
        {
            "method": method,
            "kind": kind,
            "query": dataset.item_ids[query.row],
            "place": place,
            "view": view,
            "rank": rank,
            schema.ITEM_ID: dataset.item_ids[near.row],
            "cosine": near.cosine,
            "shared": query.shared,
        }
        for place, query in enumerate(queries)
        for view, found in query.found.items()
        for rank, near in enumerate(found)
    ]


def _pictures(dataset: Dataset, shown: set[str]) -> Iterator[Json]:
    """Yield title and thumbnail of every item that is shown, and of some of the catalogue."""
    some = np.linspace(0, len(dataset.item_ids) - 1, 24).astype(int)
    shown = shown | {dataset.item_ids[row] for row in some}
    pictures = Pictures(dataset, side=112)
    for row, item in enumerate(dataset.item_ids):
        if item in shown:
            picture = pictures.of(row)
            yield {
                schema.ITEM_ID: item,
                schema.TITLE: dataset.titles[row],
                "picture": None if picture is None else base64.b64decode(picture.partition(",")[2]),
            }
