"""The tables of a study, from its Parquet files. A row has the paper's numbers beside it, if there are any."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from vlm2rec.downstream.evaluation.metrics import TAIL, bound_check
from vlm2rec.downstream.evaluation.statistics import Spread, spread
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ArtifactError
from vlm2rec.pipelines.experiments.methods import ABLATION, CROSS_DOMAIN, FEW_SHOT, MAIN, Json, Role
from vlm2rec.pipelines.experiments.results import (
    ALL_USERS,
    COMPARED,
    DISPERSION,
    GEOMETRY,
    MAIN_VIEW,
    TAIL_USERS,
    facts,
    read_all,
)
from vlm2rec.pipelines.experiments.selection import grid_text
from vlm2rec.pipelines.reporting.paper import nearest, read_paper

PAPER_DEFAULT = "Beauty"
PRINTED = 1.3e-4  # tolerance of the bound for numbers printed with four decimals
PROTOCOLS = ("candidates", "full")
VIEW_PAIRS = ("f2f", "t2f", "v2f")
VANILLA_ROW, SFT_ROW = "VLM vanilla (ext.)", "VLM SFT (ext.)"


@dataclass(frozen=True)
class Cell:
    """One cell: its text, a smaller second line, and its highlighting."""

    text: str
    small: str = ""
    best: bool = False
    heat: float | None = None  # from 0 to 1: how strongly the cell is coloured


@dataclass(frozen=True)
class Row:
    """One row, usually a method; `colour` is the method whose colour marks the row."""

    name: str
    cells: tuple[Cell, ...]
    colour: str = ""
    ours: bool = False


@dataclass(frozen=True)
class Group:
    """A heading over some columns."""

    label: str
    columns: tuple[str, ...]
    paper: bool = False


@dataclass(frozen=True)
class Sheet:
    """A table of the page."""

    title: str
    groups: tuple[Group, ...]
    rows: tuple[Row, ...]
    note: str = ""


_FORMER_NAMES: dict[Role, tuple[str, str]] = {
    "vanilla": ("paper", VANILLA_ROW),
    "sft": ("paper", SFT_ROW),
    "text_only": ("paper", "LLM SFT"),
    "image_only": ("name", "Image only SFT"),
    "constant_w": ("name", "SFT with constant w"),
    "sft_best_tau": ("name", "SFT at its best τ"),
    "shuffled": ("name", "VLM2Rec with shuffled images"),
}
"""How methods are known that have no role: by the paper's row beside them, or by their name."""

Key = tuple[str, int, str | None, str, str | None, str, str, str]


