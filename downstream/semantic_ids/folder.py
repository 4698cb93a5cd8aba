"""The folder of semantic ids: codes of every item, and the codebook that codes new ones.

    semantic_ids.parquet    item_id, codes: a fixed-size list of L + 1 int32, null for items without a vector
    codebook.safetensors    codewords (L, K, d) float32
    semantic_ids.json       settings, the table of quality, SHA-256 of the two others; written last

The first L codes are those of the codebook; the last one tells items with the same L codes apart, and is 0 for all
others. So no two items have the same codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.numpy

from vlm2rec.downstream.index.recall import NEIGHBOURS
from vlm2rec.downstream.index.unit_vectors import Reservoir, UnitBatch, Watch, unit_batches
from vlm2rec.downstream.semantic_ids import codebook as codebooks
from vlm2rec.downstream.semantic_ids.codebook import Codebook
from vlm2rec.downstream.semantic_ids.quality import Scatter, describe, found_by_codes, nearest_rows
from vlm2rec.embedder.contract import provenance, publish, schema
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError
from vlm2rec.embedder.contract.storage import Location, sha256_file

IDS_FILE = "semantic_ids.parquet"
CODEBOOK_FILE = "codebook.safetensors"
RECORD_FILE = "semantic_ids.json"
CODES = "codes"
WRITER = "vlm2rec semantic-ids"
_WHAT, _AGAIN = "a finished folder of semantic ids", "run `vlm2rec semantic-ids` again"


@dataclass(frozen=True)
class SemanticIds:
    """Codes of items, and the codebook that they are from; row i of `codes` is item i of `item_ids`."""

    codebook: Codebook
    item_ids: list[str]  # those that have codes
    codes: np.ndarray  # (N, L + 1) int32
    record: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> SemanticIds:
        """Read a folder whose files are those that were written.

        Raises:
            ArtifactError: it is unfinished, damaged, or of a newer version.
        """
        record = schema.read_json(folder / RECORD_FILE, _WHAT, _AGAIN)
        if record.get("schema_version") != 1 or not isinstance(record.get("files"), dict):
            raise ArtifactError(f"another version of vlm2rec wrote {folder / RECORD_FILE}", _WHAT, _AGAIN)
        for name in (IDS_FILE, CODEBOOK_FILE):
            path = folder / name
            if not path.is_file() or sha256_file(path) != record["files"].get(name):
                raise ArtifactError(f"{path} is missing or is not the file that was written", _WHAT, _AGAIN)
        try:
            words = safetensors.numpy.load_file(folder / CODEBOOK_FILE)["codewords"]
            table = pq.read_table(folder / IDS_FILE)
            table = table.filter(table[CODES].is_valid())
            codes = np.concatenate([np.empty(0, np.int32), *(c.flatten().to_numpy() for c in table[CODES].chunks)])
            shaped = codes.reshape(len(table), words.shape[0] + 1)
        except (safetensors.SafetensorError, pa.ArrowException, KeyError, ValueError, OSError) as error:
            raise ArtifactError(f"{folder} is damaged ({error})", _WHAT, _AGAIN) from None
        return cls(Codebook(words), table[schema.ITEM_ID].to_pylist(), shaped, record)


def check_out(out: Path) -> None:
    """Raise `ConfigError` unless `out` is free, or holds earlier semantic ids and nothing else."""
    ours = schema.is_written_by(out / RECORD_FILE, WRITER)
    publish.require_ours(out, "earlier semantic ids", ours=ours, only=(IDS_FILE, CODEBOOK_FILE, RECORD_FILE))


def build(
    embeddings: Location,
    out: Path,
    *,
    column: str = schema.FUSED,
    levels: int = 3,
    size: int = 256,
    balanced: bool = False,
    like: Path | None = None,
    train_on: int = 200_000,
    sample: int = 1000,
    seed: int = 0,
    watch: Watch = lambda _, batches: batches,
) -> dict[str, Any]:
    """Code every item that has a vector, publish the folder, and return what `semantic_ids.json` says.

    The vectors, at length 1, are streamed: for the sample, for the codes (once for each level if `balanced`), and for
    the neighbours of the table of quality. In memory are the sample and, if `balanced`, N · K distances in float32.

    Args:
        embeddings: finished embeddings folder.
        out: folder to write.
        column: which view.
        levels: L.
        size: K, codewords of a level.
        balanced: give each codeword of a level as many items as each other, ⌈N / K⌉ at most.
        like: an earlier folder: its codebook is used, and the items that it has keep their codes.
        train_on: train on at most this many vectors.
        sample: items whose neighbours are looked up for the table of quality.
        seed: seed of the samples and of k-means.
        watch: wraps each pass, to show progress.

    Raises:
        ConfigError: `out` holds something else, there are fewer vectors than codewords, or `like` does not fit.
        ArtifactError: a folder is unfinished or damaged, or has no vector in this view.
    """
    check_out(out)
    earlier = None if like is None else SemanticIds.open(like)
    manifest = schema.read_manifest(embeddings)
    dim = schema.dims_of(manifest)[column]
    if earlier is not None:
        _require_fit(earlier, dim, column, balanced, like)
    with publish.whole_folder(out) as folder:
        drawn = Reservoir(min(train_on, int(manifest["num_items"])), dim, seed)
        queries = Reservoir(min(sample, int(manifest["num_items"])), dim, seed + 1)
        ids: list[str] = []
        usable: list[np.ndarray] = []
        for batch in watch("reading vectors", unit_batches(embeddings, column)):
            if earlier is None:
                drawn.offer(batch.vectors)
            queries.offer(batch.vectors)
            ids += batch.every
            usable.append(batch.keep)
        keep = np.concatenate([np.zeros(0, bool), *usable])
        if not keep.any():
            raise ArtifactError(f"{embeddings} has no usable {column} vector", "at least one", "export again")
        book = earlier.codebook if earlier else codebooks.train(drawn.vectors, levels, size, seed, balanced=balanced)
        known = [item_id for item_id, good in zip(ids, keep, strict=True) if good]
        codes = _codes(book, embeddings, column, len(known), balanced, watch)
        codes = _with_last(codes, known, earlier)
        spread = Scatter.of(book)
        neighbours = watch("comparing neighbours", unit_batches(embeddings, column))
        k = min(NEIGHBOURS, len(known) - 1)
        near = nearest_rows(_measured(spread, book, codes, neighbours), queries.vectors, queries.rows, k)
        quality = describe(book, codes[:, :-1], spread.explained, queries.rows, near)
        quality["recall"] = found_by_codes(book, codes[:, :-1], queries.vectors, queries.rows, near) if k else None
        record = {
            "schema_version": 1,
            "written_by": WRITER,
            "created": provenance.created(),
            "items": len(known),
            "left_out": len(ids) - len(known),
            "kept": 0 if earlier is None else len(set(known).intersection(earlier.item_ids)),
            "levels": book.levels,
            "codebook": book.size,
            "balanced": balanced,
            "last": int(codes[:, -1].max()) + 1,
            "column": column,
            "dim": dim,
            "seed": seed,
            "like": None if like is None else str(like.resolve()),
            "embeddings": str(embeddings.resolve()),
            "fingerprint": manifest["fingerprint"],
            "quality": quality,
            **provenance.library_versions("vlm2rec", "faiss-cpu"),
        }
        return _write(folder, out, book, ids, keep, codes, record)


def _require_fit(earlier: SemanticIds, dim: int, column: str, balanced: bool, like: Path | None) -> None:
    if earlier.codebook.dim != dim or earlier.record.get("column") != column:
        raise ConfigError(
            f"--like {like} was built from {earlier.record.get('column')} vectors of {earlier.codebook.dim}"
            f" dimensions, and these are {column} vectors of {dim} dimensions",
            "vectors of the same encoder and view",
            "choose another --like, or none",
        )
    if balanced:
        raise ConfigError(
            "--balanced with --like",
            "one of the two: with --like, the items of the earlier folder keep their codes",
            "leave --balanced or --like out",
        )


def _codes(book: Codebook, embeddings: Location, column: str, count: int, balanced: bool, watch: Watch) -> np.ndarray:
    """Return the codes of all items with a vector, (N, L) int32."""
    codes = np.empty((count, book.levels), np.int32)
    if not balanced:
        for batch in watch("coding", unit_batches(embeddings, column)):
            codes[batch.first : batch.first + len(batch.vectors)] = book.encode(batch.vectors)
        return codes
    costs = np.empty((count, book.size), np.float32)
    for level in range(book.levels):
        for batch in watch(f"coding, level {level + 1}", unit_batches(embeddings, column)):
            rows = slice(batch.first, batch.first + len(batch.vectors))
            rest = batch.vectors - book.decode(codes[rows, :level]) if level else batch.vectors
            costs[rows] = codebooks.distances(rest, book.codewords[level])
        codes[:, level] = codebooks.assign_evenly(costs)
    return codes


def _measured(spread: Scatter, book: Codebook, codes: np.ndarray, batches: Iterable[UnitBatch]) -> Iterator[UnitBatch]:
    """Pass a stream on, and add its vectors and their codes to `spread`."""
    for batch in batches:
        spread.add(batch.vectors, codes[batch.first : batch.first + len(batch.vectors), :-1], book)
        yield batch


def _with_last(codes: np.ndarray, known: list[str], earlier: SemanticIds | None) -> np.ndarray:
    """Return the codes with the last level, (N, L + 1); an item of an earlier folder has those that it had."""
    if earlier is None:
        return np.column_stack([codes, codebooks.unique_level(codes)])
    row_of = {item_id: row for row, item_id in enumerate(earlier.item_ids)}
    rows = np.array([row_of.get(item_id, -1) for item_id in known], np.int64)
    found = np.empty((len(known), codes.shape[1] + 1), np.int32)
    found[rows >= 0] = earlier.codes[rows[rows >= 0]]
    new = codes[rows < 0]
    found[rows < 0] = np.column_stack([new, codebooks.unique_level(new, earlier.codes)])
    return found


def _write(
    folder: Path, out: Path, book: Codebook, ids: list[str], keep: np.ndarray, codes: np.ndarray, record: dict[str, Any]
) -> dict[str, Any]:
    width = book.levels + 1
    every = np.zeros((len(ids), width), np.int32)
    every[keep] = codes
    lists = pa.FixedSizeListArray.from_arrays(pa.array(every.ravel()), width, mask=pa.array(~keep))
    table = pa.table({schema.ITEM_ID: pa.array(ids, pa.string()), CODES: lists})
    with publish.plain_disk_errors(out):
        pq.write_table(table, folder / IDS_FILE, compression="zstd", write_page_checksum=True)
        safetensors.numpy.save_file({"codewords": book.codewords}, folder / CODEBOOK_FILE)
        record["files"] = {name: sha256_file(folder / name) for name in (IDS_FILE, CODEBOOK_FILE)}
        schema.write_json(folder / RECORD_FILE, record)
    return record
