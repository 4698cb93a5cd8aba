"""The choices of every setting of this package, each defined once. No torch in here."""

from __future__ import annotations

from typing import Literal

Adapter = Literal["linear", "two-linear", "mlp"]
"""The layers between frozen vectors and the recommender."""
StartMode = Literal["adapter", "table", "fuse", "init"]
"""How vectors enter a recommender; `recbole.item_embedding` says what each does."""
Fuse = Literal["sum", "gate"]
"""How a trained id row joins the adapted vector."""
TailOver = Literal["train", "all"]
"""Which interactions decide whether an item is of the long tail: those of training, or the held-out ones, too."""
Missing = Literal["skip", "mean", "error"]
"""What to do with items without a vector in files for other tools."""
Repeats = Literal["keep", "drop"]
"""What to do with targets that MMRec masks, because the user has them in training too."""
Positions = Literal["last", "all"]
"""Which positions of a training row a sequential recommender learns: the last one of every prefix, or all at once."""
Softmax = Literal["full", "sampled"]
"""Which items the loss of a sequential recommender counts: all of them, or some that are drawn for each step."""
MatmulPrecision = Literal["highest", "high", "medium"]
"""How exact the matrix products of a training are, as in `torch.set_float32_matmul_precision`."""
