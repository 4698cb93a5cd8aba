"""The shard protocol: killed, damaged, misused or out of disk, an export is complete or can be finished."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from children import Forked, waited

from vlm2rec.embedder.contract import schema, storage
from vlm2rec.embedder.contract.errors import ArtifactError, DataError
from vlm2rec.embedder.contract.process import this_process
from vlm2rec.embedder.export import lock, shard_file, shards
from vlm2rec.embedder.export.lock import LOCK_FILE, writing
from vlm2rec.embedder.export.plan import Plan, fingerprint, plan_shards, read_inputs

DIM = 6
SETTINGS: dict[str, Any] = {
    "backbone": "drawn",
    "backbone_hash": "aa",
    "adapter": None,
    "prompt_hash": "cc",
    "max_pixels": 50176,
    "dtype": "float32",
    "pooling": "last",
    "dim": DIM,
    "views": ["fused", "text", "image"],
    "storage": "float32",
    "on_image_error": "null",
    "items": 10,
}


def plan_of(items: int = 10, shard_size: int = 4, **changes: Any) -> Plan:
    return plan_shards([f"item/{i}" for i in range(items)], shard_size, {**SETTINGS, "items": items, **changes})


def table_of(plan: Plan, number: int) -> pa.Table:
    """Vectors that depend on the row alone; every seventh item failed, every fifth has no image."""
    rows = np.array(plan.rows(number))
    text = np.sin(rows[:, None] + np.arange(DIM)).astype(np.float32)
    image = np.cos(rows[:, None] + np.arange(DIM)).astype(np.float32)
    failed, blind = rows % 7 == 6, rows % 5 == 4
    fused = np.where(blind[:, None], text, text + image)
    image[blind] = np.nan
    for vectors in (fused, text, image):
        vectors[failed] = np.nan
    status = np.where(failed, "failed", np.where(blind, "text_only", "ok")).tolist()
    error = [None if name == "ok" else "unreadable" for name in status]
    return shard_file.shard_table(
        plan, plan.rows(number), {"fused": fused, "text": text, "image": image}, status, error
    )


def publish_all(folder: Path, plan: Plan, numbers: Iterator[int] | range | None = None) -> dict[int, shards.Shard]:
    return {n: shards.publish_shard(folder, plan, n, table_of(plan, n), 1.0) for n in numbers or range(len(plan))}


def finished_export(folder: Path, plan: Plan) -> dict[str, Any]:
    with writing(folder):
        done = shards.begin(folder, plan).finished
        done |= publish_all(folder, plan, iter([n for n in range(len(plan)) if n not in done]))
        manifest = shards.finish(folder, plan, done)
    assert manifest is not None
    return manifest


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def parts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("part-*.parquet")}


# --- plan ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("items", "sizes"), [(0, []), (1, [1]), (3, [3]), (4, [4]), (5, [4, 1]), (8, [4, 4])])
def test_fault_37_every_item_stands_in_exactly_one_shard(items: int, sizes: list[int]) -> None:
    plan = plan_of(items, 4)
    assert [len(plan.rows(n)) for n in range(len(plan))] == sizes
    assert [row for n in range(len(plan)) for row in plan.rows(n)] == list(range(items))


def test_fault_36_duplicate_null_and_numeric_ids_are_refused() -> None:
    with pytest.raises(DataError, match="'b'"):
        plan_shards(["a", "b", "b"], 2, SETTINGS)
    for ids in (["a", None], ["a", 7]):
        with pytest.raises(DataError, match="in row 1"):
            plan_shards(ids, 2, SETTINGS)


def test_the_fingerprint_ignores_the_order_of_keys_and_sees_every_value() -> None:
    assert fingerprint({"a": 1, "b": {"c": [1, 2]}}) == fingerprint({"b": {"c": [1, 2]}, "a": 1})
    assert fingerprint({"a": 1}) == "f9d86028c6e0d64e225186f96acb69338b2c59764df79162107f5c4bb34d1310"
    assert len({fingerprint({**SETTINGS, key: "other"}) for key in SETTINGS} | {fingerprint(SETTINGS)}) == 13


def test_order_titles_and_images_of_the_input_are_told_apart(tmp_path: Path) -> None:
    ids, titles, paths = ["a", "bc"], ["one", "two"], ["a.png", "b.png"]
    for name in paths:
        (tmp_path / name).write_bytes(b"12345")
        os.utime(tmp_path / name, ns=(1, 1))
    known = read_inputs(ids, titles, paths, tmp_path).settings
    assert known == read_inputs(ids, titles, paths, tmp_path).settings

    def changed(*arguments: Any) -> set[str]:
        found = read_inputs(*arguments).settings
        return {key for key in known if found[key] != known[key]}

    assert changed(ids[::-1], titles[::-1], paths[::-1], tmp_path) == {"item_ids", "titles", "images"}
    assert changed(["ab", "c"], titles, paths, tmp_path) == {"item_ids"}
    assert changed(ids, ["one", "two!"], paths, tmp_path) == {"titles"}
    assert changed([*ids, "d"], [*titles, "three"], [*paths, "c.png"], tmp_path) == {
        "items",
        "item_ids",
        "titles",
        "images",
    }
    os.utime(tmp_path / "a.png", ns=(2, 2))
    assert changed(ids, titles, paths, tmp_path) == {"images"}


def test_by_content_a_copied_image_is_the_same_and_an_edited_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"12345")
    known = read_inputs(["a"], ["one"], ["a.png"], tmp_path, "bytes").settings
    os.utime(tmp_path / "a.png", ns=(2, 2))
    assert read_inputs(["a"], ["one"], ["a.png"], tmp_path, "bytes").settings == known
    (tmp_path / "a.png").write_bytes(b"54321")
    assert read_inputs(["a"], ["one"], ["a.png"], tmp_path, "bytes").settings["images"] != known["images"]


@pytest.mark.parametrize("images_by", ["mtime", "bytes"])
def test_hashing_the_input_neither_hangs_on_a_fifo_nor_leaves_the_root(tmp_path: Path, images_by: Any) -> None:
    root = tmp_path / "root"
    root.mkdir()
    os.mkfifo(root / "pipe.png")
    (tmp_path / "secret.png").write_bytes(b"1")
    paths = ["pipe.png", "missing.png", "../secret.png", "http://example.org/a.png"]
    before = read_inputs(list("abcd"), list("abcd"), paths, root, images_by).settings
    (tmp_path / "secret.png").write_bytes(b"22")
    assert read_inputs(list("abcd"), list("abcd"), paths, root, images_by).settings == before


# --- a shard ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_vectors_are_stored_byte_split_zstd_and_without_dictionary(tmp_path: Path, storage: str) -> None:
    plan = plan_of(storage=storage)
    shards.publish_shard(tmp_path, plan, 0, table_of(plan, 0), 1.0)
    group = pq.ParquetFile(tmp_path / "part-00000.parquet").metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    for view in schema.VIEWS:
        column = columns[f"{view}.list.element"]
        assert "BYTE_STREAM_SPLIT" in column.encodings
        assert "RLE_DICTIONARY" not in column.encodings and not column.has_dictionary_page
        assert column.compression == "ZSTD"


def test_page_checksums_find_a_flipped_bit_that_reads_without_complaint(tmp_path: Path) -> None:
    plan = plan_of(2000, 2000)
    vectors = np.random.default_rng(0).normal(size=(2000, DIM)).astype(np.float32)  # mantissas do not compress
    table = shard_file.shard_table(
        plan, plan.rows(0), dict.fromkeys(schema.VIEWS, vectors), ["ok"] * 2000, [None] * 2000
    )
    shards.publish_shard(tmp_path, plan, 0, table, 1.0)
    column = pq.ParquetFile(tmp_path / "part-00000.parquet").metadata.row_group(0).column(1)
    flipped = bytearray((tmp_path / "part-00000.parquet").read_bytes())
    flipped[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    (tmp_path / "flipped.parquet").write_bytes(flipped)
    assert not pq.read_table(tmp_path / "flipped.parquet", page_checksum_verification=False).equals(table)
    with pytest.raises(OSError, match="checksum"):
        pq.read_table(tmp_path / "flipped.parquet", page_checksum_verification=True)


def test_ids_and_vectors_share_a_row_and_absent_vectors_are_null(tmp_path: Path) -> None:
    plan = plan_of(10, 10)
    shards.publish_shard(tmp_path, plan, 0, table_of(plan, 0), 1.0)
    rows = pq.read_table(tmp_path / "part-00000.parquet").to_pylist()
    assert [row["item_id"] for row in rows] == [f"item/{i}" for i in range(10)]
    assert rows[4]["image"] is None and rows[4]["status"] == "text_only"
    assert rows[4]["fused"] == rows[4]["text"] == pytest.approx([np.sin(4 + k) for k in range(DIM)], abs=1e-6)
    assert rows[6] == {
        "item_id": "item/6",
        "fused": None,
        "text": None,
        "image": None,
        "status": "failed",
        "error": "unreadable",
        "input": None,
    }
    assert rows[9]["text"] == pytest.approx([np.sin(9 + k) for k in range(DIM)], abs=1e-6)


def test_file_metadata_say_where_the_vectors_come_from(tmp_path: Path) -> None:
    plan = plan_of(adapter="bb")
    shards.publish_shard(tmp_path, plan, 0, table_of(plan, 0), 1.0)
    found = {
        key.decode(): value.decode() for key, value in pq.read_schema(tmp_path / "part-00000.parquet").metadata.items()
    }
    expected = {
        "backbone": "drawn",
        "backbone_hash": "aa",
        "adapter": "bb",
        "prompt_hash": "cc",
        "dim": "6",
        "schema_version": "1",
        "fingerprint": fingerprint({key: value for key, value in plan.settings.items() if key != "items"}),
    }
    assert {key: found[f"vlm2rec.{key}"] for key in expected} == expected


def test_a_vector_with_nan_or_infinity_is_never_written() -> None:
    plan = plan_of(2, 2)
    for bad in (np.nan, np.inf):
        vectors = np.ones((2, DIM), np.float32)
        vectors[1, 3] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            shard_file.shard_table(plan, plan.rows(0), {"fused": vectors}, ["ok", "ok"], [None, None])


def test_fault_09_the_same_shard_twice_is_one_file_with_the_same_bytes(tmp_path: Path) -> None:
    plan = plan_of()
    first = shards.publish_shard(tmp_path, plan, 0, table_of(plan, 0), 1.0)
    before = parts(tmp_path)
    assert shards.publish_shard(tmp_path, plan, 0, table_of(plan, 0), 1.0) == first
    assert parts(tmp_path) == before and len(before) == 1


# --- a whole export -----------------------------------------------------------------------------------------
def test_a_finished_folder_holds_parts_and_manifest_and_nothing_else(tmp_path: Path) -> None:
    plan = plan_of()
    manifest = finished_export(tmp_path / "out", plan)
    assert names(tmp_path / "out") == [schema.MANIFEST_FILE, *(f"part-0000{n}.parquet" for n in range(3))]
    assert manifest == schema.read_manifest(tmp_path / "out")
    assert manifest["counts"] == {"ok": 7, "truncated": 0, "text_only": 2, "failed": 1}
    assert (manifest["num_items"], manifest["dim"], manifest["dtype"]) == (10, DIM, "float32")
    assert manifest["views"] == ["fused", "text", "image"]
    assert manifest["fingerprint"] == plan.fingerprint == fingerprint(manifest["settings"])
    assert [shard["rows"] for shard in manifest["shards"]] == [4, 4, 2]
    for shard in manifest["shards"]:
        assert shard["sha256"] == storage.sha256_file(tmp_path / "out" / shard["file"])
        assert shard["bytes"] == (tmp_path / "out" / shard["file"]).stat().st_size


def test_fault_37_an_export_of_no_items_is_a_manifest_alone(tmp_path: Path) -> None:
    assert finished_export(tmp_path / "out", plan_of(0))["shards"] == []
    assert names(tmp_path / "out") == [schema.MANIFEST_FILE]


def test_a_manifest_is_not_written_while_a_shard_is_missing(tmp_path: Path) -> None:
    plan = plan_of()
    with writing(tmp_path / "out"):
        shards.begin(tmp_path / "out", plan)
        done = publish_all(tmp_path / "out", plan, iter([0, 2]))
        with pytest.raises(ValueError, match=r"part-00001\.parquet"):
            shards.finish(tmp_path / "out", plan, done)
    assert schema.MANIFEST_FILE not in names(tmp_path / "out")
    with pytest.raises(ArtifactError, match="run the command that wrote it"):
        schema.read_manifest(tmp_path / "out")


def test_a_finished_folder_is_found_finished_and_left_as_it_is(tmp_path: Path) -> None:
    plan = plan_of()
    manifest = finished_export(tmp_path / "out", plan)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with writing(tmp_path / "out"):
        done = shards.begin(tmp_path / "out", plan).finished
        assert sorted(done) == [0, 1, 2]
        assert shards.finish(tmp_path / "out", plan, done) == manifest
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_begun_export_goes_on_after_its_finished_shards(tmp_path: Path) -> None:
    plan = plan_of()
    with writing(tmp_path / "out"):
        shards.begin(tmp_path / "out", plan)
        publish_all(tmp_path / "out", plan, iter([0, 1]))
    with writing(tmp_path / "out"):
        assert sorted(shards.begin(tmp_path / "out", plan).finished) == [0, 1]
    finished_export(tmp_path / "whole", plan)
    finished_export(tmp_path / "out", plan)
    assert parts(tmp_path / "out") == parts(tmp_path / "whole")


@pytest.mark.parametrize("step", ["opened", "finished", "renamed"])
def test_a_look_at_a_folder_that_another_worker_opens_finishes_or_renames_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    plan = plan_of()
    finished_export(tmp_path, plan)
    manifest, state = tmp_path / schema.MANIFEST_FILE, tmp_path / schema.STATE_FILE
    whole, exists, changed = manifest.read_text(), Path.exists, []
    if step == "finished":
        schema.write_json(state, shards._state(plan))
        manifest.unlink()
    former = tmp_path / schema.former_name(schema.MANIFEST_FILE)
    if step == "renamed":
        manifest.rename(former)

    def exists_and_change(self: Path, **choices: Any) -> bool:
        found = exists(self, **choices)
        if not changed and self == manifest:
            changed.append(self)
            if step == "renamed":
                former.rename(manifest)
            elif step == "opened":
                schema.write_json(state, shards._state(plan))
                manifest.unlink()
            else:
                manifest.write_text(whole)
                state.unlink()
        return found

    monkeypatch.setattr(Path, "exists", exists_and_change)
    assert shards.rows_of_shards(tmp_path) == [4, 4, 2] and changed == [manifest]


# --- killed -------------------------------------------------------------------------------------------------
def test_fault_01_killed_while_a_shard_is_written_leaves_no_part_and_the_rerun_equals_a_whole_run(
    tmp_path: Path,
) -> None:
    code = """
