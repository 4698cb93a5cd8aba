"""FREEDOM (Zhou and Shen, MM 2023): a frozen item graph, and a graph of interactions that is pruned anew each epoch.

The item graph joins each item with its nearest by the cosine of raw vectors in each view, itself among them:

    S = image_weight · S_image + (1 - image_weight) · S_text,   S_m = D^-1/2 A_m D^-1/2 with entries of 1

An epoch trains on a share 1 - pruning of the interactions, drawn without replacement with weight 1 / √(deg u · deg i):
those of popular items go first. All interactions are there for the ranking.

    e_u, e_i = LightGCN(pruned graph);   h = S · id;   score(u, i) = e_u · (e_i + h_i)
    loss = BPR(e_u, e_i + h_i) + regularisation · Σ_m BPR(e_u, W_m f_m,i + b_m)

MMRec's code trains the vectors f that W projects, too, while the graph keeps the raw ones: that is `--mode init`. Here
frozen is the default: vectors are what is compared, and a large table needs a quarter of the memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn

from vlm2rec.downstream.multimodal.data import Interactions
from vlm2rec.downstream.multimodal.graphs import Graph, both_ways, light_gcn, nearest, neighbour_matrix, symmetric
from vlm2rec.downstream.multimodal.losses import bpr
from vlm2rec.downstream.multimodal.model import Model, distinct
from vlm2rec.downstream.multimodal.settings import Settings
from vlm2rec.embedder.contract import schema

_EPSILON = 1e-7  # beside every degree, as in the published code


class FREEDOM(Model):
    """See the module."""

    def __init__(
        self, settings: Settings, interactions: Interactions, features: Mapping[str, Tensor], device: torch.device
    ) -> None:
        super().__init__(settings, interactions, features, device)
        self.item_graph = Graph(item_matrix(features, settings.neighbours, settings.image_weight), device)
        self.linear = nn.ModuleDict(
            {view: nn.Linear(self.features.dim(view), settings.hidden_size) for view in features}
        )
        self._pairs = interactions.matrix().tocoo()
        self.whole_graph = Graph(normalised(self._pairs), device)
        self._graph = self.whole_graph

    def begin_epoch(self, generator: np.random.Generator) -> None:
        """Prune the graph of interactions anew."""
        if self.settings.pruning:
            kept = kept_edges(self._pairs, self.settings.pruning, generator)
            self._graph = Graph(normalised(_part(self._pairs, kept)), self.device)

    def loss(self, users: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        """See `Model`."""
        all_users, all_items = self._propagate(self._graph)
        of_users = all_users.index_select(0, users)
        rows, places = distinct(self.item_count, positives, negatives)
        total = bpr(of_users, all_items.index_select(0, positives), all_items.index_select(0, negatives))
        if self.settings.regularisation:
            for view in self.features.views:
                seen = self.linear[view](self.features.of(view, rows))
                of_view = bpr(of_users, *(seen.index_select(0, each) for each in places))
                total = total + self.settings.regularisation * of_view
        return total

    @torch.no_grad()
    def vectors(self) -> tuple[Tensor, Tensor]:
        """See `Model`."""
        return self._propagate(self.whole_graph)

    def _propagate(self, graph: Graph) -> tuple[Tensor, Tensor]:
        nodes = light_gcn(graph, torch.cat([self.users, self.items]), self.settings.graph_layers)
        users, items = nodes.split([self.user_count, self.item_count])
        return users, items + self.item_graph.product(self.items)


def item_matrix(features: Mapping[str, Tensor], neighbours: int, image_weight: float) -> scipy.sparse.csr_matrix:
    """Return the frozen item graph S, (I, I); of one view, if there is only one."""
    weights = {schema.IMAGE: image_weight, schema.TEXT: 1 - image_weight} if len(features) > 1 else {}
    parts = []
    for view, vectors in features.items():
        _, rows = nearest(vectors, neighbours)
        parts.append(weights.get(view, 1.0) * symmetric_rows(neighbour_matrix(rows)))
    return sum(parts[1:], parts[0]).tocsr()


def symmetric_rows(matrix: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """Return D^-1/2 A D^-1/2 with the rows' sums on both sides, though A is not symmetric: the published code's."""
    return symmetric(matrix, _EPSILON)


def normalised(pairs: scipy.sparse.coo_matrix) -> scipy.sparse.csr_matrix:
    """Return D^-1/2 A D^-1/2 of the graph of interactions, (U + I, U + I)."""
    return symmetric(both_ways(pairs), _EPSILON)


def kept_edges(pairs: scipy.sparse.coo_matrix, pruning: float, generator: np.random.Generator) -> np.ndarray:
    """Return the places of the interactions that an epoch keeps, ⌊(1 - pruning) · E⌋ of them, but at least one.

    Each is drawn without replacement with weight 1 / √(deg u · deg i): the smallest of exponential variables divided by
    the weights are such a draw.
    """
    users, items = (np.bincount(each) + _EPSILON for each in (pairs.row, pairs.col))
    roots = np.sqrt(users[pairs.row] * items[pairs.col])  # 1 / weight
    count = max(1, int(pairs.nnz * (1 - pruning)))
    if count >= pairs.nnz:
        return np.arange(pairs.nnz)
    return np.sort(np.argpartition(generator.exponential(size=pairs.nnz) * roots, count)[:count])


def _part(pairs: scipy.sparse.coo_matrix, places: np.ndarray) -> scipy.sparse.coo_matrix:
    return scipy.sparse.coo_matrix((pairs.data[places], (pairs.row[places], pairs.col[places])), pairs.shape)
