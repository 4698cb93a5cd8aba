"""The methods of a study as data, and the steps that each of them takes.

A method names a source; `SOURCES` says how a source makes an embeddings folder. Whatever the source, what follows is
the same: rank by similarity (Task 1), start recommenders from the vectors (Task 2), on the dataset of the study and on
the target domains of the cross-domain analysis.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ConfigError, did_you_mean
from vlm2rec.embedder.training.recipes import METHODS
from vlm2rec.pipelines import config as settings
from vlm2rec.pipelines import read_config
from vlm2rec.pipelines.config import StudyConfig
from vlm2rec.pipelines.read_config import read_yaml

Json = dict[str, Any]
MAIN, ABLATION, FEW_SHOT, SENSITIVITY = "main", "ablation", "few-shot", "sensitivity"
FAMILIES, CROSS_DOMAIN, COLD_START = "families", "cross-domain", "cold-start"
ANALYSES = (MAIN, ABLATION, FEW_SHOT, SENSITIVITY, FAMILIES, CROSS_DOMAIN, COLD_START)
DEFAULT_FILE, LABORATORY_FILE, DEMO_FILE = (
    Path(__file__).parent / name for name in ("study.yaml", "laboratory.yaml", "demo.yaml")
)
ANY_SEED = None
"""Seed of the steps that no random number enters: the vectors of a backbone as it is."""

QUICK: Json = {
    "finetune": {"max_steps": 4, "epochs": 1000.0, "valid_users": 20, "log_steps": 1},
    "recommender": {"max_epochs": 2, "eval_step": 1},
}
QUICK_SEEDS = (0, 1)
_NO_GRADIENTS: Json = {"gradient_steps": 0}  # Fig. 1b is about the methods themselves


# --- what a study is ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the tables."""

    name: str
    source: str
    analyses: tuple[str, ...] = (MAIN,)
    backbone: str | None = None  # default: that of the study
    paper: str | None = None  # the row of the paper's tables that it stands beside
    finetune: Json = field(default_factory=dict)
    export: Json = field(default_factory=dict)
    evaluate: Json = field(default_factory=dict)
    recommender: Json = field(default_factory=dict)
    options: Json = field(default_factory=dict)  # what the source itself takes: a file, a folder
    varies: str | None = None  # of a grid: the setting that differs from the method `of`
    of: str | None = None

    @property
    def slug(self) -> str:
        """Return the name of the method's folder."""
        text = self.name.lower().replace("w/o", "without")
        return re.sub(r"[^a-z0-9.]+", "-", text).strip("-.")


