"""The adapter folder: a standard PEFT adapter, its training settings, and vectors that prove it works.

A folder that another program has made has PEFT's two files alone: `peft_folder` reads it. `import-adapter` writes ours
beside them.

    adapter_config.json  adapter_model.safetensors   any PEFT user can load these
    moda.safetensors                                 instead of these, for an adapter that PEFT does not know (`moda`)
    late_fusion.safetensors                          beside these, of an adapter with NoteLLM-2's gate (`late_fusion`)
    vlm2rec.json                                     encoder settings, backbone, losses, seed, versions; written last
    canary.safetensors                               a few generated items and their vectors
    curves.json  README.md                           training curves, model card

`files` of vlm2rec.json has the SHA-256 of every other file, and `seal` that of its own content.

PEFT only warns when an adapter's keys do not match the model, and then runs the base model. Loading here is strict:
an unexpected or missing key, an adapter that changes nothing, or canary vectors that differ are errors.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import Tensor

from vlm2rec.embedder.adapters import adapted_layers, moda, peft_folder
from vlm2rec.embedder.adapters.late_fusion import LateFusion
from vlm2rec.embedder.adapters.peft_folder import CONFIG_FILE, WEIGHTS_FILE
from vlm2rec.embedder.backbones import model_files, sharding
from vlm2rec.embedder.backbones.backbone import ADAPTED_LAYERS, Backbone
from vlm2rec.embedder.contract import publish, schema, storage
from vlm2rec.embedder.contract.checksums import checksums, first_damage, is_intact, sealed
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, ModelError
from vlm2rec.embedder.options import with_former_defaults

MODA_FILE = "moda.safetensors"
LATE_FUSION_FILE = "late_fusion.safetensors"
CANARY_FILE = "canary.safetensors"
CARD_FILE = "README.md"
FILES = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    MODA_FILE,
    LATE_FUSION_FILE,
    CANARY_FILE,
    schema.CURVES_FILE,
    CARD_FILE,
    schema.ADAPTER_FILE,
)
"""What a training writes into an adapter folder."""
CANARY_COSINE = 0.999
_HALF_COSINE = 0.99  # where one of the two was measured in half precision, which rounds a large update
Shape = tuple[int, ...]
_CANARY_TITLES = ("Plain white cotton shirt", "Blue ceramic mug 300 ml", "The Old Clock (1987)", "x")
# PEFT stops at an unknown type and prints it, so the type says what to do
_NO_PEFT_TYPE = (
    "MODA, which PEFT does not know: load this folder with vlm2rec.embedder.ItemEncoder.load(backbone, adapter=folder)"
)
_TRAIN_AGAIN = "fine-tune again, or copy the adapter folder again with all its files"


def add_lora(backbone: Backbone, rank: int, alpha: float, dropout: float, seed: int) -> PeftModel:
    """Put fresh LoRA layers into the backbone's language model, in place; returns the PEFT wrapper for saving.

    Raises:
        ModelError: the backbone has no layers under the names that all supported families use.
    """
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=ADAPTED_LAYERS, bias="none")
    wrapped = _wrap(backbone, config)
    adapted_layers.prepare(wrapped)
    inside = {id(parameter) for parameter in backbone.language_model.parameters()}
    stray = [name for name, p in wrapped.named_parameters() if p.requires_grad and id(p) not in inside]
    if stray:
        raise ModelError(
            f"LoRA would also adapt a layer outside the language model: {stray[0]}",
            "LoRA in the layers of the language model only",
            "choose a backbone of a supported family",
        )
    return wrapped


def _wrap(backbone: Backbone, config: LoraConfig) -> PeftModel:
    backbone.share_prefixes(False)  # kept prefixes are only valid for the current weights
    try:
        with warnings.catch_warnings():
            # PEFT still reads `is_gradient_checkpointing`, and newer transformers warn about that
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            return get_peft_model(backbone.model, config)
    except ValueError as error:
        raise ModelError(
            f"LoRA finds no layer to adapt in this backbone ({str(error).splitlines()[0]})",
            f"modules that match {ADAPTED_LAYERS}",
            "choose a backbone of a supported family",
        ) from None


@dataclass(frozen=True)
class Canary:
    """Generated items and the vectors an adapter gave them when it was saved."""

    titles: list[str]
    images: list[Image.Image]
    fused: np.ndarray  # (n, d) float32
    dtype: str = ""  # number format of the model; empty in adapters that do not say


def canary_items() -> tuple[list[str], list[Image.Image]]:
    """Return the titles and the drawn images of the canary, the same every time."""
    rng = np.random.default_rng(20_260_317)
    images = []
    for _ in _CANARY_TITLES:
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        images.append(Image.fromarray(coarse).resize((112, 112), Image.Resampling.BICUBIC))
    return list(_CANARY_TITLES), images


def save_adapter(
    wrapped: torch.nn.Module,
    folder: Path,
    settings: dict[str, Any],
    canary: Canary,
    curves: dict[str, Any],
    card: str,
    late_fusion: LateFusion | None = None,
) -> None:
    """Write a complete adapter folder; `vlm2rec.json` comes last and marks it finished.

    Args:
        wrapped: what `add_lora` or `moda.add_moda` returned.
        folder: the folder to write.
        settings: what the adapter was trained with, including `encoder`.
        canary: vectors of the trained model, merged if it can be (`merge_in_place`).
        curves: the training curves.
        card: the text of the README.
        late_fusion: the gate that was trained beside the adapter, if any.

    Raises:
        OSError: the disk is full or fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # of an earlier run, perhaps with another kind of adapter, or killed while it wrote these
    for name in (schema.ADAPTER_FILE, WEIGHTS_FILE, MODA_FILE, LATE_FUSION_FILE):
        (folder / name).unlink(missing_ok=True)
    for name in FILES:
        for left in folder.glob(f".{name}.*.tmp"):
            left.unlink(missing_ok=True)
    for left in folder.glob(".peft.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    with _os_errors():
        if isinstance(wrapped, PeftModel):
            weights = WEIGHTS_FILE
            _save_peft(wrapped, folder)
            settings = {"kind": "lora", **settings}
        else:
            weights = MODA_FILE
            with publish.whole_file(folder / MODA_FILE) as file:
                safetensors.torch.save_file(moda.weights(wrapped), file)
            schema.write_json(folder / CONFIG_FILE, {"peft_type": _NO_PEFT_TYPE})
            settings = {"kind": "moda", "moda": moda.settings_of(wrapped), **settings}
        if late_fusion is not None:
            tensors = {name: tensor.detach().cpu() for name, tensor in late_fusion.state_dict().items()}
            with publish.whole_file(folder / LATE_FUSION_FILE) as file:
                safetensors.torch.save_file(tensors, file)
        schema.write_json(folder / schema.CURVES_FILE, curves)
        beside = () if late_fusion is None else (LATE_FUSION_FILE,)
        _finish(folder, (CONFIG_FILE, weights, *beside, schema.CURVES_FILE), settings, canary, card)


def save_imported(plain: Path, folder: Path, settings: dict[str, Any], canary: Canary, card: str) -> None:
    """Write an adapter folder around an adapter that another program made; its two files are copied as they are.

    Args:
        plain: the other program's folder.
        folder: the folder to write, empty.
        settings: what `vlm2rec.json` says, including `encoder`.
        canary: vectors of the backbone with the adapter.
        card: the text of the README.

    Raises:
        OSError: the disk is full or fails.
    """
    with _os_errors():
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copyfile(plain / name, folder / name)
        _finish(folder, (CONFIG_FILE, WEIGHTS_FILE), {"kind": "peft", **settings}, canary, card)


_MODEL_DTYPE = "model_dtype"  # of the canary: a tensor without numbers, in the number format of the model


def _finish(folder: Path, written: Sequence[str], settings: dict[str, Any], canary: Canary, card: str) -> None:
    """Write canary and card into an adapter folder, and `vlm2rec.json` last; the files of these names are there."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in canary.images]))
    vectors = {"images": pixels, "fused": torch.from_numpy(canary.fused)}
    with publish.whole_file(folder / CANARY_FILE) as file:
        # one key alone: safetensors writes several in any order, and the same training shall give the same bytes
        if canary.dtype:
            vectors[_MODEL_DTYPE] = torch.empty(0, dtype=getattr(torch, canary.dtype))
        safetensors.torch.save_file(vectors, file, metadata={"titles": json.dumps(canary.titles)})
    schema.write_text(folder / CARD_FILE, card)  # instead of PEFT's empty template
    files = checksums(folder, (*written, CANARY_FILE, CARD_FILE))
    schema.write_json(folder / schema.ADAPTER_FILE, sealed({**settings, "files": files}))


def _save_peft(wrapped: PeftModel, folder: Path) -> None:
    """Publish PEFT's two files, each whole."""
    wrapped.peft_config["default"].inference_mode = True
    draft = folder / publish.temporary_name("peft")
    try:
        wrapped.save_pretrained(str(draft), safe_serialization=True)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            with publish.whole_file(folder / name) as file:
                (draft / name).replace(file)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def _os_errors() -> Iterator[None]:
    """Turn the error of safetensors, when the disk is full, into that of a disk."""
    try:
        yield
    except safetensors.SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from error


def own_files(folder: Path) -> set[str]:
    """Return the names of the files in a finished adapter folder that are as a training has written them.

    It is empty if the folder is not such a folder, or an imported one. One from before there were checksums is taken
    at its names.
    """
    try:
        settings = schema.read_json(folder / schema.ADAPTER_FILE, "", "")
    except ArtifactError:
        return set()
    if "encoder" not in settings or settings.get("kind") == "peft":
        return set()
    files = settings.get("files")
    if not isinstance(files, dict):
        return set(FILES)
    listed = [name for name in FILES if name in files]  # no other name, whatever a stranger's file lists
    return {schema.ADAPTER_FILE, *(name for name in listed if first_damage(folder, {name: files[name]}) is None)}


def _require_whole(folder: Path, *names: str) -> None:
    """Raise `ArtifactError` if one of these files of an adapter does not have the bytes that were written."""
    files = read_adapter(folder).get("files")  # older folders have none
    files = files if isinstance(files, dict) else {}
    damage = first_damage(folder, {name: files[name] for name in names if name in files})
    if damage:
        raise ArtifactError(f"the adapter {folder} is damaged: {damage}", "the files of `finetune`", _TRAIN_AGAIN)


def read_adapter(folder: Path) -> dict[str, Any]:
    """Return the settings of a finished adapter folder.

    Raises:
        ModelError: the folder is not an adapter folder of vlm2rec, is unfinished, or its settings are no JSON.
        ArtifactError: its `vlm2rec.json` is not as it was written.
    """
    weights = MODA_FILE if (folder / MODA_FILE).is_file() else WEIGHTS_FILE
    needed = (CONFIG_FILE, weights, CANARY_FILE, schema.ADAPTER_FILE)
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing and is_foreign(folder):
        raise ModelError(
            f"{folder} is a PEFT adapter that `vlm2rec finetune` has not made: it has no {schema.ADAPTER_FILE}, which"
            " says how to prompt, and no canary, which proves that it works",
            "an adapter folder written by `vlm2rec finetune` or `vlm2rec import-adapter`",
            "run `vlm2rec import-adapter` with it, and give its --out",
        )
    if missing:
        raise ModelError(
            f"{folder} is not a finished adapter folder: it has no {missing[0]}",
            "a folder written by `vlm2rec finetune`",
            "run the same `vlm2rec finetune` command again: it continues from its last checkpoint",
        )
    settings = schema.read_json(folder / schema.ADAPTER_FILE, "the settings of an adapter", _TRAIN_AGAIN)
    if not is_intact(settings):
        raise ArtifactError(
            f"{folder / schema.ADAPTER_FILE} is damaged, or was changed by hand: it does not have the content that was"
            " written",
            "the settings that the adapter was trained with",
            _TRAIN_AGAIN,
        )
    if not isinstance(settings.get("encoder"), dict):
        raise ModelError(
            f"{folder / schema.ADAPTER_FILE} has no encoder settings", "a file written by finetune", _TRAIN_AGAIN
        )
    return settings | {"config": with_former_defaults(settings.get("config") or {})}


def is_foreign(folder: Path) -> bool:
    """Tell whether another program made an adapter: PEFT's files are there, and nothing of ours."""
    return peft_folder.is_plain(
        folder, (schema.ADAPTER_FILE, schema.CURVES_FILE, CANARY_FILE, MODA_FILE, "checkpoints")
    )


def require_promptless(adapter: Path | None, prompts: str) -> None:
    """Raise `ConfigError` for an adapter whose folder says how to prompt, where `prompts` decides that."""
    if adapter is not None and not is_foreign(adapter):
        raise ConfigError(
            f"{prompts} with --adapter {adapter}, which says itself how to prompt",
            "the backbone alone, or a PEFT folder that another program made",
            "leave --adapter out, or --strategy; if the adapter was imported, give the folder that import-adapter read",
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return model_files.read_json(path)
    except ModelError as error:
        raise ModelError(error.found, "a file of an adapter folder", _TRAIN_AGAIN) from None


def read_canary(folder: Path) -> Canary:
    """Return the canary stored with an adapter.

    Raises:
        ModelError, ArtifactError: it is damaged.
    """
    _require_whole(folder, CANARY_FILE)
    path = folder / CANARY_FILE
    try:
        tensors = safetensors.torch.load_file(path)
        with safetensors.safe_open(path, "pt") as file:
            about = file.metadata()
        titles, dtype = json.loads(about["titles"]), about.get("dtype", "")  # earlier versions wrote it there
        if _MODEL_DTYPE in tensors:
            dtype = str(tensors[_MODEL_DTYPE].dtype).removeprefix("torch.")
        pixels, fused = tensors["images"].numpy(), tensors["fused"].numpy()
        images = [Image.fromarray(picture) for picture in pixels]
        whole = all(isinstance(title, str) for title in titles) and len(titles) == len(images) == len(fused) > 0
        if not whole or fused.ndim != 2 or fused.dtype != np.float32:
            raise ValueError(f"{len(titles)} titles, {len(images)} images, vectors of shape {fused.shape}")
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path} is damaged ({error})", "the canary of the adapter", _TRAIN_AGAIN) from None
    return Canary(titles, images, fused, dtype)


def merge_in_place(wrapped: torch.nn.Module) -> bool:
    """Fold the LoRA of a trained model into its weights, as a merged export has it; tell whether it could be done.

    The adapter can still be saved. In half precision a merged model gives slightly other vectors than the same model
    with its adapter beside it.
    """
    if isinstance(wrapped, PeftModel):
        wrapped.base_model.merge_adapter()
    return isinstance(wrapped, PeftModel)


def merge_adapter(backbone: Backbone, folder: Path) -> None:
    """Load an adapter strictly and fold it into the backbone's weights, in place.

    The update is computed in float32 and rounded once, to the backbone's dtype. An adapter with MoDA is folded
    into two sets of weights, one for each modality.

    Raises:
        ModelError: a key or shape that does not fit, or an adapter whose B matrices are all zero.
        ArtifactError: a file is truncated or otherwise damaged.
    """
    if kind(folder) == "moda":
        load_moda(backbone, folder)
        moda.fold(backbone)
        return
    if not is_foreign(folder):
        _require_whole(folder, WEIGHTS_FILE, CONFIG_FILE)
    if kind(folder) == "peft":
        peft_folder.fold(backbone, folder)
        return
    config, shapes = _plain_config(folder), {}
    for name, layer in backbone.adapted_layers().items():
        shapes[_STORED.format(name, "A")] = (config.r, layer.in_features)
        shapes[_STORED.format(name, "B")] = (layer.out_features, config.r)
    _require_shapes(shapes, model_files.shapes(folder / WEIGHTS_FILE), folder)
    stored = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    wrapped = _wrap(backbone, config)
    parameters = {_stored_name(name): parameter for name, parameter in wrapped.named_parameters() if "lora_" in name}
    _copy_strictly(parameters, stored, folder)
    wrapped.to(backbone.device)
    wrapped.merge_and_unload()
    backbone.model.requires_grad_(False).eval()


def _plain_config(folder: Path) -> LoraConfig:
    """Return rank, α and scaling of a LoRA adapter as a config of our own.

    The folder's config comes from whoever made the adapter: an expression in its `target_modules` may take for ever to
    match. The layers are always those of `ADAPTED_LAYERS`.

    Raises:
        ModelError: the config asks for more than plain LoRA, or holds no numbers.
    """
    config = _read_json(folder / CONFIG_FILE)
    strange = [key for key, plain in _PLAIN_LORA.items() if config.get(key, plain) not in (plain, None, False, [], {})]
    rank: Any
    alpha: Any
    rank, alpha = config.get("r"), config.get("lora_alpha")
    numbers = type(rank) is int and rank > 0 and type(alpha) in (int, float) and math.isfinite(alpha) and alpha != 0
    if strange or not numbers:
        what = f"{strange[0]} = {config[strange[0]]!r}" if strange else f"r = {rank!r} and lora_alpha = {alpha!r}"
        raise ModelError(
            f"{folder / CONFIG_FILE} says {_short(what)}",
            "plain LoRA, as `vlm2rec finetune` writes it",
            "give the adapter folder as finetune wrote it",
        )
    scaled = config.get("use_rslora") is True
    return LoraConfig(r=rank, lora_alpha=alpha, use_rslora=scaled, target_modules=ADAPTED_LAYERS, bias="none")


# other values change the update in ways that are not folded here; None, false and empty ones do not
_PLAIN_LORA: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "modules_to_save", "use_dora", "fan_in_fan_out", "lora_bias")),
    **dict.fromkeys(("layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens")),
    **dict.fromkeys(("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config")),
}
_STORED = "base_model.model.{}.lora_{}.weight"


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:199]}…"


