"""The trained rivals as rows of a study: trained, exported and measured like every other method, in an own analysis."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from study_world import SMALL, settings

from vlm2rec.pipelines import study
from vlm2rec.pipelines.config import StudyConfig
from vlm2rec.pipelines.experiments.methods import RATIONALES, RIVALS, read_study, training_method

Tiny = Callable[[str], Path]
TRAINED = {
    "llmemb": ["LLMEmb", "LLMEmb w/o dropping"],
    "llm2rec": ["LLM2Rec", "LLM2Rec w/o CSFT", "LLM2Rec w/o MNTP", "LLM2Rec w/o SimCSE"],
    "notellm2": ["NoteLLM-2", "NoteLLM-2 w/o mICL", "NoteLLM-2 w/o late fusion"],
}


def test_the_rivals_are_run_only_on_request_beside_their_ablations() -> None:
    found = read_study(StudyConfig(out=Path("out")))
    assert RIVALS not in found.analyses and found.plan[RIVALS].tasks == (1, 2)
    rivals = [method for method in found.methods if RIVALS in method.analyses]
    trained: dict[str, list[str]] = {}
    for method in rivals:
        if method.source == "finetune" and method.name != found.reference:
            trained.setdefault(training_method(found, method), []).append(method.name)
            assert method.analyses == (RIVALS,)
    assert trained == TRAINED
    assert {"VLM2Rec", "LLMEmb w/o SCFT"} <= {method.name for method in rivals}
    told = [method.name for method in found.methods if RATIONALES in method.analyses]
    assert RATIONALES not in found.analyses and {*told} == {"SLIM", "SLIM plus", "VLM2Rec"}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("method", list(TRAINED))
def test_a_rival_stands_beside_vlm2rec_in_both_tasks(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, method: str
) -> None:
    rows = [values for values in _rows() if values["name"] == TRAINED[method][0]]
    reference = {"name": "VLM2Rec", "source": "finetune", "analyses": ["main", "rivals"], "paper": "VLM2Rec"}
    common = SMALL["finetune"] | {"tau_wpcl": 0.2}  # which the rivals need not have
    plan = {"rivals": {"seeds": [0], "tasks": [1, 2], "models": ["SASRec"]}}
    keys = {"methods": [*rows, reference], "grids": [], "finetune": common, "plan": plan, "analyses": ["rivals"]}
    report = study.run(settings(tiny, drawn_dataset, tmp_path, **keys))
    assert report is not None
    results = pl.read_parquet(tmp_path / "study" / "results.parquet")
    measured = results.filter(pl.col("metric") == "N@20", pl.col("protocol") == "candidates")
    found = set(measured.select("method", "task", "model").unique().iter_rows())
    for name in (TRAINED[method][0], "VLM2Rec"):
        assert {(name, 1, None), (name, 2, "SASRec")} <= found
    page = report.read_text()
    assert "Trained rivals" in page and TRAINED[method][0] in page


def _rows() -> list[dict[str, object]]:
    from vlm2rec.pipelines.experiments.methods import DEFAULT_FILE
    from vlm2rec.pipelines.read_config import read_yaml

    return list(read_yaml(DEFAULT_FILE)["methods"])
