"""`vlm2rec evaluate` (Task 1): real vectors of a tiny model, ranked, written and held against a brute force."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from embedding_folder import write_embeddings
from recommender_world import with_cold_items

from vlm2rec.downstream.evaluation import protocol
from vlm2rec.downstream.evaluation.metrics import bound_check
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, DataError
from vlm2rec.embedder.contract.schema import METRICS
from vlm2rec.pipelines import evaluate, export_items
from vlm2rec.pipelines.config import EvaluateConfig, ExportConfig

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def exported(tiny: Tiny, drawn_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "embeddings"
    export_items.run(
        ExportConfig(
            data=drawn_dataset,
            backbone=str(tiny("qwen2_5_vl")),
            out=out,
            max_pixels=56 * 56,
            dtype="float32",
            device="cpu",
        )
    )
    return out


def run(data: Path, embeddings: Path, out: Path, **more: object) -> dict:
    return evaluate.run(
        EvaluateConfig(data=data, embeddings=embeddings, out=out, dtype="float32", device="cpu", **more)
    )  # type: ignore[arg-type]


def test_metrics_equal_a_brute_force_over_the_written_vectors(
    drawn_dataset: Path, exported: Path, tmp_path: Path
) -> None:
    result = run(drawn_dataset, exported, tmp_path / "out")
    dataset = Dataset(drawn_dataset)
    rows = {
        r["item_id"]: np.array(r["fused"]) for p in exported.glob("*.parquet") for r in pq.read_table(p).to_pylist()
    }
    items = np.stack([rows[i] / np.linalg.norm(rows[i]) for i in dataset.item_ids])
    raw = np.stack([rows[i] for i in dataset.item_ids])
    histories, hits = dataset.histories("test"), []
    seen = [
        set(s.tolist()) | {v}
        for s, v in zip(dataset.train_sequences(), dataset.histories("valid").targets, strict=True)
    ]
    full_hits = []
    for seed in dataset.candidate_seeds:
        negatives = dataset.negatives(seed)
        for user in range(len(histories)):
            scores = items @ raw[histories.of(user)].mean(axis=0)
            target = histories.targets[user]
            hits.append(np.sum(scores[negatives[user]] > scores[target]) < 10)
            if seed == 0:
                rivals = [i for i in range(len(items)) if i != target and i not in seen[user]]
                full_hits.append(np.sum(scores[rivals] > scores[target]) < 10)
    assert result["candidates"]["f2f"]["H@10"] == pytest.approx(np.mean(hits), abs=1e-9)
    assert result["full"]["f2f"]["H@10"] == pytest.approx(np.mean(full_hits), abs=1e-9)


def test_the_folder_holds_every_pair_view_and_user(drawn_dataset: Path, exported: Path, tmp_path: Path) -> None:
    result = run(drawn_dataset, exported, tmp_path / "out")
    assert list(result["candidates"]) == ["f2f", "t2f", "v2f", "t2t", "v2v"]
    assert set(result["geometry"]) == {"fused", "text", "image"}
    assert all(set(values) == {"A_pos", "A_neg", "U", "S"} for values in result["geometry"].values())
    assert set(result["dispersion"]) == {"fused", "text", "image"}
    assert all(set(values) == {"U_users", "U_items", "offset"} for values in result["dispersion"].values())
    assert all(bound_check(row) for row in result["candidates"].values())
    users = pq.read_table(tmp_path / "out" / "users.parquet").to_pylist()
    assert len(users) == result["users"] * 5 * (2 + 1)
    mean = np.mean([r["N@20"] for r in users if r["protocol"] == "full" and r["view"] == "t2f"])
    assert result["full"]["t2f"]["N@20"] == pytest.approx(mean)
    for view, pair in (("fused", "f2f"), ("text", "t2t"), ("image", "v2v")):
        mine = [r for r in users if (r["protocol"], r["seed"], r["view"]) == ("candidates", 0, pair)]
        found = {name: np.mean([r[name] for r in mine]) for name in ("A_pos", "A_neg")}
        assert found == pytest.approx({name: result["geometry"][view][name] for name in found}), view
    others = [r for r in users if r["view"] not in ("f2f", "t2t", "v2v") or r["protocol"] == "full" or r["seed"] == 1]
    assert len(others) == result["users"] * (5 * 3 - 3) and all(r["A_pos"] is None is r["A_neg"] for r in others)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == json.loads(json.dumps(result))


def test_the_sequence_encoder_must_be_the_one_of_the_table(
    tiny: Tiny, drawn_dataset: Path, exported: Path, tmp_path: Path
) -> None:
    result = run(drawn_dataset, exported, tmp_path / "out", backbone=str(tiny("qwen2_5_vl")))
    assert result["users_from"] == "sequence"
    with pytest.raises(ArtifactError, match="the same backbone and adapter"):
        run(drawn_dataset, exported, tmp_path / "x", backbone=str(tiny("qwen2_vl")))
    with pytest.raises(ConfigError, match="give --backbone"):
        run(drawn_dataset, exported, tmp_path / "x", users_from="sequence")


def test_items_without_a_vector_are_refused_or_counted(drawn_dataset: Path, tmp_path: Path) -> None:
    ids = Dataset(drawn_dataset).item_ids
    vectors = np.random.default_rng(0).normal(size=(len(ids) - 2, 8)).astype(np.float32)
    folder = tmp_path / "embeddings"
    write_embeddings(folder, ids[2:], vectors)
    with pytest.raises(ArtifactError, match=f"2 of {len(ids)} items have no fused vector"):
        run(drawn_dataset, folder, tmp_path / "a")
    assert run(drawn_dataset, folder, tmp_path / "b", missing="zero")["missing"] == 2


def test_cold_items_are_not_ranked_and_need_no_vector(drawn_dataset: Path, tmp_path: Path) -> None:
    data = with_cold_items(drawn_dataset, tmp_path / "data")
    ids = Dataset(data).item_ids
    vectors = np.random.default_rng(0).normal(size=(len(ids), 8)).astype(np.float32)
    write_embeddings(tmp_path / "all", ids, vectors)
    is_warm = np.isin(ids, Dataset(drawn_dataset).item_ids)
    write_embeddings(tmp_path / "warm", Dataset(drawn_dataset).item_ids, vectors[is_warm])
    given = ((drawn_dataset, "warm"), (data, "warm"), (data, "all"))
    found = [run(place, tmp_path / name, tmp_path / f"out {n}") for n, (place, name) in enumerate(given)]
    for key in ("users", "items", "missing", "candidates", "candidates_std", "full", "tail", "geometry"):
        assert found[0][key] == found[1][key] == found[2][key], key
    users = [(tmp_path / f"out {n}" / "users.parquet").read_bytes() for n in range(3)]
    assert users[0] == users[1] == users[2]


def test_without_the_image_folder_histories_are_not_encoded(
    tiny: Tiny, drawn_dataset: Path, exported: Path, tmp_path: Path
) -> None:
    data, images = tmp_path / "data", Dataset(drawn_dataset).image_root
    shutil.copytree(drawn_dataset, data)  # alone: its images are not beside it
    more = {"backbone": str(tiny("qwen2_5_vl")), "vision_cache": "off"}
    with pytest.raises(DataError, match=r"images, is missing.*--images"):
        run(data, exported, tmp_path / "out", backbone=str(tmp_path / "no backbone"))
    assert not (tmp_path / "out" / "metrics.json").exists()
    there = run(data, exported, tmp_path / "there", images=images, **more)
    assert there["candidates"] == run(drawn_dataset, exported, tmp_path / "here", **more)["candidates"]
    assert run(data, exported, tmp_path / "mean")["users_from"] == "mean"  # reads no image


def test_random_vectors_score_at_chance_and_the_answer_itself_at_one(drawn_dataset: Path, tmp_path: Path) -> None:
    """A leak would show as a gain without any information."""
    dataset = Dataset(drawn_dataset)
    means = []
    for seed in range(30):
        vectors = np.random.default_rng(seed).normal(size=(len(dataset.item_ids), 16)).astype(np.float32)
        write_embeddings(tmp_path / str(seed), dataset.item_ids, vectors)
        result = run(dataset.path, tmp_path / str(seed), tmp_path / f"out{seed}")
        means.append(result["candidates"]["f2f"]["H@10"])
    assert np.mean(means) == pytest.approx(10 / 21, abs=0.03)  # 20 candidates and the target


def test_a_random_order_is_told_exactly_as_equal_vectors_have_it(
    drawn_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If all vectors are the same, every rival ties with the target, and ties count in expectation."""
    ids = Dataset(drawn_dataset).item_ids
    write_embeddings(tmp_path / "embeddings", ids, np.ones((len(ids), 4), np.float32))
    for split in ("valid", "test"):
        result = run(drawn_dataset, tmp_path / "embeddings", tmp_path / "out", split=split)
        for among in ("candidates", "full"):
            assert result["random"][among] == pytest.approx(result[among]["f2f"], abs=1e-12), (split, among)
    rows = [line.split() for line in capsys.readouterr().err.splitlines()]
    last = [row for row in rows if row[:1] == ["random"]][-1]
    assert last == [
        "random",
        "order",
        "candidates",
        *(f"{result['random']['candidates'][name]:.4f}" for name in METRICS),
    ]


