"""NoteLLM-2's training: items that users had one after the other get similar vectors.

An item is one prompt, its image before its text. Two states of it are trained: the one after the image (the visual
vector) and the one at the end (the item's vector). Both can be fused with what the vision tower saw (`late_fusion`).
A user is the mean of the history's item vectors: there is no prompt for a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import DataError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.item_features import ItemFeatures
from vlm2rec.embedder.training.losses import LearnedTemperature, Log, contrastive, cosines, require
from vlm2rec.embedder.training.train import Model

_USERS_AT_ONCE = 100_000  # whose pairs are in memory together


# --- which items occur together -------------------------------------------------------------------------------
class Related(NamedTuple):
    """Pairs of items, as rows of `items.parquet`, ordered by the first, then by score from the highest."""

    first: np.ndarray  # (P,) int64
    second: np.ndarray  # (P,) int64
    score: np.ndarray  # (P,) float64


def related_items(sequences: Sequence[np.ndarray], window: int, most: int) -> Related:
    """Return each item's related items: those that users had soon after it, at most `most`.

        score(A → B) = Σ 1/N_u    over the users u that had B within `window` items after A

    with N_u the number of different items in the user's training sequence, so that one who takes everything counts
    less. The paper's window is a week, but a dataset folder holds the order of interactions alone.

    Args:
        sequences: item rows of every user's training sequence, oldest first.
        window: how many items later B may come.
        most: related items of an item; the smaller row comes first if scores are equal.
    """
    keys: np.ndarray = np.empty(0, np.int64)
    score: np.ndarray = np.empty(0)
    items = max((int(own.max()) for own in sequences if len(own)), default=0) + 1
    for start in range(0, len(sequences), _USERS_AT_ONCE):
        new_keys, new_score = _scores(sequences[start : start + _USERS_AT_ONCE], window, items)
        keys, index = np.unique(np.concatenate([keys, new_keys]), return_inverse=True)
        score = np.bincount(index, np.concatenate([score, new_score]), minlength=len(keys))
    first, second = keys // items, keys % items
    order = np.lexsort((second, -score, first))
    first, second, score = first[order], second[order], score[order]
    rank = np.arange(len(first)) - np.searchsorted(first, first)  # among the pairs of the same first item
    return Related(first[rank < most], second[rank < most], score[rank < most])


def _scores(sequences: Sequence[np.ndarray], window: int, items: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of some users, A · items + B, and the sum of 1/N_u of each, where a user counts once."""
    rows = np.concatenate([np.empty(0, np.int64), *sequences]).astype(np.int64)
    users = np.repeat(np.arange(len(sequences)), [len(own) for own in sequences])
    distinct = np.bincount(np.unique(users * items + rows) // items, minlength=len(sequences))
    found = [np.empty((2, 0), np.int64)]
    for step in range(1, window + 1):
        a, b = rows[:-step], rows[step:]
        kept = (users[:-step] == users[step:]) & (a != b)
        found.append(np.stack([users[:-step][kept], a[kept] * items + b[kept]]))
    pairs = np.unique(np.concatenate(found, axis=1), axis=1)
    keys, index = np.unique(pairs[1], return_inverse=True)
    return keys, np.bincount(index, 1 / distinct[pairs[0]], minlength=len(keys))


class ItemPair(NamedTuple):
    """Two related items, as rows of `items.parquet`."""

    first: int
    second: int


class PairSamples(Sequence[ItemPair]):
    """Every item that has related ones, each with one of them, drawn by its score anew in each epoch.

    Args:
        sequences: item rows of every user's training sequence, oldest first; nothing else of a user is read.
        window: how many items later a related item may come.
        most: related items of an item.
        seed: seed of the draws, which depend on it, the epoch and the item alone.

    Raises:
        DataError: fewer than two items have related ones.
    """

    users: tuple[int, ...] = ()  # the samples are items

    def __init__(self, sequences: Sequence[np.ndarray], window: int, most: int, seed: int = 0) -> None:
        self._related = related_items(sequences, window, most)
        self._rows, self._starts = np.unique(self._related.first, return_index=True)
        self._ends = np.append(self._starts[1:], len(self._related.first))
        self._seed, self._epoch = seed, 0
        if len(self._rows) < 2:
            raise DataError(
                f"in the training sequences of {len(sequences)} users, {len(self._rows)} items have a related item",
                "two or more such items: items that users took soon after one another",
                "prepare a dataset with longer histories",
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        row, own = int(self._rows[index]), slice(self._starts[index], self._ends[index])
        random = np.random.default_rng([self._seed, 7, self._epoch, row])
        score = self._related.score[own]
        return ItemPair(row, int(random.choice(self._related.second[own], p=score / score.sum())))

    def summary(self) -> dict[str, str]:
        """Return the row of a run's summary that names the training data."""
        return {"items": f"{len(self)} with related ones, {len(self._related.first)} pairs"}

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, which decides what is drawn."""
        self._epoch = epoch


# --- the model and its loss -----------------------------------------------------------------------------------
class PairModel(Model):
    """An encoder with an adapter and, by its settings, a late fusion, and the contrast of related items.

    For one process. The arguments are those of `Model`.
    """

    loss: PairContrast

    def __init__(
        self, encoder: ItemEncoder, wrapped: nn.Module, items: ItemFeatures, loss: nn.Module, chunk_users: int = 0
    ) -> None:
        super().__init__(encoder, wrapped, items, loss, chunk_users)
        self.late_fusion = encoder.late_fusion

    @property
    def adapted(self) -> list[nn.Parameter]:
        """The trained parameters of the adapter and of the late fusion."""
        return [*super().adapted, *(self.late_fusion.parameters() if self.late_fusion else ())]

    def collate(self, batch: list[ItemPair]) -> dict[str, Any]:
        """Return the rows of the `first` and the `second` items."""
        first, second = zip(*batch, strict=True)
        return {"first": torch.tensor(first), "second": torch.tensor(second)}

    def named(self, batch: dict[str, Any]) -> str:
        """Return the pairs, as rows of `items.parquet`."""
        pairs = list(zip(batch["first"].tolist(), batch["second"].tolist(), strict=True))
        return f"pairs of items (rows of items.parquet) {pairs}"

    def forward(  # type: ignore[override]
        self, first: Tensor, second: Tensor, with_gradients: bool = False
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
        """Return the loss of a batch of pairs, values to log, and no alignment, as there is one prompt for both.

        Args:
            first: (N,) item rows.
            second: (N,) rows of their related items.
            with_gradients: not used.
        """
        rows = torch.cat([first, second])
        distinct, index = rows.unique(return_inverse=True)
        encoded = self.in_chunks(self._read, distinct.tolist())
        total, log = self.loss({view: vectors[index] for view, vectors in encoded.items()}, rows)
        return total, {name: value.detach() for name, value in log.items()}, {}

    def _read(self, rows: Sequence[int]) -> dict[str, Tensor]:
        images = [features for (features,) in self.items.features([[row] for row in rows])]
        return self.encoder.read_items(self.items.titles(rows), images)


class PairContrast(nn.Module):
    """NoteLLM-2's loss of N pairs of items, over all 2N items of a batch.

        L(x) = mean over the 2N items i of −log( e^{s(x_i, x_i+)/τ} / Σ_j e^{s(x_i, x_j)/τ} ),   j ≠ i
        total = (L(visual vectors) + α·L(item vectors)) / (1 + α)

    s is cosine, i+ the item paired with i, τ learned. Without visual vectors the total is L(item vectors).

    Args:
        tau: where τ starts; keep its parameter out of weight decay.
        alpha: weight α of the item vectors.
    """

    def __init__(self, tau: float = 0.05, alpha: float = 9.0) -> None:
        super().__init__()
        require(alpha >= 0 and math.isfinite(alpha), f"multimodal_weight is {alpha}", "a finite number, 0 or above")
        self.temperature = LearnedTemperature(tau)
        self.alpha = alpha

    def forward(self, vectors: Mapping[str, Tensor], rows: Tensor) -> tuple[Tensor, Log]:
        """Return the loss, a scalar, and its parts for the curves.

        Args:
            vectors: `fused` and, if it is to be trained, `image`: (2N, d) each, the first items of the pairs, then the
                second ones.
            rows: integer ids of these items, (2N,). Equal ids, and an id equal to that of the paired item, are no
                negatives.
        """
        with torch.autocast(rows.device.type, enabled=False):
            partner = rows.roll(len(rows) // 2)  # (2N,)
            others = (partner[None, :] != rows[:, None]) & (partner[None, :] != partner[:, None])  # (2N, 2N)
            parts = {view: self._contrast(own, others) for view, own in vectors.items()}
        log: Log = {f"loss_{view}": part for view, part in parts.items()} if len(parts) > 1 else {}
        log |= {
            "effective_negatives": others.sum(dim=1).float().mean(),
            "own_cosine": cosines(vectors[schema.FUSED], vectors[schema.FUSED].roll(len(rows) // 2, 0)).diag().mean(),
            "tau": self.temperature(),
        }
        total = parts[schema.FUSED]
        if schema.IMAGE in parts:
            total = (parts[schema.IMAGE] + self.alpha * total) / (1 + self.alpha)
        return total, log

    def _contrast(self, vectors: Tensor, others: Tensor) -> Tensor:
        """Return L(x); column j holds the partner of item j, so that an item's own partner is on the diagonal."""
        similarity = cosines(vectors, vectors.roll(len(vectors) // 2, 0))
        return contrastive(similarity, others, self.temperature()).mean()
