"""The report's figures as SVG. One grammar throughout: colour is the method, line style the modality.

Colours are told apart by the colour-blind (blue, orange, greys of different lightness). In the page every colour
becomes a CSS variable, so that figures follow the reader's light or dark theme.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, Vlm2RecError

DEMO_FILE = "demo.json"
METRICS_FILE = "metrics.json"
USERS_FILE = "users.parquet"
CURVES_FILE = "curves.json"
ADAPTER_FILE = "vlm2rec.json"
INDEX_FILE = "index.json"
ID, VANILLA, SFT, VLM2REC = "id", "vanilla", "sft", "vlm2rec"
METHOD_NAMES = {ID: "ID", VANILLA: "Vanilla", SFT: "SFT", VLM2REC: "VLM2Rec"}
Json = dict[str, Any]

INK, MUTED, GRID = "#1f2328", "#6a7079", "#e4e0d9"
COLOURS = {ID: "#4a5160", VANILLA: "#a9adb4", SFT: "#2f6fb3", VLM2REC: "#d1500b"}
_OTHERS = ("#5f8f6b", "#8d6aa8", "#9c7a3c", "#3f8f97")
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "line",
    **{colour: method for method, colour in COLOURS.items()},
    **{colour: f"other{number}" for number, colour in enumerate(_OTHERS)},
}
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: sharp, selectable, in the page's font
    "svg.hashsalt": "vlm2rec",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelpad": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}

CANDIDATES = 101
# a scorer without knowledge: every rank from 1 to 101 is as likely
RANDOM_FLOOR = {
    "H@10": 10 / CANDIDATES,
    "H@20": 20 / CANDIDATES,
    "N@10": sum(1 / math.log2(rank + 1) for rank in range(1, 11)) / CANDIDATES,
    "N@20": sum(1 / math.log2(rank + 1) for rank in range(1, 21)) / CANDIDATES,
}


@dataclass(frozen=True)
class Picture:
    """One figure: its file name without ending, what it shows in words, and the SVG text."""

    name: str
    alt: str
    svg: str

    def inline(self) -> str:
        """Return the SVG for a page: colours as CSS variables, the page's font, ids that no other figure uses."""
        text = self.svg[self.svg.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r'\bid="', f'id="{self.name}-', text)
        text = re.sub(r'(xlink:href="|href="|url\()#', rf"\1#{self.name}-", text)
        text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
        for colour, variable in _VARIABLES.items():
            text = text.replace(colour, f"var(--{variable})")
        return re.sub(r'<svg\b[^>]*?(viewBox="[^"]*")[^>]*>', self._opening, text, count=1, flags=re.DOTALL)

    def _opening(self, match: re.Match[str]) -> str:
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {match[1]}'
            f' role="img" aria-label="{self.alt}">'
        )


def colour_of(method: str, methods: Sequence[str]) -> str:
    """Return the colour of a method; folders with names of their own share four more colours in turn."""
    others = [name for name in methods if name not in COLOURS]
    return COLOURS.get(method) or _OTHERS[others.index(method) % len(_OTHERS)]


def view_bars(evaluations: Mapping[str, Json]) -> Picture:
    """Task 1: hit rate and NDCG with the user's fused, text and image vector, against fused items."""
    views = ("f2f", "t2f", "v2f")
    names = ("fused user\nf2f", "text user\nt2f", "image user\nv2f")
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 3.2), layout=ConstrainedLayoutEngine(wspace=0.06, hspace=0.06))
        for axes, metric in zip(figure.subplots(1, 2), ("H@10", "N@20"), strict=True):
            rows = {
                method: [
                    (_at(run, "candidates", view, metric), _at(run, "candidates_std", view, metric)) for view in views
                ]
                for method, run in evaluations.items()
            }
            _grouped_bars(axes, rows, names)
            _random_line(axes, metric)
            axes.set_title(f"{metric}, {CANDIDATES} candidates")
        _legend(figure, list(rows))
        return _saved(
            figure, "task1-views", "Task 1 hit rate and NDCG for fused, text and image user vectors by method"
        )


