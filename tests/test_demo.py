"""The demo, run for real at a tenth of its size: every output, stopped and gone on with, the numbers on its pages."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.pipelines import demo
from vlm2rec.pipelines.config import DemoConfig, StudyConfig
from vlm2rec.pipelines.experiments import workers
from vlm2rec.pipelines.experiments.methods import Step, read_study
from vlm2rec.pipelines.synthetic import laboratory
from vlm2rec.pipelines.what_now import what_now

SMALL: dict[str, Any] = {  # the defaults by ten, as far as they go
    "products": 200,
    "users": 60,
    "finetune_steps": 12,
    "recommender_epochs": 2,
    "backbone_steps": 26,
}
FOLDERS = {"vanilla": "vanilla/seed-any", "vlm2rec": "vlm2rec/seed-0"}


@dataclass
class Finished:
    """A small demo: its folder, its page, and what there was when it was stopped on the way."""

    out: Path
    page: str
    first_page: str
    first_said: str
    first_steps: dict[str, str]  # marks of the steps that were done


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """A small demo in this process, stopped with Ctrl-C after fine-tuning, and gone on with."""
    out = tmp_path_factory.mktemp("runs") / "demo"
    perform = workers.perform

    def stopped(file: Path | None, step: Step) -> workers.Outcome:
        if step.command == "evaluate":
            raise KeyboardInterrupt
        return perform(file, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "JOBS", 1)
        patch.setattr(laboratory, "CAPTIONED_PRODUCTS", 120)
        patch.setattr(workers, "perform", stopped)
        said = io.StringIO()
        with pytest.raises(KeyboardInterrupt), contextlib.redirect_stderr(said):
            demo.run(DemoConfig(out=out, **SMALL))
        first = (out / "report.html").read_text(encoding="utf-8"), said.getvalue(), marks(out)
        patch.setattr(workers, "perform", perform)
        assert demo.run(DemoConfig(out=out, **SMALL)) == out / "report.html"
        yield Finished(out, (out / "report.html").read_text(encoding="utf-8"), *first)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def metrics_of(out: Path) -> dict[str, Any]:
    """What both tasks measured, by folder, without paths and times."""
    found = {str(path.parent.relative_to(out)): read(path) for path in out.glob("*/*/*/metrics.json")}
    names = ("task", "users", "items", "candidates", "candidates_std", "full", "geometry")
    return {folder: {name: each.get(name) for name in names} for folder, each in found.items()}


def marks(out: Path) -> dict[str, str]:
    """A mark per step that is new whenever the step was run."""
    return {
        f"{path.parent.relative_to(out)}/{name}": record["mark"]
        for path in out.rglob("steps.json")
        for name, record in read(path).items()
        if record["finished"]
    }


def facts(out: Path) -> dict[str, Any]:
    return {row["key"]: json.loads(row["value"]) for row in pl.read_parquet(out / "about.parquet").to_dicts()}


def test_a_page_of_neighbours_is_there_before_anything_is_trained(finished: Finished) -> None:
    trained = {"vlm2rec/seed-0/adapter", "vlm2rec/seed-0/embeddings"}
    assert set(finished.first_steps) == {"vanilla/seed-any/embeddings", *trained}
    path = (finished.out / "report.html").resolve()
    assert re.search(rf"A first page after \d+:\d\d: open {re.escape(str(path))}\n", finished.first_said)
    page = html.unescape(finished.first_page)
    for words in ("So far there are vectors, and nothing has been measured", "in the Vanilla vectors", "by both"):
        assert words in page
    for words in ("Gates", "Task 1", "VLM2Rec vectors", "N@20 is"):
        assert words not in page
    assert page.count('class="card"') >= 6 and "So far" not in finished.page


def test_after_a_stop_it_goes_on_and_what_was_done_is_kept(finished: Finished) -> None:
    assert finished.first_steps.items() <= marks(finished.out).items()
    drawn = read(finished.out / "laboratory" / "laboratory.json")["stages"]
    assert [each["stage"] for each in drawn].count("make-backbone") == 1


def test_every_stage_leaves_its_output(finished: Finished) -> None:
    out = finished.out
    for folder in FOLDERS.values():
        assert read(out / folder / "embeddings" / schema.MANIFEST_FILE)["views"] == ["fused", "text", "image"]
        assert read(out / folder / "evaluate" / "metrics.json")["task"] == 1
    assert read(out / "id" / "seed-0" / "recommender-SASRec" / "metrics.json")["start"] == "id"
    for name in FOLDERS:
        assert read(out / name / "seed-0" / "recommender-SASRec" / "metrics.json")["start"] == "fused"
    adapter = out / "vlm2rec" / "seed-0" / "adapter"
    assert len(read(adapter / "curves.json")["train"]) >= 1
    assert (adapter / "adapter_model.safetensors").stat().st_size > 10_000
    assert (out / "laboratory" / "backbone" / "config.json").is_file()
    assert (out / "laboratory" / "catalogue" / "truth.json").is_file()
    assert (out / "index" / "items.faiss").is_file()
    assert not (out / "sft").exists() and not list(out.glob("*/*/recommender-GRU4Rec"))


def test_all_methods_are_measured_on_the_same_users_and_items(finished: Finished) -> None:
    dataset = read(finished.out / "laboratory" / "data" / "dataset.json")
    metrics = metrics_of(finished.out)
    assert len(metrics) == 2 + 3
    assert {(m["users"], m["items"]) for m in metrics.values()} == {
        (dataset["users"], dataset["items"] - dataset["cold_items"])
    }
    assert dataset["users"] == 60
    assert dataset["items"] >= 170


def test_fine_tuning_changes_the_vectors(finished: Finished) -> None:
    vectors = [
        pl.read_parquet(finished.out / folder / "embeddings" / "part-00000.parquet")["fused"].to_numpy()
        for folder in FOLDERS.values()
    ]
    assert vectors[0].shape == vectors[1].shape
    assert abs(vectors[0] - vectors[1]).max() > 1e-4


def test_the_flags_decide_what_the_stages_are_told(finished: Finished) -> None:
    told = read(finished.out / "vlm2rec" / "seed-0" / "adapter" / "vlm2rec.json")["config"]
    assert (told["max_steps"], told["batch_size"], told["learning_rate"], told["seed"]) == (12, 8, 1e-3, 0)
    assert told["loss"] == "vlm2rec"
    assert read(finished.out / "id" / "seed-0" / "recommender-SASRec" / "metrics.json")["epochs"] <= 2


def test_full_has_all_four_methods_with_both_recommenders() -> None:
    study = StudyConfig(out=Path("out"))
    few, all_of_them = (read_study(study, more=demo._demo_study(DemoConfig(full=full))) for full in (False, True))
    assert [method.name for method in few.methods] == ["ID", "Vanilla", "VLM2Rec"]
    assert [method.name for method in all_of_them.methods] == ["ID", "Vanilla", "SFT", "VLM2Rec"]
    assert few.plan["main"].models == ("SASRec",) and all_of_them.plan["main"].models == ("SASRec", "GRU4Rec")
    assert few.method("VLM2Rec") == all_of_them.method("VLM2Rec") and few.finetune == all_of_them.finetune


def test_the_tables_tell_what_ran_how_long_and_with_which_settings(finished: Finished) -> None:
    known = facts(finished.out)
    assert known["demo"] == {**SMALL, "seed": 0, "full": False}
    drawn = ["draw the catalogue", "draw captioned products", "prepare", "make-backbone"]
    assert [each["stage"] for each in known["before"]] == drawn
    assert [each["stage"] for each in known["after"]] == ["verify"] * 2 + ["build-index", "search"]
    assert pl.read_parquet(finished.out / "cost.parquet").height == 1 + 2 + 2 + 3
    assert finished.page.count('<div class="bar"') == 4 + 8 + 4
    assert all(each["seconds"] >= 0 for each in (*known["before"], *known["after"]))
    assert {"vlm2rec", "python", "torch", "recbole"} <= set(known["versions"])
    assert known["settings"]["VLM2Rec"]["adapter"]["max_steps"] == 12


def test_the_page_prints_the_numbers_that_the_stages_measured(finished: Finished) -> None:
    out, page = finished.out, finished.page
    text = html.unescape(page)
    for folder in ("vlm2rec/seed-0/evaluate", "id/seed-0/recommender-SASRec", "vanilla/seed-0/recommender-SASRec"):
        measured = read(out / folder / "metrics.json")
        for protocol in ("candidates", "full"):
            values = measured[protocol].get("f2f", measured[protocol])
            for metric in ("H@10", "H@20", "N@10", "N@20"):
                assert f">{values[metric]:.4f}".replace(">0.", ">.") in text
    assert "vlm2rec demo" in text and "recall@10 1.0000 against exact search" in text
    assert page.count("<svg") == len(list((out / "figures").glob("*.svg"))) >= 6
    assert len(re.findall(r"\.p\d+ \{ background-image: url\(data:", page)) > 30
    for title in pl.read_parquet(out / "laboratory" / "data" / "items.parquet")["title"].head(1):
        assert title in text


def test_the_catalogue_reaches_the_recommenders_nearly_whole(finished: Finished) -> None:
    out = finished.out
    drawn = pl.read_parquet(out / "laboratory" / "catalogue" / "interactions.parquet")
    kept = read(out / "laboratory" / "data" / "dataset.json")["interactions"]
    assert kept >= 0.8 * drawn.height


# --- again, and after a kill --------------------------------------------------------------------------------


def test_the_same_command_again_runs_nothing_and_says_how_it_ended(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    out = finished.out
    before = marks(out)
    demo.run(DemoConfig(out=out, **SMALL))
    assert marks(out) == before
    captured = capsys.readouterr()
    assert "make-backbone" not in captured.err and "A first page" not in captured.err
    value = read(out / "vlm2rec" / "seed-0" / "evaluate" / "metrics.json")["candidates"]["f2f"]["N@20"]
    assert f"{value:.4f}" in captured.err
    for words in ("ID", "Vanilla", "VLM2Rec", "Task 2, SASRec", "report.html", "a random order: 0.070"):
        assert words in captured.err
    for words in (
        "It does not show that VLM2Rec's own losses do it",
        f"demo --full --out {out}",
        "vlm2rec init",
    ):
        assert words in captured.err
    assert captured.out.startswith("rank\titem_id\tcosine\ttitle\n1\tP")


def test_what_to_do_next_names_a_product_that_is_there() -> None:
    small, whole = (what_now("demo", DemoConfig(**more), None) for more in (SMALL, {}))
    assert small == "vlm2rec search --index runs/demo/index --item P0199 --html found.html"
    assert whole == "vlm2rec search --index runs/demo/index --item P0302 --html found.html"


def started(out: Path) -> subprocess.Popen[bytes]:
    """The demo with the flags of `SMALL`, as a process of its own."""
    flags = [text for name, value in SMALL.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-c", "from vlm2rec.pipelines.cli import main; main()", "demo", "--out", str(out)]
    with (out.parent / "said.txt").open("ab") as said:
        return subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL, stderr=said)


@pytest.mark.slow  # a killed study goes on in `test_study`, and a demo is one
def test_a_killed_demo_goes_on_and_ends_with_the_same_numbers(finished: Finished, tmp_path: Path) -> None:
    reference = finished.out
    out = tmp_path / "demo"
    out.mkdir()
    shutil.copytree(reference / "laboratory", out / "laboratory")  # drawing it takes half of the time
    drawn = {path: path.stat().st_mtime_ns for path in (out / "laboratory" / "backbone").iterdir()}
    steps = out / "vlm2rec" / "seed-0" / "steps.json"
    with started(out) as process:
        while process.poll() is None and not (steps.is_file() and "embeddings" in read(steps)):
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    done = marks(out)
    assert "vlm2rec/seed-0/adapter" in done and "vlm2rec/seed-0/evaluate" not in done
    assert "So far there are vectors" in (out / "report.html").read_text(encoding="utf-8")
    with started(out) as process:
        assert process.wait() == 0, (tmp_path / "said.txt").read_text()[-3000:]
    assert {name: mark for name, mark in marks(out).items() if name in done} == done
    assert {path: path.stat().st_mtime_ns for path in (out / "laboratory" / "backbone").iterdir()} == drawn
    assert metrics_of(out) == metrics_of(reference)
    assert (out / "index" / "items.faiss").is_file()
    assert "So far" not in (out / "report.html").read_text(encoding="utf-8")


def moved(finished: Finished, out: Path) -> Path:
    """A copy of the finished demo, as if it had lain there all the time."""
    shutil.copytree(finished.out, out)
    for path in out.rglob("steps.json"):
        path.write_text(path.read_text().replace(str(finished.out), str(out)))
    return out


@pytest.mark.slow
def test_other_settings_make_again_what_depends_on_them(finished: Finished, tmp_path: Path) -> None:
    out = moved(finished, tmp_path / "demo")
    before = marks(out)
    demo.run(DemoConfig(out=out, **SMALL | {"recommender_epochs": 1}))
    changed = {name for name, mark in marks(out).items() if mark != before[name]}
    assert changed == {name for name in before if "recommender" in name}
    assert facts(out)["demo"]["recommender_epochs"] == 1


@pytest.mark.slow
def test_full_goes_on_from_the_few_stages_and_back(finished: Finished, tmp_path: Path) -> None:
    out = moved(finished, tmp_path / "demo")
    before = marks(out)
    page = demo.run(DemoConfig(out=out, full=True, **SMALL)).read_text(encoding="utf-8")
    after = marks(out)
    assert before.items() <= after.items() and len(after) == 16
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"id", "vanilla", "sft", "vlm2rec"}
    assert page.count("<svg") == 8 and "GRU4Rec" in page
    demo.run(DemoConfig(out=out, **SMALL))
    assert marks(out) == after
    assert pl.read_parquet(out / "methods.parquet")["name"].to_list() == ["ID", "Vanilla", "VLM2Rec"]


# --- the folder, without running ----------------------------------------------------------------------------


def test_a_folder_with_anything_else_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty and not a study that `vlm2rec demo` began"):
        demo.run(DemoConfig(out=tmp_path, **SMALL))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("written_by", [None, "vlm2rec study"])
def test_a_study_of_somebody_else_gives_no_right_to_write(written_by: str | None, tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text(json.dumps({"name": "my own file", "written_by": written_by}))
    (tmp_path / "laboratory" / "data").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is not empty and not a study that `vlm2rec demo` began"):
        demo.run(DemoConfig(out=tmp_path, **SMALL))
    assert (tmp_path / "laboratory" / "data").is_dir()


def test_a_folder_called_laboratory_is_not_yet_one(tmp_path: Path) -> None:
    (tmp_path / "laboratory" / "data").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is not empty"):
        demo.run(DemoConfig(out=tmp_path, **SMALL))
    assert (tmp_path / "laboratory" / "data").is_dir()


def test_an_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        demo.run(DemoConfig(out=tmp_path / "file"))


# --- the laboratory -----------------------------------------------------------------------------------------


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages that write a file each; the list names those that were called."""
    called: list[str] = []

    def plan(folder: Path, wanted: laboratory.Laboratory) -> list[laboratory.Stage]:
        def write(name: str) -> None:
            called.append(name)
            (folder / name).mkdir()
            (folder / name / "made").write_text(str(wanted.products))

        return [laboratory.Stage(name, "", name, lambda name=name: write(name)) for name in ("catalogue", "data")]

    monkeypatch.setattr(laboratory, "plan", plan)
    return called


