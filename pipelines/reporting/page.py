"""One HTML page about a study, and its figures as SVG and PNG, drawn from the Parquet files alone."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from vlm2rec.embedder.contract import schema
from vlm2rec.pipelines.experiments.methods import Json
from vlm2rec.pipelines.experiments.results import COMPARED
from vlm2rec.pipelines.reporting import figures as study_figures
from vlm2rec.pipelines.reporting import tables
from vlm2rec.pipelines.reporting.tables import Cell, Results, Sheet, number
from vlm2rec.pipelines.reporting.verdicts import HOLDS, Claim, verdicts

TEMPLATE = "page.html.j2"


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    anchor: str
    title: str
    words: tuple[str, ...] = ()
    sheets: tuple[Sheet, ...] = ()
    figures: tuple[str, ...] = ()
    why: str = ""  # why our numbers may differ from the paper's
    folded: bool = False  # the sheets are behind a click

    def has(self, drawn: Mapping[str, Any]) -> bool:
        """Whether there is anything to show."""
        return bool(self.sheets) or any(name in drawn for name in self.figures)


@dataclass(frozen=True)
class Grid:
    """An item and what each view finds, as item ids."""

    query: str
    found: dict[str, list[tuple[str, float]]]
    shared: int


@dataclass(frozen=True)
class Neighbourhood:
    """What the vectors of one method find."""

    method: str
    spread: list[Grid]
    disagreeing: list[Grid]
    shared: float | None
    common: Sheet | None


@dataclass
class Page:
    """Everything the template prints."""

    title: str
    lede: str
    warning: str
    tiles: list[tuple[str, str]]
    verdicts: list[Claim]
    sections: list[Section]
    figures: dict[str, Markup]
    neighbourhoods: list[Neighbourhood]
    hero: list[str]
    titles: dict[str, str]
    pictures: dict[str, tuple[int, str]]
    colours: dict[str, str]
    settings: list[tuple[str, str]]
    methods: list[Json]
    notes: list[str] = field(default_factory=list)


def run(out: Path) -> Path:
    """Write `report.html` and `figures/` of a study folder and return the path of the page.

    Raises:
        ArtifactError: a Parquet file of the study is missing, or a row to print breaks the bound on N@20 - N@10.
    """
    results = Results.open(out)
    drawn = study_figures.draw(results)
    page = make_page(results, {each.name: Markup(each.picture.inline()) for each in drawn})
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    for old in [*folder.glob("*.svg"), *folder.glob("*.png")]:
        old.unlink()
    for each in drawn:
        (folder / f"{each.name}.svg").write_text(each.picture.svg, encoding="utf-8")
        (folder / f"{each.name}.png").write_bytes(each.png)
    report = out / "report.html"
    schema.write_text(report, render(page))
    return report


def render(page: Page) -> str:
    """Return the page as HTML."""
    return page_template(TEMPLATE, {"number": number}).render(page=page, views=VIEW_ORDER, holds=HOLDS)


def make_page(results: Results, drawn: dict[str, Markup]) -> Page:
    """Gather what the template prints."""
    found = verdicts(results)
    pictures = results.frames["pictures"]
    with_picture = pictures.filter(pl.col("picture").is_not_null())
    ids = pictures[schema.ITEM_ID].to_list()
    sections = [section for section in _sections(results) if section.has(drawn)]
    return Page(
        title=results.dataset,
        lede=_lede(results, found),
        warning=_warning(results),
        tiles=_tiles(results),
        verdicts=found,
        sections=sections,
        figures=drawn,
        neighbourhoods=_neighbourhoods(results),
        hero=with_picture[schema.ITEM_ID].gather_every(max(1, with_picture.height // 24)).to_list()[:24],
        titles=dict(zip(ids, pictures[schema.TITLE].to_list(), strict=True)),
        pictures={
            row[schema.ITEM_ID]: (context, base64.b64encode(row["picture"]).decode("ascii"))
            for context, row in enumerate(with_picture.iter_rows(named=True))
        },
        colours=study_figures.colours(results),
        settings=_settings(results),
        methods=[method for method in results.methods if method["analyses"]],
        notes=[*results.facts["notes"], *_collapses(results)],
    )


# --- words --------------------------------------------------------------------------------------------------


def _lede(results: Results, found: Sequence[Claim]) -> str:
    scores = [
        f"{number(each.mean, 3)} for {name}"
        for name in reversed(study_figures.protagonists(results))
        if (each := results.spread(name, 1)) is not None
    ]
    held = sum(claim.verdict == HOLDS for claim in found)
    text = f"Of {len(found)} claims of the paper that these runs can decide, {held} hold here." if found else ""
    if scores:
        among = results.facts["candidates"] + 1
        text += f" Ranking the next item among {among} by similarity alone, {COMPARED} is {', '.join(scores)}."
    return text.strip()


def _warning(results: Results) -> str:
    if not results.facts["quick"]:
        return ""
    return "This was a quick run of a few steps each, to see that everything works. Its numbers mean nothing."


def _tiles(results: Results) -> list[tuple[str, str]]:
    cost = results.frames["cost"]
    hours = float(cost["seconds"].sum()) / 3600
    tiles = [
        (f"{results.frames['results']['method'].n_unique()}", "methods"),
        (f"{cost.height}", "runs"),
        (f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.0f} min", "of computing"),
    ]
    for key in ("items", "users", "interactions"):
        if isinstance(results.facts[key], int):
            tiles.append((f"{results.facts[key]:,}", key))
    return tiles


def _why(results: Results, paper: str, more: str) -> str:
    """Say why our rows may differ from the paper's."""
    facts = results.facts
    return (
        f"{paper} of the paper: Qwen2.5-VL-3B on Amazon {results.paper_data}. Here: {Path(str(facts['backbone'])).name}"
        f" on {results.dataset}, {facts['users']:,} users and {facts['items']:,} items. Levels are not comparable, who"
        f" stands above whom is. {more}"
    )


