"""Small pretrained encoders, used as they are: sentence-transformers folders, other text encoders, CLIP, SigLIP, and
the image encoders of `frozen_images`.

The model runs in transformers; the modules after it, in a sentence-transformers folder, are that package's own. The
package never loads the folder as a whole, because it would leave missing weights random. No code of a model folder is
run, and no pickle is opened.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from vlm2rec.embedder.backbones import model_files
from vlm2rec.embedder.backbones.devices import (
    batches_by_tokens,
    onednn_multiplies_float32,
    pick_device,
    pick_dtype,
    quiet,
    speed_up_float32,
)
from vlm2rec.embedder.backbones.families import neutralise, read_model_config
from vlm2rec.embedder.backbones.pooling import fuse
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ConfigError, MissingDependencyError, ModelError
from vlm2rec.embedder.encoders.frozen_images import (
    IMAGE,
    IMAGE_TYPES,
    ImageEncoder,
    PairEncoder,
    fill_in,
    image_settings,
    load_image_processor,
    pair_settings,
)
from vlm2rec.embedder.encoders.item_encoder import EncodedItems, Picture, to_numpy
from vlm2rec.embedder.options import DeviceName, DtypeName, EncoderKind, EncoderPooling, FusionNorm

# padding of titles: to the longest of the batch for CLIP. SigLIP attends to the padding, and was trained on titles
# padded to full length.
CLIP_PADDING: Mapping[str, Literal["longest", "max_length"]] = {
    "clip": "longest",
    "siglip": "max_length",
    "siglip2": "max_length",
}
DENSE_FILES = ("config.json", "model.safetensors")
_LONGEST_TITLE = 512  # tokens, if the tokenizer has no limit
_POSITIONS_FROM_TWO = ("RobertaModel", "XLMRobertaModel", "CamembertModel", "MPNetModel")  # 0 and 1 are for padding


# --- kinds --------------------------------------------------------------------------------------------------------
def resolve_kind(folder: Path, kind: EncoderKind) -> tuple[Literal["sentence", "clip", "image"], Path]:
    """Return the kind of encoder in a folder, and the folder of its transformers model.

    Raises:
        ModelError: it is not a model folder.
        ConfigError: `kind` does not fit the folder.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder", "a folder with config.json and weights", "check its path")
    inner = folder
    if (folder / "modules.json").is_file():  # sentence-transformers keeps CLIP in a sub-folder
        listed = listed_modules(folder)
        inner = listed[0][1] if listed else folder
    model_type = str(read_model_config(inner).get("model_type"))
    if kind == "image" or model_type in IMAGE_TYPES:
        if model_type in IMAGE_TYPES and kind in ("auto", "image"):
            return "image", inner
        expected = f"one of {', '.join(IMAGE_TYPES)}" if kind == "image" else "a text encoder, CLIP or SigLIP"
        raise ConfigError(f"an encoder folder of type {model_type!r} as {kind}", expected, "leave --encoder-kind out")
    if kind == "clip" and model_type not in CLIP_PADDING:
        raise ConfigError(
            f"--encoder-kind clip with a folder of type {model_type!r}",
            f"one of {', '.join(CLIP_PADDING)}",
            "leave --encoder-kind out, or choose another --encoder",
        )
    if kind == "clip" or (kind == "auto" and model_type in CLIP_PADDING):
        return "clip", inner
    if model_type in CLIP_PADDING:
        raise ConfigError(
            f"--encoder-kind sentence with a {model_type} folder", "a text encoder", "leave --encoder-kind out"
        )
    return "sentence", inner


