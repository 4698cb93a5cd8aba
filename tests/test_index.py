"""The FAISS index: which kind, what it holds, what it finds, and how the folder is replaced."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
from embedding_folder import write_embeddings

from vlm2rec.downstream.index import parts, unit_vectors
from vlm2rec.downstream.index.index import ItemIndex, build_index
from vlm2rec.downstream.index.plan import bytes_per_vector, choose_factory, empty_index, plan_index
from vlm2rec.downstream.index.recall import drop_own, exact_neighbours, measure
from vlm2rec.downstream.index.unit_vectors import Reservoir, UnitBatch, unit_batches
from vlm2rec.embedder.contract import process, publish, schema
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, DataError
from vlm2rec.embedder.contract.process import Process
from vlm2rec.embedder.contract.storage import StorePath
from vlm2rec.pipelines import build_index as build_index_command
from vlm2rec.pipelines.config import BuildIndexConfig


def clustered(rows: int, dim: int, seed: int = 0, clusters: int = 20) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = random.normal(size=(clusters, dim))
    return (centres[np.arange(rows) % clusters] + 0.4 * random.normal(size=(rows, dim))).astype(np.float32)


def names(rows: int) -> list[str]:
    return [f"item-{row}" for row in range(rows)]


def brute_force(vectors: np.ndarray, row: int, k: int) -> tuple[list[int], np.ndarray]:
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    scores = unit @ unit[row]
    order = [other for other in np.argsort(-scores, kind="stable") if other != row][:k]
    return order, scores[order]


# --- choosing ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "rows", "dim", "factory"),
    [
        ("auto", 1, 2048, "Flat"),
        ("auto", 50_000, 2048, "Flat"),
        ("auto", 50_001, 2048, "HNSW16,SQ8"),
        ("auto", 1_000_000, 2048, "HNSW16,SQ8"),
        ("auto", 1_000_001, 2048, "IVF4096,PQ256x4fs,Refine(SQ8)"),
        ("auto", 4_000_000, 1024, "IVF8192,PQ128x4fs,Refine(SQ8)"),
        ("ivf", 1_000_001, 100, "IVF4096,SQ8"),  # 100 is not divisible by eight
        ("ivf", 20_000, 256, "IVF256,PQ32x4fs,Refine(SQ8)"),  # 512 lists would have less than 40 vectors each
        ("ivf", 300, 64, "IVF4,Flat"),
        ("ivf", 1, 64, "IVF1,Flat"),
        ("flat", 10**9, 8, "Flat"),
        ("hnsw", 5, 8, "HNSW16,SQ8"),
        ("HNSW32", 5, 8, "HNSW32"),
    ],
)
def test_the_kind_follows_the_size(kind: str, rows: int, dim: int, factory: str) -> None:
    assert choose_factory(kind, rows, dim) == factory


@pytest.mark.parametrize("kind", ["hsnw", "Flat,Flat", "PQ7", "", "IVF"])
def test_a_factory_string_that_faiss_refuses_is_a_setting_error(kind: str) -> None:
    with pytest.raises(ConfigError, match="FAISS factory string") as caught:
        choose_factory(kind, 1000, 64)
    assert "index_factory.cpp" not in str(caught.value)


def test_a_misspelt_kind_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'hnsw'"):
        choose_factory("hsnw", 1000, 64)


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf", "HNSW32", "IVF16,SQ8", "IVF16,PQ8x4", "PCA32,SQ8", "SQfp16"])
def test_the_estimated_file_size_is_within_a_tenth_of_the_real_one(kind: str, tmp_path: Path) -> None:
    write_embeddings(tmp_path / "emb", names(5000), clustered(5000, 64))
    plan = plan_index(tmp_path / "emb", kind=kind)
    meta = build_index(tmp_path / "emb", tmp_path / "idx", kind=kind, sample=10, plan=plan)
    assert meta["factory"] == plan.factory
    # a product quantiser's codebooks and a rotation do not grow with the catalogue: 64 KB at this width
    assert abs(plan.bytes - meta["bytes"]) < 0.1 * meta["bytes"] + 80_000
    assert plan.memory > plan.bytes
    assert plan.seconds > 0


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        ("Flat", 8192),
        ("SQ8", 2048),
        ("HNSW32", 8192 + 8 * 32 + 16),
        ("HNSW16,SQ8", 2048 + 8 * 16 + 16),
        ("IVF1024,PQ256x4fs,Refine(SQ8)", 8 + 128 + 2048),
        ("IVF1024,Flat", 8 + 8192),
        ("PCA256,L2norm,Flat", 1024),
        ("OPQ64_256,IVF4096,PQ64", 8 + 64),
        ("IVF64,PQ16x4fs,RFlat", 8 + 8 + 8192),
    ],
)
def test_bytes_per_vector_follow_the_factory_string(factory: str, expected: int) -> None:
    assert bytes_per_vector(factory, 2048) == expected


# --- streaming --------------------------------------------------------------------------------------------------
def test_a_reservoir_keeps_every_place_of_the_stream_equally_often() -> None:
    stream = np.arange(20, dtype=np.float32)[:, None]
    counts = np.zeros(20)
    for seed in range(4000):
        sample = Reservoir(5, 1, seed)
        for start in range(0, 20, 7):
            sample.offer(stream[start : start + 7])
        assert len(set(sample.rows.tolist())) == 5
        assert (sample.vectors[:, 0] == sample.rows).all()
        counts[sample.rows] += 1
    # each place is kept with probability 1/4: 1000 of 4000 times, standard deviation 27
    assert np.abs(counts - 1000).max() < 5 * 27.4


def test_a_reservoir_larger_than_the_stream_holds_the_whole_stream() -> None:
    sample = Reservoir(9, 2, 0)
    sample.offer(np.ones((3, 2), np.float32))
    sample.offer(np.zeros((1, 2), np.float32))
    assert sample.rows.tolist() == [0, 1, 2, 3]
    assert sample.vectors.tolist() == [[1, 1], [1, 1], [1, 1], [0, 0]]


def test_items_without_a_direction_are_left_out_and_counted(tmp_path: Path) -> None:
    vectors = np.array([[3, 4], [np.nan, np.nan], [0, 0], [np.inf, 1], [0, -2]], np.float32)
    write_embeddings(tmp_path / "emb", list("abcde"), vectors)
    (batch,) = unit_batches(tmp_path / "emb", "fused")
    assert batch.item_ids == ["a", "e"]
    assert batch.vectors == pytest.approx(np.array([[0.6, 0.8], [0, -1]]))
    assert (batch.first, batch.absent, batch.unusable) == (0, 1, 2)
    meta = build_index(tmp_path / "emb", tmp_path / "idx")
    assert (meta["rows"], meta["left_out"]) == (2, 3)
    assert meta["left_out_reasons"] == {"no vector": 1, "zero or not finite": 2}
    assert pq.read_table(tmp_path / "idx/ids.parquet").to_pydict() == {
        "row": [0, 1],
        "item_id": ["a", "e"],
        "title": ["", ""],
    }


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_a_build_never_holds_more_than_two_batches(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_vectors, "BATCH", 100)
    write_embeddings(tmp_path / "emb", names(3000), clustered(3000, 16), shard_size=1024)
    seen: list[weakref.ref[np.ndarray]] = []
    most, passes = 0, []

    def watch(what: str, batches: Iterable[UnitBatch]) -> Iterator[UnitBatch]:
        nonlocal most
        passes.append(what)
        for batch in batches:
            seen.append(weakref.ref(batch.vectors))
            most = max(most, sum(vectors() is not None for vectors in seen))
            assert len(batch.vectors) <= 100
            yield batch

    build_index(tmp_path / "emb", tmp_path / "idx", kind=kind, sample=50, watch=watch)
    assert 1 <= most <= 2
    training = [] if kind == "flat" else ["drawing a training sample"]
    assert passes == [*training, "adding vectors", "checking recall"]


# --- measuring --------------------------------------------------------------------------------------------------
def test_exact_neighbours_of_a_typed_example() -> None:
    vectors = np.array([[1, 0], [0.8, 0.6], [0, 1], [-1, 0], [0.6, -0.8]], np.float32)
    batches = [
        UnitBatch(0, list("ab"), vectors[:2], 0, 0, list("ab"), np.ones(2, bool)),
        UnitBatch(2, list("cde"), vectors[2:], 0, 0, list("cde"), np.ones(3, bool)),
    ]
    returned = np.array([[[4, 3], [0, -1]]])
    best, true = exact_neighbours(batches, vectors[[0, 2]], np.array([0, 2]), returned, 2)
    assert best == pytest.approx(np.array([[0.8, 0.6], [0.6, 0.0]]))  # never the query itself, whose cosine is 1
    assert true == pytest.approx(np.array([[[0.6, -1.0], [0.0, -np.inf]]]))


def test_a_query_is_dropped_from_its_own_neighbours_wherever_it_stands() -> None:
    rows = np.array([[7, 1, 2], [3, 8, 4], [5, 6, 0]])
    values = np.array([[9.0, 8.0, 7.0], [9.0, 8.0, 7.0], [9.0, 8.0, 7.0]])
    kept, of_kept = drop_own(rows, values, np.array([7, 8, 99]))
    assert kept.tolist() == [[1, 2], [3, 4], [5, 6]]  # the last query was not found: its last neighbour goes
    assert of_kept.tolist() == [[8, 7], [9, 7], [9, 8]]


def test_measured_recall_equals_a_brute_force_count() -> None:
    vectors = clustered(600, 16, clusters=600)  # no structure, so lists cut neighbours off
    faiss.normalize_L2(vectors)
    crippled = faiss.index_factory(16, "IVF20,Flat", faiss.METRIC_L2)
    crippled.cp.min_points_per_centroid = 1
    crippled.train(vectors)
    crippled.add(vectors)
    own = np.arange(0, 600, 3)
    quality = measure(
        crippled, vectors[own], own, [UnitBatch(0, names(600), vectors, 0, 0, names(600), np.ones(600, bool))]
    )
    assert [step["nprobe"] for step in quality.tried] == [16, 20]
    crippled.nprobe = 16
    found = crippled.search(vectors[own], 11)[1]
    hits = sum(
        len({int(row) for row in found[place] if row != query} & set(brute_force(vectors, query, 10)[0]))
        for place, query in enumerate(own)
    )
    assert 0.5 < hits / 2000 < 1
    assert quality.tried[0]["recall@10"] == pytest.approx(hits / 2000, abs=1e-4)
    assert quality.tried[1]["recall@10"] == 1.0


def test_the_least_effort_that_reaches_the_target_is_stored_in_the_index(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "emb", names(4000), clustered(4000, 16, clusters=4000))
    meta = build_index(tmp_path / "emb", tmp_path / "idx", kind="IVF64,Flat", sample=200)
    recalls = {step["nprobe"]: step["recall@10"] for step in meta["efforts_tried"]}
    assert list(recalls) == [16, 32, 64]
    assert recalls[16] < recalls[32] < recalls[64] == 1.0
    wanted = min(nprobe for nprobe, recall in recalls.items() if recall >= 0.95)
    assert meta["effort"] == {"nprobe": wanted}
    assert ItemIndex.open(tmp_path / "idx").index.nprobe == wanted
    assert meta["recall@10"] == pytest.approx(recalls[wanted], abs=1e-4)


def test_equal_vectors_do_not_count_against_recall(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "emb", names(60), np.ones((60, 8), np.float32))
    meta = build_index(tmp_path / "emb", tmp_path / "idx", kind="hnsw")
    assert meta["recall@10"] == 1.0


# --- what comes out ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_flat_index_finds_exactly_the_neighbours_of_a_brute_force_search(dtype: str, tmp_path: Path) -> None:
    vectors = clustered(700, 24, clusters=700).astype(dtype).astype(np.float32)
    vectors[3] = np.nan  # a missing row must not shift the ids after it
    write_embeddings(tmp_path / "emb", names(700), vectors, shard_size=256, row_group_size=100, dtype=dtype)
    meta = build_index(tmp_path / "emb", tmp_path / "idx")
    assert (meta["factory"], meta["rows"], meta["recall@10"], meta["recall_sample"]) == ("Flat", 699, 1.0, 699)
    assert meta["cosine_error"] < 1e-6
    found = ItemIndex.open(tmp_path / "idx")
    vectors[3] = -vectors.sum(0, where=~np.isnan(vectors))  # far from everything for the brute force
    for row in (0, 2, 4, 300, 699):
        rows, values = brute_force(vectors, row, 10)
        near = found.neighbours(f"item-{row}", 10)
        assert [n.item_id for n in near] == [f"item-{other}" for other in rows]
        assert [n.cosine for n in near] == pytest.approx(values, abs=1e-6)


@pytest.mark.parametrize(
    "kind", ["flat", "hnsw", "ivf", "HNSW32", "IVF8,Flat", "SQ8", "PCA16,L2norm,Flat", "IVF8,PQ16x4"]
)
def test_every_kind_finds_a_planted_twin_first(kind: str, tmp_path: Path) -> None:
    vectors = clustered(1200, 32, clusters=1200)
    vectors[77] = 3 * vectors[1100] + 0.02  # the same direction but for a trifle, and another length
    write_embeddings(tmp_path / "emb", names(1200), vectors)
    build_index(tmp_path / "emb", tmp_path / "idx", kind=kind, sample=50)
    for gone in (False, True):  # without the embeddings folder the query comes from the index itself
        if gone:
            shutil.rmtree(tmp_path / "emb")
        found = ItemIndex.open(tmp_path / "idx").neighbours("item-77", 3)
        assert found[0].item_id == "item-1100"
        assert found[0].cosine > 0.95
        assert "item-77" not in [n.item_id for n in found]
        assert len(found) == 3


def test_other_views_are_indexed_by_name(tmp_path: Path) -> None:
    fused, text = clustered(50, 8, seed=1), clustered(50, 8, seed=2)
    write_embeddings(tmp_path / "emb", names(50), fused, text=text)
    build_index(tmp_path / "emb", tmp_path / "idx", column="text")
    near = ItemIndex.open(tmp_path / "idx").neighbours("item-0", 2)
    assert [n.item_id for n in near] == [f"item-{row}" for row in brute_force(text, 0, 2)[0]]
    with pytest.raises(ArtifactError, match=r"no vectors in column 'image'.*fused, text"):
        build_index(tmp_path / "emb", tmp_path / "other", column="image")


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_text_and_image_end_to_end_are_indexed_and_searched(kind: str, tmp_path: Path) -> None:
    text, image = clustered(300, 6, seed=1), clustered(300, 6, seed=2)
    image[7] = np.nan
    write_embeddings(tmp_path / "emb", names(300), text, text=text, image=image)
    meta = build_index(tmp_path / "emb", tmp_path / "idx", column="concat", kind=kind)
    assert (meta["column"], meta["rows"], meta["left_out"]) == ("concat", 299, 1)
    opened = ItemIndex.open(tmp_path / "idx")
    whole = np.delete(np.concatenate([text, image], axis=1), 7, axis=0)
    expected = whole[3] / np.linalg.norm(whole[3])
    assert opened.query_vector(3) == pytest.approx(expected, abs=1e-6), "read from both columns of the embeddings"
    kept = np.delete(np.arange(300), 7)
    near = [n.item_id for n in opened.neighbours("item-3", 3)]
    if kind == "flat":
        assert near == [f"item-{kept[row]}" for row in brute_force(whole, 3, 3)[0]]


def test_one_item_has_no_neighbours_and_no_recall(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "emb", ["only"], np.ones((1, 4), np.float32))
    for kind in ("flat", "hnsw", "ivf"):
        meta = build_index(tmp_path / "emb", tmp_path / f"idx-{kind}", kind=kind)
        assert meta["recall@10"] is None
        assert ItemIndex.open(tmp_path / f"idx-{kind}").neighbours("only", 5) == []


def test_more_neighbours_than_items_gives_all_other_items_once(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "emb", names(5), clustered(5, 4, clusters=5))
    build_index(tmp_path / "emb", tmp_path / "idx")
    opened = ItemIndex.open(tmp_path / "idx")
    for k in (4, 5, 50):
        assert sorted(n.item_id for n in opened.neighbours("item-2", k)) == ["item-0", "item-1", "item-3", "item-4"]


@pytest.mark.parametrize("rows", [0, 3])
def test_a_view_without_a_vector_is_refused(rows: int, tmp_path: Path) -> None:
    write_embeddings(tmp_path / "emb", names(rows), np.zeros((rows, 4), np.float32))
    for kind in ("flat", "hnsw"):
        with pytest.raises(ArtifactError, match="no usable vector"):
            build_index(tmp_path / "emb", tmp_path / "idx", kind=kind)
    assert not (tmp_path / "idx").exists()


def test_too_few_vectors_for_the_factory_is_a_setting_error(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "emb", names(20), clustered(20, 8))
    with pytest.raises(ConfigError, match=r"cannot train 'IVF64,Flat' on 20 vectors.*choose --kind auto"):
        build_index(tmp_path / "emb", tmp_path / "idx", kind="IVF64,Flat")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("IDMap,Flat", "stores ids beside the vectors.*--kind Flat"),
        ("IDMap2,HNSW32", "stores ids beside the vectors.*--kind HNSW32"),
        ("NSG32,Flat", "cannot add 30 vectors to 'NSG32,Flat'"),
        ("ZnLattice2x4_4", "cannot read back the index 'ZnLattice2x4_4' that it wrote"),
    ],
)
def test_kinds_that_faiss_cannot_fill_or_save_are_setting_errors(tmp_path: Path, kind: str, message: str) -> None:
    write_embeddings(tmp_path / "emb", names(30), clustered(30, 8))
    with pytest.raises(ConfigError, match=message):
        build_index(tmp_path / "emb", tmp_path / "idx", kind=kind)
    assert not (tmp_path / "idx").exists()


def test_an_unknown_item_is_answered_with_the_nearest_ids(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "emb", ["B0001", "B0002", "zebra"], clustered(3, 4))
    build_index(tmp_path / "emb", tmp_path / "idx")
    with pytest.raises(DataError, match=r"'B00O1' is not in .*'B0001'") as caught:
        ItemIndex.open(tmp_path / "idx").neighbours("B00O1")
    assert caught.value.exit_code == 3


def test_the_nearest_id_is_found_in_a_large_catalogue(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "emb", [f"sku{n:06d}" for n in range(30_000)], clustered(30_000, 2))
    build_index(tmp_path / "emb", tmp_path / "idx", sample=10)
    with pytest.raises(DataError, match=r"such as 'sku01234[0-9]'"):
        ItemIndex.open(tmp_path / "idx").neighbours("sku01234")


def test_queries_of_another_length_are_refused(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "emb", names(9), clustered(9, 4))
    build_index(tmp_path / "emb", tmp_path / "idx")
    with pytest.raises(DataError, match=r"shape \(1, 5\).*\(Q, 4\)"):
        ItemIndex.open(tmp_path / "idx").search(np.ones((1, 5), np.float32), 3)


def test_the_same_seed_builds_the_same_ivf_index(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "emb", names(500), clustered(500, 8))
    for name in ("one", "two"):
        build_index(tmp_path / "emb", tmp_path / name, kind="ivf", seed=5)
    assert (tmp_path / "one/items.faiss").read_bytes() == (tmp_path / "two/items.faiss").read_bytes()


def test_a_quantised_index_takes_the_query_from_the_embeddings_while_they_are_unchanged(tmp_path: Path) -> None:
    vectors = clustered(300, 16)
    write_embeddings(tmp_path / "emb", names(300), vectors, shard_size=128, row_group_size=50)
    build_index(tmp_path / "emb", tmp_path / "idx", kind="hnsw")
    opened = ItemIndex.open(tmp_path / "idx")
    exact = vectors[200] / np.linalg.norm(vectors[200])
    assert opened.query_vector(200) == pytest.approx(exact, abs=1e-7)
    shutil.rmtree(tmp_path / "emb")
    write_embeddings(tmp_path / "emb", names(300), -vectors)
    rounded = opened.query_vector(200)
    assert rounded == pytest.approx(exact, abs=0.01)
    assert np.abs(rounded - exact).max() > 1e-5


# --- the folder -------------------------------------------------------------------------------------------------
def test_fault_46_a_stale_index_is_told_from_a_fresh_one(tmp_path: Path) -> None:
    emb, vectors = tmp_path / "emb", clustered(40, 8)
    write_embeddings(emb, names(40), vectors, settings={"adapter": "a"})
    build_index(emb, tmp_path / "idx")
    opened = ItemIndex.open(tmp_path / "idx")
    assert opened.stale() is None
    opened.require_fresh(emb)

    write_embeddings(tmp_path / "other", names(40), vectors, settings={"adapter": "b"})
    assert "other settings" in str(opened.stale(tmp_path / "other"))
    with pytest.raises(ArtifactError, match=r"stale: .*other settings.*build-index"):
        opened.require_fresh(tmp_path / "other")

    write_embeddings(tmp_path / "mended", names(40), vectors + 1, settings={"adapter": "a"})
    assert "other vectors" in str(opened.stale(tmp_path / "mended"))

    (emb / schema.MANIFEST_FILE).unlink()
    assert "not a finished embeddings folder" in str(opened.stale())


def test_a_rebuild_replaces_the_whole_index(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "emb", names(30), clustered(30, 8))
    write_embeddings(tmp_path / "more", [f"new-{row}" for row in range(50)], clustered(50, 8))
    build_index(tmp_path / "emb", tmp_path / "idx")
    build_index(tmp_path / "more", tmp_path / "idx", kind="hnsw")
    opened = ItemIndex.open(tmp_path / "idx")
    assert len(opened) == 50
    assert opened.neighbours("new-0", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emb", "idx", "more"]


def test_a_rebuild_works_where_folders_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "_exchange", lambda one, other: False)
    test_a_rebuild_replaces_the_whole_index(tmp_path)


def test_a_reader_never_sees_half_of_a_rebuild(tmp_path: Path) -> None:
    for name, rows in (("small", 20), ("large", 45)):
        write_embeddings(tmp_path / name, [f"{name}-{row}" for row in range(rows)], clustered(rows, 4))
    build_index(tmp_path / "small", tmp_path / "idx")
    done = threading.Event()
    seen: set[str] = set()
    wrong: list[BaseException] = []

    def read() -> None:
        while not done.is_set():
            try:
                opened = ItemIndex.open(tmp_path / "idx")
                first = str(opened.ids["item_id"][0].as_py())
                seen.add(first)
                assert len(opened) == (20 if first == "small-0" else 45)
            except BaseException as error:  # a failed assertion in a thread would go unheard
                wrong.append(error)
                return

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(500):
        if wrong or (turn >= 30 and len(seen) == 2):
            break
        build_index(tmp_path / ("small" if turn % 2 else "large"), tmp_path / "idx", sample=5)
    done.set()
    reader.join()
    assert not wrong, wrong
    assert seen == {"small-0", "large-0"}


def test_a_failed_rebuild_leaves_the_old_index_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_embeddings(tmp_path / "emb", names(30), clustered(30, 8))
    build_index(tmp_path / "emb", tmp_path / "idx")
    before = {path.name: path.read_bytes() for path in (tmp_path / "idx").iterdir()}

    def full_disk(*_: object) -> None:
        raise RuntimeError("Error in FileIOWriter::operator() at io.cpp:10: write error: No space left on device")

    monkeypatch.setattr(faiss, "write_index", full_disk)
    with pytest.raises(ArtifactError, match=r"cannot be written .*No space left"):
        build_index(tmp_path / "emb", tmp_path / "idx")
    assert {path.name: path.read_bytes() for path in (tmp_path / "idx").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emb", "idx"]


def test_a_folder_with_anything_else_in_it_is_never_replaced(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "emb", names(30), clustered(30, 8))
    for name, files in {"notes": ["thesis.tex"], "mixed": ["index.json", "keep.txt"], "half": ["items.faiss"]}.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("{}")
        with pytest.raises(ConfigError, match="choose another --out"):
            build_index(tmp_path / "emb", tmp_path / name)
        assert [path.name for path in sorted((tmp_path / name).iterdir())] == files
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another --out"):
        build_index(tmp_path / "emb", tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert build_index(tmp_path / "emb", tmp_path / "empty")["rows"] == 30


def test_an_unwritable_place_is_refused_before_the_vectors_are_read(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "emb", names(30), clustered(30, 8))
    (tmp_path / "file").write_text("")
    passes = []
    with pytest.raises(ConfigError, match="cannot be written"):
        build_index(
            tmp_path / "emb", tmp_path / "file" / "idx", watch=lambda what, batches: passes.append(what) or batches
        )
    assert passes == []


def test_what_a_killed_build_left_is_cleared_by_the_next_one(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "emb", names(30), clustered(30, 8))
    finished = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)

    def left_by(writer: Process) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(process, "this_process", lambda: writer)
            return tmp_path / publish.temporary_name("idx", "building")

    ours = process.this_process()
    dead, alive = left_by(ours._replace(pid=int(finished.stdout))), left_by(ours)
    of_a_container, held = left_by(ours._replace(pids="1")), left_by(ours._replace(pids="1", host="web"))
    other_boot = left_by(ours._replace(boot="b00"))
    for folder in (dead, alive, of_a_container, held, other_boot):
        folder.mkdir()
    lock = os.open(held, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    build_index(tmp_path / "emb", tmp_path / "idx")
    os.close(lock)
    assert not dead.exists() and not of_a_container.exists()
    assert alive.exists() and held.exists() and other_boot.exists()


@pytest.mark.parametrize("file", ["items.faiss", "ids.parquet", "index.json"])
def test_a_missing_or_cut_file_of_the_index_is_named(file: str, tmp_path: Path) -> None:
    write_embeddings(tmp_path / "emb", names(30), clustered(30, 8))
    build_index(tmp_path / "emb", tmp_path / "idx")
    path = tmp_path / "idx" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ArtifactError, match=file):
        ItemIndex.open(tmp_path / "idx")
    path.unlink()
    with pytest.raises(ArtifactError, match=f"{file}.*build-index"):
        ItemIndex.open(tmp_path / "idx")


@pytest.mark.parametrize("file", ["items.faiss", "ids.parquet", "index.json"])
@pytest.mark.parametrize("rows", [30, 31])
def test_an_index_of_two_builds_is_refused(rows: int, file: str, tmp_path: Path) -> None:
    for name, ids in (("one", names(30)), ("other", names(rows)[::-1])):
        write_embeddings(tmp_path / f"emb-{name}", ids, clustered(len(ids), 8, len(name)))
        build_index(tmp_path / f"emb-{name}", tmp_path / name)
    shutil.copy(tmp_path / "other" / file, tmp_path / "one" / file)
    with pytest.raises(ArtifactError, match=r"another build wrote it.*run `vlm2rec build-index` again"):
        ItemIndex.open(tmp_path / "one")


@pytest.mark.parametrize("file", ["items.faiss", "ids.parquet"])
def test_one_flipped_bit_anywhere_in_an_index_is_found(file: str, tmp_path: Path) -> None:
    write_embeddings(tmp_path / "emb", names(30), clustered(30, 8))
    build_index(tmp_path / "emb", tmp_path / "idx")
    whole = (tmp_path / "idx" / file).read_bytes()
    for place in np.linspace(0, len(whole) - 1, 20).astype(int):
        (tmp_path / "idx" / file).write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ArtifactError, match=f"{file} is damaged"):
            ItemIndex.open(tmp_path / "idx")


def test_an_index_from_before_checksums_opens_and_says_that_it_is_unchecked(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "emb", names(30), clustered(30, 8))
    meta = build_index(tmp_path / "emb", tmp_path / "idx")
    assert not ItemIndex.open(tmp_path / "idx").unchecked
    del meta["files"]
    schema.write_json(tmp_path / "idx/index.json", meta)
    opened = ItemIndex.open(tmp_path / "idx")
    assert opened.unchecked and len(opened.neighbours("item-3", 4)) == 4


@pytest.mark.parametrize(
    "change",
    [{"rows": "30"}, {"factory": None}, {"embeddings": 7}, {"files": []}, {"files": {"items.faiss": {}}}],
    ids=lambda change: next(iter(change)),
)
def test_a_damaged_index_json_is_named(change: dict[str, Any], tmp_path: Path) -> None:
    write_embeddings(tmp_path / "emb", names(30), clustered(30, 8))
    meta = build_index(tmp_path / "emb", tmp_path / "idx")
    schema.write_json(tmp_path / "idx/index.json", {**meta, **change})
    with pytest.raises(ArtifactError, match=r"index\.json is damaged.*build-index"):
        ItemIndex.open(tmp_path / "idx")
    assert build_index(tmp_path / "emb", tmp_path / "idx")["rows"] == 30, "the command that mends it"


@pytest.mark.parametrize("file", ["items.faiss", "ids.parquet", "index.json"])
def test_a_pipe_in_place_of_a_file_of_the_index_is_not_opened(file: str, tmp_path: Path) -> None:
    write_embeddings(tmp_path / "emb", names(30), clustered(30, 8))
    build_index(tmp_path / "emb", tmp_path / "idx")
    (tmp_path / "idx" / file).unlink()
    os.mkfifo(tmp_path / "idx" / file)
    with pytest.raises(ArtifactError, match=file):
        ItemIndex.open(tmp_path / "idx")


def test_an_address_that_only_index_json_names_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_embeddings(tmp_path / "emb", names(300), clustered(300, 8))
    meta = build_index(tmp_path / "emb", tmp_path / "idx", kind="HNSW8,SQ4")
    schema.write_json(tmp_path / "idx/index.json", {**meta, "embeddings": "s3://strangers/emb"})
    monkeypatch.setattr(StorePath, "_store", property(lambda path: pytest.fail(f"{path} was asked")))
    opened = ItemIndex.open(tmp_path / "idx")
    assert len(opened.neighbours("item-3", 4)) == 4
    rounded = opened.query_vector(3)
    opened.embeddings = tmp_path / "emb"
    assert not np.array_equal(opened.query_vector(3), rounded), "from the folder that the user names"


def test_an_index_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "emb", names(30), clustered(30, 8))
    meta = build_index(tmp_path / "emb", tmp_path / "idx")
    schema.write_json(tmp_path / "idx/index.json", {**meta, "schema_version": 99})
    with pytest.raises(ArtifactError, match="index schema version 99"):
        ItemIndex.open(tmp_path / "idx")


def test_an_unfinished_export_is_refused(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "emb", names(30), clustered(30, 8))
    (tmp_path / "emb" / schema.MANIFEST_FILE).unlink()
    with pytest.raises(ArtifactError, match="export-items"):
        build_index(tmp_path / "emb", tmp_path / "idx")


# --- in parts -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rows", "size", "expected"),
    [
        ([4, 4, 4], 4, [range(0, 1), range(1, 2), range(2, 3)]),
        ([4, 4, 4], 5, [range(0, 2), range(2, 3)]),
        ([4, 4, 1], 100, [range(0, 3)]),
        ([], 3, []),
    ],
)
def test_shards_are_divided_into_parts(rows: list[int], size: int, expected: list[range]) -> None:
    assert parts.groups(rows, size) == expected


@pytest.mark.parametrize(
    "kind", ["Flat", "SQ8", "IVF4,Flat", pytest.param("IVF4,PQ4,Refine(SQ8)", marks=pytest.mark.slow), "PCA8,IVF4,SQ8"]
)
def test_merged_parts_find_what_one_index_finds(kind: str, tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(400, 16)).astype(np.float32)
    vectors[7] = np.nan
    write_embeddings(tmp_path / "e", [f"i{row}" for row in range(400)], vectors, shard_size=90)
    whole = empty_index(kind, 16)
    whole.train(np.delete(vectors, 7, axis=0))
    empty = faiss.serialize_index(whole)
    merged = faiss.deserialize_index(empty)
    for batch in unit_batches(tmp_path / "e", "fused"):
        whole.add(batch.vectors)
    for shards in parts.groups([90, 90, 90, 90, 40], 150):
        parts.merge(merged, faiss.deserialize_index(parts.part_of(empty, tmp_path / "e", "fused", shards)))
    assert merged.ntotal == whole.ntotal == 399
    queries = vectors[:5] / np.linalg.norm(vectors[:5], axis=1, keepdims=True)
    for mine, other in zip(merged.search(queries, 7), whole.search(queries, 7), strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("hnsw", "whose graph links every vector"),
        ("IVF2_HNSW8,Flat", "whose graph links every vector"),
        ("IVF2,PQ4x4fs", "whose blocks of codes"),
    ],
)
def test_what_cannot_be_merged_is_not_built_in_parts(kind: str, message: str, tmp_path: Path) -> None:
    write_embeddings(tmp_path / "e", ["a", "b", "c"], np.eye(3, 8, dtype=np.float32))
    with pytest.raises(ConfigError, match=message):
        build_index(tmp_path / "e", tmp_path / "index", kind=kind, ray_tasks=2)
    assert not (tmp_path / "index").exists()


def test_a_large_catalogue_is_planned_so_that_its_parts_can_be_merged() -> None:
    assert choose_factory("auto", 40_000, 64, in_parts=True) == "Flat"
    assert choose_factory("auto", 200_000, 64, in_parts=True) == "IVF2048,PQ8,Refine(SQ8)"


def test_workers_without_ray_are_refused(tmp_path: Path) -> None:
    config = BuildIndexConfig(embeddings=tmp_path / "e", out=tmp_path / "index", num_workers=2)
    with pytest.raises(ConfigError, match="without --engine ray"):
        build_index_command.run(config)
