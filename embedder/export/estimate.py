"""`export-items --dry-run`: how much is left to do, and what time and space it takes, measured on a few items."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from vlm2rec.embedder.contract import precision, schema
from vlm2rec.embedder.contract.storage import Location, free_bytes
from vlm2rec.embedder.export.plan import Plan
from vlm2rec.embedder.export.worker import ITEMS_AT_ONCE

SAMPLE = 64  # items that are encoded for the estimate, spread evenly over those that are left
_ON_GPU = ITEMS_AT_ONCE  # there, as many as an export encodes together: fewer would take less of its memory
_WARM_UP = 4  # items encoded before the clock starts: the first ones wait for libraries to initialise


def estimate(
    plan: Plan,
    out: Location,
    rows: Sequence[int],
    shards_left: int,
    encode: Callable[[Sequence[int]], object],
    device: torch.device,
) -> dict[str, Any]:
    """Return what is left of an export and what time and space it takes; nothing is written.

    Args:
        plan: the plan of the export.
        out: its folder, which need not exist.
        rows: items that are to be encoded, as rows of the plan.
        shards_left: shards that are to be written.
        encode: encodes items, given as rows of the plan; the result is not kept.
        device: where the items are encoded.

    Returns:
        items, items_left, shards, shards_left, bytes_left (on disk, before compression), bytes_free (None in a
        store), sample (items
        that were encoded), seconds (for what is left), memory_bytes (the process's peak, and what two shards will
        take), gpu_bytes (the peak so far, None off CUDA).
    """
    dims = [schema.dims_of(plan.settings)[view] for view in plan.settings["views"]]
    numbers = sum(max(dim, plan.settings.get(schema.FULL_DIM, 0)) for dim in dims)  # for each item, in memory
    width = sum(precision.bytes_of(plan.settings["storage"], dim) for dim in dims)  # and on disk
    found = {
        "items": len(plan.item_ids),
        "items_left": len(rows),
        "shards": len(plan),
        "shards_left": shards_left,
        "bytes_left": len(rows) * width,
        "bytes_free": free_bytes(out),
    }
    size = _ON_GPU if device.type == "cuda" else SAMPLE
    sample = rows[:: max(1, len(rows) // size)][:size]
    seconds = 0.0
    if sample:
        encode(sample[:_WARM_UP])
        started = time.perf_counter()
        encode(sample)
        seconds = (time.perf_counter() - started) / len(sample) * len(rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    # two shards are in memory at a time: one is being encoded, one written; each exists as arrays and as a table
    waiting = 4 * min(plan.shard_size, len(rows)) * numbers * 4
    on_gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return found | {"sample": len(sample), "seconds": seconds, "memory_bytes": peak + waiting, "gpu_bytes": on_gpu}


def describe(found: Mapping[str, Any]) -> dict[str, object]:
    """Return the estimate as the rows of a summary."""
    measured = f"measured on {found['sample']} items, without vision cache" if found["sample"] else "nothing to measure"
    gpu = "" if found["gpu_bytes"] is None else f", {found['gpu_bytes'] / 2**30:.1f} GiB of the GPU"
    free = "" if found["bytes_free"] is None else f", {found['bytes_free'] / 2**30:.0f} GiB free"
    return {
        "items": f"{found['items']:,} in {found['shards']} shards",
        "left": f"{found['items_left']:,} in {found['shards_left']} shards",
        "time": f"about {found['seconds'] / 60:.1f} minutes ({measured})",
        "memory": f"about {found['memory_bytes'] / 2**30:.1f} GiB{gpu}",
        "disk": f"at most {found['bytes_left'] / 2**20:.1f} MiB of vectors{free}",
    }
