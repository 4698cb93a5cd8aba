"""VBPR, FREEDOM, LATTICE and SLMRec beside MMRec's own code and cornac's VBPR, on the same files. Prints a table.

    python tests/benchmarks/multimodal.py --data DATA --embeddings EMBEDDINGS --mmrec CHECKOUT --out FOLDER
        [--epochs 40] [--seeds 0,1,2,3,4] [--models VBPR,FREEDOM] [--init] [--cornac PYTHON]

DATA is a folder of `vlm2rec prepare`, EMBEDDINGS one of `export-items` with text and image vectors of its items,
CHECKOUT a clone of https://github.com/enoche/MMRec (tried at e775373), PYTHON an interpreter that has cornac (its own
environment will do: it needs nothing of ours; by default this one, and without cornac that row is left out). Without
--mmrec, ours runs alone. MMRec gets the files of `vlm2rec convert --to mmrec`, and the same settings as ours: width,
batch, learning rate, weights, one value each instead of a grid. A model trains for `--epochs` epochs and is looked at
after each; that with the best validation counts (ours NDCG@20, MMRec's Recall@20). cornac has no validation: its last
epoch counts. Any other model of MMRec, such as BM3, runs alone, with the first value of each of its grids.

Every finished run is a line of FOLDER/runs.jsonl. The same command goes on where it was stopped; with more seeds or
models it adds them. FOLDER/table.md is the table.

R@20 ranks each user's test items in the whole catalogue without the user's training items, as MMRec does; validation
items stay in. Seconds are CPU time of a training epoch, without validation, on one thread.

MMRec's code runs unchanged in a process of its own, with what today's libraries lack put back there: `np.float`, the
update of SciPy's `dok_matrix`, empty modules for lmdb, torchvision, torch_scatter, and a `cuda` that stays on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from vlm2rec.downstream.evaluation import metrics
from vlm2rec.downstream.evaluation.protocol import TargetSets
from vlm2rec.downstream.mmrec import write_mmrec
from vlm2rec.downstream.multimodal import run as multimodal_run
from vlm2rec.downstream.multimodal.data import Interactions, read_features
from vlm2rec.downstream.multimodal.settings import Settings
from vlm2rec.embedder.contract import schema, storage
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


CORNAC_DRIVER = """
import json, sys, time
import numpy as np
given, settings, result = sys.argv[1:]
try:
    import cornac
except ImportError:
    sys.exit(3)
arrays = np.load(given)
features, users, items = arrays["features"], arrays["users"], arrays["items"]
names = [str(row) for row in range(len(features))]
known = cornac.data.Dataset.from_uir([(str(u), names[i], 1.0) for u, i in zip(users.tolist(), items.tolist())], seed=0)
modality = cornac.data.ImageModality(features=features, ids=names, normalized=False)
modality.build(id_map=known.iid_map)
known.add_modalities(item_image=modality)
settings = json.loads(settings)
model = cornac.models.VBPR(verbose=False, **settings)
began = time.process_time()
model.fit(known)
seconds = (time.process_time() - began) / settings["n_epochs"]
rows = np.array([known.iid_map.get(name, -1) for name in names])
scores = np.full((users.max() + 1, len(names) + 1), -np.inf, np.float32)  # the last for items unknown in training
for user in range(len(scores)):
    scores[user, : known.num_items] = model.score(known.uid_map[str(user)])[: known.num_items]
scores[:, known.num_items :] = -np.inf
np.savez(result, scores=scores[:, rows], seconds=seconds)
"""
NO_CORNAC = 3  # exit code
RUNS = "runs.jsonl"


def of_mmrec(args: argparse.Namespace, work: Path, model: str, seed: int) -> tuple[float, float]:
    """Return R@20 and seconds of an epoch of MMRec's own code."""
    source = work / "MMRec" / "src"
    if not source.exists():
        shutil.copytree(args.mmrec / "src", source)
        folder = work / "MMRec" / "data" / NAME
        folder.mkdir(parents=True)
        write_mmrec(location(str(args.embeddings)), dataset_of(args), folder, NAME, ["text", "image"])
        shutil.copy(folder / f"{NAME}.yaml", source / "configs" / "dataset")
    settings = like_ours(args, model, seed, work) if model in THEIR_NAMES else first_of_grid(source, model)
    settings |= {"seed": [seed], "epochs": args.epochs, "use_gpu": False, "stopping_step": args.epochs}
    settings |= {"save_recommended_topk": False, "topk": [20], "metrics": ["Recall", "NDCG"]}
    result = work / f"mmrec-{model}-{seed}.json"
    driver = work / "driver.py"
    driver.write_text(DRIVER)
    command = [sys.executable, "-W", "ignore", str(driver), str(source), model, json.dumps(settings), str(result)]
    done = subprocess.run(command, cwd=source, env=_environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"MMRec's {model} stopped:\n{done.stderr[-2000:]}")
    found = json.loads(result.read_text())
    return found["recall"], float(np.mean(found["seconds"]))


