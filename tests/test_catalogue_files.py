"""Readers of items, interactions and image folders: every format, and what each says about a broken file."""

from __future__ import annotations

import bz2
import datetime as dt
import gzip
import json
import lzma
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlm2rec.embedder.contract.errors import DataError
from vlm2rec.pipelines.catalogue import records
from vlm2rec.pipelines.catalogue.files import ColumnNames, read_items, scan_interactions
from vlm2rec.pipelines.catalogue.images import find_images, no_images_error


def zipped(content: bytes) -> bytes:
    """Compress without the time of day: test ids are made of what a file holds, and workers compare them."""
    return gzip.compress(content, mtime=0)


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read_interactions(path: Path, names: ColumnNames | None = None) -> pl.DataFrame:
    scratch = path.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    found = scan_interactions(path, names, scratch=scratch)
    frame = found.frame.collect()
    assert frame.height == found.rows
    return frame.drop("row")


def rows(frame: pl.DataFrame) -> list[tuple[Any, ...]]:
    return frame.rows()


ITEM_ROWS = [("007", "Tea, green"), ("b/2", "Ünï 🫖"), ("NA", None)]
CSV_ITEMS = 'item_id,title,year\n007,"Tea, green",1999\nb/2,Ünï 🫖,\nNA,,2001\n'


def separated_by(separator: str) -> str:
    return CSV_ITEMS.replace(",", separator).replace(f'"Tea{separator} green"', "Tea, green")


JSON_ITEMS = "".join(
    json.dumps({"item_id": item, "title": title, "year": year}, ensure_ascii=False) + "\n"
    for (item, title), year in zip(ITEM_ROWS, (1999, None, 2001), strict=True)
)


# --- items --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "label"),
    [
        ("items.csv", CSV_ITEMS, "CSV"),
        ("items.csv.gz", zipped(CSV_ITEMS.encode()), "CSV"),
        ("items.tsv", separated_by("\t"), "CSV"),
        (
            "semicolons.csv",
            CSV_ITEMS.replace('"Tea, green"', "Tea/green").replace(",", ";").replace("/g", ", g"),
            "CSV",
        ),
        ("windows.csv", "\ufeff" + CSV_ITEMS.replace("\n", "\r\n") + "\r\n", "CSV"),
        ("items.jsonl", JSON_ITEMS, "JSON lines"),
        ("items.json.gz", zipped(JSON_ITEMS.encode()), "JSON lines"),
        ("marked.jsonl", "\ufeff" + JSON_ITEMS.rstrip("\n"), "JSON lines"),
        ("blank-lines.jsonl", "\n" + JSON_ITEMS.replace("}\n{", "}\n\n{"), "JSON lines"),
        ("misleading.csv", JSON_ITEMS, "JSON lines"),
    ],
)
def test_text_formats_give_the_same_items_with_ids_as_text(
    tmp_path: Path, name: str, content: bytes | str, label: str
) -> None:
    items = read_items(write(tmp_path / name, content))
    assert items.format == label
    assert items.frame.columns == ["item_id", "title", "year"]
    assert rows(items.frame.select("item_id", "title")) == ITEM_ROWS
    years = ["1999", None, "2001"] if label == "CSV" else [1999, None, 2001]
    assert items.frame["year"].to_list() == years


def test_parquet_items_keep_their_other_columns_and_types(tmp_path: Path) -> None:
    frame = pl.DataFrame({"title": ["a", None], "item_id": ["007", "7"], "tags": [["x"], []], "price": [1.5, None]})
    frame.write_parquet(tmp_path / "items.parquet")
    items = read_items(tmp_path / "items.parquet")
    assert items.format == "Parquet"
    assert items.frame.schema == {
        "item_id": pl.String,
        "title": pl.String,
        "tags": pl.List(pl.String),
        "price": pl.Float64,
    }
    assert rows(items.frame) == [("007", "a", ["x"], 1.5), ("7", None, [], None)]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (pl.Series([7, 10**15], dtype=pl.Int64), ["7", "1000000000000000"]),
        (pl.Series([7.0, 1e15]), ["7", "1000000000000000"]),
        (pl.Series(["b", "a"], dtype=pl.Categorical), ["b", "a"]),
        (pl.Series([7, 8], dtype=pl.UInt8), ["7", "8"]),
    ],
)
def test_fault_36_ids_of_any_type_become_text_without_a_decimal_point(
    tmp_path: Path, ids: pl.Series, expected: list[str]
) -> None:
    pl.DataFrame({"item_id": ids, "title": ["x", "y"]}).write_parquet(tmp_path / "items.parquet")
    assert read_items(tmp_path / "items.parquet").frame["item_id"].to_list() == expected


