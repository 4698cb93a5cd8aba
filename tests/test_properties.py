"""Properties that hold for whatever ids, titles, plans and bytes: nothing crashes, nothing hangs, no row is lost.

Hypothesis draws the cases: a few dozen of each by default, a thousand under `make test-nightly`.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from chairs import ShadeEncoder, rows_of, write_dataset
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image
from test_images import quarters
from test_shards import finished_export, parts, plan_of, publish_all, table_of

from vlm2rec.embedder.backbones.images import FORMATS, MAX_ASPECT, ImageError, open_image, size_of
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import DataError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.export import shards
from vlm2rec.embedder.export.export import export
from vlm2rec.embedder.export.lock import writing
from vlm2rec.embedder.export.plan import plan_shards
from vlm2rec.embedder.export.verify import verify
from vlm2rec.pipelines import prepare
from vlm2rec.pipelines.catalogue.files import read_items
from vlm2rec.pipelines.config import PrepareConfig

Tiny = Callable[[str], Path]
WHITE = "".join(chr(n) for n in range(0x3001) if chr(n).isspace() and not 0x1C <= n <= 0x1F)  # as Unicode has it
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)  # whatever can be stored as UTF-8


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)  # no power fails here: it would take time and show nothing


# --- ids --------------------------------------------------------------------------------------------------------
@given(ids=st.lists(TEXT, max_size=12, unique=True), shard_size=st.integers(1, 5))
def test_whatever_the_ids_an_export_gives_each_back_once_and_in_order(ids: list[str], shard_size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = {"title": ["chair"] * len(ids), "image_path": ["0.png"] * len(ids)}
        data = write_dataset(Path(folder, "data"), items=1, item_id=ids, **rows)
        encoder = ShadeEncoder()
        export(Dataset(data), Path(folder, "out"), encoder.fingerprint, lambda: encoder, shard_size=shard_size)
        assert [row["item_id"] for row in rows_of(Path(folder, "out"))] == ids
        assert verify(Path(folder, "out")) == []


@given(st.lists(TEXT | st.none() | st.integers(), max_size=8))
def test_whatever_the_ids_a_plan_takes_them_as_they_are_or_names_what_is_wrong(ids: list[Any]) -> None:
    sound = all(isinstance(item, str) for item in ids) and len(set(ids)) == len(ids)
    if sound:
        assert plan_shards(ids, 3, {"dim": 2}).item_ids == ids
    else:
        with pytest.raises(DataError, match=r"in row|occur more than once"):
            plan_shards(ids, 3, {"dim": 2})


@given(ids=st.lists(TEXT, min_size=1, max_size=8), form=st.sampled_from(["jsonl", "parquet", "csv"]))
def test_whatever_the_ids_in_a_catalogue_file_they_are_read_as_text_or_refused(ids: list[str], form: str) -> None:
    assume(form != "csv" or not any("\r" in item or "\0" in item for item in ids))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"items.{form}")
        frame = pl.DataFrame({"item_id": ids, "title": ["x"] * len(ids)}, schema={"item_id": str, "title": str})
        if form == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in frame.to_dicts()), encoding="utf-8")
        elif form == "csv":
            frame.write_csv(path, quote_style="always")
        else:
            frame.write_parquet(path)
        try:
            found = read_items(path).frame["item_id"].to_list()
        except DataError:
            assert len({item.strip(WHITE) for item in ids}) < len(ids) or not all(item.strip(WHITE) for item in ids)
        else:
            assert found == [item.strip(WHITE) for item in ids]


# --- rows -------------------------------------------------------------------------------------------------------
KNOWN = ("a", "b", "c", "d", "7", "=x", "untitled", "unseen")
messy_rows = st.lists(
    st.tuples(
        st.sampled_from(["u", "v", " u", "v\t", "w", "-w", None, "", " ", float("nan"), 7, 7.0, "nan"]),
        st.sampled_from([*KNOWN, " a", "b ", 7, 7.0, "7.0", "z", "@z", None, " ", float("nan"), "nan"]),
        st.sampled_from([1, 2, 3, 4, 5, 2.0, None, float("nan"), float("inf")]),
    ),
    max_size=24,
)


def same_id(value: Any) -> str | None:
    """The id by the stated rule, in plain Python."""
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return None
    return (str(int(value)) if isinstance(value, float) else str(value)).strip() or None


@given(rows=messy_rows, core=st.integers(1, 2), form=st.sampled_from(["jsonl", "csv"]), times=st.booleans())
def test_whatever_the_rows_each_is_kept_or_in_the_list_of_rejects_and_never_both(
    rows: list[tuple[Any, Any, Any]], core: int, form: str, times: bool
) -> None:
    rows = [(user, item, place) for user in ("u", "v") for place, item in enumerate("abcd", 6)] + rows
    rows += [(user, item, place) for user in ("x", "y") for place, item in enumerate(("a", "7", "=x"), 6)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        titles = [None if item == "untitled" else "title" for item in KNOWN]
        paths = ["none" if item == "unseen" else "a.jpg" for item in KNOWN]
        pl.DataFrame({"item_id": KNOWN, "title": titles, "image_path": paths}).write_parquet(folder / "items.parquet")
        (folder / "images").mkdir()
        (folder / "images/a.jpg").write_bytes(b"x")
        records = [dict(zip(("user_id", "item_id", "timestamp"), row, strict=True)) for row in rows]
        if form == "jsonl":
            text = "".join(json.dumps(record) + "\n" for record in records)
        else:  # as pandas writes missing values
            fields = [["" if same_id(v) is None and not isinstance(v, str) else str(v) for v in row] for row in rows]
            text = "user_id,item_id,timestamp,n\n" + "".join(",".join([*row, "0"]) + "\n" for row in fields)
        (folder / f"log.{form}").write_text(text)
        config = PrepareConfig(
            items=folder / "items.parquet",
            interactions=folder / f"log.{form}",
            images=folder / "images",
            out=folder / "data",
            core=core,
            candidates=1,
            candidate_seeds=(0,),
            order="time" if times else "file",
        )
        try:
            dataset = prepare.run(config)
        except DataError as refused:  # too few items, or most unknown ids are only spelled otherwise
            expected = ("interacted with so many", "differ from a known id only in spelling")
            if any(words in str(refused) for words in expected):
                return
            raise
        with (folder / "data/rejects.csv").open(encoding="utf-8", newline="") as file:
            rejected = list(csv.DictReader(file))
        kept = Counter(
            (row["user_id"], item)
            for row in dataset.sequences.to_pylist()
            for item in (*row["train"], row["valid"], row["test"])
        )
        counts = dataset.meta["rows"]
        kept_items = list(dataset.item_ids)
    out = {file: [int(row["row"]) for row in rejected if row["file"] == file] for file in ("items", "interactions")}
    assert all(len(set(of)) == len(of) for of in out.values())
    for file, read in (("items", len(KNOWN)), ("interactions", len(rows))):
        assert counts[file]["read"] == read == counts[file]["kept"] + len(out[file])
        assert counts[file]["rejected"] == Counter(
            row["reason"].partition(":")[0] for row in rejected if row["file"] == file
        )
    assert sorted([*kept_items, *(KNOWN[row - 1] for row in out["items"])]) == sorted(KNOWN)
    left = [row for number, row in enumerate(rows, 1) if number not in set(out["interactions"])]
    same = {"7.0": "7"}
    user = same_id if form == "jsonl" else lambda value: same_id(str(value))
    assert kept == Counter((user(u), same.get(same_id(i) or "", same_id(i))) for u, i, _ in left)
    assert not any(field[:1] in tuple("=+-@\t\r") for row in rejected for field in row.values() if field)


# --- titles -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def encoder(tiny: Tiny) -> ItemEncoder:
    return ItemEncoder.load(str(tiny("qwen2_5_vl")), dtype="float32", device="cpu", views="text", max_title_tokens=16)


@given(title=TEXT | st.text(st.sampled_from("<|im_end>pad _/a🪑\0\n"), max_size=300), times=st.sampled_from([1, 500]))
@example(title="<|im_<|image_pad|>end|>", times=500)
def test_whatever_the_title_it_has_a_vector_and_neither_ends_the_prompt_nor_asks_for_an_image(
    encoder: ItemEncoder, title: str, times: int
) -> None:
    backbone = encoder.backbone
    text, cut = backbone.prepare_title(title * times)
    tokens = backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(tokens) <= 16 or not cut
    assert not set(tokens) & {*backbone.tokenizer.all_special_ids, backbone.image_token_id}
    found = encoder.encode_items([title * times], [None])
    assert np.isfinite(found.text).all() and bool(found.truncated[0]) == cut


# --- plans ------------------------------------------------------------------------------------------------------
@given(items=st.integers(0, 20), shard_size=st.integers(1, 8), data=st.data())
def test_whatever_the_plan_and_wherever_it_was_cut_off_the_rerun_equals_a_whole_run(
    items: int, shard_size: int, data: st.DataObject
) -> None:
    plan = plan_of(items, shard_size)
    assert [row for number in range(len(plan)) for row in plan.rows(number)] == list(range(items))
    done = sorted(data.draw(st.sets(st.integers(0, max(0, len(plan) - 1)), max_size=len(plan))))
    damaged = data.draw(st.sets(st.sampled_from(done))) if done else set()
    forgotten = data.draw(st.sets(st.sampled_from(done))) if done else set()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        with writing(out):
            shards.begin(out, plan)
            if done:
                publish_all(out, plan, iter(done))
        for number in damaged:
            path = out / schema.shard_name(number)
            path.write_bytes(path.read_bytes()[: data.draw(st.integers(0, path.stat().st_size - 1))])
        for number in forgotten:
            (out / shards.record_name(number)).unlink()
        manifest = finished_export(out, plan)
        assert manifest["num_items"] == items and sorted(parts(out)) == [schema.shard_name(n) for n in range(len(plan))]
        for number in range(len(plan)):
            assert pq.read_table(out / schema.shard_name(number)).equals(table_of(plan, number))


# --- bytes ------------------------------------------------------------------------------------------------------
def files() -> list[bytes]:
    found = []
    for kind in (*FORMATS, "TIFF", "PPM", "ICO"):
        buffer = io.BytesIO()
        quarters(24).save(buffer, format=kind)
        found.append(buffer.getvalue())
    return [*found, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>", b"\0\0\0\x18ftypheic"]


@st.composite
def strange_bytes(draw: st.DrawFn) -> bytes:
    """A file, with bytes changed, taken out, put in, or cut off; or the beginning of one and then anything."""
    content = bytearray(draw(st.sampled_from(files())))
    if draw(st.booleans()):
        return bytes(content[: draw(st.integers(0, 40))]) + draw(st.binary(max_size=200))
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.integers(0, 4)))
        content[start:stop] = draw(st.binary(max_size=4))
    return bytes(content)


@given(strange_bytes())
def test_whatever_the_bytes_a_file_is_a_picture_or_an_image_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "a.jpg").write_bytes(content)
        for read in (size_of, open_image):
            try:
                found = read(Path(folder), "a.jpg")
            except ImageError:
                continue
            if isinstance(found, Image.Image):
                assert found.mode == "RGB" and max(found.size) <= MAX_ASPECT * min(found.size)


@given(st.lists(strange_bytes(), min_size=1, max_size=6))
def test_whatever_the_bytes_an_export_has_a_row_for_every_item(contents: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        names = [f"strange-{row}.jpg" for row in range(len(contents))]
        data = write_dataset(Path(folder, "data"), items=len(contents), image_path=names)
        for name, content in zip(names, contents, strict=True):
            (data / "images" / name).write_bytes(content)
        encoder = ShadeEncoder()
        manifest = export(Dataset(data), Path(folder, "out"), encoder.fingerprint, lambda: encoder, shard_size=4)
        assert sum(manifest["counts"].values()) == len(contents) == len(rows_of(Path(folder, "out")))
        assert verify(Path(folder, "out")) == []


@given(st.text(max_size=30) | st.lists(st.sampled_from(["..", "/", "~", "a", "\0", "http://", "%2e"])).map("".join))
def test_whatever_the_path_nothing_outside_the_root_is_opened(relative: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "root").mkdir()
        Image.new("RGB", (4, 4)).save(Path(folder) / "a", format="PNG")
        with pytest.raises(ImageError):
            open_image(Path(folder) / "root", relative)
