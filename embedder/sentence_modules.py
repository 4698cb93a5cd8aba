"""What a sentence-transformers folder says of the way from token states to a vector: its modules, read as plain data.

No torch pickle is opened and no code of the folder is run; the package sentence-transformers is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vlm2rec.embedder.errors import ModelError
from vlm2rec.embedder.pooling import last_token, mean_tokens

Pooling = Literal["auto", "mean", "cls", "last"]


def first_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the state of each row's first attended token, (B, d)."""
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.bool().int().argmax(1)]


def max_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the largest value of each dimension over each row's attended tokens, (B, d)."""
    return hidden.masked_fill(~mask.bool()[..., None], -torch.inf).amax(1)


def mean_over_root_length(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the sum over each row's attended tokens divided by the root of their number, (B, d)."""
    return mean_tokens(hidden, mask) * mask.sum(1, keepdim=True).sqrt()


def position_weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over each row's attended tokens, the token at position i weighted by i + 1, (B, d)."""
    weights = mask * mask.cumsum(1)  # (B, T)
    return torch.einsum("bt,btd->bd", weights.to(hidden.dtype), hidden) / weights.sum(1, keepdim=True)


# sentence-transformers' names; several at once are concatenated in this order
POOLERS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": first_token,
    "max": max_tokens,
    "mean": mean_tokens,
    "mean_sqrt_len_tokens": mean_over_root_length,
    "weightedmean": position_weighted_mean,
    "lasttoken": last_token,
}
_POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS: Mapping[str, type[nn.Module]] = {
    "Tanh": nn.Tanh,
    "Identity": nn.Identity,
    "ReLU": nn.ReLU,
    "GELU": nn.GELU,
    "Sigmoid": nn.Sigmoid,
    "SiLU": nn.SiLU,
}


@dataclass(frozen=True)
class DenseLayer:
    """A sentence-transformers `Dense` module: its files, not yet read."""

    folder: Path
    in_features: int
    out_features: int
    bias: bool
    activation: str  # key of `_ACTIVATIONS`

    def load(self) -> nn.Module:
        """Return the layer with its weights."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias)
        try:
            weights = load_file(self.folder / "model.safetensors")
            layer.load_state_dict({name.removeprefix("linear."): value for name, value in weights.items()})
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ModelError(
                f"the weights of {self.folder} cannot be loaded ({str(error).splitlines()[0]})",
                "model.safetensors of a Dense module; pickled weights are never opened",
                "download the folder again, or convert its weights to safetensors",
            ) from None
        return nn.Sequential(layer, _ACTIVATIONS[self.activation]())


@dataclass(frozen=True)
class SentenceModules:
    """What a text encoder's folder says of the way from token states to a vector."""

    transformer: Path  # folder of the transformers model
    pooling: tuple[str, ...]  # keys of `POOLERS`
    dense: tuple[DenseLayer, ...] = ()
    normalise: bool = False
    lower_case: bool = False
    max_tokens: int | None = None  # None: what tokenizer and positions allow
    prompt: str = ""  # stands before every title
    names: tuple[str, ...] = field(default=("Transformer", "Pooling"))


def read_sentence_modules(folder: Path, pooling: Pooling = "auto") -> SentenceModules:
    """Read the modules of a text encoder's folder; a folder without `modules.json` is pooled by the mean.

    Raises:
        ModelError: a module or pooling this program does not know.
    """
    chosen = {"last": "lasttoken"}.get(pooling, pooling)
    if not (folder / "modules.json").is_file():
        return SentenceModules(folder, ("mean" if chosen == "auto" else chosen,))
    listed = listed_modules(folder)
    names, paths = [name for name, _ in listed], [path for _, path in listed]
    _require_known(folder, names)
    modes: tuple[str, ...] = ("mean",)
    dense: list[DenseLayer] = []
    for name, path in zip(names, paths, strict=True):
        if name == "Pooling":
            modes = _pooling_modes(path)
        elif name == "Dense":
            dense.append(_dense_layer(path))
    own = read_json_file(paths[0] / "sentence_bert_config.json", missing={})
    return SentenceModules(
        transformer=paths[0],
        pooling=modes if chosen == "auto" else (chosen,),
        dense=tuple(dense),
        normalise="Normalize" in names,
        lower_case=bool(own.get("do_lower_case", False)),
        max_tokens=own.get("max_seq_length"),
        prompt=_default_prompt(folder),
        names=tuple(names),
    )


def listed_modules(folder: Path) -> list[tuple[str, Path]]:
    """Return class name and folder of each module in `modules.json`, in order."""
    file = folder / "modules.json"
    listed = read_json_file(file)
    if not isinstance(listed, list) or not all(isinstance(m, dict) and {"type", "path"} <= set(m) for m in listed):
        raise ModelError(f"{file} lists no modules", "modules with type and path", "download the folder again")
    return [(str(module["type"]).rpartition(".")[2], folder / str(module["path"])) for module in listed]


def _require_known(folder: Path, names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in ("Transformer", "Pooling", "Dense", "Normalize")]
    late = "Normalize" in names and names[-1] != "Normalize"
    if unknown or not names or names[0] != "Transformer" or late:
        raise ModelError(
            f"the modules of {folder} are {', '.join(names) or 'none'}",
            "Transformer, Pooling, any number of Dense, and Normalize last if at all",
            "encode the items with sentence-transformers itself, and take the vectors in with `vlm2rec import-vectors`",
        )


def _pooling_modes(path: Path) -> tuple[str, ...]:
    config = read_json_file(path / "config.json")
    if not config.get("include_prompt", True):
        raise ModelError(
            f"{path} leaves the prompt out of the pooling", "include_prompt: true", "choose another encoder"
        )
    if isinstance(named := config.get("pooling_mode"), str):
        modes = [named]
    else:
        modes = [mode for key, mode in _POOLING_KEYS.items() if config.get(key)]
    if not modes or any(mode not in POOLERS for mode in modes):
        raise ModelError(
            f"{path} pools by {', '.join(modes) or 'nothing'}", f"{', '.join(POOLERS)}", "choose --pooling"
        )
    return tuple(modes)


def _dense_layer(path: Path) -> DenseLayer:
    config = read_json_file(path / "config.json")
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    if activation not in _ACTIVATIONS:
        raise ModelError(
            f"{path} has the activation {activation}", f"one of {', '.join(_ACTIVATIONS)}", "choose another encoder"
        )
    return DenseLayer(path, config["in_features"], config["out_features"], config.get("bias", True), activation)


def _default_prompt(folder: Path) -> str:
    config = read_json_file(folder / "config_sentence_transformers.json", missing={})
    name = config.get("default_prompt_name")
    return str(config.get("prompts", {}).get(name, "")) if name else ""


def read_json_file(path: Path, missing: Any = None) -> Any:
    """Return a JSON file's content, or `missing` where that is given and there is no file.

    Raises:
        ModelError: it cannot be read.
    """
    if missing is not None and not path.is_file():
        return missing
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error})", "JSON of a model folder", "download it again") from None
