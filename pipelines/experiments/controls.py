"""A control: the dataset of a study with its images dealt anew among the items, so that no looks belong to a title.

What a method gains there over text alone, it does not gain from looks.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from vlm2rec.embedder.contract import schema, storage
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.publish import whole_file

FOLDER = "shuffled-images"
SEED = 0
_MARK = "control"


def shuffled_folder(study: Path) -> Path:
    """Return where a study keeps the control."""
    return study / FOLDER


def shuffled_mark(mark: str) -> str:
    """Return the mark of the control, from that of the dataset: it can be planned before it is written."""
    return f"{mark}, images shuffled with seed {SEED}"


def shuffle_images(data: Dataset, out: Path, mark: str) -> None:
    """Write the control of a dataset, unless it is there: every image belongs to exactly one item, by chance.

    Items, histories and candidates stay as they are; the images stay where they are.

    Args:
        data: the dataset, cold items included.
        out: the folder to write.
        mark: that of the control; one of other contents is written again.
    """
    description = out / schema.DATASET_FILE
    if description.is_file() and schema.read_json(description, "a dataset", f"remove {out}").get(_MARK) == mark:
        return
    data.require_images()
    source = Path(str(data.path))
    out.mkdir(parents=True, exist_ok=True)
    description.unlink(missing_ok=True)
    for name in (schema.SEQUENCES_FILE, schema.NEGATIVES_FILE):
        shutil.copyfile(source / name, out / name)
    items = pq.read_table(source / schema.ITEMS_FILE)
    order = np.random.default_rng(SEED).permutation(len(items))
    place = items.column_names.index(schema.IMAGE_PATH)
    items = items.set_column(place, items.schema.field(place), items[place].take(order))
    with whole_file(out / schema.ITEMS_FILE) as file:
        pq.write_table(items, file)
    sums = {name: storage.sha256_file(out / name) for name in schema.DATASET_TABLES}
    schema.write_json(description, {**data.meta, "image_root": str(data.image_root), "sha256": sums, _MARK: mark})
