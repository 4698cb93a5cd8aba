"""A training step and an evaluation of SASRec at 10⁴, 10⁵ and 10⁶ items: full softmax beside sampled, time and memory.

    OMP_NUM_THREADS=1 python tests/benchmarks/sampled_softmax.py [--sizes 10000 100000 1000000] [--dim 2048]
        [--batch 256] [--samples 4096] [--full-limit 100000] [--start adapter id]

A step is RecBole's SASRec of `train-recommender` (width 128, two layers, histories of ten items): forward, loss,
backward and AdamW, for `--batch` targets. `adapter` has frozen vectors of `--dim` numbers behind a Linear, `id` a
trained row for each item. Evaluation is the adapted table, once, and the scores of all items for 16 users. Each row of
the table is a process of its own, whose largest memory is given; the vectors take items × dim × 4 bytes of it. They are
one drawn block of a thousand rows over and over: time and memory do not depend on what they say.

The full softmax is measured up to `--full-limit` items; beyond it the line gives what it would take in proportion.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlm2rec.downstream.recbole import compat, softmax
from vlm2rec.downstream.recbole.item_embedding import ItemEmbedding
from vlm2rec.downstream.recbole.run import recbole_config_of
from vlm2rec.pipelines.config import TrainRecommenderConfig
from vlm2rec.pipelines.train_recommender import task2_settings

LENGTH, USERS, STEPS, BLOCK = 10, 16, 5, 1000


class Items:
    """What RecBole's models ask of a dataset."""

    def __init__(self, count: int) -> None:
        self.iid_field, self.item_num, self.user_num = "item_id", count + 1, 1

    def num(self, field: str) -> int:
        """Return how many values a field has."""
        return self.item_num


def model_of(items: int, dim: int, start: str, out: Path) -> Any:
    """Return an untrained SASRec."""
    from recbole.utils import get_model

    settings = task2_settings(TrainRecommenderConfig(out=out), "SASRec", LENGTH) | {"dataset": "drawn"}
    with compat.cured(out):
        config = recbole_config_of([settings], settings, None, out, "cpu")
        model = get_model("SASRec")(config, Items(items if start == "id" else 1))
    if start == "adapter":
        vectors = torch.zeros(items + 1, dim)
        drawn = torch.nn.functional.normalize(torch.randn(BLOCK, dim), dim=1)
        for place in range(1, items + 1, BLOCK):
            part = vectors[place : place + BLOCK]
            part.copy_(drawn[: len(part)])
        model.item_embedding, model.n_items = ItemEmbedding(vectors, model.hidden_size, 0.02), items + 1
    return model


def batch_of(model: Any, items: int, size: int, random: np.random.Generator) -> Any:
    """Return rows with histories and targets, popular items more often."""
    from recbole.data.interaction import Interaction

    drawn = np.minimum((items + 1) ** random.random((size, LENGTH + 1)), items).astype(np.int64)
    lengths = torch.full((size,), LENGTH)
    columns = {model.ITEM_SEQ: torch.from_numpy(drawn[:, :-1]), model.ITEM_SEQ_LEN: lengths}
    return Interaction(columns | {model.POS_ITEM_ID: torch.from_numpy(drawn[:, -1])})


def peak() -> float:
    """Return the largest memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def median_ms(work: Callable[[], Any], times: int) -> float:
    """Return the median CPU time of one call in ms."""
    taken = []
    for _ in range(times):
        begun = time.process_time()
        work()
        taken.append(1000 * (time.process_time() - begun))
    return float(np.median(taken))


def measure(items: int, dim: int, start: str, kind: str, batch: int, samples: int) -> dict[str, float]:
    """Return milliseconds of a step and of an evaluation, and the largest memory in GB."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch:
        model = model_of(items, dim, start, Path(scratch)).train()
    before = peak()
    if kind == "sampled":
        frequency = torch.bincount(
            torch.from_numpy(np.minimum((items + 1) ** random.random(1_000_000), items).astype(np.int64)),
            minlength=items + 1,
        )
        softmax.learn(model, softmax.last_states, softmax.SampledSoftmax(frequency, samples))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)

    def step() -> None:
        optimiser.zero_grad()
        model.calculate_loss(batch_of(model, items, batch, random)).backward()
        optimiser.step()

    step()
    found = {"step": median_ms(step, STEPS), "before": before, "after_steps": peak()}
    model.eval()
    with torch.no_grad():
        rows = batch_of(model, items, USERS, random)
        found["table"] = median_ms(lambda: model.item_embedding.weight, 1)
        found["users"] = median_ms(lambda: model.full_sort_predict(rows), 2)
    return found | {"peak": peak()}


def main() -> None:
    """Print a line for each size and start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--full-limit", type=int, default=100_000)
    parser.add_argument("--start", nargs="+", default=["adapter", "id"], choices=("adapter", "id"))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if asked.one:
        compat.require_recbole()
        start, kind, items = asked.one
        print(json.dumps(measure(int(items), asked.dim, start, kind, asked.batch, asked.samples)))
        return

    def of(start: str, kind: str, items: int) -> dict[str, float]:
        own = ["--dim", str(asked.dim), "--batch", str(asked.batch), "--samples", str(asked.samples)]
        command = [sys.executable, "-W", "ignore", __file__, *own, "--one", start, kind, str(items)]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            raise SystemExit(f"{start}, {kind}, {items} items stopped ({ran.returncode}):\n{ran.stderr[-2000:]}")
        return json.loads(ran.stdout.splitlines()[-1])

    print(
        f"{asked.batch} targets a step, {asked.samples} samples, vectors of {asked.dim}; CPU ms of one thread, peak GB"
    )
    print("| start | items | full: step | peak | sampled: step | peak | adapted table | scores of 16 users |")
    print("|---|---|---|---|---|---|---|---|")
    for start in asked.start:
        known: tuple[int, float] | None = None
        for items in asked.sizes:
            sampled = of(start, "sampled", items)
            if items <= asked.full_limit:
                full = of(start, "full", items)
                known = items, full["step"]
                cells = f"{full['step']:.0f} ms | {full['peak']:.1f}"
            elif known:
                cells = f"not run; in proportion {known[1] * items / known[0] / 1000:.0f} s | –"
            else:
                cells = "not run | –"
            print(
                f"| {start} | {items:,} | {cells} | {sampled['step']:.0f} ms | {sampled['peak']:.1f}"
                f" | {sampled['table'] / 1000:.1f} s | {sampled['users']:.0f} ms |",
                flush=True,
            )


if __name__ == "__main__":
    main()
