"""From hidden states to one vector, and from a text and an image vector to one item or user. Pure tensor code."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.embedder.options import FusionNorm

"""How a prompt's final states become its vector: the last token's state (VLM2Rec), or the mean of all (SDA)."""


def last_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the hidden state of each row's last attended token (Eq. 1), (B, d), in the dtype of `hidden`.

    The position comes from the mask, so right and left padding give the same vector.

    Args:
        hidden: final-layer states, (B, T, d).
        mask: attention mask, (B, T), bool or 0/1.

    Raises:
        ValueError: the shapes do not fit, or a row attends to no token.
    """
    attended = _attended(hidden, mask)  # (B, T)
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    last = positions.where(attended, -1).amax(dim=1)  # (B,)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def mean_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the mean hidden state over each row's attended tokens, (B, d), summed and returned in float32 at least.

    Args and errors are those of `last_token`. States at padded positions are ignored even where they are not finite.
    """
    attended = _attended(hidden, mask).unsqueeze(-1)  # (B, T, 1)
    return at_least_float32(hidden).where(attended, 0.0).sum(dim=1) / attended.sum(dim=1)


def fuse(text: Tensor, image: Tensor, norm: FusionNorm = "raw") -> Tensor:
    """Return the fused vectors z = z_T + z_V (Eq. 2), shape as given, in float32 at least.

    Args:
        text: text vectors, (..., d).
        image: image vectors of the same shape.
        norm: `raw` adds the vectors as they are (the paper), so the longer one dominates; `normalised` adds unit
            vectors. `norm_ratio` says how much their lengths differ.
    """
    if norm == "normalised":
        return unit(text) + unit(image)
    if norm != "raw":
        raise ConfigError(f"{norm!r} is not a way to fuse", "raw or normalised", "correct the setting fusion_norm")
    # bf16 would round the sum once more: a stored fused vector then differs from stored text + stored image
    return at_least_float32(text) + at_least_float32(image)


def concatenate(text: Tensor, image: Tensor, norm: FusionNorm = "raw") -> Tensor:
    """Return text and image vectors end to end, (n, d_T + d_V): what `fuse` is for vectors of different lengths.

    Args:
        text: text vectors, (n, d_T).
        image: image vectors, (n, d_V).
        norm: as for `fuse`.

    Returns:
        Rows of NaN where one of the two vectors is NaN.
    """
    parts = (unit(text), unit(image)) if norm == "normalised" else (text, image)
    together = torch.cat([at_least_float32(part) for part in parts], dim=1)
    return together.masked_fill(together.isnan().any(1, keepdim=True), torch.nan)


def norm_ratio(text: Tensor, image: Tensor) -> Tensor:
    """Return ‖z_T‖ / ‖z_V‖ per row, (...,): above 1 the text dominates a raw sum.

    A zero image vector beside a text vector gives inf; two zero vectors give 1, as neither dominates.
    """
    text_length = torch.linalg.vector_norm(at_least_float32(text), dim=-1)
    image_length = torch.linalg.vector_norm(at_least_float32(image), dim=-1)
    both_zero = (text_length == 0) & (image_length == 0)
    return (text_length / image_length).masked_fill(both_zero, 1.0)


def unit(vectors: Tensor) -> Tensor:
    """Return `vectors` (..., d) at length 1 in float32 at least; zero vectors stay zero, so their cosine is 0."""
    vectors = at_least_float32(vectors)
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    # dividing a zero vector by 1, not by a tiny epsilon, keeps its gradient at the size of the others
    return vectors / length.where(length > 0, 1.0)


def at_least_float32(values: Tensor) -> Tensor:
    """Return `values` with half precisions widened to float32; float32 and float64 pass unchanged."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _attended(hidden: Tensor, mask: Tensor) -> Tensor:
    """Check shapes and return the mask as bool, (B, T)."""
    if hidden.dim() != 3 or mask.shape != hidden.shape[:2]:
        raise ValueError(f"hidden is {tuple(hidden.shape)} and mask {tuple(mask.shape)}; expected (B, T, d) and (B, T)")
    attended = mask != 0
    empty = ~attended.any(dim=1)
    if empty.any():
        raise ValueError(f"rows {empty.nonzero().flatten().tolist()} of the mask attend to no token")
    return attended
