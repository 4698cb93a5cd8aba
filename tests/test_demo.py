"""The demo, run for real in a small form: every stage, every output, and the numbers in its report."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.pipelines import demo
from vlm2rec.pipelines.config import DemoConfig
from vlm2rec.pipelines.synthetic import laboratory

SMALL: dict[str, Any] = {
    "products": 200,
    "users": 60,
    "finetune_steps": 4,
    "recommender_epochs": 2,
    "backbone_steps": 20,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A small demo, run once: its folder, and its report as text."""
    out = tmp_path_factory.mktemp("runs") / "demo"
    report = demo.run(DemoConfig(out=out, **SMALL))
    assert report == out / "report.html"
    return out, report.read_text(encoding="utf-8")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_stage_leaves_its_output(finished: tuple[Path, str]) -> None:
    out, _ = finished
    for name in ("vanilla", "sft", "vlm2rec"):
        assert read(out / f"embeddings-{name}" / "manifest.json")["views"] == ["fused", "text", "image"]
        assert read(out / f"evaluate-{name}" / "metrics.json")["task"] == 1
    for model in ("SASRec", "GRU4Rec"):
        assert read(out / f"recommender-{model}-id" / "metrics.json")["start"] == "id"
        for name in ("vanilla", "sft", "vlm2rec"):
            assert read(out / f"recommender-{model}-{name}" / "metrics.json")["start"] == "fused"
    for loss in ("sft", "vlm2rec"):
        assert len(read(out / f"adapter-{loss}" / "curves.json")["train"]) >= 1
        assert (out / f"adapter-{loss}" / "adapter_model.safetensors").stat().st_size > 10_000
    assert (out / "backbone" / "config.json").is_file()
    assert (out / "index" / "items.faiss").is_file()
    assert (out / "catalogue" / "truth.json").is_file()


def test_all_methods_are_measured_on_the_same_users_and_items(finished: tuple[Path, str]) -> None:
    out, _ = finished
    dataset = read(out / "data" / "dataset.json")
    metrics = [read(path) for path in out.glob("*/metrics.json")]
    assert len(metrics) == 3 + 2 * 4
    assert {(m["users"], m["items"]) for m in metrics} == {(dataset["users"], dataset["items"])}
    assert dataset["users"] == 60
    assert dataset["items"] >= 170


def test_fine_tuning_changes_the_vectors_and_the_two_losses_differ(finished: tuple[Path, str]) -> None:
    out, _ = finished
    vectors = [
        pl.read_parquet(out / f"embeddings-{name}" / "part-00000.parquet")["fused"].to_numpy()
        for name in ("vanilla", "sft", "vlm2rec")
    ]
    assert vectors[0].shape == vectors[1].shape == vectors[2].shape
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert abs(vectors[first] - vectors[second]).max() > 1e-4


def test_demo_json_tells_what_ran_how_long_and_with_which_settings(finished: tuple[Path, str]) -> None:
    out, _ = finished
    record = read(out / "demo.json")
    assert record["finished"] is True
    assert record["settings"] == {**SMALL, "seed": 0}
    assert len(record["stages"]) == 26
    assert [stage["stage"] for stage in record["stages"]][-3:] == ["build-index", "search", "report"]
    assert all(stage["seconds"] >= 0 for stage in record["stages"])
    assert record["seconds"] == pytest.approx(sum(stage["seconds"] for stage in record["stages"]), rel=0.05)
    assert {"vlm2rec", "python", "torch", "recbole"} <= set(record["versions"])


