"""`prepare --split temporal`: several items for validation and for test, from the dataset folder to the metrics."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedding_folder import write_embeddings
from recommender_world import circle_vectors, cyclic_sequences, load_as_mmrec, with_cold_items, write_dataset

from vlm2rec.downstream.evaluation import metrics
from vlm2rec.downstream.evaluation.protocol import Rankings, RankingTask
from vlm2rec.downstream.recbole import run as recbole_run
from vlm2rec.downstream.recbole.dataset import whole_sequences
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError
from vlm2rec.pipelines import convert, evaluate, prepare, train_recommender
from vlm2rec.pipelines.catalogue.dataset_writer import temporal_counts
from vlm2rec.pipelines.config import ConvertConfig, EvaluateConfig, PrepareConfig, TrainRecommenderConfig
from vlm2rec.pipelines.read_config import read_config

ITEMS = [f"i{number}" for number in range(30)]
SEQUENCES = [sequence + sequence[:1] * (len(sequence) > 8) for sequence in cyclic_sequences(ITEMS, 40, longest=15)]
HELD_OUT = [(max(2, len(s) // 5) // 2, max(2, len(s) // 5) - max(2, len(s) // 5) // 2) for s in SEQUENCES]
HELD_OUT[:3] = [(2, 2), (1, 2), (2, 1)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("world") / "data", SEQUENCES, ITEMS, held_out=HELD_OUT)


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "embeddings"
    vectors = [circle_vectors(len(ITEMS), 8, seed) for seed in range(3)]
    write_embeddings(folder, ITEMS, vectors[0], text=vectors[1], image=vectors[2])
    return folder


# --- the metrics ------------------------------------------------------------------------------------------------
def of_a_list(ranked: list[int], targets: set[int], k: int) -> tuple[float, float, float]:
    """Recall, NDCG and precision of one ranked list, by MMRec's formulas (its `utils/metrics.py`)."""
    hits = [item in targets for item in ranked[:k]]
    gain = sum(1 / np.log2(place + 2) for place, hit in enumerate(hits) if hit)
    ideal = sum(1 / np.log2(place + 2) for place in range(min(len(targets), k)))
    return sum(hits) / len(targets), gain / ideal, sum(hits) / k


def test_a_hand_computed_user() -> None:
    # targets on ranks 1, 4 and 23
    found = metrics.set_metrics(np.array([0, 3, 22]), np.zeros(3, int), np.array([0, 3]))
    ideal = 1 + 1 / np.log2(3) + 1 / 2
    assert found["R@20"][0] == pytest.approx(2 / 3) and found["P@20"][0] == pytest.approx(2 / 20)
    assert found["N@20"][0] == pytest.approx((1 + 1 / np.log2(5)) / ideal)
    one = metrics.set_metrics(np.array([4]), np.array([0]), np.array([0, 1]))
    of_one = metrics.expected_metrics(np.array([4]), np.array([0]))
    assert (one["R@20"], one["N@20"], one["P@20"]) == (of_one["H@20"], of_one["N@20"], of_one["H@20"] / 20)


@pytest.mark.parametrize("seed", range(4))
def test_metrics_of_sets_are_the_mean_over_all_orders_of_ties(seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 3, 6)
    targets = sorted(generator.choice(6, int(generator.integers(1, 5)), replace=False).tolist())
    orders = [list(order) for order in itertools.permutations(range(6)) if (np.diff(scores[list(order)]) <= 0).all()]
    expected = np.mean([of_a_list(order, set(targets), 3) for order in orders], axis=0)
    higher = np.array([(scores > scores[target]).sum() for target in targets])
    ties = np.array([(scores == scores[target]).sum() - 1 for target in targets])
    found = metrics.set_metrics(higher, ties, np.array([0, len(targets)]), k=3)
    np.testing.assert_allclose([found["R@3"][0], found["N@3"][0], found["P@3"][0]], expected)