@dataclass(frozen=True, kw_only=True)
class AnalysisPlan:
    """What an analysis asks of its methods."""

    seeds: tuple[int, ...] = (0,)
    tasks: tuple[int, ...] = (1, 2)
    models: tuple[str, ...] = ("SASRec",)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Methods that differ from one method in one setting."""

    analysis: str
    of: str
    varies: str
    values: tuple[Any, ...]
    finetune: Json = field(default_factory=dict)  # besides


@dataclass(frozen=True, kw_only=True)
class Study:
    """A whole study, as the YAML says; see `study.yaml`."""

    reference: str
    analyses: tuple[str, ...]
    plan: dict[str, AnalysisPlan]
    methods: tuple[Method, ...]
    finetune: Json = field(default_factory=dict)
    export: Json = field(default_factory=dict)
    evaluate: Json = field(default_factory=dict)
    recommender: Json = field(default_factory=dict)
    cross_domain: tuple[str, ...] = ()
    shared_users: Literal["refuse", "count"] = "refuse"
    cold_start: tuple[int, ...] = (5, 10, 20)
    notes: tuple[str, ...] = ()

    def method(self, name: str) -> Method:
        """Return a method by its name."""
        for method in self.methods:
            if method.name == name:
                return method
        raise ConfigError(f"no method is called {name!r}", f"one of {self._names()}", "correct the YAML")

    def _names(self) -> str:
        return ", ".join(method.name for method in self.methods)

    def picked(self, names: Sequence[str]) -> list[Method]:
        """Return the methods with these names or folder names; all for none."""
        if not names:
            return list(self.methods)
        known = {text.lower(): method for method in self.methods for text in (method.slug, method.name)}
        for name in names:
            if name.strip().lower() not in known:
                near = did_you_mean(name, (method.name for method in self.methods))
                raise ConfigError(f"--methods names {name!r}{near}", f"some of {self._names()}", "correct --methods")
        return [method for method in self.methods if method in [known[name.strip().lower()] for name in names]]


def read_study(config: StudyConfig, users: int | None = None, more: Json | None = None) -> Study:
    """Read the study: its YAML over the default one, grids expanded, flags applied.

    Args:
        config: flags of the command.
        users: users of the dataset; few-shot runs that ask for as many or more are left out with a note.
        more: what a command lays over the default, below the YAML.

    Raises:
        ConfigError: a key, an analysis, a source or a setting is not known, or two methods share a folder.
    """
    layers = [read_yaml(DEFAULT_FILE), *([read_yaml(LABORATORY_FILE)] if config.demo else []), more or {}]
    if config.config is not None:
        layers.append(read_yaml(config.config))
    if config.quick:
        layers.append(QUICK)
    where = str(config.config or DEFAULT_FILE.name)
    raw = _merged(layers, where)
    asked = {name: _build(AnalysisPlan, values, f"plan.{name} in {where}") for name, values in raw.pop("plan").items()}
    methods = [_method(values, where) for values in [*raw.pop("methods"), *raw.pop("more_methods", [])]]
    grids = [_build(Grid, values, f"grids in {where}") for values in raw.pop("grids", [])]
    backbones = tuple(raw.pop("backbones", []))
    reference = raw.get("reference", "")
    if backbones:
        grids.append(Grid(analysis=FAMILIES, of=reference, varies="backbone", values=backbones, finetune=_NO_GRADIENTS))
    study = _build(Study, raw | {"plan": asked, "methods": tuple(methods)}, where)
    study = _expanded(study, grids, users)
    study = _with_flags(study, config)
    _check(study, where)
    return study


def _merged(layers: Iterable[Json], where: str) -> Json:
    known = {f.name for f in dataclasses.fields(Study)} - {"notes"} | {"grids", "more_methods", "backbones"}
    merged: Json = {}
    for layer in layers:
        for key, value in layer.items():
            if key not in known:
                near = did_you_mean(key, known)
                raise ConfigError(f"unknown key {key!r} in {where}{near}", f"one of {', '.join(sorted(known))}")
            before = merged.get(key)
            merged[key] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
    return merged


def _method(values: Any, where: str) -> Method:
    if not isinstance(values, dict) or not values.get("name"):
        raise ConfigError(f"{values!r} among the methods of {where}", "a mapping with name and source", "correct it")
    own = {f.name for f in dataclasses.fields(Method)}
    values = dict(values)
    if "adapter" in values:  # between vectors and recommender: no business of the source
        values["recommender"] = {**values.get("recommender", {}), "adapter": values.pop("adapter")}
    options = {key: value for key, value in values.items() if key not in own}
    return _build(Method, {k: v for k, v in values.items() if k in own} | {"options": options}, f"{where}, methods")


def _build(cls: Any, values: Any, where: str) -> Any:
    """Return `cls(**values)`, checked; lists become tuples."""
    if not isinstance(values, dict):
        raise ConfigError(f"{values!r} as {where}", "a mapping of settings", "correct the YAML")
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown setting {key!r} for {where}{did_you_mean(key, known)}", f"{', '.join(known)}")
    return read_config.read_config(cls, flags=values)


def _expanded(study: Study, grids: Sequence[Grid], users: int | None) -> Study:
    """Add the methods of the grids, and let the method that a grid is about take part in its analysis."""
    methods, notes = list(study.methods), list(study.notes)
    for grid in grids:
        base = next((method for method in methods if method.name == grid.of), None)
        if base is None:
            study.method(grid.of)
        assert base is not None
        if grid.analysis not in base.analyses:
            methods[methods.index(base)] = base = dataclasses.replace(base, analyses=(*base.analyses, grid.analysis))
        for value in grid.values:
            if grid.varies == "users" and users is not None and value >= users:
                notes.append(f"few-shot K = {value} is left out: there are {users} users")
            elif value != varied_value(study, base, grid.varies):
                methods.append(_variant(base, grid, value))
    return dataclasses.replace(study, methods=tuple(methods), notes=tuple(notes))


def varied_value(study: Study, method: Method, setting: str) -> Any:
    """Return what a method has for a setting of `finetune`, or its backbone."""
    if setting == "backbone":
        return method.backbone
    defaults = {f.name: f.default for f in dataclasses.fields(settings.FinetuneConfig)}
    if setting not in defaults:
        raise ConfigError(f"a grid varies {setting!r}{did_you_mean(setting, defaults)}", "a setting of finetune")
    kind = _kind(study, method)
    own = METHODS[kind].defaults if kind in METHODS else {}
    return {**defaults, **own, **study.finetune, **method.finetune}[setting]


def _variant(base: Method, grid: Grid, value: Any) -> Method:
    common: Json = {"analyses": (grid.analysis,), "varies": grid.varies, "of": base.name, "paper": None}
    if grid.varies == "backbone":
        name = f"{base.name} on {Path(str(value)).name}"
        return dataclasses.replace(
            base, name=name, backbone=str(value), finetune=base.finetune | grid.finetune, **common
        )
    label = {"users": "K", "lam": "lambda"}.get(grid.varies, grid.varies)
    name = f"{base.name} ({label}={value})"
    return dataclasses.replace(base, name=name, finetune=base.finetune | grid.finetune | {grid.varies: value}, **common)


def _with_flags(study: Study, config: StudyConfig) -> Study:
    seeds = config.seeds or (QUICK_SEEDS if config.quick else ())
    plan = {name: dataclasses.replace(asked, seeds=seeds or asked.seeds) for name, asked in study.plan.items()}
    if config.quick and not config.seeds:  # one run of each side analysis shows that it works
        plan |= {
            name: dataclasses.replace(asked, seeds=QUICK_SEEDS[:1])
            for name, asked in plan.items()
            if name not in (MAIN, ABLATION)
        }
    wanted = [name.strip() for name in config.analyses] or list(study.analyses)
    return dataclasses.replace(study, plan=plan, analyses=tuple(wanted))


def _check(study: Study, where: str) -> None:
    study.method(study.reference)
    for name in (*study.analyses, *study.plan, *(a for m in study.methods for a in m.analyses)):
        if name not in ANALYSES:
            near = did_you_mean(name, ANALYSES)
            raise ConfigError(f"analysis {name!r} in {where}{near}", f"some of {', '.join(ANALYSES)}", "correct it")
    for name, asked in study.plan.items():
        unknown = [model for model in asked.models if model not in schema.RECOMMENDERS]
        if unknown or not set(asked.tasks) <= {1, 2} or not asked.seeds:
            raise ConfigError(
                f"plan.{name} in {where} is {asked}",
                f"seeds, tasks of 1 and 2, models of {', '.join(schema.RECOMMENDERS)}",
            )
    slugs: dict[str, str] = {}
    for method in study.methods:
        if method.source not in SOURCES:
            near = did_you_mean(method.source, SOURCES)
            raise ConfigError(f"method {method.name!r} has source {method.source!r}{near}", f"one of {list(SOURCES)}")
        if method.slug in slugs or not method.slug:
            raise ConfigError(
                f"methods {slugs.get(method.slug)!r} and {method.name!r} share the folder {method.slug!r}",
                "names that differ in letters or digits",
                "rename one",
            )
        slugs[method.slug] = method.name


# --- steps --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One command of a run: what it writes, and the settings it is called with."""

    name: str  # folder below the run
    command: str  # "finetune", "export-items", ...
    config: Any
    done: str  # the file that the command writes last
    after: tuple[Path, ...]  # folders of the steps whose output it reads

    @property
    def folder(self) -> Path:
        """Return the folder that the command writes."""
        return Path(self.config.out)