def test_a_shuffled_future_gains_nothing(drawn_dataset: Path, tmp_path: Path) -> None:
    """User vectors depend on the history alone: exchanging the targets between users leaves them as they are."""
    dataset = Dataset(drawn_dataset)
    histories = dataset.histories("test")
    vectors = np.random.default_rng(0).normal(size=(len(dataset.item_ids), 16)).astype(np.float32)
    before = protocol.mean_of_history(vectors, histories)
    shuffled = type(histories)(
        histories.user_ids, histories.rows, histories.offsets, np.random.default_rng(1).permutation(histories.targets)
    )
    np.testing.assert_array_equal(before, protocol.mean_of_history(vectors, shuffled))
    by_hand = np.stack([vectors[histories.of(user)].mean(axis=0) for user in range(len(histories))])
    np.testing.assert_allclose(before, by_hand, atol=1e-6)


def test_the_tail_is_the_users_whose_target_was_bought_less_than_four_times(
    drawn_dataset: Path, exported: Path, tmp_path: Path
) -> None:
    result = run(drawn_dataset, exported, tmp_path / "out")
    dataset = Dataset(drawn_dataset)
    bought = [item for sequence in dataset.train_sequences() for item in sequence.tolist()]
    rare = [user for user, item in enumerate(dataset.histories("test").targets.tolist()) if bought.count(item) < 4]
    assert result["tail"]["users"] == len(rare) > 0 and result["tail"]["below"] == 4
    users = pq.read_table(tmp_path / "out" / "users.parquet").to_pylist()
    wanted = {dataset.user_ids[user] for user in rare}
    for among in ("candidates", "full"):
        mine = [r["N@10"] for r in users if r["user_id"] in wanted and (r["protocol"], r["view"]) == (among, "f2f")]
        assert result["tail"][among]["f2f"]["N@10"] == pytest.approx(np.mean(mine))


