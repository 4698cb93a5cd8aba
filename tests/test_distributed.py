"""Several processes that train together: the loss curve of one process, one set of files, and no hang when one dies.

Two real processes over gloo. Dropout is off where curves are compared with those of one process: each process draws
its own. The learning rate is the default: at 1e-3, Adam makes a difference of 2e-5 in the loss out of how a single
weight's gradient, which is nearly 0, was rounded.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import safetensors.torch
import torch
from torch import Tensor

from vlm2rec.embedder import distributed
from vlm2rec.embedder.adapters import lora
from vlm2rec.embedder.backbones.devices import pick_device
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.training import vlm2rec
from vlm2rec.embedder.training.vlm2rec import HistoryModel
from vlm2rec.pipelines import finetune
from vlm2rec.pipelines.config import FinetuneConfig
from vlm2rec.pipelines.read_config import read_config

Tiny = Callable[[str], Path]
Curves = dict[str, list[dict[str, float]]]
PROGRAMS = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TOGETHER = ["--no-python", "--nproc-per-node", "2", str(PROGRAMS / "vlm2rec")]


@pytest.fixture(scope="module")
def common(tiny: Tiny, drawn_dataset: Path) -> dict[str, Any]:
    """Settings of every training here; two processes with 4 users each have 8 a step."""
    return {
        "data": str(drawn_dataset),
        "backbone": str(tiny("qwen2_5_vl")),
        "max_pixels": 56 * 56,
        "lora_dropout": 0.0,
        "valid_users": 9,
        "probe_users": 5,
        "log_steps": 1,
        "device": "cpu",
        "batch_size": 4,
    }


@pytest.fixture(scope="module")
def runs(common: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Trainings by name. 27 users are batches of 8, 8, 8 and 3; with 25, the last one leaves a process empty-handed."""
    out = tmp_path_factory.mktemp("together")
    dataset, hard = Dataset(common["data"]), tmp_path_factory.mktemp("hard") / "negatives.parquet"
    lists = [dataset.item_ids[user % 7 : user % 7 + user % 9] for user in range(len(dataset.user_ids))]
    pl.DataFrame({"user_id": dataset.user_ids, "negatives": lists}).write_parquet(hard)
    more: dict[str, dict[str, Any]] = {
        "global": {"negatives": "global", "users": 27, "max_steps": 5, "gradient_steps": 2},
        "local": {"negatives": "local", "users": 27, "max_steps": 4, "gradient_steps": 2},
        "hard": {"negatives": "global", "users": 25, "max_steps": 4, "negatives_file": str(hard), "hard_negatives": 3},
        "empty": {"negatives": "global", "loss": "sft", "users": 25, "max_steps": 4},
        "synchronised": {"negatives": "global", "users": 27, "max_steps": 2, "chunk_users": 1},
        "whole": {"max_steps": 2, "lora_dropout": 0.2, "learning_rate": 1e-3},
    }
    return {name: {**common, **settings, "out": str(out / name)} for name, settings in more.items()}


