"""The adapter module: one table for every reader, cheap in evaluation, never stale."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from vlm2rec.downstream.recbole.item_embedding import Adapter, ItemEmbedding, standardise


def vectors(rows: int = 9, dim: int = 6) -> Tensor:
    drawn = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0))
    drawn = torch.nn.functional.normalize(drawn, dim=1)
    drawn[0] = 0
    return drawn


def table(extra: Tensor | None = None) -> ItemEmbedding:
    torch.manual_seed(1)
    return ItemEmbedding(vectors(), width=4, spread=0.02, extra=extra)


def test_standardised_vectors_are_centred_and_of_length_one() -> None:
    ready = standardise(torch.tensor([[3.0, 10.0], [5.0, 10.0], [4.0, 13.0], [4.0, 7.0]]))
    assert torch.allclose(ready, torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))


def test_a_vector_equal_to_the_mean_becomes_zero_not_noise() -> None:
    ready = standardise(torch.tensor([[3.0, 1.0], [5.0, 1.0], [4.0, 1.0]]))
    assert ready.tolist() == [[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]


def test_a_large_common_offset_does_not_survive_standardising() -> None:
    drawn = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    plain, offset = standardise(drawn), standardise(drawn + 1000.0)
    assert torch.allclose(plain, offset, atol=2e-4)


def test_equal_vectors_all_become_zero_in_spite_of_rounding() -> None:
    assert not standardise(torch.full((7, 5), 0.1) + 1e3).any()


@pytest.mark.parametrize("training", [True, False])
def test_lookup_and_weight_are_the_same_rows(training: bool) -> None:
    module = table(extra=torch.full((1, 4), 0.5)).train(training)
    indices = torch.tensor([[0, 3, 8], [9, 3, 1]])
    assert torch.allclose(module(indices), module.weight[indices], atol=1e-7)
    with torch.no_grad():
        assert torch.allclose(module(indices), module.weight[indices], atol=1e-7)


def test_row_i_is_the_linear_of_vector_i() -> None:
    module = table()
    expected = vectors() @ module.linear.weight.T + module.linear.bias
    assert torch.allclose(module.weight[1:], expected[1:], atol=1e-7)
    assert tuple(module.weight.shape) == (module.num_embeddings, module.embedding_dim) == (9, 4)


def test_the_padding_row_stays_zero_when_the_bias_does_not() -> None:
    module = table()
    nn.init.ones_(module.linear.bias)
    assert not module.weight[0].any()
    assert not module(torch.tensor([0])).any()
    assert module.weight[1:].all()


def test_extra_rows_are_parameters_and_get_a_gradient() -> None:
    module = table(extra=torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert module.weight[9].tolist() == [1.0, 2.0, 3.0, 4.0]
    module(torch.tensor([9, 2])).sum().backward()
    assert module.extra is not None and module.extra.grad is not None
    assert module.extra.grad.tolist() == [[1.0, 1.0, 1.0, 1.0]]


def test_a_lookup_gives_the_gradient_of_the_whole_table() -> None:
    indices = torch.tensor([3, 3, 0, 5])
    by_lookup, by_table = table(), table()
    (by_lookup(indices) ** 2).sum().backward()
    (by_table.weight[indices] ** 2).sum().backward()
    assert torch.allclose(by_lookup.linear.weight.grad, by_table.linear.weight.grad, atol=1e-7)
    assert torch.allclose(by_lookup.linear.bias.grad, by_table.linear.bias.grad, atol=1e-7)


def test_the_vectors_are_frozen_and_not_in_the_checkpoint() -> None:
    module = table()
    assert list(module.state_dict()) == ["linear.weight", "linear.bias"]
    assert not module.vectors.requires_grad


def test_the_table_is_computed_once_per_evaluation() -> None:
    module = table().eval()
    with torch.no_grad():
        assert module.weight is module.weight
    assert module.weight is not module.weight  # with gradients


def test_a_training_step_is_seen_by_the_next_evaluation() -> None:
    module = table().eval()
    with torch.no_grad():
        before = module.weight
    module.train()
    nn.init.zeros_(module.linear.weight)
    module.eval()
    with torch.no_grad():
        assert before.any() and not module.weight.any()


def test_loading_a_state_forgets_the_cached_table() -> None:
    module, other = table().eval(), table().eval()
    nn.init.zeros_(other.linear.weight)
    with torch.no_grad():
        assert module.weight.any()
        nn.Sequential(module).load_state_dict(nn.Sequential(other).state_dict())
        assert not module.weight.any()


def test_moving_to_another_number_format_forgets_the_cached_table() -> None:
    module = table().eval()
    with torch.no_grad():
        assert module.weight.dtype == torch.float32
        assert module.double().weight.dtype == torch.float64


def test_a_copy_does_not_share_the_cache_with_its_original() -> None:
    module = table().eval()
    with torch.no_grad():
        module.weight  # noqa: B018
        twin = copy.deepcopy(module).train().eval()
        nn.init.zeros_(twin.linear.weight)
        assert module.weight.any() and not twin.weight.any()


def test_adapted_rows_start_with_the_spread_of_the_table_they_replace() -> None:
    torch.manual_seed(0)
    drawn = torch.nn.functional.normalize(torch.randn(500, 64), dim=1)
    module = ItemEmbedding(drawn, width=128, spread=0.02)
    assert float(module.weight[1:].detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not module.linear.bias.any()


# --- two layers -------------------------------------------------------------------------------------------------
def two_layers(adapter: Adapter, width: int = 4) -> ItemEmbedding:
    torch.manual_seed(1)
    return ItemEmbedding(vectors(), width=width, spread=0.02, adapter=adapter)


def test_two_linears_have_half_the_vectors_units_between_them_and_no_activation() -> None:
    module = ItemEmbedding(vectors(dim=20), width=4, spread=0.02, adapter="two-linear")
    first, second = module.hidden, module.linear
    assert first is not None and (first.in_features, first.out_features, second.in_features) == (20, 10, 10)
    expected = second(vectors(dim=20) @ first.weight.T + first.bias)
    assert torch.allclose(module.weight[1:], expected[1:], atol=1e-6)


def test_the_hidden_layer_is_never_narrower_than_the_row() -> None:
    module = two_layers("mlp", width=5)
    assert module.hidden is not None and module.hidden.out_features == 5


def test_the_mlp_bends_between_its_layers() -> None:
    module = two_layers("mlp")
    assert module.hidden is not None
    expected = module.linear(torch.nn.functional.gelu(module.hidden(vectors())))
    assert torch.allclose(module.weight[1:], expected[1:], atol=1e-6)


@pytest.mark.parametrize("adapter", ["two-linear", "mlp"])
def test_two_layers_start_centred_and_with_the_spread_of_the_table_they_replace(adapter: Adapter) -> None:
    torch.manual_seed(0)
    drawn = torch.nn.functional.normalize(torch.randn(2000, 256), dim=1)
    rows = ItemEmbedding(drawn, width=128, spread=0.02, adapter=adapter).weight[1:].detach()
    assert float(rows.std()) == pytest.approx(0.02, rel=0.1)
    assert float(rows.mean(0).norm() / rows.norm(dim=1).mean()) < 0.12  # no offset that all rows share


@pytest.mark.parametrize("adapter", ["two-linear", "mlp"])
def test_two_layers_give_lookup_and_weight_the_same_rows_and_train_both(adapter: Adapter) -> None:
    module = two_layers(adapter)
    indices = torch.tensor([[0, 3, 8], [3, 3, 1]])
    assert torch.allclose(module(indices), module.weight[indices], atol=1e-7)
    assert not module(torch.tensor([0])).any()
    (module(indices) ** 2).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())
    assert list(module.state_dict()) == ["hidden.weight", "hidden.bias", "linear.weight", "linear.bias"]
