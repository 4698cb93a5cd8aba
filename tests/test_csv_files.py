"""CSV as people have it: whatever wrote a table is read back, and no line is lost without being named."""

from __future__ import annotations

import csv
import gzip
import io
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from vlm2rec.embedder.contract.errors import DataError
from vlm2rec.pipelines.catalogue import csv_files
from vlm2rec.pipelines.catalogue import parts as parts_module
from vlm2rec.pipelines.catalogue.csv_files import open_csv
from vlm2rec.pipelines.catalogue.files import read_items, scan_interactions

WANTED = ("item_id", "title", "user_id", "timestamp")
Rows = list[tuple[Any, ...]]


def rows_of(content: bytes | str, name: str = "t.csv") -> Rows:
    """Return the records that are read, having checked that their number is the one that was counted."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        table = open_csv(path, Path(folder), WANTED)
        found = table.scan().collect()
        assert found.height == table.records
        assert found.columns == table.columns
        return found.rows()


def refused(content: bytes | str) -> str:
    with pytest.raises(DataError) as caught:
        rows_of(content)
    return str(caught.value)


# --- what was written is read -------------------------------------------------------------------------------
CELL = st.text(st.sampled_from("ab ,;\t|\"'\\\n\ré\u2028🫖=#"), max_size=8)
ID = st.text(st.sampled_from("ab,;\"'\\é7"), min_size=1, max_size=4)
TABLE = st.lists(st.tuples(ID, CELL, CELL), min_size=1, max_size=8)
HEADER = ("item_id", "title", "note")


def written(rows: Rows, **dialect: Any) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, **dialect).writerows([HEADER, *rows])
    return text.getvalue().encode()


def by_pandas(rows: Rows) -> bytes:
    text: str = pd.DataFrame(rows, columns=list(HEADER)).to_csv(index=False)
    return text.encode()


def by_polars(rows: Rows) -> bytes:
    return pl.DataFrame(rows, schema=dict.fromkeys(HEADER, pl.String), orient="row").write_csv().encode()


def by_pyarrow(rows: Rows) -> bytes:
    sink = io.BytesIO()
    columns = zip(*rows, strict=True)
    pyarrow.csv.write_csv(pa.table(dict(zip(HEADER, map(pa.array, columns), strict=True))), sink)
    return sink.getvalue()


DIALECTS: dict[str, dict[str, Any]] = {
    f"{name} {ends!r} {quoting}": {"delimiter": separator, "lineterminator": ends, "quoting": quoting}
    for name, separator in (("comma", ","), ("tab", "\t"), ("semicolon", ";"), ("pipe", "|"))
    for ends in ("\n", "\r\n")
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
}
WRITERS: dict[str, Callable[[Rows], bytes]] = {
    "pandas": by_pandas,
    "polars": by_polars,
    "pyarrow": by_pyarrow,
    **{name: lambda rows, dialect=dialect: written(rows, **dialect) for name, dialect in DIALECTS.items()},
}


def as_read(rows: Rows) -> Rows:
    return [tuple(cell or None for cell in row) for row in rows]


@given(rows=TABLE, writer=st.sampled_from(sorted(WRITERS)), block=st.sampled_from([7, 40, 8 << 20]))
@example(rows=[("7", "", '\\"\n'), ("7", ",\n", ";,,")], writer="comma '\\n' 0", block=7)
@example(rows=[("a", 'TV 32" LED', "x\ny"), ("b", '"', '""')], writer="polars", block=7)
def test_whatever_the_table_and_its_writer_it_is_read_as_it_was_or_its_quotes_have_two_readings(
    rows: Rows, writer: str, block: int
) -> None:
    # Python's csv, which pandas uses, quotes \r only if lines end in it
    assume(("'\\n' 0" not in writer and writer != "pandas") or not any("\r" in cell for row in rows for cell in row))
    content = WRITERS[writer](rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_files, "_BLOCK_BYTES", block)
        try:
            found = as_read(rows_of(content))
        except DataError as error:
            several = any("\n" in cell for row in rows for cell in row)
            found = as_read(rows) if several and "look like records" in str(error) else []
        assert found == as_read(rows)


@given(rows=TABLE, quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONE]))
def test_quotes_that_a_backslash_escapes_are_read_as_they_were(rows: Rows, quoting: int) -> None:
    plain = [tuple(cell.replace("\\", "/").replace("\n", " ").replace("\r", " ") for cell in row) for row in rows]
    content = written(plain, quoting=quoting, doublequote=False, escapechar="\\", lineterminator="\n")
    assert as_read(rows_of(content)) == as_read(plain)


@given(rows=TABLE, data=st.data())
def test_whatever_goes_missing_from_a_file_every_line_is_read_or_named(rows: Rows, data: st.DataObject) -> None:
    content = written(rows, lineterminator="\n").decode().removeprefix("item_id,title,note\n")
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content)))
        new = data.draw(st.sampled_from(["", '"', ",", "\n", "\r", "\0", "\\", "x"]))
        content = content[:place] + new + content[place + data.draw(st.integers(0, 3)) :]
    try:
        found = rows_of("item_id,title,note\n" + content)
    except DataError as error:
        named = str(error)
    else:
        named = ""
        # every visible character stands in some field
        read = "".join(cell for row in found for cell in row if cell)
        assert sorted(visible(read)) == sorted(visible(content))
    assert not named or "line" in named


def visible(text: str) -> str:
    return text.translate(dict.fromkeys(map(ord, ' ,"\\\r\n\t')))


# --- one reading, or none -----------------------------------------------------------------------------------
LOG = "user_id,item_id,timestamp,comment\n"
AS_LOG = [("u1", "i1", "1", "x"), ("u2", "i2", "2", "y")]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        # quotes that are text
        ('item_id,title\n1,TV 32" LED\n2,5" x 7" frame\n', [("1", 'TV 32" LED'), ("2", '5" x 7" frame')]),
        ('item_id,title\n1,"Best" tea\n2,a "good" one\n', [("1", '"Best" tea'), ("2", 'a "good" one')]),
        ('item_id,title,n\n1,"open,3\n2,"fine, thanks",4\n', [("1", '"open', "3"), ("2", "fine, thanks", "4")]),
        ('item_id,title,n\n1,",3\n2,"",4\n', [("1", '"', "3"), ("2", "", "4")]),
        (
            'item_id,title\n1,TV 32" LED\n2,"two, or\nlines ""so"""\n',
            [("1", 'TV 32" LED'), ("2", 'two, or\nlines "so"')],
        ),
        # escapes
        ('"item_id";"title"\n"1";"say \\"hi\\" now"\n"2";"a;b"\n', [("1", 'say "hi" now'), ("2", "a;b")]),
        ('item_id,title\n1,"C:\\dir \\"x\\""\n2,"one\n\\"two\\""\n', [("1", 'C:\\dir "x"'), ("2", 'one\n"two"')]),
        ('item_id,title\n1,"C:\\\\dir \\"x\\""\n', [("1", 'C:\\dir "x"')]),
        ("item_id,title\n1,Tea\\, green\n2,Salt\n", [("1", "Tea, green"), ("2", "Salt")]),
        ('item_id,title\n1,"C:\\"\n2,"D:\\"\n', [("1", "C:\\"), ("2", "D:\\")]),
        # line ends, marks, empty lines, headers
        ("item_id,title\r1,a\r2,b\r", [("1", "a"), ("2", "b")]),
        ('item_id,title\r1,"a, ""b"""\r2,b', [("1", 'a, "b"'), ("2", "b")]),
        ("item_id,title\n1,a\r2,b\n3,c\n", [("1", "a"), ("2", "b"), ("3", "c")]),
        ("item_id,title\r\n1,a\r\r\n2,b\r\n\r\n", [("1", "a"), ("2", "b")]),
        ("\ufeffitem_id,title\n1,a\n\ufeffitem_id,title\n2,b\n", [("1", "a"), ("2", "b")]),
        ("item_id,title\n1,a\n\n,\n  \n2,b\n", [("1", "a"), ("2", "b")]),
        ("\n\nitem_id,title\n1,a\n", [("1", "a")]),
        ("sep=;\nitem_id;title, long\n1;a,b\n", [("1", "a,b")]),
        ("\ufeffsep=\t\r\nitem_id\ttitle\r\n1\ta,b\r\n", [("1", "a,b")]),
        # separators
        ("item_id|title\n1|a, b, c; d\n", [("1", "a, b, c; d")]),
        ('item_id;"title, in words, of any kind"\n1;a,b\n', [("1", "a,b")]),
        ("item_id\ttitle, brand, and more\n1\ta, b\n", [("1", "a, b")]),
    ],
)
def test_a_file_is_read_as_what_it_plainly_says(content: str, expected: Rows) -> None:
    assert rows_of(content) == expected
    assert rows_of(gzip.compress(content.encode()), "t.csv.gz") == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("item_id,title\n1,a,b\n2,x\n3,c,d\n4,e,f\n5,g,h\n", ["line 2", "line 4", "line 5", "4 such", "'1,a,b'"]),
        ("item_id,title,n\n1,a,2\n2,b\n", ["line 3", "2 fields", "'2,b'", "the header has 3"]),
        ('item_id,title\n1,"TV 32 in, LED\n2,x\n', ["line 2", "3 fields and an open quote"]),
        ('item_id,title\n1,"a, b" c\n', ["line 2", "3 fields"]),
        (LOG + 'u1,i1,1,"great\nu2,i2,2,so\nu3,i3,3,bad"\n', ["line 2", "line 4 closes", "look like records"]),
        (
            LOG + 'u1,i1,1,"great\nu2,i2,2,so\nu3,i3,3,bad"\nu4,i4,4,5" x\n',
            ["line 2", "line 4 closes", "look like records"],
        ),
        ("item_id,title\n1,a\ntitle,item_id\nx,2\n", ["line 3", "another order"]),
        ("item_id,title\n1,a\0b\n", ["line 2", "NUL"]),
        ('"item_id" "title"\n'.replace(" ", ",") + '"1","a","b"\n"2","c","d"\n', ["line 2", "row names"]),
        ("item_id,title\n1,aitem_id,title\n2,b\n", ["line 2", "3 fields", "1,aitem_id,title"]),
        ("item_id,title\n1,a,b\r2,c\n", ["line 2", "4 fields"]),
        ("item_id,title\n" + "1," + "x" * (17 << 20) + "\n,,\n", ["line 2", "longer than 16 MB"]),
        ("x" * (2 << 20), ["line 1", "longer"]),
    ],
    ids=range(13),
)
def test_lines_that_are_no_records_are_named_with_number_and_text(content: str, words: list[str]) -> None:
    said = refused(content)
    assert all(word in said for word in words), said


