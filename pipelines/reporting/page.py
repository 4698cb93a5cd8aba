"""One HTML page about a study, and its figures as SVG and PNG, drawn only from its Parquet files."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from vlm2rec.embedder.contract import publish, schema
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.pipelines.console import log
from vlm2rec.pipelines.experiments.methods import RATIONALES, RIVALS, Json
from vlm2rec.pipelines.experiments.neighbours import MOST_ITEMS, NEAREST
from vlm2rec.pipelines.experiments.results import COMPARED, random_floor
from vlm2rec.pipelines.reporting import figures, tables
from vlm2rec.pipelines.reporting.gates import PASSED, UNMEASURED, Gate
from vlm2rec.pipelines.reporting.style import VARIABLES
from vlm2rec.pipelines.reporting.tables import Cell, Group, Results, Row, Sheet, number
from vlm2rec.pipelines.reporting.verdicts import (
    CURE,
    HOLDS,
    OPEN,
    PAPER,
    PARADOX,
    UNTESTABLE,
    Claim,
    Verdicts,
    verdicts,
)

TEMPLATE = "page.html.j2"
PAGE_FILE = "report.html"
FIGURES = "figures"
VERDICTS_FILE = "verdicts.json"
"""The gates and the verdicts for programs, beside the page."""
VIEW_ORDER = (schema.TEXT, schema.IMAGE, schema.FUSED)
_WORDS_OF_VIEWS = {schema.TEXT: "by text", schema.IMAGE: "by image", schema.FUSED: "by both"}
HERO = 12
"""Pictures in the row at the top."""
MOST_STAGES = 40
"""Up to this many steps, each step has a bar; above it, each kind of step has one."""
MOST_WARNINGS = 12
"""Up to this many warnings, each has a line; above it, each method and view has one."""


@dataclass(frozen=True)
class Stage:
    """One bar of the section "What ran": its seconds, and its length in percent of the longest bar."""

    name: str
    what: str
    seconds: float
    width: float


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    anchor: str
    title: str
    words: tuple[str, ...] = ()
    sheets: tuple[Sheet, ...] = ()
    figures: tuple[str, ...] = ()
    lines: tuple[tuple[str, str], ...] = ()  # (method, a sentence about it)
    why: str = ""  # why the numbers may differ from the paper's

    def has(self, drawn: Mapping[str, Any]) -> bool:
        """Tell whether the section has a table or a figure."""
        return bool(self.sheets) or any(name in drawn for name in self.figures)


@dataclass(frozen=True)
class Grid:
    """An item and its neighbours in each view, as item ids."""

    query: str
    found: dict[str, list[tuple[str, float]]]
    shared: int


@dataclass(frozen=True)
class Neighbourhood:
    """The neighbours in the vectors of one method."""

    method: str
    spread: list[Grid]
    disagreeing: list[Grid]
    shared: float | None  # mean number of neighbours, of ten, that text and image have in common


@dataclass
class Page:
    """Everything the template prints."""

    kind: str
    title: str
    reference: str
    lede: str
    warning: str
    measured: bool  # false while a demo has vectors and nothing else
    tiles: list[tuple[str, str]]
    stages: list[Stage]
    seconds: float
    counts: Sheet | None
    index: str
    gates: list[Gate]
    families: list[list[Claim]]  # the first claim of each sums up the others
    verdicts: list[Claim]  # the other claims
    one_seed: bool
    sections: list[Section]
    figures: dict[str, Markup]
    neighbourhoods: list[Neighbourhood]
    common: Sheet | None
    sampled: bool
    hero: list[str]
    titles: dict[str, str]
    pictures: dict[str, tuple[int, str]]
    colours: dict[str, str]
    settings: list[tuple[str, str]]
    methods: list[tuple[str, str]]
    notes: list[str] = field(default_factory=list)


def run(study: Path, out: Path | None = None) -> Path:
    """Write the page of a study folder, with its figures in `figures/` beside it, and return its path.

    Args:
        study: folder of the Parquet files.
        out: HTML file; default: `report.html` in the study folder.

    Raises:
        ConfigError: the page or a figure would replace a file that vlm2rec has not written.
        ArtifactError: a Parquet file of the study is missing, a row to print breaks the bound on N@20 - N@10, or the
            disk is full.
    """
    out = study / PAGE_FILE if out is None else out
    _require_ours(out)
    machine = out.parent / VERDICTS_FILE
    if machine.exists() and not schema.is_written_by(machine, figures.OURS):
        raise _not_ours(machine)
    results = Results.open(study)
    found = verdicts(results)
    drawn = figures.draw(results, found)
    page = make_page(results, {each.name: Markup(each.picture.inline()) for each in drawn}, found)
    folder = out.parent / FIGURES
    pictures = {folder / f"{each.name}.svg": each.picture.svg.encode() for each in drawn}
    pictures |= {folder / f"{each.name}.png": each.png for each in drawn}
    for path in pictures:
        _require_ours(path)
    with publish.plain_disk_errors(out):
        folder.mkdir(parents=True, exist_ok=True)
        if out.parent == study:  # those of figures that the study no longer has
            for old in [*folder.glob("*.svg"), *folder.glob("*.png")]:
                if _is_ours(old, marked=True):
                    old.unlink()
        for path, content in pictures.items():
            publish.write_whole(path, content)
        schema.write_json(machine, {"written_by": figures.OURS, "dataset": results.dataset, **found.plain()})
        schema.write_text(out, render(page))
    return out


def print_verdicts(page: Path) -> None:
    """Print the gates and verdicts that `run` wrote beside a page."""
    found = schema.read_json(page.parent / VERDICTS_FILE, "the verdicts of a study", "run `vlm2rec report` again")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for gate in found["gates"]:
        table.add_row(Text(f"gate {gate['status']}"), Text(f"{gate['text']}: {gate['found']}"))
    for claim in found["claims"]:
        if claim["family"] == PAPER:
            continue
        sums_up = claim["key"] == claim["family"]
        table.add_row(Text(claim["verdict"], "bold" * sums_up), Text(f"{claim['text']}: {claim['found']}"))
    log.result(table)


# how our figures and pages begin: the mark of today, and what earlier versions wrote before there was a mark
_FIGURE_MARKS = (figures.OURS.encode(), b"Matplotlib v")
_PAGE_MARKS = (b'<meta name="generator" content="vlm2rec">', b"--vlm2rec: #d1500b")


def _require_ours(path: Path) -> None:
    if path.exists() and not _is_ours(path):
        raise _not_ours(path)


def _not_ours(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} exists, and `vlm2rec report` has not written it",
        "a new file, or an earlier page with its figures",
        f"move it away, or give another --out: {VERDICTS_FILE} and {FIGURES}/ go beside the page",
    )


def _is_ours(path: Path, *, marked: bool = False) -> bool:
    """Tell whether a page or a figure is ours, or was written by a version without marks unless `marked` is asked."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        beginning = file.read(4096)
    marks = _FIGURE_MARKS if path.parent.name == FIGURES and path.suffix in (".svg", ".png") else _PAGE_MARKS
    return any(mark in beginning for mark in (marks[:1] if marked else marks))


