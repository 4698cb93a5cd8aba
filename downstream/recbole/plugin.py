"""The flag in a RecBole YAML: start SASRec, GRU4Rec or BERT4Rec from an embeddings folder.

    item_embedding_init: path/to/embeddings   # the flag; without it RecBole does not change
    item_embedding_column: fused              # fused | text | image | concat (text and image end to end)
    item_embedding_mode: adapter              # adapter | table | fuse | init: how the vectors enter
    item_embedding_missing: error             # error | mean | random: items without a vector
    item_embedding_adapter: linear            # linear | two-linear | mlp: the layers between vector and recommender
    item_embedding_pca: 256                   # the vectors' first principal components; left out: all of the vectors
    item_embedding_align_with: path/to/run    # add LLMEmb's alignment (RAT) with the item table of a run from item ids
    item_embedding_align_weight: 0.01         # weight of that loss
    item_embedding_align_tau: 2               # its temperature

- `adapter`: the vectors stay as they are, behind a trained adapter.
- `table`: the item table starts as a random projection of the vectors (an untrained adapter) and is then trained row by
  row, as RecBole trains its own; such a checkpoint loads in RecBole without vlm2rec.
- `fuse`: a trained row for every id, added to the adapted vector; `item_embedding_fuse: sum | gate`, and
  `item_embedding_id_dropout: 0.1`, the share of the id rows that training leaves out. An item without interactions in
  training has no id row, and is ranked by its vector.
- `init`: the vectors are the start of a trained table of their own width, behind the adapter.

`item_embedding_trainable: true`, of earlier versions, is `item_embedding_mode: table`.

`vlm2rec train-recommender --config that.yaml` reads these lines. A script that runs RecBole itself calls `install()`
first. A relative folder is relative to the working directory, like RecBole's own `data_path`.

Row i holds the vector of RecBole's item i. Row 0, RecBole's padding, is zero. BERT4Rec's last row is its
mask token: no item, so it keeps RecBole's random start and is trained in either mode.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from vlm2rec.downstream.options import Adapter, Fuse, StartMode
from vlm2rec.downstream.principal_components import principal_components
from vlm2rec.downstream.recbole.alignment import Alignment, align
from vlm2rec.downstream.recbole.item_embedding import ADAPTERS, FusedEmbedding, ItemEmbedding, standardise
from vlm2rec.downstream.table import read_items
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, did_you_mean
from vlm2rec.embedder.contract.storage import Location, location

INIT = "item_embedding_init"
COLUMN = "item_embedding_column"
MODE = "item_embedding_mode"
TRAINABLE = "item_embedding_trainable"
FUSE = "item_embedding_fuse"
ID_DROPOUT = "item_embedding_id_dropout"
MISSING = "item_embedding_missing"
ADAPTER = "item_embedding_adapter"
PCA = "item_embedding_pca"
ALIGN_WITH = "item_embedding_align_with"
ALIGN_WEIGHT = "item_embedding_align_weight"
ALIGN_TAU = "item_embedding_align_tau"
KEYS = (
    *(INIT, COLUMN, MODE, TRAINABLE, MISSING, ADAPTER, PCA, FUSE, ID_DROPOUT),
    *(ALIGN_WITH, ALIGN_WEIGHT, ALIGN_TAU),
)
FILLS = ("error", "mean", "random")


@dataclass(frozen=True)
class EmbeddingStart:
    """The values of the flag's lines."""

    folder: Location
    column: str = schema.FUSED
    mode: StartMode = "adapter"
    missing: str = "error"
    adapter: Adapter = "linear"
    pca: int | None = None
    fuse: Fuse = "sum"
    id_dropout: float = 0.1
    alignment: Alignment | None = None


