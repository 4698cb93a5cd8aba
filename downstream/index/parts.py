"""An index built in parts by the tasks of a Ray cluster, and merged.

The index is trained on a sample first. Each task gets it empty, adds the vectors of some shards, and gives it back;
parts are merged in the order of the shards, so a search finds what it finds in an index that one process built. Nodes
must be able to read the embeddings folder. The cluster is the one that `ray.init` finds (`RAY_ADDRESS`), or a new one
on this machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import faiss
import numpy as np

from vlm2rec.downstream.index.plan import IndexPlan, faiss_reason
from vlm2rec.downstream.index.unit_vectors import unit_batches
from vlm2rec.embedder.contract.errors import ConfigError, MissingDependencyError, Vlm2RecError
from vlm2rec.embedder.contract.storage import Location


def require_parts(plan: IndexPlan) -> None:
    """Raise `ConfigError` if the planned kind cannot be merged, `MissingDependencyError` without Ray."""
    if "HNSW" in plan.factory or "NSG" in plan.factory:
        found, why = plan.factory, "whose graph links every vector to the others"
    elif "fs" in plan.factory:
        found, why = plan.factory, "whose blocks of codes FAISS does not merge safely"  # 1.15 writes behind their end
    else:
        found = why = ""
    if found:
        raise ConfigError(
            f"--engine ray with {found}, {why}",
            "a kind that can be built in parts: auto, flat, ivf, or another factory string",
            "change --kind, or leave out --engine ray",
        )
    _ray()


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise MissingDependencyError(
            "--engine ray needs Ray, which is not installed", "ray", "pip install 'vlm2rec[ray]'"
        ) from None
    return ray


def groups(rows: list[int], size: int) -> list[range]:
    """Divide shards into runs of at least `size` rows, the last may have fewer.

    Args:
        rows: rows of each shard.
        size: rows of a part.
    """
    found, first, count = [], 0, 0
    for number, each in enumerate(rows):
        count += each
        if count >= size or number == len(rows) - 1:
            found.append(range(first, number + 1))
            first, count = number + 1, 0
    return found


def made_by_ray(
    index: Any, embeddings: Location, column: str, parts: list[range], num_workers: int
) -> Iterator[np.ndarray]:
    """Yield the parts in their order, each an index as bytes.

    At most `num_workers` are made or wait for those before them, so memory holds no more.

    Args:
        index: the trained index, without vectors.
        embeddings: finished embeddings folder.
        column: view.
        parts: numbers of the shards of each part.
        num_workers: tasks at a time.

    Raises:
        Vlm2RecError: what a task raised.
    """
    ray = _ray()
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    task = ray.remote(part_of).options(num_cpus=1, max_retries=-1)
    empty = ray.put(faiss.serialize_index(index))
    waiting = list(parts)
    under_way: list[Any] = []
    try:
        while waiting or under_way:
            while waiting and len(under_way) < num_workers:
                under_way.append(task.remote(empty, embeddings, column, waiting.pop(0)))
            try:
                yield ray.get(under_way[0])
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, Vlm2RecError) else error from None
            under_way.pop(0)
    finally:
        for left in under_way:
            ray.cancel(left, force=True)


def part_of(empty: np.ndarray, embeddings: Location, column: str, shards: range) -> np.ndarray:
    """Return an index of the vectors of some shards, as bytes, from an empty one that is trained."""
    index = faiss.deserialize_index(empty.copy())  # Ray's arrays cannot be written to
    for batch in unit_batches(embeddings, column, shards):
        if batch.item_ids:
            index.add(batch.vectors)
    return np.asarray(faiss.serialize_index(index))


def merge(index: Any, part: Any) -> None:
    """Move the vectors of a part behind those of an index of the same kind; the part is empty then.

    Raises:
        ConfigError: FAISS cannot merge this kind.
    """
    # other names: what FAISS casts does not keep its object alive
    whole: Any = faiss.downcast_index(index)
    more: Any = faiss.downcast_index(part)
    if isinstance(whole, faiss.IndexRefine):
        merge(whole.base_index, more.base_index)
        merge(whole.refine_index, more.refine_index)
        whole.ntotal = whole.base_index.ntotal
    elif isinstance(whole, faiss.IndexPreTransform):
        merge(whole.index, more.index)
        whole.ntotal = whole.index.ntotal
    else:
        try:  # lists keep the rows' numbers, which go on; flat codes have none
            whole.merge_from(more, whole.ntotal if isinstance(whole, faiss.IndexIVF) else 0)
        except RuntimeError as error:
            raise ConfigError(
                f"FAISS cannot merge parts of this kind of index ({faiss_reason(error)})",
                "flat, ivf, or another kind that it can merge",
                "leave out --engine ray, or choose another --kind",
            ) from None
