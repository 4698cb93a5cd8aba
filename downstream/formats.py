"""Writes an embeddings folder in the formats of other tools, one function for each; MMRec's is in `mmrec`.

    npy          fused.npy ...        item_ids.json           one matrix for each view
    cornac       features.npy         item_ids.json           for ImageModality and FeatureModality
    safetensors  vectors.safetensors  item_ids.json           one tensor for each view
    recbole      NAME.itememb         recbole.yaml            text, for RecBole's `preload_weight`
    lance        items.lance/                                 item_id and one vector column for each view

Row i of every matrix is the item at position i of `item_ids.json`, a plain list of strings: ids may hold line breaks
and any other character. Tables are streamed: the ids have to fit into memory, the vectors do not.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vlm2rec.downstream.options import Missing
from vlm2rec.downstream.table import read_batches, unit_rows
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ArtifactError, DataError, MissingDependencyError
from vlm2rec.embedder.contract.storage import Location

IDS_FILE = "item_ids.json"
LEFT_OUT = "left out"
MEAN_VECTOR = "mean vector"
_BATCH = 1024  # rows read at a time
# strings that pandas, and therefore RecBole, reads as missing values
_NOT_AVAILABLE = frozenset(
    {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"}
    | {"NULL", "NaN", "None", "n/a", "nan", "null"}
)


@dataclass(frozen=True)
class Gap:
    """An item without a vector in some view, the reason, and what was done."""

    item_id: str
    column: str
    reason: str
    outcome: str  # LEFT_OUT or MEAN_VECTOR


@dataclass(frozen=True)
class Selection:
    """The rows of an embeddings folder to write: those with a vector in every view, or with filled ones."""

    folder: Location
    columns: tuple[str, ...]
    dims: dict[str, int]  # length of each view's vectors
    kept: np.ndarray  # (N,) bool, in the folder's order
    means: dict[str, np.ndarray]  # view → (d,) float32, the mean of the existing vectors
    gaps: list[Gap]
    normalize: bool = False  # vectors of length 1

    def __len__(self) -> int:
        return int(self.kept.sum())

    def batches(self) -> Iterator[tuple[list[str], dict[str, np.ndarray]]]:
        """Yield ids and, for each view, their (n, d) float32 vectors, all finite, in the folder's order."""
        start = 0
        readers = [read_batches(self.folder, column, _BATCH) for column in self.columns]
        for parts in zip(*readers, strict=True):
            ids = parts[0][0]
            kept = self.kept[start : start + len(ids)]
            start += len(ids)
            views = {}
            for column, (_, vectors, present) in zip(self.columns, parts, strict=True):
                whole = vectors if present.all() else np.where(present[:, None], vectors, self.means[column])
                chosen = whole if kept.all() else whole[kept]
                views[column] = unit_rows(chosen) if self.normalize else chosen
            yield [item_id for item_id, keep in zip(ids, kept, strict=True) if keep], views


