"""The notebooks of docs/notebooks: they run as they stand there, with smaller trainings, and hold no output."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from test_docs import options_of

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
VECTORS, SASREC = NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SMALLER = {"--max-steps 200": "--max-steps 8", "--max-epochs 30": "--max-epochs 2"}
# nbclient in a process of its own: its warnings are not ours
EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
book = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(book, timeout=None, kernel_name="python3").execute()
nbformat.write(book, sys.argv[2])
"""


def cells(book: Path, kind: str = "code") -> list[dict[str, Any]]:
    found = json.loads(book.read_text(encoding="utf-8"))["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in found if cell["cell_type"] == kind]


# --- as they stand there ------------------------------------------------------------------------------------


@pytest.mark.parametrize("book", NOTEBOOKS, ids=lambda book: book.name)
def test_a_notebook_holds_no_output_and_is_small(book: Path) -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(book))
    assert book.stat().st_size < 12_000
    assert set(json.loads(book.read_text())["metadata"]) == {"kernelspec", "language_info"}


@pytest.mark.parametrize("book", NOTEBOOKS, ids=lambda book: book.name)
def test_every_call_in_a_notebook_has_flags_that_there_are(book: Path) -> None:
    options = options_of()
    calls = re.findall(r"^vlm2rec (.*)$", "\n".join(cell["source"] for cell in cells(book)), re.M)
    assert len(calls) >= 3
    for name, *words in map(str.split, calls):
        assert {word for word in words if word.startswith("--")} <= options[name]


@pytest.mark.parametrize("book", NOTEBOOKS, ids=lambda book: book.name)
def test_the_links_of_a_notebook_lead_somewhere(book: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", "\n".join(cell["source"] for cell in cells(book, "markdown")))
    assert links and all((book.parent / link).is_file() for link in links)


def test_readme_and_docs_lead_to_the_notebooks() -> None:
    for page in ("README.md", "docs/index.md", "docs/from-python.md"):
        text = (FOLDER.parents[1] / page).read_text(encoding="utf-8")
        assert all(f"notebooks/{book.name}" in text for book in NOTEBOOKS), page


# --- run ----------------------------------------------------------------------------------------------------


def execute(book: Path, folder: Path) -> list[dict[str, Any]]:
    """Run a notebook in a folder, with smaller trainings; returns its cells with their outputs."""
    text = book.read_text(encoding="utf-8")
    for before, after in SMALLER.items():
        text = text.replace(before, after)
    (folder / book.name).write_text(text, encoding="utf-8")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, book.name, f"done-{book.name}"],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return cells(folder / f"done-{book.name}")


def shown(cell: dict[str, Any]) -> str:
    """What a cell printed to stdout, which may come in pieces, and what it showed as text."""
    parts = [
        output.get("text") or output.get("data", {}).get("text/plain", "")
        for output in cell["outputs"]
        if output.get("name") != "stderr"
    ]
    return "".join("".join(part) for part in parts)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("notebooks")
    return folder, execute(VECTORS, folder)


@pytest.mark.slow
def test_a_catalogue_becomes_vectors_and_neighbours(first: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, done = first
    assert "{'text': (200, 128), 'image': (200, 128), 'fused': (200, 128)}" in "".join(map(shown, done))
    pictures = [output for cell in done for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert len(pictures) == 1 and len(pictures[0]["data"]["image/png"]) > 10_000
    search = next(shown(cell) for cell in done if "vlm2rec search" in cell["source"])
    assert "rank\titem_id\tcosine\ttitle\n1\tP" in search
    titles = set(pl.read_parquet(folder / "items.parquet")["title"])
    assert len(found := eval(shown(done[-1]))) == 5 and set(found) <= titles


@pytest.mark.slow
def test_vectors_and_ids_are_compared(first: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = first
    said = "".join(map(shown, execute(SASREC, folder)))
    assert re.search(r"vectors minus ids: [+-]\.?\d\.\d{3} \([+-]\d\.\d{3} to [+-]\d\.\d{3}\), 150 users", said)
    assert all(name in said for name in ("sasrec-ids", "sasrec-vectors", "similarity", "N@20"))
    assert json.loads((folder / "sasrec-vectors" / "metrics.json").read_text())["start"] == "fused"
