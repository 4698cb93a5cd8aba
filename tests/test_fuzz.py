"""Every reader on damaged files of every format: no row is lost, nothing ends as a bug, nothing hangs.

The ordinary suite draws a few files of each format, `make test-nightly` ten thousand. `FUZZ_CASES` sets their number,
`FUZZ_FROM` the first seed; a failure names its seed: `FUZZ_FROM=17 FUZZ_CASES=1 pytest tests/test_fuzz.py -k parquet`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import shutil
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mutations
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedding_folder import write_embeddings
from mutations import Draw, Table
from PIL import Image

from vlm2rec.downstream.index.index import ItemIndex, build_index
from vlm2rec.embedder.backbones.images import ImageError, open_image, size_of
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import Vlm2RecError
from vlm2rec.embedder.export.verify import verify
from vlm2rec.pipelines import console, import_vectors, prepare
from vlm2rec.pipelines import verify as verify_command
from vlm2rec.pipelines.config import ImportVectorsConfig, PrepareConfig, VerifyConfig

pytestmark = pytest.mark.fuzz

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
CASES = int(os.environ.get("FUZZ_CASES") or (10_000 if NIGHTLY else 25))
FIRST = int(os.environ.get("FUZZ_FROM") or 0)
HANG = 120.0  # seconds after which a file of a kilobyte is no longer being read

IDS = [f"{row:03d}" for row in range(12)]
ITEMS: Table = [
    ["item_id", "title", "price"],
    *([item, f"red chair, {item}", f"{row}.5"] for row, item in enumerate(IDS)),
]
LOG: Table = [
    ["user_id", "item_id", "timestamp", "note"],
    *(
        [f"u{user}", IDS[(3 * user + step) % 12], str(1_400_000_000 + 100 * user + step), "it's fine"]
        for user in range(8)
        for step in range(5)
    ),
]


@dataclass
class Tally:
    """What became of the files of one format."""

    kind: str
    ends: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        files = sum(self.ends.values())
        found = ", ".join(f"{count:,} {end}" for end, count in sorted(self.ends.items()))
        rate = files / max(1e-9, time.monotonic() - self.started)
        return f"{self.kind}: {files:,} files at {rate:,.0f}/s: {found}; {len(self.faults)} faults, 0 hangs"


@contextmanager
def watched(current: list[str]) -> Iterator[None]:
    """End this process, naming the file, if one file takes longer than `HANG`."""
    done = threading.Event()

    def watch() -> None:
        last, since = "", time.monotonic()
        while not done.wait(1):
            if current[0] != last:
                last, since = current[0], time.monotonic()
            elif time.monotonic() - since > HANG:
                print(f"\nHANG: {last}", file=sys.__stderr__, flush=True)
                for frame in sys._current_frames().values():
                    traceback.print_stack(frame, file=sys.__stderr__)
                os._exit(70)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def fuzz(
    kind: str, make: Callable[[Draw], bytes], read: Callable[[bytes], str], record: Callable[[str, object], None]
) -> None:
    """Read many damaged files. `read` returns how the reading ended, or raises; a lost row is an AssertionError."""
    tally, current = Tally(kind), [""]
    quiet, console.log.quiet = console.log.quiet, True
    try:
        with watched(current), warnings.catch_warnings(), pytest.MonkeyPatch.context() as patched:
            patched.setattr(os, "fsync", lambda file: None)  # most of the time; no power fails here
            warnings.simplefilter("ignore")
            for seed in range(FIRST, FIRST + CASES):
                current[0] = f"{kind}, seed {seed}"
                content = make(random.Random(f"{kind} {seed}"))
                try:
                    end = read(content)
                except Vlm2RecError as error:
                    end = f"exit {error.exit_code}"
                    if error.exit_code == 1 or not str(error).strip():
                        tally.faults.append(f"seed {seed}: {error!r}")
                except AssertionError as error:
                    end = "rows lost"
                    tally.faults.append(f"seed {seed}: {error}")
                except Exception as error:
                    end = "exit 1"
                    place = traceback.extract_tb(error.__traceback__)
                    ours = [f"{Path(f.filename).name}:{f.lineno}" for f in place if "vlm2rec" in f.filename]
                    what = f"{type(error).__name__}: {str(error)[:150]}"
                    tally.faults.append(f"seed {seed}: {what} ({', '.join(ours[-3:])})")
                tally.ends[end] += 1
    finally:
        console.log.quiet = quiet
    record("fuzz", str(tally))
    if tally.faults:
        pytest.fail(f"{tally}\n" + "\n".join(tally.faults[:40]), pytrace=False)


# --- items and interactions -------------------------------------------------------------------------------------
def _unpacked(content: bytes) -> bytes:
    return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content


def records_in(content: bytes, delimiter: str | None) -> set[int]:
    """Count the records of a file with another parser than ours.

    Args:
        content: the file, gzipped or not.
        delimiter: of a CSV; None for Parquet and JSON lines.

    Returns:
        What can be right: a carriage return alone ends a line or stands in a field. Empty if that parser gives up.
    """
    try:
        content = _unpacked(content)
    except (OSError, EOFError, ValueError):
        return set()
    if content.endswith(b"PAR1"):  # no reader looks at the four bytes at the start
        about = pq.ParquetFile(io.BytesIO(content)).metadata  # a damaged footer may say two numbers
        return {about.num_rows, sum(about.row_group(number).num_rows for number in range(about.num_row_groups))}
    if delimiter is None:
        return {sum(1 for line in content.split(b"\n") if line.strip())}
    text = content.decode("utf-8-sig", "replace").replace("\r\n", "\n").removeprefix(f"sep={delimiter}\n")
    found, open_quotes = set(), set()
    for reading in (text, text.replace("\r", " "), text.replace("\r", "\n")):
        try:
            found.add(_csv_records(reading, delimiter))
        except csv.Error:  # a quote that nothing closes may be meant as a character
            open_quotes.add(_csv_records(reading, delimiter, quoting=csv.QUOTE_NONE))
    return found | open_quotes if found else set()


def _csv_records(text: str, delimiter: str, **reading: Any) -> int:
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, **reading))
    rows = [row for row in rows if any(field.strip() for field in row)]
    return sum(row != rows[0] for row in rows)  # a header that comes again is no record


class Preparing:
    """A folder with sound items, interactions and images, in which one of the files is replaced again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "images").mkdir(parents=True)
        for item in IDS:
            Image.new("RGB", (4, 4)).save(folder / "images" / f"{item}.png")
        (folder / "items").write_bytes(mutations.as_csv(ITEMS))
        (folder / "interactions").write_bytes(mutations.as_csv(LOG))
        self.config = PrepareConfig(
            items=folder / "items",
            interactions=folder / "interactions",
            images=folder / "images",
            out=folder / "out",
            core=1,
            candidates=1,
            candidate_seeds=(0,),
        )

    def read(self, which: str, content: bytes, delimiter: str | None) -> str:
        """Prepare with this file; every record of it must have been kept or rejected."""
        path, out = self.folder / f"damaged-{which}", self.folder / "out"
        path.write_bytes(content)
        shutil.rmtree(out, ignore_errors=True)
        given: dict[str, Any] = {which: path}
        prepare.run(replace(self.config, **given))
        rows = json.loads((out / schema.DATASET_FILE).read_text())["rows"]
        with (out / schema.REJECTS_FILE).open(newline="", encoding="utf-8") as file:
            rejected = Counter(row["file"] for row in csv.DictReader(file))
        kept = {
            "items": pq.read_metadata(out / schema.ITEMS_FILE).num_rows,
            "interactions": _steps(pq.read_table(out / schema.SEQUENCES_FILE)),
        }
        for name, counts in rows.items():
            assert counts["read"] == counts["kept"] + sum(counts["rejected"].values()), f"{name}: {counts}"
            assert rejected[name] == sum(counts["rejected"].values()), f"{name}: {counts}, rejects.csv: {rejected}"
            assert kept[name] == counts["kept"], f"{name}: {counts}, written: {kept}"
        expected = records_in(content, delimiter)
        assert not expected or rows[which]["read"] in expected, f"{expected} records, {rows[which]}"
        return "read, some rows rejected" if rejected else "read"


