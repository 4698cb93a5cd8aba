"""The precision of the matrix products of a training: a RecBole YAML's key, which RecBole itself does not have.

    train_matmul_precision: medium    # highest: float32 throughout. The default

The choices are those of `torch.set_float32_matmul_precision`: what a product has to keep at least. `high` allows
factors rounded to TensorFloat32, which recent GPUs multiply several times as fast. `medium` allows bfloat16, which
processors with AMX multiply faster. A device that gains nothing by it keeps float32. On a CPU `medium` also has oneDNN
multiply in place of MKL: on AMD processors with AVX-512 it takes half the time, in float32. Weights and sums stay so.

Only training and its validation are affected. The figures of a run are always computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_args

import torch

from vlm2rec.downstream.options import MatmulPrecision
from vlm2rec.embedder.contract.errors import ConfigError

KEY = "train_matmul_precision"


def read_precision(settings: Mapping[str, Any]) -> MatmulPrecision:
    """Return the precision that a run trains in.

    Args:
        settings: RecBole's keys.

    Raises:
        ConfigError: another value.
    """
    value: MatmulPrecision = settings.get(KEY, "highest")
    if value not in get_args(MatmulPrecision):
        raise ConfigError(f"{KEY}: {value!r}", f"one of {', '.join(get_args(MatmulPrecision))}", "correct the value")
    return value


@contextmanager
def multiplying(precision: MatmulPrecision) -> Iterator[None]:
    """Let the float32 matrix products of this process be less exact, and give them back the precision they had.

    A process that allows less already stays as it is: it may have chosen a faster library so
    (`devices.speed_up_float32`).
    """
    if precision == "highest":
        yield
        return
    choices = get_args(MatmulPrecision)  # from the most exact
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(max(precision, before, key=choices.index))
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
