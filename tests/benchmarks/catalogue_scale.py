"""The line at 10⁵, 10⁶ and 10⁷ items: time and largest memory of every stage, and how they grow.

    python tests/benchmarks/catalogue_scale.py --out FOLDER [--sizes 2000 100000 1000000 10000000] [--dim 64]
        [--stages draw prepare export verify index recommend] [--keep] [--predict 10000000]

Every stage is a process of its own with the real command or function behind it; a stage that is done is not run again,
so the same command goes on where it was stopped, also by SIGKILL, which ends the stage, too. FOLDER/stages.jsonl has a
line for each, FOLDER/table.md the table. The folder of a size is removed when the next one is begun, unless --keep is
given. Nothing is begun without room for the largest size on the disk.

What is simulated: vectors are short (`--dim`) and come from a table of a thousand rows plus noise, at no cost, in place
of a model's; items have titles and no images (`--views text`). What is real: seven drawn interactions for each item,
`prepare` with its filters (5-core) and one candidate seed, shards with read-back and hashes, `verify`, an IVF index
with product-quantised codes trained on a sample, and ten items for each of 10,000 users by that index.

Memory is the largest resident set. What a further item takes, in microseconds of the processor and in bytes, is the
difference to the size before: seconds and half a GiB of libraries, which an empty stage takes, are in neither. The
slope is that of log(CPU seconds) over log(items), also without the empty stage. Its seconds are those of the two
smallest sizes, prolonged to none, which is why the first size is small. 1 is linear. --predict prolongs the last two
sizes to others; an index takes longer than that, as its lists become more. Export and recommend keep their shards when
they are killed: a stage that went on after that is marked with ≥, as its time is that of the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.encoders.item_encoder import EncodedItems, Picture
from vlm2rec.embedder.export.export import export

STAGES = ("draw", "prepare", "export", "verify", "index", "recommend")
GO_ON = ("export", "recommend")  # these keep their finished shards
PER_ITEM, PER_USER, USERS = 7, 20, 10_000
_BLOCK = 250_000  # items that are drawn together


class FreeEncoder:
    """Vectors of a table of a thousand, with noise that depends on the title, at no cost."""

    def __init__(self, dim: int) -> None:
        self.fingerprint: dict[str, Any] = {
            "dim": dim,
            "views": ["text"],
            "max_pixels": 50176,
            "pooling": "last",
        }
        random = np.random.default_rng(0)
        self._centres = random.normal(size=(1000, dim)).astype(np.float32)
        self._noise = random.normal(size=(9973, dim)).astype(np.float32) / 2

    def encode_items(self, titles: Sequence[str], images: Sequence[Picture]) -> EncodedItems:
        """See `ItemEncoder`."""
        numbers = np.array([int(title.rpartition(" ")[2]) for title in titles])
        text = self._centres[numbers % 1000] + self._noise[numbers % 9973]
        return EncodedItems(text, text, np.full_like(text, np.nan), np.zeros(len(titles), bool))


def draw(folder: Path, items: int) -> None:
    """Write items and interactions in blocks: seven for each item, and about twenty for each user."""
    import polars as pl
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    writers: dict[str, pq.ParquetWriter] = {}

    def write(name: str, block: pl.DataFrame) -> None:
        table = block.to_arrow()
        if name not in writers:
            writers[name] = pq.ParquetWriter(folder / f"{name}.parquet", table.schema)
        writers[name].write_table(table)

    with contextlib.ExitStack() as stack:
        for start in range(0, items, _BLOCK):
            count = min(_BLOCK, items - start)
            numbers = pl.Series("n", np.arange(start, start + count))
            ids = pl.format("B{}", pl.col("n").cast(pl.String).str.zfill(9)).alias("item_id")
            titles = pl.format("A product of some kind in a box of {}, number {}", pl.col("n") % 97, pl.col("n"))
            write("items", numbers.to_frame().select(ids, titles.alias("title")))
            chosen = np.repeat(np.arange(start, start + count), PER_ITEM)
            users = random.integers(0, max(1, items * PER_ITEM // PER_USER), len(chosen))
            times = random.integers(1_300_000_000, 1_400_000_000, len(chosen))
            drawn = pl.DataFrame({"n": chosen, "u": users, "timestamp": times})
            user = pl.format("A{}", pl.col("u").cast(pl.String).str.zfill(9)).alias("user_id")
            write("interactions", drawn.select(user, ids, "timestamp"))
        for writer in writers.values():
            stack.callback(writer.close)
    history = {"user_id": [f"user-{n}" for n in range(USERS)]}
    history["history"] = [[f"B{n:09d}" for n in random.integers(0, items, 5)] for _ in range(USERS)]
    pl.DataFrame(history).write_parquet(folder / "histories.parquet")


def arguments_of(stage: str, folder: Path) -> list[str]:
    """Return the command of a stage that is one."""
    kept, vectors = str(folder / "data"), str(folder / "embeddings")
    return {
        "prepare": [
            *("prepare", "--items", str(folder / "items.parquet"), "--out", kept, "--candidate-seeds", "0"),
            *("--interactions", str(folder / "interactions.parquet"), "--candidates", "20"),
        ],
        "verify": ["verify", vectors],
        "index": [
            *("build-index", "--embeddings", vectors, "--column", "text", "--kind", "ivf"),
            *("--out", str(folder / "index"), "--sample", "200"),
        ],
        "recommend": [
            *("recommend", "--histories", str(folder / "histories.parquet"), "--embeddings", vectors),
            *("--column", "text", "--index", str(folder / "index"), "--out", str(folder / "lists"), "--k", "10"),
        ],
    }[stage]


def run_stage(stage: str, folder: Path, items: int, dim: int) -> None:
    """Do a stage in this process."""
    if stage == "draw":
        draw(folder, items)
    elif stage == "export":
        encoder = FreeEncoder(dim)
        export(Dataset(folder / "data"), folder / "embeddings", encoder.fingerprint, lambda: encoder)
    else:
        from vlm2rec.pipelines.cli import main as command

        sys.argv = ["vlm2rec", *arguments_of(stage, folder)]
        command()


def _end_with_parent() -> None:
    """Have Linux end this process when the one that started it ends, so that no stage goes on unseen."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def measure(stage: str, folder: Path, items: int, dim: int) -> dict[str, Any]:
    """Run a stage in a process; return its wall and CPU seconds, its largest memory in MiB, and whether it went on."""
    own = ["--one", stage, "--out", str(folder), "--sizes", str(items), "--dim", str(dim)]
    begun, mark = time.perf_counter(), folder / f"{stage}.begun"
    went_on = mark.exists() and stage in GO_ON
    mark.touch()
    with (folder / f"{stage}.log").open("a" if went_on else "w") as log:
        child = subprocess.Popen([sys.executable, __file__, *own], stdout=log, stderr=log, preexec_fn=_end_with_parent)
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        said = (folder / f"{stage}.log").read_text()[-2000:]
        raise SystemExit(f"{stage} of {items:,} items stopped with exit code {child.returncode}:\n{said}")
    cpu = usage.ru_utime + usage.ru_stime
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "cpu": cpu, "mib": usage.ru_maxrss / 1024, "went_on": went_on}


