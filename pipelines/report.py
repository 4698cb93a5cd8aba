"""`vlm2rec report`: one HTML page about a run folder, with everything inside it. It opens without a network."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from markupsafe import Markup

from vlm2rec.downstream.evaluation.metrics import paired_bootstrap
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ConfigError, DataError, Vlm2RecError
from vlm2rec.pipelines.config import ReportConfig
from vlm2rec.pipelines.console import log, summary
from vlm2rec.pipelines.experiments.neighbours import (
    AMONG,
    Common,
    Pictures,
    Query,
    attributes_of,
    disagreeing,
    in_common,
    look_up,
    read_views,
    spread_out,
)
from vlm2rec.pipelines.reporting import style as figures
from vlm2rec.pipelines.reporting.page import VIEW_ORDER, page_template
from vlm2rec.pipelines.reporting.style import (
    ID,
    SFT,
    VANILLA,
    VLM2REC,
    Json,
    RunFolder,
    in_order,
    method_name,
    read_run,
)

METRICS = ("H@10", "H@20", "N@10", "N@20")
QUERIES = 5
NEIGHBOURS = 7

# The paper's Beauty columns (Tables 2 and 4), in the order of METRICS; the key "" is Task 1.
PAPER_BEAUTY: dict[str, dict[str, tuple[float, float, float, float]]] = {
    "": {
        VANILLA: (0.2096, 0.3379, 0.1097, 0.1419),
        SFT: (0.4038, 0.6372, 0.2744, 0.3300),
        VLM2REC: (0.5644, 0.6822, 0.3824, 0.4121),
    },
    "GRU4Rec": {
        ID: (0.3903, 0.4898, 0.2624, 0.2875),
        VANILLA: (0.4358, 0.5427, 0.2882, 0.3094),
        SFT: (0.4511, 0.5604, 0.3021, 0.3296),
        VLM2REC: (0.5064, 0.6185, 0.3386, 0.3669),
    },
    "SASRec": {
        ID: (0.4280, 0.5283, 0.2984, 0.3236),
        VANILLA: (0.4535, 0.5605, 0.3141, 0.3408),
        SFT: (0.4805, 0.5890, 0.3298, 0.3570),
        VLM2REC: (0.5346, 0.6466, 0.3649, 0.3932),
    },
}


@dataclass
class Cell:
    """One number of a metrics table."""

    value: float | None
    std: float | None = None
    best: bool = False


@dataclass
class MetricsRow:
    """One method of a metrics table: candidates, full ranking, and the paper's Beauty row."""

    method: str
    name: str
    candidates: list[Cell]
    full: list[Cell]
    paper: tuple[float, ...] | None


@dataclass
class MetricsTable:
    """All methods of Task 1, or of one recommender of Task 2."""

    title: str
    rows: list[MetricsRow]
    differences: list[str]
    note: str


@dataclass
class GeometryRow:
    """Geometry of one view of one method."""

    method: str
    name: str
    view: str
    cells: list[float | None]


@dataclass
class Neighbourhood:
    """What the views of one embeddings folder find."""

    method: str
    name: str
    queries: list[Query]
    disagreements: list[Query]
    shared: float | None  # of ten neighbours, how many text and image share on average
    common: list[Common]
    sampled: bool


@dataclass
class Page:
    """Everything the template prints."""

    title: str
    lede: str
    created: str
    tiles: list[tuple[str, str]]
    stages: list[Json]
    seconds: float | None
    counts: list[Json]
    hero: list[int]
    task1: MetricsTable | None
    task2: list[MetricsTable]
    geometry: list[GeometryRow]
    collapses: list[tuple[str, str]]
    figures: dict[str, Markup]
    neighbourhoods: list[Neighbourhood]
    index: Json | None
    settings: list[tuple[str, list[tuple[str, str]]]]
    versions: dict[str, str]
    notes: list[str]
    titles: dict[int, str] = field(default_factory=dict)
    item_ids: dict[int, str] = field(default_factory=dict)
    pictures: dict[int, str] = field(default_factory=dict)


