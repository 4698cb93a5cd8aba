"""Short vectors from a finished export: the same items, as `export-items --dim` and `--precision` would store them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ArtifactError
from vlm2rec.embedder.contract.storage import Location, location, readable
from vlm2rec.embedder.export import shard_file, shards
from vlm2rec.embedder.export.lock import writing
from vlm2rec.embedder.export.plan import Inputs, Plan, plan_shards, row_counts
from vlm2rec.embedder.export.short import full_settings, is_short, measure, short_settings, shorten_views
from vlm2rec.embedder.export.verify import file_problems
from vlm2rec.embedder.options import Storage
from vlm2rec.embedder.progress import SILENT, Reporter

FROM = "shortened_from"  # in a manifest's settings: number format of the full vectors, if it was not float32


@dataclass(frozen=True)
class _Recorded(Inputs):
    """What the rows of an export say they were made from."""

    hashes: tuple[str | None, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """Nothing: the settings of the export describe its items already."""
        return {}

    def of(self, row: int) -> str:
        """Return the hash that an item's row records; None for vectors from elsewhere."""
        return self.hashes[row]  # type: ignore[return-value]


def shorten(
    full: Location, out: Location, *, dim: int | None = None, storage: Storage = "float32", reporter: Reporter = SILENT
) -> dict[str, Any]:
    """Write the vectors of a finished export in short, part by part, and return the new manifest.

    A call after a kill goes on with the parts that are missing. From float32 vectors, folder and fingerprint are those
    of `export-items` with the same settings, which can go on with it.

    Args:
        full: a finished embeddings folder.
        out: the embeddings folder to write.
        dim: keep the first `dim` numbers of each vector, one long; None keeps vectors as long as they are.
        storage: number format on disk.
        reporter: receives progress.

    Raises:
        ArtifactError: `full` is unfinished, damaged, or short itself; `out` belongs to another export.
        ConfigError: `dim` does not fit the vectors.
    """
    manifest = schema.read_manifest(full)
    earlier = full_settings(manifest["settings"]) | {name: manifest[name] for name in ("dim", "views")}
    if is_short({**manifest["settings"], "storage": manifest["dtype"]}):
        raise ArtifactError(
            f"{full} already holds shortened vectors ({manifest['dtype']}[{manifest['dim']}])",
            "the full vectors, in float32 or float16",
            "export again without --dim and without --precision int8 or binary, or shorten the folder that this"
            " one was made from",
        )
    if problems := file_problems(full, manifest):
        raise ArtifactError(
            f"{full} does not hold what its manifest lists: {'; '.join(map(str, problems[:3]))}",
            "the parts of one finished export, unchanged since it was written",
            f"`vlm2rec verify {full}` lists all; run the command that wrote it again",
        )
    origin = {} if manifest["dtype"] == "float32" else {FROM: manifest["dtype"]}
    earlier.pop("schema_version", None)  # the plan has its own
    settings = {
        **earlier,
        **origin,
        "storage": storage,
        **short_settings(manifest, dim),
    }
    plan = _plan(full, manifest, settings)
    data = manifest.get("data")
    with writing(out):
        finished = shards.begin(out, plan).finished
        missing = [number for number in range(len(plan)) if number not in finished]
        if missing:
            shards.require_space(out, plan, sum(len(plan.rows(number)) for number in missing))
        with reporter.progress("shortening vectors", sum(len(plan.rows(number)) for number in missing)) as advance:
            for number in missing:
                finished[number] = _write(full, manifest, out, plan, number)
                advance(len(plan.rows(number)))
        found = shards.finish(out, plan, finished, location(data) if isinstance(data, str) else None)
    assert found is not None
    return found


def _plan(full: Location, manifest: dict[str, Any], settings: dict[str, Any]) -> Plan:
    ids: list[str] = []
    hashes: list[str | None] = []
    for shard in manifest["shards"]:
        table = schema.read_table(
            full / shard["file"], [schema.ITEM_ID, schema.INPUT], fix=f"`vlm2rec verify {full}` tells what is damaged"
        )
        ids += table[schema.ITEM_ID].to_pylist()
        hashes += table[schema.INPUT].to_pylist()
    rows = row_counts(manifest)
    size = manifest.get("shard_size") or max(rows, default=1)
    inputs = _Recorded(ids, None, None, None, "mtime", hashes=tuple(hashes))
    about = {schema.MADE_WITH: manifest.get(schema.MADE_WITH) or {}}
    plan = plan_shards(ids, size, settings | about, inputs, rows)
    return replace(plan, encoder=manifest.get(schema.ENCODER) or {}, catalogue=manifest.get(schema.CATALOGUE))


def _write(full: Location, manifest: dict[str, Any], out: Location, plan: Plan, number: int) -> shards.Shard:
    with readable(full / schema.shard_name(number)) as source:
        table = pq.read_table(source, page_checksum_verification=True).combine_chunks()
    dims = schema.dims_of(manifest)
    (batch,) = table.to_batches() or [pa.RecordBatch.from_pylist([], schema=table.schema)]
    vectors = {
        view: schema.vectors_of(batch, view, dims[view], manifest["dtype"])[0] for view in plan.settings["views"]
    }
    short = shard_file.shard_table(
        plan,
        plan.rows(number),
        shorten_views(vectors, plan.settings),
        table[schema.STATUS].to_pylist(),
        table[schema.ERROR].to_pylist(),
    )
    kept = measure(vectors, plan.settings) if is_short(plan.settings) else None
    return shards.publish_shard(out, plan, number, short, 0.0, kept)
