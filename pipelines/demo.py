"""`vlm2rec demo`: the whole line on a drawn catalogue, in process, from pictures to a report."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import math
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import polars as pl
from rich.table import Table

from vlm2rec.embedder import schema
from vlm2rec.embedder.errors import ConfigError
from vlm2rec.pipelines import config as settings
from vlm2rec.pipelines.catalogue import CatalogueSettings, draw_catalogue
from vlm2rec.pipelines.config import DemoConfig
from vlm2rec.pipelines.console import log
from vlm2rec.pipelines.report_folder import (
    DEMO_FILE,
    ID,
    METRICS_FILE,
    SFT,
    VANILLA,
    VLM2REC,
    Json,
    method_name,
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
LIBRARIES = ("vlm2rec", "torch", "transformers", "peft", "recbole", "faiss-cpu", "polars", "pyarrow", "numpy")
WRITTEN_BY = "vlm2rec demo"


@dataclass(frozen=True)
class Stage:
    """One command of the line: what it is called, what it does in words, the output it writes, and its call."""

    command: str
    what: str
    output: str
    call: Callable[[], Any]


def run(config: DemoConfig) -> Path:
    """Draw a catalogue, run every stage on it, and return the path of the report.

    An earlier demo in the same folder is replaced; `demo.json` says what ran, with what settings and how long.

    Raises:
        ConfigError: the run folder holds something that is not an earlier demo.
    """
    start_clean(config.out)
    stages = plan(config)
    record: Json = {
        "written_by": WRITTEN_BY,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "finished": False,
        "settings": {key: value for key, value in dataclasses.asdict(config).items() if key != "out"},
        "versions": library_versions(),
        "stages": [],
        "seconds": 0.0,
    }
    schema.write_json(config.out / DEMO_FILE, record)
    begun = time.perf_counter()
    for number, stage in enumerate(stages, 1):
        _headline(number, len(stages), stage, time.perf_counter() - begun)
        started = time.perf_counter()
        stage.call()
        record["stages"].append(
            {
                "stage": stage.command,
                "what": stage.what,
                "output": stage.output,
                "seconds": round(time.perf_counter() - started, 2),
            }
        )
        record["seconds"] = round(time.perf_counter() - begun, 2)
        record["finished"] = number == len(stages)
        schema.write_json(config.out / DEMO_FILE, record)
    report = config.out / "report.html"
    _summary(config.out, record["seconds"], report)
    return report


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


# --- the run folder -----------------------------------------------------------------------------------------


def start_clean(folder: Path) -> None:
    """Make the run folder ready: remove what an earlier demo wrote there, and nothing else.

    Raises:
        ConfigError: the folder holds files, and no `demo.json` of an earlier demo among them.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file", "a folder to write", "choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        return
    if not _is_demo(folder):
        raise ConfigError(
            f"--out {folder} is not empty and holds no {DEMO_FILE} of an earlier demo",
            "an empty folder, a new one, or that of an earlier demo, which is replaced",
            "choose another --out",
        )
    for output in sorted({stage.output for stage in plan(DemoConfig(out=folder)) if stage.output} | {"figures"}):
        _remove(folder / output)


def _is_demo(folder: Path) -> bool:
    """Whether `demo.json` is there and ours: a stranger's file of that name gives no right to remove anything."""
    if not (folder / DEMO_FILE).is_file():
        return False
    fix = "choose another --out, or remove the folder yourself"
    return bool(schema.read_json(folder / DEMO_FILE, f"the {DEMO_FILE} of a demo", fix).get("written_by") == WRITTEN_BY)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide what comes out."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


# --- what the person sees -----------------------------------------------------------------------------------


def _headline(number: int, total: int, stage: Stage, elapsed: float) -> None:
    log.rule(
        f"[bold]{number}/{total}  {stage.command}[/]  [dim]{stage.what} · {_clock(elapsed)}[/]",
        align="left",
        style="dim",
    )


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def _summary(run: Path, seconds: float, report: Path) -> None:
    """Print N@20 of every method in both tasks, and where the report lies."""
    table = Table(
        title="N@20 on 101 candidates (a random order: .070)", title_justify="left", box=None, padding=(0, 3, 0, 0)
    )
    table.add_column("start", style="bold")
    for name in ("Task 1", *(f"Task 2, {model}" for model in MODELS)):
        table.add_column(name, justify="right")
    for method in (ID, *TABLES):
        cells = [_n20(run / f"evaluate-{method}", "f2f")]
        cells += [_n20(run / f"recommender-{model}-{method}") for model in MODELS]
        table.add_row(method_name(method), *cells, style="bold" if method == VLM2REC else None)
    log.print(table)
    log.print(f"{_clock(seconds)} minutes. Open {report.resolve()}", soft_wrap=True, markup=False)


def _n20(folder: Path, *view: str) -> str:
    if not (folder / METRICS_FILE).is_file():
        return "–"
    values: Any = schema.read_json(folder / METRICS_FILE, "metrics", "run the demo again")["candidates"]
    for key in view:
        values = values[key]
    return f"{values['N@20']:.3f}"
