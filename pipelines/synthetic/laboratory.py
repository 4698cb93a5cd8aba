"""The laboratories of `vlm2rec demo` and `vlm2rec study --demo`: a drawn catalogue, and a small backbone that reads it.

laboratory/catalogue, captioned   drawn products with known truth; others with captions, for the backbone
laboratory/data, backbone         what `vlm2rec prepare` and `vlm2rec make-backbone` make of them
laboratory/second, second-data    another catalogue with users of its own, for cross-domain
laboratory/laboratory.json        settings, what is done, and how long it took
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.pipelines.commands import module_of
from vlm2rec.pipelines.config import DemoConfig, MakeBackboneConfig, PrepareConfig
from vlm2rec.pipelines.console import headline
from vlm2rec.pipelines.synthetic.drawn_catalogue import CatalogueSettings, draw_catalogue

FOLDER = "laboratory"
DONE_FILE = "laboratory.json"
BACKBONE_MINUTES = 20.0  # steps decide, so that a busy machine makes the same backbone; this ends a hopeless one
CAPTIONED_PRODUCTS = 800
CAPTIONED_USERS = 1  # a catalogue has users; these have nothing to do
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Laboratory:
    """What is drawn."""

    products: int = DemoConfig.products
    users: int = DemoConfig.users
    backbone_steps: int = DemoConfig.backbone_steps
    seed: int = DemoConfig.seed
    catalogue: CatalogueSettings = field(default_factory=CatalogueSettings)
    second: bool = False  # another catalogue besides


STUDY = Laboratory(
    backbone_steps=700,
    catalogue=CatalogueSettings(noise=35.0, jitter=1.6, colours=10, looks=(2.8, 1.2), told_by_brand=0.6),
    second=True,
)
"""A catalogue in which one modality can stand in for the other, so that training may leave the weaker one behind.

