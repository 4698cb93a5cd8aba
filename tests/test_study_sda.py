"""SDA as a row of a study: trained, exported and measured like every other method, with the long tail beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
from study_world import SMALL, settings

from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.pipelines import study

Tiny = Callable[[str], Path]


def test_sda_stands_beside_vlm2rec_in_both_tasks_and_in_the_tail(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path
) -> None:
    methods = [
        {"name": "SDA", "source": "finetune", "finetune": {"method": "sda", "gradient_steps": 1}},
        {"name": "VLM2Rec", "source": "finetune", "paper": "VLM2Rec"},
    ]
    common = SMALL["finetune"] | {"tau_wpcl": 0.2}  # which SDA does not have
    plan = {"main": {"seeds": [0], "tasks": [1, 2], "models": ["BERT4Rec"]}}
    keys = {"methods": methods, "grids": [], "finetune": common, "plan": plan, "analyses": ["main", "cold-start"]}
    keys |= {"tail_over": "all"}
    report = study.run(settings(tiny, drawn_dataset, tmp_path, **keys))
    assert report is not None
    results = pl.read_parquet(tmp_path / "study" / "results.parquet")
    measured = results.filter(pl.col("metric") == "N@10", pl.col("protocol") == "candidates")
    found = set(measured.select("method", "task", "model", "user_group").unique().iter_rows())
    for method in ("SDA", "VLM2Rec"):
        for group in ("all", "tail"):
            assert {(method, 1, None, group), (method, 2, "BERT4Rec", group)} <= found
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
