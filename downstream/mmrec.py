"""Writes a dataset folder and its vectors as a dataset of MMRec, the toolbox of FREEDOM, LATTICE, BM3 and others.

    NAME.inter                            userID itemID rating timestamp x_label, tab-separated, numbers from 0
    image_feat.npy  text_feat.npy         (items, d) float32: row i is itemID i
    fused_feat.npy                        instead of these two, given as the text features: one joint vector per item
    i_id_mapping.csv  u_id_mapping.csv    our ids and MMRec's numbers, tab-separated
    NAME.yaml                             copy it into MMRec's src/configs/dataset

MMRec takes the largest itemID of the `.inter` file as the number of items, and every matrix must have as many rows:
items without interactions are left out. It divides vectors by their length without a guard, so a zero vector makes a
whole graph NaN: it counts as missing here. Its models keep item graphs in the same folder (`mm_adj_*.pt`,
`image_adj_*.pt`) and would use them with other vectors too: use a new folder for each conversion.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from vlm2rec.downstream.formats import LEFT_OUT, MEAN_VECTOR, Gap, no_vectors, read_reasons
from vlm2rec.downstream.table import read_in_order
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import DataError
from vlm2rec.embedder.contract.storage import Location

TRAIN, VALID, TEST = 0, 1, 2  # x_label
_ROWS = 4096  # read at a time
_FILES = {schema.IMAGE: "image_feat.npy", schema.TEXT: "text_feat.npy", schema.FUSED: "fused_feat.npy"}


def write_mmrec(embeddings: Location, dataset: Dataset, out: Path, name: str, columns: Sequence[str]) -> list[Gap]:
    """Write an MMRec dataset into the folder `out`; return the items without a vector of their own.

    Args:
        embeddings: a finished embeddings folder.
        dataset: the dataset with interactions and items.
        out: an existing folder.
        name: the dataset's name in MMRec.
        columns: `text`, `image`, or both; or `fused` alone.

    Raises:
        ArtifactError: a view has no vectors, or a user has no training item.
        DataError: the mean vector is zero, and cannot replace missing vectors.
    """
    touched, untouched = _write_interactions(dataset, out / f"{name}.inter")
    item_ids = [dataset.item_ids[row] for row in touched]
    _write_ids(out / "i_id_mapping.csv", ("asin", "itemID"), item_ids)
    _write_ids(out / "u_id_mapping.csv", ("user_id", "userID"), dataset.user_ids)
    (out / f"{name}.yaml").write_text(_yaml(name, columns), encoding="utf-8")
    reasons = read_reasons(embeddings)
    gaps = []
    for column in columns:
        found = _write_features(embeddings, column, item_ids, out / _FILES[column])
        for row in np.flatnonzero(~found):
            reason = reasons.get(item_ids[row], f"no {column} vector, or one of zeros")
            gaps.append(Gap(item_ids[row], column, reason, MEAN_VECTOR))
    untouched_reason = "it has no interactions: MMRec counts items by their interactions"
    return gaps + [Gap(dataset.item_ids[row], "", untouched_reason, LEFT_OUT) for row in untouched]


def _write_interactions(dataset: Dataset, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write the `.inter` file; return the rows of the numbered items, in that order, and of those without interactions.

    Items are numbered in the catalogue's order. The dataset folder keeps the order of a user's items but not their
    times: `timestamp` is the position in the sequence. MMRec reads neither it nor the rating.
    """
    train = dataset.trained_sequences()  # MMRec needs every user in training
    valid, test = dataset.histories("valid").targets, dataset.histories("test").targets
    is_touched = np.zeros(len(dataset.item_ids), bool)
    is_touched[np.concatenate([*train, valid, test])] = True
    number = np.cumsum(is_touched) - 1
    with file.open("w", encoding="utf-8") as lines:
        lines.write("userID\titemID\trating\ttimestamp\tx_label\n")
        for user, sequence in enumerate(train):
            items = [*sequence, valid[user], test[user]]
            labels = [TRAIN] * len(sequence) + [VALID, TEST]
            for position, (item, label) in enumerate(zip(items, labels, strict=True)):
                lines.write(f"{user}\t{number[item]}\t1.0\t{position}\t{label}\n")
    return np.flatnonzero(is_touched), np.flatnonzero(~is_touched)


def _write_features(embeddings: Location, column: str, item_ids: list[str], file: Path) -> np.ndarray:
    """Write one matrix, with the mean vector in missing rows; return which items have a vector, (I,) bool."""
    shape = (len(item_ids), schema.dims_of(schema.read_manifest(embeddings))[column])
    vectors: np.ndarray = np.lib.format.open_memmap(file, "w+", np.float32, shape)
    if hasattr(os, "posix_fallocate"):  # a full disk under mapped memory would kill the process
        with file.open("r+b") as reserved:
            os.posix_fallocate(reserved.fileno(), 0, file.stat().st_size)
    found = read_in_order(embeddings, column, item_ids, vectors)  # rows without a vector stay zero
    total = np.zeros(shape[1], np.float64)
    for start in range(0, len(item_ids), _ROWS):
        rows = vectors[start : start + _ROWS]
        found[start : start + _ROWS] &= rows.any(1)
        total += rows.sum(0, dtype=np.float64)
    if not found.any():
        raise no_vectors(embeddings, column)
    mean = (total / found.sum()).astype(np.float32)
    if not found.all() and not mean.any():
        raise DataError(
            f"the mean of the {column} vectors is zero, and {int((~found).sum())} items have none",
            "a mean that can replace a missing vector",
            "give every item a vector, or use vectors that are not centred",
        )
    for start in range(0, len(item_ids), _ROWS):
        rows = vectors[start : start + _ROWS]
        rows[~found[start : start + _ROWS]] = mean
    vectors.flush()  # type: ignore[attr-defined]
    return found


def _write_ids(path: Path, header: tuple[str, str], ids: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, delimiter="\t", lineterminator="\n")
        rows.writerow(header)
        rows.writerows((item_id, number) for number, item_id in enumerate(ids))


def _yaml(name: str, columns: Sequence[str]) -> str:
    settings = {
        "USER_ID_FIELD": "userID",
        "ITEM_ID_FIELD": "itemID",
        "TIME_FIELD": "timestamp",
        "filter_out_cod_start_users": "True",
        "inter_file_name": f"'{name}.inter'",
        "vision_feature_file": f"'{_FILES[schema.IMAGE]}'",
        # MMRec knows two kinds of features, and uses those it finds
        "text_feature_file": f"'{_FILES[schema.FUSED if schema.FUSED in columns else schema.TEXT]}'",
        "field_separator": '"\\t"',
    }
    return "".join(f"{key}: {value}\n" for key, value in settings.items())
