"""`train-recommender`: stock RecBole without the flag, our protocol on a dataset folder, and clear refusals."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from embedding_folder import write_embeddings
from recommender_world import circle_vectors, cyclic_sequences, with_cold_items, write_atomic, write_dataset
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vlm2rec.downstream import recommender
from vlm2rec.downstream.evaluation.metrics import TAIL
from vlm2rec.downstream.recbole import compat, run
from vlm2rec.downstream.recbole.alignment import structural_alignment
from vlm2rec.downstream.recbole.run import evaluate, user_scores
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, DataError, Vlm2RecError
from vlm2rec.pipelines import train_recommender
from vlm2rec.pipelines.cli import app
from vlm2rec.pipelines.config import TrainRecommenderConfig

ITEMS = [f"i{number}" for number in range(40)]
USERS = [f"user {number}" for number in range(50)]
SEQUENCES = cyclic_sequences(ITEMS, len(USERS))
TINY = {"n_layers": 1, "n_heads": 1, "inner_size": 16, "num_layers": 1}
SMALL: dict[str, Any] = {"hidden_size": 16, "max_epochs": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "data"
    return write_dataset(folder, SEQUENCES, ITEMS, user_ids=USERS, candidates=20, seeds=(0, 1, 2))


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "embeddings"
    write_embeddings(folder, ITEMS, circle_vectors(len(ITEMS)))
    return folder


def write_yaml(path: Path, settings: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def state(folder: Path) -> dict[str, torch.Tensor]:
    return recommender.load_weights(folder / "checkpoint.safetensors", "cpu")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- stock RecBole ------------------------------------------------------------------------------------------
STOCK: dict[str, Any] = {
    "dataset": "small",
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "MAX_ITEM_LIST_LENGTH": 6,
    "embedding_size": 16,
    "hidden_size": 16,
    "inner_size": 16,
    "epochs": 3,
    "train_batch_size": 32,
    "learning_rate": 1e-2,
    "metric_decimal_place": 10,
    "topk": [5, 10],
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni10"},
}

STOCK_SCRIPT = """
import json, sys, types
import numpy as np
np.float_, np.complex_, np.unicode_ = np.float64, np.complex128, np.str_
arguments, sys.argv = sys.argv, sys.argv[:1]
# run_recbole does not use Ray Tune, but its file imports it
sys.modules["ray"], sys.modules["ray.tune"] = types.ModuleType("ray"), types.ModuleType("ray.tune")
sys.modules["ray"].tune = sys.modules["ray.tune"]
from recbole.quick_start import run_recbole
results = {}
for model in ("SASRec", "GRU4Rec", "BERT4Rec"):
    file = {"checkpoint_dir": f"stock-{model}", "train_neg_sample_args": None}
    results[model] = run_recbole(model=model, config_file_list=[arguments[1]], config_dict=file)["test_result"]
print(json.dumps({model: {k: float(v) for k, v in result.items()} for model, result in results.items()}))
"""


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, float]]]:
    """What `run_recbole` makes of a YAML, in a process of its own that knows nothing of vlm2rec."""
    folder = tmp_path_factory.mktemp("stock")
    write_atomic(folder, "small", SEQUENCES, [user.replace(" ", "_") for user in USERS])
    write_yaml(folder / "stock.yaml", STOCK | {"data_path": str(folder)})
    done = subprocess.run(
        [sys.executable, "-c", STOCK_SCRIPT, str(folder / "stock.yaml")],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec", "BERT4Rec"])
def test_without_the_flag_a_recbole_yaml_gives_stock_recboles_result_bit_for_bit(
    model: str, stock: tuple[Path, dict[str, dict[str, float]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, expected = stock
    config = TrainRecommenderConfig(model=model, config=folder / "stock.yaml", out=tmp_path / "out")
    metrics = train_recommender.run(config)
    assert metrics["recbole"] == expected[model]
    checkpoint = next((folder / f"stock-{model}").glob(f"{model}-*.pth"))
    saved = torch.load(checkpoint, "cpu", weights_only=False)["state_dict"]
    assert same(state(tmp_path / "out"), saved)
    assert (metrics["start"], metrics["candidates"], metrics["full"]) == ("id", None, None)
    assert not (tmp_path / "out" / "users.parquet").exists()
    said = capsys.readouterr()
    assert said.out == "" and "train_neg_sample_args" in said.err


def test_the_flag_works_in_a_recbole_users_own_yaml(
    stock: tuple[Path, dict[str, dict[str, float]]], embeddings: Path, tmp_path: Path
) -> None:
    lines = {"model": "SASRec", "item_embedding_init": str(embeddings), "item_embedding_column": "fused"}
    file = write_yaml(tmp_path / "r.yaml", STOCK | {"data_path": str(stock[0])} | lines)
    metrics = train_recommender.run(TrainRecommenderConfig(config=file, out=tmp_path / "out"))
    assert (metrics["model"], metrics["start"], metrics["mode"]) == ("SASRec", "fused", "adapter")
    assert metrics["recbole"] != stock[1]["SASRec"]
    assert "item_embedding.linear.weight" in state(tmp_path / "out")


def test_a_dataset_folder_gives_recbole_the_rows_of_an_atomic_file(
    stock: tuple[Path, dict[str, dict[str, float]]], data: Path, tmp_path: Path
) -> None:
    from recbole.data import create_dataset

    settings = STOCK | {"model": "SASRec", "data_path": str(stock[0])}
    with compat.cured(tmp_path):
        theirs = create_dataset(run.recbole_config_of([settings], settings, None, tmp_path, "cpu"))
        parts = theirs.build()
        folder = Dataset(data)
        asked = settings | {"eval_args": {"mode": "full"}}
        ours = run._dataset(run.recbole_config_of([asked], asked, folder, tmp_path, "cpu"), folder)
        own_parts = ours.build()
    assert list(ours.field2id_token["item_id"]) == list(theirs.field2id_token["item_id"])
    for their, own in zip(parts, own_parts, strict=True):
        for name in ("user_id", "item_id", "item_id_list", "item_length", "timestamp"):
            assert torch.equal(their.inter_feat[name], own.inter_feat[name]), name


# --- the dataset folder -------------------------------------------------------------------------------------
def rows_of_parts(folder: Dataset, out: Path) -> list[list[tuple[str, list[str], str]]]:
    """Return (user, history, target) of RecBole's train, valid and test rows, in item ids."""
    with compat.cured(out):
        settings = {"model": "SASRec", "MAX_ITEM_LIST_LENGTH": folder.max_history, "eval_args": {"mode": "full"}}
        dataset = run._dataset(run.recbole_config_of([settings], settings, folder, out, "cpu"), folder)
        parts = dataset.build()
    users, items = dataset.field2id_token["user_id"], dataset.field2id_token["item_id"]
    return [
        [
            (users[user], [str(items[i]) for i in history[:length]], items[target])
            for user, history, length, target in zip(
                part.inter_feat["user_id"],
                part.inter_feat["item_id_list"],
                part.inter_feat["item_length"],
                part.inter_feat["item_id"],
                strict=True,
            )
        ]
        for part in parts
    ]


