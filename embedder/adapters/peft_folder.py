"""A LoRA adapter that another program has made: a plain PEFT folder, of PEFT itself, VLM2Vec, LLaMA-Factory, ms-swift.

    adapter_config.json  adapter_model.safetensors

It says nothing about prompts and has no canary. PEFT warns where keys do not match, and leaves those layers as they
were. Here every layer that the config targets needs its weights, and every weight a layer. What has another effect
than LoRA or DoRA in the language model's linear layers is refused by name, never left out.

    LoRA   W' = W + s·B A,   s = α/r, with rsLoRA α/√r; rank and α may differ between layers
    DoRA   W' = m ⊙ (W + s·B A) / ‖W + s·B A‖,   the norm and the trained m of each output

Releases of transformers name the same layers differently: `_SPELLINGS` lists what stood before `layers.0` in each.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import regex
import safetensors.torch
import torch
import transformers

from vlm2rec.embedder.backbones import model_files
from vlm2rec.embedder.backbones.backbone import ADAPTED_LAYERS, Backbone
from vlm2rec.embedder.contract import storage
from vlm2rec.embedder.contract.errors import ModelError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_BESIDE = ("non_lora_trainables.bin", "non_lora_state_dict.bin")  # weights trained beside LoRA: LLaVA's projector

_COPY = "copy the adapter folder again with all its files"
_OTHER_BACKBONE = "give its base model as --backbone"
_OTHER_OR_COPY = f"{_OTHER_BACKBONE}, or {_COPY}"
_MERGE = (
    "merge it: PeftModel.from_pretrained(model, folder).merge_and_unload().save_pretrained(new); copy the backbone's"
    " tokenizer and processor files there too, and give the new folder as --backbone"
)

_SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "qwen2_vl": ("model.language_model.", "model.", "language_model.", ""),
    "qwen2_5_vl": ("model.language_model.", "model.", "language_model.", ""),
    "qwen3_vl": ("model.language_model.", "language_model."),
    "qwen3_5": ("model.language_model.", "language_model."),
    "gemma3": ("model.language_model.", "language_model.model.", "language_model."),
    "internvl": ("model.language_model.", "language_model.model.", "language_model."),
    "llava": ("model.language_model.", "language_model.model.", "language_model."),
    "idefics3": ("model.text_model.",),
    "smolvlm": ("model.text_model.",),
}
"""What stands before `layers.0` in a family's names of layers: today, before transformers 4.52, without the head."""
_TEXT_SPELLINGS = ("model.", "")  # of causal text models, with and without the head

_STORED = re.compile(
    r"base_model\.model\.(?P<layer>.+)\.lora_(?:(?P<matrix>[AB])\.weight|magnitude_vector(?:\.weight)?)"
)
_LAYER = re.compile(
    r"(?P<start>(?:\w+\.)*)(?P<rest>layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj))"
)
_VISION = re.compile(r"(^|\.)(visual|vision\w*|multi_modal_projector|mlp1|merger)(\.|$)")

# what else a config may say: how the training went, or what counts only with another setting that is refused
_WITHOUT_EFFECT = frozenset(
    (
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("lora_dropout", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        *("qalora_group_size", "runtime_config", "ensure_weight_tying"),
    )
)
_READ = frozenset(
    (
        *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias"),
        *("init_lora_weights", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    )
)
# others take a part of the backbone's own weights into A and B, and so fit another backbone
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
_NUMBERS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MATCHING_SECONDS = 10.0  # for all expressions of a config, which a stranger may have written


@dataclass(frozen=True)
class PeftSettings:
    """What decides the effect of an adapter, from its config."""

    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    rslora: bool
    dora: bool
    targets: str | list[str]
    excluded: str | list[str]
    layers: list[int]  # empty: all
    layers_pattern: list[str]

    def scale(self, rank: int, alpha: float) -> float:
        """Return the factor of an update B A."""
        return alpha / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True)
class _Update:
    """The adapter's part for one linear layer of the backbone."""

    stored: str  # what the layer is called in the adapter
    rank: int
    scale: float


def is_plain(folder: Path, ours: Collection[str]) -> bool:
    """Tell whether another program made an adapter: PEFT's files are there, and nothing of `ours`."""
    theirs = (CONFIG_FILE, WEIGHTS_FILE, _PICKLED)
    return any((folder / name).exists() for name in theirs) and not any((folder / name).exists() for name in ours)


def read_settings(folder: Path) -> PeftSettings:
    """Return what an adapter's config says of its effect.

    Raises:
        ModelError: a file is missing or damaged, or the config asks for more than LoRA and DoRA in linear layers.
    """
    config = _config(folder)
    init = config.get("init_lora_weights")
    known = _WITHOUT_EFFECT | _READ
    strange = [key for key, value in config.items() if key not in known and value not in (None, False, [], {}, "")]
    strange += [key for key, plain in (("peft_type", "LORA"), ("bias", "none")) if config.get(key, plain) != plain]
    if init not in _INITIALISATIONS:
        strange.append("init_lora_weights")
    if strange:
        raise ModelError(
            f"{folder / CONFIG_FILE} says {_short(f'{strange[0]} = {config[strange[0]]!r}')}",
            "plain LoRA, rsLoRA or DoRA in the linear layers of the language model",
            _MERGE,
        )
    try:
        return _parsed(config)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"{folder / CONFIG_FILE} says {_short(str(error))}", "the config that PEFT writes", _COPY
        ) from None


