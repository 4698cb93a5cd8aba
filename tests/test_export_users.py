"""`vlm2rec export-users`: a vector of any history, each user exactly once, or the reason why there is none."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from children import Forked
from embedding_folder import write_embeddings
from user_world import ITEMS, draw_histories, item_vectors, parts, rows_of, write_histories, write_items

from vlm2rec.downstream.evaluation.protocol import mean_of_history
from vlm2rec.downstream.table import EmbeddingTable, read_batches
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, DataError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.item_features import ItemFeatures, encode_rows
from vlm2rec.embedder.export.lock import LOCK_FILE
from vlm2rec.embedder.export.verify import verify
from vlm2rec.pipelines import build_index, export_items, export_users, recommend, shorten
from vlm2rec.pipelines import verify as verify_command
from vlm2rec.pipelines.config import (
    BuildIndexConfig,
    ExportConfig,
    ExportUsersConfig,
    FailuresConfig,
    RecommendConfig,
    ShortenConfig,
    VerifyConfig,
)

HISTORIES = draw_histories(20)


@pytest.fixture
def config(tmp_path: Path) -> ExportUsersConfig:
    return ExportUsersConfig(
        histories=write_histories(tmp_path / "histories.jsonl", HISTORIES),
        embeddings=write_items(tmp_path / "embeddings"),
        out=tmp_path / "users",
        shard_size=7,
        max_history=5,
    )


def test_a_user_is_the_mean_of_the_latest_items_that_have_a_vector(config: ExportUsersConfig) -> None:
    manifest = export_users.run(config)
    rows = {row["user_id"]: row for row in rows_of(config.out)}
    assert list(rows) == sorted(HISTORIES) and manifest["num_items"] == len(HISTORIES)
    tables = {view: EmbeddingTable.open(config.embeddings, view) for view in schema.VIEWS}
    for user, history in HISTORIES.items():
        known = [item for item in history if item in ITEMS][-5:]
        for view, table in tables.items():
            given = table.vectors[[ITEMS.index(item) for item in known]].astype(np.float64).reshape(-1, table.dim)
            given = given[~np.isnan(given).any(1)]
            if not len(given):
                assert rows[user][view] is None
            else:
                np.testing.assert_allclose(rows[user][view], given.mean(0), rtol=1e-5, atol=1e-6)
    assert verify(config.out) == []


def test_users_without_a_vector_are_rows_with_a_reason_and_the_counts_add_up(
    config: ExportUsersConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = export_users.run(config)
    reasons = {row["user_id"]: row["error"] for row in rows_of(config.out) if row["status"] == "failed"}
    assert reasons == {
        "=empty": "the history is empty",
        "lost": "no interaction can be used: item not in the catalogue (2), such as item 'nowhere'",
        "without": "no item of the history has a vector in fused, text, image",
    }
    assert sum(manifest["counts"].values()) == len(HISTORIES) and manifest["counts"]["failed"] == 3
    told = manifest["histories"]
    assert told["read"] == sum(map(len, HISTORIES.values())) == told["kept"] + sum(told["left_out"].values())
    assert told["unknown_items"] == 2 and told["unknown"] == ["nowhere", "elsewhere"]
    left_out = list(csv.DictReader((config.out / schema.LEFT_OUT_FILE).read_text().splitlines()))
    assert [(row["user_id"], row["item_id"]) for row in left_out] == [
        ("user 001", "nowhere"), ("lost", "nowhere"), ("lost", "elsewhere"),
    ]  # fmt: skip
    capsys.readouterr()
    verify_command.run(VerifyConfig(embeddings=config.out))
    verify_command.failures(FailuresConfig(embeddings=config.out))
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "user_id,status,error" and len(out) == 4 and out[1].startswith("'=empty,failed")


def test_a_user_whose_items_have_no_image_gets_the_other_views(config: ExportUsersConfig, tmp_path: Path) -> None:
    histories = write_histories(tmp_path / "one.jsonl", {"one": ["i7"], "two": ["i7", "i8"]})
    export_users.run(replace(config, histories=histories))
    one, two = rows_of(config.out)
    assert (one["status"], one["image"], one["fused"]) == ("text_only", None, one["text"])
    assert one["error"] == "no item of the history has a vector in image"
    assert two["status"] == "ok" and two["image"] == pytest.approx(item_vectors(100)[8].tolist())


def test_the_means_are_those_of_task_1_to_the_bit(drawn_dataset: Path, tmp_path: Path) -> None:
    dataset = Dataset(drawn_dataset)
    vectors = np.random.default_rng(1).normal(size=(len(dataset.item_ids), 8)).astype(np.float32)
    write_embeddings(tmp_path / "emb", dataset.item_ids, vectors)
    histories = dataset.histories("test")
    given = write_histories(
        tmp_path / "h.jsonl",
        {u: [dataset.item_ids[r] for r in histories.of(n)] for n, u in enumerate(histories.user_ids)},
    )
    config = ExportUsersConfig(
        histories=given, embeddings=tmp_path / "emb", data=drawn_dataset, out=tmp_path / "u", shard_size=4
    )
    assert export_users.run(config)["settings"]["max_history"] == dataset.max_history
    found = {row["user_id"]: row["fused"] for row in rows_of(config.out)}
    wanted = mean_of_history(vectors, histories)
    assert all(found[user] == wanted[place].tolist() for place, user in enumerate(histories.user_ids))


@pytest.fixture(scope="module")
def encoded(
    tiny: Callable[[str], Path], drawn_dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> ExportUsersConfig:
    """An export of items by a tiny model, and histories of its items in an order that no training had."""
    folder = tmp_path_factory.mktemp("encoded")
    backbone = str(tiny("qwen2_5_vl"))
    export_items.run(
        ExportConfig(
            data=drawn_dataset, backbone=backbone, out=folder / "emb", max_pixels=56 * 56, dtype="float32", device="cpu"
        )
    )
    items = Dataset(drawn_dataset).item_ids
    random = np.random.default_rng(0)
    histories = {f"new {n}": [items[r] for r in random.choice(len(items), 1 + n % 4)] for n in range(9)}
    histories |= {"stranger": ["nowhere"]}
    return ExportUsersConfig(
        histories=write_histories(folder / "h.jsonl", histories),
        embeddings=folder / "emb",
        data=drawn_dataset,
        backbone=backbone,
        out=folder / "users",
        shard_size=4,
        max_history=3,
        dtype="float32",
        device="cpu",
    )


def test_the_encoder_of_sequences_gives_the_vectors_of_task_1(encoded: ExportUsersConfig) -> None:
    manifest = export_users.run(encoded)
    assert manifest["settings"]["source"] == "histories" and verify(encoded.out) == []
    dataset = Dataset(encoded.data)  # type: ignore[arg-type]
    encoder = ItemEncoder.load(str(encoded.backbone), max_pixels=56 * 56, dtype="float32", device="cpu")
    given = [json.loads(line) for line in encoded.histories.read_text().splitlines()]
    known = {row["user_id"]: row["history"][-3:] for row in given if row["user_id"] != "stranger"}
    rows = [[dataset.item_ids.index(item) for item in items] for items in known.values()]
    wanted = encode_rows(encoder, ItemFeatures(dataset, encoder), rows)
    found = {row["user_id"]: row for row in rows_of(encoded.out)}
    for place, user in enumerate(known):
        for view in schema.VIEWS:
            np.testing.assert_allclose(found[user][view], wanted[view][place], rtol=1e-4, atol=1e-5)
    assert found["stranger"]["fused"] is None and "nowhere" in found["stranger"]["error"]


@pytest.mark.usefixtures("forked_workers")
def test_a_users_vector_does_not_depend_on_the_other_users(encoded: ExportUsersConfig, tmp_path: Path) -> None:
    whole = export_users.run(replace(encoded, out=tmp_path / "whole"))
    given = [json.loads(line) for line in encoded.histories.read_text().splitlines()]
    alone = write_histories(tmp_path / "one.jsonl", {given[5]["user_id"]: given[5]["history"]})
    export_users.run(replace(encoded, histories=alone, out=tmp_path / "alone"))
    (one,) = rows_of(tmp_path / "alone")
    assert one == next(row for row in rows_of(tmp_path / "whole") if row["user_id"] == one["user_id"])
    export_users.run(replace(encoded, num_workers=2, out=tmp_path / "two"))
    assert parts(tmp_path / "two") == parts(tmp_path / "whole") and len(whole["shards"]) == 3


KILLED = """
import sys
from test_export_users import *
from user_world import die_after
die_after(int(sys.argv[4]))
export_users.run(ExportUsersConfig(histories=Path(sys.argv[1]), embeddings=Path(sys.argv[2]), out=Path(sys.argv[3]),
    shard_size=7, max_history=5))
