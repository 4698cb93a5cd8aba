"""Rows of an earlier export whose vectors are still right: same item, same title and image, same settings. No torch."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError
from vlm2rec.embedder.contract.storage import Location, readable
from vlm2rec.embedder.export import shards
from vlm2rec.embedder.export.plan import Inputs, Plan, refuse_older_hashes, without_inputs
from vlm2rec.embedder.export.shards import differences
from vlm2rec.embedder.export.verify import file_problems, manifest_problems

_SHARDS_IN_MEMORY = 4  # items mostly come in the order in which they were exported


class EarlierRows:
    """The rows of an earlier embeddings folder: `find` says which are still right, `take` reads them.

    Files are read when they are first needed. Pickling keeps the arguments only: a worker calls `take` with positions
    that the main process found, and needs no more.

    Args:
        folder: an embeddings folder.
        files: the names of its shards.
    """

    def __init__(self, folder: Location, files: Sequence[str]) -> None:
        self.folder, self.files = folder, list(files)
        self._shard = functools.lru_cache(_SHARDS_IN_MEMORY)(self._read_shard)

    def __reduce__(self) -> tuple[type[EarlierRows], tuple[Location, list[str]]]:
        """Pickle the arguments only."""
        return EarlierRows, (self.folder, self.files)

    @classmethod
    def of_export(cls, folder: Location, plan: Plan) -> EarlierRows:
        """Open a finished embeddings folder whose vectors are comparable with those of a plan.

        Raises:
            ArtifactError: it is unfinished, has other settings, its rows do not record what they were made from, or a
                part is not the one that the manifest lists.
        """
        manifest = schema.read_manifest(folder)
        _require_sound(folder, [f"its manifest: {what}" for what in manifest_problems(manifest)])
        refuse_older_hashes(folder, manifest["settings"], plan.settings)
        changed = differences(without_inputs(manifest["settings"]), without_inputs(plan.settings))
        if manifest["settings"].get("images_by", plan.settings.get("images_by")) != plan.settings.get("images_by"):
            changed["images_by"] = f"images_by was {manifest['settings']['images_by']!r}"
        if changed:
            raise ArtifactError(
                f"{folder} was made with other settings: {'; '.join(changed.values())}",
                "the settings of this export, so that its vectors are comparable with the new ones",
                "set these back, or leave --changed-since out and export everything",
            )
        _require_sound(folder, [str(problem) for problem in file_problems(folder, manifest)])
        files = [schema.shard_name(number) for number in range(len(manifest["shards"]))]
        if any(schema.INPUT not in _metadata(folder / name).schema.names for name in files):
            raise ArtifactError(
                f"the rows of {folder} do not record what they were made from",
                f"a column {schema.INPUT!r}",
                "leave --changed-since out and export everything",
            )
        return cls(folder, files)

    def find(self, plan: Plan, rows: Sequence[int]) -> np.ndarray:
        """Return the position in this folder of some items of a plan, (n,) int64.

        The position is -1 for an item that is new, that failed, or whose title or image has changed.
        """
        wanted = pa.array([plan.item_ids[row] for row in rows], pa.string())
        stored = self._keys
        found = pc.fill_null(pc.index_in(wanted, value_set=stored[schema.ITEM_ID]), -1).to_numpy().astype(np.int64)
        known = found >= 0
        inputs = np.array(plan.made_from(rows), object)
        earlier = stored.take(pa.array(found[known]))
        same = earlier[schema.INPUT].to_numpy() == inputs[known]
        has_vector = pc.not_equal(earlier[schema.STATUS], schema.STATUS_FAILED).to_numpy()
        found[known] = np.where(same & has_vector, found[known], -1)
        return found

    def take(self, positions: np.ndarray) -> pa.Table:
        """Return the whole rows at positions that `find` gave, in that order."""
        shards = np.searchsorted(self._starts, positions, side="right") - 1
        numbers = np.unique(shards)
        parts = [self._shard(int(n)).take(positions[shards == n] - self._starts[n]) for n in numbers]
        order = np.concatenate([np.flatnonzero(shards == n) for n in numbers])
        return pa.concat_tables(parts).take(np.argsort(order))

    @functools.cached_property
    def _keys(self) -> pa.Table:
        """Item id, input hash and status of every row."""
        columns = [schema.ITEM_ID, schema.INPUT, schema.STATUS]
        return pa.concat_tables(self._read(name, columns) for name in self.files).combine_chunks()

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """Number of rows before each shard, and in all, (shards + 1,)."""
        return np.cumsum([0, *(_metadata(self.folder / name).num_rows for name in self.files)])

    def _read_shard(self, number: int) -> pa.Table:
        return self._read(self.files[number])

    def _read(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        with readable(self.folder / name) as source:
            return pq.read_table(source, columns=columns, page_checksum_verification=True)


def _require_sound(folder: Location, problems: Sequence[str]) -> None:
    """Raise `ArtifactError` if anything is wrong with a finished folder: no vector of it is taken over."""
    if problems:
        raise ArtifactError(
            f"{folder} does not hold what its manifest lists: {'; '.join(problems[:3])}",
            "the parts of one finished export, unchanged since it was written",
            f"`vlm2rec verify {folder}` lists all; run the command that wrote it again, which writes damaged"
            " parts again, or leave --changed-since out",
        )


def _metadata(path: Location) -> pq.FileMetaData:
    with readable(path) as source:
        return pq.read_metadata(source)


@dataclass(frozen=True)
class Reuse:
    """Which earlier rows are kept if the input has changed; by default, a changed input is refused.

    Args:
        extend: items were appended to those of the folder.
        retry_failed: encode again the items that failed or have changed since.
        changed_since: a finished embeddings folder whose vectors are reused for items that have not changed.
    """

    extend: bool = False
    retry_failed: bool = False
    changed_since: Location | None = None

    def __post_init__(self) -> None:
        """Refuse two sources of the same vectors."""
        if self.changed_since and (self.extend or self.retry_failed):
            raise ConfigError(
                "--changed-since together with --extend or --retry-failed",
                "one of them: --changed-since fills a new folder, the others continue an existing one",
                "leave --changed-since out, or --extend and --retry-failed",
            )

    @property
    def revises(self) -> bool:
        """Whether the folder may have been made from other inputs."""
        return self.extend or self.retry_failed


REUSE_NOTHING = Reuse()


def require_same_start(out: Location, inputs: Inputs, reuse: Reuse) -> None:
    """Raise `ArtifactError` unless the folder's items are the first of the input, changed only as `reuse` allows."""
    known = shards.known_settings(out)
    if known is None:
        return
    count = int(known["items"])
    first = inputs.first(count).settings if count <= len(inputs.item_ids) else None
    if first is None or first["item_ids"] != known["item_ids"]:
        raise ArtifactError(
            f"{out} holds {count} items, which are not the first {count} of the dataset's {len(inputs.item_ids)}",
            "the same items in the same order, and new ones after them",
            "export into a new folder; --changed-since reuses the vectors of unchanged items",
        )
    if len(inputs.item_ids) > count and not reuse.extend:
        raise ArtifactError(
            f"{out} holds {count} items, the dataset {len(inputs.item_ids)}",
            "the same items",
            "add --extend, which encodes the new ones too",
        )
    changed = [key for key in first if key != "items" and first[key] != known.get(key)]
    if changed and not reuse.retry_failed:
        raise ArtifactError(
            f"the {' and '.join(changed)} of items that {out} holds have changed",
            "new items after the ones it holds, and no other change",
            "add --retry-failed, which encodes changed items again",
        )


