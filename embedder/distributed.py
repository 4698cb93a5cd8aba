"""Several processes that fine-tune one model: `torchrun` or `accelerate launch` starts them, this module joins them.

Each has a rank from 0 to count - 1. Rank 0 is the main process: only it writes files and terminal output. A process
that was started without a launcher is the only one, and nothing here makes it wait or send.

Together they learn what one process with the whole batch would learn, because each computes the same loss over the
vectors of all. `gather` collects these vectors; its backward pass gives each process the gradient of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from vlm2rec.embedder.contract.errors import ConfigError, Vlm2RecError

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)  # wait for a process that runs but does not answer; a dead one is noticed at once


def count() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if _is_joined() else 1


def rank() -> int:
    """Return this process's rank."""
    return dist.get_rank() if _is_joined() else 0


def is_main() -> bool:
    """Return whether this process writes the files."""
    return rank() == 0


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join the processes launched together, over NCCL on GPUs and gloo on CPUs, and leave them at the end.

    Args:
        device: the device of this process.

    Raises:
        ConfigError: several processes were launched, and this device cannot exchange tensors.
        Vlm2RecError: another process has died.
    """
    if _is_joined():  # the caller joined the processes, and leaves them too
        yield
        return
    PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > count():
        raise ConfigError(
            f"{launched} processes were launched on device {device}, where processes cannot train together",
            "CUDA GPUs, or the CPU",
            "give --device cpu, or launch one process",
        )
    try:
        yield
    except RuntimeError as error:  # neither NCCL nor gloo has an exception class for it
        if count() == 1 or not _is_lost_peer(error):
            raise
        raise Vlm2RecError(
            f"process {rank()} of {count()} has lost another ({str(error).partition('. ')[0]})",
            "all processes running to the end",
            "read the message of the one that stopped first; the same command continues from the last checkpoint",
        ) from error
    if _is_joined():  # not after an error, as the others may no longer answer: the end of the process does the same
        dist.destroy_process_group()
        PartialState._reset_state()


def _is_lost_peer(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error)


class _Gather(torch.autograd.Function):
    """The rows of all processes, one tensor for each; the backward pass gives the gradient of this process's rows.

    Every process computes the whole loss from the gathered rows, so the gradient of its own rows is already complete
    and nothing is sent back. `DistributedDataParallel` averages the gradients of the processes, but their sum is
    needed; hence the factor.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(_gathered(rows))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[rank()] * count()


def gather(rows: Tensor) -> list[Tensor]:
    """Return the rows of every process, by rank; the gradient of a loss that all compute reaches each process's rows.

    Args:
        rows: the rows of this process, (n, ...); n may differ between processes and may be 0.
    """
    if count() == 1:
        return [rows]
    return list(_Gather.apply(rows)) if rows.requires_grad else _gathered(rows)


def _gathered(rows: Tensor) -> list[Tensor]:
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(count())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    sizes = [int(size) for size in counts]
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


def share(rows: Sequence[T]) -> Sequence[T]:
    """Return this process's share of the rows, every `count()`-th; together the processes have each row once."""
    return rows[rank() :: count()]


def gather_shares(rows: Tensor) -> Tensor:
    """Return the results of all processes for their `share`, in the order of the whole."""
    parts = gather(rows)
    whole = rows.new_empty((sum(map(len, parts)), *rows.shape[1:]))
    for offset, part in enumerate(parts):
        whole[offset :: len(parts)] = part
    return whole


def most(number: int, device: torch.device) -> int:
    """Return the largest number that a process has; `device` is that of this process."""
    if count() == 1:
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def mean(values: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes."""
    if count() > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= count()
    return values


def from_main(value: T) -> T:
    """Return the main process's value."""
    values = [value]
    if count() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def from_all(value: T) -> list[T]:
    """Return the value of every process, by rank."""
    values = [value] * count()
    if count() > 1:
        dist.all_gather_object(values, value)
    return values


def wait() -> None:
    """Wait until all processes have reached this point."""
    if count() > 1:
        dist.barrier()
