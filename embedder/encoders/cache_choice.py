"""`--vision-cache`: whether and where the frozen vision tower's tokens are kept, and how much space they take."""

from __future__ import annotations

import shutil
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from vlm2rec.embedder.backbones.image_readers import Readers
from vlm2rec.embedder.backbones.images import ImageError, size_of
from vlm2rec.embedder.backbones.model_files import backbone_hash
from vlm2rec.embedder.backbones.vision_cache import VisionCache
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.printable import size
from vlm2rec.embedder.contract.storage import StorePath
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.progress import SILENT, Reporter

AUTO, OFF = "auto", "off"
FOLDER = "vision-cache"
MOST_BYTES = 64 * 2**30  # of a cache that --vision-cache auto chooses
_SAMPLE = 64  # images whose size is looked up for the estimate
_PATIENCE = 5.0  # seconds to wait for one image


def use_vision_cache(
    setting: str,
    dataset: Dataset,
    encoder: ItemEncoder,
    source: str,
    revision: str | None,
    reporter: Reporter = SILENT,
) -> None:
    """Give the encoder the cache that `--vision-cache` chooses, and report its expected size before writing to it.

    With `auto` the cache is in the dataset folder, if it takes at most 64 GiB and half of the free space there. In an
    object store there is none.

    Args:
        setting: auto, off, or a folder.
        dataset: the dataset whose images will be encoded.
        encoder: the encoder with the vision tower.
        source: hub id or folder of the backbone.
        revision: of a hub backbone.
        reporter: receives what is kept, or why nothing is.
    """
    if setting == OFF or schema.IMAGE not in encoder.modalities:
        return
    if setting == AUTO and isinstance(dataset.path, StorePath):
        reporter.say(
            f"vision cache: off, because {dataset.path} is in an object store. For a local folder, give"
            " --vision-cache DIR"
        )
        return
    root = Path(str(dataset.path)) / FOLDER if setting == AUTO else Path(setting)
    try:
        cache = VisionCache.open(root, encoder.backbone, backbone_hash(source, revision))
        free = shutil.disk_usage(cache.folder).free
    except OSError as error:
        reporter.say(f"vision cache: {root} cannot be written ({error.strerror}); every run encodes all images again")
        return
    images, expected = sum(bool(path) for path in dataset.image_paths), _expected_bytes(dataset, encoder, cache)
    missing = max(0, images - len(cache)) * expected // max(1, images)
    if missing > free / 2 or (setting == AUTO and expected > MOST_BYTES):
        reporter.say(
            f"vision cache: off. The features of {images:,} images take about {size(expected)}, and {root} has"
            f" {size(free)} of free space, so every run encodes all images again. For a folder with more space, give"
            " --vision-cache DIR",
        )
        return
    known = f"the features of {len(cache):,} images from earlier runs"
    if len(cache) >= images:  # perhaps of other images; what is missing is added
        reporter.say(f"vision cache: {root} has {known}, which are not encoded again")
    elif len(cache):
        reporter.say(
            f"vision cache: {root} has {known}; of this dataset's {images:,} images, those that it lacks are added,"
            f" about {size(expected)} in all"
        )
    else:
        reporter.say(
            f"vision cache: {root} keeps the features of {images:,} images, about {size(expected)}. Later runs with"
            " this backbone, number format and image size do not encode them again. --vision-cache off keeps none"
        )
    encoder.vision_cache = cache


def _expected_bytes(dataset: Dataset, encoder: ItemEncoder, cache: VisionCache) -> int:
    """Estimate, from a few images, the size of the cache with all images of a dataset."""
    paths = [path for path in dataset.image_paths if path]
    count = len(paths)
    sample = np.linspace(0, count - 1, min(count, _SAMPLE)).astype(int)
    sizes = []
    with closing(Readers(4, _PATIENCE)) as readers:
        readings = [readers.ask(partial(size_of, dataset.image_root, paths[row])) for row in sample]
        for reading in readings:
            try:
                length = encoder.backbone.image_length(*readers.take(reading))
            except (ImageError, ValueError):
                continue  # a broken image takes no space
            sizes.append(cache.image_bytes(length, encoder.backbone.image_layers))
    return round(count * float(np.mean(sizes))) if sizes else 0