def open_earlier_rows(out: Location, plan: Plan, found: shards.Found, reuse: Reuse) -> EarlierRows | None:
    """Return the rows that may be reused; None if nothing is reused."""
    if reuse.changed_since is not None:
        return EarlierRows.of_export(reuse.changed_since, plan)
    if reuse.retry_failed and found.earlier:
        return EarlierRows(out, [shard.file for shard in found.earlier.values()])
    return None


def plan_work(
    plan: Plan, numbers: Iterable[int], found: shards.Found, earlier: EarlierRows | None
) -> dict[int, np.ndarray]:
    """Return the shards to make: number → position of each row in the earlier rows, -1 for rows to encode.

    A shard of an earlier plan is not among them if all its rows are still right.
    """
    wanted = [number for number in numbers if number not in found.finished]
    rows = [plan.rows(number) for number in wanted]
    if earlier is None or not wanted:
        reuse_rows = [np.full(len(of_shard), -1) for of_shard in rows]
    else:
        positions = earlier.find(plan, [row for of_shard in rows for row in of_shard])  # one call: each hashes all ids
        reuse_rows = np.split(positions, np.cumsum([len(of_shard) for of_shard in rows])[:-1])
    by_shard = zip(wanted, reuse_rows, strict=True)
    return {number: rows for number, rows in by_shard if number not in found.earlier or (rows < 0).any()}