def scale_of(folder: Path) -> float:
    """Return the factor α/r by which a finished adapter's update is multiplied.

    Raises:
        ModelError: its settings are damaged, or are not those of plain LoRA or MoDA.
    """
    if kind(folder) == "moda":
        settings = _moda_settings(folder)
        return settings.alpha / settings.rank
    if kind(folder) == "peft":
        theirs = peft_folder.read_settings(folder)
        return theirs.scale(theirs.rank, theirs.alpha)
    config = _plain_config(folder)
    return float(config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r))


def described(folder: Path) -> dict[str, Any]:
    """Return what a finished adapter learned, and from what: for the manifest of its vectors."""
    if is_foreign(folder):
        return {"name": folder.resolve().name, "canary": False, **peft_folder.described(folder)}
    settings = read_adapter(folder)
    training, data = settings.get("training"), settings.get("dataset")
    found: dict[str, Any] = {"name": folder.resolve().name}
    if settings.get("kind") == "peft":
        found |= {"canary": True, **peft_folder.described(folder)}
    for key, part, names in (
        ("training", training, ("method", "loss", "loss_settings", "seed", "steps")),
        ("dataset", data, ("name", "sha256")),
    ):
        if isinstance(part, dict):
            found[key] = {name: part[name] for name in names if name in part}
    return found


