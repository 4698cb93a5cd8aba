"""Hard negatives of `vlm2rec finetune`: from a file, or mined from the vectors of an earlier export.

A file names the negatives of target items or of users, as a long table or as lists:

    item_id  negative_id          user_id  negatives
    42       7                    alice    ["7", "9"]
    42       9                    bob      []

Mining looks at the items nearest to the target's fused vector, best first, and leaves out what may be a positive that
nobody has clicked yet. With q, the mean of the vectors of the user's history, and t, the target, item c is left out if

    cos(q, c) > cos(q, t) - (1 - margin)·|cos(q, t)|

which is margin·cos(q, t) where the target's cosine is positive, as it nearly always is (NV-Retriever's share of the
positive's score). Both ways leave out the training items of the user; what is held out for validation and test is not
looked at, as this would tell the training about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm2rec.downstream.serving.top_items import ExactSearch, top_items, with_direction
from vlm2rec.downstream.table import read_items
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.checksums import checksums
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import DataError
from vlm2rec.embedder.contract.storage import Location
from vlm2rec.embedder.training.samples import Samples
from vlm2rec.pipelines.catalogue.histories import columns_in, read_histories
from vlm2rec.pipelines.catalogue.parts import parts_of
from vlm2rec.pipelines.config import FinetuneConfig, HistoryColumns
from vlm2rec.pipelines.console import TERMINAL

NEGATIVE_ID = "negative_id"  # column of a long table
NEAREST = 100  # items nearest to a target, among which its hard negatives are looked for
_TARGETS_AT_A_TIME = 256
_LOOKED_AT = 500  # samples, for the word about how many have hard negatives
_NAMED = 3
_NOTHING = np.empty(0, np.int32)


@dataclass(frozen=True)
class GivenNegatives:
    """Those of a file. `by` says whether `rows_of` is by the target's row or by the user's."""

    most: int
    by: str  # item_id or user_id
    rows_of: Mapping[int, np.ndarray]

    def of(self, user: int, history: np.ndarray, target: int, own: np.ndarray) -> np.ndarray:
        """See `HardSource`; in no order."""
        found = self.rows_of.get(target if self.by == schema.ITEM_ID else user, _NOTHING)
        return found[~np.isin(found, [*own.tolist(), target])]


@dataclass(frozen=True)
class MinedNegatives:
    """Those mined from vectors, nearest to the target first."""

    most: int
    margin: float
    units: np.ndarray  # (N, d) float32 fused vectors at length 1; zeros where an item has none
    lengths: np.ndarray  # (N,) float32, what they were long; 0 where an item has none
    place_of: np.ndarray  # (N,) int32, where an item stands in `near`; -1 for one that is no target
    near: np.ndarray  # (targets, NEAREST) int32, -1 where there are fewer

    def of(self, user: int, history: np.ndarray, target: int, own: np.ndarray) -> np.ndarray:
        """See `HardSource`; in order."""
        known = history[self.lengths[history] > 0]
        place = self.place_of[target]
        if place < 0 or not len(known):
            return _NOTHING
        query = (self.units[known] * self.lengths[known, None]).mean(axis=0)
        if not (length := float(np.linalg.norm(query))):
            return _NOTHING
        query /= length
        positive = float(query @ self.units[target])
        highest = positive - (1 - self.margin) * abs(positive)
        near = self.near[place]
        near = near[(near >= 0) & ~np.isin(near, own)]
        return near[self.units[near] @ query <= highest][: self.most]


def add_hard_negatives(config: FinetuneConfig, dataset: Dataset, samples: object) -> None:
    """Give the samples of a run its hard negatives, if it has any, and say how many there are.

    Raises:
        DataError: the file cannot be read, or no user or item of it is of the dataset.
        ArtifactError: no finished export, or none of these items.
    """
    if config.negatives_file is None and config.mine_from is None:
        return
    assert isinstance(samples, Samples)  # other methods refuse the settings
    if config.negatives_file is not None:
        samples.hard = _read(config.negatives_file, dataset, config.hard_negatives)
        where = str(config.negatives_file)
    else:
        assert config.mine_from is not None
        samples.hard = _mine(config.mine_from, dataset, samples, config.margin, config.hard_negatives)
        where = f"mined from {config.mine_from}"
    looked = range(0, len(samples), max(1, len(samples) // _LOOKED_AT))
    counts = np.array([int((samples[place].negatives >= 0).sum()) for place in looked])
    if not counts.any():
        raise DataError(
            f"none of {len(counts):,} samples has a hard negative ({where})",
            "negatives of the targets or the users that are trained on",
            "check the ids, or raise --margin" if config.mine_from is not None else "check the ids",
        )
    TERMINAL.say(
        f"Hard negatives ({where}): {counts.mean():.1f} for a user on average, at most {config.hard_negatives}; of"
        f" {len(counts):,} samples, {int((counts == 0).sum()):,} have none",
        warning=bool((counts == 0).mean() > 0.5),
    )


def described(config: FinetuneConfig) -> dict[str, Any]:
    """Return the settings of a run's hard negatives, for an adapter's provenance; empty without any."""
    if config.negatives_file is not None:
        return {"negatives_file": str(config.negatives_file), "hard_negatives": config.hard_negatives}
    if config.mine_from is not None:
        found = {"mine_from": str(config.mine_from), "margin": config.margin}
        return {**found, "hard_negatives": config.hard_negatives}
    return {}


def identity(config: FinetuneConfig) -> dict[str, str | None]:
    """Return what decides about the hard negatives: hashes of the file or of the export, wherever they lie."""
    found: dict[str, str | None] = {"negatives_file": None, "mine_from": None}
    if config.negatives_file is not None:
        try:
            parts = parts_of(config.negatives_file)
            hashes = [checksums(part.parent, [part.name])[part.name] for part in parts]
        except OSError as error:
            raise DataError(
                f"--negatives-file {config.negatives_file} cannot be read ({error.strerror or error})",
                "a Parquet, CSV or JSON lines file, or a folder of its parts",
                "correct the path",
            ) from None
        found["negatives_file"] = f"sha256 {' '.join(hashes)}"
    if config.mine_from is not None:
        found["mine_from"] = f"sha256 {schema.shards_sha256(schema.read_manifest(config.mine_from))}"
    return found


# --- from a file ------------------------------------------------------------------------------------------------
def _read(path: Path, dataset: Dataset, most: int) -> GivenNegatives:
    found = columns_in(path)
    keys = [name for name in (schema.ITEM_ID, schema.USER_ID) if name in found]
    forms = [name for name in (NEGATIVE_ID, schema.NEGATIVES) if name in found]
    if len(keys) != 1 or len(forms) != 1:
        raise DataError(
            f"--negatives-file {path} has the columns {', '.join(map(repr, found[:20]))}",
            f"{schema.ITEM_ID} (the target) or {schema.USER_ID}, one of the two, and {NEGATIVE_ID} (one negative"
            f" per row) or {schema.NEGATIVES} (a list), one of the two",
            "rename the columns, or remove those of the other kind",
        )
    key, form = keys[0], forms[0]
    columns = HistoryColumns(
        user_id_column=key,
        item_id_column=NEGATIVE_ID,
        history_column=form if form == schema.NEGATIVES else None,
        order="file",
    )
    thing = "item" if key == schema.ITEM_ID else "user"
    given = read_histories(path, dataset.item_ids, columns, thing)
    rows = {name: row for row, name in enumerate(dataset.item_ids if thing == "item" else dataset.user_ids)}
    unknown = [name for name in given.user_ids if name not in rows]
    if unknown:
        named = f"{len(unknown):,} of {len(given):,} {thing}s of {path} are not in the dataset"
        such = f"such as {', '.join(map(repr, unknown[:_NAMED]))}"
        if len(unknown) == len(given):
            raise DataError(
                f"{named}, {such}",
                f"ids such as {', '.join(map(repr, [*rows][:_NAMED]))}",
                "correct the ids in the file",
            )
        TERMINAL.say(f"{named}, {such}; their negatives are left out", warning=True)
    by_row = {rows[name]: np.unique(given.of(n)) for n, name in enumerate(given.user_ids) if name in rows}
    return GivenNegatives(most, key, by_row)


# --- from an export ---------------------------------------------------------------------------------------------
def _mine(folder: Location, dataset: Dataset, samples: Samples, margin: float, most: int) -> MinedNegatives:
    manifest = schema.read_manifest(folder)
    count = len(dataset.item_ids)
    vectors = np.zeros((count, schema.dim_of(manifest, schema.FUSED)), np.float32)
    found = read_items(folder, schema.FUSED, dataset.item_ids, vectors, all_needed=False, advice="")
    if not found.all():
        lacking = np.flatnonzero(~found)
        such = ", ".join(repr(dataset.item_ids[row]) for row in lacking[:_NAMED])
        TERMINAL.say(
            f"{len(lacking):,} of {count:,} items have no fused vector in {folder}, such as {such}; they are not"
            " mined as hard negatives, and no hard negatives are mined for them",
            warning=True,
        )
    units, there = with_direction(vectors)
    lengths = np.where(there, np.linalg.norm(vectors, axis=1), 0).astype(np.float32)
    del vectors
    targets = samples.targets()
    targets = targets[there[targets]]
    place_of = np.full(count, -1, np.int32)
    place_of[targets] = np.arange(len(targets))
    return MinedNegatives(most, margin, units, lengths, place_of, _nearest(units, there, targets, max(NEAREST, most)))


def _nearest(units: np.ndarray, there: np.ndarray, targets: np.ndarray, most: int) -> np.ndarray:
    """Return the items nearest to each target, best first, (targets, most) int32; -1 where there are fewer."""
    near = np.full((len(targets), most), -1, np.int32)
    rows = np.flatnonzero(there)
    items = units if len(rows) == len(units) else units[rows]
    with TERMINAL.progress("mining hard negatives", len(targets)) as advance:
        for start in range(0, len(targets), _TARGETS_AT_A_TIME):
            block = targets[start : start + _TARGETS_AT_A_TIME]
            search = ExactSearch(units[block], items, rows)
            top = top_items(search, [*block[:, None]], most, len(units), keep_seen=False)
            for place, found in enumerate(np.split(top.rows, np.cumsum(top.counts)[:-1])):
                near[start + place, : len(found)] = found
            advance(len(block))
    return near
