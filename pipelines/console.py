"""Output for the user at the terminal: progress with an estimate, and a short summary. All on stderr."""

from __future__ import annotations

import threading
import time
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


LINE_SECONDS = 30.0
"""Without a terminal, how often a line says how far the work is."""


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Advance]:
    """Show a bar with rate, elapsed and remaining time; yields a function that advances it by n.

    Without a terminal, for a log file, a line says the same every half minute, also while one step takes long.
    """
    if not log.is_terminal:
        with _lines(description, total) as advance:
            yield advance
        return
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


@contextmanager
def _lines(description: str, total: int | None) -> Iterator[Advance]:
    state: dict[str, Any] = {"description": description, "total": total, "done": 0}
    begun = time.monotonic()
    ended = threading.Event()

    def advance(count: int, *, total: int | None = None, description: str | None = None) -> None:
        state["done"] += count
        state.update({k: v for k, v in (("total", total), ("description", description)) if v is not None})

    def speak() -> None:
        while not ended.wait(LINE_SECONDS):
            log.print(_line(**state, seconds=time.monotonic() - begun), soft_wrap=True)

    speaker = threading.Thread(target=speak, name="progress lines", daemon=True)
    speaker.start()
    try:
        yield advance
    finally:
        ended.set()
        speaker.join()


def _line(description: str, total: int | None, done: int, seconds: float) -> str:
    """Return how far the work is, such as `encoding items: 512 of 4,096, 17.1/s, 0:00:30, about 0:03:30 left`."""
    of = f"{done:,}" if total is None else f"{done:,} of {total:,}"
    parts = [of, f"{done / seconds:.1f}/s" if done else "", clock(seconds)]
    if total and done:
        parts.append(f"about {clock(seconds / done * max(0, total - done))} left")
    return f"{description.strip()}: {', '.join(part for part in parts if part)}"


def clock(seconds: float) -> str:
    """Return seconds as hours, minutes and seconds: `3725` → `1:02:05`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


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
