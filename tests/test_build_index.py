"""`vlm2rec build-index` and `vlm2rec search` as a person runs them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedding_folder import write_embeddings

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ArtifactError
from vlm2rec.pipelines import build_index, cli
from vlm2rec.pipelines.config import BuildIndexConfig, SearchConfig

ROWS = 40


def write_catalogue(folder: Path, titles: dict[str, str]) -> None:
    folder.mkdir()
    items = {"item_id": list(titles), "title": list(titles.values()), "image_path": ["x.jpg"] * len(titles)}
    pq.write_table(pa.table(items), folder / schema.ITEMS_FILE)
    schema.write_json(folder / schema.DATASET_FILE, {"name": "hand-made", "schema_version": 1})


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """An embeddings folder whose items lie on a circle, in order: item n is nearest to n - 1 and n + 1."""
    angles = np.linspace(0, np.pi, ROWS)
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32) * 7
    write_catalogue(tmp_path / "data", {str(n): f"Title {n}" for n in reversed(range(ROWS))})
    ids = [str(n) for n in range(ROWS)]
    write_embeddings(tmp_path / "emb", ids, vectors, text=-vectors, data=str(tmp_path / "data"))
    return tmp_path


def vlm2rec(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["vlm2rec", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_both_commands_with_default_flags(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vlm2rec(monkeypatch, "build-index", "--embeddings", world / "emb", "--out", world / "idx") == 0
    built = capsys.readouterr()
    assert built.out == ""
    assert "Flat for 40 vectors of 2 dimensions" in built.err
    assert "recall@10" in built.err
    assert sorted(path.name for path in (world / "idx").iterdir()) == ["ids.parquet", "index.json", "items.faiss"]

    assert vlm2rec(monkeypatch, "search", "--index", world / "idx", "--item", "1") == 0
    told = capsys.readouterr()
    assert "Nearest to 1, Title 1:" in told.err  # not among the lines for other programs
    lines = [line.split("\t") for line in told.out.splitlines()]
    assert lines[0] == ["rank", "item_id", "cosine", "title"]
    assert len(lines) == 11
    step = np.cos(np.pi / (ROWS - 1))
    assert {row[1] for row in lines[1:3]} == {"0", "2"}
    assert lines[1] == ["1", lines[1][1], f"{step:.4f}", f"Title {lines[1][1]}"]
    assert [row[0] for row in lines[1:]] == [str(rank) for rank in range(1, 11)]
    assert lines[3][1:] == ["3", f"{np.cos(2 * np.pi / (ROWS - 1)):.4f}", "Title 3"]


def test_index_json_says_what_was_built(world: Path) -> None:
    returned = build_index.run(BuildIndexConfig(embeddings=world / "emb", out=world / "idx", sample=25))
    meta = json.loads((world / "idx/index.json").read_text())
    assert meta == json.loads(json.dumps(returned))
    manifest = schema.read_manifest(world / "emb")
    expected = {
        "schema_version": 1,
        "kind": "auto",
        "factory": "Flat",
        "column": "fused",
        "rows": 40,
        "dim": 2,
        "left_out": 0,
        "recall@10": 1.0,
        "recall_sample": 25,
        "effort": {},
        "titles": 40,
        "titles_from": str(world / "data"),
        "embeddings": str(world / "emb"),
        "fingerprint": manifest["fingerprint"],
        "bytes": (world / "idx/items.faiss").stat().st_size,
    }
    assert {key: meta[key] for key in expected} == expected
    assert all(meta[key] > 0 for key in ("build_seconds", "search_ms", "search_ms_single", "threads"))
    assert {"faiss_version", "vlm2rec_version", "created", "metric", "cosine_error"} <= set(meta)


def test_titles_come_from_the_dataset_that_is_named(world: Path) -> None:
    write_catalogue(world / "renamed", {"0": "Nought", "1": "One"})
    config = BuildIndexConfig(embeddings=world / "emb", out=world / "idx", data=world / "renamed")
    assert build_index.run(config)["titles"] == 2
    titles = pq.read_table(world / "idx/ids.parquet")["title"].to_pylist()
    assert titles == ["Nought", "One"] + [""] * 38


def test_a_dataset_that_is_named_but_missing_is_an_error(world: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere is not a folder"):
        build_index.run(BuildIndexConfig(embeddings=world / "emb", out=world / "idx", data=world / "nowhere"))
    assert not (world / "idx").exists()


def test_without_the_dataset_titles_are_empty_and_a_note_says_so(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(world / "data")
    build_index.run(BuildIndexConfig(embeddings=world / "emb", out=world / "idx"))
    assert "give --data" in capsys.readouterr().err
    build_index.search(SearchConfig(index=world / "idx", item="0", k=1))
    assert capsys.readouterr().out.splitlines()[1].split("\t") == ["1", "1", "0.9968", ""]


def test_hostile_titles_and_ids_stay_in_their_cell(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(world / "emb")
    write_catalogue(world / "hostile", {"a": "x", "b\tc": "two\tcells\nand [bold]a line[/bold]\x1b[31m red"})
    write_embeddings(world / "emb", ["a", "b\tc"], np.eye(2, dtype=np.float32))
    build_index.run(BuildIndexConfig(embeddings=world / "emb", out=world / "idx", data=world / "hostile"))
    capsys.readouterr()
    build_index.search(SearchConfig(index=world / "idx", item="a"))
    out = capsys.readouterr().out
    assert out.splitlines()[1:] == ["1\tb c\t0.0000\ttwo cells and [bold]a line[/bold] [31m red"]


def test_on_a_terminal_the_neighbours_are_a_table(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(world / "data")
    write_catalogue(world / "data", {str(n): f"[red]{n}[/red]" for n in range(ROWS)})
    build_index.run(BuildIndexConfig(embeddings=world / "emb", out=world / "idx"))
    capsys.readouterr()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    build_index.search(SearchConfig(index=world / "idx", item="0", k=2))
    out = capsys.readouterr().out
    assert "\t" not in out
    assert "Nearest to 0, [red]0[/red]" in out
    assert "[red]1[/red]" in out  # markup in a title is text
    assert "0.9968" in out


def test_asking_for_more_neighbours_than_there_are_says_so(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_index.run(BuildIndexConfig(embeddings=world / "emb", out=world / "idx"))
    found = build_index.search(SearchConfig(index=world / "idx", item="0", k=1000))
    assert len(found) == 39
    assert "found 39 neighbours, not 1000" in capsys.readouterr().err


def test_fault_46_a_stale_index_answers_with_a_warning_and_a_moved_one_without(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_index.run(BuildIndexConfig(embeddings=world / "emb", out=world / "idx"))
    shutil.rmtree(world / "emb")
    capsys.readouterr()
    build_index.search(SearchConfig(index=world / "idx", item="0", k=1))
    assert capsys.readouterr().err == "Nearest to 0, Title 0:\n"
    write_embeddings(world / "emb", ["0"], np.ones((1, 2), np.float32))
    found = build_index.search(SearchConfig(index=world / "idx", item="0", k=1))
    assert [n.item_id for n in found] == ["1"]
    assert "the index is stale" in capsys.readouterr().err


def test_low_recall_is_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    write_embeddings(tmp_path / "emb", [str(n) for n in range(2000)], random.normal(size=(2000, 16)).astype(np.float32))
    meta = build_index.run(BuildIndexConfig(embeddings=tmp_path / "emb", out=tmp_path / "idx", kind="PQ4x4"))
    assert meta["recall@10"] < 0.5
    assert meta["cosine_error"] > 0.01
    assert "recall@10 is below 0.95" in capsys.readouterr().err


def test_an_index_that_needs_more_memory_than_is_free_is_announced(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build_index, "_free_memory", lambda: 1000)
    build_index.run(BuildIndexConfig(embeddings=world / "emb", out=world / "idx"))
    assert "only 1 KB of memory are free" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["search", "--index", "{}/idx", "--item", "99"], 3, "item '99' is not in"),
        (["search", "--index", "{}/emb", "--item", "1"], 5, "index.json does not exist"),
        (["search", "--index", "{}/idx", "--item", "1", "--k", "0"], 2, "setting k = 0"),
        (["build-index", "--embeddings", "{}/data", "--out", "{}/new"], 5, "_manifest.json does not exist"),
        (["build-index", "--embeddings", "{}/emb", "--out", "{}/data"], 2, "choose another --out"),
        (["build-index", "--embeddings", "{}/emb", "--out", "{}/new", "--kind", "flatt"], 2, "did you mean 'flat'"),
        (["build-index", "--embeddings", "{}/emb", "--out", "{}/new", "--column", "image"], 5, "fused, text"),
    ],
)
def test_mistakes_end_in_one_paragraph_and_their_exit_code(
    arguments: list[str],
    code: int,
    message: str,
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    build_index.run(BuildIndexConfig(embeddings=world / "emb", out=world / "idx"))
    capsys.readouterr()
    assert vlm2rec(monkeypatch, *(text.format(world) for text in arguments)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
