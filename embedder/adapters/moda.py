"""MoDA of the SDA paper: low-rank experts in every linear layer, mixed by a gate that depends on the modality.

    y = W x + (α/r)·Σ_i w_i(m)·B_i A_i x                        Eqs. 5 and 7
    w(m) = softmax(G·e_m),  m is text or image                    Eq. 6

The rank r is shared by all E experts, r/E each, so the adapter is as large as a plain LoRA adapter; with E = 1 it is
plain LoRA. Each layer has its own e_m, 64 numbers for each modality, and its own G, a Linear without bias; both are
trained.

`modality(...)` around the call of the model tells the layers which modality a prompt has. A layer that is called
outside of it raises an error, because a wrong mixture would go unnoticed. Gradient checkpointing runs a layer again
after that block has ended; `remembered` gives it the same modality then.

The gate depends on nothing but the modality, so a finished adapter is two sets of weights, W + (α/r)·B diag(w(m)) A.
`fold` keeps both: the vectors are those of the unfolded model, at the speed of the plain backbone. The adapted layers
then take twice their memory: about 13 GB more for a 7B model in bfloat16.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm2rec.embedder.adapters.adapted_layers import dropout
from vlm2rec.embedder.backbones.modality import required
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ConfigError

if TYPE_CHECKING:
    from vlm2rec.embedder.backbones.backbone import Backbone

GATE_WIDTH = 64  # length of a modality's embedding
_PARAMETERS = ("lora_A", "lora_B", "modality", "gate")


@dataclass(frozen=True)
class ModaSettings:
    """The settings of an adapter."""

    experts: int
    rank: int  # of all experts together
    alpha: float
    dropout: float

    def __post_init__(self) -> None:
        if self.rank % self.experts:
            raise ConfigError(
                f"--lora-rank {self.rank} cannot be divided among --experts {self.experts}",
                "a rank that is a multiple of the number of experts",
                "change --lora-rank or --experts",
            )


class MoDALinear(nn.Module):
    """A frozen linear layer with experts. Expert i owns rows of A, and columns of B, from i·r/E to (i + 1)·r/E."""

    def __init__(self, base: nn.Linear, settings: ModaSettings) -> None:
        super().__init__()
        self.base = base
        self.scale = settings.alpha / settings.rank
        self.expert_rank = settings.rank // settings.experts
        self.dropout = nn.Dropout(settings.dropout)
        made: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(settings.rank, base.in_features, **made))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, settings.rank, **made))
        self.modality = nn.Parameter(torch.empty(len(schema.MODALITIES), GATE_WIDTH, **made))
        self.gate = nn.Parameter(torch.empty(settings.experts, GATE_WIDTH, **made))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as in LoRA
        nn.init.normal_(self.modality)
        nn.init.kaiming_uniform_(self.gate, a=math.sqrt(5))

    def weights(self, name: str) -> Tensor:
        """Return the gate's weight of each expert for a modality, (E,), summing to 1."""
        return F.linear(self.modality[schema.MODALITIES.index(name)], self.gate).softmax(dim=0)

    def delta(self, name: str) -> Tensor:
        """Return what the experts add to the weight for a modality, (out, in) float32."""
        return self.scale * (self.lora_B * self._shares(name)) @ self.lora_A

    def _shares(self, name: str) -> Tensor:
        return self.weights(name).repeat_interleave(self.expert_rank)  # (r,)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for the current modality, (..., out)."""
        found = self.base(x)
        a, b, shares = (part.to(found.dtype) for part in (self.lora_A, self.lora_B, self._shares(required())))
        low = F.linear(dropout(x, self.dropout), a) * shares  # (..., r)
        return found + F.linear(low * self.scale, b)


class FoldedLinear(nn.Module):
    """A linear layer with one weight matrix for each modality."""

    def __init__(self, layer: MoDALinear) -> None:
        super().__init__()
        base = layer.base
        for name in schema.MODALITIES:
            folded = (base.weight.float() + layer.delta(name)).to(base.weight.dtype)  # rounded once
            self.register_parameter(name, nn.Parameter(folded.detach(), requires_grad=False))
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for the current modality, (..., out)."""
        return F.linear(x, self.get_parameter(required()), self.bias)


def add_moda(backbone: Backbone, settings: ModaSettings, seed: int) -> nn.Module:
    """Put new experts into the backbone's language model, in place; returns the model that holds them.

    Raises:
        ModelError: no layer has one of the names that all supported families use.
    """
    torch.manual_seed(seed)
    backbone.share_prefixes(False)  # kept prefixes are only valid for the current weights
    model: nn.Module = backbone.model
    for name, layer in backbone.adapted_layers().items():
        _replace(model, name, MoDALinear(layer, settings))
    return model


def shapes(backbone: Backbone, settings: ModaSettings) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what `parameters` would return once the experts are there; nothing is made.

    Raises:
        ModelError: as `add_moda`.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, layer in backbone.adapted_layers().items():
        found[f"{name}.lora_A"] = (settings.rank, layer.in_features)
        found[f"{name}.lora_B"] = (layer.out_features, settings.rank)
        found[f"{name}.modality"] = (len(schema.MODALITIES), GATE_WIDTH)
        found[f"{name}.gate"] = (settings.experts, GATE_WIDTH)
    return found


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def layers(model: nn.Module) -> dict[str, MoDALinear]:
    """Return the layers with experts, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoDALinear)}


def settings_of(model: nn.Module) -> dict[str, Any]:
    """Return the settings of a model's experts, as JSON."""
    layer = next(iter(layers(model).values()))
    experts, rank = len(layer.gate), len(layer.lora_A)
    return asdict(ModaSettings(experts, rank, layer.scale * rank, layer.dropout.p))


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters by name, detached and on the CPU."""
    return {name: parameter.detach().cpu().contiguous() for name, parameter in parameters(model).items()}


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters themselves, by name."""
    return {f"{name}.{own}": getattr(layer, own) for name, layer in layers(model).items() for own in _PARAMETERS}


@torch.no_grad()
def fold(backbone: Backbone) -> None:
    """Replace the layers with experts by layers with one weight matrix for each modality, in place."""
    backbone.share_prefixes(False)
    for name, layer in layers(backbone.model).items():
        _replace(backbone.model, name, FoldedLinear(layer))
    backbone.model.requires_grad_(False).eval()
