"""`vlm2rec export-users`: a vector of every user's history, in the shards and with the promise of `export-items`.

A user's vector is that of the encoder of sequences, as Task 1 has it, or the mean of the history's item vectors.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm2rec.downstream.formats import read_ids
from vlm2rec.downstream.serving.mean_vectors import mean_vectors
from vlm2rec.downstream.table import EmbeddingTable
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.embedder.contract.storage import Location
from vlm2rec.embedder.export.distribute import Distribution
from vlm2rec.embedder.export.export import fill_folder
from vlm2rec.embedder.export.lock import Hold
from vlm2rec.embedder.export.plan import fingerprint, without_inputs
from vlm2rec.embedder.export.reuse import EarlierRows
from vlm2rec.embedder.export.short import short_settings, shorten_views
from vlm2rec.embedder.export.users import UserHistories, UserJob, Views, plan_users
from vlm2rec.pipelines import console
from vlm2rec.pipelines.catalogue.histories import GivenHistories, digest_of, read_histories
from vlm2rec.pipelines.config import ExportUsersConfig
from vlm2rec.pipelines.console import TERMINAL
from vlm2rec.pipelines.history_encoder import encoder_fingerprint, history_encoder, say_of_unreadable, user_source
from vlm2rec.pipelines.verify import in_shards

MAX_HISTORY = 10  # without a dataset folder: the default of `prepare`
USER_IDS = "user_ids"  # in the settings of a folder of users: the hash of the ids, in order
SPACE = "space"  # in the settings of a folder of users: which item vectors they can be compared with


def run(config: ExportUsersConfig) -> dict[str, Any]:
    """Write the folder of users and return its manifest; an interrupted export continues where it stopped.

    Raises:
        ConfigError: settings that contradict each other, or --backbone without --data.
        DataError: the histories cannot be read, or name no item of the catalogue.
        ModelError: backbone or adapter cannot be loaded.
        ArtifactError: the encoder is not that of the embeddings, `out` belongs to another export or is in use, or the
            disk is full.
    """
    manifest = schema.read_manifest(config.embeddings)
    source = user_source(config, manifest)
    if source == "mean" and (config.backbone is not None or config.adapter is not None):
        raise ConfigError(
            "--backbone or --adapter with --users-from mean, which reads the item vectors alone",
            "one of the two",
            "leave them out, or give --users-from sequence",
        )
    if source == "sequence" and config.data is None:
        raise ConfigError("--backbone without --data", "the dataset folder with titles and images", "give --data")
    dataset = None if config.data is None else Dataset(config.data, config.images)
    most = config.max_history or (MAX_HISTORY if dataset is None else dataset.max_history)
    settings: dict[str, Any]
    if source == "sequence":
        assert dataset is not None
        if schema.IMAGE in schema.modalities_of(manifest["views"]):
            dataset.require_images()
        item_ids, settings = dataset.item_ids, {"source": "histories", **encoder_fingerprint(config, manifest)}
        settings |= short_settings(settings, manifest["dim"] if schema.FULL_DIM in manifest["settings"] else None)
        load: Any = functools.partial(SequenceVectors, config, dataset, manifest)
    else:
        item_ids = read_ids(config.embeddings)
        settings = {"source": "mean of items", "embeddings_sha256": schema.shards_sha256(manifest)}
        settings |= {key: manifest[key] for key in ("dim", "dims", "views") if key in manifest}
        load = functools.partial(MeanVectors, config.embeddings, tuple(manifest["views"]))
    given = read_histories(config.histories, item_ids, config)
    latest = given.latest(most)
    settings |= {
        "storage": config.storage,
        "max_history": most,
        **settings_of(given, item_ids),
        SPACE: space_of(manifest),
        "embeddings_fingerprint": manifest["fingerprint"],
    }
    plan = plan_users(given.user_ids, config.shard_size, settings)
    histories = UserHistories(latest.rows, latest.offsets, given.reasons)

    def job(earlier: EarlierRows | None, hold: Hold) -> UserJob:
        return UserJob(config.out, plan, hold, histories, load)

    found = fill_folder(
        plan,
        config.out,
        job,
        data=config.data,
        distribution=Distribution(num_workers=config.num_workers),
        reporter=TERMINAL,
        work_name="encoding users",
        about={"histories": given.counts},
        left_out=given.left_out,
    )
    assert found is not None  # nobody else makes shards
    _summarise(config, found, given)
    return found


def settings_of(given: GivenHistories, item_ids: Sequence[str]) -> dict[str, Any]:
    """Return what tells the users and histories of a folder apart from others."""
    return {"users": len(given), USER_IDS: digest_of(given.user_ids), "histories": given.digest(item_ids)}


def space_of(manifest: Mapping[str, Any]) -> str:
    """Return a hash of what decides the vector of any item: vectors of equal spaces can be compared."""
    return fingerprint(without_inputs(manifest["settings"]))


@dataclass
class MeanVectors:
    """The mean of the history's item vectors, in every view."""

    embeddings: Location
    views: tuple[str, ...]

    def __post_init__(self) -> None:
        self._tables = {view: EmbeddingTable.open(self.embeddings, view) for view in self.views}

    def __call__(self, histories: Sequence[np.ndarray]) -> Views:
        """See `HistoryEncoder`."""
        return mean_vectors(self._tables, histories)


class SequenceVectors:
    """The vectors of the encoder of sequences."""

    def __init__(self, config: ExportUsersConfig, dataset: Dataset, manifest: Mapping[str, Any]) -> None:
        from vlm2rec.embedder.encoders.item_features import ItemFeatures

        self._encoder = history_encoder(config, dataset, manifest)
        self._exported = manifest["settings"]
        self._items = ItemFeatures(dataset, self._encoder)
        self._told = 0

    def __call__(self, histories: Sequence[np.ndarray]) -> Views:
        """See `HistoryEncoder`."""
        from vlm2rec.embedder.backbones.packing import IndependentRows
        from vlm2rec.embedder.encoders.item_features import encode_rows

        with IndependentRows():  # other users do not change a bit of a vector
            found = encode_rows(self._encoder, self._items, [history.tolist() for history in histories])
        if self._items.unreadable and not self._told:
            self._told = len(self._items.unreadable)
            say_of_unreadable(self._items.unreadable)
        return shorten_views(found, self._exported)


def _summarise(config: ExportUsersConfig, manifest: Mapping[str, Any], given: GivenHistories) -> None:
    dims = schema.dims_of(manifest)
    shapes = ", ".join(f"{view}[{dims[view]}]" for view in manifest["views"])
    console.summary(
        "Users",
        {
            "users": f"{manifest['num_items']:,} {in_shards(manifest)}",
            **{status: f"{count:,}" for status, count in manifest["counts"].items() if count},
            **history_rows(given.counts),
            "vectors": f"{shapes}: {manifest['dtype']}, {manifest['settings']['source']}",
            "folder": config.out,
        },
    )


def history_rows(counts: Mapping[str, Any]) -> dict[str, str]:
    """Return the rows of a summary that tell what was read of the histories."""
    rows = {"interactions": f"{counts['kept']:,} of {counts['read']:,}"}
    if counts["left_out"]:
        told = "; ".join(f"{reason}: {count:,}" for reason, count in counts["left_out"].items())
        rows["left out"] = f"{told}; {schema.LEFT_OUT_FILE} names each"
    return rows
