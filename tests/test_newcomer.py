"""What CONTRIBUTING promises a newcomer: in a copy of the packages, so many files are touched and no other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import transformers
from embedding_folder import write_embeddings
from tiny_models import tiny_model

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.encoders.settings import EncoderSettings, GivenSettings
from vlm2rec.pipelines.config import ExportConfig, FinetuneConfig

ROOT = Path(__file__).parents[1]
PACKAGES = ("embedder", "downstream", "pipelines")
LOSS = '''
"""A toy: users and their items are drawn together."""

from torch import nn


class Pull(nn.Module):
    def forward(self, users, items, targets):
        distance = (users["fused"] - items["fused"]).square().mean()
        return distance, {"distance": distance}
'''
LOSS_ROW = """

def _pull(settings: Settings) -> nn.Module:
    from vlm2rec.embedder.training.pull import Pull

    return Pull()


LOSSES["pull"] = LossRecipe("drawn together", _pull)
"""
FORMAT = '''

def write_lengths(selection: Selection, out: Path) -> None:
    """Write the length of every vector."""
    (column,) = selection.columns
    rows = [row for _, views in selection.batches() for row in np.linalg.norm(views[column], axis=1).tolist()]
    (out / "lengths.json").write_text(json.dumps(rows))
'''
FORMAT_ROW = """
FORMATS["lengths"] = Format("how long vectors are", _fused, 1, _SKIP_FIRST, _rows("write_lengths"), "json")
"""


class Copy:
    """A copy of the packages that a newcomer changes, and what was changed in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.touched = folder, set[str]()
        for name in PACKAGES:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / "vlm2rec" / name, ignore=ignored)

    def add(self, file: str, text: str) -> None:
        self.touched.add(file)
        with (self.folder / "vlm2rec" / file).open("a", encoding="utf-8") as opened:
            opened.write(text)

    def replace(self, file: str, old: str, new: str) -> None:
        path = self.folder / "vlm2rec" / file
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{old!r} in {file}"
        self.touched.add(file)
        path.write_text(text.replace(old, new), encoding="utf-8")

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        """Run a command of the copy."""
        code = (
            "import sys; from vlm2rec.pipelines import cli;"
            " assert cli.__file__.startswith(sys.argv.pop(1)), cli.__file__; cli.main()"
        )
        return subprocess.run(
            [sys.executable, "-c", code, str(self.folder), *map(str, words)],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(self.folder), "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path / "copy")


@pytest.mark.slow
def test_a_loss_is_two_files(copy: Copy, tiny: Callable[[str], Path], drawn_dataset: Path, tmp_path: Path) -> None:
    copy.add("embedder/training/pull.py", LOSS)
    copy.add("embedder/training/recipes.py", LOSS_ROW)
    assert len(copy.touched) == 2
    few = ("--max-steps", 2, "--max-pixels", 3136, "--valid-users", 5, "--probe-users", 0, "--log-steps", 1)
    ran = copy.run(
        *("finetune", "--data", drawn_dataset, "--backbone", tiny("qwen2_5_vl"), "--out", tmp_path / "a"),
        *("--loss", "pull", "--vision-cache", "off", *few),
    )
    assert ran.returncode == 0, ran.stderr
    curves = json.loads((tmp_path / "a" / "curves.json").read_text())["train"]
    assert [row["loss"] for row in curves] == pytest.approx([row["distance"] for row in curves])
    assert "pull: drawn together" in " ".join(copy.run("finetune", "--help").stdout.split())


def test_an_export_format_is_two_files(copy: Copy, tmp_path: Path) -> None:
    copy.add("downstream/formats.py", FORMAT)
    copy.add("pipelines/convert_formats.py", FORMAT_ROW)
    assert len(copy.touched) == 2
    write_embeddings(tmp_path / "emb", ["a", "b"], np.array([[3.0, 4.0], [0.0, 2.0]], np.float32))
    ran = copy.run("convert", tmp_path / "emb", "--to", "lengths", "--out", tmp_path / "out")
    assert ran.returncode == 0, ran.stderr
    assert json.loads((tmp_path / "out" / "lengths.json").read_text()) == [5.0, 2.0]
    assert "lengths: how long vectors are" in " ".join(copy.run("convert", "--help").stdout.replace("│", " ").split())


@pytest.mark.slow
def test_a_text_backbone_is_one_file(copy: Copy, drawn_dataset: Path, tmp_path: Path) -> None:
    """SmolLM3 has Llama's layer names and is not in the table."""
    folder = tiny_model("qwen3", tmp_path / "smollm3")
    config = json.loads((folder / "config.json").read_text())
    words = {"vocab_size": config["vocab_size"], "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    model = transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config(**words, **shape, **heads))
    model.save_pretrained(folder)
    export = ("export-items", "--data", drawn_dataset, "--backbone", folder, "--views", "text", "--dtype", "float32")
    refused = copy.run(*export, "--out", tmp_path / "refused")
    assert refused.returncode == 4 and "smollm3" in refused.stderr
    copy.replace("embedder/backbones/families.py", '"mistral"', '"mistral", "smollm3"')
    assert len(copy.touched) == 1
    ran = copy.run(*export, "--out", tmp_path / "out")
    assert ran.returncode == 0, ran.stderr
    assert json.loads((tmp_path / "out" / schema.MANIFEST_FILE).read_text())["settings"]["model_type"] == "smollm3"


def test_a_setting_of_the_encoder_is_a_field_and_two_flags() -> None:
    """Nothing between the field and the flag lists the settings once more: `load` and the export take them all."""
    names = {field.name for field in fields(EncoderSettings)}
    assert names == set(GivenSettings.__annotations__)
    for config in (FinetuneConfig, ExportConfig):
        assert names <= {field.name for field in fields(config)}


def test_contributing_states_the_counts() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for kind, count in {
        **{"prompt": 1, "loss": 2, "training method": 2, "encoder setting": 2, "backbone family": 1},
        **{"export format": 2, "RecBole model": 1, "study method": 0, "study source": 2},
    }.items():
        assert f"| {kind} | {count} |" in text
