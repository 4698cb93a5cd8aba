"""`vlm2rec train-recommender`: Task 2 trains a recommender from an embeddings folder, or in RecBole from item ids."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from vlm2rec.downstream.multimodal import recipes
from vlm2rec.downstream.multimodal import settings as multimodal
from vlm2rec.downstream.recbole import plugin, precision, softmax, windows
from vlm2rec.downstream.recbole.run import Settings, ignored_settings, needs_no_negatives, read_settings
from vlm2rec.downstream.recbole.run import run as train
from vlm2rec.downstream.recommender import (
    CHECKPOINT_FILE,
    DATA,
    EMBEDDINGS,
    OLD_CHECKPOINT_FILE,
    RECORD_FILE,
    VECTORS,
    Epoch,
    Outcome,
)
from vlm2rec.embedder.backbones.devices import speed_up_float32
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError
from vlm2rec.embedder.export.processes import keep_freed_memory
from vlm2rec.embedder.export.shards import differences
from vlm2rec.pipelines import console
from vlm2rec.pipelines.config import TrainRecommenderConfig


def run(config: TrainRecommenderConfig) -> dict[str, Any]:
    """Train and evaluate one recommender; return the content of metrics.json.

    With a dataset folder, a setting comes from a flag that differs from its default, else from the RecBole YAML, else
    from our Task 2 defaults. Without one, it comes from such a flag, else from the YAML, as RecBole reads it.
    """
    _refuse_unread(config)
    if config.model in recipes.MODELS:
        return _multimodal(config)
    if config.data is None and config.config is None:
        raise ConfigError(
            "neither --data nor --config is given",
            "a dataset folder, or a RecBole YAML that names its own dataset",
            "give --data DATA (and --model), or --config recbole.yaml",
        )
    theirs = read_settings(config.config) if config.config else {}
    model = str(config.model or theirs.get("model") or "")
    folder = Dataset(config.data) if config.data is not None else None
    layers: list[Settings] = []
    if folder is not None:
        layers.append(task2_settings(config, model, folder.max_history, theirs))
    if config.config is not None:
        layers.append(config.config)
    layers.append(chosen_settings(config, model, theirs))
    _announce(config, theirs, folder)
    settings = {key: value for each in layers for key, value in (theirs if isinstance(each, Path) else each).items()}
    slow = folder is not None and learns_by_prefix(settings)
    return _trained(functools.partial(train, layers), config, folder, slow)


def _multimodal(config: TrainRecommenderConfig) -> dict[str, Any]:
    from vlm2rec.downstream.multimodal.run import run as train_multimodal

    if config.data is None or config.embeddings is None:
        raise ConfigError(
            f"--model {config.model} without --{'data' if config.data is None else 'embeddings'}",
            "a dataset folder and the vectors of its items",
            "give --data and --embeddings, or train SASRec, GRU4Rec or BERT4Rec from ids",
        )
    if config.mode not in ("adapter", "init"):
        raise ConfigError(
            f"--mode {config.mode} with {config.model}",
            "adapter or init: item ids have a part of their own in the model",
            "change --mode",
        )
    known = {f.name for f in dataclasses.fields(multimodal.Settings)}
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in known}
    features = recipes.choose_features(str(config.model), config.features, config.embeddings)
    settings = multimodal.Settings(**(given | {"features": features}))
    return _trained(functools.partial(train_multimodal, settings), config, Dataset(config.data))


def learns_by_prefix(settings: Mapping[str, Any]) -> bool:
    """Tell whether a training on a dataset folder has a row for every prefix, and might learn all positions at once.

    Args:
        settings: RecBole's keys.
    """
    causal = settings.get("model") in windows.CAUSAL and settings.get("loss_type", "CE") == "CE"
    return causal and not windows.is_set(settings)


def _trained(
    run: Callable[..., Outcome], config: TrainRecommenderConfig, folder: Dataset | None, by_prefix: bool = False
) -> dict[str, Any]:
    """Run a training with its progress on stderr, print the summary, and return the content of metrics.json."""
    keep_freed_memory()
    if folder is not None:
        speed_up_float32(torch.device("cpu"))
    else:  # figures are RecBole's own to the last bit, whatever library this process has chosen before
        torch.set_float32_matmul_precision("highest")
    with _Display(config.out, by_prefix) as display:
        outcome = run(
            out=config.out,
            data=folder,
            candidate_seeds=config.seeds,
            tail_over=config.tail_over,
            device=config.device,
            watcher=display,
        )
    _summarise(outcome)
    return outcome.metrics


def _refuse_unread(config: TrainRecommenderConfig) -> None:
    """Raise `ConfigError` for a setting other than its default that the model does not read."""
    for f in dataclasses.fields(config):
        if not recipes.is_read(config.model, f.name) and getattr(config, f.name) != f.default:
            readers = [model for model in schema.RECOMMENDERS if recipes.is_read(model, f.name)]
            raise ConfigError(
                f"--{f.name.replace('_', '-')} with {config.model or 'a model of RecBole'}",
                f"a setting that it reads; this one is for {', '.join(readers)}",
                "leave it out" + (", and choose the views with --features" if f.name == "column" else ""),
            )


def task2_settings(
    config: TrainRecommenderConfig, model: str, max_history: int, theirs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return RecBole's keys for Task 2: the same training for every model, from ids or vectors.

    Two layers, cross-entropy over all items, AdamW, and the last `max_history` items of every prefix of the training
    sequence.

    Args:
        config: the sizes and rates.
        model: SASRec, GRU4Rec or BERT4Rec.
        max_history: longest history.
        theirs: the keys of the user's YAML, which override these; `eval_step` there changes `patience`.
    """
    settings: dict[str, Any] = {
        "model": model,
        "loss_type": "CE",
        "train_neg_sample_args": None,
        "learner": "adamw",
        "MAX_ITEM_LIST_LENGTH": max_history,
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
        "metrics": ["Hit", "NDCG"],
        "topk": [10, 20],
        "valid_metric": "NDCG@20",
        "metric_decimal_place": 6,
        "eval_batch_size": 1024,
        "reproducibility": True,
    }
    if model == "GRU4Rec":
        settings |= {"num_layers": 2}
    else:
        settings |= {"n_layers": 2, "n_heads": 2, "inner_size": 256, "hidden_act": "gelu"}
    if model == "BERT4Rec":
        # RecBole masks at most int(ratio * length) items: that must be at least one
        settings["mask_ratio"] = max(0.2, 1 / max_history)
    for field in _RECBOLE_KEYS:
        settings |= _RECBOLE_KEYS[field](config, model, theirs or {})
    return settings