def kind_of(wrapped: torch.nn.Module) -> str:
    """Return the kind of a model's adapter, `lora` or `moda`; `wrapped` as for `save_adapter`."""
    return "lora" if isinstance(wrapped, PeftModel) else "moda"


def kind(folder: Path) -> str:
    """Return the kind of an adapter folder.

    `lora`; `moda`, which has weights for each modality; `peft`, which another program has made.
    """
    found = "peft" if is_foreign(folder) else str(read_adapter(folder).get("kind", "lora"))  # older folders have none
    if found not in ("lora", "moda", "peft"):
        raise ModelError(f"the adapter {folder} is of kind {found!r}", "lora, moda or peft", "install a newer vlm2rec")
    return found


def load_moda(backbone: Backbone, folder: Path) -> torch.nn.Module:
    """Load an adapter with MoDA strictly into new experts, in place, without folding it.

    Raises:
        ModelError: a key or shape that does not fit, or an adapter whose B matrices are all zero.
        ArtifactError: a file is truncated or otherwise damaged.
    """
    _require_whole(folder, MODA_FILE)
    settings = _moda_settings(folder)
    _require_shapes(moda.shapes(backbone, settings), model_files.shapes(folder / MODA_FILE), folder)
    stored = safetensors.torch.load_file(folder / MODA_FILE)
    model = moda.add_moda(backbone, settings, seed=0)
    _copy_strictly(moda.parameters(model), stored, folder)
    return model.eval()


