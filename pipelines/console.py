"""Output for the user at the terminal: progress with an estimate, and a short summary. All on stderr.

`--quiet` and `--json` of every command are kept here: `told_by` opens what a command says, and closes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TextIO

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


WARNING = "yellow"
"""The style of a warning: what has it is shown at the end under --quiet, and stands in the object of --json."""


class _Log(PlainConsole):
    """The console of the messages. Under --quiet it keeps silent, until the summary."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print, as rich does; a warning is also remembered."""
        if options.get("style") == WARNING:
            OUTPUT.warnings.append(printable(" ".join(map(str, objects))))
        if OUTPUT.speaks:
            if not self.is_terminal and all(isinstance(each, str) for each in objects):
                options.setdefault("soft_wrap", True)  # in a log, a message is one line
            super().print(*objects, **options)

    def rule(self, *objects: Any, **options: Any) -> None:
        """Draw a line, as rich does."""
        if OUTPUT.speaks:
            super().rule(*objects, **options)

    def result(self, *objects: Any, **options: Any) -> None:
        """Print what belongs to the summary of a command, also under --quiet."""
        if OUTPUT.shows_results:
            super().print(*objects, **options)


log = _Log(stderr=True, highlight=False, markup=False, emoji=False)
"""The console for messages of the commands. Results for other programs go to stdout with `print`."""


@dataclass
class Output:
    """What the present command shows, and what it has told so far."""

    quiet: bool = False
    as_json: bool = False
    inner: int = 0  # how deep we are in commands that another command calls
    stderr: TextIO | None = None  # a log file that a study puts in its place gets everything
    title: str = ""
    rows: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def speaks(self) -> bool:
        """Whether messages and progress are shown."""
        return not self.quiet or sys.stderr is not self.stderr

    @property
    def shows_results(self) -> bool:
        """Whether the summary of what is running is shown."""
        return self.speaks or not (self.inner or self.as_json)


OUTPUT = Output()


@contextmanager
def inner_command() -> Iterator[None]:
    """Run a command as a part of another one: its summary is a message, and not the summary of the command."""
    OUTPUT.inner += 1
    try:
        yield
    finally:
        OUTPUT.inner -= 1


@contextmanager
def told_by(command: str, *, quiet: bool, as_json: bool) -> Iterator[Callable[[Any, str | None], None]]:
    """Show what a command says as its flags want it; yields a function that ends it.

    With `as_json`, everything that would go to stdout goes to stderr, also what libraries print. Stdout gets one JSON
    object: `command`, `ok`, `seconds`, `title` and `summary` as shown, `warnings`, `result` (what the command
    returns), and `next`. An error has `exit_code` and `error` instead of the last two.
    """
    global OUTPUT
    OUTPUT = Output(quiet, as_json, stderr=sys.stderr)
    begun = time.monotonic()

    def told(**more: Any) -> dict[str, Any]:
        seconds = round(time.monotonic() - begun, 3)
        about = {"title": OUTPUT.title, "summary": OUTPUT.rows, "warnings": OUTPUT.warnings}
        return {"command": command, "ok": "error" not in more, "seconds": seconds, **about, **more}

    ended: dict[str, Any] = {}

    def end(result: Any, following: str | None) -> None:
        ended.update(result=result, next=following)
        if log.quiet:  # one of several processes that train together, and not the main one
            return
        if quiet:
            for warning in OUTPUT.warnings:
                log.result(f"warning: {warning.removeprefix('warning: ')}", style=WARNING, soft_wrap=True)
        elif following:
            log.print(f"Next: {following}", soft_wrap=True)

    try:
        with _stdout_to_stderr() if as_json else nullcontext():
            yield end
    except Exception as error:
        if as_json and not log.quiet:
            of_ours = {name: getattr(error, name, "") for name in ("found", "expected", "fix")}
            text = {"kind": type(error).__name__, "message": str(error), **of_ours}
            _print_json(told(exit_code=getattr(error, "exit_code", 1), error=text))
        raise
    else:
        if as_json and not log.quiet:
            _print_json(told(**ended))
    finally:
        OUTPUT = Output()


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send to stderr what anyone prints to stdout, libraries in other languages and child processes included."""
    sys.stdout.flush()
    try:
        descriptor, theirs = sys.stdout.fileno(), sys.stderr.fileno()
    except (io.UnsupportedOperation, AttributeError, ValueError):
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    kept = os.dup(descriptor)
    os.dup2(theirs, descriptor)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()  # what a library kept for the stdout that it knows
        os.dup2(kept, descriptor)
        os.close(kept)


def _print_json(value: Mapping[str, Any]) -> None:
    print(json.dumps(_plain(value), ensure_ascii=False))


_LONG = (
    "shards",
    "curve",
    "curves",
)  # of a manifest, of metrics and of a training: they grow with the work; they stand in the folder


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: a number that is none becomes null, and what JSON does not know a string."""
    if isinstance(value, str):
        return without_keys(value).encode("utf-8", "backslashreplace").decode("utf-8")
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items() if name not in _LONG}
    if isinstance(value, list | tuple | set):
        return [_plain(each) for each in value]
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain({each.name: getattr(value, each.name) for each in dataclasses.fields(value)})
    if isinstance(about := getattr(value, "meta", None), Mapping):  # a dataset
        return _plain(about)
    return without_keys(str(value))


