"""VBPR (He and McAuley, AAAI 2016): users are matched with item ids and item vectors at once.

    score(u, i) = γ_u · [γ_i ; W f_i + b]
    loss = mean -log σ(score(u, i) - score(u, j)) + regularisation · (‖γ_u‖ + ‖e_i‖ + ‖e_j‖) / B

e is the item's whole vector, and each norm is that of the batch's matrix (Frobenius), not squared. f is text and image
end to end if both are there. As in MMRec's code there are no biases of items and of looks, which the paper has.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm2rec.downstream.multimodal.data import Interactions
from vlm2rec.downstream.multimodal.losses import bpr
from vlm2rec.downstream.multimodal.model import ROWS, Model, distinct
from vlm2rec.downstream.multimodal.settings import Settings


class VBPR(Model):
    """See the module."""

    def __init__(
        self, settings: Settings, interactions: Interactions, features: Mapping[str, Tensor], device: torch.device
    ) -> None:
        width = settings.hidden_size
        super().__init__(settings, interactions, features, device, 2 * width)
        self.linear = nn.Linear(sum(self.features.dim(view) for view in features), width)
        nn.init.xavier_normal_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def loss(self, users: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        """See `Model`."""
        rows, places = distinct(self.item_count, positives, negatives)
        items, of_users = self._items(rows), self.users.index_select(0, users)
        liked, others = (items.index_select(0, each) for each in places)
        lengths = sum(torch.linalg.vector_norm(each) for each in (of_users, liked, others))
        return bpr(of_users, liked, others) + self.settings.regularisation * lengths / len(users)

    @torch.no_grad()
    def vectors(self) -> tuple[Tensor, Tensor]:
        """See `Model`."""
        rows = torch.arange(self.item_count, device=self.device)
        return self.users.detach(), torch.cat([self._items(part) for part in rows.split(ROWS)])

    def _items(self, rows: Tensor) -> Tensor:
        """Return [γ_i ; W f_i + b] of some items, (B, 2 · width)."""
        # the product with text and image end to end, which would be one more table of long vectors
        weights = self.linear.weight.split([self.features.dim(view) for view in self.features.views], 1)
        parts = zip(self.features.views, weights, strict=True)
        seen = sum((F.linear(self.features.of(view, rows), weight) for view, weight in parts), self.linear.bias)
        return torch.cat([self.items.index_select(0, rows), seen], 1)
