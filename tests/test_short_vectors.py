"""Short vectors: prefixes of length one, int8, binary. What they stand for, what they keep, and who reads them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chairs import parts, write_dataset
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from vlm2rec.downstream.index.index import ItemIndex, build_index
from vlm2rec.downstream.table import EmbeddingTable
from vlm2rec.embedder.backbones.images import ImageError
from vlm2rec.embedder.contract import precision, schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError
from vlm2rec.embedder.encoders.item_encoder import EncodedItems
from vlm2rec.embedder.export import shards
from vlm2rec.embedder.export.distribute import Distribution
from vlm2rec.embedder.export.export import export
from vlm2rec.embedder.export.reuse import Reuse
from vlm2rec.embedder.export.shorten import shorten
from vlm2rec.embedder.export.verify import verify
from vlm2rec.pipelines import shorten as shorten_command
from vlm2rec.pipelines.config import ExportConfig, ShortenConfig
from vlm2rec.pipelines.read_config import read_config

DIM, ITEMS = 64, 60


class WideEncoder:
    """Vectors of 64 numbers, drawn anew for every title and picture; the first ones are the largest."""

    def __init__(self) -> None:
        views = [*schema.VIEWS]
        self.fingerprint: dict[str, Any] = {"dim": DIM, "views": views, "max_pixels": 112 * 112, "model": "wide"}

    def encode_items(self, titles: Sequence[str], images: Sequence[Image.Image | ImageError | None]) -> EncodedItems:
        text = np.stack([drawn(title.encode()) for title in titles])
        image = np.full_like(text, np.nan)
        for row, picture in enumerate(images):
            if isinstance(picture, Image.Image):
                image[row] = drawn(picture.tobytes())
        return EncodedItems(text + image, text, image, np.zeros(len(titles), bool))


def drawn(content: bytes) -> np.ndarray:
    random = np.random.default_rng(zlib.crc32(content))
    return np.asarray(random.normal(size=DIM) * np.linspace(3, 0.3, DIM), np.float32)


def make(data: Path, out: Path, **settings: Any) -> dict[str, Any]:
    encoder = WideEncoder()
    manifest = export(Dataset(data), out, encoder.fingerprint, WideEncoder, shard_size=30, **settings)
    assert manifest is not None
    return manifest


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("chairs") / "data", ITEMS, broken=(7,))


@pytest.fixture(scope="module")
def full(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("full") / "embeddings"
    make(data, out)
    return out


# --- the formats ----------------------------------------------------------------------------------------------
@given(
    arrays(np.float32, (3, 9), elements=st.floats(-(2.0**99), 2.0**99, width=32)),
    st.sampled_from(precision.PRECISIONS[2:]),
)
def test_codes_stand_for_vectors_near_the_given_ones(vectors: np.ndarray, kind: str) -> None:
    stored = precision.to_stored(vectors, kind)
    found = precision.to_floats(stored, kind, 9)
    assert found.dtype == np.float32 and np.isfinite(found).all()
    if kind == "binary":
        assert stored.values.shape == (3, 2) and stored.scales is None
        np.testing.assert_array_equal(found > 0, vectors > 0)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    else:
        assert stored.scales is not None
        assert (np.abs(found - vectors) <= stored.scales[:, None] * 0.51 + 1e-38).all()
        again = precision.to_stored(found, kind)  # what was read and is written again is the same
        assert again.scales is not None
        np.testing.assert_array_equal(again.values[stored.scales > 1e-30], stored.values[stored.scales > 1e-30])


def test_a_cosine_of_binary_vectors_counts_differing_bits() -> None:
    vectors = np.random.default_rng(0).normal(size=(2, 37)).astype(np.float32)
    one, other = precision.to_floats(precision.to_stored(vectors, "binary"), "binary", 37)
    differing = (vectors[0] > 0) != (vectors[1] > 0)
    assert one @ other == pytest.approx(1 - 2 * differing.sum() / 37, abs=1e-6)


def test_a_prefix_is_one_long_and_nothing_stays_nothing() -> None:
    vectors = np.array([[3, 4, 9], [0, 0, 5], [np.nan] * 3], np.float32)
    np.testing.assert_array_equal(precision.shortened(vectors, 2), np.float32([[0.6, 0.8], [0, 0], [np.nan] * 2]))


@pytest.mark.parametrize("kind", precision.PRECISIONS)
def test_the_estimated_bytes_are_those_of_the_arrow_columns(kind: str) -> None:
    kept = schema.embedding_schema(20, kind)
    names = schema.read_columns([schema.FUSED], kind)
    widths = {name: kept.field(name).type for name in names}
    found = sum(
        each.list_size * each.value_type.bit_width // 8 if hasattr(each, "list_size") else each.bit_width // 8
        for each in widths.values()
    )
    assert precision.bytes_of(kind, 20) == found


# --- the export -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", precision.PRECISIONS)
@pytest.mark.parametrize("dim", [None, 16])
def test_a_short_export_holds_the_first_numbers_of_the_full_one(
    data: Path, full: Path, tmp_path: Path, kind: Any, dim: int | None
) -> None:
    manifest = make(data, tmp_path / "short", dim=dim, storage=kind)
    assert verify(tmp_path / "short") == []
    assert (manifest["dim"], manifest["dtype"]) == (dim or DIM, kind)
    assert manifest["counts"] == schema.read_manifest(full)["counts"]
    assert manifest["schema_version"] == (1 if kind in ("float32", "float16") else 2)
    for view in schema.VIEWS:
        wanted, found = EmbeddingTable.open(full, view), EmbeddingTable.open(tmp_path / "short", view)
        assert found.item_ids == wanted.item_ids and found.dim == (dim or DIM)
        np.testing.assert_array_equal(found.present, wanted.present)
        expected = precision.shortened(wanted.vectors, dim) if dim else wanted.vectors
        if kind == "binary":
            np.testing.assert_array_equal(found.vectors[found.present] > 0, expected[found.present] > 0)
        else:
            step = {"float32": 0, "float16": 1e-2, "int8": np.nanmax(np.abs(expected)) / 127}[kind]
            np.testing.assert_allclose(found.vectors, expected, atol=step, rtol=0)
    if dim is None and kind in ("float32", "float16"):
        assert schema.SHORT not in manifest and schema.FULL_DIM not in manifest["settings"]
        return
    told = manifest[schema.SHORT]
    assert told["full_dim"] == DIM and told["queries"]["text"] > 0
    assert told["recall@10"]["fused"] == pytest.approx(_recall(full, tmp_path / "short"), abs=0.05)


def _recall(full: Path, short: Path) -> float:
    """Return recall@10 of all items among those of their part, by the book."""
    hits = []
    for rows in (slice(0, 30), slice(30, 60)):
        near = []
        for folder in (full, short):
            table = EmbeddingTable.open(folder)
            vectors = table.vectors[rows][table.present[rows]]
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
            scores = vectors @ vectors.T
            np.fill_diagonal(scores, -np.inf)
            near.append(np.argsort(-scores, axis=1, kind="stable")[:, :10])
        hits += [len({*one} & {*other}) / 10 for one, other in zip(*near, strict=True)]
    return float(np.mean(hits))


def test_each_step_down_keeps_fewer_neighbours(data: Path, tmp_path: Path) -> None:
    recalls = [
        make(data, tmp_path / f"{dim} {kind}", dim=dim, storage=kind)[schema.SHORT]["recall@10"]["fused"]
        for dim, kind in ((None, "int8"), (32, "float32"), (8, "float32"), (8, "binary"))
    ]
    assert recalls == sorted(recalls, reverse=True) and recalls[0] > 0.95 and recalls[-1] < 0.7


def test_fault_02_a_short_export_goes_on_where_it_was_killed(data: Path, tmp_path: Path) -> None:
    whole = make(data, tmp_path / "whole", dim=16, storage="int8")
    make(data, tmp_path / "killed", dim=16, storage="int8")
    manifest = tmp_path / "killed" / schema.MANIFEST_FILE
    manifest.unlink()
    (tmp_path / "killed" / "part-00001.parquet").unlink()
    plan_of_it = json.loads((tmp_path / "whole" / schema.MANIFEST_FILE).read_text())
    schema.write_json(
        tmp_path / "killed" / schema.STATE_FILE,
        {key: plan_of_it[key] for key in ("schema_version", "shard_size", "settings", "fingerprint", "made_with")}
        | {"rows": [30, 30]},
    )
    again = make(data, tmp_path / "killed", dim=16, storage="int8")  # adopts one part, makes the other
    assert parts(tmp_path / "killed") == parts(tmp_path / "whole") and again["fingerprint"] == whole["fingerprint"]
    # the part without a record was not measured again
    assert again[schema.SHORT]["queries"]["fused"] < whole[schema.SHORT]["queries"]["fused"]


def test_workers_measure_what_one_process_measures(data: Path, tmp_path: Path) -> None:
    alone = make(data, tmp_path / "alone", storage="binary")
    encoder = WideEncoder()
    for worker in (0, 1):
        together = export(
            Dataset(data),
            tmp_path / "together",
            encoder.fingerprint,
            WideEncoder,
            shard_size=30,
            storage="binary",
            distribution=Distribution(num_workers=2, worker=worker),
        )
    assert together is not None and together[schema.SHORT] == alone[schema.SHORT]
    assert parts(tmp_path / "together") == parts(tmp_path / "alone")


def test_another_length_or_format_does_not_go_on_with_a_folder(data: Path, tmp_path: Path) -> None:
    make(data, tmp_path / "out", dim=16, storage="int8")
    with pytest.raises(ArtifactError, match="dim was 16, now 32"):
        make(data, tmp_path / "out", dim=32, storage="int8")
    with pytest.raises(ArtifactError, match="storage was 'int8', now 'binary'"):
        make(data, tmp_path / "out", dim=16, storage="binary")
    with pytest.raises(ArtifactError, match="full_dim"):
        make(data, tmp_path / "out", storage="int8")


def test_repaired_items_join_a_short_folder_and_the_measure_stays(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", ITEMS, broken=(7,))
    before = make(data, tmp_path / "out", dim=16, storage="int8")
    Image.new("RGB", (60, 60), "red").save(data / "images" / "7.png")
    after = make(data, tmp_path / "out", dim=16, storage="int8", reuse=Reuse(retry_failed=True))
    assert (before["counts"]["failed"], after["counts"]["failed"]) == (1, 0)
    assert after[schema.SHORT] == before[schema.SHORT] and verify(tmp_path / "out") == []


def test_a_dim_that_does_not_fit_is_refused_by_name(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--dim 65, but the encoder's vectors have {DIM} dimensions"):
        make(data, tmp_path / "out", dim=65)
    both = {**WideEncoder().fingerprint, "dims": {"fused": 2 * DIM}}
    with pytest.raises(ConfigError, match="concatenated"):
        export(Dataset(data), tmp_path / "out", both, WideEncoder, dim=8)
    assert not (tmp_path / "out").exists()


def test_precision_is_a_second_name_of_storage(tmp_path: Path) -> None:
    given = {"data": "d", "out": "o", "backbone": "b"}
    assert read_config(ExportConfig, None, ["precision=int8"], given).storage == "int8"
    (tmp_path / "settings.yaml").write_text("precision: binary\n")
    assert read_config(ExportConfig, tmp_path / "settings.yaml", (), given).storage == "binary"
    assert read_config(ExportConfig, None, ["storage=float16"], given).storage == "float16"


def test_codes_take_less_room_on_disk(data: Path, full: Path, tmp_path: Path) -> None:
    sizes = [sum(map(len, parts(full).values()))]
    for kind in ("float16", "int8", "binary"):
        make(data, tmp_path / kind, storage=kind)
        sizes.append(sum(map(len, parts(tmp_path / kind).values())))
    assert sizes == sorted(sizes, reverse=True)
    column = pq.ParquetFile(tmp_path / "int8" / "part-00000.parquet").metadata.row_group(0).column(1)
    assert "RLE_DICTIONARY" in column.encodings  # not four bytes for each code


# --- over an existing export ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("dim", "kind"), [(16, "int8"), (None, "binary"), (16, "float32"), (None, "float16")])
def test_shortening_an_export_gives_the_folder_of_a_short_export(
    data: Path, full: Path, tmp_path: Path, dim: int | None, kind: Any
) -> None:
    shortened = shorten(full, tmp_path / "shortened", dim=dim, storage=kind)
    exported = make(data, tmp_path / "exported", dim=dim, storage=kind)
    assert parts(tmp_path / "shortened") == parts(tmp_path / "exported")
    for key in ("fingerprint", "settings", "counts", "dim", "dtype", "data", schema.SHORT):
        assert shortened.get(key) == exported.get(key), key
    assert verify(tmp_path / "shortened") == []
    make(data, tmp_path / "shortened", dim=dim, storage=kind)  # an export goes on with it: there is nothing to do


def test_fault_02_shortening_goes_on_where_it_was_killed(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = shards.publish_shard

    def killed(folder: Path, plan: Any, number: int, *rest: Any) -> Any:
        if number == 1:
            raise KeyboardInterrupt
        return publish(folder, plan, number, *rest)

    monkeypatch.setattr(shards, "publish_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        shorten(full, tmp_path / "out", dim=8, storage="int8")
    first = (tmp_path / "out" / "part-00000.parquet").stat().st_ino
    monkeypatch.undo()
    shorten(full, tmp_path / "out", dim=8, storage="int8")
    assert (tmp_path / "out" / "part-00000.parquet").stat().st_ino == first and verify(tmp_path / "out") == []
    shorten(full, tmp_path / "whole", dim=8, storage="int8")
    assert parts(tmp_path / "out") == parts(tmp_path / "whole")


def test_what_cannot_be_shortened_is_refused(full: Path, tmp_path: Path) -> None:
    shorten(full, tmp_path / "short", dim=8)
    with pytest.raises(ArtifactError, match=r"already holds shortened vectors \(float32\[8\]\)"):
        shorten(tmp_path / "short", tmp_path / "out", dim=4)
    with pytest.raises(ConfigError, match="neither --dim nor --precision"):
        shorten_command.run(ShortenConfig(embeddings=full, out=tmp_path / "out"))
    with pytest.raises(ConfigError, match="--dim 100"):
        shorten(full, tmp_path / "out", dim=100)
    with pytest.raises(ArtifactError, match="begun with other settings"):
        shorten(full, tmp_path / "short", dim=9)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="does not exist"):
        shorten(tmp_path / "empty", tmp_path / "out", dim=9)
    part = tmp_path / "short" / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    assert verify(tmp_path / "short")


# --- who reads it -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=["int8", "binary"])
def short(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("short") / "embeddings"
    make(data, out, dim=20, storage=request.param)
    return out


def test_an_index_of_short_vectors_finds_their_neighbours(short: Path, tmp_path: Path) -> None:
    meta = build_index(short, tmp_path / "index", column="concat")
    assert meta["dim"] == 40 and meta["rows"] == ITEMS - 1
    index = ItemIndex.open(tmp_path / "index")
    table = EmbeddingTable.open(short, "concat")
    vectors = table.vectors / np.linalg.norm(table.vectors, axis=1, keepdims=True)
    scores = vectors[table.present] @ vectors[table.present][0]
    (best, *_) = index.neighbours(table.item_ids[0], 3)
    assert best.cosine == pytest.approx(np.sort(scores)[-2], abs=1e-5)


def test_pandas_opens_the_folder_and_the_documented_formula_holds(short: Path) -> None:
    frame = pandas.read_parquet(short).dropna(subset=["fused"])
    table = EmbeddingTable.open(short)
    codes = np.stack(frame["fused"])
    if "fused_scale" in frame:
        found = codes.astype(np.float32) * frame["fused_scale"].to_numpy(np.float32)[:, None]
    else:
        found = np.where(np.unpackbits(codes.astype(np.uint8), axis=1)[:, :20], 1, -1) / np.float32(np.sqrt(20))
    np.testing.assert_allclose(found, table.vectors[table.present], rtol=1e-6)


def test_damaged_scales_and_columns_are_noticed(data: Path, tmp_path: Path) -> None:
    make(data, tmp_path / "out", storage="int8")
    part = tmp_path / "out" / "part-00000.parquet"
    table = pq.read_table(part)
    scales = table["fused_scale"].to_pylist()
    scales[0] = float("nan")
    place = table.column_names.index("fused_scale")
    _replace(tmp_path / "out", table.set_column(place, table.schema.field(place), pa.array(scales, pa.float32())))
    assert any("no usable scale of fused" in str(problem) for problem in verify(tmp_path / "out"))
    _replace(tmp_path / "out", table.drop_columns(["fused_scale"]))
    with pytest.raises(ArtifactError, match="fused_scale"):
        EmbeddingTable.open(tmp_path / "out")


def _replace(folder: Path, table: Any) -> None:
    """Write a part anew, and its record in the manifest."""
    from vlm2rec.embedder.contract.storage import sha256_file

    part = folder / "part-00000.parquet"
    pq.write_table(table, part, use_dictionary=False)
    manifest = schema.read_manifest(folder)
    manifest["shards"][0] |= {"bytes": part.stat().st_size, "sha256": sha256_file(part)}
    schema.write_json(folder / schema.MANIFEST_FILE, manifest)
