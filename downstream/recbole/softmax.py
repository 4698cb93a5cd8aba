"""The loss of SASRec and GRU4Rec over all items, or over some that are drawn for a step (sampled softmax).

    train_softmax: sampled         # full: over all items. The default
    train_softmax_samples: 4096    # items that are drawn for a step

The candidates C of a step are the targets of its batch, and S items drawn uniformly and without repeats; every target
of the batch shares them. With the scores s of a target t, and the probability π_j that C holds item j,

    loss = −s_t + log( exp(s_t) + Σ exp(s_j − log π_j) ),   summed over j ∈ C without t, each once
    1 − π_j = (1 − S/I) · (1 − n_j/(N − 1))^(T − 1)

for I items, T targets in the batch, and n_j of the N training targets. This is the logQ correction (Bengio & Senécal
2008; Yi et al. 2019): the expected sum is that of the full softmax. The target itself is always there, so its score is
not corrected, and it does not count again where another row or the draw has it. With S = I it is the full softmax.

The N targets are taken to be in random order. Those of one window (`train_positions: all`) are of one user, which π
leaves out. RecBole's full softmax has its padding row as one more item; it is no candidate here.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm2rec.downstream.options import Softmax
from vlm2rec.downstream.recbole.item_embedding import ItemEmbedding
from vlm2rec.downstream.recbole.windows import CAUSAL
from vlm2rec.embedder.contract.errors import ConfigError

KEY, SAMPLES = "train_softmax", "train_softmax_samples"
DEFAULT_SAMPLES = 4096
Table = nn.Embedding | ItemEmbedding
Loss = Callable[[Table, Tensor, Tensor], Tensor]
"""Called with an item table, states (T, d) and targets (T,); returns the mean loss over targets."""


def read_samples(settings: Mapping[str, Any]) -> int | None:
    """Return how many items a step draws, or None for the full softmax.

    Args:
        settings: RecBole's keys.

    Raises:
        ConfigError: a value out of range; or `sampled` with a model or a loss that it cannot serve.
    """
    value, samples = settings.get(KEY, "full"), settings.get(SAMPLES, DEFAULT_SAMPLES)
    if value not in get_args(Softmax):
        raise ConfigError(f"{KEY}: {value!r}", f"one of {', '.join(get_args(Softmax))}", "correct the value")
    if value == "full":
        if SAMPLES in settings:
            raise ConfigError(
                f"{SAMPLES}: {samples!r} with {KEY}: full, which draws nothing",
                f"{KEY}: sampled (--softmax sampled)",
                f"add it, or remove {SAMPLES} (--samples)",
            )
        return None
    back = f"leave out {KEY} (--softmax full)"
    if type(samples) is not int or samples < 1:
        raise ConfigError(f"{SAMPLES}: {samples!r}", "a number of items from 1", "correct the value")
    if settings.get("model") not in CAUSAL:
        raise ConfigError(f"{KEY}: sampled with {settings.get('model')}", f"one of {', '.join(CAUSAL)}", back)
    if settings.get("loss_type", "CE") != "CE":
        found = f"{KEY}: sampled with loss_type {settings['loss_type']}, which has negatives of its own"
        raise ConfigError(found, "loss_type: CE", back)
    return samples


def learn(model: Any, read: Callable[[Any, Any], tuple[Tensor, Tensor]], loss: Loss) -> None:
    """Give a model of RecBole another loss, in place. With an alignment (`alignment.align`) it has two parts.

    Args:
        model: a SASRec or GRU4Rec.
        read: takes model and batch; returns states (T, d) and targets (T,).
        loss: the loss of these.
    """

    def calculate_loss(model: Any, interaction: Any) -> Tensor | tuple[Tensor, Tensor]:
        states, targets = read(model, interaction)
        recommend = loss(model.item_embedding, states, targets)
        if not hasattr(model, "alignment"):
            return recommend
        return recommend, model.alignment(model.item_embedding, targets)

    model.calculate_loss = types.MethodType(calculate_loss, model)


def last_states(model: Any, interaction: Any) -> tuple[Tensor, Tensor]:
    """Return the last state of each row, (B, d), and its target, (B,): what RecBole's rows learn."""
    states = model.forward(interaction[model.ITEM_SEQ], interaction[model.ITEM_SEQ_LEN])
    return states, interaction[model.POS_ITEM_ID]


def full_softmax(table: Table, states: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy over all rows of the table."""
    logits = torch.matmul(states, table.weight.transpose(0, 1))  # (T, I + 1)
    return F.cross_entropy(logits, targets)


class SampledSoftmax:
    """The loss over the targets of a batch and some items that are drawn for it.

    Args:
        frequency: how many training targets each row of the table is, (I + 1,); row 0 is the padding.
        samples: items that are drawn for a step; more than there are: all of them.
    """

    def __init__(self, frequency: Tensor, samples: int) -> None:
        self.items = len(frequency) - 1
        self.samples = min(samples, self.items)
        share = frequency.double() / (frequency.sum() - 1).clamp(min=1)
        self._not_the_target = torch.log1p(-share.clamp(max=1))  # (I + 1,): log(1 − n_j/(N − 1))

    def __call__(self, table: Table, states: Tensor, targets: Tensor) -> Tensor:
        """Draw candidates, and return the loss as `Loss` says."""
        drawn = self.draw().to(targets.device)
        return self.of(table, states, targets, torch.unique(torch.cat([drawn, targets])))

    def of(self, table: Table, states: Tensor, targets: Tensor, candidates: Tensor) -> Tensor:
        """Return the loss over some candidates: rows of the table in ascending order, the targets among them (C,)."""
        places = torch.searchsorted(candidates, targets)[:, None]
        log_held = self.log_held(candidates, len(targets)).to(states)
        logits = torch.matmul(states, table(candidates).transpose(0, 1)) - log_held  # (T, C)
        # in place: the logits of a step are its largest tensor
        logits.scatter_add_(1, places, log_held[places])
        return F.cross_entropy(logits, places[:, 0])

    def log_held(self, rows: Tensor, targets: int) -> Tensor:
        """Return log π of rows of the table, (C,) float64, for a batch of so many targets; see the module."""
        if self._not_the_target.device != rows.device:
            self._not_the_target = self._not_the_target.to(rows.device)
        # log1p(-1) is -inf: with all drawn, π is 1
        not_drawn = math.log1p(-self.samples / self.items) if self.samples < self.items else -math.inf
        others = self._not_the_target[rows] * (targets - 1) if targets > 1 else torch.zeros_like(rows).double()
        return torch.log(-torch.expm1(not_drawn + others))

    def draw(self) -> Tensor:
        """Draw different rows of the table uniformly, (S,)."""
        if 2 * self.samples > self.items:
            return torch.randperm(self.items)[: self.samples] + 1
        drawn = torch.empty(0, dtype=torch.long)
        while len(drawn) < self.samples:  # not a permutation of all: that takes longer than the rest of a step
            more = torch.randint(1, self.items + 1, (2 * (self.samples - len(drawn)),))
            drawn = torch.unique(torch.cat([drawn, more]))
        return drawn[torch.randperm(len(drawn))[: self.samples]]
