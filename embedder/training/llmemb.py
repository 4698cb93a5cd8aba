"""LLMEmb's training (SCFT): two texts of an item, from each of which attributes were dropped, get similar vectors.

Text only. What follows in its paper is downstream: principal components, two linear layers, and the alignment with a
trained table of ids. A user is the mean of the history's item vectors: there is no prompt for a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import DataError
from vlm2rec.embedder.prompts import listed_attributes
from vlm2rec.embedder.training.losses import LearnedTemperature, contrastive, cosines, other_items
from vlm2rec.embedder.training.train import Model


class TwoTexts(NamedTuple):
    """An item, as row of `items.parquet`, and two texts of it."""

    row: int
    first: str
    second: str


class AttributeSamples(Sequence[TwoTexts]):
    """Every item of a catalogue that has attributes, with two texts that are drawn again in each epoch.

    For each text the attributes are shuffled and the last ones dropped, as in LLMEmb's public code: ⌊n·ratio⌋ of the n
    that the item has. Where that is none, one is dropped, if there are two or more.

    Args:
        attributes: each item's attributes by name, without blank ones.
        ratio: share of the attributes to drop, from 0 to 1; one attribute always stays, and 0 only shuffles them.
        seed: seed of the draws, which depend on it, the epoch and the item alone.

    Raises:
        DataError: there are fewer than two items with an attribute, or no item has two.
    """

    users: tuple[int, ...] = ()  # no user's history is read

    def __init__(self, attributes: Sequence[Mapping[str, str]], ratio: float = 0.4, seed: int = 0) -> None:
        self._attributes, self._ratio, self._seed, self._epoch = attributes, ratio, seed, 0
        self._rows = [row for row, own in enumerate(attributes) if own]
        self._single = sum(len(attributes[row]) == 1 for row in self._rows)
        if len(self._rows) < 2 or self._single == len(self._rows):
            raise DataError(
                f"of {len(attributes)} items {len(self._rows)} have an attribute, and"
                f" {len(self._rows) - self._single} have two or more",
                "items with several attributes, of which some can be dropped",
                "name more columns with --item-text, or prepare a catalogue with categories or brands",
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        row = self._rows[index]
        random = np.random.default_rng([self._seed, 6, self._epoch, row])
        return TwoTexts(row, *(listed_attributes(self._drawn(row, random)) for _ in range(2)))

    def _drawn(self, row: int, random: np.random.Generator) -> dict[str, str]:
        own = self._attributes[row]
        order = [list(own)[place] for place in random.permutation(len(own))]
        return {name: own[name] for name in order[: len(own) - dropped(len(own), self._ratio)]}

    def summary(self) -> dict[str, str]:
        """Return the row of a run's summary that names the training data."""
        without = len(self._attributes) - len(self._rows)
        names = list(dict.fromkeys(name for own in self._attributes for name in own))
        notes = [f"{without} without an attribute are left out"] if without else []
        notes += [f"{self._single} have one alone, which is not dropped"] if self._single else []
        return {"items": "; ".join([f"{len(self)}, attributes {', '.join(names)}", *notes])}

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, which decides what is dropped."""
        self._epoch = epoch


def dropped(count: int, ratio: float) -> int:
    """Return how many of an item's `count` attributes are dropped from a text."""
    return min(count - 1, max(int(count * ratio), 1)) if ratio else 0


class AttributeModel(Model):
    """An encoder with an adapter, and the contrast of two texts of each item. For one process."""

    loss: TextContrast

    def collate(self, batch: list[TwoTexts]) -> dict[str, Any]:
        """Return the `rows` of the items, and the `first` and the `second` text of each."""
        rows, first, second = zip(*batch, strict=True)
        return {"rows": torch.tensor(rows, dtype=torch.int64), "first": list(first), "second": list(second)}

    def named(self, batch: dict[str, Any]) -> str:
        """Return the items, as rows of `items.parquet`."""
        return f"items (rows of items.parquet) {batch['rows'].tolist()}"

    def forward(  # type: ignore[override]
        self, rows: Tensor, first: Sequence[str], second: Sequence[str], with_gradients: bool = False
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
        """Return the loss of a batch of items, values to log, and no alignment, because there is one modality.

        Args:
            rows: (N,) item rows.
            first: a text of each item.
            second: another text of each item.
            with_gradients: not used.
        """
        vectors = self.encode_texts([*first, *second])[schema.FUSED]
        one, other = vectors.split(len(rows))
        total = self.loss(one, other, rows)
        with torch.no_grad():
            similarity = cosines(one, other)  # (N, N)
            own = torch.arange(len(rows), device=similarity.device)
            log = {
                "effective_negatives": other_items(rows).sum(dim=1).float().mean(),
                "own_text_first": (similarity.argmax(dim=1) == own).float().mean(),
                "own_cosine": similarity.diagonal().mean(),
                "tau": self.loss.temperature().detach().clone(),
            }
        return total, log, {}


class TextContrast(nn.Module):
    """SCFT's loss, InfoNCE in both directions between two texts of the same N items.

        ½ (InfoNCE(first → second) + InfoNCE(second → first)), with cosines divided by a learned τ

    Args:
        tau: where τ starts; keep its parameter out of weight decay.
    """

    def __init__(self, tau: float = 0.02) -> None:
        super().__init__()
        self.temperature = LearnedTemperature(tau)

    def forward(self, first: Tensor, second: Tensor, rows: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Args:
            first: vectors of one text of each item, (N, d).
            second: vectors of another text of each item, (N, d).
            rows: integer ids of the items, (N,); equal ids are never each other's negatives.
        """
        with torch.autocast(first.device.type, enabled=False):
            similarity, others = cosines(first, second), other_items(rows)
            tau = self.temperature()
            both = contrastive(similarity, others, tau), contrastive(similarity.T, others.T, tau)
            return 0.5 * (both[0].mean() + both[1].mean())