def test_all_prefixes_train_and_the_last_two_items_are_held_out(tmp_path: Path) -> None:
    folder = write_dataset(
        tmp_path / "data", [list("abcdef"), list("fed")], "abcdefg", user_ids=["x", "y"], max_history=3, candidates=1
    )
    train, valid, test = rows_of_parts(Dataset(folder), tmp_path / "out")
    assert sorted(train) == [("x", ["a"], "b"), ("x", ["a", "b"], "c"), ("x", ["a", "b", "c"], "d")]
    # y has one training item: RecBole's own split would train on its validation item
    assert sorted(valid) == [("x", ["b", "c", "d"], "e"), ("y", ["f"], "e")]
    assert sorted(test) == [("x", ["c", "d", "e"], "f"), ("y", ["f", "e"], "d")]


def test_an_item_nobody_touched_is_ranked_too(tmp_path: Path) -> None:
    items = [*ITEMS, "untouched", "another"]
    folder = write_dataset(tmp_path / "data", SEQUENCES[:20], items[::-1], candidates=25)
    config = TrainRecommenderConfig(data=folder, model="SASRec", out=tmp_path / "out", **SMALL)
    metrics = train_recommender.run(config)
    assert metrics["items"] == 42
    assert state(tmp_path / "out")["item_embedding.weight"].shape == (43, 16)


@pytest.mark.parametrize("start", [False, True])
def test_cold_items_change_nothing_of_what_is_learned_and_ranked(data: Path, tmp_path: Path, start: bool) -> None:
    cold = with_cold_items(data, tmp_path / "cold")
    ids = Dataset(cold).item_ids
    write_embeddings(tmp_path / "all", ids, circle_vectors(len(ids)))
    found = []
    for folder in (data, cold):
        out = tmp_path / f"out of {folder.name}"
        more = SMALL | ({"embeddings": tmp_path / "all"} if start else {})
        metrics = train_recommender.run(TrainRecommenderConfig(data=folder, model="SASRec", out=out, **more))
        found.append({key: metrics[key] for key in ("items", "candidates", "full", "tail", "popularity", "missing")})
        found.append((out / "users.parquet").read_bytes())
        found.append({name: tensor.tolist() for name, tensor in state(out).items()})
    assert found[:3] == found[3:]


def brute_force(scores: np.ndarray, folder: Dataset, k: int) -> dict[str, Any]:
    """H@k and N@k counted one comparison at a time, for scores without ties."""
    test = folder.histories("test")
    valid = folder.histories("valid").targets
    hits: dict[str, list[float]] = {"full": [], "all": []}
    for user, train in enumerate(folder.train_sequences()):
        target = int(test.targets[user])
        own = scores[user, target]
        touched = {*train.tolist(), int(valid[user])} - {target}
        rivals = [i for i in range(scores.shape[1]) if i != target]
        hits["full"].append(1 + sum(scores[user, i] > own for i in rivals if i not in touched))
        hits["all"].append(1 + sum(scores[user, i] > own for i in rivals))
        for seed in folder.candidate_seeds:
            drawn = folder.negatives(seed)[user]
            hits.setdefault(f"seed {seed}", []).append(1 + sum(scores[user, i] > own for i in drawn))
    return {
        name: (
            float(np.mean([rank <= k for rank in ranks])),
            float(np.mean([1 / np.log2(rank + 1) if rank <= k else 0.0 for rank in ranks])),
        )
        for name, ranks in hits.items()
    }


