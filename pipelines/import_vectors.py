"""`vlm2rec import-vectors`: turns existing vectors into an embeddings folder, as complete as an export.

Every item of the dataset gets a row, with its vectors or the reason why it has none.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import torch

from vlm2rec.downstream.evaluation.geometry import first_vectors
from vlm2rec.downstream.principal_components import principal_components
from vlm2rec.embedder.backbones.pooling import concatenate, fuse
from vlm2rec.embedder.contract import schema, storage
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ConfigError, DataError
from vlm2rec.embedder.contract.storage import Location
from vlm2rec.embedder.export import shard_file, shards
from vlm2rec.embedder.export.lock import writing
from vlm2rec.embedder.export.plan import Plan, fingerprint, plan_shards
from vlm2rec.embedder.options import FusionNorm
from vlm2rec.pipelines import console
from vlm2rec.pipelines.catalogue.ids import ROW, examples, explain
from vlm2rec.pipelines.catalogue.vector_files import (
    VectorFile,
    read_csv,
    read_ids,
    read_itememb,
    read_jsonl,
    read_npy,
    read_parquet,
    require_finite,
)
from vlm2rec.pipelines.config import ImportVectorsConfig
from vlm2rec.pipelines.export_items import check_failures, print_summary
from vlm2rec.pipelines.verify import warn_of_lengths

SOURCE = "vectors"  # the manifest's settings.source

READERS = {
    ".parquet": ("Parquet", read_parquet),
    **dict.fromkeys((".csv", ".csv.gz"), ("CSV", read_csv)),
    **dict.fromkeys((".tsv", ".tsv.gz"), ("TSV", read_csv)),
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz"), ("JSON lines", read_jsonl)),
    ".itememb": ("RecBole", read_itememb),
}
"""The kinds of files that hold ids and vectors: name and reader of each."""

Views = dict[str, np.ndarray]  # view → (I, d) float32, d of its own, rows of NaN where an item has none


@dataclass(frozen=True)
class Outcomes:
    """The status of each item."""

    status: list[str]
    error: list[str | None]

    @property
    def usable(self) -> np.ndarray:
        """(I,) bool: the item has vectors."""
        return np.array([status != schema.STATUS_FAILED for status in self.status], bool)


def run(config: ImportVectorsConfig) -> dict[str, Any]:
    """Write the embeddings folder and return its manifest.

    Raises:
        ConfigError: settings that contradict each other, or more principal components than there are.
        DataError: a file cannot be read, an id occurs twice, a vector holds NaN, vectors of a column differ in length,
            or no id is in the dataset.
        ArtifactError: the output folder belongs to another import, is in use or not writable, or the disk is full.
        FailureLimitError: the folder is complete, but more items than `max_failures` allows have no vector.
    """
    start = time.perf_counter()
    dataset = Dataset(config.data)
    source = _read(config, dataset)
    rows = _rows_of(dataset.item_ids, source, config.file)
    require_finite(source, rows[rows >= 0], config.file)
    found = {view: _take(vectors, source.present[view], rows) for view, vectors in source.views.items()}
    views, made_of = with_fused(found, config.fusion_norm)
    outcomes = judge(views, rows >= 0)
    settings: dict[str, Any] = {
        "source": SOURCE,
        "file": config.file.name,
        "file_sha256": storage.sha256_file(config.file),
        "ids_sha256": storage.sha256_file(config.ids) if config.ids else None,
        "columns": source.columns,
        "fused": made_of,
        "extra_ids": len(source.item_ids) - int((rows >= 0).sum()),
        "pca": None,
    }
    dims = {view: int(vectors.shape[1]) for view, vectors in views.items()}
    if len(set(dims.values())) > 1:
        _refuse_pca(config, dims)
        settings["dims"] = dims
    if config.pca is not None:
        views, settings["pca"] = reduce_views(views, outcomes.usable, config.pca)
    _require_fit(views, config.storage)
    settings |= {
        "dim": int(views[schema.FUSED].shape[1]),
        "views": [view for view in schema.VIEWS if view in views],
        "storage": config.storage,
        "items": len(dataset.item_ids),
        "item_ids": fingerprint({"item_ids": dataset.item_ids}),
    }
    plan = plan_shards(dataset.item_ids, config.shard_size, settings)
    manifest = write_vectors(config.out, plan, views, outcomes, dataset, time.perf_counter() - start)
    if source.left_out:
        names = ", ".join(map(repr, source.left_out))
        console.log.print(f"{config.file.name}: {names} numbers the rows, so it is not a dimension", markup=False)
    _say_of_extra_ids(config, dataset, source, rows)
    _report(config, manifest, views)
    repair = "give --file a vector of each and import into a new --out"
    check_failures(manifest, config.out, config.max_failures, repair)
    return manifest


def _read(config: ImportVectorsConfig, dataset: Dataset) -> VectorFile:
    suffix = "".join(config.file.suffixes[-2:]) if config.file.suffix == ".gz" else config.file.suffix
    if suffix in READERS:
        if config.ids or config.in_item_order:
            raise ConfigError(
                f"{'--ids' if config.ids else '--in-item-order'} with a {READERS[suffix][0]} file",
                "ids in the file itself, next to their vectors",
                "leave it out, and name the id column with --item-id-column",
            )
        return READERS[suffix][1](config.file, config.item_id_column, config.column, config.view)
    if suffix != ".npy":
        raise ConfigError(
            f"--file {config.file} ends in {suffix!r}",
            ".parquet, .csv, .tsv, .jsonl, .itememb or .npy; pickles are never opened",
            "save the vectors as one of these",
        )
    if config.column:
        raise ConfigError("--column with an .npy", "--view, as an .npy has no columns", "leave --column out")
    if bool(config.ids) == config.in_item_order:
        raise ConfigError(
            "both --ids and --in-item-order" if config.ids else "an .npy without ids",
            "--ids FILE, or --in-item-order if row i is item i of items.parquet",
            "give --ids or --in-item-order",
        )
    if config.ids is None:
        where = f"{config.data / schema.ITEMS_FILE}"
        return read_npy(config.file, dataset.item_ids, config.view, where)
    return read_npy(config.file, read_ids(config.ids, config.item_id_column), config.view, str(config.ids))


def _rows_of(item_ids: Sequence[str], source: VectorFile, file: Path) -> np.ndarray:
    """Return each item's row in the source, (I,) int64; -1 if it has none."""
    ours, given = pa.array(item_ids, pa.string()), pa.array(source.item_ids, pa.string())

    def matched(ours: pa.Array, given: pa.Array) -> np.ndarray:
        return pc.fill_null(pc.index_in(ours, value_set=given), -1).to_numpy(zero_copy_only=False).astype(np.int64)

    rows = matched(ours, given)
    if (rows < 0).any():  # white space at the ends of an id does not count
        trimmed = matched(pc.utf8_trim_whitespace(ours), pc.utf8_trim_whitespace(given))
        free = (rows < 0) & ~np.isin(trimmed, rows)
        rows[free] = trimmed[free]
    if (rows < 0).all():
        examples = ", ".join(map(repr, source.item_ids[:3])) or "none at all"
        raise DataError(
            f"none of the {len(source.item_ids)} ids of {file} is an item; they begin with {examples}",
            f"ids such as {', '.join(map(repr, item_ids[:3]))}",
            "use the catalogue's item ids in the file",
        )
    return rows