def test_json_ids_of_mixed_types_become_text(tmp_path: Path) -> None:
    path = write(
        tmp_path / "i.jsonl",
        '{"item_id": 7, "title": "a"}\n{"item_id": "007", "title": 300}\n{"item_id": 8.0, "title": "c"}\n',
    )
    assert rows(read_items(path).frame) == [("7", "a"), ("007", "300"), ("8", "c")]


def test_json_columns_that_appear_late_or_change_their_type_are_kept(tmp_path: Path) -> None:
    path = write(
        tmp_path / "i.jsonl",
        '{"item_id": "a", "title": "A", "v": 1, "tags": ["x", "y"]}\n'
        '{"item_id": "b", "title": "B", "v": {"deep": [1]}, "late": true, "n": 1}\n'
        '{"item_id": "c", "title": "C", "n": 2.5, "tags": null}\n',
    )
    frame = read_items(path).frame
    assert frame.columns == ["item_id", "title", "v", "tags", "late", "n"]
    assert frame["v"].to_list() == ["1", '{"deep": [1]}', None]
    assert frame["tags"].to_list() == [["x", "y"], None, None]
    assert frame["late"].to_list() == [None, True, None]
    assert frame["n"].to_list() == [None, 1.0, 2.5]


def test_an_unpaired_surrogate_in_a_json_title_is_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "i.jsonl", '{"item_id": "a", "title": "x\\ud800y"}\n{"item_id": "b", "title": "\\u0000"}\n')
    assert rows(read_items(path).frame) == [("a", "x?y"), ("b", "\0")]


@pytest.mark.parametrize("form", [json.dumps, repr])
@pytest.mark.parametrize("field", ["user_id", "item_id", "timestamp"])
def test_half_a_character_in_an_id_or_a_time_is_refused(tmp_path: Path, field: str, form: Callable[[Any], str]) -> None:
    """Polars reads it as NUL: two such ids would be one."""
    events = [{"user_id": f"u{row}", "item_id": "a", "timestamp": f"2014-07-0{row}"} for row in range(1, 5)]
    events[2][field] = "x\ud83e"
    path = write(tmp_path / "log", "".join(f"{form(event)}\n" for event in events))
    with pytest.raises(DataError, match=r"line 3 .*half of a character|such as 'x\\x00' \(row 3\)"):
        scan_interactions(path, scratch=tmp_path)
    if field == "item_id":
        with pytest.raises(DataError, match=r"line 3 .*half of a character"):
            read_items(write(tmp_path / "items", "".join(f"{form({**e, 'title': 't'})}\n" for e in events)))


def test_half_a_character_in_a_name_of_the_items_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "i.jsonl", '{"item_id": "a", "title": "t"}\n{"item_id": "b", "title": "t", "\\ud83e": 1}\n')
    with pytest.raises(DataError, match=r"line 2 .*half of a character"):
        read_items(path)


def test_other_column_names_are_taken_and_the_standard_names_move_aside(tmp_path: Path) -> None:
    path = write(tmp_path / "items.csv", "sku,name,item_id,title\n1,Lamp,x,old\n")
    frame = read_items(path, ColumnNames(item_id="sku", title="name")).frame
    assert frame.columns == ["item_id", "title", "source_item_id", "source_title"]
    assert rows(frame) == [("1", "Lamp", "x", "old")]
    path = write(tmp_path / "items.jsonl", '{"sku": 1, "name": "Lamp", "item_id": "x", "title": "old"}\n')
    frame = read_items(path, ColumnNames(item_id="sku", title="name")).frame
    assert rows(frame.select("item_id", "title", "source_item_id", "source_title")) == [("1", "Lamp", "x", "old")]


AMAZON_2014 = (
    "{'asin': '0000031852', 'title': \"Girls Ballet &amp; Tutu\", 'price': 3.17, "
    "'imUrl': 'http://ecx.images-amazon.com/images/I/51fAmVkTbyL._SY300_.jpg', "
    "'related': {'also_bought': ['B00JHONN1S']}, 'salesRank': {'Toys & Games': 211836}, 'brand': 'Coxlures', "
    "'categories': [['Sports & Outdoors', 'Other Sports'], ['Sports & Outdoors', 'Dance']]}\n"
    "{'asin': 'B000000001', 'description': 'a back\\\\slash and a \\'quote\\'', 'title': 'It\\'s \\d \\xe9'}\n"
    "{'asin': 'B000000002', 'imUrl': 'http://x/y.jpg'}\n"
)


