"""`vlm2rec recommend`: the first items of every user equal a brute force, each user once, whatever interrupts it."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
from children import Forked
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner
from user_world import ITEMS, draw_histories, parts, rows_of, write_histories, write_items

from vlm2rec.downstream.index.index import build_index
from vlm2rec.downstream.serving.top_items import ExactSearch, top_items, with_direction
from vlm2rec.downstream.table import EmbeddingTable
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, DataError, Vlm2RecError
from vlm2rec.embedder.contract.storage import sha256_file
from vlm2rec.embedder.export.lock import LOCK_FILE
from vlm2rec.embedder.export.verify import verify
from vlm2rec.pipelines import export_users, recommend
from vlm2rec.pipelines import verify as verify_command
from vlm2rec.pipelines.cli import app
from vlm2rec.pipelines.config import ExportUsersConfig, FailuresConfig, RecommendConfig, VerifyConfig

HISTORIES = draw_histories(30)
WITHOUT = ("=empty", "lost", "without", "whole")
Ranked = dict[str, list[tuple[str, float]]]


@pytest.fixture
def config(tmp_path: Path) -> RecommendConfig:
    return RecommendConfig(
        histories=write_histories(tmp_path / "histories.jsonl", HISTORIES),
        embeddings=write_items(tmp_path / "embeddings"),
        out=tmp_path / "out",
        k=4,
        max_history=5,
        shard_size=8,
    )


def told(folder: Path) -> Ranked:
    """Return each user's items and scores; the ranks count from 1."""
    found: Ranked = {}
    for row in rows_of(folder):
        items = found.setdefault(row["user_id"], [])
        if row["error"] is None:
            assert row["rank"] == len(items) + 1
            items.append((row["item_id"], row["score"]))
        else:
            assert (row["rank"], row["item_id"], row["score"]) == (None, None, None)
    return found


def brute_force(
    embeddings: Path, column: str, k: int, users: dict[str, np.ndarray | None], *, keep_seen: bool = False
) -> Ranked:
    """Rank all items of all users by cosines in float64, one by one."""
    table = EmbeddingTable.open(embeddings, column)
    vectors = table.vectors.astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found: Ranked = {}
    for user in sorted(users):
        vector = users[user]
        if vector is None:
            found[user] = []
            continue
        scores = vectors @ (vector / np.linalg.norm(vector))
        seen = set() if keep_seen else set(HISTORIES[user])
        order = [row for row in np.argsort(-scores, kind="stable") if table.present[row] and ITEMS[row] not in seen]
        found[user] = [(ITEMS[row], scores[row]) for row in order[:k]]
    return found


def means(embeddings: Path, column: str, latest: int) -> dict[str, np.ndarray | None]:
    table = EmbeddingTable.open(embeddings, column)
    users: dict[str, np.ndarray | None] = {}
    for user, history in HISTORIES.items():
        rows = [ITEMS.index(item) for item in history if item in ITEMS][-latest:]
        rows = [row for row in rows if table.present[row]]
        users[user] = table.vectors[rows].astype(np.float64).mean(0) if rows else None
    return users


def assert_same(found: Ranked, wanted: Ranked) -> None:
    assert list(found) == list(wanted)
    for user, items in wanted.items():
        assert [item for item, _ in found[user]] == [item for item, _ in items], user
        np.testing.assert_allclose([s for _, s in found[user]], [s for _, s in items], atol=2e-6)


@pytest.mark.parametrize("column", schema.VIEWS)
@pytest.mark.parametrize("keep_seen", [False, True])
def test_the_first_items_are_those_of_a_brute_force(config: RecommendConfig, column: Any, keep_seen: bool) -> None:
    manifest = recommend.run(replace(config, column=column, keep_seen=keep_seen))
    wanted = brute_force(config.embeddings, column, 4, means(config.embeddings, column, 5), keep_seen=keep_seen)  # type: ignore[arg-type]
    assert_same(told(config.out), wanted)
    assert verify(config.out) == [] and manifest["num_users"] == len(HISTORIES) == sum(manifest["counts"].values())
    assert manifest["counts"]["failed"] == sum(not items for items in wanted.values())


