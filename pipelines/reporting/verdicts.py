"""The claims of the paper, and whether they hold in this study: each claim with the numbers that decide it.

Two claims are the paper's own, and have parts that all have to hold:

    paradox  SFT neglects the weak view, and one view alone then ranks better than both together
    cure     the reference ranks better than SFT and its rivals, by both views together and by the weak one

A part is a difference with its interval over users. It holds if the interval is on the claim's side of 0, does not hold
if it is on the other, and is undecided if it contains 0. The parts of the cure are many, so one Holm correction covers
them, and p has to be .05 or less too. If a gate (`gates`) has failed or was not measured, no part is testable here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from vlm2rec.downstream.evaluation.protocol import pair_name
from vlm2rec.downstream.evaluation.statistics import holm, t_quantile
from vlm2rec.embedder.contract import schema
from vlm2rec.pipelines.experiments.methods import ABLATION, Role
from vlm2rec.pipelines.reporting import gates
from vlm2rec.pipelines.reporting.contrasts import Contrast, Measured, Quantity, measure
from vlm2rec.pipelines.reporting.gates import PASSED, Gate, Views
from vlm2rec.pipelines.reporting.tables import SFT_ROW, VANILLA_ROW, Results, number, p_value

HOLDS, FAILS, OPEN, UNTESTABLE = "holds", "does not hold", "undecided", "not testable here"
PARADOX, CURE, PAPER = "paradox", "cure", "paper"
ALPHA = 0.05
FEWEST_STEPS = 10
"""Comparisons of gradients that a rise and a fall need; with fewer than three seeds, twice as many."""


@dataclass(frozen=True)
class Claim:
    """One claim, the numbers of this study, and the verdict."""

    text: str
    found: str
    verdict: str
    key: str = ""
    family: str = PAPER
    measured: Measured | None = None
    p_holm: float | None = None


@dataclass(frozen=True)
class Verdicts:
    """What a study says about the paper: the gates, and the claims by family; the first of a family sums it up."""

    views: Views | None
    gates: list[Gate]
    claims: list[Claim]

    def of(self, family: str) -> list[Claim]:
        """Return the claims of a family, in order."""
        return [claim for claim in self.claims if claim.family == family]

    def plain(self) -> dict[str, Any]:
        """Return everything as JSON takes it."""
        return {
            "weak view": self.views.weak if self.views else None,
            "strong view": self.views.strong if self.views else None,
            "gates": [asdict(gate) for gate in self.gates],
            "claims": [asdict(claim) for claim in self.claims],
        }


@dataclass(frozen=True)
class _Part:
    """A part of a claim: a contrast that has to be above 0, or at most 0; or why there is none."""

    key: str
    text: str
    contrast: Contrast | None
    missing: str = ""
    at_most: bool = False


def verdicts(results: Results) -> Verdicts:
    """Return the gates and every claim of a study.

    A study without SFT and without the untrained backbone is not about the paradox or its cure, and has neither.
    """
    about = results.role("sft") or results.role("vanilla")
    views = gates.views_of(results)
    parts = {PARADOX: _paradox(results, views), CURE: _cure(results, views)} if views else {PARADOX: [], CURE: []}
    parts[PAPER] = _control(results)
    wanted = [part.contrast for each in parts.values() for part in each if part.contrast]
    needed = gates.contrasts(results, views).values() if views else ()
    measured = measure(results, [*needed, *wanted])
    found_gates = gates.gates(results, views, measured) if about else []
    closed = [gate for gate in found_gates if gate.status != PASSED]
    families: dict[str, list[Claim]] = {name: list(_decided(each, measured, name)) for name, each in parts.items()}
    if views:
        families[PARADOX].append(_gradients(results, views))
    claims = []
    for name, text in _SUMS.items() if about else ():
        of_family = [_closed(claim, closed) for claim in families[name]]
        claims += [_summed(name, text.format(reference=results.reference), of_family, closed), *of_family]
    return Verdicts(views, found_gates, [*claims, *_paper(results), *families[PAPER]])


_SUMS = {
    PARADOX: "The paradox: SFT neglects the weak view, and one view alone then ranks better than both",
    CURE: "The cure: {reference} ranks better than its rivals, by both views and by the weak one",
}


# --- the parts ----------------------------------------------------------------------------------------------


def _paradox(results: Results, views: Views) -> list[_Part]:
    vanilla, sft = results.role("vanilla"), results.role("sft")
    names = {"vanilla": vanilla, "sft": sft}
    weak = views.weak

    def part(key: str, text: str, first: tuple[str, str], second: tuple[str, str], at_most: bool = False) -> _Part:
        return _part(key, text, names, first, second, at_most)

    return [
        part(
            "weak_separates",
            f"SFT does not raise S of the {weak}: SFT minus vanilla is at most 0",
            ("sft", f"S {weak}"),
            ("vanilla", f"S {weak}"),
            at_most=True,
        ),
        part(
            "weak_to_fused",
            f"SFT makes the {weak} find fused items worse ({views.w2f}): vanilla minus SFT",
            ("vanilla", views.w2f),
            ("sft", views.w2f),
        ),
        part(
            "strong_above_fused",
            f"After SFT, the {views.strong} alone ranks better than both ({views.s2f} minus f2f)",
            ("sft", views.s2f),
            ("sft", "f2f"),
        ),
    ]


_RIVALS: dict[Role, str] = {"sft": "SFT", "constant_w": "SFT with a constant w", "sft_best_tau": "SFT at its best τ"}
_OPTIONAL: tuple[Role, ...] = ("sft_best_tau",)


def _cure(results: Results, views: Views) -> list[_Part]:
    reference = results.reference
    names: dict[str, str | None] = {"reference": reference, "vanilla": results.role("vanilla")}
    parts = []
    for role, title in _RIVALS.items():
        names[role] = results.role(role)
        if names[role] is None and role in _OPTIONAL:
            continue
        for pair, by in (("f2f", "both views"), (views.w2w, f"the {views.weak} alone")):
            text = f"{reference} ranks better than {title} by {by} ({pair})"
            parts.append(_part(f"{pair}_above_{role}", text, names, ("reference", pair), (role, pair)))
    for view in schema.MODALITIES:
        pair = pair_name(view, view)
        text = f"Both views of {reference} rank better than its {view} alone (f2f minus {pair})"
        parts.append(_part(f"f2f_above_{pair}", text, names, ("reference", "f2f"), ("reference", pair)))
    text = f"{reference} raises S of the {views.weak} above vanilla"
    quantity = f"S {views.weak}"
    return [*parts, _part("weak_separates", text, names, ("reference", quantity), ("vanilla", quantity))]


def _control(results: Results) -> list[_Part]:
    """Return the control, which needs no gate: without the items' own images, the reference has to rank worse."""
    names = {"reference": results.reference, "shuffled": results.role("shuffled")}
    if names["shuffled"] is None:
        return []
    text = f"{results.reference} uses the looks: it ranks better than with the images shuffled among the items (f2f)"
    return [_part("f2f_above_shuffled", text, names, ("reference", "f2f"), ("shuffled", "f2f"))]


