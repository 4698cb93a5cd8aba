"""Trains one multimodal recommender on a dataset folder and an embeddings folder, and evaluates it by our protocol.

As for the sequential models the epoch with the best NDCG@20 on the validation items counts, ranked in the whole
catalogue. The output folder is that of every recommender (`downstream/recommender.py`).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlm2rec.downstream import recommender
from vlm2rec.downstream.evaluation import metrics
from vlm2rec.downstream.evaluation.protocol import Rankings, RankingTask, rank_scorer
from vlm2rec.downstream.multimodal.data import Interactions, read_features
from vlm2rec.downstream.multimodal.model import Model
from vlm2rec.downstream.multimodal.recipes import MODELS
from vlm2rec.downstream.multimodal.settings import Settings
from vlm2rec.downstream.options import TailOver
from vlm2rec.downstream.recommender import CHECKPOINT_FILE, WRITER, Epoch, NoWatcher, Outcome, TrainingLog, Watcher
from vlm2rec.embedder.contract import publish
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ConfigError

VALID_METRIC = "NDCG@20"
_MAX_SCORES = 2**24  # float32 scores in memory at a time: 64 MB


def run(
    settings: Settings,
    out: Path | str,
    data: Dataset,
    *,
    candidate_seeds: Sequence[int] = (),
    tail_over: TailOver = "train",
    device: str = "auto",
    watcher: Watcher | None = None,
) -> Outcome:
    """Train one recommender, write the output folder and return the outcome.

    Args:
        settings: of the run.
        out: output folder, for one run.
        data: dataset folder.
        candidate_seeds: stored candidate sets to rank against; empty takes all.
        tail_over: which interactions decide what the long tail is, those of training or all.
        device: auto (a GPU of CUDA if there is one), cpu or cuda.
        watcher: called after each batch and epoch.

    Raises:
        ConfigError: the device is not usable; the loss is not a number; `out` holds something else.
        DataError: a user has every item.
        ArtifactError: the dataset or embeddings folder is damaged, or they do not fit each other; the disk is full.
    """
    out, folder, place = Path(out), data.warm(), _device(device)
    interactions = Interactions(folder)
    features, filled = read_features(settings, folder.item_ids)
    recommender.begin(out)
    with publish.full_disk_errors(out):
        recommender.write_record(out, dataclasses.asdict(settings), data.path, settings.embeddings)
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            features = {view: vectors.to(place) for view, vectors in features.items()}
            model = MODELS[settings.model].load()(settings, interactions, features, place).to(place)
            log = _train(model, settings, interactions, folder, out, watcher or NoWatcher())
        model.load_state_dict(recommender.load_weights(out / CHECKPOINT_FILE, place))
        model.eval()
        ours, users = rank_scorer(folder, candidate_seeds, user_scores(model), tail_over)
        figures = _describe(model, settings, folder, filled, log) | ours
    return Outcome(recommender.write_metrics(out, figures, users), model, settings, out)


def user_scores(model: Model, max_scores: int = _MAX_SCORES) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield (users, scores (users, I) float32) block by block; rows and columns are those of the dataset's tables."""
    users, items = model.vectors()
    at_once = max(1, max_scores // len(items))
    for start in range(0, len(users), at_once):
        part = slice(start, min(start + at_once, len(users)))
        yield part, (users[part] @ items.T).float().cpu().numpy()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "mps":
        raise ConfigError("--device mps", "cpu or cuda: torch has no sparse products on mps", "change --device")
    return recommender.usable_device(name)


def _train(
    model: Model, settings: Settings, interactions: Interactions, folder: Dataset, out: Path, watcher: Watcher
) -> TrainingLog:
    """Train until `patience` epochs brought nothing, and keep the weights of the best epoch in the checkpoint."""
    generator = np.random.default_rng(settings.seed)
    optimiser = torch.optim.Adam(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, model.rate_decay)
    task = RankingTask(folder, "valid", None)
    every = min(settings.eval_step, settings.max_epochs)
    log, best = TrainingLog(), -math.inf
    began = time.perf_counter()
    watcher.begin(settings.max_epochs, math.ceil(len(interactions) / settings.batch_size), VALID_METRIC)
    for number in range(1, settings.max_epochs + 1):
        start = time.perf_counter()
        loss = _epoch(model, settings, interactions, optimiser, generator, watcher)
        if not math.isfinite(loss):
            raise recommender.loss_is_not_a_number(number)
        schedule.step()
        score = None
        if number % every == 0:
            score = _valid_score(model, task)
            if score > best:
                best, log.best_epoch = score, number
                about = {"written_by": WRITER, "model": settings.model, "epoch": number}
                recommender.save_weights(model, out / CHECKPOINT_FILE, about)
        log.epochs.append(Epoch(number, loss, time.perf_counter() - start, score))
        watcher.epoch(log.epochs[-1])
        if score is not None and number - log.best_epoch >= settings.patience:
            break
    log.seconds = time.perf_counter() - began
    return log


def _epoch(
    model: Model,
    settings: Settings,
    interactions: Interactions,
    optimiser: torch.optim.Optimizer,
    generator: np.random.Generator,
    watcher: Watcher,
) -> float:
    """Train one epoch; return the mean loss of its batches, NaN as soon as one is no number."""
    model.train()
    model.begin_epoch(generator)
    total, batches = 0.0, 0
    for users, positives, negatives in interactions.batches(settings.batch_size, generator):
        optimiser.zero_grad()
        loss = model.loss(users.to(model.device), positives.to(model.device), negatives.to(model.device))
        total, batches = total + loss.item(), batches + 1
        if not math.isfinite(total):
            return math.nan
        loss.backward()
        optimiser.step()
        watcher.batch()
    return total / batches


def _valid_score(model: Model, task: RankingTask) -> float:
    """Return NDCG@20 of the validation items in the whole catalogue; of several of a user, over all of them."""
    model.eval()
    rankings = Rankings(task)
    for part, scores in user_scores(model):
        rankings.add(part, scores)
    return metrics.mean_over_users(rankings.retrieval() or rankings.users(None))["N@20"]


def _describe(model: Model, settings: Settings, folder: Dataset, filled: int, log: TrainingLog) -> dict[str, Any]:
    return {
        "task": 2,
        "dataset": folder.name,
        "model": settings.model,
        "start": "+".join(settings.features),
        "mode": settings.mode,
        # what only sequential models have
        "positions": None,
        "fuse": None,
        "adapter": None,
        "pca": None,
        "embeddings": str(settings.embeddings),
        "users": model.user_count,
        "items": model.item_count,
        "missing": filled,
        "seed": settings.seed,
        "recbole": None,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        **log.as_metrics(VALID_METRIC),
    }
