"""The line of commands on a GPU, as a user types them, with a model in the exact shape of Qwen2.5-VL-3B.

python tests/benchmarks/gpu_line.py --out FOLDER [--items 1000] [--steps 20] [--tiny] [--parts export finetune ...]

Weights are random (no download); the catalogue is drawn, its images are JPEG files of 1,000 pixels. Every figure is
that of a process that the shell could have started: its wall time with imports and the loading of the model, and the
most memory that `nvidia-smi` saw in use meanwhile, CUDA's context included. The parts are

    export     dry run; export; one killed with SIGKILL and continued; one with other rows; one in float32
    finetune   dry run; training; one killed and continued; GradCache against the whole batch
    use        export with the adapter, `verify`, `build-index`; four recommenders from the vectors; `recommend`

Vectors of two exports are compared by their bits and their least cosine, adapters by their bits and largest difference.
`--tiny` runs the same on a CPU in a small shape. A command that fails is named with its last lines; the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch
import transformers
from gpu_export import TINY, least_cosine
from middle_size import write_model
from PIL import Image
from qwen_shape import Shape
from safetensors.torch import load_file

from vlm2rec.pipelines.synthetic.drawn_catalogue import draw_catalogue

PROGRAM = (sys.executable, "-c", "import sys; from vlm2rec.pipelines.cli import main; sys.exit(main())")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PIXELS = 1000  # of an image file
ESTIMATED = ("time", "weights", "activations", "images", "memory", "at once on")  # rows of a summary that are shown


@dataclass
class Ended:
    """What a command did."""

    seconds: float
    out: str
    mib: int | None  # most GPU memory in use at any moment


class FailedError(Exception):
    """A command ended with another code than 0."""


@contextmanager
def memory_watched() -> Iterator[list[int]]:
    """Yield MiB of GPU memory in use, asked of nvidia-smi every third of a second; nothing without a GPU."""
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        ask = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")
        while not done.wait(0.3):
            seen.append(int(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[0]))

    watcher = threading.Thread(target=watch, daemon=True)
    if GPU and shutil.which("nvidia-smi"):
        watcher.start()
    try:
        yield seen
    finally:
        done.set()
        if watcher.is_alive():
            watcher.join()


def vlm2rec(*words: object, until: Callable[[], bool] | None = None) -> Ended:
    """Run a command to its end, or kill it with SIGKILL once `until` says so.

    Raises:
        FailedError: it ended with an error.
    """
    command = [*PROGRAM, *map(str, words)]
    begun = time.perf_counter()
    with memory_watched() as seen:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        while until is not None and process.poll() is None:
            if until():
                os.killpg(process.pid, signal.SIGKILL)
                break
            time.sleep(0.02)
        out, err = process.communicate()
    seconds = time.perf_counter() - begun
    if process.returncode != (-signal.SIGKILL if until is not None else 0):
        tail = "\n".join((out + err).strip().splitlines()[-12:])
        raise FailedError(f"{' '.join(map(str, words))[:300]}\nended with {process.returncode}:\n{tail}")
    return Ended(seconds, out, max(seen, default=None))


def told(ended: Ended, *names: str) -> str:
    """Return seconds and memory of a command, and some rows of its summary."""
    summary = json.loads(ended.out)["summary"]
    return f"{spent(ended)}; " + ", ".join(f"{name}: {summary[name]}" for name in names if name in summary)


def say(name: str, measure: Callable[[], str]) -> None:
    """Print a figure, or why there is none."""
    try:
        print(f"{name:<38}{measure()}", flush=True)
    except FailedError as error:
        print(f"{name:<38}FAILED: {error}", flush=True)


def spent(ended: Ended) -> str:
    """Return seconds and memory of a command."""
    return f"{ended.seconds:6.1f} s" + (f", {ended.mib / 1024:.1f} GiB at most" if ended.mib else "")


# --- what is there before -----------------------------------------------------------------------------------


def draw_data(out: Path, items: int) -> None:
    """Draw the catalogue, enlarge its pictures to files of `PIXELS`, and prepare it."""
    draw_catalogue(out / "catalogue", products=items, users=2 * items)

    def enlarge(path: Path) -> None:
        Image.open(path).resize((PIXELS, PIXELS)).save(path, quality=90)

    with ThreadPoolExecutor() as pool:
        list(pool.map(enlarge, (out / "catalogue" / "images").glob("*.jpg")))
    tables = {name: out / "catalogue" / f"{name}.parquet" for name in ("items", "interactions")}
    given = [word for name, path in tables.items() for word in (f"--{name}", path)]
    vlm2rec("prepare", *given, "--images", out / "catalogue" / "images", "--out", out / "data")


# --- comparisons --------------------------------------------------------------------------------------------


def vectors_of(folder: Path) -> pl.DataFrame:
    """Return an export's rows by item."""
    return pl.read_parquet(folder / "*.parquet").sort("item_id")


