"""VBPR, FREEDOM, LATTICE and SLMRec beside MMRec's own code and cornac's VBPR, on the same files. Prints a table.

    python tests/benchmarks/multimodal.py --data DATA --embeddings EMBEDDINGS [--mmrec CHECKOUT] [--epochs 40]
        [--models VBPR,FREEDOM] [--seeds 0,1] [--init] [--without-cornac]

DATA is a folder of `vlm2rec prepare`, EMBEDDINGS one of `export-items` with text and image vectors of its items,
CHECKOUT a clone of https://github.com/enoche/MMRec (tried at e775373). MMRec gets the files of `vlm2rec convert --to
mmrec`, and the same settings as ours: width, batch, learning rate, weights, one value each instead of a grid. A model
trains for `--epochs` epochs and is looked at after each; that with the best validation counts (ours NDCG@20, MMRec's
Recall@20). cornac has no validation: its last epoch counts.

R@20 ranks each user's test item in the whole catalogue without the user's training items, as MMRec does; the validation
item stays in. Seconds are CPU time of a training epoch, without validation, on one thread.

MMRec's code runs unchanged in a process of its own, with what today's libraries lack put back there: `np.float`, the
update of SciPy's `dok_matrix`, empty modules for lmdb, torchvision, torch_scatter, and a `cuda` that stays on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlm2rec.downstream.evaluation import metrics
from vlm2rec.downstream.mmrec import write_mmrec
from vlm2rec.downstream.multimodal import run as multimodal_run
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.storage import location
from vlm2rec.pipelines import train_recommender
from vlm2rec.pipelines.config import TrainRecommenderConfig
from vlm2rec.pipelines.read_config import read_config

NAME = "compared"
# our settings by MMRec's names
THEIR_NAMES: dict[str, dict[str, str]] = {
    "VBPR": {"regularisation": "reg_weight"},
    "FREEDOM": {
        "regularisation": "reg_weight",
        "pruning": "dropout",
        "neighbours": "knn_k",
        "graph_layers": "n_ui_layers",
        "image_weight": "mm_image_weight",
    },
    "LATTICE": {"regularisation": "reg_weight", "neighbours": "knn_k"},
    "SLMRec": {"ssl_weight": "ssl_alpha", "ssl_temperature": "ssl_temp", "temperature": "temp"},
}
# what MMRec searches a grid of: these are lists
SEARCHED = {
    "VBPR": ["reg_weight"],
    "FREEDOM": ["dropout", "reg_weight"],
    "LATTICE": ["reg_weight", "learning_rate"],
    "SLMRec": ["learning_rate", "ssl_temp", "ssl_alpha", "reg"],
}
COMMON = {"batch_size": "train_batch_size", "learning_rate": "learning_rate", "weight_decay": "weight_decay"}

DRIVER = """
import json, sys, time, types
import numpy as np, scipy.sparse as sp, torch
source, model, settings, result = sys.argv[1:]
torch.set_num_threads(1)
np.float = float
sp.dok_matrix._update = lambda self, data: self._dict.update(data)
torch.Tensor.cuda = lambda self, *args, **kwargs: self
names = ("lmdb", "torch_scatter", "torchvision", "torchvision.transforms", "torchvision.transforms.functional")
for name in names:
    sys.modules[name] = types.ModuleType(name)
sys.modules["torch_scatter"].scatter = None
sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
for name in ("pad", "resize"):
    setattr(sys.modules["torchvision.transforms.functional"], name, None)
sys.path.insert(0, source)
from common.trainer import Trainer
from utils.quick_start import quick_start
seconds, kept = [], {}
epoch, fit = Trainer._train_epoch, Trainer.fit
def timed(self, *args, **kwargs):
    began = time.process_time()
    found = epoch(self, *args, **kwargs)
    seconds.append(time.process_time() - began)
    return found
def kept_fit(self, *args, **kwargs):
    kept["valid"], _, kept["test"] = found = fit(self, *args, **kwargs)
    return found
