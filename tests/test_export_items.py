"""Exporting items: every id once, as a vector or as a failure with a reason, whatever happens on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chairs import ITEMS, ShadeEncoder, parts, rows_of, write_dataset
from children import Forked
from PIL import Image

from vlm2rec.downstream.table import EmbeddingTable
from vlm2rec.embedder.contract import provenance, schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, DataError, FailureLimitError, ModelError
from vlm2rec.embedder.encoders.item_encoder import EncodedItems, ItemEncoder
from vlm2rec.embedder.export import worker
from vlm2rec.embedder.export.distribute import Distribution
from vlm2rec.embedder.export.export import export
from vlm2rec.embedder.export.lock import LOCK_FILE
from vlm2rec.embedder.export.reuse import REUSE_NOTHING, Reuse
from vlm2rec.embedder.export.verify import verify
from vlm2rec.embedder.export.worker import encode_rows
from vlm2rec.embedder.options import ImagePolicy
from vlm2rec.embedder.progress import SILENT
from vlm2rec.pipelines import export_items
from vlm2rec.pipelines.config import ExportConfig
from vlm2rec.pipelines.console import TERMINAL

BROKEN = (3, 11)  # items whose image cannot be read, where a test asks for that


def never() -> ItemEncoder:
    raise AssertionError("the model must not be loaded")


# --- what becomes of an item --------------------------------------------------------------------------------
def test_every_item_comes_out_once_and_in_order(tmp_path: Path) -> None:
    data, encoder = Dataset(write_dataset(tmp_path / "data")), ShadeEncoder()
    manifest = export(data, tmp_path / "out", encoder.fingerprint, lambda: encoder, shard_size=8)
    rows = rows_of(tmp_path / "out")
    assert [row["item_id"] for row in rows] == data.item_ids
    assert manifest["counts"] == {"ok": 14, "truncated": 6, "text_only": 0, "failed": 0}
    assert [shard["rows"] for shard in manifest["shards"]] == [8, 8, 4]
    assert rows[0]["text"] == [11, 4, 1]  # "red chair 0"
    for row in rows:
        assert row["fused"] == pytest.approx(np.add(row["text"], row["image"]), abs=1e-6)
        assert row["status"] == ("truncated" if int(row["item_id"]) % 3 == 2 else "ok") and row["error"] is None
    assert verify(tmp_path / "out") == []
    assert manifest["data"] == str(data.path.resolve())


@pytest.mark.parametrize("items", [1, 7, 8, 9])
def test_fault_37_shards_of_eight_hold_any_number_of_items(tmp_path: Path, items: int) -> None:
    data, encoder = Dataset(write_dataset(tmp_path / "data", items)), ShadeEncoder()
    manifest = export(data, tmp_path / "out", encoder.fingerprint, lambda: encoder, shard_size=8)
    assert manifest["num_items"] == items and len(rows_of(tmp_path / "out")) == items
    assert verify(tmp_path / "out") == []


def test_more_items_than_are_read_at_once_stay_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "ITEMS_AT_ONCE", 3)
    data, encoder = Dataset(write_dataset(tmp_path / "data")), ShadeEncoder()
    export(data, tmp_path / "out", encoder.fingerprint, lambda: encoder, shard_size=10)
    assert [len(call) for call in encoder.calls] == [3, 3, 3, 1, 3, 3, 3, 1]
    whole = ShadeEncoder().encode_items(
        data.titles, [Image.open(data.image_root / path).convert("RGB") for path in data.image_paths]
    )
    np.testing.assert_allclose([row["fused"] for row in rows_of(tmp_path / "out")], whole.fused, atol=1e-6)


def test_with_the_policy_null_a_bad_image_is_a_failure_row_with_its_reason(tmp_path: Path) -> None:
    data, encoder = Dataset(write_dataset(tmp_path / "data", broken=BROKEN)), ShadeEncoder()
    manifest = export(data, tmp_path / "out", encoder.fingerprint, lambda: encoder, on_image_error="null")
    assert manifest["counts"] == {"ok": 13, "truncated": 5, "text_only": 0, "failed": 2}
    for row in BROKEN:
        found = rows_of(tmp_path / "out")[row]
        assert found["status"] == "failed" and "not a JPEG" in found["error"]
        assert found["fused"] is found["text"] is found["image"] is None
    assert verify(tmp_path / "out") == []


def test_with_the_policy_text_only_a_bad_image_leaves_the_text_vector(tmp_path: Path) -> None:
    data, encoder = Dataset(write_dataset(tmp_path / "data", broken=BROKEN)), ShadeEncoder()
    manifest = export(data, tmp_path / "out", encoder.fingerprint, lambda: encoder, on_image_error="text_only")
    assert manifest["counts"] == {"ok": 13, "truncated": 5, "text_only": 2, "failed": 0}
    found = rows_of(tmp_path / "out")[3]
    assert found["fused"] == found["text"] == [11, 4, 1] and found["image"] is None
    assert "not a JPEG" in found["error"]
    assert verify(tmp_path / "out") == []


def test_with_the_policy_fail_a_bad_image_stops_the_export_by_name(tmp_path: Path) -> None:
    data, encoder = Dataset(write_dataset(tmp_path / "data", broken=BROKEN)), ShadeEncoder()
    with pytest.raises(DataError, match=r"'3\.png' of item '003' cannot be used: the image is not a JPEG"):
        export(data, tmp_path / "out", encoder.fingerprint, lambda: encoder, on_image_error="fail")
    assert not list(tmp_path.glob("out/part-*"))


def test_text_only_is_refused_where_there_is_no_text_vector(tmp_path: Path) -> None:
    encoder = ShadeEncoder(views=["fused"])
    with pytest.raises(ConfigError, match="internal fusion"):
        export(
            Dataset(write_dataset(tmp_path / "data")),
            tmp_path / "out",
            encoder.fingerprint,
            never,
            on_image_error="text_only",
        )
    assert not (tmp_path / "out").exists()


def test_an_encoder_with_one_view_leaves_the_others_null(tmp_path: Path) -> None:
    data, encoder = Dataset(write_dataset(tmp_path / "data", broken=BROKEN)), ShadeEncoder(views=["fused"])
    manifest = export(data, tmp_path / "out", encoder.fingerprint, lambda: encoder)
    assert manifest["views"] == ["fused"] and manifest["counts"]["failed"] == 2
    assert {(row["text"], row["image"]) for row in rows_of(tmp_path / "out")} == {(None, None)}
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../secret.png", "out of the image root"),
        ("../../x", "out of the image root"),
        ("/etc/hostname", "out of the image root"),
        ("out.png", "out of the image root"),
        ("http://example.org/a.png", "URL"),
        ("missing.png", "does not exist"),
        ("", "no image path"),
        (None, "no image path"),
        ("pipe.png", "not a regular file"),
        ("folder.png", "not a regular file"),
        pytest.param("shut.png", "permission", marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may read")),
    ],
)
def test_fault_30_a_bad_image_path_is_a_failure_row(tmp_path: Path, path: str | None, reason: str) -> None:
    folder = write_dataset(tmp_path / "data", items=3, image_path=["0.png", path, "2.png"])
    images = folder / "images"
    os.mkfifo(images / "pipe.png")
    (images / "folder.png").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "secret.png")
    (images / "out.png").symlink_to(folder / "secret.png")
    Image.new("RGB", (9, 9)).save(images / "shut.png")
    (images / "shut.png").chmod(0)
    encoder = ShadeEncoder()
    export(Dataset(folder), tmp_path / "out", encoder.fingerprint, lambda: encoder)
    found = rows_of(tmp_path / "out")
    assert [row["status"] for row in found] == ["ok", "failed", "truncated"]
    assert reason in found[1]["error"]


def test_fault_33_odd_ids_and_titles_come_back_as_they_are(tmp_path: Path) -> None:
    ids = ["007", "NA", "null", "a/b/../c", "🪑", "אבג", "a\0b", " ", "7" * 100]
    titles = ["", " ", None, "🪑" * 10_000, "שלום", "a\0b", "<|im_end|>", "\n", "x"]
    folder = write_dataset(tmp_path / "data", items=9, item_id=ids, title=titles)
    encoder = ShadeEncoder()
    manifest = export(Dataset(folder), tmp_path / "out", encoder.fingerprint, lambda: encoder)
    assert [row["item_id"] for row in rows_of(tmp_path / "out")] == ids
    assert manifest["counts"]["ok"] == 9


def test_fault_36_duplicate_ids_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", items=3, item_id=["a", "b", "a"])
    with pytest.raises(DataError, match="'a'"):
        export(Dataset(folder), tmp_path / "out", ShadeEncoder().fingerprint, never)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_fault_38_a_bad_number_is_computed_again_alone_and_else_fails_the_row_only(value: float) -> None:
    image = Image.new("RGB", (8, 8), "red")
    spoil = {"in company": lambda batch: value if batch > 1 else 5.0, "always": lambda batch: value}
    encoder = ShadeEncoder(spoil=spoil)
    rows = encode_rows(encoder, ["good", "in company", "always"], [image] * 3)
    assert encoder.calls == [["good", "in company", "always"], ["in company"], ["always"]]
    assert rows.status == ["ok", "ok", "failed"]
    assert rows.vectors["text"][1].tolist() == [10, 5, 1]
    assert rows.error == [None, None, "the model gives NaN or infinity (fused, text)"]
    assert np.isnan([rows.vectors[view][2] for view in schema.VIEWS]).all()


def test_a_value_too_large_for_float16_fails_the_row_instead_of_becoming_infinity(tmp_path: Path) -> None:
    data = Dataset(write_dataset(tmp_path / "data", items=3))
    encoder = ShadeEncoder(spoil={"small chair 1": lambda batch: 1e6})
    manifest = export(data, tmp_path / "half", encoder.fingerprint, lambda: encoder, storage="float16")
    assert manifest["counts"]["failed"] == 1
    assert "too large for float16" in rows_of(tmp_path / "half")[1]["error"]
    manifest = export(data, tmp_path / "full", encoder.fingerprint, lambda: encoder, storage="float32")
    assert manifest["counts"]["failed"] == 0
    assert verify(tmp_path / "half") == verify(tmp_path / "full") == []


# --- going on -----------------------------------------------------------------------------------------------
def test_a_complete_folder_is_left_alone_and_no_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, encoder = Dataset(write_dataset(tmp_path / "data")), ShadeEncoder()
    first = export(data, tmp_path / "out", encoder.fingerprint, lambda: encoder, shard_size=8)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert export(data, tmp_path / "out", encoder.fingerprint, never, shard_size=8, reporter=TERMINAL) == first
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert "already complete" in " ".join(capsys.readouterr().err.split())


def test_fault_03_killed_before_the_manifest_the_rerun_only_finalises_without_a_model(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from test_export_items import Dataset, ShadeEncoder, export, export_items
export_items.shards.finish = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
encoder = ShadeEncoder()
export(Dataset(Path(sys.argv[1])), Path(sys.argv[2]), encoder.fingerprint, lambda: encoder, shard_size=8)
"""
    data = write_dataset(tmp_path / "data")
    killed = Forked(code, data, tmp_path / "out")
    told = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, told
    assert not (tmp_path / "out" / schema.MANIFEST_FILE).exists()
    before = parts(tmp_path / "out")
    manifest = export(Dataset(data), tmp_path / "out", ShadeEncoder().fingerprint, never, shard_size=8)
    assert manifest["num_items"] == ITEMS and len(before) == 3 and parts(tmp_path / "out") == before
    assert verify(tmp_path / "out") == []


