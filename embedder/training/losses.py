"""The losses of users and items: InfoNCE (SFT) and VLM2Rec's WPCL + CRTR. Pure tensor code.

They take a batch of B users and their B target items; row i of the items is the target of user i.
The negatives N_u of row i are the batch's targets j with item_ids[j] != item_ids[i]. So the row's own target is left
out of every sum, mean and softmax, also where it is another user's target. A row without negatives (B = 1, or every
target the same item) has margins 0, hence Δ = 0 and w = 1 + β·ln 2, and adds 0 to each loss; it still counts in the
mean.

Hard negatives join N_u, each for its own row alone. Every equation reads this larger set: the margins (and so w), the
sum of WPCL, which w multiplies, and the candidates of CRTR. One that is a target of the batch is in N_u already,
or is the row's own target, and does not count again. Without hard negatives every number is as it was.

At the end of the module are both losses in the form that training calls, `InfoNCEObjective` and `VLM2RecObjective`.
`Matryoshka` takes either of them over prefixes of the vectors too.

Arithmetic is float32 for half-precision input, under autocast too, and float64 for float64 input: at
τ_CRTR = 0.001 a similarity rounded to bf16 would be off by several units after the division.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm2rec.embedder.backbones.pooling import at_least_float32, fuse, unit
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.embedder.options import FusionNorm, Reduction


class LossParts(NamedTuple):
    """What `VLM2RecLoss` returns. All parts carry the graph; detach them for logging."""

    total: Tensor  # scalar, to be differentiated: Eq. 14 in the chosen reduction
    wpcl: Tensor  # scalar, the mean over rows; 0 when switched off
    crtr: Tensor  # scalar, the mean over rows, before λ; 0 when switched off
    weight: Tensor  # (B,) w of Eq. 9; 1 when the penalty is off
    margin_text: Tensor  # (B,) M_T of Eq. 6
    margin_image: Tensor  # (B,) M_V


class HardNegatives(NamedTuple):
    """Up to K more negatives of each of B users, which are nobody else's.

    `vectors` are by view, (B, K, d) each; `ids` are integers, (B, K), -1 where a user has fewer than K.
    """

    vectors: Mapping[str, Tensor]
    ids: Tensor

    def counted(self, item_ids: Tensor) -> Tensor:
        """Return which of them are in N_u beside the batch's own, (B, K) bool: items that are no target of it."""
        return (self.ids >= 0) & ~torch.isin(self.ids, item_ids)


