"""`vlm2rec export-recommender`: the item table of a trained recommender, as an embeddings folder for every command.

A vector is the row that the model reads and ranks with: of an id table, or what the adapter made of the item's vector.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from vlm2rec.downstream.serving.trained import TrainedRecommender, read_run
from vlm2rec.embedder.backbones.devices import speed_up_float32
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ArtifactError
from vlm2rec.embedder.export.plan import fingerprint, plan_shards
from vlm2rec.pipelines.config import ExportRecommenderConfig
from vlm2rec.pipelines.console import TERMINAL
from vlm2rec.pipelines.export_items import print_summary
from vlm2rec.pipelines.import_vectors import Outcomes, write_vectors

SOURCE = "recommender"  # the manifest's settings.source


def run(config: ExportRecommenderConfig) -> dict[str, Any]:
    """Write the embeddings folder, in the order of the dataset's items, and return its manifest.

    Raises:
        ConfigError: the run has no item table of its own (VBPR and those after it), or is of a dataset of RecBole's.
        ArtifactError: the run is unfinished or damaged, its dataset or vectors are others by now, or `out` belongs to
            something else.
    """
    begun = time.perf_counter()
    found = read_run(config.recommender, config.data, config.embeddings)
    if found.unproven:
        TERMINAL.say(
            f"{found.folder} was written by an earlier vlm2rec and does not record {found.unproven}", warning=True
        )
    speed_up_float32(torch.device("cpu"))
    table = TrainedRecommender(found, "cpu").table()
    item_ids = found.dataset.item_ids
    row_of = {item_id: row for row, item_id in enumerate(found.item_ids)}
    vectors = table[[row_of[item_id] for item_id in item_ids]]
    if not np.isfinite(vectors.astype(config.storage)).all():
        raise ArtifactError(
            f"the item table of {found.folder} does not fit in {config.storage}, or is not finite",
            "finite numbers",
            "give --storage float32, or train again",
        )
    settings: dict[str, Any] = {
        "source": SOURCE,
        "model": found.model,
        "run": found.folder.resolve().name,
        "checkpoint_sha256": found.checkpoint_sha256,
        "dim": int(vectors.shape[1]),
        "views": [schema.FUSED],
        "storage": config.storage,
        "items": len(item_ids),
        "item_ids": fingerprint({"item_ids": item_ids}),
    }
    if found.embeddings is not None:
        settings["embeddings_sha256"] = schema.shards_sha256(schema.read_manifest(found.embeddings))
    plan = plan_shards(item_ids, config.shard_size, settings)
    outcomes = Outcomes([schema.STATUS_OK] * len(item_ids), [None] * len(item_ids))
    seconds = time.perf_counter() - begun
    manifest = write_vectors(config.out, plan, {schema.FUSED: vectors}, outcomes, found.dataset, seconds)
    print_summary(manifest, config.out)
    return manifest