Trainer._train_epoch, Trainer.fit = timed, kept_fit
quick_start(model, dataset="compared", config_dict=json.loads(settings), save_model=False)
json.dump({"recall": float(kept["test"]["recall@20"]), "seconds": seconds}, open(result, "w"))
"""


def of_mmrec(args: argparse.Namespace, work: Path, model: str, seed: int) -> tuple[float, float]:
    """Return R@20 and seconds of an epoch of MMRec's own code."""
    source = work / "MMRec" / "src"
    if not source.exists():
        shutil.copytree(args.mmrec / "src", source)
        folder = work / "MMRec" / "data" / NAME
        folder.mkdir(parents=True)
        write_mmrec(location(str(args.embeddings)), Dataset(args.data), folder, NAME, ["text", "image"])
        shutil.copy(folder / f"{NAME}.yaml", source / "configs" / "dataset")
    ours = config_of(args, model, seed, work)
    settings: dict[str, Any] = {theirs: getattr(ours, name) for name, theirs in COMMON.items()}
    grid = {theirs: [getattr(ours, name)] for name, theirs in THEIR_NAMES[model].items()}
    keys = SEARCHED[model]
    settings |= {name: values if name in keys else values[0] for name, values in grid.items()}
    settings |= {name: [settings[name]] for name in keys if not isinstance(settings.get(name, []), list)}
    settings |= {"reg": [0.0]} if model == "SLMRec" else {}
    settings |= {"seed": [seed], "epochs": args.epochs, "use_gpu": False, "stopping_step": args.epochs}
    settings |= {"save_recommended_topk": False, "topk": [20], "metrics": ["Recall", "NDCG"]}
    result = work / f"mmrec-{model}-{seed}.json"
    driver = work / "driver.py"
    driver.write_text(DRIVER)
    command = [sys.executable, "-W", "ignore", str(driver), str(source), model, json.dumps(settings), str(result)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"MMRec's {model} stopped:\n{done.stderr[-2000:]}")
    found = json.loads(result.read_text())
    return found["recall"], float(np.mean(found["seconds"]))


def config_of(args: argparse.Namespace, model: str, seed: int, work: Path) -> TrainRecommenderConfig:
    """Return the settings of our run."""
    given: dict[str, Any] = {"model": model, "data": args.data, "embeddings": args.embeddings, "device": "cpu"}
    given |= {"out": work / f"ours-{model}-{seed}", "seed": seed, "max_epochs": args.epochs, "eval_step": 1}
    given |= {"patience": args.epochs, "mode": "init" if args.init and model in ("FREEDOM", "LATTICE") else "adapter"}
    return read_config(TrainRecommenderConfig, flags=given)


def of_ours(args: argparse.Namespace, work: Path, model: str, seed: int) -> tuple[float, float, dict[str, float]]:
    """Return R@20 as MMRec counts it, seconds of an epoch, and the metrics of our own full ranking."""
    seconds, epoch, held = [], multimodal_run._epoch, {}

    def timed(*given: Any) -> float:
        began = time.process_time()
        loss = epoch(*given)
        seconds.append(time.process_time() - began)
        held["model"] = given[0]
        return loss

    multimodal_run._epoch = timed
    try:
        found = train_recommender.run(config_of(args, model, seed, work))
    finally:
        multimodal_run._epoch = epoch
    blocks = multimodal_run.user_scores(held["model"])  # with the best epoch's weights
    return recall(Dataset(args.data), blocks), float(np.mean(seconds)), found["full"]


def recall(dataset: Dataset, blocks: Iterator[tuple[slice, np.ndarray]]) -> float:
    """Return the share of test items among the first 20, where training items are left out and validation items not."""
    targets, hits = dataset.histories("test").targets, []
    seen, offsets = metrics.seen_items(dataset.train_sequences())
    for part, scores in blocks:
        of_part = offsets[part.start : part.stop + 1]
        rows = seen[of_part[0] : of_part[-1]]
        counts = metrics.counts_among_all(scores, targets[part], rows, of_part - of_part[0])
        hits.append(metrics.expected_metrics(*counts)["H@20"])
    return float(np.concatenate(hits).mean())