def chosen_settings(config: TrainRecommenderConfig, model: str, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return RecBole's keys for the flags that differ from their defaults; they override the YAML."""
    changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default}
    settings: dict[str, Any] = {"model": config.model} if config.model else {}
    for field in changed & _RECBOLE_KEYS.keys():
        settings |= _RECBOLE_KEYS[field](config, model, theirs)
    if config.embeddings is not None:
        settings[plugin.INIT] = str(config.embeddings)
    if "column" in changed:
        settings[plugin.COLUMN] = config.column
    if "mode" in changed:
        settings |= {plugin.MODE: config.mode, plugin.TRAINABLE: None}
    if "fuse" in changed:
        settings[plugin.FUSE] = config.fuse
    if "id_dropout" in changed:
        settings[plugin.ID_DROPOUT] = config.id_dropout
    if "positions" in changed:
        settings[windows.KEY] = config.positions
    if "softmax" in changed:
        settings[softmax.KEY] = config.softmax
    if "samples" in changed:
        settings[softmax.SAMPLES] = config.samples
    if "matmul_precision" in changed:
        settings[precision.KEY] = config.matmul_precision
    if "missing" in changed:
        settings[plugin.MISSING] = config.missing
    if "adapter" in changed:
        settings[plugin.ADAPTER] = config.adapter
    if "pca" in changed:
        settings[plugin.PCA] = config.pca
    if config.align_with is not None:
        settings[plugin.ALIGN_WITH] = str(config.align_with)
    if "align_weight" in changed:
        settings[plugin.ALIGN_WEIGHT] = config.align_weight
    if "align_tau" in changed:
        settings[plugin.ALIGN_TAU] = config.align_tau
    return settings


