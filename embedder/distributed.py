"""Several processes that fine-tune one model: `torchrun` or `accelerate launch` starts them, and they join here.

Each has a rank from 0 to count - 1. Rank 0 is the main process: it alone writes files and talks to the terminal. A
process that nobody launched is the only one, and nothing here makes it wait or send.

What they learn is what one process with the whole batch would, because each of them computes the same loss over the
vectors of all: `gather` brings these together, and its backward pass gives each process the gradient of its own.
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
PATIENCE = timedelta(minutes=30)  # for a process that lives and does not answer; one that died is noticed at once


def count() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if _is_joined() else 1


def rank() -> int:
    """Return this process's place among them."""
    return dist.get_rank() if _is_joined() else 0


def is_main() -> bool:
    """Return whether this process writes the files."""
    return rank() == 0


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join the processes launched together, over NCCL on GPUs and gloo on CPUs, and part from them at the end.

    Args:
        device: where this process computes.

    Raises:
        ConfigError: several processes were launched, and this device cannot send.
        Vlm2RecError: another process has died.
    """
    if _is_joined():  # by the caller, who ends it too
        yield
        return
    PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > count():
        raise ConfigError(
            f"{launched} processes were launched on device {device}, which cannot train together",
            "GPUs of CUDA, or the CPU",
            "--device cpu, or launch one process",
        )
    try:
        yield
    except RuntimeError as error:  # neither library has a class of its own for it
        if count() == 1 or not _is_lost_peer(error):
            raise
        raise Vlm2RecError(
            f"process {rank()} of {count()} has lost another ({str(error).partition('. ')[0]})",
            "all of them at work to the end",
            "look for the message of the one that stopped first; the same command goes on from the last checkpoint",
        ) from error
    if _is_joined():  # after an error the others may not answer any more: the end of the process parts as well
        dist.destroy_process_group()
        PartialState._reset_state()


def _is_lost_peer(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error)


class _Gather(torch.autograd.Function):
    """All processes' rows, one tensor a process; backwards, the gradient of this process's own.

    Every process computes the whole loss from what it gathered, so the gradient of its own rows is complete as it is:
    nothing has to travel back. `DistributedDataParallel` takes the mean of what the processes find, where their sum is
    meant; hence the factor.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(_gathered(rows))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[rank()] * count()


def gather(rows: Tensor) -> list[Tensor]:
    """Return the rows of every process, by rank; gradients of a loss that all compute alike flow back to the owners.

    Args:
        rows: this process's, (n, ...); n may differ between processes and may be 0.
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
    """Return the rows that fall to this process, every `count()`-th; together the processes have each row once."""
    return rows[rank() :: count()]


def gather_shares(rows: Tensor) -> Tensor:
    """Return what every process made of its `share`, in the order of the whole."""
    parts = gather(rows)
    whole = rows.new_empty((sum(map(len, parts)), *rows.shape[1:]))
    for place, part in enumerate(parts):
        whole[place :: len(parts)] = part
    return whole


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
    """Go on when all processes have come here."""
    if count() > 1:
        dist.barrier()