def like_ours(args: argparse.Namespace, model: str, seed: int, work: Path) -> dict[str, Any]:
    """Return the settings of our run by MMRec's names."""
    ours = config_of(args, model, seed, work)
    settings: dict[str, Any] = {theirs: getattr(ours, name) for name, theirs in COMMON.items()}
    grid = {theirs: [getattr(ours, name)] for name, theirs in THEIR_NAMES[model].items()}
    keys = SEARCHED[model]
    settings |= {name: values if name in keys else values[0] for name, values in grid.items()}
    settings |= {name: [settings[name]] for name in keys if not isinstance(settings.get(name, []), list)}
    return settings | ({"reg": [0.0]} if model == "SLMRec" else {})


def first_of_grid(source: Path, model: str) -> dict[str, Any]:
    """Return the settings of a model that we do not have: of each grid in MMRec's file the first value."""
    theirs = yaml.safe_load((source / "configs" / "model" / f"{model}.yaml").read_text())
    return {name: theirs[name][:1] for name in theirs["hyper_parameters"] if name != "seed"}


def config_of(args: argparse.Namespace, model: str, seed: int, work: Path) -> TrainRecommenderConfig:
    """Return the settings of our run."""
    given: dict[str, Any] = {"model": model, "data": args.data, "embeddings": args.embeddings, "device": "cpu"}
    given |= {"out": work / f"ours-{model}-{seed}", "seed": seed, "max_epochs": args.epochs, "eval_step": 1}
    given |= {"patience": args.epochs, "mode": "init" if args.init and model in ("FREEDOM", "LATTICE") else "adapter"}
    return read_config(TrainRecommenderConfig, flags=given)


def of_ours(args: argparse.Namespace, work: Path, model: str, seed: int) -> tuple[float, float]:
    """Return R@20 as MMRec counts it, and seconds of an epoch of ours."""
    seconds, epoch, held = [], multimodal_run._epoch, {}

    def timed(*given: Any) -> float:
        began = time.process_time()
        loss = epoch(*given)
        seconds.append(time.process_time() - began)
        held["model"] = given[0]
        return loss

    multimodal_run._epoch = timed
    try:
        train_recommender.run(config_of(args, model, seed, work))
    finally:
        multimodal_run._epoch = epoch
    blocks = multimodal_run.user_scores(held["model"])  # with the best epoch's weights
    return recall(dataset_of(args), blocks), float(np.mean(seconds))


def dataset_of(args: argparse.Namespace) -> Dataset:
    """Return the dataset with the items that are trained on and ranked."""
    return Dataset(args.data).warm()


def recall(dataset: Dataset, blocks: Iterator[tuple[slice, np.ndarray]]) -> float:
    """Return the recall of test items at 20, where training items are left out and validation items are not."""
    seen = metrics.seen_items(dataset.train_sequences())
    sets, hits = TargetSets(*dataset.targets("test"), *seen), []
    for part, scores in blocks:
        ends = sets.offsets[part.start : part.stop + 1]
        hits.append(metrics.set_metrics(*sets.counts(part, scores), ends - ends[0])["R@20"])
    return float(np.concatenate(hits).mean())


def of_cornac(args: argparse.Namespace, work: Path, model: str, seed: int) -> tuple[float, float] | None:
    """Return R@20 and seconds of an epoch of cornac's VBPR on both views end to end; None without cornac."""
    dataset, ours = dataset_of(args), config_of(args, model, seed, work)
    known = {f.name: getattr(ours, f.name) for f in dataclasses.fields(Settings)}
    features, _ = read_features(Settings(**known | {"features": ("text", "image")}), dataset.item_ids)
    interactions = Interactions(dataset)
    given, found = work / "cornac-given.npz", work / "cornac-found.npz"
    joined = torch.cat(list(features.values()), 1).numpy()
    np.savez(given, features=joined, users=interactions.users, items=interactions.items)
    settings = {"k": ours.hidden_size, "k2": ours.hidden_size, "n_epochs": args.epochs, "batch_size": ours.batch_size}
    settings |= {"learning_rate": ours.learning_rate, "lambda_w": ours.regularisation, "lambda_b": ours.regularisation}
    driver = work / "cornac-driver.py"
    driver.write_text(CORNAC_DRIVER)
    command = [args.cornac, "-W", "ignore", str(driver), str(given), json.dumps(settings | {"seed": seed}), str(found)]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True)
    if done.returncode == NO_CORNAC:
        return None
    if done.returncode:
        raise SystemExit(f"cornac's VBPR stopped:\n{done.stderr[-2000:]}")
    with np.load(found) as arrays:
        scores, seconds = arrays["scores"], float(arrays["seconds"])
    return recall(dataset, iter([(slice(0, len(scores)), scores)])), seconds


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MPLBACKEND": "agg"}


