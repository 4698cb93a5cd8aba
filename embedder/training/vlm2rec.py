"""The model that VLM2Rec trains: one encoder for histories and their next items, and any loss on both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vlm2rec.embedder import distributed
from vlm2rec.embedder.backbones.pooling import norm_ratio
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.item_features import ItemFeatures
from vlm2rec.embedder.options import Negatives
from vlm2rec.embedder.training.gradients import TOTAL, gradient_alignment, modality_losses
from vlm2rec.embedder.training.losses import HardNegatives, Log, effective_negatives
from vlm2rec.embedder.training.samples import Sample
from vlm2rec.embedder.training.train import Model


class HistoryModel(Model):
    """An encoder with LoRA, and the loss over a batch of users and their next items.

    If several processes train together, each encodes its own users and items and computes the loss of all of them.

    Args:
        encoder: its backbone has LoRA layers.
        wrapped: the PEFT wrapper of the same backbone.
        items: titles and image features.
        loss: called as `loss(users, items, targets)`, the first two by view (`losses.Views`), the targets (B,) item
            rows; with `losses.HardNegatives` as a fourth argument if the samples have some. Returns the loss, a scalar,
            and scalars for the curves (`losses.Log`).
        tau: temperature at which `gradients` contrasts each modality alone, whatever the loss is.
        chunk_users: encode this many users, or items, at a time (GradCache); 0 encodes the batch in one piece.
        negatives: with several processes, which targets are a user's negatives. `local`: those of the user's own
            process; the loss is the mean over all users. `global`: those of all processes; the loss is that of one
            process with the whole batch.
    """

    def __init__(
        self,
        encoder: ItemEncoder,
        wrapped: nn.Module,
        items: ItemFeatures,
        loss: nn.Module,
        tau: float,
        chunk_users: int = 0,
        negatives: Negatives = "local",
    ) -> None:
        super().__init__(encoder, wrapped, items, loss, chunk_users)
        self.tau = tau
        self.negatives: Negatives = negatives

    def collate(self, batch: list[Sample]) -> dict[str, Any]:
        """Return `histories` and `targets` of this process's share, the rows of their `users`, and hard negatives."""
        samples = distributed.share(batch)
        width = len(batch[0].negatives)  # the same in every process, also in one whose share is empty
        more: dict[str, Any] = {}
        if width:
            hard = [sample.negatives for sample in samples]
            more = {"hard": torch.tensor(np.array(hard, np.int64).reshape(len(samples), width))}
        return more | {
            "histories": [[int(row) for row in sample.history] for sample in samples],
            "targets": torch.tensor([sample.target for sample in samples], dtype=torch.int64),
            "users": [sample.user for sample in samples],
        }

    def named(self, batch: dict[str, Any]) -> str:
        """Return the users, as rows of `sequences.parquet`."""
        return f"users (rows of sequences.parquet) {batch['users']}"

    @property
    def has_both_modalities(self) -> bool:
        """Whether text and image have separate vectors."""
        return {*schema.MODALITIES} <= {*self.encoder.views}

    def forward(  # type: ignore[override]
        self,
        histories: list[list[int]],
        targets: Tensor,
        users: Sequence[int] = (),
        hard: Tensor | None = None,
        with_gradients: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
        """Return the loss of a batch, values to log, and with `with_gradients` the alignment of its gradients.

        With several processes, all three cover the batches of all processes, and are the same in each.

        Args:
            histories: B lists of item rows, those of this process; there may be none.
            targets: (B,) item rows; a target that several users share is encoded once.
            users: rows of the users; not used.
            hard: (B, K) item rows of each user's hard negatives, -1 where there are fewer; encoded once, too.
            with_gradients: also compare the gradient of the loss with those of each modality alone, over the LoRA
                weights (`gradient_alignment`); the loss and its graph do not change.
        """
        users_by_view = self._encode_own(histories)
        wanted = targets if hard is None else torch.cat([targets, hard[hard >= 0]])
        distinct, index = wanted.unique(return_inverse=True)
        encoded = self._encode_own([[row] for row in distinct.tolist()])
        items = {view: found[index[: len(targets)]] for view, found in encoded.items()}
        more = None
        if hard is not None:
            places = torch.zeros_like(hard)  # where there is none, any vector stands; no loss reads it
            places[hard >= 0] = index[len(targets) :]
            more = HardNegatives({view: found[places] for view, found in encoded.items()}, hard)
        batches = self._batches(users_by_view, items, targets, more)
        totals, logs = zip(*(self._loss_of(batch) for batch in batches), strict=True)
        sizes = [len(batch.targets) for batch in batches]
        total, log = _mean([{TOTAL: total} for total in totals], sizes)[TOTAL], _mean(logs, sizes)
        alignment: dict[str, float] = {}
        if with_gradients:
            parts = [modality_losses(*batch[:3], self.tau, batch.hard) for batch in batches]
            losses = {TOTAL: total, **_mean(parts, sizes)}
            alignment = gradient_alignment(losses, self.adapted)
        return total, {name: value.detach() for name, value in log.items()}, alignment

    def _encode_own(self, sequences: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Encode sequences of item rows; returns the views that the encoder makes, (n, d) each."""
        vectors = self.encode(sequences)
        return {view: vectors[view] for view in self.encoder.views}

    def _batches(
        self, users: dict[str, Tensor], items: dict[str, Tensor], targets: Tensor, hard: HardNegatives | None
    ) -> list[_Batch]:
        """Return the users and items of all processes in batches; a user's negatives are the targets of its batch."""
        if distributed.count() == 1:
            return [_Batch(users, items, targets, hard)]
        parts = distributed.gather(torch.stack([*users.values(), *items.values()], dim=1))  # (B, 2 · views, d) each
        ids = distributed.gather(targets)
        more: Sequence[HardNegatives | None] = [None] * len(parts) if hard is None else _gathered(hard)
        if self.negatives == "global":
            more = [None if hard is None else _joined([each for each in more if each is not None])]
            parts, ids = [torch.cat(parts)], [torch.cat(ids)]
        views = len(users)
        return [
            _Batch(
                dict(zip(users, part[:, :views].unbind(1), strict=True)),
                dict(zip(items, part[:, views:].unbind(1), strict=True)),
                own,
                theirs,
            )
            for part, own, theirs in zip(parts, ids, more, strict=True)
            if len(own)
        ]

    def _loss_of(self, batch: _Batch) -> tuple[Tensor, Log]:
        """Return the loss of users whose negatives are each other's targets, and values to log."""
        users, items, targets, hard = batch
        log: Log = {"effective_negatives": effective_negatives(targets, hard).float().mean()}
        if hard is not None:
            log["hard_negatives"] = hard.counted(targets).sum(dim=1).float().mean()
        if self.has_both_modalities:
            log["norm_ratio_user"] = norm_ratio(users[schema.TEXT], users[schema.IMAGE]).mean()
            log["norm_ratio_item"] = norm_ratio(items[schema.TEXT], items[schema.IMAGE]).mean()
        total, parts = self.loss(users, items, targets, *([] if hard is None else [hard]))
        return total, log | parts


class _Batch(NamedTuple):
    """B users, their target items and hard negatives: vectors by view, (B, d) each, and the items' rows, (B,)."""

    users: dict[str, Tensor]
    items: dict[str, Tensor]
    targets: Tensor
    hard: HardNegatives | None


def _gathered(hard: HardNegatives) -> list[HardNegatives]:
    """Return the hard negatives of every process, by rank."""
    parts = distributed.gather(torch.stack([*hard.vectors.values()], dim=1))  # (B, views, K, d) each
    ids = distributed.gather(hard.ids)
    return [
        HardNegatives(dict(zip(hard.vectors, part.unbind(1), strict=True)), own)
        for part, own in zip(parts, ids, strict=True)
    ]


def _joined(parts: Sequence[HardNegatives]) -> HardNegatives:
    vectors = {view: torch.cat([part.vectors[view] for part in parts]) for view in parts[0].vectors}
    return HardNegatives(vectors, torch.cat([part.ids for part in parts]))


def _mean(rows: Sequence[dict[str, Tensor]], weights: Sequence[int]) -> dict[str, Tensor]:
    """Return the weighted mean of rows of scalars."""
    shares = [weight / sum(weights) for weight in weights]
    return {
        name: torch.stack([row[name] * share for row, share in zip(rows, shares, strict=True)]).sum()
        for name in rows[0]
    }