def test_a_user_without_items_is_a_row_with_a_reason(
    config: RecommendConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = recommend.run(config)
    reasons = {row["user_id"]: row["error"] for row in rows_of(config.out) if row["error"]}
    assert reasons == {
        "=empty": "the history is empty",
        "lost": "no interaction can be used: item not in the catalogue (2), such as item 'nowhere'",
        "whole": "every item that was found is in the history",
        "without": "no item of the history has a vector in fused",
    }
    told = manifest["histories"]
    assert told["read"] == sum(map(len, HISTORIES.values())) == told["kept"] + sum(told["left_out"].values())
    assert (config.out / schema.LEFT_OUT_FILE).read_text().count("nowhere") == 2
    capsys.readouterr()
    verify_command.run(VerifyConfig(embeddings=config.out))
    verify_command.failures(FailuresConfig(embeddings=config.out))
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 5 and out[1] == "'=empty,failed,the history is empty"


def test_the_folder_opens_as_one_table(config: RecommendConfig) -> None:
    recommend.run(config)
    table = pq.read_table(config.out)
    assert table.column_names == ["user_id", "rank", "item_id", "score", "error"]
    assert table["rank"].type == "int32" and table["score"].type == "float"
    assert len(set(table["user_id"].to_pylist())) == len(HISTORIES)


def test_vectors_of_export_users_give_what_the_means_give(config: RecommendConfig, tmp_path: Path) -> None:
    assert config.histories is not None and config.embeddings is not None
    export_users.run(
        ExportUsersConfig(
            histories=config.histories, embeddings=config.embeddings, out=tmp_path / "u", max_history=5, shard_size=11
        )
    )
    by_users = replace(config, users=tmp_path / "u", max_history=None)
    manifest = recommend.run(by_users)
    assert [shard["rows"] for shard in manifest["shards"]] == [11, 11, 11, 1]  # those of the users
    wanted = brute_force(config.embeddings, "fused", 4, means(config.embeddings, "fused", 5))  # type: ignore[arg-type]
    assert_same(told(config.out), wanted)
    reasons = {row["user_id"]: row["error"] for row in rows_of(config.out) if row["error"]}
    assert reasons["without"] == "no item of the history has a vector in fused, text, image"
    recommend.run(replace(by_users, histories=None, keep_seen=True, out=tmp_path / "seen"))
    wanted = brute_force(config.embeddings, "fused", 4, means(config.embeddings, "fused", 5), keep_seen=True)  # type: ignore[arg-type]
    assert_same(told(tmp_path / "seen"), wanted)


@pytest.mark.parametrize("with_embeddings", [True, False])
def test_an_index_finds_the_same_and_its_recall_is_told(
    config: RecommendConfig, with_embeddings: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_index(config.embeddings, tmp_path / "index", kind="flat")  # type: ignore[arg-type]
    given = config.embeddings if with_embeddings else None
    manifest = recommend.run(replace(config, index=tmp_path / "index", embeddings=given))
    wanted = brute_force(config.embeddings, "fused", 4, means(config.embeddings, "fused", 5))  # type: ignore[arg-type]
    assert_same(told(config.out), wanted)
    assert manifest["search"] == {"kind": "Flat", "recall@10": 1.0, "recall_sample": 59}
    assert "recall@10 1.0000 of 59 items" in capsys.readouterr().err


def test_an_index_that_misses_items_gives_fewer_and_says_so(
    config: RecommendConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_index(config.embeddings, tmp_path / "index", kind="IVF20,Flat")  # type: ignore[arg-type]
    folder = tmp_path / "index"
    index = faiss.read_index(str(folder / "items.faiss"))
    index.nprobe = 1
    faiss.write_index(index, str(folder / "items.faiss"))
    meta = json.loads((folder / "index.json").read_text())
    del meta["files"]
    (folder / "index.json").write_text(json.dumps(meta))
    recommend.run(replace(config, index=folder, k=10))
    found = told(config.out)
    assert any(0 < len(items) < 10 for items in found.values()) and verify(config.out) == []
    assert "fewer than 10" in capsys.readouterr().err
    for user, items in found.items():
        assert not {item for item, _ in items} & set(HISTORIES[user])


KILLED = """
import sys
from test_recommend import *
from user_world import die_after
die_after(int(sys.argv[4]))
recommend.run(RecommendConfig(histories=Path(sys.argv[1]), embeddings=Path(sys.argv[2]), out=Path(sys.argv[3]), k=4,
    max_history=5, shard_size=8))
"""


@pytest.mark.parametrize("shards", [0, 3])
def test_killed_and_run_again_it_writes_the_same_bytes(config: RecommendConfig, shards: int, tmp_path: Path) -> None:
    killed = Forked(KILLED, config.histories, config.embeddings, config.out, shards)
    errors = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, errors
    left = {path.name for path in config.out.iterdir()}
    assert {schema.STATE_FILE, LOCK_FILE} <= left and schema.MANIFEST_FILE not in left
    with pytest.raises(ArtifactError, match="does not exist"):
        verify(config.out)
    recommend.run(config)
    recommend.run(replace(config, out=tmp_path / "whole"))
    assert parts(config.out) == parts(tmp_path / "whole") and len(parts(config.out)) == 5


def test_a_shard_without_a_record_is_adopted_and_a_damaged_one_made_again(config: RecommendConfig) -> None:
    recommend.run(config)
    before = parts(config.out)
    manifest = json.loads((config.out / schema.MANIFEST_FILE).read_text())  # type: ignore[operator]
    state = {key: manifest[key] for key in ("schema_version", "shard_size", "settings", "fingerprint", "made_with")}
    rows = [shard["rows"] for shard in manifest["shards"]]
    (config.out / schema.STATE_FILE).write_text(json.dumps(state | {"rows": rows}))  # type: ignore[operator]
    (config.out / schema.MANIFEST_FILE).unlink()
    part = config.out / "part-00001.parquet"
    part.write_bytes(before[part.name][:-9] + b"damaged!!")  # type: ignore[union-attr]
    times = {path.name: path.stat().st_mtime_ns for path in config.out.glob("part-*")}  # type: ignore[union-attr]
    recommend.run(config)
    assert parts(config.out) == before  # type: ignore[arg-type]
    changed = {p.name for p in config.out.glob("part-*") if p.stat().st_mtime_ns != times[p.name]}  # type: ignore[union-attr]
    assert changed == {part.name}


@pytest.mark.usefixtures("forked_workers")
def test_workers_write_what_one_process_writes(config: RecommendConfig, tmp_path: Path) -> None:
    recommend.run(config)
    recommend.run(replace(config, num_workers=2, out=tmp_path / "two"))
    assert parts(tmp_path / "two") == parts(config.out)  # type: ignore[arg-type]


def test_verify_finds_ranks_that_do_not_count_and_scores_that_rise(config: RecommendConfig) -> None:
    recommend.run(config)
    part = config.out / "part-00000.parquet"
    table = pq.read_table(part)
    first = table["rank"].to_pylist().index(1)
    order = [*range(first), first + 1, first, *range(first + 2, len(table))]
    pq.write_table(table.take(order), part)
    manifest = json.loads((config.out / schema.MANIFEST_FILE).read_text())  # type: ignore[operator]
    manifest["shards"][0] |= {"bytes": part.stat().st_size, "sha256": sha256_file(part)}  # type: ignore[union-attr]
    (config.out / schema.MANIFEST_FILE).write_text(json.dumps(manifest))  # type: ignore[operator]
    problems = [str(problem) for problem in verify(config.out)]
    assert any("break the order of ranks and scores" in problem for problem in problems)


def test_the_folder_is_of_its_settings_and_no_embeddings_folder(config: RecommendConfig, tmp_path: Path) -> None:
    recommend.run(config)
    with pytest.raises(ArtifactError, match="k was 4, now 5"):
        recommend.run(replace(config, k=5))
    write_items(tmp_path / "others", seed=9)
    with pytest.raises(ArtifactError, match="embeddings_sha256 was"):
        recommend.run(replace(config, embeddings=tmp_path / "others"))
    with pytest.raises(ArtifactError, match="is a folder of recommendations"):
        EmbeddingTable.open(config.out)


def refused(config: RecommendConfig, **change: Any) -> Vlm2RecError:
    with pytest.raises(Vlm2RecError) as caught:
        recommend.run(replace(config, **change))
    return caught.value


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"embeddings": None}, 2, "none of --embeddings, --index and --recommender"),
        ({"histories": None}, 2, "neither --histories nor --users"),
        ({"k": 60}, 2, "--k 60 with 59 items that can be recommended"),
        ({"k": 59, "column": "image"}, 2, "--k 59 with 58 items"),
        ({"recommender": Path("x"), "users": Path("u")}, 2, "--recommender with --users"),
        ({"recommender": Path("x"), "column": "text", "max_history": None}, 2, "--column with --recommender"),
        ({"embeddings": Path("nowhere")}, 5, "does not exist"),
        ({"index": Path("nowhere")}, 5, "does not exist"),
        ({"recommender": Path("nowhere"), "max_history": None}, 5, "does not exist"),
        ({"histories": Path("nowhere")}, 3, "is missing"),
        ({"order": "time", "item_id_column": "user_id"}, 3, "no column 'timestamp'"),
    ],
)
def test_bad_settings_and_inputs_have_their_codes(
    config: RecommendConfig, change: dict[str, Any], code: int, words: str
) -> None:
    error = refused(config, **change)
    assert (error.exit_code, words in str(error)) == (code, True), error
    assert not config.out.exists()


