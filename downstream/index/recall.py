"""Measures how many of the true neighbours an index finds, and the search effort it needs."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from vlm2rec.downstream.index.unit_vectors import UnitBatch

NEIGHBOURS = 10  # the k of recall@k
TARGET_RECALL = 0.95  # the search effort is the smallest that reaches it
EFFORTS = (16, 32, 64, 128, 256)  # tried for efSearch (HNSW) or nprobe (IVF)
_TIE = 1e-6  # cosines closer than this count as equal: float32 sums differ by as much


@dataclass(frozen=True)
class Quality:
    """How well an index answers a sample of queries; a query is never its own neighbour."""

    effort: dict[str, int]  # the search setting stored in the index: {"efSearch": 64}, {"nprobe": 32} or {}
    recall: float | None  # share of the true k neighbours that were found; None if there is no neighbour
    cosine_error: float | None  # mean |cosine by the index − true cosine| of the neighbours found
    search_ms: float | None  # per query, all queries at once
    search_ms_single: float | None  # median of one query at a time
    tried: list[dict[str, float]]


def exact_neighbours(
    batches: Iterable[UnitBatch], queries: np.ndarray, own: np.ndarray, returned: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Compare queries with every vector of a stream.

    Args:
        batches: All indexed vectors.
        queries: (S, d) unit vectors.
        own: (S,) the row of each query, which does not count as a neighbour.
        returned: (L, S, k) rows whose true cosine to compute; -1 if there is none.
        k: Neighbours.

    Returns:
        The k largest cosines of each query in descending order, (S, k), and the cosine of every returned row,
        (L, S, k), -inf if there is none.
    """
    best = np.full((len(queries), k), -np.inf, np.float32)
    of_returned = np.full(returned.shape, -np.inf, np.float32)
    for batch in batches:
        scores = queries @ batch.vectors.T  # (S, n)
        here = (own >= batch.first) & (own < batch.first + len(batch.vectors))
        scores[here, own[here] - batch.first] = -np.inf
        levels, rows, places = np.nonzero((returned >= batch.first) & (returned < batch.first + len(batch.vectors)))
        found = returned[levels, rows, places] - batch.first
        of_returned[levels, rows, places] = scores[rows, found]
        best = -np.partition(-np.concatenate([best, scores], axis=1), k - 1, axis=1)[:, :k]
    return -np.sort(-best, axis=1), of_returned


def drop_own(rows: np.ndarray, values: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Remove each query's own row from its k + 1 neighbours, or the last one if the query is not among them.

    `rows` and `values` are (S, k + 1), `own` (S,); both results are (S, k).
    """
    keep = rows != own[:, None]
    keep[keep.all(axis=1), -1] = False
    return rows[keep].reshape(len(rows), -1), values[keep].reshape(len(rows), -1)


def cosines(distances: np.ndarray) -> np.ndarray:
    """Return the cosines of unit vectors at these squared L2 distances."""
    return np.clip(1 - distances / 2, -1, 1)


def measure(index: Any, queries: np.ndarray, own: np.ndarray, batches: Iterable[UnitBatch]) -> Quality:
    """Measure recall@10 against exact search, and set in `index` the least effort that reaches the target."""
    k = min(NEIGHBOURS, index.ntotal - 1)
    if k < 1:
        return Quality({}, None, None, None, None, [])
    index.search(queries[:10], k + 1)  # not timed: the first search starts FAISS's threads
    efforts = _efforts(index)
    answers, milliseconds = [], []
    for effort in efforts:
        _set_effort(index, effort)
        begun = time.perf_counter()
        distances, rows = index.search(queries, k + 1)
        milliseconds.append((time.perf_counter() - begun) * 1000 / len(queries))
        answers.append(drop_own(rows, cosines(distances), own))
    returned = np.stack([rows for rows, _ in answers])  # (L, S, k)
    best, true = exact_neighbours(batches, queries, own, returned, k)
    # a neighbour as near as the true k-th one counts, whichever of several equal ones the index found
    recalls = (true >= best[None, :, -1:] - _TIE).mean(axis=(1, 2))
    chosen = int(np.argmax(recalls >= TARGET_RECALL)) if (recalls >= TARGET_RECALL).any() else int(np.argmax(recalls))
    _set_effort(index, efforts[chosen])
    found = returned[chosen] >= 0
    error = np.abs(answers[chosen][1] - true[chosen])[found]
    tried = [
        {**effort, "recall@10": round(float(recall), 4), "search_ms": round(ms, 4)}
        for effort, recall, ms in zip(efforts, recalls, milliseconds, strict=True)
    ]
    return Quality(
        efforts[chosen],
        float(recalls[chosen]),
        float(error.mean()) if error.size else None,
        milliseconds[chosen],
        _single_query_ms(index, queries[:100], k + 1),
        tried,
    )


def _efforts(index: Any) -> list[dict[str, int]]:
    """Return the search settings to try, least effort first: values of nprobe (IVF) or efSearch (HNSW), or none."""
    space = faiss.ParameterSpace()
    space.initialize(index)
    names = [space.parameter_ranges.at(i).name for i in range(space.parameter_ranges.size())]
    for name in ("nprobe", "efSearch"):  # an IVF that finds its lists by HNSW has both: nprobe decides
        if name in names:
            most = faiss.extract_index_ivf(index).nlist if name == "nprobe" else EFFORTS[-1]
            return [{str(name): value} for value in (*(e for e in EFFORTS if e < most), min(most, EFFORTS[-1]))]
    return [{}]


def _set_effort(index: Any, effort: dict[str, int]) -> None:
    for name, value in effort.items():
        faiss.ParameterSpace().set_index_parameter(index, name, value)


def _single_query_ms(index: Any, queries: np.ndarray, k: int) -> float:
    times = []
    for query in queries:
        begun = time.perf_counter()
        index.search(query[None], k)
        times.append(time.perf_counter() - begun)
    return float(np.median(times)) * 1000
