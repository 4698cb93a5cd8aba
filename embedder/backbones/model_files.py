"""The files of a model: where they lie, whether they may be opened, and hashes of all that decides a vector.

A hub id is resolved once, to the folder of a commit in the hub's cache; everything is then read from that folder, so
that a branch that moves meanwhile cannot mix two models. Folders come from strangers. Weights are safetensors in the
folder itself. An adapter beside them is refused, because transformers would apply it silently. A config whose sizes
exceed its weights is refused before anything of that size is allocated.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from vlm2rec.embedder.contract import hash_cache
from vlm2rec.embedder.contract.errors import ModelError

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG = "config.json"
KIND = "sha256:"  # begins every hash over whole files; hashes of earlier versions have no such beginning
# of tokenizer, image processor and chat template; a pattern has no slash, and `*` does not match one
_PROCESSOR = (
    *("preprocessor_config.json", "processor_config.json", "chat_template.*", "additional_chat_templates/*.jinja"),
    *("tokenizer*.json", "tokenizer.model", "*.spm", "spiece.model", "sentencepiece*.model", "*.tiktoken"),
    *("vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
)
_HUB_FILES = (WEIGHTS, WEIGHTS_INDEX, "model-*.safetensors", CONFIG, "README.md", *_PROCESSOR)
_READERS = 4
# what transformers raises for files that do not fit one another
UNLOADABLE = (
    *(OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, AttributeError, RecursionError),
    *(SafetensorError, StrictDataclassError),
)
_LARGEST_TEXT = 2**26  # bytes of a JSON file that is parsed here
_AGAIN = "download the model folder again"
MODEL_FOLDER = (
    "a model folder with config.json, weights, tokenizer.json and preprocessor_config.json or processor_config.json"
)


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's files lie. Use `locate`."""

    source: str  # hub id or folder, as it was given
    folder: Path
    commit: str | None = None  # of a hub model

    @property
    def described(self) -> dict[str, str]:
        """Name and commit: where the files came from, which decides no vector."""
        name = self.source if self.commit else self.folder.resolve().name
        return {"backbone": name} | ({"commit": self.commit} if self.commit else {})


Source = str | Path | ModelFiles
"""A hub id, a local folder, or what `locate` returned."""


def locate(source: Source, revision: str | None = None) -> ModelFiles:
    """Return the folder of a model; a hub model is downloaded if it is not in the hub's cache.

    Args:
        source: hub id or local folder, or what this function returned.
        revision: of a hub model: branch, tag or commit.

    Raises:
        ModelError: no such folder, or no such model on the hub.
    """
    if isinstance(source, ModelFiles):
        return source
    folder = Path(source).expanduser()
    if folder.is_dir():
        return ModelFiles(str(source), folder)
    require_hub_id(str(source))
    snapshot = _snapshot(str(source), revision)
    return ModelFiles(str(source), snapshot, snapshot.name)


def require_hub_id(source: str) -> None:
    """Raise `ModelError` if what is not a folder cannot be a hub id either."""
    if Path(source).expanduser().exists():
        raise ModelError(f"{source} is a file", MODEL_FOLDER, "give the folder that holds it")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        raise ModelError(
            f"the model folder {source} does not exist",
            f"{MODEL_FOLDER}, or a hub id like Qwen/Qwen2.5-VL-3B-Instruct",
            "check the path",
        )


def _snapshot(source: str, revision: str | None) -> Path:
    """Return the folder of a hub model's commit in the hub's cache."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(source, revision=revision, allow_patterns=list(_HUB_FILES), ignore_patterns="*/*")
    except (OSError, ValueError) as error:
        raise no_hub_model(source, revision, error) from error
    return Path(found)


def no_hub_model(source: str, revision: str | None, error: Exception) -> ModelError:
    """Return the error for a hub model that cannot be had."""
    return ModelError(
        f"{source!r} is not a folder, and no model of that name can be downloaded from the Hugging Face hub"
        f" ({first_line(error)})",
        "a local model folder, or a hub id that this machine can reach or has in its cache",
        f"check the spelling{' and the revision' if revision else ''}; without a network, run"
        f" `hf download {source}` on a machine that has one, and give the folder; for a gated model, log in first",
    )


def first_line(error: Exception) -> str:
    """Return the class of an error and the first line of its text."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


# --- may these files be opened? -----------------------------------------------------------------------------------
def checked_weights(folder: Path) -> list[Path]:
    """Return the weight files of a model folder, once nothing speaks against opening them.

    Raises:
        ModelError: no safetensors, an adapter beside them, damaged weights, or a config that is not theirs.
    """
    _refuse_adapter(folder)
    weights = weight_files(folder)
    _require_plausible(folder, weights)
    return weights