def _collapses(results: Results) -> list[str]:
    """Return what the collapse monitor said, once per method and view."""
    rows = results.frames["warnings"]
    return [
        f"collapse monitor, {method}, {view}: {each.height} of its runs; for instance {each['message'][0]}"
        for (method, view), each in rows.group_by("method", "view", maintain_order=True)
    ]


_WHY = {
    "Table 1": "Distances depend on how a backbone spreads its space before any training; S is a ratio, and travels"
    " better.",
    "Table 2": "Candidates are drawn here without replacement from what a user never touched, the same for every"
    " method; the paper does not say how it drew its own.",
    "Table 4": "The paper names no settings of its recommenders; here all have two layers, width 128 and cross-entropy"
    " over all items, from ids and from vectors alike.",
    "Table 5": "Among the variants that keep the contrastive loss the paper’s differences are .02 and less: it takes"
    " many users and seeds to tell them apart.",
    "Table 7": "The paper’s minutes and seconds are those of one RTX 3090.",
}


# --- sections -----------------------------------------------------------------------------------------------


def _sections(results: Results) -> list[Section]:
    paper = results.paper
    task1 = tables.ranking_sheet(results, 1, None, paper["task1"])
    task2 = [tables.ranking_sheet(results, 2, model, paper["task2"].get(model, {})) for model in results.models()]
    return [
        Section(
            "task1",
            "Task 1: ranking by similarity (Table 2)",
            (
                "A user’s history becomes one vector and items are ranked by their cosine to it. Methods with a"
                " sequence encoder encode the history; the others take the mean of its items’ vectors.",
            ),
            _present(task1),
            why=_why(results, "Table 2", _WHY["Table 2"]),
        ),
        Section(
            "task2",
            "Task 2: recommenders that start from the vectors (Table 4)",
            ("RecBole trains each recommender on the same sequences, from item ids or behind a frozen table.",),
            _present(*task2),
            ("differences",),
            why=_why(results, "Table 4", _WHY["Table 4"]),
        ),
        Section(
            "geometry",
            "Geometry of the spaces (Table 1)",
            ("Squared distances on the unit sphere between users and items, view by view.",),
            _present(tables.geometry_sheet(results)),
            ("table1-geometry",),
            why=_why(results, "Table 1", _WHY["Table 1"]),
        ),
        Section(
            "views",
            "What each modality contributes (Fig. 1a)",
            (
                "The user’s fused, text or image vector ranks the same fused items. Where t2f or v2f is above f2f, the"
                " other modality is noise.",
            ),
            _present(tables.view_sheet(results)),
            ("fig1a-views",),
        ),
        Section(
            "training",
            "Whom the training serves (Fig. 1b)",
            (
                "The cosine of the update with the gradient that each modality alone would ask for, and how well each"
                " view tells the next item from others while training goes on.",
            ),
            (),
            ("fig1b-gradients", "collapse", "learning"),
        ),
        Section(
            "ablation",
            "Each part taken away (Table 5)",
            (),
            _present(tables.ablation_sheet(results)),
            ("table5-ablation",),
            why=_why(results, "Table 5", _WHY["Table 5"]),
        ),
        Section(
            "cross-domain",
            "Trained here, measured elsewhere (Table 6)",
            (_elsewhere(results),),
            tuple(tables.cross_domain_sheets(results)),
            why="The paper goes from one Amazon domain to another; its Clothing → Beauty is printed beside.",
        ),
        Section(
            "few-shot",
            "With a few users (Table 7)",
            (),
            _present(tables.few_shot_sheet(results)),
            ("table7-few-shot",),
            why=_why(results, "Table 7", _WHY["Table 7"]),
        ),
        Section(
            "cold-start",
            "Rare items (Fig. 3)",
            ("Users by how often the item they chose next occurs in training.",),
            _present(tables.tail_sheet(results)),
            ("fig3-cold-start",),
        ),
        Section("families", "Backbones (Fig. 4)", (), (), ("fig4-families",)),
        Section(
            "sensitivity",
            "Hyperparameters (Fig. 5)",
            ("One setting at a time; the ring is the value of every other table, the dashed line SFT.",),
            (),
            ("fig5-sensitivity",),
        ),
        Section("cost", "What it cost", (), _present(tables.cost_sheet(results))),
    ]


