"""`vlm2rec verify` and `vlm2rec failures`: check a folder of items, users or recommendations, and list what failed."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlm2rec.downstream.evaluation.geometry import effective_ranks, first_vectors, median_lengths
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset, dataset_of_export
from vlm2rec.embedder.contract.errors import ArtifactError
from vlm2rec.embedder.contract.printable import cell
from vlm2rec.embedder.contract.storage import Location
from vlm2rec.embedder.export.verify import verify
from vlm2rec.pipelines import console
from vlm2rec.pipelines.config import FailuresConfig, VerifyConfig

SHOWN = 5
HIDES = 3.0
"""A view so many times as long as the other makes up at least nine tenths of a raw fused vector's squared length."""


def run(config: VerifyConfig) -> None:
    """Check every file of a folder; vectors that hardly differ from each other only cause a warning.

    Raises:
        ArtifactError: the folder is unfinished, or something in it is wrong.
    """
    folder = config.embeddings
    if isinstance(folder, Path) and not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder", "an embeddings folder", "check the path")
    problems = verify(folder)
    if problems:
        for problem in problems:
            console.log.print(f"{problem}", style="red", markup=False)
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ArtifactError(
            f"{folder} has {len(problems)} problems: {'; '.join(map(str, problems[:SHOWN]))}{more}",
            "the files as export-items wrote them",
            "run the command that wrote it (for example `vlm2rec export-items`) again: it writes damaged shards"
            " again; remove files that do not belong there",
        )
    manifest = schema.read_manifest(folder, table=None)
    table, counts = schema.table_of(manifest), {s: f"{n:,}" for s, n in manifest["counts"].items() if n}
    if table == schema.RECOMMENDATIONS_TABLE:
        users = f"{manifest['num_users']:,} {in_shards(manifest)}"
        console.summary(f"{folder}: no problem", {"users": users, **counts, "k": manifest["k"]})
        return
    vectors = first_vectors(folder)
    ranks = effective_ranks(vectors)
    console.summary(
        f"{folder}: no problem",
        {
            table: f"{manifest['num_items']:,}{of_catalogue(manifest)} {in_shards(manifest)}",
            **counts,
            "vectors": f"{', '.join(manifest['views'])}: {manifest['dtype']}[{manifest['dim']}]",
            **{f"effective rank, {view}": f"{rank:.1f}" for view, rank in ranks.items()},
        },
    )
    warn_of_collapse(ranks)
    warn_of_lengths(manifest, vectors)


def of_catalogue(manifest: Mapping[str, Any]) -> str:
    """Return of how many items an export holds some, if it does not hold all."""
    return f" of the catalogue's {manifest[schema.CATALOGUE]:,}" if schema.CATALOGUE in manifest else ""


def in_shards(manifest: Mapping[str, Any]) -> str:
    """Return in how many files a table lies: `in 1 shard`, `in 3 shards`."""
    count = len(manifest["shards"])
    return f"in {count:,} shard{'s' * (count != 1)}"


def warn_of_collapse(ranks: Mapping[str, float]) -> None:
    """Warn about the views whose effective rank says that their vectors hardly differ."""
    for view, rank in ranks.items():
        if rank < 2:
            console.log.print(
                f"warning: the {view} vectors hardly differ from item to item (effective rank {rank:.1f}):"
                " the model may have collapsed",
                style="yellow",
                markup=False,
            )


def warn_of_lengths(manifest: Mapping[str, Any], vectors: Mapping[str, np.ndarray]) -> None:
    """Warn if the text or image vectors are so long that the fused ones, made of both as they are, hide the other."""
    settings = manifest["settings"]
    raw = settings.get("fusion_norm") == "raw" and settings.get("fusion") != "internal"
    if not (raw or str(settings.get("fused")).endswith(", raw")):
        return
    lengths = median_lengths(vectors)
    if not (lengths.get(schema.TEXT) and lengths.get(schema.IMAGE)):
        return
    short, long = sorted((schema.TEXT, schema.IMAGE), key=lengths.__getitem__)
    of_adapter = (manifest.get(schema.MADE_WITH) or {}).get("adapter") or {}
    # our adapters say how they fuse, and an export that asks for another way is refused
    trained = bool(settings.get("adapter")) and of_adapter.get("canary") is not False
    if (times := lengths[long] / lengths[short]) >= HIDES:
        console.log.print(
            f"warning: the {long} vectors are {times:.3g} times as long as the {short} vectors (median), so fused is"
            f" nearly the {long} alone; {'finetune ' if trained else ''}--fusion-norm normalised weighs both alike",
            style="yellow",
            markup=False,
        )


