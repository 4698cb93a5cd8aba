"""The methods of a study as data, and the steps of each method.

A method names a source; `SOURCES` says how a source makes an embeddings folder. The steps after that are the same for
every source: rank items by similarity (Task 1) and train recommenders that start from the vectors (Task 2). They run on
the dataset of the study and on the target domains of the cross-domain analysis.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlm2rec.downstream.multimodal.recipes import VECTORS_ONLY, is_read
from vlm2rec.downstream.options import TailOver
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ConfigError, did_you_mean, one_of
from vlm2rec.embedder.training.recipes import METHODS, unread
from vlm2rec.pipelines import config as settings
from vlm2rec.pipelines import read_config
from vlm2rec.pipelines.config import Count, Positive, StudyConfig
from vlm2rec.pipelines.experiments import controls
from vlm2rec.pipelines.read_config import read_yaml

Json = dict[str, Any]
PROBE_IMAGES = "probe-images"
LOOKS = "looks"
"""The column of items.parquet that a study takes for `looks:` if it names none."""
Role = Literal["vanilla", "sft", "sft_best_tau", "constant_w", "text_only", "image_only", "shuffled"]
"""What a method is in the verdicts: the backbone untrained; SFT; SFT at its own best temperature; SFT with a constant
weight of the negatives; SFT of one modality alone; the reference with shuffled images. `reference` is another key."""
MAIN, ABLATION, FEW_SHOT, SENSITIVITY = "main", "ablation", "few-shot", "sensitivity"
FAMILIES, CROSS_DOMAIN, COLD_START = "families", "cross-domain", "cold-start"
ARMS = "arms"
"""Not of the paper: the rivals that VLM2Rec has to beat before its two losses are the reason, in Task 1."""
RIVALS = "rivals"
"""The trained embedders that the paper compares with, each beside its own ablation."""
RATIONALES = "rationales"
"""Rivals that read a column of rationales, which few catalogues have."""
ANALYSES = (MAIN, ABLATION, FEW_SHOT, SENSITIVITY, FAMILIES, CROSS_DOMAIN, COLD_START, ARMS, RIVALS, RATIONALES)
DEFAULT_FILE, LABORATORY_FILE, DEMO_FILE = (
    Path(__file__).parent / name for name in ("study.yaml", "laboratory.yaml", "demo.yaml")
)
ANY_SEED = None
"""Seed of the steps that use no random numbers, such as exporting the vectors of an untrained backbone."""

QUICK: Json = {
    "finetune": {"max_steps": 4, "epochs": 1000.0, "valid_users": 20, "log_steps": 1},
    "recommender": {"max_epochs": 2, "eval_step": 1},
}
QUICK_SEEDS = (0, 1)
QUICK_TRIALS = 2
_LISTS_ALL = "docs/study.md"
_NO_GRADIENTS: Json = {"gradient_steps": 0}  # Fig. 1b shows the main methods, not the grids


# --- the study ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the tables."""

    name: str
    source: str = ""
    vectors_of: str | None = None  # train recommenders from the vectors of this method, and make none
    analyses: tuple[str, ...] = (MAIN,)
    backbone: str | None = None  # default: the backbone of the study
    paper: str | None = None  # the row of the paper's tables to print beside it
    finetune: Json = field(default_factory=dict)
    export: Json = field(default_factory=dict)
    evaluate: Json = field(default_factory=dict)
    recommender: Json = field(default_factory=dict)
    options: Json = field(default_factory=dict)  # settings of the source itself: a file, a folder
    models: tuple[str, ...] = ()  # of the recommenders of its analyses, only these; empty: all
    shuffle_images: bool = False  # give items the images of others, to see what looks are worth
    role: Role | None = None  # what the gates and verdicts take it for; default: what its name says
    varies: str | None = None  # in a grid: the setting that differs from the method `of`
    of: str | None = None
    search: Json = field(default_factory=dict)  # with --select valid: setting of finetune → values to try
    tuned_like: str | None = None  # with --select valid: take the settings chosen for this method, and try none

    @property
    def slug(self) -> str:
        """Return the name of the method's folder."""
        text = self.name.lower().replace("w/o", "without")
        return re.sub(r"[^a-z0-9.]+", "-", text).strip("-.")