@dataclass(frozen=True)
class Run:
    """All steps of one method with one seed, in order."""

    method: Method
    seed: int | None
    folder: Path
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class RunContext:
    """Where a method's steps read and write."""

    study: Study
    method: Method
    seed: int | None
    data: Path
    backbone: str
    device: str
    folder: Path  # of the run
    prefix: str = ""  # of the steps' folders: "" on the study's dataset, "cross-…-" on a target domain
    trained: Path | None = None  # the adapter folder

    def out(self, name: str) -> Path:
        """Return the folder of a step."""
        return self.folder / f"{self.prefix}{name}"

    def step(self, command: str, cls: type, out: Path, done: str, after: Sequence[Path], **values: Any) -> Step:
        """Return a step; settings that the command does not know are refused here, before anything runs."""
        if "device" in {f.name for f in dataclasses.fields(cls)}:
            values["device"] = self.device
        config = _build(cls, values | {"out": out}, f"method {self.method.name!r}, {command}")
        return Step(out.name, command, config, done, tuple(after))


@dataclass(frozen=True)
class Source:
    """Where item vectors come from."""

    embed: Callable[[RunContext], Step] | None = None  # writes an embeddings folder
    train: Callable[[RunContext], Step] | None = None  # writes an adapter folder first
    encodes_users: bool = False  # Task 1 takes the sequence encoder; else the mean of the history's items
    anywhere: bool = True  # can embed a dataset it has not seen


