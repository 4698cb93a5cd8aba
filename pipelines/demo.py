"""`vlm2rec demo`: runs every stage on a drawn catalogue and ends with a page: a study of four methods, one seed."""

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
from vlm2rec.pipelines.console import headline, inner_command, log
from vlm2rec.pipelines.experiments import results
from vlm2rec.pipelines.experiments.methods import DEMO_FILE, Json
from vlm2rec.pipelines.experiments.schedule import Schedule, clock, plan_schedule, run_steps, settle_changes
from vlm2rec.pipelines.read_config import read_yaml
from vlm2rec.pipelines.synthetic.laboratory import FOLDER, Laboratory, draw_laboratory

WRITTEN_BY = "vlm2rec demo"


def run(config: DemoConfig) -> Path:
    """Draw a catalogue, run every stage on it, and return the path of the page.

    The same command continues an interrupted demo. It makes again what was made with other settings.

    Raises:
        ConfigError: the folder holds something that is not an earlier demo.
        ArtifactError: another demo writes to the same folder.
    """
    begun = time.perf_counter()
    study.require_own_folder(config.out, WRITTEN_BY)
    with writing(config.out, lock_file=study.LOCK_FILE):
        folder = config.out / FOLDER
        wanted = Laboratory(
            products=config.products, users=config.users, backbone_steps=config.backbone_steps, seed=config.seed
        )
        draw_laboratory(folder, wanted, redo=True)
        study_config = StudyConfig(
            out=config.out, data=folder / "data", backbone=str(folder / "backbone"), seeds=(config.seed,), redo=True
        )
        schedule = plan_schedule(study_config, _demo_study(config))
        settle_changes(schedule, redo=True)
        todo = schedule.unfinished(schedule.runs)
        study.announce(schedule, schedule.runs, todo, to_terminal=True)
        settings = {key: value for key, value in asdict(config).items() if key != "out"}
        study.remember(schedule, study_config, WRITTEN_BY, demo=settings)
        failures = run_steps(schedule, todo, to_terminal=True)
        if not failures:
            study.remember(schedule, study_config, WRITTEN_BY, demo=settings, **_run_closing_stages(schedule))
        page = study.draw_report(schedule)
    results.print_tables(config.out)
    log.result(f"Finished in {clock(time.perf_counter() - begun)}. Open {page.resolve()}", soft_wrap=True, markup=False)
    if failures:
        raise failures[0].error
    return page


def _demo_study(config: DemoConfig) -> Json:
    """Return the settings of `demo.yaml`, with the steps and epochs of the flags."""
    defaults = read_yaml(DEMO_FILE)
    return defaults | {
        "finetune": defaults["finetune"] | {"max_steps": config.finetune_steps},
        "recommender": {"max_epochs": config.recommender_epochs},
    }


def _run_closing_stages(schedule: Schedule) -> Json:
    """Run the stages after the study; return them with their seconds, and the description of the index."""
    done: list[Json] = []
    for name, what, call in _closing_stages(schedule):
        headline(name, what)
        started = time.perf_counter()
        with inner_command():
            call()
        done.append({"stage": name, "what": what, "seconds": round(time.perf_counter() - started, 2)})
    return {
        "after": done,
        "index": schema.read_json(schedule.out / "index" / schema.INDEX_FILE, "an index", "run it again"),
    }


def _closing_stages(schedule: Schedule) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Yield (command, what it does, call): verify every table, then index the reference's vectors and search them."""
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
    yield "search", "the neighbours of one product", partial(build_index.search, query)