def select(folder: Location, columns: Sequence[str], missing: Missing, normalize: bool = False) -> Selection:
    """Read an embeddings folder once and choose the items to write.

    Args:
        folder: a finished embeddings folder.
        columns: which views.
        missing: what to do with an item that lacks one of them: `skip` leaves it out of all views, `mean` gives it the
            mean of the view's vectors, `error` raises.
        normalize: whether every vector, a mean one too, is written with length 1; one of zeros stays.

    Raises:
        ArtifactError: as `read_batches`, or no vector at all in a view.
        DataError: an item lacks a vector, and `missing` is `error`.
    """
    ids: list[str] = []
    present: dict[str, np.ndarray] = {}
    means: dict[str, np.ndarray] = {}
    for column in columns:
        masks: list[np.ndarray] = []
        total: Any = 0.0
        for batch_ids, vectors, has_vector in read_batches(folder, column, _BATCH):
            masks.append(has_vector)
            total = total + vectors[has_vector].sum(0, dtype=np.float64)
            if column == columns[0]:
                ids += batch_ids
        present[column] = np.concatenate(masks) if masks else np.zeros(0, bool)
        if not present[column].any():
            raise no_vectors(folder, column)
        means[column] = np.asarray(total / present[column].sum(), np.float32)
    complete = np.logical_and.reduce([present[column] for column in columns])
    reasons = {} if complete.all() else read_reasons(folder)
    outcome = MEAN_VECTOR if missing == "mean" else LEFT_OUT
    gaps = [
        Gap(ids[row], column, reasons.get(ids[row]) or f"no {column} vector", outcome)
        for row in np.flatnonzero(~complete)
        for column in columns
        if not present[column][row]
    ]
    if missing == "error":
        refuse(gaps)
    kept = np.ones(len(ids), bool) if missing == "mean" else complete
    if not kept.any():
        raise ArtifactError(
            f"no item of {folder} has a vector in each of {', '.join(columns)}",
            "at least one",
            "convert one column at a time",
        )
    manifest = schema.read_manifest(folder)
    dims = {column: schema.dim_of(manifest, column) for column in columns}
    return Selection(folder, tuple(columns), dims, kept, means, gaps, normalize)


def no_vectors(folder: Location, column: str) -> ArtifactError:
    """Return the error of a view without a single vector."""
    views = ", ".join(schema.columns_of(schema.read_manifest(folder)))
    return ArtifactError(f"{folder} has no vector in column {column!r}", f"one of {views}", "choose another --columns")


def refuse(gaps: Sequence[Gap]) -> None:
    """Raise `DataError` naming the first item without a vector."""
    if gaps:
        raise DataError(
            f"{len({gap.item_id for gap in gaps})} items lack a vector, the first is {gaps[0].item_id!r}:"
            f" {gaps[0].column}, {gaps[0].reason}",
            "a vector for every item",
            "repair these items and export again, or choose --missing mean or skip where the format allows it",
        )


def read_reasons(folder: Location) -> dict[str, str]:
    """Return the reason why items of an embeddings folder lack a vector, by id."""
    reasons: dict[str, str] = {}
    for shard in schema.read_manifest(folder)["shards"]:
        table = schema.read_table(
            folder / shard["file"], [schema.ITEM_ID, schema.ERROR], fix=f"run `vlm2rec verify {folder}`"
        )
        table = table.filter(table[schema.ERROR].is_valid())
        reasons.update(zip(table[schema.ITEM_ID].to_pylist(), table[schema.ERROR].to_pylist(), strict=True))
    return reasons


def read_ids(folder: Location, of: str = schema.ITEMS_TABLE) -> list[str]:
    """Return the ids of all items of an embeddings folder, or of all users of one, in its order, without the vectors.

    Raises:
        ArtifactError: no finished folder of items, or of what `of` says; a shard is damaged.
    """
    shards, column = schema.read_manifest(folder, table=of)["shards"], schema.id_column(of)
    fix = f"run `vlm2rec verify {folder}`"
    tables = (schema.read_table(folder / shard["file"], [column], fix=fix) for shard in shards)
    return [name for table in tables for name in table[column].to_pylist()]


def write_npy(selection: Selection, out: Path) -> None:
    """Write one `<view>.npy` for each view, (N, d) float32, and the ids of their rows."""
    _write_matrices(selection, {column: out / f"{column}.npy" for column in selection.columns}, out / IDS_FILE)


def write_cornac(selection: Selection, out: Path) -> None:
    """Write `features.npy` and ids, as `ImageModality(features=..., ids=...)` takes them.

    cornac reorders the rows by its own numbering. An item of cornac's without a row silently gets the row of another
    item. So every item has a row here, and `skip` is not allowed.
    """
    (column,) = selection.columns
    _write_matrices(selection, {column: out / "features.npy"}, out / IDS_FILE)


