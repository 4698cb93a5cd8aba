"""The figures of a study as SVG and PNG, from its Parquet files. Colour is the method, line style the modality."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from vlm2rec.downstream.evaluation.statistics import Spread
from vlm2rec.embedder.contract import schema
from vlm2rec.pipelines.experiments.methods import FAMILIES, FEW_SHOT, MAIN, SENSITIVITY
from vlm2rec.pipelines.experiments.results import COMPARED, random_floor
from vlm2rec.pipelines.reporting.style import COLOURS, ID, INK, MUTED, OTHERS, SFT, STYLE, VANILLA, VLM2REC, Picture
from vlm2rec.pipelines.reporting.tables import SFT_ROW, VANILLA_ROW, VIEW_PAIRS, Results, grid_values
from vlm2rec.pipelines.reporting.verdicts import CURE, UNTESTABLE, Verdicts, verdicts

VIEW_STYLES: dict[str, Any] = {schema.FUSED: "solid", schema.TEXT: (0, (5, 1.5)), schema.IMAGE: (0, (1.2, 1.4))}
_SYMBOLS = {"tau_wpcl": r"$\tau_{WPCL}$", "tau_crtr": r"$\tau_{CRTR}$", "lam": r"$\lambda$"}


@dataclass(frozen=True)
class Drawn:
    """One figure as SVG and as PNG."""

    picture: Picture
    png: bytes

    @property
    def name(self) -> str:
        """File name without ending."""
        return self.picture.name


OURS = "vlm2rec report"  # in the metadata of every picture


def draw(results: Results, found: Verdicts | None = None) -> list[Drawn]:
    """Draw every figure that the study has data for; `found` are its verdicts, if they are known already."""
    of_verdicts = partial(intervals, found=found)
    makers: tuple[Callable[[Results], Drawn | None], ...] = (
        differences,
        of_verdicts,
        view_bars,
        recommender_bars,
        geometry_dots,
        gradients,
        collapse,
        ranks,
        ablation_bars,
        few_shot,
        cold_start,
        families,
        sensitivity,
        learning,
    )
    with mpl.rc_context(STYLE):
        return [drawn for make in makers if (drawn := make(results)) is not None]


def colours(results: Results) -> dict[str, str]:
    """Return the colour of every method: vanilla, SFT, ID and the reference have fixed ones, the others take turns."""
    fixed = {VANILLA_ROW: COLOURS[VANILLA], SFT_ROW: COLOURS[SFT]}
    found: dict[str, str] = {}
    turn = 0
    for method in results.methods:
        if method["name"] == results.reference:
            found[method["name"]] = COLOURS[VLM2REC]
        elif method["source"] == "id":
            found[method["name"]] = COLOURS[ID]
        elif method["paper"] in fixed and not method["of"]:
            found[method["name"]] = fixed[method["paper"]]
        else:
            found[method["name"]] = OTHERS[turn % len(OTHERS)]
            turn += 1
    return found


def main_methods(results: Results) -> list[str]:
    """Return the main methods: vanilla, SFT and the reference, if they have results."""
    names = [results.named(VANILLA_ROW), results.named(SFT_ROW), results.reference]
    return [name for name in names if name in results.names(MAIN)]


# --- the figures of the paper -------------------------------------------------------------------------------


def view_bars(results: Results) -> Drawn | None:
    """Fig. 1a: N@20 and H@10 with the user's fused, text and image vector."""
    methods = [name for name in main_methods(results) if results.spread(name, 1, view="v2f")]
    if not methods:
        return None
    figure, panels = _panels(1, 2, 3.1)
    for axes, metric in zip(panels, (COMPARED, "H@10"), strict=True):
        groups = {name: [results.spread(name, 1, metric=metric, view=view) for view in VIEW_PAIRS] for name in methods}
        _bars(axes, groups, ("fused user\nf2f", "text user\nt2f", "image user\nv2f"), colours(results))
        _random_line(axes, metric, results)
        axes.set_title(f"{metric}, {results.facts['candidates'] + 1} candidates")
    _legend(figure, methods, colours(results))
    return _saved(figure, "fig1a-views", "Task 1 with fused, text and image user vectors by method")


def gradients(results: Results) -> Drawn | None:
    """Fig. 1b: cosine of the update with the gradient of each modality, over the training steps."""
    labels = {f"cos_total_{view}": (view, f"cos(total, {view})") for view in schema.MODALITIES}
    figure = _over_steps(results, "gradients", labels, "cosine", {"y": 0, "linewidth": 0.8})
    alt = "Alignment of the update with the text and the image gradient"
    return None if figure is None else _saved(figure, "fig1b-gradients", alt)