def test_a_laboratory_is_drawn_once_and_what_a_kill_left_is_drawn_again(pretended: list[str], tmp_path: Path) -> None:
    wanted = laboratory.Laboratory(products=300)
    laboratory.draw_laboratory(tmp_path, wanted)
    laboratory.draw_laboratory(tmp_path, wanted)
    assert pretended == ["catalogue", "data"]
    record = read(tmp_path / "laboratory.json")
    (tmp_path / "laboratory.json").write_text(json.dumps(record | {"done": ["catalogue"]}))
    (tmp_path / "data" / "half").write_text("x")
    laboratory.draw_laboratory(tmp_path, wanted)
    assert pretended == ["catalogue", "data", "data"]
    assert not (tmp_path / "data" / "half").exists()


def test_a_laboratory_of_other_settings_is_refused_or_drawn_anew(pretended: list[str], tmp_path: Path) -> None:
    laboratory.draw_laboratory(tmp_path, laboratory.Laboratory(products=300))
    (tmp_path / "notes").write_text("beside it")
    with pytest.raises(ConfigError, match=r"products was 300 and is now 200.*--redo"):
        laboratory.draw_laboratory(tmp_path, laboratory.Laboratory(products=200))
    laboratory.draw_laboratory(tmp_path, laboratory.Laboratory(products=200), redo=True)
    assert pretended == ["catalogue", "data"] * 2
    assert (tmp_path / "data" / "made").read_text() == "200"
    assert (tmp_path / "notes").read_text() == "beside it"


