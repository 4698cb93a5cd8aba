"""Training samples: (a user's history, the next item), from training sequences only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from vlm2rec.embedder.contract.errors import ConfigError, DataError
from vlm2rec.embedder.options import SamplesMode

_NOTHING = np.empty(0, np.int32)


class Sample(NamedTuple):
    """One user at one moment. Items are rows of `items.parquet`."""

    user: int
    history: np.ndarray  # (h,), oldest first, h >= 1
    target: int
    negatives: np.ndarray = _NOTHING  # (K,) hard negatives, -1 where there are fewer than K


class HardSource(Protocol):
    """Tells which items are hard negatives of a user whose next item is `target`."""

    @property
    def most(self) -> int:
        """How many a user has in a step at most, K."""

    def of(self, user: int, history: np.ndarray, target: int, own: np.ndarray) -> np.ndarray:
        """Return item rows, without the target and the items of `own`.

        Args:
            user: row of `sequences.parquet`.
            history: (h,) item rows before the target.
            target: item row.
            own: (n,) all training items of the user.

        Returns:
            (m,) distinct rows. If the source has an order, best first and m <= K; else all, of which K are drawn.
        """


class Samples:
    """A sequence of `Sample`s over users' training sequences.

    `last` takes each user's last item as target, `random` another position each epoch (the same for equal seed and
    epoch), `all` every position. Histories are cut to the last `max_history` items. A user with one training item has
    no history to learn from and is left out; `skipped` counts these users.

    Args:
        sequences: item rows of every user's training sequence, oldest first.
        max_history: longest history.
        mode: which positions become targets.
        users: take this many users at random (few-shot); 0 takes all.
        seed: seed of the draw of users and of random positions.
    """

    def __init__(
        self,
        sequences: Sequence[np.ndarray],
        max_history: int,
        mode: SamplesMode = "last",
        users: int = 0,
        seed: int = 0,
    ) -> None:
        self._sequences, self._max_history = sequences, max_history
        self._mode: SamplesMode = mode
        self._seed, self._epoch = seed, 0
        self.hard: HardSource | None = None  # where hard negatives come from
        usable = np.array([user for user, items in enumerate(sequences) if len(items) >= 2], np.int64)
        self.skipped = len(sequences) - len(usable)
        if len(usable) == 0:
            raise DataError(
                f"none of {len(sequences)} users has two training items", "histories to learn from", "lower --core"
            )
        if users > len(usable):
            raise ConfigError(
                f"--users {users}, but only {len(usable)} users can be trained on",
                f"at most {len(usable)}",
                "lower --users",
            )
        if users:
            usable = np.sort(np.random.default_rng([seed, 1]).choice(usable, users, replace=False))
        self.users = usable
        # (user, position of the target); position -1 is drawn again in each epoch
        if mode == "all":
            self._moments = [(int(u), p) for u in usable for p in range(1, len(sequences[u]))]
        else:
            self._moments = [(int(u), len(sequences[u]) - 1 if mode == "last" else -1) for u in usable]

    def __len__(self) -> int:
        return len(self._moments)

    def __getitem__(self, index: int) -> Sample:
        user, position = self._moments[index]
        items = self._sequences[user]
        if position < 0:
            position = int(np.random.default_rng([self._seed, 2, self._epoch, user]).integers(1, len(items)))
        history, target = items[max(0, position - self._max_history) : position], int(items[position])
        return Sample(user, history, target, self._negatives(user, history, target, position))

    def _negatives(self, user: int, history: np.ndarray, target: int, position: int) -> np.ndarray:
        if self.hard is None:
            return _NOTHING
        found = self.hard.of(user, history, target, self._sequences[user])
        if len(found) > self.hard.most:
            generator = np.random.default_rng([self._seed, 6, self._epoch, user, position])
            found = generator.choice(found, self.hard.most, replace=False)
        padded = np.full(self.hard.most, -1, np.int32)
        padded[: len(found)] = found
        return padded

    def targets(self) -> np.ndarray:
        """Return the items that are targets in some epoch, (T,) distinct rows in rising order."""
        moments: Sequence[np.ndarray] = [
            self._sequences[user][1:] if position < 0 else self._sequences[user][position : position + 1]
            for user, position in self._moments
        ]
        return np.unique(np.concatenate(moments))

    def summary(self) -> dict[str, str]:
        """Return the row of a run's summary that names the training data."""
        return {"users": f"{len(self.users)}, {len(self)} samples an epoch, {self.skipped} users too short"}

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, which decides the positions of `random`."""
        self._epoch = epoch
