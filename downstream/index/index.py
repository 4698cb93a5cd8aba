"""A FAISS index over one view of an embeddings folder, and neighbours of an item from it.

Vectors are L2-normalised and compared by L2 distance, which gives the same order as cosine (|x − y|² = 2 − 2·cos),
and, unlike the inner product, also if a factory string centres the data (PCA). Results are shown as cosines.

    index folder   items.faiss   ids.parquet (row, item_id, title)   index.json (written last)

`index.json` holds size and SHA-256 of the two other files, which `ItemIndex.open` compares over all their bytes before
it reads them: files of two builds, or a copy cut short, are refused. Hashing takes about a second for 1.5 GB, once for
each time that an index is opened. An index of a version that did not record them opens with `unchecked` set.
Row i of `items.faiss` is row i of `ids.parquet`: the items with a usable vector, in the order of the export.
"""

from __future__ import annotations

import bisect
import difflib
import itertools
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlm2rec.downstream.index import parts
from vlm2rec.downstream.index.plan import KINDS, IndexPlan, empty_index, faiss_reason, no_vectors, plan_index
from vlm2rec.downstream.index.recall import NEIGHBOURS, cosines, drop_own, measure
from vlm2rec.downstream.index.unit_vectors import Reservoir, UnitBatch, Watch, nearest_of, unit_batches
from vlm2rec.embedder.contract import provenance, publish, schema
from vlm2rec.embedder.contract.dataset import Dataset, dataset_of_export
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, DataError
from vlm2rec.embedder.contract.storage import Location, readable, sha256_file

FAISS_FILE = "items.faiss"
IDS_FILE = "ids.parquet"
INDEX_SCHEMA_VERSION = 1
ROW = "row"  # int64, in ids.parquet
# of the manifest of the export: how to encode a query
OF_THE_EXPORT = ("views", "dim", "dims", "settings", schema.MADE_WITH, schema.ENCODER, schema.CATALOGUE)

_BUILD_AGAIN = "run `vlm2rec build-index` again"
_PART_ROWS = 500_000  # rows that a Ray task adds to its part of an index
_REORDERED = 8  # candidates per neighbour that Refine compares again


# --- building -------------------------------------------------------------------------------------------------
def build_index(
    embeddings: Location,
    out: Path,
    *,
    column: str = schema.FUSED,
    kind: str = "auto",
    data: Location | None = None,
    sample: int = 1000,
    seed: int = 0,
    plan: IndexPlan | None = None,
    watch: Watch = lambda _, batches: batches,
    ray_tasks: int = 0,
) -> dict[str, Any]:
    """Index one view of an embeddings folder, measure the index, publish the folder; return its `index.json`.

    The vectors are streamed two or three times (training sample if needed, adding, exact search) and are never all
    in memory outside the index. An existing index folder at `out` is replaced in one step at the end.

    Args:
        embeddings: Finished embeddings folder.
        out: Index folder to write.
        column: View to index, or `concat`.
        kind: As for `choose_factory`.
        data: Dataset folder with the titles; default: the one that the export names, as `dataset_of_export` opens it.
        sample: Queries for the measured recall.
        seed: Seed of the samples and of k-means.
        plan: Result of `plan_index` for the same arguments, if it exists already.
        watch: Wraps each pass, to show progress.
        ray_tasks: This many tasks of a Ray cluster add the vectors, in parts (`parts.py`); 0: this process.

    Raises:
        MissingDependencyError: Ray is not installed.
        ConfigError: `out` holds something else, or `kind` is not usable.
        ArtifactError: the embeddings folder is unfinished or damaged, or has no vector in this view.
    """
    check_out(out)
    plan = plan or plan_index(embeddings, column=column, kind=kind, sample=sample, in_parts=ray_tasks > 0)
    if ray_tasks:
        parts.require_parts(plan)
    with publish.whole_folder(out) as folder:
        begun = time.perf_counter()
        index = _trained_index(plan, embeddings, column, seed, watch)
        queries = Reservoir(min(sample, plan.rows), plan.dim, seed + 1)
        if ray_tasks:
            index = _merged_parts(index, embeddings, column, ray_tasks)
        batches = watch("sampling queries" if ray_tasks else "adding vectors", unit_batches(embeddings, column))
        item_ids, left_out = _fill(plan, index, queries, batches, add=not ray_tasks)
        if index.ntotal == 0:
            raise no_vectors(embeddings, column)
        filled = time.perf_counter()
        batches = watch("checking recall", unit_batches(embeddings, column))
        quality = measure(index, queries.vectors, queries.rows, batches)
        manifest = schema.read_manifest(embeddings)
        titles, titles_from = find_titles(item_ids, data, embeddings, manifest)
        meta = {
            "schema_version": INDEX_SCHEMA_VERSION,
            "kind": kind,
            "factory": plan.factory,
            "metric": "cosine, searched as L2 distance of unit vectors",
            "column": column,
            "rows": index.ntotal,
            "dim": plan.dim,
            "left_out": sum(left_out.values()),
            "left_out_reasons": left_out,
            "recall@10": quality.recall,
            "recall_sample": len(queries.rows),
            "cosine_error": quality.cosine_error,
            "effort": quality.effort,
            "efforts_tried": quality.tried,
            "search_ms": quality.search_ms,
            "search_ms_single": quality.search_ms_single,
            "threads": int(faiss.omp_get_max_threads()),
            "build_seconds": filled - begun,
            "check_seconds": time.perf_counter() - filled,
            "titles": int(pc.sum(pc.not_equal(titles, "")).as_py() or 0),
            "titles_from": titles_from,
            "embeddings": str(embeddings.resolve()),
            "export": {name: manifest[name] for name in OF_THE_EXPORT if name in manifest},
            "fingerprint": manifest["fingerprint"],
            "shards_sha256": schema.shards_sha256(manifest),
            "seed": seed,
            "created": provenance.created(),
            "vlm2rec_version": provenance.version_of("vlm2rec"),
            "faiss_version": faiss.__version__,
        }
        return _write(folder, out, plan, index, item_ids, titles, meta)


