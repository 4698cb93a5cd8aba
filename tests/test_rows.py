"""What the rows of a catalogue and of a log mean: ids, missing values, times, and the account of what is left out."""

from __future__ import annotations

import csv
import datetime as dt
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from test_prepare import Row, config, write_catalogue

from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ConfigError, DataError
from vlm2rec.embedder.contract.printable import cell
from vlm2rec.pipelines import prepare
from vlm2rec.pipelines.catalogue import rejects
from vlm2rec.pipelines.catalogue.amazon import image_url
from vlm2rec.pipelines.catalogue.files import ColumnNames, read_items, scan_interactions
from vlm2rec.pipelines.catalogue.ids import explain
from vlm2rec.pipelines.catalogue.rejects import safe_text
from vlm2rec.pipelines.catalogue.times import check_unit

LOG = [(user, item, place) for user in "uvw" for place, item in enumerate("abcd")] + [
    ("x", item, place) for place, item in enumerate("efg")
]


def rejected(folder: Path) -> list[dict[str, str]]:
    with (folder / "rejects.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def histories(dataset: Dataset) -> dict[str, list[str]]:
    return {row["user_id"]: [*row["train"], row["valid"], row["test"]] for row in dataset.sequences.to_pylist()}


def write_log(path: Path, rows: list[tuple[Any, Any, Any]], form: str = "jsonl") -> Path:
    """Write interactions as JSON lines, as Python's json does, or as Parquet."""
    path = path.with_suffix(f".{form}")
    records = [dict(zip(("user_id", "item_id", "timestamp"), row, strict=True)) for row in rows]
    if form == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        pl.DataFrame(records, strict=False).write_parquet(path)
    return path


# --- the account ------------------------------------------------------------------------------------------------
def test_every_row_that_is_left_out_stands_in_rejects_with_its_reason_and_in_the_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log: list[tuple[Any, Any, Any]] = [
        *LOG,
        (None, "a", 1),
        ("u", " ", 1),
        ("u", "a", None),
        ("u", "unknown", 5),
        ("u", "untitled", 6),
        ("u", "unseen", 7),
        ("u", "a", 0),
        ("stray", "a", 8),
    ]
    items = [*"abcdefg", "untitled", "unseen"]
    paths = write_catalogue(tmp_path, [], items=items, without_image=("unseen",))
    title = pl.when(pl.col("item_id") == "untitled").then(pl.lit(" ")).otherwise("title")
    pl.read_parquet(paths["items"]).with_columns(title.alias("title")).write_parquet(paths["items"])
    paths["interactions"] = write_log(tmp_path / "log", log)
    dataset = prepare.run(config(paths))
    found = rejected(paths["out"])
    outside = "outside the 1-core"
    assert [
        (row["file"], int(row["row"]), row["user_id"], row["item_id"], row["reason"].partition(":")[0]) for row in found
    ] == [
        ("interactions", 16, "", "a", "no user id"),
        ("interactions", 17, "u", "", "no item id"),
        ("interactions", 18, "u", "a", "no time"),
        ("interactions", 19, "u", "unknown", "item not in the catalogue"),
        ("items", 8, "", "untitled", "no title"),
        ("interactions", 20, "u", "untitled", "item without a title"),
        ("items", 9, "", "unseen", "no image"),
        ("interactions", 21, "u", "unseen", "item without an image"),
        ("interactions", 22, "u", "a", "copy of an earlier row (user, item and time)"),
        ("interactions", 23, "stray", "a", f"{outside}, users with 3 interactions"),
    ]
    rows = dataset.meta["rows"]
    assert rows["items"] == {"read": 9, "kept": 7, "rejected": {"no title": 1, "no image": 1}}
    assert rows["interactions"]["read"] == len(log) == 23
    assert rows["interactions"]["kept"] == len(LOG) == dataset.meta["interactions"]
    assert sum(rows["interactions"]["rejected"].values()) == 8
    told = " ".join(capsys.readouterr().err.split())
    assert "left out: 2 of 9 items and 8 of 23 interactions" in told
    for words in ("no user id", "row 16", "'unknown' (row 19)", "'untitled' (row 8)", "'unseen' (row 9)"):
        assert words in told


def test_a_log_of_which_nothing_is_left_out_has_an_empty_list(tmp_path: Path) -> None:
    paths = write_catalogue(tmp_path, LOG)
    assert prepare.run(config(paths)).meta["rows"]["interactions"]["rejected"] == {}
    assert (paths["out"] / "rejects.csv").read_text() == "file,row,item_id,user_id,reason\n"


def test_many_rejects_are_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejects, "_ROWS_AT_A_TIME", 7)
    log: list[Row] = [*LOG, *((f"visitor {n}", "a", n) for n in range(40)), *LOG]
    paths = write_catalogue(tmp_path, log)
    prepare.run(config(paths))
    found = rejected(paths["out"])
    assert sorted(int(row["row"]) for row in found) == list(range(len(LOG) + 1, len(log) + 1))
    assert {row["user_id"] for row in found if row["reason"].startswith("outside")} == {
        f"visitor {n}" for n in range(40)
    }