def write_safetensors(selection: Selection, out: Path) -> None:
    """Write `vectors.safetensors` with one (N, d) float32 tensor for each view, and the ids of their rows."""
    from safetensors.numpy import save_file

    files = {column: out / f".{column}.npy" for column in selection.columns}
    _write_matrices(selection, files, out / IDS_FILE)
    # mapped, not read: the data to write comes from the page cache
    tensors = {column: np.load(file, mmap_mode="r") for column, file in files.items()}
    save_file(tensors, out / "vectors.safetensors", metadata={"item_ids": IDS_FILE})
    for file in files.values():
        file.unlink()


def _write_matrices(selection: Selection, files: dict[str, Path], ids_file: Path) -> None:
    # written in order, not mapped: then a full disk is an error and not a crash
    item_ids: list[str] = []
    with ExitStack() as stack:
        opened = {column: stack.enter_context(file.open("wb")) for column, file in files.items()}
        for column, file in opened.items():
            shape = (len(selection), selection.dims[column])
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for ids, views in selection.batches():
            for column, file in opened.items():
                file.write(np.ascontiguousarray(views[column], "<f4").data)
            item_ids += ids
    ids_file.write_text(json.dumps(item_ids, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def write_recbole(selection: Selection, out: Path, name: str) -> list[Gap]:
    """Write `<name>.itememb` and the lines of a RecBole YAML that load it; return the ids that RecBole cannot hold.

    RecBole reads ids such as "NA" or "null" as missing values and drops them. They are left out and returned.
    """
    (column,) = selection.columns
    unfit = []
    with (out / f"{name}.itememb").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, delimiter="\t", lineterminator="\n")
        rows.writerow(["vector_of:token", "item_vector:float_seq"])
        numbers = " ".join(["%.9g"] * selection.dims[column])  # nine digits restore every float32 exactly
        for ids, views in selection.batches():
            for item_id, vector in zip(ids, views[column].tolist(), strict=True):
                if item_id in _NOT_AVAILABLE:
                    unfit.append(Gap(item_id, column, "RecBole reads this id as a missing value", LEFT_OUT))
                else:
                    rows.writerow([item_id, numbers % tuple(vector)])
    (out / "recbole.yaml").write_text(
        f"# with {name}.itememb beside {name}.inter; `dataset.get_preload_weight('vector_of')` is then the matrix,\n"
        "# row i the vector of RecBole's item i\n"
        "additional_feat_suffix: [itememb]\n"
        "load_col: {inter: [user_id, item_id, timestamp], itememb: [vector_of, item_vector]}\n"
        "alias_of_item_id: [vector_of]\n"
        "preload_weight: {vector_of: item_vector}\n",
        encoding="utf-8",
    )
    return unfit


def write_lance(selection: Selection, out: Path) -> None:
    """Write the Lance dataset `items.lance`; `lancedb.connect(out).open_table("items")` opens it as well."""
    lance = require_lance()
    kinds = {column: pa.list_(pa.float32(), selection.dims[column]) for column in selection.columns}
    columns = pa.schema([(schema.ITEM_ID, pa.string()), *kinds.items()])

    def batches() -> Iterator[pa.RecordBatch]:
        for ids, views in selection.batches():
            arrays = [pa.FixedSizeListArray.from_arrays(views[column].ravel(), type=kinds[column]) for column in views]
            yield pa.RecordBatch.from_arrays([pa.array(ids, pa.string()), *arrays], schema=columns)

    lance.write_dataset(pa.RecordBatchReader.from_batches(columns, batches()), str(out / "items.lance"))


def require_lance() -> Any:
    """Return the module `lance`, or raise `MissingDependencyError`."""
    try:
        import lance
    except ImportError:
        raise MissingDependencyError(
            "the lance format needs pylance, which is not installed", "pylance", "pip install 'vlm2rec[lance]'"
        ) from None
    return lance
