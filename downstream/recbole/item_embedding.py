"""The item table of a recommender made of vectors and one or two trained layers. Tensors only.

- `ItemEmbedding`: frozen vectors, adapted; with `trained_vectors` they are trained, too (mode `init`).
- `FusedEmbedding`: the adapted vector and a trained row for the item's id, together (mode `fuse`).

Three adapters: `linear`, one Linear(d → width), as in the paper; `two-linear`, two Linears without activation, as in
LLMEmb and SDA; `mlp`, two Linears with GELU between. The hidden layer has d / 2 units, and no fewer than `width`.
"""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm2rec.downstream.options import Adapter, Fuse

ADAPTERS: tuple[Adapter, ...] = get_args(Adapter)
PAD_ROW = 0
_NO_LENGTH = 1e-6  # a vector this close to the mean, relative to the mean length, has no direction
# GELU of a standard normal variable has mean 1 / (2√π) and this standard deviation
_GELU_MEAN, _GELU_SPREAD = 0.5 / math.sqrt(math.pi), 0.5879


_AT_ONCE = 65_536  # rows that are adapted together outside training
_BLOCK = 256  # rows that are centred together: few enough to stay in the processor's cache


def standardise(vectors: Tensor, given: np.ndarray | None = None, in_place: bool = False) -> Tensor:
    """Centre the vectors on their mean and give each length 1.

    Vectors of a language model share a large common offset. With it, every item looks the same to a new Linear, and the
    first optimiser steps all move along that offset and make the loss explode.

    Args:
        vectors: (N, d), finite.
        given: which rows are vectors, (N,) bool; the others are zero and stay zero. Default: all.
        in_place: overwrite `vectors`, which must be float32, because tables are large.

    Returns:
        (N, d) float32 with rows of length 1; rows that equal the mean have length 0.
    """
    count = len(vectors) if given is None else int(given.sum())
    found = vectors if in_place else vectors.to(torch.float32, copy=True)
    # blocks are summed in float32 and their sums in float64: exact enough, and without a second copy of the table
    blocks = found.split(_BLOCK)
    total, lengths = torch.zeros(vectors.shape[1], dtype=torch.float64), 0.0
    for block in blocks:
        total += block.sum(0)
        lengths += float(torch.linalg.vector_norm(block, dim=1).sum())
    mean, scale = (total / max(1, count)).float(), lengths / max(1, count)
    for number, block in enumerate(blocks):
        block -= mean
        length = torch.linalg.vector_norm(block, dim=1, keepdim=True)  # (block, 1)
        factor = torch.where(length > _NO_LENGTH * scale, 1 / length.clamp_min(1e-30), 0.0)
        if given is not None:
            factor *= torch.from_numpy(given[number * _BLOCK : number * _BLOCK + len(block), None])
        block *= factor
    return found