@pytest.mark.parametrize("start", ["=1+1", "+1", "-1", "@x", '=HYPERLINK("http://x","y")'])
def test_no_id_in_the_list_is_a_formula(tmp_path: Path, start: str) -> None:
    log: list[Row] = [*LOG, (start, start, 1), (start, "a", 2)]
    paths = write_catalogue(tmp_path, log, items=list("abcdefg"))
    prepare.run(config(paths))
    found = rejected(paths["out"])
    assert [(row["user_id"], row["item_id"]) for row in found] == [("'" + start, "'" + start), ("'" + start, "a")]


def test_a_column_of_the_list_is_made_as_each_cell_of_other_tables() -> None:
    texts = [
        "=a",
        " =a",
        "\t=a",
        "\uff1da",
        "a\tb",
        "x\x1b[31m",
        "plain",
        "\r@",
        "-1",
        "a\nb",
        "",
        "\u202eabc",
        "\u00a0=x",
    ]
    column = pl.DataFrame({"text": texts}).select(safe_text(pl.col("text")).alias("text"))["text"].to_list()
    assert column == [cell(text) for text in texts]


# --- ids ----------------------------------------------------------------------------------------------------------
NAN = float("nan")


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_nan_and_null_are_no_user_item_or_time(tmp_path: Path, form: str) -> None:
    paths = write_catalogue(tmp_path, [], items=[str(n) for n in range(1, 8)])
    log = [(float(ord(user)), float(ord(item) - ord("a") + 1), float(time)) for user, item, time in LOG]
    log += [(NAN, 1.0, 1.0), (117.0, NAN, 1.0), (117.0, 1.0, NAN)]
    paths["interactions"] = write_log(tmp_path / "log", log, form)
    dataset = prepare.run(config(paths))
    assert dataset.meta["rows"]["interactions"]["rejected"] == {"no user id": 1, "no item id": 1, "no time": 1}
    assert histories(dataset) == {
        str(ord(user)): [str(ord(i) - ord("a") + 1) for u, i, _ in LOG if u == user] for user in "uvwx"
    }