def recommender_bars(recommenders: Mapping[str, Mapping[str, Json]]) -> Picture:
    """Task 2: each recommender, started from ids and from each table."""
    methods = in_order(list({method for runs in recommenders.values() for method in runs}))
    models = list(recommenders)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 3.0), layout=ConstrainedLayoutEngine(wspace=0.06, hspace=0.06))
        for axes, metric in zip(figure.subplots(1, 2), ("H@10", "N@20"), strict=True):
            rows = {
                method: [
                    (
                        _at(recommenders[model].get(method, {}), "candidates", metric),
                        _at(recommenders[model].get(method, {}), "candidates_std", metric),
                    )
                    for model in models
                ]
                for method in methods
            }
            _grouped_bars(axes, rows, models)
            _random_line(axes, metric)
            axes.set_title(f"{metric}, {CANDIDATES} candidates")
        _legend(figure, methods)
        return _saved(figure, "task2-models", "Task 2 hit rate and NDCG of each recommender by where its items start")


def geometry_dots(evaluations: Mapping[str, Json]) -> Picture:
    """A_pos, A_neg, U and S of each view, one panel each."""
    panels = (
        ("A_pos", "user to next item\n$A_{pos}$: lower is nearer"),
        ("A_neg", "user to other items\n$A_{neg}$: higher is farther"),
        ("U", "spread of the space\n$U$: lower is more even"),
        ("S", "separability\n$A_{neg}/A_{pos}$: above 1 tells apart"),
    )
    views = (schema.FUSED, schema.TEXT, schema.IMAGE)
    methods = list(evaluations)
    with mpl.rc_context({**_STYLE, "axes.grid.axis": "x", "mathtext.default": "regular"}):
        figure = Figure(figsize=(9.6, 2.5), layout=ConstrainedLayoutEngine(wspace=0.06, hspace=0.06))
        for number, (axes, (name, title)) in enumerate(zip(figure.subplots(1, 4), panels, strict=True)):
            for place, method in enumerate(methods):
                values = [_at(evaluations[method], "geometry", view, name) for view in views]
                height = np.arange(3) + 0.22 * (place - (len(methods) - 1) / 2)
                colour = colour_of(method, methods)
                axes.plot(values, height, "o", color=colour, markersize=6.5 if method == VLM2REC else 5)
            axes.set_yticks(range(3), views if number == 0 else [""] * 3)
            axes.set_ylim(2.6, -0.6)
            axes.set_title(title.split("\n")[0], fontsize=8.5)
            axes.set_xlabel(title.split("\n")[1], fontsize=8)
            axes.spines["left"].set_visible(False)
            axes.margins(x=0.15)
            axes.locator_params(axis="x", nbins=4)
            if name == "S":
                axes.axvline(1, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        _legend(figure, methods, marker=True)
        return _saved(figure, "geometry", "Geometry of the fused, text and image space by method")


def learning_curves(curves: Mapping[str, Json]) -> Picture:
    """Loss parts, validation, margins of both modalities and the penalty over the steps of fine-tuning."""
    methods = list(curves)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 5.2), layout=ConstrainedLayoutEngine(wspace=0.06, hspace=0.06))
        (loss, valid), (margins, penalty) = figure.subplots(2, 2)
        for method in methods:
            train, colour = curves[method].get("train", []), colour_of(method, methods)
            _curve(loss, train, "loss", colour, "solid", f"{_label(method)}, total")
            _curve(loss, train, "wpcl", colour, (0, (4, 2)), f"{_label(method)}, WPCL", thin=True)
            _curve(loss, train, "crtr", colour, (0, (1, 1.5)), f"{_label(method)}, CRTR", thin=True)
            _curve(margins, train, "margin_text", colour, "solid", f"{_label(method)}, text")
            _curve(margins, train, "margin_image", colour, (0, (4, 2)), f"{_label(method)}, image")
            _curve(penalty, train, "weight", colour, "solid", "mean weight $w$")
            _curve(penalty, train, "alpha", colour, (0, (4, 2)), "$α$", thin=True)
            _curve(penalty, train, "beta", colour, (0, (1, 1.5)), "$β$", thin=True)
            points = [(row["step"], row["N@20"]) for row in curves[method].get("valid", []) if _number(row.get("N@20"))]
            if points:
                valid.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4.5, label=_label(method))
        for axes, title, label in (
            (loss, "Training loss", "loss (nats)"),
            (valid, "Validation", f"N@20, {CANDIDATES} candidates"),
            (margins, "Margin of each modality", "cosine of next item − mean of others"),
            (penalty, "Penalty on the negatives", "factor"),
        ):
            _finish_curves(axes, title, label)
        return _saved(figure, "learning", "Training loss, validation, margins and penalty over the training steps")