def require_space(out: Path, items: int, dim: int) -> None:
    """End the script unless all files of a size fit on the disk: about 5 bytes a number and 300 an item."""
    needed, free = items * (300 + 6 * dim), shutil.disk_usage(out).free
    if needed > free:
        raise SystemExit(f"{items:,} items need about {needed / 2**30:.1f} GiB, and {out} has {free / 2**30:.1f} GiB")


def finished(out: Path) -> list[dict[str, Any]]:
    """Return the stages that are done; a line that was cut off is none."""
    found = []
    for line in (out / "stages.jsonl").read_text().splitlines() if (out / "stages.jsonl").exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def table(out: Path, sizes: Sequence[int], stages: Sequence[str], dim: int, predict: Sequence[int] = ()) -> str:
    """Return a line for each stage and size, what a further item takes, and the predicted sizes."""
    found = {(each["stage"], each["items"]): each for each in finished(out) if each["dim"] == dim}
    heads = ("stage", "items", "wall s", "CPU s", "peak MiB", "µs a further item", "bytes a further item", "slope")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for stage in stages:
        rows = [found[stage, items] for items in sizes if (stage, items) in found]
        empty = rows[0]["cpu"] - _further(rows[0], rows[1], "cpu") * rows[0]["items"] if len(rows) > 1 else 0.0
        for number, now in enumerate(rows):
            more, slope = ("", ""), ""
            if number:
                before = rows[number - 1]
                more = f"{_further(before, now, 'cpu') * 1e6:.1f}", f"{_further(before, now, 'mib') * 2**20:.0f}"
                if number > 1 and before["cpu"] > empty and now["cpu"] > empty:
                    grown = math.log((now["cpu"] - empty) / (before["cpu"] - empty))
                    slope = f"{grown / math.log(now['items'] / before['items']):.2f}"
            shown = f"{'≥ ' * now.get('went_on', False)}{now['seconds']:.0f} | {now['cpu']:.1f} | {now['mib']:.0f}"
            lines.append(f"| {stage} | {now['items']:,} | {shown} | {' | '.join(more)} | {slope} |")
        for items in predict if len(rows) > 1 else ():
            ahead = items - rows[-1]["items"]
            cpu, mib = (rows[-1][key] + ahead * max(0.0, _further(*rows[-2:], key)) for key in ("cpu", "mib"))
            lines.append(f"| {stage}, predicted | {items:,} |  | {cpu:.0f} | {mib:.0f} |  |  |  |")
    lines.append(f"\nVectors of {dim}, of a free encoder; no images.")
    return "\n".join(lines) + "\n"