def _config(folder: Path) -> dict[str, Any]:
    """Return `adapter_config.json`, once nothing speaks against the folder."""
    if (folder / _PICKLED).exists() and not (folder / WEIGHTS_FILE).is_file():
        raise ModelError(
            f"{folder} keeps its weights in {_PICKLED}, a pickle, which is never opened here",
            f"an adapter with {WEIGHTS_FILE}",
            "load it with PEFT where you trust it and save it again with safe_serialization=True, or " + _MERGE,
        )
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} has no {name}", f"{CONFIG_FILE} and {WEIGHTS_FILE}, as PEFT writes them", _COPY)
    for name in _BESIDE:
        if (folder / name).exists():
            raise ModelError(
                f"{folder} holds {name}: weights that were trained beside LoRA and would be left out",
                "an adapter of LoRA alone",
                "merge both into the backbone with the program that trained them, and give the result as --backbone",
            )
    try:
        return model_files.read_json(folder / CONFIG_FILE)
    except ModelError as error:
        raise ModelError(error.found, "the config of a PEFT adapter", _COPY) from None


def _parsed(config: Mapping[str, Any]) -> PeftSettings:
    """Return the settings; raise `ValueError` with the words of the config that cannot be."""

    def rank(value: Any, name: str) -> int:
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} = {value!r}")
        return value

    def alpha(value: Any, name: str) -> float:
        if type(value) not in (int, float) or not math.isfinite(value) or value == 0:
            raise ValueError(f"{name} = {value!r}")
        return float(value)

    def switch(name: str) -> bool:
        value = config.get(name)
        if value not in (None, True, False):
            raise ValueError(f"{name} = {value!r}")
        return bool(value)

    def names(name: str) -> str | list[str]:
        value = config.get(name) or []
        if not isinstance(value, str) and not _all_of(value, str):
            raise ValueError(f"{name} = {value!r}")
        return value

    def pattern(name: str, check: Callable[[Any, str], Any]) -> dict[str, Any]:
        value = config.get(name) or {}
        if not isinstance(value, dict):
            raise ValueError(f"{name} = {value!r}")
        return {key: check(each, f"{name}[{key!r}]") for key, each in value.items()}

    layers = config.get("layers_to_transform")
    layers = [] if layers is None else [layers] if type(layers) is int else layers
    if not _all_of(layers, int):
        raise ValueError(f"layers_to_transform = {layers!r}")
    before_number = names("layers_pattern")
    return PeftSettings(
        rank=rank(config.get("r"), "r"),
        alpha=alpha(config.get("lora_alpha"), "lora_alpha"),
        rank_pattern=pattern("rank_pattern", rank),
        alpha_pattern=pattern("alpha_pattern", alpha),
        rslora=switch("use_rslora"),
        dora=switch("use_dora"),
        targets=names("target_modules"),
        excluded=names("exclude_modules"),
        layers=layers,
        layers_pattern=[before_number] if isinstance(before_number, str) else before_number,
    )