_ABOUT = (schema.STATUS, schema.ERROR)
COLUMNS = (schema.ITEM_ID, *_ABOUT, schema.TITLE, schema.IMAGE_PATH)
_WITH_REASON = (schema.STATUS_FAILED, schema.STATUS_TEXT_ONLY)


def failures(config: FailuresConfig) -> None:
    """Print the failed items as CSV on stdout, with title and image to repair, and the reasons on stderr.

    Of users and recommendations, it prints the users that have none.

    Raises:
        ArtifactError: the folder is unfinished, or a shard is missing.
    """
    manifest = schema.read_manifest(config.embeddings, table=None)
    of_items = schema.table_of(manifest) == schema.ITEMS_TABLE
    inputs = _inputs(config, manifest) if of_items else {}
    writer = csv.writer(sys.stdout)
    writer.writerow(COLUMNS if of_items else (schema.USER_ID, *_ABOUT))
    reasons: Counter[str] = Counter()
    for row_id, status, error in _failures(config.embeddings, manifest):
        more = inputs.get(row_id, ("", "")) if of_items else ()
        writer.writerow(map(cell, (row_id, status, error, *more)))
        reasons[(error or "").partition(":")[0]] += 1
    sys.stdout.flush()
    things = "items" if of_items else "users"
    if not reasons:
        console.log.print(f"{config.embeddings}: no {things[:-1]} failed")
        return
    console.summary(
        f"{reasons.total():,} of {sum(shard['rows'] for shard in manifest['shards']):,} {things}",
        {f"{count:,}": reason for reason, count in reasons.most_common(20)},
    )
    if of_items:
        console.log.print(
            "repair these images or titles in place, then run the command that wrote the folder again with"
            " --retry-failed"
        )


def _failures(folder: Location, manifest: Mapping[str, Any]) -> Iterator[tuple[str, str, str | None]]:
    kind = schema.table_of(manifest)
    id_column, ranked = schema.id_column(kind), kind == schema.RECOMMENDATIONS_TABLE
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        if not path.is_file():
            raise ArtifactError(f"{path} is missing", "the shards that the manifest names", "run `vlm2rec verify`")
        if shard.get("counts") and not any(shard["counts"].get(status) for status in _WITH_REASON):
            continue
        names = [id_column, schema.ERROR] if ranked else [id_column, *_ABOUT]
        table = schema.read_table(path, names, fix=f"run `vlm2rec verify {folder}`")
        if ranked:
            table = table.filter(table[schema.ERROR].is_valid())
            table = table.add_column(1, schema.STATUS, pa.array([schema.STATUS_FAILED] * len(table), pa.string()))
        table = table.filter(pc.is_in(table[schema.STATUS], value_set=pc.cast(list(_WITH_REASON), "string")))
        yield from zip(*(table[name].to_pylist() for name in table.column_names), strict=True)


def _inputs(config: FailuresConfig, manifest: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return title and image file of each item, from the dataset that is given or, if it is there, the export's."""
    if config.data is not None:
        dataset, reason = Dataset(config.data), ""
    else:
        named, reason = dataset_of_export(config.embeddings, manifest)
        if named is None:
            console.log.print(f"titles and images are left out: {reason}; give --data", style="yellow")
            return {}
        dataset = named
    root = dataset.image_root if dataset.has_images else None
    images = ("" if root is None or not path else str(root / path) for path in dataset.image_paths)
    return dict(zip(dataset.item_ids, zip(dataset.titles, images, strict=True), strict=True))