@pytest.mark.parametrize("packed", [False, True])
def test_amazon_2014_metadata_is_read_from_python_literals(tmp_path: Path, packed: bool) -> None:
    content = AMAZON_2014.encode()
    path = write(tmp_path / "meta_Toys.json.gz", zipped(content) if packed else content)
    items = read_items(path)
    assert items.format == "Amazon 2014 metadata (Python literal lines)"
    assert items.frame["item_id"].to_list() == ["0000031852", "B000000001", "B000000002"]
    assert items.frame["title"].to_list() == ["Girls Ballet & Tutu", "It's \\d é", None]
    assert items.frame["categories"].to_list() == ["Sports & Outdoors, Other Sports, Dance", None, None]
    assert items.frame["description"][1] == "a back\\slash and a 'quote'"
    assert items.frame["imUrl"][2] == "http://x/y.jpg"
    assert items.frame["brand"][0] == "Coxlures"


def test_amazon_2023_metadata_is_recognised_by_parent_asin(tmp_path: Path) -> None:
    records = [
        {
            "main_category": "All Beauty",
            "title": "Howard LC0008 &quot;Leather&quot;",
            "price": None,
            "images": [
                {"thumb": "https://m/t1.jpg", "large": "https://m/l1.jpg", "variant": "PT01", "hi_res": None},
                {"thumb": "https://m/t2.jpg", "large": "https://m/l2.jpg", "variant": "MAIN", "hi_res": None},
            ],
            "store": "Howard",
            "categories": ["Beauty", "Hair"],
            "details": {"Size": 3},
            "parent_asin": "B01CUPMQZE",
        },
        {"title": "No picture", "images": [], "categories": [], "main_category": "Beauty", "parent_asin": "B076WQZGPM"},
    ]
    path = write(
        tmp_path / "meta_All_Beauty.jsonl.gz",
        zipped("".join(json.dumps(record) + "\n" for record in records).encode()),
    )
    items = read_items(path)
    assert items.format == "Amazon 2023 metadata (JSON lines)"
    assert rows(items.frame.select("item_id", "title", "categories", "image_url")) == [
        ("B01CUPMQZE", 'Howard LC0008 "Leather"', "Beauty, Hair", "https://m/l2.jpg"),
        ("B076WQZGPM", "No picture", "Beauty", None),
    ]