def render(page: Page) -> str:
    """Return the page as HTML; all text from files is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {"number": number, "seconds": duration}
    environment.filters.update(filters)
    template = environment.get_template(TEMPLATE)
    good, neutral = (HOLDS, PASSED), (OPEN, UNTESTABLE, UNMEASURED)
    words = {"views": VIEW_ORDER, "words_of_views": _WORDS_OF_VIEWS, "good": good, "neutral": neutral}
    return template.render(page=page, among=NEAREST, **words)


def make_page(results: Results, drawn: dict[str, Markup], found: Verdicts | None = None) -> Page:
    """Collect everything that the template prints; `found` are its verdicts, if they are known already."""
    found = verdicts(results) if found is None else found
    pictures = results.frames["pictures"]
    with_picture = pictures.filter(pl.col("picture").is_not_null())
    ids = pictures[schema.ITEM_ID].to_list()
    stages = _stages(results)
    return Page(
        kind="vlm2rec demo" if "demo" in results.facts else "vlm2rec study",
        title=results.dataset,
        reference=results.reference,
        lede=_lede(results, found),
        warning=_warning(results),
        measured=results.frames["results"].height > 0,
        tiles=_tiles(results),
        stages=stages,
        seconds=_seconds(results),
        counts=tables.counts_sheet(results),
        index=_index(results.facts.get("index")),
        gates=found.gates,
        families=[claims for family in (PARADOX, CURE) if (claims := found.of(family))],
        verdicts=found.of(PAPER),
        one_seed=results.frames["results"]["seed"].n_unique() == 1,
        sections=[section for section in _sections(results) if section.has(drawn)],
        figures=drawn,
        neighbourhoods=_neighbourhoods(results),
        common=_common_sheet(results),
        sampled=results.facts["items"] > MOST_ITEMS,
        hero=with_picture[schema.ITEM_ID].gather_every(max(1, with_picture.height // HERO)).to_list()[:HERO],
        titles=dict(zip(ids, pictures[schema.TITLE].to_list(), strict=True)),
        pictures={
            row[schema.ITEM_ID]: (place, base64.b64encode(row["picture"]).decode("ascii"))
            for place, row in enumerate(with_picture.iter_rows(named=True))
        },
        colours={name: f"var(--{VARIABLES[colour]})" for name, colour in figures.colours(results).items()},
        settings=_settings(results),
        methods=_methods(results),
        notes=results.facts["notes"],
    )


# --- sentences ----------------------------------------------------------------------------------------------


def _lede(results: Results, found: Verdicts) -> str:
    among = results.facts["candidates"] + 1
    text = []
    if scores := _scores(results, 1, None):
        floor = number(random_floor(COMPARED, among), 3)
        text.append(
            f"When the next item is ranked among {among} candidates by similarity alone, {COMPARED} is {scores}."
            f" A random order reaches {floor}."
        )
    for model in results.models()[:1]:
        if scores := _scores(results, 2, model):
            text.append(f"In Task 2, {COMPARED} of {model} is {scores}.")
    if not text:
        return ""
    if found.gates:
        paradox, cure = (found.of(family)[0].verdict for family in (PARADOX, CURE))
        text.append(f"The paper’s paradox: {paradox}. Its cure: {cure}.")
    if tested := found.of(PAPER):
        held = sum(claim.verdict == HOLDS for claim in tested)
        text.append(f"Of {len(tested)} other claims of the paper, {held} hold in these runs.")
    return " ".join(text)


def _scores(results: Results, task: int, model: str | None) -> str:
    """Return the main methods' scores as text: `.412 for VLM2Rec, .330 for SFT`."""
    ids = [method["name"] for method in results.methods if method["source"] == "id"] if task == 2 else []
    found = [
        f"{number(each.mean, 3)} for {name}"
        for name in reversed([*ids, *figures.main_methods(results)])
        if (each := results.spread(name, task, model)) is not None
    ]
    return ", ".join(found)


