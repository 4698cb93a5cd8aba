"""README and docs: links lead somewhere, the site builds strictly, messages and folders are those of the code."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import typer
from sources import parsed

from vlm2rec.pipelines import cli

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
PACKAGES = ("pipelines", "embedder", "downstream")


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as both GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", [README, ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    for link in links:
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


def test_readme_is_short_and_names_every_page_or_leaves_it_to_the_overview() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 180
    reached = set(re.findall(r"\]\((?:docs/)?([\w-]+\.md)", prose(README) + prose(ROOT / "docs" / "index.md")))
    assert {page.name for page in PAGES} - reached - {"index.md", "data.md", "pretrained-backbone.md"} == set()


def test_every_row_of_readmes_results_links_to_its_page() -> None:
    section = README.read_text(encoding="utf-8").partition("## Results")[2].partition("\n## ")[0]
    rows = [row for row in section.splitlines() if row.startswith("| ")][1:]
    assert len(rows) > 5 and all("](docs/" in row.split(" | ")[0] for row in rows)


def test_the_picture_of_readme_is_small() -> None:
    (picture,) = re.findall(r"^!\[[^]]{50,}\]\(([^)]+)\)", README.read_text(encoding="utf-8"), re.M)
    assert (ROOT / picture).stat().st_size < 300_000


def test_no_block_of_commands_installs_vlm2rec_from_an_index() -> None:
    """It is on none. Change this test on the day it is."""
    for page in (README, *PAGES):
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            for line in block.splitlines():
                assert not re.search(r"pip install (-\S+ )*'?vlm2rec(\[\w+\])?(?!.* @ )", line), f"{page.name}: {line}"


def test_the_extras_of_the_quickstart_are_those_of_pyproject() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rows = re.findall(r"^\| `(\w+)` \| ", (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8"), re.M)
    assert {*rows} == {*extras} - {"dev"}


def test_the_tree_names_every_folder_of_the_packages_once() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = text.partition("```\n")[2].partition("```")[0]
    found, parent = [], ""
    for indent, name in re.findall(r"^( *)(\w+)/ ", tree, re.M):
        parent = parent if indent else name
        found.append(f"{parent}/{name}" if indent else name)
    there = {f"{package}/{path.parent.name}" for package in PACKAGES for path in (ROOT / package).glob("*/__init__.py")}
    assert sorted(found) == sorted({*there, *PACKAGES, "tests"})


# --- commands and flags -----------------------------------------------------------------------------------------
def options_of() -> dict[str, set[str]]:
    """Return the flags of every command."""
    commands: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    return {
        name: {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in commands.items()
    }


def calls(page: Path) -> list[list[str]]:
    """Return the calls of vlm2rec in the blocks of commands, as words from the command's name on."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        for line in re.split(r"\n|&&", re.sub(r"\\\n\s*", " ", block)):
            words = shlex.split(line, comments=True)
            places = [place for place, word in enumerate(words) if re.fullmatch(r"(.*/)?vlm2rec(:\w+)?", word)]
            if places and words[0] not in ("git", "cd", "pip", "python") and words[:2] != ["docker", "build"]:
                found.append(words[places[-1] + 1 :])
    return found


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)
def test_every_call_in_a_block_names_a_command_and_its_flags(page: Path) -> None:
    options = options_of()
    for name, *words in calls(page):
        if name.startswith("--"):
            assert name in {"--help", "--version", "--install-completion", "--show-completion"}
            continue
        flags = {word for word in words if word.startswith("--")}
        assert name in options and flags <= options[name], [name, *words]


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)
def test_every_flag_that_a_page_names_exists(page: Path) -> None:
    ours = {flag for flags in options_of().values() for flag in flags}
    others = {
        *("--help", "--version", "--install-completion", "--show-completion"),
        *("--no-python", "--nproc-per-node", "--num_processes", "--no_python"),  # torchrun and accelerate
        *("--no-deps", "--constraint", "--volume"),  # pip and docker
        *("--items", "--images", "--users", "--steps", "--dim", "--rows", "--queries", "--threads"),  # of benchmarks
        *("--mmrec", "--init", "--models", "--of"),  # of tests/benchmarks/multimodal.py and compare_methods.py
        *("--photos", "--more", "--cut-from", "--layers", "--out"),  # of tests/benchmarks/pretrained_backbone.py
        *("--length", "--systems"),  # of tests/benchmarks/sequence_training.py
        "--measure",  # of tests/benchmarks/gpu_memory.py
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", prose(page)))
    assert named - ours - others == set()


# --- messages ---------------------------------------------------------------------------------------------------
def messages_of_the_code() -> list[str]:
    """Return the text of every error in the packages, with … for what is filled in."""
    found = []
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%(\.\d)?[sdf]", "…", node.value))
            if isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values))
    return found


def test_every_message_of_the_troubleshooting_page_is_one_of_the_code() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(.+?)` \| .+ \| .+ \|$", text, re.M)
    code = messages_of_the_code()
    assert len(rows) > 30
    for row in rows:
        parts = [re.escape(part.strip()) for part in row.split("…") if part.strip()]
        wanted = re.compile(".*".join(parts), re.S)
        assert any(wanted.search(message) for message in code), row


def test_the_troubleshooting_page_has_every_exit_code() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    codes = re.findall(r"^\| (\d+)(?:, (\d+))? \| ", text, re.M)
    assert cli.__doc__ is not None
    named = {int(code) for code in re.findall(r"(?:^|· )(\d+)(?: / \d+)? \w", cli.__doc__, re.M)}
    assert {int(code) for row in codes for code in row if code} == {*named, 143}


# --- the site ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with --strict: a link or an anchor that leads nowhere, or a page out of the menu, is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


def words(page: Path) -> str:
    """Return the text of a page of the site."""
    return unescape(re.sub(r"<[^>]+>", " ", page.read_text(encoding="utf-8")))


def test_the_site_has_every_page_and_fetches_nothing(site: Path) -> None:
    assert {page.stem for page in PAGES} <= {page.stem for page in site.glob("*.html")}
    assert {"FAULTS.html", "CONTRIBUTING.html", "CHANGELOG.html"} <= {page.name for page in site.glob("*.html")}
    for page in site.glob("*.html"):
        fetched = re.findall(
            r'<(?:link|script|img)[^>]+(?:href|src)="(https?://[^"]+)', page.read_text(encoding="utf-8")
        )
        assert fetched == [], page.name


def test_the_page_of_commands_has_every_command_and_option(site: Path) -> None:
    text = words(site / "commands.html")
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        assert f" {name} " in text or f"\n{name}" in text, name
        for parameter in command.params:
            for flag in (*parameter.opts, *parameter.secondary_opts):
                assert flag in text or flag.upper() in text, f"{name} {flag}"


def test_the_python_reference_is_made_from_the_docstrings(site: Path) -> None:
    text = words(site / "python-reference.html")
    for told in ("ItemEncoder", "encode_items", "EmbeddingTable", "A setting is unknown, missing or out of range."):
        assert told in text
