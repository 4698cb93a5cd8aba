"""SDA's training: items, not histories. Each step aligns the text and the image vectors of a batch of items.

The loss is `ItemAlignment` (CMSA), the adapter MoDA (`moda`) or, as its ablation, plain LoRA. A user is the mean
of the history's item vectors: there is no prompt for a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm2rec.embedder.adapters import moda
from vlm2rec.embedder.backbones.backbone import Backbone
from vlm2rec.embedder.backbones.pooling import at_least_float32, norm_ratio, unit
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import DataError
from vlm2rec.embedder.options import SDA_PROBED, Alignment
from vlm2rec.embedder.training.gradients import TOTAL, Part, conflict, gradient_alignment
from vlm2rec.embedder.training.losses import check_batch, cosines, info_nce, require
from vlm2rec.embedder.training.train import Model

"""Projections of the last layer in which the paper compares the gradients of text and image."""


class ItemSamples(Sequence[int]):
    """Every item of a catalogue, as rows of `items.parquet`, whether a user has bought it or not."""

    users: tuple[int, ...] = ()  # no user's history is read

    def __init__(self, count: int) -> None:
        if count < 2:
            raise DataError(
                f"the catalogue has {count} items",
                "two or more, to compare with each other",
                "prepare a larger catalogue",
            )
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return range(self._count)[index]

    def summary(self) -> dict[str, str]:
        """Return the row of a run's summary that names the training data."""
        return {"items": f"{len(self)}"}

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
        """Return the loss of a batch of items, values to log, and with `with_gradients` the alignment of its gradients.

        Args:
            rows: (N,) different item rows.
            with_gradients: also compare the gradients of the loss with one modality's vectors held constant, over all
                adapted weights and in the projections `SDA_PROBED` (section 3.3.3); the graph is kept.
        """
        vectors = self.encode([[row] for row in rows.tolist()])
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
    """Return A and B of the adapter for each projection of the last layer; with MoDA, the first expert's part."""
    attention = backbone.language_model.layers[-1].self_attn
    return {name: _matrices(getattr(attention, name)) for name in SDA_PROBED}


def _matrices(layer: nn.Module) -> list[Part]:
    everything, first = slice(None), slice(None)
    if isinstance(layer, moda.MoDALinear):
        a, b, first = layer.lora_A, layer.lora_B, slice(layer.expert_rank)
    else:  # PEFT's
        a, b = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
    return [(a, (first, everything)), (b, (everything, first))]


# Mean-pooled vectors lie in a narrow cone, with cosines of 0.95 and more. At a temperature of 0.1 the teacher is then
# nearly uniform, and the loss is smallest if all vectors are the same. The reference divides products, not cosines, by
# 3: vectors of the demo's small backbone have norm 11, so for their cosines this is a temperature of 0.025.
CMSA_TAU = {"paper": 0.02, "reference": 3.0, "off": 0.02, "reference-off": 3.0}
_REFERENCE_WIDTH = 768  # SDA's code averages vectors to this length before it compares them


class ItemAlignment(nn.Module):
    """SDA's loss, which aligns the image and the text vectors of the same N items.

    Args:
        kind: `paper` is CMSA as in the SDA paper, `reference` as in its public code, `off` InfoNCE between an item's
            text and its image, the paper's ablation without the soft target, `reference-off` that ablation as in the
            public code.
        tau: temperature τ; None takes `CMSA_TAU`. `reference` and `reference-off` learn τ from this start, as the code
            does; keep it out of weight decay.
    """

    def __init__(self, kind: Alignment = "paper", tau: float | None = None) -> None:
        super().__init__()
        require(kind in CMSA_TAU, f"cmsa is {kind!r}", ", ".join(CMSA_TAU))
        tau = CMSA_TAU[kind] if tau is None else tau
        require(tau > 0 and math.isfinite(tau), f"tau_cmsa is {tau}", "a finite number above 0")
        self.kind: Alignment = kind
        if kind in ("reference", "reference-off"):
            self.tau: Tensor = nn.Parameter(torch.tensor(tau))
        else:
            self.register_buffer("tau", torch.tensor(tau), persistent=False)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Return the loss, a scalar, of the items' image and text vectors, (N, d) each."""
        check_batch(torch.arange(len(image)), image, text)
        with torch.autocast(image.device.type, enabled=False):
            if self.kind == "paper":
                return cmsa(image, text, float(self.tau))
            if self.kind == "reference":
                return cmsa_reference(image, text, self.tau)
            if self.kind == "reference-off":
                return infonce_reference(image, text, self.tau)
            own = torch.arange(len(image), device=image.device)
            tau = float(self.tau)
            return 0.5 * (info_nce(image, text, own, tau) + info_nce(text, image, own, tau))


