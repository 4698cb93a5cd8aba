"""embedder writes a table: a vision-language model, fine-tuned on histories, turned into item vectors.

Nothing in here imports `vlm2rec.downstream` or `vlm2rec.pipelines`. `from vlm2rec.embedder import ItemEncoder` loads
torch and transformers at that moment; importing the package alone loads nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm2rec.embedder.encoders.item_encoder import ItemEncoder

__all__ = ["ItemEncoder"]


def __getattr__(name: str) -> Any:
    if name == "ItemEncoder":
        from vlm2rec.embedder.encoders.item_encoder import ItemEncoder

        return ItemEncoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