def test_python_literals_are_never_run(tmp_path: Path) -> None:
    path = write(
        tmp_path / "meta.json",
        "{'asin': 'A', 'title': 't'}\n{'asin': __import__('os').system('touch " + str(tmp_path / "run") + "')}\n",
    )
    with pytest.raises(DataError, match="line 2 of"):
        read_items(path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.csv", b"", ["is empty"]),
        ("blank.jsonl", b"\n \n", ["is empty"]),
        ("header.csv", b"item_id,title\n", ["columns but no items"]),
        ("ragged.csv", b"item_id,title\n1,tea\n2,a,b\n", ["line 3", "3 fields", "has 2"]),
        ("column.csv", b"item_id,titel\n1,tea\n", ["'title'", "did you mean 'titel'", "--title-column"]),
        ("column.jsonl", b'{"itemid": 1, "title": "a"}\n', ["'item_id'", "'itemid'", "--item-id-column"]),
        ("half.jsonl", b'{"item_id": 1, "title": "a"}\n{"item_id": 2, "ti\n', ["line 2"]),
        ("array.json", b'[{"item_id": 1}]', ["JSON array", "jq -c"]),
        ("pretty.json", b'{\n "item_id": 1\n}\n', ["line 1"]),
        ("broken.parquet", b"PAR1 and then nothing", ["cannot be read as Parquet"]),
        ("broken.csv.gz", zipped(b"item_id,title\n" + os.urandom(999))[:-40], ["cannot be unpacked"]),
    ],
)
def test_a_broken_items_file_is_a_data_error_that_names_the_place(
    tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    assert_refused(tmp_path, name, content, words)


def assert_refused(tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        read_items(write(tmp_path / name, content))
    for word in [*words, name.split(".")[0]]:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("latin.csv", "item_id,title\n1,tea\n2,café\n".encode("latin-1"), ["not UTF-8", "line 3", "byte 6", "iconv"]),
        ("latin-head.csv", "item_id,títle\n1,tea\n".encode("latin-1"), ["not UTF-8", "line 1"]),
        ("utf16.csv", "item_id,title\n1,tea\n".encode("utf-16"), ["UTF-16", "line 1"]),
        ("utf16-le.csv", "item_id,title\n1,tea\n".encode("utf-16-le"), ["UTF-16", "line 1"]),
        ("latin.jsonl", '{"item_id":1,"title":"a"}\n{"item_id":2,"title":"é"}\n'.encode("latin-1"), ["line 2"]),
        ("latin-1st.jsonl", '{"item_id":2,"title":"é"}\n'.encode("latin-1"), ["not UTF-8", "line 1"]),
    ],
)
def test_fault_34_an_items_file_in_another_encoding_is_an_error_naming_the_line(
    tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    assert_refused(tmp_path, name, content, words)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("twice.csv", b"item_id,title\n7,a\n8,b\n7,c\n", ["item id '7'", "rows 1 and 3"]),
        ("null-id.csv", b"item_id,title\n7,a\n,b\n", ["row 2", "no item_id"]),
        ("blank-id.jsonl", b'{"item_id": " ", "title": "a"}\n', ["row 1", "no item_id"]),
        ("list-id.jsonl", b'{"item_id": [1], "title": "a"}\n', ["line 1", "[1]"]),
    ],
)
def test_fault_36_duplicate_and_missing_ids_are_an_error_naming_the_row(
    tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    assert_refused(tmp_path, name, content, words)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is missing"):
        read_items(tmp_path / "nothing.csv")
    with pytest.raises(DataError, match="a folder"):
        read_items(tmp_path)


def test_float_ids_that_are_no_whole_numbers_are_refused(tmp_path: Path) -> None:
    pl.DataFrame({"item_id": [1.0, 2.5], "title": ["a", "b"]}).write_parquet(tmp_path / "items.parquet")
    with pytest.raises(DataError, match=r"2\.5 \(row 2\)"):
        read_items(tmp_path / "items.parquet")


# --- interactions -------------------------------------------------------------------------------------------


LOG = [("u1", "007", 30), ("u2", "b/2", 10), ("u1", "NA", 20)]
CSV_LOG = "rating,user_id,item_id,timestamp\n" + "".join(f"5,{u},{i},{t}\n" for u, i, t in LOG)
JSON_LOG = "".join(json.dumps({"user_id": u, "text": "é", "item_id": i, "timestamp": t}) + "\n" for u, i, t in LOG)


@pytest.mark.parametrize(
    ("name", "content", "label"),
    [
        ("x.csv", CSV_LOG, "CSV"),
        ("x.csv.gz", zipped(CSV_LOG.encode()), "CSV"),
        ("x.tsv", CSV_LOG.replace(",", "\t"), "CSV"),
        ("windows.csv", CSV_LOG.replace("\n", "\r\n") + "\r\n", "CSV"),
        ("x.jsonl", JSON_LOG, "JSON lines"),
        ("x.jsonl.gz", zipped(JSON_LOG.encode()), "JSON lines"),
        ("marked.jsonl", "\ufeff" + JSON_LOG.rstrip(), "JSON lines"),
        (
            "2014.json.gz",
            zipped(
                "".join(
                    json.dumps({"reviewerID": u, "asin": i, "overall": 5.0, "unixReviewTime": t}) + "\n"
                    for u, i, t in LOG
                ).encode()
            ),
            "Amazon 2014 reviews (JSON lines)",
        ),
        (
            "2023.jsonl.gz",
            zipped(
                "".join(
                    json.dumps({"asin": "variant", "parent_asin": i, "user_id": u, "timestamp": t}) + "\n"
                    for u, i, t in LOG
                ).encode()
            ),
            "Amazon 2023 reviews (JSON lines)",
        ),
        (
            "literal.json",
            "".join(f"{{'reviewerID': {u!r}, 'asin': {i!r}, 'unixReviewTime': {t}}}\n" for u, i, t in LOG),
            "Amazon 2014 reviews (Python literal lines)",
        ),
        (
            "2023-ratings-only.csv",
            "user_id,parent_asin,rating,timestamp\n" + "".join(f"{u},{i},5,{t}\n" for u, i, t in LOG),
            "Amazon 2023 reviews (CSV)",
        ),
    ],
)
def test_every_format_gives_the_same_interactions_in_the_files_order(
    tmp_path: Path, name: str, content: bytes | str, label: str
) -> None:
    path = write(tmp_path / name, content)
    assert rows(read_interactions(path)) == LOG
    assert scan_interactions(path, scratch=tmp_path / "scratch").format == label


def test_a_file_of_several_blocks_keeps_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_BLOCK_BYTES", 100)
    log = [(f"u{n % 7}", f"i{n}", 1000 - n) for n in range(300)]
    lines = [json.dumps({"user_id": u, "item_id": i, "timestamp": t}) for u, i, t in log]
    assert rows(read_interactions(write(tmp_path / "x.jsonl", "\n".join(lines)))) == log
    lines[250] = lines[250][:-1]
    with pytest.raises(DataError, match="line 251 of"):
        read_interactions(write(tmp_path / "x.jsonl", "\n".join(lines)))


@pytest.mark.parametrize(
    "times",
    [
        pl.Series([3, 1, 2], dtype=pl.Int32),
        pl.Series([3, 1, 2], dtype=pl.UInt64),
        pl.Series([2.5, -1.0, 2.0]),
        pl.Series([dt.date(2014, 7, 3), dt.date(1969, 1, 1), dt.date(2014, 7, 2)]),
        pl.Series([dt.datetime(2014, 7, 1, 3), dt.datetime(2014, 7, 1, 1), dt.datetime(2014, 7, 1, 2)]),
        pl.Series(["30", " 9", "10"]),
        pl.Series(["1.5e3", "9", "10"]),
        pl.Series(["2014-07-03", "1969-01-01", "2014-07-02"]),
        pl.Series(["2014-07-01 03:00:00", "2014-07-01 01:00:00.5", "2014-07-01 02:00:00"]),
        pl.Series(["2014-07-01T03:00:00", "2014-07-01T01:00:00", "2014-07-01T02:00:00.25"]),
        pl.Series(["2014-07-01T03:00:00Z", "2014-07-01T01:00:00Z", "2014-07-01T02:00:00Z"]),
        pl.Series(["2014-07-01T03:00:00+00:00", "2014-07-01T03:00:00+02:00", "2014-07-01T01:00:00-01:00"]),
    ],
)
def test_times_of_any_form_keep_their_order(tmp_path: Path, times: pl.Series) -> None:
    pl.DataFrame({"user_id": ["u"] * 3, "item_id": ["a", "b", "c"], "timestamp": times}).write_parquet(
        tmp_path / "x.parquet"
    )
    frame = read_interactions(tmp_path / "x.parquet")
    assert frame.sort("time")["item_id"].to_list() == ["b", "c", "a"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("no-item.csv", "user_id,item_id,timestamp\nu,,1\nu,,2\n", ["none of the 2 rows", "in 'item_id'"]),
        ("null.jsonl", '{"user_id": "u", "item_id": null, "timestamp": 1}\n', ["none of the 1 rows", "item_id"]),
        ("true.jsonl", '{"user_id": "u", "item_id": "i", "timestamp": 1}\n{"user_id": true}\n', ["line 2", "True"]),
        ("half-id.jsonl", '{"user_id": 1.5, "item_id": "i", "timestamp": 1}\n', ["line 1", "1.5"]),
        ("list-id.jsonl", '{"user_id": 1, "item_id": [2], "timestamp": 1}\n', ["line 1", "[2]"]),
        ("endless.jsonl", '{"user_id": Infinity, "item_id": 2, "timestamp": 1}\n', ["line 1", "inf"]),
        ("list-time.jsonl", '{"user_id": NaN, "item_id": 2, "timestamp": [1]}\n', ["line 1", "[1]"]),
        ("short.csv", "user_id,item_id,timestamp\nu,i,1\nu,i\n", ["line 3", "2 fields", "'u,i'"]),
        ("word.csv", "user_id,item_id,timestamp\nu,i,1\nu,i,soon\n", ["row 2", "'soon'", "--time-column"]),
        ("words.csv", "user_id,item_id,timestamp\nu,i,soon\nu,i,late\n", ["row 1", "'soon'"]),
        ("bad-date.csv", "user_id,item_id,timestamp\nu,i,2014-07-01\nu,i,2014-13-01\n", ["row 2", "2014-13-01"]),
        ("column.csv", "user,item_id,timestamp\nu,i,1\n", ["'user_id'", "did you mean 'user'", "--user-id-column"]),
        ("header.csv", "user_id,item_id,timestamp\n", ["no interactions"]),
        ("empty.jsonl", "", ["is empty"]),
        ("half.jsonl", '{"user_id": "u", "item_id": "i", "timestamp": 1}\n{"user_id"\n', ["line 2"]),
        ("number.jsonl", '{"user_id": "u", "item_id": "i", "timestamp": 1}\n5\n', ["line 2", "not an object"]),
    ],
)
def test_a_broken_interactions_file_is_a_data_error_that_names_the_row(
    tmp_path: Path, name: str, content: str, words: list[str]
) -> None:
    with pytest.raises(DataError) as caught:
        read_interactions(write(tmp_path / name, content))
    for word in [*words, name.split(".")[0]]:
        assert word in str(caught.value), str(caught.value)