def _over_steps(
    results: Results,
    kind: str,
    labels: Mapping[str, tuple[str, str]],
    unit: str,
    line: Mapping[str, Any],
) -> Figure | None:
    """Draw the curves of one kind, one panel per method; None if no method has any.

    Args:
        results: the study's tables.
        kind: of the rows of `curves`.
        labels: name of a curve → the view that gives its line style, and its label.
        unit: label of the y axis.
        line: arguments of the horizontal reference line.
    """
    rows = results.frames["curves"].filter(pl.col("kind") == kind)
    methods = [name for name in main_methods(results) if rows.filter(pl.col("method") == name).height]
    if not methods:
        return None
    figure, panels = _panels(1, len(methods), 2.9, sharey=True)
    for axes, method in zip(panels, methods, strict=True):
        for name, (view, label) in labels.items():
            mine = rows.filter((pl.col("method") == method) & (pl.col("name") == name))
            _band(axes, mine, colours(results)[method], VIEW_STYLES[view], label)
        axes.axhline(color=MUTED, **line)
        axes.set_title(_plain(method))
        axes.set_xlabel("training step")
        axes.legend(fontsize=8, labelcolor=MUTED)
    panels[0].set_ylabel(unit)
    return figure


def cold_start(results: Results) -> Drawn | None:
    """Fig. 3: N@20 by the training frequency of the target."""
    buckets = results.facts["buckets"]
    wanted = [(2, model) for model in results.models()[:1]] + [(1, None)]
    names = [method["name"] for method in results.methods if method["source"] == "id"] + main_methods(results)
    panels_of = {
        (task, model): {
            name: [results.spread(name, task, model, group=group) for group in buckets]
            for name in names
            if any(results.spread(name, task, model, group=group) for group in buckets)
        }
        for task, model in wanted
    }
    panels_of = {key: groups for key, groups in panels_of.items() if groups}
    if not panels_of:
        return None
    figure, panels = _panels(1, len(panels_of), 3.1)
    users = _group_users(results)
    for axes, ((task, model), groups) in zip(panels, panels_of.items(), strict=True):
        labels = [f"{bucket}\n{users.get(bucket, 0):,} users" for bucket in buckets]
        _bars(axes, groups, labels, colours(results))
        axes.set_title(f"{COMPARED}, Task {task}" + (f", {model}" if model else ""))
        axes.set_xlabel("how often the next item occurs in training")
    _legend(figure, [name for name in names if any(name in groups for groups in panels_of.values())], colours(results))
    return _saved(figure, "fig3-cold-start", "N@20 by training frequency of the target")


def _group_users(results: Results) -> dict[str, int]:
    rows = results.frames["results"].filter(pl.col("dataset") == results.dataset)
    return dict(rows.group_by("user_group").agg(pl.col("users").max()).iter_rows())


def families(results: Results) -> Drawn | None:
    """Fig. 4: the reference on several backbones."""
    methods = results.names(FAMILIES, grids=True)
    if len(methods) < 2:
        return None
    figure, panels = _panels(1, 2, 3.0)
    for axes, (task, model) in zip(panels, ((1, None), (2, "SASRec")), strict=True):
        found = [results.spread(name, task, model) for name in methods]
        _bars(axes, {results.reference: found}, [_plain(name) for name in methods], colours(results))
        axes.set_title(f"{COMPARED}, Task {task}" + (f", {model}" if model else ""))
        axes.tick_params(axis="x", labelsize=7.5)
    return _saved(figure, "fig4-families", "The reference on several backbones")