@pytest.mark.parametrize("line", ["{}", "{0} {1}", "{x!r:}", "%s"])
def test_a_refused_line_is_shown_whatever_braces_it_holds(line: str) -> None:
    assert line in refused(f"a,b,c\n1,2,3\n{line}\n4,5,6\n{line}\n")


def test_an_open_quote_swallows_no_line_of_a_large_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_files, "_BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr(csv_files, "_LONGEST_RECORD", 1 << 14)
    lines = [f"u{n},i{n},{n},fine" for n in range(20_000)]
    lines[5] = 'u5,i5,5,"great'
    lines[19_000] = 'u19000,i,19000,also "great" but'
    found = rows_of(LOG + "\n".join(lines))
    assert (len(found), found[5][3]) == (20_000, '"great')
    lines[3] = "u3,i3,3"
    assert "line 5 of" in refused(LOG + "\n".join(lines))


def test_quoted_fields_of_many_lines_are_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_files, "_BLOCK_BYTES", 1 << 10)
    rows: Rows = [(str(n), f"{n}\n\nand, more\n", "last\nline") for n in range(500)]
    content = written(rows, lineterminator="\n")
    assert rows_of(content) == rows
    assert rows_of(content.replace(b"item_id", b"\nitem_id", 1)) == rows
    assert rows_of(content + b'x,5" wide,y\n') == [*rows, ("x", '5" wide', "y")]


