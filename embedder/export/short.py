"""Short vectors of an export: their settings, and how many neighbours of the full vectors they keep.

Recall is measured part by part, while the full vectors are at hand: no pass over the folder, and every worker measures
its own parts. A query's neighbours are those among the items of its part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vlm2rec.embedder.contract import precision, schema
from vlm2rec.embedder.contract.errors import ConfigError

NEIGHBOURS = 10  # the k of recall@k
QUERIES = 32  # of each part
_FEWEST = 2 * NEIGHBOURS + 1  # vectors in a part; among fewer, half of all items would be neighbours
_TIE = 1e-6  # cosines closer than this count as equal: float32 sums differ by as much

Kept = dict[str, list[int]]
"""View → neighbours found by the stored vectors, and neighbours looked for."""


def short_settings(settings: Mapping[str, Any], dim: int | None) -> dict[str, Any]:
    """Return what `dim` changes in the settings of an export: the stored length, and that of the encoder's vectors.

    Raises:
        ConfigError: the vectors are not as long, or the views have different lengths.
    """
    if dim is None:
        return {}
    if "dims" in settings:
        raise ConfigError(
            f"--dim {dim} with views of different lengths"
            f" ({', '.join(f'{view} {length}' for view, length in settings['dims'].items())}): of text and image"
            " concatenated it would keep one alone",
            "vectors with the same dimensions in all views",
            "leave --dim out, or make a table of one view or of summed ones",
        )
    if dim > settings["dim"]:
        raise ConfigError(
            f"--dim {dim}, but the encoder's vectors have {settings['dim']} dimensions",
            f"a number from 1 to {settings['dim']}",
            "choose a smaller --dim",
        )
    return {"dim": dim, schema.FULL_DIM: settings["dim"]}


def full_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an export with the length of its encoder's vectors, to compare them with an encoder's."""
    return {**settings, **({"dim": settings[schema.FULL_DIM]} if schema.FULL_DIM in settings else {})}


def is_short(settings: Mapping[str, Any]) -> bool:
    """Tell whether an export stores less than the encoder's vectors, so that recall is measured."""
    return schema.FULL_DIM in settings or settings.get("storage") not in precision.FLOATS


def shorten_views(vectors: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the vectors of each view, (n, dim), in the length that the settings store."""
    if schema.FULL_DIM not in settings:
        return dict(vectors)
    return {view: precision.shortened(full, settings["dim"]) for view, full in vectors.items()}


def measure(full: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> Kept:
    """Count the nearest neighbours that the stored vectors of some items keep.

    Args:
        full: the encoder's vectors by view, (n, d); rows of NaN where an item has none.
        settings: of the export.
    """
    kept: Kept = {}
    for view, short in shorten_views(full, settings).items():
        rows = np.flatnonzero(np.isfinite(full[view]).all(axis=1))
        if len(rows) < _FEWEST:
            continue
        stored = precision.to_stored(short[rows], settings["storage"])
        restored = precision.to_floats(stored, settings["storage"], short.shape[1])
        kept[view] = _common(_unit(full[view][rows]), _unit(restored))
    return kept


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1), np.float32)


def _common(full: np.ndarray, restored: np.ndarray) -> list[int]:
    """Return how many of the nearest by restored vectors are nearest by full ones too, and how many there are."""
    queries = np.unique(np.linspace(0, len(full) - 1, QUERIES).astype(np.int64))
    true, found = full[queries] @ full.T, restored[queries] @ restored.T  # (Q, n)
    here = (np.arange(len(queries)), queries)
    true[here] = found[here] = -np.inf  # no item is its own neighbour
    returned = np.argsort(-found, axis=1, kind="stable")[:, :NEIGHBOURS]
    worst = -np.partition(-true, NEIGHBOURS - 1, axis=1)[:, NEIGHBOURS - 1 : NEIGHBOURS]
    near = np.take_along_axis(true, returned, axis=1) >= worst - _TIE
    return [int(near.sum()), int(near.size)]


def in_all(parts: Iterable[Kept | None], settings: Mapping[str, Any], shard_size: int) -> dict[str, Any]:
    """Return the manifest's entry about short vectors, from what was measured in each part."""
    measured = [kept for kept in parts if kept]
    sums = {
        view: np.sum([kept[view] for kept in measured if view in kept], axis=0)
        for view in schema.VIEWS
        if any(view in kept for kept in measured)
    }
    return {
        "full_dim": settings.get(schema.FULL_DIM, settings["dim"]),
        "recall@10": {view: round(float(found / of), 4) for view, (found, of) in sums.items()},
        "queries": {view: int(of) // NEIGHBOURS for view, (_, of) in sums.items()},
        "among": f"the items of a query's own part, at most {shard_size}",
    }
