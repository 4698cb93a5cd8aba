"""Nothing foreign is believed: no pickle, no path outside, no address, no markup, no formula."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import re
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from children import TESTS, Forked, child
from embedding_folder import write_embeddings
from recommender_world import write_dataset
from whole_line import Bomb

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, DataError, Vlm2RecError
from vlm2rec.embedder.contract.printable import cell, one_line, without_keys
from vlm2rec.embedder.contract.storage import StorePath
from vlm2rec.pipelines import (
    build_index,
    cli,
    console,
    convert,
    evaluate,
    import_vectors,
    train_recommender,
    verify,
)
from vlm2rec.pipelines.config import (
    BuildIndexConfig,
    ConvertConfig,
    EvaluateConfig,
    FailuresConfig,
    ImportVectorsConfig,
    TrainRecommenderConfig,
    VerifyConfig,
)


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


# --- text -----------------------------------------------------------------------------------------------------------
HOSTILE = {
    "formula": '=HYPERLINK("http://x.example","y")',
    "plus": "+1+cmd|' /C calc'!A0",
    "minus": "-2+3",
    "at": "@SUM(A1)",
    "tab": "\t=1+1",
    "return": "\r=1+1",
    "wide": "\uff1d1+1",
    "blank": "  =1+1",
    "escape": "\x1b]0;owned\x07\x1b[2Jlamp",
    "c1": "\x9b31mlamp",
    "override": "lamp\u202egpj.exe",
    "isolate": "\u2066lamp\u2069",
    "line": "lamp\nP0001,ok",
    "separator": "lamp\u2028chair",
    "markup": "[red]lamp[/red] [/] [link=http://x.example]y[/link] :smile:",
}
ACTING = "\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_cell_is_text_for_a_spreadsheet_and_for_a_terminal(name: str) -> None:
    shown = cell(HOSTILE[name])
    assert shown.lstrip()[:1] not in ("=", "+", "-", "@", "\uff1d", "")
    assert not re.search(f"[\t\n{ACTING}]", shown)
    assert cell(shown) == shown


@pytest.mark.parametrize("text", ["", "lamp", "שלום", "a=b", "3-in-1", "x@y", "[red]", "'quoted'", "ünï"])
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert cell(text) == one_line(text) == text


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """An export of hostile titles and ids in which every second item failed, and its dataset."""
    titles = list(HOSTILE.values())
    ids = [f"{name}-{title}" if row % 3 else title for row, (name, title) in enumerate(HOSTILE.items())]
    write_dataset(tmp_path / "data", [[ids[0], ids[1], ids[2]]], ids)
    items = pq.read_table(tmp_path / "data" / "items.parquet")
    items = items.set_column(1, "title", pa.array(titles))
    pq.write_table(items, tmp_path / "data" / "items.parquet")
    vectors = np.eye(len(ids), 16, dtype=np.float32) + 0.1
    vectors[::2] = np.nan
    write_embeddings(tmp_path / "emb", ids, vectors, data=str(tmp_path / "data"))
    return tmp_path


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """`command("search", ..., encoding="ascii")` runs the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object, encoding: str = "utf-8") -> tuple[int, str, str]:
        out, err = io.TextIOWrapper(io.BytesIO(), encoding), io.TextIOWrapper(io.BytesIO(), encoding)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["vlm2rec", *map(str, arguments)])
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            with pytest.raises(SystemExit) as ended:
                cli.main()
        for stream in (out, err):
            stream.flush()
        texts = [stream.buffer.getvalue().decode(encoding) for stream in (out, err)]  # type: ignore[attr-defined]
        return int(ended.value.code or 0), texts[0], texts[1]

    return run


def require_plain(text: str, between: str) -> None:
    """Fail if a cell of a table would be computed, or if anything in it acts on a terminal."""
    assert not re.search(f"[{ACTING}]", text.replace("\r\n", "\n"))
    for row in csv.reader(io.StringIO(text), delimiter=between):
        for value in row:
            numeric = re.fullmatch(r"-?\d\.\d+", value)
            assert numeric or value.lstrip()[:1] not in ("=", "+", "-", "@", "\uff1d"), value


