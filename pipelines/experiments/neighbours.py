"""Nearest neighbours of a few items in each view, and how often neighbours share an attribute.

The same items are looked up in the vectors of a few methods. The rows go to three Parquet files of the study.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from vlm2rec.downstream.table import read_batches, unit_rows
from vlm2rec.embedder.backbones.images import ImageError, open_image
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.pipelines.experiments.methods import Json, Method, Study

MOST_ITEMS = 10_000  # of a larger catalogue, only a sample is compared: the page shows examples, not measurements
MOST_QUERIES = 1_000
NEAREST = 10  # neighbours that count as near
QUERIES = 6
DISAGREEMENTS = 4
NEIGHBOURS = 7
SHOWN = ("VLM2Rec", "VLM SFT (ext.)", "VLM vanilla (ext.)")  # rows of the paper whose methods are shown
_NEIGHBOURS: dict[str, Any] = {
    "method": pl.String,
    "kind": pl.String,  # spread | disagreeing
    "query": pl.String,
    "place": pl.Int32,
    "view": pl.String,
    "rank": pl.Int32,
    schema.ITEM_ID: pl.String,
    "cosine": pl.Float64,
    "shared": pl.Int32,  # items among the query's ten nearest in both text and image
}
_COMMON: dict[str, Any] = {
    "method": pl.String,
    "attribute": pl.String,  # null: the share of neighbours that text and image have in common
    "view": pl.String,
    "share": pl.Float64,
    "chance": pl.Float64,
}
_PICTURES: dict[str, Any] = {schema.ITEM_ID: pl.String, schema.TITLE: pl.String, "picture": pl.Binary}


# --- the tables ---------------------------------------------------------------------------------------------


def neighbour_tables(study: Study, embedded: Iterable[tuple[Method, Path]], data: Path) -> dict[str, pl.DataFrame]:
    """Look up the same items in the vectors of each shown method.

    Args:
        study: names the reference, which is shown first.
        embedded: methods with an embeddings folder.
        data: dataset folder.

    Returns:
        `neighbours`, `common` and `pictures`; without rows if no method is shown.
    """
    dataset = Dataset(data).warm()
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
            common.append({"method": name, "share": shared / NEAREST})
        common += [{"method": name, **found} for found in in_common(views, dataset, attributes_of(dataset))]
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
    """Yield title and thumbnail of every item in `shown`, and of 24 items across the catalogue."""
    some = np.linspace(0, len(dataset.item_ids) - 1, 24).astype(int)
    shown = shown | {dataset.item_ids[row] for row in some}
    for row, item in enumerate(dataset.item_ids):
        if item in shown:
            yield {schema.ITEM_ID: item, schema.TITLE: dataset.titles[row], "picture": _thumbnail(dataset, row)}


def _thumbnail(dataset: Dataset, row: int, side: int = 112) -> bytes | None:
    """Return the picture of an item as a small JPEG; None if it cannot be read."""
    if not dataset.has_images:
        return None
    try:
        picture = open_image(dataset.image_root, dataset.image_paths[row], side * side)
    except ImageError:
        return None
    picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=82, optimize=True)
    return file.getvalue()


# --- looking up ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Views:
    """Unit vectors of the compared items: one matrix per view, all with the same order of rows."""

    rows: np.ndarray  # (M,) rows of items.parquet
    vectors: dict[str, np.ndarray]  # view → (M, d)


@dataclass(frozen=True)
class Found:
    """One neighbour: its row in items.parquet and its cosine to the query."""

    row: int
    cosine: float


@dataclass(frozen=True)
class Query:
    """An item and its nearest neighbours in each view."""

    row: int
    found: dict[str, list[Found]]  # view → nearest first
    shared: int  # items among the nearest ten of both text and image


def read_views(folder: Path, dataset: Dataset, seed: int = 0) -> Views | None:
    """Read the vectors of the items that have all exported views; None if there are fewer than two such items.

    Raises:
        ArtifactError: the folder is unfinished or damaged.
    """
    views = schema.read_manifest(folder)["views"]
    known = dataset.items[schema.ITEM_ID].combine_chunks()
    wanted = np.ones(len(known), bool)
    if len(known) > MOST_ITEMS:
        wanted[:] = False
        wanted[np.random.default_rng(seed).choice(len(known), MOST_ITEMS, replace=False)] = True
    read = {view: _read_view(folder, view, known, wanted) for view in views}
    everywhere = np.logical_and.reduce([present for _, present in read.values()])
    rows = np.flatnonzero(everywhere)
    if len(rows) < 2:
        return None
    place = np.cumsum(wanted) - 1  # row of items.parquet → row of the matrix that was read
    vectors = {view: unit_rows(values[place[rows]]) for view, (values, _) in read.items()}
    return Views(rows, vectors)


def _read_view(folder: Path, view: str, known: pa.Array, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (the wanted vectors in the order of the dataset, a mask of the items that have one)."""
    dim = schema.dims_of(schema.read_manifest(folder))[view]
    values = np.zeros((int(wanted.sum()), dim), np.float32)
    has = np.zeros(len(known), bool)
    place = np.cumsum(wanted) - 1
    for ids, vectors, present in read_batches(folder, view):
        rows = pc.fill_null(pc.index_in(pa.array(ids, pa.string()), value_set=known), -1).to_numpy(zero_copy_only=False)
        take = present & (rows >= 0)
        take[take] = wanted[rows[take]]
        values[place[rows[take]]] = vectors[take]
        has[rows[take]] = True
    return values, has


