"""Every text that a user can meet, collected into build/words.txt to be read as a whole, and held to a few rules.

Collected from the code: errors, messages, titles of progress bars, summaries, help of commands and of their settings.
An inserted value stands as `{…}`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from vlm2rec.embedder.contract import errors

ROOT = Path(__file__).parents[1]
PACKAGES = ("embedder", "downstream", "pipelines")
WORDS = ROOT / "build" / "words.txt"

ERRORS = {
    name for name, each in vars(errors).items() if isinstance(each, type) and issubclass(each, errors.Vlm2RecError)
}
MESSAGES = {"print", "say", "result", "rule", "progress", "headline", "summary", "warn", "setting", "Reject", "Failure"}


@dataclass(frozen=True)
class Said:
    """A text of the code that a user can meet."""

    where: str
    kind: str
    text: str


def shown(node: ast.AST) -> str | None:
    """Return the text of a string, of an f-string or of a sum of such; None for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else inserted(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = shown(node.left), shown(node.right)
        return None if left is None and right is None else (left or "{…}") + (right or "{…}")
    if isinstance(node, ast.IfExp):
        return " | ".join(text for text in (shown(node.body), shown(node.orelse)) if text is not None) or None
    return None


def inserted(part: ast.AST) -> str:
    """Return the texts that may stand in a place of an f-string, or `{…}`."""
    assert isinstance(part, ast.FormattedValue)
    text = shown(part.value) if isinstance(part.value, ast.IfExp) else None
    return "{…}" if text is None else f"{{{text}}}"


def name_of(call: ast.Call) -> str:
    """Return the last name of what a call calls."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def texts(file: Path) -> Iterator[Said]:
    """Yield the texts of one module."""
    where = file.relative_to(ROOT).as_posix()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Call) and (name := name_of(node)) in ERRORS | MESSAGES:
            for part in (
                *node.args,
                *(each.value for each in node.keywords if each.arg not in {"style", "sep", "end"}),
            ):
                if (text := shown(part)) and re.search(r"[a-z]{2}", text):
                    yield Said(f"{where}:{node.lineno}", name, text)
        if isinstance(node, ast.FunctionDef) and any(
            isinstance(each, ast.Call) and name_of(each) == "command" for each in node.decorator_list
        ):
            yield Said(f"{where}:{node.lineno}", "help", ast.get_docstring(node) or "")


@pytest.fixture(scope="module")
def said() -> list[Said]:
    """Every text, also written to build/words.txt."""
    files = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
    found = [each for file in files for each in sorted(texts(file), key=lambda one: int(one.where.split(":")[1]))]
    WORDS.parent.mkdir(exist_ok=True)
    WORDS.write_text("".join(f"{each.where} [{each.kind}] {' '.join(each.text.split())}\n" for each in found), "utf-8")
    return found


def test_all_texts_are_collected(said: list[Said]) -> None:
    kinds = {each.kind for each in said}
    assert {"ConfigError", "DataError", "ModelError", "ArtifactError", "setting", "print", "say", "help"} <= kinds
    assert len(said) > 1000