def test_more_targets_than_places_have_an_ndcg_of_one_at_best() -> None:
    found = metrics.set_metrics(np.arange(25), np.zeros(25, int), np.array([0, 25]))
    assert found["N@20"][0] == pytest.approx(1) and found["R@20"][0] == pytest.approx(20 / 25)
    assert found["P@20"][0] == pytest.approx(1)


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("block", [1, 7, 40])
def test_rankings_over_all_targets_equal_a_count_by_hand(split: Any, block: int, data: Path) -> None:
    dataset = Dataset(data)
    scores = np.random.default_rng(0).permuted(np.tile(np.arange(30, dtype=np.float32), (40, 1)), axis=1)
    rankings = Rankings(RankingTask(dataset, split))
    for start in range(0, 40, block):
        rankings.add(slice(start, min(start + block, 40)), scores[start : start + block])
    found = rankings.retrieval()
    for user, (sequence, (valid, test)) in enumerate(zip(SEQUENCES, HELD_OUT, strict=True)):
        rows = [ITEMS.index(item) for item in sequence]
        known = rows[: -valid - test] if split == "valid" else rows[:-test]
        targets = set(rows[-valid - test : -test] if split == "valid" else rows[-test:])
        ranked = [int(row) for row in np.argsort(-scores[user]) if row not in set(known) - targets]
        expected = of_a_list(ranked, targets, 20)
        assert [found[name][user] for name in ("R@20", "N@20", "P@20")] == pytest.approx(list(expected))
    means = rankings.means()
    assert means["retrieval"]["R@20"] == pytest.approx(found["R@20"].mean())
    vectors = Rankings(RankingTask(dataset, split))
    vectors.add_vectors(scores, np.eye(30, dtype=np.float32))
    for name, values in vectors.retrieval().items():
        np.testing.assert_allclose(values, found[name])
    assert vectors.means() == means


def test_the_first_target_is_ranked_as_ever(data: Path, tmp_path: Path) -> None:
    """Users whose only test item is their first are ranked as in a folder with one target each."""
    shorter = [s[: len(s) - t + 1] for s, (_, t) in zip(SEQUENCES, HELD_OUT, strict=True)]
    one = write_dataset(tmp_path / "one", shorter, ITEMS, held_out=[(v, 1) for v, _ in HELD_OUT])
    scores = np.random.default_rng(1).random((40, 30)).astype(np.float32)
    found = []
    for folder in (data, one):
        rankings = Rankings(RankingTask(Dataset(folder), "test", None))
        rankings.add(slice(0, 40), scores)
        found.append(rankings.users(None))
    for name in schema.METRICS:
        np.testing.assert_array_equal(found[0][name], found[1][name])


# --- the dataset folder -----------------------------------------------------------------------------------------
def test_the_split_is_80_10_10_of_each_user_and_at_least_one_each() -> None:
    lengths = np.arange(3, 200)
    train, valid, test = temporal_counts(lengths)
    assert (train + valid + test == lengths).all() and (valid >= 1).all() and (test - valid <= 1).all()
    for length, *counts in zip(lengths.tolist(), train.tolist(), valid.tolist(), test.tolist(), strict=True):
        # MMRec's preprocessing (1splitting.ipynb)
        held = int(length * 0.2)
        expected = [length - 2, 1, 1] if length < 10 else [length - held, held // 2, held - held // 2]
        assert counts == expected
    assert [counts.tolist() for counts in temporal_counts(np.array([3, 20, 15]))] == [[1, 16, 12], [1, 2, 1], [1, 2, 2]]


def prepared(folder: Path, **settings: Any) -> Dataset:
    generator = np.random.default_rng(0)
    rows = [
        (f"u{user}", f"i{item}", t)
        for user in range(9)
        for t, item in enumerate(generator.integers(0, 40, 4 * user + 4))
    ]
    shuffled = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row").sample(
        fraction=1, shuffle=True, seed=1
    )
    folder.mkdir(exist_ok=True)
    shuffled.write_csv(folder / "log.csv")
    pl.DataFrame({"item_id": [f"i{n}" for n in range(40)], "title": [f"title {n}" for n in range(40)]}).write_csv(
        folder / "items.csv"
    )
    inputs = {"items": folder / "items.csv", "interactions": folder / "log.csv", "core": 1, "candidates": 3}
    return prepare.run(PrepareConfig(**inputs | {"out": folder / "out"} | settings))  # type: ignore[arg-type]


