"""SDA's training: items, not histories. Each step aligns the text and the image vectors of a batch of items.

The loss is `losses.ItemAlignment` (CMSA), the adapter MoDA (`moda`) or, as its ablation, plain LoRA. A user is the mean
of the history's item vectors: there is no prompt for a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlm2rec.embedder import moda, schema
from vlm2rec.embedder.backbone import Backbone
from vlm2rec.embedder.errors import DataError
from vlm2rec.embedder.gradients import TOTAL, Part, conflict, gradient_alignment
from vlm2rec.embedder.losses import ItemAlignment, cosines
from vlm2rec.embedder.pooling import norm_ratio
from vlm2rec.embedder.train import Model

PROBED = ("q_proj", "k_proj")
"""Projections of the last layer in which the paper compares the gradients of text and image."""


class ItemSamples(Sequence[int]):
    """Every item of a catalogue, as rows of `items.parquet`: their texts and images are known, bought or not."""

    def __init__(self, count: int) -> None:
        if count < 2:
            raise DataError(f"a catalogue of {count} items", "two or more, to hold against each other")
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return range(self._count)[index]

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: every epoch has all items."""


class ItemModel(Model):
    """An encoder with an adapter, and the alignment of a batch of items. For one process."""

    loss: ItemAlignment

    def collate(self, batch: list[int]) -> dict[str, Any]:
        """Return the `rows` of the items."""
        return {"rows": torch.tensor(batch, dtype=torch.int64)}

    def named(self, batch: dict[str, Any]) -> str:
        """Return the items, as rows of `items.parquet`."""
        return f"items (rows of items.parquet) {batch['rows'].tolist()}"

    def forward(  # type: ignore[override]
        self, rows: Tensor, with_gradients: bool = False
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
        """Return the loss of a batch of items, what to log of it, and the alignment of its gradients if asked for.

        Args:
            rows: (N,) different item rows.
            with_gradients: also compare the gradients of the loss with one modality's vectors held constant, over all
                adapted weights and in the projections `PROBED` (section 3.3.3); the graph stays as it is.
        """
        vectors = self.encode([[int(row)] for row in rows])
        text, image = vectors[schema.TEXT], vectors[schema.IMAGE]
        total = self.loss(image, text)
        with torch.no_grad():
            similarity = cosines(image, text)  # (N, N)
            own = torch.arange(len(rows), device=similarity.device)
            log = {
                "effective_negatives": torch.tensor(float(len(rows) - 1)),
                "norm_ratio_item": norm_ratio(text, image).mean(),
                "own_text_first": (similarity.argmax(dim=1) == own).float().mean(),
                "own_cosine": similarity.diagonal().mean(),
                "tau": self.loss.tau.detach().clone(),
            }
        return total, log, self._alignment(total, image, text) if with_gradients else {}

    def _alignment(self, total: Tensor, image: Tensor, text: Tensor) -> dict[str, float]:
        losses = {schema.TEXT: self.loss(image.detach(), text), schema.IMAGE: self.loss(image, text.detach())}
        row = gradient_alignment({TOTAL: total, **losses}, self.adapted)
        return row | conflict(losses, probed(self.encoder.backbone))


def probed(backbone: Backbone) -> dict[str, list[Part]]:
    """Return, by projection of the last layer, A and B of its adapter: of MoDA the first expert's part of them."""
    attention = backbone.language_model.layers[-1].self_attn
    return {name: _matrices(getattr(attention, name)) for name in PROBED}


def _matrices(layer: nn.Module) -> list[Part]:
    everything, first = slice(None), slice(None)
    if isinstance(layer, moda.MoDALinear):
        a, b, first = layer.lora_A, layer.lora_B, slice(layer.expert_rank)
    else:  # PEFT's
        a, b = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
    return [(a, (first, everything)), (b, (everything, first))]
