"""What `vlm2rec search` looks for, as a vector: an item, words, an image, or a history.

The encoder of the export encodes words and images as it encodes an item's text and image. The manifest says where the
encoder was and which settings it had, and the index repeats it. An encoder found elsewhere has to be the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm2rec.downstream.index.index import ItemIndex, Neighbour
from vlm2rec.downstream.table import read_in_order
from vlm2rec.embedder.contract import precision, schema
from vlm2rec.embedder.contract.dataset import Dataset, dataset_of_export
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, DataError, ModelError
from vlm2rec.pipelines.config import ExportConfig, SearchConfig
from vlm2rec.pipelines.read_config import read_config
from vlm2rec.pipelines.same_encoder import is_folder, require_same_encoder

if TYPE_CHECKING:
    from vlm2rec.embedder.export.worker import Encoder

_ENCODES = ("backbone", "adapter", "revision", "encoder")  # settings of a search that say where the encoder is now


def found_by(index: ItemIndex, config: SearchConfig) -> list[Neighbour]:
    """Return the items nearest to what a search asks for, nearest first.

    Raises:
        ConfigError: the search asks for nothing, for several things, or for what these vectors do not hold.
        DataError: an unknown item, or a picture that cannot be used.
        ModelError: the encoder is not where it was.
        ArtifactError: the encoder is another one, or the embeddings folder is needed and not there.
    """
    _require_one(config)
    against = config.against or index.meta["column"]
    if config.item is not None and against == index.meta["column"]:
        return index.neighbours(config.item, config.k)
    about = about_export(index)
    if against not in schema.columns_of(about):
        raise ConfigError(
            f"--against {against}, but the export has no {against} vectors",
            f"one of {', '.join(name for name in schema.columns_of(about) if name in schema.VIEWS)}",
            "change --against",
        )
    without: tuple[str, ...] = ()
    if config.item is not None:
        without = (config.item,)
        vector = _vectors_of(index, against, without)[0]
    elif config.history:
        without = tuple(item.strip() for item in config.history)
        vector = _of_history(index, about, against, without, config)
    else:
        vector = encoded(about, config, index.folder)
    if len(vector) != schema.dim_of(about, against):
        raise ConfigError(
            f"the query has {len(vector)} dimensions, and the {against} vectors have"
            f" {schema.dim_of(about, against)}: they are text and image concatenated",
            "--against text or image",
            "change --against",
        )
    if against == index.meta["column"]:
        return index.nearest(vector, config.k, without)
    return index.nearest_exact(against, vector, config.k, without)


def described(config: SearchConfig) -> str:
    """Return in words what a search asks for."""
    if config.item is not None:
        return config.item
    if config.history:
        return f"the history {', '.join(config.history)}"
    asked = ([repr(config.text)] if config.text is not None else []) + ([config.image.name] if config.image else [])
    return " and ".join(asked)


def described_with_titles(index: ItemIndex, config: SearchConfig) -> str:
    """Return in words what a search asks for, each item with its title, if the index has one."""

    def told(item_id: str) -> str:
        title = str(index.ids[schema.TITLE][index.row_of(item_id)].as_py() or "")
        return f"{item_id}, {title}" if title else item_id

    if config.item is not None:
        return told(config.item)
    if config.history:
        return f"the history {'; '.join(told(item.strip()) for item in config.history)}"
    return described(config)


def _require_one(config: SearchConfig) -> None:
    kinds = {
        "--item": config.item is not None,
        "--history": bool(config.history),
        "--text or --image": config.text is not None or config.image is not None,
    }
    given = [name for name, is_given in kinds.items() if is_given]
    expected = "one of --item, --history, and --text or --image (or both of these)"
    if len(given) != 1:
        raise ConfigError(
            "nothing to search for" if not given else " with ".join(given), expected, "give exactly one of these"
        )
    if config.text is not None and not config.text.strip():
        raise ConfigError("--text without a word", "words to search for", "give the words after --text")


def about_export(index: ItemIndex) -> Mapping[str, Any]:
    """Return what the manifest of the indexed export says of its vectors and its encoder."""
    if "export" in index.meta:
        found: Mapping[str, Any] = index.meta["export"]
        return found
    if index.embeddings is None or index.stale() is not None:  # an index of an earlier version
        raise ArtifactError(
            f"{index.folder} does not say how its vectors were made, and {index.stale()}",
            "the embeddings folder it was built from",
            "give it with --embeddings, or run `vlm2rec build-index` again",
        )
    return schema.read_manifest(index.embeddings)


def _vectors_of(index: ItemIndex, column: str, item_ids: tuple[str, ...]) -> np.ndarray:
    """Return the vectors of some items as exported, (n, d) float32, from the embeddings folder."""
    for item_id in item_ids:
        index.row_of(item_id)  # raises an error that names similar ids
    if index.embeddings is None or index.stale() is not None:
        raise ArtifactError(
            f"the items' {column} vectors are in the embeddings folder, and {index.stale()}",
            "the embeddings folder that the index was built from",
            "give it with --embeddings",
        )
    ids = list(dict.fromkeys(item_ids))
    vectors = np.zeros((len(ids), schema.dim_of(schema.read_manifest(index.embeddings), column)), np.float32)
    found = read_in_order(index.embeddings, column, ids, vectors)
    if not found.all():
        lacking = ", ".join(repr(ids[row]) for row in np.flatnonzero(~found)[:3])
        raise DataError(f"{lacking} has no {column} vector", "an item with one", "choose another item or --against")
    return vectors[[ids.index(item_id) for item_id in item_ids]]


# --- histories --------------------------------------------------------------------------------------------------
def _of_history(
    index: ItemIndex, about: Mapping[str, Any], against: str, history: tuple[str, ...], config: SearchConfig
) -> np.ndarray:
    """Return the vector of a history: the encoder's own with --backbone, else the mean of the items' vectors."""
    for item_id in history:
        index.row_of(item_id)
    if config.backbone is None:
        return np.asarray(_vectors_of(index, against, history).mean(axis=0), np.float32)
    from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
    from vlm2rec.embedder.encoders.item_features import ItemFeatures, encode_rows

    encoder = load_encoder(about, config, index.folder)
    if not isinstance(encoder, ItemEncoder) or "source" in about["settings"] or not encoder.settings.reads_histories:
        raise ConfigError(
            "--history with --backbone, and an encoder that has no prompt for histories",
            "the mean of the items' vectors",
            "leave --backbone out",
        )
    dataset = dataset_for(index, config)
    latest = history[-dataset.max_history :]
    vectors = encode_rows(encoder, ItemFeatures(dataset, encoder), [dataset.rows_of(list(latest)).tolist()])
    return _as_stored(vectors[against], about)


def dataset_for(index: ItemIndex, config: SearchConfig) -> Dataset:
    """Return the dataset of the indexed export, from --data or the place that its manifest names.

    Raises:
        ArtifactError: it is not there.
    """
    if config.data is not None:
        return Dataset(config.data, config.images)
    reason = str(index.stale() or "")
    if index.embeddings is not None and not reason:
        found, reason = dataset_of_export(index.embeddings, schema.read_manifest(index.embeddings))
        if found is not None:
            return Dataset(found.path, config.images)
    raise ArtifactError(f"{index.folder}: {reason}", "the dataset folder of its items", "give it with --data")


# --- words and pictures -------------------------------------------------------------------------------------------
def encoded(about: Mapping[str, Any], config: SearchConfig, where: object) -> np.ndarray:
    """Return the vector of --text, --image or both, (d,) float32, as an item of these has it.

    Args:
        about: the views, settings and encoder of an export, from its manifest.
        config: the settings of the search.
        where: the folder that these come from, for messages.
    """
    from vlm2rec.embedder.encoders.item_text import text_of_words

    asked = [schema.TEXT] * (config.text is not None) + [schema.IMAGE] * (config.image is not None)
    made_of = schema.modalities_of(about["views"])
    view = asked[0] if len(asked) == 1 else schema.FUSED
    if view not in about["views"] or not {*asked} <= {*made_of}:
        one_prompt = {*schema.MODALITIES} <= {*made_of}
        raise ConfigError(
            f"{' with '.join('--' + name for name in asked)}, but the export's vectors are made of"
            f" {'text and image in one prompt' if one_prompt else made_of[0] + ' alone'}",
            "--text and --image together" if one_prompt else f"--{made_of[0]} alone",
            "change what is searched for",
        )
    encoder = load_encoder(about, config, where)
    picture = None if config.image is None else _picture(encoder, config.image, about["settings"])
    words = "" if config.text is None else text_of_words(config.text, about["settings"])
    vector = getattr(encoder.encode_items([words], [picture]), view)
    if not np.isfinite(vector).all():
        raise DataError(
            f"the encoder has no finite {view} vector of this query",
            "words or an image that it can encode",
            "change the words or the image",
        )
    return _as_stored(vector, about)


def _as_stored(vectors: np.ndarray, about: Mapping[str, Any]) -> np.ndarray:
    """Return the first of some vectors in the length that the export stores."""
    if schema.FULL_DIM in about["settings"]:
        vectors = precision.shortened(vectors, int(about["dim"]))
    return np.asarray(vectors[0], np.float32)


def _picture(encoder: Encoder, path: Path, settings: Mapping[str, Any]) -> Any:
    """Open a picture as an export opens an item's.

    Raises:
        DataError: it cannot be used.
    """
    from vlm2rec.embedder.backbones.images import ImageError, open_image
    from vlm2rec.embedder.encoders.item_encoder import ItemEncoder

    whole = path.expanduser().resolve()
    try:
        if isinstance(encoder, ItemEncoder):
            return encoder.open_image(whole.parent, whole.name)
        return open_image(whole.parent, whole.name, settings["max_pixels"])
    except ImageError as error:
        raise DataError(f"--image {path}: {error}", "an image that can be read", "give another file") from None


def load_encoder(about: Mapping[str, Any], config: SearchConfig, where: object) -> Encoder:
    """Load the encoder of an export, from where it was or from where the search says it is now.

    No name that only a manifest holds is looked up on the network: a hub model has to be in the cache.

    Raises:
        ConfigError: nothing says where the encoder is.
        ModelError: it is not there.
        ArtifactError: it is another one than that of the export.
    """
    from vlm2rec.embedder.export.short import full_settings
    from vlm2rec.pipelines.export_items import source_of

    settings = full_settings(about["settings"])
    given = {**_recorded(about, config, where), **_now(config)}
    if config.backbone is None and "backbone" in given:
        given["revision"] = _require_here(given, about)
    for name in ("adapter", "encoder"):
        if name in given and not is_folder(given[name]):
            raise _moved(name, given[name])
    known = {name: value for name, value in given.items() if value is not None}
    export = read_config(
        ExportConfig,
        flags={**known, "data": ".", "out": ".", "dtype": settings.get("dtype", "auto"), "device": config.device},
    )
    source = source_of(export)
    arguments = source.given(export)
    model = export.backbone or export.encoder
    require_same_encoder(source.fingerprint(**arguments), settings, where, model, export.revision)
    return source.load(**arguments)


def _now(config: SearchConfig) -> dict[str, Any]:
    return {name: value for name in _ENCODES if (value := getattr(config, name)) is not None}


def _recorded(about: Mapping[str, Any], config: SearchConfig, where: object) -> dict[str, Any]:
    """Return the settings that load the encoder of an export."""
    from dataclasses import asdict, fields

    from vlm2rec.embedder.adapters.lora import is_foreign
    from vlm2rec.embedder.encoders.settings import EncoderSettings

    if recorded := about.get(schema.ENCODER):
        known = {field.name for field in fields(ExportConfig)}
        return {name: value for name, value in recorded.items() if name in known}
    settings = about["settings"]
    if "source" in settings or "backbone_hash" not in settings:
        raise ArtifactError(
            f"{where} does not say how its vectors were made ({settings.get('source', 'by hand')}), so no words"
            " or images can be encoded in the same way",
            "an export of this version, with an encoder that it can load again",
            "run export-items again into a new --out, and search with --item or --history until then",
        )
    if config.backbone is None:
        raise ConfigError(
            f"{where} was written by an earlier vlm2rec, which did not record where the encoder was",
            "the backbone of the export, and its adapter if it had one",
            "give --backbone and --adapter",
        )
    own = config.adapter is not None and not is_foreign(config.adapter)
    return {} if own else asdict(EncoderSettings.of_export(settings))


def _require_here(given: Mapping[str, Any], about: Mapping[str, Any]) -> str | None:
    """Return the revision to load of a backbone that a manifest names, which has to be on this machine."""
    from huggingface_hub import try_to_load_from_cache

    name, commit = str(given["backbone"]), (about.get(schema.MADE_WITH) or {}).get("commit")
    if is_folder(name):
        return given.get("revision")
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=commit)
    except ValueError:  # no name of a hub model
        cached = None
    if not isinstance(cached, str):
        raise _moved("backbone", name)
    return commit or given.get("revision")


def _moved(name: str, place: object) -> ModelError:
    return ModelError(
        f"the {name} of the export, {place}, is no longer on this machine",
        f"the {name} that the items were encoded with",
        f"give --{name} with its new place",
    )