class VLM2RecLoss(nn.Module):
    """Weak-modality penalised contrastive loss plus cross-modal relational topology regularisation (Eqs. 6-14).

    Eq. 10 sums over the users of a batch, Eq. 13 takes their mean. `paper` keeps this balance and divides the whole by
    the batch size B, so that the size of a step does not depend on B and no direction changes:

        total = (Σ_u WPCL_u + λ·CRTR) / B = mean WPCL + (λ/B)·CRTR

    `mean` averages both terms, total = mean WPCL + λ·CRTR, which weighs CRTR B times as much.

    α and β are softplus of a free parameter: dL/dβ is positive whenever there is a negative, so a β without
    this bound would shrink below zero and make w negative. Keep both parameters out of weight decay, which would pull
    α and β towards ln 2.

    Args:
        tau_wpcl: temperature τ_WPCL of Eq. 10.
        tau_crtr: temperature τ_CRTR of Eq. 11.
        lam: weight λ of CRTR.
        alpha: effective initial value of α, above 0.
        beta: effective initial value of β, above 0.
        learnable: train α and β; otherwise they are buffers and stay as given.
        stop_gradient: keep M_strong constant in Eq. 8, so that only the weak modality closes the gap.
        penalty: use w; otherwise w = 1 and WPCL is InfoNCE ("w/o w_pen").
        crtr: add CRTR ("w/o CRTR" when off).
        fusion_norm: `raw` sums the vectors as they are (Eq. 2), `normalised` sums unit vectors.
        wpcl: use WPCL ("w/o WPCL" when off: CRTR alone).
        reduction: `paper` or `mean`, the balance of the two terms. B is the number of rows of the call.
    """

    raw_alpha: Tensor
    raw_beta: Tensor

    def __init__(
        self,
        tau_wpcl: float = 0.1,
        tau_crtr: float = 0.1,
        lam: float = 0.1,
        alpha: float = 1.0,
        beta: float = 1.0,
        learnable: bool = True,
        stop_gradient: bool = True,
        penalty: bool = True,
        crtr: bool = True,
        *,
        fusion_norm: FusionNorm = "raw",
        wpcl: bool = True,
        reduction: Reduction = "paper",
    ) -> None:
        super().__init__()
        for name, value in {"tau_wpcl": tau_wpcl, "tau_crtr": tau_crtr, "alpha": alpha, "beta": beta}.items():
            require(value > 0 and math.isfinite(value), f"{name} is {value}", "a finite number above 0")
        require(lam >= 0 and math.isfinite(lam), f"lam is {lam}", "a finite number, 0 or above")
        require(fusion_norm in ("raw", "normalised"), f"fusion_norm is {fusion_norm!r}", "raw or normalised")
        require(reduction in get_args(Reduction), f"reduction is {reduction!r}", "paper or mean")
        require(wpcl or crtr, "wpcl and crtr are both off", "at least one loss")
        self.tau_wpcl, self.tau_crtr, self.lam = tau_wpcl, tau_crtr, lam
        self.stop_gradient, self.fusion_norm, self.reduction = stop_gradient, fusion_norm, reduction
        self.use_penalty, self.use_crtr, self.use_wpcl = penalty, crtr, wpcl
        for name, value in (("raw_alpha", alpha), ("raw_beta", beta)):
            raw = torch.tensor(_softplus_inverse(value))
            if learnable and penalty and wpcl:
                self.register_parameter(name, nn.Parameter(raw))
            else:  # a parameter without gradient would stop distributed training
                self.register_buffer(name, raw)

    @property
    def alpha(self) -> Tensor:
        """Effective α, a scalar above 0, detached."""
        return _positive(self.raw_alpha).detach()

    @property
    def beta(self) -> Tensor:
        """Effective β, a scalar above 0, detached."""
        return _positive(self.raw_beta).detach()

    def forward(
        self,
        user_text: Tensor,
        user_image: Tensor,
        item_text: Tensor,
        item_image: Tensor,
        item_ids: Tensor,
        hard: HardNegatives | None = None,
    ) -> LossParts:
        """Return the loss of one batch and its parts.

        Args:
            user_text: z^T, the users' text-sequence vectors, (B, d).
            user_image: z^V, (B, d).
            item_text: e^T, their target items' text vectors, (B, d).
            item_image: e^V, (B, d).
            item_ids: integer ids of the target items, (B,); equal ids are never each other's negatives.
            hard: more negatives, with `text` and `image` vectors.

        Raises:
            ValueError: the shapes do not fit together.
        """
        check_batch(item_ids, user_text, user_image, item_text, item_image, hard=hard)
        with torch.autocast(user_text.device.type, enabled=False):
            hard_text, hard_image = (None, None) if hard is None else (hard.vectors[view] for view in schema.MODALITIES)
            others = negatives_of(item_ids, hard)  # (B, B + K)
            text = similarities(user_text, item_text, hard_text)  # (B, B + K)
            image = similarities(user_image, item_image, hard_image)  # (B, B + K)
            margin_text, margin_image = margins(text, others), margins(image, others)
            weight = self._weight(margin_text, margin_image)
            wpcl = crtr = text.new_zeros(())
            if self.use_wpcl:
                users = fuse(user_text, user_image, self.fusion_norm)
                items = fuse(item_text, item_image, self.fusion_norm)
                more = None
                if hard_text is not None and hard_image is not None:
                    more = fuse(hard_text, hard_image, self.fusion_norm)
                wpcl = contrastive(similarities(users, items, more), others, self.tau_wpcl, weight).mean()
            if self.use_crtr:
                crtr = topology_divergence(text, image, others, self.tau_crtr).mean()
            lam = self.lam / len(item_ids) if self.reduction == "paper" else self.lam
            return LossParts(wpcl + lam * crtr, wpcl, crtr, weight, margin_text, margin_image)

    def _weight(self, margin_text: Tensor, margin_image: Tensor) -> Tensor:
        if not self.use_penalty:
            return torch.ones_like(margin_text)
        alpha, beta = _positive(self.raw_alpha), _positive(self.raw_beta)
        return penalty_weight(margin_text, margin_image, alpha, beta, self.stop_gradient)

    def extra_repr(self) -> str:
        """Return the settings for `print(loss)`."""
        return (
            f"tau_wpcl={self.tau_wpcl}, tau_crtr={self.tau_crtr}, lam={self.lam}, alpha={float(self.alpha):.4g}, "
            f"beta={float(self.beta):.4g}, stop_gradient={self.stop_gradient}, penalty={self.use_penalty}, "
            f"crtr={self.use_crtr}, wpcl={self.use_wpcl}, fusion_norm={self.fusion_norm}, reduction={self.reduction}"
        )


