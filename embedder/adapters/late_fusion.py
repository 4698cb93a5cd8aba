"""NoteLLM-2's late fusion: what the vision tower saw joins a state of the language model once more, by a gate.

    v = P·mean of the image's tokens
    z = σ(G·[v; h])
    out = z ⊙ v + (1 − z) ⊙ h

with h the state of a token, and P (d × d) and G (d × 2d) trained. The paper takes the tower's class token for the mean;
not all families have one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlm2rec.embedder.backbones.backbone import ImageFeatures


class LateFusion(nn.Module):
    """The gate and the projection, in float32.

    Args:
        dim: length d of the states, and of an image's tokens.
        seed: seed of the first weights.
    """

    def __init__(self, dim: int, seed: int = 0) -> None:
        super().__init__()
        self.dim = dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.project = nn.Linear(dim, dim, bias=False)
            self.gate = nn.Linear(2 * dim, dim, bias=False)
            nn.init.xavier_normal_(self.gate.weight)

    def forward(self, seen: Tensor, states: Tensor) -> Tensor:
        """Return the fused states, (n, d) float32.

        Args:
            seen: the mean of each image's tokens, (n, d).
            states: states of the language model, (n, d).
        """
        states, vision = states.float(), self.project(seen.float())
        share = self.gate(torch.cat([vision, states], dim=1)).sigmoid()  # (n, d)
        return share * vision + (1 - share) * states


def mean_tokens_of(images: Sequence[ImageFeatures]) -> Tensor:
    """Return the mean of each image's tokens, (n, d) float32."""
    return torch.stack([image.tokens.float().mean(dim=0) for image in images])
