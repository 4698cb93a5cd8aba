"""Writes a dataset folder and its vectors as a dataset of MMRec, the toolbox of FREEDOM, LATTICE, BM3 and others.

    NAME.inter                            userID itemID rating timestamp x_label, tab-separated, numbers from 0
    image_feat.npy  text_feat.npy         (items, d) float32: row i is itemID i
    fused_feat.npy                        instead of these two, given as the text features: one joint vector per item
    i_id_mapping.csv  u_id_mapping.csv    our ids and MMRec's numbers, tab-separated
    NAME.yaml                             copy it into MMRec's src/configs/dataset

MMRec takes the largest itemID of the `.inter` file as the number of items, and every matrix must have as many rows:
items without interactions are left out. It divides vectors by their length without a guard, so a zero vector makes a
whole graph NaN: it counts as missing here. Its models keep item graphs in the same folder (`mm_adj_*.pt`,
`image_adj_*.pt`) and would use them with other vectors too: they have to go when the vectors change.

A published split (`--like`) keeps its own numbers: row i is the item that its `i_id_mapping.csv` gives the itemID i.

MMRec never ranks an item that the user has in training. A target that the user bought before can therefore not be found
whatever the model: `repeats.csv` lists these.
"""

from __future__ import annotations

import csv
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlm2rec.downstream.formats import LEFT_OUT, MEAN_VECTOR, Gap, no_vectors, read_ids, read_reasons
from vlm2rec.downstream.options import Repeats
from vlm2rec.downstream.table import read_in_order, unit_rows
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import DataError
from vlm2rec.embedder.contract.printable import cell
from vlm2rec.embedder.contract.storage import Location

TRAIN, VALID, TEST = 0, 1, 2  # x_label
_ROWS = 4096  # read at a time
ITEM_NUMBERS, USER_NUMBERS = "i_id_mapping.csv", "u_id_mapping.csv"
REPEATS_FILE = "repeats.csv"
_LABELS = {VALID: "valid", TEST: "test"}
_COLUMNS = ("userID", "itemID", "rating", "timestamp", "x_label")
_FILES = {schema.IMAGE: "image_feat.npy", schema.TEXT: "text_feat.npy", schema.FUSED: "fused_feat.npy"}


@dataclass(frozen=True)
class Repeat:
    """A validation or test item that the user has in training, so that MMRec masks it."""

    user: str
    item: str
    split: str  # valid or test


@dataclass(frozen=True)
class Written:
    """What a conversion could not write as it is."""

    gaps: list[Gap]  # items without a vector of their own
    repeats: list[Repeat]  # unreachable targets


def write_mmrec(
    embeddings: Location,
    dataset: Dataset,
    out: Path,
    name: str,
    columns: Sequence[str],
    repeats: Repeats = "keep",
    normalize: bool = False,
) -> Written:
    """Write an MMRec dataset into the folder `out`.

    Args:
        embeddings: a finished embeddings folder.
        dataset: the dataset with interactions and items.
        out: an existing folder.
        name: the dataset's name in MMRec.
        columns: `text`, `image`, or both; or `fused` alone.
        repeats: whether targets that MMRec masks stay in the `.inter` file.
        normalize: whether every vector, a mean one too, has length 1.

    Raises:
        ArtifactError: a view has no vectors, or a user has no training item.
        DataError: the mean vector is zero, and cannot replace missing vectors; or no target is left.
    """
    touched, untouched, masked = _write_interactions(dataset, out / f"{name}.inter", repeats)
    item_ids = [dataset.item_ids[row] for row in touched]
    _write_ids(out / ITEM_NUMBERS, ("asin", "itemID"), item_ids)
    _write_ids(out / USER_NUMBERS, ("user_id", "userID"), dataset.user_ids)
    gaps = _write_views(embeddings, out, name, columns, item_ids, normalize)
    untouched_reason = "it has no interactions: MMRec counts items by their interactions"
    gaps += [Gap(dataset.item_ids[row], "", untouched_reason, LEFT_OUT) for row in untouched]
    return Written(gaps, masked)