@dataclass(frozen=True, kw_only=True)
class AnalysisPlan:
    """The seeds, tasks and recommenders that an analysis runs for its methods."""

    seeds: tuple[int, ...] = (0,)
    tasks: tuple[int, ...] = (1, 2)
    models: tuple[str, ...] = ("SASRec",)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Methods that differ from one base method in one setting."""

    analysis: str
    of: str
    varies: str
    values: tuple[Any, ...]
    finetune: Json = field(default_factory=dict)  # other settings of every method of the grid


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """What `--select valid` tries: equally many trials of every method that trains; see `selection`."""

    trials: Positive = 4
    seed: Count = 0  # draws the trials of a larger grid, and trains them
    grid: dict[str, Any] = field(default_factory=dict)  # setting of finetune → values; a method adds its `search`


@dataclass(frozen=True, kw_only=True)
class Study:
    """A whole study, as the YAML describes it; see `study.yaml`."""

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
    shared_items: Literal["refuse", "drop", "count"] = "refuse"
    cold_start: tuple[int, ...] = (5, 10, 20)
    tail_over: TailOver = "train"  # of which interactions the long tail has few
    search: SearchPlan = field(default_factory=SearchPlan)
    looks: str | None = None  # column of items.parquet; with one, the method of role vanilla probes the images for it
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
        """Return the methods with these names or folder names; without names, all methods."""
        if not names:
            return list(self.methods)
        known = {text.lower(): method for method in self.methods for text in (method.slug, method.name)}
        for name in names:
            if name.strip().lower() not in known:
                near = did_you_mean(name, (method.name for method in self.methods))
                raise ConfigError(f"--methods names {name!r}{near}", f"some of {self._names()}", "correct --methods")
        return [method for method in self.methods if method in [known[name.strip().lower()] for name in names]]

    def check_taking_part(self, methods: Iterable[Method]) -> None:
        """Refuse methods that take part in none of the chosen analyses: nothing would be run for them."""
        chosen = ", ".join(self.analyses)
        for method in methods:
            if not set(method.analyses) & set(self.analyses):
                raise ConfigError(
                    f"--methods names {method.name!r}, which takes part in none of the chosen analyses ({chosen})",
                    f"one of its own analyses: {', '.join(method.analyses)}",
                    "add one of them to --analyses, or leave the method out",
                )


def read_study(
    config: StudyConfig,
    users: int | None = None,
    more: Json | None = None,
    chosen: Mapping[str, Json] | None = None,
) -> Study:
    """Read the study: merge its YAML into the default one, expand the grids and apply the flags.

    Args:
        config: flags of the command.
        users: number of users of the dataset; few-shot runs with as many or more users are left out, with a note.
        more: settings of a command; they override the default, and the YAML overrides them.
        chosen: settings of finetune by method, chosen on validation; they override the method's own.

    Raises:
        ConfigError: a key, an analysis, a source or a setting is unknown, or two methods share a folder.
    """
    own = [file for file in (config.config, config.override) if file is not None]
    layers = [(file.name, read_yaml(file)) for file in (DEFAULT_FILE, *([LABORATORY_FILE] if config.demo else []))]
    layers += [("the settings", more or {}), *((str(file), read_yaml(file)) for file in own)]
    if config.quick:
        layers.append(("--quick", QUICK))
    where = " and ".join(map(str, own)) or DEFAULT_FILE.name
    raw = _merge(layers)
    plans = {name: _build(AnalysisPlan, values, f"plan.{name} in {where}") for name, values in raw.pop("plan").items()}
    methods = [_method(values, where) for values in [*raw.pop("methods"), *raw.pop("more_methods", [])]]
    grids = [_build(Grid, values, f"grids in {where}") for values in raw.pop("grids", [])]
    backbones = tuple(raw.pop("backbones", []))
    reference = raw.get("reference", "")
    if backbones:
        grids.append(Grid(analysis=FAMILIES, of=reference, varies="backbone", values=backbones, finetune=_NO_GRADIENTS))
    search = _build(SearchPlan, raw.pop("search", {}), f"search in {where}")
    study = _build(Study, raw | {"plan": plans, "methods": tuple(methods), "search": search}, where)
    study = _with_borrowed(study, where)
    study = _with_chosen(study, chosen or {})
    study = _with_grids(study, grids, users)
    study = _with_flags(study, config)
    _check(study, where)
    return study


def _merge(layers: Iterable[tuple[str, Json]]) -> Json:
    """Merge layers of keys, each with where it stands; a later one overrides."""
    known = {f.name for f in dataclasses.fields(Study)} - {"notes"} | {"grids", "more_methods", "backbones"}
    merged: Json = {}
    for where, layer in layers:
        for key, value in layer.items():
            if key not in known:
                near = did_you_mean(key, known)
                raise ConfigError(
                    f"unknown key {key!r} in {where}{near}",
                    one_of(key, sorted(known), _LISTS_ALL),
                    "correct or remove it in the YAML",
                )
            before = merged.get(key)
            merged[key] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
    return merged


def _method(values: Any, where: str) -> Method:
    if not isinstance(values, dict) or not values.get("name"):
        raise ConfigError(
            f"{values!r} among the methods of {where}", "a mapping with name and source", "correct the YAML"
        )
    own = {f.name for f in dataclasses.fields(Method)}
    values = dict(values)
    if "adapter" in values:  # a setting of the recommender, not of the source
        values["recommender"] = {**values.get("recommender", {}), "adapter": values.pop("adapter")}
    options = {key: value for key, value in values.items() if key not in own}
    return _build(Method, {k: v for k, v in values.items() if k in own} | {"options": options}, f"{where}, methods")


def _build(cls: Any, values: Any, where: str) -> Any:
    """Return `cls(**values)` with every value checked; lists become tuples."""
    if not isinstance(values, dict):
        raise ConfigError(f"{values!r} as {where}", "a mapping of settings", "correct the YAML")
    known, command = [f.name for f in dataclasses.fields(cls)], read_config.command_of(cls)
    for key in values:
        if key not in known:
            raise ConfigError(
                f"unknown setting {key!r} for {where}{did_you_mean(key, known)}",
                one_of(key, known, f"`{command} --help`" if command else _LISTS_ALL),
                "correct or remove it in the YAML",
            )
    return read_config.read_config(cls, flags=values)


def _with_borrowed(study: Study, where: str) -> Study:
    """Give methods with `vectors_of` the source of the method that they name."""
    methods = []
    for method in study.methods:
        if method.vectors_of is None:
            methods.append(method)
            continue
        own = [name for name in (*_LENT, *_NOT_READ) if getattr(method, name)]
        if own:
            raise ConfigError(
                f"method {method.name!r} in {where} has vectors_of and {', '.join(own)}",
                "settings of recommenders alone: its vectors are another method's",
                "remove vectors_of, or the others",
            )
        other = study.method(method.vectors_of)
        methods.append(dataclasses.replace(method, **{name: getattr(other, name) for name in _LENT}))
    return dataclasses.replace(study, methods=tuple(methods))


_LENT = ("source", "backbone", "options", "shuffle_images")  # with `vectors_of`: settings of the other method
_NOT_READ = ("finetune", "export", "evaluate", "search", "tuned_like", "role")  # settings that make or rank vectors


def _with_chosen(study: Study, chosen: Mapping[str, Json]) -> Study:
    """Give methods the settings that were chosen for them, and for the method that they are `tuned_like`."""
    methods = []
    for method in study.methods:
        values = method.finetune | chosen.get(method.name, {})
        if method.tuned_like:  # what sets an ablation apart stays
            values = chosen.get(method.tuned_like, {}) | values
        methods.append(dataclasses.replace(method, finetune=values))
    return dataclasses.replace(study, methods=tuple(methods))


def _with_grids(study: Study, grids: Sequence[Grid], users: int | None) -> Study:
    """Add the methods of the grids, and add the base method of each grid to its analysis."""
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
                notes.append(f"few-shot K = {value} is left out: there are only {users} users")
            elif value != varied_value(study, base, grid.varies):
                methods.append(_variant(base, grid, value))
    return dataclasses.replace(study, methods=tuple(methods), notes=tuple(notes))


def varied_value(study: Study, method: Method, setting: str) -> Any:
    """Return the value of a `finetune` setting for a method; for the setting "backbone", its backbone."""
    if setting == "backbone":
        return method.backbone
    defaults = {f.name: f.default for f in dataclasses.fields(settings.FinetuneConfig)}
    if setting not in defaults:
        raise ConfigError(
            f"a grid varies {setting!r}{did_you_mean(setting, defaults)}", "a setting of finetune", "correct the YAML"
        )
    kind = training_method(study, method)
    own = METHODS[kind].defaults if kind in METHODS else {}
    return {**defaults, **own, **study.finetune, **method.finetune}[setting]


def _variant(base: Method, grid: Grid, value: Any) -> Method:
    common: Json = {"analyses": (grid.analysis,), "varies": grid.varies, "of": base.name, "paper": None, "role": None}
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
    plans = {name: dataclasses.replace(plan, seeds=seeds or plan.seeds) for name, plan in study.plan.items()}
    if config.quick and not config.seeds:  # one seed is enough to show that a side analysis works
        plans |= {
            name: dataclasses.replace(plan, seeds=QUICK_SEEDS[:1])
            for name, plan in plans.items()
            if name not in (MAIN, ABLATION)
        }
    wanted = [name.strip() for name in config.analyses] or list(study.analyses)
    search = study.search
    if config.quick:
        search = dataclasses.replace(search, trials=min(search.trials, QUICK_TRIALS))
    return dataclasses.replace(study, plan=plans, analyses=tuple(wanted), search=search)


def _check(study: Study, where: str) -> None:
    study.method(study.reference)
    for name in (*study.analyses, *study.plan, *(a for m in study.methods for a in m.analyses)):
        if name not in ANALYSES:
            near = did_you_mean(name, ANALYSES)
            raise ConfigError(
                f"analysis {name!r} in {where}{near}", f"some of {', '.join(ANALYSES)}", "correct the YAML"
            )
    for name, plan in study.plan.items():
        unknown = [model for model in plan.models if model not in schema.RECOMMENDERS]
        if unknown or not set(plan.tasks) <= {1, 2} or not plan.seeds:
            raise ConfigError(
                f"plan.{name} in {where} is {plan}",
                f"seeds, tasks of 1 and 2, models of {', '.join(schema.RECOMMENDERS)}",
                "correct the YAML",
            )
    for method in study.methods:
        if unknown := [model for model in method.models if model not in schema.RECOMMENDERS]:
            raise ConfigError(
                f"method {method.name!r} in {where} has models {', '.join(unknown)}",
                f"some of {', '.join(schema.RECOMMENDERS)}",
                "correct the YAML",
            )
    trained = {model for plan in study.plan.values() if 2 in plan.tasks for model in plan.models}
    for name in (*study.recommender, *(name for method in study.methods for name in method.recommender)):
        if name not in schema.RECOMMENDERS and trained and not any(is_read(model, name) for model in trained):
            raise ConfigError(
                f"recommender: {name} in {where}",
                f"a setting that one of the recommenders ({', '.join(sorted(trained))}) reads",
                "remove it, or add the recommender that it is for",
            )
    slugs: dict[str, str] = {}
    roles: dict[str, str] = {}
    for method in study.methods:
        if method.role and roles.setdefault(method.role, method.name) != method.name:
            raise ConfigError(
                f"methods {roles[method.role]!r} and {method.name!r} both have the role {method.role}",
                "one method for a role",
                "remove the role of one",
            )
        if method.source not in SOURCES:
            near = did_you_mean(method.source, SOURCES)
            raise ConfigError(
                f"method {method.name!r} has source {method.source!r}{near}",
                f"one of {list(SOURCES)}",
                "correct the YAML",
            )
        _check_vectors(study, method, where)
        if method.slug in slugs or not method.slug:
            raise ConfigError(
                f"methods {slugs.get(method.slug)!r} and {method.name!r} share the folder {method.slug!r}",
                "names that differ in letters or digits",
                "rename one",
            )
        slugs[method.slug] = method.name
        _check_tuning(study, method, where)


def _check_vectors(study: Study, method: Method, where: str) -> None:
    if method.vectors_of is None:
        return
    other = study.method(method.vectors_of)
    seeds = {seed for plan in _plans_of(study, method).values() for seed in plan.seeds}
    if SOURCES[other.source].embed is None or other.vectors_of or not seeds <= set(seeds_of(study, other)):
        raise ConfigError(
            f"method {method.name!r} in {where} has vectors_of {other.name!r}",
            "a method that makes vectors itself, in the same analyses or with the same seeds",
            "correct the YAML",
        )


def _check_tuning(study: Study, method: Method, where: str) -> None:
    trains = SOURCES[method.source].train is not None
    if (method.search or method.tuned_like) and not trains:
        raise ConfigError(
            f"method {method.name!r} in {where} has a search, and its source {method.source!r} trains nothing",
            "`search` and `tuned_like` for methods that train",
            "remove `search` or `tuned_like` from the method",
        )
    if method.tuned_like is None:
        return
    other = study.method(method.tuned_like)
    kinds = training_method(study, method), training_method(study, other)
    if SOURCES[other.source].train is None or other.tuned_like or other.of or method.search or kinds[0] != kinds[1]:
        raise ConfigError(
            f"method {method.name!r} in {where} is tuned_like {other.name!r}",
            "a method with trials of its own and the same --method of finetune, and no `search` beside it",
            "correct the YAML",
        )


# --- steps --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One command of a run: what it writes, and its settings."""

    name: str  # of its folder in the run's folder
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
    trial: int | None = None  # the number of a trial of `--select valid`