def test_prepare_writes_lists_in_time_order_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = {
        row["user_id"]: [*row["train"], row["valid"], row["test"]]
        for row in prepared(tmp_path, out=tmp_path / "one").sequences.to_pylist()
    }
    capsys.readouterr()
    dataset = prepared(tmp_path, split="temporal")
    assert "several items for validation and for test" in capsys.readouterr().err
    rows = dataset.sequences.to_pylist()
    assert {row["user_id"]: [*row["train"], *row["valid"], *row["test"]] for row in rows} == whole
    for row in rows:
        counts = temporal_counts(np.array([len(whole[row["user_id"]])]))
        assert [len(row["train"]), len(row["valid"]), len(row["test"])] == [int(each[0]) for each in counts]
    assert dataset.meta["split"] == "temporal" and dataset.meta["rules"]["split"].startswith("temporal: ")
    one = Dataset(tmp_path / "one")
    assert "split" not in one.meta and one.meta["rules"]["split"].startswith("leave-one-out: ")
    assert not one.has_several_targets and dataset.has_several_targets
    np.testing.assert_array_equal(dataset.negatives(0), one.negatives(0))  # untouched by the user in any part
    before = (tmp_path / "out" / "sequences.parquet").read_bytes()
    prepared(tmp_path, split="temporal")
    assert (tmp_path / "out" / "sequences.parquet").read_bytes() == before


def test_prepare_writes_the_same_lists_in_several_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = prepared(tmp_path, split="temporal").sequences
    monkeypatch.setattr("vlm2rec.pipelines.catalogue.dataset_writer._USERS_PER_GROUP", 4)
    found = prepared(tmp_path, split="temporal", out=tmp_path / "again")
    assert pq.ParquetFile(found.path / "sequences.parquet").num_row_groups == 3  # type: ignore[operator]
    assert found.sequences.to_pylist() == expected.to_pylist()
    assert [s.tolist() for s in found.known_sequences("test")] == [
        s.tolist() for s in Dataset(tmp_path / "out").known_sequences("test")
    ]


def test_the_reader_knows_what_came_before_the_targets(data: Path) -> None:
    dataset = Dataset(data)
    rows = [[ITEMS.index(item) for item in sequence] for sequence in SEQUENCES]
    for split in ("valid", "test"):
        found, offsets = dataset.targets(split)  # type: ignore[arg-type]
        histories = dataset.histories(split)  # type: ignore[arg-type]
        for user, (valid, test) in enumerate(HELD_OUT):
            end = len(rows[user]) - test - (valid if split == "valid" else 0)
            count = valid if split == "valid" else test
            assert found[offsets[user] : offsets[user + 1]].tolist() == rows[user][end : end + count]
            assert dataset.known_sequences(split)[user].tolist() == rows[user][:end]  # type: ignore[arg-type]
            assert histories.of(user).tolist() == rows[user][:end][-5:] and histories.targets[user] == rows[user][end]
    assert dataset.frequency().sum() == sum(map(len, SEQUENCES))
    assert dataset.train_frequency().sum() == sum(map(len, SEQUENCES)) - sum(map(sum, HELD_OUT))


def test_cold_items_are_those_that_no_part_has(data: Path, tmp_path: Path) -> None:
    cold = Dataset(with_cold_items(data, tmp_path / "cold"))
    assert len(cold.item_ids) == 33 and cold.warm().item_ids == ITEMS
    assert [s.tolist() for s in cold.warm().known_sequences("test")] == [
        s.tolist() for s in Dataset(data).known_sequences("test")
    ]