def collapse_curves(curves: Mapping[str, Json]) -> Picture:
    """Separability and effective rank on the fixed probe, the weak modality, and gradient alignment, over the steps."""
    methods = list(curves)
    dashes: dict[str, Any] = {schema.TEXT: "solid", schema.IMAGE: (0, (4, 2)), schema.FUSED: (0, (1, 1.5))}
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 5.2), layout=ConstrainedLayoutEngine(wspace=0.06, hspace=0.06))
        (separability, rank), (weak, alignment) = figure.subplots(2, 2)
        for method in methods:
            run, colour, label = curves[method], colour_of(method, methods), _label(method)
            for view, style in dashes.items():
                thin = view == schema.FUSED
                _curve(separability, run.get("probe", []), f"S_{view}", colour, style, f"{label}, {view}", thin)
                _curve(rank, run.get("probe", []), f"rank_{view}", colour, style, f"{label}, {view}", thin)
                _curve(
                    alignment, run.get("gradients", []), f"cos_total_{view}", colour, style, f"{label}, {view}", thin
                )
            _curve(weak, run.get("train", []), "weak_is_image", colour, "solid", label)
        for axes, title, label in (
            (separability, "Separability of each view, on the probe", "$S$: above 1 tells apart"),
            (rank, "Effective rank of the items, on the probe", "directions"),
            (weak, "Whose weak modality is the image", "share of a batch’s users"),
            (alignment, "Gradient of the loss against each modality’s own", "cosine"),
        ):
            _finish_curves(axes, title, label)
        return _saved(
            figure, "learning-collapse", "Separability, effective rank, weak modality and gradient alignment by step"
        )


def _finish_curves(axes: Axes, title: str, label: str) -> None:
    """Name a panel of curves over the steps, and its axes."""
    axes.set_title(title)
    axes.set_ylabel(label)
    axes.set_xlabel("training step")
    _curve_legend(axes)


def _curve_legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.margins(y=0.12)
        axes.legend(fontsize=7.5, ncols=2, loc="best", labelcolor=MUTED)
    else:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=MUTED)