def _folder_of(out: Path, method: Method, seed: int | None) -> Path:
    return out / method.slug / ("seed-any" if seed is ANY_SEED else f"seed-{seed}")


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

    def folder_of(self, method: Method, seed: int | None) -> Path:
        """Return the folder of a run of the same study."""
        return _folder_of(self.folder.parent.parent, method, seed)

    def step(self, command: str, cls: type, out: Path, done: str, after: Sequence[Path], **values: Any) -> Step:
        """Return a step; raise `ConfigError` for a setting that the command does not have, before anything runs."""
        if "device" in {f.name for f in dataclasses.fields(cls)}:
            values["device"] = self.device
        config = _build(cls, values | {"out": out}, f"method {self.method.name!r}, {command}")
        return Step(out.name, command, config, done, tuple(after))


@dataclass(frozen=True)
class Source:
    """A kind of method: how it makes item vectors."""

    embed: Callable[[RunContext], Step] | None = None  # writes an embeddings folder
    train: Callable[[RunContext], Step] | None = None  # writes an adapter folder first
    encodes_users: bool = False  # Task 1 encodes the history as a sequence; else it takes the mean of its items
    embeds_new_items: bool = True  # it can embed a dataset that it was not made for


def _finetune(context: RunContext) -> Step:
    method, study = context.method, context.study
    kind = training_method(study, method)
    common = {name: value for name, value in study.finetune.items() if name not in unread(kind)}
    values = {**common, **method.finetune}
    return context.step(
        "finetune",
        settings.FinetuneConfig,
        context.out("adapter"),
        schema.ADAPTER_FILE,
        [],
        **(values | {"data": context.data, "backbone": context.backbone, "seed": context.seed}),
    )