"""


@pytest.mark.parametrize("shards", [0, 2])
def test_killed_and_run_again_it_writes_the_same_bytes(config: ExportUsersConfig, shards: int, tmp_path: Path) -> None:
    killed = Forked(KILLED, config.histories, config.embeddings, config.out, shards)
    told = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, told
    left = {path.name for path in config.out.iterdir()}
    assert {schema.STATE_FILE, LOCK_FILE, schema.LEFT_OUT_FILE} <= left and schema.MANIFEST_FILE not in left
    export_users.run(config)
    export_users.run(replace(config, out=tmp_path / "whole"))
    assert parts(config.out) == parts(tmp_path / "whole")
    names = sorted(path.name for path in config.out.iterdir())
    assert names == [schema.LEFT_OUT_FILE, schema.MANIFEST_FILE, *parts(config.out)]
    before = (config.out / schema.MANIFEST_FILE).read_bytes()
    export_users.run(config)
    assert (config.out / schema.MANIFEST_FILE).read_bytes() == before


def test_a_damaged_shard_is_found_and_made_again(config: ExportUsersConfig) -> None:
    export_users.run(config)
    before = parts(config.out)
    part = config.out / "part-00001.parquet"
    part.write_bytes(before[part.name][:-9] + b"damaged!!")
    assert [problem.file for problem in verify(config.out)] == [part.name]
    export_users.run(config)
    assert parts(config.out) == before and verify(config.out) == []


def test_users_are_not_items(config: ExportUsersConfig, tmp_path: Path) -> None:
    export_users.run(config)
    with pytest.raises(ArtifactError, match="is a folder of users"):
        build_index.run(BuildIndexConfig(embeddings=config.out, out=tmp_path / "index"))
    with pytest.raises(ArtifactError, match="is a folder of users"):
        EmbeddingTable.open(config.out)
    ids = [name for names, _, _ in read_batches(config.out, "fused", table=schema.USERS_TABLE) for name in names]
    assert ids == sorted(HISTORIES)


def test_other_histories_in_the_same_folder_are_refused(config: ExportUsersConfig, tmp_path: Path) -> None:
    export_users.run(config)
    other = write_histories(tmp_path / "other.jsonl", HISTORIES | {"user 002": ["i1", "i2"]})
    with pytest.raises(ArtifactError, match="begun with other settings: histories was"):
        export_users.run(replace(config, histories=other))
    with pytest.raises(ArtifactError, match="max_history was 5, now 4"):
        export_users.run(replace(config, max_history=4))
    with pytest.raises(ArtifactError, match="begun with other settings"):
        export_users.run(replace(config, out=config.embeddings))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"users_from": "sequence"}, ConfigError, "without --backbone"),
        ({"backbone": "nowhere"}, ConfigError, "--backbone without --data"),
        ({"backbone": "nowhere", "users_from": "mean"}, ConfigError, "with --users-from mean"),
        ({"embeddings": Path("nowhere")}, ArtifactError, "does not exist"),
        ({"histories": Path("nowhere")}, DataError, "is missing"),
        ({"item_id_column": "user_id"}, DataError, "no column 'timestamp'"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    config: ExportUsersConfig, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        export_users.run(replace(config, **change))
    assert not config.out.exists()


def test_an_encoder_that_did_not_make_the_items_is_refused(
    encoded: ExportUsersConfig, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    other = str(tiny("qwen2_vl"))
    with pytest.raises(ArtifactError, match="the same backbone and adapter for users and items"):
        export_users.run(replace(encoded, backbone=other, out=tmp_path / "out"))
    shutil.copytree(encoded.embeddings, tmp_path / "imported")  # type: ignore[arg-type]
    manifest = json.loads((tmp_path / "imported" / schema.MANIFEST_FILE).read_text())
    manifest["settings"]["source"] = "vectors"
    (tmp_path / "imported" / schema.MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="whose vectors come from another source"):
        export_users.run(replace(encoded, embeddings=tmp_path / "imported", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# --- short vectors ------------------------------------------------------------------------------------------------
def test_users_of_short_items_are_as_short_and_are_ranked_with_them(config: ExportUsersConfig, tmp_path: Path) -> None:
    short = tmp_path / "short"
    shorten.run(ShortenConfig(embeddings=config.embeddings, out=short, dim=8, precision="int8"))
    manifest = export_users.run(replace(config, embeddings=short))
    assert (manifest["dim"], manifest["dtype"]) == (8, "float32") and schema.SHORT not in manifest
    assert verify(config.out) == []
    kept = RecommendConfig(users=config.out, embeddings=short, out=tmp_path / "ranked", k=3, keep_seen=True)
    ranked = recommend.run(kept)
    assert ranked["num_users"] == len(HISTORIES) and schema.SHORT not in ranked
    with pytest.raises(ArtifactError):
        recommend.run(replace(kept, embeddings=config.embeddings, out=tmp_path / "other"))


def test_users_of_the_encoder_of_short_items_are_shortened(
    tiny: Callable[[str], Path], drawn_dataset: Path, tmp_path: Path
) -> None:
    common = {"data": drawn_dataset, "backbone": str(tiny("qwen2_5_vl")), "device": "cpu", "dtype": "float32"}
    common["vision_cache"] = "off"
    full, short = (
        export_items.run(ExportConfig(out=tmp_path / name, **common, **more))  # type: ignore[arg-type]
        for name, more in (("full", {}), ("short", {"dim": 16}))
    )
    assert full is not None and short is not None
    dataset = Dataset(drawn_dataset)
    history = {"somebody": dataset.item_ids[:3]}
    given = write_histories(tmp_path / "histories.jsonl", history)
    vectors = {}
    for name in ("full", "short"):
        wanted = {"histories": given, "embeddings": tmp_path / name, "out": tmp_path / f"users-{name}", **common}
        export_users.run(ExportUsersConfig(**wanted))  # type: ignore[arg-type]
        (row,) = rows_of(tmp_path / f"users-{name}")
        vectors[name] = np.array(row["fused"])
    expected = vectors["full"][:16]
    assert len(vectors["short"]) == 16
    cosine = vectors["short"] @ expected / np.linalg.norm(vectors["short"]) / np.linalg.norm(expected)
    assert cosine > 0.9999
