"""Semantic ids: no two items alike, new items coded by an old codebook, and a table that means what it says."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from embedding_folder import write_embeddings
from hypothesis import given
from hypothesis import strategies as st
from recommender_world import cyclic_sequences, write_dataset
from typer.testing import CliRunner

from vlm2rec.downstream.semantic_ids import codebook as codebooks
from vlm2rec.downstream.semantic_ids.folder import SemanticIds, build
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError
from vlm2rec.pipelines import semantic_ids
from vlm2rec.pipelines.cli import app
from vlm2rec.pipelines.config import SemanticIdsConfig

SMALL: dict[str, Any] = {"levels": 2, "size": 8}


def clouds(count: int, dim: int = 12, seed: int = 0) -> np.ndarray:
    """Return vectors in ten clouds, (count, dim)."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(10, dim))
    return (centres[np.arange(count) % 10] + 0.2 * random.normal(size=(count, dim))).astype(np.float32)


def names(count: int) -> list[str]:
    return [f"i{number}" for number in range(count)]


@pytest.fixture
def embeddings(tmp_path: Path) -> Path:
    """120 items, three of them without a vector; items 0 and 40 to 44 have the same one."""
    vectors = clouds(120)
    vectors[40:45] = vectors[0]
    vectors[[3, 77, 119]] = np.nan
    write_embeddings(tmp_path / "emb", names(120), vectors, shard_size=50)
    return tmp_path / "emb"


def test_a_code_is_the_nearest_codeword_of_what_is_left() -> None:
    vectors = clouds(200)
    book = codebooks.train(vectors, 3, 8, seed=0)
    codes = book.encode(vectors)
    rest = vectors.astype(np.float64)
    for level, words in enumerate(book.codewords):
        far = np.square(rest[:, None] - words[None]).sum(axis=2)
        np.testing.assert_allclose(far[np.arange(200), codes[:, level]], far.min(axis=1), rtol=1e-4, atol=1e-6)
        rest = rest - words[codes[:, level]]
    np.testing.assert_allclose(vectors - book.decode(codes), rest, atol=1e-5)
    assert book.decode(codes[:, :1]).shape == vectors.shape


def test_every_level_tells_more_and_ten_words_tell_ten_clouds(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "emb", names(300), clouds(300))
    record = build(tmp_path / "emb", tmp_path / "out", levels=3, size=10)
    levels = record["quality"]["levels"]
    told = [level["explained"] for level in levels]
    assert told == sorted(told) and told[0] > 0.7
    assert levels[0]["neighbours"] > 0.85 and levels[0]["chance"] == pytest.approx(0.12, abs=0.04)
    assert levels[0]["even"] > 0.7


def test_later_levels_use_all_their_codewords_where_vectors_point_everywhere() -> None:
    vectors = np.random.default_rng(0).normal(size=(600, 384)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    codes = codebooks.train(vectors, 3, 64, seed=0).encode(vectors)
    for level in range(3):  # with single vectors to start from, one of 64 codewords gets half of the items
        assert np.bincount(codes[:, level]).max() < 3 * 600 / 64


def test_the_table_is_what_brute_force_finds(embeddings: Path, tmp_path: Path) -> None:
    quality = build(embeddings, tmp_path / "out", **SMALL, sample=1000)["quality"]
    found = SemanticIds.open(tmp_path / "out")
    vectors = {row["item_id"]: row["fused"] for row in pq.ParquetDataset(embeddings).read().to_pylist()}
    unit = np.array([vectors[item] for item in found.item_ids], np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    scores = unit @ unit.T
    np.fill_diagonal(scores, -np.inf)
    near = np.argsort(-scores, axis=1)[:, :10]
    same = found.codes[:, 0][near] == found.codes[:, 0][:, None]
    assert quality["levels"][0]["neighbours"] == pytest.approx(same.mean(), abs=0.01)  # equal vectors tie
    rest = unit - found.codebook.decode(found.codes[:, :1])
    variance = np.square(unit - unit.mean(axis=0)).sum()
    assert quality["levels"][0]["explained"] == pytest.approx(1 - np.square(rest).sum() / variance, abs=1e-4)
    _, sizes = np.unique(found.codes[:, :-1], axis=0, return_counts=True)
    assert (quality["distinct"], quality["largest"]) == (len(sizes), sizes.max())
    assert quality["sharing"] == sizes[sizes > 1].sum() >= 6
    decoded = found.codebook.decode(found.codes[:, :-1])
    decoded /= np.linalg.norm(decoded, axis=1, keepdims=True)
    by_codes = decoded @ decoded.T
    np.fill_diagonal(by_codes, -np.inf)
    chosen = np.argsort(-by_codes, axis=1)[:, :10]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(chosen, near, strict=True)])
    assert quality["recall"] == pytest.approx(recall, abs=0.1)  # items with the same codes tie