def test_fault_10_after_a_bit_flip_the_rerun_encodes_that_shard_alone(tmp_path: Path) -> None:
    data, encoder = Dataset(write_dataset(tmp_path / "data")), ShadeEncoder()
    export(data, tmp_path / "out", encoder.fingerprint, lambda: encoder, shard_size=8)
    before = parts(tmp_path / "out")
    part = tmp_path / "out" / "part-00001.parquet"
    whole = bytearray(part.read_bytes())
    whole[len(whole) // 2] ^= 4
    part.write_bytes(whole)
    assert [problem.file for problem in verify(tmp_path / "out")] == ["part-00001.parquet"]
    again = ShadeEncoder()
    export(data, tmp_path / "out", again.fingerprint, lambda: again, shard_size=8)
    assert again.calls == [data.titles[8:16]]
    assert parts(tmp_path / "out") == before and verify(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda folder: {"storage": "float16"}, "storage was 'float32', now 'float16'"),
        (lambda folder: {"on_image_error": "fail"}, "on_image_error was 'null', now 'fail'"),
        (lambda folder: {"shard_size": 9}, "shard_size was 8, now 9"),
        (lambda folder: {"images_by": "bytes"}, "images_by was 'mtime', now 'bytes'"),
        (lambda folder: Image.new("RGB", (5, 5)).save(folder / "images" / "7.png"), "images was"),
        (lambda folder: rewrite(folder, lambda table: table.take(list(range(ITEMS))[::-1])), "item_ids was"),
        (lambda folder: rewrite(folder, lambda table: table.slice(1)), "items was 20, now 19"),
        (lambda folder: rewrite(folder, edit_title), "titles was"),
    ],
)
def test_fault_15_what_would_mix_two_exports_is_refused_by_name(
    tmp_path: Path, change: Callable[[Path], dict[str, Any] | None], key: str
) -> None:
    folder, encoder = write_dataset(tmp_path / "data"), ShadeEncoder()
    settings: dict[str, Any] = {"shard_size": 8}
    export(Dataset(folder), tmp_path / "out", encoder.fingerprint, lambda: encoder, **settings)
    settings |= change(folder) or {}
    with pytest.raises(ArtifactError) as refusal:
        export(Dataset(folder), tmp_path / "out", encoder.fingerprint, never, **settings)
    assert key in str(refusal.value)


