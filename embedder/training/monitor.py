"""Detects when a modality's vectors collapse: rules over the probes of a fine-tuning run.

A probe is a row of numbers, measured on the same users and items each time: `step`, and per view `S_<view>` (Eq. 5),
`A_pos_<view>`, `A_neg_<view>`, `U_<view>` (Eq. 4) and `rank_<view>`, the effective rank. This module only reads such
rows; the caller measures them.

Three rules compare each probe with the run's first probe. That one measured the vanilla backbone, unless the run was
resumed without it:

- `behind`: a modality's S is at or below its first value while the other's is more than `RISE` above its own, in
  each of the last `PATIENCE` probes. Training improves one modality at the other's cost: the paper's modality collapse.
  The rule does not apply while either is `narrow`: the ratio of two vanishing distances rises and falls by chance.
- `flat`: a modality's effective rank is below `RANK_SHARE` of its first value in each of the last `PATIENCE` probes.
  Its vectors span fewer directions, whatever S is.
- `narrow`: its A_neg, the mean squared distance of a user to other items, is below `SPREAD_SHARE` of its first value in
  each of the last `PATIENCE` probes. All vectors move to one point; S, a ratio, may still look good.

A fall of the rank below `STEEP_SHARE` of its first value is no noise and is reported at once.

A fourth rule reads the training curves, which have a row every few steps and cost nothing:

- `starved`: since the first row a modality's margin (Eq. 6) has gained more than `GAIN`, and the other's less than
  `FOLLOWS` of that, in each of the last `PATIENCE` rows. The loss falls by one modality alone. S need not show it.

With internal fusion there are no vectors of one modality, so `flat` and `narrow` judge the fused vectors.

One probe alone proves nothing: S of a few dozen users varies by a percent or two from probe to probe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vlm2rec.embedder.contract import schema

PATIENCE = 3
RISE = 0.02
RANK_SHARE = 0.5
STEEP_SHARE = 0.25
SPREAD_SHARE = 0.25
GAIN = 0.05
FOLLOWS = 0.1

Rule = Literal["behind", "flat", "narrow", "starved"]
Row = Mapping[str, float]


@dataclass(frozen=True)
class Probe:
    """How a run is measured: on how many users, and how often.

    Args:
        users: their number; rows of another number are not comparable and start a new history.
        measure: encodes the users and their items with the current weights, and returns a row without its step.
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
    """The collapse of one view, reported after it has lasted for `PATIENCE` probes or rows, or at once if it is steep.

    Args:
        step: training step of the probe or row that reports it.
        view: fused, text or image.
        rule: `behind`, `flat`, `narrow` or `starved`.
        message: what was measured, in a sentence.
        until: step of the first probe or row at which it had ended; None if it lasted to the last probe.
    """

    step: int
    view: str
    rule: Rule
    message: str
    until: int | None = None


def collapses(probes: Sequence[Row]) -> list[Collapse]:
    """Return every collapse that a run's probes show, in the order in which they were reported.

    Args:
        probes: rows in order of steps, the first one to compare with. If a row lacks a view (internal fusion, one view
            alone, a vector that was not finite), that view is not judged at that row.
    """
    found = [collapse for view in _judged(probes) for rule in _OF_PROBES for collapse in _episodes(probes, view, rule)]
    return by_step(found)


def starved(rows: Sequence[Row]) -> list[Collapse]:
    """Return every stretch of a training curve in which one modality's margin grows and the other's stays behind.

    Args:
        rows: rows of the training curve in order of steps, with `margin_text` and `margin_image` (Eq. 6); rows without
            both are left out. The first one is compared with.
    """
    both = [row for row in rows if {f"margin_{view}" for view in schema.MODALITIES} <= row.keys()]
    return by_step([found for view in schema.MODALITIES for found in _episodes(both, view, "starved")])


def by_step(*found: Sequence[Collapse]) -> list[Collapse]:
    """Return collapses in the order in which they were reported."""
    return sorted((collapse for part in found for collapse in part), key=lambda collapse: collapse.step)


def _judged(probes: Sequence[Row]) -> tuple[str, ...]:
    """Return the modalities that the probes measured, or else fused, which depends on the modalities."""
    own = tuple(view for view in schema.MODALITIES if any(f"S_{view}" in row for row in probes))
    return own or (schema.FUSED,)


def _episodes(probes: Sequence[Row], view: str, rule: Rule) -> list[Collapse]:
    """Return the stretches of rows in which a rule holds for a view: `PATIENCE` rows at least, or steep ones."""
    episodes: list[Collapse] = []
    run, told = 0, False
    for index, row in enumerate(probes):
        step = int(row["step"])
        if index and _HOLDS[rule](probes[0], row, view):
            run += 1
            if not told and (run == PATIENCE or _is_steep(probes[0], row, view, rule)):
                episodes.append(Collapse(step, view, rule, _message(probes[0], row, view, rule)))
                told = True
            continue
        if told:
            episodes[-1] = replace(episodes[-1], until=step)
        run, told = 0, False
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


def _is_steep(first: Row, row: Row, view: str, rule: Rule) -> bool:
    return rule == "flat" and _has_shrunk(first, row, f"rank_{view}", STEEP_SHARE)


def _is_starved(first: Row, row: Row, view: str) -> bool:
    own, other = (row[f"margin_{side}"] - first[f"margin_{side}"] for side in (view, _other(view)))
    return other > GAIN and own < FOLLOWS * other


def _has_shrunk(first: Row, row: Row, key: str, share: float) -> bool:
    return key in first and key in row and row[key] < share * first[key]


_OF_PROBES: dict[Rule, Callable[[Row, Row, str], bool]] = {
    "behind": _is_behind,
    "flat": _is_flat,
    "narrow": _is_narrow,
}
_HOLDS: dict[Rule, Callable[[Row, Row, str], bool]] = {**_OF_PROBES, "starved": _is_starved}


def _message(first: Row, row: Row, view: str, rule: Rule) -> str:
    start = f"at step {first['step']:.0f}"
    if rule == "flat":
        now, before = row[f"rank_{view}"], first[f"rank_{view}"]
        steep = _is_steep(first, row, view, rule)
        below = f"{STEEP_SHARE:.0%} of it" if steep else f"{RANK_SHARE:.0%} of it for {PATIENCE} probes"
        return (
            f"the {view} vectors span fewer directions: effective rank {now:.1f}, {before:.1f} {start}, below {below}"
        )
    if rule == "starved":
        own, other = f"margin_{view}", f"margin_{_other(view)}"
        return (
            f"training moves {_other(view)} alone: its margin went from {first[other]:.3f} {start} to {row[other]:.3f},"
            f" that of {view} from {first[own]:.3f} to {row[own]:.3f}"
        )
    if rule == "narrow":
        now, before = row[f"A_neg_{view}"], first[f"A_neg_{view}"]
        return (
            f"the {view} vectors move to one point: mean squared distance of a user to other items"
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
