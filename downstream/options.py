"""The choices of every setting of this package, each defined once. No torch in here."""

from __future__ import annotations

from typing import Literal

Adapter = Literal["linear", "two-linear", "mlp"]
"""The layers between frozen vectors and the recommender."""
StartMode = Literal["adapter", "table"]
"""Frozen vectors with a trained adapter, or a trained table that starts from them."""
Missing = Literal["skip", "mean", "error"]
"""What to do with items without a vector in files for other tools."""
Repeats = Literal["keep", "drop"]
"""What to do with targets that MMRec masks, because the user has them in training too."""