def test_histories_of_another_catalogue_are_refused(config: RecommendConfig, tmp_path: Path) -> None:
    other = write_histories(tmp_path / "other.jsonl", {"u": ["x1", "x2"], "v": ["x3"]})
    error = refused(config, histories=other)
    assert isinstance(error, DataError) and "none of the 3 interactions" in str(error)


def test_users_index_and_embeddings_have_to_fit_each_other(config: RecommendConfig, tmp_path: Path) -> None:
    assert config.histories is not None and config.embeddings is not None
    users = ExportUsersConfig(histories=config.histories, embeddings=config.embeddings, out=tmp_path / "users")
    export_users.run(users)
    write_items(tmp_path / "others", seed=9)
    build_index(config.embeddings, tmp_path / "index")
    build_index(config.embeddings, tmp_path / "texts", column="text")
    build_index(tmp_path / "others", tmp_path / "others-index")
    by_users = replace(config, users=tmp_path / "users", max_history=None)

    error = refused(by_users, embeddings=tmp_path / "others")
    assert isinstance(error, ArtifactError) and "cannot be compared" in str(error)
    error = refused(by_users, embeddings=None, index=tmp_path / "others-index")
    assert isinstance(error, ArtifactError) and "cannot be compared" in str(error)
    error = refused(config, index=tmp_path / "others-index")
    assert isinstance(error, ArtifactError) and "is stale" in str(error)
    error = refused(config, index=tmp_path / "texts")
    assert isinstance(error, ArtifactError) and "index of text vectors" in str(error)
    error = refused(by_users, histories=None)
    assert isinstance(error, ConfigError) and "--keep-seen" in str(error)
    error = refused(replace(by_users, max_history=3))
    assert isinstance(error, ConfigError) and "--max-history with --users" in str(error)
    few = write_histories(tmp_path / "few.jsonl", dict(list(HISTORIES.items())[:5]))
    error = refused(by_users, histories=few)
    assert isinstance(error, ArtifactError) and "holds 34 users, which are not the 5 of" in str(error)
    error = refused(by_users, users=config.embeddings)
    assert isinstance(error, ArtifactError) and "is a folder of items" in str(error)

    # later histories of the same users are fine: what they have seen since is left out
    later = {user: [*history, "i0"] if user == "user 002" else history for user, history in HISTORIES.items()}
    recommend.run(replace(by_users, histories=write_histories(tmp_path / "later.jsonl", later)))
    assert "i0" not in {item for item, _ in told(config.out)["user 002"]}  # type: ignore[arg-type]


