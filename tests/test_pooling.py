from __future__ import annotations

import math

import pytest
import torch

from vlm2rec.embedder.backbones.pooling import fuse, last_token, mean_tokens, norm_ratio, unit
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.embedder.training.losses import VLM2RecLoss, cosines

# four positions of width 2; position t of row b holds (10·b + t, -t)
HIDDEN = torch.tensor([[[10.0 * b + t, -t] for t in range(4)] for b in range(3)])


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_last_token_is_read_from_the_mask_on_either_padding_side(kind: torch.dtype) -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]]).to(kind)  # right padding, left padding, none
    assert last_token(HIDDEN, mask).tolist() == [[1, -1], [13, -3], [23, -3]]


def test_last_token_of_a_mask_with_a_gap_is_the_last_attended_one() -> None:
    mask = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0]])
    assert last_token(HIDDEN, mask).tolist() == [[2, -2], [10, 0], [21, -1]]


def test_last_token_keeps_dtype_and_sends_gradient_to_that_token_only() -> None:
    hidden = HIDDEN.bfloat16().requires_grad_()
    pooled = last_token(hidden, torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]]))
    assert pooled.dtype == torch.bfloat16
    pooled.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum(dim=2).tolist() == [[0, 2, 0, 0], [0, 0, 0, 2], [0, 0, 0, 2]]


def test_mean_tokens_ignores_padding_whatever_stands_there() -> None:
    hidden = HIDDEN.clone()
    hidden[0, 2:], hidden[1, :2] = math.nan, math.inf
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    assert mean_tokens(hidden, mask).tolist() == [[0.5, -0.5], [12.5, -2.5], [21.5, -1.5]]


def test_mean_tokens_sums_half_precision_in_float32() -> None:
    # in bf16, 256 + 1 is 256: a running sum would never leave it
    hidden = torch.ones(1, 1025, 1, dtype=torch.bfloat16)
    hidden[0, 0] = 256
    assert mean_tokens(hidden, torch.ones(1, 1025)).item() == pytest.approx(1280 / 1025)


@pytest.mark.parametrize("pool", [last_token, mean_tokens])
def test_a_row_without_tokens_is_refused_by_number(pool) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        pool(HIDDEN, torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]))
    with pytest.raises(ValueError, match="expected"):
        pool(HIDDEN, torch.ones(3, 5))


def test_fuse_adds_the_vectors_as_they_are() -> None:
    text, image = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[0.0, -1.0], [5.0, 0.0]])
    assert fuse(text, image).tolist() == [[3, 3], [5, 2]]


def test_normalised_fusion_adds_unit_vectors() -> None:
    text, image = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[0.0, -10.0], [5.0, 0.0]])
    assert fuse(text, image, norm="normalised").tolist() == [pytest.approx([0.6, -0.2]), [1, 0]]


def test_fuse_does_not_round_the_sum_to_half_precision() -> None:
    text, image = torch.tensor([256.0], dtype=torch.bfloat16), torch.tensor([1.0], dtype=torch.bfloat16)
    assert fuse(text, image).item() == 257 and (text + image).item() == 256


def test_fuse_refuses_an_unknown_way() -> None:
    with pytest.raises(ConfigError, match="concat"):
        fuse(torch.ones(1, 2), torch.ones(1, 2), norm="concat")  # type: ignore[arg-type]


def test_the_loss_fuses_as_fuse_does() -> None:
    generator = torch.Generator().manual_seed(0)
    user_text, user_image, item_text, item_image = (torch.randn(3, 4, generator=generator) for _ in range(4))
    for norm in ("raw", "normalised"):
        loss = VLM2RecLoss(crtr=False, penalty=False, fusion_norm=norm)  # type: ignore[arg-type]
        similarity = cosines(fuse(user_text, user_image, norm), fuse(item_text, item_image, norm)) / 0.1  # type: ignore[arg-type]
        expected = torch.nn.functional.cross_entropy(similarity, torch.arange(3)).item()
        found = loss(user_text, user_image, item_text, item_image, torch.arange(3)).total.item()
        assert found == pytest.approx(expected, abs=1e-6)


def test_norm_ratio_is_text_over_image() -> None:
    text = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    image = torch.tensor([[0.0, 2.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    assert norm_ratio(text, image).tolist() == [2.5, 0.0, math.inf, 1.0]


def test_unit_vectors_have_length_one_and_zero_stays_zero() -> None:
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-15, 0.0], [0.0, -1e15]], requires_grad=True)
    found = unit(vectors)
    assert found.tolist() == [pytest.approx([0.6, 0.8]), [0, 0], [1, 0], [0, -1]]
    assert unit(vectors.detach().bfloat16()).dtype == torch.float32
    found[1].sum().backward()
    assert vectors.grad is not None and vectors.grad[1].tolist() == [1, 1]
