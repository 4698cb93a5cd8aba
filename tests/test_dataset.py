"""The reader of a dataset folder, on a folder written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError

ITEMS = {"item_id": ["007", "b", "c", "d", "e"], "title": [*"ABCDE"], "image_path": [f"{n}.jpg" for n in range(5)]}
SEQUENCES = {
    "user_id": ["u1", "u2"],
    "train": [["c", "007", "c", "b"], ["e"]],
    "valid": ["d", "007"],
    "test": ["e", "b"],
}
NEGATIVES = {
    "seed": [0, 0, 3, 3],
    "user_id": ["u1", "u2", "u1", "u2"],
    "negatives": [["b", "c"], ["d", "c"], ["007", "d"], ["c", "d"]],
}
META: dict[str, Any] = {
    "schema_version": 1,
    "name": "hand",
    "image_root": "pictures",
    "max_history": 3,
    "negatives": {"count": 2, "seeds": [0, 3]},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pq.write_table(pa.table(ITEMS), tmp_path / "items.parquet")
    pq.write_table(pa.table(SEQUENCES), tmp_path / "sequences.parquet")
    pq.write_table(pa.table(NEGATIVES), tmp_path / "negatives.parquet")
    schema.write_json(tmp_path / "dataset.json", META)
    return tmp_path


def test_items_are_rows_inside_and_ids_in_files(folder: Path) -> None:
    dataset = Dataset(folder)
    assert (dataset.name, dataset.max_history, dataset.image_root) == ("hand", 3, folder / "pictures")
    assert dataset.item_ids == ["007", "b", "c", "d", "e"]
    assert dataset.titles == ["A", "B", "C", "D", "E"]
    assert dataset.image_paths[4] == "4.jpg"
    assert dataset.user_ids == ["u1", "u2"]
    assert dataset.rows_of(["e", "007", "e"]).tolist() == [4, 0, 4]
    assert dataset.rows_of([]).tolist() == []


def test_histories_are_the_latest_items_before_the_target(folder: Path) -> None:
    dataset = Dataset(folder)
    assert [sequence.tolist() for sequence in dataset.train_sequences()] == [[2, 0, 2, 1], [4]]
    valid, test = dataset.histories("valid"), dataset.histories("test")
    assert len(valid) == len(test) == 2
    assert [valid.of(user).tolist() for user in range(2)] == [[0, 2, 1], [4]]
    assert valid.targets.tolist() == [3, 0]
    assert [test.of(user).tolist() for user in range(2)] == [[2, 1, 3], [4, 0]]
    assert test.targets.tolist() == [4, 1]
    assert test.offsets.tolist() == [0, 3, 5]
    assert dataset.train_frequency().tolist() == [1, 1, 2, 0, 1]


def test_candidates_of_a_seed_are_rows_of_items(folder: Path) -> None:
    dataset = Dataset(folder)
    assert dataset.candidate_seeds == [0, 3]
    assert dataset.negatives(0).tolist() == [[1, 2], [3, 2]]
    assert dataset.negatives(3).tolist() == [[0, 3], [2, 3]]
    assert dataset.negatives(3).dtype == np.int32


def test_files_written_by_polars_read_the_same(folder: Path) -> None:
    for name, table in (("items", ITEMS), ("sequences", SEQUENCES), ("negatives", NEGATIVES)):
        pl.DataFrame(table).write_parquet(folder / f"{name}.parquet")
    dataset = Dataset(folder)
    assert dataset.rows_of(["e", "007"]).tolist() == [4, 0]
    assert dataset.histories("test").rows.tolist() == [2, 1, 3, 4, 0]
    assert dataset.negatives(3).tolist() == [[0, 3], [2, 3]]


def test_many_row_groups_read_like_one(folder: Path) -> None:
    pq.write_table(pa.table(SEQUENCES), folder / "sequences.parquet", row_group_size=1)
    pq.write_table(pa.table(NEGATIVES), folder / "negatives.parquet", row_group_size=1)
    dataset = Dataset(folder)
    assert dataset.histories("test").rows.tolist() == [2, 1, 3, 4, 0]
    assert dataset.negatives(0).tolist() == [[1, 2], [3, 2]]


def replaced(folder: Path, name: str, table: dict[str, list[Any]]) -> Dataset:
    pq.write_table(pa.table(table), folder / name)
    return Dataset(folder)


def test_a_folder_that_is_no_finished_dataset_is_refused(folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is not a folder.*prepare"):
        Dataset(folder / "nowhere")
    schema.write_json(folder / "dataset.json", {**META, "schema_version": 2})
    with pytest.raises(ArtifactError, match=r"version 2.*newer vlm2rec"):
        Dataset(folder)
    schema.write_json(folder / "dataset.json", {"schema_version": 1})
    with pytest.raises(ArtifactError, match="has no 'max_history'"):
        _ = Dataset(folder).max_history
    (folder / "dataset.json").write_text("{")
    with pytest.raises(ArtifactError, match="not readable JSON"):
        Dataset(folder)
    (folder / "dataset.json").unlink()
    with pytest.raises(ArtifactError, match=r"dataset\.json does not exist"):
        Dataset(folder)


def test_a_missing_column_is_named_with_the_nearest_one(folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"'title'.*did you mean 'titles'"):
        _ = replaced(folder, "items.parquet", {"item_id": ["a"], "titles": ["A"], "image_path": ["a"]}).items
    with pytest.raises(ArtifactError, match=r"sequences\.parquet has no column 'test'"):
        _ = replaced(folder, "sequences.parquet", {k: v for k, v in SEQUENCES.items() if k != "test"}).sequences


def test_an_unknown_item_in_a_sequence_is_named(folder: Path) -> None:
    dataset = replaced(folder, "sequences.parquet", {**SEQUENCES, "train": [["c", "zebra"], ["e"]]})
    with pytest.raises(ArtifactError, match="item 'zebra' is not in"):
        dataset.train_sequences()


def test_a_seed_without_candidates_lists_the_seeds_there_are(folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"seed 7\. Expected: one of \[0, 3\]\..*--candidate-seeds"):
        Dataset(folder).negatives(7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"user_id": ["u2", "u1", "u1", "u2"]}, "lists other users"),
        ({"seed": [0, 1, 3, 3]}, "lists other users"),
        ({"negatives": [["b", "c"], ["d"], ["007", "d"], ["c", "d"]]}, "more or fewer than 2 candidates"),
        ({"negatives": [["b", "c"], ["d", "zebra"], ["c", "d"], ["c", "d"]]}, "item 'zebra' is not in"),
    ],
)
def test_candidates_that_do_not_fit_the_sequences_are_refused(
    folder: Path, change: dict[str, list[Any]], words: str
) -> None:
    dataset = replaced(folder, "negatives.parquet", {**NEGATIVES, **change})
    with pytest.raises(ArtifactError, match=words):
        dataset.negatives(0)


def test_damaged_candidates_are_an_artifact_error(folder: Path) -> None:
    file = folder / "negatives.parquet"
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(ArtifactError, match=r"negatives\.parquet cannot be read"):
        Dataset(folder).negatives(0)
    file.unlink()
    with pytest.raises(ArtifactError, match=r"negatives\.parquet does not exist"):
        Dataset(folder).negatives(0)


def test_the_category_is_the_first_of_the_columns_that_say_what_an_item_is(folder: Path) -> None:
    def categories(**columns: list[Any]) -> tuple[str | None, list[str]]:
        pq.write_table(pa.table({**ITEMS, **columns}), folder / "items.parquet")
        dataset = Dataset(folder)
        return dataset.category_column, dataset.categories

    lists = [["Home", "Chairs"], ["Home"], [], None, ["Lamps", None, ""]]
    assert categories() == (None, [""] * 5)
    assert categories(genres=lists) == ("genres", ["Home, Chairs", "Home", "", "", "Lamps"])
    assert categories(genres=lists, category=[" a ", "b", None, "", "e"]) == ("category", ["a", "b", "", "", "e"])
    assert categories(categories=[1, 2, 3, None, 5]) == ("categories", ["1", "2", "3", "", "5"])