def test_a_python_literal_nan_or_none_is_missing_as_well(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text(
        "{'user_id': None, 'item_id': 'a', 'timestamp': 1}\n{'user_id': 'u', 'item_id': 'a', 'timestamp': None}\n"
    )
    found = scan_interactions(path, scratch=tmp_path)
    assert found.frame.collect().rows() == [(0, None, "a", 1), (1, "u", "a", None)]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_nan_title_is_no_title(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"items.{form}"
    records = [{"item_id": "a", "title": NAN, "tags": NAN}, {"item_id": "b", "title": 7.5, "tags": ["x"]}]
    if form == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        assert read_items(path).frame["tags"].to_list() == [None, ["x"]]
    else:
        pl.DataFrame({"item_id": ["a", "b"], "title": [NAN, 7.5]}).write_parquet(path)
    assert read_items(path).frame["title"].to_list() == [None, "7.5"]
    amazon = tmp_path / "meta.json"
    amazon.write_text('{"asin": "a", "title": NaN, "price": NaN}\n{"asin": "b", "title": "x &amp; y"}\n')
    assert read_items(amazon).frame.select("title", "price").rows() == [(None, None), ("x & y", None)]


def test_a_missing_item_id_in_the_catalogue_is_refused_whatever_stands_for_it(tmp_path: Path) -> None:
    for missing in ("NaN", "null", '"\\t"'):
        path = tmp_path / "items.jsonl"
        path.write_text('{"item_id": 1, "title": "b"}\n{"item_id": ' + missing + ', "title": "a"}\n')
        with pytest.raises(DataError, match=r"row 2 of .* has no item_id"):
            read_items(path)


def test_the_word_nan_in_a_column_of_text_is_kept_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log: list[Row] = [*LOG, *(("nan", item, place) for place, item in enumerate("abc"))]
    paths = write_catalogue(tmp_path, log, items=[*"abcdefg", "None"])
    dataset = prepare.run(config(paths))
    assert "nan" in dataset.user_ids
    told = " ".join(capsys.readouterr().err.split())
    assert "the user 'nan' has 3 of 18 interactions" in told
    assert "1 of 8 items" in told and "have the item_id 'None'" in told


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "<NA>"])
def test_a_word_for_nothing_among_users_who_are_numbers_is_no_user(tmp_path: Path, word: str) -> None:
    paths = write_catalogue(tmp_path, LOG)
    paths["interactions"] = tmp_path / "log.csv"
    rows = [(f"{ord(user)}.0", item, time) for user, item, time in LOG] + [(word, item, 9) for item in "abcd"]
    paths["interactions"].write_text("user_id,item_id,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    dataset = prepare.run(config(paths))
    assert dataset.user_ids == ["117.0", "118.0", "119.0", "120.0"]
    assert dataset.meta["rows"]["interactions"]["rejected"] == {"no user id": 4}


def test_white_space_at_the_ends_of_ids_does_not_count_on_either_side(tmp_path: Path) -> None:
    plain = prepare.run(config(write_catalogue(tmp_path / "plain", LOG)))
    paths = write_catalogue(tmp_path, LOG)
    ids = pl.read_parquet(paths["items"])["item_id"].to_list()
    padded = [f"{' ' * (n % 3)}{item}{['', chr(9), chr(0xA0)][n % 3]}" for n, item in enumerate(ids)]
    pl.read_parquet(paths["items"]).with_columns(item_id=pl.Series(padded)).write_parquet(paths["items"])
    paths["interactions"] = write_log(
        tmp_path / "log", [(f"{u}{' ' * (n % 2)}", f"{' ' * (n % 4)}{i}", t) for n, (u, i, t) in enumerate(LOG)]
    )
    dataset = prepare.run(config(paths))
    assert histories(dataset) == histories(plain)
    assert dataset.item_ids == plain.item_ids and dataset.image_paths == plain.image_paths
    pl.DataFrame({"item_id": ["a", " a"], "title": ["x", "y"]}).write_parquet(paths["items"])
    with pytest.raises(DataError, match="'a' occurs in rows 1 and 2"):
        read_items(paths["items"])


@pytest.mark.parametrize(
    ("ours", "given", "near", "why"),
    [
        ("0108775015", "108775015", "0108775015", "leading zeros differ"),
        ("108775015", "0108775015", "108775015", "leading zeros differ"),
        ("0108775015", "108775015.0", "0108775015", "leading zeros differ"),
        ("B00ABC", "b00abc", "B00ABC", "upper and lower case differ"),
        ("caf\u00e9", "cafe\u0301", "caf\u00e9", "characters that cannot be seen, or quotes, differ"),
        ("x1", "\ufeffx1", "x1", "characters that cannot be seen, or quotes, differ"),
        ("x1", "'x1'", "x1", "characters that cannot be seen, or quotes, differ"),
        ("108775015", "1.08775E+08", None, "a number in scientific notation, whose last digits are lost"),
        ("x1", "x2", None, None),
        ("x0", "x", None, None),
    ],
)
def test_an_unknown_id_is_held_against_the_catalogue(ours: str, given: str, near: str | None, why: str | None) -> None:
    unknown = pl.DataFrame({"item_id": [given]})
    found = explain(unknown, pl.Series("item_id", ["other", ours])).row(0, named=True)
    assert (found["near"], found["why"], found["item"]) == (near, why, None)


@pytest.mark.parametrize(("ours", "given"), [("123", "123.0"), ("123.0", "123"), ("007", "007.0"), ("-5", "-5.00")])
def test_a_whole_number_with_and_without_a_point_is_the_same_item(tmp_path: Path, ours: str, given: str) -> None:
    log = [(user, {"a": ours}.get(item, item), time) for user, item, time in LOG]
    paths = write_catalogue(tmp_path, log)
    paths["interactions"] = write_log(tmp_path / "log", [(u, given if i == ours else i, t) for u, i, t in log])
    dataset = prepare.run(config(paths))
    assert ours in dataset.item_ids and given not in dataset.item_ids
    assert dataset.meta["rows"]["interactions"]["rejected"] == {}


def test_a_spelling_that_fits_two_items_is_not_guessed(tmp_path: Path) -> None:
    found = explain(pl.DataFrame({"item_id": ["5.00"]}), pl.Series("item_id", ["5", "5.0"])).row(0, named=True)
    assert found["item"] is None and found["near"] == "5"


@pytest.mark.parametrize("change", [lambda n: n.lstrip("0"), str.lower, lambda n: f"'{n}"])
def test_ids_that_are_spelled_otherwise_in_a_good_part_of_the_log_are_refused_with_three_examples(
    tmp_path: Path, change: Any
) -> None:
    names = {item: f"00{n}K" if n % 2 else f"00{n}1" for n, item in enumerate("abcdefg")}
    log = [(user, names[item], time) for user, item, time in LOG]
    paths = write_catalogue(tmp_path, log)
    paths["interactions"] = write_log(tmp_path / "log", [(user, change(item), time) for user, item, time in log])
    with pytest.raises(DataError, match="differ from a known id only in spelling") as refused:
        prepare.run(config(paths))
    assert str(refused.value).count("the catalogue has") == 3


def test_a_few_ids_that_are_spelled_otherwise_are_told_and_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log: list[Row] = [(f"user {n}", item, place) for n in range(60) for place, item in enumerate("abc")]
    log += [("other", item, 0) for item in "def"]
    paths = write_catalogue(tmp_path, log, items=[*"abcdef", "007", "B7"])
    more = [("user 1", item, 9) for item in ("7", "z", "y", "x", "w")]
    paths["interactions"] = write_log(tmp_path / "log", [*log, *more])
    prepare.run(config(paths))
    told = " ".join(capsys.readouterr().err.split())
    assert "5 of 188 interactions name 5 items that are not in the catalogue" in told
    assert "'7' (row 184), 'z' (row 185), 'y' (row 186)" in told
    assert "the catalogue has '007' for '7' (row 184; leading zeros differ)" in told
    listed = [row["item_id"] for row in rejected(paths["out"]) if row["reason"] == "item not in the catalogue"]
    assert listed == ["7", "z", "y", "x", "w"]


def test_the_two_files_may_name_their_item_columns_differently(tmp_path: Path) -> None:
    paths = write_catalogue(tmp_path, LOG)
    plain = prepare.run(config({**paths, "out": tmp_path / "plain"}))
    pl.read_parquet(paths["items"]).rename({"item_id": "article_id"}).write_parquet(paths["items"])
    renamed = pl.read_parquet(paths["interactions"]).rename({"item_id": "product"})
    renamed.with_columns(item_id=pl.lit("not this one")).write_parquet(paths["interactions"])
    dataset = prepare.run(config(paths, items_id_column="article_id", interactions_item_column="product"))
    assert dataset.sequences == plain.sequences
    one = prepare.run(config(paths, item_id_column="article_id", interactions_item_column="product"))
    assert one.sequences == plain.sequences
    with pytest.raises(DataError, match=r"no column 'article_id'.*--interactions-item-column"):
        prepare.run(config(paths, item_id_column="article_id"))
    with pytest.raises(ConfigError, match="are the same"):
        prepare.run(config(paths, interactions_item_column="user_id"))


# --- times --------------------------------------------------------------------------------------------------------
def with_times(folder: Path, times: pl.Series) -> dict[str, Path]:
    paths = write_catalogue(folder, LOG)
    pl.read_parquet(paths["interactions"]).with_columns(timestamp=times).write_parquet(paths["interactions"])
    return paths


SECONDS = [1_700_000_000 + 10 * n for n in range(len(LOG))]


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize(
    ("rows", "change", "words"),
    [
        (range(0, 15, 2), lambda t: t * 1000, ["8 in milliseconds", "7 in seconds", "1700000000000 (row 1)"]),
        (range(9), lambda t: t * 10**9, ["nanoseconds", "(row 1)", "(row 2)", "(row 3)"]),
        (range(3, 4), lambda t: t * 10**6, ["1 in microseconds", "(row 4)"]),
        (range(3, 4), lambda t: t * 10, ["1 in none of these", "17000000300 (row 4)"]),
        (range(5, 6), lambda t: 20231115, ["1 in none of these", "20231115 (row 6)"]),
        (range(5, 6), lambda t: 19_675, ["1 in none of these", "19675 (row 6)"]),
    ],
)
def test_times_of_two_units_are_refused_with_examples(
    tmp_path: Path, rows: range, change: Any, words: list[str], text: bool
) -> None:
    times = [change(time) if row in rows else time for row, time in enumerate(SECONDS)]
    paths = with_times(tmp_path, pl.Series([str(time) for time in times] if text else times))
    with pytest.raises(DataError, match="of more than one unit") as refused:
        prepare.run(config(paths))
    for word in [*words, "--order file"]:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    "times",
    [
        SECONDS,
        [time * 1000 for time in SECONDS],
        [time / 1 + 0.5 for time in SECONDS],
        list(range(len(LOG))),
        [10 ** (n % 13) for n in range(len(LOG))],
        [20231100 + n for n in range(len(LOG))],
        [-(10**9) - n for n in range(len(LOG))],
        [n * 10**11 for n in range(1, len(LOG))],
        [*SECONDS[:-1], 1_000_000_000],
    ],
)
def test_times_of_one_unit_and_counters_of_any_size_are_taken(tmp_path: Path, times: list[float]) -> None:
    assert check_unit(np.array(times), np.arange(len(times)), tmp_path) == []


