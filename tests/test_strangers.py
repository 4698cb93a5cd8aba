"""Nothing foreign is believed: no pickle, no path outside, no address, no markup, no formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from children import TESTS, child


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a run of the whole line among planted files, and what its audit hook saw."""
    folder = tmp_path_factory.mktemp("line")
    world = folder / "given"
    for part in ("home", "tmp"):
        (world / part).mkdir(parents=True)
    places = {"HOME": str(world / "home"), "TMPDIR": str(world / "tmp"), "XDG_CACHE_HOME": str(world / "home")}
    program = child(
        TESTS / "whole_line.py", world, "finetune", HF_HUB_OFFLINE="1", PYTHONDONTWRITEBYTECODE="1", **places
    )
    said = program.communicate()[1]
    assert program.returncode == 0, said
    return folder, json.loads((world / "seen.json").read_text())


def test_the_whole_line_opens_no_pickle_nothing_outside_and_no_address(line: tuple[Path, dict[str, Any]]) -> None:
    folder, seen = line
    assert len(seen["steps"]) == 13
    for kind in ("pickles", "opened", "addresses", "commands"):
        assert seen[kind] == [], kind
    assert not list(folder.rglob("ran")), "a planted pickle was opened"


def test_planted_files_stay_as_they_were_and_a_linked_picture_is_a_failure_row(
    line: tuple[Path, dict[str, Any]],
) -> None:
    folder, seen = line
    assert (folder / "outside" / "log").read_text() == "precious"
    assert not (folder / "given" / "rec" / "recbole.log").is_symlink()
    assert (folder / "given" / "rec" / "checkpoint.pth").is_file(), "what we have not written is not removed"
    assert seen["first"] == "failed"