@pytest.fixture(scope="module")
def found(runs: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found (`train_together.py`)."""
    folder = tmp_path_factory.mktemp("found")
    (folder / "plan.json").write_text(json.dumps(runs))
    script = Path(__file__).with_name("train_together.py")
    command = [PROGRAMS / "torchrun", "--nproc-per-node", "2", script, folder / "plan.json", folder]
    done = subprocess.run([str(part) for part in command], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]


def alone(settings: dict[str, Any], out: Path) -> Curves:
    """Return the curves of one process with the whole batch."""
    training = finetune.run(read_config(FinetuneConfig, flags={**settings, "out": out, "batch_size": 8}))
    assert training is not None
    return training.curves


def saved(settings: dict[str, Any], file: str = "curves.json") -> Any:
    return json.loads((Path(settings["out"]) / file).read_text())


def assert_alike(
    found: Curves, expected: Curves, kinds: Sequence[str] = ("train", "valid", "gradients", "probe")
) -> None:
    for kind in kinds:
        within = {"train": 1e-6, "valid": 0.0, "gradients": 1e-4, "probe": 1e-5}[kind]
        assert [row["step"] for row in found[kind]] == [row["step"] for row in expected[kind]]
        for row, other in zip(found[kind], expected[kind], strict=True):
            assert row.keys() == other.keys()
            for name in row.keys() - {"seconds", "grad_norm"}:
                assert row[name] == pytest.approx(other[name], abs=within), (kind, name, row["step"])
            if kind == "train":
                assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5), row["step"]


def test_global_negatives_give_the_curves_of_one_process(
    found: list[dict[str, Any]], runs: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    expected = alone(runs["global"], tmp_path / "one")
    assert_alike(saved(runs["global"]), expected)
    assert [row["fixed_batch"] for row in saved(runs["global"])["gradients"]] == [8] * 3


def test_a_process_without_users_in_the_last_batch_changes_nothing(
    found: list[dict[str, Any]], runs: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    assert_alike(saved(runs["empty"]), alone(runs["empty"], tmp_path / "one"))


def test_hard_negatives_of_all_processes_give_the_curves_of_one_process(
    found: list[dict[str, Any]], runs: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    assert_alike(saved(runs["hard"]), alone(runs["hard"], tmp_path / "one"))
    assert 0 < saved(runs["hard"])["train"][0]["hard_negatives"] <= 3


def test_local_negatives_give_the_curves_of_one_process_that_averages_the_shares_losses(
    found: list[dict[str, Any]],
    runs: dict[str, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class ByShare(HistoryModel):
        def forward(
            self,
            histories: list[list[int]],
            targets: Tensor,
            users: Sequence[int] = (),
            with_gradients: bool = False,
        ) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
            weights = [len(targets[place::2]) / len(targets) for place in range(2)]
            parts = [super(ByShare, self).forward(histories[place::2], targets[place::2]) for place in range(2)]
            total = sum((part[0] * weight for part, weight in zip(parts, weights, strict=True)), torch.zeros(()))
            log = {
                name: sum(
                    (part[1][name] * weight for part, weight in zip(parts, weights, strict=True)), torch.zeros(())
                )
                for name in parts[0][1]
            }
            return total, log, {}

    monkeypatch.setattr(vlm2rec, "HistoryModel", ByShare)
    expected = alone({**runs["local"], "gradient_steps": 0}, tmp_path / "one")
    together = saved(runs["local"])
    assert_alike({**together, "gradients": []}, expected)
    assert together["train"][0]["effective_negatives"] <= 3 < saved(runs["global"])["train"][0]["effective_negatives"]
    assert {"cos_total_text", "cos_total_image", "cos_text_image"} <= together["gradients"][0].keys()


def test_grad_cache_learns_the_same_with_one_synchronisation_of_the_trained_weights_a_step(
    found: list[dict[str, Any]], runs: dict[str, dict[str, Any]]
) -> None:
    chunked, whole = saved(runs["synchronised"])["train"], saved(runs["global"])["train"][:2]
    assert [row["loss"] for row in chunked] == pytest.approx([row["loss"] for row in whole], abs=1e-6)
    weights = safetensors.torch.load_file(Path(runs["synchronised"]["out"]) / lora.WEIGHTS_FILE)
    alpha_and_beta = 2
    trained = sum(tensor.numel() for tensor in weights.values()) + alpha_and_beta
    for process in found:
        assert process["synchronised"] == [trained] * 2


def test_the_processes_agree_and_one_of_them_writes(
    found: list[dict[str, Any]], runs: dict[str, dict[str, Any]], tiny: Tiny
) -> None:
    for name in ("global", "local", "empty", "whole"):
        first, second = (process[name] for process in found)
        for row in (*first["curves"]["probe"], *second["curves"]["probe"]):
            del row["seconds"]
        assert first == second
    out = Path(runs["global"]["out"])
    assert {path.name for path in out.iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "canary.safetensors"),
        *("curves.json", "vlm2rec.json"),
    }
    told = saved(runs["global"], "vlm2rec.json")
    assert (told["training"]["processes"], told["training"]["users_a_step"]) == (2, 8)
    assert (told["config"]["negatives"], told["config"]["batch_size"]) == ("global", 4)
    ItemEncoder.load(str(tiny("qwen2_5_vl")), out, device="cpu", dtype="float32")  # checks the canary


def test_gathering_brings_every_row_once_and_its_gradient_back(found: list[dict[str, Any]]) -> None:
    for process in found:
        assert process["shares"]["5"] == [[0, 2, 4], [1, 3]]
        assert process["shares"]["1"] == [[0], []]
        assert process["in_order"] == {str(n): list(range(n)) for n in range(6)}
        assert process["gradient"] < 1e-12
        assert process["from_main"] == 0


@pytest.fixture
def started() -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []

    def start(command: list[str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()


def workers(launcher: int) -> dict[int, int]:
    """Return the processes that a launcher has started: process id by rank."""
    found = {}
    for process in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        found |= {int(text[5:]): int(process) for text in environment if text.startswith(b"RANK=")}
    return found


def last_checkpoint(out: Path) -> int:
    """Return the step of the newest finished checkpoint, 0 without one."""
    names = [path.parent.name for path in out.glob("checkpoints/checkpoint-*/checksums.json")]
    return max((int(name.rpartition("-")[2]) for name in names), default=0)


@pytest.mark.slow
def test_fault_49_when_one_process_is_killed_all_end_and_the_same_command_goes_on(
    runs: dict[str, dict[str, Any]],
    started: Callable[[list[str]], subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    whole, cut, settings = tmp_path / "whole", tmp_path / "cut", {**runs["whole"], "max_steps": 12}
    settings["checkpoint_steps"] = 2
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if name != "out"]
    uncut = started([str(PROGRAMS / "torchrun"), *TOGETHER, "finetune", *flags, "--out", str(whole)])
    _, told = uncut.communicate()
    assert uncut.returncode == 0, told
    training = [*TOGETHER, "finetune", *flags, "--out", str(cut)]
    for victim, step in ((0, 4), (1, 8)):
        launcher = started([str(PROGRAMS / "torchrun"), *training])
        while last_checkpoint(cut) < step and launcher.poll() is None:
            time.sleep(0.01)
        ranks = workers(launcher.pid)
        os.kill(ranks[victim], signal.SIGKILL)
        _, told = launcher.communicate(timeout=60)
        assert launcher.returncode not in (0, None), told
        assert not any(Path(f"/proc/{process}").exists() for process in ranks.values()), "the other has ended too"
        assert not (cut / "vlm2rec.json").exists(), "the run must have been cut before its end"
        if victim == 1:
            assert "This is a bug" not in told
    newest = cut / "checkpoints" / f"checkpoint-{last_checkpoint(cut)}"
    drawn = [safetensors.torch.load_file(newest / f"process-{rank}.safetensors")["cpu"] for rank in (0, 1)]
    assert not torch.equal(*drawn), "each process draws its own dropout"
    with pytest.raises(ConfigError, match="begun with 2 processes and --batch-size 4, 8 users a step"):
        finetune.run(read_config(FinetuneConfig, flags={**settings, "out": cut}))

    launch = ["accelerate", "launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2", "--no_python"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    last = started([str(PROGRAMS / launch[0]), *launch[1:], str(PROGRAMS / "vlm2rec"), *training[len(TOGETHER) :]])
    _, told = last.communicate(timeout=300)
    assert last.returncode == 0, told
    assert told.count("Backbone ") == told.count("Fine-tuning done") == 1, "one of the two talks"
    rows = [json.loads((out / "curves.json").read_text())["train"] for out in (cut, whole)]
    assert [row["step"] for row in rows[0]] == list(range(1, 13))
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
    valid = [json.loads((out / "curves.json").read_text())["valid"] for out in (cut, whole)]
    assert valid[0] == valid[1]
    weights = [(out / lora.WEIGHTS_FILE).read_bytes() for out in (cut, whole)]
    assert weights[0] == weights[1]
    assert not (cut / "checkpoints").exists()


def test_a_process_takes_the_gpu_that_its_launcher_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:1")
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"process 2, counted from 0, on a machine with 2 GPUs"):
        pick_device("auto")


def test_processes_on_a_device_that_cannot_send_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ConfigError, match="2 processes were launched on device mps"),
        distributed.joined(torch.device("mps")),
    ):
        pass