def run(config: ReportConfig) -> Path:
    """Write the report of a run folder, and its figures as SVG files in `figures/` beside it; return its path.

    Parts of the line that were not run are left out with a note.

    Raises:
        ArtifactError: the folder holds nothing that vlm2rec wrote.
        ConfigError: the report cannot be written where it was asked for.
    """
    out = config.out if config.out is not None else config.run / "report.html"
    _refuse_folder(out)
    found = read_run(config.run)
    drawn = draw_figures(found)
    page = make_page(found, {picture.name: Markup(picture.inline()) for picture in drawn})
    out.parent.mkdir(parents=True, exist_ok=True)
    schema.write_text(out, render(page))
    for picture in drawn:
        (out.parent / "figures").mkdir(exist_ok=True)
        schema.write_text(out.parent / "figures" / f"{picture.name}.svg", picture.svg)
    for note in found.notes:
        log.print(f"left out: {note}", style="yellow", markup=False, soft_wrap=True)
    size = out.stat().st_size
    summary("Report", {"page": f"{out}  {size / 1e6:.1f} MB", "figures": f"{len(drawn)} in {out.parent / 'figures'}"})
    return out


def render(page: Page) -> str:
    """Return the page as HTML."""
    filters: dict[str, Callable[..., Any]] = {
        "short": _short,
        "seconds": _duration,
        "count": lambda value: f"{value:,}",
        "method": method_name,
    }
    return page_template("report.html.j2", filters).render(
        page=page, metrics=METRICS, floor=figures.RANDOM_FLOOR, views=VIEW_ORDER, among=AMONG
    )


def draw_figures(found: RunFolder) -> list[figures.Picture]:
    """Draw the figures whose data are there."""
    drawn = []
    if found.evaluations:
        ordered = {method: found.evaluations[method] for method in in_order(list(found.evaluations))}
        drawn.append(figures.view_bars(ordered))
        if any(metrics.get("geometry") for metrics in ordered.values()):
            drawn.append(figures.geometry_dots(ordered))
    if found.recommenders:
        drawn.append(figures.recommender_bars(found.recommenders))
    if found.curves:
        ordered = {method: found.curves[method] for method in in_order(list(found.curves))}
        drawn.append(figures.learning_curves(ordered))
        if any(run.get("probe") or run.get("gradients") for run in ordered.values()):
            drawn.append(figures.collapse_curves(ordered))
    return drawn


def make_page(found: RunFolder, drawn: dict[str, Markup]) -> Page:
    """Gather what the template prints."""
    meta = found.dataset.meta if found.dataset else {}
    demo = found.demo or {}
    task1 = metrics_table(found, "", found.evaluations) if found.evaluations else None
    task2 = [metrics_table(found, model, runs) for model, runs in found.recommenders.items()]
    pictures = Pictures(found.dataset) if found.dataset else None
    page = Page(
        title=str(meta.get("name") or found.path.resolve().name),
        lede=_lede(task1, task2),
        created=datetime.datetime.now(datetime.UTC).strftime("%d %B %Y, %H:%M UTC"),
        tiles=_tiles(found),
        stages=_stages(demo),
        seconds=demo.get("seconds"),
        counts=list(meta.get("counts", [])),
        hero=_hero(found.dataset),
        task1=task1,
        task2=task2,
        geometry=_geometry(found),
        collapses=_collapses(found),
        figures=drawn,
        neighbourhoods=_neighbourhoods(found),
        index=found.index,
        settings=_settings(found),
        versions=_versions(found),
        notes=found.notes,
    )
    if found.dataset and pictures:
        _add_items(page, found.dataset, pictures)
    page.notes = [*_absent(page), *found.notes]
    return page


def _absent(page: Page) -> list[str]:
    """Say which parts the page does not have, and which command would give them."""
    parts = {
        "how long the stages took: there is no demo.json": page.stages,
        "Task 1 and the geometry: there is no output of `vlm2rec evaluate`": page.task1,
        "Task 2: there is no output of `vlm2rec train-recommender`": page.task2,
        "loss curves: there is no output of `vlm2rec finetune`": "learning" in page.figures,
        "neighbours: there is no output of `vlm2rec export-items` with a dataset": page.neighbourhoods,
    }
    return [text for text, present in parts.items() if not present]