from test_shards import *
out = Path(sys.argv[1]); plan = plan_of()
with writing(out):
    shards.begin(out, plan)
    publish_all(out, plan, iter([0]))
    def half(table, file):
        file.write(b"PAR1 half a shard")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    shard_file.write_parquet = half
    publish_all(out, plan, iter([1]))
"""
    killed = Forked(code, tmp_path / "out")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    left = names(tmp_path / "out")
    assert [name for name in left if name.startswith(".part-00001")] and "part-00001.parquet" not in left
    finished_export(tmp_path / "out", plan_of())
    finished_export(tmp_path / "whole", plan_of())
    assert names(tmp_path / "out") == names(tmp_path / "whole")
    assert parts(tmp_path / "out") == parts(tmp_path / "whole")


def test_fault_02_killed_between_rename_and_record_the_shard_is_checked_and_adopted(tmp_path: Path) -> None:
    code = """
from test_shards import *
out = Path(sys.argv[1]); plan = plan_of()
with writing(out):
    shards.begin(out, plan)
    publish_all(out, plan, iter([0]))
    shards.schema.write_json = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    publish_all(out, plan, iter([1]))
"""
    killed = Forked(code, tmp_path / "out")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert "part-00001.parquet" in names(tmp_path / "out") and "_part-00001.json" not in names(tmp_path / "out")
    plan = plan_of()
    with writing(tmp_path / "out"):
        done = shards.begin(tmp_path / "out", plan).finished
    assert sorted(done) == [0, 1]
    assert done[1].counts == {"ok": 2, "text_only": 1, "failed": 1}
    assert "_part-00001.json" in names(tmp_path / "out")


@pytest.mark.parametrize("damage", ["other settings", "other items", "truncated", "flipped", "no parquet"])
def test_fault_02_an_unrecorded_part_that_is_not_what_was_planned_is_written_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    plan, out = plan_of(), tmp_path / "out"
    with writing(out):
        shards.begin(out, plan)
        publish_all(out, plan, iter([0]))
    part = out / "part-00000.parquet"
    (out / "_part-00000.json").unlink()
    if damage == "other settings":
        other = plan_of(max_pixels=1)
        shards._commit(out, other, 0, table_of(other, 0), 1.0)
        (out / "_part-00000.json").unlink()
    elif damage == "other items":
        shutil.rmtree(out)
        with writing(out):
            shards.begin(out, plan)
        table = table_of(plan, 1)
        pq.write_table(table, part)
    elif damage == "truncated":
        part.write_bytes(part.read_bytes()[:-20])
    elif damage == "flipped":
        place = pq.ParquetFile(part).metadata.row_group(0).column(2).data_page_offset + 60
        whole = bytearray(part.read_bytes())
        whole[place] ^= 1
        part.write_bytes(whole)
    else:
        part.write_bytes(b"nothing of the kind")
    with caplog.at_level(logging.WARNING), writing(out):
        assert shards.begin(out, plan).finished == {}
    assert "part-00000.parquet" in caplog.text and not part.exists()


def test_killed_after_the_manifest_only_leftovers_are_swept(tmp_path: Path) -> None:
    plan = plan_of()
    finished_export(tmp_path / "out", plan)
    for name in (
        schema.STATE_FILE,
        "_part-00002.json",
        "._manifest.json.77.tmp",
        ".manifest.json.77.tmp",
        "._part-00002.json.77.tmp",
        ".part-00001.parquet.77.tmp",
    ):
        (tmp_path / "out" / name).write_text("{}")
    before = parts(tmp_path / "out")
    with writing(tmp_path / "out"):
        assert len(shards.begin(tmp_path / "out", plan).finished) == 3
    assert names(tmp_path / "out") == [schema.MANIFEST_FILE, *sorted(before)]
    assert parts(tmp_path / "out") == before


# --- damage -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_fault_10_a_damaged_shard_is_named_and_alone_written_again(
    tmp_path: Path, complete: bool, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    plan, out = plan_of(), tmp_path / "out"
    if complete:
        finished_export(out, plan)
    else:
        with writing(out):
            shards.begin(out, plan)
            publish_all(out, plan)
    before = parts(out)
    part = out / "part-00001.parquet"
    if damage == "flip":
        whole = bytearray(part.read_bytes())
        whole[len(whole) // 2] ^= 1
        part.write_bytes(whole)
    elif damage == "truncate":
        part.write_bytes(part.read_bytes()[:-1])
    else:
        part.unlink()
    with caplog.at_level(logging.WARNING), writing(out):
        assert sorted(shards.begin(out, plan).finished) == [0, 2]
    assert "part-00001.parquet" in caplog.text
    assert schema.MANIFEST_FILE not in names(out)  # until it is mended, readers refuse
    finished_export(out, plan)
    assert parts(out) == before


def test_an_unreadable_record_costs_nothing_but_a_look_at_its_shard(tmp_path: Path) -> None:
    plan = plan_of()
    with writing(tmp_path / "out"):
        shards.begin(tmp_path / "out", plan)
        before = publish_all(tmp_path / "out", plan)
    (tmp_path / "out" / "_part-00001.json").write_text("{ half")
    with writing(tmp_path / "out"):
        done = shards.begin(tmp_path / "out", plan).finished
    assert {n: shard.sha256 for n, shard in done.items()} == {n: shard.sha256 for n, shard in before.items()}


# --- other settings, other folders --------------------------------------------------------------------------
@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(
    ("change", "old", "new"),
    [
        ({"backbone_hash": "zz"}, "'aa'", "'zz'"),
        ({"adapter": "bb"}, "None", "'bb'"),
        ({"prompt_hash": "dd"}, "'cc'", "'dd'"),
        ({"max_pixels": 12544}, "50176", "12544"),
        ({"dtype": "bfloat16"}, "'float32'", "'bfloat16'"),
        ({"pooling": "mean"}, "'last'", "'mean'"),
        ({"views": ["fused"]}, "['fused', 'text', 'image']", "['fused']"),
        ({"storage": "float16"}, "'float32'", "'float16'"),
        ({"on_image_error": "fail"}, "'null'", "'fail'"),
        ({"shard_size": 5}, "4", "5"),
        ({"fresh": 1}, "not set", "1"),
    ],
)
def test_fault_13_a_changed_setting_is_refused_naming_key_old_and_new(
    tmp_path: Path, complete: bool, change: dict[str, Any], old: str, new: str
) -> None:
    plan, out = plan_of(), tmp_path / "out"
    if complete:
        finished_export(out, plan)
    else:
        with writing(out):
            shards.begin(out, plan)
            publish_all(out, plan, iter([0]))
    before = names(out)
    (key,) = change
    with pytest.raises(ArtifactError) as refusal, writing(out):
        shards.begin(out, plan_of(**change))
    assert f"{key} was {old}, now {new}" in str(refusal.value)
    assert names(out) == before


def test_fault_12_a_newer_schema_is_refused_in_words(tmp_path: Path) -> None:
    plan, out = plan_of(), tmp_path / "out"
    with writing(out):
        shards.begin(out, plan)
    state = json.loads((out / schema.STATE_FILE).read_text())
    (out / schema.STATE_FILE).write_text(json.dumps({**state, "schema_version": 2}))
    with pytest.raises(ArtifactError, match="schema version 2"), writing(out):
        shards.begin(out, plan)


def test_a_folder_with_other_files_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "items.parquet").write_bytes(b"1")
    with pytest.raises(ArtifactError, match=r"items\.parquet"), writing(tmp_path):
        shards.begin(tmp_path, plan_of())
    assert names(tmp_path) == ["items.parquet"]


def test_fault_06_an_output_that_is_a_file_or_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/vlm2rec")):
        with pytest.raises(ArtifactError, match="choose another --out"), writing(out):
            pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_fault_06_a_read_only_output_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(ArtifactError, match="Permission denied"), writing(tmp_path):
        pass


def test_fault_06_a_read_only_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ArtifactError, match="Read-only file system"), writing(tmp_path):
        pass


def test_a_run_that_comes_to_nothing_leaves_no_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), writing(tmp_path / "out"):
        raise RuntimeError
    assert not (tmp_path / "out").exists()


# --- the disk -----------------------------------------------------------------------------------------------
def test_fault_07_a_rename_that_fails_once_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, failures = Path.replace, iter([True])

    def flaky(self: Path, target: Path) -> Path:
        if self.name.startswith(".part-00000.parquet") and next(failures, False):
            raise OSError(errno.EIO, "the disk hiccups")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", flaky)
    plan = plan_of()
    assert shards.publish_shard(tmp_path, plan, 0, table_of(plan, 0), 1.0).rows == 4
    assert names(tmp_path) == ["_part-00000.json", "part-00000.parquet"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_fault_07_a_disk_that_keeps_failing_is_an_error_and_nothing_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    calls = []

    def fail(*arguments: Any) -> None:
        calls.append(arguments)
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(*((os, call) if call == "fsync" else (Path, call)), fail)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    plan = plan_of()
    with pytest.raises(ArtifactError, match="the disk is broken"):
        shards.publish_shard(tmp_path, plan, 0, table_of(plan, 0), 1.0)
    assert len(calls) == 3 and names(tmp_path) == []


def test_a_shard_that_does_not_read_back_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of()
    write = shard_file.write_parquet
    monkeypatch.setattr(shard_file, "write_parquet", lambda table, file: write(table_of(plan, 1), file))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(ArtifactError, match="does not read back"):
        shards.publish_shard(tmp_path, plan, 0, table_of(plan, 0), 1.0)
    assert names(tmp_path) == []


def test_fault_05_a_full_disk_is_told_in_words_and_the_rerun_works(tmp_path: Path) -> None:
    code = """