def _export_settings(context: RunContext) -> Json:
    """Return the export settings of a method: the study's, then its own, then those beside its source (`strategy`)."""
    return {**context.study.export, **context.method.export, **context.method.options}


def _adapter(context: RunContext) -> Path | str | None:
    """Return the adapter folder that the method has trained, or the one that its `export` names."""
    return context.trained or _export_settings(context).get("adapter")


def training_method(study: Study, method: Method) -> str:
    """Return the `--method` of `finetune` that trains this method of the study."""
    return str({**study.finetune, **method.finetune}.get("method", "vlm2rec"))


def _export(context: RunContext) -> Step:
    values = _export_settings(context)
    after = [] if context.trained is None else [context.trained]
    given = {"data": context.data, "backbone": context.backbone, "adapter": _adapter(context)}
    return context.step(
        "export-items",
        settings.ExportConfig,
        context.out("embeddings"),
        schema.MANIFEST_FILE,
        after,
        **(values | given),
    )


def _embed_by(
    command: str, cls: type, defaults: Mapping[str, Any], needs_backbone: bool = False
) -> Callable[[RunContext], Step]:
    """Return the `embed` function of a source: one command that takes the method's own options."""

    def embed(context: RunContext) -> Step:
        options = {_EXPORT_NAMES.get(key, key): value for key, value in context.method.options.items()}
        values = {**defaults, **options, "data": context.data}
        if needs_backbone:
            values["backbone"] = context.backbone
        return context.step(command, cls, context.out("embeddings"), schema.MANIFEST_FILE, [], **values)

    return embed