def _curve(axes: Axes, rows: Sequence[Json], key: str, colour: str, style: Any, label: str, thin: bool = False) -> None:
    """Draw a running mean over the steps, with the raw values faint behind it."""
    points = [(row["step"], row[key]) for row in rows if _number(row.get(key))]
    if not points:
        return
    steps, values = (np.array(column, float) for column in zip(*points, strict=True))
    width = max(1, len(values) // 15)
    if width > 1 and not thin:
        axes.plot(steps, values, color=colour, alpha=0.16, linewidth=0.8)
    axes.plot(
        steps, _running_mean(values, width), color=colour, linestyle=style, linewidth=1.1 if thin else 1.7, label=label
    )


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of about `width` values around each; of fewer at both ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    start, end = np.maximum(0, places - width // 2), np.minimum(len(values), places + width // 2 + 1)
    return (total[end] - total[start]) / (end - start)


def _grouped_bars(axes: Axes, rows: Mapping[str, Sequence[tuple[float, float]]], groups: Sequence[str]) -> None:
    width = 0.78 / max(len(rows), 1)
    places = np.arange(len(groups))
    for number, (method, pairs) in enumerate(rows.items()):
        left = places + (number - (len(rows) - 1) / 2) * width
        values, errors = zip(*pairs, strict=True)
        axes.bar(left, values, width * 0.88, color=colour_of(method, list(rows)))
        axes.errorbar(left, values, np.nan_to_num(errors), fmt="none", ecolor=INK, elinewidth=0.8)
        for x, value, error in zip(left, values, np.nan_to_num(errors), strict=True):
            if _number(value):
                top = (x, value + error)
                axes.annotate(_short(value), top, (0, 2), textcoords="offset points", ha="center", fontsize=7.5)
    axes.set_xticks(places, groups)
    axes.grid(axis="x", visible=False)
    axes.spines["left"].set_visible(False)
    axes.margins(y=0.14)


def _random_line(axes: Axes, metric: str) -> None:
    floor = RANDOM_FLOOR[metric]
    axes.axhline(floor, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    edge = (axes.get_xlim()[1], floor)
    label = f"random\n{_short(floor)}"
    axes.annotate(label, edge, (3, 0), textcoords="offset points", va="center", fontsize=7.5, color=MUTED)


def _short(value: float) -> str:
    """`0.4121` → `.412`."""
    return f"{value:.3f}".removeprefix("0")


def _label(method: str) -> str:
    """Return a method's name as plain text: a folder's name may hold what matplotlib reads as mathematics."""
    return method_name(method).replace("$", r"\$").lstrip("_")


def _legend(figure: Figure, methods: Sequence[str], marker: bool = False) -> None:
    handles = [
        Line2D([], [], marker="o", linestyle="", color=colour_of(method, methods), label=_label(method))
        if marker
        else Patch(color=colour_of(method, methods), label=_label(method))
        for method in methods
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), fontsize=9)


def _saved(figure: Figure, name: str, alt: str) -> Picture:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return Picture(name, alt, file.getvalue())


def _at(tree: Mapping[str, Any], *path: str) -> float:
    """Return a number deep in a JSON object, NaN where it is absent."""
    value: Any = tree
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) if _number(value) else math.nan


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def method_name(method: str) -> str:
    """Return how a method is called in print: the paper's name, or the folder's own."""
    return METHOD_NAMES.get(method, method)


def in_order(methods: list[str]) -> list[str]:
    """Sort methods as the tables list them: ID, vanilla, anything else, SFT, VLM2Rec."""
    places = {ID: 0, VANILLA: 1, SFT: 3, VLM2REC: 4}
    return sorted(methods, key=lambda method: (places.get(method, 2), method))


@dataclass
class RunFolder:
    """The outputs found in a run folder, by method ("vanilla", "sft", "vlm2rec", or the folder's name)."""

    path: Path
    demo: Json | None = None
    dataset: Dataset | None = None
    adapters: dict[str, Json] = field(default_factory=dict)  # vlm2rec.json
    curves: dict[str, Json] = field(default_factory=dict)
    embeddings: dict[str, Path] = field(default_factory=dict)
    manifests: dict[str, Json] = field(default_factory=dict)
    evaluations: dict[str, Json] = field(default_factory=dict)  # Task 1 metrics.json
    recommenders: dict[str, dict[str, Json]] = field(default_factory=dict)  # model → method → Task 2 metrics.json
    users: dict[tuple[str, str], Path] = field(default_factory=dict)  # (model or "", method) → users.parquet
    index: Json | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether no stage's output was found."""
        return not (
            self.dataset or self.curves or self.embeddings or self.evaluations or self.recommenders or self.index
        )


def read_run(path: Path) -> RunFolder:
    """Find every stage's output in `path` and its subfolders.

    Raises:
        ArtifactError: `path` is not a folder, or nothing in it was written by vlm2rec.
    """
    if not path.is_dir():
        raise ArtifactError(
            f"{path} is not a folder", "a folder with the stages' outputs", "run `vlm2rec demo`, or give --run another"
        )
    run = RunFolder(path)
    folders = [path, *sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))]
    for folder in folders:
        for found in (_demo, _dataset, _adapter, _embeddings, _metrics, _index):
            try:
                found(run, folder)
            except Vlm2RecError as error:
                run.notes.append(str(error))
    run.recommenders = {model: run.recommenders[model] for model in sorted(run.recommenders, key=_model_place)}
    _dataset_of_the_embeddings(run)
    if run.empty:
        raise ArtifactError(
            f"{path} holds no output of vlm2rec{_and(run.notes)}",
            "subfolders written by prepare, finetune, export-items, evaluate, train-recommender or build-index",
            "give --run the folder above them",
        )
    return run