@dataclass
class Results:
    """The contents of a study's Parquet files, with functions to look values up."""

    out: Path
    frames: dict[str, pl.DataFrame]
    facts: Json
    paper: Json = field(default_factory=read_paper)

    @classmethod
    def open(cls, out: Path) -> Results:
        """Read every Parquet file of a study."""
        return cls(out, read_all(out), facts(out))

    @property
    def dataset(self) -> str:
        """Name of the study's dataset."""
        return str(self.facts["dataset"])

    @property
    def reference(self) -> str:
        """Name of the method that all others are compared with."""
        return str(self.facts["reference"])

    @property
    def paper_data(self) -> str:
        """Return the dataset whose numbers of the paper are shown: the one with the study's name, else Beauty."""
        known = self.paper["task1"][SFT_ROW]
        return self.dataset if self.dataset in known else PAPER_DEFAULT

    @functools.cached_property
    def methods(self) -> list[Json]:
        """The methods, in the order of the tables."""
        return self.frames["methods"].to_dicts()

    def names(self, analysis: str, grids: bool = False) -> list[str]:
        """Return the methods of an analysis that have results, in order; the methods of grids only with `grids`."""
        return [
            method["name"]
            for method in self.methods
            if analysis in method["analyses"] and method["name"] in self._present and (grids or not method["of"])
        ]

    @functools.cached_property
    def _present(self) -> set[str]:
        return set(self.frames["results"]["method"].to_list())

    @functools.cached_property
    def _values(self) -> dict[Key, dict[int, float]]:
        """Map (dataset, task, model, protocol, view, user group, metric, method) → seed → value."""
        names = ("dataset", "task", "model", "protocol", "view", "user_group", "metric", "method", "seed", "value")
        found: dict[Key, dict[int, float]] = {}
        for *key, seed, value in self.frames["results"].select(names).iter_rows():
            found.setdefault(tuple(key), {})[seed] = value
        return found

    def values(
        self,
        method: str,
        task: int,
        model: str | None = None,
        metric: str = COMPARED,
        *,
        dataset: str | None = None,
        protocol: str = "candidates",
        view: str = MAIN_VIEW,
        group: str = ALL_USERS,
    ) -> dict[int, float]:
        """Return a metric by seed; empty if it was not measured."""
        shown = view if task == 1 else None
        return self._values.get((dataset or self.dataset, task, model, protocol, shown, group, metric, method), {})

    def spread(self, *args: Any, analysis: str | None = None, **more: Any) -> Spread | None:
        """Return mean and standard deviation of `values` over seeds.

        With `analysis`, only the seeds of its plan count, so that all its methods are compared on the same seeds.
        """
        found = self.values(*args, **more)
        if analysis is not None:
            wanted = self.facts["plan"][analysis]["seeds"]
            found = {seed: value for seed, value in found.items() if seed in wanted}
        return spread(list(found.values())) if found else None

    def named(self, paper_row: str) -> str | None:
        """Return the method that is compared with this row of the paper."""
        for method in self.methods:
            if method["paper"] == paper_row and method["name"] in self._present:
                return str(method["name"])
        return None

    def role(self, role: Role) -> str | None:
        """Return the method with a role, if it has results; a study without that role is read by the methods' names."""
        given = {method.get("role"): str(method["name"]) for method in self.methods}
        name = given.get(role)
        if name is None:
            key, text = _FORMER_NAMES[role]
            name = next((str(m["name"]) for m in self.methods if m[key] == text and not m["of"]), None)
        return name if name in self._present else None

    def paper_row(self, method: str) -> str | None:
        """Return the row of the paper that a method is compared with."""
        return next((each["paper"] for each in self.methods if each["name"] == method), None)

    def is_fixed(self, method: str) -> bool:
        """Tell whether a method makes its vectors without random numbers."""
        return any(each["fixed"] for each in self.methods if each["name"] == method)

    def geometry(self, method: str, view: str) -> dict[str, Spread] | None:
        """Return A_pos, A_neg, U, S and, if they were measured, the dispersion of a view: mean and std over seeds."""
        rows = self.frames["geometry"].filter(
            (pl.col("method") == method) & (pl.col("view") == view) & (pl.col("dataset") == self.dataset)
        )
        if not rows.height:
            return None
        measured = [name for name in DISPERSION if name in rows.columns and not rows[name].null_count()]
        return {name: spread(rows[name].to_numpy()) for name in (*GEOMETRY, *measured)}

    def comparison(self, method: str, task: int, model: str | None, dataset: str | None = None) -> Json | None:
        """Return the comparison of the reference with a method."""
        found = self.frames["comparisons"].filter(
            (pl.col("dataset") == (dataset or self.dataset))
            & (pl.col("task") == task)
            & pl.col("model").eq_missing(pl.lit(model))
            & (pl.col("method") == method)
        )
        return found.row(0, named=True) if found.height else None

    def models(self) -> list[str]:
        """Return the recommenders that were trained on the study's dataset."""
        rows = self.frames["results"].filter((pl.col("task") == 2) & (pl.col("dataset") == self.dataset))
        return [model for model in schema.RECOMMENDERS if model in set(rows["model"].to_list())]