SYSTEMS: dict[str, Callable[[argparse.Namespace, Path, str, int], tuple[float, float] | None]] = {
    "ours": of_ours,
    "MMRec": of_mmrec,
    "cornac": of_cornac,
}


def systems_of(args: argparse.Namespace, model: str) -> list[str]:
    """Return which systems are compared for a model."""
    ours = ["ours"] if model in THEIR_NAMES else []
    return ours + (["MMRec"] if args.mmrec else []) + (["cornac"] if model == "VBPR" and args.cornac else [])


def run_all(args: argparse.Namespace, folder: Path) -> None:
    """Make the runs that are missing."""
    known = {(run["system"], run["model"], run["seed"]) for run in finished(folder)}
    for seed in args.seeds:
        for model in args.models:
            for system in systems_of(args, model):
                if (system, model, seed) in known:
                    continue
                found = SYSTEMS[system](args, folder / "work", model, seed)
                run = {"system": system, "model": model, "seed": seed}
                run |= {"recall": None, "seconds": None} if found is None else {"recall": found[0], "seconds": found[1]}
                with (folder / RUNS).open("a") as lines:
                    lines.write("\n" * cut_off(folder) + json.dumps(run) + "\n")
                said = "not installed: left out" if found is None else f"R@20 {found[0]:.4f}, {found[1]:.2f} s an epoch"
                print(f"{model} of {system}, seed {seed}: {said}", file=sys.stderr, flush=True)


def cut_off(folder: Path) -> bool:
    """Tell whether the last line is not whole, because its writer was killed."""
    text = (folder / RUNS).read_text() if (folder / RUNS).exists() else ""
    return bool(text) and not text.endswith("\n")


def finished(folder: Path) -> list[dict[str, Any]]:
    """Return the runs that are finished; a line that was cut off is none."""
    found = []
    for line in (folder / RUNS).read_text().splitlines() if (folder / RUNS).exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def table(args: argparse.Namespace, folder: Path) -> str:
    """Return the table: a line for each model and system."""
    lines = ["| model | system | seeds | R@20 | CPU seconds an epoch | ours is |", "|---|---|---|---|---|---|"]
    runs = [run for run in finished(folder) if run["recall"] is not None and run["seed"] in args.seeds]
    for model in args.models:
        speed: dict[str, float] = {}
        for system in systems_of(args, model):
            mine = [run for run in runs if (run["system"], run["model"]) == (system, model)]
            if not mine:
                continue
            recalls = [run["recall"] for run in mine]
            speed[system] = float(np.mean([run["seconds"] for run in mine]))
            spread = f" ± {np.std(recalls, ddof=1):.4f}" if len(recalls) > 1 else ""
            ratio = f"{speed[system] / speed['ours']:.1f} × as fast" if system != "ours" and "ours" in speed else ""
            shown = f"{np.mean(recalls):.4f}{spread} | {speed[system]:.2f}"
            lines.append(f"| {model} | {system} | {len(mine)} | {shown} | {ratio} |")
    return "\n".join(lines) + "\n"


def settle(args: argparse.Namespace, folder: Path) -> None:
    """Write what decides the runs of a folder, or refuse to add runs of something else to it."""
    manifest = schema.read_manifest(location(str(args.embeddings)))
    decides = {"sequences": storage.sha256_file(args.data / schema.SEQUENCES_FILE)}
    decides |= {"embeddings": [shard["sha256"] for shard in manifest["shards"]]}
    decides |= {"epochs": args.epochs, "init": args.init}
    record = folder / "settings.json"
    if record.exists() and json.loads(record.read_text()) != decides:
        raise SystemExit(f"{folder} holds runs on other files or with other settings: choose another --out")
    record.write_text(json.dumps(decides))


def main() -> None:
    """Make the runs that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--embeddings", type=Path, required=True)
    parser.add_argument("--mmrec", type=Path)
    parser.add_argument("--out", type=Path, help="default: a folder that is removed at the end")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--models", type=lambda text: text.split(","), default=[*THEIR_NAMES])
    parser.add_argument("--seeds", type=lambda text: [int(each) for each in text.split(",")], default=[0, 1, 2, 3, 4])
    parser.add_argument("--init", action="store_true", help="train the vectors along in FREEDOM and LATTICE, as MMRec")
    parser.add_argument("--cornac", default=sys.executable, help="an interpreter that has cornac; empty: without it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.out or Path(temporary)).resolve()
        (folder / "work").mkdir(parents=True, exist_ok=True)
        settle(args, folder)
        run_all(args, folder)
        found = table(args, folder)
        (folder / "table.md").write_text(found)
        print(found, end="")


if __name__ == "__main__":
    main()