@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec", "BERT4Rec"])
def test_metrics_equal_a_brute_force_count_over_the_models_scores(model: str, data: Path, tmp_path: Path) -> None:
    from vlm2rec.downstream.recbole.dataset import recbole_ids

    folder = Dataset(data)
    yaml_file = write_yaml(tmp_path / "tiny.yaml", TINY)
    config = TrainRecommenderConfig(data=data, model=model, config=yaml_file, out=tmp_path / "out", **SMALL)
    metrics = train_recommender.run(config)
    settings = [
        train_recommender.task2_settings(config, model, folder.max_history), TINY,
        train_recommender.chosen_settings(config, model, {}),
    ]  # fmt: skip
    again = run.run(settings, tmp_path / "again", data=folder, device="cpu")
    assert again.metrics["full"] == metrics["full"]
    tokens = [str(token) for token in first_seen_order(folder)]
    blocks = user_scores(again.model, again.config, folder, recbole_ids(tokens, folder.item_ids), max_scores=300)
    scores = np.concatenate([block for _, block in blocks])
    assert scores.shape == (50, 40)
    for k in (10, 20):
        expected = brute_force(scores, folder, k)
        seeds = np.array([expected[f"seed {seed}"] for seed in (0, 1, 2)])
        for place, name in enumerate((f"H@{k}", f"N@{k}")):
            assert metrics["full"][name] == pytest.approx(expected["full"][place], abs=1e-9)
            assert metrics["candidates"][name] == pytest.approx(seeds[:, place].mean(), abs=1e-9)
            assert metrics["candidates_std"][name] == pytest.approx(seeds[:, place].std(ddof=1), abs=1e-9)
        # RecBole ranks the touched items too: the same scores, so the same histories went in
        assert metrics["recbole"][f"hit@{k}"] == pytest.approx(expected["all"][0], abs=1e-6)
        assert metrics["recbole"][f"ndcg@{k}"] == pytest.approx(expected["all"][1], abs=1e-6)


def first_seen_order(folder: Dataset) -> list[str]:
    """Items in the order RecBole numbers them: as they turn up user by user."""
    valid, test = folder.histories("valid").targets, folder.histories("test").targets
    order: dict[int, None] = {}
    for user, train in enumerate(folder.train_sequences()):
        order.update(dict.fromkeys([*train.tolist(), int(valid[user]), int(test[user])]))
    return [folder.item_ids[row] for row in order]


class Scorer(torch.nn.Module):
    """Gives every item of every user the score of a function of RecBole's item number."""

    def __init__(self, score: Any) -> None:
        super().__init__()
        self.score = score

    def full_sort_predict(self, rows: Any) -> torch.Tensor:
        return self.score(torch.arange(41.0)).repeat(len(rows["item_length"]), 1)


FIELDS = {
    "ITEM_ID_FIELD": "item_id",
    "LIST_SUFFIX": "_list",
    "ITEM_LIST_LENGTH_FIELD": "item_length",
    "MAX_ITEM_LIST_LENGTH": 5,
    "device": torch.device("cpu"),
}


def test_a_constant_scorer_gets_its_expected_share(data: Path) -> None:
    metrics, _ = evaluate(Scorer(torch.zeros_like), FIELDS, Dataset(data), ITEMS)
    assert metrics["candidates"]["H@10"] == 10 / 21
    assert metrics["candidates"]["H@20"] == 20 / 21
    assert metrics["candidates_std"]["H@10"] == 0.0


