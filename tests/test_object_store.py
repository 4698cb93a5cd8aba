"""Embeddings and datasets in an object store, against a real S3 server: the promise is that of a disk.

Killed anywhere, the same command finishes; one writer at a time; what is damaged is named and made anew.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow.parquet as pq
import pytest
from chairs import ITEMS, ShadeEncoder, parts, retitle, rows_of, write_dataset
from children import CHILDREN, COMMAND, Forked, command, forked
from embedding_folder import write_embeddings
from object_store import BUCKET, content, download, names, s3_server, upload

from vlm2rec.downstream.table import EmbeddingTable, read_batches, read_in_order
from vlm2rec.embedder.backbones.images import FORMATS
from vlm2rec.embedder.contract import publish, schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError
from vlm2rec.embedder.contract.process import this_process
from vlm2rec.embedder.contract.storage import StorePath, location
from vlm2rec.embedder.export import lock, shards
from vlm2rec.embedder.export.distribute import Distribution
from vlm2rec.embedder.export.export import export
from vlm2rec.embedder.export.lock import LOCK_FILE, writing
from vlm2rec.embedder.export.reuse import Reuse
from vlm2rec.embedder.export.verify import verify
from vlm2rec.pipelines import build_index, evaluate, export_items, train_recommender
from vlm2rec.pipelines import verify as verify_command
from vlm2rec.pipelines.config import (
    BuildIndexConfig,
    EvaluateConfig,
    ExportConfig,
    FailuresConfig,
    FinetuneConfig,
    TrainRecommenderConfig,
)
from vlm2rec.pipelines.read_config import read_config

SETTINGS = ShadeEncoder().fingerprint
SHARDS = ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
Tiny = Callable[[str], Path]


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with s3_server():
        yield


@pytest.fixture
def store(request: pytest.FixtureRequest) -> StorePath:
    return StorePath(f"s3://{BUCKET}/{request.node.name}")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset(write_dataset(tmp_path_factory.mktemp("chairs") / "data", broken=[5]))


@pytest.fixture(scope="module")
def whole(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("local") / "whole"
    make(data, out)
    return out


def make(data: Dataset, out: Path | StorePath, load: Callable[[], Any] = ShadeEncoder, **choices: Any) -> Any:
    return export(data, out, SETTINGS, load, shard_size=8, **choices)


def never() -> NoReturn:
    raise AssertionError("nothing is left to encode")


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


# --- writing ------------------------------------------------------------------------------------------------
def test_an_export_into_a_store_is_that_of_a_disk_byte_for_byte(data: Dataset, whole: Path, store: StorePath) -> None:
    manifest = make(data, store)
    assert content(store) == parts(whole) and list(content(store)) == SHARDS
    assert names(store) == [schema.MANIFEST_FILE, *SHARDS]
    local = schema.read_manifest(whole)
    assert {key: manifest[key] for key in ("fingerprint", "counts", "num_items", "views")} == {
        key: local[key] for key in ("fingerprint", "counts", "num_items", "views")
    }
    assert [shard["sha256"] for shard in manifest["shards"]] == [shard["sha256"] for shard in local["shards"]]
    assert verify(store) == []


def test_a_finished_folder_is_left_as_it_is(data: Dataset, store: StorePath) -> None:
    make(data, store)
    before = store.tree()
    make(data, store, never)
    assert store.tree() == before


def _export_and_die(folder: Path, out: str, moment: int) -> None:
    """Export, and die before the given one of the store's changes; end with exit code 0 if there are fewer."""
    left = iter(range(moment))

    def dying(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            return method(*given, **named) if next(left, None) is not None else die()

        return functools.wraps(method)(call)

    for name in ("write_bytes", "upload", "unlink", "create"):
        setattr(StorePath, name, dying(getattr(StorePath, name)))
    make(Dataset(folder), location(out))


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_killed_before_any_of_its_changes_the_same_command_finishes_it(
    data: Dataset, whole: Path, store: StorePath, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    monkeypatch.setattr(lock, "SETTLE", 0.01)
    left_behind = []
    for moment in range(0, 100, every):
        out = store / str(moment)
        killed = forked(_export_and_die, data.path, str(out), moment)
        killed.start()
        killed.join()
        if killed.exitcode == 0:
            break
        assert killed.exitcode == -signal.SIGKILL
        left_behind.append(names(out))
        recorded = sum(name.startswith("_part-") for name in left_behind[-1])
        calls: list[ShadeEncoder] = []
        if schema.MANIFEST_FILE not in left_behind[-1]:
            with pytest.raises(ArtifactError, match=r"does not exist.*written last"):
                EmbeddingTable.open(str(out))
        make(data, out, lambda calls=calls: calls.append(ShadeEncoder()) or calls[0])  # type: ignore[misc]
        encoded = sum(len(titles) for encoder in calls for titles in encoder.calls)
        assert encoded <= max(0, ITEMS - 8 * recorded)  # what is recorded is not made again
        assert content(out) == parts(whole) and names(out) == [schema.MANIFEST_FILE, *SHARDS]
    if every > 1:
        return
    assert [schema.STATE_FILE, LOCK_FILE, "_part-00000.json", *SHARDS[:2]] in left_behind  # shard, no record
    everything = [*map(shards.record_name, range(3)), *SHARDS]
    assert [schema.STATE_FILE, LOCK_FILE, *everything] in left_behind  # all recorded, no manifest
    assert [schema.STATE_FILE, LOCK_FILE, schema.MANIFEST_FILE, *everything] in left_behind


def _former(folder: StorePath) -> None:
    """Give the files of a folder the names that an earlier version gave them."""
    for name in names(folder):
        if name.startswith("_"):
            publish.rename(folder, name, name.removeprefix("_"))


@pytest.mark.slow
@pytest.mark.parametrize("finished", [False, True])
def test_killed_while_it_gives_today_s_names_the_same_command_goes_on(
    data: Dataset, whole: Path, store: StorePath, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, finished: bool
) -> None:
    monkeypatch.setattr(lock, "SETTLE", 0.01)
    start, both = store / "start", 0
    for worker in range(2 if finished else 1):
        make(data, start, distribution=Distribution(num_workers=2, worker=worker))
    _former(start)
    files = download(start, tmp_path / "start")
    assert not any(path.name.startswith("_") for path in files.iterdir())
    for moment in range(100):
        out = upload(files, store / str(moment))
        killed = forked(_export_and_die, data.path, str(out), moment)
        killed.start()
        killed.join()
        left = names(out)
        documents = [name for name in left if name in (schema.MANIFEST_FILE, "manifest.json")]
        if finished:
            assert documents and len(EmbeddingTable.open(str(out)).item_ids) == ITEMS
        else:
            with pytest.raises(ArtifactError, match=r"does not exist.*written last"):
                EmbeddingTable.open(str(out))
        assert shards.rows_of_shards(out) == [8, 8, 4]
        both += {"export.json", schema.STATE_FILE} <= {*left} or len(documents) == 2
        make(data, out, never if finished else ShadeEncoder)
        assert content(out) == parts(whole) and names(out) == [schema.MANIFEST_FILE, *SHARDS] and verify(out) == []
        if killed.exitcode == 0 or ({"part-00001.parquet"} < {*left} and not finished):
            break
        assert killed.exitcode == -signal.SIGKILL
    assert both == 1  # a store cannot rename: for a moment, the copy is there as well


def test_a_shard_without_a_record_is_adopted_and_not_made_again(data: Dataset, whole: Path, store: StorePath) -> None:
    make(data, store)
    manifest = json.loads((store / schema.MANIFEST_FILE).read_text())
    state = {"schema_version": 1, "shard_size": 8, "settings": manifest["settings"], "rows": [8, 8, 4]}
    (store / schema.MANIFEST_FILE).unlink()
    (store / schema.STATE_FILE).write_bytes(json.dumps(state).encode())
    make(data, store, never)
    assert content(store) == parts(whole) and verify(store) == []


def test_what_the_store_does_not_give_back_as_it_was_is_put_again(
    data: Dataset, whole: Path, store: StorePath, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole_upload, broken = StorePath.upload, iter([True])

    def upload_once_half(self: StorePath, file: Path) -> None:
        if next(broken, False):
            self.write_bytes(file.read_bytes()[:100])
        else:
            whole_upload(self, file)

    monkeypatch.setattr(StorePath, "upload", upload_once_half)
    make(data, store)
    assert "does not read back as it was written; trying again" in caplog.text
    assert content(store) == parts(whole)


def test_what_has_changed_is_refused_and_what_failed_is_made_again(tmp_path: Path, store: StorePath) -> None:
    data = Dataset(write_dataset(tmp_path / "data", broken=[5]))
    make(data, store)
    with pytest.raises(ArtifactError, match="was begun with other settings: storage was 'float32', now 'float16'"):
        make(data, store, storage="float16")
    (data.image_root / "5.png").write_bytes((data.image_root / "6.png").read_bytes())
    encoder = ShadeEncoder()
    make(data, store, lambda: encoder, reuse=Reuse(retry_failed=True))
    assert encoder.calls == [["wooden chair 5"]]
    assert verify(store) == [] and schema.read_manifest(store)["counts"]["failed"] == 0
    make(data, store / "new", never, reuse=Reuse(changed_since=store))
    assert content(store / "new") == content(store)


def test_any_number_of_workers_makes_the_same_folder(data: Dataset, whole: Path, store: StorePath) -> None:
    assert make(data, store, distribution=Distribution(num_workers=2, worker=1)) is None
    assert "_part-00001.json" in names(store) and "_part-00000.json" not in names(store)
    make(data, store, distribution=Distribution(num_workers=2, worker=0))
    assert content(store) == parts(whole) and names(store) == [schema.MANIFEST_FILE, *SHARDS]
    make(data, store / "processes", distribution=Distribution(num_workers=2))
    assert content(store / "processes") == parts(whole)


def test_retry_failed_writes_no_manifest_before_every_worker_has_made_its_share(
    tmp_path: Path, store: StorePath
) -> None:
    folder = write_dataset(tmp_path / "data")
    make(Dataset(folder), store)
    changed = retitle(folder, 2, 10, 17)
    for number in range(3):
        distribution = Distribution(num_workers=3, worker=number)
        made = make(changed, store, reuse=Reuse(retry_failed=True), distribution=distribution)
        assert (made is not None) == (schema.MANIFEST_FILE in names(store)) == (number == 2)
    make(changed, tmp_path / "fresh")
    assert content(store) == parts(tmp_path / "fresh") and names(store) == [schema.MANIFEST_FILE, *SHARDS]
    make(changed, store, never, reuse=Reuse(retry_failed=True), distribution=Distribution(num_workers=3, worker=0))
    assert names(store) == [schema.MANIFEST_FILE, *SHARDS]


# --- one writer ---------------------------------------------------------------------------------------------
def _hold(out: str, pipe: Connection) -> None:
    with writing(location(out)):
        pipe.send("held")
        pipe.recv()


@pytest.fixture
def holder(store: StorePath) -> Iterator[Any]:
    """Another process that holds the folder."""
    mine, its = CHILDREN.Pipe()
    process = forked(_hold, str(store), its)
    process.start()
    assert mine.recv() == "held"
    yield process
    process.kill()
    process.join()


def test_a_second_writer_is_refused_and_a_dead_one_is_followed_at_once(
    data: Dataset, whole: Path, store: StorePath, holder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ArtifactError, match=f"is being written by process {holder.pid} on host .*; it is at work"):
        make(data, store)
    with pytest.raises(ArtifactError, match=f"is being written by process {holder.pid} "):
        make(data, store, distribution=Distribution(num_workers=2, worker=0))  # its shards are the other's too
    assert names(store) == [LOCK_FILE]
    holder.kill()
    holder.join()
    make(data, store)
    assert f"taking over from process {holder.pid} on host" in caplog.text
    assert content(store) == parts(whole)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life every tenth of a second; two seconds without any mean death."""
    for name, seconds in (("BEAT", 0.1), ("SILENCE", 2.0), ("SETTLE", 0.01)):
        monkeypatch.setattr(lock, name, seconds)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("change", [{"boot": "b00"}, {"pids": "1"}], ids=["machine", "container"])
def test_a_writer_that_cannot_be_seen_is_dead_when_its_lock_was_watched_in_vain(
    store: StorePath, change: dict[str, str]
) -> None:
    unseen = this_process()._replace(pid=1, **change)
    (store / LOCK_FILE).write_bytes(json.dumps(unseen._asdict() | {"writer": "w", "beat": 7}).encode())
    with writing(store) as hold:
        hold.require()
    assert names(store) == []


@pytest.mark.usefixtures("quick")
def test_a_writer_that_cannot_be_seen_is_respected_while_it_gives_signs_of_life(store: StorePath) -> None:
    unseen = this_process()._replace(pids="1", pid=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock, "this_process", lambda: unseen)
        with (
            writing(store),
            pytest.raises(ArtifactError, match=r"by process 1 on host .*; it has just given a sign of life"),
            writing(store),
        ):
            pass
    assert names(store) == []


def come_at_once(store: StorePath, count: int) -> list[str]:
    """Let so many writers come at the same moment; return what each was told, "in" or a refusal."""
    together, leave, got = threading.Barrier(count), threading.Event(), list[str]()

    def come() -> None:
        together.wait()
        try:
            with writing(store):
                got.append("in")
                leave.wait()
        except ArtifactError as error:
            got.append(str(error))
        if len(got) == count:
            leave.set()

    threads = [threading.Thread(target=come) for _ in range(count)]
    for thread in threads:
        thread.start()
    while len(got) < count and any(thread.is_alive() for thread in threads):
        leave.wait(0.05)
    leave.set()
    for thread in threads:
        thread.join()
    return got


def test_of_many_that_find_a_dead_lock_one_takes_it(store: StorePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SETTLE", 0.1)
    dead = this_process()._replace(pid=99999999)
    (store / LOCK_FILE).write_bytes(json.dumps(dead._asdict() | {"writer": "w"}).encode())
    got = ["in" if said == "in" else "out" for said in come_at_once(store, 4)]
    assert sorted(got) == ["in", "out", "out", "out"] and names(store) == []


def test_an_object_is_replaced_only_while_it_is_what_was_seen(
    store: StorePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store / "lock"
    assert not path.replace(b"", b"new")
    path.write_bytes(b"old")
    assert not path.replace(b"other", b"new") and path.replace(b"old", b"new") and path.read_bytes() == b"new"
    read = StorePath.read_bytes

    def read_and_lose(self: StorePath, most: int | None = None) -> bytes:
        found = read(self, most)
        if found == b"new":
            self.write_bytes(b"another's")  # between the look and the write
        return found

    monkeypatch.setattr(StorePath, "read_bytes", read_and_lose)
    assert not path.replace(b"new", b"mine") and path.read_bytes() == b"another's"


def test_of_many_that_come_at_the_same_moment_one_writes(store: StorePath) -> None:
    got = come_at_once(store, 6)
    assert got.count("in") == 1 and sum("is being written by process" in text for text in got) == 5
    assert names(store) == []


def test_a_writer_whose_folder_was_taken_over_writes_no_manifest(data: Dataset, store: StorePath) -> None:
    def load() -> ShadeEncoder:
        (store / LOCK_FILE).write_bytes(b'{"host": "another", "pid": 1, "writer": "x"}')
        return ShadeEncoder()

    with pytest.raises(ArtifactError, match=r"another writer has taken .* over"):
        make(data, store, load)
    assert schema.MANIFEST_FILE not in names(store) and LOCK_FILE in names(store)


def test_signs_of_life_come_and_end(store: StorePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.05)
    beats, replace = [], StorePath.replace

    def counted(self: StorePath, old: bytes, new: bytes) -> bool:
        beats.append(self.name)
        done = replace(self, old, new)
        seen.set()
        return done

    seen = threading.Event()
    monkeypatch.setattr(StorePath, "replace", counted)
    with writing(store) as hold:
        assert seen.wait(30)
        hold.require()
    assert set(beats) == {LOCK_FILE} and names(store) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "lock"]


def test_a_store_that_knows_no_conditions_still_has_one_writer(
    store: StorePath, holder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = type(store._store).pipe_file

    def unconditional(self: Any, path: str, value: bytes, mode: str = "overwrite") -> None:
        if mode == "create":
            raise OSError(38, "A header you provided implies functionality that is not implemented")
        put(self, path, value)

    monkeypatch.setattr(type(store._store), "pipe_file", unconditional)
    with pytest.raises(ArtifactError, match="is being written by process"), writing(store):
        pass
    with writing(store / "new"):
        assert names(store / "new") == [LOCK_FILE]


# --- checking and reading -----------------------------------------------------------------------------------
def test_verify_names_a_damaged_a_missing_and_a_foreign_object_and_a_rerun_mends(
    data: Dataset, whole: Path, store: StorePath
) -> None:
    make(data, store)
    flipped = bytearray((store / SHARDS[0]).read_bytes())
    flipped[200] ^= 1
    (store / SHARDS[0]).write_bytes(bytes(flipped))
    (store / SHARDS[1]).unlink()
    (store / "notes.txt").write_bytes(b"mine")
    assert [str(problem) for problem in verify(store)] == [
        "part-00000.parquet: its bytes have changed since it was written (SHA-256 differs)",
        "part-00001.parquet: is missing",
        "notes.txt: is not part of this export",
    ]
    make(data, store)
    assert content(store) == parts(whole)
    assert [problem.file for problem in verify(store)] == ["notes.txt"]


def test_readers_see_what_they_see_on_a_disk(tmp_path: Path, store: StorePath) -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(50, 6)).astype(np.float32)
    vectors[7] = np.nan
    ids = [f"item-{row}" for row in range(50)]
    write_embeddings(tmp_path / "emb", ids, vectors, text=vectors + 1, shard_size=20, row_group_size=7)
    upload(tmp_path / "emb", store)
    table, local = EmbeddingTable.open(str(store), "text"), EmbeddingTable.open(tmp_path / "emb", "text")
    assert table.item_ids == local.item_ids
    np.testing.assert_array_equal(table.vectors, local.vectors)
    found = np.zeros((3, 6), np.float32)
    assert read_in_order(store, "fused", ["item-9", "item-7", "item-49"], found).tolist() == [True, False, True]
    np.testing.assert_array_equal(found, [vectors[9], np.zeros(6), vectors[49]])
    assert [len(batch[0]) for batch in read_batches(store, "fused", 16)] == [16, 4, 16, 4, 10]
    (store / "part-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(ArtifactError, match=r"s3://shop/.*part-00001.parquet is missing or has another size"):
        EmbeddingTable.open(store)


def test_an_index_is_built_from_a_store_and_finds_titles_there(data: Dataset, store: StorePath, tmp_path: Path) -> None:
    upload(Path(str(data.path)), store / "data")
    make(Dataset(store / "data"), store / "emb")
    flags = {"embeddings": str(store / "emb"), "out": tmp_path / "index", "column": "text"}
    meta = build_index.run(read_config(BuildIndexConfig, flags=flags))
    assert meta["embeddings"] == str(store / "emb") and meta["titles_from"] == str(store / "data")
    titles = pq.read_table(tmp_path / "index" / "ids.parquet")
    assert "red chair 0" in titles["title"].to_pylist()


def test_both_tasks_start_from_a_store_as_from_a_disk(drawn_dataset: Path, tmp_path: Path, store: StorePath) -> None:
    ids = Dataset(drawn_dataset).item_ids
    write_embeddings(tmp_path / "emb", ids, np.random.default_rng(0).normal(size=(len(ids), 8)).astype(np.float32))
    upload(tmp_path / "emb", store / "emb")
    upload(drawn_dataset, store / "data")

    def both(data: Path | StorePath, embeddings: Path | StorePath, name: str) -> list[Any]:
        given = {"data": str(data), "embeddings": str(embeddings), "device": "cpu"}
        short = {"model": "SASRec", "max_epochs": 1, "eval_step": 1}
        task1 = evaluate.run(read_config(EvaluateConfig, flags={**given, "out": tmp_path / f"{name}1"}))
        task2 = train_recommender.run(
            read_config(TrainRecommenderConfig, flags={**given, **short, "out": tmp_path / f"{name}2"})
        )
        return [found[protocol] for found in (task1, task2) for protocol in ("candidates", "full")]

    assert both(store / "data", store / "emb", "there") == both(drawn_dataset, tmp_path / "emb", "here")


def test_failures_lists_what_failed_with_its_place_in_the_store(
    data: Dataset, store: StorePath, capsys: pytest.CaptureFixture[str]
) -> None:
    upload(Path(str(data.path)), store / "data")
    make(Dataset(store / "data"), store / "emb")
    verify_command.failures(FailuresConfig(embeddings=store / "emb"))
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"005,failed,\"the image is not a {', '.join(FORMATS)} (it starts with b'<html>404</h')\","
        f"wooden chair 5,{store}/data/images/5.png"
    ]


# --- a dataset in a store -----------------------------------------------------------------------------------
def test_a_dataset_in_a_store_gives_the_same_rows(data: Dataset, store: StorePath) -> None:
    there = Dataset(str(upload(Path(str(data.path)), store / "data")))
    make(data, store / "local", images_by="bytes")
    make(there, store / "emb", images_by="bytes")
    assert content(store / "emb") == content(store / "local")
    by_time = make(there, store / "by-time")
    changed = store / "data" / "images" / "3.png"
    changed.write_bytes((store / "data" / "images" / "4.png").read_bytes() + b" ")
    assert make(there, store / "later")["settings"]["images"] != by_time["settings"]["images"]


def test_nothing_outside_the_image_root_is_read(tmp_path: Path, store: StorePath) -> None:
    picture = (write_dataset(tmp_path / "pictures", items=1) / "images" / "0.png").read_bytes()
    wild = ["../secret.png", f"s3://{BUCKET}/x.png", "/etc/passwd", "a/../../secret.png", "gone.png", "empty.png", " "]
    local = write_dataset(tmp_path / "data", items=8, image_path=["0.png", *wild])
    (local / "secret.png").write_bytes(picture)
    (local / "images" / "empty.png").write_bytes(b"")
    there = Dataset(upload(local, store / "data"))
    for name in ("x.png", "etc/passwd"):
        StorePath(f"s3://{BUCKET}/{name}").write_bytes(picture)
    make(there, store / "emb")
    make(Dataset(local), tmp_path / "emb")
    found = [(row["status"], row["error"]) for row in rows_of(download(store / "emb", tmp_path / "there"))]
    assert found == [(row["status"], row["error"]) for row in rows_of(tmp_path / "emb")]
    assert [status for status, _ in found] == ["ok", *["failed"] * 7]
    assert {error for _, error in found[1:]} == {
        "the image path leads out of the image root",
        "the image path is a URL; only local files are read",
        "the image file does not exist",
        "the image file is empty",
        "the item has no image path",
    }


def test_the_command_with_a_real_model_goes_from_store_to_store(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, store: StorePath, capfd: pytest.CaptureFixture[str]
) -> None:
    upload(drawn_dataset, store / "data")
    root = Dataset(drawn_dataset).image_root  # `prepare` names it from the root of the disk
    upload(root, store / "images")
    meta = json.loads((store / "data" / "dataset.json").read_text()) | {"image_root": "../images"}
    (store / "data" / "dataset.json").write_bytes(json.dumps(meta).encode())
    given = {"backbone": str(tiny("qwen2_5_vl")), "dtype": "float32", "device": "cpu", "images_by": "bytes"}
    export_items.run(ExportConfig(data=drawn_dataset, out=tmp_path / "emb", vision_cache="off", **given))
    flags = {"data": str(store / "data"), "out": str(store / "emb"), "shard_size": 16}
    export_items.run(read_config(ExportConfig, flags={**given, **flags}))
    assert "vision cache: off" in capfd.readouterr().err
    here, there = EmbeddingTable.open(tmp_path / "emb"), EmbeddingTable.open(str(store / "emb"))
    assert here.item_ids == there.item_ids
    np.testing.assert_array_equal(here.vectors, there.vectors)
    dry = export_items.run(read_config(ExportConfig, flags={**given, **flags, "dry_run": True}))
    assert dry is not None and dry["items_left"] == 0 and dry["bytes_free"] is None


# --- addresses and stores that do not answer ----------------------------------------------------------------
def test_an_address_is_read_as_one_and_never_leaves_its_bucket() -> None:
    assert str(location("s3://b/x/")) == "s3://b/x" and str(location("s3://b")) == "s3://b"
    assert str(location("s3://b/data") / "../images") == "s3://b/images"
    assert str(location("s3://b/data") / "../../../other/x") == "s3://b/other/x"
    assert location("some/folder") == Path("some/folder")
    place = StorePath("s3://b/emb/part-00000.parquet")
    assert (place.name, str(place.parent)) == ("part-00000.parquet", "s3://b/emb")
    assert pickle.loads(pickle.dumps(place)) == place


@pytest.mark.parametrize("address", ["http://example.org/emb", "s3:///emb", "s3://"])
def test_an_address_that_is_none_is_a_setting_to_correct(address: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a supported store|names no bucket"):
        location(address)


def test_where_a_folder_of_this_machine_is_needed_an_address_is_refused() -> None:
    flags = {"data": "s3://b/data", "backbone": "b", "out": "s3://b/adapter"}
    with pytest.raises(ConfigError, match="--out s3://b/adapter is an address"):
        read_config(FinetuneConfig, flags=flags)


def test_without_s3fs_the_command_says_what_to_install(store: StorePath) -> None:
    ran = Forked(f"import sys; sys.modules['s3fs'] = None\n{COMMAND}", "verify", store)
    said = ran.communicate()[1]
    assert ran.returncode == 7 and "pip install 'vlm2rec[store]'" in said


def test_a_store_that_does_not_answer_is_no_empty_folder(store: StorePath) -> None:
    ran = command("verify", str(store), AWS_ENDPOINT_URL="http://127.0.0.1:9", AWS_MAX_ATTEMPTS="1")
    assert ran.returncode == 5 and "cannot be read (EndpointConnectionError" in ran.stderr


def test_an_export_into_a_store_that_does_not_answer_ends_before_anything_is_encoded(
    data: Dataset, store: StorePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(self: StorePath) -> NoReturn:
        raise OSError(5, "EndpointConnectionError")

    monkeypatch.setattr(StorePath, "_info", unreachable)
    with pytest.raises(ArtifactError, match=r"cannot be written \(EndpointConnectionError\)"):
        make(data, store, never)


def test_a_bucket_that_is_not_there_is_not_made(data: Dataset) -> None:
    with pytest.raises(ArtifactError, match=r"s3://nowhere/emb cannot be written .*bucket does not exist"):
        make(data, location("s3://nowhere/emb"), never)
    assert not location("s3://nowhere").exists()


def test_verify_and_its_exit_codes_on_the_command_line(data: Dataset, store: StorePath) -> None:
    make(data, store)
    ran = command("verify", str(store))
    assert ran.returncode == 0 and "no problem" in ran.stderr
    (store / SHARDS[2]).unlink()
    ran = command("verify", str(store))
    assert ran.returncode == 5 and "part-00002.parquet: is missing" in ran.stderr