def _model_place(model: str) -> tuple[int, str]:
    known = ("SASRec", "GRU4Rec", "BERT4Rec")
    return (known.index(model) if model in known else len(known), model)


def _and(notes: list[str]) -> str:
    return f" that can be read ({notes[0].rstrip('.')})" if notes else ""


def _run_label(folder: Path, prefix: str) -> str:
    """`evaluate-SFT` → `sft`; a folder named otherwise keeps its name."""
    name = folder.name.removeprefix(prefix)
    return name.lower() if name.lower() in METHOD_NAMES else name


def _read(folder: Path, file: str, what: str) -> Json | None:
    if not (folder / file).is_file():
        return None
    return schema.read_json(folder / file, what, "run the stage again that wrote this folder")


def _demo(run: RunFolder, folder: Path) -> None:
    if folder == run.path:
        run.demo = _read(folder, DEMO_FILE, "what `vlm2rec demo` noted")


def _dataset(run: RunFolder, folder: Path) -> None:
    if run.dataset is None and (folder / schema.DATASET_FILE).is_file():
        dataset = Dataset(folder)
        assert dataset.items is not None  # reads the file: a damaged one is a note, here and now
        run.dataset = dataset


def _adapter(run: RunFolder, folder: Path) -> None:
    method = _run_label(folder, "adapter-")
    settings = _read(folder, ADAPTER_FILE, "the settings of an adapter")
    if settings is not None:
        run.adapters[method] = settings
    curves = _read(folder, CURVES_FILE, "the curves of a fine-tuning run")
    if curves is not None:
        run.curves[method] = curves


def _embeddings(run: RunFolder, folder: Path) -> None:
    unfinished = any(folder.glob("part-*.parquet")) and not (folder / schema.MANIFEST_FILE).is_file()
    if unfinished or (folder / schema.MANIFEST_FILE).is_file():
        method = _run_label(folder, "embeddings-")
        run.manifests[method] = schema.read_manifest(folder)
        run.embeddings[method] = folder


def _metrics(run: RunFolder, folder: Path) -> None:
    metrics = _read(folder, METRICS_FILE, "metrics of `vlm2rec evaluate` or `vlm2rec train-recommender`")
    if metrics is None:
        return
    if metrics.get("task") == 1:
        model, method = "", _run_label(folder, "evaluate-")
        run.evaluations[method] = metrics
    elif metrics.get("task") == 2:
        model = str(metrics.get("model"))
        method = ID if metrics.get("start") == ID else _run_label(folder, f"recommender-{model}-")
        run.recommenders.setdefault(model, {})[method] = metrics
    else:
        raise ArtifactError(
            f"{folder / METRICS_FILE} names task {metrics.get('task')!r}", "task 1 or 2", "run the stage again"
        )
    if (folder / USERS_FILE).is_file():
        run.users[model, method] = folder / USERS_FILE


def _index(run: RunFolder, folder: Path) -> None:
    found = _read(folder, INDEX_FILE, "what `vlm2rec build-index` measured")
    run.index = found if found is not None else run.index


def _dataset_of_the_embeddings(run: RunFolder) -> None:
    """Take titles and pictures from the dataset that the embeddings were exported from, if none lies in the run."""
    for manifest in run.manifests.values():
        data = manifest.get("data")
        if run.dataset is None and data and (Path(data) / schema.DATASET_FILE).is_file():
            try:
                _dataset(run, Path(data))
            except Vlm2RecError as error:
                run.notes.append(str(error))