def write_like(
    embeddings: Location,
    published: Path,
    out: Path,
    name: str,
    columns: Sequence[str],
    repeats: Repeats = "keep",
    normalize: bool = False,
) -> Written:
    """Write vectors in the order of a published split into the folder `out`, beside copies of the split's own files.

    Args:
        embeddings: a finished embeddings folder.
        published: a folder with `i_id_mapping.csv` and one `.inter` file, as MMRec's preprocessing writes them.
        out: an existing folder.
        name: the dataset's name in MMRec.
        columns: `text`, `image`, or both; or `fused` alone.
        repeats: whether targets that MMRec masks stay in the `.inter` file.
        normalize: whether every vector, a mean one too, has length 1.

    Raises:
        DataError: the split's numbers are not those of its items, 0 to n − 1 once each; most of its items are not in
            the embeddings; no target is left; or as `write_mmrec`.
        ArtifactError: a view has no vectors.
    """
    item_ids = _numbered(published / ITEM_NUMBERS, "itemID")
    exported = read_ids(embeddings)
    known, numbered = {*exported}, {*item_ids}
    strange = [item for item in item_ids if item not in known]
    if 2 * len(strange) > len(item_ids):
        raise DataError(
            f"{len(strange):,} of {len(item_ids):,} items of {published / ITEM_NUMBERS} are not in {embeddings}, among"
            f" them {', '.join(map(repr, strange[:3]))}",
            "an export of the split's items, under the same ids",
            "prepare and export the catalogue that the split was made from",
        )
    users = _numbered(published / USER_NUMBERS, "userID") if (published / USER_NUMBERS).is_file() else []
    masked = _copy_interactions(_only_interactions(published), out / f"{name}.inter", item_ids, users, repeats)
    for file in (ITEM_NUMBERS, USER_NUMBERS):
        if (published / file).is_file():
            shutil.copyfile(published / file, out / file)
    gaps = _write_views(embeddings, out, name, columns, item_ids, normalize)
    gaps += [
        Gap(item, "", f"{ITEM_NUMBERS} of the split has no such item", LEFT_OUT)
        for item in exported
        if item not in numbered
    ]
    return Written(gaps, masked)


def _write_views(
    embeddings: Location, out: Path, name: str, columns: Sequence[str], item_ids: list[str], normalize: bool
) -> list[Gap]:
    """Write a matrix for each view and the YAML file; return the items without a vector of their own."""
    (out / f"{name}.yaml").write_text(_yaml(name, columns), encoding="utf-8")
    reasons = read_reasons(embeddings)
    gaps = []
    for column in columns:
        found = _write_features(embeddings, column, item_ids, out / _FILES[column], normalize)
        for row in np.flatnonzero(~found):
            reason = reasons.get(item_ids[row], f"no {column} vector, or one of zeros")
            gaps.append(Gap(item_ids[row], column, reason, MEAN_VECTOR))
    return gaps


def _numbered(file: Path, column: str) -> list[str]:
    """Return the ids of a mapping file in the order of their numbers; raise `DataError` unless each number is there."""
    rows = _read_tabs(file, 2)
    header, rows = rows[0][1], rows[1:]
    if header[1] != column:
        raise DataError(
            f"{file} has the columns {', '.join(header)}", f"an id and {column}, as MMRec writes them", "check --like"
        )
    ids: dict[int, str] = {}
    for line, (name, number) in rows:
        place = int(number) if number.isascii() and number.isdigit() else -1
        if not 0 <= place < len(rows) or place in ids:
            raise DataError(
                f"line {line} of {file} gives {name!r} the {column} {number!r}"
                + (f", which {ids[place]!r} has already" if place in ids else ""),
                f"the numbers 0 to {len(rows) - 1}, each once",
                "take the file as MMRec's preprocessing wrote it",
            )
        ids[place] = name
    if len({*ids.values()}) < len(ids):
        twice = next(name for name, count in Counter(ids.values()).items() if count > 1)
        raise DataError(
            f"{file} has {twice!r} twice", "each id once", "take the file as MMRec's preprocessing wrote it"
        )
    return [ids[place] for place in range(len(ids))]