def of_cornac(args: argparse.Namespace, work: Path, seed: int) -> tuple[float, float] | None:
    """Return R@20 and seconds of an epoch of cornac's VBPR on both views end to end; None without cornac."""
    try:
        import cornac
    except ImportError:
        return None
    dataset = Dataset(args.data)
    ours = config_of(args, "VBPR", seed, work)
    features, _ = multimodal_run.read_features(
        train_recommender.multimodal.Settings(
            **{
                name: getattr(ours, name)
                for name in train_recommender.multimodal.Settings.__dataclass_fields__
                if name != "features"
            },
            features=("text", "image"),
        ),
        dataset.item_ids,
    )
    joined = torch.cat(list(features.values()), 1).numpy()
    train = [
        (user, dataset.item_ids[row], 1.0)
        for user, rows in zip(dataset.user_ids, dataset.train_sequences(), strict=True)
        for row in rows
    ]
    modality = cornac.data.ImageModality(features=joined, ids=dataset.item_ids, normalized=False)
    known = cornac.data.Dataset.from_uir(train, seed=seed)
    modality.build(id_map=known.iid_map)
    known.add_modalities(item_image=modality)
    model = cornac.models.VBPR(
        k=ours.hidden_size,
        k2=ours.hidden_size,
        n_epochs=args.epochs,
        batch_size=ours.batch_size,
        learning_rate=ours.learning_rate,
        lambda_w=ours.regularisation,
        lambda_b=ours.regularisation,
        verbose=False,
        seed=seed,
    )
    began = time.process_time()
    with contextlib.redirect_stdout(sys.stderr):
        model.fit(known)
    seconds = (time.process_time() - began) / args.epochs
    row_of = np.full(len(dataset.item_ids), -1)
    for row, item in enumerate(dataset.item_ids):
        row_of[row] = known.iid_map.get(item, -1)

    def blocks() -> Iterator[tuple[slice, np.ndarray]]:
        for number, user in enumerate(dataset.user_ids):
            scores = np.append(model.score(known.uid_map[user]), -np.inf)  # the last for items unknown in training
            yield slice(number, number + 1), scores[row_of][None].astype(np.float32)

    return recall(dataset, blocks()), seconds


def main() -> None:
    """Print one line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--embeddings", type=Path, required=True)
    parser.add_argument("--mmrec", type=Path)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--models", default="VBPR,FREEDOM,LATTICE,SLMRec")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--init", action="store_true", help="train the vectors along in FREEDOM and LATTICE, as MMRec")
    parser.add_argument("--without-cornac", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    print(f"{'':22}{'R@20 by seed':>24}{'mean':>8}{'s / epoch':>12}")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for model in args.models.split(","):
            ours = [of_ours(args, work, model, seed) for seed in seeds]
            line(f"{model}, ours", [each[0] for each in ours], ours[0][1])
            if args.mmrec:
                theirs = [of_mmrec(args, work, model, seed) for seed in seeds]
                line(f"{model}, MMRec", [each[0] for each in theirs], theirs[0][1])
                print(f"{'':22}{theirs[0][1] / ours[0][1]:.1f} × as fast")
            if model == "VBPR" and not args.without_cornac:
                found = [of_cornac(args, work, seed) for seed in seeds]
                if None in found:
                    print("cornac is not installed: left out")
                else:
                    line("VBPR, cornac", [each[0] for each in found if each], found[0][1] if found[0] else 0.0)


def line(name: str, recalls: list[float], seconds: float) -> None:
    """Print one system."""
    listed = " ".join(f"{each:.4f}" for each in recalls)
    print(f"{name:22}{listed:>24}{np.mean(recalls):8.4f}{seconds:12.2f}", flush=True)


if __name__ == "__main__":
    main()