def test_what_holds_no_record_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "items.csv"
    path.write_text("item_id,title\n1,a\n\nitem_id,title\n,\n2,b\n")
    assert read_items(path).frame["item_id"].to_list() == ["1", "2"]
    said = " ".join(capsys.readouterr().err.split())
    assert "2 empty lines left out" in said and "1 repeated headers left out" in said


def test_columns_of_one_name_keep_apart() -> None:
    assert rows_of("item_id,title,title,,\n1,a,b,c,d\n") == [("1", "a", "b", "c", "d")]


# --- parts, and files made to fill memory -------------------------------------------------------------------
def parts(folder: Path, **files: str | bytes | pl.DataFrame) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        if isinstance(content, pl.DataFrame):
            content.write_parquet(path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    (folder / "_SUCCESS").write_bytes(b"")
    (folder / ".part-0.crc").write_bytes(b"crc")
    return folder


def log_of(*numbers: int) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "user_id": [f"u{n}" for n in numbers],
            "item_id": [f"i{n}" for n in numbers],
            "timestamp": [1_700_000_000 + n for n in numbers],
        }
    )


@pytest.mark.parametrize("form", ["parquet", "csv", "jsonl"])
def test_a_folder_of_parts_is_one_table_in_the_order_of_their_names(tmp_path: Path, form: str) -> None:
    frames = {"b": log_of(3, 4), "a": log_of(1, 2), "c": log_of(5).clear()}
    for name, frame in frames.items():
        if form == "csv":
            content: Any = frame.write_csv()
        else:
            content = frame if form == "parquet" else frame.write_ndjson()
        parts(tmp_path / "log", **{f"part-{name}__{form}": content})
    (tmp_path / "scratch").mkdir()
    found = scan_interactions(tmp_path / "log", scratch=tmp_path / "scratch")
    assert found.frame.collect()["item_id"].to_list() == ["i1", "i2", "i3", "i4"]
    items = {name: frame.select("item_id", title="user_id") for name, frame in frames.items()}
    for name, frame in items.items():
        content = frame if form == "parquet" else frame.write_csv() if form == "csv" else frame.write_ndjson()
        parts(tmp_path / "items", **{f"part-{name}__{form}": content})
    assert read_items(tmp_path / "items").frame.rows() == [(f"i{n}", f"u{n}") for n in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a__parquet": log_of(1), "b__parquet": log_of(2).drop("timestamp")}, ["a.parquet", "b.parquet", "timestamp"]),
        (
            {"a__parquet": log_of(1), "b__parquet": log_of(2).cast({"timestamp": pl.Float64})},
            ["a.parquet", "b.parquet", "timestamp"],
        ),
        ({"a__csv": log_of(1).write_csv(), "b__csv": "user_id,item\nu,i\n"}, ["a.csv", "b.csv", "item"]),
        ({"a__csv": log_of(1).write_csv(), "b__parquet": log_of(2)}, ["a.csv (CSV)", "b.parquet (Parquet)"]),
        ({"a__csv": b""}, ["without any part"]),
        ({"a__csv": log_of(1).write_csv(), "b__csv": "user_id,item_id,timestamp\nu,i\n"}, ["line 2", "b.csv"]),
        ({"a__parquet": log_of(1), "b__parquet": b"PAR1 cut short"}, ["b.parquet", "Parquet"]),
    ],
)
def test_parts_that_make_no_table_are_named(tmp_path: Path, files: dict[str, Any], words: list[str]) -> None:
    folder = parts(tmp_path / "log", **files)
    with pytest.raises(DataError) as caught:
        scan_interactions(folder, scratch=tmp_path)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_folders_within_a_folder_are_refused(tmp_path: Path) -> None:
    parts(tmp_path / "log" / "day=1", a__parquet=log_of(1))
    with pytest.raises(DataError, match=r"holds folders: day=1"):
        scan_interactions(tmp_path / "log", scratch=tmp_path)


