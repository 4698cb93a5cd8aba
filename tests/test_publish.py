"""One way to write a file or a folder whole, and one question to a folder that is to be written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from children import waited

from vlm2rec.embedder.contract import checksums, process, publish, schema
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_free_folder_and_one_of_ours_are_taken(tmp_path: Path) -> None:
    publish.require_ours(tmp_path / "new", "a model", ours=False)
    publish.require_ours(tmp_path, "a model", ours=False)
    (tmp_path / "weights").touch()
    publish.require_ours(tmp_path, "a model", ours=True)
    publish.require_ours(tmp_path, "a model", ours=False, ignored=lambda name: name == "weights")
    publish.require_ours(tmp_path, "a model", ours=True, only=("weights", "config"))


def test_a_strangers_folder_is_refused_in_one_wording(tmp_path: Path) -> None:
    for name in ("d", "b", "a", "c"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError) as caught:
        publish.require_ours(tmp_path, "a model", ours=False)
    assert str(caught.value) == (
        f"--out {tmp_path} is not empty and not a model: it holds a, b, c …."
        " Expected: a new or empty folder, or a model. To fix it: choose another --out."
    )
    with pytest.raises(ArtifactError, match=r"it holds d\."):  # what is foreign in a folder of ours
        publish.require_ours(tmp_path, "a model", ours=True, only=("a", "b", "c"), error=ArtifactError)
    with pytest.raises(ConfigError, match="is a file"):
        publish.require_ours(tmp_path / "a", "a model", ours=True)


@pytest.mark.parametrize(
    ("text", "ours"), [('{"written_by": "us"}', True), ('{"written_by": "them"}', False), ("{", False), ("[]", False)]
)
def test_a_strangers_file_of_our_name_makes_no_folder_ours(text: str, ours: bool, tmp_path: Path) -> None:
    assert not schema.is_written_by(tmp_path / "made.json", "us")
    (tmp_path / "made.json").write_text(text)
    assert schema.is_written_by(tmp_path / "made.json", "us") == ours


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_whole_or_stays(exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(publish, "_exchange", lambda one, other: False)
    for text in ("first", "second"):
        with publish.whole_folder(tmp_path / "out") as folder:
            (folder / "below").mkdir()
            (folder / "below" / text).write_text(text)
        assert names(tmp_path / "out" / "below") == [text]
    with pytest.raises(FileNotFoundError), publish.whole_folder(tmp_path / "out") as folder:
        (folder / "half" / "way").touch()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out" / "below") == ["second"]


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with publish.whole_file(path) as temporary:
        temporary.write_text("first")
        assert publish.is_temporary(temporary.name, "file") and not path.exists()
    with pytest.raises(UnicodeEncodeError), publish.whole_file(path) as temporary:
        temporary.write_text("half \ud800", encoding="utf-8")
    assert path.read_text() == "first" and names(tmp_path) == ["file"]


def test_discarding_takes_what_killed_processes_left(tmp_path: Path) -> None:
    for name in ("file", ".file.4711.tmp", "file2", ".file2.4711.tmp"):
        (tmp_path / name).touch()
    publish.discard(tmp_path / "file")
    publish.discard(tmp_path / "absent")
    assert names(tmp_path) == [".file2.4711.tmp", "file2"]


def test_two_names_are_never_the_same_and_say_who_writes() -> None:
    first, second = (publish.temporary_name("part-00000.parquet") for _ in range(2))
    assert first != second and publish.is_temporary(first, "part-")
    assert publish.writer_of(first) == process.this_process()
    assert publish.writer_of(".part-00000.parquet.4711.tmp") is None and publish.writer_of("part") is None


def test_only_a_process_that_is_there_runs() -> None:
    assert process.process_runs(os.getpid()) and process.process_runs("1")
    assert not any(map(process.process_runs, ("99999999", "abc", str(2**70))))


def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    def secret(path: Path) -> None:  # as tempfile and safetensors make them
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)

    before = os.umask(0o027)
    try:
        with publish.whole_file(tmp_path / "file") as temporary:
            secret(temporary)
        with publish.whole_folder(tmp_path / "folder") as folder:
            (folder / "below").mkdir()
            secret(folder / "below" / "file")
    finally:
        os.umask(before)
    for path in (tmp_path / "file", tmp_path / "folder" / "below" / "file"):
        assert path.stat().st_mode & 0o777 == 0o640


def test_a_checksum_covers_all_of_a_file_and_a_seal_all_of_an_object(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(300))
    recorded = checksums.checksums(tmp_path, ["a"])
    assert checksums.first_damage(tmp_path, recorded) is None
    for place in (0, 150, 299):
        content = bytearray(300)
        content[place] = 1
        (tmp_path / "a").write_bytes(content)
        assert checksums.first_damage(tmp_path, recorded) == "a does not have the bytes that were written"
    (tmp_path / "a").unlink()
    assert checksums.first_damage(tmp_path, recorded) == "a is missing"
    (tmp_path / "a").mkdir()
    assert str(checksums.first_damage(tmp_path, recorded)).startswith("a cannot be read (")
    sealed = checksums.sealed({"a": (1, 2), "b": {1: None}, "c": 0.1})
    read = json.loads(json.dumps(sealed))
    assert checksums.is_intact(read) and checksums.is_intact({"a": 1})
    assert not checksums.is_intact(read | {"c": 0.2}) and not checksums.is_intact(read | {"d": 1})


@pytest.mark.parametrize(
    ("change", "lives", "ended"),
    [
        ({}, True, False),
        ({"started": "1"}, False, True),  # its process id belongs to another process by now
        ({"pid": 99999999}, False, True),
        ({"pids": "1"}, False, False),  # process 1 of another container
        ({"boot": "other", "pid": 99999999}, False, False),  # another machine, whose host has the same name
        ({"host": "renamed"}, True, False),
    ],
)
def test_a_process_has_ended_only_where_that_can_be_seen(change: dict[str, Any], lives: bool, ended: bool) -> None:
    found = process.this_process()._replace(**change)
    assert (found.lives(), found.has_ended()) == (lives, ended)
    assert found.is_of_this_boot() == ("boot" not in change)


def test_a_zombie_has_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    writer = process.this_process()._replace(pid=child.pid, started="")
    assert writer.lives()
    child.kill()
    waited(writer.has_ended)
    child.wait()
    assert writer.has_ended()
