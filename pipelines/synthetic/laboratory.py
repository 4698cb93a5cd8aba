"""The laboratory of `vlm2rec study --demo`: drawn catalogues with known truth, and a small backbone that reads them.

laboratory/catalogue, captioned, data, backbone   as `vlm2rec demo` makes them
laboratory/second, second-data                    another catalogue with users of its own, for cross-domain
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from vlm2rec.embedder.contract import schema
from vlm2rec.pipelines import config as settings
from vlm2rec.pipelines import prepare
from vlm2rec.pipelines.config import DemoConfig, PrepareConfig, StudyConfig
from vlm2rec.pipelines.console import log
from vlm2rec.pipelines.reporting.style import ID, SFT, VANILLA, VLM2REC, method_name
from vlm2rec.pipelines.synthetic.drawn_catalogue import CatalogueSettings, draw_catalogue

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
    for stage in plan(drawn, LABORATORY):
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
            core=largest_core(second / "interactions.parquet", second / "items.parquet"),
        )
    )


LOSSES = (SFT, VLM2REC)
TABLES = (VANILLA, *LOSSES)
MODELS = ("SASRec", "GRU4Rec")
LEARNING_RATE = 1e-3  # of the small backbone's adapter; the paper's 1e-5 is for three billion parameters
BATCH_SIZE = 8
BACKBONE_MINUTES = 20.0  # steps decide, so that a busy machine makes the same backbone; this ends a hopeless one
VALID_USERS = 100
CAPTIONED_PRODUCTS = 800
CAPTIONED_USERS = 1  # a catalogue has users; these have nothing to do


@dataclass(frozen=True)
class Stage:
    """One command of the line: what it is called, what it does in words, the output it writes, and its call."""

    command: str
    what: str
    output: str
    call: Callable[[], Any]


def plan(config: DemoConfig, drawn: CatalogueSettings | None = None) -> list[Stage]:
    """Return the stages in order; each reads what earlier ones wrote.

    Args:
        config: sizes, steps and seed.
        drawn: how hard pictures and titles are and how users choose; default: the catalogue's own.
    """
    run = config.out
    catalogue, data, backbone = run / "catalogue", run / "data", run / "backbone"
    # the backbone learns from products of its own: a model that has read the captions of those it is tested on knows
    # their looks by their titles
    captioned = run / "captioned"
    backbone_config = settings.MakeBackboneConfig(
        items=captioned / "items.parquet",
        images=captioned / "images",
        out=backbone,
        minutes=BACKBONE_MINUTES,
        max_steps=config.backbone_steps,
        seed=config.seed,
    )
    stages = [
        Stage(
            "draw the catalogue",
            f"{config.products} products, {config.users} users",
            "catalogue",
            lambda: draw_catalogue(catalogue, config.products, config.users, config.seed, drawn),
        ),
        Stage(
            "draw captioned products",
            f"{CAPTIONED_PRODUCTS} others, for the backbone to learn from",
            "captioned",
            lambda: draw_catalogue(captioned, CAPTIONED_PRODUCTS, CAPTIONED_USERS, config.seed + 1, drawn),
        ),
        Stage("prepare", "k-core, leave-one-out, candidate sets", "data", lambda: _prepare(catalogue, data)),
        Stage(
            "make-backbone",
            "a small Qwen2.5-VL that reads such titles and pictures",
            "backbone",
            _call("make_backbone", backbone_config),
        ),
    ]
    for loss in LOSSES:
        stages.append(_finetune(config, loss))
    for table in TABLES:
        stages += _embed_and_rank(run, table)
    for model in MODELS:
        stages += [_recommend(config, model, start) for start in (ID, *TABLES)]
    index = settings.BuildIndexConfig(embeddings=run / f"embeddings-{VLM2REC}", out=run / "index", data=data)
    stages += [
        Stage("build-index", "FAISS over the VLM2Rec vectors", "index", _call("build_index", index)),
        Stage("search", "neighbours of one product", "", lambda: _search(run)),
        Stage(
            "report", "one page about all of it", "report.html", _call("report", settings.ReportConfig(run=config.out))
        ),
    ]
    return stages


def _call(module: str, config: Any, function: str = "run") -> Callable[[], Any]:
    """Return a call of a stage; its libraries are loaded when it is made."""
    return lambda: getattr(import_module(f"vlm2rec.pipelines.{module}"), function)(config)


def _prepare(catalogue: Path, data: Path) -> None:
    core = largest_core(catalogue / "interactions.parquet", catalogue / "items.parquet")
    config = settings.PrepareConfig(
        items=catalogue / "items.parquet",
        interactions=catalogue / "interactions.parquet",
        images=catalogue / "images",
        out=data,
        name="Drawn catalogue",
        core=core,
    )
    _call("prepare", config)()


def largest_core(interactions: Path, items: Path, most: int = 5, keep: float = 0.9) -> int:
    """Return the largest k up to `most` for which a share `keep` of the products was chosen k times or more.

    The default catalogue takes the usual 5; a small one would be emptied by it.
    """
    counts = pl.read_parquet(interactions).group_by(schema.ITEM_ID).len()["len"]
    products = pl.read_parquet(items, columns=[schema.ITEM_ID]).height
    fitting = [core for core in range(1, most + 1) if (counts >= core).sum() >= keep * products]
    return max(fitting, default=1)


def _finetune(config: DemoConfig, loss: str) -> Stage:
    adapter = settings.FinetuneConfig(
        data=config.out / "data",
        backbone=str(config.out / "backbone"),
        out=config.out / f"adapter-{loss}",
        loss="sft" if loss == SFT else "vlm2rec",
        learning_rate=LEARNING_RATE,
        batch_size=BATCH_SIZE,
        max_steps=config.finetune_steps,
        epochs=1.0 + math.ceil(config.finetune_steps * BATCH_SIZE / config.users),  # so that max_steps ends it
        valid_users=VALID_USERS,
        gradient_checkpointing=False,  # saves memory that a small model does not need
        seed=config.seed,
    )
    what = f"{config.finetune_steps} steps of {method_name(loss)}"
    return Stage(f"finetune --loss {adapter.loss}", what, f"adapter-{loss}", _call("finetune", adapter))


def _embed_and_rank(run: Path, table: str) -> list[Stage]:
    """Export one table, check it, and rank with it."""
    data, backbone, embeddings = run / "data", str(run / "backbone"), run / f"embeddings-{table}"
    adapter = None if table == VANILLA else run / f"adapter-{table}"
    export = settings.ExportConfig(data=data, backbone=backbone, adapter=adapter, out=embeddings)
    verify = settings.VerifyConfig(embeddings=embeddings)
    ranked = run / f"evaluate-{table}"
    evaluate = settings.EvaluateConfig(data=data, backbone=backbone, adapter=adapter, embeddings=embeddings, out=ranked)
    name = method_name(table)
    return [
        Stage("export-items", f"{name} vectors of every product", embeddings.name, _call("export_items", export)),
        Stage("verify", f"{name} vectors against their manifest", "", _call("verify", verify)),
        Stage("evaluate", f"Task 1 with {name} vectors", ranked.name, _call("evaluate", evaluate)),
    ]


def _recommend(config: DemoConfig, model: str, start: str) -> Stage:
    output = f"recommender-{model}-{start}"
    recommender = settings.TrainRecommenderConfig(
        data=config.out / "data",
        out=config.out / output,
        model=model,
        embeddings=None if start == ID else config.out / f"embeddings-{start}",
        max_epochs=config.recommender_epochs,
        seed=config.seed,
    )
    what = "from ids alone" if start == ID else f"from {method_name(start)} vectors"
    return Stage(f"train-recommender --model {model}", what, output, _call("train_recommender", recommender))


def _search(run: Path) -> None:
    first = pl.read_parquet(run / "data" / schema.ITEMS_FILE, columns=[schema.ITEM_ID])[schema.ITEM_ID][0]
    _call("build_index", settings.SearchConfig(index=run / "index", item=first, k=5), "search")()
