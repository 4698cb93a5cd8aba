"""The losses against the paper's equations, written out once more with loops over Python floats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.embedder.training.losses import (
    VLM2RecLoss,
    contrastive,
    cosines,
    effective_negatives,
    info_nce,
    margins,
    other_items,
    penalty_weight,
    topology_divergence,
)

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
LN2 = math.log(2)


# --- the reference: nothing but Python floats ---------------------------------------------------------------
def ref_cosine(a: Sequence[float], b: Sequence[float]) -> float:
    length = math.sqrt(math.fsum(x * x for x in a)) * math.sqrt(math.fsum(x * x for x in b))
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / length if length else 0.0


def ref_negatives(i: int, ids: Sequence[int]) -> list[int]:
    return [j for j in range(len(ids)) if j != i and ids[j] != ids[i]]


def ref_margin(users: list, items: list, ids: Sequence[int], i: int) -> float:
    negatives = ref_negatives(i, ids)
    if not negatives:
        return 0.0
    mean = math.fsum(ref_cosine(users[i], items[j]) for j in negatives) / len(negatives)
    return ref_cosine(users[i], items[i]) - mean


def ref_contrastive(users: list, items: list, ids: Sequence[int], i: int, tau: float, w: float) -> float:
    positive = math.exp(ref_cosine(users[i], items[i]) / tau)
    negative = math.fsum(math.exp(ref_cosine(users[i], items[j]) / tau) for j in ref_negatives(i, ids))
    return -math.log(positive / (positive + w * negative))


def ref_distribution(users: list, items: list, ids: Sequence[int], i: int, tau: float) -> dict[int, float]:
    candidates = [i, *ref_negatives(i, ids)]
    scores = {j: math.exp(ref_cosine(users[i], items[j]) / tau) for j in candidates}
    total = math.fsum(scores.values())
    return {j: s / total for j, s in scores.items()}


def ref_kl(p: dict[int, float], q: dict[int, float]) -> float:
    return math.fsum(p[j] * math.log(p[j] / q[j]) for j in p)


def reference(
    batch: Batch,
    ids: Sequence[int],
    *,
    tau_wpcl: float = 0.1,
    tau_crtr: float = 0.1,
    lam: float = 0.1,
    alpha: float = 1.0,
    beta: float = 1.0,
    penalty: bool = True,
    crtr: bool = True,
    reduction: str = "paper",
    frozen_strong: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Eqs. 2 and 6-14, divided by the batch size.

    `frozen_strong` replaces sg[M_strong]: what a finite difference must hold still.
    """
    user_text, user_image, item_text, item_image = (v.double().tolist() for v in batch)
    user = [[a + b for a, b in zip(t, v, strict=True)] for t, v in zip(user_text, user_image, strict=True)]
    item = [[a + b for a, b in zip(t, v, strict=True)] for t, v in zip(item_text, item_image, strict=True)]
    rows: dict[str, list[float]] = {name: [] for name in ("wpcl", "crtr", "weight", "text", "image", "strong")}
    for i in range(len(ids)):
        text, image = ref_margin(user_text, item_text, ids, i), ref_margin(user_image, item_image, ids, i)
        strong = max(text, image) if frozen_strong is None else frozen_strong[i]
        gap = strong - min(text, image)
        w = 1 + beta * math.log(1 + math.exp(alpha * gap)) if penalty else 1.0
        p = ref_distribution(user_text, item_text, ids, i, tau_crtr)
        q = ref_distribution(user_image, item_image, ids, i, tau_crtr)
        rows["wpcl"].append(ref_contrastive(user, item, ids, i, tau_wpcl, w))
        rows["crtr"].append((ref_kl(p, q) + ref_kl(q, p)) / 2 if crtr else 0.0)
        for name, value in (("weight", w), ("text", text), ("image", image), ("strong", strong)):
            rows[name].append(value)
    wpcl, crtr_mean = (math.fsum(rows[name]) / len(ids) for name in ("wpcl", "crtr"))
    # Eq. 10 sums over the users, Eq. 13 is a mean; the whole is divided by B
    as_printed = (math.fsum(rows["wpcl"]) + lam * crtr_mean) / len(ids)
    total = as_printed if reduction == "paper" else wpcl + lam * crtr_mean
    return {**rows, "wpcl": wpcl, "crtr": crtr_mean, "total": total}