def _frozen(kind: str) -> Callable[[RunContext], Step]:
    """Return the `embed` function of a source whose vectors come from a frozen encoder."""
    return _embed_by("export-items", settings.ExportConfig, {"encoder_kind": kind, **_ENCODER_SETTINGS})


_EXPORT_NAMES = {"folder": "encoder", "kind": "encoder_kind"}  # the study's names of two settings of export-items
# These repeat some defaults of export-items, because the steps that earlier versions recorded contain them.
_ENCODER_SETTINGS = {"pooling": "auto", "fusion_norm": "raw", "dtype": "float32"}
_QUESTION_SETTINGS = {"strategy": "question", "prompt_mode": "auto", "max_pixels": 224 * 224, "max_title_tokens": 64}

SOURCES: dict[str, Source] = {
    "id": Source(),
    "backbone": Source(_export, encodes_users=True),
    "finetune": Source(_export, _finetune, encodes_users=True),
    "vectors": Source(_embed_by("import-vectors", settings.ImportVectorsConfig, {}), embeds_new_items=False),
    "sentence-transformers": Source(_frozen("sentence")),
    "clip": Source(_frozen("clip")),
    "image-encoder": Source(_frozen("image")),
    "prompt": Source(_embed_by("export-items", settings.ExportConfig, _QUESTION_SETTINGS, needs_backbone=True)),
}