def _warning(results: Results) -> str:
    if not results.facts["quick"]:
        return ""
    return "This was a quick run with a few steps of everything, to see that it works. Its numbers mean nothing."


def _tiles(results: Results) -> list[tuple[str, str]]:
    facts = results.facts
    tiles = [(f"{facts[key]:,}", key) for key in ("items", "users", "interactions") if isinstance(facts[key], int)]
    if isinstance(facts.get("average_length"), int | float):
        tiles.append((f"{facts['average_length']:.1f}", "items per user, on average"))
    if len(facts.get("dims", [])) == 1:
        tiles.append((f"{facts['dims'][0]:,}", "numbers in a vector"))
    methods = results.frames["results"]["method"].n_unique()
    counted = [(f"{methods}", "methods")] if methods else []
    return [*tiles, *counted, (duration(_seconds(results)), "of computing time")]


def _why(results: Results, paper: str, more: str) -> str:
    """Return a text about why the numbers may differ from a table of the paper."""
    facts = results.facts
    return (
        f"{paper} of the paper: Qwen2.5-VL-3B on Amazon {results.paper_data}. Here: {Path(str(facts['backbone'])).name}"
        f" on {results.dataset}, {facts['users']:,} users and {facts['items']:,} items. Compare the order of the"
        f" methods, not their levels. {more}"
    )


def _collapses(results: Results) -> tuple[tuple[str, str], ...]:
    """Return the warnings of the collapse monitor, as (method, text)."""
    rows = results.frames["warnings"]
    if rows.height > MOST_WARNINGS:
        return tuple(
            (str(method), f"{method}, {view}: {each.height} warnings, for example: {each['message'][0]}")
            for (method, view), each in rows.group_by("method", "view", maintain_order=True)
        )
    lines = []
    for row in rows.iter_rows(named=True):
        end = "to the end" if row["until"] is None else f"until step {row['until']}"
        text = f"{row['method']}, seed {row['seed']}, from step {row['step']} {end}: {row['message']}"
        lines.append((row["method"], text))
    return tuple(lines)


# --- what ran -----------------------------------------------------------------------------------------------


