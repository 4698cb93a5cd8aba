"""`vlm2rec failures`: which items of an embeddings folder have no vector, or no image vector, and why."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlm2rec.embedder import schema
from vlm2rec.embedder.dataset import Dataset
from vlm2rec.embedder.errors import ArtifactError, Vlm2RecError
from vlm2rec.embedder.storage import Location, readable
from vlm2rec.pipelines import console
from vlm2rec.pipelines.config import FailuresConfig

COLUMNS = (schema.ITEM_ID, schema.STATUS, schema.ERROR, schema.TITLE, schema.IMAGE_PATH)
_WITH_REASON = (schema.STATUS_FAILED, schema.STATUS_TEXT_ONLY)


def run(config: FailuresConfig) -> None:
    """Print the items that failed as CSV on stdout, with what is needed to mend them, and the reasons on stderr.

    Raises:
        ArtifactError: the folder is unfinished, or a shard is missing.
    """
    manifest = schema.read_manifest(config.embeddings)
    inputs = _inputs(manifest)
    writer = csv.writer(sys.stdout)
    writer.writerow(COLUMNS)
    reasons: Counter[str] = Counter()
    for item_id, status, error in _failures(config.embeddings, manifest):
        writer.writerow((item_id, status, error, *inputs.get(item_id, ("", ""))))
        reasons[(error or "").partition(":")[0]] += 1
    sys.stdout.flush()
    if not reasons:
        console.log.print(f"{config.embeddings}: no item failed")
        return
    console.summary(
        f"{reasons.total():,} of {manifest['num_items']:,} items",
        {f"{count:,}": reason for reason, count in reasons.most_common(20)},
    )
    console.log.print(
        "mend these images or titles where they lie, then run the command that wrote the folder again with"
        " --retry-failed"
    )


def _failures(folder: Location, manifest: Mapping[str, Any]) -> Iterator[tuple[str, str, str | None]]:
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        if not path.is_file():
            raise ArtifactError(f"{path} is missing", "the shards that the manifest names", "run `vlm2rec verify`")
        if shard.get("counts") and not any(shard["counts"].get(status) for status in _WITH_REASON):
            continue
        with readable(path) as source:
            table = pq.read_table(source, columns=[schema.ITEM_ID, schema.STATUS, schema.ERROR])
        table = table.filter(pc.is_in(table[schema.STATUS], value_set=pc.cast(list(_WITH_REASON), "string")))
        yield from zip(*(table[name].to_pylist() for name in table.column_names), strict=True)


def _inputs(manifest: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return title and image file of each item, if the dataset is still where it was."""
    try:
        dataset = Dataset(manifest["data"]) if manifest.get("data") else None
    except Vlm2RecError:
        dataset = None
    if dataset is None:
        console.log.print(
            "titles and images are left out: the dataset is not where it was exported from", style="yellow"
        )
        return {}
    images = (str(dataset.image_root / path) for path in dataset.image_paths)
    return dict(zip(dataset.item_ids, zip(dataset.titles, images, strict=True), strict=True))