def _part(
    key: str,
    text: str,
    names: Mapping[str, str | None],
    first: tuple[str, str],
    second: tuple[str, str],
    at_most: bool = False,
) -> _Part:
    missing = [role for role, _ in (first, second) if names[role] is None]
    if missing:
        return _Part(key, text, None, f"no method has the role {missing[0]}", at_most)
    quantities = [Quantity(str(names[role]), name) for role, name in (first, second)]
    return _Part(key, text, Contrast(quantities[0], quantities[1]), "", at_most)


# --- from numbers to verdicts -------------------------------------------------------------------------------


def _decided(parts: Sequence[_Part], measured: Mapping[Contrast, Measured], family: str) -> Iterator[Claim]:
    found = [measured.get(part.contrast) if part.contrast else None for part in parts]
    adjusted: Sequence[float | None] = [None] * len(parts)
    if family == CURE:
        adjusted = [None if math.isnan(p) else float(p) for p in holm([each.p if each else math.nan for each in found])]
    for part, each, p in zip(parts, found, adjusted, strict=True):
        if each is None:
            why = part.missing or "it was not evaluated per user: an earlier version, or a run that is not done"
            yield Claim(part.text, why, UNTESTABLE, part.key, family)
            continue
        text = each.text if p is None else f"{each.text}, p {p_value(p)} after Holm"
        yield Claim(part.text, text, _verdict(each, p, part.at_most), part.key, family, each, p)


def _verdict(found: Measured, p: float | None, at_most: bool) -> str:
    if at_most:
        return HOLDS if found.high <= 0 else FAILS if found.low > 0 else OPEN
    if p is not None and p > ALPHA:
        return OPEN
    return HOLDS if found.low > 0 else FAILS if found.high < 0 else OPEN


