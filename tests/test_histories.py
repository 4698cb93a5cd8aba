"""Histories of any users: two forms in three formats, read alike; what is left out is counted and named."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm2rec.embedder.contract.errors import DataError
from vlm2rec.pipelines.catalogue.histories import GivenHistories, read_histories
from vlm2rec.pipelines.config import HistoryColumns

ITEMS = ["a", "b", "c", "007", "7"]
COLUMNS = HistoryColumns()
LISTS: dict[str, list[str | None] | None] = {
    "zoe": ["c", "a", "c"],
    "ann": ["7", "lost", "007"],
    "bob": ["lost", "gone"],
    "eve": [],
    "kim": None,
    "lee": [None, "b"],
}
WANTED = {"ann": ["7", "007"], "bob": [], "eve": [], "kim": [], "lee": ["b"], "zoe": ["c", "a", "c"]}
Write = Callable[[Path, dict[str, Any]], Path]


def read(path: Path, **columns: Any) -> GivenHistories:
    return read_histories(path, ITEMS, HistoryColumns(**columns))


def told(given: GivenHistories) -> dict[str, list[str]]:
    return {user: [ITEMS[row] for row in given.of(place)] for place, user in enumerate(given.user_ids)}


def long_rows(lists: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [(u, item, time) for u, items in lists.items() for time, item in enumerate(items or [])]
    # the file's order is not that of time
    return [{"user_id": u, "item_id": item, "timestamp": 10**9 + time} for u, item, time in sorted(rows, key=str)]


def as_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    text = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
    pl.DataFrame(text).write_csv(path)
    return path


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    kinds = {"history": pl.List(pl.String)} if "history" in rows[0] else {}
    pl.DataFrame(rows, schema_overrides=kinds).write_parquet(path)
    return path


WRITERS = {"jsonl": as_jsonl, "csv": as_csv, "parquet": as_parquet}


@pytest.mark.parametrize("kind", WRITERS)
def test_one_row_a_user_is_read_alike_from_every_format(kind: str, tmp_path: Path) -> None:
    rows = [{"user_id": user, "history": items} for user, items in LISTS.items()]
    found = read(WRITERS[kind](tmp_path / f"h.{kind}", rows))
    assert told(found) == WANTED
    assert found.counts == {
        "read": 10, "kept": 6, "left_out": {"no item id": 1, "item not in the catalogue": 3},
        "unknown_items": 2, "unknown": ["lost", "gone"],
    }  # fmt: skip
    assert found.reasons == {
        1: "no interaction can be used: item not in the catalogue (2), such as item 'lost'",
        2: "the history is empty",
        3: "the history is empty",
    }
    named = list(csv.DictReader(io.StringIO(found.left_out.decode())))
    assert len(named) == 4 and {row["item_id"] for row in named} == {"lost", "gone", ""}
    assert {row["user_id"] for row in named} == {"ann", "bob", "lee"}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_long_table_is_read_alike_from_every_format_and_ordered_by_time(kind: str, tmp_path: Path) -> None:
    found = read(WRITERS[kind](tmp_path / f"h.{kind}", long_rows(LISTS)))
    wanted = {user: items for user, items in WANTED.items() if LISTS[user]}  # others have no row
    assert told(found) == wanted
    assert found.counts["read"] == 10 and found.counts["kept"] == 6
    assert (list(found.reasons) == [1] and "item 'gone'" in found.reasons[1]) or "item 'lost'" in found.reasons[1]


def test_both_forms_have_one_digest_whatever_the_order_of_the_catalogue(tmp_path: Path) -> None:
    full = {user: items for user, items in LISTS.items() if user in ("zoe", "ann")}
    one = read(as_jsonl(tmp_path / "a.jsonl", [{"user_id": u, "history": h} for u, h in full.items()]))
    other = read_histories(as_csv(tmp_path / "b.csv", long_rows(full)), ITEMS[::-1], COLUMNS)
    assert one.digest(ITEMS) == other.digest(ITEMS[::-1])
    third = read(as_jsonl(tmp_path / "c.jsonl", [{"user_id": u, "history": h[:2]} for u, h in full.items() if h]))
    assert third.digest(ITEMS) != one.digest(ITEMS)


def test_the_order_of_the_file_can_be_the_time(tmp_path: Path) -> None:
    path = tmp_path / "h.csv"
    path.write_text("user_id,item_id\nzoe,c\nann,b\nzoe,a\n")
    assert told(read(path, order="file")) == {"ann": ["b"], "zoe": ["c", "a"]}
    with pytest.raises(DataError, match=r"no column 'timestamp'.*--order file"):
        read(path)


def test_the_sequences_of_a_dataset_folder_are_histories(drawn_dataset: Path) -> None:
    items = pl.read_parquet(drawn_dataset / "items.parquet")["item_id"].to_list()
    found = read_histories(drawn_dataset / "sequences.parquet", items, HistoryColumns(history_column="train"))
    wanted = pl.read_parquet(drawn_dataset / "sequences.parquet").sort("user_id")
    assert found.user_ids == wanted["user_id"].to_list() and not found.reasons
    assert [[items[r] for r in found.of(u)] for u in range(len(found))] == wanted["train"].to_list()


def test_numbers_are_ids_and_columns_may_have_other_names(tmp_path: Path) -> None:
    frame = pl.DataFrame({"uid": [3, 1], "items": [[7, 7], [7]]}, schema={"uid": pl.Int64, "items": pl.List(pl.Int32)})
    frame.write_parquet(tmp_path / "h.parquet")
    found = read(tmp_path / "h.parquet", user_id_column="uid", history_column="items")
    assert told(found) == {"1": ["7"], "3": ["7", "7"]}


@pytest.mark.parametrize("count", [1, 2, 100])
def test_the_latest_items_are_the_last(count: int, tmp_path: Path) -> None:
    rows = [{"user_id": user, "history": items} for user, items in LISTS.items()]
    found = read(as_jsonl(tmp_path / "h.jsonl", rows)).latest(count)
    assert told(found) == {user: items[-count:] for user, items in WANTED.items()}


@given(st.dictionaries(st.sampled_from("uvwxyz"), st.lists(st.sampled_from([*ITEMS, "lost"]), max_size=6), min_size=1))
def test_nothing_is_lost_and_cuts_keep_the_last(lists: dict[str, list[str]]) -> None:
    if not any(item in ITEMS for items in lists.values() for item in items):
        return
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        found = read(as_jsonl(Path(folder) / "h.jsonl", [{"user_id": u, "history": h} for u, h in lists.items()]))
    wanted = {user: [item for item in lists[user] if item in ITEMS] for user in sorted(lists)}
    assert told(found) == wanted
    assert {found.user_ids[place] for place in found.reasons} == {user for user, items in wanted.items() if not items}
    assert found.counts["read"] == found.counts["kept"] + sum(found.counts["left_out"].values())
    assert told(found.latest(3)) == {user: items[-3:] for user, items in wanted.items()}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("user_id,item_id,timestamp\nu,a,soon\n", "soon"),
        ("user_id,item_id,timestamp\nu,a,12\nu,b,2024-05-01\n", "2024-05-01"),
        ("user_id,item_id,timestamp\n", "has columns but no interactions|no rows|is empty"),
        ("user_id,basket\nu,a\n", "neither a column 'item_id' nor 'history'.*--history-column"),
        ("person,history\nu,[]\n", "no column 'user_id'.*--user-id-column"),
        ('user_id,history\nu,"[""a""]"\nu,"[""b""]"\n', "user 'u' has the rows 1 and 2"),
        ("user_id,history\nu,a b c\n", "row 1 of .* has 'a b c' as 'history'.*JSON"),
        ('user_id,history\nu,"[[""a""]]"\n', "where an id belongs"),
        ('user_id,history\nu,"[""x"", ""y""]"\n', "none of the 2 interactions .* names an item of the catalogue"),
        ("user_id,item_id,timestamp\nu,x,1\n", "none of the 1 interactions .*such as 'x'"),
        ("user_id,history\nu,[]\nv,\n", "empty histories only"),
        ('user_id,history\n,"[""a""]"\n', "none of the 1 rows of .* has a value in 'user_id'"),
    ],
)
def test_files_that_cannot_be_histories_are_refused_in_words(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "h.csv").write_text(text)
    with pytest.raises(DataError) as refused:
        read(tmp_path / "h.csv")
    assert re.search(words, str(refused.value)), refused.value


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"user_id": "u", "history": "a"}', "row 1 of .* has 'a' as 'history'"),
        ('{"user_id": "u", "history": [true]}', "has True where an id belongs"),
        ('{"user_id": ["u"], "history": ["a"]}', "where an id belongs"),
        ('{"user_id": "u", "history": ["a"]', "line 1 of .* is not an object"),
        ('{"user_id": null, "history": ["a"]}\n{"user_id": "u", "history": null}', "none of the 1 .*can be used: 1 "),
        ('{"user_id": "\\udcff", "history": ["a"]}', "."),
    ],
)
def test_lines_that_are_no_history_are_refused_in_words(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "h.jsonl").write_text(line + "\n")
    with pytest.raises(DataError) as refused:
        read(tmp_path / "h.jsonl")
    assert re.search(words, str(refused.value)), refused.value


def test_a_damaged_parquet_and_a_column_of_numbers_are_refused(tmp_path: Path) -> None:
    pl.DataFrame({"user_id": ["u"], "history": [3]}).write_parquet(tmp_path / "h.parquet")
    with pytest.raises(DataError, match=r"holds Int64.*a list of item ids"):
        read(tmp_path / "h.parquet")
    (tmp_path / "h.parquet").write_bytes(b"PAR1" + b"\0" * 40)
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read(tmp_path / "h.parquet")
    with pytest.raises(DataError, match="is missing"):
        read(tmp_path / "none.parquet")


def test_ids_that_only_differ_in_their_spelling_are_refused(tmp_path: Path) -> None:
    rows = [{"user_id": "u", "history": ["A", "B", "c"]}]
    with pytest.raises(DataError, match="differ from a known id only in spelling"):
        read(as_jsonl(tmp_path / "h.jsonl", rows))
