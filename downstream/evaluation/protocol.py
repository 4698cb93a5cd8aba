"""The evaluation protocol of both tasks: which items are ranked for each user, and which metrics are reported.

Every user's held-out item is ranked twice: among the stored candidates of each seed, which are the same for every
model, and in the whole catalogue without the user's earlier items. Of several held-out items (the temporal split) that
is the first, the one that came next; recall, NDCG and precision then count all of them in the catalogue. Task 1 passes
vectors (`rank_vectors`), Task 2 the scores of a recommender, block by block (`Rankings.add`). This module counts,
averages and makes the tables.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from vlm2rec.downstream.evaluation import metrics
from vlm2rec.downstream.options import TailOver
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset, Histories, Split

_LETTERS = {schema.FUSED: "f", schema.TEXT: "t", schema.IMAGE: "v"}
# user view → item view: each view against the fused items (Fig. 1a), and each modality against itself
_PAIRS = (
    (schema.FUSED, schema.FUSED),
    (schema.TEXT, schema.FUSED),
    (schema.IMAGE, schema.FUSED),
    (schema.TEXT, schema.TEXT),
    (schema.IMAGE, schema.IMAGE),
)


def pair_name(user: str, item: str) -> str:
    """Return the name of ranking by two views, such as `v2f`: users by their image vectors, items by the fused."""
    return f"{_LETTERS[user]}2{_LETTERS[item]}"


PAIRS = tuple(pair_name(user, item) for user, item in _PAIRS)
SAME_VIEW = {pair_name(view, view): view for view in schema.VIEWS}  # the pairs of a view with itself
Views = dict[str, np.ndarray]  # view → (n, d) float32
PerUser = dict[str, np.ndarray]  # metric → (U,) float64


class Average(NamedTuple):
    """How figures of several candidate seeds become one: the mean, and the spread with n - 1 in the denominator."""

    mean: Callable[[Sequence[float]], float]
    spread: Callable[[Sequence[float]], float]


# Each task keeps the arithmetic of its first figures, so that they can be reproduced to the last digit.
_IN_FLOAT64 = Average(lambda values: float(np.mean(values)), lambda values: float(np.std(values, ddof=1)))
_EXACT = Average(statistics.mean, statistics.stdev)


class RankingTask:
    """What is ranked: each user's target, candidates, and the items that the full ranking leaves out.

    Args:
        dataset: a dataset folder.
        split: which held-out item is the target.
        seeds: seeds of the stored candidates; empty takes all, None takes none, for the full ranking alone.
        tail_over: which interactions decide whether a target is of the long tail; see `item_frequency`.
    """

    def __init__(
        self, dataset: Dataset, split: Split = "test", seeds: Sequence[int] | None = (), tail_over: TailOver = "train"
    ) -> None:
        self.user_ids, self._items = dataset.user_ids, len(dataset.item_ids)
        self.seeds = [] if seeds is None else list(seeds) or dataset.candidate_seeds
        self.negatives = {seed: dataset.negatives(seed) for seed in self.seeds}  # (U, N) each
        self.targets = dataset.histories(split).targets  # (U,)
        self.tail_over = tail_over
        self.tail = metrics.tail_users(item_frequency(dataset, tail_over), self.targets)  # (U,) bool
        self.cold = dataset.train_frequency()[self.targets] == 0  # (U,) bool: nothing was learned about the target's id
        self.seen, self.offsets = metrics.seen_items(dataset.known_sequences(split))
        self.sets = (
            TargetSets(*dataset.targets(split), self.seen, self.offsets) if dataset.has_several_targets else None
        )

    def random_order(self) -> dict[str, dict[str, float]]:
        """Return the means that a random order has, `candidates` and `full`: expectations, with nothing drawn."""
        users = len(self.targets)
        rivals = np.full(users, next(iter(self.negatives.values())).shape[1])
        found = {
            "candidates": metrics.expected_metrics(np.zeros(users, np.int64), rivals),
            "full": metrics.random_order(self._items, self.targets, self.seen, self.offsets),
        }
        return {among: metrics.mean_over_users(of_users) for among, of_users in found.items()}

    def about_targets(self) -> dict[str, int]:
        """Return the key of metrics.json that tells how many targets there are, if users have several."""
        return {} if self.sets is None else {"targets": len(self.sets.rows)}


class TargetSets:
    """All targets of every user, for a split with several of them.

    Each counts once, however often the user has it, and none is left out of the ranking, though it may occur earlier.

    Args:
        rows: the targets, with repeats.
        offsets: user u has `rows[offsets[u]:offsets[u + 1]]`, (U + 1,).
        seen: what the ranking leaves out unless it is a target.
        starts: the offsets of that.
    """

    def __init__(self, rows: np.ndarray, offsets: np.ndarray, seen: np.ndarray, starts: np.ndarray) -> None:
        user = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        seen_by = np.repeat(np.arange(len(offsets) - 1), np.diff(starts))
        width = max(rows.max(initial=0), seen.max(initial=0)) + 1
        pairs = np.unique(user * width + rows)
        self.users, self.rows = np.divmod(pairs, width)  # (T,) each
        self.offsets = np.searchsorted(self.users, np.arange(len(offsets)))
        others = ~np.isin(seen_by * width + seen, pairs)
        self._seen = seen[others]
        self._starts = np.searchsorted(seen_by[others], np.arange(len(offsets)))

    def seen(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what the ranking leaves out for some users, who may occur several times, as (rows, offsets)."""
        return metrics.repeated_lists(self._seen, self._starts, users)

    def counts(self, part: slice, scores: np.ndarray) -> metrics.Counts:
        """Count the rivals of the targets of some users, by their scores of every item, (users, I)."""
        of_part = slice(self.offsets[part.start], self.offsets[part.stop])
        users, rows = self.users[of_part], self.rows[of_part]
        found = []
        for start in range(0, len(rows), len(scores)):  # as many rows at a time as there are
            block = slice(start, start + len(scores))
            rivals = scores[users[block] - part.start]
            found.append(metrics.counts_among_all(rivals, rows[block], *self.seen(users[block])))
        return metrics.Counts(*(np.concatenate(each) for each in zip(*found, strict=True)))