def nearest(vectors: np.ndarray, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and cosines, (Q, count) each, of the items nearest to each query, without the query itself."""
    count = min(count, len(vectors) - 1)
    cosines = vectors[queries] @ vectors.T  # (Q, M)
    cosines[np.arange(len(queries)), queries] = -np.inf
    top = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
    order = np.argsort(-np.take_along_axis(cosines, top, axis=1), axis=1, kind="stable")
    top = np.take_along_axis(top, order, axis=1)
    return top, np.take_along_axis(cosines, top, axis=1)


def look_up(views: Views, rows: list[int], count: int) -> list[Query]:
    """Return the `count` nearest neighbours of the items `rows` in each view; items outside the sample are left out."""
    places = np.flatnonzero(np.isin(views.rows, rows))
    places = places[np.argsort([rows.index(row) for row in views.rows[places]])]
    top = {view: nearest(vectors, places, max(count, NEAREST)) for view, vectors in views.vectors.items()}
    queries = []
    for number, place in enumerate(places):
        found = {
            view: [
                Found(int(views.rows[near]), float(cosine))
                for near, cosine in zip(neighbours[number][:count], cosines[number][:count], strict=True)
            ]
            for view, (neighbours, cosines) in top.items()
        }
        queries.append(Query(int(views.rows[place]), found, _shared(top, number)))
    return queries


def _shared(top: dict[str, tuple[np.ndarray, np.ndarray]], number: int) -> int:
    if not {*schema.MODALITIES} <= top.keys():
        return 0
    text, image = (top[view][0][number, :NEAREST] for view in schema.MODALITIES)
    return len(np.intersect1d(text, image))


def spread_out(vectors: np.ndarray, first: int, count: int) -> list[int]:
    """Return the rows of `count` items far from one another: `first`, then always the farthest from those chosen."""
    chosen = [first]
    closest = vectors @ vectors[first]
    while len(chosen) < min(count, len(vectors)):
        chosen.append(int(np.argmin(closest)))
        closest = np.maximum(closest, vectors @ vectors[chosen[-1]])
    return chosen


def disagreeing(views: Views, count: int, seed: int = 0) -> tuple[list[int], float]:
    """Return the `count` items whose text and image views disagree most, and how much the views agree on average.

    Two views disagree about an item if its cosines to all other items have a low correlation. The agreement is the mean
    number of items that are among the ten nearest in both text and image.
    """
    queries = _query_places(len(views.rows), seed)
    text, image = (views.vectors[view] for view in schema.MODALITIES)
    profiles = [_standardised(vectors, queries) for vectors in (text, image)]
    correlation = np.einsum("qm,qm->q", *profiles)
    worst = queries[np.argsort(correlation, kind="stable")[:count]]
    near = [nearest(vectors, queries, NEAREST)[0] for vectors in (text, image)]
    shared = np.mean([len(np.intersect1d(a, b)) for a, b in zip(*near, strict=True)])
    return [int(row) for row in views.rows[worst]], float(shared)


def _query_places(count: int, seed: int) -> np.ndarray:
    if count <= MOST_QUERIES:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, MOST_QUERIES, replace=False))


def _standardised(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Return each query's cosines to all other items, shifted and scaled so that a dot product is a correlation."""
    cosines = vectors[queries] @ vectors.T
    own = np.arange(len(queries))
    cosines[own, queries] = 0
    mean = cosines.sum(1, keepdims=True) / (cosines.shape[1] - 1)
    cosines -= mean
    cosines[own, queries] = 0
    return unit_rows(cosines)


def attributes_of(dataset: Dataset, most_values: int = 60) -> list[str]:
    """Return the text columns of the catalogue with 2 to `most_values` values."""
    own = {schema.ITEM_ID, schema.TITLE, schema.IMAGE_PATH}
    found = []
    for name in dataset.items.column_names:
        column = dataset.items[name]
        if name not in own and pa.types.is_string(_plain_type(column.type)):
            groups = pc.count_distinct(column).as_py()
            if 2 <= groups <= min(most_values, len(column) // 4):
                found.append(name)
    return found


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.string() if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) else kind


def in_common(views: Views, dataset: Dataset, attributes: list[str], seed: int = 0) -> Iterator[Json]:
    """Yield for each attribute and view how often near items have the same value, and how often random items do."""
    queries = _query_places(len(views.rows), seed)
    near = {view: nearest(vectors, queries, NEAREST)[0] for view, vectors in views.vectors.items()}
    for name in attributes:
        _, values = np.unique(np.array(dataset.items[name].to_pylist(), dtype=object).astype(str), return_inverse=True)
        values = values[views.rows]
        counts = np.bincount(values)
        chance = float((counts[values] - 1).mean() / (len(values) - 1))
        for view, top in near.items():
            share = float((values[top] == values[queries, None]).mean())
            yield {"attribute": name, "view": view, "share": share, "chance": chance}