# --- numbers as text ----------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 4, sign: bool = False) -> str:
    """Return a number as text: `0.4121` → `.4121`, None → `–`."""
    if value is None or not np.isfinite(value):
        return "–"
    text = f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def p_value(value: float | None) -> str:
    """Return a p-value as text: `0.0312` → `.031`, small ones → `< .001`."""
    if value is None or not np.isfinite(value):
        return "–"
    return "< .001" if value < 0.001 else number(value, 3)


def mean_cell(found: Spread | None, fixed: bool = False, best: bool = False, digits: int = 4) -> Cell:
    """Return the mean, with ± standard deviation below unless there is one run or the method uses no random numbers."""
    if found is None:
        return Cell("–")
    small = f"±{number(found.std, digits)}" if found.runs > 1 and not fixed else ""
    return Cell(number(found.mean, digits), small, best)


def require_printable(metrics: Mapping[str, float]) -> None:
    """Raise `ArtifactError` if a row to print breaks the bound on N@20 - N@10."""
    if not bound_check(dict(metrics), 1e-9):
        raise ArtifactError(f"a row to print has {dict(metrics)}", "metrics of one ranking", "run the study again")


# --- Tables 2 and 4 -----------------------------------------------------------------------------------------


def ranking_sheet(
    results: Results, task: int, model: str | None, paper: Mapping[str, Any], analysis: str = MAIN
) -> Sheet | None:
    """Return Task 1 (Table 2), or one recommender of Task 2 (Table 4), of the methods of an analysis."""
    entries = [(name, name, task, model) for name in results.names(analysis)]
    if task == 1 and analysis == MAIN:  # as in the paper, the recommenders from item ids come first
        ids = [each["name"] for each in results.methods if each["source"] == "id"]
        entries = [(f"{each} ({name})", name, 2, each) for each in results.models() for name in ids] + entries
    measured = {
        (label, protocol): [results.spread(name, t, m, metric, protocol=protocol) for metric in schema.METRICS]
        for label, name, t, m in entries
        for protocol in PROTOCOLS
    }
    entries = [entry for entry in entries if measured[entry[0], "candidates"][0] is not None]
    if not entries:
        return None
    best = {
        protocol: [
            max((each.mean for label, *_ in entries if (each := measured[label, protocol][c])), default=None)
            for c in range(len(schema.METRICS))
        ]
        for protocol in PROTOCOLS
    }
    compared = _compared(results, task, model, analysis)
    # one seed has no t-test
    differences = ("difference",) if set(compared["seeds"]) == {1} else ("difference", "p, Holm")
    rows, broken = [], False
    for label, name, t, m in entries:
        fixed = results.is_fixed(name) and t == 1
        cells = []
        for protocol in PROTOCOLS:
            found = measured[label, protocol]
            if all(found):
                require_printable(
                    {metric: each.mean for metric, each in zip(schema.METRICS, found, strict=True) if each}
                )
            tops = zip(found, best[protocol], strict=True)
            cells += [mean_cell(each, fixed, each is not None and each.mean == top) for each, top in tops]
        printed, breaks = _paper_cells(
            paper.get(str(m) if t != task else results.paper_row(name) or ""), results.paper_data
        )
        broken |= breaks
        difference = _difference_cells(results.comparison(name, task, model) if t == task else None)
        cells += [*difference[: len(differences)], *printed]
        rows.append(Row(label, tuple(cells), name, name == results.reference))
    return Sheet(
        "Task 1" if task == 1 else str(model),
        (
            Group(f"{results.facts['candidates'] + 1} candidates", schema.METRICS),
            Group("all items", schema.METRICS),
            Group(f"{results.reference} − this, {COMPARED}", differences),
            Group(f"paper, {results.paper_data}", schema.METRICS, paper=True),
        ),
        tuple(rows),
        _note(compared, broken),
    )


def _paper_cells(row: Mapping[str, Sequence[float]] | None, data: str) -> tuple[list[Cell], bool]:
    """Return the paper's four numbers, and whether they break the bound that holds for every ranking."""
    if not row or data not in row:
        return [Cell("–")] * len(schema.METRICS), False
    values = dict(zip(schema.METRICS, row[data], strict=True))
    breaks = not bound_check(values, PRINTED)
    return [Cell(number(value) + ("†" if breaks else "")) for value in values.values()], breaks