def _read_tabs(file: Path, width: int | None = None) -> list[tuple[int, list[str]]]:
    """Return the lines of a tab-separated file as (line number, fields); `width` is the number of fields."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, delimiter="\t")
            rows = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} cannot be read ({error})", "a tab-separated file of MMRec", "check --like") from None
    width = width or (len(rows[0][1]) if rows else 0)
    uneven = next((line for line, row in rows if len(row) != width), 0)
    if len(rows) < 2 or uneven:
        found = f"line {uneven} of {file} has not {width} fields" if uneven else f"{file} has no rows"
        raise DataError(found, "a tab-separated file of MMRec, with a header", "check --like")
    return rows


def _only_interactions(published: Path) -> Path:
    found = sorted(published.glob("*.inter"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise DataError(f"{published} has {len(found)} .inter files ({names})", "one", "give a folder with one of them")
    return found[0]


def _copy_interactions(
    file: Path, out: Path, items: Sequence[str], users: Sequence[str], repeats: Repeats
) -> list[Repeat]:
    """Copy a published `.inter` file, without masked targets if they are dropped; return these.

    Args:
        file: the published file.
        out: the file to write.
        items: item ids by number.
        users: user ids by number; empty if the split does not say.
        repeats: whether masked targets are copied.
    """
    (_, header), *rows = _read_tabs(file)
    absent = [name for name in ("userID", "itemID", "x_label") if name not in header]
    if absent:
        raise DataError(f"{file} has no column {absent[0]}", ", ".join(_COLUMNS), "check --like")
    user_at, item_at, label_at = (header.index(name) for name in ("userID", "itemID", "x_label"))
    seen: dict[str, set[int]] = {}
    highest = -1
    for line, row in rows:
        number = int(row[item_at]) if row[item_at].isascii() and row[item_at].isdigit() else -1
        if not 0 <= number < len(items) or row[label_at] not in ("0", "1", "2"):
            raise DataError(
                f"line {line} of {file} has itemID {row[item_at]!r} and x_label {row[label_at]!r}",
                f"items from 0 to {len(items) - 1}, as {ITEM_NUMBERS} numbers them, and labels 0, 1 or 2",
                "take both files of the same split",
            )
        highest = max(highest, number)
        if row[label_at] == str(TRAIN):
            seen.setdefault(row[user_at], set()).add(number)
    if highest != len(items) - 1:
        raise DataError(
            f"{file} has items up to {highest}, and {ITEM_NUMBERS} {len(items)} items",
            "the largest itemID in an interaction: MMRec counts items by it",
            "take both files of the same split",
        )
    masked, kept = [], []
    for line, row in rows:
        label, item = int(row[label_at]), int(row[item_at])
        if label != TRAIN and item in seen.get(row[user_at], ()):
            user = row[user_at]
            if user.isascii() and user.isdigit() and int(user) < len(users):
                user = users[int(user)]
            masked.append(Repeat(user, items[item], _LABELS[label]))
            if repeats == "drop":
                continue
        kept.append((line, row))
    _require_targets(file, (int(row[label_at]) for _, row in kept))
    with out.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.writer(lines, delimiter="\t", lineterminator="\n")
        writer.writerow(header)
        writer.writerows(row for _, row in kept)
    return masked


def _require_targets(where: object, labels: Iterable[int]) -> None:
    left = {*labels}
    for label, name in _LABELS.items():
        if label not in left:
            raise DataError(
                f"{where} has no {name} target left that MMRec can rank",
                "targets that their users do not have in training",
                "give --repeats keep, or data with new items for its users",
            )


def _write_interactions(dataset: Dataset, file: Path, repeats: Repeats) -> tuple[np.ndarray, np.ndarray, list[Repeat]]:
    """Write the `.inter` file; return the rows of the numbered items, in that order, of the others, and masked targets.

    Items are numbered in the catalogue's order. The dataset folder keeps the order of a user's items but not their
    times: `timestamp` is the position in the sequence. MMRec reads neither it nor the rating.
    """
    train = dataset.trained_sequences()  # MMRec needs every user in training
    held_out = {VALID: dataset.targets("valid"), TEST: dataset.targets("test")}
    is_touched = np.zeros(len(dataset.item_ids), bool)
    is_touched[np.concatenate([*train, *(rows for rows, _ in held_out.values())])] = True
    number = np.cumsum(is_touched) - 1
    masked: list[Repeat] = []
    written: set[int] = set()
    with file.open("w", encoding="utf-8") as lines:
        lines.write("\t".join(_COLUMNS) + "\n")
        for user, sequence in enumerate(train):
            items, labels = [*sequence], [TRAIN] * len(sequence)
            for label, (rows, offsets) in held_out.items():
                targets = rows[offsets[user] : offsets[user + 1]]
                items, labels = [*items, *targets], labels + [label] * len(targets)
            seen = set(sequence.tolist())
            for position, (item, label) in enumerate(zip(items, labels, strict=True)):
                if label != TRAIN and int(item) in seen:
                    masked.append(Repeat(dataset.user_ids[user], dataset.item_ids[item], _LABELS[label]))
                    if repeats == "drop":
                        continue
                written.add(label)
                lines.write(f"{user}\t{number[item]}\t1.0\t{position}\t{label}\n")
    _require_targets(dataset.path, written)
    return np.flatnonzero(is_touched), np.flatnonzero(~is_touched), masked


def _write_features(embeddings: Location, column: str, item_ids: list[str], file: Path, normalize: bool) -> np.ndarray:
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
            "a mean vector that can replace a missing one",
            "give every item a vector, or use vectors that are not centred",
        )
    for start in range(0, len(item_ids), _ROWS):
        rows = vectors[start : start + _ROWS]
        rows[~found[start : start + _ROWS]] = mean
        if normalize:
            rows[:] = unit_rows(rows)
    vectors.flush()  # type: ignore[attr-defined]
    return found


def write_repeats(folder: Path, repeats: Sequence[Repeat]) -> None:
    """Write the list of targets that MMRec masks."""
    with (folder / REPEATS_FILE).open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["user_id", schema.ITEM_ID, "split"])
        rows.writerows(map(cell, (repeat.user, repeat.item, repeat.split)) for repeat in repeats)


def count_repeats(folder: Path) -> int:
    """Return how many targets a written folder lists as masked."""
    file = folder / REPEATS_FILE
    if not file.is_file():
        return 0
    with file.open(encoding="utf-8", newline="") as lines:
        return sum(1 for _ in csv.reader(lines)) - 1


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