def _closed(claim: Claim, closed: Sequence[Gate]) -> Claim:
    """Return the claim as it is, or as not testable if a gate is closed; its numbers stay."""
    return replace(claim, verdict=UNTESTABLE) if closed else claim


def _summed(family: str, text: str, parts: Sequence[Claim], closed: Sequence[Gate]) -> Claim:
    """Sum the parts up: one that does not hold decides, then one that is not testable, then one that is undecided."""
    if closed:
        found = "; ".join(f"gate {gate.status}: {gate.text} ({gate.found})" for gate in closed)
        return Claim(text, found, UNTESTABLE, family, family)
    for verdict in (FAILS, UNTESTABLE, OPEN):
        if these := [part for part in parts if part.verdict == verdict]:
            return Claim(text, f"{verdict}: {'; '.join(part.text for part in these)}", verdict, family, family)
    return Claim(text, f"all {len(parts)} parts hold", HOLDS, family, family)


# --- gradients ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RiseAndFall:
    """How much higher the peak of a curve is than its beginning and its end, with 95 % intervals (value, low, high)."""

    rise: tuple[float, float, float]
    fall: tuple[float, float, float]


def rise_and_fall(curves: np.ndarray) -> RiseAndFall | None:
    """Measure whether curves rise and then fall; None with too few points.

    The first and the last fifth of the points are the beginning and the end. The peak is the fifth in between, beside
    neither of them, with the highest mean. The highest of several means is too high by chance alone. So the points
    that choose the place of the peak are not those that measure it. With three or more seeds, the other seeds choose
    the place, and the interval is Student's over seeds. With fewer, every second point of the mean curve chooses and
    the points between measure; the interval is that of two means of points.

    Args:
        curves: one curve per seed at the same steps, (S, n).
    """
    seeds, points = curves.shape
    width = points // 5
    if points < FEWEST_STEPS * (1 if seeds >= 3 else 2):
        return None
    starts = range(width, points - 2 * width + 1)
    if seeds >= 3:
        both = []
        for seed in range(seeds):
            others = np.delete(curves, seed, axis=0).mean(axis=0)
            peak = max(starts, key=lambda start: others[start : start + width].mean())
            own = curves[seed]
            top = own[peak : peak + width].mean()
            both.append((top - own[:width].mean(), top - own[-width:].mean()))
        rises, falls = np.array(both).T
        return RiseAndFall(_over_seeds(rises), _over_seeds(falls))
    mean = curves.mean(axis=0)
    chooses = np.arange(points) % 2 == 0
    peak = max(starts, key=lambda start: mean[start : start + width][chooses[start : start + width]].mean())
    top, first, last = (
        mean[part][~chooses[part]] for part in (slice(peak, peak + width), slice(width), slice(points - width, points))
    )
    return RiseAndFall(_of_two(top, first), _of_two(top, last))


