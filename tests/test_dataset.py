"""The reader of a dataset folder, on a folder written by hand."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, DataError

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


@pytest.mark.parametrize("train", [["c", "b"], [1, 2], [None, None], [{"a": 1}, {"a": 2}]])
def test_sequences_that_are_no_lists_are_named(folder: Path, train: list[Any]) -> None:
    pq.write_table(pa.table({**SEQUENCES, "train": train}), folder / "sequences.parquet")
    with pytest.raises(ArtifactError, match=r"column 'train' of .*sequences\.parquet holds"):
        Dataset(folder).histories("valid")


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


# --- items that nobody has touched, and images that are not there ----------------------------------------------
def with_cold_items(folder: Path) -> Dataset:
    pq.write_table(
        pa.table({key: ["new", *values[:2], "newer", *values[2:]] for key, values in ITEMS.items()}),
        folder / "items.parquet",
    )
    schema.write_json(folder / "dataset.json", {**META, "cold_items": 2})
    return Dataset(folder)


def test_warm_items_are_those_with_an_interaction_in_any_split(folder: Path) -> None:
    whole, before = Dataset(folder), Dataset(folder)
    assert len(before.items) == 5
    assert whole.warm() is whole  # no cold items are stored: a hand-made folder is taken as it is
    dataset = with_cold_items(folder)
    assert dataset.item_ids == ["new", "007", "b", "newer", "c", "d", "e"]
    for warm in (dataset.warm(), pickle.loads(pickle.dumps(dataset.warm())), dataset.warm().warm()):
        assert warm.item_ids == before.item_ids and warm.titles == before.titles
        assert warm.image_paths == before.image_paths
        assert warm.negatives(0).tolist() == before.negatives(0).tolist()
        assert warm.histories("test").rows.tolist() == before.histories("test").rows.tolist()
        assert warm.train_frequency().tolist() == before.train_frequency().tolist()
    assert dataset.negatives(0).tolist() == [[2, 4], [5, 4]]


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


def test_images_that_are_not_there_are_an_error_before_any_item_fails(folder: Path) -> None:
    def refused(words: str, **given: Any) -> None:
        with pytest.raises(DataError, match=words) as caught:
            Dataset(folder, **given).require_images()
        assert caught.value.exit_code == 3 and "--images" in str(caught.value)

    refused("pictures, is missing")
    (folder / "pictures").write_text("")
    refused("is not a folder")
    (folder / "pictures").unlink()
    (folder / "pictures").mkdir()
    refused(r"holds none of the images, such as 0\.jpg, 1\.jpg, 2\.jpg")
    picture(folder / "pictures/stranger.jpg")
    (folder / "pictures/0.jpg").mkdir()
    refused("holds none of the images")
    picture(folder / "pictures/4.jpg")
    Dataset(folder).require_images()  # one of them is there
    refused("elsewhere, is missing", images=folder / "elsewhere")
    shutil.move(folder / "pictures", folder / "elsewhere")
    Dataset(folder, images=folder / "elsewhere").require_images()
    refused("is missing")


def test_the_images_place_may_be_given_from_any_folder_and_goes_along(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(folder / "elsewhere/4.jpg")
    monkeypatch.chdir(folder / "elsewhere")
    dataset = Dataset("..", images=".")
    assert dataset.image_root == folder / "elsewhere"
    monkeypatch.chdir("/")
    pickle.loads(pickle.dumps(Dataset(folder, images=folder / "elsewhere"))).require_images()
    assert dataset.image_root == folder / "elsewhere"


def test_a_dataset_without_images_says_what_it_is_for(folder: Path) -> None:
    schema.write_json(folder / "dataset.json", {**META, "image_root": None})
    dataset = Dataset(folder)
    assert not dataset.has_images
    with pytest.raises(DataError, match=r"was prepared without images.*--views text"):
        dataset.require_images()
    nothing = pa.table({**ITEMS, "image_path": pa.array([None] * 5, pa.string())})
    pq.write_table(nothing, folder / "items.parquet")
    with pytest.raises(DataError, match=r"no item of .* has an image.*--views text"):
        Dataset(folder, images=folder).require_images()


@pytest.mark.parametrize("column", ["item_id", "title", "image_path"])
def test_a_column_that_holds_no_text_is_damage(folder: Path, column: str) -> None:
    table = pq.read_table(folder / "items.parquet")
    place = table.column_names.index(column)
    pq.write_table(table.set_column(place, column, pa.array([["x"]] * len(table))), folder / "items.parquet")
    with pytest.raises(ArtifactError, match=f"column '{column}' .* holds list"):
        _ = Dataset(folder).items


@pytest.mark.parametrize("name", ["image_root", "name", "written_by"])
def test_half_a_character_in_a_json_file_is_damage(folder: Path, name: str) -> None:
    whole = json.dumps(META | {name: "pictures \U0001f914"})
    (folder / "dataset.json").write_text(whole)
    assert "\\ud83e" in whole and Dataset(folder).meta[name] == "pictures \U0001f914"
    (folder / "dataset.json").write_text(whole.replace("\\udd14", ""))
    with pytest.raises(ArtifactError, match=r"dataset\.json is damaged"):
        _ = Dataset(folder).image_root


def test_an_image_root_that_is_no_utf8_is_read_back(folder: Path) -> None:
    root = os.fsdecode(b"pictures-\xff")
    schema.write_json(folder / "dataset.json", {"schema_version": 1, "name": "hand", "image_root": root})
    assert Dataset(folder).image_root == (folder / root).resolve()