def frozen_fingerprint(
    encoder: Path,
    encoder_kind: EncoderKind = "auto",
    *,
    pooling: EncoderPooling = "auto",
    fusion_norm: FusionNorm = "raw",
    image_encoder: Path | None = None,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
) -> dict[str, Any]:
    """Return what `load_frozen(...).fingerprint` will be, from config files alone.

    Raises:
        ModelError, ConfigError, MissingDependencyError: as `load_frozen`, as far as it can know without the weights.
    """
    if image_encoder is not None:
        _require_pair(encoder, encoder_kind, image_encoder)
        text = frozen_fingerprint(encoder, pooling=pooling, dtype=dtype, device=device)
        return pair_settings(text, frozen_fingerprint(image_encoder, dtype=dtype, device=device), fusion_norm)
    found, inner = resolve_kind(encoder, encoder_kind)
    config = read_model_config(inner)
    common = {
        "source": found,
        "model_type": config["model_type"],
        "dtype": str(_pick_dtype(dtype, pick_device(device))).removeprefix("torch."),
        schema.MADE_WITH: {"encoder": encoder.resolve().name},
    }
    if found != "sentence" and pooling != "auto":
        which = "a CLIP or SigLIP folder" if found == "clip" else "an image encoder"
        raise ConfigError(
            f"--pooling with {which}", "no --pooling: this model pools its tokens itself", "leave --pooling out"
        )
    if found == IMAGE:
        return common | image_settings(inner, config) | _hashes(inner)
    if found == "clip":
        return common | _clip_settings(inner, config, fusion_norm) | _hashes(inner)
    if importlib.util.find_spec("sentence_transformers") is None:
        raise _extra_missing()
    modules = read_sentence_modules(encoder, pooling)
    return common | {
        "dim": _sentence_dim(modules, config),
        "views": [schema.FUSED, schema.TEXT],
        "modules": list(modules.names),
        "pooling": list(modules.pooling),
        "dense": [model_files.files_hash(layer, [layer / name for name in DENSE_FILES]) for layer in modules.dense],
        "normalise": modules.normalise,
        "lower_case": modules.lower_case,
        "max_tokens": modules.max_tokens,
        "prompt": modules.prompt,
        **_hashes(inner),
    }


def _require_pair(encoder: Path, encoder_kind: EncoderKind, image_encoder: Path) -> None:
    """Raise `ConfigError` unless the two folders are a text encoder and an image encoder."""
    kinds = resolve_kind(encoder, encoder_kind)[0], resolve_kind(image_encoder, "auto")[0]
    if kinds != ("sentence", IMAGE):
        raise ConfigError(
            f"--image-encoder {image_encoder} ({kinds[1]}) beside --encoder {encoder} ({kinds[0]})",
            f"an image encoder ({', '.join(IMAGE_TYPES)}) beside a text encoder",
            "give two such folders, or one of them as --encoder",
        )


def _hashes(folder: Path) -> dict[str, str]:
    return {
        "encoder_hash": model_files.backbone_hash(folder),
        "processor_hash": model_files.processor_hash(folder),
    }


def _pick_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """Return the dtype of that name; `auto` is float32, in which these small models are published."""
    return pick_dtype("float32" if name == "auto" else name, device)


def _extra_missing() -> MissingDependencyError:
    return MissingDependencyError(
        "a text encoder as --encoder needs sentence-transformers, which is not installed",
        "sentence-transformers 6 or newer",
        "pip install 'vlm2rec[sentence]'",
    )


def _sentence_dim(modules: SentenceModules, config: Mapping[str, Any]) -> int:
    width = config.get("hidden_size") or config.get("dim") or config.get("d_model")
    if not isinstance(width, int) or config.get("is_encoder_decoder"):
        raise ModelError(
            f"{modules.transformer}/config.json is of type {config.get('model_type')!r}",
            "one stack of layers with a hidden_size, such as BERT",
            "choose another --encoder",
        )
    if not modules.dense:
        return width * len(modules.pooling)
    return int(read_json_file(modules.dense[-1] / "config.json")["out_features"])


