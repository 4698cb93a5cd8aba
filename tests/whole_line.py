"""A program: the whole line on a tiny world among planted files, under Python's audit hooks. Run by test_strangers.

It writes what was unpickled, opened outside the given folder, connected to and started, to seen.json. A process of its
own, because an audit hook cannot be taken off again.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from study_tables import write_study

import vlm2rec.embedder
from vlm2rec.downstream.recbole import compat
from vlm2rec.embedder.contract import schema
from vlm2rec.pipelines import (
    build_index,
    convert,
    evaluate,
    export_items,
    finetune,
    make_backbone,
    prepare,
    report,
    train_recommender,
    verify,
)
from vlm2rec.pipelines.config import (
    BuildIndexConfig,
    ConvertConfig,
    EvaluateConfig,
    ExportConfig,
    FailuresConfig,
    FinetuneConfig,
    MakeBackboneConfig,
    PrepareConfig,
    ReportConfig,
    SearchConfig,
    TrainRecommenderConfig,
    VerifyConfig,
)
from vlm2rec.pipelines.synthetic.drawn_catalogue import draw_catalogue

STRANGERS = "s3://strangers-bucket/x"


class Recorder:
    """An audit hook: notes what a program must not do while it is switched on."""

    def __init__(self, allowed: list[str]) -> None:
        self.on, self.allowed = False, allowed
        self.seen: dict[str, list[str]] = {"pickles": [], "opened": [], "addresses": [], "commands": []}

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "pickle.find_class":
            self.seen["pickles"].append(".".join(args))
        elif event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
            self.seen["addresses"].append(f"{event} {args[1:]}")
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
            self.seen["commands"].append(f"{event} {args[0]}")
        elif event == "open" and isinstance(args[0], str | bytes):
            path = os.path.realpath(os.fsdecode(args[0]))
            if not any(path == folder or path.startswith(folder + os.sep) for folder in self.allowed):
                self.seen["opened"].append(path)


class Bomb:
    """Whatever unpickles it runs a command."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch ran",)


def plant(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(Bomb()))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def theirs(folder: Path) -> Path:
    """Write a RecBole user's data, with what RecBole would unpickle beside it; return his YAML."""
    drawn = random.Random(0)
    rows = [f"u{user}\ti{item}\t{k}" for user in range(20) for k, item in enumerate(drawn.sample(range(15), 6))]
    (folder / "shop").mkdir(parents=True)
    lines = ["user_id:token\titem_id:token\ttimestamp:float", *rows]
    (folder / "shop" / "shop.inter").write_text("\n".join(lines) + "\n")
    for name in ("shop-SequentialDataset", "shop-for-SASRec-dataloader"):
        plant(folder / f"{name}.pth")
    (folder / "recbole.yaml").write_text(
        "model: SASRec\ndata_path: theirs\ndataset: shop\nepochs: 1\nhidden_size: 16\ninner_size: 16\n"
        "load_col: {inter: [user_id, item_id, timestamp]}\ncheckpoint_dir: theirs\n"
    )
    return folder / "recbole.yaml"


def plant_links(world: Path, outside: Path) -> None:
    """Turn a picture into a link to one outside; put pickles where other programs look for weights and data."""
    picture = sorted((world / "cat" / "images").iterdir())[0]
    outside.mkdir()
    picture.rename(outside / picture.name)
    picture.symlink_to(outside / picture.name)
    for name in ("bb/pytorch_model.bin", "bb/model.pt", "data/dataset.pkl", "data/shop-Dataset.pth"):
        plant(world / name)


def plant_beside_the_recommender(world: Path, outside: Path) -> None:
    """Plant in an earlier run's folder what RecBole unpickles, and a link in place of its log."""
    for dataset in ("vlm2rec-for-SASRec-dataloader", "vlm2rec-SequentialDataset", "vlm2rec-FolderDataset"):
        plant(world / "rec" / f"{dataset}.pth")
    plant(world / "rec" / "checkpoint.pth")
    plant(world / "rec" / ".checkpoint.pth.tmp")
    (outside / "log").write_text("precious")
    (world / "rec" / "recbole.log").unlink()
    (world / "rec" / "recbole.log").symlink_to(outside / "log")