def _stages(results: Results) -> list[Stage]:
    """Return the bars: making a laboratory, the steps of the study, and the stages after it."""
    cost = results.frames["cost"].with_columns(_label().alias("label"))
    if cost.height <= MOST_STAGES:
        steps = [
            {"stage": row["label"], "what": _run_name(results, row), "seconds": row["seconds"]}
            for row in cost.iter_rows(named=True)
        ]
    else:
        steps = [
            {
                "stage": label,
                "what": f"{each.height} times, {each['method'].n_unique()} methods",
                "seconds": each["seconds"].sum(),
            }
            for (label,), each in cost.group_by("label", maintain_order=True)
        ]
    if (trials := results.frames["trials"]).height:
        what = f"{trials.height} trials, {trials['method'].n_unique()} methods"
        steps = [{"stage": "finetune (trials)", "what": what, "seconds": trials["seconds"].sum()}, *steps]
    found = [*results.facts.get("before", []), *steps, *results.facts.get("after", [])]
    longest = max((each["seconds"] for each in found), default=0) or 1
    return [Stage(e["stage"], e["what"], e["seconds"], round(100 * e["seconds"] / longest, 1)) for e in found]


def _label() -> pl.Expr:
    """Return the label of a step: its command, and the recommender that it trains."""
    model = pl.col("step").str.extract(r"recommender-(\w+)$", 1)
    return pl.when(model.is_not_null()).then(pl.format("{} {}", "command", model)).otherwise("command")


def _run_name(results: Results, row: Json) -> str:
    parts = [row["method"]]
    if row["seed"] is not None:
        parts.append(f"seed {row['seed']}")
    if row["dataset"] != results.dataset:
        parts.append(row["dataset"])
    return ", ".join(parts)


def _seconds(results: Results) -> float:
    others = [*results.facts.get("before", []), *results.facts.get("after", [])]
    steps = sum(results.frames[name]["seconds"].sum() for name in ("cost", "trials"))
    return float(steps) + sum(each["seconds"] for each in others)


def _index(index: Json | None) -> str:
    """Return a sentence about the index: what it holds, and what `build-index` measured."""
    if index is None:
        return ""
    text = f"{index['factory']} over {index['rows']:,} {index['column']} vectors"
    if index.get("recall@10") is not None:
        text += f": recall@10 {index['recall@10']:.4f} against exact search"
    if index.get("search_ms") is not None:
        text += f", {index['search_ms']:.3f} ms per query in a batch"
    return f"{text}."