def _tail(study: Study) -> Json:
    return {"tail_over": study.tail_over}


def _evaluate(context: RunContext, embeddings: Path) -> Step:
    source = SOURCES[context.method.source]
    values: Json = {**_tail(context.study), **context.study.evaluate, **context.method.evaluate}
    values |= {"data": context.data, "embeddings": embeddings}
    # the prompt of a strategy holds one item, not a history
    if source.encodes_users and not _export_settings(context).get("strategy"):
        values |= {"backbone": context.backbone, "adapter": _adapter(context)}
    after = [embeddings, *([context.trained] if context.trained else [])]
    return context.step(
        "evaluate", settings.EvaluateConfig, context.out("evaluate"), schema.METRICS_FILE, after, **values
    )


def _probe_images(context: RunContext) -> Step:
    """Return the step that probes the untrained backbone's image tokens for how the items look."""
    exported = _export_settings(context)
    values = {name: exported[name] for name in ("max_pixels", "dtype", "vision_cache", "revision") if name in exported}
    given = {"data": context.data, "backbone": context.backbone, "column": context.study.looks}
    out = context.out("image-probe")
    return context.step(PROBE_IMAGES, settings.ProbeImagesConfig, out, schema.PROBE_FILE, [], **(values | given))


def _recommend(context: RunContext, model: str, embeddings: Path | None) -> Step:
    common = _of_model(context.study.recommender, model)
    if embeddings is None:
        common = {name: value for name, value in common.items() if name not in VECTORS_ONLY}
    values = {**_tail(context.study), **common, **_of_model(context.method.recommender, model)}
    values = {name: value for name, value in values.items() if is_read(model, name)}
    given: Json = {"data": context.data, "model": model, "embeddings": embeddings, "seed": context.seed}
    after = [embeddings] if embeddings else []
    if values.get(_ALIGN_WITH) is not None:
        given[_ALIGN_WITH] = _table_to_align_with(context, str(values[_ALIGN_WITH]))
        after.append(given[_ALIGN_WITH])
    return context.step(
        "train-recommender",
        settings.TrainRecommenderConfig,
        context.out(f"recommender-{model}"),
        schema.METRICS_FILE,
        after,
        **(values | given),
    )