@pytest.mark.parametrize("balanced", [False, True])
def test_every_item_is_there_once_and_no_two_have_the_same_codes(
    embeddings: Path, tmp_path: Path, balanced: bool
) -> None:
    record = build(embeddings, tmp_path / "out", **SMALL, balanced=balanced)
    rows = pq.read_table(tmp_path / "out" / "semantic_ids.parquet").to_pylist()
    assert [row["item_id"] for row in rows] == names(120)
    assert [row["item_id"] for row in rows if row["codes"] is None] == ["i3", "i77", "i119"]
    codes = [tuple(row["codes"]) for row in rows if row["codes"] is not None]
    assert len(set(codes)) == len(codes) == record["items"] == 117 and record["left_out"] == 3
    assert max(code[-1] for code in codes) + 1 == record["last"]
    if balanced:
        for level in range(2):
            assert np.bincount([code[level] for code in codes], minlength=8).max() <= 15


def test_the_same_seed_gives_the_same_codes(embeddings: Path, tmp_path: Path) -> None:
    for out in "ab":
        build(embeddings, tmp_path / out, **SMALL)
    tables = [pq.read_table(tmp_path / out / "semantic_ids.parquet") for out in "ab"]
    assert tables[0].equals(tables[1])


def test_new_items_are_coded_by_an_earlier_codebook_and_the_others_keep_theirs(
    embeddings: Path, tmp_path: Path
) -> None:
    build(embeddings, tmp_path / "old", **SMALL)
    old = SemanticIds.open(tmp_path / "old")
    before = dict(zip(old.item_ids, map(tuple, old.codes.tolist()), strict=True))
    vectors = np.concatenate([clouds(120)[10:], clouds(40, seed=5)])
    vectors[-2:] = clouds(120)[0]  # as items 0 and 40 to 44: their codes are taken
    ids = [*names(120)[10:], *(f"new {number}" for number in range(40))]
    write_embeddings(tmp_path / "emb2", ids, vectors)
    record = build(tmp_path / "emb2", tmp_path / "new", like=tmp_path / "old")
    new = SemanticIds.open(tmp_path / "new")
    after = dict(zip(new.item_ids, map(tuple, new.codes.tolist()), strict=True))
    kept = before.keys() & after.keys()
    assert record["kept"] == len(kept) == 108  # of the 110, two had no vector before
    assert all(after[item] == before[item] for item in kept)
    assert len(set(after.values())) == len(after) == 150
    assert not {after["new 38"], after["new 39"]} & set(before.values())
    assert np.array_equal(new.codebook.codewords, old.codebook.codewords)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 10**6))
def test_an_even_assignment_is_full_and_nobody_would_leave_it(count: int, size: int, seed: int) -> None:
    costs = np.random.default_rng(seed).normal(size=(count, size)).astype(np.float32)
    choice = codebooks.assign_evenly(costs.copy())
    room = -(-count // size)
    held = np.bincount(choice, minlength=size)
    assert held.max() <= room
    for item, word in itertools.product(range(count), range(size)):
        if costs[item, word] < costs[item, choice[item]]:  # the item would rather be there: it is full of nearer ones
            assert held[word] == room and costs[choice == word, word].max() <= costs[item, word]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=20), st.integers(0, 20))