def cmsa(image: Tensor, text: Tensor, tau: float = 0.02) -> Tensor:
    """Return the Cross-Modal Structural Alignment loss of N items, a scalar (Eqs. 1-3 of the SDA paper).

        S = X·Yᵀ/τ,   P = softmax(S),   P' = softmax(Sᵀ)            Eq. 1, rows sum to 1
        T = softmax((X·Xᵀ + Y·Yᵀ)/(2τ)), held constant               Eq. 2, the structural teacher
        mean over the items of ½·(KL(T‖P) + KL(T'‖P'))               Eq. 3

    with X and Y the unit image and text vectors. T' is the teacher of the transposed direction, with its rows
    normalised; as the mean of the intra-modal similarities is symmetric, T' = T. The loss is 0 if P and P' equal T,
    and also if all vectors are the same. To avoid that, τ has to be small against the spread of the cosines: then T is
    not uniform.
    The paper does not print its formulas completely: that teacher and student share τ is our reading.

    Args:
        image: image vectors of the items, (N, d).
        text: their text vectors, (N, d).
        tau: temperature τ.
    """
    x, y = unit(image), unit(text)
    student = x @ y.T / tau  # (N, N)
    with torch.no_grad():
        teacher = ((x @ x.T + y @ y.T) / (2 * tau)).log_softmax(dim=1)  # (N, N)
    to_text = F.kl_div(student.log_softmax(dim=1), teacher, reduction="batchmean", log_target=True)
    to_image = F.kl_div(student.T.log_softmax(dim=1), teacher, reduction="batchmean", log_target=True)
    return 0.5 * (to_text + to_image)


def cmsa_reference(image: Tensor, text: Tensor, tau: Tensor) -> Tensor:
    """Return CMSA as in the paper's public code, a scalar.

    It differs from `cmsa` as follows. Vectors are not normalised; those longer than 768 numbers are averaged in groups
    to 768 (`grouped_means`). The teacher is softmax(τ·(X·Xᵀ + Y·Yᵀ)/2), so τ sharpens the teacher while it flattens
    the student. The teacher is not held constant. The transposed direction takes Tᵀ, whose rows do not sum to 1. The
    loss is cross-entropy, not KL.

    Args:
        image: image vectors of the items, (N, d).
        text: their text vectors, (N, d).
        tau: temperature τ, a scalar, with gradient if it is learned.
    """
    x, y = (grouped_means(at_least_float32(vectors)) for vectors in (image, text))
    student = x @ y.T / tau  # (N, N)
    teacher = ((x @ x.T + y @ y.T) / 2 * tau).softmax(dim=1)  # (N, N)
    to_text = -(teacher * student.log_softmax(dim=1)).sum(dim=1)
    to_image = -(teacher.T * student.T.log_softmax(dim=1)).sum(dim=1)
    return 0.5 * (to_text + to_image).mean()


def infonce_reference(image: Tensor, text: Tensor, tau: Tensor) -> Tensor:
    """Return the InfoNCE of the paper's public code in both directions, a scalar: its ablation without the soft target.

    The vectors are averaged in groups as for `cmsa_reference`, and then normalised.

    Args:
        image: image vectors of the items, (N, d).
        text: their text vectors, (N, d).
        tau: temperature τ, a scalar, with gradient if it is learned.
    """
    x, y = (F.normalize(grouped_means(at_least_float32(vectors)), dim=1) for vectors in (image, text))
    student = x @ y.T / tau  # (N, N)
    own = torch.arange(len(student), device=student.device)
    return 0.5 * (F.cross_entropy(student, own) + F.cross_entropy(student.T, own))


def grouped_means(vectors: Tensor) -> Tensor:
    """Return vectors (N, d) averaged in groups of neighbouring numbers to 768, (N, 768); shorter ones as they are.

    SDA's code does so for the d = 3584 of its backbone alone: 1024 numbers become 256 means of four, and the other 2560
    become 512 means of five. The same rule for any d: 768 groups whose sizes differ by one at most, the smaller first.

        d      groups
        1024   512 of one, 256 of two
        1536   768 of two
        2048   256 of two, 512 of three
        3584   256 of four, 512 of five
        4096   512 of five, 256 of six
    """
    size, larger = divmod(vectors.shape[1], _REFERENCE_WIDTH)  # numbers in a smaller group, and how many are larger
    if size == 0:
        return vectors
    smaller = _REFERENCE_WIDTH - larger
    first, rest = vectors.split([smaller * size, larger * (size + 1)], dim=1)
    parts = [part.unflatten(1, (-1, n)).mean(2) for part, n in ((first, size), (rest, size + 1)) if part.shape[1]]
    return torch.cat(parts, dim=1)
