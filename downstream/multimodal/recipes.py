"""The multimodal recommenders, each a row: what it is, which views it takes, and its settings. No torch in here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError
from vlm2rec.embedder.contract.storage import Location

if TYPE_CHECKING:
    from vlm2rec.downstream.multimodal.model import Model


@dataclass(frozen=True)
class Recipe:
    """One model.

    Args:
        load: imports the model's class, and torch with it.
        views: how many views it needs: `any`, `one` (text and image unless one is chosen), or `both`.
        own: the settings that not every model reads, and this one does.
        defaults: settings whose default is not that of the sequential models.
    """

    load: Callable[[], type[Model]]
    views: Literal["any", "one", "both"]
    own: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _vbpr() -> type[Model]:
    from vlm2rec.downstream.multimodal.vbpr import VBPR

    return VBPR


def _freedom() -> type[Model]:
    from vlm2rec.downstream.multimodal.freedom import FREEDOM

    return FREEDOM


def _lattice() -> type[Model]:
    from vlm2rec.downstream.multimodal.lattice import LATTICE

    return LATTICE


def _slmrec() -> type[Model]:
    from vlm2rec.downstream.multimodal.slmrec import SLMRec

    return SLMRec


# as MMRec has them for all of its models
_COMMON = {"hidden_size": 64, "max_epochs": 1000, "batch_size": 2048, "weight_decay": 0.0}
MODELS: Mapping[str, Recipe] = {
    "VBPR": Recipe(_vbpr, "any", ("regularisation",), {**_COMMON, "regularisation": 0.01}),
    "FREEDOM": Recipe(
        _freedom,
        "one",
        ("graph_layers", "neighbours", "image_weight", "pruning", "regularisation"),
        _COMMON,
    ),
    "LATTICE": Recipe(
        _lattice,
        "one",
        ("graph_layers", "neighbours", "regularisation"),
        _COMMON,
    ),
    "SLMRec": Recipe(
        _slmrec,
        "both",
        ("graph_layers", "ssl_weight", "temperature", "ssl_temperature"),
        {**_COMMON, "graph_layers": 3, "weight_decay": 1e-4},
    ),
}
OWN = frozenset(name for recipe in MODELS.values() for name in recipe.own)
"""Settings that only some of these models read."""


SEQUENTIAL_ONLY = (
    *("column", "adapter", "pca", "config", "dropout", "fuse", "id_dropout", "positions"),
    *("softmax", "samples", "matmul_precision"),
    *("align_with", "align_weight", "align_tau"),
)
"""Settings of `train-recommender` that the sequential models alone read."""
VECTORS_ONLY = (
    *("column", "mode", "missing", "adapter", "pca", "fuse", "id_dropout"),
    *("align_with", "align_weight", "align_tau"),
)
"""Settings that a training from item ids, without vectors, does not read."""


def is_read(model: Any, setting: str) -> bool:
    """Tell whether a recommender reads a setting of `train-recommender`."""
    if setting in SEQUENTIAL_ONLY:
        return model not in MODELS
    if setting in ("features", "normalize"):
        return model in MODELS
    return setting not in OWN or setting in (MODELS[model].own if model in MODELS else ())


def defaults_of(model: Any) -> Mapping[str, Any]:
    """Return the defaults of a model's own recipe; none for another model."""
    return MODELS[model].defaults if model in MODELS else {}


def choose_features(model: str, wanted: Sequence[str], embeddings: Location) -> tuple[str, ...]:
    """Return the views of an embeddings folder that a model takes.

    Without a choice these are text and image. VBPR, which has no graph of each view, takes what there is: both, else
    one of them, else the fused vectors.

    Args:
        model: a name of `MODELS`.
        wanted: the chosen views: text and image, or one alone; empty for no choice.
        embeddings: a finished embeddings folder.

    Raises:
        ConfigError: the choice does not fit the model.
        ArtifactError: the folder lacks a view that the model needs.
    """
    from vlm2rec.embedder.contract import schema  # with it comes pyarrow, which `--help` does without

    held = [view for view in schema.VIEWS if view in schema.read_manifest(embeddings)["views"]]
    recipe, both = MODELS[model], schema.MODALITIES
    if wanted and ((set(wanted) != set(both) and len(wanted) != 1) or not set(wanted) <= {*schema.VIEWS}):
        raise ConfigError(
            f"--features {','.join(wanted)}",
            f"{','.join(both)}, or one of {', '.join(schema.VIEWS)}",
            "change --features",
        )
    if len(wanted) == 1 and recipe.views == "both":
        raise ConfigError(
            f"--features {wanted[0]} with {model}", f"text and image: {model} aligns the two", "leave out --features"
        )
    if not wanted and recipe.views == "any":
        return tuple(view for view in both if view in held) or tuple(held[:1])
    chosen = tuple(view for view in (*both, schema.FUSED) if view in wanted) or both
    lacking = [view for view in chosen if view not in held]
    if lacking:
        other = "train VBPR, which needs one only"
        if recipe.views == "one":
            one = next((view for view in both if view in held), schema.FUSED)
            other = f"train on what there is with --features {one}"
        raise ArtifactError(
            f"{embeddings} has no {' and no '.join(lacking)} vectors: its views are {', '.join(held)}",
            f"{' and '.join(chosen)} vectors, which {model} takes",
            f"export the other view as well, or {other}",
        )
    return chosen
