"""Progress where there is no terminal: a line every half minute, also while one step takes long."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from vlm2rec.embedder.contract.errors import DataError
from vlm2rec.embedder.contract.printable import size
from vlm2rec.pipelines import console


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "progress lines"]


def lines_until(text: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines printed from now on, up to one with this text."""
    lines: list[str] = []
    while not any(text in line for line in lines):
        time.sleep(0.02)
        lines += capsys.readouterr().err.splitlines()
    return lines


def test_a_log_gets_lines_with_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", 0.05)
    with console.progress("[red]encoding", None) as advance:
        lines = lines_until("encoding", capsys)
        advance(1000, total=4000, description="encoding items")
        lines += lines_until("encoding items", capsys)
        assert threads()
    assert re.fullmatch(r"\[red\]encoding: 0, 0:00:\d\d", lines[0])
    assert re.fullmatch(r"encoding items: 1,000 of 4,000, [\d.,]+/s, 0:00:\d\d, about 0:\d\d:\d\d left", lines[-1])
    assert not threads()


def test_short_work_says_nothing_and_an_error_ends_the_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        with console.progress("x", 5) as advance:
            advance(1)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert capsys.readouterr().err == "" and not threads()


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (("a", 100, 25, 60.0), "a: 25 of 100, 2.4 s each, 0:01:00, about 0:03:00 left"),
        (("a", None, 0, 30.0), "a: 0, 0:00:30"),
        (("a", 10, 10, 3725.0), "a: 10 of 10, 372.5 s each, 1:02:05, about 0:00:00 left"),
        (("a", 10, 12, 10.0), "a: 12 of 10, 1.2/s, 0:00:10, about 0:00:00 left"),
        (("a", 0, 0, 10.0), "a: 0 of 0, 0:00:10"),
    ],
)
def test_a_line(given: tuple[str, int | None, int, float], line: str) -> None:
    assert console._line(*given) == line


# --- --quiet and --json -----------------------------------------------------------------------------------------
def works(quiet: bool, as_json: bool, fails: Exception | None = None) -> None:
    """A command that says something of every kind, and calls another one."""
    with console.told_by("work", quiet=quiet, as_json=as_json) as end:
        print("a row for other programs")
        console.log.print("a message")
        console.headline("1/2", "a stage")
        console.TERMINAL.say("mind this", warning=True)
        with console.inner_command():
            console.summary("inner", {"inner row": 1})
        with console.progress("work", 3) as advance:
            advance(1, total=2, description="more work")
        if fails is not None:
            raise fails
        console.summary("Work", {"rows": 3, "folder": Path("out")})
        end({"x": np.float32(0.5), "nan": math.nan, "shards": [1], "path": Path("p")}, "vlm2rec verify out")


def test_without_flags_all_is_said_and_the_next_command_comes_last(capsys: pytest.CaptureFixture[str]) -> None:
    works(quiet=False, as_json=False)
    out, err = capsys.readouterr()
    assert out == "a row for other programs\n"
    assert [part in err for part in ("a message", "1/2", "mind this", "inner row", "folder")] == [True] * 5
    assert err.splitlines()[-1] == "Next: vlm2rec verify out"


def test_quiet_leaves_the_summary_and_the_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    works(quiet=True, as_json=False)
    out, err = capsys.readouterr()
    assert out == "a row for other programs\n"
    assert [line.split() for line in err.splitlines()] == [
        ["Work"], ["rows", "3"], ["folder", "out"], ["warning:", "mind", "this"]
    ]  # fmt: skip


def test_json_is_one_object_on_stdout_and_the_rest_is_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    works(quiet=False, as_json=True)
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert out.count("\n") == 1 and told.pop("seconds") >= 0
    assert told == {
        "command": "work",
        "ok": True,
        "title": "Work",
        "summary": {"rows": 3, "folder": "out"},
        "warnings": ["mind this"],
        "result": {"x": 0.5, "nan": None, "path": "p"},
        "next": "vlm2rec verify out",
    }
    assert "a row for other programs" in err and "a message" in err
    works(quiet=True, as_json=True)
    out, err = capsys.readouterr()
    assert json.loads(out)["ok"] and "a message" not in err and "rows" not in err.replace("a row for", "")


def test_an_error_under_json_is_an_object_with_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError):
        works(quiet=True, as_json=True, fails=DataError("found", "expected", "fix"))
    told = json.loads(capsys.readouterr().out)
    assert (told["ok"], told["exit_code"], told["warnings"]) == (False, 3, ["mind this"])
    assert {name: told["error"][name] for name in ("found", "expected", "fix")} == {
        name: name for name in ("found", "expected", "fix")
    }


def test_a_study_that_is_quiet_still_writes_the_log_of_its_steps(capsys: pytest.CaptureFixture[str]) -> None:
    log = io.StringIO()
    with console.told_by("study", quiet=True, as_json=False) as end:
        with contextlib.redirect_stderr(log), console.inner_command():
            console.log.print("a step")
            console.summary("Step", {"rows": 1})
        end(None, None)
    assert "a step" in log.getvalue() and "rows" in log.getvalue()
    assert capsys.readouterr().err == ""
    console.log.print("heard again")
    assert capsys.readouterr().err == "heard again\n"


def test_what_other_languages_and_child_processes_print_does_not_mix_with_the_object(tmp_path: Path) -> None:
    code = (
        "import os, subprocess\nfrom vlm2rec.pipelines import console\n"
        "with console.told_by('x', quiet=False, as_json=True) as end:\n"
        "    os.write(1, b'from C\\n'); subprocess.run(['echo', 'a child']); print('python')\n"
        "    end(None, None)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout)["command"] == "x"
    assert sorted(ran.stderr.splitlines()) == ["a child", "from C", "python"]


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    works(quiet=False, as_json=False)
    assert "\x1b" not in "".join(capsys.readouterr())


def test_regular_lines_go_where_stderr_went_before_a_step_redirected_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", 0.01)
    said = threading.Event()

    def lines() -> list[str]:
        said.set()
        return ["SFT, seed 0: adapter: [3 of 4]"]

    step = io.StringIO()
    with console.regular_lines(lines), contextlib.redirect_stderr(step):
        assert said.wait(30)
    assert "SFT, seed 0: adapter: [3 of 4]\n" in capsys.readouterr().err
    assert step.getvalue() == ""


def test_a_message_in_a_log_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.log.print("a word " * 40)
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (38_700_000, "36.9 MiB"), (5 * 2**30, "5.0 GiB")],
)
def test_sizes_are_told_in_the_unit_that_fits(count: int, text: str) -> None:
    assert size(count) == text
