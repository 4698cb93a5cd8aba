"""The choices of every setting of this package, each once. No torch in here."""

from __future__ import annotations

from typing import Literal

Adapter = Literal["linear", "two-linear", "mlp"]
"""What stands between frozen vectors and the recommender's width."""
StartMode = Literal["adapter", "table"]
"""Frozen vectors behind an adapter, or a table that starts from them and is trained."""
Missing = Literal["skip", "mean", "error"]
"""What becomes of items without a vector in files for other tools."""
