"""embedder writes a table, downstream reads that table, pipelines runs both: who may import whom."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from embedding_folder import write_embeddings
from sources import parsed

from vlm2rec.downstream.index.index import build_index

ROOT = Path(__file__).parents[1]
CONTRACT = "contract"  # the one package of embedder that downstream may import
PACKAGES = {"embedder", "downstream", "pipelines"}
HEAVY = ("torch", "transformers")


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (package, module) of every import of our own in a file, at any depth; module is "" for a whole package."""
    for node in ast.walk(parsed(path)):
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


# --- rooms ----------------------------------------------------------------------------------------------------
# What stands later may import what stands earlier in its list, and never the other way round. An item of a catalogue
# goes down this list once. Commands come last, as nothing but another command calls them.
ORDER = {
    "embedder": (
        *(
            "options",
            "contract",
            "progress",
            "chat_template_process",
            "chat_template",
            "prompts",
            "distributed",
            "memory",
        ),
        *("backbones", "adapters", "encoders", "training", "export"),
    ),
    "downstream": (
        *("options", "principal_components", "table", "formats", "mmrec"),
        *("evaluation", "recommender", "recbole", "rectools", "multimodal", "index", "semantic_ids", "serving"),
    ),
    "pipelines": (
        *("convert_formats", "config", "read_config", "console", "commands"),
        *("catalogue", "synthetic", "experiments", "reporting"),
    ),
}


def modules() -> dict[str, Path]:
    """Every module by its name below vlm2rec; a package is its __init__."""
    found = {}
    for path in (path for package in sorted(PACKAGES) for path in files(package)):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def module_imports(path: Path, known: set[str]) -> set[str]:
    """Which modules of ours a file imports while it runs, inside functions too; what only types need is left out."""
    tree = parsed(path)
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vlm2rec."):
            module = node.module.removeprefix("vlm2rec.")
            found |= {inner if (inner := f"{module}.{alias.name}") in known else module for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("vlm2rec.") for a in node.names if a.name.startswith("vlm2rec.")}
    return found & known


@cache
def import_graph() -> dict[str, set[str]]:
    known = modules()
    return {name: module_imports(path, {*known}) - {name} for name, path in known.items()}


def room(module: str) -> str:
    """`embedder.export.plan` lies in embedder.export; `pipelines.config` is a room of its own."""
    return ".".join(module.split(".")[:2])


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Some nodes that lead back to themselves, in order; empty where there are none."""
    done: set[str] = set()

    def visit(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node not in done:
            for following in sorted(graph.get(node, ())):
                if found := visit(following, [*way, node]):
                    return found
            done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_module_imports_itself_through_others() -> None:
    graph = import_graph()
    assert len(graph) > 100 and sum(map(len, graph.values())) > 300
    assert circle(graph) == []


def test_no_room_imports_itself_through_others() -> None:
    rooms: dict[str, set[str]] = {}
    for module, imported in import_graph().items():
        if "." in module:  # the packages themselves hand on names from within
            rooms.setdefault(room(module), set()).update({room(other) for other in imported} - {room(module)})
    assert circle(rooms) == []


def test_no_import_runs_upward() -> None:
    upward = []
    for module, imported in import_graph().items():
        package, _, inside = room(module).partition(".")
        for other in imported:
            of, _, theirs = room(other).partition(".")
            order = ORDER[package]
            if of != package or not inside or inside == theirs or inside not in order:
                continue
            if theirs not in order or order.index(theirs) > order.index(inside):
                upward.append(f"{module} -> {other}")
    assert upward == []


def test_every_room_has_its_place_in_the_order() -> None:
    rooms = {room(module) for module in modules() if "." in module}
    listed = {f"{package}.{name}" for package, names in ORDER.items() for name in names}
    assert listed <= rooms
    commands = {name for name in rooms - listed if name.startswith("pipelines.")}
    assert rooms - listed == commands


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
        "pipelines.read_config",
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
