"""Losses that several of the multimodal models share. Tensors only."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def bpr(users: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """Return the mean of -log σ(u·p - u·n) over the rows of (B, d) each."""
    return -F.logsigmoid((users * (positives - negatives)).sum(1)).mean()


def in_batch_info_nce(rows: Tensor, columns: Tensor, temperature: float) -> Tensor:
    """Return the mean of -log softmax(rows · columns / temperature) at each row's own column, (B, d) each.

    All other columns are negatives, those of the same user or item too, as in the published code.
    """
    logits = rows @ columns.T / temperature  # (B, B)
    return F.cross_entropy(logits, torch.arange(len(rows), device=rows.device))
