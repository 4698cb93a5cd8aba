"""`verify` finds whatever is wrong with an embeddings folder, and nothing in a sound one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from children import command
from embedding_folder import write_embeddings

from vlm2rec.downstream.evaluation.geometry import effective_ranks, first_vectors
from vlm2rec.embedder.contract import schema, storage
from vlm2rec.embedder.contract.errors import ArtifactError
from vlm2rec.embedder.export import shard_file, shards
from vlm2rec.embedder.export.lock import writing
from vlm2rec.embedder.export.plan import Plan, plan_shards
from vlm2rec.embedder.export.verify import verify
from vlm2rec.pipelines import finetune_probe
from vlm2rec.pipelines import verify as stage
from vlm2rec.pipelines.config import VerifyConfig

DIM = 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten items in three shards: item 1 cut, item 4 without image, item 6 failed."""
    plan = plan_shards(
        [f"i{n}" for n in range(10)],
        4,
        {"dim": DIM, "views": ["fused", "text", "image"], "storage": "float32", "on_image_error": "text_only"},
    )
    out = tmp_path / "emb"
    with writing(out):
        done = shards.begin(out, plan).finished
        for number in range(len(plan)):
            done[number] = shards.publish_shard(out, plan, number, table_of(plan, number), 1.0)
        shards.finish(out, plan, done)
    return out


def table_of(plan: Plan, number: int) -> pa.Table:
    rows = np.array(plan.rows(number))
    text = np.random.default_rng(number).normal(size=(len(rows), DIM)).astype(np.float32)
    image = np.random.default_rng(number + 100).normal(size=(len(rows), DIM)).astype(np.float32)
    blind, failed = rows == 4, rows == 6
    fused = np.where(blind[:, None], text, text + image)
    image[blind] = np.nan
    for vectors in (fused, text, image):
        vectors[failed] = np.nan
    status = ["truncated" if r == 1 else "text_only" if r == 4 else "failed" if r == 6 else "ok" for r in rows]
    error = ["unreadable" if r in (4, 6) else None for r in rows]
    return shard_file.shard_table(
        plan, plan.rows(number), {"fused": fused, "text": text, "image": image}, status, error
    )


def change_manifest(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / schema.MANIFEST_FILE).read_text())
    (folder / schema.MANIFEST_FILE).write_text(json.dumps({**manifest, **changes}))


def replace_shard(folder: Path, number: int, change: Callable[[pa.Table], pa.Table]) -> None:
    """Write a changed shard and record it in the manifest as if it had been exported so."""
    path = folder / schema.shard_name(number)
    table = change(pq.read_table(path))
    pq.write_table(table, path)
    records = json.loads((folder / schema.MANIFEST_FILE).read_text())["shards"]
    records[number] |= {"rows": len(table), "bytes": path.stat().st_size, "sha256": storage.sha256_file(path)}
    change_manifest(folder, shards=records)


def with_column(name: str, make: Callable[[list[Any]], list[Any]]) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        place = table.column_names.index(name)
        field = table.schema.field(name)
        return table.set_column(place, field, pa.array(make(table[name].to_pylist()), field.type))

    return change


def found(folder: Path) -> str:
    return "\n".join(map(str, verify(folder)))


def test_a_sound_folder_has_no_problem(folder: Path) -> None:
    assert verify(folder) == []


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_folder_from_another_hand_that_keeps_the_contract_has_no_problem(tmp_path: Path, dtype: str) -> None:
    random = np.random.default_rng(0)
    text, image = random.normal(size=(2, 30, 7)).astype(np.float32)
    fused = text + image
    for vectors in (fused, text, image):
        vectors[3] = np.nan
    ids = [f"i{n}" for n in range(30)]
    write_embeddings(tmp_path / "emb", ids, fused, text, image, shard_size=8, dtype=dtype)
    assert verify(tmp_path / "emb") == []
    write_embeddings(tmp_path / "fused only", ids, fused, dtype=dtype)
    assert verify(tmp_path / "fused only") == []


