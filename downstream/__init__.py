"""downstream reads the table: ranking, geometry, RecBole, FAISS, other tools.

It needs no transformers. From `vlm2rec.embedder` it imports the package `contract` only.
`from vlm2rec.downstream import EmbeddingTable` loads pyarrow and NumPy at that moment; importing the package alone
loads nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm2rec.downstream.table import EmbeddingTable

__all__ = ["EmbeddingTable"]


def __getattr__(name: str) -> Any:
    if name == "EmbeddingTable":
        from vlm2rec.downstream.table import EmbeddingTable

        return EmbeddingTable
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