def make_batch(size: int, dim: int, seed: int, dtype: torch.dtype = torch.float64) -> Batch:
    """Random vectors with a signal: items lean on their users, images less than texts; text is three times as long."""
    generator = torch.Generator().manual_seed(seed)
    user_text, user_image, noise_text, noise_image = (
        torch.randn(size, dim, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    item_text, item_image = user_text + noise_text, 0.3 * user_image + noise_image
    return (3 * user_text).to(dtype), user_image.to(dtype), (3 * item_text).to(dtype), item_image.to(dtype)


def assert_matches(parts: Any, expected: dict[str, Any], tolerance: float) -> None:
    for name in ("total", "wpcl", "crtr"):
        assert getattr(parts, name).item() == pytest.approx(expected[name], abs=tolerance), name
    for name, key in (("weight", "weight"), ("margin_text", "text"), ("margin_image", "image")):
        assert getattr(parts, name).tolist() == pytest.approx(expected[key], abs=tolerance), name


# --- values -------------------------------------------------------------------------------------------------
SETTINGS: list[dict[str, Any]] = [
    {},
    {"tau_wpcl": 0.05, "tau_crtr": 0.01, "lam": 1.0},
    {"tau_wpcl": 1.0, "tau_crtr": 1.0, "lam": 0.1, "alpha": 4.0, "beta": 0.25},
    {"alpha": 0.01, "beta": 7.0},
    {"penalty": False},
    {"crtr": False},
    {"lam": 0.5, "reduction": "mean"},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4], [7, 7, 1, 2, 7], [3, 1], [5, 5, 9]])
def test_every_part_equals_the_equations(settings: dict[str, Any], ids: list[int]) -> None:
    batch = make_batch(len(ids), 6, seed=len(ids))
    # the α and β of a float64 module are as exact as the reference's
    loss = VLM2RecLoss(**settings).double()
    assert_matches(loss(*batch, torch.tensor(ids)), reference(batch, ids, **settings), 1e-6)


@pytest.mark.parametrize("settings", SETTINGS)
def test_float32_input_keeps_to_the_equations(settings: dict[str, Any]) -> None:
    ids = [4, 1, 4, 2, 8, 1, 3, 0]
    batch = make_batch(8, 64, seed=1, dtype=torch.float32)
    expected = reference(batch, ids, **settings)
    # a float32 cosine is good to 1e-7 and is divided by the temperature
    assert_matches(VLM2RecLoss(**settings)(*batch, torch.tensor(ids)), expected, 2e-5)