def test_the_cold_users_are_those_whose_target_is_in_nobodys_training(
    drawn_dataset: Path, exported: Path, tmp_path: Path
) -> None:
    sequences = pl.read_parquet(drawn_dataset / "sequences.parquet")
    target = sequences["test"].value_counts(sort=True)["test"][0]
    train = [[item for item in items if item != target] for items in sequences["train"].to_list()]
    shutil.copytree(drawn_dataset, tmp_path / "data")
    pq.write_table(
        sequences.with_columns(pl.Series("train", train))
        .to_arrow()
        .cast(pq.read_schema(drawn_dataset / "sequences.parquet")),
        tmp_path / "data" / "sequences.parquet",
    )
    result = run(tmp_path / "data", exported, tmp_path / "out", images=Dataset(drawn_dataset).image_root)
    wanted = set(sequences.filter(pl.col("test") == target)["user_id"])
    assert result["cold"]["users"] >= len(wanted) > 0
    users = pl.read_parquet(tmp_path / "out" / "users.parquet").filter(pl.col("view") == "f2f")
    trained = {item for items in train for item in items}
    cold = sequences.filter(~pl.col("test").is_in(list(trained)))["user_id"].to_list()
    assert wanted <= set(cold) and result["cold"]["users"] == len(cold)
    for among in ("candidates", "full"):
        mine = users.filter(pl.col("user_id").is_in(cold) & (pl.col("protocol") == among))["N@10"]
        assert result["cold"][among]["f2f"]["N@10"] == pytest.approx(mine.mean())
