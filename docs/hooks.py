"""What the site has beside the pages of this folder: files of the repository, and what is made from the code.

mkdocs calls the `on_...` functions. Files of the repository that a page names (`../tests/FAULTS.md`) become pages of
the site, so that the same links work in a checkout and on the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY_PAGES = {
    name: ROOT / path
    for name, path in {
        "FAULTS.md": "tests/FAULTS.md",
        "CONTRIBUTING.md": "CONTRIBUTING.md",
        "CHANGELOG.md": "CHANGELOG.md",
    }.items()
}
PACKAGES = ("embedder", "downstream", "pipelines")
COMMANDS = "<!-- commands -->"


def on_startup(**_: Any) -> None:
    """Lay the packages out under the name they install as: what reads docstrings does not see an editable install."""
    folder = ROOT / "build" / "types" / "vlm2rec"
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        link = folder / package
        if not link.is_symlink():
            link.symlink_to(Path("..", "..", "..", package))


def on_files(files: Any, config: Any) -> Any:
    """Add the repository's own pages."""
    for name, path in REPOSITORY_PAGES.items():
        files.append(File.generated(config, name, content=path.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links for a checkout into links of the site, and fill in the commands."""
    if page.file.src_uri in REPOSITORY_PAGES:
        markdown = markdown.replace("](docs/", "](")
    else:
        markdown = re.sub(r"\]\(\.\./(?:tests/)?([A-Z]+\.md)", _on_site, markdown)
    return markdown.replace(COMMANDS, commands()) if COMMANDS in markdown else markdown


def _on_site(link: re.Match[str]) -> str:
    return f"]({link[1] if link[1] in REPOSITORY_PAGES else 'index.md'}"


def commands() -> str:
    """Return every command with its options in their groups, as Markdown."""
    from vlm2rec.pipelines import cli

    group: Any = typer.main.get_command(cli.app)
    return "\n\n".join(_command(name, each) for name, each in group.commands.items())


def _command(name: str, each: Any) -> str:
    panels: dict[str, list[str]] = {"": []}  # what one needs first stands on top, as in the help
    for parameter in each.params:
        panels.setdefault(getattr(parameter, "rich_help_panel", None) or "", []).append(_row(parameter))
    tables = ["\n".join([f"| {title or 'option'} | |", "|---|---|", *rows]) for title, rows in panels.items() if rows]
    return "\n\n".join([f"## {name}", (each.help or "").strip(), *tables])


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        name = f"`{parameter.name.upper()}`"
    else:
        name = ", ".join(f'<code class="flag">{flag}</code>' for flag in [*parameter.opts, *parameter.secondary_opts])
    values = str(parameter.display_type(None)).strip("<>").split("|")
    text = " ".join((getattr(parameter, "help", None) or "").split())
    return f"| {name}{'<br>' + ', '.join(values) if len(values) > 1 else ''} | {_escape(text)} |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
