"""The language model's matrices in four bits (NF4) while an adapter is trained beside them (QLoRA), by bitsandbytes.

Only training reads them so. Vision tower, embeddings and norms keep their format, and so does everything that is saved:
an export folds the adapter into the unquantised weights.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from vlm2rec.embedder.backbones.model_files import first_line
from vlm2rec.embedder.contract.errors import ConfigError, MissingDependencyError

LIBRARY = "bitsandbytes"


def require(device: torch.device) -> None:
    """Raise unless matrices in four bits work on the device.

    Raises:
        MissingDependencyError: bitsandbytes is not installed.
        ConfigError: it is, and this device cannot multiply such a matrix or give its gradient.
    """
    if find_spec(LIBRARY) is None:
        raise MissingDependencyError(
            f"--quantize nf4 needs {LIBRARY}, which is not installed", LIBRARY, f"pip install {LIBRARY}"
        )
    try:
        layer = _in_four_bits(nn.Linear(64, 64), torch.float32).to(device)
        states = torch.ones(2, 64, device=device, requires_grad=True)
        layer(states).sum().backward()
        works, why = bool(torch.isfinite(states.grad).all()), "its gradient is not finite"  # type: ignore[arg-type]
    except Exception as error:  # whatever its kernels raise on a device that they do not know
        works, why = False, first_line(error)
    if not works:
        raise ConfigError(
            f"--quantize nf4 on device {device}, where {LIBRARY} does not work ({why})",
            f"a device that {LIBRARY} supports, such as a CUDA GPU",
            "leave --quantize out, or choose another --device",
        )


def quantize(language_model: nn.Module, dtype: torch.dtype) -> None:
    """Replace the matrices of a language model, in place; the next `.to(device)` turns their weights into four bits.

    Args:
        language_model: its weights are on the CPU.
        dtype: number format of the products.
    """
    for module in [*language_model.modules()]:
        for name, layer in [*module.named_children()]:
            if type(layer) is nn.Linear:
                setattr(module, name, _in_four_bits(layer, dtype))


def _in_four_bits(layer: nn.Linear, dtype: torch.dtype) -> Any:
    made = import_module(LIBRARY).nn
    found = made.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, dtype, True, "nf4", device="meta"
    )
    found.weight = made.Params4bit(layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
    found.bias = layer.bias
    # on some CPUs it lays a matrix out anew when it validates, and such a layout has no gradient
    found.support_avx512bf16_for_cpu = False
    return found.train(layer.training)