def compared(one: Path, other: Path) -> str:
    """Return how near the vectors of two exports are, over the items that both have."""
    left, right = vectors_of(one), vectors_of(other)
    if left["item_id"].n_unique() != left.height or right["item_id"].n_unique() != right.height:
        return "an item is there TWICE"
    both = left.join(right, on="item_id", suffix="_other")
    said = f"{both.height} of {left.height} items"
    for view in ("fused", "text", "image"):
        if view not in left.columns:
            continue
        a, b = (torch.tensor(both[name].to_list()) for name in (view, f"{view}_other"))
        same = float((a == b).all(dim=1).float().mean())
        said += f"; {view}: {same:.0%} to the bit, cosine at least {least_cosine(a, b):.6f}"
    return said


def adapters_compared(one: Path, other: Path) -> str:
    """Return how near the weights of two adapters are."""
    left, right = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    if left.keys() != right.keys():
        return "not the same matrices"
    same = sum(bool(torch.equal(left[name], right[name])) for name in left)
    most = max(float((left[name].float() - right[name].float()).abs().max()) for name in left)
    norm = sum(float(left[name].float().square().sum()) for name in left) ** 0.5
    off = sum(float((left[name].float() - right[name].float()).square().sum()) for name in left) ** 0.5
    return f"{same} of {len(left)} matrices to the bit, at most {most:.1e} off, norm of that {off / norm:.1e}"


def doctor() -> str:
    """Return the rows of the doctor's table that are about the GPU, and those that are not ok."""
    rows = vlm2rec("doctor").out.strip().splitlines()[1:]
    return "".join(f"\n    {row}" for row in rows if " ok " not in row or row.startswith(("device", "tiny")))


# --- parts --------------------------------------------------------------------------------------------------


