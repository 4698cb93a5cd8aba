"""The numbers that the paper prints, from `paper.yaml`."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from vlm2rec.pipelines.read_config import read_yaml

PAPER_FILE = Path(__file__).parent / "paper.yaml"


@functools.cache
def read_paper() -> dict[str, Any]:
    """Return the tables by name. The result is shared: do not change it."""
    return read_yaml(PAPER_FILE)