def test_failures_prints_hostile_titles_as_text(hostile: Path, command: Command) -> None:
    code, out, err = command("failures", hostile / "emb")
    assert code == 0, err
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 8 and "'=HYPERLINK" in rows[0]["title"]
    require_plain(out, ",")


def test_search_prints_hostile_titles_as_text(hostile: Path, command: Command) -> None:
    code, _, err = command("build-index", "--embeddings", hostile / "emb", "--out", hostile / "idx")
    assert code == 0, err
    item = list(HOSTILE.values())[3]
    code, out, err = command("search", "--index", hostile / "idx", "--item", item, "--k", 9)
    assert code == 0, err
    assert len(out.splitlines()) == 7
    require_plain(out, "\t")


def test_convert_lists_hostile_ids_as_text(hostile: Path, command: Command) -> None:
    code, _, err = command("convert", hostile / "emb", "--to", "npy", "--out", hostile / "npy")
    assert code == 0, err
    text = (hostile / "npy" / "missing.csv").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 9
    require_plain(text, ",")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_without_unicode_ends_no_command(encoding: str, hostile: Path, command: Command) -> None:
    code, _, err = command("build-index", "--embeddings", hostile / "emb", "--out", hostile / "idx", encoding=encoding)
    assert code == 0, err
    code, out, _ = command("failures", hostile / "emb", encoding=encoding)
    assert code == 0 and r"\uff1d1+1" in out
    item = list(HOSTILE.values())[3]
    code, out, _ = command("search", "--index", hostile / "idx", "--item", item, encoding=encoding)
    assert code == 0 and out.count("\n") == 7
    code, _, err = command("search", "--index", hostile / "idx", "--item", "löwe\u202e", encoding=encoding)
    assert code == 3 and "is not in" in err


def test_what_is_printed_about_a_run_is_text_too(capsys: pytest.CaptureFixture[str]) -> None:
    for text in HOSTILE.values():
        console.summary(text, {"[/]": text, text: "[/]"})
        console.log.print(text)
        console.headline(text, text)
        console.TERMINAL.say(text, warning=True)
        with console.progress(text, 1) as advance:
            advance(1)
    said = capsys.readouterr().err
    assert not re.search(f"[{ACTING}]", said)
    assert "[red]lamp[/red] [/] [link=http://x.example]" in said.replace("\n", " ") and ":smile:" in said


