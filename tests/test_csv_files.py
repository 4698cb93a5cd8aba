"""CSV as people have it: whatever wrote a table is read back, and no line is lost without being named."""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.csv
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vlm2rec.embedder.contract.errors import DataError
from vlm2rec.pipelines.catalogue import csv_files
from vlm2rec.pipelines.catalogue.csv_files import open_csv

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
@example(rows=[("a", 'TV 32" LED', "x\ny"), ("b", '"', '""')], writer="polars", block=7)
def test_whatever_the_table_and_its_writer_it_is_read_as_it_was_or_its_quotes_have_two_readings(
    rows: Rows, writer: str, block: int
) -> None:
    content = WRITERS[writer](rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_files, "_BLOCK_BYTES", block)
        try:
            found = rows_of(content)
        except DataError as error:
            assert "look like records" in str(error)
            assert any("\n" in cell for row in rows for cell in row)
        else:
            assert as_read(found) == as_read(rows)


@given(rows=TABLE, quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONE]))
def test_quotes_that_a_backslash_escapes_are_read_as_they_were(rows: Rows, quoting: int) -> None:
    plain = [tuple(cell.replace("\\", "/").replace("\n", " ").replace("\r", " ") for cell in row) for row in rows]
    content = written(plain, quoting=quoting, doublequote=False, escapechar="\\", lineterminator="\n")
    assert as_read(rows_of(content)) == as_read(plain)


@given(rows=TABLE, data=st.data())
def test_whatever_bytes_go_missing_every_line_is_read_or_named(rows: Rows, data: st.DataObject) -> None:
    content = bytearray(written(rows, lineterminator="\n"))
    start = len(b"item_id,title,note\n")
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(start, len(content)))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(
            st.sampled_from([b"", b'"', b",", b"\n", b"\r", b"\0", b"\\", b"x"])
        )
    try:
        found = rows_of(bytes(content))
    except DataError as error:
        assert "line" in str(error)
    else:
        # every visible character stands in some field
        given = sorted(
            bytes(content[start:]).decode(errors="replace").translate(dict.fromkeys(map(ord, ' ,"\\\r\n\t')))
        )
        read = "".join(cell for row in found for cell in row if cell)
        assert sorted(read.translate(dict.fromkeys(map(ord, ' ,"\\\r\n\t')))) == given