def test_fault_34_wrong_encoding_far_inside_a_csv_is_found(tmp_path: Path) -> None:
    lines = [b"user_id,item_id,timestamp"] + [b"u%d,i,%d" % (n, n) for n in range(50_000)]
    lines[40_000] = "usér,i,1".encode("latin-1")
    with pytest.raises(DataError, match="line 40,001, byte 3 "):
        read_interactions(write(tmp_path / "x.csv", b"\n".join(lines)))


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("user_id", pl.Series([1.0, 1.5]), ["row 2", "1.5"]),
        ("user_id", pl.Series([1.0, 2.0**53 + 2]), ["row 2", "9007199254740994.0"]),
        ("item_id", pl.Series([1.0, 2.0**24 + 2], dtype=pl.Float32), ["row 2", "16777218.0", "Float32"]),
        ("timestamp", pl.Series([1.0, 1.7e9], dtype=pl.Float32), ["row 2", "1700000000.0", "Float32", "--order file"]),
        ("item_id", pl.Series([True, False]), ["Boolean"]),
        ("timestamp", pl.Series([True, False]), ["Boolean", "--time-column"]),
        ("timestamp", pl.Series([float("inf"), float("nan")]), ["none of the 2 rows", "timestamp", "--order file"]),
        ("user_id", pl.Series([float("nan"), float("nan")]), ["none of the 2 rows", "user_id"]),
        ("timestamp", pl.Series([None, None]), ["none of the 2 rows", "timestamp"]),
        ("timestamp", pl.Series(["nan", "NaT"]), ["none of the 2 rows", "timestamp"]),
    ],
)
def test_impossible_values_in_parquet_are_named(
    tmp_path: Path, column: str, values: pl.Series, words: list[str]
) -> None:
    good = {"user_id": ["u", "v"], "item_id": ["a", "b"], "timestamp": [1, 2]}
    pl.DataFrame({**good, column: values}).write_parquet(tmp_path / "x.parquet")
    with pytest.raises(DataError) as caught:
        read_interactions(tmp_path / "x.parquet")
    for word in words:
        assert word in str(caught.value), str(caught.value)