@pytest.mark.parametrize("reduction", ["paper", "mean"])
@pytest.mark.parametrize("size", [2, 3, 8, 16, 33, 64])
def test_both_reductions_equal_the_equations_for_any_batch(reduction: str, size: int) -> None:
    batch, ids = make_batch(size, 12, seed=size), [i * i % (size // 2 + 2) for i in range(size)]  # with duplicates
    settings: dict[str, Any] = {"lam": 0.5, "tau_crtr": 0.05, "alpha": 10.0, "reduction": reduction}
    parts = VLM2RecLoss(**settings).double()(*batch, torch.tensor(ids))
    assert_matches(parts, reference(batch, ids, **settings), 1e-6)


@pytest.mark.parametrize("size", [2, 8, 64])
def test_the_means_weigh_crtr_as_many_times_more_as_there_are_users(size: int) -> None:
    batch, ids = make_batch(size, 6, seed=size), torch.arange(size)
    paper, mean = VLM2RecLoss(lam=0.3 * size)(*batch, ids), VLM2RecLoss(lam=0.3, reduction="mean")(*batch, ids)
    assert paper.total.item() == pytest.approx(mean.total.item(), rel=1e-6)
    assert (paper.wpcl, paper.crtr) == (mean.wpcl, mean.crtr)


def test_switches_leave_their_term_out() -> None:
    batch, ids = make_batch(6, 5, seed=2), torch.tensor([0, 1, 2, 3, 3, 4])
    full = VLM2RecLoss(lam=2.0)(*batch, ids)
    assert full.crtr.item() > 0.01 and full.wpcl.item() > 0.01
    assert full.total.item() == pytest.approx(full.wpcl.item() + 2 * full.crtr.item() / 6)

    without_crtr = VLM2RecLoss(lam=2.0, crtr=False)(*batch, ids)
    assert without_crtr.crtr.item() == 0 and without_crtr.total.item() == full.wpcl.item()

    without_wpcl = VLM2RecLoss(lam=2.0, wpcl=False)(*batch, ids)
    assert without_wpcl.wpcl.item() == 0 and without_wpcl.total.item() == pytest.approx(2 * full.crtr.item() / 6)

    without_penalty = VLM2RecLoss(penalty=False, crtr=False)(*batch, ids)
    user, item = batch[0] + batch[1], batch[2] + batch[3]
    assert without_penalty.weight.tolist() == [1.0] * 6
    assert without_penalty.total.item() == pytest.approx(float(info_nce(user, item, ids)), abs=1e-12)


@pytest.mark.parametrize("tau", [0.05, 0.1, 1.0])
def test_info_nce_equals_equation_3(tau: float) -> None:
    ids = [0, 1, 2, 1, 3]
    user_text, _, item_text, _ = make_batch(5, 7, seed=3)
    rows = [ref_contrastive(user_text.tolist(), item_text.tolist(), ids, i, tau, 1.0) for i in range(5)]
    assert float(info_nce(user_text, item_text, torch.tensor(ids), tau)) == pytest.approx(sum(rows) / 5, abs=1e-9)


def test_an_easy_batch_has_a_loss_that_is_small_but_not_negative() -> None:
    user = torch.eye(4)
    loss = float(info_nce(user, user, torch.arange(4), tau=0.05))
    assert loss == pytest.approx(3 * math.exp(-20), rel=0.2, abs=1e-7) and loss >= 0


def test_zero_vectors_give_the_closed_form() -> None:
    # every cosine is 0: margins 0, w = 1 + β·ln 2, WPCL = ln(1 + w·(B - 1)), both topologies uniform
    zero = torch.zeros(8, 16)
    parts = VLM2RecLoss(alpha=2.0, beta=0.5)(zero, zero, zero, zero, torch.arange(8))
    w = 1.3465735902799727
    assert parts.weight.tolist() == pytest.approx([w] * 8)
    assert parts.wpcl.item() == pytest.approx(math.log(1 + 7 * w), abs=1e-6)
    assert parts.crtr.item() == 0 and parts.margin_text.tolist() == [0] * 8
    assert float(info_nce(zero, zero, torch.arange(8))) == pytest.approx(math.log(8), abs=1e-6)


def test_zero_vectors_have_gradients_of_ordinary_size() -> None:
    vectors = [torch.zeros(4, 3, requires_grad=True) if k % 2 else v for k, v in enumerate(make_batch(4, 3, seed=4))]
    VLM2RecLoss().double()(*vectors, torch.arange(4)).total.backward()
    for vector in vectors[1::2]:
        assert vector.grad is not None and bool(vector.grad.isfinite().all()) and float(vector.grad.abs().max()) < 1e3


def test_the_larger_vector_dominates_the_raw_sum_and_not_the_normalised_one() -> None:
    batch, ids = make_batch(5, 6, seed=5), torch.arange(5)
    longer = (1000 * batch[0], batch[1], 1000 * batch[2], batch[3])
    raw, normalised = VLM2RecLoss(crtr=False), VLM2RecLoss(crtr=False, fusion_norm="normalised")
    assert abs(raw(*batch, ids).wpcl.item() - raw(*longer, ids).wpcl.item()) > 0.01
    assert normalised(*batch, ids).wpcl.item() == pytest.approx(normalised(*longer, ids).wpcl.item(), abs=1e-9)
    scaled = tuple(v / v.norm(dim=1, keepdim=True) for v in batch)
    assert normalised(*batch, ids).wpcl.item() == pytest.approx(raw(*scaled, ids).wpcl.item(), abs=1e-9)


# --- repeated targets, order, size --------------------------------------------------------------------------
def test_order_of_the_batch_does_not_matter() -> None:
    batch, ids = make_batch(8, 6, seed=6), torch.tensor([0, 1, 2, 1, 3, 4, 0, 5])
    order = torch.tensor([5, 2, 7, 0, 3, 6, 1, 4])
    loss = VLM2RecLoss()
    a, b = loss(*batch, ids), loss(*(v[order] for v in batch), ids[order])
    assert a.total.item() == pytest.approx(b.total.item(), abs=1e-9)
    for name in ("weight", "margin_text", "margin_image"):
        assert getattr(a, name)[order].tolist() == pytest.approx(getattr(b, name).tolist(), abs=1e-9)


def test_the_vector_of_a_repeated_target_changes_nothing_in_the_other_row() -> None:
    ids = torch.tensor([3, 5, 3, 8])  # rows 0 and 2 have the same target
    others = other_items(ids)
    batch = make_batch(4, 5, seed=7)
    changed = tuple(v.clone() for v in batch)
    for v in changed[2:]:
        v[2] = torch.tensor([9.0, -4.0, 1.0, 0.0, 2.0])
    rows = []
    for user_text, user_image, item_text, item_image in (batch, changed):
        text, image = cosines(user_text, item_text), cosines(user_image, item_image)
        fused = cosines(user_text + user_image, item_text + item_image)
        rows.append(
            torch.stack(
                [
                    margins(text, others),
                    margins(image, others),
                    contrastive(fused, others, 0.1),
                    topology_divergence(text, image, others, 0.1),
                ]
            )
        )
    assert torch.equal(rows[0][:, 0], rows[1][:, 0])
    assert not torch.isclose(rows[0][:, 1:], rows[1][:, 1:]).any()  # every other row does see item 2's vector


def test_no_gradient_reaches_a_repeated_target_through_the_other_row() -> None:
    ids = torch.tensor([3, 5, 3, 8])
    _, _, item_text, item_image = batch = make_batch(4, 5, seed=7)
    item_text.requires_grad_()
    text, image = cosines(batch[0], item_text), cosines(batch[1], item_image)
    row = contrastive(text, other_items(ids), 0.1)[0] + topology_divergence(text, image, other_items(ids), 0.1)[0]
    row.backward()
    assert item_text.grad is not None
    assert item_text.grad[2].tolist() == [0.0] * 5
    assert bool((item_text.grad[[0, 1, 3]].abs().amax(dim=1) > 0).all())


def test_effective_negatives_are_counted() -> None:
    assert effective_negatives(torch.tensor([3, 5, 3, 8])).tolist() == [2, 3, 2, 3]
    assert effective_negatives(torch.tensor([4, 4, 4])).tolist() == [0, 0, 0]
    assert effective_negatives(torch.tensor([4])).tolist() == [0]


@pytest.mark.parametrize("ids", [[3], [3, 3, 3]])
def test_without_negatives_everything_is_finite_and_the_loss_is_zero(ids: list[int]) -> None:
    vectors = [v.requires_grad_() for v in make_batch(len(ids), 4, seed=8)]
    loss = VLM2RecLoss()
    parts = loss(*vectors, torch.tensor(ids))
    parts.total.backward()
    assert [parts.total.item(), parts.wpcl.item(), parts.crtr.item()] == [0, 0, 0]
    assert parts.margin_text.tolist() == [0] * len(ids)
    assert parts.weight.tolist() == pytest.approx([1 + LN2] * len(ids))
    for tensor in [*vectors, *loss.parameters()]:
        assert tensor.grad is not None and not tensor.grad.any()


def test_rows_without_negatives_count_in_the_mean() -> None:
    batch = make_batch(3, 4, seed=9)
    three = VLM2RecLoss()(*batch, torch.tensor([1, 1, 2]))
    assert_matches(three, reference(batch, [1, 1, 2]), 1e-6)


# --- numerics -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_computed_in_float32(dtype: torch.dtype) -> None:
    ids = torch.tensor([0, 1, 2, 3, 1, 4])
    batch = make_batch(6, 32, seed=10, dtype=dtype)
    parts = VLM2RecLoss()(*batch, ids)
    assert all(part.dtype == torch.float32 for part in parts)
    assert_matches(parts, reference(batch, ids.tolist()), 2e-5)


def test_autocast_does_not_round_the_similarities() -> None:
    batch, ids = make_batch(6, 32, seed=11, dtype=torch.float32), torch.arange(6)
    loss = VLM2RecLoss(tau_crtr=0.01)
    plain = loss(*batch, ids)
    sft = info_nce(batch[0], batch[2], ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (batch[0] @ batch[2].T).dtype == torch.bfloat16  # autocast is at work
        under_autocast = loss(*batch, ids)
        assert torch.equal(info_nce(batch[0], batch[2], ids), sft)
    for a, b in zip(plain, under_autocast, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_smallest_temperature_stays_finite(dtype: torch.dtype) -> None:
    batch = make_batch(8, 4, seed=12, dtype=dtype)
    batch[2][0], batch[3][0] = -batch[0][0], batch[1][0]  # logits from -1000 to 1000: most probabilities underflow
    vectors = [v.requires_grad_() for v in batch]
    loss = VLM2RecLoss(tau_wpcl=0.001, tau_crtr=0.001)
    parts = loss(*vectors, torch.tensor([0, 1, 2, 2, 3, 4, 5, 6]))
    parts.total.backward()
    assert parts.crtr.item() > 100 and all(bool(part.isfinite().all()) for part in parts)
    for tensor in [*vectors, *loss.parameters()]:
        assert tensor.grad is not None and bool(tensor.grad.isfinite().all()) and bool(tensor.grad.any())


def test_smallest_temperature_has_the_right_value() -> None:
    # two candidates; text prefers the first by cosine 1, image the second: both KL are 1/τ
    a, b = [1.0, 0.0], [0.0, 1.0]
    text, image = torch.tensor([a, a]), torch.tensor([b, b])
    parts = VLM2RecLoss(tau_crtr=0.001)(text, image, torch.tensor([a, b]), torch.tensor([a, b]), torch.tensor([1, 2]))
    assert parts.crtr.item() == pytest.approx(1000)


# --- gradients ----------------------------------------------------------------------------------------------
def leaves(batch: Batch) -> list[Tensor]:
    return [v.clone().requires_grad_() for v in batch]


def gradients_of_weight(stop_gradient: bool) -> tuple[list[Tensor], Tensor]:
    """Gradients of Σ w with text the strong modality of row 0 and image of row 1."""
    vectors = leaves(make_batch(2, 4, seed=0))
    with torch.no_grad():
        vectors[2][0] = vectors[0][0]  # text of row 0 fits perfectly,
        vectors[3][1] = vectors[1][1]  # and the image of row 1
        vectors[3][0], vectors[2][1] = -vectors[1][0], -vectors[0][1]
    parts = VLM2RecLoss(stop_gradient=stop_gradient)(*vectors, torch.arange(2))
    assert (parts.margin_text > parts.margin_image).tolist() == [True, False]
    return list(torch.autograd.grad(parts.weight.sum(), vectors)), parts.weight


def test_the_weight_sends_gradient_to_the_weak_modality_only() -> None:
    (user_text, user_image, _, _), _ = gradients_of_weight(stop_gradient=True)
    assert user_text[0].tolist() == [0.0] * 4 and bool(user_text[1].any())
    assert user_image[1].tolist() == [0.0] * 4 and bool(user_image[0].any())


def test_without_stop_gradient_the_strong_modality_is_reached_too() -> None:
    held, weight = gradients_of_weight(stop_gradient=True)
    free, same_weight = gradients_of_weight(stop_gradient=False)
    assert torch.equal(weight, same_weight)
    assert bool(free[0][0].any()) and bool(free[1][1].any())
    assert torch.equal(held[0][1], free[0][1]) and torch.equal(held[1][0], free[1][0])  # the weak side is the same


def test_raising_the_weak_margin_lowers_the_weight() -> None:
    text = torch.tensor([0.8], requires_grad=True)
    image = torch.tensor([0.1], requires_grad=True)
    weight = penalty_weight(text, image, torch.tensor(2.0), torch.tensor(0.5))
    weight.sum().backward()
    # dw/dM_weak = -α·β·sigmoid(α·Δ) with Δ = 0.7
    assert weight.item() == pytest.approx(1 + 0.5 * math.log1p(math.exp(1.4)))
    assert text.grad is None or float(text.grad) == 0
    assert image.grad is not None and float(image.grad) == pytest.approx(-1 / (1 + math.exp(-1.4)))


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_gradients_equal_finite_differences_of_the_reference(stop_gradient: bool) -> None:
    ids = [0, 1, 0, 2]
    batch = make_batch(4, 3, seed=13)
    vectors = leaves(batch)
    VLM2RecLoss(stop_gradient=stop_gradient, alpha=1.5, beta=2.0).double()(*vectors, torch.tensor(ids)).total.backward()
    strong = reference(batch, ids)["strong"] if stop_gradient else None
    step = 1e-5
    for which, vector in enumerate(vectors):
        for i in range(4):
            for k in range(3):
                totals = []
                for sign in (step, -step):
                    moved = [v.clone() for v in batch]
                    moved[which][i, k] += sign
                    expected = reference(tuple(moved), ids, alpha=1.5, beta=2.0, frozen_strong=strong)  # type: ignore[arg-type]
                    totals.append(expected["total"])
                assert vector.grad is not None
                assert float(vector.grad[i, k]) == pytest.approx((totals[0] - totals[1]) / (2 * step), abs=1e-6)


def test_stop_gradient_changes_the_gradient_of_the_total() -> None:
    gradients = []
    for stop_gradient in (True, False):
        vectors = leaves(make_batch(4, 3, seed=13))
        VLM2RecLoss(stop_gradient=stop_gradient)(*vectors, torch.arange(4)).total.backward()
        gradients.append(torch.cat([v.grad for v in vectors if v.grad is not None]))
    assert not torch.allclose(gradients[0], gradients[1], atol=1e-4)


def test_alpha_and_beta_gradients_equal_finite_differences() -> None:
    batch, ids = make_batch(4, 3, seed=14), [0, 1, 2, 3]
    loss = VLM2RecLoss(alpha=0.7, beta=1.2).double()
    loss(*batch, torch.tensor(ids)).total.backward()
    step = 1e-6
    for name, value in (("alpha", 0.7), ("beta", 1.2)):
        high, low = (
            reference(batch, ids, **{"alpha": 0.7, "beta": 1.2, name: value + sign})["total"] for sign in (step, -step)
        )
        raw = getattr(loss, f"raw_{name}")
        # chain rule: d softplus(raw) / d raw = 1 - e^{-value}
        assert float(raw.grad) == pytest.approx((high - low) / (2 * step) * (1 - math.exp(-value)), abs=1e-6)
        assert float(raw.grad) > 0  # the loss always wants less penalty


# --- α and β ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [1e-6, 0.01, 1.0, 3.0, 50.0])
def test_alpha_and_beta_start_at_the_values_given(value: float) -> None:
    loss = VLM2RecLoss(alpha=value, beta=2 * value)
    assert float(loss.alpha) == pytest.approx(value, rel=1e-5)
    assert float(loss.beta) == pytest.approx(2 * value, rel=1e-5)
    assert sorted(name for name, _ in loss.named_parameters()) == ["raw_alpha", "raw_beta"]


@pytest.mark.parametrize("settings", [{"learnable": False}, {"penalty": False}, {"wpcl": False}])
def test_alpha_and_beta_are_no_parameters_where_nothing_could_train_them(settings: dict[str, Any]) -> None:
    loss = VLM2RecLoss(alpha=2.0, beta=3.0, **settings)
    assert list(loss.parameters()) == []
    assert (float(loss.alpha), float(loss.beta)) == pytest.approx((2.0, 3.0))
    assert set(loss.state_dict()) == {"raw_alpha", "raw_beta"}
    assert "alpha=2" in repr(loss) and "beta=3" in repr(loss)


@pytest.mark.parametrize(("steps", "rate"), [(1_000, 0.5), pytest.param(10_000, 0.05, marks=pytest.mark.slow)])
def test_beta_and_weight_stay_positive_over_thousands_of_steps(steps: int, rate: float) -> None:
    batch, ids = make_batch(8, 8, seed=15, dtype=torch.float32), torch.arange(8)
    loss = VLM2RecLoss(crtr=False)
    # the vectors hardly move, so there is always something to gain from a smaller β
    optimiser = torch.optim.AdamW(loss.parameters(), lr=rate, weight_decay=0.0)
    least_beta, least_weight = math.inf, math.inf
    for _ in range(steps):
        optimiser.zero_grad()
        parts = loss(*batch, ids)
        parts.total.backward()
        optimiser.step()
        least_beta = min(least_beta, float(loss.beta))
        least_weight = min(least_weight, float(parts.weight.detach().min()))
    assert 0 < least_beta < 1e-3 and float(loss.alpha) > 0  # β was driven down, not through zero
    assert least_weight >= 1


def test_beta_is_positive_even_where_softplus_underflows() -> None:
    loss = VLM2RecLoss()
    with torch.no_grad():
        loss.raw_beta.fill_(-1e4)
    assert float(loss.beta) > 0
    parts = loss(*make_batch(3, 4, seed=16, dtype=torch.float32), torch.arange(3))
    parts.total.backward()
    assert bool(parts.total.isfinite()) and parts.weight.tolist() == [1, 1, 1]


# --- refusals -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tau_wpcl": 0.0}, "tau_wpcl"),
        ({"tau_crtr": -1.0}, "tau_crtr"),
        ({"alpha": 0.0}, "alpha"),
        ({"beta": math.nan}, "beta"),
        ({"lam": -0.1}, "lam"),
        ({"fusion_norm": "unit"}, "fusion_norm"),
        ({"wpcl": False, "crtr": False}, "both off"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        VLM2RecLoss(**settings)


def test_shapes_that_do_not_fit_are_refused() -> None:
    batch = make_batch(4, 3, seed=17)
    for ids in (torch.arange(3), torch.arange(4)[:, None]):
        with pytest.raises(ValueError, match="expected"):
            VLM2RecLoss()(*batch, ids)
    with pytest.raises(ValueError, match="expected"):
        VLM2RecLoss()(batch[0], batch[1], batch[2], batch[3][:, :2], torch.arange(4))
    with pytest.raises(ValueError, match="B > 0"):
        info_nce(torch.zeros(0, 3), torch.zeros(0, 3), torch.arange(0))
    with pytest.raises(ConfigError, match="tau"):
        info_nce(batch[0], batch[2], torch.arange(4), tau=0)