def _elsewhere(results: Results) -> str:
    shared = results.facts["shared users"]
    if not shared:
        return "No item and no user of the target domain is in the training data."
    return f"No item of the target domain is in the training data; {shared:,} of its users are, by their id."


def _present(*sheets: Sheet | None) -> tuple[Sheet, ...]:
    return tuple(sheet for sheet in sheets if sheet is not None)


def _settings(results: Results) -> list[tuple[str, str]]:
    facts = results.facts
    rows = [
        ("backbone", str(facts["backbone"])),
        ("candidates", f"{facts['candidates']} beside the next item, {facts['candidate sets']} stored sets"),
        ("finetune", _flat(facts["finetune"]) or "defaults"),
        ("recommender", _flat(facts["recommender"]) or "defaults"),
    ]
    rows += [(f"plan, {name}", _flat(asked)) for name, asked in facts["plan"].items()]
    return [*rows, ("versions", _flat(facts["versions"]))]


def _flat(values: Mapping[str, Any]) -> str:
    return "; ".join(f"{key} {value}" for key, value in values.items())


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
                _common_sheet(common.filter(pl.col("attribute").is_not_null())),
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


def _common_sheet(rows: pl.DataFrame) -> Sheet | None:
    if not rows.height:
        return None
    shown = [view for view in VIEW_ORDER if view in set(rows["view"].to_list())]
    lines = []
    for (attribute,), each in rows.group_by("attribute", maintain_order=True):
        share = dict(zip(each["view"].to_list(), each["share"].to_list(), strict=True))
        top = max(share.values())
        cells = [Cell(f"{100 * share[view]:.0f} %", best=share[view] == top) for view in shown]
        lines.append(tables.Row(str(attribute), (*cells, Cell(f"{100 * each['chance'][0]:.0f} %"))))
    return Sheet("same", (tables.Group("among the nearest ten", (*shown, "at random")),), tuple(lines))


VIEW_ORDER = (schema.TEXT, schema.IMAGE, schema.FUSED)


def page_template(name: str, filters: Mapping[str, Callable[..., Any]]) -> Template:
    """Return a template of this folder; every text that comes from a file is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(name)