def _add_items(page: Page, dataset: Dataset, pictures: Pictures) -> None:
    """Look up title and picture of every item that the page shows."""
    rows = set(page.hero)
    for part in page.neighbourhoods:
        for query in (*part.queries, *part.disagreements):
            rows.add(query.row)
            rows.update(near.row for found in query.found.values() for near in found)
    for row in sorted(rows):
        page.titles[row], page.item_ids[row] = dataset.titles[row], dataset.item_ids[row]
        picture = pictures.of(row)
        if picture is not None:
            page.pictures[row] = picture


# --- metrics ------------------------------------------------------------------------------------------------


def metrics_table(found: RunFolder, model: str, runs: Mapping[str, Json]) -> MetricsTable:
    """Return the table of Task 1 (`model` empty) or of one recommender, with the best of each column marked."""
    rows = []
    for method in in_order(list(runs)):
        metrics = runs[method]
        view = ("f2f",) if not model else ()
        candidates, std = (_part(metrics, part, *view) for part in ("candidates", "candidates_std"))
        full = _part(metrics, "full", *view)
        rows.append(
            MetricsRow(
                method,
                method_name(method),
                [Cell(_number(candidates.get(m)), _number(std.get(m))) for m in METRICS],
                [Cell(_number(full.get(m))) for m in METRICS],
                PAPER_BEAUTY.get(model, {}).get(method),
            )
        )
    for part in ("candidates", "full"):
        for column in range(len(METRICS)):
            _mark_best([getattr(row, part)[column] for row in rows])
    return MetricsTable(model or "Task 1", rows, _differences(found, model, runs), _about(runs))


def _part(metrics: Json, *path: str) -> Json:
    value: Any = metrics
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _mark_best(cells: list[Cell]) -> None:
    values = [cell.value for cell in cells if cell.value is not None]
    if len(values) < 2:
        return
    for cell in cells:
        cell.best = cell.value == max(values)


def _about(runs: Mapping[str, Json]) -> str:
    """Say over how many users and candidate seeds the numbers are means, as far as all runs agree."""

    def agreed(key: str, read: Callable[[Any], Any] = lambda value: value) -> Any:
        values = {read(metrics[key]) for metrics in runs.values() if metrics.get(key) is not None}
        return values.pop() if len(values) == 1 else None

    parts = []
    if users := agreed("users"):
        parts.append(f"{users:,} users")
    if items := agreed("items"):
        parts.append(f"{items:,} items")
    if seeds := agreed("seeds", len):
        parts.append(f"{seeds} candidate {'sets' if seeds > 1 else 'set'} each")
    if source := agreed("users_from"):
        text = {"sequence": "user vectors from the sequence encoder", "mean": "user vectors are means of item vectors"}
        parts.append(text.get(source, f"user vectors: {source}"))
    return ", ".join(parts)


def _differences(found: RunFolder, model: str, runs: Mapping[str, Json]) -> list[str]:
    """Compare VLM2Rec with every other method, user by user: N@20 on the candidates, mean over seeds."""
    if VLM2REC not in runs or (model, VLM2REC) not in found.users:
        return []
    lines = []
    for other in in_order([method for method in runs if method != VLM2REC and (model, method) in found.users]):
        try:
            ours, theirs = (_per_user(found.users[model, method]) for method in (VLM2REC, other))
            users = sorted(ours.keys() & theirs.keys())
            difference = paired_bootstrap(
                np.array([ours[user] for user in users]), np.array([theirs[user] for user in users]), draws=2000
            )
        except Vlm2RecError as error:
            found.notes.append(str(error))
            continue
        mean, low, high = (f"{value:+.3f}".replace("-", "−") for value in difference)
        lines.append(f"VLM2Rec − {method_name(other)}: {mean} [{low}, {high}]")
    return lines