def _difference_cells(found: Json | None) -> list[Cell]:
    if found is None:
        return [Cell("–"), Cell("–")]
    interval = f"[{number(found['low'], 4, True)}, {number(found['high'], 4, True)}]"
    sure = found["low"] > 0 or found["high"] < 0
    return [Cell(number(found["difference"], 4, True), interval, sure), Cell(p_value(found["p_holm"]))]


def _compared(results: Results, task: int, model: str | None, family: str) -> pl.DataFrame:
    """Return the comparisons of the table of a task, for the methods of a family (their first analysis)."""
    return results.frames["comparisons"].filter(
        (pl.col("dataset") == results.dataset)
        & (pl.col("task") == task)
        & pl.col("model").eq_missing(pl.lit(model))
        & (pl.col("family") == family)
    )


def _note(compared: pl.DataFrame, broken: bool) -> str:
    seeds = sorted(set(compared["seeds"].to_list()))
    text = "The best value of each column is bold."
    if seeds != [1]:
        text += " ± is the standard deviation over seeds; methods without random numbers have none."
    if seeds:
        text += " The interval contains 95 % of bootstrap resamples of the users. A difference is bold"
        text += " if the interval excludes zero."
    if seeds and seeds != [1]:
        number_of = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        text += f" p is from the paired t-test over {number_of} seeds, with Holm’s correction for"
        text += f" {compared.height} comparisons."
    if broken:
        text += " † breaks the bound on N@20 − N@10 that holds for every ranking with one relevant item: a misprint."
    return text


# --- Table 1 and Fig. 1a ------------------------------------------------------------------------------------


def geometry_sheet(results: Results) -> Sheet | None:
    """Return A_pos, A_neg, U, S and the dispersion per state and view (Table 1)."""
    rows = []
    data = results.paper_data if results.paper_data in results.paper["geometry"] else PAPER_DEFAULT
    paper = results.paper["geometry"][data]
    for view in (schema.FUSED, schema.IMAGE, schema.TEXT):
        for method in results.names(MAIN):
            found = results.geometry(method, view)
            if found is None:
                continue
            printed = paper.get(results.paper_row(method) or "", {}).get(view)
            fixed = results.is_fixed(method)
            cells = [Cell(view), *(mean_cell(found.get(name), fixed) for name in (*GEOMETRY, *DISPERSION))]
            cells += [Cell(number(value)) for value in printed] if printed else [Cell("–")] * 4
            rows.append(Row(method, tuple(cells), method, method == results.reference))
    if not rows:
        return None
    return Sheet(
        "State",
        (
            Group("", ("view",)),
            Group("this study", GEOMETRY),
            Group("pairs of one kind", ("U users", "U items", "offset")),
            Group(f"paper, {data}", tuple(f"{name}‡" if name == "U" else name for name in GEOMETRY), paper=True),
        ),
        tuple(rows),
        "Lower A_pos: the next item is nearer. Higher A_neg: other items are farther. Lower U: the vectors spread more"
        " evenly. S = A_neg/A_pos: above 1, the view separates the next item from others; at 1, it does not. U is over"
        " pairs of a user and another item, as Eq. 4 says; U users and U items are over pairs of users and of items;"
        " offset is the squared distance of the mean user from the mean item, which A_neg contains."
        " ‡ The paper’s U does not follow from its Eq. 4: four of its 18 rows are impossible for squared distances from"
        " 0 to 4, so it was measured on other pairs. Compare it with none of our columns.",
    )