_ALIGN_WITH = "align_with"


def _of_model(values: Json, model: str) -> Json:
    """Return the settings of a recommender: those for all models, then those under its name, which are for it alone."""
    common = {key: value for key, value in values.items() if key not in schema.RECOMMENDERS}
    own = values.get(model, {})
    if not isinstance(own, dict):
        raise ConfigError(
            f"{model}: {own!r} among the settings of recommenders",
            "a mapping of settings",
            "write `key: value` lines below the model's name",
        )
    return {**common, **own}


def _table_to_align_with(context: RunContext, name: str) -> Path:
    """Return the folder of the run from item ids that LLMEmb's alignment reads: a method's SASRec with this seed."""
    method = context.study.method(name)
    if SOURCES[method.source].embed is not None:
        raise ConfigError(
            f"method {context.method.name!r} has align_with {name!r}, whose source is {method.source!r}",
            "a method with source: id",
            "correct the YAML",
        )
    plans = [] if method.models and _TABLE_OF not in method.models else _plans_of(context.study, method).values()
    if not any(_TABLE_OF in plan.models and 2 in plan.tasks and context.seed in plan.seeds for plan in plans):
        raise ConfigError(
            f"method {context.method.name!r} has align_with {name!r}, which trains no {_TABLE_OF} with seed"
            f" {context.seed}",
            f"an analysis of both with {_TABLE_OF} among its models, and the same seeds",
            "correct the YAML",
        )
    return context.folder_of(method, context.seed) / f"{context.prefix}recommender-{_TABLE_OF}"


_TABLE_OF = "SASRec"  # of which LLMEmb's code takes the item table for every recommender


@dataclass(frozen=True)
class Target:
    """A dataset to measure methods on: that of the study, or a target domain of the cross-domain analysis."""

    name: str
    data: Path
    prefix: str = ""


