"""`tests/benchmarks/catalogue_scale.py`, which runs for hours: all its stages, at 300 items."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.export.verify import verify

BENCHMARKS = Path(__file__).parent / "benchmarks"
ITEMS, DIM = 300, 16


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found = importlib.import_module("catalogue_scale")
    monkeypatch.setattr(found, "USERS", 40)
    return found


def test_every_stage_does_what_the_next_one_needs(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    for stage in script.STAGES:
        code: object = 0
        try:
            script.run_stage(stage, tmp_path, ITEMS, DIM)
        except SystemExit as ended:
            code = ended.code or 0
        assert code == 0, f"{stage}: {capsys.readouterr().err}"
    assert verify(tmp_path / "embeddings") == [] and verify(tmp_path / "lists") == []
    index = json.loads((tmp_path / "index" / schema.INDEX_FILE).read_text())
    assert index["rows"] == ITEMS and index["factory"].startswith("IVF") and index["titles"] == ITEMS
    lists = schema.read_manifest(tmp_path / "lists", table=None)
    assert lists["counts"][schema.STATUS_OK] == 40 and lists["k"] == 10


def line(stage: str, items: int, cpu: float, mib: float, **more: Any) -> str:
    return json.dumps({"stage": stage, "items": items, "dim": DIM, "seconds": cpu, "cpu": cpu, "mib": mib, **more})


def test_the_table_is_of_what_was_measured(script: Any, tmp_path: Path) -> None:
    rows = [line("draw", items, 5 + items / 1e5, 500 + items / 1e4) for items in (10_000, 100_000)]
    rows += [line("draw", 1_000_000, 5 + 40, 600, went_on=True), line("draw", 10, 1, 1)[:-4]]  # the last was cut off
    (tmp_path / "stages.jsonl").write_text("\n".join(rows))
    told = script.table(tmp_path, [10_000, 100_000, 1_000_000], ["draw", "export"], DIM, [10_000_000])
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in told.splitlines() if row.startswith("| draw")]
    assert cells[1] == ["draw", "100,000", "6", "6.0", "510", "10.0", "105", ""]
    assert cells[2][:2] == ["draw", "1,000,000"] and cells[2][2] == "≥ 45" and cells[2][-1] == "1.60"
    assert cells[3][:5] == ["draw, predicted", "10,000,000", "", "435", "1500"]
    assert "export" not in told


def test_a_size_that_does_not_fit_on_the_disk_is_not_begun(script: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="need about"):
        script.require_space(tmp_path, 10**12, 64)
    script.require_space(tmp_path, ITEMS, DIM)