def view_sheet(results: Results) -> Sheet | None:
    """Return N@20 with the user's fused, text and image vector against fused items (Fig. 1a)."""
    rows = []
    for method in results.names(MAIN):
        found = [results.spread(method, 1, view=view) for view in VIEW_PAIRS]
        if found[0] is None or found[1] is None or found[2] is None:
            continue
        top = max(each.mean for each in found if each is not None)
        cells = tuple(
            mean_cell(each, results.is_fixed(method), each is not None and each.mean == top) for each in found
        )
        rows.append(Row(method, cells, method, method == results.reference))
    return Sheet(COMPARED, (Group("user vector → fused item", VIEW_PAIRS),), tuple(rows)) if rows else None


# --- Tables 5, 6, 7 -----------------------------------------------------------------------------------------


def both_tasks_sheet(
    results: Results, title: str, names: Iterable[str], printed: Mapping[str, Sequence[float]], data: str, dataset: str
) -> Sheet | None:
    """Return N@20 of Task 1 and of Task 2 with SASRec, in the form of Tables 5 and 6."""
    rows = []
    for name in names:
        found = [results.spread(name, 1, dataset=dataset), results.spread(name, 2, "SASRec", dataset=dataset)]
        if not any(found):
            continue
        cells = [mean_cell(found[0], results.is_fixed(name)), mean_cell(found[1])]
        for task, model in ((1, None), (2, "SASRec")):
            cells.append(_difference_cells(results.comparison(name, task, model, dataset))[0])
        paper = printed.get(results.paper_row(name) or "")
        cells += [Cell(number(value)) for value in paper] if paper else [Cell("–"), Cell("–")]
        rows.append(Row(name, tuple(cells), name, name == results.reference))
    if not rows:
        return None
    tasks = ("Task 1", "Task 2")
    return Sheet(
        title,
        (
            Group(COMPARED, tasks),
            Group(f"{results.reference} − this", tasks),
            Group(f"paper, {data}", tasks, paper=True),
        ),
        tuple(rows),
        "Task 2 is SASRec. Intervals contain 95 % of bootstrap resamples of the users.",
    )


def ablation_sheet(results: Results) -> Sheet | None:
    """Return N@20 of the method without each of its parts (Table 5)."""
    data = results.paper_data if results.paper_data in results.paper["ablation"] else PAPER_DEFAULT
    printed = {**results.paper["ablation"][data], SFT_ROW: _sft_of(results, data)}
    names = results.names(ABLATION)
    return both_tasks_sheet(results, "Variant", names, printed, data, results.dataset) if len(names) > 1 else None


def _sft_of(results: Results, data: str) -> list[float]:
    """Return the paper's SFT row in the form of Table 5: from Tables 2 and 4."""
    return [results.paper["task1"][SFT_ROW][data][3], results.paper["task2"]["SASRec"][SFT_ROW][data][3]]


def cross_domain_sheets(results: Results) -> list[Sheet]:
    """Return one table per target domain (Table 6), with the paper's Clothing → Beauty beside it."""
    data = "Clothing → Beauty"
    sheets = []
    for domain in results.facts["domains"]:
        title = f"{results.dataset} → {domain}"
        sheet = both_tasks_sheet(
            results, title, results.names(CROSS_DOMAIN), results.paper["cross-domain"][data], data, domain
        )
        if sheet:
            sheets.append(dataclasses.replace(sheet, note=f"{sheet.note}{_shared_items(results, domain)}"))
    return sheets


def _shared_items(results: Results, domain: str) -> str:
    """Return the sentence about users of a target domain whose next item a method may have been trained on."""
    shared = results.facts.get("shared", {}).get(domain, {})
    if not shared.get("items"):
        return ""
    rule = results.facts.get("shared items")
    what = "are left out of this table" if rule == "drop" else "are measured too"
    return (
        f" {shared['items']:,} items are in the training data too; the {shared['targets']:,} users whose next item is"
        f" one of them {what} (shared_items: {rule})."
    )


