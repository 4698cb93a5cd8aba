"""The first k items of each user, best first, with or without those of the history.

A search gives more items than k, as many more as the user has seen, and what was seen is dropped. Of equal scores, the
item that stands first in the catalogue comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import faiss
import numpy as np

from vlm2rec.downstream.index.index import ItemIndex

_MAX_SCORES = 2**24  # float32 scores in memory at a time: 64 MB


class Search(Protocol):
    """Finds the items of n users; `users` are positions among those that it was made for."""

    def best(self, users: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return catalogue rows (n, count) int64, -1 where there are fewer, and scores (n, count), best first."""


class Top(NamedTuple):
    """The items of n users, one user after the other."""

    counts: np.ndarray  # (n,) how many items each has
    rows: np.ndarray  # (sum of counts,) rows of the catalogue
    scores: np.ndarray  # (sum of counts,) float32


@dataclass(frozen=True)
class ExactSearch:
    """Cosines with every item, block by block."""

    users: np.ndarray  # (n, d) unit vectors
    items: np.ndarray  # (m, d) unit vectors
    rows: np.ndarray  # (m,) int64, their rows in the catalogue

    def best(self, users: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Search`."""
        width = min(count, len(self.items))
        scores, found = faiss.knn(self.users[users], self.items, width, metric=faiss.METRIC_INNER_PRODUCT)
        return self.rows[found], scores


@dataclass(frozen=True)
class IndexSearch:
    """Cosines by an index, which may miss an item; its `recall@10` says how often."""

    users: np.ndarray  # (n, d)
    index: ItemIndex
    rows: np.ndarray  # (items of the index,) int64, their rows in the catalogue

    def best(self, users: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Search`."""
        found, scores = self.index.search(self.users[users], count)
        return np.where(found >= 0, self.rows[found], -1), scores


def with_direction(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (n, d) float32 vectors at length 1, and which of them have a direction, (n,) bool."""
    with np.errstate(invalid="ignore"):
        lengths = np.linalg.norm(vectors, axis=1)
    good = np.isfinite(lengths) & (lengths > 0)
    return np.divide(vectors, lengths[:, None], out=np.zeros_like(vectors), where=good[:, None]), good


def top_items(search: Search, histories: Sequence[np.ndarray], k: int, total: int, *, keep_seen: bool) -> Top:
    """Return the first k items of n users.

    Args:
        search: finds the items of users 0 to n - 1.
        histories: rows of the catalogue that each user has seen.
        k: at most this many items for each user.
        total: items in the catalogue.
        keep_seen: whether items of the history are recommended.
    """
    seen = [np.empty(0, np.int64) if keep_seen else np.unique(history).astype(np.int64) for history in histories]
    # users with histories of about one length search together, for as many items as they need
    spare = np.array([0 if not len(rows) else 1 << (len(rows) - 1).bit_length() for rows in seen], np.int64)
    chosen: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for extra in np.unique(spare):
        users = np.flatnonzero(spare == extra)
        width = min(k + int(extra), total)
        step = max(1, _MAX_SCORES // max(width, 1))
        for start in range(0, len(users), step):
            block = users[start : start + step]
            rows, scores = _in_order(*search.best(block, width))
            keep = _unseen(rows, [seen[user] for user in block], total)
            keep &= keep.cumsum(axis=1) <= k
            for place, user in enumerate(block):
                chosen[int(user)] = rows[place][keep[place]], scores[place][keep[place]]
    ordered = [chosen[user] for user in range(len(histories))]
    nothing = np.empty(0, np.int64)
    return Top(
        np.array([len(rows) for rows, _ in ordered], np.int64),
        np.concatenate([nothing, *(rows for rows, _ in ordered)]),
        np.concatenate([np.empty(0, np.float32), *(scores for _, scores in ordered)]),
    )


def _in_order(rows: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort each user's items by falling score, equal ones by their rows."""
    by_row = np.argsort(rows, axis=1, kind="stable")
    rows, scores = np.take_along_axis(rows, by_row, 1), np.take_along_axis(scores, by_row, 1)
    order = np.argsort(np.where(rows < 0, np.inf, -scores), axis=1, kind="stable")
    return np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)


def _unseen(rows: np.ndarray, seen: Sequence[np.ndarray], total: int) -> np.ndarray:
    """Return which of the items found, (n, width), exist and are not of the user's history."""
    keys = np.concatenate([np.empty(0, np.int64), *(place * total + each for place, each in enumerate(seen))])
    found = rows + total * np.arange(len(rows))[:, None]
    places = np.searchsorted(keys, found)  # the keys are sorted
    known = keys[np.minimum(places, len(keys) - 1)] == found if len(keys) else np.zeros(found.shape, bool)
    return np.asarray((rows >= 0) & ~known)
