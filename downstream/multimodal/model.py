"""What the multimodal models have in common."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from vlm2rec.downstream.multimodal.data import Interactions
from vlm2rec.downstream.multimodal.settings import Settings

ROWS = 8192  # items projected at a time


class Model(nn.Module):
    """A recommender whose score is the dot product of a user's and an item's vector.

    It has a trained row for every user, `users` (U, user_width), one for every item, `items` (I, width), and the items'
    vectors, `features`.

    Args:
        settings: of the run.
        interactions: what it trains on.
        features: the items' vectors by view, (I, d) float32 each.
        device: where it computes.
        user_width: length of a user's row. Default: the settings' width, which is that of an item's.
    """

    rate_decay = 1.0  # factor of the learning rate after each epoch

    def __init__(
        self,
        settings: Settings,
        interactions: Interactions,
        features: Mapping[str, Tensor],
        device: torch.device,
        user_width: int | None = None,
    ) -> None:
        super().__init__()
        self.settings, self.device = settings, device
        self.user_count, self.item_count = interactions.user_count, interactions.item_count
        # in this order, and before anything of a model's own: a seed's random numbers depend on it
        self.users = table(self.user_count, user_width or settings.hidden_size)
        self.items = table(self.item_count, settings.hidden_size)
        self.features = Features(features, settings.mode == "init")

    def begin_epoch(self, generator: np.random.Generator) -> None:
        """Prepare what holds for one epoch."""

    def loss(self, users: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        """Return the loss of a batch of rows of users and items, (B,) each."""
        raise NotImplementedError

    def vectors(self) -> tuple[Tensor, Tensor]:
        """Return the vectors of all users (U, d) and all items (I, d), without a gradient."""
        raise NotImplementedError


class Features(nn.Module):
    """The items' vectors of each view, frozen or trained.

    Frozen vectors are no part of the state: a checkpoint holds what was trained. With `--mode init` the vectors are
    parameters that start from them, as in MMRec's FREEDOM and LATTICE.
    """

    def __init__(self, features: Mapping[str, Tensor], trained: bool) -> None:
        super().__init__()
        self.views = tuple(features)
        for view, vectors in features.items():
            if trained:
                self.register_parameter(view, nn.Parameter(vectors.clone()))
            else:
                self.register_buffer(view, vectors, persistent=False)

    def __getitem__(self, view: str) -> Tensor:
        """Return the vectors of a view, (I, d)."""
        return getattr(self, view)

    def dim(self, view: str) -> int:
        """Return the length of a view's vectors."""
        return int(self[view].shape[1])

    def of(self, view: str, rows: Tensor) -> Tensor:
        """Return the vectors of some items in a view, (B, d)."""
        return self[view].index_select(0, rows)

    def project(self, view: str, layer: nn.Module) -> Tensor:
        """Return the layer's output for all vectors of a view, block by block."""
        return torch.cat([layer(block) for block in self[view].split(ROWS)])


def distinct(count: int, *rows: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the different rows among some (B,) of `count`, (R,), and where each of those stands among them.

    A batch names an item many times, and its long vector is projected once. Marks in a list of all rows take a fraction
    of the time of sorting the batch.
    """
    every = torch.cat(rows)
    named = torch.zeros(count, dtype=torch.bool, device=every.device)
    named[every] = True
    found = named.nonzero()[:, 0]
    places = torch.empty(count, dtype=torch.long, device=every.device)
    places[found] = torch.arange(len(found), device=every.device)
    return found, places[every].split([len(each) for each in rows])


def table(rows: int, width: int) -> nn.Parameter:
    """Return a trained table whose start is Xavier's uniform distribution."""
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(rows, width)))
