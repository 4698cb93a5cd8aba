"""SLMRec (Tao et al., TMM 2022), with its task of alignment (FAC), as MMRec has it for text and image.

    u_m, i_m = LightGCN(users, item vectors of m), for m = id, v (W_v f_v + b_v) and t (W_t f_t + b_t)
    u = A [u_id ; u_v ; u_t] + a;   i = B [i_id ; i_v ; i_t] + b;   score(u, i) = u · i
    loss = InfoNCE(û, î; temperature) + ssl_weight · (InfoNCE(G1 i_id, G2 i_v) + InfoNCE(G4 G3 G1 i_id, G5 i_t))

Vectors f have length 1, û and î as well; the two terms of the alignment are dot products over `ssl_temperature`.
Negatives are the other rows of the batch. MMRec's code scores by σ(u · i), which orders items alike, and names a weight
`reg` that it does not use. Its optimiser has a weight decay of 1e-4.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm2rec.downstream.multimodal.data import Interactions
from vlm2rec.downstream.multimodal.graphs import Graph, both_ways, light_gcn, symmetric
from vlm2rec.downstream.multimodal.losses import in_batch_info_nce
from vlm2rec.downstream.multimodal.model import Model
from vlm2rec.downstream.multimodal.settings import Settings
from vlm2rec.embedder.contract import schema

_EPSILON = 1e-8
_IMAGE, _TEXT = schema.IMAGE, schema.TEXT


class SLMRec(Model):
    """See the module."""

    def __init__(
        self, settings: Settings, interactions: Interactions, features: Mapping[str, Tensor], device: torch.device
    ) -> None:
        unit = {view: F.normalize(features[view], dim=1) for view in (_IMAGE, _TEXT)}
        super().__init__(settings, interactions, unit, device)
        width = settings.hidden_size
        self.linear = nn.ModuleDict({view: _layer(self.features.dim(view), width) for view in unit})
        self.fuse_users, self.fuse_items = _layer(3 * width, width), _layer(3 * width, width)
        self.id_to_image, self.image_to_id = _layer(width, width), _layer(width, width)
        self.to_text_first = _layer(width, width)
        self.to_text_second, self.text_to_id = _layer(width, width // 2), _layer(width, width // 2)
        self._graph = Graph(symmetric(both_ways(interactions.matrix()), _EPSILON), device)

    def loss(self, users: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        """See `Model`; its negatives are the other rows of the batch."""
        of_users, of_items = self._propagate()
        own = of_items.index_select(0, positives)
        unit_users = F.normalize(self.fuse_users(of_users.index_select(0, users)), dim=1)
        unit_items = F.normalize(self.fuse_items(own), dim=1)
        main = in_batch_info_nce(unit_users, unit_items, self.settings.temperature)
        if not self.settings.ssl_weight:
            return main
        return main + self.settings.ssl_weight * self._align(*own.chunk(3, 1))

    @torch.no_grad()
    def vectors(self) -> tuple[Tensor, Tensor]:
        """See `Model`."""
        users, items = self._propagate()
        return self.fuse_users(users), self.fuse_items(items)

    def _propagate(self) -> tuple[Tensor, Tensor]:
        """Return [id ; image ; text] of all users and items, (U, 3 · width) and (I, 3 · width), in one LightGCN."""
        projected = [self.features.project(view, self.linear[view]) for view in (_IMAGE, _TEXT)]
        nodes = torch.cat([self.users.repeat(1, 3), torch.cat([self.items, *projected], 1)])
        users, items = light_gcn(self._graph, nodes, self.settings.graph_layers).split(
            [self.user_count, self.item_count]
        )
        return users, items

    def _align(self, ids: Tensor, images: Tensor, texts: Tensor) -> Tensor:
        """Return the loss of the alignment for (B, width) each: ids with images, then both with texts."""
        with_image = self.id_to_image(ids)
        with_text = self.to_text_second(self.to_text_first(with_image))
        temperature = self.settings.ssl_temperature
        return in_batch_info_nce(with_image, self.image_to_id(images), temperature) + in_batch_info_nce(
            with_text, self.text_to_id(texts), temperature
        )


def _layer(width: int, out: int) -> nn.Linear:
    layer = nn.Linear(width, out)
    nn.init.xavier_uniform_(layer.weight)
    return layer
