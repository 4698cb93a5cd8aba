"""Output for the user at the terminal: progress with an estimate, and a short summary. All on stderr."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from vlm2rec.embedder.contract.printable import printable, without_keys
from vlm2rec.embedder.progress import Advance


class PlainConsole(Console):
    """A console that prints every string as it is: `[red]` in a title is five characters, a terminal escape a space.

    What is meant to have a colour is a `Text`, or has `style=`.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Turn a string into a `Text` without reading markup, emoji codes or control characters in it."""
        return super().render_str(without_keys(printable(text)), **options | {"markup": False, "emoji": False})


log = PlainConsole(stderr=True, highlight=False, markup=False, emoji=False)
"""The console for messages of the commands. Results for other programs go to stdout with `print`."""


class _RateColumn(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "")


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Advance]:
    """Show a bar with rate, elapsed and remaining time; yields a function that advances it by n."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=log, transient=True) as bar:
        task = bar.add_task(printable(description), total=total)

        def advance(count: int, *, total: int | None = None, description: str | None = None) -> None:
            changes: dict[str, Any] = {"total": total, "description": description and printable(description)}
            bar.update(task, advance=count, **{name: value for name, value in changes.items() if value is not None})

        yield advance


class Terminal:
    """The `Reporter` of the command line: progress bars on a terminal, plain lines in a log file."""

    @property
    def draws_bars(self) -> bool:
        """Whether stderr is a terminal."""
        return log.is_terminal

    def say(self, text: str, *, warning: bool = False) -> None:
        """Print one line."""
        log.print(text, style="yellow" if warning else None, markup=False, soft_wrap=True)

    def progress(self, description: str, total: int | None) -> AbstractContextManager[Advance]:
        """Show a bar."""
        return progress(description, total)


TERMINAL = Terminal()


def headline(name: str, more: str) -> None:
    """Print a line across the terminal: what begins now, and what there is to say about it."""
    title = Text.assemble((printable(name), "bold"), "  ", (printable(more), "dim"))
    log.rule(title, align="left", style="dim")


def summary(title: str, rows: Mapping[str, object]) -> None:
    """Print a two-column summary of the results."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value))
    log.print(table)
