"""SIGKILL an export 200 times: what is left after the last rerun is what one undisturbed run leaves.

python tests/benchmarks/kill_storm.py [--data DATA --backbone BB] [--kills 200] [--seed 0]

Each run of the export has one to four workers (`--worker i --num-workers n`), one of which is killed at a random
moment, again and again until all are dead or done; then the next run goes on in the same folder with another number.
An export that completes makes room for another one, in a new folder, until there were as many kills as asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from drawn_world import draw_world

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.export.verify import verify
from vlm2rec.pipelines import export_items
from vlm2rec.pipelines.config import ExportConfig


def start(config: ExportConfig, log: Path) -> int:
    """Start an export in a process of its own, whose libraries are loaded already; returns its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 2)
        export_items.run(config)
        status = 0
    finally:
        os._exit(status)


def storm(config: ExportConfig, workers: int, chance: random.Random, longest: float, left: int, log: Path) -> int:
    """Run an export with some workers, kill them one after the other, and return how many were killed."""
    if workers == 1:
        alive = {start(config, log)}
    else:
        shares = [dataclasses.replace(config, num_workers=workers, worker=worker) for worker in range(workers)]
        alive = {start(share, log) for share in shares}
    killed = 0
    while alive:
        until = time.monotonic() + chance.uniform(0.0, longest)
        while alive and time.monotonic() < until:
            for process in list(alive):
                if os.waitpid(process, os.WNOHANG)[0]:
                    alive.discard(process)
            time.sleep(0.01)
        if alive and killed < left:
            process = chance.choice(sorted(alive))
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            alive.discard(process)
            killed += 1
    return killed


def rows_of(folder: Path) -> pa.Table:
    """Return all rows of an embeddings folder, by id."""
    tables = [pq.read_table(path) for path in sorted(folder.glob("part-*.parquet"))]
    return pa.concat_tables(tables).sort_by(schema.ITEM_ID)


def main() -> None:
    """Kill, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--backbone")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-size", type=int, default=64)
    chosen = parser.parse_args()
    chance = random.Random(chosen.seed)
    kills = runs = folders = lost = doubled = different = left_over = problems = 0
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        if chosen.data is None or chosen.backbone is None:
            chosen.data, chosen.backbone = draw_world(root, 1000)
        ids = Dataset(chosen.data).item_ids
        config = ExportConfig(
            data=chosen.data,
            backbone=chosen.backbone,
            out=root / "whole",
            shard_size=chosen.shard_size,
            dtype="float32",
            device="cpu",
            vision_cache=str(root / "vision-cache"),
            max_failures=1.0,
        )
        export_items.run(config)
        begun = time.monotonic()
        export_items.run(dataclasses.replace(config, out=root / "again"))  # the vision cache is warm from here on
        longest = 0.2 * (time.monotonic() - begun)
        whole = rows_of(root / "whole")
        while kills < chosen.kills:
            folders += 1
            folder = dataclasses.replace(config, out=root / f"storm-{folders}")
            while not (folder.out / schema.MANIFEST_FILE).exists():
                runs += 1
                kills += storm(folder, chance.randint(1, 4), chance, longest, chosen.kills - kills, root / "log")
                print(f"{kills} kills, {runs} runs, {folders} folders", end="\r", file=sys.stderr)
            os.waitpid(start(folder, root / "log"), 0)  # the last rerun, as one may have died right after the manifest
            found = rows_of(folder.out)
            count = Counter(found[schema.ITEM_ID].to_pylist())
            lost += len(set(ids) - set(count))
            doubled += sum(number - 1 for number in count.values())
            different += 0 if found.equals(whole) else 1
            problems += len(verify(folder.out))
            left_over += sum(path.suffix in (".tmp", ".lock") for path in folder.out.iterdir())
        unexpected = [line for line in (root / "log").read_text().splitlines() if "Error" in line]
    print(
        f"{len(ids):,} items in shards of {chosen.shard_size}; {kills} kills, {runs} runs, {folders} finished folders"
    )
    print(f"rows lost {lost}, rows doubled {doubled}, folders that differ from an undisturbed run {different}")
    print(f"problems that verify finds {problems}, temporary files and locks left {left_over}")
    if unexpected:
        print(f"errors in the log: {len(unexpected)}, the first: {unexpected[0]}")
    if lost or doubled or different or problems or left_over or unexpected:
        raise SystemExit(1)


if __name__ == "__main__":
    assert ItemEncoder  # its libraries are loaded here, once, and not after each fork
    main()
