"""`vlm2rec demo`: the whole line on a drawn catalogue, from pictures to a page: a study of four methods, one seed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import polars as pl

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.export.lock import writing
from vlm2rec.pipelines import build_index, study, verify
from vlm2rec.pipelines.config import BuildIndexConfig, DemoConfig, SearchConfig, StudyConfig, VerifyConfig
from vlm2rec.pipelines.console import headline, log
from vlm2rec.pipelines.experiments import results
from vlm2rec.pipelines.experiments.methods import DEMO_FILE, Json
from vlm2rec.pipelines.experiments.schedule import Schedule, clock, plan_schedule, run_steps, settle_changes
from vlm2rec.pipelines.read_config import read_yaml
from vlm2rec.pipelines.synthetic.laboratory import FOLDER, Laboratory, draw_laboratory

WRITTEN_BY = "vlm2rec demo"


def run(config: DemoConfig) -> Path:
    """Draw a catalogue, run every stage on it, and return the path of the page.

    The same command goes on with a demo that was interrupted; what was made with other settings is made again.

    Raises:
        ConfigError: the folder holds something that is not an earlier demo.
        ArtifactError: another demo writes to the same folder.
    """
    begun = time.perf_counter()
    study.require_own_folder(config.out, WRITTEN_BY)
    with writing(config.out):
        folder = config.out / FOLDER
        wanted = Laboratory(
            products=config.products, users=config.users, backbone_steps=config.backbone_steps, seed=config.seed
        )
        draw_laboratory(folder, wanted, redo=True)
        asked = StudyConfig(
            out=config.out, data=folder / "data", backbone=str(folder / "backbone"), seeds=(config.seed,), redo=True
        )
        schedule = plan_schedule(asked, _laid_over(config))
        settle_changes(schedule, redo=True)
        todo = schedule.unfinished(schedule.runs)
        study.announce(schedule, schedule.runs, todo, aloud=True)
        settings = {key: value for key, value in asdict(config).items() if key != "out"}
        study.remember(schedule, asked, WRITTEN_BY, demo=settings)
        failures = run_steps(schedule, todo, aloud=True)
        if not failures:
            study.remember(schedule, asked, WRITTEN_BY, demo=settings, **_use_the_vectors(schedule))
        page = study.draw_report(schedule)
    results.print_tables(config.out)
    log.print(f"{clock(time.perf_counter() - begun)} minutes. Open {page.resolve()}", soft_wrap=True, markup=False)
    if failures:
        raise failures[0].error
    return page


def _laid_over(config: DemoConfig) -> Json:
    """Return the study of `demo.yaml` with steps and epochs as the flags say."""
    found = read_yaml(DEMO_FILE)
    return found | {
        "finetune": found["finetune"] | {"max_steps": config.finetune_steps},
        "recommender": {"max_epochs": config.recommender_epochs},
    }


def _use_the_vectors(schedule: Schedule) -> Json:
    """Check every table, build an index over the last and search it; return what was done and what was measured."""
    done = []
    for name, what, call in _uses(schedule):
        headline(name, what)
        started = time.perf_counter()
        call()
        done.append({"stage": name, "what": what, "seconds": round(time.perf_counter() - started, 2)})
    return {
        "after": done,
        "index": schema.read_json(schedule.out / "index" / schema.INDEX_FILE, "an index", "run it again"),
    }


def _uses(schedule: Schedule) -> Iterator[tuple[str, str, Callable[[], object]]]:
    data, index = schedule.home.data, schedule.out / "index"
    tables = {
        each.method.name: step.folder
        for each in schedule.runs
        for step in each.steps
        if step.done == schema.MANIFEST_FILE
    }
    for name, folder in tables.items():
        check = partial(verify.run, VerifyConfig(embeddings=folder))
        yield "verify", f"{name} vectors against their manifest", check
    name = schedule.study.reference
    build = BuildIndexConfig(embeddings=tables[name], out=index, data=data)
    yield "build-index", f"FAISS over the {name} vectors", partial(build_index.run, build)
    first = pl.read_parquet(data / schema.ITEMS_FILE, columns=[schema.ITEM_ID])[schema.ITEM_ID][0]
    query = SearchConfig(index=index, item=first, k=5)
    yield "search", "neighbours of one product", partial(build_index.search, query)