def _moda_settings(folder: Path) -> moda.ModaSettings:
    try:
        settings = moda.ModaSettings(**read_adapter(folder)["moda"])
        whole = (settings.experts, settings.rank)
        if any(type(n) is not int or n < 1 for n in whole) or not math.isfinite(settings.alpha):
            raise ValueError(f"{settings}")
    except (KeyError, TypeError, ValueError, ZeroDivisionError, ConfigError) as error:
        raise ModelError(
            f"the adapter {folder} is damaged ({_short(str(error))})", "an adapter with MoDA", _TRAIN_AGAIN
        ) from None
    return settings


def _require_shapes(expected: Mapping[str, Shape], stored: Mapping[str, Shape], folder: Path) -> None:
    """Raise `ModelError` unless an adapter's file holds what this backbone takes; nothing has been made so far."""
    fix = "give the backbone named in its vlm2rec.json"
    wanted = "an adapter trained on this backbone", fix
    peft_folder.require_shapes(expected, stored, folder, "this backbone", wanted, fix)


def _copy_strictly(parameters: dict[str, torch.nn.Parameter], stored: dict[str, Tensor], folder: Path) -> None:
    """Copy an adapter's weights; both sides must have the same keys and shapes, and not all B may be zero."""
    _require_shapes(
        {name: tuple(parameter.shape) for name, parameter in parameters.items()},
        {name: tuple(tensor.shape) for name, tensor in stored.items()},
        folder,
    )
    if not any(tensor.any() for name, tensor in stored.items() if "lora_B" in name):
        raise ModelError(
            f"the adapter {folder} has no effect: all its lora_B matrices are zero",
            "a trained adapter",
            "fine-tune for at least one step",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored[name])


