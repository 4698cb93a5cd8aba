"""A user's vector as the mean of the history's item vectors, for histories with items that have none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlm2rec.downstream.evaluation.protocol import mean_of_history
from vlm2rec.downstream.table import EmbeddingTable
from vlm2rec.embedder.contract.dataset import Histories


def mean_vectors(tables: dict[str, EmbeddingTable], histories: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Return the mean of each history's vectors, by view, (n, d) float32; NaN where no item has one.

    Args:
        tables: view → table; the rows of the histories are its rows.
        histories: n histories of table rows.
    """
    found = {}
    for view, table in tables.items():
        kept = [rows[table.present[rows]] for rows in histories]
        lengths = np.array([len(rows) for rows in kept], np.int64)
        means = np.full((len(kept), table.dim), np.nan, np.float32)
        if lengths.any():
            rows = np.concatenate(kept).astype(np.int32)
            offsets = np.concatenate([[0], np.cumsum(lengths[lengths > 0])])
            users = Histories([], rows, offsets, np.empty(0, np.int32))
            means[lengths > 0] = mean_of_history(table.vectors, users)
        found[view] = means
    return found
