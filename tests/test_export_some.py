"""`export-items --items`: some items of a dataset alone, and what reads such a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chairs import ITEMS, ShadeEncoder, rows_of, write_dataset

from vlm2rec.downstream.index.index import build_index
from vlm2rec.downstream.table import EmbeddingTable
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, DataError
from vlm2rec.embedder.export.export import export
from vlm2rec.embedder.export.reuse import Reuse
from vlm2rec.embedder.export.verify import verify
from vlm2rec.pipelines.config import ExportConfig
from vlm2rec.pipelines.export_items import _dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("chairs") / "data")


def make(dataset: Dataset, out: Path, **more: Any) -> dict[str, Any]:
    encoder = ShadeEncoder()
    manifest = export(dataset, out, encoder.fingerprint, ShadeEncoder, shard_size=4, **more)
    assert manifest is not None
    return manifest


def chosen(data: Path, items: str) -> list[str]:
    return _dataset(ExportConfig(data=data, backbone="b", out=data / "out", items=items)).item_ids


def test_ids_come_from_a_list_or_a_file_in_the_order_of_the_catalogue(data: Path, tmp_path: Path) -> None:
    wanted = ["002", "011", "019"]
    assert chosen(data, "019, 002,011") == wanted and chosen(data, "011") == ["011"]
    (tmp_path / "ids.txt").write_text("019\n002\n011\n")
    (tmp_path / "ids.json").write_text(json.dumps(wanted))
    np.save(tmp_path / "ids.npy", np.array(wanted))
    pq.write_table(pa.table({"item_id": wanted, "price": [1, 2, 3]}), tmp_path / "ids.parquet")
    for name in ("ids.txt", "ids.json", "ids.npy", "ids.parquet"):
        assert chosen(data, str(tmp_path / name)) == wanted


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        ("002,x1,x2,x3,x4", DataError, r"4 of 5 wanted items are not in .*'x1', 'x2', 'x3'"),
        ("nobody", DataError, "'nobody'"),
        (" , ", ConfigError, "names no item"),
        ("", ConfigError, "names no item"),
        ("none.txt", DataError, "none.txt"),
        ("@ids", ConfigError, "is a file, and no item.*ends in"),
        ("@folder", ConfigError, "is a folder, and no item"),
        ("@dict.json", DataError, "is not a list of ids .it holds a dict"),
        ("@empty.json", ConfigError, "names no item"),
        ("@latin.txt", DataError, "is not UTF-8"),
        ("@twice.txt", DataError, "more than once"),
    ],
)
def test_what_is_no_item_is_refused(
    data: Path, items: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    files = {"ids": b"002\n", "dict.json": b'{"002": 1}', "empty.json": b"[]", "latin.txt": b"\xfc\n"}
    for name, content in {**files, "twice.txt": b"002\n002\n"}.items():
        (tmp_path / name).write_bytes(content)
    items = items.replace("@", f"{tmp_path}/")
    with pytest.raises(error, match=message):
        chosen(data, items)


def test_some_items_get_the_vectors_they_have_among_all(data: Path, tmp_path: Path) -> None:
    whole, some = (
        make(Dataset(data), tmp_path / "all"),
        make(Dataset(data).restricted_to(["013", "002"]), tmp_path / "two"),
    )
    assert (some["num_items"], some[schema.CATALOGUE]) == (2, ITEMS) and schema.CATALOGUE not in whole
    wanted = [row for row in rows_of(tmp_path / "all") if row["item_id"] in ("002", "013")]
    assert rows_of(tmp_path / "two") == wanted and verify(tmp_path / "two") == []


def test_another_choice_does_not_go_on_with_a_folder_and_more_items_reuse_it(data: Path, tmp_path: Path) -> None:
    make(Dataset(data).restricted_to(["002", "013"]), tmp_path / "two")
    with pytest.raises(ArtifactError, match="item_ids"):
        make(Dataset(data).restricted_to(["002", "014"]), tmp_path / "two")
    encoder = ShadeEncoder()
    export(
        Dataset(data),
        tmp_path / "all",
        encoder.fingerprint,
        lambda: encoder,
        reuse=Reuse(changed_since=tmp_path / "two"),
    )
    assert sum(map(len, encoder.calls)) == ITEMS - 2


def test_workers_know_the_choice(data: Path) -> None:
    import pickle

    some = Dataset(data).restricted_to(["013", "002"])
    again = pickle.loads(pickle.dumps(some))
    assert again.item_ids == some.item_ids == ["002", "013"] and again.catalogue_size == ITEMS


def test_readers_of_some_items_say_what_is_missing(data: Path, tmp_path: Path) -> None:
    make(Dataset(data).restricted_to([f"{row:03d}" for row in range(12)]), tmp_path / "some")
    meta = build_index(tmp_path / "some", tmp_path / "index")
    assert meta["rows"] == 12 and meta["export"][schema.CATALOGUE] == ITEMS
    with pytest.raises(ArtifactError, match=r"8 of 20 items have no fused vector, among them \['012'"):
        EmbeddingTable.open(tmp_path / "some").take(Dataset(data).item_ids)
