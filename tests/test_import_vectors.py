"""`vlm2rec import-vectors`: every item gets its own vector or a reason, whatever order, type or shape the file has."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from recommender_world import ODD_IDS, cyclic_sequences, write_dataset

from vlm2rec.downstream.table import EmbeddingTable
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, DataError, FailureLimitError, Vlm2RecError
from vlm2rec.embedder.export.verify import verify
from vlm2rec.pipelines import cli, evaluate, import_vectors
from vlm2rec.pipelines import verify as verify_command
from vlm2rec.pipelines.config import EvaluateConfig, ImportVectorsConfig, VerifyConfig

ITEMS = [*ODD_IDS, *(f"i{number}" for number in range(16))]
DIM = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("world") / "data", cyclic_sequences(ITEMS, 12), ITEMS)


def drawn(rows: int = len(ITEMS), dim: int = DIM, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)


def parquet(path: Path, ids: Sequence[Any], **columns: Any) -> Path:
    """Write a Parquet file; a column is a matrix, or rows with None for null."""
    arrays = {name: pa.array(list(values)) for name, values in columns.items()}
    pq.write_table(pa.table({"item_id": pa.array(list(ids)), **arrays}), path)
    return path


def npy(path: Path, values: Any) -> Path:
    np.save(path, values)
    return path


def run(data: Path, file: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return import_vectors.run(ImportVectorsConfig(data=data, file=file, out=out, **settings))


def rows(out: Path) -> dict[str, dict[str, Any]]:
    return {row["item_id"]: row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()}


# --- which vector becomes whose ---------------------------------------------------------------------------------
@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_a_shuffled_file_gives_every_item_its_own_vector_in_a_complete_folder(
    data: Path, tmp_path: Path, storage: str
) -> None:
    vectors, order = drawn(), np.random.default_rng(1).permutation(len(ITEMS))
    file = parquet(tmp_path / "v.parquet", [ITEMS[i] for i in order], vector=vectors[order])
    manifest = run(data, file, tmp_path / "out", shard_size=7, storage=storage)
    assert verify(tmp_path / "out") == []
    assert manifest["counts"]["ok"] == manifest["num_items"] == len(ITEMS)
    assert (manifest["views"], manifest["dim"], len(manifest["shards"])) == (["fused"], DIM, 5)
    table = EmbeddingTable.open(tmp_path / "out")
    assert table.item_ids == ITEMS
    np.testing.assert_allclose(table.vectors, vectors, rtol=2e-3 if storage == "float16" else 0)


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float32()),
        pa.list_(pa.float64()),
        pa.large_list(pa.float16()),
        pa.list_(pa.float32(), 2),
        pa.list_(pa.int8(), 2),
    ],
    ids=str,
)
def test_every_list_type_is_read_and_a_null_becomes_a_row_with_a_reason(
    data: Path, tmp_path: Path, kind: pa.DataType
) -> None:
    values: list[list[int] | None] = [[row, -row] for row in range(len(ITEMS))]
    values[3] = values[20] = None
    table = pa.table({"item_id": ITEMS, "v": pa.array(values, kind)})
    pq.write_table(table.slice(0, 11), tmp_path / "a.parquet")
    with pq.ParquetWriter(tmp_path / "v.parquet", table.schema) as writer:  # row groups become chunks
        for start in range(0, len(ITEMS), 11):
            writer.write_table(table.slice(start, 11))
    manifest = run(data, tmp_path / "v.parquet", tmp_path / "out", max_failures=0.1)
    found = rows(tmp_path / "out")
    assert [found[item]["fused"] for item in ITEMS] == values
    assert {item: row["error"] for item, row in found.items() if row["error"]} == {
        ITEMS[3]: "no fused vector in the file",
        ITEMS[20]: "no fused vector in the file",
    }
    assert (manifest["counts"]["ok"], manifest["counts"]["failed"]) == (len(ITEMS) - 2, 2)
    assert verify(tmp_path / "out") == []


def test_missing_items_are_failures_and_unknown_ids_are_counted(data: Path, tmp_path: Path) -> None:
    file = parquet(tmp_path / "v.parquet", [*ITEMS[1:], "stranger", "I0"], vector=drawn(len(ITEMS) + 1))
    with pytest.raises(FailureLimitError, match=r"complete, but 1 of 30 items failed \(3.3%\).*into a new --out"):
        run(data, file, tmp_path / "out")
    assert verify(tmp_path / "out") == []
    manifest = schema.read_manifest(tmp_path / "out")
    assert (manifest["counts"]["failed"], manifest["settings"]["extra_ids"]) == (1, 2)
    assert rows(tmp_path / "out")[ITEMS[0]]["error"] == "the file lacks this id"


def test_white_space_at_the_ends_of_ids_does_not_count(data: Path, tmp_path: Path) -> None:
    vectors = drawn()
    file = parquet(
        tmp_path / "v.parquet", [f" {item}" if n % 2 else f"{item}\t" for n, item in enumerate(ITEMS)], v=vectors
    )
    assert run(data, file, tmp_path / "out")["settings"]["extra_ids"] == 0
    assert [row["fused"] for row in rows(tmp_path / "out").values()] == vectors.tolist()


def test_ids_that_are_only_spelled_otherwise_are_told(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [ITEMS[0].upper() + "\u200b", *ITEMS[1:], "stranger"]
    run(data, parquet(tmp_path / "v.parquet", ids, v=drawn(len(ids))), tmp_path / "out", max_failures=0.1)
    told = " ".join(capsys.readouterr().err.split())
    assert "2 ids of" in told and "'stranger' (row 31)" in told
    assert f"the dataset has {ITEMS[0]!r} for" in told


def test_numeric_ids_are_the_ids_as_written(tmp_path: Path) -> None:
    ids = [str(number) for number in range(10, 30)]
    data = write_dataset(tmp_path / "data", cyclic_sequences(ids, 5), ids)
    file = parquet(tmp_path / "v.parquet", range(10, 30), vector=np.eye(20, dtype=np.float32))
    run(data, file, tmp_path / "out")
    assert rows(tmp_path / "out")["13"]["fused"] == np.eye(20)[3].tolist()


# --- views ------------------------------------------------------------------------------------------------------
def test_text_and_image_columns_are_summed_and_an_item_without_image_keeps_its_text(data: Path, tmp_path: Path) -> None:
    text, image = drawn(seed=1), drawn(seed=2)
    pictures = [None if row == 4 else list(vector) for row, vector in enumerate(image)]
    manifest = run(data, parquet(tmp_path / "v.parquet", ITEMS, text=text, image=pictures), tmp_path / "out")
    found = rows(tmp_path / "out")
    np.testing.assert_array_equal(found[ITEMS[5]]["fused"], text[5] + image[5])
    assert found[ITEMS[4]]["fused"] == found[ITEMS[4]]["text"] == text[4].tolist()
    assert (found[ITEMS[4]]["image"], found[ITEMS[4]]["status"]) == (None, "text_only")
    assert manifest["views"] == ["fused", "text", "image"]
    assert verify(tmp_path / "out") == []


def test_normalised_fusion_adds_unit_vectors(data: Path, tmp_path: Path) -> None:
    text, image = drawn(seed=1), 100 * drawn(seed=2)
    file = parquet(tmp_path / "v.parquet", ITEMS, text=text, image=image)
    run(data, file, tmp_path / "out", fusion_norm="normalised")
    expected = text[7] / np.linalg.norm(text[7]) + image[7] / np.linalg.norm(image[7])
    np.testing.assert_allclose(rows(tmp_path / "out")[ITEMS[7]]["fused"], expected, atol=1e-6)


@pytest.mark.parametrize("image_dim", [DIM, DIM + 3])
def test_a_view_that_is_hidden_in_the_fused_vectors_is_told(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], image_dim: int
) -> None:
    text, image = drawn(seed=1), drawn(dim=image_dim, seed=2)
    ratio = np.median(np.linalg.norm(image, axis=1)) / np.median(np.linalg.norm(text, axis=1))

    def told(factor: float, **settings: Any) -> str:
        out = tmp_path / f"{factor}{len(settings)}"
        run(data, parquet(tmp_path / "v.parquet", ITEMS, text=text, image=factor / ratio * image), out, **settings)
        imported = capsys.readouterr().err
        verify_command.run(VerifyConfig(embeddings=out))
        assert ("times as long" in imported) == ("times as long" in capsys.readouterr().err)
        return " ".join(imported.split())

    assert "the image vectors are 4 times as long as the text vectors (median), so fused is nearly the image" in told(4)
    assert "the text vectors are 4 times as long as the image vectors (median)" in told(0.25)
    assert "times as long" not in told(2) + told(4, fusion_norm="normalised")


@pytest.mark.parametrize(
    ("made_with", "advice"),
    [
        ({"adapter": {"name": "ours"}}, "finetune --fusion-norm normalised"),
        ({"adapter": {"name": "theirs", "canary": False}}, "; --fusion-norm normalised"),
        ({}, "; --fusion-norm normalised"),
    ],
)
def test_the_advice_is_one_that_is_taken(
    capsys: pytest.CaptureFixture[str], made_with: dict[str, Any], advice: str
) -> None:
    settings = {"fusion_norm": "raw", "fusion": "external", "adapter": "80cf" if made_with else None}
    vectors = {"text": drawn(), "image": 4 * drawn()}
    verify_command.warn_of_lengths({"settings": settings, schema.MADE_WITH: made_with}, vectors)
    assert advice in " ".join(capsys.readouterr().err.split())
    verify_command.warn_of_lengths({"settings": settings | {"fusion": "internal"}}, vectors)
    assert capsys.readouterr().err == ""


def test_a_fused_column_is_taken_as_it_is(data: Path, tmp_path: Path) -> None:
    file = parquet(tmp_path / "v.parquet", ITEMS, text=drawn(seed=1), image=drawn(seed=2), fused=drawn(seed=3))
    run(data, file, tmp_path / "out")
    assert rows(tmp_path / "out")[ITEMS[9]]["fused"] == drawn(seed=3)[9].tolist()


def test_an_item_without_text_is_a_failure_with_no_vector_at_all(data: Path, tmp_path: Path) -> None:
    titles = [None if row == 2 else list(vector) for row, vector in enumerate(drawn(seed=1))]
    file = parquet(tmp_path / "v.parquet", ITEMS, text=titles, image=drawn(seed=2))
    run(data, file, tmp_path / "out", max_failures=1)
    row = rows(tmp_path / "out")[ITEMS[2]]
    assert row["error"] == "no fused, text vector in the file"
    assert (row["fused"], row["text"], row["image"]) == (None, None, None)
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("view", ["text", "image"])
def test_a_single_modality_is_its_own_fused_vector(data: Path, tmp_path: Path, view: str) -> None:
    file = parquet(tmp_path / "v.parquet", ITEMS, bert=drawn(), other=drawn(seed=1))
    manifest = run(data, file, tmp_path / "out", column="bert", view=view)
    row = rows(tmp_path / "out")[ITEMS[6]]
    assert row["fused"] == row[view] == drawn()[6].tolist()
    assert manifest["views"] == ["fused", view]
    assert verify(tmp_path / "out") == []


# --- npy --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["npy", "txt", "parquet"])
def test_an_npy_takes_its_ids_from_a_second_file(data: Path, tmp_path: Path, form: str) -> None:
    order = np.random.default_rng(1).permutation(len(ITEMS))
    ids = [ITEMS[i] for i in order]
    if form == "npy":
        path = npy(tmp_path / "ids.npy", np.array(ids))
    elif form == "txt":
        path = tmp_path / "ids.txt"
        path.write_text("\n".join(ids) + "\n", encoding="utf-8")
    else:
        path = parquet(tmp_path / "ids.parquet", ids)
    run(data, npy(tmp_path / "v.npy", drawn()[order].astype(np.float64)), tmp_path / "out", ids=path)
    np.testing.assert_array_equal(EmbeddingTable.open(tmp_path / "out").vectors, drawn())


def test_row_i_is_item_i_only_where_the_user_says_so_and_the_counts_agree(data: Path, tmp_path: Path) -> None:
    file = npy(tmp_path / "v.npy", drawn())
    with pytest.raises(ConfigError, match=r"an .npy without ids.*--in-item-order"):
        run(data, file, tmp_path / "out")
    run(data, file, tmp_path / "out", in_item_order=True)
    np.testing.assert_array_equal(EmbeddingTable.open(tmp_path / "out").vectors, drawn())
    with pytest.raises(DataError, match=r"has 31 rows and .*items.parquet has 30: row 0 may be a padding row"):
        run(data, npy(tmp_path / "padded.npy", drawn(31)), tmp_path / "other", in_item_order=True)


# --- vectors of different lengths -------------------------------------------------------------------------------
@pytest.mark.parametrize("norm", ["raw", "normalised"])
def test_text_and_image_of_different_lengths_are_put_end_to_end(data: Path, tmp_path: Path, norm: str) -> None:
    text, image = drawn(dim=3, seed=1), drawn(dim=5, seed=2)
    file = parquet(tmp_path / "v.parquet", ITEMS, text=text, image=[None, *image[1:]])
    manifest = run(data, file, tmp_path / "out", fusion_norm=norm, max_failures=0.1)
    assert verify(tmp_path / "out") == []
    assert (manifest["dim"], manifest["dims"]) == (8, {"fused": 8, "text": 3, "image": 5})
    assert manifest["settings"]["fused"] == f"text ‖ image, {norm}"
    parts = [text, image]
    if norm == "normalised":
        parts = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts]
    expected = dict(zip(("text", "image", "fused"), (text, image, np.concatenate(parts, axis=1)), strict=True))
    for view, vectors in expected.items():
        table = EmbeddingTable.open(tmp_path / "out", view)
        np.testing.assert_allclose(table.vectors[1:], vectors[1:], rtol=1e-6)
    without = rows(tmp_path / "out")[ITEMS[0]]
    assert (without["status"], without["fused"], without["text"]) == ("failed", None, None), "it needs both"
    assert without["error"] == "no fused, image vector in the file"


def test_a_fused_column_may_have_a_length_of_its_own(data: Path, tmp_path: Path) -> None:
    fused, text = drawn(dim=7), drawn(dim=3, seed=1)
    manifest = run(data, parquet(tmp_path / "v.parquet", ITEMS, fused=fused, text=text), tmp_path / "out")
    assert verify(tmp_path / "out") == []
    assert (manifest["dim"], manifest["dims"]) == (7, {"fused": 7, "text": 3})
    assert manifest["settings"]["fused"] == "as given"
    np.testing.assert_array_equal(EmbeddingTable.open(tmp_path / "out", "text").vectors, text)


def test_principal_components_of_different_lengths_are_refused(data: Path, tmp_path: Path) -> None:
    file = parquet(tmp_path / "v.parquet", ITEMS, text=drawn(dim=3), image=drawn(dim=5))
    with pytest.raises(ConfigError, match=r"--pca with vectors of different lengths: fused 8, text 3, image 5"):
        run(data, file, tmp_path / "out", pca=2)
    assert not (tmp_path / "out").exists()


# --- PCA --------------------------------------------------------------------------------------------------------
def test_pca_reduces_all_views_alike_and_says_what_it_kept(data: Path, tmp_path: Path) -> None:
    text, image = drawn(seed=1) * np.arange(1, DIM + 1), drawn(seed=2)
    file = parquet(tmp_path / "v.parquet", ITEMS[1:], text=text[1:], image=image[1:])
    manifest = run(data, file, tmp_path / "out", pca=3, max_failures=0.1)
    tables = {view: EmbeddingTable.open(tmp_path / "out", view).vectors[1:] for view in schema.VIEWS}
    assert manifest["dim"] == tables["fused"].shape[1] == 3
    np.testing.assert_allclose(tables["fused"], tables["text"] + tables["image"], atol=1e-4)
    np.testing.assert_allclose(tables["fused"].mean(0), 0, atol=1e-5)
    fused = (text + image)[1:].astype(np.float64)
    values = np.linalg.svd(fused - fused.mean(0), compute_uv=False) ** 2
    stored = manifest["settings"]["pca"]
    assert (stored["components"], stored["from_dim"], set(stored["explained"])) == (3, DIM, set(schema.VIEWS))
    assert stored["explained"]["fused"] == pytest.approx(values[:3].sum() / values.sum(), abs=1e-4)
    assert verify(tmp_path / "out") == []


def test_more_components_than_dimensions_is_an_error(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"at most {DIM}"):
        run(data, npy(tmp_path / "v.npy", drawn()), tmp_path / "out", in_item_order=True, pca=DIM + 1)
    assert not (tmp_path / "out").exists()


# --- bad input --------------------------------------------------------------------------------------------------
def broken(value: float, row: slice | int = 3) -> np.ndarray:
    vectors = drawn().astype(np.float64)
    vectors[row, 0 if isinstance(row, int) else slice(None)] = value
    return vectors


def ragged() -> list[list[float]]:
    return [[1.0] * (4 if row == 5 else 3) for row in range(len(ITEMS))]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"v": broken(np.nan)}, "NaN or infinity in the fused vectors of 1 items, the first is item 'null'"),
        ({"v": broken(np.nan, slice(3, 4))}, "NaN or infinity in the fused vectors of 1 items"),
        ({"v": broken(np.inf)}, "NaN or infinity"),
        ({"v": broken(1e300)}, "NaN or infinity"),
        ({"v": ragged()}, "different lengths: item '007' has 3, item 'nan' has 4"),
        ({"v": pa.array([[]] * len(ITEMS), pa.list_(pa.float32()))}, "empty vector"),
        ({"a": drawn(), "b": drawn()}, "2 columns of lists of numbers: a, b"),
        ({"a": [1.0] * len(ITEMS)}, "0 columns of lists of numbers"),
        ({"a": [["x"]] * len(ITEMS)}, "0 columns of lists of numbers"),
        ({"v": pa.nulls(len(ITEMS), pa.list_(pa.float32()))}, "holds only null"),
    ],
)
def test_vectors_that_cannot_be_used_are_named_and_nothing_is_written(
    data: Path, tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    arrays = {name: c if isinstance(c, pa.Array) else pa.array(list(c)) for name, c in columns.items()}
    pq.write_table(pa.table({"item_id": ITEMS, **arrays}), tmp_path / "v.parquet")
    with pytest.raises(DataError, match=message):
        run(data, tmp_path / "v.parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["i0", *ITEMS[1:]], r"1 ids occur more than once .* 'i0'"),
        ([None, *ITEMS[1:]], "1 ids .* are null"),
        ([float(row) for row in range(len(ITEMS))], "ids .* are double"),
        ([f"x{row}" for row in range(len(ITEMS))], r"none of the 30 ids .* begin with 'x0', 'x1', 'x2'.*'007', '7'"),
    ],
)
def test_ids_that_cannot_be_used_are_named(data: Path, tmp_path: Path, ids: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        run(data, parquet(tmp_path / "v.parquet", ids, vector=drawn()), tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"item_id_column": "item"}, DataError, "no column 'item' .did you mean 'item_id'"),
        ({"column": "vectr"}, DataError, "no column 'vectr' .did you mean 'vector'"),
        ({"column": "item_id"}, DataError, "is string"),
        ({"ids": Path("ids.txt")}, ConfigError, "--ids with a Parquet file"),
        ({"in_item_order": True}, ConfigError, "--in-item-order with a Parquet file"),
    ],
)
def test_settings_that_do_not_fit_a_parquet_file_are_refused(
    data: Path, tmp_path: Path, settings: dict[str, Any], error: type[Vlm2RecError], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(data, parquet(tmp_path / "v.parquet", ITEMS, vector=drawn()), tmp_path / "out", **settings)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(5), "shape"),
        (np.zeros((30, 0)), "shape"),
        (np.array([["a", "b"]] * 30), "shape"),
        (np.array([{}], dtype=object), "pickled objects are never loaded"),
        (drawn(29), "has 29 rows"),
        (np.full((30, 2), np.nan), "NaN or infinity"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused(data: Path, tmp_path: Path, values: Any, message: str) -> None:
    np.save(tmp_path / "v.npy", values, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        run(data, tmp_path / "v.npy", tmp_path / "out", in_item_order=True)


def test_other_files_are_refused_by_name_before_anything_is_opened(data: Path, tmp_path: Path) -> None:
    (tmp_path / "v.pkl").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ConfigError, match=r"ends in '.pkl'"):
        run(data, tmp_path / "v.pkl", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--ids .* ends in '.csv'"):
        run(data, npy(tmp_path / "v.npy", drawn()), tmp_path / "out", ids=tmp_path / "ids.csv")
    with pytest.raises(ConfigError, match="both --ids and --in-item-order"):
        run(data, tmp_path / "v.npy", tmp_path / "out", ids=tmp_path / "ids.txt", in_item_order=True)
    with pytest.raises(DataError, match="is not a file"):
        run(data, tmp_path / "none.parquet", tmp_path / "out")
    with pytest.raises(ConfigError, match="too large for --storage float16"):
        run(data, npy(tmp_path / "v.npy", drawn() * 1e6), tmp_path / "out", in_item_order=True, storage="float16")


# --- the folder in use ------------------------------------------------------------------------------------------
def test_the_same_import_again_keeps_the_folder_and_another_one_is_refused(data: Path, tmp_path: Path) -> None:
    file = npy(tmp_path / "v.npy", drawn())
    first = run(data, file, tmp_path / "out", in_item_order=True)
    assert run(data, file, tmp_path / "out", in_item_order=True) == first
    (tmp_path / "out" / "part-00000.parquet").write_bytes(b"")
    run(data, file, tmp_path / "out", in_item_order=True)
    assert verify(tmp_path / "out") == []
    with pytest.raises(ArtifactError, match="file_sha256 was"):
        run(data, npy(tmp_path / "v.npy", drawn(seed=9)), tmp_path / "out", in_item_order=True)


def test_task_1_ranks_imported_vectors(data: Path, tmp_path: Path) -> None:
    file = parquet(tmp_path / "v.parquet", ITEMS, text=drawn(seed=1), image=drawn(seed=2))
    run(data, file, tmp_path / "embeddings")
    result = evaluate.run(EvaluateConfig(data=data, embeddings=tmp_path / "embeddings", out=tmp_path / "out"))
    assert list(result["candidates"]) == ["f2f", "t2f", "v2f", "t2t", "v2v"]
    assert (result["users_from"], result["missing"]) == ("mean", 0)


def test_the_command_with_default_flags(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = parquet(tmp_path / "v.parquet", [*ITEMS, "extra"], vector=[*drawn(29), [0.0] * DIM, drawn(1)[0]])
    arguments = ["import-vectors", "--data", data, "--file", file, "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["vlm2rec", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert (ended.value.code or 0, said.out) == (0, "")
    assert "1 ids of" in said.err
    assert "1 fused vectors are zero;" in " ".join(said.err.split())
    assert verify(tmp_path / "out") == []


# --- CSV --------------------------------------------------------------------------------------------------------
def csv_file(path: Path, header: Sequence[str], lines: Iterable[Sequence[Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(header)
        writer.writerows(lines)
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_csv_of_numbers_gives_every_item_its_own_vector_whatever_its_id(
    suffix: str, data: Path, tmp_path: Path
) -> None:
    vectors = drawn()
    header = ["item_id", *(f"d{place}" for place in range(DIM))]
    lines: list[list[Any]] = [[item, *map(repr, row.tolist())] for item, row in zip(ITEMS, vectors, strict=True)]
    lines[5] = [ITEMS[5], *[""] * DIM]
    # an empty id is null unless it is quoted, as the writer of a single empty field does not do
    file = csv_file(tmp_path / f"v.{suffix}", header, [line for line in lines[::-1] if line[0]])
    manifest = run(data, file, tmp_path / "out", max_failures=0.1, view="text")
    found = rows(tmp_path / "out")
    for item, vector in zip(ITEMS, vectors, strict=True):
        expected = None if item in ("", ITEMS[5]) else vector.tolist()
        assert (found[item]["text"], found[item]["fused"]) == (expected, expected)
    assert found[ITEMS[5]]["error"] == "no fused, text vector in the file"
    assert manifest["counts"]["failed"] == 2 and verify(tmp_path / "out") == []


def test_a_csv_of_lists_is_read_as_its_columns_are_called(data: Path, tmp_path: Path) -> None:
    text, image = drawn(seed=1), drawn(seed=2)
    lines = [[item, str(a.tolist()), str(b.tolist()), "red"] for item, a, b in zip(ITEMS, text, image, strict=True)]
    file = csv_file(tmp_path / "v.csv", ["item_id", "text", "image"], [line[:3] for line in lines if line[0]])
    run(data, file, tmp_path / "out", max_failures=0.1)
    found = rows(tmp_path / "out")
    np.testing.assert_array_equal(np.float32(found["NA"]["image"]), image[ITEMS.index("NA")])
    np.testing.assert_allclose(found["NA"]["fused"], (text + image)[ITEMS.index("NA")], rtol=1e-6)
    other = csv_file(tmp_path / "w.csv", ["sku", "a", "b", "colour"], [line for line in lines if line[0]])
    run(data, other, tmp_path / "b", item_id_column="sku", column="b", max_failures=0.1)
    np.testing.assert_array_equal(np.float32(rows(tmp_path / "b")["007"]["fused"]), image[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item_id,x,y\n007,1,2\n7,3,\n", "1 of 2 numbers for item '7'"),
        ("item_id,x,name\n007,1,red\n", "holds 'red' for item '007'"),
        ("item_id,x,day\n007,1,2020-01-01\n", "column 'day' of .* is date32"),
        ("item_id,x\n007,1,2\n", "line 2 of .* has 3 fields: '007,1,2'"),
        ("item_id\n007\n", "ids and nothing else"),
        ("sku,x\n007,1\n", "has no column 'item_id'"),
        ("item_id,x\n007,1\n007,2\n", "1 ids occur more than once"),
        ("item_id,x\n,1\n", "1 ids .* are null"),
        ('item_id,v\n007,"[1, 2]"\n7,"[1]"\n', "different lengths"),
        ("item_id,x\n007,nan\n", "NaN or infinity in the fused vectors of 1 items"),
    ],
)
def test_a_csv_that_is_no_table_of_vectors_is_refused(text: str, message: str, data: Path, tmp_path: Path) -> None:
    (tmp_path / "v.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        run(data, tmp_path / "v.csv", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_csv_that_is_not_utf8_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "v.csv").write_bytes("item_id,x\nZürich,1\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"cannot be read as CSV|UTF"):
        run(data, tmp_path / "v.csv", tmp_path / "out")


def test_ids_of_an_npy_may_be_a_json_list(data: Path, tmp_path: Path) -> None:
    vectors = drawn()
    (tmp_path / "ids.json").write_text(json.dumps(ITEMS))
    run(data, npy(tmp_path / "v.npy", vectors), tmp_path / "out", ids=tmp_path / "ids.json")
    np.testing.assert_array_equal(EmbeddingTable.open(tmp_path / "out").vectors, vectors)
    for broken in ("[1", '{"a": 1}', '["a", 1]'):
        (tmp_path / "broken.json").write_text(broken)
        with pytest.raises(DataError, match=r"broken\.json"):
            run(data, tmp_path / "v.npy", tmp_path / "o", ids=tmp_path / "broken.json")


# --- row numbers that nobody asked for --------------------------------------------------------------------------
def frame_of(vectors: np.ndarray) -> pd.DataFrame:
    frame = pd.DataFrame(vectors, columns=[f"d{place}" for place in range(vectors.shape[1])])
    frame.insert(0, "item_id", ITEMS)
    return frame[frame["item_id"] != ""]


@pytest.mark.parametrize("name", [None, "index", "Unnamed: 0", "Index", "row", "level_0", "row_id"])
@pytest.mark.parametrize("order", ["as it is", "shuffled", "filtered"])
def test_a_column_of_row_numbers_is_left_out_by_its_name(
    data: Path, tmp_path: Path, name: str | None, order: str, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = drawn()
    frame = frame_of(vectors)
    frame = frame.sample(frac=1, random_state=0) if order == "shuffled" else frame
    frame = frame[frame["item_id"] != "i3"] if order == "filtered" else frame
    frame.to_csv(tmp_path / "v.csv", index_label=name)
    manifest = run(data, tmp_path / "v.csv", tmp_path / "out", max_failures=0.2)
    assert manifest["dim"] == DIM
    assert rows(tmp_path / "out")["i5"]["fused"] == vectors[ITEMS.index("i5")].tolist()
    assert f"{name or ''!r} numbers the rows" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("values", [range(29), range(1, 30), range(28, -1, -1), [7 * n for n in range(29)]])
def test_a_column_of_row_numbers_with_another_name_is_refused(
    data: Path, tmp_path: Path, values: Iterable[int]
) -> None:
    frame = frame_of(drawn())
    frame.insert(1, "nr", list(values))
    frame.to_csv(tmp_path / "v.csv", index=False)
    with pytest.raises(DataError, match=r"column 'nr' of .* a whole number of its own in every row"):
        run(data, tmp_path / "v.csv", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dimensions_of_whole_numbers_stay(data: Path, tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).integers(-3, 3, (len(ITEMS), 4)).astype(np.float32)
    frame_of(vectors).astype(dict.fromkeys(["d0", "d1", "d2", "d3"], int)).to_csv(tmp_path / "v.csv", index=False)
    assert run(data, tmp_path / "v.csv", tmp_path / "out", max_failures=0.1)["dim"] == 4


@pytest.mark.parametrize("change", ["mark", "semicolons", "gzip", "returns", "quotes"])
def test_a_csv_of_vectors_is_read_however_it_is_written(data: Path, tmp_path: Path, change: str) -> None:
    vectors = drawn()
    text = frame_of(vectors).to_csv(index=False, quoting=csv.QUOTE_ALL if change == "quotes" else csv.QUOTE_MINIMAL)
    if change == "semicolons":
        text = text.replace(",", ";")
    content = ("\ufeff" * (change == "mark") + text).encode()
    content = content.replace(b"\n", b"\r") if change == "returns" else content
    file = tmp_path / ("v.csv.gz" if change == "gzip" else "v.csv")
    file.write_bytes(gzip.compress(content) if change == "gzip" else content)
    assert run(data, file, tmp_path / "out", max_failures=0.1)["dim"] == DIM
    assert rows(tmp_path / "out")["i5"]["fused"] == vectors[ITEMS.index("i5")].tolist()


# --- JSON lines and RecBole -------------------------------------------------------------------------------------
@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "jsonl.gz"])
def test_json_lines_give_every_item_its_own_vector(data: Path, tmp_path: Path, ending: str) -> None:
    vectors = drawn()
    records: list[dict[str, Any]] = [
        {"item_id": item, "title": "t", "embedding": vector.tolist()}
        for item, vector in zip(ITEMS, vectors, strict=True)
    ]
    records[3]["embedding"] = None
    del records[4]["embedding"]
    content = ("\ufeff" + "\n".join(map(json.dumps, records[::-1]))).encode()
    file = tmp_path / f"v.{ending}"
    file.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    manifest = run(data, file, tmp_path / "out", max_failures=0.1)
    assert (manifest["dim"], manifest["counts"]["failed"]) == (DIM, 2)
    found = rows(tmp_path / "out")
    expected = [None if row in (3, 4) else vector.tolist() for row, vector in enumerate(vectors)]
    assert [found[item]["fused"] for item in ITEMS] == expected
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("lines", "settings", "message"),
    [
        (['{"item_id": "i0", "v": [1, "x"]}'], {}, "line 2 of .* holds .*'x'"),
        (['{"item_id": "i0", "v": [1, true]}'], {}, "line 2 of .* holds .*True"),
        (['{"item_id": "i0", "v": "[1, 2]"}'], {"column": "v"}, "line 2 of .* holds"),
        (['{"item_id": "i0", "v": [[1], [2]]}'], {}, "line 2 of .* holds"),
        (['{"item_id": "i0", "v": [1, 1e999]}'], {}, "NaN or infinity"),
        (['{"item_id": "i0", "v": [NaN, 1]}'], {}, "NaN or infinity in the fused vectors of 1 items.*'i0'"),
        (
            [f'{{"item_id": "i{n}", "v": [1, 2, 3]}}' for n in range(5)],
            {},
            r"item '007' has 2, item 'i0' has 3, item 'i1' has 3, item 'i2' has 3 \(5 such items\)",
        ),
        (['{"item_id": "i0"'], {}, "line 2 of .* not an object"),
        (['{"item_id": "007", "v": [1, 2]}'], {}, "1 ids occur more than once"),
        (['{"v": [1, 2]}'], {}, "1 ids .* are null"),
        (['{"item_id": "i0", "v": [1, 2], "v": [3, 4]}'], {}, "key 'v' twice"),
        (['{"item_id": "i0", "v": [1, 2], "w": [3]}'], {}, "2 columns of lists of numbers: v, w"),
        ([], {"column": "w"}, "no column 'w'"),
        ([], {"item_id_column": "id"}, "no column 'id'"),
    ],
)
def test_json_lines_that_hold_no_vectors_are_named(
    data: Path, tmp_path: Path, lines: list[str], settings: dict[str, Any], message: str
) -> None:
    (tmp_path / "v.jsonl").write_text("\n".join(['{"item_id": "007", "v": [1, 2]}', *lines]))
    with pytest.raises(DataError, match=message):
        run(data, tmp_path / "v.jsonl", tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_recboles_item_embeddings_are_read(data: Path, tmp_path: Path) -> None:
    vectors = drawn()
    lines = [
        f"{item}\t{' '.join(map(repr, vector.tolist()))}"
        for item, vector in zip(ITEMS, vectors, strict=True)
        if item.isalnum()  # the format has no quotes, and so no tabs
    ]
    for number, header in enumerate(("iid:token\titem_emb:float_seq", "item_id:token\tother:float\tv:float_seq")):
        file = tmp_path / f"{number}.itememb"
        body = lines if number == 0 else [line.replace("\t", "\t0.5\t") for line in lines]
        file.write_text("\n".join([header, *body]) + "\n", encoding="utf-8")
        run(data, file, tmp_path / f"out{number}", max_failures=0.9)
        assert rows(tmp_path / f"out{number}")["007"]["fused"] == vectors[ITEMS.index("007")].tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iid:token\titem_emb:float\n007\t1\n", "the header of .* 'iid:token', 'item_emb:float'"),
        ("iid\titem_emb\n007\t1 2\n", "the header of"),
        ("iid:token\temb:float_seq\n007\t1 x\n", "item '007' of .* has 1 x"),
        ("iid:token\temb:float_seq\n007\t1 2\n7\t1\n", "item '007' has 2, item '7' has 1"),
        ("iid:token\temb:float_seq\n007\t1 nan\n", "NaN or infinity"),
        ("iid:token\temb:float_seq\n007\t1 2\n7\n", "line 3 of .* has 1 field"),
    ],
)
def test_a_recbole_file_without_vectors_is_named(data: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "v.itememb").write_text(text)
    with pytest.raises(DataError, match=message):
        run(data, tmp_path / "v.itememb", tmp_path / "out")


def test_three_examples_of_nan_are_named(data: Path, tmp_path: Path) -> None:
    vectors = drawn()
    for item in ("i3", "i5", "i6", "i9"):
        vectors[ITEMS.index(item), 2] = np.nan
    with pytest.raises(DataError, match="4 items, the first are item 'i3', 'i5', 'i6'"):
        run(data, parquet(tmp_path / "v.parquet", ITEMS, v=vectors), tmp_path / "out")


# --- damaged files ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("twice", ["item_id", "v"])
def test_a_parquet_column_that_occurs_twice_is_named(data: Path, tmp_path: Path, twice: str) -> None:
    columns = [("item_id", ITEMS), ("v", drawn().tolist())]
    columns += [column for column in columns if column[0] == twice]
    path = tmp_path / "v.parquet"
    pq.write_table(pa.table([pa.array(values) for _, values in columns], names=[name for name, _ in columns]), path)
    with pytest.raises(DataError, match=r"several columns 'item_id'|2 columns of lists"):
        run(data, path, tmp_path / "out")


@pytest.mark.parametrize("compression", ["none", "zstd", "snappy"])
def test_parquet_that_is_damaged_behind_its_schema_is_named(data: Path, tmp_path: Path, compression: str) -> None:
    path = tmp_path / "v.parquet"
    pq.write_table(pa.table({"item_id": ITEMS, "v": drawn().tolist()}), path, compression=compression)
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + b"\xff" * 60 + whole[64:])
    with pytest.raises(DataError, match=r"cannot be read as Parquet"):
        run(data, path, tmp_path / "out")


@pytest.mark.parametrize("damage", [(b"(", b"\x0b"), (b"'descr'", b"'"), (b"{", b"("), (b"30", b"9" * 2)])
def test_a_damaged_header_of_an_npy_is_named(data: Path, tmp_path: Path, damage: tuple[bytes, bytes]) -> None:
    path = npy(tmp_path / "v.npy", drawn())
    path.write_bytes(path.read_bytes().replace(*damage, 1))
    with pytest.raises(DataError, match=r"cannot be read as \.npy"):
        run(data, path, tmp_path / "out", in_item_order=True)


def test_ids_that_are_no_characters_or_no_numbers_are_named(data: Path, tmp_path: Path) -> None:
    vectors, ids = npy(tmp_path / "v.npy", drawn()), tmp_path / "ids.npy"
    for number in (0xD800, 0x7FFFFFFF):
        np.save(ids, np.array([number, *range(65, 64 + len(ITEMS))], np.uint32).view("U1"))
        with pytest.raises(DataError, match=r"not text|surrogates|cannot be read"):
            run(data, vectors, tmp_path / "out", ids=ids)
    for text in ("[" + "9" * 400 + "]", "[" * 5000, '["\\ud800"]'):
        (tmp_path / "ids.json").write_text(text)
        with pytest.raises(DataError, match=r"not a list of ids|no text"):
            run(data, vectors, tmp_path / "out", ids=tmp_path / "ids.json")