def _trained_index(plan: IndexPlan, embeddings: Location, column: str, seed: int, watch: Watch) -> Any:
    index = empty_index(plan.factory, plan.dim)
    if isinstance(index, faiss.IndexRefine):
        index.k_factor = _REORDERED
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        ivf.cp.seed = seed
        ivf.cp.min_points_per_centroid = 1  # few vectors per list are fine: recall is measured
    if index.is_trained:
        return index
    chosen = Reservoir(plan.train_rows, plan.dim, seed)
    for batch in watch("drawing a training sample", unit_batches(embeddings, column)):
        chosen.offer(batch.vectors)
    if len(chosen.rows) == 0:
        raise no_vectors(embeddings, column)
    with _faiss_refusals(f"train {plan.factory!r} on {len(chosen.rows)} vectors"):
        index.train(chosen.vectors)
    return index


@contextmanager
def _faiss_refusals(what: str) -> Iterator[None]:
    """Raise `ConfigError` if FAISS cannot do something with this kind of index."""
    try:
        yield
    except RuntimeError as error:
        raise ConfigError(
            f"FAISS cannot {what} ({faiss_reason(error)})",
            "a kind that suits this many vectors, and that FAISS can write and read",
            "choose --kind auto, or a factory string with fewer lists",
        ) from None


