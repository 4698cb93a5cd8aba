"""The fixed probe of `vlm2rec finetune`: the geometry of every view during training, on the same few users."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlm2rec.downstream.evaluation.geometry import effective_rank, geometry_from_rows
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset, Histories
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.item_features import ItemFeatures, encode_rows_together, encode_users_together
from vlm2rec.embedder.options import ValidCandidates
from vlm2rec.embedder.training.monitor import Collapse, Probe
from vlm2rec.embedder.training.recipes import METHODS
from vlm2rec.pipelines.catalogue.negatives import draw_validation_candidates
from vlm2rec.pipelines.config import FinetuneConfig

_IN_SHORT = {
    "behind": "falls behind",
    "starved": "does not learn",
    "flat": "in few directions",
    "narrow": "in one point",
}
CANDIDATES = 4  # candidates per user: encoding an item takes a tenth of the time of a history
_CACHE = 2**28  # bytes of image features


def validation_candidates(
    which: ValidCandidates, dataset: Dataset, histories: Histories, users: np.ndarray
) -> np.ndarray:
    """Return what the validation items of some users are ranked among, as rows of the items, (len(users), N)."""
    if which == "stored":
        return dataset.negatives(dataset.candidate_seeds[0])[users]
    count = dataset.candidate_count
    return draw_validation_candidates(dataset.train_sequences(), histories.targets, users, count)


def make_probe(config: FinetuneConfig, dataset: Dataset, encoder: ItemEncoder) -> Probe | None:
    """Return the probe of a run, or None if it is off: validation users, their next items, and a few candidates.

    The choice of users depends only on the dataset, the seed and `probe_users`.
    """
    if not config.probe_users:
        return None
    histories = dataset.histories("valid")
    count = min(config.probe_users, len(histories))
    users = np.sort(np.random.default_rng([config.seed, 4]).choice(len(histories), count, replace=False))
    negatives = validation_candidates(config.valid_candidates, dataset, histories, users)[:, :CANDIDATES]
    rows, index = np.unique(np.concatenate([histories.targets[users, None], negatives], axis=1), return_inverse=True)
    index = index.reshape(count, -1)
    sequences = [histories.of(int(user)).tolist() for user in users]
    items = ItemFeatures(dataset, encoder, _CACHE)  # not those of the training, see `ItemFeatures.apart`

    def measure() -> dict[str, float]:
        user_vectors = encode_users_together(encoder, items, sequences)
        item_vectors = encode_rows_together(encoder, items, [[int(row)] for row in rows])
        row: dict[str, float] = {}
        for view in schema.VIEWS:
            row |= _measured(view, user_vectors[view], item_vectors[view], index)
        for name, vectors in (("user", user_vectors), ("item", item_vectors)):
            row |= _norm_ratio(name, vectors[schema.TEXT], vectors[schema.IMAGE])
        return row

    return Probe(count, measure, config.probe_steps)


def _measured(view: str, users: np.ndarray, items: np.ndarray, index: np.ndarray) -> dict[str, float]:
    """Return the geometry and the effective rank of a view; nothing if it is absent or not finite."""
    if not (np.isfinite(users).all() and np.isfinite(items).all()):
        return {}
    numbers = geometry_from_rows(users, items, index[:, 0], index[:, 1:])
    return {f"{name}_{view}": value for name, value in {**numbers, "rank": effective_rank(items)}.items()}


def _norm_ratio(name: str, text: np.ndarray, image: np.ndarray) -> dict[str, float]:
    """Return the mean of ‖z_T‖ / ‖z_V‖, if both exist."""
    lengths = np.linalg.norm(text, axis=1), np.linalg.norm(image, axis=1)
    if not np.isfinite(lengths).all() or not lengths[1].all():
        return {}
    return {f"norm_ratio_{name}": float((lengths[0] / lengths[1]).mean())}


def warning(noticed: Sequence[Collapse], config: FinetuneConfig) -> str:
    """Return the warning about one probe or row: what was measured, and what to try."""
    found = "; ".join(collapse.message for collapse in noticed)
    return f"Collapse at step {noticed[0].step}: {found}. Try {_to_try(noticed, config)}."


def _to_try(noticed: Sequence[Collapse], config: FinetuneConfig) -> str:
    behind = all(collapse.rule in ("behind", "starved") for collapse in noticed)
    advice = "".join(f"{text}, " for text in METHODS[config.method].advice(config, behind))
    return f"{advice}{'or ' if advice else ''}a --learning-rate below {config.learning_rate:g} or fewer steps"


def describe(warnings: Sequence[dict[str, object]]) -> str:
    """Return the warnings of a run as one line of its summary."""
    parts = []
    for entry in warnings:
        until = "to the end" if entry["until"] is None else f"until step {entry['until']}"
        parts.append(f"{entry['view']} {_IN_SHORT[str(entry['rule'])]}, from step {entry['step']} {until}")
    return "; ".join(parts)
