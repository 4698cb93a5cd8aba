"""The fake CUDA device of `fake_cuda.py`: what it refuses, what it computes, what it counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fake_cuda import CudaTensor, MixedDevicesError, fake_cuda
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

ON_CARD = {
    "a sum": lambda card, cpu: card + cpu,
    "an index": lambda card, cpu: card[torch.tensor([0, 1])],
    "index_select": lambda card, cpu: card.index_select(0, torch.tensor([1])),
    "index_copy": lambda card, cpu: card.index_copy(0, torch.tensor([1]), card[:1]),
    "embedding": lambda card, cpu: F.embedding(torch.tensor([1]), card),
    "a written index": lambda card, cpu: card.__setitem__(torch.tensor([0]), 1.0),
    "a layer": lambda card, cpu: nn.Linear(4, 2)(card),
    "cat": lambda card, cpu: torch.cat([card, cpu]),
    "attention": lambda card, cpu: F.scaled_dot_product_attention(card[None], card[None], cpu[None]),
    "where": lambda card, cpu: torch.where(torch.ones(3, 4, dtype=torch.bool), card, 0.0),
    "out": lambda card, cpu: torch.mul(card, 2, out=cpu),
    "in place": lambda card, cpu: card.mul_(cpu),
}


@pytest.mark.parametrize("what", ON_CARD)
def test_tensors_of_two_devices_are_refused(what: str) -> None:
    with fake_cuda(), pytest.raises(MixedDevicesError):
        ON_CARD[what](torch.ones(3, 4).cuda(), torch.ones(3, 4))


def test_what_a_gpu_allows_is_allowed() -> None:
    with fake_cuda():
        card = torch.arange(6.0, device="cuda").view(2, 3)
        assert (card + torch.tensor(1.0)).tolist() == [[1, 2, 3], [4, 5, 6]]  # a single number may be on the CPU
        card[0] = torch.ones(3)[1]
        card[1].copy_(torch.zeros(3))
        assert card.cpu().tolist() == [[1, 1, 1], [0, 0, 0]]
        assert torch.ones(3)[card.cpu()[0].long()].tolist() == [1, 1, 1]
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            card.numpy()
        assert card.is_cuda and card.device == torch.device("cuda:0") and not card.cpu().is_cuda
        assert torch.cuda.is_available() and card.to("cuda") is card


def test_numbers_gradients_and_steps_are_those_of_the_cpu() -> None:
    def learned(device: str) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 4))
        model[3].weight = nn.Parameter(torch.randn(4, 8))
        model.to(device)
        optimiser = torch.optim.AdamW(model.parameters(), 0.1)
        rows = torch.randn(5, 4).to(device)
        for _ in range(2):
            hidden = checkpoint(model, rows, use_reentrant=False)
            q = hidden[None, None]
            loss = (F.scaled_dot_product_attention(q, q, q, is_causal=True) - rows).square().mean()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
        return [p.detach().cpu() for p in model.parameters()]

    expected = learned("cpu")
    with fake_cuda():
        found = learned("cuda")
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_tied_weights_stay_tied() -> None:
    model = nn.ModuleDict({"in": nn.Embedding(3, 4), "out": nn.Linear(4, 3, bias=False)})
    model["out"].weight = model["in"].weight
    with fake_cuda():
        model.cuda()
        assert model["out"].weight is model["in"].weight and isinstance(model["in"].weight, CudaTensor)


@pytest.mark.parametrize("causal", [True, False])
def test_the_kernel_for_packed_rows_attends_each_prompt_alone(causal: bool) -> None:
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(7, heads, 8, generator=random).bfloat16() for heads in (4, 2, 2))
    bounds = torch.tensor([0, 3, 7], dtype=torch.int32)
    window = (-1, 0) if causal else (-1, -1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [
            F.scaled_dot_product_attention(
                *(t[a:b].transpose(0, 1) for t in (q, k, v)), is_causal=causal, enable_gqa=True
            )
            for a, b in ((0, 3), (3, 7))
        ]
        return torch.cat([part.transpose(0, 1) for part in parts])

    plain = [t.float().requires_grad_() for t in (q, k, v)]
    expected = attend(*plain)
    expected.square().sum().backward()
    with fake_cuda() as card:
        ours = [t.cuda().requires_grad_() for t in (q, k, v)]
        place = bounds.cuda()
        found = varlen_attn(*ours, place, place, 4, 4, window_size=window, enable_gqa=True)
        found.float().square().sum().backward()
        assert torch.allclose(found.detach().cpu().float(), expected.detach(), atol=0.02)
        for one, other in zip(ours, plain, strict=True):
            assert torch.allclose(one.grad.cpu().float(), other.grad, atol=0.1)
        assert card.kernels == {"varlen_attn": 1, "varlen_attn backward": 1}
        with pytest.raises(MixedDevicesError):
            varlen_attn(*ours, bounds, bounds, 4, 4, enable_gqa=True)


def test_waits_and_copies_are_counted_where_they_happen() -> None:
    with fake_cuda() as card:
        mask = torch.tensor([True, False, True], device="cuda")
        numbers = torch.arange(3, device="cuda")
        assert not card.waits and list(card.copies.values()) == [1]
        card.forget()
        numbers[mask]
        numbers.nonzero()
        int(numbers.sum())
        numbers.tolist()
        numbers.cpu()
        assert sum(card.waits.values()) == 5 and all(
            place.startswith("tests/test_fake_cuda.py:") for place in card.waits
        )
        torch.ones(3).pin_memory().to("cuda", non_blocking=True)
        assert not card.copies
        torch.ones(3).to("cuda", non_blocking=True)  # the host waits for a copy from memory that is not pinned
        assert sum(card.copies.values()) == 1


@pytest.mark.parametrize("values", [True, False])
def test_bytes_are_counted_once_for_each_storage_and_given_back(values: bool) -> None:
    with fake_cuda(values) as card:
        rows = torch.zeros(256, 4, device="cuda")
        views = rows[:2], rows.T, rows.view(-1)
        assert card.held == 4096
        more = rows @ rows.T
        assert (card.held, card.peak) == (4096 + 4 * 256 * 256,) * 2
        del more, views
        assert card.held == 4096
        del rows
        assert card.held == 0 and torch.cuda.max_memory_allocated() == 4096 + 4 * 256 * 256


def test_without_values_numbers_that_code_reads_are_known() -> None:
    with fake_cuda(values=False) as card:
        weights = torch.randn(1 << 20, 1 << 10, device="cuda").bfloat16()  # 2 GiB, of which nothing is there
        ids = torch.tensor([3, 1, 2], device="cuda")
        rows = weights[ids]
        assert rows.shape == (3, 1 << 10) and ids.tolist() == [3, 1, 2] and int(ids.sum()) == 6
        assert float(rows.sum()) == 1.0 and card.held > 1 << 31
        assert ids[ids > 1].tolist() == [3, 2]
