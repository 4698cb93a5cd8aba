"""Two methods of a study against each other, in every group of users: means over seeds, and the difference.

    python tests/benchmarks/compare_methods.py STUDY --of "MiniLM (text), with ids" --against "ID" "MiniLM (text)"

A study's own table compares every method with its reference, over all users. This one takes any two, and also the users
by how often their test item occurs in training: never (it is new), and in the others. N@20 among the candidates, on the
seeds that both have. The difference has its 95 % bootstrap interval over users, each user's mean over seeds, as in a
study. Without a study, drawn users show that it works.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from vlm2rec.downstream.evaluation.statistics import compare, spread
from vlm2rec.embedder.contract import schema

METRIC = "N@20"
GROUPS = {"all": pl.lit(True), "new item": pl.col("frequency") == 0, "known item": pl.col("frequency") > 0}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, nargs="?")
    parser.add_argument("--of", default="A")
    parser.add_argument("--against", nargs="+", default=["B"])
    chosen = parser.parse_args()
    users = drawn() if chosen.study is None else pl.read_parquet(chosen.study / schema.USERS_FILE)
    known = users["method"].unique().sort().to_list()
    if absent := [name for name in (chosen.of, *chosen.against) if name not in known]:
        parser.error(f"{absent} are not among the study's methods: {known}")
    print(
        "| model | users | seeds | methods | the one | the other | difference | p over seeds |"
        + "\n"
        + "|---" * 8
        + "|"
    )
    for other in chosen.against:
        for line in lines(users, chosen.of, other):
            print(line)


def lines(users: pl.DataFrame, of: str, against: str) -> Iterator[str]:
    """Yield the rows of the table for two methods."""
    for (task, model), runs in users.group_by("task", "model", maintain_order=True):
        for group, inside in GROUPS.items():
            ours, theirs = (by_seed(runs.filter(inside & (pl.col("method") == name))) for name in (of, against))
            seeds = sorted(ours.keys() & theirs.keys())
            if not seeds or not len(ours[seeds[0]]):
                continue
            a, b = (np.stack([each[seed] for seed in seeds]) for each in (ours, theirs))
            found = compare(a, b)
            means = [spread(each.mean(axis=1)) for each in (a, b)]
            levels = " | ".join(f"{mean.mean:.3f} ± {mean.std:.3f}" for mean in means)
            interval = f"{found.users.mean:+.3f} ({found.users.low:+.3f} to {found.users.high:+.3f})"
            who = f"{model or f'Task {task}'} | {group}, {a.shape[1]} | {len(seeds)} | {of} − {against}"
            yield f"| {who} | {levels} | {interval} | {found.seeds.p:.2g} |"


def by_seed(runs: pl.DataFrame) -> dict[int, np.ndarray]:
    """Return the metric by seed, an array over the users in the order of their ids."""
    return {int(seed): each.sort(schema.USER_ID)[METRIC].to_numpy() for (seed,), each in runs.group_by("seed")}


def drawn() -> pl.DataFrame:
    """Return 200 users of two methods, A a little better."""
    random = np.random.default_rng(0)
    parts = []
    for method, level in (("A", 0.45), ("B", 0.4)):
        for seed in range(3):
            parts.append(
                pl.DataFrame(
                    {
                        "method": method,
                        "seed": seed,
                        "task": 2,
                        "model": "SASRec",
                        schema.USER_ID: [f"u{user:03}" for user in range(200)],
                        "frequency": np.arange(200) % 3,
                        METRIC: np.clip(random.normal(level, 0.1, 200), 0, 1),
                    }
                )
            )
    return pl.concat(parts)


if __name__ == "__main__":
    main()
