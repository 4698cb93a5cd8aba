"""The memory that a model's tensors take on a device, counted while they live, and what the usual cards have."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# GiB that torch sees
CARDS = {"A10G, L4: 24 GB": 22.0, "A100: 40 GB": 39.4, "A100, H100: 80 GB": 79.1, "H200: 141 GB": 139.8}
BESIDE = 1.5  # GiB for CUDA's context, what kernels use for a moment, and gaps of the allocator


@dataclass
class Bytes:
    """Bytes of what was made on a device since the count began: those that live, and the most that ever did."""

    held: int = 0
    peak: int = 0


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of some tensors; those that share their memory count once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


@contextmanager
def counted(device: torch.device, known: Iterable[Tensor] = ()) -> Iterator[Bytes]:
    """Count what is made on a device: on a GPU by its allocator, elsewhere by the tensors that operations return.

    `known` are tensors that exist already, whose views are not to be counted. What a kernel needs for a moment counts
    on a GPU alone.
    """
    found = Bytes()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.held = torch.cuda.memory_allocated(device) - before
        found.peak = torch.cuda.max_memory_allocated(device) - before
        return
    counter = _Counter(found, device.type)
    for tensor in known:
        counter.add(tensor, size=0)
    with counter:
        yield found


@dataclass
class _Counter(TorchDispatchMode):
    """Counts the storages of tensors that operations return, until they are freed."""

    found: Bytes
    device: str
    _living: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def add(self, tensor: Tensor, size: int | None = None) -> None:
        """Count the storage of a tensor, once."""
        if tensor.layout is not torch.strided or tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._living:
            return
        count = storage.nbytes() if size is None else size
        self.found.held += count
        self.found.peak = max(self.found.peak, self.found.held)
        self._living[key] = weakref.finalize(storage, self._drop, key, count)
        self._living[key].atexit = False

    def _drop(self, key: int, count: int) -> None:
        self.found.held -= count
        self._living.pop(key, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, Tensor):
                self.add(each)
        return made


def most_on_cards(fixed: float, first: float, more: float) -> Mapping[str, int]:
    """Return how many samples fit on each card at a time; 0 if none does.

    Args:
        fixed: bytes that do not depend on the samples.
        first: bytes of the first sample.
        more: bytes of each further one.
    """
    found = {}
    for name, gib in CARDS.items():
        left = (gib - BESIDE) * 2**30 - fixed - first
        found[name] = 0 if left < 0 else 1 + int(left // max(more, 1))
    return found
