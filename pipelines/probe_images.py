"""`vlm2rec probe-images`: can a linear classifier read a column of the items from the image tokens of a backbone?

The frozen vision tower and the projector decide what a language model can know of a picture. If not even a linear probe
of their tokens reads how an item looks, no training of the language model will; a study's gate asks for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vlm2rec.downstream.evaluation.linear_probe import linear_probe
from vlm2rec.embedder.contract import publish, schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, DataError, did_you_mean
from vlm2rec.embedder.encoders.cache_choice import use_vision_cache
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.item_features import IMAGES_AT_ONCE, ItemFeatures
from vlm2rec.pipelines.config import ProbeImagesConfig
from vlm2rec.pipelines.console import TERMINAL, progress, summary

_WRITER = "vlm2rec probe-images"


def run(config: ProbeImagesConfig) -> dict[str, Any]:
    """Probe the image tokens, write `probe.json`, print and return what was found.

    Too few labels are no error: the file then has a `reason` in place of numbers.

    Raises:
        ConfigError: the items have no such column, or the output folder is not free.
        DataError: the images are not there.
    """
    dataset = Dataset(config.data, config.images)
    columns = dataset.items.column_names
    if config.column not in columns:
        raise ConfigError(
            f"--column {config.column!r}{did_you_mean(config.column, columns)} is not a column of {schema.ITEMS_FILE}",
            f"one of {', '.join(columns)}",
            "correct --column, or prepare the dataset from items that have it",
        )
    _require_ours(config)
    dataset.require_images()
    labels = [_label(value) for value in dataset.items[config.column].to_pylist()]
    usable = [row for row, label in enumerate(labels) if label and dataset.image_paths[row]]
    if len(usable) > config.items:
        usable = np.sort(np.random.default_rng(config.seed).choice(usable, config.items, replace=False)).tolist()
    result: dict[str, Any] = {"written_by": _WRITER, "column": config.column, "dataset": dataset.name}
    rows, vectors = _tokens(config, dataset, usable) if usable else ([], np.empty((0, 1)))
    try:
        found = linear_probe(vectors, [labels[row] for row in rows], config.seed)
    except DataError as error:
        result["reason"] = error.found
    else:
        gain, low, high = found.gain
        result |= {"accuracy": found.accuracy, "commonest": found.commonest, "gain": gain, "low": low, "high": high}
        result |= {"labels": found.labels, "train": found.train, "held_out": found.held_out}
    with publish.plain_disk_errors(config.out):
        schema.write_json(config.out / schema.PROBE_FILE, result)
    _summarise(config, result)
    return result


def _require_ours(config: ProbeImagesConfig) -> None:
    file = config.out / schema.PROBE_FILE
    ours = schema.is_written_by(file, _WRITER)
    publish.require_ours(config.out, "an earlier probe", ours=ours, only=(schema.PROBE_FILE,))
    publish.require_writable(config.out)


def _label(value: Any) -> str | None:
    """Return the label of an item; the first of a list."""
    if isinstance(value, list):
        value = value[0] if value else None
    return None if value is None else str(value).strip() or None


def _tokens(config: ProbeImagesConfig, dataset: Dataset, rows: list[int]) -> tuple[list[int], np.ndarray]:
    """Return the rows whose image can be read, and the mean of each image's tokens behind the projector, (n, d)."""
    encoder = ItemEncoder.load(
        config.backbone,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        max_pixels=config.max_pixels,
    )
    if schema.IMAGE not in encoder.modalities:
        raise ArtifactError(f"{config.backbone} reads no images", "a vision-language model", "give another --backbone")
    use_vision_cache(config.vision_cache, dataset, encoder, config.backbone, config.revision, TERMINAL)
    items = ItemFeatures(dataset, encoder, cache_bytes=0)
    means = []
    with progress("reading images", len(rows)) as advance:
        for start in range(0, len(rows), IMAGES_AT_ONCE):
            block = rows[start : start + IMAGES_AT_ONCE]
            means += [
                of_item[0].tokens.float().mean(dim=0).cpu().numpy()
                for of_item in items.features([[row] for row in block])
            ]
            advance(len(block))
    seen = [place for place, row in enumerate(rows) if dataset.item_ids[row] not in items.unreadable]
    return [rows[place] for place in seen], np.stack(means)[seen]


def _summarise(config: ProbeImagesConfig, result: dict[str, Any]) -> None:
    if "reason" in result:
        found = f"not measured: {result['reason']}"
    else:
        found = (
            f"{result['accuracy']:.3f} of {result['held_out']} held-out items are right (the commonest of"
            f" {result['labels']} labels: {result['commonest']:.3f}); gain {result['gain']:+.3f}"
            f" [{result['low']:+.3f}, {result['high']:+.3f}]"
        )
    summary("Linear probe of the image tokens", {config.column: found, "file": config.out / schema.PROBE_FILE})