# --- images -------------------------------------------------------------------------------------------------


def images_of(root: Path, ids: list[str], paths: list[str | None] | None = None) -> list[str | None]:
    frame = pl.DataFrame({"item_id": ids, "title": ids})
    if paths is not None:
        frame = frame.with_columns(pl.Series("image_path", paths, dtype=pl.String))
    return find_images(root, frame).paths.to_list()


def test_images_are_found_by_id_and_the_best_ending_wins(tmp_path: Path) -> None:
    for name in ("1.jpg", "1.png", "2.WEBP", "3.txt", "4.bmp", "5.gif", "a.b.jpeg", "6.tiff", ".jpg", "é.png"):
        write(tmp_path / name, b"x")
    (tmp_path / "7.jpg").mkdir()
    os.mkfifo(tmp_path / "8.jpg")
    wanted = ["1", "2", "3", "4", "5", "a.b", "6", "7", "8", "9", "é", ""]
    assert images_of(tmp_path, wanted) == [
        *("1.jpg", "2.WEBP", None, "4.bmp", "5.gif", "a.b.jpeg"),
        *(None, None, None, None, "é.png", None),
    ]


def test_fault_36_ids_never_become_paths(tmp_path: Path) -> None:
    write(tmp_path / "secret.jpg", b"x")
    write(tmp_path / "root/b/2.jpg", b"x")
    write(tmp_path / "root/1.jpg", b"x")
    assert images_of(tmp_path / "root", ["1", "b/2", "../secret", str(tmp_path / "secret")]) == [
        "1.jpg",
        *(None, None, None),
    ]


def test_the_image_path_column_decides_and_cannot_leave_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("a.jpg", "deep/er/b.jpg", "1.jpg"):
        write(root / name, b"x")
    write(tmp_path / "out.jpg", b"x")
    (root / "link.jpg").symlink_to(root / "a.jpg")
    (root / "leak.jpg").symlink_to(tmp_path / "out.jpg")
    (root / "up").symlink_to(tmp_path)
    given = {
        "a.jpg": "a.jpg",
        "./deep/../a.jpg": "a.jpg",
        "deep/er/b.jpg": "deep/er/b.jpg",
        str(root / "deep/er/b.jpg"): "deep/er/b.jpg",
        "link.jpg": "link.jpg",
        "leak.jpg": None,
        "up/out.jpg": None,
        "../out.jpg": None,
        "deep/../../out.jpg": None,
        str(tmp_path / "out.jpg"): None,
        "http://x/a.jpg": None,
        "file:///etc/passwd": None,
        "deep": None,
        "missing.jpg": None,
        "nowhere/a.jpg": None,
        "a\0.jpg": None,
        "": None,
        ".": None,
        "..": None,
    }
    ids = [str(n) for n in range(len(given) + 1)]
    assert images_of(root, ids, [*given, None]) == [*given.values(), None]


def test_an_image_root_that_is_not_there_says_where_pictures_come_from(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"img2dataset.*<item_id>\.<jpg"):
        images_of(tmp_path / "nowhere", ["1"])
    with pytest.raises(DataError, match="not a folder"):
        images_of(write(tmp_path / "file", b""), ["1"])


