"""The laboratories of `vlm2rec demo` and `vlm2rec study --demo`: a drawn catalogue and a small backbone trained for it.

laboratory/catalogue              drawn products, with the attributes they were drawn from
laboratory/captioned              other products, with captions; the backbone is trained on these
laboratory/data, backbone         the output of `vlm2rec prepare` and `vlm2rec make-backbone`
laboratory/second, second-data    a second catalogue with its own users, for cross-domain
laboratory/laboratory.json        name, settings, the finished stages and their seconds
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
from vlm2rec.pipelines.synthetic.looks_catalogue import LooksSettings, draw_looks_catalogue

FOLDER = "laboratory"
DONE_FILE = "laboratory.json"
# The number of steps ends the training, so that every machine makes the same backbone; the minutes stop a hopeless one.
BACKBONE_MINUTES = 20.0
CAPTIONED_PRODUCTS = 800
CAPTIONED_USERS = 1  # a catalogue needs users; nobody reads those of this one
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Laboratory:
    """The settings of a laboratory."""

    products: int = DemoConfig.products
    users: int = DemoConfig.users
    backbone_steps: int = DemoConfig.backbone_steps
    seed: int = DemoConfig.seed
    catalogue: CatalogueSettings | LooksSettings = field(default_factory=CatalogueSettings)
    second: bool = False  # draw a second catalogue too


STUDY = Laboratory(
    backbone_steps=700,
    catalogue=CatalogueSettings(noise=35.0, jitter=1.6, colours=10, looks=(2.8, 1.2), told_by_brand=0.6),
    second=True,
)
"""A catalogue in which one modality can replace the other, so that training may neglect the weaker one.

Users choose by looks more than by words (weight 0.7 on average). Pictures show the looks with noise. A title tells the
colour of three products in five through its brand, and nothing about the pattern. So the picture is the strong view,
and part of the title's information is in the picture too. SFT fits the picture, and the longer it trains, the more the
title's vectors fall back towards their start.
"""
LOOKS = Laboratory(products=1920, users=2400, backbone_steps=700, catalogue=LooksSettings(), second=True)
"""A catalogue with titles as shops print them, in which the title suffices in training and looks decide at test.

