"""RAT, the alignment of LLMEmb and SDA: adapted item vectors are drawn towards the item table of a run from item ids.

    loss = the recommender's + weight · L(I, A)

I and A, (N, d), are the rows of the batch's target items in the finished run's table, held constant, and of this run's
adapter. L is that of their public code, in which an item may occur in a batch several times:

    S = I·Aᵀ/τ,   T = softmax(τ·(I·Iᵀ + A·Aᵀ)/2),   L = mean of ½·(CE(T, softmax(S)) + CE(Tᵀ, softmax(Sᵀ)))

Rows are not normalised, T has a gradient, and the rows of Tᵀ do not sum to 1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vlm2rec.downstream import recommender
from vlm2rec.downstream.recommender import CHECKPOINT_FILE
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError

ITEMS = "items"
"""Key of a checkpoint's description: the hash of the ids that belong to the rows of the item table."""
_TABLE = "item_embedding.weight"
_PADDING = 0


@dataclass(frozen=True)
class Alignment:
    """What the adapted vectors are aligned with, and how strongly."""

    run: Path  # folder of a finished run from item ids
    weight: float = 0.01
    tau: float = 2.0


def structural_alignment(ids: Tensor, adapted: Tensor, tau: float) -> Tensor:
    """Return L(I, A), a scalar.

    Args:
        ids: rows of the table from item ids, (N, d).
        adapted: rows of the adapter for the same items, (N, d).
        tau: temperature τ.
    """
    student = ids @ adapted.T / tau  # (N, N)
    teacher = ((ids @ ids.T + adapted @ adapted.T) / 2 * tau).softmax(dim=1)  # (N, N)
    to_adapted = -(teacher * student.log_softmax(dim=1)).sum(dim=1)
    to_ids = -(teacher.T * student.T.log_softmax(dim=1)).sum(dim=1)
    return 0.5 * (to_adapted + to_ids).mean()


class TableAlignment(nn.Module):
    """The weighted loss with a table of which row i belongs to RecBole's item i. It is in no checkpoint."""

    table: Tensor

    def __init__(self, table: Tensor, weight: float, tau: float) -> None:
        super().__init__()
        self.register_buffer("table", table, persistent=False)
        self.weight, self.tau = weight, tau

    def forward(self, item_embedding: nn.Module, items: Tensor) -> Tensor:
        """Return weight · L for RecBole's numbers of some items, (N,); the padding among them is left out."""
        items = items[items != _PADDING]
        return self.weight * structural_alignment(self.table[items], item_embedding(items), self.tau)


def align(model: Any, alignment: Alignment, tokens: Sequence[str]) -> None:
    """Add the alignment to the loss of a RecBole model with an `item_embedding`: its parts are then a pair.

    Args:
        model: a SASRec, GRU4Rec or BERT4Rec.
        alignment: with what, and how.
        tokens: ids of items 1, 2, ...

    Raises:
        ConfigError, ArtifactError: as `read_table`.
    """
    table = read_table(alignment.run, tokens, model.item_embedding.embedding_dim)
    model.alignment = TableAlignment(table, alignment.weight, alignment.tau)
    recommend = model.calculate_loss
    # BERT4Rec's targets are the items it has masked
    field = model.POS_ITEMS if hasattr(model, "MASK_ITEM_SEQ") else model.POS_ITEM_ID

    def calculate_loss(interaction: Any) -> tuple[Tensor, Tensor]:
        return recommend(interaction), model.alignment(model.item_embedding, interaction[field])

    model.calculate_loss = calculate_loss


def read_table(run: Path, tokens: Sequence[str], width: int) -> Tensor:
    """Return the item table of a finished run from item ids, (len(tokens) + 1, width); row 0 is the padding.

    Raises:
        ConfigError: `run` is another kind of run, or its vectors have another length.
        ArtifactError: it is unfinished or damaged, of other items, or of a version that did not record its items.
    """
    what, again = "a finished run of train-recommender from item ids", "run train-recommender without --embeddings"
    metrics = schema.read_json(run / schema.METRICS_FILE, what, f"{again} first, with --out {run}")
    if metrics.get("start") != "id":
        raise ConfigError(
            f"--align-with {run}, a run of {metrics.get('model')} from {metrics.get('start')} vectors",
            what,
            f"{again}, and name its folder",
        )
    table = recommender.load_weights(run / CHECKPOINT_FILE, "cpu").get(_TABLE)
    if table is None or table.dim() != 2 or len(table) < len(tokens) + 1:
        found = "has no item table" if table is None else f"has an item table of {tuple(table.shape)}"
        raise ArtifactError(
            f"{run / CHECKPOINT_FILE} {found}",
            f"an item table with {len(tokens)} rows and one for padding",
            f"{again} again",
        )
    if table.shape[1] != width:
        raise ConfigError(
            f"--align-with {run}, whose item vectors have {table.shape[1]} dimensions, and this run has"
            f" --hidden-size {width}",
            "the same --hidden-size in both runs",
            f"give --hidden-size {table.shape[1]}, or train the other run again",
        )
    recorded = recommender.description_of(run / CHECKPOINT_FILE).get(ITEMS)
    if recorded != hash_of(tokens):
        found = "of an earlier version, which did not record its items" if recorded is None else "of other items"
        raise ArtifactError(
            f"--align-with {run}, a run {found}",
            "a run on the dataset of this one: row i of both tables has to be the same item",
            f"{again} on this dataset",
        )
    return table[: len(tokens) + 1].float()


def hash_of(tokens: Sequence[str]) -> str:
    """Return the hash of the ids of items 1, 2, ..."""
    return hashlib.sha256(json.dumps(list(tokens)).encode()).hexdigest()