class ItemEmbedding(nn.Module):
    """Replaces a recommender's `nn.Embedding`: row i is the adapter's output for the vector of item i.

    Recommenders call the table in two ways, `table(indices)` for inputs and `table.weight` for the output matrix, and
    both give the same rows. Row 0, the padding, is zero. Rows beyond the vectors (BERT4Rec's mask) are trained
    parameters, as they belong to no item.

    Frozen vectors are not part of the state: a checkpoint holds the adapter and the extra rows only.
    """

    vectors: Tensor
    extra: nn.Parameter | None

    def __init__(
        self,
        vectors: Tensor,
        width: int,
        spread: float,
        extra: Tensor | None = None,
        adapter: Adapter = "linear",
        trained_vectors: bool = False,
    ) -> None:
        """Start the adapter so that the adapted rows are spread like the id table they replace.

        Args:
            vectors: (N, d) rows of length 1 (see `standardise`); row 0 is the padding and is never used.
            width: length of an adapted row.
            spread: standard deviation of an element of an adapted row at the start.
            extra: (K, width) start values of rows N ... N + K - 1.
            adapter: the layers.
            trained_vectors: train the vectors as well; they are then part of the state.
        """
        super().__init__()
        if trained_vectors:
            self.vectors = nn.Parameter(vectors)
        else:
            self.register_buffer("vectors", vectors, persistent=False)
        dim = vectors.shape[1]
        units = max(width, dim // 2)
        self.hidden = None if adapter == "linear" else nn.Linear(dim, units)
        self.activation = nn.GELU() if adapter == "mlp" else nn.Identity()
        self.linear = nn.Linear(dim if self.hidden is None else units, width)
        self._start(spread)
        self.register_parameter("extra", None if extra is None else nn.Parameter(extra.detach().clone()))
        self._cached: Tensor | None = None

    def _start(self, spread: float) -> None:
        nn.init.zeros_(self.linear.bias)
        if self.hidden is None:
            # a row of length 1 times weights of this spread has elements of this spread
            nn.init.normal_(self.linear.weight, std=spread)
            return
        nn.init.zeros_(self.hidden.bias)
        nn.init.normal_(self.hidden.weight)  # so the hidden units of a row of length 1 are standard normal
        bent = isinstance(self.activation, nn.GELU)
        share = math.sqrt(self.hidden.out_features) * (_GELU_SPREAD if bent else 1.0)
        nn.init.normal_(self.linear.weight, std=spread / share)
        if bent:
            with torch.no_grad():  # an offset common to all rows would make the first steps explode
                self.linear.bias.copy_(-_GELU_MEAN * self.linear.weight.sum(1))

    @property
    def num_embeddings(self) -> int:
        """Rows of the table, padding and extra rows included."""
        return len(self.vectors) + (0 if self.extra is None else len(self.extra))

    @property
    def embedding_dim(self) -> int:
        """Length of an adapted row."""
        return self.linear.out_features

    @property
    def weight(self) -> Tensor:
        """The whole adapted table, (N + K, width); computed once per evaluation, and at every training step."""
        if not self._may_cache():
            return self._table()
        if self._cached is None:
            self._cached = self._table()
        return self._cached

    def forward(self, indices: Tensor) -> Tensor:
        """Return the adapted rows of `indices`, (..., width)."""
        if self._may_cache():
            return F.embedding(indices, self.weight)
        # a batch contains an item many times: adapt each once
        rows, places = torch.unique(indices, return_inverse=True)
        return F.embedding(places, self._rows(rows))

    def train(self, mode: bool = True) -> ItemEmbedding:
        """Switch the mode and drop the cached table, because the adapter will change or has changed."""
        self._cached = None
        return super().train(mode)

    def _may_cache(self) -> bool:
        return not self.training and not torch.is_grad_enabled()

    def _table(self) -> Tensor:
        if not torch.is_grad_enabled() and len(self.vectors) > _AT_ONCE:
            return self._table_in_blocks()
        items = self._items(slice(1, None))  # (N - 1, width)
        parts = [items.new_zeros(1, self.embedding_dim), items]
        return torch.cat(parts if self.extra is None else [*parts, self.extra])

    def _table_in_blocks(self) -> Tensor:
        """Return the same; memory holds the table and one block of the hidden layer."""
        count = len(self.vectors)
        table = self.linear.weight.new_zeros(self.num_embeddings, self.embedding_dim)
        for start in range(1, count, _AT_ONCE):
            block = slice(start, min(start + _AT_ONCE, count))
            table[block] = self._items(block)
        if self.extra is not None:
            table[count:] = self.extra
        return table

    def _items(self, rows: Tensor | slice) -> Tensor:
        """Return the table's rows of items (R,), (R, width), padding or not."""
        return self._adapt(self.vectors[rows])

    def _adapt(self, vectors: Tensor) -> Tensor:
        """Map (n, d) to (n, width)."""
        return self.linear(vectors if self.hidden is None else self.activation(self.hidden(vectors)))

    def _rows(self, rows: Tensor) -> Tensor:
        """Adapt distinct `rows` (R,) to (R, width)."""
        last = len(self.vectors) - 1
        adapted = self._items(rows.clamp(max=last))
        adapted = adapted.masked_fill((rows == PAD_ROW)[:, None], 0.0)
        if self.extra is not None:
            beyond = self.extra[(rows - last - 1).clamp(min=0)]
            adapted = torch.where((rows > last)[:, None], beyond, adapted)
        return adapted

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cached = None
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> ItemEmbedding:
        self._cached = None  # the module changes its device or number format
        return super()._apply(*args, **kwargs)


class FusedEmbedding(ItemEmbedding):
    """The adapted vector of an item and a trained row for its id, together.

    `sum` adds the two; `gate` multiplies the id's row by sigmoid(G a + c) first, where a is the adapted vector. An item
    that training never saw has no id row: it stands where its vector puts it. So that the adapter learns to work alone,
    training leaves out the id row of each item with the probability `id_dropout`, every time the table is read.
    """

    known: Tensor

    def __init__(
        self,
        vectors: Tensor,
        width: int,
        spread: float,
        extra: Tensor | None = None,
        adapter: Adapter = "linear",
        *,
        known: Tensor,
        fuse: Fuse = "sum",
        id_dropout: float = 0.0,
    ) -> None:
        """Start as `ItemEmbedding`; id rows are spread like the adapted ones.

        Args:
            vectors: (N, d), `width`, `spread`, `extra`, `adapter`: as `ItemEmbedding` takes them.
            width: see there.
            spread: see there.
            extra: see there.
            adapter: see there.
            known: which rows are items that occur in training, (N,) bool.
            fuse: how the two join.
            id_dropout: share of the id rows that training leaves out at a time.
        """
        super().__init__(vectors, width, spread, extra, adapter)
        self.ids = nn.Parameter(torch.empty(len(vectors), width).normal_(std=spread))
        self.register_buffer("known", known)
        self.gate = nn.Linear(width, width) if fuse == "gate" else None
        self.id_dropout = id_dropout

    def _items(self, rows: Tensor | slice) -> Tensor:
        adapted = super()._items(rows)
        own, known = self.ids[rows], self.known[rows]
        if self.training and self.id_dropout:
            known = known & (torch.rand(len(known), device=known.device) >= self.id_dropout)
        own = own * known[:, None]
        return adapted + (own if self.gate is None else torch.sigmoid(self.gate(adapted)) * own)