def _all_of(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def fold(backbone: Backbone, folder: Path) -> None:
    """Load an adapter strictly and fold it into the backbone's weights, in place.

    The update is computed in float32 and rounded once, to the backbone's dtype.

    Raises:
        ModelError: a file is damaged; a key or shape that does not fit; layers that are not the language model's;
            B matrices that are all zero; weights that are not finite.
    """
    settings = read_settings(folder)
    _require_family(backbone, folder)
    updates = _updates(settings, backbone, model_files.shapes(folder / WEIGHTS_FILE), folder)
    stored = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    broken = [name for name, tensor in stored.items() if tensor.dtype not in _NUMBERS or not tensor.isfinite().all()]
    if broken:
        found = f"{broken[0]} of the adapter {folder} holds other than finite numbers ({stored[broken[0]].dtype})"
        raise ModelError(found, "a trained adapter in float32, bfloat16 or float16", _COPY)
    if not settings.dora and not any(t.any() for name, t in stored.items() if name.endswith(".lora_B.weight")):
        raise ModelError(
            f"the adapter {folder} has no effect: all its lora_B matrices are zero",
            "a trained adapter",
            "give the folder that its training wrote at the end",
        )
    backbone.share_prefixes(False)  # kept prefixes are only valid for the current weights
    layers = backbone.adapted_layers()
    with torch.no_grad():
        for name, update in updates.items():
            weight = layers[name].weight
            start = f"base_model.model.{update.stored}.lora_"
            a, b = (stored[f"{start}{matrix}.weight"].to(weight.device, torch.float32) for matrix in "AB")
            whole = weight.float() + update.scale * (b @ a)  # (out, in)
            if settings.dora:
                magnitude = stored.get(f"{start}magnitude_vector", stored.get(f"{start}magnitude_vector.weight"))
                assert magnitude is not None
                whole *= magnitude.to(weight.device, torch.float32)[:, None] / whole.norm(dim=1, keepdim=True)
            weight.copy_(whole)
    backbone.model.requires_grad_(False).eval()


def _require_family(backbone: Backbone, folder: Path) -> None:
    """Refuse an adapter whose config names a model class of another family than the backbone's."""
    found = _config(folder).get("auto_mapping")
    name = found.get("base_model_class") if isinstance(found, dict) else None
    known = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    theirs = getattr(getattr(known, "config_class", None), "model_type", None)
    ours = backbone.model.config.model_type
    if theirs is not None and str(theirs).removesuffix("_text") != ours:
        raise ModelError(
            f"the adapter {folder} was trained on a model of type {theirs} ({name}), this backbone is one of {ours}",
            "an adapter trained on this backbone",
            "give its base model as --backbone",
        )


def _updates(
    settings: PeftSettings, backbone: Backbone, stored: Mapping[str, tuple[int, ...]], folder: Path
) -> dict[str, _Update]:
    """Return the update of each layer of the backbone that the adapter changes, by the layer's name.

    Args:
        settings: what the config says.
        backbone: the backbone, not changed so far.
        stored: the shapes of the adapter's weights, by key.
        folder: for messages.
    """
    layers = backbone.adapted_layers()
    start = _spelling(stored, backbone, folder)
    matching = _Matching(folder)
    updates: dict[str, _Update] = {}
    expected: dict[str, tuple[int, ...]] = {}
    for name, layer in layers.items():
        theirs = start + name[name.index("layers.") :]
        if not matching.is_target(settings, theirs):
            continue
        rank = int(matching.first(settings.rank_pattern, theirs, settings.rank))
        alpha = matching.first(settings.alpha_pattern, theirs, settings.alpha)
        updates[name] = _Update(theirs, rank, settings.scale(rank, alpha))
        key = f"base_model.model.{theirs}.lora_"
        expected[f"{key}A.weight"] = (rank, layer.in_features)
        expected[f"{key}B.weight"] = (layer.out_features, rank)
        if settings.dora:
            late = f"{key}magnitude_vector.weight"
            expected[late if late in stored else f"{key}magnitude_vector"] = (layer.out_features,)
    require_shapes(
        expected,
        stored,
        folder,
        f"this backbone and its own {CONFIG_FILE}",
        ("the weights of all layers that its config targets, and no others, for this backbone", _OTHER_OR_COPY),
        _OTHER_BACKBONE,
    )
    return updates


def require_shapes(
    expected: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, tuple[int, ...]],
    folder: Path,
    place: str,
    of_keys: tuple[str, str],
    fix: str,
) -> None:
    """Raise `ModelError` unless an adapter's file has exactly the expected keys and shapes.

    Args:
        expected: shapes by key.
        stored: those of the file, of which only the header has been read.
        folder: the adapter folder, for the messages.
        place: what the adapter has to fit, in the words of the messages.
        of_keys: what is expected, and what to do, where keys are missing or spare.
        fix: what to do where a shape is another one.
    """
    missing, unexpected = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if missing or unexpected:
        example = f"missing {_short(missing[0])}" if missing else f"unexpected {_short(unexpected[0])}"
        raise ModelError(
            f"the adapter {folder} does not fit {place}: {len(missing)} keys missing, {len(unexpected)} unexpected"
            f" ({example})",
            *of_keys,
        )
    for key, shape in expected.items():
        if shape != stored[key]:
            raise ModelError(f"{key} of the adapter {folder} has shape {stored[key]}", f"{shape}, as in {place}", fix)