def test_a_laboratory_that_noted_no_settings_is_taken_as_it_is(pretended: list[str], tmp_path: Path) -> None:
    (tmp_path / "laboratory.json").write_text(json.dumps({"done": ["catalogue", "data"]}))
    laboratory.draw_laboratory(tmp_path, laboratory.Laboratory())
    assert pretended == []


def test_a_link_in_a_laboratory_is_removed_and_its_target_stays(pretended: list[str], tmp_path: Path) -> None:
    target, folder = tmp_path / "elsewhere", tmp_path / "laboratory"
    target.mkdir()
    folder.mkdir()
    (target / "file").write_text("x")
    (folder / "data").symlink_to(target)
    laboratory.draw_laboratory(folder, laboratory.Laboratory())
    assert not (folder / "data").is_symlink()
    assert (target / "file").read_text() == "x"


def test_the_laboratory_of_looks_is_a_dataset_with_the_looks_of_each_item(tmp_path: Path) -> None:
    quick = laboratory.laboratory_of("looks", quick=True)
    wanted = dataclasses.replace(quick, catalogue=dataclasses.replace(quick.catalogue, pixels=48))
    laboratory.draw_laboratory(tmp_path / "lab", wanted, backbone=False)
    assert sorted(path.name for path in (tmp_path / "lab").iterdir()) == [
        *("catalogue", "data", "laboratory.json", "second", "second-data")
    ]
    for name in ("data", "second-data"):
        dataset = Dataset(tmp_path / "lab" / name)
        assert len(dataset.user_ids) > 50
        items = pl.read_parquet(dataset.path / "items.parquet")
        assert items["looks"].n_unique() > 30 and items["category"].n_unique() == 24
    first, second = (Dataset(tmp_path / "lab" / name) for name in ("data", "second-data"))
    assert not set(first.item_ids) & set(second.item_ids) and not set(first.user_ids) & set(second.user_ids)
    outputs = [stage.output for stage in laboratory.plan(tmp_path, wanted)]
    assert outputs == ["catalogue", "captioned", "data", "backbone", "second-data"]