@pytest.mark.parametrize("what", ["one line", pytest.param("many lines", marks=pytest.mark.slow), "csv"])
def test_a_gzip_bomb_is_refused_before_it_fills_memory_or_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(parts_module, "_SMALLEST_BOMB", 1 << 22)
    record = b'{"item_id": "a", "title": "' + (b"x" * (40 << 20) if what == "one line" else b"") + b'"}\n'
    content = (
        b"item_id,title\n" + b"1,a\n" * (2 << 20) if what == "csv" else record * (1 if what == "one line" else 1 << 20)
    )
    path = tmp_path / "items.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match=r"longer than a record|bytes and unpacks to"):
        read_items(path)


@pytest.mark.parametrize("column", ["title", "item_id"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_dictionary_bomb_in_parquet_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str, nested: bool
) -> None:
    monkeypatch.setattr(parts_module, "_SMALLEST_BOMB", 1 << 24)
    rows, text = 1000, "x" * (1 << 16)
    table = {
        "item_id": [str(n) for n in range(rows)],
        "user_id": ["u"] * rows,
        "title": ["t"] * rows,
        "timestamp": range(rows),
    }
    bomb = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))
    plain = pa.table({**table, column: bomb.cast(pa.string())})
    if nested:
        plain = plain.append_column("tags", pa.array([[text]] * rows))
        plain = plain.set_column(plain.schema.get_field_index(column), column, pa.array(["t"] * rows))
    pq.write_table(plain, tmp_path / "x.parquet", compression="zstd")
    with pytest.raises(DataError, match="holds text of"):
        read_items(tmp_path / "x.parquet")
    if column == "item_id" and not nested:
        with pytest.raises(DataError, match="holds text of"):
            scan_interactions(tmp_path / "x.parquet", scratch=tmp_path)


def test_a_footer_that_promises_more_than_a_file_can_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pl.DataFrame({"item_id": ["a"] * 2_000_000, "title": [None] * 2_000_000}).write_parquet(tmp_path / "x.parquet")
    monkeypatch.setattr(parts_module, "_SMALLEST_BOMB", 1 << 20)
    with pytest.raises(DataError, match="unpacks to"):
        read_items(tmp_path / "x.parquet")


