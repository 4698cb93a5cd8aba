"""Chooses the FAISS index for a catalogue, and estimates its size, memory and build time."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from vlm2rec.downstream.index.recall import EFFORTS
from vlm2rec.downstream.index.unit_vectors import BATCH
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, did_you_mean
from vlm2rec.embedder.contract.storage import Location

KINDS = ("auto", "flat", "hnsw", "ivf")
FLAT_LIMIT = 50_000  # up to here exact search answers in milliseconds
HNSW_LIMIT = 1_000_000  # beyond this, the graph takes too long to build

_TRAIN_PER_LIST = 40  # FAISS asks for 39 vectors per k-means centroid
_TRAIN_ROWS = 32_768  # sample for a scalar quantiser's ranges or a rotation


def choose_factory(kind: str, rows: int, dim: int, in_parts: bool = False) -> str:
    """Return the FAISS factory string for `kind`: auto, flat, hnsw, ivf, or a factory string itself.

    With `in_parts` it is a kind whose parts can be merged: no graph, and codes of 8 bits in place of 4.

    Raises:
        ConfigError: FAISS does not understand the string, or it does not fit vectors of length `dim`.
    """
    if kind == "auto":
        kind = "flat" if rows <= FLAT_LIMIT else "hnsw" if rows <= HNSW_LIMIT and not in_parts else "ivf"
    if kind == "flat":
        return "Flat"
    if kind == "hnsw":
        return "HNSW16,SQ8"
    if kind == "ivf":
        factory = _ivf_factory(rows, dim)
        return factory.replace("x4fs", "") if in_parts else factory
    empty_index(kind, dim)
    return kind


def _ivf_factory(rows: int, dim: int) -> str:
    lists = 2 ** round(math.log2(4 * math.sqrt(max(rows, 1))))
    while lists > 1 and lists * _TRAIN_PER_LIST > rows:
        lists //= 2
    if rows < 1000:
        return f"IVF{lists},Flat"  # too few vectors to train the codes of a product quantiser
    return f"IVF{lists},PQ{dim // 8}x4fs,Refine(SQ8)" if dim % 8 == 0 else f"IVF{lists},SQ8"


def empty_index(factory: str, dim: int) -> Any:
    """Return an untrained FAISS index for unit vectors of length `dim`; raise `ConfigError` on a bad string."""
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_L2)
    except RuntimeError as error:
        raise ConfigError(
            f"FAISS cannot make an index {factory!r} for vectors of {dim}"
            f" dimensions{did_you_mean(factory, KINDS)} ({faiss_reason(error)})",
            f"{', '.join(KINDS)}, or a FAISS factory string such as 'HNSW32' or 'IVF1024,SQ8'",
            "correct --kind",
        ) from None
    if isinstance(index, faiss.IndexIDMap | faiss.IndexIDMap2):
        raise ConfigError(
            f"--kind {factory} stores ids beside the vectors",
            "a kind without IDMap: vlm2rec keeps the item ids in a file of its own",
            f"give --kind {re.sub('IDMap2?,', '', factory)}",
        )
    return index


def faiss_reason(error: RuntimeError) -> str:
    """Return FAISS's error message without the line of its C++ source."""
    text = re.sub(r"\s+", " ", str(error))
    return re.sub(r"^Error in .*? at \S+:\d+: (Error: )?", "", text).strip()


@dataclass(frozen=True)
class IndexPlan:
    """The index to build and its estimated cost. Estimates are rough: within a factor of about three."""

    kind: str
    factory: str
    rows: int  # items with a status other than failed; the view may have fewer vectors
    dim: int
    train_rows: int
    bytes: int  # of items.faiss
    memory: int  # peak, in bytes
    seconds: float