def read_flag(settings: Mapping[str, Any]) -> EmbeddingStart | None:
    """Return the values of the `item_embedding_*` keys in RecBole settings, or None if the flag is not set.

    Raises:
        ConfigError: an unknown `item_embedding_*` key, a value out of range, or keys without `item_embedding_init`.
    """
    given = {key: value for key, value in settings.items() if key.startswith("item_emb")}
    for key in given:
        if key not in KEYS:
            raise ConfigError(
                f"unknown setting {key!r}{did_you_mean(key, KEYS)}", f"one of {', '.join(KEYS)}", "correct or remove it"
            )
    if given.get(INIT) is None:
        if given.keys() - {INIT}:
            raise ConfigError(
                f"{', '.join(sorted(given.keys() - {INIT}))} without {INIT}",
                "an embeddings folder that these settings apply to",
                f"add `{INIT}: path/to/embeddings`, or remove them",
            )
        return None
    return EmbeddingStart(
        folder=location(_checked(given, INIT, lambda value: isinstance(value, str), "a path", None)),
        column=_checked(
            given, COLUMN, lambda v: v in schema.COLUMNS, f"one of {', '.join(schema.COLUMNS)}", schema.FUSED
        ),
        mode=_mode(given),
        missing=_checked(given, MISSING, lambda value: value in FILLS, f"one of {', '.join(FILLS)}", "error"),
        adapter=_checked(given, ADAPTER, lambda value: value in ADAPTERS, f"one of {', '.join(ADAPTERS)}", "linear"),
        pca=_checked(given, PCA, _count_or_none, "a number of components from 1, or nothing", None),
        fuse=_checked(given, FUSE, lambda value: value in get_args(Fuse), " or ".join(get_args(Fuse)), "sum"),
        id_dropout=_checked(given, ID_DROPOUT, _share, "a number from 0 to below 1", 0.1),
        alignment=_read_alignment(given),
    )


def _mode(given: Mapping[str, Any]) -> StartMode:
    modes = get_args(StartMode)
    trainable = _checked(given, TRAINABLE, lambda value: isinstance(value, bool | None), "true or false", None)
    default = "table" if trainable else "adapter"
    mode: StartMode = _checked(given, MODE, lambda value: value in modes, f"one of {', '.join(modes)}", default)
    if trainable is not None and mode != default:
        raise ConfigError(
            f"{MODE}: {mode} and {TRAINABLE}: {str(trainable).lower()}", "one of the two lines", f"remove {TRAINABLE}"
        )
    unused = [key for key in (FUSE, ID_DROPOUT) if key in given]
    if unused and mode != "fuse":
        raise ConfigError(f"{', '.join(unused)} with {MODE}: {mode}", f"{MODE}: fuse", "correct or remove one of them")
    return mode


def _share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1


def _read_alignment(given: Mapping[str, Any]) -> Alignment | None:
    if given.get(ALIGN_WITH) is None:
        if idle := sorted(given.keys() & {ALIGN_WEIGHT, ALIGN_TAU}):
            raise ConfigError(
                f"{', '.join(idle)} without {ALIGN_WITH}",
                "the folder of a run that was trained from item ids",
                f"add `{ALIGN_WITH}: path/to/run` (--align-with), or remove it",
            )
        return None
    return Alignment(
        Path(_checked(given, ALIGN_WITH, lambda value: isinstance(value, str), "a path", None)),
        float(_checked(given, ALIGN_WEIGHT, _above_zero, "a number above 0", Alignment.weight)),
        float(_checked(given, ALIGN_TAU, _above_zero, "a number above 0", Alignment.tau)),
    )