def _spelling(stored: Collection[str], backbone: Backbone, folder: Path) -> str:
    """Return what stands before `layers.0` in the adapter's keys, once all are those of language layers."""
    starts: dict[str, str] = {}
    for key in sorted(stored):
        match = _STORED.fullmatch(key)
        layer = match and _LAYER.fullmatch(match["layer"])
        if layer is None or _VISION.search(key):
            _refuse_key(key, stored, backbone, folder)
        else:
            starts.setdefault(layer["start"], key)
    ours = backbone.model.config.model_type
    known = _SPELLINGS.get(ours, _TEXT_SPELLINGS)
    strange = [start for start in starts if start not in known]
    if strange or len(starts) != 1:
        found = f"keys such as {_short(starts[(strange or [*starts])[0]])}" if starts else "no weights"
        raise ModelError(
            f"the adapter {folder} has {found}" + (f", {len(starts)} spellings in one file" if len(starts) > 1 else ""),
            f"the layers of a {ours} model under one of "
            + ", ".join(f"base_model.model.{start}layers" for start in known),
            f"give its base model as --backbone; for names of another release, {_MERGE}",
        )
    return next(iter(starts))


def _refuse_key(key: str, stored: Collection[str], backbone: Backbone, folder: Path) -> None:
    """Refuse an adapter with weights that are not those of a linear layer of the language model."""
    if _VISION.search(key):
        count = sum(bool(_VISION.search(each)) for each in stored)
        what = f"changes the vision tower ({count} weights, among them {_short(key)}), which stays frozen here"
    elif _STORED.fullmatch(key) or ".lora_" in key:
        what = f"changes a layer that is none of the language model's projections ({_short(key)})"
    else:
        what = f"holds weights that are no LoRA matrices ({_short(key)}), such as a trained copy of a module"
    raise ModelError(
        f"the adapter {folder} {what}", f"LoRA in linear layers whose names match {ADAPTED_LAYERS}", _MERGE
    )


class _Matching:
    """Matches names of layers as PEFT does, against expressions that a stranger may have written, in bounded time."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / CONFIG_FILE
        self._end = time.monotonic() + _MATCHING_SECONDS

    def is_target(self, settings: PeftSettings, layer: str) -> bool:
        """Tell whether the config puts an update on a layer, by the name that the adapter's own model has for it."""
        if self._named(settings.excluded, layer) or not self._named(settings.targets, layer):
            return False
        if isinstance(settings.targets, str) or layer in settings.targets or not settings.layers:
            return True
        # the first numbered part of the name, behind one of these names if there are any
        ways = [rf"(?:^|.*?\.){way}\.(\d+)\." for way in settings.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        numbers = [match[1] for way in ways if (match := self._match(way, layer))]
        return bool(numbers) and int(numbers[0]) in settings.layers

    def first(self, patterns: Mapping[str, float], layer: str, default: float) -> float:
        """Return the value of the first expression that fits the end of a layer's name."""
        fitting = (value for key, value in patterns.items() if self._match(rf"(.*\.)?({key})$", layer))
        return next(fitting, default)

    def _named(self, names: str | list[str], layer: str) -> bool:
        if isinstance(names, str):
            every = names.lower() == "all-linear"  # PEFT's word; it writes the names of layers in its place
            return every or (bool(names) and self._match(names, layer, whole=True) is not None)
        return any(layer == name or layer.endswith(f".{name}") for name in names)

    def _match(self, expression: str, text: str, whole: bool = False) -> regex.Match[str] | None:
        match = regex.fullmatch if whole else regex.match
        try:
            return match(expression, text, timeout=max(1e-3, self._end - time.monotonic()))
        except (regex.error, TimeoutError, RecursionError, OverflowError, MemoryError) as error:
            raise ModelError(
                f"{self._file} has the expression {_short(expression)}, which cannot be used"
                f" ({_short(str(error)) or type(error).__name__})",
                "names of layers, or an expression that is matched in seconds",
                "write the names of the layers instead",
            ) from None


# --- what the manifest says ----------------------------------------------------------------------------------------
def weights_hash(folder: Path) -> str:
    """Return the SHA-256 of an adapter's weights.

    Raises:
        ModelError: as `read_settings`.
    """
    read_settings(folder)
    return storage.sha256_file(folder / WEIGHTS_FILE)


def effect_hash(folder: Path) -> str:
    """Return a hash of the settings that decide what an adapter's weights do, 16 hex digits."""
    return hashlib.sha256(json.dumps(asdict(read_settings(folder)), sort_keys=True).encode()).hexdigest()[:16]


def described(folder: Path) -> dict[str, Any]:
    """Return what a config says of the adapter's kind and origin, for the manifest and the provenance."""
    config, settings = _config(folder), read_settings(folder)
    told = {key: config.get(key) for key in ("base_model_name_or_path", "peft_version")}
    kind = "DoRA" if settings.dora else "rsLoRA" if settings.rslora else "LoRA"
    return {
        "peft": kind,
        "rank": settings.rank,
        "alpha": settings.alpha,
        **{key: _short(str(value)) for key, value in told.items() if value},
    }


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:199]}…"
