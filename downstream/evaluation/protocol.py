"""The evaluation protocol of both tasks: who is ranked among whom, and what is said of it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from vlm2rec.downstream.evaluation import metrics as ranking
from vlm2rec.downstream.evaluation.metrics import (
    candidate_scores,
    expected_metrics,
    full_ranking_counts,
    mean_over_users,
    seen_items,
    user_metrics,
)
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset, Histories, Split


class _Task:
    """What is ranked for whom: each user's target, candidates, and items that the full ranking leaves out."""

    def __init__(self, folder: Dataset, negatives: Mapping[int, np.ndarray]) -> None:
        self.user_ids = folder.user_ids
        self.negatives = negatives
        self.targets = folder.histories("test").targets
        self.tail = ranking.tail_users(folder.train_frequency(), self.targets)
        self.seen, self.offsets = ranking.seen_items(folder.train_sequences(), folder.histories("valid").targets)


class _Rankings:
    """Collects per-user metrics of one scorer, block by block."""

    def __init__(self, task: _Task) -> None:
        self.task = task
        self.blocks: dict[int | None, list[dict[str, np.ndarray]]] = {seed: [] for seed in (*task.negatives, None)}

    def add(self, part: slice, scores: np.ndarray) -> None:
        targets = self.task.targets[part]
        users = np.arange(len(targets))
        for seed, rows in self.task.negatives.items():
            metrics = ranking.user_metrics(scores[users, targets], scores[users[:, None], rows[part]])
            self.blocks[seed].append(metrics)
        offsets = self.task.offsets[part.start : part.stop + 1]
        seen = self.task.seen[offsets[0] : offsets[-1]]
        counts = ranking.counts_among_all(scores, targets, seen, offsets - offsets[0])
        self.blocks[None].append(ranking.expected_metrics(*counts))

    def users(self, seed: int | None) -> dict[str, np.ndarray]:
        blocks = self.blocks[seed]
        return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}

    def means(self) -> dict[str, Any]:
        """Return `candidates` and `candidates_std` (over seeds, n - 1 in the denominator), `full`, and the `tail`'s."""
        of_seed = [ranking.mean_over_users(self.users(seed)) for seed in self.task.negatives]
        values = {name: [means[name] for means in of_seed] for name in of_seed[0]}
        return {
            "candidates": {name: statistics.mean(each) for name, each in values.items()},
            "candidates_std": {name: statistics.stdev(each) if len(each) > 1 else 0.0 for name, each in values.items()},
            "full": ranking.mean_over_users(self.users(None)),
            "tail": self._tail(),
        }

    def _tail(self) -> dict[str, Any]:
        """Return the means over the users whose target is an item of the long tail; empty where there are none."""
        tail = self.task.tail
        of_seed = [ranking.tail_means(self.users(seed), tail) for seed in self.task.negatives]
        return {
            "below": ranking.TAIL,
            "users": int(tail.sum()),
            "candidates": {name: statistics.mean(means[name] for means in of_seed) for name in of_seed[0]},
            "full": ranking.tail_means(self.users(None), tail),
        }

    def tables(self) -> list[pa.Table]:
        return [self._table(seed) for seed in self.blocks]

    def _table(self, seed: int | None) -> pa.Table:
        count = len(self.task.user_ids)
        columns = {
            schema.USER_ID: pa.array(self.task.user_ids, pa.string()),
            "protocol": pa.array(["full" if seed is None else "candidates"] * count, pa.string()),
            schema.SEED: pa.array([seed] * count, pa.int32()),
            "view": pa.nulls(count, pa.string()),
        }
        return pa.table(columns | {name: pa.array(values) for name, values in self.users(seed).items()})