class _RateColumn(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(rate(speed or 0, 1))


LINE_SECONDS = 30.0
"""Without a terminal, how often a line says how far the work is."""


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Advance]:
    """Show a bar with rate, elapsed and remaining time; yields a function that advances it by n.

    Without a terminal, for a log file, a line says the same every half minute, also while one step takes long.
    """
    if not OUTPUT.speaks or log.quiet:
        yield lambda count, *, total=None, description=None: None
        return
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

    def advance(count: int, *, total: int | None = None, description: str | None = None) -> None:
        state["done"] += count
        state.update({k: v for k, v in (("total", total), ("description", description)) if v is not None})

    with _every_half_minute(lambda: log.print(_line(**state, seconds=time.monotonic() - begun), soft_wrap=True)):
        yield advance


@contextmanager
def regular_lines(lines: Callable[[], Iterable[str]]) -> Iterator[None]:
    """Print these lines every half minute, to what is stderr now: the steps of a study redirect their own."""
    if not OUTPUT.speaks or log.quiet:
        yield
        return
    console = PlainConsole(file=sys.stderr, highlight=False, markup=False, emoji=False)

    def speak() -> None:
        for line in lines():
            console.print(line, style="dim", soft_wrap=True)

    with _every_half_minute(speak):
        yield


@contextmanager
def _every_half_minute(speak: Callable[[], None]) -> Iterator[None]:
    ended = threading.Event()

    def loop() -> None:
        while not ended.wait(LINE_SECONDS):
            speak()

    speaker = threading.Thread(target=loop, name="progress lines", daemon=True)
    speaker.start()
    try:
        yield
    finally:
        ended.set()
        speaker.join()


def _line(description: str, total: int | None, done: int, seconds: float) -> str:
    """Return how far the work is, such as `encoding items: 512 of 4,096, 17.1/s, 0:00:30, about 0:03:30 left`."""
    of = f"{done:,}" if total is None else f"{done:,} of {total:,}"
    parts = [of, rate(done, seconds), clock(seconds)]
    if total and done:
        parts.append(f"about {clock(seconds / done * max(0, total - done))} left")
    return f"{description.strip()}: {', '.join(part for part in parts if part)}"


def rate(done: float, seconds: float) -> str:
    """Return how fast work goes: `17.1/s`, or `8.2 s each` where one takes longer than a second; empty at first."""
    if not done or not seconds:
        return ""
    return f"{done / seconds:.1f}/s" if done >= seconds else f"{seconds / done:.1f} s each"


def clock(seconds: float) -> str:
    """Return seconds as hours, minutes and seconds: `3725` → `1:02:05`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class Terminal:
    """The `Reporter` of the command line: progress bars on a terminal, plain lines in a log file."""

    @property
    def draws_bars(self) -> bool:
        """Whether stderr is a terminal."""
        return log.is_terminal and OUTPUT.speaks

    def say(self, text: str, *, warning: bool = False) -> None:
        """Print one line."""
        log.print(text, style=WARNING if warning else None, markup=False, soft_wrap=True)

    def progress(self, description: str, total: int | None) -> AbstractContextManager[Advance]:
        """Show a bar."""
        return progress(description, total)


TERMINAL = Terminal()


def headline(name: str, more: str) -> None:
    """Print a line across the terminal: what begins now, and what there is to say about it."""
    title = Text.assemble((printable(name), "bold"), "  ", (printable(more), "dim"))
    log.rule(title, align="left", style="dim")


def summary(title: str, rows: Mapping[str, object], shown: Table | None = None) -> None:
    """Print a two-column summary of the results, or in its place a table that shows more."""
    if not OUTPUT.inner:
        OUTPUT.title, OUTPUT.rows = title, dict(rows)
    if shown is not None:
        log.result(shown)
        return
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value))
    log.result(table)