def test_fault_16_another_version_of_the_tool_goes_on_where_the_schema_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, encoder, out = Dataset(write_dataset(tmp_path / "data")), ShadeEncoder(), tmp_path / "out"
    monkeypatch.setattr(provenance, "version_of", lambda name: "0.0.1")
    first = export(data, out, encoder.fingerprint, lambda: encoder, shard_size=8)
    monkeypatch.undo()
    (out / "part-00001.parquet").unlink()
    again = export(data, out, encoder.fingerprint, lambda: encoder, shard_size=8)
    assert first["versions"]["vlm2rec"] == "0.0.1" != again["versions"]["vlm2rec"]
    assert first["fingerprint"] == again["fingerprint"] and verify(out) == []
    (out / schema.MANIFEST_FILE).write_text(json.dumps({**again, "schema_version": schema.SCHEMA_VERSION + 1}))
    with pytest.raises(ArtifactError, match="schema version 2"):
        export(data, out, encoder.fingerprint, never, shard_size=8)


def rewrite(folder: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(folder / "items.parquet")), folder / "items.parquet")


def edit_title(table: pa.Table) -> pa.Table:
    titles = table["title"].to_pylist()
    return table.set_column(1, "title", pa.array(["another chair", *titles[1:]]))


def test_an_encoder_that_is_not_what_was_planned_is_refused(tmp_path: Path) -> None:
    data, encoder = Dataset(write_dataset(tmp_path / "data")), ShadeEncoder()
    planned = {**encoder.fingerprint, "model": "the one before it was replaced"}
    with pytest.raises(ModelError, match=r"\(model\)"):
        export(data, tmp_path / "out", planned, lambda: encoder)


