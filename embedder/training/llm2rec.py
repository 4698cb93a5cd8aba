"""LLM2Rec's training: a language model learns to write the next title, then to be an encoder of single titles.

Three phases of one run and one adapter, by shares of its steps (10,000, 1,000 and 1,000 in the public code):

1. CSFT: the user's titles, then the tokens of the next one; causal attention, cross-entropy of the next title alone.
2. MNTP: a title with some tokens masked; bidirectional attention, the token before a masked one predicts it.
3. SimCSE: a title twice with different dropout; bidirectional attention, mean of all tokens, InfoNCE among the items.

What is exported and validated is the encoder of the third phase, whatever phase a step is in. Validation chooses among
the weights of the last phase that has a share of the steps. Text only, also of a vision-language model. A user is the
mean of the history's item vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.item_features import ItemFeatures
from vlm2rec.embedder.training.losses import effective_negatives, info_nce, require
from vlm2rec.embedder.training.samples import Sample, Samples
from vlm2rec.embedder.training.train import Model

CSFT, MNTP, SIMCSE = 1, 2, 3
"""The phases, as the training curves number them."""
MASKED = 0.2
"""Share of a title's tokens that are masked; of these 8 in 10 become `_`, one a random token, and one stays."""
_TOKENS = "tokens"


class TitleSample(NamedTuple):
    """What each of the phases learns from: a user at a moment, or an item (row of `items.parquet`)."""

    sample: Sample
    item: int
    seed: tuple[int, ...]  # of the draw of masked tokens