def _steps(sequences: pa.Table) -> int:
    """Count the interactions of all users: those to train on, and the two that are held out."""
    return sum(len(train) for train in sequences[schema.TRAIN].to_pylist()) + 2 * sequences.num_rows


Maker = Callable[[Draw, Table], bytes]
TABLES: dict[str, tuple[Maker, str | None]] = {
    "CSV": (mutations.csv_case(","), ","),
    "CSV with semicolons": (mutations.csv_case(";"), ";"),
    "TSV": (mutations.csv_case("\t"), "\t"),
    "JSON lines": (mutations.json_lines, None),
    "CSV, gzipped": (mutations.gzipped(mutations.csv_case(",")), ","),
    "JSON lines, gzipped": (mutations.gzipped(mutations.json_lines), None),
    "Parquet": (mutations.parquet_of, None),
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("which", ["items", "interactions"])
def test_damaged_items_and_interactions(
    tmp_path: Path, which: str, kind: str, record_property: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "_print", lambda *_: None)  # half of the time
    world, (make, delimiter) = Preparing(tmp_path / "world"), TABLES[kind]
    table = ITEMS if which == "items" else LOG
    fuzz(
        f"{which}, {kind}",
        lambda draw: make(draw, table),
        lambda content: world.read(which, content, delimiter),
        record_property,
    )


# --- vectors ----------------------------------------------------------------------------------------------------
MATRIX = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
VECTORS: Table = [["item_id", *"abcd"], *([item, *map(str, row)] for item, row in zip(IDS, MATRIX, strict=True))]
LISTS: Table = [
    ["item_id", "fused"],
    *([item, json.dumps(row.tolist())] for item, row in zip(IDS, MATRIX, strict=True)),
]
COLUMNS = pa.table({"item_id": IDS, "text": MATRIX.tolist(), "image": [*MATRIX[1:].tolist(), None]})
JSON_IDS = json.dumps(IDS).encode()


def _npy_rows(content: bytes) -> set[int]:
    return {len(np.load(io.BytesIO(content)))}


VECTOR_FILES: dict[str, tuple[str, Callable[[Draw], bytes], Callable[[bytes], set[int]]]] = {
    "CSV": (".csv", lambda draw: mutations.csv_case(",")(draw, VECTORS), lambda c: records_in(c, ",")),
    "CSV of lists": (".csv", lambda draw: mutations.csv_case(",")(draw, LISTS), lambda c: records_in(c, ",")),
    "TSV": (".tsv", lambda draw: mutations.csv_case("\t")(draw, VECTORS), lambda c: records_in(c, "\t")),
    "Parquet": (".parquet", lambda draw: mutations.parquet(draw, COLUMNS), lambda c: records_in(c, None)),
    "npy": (".npy", lambda draw: mutations.npy(draw, MATRIX), _npy_rows),
    "ids, text": (
        ".txt",
        lambda draw: draw.choice((mutations.damage_lines, mutations.damage_bytes))(draw, "\n".join(IDS).encode()),
        lambda content: {12},
    ),
    "ids, JSON": (".json", lambda draw: mutations.json_document(draw, IDS), lambda content: {12}),
    "ids, npy": (
        ".ids.npy",
        lambda draw: mutations.damage_bytes(draw, _saved(np.array(IDS))),
        lambda content: {12},
    ),
}


def _saved(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", VECTOR_FILES)
def test_damaged_files_of_vectors(
    tmp_path: Path, kind: str, record_property: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_vectors, "print_summary", lambda *_: None)
    suffix, make, count = VECTOR_FILES[kind]
    data = tmp_path / "data"
    data.mkdir()
    pq.write_table(pa.table({"item_id": IDS, "title": IDS, "image_path": IDS}), data / schema.ITEMS_FILE)
    meta = {"schema_version": 1, "name": "chairs", "image_root": ".", "max_history": 10}
    (data / schema.DATASET_FILE).write_text(json.dumps(meta))
    np.save(tmp_path / "sound.npy", MATRIX)
    given: dict[str, Any] = {"in_item_order": True} if kind == "npy" else {}

    def read(content: bytes) -> str:
        path, out = tmp_path / f"damaged{suffix}", tmp_path / "out"
        path.write_bytes(content)
        shutil.rmtree(out, ignore_errors=True)
        files = {"file": tmp_path / "sound.npy", "ids": path} if kind.startswith("ids") else {"file": path}
        manifest = import_vectors.run(ImportVectorsConfig(data=data, out=out, max_failures=1.0, **files, **given))
        assert sum(manifest["counts"].values()) == len(IDS) and verify(out) == []
        rows = pq.read_table(out / "part-00000.parquet").to_pylist()
        taken = sum(row["error"] != "the file lacks this id" for row in rows)
        expected = count(content)
        found = taken + manifest["settings"]["extra_ids"]
        assert not expected or found in expected, f"{expected} rows, {found} taken or left out: {manifest['counts']}"
        return "read" if taken == len(IDS) else "read, some items failed"

    fuzz(f"vectors, {kind}", make, read, record_property)


# --- images -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_damaged_images(tmp_path: Path, kind: str, record_property: Any) -> None:
    make = mutations.picture_case(kind, mutations.pictures(kind))

    def read(content: bytes) -> str:
        (tmp_path / "a").write_bytes(content)
        found = []
        for reader in (size_of, lambda root, name: open_image(root, name, 400)):
            try:
                picture = reader(tmp_path, "a")
            except ImageError as error:
                found.append(f"refused{'' if str(error) else ' without a reason'}")
            else:
                assert not isinstance(picture, Image.Image) or (picture.mode == "RGB" and min(picture.size) > 0)
                found.append("read")
        assert "refused without a reason" not in found
        return found[1]

    fuzz(f"images, {kind}", make, read, record_property)


# --- documents --------------------------------------------------------------------------------------------------
def _index(folder: Path) -> tuple[Path, Callable[[], Any]]:
    write_embeddings(folder / "embeddings", IDS, MATRIX)
    build_index(folder / "embeddings", folder / "index")
    return folder / "index" / schema.INDEX_FILE, lambda: ItemIndex.open(folder / "index").neighbours(IDS[0], 3)


def _manifest(folder: Path) -> tuple[Path, Callable[[], Any]]:
    write_embeddings(folder / "embeddings", IDS, MATRIX, MATRIX, MATRIX, shard_size=5)
    config = VerifyConfig(embeddings=folder / "embeddings")
    return folder / "embeddings" / schema.MANIFEST_FILE, lambda: verify_command.run(config)


def _shard(folder: Path) -> tuple[Path, Callable[[], Any]]:
    _, check = _manifest(folder)
    return folder / "embeddings" / "part-00001.parquet", check


def _dataset(folder: Path) -> tuple[Path, Callable[[], Any]]:
    prepare.run(replace(Preparing(folder).config, out=folder / "data"))

    def check() -> None:
        data = Dataset(folder / "data")
        _ = data.name, data.max_history, data.image_root, data.item_ids, data.titles, data.image_paths
        data.histories("valid")

    return folder / "data" / schema.DATASET_FILE, check


def _table(name: str) -> Callable[[Path], tuple[Path, Callable[[], Any]]]:
    def world(folder: Path) -> tuple[Path, Callable[[], Any]]:
        path, check = _dataset(folder)
        return path.with_name(name), check

    return world


FOLDERS: dict[str, Callable[[Path], tuple[Path, Callable[[], Any]]]] = {
    schema.MANIFEST_FILE: _manifest,
    "a shard": _shard,
    "dataset.json": _dataset,
    "items.parquet": _table(schema.ITEMS_FILE),
    "sequences.parquet": _table(schema.SEQUENCES_FILE),
    "index.json": _index,
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_damaged_files_of_our_own(tmp_path: Path, kind: str, record_property: Any) -> None:
    console.log.quiet = True
    try:
        path, check = FOLDERS[kind](tmp_path / "world")
    finally:
        console.log.quiet = False
    whole = path.read_bytes()

    def make(draw: Draw) -> bytes:
        if path.suffix == ".json":
            return mutations.json_document(draw, json.loads(whole))
        if draw.random() < 0.5:
            return mutations.damage_bytes(draw, whole)
        return mutations.parquet(draw, pq.read_table(path))

    def read(content: bytes) -> str:
        path.write_bytes(content)
        try:
            check()
        finally:
            path.write_bytes(whole)
        return "read"

    fuzz(kind, make, read, record_property)
