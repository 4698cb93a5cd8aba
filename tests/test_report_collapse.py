"""The report's part on collapse: the probe's curves, gradient alignment, and what the monitor said."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from vlm2rec.embedder.contract import schema
from vlm2rec.pipelines.config import ReportConfig
from vlm2rec.pipelines.report import run

MESSAGE = "image falls behind while text gains: <b>S</b> of image is 1.031"


def write_adapter(folder: Path, **more: Any) -> None:
    folder.mkdir(parents=True)
    steps = [0, 10, 20, 30]
    train = [
        {"step": step, "loss": 1.0, "margin_text": 0.2, "margin_image": 0.1, "weak_is_image": 0.7} for step in steps[1:]
    ]
    valid = [{"step": step, "N@20": 0.2, "H@20": 0.3, "N@10": 0.1, "H@10": 0.2} for step in (0, 30)]
    schema.write_json(folder / "curves.json", {"train": train, "valid": valid, **more})


def probe() -> list[dict[str, float]]:
    return [
        {"step": step, **{f"S_{view}": 1.0 + step / 100 for view in schema.VIEWS}}
        | {f"rank_{view}": 20.0 - step / 10 for view in schema.VIEWS}
        for step in (0, 10, 20, 30)
    ]


def gradients() -> list[dict[str, float]]:
    return [{"step": step, "cos_total_text": 0.9, "cos_total_image": 0.3} for step in (0, 10, 20)]


def warnings() -> list[dict[str, Any]]:
    entry = {"step": 20, "view": "image", "rule": "behind", "message": MESSAGE}
    return [{**entry, "until": 30}, {**entry, "step": 30, "until": None}]


def figure(page: str) -> str:
    found = re.search(r'aria-label="Separability, effective rank.*?</svg>', page, re.DOTALL)
    return found[0] if found else ""


@pytest.fixture
def page(tmp_path: Path) -> str:
    write_adapter(tmp_path / "adapter-sft", probe=probe(), gradients=gradients(), warnings=warnings())
    write_adapter(tmp_path / "adapter-vlm2rec", probe=probe(), gradients=[], warnings=[])
    return run(ReportConfig(run=tmp_path)).read_text(encoding="utf-8")


def test_the_curves_of_every_method_and_view_are_drawn(page: str) -> None:
    drawn = figure(page)
    assert "not recorded" not in drawn
    for panel in ("Separability of each view", "Effective rank", "Whose weak modality", "Gradient of the loss"):
        assert panel in drawn
    for label, panels in (("SFT, text", 3), ("SFT, image", 3), ("SFT, fused", 2), ("VLM2Rec, image", 2)):
        assert drawn.count(f">{label}<") == panels


def test_what_the_monitor_said_is_repeated_as_text(page: str) -> None:
    assert "SFT, from step 20 until step 30: image falls behind while text gains: &lt;b&gt;S" in page
    assert "SFT, from step 30 to the end:" in page
    assert "<b>" not in page


def test_a_run_without_gradients_says_that_they_were_not_recorded(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter-sft", probe=probe())
    assert figure(run(ReportConfig(run=tmp_path)).read_text(encoding="utf-8")).count("not recorded") == 1
    assert (tmp_path / "figures" / "learning-collapse.svg").is_file()


def test_a_run_without_the_monitor_has_no_such_part(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter-sft")
    page = run(ReportConfig(run=tmp_path)).read_text(encoding="utf-8")
    assert "step by step" in page
    assert "Does a view collapse?" not in page and figure(page) == ""