def test_a_damaged_folder_is_refused_in_words(data: Path, tmp_path: Path) -> None:
    for number, (column, values, message) in enumerate(
        (
            (
                "valid",
                pa.array([["i0"]] * 39 + [[]], pa.list_(pa.string())),
                "1 users without a valid item, such as 'u39'",
            ),
            ("test", pa.array([["i0"]] * 39 + [None], pa.list_(pa.string())), "1 users without a test item"),
            ("test", pa.array(["i0"] * 40), "column 'test' of .* holds string"),
        )
    ):
        folder = with_cold_items(data, tmp_path / str(number))
        table = pq.read_table(folder / "sequences.parquet")
        table = table.set_column(table.column_names.index(column), column, values)
        pq.write_table(table, folder / "sequences.parquet")
        with pytest.raises(ArtifactError, match=message):
            _ = Dataset(folder).sequences
    folder = with_cold_items(data, tmp_path / "other")
    schema.write_json(folder / "dataset.json", Dataset(folder).meta | {"split": "random"})
    with pytest.raises(ArtifactError, match=r"has the split 'random'.*install a newer vlm2rec"):
        _ = Dataset(folder).sequences
    schema.write_json(folder / "dataset.json", {k: v for k, v in Dataset(folder).meta.items() if k != "split"})
    with pytest.raises(ArtifactError, match=r"column 'valid' of .* holds list"):  # what an earlier vlm2rec says
        _ = Dataset(folder).sequences


# --- commands ---------------------------------------------------------------------------------------------------
def trained(model: str, data: Path, embeddings: Path, out: Path, **values: Any) -> dict[str, Any]:
    few = {"max_epochs": 2, "eval_step": 1, "hidden_size": 8, "batch_size": 64, "device": "cpu"}
    given = {"model": model, "data": data, "embeddings": embeddings, "out": out}
    return train_recommender.run(read_config(TrainRecommenderConfig, flags=few | given | values))


