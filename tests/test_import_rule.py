"""embedder writes a table, downstream reads that table, pipelines runs both: who may import whom."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from embedding_folder import write_embeddings

from vlm2rec.downstream.index.index import build_index

ROOT = Path(__file__).parents[1]
CONTRACT = "contract"  # the one package of embedder that downstream may import
PACKAGES = {"embedder", "downstream", "pipelines"}
HEAVY = ("torch", "transformers")


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (package, module) of every import of our own in a file, at any depth; module is "" for a whole package."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            names = [node.value]  # of import_module; a file may be called vlm2rec.json
        for name in names:
            top, *rest = name.split(".")
            if top == "vlm2rec" and rest and rest[0] in PACKAGES:
                yield rest[0], rest[1] if len(rest) > 1 else ""


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("path", files("embedder"), ids=lambda path: path.name)
def test_embedder_imports_neither_downstream_nor_pipelines(path: Path) -> None:
    assert {package for package, _ in imports(path)} <= {"embedder"}


@pytest.mark.parametrize("path", files("downstream"), ids=lambda path: path.name)
def test_downstream_imports_only_the_contract_from_embedder(path: Path) -> None:
    found = set(imports(path))
    assert {package for package, _ in found} <= {"downstream", "embedder"}
    assert {module for package, module in found if package == "embedder"} <= {CONTRACT}


@pytest.mark.parametrize("path", files(f"embedder/{CONTRACT}"), ids=lambda path: path.name)
def test_the_contract_itself_imports_only_the_contract(path: Path) -> None:
    assert set(imports(path)) <= {("embedder", CONTRACT)}


def test_the_rule_finds_every_form_of_import(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import vlm2rec.pipelines.cli\n"
        "from vlm2rec import downstream\n"
        "def f():\n"
        "    from vlm2rec.embedder import train\n"
        "    from vlm2rec.embedder.training.losses import info_nce\n"
        "    import_module('vlm2rec.pipelines.demo')\n"
    )
    assert set(imports(path)) == {
        ("pipelines", "cli"),
        ("downstream", ""),
        ("embedder", "train"),
        ("embedder", "training"),
        ("pipelines", "demo"),
    }


def loaded_by(code: str) -> set[str]:
    """Return the top-level modules that a fresh Python has loaded after running `code`."""
    script = (
        f"import json, sys\ntry:\n    {code}\nexcept SystemExit as ended:\n    assert not ended.code, ended.code\n"
        "print('\\n' + json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return set(json.loads(ran.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "module",
    [
        "embedder.contract",
        "embedder.contract.schema",
        "embedder.contract.dataset",
        "embedder.contract.storage",
        "embedder.contract.publish",
        "embedder.contract.provenance",
        "embedder.contract.errors",
        "downstream.table",
        "downstream.evaluation.metrics",
        "downstream.evaluation.protocol",
        "downstream.evaluation.geometry",
        "downstream.index.index",
        "downstream.formats",
        "downstream.mmrec",
        "pipelines.config",
        "pipelines.build_index",
        "pipelines.convert",
    ],
)
def test_reading_the_table_needs_neither_torch_nor_transformers(module: str) -> None:
    assert loaded_by(f"import vlm2rec.{module}").isdisjoint(HEAVY)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    vectors = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    write_embeddings(folder / "emb", [f"item-{n}" for n in range(20)], vectors, text=vectors, image=vectors)
    build_index(folder / "emb", folder / "idx")
    return folder


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["verify", "{}/emb"], ["search", "--index", "{}/idx", "--item", "item-3"], ["build-index", "--help"]],
    ids=lambda arguments: arguments[0],
)
def test_commands_that_only_read_need_neither_torch_nor_transformers(arguments: list[str], world: Path) -> None:
    argv = ["vlm2rec", *(text.format(world) for text in arguments)]
    code = f"sys.argv = {argv!r}; from vlm2rec.pipelines import cli; cli.main()"
    assert loaded_by(code).isdisjoint(HEAVY)


def test_the_check_would_notice_torch() -> None:
    assert "torch" in loaded_by("import vlm2rec.embedder.training.losses")
