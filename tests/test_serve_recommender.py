"""A trained recommender serves: `recommend --recommender` ranks as the run was evaluated, and its table is exported."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from embedding_folder import write_embeddings
from recommender_world import circle_vectors, cyclic_sequences, with_cold_items, write_dataset
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from user_world import parts, rows_of, write_histories

from vlm2rec.downstream.evaluation import metrics
from vlm2rec.downstream.index.index import build_index
from vlm2rec.downstream.serving.trained import TrainedRecommender, read_run
from vlm2rec.downstream.table import EmbeddingTable
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, Vlm2RecError
from vlm2rec.embedder.export.verify import verify
from vlm2rec.pipelines import export_recommender, recommend, train_recommender
from vlm2rec.pipelines.cli import app
from vlm2rec.pipelines.config import ExportRecommenderConfig, RecommendConfig, TrainRecommenderConfig

ITEMS = [f"i{number}" for number in range(40)]
USERS = [f"user {number:02d}" for number in range(50)]
SEQUENCES = cyclic_sequences(ITEMS, len(USERS))
SMALL: dict[str, Any] = {"hidden_size": 16, "max_epochs": 2, "device": "cpu"}


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # the last four items are in nobody's history
        self.data = write_dataset(folder / "data", SEQUENCES, ITEMS, user_ids=USERS, candidates=20)
        self.embeddings = folder / "embeddings"
        write_embeddings(self.embeddings, ITEMS, circle_vectors(len(ITEMS)))
        # what a model has before a user's test item
        self.histories = write_histories(
            folder / "h.jsonl", {user: list(items[:-1]) for user, items in zip(USERS, SEQUENCES, strict=True)}
        )
        self._runs: dict[str, Path] = {}

    def run(self, name: str, **settings: Any) -> Path:
        """Train a run once."""
        if name not in self._runs:
            self._runs[name] = self.folder / "runs" / name
            config = TrainRecommenderConfig(data=self.data, out=self._runs[name], **(SMALL | settings))
            train_recommender.run(config)
        return self._runs[name]

    def config(self, run: Path, out: Path, **more: Any) -> RecommendConfig:
        given = {"histories": self.histories, "k": 10, "device": "cpu", "shard_size": 16} | more
        return RecommendConfig(recommender=run, out=out, **given)


RUNS: dict[str, dict[str, Any]] = {
    "sasrec": {"model": "SASRec"},
    "gru": {"model": "GRU4Rec"},
    "bert": {"model": "BERT4Rec"},
    "adapter": {"model": "SASRec", "embeddings": True},
    "bert-adapter": {"model": "BERT4Rec", "embeddings": True, "adapter": "mlp"},
    "table": {"model": "GRU4Rec", "embeddings": True, "mode": "table"},
    "fuse": {"model": "SASRec", "embeddings": True, "mode": "fuse", "fuse": "gate"},
    "init": {"model": "GRU4Rec", "embeddings": True, "mode": "init"},
    "pca": {"model": "SASRec", "embeddings": True, "pca": 6},
    "positions": {"model": "SASRec", "positions": "all"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def trained(world: World, name: str) -> Path:
    settings = dict(RUNS[name])
    if settings.get("embeddings"):
        settings["embeddings"] = world.embeddings
    return world.run(name, **settings)


@pytest.mark.parametrize("name", RUNS)
def test_the_ranking_is_the_one_that_the_run_was_evaluated_with(name: str, world: World, tmp_path: Path) -> None:
    run = trained(world, name)
    recommend.run(world.config(run, tmp_path / "out", k=len(ITEMS)))
    found: dict[str, list[str]] = {}
    for row in rows_of(tmp_path / "out"):
        found.setdefault(row["user_id"], []).append(row["item_id"])
    rows = pq.read_table(run / "users.parquet").to_pylist()
    wanted = {row["user_id"]: row for row in rows if row["protocol"] == "full"}
    assert list(found) == USERS == list(wanted)
    for user, items in zip(USERS, SEQUENCES, strict=True):
        # nothing seen, and everything else once; a target that was seen before is not ranked
        assert sorted(found[user]) == sorted(set(ITEMS) - set(items[:-1]))
        place = np.array([found[user].index(items[-1])], np.float64)
        for metric, value in metrics.expected_metrics(place, np.zeros(1)).items():
            assert value[0] == pytest.approx(wanted[user][metric], abs=1e-6), (user, metric)
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("name", ["sasrec", "adapter", "fuse"])
def test_users_and_histories_that_training_never_saw_are_ranked(name: str, world: World, tmp_path: Path) -> None:
    given = {"new": ["i3", "i30", "i4"], "lost": ["nowhere"], "empty": [], "long": ITEMS[:30]}
    histories = write_histories(tmp_path / "h.jsonl", given)
    run = trained(world, name)
    manifest = recommend.run(world.config(run, tmp_path / "out", histories=histories, k=5))
    rows = rows_of(tmp_path / "out")
    count = {user: sum(row["user_id"] == user and row["rank"] is not None for row in rows) for user in given}
    assert count == {"new": 5, "lost": 0, "empty": 0, "long": 5}
    assert manifest["counts"]["failed"] == 2 and manifest["search"]["kind"] == "SASRec"
    assert not {row["item_id"] for row in rows if row["user_id"] == "new"} & set(given["new"])
    recommend.run(world.config(run, tmp_path / "seen", histories=histories, k=len(ITEMS), keep_seen=True))
    assert sum(row["user_id"] == "new" for row in rows_of(tmp_path / "seen")) == len(ITEMS)


@pytest.mark.usefixtures("forked_workers")
def test_other_users_and_workers_change_nothing(world: World, tmp_path: Path) -> None:
    run = trained(world, "sasrec")
    recommend.run(world.config(run, tmp_path / "all"))
    recommend.run(world.config(run, tmp_path / "two", num_workers=2))
    assert parts(tmp_path / "two") == parts(tmp_path / "all")
    alone = write_histories(tmp_path / "h.jsonl", {USERS[7]: list(SEQUENCES[7][:-1])})
    recommend.run(world.config(run, tmp_path / "one", histories=alone))
    wanted = [row for row in rows_of(tmp_path / "all") if row["user_id"] == USERS[7]]
    found = rows_of(tmp_path / "one")
    assert [row["item_id"] for row in found] == [row["item_id"] for row in wanted]
    np.testing.assert_allclose([r["score"] for r in found], [r["score"] for r in wanted], atol=1e-5)


@pytest.mark.parametrize("name", ["sasrec", "adapter", "bert-adapter", "table", "fuse", "gru"])
def test_the_exported_table_is_what_the_model_ranks_with(name: str, world: World, tmp_path: Path) -> None:
    run = trained(world, name)
    manifest = export_recommender.run(ExportRecommenderConfig(recommender=run, out=tmp_path / "emb"))
    table = EmbeddingTable.open(tmp_path / "emb")
    assert table.item_ids == ITEMS and table.vectors.shape == (40, 16) and manifest["views"] == ["fused"]
    assert verify(tmp_path / "emb") == []
    state = load_file(run / "checkpoint.safetensors")
    if "item_embedding.weight" in state:  # RecBole numbers items as they first occur
        order = list(dict.fromkeys([item for items in SEQUENCES for item in items] + ITEMS))
        rows = [order.index(item) + 1 for item in ITEMS]
        np.testing.assert_array_equal(table.vectors, state["item_embedding.weight"][rows].numpy())
    if "bert" not in name:  # which adds a number for each item
        served = TrainedRecommender(read_run(run), "cpu")
        order = [served.run.item_ids.index(item) for item in ITEMS]
        scores = served.scores([np.array([3, 5]), np.array([8])]).numpy()[:, order]
        states, *_ = np.linalg.lstsq(table.vectors.astype(np.float64), scores.T.astype(np.float64), rcond=None)
        np.testing.assert_allclose(table.vectors @ states, scores.T, atol=1e-4)  # scores are products with the table
    build_index(tmp_path / "emb", tmp_path / "index")
    found = recommend.run(
        RecommendConfig(histories=world.histories, index=tmp_path / "index", out=tmp_path / "out", k=3)
    )
    assert found["counts"]["ok"] == len(USERS)
    again = TrainRecommenderConfig(
        data=world.data, embeddings=tmp_path / "emb", out=tmp_path / "again", model="SASRec", **SMALL
    )
    assert train_recommender.run(again)["start"] == "fused"


def test_the_same_table_is_exported_again_byte_for_byte(world: World, tmp_path: Path) -> None:
    run = trained(world, "adapter")
    for out in ("a", "b"):
        export_recommender.run(ExportRecommenderConfig(recommender=run, out=tmp_path / out, shard_size=7))
    assert parts(tmp_path / "a") == parts(tmp_path / "b") and len(parts(tmp_path / "a")) == 6
    (tmp_path / "a" / "part-00003.parquet").unlink()
    export_recommender.run(ExportRecommenderConfig(recommender=run, out=tmp_path / "a", shard_size=7))
    assert parts(tmp_path / "a") == parts(tmp_path / "b")
    other = trained(world, "sasrec")
    with pytest.raises(ArtifactError, match=r"begun with other settings: .*checkpoint_sha256"):
        export_recommender.run(ExportRecommenderConfig(recommender=other, out=tmp_path / "a", shard_size=7))


def test_cold_items_of_the_folder_are_not_of_the_run(world: World, tmp_path: Path) -> None:
    cold = with_cold_items(world.data, tmp_path / "cold")
    run = trained(world, "sasrec")
    # the same items take part, so the folder with cold ones serves as well
    recommend.run(world.config(run, tmp_path / "out", data=cold))
    recommend.run(world.config(run, tmp_path / "plain"))
    assert parts(tmp_path / "out") == parts(tmp_path / "plain")
    export_recommender.run(ExportRecommenderConfig(recommender=run, data=cold, out=tmp_path / "emb"))
    assert EmbeddingTable.open(tmp_path / "emb").item_ids == ITEMS


def refused(config: RecommendConfig) -> Vlm2RecError:
    with pytest.raises(Vlm2RecError) as caught:
        recommend.run(config)
    assert not config.out.exists()
    out = config.out.with_name("emb")
    with pytest.raises(type(caught.value)):
        export_recommender.run(
            ExportRecommenderConfig(
                recommender=config.recommender,  # type: ignore[arg-type]
                data=config.data,
                embeddings=config.embeddings,
                out=out,
            )
        )
    assert not out.exists()
    return caught.value


def damaged(run: Path, to: Path, kind: str) -> Path:
    """Copy a run, and damage the copy."""
    shutil.copytree(run, to)
    checkpoint = to / "checkpoint.safetensors"
    about = {"vlm2rec": json.dumps(json.loads(_metadata(checkpoint)))}
    state = load_file(checkpoint)
    if kind == "unfinished":
        (to / "metrics.json").unlink()
    elif kind == "cut short":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    elif kind == "a bit":
        content = bytearray(checkpoint.read_bytes())
        content[-3] ^= 1
        checkpoint.write_bytes(content)
    elif kind in ("a weight less", "another shape", "a weight more"):
        first = sorted(state)[0]
        if kind == "a weight less":
            del state[first]
        else:
            state[first if kind == "another shape" else "extra"] = torch.zeros(3, 3)
        save_file(state, checkpoint, about)
        _forget(to, "checkpoint_sha256")
    elif kind == "no record":
        (to / "recommender.json").write_text("{}")
    elif kind == "other settings":
        record = json.loads((to / "recommender.json").read_text())
        record["settings"]["hidden_size"] = 32
        (to / "recommender.json").write_text(json.dumps(record))
    return to


def _metadata(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return str(file.metadata()["vlm2rec"])


def _forget(run: Path, *keys: str) -> None:
    for name in ("metrics.json", "recommender.json"):
        found = json.loads((run / name).read_text())
        (run / name).write_text(json.dumps({key: value for key, value in found.items() if key not in keys}))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("unfinished", "metrics.json does not exist"),
        ("cut short", "checkpoint.safetensors is missing or damaged"),
        ("a bit", "is not the file that the run wrote"),
        ("a weight less", "do not fit its settings"),
        ("a weight more", "do not fit its settings"),
        ("another shape", "do not fit its settings"),
        ("other settings", "do not fit its settings"),
        ("no record", "is not of train-recommender"),
    ],
)
def test_an_unfinished_or_damaged_run_is_refused(kind: str, words: str, world: World, tmp_path: Path) -> None:
    run = damaged(trained(world, "sasrec"), tmp_path / "run", kind)
    config = world.config(run, tmp_path / "out")
    if "do not fit" in words:  # which only the weights show: the folder is begun by then
        with pytest.raises(ArtifactError, match=words):
            recommend.run(config)
        return
    error = refused(config)
    assert isinstance(error, ArtifactError) and words in str(error)


def test_a_run_of_other_data_or_vectors_is_refused(world: World, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", SEQUENCES[::-1], ITEMS, user_ids=USERS, candidates=20)
    run = trained(world, "adapter")
    error = refused(world.config(run, tmp_path / "out", data=other))
    assert isinstance(error, ArtifactError) and "has other items than" in str(error)
    write_embeddings(tmp_path / "vectors", ITEMS, circle_vectors(len(ITEMS), seed=5))
    error = refused(world.config(run, tmp_path / "out", embeddings=tmp_path / "vectors"))
    assert isinstance(error, ArtifactError) and "holds other vectors" in str(error)
    shutil.copytree(world.embeddings, tmp_path / "moved")
    recommend.run(world.config(run, tmp_path / "out", embeddings=tmp_path / "moved"))


def test_a_run_of_an_earlier_version_serves_with_its_folders_named(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(trained(world, "adapter"), tmp_path / "run")
    _forget(run, "data", "vectors", "checkpoint_sha256")
    error = refused(world.config(run, tmp_path / "out"))
    assert isinstance(error, ConfigError) and "give --data" in str(error)
    recommend.run(world.config(run, tmp_path / "out", data=world.data))
    recommend.run(world.config(trained(world, "adapter"), tmp_path / "now"))
    assert parts(tmp_path / "out") == parts(tmp_path / "now")
    assert "was written by an earlier vlm2rec and does not record which vectors" in capsys.readouterr().err


def test_models_that_know_their_users_only_are_refused_by_name(world: World, tmp_path: Path) -> None:
    run = world.run("vbpr", model="VBPR", embeddings=world.embeddings, features=("fused",))
    error = refused(world.config(run, tmp_path / "out"))
    assert isinstance(
        error, ConfigError
    ) and "is a run of VBPR, which can rank only for the users it was trained on" in str(error)


def test_k_above_the_items_of_the_run_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--k 41 with 40 items"):
        recommend.run(world.config(trained(world, "sasrec"), tmp_path / "out", k=41))


def test_the_record_names_data_and_vectors_and_the_metrics_the_checkpoint(world: World) -> None:
    run = trained(world, "adapter")
    record = json.loads((run / "recommender.json").read_text())
    assert record["data"] == str(world.data) and record["embeddings"] == str(world.embeddings)
    assert record["vectors"] == schema.shards_sha256(schema.read_manifest(world.embeddings))
    assert "checkpoint_sha256" in json.loads((run / "metrics.json").read_text())
    assert Dataset(world.data).item_ids == ITEMS and replace(world.config(run, Path("x")), k=3).k == 3


def test_the_page_about_users_runs_as_it_stands(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "users.md").read_text()
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```$", page, re.M | re.S) for line in block.splitlines()]
    assert len(lines) == 10
    monkeypatch.chdir(tmp_path)
    for name, folder in (("data", world.data), ("embeddings", world.embeddings)):
        (tmp_path / name).symlink_to(folder)
    (tmp_path / "histories.jsonl").symlink_to(world.histories)
    for line in lines:
        _, *arguments = line.split()
        small = ["--max-epochs", "1", "--hidden-size", "16"] if arguments[0] == "train-recommender" else []
        ran = CliRunner().invoke(app, arguments + small)
        assert ran.exit_code == 0, (line, ran.exception)
    users = {row["user_id"] for row in rows_of(tmp_path / "top")}
    for out in ("top-by-index", "top-of-users", "top-by-sasrec"):
        assert {row["user_id"] for row in rows_of(tmp_path / out)} == users == set(USERS)
