"""Train a sequential recommender in RecBole, from item ids or from an embeddings folder, and evaluate it (Task 2).

There are two kinds of data. A *dataset folder* of `vlm2rec prepare` is evaluated by our protocol: all items are scored
once for each user, and ranked against the stored candidates and the whole catalogue. A *RecBole dataset*, named in an
ordinary RecBole YAML, is split and evaluated by RecBole as that YAML says; without the `item_embedding_*` lines this
gives the same figures as `run_recbole`, bit for bit.

The output folder holds recommender.json (the settings; written first), checkpoint.safetensors (the best epoch),
users.parquet (dataset folder only), recbole.log, tensorboard/ and metrics.json (written last). No pickle is read or
written.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import yaml

from vlm2rec.downstream import recommender
from vlm2rec.downstream.evaluation.protocol import rank_scorer
from vlm2rec.downstream.options import TailOver
from vlm2rec.downstream.recbole import compat, plugin, precision, softmax, windows
from vlm2rec.downstream.recbole.alignment import ITEMS, Alignment, hash_of
from vlm2rec.downstream.recommender import CHECKPOINT_FILE, WRITER, Epoch, NoWatcher, Outcome, TrainingLog, Watcher
from vlm2rec.embedder.contract import publish, schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ConfigError, DataError, did_you_mean
from vlm2rec.embedder.contract.storage import Location

Settings = Path | Mapping[str, Any]
_MAX_SCORES = 2**24  # float32 scores in memory at a time: 64 MB
_MAX_EVAL_SCORES = 2**27  # of a batch of RecBole's evaluation

# With a dataset folder RecBole gets finished sequences: settings that would filter, relabel or split them are unset
_DATA_SETTINGS: dict[str, Any] = {
    "dataset": "vlm2rec",  # not the real name: RecBole has its own settings for names such as ml-100k
    "data_path": "",
    "benchmark_filename": None,
    "additional_feat_suffix": None,
    "load_col": None,
    "unload_col": None,
    "unused_col": None,
    "rm_dup_inter": None,
    "val_interval": None,
    "threshold": None,
    "normalize_field": None,
    "normalize_all": None,
    "numerical_features": [],
    "discretization": None,
    "preload_weight": None,
    "user_inter_num_interval": None,
    "item_inter_num_interval": None,
    "repeatable": True,
}
# `compat.refuse_pickles` refuses them; RecBole also reads settings files of its own
_NO_PICKLES: dict[str, Any] = {
    "dataset_save_path": None,
    "dataloaders_save_path": None,
    "save_dataset": False,
    "save_dataloaders": False,
    "log_wandb": False,
}
_SPLIT = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user"}


def run(
    config: Settings | Sequence[Settings],
    out: Path | str,
    *,
    data: Dataset | Location | str | None = None,
    candidate_seeds: Sequence[int] = (),
    tail_over: TailOver = "train",
    device: str = "auto",
    watcher: Watcher | None = None,
) -> Outcome:
    """Train one recommender, write the output folder and return the outcome.

    Args:
        config: a RecBole YAML, a mapping of RecBole's keys, or several of either; later ones override earlier ones.
        out: output folder, for one run.
        data: dataset folder; without it the settings name a RecBole dataset (`data_path`, `dataset`).
        candidate_seeds: stored candidate sets to rank against; empty takes all.
        tail_over: which interactions decide what the long tail is, those of training or all.
        device: auto (RecBole's choice), cpu, cuda or mps.
        watcher: called after each batch and epoch.

    Raises:
        MissingDependencyError: RecBole is not installed.
        ConfigError: a setting is unknown, would open a pickle or an address, or is refused by RecBole; the loss is not
            a number; `out` holds something else, or is the run that the vectors are to be aligned with.
        DataError: there is no such RecBole dataset.
        ArtifactError: the dataset or embeddings folder is damaged, or they do not fit each other; the disk is full.
    """
    compat.require_recbole()
    out = Path(out)
    given = data if isinstance(data, Dataset | None) else Dataset(data)
    folder = given and given.warm()
    layers = [config] if isinstance(config, Path | Mapping) else list(config)
    settings = _merged(layers)
    _check(settings, folder)
    _refuse_own_table(settings, out)
    recommender.begin(out)
    with publish.full_disk_errors(out), compat.cured(out):
        start = plugin.read_flag(settings)
        vectors = None if start is None else start.folder
        recommender.write_record(out, settings, None if given is None else given.path, vectors)
        recbole_config = recbole_config_of(layers, settings, folder, out, device)
        if start is not None:
            plugin.install()
        trained = _train(recbole_config, folder, out, watcher or NoWatcher())
        users: list[pa.Table] = []
        metrics = _describe(trained, recbole_config, settings, folder)
        if folder is not None:
            ours, users = evaluate(trained.model, recbole_config, folder, trained.tokens, candidate_seeds, tail_over)
            metrics |= ours
    return Outcome(recommender.write_metrics(out, metrics, users), trained.model, recbole_config, out)


# --- settings -----------------------------------------------------------------------------------------------
def _merged(layers: Sequence[Settings]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for layer in layers:
        merged.update(read_settings(layer) if isinstance(layer, Path) else layer)
    return merged


def read_settings(path: Path) -> dict[str, Any]:
    """Read a RecBole YAML as plain data, or raise `ConfigError`."""
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", "a RecBole YAML", "check the path and the file") from None
    if loaded is not None and not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds a {type(loaded).__name__}", "`key: value` lines", "correct the file")
    return {str(key): value for key, value in (loaded or {}).items()}


def _check(settings: Mapping[str, Any], folder: Dataset | None) -> None:
    model = settings.get("model")
    if model not in schema.SEQUENTIAL:
        known = schema.RECOMMENDERS
        raise ConfigError(
            "no model is named" if not model else f"model {model!r}{did_you_mean(str(model), known)}",
            f"one of {', '.join(known)}",
            f"give --model; for {', '.join(schema.SEQUENTIAL)}, a `model:` line in the YAML works too",
        )
    plugin.read_flag(settings)
    windows.read_positions(settings, has_folder=folder is not None)
    softmax.read_samples(settings)
    precision.read_precision(settings)
    compat.refuse_pickles(settings)
    if folder is None and settings.get("dataset") is None:
        raise ConfigError(
            "neither --data nor a dataset in the YAML is given",
            "a dataset folder (--data), or a YAML with `data_path:` and `dataset:` of RecBole's atomic files",
            "give --data, or add these lines to the YAML",
        )
    eval_args = _eval_args(settings)
    if folder is not None and not eval_args.items() <= ({"mode": eval_args.get("mode")} | _SPLIT).items():
        raise ConfigError(
            f"eval_args is {eval_args} together with a dataset folder",
            f"{_SPLIT} and any mode: the folder fixes the validation and test items",
            "keep `mode` only, or run without --data on a RecBole dataset",
        )


def _refuse_own_table(settings: Mapping[str, Any], out: Path) -> None:
    start = plugin.read_flag(settings)
    if start is not None and start.alignment is not None and start.alignment.run.resolve() == out.resolve():
        raise ConfigError(
            f"--align-with and --out are both {out}: the run would empty this folder before it reads the item"
            " table in it",
            "two folders",
            "choose another --out",
        )


def _eval_args(settings: Mapping[str, Any]) -> dict[str, Any]:
    eval_args = settings.get("eval_args") or {}
    if not isinstance(eval_args, Mapping):
        expected = "a mapping with split, order, group_by, mode"
        raise ConfigError(f"eval_args: {eval_args!r}", expected, "correct the YAML")
    return dict(eval_args)


def ignored_settings(settings: Mapping[str, Any]) -> list[str]:
    """Return the keys that have no effect with a dataset folder, which is already filtered and split."""
    return [key for key, value in _DATA_SETTINGS.items() if key in settings and settings[key] != value]


def recbole_config_of(
    layers: Sequence[Settings], settings: Mapping[str, Any], folder: Dataset | None, out: Path, device: str
) -> Any:
    """Return RecBole's Config of settings; `settings` are the layers merged. Call it inside `compat.cured`."""
    from recbole.config import Config

    forced: dict[str, Any] = {"checkpoint_dir": str(out), "show_progress": False, **_NO_PICKLES}
    if folder is not None:
        forced |= _DATA_SETTINGS | {"eval_args": _SPLIT | {"mode": _eval_args(settings).get("mode", "full")}}
    if needs_no_negatives(settings):
        forced["train_neg_sample_args"] = None
    if "gpu_id" not in settings and "CUDA_VISIBLE_DEVICES" in os.environ:
        forced["gpu_id"] = os.environ["CUDA_VISIBLE_DEVICES"]  # RecBole would take the machine's first GPU
    # RecBole gets everything in files, because it passes strings of its `config_dict` to eval().
    # JSON is YAML with all strings quoted, so RecBole cannot take a path for a number.
    with tempfile.TemporaryDirectory() as temporary:
        files = []
        for number, layer in enumerate([*layers, forced]):
            if isinstance(layer, Path):
                if not read_settings(layer):
                    continue  # RecBole cannot read a YAML without keys
                files.append(str(layer))
            else:
                file = Path(temporary) / f"{number}.yaml"
                file.write_text(json.dumps(dict(layer), default=str), encoding="utf-8")
                files.append(str(file))
        with _refusals("the settings"):
            config = Config(config_file_list=files)
    if device != "auto":
        config["device"] = recommender.usable_device(device)
    return config


def needs_no_negatives(settings: Mapping[str, Any]) -> bool:
    """Return whether a run adds `train_neg_sample_args: null`, which RecBole needs for cross-entropy."""
    compat.require_recbole()
    import recbole

    path = Path(recbole.__file__).parent / "properties" / "model" / f"{settings.get('model')}.yaml"
    return path.is_file() and compat.without_negative_sampling(settings, read_settings(path))


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Turn RecBole's various errors about its input into a `ConfigError`."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, NotImplementedError, AssertionError) as error:
        raise ConfigError(
            f"RecBole refuses {what}: {error}", "what RecBole 1.2.1 documents", "correct the YAML"
        ) from error


# --- training -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Trained:
    model: Any
    tokens: list[str]
    training_log: TrainingLog
    recbole: dict[str, float]
    users: int
    items: int


def _train(config: Any, folder: Dataset | None, out: Path, watcher: Watcher) -> _Trained:
    """Do what `run_recbole` does, in the same order: the random numbers drawn are the same."""
    from recbole.data import data_preparation
    from recbole.data.transform import construct_transform
    from recbole.utils import get_model, get_trainer, init_seed

    init_seed(config["seed"], config["reproducibility"])
    dataset = _dataset(config, folder)
    longest = max(config["topk"])
    if longest > dataset.item_num:  # with the padding
        raise DataError(
            f"the dataset has {dataset.item_num - 1} items, and RecBole's metrics look at the first {longest}",
            f"at least {longest - 1} items, or shorter lists",
            "name a --config with, for instance, `topk: [5]` and `valid_metric: NDCG@5`",
        )
    if folder is not None and windows.is_set(config.final_config_dict):
        lengths = np.array([len(sequence) for sequence in folder.train_sequences()])
        longest, size = config["MAX_ITEM_LIST_LENGTH"], config["train_batch_size"]
        config["train_batch_size"] = windows.rows_in_batch(lengths, longest, size)
    if folder is not None:  # RecBole holds a batch's scores of all items, and an array as large for its hits
        config["eval_batch_size"] = min(config["eval_batch_size"], max(1, _MAX_EVAL_SCORES // dataset.item_num))
    with _refusals("the data"):
        train_data, valid_data, test_data = data_preparation(config, dataset)
    init_seed(config["seed"] + config["local_rank"], config["reproducibility"])
    with _refusals("the model's settings"):
        model = get_model(config["model"])(config, train_data._dataset).to(config["device"])
    _set_loss(model, config, train_data)
    # run_recbole counts FLOPs here, and for BERT4Rec that draws the random mask of one row
    construct_transform(config)(dataset, dataset[torch.tensor([1])])
    training_log = TrainingLog()
    trainer = _watched(get_trainer(config["MODEL_TYPE"], config["model"]))(config, model, out, training_log, watcher)
    trainer.items = hash_of(plugin.item_tokens(dataset))
    watcher.begin(trainer.epochs, len(train_data), config["valid_metric"])
    begin = time.perf_counter()
    with precision.multiplying(precision.read_precision(config.final_config_dict)):
        trainer.fit(train_data, valid_data, show_progress=False)
    training_log.seconds = time.perf_counter() - begin
    model.load_state_dict(recommender.load_weights(out / CHECKPOINT_FILE, config["device"]))
    figures = trainer.evaluate(test_data, load_best_model=False) or {}
    model.eval()
    return _Trained(
        model,
        plugin.item_tokens(dataset),
        training_log,
        {name: float(value) for name, value in figures.items()},
        dataset.user_num - 1,
        dataset.item_num - 1,
    )


def _set_loss(model: Any, config: Any, train_data: Any) -> None:
    """Give the model the loss that the settings ask for, unless it is RecBole's own."""
    settings = config.final_config_dict
    everywhere, samples = windows.is_set(settings), softmax.read_samples(settings)
    if not everywhere and samples is None:
        return
    loss: softmax.Loss = softmax.full_softmax
    if samples is not None:
        targets = train_data._dataset.inter_feat[windows.TARGETS if everywhere else model.POS_ITEM_ID]
        frequency = torch.bincount(targets.flatten(), minlength=model.n_items)
        frequency[0] = 0  # the padding
        loss = softmax.SampledSoftmax(frequency, samples)
    softmax.learn(model, windows.states_and_targets if everywhere else softmax.last_states, loss)


def _dataset(config: Any, folder: Dataset | None) -> Any:
    from vlm2rec.downstream.recbole.dataset import FolderDataset

    if folder is not None:
        return FolderDataset(config, folder)
    from recbole.data.dataset import SequentialDataset  # not create_dataset, which unpickles a stored one

    path = Path(config["data_path"])
    if not path.is_dir():  # RecBole would ask on the terminal whether to download it
        raise DataError(
            f"there is no folder {path}",
            f"RecBole's atomic files, at least {config['dataset']}.inter",
            "correct `data_path` and `dataset` in the YAML",
        )
    with _refusals("the data"):
        return SequentialDataset(config)


def _watched(trainer: Any) -> Any:
    """Return a subclass of RecBole's trainer that reports its progress and keeps one checkpoint file."""

    class Watched(trainer):
        def __init__(self, config: Any, model: Any, out: Path, training_log: TrainingLog, watcher: Watcher) -> None:
            super().__init__(config, model)
            # RecBole names checkpoints by model and second: two runs could overwrite each other
            self.saved_model_file = str(out / CHECKPOINT_FILE)
            self.training_log, self.watcher = training_log, watcher
            self.items = ""  # the hash of the item ids
            self.batches = 0
            self.began = 0.0

        def _train_epoch(self, train_data: Any, epoch_idx: int, *args: Any, **kwargs: Any) -> Any:
            self.batches, self.began = 0, time.perf_counter()
            kwargs["loss_func"] = self._counted_loss
            try:
                loss = super()._train_epoch(train_data, epoch_idx, *args, **kwargs)
            except ValueError as error:
                if "loss is nan" not in str(error):
                    raise
                raise recommender.loss_is_not_a_number(epoch_idx + 1) from None
            total, aligned = (sum(loss), loss[-1]) if isinstance(loss, tuple) else (loss, None)
            batches, seconds = max(1, self.batches), time.perf_counter() - self.began
            aligned = None if aligned is None else aligned / batches
            self.training_log.epochs.append(Epoch(epoch_idx + 1, total / batches, seconds, None, aligned))
            if (epoch_idx + 1) % self.eval_step:
                self.watcher.epoch(self.training_log.epochs[-1])
            return loss

        def _counted_loss(self, interaction: Any) -> Any:
            self.batches += 1
            self.watcher.batch()
            return self.model.calculate_loss(interaction)

        def _valid_epoch(self, *args: Any, **kwargs: Any) -> Any:
            score, result = super()._valid_epoch(*args, **kwargs)
            last = self.training_log.epochs[-1]
            seconds = time.perf_counter() - self.began
            self.training_log.epochs[-1] = replace(last, seconds=seconds, score=float(score))
            self.watcher.epoch(self.training_log.epochs[-1])
            return score, result

        def _save_checkpoint(self, epoch: int, *args: Any, **kwargs: Any) -> None:
            about = {"written_by": WRITER, "model": self.config["model"], "epoch": epoch + 1, ITEMS: self.items}
            recommender.save_weights(self.model, Path(self.saved_model_file), about)
            self.training_log.best_epoch = epoch + 1

    return Watched


def _describe(trained: _Trained, config: Any, settings: Mapping[str, Any], folder: Dataset | None) -> dict[str, Any]:
    start = plugin.read_flag(settings)
    return {
        "task": 2,
        "dataset": config["dataset"] if folder is None else folder.name,
        "model": config["model"],
        "positions": "all" if windows.is_set(config.final_config_dict) else "last",
        **_sampling(settings),
        **_precision(settings),
        "start": "id" if start is None else start.column,
        "mode": None if start is None else start.mode,
        "fuse": start.fuse if start is not None and start.mode == "fuse" else None,
        "adapter": None if start is None else start.adapter,
        "pca": None if start is None or start.pca is None else _reduction(trained.model, start.pca),
        "embeddings": None if start is None else str(start.folder),
        **({} if start is None or start.alignment is None else {"alignment": _alignment(start.alignment)}),
        "users": trained.users,
        "items": trained.items,
        "missing": getattr(trained.model, "items_without_vector", 0),
        "seed": config["seed"],
        "seeds": [],
        "candidates": None,
        "candidates_std": None,
        "full": None,
        "tail": None,
        "cold": None,
        "retrieval": None,
        "popularity": None,
        "recbole": trained.recbole,
        "parameters": sum(p.numel() for p in trained.model.parameters() if p.requires_grad),
        **trained.training_log.as_metrics(config["valid_metric"]),
    }


def _sampling(settings: Mapping[str, Any]) -> dict[str, Any]:
    samples = softmax.read_samples(settings)
    return {} if samples is None else {"softmax": "sampled", "samples": samples}


def _precision(settings: Mapping[str, Any]) -> dict[str, Any]:
    chosen = precision.read_precision(settings)
    return {} if chosen == "highest" else {"matmul_precision": chosen}


def _alignment(alignment: Alignment) -> dict[str, Any]:
    return {"with": str(alignment.run), "weight": alignment.weight, "tau": alignment.tau}


def _reduction(model: Any, components: int) -> dict[str, Any]:
    return {"components": components, "explained": round(model.pca_explained, 6)}


# --- our protocol -------------------------------------------------------------------------------------------
def evaluate(
    model: Any,
    config: Any,
    folder: Dataset,
    tokens: list[str],
    seeds: Sequence[int] = (),
    tail_over: TailOver = "train",
) -> tuple[dict[str, Any], list[pa.Table]]:
    """Rank each user's test item against the stored candidates of `seeds` and against the whole catalogue.

    A user is encoded and scored once for all rankings. The same code also ranks by popularity (how often an item occurs
    in the training sequences).

    Args:
        model: a trained RecBole model with `full_sort_predict`.
        config: its RecBole Config.
        folder: dataset folder.
        tokens: ids of RecBole's items 1, 2, ...
        seeds: candidate seeds; empty takes all stored ones.
        tail_over: which interactions decide what the long tail is.

    Returns:
        (keys of metrics.json, tables for users.parquet).
    """
    from vlm2rec.downstream.recbole.dataset import recbole_ids

    numbers = recbole_ids(tokens, folder.item_ids)
    return rank_scorer(folder, seeds, user_scores(model, config, folder, numbers), tail_over)


def user_scores(
    model: Any, config: Any, folder: Dataset, numbers: np.ndarray, max_scores: int = _MAX_SCORES
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield (users, scores (users, I) float32) block by block; column i is row i of `items.parquet`.

    Args:
        model: a trained RecBole model, in eval mode.
        config: its RecBole Config.
        folder: dataset folder; a history is a user's training and validation items, cut to RecBole's length.
        numbers: RecBole's number of each item, (I,).
        max_scores: scores held in memory at a time.
    """
    longest = int(config["MAX_ITEM_LIST_LENGTH"])
    seen = [known[-longest:] for known in folder.known_sequences("test")]
    columns = torch.from_numpy(numbers).to(config["device"])
    at_once = max(1, max_scores // len(numbers))
    for start in range(0, len(seen), at_once):
        part = slice(start, min(start + at_once, len(seen)))
        scores = history_scores(model, config, [numbers[rows] for rows in seen[part]])
        yield part, scores[:, columns].float().cpu().numpy()


def history_scores(model: Any, config: Any, histories: Sequence[np.ndarray]) -> torch.Tensor:
    """Return the scores of all of RecBole's items after some histories, (n, rows of the table), on the model's device.

    Args:
        model: a trained RecBole model, in eval mode.
        config: its RecBole Config.
        histories: RecBole's numbers of n histories, oldest first, none empty; cut to the length that the model reads.
    """
    from recbole.data.interaction import Interaction

    lists, lengths = _padded(histories, int(config["MAX_ITEM_LIST_LENGTH"]))
    rows = Interaction(
        {
            config["ITEM_ID_FIELD"] + config["LIST_SUFFIX"]: torch.from_numpy(lists),
            config["ITEM_LIST_LENGTH_FIELD"]: torch.from_numpy(lengths),
        }
    )
    with torch.no_grad():
        scores: torch.Tensor = model.full_sort_predict(rows.to(config["device"])).view(len(histories), -1)
    return scores


def _padded(histories: Sequence[np.ndarray], longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Return histories in RecBole's form, (U, longest) right-padded with 0, and their lengths (U,)."""
    lists = np.zeros((len(histories), longest), np.int64)
    lengths = np.empty(len(histories), np.int64)
    for user, history in enumerate(histories):
        recent = history[-longest:]
        lists[user, : len(recent)] = recent
        lengths[user] = len(recent)
    return lists, lengths
