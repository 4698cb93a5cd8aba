"""Every text that a user can meet, collected into build/words.txt to be read as a whole, and held to a few rules.

Collected from the code: errors, messages, titles of progress bars, summaries, help of commands and of their settings.
An inserted value stands as `{…}`. The pages of the documentation are held to the same rules.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, make_dataclass
from pathlib import Path

import pytest

from vlm2rec.embedder.contract import errors
from vlm2rec.pipelines import config as settings

ROOT = Path(__file__).parents[1]
PACKAGES = ("embedder", "downstream", "pipelines")
WORDS = ROOT / "build" / "words.txt"

ERRORS = {
    name for name, each in vars(errors).items() if isinstance(each, type) and issubclass(each, errors.Vlm2RecError)
}
MESSAGES = {"print", "say", "result", "rule", "progress", "headline", "summary", "warn", "setting", "Reject", "Failure"}
ROWS = {"Format", "Recipe", "LossRecipe", "Option"}  # rows of tables and flags, whose texts are shown by --help

LONGEST_SENTENCE = 30  # words of a sentence, or of a part of it that ends in a semicolon; more has to be read twice
LONGEST_OF_DOCS = 36

RIDDLES = re.compile(
    r"\b(simply|just|obviously|etc|utilize|leverage|basically|in order to|e\.g|i\.e|aforementioned|henceforth"
    r"|whatsoever|thereof|whose own|the former|the latter|and/or)\b",
    re.IGNORECASE,
)

TERMS = {
    "image": r"\bpictures?\b",
    "concatenated": r"\bend to end\b",
    "dimensions": r"\bvectors? of length \{…\}|\bvectors?\b[^.;]* (has|have) \{…\} numbers\b",
    "unit length": r"\b(made|make|makes|be|is|are) (it )?one long\b|\bof length (1|one)\b",
    "continue": r"\bgo(es)? on\b",
    "interact with": r"\b(un)?touched\b",
    "again": r"\banew\b",
    "pipeline": r"\bwhole line\b",
    "per user": r"\b(one|row) a (user|row|line|item)\b",
    "not text": r"\bare no text\b",
}
"""Terms, and what may not stand in their place."""

FIXES_THAT_POINT = re.compile(
    r"^(give|correct|change|lower|raise|choose|leave|write|check|remove|name|add|convert|save|train)"
    r" (it|them|one|some|fewer|this|the two|(one|some) of (it|them|these|the two)|one out|others)( out| away| first)?$"
)
"""What to do, told by a word that points to what was said before: the reader has to search what is meant."""

ARRAYS = "downstream/evaluation/"  # functions that get arrays from Python code: found and expected shapes are enough


@dataclass(frozen=True)
class Said:
    """A text of the code that a user can meet."""

    where: str
    kind: str
    text: str


@dataclass(frozen=True)
class Raised:
    """The texts of one error: what was found, what was expected, what to do; None for a text made elsewhere."""

    where: str
    kind: str
    parts: tuple[str | None, ...]


def shown(node: ast.AST, names: Mapping[str, str] = {}) -> str | None:
    """Return the text of a string, of an f-string, of a sum of such or of a constant's name; None for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else inserted(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = shown(node.left, names), shown(node.right, names)
        return None if left is None and right is None else (left or "{…}") + (right or "{…}")
    if isinstance(node, ast.IfExp):
        return " | ".join(text for text in (shown(node.body, names), shown(node.orelse, names)) if text) or None
    return None


def inserted(part: ast.AST) -> str:
    """Return the texts that may stand in a place of an f-string, or `{…}`."""
    assert isinstance(part, ast.FormattedValue)
    text = shown(part.value) if isinstance(part.value, ast.IfExp) else None
    return "{…}" if text is None else f"{{{text}}}"


