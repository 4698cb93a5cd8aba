"""The gates before any claim: whether the paradox and its cure can be tested in a study at all.

Each gate has a number, a threshold and a status. If one has failed or was not measured, the claims that need it are
"not testable here". A study without the conditions of the paper says nothing about the paper.

The weak view is the modality with the lower S before training. It is found from the data and may be the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import polars as pl

from vlm2rec.downstream.evaluation.protocol import pair_name
from vlm2rec.downstream.evaluation.statistics import Spread
from vlm2rec.embedder.contract import schema
from vlm2rec.pipelines.experiments.methods import Role
from vlm2rec.pipelines.reporting.contrasts import Contrast, Measured, Quantity, has
from vlm2rec.pipelines.reporting.tables import Results, number

Status = Literal["passed", "failed", "not measured"]
PASSED: Final = "passed"
FAILED: Final = "failed"
UNMEASURED: Final = "not measured"
NARROW = (1.0, 1.03)
"""S of the weak view before training: at 1 it separates nothing, and a view far above is not weak."""
LEARNED = 0.3
"""Training loss below which one view alone is a sufficient shortcut."""
_ALONE: dict[str, Role] = {schema.TEXT: "text_only", schema.IMAGE: "image_only"}


@dataclass(frozen=True)
class Gate:
    """One condition, the numbers that decide it, and whether it is met."""

    key: str
    text: str
    threshold: str
    found: str
    status: Status


@dataclass(frozen=True)
class Views:
    """Which modality is weak and which is strong: S of the weak one is the lower, before training."""

    weak: str
    strong: str

    @property
    def w2w(self) -> str:
        """The pair that ranks by the weak view alone, such as `v2v`."""
        return pair_name(self.weak, self.weak)

    @property
    def w2f(self) -> str:
        """Weak user view against fused items, such as `v2f`."""
        return pair_name(self.weak, schema.FUSED)

    @property
    def s2f(self) -> str:
        """Strong user view against fused items, such as `t2f`."""
        return pair_name(self.strong, schema.FUSED)


def views_of(results: Results) -> Views | None:
    """Return the weak and the strong view of a study; None if the untrained backbone was not evaluated."""
    vanilla = results.role("vanilla")
    s = {view: found["S"].mean for view in schema.MODALITIES if (found := _geometry(results, vanilla, view))}
    if len(s) < len(schema.MODALITIES):
        return None
    weak, strong = sorted(s, key=lambda view: s[view])
    return Views(weak, strong)


def _geometry(results: Results, method: str | None, view: str) -> Mapping[str, Spread] | None:
    return None if method is None else results.geometry(method, view)


def contrasts(results: Results, views: Views) -> dict[str, Contrast]:
    """Return the differences that gates need, by gate."""
    found = {}
    vanilla, alone = results.role("vanilla"), results.role(_ALONE[views.weak])
    if vanilla:
        strong, weak = (Quantity(vanilla, f"S {view}") for view in (views.strong, views.weak))
        found["imbalance"], found["narrow"] = Contrast(strong, weak), Contrast(weak)
    if vanilla and alone:
        # of a model of one view, the fused vector is that view
        own = next((q for q in (Quantity(alone, views.w2w), Quantity(alone, "f2f")) if has(results, q)), None)
        if own:
            found["learnable"] = Contrast(own, Quantity(vanilla, views.w2w))
    return found


def gates(results: Results, views: Views | None, measured: Mapping[Contrast, Measured]) -> list[Gate]:
    """Return every gate of a study, with what was found.

    Args:
        results: the study's tables.
        views: the weak and the strong view, if they are known.
        measured: the differences of `contrasts`.
    """
    if views is None:
        found = "the untrained backbone (role vanilla) was not evaluated with both views"
        return [Gate("imbalance", "One view is weaker than the other before training", "S", found, UNMEASURED)]
    of = {key: measured.get(contrast) for key, contrast in contrasts(results, views).items()}
    found_gates = [_imbalance(results, views, of.get("imbalance")), _narrow(results, views, of.get("narrow"))]
    if views.weak == schema.IMAGE:
        found_gates.append(_looks(results))
    return [*found_gates, _learnable(views, of.get("learnable")), _shortcut(results, views)]


def _s(results: Results, view: str) -> float:
    vanilla = results.role("vanilla")
    found = results.geometry(vanilla, view) if vanilla else None
    assert found is not None, "the views are known from it"
    return found["S"].mean


def _imbalance(results: Results, views: Views, found: Measured | None) -> Gate:
    text = f"Before training, the {views.strong} separates items better than the {views.weak}"
    threshold = f"S {views.strong} > S {views.weak}, interval over users above 0"
    if found is None:
        both = (f"S {view} {number(_s(results, view), 3)}" for view in (views.strong, views.weak))
        numbers = f"{', '.join(both)}; its evaluation, of an earlier version, has no distances per user"
        return Gate("imbalance", text, threshold, numbers, UNMEASURED)
    return Gate("imbalance", text, threshold, found.text, PASSED if found.low > 0 else FAILED)


def _narrow(results: Results, views: Views, found: Measured | None) -> Gate:
    low, high = NARROW
    s = _s(results, views.weak)
    return Gate(
        "narrow",
        f"Before training, the {views.weak} separates a little, and hardly",
        f"S {views.weak} from {low:.2f} to {high:.2f}",
        f"S {views.weak} {number(s, 4)}" if found is None else f"S {views.weak} {found.text}",
        PASSED if low <= s <= high else FAILED,
    )


def _looks(results: Results) -> Gate:
    text = "A linear probe reads looks from the image tokens of the untrained backbone"
    threshold = "held-out accuracy above that of the commonest label, interval above 0"
    probe = results.facts.get("looks")
    if probe is None:
        found = "no column of items.parquet is named (`looks:` of the study), or its step is not done"
        return Gate("looks", text, threshold, found, UNMEASURED)
    if probe.get("reason"):
        return Gate("looks", text, threshold, f"column {probe['column']}: {probe['reason']}", UNMEASURED)
    numbers = (
        f"column {probe['column']}, {probe['labels']} labels: {number(probe['accuracy'], 3)} −"
        f" {number(probe['commonest'], 3)} = {number(probe['gain'], 3, True)}"
        f" [{number(probe['low'], 3, True)}, {number(probe['high'], 3, True)}], {probe['held_out']:,} held-out items"
    )
    return Gate("looks", text, threshold, numbers, PASSED if probe["low"] > 0 else FAILED)


def _learnable(views: Views, found: Measured | None) -> Gate:
    text = f"The {views.weak} can be learned: SFT of it alone ranks better than the untrained {views.weak}"
    threshold = f"N@20 {views.w2w}, interval over users above 0"
    if found is None:
        numbers = f"no method has the role {_ALONE[views.weak]}, or it was not evaluated per user"
        return Gate("learnable", text, threshold, numbers, UNMEASURED)
    return Gate("learnable", text, threshold, found.text, PASSED if found.low > 0 else FAILED)


def _shortcut(results: Results, views: Views) -> Gate:
    text = f"The {views.strong} is a sufficient shortcut: SFT of the {views.strong} alone brings its training loss down"
    threshold = f"training loss at the end below {number(LEARNED, 1)}"
    alone = results.role(_ALONE[views.strong])
    losses = last_losses(results, alone) if alone else ()
    if not len(losses):
        numbers = f"no method has the role {_ALONE[views.strong]}, or it has no training curve"
        return Gate("shortcut", text, threshold, numbers, UNMEASURED)
    mean = float(np.mean(losses))
    numbers = f"loss {number(mean, 3)}, mean of the last tenth of the run"
    if len(losses) > 1:
        numbers += f" and of {len(losses)} seeds ({number(min(losses), 3)} to {number(max(losses), 3)})"
    return Gate("shortcut", text, threshold, numbers, PASSED if mean < LEARNED else FAILED)


def last_losses(results: Results, method: str) -> Sequence[float]:
    """Return, for each seed, the mean training loss over the last tenth of the steps; empty without a curve."""
    curves = results.frames["curves"]
    loss = (pl.col("method") == method) & (pl.col("kind") == "train") & (pl.col("name") == "loss")
    rows = curves.filter(loss).sort("seed", "step")
    found = []
    for _, each in rows.group_by("seed", maintain_order=True):
        late = each.filter(pl.col("step") > 0.9 * pl.col("step").max())
        found.append(float(late["value"].to_numpy().mean()))
    return found
