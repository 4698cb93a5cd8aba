"""Peak memory and time of `vlm2rec prepare` on generated interactions.

    python tests/benchmarks/prepare_memory.py [--rows 10000000] [--format parquet|csv]

Runs the command twice, on `rows` / 10 and on `rows`, each in a process of its own, and prints one line per run and the
ratio. All items share sixteen picture files through image_path: it is the rows that are measured, not the file system.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl


def generate(folder: Path, rows: int, suffix: str) -> None:
    """Write a catalogue with rows / 20 users and rows / 100 items; popularity falls off like 1 / rank."""
    random = np.random.default_rng(0)
    users, items = rows // 20, rows // 100
    (folder / "images").mkdir(parents=True)
    for number in range(16):
        (folder / "images" / f"{number}.jpg").write_bytes(b"\xff")
    numbers = pl.Series("number", np.arange(items))
    catalogue = pl.DataFrame(
        {
            "item_id": pl.select(pl.format("B{}", numbers.cast(pl.String).str.zfill(9))).to_series(),
            "title": pl.select(pl.format("product number {}", numbers)).to_series(),
            "image_path": pl.select(pl.format("{}.jpg", numbers % 16)).to_series(),
        }
    )
    catalogue.write_parquet(folder / "items.parquet")
    rank = np.minimum((items + 1) ** random.random(rows), items).astype(np.int64) - 1
    interactions = pl.DataFrame(
        {
            # ids as long as Amazon's: more than the twelve bytes that Polars keeps in place
            "user_id": pl.select(
                pl.format("A{}", pl.Series(random.integers(0, users, rows)).cast(pl.String).str.zfill(13))
            ).to_series(),
            "item_id": catalogue["item_id"].gather(rank),
            "timestamp": random.integers(1_300_000_000, 1_400_000_000, rows),
        }
    )
    if suffix == "csv":
        interactions.write_csv(folder / "interactions.csv")
    else:
        interactions.write_parquet(folder / "interactions.parquet")


def measure(folder: Path, suffix: str) -> tuple[float, float]:
    """Run prepare with five candidate seeds; return (seconds, peak resident GB)."""
    command = [
        *(sys.executable, "-c", "from vlm2rec.pipelines.cli import main; main()", "prepare"),
        *("--items", str(folder / "items.parquet"), "--interactions", str(folder / f"interactions.{suffix}")),
        *("--images", str(folder / "images"), "--out", str(folder / "data")),
    ]
    start = time.perf_counter()
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"prepare failed with exit code {child.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    """Generate, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--format", choices=("parquet", "csv"), default="parquet")
    options = parser.parse_args()
    results = []
    for rows in (options.rows // 10, options.rows):
        with tempfile.TemporaryDirectory(prefix="prepare-memory-") as folder:
            # in a process of its own too: the child's peak would otherwise start from ours
            make = f"import prepare_memory as m; m.generate(m.Path({folder!r}), {rows}, {options.format!r})"
            subprocess.run([sys.executable, "-c", make], check=True, cwd=Path(__file__).parent)
            seconds, gigabytes = measure(Path(folder), options.format)
            results.append((seconds, gigabytes))
            print(f"{rows:>12,} interactions ({options.format}): {seconds:6.1f} s, peak {gigabytes:.2f} GB", flush=True)
    (few_seconds, few), (seconds, many) = results
    print(f"ten times the rows: {seconds / few_seconds:.1f} × the time, {many / few:.1f} × the memory")


if __name__ == "__main__":
    main()