def info_nce(
    user: Tensor,
    item: Tensor,
    item_ids: Tensor,
    tau: float = 0.1,
    hard: HardNegatives | None = None,
    view: str = schema.FUSED,
) -> Tensor:
    """Return the InfoNCE loss of the SFT baseline (Eq. 3), a scalar: the mean over the batch's rows.

    Args:
        user: fused user vectors, (B, d).
        item: fused vectors of their target items, (B, d).
        item_ids: integer ids of the target items, (B,); equal ids are never each other's negatives.
        tau: temperature τ.
        hard: more negatives.
        view: which of their vectors to take.
    """
    require(tau > 0 and math.isfinite(tau), f"tau is {tau}", "a finite number above 0")
    check_batch(item_ids, user, item, hard=hard)
    with torch.autocast(user.device.type, enabled=False):
        similarity = similarities(user, item, None if hard is None else hard.vectors[view])
        return contrastive(similarity, negatives_of(item_ids, hard), tau).mean()


def effective_negatives(item_ids: Tensor, hard: HardNegatives | None = None) -> Tensor:
    """Return |N_u|, the number of negatives of each row, (B,) int64."""
    return negatives_of(item_ids, hard).sum(dim=1)


def other_items(item_ids: Tensor) -> Tensor:
    """Return which columns are negatives of which row, (B, B) bool: the columns of other items."""
    return item_ids[:, None] != item_ids[None, :]


def negatives_of(item_ids: Tensor, hard: HardNegatives | None = None) -> Tensor:
    """Return which columns are negatives of which row, (B, B + K) bool: other targets, then the row's hard ones."""
    others = other_items(item_ids)
    return others if hard is None else torch.cat([others, hard.counted(item_ids)], dim=1)


def similarities(users: Tensor, items: Tensor, hard: Tensor | None = None) -> Tensor:
    """Return `cosines`, then those of each row with its own hard negatives (B, K, d): (B, B + K)."""
    found = cosines(users, items)
    if hard is None:
        return found
    return torch.cat([found, (unit(hard) @ unit(users)[:, :, None]).squeeze(2)], dim=1)


def cosines(users: Tensor, items: Tensor) -> Tensor:
    """Return s(z_i, e_j) for every pair of rows, (B, B), in float32 at least; 0 where either vector is zero."""
    return unit(users) @ unit(items).T


def margins(similarity: Tensor, others: Tensor) -> Tensor:
    """Return the discriminative margin M_u (Eq. 6): positive minus mean negative similarity, (B,); 0 without negatives.

    Args:
        similarity: s(z_i, e_j) in one modality, (B, B) or, with hard negatives, (B, B + K).
        others: which columns are negatives, bool of the same shape.
    """
    count = others.sum(dim=1)
    negative = similarity.where(others, 0.0).sum(dim=1) / count.clamp_min(1)
    return (similarity.diagonal() - negative).where(count > 0, 0.0)


def penalty_weight(
    margin_text: Tensor, margin_image: Tensor, alpha: Tensor, beta: Tensor, stop_gradient: bool = True
) -> Tensor:
    """Return w = 1 + β·softplus(α·Δ) with Δ = sg[M_strong] - M_weak (Eqs. 7-9), (B,).

    At Δ = 0, w has its least value, 1 + β·ln 2; it never reaches 1.
    """
    strong = torch.maximum(margin_text, margin_image)
    weak = torch.minimum(margin_text, margin_image)
    gap = (strong.detach() if stop_gradient else strong) - weak
    return 1 + beta * F.softplus(alpha * gap)