def test_times_of_zero_among_dates_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare.run(config(with_times(tmp_path, pl.Series([*SECONDS[:-2], 0, -1]))))
    told = " ".join(capsys.readouterr().err.split())
    assert "2 of 15 times of" in told and "0 (row 14), -1 (row 15)" in told


def test_seconds_that_were_once_float32_are_told() -> None:
    rows = np.arange(1000)
    times = 1_700_000_000 + 977 * rows
    short = times.astype(np.float32).astype(np.int64)
    assert check_unit(times, rows, Path("log")) == []
    assert "as if they had once been stored as float32" in check_unit(short, rows, Path("log"))[0]
    assert check_unit(times // 86_400 * 86_400, rows, Path("log")) == []


@pytest.mark.parametrize(
    ("times", "words"),
    [
        (["03/04/2020"], ["'03/04/2020' (row 1)", "which number is the day", "2020-04-03 for 3 April"]),
        (["3.4.2020 10:00"], ["which number is the day"]),
        (["2020/04/03"], ["with hyphens"]),
        (["1.7E+09"], ["scientific notation", "'1.7E+09' (row 1)"]),
        (["1.7000001e9"], ["scientific notation"]),
        (["2020-04-03 10:00:00", "2020-04-03T10:00:00Z"], ["'2020-04-03T10:00:00Z' (row 2)", "time zone in all rows"]),
        (["2020-04-03", "1700000000"], ["'1700000000' (row 2)", "'2020-04-03' (row 1)"]),
        (["yesterday"], ["'yesterday' (row 1)", "--order file"]),
    ],
)
def test_times_that_cannot_be_ordered_are_refused_with_advice(
    tmp_path: Path, times: list[str], words: list[str]
) -> None:
    paths = with_times(tmp_path, pl.Series([times[n % len(times)] for n in range(len(LOG))]))
    with pytest.raises(DataError) as refused:
        prepare.run(config(paths))
    for word in words:
        assert word in str(refused.value), str(refused.value)


@pytest.mark.parametrize(
    "times",
    [
        ["2020-04-03T10:00:00+02:00", "2020-04-03T09:00:00Z", "2020-04-03 05:00:00-05:00"],
        ["2020-04-03T10:00:00+0200", "2020-04-03T09:00:00+0000", "2020-04-03T05:00:00-0500"],
        ["1.7000000001e9", "1700000001", "1700000002"],
        ["1700000000.5", "1700000001", "1.700000002e+09"],
    ],
)
def test_times_with_offsets_and_whole_numbers_with_all_digits_are_ordered(tmp_path: Path, times: list[str]) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp\n" + "".join(f"u,{n},{time}\n" for n, time in enumerate(times)))
    found = scan_interactions(path, scratch=tmp_path).frame.collect()["time"].to_list()
    assert found == sorted(found) and len(set(found)) == 3


@pytest.mark.parametrize("word", ["NaT", "nan", "None", "", "NULL"])
def test_a_word_for_nothing_is_no_time(tmp_path: Path, word: str) -> None:
    paths = with_times(tmp_path, pl.Series([*("2020-04-03",) * (len(LOG) - 1), word]))
    found = scan_interactions(paths["interactions"], scratch=tmp_path).frame.collect()
    assert found["time"].null_count() == 1


def test_order_file_needs_no_times_and_keeps_repeats(tmp_path: Path) -> None:
    paths = write_catalogue(tmp_path, LOG)
    order = np.random.default_rng(0).permutation(len(LOG)).tolist()
    log = [LOG[n] for n in order] + [("u", "a", 0), ("u", "a", 0)]
    frame = pl.DataFrame({"user_id": [u for u, _, _ in log], "item_id": [i for _, i, _ in log]})
    frame.write_parquet(paths["interactions"])
    with pytest.raises(DataError, match=r"no column 'timestamp'.*--order file"):
        prepare.run(config(paths))
    dataset = prepare.run(config(paths, order="file", candidates=1))
    assert histories(dataset) == {user: [i for u, i, _ in log if u == user] for user in "uvwx"}
    assert dataset.meta["rules"]["order"] == "the file's order"
    jsonl = {**paths, "interactions": paths["interactions"].with_suffix(".jsonl"), "out": tmp_path / "again"}
    frame.write_ndjson(jsonl["interactions"])
    assert prepare.run(config(jsonl, order="file", candidates=1)).sequences == dataset.sequences


def test_dates_have_no_unit(tmp_path: Path) -> None:
    days = [dt.datetime(1970, 1, 1), dt.datetime(1970, 1, 2), *(dt.datetime(2020, 1, n + 1) for n in range(13))]
    assert prepare.run(config(with_times(tmp_path, pl.Series(days)))).meta["interactions"] == len(LOG)


# --- Amazon -------------------------------------------------------------------------------------------------------
META_2018 = {
    "category": ["Toys &amp; Games", "Puzzles"],
    "title": "A &amp; B",
    "description": ["one", "two"],
    "imageURL": ["https://x/s.jpg"],
    "imageURLHighRes": ["https://x/h.jpg"],
    "main_cat": "Toys",
    "asin": "A1",
}


@pytest.mark.parametrize(
    ("change", "categories", "url"),
    [
        ({}, "Toys & Games, Puzzles", "https://x/h.jpg"),
        ({"imageURLHighRes": []}, "Toys & Games, Puzzles", "https://x/s.jpg"),
        ({"category": [], "imageURLHighRes": None, "imageURL": None}, "Toys", None),
        ({"category": [], "main_cat": '<img src="x">'}, None, "https://x/h.jpg"),
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_amazon_metadata_of_2018_keeps_categories_and_image(
    tmp_path: Path, change: dict[str, Any], categories: str | None, url: str | None, named: bool
) -> None:
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(META_2018 | change) + "\n" + json.dumps({"asin": "A2", "title": "x"}) + "\n")
    items = read_items(path, ColumnNames(item_id="asin") if named else None)
    assert items.format == "Amazon 2018 metadata (JSON lines)"
    row = items.frame.row(0, named=True)
    assert (row["item_id"], row["title"], row["categories"], row["image_url"]) == ("A1", "A & B", categories, url)
    assert row["description"] == "one two"


@pytest.mark.parametrize(
    ("images", "url"),
    [
        ({"hi_res": [None, "h"], "large": ["l1", "l2"], "thumb": ["t", "t"], "variant": ["PT01", "MAIN"]}, "l2"),
        ({"hi_res": ["h"], "large": [None], "thumb": ["t"], "variant": ["MAIN"]}, "h"),
        ({"hi_res": [], "large": [], "thumb": [], "variant": []}, None),
        ({"hi_res": ["None"], "large": ["None"], "thumb": ["t"]}, "t"),
        ([{"large": "l", "variant": "MAIN"}], "l"),
        ([{"large": "first"}, {"variant": "MAIN"}], "first"),
        (None, None),
        (NAN, None),
        ("text", None),
    ],
)
def test_the_image_of_2023_is_found_in_either_shape(images: Any, url: str | None) -> None:
    assert image_url(images) == url


def test_hugging_faces_parquet_of_2023_gets_an_image_url_and_keeps_its_columns(tmp_path: Path) -> None:
    images = {"hi_res": [None], "large": ["https://x/l.jpg"], "thumb": ["t"], "variant": ["MAIN"]}
    frame = pl.DataFrame({"parent_asin": ["A"], "title": ["x &amp; y"], "images": [images], "store": ["S"]})
    frame.write_parquet(tmp_path / "items.parquet")
    row = read_items(tmp_path / "items.parquet").frame.row(0, named=True)
    assert (row["item_id"], row["title"], row["image_url"], row["store"]) == ("A", "x & y", "https://x/l.jpg", "S")
    assert row["images"] == images


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_another_id_column_keeps_the_titles_of_amazon_readable(tmp_path: Path, ending: str) -> None:
    frame = pl.DataFrame({"sku": ["1"], "asin": ["A"], "title": ["x &amp; y"], "shelf": ["top"]})
    path = tmp_path / f"items.{ending}"
    {"csv": frame.write_csv, "jsonl": frame.write_ndjson, "parquet": frame.write_parquet}[ending](path)
    row = read_items(path, ColumnNames(item_id="sku")).frame.row(0, named=True)
    assert row == {"item_id": "1", "title": "x & y", "asin": "A", "shelf": "top"}


def test_a_column_of_image_paths_beside_asin_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text('{"asin": "A", "title": "x", "image_path": "deep/a.jpg"}\n{"asin": "B", "title": "y"}\n')
    assert read_items(path).frame["image_path"].to_list() == ["deep/a.jpg", None]


def test_amazon_reviews_of_2018_are_named(tmp_path: Path) -> None:
    path = tmp_path / "reviews.json"
    path.write_text('{"reviewerID": "u", "asin": "A", "unixReviewTime": 1500000000, "verified": true}\n')
    assert scan_interactions(path, scratch=tmp_path).format == "Amazon 2018 reviews (JSON lines)"