@pytest.mark.parametrize("make", [lambda path: path.write_text("1"), lambda path: path.symlink_to("/proc/nowhere")])
def test_fault_06_an_output_that_cannot_be_written_is_refused_before_the_model_loads(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    data = Dataset(write_dataset(tmp_path / "data"))
    make(tmp_path / "out")
    with pytest.raises(ArtifactError, match="choose another --out"):
        export(data, tmp_path / "out", ShadeEncoder().fingerprint, never)


# --- the command, with a real model -------------------------------------------------------------------------
# --- images that are not there --------------------------------------------------------------------------------
TAKE_AWAY: dict[str, Callable[[Path], object]] = {
    "missing": lambda images: images.rename(images.with_name("elsewhere")),
    "not a folder": lambda images: (images.rename(images.with_name("elsewhere")), images.write_text("")),
    "holds none of the images": lambda images: (images.rename(images.with_name("elsewhere")), images.mkdir()),
}


@pytest.mark.parametrize("words", TAKE_AWAY)
@pytest.mark.parametrize("policy", ["null", "text_only", "fail"])
def test_without_the_image_folder_nothing_is_loaded_and_nothing_changes(
    tmp_path: Path, policy: ImagePolicy, words: str
) -> None:
    folder = write_dataset(tmp_path / "data", items=20)
    settings, choices = ShadeEncoder().fingerprint, {"shard_size": 8, "on_image_error": policy}
    export(Dataset(folder), tmp_path / "out", settings, ShadeEncoder, **choices)
    stopping = ShadeEncoder()
    stopping.encode_items = stop_after_one_shard(stopping)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        export(Dataset(folder), tmp_path / "begun", settings, lambda: stopping, **choices)
    before = {path: path.read_bytes() for path in tmp_path.glob("*/part*")}
    TAKE_AWAY[words](folder / "images")
    retry, since = Reuse(retry_failed=True), Reuse(changed_since=tmp_path / "out")
    for out, reuse in (("out", retry), ("begun", REUSE_NOTHING), ("begun", Reuse(extend=True)), ("new", since)):
        for distribution in (Distribution(), Distribution(num_workers=2), Distribution(num_workers=2, worker=0)):
            with pytest.raises(DataError, match=f"{words}.*--images"):
                export(
                    Dataset(folder), tmp_path / out, settings, never, reuse=reuse, distribution=distribution, **choices
                )
    assert {path: path.read_bytes() for path in tmp_path.glob("*/part*")} == before
    assert not (tmp_path / "new").exists()
    there = Dataset(folder, images=folder / "elsewhere")
    export(there, tmp_path / "out", settings, never, reuse=retry, **choices)  # the same images: nothing to do
    export(there, tmp_path / "begun", settings, ShadeEncoder, **choices)
    assert verify(tmp_path / "out") == verify(tmp_path / "begun") == []


def stop_after_one_shard(encoder: ShadeEncoder) -> Callable[..., EncodedItems]:
    encode = encoder.encode_items

    def stop(titles: Any, images: Any) -> EncodedItems:
        if encoder.calls:
            raise KeyboardInterrupt
        return encode(titles, images)

    return stop


def test_a_moved_folder_goes_on_with_its_export_and_knows_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(tmp_path / "here/data", items=20)
    (tmp_path / "here/data/images").rename(tmp_path / "here/images")
    meta = json.loads((tmp_path / "here/data/dataset.json").read_text()) | {"image_root": "../images"}
    (tmp_path / "here/data/dataset.json").write_text(json.dumps(meta))
    settings = ShadeEncoder().fingerprint
    export(Dataset(tmp_path / "here/data"), tmp_path / "out", settings, ShadeEncoder, shard_size=8)
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "here").rename(tmp_path / "deep/er/there")
    monkeypatch.chdir(tmp_path / "deep")
    (tmp_path / "link").symlink_to(tmp_path / "deep/er/there/data")
    for data in (Path("er/there/data"), tmp_path / "link"):
        found = Dataset(data)
        assert [(found.image_root / path).is_file() for path in found.image_paths] == [True] * 20
        for reuse in (REUSE_NOTHING, Reuse(retry_failed=True)):
            export(found, tmp_path / "out", settings, never, shard_size=8, reuse=reuse)
    assert verify(tmp_path / "out") == []


