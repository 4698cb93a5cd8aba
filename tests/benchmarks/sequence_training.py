"""SASRec by RecBole's row for every prefix, by all positions at once, by a sampled softmax, and RecTools' SASRec.

    OMP_NUM_THREADS=1 python tests/benchmarks/sequence_training.py --data DATA --out FOLDER [--embeddings EMBEDDINGS]
        [--seeds 0,1,2,3,4] [--length 10] [--epochs 60] [--samples 256] [--rectools FOLDER]
        [--systems prefixes,all,sampled,rectools,rectools-windows]

DATA is a folder of `vlm2rec prepare`. All systems get the same sequences, width, layers, dropout, rates and histories
of `--length` items, and batches of about as many targets. The epoch with the best NDCG@20 on the validation items
counts; training ends after `--patience` epochs without gain. The test items are ranked by one protocol. With
--embeddings all start from its vectors behind a Linear, in place of item ids.

RecTools (0.19) has to be importable; --rectools names a folder of `pip install --target FOLDER rectools[torch]`, which
is searched last. Without it its rows are left out, and the table says so. Its SASRec learns from a user's last
`--length` + 1 items and never sees the others, so `rectools` gets as many more epochs as it takes to learn equally many
targets. `rectools-windows` cuts histories into sessions of that length, so that it learns every item once an epoch, as
ours do, though from fewer earlier ones: 1 to `--length`, ours from half of it on. Its layers are those of the paper's
authors, RecBole's those of BERT.

Seconds are CPU time of training, without validation. Every finished run is a line of FOLDER/runs.jsonl; the same
command goes on where it was stopped, and with more seeds adds them. FOLDER/table.md is the table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlm2rec.downstream.evaluation import metrics
from vlm2rec.downstream.evaluation.protocol import Rankings, RankingTask, rank_scorer
from vlm2rec.downstream.recbole import plugin, softmax, windows
from vlm2rec.downstream.recbole.run import run
from vlm2rec.downstream.recommender import Epoch
from vlm2rec.embedder.contract import schema, storage
from vlm2rec.embedder.contract.dataset import Dataset, Split
from vlm2rec.pipelines.config import TrainRecommenderConfig
from vlm2rec.pipelines.train_recommender import task2_settings

RUNS = "runs.jsonl"
NAMES = {
    "prefixes": "a row for every prefix (RecBole)",
    "all": "all positions at once",
    "prefixes-sampled": "a row for every prefix, sampled softmax",
    "sampled": "all positions at once, sampled softmax",
    "rectools": "RecTools, last items of a user",
    "rectools-windows": "RecTools, histories cut into sessions",
}
SHOWN = ["prefixes", "all", "sampled", "rectools", "rectools-windows"]
Found = dict[str, Any]


class Clock:
    """Follows a run, and keeps the CPU seconds of the epochs that do not validate."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.batches = 0

    def begin(self, epochs: int, batches: int, valid_metric: str) -> None:
        """See `Watcher`."""
        self.batches, self._last = batches, time.process_time()

    def batch(self) -> None:
        """See `Watcher`."""

    def epoch(self, epoch: Epoch) -> None:
        """See `Watcher`."""
        now = time.process_time()
        if epoch.score is None:
            self.seconds.append(now - self._last)
        self._last = now


def config_of(args: argparse.Namespace, seed: int) -> TrainRecommenderConfig:
    """Return the settings that all systems share."""
    return TrainRecommenderConfig(
        out=args.out, seed=seed, max_epochs=args.epochs, eval_step=args.eval_step, patience=args.patience
    )


def of_ours(args: argparse.Namespace, system: str, dataset: Dataset, seed: int) -> Found:
    """Train by RecBole or by ours; return figures and cost."""
    settings = task2_settings(config_of(args, seed), "SASRec", args.length)
    if system in ("all", "sampled"):
        settings[windows.KEY] = "all"
    if system.endswith("sampled"):
        settings |= {softmax.KEY: "sampled", softmax.SAMPLES: args.samples}
    if args.embeddings:
        settings[plugin.INIT] = str(args.embeddings)
    clock = Clock()
    found = run(settings, args.out / "work" / f"{system}-{seed}", data=dataset, device="cpu", watcher=clock).metrics
    targets = int(sum(len(each) - 1 for each in dataset.train_sequences()))
    cost = {"epoch": float(np.median(clock.seconds)), "batches": clock.batches, "targets": targets}
    return figures(found) | cost | {"best": found["best_epoch"]}


