"""Candidates: for every user and seed, items that the user never touched.

`prepare` stores those that the test item is ranked among. Validation has others, which are drawn when they are needed:
a checkpoint or a setting that is chosen by them knows nothing of the test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm2rec.embedder.contract.errors import DataError

VALIDATION_SEED = 1 << 32
"""Seed of the candidates of validation. The stored sets have 32-bit seeds, so none of them is of this one."""

_DRAWS_AT_ONCE = 1 << 15  # draws in one block of users: few enough to fit into the processor's cache


@dataclass(frozen=True)
class Sequences:
    """Each user's items in time order; user u has `items[offsets[u]:offsets[u + 1]]`, three or more."""

    items: np.ndarray  # (n,) int32
    offsets: np.ndarray  # (U + 1,) int64

    def __len__(self) -> int:
        return len(self.offsets) - 1


def draw_candidates(
    sequences: Sequences, users: range | np.ndarray, num_items: int, count: int, seed: int
) -> np.ndarray:
    """Draw uniformly, for each of `users`, `count` different items that the user never touched.

    (seed, u) fixes an endless stream of random items for user u. The first `count` new and untouched items of the
    stream are taken. This is uniform sampling without replacement, and does not depend on the blocks of users.

    Returns:
        (len(users), count) int32. Every user must have `count` untouched items.
    """
    wanted = np.asarray(users)
    expected = count * num_items / max(num_items - _median_length(sequences, wanted) - count / 2, num_items / 8)
    length = math.ceil(expected * 1.02) + 8  # enough for most users; it changes the speed, not the result
    drawn = np.empty((len(wanted), count), np.int32)
    waiting = np.arange(len(wanted))
    while len(waiting):
        block = max(1, _DRAWS_AT_ONCE // length)
        unfinished = []
        for start in range(0, len(waiting), block):
            part = waiting[start : start + block]
            stream = random_items(wanted[part], num_items, seed, length)
            enough, items = _first_new(sequences, wanted[part], stream, num_items, count)
            drawn[part[enough]] = items
            unfinished.append(part[~enough])
        waiting = np.concatenate(unfinished)
        length *= 2
    return drawn


def _median_length(sequences: Sequences, users: np.ndarray) -> float:
    return float(np.median(sequences.offsets[users + 1] - sequences.offsets[users])) if len(users) else 0.0


def _first_new(
    sequences: Sequences, users: np.ndarray, stream: np.ndarray, num_items: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Take from each row of `stream` (U, L) its first `count` different items that the user never touched.

    Returns:
        Which users have that many, (U,) bool; and the items of these users, (F, count) int32.
    """
    rows = np.arange(len(users))
    keys = np.sort((stream << 32) + np.arange(stream.shape[1]), axis=1)  # by item, then position in the stream
    items = (keys >> 32) + rows[:, None] * num_items  # ascending over all rows; each user has a number range
    new = np.ones(items.shape, bool)
    new[:, 1:] = items[:, 1:] != items[:, :-1]
    touched = np.sort(_touched(sequences, users, num_items))
    nearest = np.minimum(np.searchsorted(touched, items.ravel()), len(touched) - 1)
    new &= touched[nearest].reshape(items.shape) != items
    in_stream = np.empty(items.shape, bool)
    np.put_along_axis(in_stream, keys & 0xFFFFFFFF, new, axis=1)
    rank = np.cumsum(in_stream, axis=1, dtype=np.int32)
    enough = rank[:, -1] >= count
    chosen = (in_stream & (rank <= count))[enough]
    return enough, stream[enough][chosen].reshape(-1, count).astype(np.int32)


def _touched(sequences: Sequences, users: np.ndarray, num_items: int) -> np.ndarray:
    """Return row · num_items + item for every interaction of the user in each row of `users`."""
    first, lengths = sequences.offsets[users], sequences.offsets[users + 1] - sequences.offsets[users]
    inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return sequences.items[np.repeat(first, lengths) + inside] + np.repeat(np.arange(len(users)), lengths) * num_items


def random_items(users: np.ndarray, num_items: int, seed: int, length: int) -> np.ndarray:
    """Return the first `length` items of each user's stream, (U, length) int64, uniform on 0 … num_items - 1.

    SplitMix64 of (seed, user, position): any part of a stream can be computed alone, the same on every machine.
    """
    with np.errstate(over="ignore"):
        start = _mix(np.asarray(seed, np.uint64) * _GOLDEN + _GOLDEN)
        position = (users.astype(np.uint64)[:, None] << np.uint64(32)) + np.arange(length, dtype=np.uint64)
        bits = _mix(start + position * _GOLDEN)
    return ((bits >> np.uint64(11)) * (2.0**-53 * num_items)).astype(np.int64)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def untouched_counts(sequences: Sequences, num_items: int) -> np.ndarray:
    """Return how many of `num_items` items each user never touched, (U,) int64."""
    users = np.arange(len(sequences))
    touched = np.unique(_touched(sequences, users, num_items))
    return num_items - np.bincount(touched // num_items, minlength=len(users))


def draw_validation_candidates(
    train: Sequence[np.ndarray], targets: np.ndarray, users: np.ndarray, count: int
) -> np.ndarray:
    """Draw, for each of `users`, `count` different items that the user had not touched up to the validation item.

    Nothing of the test split decides them. An item is drawn only if it occurs in a training sequence or as a
    validation target. So a user's own test item may be among the user's candidates. A user's candidates are always the
    same, whatever other users are ranked.

    Args:
        train: every user's training sequence, as rows of the items.
        targets: every user's validation item, (U,).
        users: positions of the users to draw for.
        count: candidates of each; fewer are drawn, for all alike, if one of `users` has fewer untouched items.

    Returns:
        (len(users), at most count) int32, rows of the items.

    Raises:
        DataError: one of `users` has touched every item.
    """
    lengths = np.array([len(items) for items in train], np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths + 1)])
    rows = np.empty(offsets[-1], np.int64)
    last = np.zeros(len(rows), bool)
    last[offsets[1:] - 1] = True
    rows[~last], rows[last] = np.concatenate([np.empty(0, np.int64), *train]), targets
    known, items = np.unique(rows, return_inverse=True)
    sequences = Sequences(items.astype(np.int32), offsets)
    if len(known) - int(lengths[users].max(initial=0)) - 1 < count:  # a user may have fewer left, without repeats
        left = (len(known) - len(np.unique(items[offsets[user] : offsets[user + 1]])) for user in users)
        count = min([count, *left])
    if not count:
        raise DataError(
            f"a user has interacted with every one of the {len(known):,} items of training and validation",
            "items to rank the validation item among",
            "add items or users, or leave this user out",
        )
    return known[draw_candidates(sequences, users, len(known), count, VALIDATION_SEED)].astype(np.int32)