def _per_user(path: Path) -> dict[str, float]:
    """Return each user's N@20 on the candidates, mean over seeds."""
    table = schema.read_table(path, fix="run the stage again that wrote it")
    schema.require_columns(
        table.column_names, [schema.USER_ID, "protocol", "view", "N@20"], path.name, "run the stage again"
    )
    view = table["view"]
    chosen = pc.and_(
        pc.equal(table["protocol"], "candidates"), pc.or_(pc.is_null(view), pc.fill_null(pc.equal(view, "f2f"), False))
    )
    means = table.filter(chosen).group_by(schema.USER_ID).aggregate([("N@20", "mean")])
    if not means.num_rows:
        raise DataError(f"{path} holds no user for the candidates", "rows of protocol 'candidates'", "evaluate again")
    return dict(zip(means[schema.USER_ID].to_pylist(), means["N@20_mean"].to_pylist(), strict=True))


def _lede(task1: MetricsTable | None, task2: list[MetricsTable]) -> str:
    """Say in a sentence or two what came out."""
    sentences = []
    if task1:
        scores = _named_scores(task1)
        if scores:
            sentences.append(
                f"Ranking each user's next item among 101 candidates by similarity alone, N@20 is {scores};"
                f" a random order reaches {_short(figures.RANDOM_FLOOR['N@20'])}."
            )
    if task2:
        scores = _named_scores(task2[0])
        if scores:
            sentences.append(f"{task2[0].title} trained from each starting point reaches {scores}.")
    return " ".join(sentences)


def _named_scores(table: MetricsTable) -> str:
    parts = [(row.name, row.candidates[-1].value) for row in reversed(table.rows)]
    return ", ".join(f"{_short(value)} for {name}" for name, value in parts if value is not None)


def _geometry(found: RunFolder) -> list[GeometryRow]:
    rows = []
    for view in schema.VIEWS:
        for method in in_order(list(found.evaluations)):
            values = _part(found.evaluations[method], "geometry", view)
            if values:
                cells = [_number(values.get(name)) for name in ("A_pos", "A_neg", "U", "S")]
                rows.append(GeometryRow(method, method_name(method), view, cells))
    return rows


def _collapses(found: RunFolder) -> list[tuple[str, str]]:
    """Return what the collapse monitor noticed, as (method, text)."""
    lines = []
    for method in in_order(list(found.curves)):
        for entry in found.curves[method].get("warnings", []):
            end = "to the end" if entry.get("until") is None else f"until step {entry['until']}"
            lines.append((method, f"from step {entry.get('step')} {end}: {entry.get('message')}"))
    return lines


# --- what ran -----------------------------------------------------------------------------------------------


def _tiles(found: RunFolder) -> list[tuple[str, str]]:
    tiles = []
    if found.dataset:
        meta = found.dataset.meta
        for key, label in (("items", "items"), ("users", "users"), ("interactions", "interactions")):
            if isinstance(meta.get(key), int):
                tiles.append((f"{meta[key]:,}", label))
        if isinstance(meta.get("average_length"), int | float):
            tiles.append((f"{meta['average_length']:.1f}", "items a user, on average"))
    dims = {manifest.get("dim") for manifest in found.manifests.values()}
    if len(dims) == 1:
        tiles.append((f"{dims.pop():,}", "numbers in a vector"))
    if found.demo and found.demo.get("seconds"):
        tiles.append((_duration(found.demo["seconds"]), "from catalogue to report"))
    return tiles


def _stages(demo: Json) -> list[Json]:
    stages = [stage for stage in demo.get("stages", []) if isinstance(stage.get("seconds"), int | float)]
    longest = max((stage["seconds"] for stage in stages), default=0)
    return [
        {
            "name": str(stage.get("stage", "")),
            "what": str(stage.get("what", "")),
            "seconds": stage["seconds"],
            "width": round(100 * stage["seconds"] / longest, 1) if longest else 0,
        }
        for stage in stages
    ]