from test_shards import *
import resource
out = Path(sys.argv[1]); plan = plan_of(items=4000, shard_size=2000)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))  # no file may grow beyond 20 kB
try:
    finished_export(out, plan)
except ArtifactError as error:
    print(error)
"""
    full = Forked(code, tmp_path / "out")
    told, errors = full.communicate()
    assert "File too large" in told and "run the command that wrote it" in told, errors
    assert [name for name in names(tmp_path / "out") if name.endswith((".tmp", ".parquet", ".lock"))] == []
    assert finished_export(tmp_path / "out", plan_of(items=4000, shard_size=2000))["num_items"] == 4000


def test_fault_05_too_little_space_is_seen_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(items=1_000_000, shard_size=4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10 * 2**20))
    shards.require_space(tmp_path, plan, 100_000)  # 6.9 MiB
    with pytest.raises(ArtifactError, match="10 MiB free and 1000000 items need about 69 MiB"):
        shards.require_space(tmp_path, plan, 1_000_000)


# --- one writer ---------------------------------------------------------------------------------------------
def test_fault_08_a_second_writer_is_refused_while_the_first_lives_and_takes_over_when_it_is_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    code = """
from test_shards import *
with writing(Path(sys.argv[1])):
    Path(sys.argv[2]).touch(); time.sleep(60)