def sensitivity(results: Results) -> Drawn | None:
    """Fig. 5: N@20 over each hyperparameter of the grids, with SFT as a horizontal line."""
    methods = results.names(SENSITIVITY, grids=True)
    settings = list(dict.fromkeys(each["varies"] for each in results.methods if each["name"] in methods and each["of"]))
    if not settings:
        return None
    figure, panels = _panels(1, len(settings), 2.9, sharey=True)
    sft = results.named(SFT_ROW)
    for axes, setting in zip(panels, settings, strict=True):
        varied = [each["name"] for each in results.methods if each["name"] in methods and each["varies"] == setting]
        points = sorted(
            (float(grid_values(results, name)[setting]), results.spread(name, 1, analysis=SENSITIVITY), name)
            for name in [results.reference, *varied]
            if results.spread(name, 1, analysis=SENSITIVITY)
        )
        x = [value for value, _, _ in points]
        found = [each for _, each, _ in points]
        _line(axes, x, found, colours(results)[results.reference])
        own = next((place for place, point in enumerate(points) if point[2] == results.reference), None)
        if own is not None and found[own] is not None:
            axes.plot([x[own]], [found[own].mean], "o", markersize=10, markerfacecolor="none", color=INK)  # type: ignore[union-attr]
        base = results.spread(sft, 1, analysis=SENSITIVITY) if sft else None
        if base:
            axes.axhline(base.mean, color=COLOURS[SFT], linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xscale("log")
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.minorticks_off()
        axes.set_xlabel(_SYMBOLS.get(setting, setting))
    panels[0].set_ylabel(f"{COMPARED}, Task 1")
    _legend(figure, [results.reference, *([sft] if sft else [])], colours(results))
    return _saved(figure, "fig5-sensitivity", "N@20 over the temperatures and the weight of CRTR")


# --- further figures ----------------------------------------------------------------------------------------


def intervals(results: Results, found: Verdicts | None = None) -> Drawn | None:
    """The differences that decide the paradox and the cure, with their intervals over users; none if a gate is closed."""
    found = verdicts(results) if found is None else found
    tested = [claim for claim in found.claims if claim.verdict != UNTESTABLE]
    measured = [(claim, each) for claim in tested if (each := claim.measured) is not None]
    if not measured:
        return None
    # S differs by other amounts than N@20
    groups = [[pair for pair in measured if pair[0].key.endswith("separates") == s] for s in (False, True)]
    heights = [len(group) for group in groups if group]
    figure = Figure(figsize=(9.6, 1.3 + 0.3 * sum(heights)), layout=ConstrainedLayoutEngine(hspace=0.08))
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights).ravel()
    titles = [f"{COMPARED}", "separability $S$"]
    for axes, (title, group) in zip(panels, [p for p in zip(titles, groups, strict=True) if p[1]], strict=True):
        for place, (claim, each) in enumerate(group):
            colour = COLOURS[VLM2REC] if claim.family == CURE else COLOURS[SFT]
            axes.plot([each.low, each.high], [place, place], color=colour, linewidth=2.4)
            axes.plot([each.difference], [place], "o", color=colour, markersize=6)
        axes.axvline(0, color=MUTED, linewidth=0.9)
        axes.set_yticks(
            range(len(group)), [_plain(f"{claim.family}: {claim.text}") for claim, _ in group], fontsize=7.5
        )
        axes.set_ylim(len(group) - 0.4, -0.6)
        axes.set_xlabel(f"difference, {title}")
        axes.spines["left"].set_visible(False)
    return _saved(figure, "verdicts", "Differences that decide the paradox and the cure, with bootstrap intervals")


