"""The settings of a multimodal recommender. No torch in here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlm2rec.downstream.options import StartMode
from vlm2rec.embedder.contract.storage import Location


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides a run besides the data, as the flags of `train-recommender` say; defaults are theirs."""

    model: str
    embeddings: Location
    features: tuple[str, ...]  # views, see `choose_features`
    mode: StartMode
    missing: Literal["error", "mean", "random"]
    normalize: bool
    hidden_size: int
    max_epochs: int
    eval_step: int
    patience: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    seed: int
    # of these a model reads those that its recipe names
    graph_layers: int
    neighbours: int
    image_weight: float
    pruning: float
    regularisation: float
    ssl_weight: float
    temperature: float
    ssl_temperature: float