"""
    first = Forked(code, out, tmp_path / "ready")
    try:
        waited((tmp_path / "ready").exists)
        with pytest.raises(ArtifactError) as refusal, writing(out):
            pass
        assert f"process {first.pid} on host {socket.gethostname()}" in str(refusal.value)
    finally:
        first.kill()
        first.communicate()
    assert (out / LOCK_FILE).exists()
    with caplog.at_level(logging.WARNING), writing(out):
        held = json.loads((out / LOCK_FILE).read_text())
        assert (held["host"], held["pid"]) == (socket.gethostname(), os.getpid())
    assert f"process {first.pid} on host {socket.gethostname()}, which is gone" in caplog.text
    assert not out.exists() or names(out) == []


def test_two_writers_in_one_process_are_refused_too(tmp_path: Path) -> None:
    with writing(tmp_path):
        with pytest.raises(ArtifactError, match=f"process {os.getpid()}"), writing(tmp_path):
            pass
        assert (tmp_path / LOCK_FILE).exists()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life every twentieth of a second; two seconds without any mean death."""
    for name, seconds in (("BEAT", 0.05), ("SILENCE", 2.0), ("SETTLE", 0.01)):
        monkeypatch.setattr(lock, name, seconds)


def elsewhere(**changes: Any) -> str:
    """The lock of a process that cannot be seen from here."""
    unseen = this_process()._replace(boot="b00", pid=1, host=socket.gethostname())
    return json.dumps(unseen._asdict() | {"writer": "another"} | changes)