def part_export(out: Path, model: tuple[object, ...], items: int) -> None:
    """Dry run, export, and whether its vectors depend on kills, on rows or on the number format."""
    common = ("export-items", *model, "--vision-cache", "off", "--shard-size", max(8, items // 8))

    def dry() -> str:
        return told(vlm2rec(*common, "--out", out / "dry", "--dry-run", "--json"), "time", "memory")

    def whole() -> str:
        return told(vlm2rec(*common, "--out", out / "embeddings", "--json"), "items")

    def killed() -> str:
        folder = out / "killed"
        vlm2rec(*common, "--out", folder, until=lambda: len(list(folder.glob("*.parquet"))) >= 2)
        there = len(list(folder.glob("*.parquet")))
        ended = vlm2rec(*common, "--out", folder)
        return f"{there} shards were there, the rest {spent(ended)}; {compared(out / 'embeddings', folder)}"

    def other_rows() -> str:
        folder = out / "rows"
        ended = vlm2rec(*common, "--out", folder, "--token-budget", 2048)
        return f"{spent(ended)}; {compared(out / 'embeddings', folder)}"

    def float32() -> str:
        folder, names = out / "float32", ",".join(vectors_of(out / "embeddings")["item_id"][:128])
        ended = vlm2rec(*common, "--out", folder, "--dtype", "float32", "--items", names)
        return f"{spent(ended)}; {compared(out / 'embeddings', folder)}"

    say("export-items --dry-run", dry)
    say(f"export-items, {items} items", whole)
    say("killed and continued", killed)
    say("with rows of 2,048 tokens", other_rows)
    say("128 items in float32", float32)


def part_finetune(out: Path, model: tuple[object, ...], steps: int) -> None:
    """Dry run, training, and whether its weights depend on a kill or on chunks."""
    common = ("finetune", *model, "--max-steps", steps, "--valid-users", 16, "--checkpoint-steps", max(1, steps // 2))
    eight = (*common, "--batch-size", 8)

    def dry() -> str:
        return told(vlm2rec(*eight, "--out", out / "dry", "--dry-run", "--json"), *ESTIMATED)

    def trained() -> str:
        return told(vlm2rec(*eight, "--out", out / "adapter", "--json"), "steps", "valid N@20")

    def killed() -> str:
        folder = out / "adapter-killed"
        half = folder / "checkpoints" / f"checkpoint-{max(1, steps // 2)}" / "checksums.json"
        vlm2rec(*eight, "--out", folder, until=half.exists)
        ended = vlm2rec(*eight, "--out", folder)
        return f"continued in {spent(ended)}; {adapters_compared(out / 'adapter', folder)}"

    def chunks() -> str:
        settings = (*common, "--lora-dropout", 0, "--max-grad-norm", 0, "--batch-size", 16)
        whole = vlm2rec(*settings, "--out", out / "whole")
        chunked = vlm2rec(*settings, "--out", out / "chunked", "--chunk-users", 4)
        found = adapters_compared(out / "whole", out / "chunked")
        return f"16 at once {spent(whole)}, 4 at a time {spent(chunked)}; {found}"

    say("finetune --dry-run", dry)
    say(f"finetune, {steps} steps of 8", trained)
    say("killed and continued", killed)
    say("GradCache", chunks)


def part_use(out: Path, model: tuple[object, ...], steps: int) -> None:
    """What comes after: an export with the adapter, its check, an index, recommenders, recommendations."""
    data, folder = ("--data", out / "data"), out / "tuned"
    say(
        "export with the adapter",
        lambda: spent(vlm2rec("export-items", *model, "--adapter", out / "adapter", "--out", folder)),
    )
    say("verify", lambda: spent(vlm2rec("verify", folder)))
    say("build-index", lambda: spent(vlm2rec("build-index", "--embeddings", folder, "--out", out / "index")))
    trained = ("train-recommender", *data, "--embeddings", folder, "--max-epochs", steps, "--device", DEVICE, "--json")

    sampled = ("--positions", "all", "--softmax", "sampled", "--samples", 64)
    for name, more in (("SASRec", ()), ("GRU4Rec", ()), ("SASRec", sampled), ("FREEDOM", ())):
        settings = ("--model", name, *more, "--out", out / f"{name}{len(more)}")
        said = " ".join(map(str, (name, *more[1::2])))
        say(said, lambda: told(vlm2rec(*trained, *settings), "epochs", "full ranking"))  # noqa: B023 - run at once
    wanted = ("--histories", out / "catalogue" / "interactions.parquet", "--out", out / "recommendations")
    of_sasrec = ("--recommender", out / "SASRec0", *data, "--device", DEVICE)
    say("recommend", lambda: spent(vlm2rec("recommend", *of_sasrec, *wanted)))


def main() -> None:
    """Draw, write the model, and run the parts that were chosen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="a small shape, as a machine without a GPU does")
    parser.add_argument("--parts", nargs="+", default=["export", "finetune", "use"])
    chosen = parser.parse_args()
    out = chosen.out.resolve()
    shape = TINY if chosen.tiny or not GPU else Shape()
    name = torch.cuda.get_device_name() if GPU else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    begun = time.perf_counter()
    draw_data(out, chosen.items)
    print(f"drawn after {time.perf_counter() - begun:.0f} s", flush=True)
    titles = pl.read_parquet(out / "catalogue" / "items.parquet")["title"].to_list()
    write_model(out / "backbone", titles, shape, dtype=torch.bfloat16, device=DEVICE)
    print(f"model written after {time.perf_counter() - begun:.0f} s", flush=True)
    if GPU:
        torch.cuda.empty_cache()
    model = ("--data", out / "data", "--backbone", out / "backbone")
    say("doctor", doctor)
    if "export" in chosen.parts:
        part_export(out, model, chosen.items)
    if "finetune" in chosen.parts:
        part_finetune(out, model, chosen.steps)
    if "use" in chosen.parts:
        part_use(out, model, chosen.steps)
    print(f"ended after {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