`looks_catalogue` says how. Made for a backbone that has read something (`--backbone`), whose text is the strong view.
"""
LABORATORIES = {"brands": STUDY, "looks": LOOKS}
"""The laboratories of `vlm2rec study --demo`, by the name that `--laboratory` gives."""


def laboratory_of(name: str, quick: bool = False) -> Laboratory:
    """Return a laboratory by its name; with `quick`, the small one of `vlm2rec study --demo --quick`."""
    whole = LABORATORIES[name]
    return replace(whole, products=200, users=60, backbone_steps=20) if quick else whole


@dataclass(frozen=True)
class Stage:
    """One stage of making a laboratory: its name, a description, the folder it writes, and its call."""

    name: str
    what: str
    output: str
    call: Callable[[], object]


def draw_laboratory(folder: Path, wanted: Laboratory, redo: bool = False, backbone: bool = True) -> None:
    """Make the missing parts of a laboratory; a part that a killed run left unfinished is made again.

    Args:
        folder: of the laboratory.
        wanted: its settings.
        redo: make a laboratory of other settings again, instead of refusing it.
        backbone: train a small backbone too; without it, another has to be given to the study.

    Raises:
        ConfigError: the folder holds a laboratory of other settings.
    """
    settings = json.loads(json.dumps(asdict(wanted)))  # in the form that reading the file gives
    known = _read(folder)
    before = known.get("settings", settings)  # older laboratories did not record theirs
    if before != settings:
        names = _name_of(before), _name_of(settings)
        if names[0] != names[1] and not redo:
            raise ConfigError(
                f"{folder} holds the laboratory {names[0]!r}, and {names[1]!r} is asked for",
                "one laboratory in a study folder",
                f"give another --out, --laboratory {names[0]}, or --redo to draw it again",
            )
        name = next(name for name in settings if before.get(name) != settings[name])
        if not redo:
            raise ConfigError(
                f"{folder} was drawn with other settings: {name} was {before.get(name)} and is now {settings[name]}",
                "the same settings, to continue",
                "give another --out, or --redo to draw it again",
            )
        known = {}
    record = {"settings": settings, "done": known.get("done", []), "stages": known.get("stages", [])}
    folder.mkdir(parents=True, exist_ok=True)
    schema.write_json(folder / DONE_FILE, record)
    for each in plan(folder, wanted):
        if each.output in record["done"] or (not backbone and each.output in _FOR_THE_BACKBONE):
            continue
        headline(each.name, each.what)
        _clear(folder / each.output)
        started = time.perf_counter()
        each.call()
        record["done"].append(each.output)
        seconds = round(time.perf_counter() - started, 2)
        record["stages"].append({"stage": each.name, "what": each.what, "seconds": seconds})
        schema.write_json(folder / DONE_FILE, record)


_FOR_THE_BACKBONE = ("captioned", "backbone")


def _name_of(settings: Json) -> str:
    """Return the name of the laboratory with these recorded settings."""
    return "looks" if "kinds" in settings.get("catalogue", {}) else "brands"


def is_laboratory(folder: Path) -> bool:
    """Tell whether this module began to make a laboratory in a folder."""
    return (folder / DONE_FILE).is_file() and "done" in _read(folder)


def drawn_stages(folder: Path) -> list[Json]:
    """Return the finished stages of a laboratory with their seconds; an empty list if none were recorded."""
    return list(_read(folder).get("stages", []))


def _read(folder: Path) -> Json:
    if not (folder / DONE_FILE).is_file():
        return {}
    return schema.read_json(folder / DONE_FILE, "the record of a laboratory", f"remove {folder}")


def _clear(path: Path) -> None:
    if path.is_symlink():
        path.unlink()  # the folder that it leads to is not ours
    elif path.is_dir():
        shutil.rmtree(path)


def plan(folder: Path, wanted: Laboratory) -> list[Stage]:
    """Return the stages in order; each reads the output of earlier ones.

    The backbone is trained on other products than it is tested on. Trained on the captions of the same products, it
    would know their looks from their titles.
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
            lambda: _draw(catalogue, wanted.products, wanted.users, wanted.seed, wanted.catalogue),
        ),
        Stage(
            "draw captioned products",
            f"{CAPTIONED_PRODUCTS} other products, to train the backbone",
            "captioned",
            lambda: _draw(captioned, CAPTIONED_PRODUCTS, CAPTIONED_USERS, wanted.seed + 1, wanted.catalogue),
        ),
        Stage(
            "prepare",
            "k-core, leave-one-out, candidate sets",
            "data",
            lambda: _prepare(catalogue, folder / "data", "Drawn catalogue"),
        ),
        Stage(
            "make-backbone",
            "a small Qwen2.5-VL for such titles and pictures",
            "backbone",
            lambda: _run("make_backbone", backbone),
        ),
    ]
    if wanted.second:
        what = "a second catalogue, for cross-domain"
        stages.append(Stage("draw and prepare", what, "second-data", lambda: _second_catalogue(folder, wanted)))
    return stages


def _draw(out: Path, products: int, users: int, seed: int, settings: CatalogueSettings | LooksSettings) -> None:
    if isinstance(settings, LooksSettings):
        draw_looks_catalogue(out, products, users, seed, settings)
    else:
        draw_catalogue(out, products, users, seed, settings)


def _second_catalogue(folder: Path, wanted: Laboratory) -> None:
    """Draw other products and other users, with their own ids."""
    second = folder / "second"
    _draw(second, wanted.products, wanted.users, wanted.seed + 2, wanted.catalogue)
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
    """Run a command, importing its module only now."""
    module_of(command).run(config)


def largest_core(interactions: Path, items: Path, most: int = 5, keep: float = 0.9) -> int:
    """Return the largest k up to `most` for which at least the share `keep` of the products was chosen k times or more.

    For the default catalogue this is the usual 5, which would remove nearly all of a small one.
    """
    counts = pl.read_parquet(interactions).group_by(schema.ITEM_ID).len()["len"]
    products = pl.read_parquet(items, columns=[schema.ITEM_ID]).height
    fitting = [core for core in range(1, most + 1) if (counts >= core).sum() >= keep * products]
    return max(fitting, default=1)
