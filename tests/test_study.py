"""A whole study in small: two methods and more, two seeds, killed and gone on with, and drawn from its tables alone."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import scipy.stats
import yaml
from children import COMMAND, Forked
from study_world import Tiny, marks, settings

from vlm2rec.downstream.evaluation.metrics import bound_check
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError
from vlm2rec.pipelines import finetune, prepare, study
from vlm2rec.pipelines.config import PrepareConfig, StudyConfig
from vlm2rec.pipelines.experiments import ledger, results, schedule
from vlm2rec.pipelines.experiments.domains import shared_facts, shared_targets
from vlm2rec.pipelines.experiments.results import _RESULT, require_bound
from vlm2rec.pipelines.reporting import tables
from vlm2rec.pipelines.synthetic.drawn_catalogue import draw_catalogue


@pytest.fixture(scope="module")
def other_domain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder whose products and people are not those of `drawn_dataset`."""
    folder = tmp_path_factory.mktemp("other")
    draw_catalogue(folder / "catalogue", products=36, users=24, seed=5)
    for name, ids in (("items", ["item_id"]), ("interactions", ["user_id", "item_id"])):
        path = folder / "catalogue" / f"{name}.parquet"
        pl.read_parquet(path).with_columns((pl.lit("B") + pl.col(each)).alias(each) for each in ids).write_parquet(path)
    prepare.run(
        PrepareConfig(
            items=folder / "catalogue" / "items.parquet",
            interactions=folder / "catalogue" / "interactions.parquet",
            images=folder / "catalogue" / "images",
            out=folder / "data",
            name="Elsewhere",
            core=2,
            candidates=15,
            candidate_seeds=(0, 1),
        )
    )
    return folder / "data"


