"""How much each modality contributes to an update: cosines between gradients (Fig. 1b of the VLM2Rec paper).

    g_total   gradient of the loss that is trained
    g_T, g_V  gradients of the contrastive objective (Eq. 3) with one modality's vectors alone, users and items

All three are taken with respect to the same parameters and from the same forward pass, of the same batch: `train` takes
one that stays the same over the whole run, without dropout. The penalty of Eq. 9 compares two
modalities and does not exist for one alone; with VLM2Rec too, g_T and g_V are therefore gradients of plain InfoNCE.

SDA has a loss between the two modalities (section 3.3.3 of its paper): there g_T is its gradient with the image
vectors held constant, and g_V with the text vectors. `conflict` compares the two in single matrices, where a negative
cosine means that the modalities pull the same numbers in opposite directions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vlm2rec.embedder import distributed
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.training.losses import HardNegatives, info_nce

TOTAL = "total"


def modality_losses(
    users: Mapping[str, Tensor],
    items: Mapping[str, Tensor],
    targets: Tensor,
    tau: float,
    hard: HardNegatives | None = None,
) -> dict[str, Tensor]:
    """Return InfoNCE of the text vectors alone and of the image vectors alone, scalars by view.

    Args:
        users: `text` and `image` vectors of B users, (B, d) each.
        items: those of their target items.
        targets: ids of the target items, (B,); equal ids are never each other's negatives.
        tau: temperature.
        hard: more negatives.
    """
    return {view: info_nce(users[view], items[view], targets, tau, hard, view) for view in schema.MODALITIES}


def gradient_alignment(losses: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> dict[str, float]:
    """Return the cosine of every pair of losses' gradients, and the gradients' lengths.

    The graph of the losses is kept and no `.grad` is changed. Processes that train together all call this; the
    gradients are then those of their common losses.

    Args:
        losses: scalars by name, such as `total`, `text`, `image`.
        parameters: what to differentiate by; a parameter that a loss does not depend on has gradient 0.

    Returns:
        `cos_<a>_<b>` for every pair in the order of `losses`, `norm_<a>` for each. Undefined values are left
        out: a cosine with a gradient of length 0, and everything about a gradient that is not finite.
    """
    gradients = {name: _gradient(loss, parameters) for name, loss in losses.items()}
    norms = {name: _dot(gradient, gradient) ** 0.5 for name, gradient in gradients.items()}
    row = {f"norm_{name}": norm for name, norm in norms.items() if math.isfinite(norm)}
    for a, b in itertools.combinations(gradients, 2):
        if 0 < norms[a] * norms[b] < math.inf:
            row[f"cos_{a}_{b}"] = _dot(gradients[a], gradients[b]) / (norms[a] * norms[b])
    return row


Part = tuple[Tensor, tuple[slice, ...]]
"""Some rows and columns of a parameter."""


def conflict(losses: Mapping[str, Tensor], parts: Mapping[str, Sequence[Part]]) -> dict[str, float]:
    """Return the cosine of the gradients of two losses in several places of the model, `cos_<a>_<b>_<place>`.

    Undefined values are left out: a cosine with a gradient of length 0, or with one that is not finite.

    Args:
        losses: two scalars by name; their graph is kept.
        parts: for each place, the parts of parameters that together form one vector.
    """
    (a, first), (b, second) = losses.items()
    row = {}
    for place, place_parts in parts.items():
        one, other = (_gradient(loss, [parameter for parameter, _ in place_parts]) for loss in (first, second))
        pairs = [
            (x[index], y[index])
            for x, y, (_, index) in zip(one, other, place_parts, strict=True)
            if x is not None and y is not None
        ]
        xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
        lengths = _dot(xs, xs) ** 0.5 * _dot(ys, ys) ** 0.5
        if 0 < lengths < math.inf:
            row[f"cos_{a}_{b}_{place}"] = _dot(xs, ys) / lengths
    return row


def _gradient(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    if not loss.requires_grad:
        return [None] * len(parameters)
    found = list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
    return [None if gradient is None else distributed.mean(gradient) for gradient in found]


def _dot(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> float:
    """Return the inner product over all parameters, summed in float64."""
    parts = [(x.double() * y.double()).sum() for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return float(torch.stack(parts).sum()) if parts else 0.0
