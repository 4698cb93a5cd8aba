"""The Parquet files of a study, written by hand: what a page is drawn from, without running anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from embedding_folder import write_embeddings

from vlm2rec.embedder.contract import schema
from vlm2rec.pipelines.experiments import results
from vlm2rec.pipelines.experiments.methods import AnalysisPlan, Method, Study
from vlm2rec.pipelines.experiments.neighbours import neighbour_tables
from vlm2rec.pipelines.synthetic.drawn_catalogue import (
    LOOKS_ATTRIBUTES,
    TEXT_ATTRIBUTES,
    Product,
    attribute_matrix,
    draw_catalogue,
)

HOSTILE = "<script>alert('x')</script> & \"lamp\" $\\frac{1}{0}$"
MESSAGE = "image falls behind while text gains: <b>S</b> of image is 1.031"
VIEWS = {"f2f": 1.0, "t2f": 0.8, "v2f": 0.6}
METHODS = (
    Method(name="ID", source="id", paper="ID"),
    Method(name="Vanilla", source="backbone", paper="VLM vanilla (ext.)"),
    Method(name="SFT", source="finetune", paper="VLM SFT (ext.)"),
    Method(name="VLM2Rec", source="finetune", paper="VLM2Rec"),
)
STUDY = Study(reference="VLM2Rec", analyses=("main",), plan={"main": AnalysisPlan()}, methods=METHODS)
TASK1 = {"Vanilla": 0.15, "SFT": 0.25, "VLM2Rec": 0.35}
TASK2 = {"ID": 0.20, "Vanilla": 0.25, "SFT": 0.31, "VLM2Rec": 0.37}
MODELS = ("SASRec", "GRU4Rec")


def write_dataset(folder: Path) -> pl.DataFrame:
    """A catalogue of 60 drawn products as a dataset folder; the first title is hostile, the last picture is missing."""
    draw_catalogue(folder / "source", products=60, users=40, seed=0)
    items = pl.read_parquet(folder / "source" / "items.parquet")
    items = items.with_columns(
        pl.when(pl.col("item_id") == "P0000").then(pl.lit(HOSTILE)).otherwise("title").alias("title")
    )
    data = folder / "data"
    data.mkdir()
    (folder / "source" / "images" / "P0059.jpg").unlink()
    (folder / "source" / "images").rename(data / "images")
    items.write_parquet(data / "items.parquet")
    histories = pl.read_parquet(folder / "source" / "interactions.parquet").group_by("user_id", maintain_order=True)
    rows = histories.agg(pl.col("item_id")).select(
        "user_id",
        train=pl.col("item_id").list.head(pl.col("item_id").list.len() - 2),
        valid=pl.col("item_id").list.get(-2),
        test=pl.col("item_id").list.get(-1),
    )
    rows.write_parquet(data / "sequences.parquet")
    schema.write_json(
        data / "dataset.json",
        {
            "name": "Drawn products",
            "image_root": "images",
            "max_history": 10,
            "negatives": {"count": 100, "seeds": [0]},
            "sha256": {},
            "schema_version": 1,
        },
    )
    return items


def write_vectors(folder: Path, items: pl.DataFrame, noise: float) -> None:
    """Vectors in which text knows the words and image the looks."""
    random = np.random.default_rng(0)
    names = ("item_id", "brand", "material", "category", "model", "colour", "pattern", "background", "popularity")
    products = [Product(*row) for row in items.select(names).iter_rows()]
    views = {}
    for view, attributes in (("text", TEXT_ATTRIBUTES), ("image", (*LOOKS_ATTRIBUTES, "category"))):
        known, _ = attribute_matrix(products, attributes)
        values = known @ random.standard_normal((known.shape[1], 16))
        views[view] = (values + noise * random.standard_normal(values.shape)).astype(np.float32)
    fused = views["text"] + views["image"]
    write_embeddings(folder, items["item_id"].to_list(), fused, **views, settings={"backbone": "by hand"})


def numbers(level: float) -> dict[str, float]:
    """Metrics that one ranking can have."""
    return {"H@10": 1.4 * level, "H@20": 2.2 * level, "N@10": 0.8 * level, "N@20": level}


def result_rows() -> Iterator[dict[str, Any]]:
    home = {"seed": 0, "dataset": "Drawn products", "user_group": "all", "users": 40}
    for protocol, share in (("candidates", 1.0), ("full", 1 / 3)):
        for method, level in TASK1.items():
            for view, part in VIEWS.items():
                for metric, value in numbers(level * share * part).items():
                    key = {"method": method, "task": 1, "model": None, "protocol": protocol, "view": view}
                    yield home | key | {"metric": metric, "value": value}
        for model in MODELS:
            for method, level in TASK2.items():
                for metric, value in numbers(level * share).items():
                    key = {"method": method, "task": 2, "model": model, "protocol": protocol, "view": None}
                    yield home | key | {"metric": metric, "value": value}


def comparison_rows() -> Iterator[dict[str, Any]]:
    for task, model, levels in ((1, None, TASK1), *((2, model, TASK2) for model in MODELS)):
        for method, level in levels.items():
            if method != "VLM2Rec":
                difference = levels["VLM2Rec"] - level
                key = {"dataset": "Drawn products", "task": task, "model": model, "method": method}
                yield key | {
                    **{"reference": "VLM2Rec", "family": "main", "metric": "N@20", "seeds": 3, "users": 40},
                    **{"difference": difference, "low": difference - 0.02, "high": difference + 0.02},
                    **{"p": 0.01, "p_holm": 0.02},
                }


def geometry_rows() -> Iterator[dict[str, Any]]:
    for method, level in TASK1.items():
        for view, shift in (("fused", 0.0), ("text", 0.1), ("image", -0.1)):
            values = {"A_pos": 0.6 + shift, "A_neg": 0.7 + level + shift, "U": -1.2 + shift, "S": 1 + level / 2 + shift}
            values |= {"U_users": -0.9 + shift, "U_items": -1.6 + shift, "offset": 0.2 - shift}
            yield {"method": method, "seed": 0, "dataset": "Drawn products", "view": view, **values}


def curve_rows() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(2)
    for method in ("SFT", "VLM2Rec"):
        rows: list[tuple[str, int, dict[str, float]]] = []
        for step in range(1, 121):
            fall = float(np.exp(-step / 40))
            train = {"loss": 1.2 + fall + 0.1 * random.standard_normal(), "weak_is_image": 0.7}
            train |= {"margin_text": 0.3 * (1 - fall), "margin_image": 0.1 * (1 - fall)}
            if method == "VLM2Rec":
                train |= {"wpcl": 1.1 + fall, "crtr": 0.2 * fall, "weight": 1.7, "alpha": 1.0, "beta": 1 - step / 2000}
            rows.append(("train", step, train))
        rows += [("valid", step, {"N@20": 0.1 + step / 1000}) for step in (40, 80, 120)]
        for step in (0, 40, 80, 120):
            separability = {f"S_{view}": 1.0 + step / 100 for view in schema.VIEWS}
            rows.append(("probe", step, separability | {f"rank_{view}": 20.0 - step / 10 for view in schema.VIEWS}))
        if method == "SFT":
            rows += [("gradients", step, {"cos_total_text": 0.9, "cos_total_image": 0.3}) for step in (0, 40, 80)]
        for kind, step, values in rows:
            for name, value in values.items():
                yield {"method": method, "seed": 0, "kind": kind, "step": step, "name": name, "value": value}


def cost_rows() -> Iterator[dict[str, Any]]:
    for method in METHODS:
        steps = [(f"recommender-{model}", "train-recommender", 5.0) for model in MODELS]
        if method.source != "id":
            steps += [("embeddings", "export-items", 2.0), ("evaluate", "evaluate", 1.0)]
        if method.source == "finetune":
            steps.append(("adapter", "finetune", 60.0))
        for name, command, seconds in steps:
            key = {"method": method.name, "seed": 0, "dataset": "Drawn products", "step": name, "command": command}
            yield key | {"seconds": seconds, "attempts": 1, "items": 60}


ABOUT: dict[str, Any] = {
    "dataset": "Drawn products",
    "reference": "VLM2Rec",
    "backbone": "runs/backbone",
    "users": 40,
    "items": 60,
    "interactions": 444,
    "average_length": 11.1,
    "candidate sets": 1,
    "candidates": 100,
    "domains": [],
    "shared users": 0,
    "buckets": ["0-5", "6+"],
    "plan": {"main": {"seeds": [0], "tasks": [1, 2], "models": list(MODELS)}},
    "finetune": {"max_steps": 120},
    "recommender": {},
    "quick": False,
    "versions": {"vlm2rec": "0.1.0", "torch": "2.13.0"},
    "notes": [],
}
SINCE: dict[str, Any] = {
    "counts": [
        {"step": "read", "users": 40, "items": 61, "interactions": 450},
        {"step": "5-core", "users": 40, "items": 60, "interactions": 444},
    ],
    "rules": {"core": 5},
    "dims": [16],
    "settings": {"SFT": {"adapter": {"loss": "sft"}}},
    "before": [{"stage": "make-backbone", "what": "1.1 M parameters", "seconds": 61.0}],
    "after": [{"stage": "build-index", "what": "FAISS", "seconds": 0.5}],
    "index": {"factory": "Flat", "rows": 60, "column": "fused", "recall@10": 1.0, "search_ms": 0.02},
    "demo": {"products": 60, "seed": 0},
}
"""What `about.parquet` did not hold before: pages of older studies are drawn without it."""


def warning_rows() -> Iterator[dict[str, Any]]:
    for step, until in ((20, 30), (30, None)):
        yield {
            **{"method": "SFT", "seed": 0, "view": "image", "rule": "behind", "message": MESSAGE},
            **{"step": step, "until": until},
        }


def write_study(folder: Path) -> Path:
    """A whole study of four methods and one seed; its material lies beside it."""
    material, study = folder / "material", folder / "study"
    material.mkdir(parents=True)
    study.mkdir()
    items = write_dataset(material)
    embedded = []
    for number, method in enumerate(METHODS[1:]):
        write_vectors(material / method.slug, items, noise=3.0 - 1.4 * number)
        embedded.append((method, material / method.slug))
    rows = {
        "results": result_rows(),
        "users": iter(()),
        "comparisons": comparison_rows(),
        "geometry": geometry_rows(),
        "views": iter(()),
        "trials": iter(()),
        "curves": curve_rows(),
        "warnings": warning_rows(),
        "cost": cost_rows(),
        "methods": results._methods(STUDY),
        "about": ({"key": key, "value": json.dumps(value)} for key, value in (ABOUT | SINCE).items()),
    }
    tables = {name: results._frame(name, found) for name, found in rows.items()}
    for name, table in (tables | neighbour_tables(STUDY, embedded, material / "data")).items():
        table.write_parquet(study / f"{name}.parquet")
    return study


def changed(study: Path, folder: Path, **tables: pl.DataFrame) -> Path:
    """A copy of a study's tables with some of them replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in study.glob("*.parquet"):
        tables.get(path.stem, pl.read_parquet(path)).write_parquet(folder / path.name)
    return folder


def without(study: Path, *keys: str) -> pl.DataFrame:
    """`about` without some of its facts."""
    return pl.read_parquet(study / "about.parquet").filter(~pl.col("key").is_in(keys))