def test_an_image_path_column_of_another_type_and_a_catalogue_without_pictures_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "9.jpg", b"x")
    with pytest.raises(DataError, match="'image_path' of the items holds List"):
        find_images(tmp_path, pl.DataFrame({"item_id": ["9"], "image_path": [["9.jpg"]]}))
    urls = pl.DataFrame({"item_id": ["1"], "imUrl": ["http://x/1.jpg"]})
    found = find_images(tmp_path, urls)
    with pytest.raises(DataError, match=r"holds 9\.jpg.*1\.jpg.*img2dataset.*column 'imUrl'"):
        raise no_images_error(tmp_path, urls, found)


def reasons_of(root: Path, ids: list[str], paths: list[str | None] | None = None) -> list[str | None]:
    frame = pl.DataFrame({"item_id": ids, "title": ids})
    if paths is not None:
        frame = frame.with_columns(pl.Series("image_path", paths, dtype=pl.String))
    return find_images(root, frame).reasons.to_list()


COMPOSED, APART = "caf\u00e9", "cafe\u0301"  # the same word in NFC and in NFD, as macOS writes it


@pytest.mark.parametrize(
    ("file", "item"),
    [
        (f"{APART}.jpg", COMPOSED),
        (f"{COMPOSED}.jpg", APART),
        ("B00ABC.JPG", "b00abc"),
        (f"{APART.upper()}.png", COMPOSED),
        ("1.jfif", "1"),
        ("1.JFIF", "1"),
        ("1.jpe", "1"),
        ("1.avif", "1"),
        ("1.jpg", "1.jpg"),
        ("010/0108775015.jpg", "0108775015"),
        (f"a/b/c/{APART}.PNG", COMPOSED),
        ("1/1.jpg", "1"),
    ],
)
def test_an_image_is_found_under_any_spelling_of_its_name_and_in_any_folder(
    tmp_path: Path, file: str, item: str
) -> None:
    write(tmp_path / file, b"x")
    write(tmp_path / "other.txt", b"x")
    assert images_of(tmp_path, [item, "none"]) == [file, None]


def test_a_file_of_another_spelling_is_never_another_items(tmp_path: Path) -> None:
    for name in (
        "a.jpg",
        "c/x.jpg",
        "d/x.jpg",
        "e/y.jpg",
        "e/y.png",
        "z.jpg",
        "f/z.jpg",
        ".hidden/h.jpg",
        "__MACOSX/m.jpg",
    ):
        write(tmp_path / name, b"x")
    (tmp_path / "loop").symlink_to(tmp_path)
    ids = ["a", "A", "b", "B", "x", "y", "z", "h", "m"]
    assert images_of(tmp_path, ids) == ["a.jpg", None, None, None, None, "e/y.jpg", "z.jpg", None, None]
    assert reasons_of(tmp_path, ids)[4] == "2 files have its name: c/x.jpg, d/x.jpg"
    # b.jpg would be either's
    write(tmp_path / "b.JPG", b"x")
    assert images_of(tmp_path, ["B", "b"]) == [None, "b.JPG"]
    (tmp_path / "b.JPG").rename(tmp_path / "q.jpg")
    assert images_of(tmp_path, ["Q", "a"]) == ["q.jpg", "a.jpg"]