def plan_index(
    embeddings: Location,
    *,
    column: str = schema.FUSED,
    kind: str = "auto",
    sample: int = 1000,
    in_parts: bool = False,
) -> IndexPlan:
    """Choose the index for an embeddings folder and estimate its size, memory and build time.

    With `in_parts` it is a kind whose parts can be merged.
    """
    manifest = schema.read_manifest(embeddings)
    if column not in schema.columns_of(manifest):
        raise ArtifactError(
            f"{embeddings} has no vectors in column {column!r}",
            f"one of {', '.join(schema.columns_of(manifest))}",
            "choose another --column",
        )
    dim = schema.dim_of(manifest, column)
    rows = int(manifest["num_items"]) - int(manifest["counts"].get(schema.STATUS_FAILED, 0))
    if rows == 0:
        raise no_vectors(embeddings, column)
    factory = choose_factory(kind, rows, dim, in_parts)
    lists = _lists(factory)
    train_rows = 0 if empty_index(factory, dim).is_trained else min(rows, max(_TRAIN_ROWS, lists * _TRAIN_PER_LIST))
    size = round(rows * bytes_per_vector(factory, dim)) + 4 * lists * dim
    queries = min(sample, rows)
    work = 4 * (train_rows * dim + queries * (dim + 2 * BATCH)) + 12 * BATCH * dim
    seconds = _seconds(factory, rows, dim, train_rows, queries)
    memory = 2 * size + work + 200 * rows  # twice: FAISS copies to a larger array when it grows
    return IndexPlan(kind, factory, rows, dim, train_rows, size, memory, seconds)


def bytes_per_vector(factory: str, dim: int) -> float:
    """Return about how many bytes of the index file one vector takes, from the factory string."""
    width, total, coded = dim, 0.0, False
    for part in re.findall(r"(?:[^,(]|\([^)]*\))+", factory):
        if refined := re.fullmatch(r"Refine\((.*)\)|RFlat", part):
            total += bytes_per_vector(refined[1] or "Flat", dim)
        elif reduced := re.match(r"(?:PCAW?R?|OPQ\d+_|RR|ITQ)(\d+)", part):
            width = int(reduced[1])
        elif links := re.match(r"HNSW(\d*)", part):
            total += 8 * int(links[1] or 32) + 16
        elif part.startswith("IVF"):
            total += 8
        elif codes := re.match(r"PQ(\d+)(?:x(\d+))?", part):
            total, coded = total + int(codes[1]) * int(codes[2] or 8) / 8, True
        elif scalar := re.match(r"SQ(?:fp|bf)?(\d+)", part):
            total, coded = total + width * int(scalar[1]) / 8, True
    return total if coded else total + 4 * width


def _lists(factory: str) -> int:
    found = re.search(r"IVF(\d+)", factory)
    return int(found[1]) if found else 0


def _seconds(factory: str, rows: int, dim: int, train_rows: int, queries: int) -> float:
    """Return about how long a build takes: matrix products at this machine's rate, graph steps, reading."""
    lists = _lists(factory)
    products = float(queries) * rows  # of two vectors: the exact search for the recall
    products += 2 * (10.0 * train_rows * lists + float(rows) * lists)  # k-means of ten rounds, then one assignment
    products += float(queries) * rows * min(1.0, sum(EFFORTS) / lists) * 5 if lists else 0  # lists are read in pieces
    seconds = 2 * products * dim / _multiply_rate() + 1.5e-8 * queries * rows  # and choosing the best of them
    seconds += (3 if train_rows else 2) * 4 * rows * dim / 5e8
    if "HNSW" in factory:
        # single products at scattered addresses, more of them as the graph gets deeper
        seconds += 3e-7 * rows * dim * math.log10(max(rows, 10)) / 5 / faiss.omp_get_max_threads()
    return 0.3 + seconds


def _multiply_rate() -> float:
    """Return the FLOP/s of a float32 matrix product, measured for a few milliseconds."""
    block = np.ones((512, 512), np.float32)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        block @ block
        times.append(time.perf_counter() - begun)
    return float(2 * 512**3 / min(times))


def no_vectors(embeddings: Location, column: str) -> ArtifactError:
    """Return the error for a view that has nothing to index."""
    return ArtifactError(
        f"{embeddings} has no usable vector in column {column!r}",
        "at least one vector that is finite and not zero",
        "choose another --column, or check the status and error columns of the export",
    )
