"""`vlm2rec demo`: the whole pipeline on a drawn catalogue. A page of neighbours comes early, the whole page at the end.

The demo is a study with one seed. It has three methods and one recommender, with `--full` four and two.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import polars as pl

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.export.lock import writing
from vlm2rec.embedder.export.processes import shared_cores
from vlm2rec.pipelines import build_index, study, verify
from vlm2rec.pipelines.config import BuildIndexConfig, DemoConfig, SearchConfig, StudyConfig, VerifyConfig
from vlm2rec.pipelines.console import headline, inner_command, log
from vlm2rec.pipelines.experiments import results
from vlm2rec.pipelines.experiments.methods import DEMO_FILE, Json, Run, Step
from vlm2rec.pipelines.experiments.schedule import Failure, Schedule, clock, plan_schedule, run_steps, settle_changes
from vlm2rec.pipelines.read_config import read_yaml
from vlm2rec.pipelines.synthetic.laboratory import FOLDER, Laboratory, draw_laboratory

WRITTEN_BY = "vlm2rec demo"


def run(config: DemoConfig) -> Path:
    """Draw a catalogue, run the stages on it, and return the path of the page.

    The page is drawn twice: with the neighbours alone when the backbone's vectors are there, and at the end. The same
    command continues an interrupted demo, also with `full`. It makes again what was made with other settings.

    Raises:
        ConfigError: the folder holds something that is not an earlier demo.
        ArtifactError: another demo writes to the same folder.
    """
    begun = time.perf_counter()
    study.require_own_folder(config.out, WRITTEN_BY)
    with writing(config.out, lock_file=study.LOCK_FILE), shared_cores(JOBS):
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
        study.announce(schedule, schedule.runs, todo, JOBS)
        settings = {key: value for key, value in asdict(config).items() if key != "out"}
        study.remember(schedule, study_config, WRITTEN_BY, demo=settings)
        failures = _run_stages(schedule, todo, begun)
        if not failures:
            study.remember(schedule, study_config, WRITTEN_BY, demo=settings, **_run_closing_stages(schedule))
        page = study.draw_report(schedule)
    results.print_tables(config.out)
    log.result(f"Finished in {clock(time.perf_counter() - begun)}. Open {page.resolve()}", soft_wrap=True, markup=False)
    if failures:
        raise failures[0].error
    log.result(_what_it_shows(config), soft_wrap=True, markup=False)
    return page


JOBS = min(2, os.cpu_count() or 1)
"""Steps at a time. The models are so small that a second thread gains them little; a second process does gain."""


def _run_stages(schedule: Schedule, todo: Sequence[tuple[Run, Step]], begun: float) -> list[Failure]:
    """Run the steps of the study; draw a first page as soon as the vectors of the backbone as it is are there."""
    first = [(run, step) for run, step in todo if run.seed is None and step.done == schema.MANIFEST_FILE]
    # the runs that train are the longest: side by side with the others, they come first
    rest = sorted((each for each in todo if each not in first), key=lambda each: each[0].method.source != "finetune")
    failures = run_steps(schedule, first, later=rest)
    if first and not failures:
        page = study.draw_report(schedule)
        log.print(
            f"A first page after {clock(time.perf_counter() - begun)}: open {page.resolve()}\n"
            "It shows neighbours in the vectors of the backbone before fine-tuning. It is drawn again at the end.",
            style="bold",
            soft_wrap=True,
        )
    unavailable = {failure.step.folder for failure in failures}
    rest = [(run, step) for run, step in rest if not unavailable.intersection(step.after)]
    return failures + run_steps(schedule, rest, JOBS, before=len(first))


def _demo_study(config: DemoConfig) -> Json:
    """Return the settings of `demo.yaml`, with the steps and epochs of the flags."""
    chosen = read_yaml(DEMO_FILE)
    more = chosen.pop("full")
    if config.full:
        chosen |= more
    return chosen | {
        "finetune": chosen["finetune"] | {"max_steps": config.finetune_steps},
        "recommender": {"max_epochs": config.recommender_epochs},
    }


def _what_it_shows(config: DemoConfig) -> str:
    """Return what the tables tell, what they cannot tell, and what else one may try."""
    if config.full:
        shown = "VLM2Rec and SFT are about even here: in this catalogue text and image are equally easy to learn."
        more = ""
    else:
        shown = (
            "VLM2Rec beside Vanilla shows what fine-tuning does. It does not show that VLM2Rec's own losses do it: for"
            " that, --full trains SFT too, with the plain contrastive loss."
        )
        more = (
            f"  vlm2rec demo --full --out {shlex.quote(str(config.out))}    SFT and GRU4Rec too; continues from here\n"
        )
    return (
        f"{shown}\nTry:\n{more}  vlm2rec init    for your own catalogue: writes the settings of the pipeline, which"
        " `vlm2rec run` runs"
    )


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