def test_an_index_whose_vectors_are_gone_serves_users_but_no_means(config: RecommendConfig, tmp_path: Path) -> None:
    assert config.histories is not None and config.embeddings is not None
    export_users.run(
        ExportUsersConfig(
            histories=config.histories, embeddings=config.embeddings, out=tmp_path / "users", max_history=5
        )
    )
    build_index(config.embeddings, tmp_path / "index", kind="flat")
    wanted = brute_force(config.embeddings, "fused", 4, means(config.embeddings, "fused", 5))  # type: ignore[arg-type]
    config.embeddings.rename(tmp_path / "away")  # type: ignore[union-attr]
    alone = replace(config, embeddings=None, index=tmp_path / "index")
    error = refused(alone)
    assert isinstance(error, ArtifactError) and "--histories needs the vectors" in str(error)
    recommend.run(replace(alone, users=tmp_path / "users", max_history=None))
    assert_same(told(config.out), wanted)  # type: ignore[arg-type]


def test_the_command_line_returns_the_codes(config: RecommendConfig) -> None:
    flags = ["recommend", "--histories", config.histories, "--embeddings", config.embeddings, "--out", config.out]
    ran = CliRunner().invoke(app, [*map(str, flags), "--k", "3"])
    assert ran.exit_code == 0 and ran.stdout == ""
    ran = CliRunner().invoke(app, [*map(str, flags), "--k", "100"])
    assert isinstance(ran.exception, ConfigError) and ran.exception.exit_code == 2


