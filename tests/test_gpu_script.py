"""`tests/benchmarks/gpu_export.py`, which is run where a GPU is lent for minutes: it must not fail there."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from fake_cuda import fake_cuda

from vlm2rec.embedder.backbones import packing

SCRIPT = Path(__file__).parent / "benchmarks" / "gpu_export.py"
ROWS = [
    "naive ",
    "padded ",
    "sentence-transformers ",
    "packed, cold ",
    "packed, warm ",
    "decode",
    "copy",
    "vision tower",
]
ROWS += ["language model", "packed, cold, tower in even widths", "largest row", "vision known", "images looked at"]
ROWS += ["largest batch"]
BLOCKED = """
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("polars", "faiss", "recbole"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def figures(printed: str) -> dict[str, str]:
    lines = [line.strip() for line in printed.splitlines()]
    return {row: next(line.removeprefix(row) for line in lines if line.startswith(row.strip())) for row in ROWS}


@pytest.mark.slow
def test_the_gpu_script_ends_without_a_gpu_and_without_what_a_gpu_machine_lacks() -> None:
    command = [sys.executable, "-c", BLOCKED, str(SCRIPT), "--tiny", "--items", "8"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    missing = {row for row, found in figures(printed).items() if "not measured: no GPU" in found}
    assert missing == {"copy", "largest row", "largest batch"}
    assert "cosine to naive, packed" in printed and "CPU, torch" in printed


@pytest.mark.slow
def test_the_gpu_script_measures_everything_on_a_card(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    script = importlib.import_module("gpu_export")
    monkeypatch.setattr(script, "ROWS", range(1, 3))
    for name, few in (("BATCHES", (2, 3)), ("HISTORY", 2), ("USERS", 2)):
        monkeypatch.setattr(script, name, few)
    monkeypatch.setattr(script, "product_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--tiny", "--items", "8"])
    packing._kernel_works.cache_clear()
    with fake_cuda() as card:
        script.main()
    packing._kernel_works.cache_clear()
    printed = capsys.readouterr().out
    assert not [row for row, found in figures(printed).items() if "not measured" in found]
    assert "kernel for packed rows: used" in printed and card.kernels["varlen_attn backward"]


def test_without_time_nothing_is_made_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    script = importlib.import_module("gpu_export")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--tiny", "--items", "8", "--seconds", "-1"])
    script.main()
    assert all("not measured" in found for found in figures(capsys.readouterr().out).values())
