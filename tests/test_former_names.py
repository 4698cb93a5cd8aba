"""An embeddings folder opens as one Parquet table; folders of an earlier version, which did not, go on being used.

That version wrote the same files, but manifest, state file, records and locks had names without an underscore.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from chairs import ITEMS, ShadeEncoder, parts, retitle, write_dataset
from children import Forked
from test_revise_export import append_items

from vlm2rec.downstream.table import EmbeddingTable
from vlm2rec.embedder.contract import publish, schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError
from vlm2rec.embedder.export import lock, shards
from vlm2rec.embedder.export.distribute import Distribution
from vlm2rec.embedder.export.export import export
from vlm2rec.embedder.export.reuse import REUSE_NOTHING, Reuse
from vlm2rec.embedder.export.verify import verify
from vlm2rec.pipelines import build_index, convert
from vlm2rec.pipelines import verify as verify_command
from vlm2rec.pipelines.config import BuildIndexConfig, ConvertConfig, FailuresConfig, SearchConfig, VerifyConfig
from vlm2rec.pipelines.experiments import ledger
from vlm2rec.pipelines.experiments.methods import Method, Run, Step
from vlm2rec.pipelines.experiments.results import FinishedStep

FORKED = multiprocessing.get_context("fork")
FORMER = {"_manifest.json": "manifest.json", "_export.json": "export.json", "_export.lock": "export.lock"}
SHARDS = [schema.shard_name(number) for number in range(3)]
OLD, OLD_STATE = "manifest.json", "export.json"


def make(data: Dataset, out: Path, load: Callable[[], Any] = ShadeEncoder, **choices: Any) -> Any:
    return export(data, out, ShadeEncoder().fingerprint, load, shard_size=8, **choices)


def never() -> Any:
    raise AssertionError("nothing is left to encode")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def renamed(folder: Path) -> Path:
    """Give the files of a folder the names that the earlier version gave them; their content was the same."""
    for path in list(folder.glob("_*")):
        path.rename(folder / path.name.removeprefix("_"))
    return folder


def begun(data: Dataset, out: Path) -> Path:
    """Make the first two of three shards, as a killed process leaves them."""
    plan_and_stop = iter(range(2))

    class Stopped(ShadeEncoder):
        def encode_items(self, titles: Any, images: Any) -> Any:
            if next(plan_and_stop, None) is None:
                raise KeyboardInterrupt
            return super().encode_items(titles, images)

    with pytest.raises(KeyboardInterrupt):
        make(data, out, Stopped)
    assert names(out) == ["_export.json", "_part-00000.json", "_part-00001.json", *SHARDS[:2]]
    return out


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return Dataset(write_dataset(tmp_path / "data", broken=[5]))


@pytest.fixture
def whole(data: Dataset, tmp_path: Path) -> Path:
    make(data, tmp_path / "whole")
    return tmp_path / "whole"


# --- opened as one table --------------------------------------------------------------------------------------
OPENED: dict[str, Callable[[str], int]] = {
    "pandas": lambda folder: len(pd.read_parquet(folder)),
    "pandas, with a slash": lambda folder: len(pd.read_parquet(f"{folder}/")),
    "pyarrow.parquet": lambda folder: len(pq.read_table(folder)),
    "pyarrow.parquet, with a slash": lambda folder: len(pq.read_table(f"{folder}/")),
    "pyarrow.dataset": lambda folder: pyarrow.dataset.dataset(folder).count_rows(),
    "polars, glob": lambda folder: len(pl.read_parquet(f"{folder}/*.parquet")),
    "polars, lazy": lambda folder: len(pl.scan_parquet(f"{folder}/*.parquet").collect()),
    "duckdb": lambda folder: len(duckdb.sql(f"select * from '{folder}/*.parquet'")),
}


@pytest.mark.parametrize("program", OPENED)
def test_a_folder_opens_as_one_table_whatever_a_killed_process_left_beside_it(
    whole: Path, data: Dataset, program: str
) -> None:
    assert OPENED[program](str(whole)) == ITEMS
    for name in ("_export.json", "_export.lock", "_export.turn.lock", lock.Share(1, 2).lock_file, "_part-00000.json"):
        (whole / name).write_text("{}")
    (whole / publish.temporary_name("_manifest.json")).write_text("{")
    (whole / publish.temporary_name("part-00001.parquet")).write_text("PAR1")
    assert OPENED[program](str(whole)) == ITEMS
    EmbeddingTable.open(str(whole))


def test_everything_that_is_no_shard_is_skipped_at_every_moment(data: Dataset, tmp_path: Path) -> None:
    out, seen = tmp_path / "out", set[str]()
    look = ShadeEncoder.encode_items

    class Looking(ShadeEncoder):
        def encode_items(self, titles: Any, images: Any) -> Any:
            seen.update(names(out))
            return look(self, titles, images)

    make(data, out, Looking, distribution=Distribution(num_workers=2, worker=1))
    make(data, out, Looking, distribution=Distribution(num_workers=2, worker=0))
    append_items(data.path, 30)
    make(Dataset(data.path), out, Looking, reuse=Reuse(extend=True))
    assert {"_export.json", "_export.lock", "_part-00001.json", "_export.worker-0-of-2.lock"} <= seen
    assert [name for name in seen if not name.startswith(("_", ".")) and not name.endswith(".parquet")] == []


# --- folders of the earlier version ---------------------------------------------------------------------------
def test_a_folder_with_the_former_names_is_read_as_before(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = parts(renamed(whole))
    assert names(whole) == [OLD, *SHARDS]
    assert verify(whole) == [] and len(EmbeddingTable.open(str(whole)).item_ids) == ITEMS
    verify_command.run(VerifyConfig(embeddings=whole))
    verify_command.failures(FailuresConfig(embeddings=whole))
    assert "005,failed" in capsys.readouterr().out
    build_index.run(BuildIndexConfig(embeddings=whole, out=tmp_path / "index"))
    build_index.search(SearchConfig(index=tmp_path / "index", item="003", k=2))
    convert.run(ConvertConfig(embeddings=whole, to="npy", out=tmp_path / "npy"))
    assert names(whole) == [OLD, *SHARDS] and parts(whole) == before  # no reader renames anything


def test_damage_is_told_of_the_manifest_by_the_name_that_it_has(whole: Path) -> None:
    file = renamed(whole) / OLD
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps({**manifest, "counts": {**manifest["counts"], "ok": 1}}))
    assert {problem.file for problem in verify(whole)} == {OLD}
    file.write_text(json.dumps({**manifest, "dim": "three"}))
    with pytest.raises(ArtifactError, match=r"whole/manifest\.json is damaged"):
        schema.read_manifest(whole)
    file.unlink()
    with pytest.raises(ArtifactError, match=r"_manifest\.json does not exist"):
        schema.read_manifest(whole)


def test_the_same_command_renames_a_complete_folder_and_encodes_nothing(whole: Path, data: Dataset) -> None:
    before, manifest = parts(whole), (renamed(whole) / OLD).read_bytes()
    (whole / OLD_STATE).write_text("{}")  # of a process that died before it tidied up
    (whole / "part-00002.json").write_text("{}")
    make(data, whole, never)
    assert names(whole) == ["_manifest.json", *SHARDS] and parts(whole) == before
    assert (whole / "_manifest.json").read_bytes() == manifest and verify(whole) == []


@pytest.mark.parametrize("workers", [None, 2])
def test_an_unfinished_export_goes_on(data: Dataset, whole: Path, tmp_path: Path, workers: int | None) -> None:
    out = renamed(begun(data, tmp_path / "out"))
    found = shards.known_settings(out)
    assert found is not None and shards.rows_of_shards(out) == [8, 8, 4]
    encoder = ShadeEncoder()
    for number in range(workers or 1):
        division = Distribution(num_workers=workers, worker=number) if workers else Distribution()
        make(data, out, lambda: encoder, distribution=division)
    assert [len(titles) for titles in encoder.calls] == [4]  # what was recorded is not made again
    assert names(out) == ["_manifest.json", *SHARDS] and parts(out) == parts(whole)


@pytest.mark.parametrize("complete", [True, False])
def test_items_are_appended_and_failed_ones_made_again(
    data: Dataset, whole: Path, tmp_path: Path, complete: bool
) -> None:
    out = renamed(whole if complete else begun(data, tmp_path / "out"))
    append_items(data.path, 30)
    shutil.copy(data.image_root / "6.png", data.image_root / "5.png")
    now = retitle(data.path, 2)
    encoder = ShadeEncoder()
    make(now, out, lambda: encoder, reuse=Reuse(extend=True, retry_failed=True))
    encoded = [title for titles in encoder.calls for title in titles]
    assert {"another title of 2", "wooden chair 5", "new chair 29"} <= {*encoded}
    assert len(encoded) == (12 if complete else 16)  # of 30: nothing else is made again
    make(now, tmp_path / "fresh")
    assert [name for name in names(out) if not name.startswith("part-")] == ["_manifest.json"]
    assert pq.read_table(out).equals(pq.read_table(tmp_path / "fresh")) and verify(out) == []


def test_changed_since_a_folder_with_the_former_names(data: Dataset, whole: Path, tmp_path: Path) -> None:
    now = retitle(data.path, 2)
    encoder = ShadeEncoder()
    make(now, tmp_path / "new", lambda: encoder, reuse=Reuse(changed_since=renamed(whole)))
    encoded = [title for titles in encoder.calls for title in titles]
    assert encoded == ["another title of 2"] and names(whole) == [OLD, *SHARDS]


def test_a_refused_command_renames_nothing(data: Dataset, whole: Path, tmp_path: Path) -> None:
    before = names(renamed(whole))
    with pytest.raises(ArtifactError, match="titles was"):
        make(retitle(data.path, 2), whole)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in (OLD, "part-00000.json", "notes.txt"):
        (foreign / name).write_text('{"name": "a web page", "icons": []}')
    with pytest.raises(ArtifactError, match="schema version None"):
        make(data, foreign)
    assert names(whole) == before and names(foreign) == [OLD, "notes.txt", "part-00000.json"]


def test_a_finished_step_of_an_older_study_is_finished(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.move(renamed(whole), folder / "embeddings")
    config = VerifyConfig(embeddings=folder / "embeddings")
    object.__setattr__(config, "out", folder / "embeddings")
    step = Step("embeddings", "export-items", config, schema.MANIFEST_FILE, ())
    run = Run(Method(name="any", source="backbone"), None, folder, (step,))
    ledger.begin(run, step, {})
    assert not ledger.is_finished(run, step)
    ledger.end(run, step, 1.0)
    assert ledger.is_finished(run, step)
    assert FinishedStep(run, step, "data", (0,)).read(schema.MANIFEST_FILE)["dim"] == 3
    (folder / "embeddings" / OLD).unlink()
    assert not ledger.is_finished(run, step)


# --- both names -----------------------------------------------------------------------------------------------
def test_a_copy_of_the_manifest_under_its_former_name_does_not_count_and_goes(whole: Path, data: Dataset) -> None:
    shutil.copy(whole / "_manifest.json", whole / OLD)  # what a renaming in a store leaves if it is killed
    EmbeddingTable.open(str(whole))
    assert [str(problem) for problem in verify(whole)] == [f"{OLD}: is not part of this export"]
    make(retitle(data.path, 2), whole, reuse=Reuse(retry_failed=True))
    assert names(whole) == ["_manifest.json", *SHARDS] and verify(whole) == []


@pytest.mark.parametrize(
    ("present", "beside"), [("_manifest.json", OLD), ("_export.json", OLD), ("_manifest.json", OLD_STATE)]
)
def test_names_of_both_kinds_that_tell_different_things_are_refused(
    data: Dataset, whole: Path, tmp_path: Path, present: str, beside: str
) -> None:
    other = tmp_path / "other"  # of the same items, with the same shape: only the vectors differ
    make(retitle(write_dataset(tmp_path / "other data"), 2), other)
    out = begun(data, tmp_path / "out") if present == "_export.json" else whole
    shutil.copy(other / "_manifest.json", out / beside)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    told = f"holds {beside}, which an earlier version of vlm2rec wrote, beside {present}"
    for call in (
        lambda: schema.read_manifest(out),
        lambda: verify(out),
        lambda: make(data, out),
        lambda: make(data, out, reuse=Reuse(extend=True)),
        lambda: make(data, tmp_path / "new", reuse=Reuse(changed_since=out)),
    ):
        with pytest.raises(ArtifactError, match=told):
            call()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / beside).unlink()
    make(data, out)
    assert verify(out) == [] and pq.read_table(out).equals(pq.read_table(whole))


# --- writers of the earlier version ---------------------------------------------------------------------------
HOLDING = """
import sys, time
from pathlib import Path
from vlm2rec.embedder.export import lock
with lock.writing(Path(sys.argv[1]), lock_file=sys.argv[2]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("name", ["export.lock", "export.worker-1-of-2.lock"])
@pytest.mark.parametrize("workers", [None, 2])
def test_beside_a_living_writer_of_the_earlier_version_nothing_is_written_and_a_dead_one_does_not_count(
    data: Dataset, whole: Path, tmp_path: Path, name: str, workers: int | None
) -> None:
    out = renamed(begun(data, tmp_path / "out"))
    division = Distribution(num_workers=workers, worker=0) if workers else Distribution()
    other = Forked(HOLDING, out, name)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        before = names(out)
        with pytest.raises(ArtifactError, match=f"is being written by process {other.pid}"):
            make(data, out, distribution=division)
        assert names(out) == before
    finally:
        other.kill()
        other.communicate()
    assert name in names(out)
    make(data, out, distribution=division)
    make(data, out)
    assert names(out) == ["_manifest.json", *SHARDS] and parts(out) == parts(whole)


def test_while_files_are_renamed_the_lock_that_the_earlier_version_looks_for_is_held(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename, held = renamed(begun(data, tmp_path / "out")), publish.rename, []

    def looking(folder: Path, before: str, now: str) -> None:
        owner = json.loads((folder / "export.lock").read_text())
        held.append((owner["pid"], before, now))
        rename(folder, before, now)

    monkeypatch.setattr(publish, "rename", looking)
    make(data, out)
    moved = [
        ("part-00000.json", "_part-00000.json"),
        ("part-00001.json", "_part-00001.json"),
        (OLD_STATE, "_export.json"),
    ]
    assert held == [(os.getpid(), *names) for names in moved]


# --- killed at any step ---------------------------------------------------------------------------------------
def _dying(moment: int, run: Callable[[], Any]) -> None:
    """Run something, and die before the given one of its changes of names; exit code 0 if there are fewer."""
    left = iter(range(moment))

    def dying(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return method(*given, **named)

        return call

    for name in ("replace", "unlink", "touch"):
        setattr(Path, name, dying(getattr(Path, name)))
    run()
    os._exit(0)


@pytest.mark.parametrize(
    "kind",
    ["unfinished", "retry", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("complete", "untidy", "extend"))],
)
def test_killed_at_any_step_the_folder_is_whole_or_unfinished_and_goes_on(
    data: Dataset, whole: Path, tmp_path: Path, kind: str
) -> None:
    start = renamed(
        begun(data, tmp_path / "start") if kind == "unfinished" else shutil.copytree(whole, tmp_path / "start")
    )
    if kind == "untidy":
        unfinished = renamed(begun(data, tmp_path / "unfinished"))
        for name in (OLD_STATE, "part-00000.json", "part-00001.json"):
            shutil.copy(unfinished / name, start / name)
    reuse, now = REUSE_NOTHING, data
    if kind == "retry":
        shutil.copy(data.image_root / "6.png", data.image_root / "5.png")
        reuse, now = Reuse(retry_failed=True), retitle(data.path, 2)
    elif kind == "extend":
        reuse, now = Reuse(extend=True), append_items(data.path, 30)
    make(now, tmp_path / "fresh")
    expected, earlier = pq.read_table(tmp_path / "fresh"), pq.read_table(whole)
    seen = set()
    for moment in range(200):
        out = Path(shutil.copytree(start, tmp_path / f"out-{moment}"))
        killed = FORKED.Process(target=_dying, args=(moment, lambda out=out: make(now, out, reuse=reuse)))
        killed.start()
        killed.join()
        if killed.exitcode == 0:
            assert kind not in ("retry", "extend")
            break
        assert killed.exitcode == -signal.SIGKILL
        documents = [name for name in names(out) if name in (*FORMER, *FORMER.values()) and name.endswith(".json")]
        seen.add(tuple(documents))
        if any("manifest" in name for name in documents):
            assert EmbeddingTable.open(str(out)).item_ids
            assert [problem for problem in verify(out) if "is not part" not in problem.what] == []
            found = pq.read_table([out / entry["file"] for entry in schema.read_manifest(out)["shards"]])
            assert found.equals(earlier) or found.equals(expected)
        else:
            assert kind in ("unfinished", "retry", "extend")
            with pytest.raises(ArtifactError, match=r"does not exist.*written last"):
                EmbeddingTable.open(str(out))
        if moment % 2:  # killed twice, at another step
            again = FORKED.Process(target=_dying, args=(moment // 2, lambda out=out: make(now, out, reuse=reuse)))
            again.start()
            again.join()
        make(now, out, reuse=reuse)
        assert [name for name in names(out) if not name.startswith("part-")] == ["_manifest.json"]
        assert pq.read_table(out).equals(expected) and verify(out) == []
        if documents == ["_export.json"] and kind != "unfinished":
            break  # the rest is that of any export: `test_revise_export.py`
    else:
        raise AssertionError("it never ended")
    before = OLD_STATE if kind == "unfinished" else OLD
    assert (before,) in seen and ("_manifest.json",) in seen
    assert all(len({*documents} & {*FORMER}) in (0, len(documents)) for documents in seen)  # never of both kinds


def test_names_that_this_test_knows_are_those_of_the_product() -> None:
    today = (schema.MANIFEST_FILE, schema.STATE_FILE, lock.LOCK_FILE)
    assert dict(zip(today, FORMER.values(), strict=True)) == FORMER
    assert [schema.former_name(name) for name in today[:2]] == [OLD, OLD_STATE]
