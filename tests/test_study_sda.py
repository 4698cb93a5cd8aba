"""SDA as a row of a study: trained, exported and measured like every other method, with the long tail beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from study_world import SMALL, settings

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.pipelines import study
from vlm2rec.pipelines.config import StudyConfig
from vlm2rec.pipelines.experiments import methods

Tiny = Callable[[str], Path]


@pytest.mark.usefixtures("undrawn")
def test_sda_stands_beside_vlm2rec_in_both_tasks_and_in_the_tail(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path
) -> None:
    aligned = {"column": "concat", "adapter": "two-linear", "align_with": "Base", "align_weight": 0.1}
    rows = [
        {"name": "Base", "source": "id", "models": ["SASRec"]},
        {
            "name": "SDA",
            "source": "finetune",
            "finetune": {"method": "sda", "gradient_steps": 1},
            "recommender": {"BERT4Rec": aligned},
        },
        {"name": "VLM2Rec", "source": "finetune", "paper": "VLM2Rec"},
    ]
    common = SMALL["finetune"] | {"tau_wpcl": 0.2}  # which SDA does not have
    plan = {"main": {"seeds": [0], "tasks": [1, 2], "models": ["SASRec", "BERT4Rec"]}}
    keys = {"methods": rows, "grids": [], "finetune": common, "plan": plan, "analyses": ["main", "cold-start"]}
    keys |= {"tail_over": "all"}
    report = study.run(settings(tiny, drawn_dataset, tmp_path, **keys))
    assert report is not None
    results = pl.read_parquet(tmp_path / "study" / "results.parquet")
    measured = results.filter(pl.col("metric") == "N@10", pl.col("protocol") == "candidates")
    found = set(measured.select("method", "task", "model", "user_group").unique().iter_rows())
    for method in ("SDA", "VLM2Rec"):
        for group in ("all", "tail"):
            assert {(method, 1, None, group), (method, 2, "BERT4Rec", group)} <= found
    folder = tmp_path / "study"
    assert not (folder / "base" / "seed-0" / "recommender-BERT4Rec").exists(), "models: [SASRec]"
    told = {
        model: json.loads((folder / "sda" / "seed-0" / f"recommender-{model}" / "metrics.json").read_text())
        for model in ("SASRec", "BERT4Rec")
    }
    assert told["BERT4Rec"]["alignment"]["with"] == str(folder / "base" / "seed-0" / "recommender-SASRec")
    assert (told["BERT4Rec"]["start"], told["BERT4Rec"]["adapter"]) == ("concat", "two-linear")
    assert told["SASRec"]["start"] == "fused" and "alignment" not in told["SASRec"], "of BERT4Rec alone"
    page = report.read_text()
    assert "BERT4Rec, tail" in page and "occurs fewer than 4 times in all interactions" in page
    data = Dataset(drawn_dataset)
    below = int((data.frequency()[data.histories("test").targets] < 4).sum())
    assert results.filter(pl.col("user_group") == "tail")["users"].unique().to_list() == [below]
    for command in ("evaluate", "recommender-BERT4Rec"):
        tail = json.loads((tmp_path / "study" / "sda" / "seed-0" / command / "metrics.json").read_text())["tail"]
        assert (tail["over"], tail["users"]) == ("all", below)
    curves = pl.read_parquet(tmp_path / "study" / "curves.parquet").filter(pl.col("method") == "SDA")
    assert {"cos_text_image_q_proj", "cos_text_image_k_proj"} <= set(curves["name"].to_list())


BENCHMARKS = Path(__file__).parent / "benchmarks"


def existing(file: str, folder: Path) -> Path:
    """Copy a study file without the recommenders that this version does not have."""
    keys = yaml.safe_load((BENCHMARKS / file).read_text())
    known = set(schema.RECOMMENDERS)
    if not any(known & set(plan["models"]) for plan in keys["plan"].values()):
        known = {"SASRec"}
        keys["plan"] = {name: plan | {"models": ["SASRec"]} for name, plan in keys["plan"].items()}
        for method in keys["methods"]:
            method.pop("recommender", None)
    keys["plan"] = {
        name: plan | {"models": [m for m in plan["models"] if m in known]} for name, plan in keys["plan"].items()
    }
    for method in keys["methods"]:
        if "models" in method:
            method["models"] = [model for model in method["models"] if model in known]
    keys["methods"] = [method for method in keys["methods"] if method.get("models") != []]
    (folder / file).write_text(yaml.safe_dump(keys))
    return folder / file


def planned(file: str, tmp_path: Path, data: Path) -> dict[str, dict[str, Any]]:
    """Return the settings of every step of the first seed, by method and step."""
    config = StudyConfig(out=tmp_path / "study", data=data, backbone="bb", config=existing(file, tmp_path))
    read = methods.read_study(config)
    home = methods.Target("home", data)
    found: dict[str, dict[str, Any]] = {}
    for run in methods.runs(read, tmp_path / "study", home, [], "bb", "cpu"):
        for step in run.steps:
            found.setdefault(run.method.name, {}).setdefault(step.name, step.config)
    return found


def test_the_file_of_sdas_tables_trains_each_row_as_sda_does(drawn_dataset: Path, tmp_path: Path) -> None:
    found = planned("study_sda.yaml", tmp_path, drawn_dataset)
    assert {"Base (ids)", "Base (features)", "CLIP", "Backbone"} <= found.keys()
    assert {"SDA", "SDA w/o MoDA", "SDA w/o soft target"} <= found.keys()
    adapter = found["SDA"]["adapter"]
    assert (adapter.method, adapter.max_steps, adapter.learning_rate, adapter.item_text) == (
        *("sda", 4000, 2e-4, "attributes"),
    )
    assert found["SDA w/o MoDA"]["adapter"].experts == 1 and found["SDA w/o soft target"]["adapter"].cmsa == "off"
    vanilla = found["Backbone"]["embeddings"]
    for name in ("pooling", "prompt_style", "prompt_mode", "item_text", "max_title_tokens"):
        assert getattr(vanilla, name) == getattr(adapter, name), "the same prompts, without the adapter"
    for name in ("CLIP", "Backbone", "SDA"):
        for model in ("SASRec", "BERT4Rec"):
            asked = found[name][f"recommender-{model}"]
            table = tmp_path / "study" / "base-ids" / "seed-42" / "recommender-SASRec"
            assert (asked.align_with, asked.align_weight, asked.column) == (table, 0.1, "concat")
            assert (asked.tail_over, asked.batch_size, asked.adapter) == ("all", 512, "two-linear")
    assert found["Base (ids)"]["recommender-SASRec"].align_with is None


def test_on_two_cores_sdas_tables_are_trained_for_fewer_steps_and_otherwise_alike() -> None:
    whole, short = (
        methods.read_study(StudyConfig(out=Path("out"), config=BENCHMARKS / "study_sda.yaml", override=override))
        for override in (None, BENCHMARKS / "study_sda_two_cores.yaml")
    )
    assert short.methods == whole.methods and short.plan == whole.plan
    assert (short.finetune["max_steps"], short.finetune["method"]) == (76, "sda")
    for model, epochs in (("SASRec", 30), ("BERT4Rec", 10)):
        assert whole.recommender[model].items() <= short.recommender[model].items()
        assert (short.recommender[model]["pca"], short.recommender[model]["max_epochs"]) == (256, epochs)


def test_the_file_of_the_feature_study_has_five_strategies_beside_the_original(
    drawn_dataset: Path, tmp_path: Path
) -> None:
    found = planned("study_features.yaml", tmp_path, drawn_dataset)
    asked = [steps["embeddings"].strategy for name, steps in found.items() if name != "Original"]
    assert sorted(asked) == ["dual", "prompt1", "prompt2", "textual", "visual"]
    assert found["Original"]["embeddings"].file == Path("original.parquet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"align_with": "Vanilla"}, r"align_with 'Vanilla', whose source is 'backbone'"),
        ({"align_with": "Nobody"}, r"no method is called 'Nobody'"),
        ({"align_with": "Base"}, r"align_with 'Base', which trains no SASRec with seed 0"),
        ({"SASRec": 3}, r"SASRec: 3 among the settings of recommenders"),
    ],
)
def test_a_table_that_no_method_trains_is_refused_before_anything_runs(
    drawn_dataset: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    rows = [
        {"name": "Base", "source": "id", "models": ["GRU4Rec"]},
        {"name": "Vanilla", "source": "backbone", "recommender": change},
    ]
    plan = {"main": {"seeds": [0], "tasks": [2], "models": ["SASRec", "GRU4Rec"]}}
    keys = {"reference": "Vanilla", "methods": rows, "grids": [], "plan": plan, "analyses": ["main"]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(keys))
    config = StudyConfig(out=tmp_path / "s", data=drawn_dataset, backbone="bb", config=tmp_path / "study.yaml")
    with pytest.raises(ConfigError, match=message):
        methods.runs(methods.read_study(config), tmp_path / "s", methods.Target("h", drawn_dataset), [], "bb", "cpu")


def test_a_method_names_recommenders_that_exist(drawn_dataset: Path, tmp_path: Path) -> None:
    rows = [{"name": "Base", "source": "id", "models": ["SASREC"]}]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"reference": "Base", "methods": rows, "grids": []}))
    config = StudyConfig(out=tmp_path / "s", data=drawn_dataset, backbone="bb", config=tmp_path / "study.yaml")
    with pytest.raises(ConfigError, match=r"method 'Base' in .* has models SASREC"):
        methods.read_study(config)