def _merged_parts(index: Any, embeddings: Location, column: str, tasks: int) -> Any:
    """Return a trained, empty index filled by the tasks of a Ray cluster."""
    rows = [int(shard["rows"]) for shard in schema.read_manifest(embeddings)["shards"]]
    divided = parts.groups(rows, min(_PART_ROWS, -(-sum(rows) // tasks)))
    # as read from bytes, like the parts: FAISS makes a flat index by another class, which it does not merge with them
    merged = faiss.deserialize_index(faiss.serialize_index(index))
    for made in parts.made_by_ray(index, embeddings, column, divided, tasks):
        parts.merge(merged, faiss.deserialize_index(made.copy()))
    return merged


def _fill(
    plan: IndexPlan, index: Any, queries: Reservoir, batches: Iterable[UnitBatch], add: bool = True
) -> tuple[pa.ChunkedArray, dict[str, int]]:
    """Add every vector to the index and offer it to the sample of queries; return ids, and counts of rows left out."""
    ids: list[pa.Array] = []
    absent = unusable = 0
    for batch in batches:
        if batch.item_ids:
            if add:
                with _faiss_refusals(f"add {len(batch.vectors)} vectors to {plan.factory!r}"):
                    index.add(batch.vectors)
            queries.offer(batch.vectors)
            ids.append(pa.array(batch.item_ids, pa.string()))
        absent += batch.absent
        unusable += batch.unusable
    return pa.chunked_array(ids, pa.string()), {"no vector": absent, "zero or not finite": unusable}


def find_titles(
    item_ids: pa.ChunkedArray, data: Location | None, embeddings: Location, manifest: dict[str, Any]
) -> tuple[pa.ChunkedArray, str | None]:
    """Return a title for each item (empty if unknown), and the dataset folder with the titles, or None.

    A dataset folder that is given must be readable; the one that the export names may be gone.
    """
    dataset = Dataset(data) if data else dataset_of_export(embeddings, manifest)[0]
    if dataset is not None:
        try:
            ids, titles = (dataset.items[name].cast(pa.string()) for name in (schema.ITEM_ID, schema.TITLE))
            rows = pc.index_in(item_ids, value_set=ids)
            return pc.fill_null(pc.take(titles, rows), ""), str(dataset.path.resolve())
        except (ArtifactError, pa.ArrowException) as error:
            if isinstance(error, ArtifactError) and data:
                raise
            if data:
                raise ArtifactError(
                    f"{dataset.path} has ids or titles that are not text ({error})", "a dataset folder", "prepare again"
                ) from None
    return pa.chunked_array([pa.array([""] * len(item_ids), pa.string())]), None


# --- publishing -----------------------------------------------------------------------------------------------
def check_out(out: Path) -> None:
    """Raise `ConfigError` unless `out` is free, empty, or an index folder that may be replaced."""
    publish.require_ours(
        out,
        "an earlier index with nothing else in it",
        ours=_is_index(out),
        only=(FAISS_FILE, IDS_FILE, schema.INDEX_FILE),
    )


def _is_index(folder: Path) -> bool:
    if not (folder / schema.INDEX_FILE).is_file():
        return False
    try:
        return {"schema_version", "factory"} <= schema.read_json(folder / schema.INDEX_FILE, "", "").keys()
    except ArtifactError:  # a damaged one is ours if the vectors lie beside it
        return (folder / FAISS_FILE).is_file() and (folder / IDS_FILE).is_file()


def _write(
    folder: Path,
    out: Path,
    plan: IndexPlan,
    index: Any,
    item_ids: pa.ChunkedArray,
    titles: pa.ChunkedArray,
    meta: dict[str, Any],
) -> dict[str, Any]:
    with publish.plain_disk_errors(out):
        faiss.write_index(index, str(folder / FAISS_FILE))
        if plan.kind not in KINDS:  # FAISS writes some kinds that it cannot read
            with _faiss_refusals(f"read back the index {plan.factory!r} that it wrote"):
                faiss.read_index(str(folder / FAISS_FILE), faiss.IO_FLAG_MMAP)
        rows = pa.array(np.arange(len(item_ids), dtype=np.int64))
        table = pa.table({ROW: rows, schema.ITEM_ID: item_ids, schema.TITLE: titles})
        pq.write_table(table, folder / IDS_FILE, compression="zstd", write_page_checksum=True)
        sizes = {name: (folder / name).stat().st_size for name in (FAISS_FILE, IDS_FILE)}
        files = {name: {"bytes": size, "sha256": sha256_file(folder / name)} for name, size in sizes.items()}
        meta = {**meta, "bytes": sizes[FAISS_FILE], "files": files}
        schema.write_json(folder / schema.INDEX_FILE, meta)
    return meta


# --- searching ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Neighbour:
    """An item near another one."""

    item_id: str
    cosine: float
    title: str


class ItemIndex:
    """An index folder, opened: neighbours by item id or by vector."""

    def __init__(self, folder: Path, index: Any, ids: pa.Table, meta: dict[str, Any]) -> None:
        self.folder, self.index, self.ids, self.meta = folder, index, ids, meta
        self.unchecked = "files" not in meta  # an older index, without checksums
        self.embeddings = _local_embeddings(meta)

    @classmethod
    def open(cls, folder: Path | str) -> ItemIndex:
        """Load an index folder.

        Raises:
            ArtifactError: the folder is unfinished, damaged, of a newer version, or holds files of two builds.
        """
        folder = Path(folder)
        while True:
            meta = read_meta(folder)
            try:
                _require_whole(folder, meta)
                index = _read_index(folder / FAISS_FILE)
                ids = schema.read_table(folder / IDS_FILE, fix=_BUILD_AGAIN)
            except ArtifactError:
                if read_meta(folder) == meta:
                    raise
                continue
            if read_meta(folder) == meta:  # else a rebuild replaced the folder while it was being read
                break
        schema.require_columns(ids.column_names, [ROW, schema.ITEM_ID, schema.TITLE], IDS_FILE, _BUILD_AGAIN)
        if not index.ntotal == ids.num_rows == meta["rows"]:
            raise ArtifactError(
                f"{folder} holds {index.ntotal} vectors, {ids.num_rows} ids, and says {meta['rows']} rows",
                "the same number of each",
                _BUILD_AGAIN,
            )
        return cls(folder, index, ids, meta)

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows (Q, k) int64 and cosines (Q, k) of the nearest items to vectors (Q, d) of any length.

        Nearest first; row -1 if there are fewer than k. The cosines of a flat index are exact; those of other kinds are
        off by about `meta["cosine_error"]`.
        """
        queries = np.ascontiguousarray(vectors, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.index.d:
            raise DataError(
                f"the query vectors have shape {queries.shape}",
                f"(Q, {self.index.d})",
                "encode the queries with the model and view of this index",
            )
        lengths = np.linalg.norm(queries, axis=1, keepdims=True)
        distances, rows = self.index.search(queries / np.where(lengths > 0, lengths, 1), min(k, len(self)))
        return rows, cosines(distances)

    def neighbours(self, item_id: str, k: int = NEIGHBOURS) -> list[Neighbour]:
        """Return the k items nearest to an item, nearest first, without the item itself.

        Raises:
            DataError: the index has no such item.
        """
        row = self.row_of(item_id)
        found, values = self.search(self.query_vector(row)[None], k + 1)
        if len(self) > k:
            found, values = drop_own(found, values, np.array([row]))
        keep = (found[0] >= 0) & (found[0] != row)
        nearest = self.ids.take(pa.array(found[0][keep]))
        return [
            Neighbour(name, float(cosine), title)
            for name, cosine, title in zip(
                nearest[schema.ITEM_ID].to_pylist(), values[0][keep], nearest[schema.TITLE].to_pylist(), strict=True
            )
        ]

    def nearest(self, vector: np.ndarray, k: int, without: Collection[str] = ()) -> list[Neighbour]:
        """Return the k items nearest to a vector (d,) of any length, nearest first, without some items."""
        found, values = self.search(vector[None], min(len(self), k + len(without)))
        keep = found[0] >= 0
        nearest = self.ids.take(pa.array(found[0][keep]))
        names, titles = (nearest[name].to_pylist() for name in (schema.ITEM_ID, schema.TITLE))
        every = zip(names, values[0][keep], titles, strict=True)
        return [Neighbour(name, float(cosine), title) for name, cosine, title in every if name not in without][:k]

    def nearest_exact(self, column: str, vector: np.ndarray, k: int, without: Collection[str] = ()) -> list[Neighbour]:
        """Return the k items whose vectors of another column are nearest; one pass over the embeddings folder.

        Raises:
            ArtifactError: the folder is not there, or not the one that the index was built from.
        """
        if self.embeddings is None or self.stale() is not None:
            raise ArtifactError(
                f"the index {self.folder} holds {self.meta['column']} vectors alone, and {self.stale()}",
                f"the embeddings folder it was built from, to read its {column} vectors",
                "give it with --embeddings, or leave --against out",
            )
        found = nearest_of(unit_batches(self.embeddings, column), vector, k, without)
        names = pa.array([name for name, _ in found], pa.string())
        rows = pc.index_in(names, value_set=self.ids[schema.ITEM_ID].cast(pa.string()))
        titles = pc.fill_null(pc.take(self.ids[schema.TITLE], rows), "").to_pylist()
        return [Neighbour(name, cosine, title) for (name, cosine), title in zip(found, titles, strict=True)]

    def row_of(self, item_id: str) -> int:
        """Return the index row of an item; raise `DataError` naming the most similar ids if there is none."""
        row = pc.index(self.ids[schema.ITEM_ID], item_id).as_py()
        if row >= 0:
            return int(row)
        near = nearest_ids(item_id, self.ids[schema.ITEM_ID])
        without = f"; {self.meta['left_out']} without a usable vector were left out" if self.meta["left_out"] else ""
        raise DataError(
            f"item {item_id!r} is not in {self.folder}, which has {len(self)} items{without}",
            f"an item id as in the catalogue, such as {', '.join(map(repr, near))}",
            "give an id of the catalogue; `search --text` finds items by words",
        )

    def query_vector(self, row: int) -> np.ndarray:
        """Return the unit vector of an item, (d,) float32.

        A flat index holds it exactly. Other kinds hold a rounded copy, so it is read from the embeddings folder if that
        still exists on this machine (or is set as `embeddings`) and is unchanged, else from the index.
        """
        if self.meta["factory"] != "Flat" and self.embeddings is not None and self.stale() is None:
            vector = _read_vector(self.embeddings, self.meta["column"], self._item_id(row))
            if vector is not None:
                return vector
        return self._reconstruct(row)

    def _item_id(self, row: int) -> str:
        return str(self.ids[schema.ITEM_ID][row].as_py())

    def _reconstruct(self, row: int) -> np.ndarray:
        ivf = faiss.try_extract_index_ivf(self.index)
        if ivf is not None:
            ivf.make_direct_map()
        try:
            return np.asarray(self.index.reconstruct(row), np.float32)
        except RuntimeError as error:
            raise ArtifactError(
                f"an index of kind {self.meta['factory']!r} does not keep its vectors ({faiss_reason(error)}), and"
                f" {self.stale()}",
                "the embeddings folder it was built from",
                f"put that folder back, or {_BUILD_AGAIN} with another --kind",
            ) from None

    def stale(self, embeddings: Location | None = None) -> str | None:
        """Return how the embeddings folder differs from the one that was indexed; None if it is the same.

        Without `embeddings`, it checks `self.embeddings`: the folder that the index was built from. An address in a
        store that only `index.json` names is not opened.
        """
        folder = self.embeddings if embeddings is None else embeddings
        if folder is None:
            return f"{self.meta['embeddings']} is not a folder on this machine"
        try:
            manifest = schema.read_manifest(folder)
        except ArtifactError:
            return f"{folder} is not a finished embeddings folder any more"
        if manifest["fingerprint"] != self.meta["fingerprint"]:
            return f"{folder} was exported with other settings than those indexed"
        if schema.shards_sha256(manifest) != self.meta["shards_sha256"]:
            return f"{folder} holds other vectors than those indexed"
        return None

    def require_fresh(self, embeddings: Location) -> None:
        """Raise `ArtifactError` if the index was not built from what `embeddings` holds now."""
        reason = self.stale(embeddings)
        if reason:
            raise ArtifactError(
                f"the index {self.folder} is stale: {reason}", "an index of these vectors", _BUILD_AGAIN
            )


def read_meta(folder: Path) -> dict[str, Any]:
    """Read `index.json`; raise `ArtifactError` if the folder is not a finished index or is of a newer version."""
    meta = schema.read_json(
        folder / schema.INDEX_FILE,
        f"an index folder, whose {schema.INDEX_FILE} is written last",
        "run `vlm2rec build-index` first",
    )
    found = meta.get("schema_version")
    if not isinstance(found, int) or found > INDEX_SCHEMA_VERSION:
        raise ArtifactError(
            f"{folder} has index schema version {found!r}",
            f"a version up to {INDEX_SCHEMA_VERSION}",
            f"install a newer vlm2rec, or {_BUILD_AGAIN}",
        )
    wrong = [key for key, kind in _META_KEYS.items() if type(meta.get(key)) is not kind]
    files = meta.get("files", {})
    if not isinstance(files, dict) or not all(
        isinstance(files.get(name), dict) and {"bytes", "sha256"} <= files[name].keys()
        for name in (FAISS_FILE, IDS_FILE)
        if "files" in meta
    ):
        wrong.append("files")
    if wrong:
        raise ArtifactError(
            f"{folder / schema.INDEX_FILE} is damaged: {', '.join(wrong)} missing or of another type",
            "the file as build-index wrote it",
            _BUILD_AGAIN,
        )
    return meta


_META_KEYS = {
    "rows": int, "column": str, "factory": str, "left_out": int,
    "embeddings": str, "fingerprint": str, "shards_sha256": str,
}  # fmt: skip


def _local_embeddings(meta: Mapping[str, Any]) -> Location | None:
    """Return the embeddings folder that an index names; None for an address in a store, which the user has to give."""
    named = str(meta["embeddings"])
    if "://" in named:
        return None
    try:
        Path(named).exists()
    except (OSError, ValueError):  # no name that a file can have
        return None
    return Path(named)


def _require_whole(folder: Path, meta: Mapping[str, Any]) -> None:
    """Raise `ArtifactError` unless each file of an index folder has the size and the SHA-256 that it was built with."""
    for name in (FAISS_FILE, IDS_FILE):
        path, recorded = folder / name, meta.get("files", {}).get(name)
        if not path.is_file():
            raise ArtifactError(f"{path} is missing or is not a file", "the index as built", _BUILD_AGAIN)
        if recorded is None:
            continue
        try:
            same = path.stat().st_size == recorded["bytes"] and sha256_file(path) == recorded["sha256"]
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read ({error})", "the index as built", _BUILD_AGAIN) from None
        if not same:
            raise ArtifactError(
                f"{path} is damaged, or another build wrote it: its size or SHA-256 is not that in {schema.INDEX_FILE}",
                "the files of one build, whole",
                f"copy all of the folder again, or {_BUILD_AGAIN}",
            )


def _read_index(path: Path) -> Any:
    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        raise ArtifactError(
            f"{path} is missing or damaged ({faiss_reason(error)})", "the index as built", _BUILD_AGAIN
        ) from None


def _read_vector(embeddings: Location, column: str, item_id: str) -> np.ndarray | None:
    """Read one item's unit vector: first the ids of each shard, then the vectors of one row group."""
    manifest, stored = schema.read_manifest(embeddings), schema.stored_columns(column)
    dtype = manifest["dtype"]
    for shard in manifest["shards"]:
        path = embeddings / shard["file"]
        try:
            if not path.is_file():
                raise FileNotFoundError("it is missing")
            with readable(path) as source, pq.ParquetFile(source, page_checksum_verification=True) as file:
                for group in range(file.num_row_groups):
                    row = pc.index(file.read_row_group(group, [schema.ITEM_ID])[schema.ITEM_ID], item_id).as_py()
                    if row >= 0:
                        found = file.read_row_group(group, schema.read_columns(stored, dtype))
                        (batch,) = found.slice(row, 1).combine_chunks().to_batches()
                        parts = [
                            schema.vectors_of(batch, name, schema.dim_of(manifest, name), dtype) for name in stored
                        ]
                        vector = np.concatenate([vectors[0] for vectors, _ in parts])
                        return np.asarray(vector / np.linalg.norm(vector), np.float32)
        except (pa.ArrowException, OSError, KeyError) as error:  # KeyError: the index names a column that is not there
            raise ArtifactError(
                f"{path} is damaged ({error})", "the shard as exported", f"run `vlm2rec verify {embeddings}`"
            ) from None
    return None


def nearest_ids(item_id: str, known: pa.ChunkedArray, count: int = 3) -> list[str]:
    """Return the known ids most similar to `item_id`; in a large catalogue, those near it in alphabetical order."""
    ids = sorted(known.to_pylist())
    position = bisect.bisect_left(ids, item_id)
    matcher = difflib.SequenceMatcher(b=item_id, autojunk=False)

    def similarity(other: str) -> tuple[float, int]:
        matcher.set_seq1(other)
        same = itertools.takewhile(lambda letters: letters[0] == letters[1], zip(other, item_id, strict=False))
        return matcher.ratio(), len(list(same))  # of equally similar ids, the one with the longest common start

    return sorted(ids[max(0, position - 1000) : position + 1000], key=similarity, reverse=True)[:count]
