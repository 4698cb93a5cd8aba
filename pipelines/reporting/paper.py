"""The numbers that the paper prints, from `paper.yaml`."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm2rec.pipelines.read_config import read_yaml

PAPER_FILE = Path(__file__).parent / "paper.yaml"


@functools.cache
def read_paper() -> dict[str, Any]:
    """Return the tables by name. The result is shared: do not change it."""
    return read_yaml(PAPER_FILE)


def nearest(counts: Sequence[Mapping[str, Any]], paper: Mapping[str, Any]) -> int:
    """Return which counts come nearest to the paper's: by the mean ratio of users, items and interactions.

    Args:
        counts: rows with users, items and interactions, at least one.
        paper: the paper's of the same dataset.
    """
    names = ("users", "items", "interactions")
    distances = [sum(abs(math.log(max(1, each[name]) / paper[name])) for name in names) for each in counts]
    return distances.index(min(distances))
