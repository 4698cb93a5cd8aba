"""FSDP2: each of the processes that train together holds a part of every layer of the language model.

A layer is whole only while it computes: its parts are gathered before, and given up after. Its gradients are averaged
over the processes and cut in the same way, and so is what the optimizer remembers. Vision tower, embeddings and last
norm stay whole in each process.

All processes have to run the language model equally often, in the same order, forwards and backwards; whoever runs it
once more waits for ever.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vlm2rec.embedder import distributed


def shard(body: nn.Module, language_model: Any, device: torch.device) -> None:
    """Cut the layers of a language model over all processes, in place, and put the rest of its model on the device.

    Args:
        body: the model without its head, on the CPU: then no device ever holds more than one whole layer.
        language_model: the part of it with the `layers`.
        device: the device of this process.
    """
    mesh = init_device_mesh(device.type, (distributed.count(),))
    for layer in language_model.layers:
        fully_shard(layer, mesh=mesh)
    rest = {parameter for parameter in body.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(language_model, mesh=mesh, ignored_params=rest)  # lets a layer be gathered while another computes
    for tensor in (*rest, *body.buffers()):
        tensor.data = tensor.data.to(device)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the parts of all processes, which all have to call this; one that is not cut as it is."""
    return torch.as_tensor(tensor.full_tensor()) if isinstance(tensor, DTensor) else tensor


def cut_like(values: Tensor, parameter: Tensor) -> Tensor:
    """Return whole values cut as a parameter is, (...) of its shape; nothing is sent, as each process has them all."""
    if not isinstance(parameter, DTensor):
        return values
    values = values.to(parameter.device, parameter.dtype)
    return distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)


def empty(model: nn.Module) -> None:
    """Give back the memory of all weights of a model that is not used any more."""
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            parameter.to_local().untyped_storage().resize_(0)
        else:
            parameter.data = parameter.data.new_empty(0)
