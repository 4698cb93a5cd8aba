"""The line as the README prints it: every command in order, as a process of its own, with default flags."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from children import command

from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.schema import read_manifest
from vlm2rec.pipelines.synthetic.drawn_catalogue import draw_catalogue

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
HUB_ID = "Qwen/Qwen3-VL-Embedding-2B"
ITEM = "42"


def commands_of_the_readme() -> list[list[str]]:
    """Return the `vlm2rec ...` calls under "Your own catalogue", as words."""
    block = re.search(r"## Your own catalogue\n+```sh\n(.*?)```", README, re.DOTALL)
    assert block
    calls = [call for line in block[1].splitlines() for call in line.split(" && ")]
    return [shlex.split(call)[1:] for call in calls if call.startswith("vlm2rec ")]


@pytest.fixture(scope="module")
def line(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder in which the README's commands have run on a drawn catalogue, and what each wrote to stdout."""
    folder = tmp_path_factory.mktemp("line")
    draw_catalogue(folder, products=150, users=100, seed=0)
    said = {}
    for call in commands_of_the_readme():
        item = pl.read_parquet(folder / "data" / "items.parquet")["item_id"][0] if "search" in call else ITEM
        words = [{HUB_ID: str(tiny("qwen2_5_vl")), ITEM: item}.get(word, word) for word in call]
        done = command(*words, cwd=folder)
        assert done.returncode == 0, f"vlm2rec {shlex.join(words)}\n{done.stderr}"
        said[call[0]] = done.stdout
    return folder, said


def test_the_readme_names_the_six_stages_and_the_search() -> None:
    assert [call[0] for call in commands_of_the_readme()] == [
        *("prepare", "finetune", "export-items", "evaluate", "train-recommender", "build-index", "search")
    ]


def test_every_item_has_its_three_vectors(line: tuple[Path, dict[str, str]]) -> None:
    folder, _ = line
    manifest = read_manifest(folder / "embeddings")
    assert manifest["views"] == ["fused", "text", "image"]
    assert sum(manifest["counts"].values()) == len(Dataset(folder / "data").item_ids)
    assert command("verify", folder / "embeddings").returncode == 0


def test_both_tasks_have_figures_for_the_same_users(line: tuple[Path, dict[str, str]]) -> None:
    folder, _ = line
    first, second = (json.loads((folder / name / "metrics.json").read_text()) for name in ("task1", "sasrec"))
    users = len(Dataset(folder / "data").user_ids)
    assert first["users"] == second["users"] == users
    assert set(first["candidates"]["f2f"]) == set(second["candidates"]) == {"H@10", "N@10", "H@20", "N@20"}
    assert second["start"] == "fused"


def test_the_neighbours_go_to_stdout_and_nothing_else_does(line: tuple[Path, dict[str, str]]) -> None:
    _, said = line
    lines = said.pop("search").splitlines()
    assert lines[0].split("\t") == ["rank", "item_id", "cosine", "title"]
    assert len(lines) == 11
    assert set(said.values()) == {""}