@pytest.fixture(scope="module")
def finished(tiny: Tiny, drawn_dataset: Path, other_domain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study, run without interruption; tests read it only."""
    folder = tmp_path_factory.mktemp("finished")
    config = settings(tiny, drawn_dataset, folder, cross_domain=[str(other_domain)])
    report = study.run(config)
    assert report == folder / "study" / "report.html"
    return folder / "study"


def again(out: Path, tmp_path: Path) -> Path:
    """Return a copy of a study that may be changed."""
    shutil.copytree(out.parent, tmp_path / "copy")
    return tmp_path / "copy"


# --- runs ---------------------------------------------------------------------------------------------------


def test_every_run_holds_the_folders_of_the_single_commands(finished: Path) -> None:
    found = {str(path.parent.relative_to(finished)) for path in finished.rglob("*/metrics.json")}
    trained = {f"{name}/seed-{seed}" for name in ("sft", "vlm2rec") for seed in (0, 1)}
    assert found == {
        *(f"{run}/{step}" for run in trained for step in ("evaluate", "recommender-SASRec")),
        *(f"{name}/seed-{seed}/recommender-SASRec" for name in ("id", "vanilla") for seed in (0, 1)),
        "vanilla/seed-any/evaluate",
        "without-crtr/seed-0/evaluate",
        "vlm2rec-lambda-0.5/seed-0/evaluate",
        "vlm2rec/seed-0/cross-0-evaluate",
    }
    for run in trained:
        assert (finished / run / "adapter" / "adapter_model.safetensors").is_file()
        assert (finished / run / "embeddings" / schema.MANIFEST_FILE).is_file()
    assert "vlm2rec finetune" in (finished / "sft" / "seed-0" / "log.txt").read_text()


def test_the_same_command_again_runs_nothing(tiny: Tiny, drawn_dataset: Path, finished: Path, tmp_path: Path) -> None:
    folder = again(finished, tmp_path)
    before = marks(folder / "study")
    keys = yaml.safe_load((folder / "study.yaml").read_text())
    assert len(before) == 30
    report = (folder / "study" / "report.html").read_bytes()
    study.run(settings(tiny, drawn_dataset, folder, **keys))
    assert marks(folder / "study") == before
    assert (folder / "study" / "report.html").read_bytes() == report


@pytest.mark.parametrize("name", ["curves.json", "vlm2rec.json"])
def test_a_file_of_a_step_that_was_damaged_is_named_and_made_again(
    name: str, tiny: Tiny, drawn_dataset: Path, finished: Path, tmp_path: Path
) -> None:
    folder = again(finished, tmp_path)
    keys = yaml.safe_load((folder / "study.yaml").read_text())
    file = folder / "study" / "sft" / "seed-0" / "adapter" / name
    before = file.read_text()
    file.write_text(re.sub(r'"(loss|rank|lora_rank)": \d', r'"\1": 9', before))
    assert file.read_text() != before
    with pytest.raises(ArtifactError, match=rf"{name} does not have .*remove .*adapter and run the study again"):
        study.run(settings(tiny, drawn_dataset, folder, **keys))


@pytest.mark.usefixtures("undrawn")
def test_a_changed_setting_is_refused_and_redone_on_request(
    tiny: Tiny, drawn_dataset: Path, finished: Path, tmp_path: Path
) -> None:
    folder = again(finished, tmp_path)
    before = marks(folder / "study")
    keys = yaml.safe_load((folder / "study.yaml").read_text())
    keys["methods"][3]["finetune"] = {"crtr": False, "beta": 2.0}
    with pytest.raises(ConfigError, match=r"w/o CRTR, seed 0, adapter: beta was 1\.0 and is now 2\.0.*--redo"):
        study.run(settings(tiny, drawn_dataset, folder, **keys))
    assert marks(folder / "study") == before
    study.run(settings(tiny, drawn_dataset, folder, {"redo": True}, **keys))
    changed = {name for name, mark in marks(folder / "study").items() if mark != before[name]}
    assert changed == {f"without-crtr/seed-0/{step}" for step in ("adapter", "embeddings", "evaluate")}
    saved = json.loads((folder / "study" / "without-crtr" / "seed-0" / "adapter" / "vlm2rec.json").read_text())
    assert saved["config"]["beta"] == 2.0


def test_other_data_under_the_same_path_are_refused(
    tiny: Tiny, drawn_dataset: Path, finished: Path, tmp_path: Path
) -> None:
    folder = again(finished, tmp_path)
    keys = yaml.safe_load((folder / "study.yaml").read_text())
    shutil.copytree(drawn_dataset, tmp_path / "data", symlinks=True)
    meta = json.loads((tmp_path / "data" / "dataset.json").read_text())
    meta["sha256"]["items.parquet"] = "0" * 64
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(meta))
    with pytest.raises(ConfigError, match="steps were run with other settings"):
        study.run(settings(tiny, tmp_path / "data", folder, **keys))


@pytest.mark.usefixtures("undrawn")
def test_a_backbone_that_was_trained_anew_under_its_name_is_refused(
    tiny: Tiny, drawn_dataset: Path, finished: Path, tmp_path: Path
) -> None:
    folder = again(finished, tmp_path)
    keys = yaml.safe_load((folder / "study.yaml").read_text())
    backbone = tmp_path / tiny("qwen2_5_vl").name
    shutil.copytree(tiny("qwen2_5_vl"), backbone)
    for path in folder.rglob("steps.json"):  # as if it had lain there all the time
        path.write_text(path.read_text().replace(str(tiny("qwen2_5_vl")), str(backbone)))
    flags = {"backbone": str(backbone)}
    before = marks(folder / "study")
    study.run(settings(tiny, drawn_dataset, folder, flags, **keys))
    assert marks(folder / "study") == before
    with (backbone / "config.json").open("a") as file:
        file.write(" ")
    ledger._backbone_mark.cache_clear()
    with pytest.raises(ConfigError, match="contents of backbone was"):
        study.run(settings(tiny, drawn_dataset, folder, flags, **keys))


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_study_goes_on_and_ends_with_the_same_numbers(
    tiny: Tiny, drawn_dataset: Path, finished: Path, tmp_path: Path, jobs: int
) -> None:
    keys = {"analyses": ["main"], "plan": {"main": {"seeds": [1], "tasks": [1, 2], "models": ["SASRec"]}}}
    config = settings(tiny, drawn_dataset, tmp_path, {"methods": ("SFT",), "jobs": jobs}, **keys)
    flags = [f"--{name}={getattr(config, name)}" for name in ("out", "data", "backbone", "config", "device")]
    process = Forked(COMMAND, "study", *flags, "--methods", "SFT", "--jobs", jobs)
    steps = config.out / "sft" / "seed-1" / "steps.json"
    while process.returncode is None and not (steps.is_file() and "embeddings" in json.loads(steps.read_text())):
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    killed = json.loads(steps.read_text())
    assert killed["adapter"]["finished"] and "recommender-SASRec" not in killed
    assert not _others_with_open_files_in(config.out)
    study.run(config)
    resumed = json.loads(steps.read_text())
    assert resumed["adapter"]["mark"] == killed["adapter"]["mark"]
    ours, theirs = (
        pl.read_parquet(out / "results.parquet").filter((pl.col("method") == "SFT") & (pl.col("seed") == 1))
        for out in (config.out, finished)
    )
    order = ["task", "protocol", "view", "user_group", "metric"]
    assert ours.sort(order)["value"].to_list() == theirs.sort(order)["value"].to_list()


def _others_with_open_files_in(folder: Path, patience: float = 5.0) -> set[str]:
    """Return the processes that still write to a folder; those that end within `patience` seconds do not count."""
    until = time.monotonic() + patience
    while True:
        found = set()
        for link in Path("/proc").glob("[0-9]*/fd/*"):
            with contextlib.suppress(OSError):
                if str(folder) in str(link.readlink()):
                    found.add(link.parts[2])
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.1)


# --- what is in the tables ----------------------------------------------------------------------------------


def test_the_results_are_what_the_commands_measured(finished: Path) -> None:
    results = pl.read_parquet(finished / "results.parquet").filter(pl.col("user_group") == "all")
    for method, seed, folder, task, view in (
        ("SFT", 1, "sft/seed-1/evaluate", 1, "t2f"),
        ("VLM2Rec", 0, "vlm2rec/seed-0/recommender-SASRec", 2, None),
        ("vanilla", 1, "vanilla/seed-any/evaluate", 1, "f2f"),  # one run stands for both seeds
    ):
        metrics = json.loads((finished / folder / "metrics.json").read_text())
        mine = results.filter(
            (pl.col("method") == method)
            & (pl.col("seed") == seed)
            & (pl.col("task") == task)
            & pl.col("view").eq_missing(pl.lit(view))
            & (pl.col("dataset") != "Elsewhere")
        )
        for protocol in ("candidates", "full"):
            expected = metrics[protocol] if view is None else metrics[protocol][view]
            found = mine.filter(pl.col("protocol") == protocol)
            assert dict(found.select("metric", "value").iter_rows()) == expected
            assert set(found["users"]) == {metrics["users"]}


def test_every_row_of_results_keeps_the_bound(finished: Path) -> None:
    results = pl.read_parquet(finished / "results.parquet")
    keys = ["method", "seed", "dataset", "task", "model", "protocol", "view", "user_group"]
    wide = results.pivot("metric", index=keys, values="value")
    assert wide.height > 50
    assert all(bound_check({name: row[name] for name in schema.METRICS}) for row in wide.iter_rows(named=True))


def test_a_row_that_no_ranking_gives_is_refused() -> None:
    values = {"H@10": 0.3, "H@20": 0.4, "N@10": 0.2, "N@20": 0.2}
    rows = [
        {**dict.fromkeys(_RESULT), "method": "m", "metric": name, "value": value, "users": 10}
        for name, value in values.items()
    ]
    with pytest.raises(ArtifactError, match="N@20 - N@10 between"):
        require_bound(pl.DataFrame(rows, schema=_RESULT))


def test_the_groups_of_users_are_split_by_the_frequency_of_their_target(finished: Path, drawn_dataset: Path) -> None:
    dataset = Dataset(drawn_dataset)
    frequency = dataset.train_frequency()[dataset.histories("test").targets]
    expected = {"0-2": frequency <= 2, "3-4": (frequency > 2) & (frequency <= 4), "5+": frequency > 4}
    expected = {name: inside for name, inside in expected.items() if inside.any()}
    results = pl.read_parquet(finished / "results.parquet").filter(
        (pl.col("method") == "SFT") & (pl.col("seed") == 0) & (pl.col("task") == 2) & (pl.col("metric") == "H@10")
    )
    tail = results.filter(pl.col("user_group") == "tail")  # beside the groups, not one of them
    assert tail["users"].to_list() == [int((frequency < 4).sum())] * bool((frequency < 4).any())
    groups = results.filter(~pl.col("user_group").is_in(["all", "tail"]))
    assert dict(groups.select("user_group", "users").iter_rows()) == {k: int(v.sum()) for k, v in expected.items()}
    users = pl.read_parquet(finished / "sft" / "seed-0" / "recommender-SASRec" / "users.parquet")
    one = users.filter(pl.col("protocol") == "candidates").group_by("user_id").agg(pl.col("H@10").mean())
    of_user = dict(one.iter_rows())
    for name, inside in expected.items():
        mean = np.mean([of_user[user] for user, there in zip(dataset.user_ids, inside, strict=True) if there])
        assert groups.filter(pl.col("user_group") == name)["value"].item() == pytest.approx(mean)


def test_comparisons_are_the_paired_tests_of_the_runs(finished: Path) -> None:
    results = pl.read_parquet(finished / "results.parquet").filter(
        (pl.col("task") == 2)
        & (pl.col("metric") == "N@20")
        & (pl.col("user_group") == "all")
        & (pl.col("protocol") == "candidates")
    )
    runs = {str(name): each.sort("seed")["value"].to_numpy() for (name,), each in results.group_by("method")}
    comparisons = pl.read_parquet(finished / "comparisons.parquet").filter(pl.col("task") == 2)
    assert set(comparisons["method"]) == {"ID", "vanilla", "SFT"}
    assert set(comparisons["family"]) == {"main"}
    for row in comparisons.iter_rows(named=True):
        theirs = scipy.stats.ttest_rel(runs["VLM2Rec"], runs[row["method"]])
        assert row["difference"] == pytest.approx(float(np.mean(runs["VLM2Rec"] - runs[row["method"]])), abs=1e-9)
        assert row["t"] == pytest.approx(theirs.statistic, rel=1e-5)
        assert row["p"] == pytest.approx(theirs.pvalue, rel=1e-5)
        assert row["p_holm"] >= row["p"]
        assert row["low"] <= row["difference"] <= row["high"]


def test_curves_and_cost_are_there(finished: Path) -> None:
    curves = pl.read_parquet(finished / "curves.parquet")
    assert {"train", "valid", "probe", "gradients"} <= set(curves["kind"])
    gradients = curves.filter((pl.col("kind") == "gradients") & (pl.col("method") == "SFT"))
    assert {"cos_total_text", "cos_total_image"} <= set(gradients["name"])
    cost = pl.read_parquet(finished / "cost.parquet")
    assert cost.height == 30
    assert (cost["seconds"] > 0).all() and (cost["attempts"] == 1).all()
    assert cost.filter(pl.col("command") == "finetune")["epochs"].to_list() == [0.5] * 6  # 2 steps of 4 an epoch


# --- cross-domain -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_a_target_domain_is_not_there_while_a_method_trains(
    tiny: Tiny,
    drawn_dataset: Path,
    other_domain: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, trained = finetune.run, []

    def without_the_other_domain(config: Any) -> Any:
        hidden = other_domain.with_name("hidden")
        other_domain.rename(hidden)
        try:
            trained.append(config.out.parent.name)
            return train(config)
        finally:
            hidden.rename(other_domain)

    monkeypatch.setattr(finetune, "run", without_the_other_domain)
    plan = {"cross-domain": {"seeds": [0], "tasks": [1], "models": []}}
    keys = {"analyses": ["cross-domain"], "plan": plan, "cross_domain": [str(other_domain)], "grids": []}
    config = settings(tiny, drawn_dataset, tmp_path, {"methods": ("VLM2Rec",)}, **keys)
    study.run(config)
    assert trained == ["seed-0"]
    # the adapter is that of the study that measures at home, bit for bit, and was made from home's files
    name = "vlm2rec/seed-0/adapter"
    ours, theirs = ((out / name / "adapter_model.safetensors").read_bytes() for out in (config.out, finished))
    assert ours == theirs
    made = json.loads((config.out / name / "vlm2rec.json").read_text())["dataset"]["sha256"]
    assert made == Dataset(drawn_dataset).meta["sha256"] != Dataset(other_domain).meta["sha256"]
    results = pl.read_parquet(config.out / "results.parquet")
    there = results.filter((pl.col("dataset") == "Elsewhere") & (pl.col("user_group") == "all"))
    assert set(there["users"]) == {len(Dataset(other_domain).user_ids)}


def test_a_target_domain_with_items_or_users_of_the_training_data_is_refused(
    drawn_dataset: Path, other_domain: Path
) -> None:
    home, there = Dataset(drawn_dataset), Dataset(other_domain)
    schedule.require_other_domain(home, there, "refuse")
    with pytest.raises(ConfigError, match=r"items of .* are in"):
        schedule.require_other_domain(home, home, "count")
    there.__dict__["user_ids"] = [*there.user_ids[:-1], home.user_ids[0]]
    with pytest.raises(ConfigError, match="1 users of"):
        schedule.require_other_domain(home, there, "refuse")
    schedule.require_other_domain(home, there, "count")


def test_shared_items_may_be_dropped_or_counted_if_a_user_is_left(drawn_dataset: Path, other_domain: Path) -> None:
    home, there = Dataset(drawn_dataset).warm(), Dataset(other_domain).warm()
    target = there.histories("test").targets[0]
    there.__dict__["item_ids"] = [
        home.item_ids[0] if row == target else item for row, item in enumerate(there.item_ids)
    ]
    with pytest.raises(ConfigError, match=r"1 items of .*`shared_items: drop`"):
        schedule.require_other_domain(home, there, "refuse")
    schedule.require_other_domain(home, there, "refuse", "drop")
    schedule.require_other_domain(home, there, "refuse", "count")
    hit = [row == target for row in there.histories("test").targets]
    assert shared_targets(home, there) == hit and any(hit) and not all(hit)
    assert shared_facts(home, there) == {"users": 0, "items": 1, "targets": sum(hit)}
    with pytest.raises(ConfigError, match="the next item of every user"):
        schedule.require_other_domain(home, home, "count", "drop")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("rule", ["drop", "count"])
def test_users_whose_next_item_is_shared_are_left_out_or_measured_and_counted(
    rule: str, finished: Path, drawn_dataset: Path, other_domain: Path, tiny: Tiny, tmp_path: Path
) -> None:
    """The finished study, collected again with a target domain that shares the next item of some users."""
    out = tmp_path / "study"
    shutil.copytree(finished, out)
    before = pl.read_parquet(out / "results.parquet")
    config = settings(tiny, drawn_dataset, tmp_path, cross_domain=[str(other_domain)])
    schedule_ = schedule.plan_schedule(dataclasses.replace(config, out=out))
    domain, home = schedule_.domains[0], Dataset(drawn_dataset).warm()
    there = Dataset(other_domain).warm()
    target = there.histories("test").targets[0]
    shared = [user for user, row in zip(there.user_ids, there.histories("test").targets, strict=True) if row == target]
    items = [home.item_ids[0] if row == target else item for row, item in enumerate(there.item_ids)]

    def opened(path: Path) -> Dataset:
        found = Dataset(path)
        if Path(path) == domain.data:
            warm = found.warm()
            warm.__dict__["item_ids"] = items
            found.warm = lambda: warm  # type: ignore[method-assign]
        return found

    study_ = dataclasses.replace(schedule_.study, shared_items=rule)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "Dataset", opened)
        results.collect(study_, out, schedule_.runs, schedule_.home, schedule_.domains)
    after = pl.read_parquet(out / "results.parquet")
    here, away = pl.col("dataset") == schedule_.home.name, pl.col("dataset") == domain.name
    assert after.filter(here).equals(before.filter(here))
    everyone = len(there.user_ids)
    measured = after.filter(away & (pl.col("user_group") == "all"))
    assert set(measured["users"]) == {everyone - (len(shared) if rule == "drop" else 0)}
    users = pl.read_parquet(out / "users.parquet").filter(away)
    assert set(shared).isdisjoint(users["user_id"]) == (rule == "drop")
    if rule == "count":
        assert after.equals(before)
    f2f = measured.filter((pl.col("view") == "f2f") & (pl.col("protocol") == "candidates"))
    for row in f2f.iter_rows(named=True):
        mine = users.filter((pl.col("method") == row["method"]) & (pl.col("seed") == row["seed"]))
        mine = mine.filter(pl.col("task") == 1)
        assert row["value"] == pytest.approx(mine[row["metric"]].mean())
    facts = results.facts(out)
    assert facts["shared"][domain.name] == {"users": 0, "items": 1, "targets": len(shared)}
    text = study.run(StudyConfig(out=out, report_only=True)).read_text(encoding="utf-8")
    words = {"drop": "are left out of this table", "count": "are measured too"}[rule]
    assert f"the {len(shared):,} users whose next item is one of them {words}" in text


# --- the page -----------------------------------------------------------------------------------------------


def test_tables_and_figures_come_from_the_parquet_files_alone(finished: Path, tmp_path: Path) -> None:
    for path in finished.glob("*.parquet"):
        shutil.copy(path, tmp_path)
    assert study.run(StudyConfig(out=tmp_path, report_only=True)) == tmp_path / "report.html"
    assert (tmp_path / "report.html").read_bytes() == (finished / "report.html").read_bytes()
    drawn = sorted(path.name for path in (finished / "figures").iterdir())
    assert drawn == sorted(f"{name}.{ending}" for name in FIGURES for ending in ("png", "svg"))
    for name in drawn:
        assert (tmp_path / "figures" / name).read_bytes() == (finished / "figures" / name).read_bytes()


FIGURES = (
    "collapse",
    "collapse-ranks",
    "differences",
    "fig1a-views",
    "fig1b-gradients",
    "fig3-cold-start",
    "fig5-sensitivity",
    "learning",
    "table1-geometry",
    "task2-models",
)


def test_the_page_prints_the_means_beside_the_papers_rows(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    values = [
        json.loads((finished / f"sft/seed-{seed}/evaluate/metrics.json").read_text())["candidates"]["f2f"]["N@20"]
        for seed in (0, 1)
    ]
    mean, std = f"{np.mean(values):.4f}"[1:], f"{np.std(values, ddof=1):.4f}"[1:]
    assert re.search(rf">\s*{re.escape(mean)}<small>±{re.escape(std)}</small>", page)
    for printed in (".3300", ".4121", ".3932", ".2592", "1.2134"):  # the paper's Beauty rows
        assert (printed in page) == (printed != ".2592")  # w/o WPCL was not run, so its row is not printed
    assert "Qwen2.5-VL-3B" in page and "without replacement" in page
    assert page.count("<svg") == len(FIGURES)
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", page)
    for section in (
        "Task 1",
        "Task 2",
        "Geometry",
        "trained here, measured on other data",
        "Rare items",
        "disagree most",
        "What ran",
    ):
        assert section in page


def test_a_misprint_of_the_paper_is_marked() -> None:
    cells, breaks = tables._paper_cells({"Beauty": (0.41, 0.5794, 0.2941, 0.3498)}, "Beauty")
    assert breaks and cells[3].text == ".3498†"
    cells, breaks = tables._paper_cells({"Beauty": (0.5644, 0.6822, 0.3824, 0.4121)}, "Beauty")
    assert not breaks and cells[3].text == ".4121"


@pytest.mark.usefixtures("undrawn")
def test_titles_from_the_catalogue_are_escaped(finished: Path, tmp_path: Path) -> None:
    for path in finished.glob("*.parquet"):
        shutil.copy(path, tmp_path)
    pictures = pl.read_parquet(tmp_path / "pictures.parquet")
    pictures.with_columns(pl.lit("<script>alert(1)</script>").alias("title")).write_parquet(
        tmp_path / "pictures.parquet"
    )
    page = study.run(StudyConfig(out=tmp_path, report_only=True)).read_text(encoding="utf-8")
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
