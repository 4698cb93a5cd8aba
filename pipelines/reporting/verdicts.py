"""The claims of the paper, and whether they hold in this study: each claim with the numbers that decide it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import polars as pl

from vlm2rec.embedder.contract import schema
from vlm2rec.pipelines.experiments.methods import ABLATION
from vlm2rec.pipelines.reporting.tables import SFT_ROW, VANILLA_ROW, VIEW_PAIRS, Results, number

HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided"


@dataclass(frozen=True)
class Claim:
    """One claim of the paper, the numbers of this study, and the verdict."""

    text: str
    found: str
    verdict: str


def verdicts(results: Results) -> list[Claim]:
    """Return every claim that the study's results can decide."""
    vanilla, sft = results.named(VANILLA_ROW), results.named(SFT_ROW)
    found: list[Claim] = []
    if vanilla and sft:
        found += [*_collapse(results, vanilla, sft), *_sft_above_vanilla(results, sft, vanilla)]
    if sft:
        found += [*_negative_transfer(results, sft), *_gradients(results, sft)]
    found += [*_all_views_separate(results), *_synergy(results)]
    if sft:
        found += _reference_above_sft(results, sft)
    return [*found, *_ablation(results)]


def _collapse(results: Results, vanilla: str, sft: str) -> Iterator[Claim]:
    s = {
        (method, view): values["S"].mean
        for method in (vanilla, sft)
        for view in schema.MODALITIES
        if (values := results.geometry(method, view)) is not None
    }
    if len(s) < 4:
        return
    weak, strong = sorted(schema.MODALITIES, key=lambda view: s[vanilla, view])
    text = ", ".join(f"{view} {number(s[vanilla, view], 3)} → {number(s[sft, view], 3)}" for view in (weak, strong))
    held = s[sft, weak] <= s[vanilla, weak] and s[sft, strong] > s[vanilla, strong]
    yield Claim(
        f"SFT collapses the weak modality: S of {weak}, which is lower before training, does not rise; S of {strong}"
        " does (Table 1)",
        f"S before → after SFT: {text}",
        HOLDS if held else FAILS,
    )


def _negative_transfer(results: Results, sft: str) -> Iterator[Claim]:
    found = [results.spread(sft, 1, view=view) for view in VIEW_PAIRS]
    if any(each is None for each in found):
        return
    fused, text, image = (each.mean for each in found if each is not None)
    numbers = f"f2f {number(fused)}, t2f {number(text)}, v2f {number(image)}"
    held = max(text, image) > fused
    yield Claim("After SFT, one modality alone ranks better than both together (Fig. 1a)", numbers, _verdict(held))


def _sft_above_vanilla(results: Results, better: str, worse: str) -> Iterator[Claim]:
    for task, model in ((1, None), *((2, model) for model in results.models())):
        pair = [results.spread(name, task, model) for name in (better, worse)]
        if pair[0] is not None and pair[1] is not None:
            where = f"Task {task}" + (f", {model}" if model else "")
            numbers = f"{number(pair[0].mean)} against {number(pair[1].mean)}"
            yield Claim(f"SFT has a higher N@20 than vanilla ({where})", numbers, _verdict(pair[0].mean > pair[1].mean))


def _gradients(results: Results, sft: str) -> Iterator[Claim]:
    """Compare the cosines with the update in the first and in the last quarter of training."""
    rows = results.frames["curves"].filter((pl.col("kind") == "gradients") & (pl.col("method") == sft))
    means = {}
    for view in schema.MODALITIES:
        one = rows.filter(pl.col("name") == f"cos_total_{view}")
        if one.height < 4:
            return
        steps = one["step"].to_numpy()
        quarter = (steps.max() - steps.min()) / 4
        early, late = steps <= steps.min() + quarter, steps >= steps.max() - quarter
        values = one["value"].to_numpy()
        means[view] = float(values[early].mean()), float(values[late].mean())
    text, image = means[schema.TEXT], means[schema.IMAGE]
    numbers = (
        f"cosine with g_total, first → last quarter: text {number(text[0], 3)} → {number(text[1], 3)},"
        f" image {number(image[0], 3)} → {number(image[1], 3)}"
    )
    held = image[1] < image[0] and text[1] > image[1]
    yield Claim(
        "During SFT, the update turns away from the image gradient and follows the text gradient (Fig. 1b)",
        numbers,
        _verdict(held),
    )


def _all_views_separate(results: Results) -> Iterator[Claim]:
    s = {
        view: values["S"].mean
        for view in schema.VIEWS
        if (values := results.geometry(results.reference, view)) is not None
    }
    if len(s) == len(schema.VIEWS):
        numbers = ", ".join(f"{view} {number(value, 3)}" for view, value in s.items())
        text = f"With {results.reference}, every view separates the next item from the others: S > 1 (Table 1)"
        yield Claim(text, numbers, _verdict(min(s.values()) > 1))


def _synergy(results: Results) -> Iterator[Claim]:
    found = [results.spread(results.reference, 1, view=view) for view in VIEW_PAIRS]
    if any(each is None for each in found):
        return
    fused, text, image = (each.mean for each in found if each is not None)
    numbers = f"f2f {number(fused)}, t2f {number(text)}, v2f {number(image)}"
    claim = f"With {results.reference}, both modalities together rank better than either alone (Fig. 1a)"
    yield Claim(claim, numbers, _verdict(fused > max(text, image)))


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


def _verdict(held: bool) -> str:
    return HOLDS if held else FAILS