@pytest.mark.parametrize("model", ["VBPR", "SASRec"])
def test_recommenders_report_all_targets_beside_the_next_item(
    model: str, data: Path, embeddings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = trained(model, data, embeddings, tmp_path / "out")
    targets = sum(len(set(s[-t:])) for s, (_, t) in zip(SEQUENCES, HELD_OUT, strict=True))
    assert found["targets"] == targets and f"all {targets} targets" in capsys.readouterr().err
    users = pq.read_table(tmp_path / "out" / "users.parquet").to_pandas()
    full = users[users["protocol"] == "full"]
    for name, value in found["retrieval"].items():
        assert full[f"retrieval_{name}"].mean() == pytest.approx(value)
        assert users[f"retrieval_{name}"][users["protocol"] == "candidates"].isna().all()
    assert full["H@10"].mean() == pytest.approx(found["full"]["H@10"])
    assert set(found["popularity"]["retrieval"]) == {"R@20", "N@20", "P@20"}
    assert found["full"].keys() == {*schema.METRICS} and found["users"] == 40


@pytest.mark.parametrize(("model", "positions"), [("VBPR", "last"), ("SASRec", "last"), ("SASRec", "all")])
def test_only_training_interactions_are_trained_on(
    model: str, positions: str, data: Path, embeddings: Path, tmp_path: Path
) -> None:
    """Other test items, and other validation items after the first, change no weight."""
    other = with_cold_items(data, tmp_path / "other", ())
    table = pq.read_table(other / "sequences.parquet")
    changed = [
        [*reversed(items)] if len(items) < 2 else [items[0], *("i3" for _ in items[1:])]
        for items in table["test"].to_pylist()
    ]
    table = table.set_column(3, "test", pa.array(changed, pa.list_(pa.string())))
    pq.write_table(table, other / "sequences.parquet")
    given = {} if model == "VBPR" else {"positions": positions}
    one = trained(model, data, embeddings, tmp_path / "a", **given)
    two = trained(model, other, embeddings, tmp_path / "b", **given)
    assert [epoch["loss"] for epoch in one["curve"]] == [epoch["loss"] for epoch in two["curve"]]
    assert one["full"] != two["full"] or one["retrieval"] != two["retrieval"]


@pytest.mark.parametrize("positions", ["last", "all"])
def test_recbole_gets_the_training_prefixes_the_first_valid_and_the_first_test_item(
    positions: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(recbole_run, "_dataset", lambda *given: seen.append(original(*given)) or seen[-1])
    trained("SASRec", data, None, tmp_path / "out", max_epochs=1, positions=positions)  # type: ignore[arg-type]
    dataset = seen[0]
    ids = dataset.field2id_token["item_id"]
    rows = {
        (int(u), str(ids[i])) for u, i in zip(dataset.inter_feat["user_id"], dataset.inter_feat["item_id"], strict=True)
    }
    folder = Dataset(data)
    for user, (sequence, (valid, test)) in enumerate(zip(SEQUENCES, HELD_OUT, strict=True), start=1):
        train = sequence[: -valid - test]
        held = {sequence[len(train)], sequence[-test]}
        mine = {item for number, item in rows if number == user}
        assert held <= mine and mine <= {*train, *held}
        if positions == "last":
            assert mine == {*train[1:], *held}
    assert [len(each) for each in whole_sequences(folder)] == [
        len(s) - t + 1 for s, (_, t) in zip(SEQUENCES, HELD_OUT, strict=True)
    ]


original = recbole_run._dataset


def test_evaluate_reports_all_targets_beside_the_next_item(data: Path, embeddings: Path, tmp_path: Path) -> None:
    given = {"data": data, "embeddings": embeddings, "out": tmp_path / "out"}
    found = evaluate.run(read_config(EvaluateConfig, flags=given))
    assert set(found["retrieval"]) == set(found["full"]) and found["targets"] > 40
    users = pl.read_parquet(tmp_path / "out" / "users.parquet")
    of_pair = users.filter((pl.col("protocol") == "full") & (pl.col("view") == "f2f"))
    for name, value in found["retrieval"]["f2f"].items():
        assert of_pair[f"retrieval_{name}"].mean() == pytest.approx(value)
    dataset = Dataset(data)
    vectors = circle_vectors(len(ITEMS), 8, 0)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    recalls = []
    for sequence, (_, test) in zip(SEQUENCES, HELD_OUT, strict=True):
        rows = [dataset.item_ids.index(item) for item in sequence]
        known, targets = rows[:-test], set(rows[-test:])
        scores = unit @ vectors[known[-5:]].mean(0)
        ranked = [int(row) for row in np.argsort(-scores) if row not in set(known) - targets]
        recalls.append(of_a_list(ranked, targets, 20)[0])
    assert found["retrieval"]["f2f"]["R@20"] == pytest.approx(np.mean(recalls))


def test_with_one_target_each_nothing_is_added(embeddings: Path, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", SEQUENCES, ITEMS)
    found = evaluate.run(
        read_config(EvaluateConfig, flags={"data": data, "embeddings": embeddings, "out": tmp_path / "e"})
    )
    assert not {"retrieval", "targets"} & found.keys()
    assert not any(name.startswith("retrieval") for name in pl.read_parquet(tmp_path / "e" / "users.parquet").columns)
    found = trained("VBPR", data, embeddings, tmp_path / "t")
    assert "targets" not in found and "retrieval" not in found["popularity"]
    assert not any(name.startswith("retrieval") for name in pl.read_parquet(tmp_path / "t" / "users.parquet").columns)


def test_mmrec_gets_all_targets_with_their_labels(data: Path, embeddings: Path, tmp_path: Path) -> None:
    given = {"data": data, "embeddings": embeddings, "out": tmp_path / "out", "to": "mmrec", "name": "world"}
    convert.run(read_config(ConvertConfig, flags=given))
    frame, _, users, items = load_as_mmrec(tmp_path / "out", "world")
    assert (users, items) == (40, 30)
    for user, (sequence, (valid, test)) in enumerate(zip(SEQUENCES, HELD_OUT, strict=True)):
        mine = frame[frame["userID"] == user]
        assert [ITEMS[item] for item in mine["itemID"]] == sequence
        assert mine["x_label"].tolist() == [0] * (len(sequence) - valid - test) + [1] * valid + [2] * test