# --- the search alone -----------------------------------------------------------------------------------------------
@given(st.data())
def test_any_histories_get_what_a_sort_gives(data: st.DataObject) -> None:
    items, users = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 6))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    vectors, _ = with_direction(random.integers(-2, 3, (items, 3)).astype(np.float32) + np.float32(0.25))  # with ties
    queries, _ = with_direction(random.integers(-2, 3, (users, 3)).astype(np.float32) + np.float32(0.5))
    histories = [random.integers(0, items, data.draw(st.integers(0, 40))) for _ in range(users)]
    k, keep_seen = data.draw(st.integers(1, items)), data.draw(st.booleans())
    found = top_items(ExactSearch(queries, vectors, np.arange(items)), histories, k, items, keep_seen=keep_seen)
    assert len(found.rows) == len(found.scores) == found.counts.sum()
    ends = np.cumsum(found.counts)
    for user in range(users):
        part = slice(ends[user] - found.counts[user], ends[user])
        scores = queries[user].astype(np.float64) @ vectors.astype(np.float64).T
        free = np.setdiff1d(np.arange(items), [] if keep_seen else histories[user])
        assert set(found.rows[part]) <= set(free) and len(set(found.rows[part])) == min(k, len(free))
        np.testing.assert_allclose(found.scores[part], np.sort(scores[free])[::-1][:k], atol=1e-6)
        np.testing.assert_allclose(scores[found.rows[part]], found.scores[part], atol=1e-6)


def test_vectors_without_a_direction_are_told_apart() -> None:
    unit, good = with_direction(np.array([[3, 4], [0, 0], [np.nan, 1], [np.inf, 1]], np.float32))
    assert good.tolist() == [True, False, False, False]
    np.testing.assert_allclose(unit, [[0.6, 0.8], [0, 0], [0, 0], [0, 0]])