def contrastive(similarity: Tensor, others: Tensor, tau: float | Tensor, weight: Tensor | None = None) -> Tensor:
    """Return -log(e^{s+/τ} / (e^{s+/τ} + w·Σ e^{s-/τ})) per row (Eq. 10; Eq. 3 without a weight), (B,).

    Args:
        similarity: s(z_i, e_j) of the fused vectors, positives on the diagonal, (B, B) or (B, B + K).
        others: which columns are negatives, bool of the same shape.
        tau: temperature.
        weight: w of each row, (B,), above 0.
    """
    logits = similarity / tau
    # relative to the positive the loss is log(1 + Σ e^x): never below 0, and accurate when it is small
    behind = logits - logits.diagonal()[:, None]  # (B, B)
    if weight is not None:
        behind = behind + weight.log()[:, None]
    positive = torch.eye(*others.shape, dtype=torch.bool, device=others.device)
    behind = behind.masked_fill(~others, -math.inf).masked_fill(positive, 0.0)
    return behind.logsumexp(dim=1)


def topology_divergence(text: Tensor, image: Tensor, others: Tensor, tau: float) -> Tensor:
    """Return ½·(KL(P_T‖P_V) + KL(P_V‖P_T)) per row (Eqs. 11-13), (B,).

    Row i's candidates are its own target and its negatives.

    Args:
        text: s(z_i^T, e_j^T), (B, B) or, with hard negatives, (B, B + K).
        image: s(z_i^V, e_j^V), of the same shape.
        others: which columns are negatives, bool of the same shape.
        tau: temperature τ_CRTR.
    """
    left_out = ~others & ~torch.eye(*others.shape, dtype=torch.bool, device=others.device)
    # Logarithms throughout, because at τ_CRTR = 0.001 most probabilities underflow. An excluded candidate has
    # probability 0 on both sides: both logs are set to the same finite number, because ∞ - ∞ would be NaN.
    log_text = (text / tau).masked_fill(left_out, -math.inf).log_softmax(dim=1).masked_fill(left_out, 0.0)
    log_image = (image / tau).masked_fill(left_out, -math.inf).log_softmax(dim=1).masked_fill(left_out, 0.0)
    # both divergences as one sum, in which every term is >= 0
    return 0.5 * ((log_text.exp() - log_image.exp()) * (log_text - log_image)).sum(dim=1)


class LearnedTemperature(nn.Module):
    """A temperature τ that is learned by its logarithm, so that it stays above 0; keep it out of weight decay.

    Args:
        tau: where τ starts.
    """

    def __init__(self, tau: float) -> None:
        super().__init__()
        require(tau > 0 and math.isfinite(tau), f"the temperature is {tau}", "a finite number above 0")
        self.log_tau = nn.Parameter(torch.tensor(math.log(tau)))

    def forward(self) -> Tensor:
        """Return τ, a scalar with gradient."""
        return self.log_tau.exp()


# --- in the form that training calls ---------------------------------------------------------------------------------

Views = Mapping[str, Tensor]
"""Vectors of B users or items by view, (B, d) each: `fused`, and `text` and `image` if the encoder makes them."""

Log = dict[str, Tensor]
"""Scalars for the training curves, by name."""


class InfoNCEObjective(nn.Module):
    """InfoNCE of the fused vectors (`info_nce`)."""

    def __init__(self, tau: float = 0.1) -> None:
        super().__init__()
        self.tau = tau

    def forward(
        self, users: Views, items: Views, targets: Tensor, hard: HardNegatives | None = None
    ) -> tuple[Tensor, Log]:
        """Return the loss of users and their target items, and the margins of each view for the curves.

        Args:
            users: vectors by view, (B, d) each.
            items: those of their target items.
            targets: integer ids of the target items, (B,).
            hard: more negatives, with the same views.
        """
        total = info_nce(users[schema.FUSED], items[schema.FUSED], targets, self.tau, hard)
        others = negatives_of(targets, hard)
        found = {}
        for view in (view for view in schema.MODALITIES if view in users):
            more = None if hard is None else hard.vectors[view]
            found[view] = margins(similarities(users[view], items[view], more), others)
        return total, _margins_to_log(found)