def _finetune(context: RunContext) -> Step:
    method, study = context.method, context.study
    kind = _kind(study, method)
    others = {name for other, recipe in METHODS.items() if other != kind for name in recipe.own}
    common = {name: value for name, value in study.finetune.items() if name not in others}
    values = {**common, **method.finetune}
    return context.step(
        "finetune",
        settings.FinetuneConfig,
        context.out("adapter"),
        schema.ADAPTER_FILE,
        [],
        **(values | {"data": context.data, "backbone": context.backbone, "seed": context.seed}),
    )


def _exported(context: RunContext) -> Json:
    """Return what a method's export is asked for; `strategy: prompt1` may stand beside the source."""
    return {**context.study.export, **context.method.export, **context.method.options}


def _kind(study: Study, method: Method) -> str:
    """Return which method of `finetune` trains: what is common to a study may be a setting of another one."""
    return str({**study.finetune, **method.finetune}.get("method", "vlm2rec"))


def _export(context: RunContext) -> Step:
    values = _exported(context)
    after = [] if context.trained is None else [context.trained]
    given = {"data": context.data, "backbone": context.backbone, "adapter": context.trained}
    return context.step(
        "export-items",
        settings.ExportConfig,
        context.out("embeddings"),
        schema.MANIFEST_FILE,
        after,
        **(values | given),
    )


def _embedded(
    command: str, cls: type, defaults: Mapping[str, Any], asks_backbone: bool = False
) -> Callable[[RunContext], Step]:
    """Return a source's function for a command that writes an embeddings folder from the method's own options."""

    def embed(context: RunContext) -> Step:
        options = {_FLAGS.get(key, key): value for key, value in context.method.options.items()}
        values = {**defaults, **options, "data": context.data}
        if asks_backbone:
            values["backbone"] = context.backbone
        return context.step(command, cls, context.out("embeddings"), schema.MANIFEST_FILE, [], **values)

    return embed


def _frozen(kind: str) -> Callable[[RunContext], Step]:
    """Return the function of a source whose vectors a frozen encoder makes."""
    return _embedded("export-items", settings.ExportConfig, {"encoder_kind": kind, **_OF_ENCODER})


_FLAGS = {"folder": "encoder", "kind": "encoder_kind"}  # what a study calls settings of export-items
# what is also the default is spelled out: steps that earlier versions have recorded hold it
_OF_ENCODER = {"pooling": "auto", "fusion_norm": "raw", "dtype": "float32"}
_OF_QUESTION = {"strategy": "question", "prompt_mode": "auto", "max_pixels": 224 * 224, "max_title_tokens": 64}

SOURCES: dict[str, Source] = {
    "id": Source(),
    "backbone": Source(_export, encodes_users=True),
    "finetune": Source(_export, _finetune, encodes_users=True),
    "vectors": Source(_embedded("import-vectors", settings.ImportVectorsConfig, {}), anywhere=False),
    "sentence-transformers": Source(_frozen("sentence")),
    "clip": Source(_frozen("clip")),
    "prompt": Source(_embedded("export-items", settings.ExportConfig, _OF_QUESTION, asks_backbone=True)),
}


def _evaluate(context: RunContext, embeddings: Path) -> Step:
    source = SOURCES[context.method.source]
    values: Json = {**context.study.evaluate, **context.method.evaluate, "data": context.data, "embeddings": embeddings}
    if source.encodes_users and not _exported(context).get("strategy"):  # its prompts hold one item, no history
        values |= {"backbone": context.backbone, "adapter": context.trained}
    after = [embeddings, *([context.trained] if context.trained else [])]
    return context.step(
        "evaluate", settings.EvaluateConfig, context.out("evaluate"), schema.METRICS_FILE, after, **values
    )