def _stored_name(parameter: str) -> str:
    return re.sub(r"\.default\.weight$", ".weight", parameter)


def check_canary(canary: Canary, before: np.ndarray, after: np.ndarray, folder: Path, dtype: str) -> None:
    """Raise `ModelError` unless the adapter changes the vectors to those stored when it was saved.

    In half precision they need not be as near, but nearer than without the adapter.

    Args:
        canary: the canary stored with the adapter.
        before: fused vectors of its items from the backbone alone, (n, d).
        after: fused vectors of its items with the adapter, (n, d).
        folder: the adapter folder, for the message.
        dtype: number format of the model that made `after`.
    """
    require_effect(before, after, folder)
    if after.shape != canary.fused.shape:
        found = (
            f"vectors of {after.shape[1]} dimensions, but the adapter {folder} was saved with vectors of"
            f" {canary.fused.shape[1]}"
        )
        raise ModelError(found, "vectors of the same dimensions", "give the backbone named in its vlm2rec.json")
    near = cosine(after, canary.fused)
    worst = float(near.min())
    exact = dtype == "float32" and canary.dtype in ("", "float32")
    least = CANARY_COSINE if exact else _HALF_COSINE
    nearer = worst >= CANARY_COSINE or float(near.mean()) > float(cosine(before, canary.fused).mean())
    if not (worst >= least and nearer):
        raise ModelError(
            f"the adapter {folder} on this backbone gives other vectors than when it was saved (cosine {worst:.4f})",
            f"a cosine of at least {least} on the stored canary items",
            "give the backbone and revision named in its vlm2rec.json",
        )


