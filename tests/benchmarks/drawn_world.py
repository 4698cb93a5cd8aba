"""A drawn dataset and a small random backbone, for benchmarks of exports that are given none."""

from __future__ import annotations

from pathlib import Path

from vlm2rec.pipelines import make_backbone, prepare
from vlm2rec.pipelines.config import MakeBackboneConfig, PrepareConfig
from vlm2rec.pipelines.synthetic.drawn_catalogue import draw_catalogue


def draw_dataset(folder: Path, items: int) -> Path:
    """Write a dataset folder of about so many items and return it; the catalogue lies in `catalogue` beside it."""
    drawn = folder / "catalogue"
    draw_catalogue(drawn, items, items)
    prepare.run(
        PrepareConfig(
            items=drawn / "items.parquet",
            interactions=drawn / "interactions.parquet",
            images=drawn / "images",
            out=folder / "data",
        )
    )
    return folder / "data"


def draw_world(folder: Path, items: int) -> tuple[Path, str]:
    """Write a dataset folder of about so many items, and a backbone; returns both."""
    data, drawn = draw_dataset(folder, items), folder / "catalogue"
    make_backbone.run(
        MakeBackboneConfig(items=drawn / "items.parquet", images=drawn / "images", out=folder / "backbone", max_steps=0)
    )
    return data, str(folder / "backbone")