def _clip_settings(inner: Path, config: Mapping[str, Any], fusion_norm: FusionNorm) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        full = AutoConfig.from_pretrained(inner, trust_remote_code=False)
    except model_files.UNLOADABLE as error:
        raise ModelError(
            f"{inner / 'config.json'} cannot be used ({model_files.first_line(error)})",
            "the config of a CLIP or SigLIP model",
            "download the folder again",
        ) from error
    vision = full.vision_config
    side = getattr(vision, "image_size", None) or 256  # SigLIP 2 in native resolution spends 256 patches of 16²
    dim = full.projection_dim if config["model_type"] == "clip" else _siglip_dim(full)
    return {
        "dim": int(dim),
        "views": list(schema.VIEWS),
        "fusion": "external",
        "fusion_norm": fusion_norm,
        "max_tokens": int(full.text_config.max_position_embeddings),
        "padding": CLIP_PADDING[config["model_type"]],
        # decoding may stop at twice the model's own size: see `images.open_image`
        "max_pixels": int(side) ** 2,
    }


def _siglip_dim(config: Any) -> int:
    return int(getattr(config.text_config, "projection_size", None) or config.text_config.hidden_size)


def load_frozen(
    encoder: Path,
    encoder_kind: EncoderKind = "auto",
    *,
    pooling: EncoderPooling = "auto",
    fusion_norm: FusionNorm = "raw",
    image_encoder: Path | None = None,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    token_budget: int = 4096,
) -> SentenceEncoder | ClipEncoder | ImageEncoder | PairEncoder:
    """Load a frozen encoder from a local folder, in evaluation mode.

    Args:
        encoder: sentence-transformers folder, or a transformers folder of a text encoder, CLIP, SigLIP, ResNet or
            EfficientNet.
        encoder_kind: the kind of encoder; `auto` finds out.
        pooling: for a text encoder; `auto` is what its modules say, else mean.
        fusion_norm: for CLIP, SigLIP and two encoders: how text and image vectors are fused.
        image_encoder: folder of an image encoder beside a text encoder: text and image are then vectors of their own.
        dtype: number format of the model; `auto` is float32.
        device: where to run.
        token_budget: padded tokens in one batch of titles.

    Raises:
        ModelError: files are missing or damaged, or a module is unknown.
        ConfigError: settings that do not fit the folder, or a device that is not available.
        MissingDependencyError: a text encoder without sentence-transformers.
    """
    settings = frozen_fingerprint(
        encoder,
        encoder_kind,
        pooling=pooling,
        fusion_norm=fusion_norm,
        image_encoder=image_encoder,
        dtype=dtype,
        device=device,
    )
    if image_encoder is not None:
        text = load_frozen(encoder, pooling=pooling, dtype=dtype, device=device, token_budget=token_budget)
        return PairEncoder(text, load_frozen(image_encoder, dtype=dtype, device=device), settings)
    target_device = pick_device(device)
    speed_up_float32(target_device)
    inner = resolve_kind(encoder, encoder_kind)[1]
    model = _load_model(inner, _pick_dtype(dtype, target_device), target_device)
    if settings["source"] == IMAGE:
        return ImageEncoder(model, settings)
    tokenizer = _load_tokenizer(inner)
    if settings["source"] == "clip":
        return ClipEncoder(model, tokenizer, settings, token_budget)
    return SentenceEncoder(model, tokenizer, read_sentence_modules(encoder, pooling), settings, token_budget)


def _load_tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except model_files.UNLOADABLE as error:
        raise _unloadable(folder, error) from error


def _unloadable(folder: Path, error: Exception) -> ModelError:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelError(
        f"the encoder {folder} cannot be loaded ({text})",
        "config.json, tokenizer.json and safetensors weights that fit one another",
        "download the folder again; pickled weights are never opened",
    )


def _attention() -> dict[str, str]:
    """Return the attention to load a model with: oneDNN is slow inside torch's own, whose products are small."""
    return {"attn_implementation": "eager"} if onednn_multiplies_float32() else {}


def _load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    model_files.checked_weights(folder)
    try:
        with quiet():
            model, info = AutoModel.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,  # the other format is a pickle
                output_loading_info=True,
                **_attention(),
            )
    except model_files.UNLOADABLE as error:
        raise _unloadable(folder, error) from error
    # the pooler on BERT's first token is not used, and many text encoders have none
    missing = sorted(
        name for name in info["missing_keys"] if "pooler" not in name or hasattr(model, "get_text_features")
    )
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} weights, among them {missing[0]}", "a complete model", "download it again"
        )
    return model.requires_grad_(False).eval().to(device)