def test_one_laboratory_in_a_study_folder(pretended: list[str], tmp_path: Path) -> None:
    laboratory.draw_laboratory(tmp_path, laboratory.laboratory_of("brands"))
    with pytest.raises(ConfigError, match=r"holds the laboratory 'brands', and 'looks' is asked for.*--laboratory"):
        laboratory.draw_laboratory(tmp_path, laboratory.laboratory_of("looks"))
    laboratory.draw_laboratory(tmp_path, laboratory.laboratory_of("looks"), redo=True)
    assert laboratory.laboratory_of("brands") == laboratory.STUDY


def test_a_backbone_of_ones_own_needs_no_training_and_may_follow_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[str] = []

    def plan(folder: Path, wanted: laboratory.Laboratory) -> list[laboratory.Stage]:
        names = ("catalogue", "captioned", "data", "backbone")
        return [laboratory.Stage(name, "", name, lambda name=name: drawn.append(name)) for name in names]

    monkeypatch.setattr(laboratory, "plan", plan)
    laboratory.draw_laboratory(tmp_path, laboratory.LOOKS, backbone=False)
    assert drawn == ["catalogue", "data"]
    laboratory.draw_laboratory(tmp_path, laboratory.LOOKS)
    assert drawn == ["catalogue", "data", "captioned", "backbone"]


def test_the_core_is_the_largest_that_keeps_nine_products_of_ten(tmp_path: Path) -> None:
    counts = [2] * 5 + [4] * 25 + [9] * 70  # 95 of 100 products were chosen four times or more
    chosen = [f"P{item}" for item, count in enumerate(counts) for _ in range(count)]
    pl.DataFrame({"item_id": [f"P{item}" for item in range(100)]}).write_parquet(tmp_path / "items.parquet")
    pl.DataFrame({"item_id": chosen}).write_parquet(tmp_path / "interactions.parquet")
    core = laboratory.largest_core(tmp_path / "interactions.parquet", tmp_path / "items.parquet")
    assert core == 4
    assert laboratory.largest_core(tmp_path / "interactions.parquet", tmp_path / "items.parquet", keep=0.99) == 2


def test_no_two_stages_write_the_same_output(tmp_path: Path) -> None:
    outputs = [stage.output for stage in laboratory.plan(tmp_path, laboratory.STUDY)]
    assert outputs == ["catalogue", "captioned", "data", "backbone", "second-data"]
    assert [stage.output for stage in laboratory.plan(tmp_path, laboratory.Laboratory())] == outputs[:4]