class Rankings:
    """The per-user metrics of one scorer."""

    def __init__(self, task: RankingTask, average: Average = _EXACT) -> None:
        self.task, self._average = task, average
        self._blocks: dict[int | None, list[PerUser]] = {seed: [] for seed in (*task.seeds, None)}
        self._sets: list[PerUser] = []

    def add(self, part: slice, scores: np.ndarray) -> None:
        """Rank some users by their scores of every item, (users, I); column i is row i of `items.parquet`."""
        task, targets = self.task, self.task.targets[part]
        users = np.arange(len(targets))
        for seed, rows in task.negatives.items():
            found = metrics.user_metrics(scores[users, targets], scores[users[:, None], rows[part]])
            self._blocks[seed].append(found)
        offsets = task.offsets[part.start : part.stop + 1]
        seen = task.seen[offsets[0] : offsets[-1]]
        counts = metrics.counts_among_all(scores, targets, seen, offsets - offsets[0])
        self._blocks[None].append(metrics.expected_metrics(*counts))
        if task.sets is not None:
            ends = task.sets.offsets[part.start : part.stop + 1]
            self._sets.append(metrics.set_metrics(*task.sets.counts(part, scores), ends - ends[0]))

    def add_vectors(self, users: np.ndarray, items: np.ndarray) -> None:
        """Rank all users by the dot products of their vectors, (U, d), with the items', (I, d)."""
        task = self.task
        for seed, rows in task.negatives.items():
            scores = metrics.candidate_scores(users, items, task.targets, rows)
            self._blocks[seed].append(metrics.user_metrics(*scores))
        counts = metrics.full_ranking_counts(users, items, task.targets, task.seen, task.offsets)
        self._blocks[None].append(metrics.expected_metrics(*counts))
        if (sets := task.sets) is not None:
            counts = metrics.full_ranking_counts(users[sets.users], items, sets.rows, *sets.seen(sets.users))
            self._sets.append(metrics.set_metrics(*counts, sets.offsets))

    def users(self, seed: int | None) -> PerUser:
        """Return the metrics of every user among the candidates of a seed, or in the catalogue (None)."""
        blocks = self._blocks[seed]
        return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}

    def retrieval(self) -> PerUser:
        """Return recall, NDCG and precision at 20 of every user over all targets; empty if there is one each."""
        return {name: np.concatenate([block[name] for block in self._sets]) for name in (self._sets or [{}])[0]}

    def means(self) -> dict[str, Any]:
        """Return `candidates` and `candidates_std` (over seeds, n - 1 in the denominator), `full`, `tail`, `cold`.

        With several targets of a user also `retrieval`, which counts them all.
        """
        of_seed = [metrics.mean_over_users(self.users(seed)) for seed in self.task.seeds]
        values = {name: [means[name] for means in of_seed] for name in of_seed[0]}
        mean, spread = self._average
        found = {
            "candidates": {name: mean(each) for name, each in values.items()},
            "candidates_std": {name: spread(each) if len(each) > 1 else 0.0 for name, each in values.items()},
            "full": metrics.mean_over_users(self.users(None)),
            "tail": self._tail(),
            "cold": self._group(self.task.cold),
        }
        if self.task.sets is not None:
            found[schema.RETRIEVAL] = metrics.mean_over_users(self.retrieval())
        for among in ("candidates", "full"):
            # no ranking can break the bound: that would be a bug
            assert metrics.bound_check(found[among]), f"{among} breaks the N@20 - N@10 bound: {found[among]}"
        return found

    def _tail(self) -> dict[str, Any]:
        over = self.task.tail_over
        about = {"below": metrics.TAIL, **({} if over == "train" else {"over": over})}
        return about | self._group(self.task.tail)

    def _group(self, users: np.ndarray) -> dict[str, Any]:
        """Return how many `users` (U,) bool there are, and their means; the means are empty if there are none."""
        of_seed = [metrics.group_means(self.users(seed), users) for seed in self.task.seeds]
        return {
            "users": int(users.sum()),
            "candidates": {name: self._average.mean([means[name] for means in of_seed]) for name in of_seed[0]},
            "full": metrics.group_means(self.users(None), users),
        }

    def tables(self, view: str | None = None) -> list[pa.Table]:
        """Return the rows of `users.parquet`: a table for each candidate seed, and one of the full ranking, last."""
        return [self._table(seed, view) for seed in self._blocks]

    def _table(self, seed: int | None, view: str | None) -> pa.Table:
        count = len(self.task.user_ids)
        columns = {
            schema.USER_ID: pa.array(self.task.user_ids, pa.string()),
            "protocol": pa.array(["full" if seed is None else "candidates"] * count, pa.string()),
            schema.SEED: pa.array([seed] * count, pa.int32()),
            "view": pa.array([view] * count, pa.string()),
        }
        found: dict[str, Any] = {**self.users(seed)}
        for name, values in self.retrieval().items():
            found[f"{schema.RETRIEVAL}_{name}"] = values if seed is None else [None] * count
        return pa.table(columns | {name: pa.array(values, pa.float64()) for name, values in found.items()})