def test_an_error_about_foreign_text_is_one_plain_paragraph(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def stage(_: object) -> None:
        raise DataError(f"title {HOSTILE['escape']} and {HOSTILE['override']}")

    monkeypatch.setattr(cli, "module_of", lambda module: types.SimpleNamespace(search=stage))
    code, _, err = command("search", "--index", "i", "--item", "x")
    assert code == 3 and not re.search(f"[{ACTING}]", err)


# --- addresses ------------------------------------------------------------------------------------------------------
@pytest.fixture
def no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever connects to a store fails the test."""
    monkeypatch.setattr(StorePath, "_store", property(lambda path: pytest.fail(f"{path} was asked")))


FOREIGN = [
    "s3://strangers/x",
    "gs://strangers/x",
    "https://strangers.example/x",
    "file:///etc",
    "/etc/passwd",
    "a\0b",
    "x" * 5000,
    "\udcff",
    7,
]


@pytest.mark.usefixtures("no_store")
@pytest.mark.parametrize("named", FOREIGN, ids=lambda named: repr(named)[:30])
def test_an_address_that_only_a_manifest_names_is_never_opened(
    named: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = np.eye(4, dtype=np.float32)
    vectors[3] = np.nan
    write_embeddings(tmp_path / "emb", list("abcd"), vectors, data=named)
    index = build_index.run(BuildIndexConfig(embeddings=tmp_path / "emb", out=tmp_path / "idx"))
    assert (index["rows"], index["titles"], index["titles_from"]) == (3, 0, None)
    verify.failures(FailuresConfig(embeddings=tmp_path / "emb"))
    printed = capsys.readouterr()
    assert "titles and images are left out" in printed.err and printed.out.splitlines()[1].startswith("d,failed")
    with pytest.raises(ArtifactError, match=r"--data"):
        convert.run(ConvertConfig(embeddings=tmp_path / "emb", to="mmrec", out=tmp_path / "mmrec", columns=("fused",)))


@pytest.mark.parametrize("file", ["dataset.json", "items.parquet"])
def test_a_pipe_where_a_manifest_names_a_dataset_is_not_opened(file: str, tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", [list("abc")], list("abcd"), candidates=1)
    write_embeddings(tmp_path / "emb", list("abcd"), np.eye(4, dtype=np.float32), data=str(tmp_path / "data"))
    (tmp_path / "data" / file).unlink()
    os.mkfifo(tmp_path / "data" / file)
    assert build_index.run(BuildIndexConfig(embeddings=tmp_path / "emb", out=tmp_path / "idx"))["titles"] == 0


def test_failures_takes_the_dataset_that_the_user_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path / "data", [list("abc")], list("abcd"), candidates=1)
    vectors = np.full((4, 4), np.nan, np.float32)
    vectors[0] = 1
    write_embeddings(tmp_path / "emb", list("abcd"), vectors, data="s3://strangers/x")
    verify.failures(FailuresConfig(embeddings=tmp_path / "emb", data=tmp_path / "data"))
    assert [row["title"] for row in csv.DictReader(io.StringIO(capsys.readouterr().out))] == [
        "title 1",
        "title 2",
        "title 3",
    ]


KEYED = [
    "s3://AKIAEXAMPLE:sEcrEt@bucket/x",
    "s3://AKIAEXAMPLE:sEc/rEt+x@bucket/x",
    "gs://sEcrEt@bucket/x",
    "https://me:sEcrEt@host.example/x",
    "s3://bucket:sEcrEt/x",
]


@pytest.mark.parametrize("address", KEYED)
@pytest.mark.parametrize(
    "arguments",
    [
        ("verify", "{}"),
        ("failures", "{}"),
        ("evaluate", "--data", "{}", "--embeddings", "e", "--out", "o"),
        ("evaluate", "--data", "d", "--embeddings", "e", "--out", "{}"),
        ("build-index", "--embeddings", "{}", "--out", "i"),
        ("search", "--index", "{}", "--item", "x"),
        ("train-recommender", "--data", "d", "--embeddings", "{}", "--model", "SASRec", "--out", "o"),
        ("export-items", "--data", "d", "--backbone", "{}", "--out", "o"),
        ("verify", "e", "--set", "embedings={}"),
    ],
    ids=lambda arguments: f"{arguments[0]} {arguments[-2]}",
)
@pytest.mark.usefixtures("no_store")
def test_keys_inside_an_address_are_never_shown(address: str, arguments: tuple[str, ...], command: Command) -> None:
    code, out, err = command(*(argument.format(address) for argument in arguments))
    assert code in (2, 3, 4, 5), err
    told = (out + err).replace("\n", "")
    if address != KEYED[-1]:
        assert "sEc" not in told and "rEt" not in told and "AKIA" not in told


@pytest.mark.parametrize("plain", ["s3://bucket/a@b/c", "see s3://bucket/x: 3 of 4", "mail me@x.example", "a/b:c@d"])
def test_addresses_without_keys_are_shown_whole(plain: str) -> None:
    assert without_keys(plain) == plain


# --- folders of others ----------------------------------------------------------------------------------------------
COMMON = ("users.parquet", "metrics.json", "README.md", "checkpoint.pth", "checkpoint.safetensors", "index.json")
PRECIOUS = (*COMMON, "convert.json", schema.MANIFEST_FILE, "recommender.json")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    items = [f"i{number}" for number in range(24)]
    write_dataset(folder / "data", [items[:5], items[4:9], items[7:12]], items, candidates=4)
    vectors = np.random.default_rng(0).normal(size=(24, 8)).astype(np.float32)
    write_embeddings(folder / "emb", items, vectors, data=str(folder / "data"))
    np.save(folder / "vectors.npy", vectors)
    return folder


def writers(world: Path, out: Path) -> dict[str, Callable[[], Any]]:
    """Return what writes a folder, by name."""
    data, emb = world / "data", world / "emb"
    small: dict[str, Any] = {"model": "SASRec", "max_epochs": 1, "hidden_size": 8, "device": "cpu"}
    return {
        "evaluate": lambda: evaluate.run(EvaluateConfig(data=data, embeddings=emb, out=out)),
        "train-recommender": lambda: train_recommender.run(TrainRecommenderConfig(data=data, out=out, **small)),
        "build-index": lambda: build_index.run(BuildIndexConfig(embeddings=emb, out=out)),
        "convert": lambda: convert.run(ConvertConfig(embeddings=emb, to="npy", out=out)),
        "import-vectors": lambda: import_vectors.run(
            ImportVectorsConfig(data=data, file=world / "vectors.npy", in_item_order=True, out=out)
        ),
    }


WRITERS = ("evaluate", "train-recommender", "build-index", "convert", "import-vectors")


@pytest.mark.parametrize("held", PRECIOUS)
@pytest.mark.parametrize("name", WRITERS)
def test_out_never_touches_a_folder_with_files_of_others(name: str, held: str, world: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / held).write_text("precious")
    with pytest.raises(Vlm2RecError) as refused:
        writers(world, tmp_path / "out")[name]()
    assert refused.value.exit_code in (2, 5)
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {held: "precious"}


@pytest.mark.parametrize("first", ["train-recommender", "evaluate", "convert"])
@pytest.mark.parametrize("second", WRITERS)
def test_out_of_one_command_is_no_place_for_another(first: str, second: str, world: Path, tmp_path: Path) -> None:
    writers(world, tmp_path / "out")[first]()
    before = {path.name for path in (tmp_path / "out").iterdir()}
    if first == second:
        writers(world, tmp_path / "out")[second]()  # the same again replaces or keeps it
    else:
        with pytest.raises(Vlm2RecError, match="not empty and not"):
            writers(world, tmp_path / "out")[second]()
    assert {path.name for path in (tmp_path / "out").iterdir()} == before


def test_an_evaluation_that_was_killed_before_its_metrics_is_finished_by_the_same_command(
    world: Path, tmp_path: Path
) -> None:
    writers(world, tmp_path / "out")["evaluate"]()
    (tmp_path / "out" / "metrics.json").unlink()
    writers(world, tmp_path / "out")["evaluate"]()
    assert (tmp_path / "out" / "metrics.json").is_file()


def test_a_training_that_was_killed_is_begun_again_by_the_same_command(world: Path, tmp_path: Path) -> None:
    writers(world, tmp_path / "out")["train-recommender"]()
    for name in ("metrics.json", "users.parquet", "checkpoint.safetensors"):
        (tmp_path / "out" / name).unlink()
    writers(world, tmp_path / "out")["train-recommender"]()
    assert (tmp_path / "out" / "metrics.json").is_file()


def test_an_old_checkpoint_is_not_opened_and_said_to_be_so(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.json").write_text('{"task": 2, "recbole": {}}')  # as an earlier version left it
    (tmp_path / "out" / "checkpoint.pth").write_bytes(pickle.dumps(Bomb()))
    writers(world, tmp_path / "out")["train-recommender"]()
    said = " ".join(capsys.readouterr().err.split())
    assert "pickle of an earlier version: it is not opened" in said
    assert (tmp_path / "out" / "checkpoint.pth").is_file() and not Path("ran").exists()


def test_links_in_an_earlier_run_lead_nowhere(world: Path, tmp_path: Path) -> None:
    run = writers(world, tmp_path / "out")["train-recommender"]
    run()
    others = tmp_path / "others"
    others.mkdir()
    for name in ("recbole.log", "metrics.json", "users.parquet", "checkpoint.safetensors"):
        (others / name).write_text("precious")
        (tmp_path / "out" / name).unlink()
        (tmp_path / "out" / name).symlink_to(others / name)
    run()
    assert {path.read_text() for path in others.iterdir()} == {"precious"}
    (tmp_path / "out" / "tensorboard").rename(others / "tensorboard")
    (tmp_path / "out" / "tensorboard").symlink_to(others / "tensorboard")
    with pytest.raises(ConfigError, match="tensorboard is a link"):
        run()


# --- disks ----------------------------------------------------------------------------------------------------------
FULL = """
import resource, sys
from vlm2rec.pipelines import cli
import faiss, pyarrow.parquet, torch
from vlm2rec.downstream.recbole import compat
compat.require_recbole()
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.argv = ["vlm2rec", *sys.argv[2:]]
cli.main()
"""


@pytest.mark.parametrize(
    ("name", "limit"),
    [("evaluate", 0), ("evaluate", 1000), ("train-recommender", 0), ("train-recommender", 5000), ("build-index", 100)],
)
def test_a_full_disk_is_exit_code_5_and_the_same_command_works_afterwards(
    name: str, limit: int, world: Path, tmp_path: Path, command: Command
) -> None:
    flags: dict[str, list[object]] = {
        "evaluate": ["--data", world / "data", "--embeddings", world / "emb"],
        "train-recommender": ["--data", world / "data", "--model", "SASRec", "--max-epochs", 1, "--device", "cpu"],
        "build-index": ["--embeddings", world / "emb"],
    }
    arguments = [name, *flags[name], "--out", tmp_path / "out"]
    full = Forked(FULL, limit, *arguments)
    said = full.communicate()[1]
    assert full.returncode == 5, said
    assert "cannot be written (" in said and "File too large" in said and "Traceback" not in said
    assert not list(tmp_path.rglob("*.tmp"))
    code, _, err = command(*arguments)
    assert code == 0, err


# --- damage ---------------------------------------------------------------------------------------------------------
DAMAGED = {
    "empty": b"",
    "cut": b'{"schema_version": 1, "dim"',
    "zeros": b"\0" * 64,
    "list": b"[]",
    "latin-1": '{"schema_version": 1, "é": 1}'.encode("latin-1"),
    "deep": b'{"a": ' + b"[" * 100_000,
    "digits": b'{"schema_version": ' + b"1" * 5000 + b"}",
    "keys": b'{"schema_version": 1}',
    "version": b'{"schema_version": "1"}',
}
LIES: dict[str, dict[str, Any]] = {
    "outside": {"shards": [{"file": "../../x.parquet", "rows": 1, "bytes": 1, "sha256": ""}]},
    "absolute": {"shards": [{"file": "/etc/passwd", "rows": 1, "bytes": 1, "sha256": ""}]},
    "address": {"shards": [{"file": "s3://strangers/x", "rows": 1, "bytes": 1, "sha256": ""}]},
    "rows": {"shards": [{"file": "part-00000.parquet", "rows": 2**60, "bytes": 1, "sha256": ""}]},
    "dim": {"dim": 2**40},
    "negative": {"dim": -8},
    "views": {"views": ["fused", {}]},
    "settings": {"settings": []},
}


def readers(world: Path, emb: Path, out: Path) -> dict[str, Callable[[], Any]]:
    """Return what reads an embeddings folder, by name."""
    data = world / "data"
    return {
        "verify": lambda: verify.run(VerifyConfig(embeddings=emb)),
        "failures": lambda: verify.failures(FailuresConfig(embeddings=emb)),
        "evaluate": lambda: evaluate.run(EvaluateConfig(data=data, embeddings=emb, out=out)),
        "build-index": lambda: build_index.run(BuildIndexConfig(embeddings=emb, out=out)),
        "convert": lambda: convert.run(ConvertConfig(embeddings=emb, to="npy", out=out)),
        "train-recommender": lambda: train_recommender.run(
            TrainRecommenderConfig(data=data, embeddings=emb, model="SASRec", max_epochs=1, device="cpu", out=out)
        ),
    }


READERS = ("verify", "failures", "evaluate", "build-index", "convert", "train-recommender")


@pytest.mark.usefixtures("no_store")
@pytest.mark.parametrize("damage", [*DAMAGED, *LIES])
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_manifest_is_exit_code_5_with_what_to_do(name: str, damage: str, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "emb", tmp_path / "emb")
    manifest = tmp_path / "emb" / schema.MANIFEST_FILE
    if damage in DAMAGED:
        manifest.write_bytes(DAMAGED[damage])
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **LIES[damage]}))
    with pytest.raises(ArtifactError, match=r"To fix it: .*(again|vlm2rec)"):
        readers(world, tmp_path / "emb", tmp_path / "out")[name]()


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_dataset_json_is_exit_code_5_with_what_to_do(damage: str, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "data", tmp_path / "data")
    (tmp_path / "data" / "dataset.json").write_bytes(DAMAGED[damage])
    with pytest.raises(ArtifactError, match=r"To fix it: .*(again|vlm2rec)"):
        evaluate.run(EvaluateConfig(data=tmp_path / "data", embeddings=world / "emb", out=tmp_path / "out"))
