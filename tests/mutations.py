"""Damages files: bytes of any file, rows and columns of a table, keys of a document, blocks of a picture.

Everything is drawn from a `random.Random`, so a seed names a file for ever.
"""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Table = list[list[str]]  # the first row holds the names of the columns
Draw = random.Random

TEXTS = (
    *("", " ", "nan", "NaN", "None", "null", "NA", "0", "-1", "1e400", "00012", "12.0", "1e3", "9" * 30, "inf", "true"),
    *('"', '""', 'a"b', '32" screen', "\\", '\\"', "a,b", "a;b", "a\tb", "a|b", "a\nb", "a\r\nb", "\r", "\n", "'", "`"),
    *("\0", "\ufeff", "\u2028", "é", "e\u0301", "🪑", "\x1b[31m", "=1+1", "@x", "[red]", "<b>", "x" * 3000, "../x"),
    *("2014-07-01", "01/02/2014", "2014-07-01T10:00:00+02:00", "1404172800", "1404172800000", "[1, 2]", "{}", "sep=;"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**40, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", " ", "x"),
    *([], {}, [None], [[]], {"a": None}, [1, "x"], {"": {}}, "../x", "/etc/passwd", "s3://x/y", "9" * 400, "\ud83e"),
)


# --- bytes ------------------------------------------------------------------------------------------------------
def damage_bytes(draw: Draw, content: bytes) -> bytes:
    """Flip, overwrite, drop, double, swap, insert or cut off some bytes."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        if not content:
            return draw.randbytes(draw.randrange(40))
        start = draw.randrange(len(content))
        stop = min(len(content), start + draw.choice((1, 1, 2, 4, 16, 100)))
        part, before, after = content[start:stop], content[:start], content[stop:]
        kind = draw.randrange(8)
        if kind == 0:
            part = bytes([part[0] ^ (1 << draw.randrange(8))]) + part[1:]
        elif kind == 1:
            part = bytes(draw.choice((0, 1, 0x22, 0x2C, 0x0A, 0x0D, 0x5C, 0x7F, 0x80, 0xC3, 0xFE, 0xFF)) for _ in part)
        elif kind == 2:
            part = b""
        elif kind == 3:
            part += part * draw.choice((1, 1, 3))
        elif kind == 4:
            other = draw.randrange(len(after) + 1)
            part, after = after[:other], part + after[other:]
        elif kind == 5:
            part = draw.randbytes(draw.randrange(1, 9)) + part
        elif kind == 6:
            after = b""
        else:
            part = draw.randbytes(len(part))
        content = before + part + after
    return content


def damage_lines(draw: Draw, content: bytes) -> bytes:
    """Drop, double, swap, join or split lines; change their endings, or what stands before the first."""
    lines = content.split(b"\n")
    row = draw.randrange(len(lines))
    kind = draw.randrange(9)
    if kind == 0:
        del lines[row]
    elif kind == 1:
        lines.insert(row, lines[row])
    elif kind == 2:
        draw.shuffle(lines)
    elif kind == 3:
        lines[row : row + 2] = [b"".join(lines[row : row + 2])]
    elif kind == 4:
        lines.insert(row, draw.choice((b"", b" ", b"\t", b",", b"#", b"sep=,", b"\0", b'"', b"{}", b"null", b"[]")))
    elif kind == 5:
        place = draw.randrange(len(lines[row]) + 1)
        lines[row] = lines[row][:place] + draw.choice((b"\n", b"\r", b"\r\n", b'"', b"\\", b",")) + lines[row][place:]
    elif kind == 6:
        return draw.choice((b"\r\n", b"\r", b"\n\n", b"\n\r")).join(lines)
    elif kind == 7:
        return draw.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\n", b"sep=,\n", b"\xef\xbb\xbf" * 2)) + content
    else:
        return content.rstrip(b"\n")
    return b"\n".join(lines)


# --- tables -----------------------------------------------------------------------------------------------------
def _damage_list(draw: Draw, values: list[Any]) -> None:
    """Drop, double, move or reverse."""
    if not values:
        return
    at, kind = draw.randrange(len(values)), draw.randrange(4)
    if kind == 0:
        del values[at]
    elif kind == 1:
        values.insert(draw.randrange(len(values) + 1), values[at])
    elif kind == 2:
        values.insert(draw.randrange(len(values)), values.pop(at))
    else:
        values.reverse()


def damage_table(draw: Draw, table: Table) -> Table:
    """Drop, double and swap rows or columns; change, add or drop cells."""
    table = [list(row) for row in table]
    for _ in range(draw.choice((1, 1, 2, 5))):
        kind = draw.randrange(5)
        if kind == 0:
            rows = table[1:]
            _damage_list(draw, rows)
            table[1:] = rows
        elif kind == 1:
            columns = [list(column) for column in zip(*table, strict=False)]
            _damage_list(draw, columns)
            table = [list(row) for row in zip(*columns, strict=True)]
        elif kind == 2 and len(table) > 1:
            _damage_list(draw, draw.choice(table[1:]))  # one row alone: it is ragged then
        elif table:
            row = draw.choice(table)
            if row:
                row[draw.randrange(len(row))] = draw.choice(TEXTS)
        if not table:
            break
    return table


def as_csv(table: Table, delimiter: str = ",") -> bytes:
    """Return a table as CSV of the usual dialect."""
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows(table)
    return text.getvalue().encode("utf-8", "surrogatepass")


def csv_case(delimiter: str) -> Callable[[Draw, Table], bytes]:
    """Return what makes a damaged CSV of a table."""

    def make(draw: Draw, table: Table) -> bytes:
        kind = draw.randrange(4)
        content = as_csv(damage_table(draw, table) if kind != 1 else table, delimiter)
        if kind == 1 or draw.random() < 0.2:
            content = damage_bytes(draw, content)
        if kind == 2:
            content = damage_lines(draw, content)
        return content

    return make


def json_lines(draw: Draw, table: Table) -> bytes:
    """Return a table as damaged JSON lines."""
    names = table[0]
    records: list[Any] = [
        dict(zip(names, (int(v) if n == "timestamp" else v for n, v in zip(names, row, strict=True)), strict=True))
        for row in table[1:]
    ]
    kind = draw.randrange(4)
    if kind != 1:
        for _ in range(draw.choice((1, 1, 3))):
            if draw.random() < 0.3 or not records:
                _damage_list(draw, records)
            else:
                records[draw.randrange(len(records))] = damage_document(draw, draw.choice(records))
    content = "".join(json.dumps(record) + "\n" for record in records).encode("utf-8", "surrogatepass")
    if kind == 1 or draw.random() < 0.2:
        content = damage_bytes(draw, content)
    if kind == 2:
        content = damage_lines(draw, content)
    if kind == 3 and draw.random() < 0.1:
        content += b'{"a": ' * 3000 + b"\n"
    return content


def gzipped(make: Callable[[Draw, Table], bytes]) -> Callable[[Draw, Table], bytes]:
    """Return what compresses a damaged file, or damages a compressed one."""

    def make_gz(draw: Draw, table: Table) -> bytes:
        content = gzip.compress(make(draw, table), 1, mtime=0)
        if draw.random() < 0.5:
            content = damage_bytes(draw, content)
        return content + (gzip.compress(make(draw, table), 1, mtime=0) if draw.random() < 0.1 else b"")

    return make_gz


def _other_type(draw: Draw, column: pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    values = column.to_pylist()
    texts = [None if value is None else str(value) for value in values]
    kind = draw.randrange(9)
    if kind == 0:
        return pa.array(texts, pa.string()).dictionary_encode()
    if kind == 1:
        return pa.array(texts, pa.large_string())
    if kind == 2:
        return pa.array([[value] for value in values])
    if kind == 3:
        return pa.array([{"a": value} for value in values])
    if kind == 4:
        return pa.nulls(len(values))
    if kind == 5:
        return pa.array([None if text is None else text.encode() for text in texts], pa.binary())
    if kind == 6:
        return pa.array([float(row) + draw.choice((0.0, 0.5)) for row in range(len(values))], draw.choice(_FLOATS))
    if kind == 7:
        return pa.array([row * 86_400 for row in range(len(values))], pa.timestamp("s", draw.choice((None, "UTC"))))
    return pa.array([bool(row % 2) for row in range(len(values))])


_FLOATS = (pa.float32(), pa.float64(), pa.float16())


def damage_arrow(draw: Draw, table: pa.Table) -> pa.Table:
    """Drop, double and swap rows or columns; put nulls in, change types and names."""
    for _ in range(draw.choice((1, 1, 2, 4))):
        kind = draw.randrange(6)
        if kind == 0:
            rows = list(range(table.num_rows))
            _damage_list(draw, rows)
            table = table.take(pa.array(rows, pa.int64()))
        elif kind == 1:
            names = list(range(table.num_columns))
            _damage_list(draw, names)
            table = pa.table([table.column(at) for at in names], names=[table.column_names[at] for at in names])
        elif kind == 2 and table.num_columns:
            at = draw.randrange(table.num_columns)
            table = table.set_column(at, table.column_names[at], _other_type(draw, table.column(at)))
        elif kind == 3 and table.num_columns and table.num_rows:
            at, row = draw.randrange(table.num_columns), draw.randrange(table.num_rows)
            values = table.column(at).to_pylist()
            values[row] = None
            table = table.set_column(at, table.column_names[at], pa.array(values, table.column(at).type))
        elif kind == 4 and table.num_columns and table.num_rows:
            at, row = draw.randrange(table.num_columns), draw.randrange(table.num_rows)
            values = table.column(at).to_pylist()
            if all(isinstance(value, str) for value in values):
                values[row] = draw.choice(TEXTS)
                table = table.set_column(at, table.column_names[at], pa.array(values, pa.string()))
        elif table.num_columns:
            names = list(table.column_names)
            names[draw.randrange(len(names))] = draw.choice((*TEXTS[:20], *names))
            table = table.rename_columns(names)
    return table


def as_parquet(table: pa.Table, **options: Any) -> bytes:
    """Return a table as Parquet."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def parquet(draw: Draw, table: pa.Table) -> bytes:
    """Return a table as damaged Parquet."""
    kind = draw.randrange(3)
    if kind:
        table = damage_arrow(draw, table)
    content = as_parquet(
        table,
        row_group_size=draw.choice((3, 1000)),
        compression=draw.choice(("none", "snappy", "zstd", "gzip")),
        use_dictionary=draw.random() < 0.5,
        data_page_version=draw.choice(("1.0", "2.0")),
    )
    return damage_bytes(draw, content) if kind == 0 else content


def parquet_of(draw: Draw, table: Table) -> bytes:
    """Return a table of text as damaged Parquet, its times as numbers."""
    columns = {name: [row[at] for row in table[1:]] for at, name in enumerate(table[0])}
    typed = {n: [int(value) for value in values] if n == "timestamp" else values for n, values in columns.items()}
    return parquet(draw, pa.table(typed))


def npy(draw: Draw, matrix: np.ndarray) -> bytes:
    """Return a matrix as a damaged .npy."""
    kind = draw.randrange(6)
    if kind == 0:
        rows = list(range(len(matrix)))
        _damage_list(draw, rows)
        matrix = matrix[rows]
    elif kind == 1:
        matrix = matrix.astype(draw.choice(("f2", "f8", "i4", "u1", ">f4", "?", "U8", "c8", "M8[s]")))
    elif kind == 2:
        matrix = np.asarray(draw.choice((matrix.ravel(), matrix[:, :, None], matrix.T, matrix[:, :0], matrix[0, 0])))
    elif kind == 3:
        matrix = matrix.copy()
        matrix[draw.randrange(len(matrix)), 0] = draw.choice((np.nan, np.inf, 3e38, 0.0))
    buffer = io.BytesIO()
    np.save(buffer, np.asfortranarray(matrix) if draw.random() < 0.2 else matrix)
    content = buffer.getvalue()
    if kind == 4:
        head = len(content) - matrix.nbytes
        return damage_bytes(draw, content[:head]) + content[head:]
    return damage_bytes(draw, content) if kind == 5 else content


# --- documents --------------------------------------------------------------------------------------------------
def damage_document(draw: Draw, document: Any) -> Any:
    """Drop, double, swap or replace something at any depth of a JSON document."""
    document = json.loads(json.dumps(document))
    for _ in range(draw.choice((1, 1, 2))):
        places = list(_places(document))
        if not places:
            return copy.deepcopy(draw.choice(VALUES))
        holder, key = draw.choice(places)
        kind = draw.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            _damage_list(draw, holder)
        elif kind == 1:
            holder[draw.choice(("", "x", key.upper(), f" {key}"))] = holder.pop(key)
        elif kind == 2:
            other, there = draw.choice(places)
            if _holds(holder, key) and _holds(other, there):
                holder[key], other[there] = json.loads(json.dumps([other[there], holder[key]]))
        elif kind == 3 and isinstance(holder[key], int | float):
            holder[key] = draw.choice((-holder[key], holder[key] + 1, str(holder[key]), [holder[key]], 2**70))
        else:
            holder[key] = copy.deepcopy(draw.choice(VALUES))
    return document if draw.random() > 0.02 else copy.deepcopy(draw.choice(VALUES))


def _holds(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def _places(document: Any) -> Any:
    """Yield every (container, key)."""
    keys = document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in list(keys):
        yield document, key
        yield from _places(document[key])


def json_document(draw: Draw, document: Any) -> bytes:
    """Return a damaged JSON document."""
    kind = draw.randrange(3)
    content = json.dumps(damage_document(draw, document) if kind else document, indent=1)
    return damage_bytes(draw, content.encode()) if kind == 0 else content.encode("utf-8", "surrogatepass")


# --- pictures ---------------------------------------------------------------------------------------------------
def pictures(kind: str) -> list[bytes]:
    """Return small pictures of a format, stored in several ways."""
    values = np.random.default_rng(0).integers(0, 255, (12, 16, 4), dtype=np.uint8)
    picture = Image.fromarray(values).resize((48, 36))
    colour, exif = picture.convert("RGB"), Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a chair"
    frames = [colour, colour.rotate(90), colour.rotate(180)]
    ways: dict[str, list[tuple[Image.Image, dict[str, Any]]]] = {
        "JPEG": [
            (colour, {"exif": exif, "icc_profile": b"x" * 200}),
            (colour, {"progressive": True, "comment": b"chair"}),
            (colour.convert("CMYK"), {"subsampling": 0, "restart_marker_blocks": 2}),
            (colour.convert("L"), {}),
        ],
        "PNG": [
            (picture, {"exif": exif}),
            (colour.convert("P"), {"transparency": 3}),
            (Image.fromarray(values[..., 0].astype(np.uint16) * 257), {}),
            (colour, {"save_all": True, "append_images": frames[1:]}),
        ],
        "WEBP": [
            (picture, {"lossless": True, "exif": exif}),
            (colour, {}),
            (colour, {"save_all": True, "append_images": frames[1:], "duration": 50}),
        ],
        "GIF": [
            (colour.convert("P"), {"transparency": 1, "comment": b"chair"}),
            (colour, {"save_all": True, "append_images": frames[1:], "duration": 50, "loop": 0}),
        ],
        "BMP": [(colour, {}), (colour.convert("P"), {}), (colour.convert("1"), {}), (picture, {})],
    }
    found = []
    for image, options in ways[kind]:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        found.append(buffer.getvalue())
    if kind == "BMP":
        runs = b"\x06\x01\x02\x05\0\0" * 6 + b"\0\x03\x01\x02\x03\0\0\x02\x01\x01\0\0\0\x01"
        header = struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 8, 1, len(runs), 0, 0, 256, 0)
        found.append(b"BM" + struct.pack("<IHHI", 1078 + len(runs), 0, 0, 1078) + header + bytes(1024) + runs)
    return found


def _blocks(content: bytes, first: int, end_of: Callable[[bytes, int], int]) -> list[bytes]:
    """Cut a picture into its first bytes and the blocks behind them; `end_of` tells where the block at a place ends."""
    blocks, at = [content[:first]], first
    while at < len(content):
        end = end_of(content, at)
        blocks.append(content[at:end])
        at = end
    return blocks


def _end_in_png(content: bytes, at: int) -> int:
    return at + 12 + int.from_bytes(content[at : at + 4], "big")


def _end_in_jpeg(content: bytes, at: int) -> int:
    end = at + 2 + (int.from_bytes(content[at + 2 : at + 4], "big") if content[at + 1] != 0xD9 else 0)
    if content[at + 1] == 0xDA:
        while content[end] != 0xFF or content[end + 1] in (0, *range(0xD0, 0xD8)):
            end += 1
    return end


def _end_in_webp(content: bytes, at: int) -> int:
    size = int.from_bytes(content[at + 4 : at + 8], "little")
    return at + 8 + size + size % 2


_BLOCKS = {"PNG": (8, _end_in_png), "JPEG": (2, _end_in_jpeg), "WEBP": (12, _end_in_webp)}


def picture_case(kind: str, whole: list[bytes]) -> Callable[[Draw], bytes]:
    """Return what damages a picture: its blocks, what stands in a block, or any bytes."""

    def make(draw: Draw) -> bytes:
        content = draw.choice(whole)
        if kind not in _BLOCKS or draw.random() < 0.4:
            head = min(len(content), 60)
            if draw.random() < 0.4:  # where the sizes are
                return damage_bytes(draw, content[:head]) + content[head:]
            return damage_bytes(draw, content)
        blocks = _blocks(content, *_BLOCKS[kind])
        rest = blocks[1:]
        for _ in range(draw.choice((1, 1, 2, 3))):
            if draw.random() < 0.5:
                _damage_list(draw, rest)
            elif rest:
                at = draw.randrange(len(rest))
                rest[at] = _damage_block(draw, kind, rest[at])
        body = b"".join(rest)
        if kind == "WEBP" and draw.random() < 0.8:
            return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
        return blocks[0] + body

    return make


def _damage_block(draw: Draw, kind: str, block: bytes) -> bytes:
    """Change what a block holds, and make its length and checksum fit."""
    if kind == "PNG":
        data = damage_bytes(draw, block[8:-4])
        return struct.pack(">I", len(data)) + block[4:8] + data + struct.pack(">I", zlib.crc32(block[4:8] + data))
    if kind == "WEBP":
        data = damage_bytes(draw, block[8:])
        return block[:4] + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
    data = damage_bytes(draw, block[4:])[:65_000]
    return block[:2] + struct.pack(">H", len(data) + 2) + data if block[1] != 0xDA else block[:4] + data
