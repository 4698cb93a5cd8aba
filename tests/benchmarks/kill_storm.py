"""SIGKILL exports hundreds of times: what the last rerun leaves is what one undisturbed run leaves.

python tests/benchmarks/kill_storm.py [--data DATA --backbone BB] [--kills 300] [--seed 0] [--kinds plain extend ...]
    [--places disk store] [--keep FOLDER]

The storm goes from folder to folder. Each has a *kind*: `plain`; `extend`, where items are appended to a finished
folder; `retry`, where titles of one have changed; `changed`, a new folder that takes over what is the same
(`--changed-since`); `ray`, where Ray makes the shards; `containers`, where every worker is process 1 of its own
namespace (for root). It lies on a disk or in an object store (a server of moto). Each run there has one to four workers
(`--worker i --num-workers n`), which are killed at random moments until all are dead or done; the next run has another
number. Meanwhile the times of the lock files jump by years, back and forth, as if clocks differed.

One line is printed for each folder. With `--keep`, a storm that is stopped goes on there with the same command.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from drawn_world import draw_world

sys.path.insert(0, str(Path(__file__).parents[1]))

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.storage import Location, StorePath, readable
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.export import lock
from vlm2rec.embedder.export.verify import verify
from vlm2rec.pipelines import console, export_items
from vlm2rec.pipelines.config import ExportConfig

KINDS = ("plain", "extend", "retry", "changed", "ray", "containers")
PLACES = ("disk", "store")
_NEW_PIDS = 0x20000000  # CLONE_NEWPID
_REFUSALS = (
    "is being written by process",
    "has taken",
    "is no longer what this export began",
)  # of a worker that meets
COUNTED = ("lost", "doubled", "mixed", "different", "problems", "orphaned", "unexpected")


def start(config: ExportConfig, log: Path, alone: bool = False) -> int:
    """Start an export in a process of its own, whose libraries are loaded already; returns its id.

    With `alone`, it is process 1 of a new namespace, below the process that is returned.
    """
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        if alone:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            ctypes.CDLL(None).unshare(_NEW_PIDS)
            if inner := os.fork():
                _, found = os.waitpid(inner, 0)
                status = os.waitstatus_to_exitcode(found)
                return 0  # unreachable: `finally` ends the process
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # dies with the process that is killed
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        # a client of a store does not survive the fork
        out = StorePath(str(config.out)) if isinstance(config.out, StorePath) else config.out
        export_items.run(dataclasses.replace(config, out=out))
        status = 0
    except Exception as error:
        os.write(2, f"{type(error).__name__}: {error}\n".replace("\n", " ").encode() + b"\n")
    finally:
        os._exit(status)


def skew(folder: Location, chance: random.Random) -> None:
    """Date the locks of a folder years before or after now, as a machine with another clock would."""
    if isinstance(folder, Path):
        for path in folder.glob("*export*.lock"):
            moment = time.time() + chance.choice((-1, 1)) * chance.uniform(0, 10**8)
            with contextlib.suppress(OSError):
                os.utime(path, (moment, moment))


def storm(config: ExportConfig, chance: random.Random, longest: float, left: int, log: Path, alone: bool) -> int:
    """Run an export with some workers, kill them one after the other, and return how many were killed."""
    workers = 1 if config.engine == "ray" else chance.randint(1, 4)
    shares = [dataclasses.replace(config, num_workers=workers, worker=worker) for worker in range(workers)]
    alive = {start(share, log, alone) for share in (shares if workers > 1 else [config])}
    killed = 0
    while alive:
        until = time.monotonic() + chance.uniform(0.0, longest)
        while alive and time.monotonic() < until:
            for process in list(alive):
                if os.waitpid(process, os.WNOHANG)[0]:
                    alive.discard(process)
            skew(config.out, chance)
            time.sleep(0.01)
        if alive and killed < left:
            process = chance.choice(sorted(alive))
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            alive.discard(process)
            killed += 1
    return killed


def rows_of(folder: Location) -> pa.Table:
    """Return all rows of an embeddings folder, by id."""
    tables = []
    for path in sorted(path for path in folder.iterdir() if path.name.endswith(".parquet")):
        with readable(path) as source:
            tables.append(pq.read_table(source))
    return pa.concat_tables(tables).sort_by(schema.ITEM_ID)


def copied(folder: Path, to: Location) -> None:
    """Copy a finished embeddings folder, into a store too."""
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())


def earlier_items(data: Path, to: Path, items: int) -> Path:
    """Write the dataset as it was before: fewer items, or other titles, the same images."""
    shutil.copytree(data, to, ignore=shutil.ignore_patterns("vision-cache"))
    meta = json.loads((data / "dataset.json").read_text())
    meta["image_root"] = str(Dataset(data).image_root)
    (to / "dataset.json").write_text(json.dumps(meta))
    table = pq.read_table(data / "items.parquet").slice(0, items)
    titles = [title if row % 7 else f"{title}, as it was" for row, title in enumerate(table["title"].to_pylist())]
    if items == pq.read_metadata(data / "items.parquet").num_rows:
        place = table.column_names.index("title")
        table = table.set_column(place, "title", pa.array(titles, table.schema.field("title").type))
    pq.write_table(table, to / "items.parquet")
    return to


@contextlib.contextmanager
def world(keep: Path | None) -> Iterator[Path]:
    """Yield the folder of the storm."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def prepared(root: Path, config: ExportConfig) -> dict[str, Path]:
    """Make, once, the datasets and the undisturbed exports that the storm starts from and is held against."""
    data, count = Path(str(config.data)), len(Dataset(str(config.data)).item_ids)
    before = {"extend": count * 2 // 3, "retry": count, "changed": count}
    for kind, items in before.items():
        if not (root / f"data-{kind}").exists():
            earlier_items(data, root / f"data-{kind}", items)
        export_items.run(dataclasses.replace(config, data=root / f"data-{kind}", out=root / f"before-{kind}"))
    export_items.run(config)
    return {kind: root / f"before-{kind}" for kind in before}


def one_folder(
    kind: str,
    folder: Location,
    config: ExportConfig,
    before: dict[str, Path],
    chance: random.Random,
    left: int,
    log: Path,
) -> tuple[dict[str, int], int]:
    """Let the storm pass over one folder; returns what is wrong with it at the end, and the number of kills."""
    config = dataclasses.replace(config, out=folder)
    if kind == "extend":
        config = dataclasses.replace(config, extend=True)
    elif kind == "retry":
        config = dataclasses.replace(config, retry_failed=True)
    elif kind == "changed":
        config = dataclasses.replace(config, changed_since=before[kind])
    elif kind == "ray":
        config = dataclasses.replace(config, engine="ray", num_workers=2)
    if kind in ("extend", "retry"):
        copied(before[kind], folder)
    begun, kills, run = len(log.read_text()) if log.exists() else 0, 0, 0
    while run < 2 or not (folder / schema.MANIFEST_FILE).exists():
        run += 1
        # what was killed in a retry may be finished by the plain command
        plain = kind == "retry" and run > 1 and chance.random() < 0.3
        known = (folder / schema.STATE_FILE).exists()
        with_flag = dataclasses.replace(config, retry_failed=False) if plain and known else config
        longest = 10 ** chance.uniform(-1, 0.5)  # seconds until a kill: as a fast machine and a slow store want them
        kills += storm(with_flag, chance, longest, left - kills, log, kind == "containers")
    export_items.run(config)  # the last rerun, as one may have died right after the manifest
    whole, found = rows_of(Path(str(config.data)).parent / "whole"), rows_of(folder)
    ids, count = whole[schema.ITEM_ID].to_pylist(), Counter(found[schema.ITEM_ID].to_pylist())
    inputs = dict(zip(ids, whole[schema.INPUT].to_pylist(), strict=True))
    made_from = zip(found[schema.ITEM_ID].to_pylist(), found[schema.INPUT].to_pylist(), strict=True)
    lines = log.read_text()[begun:].splitlines() if log.exists() else []
    return {
        "lost": len(set(ids) - set(count)),
        "doubled": sum(number - 1 for number in count.values()),
        "mixed": sum(inputs.get(item) != made for item, made in made_from),
        "different": 0 if found.equals(whole) else 1,
        "problems": len(verify(folder)),
        "orphaned": sum(path.name.endswith((".tmp", ".lock", ".json")) for path in folder.iterdir()) - 1,
        "unexpected": sum("Error" in line and not any(text in line for text in _REFUSALS) for line in lines),
    }, kills


def main() -> None:
    """Kill, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--backbone")
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--items", type=int, default=240)
    parser.add_argument("--shard-size", type=int, default=16)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--keep", type=Path)
    chosen = parser.parse_args()
    console.log.quiet = True
    lock.BEAT, lock.SILENCE, lock.SETTLE = 0.5, 10.0, 0.2  # all processes below have these, too
    with world(chosen.keep) as root, contextlib.ExitStack() as servers:
        if chosen.data is None or chosen.backbone is None:
            if not (root / "drawn.json").exists():
                data, backbone = draw_world(root, chosen.items)
                (root / "drawn.json").write_text(json.dumps([str(data), str(backbone)]))
            chosen.data, chosen.backbone = map(str, json.loads((root / "drawn.json").read_text()))
        if not (root / "data").exists():
            (root / "data").symlink_to(Path(chosen.data).resolve())
        config = ExportConfig(
            data=root / "data",
            backbone=str(chosen.backbone),
            out=root / "whole",
            shard_size=chosen.shard_size,
            dtype="float32",
            device="cpu",
            vision_cache=str(root / "vision-cache"),
            max_failures=1.0,
        )
        before = prepared(root, config)
        if "store" in chosen.places:
            from object_store import BUCKET, s3_server

            servers.enter_context(s3_server())
        kinds = [kind for kind in chosen.kinds if kind != "containers" or os.geteuid() == 0]
        turns = [(kind, place) for kind in kinds for place in chosen.places]
        done = root / "done.jsonl"
        results: list[dict[str, Any]] = list(map(json.loads, done.read_text().splitlines())) if done.exists() else []
        while sum(result["kills"] for result in results) < chosen.kills:
            number = len(results)
            kind, place = turns[number % len(turns)]
            chance = random.Random(f"{chosen.seed} {number}")
            name = f"storm-{number}-{os.getpid()}"
            folder: Location = root / name if place == "disk" else StorePath(f"s3://{BUCKET}/{name}")
            if isinstance(folder, Path):
                folder.mkdir()
            left = min(chosen.kills - sum(result["kills"] for result in results), 12)
            wrong, kills = one_folder(kind, folder, config, before, chance, left, root / "log")
            results.append({"kind": kind, "place": place, "kills": kills, **wrong})
            with done.open("a") as file:
                file.write(json.dumps(results[-1]) + "\n")
            shown = ", ".join(f"{name} {wrong[name]}" for name in COUNTED)
            print(f"{number:>3} {kind:<10} {place:<5} {kills:>3} kills: {shown}", flush=True)
        total = {name: sum(result[name] for result in results) for name in COUNTED}
        kills = sum(result["kills"] for result in results)
    print(f"{kills} kills, {len(results)} finished folders")
    print(", ".join(f"{name} {total[name]}" for name in COUNTED))
    if any(total[name] for name in COUNTED):
        raise SystemExit(1)


if __name__ == "__main__":
    assert ItemEncoder  # its libraries are loaded here, once, and not after each fork
    main()