def duration(seconds: float) -> str:
    """Return seconds as text: `75.2` → `75 s`, `4000` → `1.1 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s" if seconds >= 0.05 else "under 0.1 s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min {int(seconds % 60):02d} s" if minutes < 60 else f"{seconds / 3600:.1f} h"


_WHY = {
    "Table 1": "Distances depend on how a backbone spreads its vectors before any training. S is a ratio, which is"
    " easier to compare.",
    "Table 2": (
        "Here, candidates are drawn without replacement from the items that the user never interacted with, and are"
        " the same for every method. The paper does not say how it draws them."
    ),
    "Table 4": "The paper gives no settings of its recommenders. Here all have two layers, width 128 and cross-entropy"
    " over all items, whether they start from ids or from vectors.",
    "Table 5": "In the paper, the variants with the contrastive loss differ by .02 or less. Such differences need many"
    " users and seeds.",
    "Table 7": "The paper measured minutes and seconds on one RTX 3090.",
}


# --- sections -----------------------------------------------------------------------------------------------


def _sections(results: Results) -> list[Section]:
    paper, among = results.paper, results.facts["candidates"] + 1
    task1 = tables.ranking_sheet(results, 1, None, paper["task1"])
    task2 = [tables.ranking_sheet(results, 2, model, paper["task2"].get(model, {})) for model in results.models()]
    rivals = []
    for analysis in (RIVALS, RATIONALES):
        rivals.append(tables.ranking_sheet(results, 1, None, paper["task1"], analysis))
        rivals += [tables.ranking_sheet(results, 2, m, paper["task2"].get(m, {}), analysis) for m in results.models()]
    return [
        Section(
            "task1",
            "Task 1: ranking by similarity (Table 2)",
            (
                "A user’s history becomes one vector, and items are ranked by their cosine to it. Methods with a"
                " sequence encoder encode the history; the others take the mean of its items’ vectors.",
                f"The candidates are the next item and {among - 1} items that the user never interacted with. A"
                f" random order has H@10 {number(random_floor('H@10', among), 3)} and H@20"
                f" {number(random_floor('H@20', among), 3)}.",
            ),
            _present(task1),
            why=_why(results, "Table 2", _WHY["Table 2"]),
        ),
        Section(
            "task2",
            "Task 2: recommenders that start from the vectors (Table 4)",
            (
                "Each recommender is trained on the same sequences: RecBole's (SASRec, GRU4Rec, BERT4Rec) from item ids"
                " or from frozen item vectors, the multimodal ones (VBPR, FREEDOM, LATTICE, SLMRec) from both.",
            ),
            _present(*task2),
            ("task2-models", "differences"),
            why=_why(results, "Table 4", _WHY["Table 4"]),
        ),
        Section(
            "rivals",
            "Trained rivals",
            ("Other embedders that learn from the same training data, each beside what its own ablation leaves out.",),
            _present(*rivals),
        ),
        Section(
            "geometry",
            "Geometry of the vectors (Table 1)",
            ("The squared distances between users and items on the unit sphere, for each view.",),
            _present(tables.geometry_sheet(results)),
            ("table1-geometry",),
            why=_why(results, "Table 1", _WHY["Table 1"]),
        ),
        Section(
            "views",
            "What each modality contributes (Fig. 1a)",
            (
                "The user’s fused, text or image vector ranks the same fused items (f2f, t2f, v2f). If t2f or v2f is"
                " higher than f2f, the other modality only adds noise.",
            ),
            _present(tables.view_sheet(results)),
            ("fig1a-views",),
        ),
        Section(
            "training",
            "How training treats each modality (Fig. 1b)",
            (
                "The figures show the cosine between the update and the gradient of each modality alone, and how well"
                " each view separates the next item from others during training.",
                "The margin is the user’s cosine to the next item minus the mean cosine to the other items of the"
                " batch, within one modality. A view collapses if its S does not rise above its start while the other’s"
                " does, or if its vectors gather in a few directions or in one point.",
            ),
            (),
            ("fig1b-gradients", "collapse", "collapse-ranks", "learning"),
            _collapses(results),
        ),
        Section(
            "ablation",
            "Ablation: without each part (Table 5)",
            (),
            _present(tables.ablation_sheet(results)),
            ("table5-ablation",),
            why=_why(results, "Table 5", _WHY["Table 5"]),
        ),
        Section(
            "cross-domain",
            "Cross-domain: trained here, measured on other data (Table 6)",
            (_shared(results),),
            tuple(tables.cross_domain_sheets(results)),
            why="The paper transfers between Amazon domains; its Clothing → Beauty is shown beside our numbers.",
        ),
        Section(
            "few-shot",
            "Few-shot: training on few users (Table 7)",
            (),
            _present(tables.few_shot_sheet(results)),
            ("table7-few-shot",),
            why=_why(results, "Table 7", _WHY["Table 7"]),
        ),
        Section(
            "cold-start",
            "Rare items (Fig. 3)",
            ("Users are grouped by how often their next item occurs in training.",),
            _present(tables.tail_sheet(results)),
            ("fig3-cold-start",),
        ),
        Section("families", "Backbones (Fig. 4)", (), (), ("fig4-families",)),
        Section(
            "sensitivity",
            "Hyperparameters (Fig. 5)",
            ("One setting varies at a time. The ring marks the value of all other tables; the dashed line is SFT.",),
            (),
            ("fig5-sensitivity",),
        ),
        Section(
            "selection",
            "How the settings were chosen (validation only)",
            _selection_words(results),
            _present(tables.search_sheet(results), tables.trials_sheet(results)),
        ),
        Section("cost", "Computing time", (), _present(tables.cost_sheet(results))),
    ]


def _selection_words(results: Results) -> tuple[str, ...]:
    search = results.facts.get("search")
    if not search:
        return ()
    return (
        f"Every method that trains had the same number of trials: {search['trials']}, drawn from its own grid with seed"
        f" {search['seed']} and trained with that seed. Where the grid has no more settings than that, all were tried.",
        f"The choice used validation only. A trial’s score is its best {COMPARED} on validation users: the second to"
        " last item of each is ranked among candidates drawn for validation alone. No trial used the last item of a"
        " user or the candidates of the test. The runs of all seeds began after the choice, and only they were measured"
        " on the test. Of equal scores, the first trial is chosen.",
    )


def _shared(results: Results) -> str:
    users = results.facts["shared users"]
    items = sum(each["items"] for each in results.facts.get("shared", {}).values())
    if not users and not items:
        return "No item and no user of the target domain is in the training data."
    if not items:
        return f"No item of the target domain is in the training data. By their ids, {users:,} of its users are."
    return f"By their ids, {items:,} items and {users:,} users of the target domain are in the training data too."


def _present(*sheets: Sheet | None) -> tuple[Sheet, ...]:
    return tuple(sheet for sheet in sheets if sheet is not None)


def _settings(results: Results) -> list[tuple[str, str]]:
    facts = results.facts
    rows = [
        ("backbone", str(facts["backbone"])),
        ("candidates", f"{facts['candidates']} besides the next item, {facts['candidate sets']} stored sets"),
        ("finetune", _joined(facts["finetune"]) or "defaults"),
        ("recommender", _joined(facts["recommender"]) or "defaults"),
        ("selection", _selection(facts.get("search"))),
    ]
    rows += [(f"plan, {name}", _joined(plan)) for name, plan in facts["plan"].items()]
    rows += [(name, _joined(facts[key])) for name, key in (("demo", "demo"), ("prepare", "rules")) if facts.get(key)]
    return [*rows, ("versions", _joined(facts["versions"]))]


def _selection(search: Json | None) -> str:
    if not search:
        return "none: the settings as the study gives them"
    return (
        f"on validation, {search['trials']} trials for each of {len(search['methods'])} methods, seed {search['seed']}"
    )


def _methods(results: Results) -> list[tuple[str, str]]:
    """Return each method's source and analyses, and the settings of its commands that are not the default."""
    rows = []
    for method in results.methods:
        if not method["analyses"]:
            continue
        parts = [method["source"], ", ".join(method["analyses"])]
        if method["of"]:
            parts.append(f"{method['of']} with another {method['varies']}")
        own = results.facts.get("settings", {}).get(method["name"], {})
        parts += [f"{step}: {_joined(values, ', ')}" for step, values in own.items() if values]
        rows.append((method["name"], "; ".join(parts)))
    return rows


