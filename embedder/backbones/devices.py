"""Which device and number format a model uses, and how large a batch the device can hold."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.utils import logging

from vlm2rec.embedder.contract.errors import ConfigError, ModelError
from vlm2rec.embedder.options import DeviceName, DtypeName

T = TypeVar("T")


R = TypeVar("R")


# images in one call of the vision tower: on a CPU the activations between two layers have to fit into its cache
IMAGES_AT_ONCE = {"cpu": 4, "mps": 32, "cuda": 64}


def batches_by_tokens(lengths: Sequence[int], budget: int, padded: bool = True) -> Iterator[list[int]]:
    """Yield lists of positions whose size stays within `budget` tokens, shortest prompts first.

    The size is the padded one, `count × longest`, or without padding the sum of the lengths. A prompt longer than the
    budget comes alone. Prompts of one batch have nearly the same length, so there is little padding.
    """
    batch: list[int] = []
    tokens = 0
    for position in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[position]
        size = length * (len(batch) + 1) if padded else tokens + length
        if batch and size > budget:
            yield batch
            batch, size = [], length
        batch.append(position)
        tokens = size
    if batch:
        yield batch


def onto(device: torch.device, tensor: Tensor) -> Tensor:
    """Copy a tensor from the CPU to a device; a GPU takes it while the host goes on."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()  # the host waits for a copy from other memory
    return tensor.to(device, non_blocking=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide transformers' progress bars: what it loads is on this machine."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def in_halves(
    work: Callable[[Sequence[T]], R],
    batch: Sequence[T],
    named: Callable[[T], str],
    smaller: Callable[[Sequence[T]], None] = lambda batch: None,
) -> list[R]:
    """Return the results of `work` on a batch; if the device runs out of memory, on its halves, and so on.

    Args:
        work: runs without gradients; memory kept for gradients would not shrink with the batch.
        batch: the elements, in order.
        named: describes one element, for the message.
        smaller: called with each batch that was too large.

    Raises:
        ModelError: a single element does not fit into memory.
    """
    try:
        return [work(batch)]
    except RuntimeError as error:
        if torch.is_grad_enabled() or not _out_of_memory(error):
            raise
        if len(batch) == 1:
            raise ModelError(
                f"the device has too little memory for the model and {named(batch[0])}",
                "memory for the model and one prompt",
                "use --dtype bfloat16, a smaller --max-pixels or backbone, or a larger device",
            ) from None
    torch.cuda.empty_cache()
    smaller(batch)
    half = len(batch) // 2
    return [found for part in (batch[:half], batch[half:]) for found in in_halves(work, part, named, smaller)]


def _out_of_memory(error: RuntimeError) -> bool:
    # torch's CPU allocator raises a plain RuntimeError
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def pick_device(name: DeviceName) -> torch.device:
    """Return the device of that name; `auto` takes CUDA, then Apple's MPS, then the CPU.

    A process that a launcher started takes the GPU with the number that the launcher gave it.
    """
    available: dict[DeviceName, bool] = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(key for key, value in available.items() if value)
    if not available[name]:
        raise ConfigError(
            f"device {name!r} is not available in this torch ({torch.__version__})",
            f"one of {', '.join(key for key, value in available.items() if value)}",
            "choose another --device, or install a torch build for it; `vlm2rec doctor` shows what is available",
        )
    local_rank = os.environ.get("LOCAL_RANK")
    if name != "cuda" or local_rank is None:
        return torch.device(name)
    if int(local_rank) >= torch.cuda.device_count():
        raise ConfigError(
            f"this is process {local_rank}, counted from 0, on a machine with {torch.cuda.device_count()} GPUs",
            "a GPU for every process",
            "launch no more processes than there are GPUs, or give --device cpu",
        )
    return torch.device("cuda", int(local_rank))


def pick_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """Return the dtype of that name; `auto` is bfloat16 where the device multiplies it natively, else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and _cpu_multiplies_bfloat16()
    return torch.bfloat16 if native else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    return _cpu_has("_is_avx512_bf16_supported") or has_tiles()


def has_tiles() -> bool:
    """Tell whether this CPU multiplies whole tiles (AMX)."""
    return _cpu_has("_is_amx_tile_supported")


def _cpu_has(check: str) -> bool:
    # private in torch, but older releases have no other function that asks the processor itself
    asked = getattr(torch.cpu, check, None)
    return asked is not None and bool(asked())


def speed_up_float32(device: torch.device) -> None:
    """Let this process multiply float32 matrices with oneDNN, where torch's MKL uses half of the processor.

    MKL has no AVX-512 code for AMD processors, oneDNN has: twice the rate, and float32 as before. torch turns to oneDNN
    where it may round factors to bfloat16 ("medium"), which oneDNN does on processors with AMX only. On a GPU "medium"
    rounds. So where there is AMX or a GPU nothing is changed, and neither is a precision that was chosen before.
    """
    if device.type != "cpu" or torch.cuda.is_available() or matmul_precision() != "highest":
        return
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch has no such function
    if "AMD" in str(found.get("cpu_name")) and found.get("avx512_f") and not has_tiles():
        torch.set_float32_matmul_precision("medium")


def onednn_multiplies_float32() -> bool:
    """Tell whether oneDNN multiplies float32 matrices on this CPU now, without rounding (`speed_up_float32`)."""
    return matmul_precision() == "medium" and not has_tiles()


def matmul_precision() -> str:
    """Return the precision of torch's float32 products; empty if it was set for each library by itself."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to answer then
        return ""
