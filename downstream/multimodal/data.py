"""What the multimodal models train on: pairs of a user and an item, and the items' vectors."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from vlm2rec.downstream.multimodal.settings import Settings
from vlm2rec.downstream.table import read_items, unit_rows
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import DataError

_ROUNDS = 20  # of drawing negatives anew; who still has none then knows nearly all items


class Interactions:
    """The training interactions of a dataset folder; users and items are rows of its tables.

    Negatives come from the items that somebody has in training, as in MMRec, and never from the user's own.

    Args:
        dataset: a dataset folder.

    Raises:
        ArtifactError: there is no user, or one without a training item.
    """

    def __init__(self, dataset: Dataset) -> None:
        sequences = dataset.trained_sequences()
        self.items = np.concatenate(sequences).astype(np.int64)  # (R,)
        self.users = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])  # (R,)
        self.user_count, self.item_count = len(sequences), len(dataset.item_ids)
        self.known = np.unique(self.users * self.item_count + self.items)  # each pair once, sorted
        self.pool = np.unique(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def matrix(self) -> scipy.sparse.csr_matrix:
        """Return the pairs as a matrix of ones, (U, I); a pair that occurs twice is one."""
        users, items = np.divmod(self.known, self.item_count)
        ones = np.ones(len(self.known))
        return scipy.sparse.csr_matrix((ones, (users, items)), (self.user_count, self.item_count))

    def batches(self, size: int, generator: np.random.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (users, items, negatives), (size,) int64 each, of all interactions in a random order."""
        order = generator.permutation(len(self))
        negatives = self.negatives(self.users[order], generator)
        for start in range(0, len(order), size):
            part = order[start : start + size]
            yield (
                torch.from_numpy(self.users[part]),
                torch.from_numpy(self.items[part]),
                torch.from_numpy(negatives[start : start + size]),
            )

    def negatives(self, users: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Draw an item for each of `users` that the user does not have in training, uniformly, (R,) int64.

        Raises:
            DataError: a user has every item.
        """
        drawn = self.pool[generator.integers(len(self.pool), size=len(users))]
        again = np.flatnonzero(self._is_known(users, drawn))
        for _ in range(_ROUNDS):
            if not len(again):
                return drawn
            drawn[again] = self.pool[generator.integers(len(self.pool), size=len(again))]
            again = again[self._is_known(users[again], drawn[again])]
        for row in again:
            drawn[row] = generator.choice(self._unknown(int(users[row])))
        return drawn

    def _is_known(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        pairs = users * self.item_count + items
        places = np.searchsorted(self.known, pairs)
        return np.asarray(self.known[np.minimum(places, len(self.known) - 1)] == pairs)

    def _unknown(self, user: int) -> np.ndarray:
        """Return the items that a user does not have: of those in training, or else of all."""
        for items in (self.pool, np.arange(self.item_count)):
            free = items[~self._is_known(np.full(len(items), user), items)]
            if len(free):
                return free
        raise DataError(
            f"the user in row {user} of {schema.SEQUENCES_FILE} has all {self.item_count} items in training",
            "an item that can be a negative",
            "leave out this user, or add items",
        )


def read_features(settings: Settings, item_ids: list[str]) -> tuple[dict[str, Tensor], int]:
    """Return the vectors of each chosen view, (I, d) float32, and how many vectors were filled.

    `--missing mean` fills with the mean of the view's vectors, `random` with a random direction of their mean length.
    With `--normalize`, every vector then gets length 1; one of zeros stays.

    Raises:
        ArtifactError: as `read_items`.
    """
    manifest = schema.read_manifest(settings.embeddings)
    generator = np.random.default_rng(settings.seed)
    filled, features = np.zeros(len(item_ids), bool), {}
    for view in settings.features:
        vectors = np.zeros((len(item_ids), schema.dims_of(manifest)[view]), np.float32)
        needed = settings.missing == "error"
        found = read_items(settings.embeddings, view, item_ids, vectors, all_needed=needed, advice="--missing mean")
        if settings.missing == "mean":
            vectors[~found] = vectors.sum(0, dtype=np.float64) / found.sum()
        elif settings.missing == "random":
            drawn = generator.standard_normal((int((~found).sum()), vectors.shape[1]))
            length = np.linalg.norm(vectors, axis=1).sum() / found.sum()
            vectors[~found] = drawn * (length / np.maximum(np.linalg.norm(drawn, axis=1, keepdims=True), 1e-12))
        filled |= ~found
        if settings.normalize:
            vectors = unit_rows(vectors)
        features[view] = torch.from_numpy(vectors)
    return features, int(filled.sum())