def test_every_item_without_an_image_has_its_reason(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("root/0123.jpg", "root/deep/00456.jpg", "root/scan.tif", "out.jpg", "outside/far.jpg"):
        write(tmp_path / name, b"x")
    (root / "out.jpg").symlink_to(tmp_path / "out.jpg")
    (root / "deep/below.jpg").symlink_to("../../out.jpg")
    (root / "broken.jpg").symlink_to(root / "nothing")
    (root / "within.jpg").symlink_to(root / "deep/00456.jpg")
    (root / "deep/relative.jpg").symlink_to("../0123.jpg")
    (root / "linked").symlink_to(tmp_path / "outside")
    os.mkfifo(root / "pipe.jpg")
    expected = {
        "within": None,
        "relative": None,
        "out": "out.jpg is a link that leads out of the image folder",
        "below": "deep/below.jpg is a link that leads out of the image folder",
        "broken": "broken.jpg is a link to nothing",
        "pipe": "pipe.jpg is not a regular file",
        "scan": "scan.tif has no ending of an image",
        "123": "0123.jpg differs in its leading zeros",
        "456": "deep/00456.jpg differs in its leading zeros",
        "far": "linked is a link that leads out of the image folder and was not searched",
    }
    for reason, words in zip(reasons_of(root, list(expected)), expected.values(), strict=True):
        assert (reason is None) == (words is None) and (words or "") in (reason or "")


def test_paths_of_other_systems_lead_to_their_files(tmp_path: Path) -> None:
    for name in ("d/1.jpg", f"{APART}/{APART}.jpg", "Photos/Big/2.JPG", "a b/3.jpg", "x\\y.jpg"):
        write(tmp_path / name, b"x")
    given = {
        "d\\1.jpg": "d/1.jpg",
        ".\\d\\1.jpg": "d/1.jpg",
        "d/\\1.jpg": "d/1.jpg",
        f"{COMPOSED}/{COMPOSED}.jpg": f"{APART}/{APART}.jpg",
        f"{COMPOSED}\\{APART}.jpg": f"{APART}/{APART}.jpg",
        "photos/big/2.jpg": "Photos/Big/2.JPG",
        " d/1.jpg ": "d/1.jpg",
        "a b\\3.jpg": "a b/3.jpg",
        "x\\y.jpg": "x\\y.jpg",
    }
    assert images_of(tmp_path, [*given], [*given]) == [*given.values()]


def test_every_path_without_a_file_has_its_reason(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write(root / "d/1.jpg", b"x")
    write(tmp_path / "out.jpg", b"x")
    (root / "leak.jpg").symlink_to(tmp_path / "out.jpg")
    (root / "up").symlink_to(tmp_path)
    expected = {
        "": "no path is given",
        "https://x/1.jpg": "is a URL",
        "../out.jpg": "leads out of the image folder",
        "..\\out.jpg": "leads out of the image folder",
        "C:\\pictures\\1.jpg": "is a path of Windows",
        "leak.jpg": "leak.jpg is a link that leads out",
        "up/out.jpg": "up is a link that leads out",
        "d": "d is a folder",
        "d/2.jpg": "no file d/2.jpg in the image folder",
        "e/1.jpg": "the image folder has no folder e",
    }
    ids = [str(n) for n in range(len(expected) + 1)]
    for reason, words in zip(reasons_of(root, ids, [*expected, None]), [*expected.values(), "no path"], strict=True):
        assert reason is not None and words in reason


def test_a_chosen_column_names_the_images_and_one_that_is_not_there_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "b.jpg", b"x")
    items = pl.DataFrame({"item_id": ["1"], "image_path": ["a.jpg"], "photo": ["b.jpg"]})
    assert find_images(tmp_path, items).paths.to_list() == [None]
    assert find_images(tmp_path, items, "photo").paths.to_list() == ["b.jpg"]
    with pytest.raises(DataError, match=r"no column 'photos' \(did you mean 'photo'\?\).*--image-column"):
        find_images(tmp_path, items, "photos")


# --- names that are taken, and archives ---------------------------------------------------------------------------
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_column_called_as_ours_gets_a_name_that_no_other_column_has(tmp_path: Path, ending: str) -> None:
    frame = pl.DataFrame({"sku": ["a"], "item_id": ["x"], "source_item_id": ["y"], "title": ["Lamp"]})
    path = tmp_path / f"items.{ending}"
    {"csv": frame.write_csv, "jsonl": frame.write_ndjson, "parquet": frame.write_parquet}[ending](path)
    found = read_items(path, ColumnNames(item_id="sku"))
    assert found.frame.rows(named=True) == [
        {"item_id": "a", "title": "Lamp", "source_item_id_2": "x", "source_item_id": "y"}
    ]


@pytest.mark.parametrize(
    ("name", "pack", "expected"),
    [
        ("items.zip", None, "compressed with zip"),
        ("items.csv.bz2", bz2.compress, "compressed with bzip2"),
        ("items.csv.xz", lzma.compress, "compressed with xz"),
        (
            "items.csv.zst",
            lambda content: pa.compress(content, codec="zstd", asbytes=True),
            "compressed with Zstandard",
        ),
    ],
)
def test_an_archive_is_named_with_the_command_that_opens_it(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes] | None, expected: str
) -> None:
    content, path = b"item_id,title\n1,Lamp\n", tmp_path / name
    if pack is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("items.csv", content)
    else:
        path.write_bytes(pack(content))
    with pytest.raises(DataError, match=expected) as refused:
        read_items(path)
    assert name in str(refused.value).partition("for example with")[2]


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_a_column_whose_name_holds_a_nul_is_refused(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"items.{ending}"
    if ending == "jsonl":
        file.write_text('{"item_id": "a", "title": "A", "pr\\u0000ce": 1}\n')
    else:
        pq.write_table(pa.table({"item_id": ["a"], "title": ["A"], "prXce": [1]}), file)
        file.write_bytes(file.read_bytes().replace(b"prXce", b"pr\0ce"))
    with pytest.raises(DataError, match=r"name holds a NUL character: 'pr\\x00ce'"):
        read_items(file)