def test_the_last_code_goes_on_where_the_earlier_ones_end(codes: list[tuple[int, int]], split: int) -> None:
    rows = np.array(codes, np.int32).reshape(-1, 2)
    split = min(split, len(rows))
    first = np.column_stack([rows[:split], codebooks.unique_level(rows[:split])])
    both = np.concatenate([first, np.column_stack([rows[split:], codebooks.unique_level(rows[split:], first)])])
    assert np.array_equal(both[:, -1], codebooks.unique_level(rows))
    assert len(np.unique(both, axis=0)) == len(rows)


def test_what_cannot_be_is_refused_in_words(embeddings: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use --codebook 58 or fewer"):
        build(embeddings, tmp_path / "out", size=256)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not earlier semantic ids"):
        build(embeddings, tmp_path / "mine", **SMALL)
    build(embeddings, tmp_path / "old", **SMALL)
    write_embeddings(tmp_path / "wide", names(20), clouds(20, dim=14))
    with pytest.raises(ConfigError, match="vectors of the same encoder"):
        build(tmp_path / "wide", tmp_path / "out", like=tmp_path / "old")
    with pytest.raises(ConfigError, match="one of the two"):
        build(embeddings, tmp_path / "out", like=tmp_path / "old", balanced=True)
    assert not (tmp_path / "out").exists()


def test_another_size_than_that_of_the_earlier_codebook_is_refused(embeddings: Path, tmp_path: Path) -> None:
    build(embeddings, tmp_path / "old", **SMALL)
    given: dict[str, Any] = {"embeddings": embeddings, "out": tmp_path / "out", "like": tmp_path / "old"}
    for size, message in (({"levels": 4}, "--levels 4 with --like"), ({"codebook": 16}, "--codebook 16 with --like")):
        with pytest.raises(ConfigError, match=message):
            semantic_ids.run(SemanticIdsConfig(**given, **size))
    assert not (tmp_path / "out").exists()
    semantic_ids.run(SemanticIdsConfig(**given, levels=2, codebook=8))


@pytest.mark.parametrize("file", ["semantic_ids.parquet", "codebook.safetensors", "semantic_ids.json"])
@pytest.mark.parametrize("how", ["gone", "cut", "flipped"])
def test_a_damaged_folder_is_found(embeddings: Path, tmp_path: Path, file: str, how: str) -> None:
    build(embeddings, tmp_path / "old", **SMALL)
    path = tmp_path / "old" / file
    content = bytearray(path.read_bytes())
    path.unlink()
    if how == "flipped":
        content[len(content) // 2 if file.endswith("parquet") else 2] ^= 0xFF
    if how != "gone":
        path.write_bytes(content[: len(content) // 2] if how == "cut" else content)
    with pytest.raises(ArtifactError):
        SemanticIds.open(tmp_path / "old")


def test_one_item_has_no_neighbours(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "emb", ["a"], clouds(1))
    record = semantic_ids.run(SemanticIdsConfig(embeddings=tmp_path / "emb", out=tmp_path / "out", codebook=1))
    assert record["quality"]["recall"] is None and record["quality"]["levels"][0]["neighbours"] is None


def test_the_command_prints_the_table(embeddings: Path, tmp_path: Path) -> None:
    given = ["--embeddings", str(embeddings), "--out", str(tmp_path / "out"), "--codebook", "8", "--levels", "2"]
    found = CliRunner().invoke(app, ["semantic-ids", *given])
    assert found.exit_code == 0
    assert "8 of 8" in found.output and "117 with codes, 3 without a fused vector" in found.output


def test_the_recipe_of_the_docs_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "semantic-ids.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"```python\n(.*?)```", page, re.S)
    write_dataset(tmp_path / "data", cyclic_sequences(names(30), 40), names(30), max_history=5)
    write_embeddings(tmp_path / "emb", names(30), clouds(30))
    build(tmp_path / "emb", tmp_path / "ids", levels=2, size=4)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(recipe, found)
    assert found["losses"][-1] < found["losses"][0]
    assert schema.ITEM_ID in found["codes"].columns
