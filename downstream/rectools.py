"""Vectors of an embeddings folder as an item net of RecTools (0.19), for its SASRec, BERT4Rec and others.

    model = SASRecModel(
        item_net_block_types=(EmbeddingItemNet,),  # with IdEmbeddingsItemNet before it: an id row plus the vector
        item_net_constructor_kwargs={"embeddings": "embeddings", "column": "fused"},
    )

RecTools' item ids are looked up as text. Items without a vector and RecTools' own tokens share one learned row.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from rectools.dataset import Dataset
from rectools.dataset.dataset import DatasetSchema
from rectools.models.nn.item_net import ItemNetBase
from torch import Tensor, nn

from vlm2rec.downstream.recbole.item_embedding import standardise
from vlm2rec.downstream.table import EmbeddingTable
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import DataError
from vlm2rec.embedder.contract.storage import Location, location


class EmbeddingItemNet(ItemNetBase):
    """A Linear over frozen vectors, centred on their mean and of length 1.

    Args:
        n_items: items of RecTools, its own tokens among them.
        dim: length of a vector.
        n_factors: length of what the net gives.
    """

    def __init__(self, n_items: int, dim: int, n_factors: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(n_items, dim))
        self.register_buffer("present", torch.zeros(n_items, dtype=torch.bool))
        self.adapter = nn.Linear(dim, n_factors)
        self.absent = nn.Parameter(torch.randn(n_factors) * 0.02)

    def forward(self, items: Tensor) -> Tensor:
        """Return what the net makes of items, (...) to (..., n_factors); 0 for the padding, item 0."""
        items = items.to(self.adapter.weight.device)
        made = torch.where(self.present[items][..., None], self.adapter(self.vectors[items]), self.absent)
        return made * (items != 0)[..., None]

    @property
    def out_dim(self) -> int:
        """Length of what the net gives."""
        return self.adapter.out_features

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset,
        n_factors: int,
        dropout_rate: float,
        embeddings: Location | str,
        column: str = schema.FUSED,
        **_: Any,
    ) -> Self:
        """Return the net of a dataset of RecTools.

        Args:
            dataset: of RecTools.
            n_factors: length of what the net gives.
            dropout_rate: not used: RecTools drops out what its item nets give together.
            embeddings: the embeddings folder.
            column: which vector of an item.

        Raises:
            ArtifactError: as `EmbeddingTable.open`.
            DataError: no item of the dataset has a vector.
        """
        table = EmbeddingTable.open(embeddings, column)
        rows = {item: row for row, item in enumerate(table.item_ids) if table.present[row]}
        wanted = [str(item) for item in dataset.item_id_map.external_ids]
        found = torch.tensor([rows.get(item, -1) for item in wanted])
        if not (found >= 0).any():
            raise DataError(
                f"none of RecTools' {len(wanted):,} items has a vector in {embeddings}; its ids are like"
                f" {', '.join(map(repr, table.item_ids[:3]))}, and RecTools' ids are like"
                f" {', '.join(map(repr, wanted[1:4]))}",
                "the same item ids on both sides",
                "use the ids of the dataset folder in RecTools",
            )
        net = cls(len(wanted), table.dim, n_factors)
        vectors = standardise(torch.from_numpy(np.nan_to_num(table.vectors)), table.present)
        net.present[:] = found >= 0
        net.vectors[net.present] = vectors[found[net.present]]
        return net

    @classmethod
    def from_dataset_schema(
        cls,
        dataset_schema: DatasetSchema,
        n_factors: int,
        dropout_rate: float,
        embeddings: Location | str,
        column: str = schema.FUSED,
        **_: Any,
    ) -> Self:
        """Return a net for the weights of a saved model, which hold the vectors, too."""
        dim = schema.dim_of(schema.read_manifest(location(embeddings)), column)
        return cls(dataset_schema.items.n_hot, dim, n_factors)