def _settings(found: RunFolder) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the settings of every stage as (title, [(key, value)])."""
    parts: list[tuple[str, Json]] = []
    if found.demo:
        parts.append(("demo", found.demo.get("settings", {})))
    if found.dataset:
        parts.append(("prepare", found.dataset.meta.get("rules", {})))
    parts += [(f"finetune, {method_name(m)}", found.adapters[m]) for m in in_order(list(found.adapters))]
    parts += [
        (f"export-items, {method_name(m)}", found.manifests[m].get("settings", {}))
        for m in in_order(list(found.manifests))
    ]
    for model, runs in found.recommenders.items():
        for method in in_order(list(runs)):
            wanted = ("start", "mode", "epochs", "best_epoch", "seconds", "parameters", "missing", "seed")
            chosen = {key: runs[method][key] for key in wanted if key in runs[method]}
            parts.append((f"train-recommender, {model}, {method_name(method)}", chosen))
    return [(title, _flat(values)) for title, values in parts if isinstance(values, dict) and values]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested settings as dotted keys and short texts."""
    rows = []
    for key, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append((f"{prefix}{key}", text if len(text) <= 160 else text[:160] + "…"))
    return rows


def _versions(found: RunFolder) -> dict[str, str]:
    """Return the versions that the stages noted; the demo's cover all of them."""
    notes = [found.demo or {}, *found.manifests.values(), *found.adapters.values()]
    for note in notes:
        versions = note.get("versions")
        if isinstance(versions, dict) and versions:
            return {str(name): str(version) for name, version in versions.items()}
    return {}


# --- items --------------------------------------------------------------------------------------------------


def _hero(dataset: Dataset | None, count: int = 24) -> list[int]:
    """Return evenly spread rows of the catalogue."""
    if dataset is None:
        return []
    return np.unique(np.linspace(0, len(dataset.item_ids) - 1, count).astype(int)).tolist()


def _neighbourhoods(found: RunFolder) -> list[Neighbourhood]:
    """Look up the same items in every embeddings folder, the last method of the tables first."""
    if found.dataset is None:
        if found.embeddings:
            found.notes.append("neighbours need titles and pictures, and there is no dataset folder")
        return []
    parts: list[Neighbourhood] = []
    queries: list[int] | None = None
    for method in reversed(in_order(list(found.embeddings))):
        try:
            part = _neighbourhood(found.dataset, method, found.embeddings[method], queries)
        except Vlm2RecError as error:
            found.notes.append(str(error))
            continue
        if part is not None:
            parts.append(part)
            queries = [query.row for query in parts[0].queries]
    return parts


def _neighbourhood(dataset: Dataset, method: str, folder: Path, queries: list[int] | None) -> Neighbourhood | None:
    views = read_views(folder, dataset)
    if views is None:
        return None
    if queries is None:
        base = views.vectors.get(schema.FUSED, next(iter(views.vectors.values())))
        first = int(np.argmax(dataset.train_frequency()[views.rows]))
        queries = [int(views.rows[place]) for place in spread_out(base, first, QUERIES)]
    both = {*schema.MODALITIES} <= views.vectors.keys()
    rows, shared = disagreeing(views, QUERIES - 1) if both else ([], None)
    return Neighbourhood(
        method,
        method_name(method),
        look_up(views, queries, NEIGHBOURS),
        look_up(views, rows, NEIGHBOURS) if rows else [],
        shared,
        in_common(views, dataset, attributes_of(dataset)),
        views.sampled,
    )


# --- writing ------------------------------------------------------------------------------------------------


def _refuse_folder(out: Path) -> None:
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder", "the name of an HTML file", f"give --out {out / 'report.html'}")


def _short(value: float | None, digits: int = 3) -> str:
    """`0.4121` → `.412`; nothing → `–`."""
    if value is None:
        return "–"
    text = f"{value:.{digits}f}".replace("-", "−")
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s" if seconds >= 0.05 else "under 0.1 s"
    return f"{seconds:.0f} s" if seconds < 100 else f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None
