"""The embedding table: ids and vectors stay together, and a folder that does not hold what it says is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedding_folder import write_embeddings

from vlm2rec.downstream.table import EmbeddingTable, read_batches, read_in_order, read_rows
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError

IDS = ["a", "7", "007", "NA", "e"]
VECTORS = np.array([[1, 2], [3, 4], [np.nan, np.nan], [7, 8], [9, 10]], np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_embeddings(tmp_path / "embeddings", IDS, VECTORS, text=-VECTORS, shard_size=2)
    return tmp_path / "embeddings"


def replace_shard(folder: Path, table: pa.Table) -> None:
    """Put another table in the place of the last shard, with a manifest that knows its size."""
    manifest = json.loads((folder / schema.MANIFEST_FILE).read_text())
    shard = manifest["shards"][-1]
    pq.write_table(table, folder / shard["file"])
    shard["bytes"] = (folder / shard["file"]).stat().st_size
    (folder / schema.MANIFEST_FILE).write_text(json.dumps(manifest))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_ids_keep_their_vectors_across_shards_and_a_null_moves_none(dtype: str, tmp_path: Path) -> None:
    write_embeddings(tmp_path / "e", IDS, VECTORS, shard_size=2, dtype=dtype)
    table = EmbeddingTable.open(tmp_path / "e")
    assert table.item_ids == IDS and table.dim == 2 and table.vectors.dtype == np.float32
    assert table.present.tolist() == [True, True, False, True, True]
    assert np.array_equal(table.vectors, VECTORS, equal_nan=True)


def test_small_batches_give_the_same_rows(folder: Path) -> None:
    parts = list(read_batches(folder, "text", batch_size=1))
    assert [ids for ids, _, _ in parts] == [[name] for name in IDS]
    assert np.array_equal(np.concatenate([vectors for _, vectors, _ in parts]), -VECTORS, equal_nan=True)


@pytest.mark.parametrize("rows", [[], [0], [1, 2, 4], [3], [0, 1, 2, 3, 4]])
def test_some_rows_are_those_of_the_whole_table(folder: Path, rows: list[int]) -> None:
    whole, some = EmbeddingTable.open(folder, "text"), read_rows(folder, "text", np.array(rows, np.int64))
    assert some.item_ids == [IDS[row] for row in rows] and some.dim == 2
    assert np.array_equal(some.vectors, whole.vectors[rows], equal_nan=True)
    assert some.present.tolist() == whole.present[rows].tolist()


def test_items_are_taken_in_the_order_asked_for(folder: Path) -> None:
    table = EmbeddingTable.open(folder)
    assert table.take(["e", "NA", "7", "e"]).tolist() == [[9, 10], [7, 8], [3, 4], [9, 10]]
    assert table.take(pa.array(["a"])).tolist() == [[1, 2]]


def test_an_absent_id_and_an_item_without_a_vector_are_both_missing(folder: Path) -> None:
    table = EmbeddingTable.open(folder)
    assert table.rows_of(["007", "zzz", "e"]).tolist() == [-1, -1, 4]
    with pytest.raises(ArtifactError, match=r"2 of 3 items have no fused vector, among them \['007', 'zzz'\]"):
        table.take(["007", "zzz", "e"])


IMAGES = np.array([[1, 0], [np.nan, np.nan], [2, 0], [3, 0], [4, 0]], np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_text_and_image_end_to_end_are_a_column_of_every_table_with_both(dtype: str, tmp_path: Path) -> None:
    folder = tmp_path / "e"
    write_embeddings(folder, IDS, VECTORS, text=-VECTORS, image=IMAGES, shard_size=2, dtype=dtype)
    table = EmbeddingTable.open(folder, "concat")
    assert (table.dim, table.item_ids) == (4, IDS)
    # "7" has no image and "007" no text: neither has both
    assert table.present.tolist() == [True, False, False, True, True]
    assert np.isnan(table.vectors[1:3]).all()
    assert table.take(["NA", "a"]).tolist() == [[-7, -8, 3, 0], [-1, -2, 1, 0]]
    streamed = np.concatenate([vectors for _, vectors, _ in read_batches(folder, "concat", batch_size=1)])
    assert np.array_equal(streamed, table.vectors, equal_nan=True)
    given = np.zeros((3, 4), np.float32)
    assert read_in_order(folder, "concat", ["e", "7", "a"], given).tolist() == [True, False, True]
    assert given.tolist() == [[-9, -10, 4, 0], [0] * 4, [-1, -2, 1, 0]]


def test_a_table_of_one_modality_has_nothing_to_put_end_to_end(folder: Path) -> None:
    assert schema.columns_of(schema.read_manifest(folder)) == ["fused", "text"]
    with pytest.raises(ArtifactError, match="no vector in column 'concat'"):
        EmbeddingTable.open(folder, "concat")


def test_an_unknown_view_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="fused, text, image"):
        EmbeddingTable.open(folder, "both")


def test_a_view_without_a_single_vector_is_refused(folder: Path) -> None:
    with pytest.raises(ArtifactError, match="no vector in column 'image'"):
        EmbeddingTable.open(folder, "image")


def test_an_unfinished_export_is_refused(folder: Path) -> None:
    (folder / schema.MANIFEST_FILE).unlink()
    with pytest.raises(ArtifactError, match=r"manifest\.json does not exist"):
        EmbeddingTable.open(folder)


def test_a_missing_or_cut_shard_is_refused(folder: Path) -> None:
    shard = folder / "part-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"part-00001\.parquet is missing or has another size"):
        EmbeddingTable.open(folder)


def test_fault_10_a_flipped_bit_is_refused(folder: Path) -> None:
    shard = folder / "part-00001.parquet"
    chunk = pq.ParquetFile(shard).metadata.row_group(0).column(1)  # the vectors of `fused`
    content = bytearray(shard.read_bytes())
    begin = chunk.dictionary_page_offset or chunk.data_page_offset
    content[begin + chunk.total_compressed_size - 1] ^= 0x10
    shard.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"part-00001\.parquet is damaged"):
        EmbeddingTable.open(folder)


def test_fault_46_vectors_of_another_length_than_the_manifest_says_are_refused(folder: Path) -> None:
    longer = pa.FixedSizeListArray.from_arrays(pa.array([1.0, 2.0, 3.0, 4.0], pa.float32()), 4)
    replace_shard(folder, pa.table({"item_id": ["e"], "fused": longer}))
    with pytest.raises(ArtifactError, match=r"column 'fused' of .*\[4\].* vectors of 2 dimensions"):
        EmbeddingTable.open(folder)


def test_a_shard_without_the_column_is_refused(folder: Path) -> None:
    replace_shard(folder, pa.table({"item_id": ["e"], "Fused": [1.0]}))
    with pytest.raises(ArtifactError, match=r"no column 'fused' \(did you mean 'Fused'\?\)"):
        EmbeddingTable.open(folder)