def main(world: Path, with_finetune: bool) -> dict[str, Any]:
    """Run the line in `world`, the working directory, and return what was seen."""
    outside = world.parent / "outside"
    compat.require_recbole()  # its import is no part of the line
    draw_catalogue(Path("cat"), products=24, users=30, seed=0)
    files = {"items": Path("cat/items.parquet"), "images": Path("cat/images")}
    make_backbone.run(
        MakeBackboneConfig(out=Path("bb"), hidden_size=64, layers=2, vocabulary=1000, max_steps=0, **files)
    )
    study = write_study(Path("study"))
    yaml = theirs(Path("theirs"))

    code = Path(vlm2rec.embedder.__file__).resolve().parent.parent
    python = {os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, *sysconfig.get_paths().values())}
    system = ["/proc", "/sys", "/dev", "/etc", "/usr/share", "/usr/lib", "/lib"]
    recorder = Recorder([*python, str(code), *system, str(world)])
    torch_load = torch.load

    def load(*args: Any, **options: Any) -> Any:
        recorder.seen["pickles"].append("torch.load")
        return torch_load(*args, **options)

    torch.load = load
    sys.addaudithook(recorder)
    steps: list[str] = []

    def step(name: str, run: Callable[[], Any]) -> None:
        recorder.on = True
        run()
        recorder.on = False
        steps.append(name)

    data, emb, adapter = Path("data"), Path("emb"), Path("adapter") if with_finetune else None
    model: dict[str, Any] = {"backbone": "bb", "vision_cache": "off", "device": "cpu"}
    step(
        "prepare",
        lambda: prepare.run(
            PrepareConfig(interactions=Path("cat/interactions.parquet"), out=data, core=1, candidates=5, **files)
        ),
    )
    plant_links(world, outside)
    if adapter is not None:
        short: dict[str, Any] = {"loss": "sft", "batch_size": 4, "valid_users": 8, "users": 12, "probe_users": 0}
        config = FinetuneConfig(data=data, out=adapter, max_steps=2, checkpoint_steps=1, **short, **model)
        step("finetune", lambda: finetune.run(config))
    export = ExportConfig(data=data, adapter=adapter, out=emb, shard_size=8, max_failures=1, **model)
    step("export-items", lambda: export_items.run(export))
    step("verify", lambda: verify.run(VerifyConfig(embeddings=emb)))
    edit(emb / schema.MANIFEST_FILE, data=STRANGERS)
    step(
        "evaluate",
        lambda: evaluate.run(
            EvaluateConfig(data=data, embeddings=emb, adapter=adapter, out=Path("task1"), missing="zero", **model)
        ),
    )
    recommender = TrainRecommenderConfig(
        data=data, embeddings=emb, missing="mean", model="SASRec", out=Path("rec"), max_epochs=1, hidden_size=16,
        device="cpu",
    )  # fmt: skip
    step("train-recommender", lambda: train_recommender.run(recommender))
    plant_beside_the_recommender(world, outside)
    step("train-recommender again", lambda: train_recommender.run(recommender))
    recbole = TrainRecommenderConfig(config=yaml, out=Path("rec2"), device="cpu")
    step("a RecBole YAML", lambda: train_recommender.run(recbole))
    index = Path("index")
    step("build-index", lambda: build_index.run(BuildIndexConfig(embeddings=emb, out=index, kind="HNSW8,SQ8")))
    edit(index / "index.json", embeddings=STRANGERS)
    step("search", lambda: build_index.search(SearchConfig(index=index, item="P0003", k=3)))
    step("failures", lambda: verify.failures(FailuresConfig(embeddings=emb)))
    step("convert", lambda: convert.run(ConvertConfig(embeddings=emb, to="npy", out=Path("npy"))))
    step("report", lambda: report.run(ReportConfig(study=study)))
    status = pq.read_table(emb / "part-00000.parquet")["status"].to_pylist()
    return {**recorder.seen, "steps": steps, "first": status[0]}


if __name__ == "__main__":
    world = Path(sys.argv[1])
    os.chdir(world)
    found = main(world, with_finetune=sys.argv[2] == "finetune")
    (world / "seen.json").write_text(json.dumps(found))