# --- encoders -----------------------------------------------------------------------------------------------------
class _Titles:
    """Titles as token ids."""

    def __init__(self, tokenizer: Any, longest: int, prompt: str, lower_case: bool) -> None:
        self.tokenizer, self.longest = tokenizer, longest
        self.prompt, self.lower_case = prompt, lower_case
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token

    def tokenize(self, titles: Sequence[str]) -> tuple[list[list[int]], np.ndarray]:
        """Return each title's token ids, cut to the limit, and which titles were cut, (n,) bool."""
        # a very long title is cut by characters first: tokenising 100,000 of them only to drop them is wasted work
        texts = [" ".join(title.replace("\0", " ").split())[: 64 * self.longest] for title in titles]
        texts = [self.prompt + neutralise(self.tokenizer, text) for text in texts]
        texts = [text.lower() for text in texts] if self.lower_case else texts
        whole = self.tokenizer(texts, verbose=False)["input_ids"]
        cut = self.tokenizer(texts, truncation=True, max_length=self.longest)["input_ids"]
        cut = [ids or [self.tokenizer.pad_token_id] for ids in cut]  # an empty title still has a vector
        return cut, np.array([len(ids) > self.longest for ids in whole], bool)


def _longest(model: Any, tokenizer: Any, wanted: int | None) -> int:
    """Return how many tokens a text may have: the least of the folder's, the tokenizer's and the model's limits."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and type(model).__name__ in _POSITIONS_FROM_TWO:
        positions -= 2
    limits = [limit for limit in (wanted, tokenizer.model_max_length, positions) if limit and limit < 10**9]
    return int(min(limits)) if limits else _LONGEST_TITLE


class SentenceEncoder:
    """Encodes titles with a text encoder and its modules; the fused vector is the text vector, images are not read."""

    def __init__(
        self, model: Any, tokenizer: Any, modules: SentenceModules, settings: dict[str, Any], token_budget: int
    ) -> None:
        self.model, self.token_budget = model, token_budget
        self._fingerprint = settings
        longest = _longest(model, tokenizer, modules.max_tokens)
        self.titles = _Titles(tokenizer, longest, modules.prompt, modules.lower_case)
        self.head = _load_head(modules, model.config.hidden_size).requires_grad_(False).to(model.device)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides a vector, as JSON."""
        return self._fingerprint

    @torch.no_grad()
    def encode_items(self, titles: Sequence[str], images: Sequence[Picture]) -> EncodedItems:
        """Return the vectors of n titles; `images` are ignored, and the image vectors are NaN."""
        ids, truncated = self.titles.tokenize(titles)
        vectors = torch.empty(len(titles), self._fingerprint["dim"])
        for batch in batches_by_tokens([len(each) for each in ids], self.token_budget):
            vectors[batch] = self._encode([ids[row] for row in batch]).cpu()
        text = to_numpy(vectors)
        return EncodedItems(text, text, np.full_like(text, np.nan), truncated)

    def _encode(self, ids: Sequence[Sequence[int]]) -> Tensor:
        inputs = self.titles.tokenizer.pad({"input_ids": list(ids)}, return_tensors="pt").to(self.model.device)
        mask = inputs["attention_mask"]
        hidden = self.model(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state
        # always in float32: the package would round means and dense layers to bfloat16
        found: Tensor = self.head({"token_embeddings": hidden.float(), "attention_mask": mask})["sentence_embedding"]
        return found


class ClipEncoder:
    """Encodes titles and images with the two towers of CLIP or SigLIP, into their shared space."""

    def __init__(self, model: Any, tokenizer: Any, settings: dict[str, Any], token_budget: int) -> None:
        self.model, self.token_budget = model, token_budget
        self._fingerprint = settings
        self.titles = _Titles(tokenizer, settings["max_tokens"], prompt="", lower_case=False)
        self.image_processor = load_image_processor(model.config.name_or_path)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides a vector, as JSON."""
        return self._fingerprint

    @torch.no_grad()
    def encode_items(self, titles: Sequence[str], images: Sequence[Picture]) -> EncodedItems:
        """Return text, image and fused vectors of n items; without an image, fused is the text vector alone."""
        text, truncated = self._encode_titles(titles)
        image = fill_in(torch.full_like(text, torch.nan), images, self._encode_pictures)
        with_image = ~image.isnan().any(dim=1, keepdim=True)
        fused = torch.where(with_image, fuse(text, image, self._fingerprint["fusion_norm"]), text)
        return EncodedItems(to_numpy(fused), to_numpy(text), to_numpy(image), truncated)

    def _encode_titles(self, titles: Sequence[str]) -> tuple[Tensor, np.ndarray]:
        ids, truncated = self.titles.tokenize(titles)
        padding, longest = self._fingerprint["padding"], self._fingerprint["max_tokens"]
        sizes = [longest if padding == "max_length" else len(each) for each in ids]
        vectors = torch.empty(len(titles), self._fingerprint["dim"])
        for batch in batches_by_tokens(sizes, self.token_budget):
            # the tokenizer decides whether padding is masked: CLIP's says which tokens count, SigLIP's does not
            inputs = self.titles.tokenizer.pad(
                {"input_ids": [ids[row] for row in batch]}, padding=padding, max_length=longest, return_tensors="pt"
            ).to(self.model.device)
            names = [
                name for name in self.titles.tokenizer.model_input_names if name in ("input_ids", "attention_mask")
            ]
            output = self.model.get_text_features(**{name: inputs[name] for name in names}, return_dict=True)
            vectors[batch] = output.pooler_output.float().cpu()
        return vectors, truncated

    def _encode_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        inputs = self.image_processor(images=list(pictures), return_tensors="pt").to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        output = self.model.get_image_features(**inputs, return_dict=True)
        return output.pooler_output.float().cpu()


# --- sentence-transformers folders --------------------------------------------------------------------------------
# keys of a pooling file, and sentence-transformers' names; if several are set, they are concatenated in this order
_POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_POOLINGS = tuple(_POOLING_KEYS.values())
_ACTIVATIONS = ("Tanh", "Identity", "ReLU", "GELU", "Sigmoid", "SiLU")
_OF_THE_PACKAGE = "sentence_transformers."  # a class of any other package is foreign code


@dataclass(frozen=True)
class SentenceModules:
    """The modules of a text encoder's folder: how token states become a vector."""

    transformer: Path  # folder of the transformers model
    pooling: tuple[str, ...]  # of `_POOLINGS`
    dense: tuple[Path, ...] = ()  # folders
    normalise: bool = False
    lower_case: bool = False
    max_tokens: int | None = None  # None: as many as tokenizer and positions allow
    prompt: str = ""  # comes before every title
    names: tuple[str, ...] = ("Transformer", "Pooling")


def _load_head(modules: SentenceModules, width: int) -> nn.Module:
    """Return the modules that turn token states into a vector, as in sentence-transformers."""
    try:
        from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
    except ImportError:
        raise _extra_missing() from None
    try:
        dense = [Dense.load(str(layer), local_files_only=True) for layer in modules.dense]
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"the weights of a Dense module of {modules.transformer} cannot be loaded ({str(error).splitlines()[0]})",
            "config.json and model.safetensors that fit one another",
            "download the folder again",
        ) from None
    last = [Normalize()] if modules.normalise else []
    return nn.Sequential(Pooling(width, modules.pooling), *dense, *last)