def test_a_disk_that_goes_away_under_way_ends_the_export_and_costs_no_row(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", items=300, broken=BROKEN)
    data, calm, leaving = Dataset(folder), ShadeEncoder(), ShadeEncoder()

    def encode_and_leave(titles: Any, images: Any) -> Any:
        if (folder / "images").exists():
            (folder / "images").rename(folder / "away")
        return calm.encode_items(titles, images)

    leaving.encode_items = encode_and_leave  # type: ignore[method-assign]
    choices: dict[str, Any] = {"shard_size": 8}
    export(data, tmp_path / "whole", calm.fingerprint, lambda: calm, **choices)
    before = parts(tmp_path / "whole")
    with pytest.raises(DataError, match="images, is missing"):
        export(data, tmp_path / "out", calm.fingerprint, lambda: leaving, **choices)
    assert sum(row["status"] == "failed" for row in rows_of(tmp_path / "out")) <= len(BROKEN)
    (folder / "away").rename(folder / "images")
    for row in (3, 290):
        Image.new("RGB", (60, 60)).save(folder / f"images/{row}.png")
    (folder / "images/11.png").touch()
    with pytest.raises(DataError, match="images, is missing"):
        export(data, tmp_path / "whole", calm.fingerprint, lambda: leaving, reuse=Reuse(retry_failed=True), **choices)
    kept = parts(tmp_path / "whole")
    assert {name for name in before if kept[name] != before[name]} <= {"part-00000.parquet", "part-00001.parquet"}
    (folder / "away").rename(folder / "images")
    export(data, tmp_path / "whole", calm.fingerprint, lambda: calm, reuse=Reuse(retry_failed=True), **choices)
    assert [row["item_id"] for row in rows_of(tmp_path / "whole") if row["status"] == "failed"] == ["011"]


def test_a_dataset_without_pictures_is_exported_from_its_titles_only(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", items=5, image_path=pa.array([None] * 5, pa.string()))
    meta = json.loads((folder / "dataset.json").read_text()) | {"image_root": None}
    (folder / "dataset.json").write_text(json.dumps(meta))
    shutil.rmtree(folder / "images")
    with pytest.raises(DataError, match=r"prepared without images.*--views text"):
        export(Dataset(folder), tmp_path / "out", ShadeEncoder().fingerprint, never)
    assert not (tmp_path / "out").exists()
    encoder = ShadeEncoder(views=["fused", "text"])
    encoder.encode_items = lambda titles, images: text_alone(titles)  # type: ignore[method-assign]
    manifest = export(Dataset(folder), tmp_path / "out", encoder.fingerprint, lambda: encoder)
    assert manifest is not None and manifest["counts"]["failed"] == 0 and verify(tmp_path / "out") == []


def text_alone(titles: list[str]) -> EncodedItems:
    text = np.array([[len(title), 1, 2] for title in titles], np.float32)
    return EncodedItems(text, text, np.full_like(text, np.nan), np.zeros(len(titles), bool))


def test_items_kept_without_an_image_are_told_before_the_model_loads(tmp_path: Path) -> None:
    paths = ["0.png", None, "2.png", "", "4.png"]
    data = Dataset(write_dataset(tmp_path / "data", items=5, image_path=paths))
    said: list[str] = []

    class Listener(type(SILENT)):  # type: ignore[misc]
        def say(self, text: str, *, warning: bool = False) -> None:
            said.append(text)

    def made(out: str, policy: ImagePolicy) -> dict[str, int]:
        encoder = ShadeEncoder()
        found = export(
            data, tmp_path / out, encoder.fingerprint, lambda: encoder, on_image_error=policy, reporter=Listener()
        )
        return {status: count for status, count in (found or {})["counts"].items() if count}

    assert made("null", "null") == {"ok": 2, "truncated": 1, "failed": 2}
    assert said[0].startswith("2 of 5 items have no image, such as '001', '003': they get no vector; --on-image-error")
    assert made("text", "text_only") == {"ok": 2, "truncated": 1, "text_only": 2}
    with pytest.raises(DataError, match=r"2 of 5 items have no image.*text_only"):
        export(data, tmp_path / "fail", ShadeEncoder().fingerprint, never, on_image_error="fail")


@pytest.fixture
def config(tmp_path: Path, tiny: Callable[[str], Path]) -> ExportConfig:
    return ExportConfig(
        data=write_dataset(tmp_path / "data"),
        backbone=str(tiny("qwen2_5_vl")),
        out=tmp_path / "out",
        shard_size=8,
        dtype="float32",
        device="cpu",
    )


def test_the_real_encoder_writes_its_own_vectors(config: ExportConfig) -> None:
    manifest = export_items.run(config)
    data = Dataset(config.data)
    encoder = ItemEncoder.load(config.backbone, dtype="float32", device="cpu")
    images = [Image.open(data.image_root / path).convert("RGB") for path in data.image_paths]
    alone = [encoder.encode_items([title], [image]) for title, image in zip(data.titles, images, strict=True)]
    for view in schema.VIEWS:
        table = EmbeddingTable.open(config.out, view)
        assert table.item_ids == data.item_ids
        expected = np.concatenate([getattr(row, view) for row in alone])
        np.testing.assert_allclose(table.vectors, expected, atol=1e-4)
        assert len(np.unique(table.vectors.round(5), axis=0)) == ITEMS  # no two items alike
    assert manifest["dim"] == encoder.dim == 64
    assert verify(config.out) == []


def test_fault_14_batch_size_threads_and_cache_may_change_between_runs_and_pixels_may_not(
    config: ExportConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = export_items.run(config)
    assert not {"device", "token_budget", "vision_cache", "image_timeout"} & set(manifest["settings"])
    before = parts(config.out)
    (config.out / "part-00001.parquet").unlink()
    monkeypatch.setattr(worker, "READERS", 1)
    export_items.run(replace(config, token_budget=40, vision_cache="off", image_timeout=5.0))
    assert parts(config.out) == before and verify(config.out) == []
    with pytest.raises(ArtifactError, match="max_pixels was 50176, now 3136"):
        export_items.run(replace(config, max_pixels=56 * 56))
    with pytest.raises(ArtifactError, match=r"prompt_hash was .*prompt_mode was 'raw', now 'chat'"):
        export_items.run(replace(config, prompt_mode="chat"))


def test_too_many_failures_end_with_exit_code_6_and_a_complete_folder(
    config: ExportConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    (config.data / "images" / "0.png").write_bytes(b"")
    with pytest.raises(FailureLimitError, match=r"1 of 20 items failed \(5\.0%\)") as refusal:
        export_items.run(config)
    assert refusal.value.exit_code == 6 and verify(config.out) == []
    told = " ".join(capsys.readouterr().err.split())
    assert "20 in 3 shards" in told and "failed 1" in told
    assert export_items.run(replace(config, max_failures=0.05))["counts"]["failed"] == 1


def stopping_command(config: ExportConfig, ready: Path) -> list[str]:
    """The real command line; its process waits for good in the middle of the second shard and says so."""
    code = f"""
import time
from pathlib import Path
from vlm2rec.pipelines.cli import main
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
encode, calls = ItemEncoder.encode_items, []
def stop(self, titles, images):
    calls.append(1)
    if len(calls) == 2:
        Path({str(ready)!r}).touch()
        time.sleep(120)
    return encode(self, titles, images)
ItemEncoder.encode_items = stop
main()
"""
    flags = ["--data", config.data, "--backbone", config.backbone, "--out", config.out, "--shard-size", 8]
    return [sys.executable, "-c", code, "export-items", *map(str, flags), "--dtype", "float32"]


def stopped(config: ExportConfig, ready: Path, number: signal.Signals) -> tuple[int, str]:
    """Send a signal to a real export in the middle of its second shard; return exit code and what it said."""
    process = subprocess.Popen(
        stopping_command(config, ready), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 100
        # a thread writes the first shard while the second is encoded: its record is the last thing it writes
        while not (ready.exists() and (config.out / "_part-00000.json").exists()):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        process.send_signal(number)
        told = process.communicate(timeout=100)[1]
    finally:
        process.kill()
    return process.returncode, " ".join(told.split())


def test_fault_01_killed_in_a_shard_the_same_command_finishes_as_if_nothing_had_happened(
    config: ExportConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code, _ = stopped(config, tmp_path / "ready", signal.SIGKILL)
    assert code == -signal.SIGKILL
    left = sorted(path.name for path in config.out.iterdir())
    assert left == [schema.STATE_FILE, LOCK_FILE, "_part-00000.json", "part-00000.parquet"]
    first = config.out.joinpath("part-00000.parquet").stat().st_mtime_ns
    export_items.run(config)
    assert "which is gone" in caplog.text
    assert config.out.joinpath("part-00000.parquet").stat().st_mtime_ns == first
    export_items.run(replace(config, out=tmp_path / "whole"))
    assert parts(config.out) == parts(tmp_path / "whole")
    assert sorted(path.name for path in config.out.iterdir()) == [schema.MANIFEST_FILE, *parts(config.out)]


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_fault_04_a_stop_signal_keeps_finished_shards_frees_the_lock_and_says_how_to_go_on(
    config: ExportConfig, tmp_path: Path, number: signal.Signals, expected: int
) -> None:
    code, told = stopped(config, tmp_path / "ready", number)
    assert code == expected
    assert "1 of 3 shards are finished and kept; run the same command again to continue" in told
    assert "Traceback" not in told
    assert sorted(path.name for path in config.out.iterdir()) == [
        schema.STATE_FILE,
        "_part-00000.json",
        "part-00000.parquet",
    ]


# --- before the start ---------------------------------------------------------------------------------------
def everything_below(*folders: Path) -> dict[Path, tuple[int, int]]:
    found = {path: path.stat() for folder in folders for path in folder.rglob("*")}
    return {path: (state.st_size, state.st_mtime_ns) for path, state in found.items()}


def test_a_dry_run_says_what_is_left_what_it_takes_and_the_licence_and_touches_nothing(
    config: ExportConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = replace(config, dry_run=True, vision_cache="auto")
    before = everything_below(config.data)
    whole = export_items.run(asked)
    assert everything_below(config.data) == before and not config.out.exists()
    assert (whole["items_left"], whole["shards_left"], whole["bytes_left"]) == (20, 3, 20 * 3 * 64 * 4)
    assert whole["sample"] == 20 and whole["seconds"] > 0 and whole["memory_bytes"] > 50 * 2**20
    told = " ".join(capsys.readouterr().err.split())
    assert "nothing was written" in told and "20 in 3 shards" in told and "licence not stated here" in told

    export_items.run(config)
    (config.out / schema.MANIFEST_FILE).rename(config.data / "kept.json")
    state = {name: json.loads((config.data / "kept.json").read_text())[name] for name in ("schema_version", "settings")}
    (config.out / schema.STATE_FILE).write_text(json.dumps(state | {"shard_size": 8}))
    shard = json.loads((config.data / "kept.json").read_text())["shards"][0]
    (config.out / "_part-00000.json").write_text(json.dumps(shard))
    before = everything_below(config.data, config.out)
    rest = export_items.run(asked)
    assert (rest["items"], rest["items_left"], rest["shards_left"], rest["sample"]) == (20, 12, 2, 12)
    assert everything_below(config.data, config.out) == before
    with pytest.raises(ArtifactError, match="max_pixels was 50176, now 3136"):
        export_items.run(replace(asked, max_pixels=56 * 56))