def _over_seeds(values: np.ndarray) -> tuple[float, float, float]:
    half = t_quantile(0.975, len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    mean = float(values.mean())
    return mean, mean - half, mean + half


def _of_two(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    error = math.sqrt(float(a.var(ddof=1)) / len(a) + float(b.var(ddof=1)) / len(b))
    half = t_quantile(0.975, len(a) + len(b) - 2) * error
    difference = float(a.mean() - b.mean())
    return difference, difference - half, difference + half


def _gradients(results: Results, views: Views) -> Claim:
    """Decide whether the cosine of the weak view's gradient with the update rises and then falls during SFT."""
    text = (
        f"During SFT, the cosine of the update with the gradient of the {views.weak} rises, then falls (Fig. 1b; on one"
        " batch without dropout; a peak inside the run, above its first and its last fifth)"
    )
    key = "gradients"
    sft = results.role("sft")
    steps, curves = fixed_batch_curves(results, sft, f"cos_total_{views.weak}") if sft else ([], np.empty((0, 0)))
    found = rise_and_fall(curves) if curves.size else None
    if found is None:
        need = FEWEST_STEPS * (1 if len(curves) >= 3 else 2)
        why = f"{len(steps)} comparisons of gradients on a fixed batch, {need} are needed (a smaller --gradient-steps)"
        return Claim(text, why, UNTESTABLE, key, PARADOX)
    both = (found.rise, found.fall)
    verdict = HOLDS if min(low for _, low, _ in both) > 0 else FAILS if min(high for _, _, high in both) < 0 else OPEN
    numbers = ", ".join(
        f"{name} {number(value, 3, True)} [{number(low, 3, True)}, {number(high, 3, True)}]"
        for name, (value, low, high) in (("rise", found.rise), ("fall", found.fall))
    )
    size = f"{len(steps)} comparisons, {len(curves)} seed{'s' * (len(curves) > 1)}"
    return Claim(text, f"{numbers}, {size}", verdict, key, PARADOX)


def fixed_batch_curves(results: Results, method: str, name: str) -> tuple[list[int], np.ndarray]:
    """Return the steps at which every seed has a value of a curve about gradients, and the values, (S, n).

    Rows of earlier versions, which were not measured on a fixed batch, do not count.
    """
    rows = results.frames["curves"].filter((pl.col("kind") == "gradients") & (pl.col("method") == method))
    fixed = rows.filter(pl.col("name") == schema.FIXED_BATCH).select("seed", "step")
    rows = rows.filter(pl.col("name") == name).join(fixed, on=["seed", "step"], how="inner")
    by_seed = {
        seed: dict(each.select("step", "value").iter_rows()) for (seed,), each in rows.sort("seed").group_by("seed")
    }
    if not by_seed:
        return [], np.empty((0, 0))
    steps = sorted(set.intersection(*({*each} for each in by_seed.values())))
    return steps, np.array([[by_seed[seed][step] for step in steps] for seed in sorted(by_seed)])


# --- the other claims of the paper --------------------------------------------------------------------------


def _paper(results: Results) -> Iterable[Claim]:
    """Yield the claims about levels, which need no gate."""
    vanilla, sft = results.named(VANILLA_ROW), results.named(SFT_ROW)
    if vanilla and sft:
        yield from _sft_above_vanilla(results, sft, vanilla)
    yield from _all_views_separate(results)
    if sft:
        yield from _reference_above_sft(results, sft)
    yield from _ablation(results)


def _sft_above_vanilla(results: Results, better: str, worse: str) -> Iterator[Claim]:
    for task, model in ((1, None), *((2, model) for model in results.models())):
        pair = [results.spread(name, task, model) for name in (better, worse)]
        if pair[0] is not None and pair[1] is not None:
            where = f"Task {task}" + (f", {model}" if model else "")
            numbers = f"{number(pair[0].mean)} against {number(pair[1].mean)}"
            held = pair[0].mean > pair[1].mean
            yield Claim(f"SFT has a higher N@20 than vanilla ({where})", numbers, HOLDS if held else FAILS)


def _all_views_separate(results: Results) -> Iterator[Claim]:
    s = {
        view: values["S"].mean
        for view in schema.VIEWS
        if (values := results.geometry(results.reference, view)) is not None
    }
    if len(s) == len(schema.VIEWS):
        numbers = ", ".join(f"{view} {number(value, 3)}" for view, value in s.items())
        text = f"With {results.reference}, every view separates the next item from the others: S > 1 (Table 1)"
        yield Claim(text, numbers, HOLDS if min(s.values()) > 1 else FAILS)


def _reference_above_sft(results: Results, sft: str) -> Iterator[Claim]:
    for task, model in ((1, None), *((2, model) for model in results.models())):
        found = results.comparison(sft, task, model)
        if found is None:
            continue
        where = f"Task {task}" + (f", {model}" if model else "")
        numbers = (
            f"{number(found['difference'], 4, True)}"
            f" [{number(found['low'], 4, True)}, {number(found['high'], 4, True)}] over {found['users']:,} users and"
            f" {found['seeds']} seed{'s' if found['seeds'] > 1 else ''}"
        )
        verdict = HOLDS if found["low"] > 0 else FAILS if found["high"] < 0 else OPEN
        yield Claim(f"{results.reference} has a higher N@20 than SFT ({where})", numbers, verdict)


def _ablation(results: Results) -> Iterator[Claim]:
    for name in results.names(ABLATION):
        if name == results.reference or not (results.paper_row(name) or "").startswith("w/o"):
            continue
        found = results.comparison(name, 1, None)
        if found is not None:
            numbers = (
                f"{results.reference} minus this variant: {number(found['difference'], 4, True)}"
                f" [{number(found['low'], 4, True)}, {number(found['high'], 4, True)}]"
            )
            verdict = HOLDS if found["low"] > 0 else FAILS if found["high"] < 0 else OPEN
            yield Claim(f"{name} ranks worse than {results.reference} (Table 5, Task 1)", numbers, verdict)