UNSEEN = {
    "another machine": {},
    "a container of this machine, through another mount": {"boot": this_process().boot, "pids": "1", "device": -1},
    "an earlier version, which named host and process alone": {"boot": None, "pids": None, "started": None},
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("place", UNSEEN)
@pytest.mark.parametrize("age", [-(10**6), 0, 10**6], ids=["clock before ours", "same clock", "clock after ours"])
def test_fault_08_an_unseen_writer_is_dead_when_its_lock_was_watched_in_vain_whatever_the_clocks_say(
    tmp_path: Path, place: str, age: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "SILENCE", 0.3)  # nobody gives a sign that could come late
    path, now = tmp_path / LOCK_FILE, time.time() + age
    path.write_text(elsewhere(**UNSEEN[place]))
    os.utime(path, (now, now))
    with caplog.at_level(logging.WARNING), writing(tmp_path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert "watching for a sign of life" in caplog.text and "taking over from process 1" in caplog.text
    assert names(tmp_path) == []


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("age", [-(10**6), 0, 10**6], ids=["clock before ours", "same clock", "clock after ours"])
def test_fault_08_an_unseen_writer_that_gives_a_sign_of_life_is_respected(tmp_path: Path, age: int) -> None:
    path, ended = tmp_path / LOCK_FILE, threading.Event()
    path.write_text(elsewhere(host="elsewhere", pid=4711))

    def beat() -> None:
        for second in range(10**6):
            os.utime(path, (time.time() + age + second, time.time() + age + second))
            if ended.wait(0.3):
                return

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with (
            pytest.raises(ArtifactError, match=r"process 4711 on host elsewhere; it has just .*delete .*export\.lock"),
            writing(tmp_path),
        ):
            pass
    finally:
        ended.set()
        beating.join()
    assert names(tmp_path) == [LOCK_FILE]


def test_fault_08_process_1_of_another_container_is_dead_where_the_kernel_has_released_its_lock(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / LOCK_FILE
    path.write_text(elsewhere(boot=this_process().boot, pids="1", device=tmp_path.stat().st_dev))
    with caplog.at_level(logging.WARNING), writing(tmp_path):
        pass
    assert "taking over from process 1" in caplog.text and "watching" not in caplog.text


def test_a_process_of_the_same_id_that_began_later_is_not_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", unsupported)
    monkeypatch.setattr(lock, "SETTLE", 0.01)
    (tmp_path / LOCK_FILE).write_text(json.dumps(this_process()._replace(started="1")._asdict() | {"writer": "w"}))
    with writing(tmp_path):
        pass


def unsupported(*arguments: Any) -> None:
    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


def test_where_the_file_system_has_no_locks_any_owner_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", unsupported)
    monkeypatch.setattr(lock, "SETTLE", 0.01)
    with writing(tmp_path), pytest.raises(ArtifactError, match="it is at work"), writing(tmp_path):
        pass
    assert names(tmp_path) == []


def test_a_writer_that_was_taken_over_knows(tmp_path: Path) -> None:
    with writing(tmp_path) as hold:
        hold.require()
        (tmp_path / LOCK_FILE).write_text(elsewhere())
        with pytest.raises(ArtifactError, match=r"another writer has taken .* over"):
            hold.require()
    assert names(tmp_path) == [LOCK_FILE]  # it is the other's


def test_of_many_that_find_a_dead_lock_one_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", unsupported)  # as on a disk whose hosts do not see each other's locks
    monkeypatch.setattr(lock, "SETTLE", 0.5)
    (tmp_path / LOCK_FILE).write_text(json.dumps(this_process()._replace(pid=99999999)._asdict() | {"writer": "w"}))
    together, got = threading.Barrier(4), []

    def come() -> None:
        together.wait()
        try:
            with writing(tmp_path):
                got.append("in")
                time.sleep(1)
        except ArtifactError:
            got.append("out")

    threads = [threading.Thread(target=come) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == ["in", "out", "out", "out"]


def test_a_torn_lock_file_of_a_dead_writer_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text('{"host": "he')
    with writing(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_the_protocol_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, vlm2rec.embedder.export.shards, vlm2rec.embedder.export.verify, vlm2rec.pipelines.verify;"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
