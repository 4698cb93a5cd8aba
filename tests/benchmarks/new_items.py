"""A dataset in which some items are new: nobody has them before the item to be predicted.

    python tests/benchmarks/new_items.py --data DATA --out NEW [--share 0.2] [--seed 0]
    vlm2rec study --config tests/benchmarks/study_new_items.yaml --data NEW --backbone BB --out STUDY

DATA is a folder of `vlm2rec prepare`. A share of its items, drawn by the seed, is new. Every other user, in the order
of the dataset, ends with the last new item that comes after four items that are not new; what comes after is left out.
All users lose every other interaction with a new item. So half of the users ask for an item that no recommender was
trained on, and the other half for one that it was. NEW is prepared from these interactions with `--core 1`.

Prints how many users ask for a new item, and NDCG@20 among the candidates of seed 0 by chance and by popularity in
training, for new targets and for the others.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import polars as pl

from vlm2rec.downstream.evaluation.metrics import mean_over_users, user_metrics
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.pipelines import prepare
from vlm2rec.pipelines.config import PrepareConfig
from vlm2rec.pipelines.synthetic.drawn_catalogue import draw_catalogue

BEFORE = 4  # items that are not new before the new one: three to train on and one to validate


def main() -> None:
    """Make the dataset and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="dataset folder; without one, a drawn one shows that it works")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Dataset(chosen.data or drawn(Path(folder)))
        interactions = Path(folder) / "new.parquet"
        with_new_items(data, chosen.share, chosen.seed).write_parquet(interactions)
        out = chosen.out or Path(folder) / "new"
        prepare.run(
            PrepareConfig(
                items=data.path / "items.parquet",
                interactions=interactions,
                images=data.image_root if data.has_images else None,
                require=("image", "title") if data.has_images else ("title",),
                core=1,
                out=out,
            )
        )
        describe(Dataset(out))


def drawn(folder: Path) -> Path:
    """Draw a small dataset and return its folder."""
    draw_catalogue(folder / "shop", products=200, users=80)
    shop = folder / "shop"
    prepare.run(
        PrepareConfig(
            items=shop / "items.parquet",
            interactions=shop / "interactions.parquet",
            images=shop / "images",
            out=folder / "data",
            core=2,
        )
    )
    return folder / "data"


def with_new_items(data: Dataset, share: float, seed: int) -> pl.DataFrame:
    """Return the interactions of a dataset in which a share of its items is new; see the module."""
    count = len(data.item_ids)
    is_new = np.zeros(count, bool)
    is_new[np.random.default_rng(seed).choice(count, round(share * count), replace=False)] = True
    targets, _ = data.targets("test")
    rows: dict[str, list[str] | list[int]] = {"user_id": [], "item_id": [], "timestamp": []}
    for number, (user, known, target) in enumerate(
        zip(data.user_ids, data.known_sequences("test"), targets, strict=True)
    ):
        kept = history(np.append(known, target), is_new, asks_for_new=number % 2 == 0)
        rows["user_id"] += [user] * len(kept)
        rows["item_id"] += [data.item_ids[row] for row in kept]
        rows["timestamp"] += list(range(len(kept)))
    return pl.DataFrame(rows)


def history(sequence: np.ndarray, is_new: np.ndarray, asks_for_new: bool) -> list[int]:
    """Return what is kept of a user's items, in time: (n,) rows of items, of which at most the last is new."""
    kept = [row for row in sequence if not is_new[row]]
    if asks_for_new:
        before = np.cumsum(~is_new[sequence])
        places = np.flatnonzero(is_new[sequence] & (before >= BEFORE))
        if len(places):
            return [*kept[: before[places[-1]]], sequence[places[-1]]]
    return kept


def describe(data: Dataset) -> None:
    """Print the table of chance and popularity."""
    targets, _ = data.targets("test")
    seen = data.train_frequency()
    others = data.negatives(0)
    popular = user_metrics(seen[targets], seen[others])
    chance = user_metrics(np.zeros(len(targets)), np.zeros(others.shape))
    is_new = seen[targets] == 0
    print(
        f"{is_new.sum():,} of {len(targets):,} users ask for an item that is new; {(seen == 0).sum():,} items are new"
    )
    print("| target | users | chance, N@20 | popularity, N@20 |\n|---|---|---|---|")
    for name, group in (("new", is_new), ("not new", ~is_new)):
        figures = [
            mean_over_users({name: of_users[group] for name, of_users in each.items()}) for each in (chance, popular)
        ]
        print(f"| {name} | {group.sum():,} | {figures[0]['N@20']:.3f} | {figures[1]['N@20']:.3f} |")


if __name__ == "__main__":
    main()