def _refuse_adapter(folder: Path) -> None:
    """Refuse an adapter inside a model folder: transformers would apply it without a word."""
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).exists():
            raise ModelError(
                f"{folder} holds {name} beside the model: an adapter that would change every vector unnoticed",
                "a model folder without an adapter",
                "move the adapter's files to a folder of their own; to use a PEFT adapter, merge it into the model"
                " (merge_and_unload) and give the merged folder",
            )


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers loads from a folder, sorted.

    Raises:
        ModelError: there are no safetensors, or the index names anything but safetensors of this folder.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / WEIGHTS_INDEX
    if not index.is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        raise ModelError(
            f"{folder} has no {WEIGHTS}" + (f"; {pickles[0]} is a pickle, which is never opened" if pickles else ""),
            "weights in safetensors",
            "convert the weights to safetensors, or download the model folder again",
        )
    named = read_json(index).get("weight_map")
    names = sorted({str(name) for name in named.values()}) if isinstance(named, dict) else []
    for name in names or ["nothing"]:
        if not names or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise ModelError(
                f"{index} names {name!r} as a file of weights", "safetensors files of the same folder", _AGAIN
            )
        if not (folder / name).is_file():
            raise ModelError(f"{folder} has no {name}, which {WEIGHTS_INDEX} names", "all files of the weights", _AGAIN)
    return [folder / name for name in names]


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a safetensors file, from its header alone.

    Raises:
        ModelError: the file is damaged or cut short.
    """
    try:
        with safe_open(path, "np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise ModelError(f"{path} is damaged ({first_line(error)})", "a whole safetensors file", _AGAIN) from None


def _require_plausible(folder: Path, weights: Iterable[Path]) -> None:
    """Refuse a config that no model with these weights can have, before a model of that size is made."""
    config = read_json(folder / CONFIG)
    if config.get("transformers_weights") not in (None, WEIGHTS):
        raise ModelError(
            f"{folder / CONFIG} names {config['transformers_weights']!r} as its weights", f"{WEIGHTS}, or none", _AGAIN
        )
    found = [shape for path in weights for shape in shapes(path).values()]
    longest = max((length for shape in found for length in shape), default=0)
    for key, value in _numbers(config):
        if (key in _LAYERS and value > len(found)) or (key in _LENGTHS and value > 4 * longest):
            raise ModelError(
                f"{folder / CONFIG} says {key} = {value}, but there are {len(found)} weights, up to {longest} long",
                "a config and weights of the same model",
                _AGAIN,
            )


_LAYERS = ("num_hidden_layers", "depth", "n_layers", "num_layers")  # each layer has a weight
_LENGTHS = (  # of weights, or numbers of heads, which are less
    *("vocab_size", "hidden_size", "intermediate_size", "embed_dim", "d_model"),
    *("num_attention_heads", "num_key_value_heads", "n_heads"),
)


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    waiting: list[Any] = [config]
    while waiting:
        for key, value in waiting.pop().items():
            if isinstance(value, dict):
                waiting.append(value)
            elif isinstance(value, int) and not isinstance(value, bool):
                yield key, value


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model folder.

    Raises:
        ModelError: the file cannot be read, is far too large, or holds something else.
    """
    try:
        if path.stat().st_size > _LARGEST_TEXT:
            raise ValueError(f"{path.stat().st_size} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not readable JSON ({first_line(error)})", MODEL_FOLDER, _AGAIN) from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}", MODEL_FOLDER, _AGAIN)
    return value


# --- hashes -------------------------------------------------------------------------------------------------------
def backbone_hash(source: Source, revision: str | None = None) -> str:
    """Return a hash over all bytes of a model's weights and its config.json; the folder's name is not in it.

    Raises:
        ModelError: as `locate` and `checked_weights`.
    """
    folder = locate(source, revision).folder
    weights = checked_weights(folder)
    index = [] if weights[0].name == WEIGHTS else [folder / WEIGHTS_INDEX]
    return files_hash(folder, [folder / CONFIG, *index, *weights])


def processor_hash(source: Source, revision: str | None = None) -> str:
    """Return a hash over all bytes of a model's tokenizer, image processor and chat template files.

    Raises:
        ModelError: as `locate`.
    """
    folder = locate(source, revision).folder
    found = {path for pattern in _PROCESSOR for path in folder.glob(pattern) if path.is_file()}
    return files_hash(folder, found)


def files_hash(folder: Path, files: Iterable[Path]) -> str:
    """Return a hash over the names below `folder` and all bytes of some files, in any order.

    Raises:
        ModelError: a file cannot be read.
    """
    ordered = sorted(files)
    try:
        with ThreadPoolExecutor(_READERS) as readers:
            hashes = list(readers.map(hash_cache.sha256, ordered))
    except OSError as error:
        raise ModelError(
            f"{error.filename or folder} cannot be read ({error.strerror or error})", "readable model files", _AGAIN
        ) from None
    listed = [[path.relative_to(folder).as_posix(), found] for path, found in zip(ordered, hashes, strict=True)]
    return KIND + hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def is_older_kind(value: Any) -> bool:
    """Tell whether a recorded hash is one of an earlier version, which did not cover whole files."""
    return isinstance(value, str) and not value.startswith(KIND)


def older_backbone_hash(source: str | Path, revision: str | None = None) -> str:
    """Return the hash that earlier versions recorded, to recognise what they wrote.

    It covers the first and last megabyte of each file of weights, or only the name of a hub model.
    """
    folder = Path(source)
    digest = hashlib.sha256()
    if not folder.is_dir():
        digest.update(f"{source}@{revision or 'main'}".encode())
        return digest.hexdigest()
    for path in [*sorted(folder.glob("*.safetensors")), folder / CONFIG]:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read(2**20))
    return digest.hexdigest()


def hash_like(recorded: Any, source: Source, revision: str | None = None) -> str:
    """Return the hash of a backbone, of the kind of one that was recorded, to compare the two.

    Raises:
        ModelError: as `backbone_hash`.
    """
    found = backbone_hash(source, revision)
    if not is_older_kind(recorded):
        return found
    return older_backbone_hash(source.source if isinstance(source, ModelFiles) else source, revision)