def read_sentence_modules(folder: Path, pooling: EncoderPooling = "auto") -> SentenceModules:
    """Read the modules of a text encoder's folder; a folder without `modules.json` is pooled by the mean.

    Raises:
        ModelError: a module or pooling that vlm2rec does not support.
    """
    chosen = {"last": "lasttoken"}.get(pooling, pooling)
    if not (folder / "modules.json").is_file():
        return SentenceModules(folder, ("mean" if chosen == "auto" else chosen,))
    listed = listed_modules(folder)
    _require_known(folder, [kind for kind, _ in listed])
    names = [kind.rpartition(".")[2] for kind, _ in listed]
    modes: tuple[str, ...] = ("mean",)
    dense: list[Path] = []
    for name, (_, path) in zip(names, listed, strict=True):
        if name == "Pooling":
            modes = _pooling_modes(path)
        elif name == "Dense":
            _require_plain_dense(path)
            dense.append(path)
    transformer = listed[0][1]
    own = read_json_file(transformer / "sentence_bert_config.json", missing={})
    return SentenceModules(
        transformer=transformer,
        pooling=modes if chosen == "auto" else (chosen,),
        dense=tuple(dense),
        normalise="Normalize" in names,
        lower_case=bool(own.get("do_lower_case", False)),
        max_tokens=own.get("max_seq_length"),
        prompt=_default_prompt(folder),
        names=tuple(names),
    )


