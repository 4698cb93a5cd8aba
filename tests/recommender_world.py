"""A small dataset folder written by hand, for tests of recommenders: items follow one another in a fixed cycle."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from embedding_folder import write_embeddings

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset

ODD_IDS = ("007", "7", "NA", "null", "None", "nan", "a b", "", "[PAD]", 'q"uote', "tab\tid", "ünï", "1e5", "7.0")


def write_dataset(
    folder: Path,
    sequences: Sequence[Sequence[str]],
    item_ids: Sequence[str],
    *,
    user_ids: Sequence[str] | None = None,
    max_history: int = 5,
    candidates: int = 8,
    seeds: Sequence[int] = (0, 1),
    name: str = "by hand",
    held_out: Sequence[tuple[int, int]] = (),
) -> Path:
    """Write a dataset folder as `prepare` does, without pictures; `sequences` hold whole histories, oldest first.

    With `held_out`, each user's numbers of items to validate and to test, the split is temporal.
    """
    folder.mkdir(parents=True)
    users = list(user_ids) if user_ids is not None else [f"u{number}" for number in range(len(sequences))]
    pq.write_table(
        pa.table(
            {
                schema.ITEM_ID: pa.array(list(item_ids), pa.string()),
                schema.TITLE: pa.array([f"title {number}" for number in range(len(item_ids))]),
                schema.IMAGE_PATH: pa.array([f"{number}.png" for number in range(len(item_ids))]),
            }
        ),
        folder / schema.ITEMS_FILE,
    )
    split: dict[str, pa.Array] = {schema.USER_ID: pa.array(users, pa.string())}
    if held_out:
        cut = [
            (list(s[: -v - t]), list(s[-v - t : -t]), list(s[-t:]))
            for s, (v, t) in zip(sequences, held_out, strict=True)
        ]
        for part, lists in zip((schema.TRAIN, schema.VALID, schema.TEST), zip(*cut, strict=True), strict=True):
            split[part] = pa.array(list(lists), pa.list_(pa.string()))
    else:
        split[schema.TRAIN] = pa.array([list(s[:-2]) for s in sequences], pa.list_(pa.string()))
        split[schema.VALID] = pa.array([s[-2] for s in sequences], pa.string())
        split[schema.TEST] = pa.array([s[-1] for s in sequences], pa.string())
    pq.write_table(pa.table(split), folder / schema.SEQUENCES_FILE)
    drawn = []
    for seed in seeds:
        generator = np.random.default_rng(seed)
        for sequence in sequences:
            free = [item for item in item_ids if item not in set(sequence)]
            drawn.append([free[i] for i in generator.choice(len(free), candidates, replace=False)])
    pq.write_table(
        pa.table(
            {
                schema.USER_ID: pa.array(users * len(seeds), pa.string()),
                schema.SEED: pa.array(np.repeat(list(seeds), len(users)), pa.int32()),
                schema.NEGATIVES: pa.array(drawn, pa.list_(pa.string())),
            }
        ),
        folder / schema.NEGATIVES_FILE,
    )
    schema.write_json(
        folder / schema.DATASET_FILE,
        {
            "name": name,
            "image_root": "images",
            "max_history": max_history,
            "negatives": {"count": candidates, "seeds": list(seeds)},
            "counts": [],
            "users": len(users),
            "items": len(item_ids),
            "schema_version": schema.SCHEMA_VERSION,
            **({schema.SPLIT: schema.TEMPORAL} if held_out else {}),
        },
    )
    return folder


def cyclic_sequences(item_ids: Sequence[str], users: int, seed: int = 0, longest: int = 12) -> list[list[str]]:
    """Return sequences of distinct items in which item i is mostly followed by item i + 1: a model can learn that."""
    generator = np.random.default_rng(seed)
    count = len(item_ids)
    sequences = []
    for _ in range(users):
        place = int(generator.integers(count))
        sequence: list[int] = []
        for _ in range(int(generator.integers(4, longest + 1))):
            while place in sequence:
                place = (place + 1) % count
            sequence.append(place)
            place = (place + (1 if generator.random() < 0.9 else int(generator.integers(2, 5)))) % count
        sequences.append([item_ids[row] for row in sequence])
    return sequences


def write_atomic(folder: Path, name: str, sequences: Sequence[Sequence[str]], user_ids: Sequence[str]) -> Path:
    """Write RecBole's `name`/`name`.inter below `folder`, user by user in time order, and return `folder`."""
    (folder / name).mkdir(parents=True)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user, sequence in zip(user_ids, sequences, strict=True):
        lines += [f"{user}\t{item}\t{place}" for place, item in enumerate(sequence)]
    (folder / name / f"{name}.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def circle_vectors(count: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    """Return (count, dim) vectors on a circle with a large common offset: neighbours in the cycle look alike."""
    generator = np.random.default_rng(seed)
    angle = 2 * np.pi * np.arange(count) / count
    waves = np.stack([f(k * angle) for k in range(1, dim // 2 + 1) for f in (np.cos, np.sin)], 1)
    return (waves + 5 * generator.standard_normal(dim)).astype(np.float32)


def write_circle(folder: Path, item_ids: Sequence[str], users: int) -> tuple[Path, Path]:
    """Write a dataset whose users go round a circle of items, and vectors of the circle; return both folders."""
    data = write_dataset(folder / "data", cyclic_sequences(item_ids, users), item_ids, max_history=6, candidates=10)
    write_embeddings(folder / "embeddings", item_ids, circle_vectors(len(item_ids)))
    return data, folder / "embeddings"


def load_as_mmrec(folder: Path, name: str) -> tuple[pd.DataFrame, dict[str, np.ndarray], int, int]:
    """Load a dataset as MMRec does: by the keys of its YAML, with pandas and numpy."""
    config = yaml.safe_load((folder / f"{name}.yaml").read_text())
    columns = [config["USER_ID_FIELD"], config["ITEM_ID_FIELD"], "x_label"]
    frame = pd.read_csv(folder / config["inter_file_name"], usecols=columns, sep=config["field_separator"])
    features = {
        view: np.load(folder / config[f"{view}_feature_file"], allow_pickle=False)
        for view in ("vision", "text")
        if (folder / config[f"{view}_feature_file"]).is_file()
    }
    return frame, features, int(frame["userID"].max()) + 1, int(frame["itemID"].max()) + 1


def with_cold_items(folder: Path, to: Path, cold: Sequence[str] = ("cold", "colder", "coldest")) -> Path:
    """Copy a dataset folder, with items that nobody has touched first, in the middle and last."""
    shutil.copytree(folder, to)
    items = pq.read_table(to / schema.ITEMS_FILE)
    new = items.slice(0, len(cold)).set_column(0, schema.ITEM_ID, pa.array(cold, pa.string()))
    half = len(items) // 2
    parts = [new.slice(0, 1), items.slice(0, half), new.slice(1, 1), items.slice(half), new.slice(2)]
    pq.write_table(pa.concat_tables(part.cast(items.schema) for part in parts), to / schema.ITEMS_FILE)
    known = Dataset(folder)
    meta = {**known.meta, "image_root": str(known.image_root), "cold_items": len(cold)}
    schema.write_json(to / schema.DATASET_FILE, meta | {"items": len(items) + len(cold)})
    return to