def differences(results: Results) -> Drawn | None:
    """N@20 of the reference minus that of every method of the main table, with intervals over users."""
    names = [name for name in results.names(MAIN) if name != results.reference]
    columns = [(1, None), *((2, model) for model in results.models())]
    found = {column: [results.comparison(name, *column) for name in names] for column in columns}
    found = {column: each for column, each in found.items() if any(each)}
    if not found:
        return None
    figure, panels = _panels(1, len(found), 0.7 + 0.27 * len(names), sharey=True)
    for axes, ((task, model), each) in zip(panels, found.items(), strict=True):
        for place, (name, row) in enumerate(zip(names, each, strict=True)):
            if row is not None:
                colour = colours(results)[name]
                axes.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=2.4)
                axes.plot([row["difference"]], [place], "o", color=colour, markersize=6)
        axes.axvline(0, color=MUTED, linewidth=0.9)
        axes.set_yticks(range(len(names)), [_plain(name) for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_title(f"Task {task}" + (f", {model}" if model else ""))
        axes.set_xlabel(f"{_plain(results.reference)} − method, {COMPARED}")
        axes.spines["left"].set_visible(False)
    return _saved(figure, "differences", "Difference of the reference to every method with bootstrap intervals")


def recommender_bars(results: Results) -> Drawn | None:
    """Task 2: each recommender, started from ids and from the vectors of each main method."""
    ids = [method["name"] for method in results.methods if method["source"] == "id"]
    models = results.models()
    methods = [
        name for name in [*ids, *main_methods(results)] if any(results.spread(name, 2, model) for model in models)
    ]
    if not methods:
        return None
    figure, panels = _panels(1, 2, 3.0)
    for axes, metric in zip(panels, (COMPARED, "H@10"), strict=True):
        groups = {name: [results.spread(name, 2, model, metric) for model in models] for name in methods}
        _bars(axes, groups, models, colours(results))
        _random_line(axes, metric, results)
        axes.set_title(f"{metric}, {results.facts['candidates'] + 1} candidates")
    _legend(figure, methods, colours(results))
    return _saved(figure, "task2-models", "Task 2: each recommender, from ids and from the vectors of each method")


def geometry_dots(results: Results) -> Drawn | None:
    """Table 1 as dots: A_pos, A_neg, U and S per view."""
    methods = [name for name in main_methods(results) if results.geometry(name, schema.TEXT)]
    if not methods:
        return None
    figure, panels = _panels(1, 4, 2.6)
    titles = {"A_pos": "to the next item", "A_neg": "to other items", "U": "uniformity", "S": "separability"}
    for number, (axes, name) in enumerate(zip(panels, titles, strict=True)):
        for place, method in enumerate(methods):
            for row, view in enumerate(schema.VIEWS):
                found = results.geometry(method, view)
                if found:
                    height = row + 0.22 * (place - (len(methods) - 1) / 2)
                    axes.errorbar(
                        found[name].mean, height, xerr=found[name].std, fmt="o", color=colours(results)[method]
                    )
        axes.set_yticks(range(3), schema.VIEWS if number == 0 else [""] * 3)
        axes.set_ylim(2.6, -0.6)
        axes.set_title(titles[name], fontsize=9)
        axes.set_xlabel({"A_pos": "$A_{pos}$", "A_neg": "$A_{neg}$"}.get(name, f"${name}$"))
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.15)
        axes.locator_params(axis="x", nbins=4)
        if name == "S":
            axes.axvline(1, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    _legend(figure, methods, colours(results))
    return _saved(figure, "table1-geometry", "Geometry of the fused, text and image vectors by method")


def collapse(results: Results) -> Drawn | None:
    """Separability of each view on a fixed probe, over the training steps."""
    labels = {f"S_{view}": (view, view) for view in schema.VIEWS}
    line = {"y": 1, "linewidth": 0.9, "linestyle": (0, (4, 3))}
    figure = _over_steps(results, "probe", labels, "separability $S$ on the probe", line)
    return None if figure is None else _saved(figure, "collapse", "Separability of each view during training")


def ranks(results: Results) -> Drawn | None:
    """Effective rank of the items on the probe, and the share of users whose weak modality is the image."""
    rows = results.frames["curves"]
    wanted = pl.col("name").str.starts_with("rank_") | (pl.col("name") == "weak_is_image")
    methods = [name for name in main_methods(results) if rows.filter(wanted & (pl.col("method") == name)).height]
    if not methods:
        return None
    figure, panels = _panels(1, 2, 2.9)
    for method in methods:
        mine, colour = rows.filter(pl.col("method") == method), colours(results)[method]
        for view in schema.VIEWS:
            rank = mine.filter((pl.col("kind") == "probe") & (pl.col("name") == f"rank_{view}"))
            _band(panels[0], rank, colour, VIEW_STYLES[view], f"{_plain(method)}, {view}")
        weak = mine.filter((pl.col("kind") == "train") & (pl.col("name") == "weak_is_image"))
        _band(panels[1], weak, colour, "solid", _plain(method))
    _finish_steps(panels[0], "Effective rank of the items, on the probe", "directions")
    _finish_steps(panels[1], "Users whose weak modality is the image", "share of the batch")
    return _saved(
        figure, "collapse-ranks", "Effective rank of each view, and the share of users whose weak modality is the image"
    )


def ablation_bars(results: Results) -> Drawn | None:
    """Table 5 as bars."""
    methods = [
        name
        for name in results.names("ablation")
        if name == results.reference or (results.paper_row(name) or "").startswith("w/o")
    ]
    if len(methods) < 2:
        return None
    figure, panels = _panels(1, 2, 0.9 + 0.34 * len(methods), sharey=True)
    for axes, (task, model) in zip(panels, ((1, None), (2, "SASRec")), strict=True):
        for place, name in enumerate(methods):
            found = results.spread(name, task, model)
            if found:
                axes.errorbar(found.mean, place, xerr=found.std, fmt="o", color=colours(results)[name], markersize=7)
                axes.annotate(
                    f"{found.mean:.4f}", (found.mean, place), (0, 7), textcoords="offset points", fontsize=7.5
                )
        axes.set_yticks(range(len(methods)), [_plain(name) for name in methods])
        axes.set_ylim(len(methods) - 0.5, -0.7)
        axes.set_title(f"{COMPARED}, Task {task}" + (f", {model}" if model else ""))
        axes.margins(x=0.2)
        axes.spines["left"].set_visible(False)
    return _saved(figure, "table5-ablation", "N@20 without each part of the method")


def few_shot(results: Results) -> Drawn | None:
    """Table 7: N@20 over the number of training users."""
    every = int(results.facts["users"])
    points = []
    for name in results.names(FEW_SHOT, grids=True):
        of = next(each["of"] for each in results.methods if each["name"] == name)
        if name == results.reference or of == results.reference:
            points.append((int(grid_values(results, name).get("users") or every), name))
    if len(points) < 2:
        return None
    columns = [
        column for column in ((1, None), (2, "SASRec")) if results.spread(points[0][1], *column, analysis=FEW_SHOT)
    ]
    figure, panels = _panels(1, len(columns), 2.8)
    for axes, (task, model) in zip(panels, columns, strict=True):
        known = [
            (count, found)
            for count, name in sorted(points)
            if (found := results.spread(name, task, model, analysis=FEW_SHOT))
        ]
        _line(axes, [count for count, _ in known], [found for _, found in known], colours(results)[results.reference])
        sft = results.named(SFT_ROW)
        base = results.spread(sft, task, model, analysis=FEW_SHOT) if sft else None
        if base:
            axes.axhline(base.mean, color=COLOURS[SFT], linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xscale("log", base=2)
        axes.set_xticks([count for count, _ in known], [f"{count:,}" for count, _ in known])
        axes.minorticks_off()
        axes.set_xlabel("training users")
        axes.set_title(f"{COMPARED}, Task {task}" + (f", {model}" if model else ""))
    return _saved(figure, "table7-few-shot", "N@20 over the number of training users")


PENALTY = {"weight": "mean weight $w$", "alpha": "$α$", "beta": "$β$"}
LOSS_PARTS = {"loss": "total", "wpcl": "WPCL", "crtr": "CRTR"}
_LINE_STYLES: tuple[Any, ...] = ("solid", (0, (4, 2)), (0, (1, 1.5)))


def learning(results: Results) -> Drawn | None:
    """Parts of the loss, validation, margins of both modalities and the penalty on the negatives, over the steps."""
    rows = results.frames["curves"]
    methods = [name for name in main_methods(results) if rows.filter(pl.col("method") == name).height]
    if not methods:
        return None
    figure, (loss, validation, margins, penalty) = _panels(2, 2, 5.2)
    for method in methods:
        mine, colour = rows.filter(pl.col("method") == method), colours(results)[method]
        train = mine.filter(pl.col("kind") == "train")
        for (name, label), style in zip(LOSS_PARTS.items(), _LINE_STYLES, strict=True):
            _band(loss, train.filter(pl.col("name") == name), colour, style, f"{_plain(method)}, {label}")
        valid = mine.filter((pl.col("kind") == "valid") & (pl.col("name") == COMPARED))
        _band(validation, valid, colour, "solid", _plain(method))
        for view in schema.MODALITIES:
            margin = train.filter(pl.col("name") == f"margin_{view}")
            _band(margins, margin, colour, VIEW_STYLES[view], f"{_plain(method)}, {view}")
        for (name, label), style in zip(PENALTY.items(), _LINE_STYLES, strict=True):
            _band(penalty, train.filter(pl.col("name") == name), colour, style, label)
    _finish_steps(loss, "Training loss", "loss (nats)")
    _finish_steps(validation, f"Validation {COMPARED}", COMPARED)
    _finish_steps(margins, "Margin of each modality in training", "cosine, next item − others")
    _finish_steps(penalty, "Penalty on the negatives", "factor")
    return _saved(figure, "learning", "Training loss, validation, margins and penalty over the training steps")


# --- parts of figures ---------------------------------------------------------------------------------------


def _panels(rows: int, columns: int, height: float, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9.6, height), layout=ConstrainedLayoutEngine(wspace=0.06, hspace=0.06))
    found = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    return figure, list(found.ravel())


def _bars(
    axes: Axes, groups: Mapping[str, Sequence[Spread | None]], labels: Sequence[str], colour: Mapping[str, str]
) -> None:
    width = 0.8 / max(len(groups), 1)
    places = np.arange(len(labels))
    for number, (name, found) in enumerate(groups.items()):
        left = places + (number - (len(groups) - 1) / 2) * width
        means = [each.mean if each else math.nan for each in found]
        errors = [each.std if each else 0.0 for each in found]
        axes.bar(left, means, width * 0.88, color=colour[name])
        axes.errorbar(left, means, errors, fmt="none", ecolor=INK, elinewidth=0.8)
        for x, mean, error in zip(left, means, errors, strict=True):
            if math.isfinite(mean) and len(groups) * len(labels) <= 12:
                text = f"{mean:.3f}".removeprefix("0")
                axes.annotate(text, (x, mean + error), (0, 2), textcoords="offset points", ha="center", fontsize=7.5)
    axes.set_xticks(places, labels)
    axes.grid(axis="x", visible=False)
    axes.spines["left"].set_visible(False)
    axes.margins(y=0.14)
    axes.set_ylim(bottom=0)


def _line(axes: Axes, x: Sequence[float], found: Sequence[Spread | None], colour: str) -> None:
    means = [each.mean if each else math.nan for each in found]
    errors = [each.std if each else 0.0 for each in found]
    axes.errorbar(x, means, errors, fmt="o-", color=colour, markersize=5, capsize=2)
    axes.margins(y=0.25)


def _band(axes: Axes, rows: pl.DataFrame, colour: str, style: Any, label: str) -> None:
    """Draw the mean over seeds, smoothed if there are many steps, and behind it the range of the seeds."""
    if not rows.height:
        return
    value = pl.col("value")
    steps = rows.group_by("step").agg(value.mean().alias("mean"), value.min().alias("low"), value.max().alias("high"))
    steps = steps.sort("step")
    x = steps["step"].to_numpy()
    if (steps["high"] > steps["low"]).any():
        axes.fill_between(x, steps["low"].to_numpy(), steps["high"].to_numpy(), color=colour, alpha=0.13, linewidth=0)
    marker = "o" if len(x) < 4 else ""
    mean = _running_mean(steps["mean"].to_numpy())
    axes.plot(x, mean, color=colour, linestyle=style, marker=marker, linewidth=1.7, label=label)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Return the running mean over a window of a fifteenth of the values; the window is cut at both ends."""
    half = len(values) // 30
    total = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    start, end = np.maximum(0, places - half), np.minimum(len(values), places + half + 1)
    return (total[end] - total[start]) / (end - start)


def _finish_steps(axes: Axes, title: str, unit: str) -> None:
    """Add title, labels and legend to a panel over the training steps; a panel without curves says "not recorded"."""
    axes.set_title(title)
    axes.set_xlabel("training step")
    axes.set_ylabel(unit)
    axes.margins(y=0.12)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7.5, ncols=2, labelcolor=MUTED)
    else:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=MUTED)


def _random_line(axes: Axes, metric: str, results: Results) -> None:
    """Draw a line at the value that a random order of the candidates reaches."""
    floor = random_floor(metric, int(results.facts["candidates"]) + 1)
    axes.axhline(floor, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    words, edge = f"random\n{floor:.3f}".replace("0.", "."), (axes.get_xlim()[1], floor)
    axes.annotate(words, edge, (3, 0), textcoords="offset points", va="center", fontsize=7.5, color=MUTED)


def _plain(name: str) -> str:
    """Return a name that matplotlib does not read as mathematics."""
    return name.replace("$", r"\$").lstrip("_")


def _legend(figure: Figure, methods: Sequence[str], colour: Mapping[str, str]) -> None:
    handles: list[Patch | Line2D] = [Patch(color=colour[name], label=_plain(name)) for name in methods]
    figure.legend(handles=handles, loc="outside upper left", ncols=max(1, min(len(handles), 5)), fontsize=9)


def _saved(figure: Figure, name: str, alt: str) -> Drawn:
    text, image = io.StringIO(), io.BytesIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": OURS})
    figure.savefig(image, format="png", dpi=160, facecolor="white", metadata={"Author": OURS})
    return Drawn(Picture(name, alt, text.getvalue()), image.getvalue())