CUTOFF_NAMES = ("H@10", "H@20", "N@10", "N@20")
_LETTERS = {schema.FUSED: "f", schema.TEXT: "t", schema.IMAGE: "v"}
# user view → item view: what the fused item is found by (Fig. 1a), and each modality by itself
PAIRS = (
    (schema.FUSED, schema.FUSED),
    (schema.TEXT, schema.FUSED),
    (schema.IMAGE, schema.FUSED),
    (schema.TEXT, schema.TEXT),
    (schema.IMAGE, schema.IMAGE),
)
Views = dict[str, np.ndarray]  # view → (n, d) float32 unit vectors
PerUser = dict[str, np.ndarray]  # metric → (U,)


def mean_of_history(items: np.ndarray, histories: Histories) -> np.ndarray:
    """Return the mean of each history's item vectors, (U, d): the user vector of item-only embedders (§5.1.3)."""
    sums = np.add.reduceat(items[histories.rows], histories.offsets[:-1], axis=0)
    return np.asarray(sums / np.diff(histories.offsets)[:, None], np.float32)


def _pairs(views: Views) -> list[tuple[str, str, str]]:
    """Return name, user view and item view of what can be ranked; a part is not compared with a concatenation."""
    there = [(u, i) for u, i in PAIRS if u in views and i in views]
    return [(f"{_LETTERS[u]}2{_LETTERS[i]}", u, i) for u, i in there if views[u].shape[1] == views[i].shape[1]]


def _rank_candidates(
    dataset: Dataset, histories: Histories, users: Views, items: Views, seeds: list[int]
) -> dict[str, dict[int, PerUser]]:
    """Return per-user metrics by pair and candidate seed."""
    result: dict[str, dict[int, PerUser]] = {}
    for seed in seeds:
        negatives = dataset.negatives(seed)
        for pair, user_view, item_view in _pairs(users):
            scores = candidate_scores(users[user_view], items[item_view], histories.targets, negatives)
            result.setdefault(pair, {})[seed] = user_metrics(*scores)
    return result


def _rank_catalogue(
    split: Split, dataset: Dataset, histories: Histories, users: Views, items: Views
) -> dict[str, PerUser]:
    """Return per-user metrics by pair among all items the user had not touched before the target."""
    later = [] if split == "valid" else [dataset.histories("valid").targets]
    seen = seen_items(dataset.train_sequences(), *later)
    return {
        pair: expected_metrics(*full_ranking_counts(users[user_view], items[item_view], histories.targets, *seen))
        for pair, user_view, item_view in _pairs(users)
    }


def _over_seeds(by_seed: dict[int, PerUser], statistic: Any) -> dict[str, float]:
    means = [mean_over_users(values) for values in by_seed.values()]
    return {name: float(statistic([row[name] for row in means])) for name in CUTOFF_NAMES}


def _tail_over_seeds(by_seed: dict[int, PerUser], tail: np.ndarray) -> dict[str, float]:
    if not tail.any():
        return {}
    of_tail = {seed: {name: v[tail] for name, v in values.items()} for seed, values in by_seed.items()}
    return _over_seeds(of_tail, np.mean)


def _std(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _users_table(
    user_ids: list[str],
    seeds: list[int],
    by_candidates: dict[str, dict[int, PerUser]],
    by_catalogue: dict[str, PerUser],
) -> pa.Table:
    blocks = [
        users_block(user_ids, "candidates", seed, pair, values[seed])
        for pair, values in by_candidates.items()
        for seed in seeds
    ]
    blocks += [users_block(user_ids, "full", None, pair, values) for pair, values in by_catalogue.items()]
    return pa.concat_tables(blocks)


def users_block(user_ids: list[str], protocol: str, seed: int | None, view: str | None, values: PerUser) -> pa.Table:
    """Return one ranking's rows of `users.parquet`."""
    count = len(user_ids)
    return pa.table(
        {
            schema.USER_ID: pa.array(user_ids, pa.string()),
            "protocol": pa.array([protocol] * count, pa.string()),
            schema.SEED: pa.array([seed] * count, pa.int32()),
            "view": pa.array([view] * count, pa.string()),
            **{name: pa.array(values[name], pa.float64()) for name in CUTOFF_NAMES},
        }
    )
