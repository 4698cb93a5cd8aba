"""Sparse matrices in torch whose products have gradients, item graphs of nearest neighbours, and graph convolution."""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor
from torch.nn import functional as F

_SCORES = 2**24  # cosines in memory at a time: 64 MB
_GROUP = 128  # columns whose largest cosine is looked at first
_EDGES = 2**18  # edges whose gradient is computed at a time


class Graph:
    """A sparse matrix (n, m) in compressed rows, with its transpose for gradients.

    Rows in compressed form are about three times as fast on a CPU as coordinates, torch's other form. The values may be
    learned: `product` then takes them in the order of `rows` and `columns`.

    Args:
        matrix: the matrix; entries at the same place are added.
        device: where products are computed.
    """

    def __init__(self, matrix: scipy.sparse.csr_matrix, device: torch.device | str = "cpu") -> None:
        matrix = matrix.tocsr()
        matrix.sum_duplicates()
        self.shape: tuple[int, int] = matrix.shape
        self.values = torch.from_numpy(matrix.data.astype(np.float32)).to(device)
        self._starts, self.columns = _indices(matrix, device)
        self._matrix = matrix

    @cached_property
    def rows(self) -> Tensor:
        """The row of each entry, (E,)."""
        counts = self._starts.diff().long()
        return torch.repeat_interleave(torch.arange(self.shape[0], device=counts.device), counts)

    @cached_property
    def _transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Starts and columns of the transpose, and the place here of each of its entries."""
        places = np.arange(self._matrix.nnz)
        numbered = scipy.sparse.csr_matrix((places, self._matrix.indices, self._matrix.indptr), self.shape)
        transposed = numbered.T.tocsr()
        device = self.values.device
        return *_indices(transposed, device), torch.from_numpy(transposed.data).to(device)

    @cached_property
    def _transposed_values(self) -> Tensor:
        return self.values[self._transposed[2]]

    def matrix(self, values: Tensor | None = None) -> scipy.sparse.csr_matrix:
        """Return the matrix in SciPy's form; with other `values` (E,), at the same places."""
        if values is None:
            return self._matrix
        data = values.detach().cpu().double().numpy()
        return scipy.sparse.csr_matrix((data, self._matrix.indices, self._matrix.indptr), self.shape)

    def product(self, dense: Tensor, values: Tensor | None = None) -> Tensor:
        """Return matrix @ dense, (n, d), for `dense` (m, d); with other `values` (E,), which get a gradient, too."""
        if dense.requires_grad or (values is not None and values.requires_grad):
            return _Product.apply(self, dense, values)
        return self.forward(dense, values)

    def forward(self, dense: Tensor, values: Tensor | None) -> Tensor:
        """Return matrix @ dense without a gradient."""
        return _compressed(self._starts, self.columns, self.values if values is None else values, self.shape) @ dense

    def backward(self, grad: Tensor, values: Tensor | None) -> Tensor:
        """Return transpose @ grad, (m, d)."""
        starts, columns, places = self._transposed
        turned = self._transposed_values if values is None else values[places]
        return _compressed(starts, columns, turned, self.shape[::-1]) @ grad

    def values_backward(self, grad: Tensor, dense: Tensor) -> Tensor:
        """Return the gradient of each value, (E,): the dot product of a row of `grad` and one of `dense`."""
        parts = zip(self.rows.split(_EDGES), self.columns.split(_EDGES), strict=True)
        return torch.cat([(grad[rows] * dense[columns]).sum(1) for rows, columns in parts])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: Graph, dense: Tensor, values: Tensor | None) -> Tensor:
        ctx.graph = graph
        ctx.save_for_backward(dense, values)
        return graph.forward(dense, values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        dense, values = ctx.saved_tensors
        _, dense_needs, values_need = ctx.needs_input_grad
        grad = grads[0].contiguous()
        of_dense = ctx.graph.backward(grad, values) if dense_needs else None
        return None, of_dense, ctx.graph.values_backward(grad, dense) if values_need else None


def _indices(matrix: scipy.sparse.csr_matrix, device: torch.device | str) -> tuple[Tensor, Tensor]:
    narrow = max(matrix.nnz, *matrix.shape) < 2**31
    kind = np.int32 if narrow else np.int64
    return (
        torch.from_numpy(matrix.indptr.astype(kind)).to(device),
        torch.from_numpy(matrix.indices.astype(kind)).to(device),
    )


def _compressed(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


# --- users and items ------------------------------------------------------------------------------------------
def both_ways(pairs: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """Return the matrix of users and items as nodes, (U + I, U + I): each pair (U, I) in both directions."""
    return scipy.sparse.bmat([[None, pairs], [pairs.T, None]], format="csr")


def symmetric(matrix: scipy.sparse.csr_matrix, epsilon: float) -> scipy.sparse.csr_matrix:
    """Return D^-1/2 A D^-1/2, where D holds the sums of the rows plus `epsilon`."""
    scale = scipy.sparse.diags(np.power(np.asarray(matrix.sum(1)).ravel() + epsilon, -0.5))
    return (scale @ matrix @ scale).tocsr()


def with_itself(matrix: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """Return D^-1 (A + 1), in which every node is its own neighbour, and the rows' sums are 1."""
    looped = (matrix + scipy.sparse.identity(matrix.shape[0])).tocsr()
    return (scipy.sparse.diags(1 / np.asarray(looped.sum(1)).ravel()) @ looped).tocsr()


def light_gcn(graph: Graph, nodes: Tensor, layers: int) -> Tensor:
    """Return LightGCN's vectors, (n, d): the mean of `nodes` and of their averages over 1 to `layers` steps."""
    total = nodes
    for _ in range(layers):
        nodes = graph.product(nodes)
        total = total + nodes
    return total / (layers + 1)


# --- items and their neighbours ---------------------------------------------------------------------------------
def nearest(vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the cosines and rows of each vector's nearest ones, (I, k) each, k = min(count, I), without a gradient.

    A vector is its own neighbour, as in the published code. One of length zero has cosine 0 with all.

    Args:
        vectors: (I, d).
        count: neighbours of each.
    """
    unit = F.normalize(vectors.detach(), dim=1)
    count, block = min(count, len(unit)), max(1, _SCORES // len(unit))
    found = [_largest(unit[start : start + block] @ unit.T, count) for start in range(0, len(unit), block)]
    return torch.cat([cosines for cosines, _ in found]), torch.cat([rows for _, rows in found])


def _largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest scores of each row and their columns, (n, count) each, the largest first.

    In a long row only the groups of columns with the largest maxima are looked into: no other can hold one of them.
    """
    rows, width = scores.shape
    if width < 4 * _GROUP * count:
        found = scores.topk(count, dim=1)
        return found.values, found.indices
    grouped = F.pad(scores, (0, -width % _GROUP), value=-torch.inf).view(rows, -1, _GROUP)
    groups = grouped.amax(2).topk(count, dim=1).indices  # (n, count)
    within = grouped.gather(1, groups[:, :, None].expand(-1, -1, _GROUP)).view(rows, -1)
    found = within.topk(count, dim=1)
    columns = groups.gather(1, found.indices // _GROUP) * _GROUP + found.indices % _GROUP
    return found.values, columns


def neighbour_matrix(rows: Tensor, values: Tensor | None = None) -> scipy.sparse.csr_matrix:
    """Return the matrix of an item graph, (I, I): row i has `values[i]`, default 1, in columns `rows[i]`, (I, k)."""
    items, count = rows.shape
    data = np.ones(items * count) if values is None else values.cpu().numpy().ravel().astype(np.float64)
    starts = np.arange(0, items * count + 1, count)
    return scipy.sparse.csr_matrix((data, rows.cpu().numpy().ravel(), starts), (items, items))


def inverse_root(sums: Tensor) -> Tensor:
    """Return sums^-1/2, and 0 for a sum that is not positive."""
    return torch.where(sums > 0, sums.clamp_min(1e-30).rsqrt(), 0.0)