def _further(before: dict[str, Any], now: dict[str, Any], key: str) -> float:
    return float((now[key] - before[key]) / (now["items"] - before["items"]))


def main() -> None:
    """Run the stages that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2000, 100_000, 1_000_000, 10_000_000])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--stages", nargs="+", default=[*STAGES], choices=STAGES)
    parser.add_argument("--keep", action="store_true", help="keep the folders of all sizes")
    parser.add_argument("--predict", type=int, nargs="+", default=[], help="sizes to compute from the last two")
    parser.add_argument("--one", choices=STAGES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        run_stage(asked.one, asked.out, asked.sizes[0], asked.dim)
        return
    sizes = sorted(asked.sizes)
    asked.out.mkdir(parents=True, exist_ok=True)
    require_space(asked.out, sizes[-1], asked.dim)
    for before, items in itertools.pairwise([0, *sizes]):
        done = {each["stage"] for each in finished(asked.out) if (each["items"], each["dim"]) == (items, asked.dim)}
        if set(asked.stages) <= done:
            continue
        if before and not asked.keep:
            shutil.rmtree(asked.out / str(before), ignore_errors=True)
        folder = asked.out / str(items)
        if done and not folder.exists():
            raise SystemExit(f"{folder} was removed after {', '.join(sorted(done))}: choose another --out, or --keep")
        folder.mkdir(exist_ok=True)
        for stage in asked.stages:
            if stage in done:
                continue
            found = measure(stage, folder, items, asked.dim)
            with (asked.out / "stages.jsonl").open("a") as lines:
                lines.write(json.dumps({"stage": stage, "items": items, "dim": asked.dim, **found}) + "\n")
            print(f"{stage} of {items:,}: {found['cpu']:.1f} s, {found['mib']:.0f} MiB", file=sys.stderr, flush=True)
    text = table(asked.out, sizes, asked.stages, asked.dim, asked.predict)
    (asked.out / "table.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