class VLM2RecObjective(VLM2RecLoss):
    """`VLM2RecLoss` of vectors by view. It is a subclass, so that checkpoints keep the names of α and β."""

    def forward(  # type: ignore[override]
        self, users: Views, items: Views, targets: Tensor, hard: HardNegatives | None = None
    ) -> tuple[Tensor, Log]:
        """Return the loss of users and their target items, and its parts for the curves; arguments as for InfoNCE."""
        sides = (users[schema.TEXT], users[schema.IMAGE], items[schema.TEXT], items[schema.IMAGE])
        parts = super().forward(*sides, targets, hard)
        return parts.total, {
            "wpcl": parts.wpcl,
            "crtr": parts.crtr,
            "weight": parts.weight.mean(),
            "weight_min": parts.weight.min(),
            "weight_max": parts.weight.max(),
            **_margins_to_log({schema.TEXT: parts.margin_text, schema.IMAGE: parts.margin_image}),
            "alpha": self.alpha,
            "beta": self.beta,
        }


class Matryoshka(nn.Module):
    """The mean of a loss over the first numbers of all vectors, in several lengths, and over whole vectors.

    The loss compares vectors by cosine, so a prefix counts as if it were one long. The curves hold what the loss tells
    of whole vectors, and its value for each shorter length.

    Args:
        loss: called as `loss(users, items, targets)`, and with `HardNegatives` if there are some.
        lengths: how many of the first numbers, in rising order; whole vectors come on top.
    """

    def __init__(self, loss: nn.Module, lengths: Sequence[int]) -> None:
        super().__init__()
        rising = all(before < after for before, after in itertools.pairwise(lengths))
        require(
            len(lengths) > 0 and lengths[0] > 0 and rising,
            f"lengths {list(lengths)}",
            "numbers above 0 in rising order",
        )
        self.loss, self.lengths = loss, tuple(lengths)

    def forward(
        self, users: Views, items: Views, targets: Tensor, hard: HardNegatives | None = None
    ) -> tuple[Tensor, Log]:
        """Return the mean loss, and what to log of it; arguments as for the loss."""
        totals, told = [], Log()
        for length in self.lengths:
            short = [{view: vectors[:, :length] for view, vectors in side.items()} for side in (users, items)]
            more = []
            if hard is not None:
                cut = {view: vectors[..., :length] for view, vectors in hard.vectors.items()}
                more = [HardNegatives(cut, hard.ids)]
            total, _ = self.loss(*short, targets, *more)
            totals.append(total)
            told[f"loss_{length}"] = total
        total, log = self.loss(users, items, targets, *([] if hard is None else [hard]))
        return torch.stack([*totals, total]).mean(), log | told


def _margins_to_log(by_view: Mapping[str, Tensor]) -> Log:
    """Return each view's mean margin and, with two views, the share of users whose weak modality is the image."""
    log = {f"margin_{view}": margin.mean() for view, margin in by_view.items()}
    if len(by_view) == len(schema.MODALITIES):
        log["weak_is_image"] = (by_view[schema.IMAGE] < by_view[schema.TEXT]).float().mean()
    return log


# --- settings and shapes --------------------------------------------------------------------------------------


def _positive(raw: Tensor) -> Tensor:
    # the lower bound keeps the value above 0 if softplus itself underflows
    return F.softplus(at_least_float32(raw)).clamp_min(torch.finfo(torch.float32).tiny)


def _softplus_inverse(value: float) -> float:
    return value + math.log(-math.expm1(-value))


def require(condition: bool, found: str, expected: str) -> None:
    """Raise `ConfigError` about a loss's settings unless the condition holds."""
    if not condition:
        raise ConfigError(found, expected, "correct the loss settings")


def check_batch(item_ids: Tensor, *vectors: Tensor, hard: HardNegatives | None = None) -> None:
    """Raise `ValueError` unless the ids are (B,) and all vectors (B, d), B > 0; hard negatives (B, K) and (B, K, d)."""
    shapes = [tuple(v.shape) for v in vectors]
    batch = item_ids.shape[0] if item_ids.dim() == 1 else None
    if len(set(shapes)) != 1 or len(shapes[0]) != 2 or shapes[0][0] != batch or batch == 0:
        raise ValueError(f"vectors are {shapes} and item_ids {tuple(item_ids.shape)}; expected (B, d) and (B,), B > 0")
    if hard is None:
        return
    for found in hard.vectors.values():
        if found.shape[:2] != hard.ids.shape or len(found) != batch or found.dim() != 3:
            raise ValueError(
                f"hard negatives are {tuple(found.shape)} with ids {tuple(hard.ids.shape)}; expected ({batch}, K, d)"
                f" and ({batch}, K)"
            )
