"""Task 2 beside stock RecBole: evaluating, stepping, and what anomaly detection costs. Prints ratios.

    OMP_NUM_THREADS=1 python tests/benchmarks/recbole_evaluation.py [--users 400] [--items 2000] [--dim 512]

Evaluation: our candidate ranking (each user scored once over all items, then ranked against five stored candidate sets
and the whole catalogue) against RecBole's own `uni100` (one set of 100 drawn items, the sequence encoded 101 times).
Step: one training step from an embeddings folder against one from item ids. Anomaly detection: one step with what
importing RecBole's models switches on, against one without. All in CPU time of this process.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from embedding_folder import write_embeddings
from recommender_world import write_dataset

from vlm2rec.downstream.recbole import compat, plugin, run
from vlm2rec.downstream.recbole.dataset import recbole_ids
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.pipelines.config import TrainRecommenderConfig
from vlm2rec.pipelines.train_recommender import task2_settings


def world(folder: Path, users: int, items: int, dim: int) -> tuple[Dataset, Path]:
    """Draw a dataset and an embeddings folder; popularity falls off like 1 / rank."""
    random = np.random.default_rng(0)
    ids = [f"i{number}" for number in range(items)]
    weights = 1 / np.arange(1, items + 1)
    drawn = [random.choice(items, 40, replace=False, p=weights / weights.sum()) for _ in range(users)]
    data = write_dataset(
        folder / "data",
        [[ids[row] for row in rows] for rows in drawn],
        ids,
        max_history=10,
        candidates=100,
        seeds=range(5),
    )
    write_embeddings(folder / "embeddings", ids, random.normal(size=(items, dim)).astype(np.float32))
    return Dataset(data), folder / "embeddings"


@contextlib.contextmanager
def built(settings: dict[str, Any], data: Dataset, out: Path) -> Iterator[tuple[Any, Any, Any, tuple[Any, ...]]]:
    """Yield (config, model, dataset, loaders) as a run has them before it trains."""
    from recbole.data import data_preparation
    from recbole.utils import get_model

    with compat.cured(out):
        config = run.recbole_config_of([settings], settings, data, out, "cpu")
        plugin.install()
        dataset = run._dataset(config, data)
        loaders = data_preparation(config, dataset)
        yield config, get_model(config["model"])(config, loaders[0]._dataset), dataset, loaders


def cpu_seconds(work: Callable[[], Any], times: int = 1) -> float:
    """Return the CPU seconds of one call."""
    begin = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - begin) / times


def compare_evaluation(settings: dict[str, Any], data: Dataset, out: Path) -> None:
    """Print the time and the H@10 of both evaluations of one untrained model."""
    from recbole.trainer import Trainer

    sampled = settings | {"eval_args": {"mode": "uni100"}}
    with built(sampled, data, out) as (config, model, dataset, loaders):
        model.eval()
        trainer = Trainer(config, model)
        theirs: list[dict[str, float]] = []
        slow = cpu_seconds(lambda: theirs.append(trainer.evaluate(loaders[2], load_best_model=False)), 2)
        tokens = plugin.item_tokens(dataset)
        equal = same_metrics(model, config, data, tokens)
        ours: list[dict[str, Any]] = []
        fast = cpu_seconds(lambda: ours.append(run.evaluate(model, config, data, tokens)[0]), 2)
    figures = " ".join(f"{each['hit@10']:.4f}" for each in theirs)
    print(f"  evaluation: uni100 {slow:.2f} s (H@10 {figures}, drawn anew each time)")
    again = " ".join(f"{each['candidates']['H@10']:.4f}" for each in ours)
    print(f"              five stored sets + full ranking {fast:.2f} s (H@10 {again}): {slow / fast:.1f} times faster")
    print(f"              RecBole's `predict` over the first stored set gives the same H@10: {equal}")


def same_metrics(model: Any, config: Any, data: Dataset, tokens: list[str]) -> bool:
    """Tell whether scoring (user, item) pairs one by one, as `uni100` does, ranks our candidates as we do."""
    from recbole.data.interaction import Interaction

    seed = data.candidate_seeds[0]
    numbers = recbole_ids(tokens, data.item_ids)
    histories, targets = data.histories("test"), data.histories("test").targets
    hits = []
    for user, candidates in enumerate(data.negatives(seed)):
        recent = numbers[histories.of(user)][-int(config["MAX_ITEM_LIST_LENGTH"]) :]
        rows = numbers[np.append(targets[user], candidates)]
        lists = torch.zeros(len(rows), int(config["MAX_ITEM_LIST_LENGTH"]), dtype=torch.long)
        lists[:, : len(recent)] = torch.from_numpy(recent)
        pairs = Interaction(
            {
                config["ITEM_ID_FIELD"] + config["LIST_SUFFIX"]: lists,
                config["ITEM_LIST_LENGTH_FIELD"]: torch.full((len(rows),), len(recent)),
                config["ITEM_ID_FIELD"]: torch.from_numpy(rows),
            }
        )
        with torch.no_grad():
            scores = model.predict(pairs).numpy()
        hits.append(bool((scores[1:] > scores[0]).sum() < 10))
    ours = run.evaluate(model, config, data, tokens, [seed])[0]["candidates"]["H@10"]
    return abs(float(np.mean(hits)) - ours) < 1e-9


def compare_steps(settings: dict[str, Any], flag: dict[str, Any], data: Dataset, out: Path, steps: int) -> None:
    """Print the time of a training step: item ids, embeddings, and item ids under anomaly detection."""

    def step(more: dict[str, Any], detect: bool) -> float:
        with built(settings | more, data, out) as (_, model, _, loaders):
            optimiser = torch.optim.AdamW(model.parameters())
            batches = [batch for batch, _ in zip(loaders[0], range(steps), strict=False)]
            turns = iter(batches * 2)

            def one() -> None:
                optimiser.zero_grad()
                model.calculate_loss(next(turns)).backward()
                optimiser.step()

            with torch.autograd.set_detect_anomaly(detect):
                one()
                return cpu_seconds(one, len(batches))

    ids, adapter, table = step({}, False), step(flag, False), step(flag | {plugin.MODE: "table"}, False)
    detecting = step({}, True)
    print(f"  step: ids {1000 * ids:.1f} ms; adapter {adapter / ids:.2f} x; table {table / ids:.2f} x")
    print(f"        ids under RecBole's anomaly detection {detecting / ids:.2f} x")


def main() -> None:
    """Compare the three models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=400)
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    asked = parser.parse_args()
    compat.require_recbole()
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(temporary)
        data, embeddings = world(folder, asked.users, asked.items, asked.dim)
        for model in schema.SEQUENTIAL:
            print(f"{model}, {asked.users} users, {asked.items} items, vectors of {asked.dim}")
            settings = task2_settings(TrainRecommenderConfig(out=folder / model), model, data.max_history)
            compare_evaluation(settings, data, folder / model)
            compare_steps(settings, {plugin.INIT: str(embeddings)}, data, folder / model, asked.steps)


if __name__ == "__main__":
    main()