def test_the_tail_is_the_users_whose_target_was_bought_seldom(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Dataset(data)
    bought = [item for sequence in folder.train_sequences() for item in sequence.tolist()]
    counts = np.array([bought.count(item) for item in folder.histories("test").targets.tolist()])
    assert TAIL == 4
    below = int(np.median(counts))
    monkeypatch.setattr("vlm2rec.downstream.evaluation.metrics.TAIL", below)  # nothing is as rare as that here
    metrics, tables = evaluate(Scorer(lambda items: items), FIELDS, folder, ITEMS)
    rare = counts < below
    tail = metrics["tail"]
    assert (tail["users"], tail["below"]) == (rare.sum(), below) and 0 < rare.sum() < len(rare)
    by_seed = [np.mean(np.array(table["N@10"])[rare]) for table in tables]  # the last one is the full ranking
    assert tail["candidates"]["N@10"] == pytest.approx(np.mean(by_seed[:-1]))
    assert tail["full"]["N@10"] == pytest.approx(by_seed[-1])


def test_an_item_that_training_never_saw_is_found_by_its_vector_where_ids_cannot(
    embeddings: Path, tmp_path: Path
) -> None:
    cold = {"i7", "i20", "i33"}
    sequences = [s for s in cyclic_sequences(ITEMS, 500, longest=8) if not cold.intersection(s[:-1])]
    wanted = sum(s[-1] in cold for s in sequences)
    data = write_dataset(tmp_path / "data", sequences, ITEMS, max_history=6, candidates=20)
    found = {}
    for mode in (None, "fuse"):
        config = TrainRecommenderConfig(
            data=data,
            out=tmp_path / str(mode),
            model="SASRec",
            embeddings=embeddings if mode else None,
            **({"mode": mode} if mode else {}),
            positions="all",
            hidden_size=32,
            max_epochs=30,
            learning_rate=5e-3,
            batch_size=64,
            device="cpu",
        )
        found[mode] = train_recommender.run(config)
        assert found[mode]["cold"]["users"] == wanted > 10
    chance = sum(1 / np.log2(rank + 1) for rank in range(1, 11)) / 21
    assert found["fuse"]["cold"]["candidates"]["N@10"] > 1.5 * chance
    assert found[None]["cold"]["candidates"]["N@10"] < chance  # a negative of every softmax, a target of none
    assert found["fuse"]["full"]["N@10"] > found[None]["full"]["N@10"]


def test_the_tail_over_all_interactions_counts_the_held_out_items_too(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Dataset(data)
    whole = [item for user in folder.train_sequences() for item in user.tolist()]
    whole += [item for split in ("valid", "test") for item in folder.histories(split).targets.tolist()]
    counts = np.array([whole.count(item) for item in folder.histories("test").targets.tolist()])
    below = int(np.median(counts))
    monkeypatch.setattr("vlm2rec.downstream.evaluation.metrics.TAIL", below)
    metrics, tables = evaluate(Scorer(lambda items: items), FIELDS, folder, ITEMS, tail_over="all")
    rare, tail = counts < below, metrics["tail"]
    assert (tail["users"], tail["below"], tail["over"]) == (rare.sum(), below, "all") and 0 < rare.sum() < len(rare)
    assert tail["full"]["N@10"] == pytest.approx(np.mean(np.array(tables[-1]["N@10"])[rare]))
    in_training, _ = evaluate(Scorer(lambda items: items), FIELDS, folder, ITEMS)
    assert in_training["tail"]["users"] > tail["users"] and "over" not in in_training["tail"]


def test_where_nobody_wants_a_rare_item_the_tail_has_no_metrics(data: Path) -> None:
    metrics, _ = evaluate(Scorer(lambda items: items), FIELDS, Dataset(data), ITEMS)
    assert metrics["tail"] == {"below": 4, "users": 0, "candidates": {}, "full": {}}
    assert metrics["cold"] == {"users": 0, "candidates": {}, "full": {}}


def test_scores_that_are_not_numbers_are_refused(data: Path) -> None:
    with pytest.raises(DataError, match="NaN"):
        evaluate(Scorer(lambda items: items * float("nan")), FIELDS, Dataset(data), ITEMS)


def test_histories_are_cut_to_the_latest_items_and_padded_at_the_end(data: Path) -> None:
    seen: list[tuple[list[int], int]] = []

    def full_sort_predict(rows: Any) -> torch.Tensor:
        seen.extend(zip(rows["item_id_list"].tolist(), rows["item_length"].tolist(), strict=True))
        return torch.zeros(len(rows["item_length"]), 41)

    folder = Dataset(data)
    model = SimpleNamespace(full_sort_predict=full_sort_predict)
    blocks = list(user_scores(model, FIELDS, folder, np.arange(1, 41), max_scores=40 * 7))
    assert [part.stop - part.start for part, _ in blocks] == [7, 7, 7, 7, 7, 7, 7, 1]
    for (history, length), sequence in zip(seen, SEQUENCES, strict=True):
        expected = [ITEMS.index(item) + 1 for item in sequence[:-1]][-5:]
        assert history == expected + [0] * (5 - length)


def test_one_candidate_seed_can_be_chosen_and_an_unknown_one_is_refused(data: Path) -> None:
    metrics, tables = evaluate(Scorer(torch.sin), FIELDS, Dataset(data), ITEMS, seeds=[1])
    assert metrics["seeds"] == [1]
    assert [set(table["seed"].to_pylist()) for table in tables] == [{1}, {None}]
    with pytest.raises(ArtifactError, match="no candidate set for seed 9"):
        evaluate(Scorer(torch.sin), FIELDS, Dataset(data), ITEMS, seeds=[9])


# --- what a run leaves --------------------------------------------------------------------------------------
def test_the_command_with_default_flags_writes_its_files_and_prints_to_stderr_only(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", SEQUENCES[:20], ITEMS, user_ids=USERS[:20], candidates=20)
    out = tmp_path / "REC"
    done = CliRunner().invoke(
        app, ["train-recommender", "--data", str(data), "--model", "SASRec", "--out", str(out)], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert done.stdout == ""
    assert "valid NDCG@20" in done.stderr and "SASRec on by hand" in done.stderr
    assert {path.name for path in out.iterdir()} == {
        "metrics.json", "users.parquet", "checkpoint.safetensors", "recommender.json", "recbole.log", "tensorboard",
    }  # fmt: skip
    metrics = json.loads((out / "metrics.json").read_text())
    users = pq.read_table(out / "users.parquet")
    assert users.column_names == ["user_id", "protocol", "seed", "view", "H@10", "N@10", "H@20", "N@20"]
    assert [str(kind) for kind in users.schema.types] == ["string", "string", "int32", "string"] + ["double"] * 4
    assert users.num_rows == 20 * (2 + 1)
    full = users.filter(np.array(users["protocol"].to_pylist()) == "full")
    assert full["user_id"].to_pylist() == USERS[:20] and full["seed"].null_count == 20
    assert np.mean(full["N@20"].to_pylist()) == pytest.approx(metrics["full"]["N@20"])


def test_metrics_hold_what_the_report_reads(data: Path, embeddings: Path, tmp_path: Path) -> None:
    config = TrainRecommenderConfig(data=data, model="GRU4Rec", embeddings=embeddings, out=tmp_path, **SMALL)
    metrics = train_recommender.run(config)
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    expected = {
        "task": 2,
        "dataset": "by hand",
        "model": "GRU4Rec",
        "start": "fused",
        "mode": "adapter",
        "users": 50,
        "items": 40,
        "seed": 0,
        "seeds": [0, 1, 2],
        "epochs": 2,
        "missing": 0,
    }
    assert {name: metrics[name] for name in expected} == expected
    assert list(metrics["full"]) == list(metrics["candidates"]) == ["H@10", "N@10", "H@20", "N@20"]
    assert metrics["recbole"].keys() == {"hit@10", "hit@20", "ndcg@10", "ndcg@20"}
    assert metrics["parameters"] == 16 * 16 + 16 + 2 * 2 * 3 * 16 * 16 + 16 * 16 + 16
    assert [point["epoch"] for point in metrics["curve"]] == [1, 2]


def test_adapter_and_pca_flags_reach_the_model_and_its_metrics(
    data: Path, embeddings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainRecommenderConfig(
        data=data, model="SASRec", embeddings=embeddings, out=tmp_path, adapter="mlp", pca=5, **SMALL
    )
    metrics = train_recommender.run(config)
    assert (metrics["adapter"], metrics["pca"]["components"]) == ("mlp", 5)
    assert state(tmp_path)["item_embedding.hidden.weight"].shape == (16, 5)
    assert "fused vectors (adapter, mlp), 5 components with" in capsys.readouterr().err
    plain = train_recommender.run(TrainRecommenderConfig(data=data, model="SASRec", out=tmp_path / "id", **SMALL))
    assert (plain["adapter"], plain["pca"]) == (None, None)


def test_a_run_can_be_repeated_and_the_seed_matters(data: Path, embeddings: Path, tmp_path: Path) -> None:
    runs = []
    for number, seed in enumerate((1, 1, 2)):
        config = TrainRecommenderConfig(
            data=data, model="BERT4Rec", embeddings=embeddings, seed=seed, out=tmp_path / str(number), **SMALL
        )
        runs.append((train_recommender.run(config), state(tmp_path / str(number))))
    (first, one), (second, two), (_, three) = runs
    assert same(one, two) and not same(one, three)
    assert {k: first[k] for k in ("full", "candidates", "recbole")} == {
        k: second[k] for k in ("full", "candidates", "recbole")
    }


def test_a_failed_run_leaves_no_earlier_metrics_behind(data: Path, tmp_path: Path) -> None:
    for name in ("users.parquet", "checkpoint.safetensors"):
        (tmp_path / name).write_text("of an earlier run")
    (tmp_path / "metrics.json").write_text('{"task": 2, "recbole": {}}')
    config = TrainRecommenderConfig(data=data, model="SASRec", embeddings=tmp_path / "none", out=tmp_path, **SMALL)
    with pytest.raises(ArtifactError):
        train_recommender.run(config)
    assert not (tmp_path / "metrics.json").exists()


def told(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_an_earlier_run_in_the_folder_is_named_with_what_differs_before_it_is_replaced(
    data: Path, embeddings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {**SMALL, "max_epochs": 1, "hidden_size": 8}
    first = TrainRecommenderConfig(data=data, model="GRU4Rec", out=tmp_path / "out", **small)
    train_recommender.run(first)
    assert "held" not in told(capsys)
    (tmp_path / "out" / "metrics.json").unlink()  # as an interrupted run leaves it
    train_recommender.run(first)
    assert "held an unfinished run with these settings. train-recommender continues none: it starts" in told(capsys)
    other = {**small, "learning_rate": 0.01}
    train_recommender.run(
        TrainRecommenderConfig(data=data, model="GRU4Rec", embeddings=embeddings, out=tmp_path / "out", **other)
    )
    text = told(capsys)
    assert "held a finished run with other settings, which this one replaces:" in text
    assert "learning_rate was 0.001, now 0.01" in text
    assert re.search(r"item_embedding_init was not set, now '.*embeddings'", text)
    assert "To keep both, give each run an --out of its own." in text


def test_a_training_of_hours_by_prefixes_is_told_once_what_is_faster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_recommender, "_FIRST_SECONDS", 0.0)
    for by_prefix, batches, expected in ((True, 10**12, 1), (True, 10, 0), (False, 10**12, 0)):
        with train_recommender._Display(tmp_path, by_prefix) as display:
            display.begin(200, batches, "NDCG@20")
            display.batch()
            display.batch()
        assert told(capsys).count("--positions all learns all positions") == expected, (by_prefix, batches)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model": "SASRec"}, True),
        ({"model": "GRU4Rec", "train_softmax": "sampled"}, True),
        ({"model": "SASRec", "train_positions": "last"}, True),
        ({"model": "SASRec", "train_positions": "all"}, False),
        ({"model": "BERT4Rec"}, False),
        ({"model": "SASRec", "loss_type": "BPR"}, False),
    ],
)
def test_all_positions_are_offered_to_models_that_can_learn_them(settings: dict[str, Any], expected: bool) -> None:
    assert train_recommender.learns_by_prefix(settings) is expected


def test_a_meaningful_table_beats_a_random_one(data: Path, embeddings: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).standard_normal((len(ITEMS), 16)).astype(np.float32)
    write_embeddings(tmp_path / "noise", ITEMS, noise)
    few = {"data": data, "model": "GRU4Rec", "hidden_size": 32, "max_epochs": 15, "device": "cpu"}
    meaning, chance = (
        train_recommender.run(TrainRecommenderConfig(embeddings=folder, out=tmp_path / "out" / folder.name, **few))
        for folder in (embeddings, tmp_path / "noise")
    )
    assert meaning["full"]["N@10"] > chance["full"]["N@10"] + 0.05


# --- settings -----------------------------------------------------------------------------------------------
def effective(config: TrainRecommenderConfig, out: Path) -> Any:
    """RecBole's Config as `train-recommender` makes it."""
    folder = Dataset(config.data) if config.data else None
    theirs = run.read_settings(config.config) if config.config else {}
    model = config.model or theirs["model"]
    layers: list[Any] = []
    if folder is not None:
        layers.append(train_recommender.task2_settings(config, model, folder.max_history, theirs))
    layers += [config.config] if config.config else []
    layers.append(train_recommender.chosen_settings(config, model, theirs))
    with compat.cured(out):
        return run.recbole_config_of(layers, run._merged(layers), folder, out, "cpu")


COMMON = {
    "learner": "adamw",
    "learning_rate": 1e-3,
    "weight_decay": 1e-4,
    "train_batch_size": 256,
    "epochs": 200,
    "eval_step": 5,
    "stopping_step": 3,
    "loss_type": "CE",
    "MAX_ITEM_LIST_LENGTH": 5,
    "hidden_size": 128,
    "valid_metric": "NDCG@20",
    "seed": 0,
}
ATTENTION = {"n_layers": 2, "n_heads": 2, "inner_size": 256, "hidden_act": "gelu"} | dict.fromkeys(
    ("hidden_dropout_prob", "attn_dropout_prob"), 0.3
)


@pytest.mark.parametrize(
    ("model", "special"),
    [
        ("SASRec", ATTENTION),
        ("GRU4Rec", {"num_layers": 2, "embedding_size": 128, "dropout_prob": 0.3}),
        ("BERT4Rec", ATTENTION | {"mask_ratio": 0.2}),
    ],
)
def test_defaults_are_those_of_task_2(model: str, special: dict[str, Any], data: Path, tmp_path: Path) -> None:
    config = effective(TrainRecommenderConfig(data=data, model=model, out=tmp_path), tmp_path)
    expected = COMMON | special
    assert {name: config[name] for name in expected} == expected
    assert config["eval_args"] == {
        "split": {"LS": "valid_and_test"},
        "order": "TO",
        "group_by": "user",
        "mode": {"valid": "full", "test": "full"},
    }
    assert config["train_neg_sample_args"]["distribution"] == "none"


@pytest.mark.parametrize(("patience", "eval_step"), [(20, 5), (20, 1), (7, 5), (3, 5)])
def test_training_stops_after_as_many_epochs_without_gain_as_patience_says(patience: int, eval_step: int) -> None:
    from recbole.utils import early_stopping

    config = TrainRecommenderConfig(out=Path("x"), patience=patience, eval_step=eval_step)
    limit = train_recommender.task2_settings(config, "SASRec", 10)["stopping_step"]
    best, count, epoch, stop = 1.0, 0, 0, False
    while not stop:
        epoch += eval_step
        best, count, stop, _ = early_stopping(0.5, best, count, max_step=limit)
    assert patience <= epoch < patience + eval_step


def test_the_yaml_wins_over_our_defaults_and_a_flag_over_the_yaml(data: Path, tmp_path: Path) -> None:
    file = write_yaml(
        tmp_path / "r.yaml", {"model": "SASRec", "learning_rate": 0.5, "epochs": 7, "eval_step": 1, "n_layers": 1}
    )
    config = effective(TrainRecommenderConfig(data=data, config=file, max_epochs=2, out=tmp_path), tmp_path)
    assert (config["learning_rate"], config["epochs"], config["n_layers"]) == (0.5, 2, 1)
    assert config["stopping_step"] == 19  # 20 epochs of patience, validated after each
    assert config["weight_decay"] == 1e-4


def test_a_yaml_without_data_keeps_recboles_own_defaults(tmp_path: Path) -> None:
    file = write_yaml(tmp_path / "r.yaml", {"model": "SASRec", "dataset": "small", "data_path": "x"})
    config = effective(TrainRecommenderConfig(config=file, max_epochs=1, out=tmp_path), tmp_path)
    assert (config["epochs"], config["learner"], config["hidden_size"], config["seed"]) == (1, "adam", 64, 2020)


def test_a_path_that_reads_like_python_stays_a_path(data: Path, tmp_path: Path) -> None:
    config = TrainRecommenderConfig(data=data, model="SASRec", embeddings=Path("__import__('os')"), out=tmp_path)
    assert effective(config, tmp_path)["item_embedding_init"] == "__import__('os')"
    numeric = TrainRecommenderConfig(data=data, model="SASRec", embeddings=Path("1e5"), out=tmp_path)
    assert effective(numeric, tmp_path)["item_embedding_init"] == "1e5"


def test_settings_that_would_change_the_folders_data_have_no_effect_and_are_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_yaml(
        tmp_path / "r.yaml", TINY | {"user_inter_num_interval": "[9,inf)", "dataset": "ml-100k", "data_path": "x"}
    )
    config = TrainRecommenderConfig(data=data, model="SASRec", config=file, out=tmp_path / "out", **SMALL)
    assert train_recommender.run(config)["users"] == 50
    said = " ".join(capsys.readouterr().err.split())
    assert "dataset, data_path, user_inter_num_interval have no effect with --data" in said


def test_short_histories_leave_bert4rec_a_place_to_mask(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", SEQUENCES, ITEMS, max_history=2)
    config = TrainRecommenderConfig(data=folder, model="BERT4Rec", out=tmp_path / "out", **SMALL)
    assert train_recommender.run(config)["epochs"] == 2


# --- refusals -----------------------------------------------------------------------------------------------
def test_neither_data_nor_a_yaml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither --data nor --config"):
        train_recommender.run(TrainRecommenderConfig(model="SASRec", out=tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "SASRek"}, r"did you mean 'SASRec'.*SASRec, GRU4Rec, BERT4Rec"),
        ({}, "no model is named"),
        ({"model": "SASRec", "eval_args": {"split": {"RS": [8, 1, 1]}}}, "fixes the validation and test items"),
        ({"model": "SASRec", "eval_args": "full"}, "a mapping with split"),
        ({"model": "SASRec", "loss_type": "XYZ"}, "RecBole refuses"),
        ({"model": "SASRec", "train_neg_sample_args": {"sample_num": 1}}, "should be None when the loss_type is CE"),
        ({"model": "SASRec", "metrics": ["Hitt"]}, "no metric named 'Hitt'"),
        ({"model": "SASRec", "item_embedding_colum": "text"}, "did you mean 'item_embedding_column'"),
        ({"model": "SASRec", "learning_rate": 1e30}, "loss of epoch . is not a number"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    settings: dict[str, Any], message: str, data: Path, tmp_path: Path
) -> None:
    file = write_yaml(tmp_path / "r.yaml", settings)
    with pytest.raises(ConfigError, match=message):
        train_recommender.run(TrainRecommenderConfig(data=data, config=file, out=tmp_path / "out", **SMALL))


def test_fewer_items_than_the_metrics_look_at_are_refused_in_words(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", [ITEMS[:5], ITEMS[4:12]], ITEMS[:12], candidates=2)
    config = TrainRecommenderConfig(data=folder, model="SASRec", out=tmp_path / "out", **SMALL)
    with pytest.raises(DataError, match=r"12 items.*the first 20.*topk: \[5\]"):
        train_recommender.run(config)


def test_a_column_without_embeddings_is_refused(data: Path, tmp_path: Path) -> None:
    config = TrainRecommenderConfig(data=data, model="SASRec", column="text", out=tmp_path)
    with pytest.raises(ConfigError, match="item_embedding_column without item_embedding_init"):
        train_recommender.run(config)


def test_a_recbole_dataset_that_is_not_there_is_refused_and_not_downloaded(tmp_path: Path) -> None:
    file = write_yaml(tmp_path / "r.yaml", {"model": "SASRec", "dataset": "ml-1m", "data_path": str(tmp_path)})
    with pytest.raises(DataError, match="there is no folder"):
        train_recommender.run(TrainRecommenderConfig(config=file, out=tmp_path / "out"))


def test_a_yaml_without_data_of_any_kind_is_refused(tmp_path: Path) -> None:
    file = write_yaml(tmp_path / "r.yaml", {"model": "SASRec"})
    with pytest.raises(ConfigError, match="neither --data nor a dataset in the YAML is given"):
        train_recommender.run(TrainRecommenderConfig(config=file, out=tmp_path / "out"))


@pytest.mark.parametrize("text", ["- a\n- b\n", "key: [unclosed\n"])
def test_a_yaml_that_is_no_mapping_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"r\.yaml"):
        train_recommender.run(TrainRecommenderConfig(config=tmp_path / "r.yaml", out=tmp_path / "out"))


def test_a_device_that_is_not_there_is_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = TrainRecommenderConfig(data=data, model="SASRec", device="cuda", out=tmp_path)
    with pytest.raises(ConfigError, match="'cuda' is not available"):
        train_recommender.run(config)


def test_recbole_takes_the_gpu_the_environment_names(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    config = TrainRecommenderConfig(data=data, model="SASRec", out=tmp_path)
    assert effective(config, tmp_path)["gpu_id"] == "3"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


# --- alignment with a table from item ids (RAT) -------------------------------------------------------------
def alignment_by_hand(ids: list[list[float]], adapted: list[list[float]], tau: float) -> float:
    """L(I, A) with loops over Python floats."""

    def dot(a: list[float], b: list[float]) -> float:
        return math.fsum(x * y for x, y in zip(a, b, strict=True))

    def softmax(row: list[float]) -> list[float]:
        total = math.fsum(math.exp(value) for value in row)
        return [math.exp(value) / total for value in row]

    count = range(len(ids))
    student = [[dot(ids[i], adapted[j]) / tau for j in count] for i in count]
    teacher = [softmax([tau * (dot(ids[i], ids[j]) + dot(adapted[i], adapted[j])) / 2 for j in count]) for i in count]
    found = 0.0
    for i in count:
        to_adapted, to_ids = softmax(student[i]), softmax([student[j][i] for j in count])
        found -= 0.5 * math.fsum(teacher[i][j] * math.log(to_adapted[j]) for j in count) / len(ids)
        found -= 0.5 * math.fsum(teacher[j][i] * math.log(to_ids[j]) for j in count) / len(ids)
    return found


def test_the_alignment_is_that_of_its_equation_and_every_part_of_it_has_a_gradient() -> None:
    random = torch.Generator().manual_seed(0)
    ids, adapted = torch.randn(2, 6, 4, generator=random, dtype=torch.float64)
    ids[4] = ids[1]  # an item may occur in a batch twice
    adapted[4] = adapted[1]
    for tau in (0.5, 2.0):
        expected = alignment_by_hand(ids.tolist(), adapted.tolist(), tau)
        assert float(structural_alignment(ids, adapted, tau)) == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda rows: structural_alignment(ids, rows, 2.0), (adapted.requires_grad_(),))


@pytest.fixture(scope="module")
def from_ids(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ids") / "run"
    train_recommender.run(TrainRecommenderConfig(data=data, model="SASRec", out=out, **SMALL))
    return out


@pytest.mark.parametrize(
    ("model", "positions"), [*((model, "last") for model in schema.RECOMMENDERS[:3]), ("SASRec", "all")]
)
def test_every_sequential_model_aligns_its_vectors_with_the_table_of_a_run_from_ids(
    model: str,
    positions: str,
    data: Path,
    embeddings: Path,
    from_ids: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given: dict[str, Any] = SMALL | {
        "data": data,
        "model": model,
        "positions": positions,
        "embeddings": embeddings,
        "learning_rate": 1e-2,
    }
    given |= {"adapter": "two-linear", "pca": 6}
    before = (from_ids / "checkpoint.safetensors").read_bytes()
    aligned = TrainRecommenderConfig(out=tmp_path / "a", align_with=from_ids, align_weight=5.0, **given)
    metrics = train_recommender.run(aligned)
    assert metrics["alignment"] == {"with": str(from_ids), "weight": 5.0, "tau": 2.0}
    course = [epoch["alignment"] for epoch in metrics["curve"]]
    assert course[-1] < course[0] or positions == "all"  # there batches differ in size, and with it log N
    assert all(epoch["loss"] > epoch["alignment"] > 0 for epoch in metrics["curve"])
    assert "weight 5, τ 2" in " ".join(capsys.readouterr().err.split())
    plain = train_recommender.run(TrainRecommenderConfig(out=tmp_path / "b", **given))
    assert "alignment" not in plain and "alignment" not in plain["curve"][0]
    with_it, without = state(tmp_path / "a"), state(tmp_path / "b")
    assert with_it.keys() == without.keys(), "the table of the other run is in no checkpoint"
    assert not same(with_it, without)
    assert (from_ids / "checkpoint.safetensors").read_bytes() == before


def test_the_loss_has_the_rows_of_the_targets_and_no_padding(
    data: Path, embeddings: Path, from_ids: Path, tmp_path: Path
) -> None:
    config = TrainRecommenderConfig(
        data=data, model="BERT4Rec", embeddings=embeddings, align_with=from_ids, out=tmp_path / "run", **SMALL
    )
    folder = Dataset(data)
    layers = [
        train_recommender.task2_settings(config, "BERT4Rec", 5),
        train_recommender.chosen_settings(config, "", {}),
    ]
    model = run.run(layers, tmp_path / "run", data=folder, device="cpu").model
    items = torch.tensor([[3, 0, 7], [7, 12, 0]])
    found = model.alignment(model.item_embedding, items)
    rows = [3, 7, 7, 12]
    table = state(from_ids)["item_embedding.weight"].double()
    adapted = model.item_embedding.weight.detach().double()
    expected = 0.01 * alignment_by_hand(table[rows].tolist(), adapted[rows].tolist(), 2.0)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)


def older_run(run_folder: Path, to: Path) -> Path:
    """Copy a run as a version left it that did not record its items."""
    shutil.copytree(run_folder, to)
    weights = load_file(to / "checkpoint.safetensors")
    save_file(weights, to / "checkpoint.safetensors", {"vlm2rec": json.dumps({"model": "SASRec"})})
    return to


@pytest.mark.parametrize(
    ("case", "code", "message"),
    [
        ("vectors", 2, r"a run of SASRec from fused vectors. Expected: a finished run .* from item ids"),
        ("width", 2, r"item vectors have 16 dimensions, and this run has --hidden-size 8.*--hidden-size 16"),
        ("own out", 2, r"--align-with and --out are both"),
        ("no vectors", 2, r"item_embedding_align_with without item_embedding_init"),
        ("unfinished", 5, r"metrics.json does not exist"),
        ("other items", 5, r"a run of other items"),
        ("older", 5, r"a run of an earlier version, which did not record its items"),
        ("damaged", 5, r"checkpoint.safetensors is missing or damaged"),
        ("no table", 5, r"has no item table"),
    ],
)
def test_what_vectors_cannot_be_aligned_with_is_refused(
    data: Path, embeddings: Path, from_ids: Path, tmp_path: Path, case: str, code: int, message: str
) -> None:
    other, out = tmp_path / "other", tmp_path / "out"
    flags: dict[str, object] = {"data": data, "model": "SASRec", "hidden-size": 16, "max-epochs": 1, "device": "cpu"}
    flags |= {"out": out, "embeddings": embeddings, "align-with": from_ids}
    if case == "vectors":
        config = TrainRecommenderConfig(data=data, model="SASRec", embeddings=embeddings, out=other, **SMALL)
        train_recommender.run(config)
    elif case == "other items":
        folder = write_dataset(tmp_path / "data", SEQUENCES[::-1], ITEMS, user_ids=USERS, candidates=20)
        train_recommender.run(TrainRecommenderConfig(data=folder, model="SASRec", out=other, **SMALL))
    elif case == "older":
        older_run(from_ids, other)
    elif case in ("damaged", "unfinished", "no table"):
        shutil.copytree(from_ids, other)
        if case == "unfinished":
            (other / "metrics.json").unlink()
        elif case == "damaged":
            (other / "checkpoint.safetensors").write_bytes(b"\0" * 99)
        else:
            save_file({"other": torch.ones(2)}, other / "checkpoint.safetensors")
    flags |= {"align-with": other} if other.exists() else {}
    flags |= {"hidden-size": 8} if case == "width" else {}
    if case == "own out":
        flags["align-with"] = out
    if case == "no vectors":
        del flags["embeddings"]
    result = CliRunner().invoke(app, ["train-recommender", *(str(p) for k, v in flags.items() for p in (f"--{k}", v))])
    assert isinstance(result.exception, Vlm2RecError) and result.exception.exit_code == code
    assert re.search(message, str(result.exception))
    assert not (out / "metrics.json").exists()