def _recommend(context: RunContext, model: str, embeddings: Path | None) -> Step:
    values = {**context.study.recommender, **context.method.recommender}
    given = {"data": context.data, "model": model, "embeddings": embeddings, "seed": context.seed}
    return context.step(
        "train-recommender",
        settings.TrainRecommenderConfig,
        context.out(f"recommender-{model}"),
        schema.METRICS_FILE,
        [embeddings] if embeddings else [],
        **(values | given),
    )


@dataclass(frozen=True)
class Target:
    """A dataset that methods are measured on: that of the study, or a domain of the cross-domain analysis."""

    name: str
    data: Path
    prefix: str = ""


def runs(study: Study, out: Path, source: Target, domains: Sequence[Target], backbone: str, device: str) -> list[Run]:
    """Return every run of the matrix, seed by seed: after each round the tables hold every method."""
    found: list[tuple[tuple[int, int], Run]] = []
    for number, method in enumerate(study.methods):
        asked = _asked(study, method)
        if not asked:
            continue
        seeds = list(seeds_of(study, method))
        fixed = SOURCES[method.source].embed is not None and SOURCES[method.source].train is None
        for seed in [ANY_SEED, *seeds] if fixed else seeds:
            folder = out / method.slug / ("seed-any" if seed is None else f"seed-{seed}")
            context = RunContext(study, method, seed, source.data, method.backbone or backbone, device, folder)
            steps = _steps(context, asked, domains)
            if steps:
                order = (-1 if seed is None else seeds.index(seed), number)
                found.append((order, Run(method, seed, folder, tuple(steps))))
    return [run for _, run in sorted(found, key=lambda pair: pair[0])]


def seeds_of(study: Study, method: Method) -> tuple[int, ...]:
    """Return every seed that an analysis asks of a method."""
    return tuple(sorted({seed for asked in _asked(study, method).values() for seed in asked.seeds}))


def _asked(study: Study, method: Method) -> dict[str, AnalysisPlan]:
    """Return what the chosen analyses ask of a method."""
    return {name: study.plan[name] for name in study.analyses if name in method.analyses and name in study.plan}


def _steps(context: RunContext, asked: Mapping[str, AnalysisPlan], domains: Sequence[Target]) -> list[Step]:
    source = SOURCES[context.method.source]
    of_seed = {name: each for name, each in asked.items() if context.seed is None or context.seed in each.seeds}
    steps: list[Step] = []
    if source.train is not None:
        steps.append(source.train(context))
        context = dataclasses.replace(context, trained=steps[-1].folder)
    # what cross-domain compares with is measured at home as well
    steps += _measured(context, source, list(of_seed.values()))
    if CROSS_DOMAIN in of_seed:
        for domain in domains:
            if not source.anywhere:
                raise ConfigError(
                    f"method {context.method.name!r} takes part in {CROSS_DOMAIN}",
                    "a source that can embed items it has not seen",
                    f"take {CROSS_DOMAIN} out of its analyses",
                )
            there = dataclasses.replace(context, data=domain.data, prefix=domain.prefix)
            steps += _measured(there, source, [of_seed[CROSS_DOMAIN]])
    return steps


def _measured(context: RunContext, source: Source, asked: Sequence[AnalysisPlan]) -> list[Step]:
    """Return the steps that embed one dataset and measure on it, as far as they belong to the place's seed."""
    tasks = {task for each in asked for task in each.tasks}
    models = [model for model in schema.RECOMMENDERS if any(2 in each.tasks and model in each.models for each in asked)]
    if source.embed is None:
        return [_recommend(context, model, None) for model in models]
    fixed = source.train is None
    home = dataclasses.replace(context, seed=None, folder=context.folder.parent / "seed-any") if fixed else context
    embedded = source.embed(home)
    steps: list[Step] = []
    if not fixed or context.seed is None:
        steps.append(embedded)
        if 1 in tasks:
            steps.append(_evaluate(home, embedded.folder))
    if not fixed or context.seed is not None:
        steps += [_recommend(context, model, embedded.folder) for model in models]
    return steps