# --- JSON lines ---------------------------------------------------------------------------------------------
def test_marks_between_json_lines_are_no_part_of_them(tmp_path: Path) -> None:
    line = '{"user_id": "%s", "item_id": "i", "timestamp": 1}\n'
    (tmp_path / "x.jsonl").write_text("\ufeff" + line % "a" + "\ufeff" + line % "b", encoding="utf-8")
    assert scan_interactions(tmp_path / "x.jsonl", scratch=tmp_path).frame.collect()["user_id"].to_list() == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"user_id": "a", "item_id": "i", "timestamp": 1, "user_id": "b"}', ["key 'user_id' twice"]),
        ('{"user_id": "a", "item_id": "i", "timestamp": 1}{"user_id": "b", "item_id": "i", "timestamp": 1}', ["Extra"]),
        ('["a", "i", 1]', ["not an object", '["a", "i", 1]']),
        ('{"user_id": "a", "item_id": "i", "timestamp": 1', ["not an object", "it reads"]),
        ('{"user_id": "a", "item_id": "i", "timestamp": ' + "9" * 5000 + "}", ["not an object"]),
        ("[" * 100_000, ["not an object"]),
    ],
    ids=range(6),
)
@pytest.mark.parametrize("kind", ["items", "interactions"])
def test_a_line_that_is_no_record_is_named_with_its_text(
    tmp_path: Path, line: str, words: list[str], kind: str
) -> None:
    good = '{"user_id": "a", "item_id": "%s", "timestamp": 1, "title": "t"}\n'
    (tmp_path / "x.jsonl").write_text(good % 1 + good % 2 + line + "\n" + good % 3)
    read = read_items if kind == "items" else partial(scan_interactions, scratch=tmp_path)
    with pytest.raises(DataError) as caught:
        read(tmp_path / "x.jsonl")
    assert all(word in str(caught.value) for word in ["line 3", *words]), str(caught.value)


def test_nested_keys_that_occur_twice_are_no_fault(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"item_id": "a", "title": "t", "details": {"Size": 1, "Size": 2}}\n')
    assert read_items(tmp_path / "x.jsonl").frame["details"].to_list() == ['{"Size": 2}']


@pytest.mark.parametrize("form", ["csv.gz", "jsonl.gz", "parquet"])
@given(data=st.data())
def test_a_file_cut_short_or_damaged_is_read_whole_or_refused_in_words(form: str, data: st.DataObject) -> None:
    frame = pl.DataFrame({"item_id": [f"i{n}" for n in range(200)], "title": [f"title {n}" for n in range(200)]})
    buffer = io.BytesIO()
    if form == "parquet":
        frame.write_parquet(buffer)
        whole = buffer.getvalue()
    else:
        text = frame.write_csv() if form == "csv.gz" else frame.write_ndjson()
        whole = gzip.compress(text.encode())
    content = bytearray(whole[: data.draw(st.integers(1, len(whole)))])
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"x.{form}")
        path.write_bytes(content)
        try:
            found = read_items(path).frame
        except DataError:
            return
    # a Parquet file without checksums can hold other letters, but not fewer rows
    assert found.height == 200


def test_no_byte_of_a_parquet_footer_can_end_the_process(tmp_path: Path) -> None:
    table = pa.table({"item_id": ["a", "b", None], "price": ["1", "2", "3"], "amount": [1.0, 2.0, None]})
    pq.write_table(table, tmp_path / "sound.parquet")
    code = """
import sys
from pathlib import Path
import polars as pl
from vlm2rec.embedder.contract.errors import DataError
from vlm2rec.pipelines.catalogue.parts import parquet_schema
sound, damaged = Path(sys.argv[1]), Path(sys.argv[2])
content = sound.read_bytes()
footer = int.from_bytes(content[-8:-4], "little") + 8
read = 0
for place in range(len(content) - footer, len(content)):
    for bits in (1, 2, 255):
        changed = bytearray(content)
        changed[place] ^= bits
        damaged.write_bytes(changed)
        try:
            parquet_schema(damaged)
            read += 1
            pl.scan_parquet(damaged).filter(pl.col("item_id") == "a").collect()
        except DataError:
            pass
        except BaseException as error:
            if "panic" not in type(error).__name__.lower() and not isinstance(error, Exception):
                raise
print(read)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "sound.parquet"), str(tmp_path / "damaged.parquet")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-500:]
    assert int(ran.stdout) > 100, "most changes of a byte leave a footer that can be read"
