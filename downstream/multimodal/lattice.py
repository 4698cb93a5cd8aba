"""LATTICE (Zhang et al., MM 2021): an item graph of raw and of learned vectors, built anew each epoch.

    w = softmax(weights of the views);   x_m = W_m f_m + b_m
    raw     S = Σ_m w_m L(kNN(cos f_m)),   learned  T = L(Σ_m w_m kNN(cos x_m)),   L(A) = D^-1/2 A D^-1/2
    h = (0.9 S + 0.1 T) · id;   e_u, e_i = LightGCN(D^-1 (A + 1));   score(u, i) = e_u · (e_i + h_i / ‖h_i‖)
    loss = BPR + regularisation / 2 · (‖e_u‖² + ‖i‖² + ‖j‖²) / batch size

kNN keeps the cosines of an item's nearest, itself among them. As in the published code the graph is built in the first
batch of an epoch, which alone gives W, b and w a gradient, and once more for the ranking; the learning rate falls by
4 % in 50 epochs. A row whose sum is not positive, of which the code would make NaN, has no neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm2rec.downstream.multimodal.data import Interactions
from vlm2rec.downstream.multimodal.graphs import (
    Graph,
    both_ways,
    inverse_root,
    light_gcn,
    nearest,
    neighbour_matrix,
    with_itself,
)
from vlm2rec.downstream.multimodal.losses import bpr
from vlm2rec.downstream.multimodal.model import Model
from vlm2rec.downstream.multimodal.settings import Settings

_RAW = 0.9  # share of the raw graph
_EDGES = 2**18  # edges whose cosines are computed at a time


@dataclass(frozen=True)
class _Neighbours:
    """The item graph of one view: its places and its entries before L, in the order of the graph."""

    graph: Graph
    cosines: Tensor  # (E,)


class LATTICE(Model):
    """See the module."""

    rate_decay = 0.96 ** (1 / 50)

    def __init__(
        self, settings: Settings, interactions: Interactions, features: Mapping[str, Tensor], device: torch.device
    ) -> None:
        super().__init__(settings, interactions, features, device)
        self.linear = nn.ModuleDict(
            {view: nn.Linear(self.features.dim(view), settings.hidden_size) for view in features}
        )
        self.view_weights = nn.Parameter(torch.full((len(features),), 0.5))
        self._raw = {view: _raw_graph(vectors, settings.neighbours, device) for view, vectors in features.items()}
        self._graph = Graph(with_itself(both_ways(interactions.matrix())), device)
        self._item_graph: Graph | None = None  # of this epoch, once its first batch has built it

    def begin_epoch(self, generator: np.random.Generator) -> None:
        """Have the first batch build the item graph anew."""
        self._item_graph = None

    def loss(self, users: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        """See `Model`."""
        if self._item_graph is None:
            learned = self._learned()
            averaged = self._average(learned)
            self._item_graph = Graph(self._fixed(learned), self.device)
        else:
            averaged = self._item_graph.product(self.items)
        all_users, all_items = self._propagate(averaged)
        of_users = all_users.index_select(0, users)
        liked, others = all_items.index_select(0, positives), all_items.index_select(0, negatives)
        squares = sum((each**2).sum() for each in (of_users, liked, others)) / 2
        weight = self.settings.regularisation / self.settings.batch_size
        return bpr(of_users, liked, others) + weight * squares

    @torch.no_grad()
    def vectors(self) -> tuple[Tensor, Tensor]:
        """See `Model`."""
        return self._propagate(self._average(self._learned()))

    def _propagate(self, averaged: Tensor) -> tuple[Tensor, Tensor]:
        nodes = light_gcn(self._graph, torch.cat([self.users, self.items]), self.settings.graph_layers)
        users, items = nodes.split([self.user_count, self.item_count])
        return users, items + F.normalize(averaged, dim=1)

    def _learned(self) -> dict[str, _Neighbours]:
        """Return the graph of the projected vectors of each view; the cosines have a gradient."""
        found = {}
        for view in self.features.views:
            unit = F.normalize(self.features.project(view, self.linear[view]), dim=1)
            graph = Graph(neighbour_matrix(nearest(unit, self.settings.neighbours)[1]), self.device)
            parts = zip(graph.rows.split(_EDGES), graph.columns.split(_EDGES), strict=True)
            cosines = torch.cat([(unit[rows] * unit[columns]).sum(1) for rows, columns in parts])
            found[view] = _Neighbours(graph, cosines)
        return found

    def _average(self, learned: Mapping[str, _Neighbours]) -> Tensor:
        """Return h, (I, width): what the neighbours' ids are on average."""
        shares = self._shares()
        scale = self._scale(learned, shares)[:, None]
        raw = sum(shares[view] * graph.product(self.items) for view, graph in self._raw.items())
        scaled = scale * self.items
        new = sum(shares[view] * each.graph.product(scaled, each.cosines) for view, each in learned.items())
        return _RAW * raw + (1 - _RAW) * scale * new

    def _shares(self) -> dict[str, Tensor]:
        """Return w of each view; one view alone has all."""
        shares = torch.softmax(self.view_weights, 0)
        return dict(zip(self.features.views, shares.unbind(), strict=True))

    def _scale(self, learned: Mapping[str, _Neighbours], shares: Mapping[str, Tensor]) -> Tensor:
        """Return D^-1/2 of the learned graph, (I,)."""
        sums = torch.zeros(self.item_count, device=self.device)
        for view, each in learned.items():
            sums = sums.index_add(0, each.graph.rows, shares[view] * each.cosines)
        return inverse_root(sums)

    @torch.no_grad()
    def _fixed(self, learned: Mapping[str, _Neighbours]) -> scipy.sparse.csr_matrix:
        """Return 0.9 S + 0.1 T as one matrix, for the other batches of the epoch."""
        shares = self._shares()
        scale = scipy.sparse.diags(self._scale(learned, shares).cpu().double().numpy())
        raw = sum(float(shares[view]) * graph.matrix() for view, graph in self._raw.items())
        new = sum(float(shares[view]) * each.graph.matrix(each.cosines) for view, each in learned.items())
        return (_RAW * raw + (1 - _RAW) * (scale @ new @ scale)).tocsr()


def _raw_graph(vectors: Tensor, neighbours: int, device: torch.device) -> Graph:
    """Return L(kNN(cos f)) of one view."""
    cosines, rows = nearest(vectors, neighbours)
    scale = scipy.sparse.diags(inverse_root(cosines.double().sum(1)).cpu().numpy())
    return Graph((scale @ neighbour_matrix(rows, cosines) @ scale).tocsr(), device)