def _joined(values: Mapping[str, Any], between: str = "; ") -> str:
    return between.join(f"{key} {value}" for key, value in values.items())


# --- neighbours ---------------------------------------------------------------------------------------------


def _neighbourhoods(results: Results) -> list[Neighbourhood]:
    rows = results.frames["neighbours"]
    found = []
    for (method,), each in rows.group_by("method", maintain_order=True):
        name = str(method)
        common = results.frames["common"].filter(pl.col("method") == name)
        shared = common.filter(pl.col("attribute").is_null())["share"]
        found.append(
            Neighbourhood(
                name,
                _grids(each.filter(pl.col("kind") == "spread")),
                _grids(each.filter(pl.col("kind") == "disagreeing")),
                float(shared[0]) * 10 if len(shared) else None,
            )
        )
    return found


def _grids(rows: pl.DataFrame) -> list[Grid]:
    grids = []
    for (_, query), each in rows.group_by("place", "query", maintain_order=True):
        found: dict[str, list[tuple[str, float]]] = {}
        for near in each.sort("rank").iter_rows(named=True):
            found.setdefault(near["view"], []).append((near[schema.ITEM_ID], near["cosine"]))
        grids.append(Grid(str(query), found, int(each["shared"][0])))
    return grids


def _common_sheet(results: Results) -> Sheet | None:
    """Return how often near items have the same value of an attribute, for each method and view."""
    rows = results.frames["common"].filter(pl.col("attribute").is_not_null())
    if not rows.height:
        return None
    share = {(row["method"], row["attribute"], row["view"]): row["share"] for row in rows.iter_rows(named=True)}
    chance = dict(rows.select("attribute", "chance").unique(maintain_order=True).iter_rows())
    methods = rows["method"].unique(maintain_order=True).to_list()
    views = [view for view in VIEW_ORDER if view in set(rows["view"].to_list())]
    lines = []
    for attribute, random in chance.items():
        cells = [Cell(_percent(random))]
        for method in methods:
            found = [share.get((method, attribute, view)) for view in views]
            top = max((value for value in found if value is not None), default=None)
            cells += [_share_cell(value, random, value == top) for value in found]
        lines.append(Row(str(attribute), tuple(cells)))
    groups = (Group("", ("at random",)), *(Group(str(method), tuple(views)) for method in methods))
    return Sheet("attribute", groups, tuple(lines))


def _share_cell(share: float | None, chance: float, best: bool) -> Cell:
    """Return a share, with a stronger colour the farther it is above chance."""
    if share is None:
        return Cell("–")
    heat = max(0.0, (share - chance) / (1 - chance)) if chance < 1 else 0.0
    return Cell(_percent(share), best=best, heat=round(heat, 3))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
