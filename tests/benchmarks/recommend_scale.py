"""`vlm2rec recommend` for many histories: time and memory by number of users, and a sample against a brute force.

    python tests/benchmarks/recommend_scale.py                          # 10⁴, 10⁵ and 10⁶ histories over 10⁵ items
    python tests/benchmarks/recommend_scale.py --users 10000 100000     # less

Each size runs in a process of its own, whose largest memory is measured. The slope is that of log(seconds) over
log(users), with what a run of a hundred users takes taken off: 1 is linear. Memory a user is the difference of the two
largest sizes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))

from embedding_folder import write_embeddings

from vlm2rec.downstream.table import EmbeddingTable

K, LONGEST, CHECKED = 10, 20, 200


def write_world(folder: Path, users: int, items: int, dim: int) -> None:
    """Write the items, once, and a file of histories with one row a user, 1 to 20 items each."""
    random = np.random.default_rng(users)
    if not (folder / "embeddings").exists():
        vectors = random.normal(size=(items, dim)).astype(np.float32)
        write_embeddings(folder / "embeddings", [f"item-{row}" for row in range(items)], vectors)
    ids = pa.array([f"item-{row}" for row in range(items)])
    kind = pa.schema([("user_id", pa.string()), ("history", pa.list_(pa.string()))])
    with pq.ParquetWriter(folder / f"{users}.parquet", kind) as writer:
        for start in range(0, users, 100_000):
            count = min(100_000, users - start)
            lengths = random.integers(1, LONGEST + 1, count)
            chosen = ids.take(pa.array(random.integers(0, items, int(lengths.sum()))))
            lists = pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32()), chosen)
            names = [f"user-{number:08d}" for number in range(start, start + count)]
            writer.write_table(pa.Table.from_arrays([pa.array(names), lists], schema=kind))


def measure(folder: Path, users: int) -> dict[str, float]:
    """Run the command in a process and return seconds and the largest memory in MiB."""
    code = "import sys; from vlm2rec.pipelines.cli import main; main()"
    arguments = ["recommend", "--histories", f"{folder}/{users}.parquet", "--embeddings", f"{folder}/embeddings"]
    begun = time.perf_counter()
    command = [sys.executable, "-c", code, *arguments, "--out", f"{folder}/{users}", "--k", str(K)]
    ran = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    _, errors = ran.communicate()
    assert ran.returncode == 0, errors
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "manifest": json.loads((folder / str(users) / "_manifest.json").read_text())["seconds"]}


def peak_of(folder: Path, users: int) -> dict[str, float]:
    """Measure one size in a child of its own, so that the children's largest memory is that of this one."""
    ran = subprocess.run([sys.executable, __file__, "--one", str(folder), str(users)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def differing(folder: Path, users: int) -> int:
    """Compare a sample of users with a sort of all cosines in float64; return how many differ by more than rounding."""
    table = EmbeddingTable.open(folder / "embeddings")
    unit = table.vectors.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    row_of = {item: row for row, item in enumerate(table.item_ids)}
    histories = pq.read_table(folder / f"{users}.parquet")
    chosen = np.random.default_rng(1).choice(users, min(CHECKED, users), replace=False)
    wanted = {histories["user_id"][int(u)].as_py(): histories["history"][int(u)].as_py() for u in chosen}
    filters = [("user_id", "in", list(wanted))]
    rows = pq.read_table(folder / str(users), filters=filters).to_pylist()
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["user_id"], []).append(row)
    wrong = 0
    for user, history in wanted.items():
        seen = [row_of[item] for item in history]
        vector = table.vectors[seen[-10:]].astype(np.float64).mean(axis=0)
        scores = unit @ (vector / np.linalg.norm(vector))
        free = scores.copy()
        free[seen] = -np.inf
        best = np.sort(free)[::-1][:K]
        given = [row_of[row["item_id"]] for row in found[user]]
        same = np.allclose([row["score"] for row in found[user]], best, atol=2e-6) and len(set(given)) == K
        wrong += not (same and np.allclose(free[given], best, atol=2e-6))
    return wrong


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row for each size, and the slopes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.one:
        found = measure(Path(chosen.one[0]), int(chosen.one[1]))
        found["mib"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory(prefix="recommend-scale-") as scratch:
        folder = Path(scratch)
        sizes = sorted(chosen.users)
        results: dict[int, dict[str, float]] = {}
        print(f"{chosen.items:,} items of {chosen.dim} dimensions, {K} for each user, none of the history")
        print(f"{'users':>10} {'seconds':>9} {'users/s':>9} {'MiB':>8}  differ from brute force")
        for users in [100, *sizes]:
            write_world(folder, users, chosen.items, chosen.dim)
            results[users] = peak_of(folder, users)
            wrong = differing(folder, users)
            seconds, mib = results[users]["seconds"], results[users]["mib"]
            checked = min(CHECKED, users)
            print(f"{users:>10,} {seconds:>9.1f} {users / seconds:>9.0f} {mib:>8.0f}  {wrong} of {checked}", flush=True)
        start = results[100]["seconds"]
        for less, more in itertools.pairwise(sizes):
            ratio = (results[more]["seconds"] - start) / (results[less]["seconds"] - start)
            slope = math.log(ratio) / math.log(more / less)
            memory = (results[more]["mib"] - results[less]["mib"]) * 2**20 / (more - less)
            print(f"{less:,} → {more:,}: slope {slope:.2f}, {memory:.0f} bytes a user")


if __name__ == "__main__":
    main()