def sessions(sequences: list[np.ndarray], length: int) -> list[np.ndarray]:
    """Cut sequences into pieces of `length` + 1 items; each item but a sequence's first is the target of one piece."""
    return [each[at : at + length + 1] for each in sequences for at in range(0, len(each) - 1, length)]


def figures(found: dict[str, Any]) -> Found:
    """Return what the table shows of the ranking."""
    return {"N@10": found["candidates"]["N@10"], "H@10": found["candidates"]["H@10"], **found["retrieval"]}


def of_rectools(args: argparse.Namespace, system: str, dataset: Dataset, seed: int) -> Found:
    """Train RecTools' SASRec; return figures and cost."""
    import lightning_fabric
    import pandas as pd
    import pytorch_lightning as lightning
    from rectools import Columns
    from rectools.dataset import Dataset as Interactions
    from rectools.models import SASRecModel

    from vlm2rec.downstream.rectools import EmbeddingItemNet

    config, seconds = config_of(args, seed), []

    class Timer(lightning.Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            self.began = time.process_time()

        def on_train_epoch_end(self, *_: Any) -> None:
            seconds.append(time.process_time() - self.began)

    def trainer() -> Any:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        return lightning.Trainer(accelerator="cpu", enable_checkpointing=False, callbacks=[Timer()], **quiet)

    def interactions(sequences: list[np.ndarray]) -> Any:
        columns = {
            Columns.User: np.repeat(np.arange(len(sequences)), [len(each) for each in sequences]),
            Columns.Item: np.array(dataset.item_ids, object)[np.concatenate(sequences)],
            Columns.Datetime: pd.to_datetime(np.concatenate([np.arange(len(each)) for each in sequences]), unit="s"),
            Columns.Weight: 1.0,
        }
        return Interactions.construct(pd.DataFrame(columns))

    whole = dataset.train_sequences()
    train = sessions(whole, args.length) if system == "rectools-windows" else whole
    users, everyone = np.arange(len(whole)), slice(0, len(whole))
    learned = [min(len(each) - 1, args.length) for each in train]
    given: dict[str, Any] = {}
    if args.embeddings:
        given = {"item_net_block_types": (EmbeddingItemNet,)}
        given |= {"item_net_constructor_kwargs": {"embeddings": str(args.embeddings)}}
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    lightning_fabric.seed_everything(seed, verbose=False)
    model = SASRecModel(
        n_blocks=2,
        n_heads=2,
        n_factors=config.hidden_size,
        dropout_rate=config.dropout,
        session_max_len=args.length,
        loss="softmax",
        lr=config.learning_rate,
        batch_size=max(1, round(config.batch_size / np.mean(learned))),
        deterministic=True,
        get_trainer_func=trainer,
        recommend_torch_device="cpu",
        **given,
    )

    def scores(split: Split) -> np.ndarray:
        histories = interactions(dataset.known_sequences(split))
        found = model.recommend(users, histories, k=len(dataset.item_ids), filter_viewed=False)
        place = {item: row for row, item in enumerate(dataset.item_ids)}
        values = np.full((len(users), len(place)), -np.inf, np.float32)
        values[found[Columns.User], found[Columns.Item].map(place)] = found[Columns.Score]
        return values

    task = RankingTask(dataset, "valid", None)
    best, best_epoch, kept = -1.0, 0, np.empty(0)
    data = interactions(train)
    times = max(1, round(sum(len(each) - 1 for each in whole) / sum(learned)))  # its epochs in one of ours
    step = args.eval_step * times
    for epoch in range(step, args.epochs * times + 1, step):
        model.fit_partial(data, min_epochs=step, max_epochs=step)
        rankings = Rankings(task)
        rankings.add(everyone, scores("valid"))
        value = metrics.mean_over_users(rankings.users(None))["N@20"]
        if value > best:
            best, best_epoch, kept = value, epoch, scores("test")
        elif epoch - best_epoch >= args.patience * times:
            break
    found, _ = rank_scorer(dataset, (), iter([(everyone, kept)]))
    batches = -(-len(train) // model.data_preparator.batch_size)
    cost = {"epoch": float(np.median(seconds)), "batches": batches, "targets": int(sum(learned))}
    return figures(found) | cost | {"best": best_epoch}


def is_rectools(system: str) -> bool:
    """Tell whether a system needs RecTools."""
    return system.startswith("rectools")


def missing_rectools() -> str | None:
    """Return why RecTools cannot be used, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from rectools.models import SASRecModel  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


def finished(folder: Path) -> list[Found]:
    """Return the runs that are finished; a line that was cut off is none."""
    found = []
    for line in (folder / RUNS).read_text().splitlines() if (folder / RUNS).exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def settle(args: argparse.Namespace) -> None:
    """Write what decides the runs of a folder, or refuse to add runs of something else to it."""
    decides: dict[str, Any] = {name: getattr(args, name) for name in ("length", "epochs", "eval_step", "patience")}
    decides |= {"samples": args.samples, "sequences": storage.sha256_file(args.data / schema.SEQUENCES_FILE)}
    if args.embeddings:
        manifest = schema.read_manifest(storage.location(str(args.embeddings)))
        decides |= {"embeddings": [shard["sha256"] for shard in manifest["shards"]]}
    record = args.out / "settings.json"
    if record.exists() and json.loads(record.read_text()) != decides:
        raise SystemExit(f"{args.out} holds runs on other files or with other settings: choose another --out")
    record.write_text(json.dumps(decides))


def table(args: argparse.Namespace, missing: str | None) -> str:
    """Return the table: a line for each system."""
    runs = [each for each in finished(args.out) if each["seed"] in args.seeds]
    shown = ("N@10", "H@10", "R@20", "N@20")
    head = f"| SASRec, histories of {args.length} | seeds | {' | '.join(shown)} | epochs/min | targets/s | best epoch |"
    lines = [head, "|---" * (len(shown) + 5) + "|"]
    for system in args.systems:
        mine = [each for each in runs if each["system"] == system]
        if not mine:
            continue
        cells = []
        for name in shown:
            values = [each[name] for each in mine]
            spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.4f}{spread}")
        epoch = float(np.mean([each["epoch"] for each in mine]))
        cells += [f"{60 / epoch:.1f}", f"{mine[0]['targets'] / epoch:,.0f}"]
        cells.append(", ".join(str(each["best"]) for each in mine))
        name = f"{NAMES[system]} of {args.samples}" if system.endswith("sampled") else NAMES[system]
        lines.append(f"| {name} | {len(mine)} | {' | '.join(cells)} |")
    about = "N@10, H@10: the stored candidates; R@20, N@20: the whole catalogue; CPU seconds of training alone."
    lines += ["", about]
    if missing:
        lines.append(f"RecTools is left out: it cannot be imported ({missing}).")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make the runs that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--embeddings", type=Path)
    parser.add_argument("--seeds", type=lambda text: [int(each) for each in text.split(",")], default=[0, 1, 2, 3, 4])
    parser.add_argument("--length", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--eval-step", type=int, default=3)
    parser.add_argument("--patience", type=int, default=9)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--systems", type=lambda text: text.split(","), default=SHOWN)
    parser.add_argument("--rectools", type=Path, help="folder of packages that is searched last")
    args = parser.parse_args()
    if unknown := set(args.systems) - NAMES.keys():
        raise SystemExit(f"no system {', '.join(unknown)}: choose of {', '.join(NAMES)}")
    torch.set_num_threads(1)
    if args.rectools:
        sys.path.append(str(args.rectools))
    (args.out / "work").mkdir(parents=True, exist_ok=True)
    settle(args)
    missing = missing_rectools() if any(map(is_rectools, args.systems)) else None
    dataset = Dataset(args.data).warm()
    known = {(each["system"], each["seed"]) for each in finished(args.out)}
    for seed in args.seeds:
        for system in args.systems:
            if (system, seed) in known or (is_rectools(system) and missing):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = (of_rectools if is_rectools(system) else of_ours)(args, system, dataset, seed)
            text = (args.out / RUNS).read_text() if (args.out / RUNS).exists() else ""
            cut_off = "\n" if text and not text.endswith("\n") else ""
            with (args.out / RUNS).open("a") as lines:
                lines.write(cut_off + json.dumps({"system": system, "seed": seed, **found}) + "\n")
            said = f"N@20 {found['N@20']:.4f}, {found['epoch']:.2f} s an epoch, best {found['best']}"
            print(f"{NAMES[system]}, seed {seed}: {said}", file=sys.stderr, flush=True)
    text = table(args, missing)
    (args.out / "table.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