def test_fault_10_a_single_flipped_bit_anywhere_is_found(folder: Path) -> None:
    whole = (folder / "part-00001.parquet").read_bytes()
    for place in (4, len(whole) // 3, len(whole) // 2, len(whole) - 5):
        flipped = bytearray(whole)
        flipped[place] ^= 0x10
        (folder / "part-00001.parquet").write_bytes(flipped)
        assert found(folder) == ("part-00001.parquet: its bytes have changed since it was written (SHA-256 differs)")


def test_fault_11_missing_and_truncated_shards_are_each_named(folder: Path) -> None:
    (folder / "part-00000.parquet").unlink()
    whole = (folder / "part-00002.parquet").read_bytes()
    (folder / "part-00002.parquet").write_bytes(whole[:-7])
    assert [str(problem) for problem in verify(folder)] == [
        "part-00000.parquet: is missing",
        f"part-00002.parquet: has {len(whole) - 7} bytes, the manifest says {len(whole)}",
    ]


def test_fault_11_foreign_files_are_named_and_hidden_ones_of_others_are_not(folder: Path) -> None:
    for name in ("part-00099.parquet", "notes.txt", ".part-00001.parquet.77.tmp", ".DS_Store"):
        (folder / name).write_bytes(b"1")
    (folder / "more").mkdir()
    assert {problem.file for problem in verify(folder)} == {
        "part-00099.parquet",
        "notes.txt",
        ".part-00001.parquet.77.tmp",
        "more",
    }


def test_an_id_in_two_shards_is_found(folder: Path) -> None:
    replace_shard(folder, 2, with_column("item_id", lambda ids: ["i0", *ids[1:]]))
    assert found(folder) == "all shards: 1 ids occur more than once, among them ['i0']"


def test_rows_that_are_missing_or_too_many_are_found(folder: Path) -> None:
    replace_shard(folder, 2, lambda table: table.slice(0, 1))
    assert "num_items is 10, the shards hold 9 rows" in found(folder)
    records = json.loads((folder / schema.MANIFEST_FILE).read_text())["shards"]
    records[0]["rows"] = 5
    change_manifest(folder, shards=records)
    assert "part-00000.parquet: has 4 rows, the manifest says 5" in found(folder)


def test_status_counts_that_do_not_add_up_are_found(folder: Path) -> None:
    change_manifest(folder, counts={"ok": 8, "truncated": 1, "text_only": 1})
    assert found(folder).splitlines() == [
        "_manifest.json: counts[failed] is 0, the shards hold 1",
        "_manifest.json: counts[ok] is 8, the shards hold 7",
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_found(folder: Path, value: float) -> None:
    replace_shard(folder, 1, with_column("text", lambda rows: [rows[0], [1.0, value, 1.0, 1.0, 1.0], *rows[2:]]))
    assert found(folder) == "part-00001.parquet: 1 rows hold NaN or infinity in text, the first is item 'i5'"


@pytest.mark.parametrize(
    ("number", "column", "change", "told"),
    [
        (
            0,
            "image",
            lambda rows: [None, *rows[1:]],
            "1 rows have no vector in image, though their status promises one",
        ),
        (1, "image", lambda rows: [[1.0] * DIM, *rows[1:]], "1 rows have a vector in image, though their status"),
        (1, "fused", lambda rows: [*rows[:2], [1.0] * DIM, rows[3]], "1 rows have a vector in fused"),
        (1, "error", lambda rows: [None] * 4, "1 rows failed without a reason, the first is item 'i6'"),
        (0, "status", lambda rows: ["fine", *rows[1:]], "1 rows have an unknown status, the first is item 'i0'"),
    ],
)
def test_a_status_that_does_not_fit_the_row_is_found(
    folder: Path, number: int, column: str, change: Callable[[list[Any]], list[Any]], told: str
) -> None:
    replace_shard(folder, number, with_column(column, change))
    assert f"part-0000{number}.parquet: {told}" in found(folder)


def test_another_dimension_or_number_format_is_found(folder: Path) -> None:
    change_manifest(folder, dim=7)
    assert "part-00000.parquet: has other columns or another dimension than float32[7]" in found(folder)
    change_manifest(folder, dim=DIM, dtype="float16")
    assert "part-00000.parquet: has other columns or another dimension than float16[5]" in found(folder)


def test_a_shard_of_other_settings_is_found_by_its_stamp(folder: Path) -> None:
    change = {b"vlm2rec.fingerprint": b"other"}
    replace_shard(folder, 0, lambda table: table.replace_schema_metadata({**table.schema.metadata, **change}))
    assert found(folder) == "part-00000.parquet: was written with other settings than the manifest's"


@pytest.mark.parametrize("value", ["null", float("nan"), float("inf"), "\udcff"])
def test_settings_changed_afterwards_are_found(folder: Path, value: object) -> None:
    settings = json.loads((folder / schema.MANIFEST_FILE).read_text())["settings"]
    change_manifest(folder, settings={**settings, "on_image_error": value})
    assert found(folder) == "_manifest.json: the fingerprint is not that of the settings"


def test_a_manifest_that_leads_out_of_the_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "part-00000.parquet").rename(tmp_path / "part-00000.parquet")
    records = json.loads((folder / schema.MANIFEST_FILE).read_text())["shards"]
    records[0]["file"] = "../part-00000.parquet"
    change_manifest(folder, shards=records)
    assert found(folder) == "_manifest.json: shard 0 is not recorded as part-00000.parquet"


@pytest.mark.parametrize("key", ["dim", "dtype", "views", "num_items", "counts", "shards", "settings"])
def test_a_manifest_that_lacks_a_key_is_a_problem_and_no_crash(folder: Path, key: str) -> None:
    change_manifest(folder, **{key: None})
    assert f"{key} is missing" in found(folder)


def test_fault_12_a_newer_schema_and_an_unfinished_folder_are_refused(folder: Path) -> None:
    change_manifest(folder, schema_version=2)
    with pytest.raises(ArtifactError, match="schema version 2"):
        verify(folder)
    (folder / schema.MANIFEST_FILE).unlink()
    with pytest.raises(ArtifactError, match="run the command that wrote it"):
        verify(folder)


def test_the_effective_rank_is_the_number_of_directions_in_use(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    axes = np.concatenate([np.eye(4), -np.eye(4)] * 50).astype(np.float32)  # four directions, used alike
    line = np.where(random.random((400, 1)) < 0.5, 1, -1) * np.ones((1, 4), np.float32)  # one direction
    almost = np.ones((400, 4), np.float32) + random.normal(size=(400, 4)).astype(np.float32) * 1e-4
    ids = [f"i{n}" for n in range(400)]
    write_embeddings(tmp_path / "emb", ids, axes, line, almost, shard_size=100)
    ranks = effective_ranks(first_vectors(tmp_path / "emb"))
    assert ranks["fused"] == pytest.approx(4, abs=0.01)
    assert ranks["text"] == pytest.approx(1, abs=0.01)
    assert ranks["image"] == 0


def test_verify_prints_the_rank_that_the_training_curves_and_the_report_show(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(1)
    vectors = (random.normal(size=(64, 12)) * 0.6 ** np.arange(12)).astype(np.float32)
    write_embeddings(tmp_path / "emb", [f"i{n}" for n in range(64)], vectors)
    stage.run(VerifyConfig(embeddings=tmp_path / "emb"))
    printed = re.search(r"effective rank, fused\s+(\S+)", capsys.readouterr().err)
    # the row of curves.json from which the report draws
    row = finetune_probe._measured("fused", vectors, vectors, np.stack([np.arange(64), np.arange(64)[::-1]], axis=1))
    singular = np.linalg.svd(vectors - vectors.mean(0), compute_uv=False)
    assert printed is not None and printed[1] == f"{row['rank_fused']:.1f}"
    share = singular / singular.sum()
    assert row["rank_fused"] < 0.8 * np.exp(-share @ np.log(share)), "singular values would give another number"


def test_fault_39_collapsed_vectors_are_a_warning_and_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [f"i{n}" for n in range(32)]
    write_embeddings(tmp_path / "emb", ids, np.ones((32, 4), np.float32))
    stage.run(VerifyConfig(embeddings=tmp_path / "emb"))
    told = " ".join(capsys.readouterr().err.split())
    assert "no problem" in told and "warning: the fused vectors hardly differ" in told


def test_the_command_exits_0_on_a_sound_folder_and_5_naming_the_damage(folder: Path) -> None:
    sound = command("verify", folder)
    assert sound.returncode == 0 and "10 in 3 shards" in sound.stderr and sound.stdout == ""
    os.truncate(folder / "part-00001.parquet", 100)
    (folder / "stray.txt").write_text("1")
    damaged = command("verify", folder)
    assert damaged.returncode == 5 and "Traceback" not in damaged.stderr
    told = " ".join(damaged.stderr.split())
    assert "has 2 problems" in told and "part-00001.parquet: has 100 bytes" in told and "stray.txt" in told


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_path_that_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("1")
    with pytest.raises(ArtifactError, match="not a folder"):
        stage.run(VerifyConfig(embeddings=tmp_path / name))