def name_of(call: ast.Call) -> str:
    """Return the last name of what a call calls."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def constants(module: ast.Module) -> dict[str, str]:
    """Return the texts that a module gives names to."""
    named = {}
    for node in module.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            text = shown(node.value)
            if text is not None:
                named[node.targets[0].id] = text
    return named


def texts(file: Path) -> Iterator[Said]:
    """Yield the texts of one module."""
    where = file.relative_to(ROOT).as_posix()
    module = ast.parse(file.read_text("utf-8"))
    names = constants(module)
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and (name := name_of(node)) in ERRORS | MESSAGES | ROWS:
            for part in (
                *node.args,
                *(each.value for each in node.keywords if each.arg not in {"style", "sep", "end"}),
            ):
                if (text := shown(part, names)) and re.search(r"[a-z]{2}", text):
                    yield Said(f"{where}:{node.lineno}", name, text)
        if isinstance(node, ast.FunctionDef) and any(
            isinstance(each, ast.Call) and name_of(each) == "command" for each in node.decorator_list
        ):
            yield Said(f"{where}:{node.lineno}", "help", ast.get_docstring(node) or "")


def raised(file: Path) -> Iterator[Raised]:
    """Yield the errors that one module makes, with the texts of their parts."""
    where = file.relative_to(ROOT).as_posix()
    module = ast.parse(file.read_text("utf-8"))
    names = constants(module)
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and name_of(node) in ERRORS:
            parts = [*node.args, *(each.value for each in node.keywords)]
            if not any(isinstance(each, ast.Starred) for each in parts):
                yield Raised(f"{where}:{node.lineno}", name_of(node), tuple(shown(each, names) for each in parts))


def sentences(text: str) -> list[str]:
    """Return the sentences of a text; a semicolon ends one, as the reader may rest there."""
    return [each for each in re.split(r"(?<=[.!?;]) ", " ".join(text.split())) if each]


def words_in(sentence: str) -> int:
    """Return the number of words; what stands in backticks is one, as it is read at a glance."""
    return len(re.sub(r"`[^`]*`", "x", sentence).split())


def prose(page: Path) -> Iterator[str]:
    """Yield the paragraphs, list items and table cells of a Markdown page, without code and addresses."""
    text = re.sub(r"^---\n.*?\n---\n|```.*?```|<!--.*?-->", "\n\n", page.read_text("utf-8"), flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*>] |\d+\. |#|\|))|(?<=\|)\n", text):
        for cell in block.split("|") if block.lstrip().startswith("|") else [block]:
            if stripped := " ".join(cell.split()):
                yield stripped


# --- the rules: each takes texts and returns those that break it --------------------------------------------------
def too_long(found: Iterable[Said], most: int = LONGEST_SENTENCE) -> list[str]:
    """Return sentences that have to be read twice because of their length."""
    return [f"{each.where}: {one}" for each in found for one in sentences(each.text) if words_in(one) > most]


def riddles(found: Iterable[Said]) -> list[str]:
    """Return texts with words that say nothing, or that point to something the reader has to search."""
    return [f"{each.where}: {match[0]}: {each.text}" for each in found if (match := RIDDLES.search(each.text))]


def other_words(found: Iterable[Said]) -> list[str]:
    """Return texts that call a thing by another name than everywhere else."""
    return [
        f"{each.where}: {match[0]!r}, where {term!r} is our word: {each.text}"
        for each in found
        for term, others in TERMS.items()
        if (match := re.search(others, each.text, re.IGNORECASE))
    ]


def without_a_fix(found: Iterable[Raised]) -> list[str]:
    """Return errors that do not say what was found, what was expected and what to do."""
    return [
        f"{each.where}: {each.parts}"
        for each in found
        if len([part for part in each.parts if part != ""]) < (2 if each.where.startswith(ARRAYS) else 3)
        and each.kind != "MissingDependencyError"
    ]


def vague_fixes(found: Iterable[Raised]) -> list[str]:
    """Return errors whose last part does not name what to change."""
    return [
        f"{each.where}: {each.parts[2]}"
        for each in found
        if len(each.parts) > 2 and any(FIXES_THAT_POINT.match(one) for one in (each.parts[2] or "").split("; "))
    ]


def poor_help(config: type) -> list[str]:
    """Return settings whose help lacks a full stop, a description, or the unit or range of a number."""
    found = []
    for each in fields(config):
        text, name, kind = each.metadata["help"], f"{config.__name__}.{each.name}", str(each.type)
        if not text.endswith("."):
            found.append(f"{name}: no full stop: {text}")
        if re.match(r"Default\b", text):
            found.append(f"{name}: only its default: {text}")
        if kind in ("Fraction", "Share") and "dropout" not in text and "0 to 1" not in text:
            found.append(f"{name}: a share, and not from what to what: {text}")
        units = {
            r"timeout": "econds",
            r"minutes": "minutes",
            r"pixels": "pixels",
            r"steps$": "[Ss]teps",
            "tokens": "token",
        }
        found += [
            f"{name}: no unit: {text}"
            for part, unit in units.items()
            if re.search(part, each.name) and not re.search(unit, text) and not text.startswith("As for")
        ]
        if re.search(r"\bnone of these\b|\bthe others their own\b", text):
            found.append(f"{name}: a riddle: {text}")
    return found


def configs() -> list[type]:
    """Return the settings classes of all commands."""
    return [
        each
        for each in vars(settings).values()
        if is_dataclass(each) and isinstance(each, type) and "Config" in each.__name__
    ]


# --- the texts of the code ----------------------------------------------------------------------------------------
def modules() -> list[Path]:
    """Return the modules of the packages."""
    return sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))


@pytest.fixture(scope="module")
def said() -> list[Said]:
    """Every text, also written to build/words.txt."""
    found = [each for file in modules() for each in sorted(texts(file), key=lambda one: int(one.where.split(":")[1]))]
    WORDS.parent.mkdir(exist_ok=True)
    WORDS.write_text("".join(f"{each.where} [{each.kind}] {' '.join(each.text.split())}\n" for each in found), "utf-8")
    return found


@pytest.fixture(scope="module")
def errors_made() -> list[Raised]:
    """Every error that the code makes."""
    return [each for file in modules() for each in raised(file)]


@pytest.fixture(scope="module")
def pages() -> list[Said]:
    """The paragraphs of the documentation; pages of figures alone keep their own style."""
    files = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    return [
        Said(file.relative_to(ROOT).as_posix(), "page", text)
        for file in files
        if file.name not in {"results.md", "speed.md", "systems.md"}
        for text in prose(file)
    ]


def test_all_texts_are_collected(said: list[Said]) -> None:
    kinds = {each.kind for each in said}
    assert {"ConfigError", "DataError", "ModelError", "ArtifactError", "setting", "print", "say", "help"} <= kinds
    assert {"Format", "Recipe", "LossRecipe", "summary", "progress"} <= kinds
    assert len(said) > 2000


def test_sentences_are_short(said: list[Said]) -> None:
    assert too_long(said) == []


def test_no_riddles(said: list[Said]) -> None:
    assert riddles(said) == []


def test_one_word_for_each_thing(said: list[Said]) -> None:
    assert other_words(said) == []


def test_errors_say_what_was_found_what_was_expected_and_what_to_do(errors_made: list[Raised]) -> None:
    assert len(errors_made) > 500
    assert without_a_fix(errors_made) == []


def test_what_to_do_names_what_to_change(errors_made: list[Raised]) -> None:
    assert vague_fixes(errors_made) == []


@pytest.mark.parametrize("config", configs(), ids=lambda each: each.__name__)
def test_help_of_a_setting_says_what_it_is_and_in_which_unit(config: type) -> None:
    assert poor_help(config) == []


def test_titles_of_summaries_begin_with_a_capital(said: list[Said]) -> None:
    titles = [each for each in said if each.kind == "summary"]
    assert len(titles) > 10
    assert [each for each in titles if not re.match(r"[A-Z{]", each.text)] == []


def test_pages_are_held_to_the_same_rules(pages: list[Said]) -> None:
    assert len(pages) > 500
    assert too_long(pages, LONGEST_OF_DOCS) == []
    assert riddles(pages) == []
    assert other_words(pages) == []


# --- a rule that cannot fail is none ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (too_long, "a sentence of " + "many words " * 20),
        (riddles, "simply run it again"),
        (riddles, "choose CPU and/or GPU"),
        *(
            (other_words, text)
            for text in (
                "an item without a picture",
                "text and image end to end",
                "vectors of length {…}",
                "the query vectors have {…} numbers",
                "each vector is made one long",
                "vectors of length 1",
                "the same command goes on",
                "items that no user has touched",
                "shards are made anew",
                "one file for the whole line",
                "a file with one row a user",
                "the ids are no text",
            )
        ),
    ],
)
def test_a_planted_text_is_found(rule: Callable[[Iterable[Said]], list[str]], text: str) -> None:
    assert len(rule([Said("planted", "say", text)])) == 1
    assert (
        rule([Said("good", "say", "The image of each item is read once; run the same command again to continue.")])
        == []
    )


@pytest.mark.parametrize(
    ("rule", "parts"),
    [
        (without_a_fix, ("two flags", "one of them")),
        (without_a_fix, ("two flags", "one of them", "")),
        (vague_fixes, ("two flags", "one of them", "leave one out")),
        (vague_fixes, ("two flags", "one of them", "change one of the two")),
        (vague_fixes, ("no flag", "a path", "check the disk; correct it")),
    ],
)
def test_a_planted_error_is_found(rule: Callable[[Iterable[Raised]], list[str]], parts: tuple[str, ...]) -> None:
    assert len(rule([Raised("planted", "ConfigError", parts)])) == 1
    assert rule([Raised("good", "ConfigError", ("two flags", "one of them", "leave --columns out"))]) == []


def test_planted_help_is_found() -> None:
    poor = make_dataclass(
        "PoorConfig",
        [
            ("image_timeout", "float", settings.setting("How long to wait.", 60.0)),
            ("fusion", "str", settings.setting("Default: the adapter's.", "raw")),
            ("margin", "Fraction", settings.setting("Share of the cosine.", 0.5)),
            ("name", "str", settings.setting("Name of the dataset", "")),
        ],
    )
    assert [each.split(": ")[1] for each in poor_help(poor)] == [
        "no unit",
        "only its default",
        "a share, and not from what to what",
        "no full stop",
    ]
