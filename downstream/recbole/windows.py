"""Trains SASRec and GRU4Rec on all positions of a sequence at once, in place of RecBole's row for every prefix.

    train_positions: all      # last: RecBole's rows, one for every prefix, which learn their last position. The default

A causal model computes the states of all prefixes when it reads the whole sequence, so one row may serve several
targets. A sequence of more than `MAX_ITEM_LIST_LENGTH` = L items is cut into windows of L items, each starting L/2
items after the one before. A window learns the targets that no earlier one has: every target is learned once an epoch,
as with RecBole's rows, and sees at least L/2 items before it, or all there are. RecBole shows it the last L.

Validation and test are RecBole's: each user's last L items.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from torch import Tensor

from vlm2rec.downstream.options import Positions
from vlm2rec.embedder.contract.errors import ConfigError

KEY = "train_positions"
TARGETS = "window_targets"  # column of a training row: the next item at every position, 0 where nothing is learned
CAUSAL = ("SASRec", "GRU4Rec")


def read_positions(settings: Mapping[str, Any], has_folder: bool) -> Positions:
    """Return which positions a run learns.

    Args:
        settings: RecBole's keys.
        has_folder: the data are a dataset folder.

    Raises:
        ConfigError: another value; or `all` with a model, a loss or data that it cannot serve.
    """
    value = settings.get(KEY, "last")
    if value not in get_args(Positions):
        raise ConfigError(f"{KEY}: {value!r}", f"one of {', '.join(get_args(Positions))}", "correct the value")
    if value == "all":
        back = f"leave out {KEY} (--positions last)"
        if settings.get("model") not in CAUSAL:
            expected = f"a model that reads from left to right: {' or '.join(CAUSAL)}"
            raise ConfigError(f"{KEY}: all with {settings.get('model')}", expected, back)
        if settings.get("loss_type", "CE") != "CE":
            raise ConfigError(f"{KEY}: all with loss_type {settings['loss_type']}", "loss_type: CE", back)
        if not has_folder:
            raise ConfigError(f"{KEY}: all with a dataset of RecBole", "a dataset folder (--data)", back)
    return value


def is_set(settings: Mapping[str, Any]) -> bool:
    """Tell whether checked settings ask for all positions."""
    return settings.get(KEY) == "all"


@dataclass(frozen=True)
class Windows:
    """Rows of several sequences that lie one after the other in one array of items; the arrays have W entries."""

    sequence: np.ndarray  # the sequence it is of
    start: np.ndarray  # its first item, in the array
    length: np.ndarray  # how many items it reads
    learned: np.ndarray  # of how many, at its end, it learns the next item


def windows(begin: np.ndarray, lengths: np.ndarray, longest: int) -> Windows:
    """Cut sequences into windows, so that the item after every position is the target of exactly one of them.

    Args:
        begin: first item of each sequence, in the array of all (S,).
        lengths: items of each sequence (S,); a sequence of one item has no target.
        longest: L, the most items that a window reads.
    """
    targets = np.maximum(lengths - 1, 0)
    step = -(-longest // 2)
    counts = np.where(targets > longest, 1 + -(-(targets - longest) // step), targets > 0).astype(np.int64)
    sequence = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)
    end = np.minimum(longest + number * step, targets[sequence])  # items read so far; as many targets are learned
    before = np.where(number > 0, longest + (number - 1) * step, 0)
    length = np.minimum(end, longest)
    return Windows(sequence, begin[sequence] + end - length, length, end - before)


def lists(items: np.ndarray, found: Windows, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the items that windows read and the targets that they learn, (W, L) each, 0 where there is none."""
    read, targets = np.zeros((2, len(found.start), longest), np.int64)
    for position in range(longest):
        filled = position < found.length
        read[filled, position] = items[(found.start + position)[filled]]
        learned = filled & (position >= found.length - found.learned)
        targets[learned, position] = items[(found.start + position + 1)[learned]]
    return read, targets


def rows_in_batch(lengths: np.ndarray, longest: int, size: int) -> int:
    """Return how many windows have about as many targets as `size` of RecBole's rows, which have one each.

    Args:
        lengths: items of each sequence (S,).
        longest: L, the most items that a window reads.
        size: targets in a batch.
    """
    learned = windows(np.zeros_like(lengths), lengths, longest).learned
    return max(1, round(size * len(learned) / max(1, learned.sum())))


def states_and_targets(model: Any, interaction: Any) -> tuple[Tensor, Tensor]:
    """Return the states of a batch that have a target, (T, d), and these targets, (T,)."""
    targets = interaction[TARGETS]  # (B, L)
    own = model.gather_indexes  # takes each row's last state; here all are wanted
    model.gather_indexes = lambda states, index: states
    try:
        states = model.forward(interaction[model.ITEM_SEQ], interaction[model.ITEM_SEQ_LEN])  # (B, L, d)
    finally:
        model.gather_indexes = own
    learned = targets > 0
    return states[learned], targets[learned]
