"""docs/systems.md: its commands can be given as they stand, and its tests are there. And the comparison it names."""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import typer.main
from embedding_folder import write_embeddings
from recommender_world import circle_vectors, cyclic_sequences, write_dataset

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.options import STRATEGIES
from vlm2rec.embedder.training.recipes import METHODS
from vlm2rec.pipelines import cli

ROOT = Path(__file__).parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (ROOT / "docs" / "systems.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| system")
]


def in_code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_row_has_a_command_a_test_and_a_figure_or_says_that_it_was_not_run() -> None:
    assert len(ROWS) > 30
    for row in ROWS:
        assert len(row) == 4 and len(in_code(row[1])) == 1 and in_code(row[2]), row
        assert row[3].startswith("not run") or re.search(r"\d", row[3]), row


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_its_command_parses_and_its_files_exist(row: list[str]) -> None:
    for text in in_code(row[1]):
        program, *words = shlex.split(text)
        if program == "python":
            script = ROOT / words[0]
            flags = [word for word in words[1:] if word.startswith("--")]
            assert all(f'"{flag}"' in script.read_text() for flag in flags)
            continue
        assert program == "vlm2rec"
        group = typer.main.get_command(cli.app)
        command = group.commands[words[0]]  # type: ignore[attr-defined]
        command.make_context(words[0], words[1:])  # raises for a flag that does not exist
        assert all((ROOT / word).is_file() for word in words if word.endswith(".yaml"))


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_its_tests_exist(row: list[str]) -> None:
    for name in in_code(row[2]):
        file, _, test = name.partition("::")
        assert (ROOT / file).is_file(), name
        defined = {
            node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)
        }
        assert not test or test in defined, name


def test_every_model_and_method_of_ours_is_a_row() -> None:
    commands = " ".join(row[1] for row in ROWS)
    for model in schema.RECOMMENDERS:
        assert f"--model {model} " in commands
    for method in METHODS:
        assert f"--method {method} " in commands or method == "vlm2rec"
    for strategy in STRATEGIES:
        assert f"--strategy {strategy} " in commands


def test_a_model_of_mmrec_that_is_not_ours_runs_alone_with_the_first_of_its_grids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    import multimodal

    folder = tmp_path / "configs" / "model"
    folder.mkdir(parents=True)
    lines = [
        "n_layers: [2, 1]",
        "cl_weight: 2.0",
        "reg_weight: [0.1, 0.01]",
        'hyper_parameters: ["n_layers", "reg_weight"]',
    ]
    (folder / "BM3.yaml").write_text("\n".join(lines))
    assert multimodal.first_of_grid(tmp_path, "BM3") == {"n_layers": [2], "reg_weight": [0.1]}
    given = argparse.Namespace(mmrec=tmp_path, cornac="python")
    assert [multimodal.systems_of(given, model) for model in ("BM3", "FREEDOM")] == [["MMRec"], ["ours", "MMRec"]]


def test_the_comparison_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "benchmarks"))
    import multimodal

    items = [f"i{number}" for number in range(30)]
    data = write_dataset(tmp_path / "data", cyclic_sequences(items, 20), items)
    write_embeddings(tmp_path / "emb", items, *(circle_vectors(30, 8, seed) for seed in range(3)))

    def compare(*more: str) -> str:
        given = ["--data", str(data), "--embeddings", str(tmp_path / "emb"), "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["multimodal.py", *given, "--cornac", "", "--models", "VBPR", *more])
        multimodal.main()
        return capsys.readouterr().out

    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    first = compare("--epochs", "2", "--seeds", "0")
    assert "| VBPR | ours | 1 |" in first
    runs = tmp_path / "out" / "runs.jsonl"
    one = runs.read_text()
    with runs.open("a") as lines:
        lines.write('{"system": "ou')  # killed while it wrote
    second = compare("--epochs", "2", "--seeds", "0,1")
    assert runs.read_text().startswith(one) and "| VBPR | ours | 2 |" in second and " ± " in second
    found = [json.loads(line)["recall"] for line in one.splitlines()]
    assert f"{np.mean(found):.4f}" in first and (tmp_path / "out" / "table.md").read_text() == second
    with pytest.raises(SystemExit, match="other settings"):
        compare("--epochs", "3", "--seeds", "0")
