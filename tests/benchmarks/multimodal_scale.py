"""Time and memory of VBPR, FREEDOM, LATTICE and SLMRec on a large drawn dataset. Prints one line for each.

    python tests/benchmarks/multimodal_scale.py [--users 100000] [--items 100000] [--interactions 1000000] [--dim 384]
        [--batches 20] [--models VBPR,FREEDOM] [--threads 2] [--folder FOLDER]

Users, items and their vectors are random; popularity falls off like a power of the rank. Every model runs in a process
of its own, which reads the folders, builds its graphs and trains the first `--batches` batches of an epoch (0: a whole
one); the time of the rest is in proportion. `vectors` is what an evaluation computes once, and `ranking` the scores and
ranks of all users, in proportion to the first 2,000. `peak` is the largest resident memory of the process.

With `--folder` the drawn world stays: `FOLDER/data` and `FOLDER/embeddings` are what `multimodal.py` takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import polars as pl
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from embedding_folder import write_embeddings

from vlm2rec.downstream.evaluation.protocol import Rankings, RankingTask
from vlm2rec.downstream.multimodal.data import Interactions, read_features
from vlm2rec.downstream.multimodal.recipes import MODELS
from vlm2rec.downstream.multimodal.run import user_scores
from vlm2rec.downstream.multimodal.settings import Settings
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.pipelines import prepare
from vlm2rec.pipelines.config import PrepareConfig, TrainRecommenderConfig
from vlm2rec.pipelines.read_config import read_config

RANKED = 2000  # users
_Found = TypeVar("_Found")


def draw(folder: Path, users: int, items: int, interactions: int, dim: int) -> None:
    """Write a dataset folder and an embeddings folder with both views, unless they are there."""
    if (folder / "embeddings").exists():
        return
    generator = np.random.default_rng(0)
    ids = pl.select(pl.format("i{}", pl.int_range(items))).to_series().alias("item_id")
    pl.DataFrame([ids, ids.alias("title")]).write_parquet(folder / "items.parquet")
    weight = np.arange(1, items + 1) ** -0.6
    cumulated = np.cumsum(weight) / weight.sum()
    rows = np.minimum(np.searchsorted(cumulated, generator.random(interactions)), items - 1)
    of_user = np.sort(
        np.concatenate([np.repeat(np.arange(users), 3), generator.integers(0, users, interactions - 3 * users)])
    )
    names = pl.select(pl.format("u{}", pl.Series(of_user))).to_series().alias("user_id")
    times = pl.Series("timestamp", np.arange(interactions))
    pl.DataFrame([names, ids.gather(rows), times]).write_parquet(folder / "interactions.parquet")
    inputs = {"items": folder / "items.parquet", "interactions": folder / "interactions.parquet"}
    config = PrepareConfig(**inputs, out=folder / "data", core=1, candidates=10, candidate_seeds=(0,))
    prepared = prepare.run(config)
    vectors = [generator.standard_normal((items, dim), np.float32) for _ in range(2)]
    write_embeddings(folder / "embeddings", ids.to_list(), vectors[0], text=vectors[0], image=vectors[1])
    assert len(prepared.user_ids) == users


def timed(run: Callable[[], _Found]) -> tuple[float, _Found]:
    """Return seconds on the clock, and what was returned."""
    began = time.perf_counter()
    found = run()
    return time.perf_counter() - began, found


def measure(model: str, folder: Path, batches: int, threads: int) -> dict[str, float]:
    """Train a part of an epoch, in this process."""
    torch.set_num_threads(threads)
    given = {"model": model, "data": folder / "data", "embeddings": folder / "embeddings", "out": folder / "out"}
    config = read_config(TrainRecommenderConfig, flags=given)
    known = {f.name: getattr(config, f.name) for f in dataclasses.fields(Settings)}
    settings = Settings(**known | {"features": ("text", "image")})
    dataset = Dataset(folder / "data").warm()

    def read() -> tuple[Interactions, dict[str, torch.Tensor]]:
        return Interactions(dataset), read_features(settings, dataset.item_ids)[0]

    found: dict[str, float] = {}
    found["read"], (interactions, features) = timed(read)
    place = torch.device("cpu")
    found["build"], net = timed(lambda: MODELS[model].load()(settings, interactions, features, place))
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3, weight_decay=settings.weight_decay, fused=True)
    generator = np.random.default_rng(0)
    total = math.ceil(len(interactions) / settings.batch_size)

    def start() -> Any:
        net.begin_epoch(generator)
        rows = interactions.batches(settings.batch_size, generator)
        step(next(rows))  # LATTICE builds its item graph in the first batch
        return rows

    def step(rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        optimiser.zero_grad()
        net.loss(*rows).backward()
        optimiser.step()

    found["start"], rest = timed(start)
    count = min(batches or total, total) - 1

    def train() -> None:
        for _ in range(count):
            step(next(rest))

    seconds, _ = timed(train)
    found["epoch"] = found["start"] + seconds / max(1, count) * (total - 1)
    net.eval()
    found["vectors"], _ = timed(net.vectors)
    task = RankingTask(dataset, "test", None)

    def rank() -> None:
        rankings = Rankings(task)
        for part, scores in user_scores(net):
            rankings.add(part, scores)
            if part.stop >= RANKED:
                return

    ranked = min(RANKED, len(dataset.user_ids))
    again, _ = timed(net.vectors)  # LATTICE keeps the graph that the first call builds
    found["ranking"] = max(0.0, timed(rank)[0] - again) / ranked * len(dataset.user_ids)
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return found


def main() -> None:
    """Print one line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--interactions", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # measure this model here, and print JSON
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.folder, args.batches, args.threads)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        draw(folder, args.users, args.items, args.interactions, args.dim)
        columns = ("read", "build", "start", "epoch", "vectors", "ranking")
        print(f"{'seconds':10}" + "".join(f"{name:>10}" for name in columns) + f"{'peak GiB':>10}", flush=True)
        for model in args.models.split(","):
            given = ["--one", model, "--folder", str(folder), "--batches", str(args.batches)]
            command = [sys.executable, __file__, *given, "--threads", str(args.threads)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            line = "".join(f"{found[name]:10.1f}" for name in columns)
            print(f"{model:10}{line}{found['peak']:10.2f}", flush=True)


if __name__ == "__main__":
    main()