def _width(config: TrainRecommenderConfig, model: str, theirs: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("embedding_size", "hidden_size") if model == "GRU4Rec" else ("hidden_size",)
    return dict.fromkeys(keys, config.hidden_size)


def _dropout(config: TrainRecommenderConfig, model: str, theirs: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("dropout_prob",) if model == "GRU4Rec" else ("hidden_dropout_prob", "attn_dropout_prob")
    return dict.fromkeys(keys, config.dropout)


def _patience(config: TrainRecommenderConfig, model: str, theirs: Mapping[str, Any]) -> dict[str, Any]:
    # RecBole counts validations, and continues until the count *exceeds* stopping_step
    every = int(theirs.get("eval_step", config.eval_step))
    return {"stopping_step": max(0, math.ceil(config.patience / max(1, every)) - 1)}


_Translation = Callable[[TrainRecommenderConfig, str, Mapping[str, Any]], dict[str, Any]]
_RECBOLE_KEYS: dict[str, _Translation] = {
    "max_epochs": lambda config, model, theirs: {"epochs": config.max_epochs},
    "eval_step": lambda config, model, theirs: {"eval_step": config.eval_step},
    "patience": _patience,
    "batch_size": lambda config, model, theirs: {"train_batch_size": config.batch_size},
    "learning_rate": lambda config, model, theirs: {"learning_rate": config.learning_rate},
    "weight_decay": lambda config, model, theirs: {"weight_decay": config.weight_decay},
    "hidden_size": _width,
    "dropout": _dropout,
    "seed": lambda config, model, theirs: {"seed": config.seed},
}


def _announce(config: TrainRecommenderConfig, theirs: Mapping[str, Any], folder: Dataset | None) -> None:
    if folder is not None:
        ignored = ignored_settings(theirs)
        if ignored:
            console.log.print(
                f"{config.config}: {', '.join(ignored)} have no effect with --data, whose folder is already filtered"
                " and split."
            )
    elif needs_no_negatives(dict(theirs) | {"model": config.model or theirs.get("model")}):
        console.log.print(
            f"{config.config} has no train_neg_sample_args; it is set to null, which cross-entropy needs"
            " (RecBole alone would stop here)."
        )


_FIRST_SECONDS = 15.0  # of training, after which its rate is known
_NAMED = 5  # differences from an earlier run


def _record_in(out: Path) -> dict[str, Any]:
    """Return the settings, data and vectors of the run that a folder holds; empty if there is none."""
    try:
        record = schema.read_json(out / RECORD_FILE, "", "")
    except ArtifactError:
        return {}
    about = {name: record.get(name) for name in (DATA, EMBEDDINGS, VECTORS)}
    found = {**about, **(record["settings"] if isinstance(record.get("settings"), dict) else {})}
    return {name: value for name, value in found.items() if value is not None}


class _Display:
    """Progress on stderr: a bar over batches, and a line for each epoch.

    Before that it says what becomes of an earlier run in `out`. Some seconds into a training `by_prefix` that will take
    hours, it says what takes less.
    """

    def __init__(self, out: Path, by_prefix: bool = False) -> None:
        self._out, self._by_prefix = out, by_prefix
        self._earlier, self._was_finished = _record_in(out), (out / schema.METRICS_FILE).is_file()
        self._done, self._batches, self._begun = 0, 0, 0.0
        self._stack = ExitStack()
        self._advance: Callable[[int], None] = lambda count: None
        self._metric = ""
        self._epochs = 0
        self._seconds = 0.0

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def begin(self, epochs: int, batches: int, valid_metric: str) -> None:
        self._metric, self._epochs = valid_metric, epochs
        self._batches, self._begun = epochs * batches, time.perf_counter()
        if self._earlier:
            self._say_what_is_replaced(_record_in(self._out))
        self._advance = self._stack.enter_context(
            console.progress(f"training, {epochs} epochs at most", epochs * batches)
        )

    def batch(self) -> None:
        self._advance(1)
        self._done += 1
        seconds = time.perf_counter() - self._begun
        if self._by_prefix and seconds > _FIRST_SECONDS:
            self._by_prefix = False  # it is said once
            hours = seconds / self._done * self._batches / 3600
            if hours >= 1:
                console.log.print(
                    f"At this rate, {self._epochs} epochs take {hours:.1f} hours; training may stop earlier. Each"
                    " prefix of a sequence is a row of its own: --positions all learns all positions of a sequence"
                    " from one row, several times as fast. --max-epochs sets fewer epochs.",
                    soft_wrap=True,
                )

    def _say_what_is_replaced(self, now: Mapping[str, Any]) -> None:
        """Say what differs from the earlier run, whose record was there before, and that it is gone."""
        changed = list(differences(self._earlier, now).values())
        state = "a finished" if self._was_finished else "an unfinished"
        if changed:
            more = f"; and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
            console.log.print(
                f"{self._out} held {state} run with other settings, which this one replaces:"
                f" {'; '.join(changed[:_NAMED])}{more}. To keep both, give each run an --out of its own.",
                style=console.WARNING,
                soft_wrap=True,
            )
        else:
            console.log.print(
                f"{self._out} held {state} run with these settings. train-recommender continues none: it starts again.",
                soft_wrap=True,
            )

    def epoch(self, epoch: Epoch) -> None:
        self._seconds += epoch.seconds
        left = self._seconds / epoch.number * (self._epochs - epoch.number) / 60
        score = "" if epoch.score is None else f"  valid {self._metric} {epoch.score:.4f}"
        console.log.print(
            f"epoch {epoch.number}  loss {epoch.loss:.4f}{score}  {epoch.seconds:.1f} s, {left:.1f} min left at most"
        )


def _summarise(outcome: Outcome) -> None:
    metrics = outcome.metrics
    layers = "" if metrics["adapter"] in (None, "linear") else f", {metrics['adapter']}"
    mode = f"{metrics['mode']} by {metrics['fuse']}" if metrics["fuse"] else metrics["mode"]
    start = "item ids" if metrics["start"] == "id" else f"{metrics['start']} vectors ({mode}{layers})"
    if metrics["pca"]:
        start += f", {metrics['pca']['components']} components with {metrics['pca']['explained']:.1%} of the variance"
    rows: dict[str, object] = {
        "start": start,
        **({"aligned": _aligned(metrics)} if "alignment" in metrics else {}),
        "users, items": f"{metrics['users']:,}, {metrics['items']:,}",
        "epochs": f"{metrics['epochs']}, best {metrics['best_epoch']}, {metrics['seconds']:.0f} s",
    }
    if "samples" in metrics:
        rows["softmax"] = f"over {metrics['samples']:,} items drawn for each step, and the targets of its batch"
    if metrics["missing"]:
        rows["filled"] = f"{metrics['missing']:,} items without a vector"
    if metrics["candidates"] is not None:
        seeds = len(metrics["seeds"])
        rows[f"candidates, {seeds} seed{'s' * (seeds != 1)}"] = _figures(metrics["candidates"])
        rows["full ranking"] = _figures(metrics["full"])
        if metrics["tail"]["users"]:
            tail = metrics["tail"]
            where = _TAIL_OVER[tail.get("over", "train")]
            rows[f"tail, {tail['users']} users"] = (
                f"{_figures(tail['candidates'])} (target below {tail['below']} {where})"
            )
        if metrics["cold"]["users"]:
            rows[f"cold, {metrics['cold']['users']} users"] = (
                f"{_figures(metrics['cold']['candidates'])} (target never in training)"
            )
        rows["popularity, full"] = _figures(metrics["popularity"]["full"])
    if metrics["candidates"] is not None:
        over = f", all {metrics['targets']:,} targets" if "targets" in metrics else ""
        rows[f"full ranking, at 20{over}"] = _figures(metrics["retrieval"])
    if metrics["recbole"] is not None:
        ours = metrics["candidates"] is not None
        rows["RecBole's own"] = _figures(metrics["recbole"]) + ", the history ranked too" * ours
    if (outcome.folder / OLD_CHECKPOINT_FILE).exists():
        console.log.print(
            f"{outcome.folder / OLD_CHECKPOINT_FILE} is a pickle of an earlier version: it is not opened, and may be"
            " removed"
        )
    rows["checkpoint"] = outcome.folder / CHECKPOINT_FILE
    rows["metrics"] = outcome.folder / schema.METRICS_FILE
    console.summary(f"{metrics['model']} on {metrics['dataset']}", rows)


def _aligned(metrics: Mapping[str, Any]) -> str:
    told, course = metrics["alignment"], [epoch["alignment"] for epoch in metrics["curve"]]
    return f"with {told['with']}, weight {told['weight']:g}, τ {told['tau']:g}: {course[0]:.4f} → {course[-1]:.4f}"


_TAIL_OVER = {"train": "in training", "all": "in all interactions"}


def _figures(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