def require_effect(before: np.ndarray, after: np.ndarray, folder: Path) -> None:
    """Raise `ModelError` if an adapter changes no vector, or makes one that is not finite.

    Args:
        before: fused vectors of some items from the backbone alone, (n, d).
        after: fused vectors of the same items with the adapter, (n, d).
        folder: the adapter folder, for the message.
    """
    again = "give the folder that its training wrote at the end" if is_foreign(folder) else _TRAIN_AGAIN
    if np.array_equal(before, after, equal_nan=True):
        raise ModelError(f"the adapter {folder} does not change the backbone's output", "a trained adapter", again)
    if not np.array_equal(np.isnan(before), ~np.isfinite(after)):
        raise ModelError(f"the adapter {folder} makes vectors that are not finite", "a trained adapter", again)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair of rows, (n,)."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(axis=1) / np.maximum(lengths, np.finfo(np.float32).tiny))


def adapter_hash(folder: Path) -> str:
    """Return the SHA-256 of the adapter's weights.

    Raises:
        ModelError, ArtifactError: as `read_adapter`; a file is truncated or otherwise damaged.
    """
    if is_foreign(folder):
        return peft_folder.weights_hash(folder)
    weights = MODA_FILE if kind(folder) == "moda" else WEIGHTS_FILE
    _require_whole(folder, weights, CONFIG_FILE, CANARY_FILE)
    found = storage.sha256_file(folder / weights)
    if _has_late_fusion(folder):
        _require_whole(folder, LATE_FUSION_FILE)
        both = f"{found}\0{storage.sha256_file(folder / LATE_FUSION_FILE)}"
        return hashlib.sha256(both.encode()).hexdigest()
    return found