def _above_zero(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _checked(given: Mapping[str, Any], key: str, fits: Callable[[Any], bool], expected: str, default: Any) -> Any:
    value = given.get(key, default)
    if not fits(value):
        raise ConfigError(f"{key}: {value!r}", expected, "correct the value")
    return value


def _count_or_none(value: Any) -> bool:
    return value is None or (type(value) is int and value > 0)


def install() -> None:
    """Make SASRec, GRU4Rec and BERT4Rec read the flag. Without the flag in their config they stay RecBole's own.

    The constructors are wrapped in place. A subclass would not work: RecBole finds default settings by class name and
    models by module path, and replacing a model's class breaks its `super(SASRec, self)`. The table is set after the
    model's own constructor, because the constructor's `_init_weights` overwrites earlier values.
    """
    from recbole.utils import get_model

    for name in schema.SEQUENTIAL:
        model = get_model(name)
        if not hasattr(model.__init__, "__wrapped__"):
            model.__init__ = _with_flag(model.__init__)


def _with_flag(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, config: Any, dataset: Any) -> None:  # noqa: N807
        original(self, config, dataset)
        start = read_flag(config.final_config_dict)
        if start is not None:
            start_from(self, start, item_tokens(dataset), int(config["seed"]), known_items(dataset))

    return __init__


def item_tokens(dataset: Any) -> list[str]:
    """Return the ids of RecBole's items in RecBole's order: entry i is item i + 1, as row 0 is the padding."""
    return [str(token) for token in dataset.field2id_token[dataset.iid_field][1:]]


def known_items(dataset: Any) -> Tensor:
    """Return which of RecBole's items occur in the rows of a dataset, as target or in a history, (I + 1,) bool."""
    known = torch.zeros(dataset.item_num, dtype=torch.bool)
    rows = dataset.inter_feat
    for name in (dataset.iid_field, getattr(dataset, f"{dataset.iid_field}_list_field", "")):
        if name in rows:
            known[torch.as_tensor(rows[name]).long().flatten()] = True
    known[0] = False  # the padding
    return known


def start_from(model: Any, start: EmbeddingStart, tokens: list[str], seed: int, known: Tensor | None = None) -> None:
    """Replace the item table of a RecBole model.

    Sets `model.items_without_vector` to how many were filled, and `model.pca_explained` to the share of the vectors'
    variance that `item_embedding_pca` kept, None without it. With an alignment, `model.calculate_loss` returns two
    parts, as some of RecBole's models do.

    Args:
        model: has an `item_embedding` of at least len(tokens) + 1 rows.
        start: the flag.
        tokens: ids of items 1, 2, ...
        seed: seed of the vectors that `missing: random` draws.
        known: which items occur in training, (len(tokens) + 1,) bool; None: all. Only mode `fuse` asks.
    """
    vectors, missing, explained = aligned_vectors(tokens, start, seed)
    stock = model.item_embedding.weight.detach()
    beyond = stock[len(tokens) + 1 :]  # BERT4Rec's mask token
    made = vectors, stock.shape[1], float(stock.std()), beyond if len(beyond) else None, start.adapter
    if start.mode == "table":
        with torch.no_grad():
            model.item_embedding.weight.copy_(ItemEmbedding(*made).weight)
    elif start.mode == "fuse":
        every = torch.ones(len(vectors), dtype=torch.bool) if known is None else known
        model.item_embedding = FusedEmbedding(*made, known=every, fuse=start.fuse, id_dropout=start.id_dropout)
    else:
        model.item_embedding = ItemEmbedding(*made, trained_vectors=start.mode == "init")
    model.items_without_vector, model.pca_explained = missing, explained
    if start.alignment is not None:
        align(model, start.alignment, tokens)


def aligned_vectors(tokens: list[str], start: EmbeddingStart, seed: int) -> tuple[Tensor, int, float | None]:
    """Return standardised vectors with a zero row 0 for the padding, (len(tokens) + 1, d), how many were filled, and
    the share of variance that `start.pca` kept.

    The components come from the dataset's items, each once.

    A `mean` fill has length 0 after centring, so these items are all the same; a `random` fill has its own direction.

    Raises:
        ArtifactError: an item has no vector and the policy is `error`, a vector is not finite, or all are equal.
        ConfigError: `start.pca` exceeds the number of directions of the vectors.
    """
    where = f"{start.folder}, column {start.column},"
    vectors = torch.zeros(len(tokens) + 1, schema.dim_of(schema.read_manifest(start.folder), start.column))
    found = read_items(
        start.folder,
        start.column,
        tokens,
        vectors[1:].numpy(),
        all_needed=start.missing == "error",
        advice=f"`{MISSING}: mean` (`--missing mean`)",
    )
    explained = None
    if start.pca is not None:
        known = vectors[1:].numpy()[found]
        reduced, explained = principal_components(known, start.pca).project(known)
        vectors = torch.zeros(len(tokens) + 1, start.pca)
        vectors[torch.from_numpy(np.flatnonzero(found) + 1)] = torch.from_numpy(reduced).float()
    standardise(vectors[1:], found, in_place=True)
    if found.sum() > 1 and not vectors[:1000].any() and not vectors.any():
        raise ArtifactError(
            f"{where} has the same vector for every item",
            "vectors that differ",
            "check the training of the adapter: its vectors have collapsed",
        )
    if start.missing == "random":
        unknown = torch.from_numpy(np.flatnonzero(~found) + 1)
        drawn = torch.randn(len(unknown), vectors.shape[1], generator=torch.Generator().manual_seed(seed))
        vectors[unknown] = torch.nn.functional.normalize(drawn, dim=1)
    return vectors, int((~found).sum()), explained
