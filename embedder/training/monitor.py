"""When the space of a modality collapses: rules over the probes of a fine-tuning run.

A probe is a row of numbers, measured on the same users and items each time: `step`, and per view `S_<view>` (Eq. 5),
`A_pos_<view>`, `A_neg_<view>`, `U_<view>` (Eq. 4) and `rank_<view>`, the effective rank. This module only reads such
rows; who measures them is the caller's business.

Three rules, each judged against the run's first probe, which is the vanilla backbone unless the run was resumed
without one:

- `behind`: a modality's S is at or below its first value while the other's is more than `RISE` above its own, in
  each of the last `PATIENCE` probes. Training serves one modality at the other's cost: the paper's modality collapse.
  Not judged while either is `narrow`: the ratio of two vanishing distances goes up and down by itself.
- `flat`: a modality's effective rank is below `RANK_SHARE` of its first value in each of the last `PATIENCE` probes.
  Its vectors have gathered in fewer directions, whatever S says.
- `narrow`: its A_neg, the mean squared distance of a user to other items, is below `SPREAD_SHARE` of its first value in
  each of the last `PATIENCE` probes. Everything is drawing together into one point, where S, a ratio, may look well.

With internal fusion, which has no vectors of one modality, the fused vectors are judged by the last two.

One probe alone proves nothing: S of a few dozen users moves by a percent or two from probe to probe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vlm2rec.embedder.contract import schema

PATIENCE = 3
RISE = 0.02
RANK_SHARE = 0.5
SPREAD_SHARE = 0.25

Rule = Literal["behind", "flat", "narrow"]
Row = Mapping[str, float]


@dataclass(frozen=True)
class Probe:
    """How a run measures itself: on which users, and how often.

    Args:
        users: how many; rows measured on another number are not comparable and start a new history.
        measure: encodes them and their items with the weights of the moment, and returns a row without its step.
        steps: training steps between two probes; 0 chooses a twentieth of the run, at least 10.
    """

    users: int
    measure: Callable[[], dict[str, float]]
    steps: int = 0

    def interval(self, total: int) -> int:
        """Return the steps between two probes of a run of `total` steps."""
        return self.steps or max(10, total // 20)


@dataclass(frozen=True)
class Collapse:
    """One view in trouble, from the probe at which it had lasted long enough to be called so.

    Args:
        step: training step of that probe.
        view: fused, text or image.
        rule: `behind`, `flat` or `narrow`.
        message: what was measured, in a sentence.
        until: step of the first probe at which it was over; None if it lasted to the last one.
    """

    step: int
    view: str
    rule: Rule
    message: str
    until: int | None = None


def collapses(probes: Sequence[Row]) -> list[Collapse]:
    """Return every collapse that a run's probes show, in the order in which they were noticed.

    Args:
        probes: rows in order of steps, the first one to compare with. A view that a row does not hold (internal
            fusion, one view alone, a vector that was not finite) is not judged there.
    """
    found = [collapse for view in _judged(probes) for rule in _HOLDS for collapse in _episodes(probes, view, rule)]
    return sorted(found, key=lambda collapse: collapse.step)


def _judged(probes: Sequence[Row]) -> tuple[str, ...]:
    """Return the modalities that are there, or fused where there is nothing else: it follows from its parts."""
    own = tuple(view for view in schema.MODALITIES if any(f"S_{view}" in row for row in probes))
    return own or (schema.FUSED,)


def _episodes(probes: Sequence[Row], view: str, rule: Rule) -> list[Collapse]:
    """Return the stretches of at least `PATIENCE` probes in which a rule holds for a view."""
    episodes: list[Collapse] = []
    run = 0
    for place, row in enumerate(probes):
        step = int(row["step"])
        if place and _HOLDS[rule](probes[0], row, view):
            run += 1
            if run == PATIENCE:
                episodes.append(Collapse(step, view, rule, _message(probes[0], row, view, rule)))
            continue
        if run >= PATIENCE:
            episodes[-1] = replace(episodes[-1], until=step)
        run = 0
    return episodes


def _is_behind(first: Row, row: Row, view: str) -> bool:
    if view not in schema.MODALITIES:
        return False
    own, other = f"S_{view}", f"S_{_other(view)}"
    if not {own, other} <= first.keys() & row.keys():
        return False
    if any(_is_narrow(first, row, side) for side in schema.MODALITIES):
        return False
    return row[own] <= first[own] and row[other] > (1 + RISE) * first[other]


def _is_flat(first: Row, row: Row, view: str) -> bool:
    return _has_shrunk(first, row, f"rank_{view}", RANK_SHARE)


def _is_narrow(first: Row, row: Row, view: str) -> bool:
    return _has_shrunk(first, row, f"A_neg_{view}", SPREAD_SHARE)


def _has_shrunk(first: Row, row: Row, key: str, share: float) -> bool:
    return key in first and key in row and row[key] < share * first[key]


_HOLDS: dict[Rule, Callable[[Row, Row, str], bool]] = {"behind": _is_behind, "flat": _is_flat, "narrow": _is_narrow}


def _message(first: Row, row: Row, view: str, rule: Rule) -> str:
    start = f"at step {first['step']:.0f}"
    if rule == "flat":
        now, before = row[f"rank_{view}"], first[f"rank_{view}"]
        return (
            f"the {view} vectors have gathered in fewer directions: effective rank {now:.1f}, {before:.1f} {start},"
            f" below {RANK_SHARE:.0%} of it for {PATIENCE} probes"
        )
    if rule == "narrow":
        now, before = row[f"A_neg_{view}"], first[f"A_neg_{view}"]
        return (
            f"the {view} vectors are drawing together into one point: mean squared distance of a user to other items"
            f" {now:.3g}, {before:.3g} {start}, below {SPREAD_SHARE:.0%} of it for {PATIENCE} probes"
        )
    own, other = f"S_{view}", f"S_{_other(view)}"
    return (
        f"{view} falls behind while {_other(view)} gains: S of {view} is {row[own]:.3f}, {first[own]:.3f} {start}, and"
        f" has not been above that for {PATIENCE} probes; S of {_other(view)} rose from {first[other]:.3f} to"
        f" {row[other]:.3f}"
    )


def _other(view: str) -> str:
    return schema.IMAGE if view == schema.TEXT else schema.TEXT