def runs(study: Study, out: Path, source: Target, domains: Sequence[Target], backbone: str, device: str) -> list[Run]:
    """Return all runs of the study, ordered by seed: after each seed the tables have a result of every method."""
    found: list[tuple[tuple[int, int], Run]] = []
    for number, method in enumerate(study.methods):
        plans = _plans_of(study, method)
        if not plans:
            continue
        seeds = list(seeds_of(study, method))
        fixed = SOURCES[method.source].embed is not None and SOURCES[method.source].train is None
        for seed in [ANY_SEED, *seeds] if fixed else seeds:
            folder = _folder_of(out, method, seed)
            data = controls.shuffled_folder(out) if method.shuffle_images else source.data
            context = RunContext(study, method, seed, data, method.backbone or backbone, device, folder)
            steps = _steps(context, plans, domains)
            if steps:
                order = (-1 if seed is None else seeds.index(seed), number)
                found.append((order, Run(method, seed, folder, tuple(steps))))
    return [run for _, run in sorted(found, key=lambda pair: pair[0])]


def seeds_of(study: Study, method: Method) -> tuple[int, ...]:
    """Return every seed that the chosen analyses run a method with."""
    return tuple(sorted({seed for plan in _plans_of(study, method).values() for seed in plan.seeds}))


def _plans_of(study: Study, method: Method) -> dict[str, AnalysisPlan]:
    """Return the plans of the chosen analyses that a method takes part in."""
    return {name: study.plan[name] for name in study.analyses if name in method.analyses and name in study.plan}


def _steps(context: RunContext, plans: Mapping[str, AnalysisPlan], domains: Sequence[Target]) -> list[Step]:
    source = SOURCES[context.method.source]
    plans = {name: plan for name, plan in plans.items() if context.seed is None or context.seed in plan.seeds}
    steps: list[Step] = []
    if source.train is not None and context.method.vectors_of is None:
        steps.append(source.train(context))
        context = dataclasses.replace(context, trained=steps[-1].folder)
    # the cross-domain tables also need the results on the dataset of the study
    steps += _measuring_steps(context, source, list(plans.values()))
    if CROSS_DOMAIN in plans:
        for domain in domains:
            if not source.embeds_new_items or context.method.shuffle_images:
                raise ConfigError(
                    f"method {context.method.name!r} takes part in {CROSS_DOMAIN}",
                    "a source that can embed items it has not seen before, with their own images",
                    f"remove {CROSS_DOMAIN} from its analyses",
                )
            on_domain = dataclasses.replace(context, data=domain.data, prefix=domain.prefix)
            steps += _measuring_steps(on_domain, source, [plans[CROSS_DOMAIN]])
    return steps


def _measuring_steps(context: RunContext, source: Source, plans: Sequence[AnalysisPlan]) -> list[Step]:
    """Return the steps that embed one dataset and measure on it.

    Without training, the vectors are the same for every seed: the run of `ANY_SEED` makes and evaluates them, and the
    runs with a seed hold only the recommenders.
    """
    tasks = {task for plan in plans for task in plan.tasks}
    planned = [
        model for model in schema.RECOMMENDERS if any(2 in plan.tasks and model in plan.models for plan in plans)
    ]
    models = [model for model in planned if model in (context.method.models or planned)]
    if source.embed is None:  # the multimodal ones need vectors
        return [_recommend(context, model, None) for model in models if model in schema.SEQUENTIAL]
    fixed = source.train is None
    if context.method.vectors_of is not None:
        lender = context.study.method(context.method.vectors_of)
        run = context.folder_of(lender, ANY_SEED if fixed else context.seed)
        vectors = run / f"{context.prefix}embeddings"
        return [_recommend(context, model, vectors) for model in models if context.seed is not None]
    embedding = context
    if fixed:
        folder = context.folder_of(context.method, ANY_SEED)
        embedding = dataclasses.replace(context, seed=ANY_SEED, folder=folder)
    embedded = source.embed(embedding)
    steps: list[Step] = []
    if not fixed or context.seed is None:
        steps.append(embedded)
        if 1 in tasks:
            steps.append(_evaluate(embedding, embedded.folder))
        if context.method.role == "vanilla" and context.study.looks and not context.prefix:
            steps.append(_probe_images(embedding))
    if not fixed or context.seed is not None:
        steps += [_recommend(context, model, embedded.folder) for model in models]
    return steps