Users choose by looks more than by words (weight 0.7 on average). Pictures show what they look for, noisily; a title
tells the colour of three products in five through its brand, and nothing of the pattern. The picture is the strong
view, the title holds less, and part of what it holds twice: SFT fits the picture, and the title's vectors fall back
towards where they started, the longer it trains.
"""
QUICK = replace(STUDY, products=200, users=60, backbone_steps=20)
"""That of `vlm2rec study --demo --quick`."""


@dataclass(frozen=True)
class Stage:
    """One part of the drawing: what it is called, what it does in words, the folder it writes, and its call."""

    name: str
    what: str
    output: str
    call: Callable[[], object]


def draw_laboratory(folder: Path, wanted: Laboratory, redo: bool = False) -> None:
    """Draw what is missing of a laboratory; what a killed run left half done is drawn again.

    Args:
        folder: of the laboratory.
        wanted: sizes, seed and how hard the catalogue is.
        redo: draw a laboratory of other settings anew, in place of refusing it.

    Raises:
        ConfigError: the folder holds a laboratory of other settings.
    """
    settings = json.loads(json.dumps(asdict(wanted)))  # as it comes back from the file
    known = _read(folder)
    before = known.get("settings", settings)  # those of an older laboratory are not known
    if before != settings:
        name = next(name for name in settings if before.get(name) != settings[name])
        if not redo:
            raise ConfigError(
                f"{folder} was drawn with other settings: {name} was {before.get(name)} and is now {settings[name]}",
                "the same settings, to go on",
                "give another --out, or --redo to draw it again",
            )
        known = {}
    record = {"settings": settings, "done": known.get("done", []), "stages": known.get("stages", [])}
    folder.mkdir(parents=True, exist_ok=True)
    schema.write_json(folder / DONE_FILE, record)
    for each in plan(folder, wanted):
        if each.output in record["done"]:
            continue
        headline(each.name, each.what)
        _clear(folder / each.output)
        started = time.perf_counter()
        each.call()
        record["done"].append(each.output)
        seconds = round(time.perf_counter() - started, 2)
        record["stages"].append({"stage": each.name, "what": each.what, "seconds": seconds})
        schema.write_json(folder / DONE_FILE, record)


def is_laboratory(folder: Path) -> bool:
    """Whether a folder is one that this module began to draw."""
    return (folder / DONE_FILE).is_file() and "done" in _read(folder)


def drawn_stages(folder: Path) -> list[Json]:
    """Return what was done to draw a laboratory, and the seconds it took; nothing where that was not noted."""
    return list(_read(folder).get("stages", []))


def _read(folder: Path) -> Json:
    if not (folder / DONE_FILE).is_file():
        return {}
    return schema.read_json(folder / DONE_FILE, "what the laboratory holds", f"remove {folder}")


def _clear(path: Path) -> None:
    if path.is_symlink():
        path.unlink()  # what it leads to is not ours
    elif path.is_dir():
        shutil.rmtree(path)


def plan(folder: Path, wanted: Laboratory) -> list[Stage]:
    """Return the stages in order; each reads what earlier ones wrote.

    The backbone learns from products of its own: a model that has read the captions of those it is tested on knows
    their looks by their titles.
    """
    catalogue, captioned = folder / "catalogue", folder / "captioned"
    backbone = MakeBackboneConfig(
        items=captioned / "items.parquet",
        images=captioned / "images",
        out=folder / "backbone",
        minutes=BACKBONE_MINUTES,
        max_steps=wanted.backbone_steps,
        seed=wanted.seed,
    )
    stages = [
        Stage(
            "draw the catalogue",
            f"{wanted.products} products, {wanted.users} users",
            "catalogue",
            lambda: draw_catalogue(catalogue, wanted.products, wanted.users, wanted.seed, wanted.catalogue),
        ),
        Stage(
            "draw captioned products",
            f"{CAPTIONED_PRODUCTS} others, for the backbone to learn from",
            "captioned",
            lambda: draw_catalogue(captioned, CAPTIONED_PRODUCTS, CAPTIONED_USERS, wanted.seed + 1, wanted.catalogue),
        ),
        Stage(
            "prepare",
            "k-core, leave-one-out, candidate sets",
            "data",
            lambda: _prepare(catalogue, folder / "data", "Drawn catalogue"),
        ),
        Stage(
            "make-backbone",
            "a small Qwen2.5-VL that reads such titles and pictures",
            "backbone",
            lambda: _run("make_backbone", backbone),
        ),
    ]
    if wanted.second:
        what = "another catalogue, for cross-domain"
        stages.append(Stage("draw and prepare", what, "second-data", lambda: _second_catalogue(folder, wanted)))
    return stages


def _second_catalogue(folder: Path, wanted: Laboratory) -> None:
    """Draw other products and other people, under ids of their own."""
    second = folder / "second"
    draw_catalogue(second, wanted.products, wanted.users, wanted.seed + 2, wanted.catalogue)
    for name, ids in (("items", [schema.ITEM_ID]), ("interactions", [schema.USER_ID, schema.ITEM_ID])):
        table = pl.read_parquet(second / f"{name}.parquet")
        table = table.with_columns(pl.concat_str(pl.lit("second-"), pl.col(column)).alias(column) for column in ids)
        table.write_parquet(second / f"{name}.parquet")
    _prepare(second, folder / "second-data", "Second drawn catalogue")


def _prepare(catalogue: Path, data: Path, name: str) -> None:
    _run(
        "prepare",
        PrepareConfig(
            items=catalogue / "items.parquet",
            interactions=catalogue / "interactions.parquet",
            images=catalogue / "images",
            out=data,
            name=name,
            core=largest_core(catalogue / "interactions.parquet", catalogue / "items.parquet"),
        ),
    )


def _run(command: str, config: Any) -> None:
    """Run a command, which lies above this folder; its libraries are loaded now."""
    module_of(command).run(config)


def largest_core(interactions: Path, items: Path, most: int = 5, keep: float = 0.9) -> int:
    """Return the largest k up to `most` for which a share `keep` of the products was chosen k times or more.

    The default catalogue takes the usual 5; a small one would be emptied by it.
    """
    counts = pl.read_parquet(interactions).group_by(schema.ITEM_ID).len()["len"]
    products = pl.read_parquet(items, columns=[schema.ITEM_ID]).height
    fitting = [core for core in range(1, most + 1) if (counts >= core).sum() >= keep * products]
    return max(fitting, default=1)
