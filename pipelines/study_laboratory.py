"""The laboratory of `vlm2rec study --demo`: drawn catalogues with known truth, and a small backbone that reads them.

laboratory/catalogue, captioned, data, backbone   as `vlm2rec demo` makes them
laboratory/second, second-data                    another catalogue with users of its own, for cross-domain
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import polars as pl
import yaml

from vlm2rec.embedder import schema
from vlm2rec.pipelines import demo, prepare
from vlm2rec.pipelines.catalogue import CatalogueSettings, draw_catalogue
from vlm2rec.pipelines.config import DemoConfig, PrepareConfig, StudyConfig
from vlm2rec.pipelines.console import log

DONE_FILE = "laboratory.json"
SMALL = {"products": 200, "users": 60, "backbone_steps": 20}
"""Sizes with --quick."""
LABORATORY = CatalogueSettings(noise=35.0, jitter=1.6, colours=10, looks=(2.8, 1.2), told_by_brand=0.6)
"""A catalogue in which one modality can stand in for the other, so that training may leave the weaker one behind.

Users choose by looks more than by words (weight 0.7 on average). Pictures show what they look for, noisily; a title
tells the colour of three products in five through its brand, and nothing of the pattern. The picture is the strong
view, the title holds less, and part of what it holds twice: SFT fits the picture, and the title's vectors fall back
towards where they started, the longer it trains.
"""
BACKBONE_STEPS = 700


def draw_laboratory(config: StudyConfig) -> StudyConfig:
    """Draw what is missing of the laboratory and return the settings of a study of it."""
    folder = config.out / "laboratory"
    folder.mkdir(parents=True, exist_ok=True)
    sizes = SMALL if config.quick else {"backbone_steps": BACKBONE_STEPS}
    drawn = DemoConfig(out=folder, **sizes)
    wanted = {"catalogue", "captioned", "data", "backbone"}
    done = _done(folder)
    for stage in demo.plan(drawn, LABORATORY):
        if stage.output in wanted and stage.output not in done:
            log.print(f"laboratory: {stage.command}, {stage.what}", markup=False, soft_wrap=True)
            shutil.rmtree(folder / stage.output, ignore_errors=True)  # what a killed run left there
            stage.call()
            done = _note(folder, stage.output)
    if "second-data" not in done:
        log.print("laboratory: a second catalogue, for cross-domain")
        shutil.rmtree(folder / "second-data", ignore_errors=True)
        _second_catalogue(folder, drawn)
        _note(folder, "second-data")
    file = folder / "study.yaml"
    own = {} if config.config is None else yaml.safe_load(config.config.read_text(encoding="utf-8")) or {}
    file.write_text(yaml.safe_dump({"cross_domain": [str(folder / "second-data")], **own}), encoding="utf-8")
    return dataclasses.replace(config, data=folder / "data", backbone=str(folder / "backbone"), config=file)


def _done(folder: Path) -> list[str]:
    if not (folder / DONE_FILE).is_file():
        return []
    return list(schema.read_json(folder / DONE_FILE, "what the laboratory holds", f"remove {folder}")["done"])


def _note(folder: Path, output: str) -> list[str]:
    done = [*_done(folder), output]
    schema.write_json(folder / DONE_FILE, {"done": done})
    return done


def _second_catalogue(folder: Path, drawn: DemoConfig) -> None:
    """Draw other products and other people, under ids of their own."""
    second = folder / "second"
    draw_catalogue(second, drawn.products, drawn.users, drawn.seed + 2, LABORATORY)
    for name, ids in (("items", [schema.ITEM_ID]), ("interactions", [schema.USER_ID, schema.ITEM_ID])):
        table = pl.read_parquet(second / f"{name}.parquet")
        table = table.with_columns(pl.concat_str(pl.lit("second-"), pl.col(column)).alias(column) for column in ids)
        table.write_parquet(second / f"{name}.parquet")
    prepare.run(
        PrepareConfig(
            items=second / "items.parquet",
            interactions=second / "interactions.parquet",
            images=second / "images",
            out=folder / "second-data",
            name="Second drawn catalogue",
            core=demo.largest_core(second / "interactions.parquet", second / "items.parquet"),
        )
    )