def _has_late_fusion(folder: Path) -> bool:
    return read_adapter(folder)["encoder"].get("late_fusion", "off") != "off"


def load_late_fusion(folder: Path, dim: int) -> LateFusion:
    """Return the gate of an adapter with one, for states of length `dim`.

    Raises:
        ModelError: it does not fit.
        ArtifactError: its file is missing or damaged.
    """
    _require_whole(folder, LATE_FUSION_FILE)
    made = LateFusion(dim)
    expected = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    _require_shapes(expected, model_files.shapes(folder / LATE_FUSION_FILE), folder)
    made.load_state_dict(safetensors.torch.load_file(folder / LATE_FUSION_FILE))
    return made.requires_grad_(False).eval()


def fingerprint(folder: Path) -> dict[str, Any]:
    """Return what of an adapter belongs in the fingerprint of its vectors.

    Raises:
        ModelError, ArtifactError: as `adapter_hash` and `scale_of`.
    """
    found: dict[str, Any] = {"adapter": adapter_hash(folder), "adapter_scale": scale_of(folder)}
    if kind(folder) == "peft":  # one of ours has no more settings
        found["adapter_settings"] = peft_folder.effect_hash(folder)
    return found


def backbone_licence(source: str) -> str:
    """Return the licence of a backbone, from the front matter of a local README or a list of known hub ids."""
    known = {
        "Qwen/Qwen2.5-VL-3B-Instruct": "Qwen Research License (no commercial use)",
        "Qwen/Qwen2.5-VL-7B-Instruct": "Apache-2.0",
        "Qwen/Qwen2.5-VL-32B-Instruct": "Apache-2.0",
    }
    readme = Path(source) / "README.md"
    if readme.is_file():
        found = re.search(r"^license(?:_name)?:\s*(\S.*)$", readme.read_text(encoding="utf-8", errors="replace"), re.M)
        if found:
            return found[1].strip()
    return known.get(source, "not stated here; see the page of the backbone")


def trainable(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return the parameters that training changes, by name, whole, detached and on the CPU.

    Where processes hold parts of them, all have to call this.
    """
    return {n: sharding.whole(p.detach()).cpu().clone() for n, p in module.named_parameters() if p.requires_grad}


def restore(module: torch.nn.Module, stored: dict[str, Tensor], where: str) -> None:
    """Copy `trainable` parameters back; raise `ModelError` when the names differ."""
    current = {n: p for n, p in module.named_parameters() if p.requires_grad}
    if current.keys() != stored.keys():
        raise ModelError(
            f"the checkpoint {where} holds other weights than this run trains",
            "a checkpoint of the same settings",
            "choose another --out, or --no-resume",
        )
    with torch.no_grad():
        for name, parameter in current.items():
            parameter.copy_(sharding.cut_like(stored[name], parameter))