class TitleSamples(Sequence[TitleSample]):
    """The samples of histories (`Samples`), each with an item: an epoch goes through a shuffled catalogue.

    Args:
        histories: the samples of the first phase.
        items: number of items.
        seed: seed of the order of items and of the masks.
    """

    def __init__(self, histories: Samples, items: int, seed: int = 0) -> None:
        self._histories, self._items, self._seed = histories, items, seed
        self.set_epoch(0)

    @property
    def users(self) -> np.ndarray:
        """The users whose histories are learned from."""
        return self._histories.users

    def __len__(self) -> int:
        return len(self._histories)

    def __getitem__(self, index: Any) -> Any:
        item = int(self._order[index % self._items])
        return TitleSample(self._histories[index], item, (self._seed, 9, self._epoch, int(index)))

    def summary(self) -> dict[str, str]:
        """Return the rows of a run's summary that name the training data."""
        return {**self._histories.summary(), "items": f"{self._items}"}

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, which decides the order of items, the masks, and the positions of `random` histories."""
        self._epoch = epoch
        self._histories.set_epoch(epoch)
        self._order = np.random.default_rng([self._seed, 8, epoch]).permutation(self._items)


class Phases(nn.Module):
    """Which phase a step belongs to, and the loss of the third.

    Args:
        csft: share of the steps for CSFT.
        mntp: share of the steps for MNTP; the rest is SimCSE's.
        scale: what cosines are multiplied with in SimCSE, 1/τ.
    """

    def __init__(self, csft: float = 0.8, mntp: float = 0.1, scale: float = 10.0) -> None:
        super().__init__()
        require(csft >= 0 and mntp >= 0 and csft + mntp <= 1, f"shares {csft} and {mntp}", "shares of at most 1 in all")
        require(scale > 0, f"simcse_scale is {scale}", "a number above 0")
        self.csft, self.mntp, self.scale = csft, mntp, scale

    def at(self, step: int, steps: int) -> int:
        """Return the phase of a step, counted from 0."""
        if step < round(self.csft * steps):
            return CSFT
        return MNTP if step < round((self.csft + self.mntp) * steps) else SIMCSE

    def forward(self, first: Tensor, second: Tensor, rows: Tensor) -> Tensor:
        """Return SimCSE's loss, a scalar: InfoNCE from the vectors of N items to other ones of the same items.

        Args:
            first: vectors of one pass, (N, d).
            second: those of another pass with other dropout, (N, d).
            rows: integer ids of the items, (N,); equal ids are never each other's negatives.
        """
        return info_nce(first, second, rows, 1 / self.scale)


class TitleModel(Model):
    """An encoder of titles with an adapter, trained in three phases. For one process. The arguments are `Model`'s."""

    loss: Phases

    def __init__(
        self, encoder: ItemEncoder, wrapped: nn.Module, items: ItemFeatures, loss: nn.Module, chunk_users: int = 0
    ) -> None:
        super().__init__(encoder, wrapped, items, loss, chunk_users)
        self.phase = CSFT

    def at_step(self, step: int, steps: int) -> None:
        """Choose the phase."""
        self.phase = self.loss.at(step, steps)

    def may_keep(self, step: int, steps: int) -> bool:
        """Tell whether the last step was one of the last phase: weights from before it lack what that phase teaches."""
        return self.loss.at(step - 1, steps) == self.loss.at(steps - 1, steps)

    def collate(self, batch: list[TitleSample]) -> dict[str, Any]:
        """Return the `histories` with their `targets` and `users`, the `rows` of items, and the `seeds` of masks."""
        return {
            "histories": [[int(row) for row in each.sample.history] for each in batch],
            "targets": [each.sample.target for each in batch],
            "users": [each.sample.user for each in batch],
            "rows": torch.tensor([each.item for each in batch]),
            "seeds": [each.seed for each in batch],
        }

    def named(self, batch: dict[str, Any]) -> str:
        """Return the users and the items, as rows of their files."""
        if self.phase == CSFT:
            return f"users (rows of sequences.parquet) {batch['users']}"
        return f"items (rows of items.parquet) {batch['rows'].tolist()}"

    def forward(  # type: ignore[override]
        self,
        histories: Sequence[Sequence[int]],
        targets: Sequence[int],
        users: Sequence[int],
        rows: Tensor,
        seeds: Sequence[tuple[int, ...]],
        with_gradients: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
        """Return the loss of the present phase, values to log, and no alignment, because there is one modality.

        Args:
            histories: B histories as item rows, for CSFT.
            targets: their next items.
            users: rows of the users; not used.
            rows: (B,) item rows, for MNTP and SimCSE.
            seeds: seeds of the masks of these items.
            with_gradients: not used.
        """
        log = {"phase": torch.tensor(float(self.phase)), "effective_negatives": torch.tensor(0.0)}
        if self.phase == SIMCSE:
            vectors = self.encode([[row] for row in rows.repeat(2).tolist()])[schema.FUSED]
            log["effective_negatives"] = effective_negatives(rows).float().mean()
            return self.loss(*vectors.split(len(rows)), rows), log, {}
        if self.phase == CSFT:
            moments = list(zip(histories, targets, strict=True))
            parts = self.in_chunks(lambda chunk: self._next_titles(chunk), moments)
        else:
            masked = list(zip(rows.tolist(), seeds, strict=True))
            parts = self.in_chunks(lambda chunk: self._masked_tokens(chunk), masked)
        return parts["nll"].sum() / parts[_TOKENS].sum().clamp_min(1), log, {}

    def _next_titles(self, moments: Sequence[tuple[Sequence[int], int]]) -> dict[str, Tensor]:
        """Return of each history the negative log-likelihood of the next title's tokens, and their number."""
        prompts, first = [], []
        for history, target in moments:
            ids, own = next_title(self.encoder, self.items.titles(history), self.items.titles([target])[0])
            prompts.append([*ids, *own])
            first.append(len(ids))
        states = self.encoder.backbone.encode_states(prompts, bidirectional=False)
        wanted = [list(range(start, len(ids))) for start, ids in zip(first, prompts, strict=True)]
        return self._likelihood(states, prompts, wanted)

    def _masked_tokens(self, items: Sequence[tuple[int, tuple[int, ...]]]) -> dict[str, Tensor]:
        """Return of each title the negative log-likelihood of its masked tokens, and their number."""
        backbone, prompts, shown, wanted = self.encoder.backbone, [], [], []
        rows, seeds = zip(*items, strict=True)
        for title, seed in zip(self.items.titles(rows), seeds, strict=True):
            ids = self.encoder.tokenize_title(title)
            masked, places = mask_tokens(ids, backbone.mask_id, len(backbone.tokenizer), np.random.default_rng(seed))
            prompts.append(ids)
            shown.append(masked)
            wanted.append(places)
        return self._likelihood(backbone.encode_states(shown, bidirectional=True), prompts, wanted)

    def _likelihood(
        self, states: Sequence[Tensor], prompts: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]
    ) -> dict[str, Tensor]:
        """Return the negative log-likelihood of the wanted tokens of each prompt, each from the state before it."""
        device = states[0].device
        before = [own[[place - 1 for place in places]] for own, places in zip(states, wanted, strict=True)]
        logits = self.encoder.backbone.logits(torch.cat(before)).float()
        expected = [ids[place] for ids, places in zip(prompts, wanted, strict=True) for place in places]
        each = F.cross_entropy(logits, torch.tensor(expected, device=device), reduction="none")
        counts = [len(places) for places in wanted]
        return {
            "nll": torch.stack([part.sum() for part in each.split(counts)]),
            _TOKENS: torch.tensor(counts, device=device),
        }


def next_title(encoder: ItemEncoder, history: Sequence[str], target: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a history, its titles with commas between, and those of the next title with its end."""
    tokenizer = encoder.backbone.tokenizer
    ids = encoder.backbone.tokenize((", ".join(history) + ", ",)).ids
    own = list(tokenizer(f"{target}\n", add_special_tokens=False)["input_ids"])
    return ids, own if tokenizer.eos_token_id is None else [*own, tokenizer.eos_token_id]


def mask_tokens(
    ids: Sequence[int], mask_id: int, vocabulary: int, random: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Return a title's tokens with some masked, and the places of these, in order.

    Every token but the first, which nothing precedes, is chosen with probability `MASKED`; at least one is, if there
    are two.
    """
    chosen = np.flatnonzero(random.random(len(ids) - 1) < MASKED) + 1
    if len(ids) > 1 and not len(chosen):
        chosen = random.integers(1, len(ids), 1)
    shown = list(ids)
    for place in chosen.tolist():
        kind = random.random()
        if kind < 0.9:
            shown[place] = mask_id if kind < 0.8 else int(random.integers(vocabulary))
    return shown, chosen.tolist()