def tail_sheet(results: Results) -> Sheet | None:
    """Return H@10 and N@10 of all users, and of users whose target is in the long tail (Table 1 of SDA)."""
    metrics = ("H@10", "N@10")
    columns = [(1, None), *((2, model) for model in results.models())]
    tail = results.frames["results"].filter(
        (pl.col("dataset") == results.dataset) & (pl.col("user_group") == TAIL_USERS)
    )
    rows = []
    for name in results.names(MAIN):
        if not any(results.spread(name, task, model, group=TAIL_USERS) for task, model in columns):
            continue
        cells = [
            mean_cell(results.spread(name, task, model, metric, group=group), results.is_fixed(name) and task == 1)
            for task, model in columns
            for group in (ALL_USERS, TAIL_USERS)
            for metric in metrics
        ]
        rows.append(Row(name, tuple(cells), name, name == results.reference))
    if not rows:
        return None
    groups = [Group(f"{model or 'Task 1'}, {who}", metrics) for _, model in columns for who in ("all", "tail")]
    users = int(tail["users"].to_numpy().max())
    where = "in training" if results.facts.get("tail_over", "train") == "train" else "in all interactions"
    note = f"Tail: {users:,} users whose next item occurs fewer than {TAIL} times {where}."
    return Sheet("Tail", tuple(groups), tuple(rows), note)


def few_shot_sheet(results: Results) -> Sheet | None:
    """Return metrics and cost by the number of training users (Table 7)."""
    data = results.paper_data if results.paper_data in results.paper["few-shot"] else PAPER_DEFAULT
    printed, rows = results.paper["few-shot"][data], []
    for name in results.names(FEW_SHOT, grids=True):
        values = grid_values(results, name)
        few = values.get("users") if name != results.reference and values.get("users") else None
        paper = printed.get(f"K={few}" if few else results.paper_row(name) or "")
        minutes, seconds = cost_of(results, name)
        cells = [
            mean_cell(results.spread(name, 1, analysis=FEW_SHOT)),
            mean_cell(results.spread(name, 2, "SASRec", analysis=FEW_SHOT)),
            Cell(f"{minutes:.2f}" if minutes is not None else "–"),
            Cell(f"{seconds:.1f}" if seconds is not None else "–"),
        ]
        cells += [Cell(number(value)) if value < 1 else Cell(f"{value:g}") for value in paper or []]
        cells += [Cell("–")] * (8 - len(cells))
        label = f"{results.reference} (full)" if name == results.reference else name
        rows.append((few or 10**9, Row(label, tuple(cells), name, name == results.reference)))
    if len(rows) < 2:
        return None
    columns = ("Task 1", "Task 2", "min per epoch", "s to embed")
    return Sheet(
        "Training users",
        (Group("this study", columns), Group(f"paper, {data}", columns, paper=True)),
        tuple(row for _, row in sorted(rows, key=lambda pair: pair[0])),
        "N@20; Task 2 is SASRec. The minutes include the validation after each epoch and the probes of the collapse"
        " monitor. The seconds include loading the model.",
    )


def grid_values(results: Results, name: str) -> Json:
    """Return a method's values for the settings that grids vary."""
    return next((json.loads(each["values"]) for each in results.methods if each["name"] == name), {})


def cost_of(results: Results, name: str) -> tuple[float | None, float | None]:
    """Return minutes per training epoch and seconds to embed the items: means over runs without interruption."""
    cost = results.frames["cost"].filter(
        (pl.col("method") == name) & (pl.col("attempts") == 1) & (pl.col("dataset") == results.dataset)
    )
    trained = cost.filter((pl.col("command") == "finetune") & (pl.col("epochs") > 0))
    embedded = cost.filter(pl.col("step") == "embeddings")
    minutes = float((trained["seconds"] / trained["epochs"]).to_numpy().mean() / 60) if trained.height else None
    return minutes, float(embedded["seconds"].to_numpy().mean()) if embedded.height else None


