"""Rows of an earlier export whose vectors are still right: same item, same title and image, same settings. No torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlm2rec.embedder import schema
from vlm2rec.embedder.errors import ArtifactError
from vlm2rec.embedder.export_plan import Plan, without_inputs
from vlm2rec.embedder.shards import differences
from vlm2rec.embedder.storage import Location, readable

_SHARDS_IN_MEMORY = 4  # items mostly come in the order in which they were exported


class EarlierRows:
    """Which items an embeddings folder has vectors of, what they were made from, and the rows themselves.

    Nothing is read before it is asked for; a pickled one is its arguments, as workers only `take` what was found.

    Args:
        folder: an embeddings folder.
        files: its shards.
    """

    def __init__(self, folder: Location, files: Sequence[str]) -> None:
        self.folder, self.files = folder, list(files)
        self._shard = functools.lru_cache(_SHARDS_IN_MEMORY)(self._read_shard)

    def __reduce__(self) -> tuple[type[EarlierRows], tuple[Location, list[str]]]:
        """Pickle the arguments."""
        return EarlierRows, (self.folder, self.files)

    @classmethod
    def of_export(cls, folder: Location, plan: Plan) -> EarlierRows:
        """Open a finished embeddings folder whose vectors are comparable with those of a plan.

        Raises:
            ArtifactError: unfinished, made with other settings, or its rows do not say what they were made from.
        """
        manifest = schema.read_manifest(folder)
        changed = differences(without_inputs(manifest["settings"]), without_inputs(plan.settings))
        if manifest["settings"].get("images_by", plan.settings.get("images_by")) != plan.settings.get("images_by"):
            changed["images_by"] = f"images_by was {manifest['settings']['images_by']!r}"
        if changed:
            raise ArtifactError(
                f"{folder} was made with other settings: {'; '.join(changed.values())}",
                "the settings of this export, so that its vectors are comparable with the new ones",
                "export everything, without --changed-since, or set these back",
            )
        files = [shard["file"] for shard in manifest["shards"]]
        if any(schema.INPUT not in _metadata(folder / name).schema.names for name in files):
            raise ArtifactError(
                f"the rows of {folder} do not say what they were made from",
                f"a column {schema.INPUT!r}",
                "export everything, without --changed-since",
            )
        return cls(folder, files)

    def find(self, plan: Plan, rows: Sequence[int]) -> np.ndarray:
        """Return where each of some items of a plan lies here, (n,) int64.

        That is -1 for an item that is new, that failed, or whose title or image has changed.
        """
        wanted = pa.array([plan.item_ids[row] for row in rows], pa.string())
        held = self._what_is_held
        found = pc.fill_null(pc.index_in(wanted, value_set=held[schema.ITEM_ID]), -1).to_numpy().astype(np.int64)
        known = found >= 0
        inputs = np.array(plan.made_from(rows), object)
        its = held.take(pa.array(found[known]))
        same = its[schema.INPUT].to_numpy() == inputs[known]
        has_vector = pc.not_equal(its[schema.STATUS], schema.STATUS_FAILED).to_numpy()
        found[known] = np.where(same & has_vector, found[known], -1)
        return found

    def take(self, positions: np.ndarray) -> pa.Table:
        """Return whole rows by what `find` said of them, in that order."""
        shards = np.searchsorted(self._starts, positions, side="right") - 1
        numbers = np.unique(shards)
        parts = [self._shard(int(n)).take(positions[shards == n] - self._starts[n]) for n in numbers]
        place = np.concatenate([np.flatnonzero(shards == n) for n in numbers])
        return pa.concat_tables(parts).take(np.argsort(place))

    @functools.cached_property
    def _what_is_held(self) -> pa.Table:
        columns = [schema.ITEM_ID, schema.INPUT, schema.STATUS]
        return pa.concat_tables(self._read(name, columns) for name in self.files).combine_chunks()

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """Number of rows before each shard, and of all, (shards + 1,)."""
        return np.cumsum([0, *(_metadata(self.folder / name).num_rows for name in self.files)])

    def _read_shard(self, number: int) -> pa.Table:
        return self._read(self.files[number])

    def _read(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        with readable(self.folder / name) as source:
            return pq.read_table(source, columns=columns, page_checksum_verification=True)


def _metadata(path: Location) -> pq.FileMetaData:
    with readable(path) as source:
        return pq.read_metadata(source)
