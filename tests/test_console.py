"""Progress where there is no terminal: a line every half minute, also while one step takes long."""

from __future__ import annotations

import threading
import time

import pytest

from vlm2rec.pipelines import console


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "progress lines"]


def test_a_log_gets_lines_with_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "LINE_SECONDS", 0.05)
    with console.progress("[red]encoding", None) as advance:
        time.sleep(0.12)
        advance(1000, total=4000, description="encoding items")
        time.sleep(0.12)
        assert threads()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[red]encoding: 0, 0:00:00"
    assert lines[-1].startswith("encoding items: 1,000 of 4,000, ") and lines[-1].endswith(
        "/s, 0:00:00, about 0:00:01 left"
    )
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
        (("a", 100, 25, 60.0), "a: 25 of 100, 0.4/s, 0:01:00, about 0:03:00 left"),
        (("a", None, 0, 30.0), "a: 0, 0:00:30"),
        (("a", 10, 10, 3725.0), "a: 10 of 10, 0.0/s, 1:02:05, about 0:00:00 left"),
        (("a", 10, 12, 10.0), "a: 12 of 10, 1.2/s, 0:00:10, about 0:00:00 left"),
        (("a", 0, 0, 10.0), "a: 0 of 0, 0:00:10"),
    ],
)
def test_a_line(given: tuple[str, int | None, int, float], line: str) -> None:
    assert console._line(*given) == line