def listed_modules(folder: Path) -> list[tuple[str, Path]]:
    """Return class and folder of each module in `modules.json`, in order."""
    file = folder / "modules.json"
    listed = read_json_file(file)
    if not isinstance(listed, list) or not all(isinstance(m, dict) and {"type", "path"} <= set(m) for m in listed):
        raise ModelError(f"{file} lists no modules", "modules with type and path", "download the folder again")
    return [(str(module["type"]), folder / str(module["path"])) for module in listed]


def _require_known(folder: Path, kinds: Sequence[str]) -> None:
    names = [kind.rpartition(".")[2] if kind.startswith(_OF_THE_PACKAGE) else kind for kind in kinds]
    unknown = [name for name in names if name not in ("Transformer", "Pooling", "Dense", "Normalize")]
    late = "Normalize" in names and names[-1] != "Normalize"
    if unknown or not names or names[0] != "Transformer" or late:
        raise ModelError(
            f"the modules of {folder} are {', '.join(names) or 'none'}",
            "sentence-transformers' own Transformer, Pooling, any number of Dense, and Normalize last if at all",
            "encode the items with sentence-transformers itself, and import the vectors with `vlm2rec import-vectors`",
        )


def _pooling_modes(path: Path) -> tuple[str, ...]:
    config = read_json_file(path / "config.json")
    if not config.get("include_prompt", True):
        raise ModelError(
            f"{path} leaves the prompt out of the pooling", "include_prompt: true", "choose another encoder"
        )
    if named := config.get("pooling_mode"):
        modes = [named] if isinstance(named, str) else [str(mode) for mode in named]
    else:
        modes = [mode for key, mode in _POOLING_KEYS.items() if config.get(key)]
    if not modes or any(mode not in _POOLINGS for mode in modes):
        raise ModelError(
            f"{path} pools by {', '.join(modes) or 'nothing'}", f"{', '.join(_POOLINGS)}", "choose --pooling"
        )
    return tuple(modes)


def _require_plain_dense(path: Path) -> None:
    """Refuse a Dense module whose weights are a pickle, or whose activation is not a plain one of torch."""
    config = read_json_file(path / "config.json")
    named = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    if not named.startswith("torch.nn.") or named.rpartition(".")[2] not in _ACTIVATIONS:
        raise ModelError(
            f"{path} has the activation {named}", f"torch's {', '.join(_ACTIVATIONS)}", "choose another encoder"
        )
    if not (path / "model.safetensors").is_file():
        raise ModelError(
            f"{path} has no model.safetensors",
            "model.safetensors of a Dense module; pickled weights are never opened",
            "download the folder again, or convert its weights to safetensors",
        )


def _default_prompt(folder: Path) -> str:
    config = read_json_file(folder / "config_sentence_transformers.json", missing={})
    name = config.get("default_prompt_name")
    return str(config.get("prompts", {}).get(name, "")) if name else ""


def read_json_file(path: Path, missing: Any = None) -> Any:
    """Return a JSON file's content, or `missing` if that is given and there is no file.

    Raises:
        ModelError: the file cannot be read.
    """
    if missing is not None and not path.is_file():
        return missing
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error})", "JSON of a model folder", "download it again") from None