def _take(vectors: np.ndarray, present: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.where(((rows >= 0) & present[rows])[:, None], vectors[rows], np.float32(np.nan))


def _refuse_pca(config: ImportVectorsConfig, dims: Mapping[str, int]) -> None:
    """Raise if `--pca` is asked for: it projects every view on directions of the fused vectors, of their length."""
    if config.pca is not None:
        raise ConfigError(
            f"--pca with vectors of different lengths: {', '.join(f'{view} {dim}' for view, dim in dims.items())}",
            "one length for all views, whose principal components are those of the fused vectors",
            "leave it out (`train-recommender --pca` reduces the column it reads), or import one view with --column",
        )


def _require_fit(views: Views, storage: str) -> None:
    limit = float(np.finfo(storage).max)
    for view, vectors in views.items():
        if (np.abs(vectors) > limit).any():
            raise ConfigError(
                f"{view} vectors hold values too large for --storage {storage}",
                f"at most {limit:g}",
                "use --storage float32, or scale the vectors",
            )


def with_fused(found: Mapping[str, np.ndarray], norm: FusionNorm) -> tuple[Views, str]:
    """Return the views with `fused` among them, and how it was made.

    Without a fused column, `fused` is text + image, or the only view, as in an export of one modality. An item
    without an image gets its text vector as fused vector. Vectors of different lengths are put end to end, as a text
    and an image encoder's are; then an item needs both.
    """
    if schema.FUSED in found:
        return dict(found), "as given"
    if len(found) == 1:
        (view,) = found
        return {schema.FUSED: found[view], view: found[view]}, view
    text, image = found[schema.TEXT], found[schema.IMAGE]
    if text.shape[1] != image.shape[1]:
        fused = concatenate(torch.from_numpy(text), torch.from_numpy(image), norm).numpy()
        return {schema.FUSED: fused, schema.TEXT: text, schema.IMAGE: image}, f"text ‖ image, {norm}"
    fused = fuse(torch.from_numpy(text), torch.from_numpy(image), norm).numpy()
    without_image = np.isnan(image).all(1)
    fused[without_image] = text[without_image]
    return {schema.FUSED: fused, schema.TEXT: text, schema.IMAGE: image}, f"text + image, {norm}"


def judge(views: Views, known: np.ndarray) -> Outcomes:
    """Return each item's status. An item that lacks more than its image vector fails and loses its other vectors.

    Args:
        views: changed in place: rows of failures become NaN.
        known: (I,) whether the source has a row for the item.
    """
    absent = {view: np.asarray(np.isnan(vectors).all(1)) for view, vectors in views.items()}
    needed = [view for view in views if view != schema.IMAGE or schema.TEXT not in views]
    failed = np.logical_or.reduce([absent[view] for view in needed])
    text_only = absent[schema.IMAGE] & ~failed if schema.IMAGE in views else np.zeros(len(known), bool)
    for vectors in views.values():
        vectors[failed] = np.nan
    status: list[str] = []
    error: list[str | None] = []
    for row in range(len(known)):
        lacking = [view for view in views if absent[view][row]]
        if failed[row]:
            status.append(schema.STATUS_FAILED)
            error.append(f"no {', '.join(lacking)} vector in the file" if known[row] else "the file lacks this id")
        else:
            status.append(schema.STATUS_TEXT_ONLY if text_only[row] else schema.STATUS_OK)
            error.append("no image vector in the file" if text_only[row] else None)
    return Outcomes(status, error)


def reduce_views(views: Views, usable: np.ndarray, count: int) -> tuple[Views, dict[str, Any]]:
    """Project every view on the first `count` principal components of the fused vectors.

    One set of directions for all views keeps them comparable (t2f, v2f) and keeps fused = text + image; each view is
    centred on its own mean.

    Returns:
        The views, (I, count), and the manifest's entry: the length before, and the share of variance kept in each view.
    """
    components = principal_components(views[schema.FUSED][usable], count)
    reduced, explained = {}, {}
    for view, vectors in views.items():
        present = ~np.isnan(vectors).any(1)
        reduced[view] = np.full((len(vectors), count), np.nan, np.float32)
        reduced[view][present], kept = components.project(vectors[present])
        explained[view] = round(kept, 4)
    dim = int(views[schema.FUSED].shape[1])
    return reduced, {"components": count, "from_dim": dim, "explained": explained}


def write_vectors(
    out: Location, plan: Plan, views: Views, outcomes: Outcomes, dataset: Dataset, seconds: float
) -> dict[str, Any]:
    """Write the embeddings folder of a plan from vectors in memory, which took `seconds`; return its manifest."""
    with writing(out) as hold:
        finished = shards.begin(out, plan).finished
        unfinished = [number for number in range(len(plan)) if number not in finished]
        shards.require_space(out, plan, sum(len(plan.rows(number)) for number in unfinished))
        for number in unfinished:
            part = slice(plan.rows(number).start, plan.rows(number).stop)
            table = shard_file.shard_table(
                plan,
                plan.rows(number),
                {view: vectors[part] for view, vectors in views.items()},
                outcomes.status[part],
                outcomes.error[part],
            )
            finished[number] = shards.publish_shard(out, plan, number, table, seconds / len(unfinished))
        hold.require()
        manifest = shards.finish(out, plan, finished, dataset.path)
    assert manifest is not None  # nobody else makes shards
    return manifest


def _say_of_extra_ids(config: ImportVectorsConfig, dataset: Dataset, source: VectorFile, rows: np.ndarray) -> None:
    """Name up to three ids of the file that the dataset lacks, and three that are only spelled otherwise there."""
    extra = np.setdiff1d(np.arange(len(source.item_ids)), rows)
    if not len(extra):
        return
    unknown = pl.DataFrame({schema.ITEM_ID: [source.item_ids[row] for row in extra], ROW: extra})
    alike = explain(unknown, pl.Series(dataset.item_ids, dtype=pl.String)).filter(pl.col("near").is_not_null())
    told = [
        f"the dataset has {near!r} for {given!r} ({why})"
        for near, given, why in alike.select("near", schema.ITEM_ID, "why").head(3).iter_rows()
    ]
    console.TERMINAL.say(
        f"{len(extra):,} ids of {config.file} are not in the dataset and were left out, such as"
        f" {examples(unknown.select(ROW, schema.ITEM_ID).head(3).rows())}"
        + (f". Of these, {alike.height:,} may be known items in another spelling: {'; '.join(told)}" if told else ""),
        warning=bool(told),
    )


def _report(config: ImportVectorsConfig, manifest: Mapping[str, Any], views: Views) -> None:
    print_summary(manifest, config.out)
    settings = manifest["settings"]
    if settings["pca"]:
        kept = ", ".join(f"{view} {share:.1%}" for view, share in settings["pca"]["explained"].items())
        console.log.print(
            f"{settings['pca']['components']} of {settings['pca']['from_dim']} dimensions keep this share of the"
            f" variance: {kept}"
        )
    warn_of_lengths(manifest, first_vectors(config.out))
    for view, vectors in views.items():
        if empty := int((vectors == 0).all(1).sum()):
            console.log.print(
                f"warning: {empty:,} {view} vectors are zero; if zero means a missing vector, leave these items out or"
                " set them to null",
                style="yellow",
                markup=False,
            )