def rank_scorer(
    dataset: Dataset,
    seeds: Sequence[int],
    blocks: Iterable[tuple[slice, np.ndarray]],
    tail_over: TailOver = "train",
) -> tuple[dict[str, Any], list[pa.Table]]:
    """Rank each user's test item by the scores of a recommender (Task 2), and by popularity beside it.

    Popularity is how often an item occurs in the training sequences.

    Args:
        dataset: a dataset folder.
        seeds: candidate seeds; empty takes all stored ones.
        blocks: (users, scores (users, I)) for all users; column i is row i of `items.parquet`.
        tail_over: which interactions decide what the long tail is.

    Returns:
        (keys of metrics.json, tables for users.parquet).
    """
    task = RankingTask(dataset, "test", seeds, tail_over)
    rankings, popular = Rankings(task), Rankings(task)
    frequency = dataset.train_frequency().astype(np.float32)
    for part, scores in blocks:
        rankings.add(part, scores)
        popular.add(part, np.broadcast_to(frequency, scores.shape))
    means = rankings.means()
    retrieval = means.pop(schema.RETRIEVAL, None) or metrics.retrieval_metrics(means["full"])
    ours = means | {schema.RETRIEVAL: retrieval, "seeds": task.seeds, "popularity": popular.means()}
    return ours | task.about_targets(), rankings.tables()


def rank_vectors(task: RankingTask, users: Views, items: Views) -> dict[str, Rankings]:
    """Rank by vectors (Task 1): `f2f`, `t2f`, ..., for every pair of views that users and items have.

    Args:
        task: what is ranked.
        users: unit vectors of the users by view, (U, d) each.
        items: unit vectors of the items by view, (I, d) each, in the order of `items.parquet`.
    """
    found = {}
    for user_view, item_view in _PAIRS:
        # one modality cannot be compared with a concatenation, which is longer
        if {user_view, item_view} <= {*users} and users[user_view].shape[1] == items[item_view].shape[1]:
            rankings = found[pair_name(user_view, item_view)] = Rankings(task, _IN_FLOAT64)
            rankings.add_vectors(users[user_view], items[item_view])
    return found


def item_frequency(dataset: Dataset, over: TailOver) -> np.ndarray:
    """Return how often each item occurs, (I,): in the training sequences, or (`all`) with the held-out items.

    SDA's code counts all interactions, the target itself among them, so it calls fewer items tail.
    """
    return dataset.train_frequency() if over == "train" else dataset.frequency()


def mean_of_history(items: np.ndarray, histories: Histories) -> np.ndarray:
    """Return the mean of each history's item vectors, (U, d): the user vector of item-only embedders (§5.1.3)."""
    sums = np.add.reduceat(items[histories.rows], histories.offsets[:-1], axis=0)
    return np.asarray(sums / np.diff(histories.offsets)[:, None], np.float32)