def test_the_report_prints_the_numbers_that_the_stages_measured(finished: tuple[Path, str]) -> None:
    out, page = finished
    text = html.unescape(page)
    for folder, path in (("evaluate-vlm2rec", ["f2f"]), ("recommender-SASRec-id", []), ("recommender-GRU4Rec-sft", [])):
        values = read(out / folder / "metrics.json")["candidates"]
        for key in path:
            values = values[key]
        for metric in ("H@10", "H@20", "N@10", "N@20"):
            assert f">{values[metric]:.3f}".replace(">0.", ">.") in text
    assert "Left out" not in text
    assert page.count("<svg") == 5
    assert len(re.findall(r"\.p\d+ \{ background-image: url\(data:", page)) > 30
    for title in pl.read_parquet(out / "data" / "items.parquet")["title"].head(1):
        assert title in text


def test_the_catalogue_reaches_the_recommenders_nearly_whole(finished: tuple[Path, str]) -> None:
    out, _ = finished
    drawn = pl.read_parquet(out / "catalogue" / "interactions.parquet")
    kept = read(out / "data" / "dataset.json")["interactions"]
    assert kept >= 0.8 * drawn.height


def test_the_summary_names_every_method_and_the_report(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = finished
    demo._summary(out, 61.0, out / "report.html")
    printed = capsys.readouterr().err
    value = read(out / "evaluate-sft" / "metrics.json")["candidates"]["f2f"]["N@20"]
    assert f"{value:.3f}" in printed
    for words in ("ID", "Vanilla", "SFT", "VLM2Rec", "Task 2, GRU4Rec", "report.html", "1:01"):
        assert words in printed


# --- the run folder, without running ------------------------------------------------------------------------


def test_a_folder_with_anything_else_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"is not empty and holds no demo\.json"):
        demo.run(DemoConfig(out=tmp_path, **SMALL))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_demo_json_of_somebody_else_gives_no_right_to_remove(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text('{"name": "my own file"}')
    (tmp_path / "data").mkdir()
    with pytest.raises(ConfigError, match="of an earlier demo"):
        demo.start_clean(tmp_path)
    assert (tmp_path / "data").is_dir()


def test_an_earlier_demo_is_removed_and_what_was_put_beside_it_stays(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text(json.dumps({"written_by": "vlm2rec demo", "finished": False}))
    for name in ("embeddings-sft", "recommender-SASRec-id", "figures", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / "report.html").write_text("old")
    demo.start_clean(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"demo.json", "notes"}


def test_a_link_in_an_earlier_demo_is_removed_and_its_target_stays(tmp_path: Path) -> None:
    target, out = tmp_path / "elsewhere", tmp_path / "run"
    target.mkdir()
    out.mkdir()
    (target / "file").write_text("x")
    (out / "demo.json").write_text(json.dumps({"written_by": "vlm2rec demo"}))
    (out / "data").symlink_to(target)
    demo.start_clean(out)
    assert not (out / "data").exists()
    assert (target / "file").read_text() == "x"


def test_an_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        demo.start_clean(tmp_path / "file")


def test_the_core_is_the_largest_that_keeps_nine_products_of_ten(tmp_path: Path) -> None:
    counts = [2] * 5 + [4] * 25 + [9] * 70  # 95 of 100 products were chosen four times or more
    chosen = [f"P{item}" for item, count in enumerate(counts) for _ in range(count)]
    pl.DataFrame({"item_id": [f"P{item}" for item in range(100)]}).write_parquet(tmp_path / "items.parquet")
    pl.DataFrame({"item_id": chosen}).write_parquet(tmp_path / "interactions.parquet")
    core = laboratory.largest_core(tmp_path / "interactions.parquet", tmp_path / "items.parquet")
    assert core == 4
    assert laboratory.largest_core(tmp_path / "interactions.parquet", tmp_path / "items.parquet", keep=0.99) == 2


def test_no_two_stages_write_the_same_output(tmp_path: Path) -> None:
    stages = laboratory.plan(DemoConfig(out=tmp_path))
    outputs = [stage.output for stage in stages if stage.output]
    assert len(outputs) == len(set(outputs))
    assert outputs[:4] == ["catalogue", "captioned", "data", "backbone"]
    assert outputs[-1] == "report.html"