def counts_sheet(results: Results) -> Sheet | None:
    """Return the dataset's statistics (Table 3): after each step of `prepare`, under other filters, and the paper's."""
    steps = [(str(step["step"]), step) for step in results.facts.get("counts", [])]
    if not steps:
        return None
    columns = ("users", "items", "interactions", "average length")
    paper = results.paper["datasets"].get(results.dataset)
    note = ""
    if paper:
        variants = results.facts.get("variants", [])
        near = nearest(variants, paper) if variants else None
        for row, each in enumerate(variants):
            steps.append((f"{each['step']}{' ← nearest to the paper' if row == near else ''}", each))
        steps.append((f"the paper’s {results.dataset}", paper))
        if variants:
            note = (
                "The rows with flags say what `vlm2rec prepare` would keep of this log with them. Nearest: by the mean"
                " ratio of users, items and interactions. Published full 5-cores are longer than the paper’s averages"
                " (Beauty: 8.9 interactions a user, the paper 6.9); cutting each user to the latest ten comes before"
                " the core."
            )
    rows = []
    for name, step in steps:
        counts = [Cell(f"{step[key]:,}" if isinstance(step.get(key), int) else "–") for key in columns[:3]]
        length = step["interactions"] / step["users"] if step.get("users") and step.get("interactions") else None
        rows.append(Row(name, (*counts, Cell(f"{length:.1f}" if length else "–"))))
    return Sheet("step of prepare", (Group("", columns),), tuple(rows), note)


def cost_sheet(results: Results) -> Sheet | None:
    """Return the time of each kind of step."""
    cost = results.frames["cost"]
    if not cost.height:
        return None
    rows = []
    for (command,), each in cost.group_by("command", maintain_order=True):
        seconds = each["seconds"].to_numpy()
        rows.append(
            Row(
                str(command),
                tuple(Cell(text) for text in (str(len(seconds)), f"{seconds.mean():.1f}", f"{seconds.sum() / 60:.1f}")),
            )
        )
    rows.append(Row("all", (Cell(str(cost.height)), Cell(""), Cell(f"{cost['seconds'].sum() / 60:.1f}"))))
    return Sheet("Step", (Group("", ("runs", "s per run", "min in total")),), tuple(rows))


# --- selection ----------------------------------------------------------------------------------------------


def search_sheet(results: Results) -> Sheet | None:
    """Return each method's grid and its chosen setting; None if no settings were searched."""
    search, trials = results.facts.get("search"), results.frames["trials"]
    if not search or not trials.height:
        return None
    rows = []
    for (method,), each in trials.group_by("method", maintain_order=True):
        of = search["methods"][str(method)]
        best = each.filter(pl.col("chosen")).row(0, named=True)
        texts = (
            f"{each.height} of {of['combinations']}",
            grid_text(of["grid"]),
            _settings_text(best["settings"]),
            number(best["score"]),
        )
        rows.append(Row(str(method), tuple(map(Cell, texts)), str(method), method == results.reference))
    followed = "; ".join(f"{name} takes the settings of {source}" for name, source in search["followed"].items())
    return Sheet(
        "Method",
        (Group("search", ("trials", "grid")), Group("chosen", ("settings", f"{COMPARED} of validation"))),
        tuple(rows),
        f"{followed}." if followed else "",
    )


def trials_sheet(results: Results) -> Sheet | None:
    """Return every trial with its score on validation; the chosen ones are marked."""
    trials = results.frames["trials"]
    if not trials.height:
        return None
    rows = []
    for row in trials.iter_rows(named=True):
        cells = (
            Cell(_settings_text(row["settings"])),
            Cell(f"{row['step']}"),
            Cell(number(row["score"]), best=row["chosen"]),
            Cell("chosen" if row["chosen"] else "", best=row["chosen"]),
        )
        rows.append(Row(f"{row['method']}, trial {row['trial']}", cells, row["method"]))
    columns = ("settings", "best step", f"{COMPARED} of validation", "")
    return Sheet("Trial", (Group("", columns),), tuple(rows))


def _settings_text(settings: str) -> str:
    return ", ".join(f"{name} {value}" for name, value in json.loads(settings).items()) or "its own"
