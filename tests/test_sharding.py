"""`finetune --sharding fsdp`, and trainings that go on with another number of processes.

Two real processes over gloo, each with a part of every layer. Dropout is off where curves are compared with those of
one process. A run is cut by an error in all its processes at the same step, after a checkpoint.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import test_distributed
import torch
from children import Forked

from vlm2rec.embedder.adapters import lora
from vlm2rec.embedder.adapters.lora import add_lora
from vlm2rec.embedder.backbones.backbone import Backbone
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.pipelines import finetune
from vlm2rec.pipelines.config import FinetuneConfig
from vlm2rec.pipelines.read_config import read_config

Tiny = Callable[[str], Path]
Settings = dict[str, Any]
PART = """
import json, sys
import torch
from test_sharding import trained
from vlm2rec.embedder import distributed
with distributed.joined(torch.device("cpu")):
    for settings, cut_at in json.loads(sys.argv[1]):
        trained(settings, cut_at)
"""
STEPS, CUT = 5, 4  # 25 users are batches of 8, 8, 8 and 1: in the last one, a process has none


class CutError(Exception):
    """Ends a run in the middle."""


@contextmanager
def ending_at(step: int) -> Iterator[None]:
    """Cut trainings when they have learned so many steps; 0 lets them end."""

    def on_step(done: int, steps: int, latest: dict[str, float]) -> None:
        if done == step:
            raise CutError

    usual = finetune._reporter
    finetune._reporter = lambda advance, shown: on_step  # type: ignore[assignment]
    try:
        yield
    except CutError:
        assert step
    finally:
        finetune._reporter = usual


def trained(settings: Settings, cut_at: int = 0) -> None:
    """Train in this process, up to a step or to the end."""
    with ending_at(cut_at):
        finetune.run(read_config(FinetuneConfig, flags=settings))
        assert not cut_at, "it ended before"


def together(*runs: tuple[Settings, int]) -> None:
    """Train in two processes: settings, and the step at which a run is cut."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    parts = [
        Forked(PART, json.dumps(runs), **world, RANK=str(rank), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
        for rank in range(2)
    ]
    ends = [part.communicate() for part in parts]
    assert [part.returncode for part in parts] == [0, 0], ends


@pytest.fixture(scope="module")
def common(tiny: Tiny, drawn_dataset: Path) -> Settings:
    return {
        "data": str(drawn_dataset),
        "backbone": str(tiny("qwen2_5_vl")),
        "max_pixels": 56 * 56,
        "lora_dropout": 0.0,
        "negatives": "global",
        "users": 25,
        "max_steps": STEPS,
        "checkpoint_steps": 3,
        "valid_users": 9,
        "probe_users": 0,
        "log_steps": 1,
        "device": "cpu",
    }


def one(settings: Settings, out: Path) -> Settings:
    """Return the settings of one process with the whole batch of 8 users."""
    return {**settings, "batch_size": 8, "out": str(out)}


def two(settings: Settings, out: Path, sharding: str = "fsdp") -> Settings:
    """Return the settings of two processes with the same batch."""
    return {**settings, "batch_size": 4, "sharding": sharding, "out": str(out)}


def assert_alike(out: Path, expected: Path) -> None:
    """Two runs saw the same users in the same order, and learned the same but for rounding."""
    curves, others = (json.loads((folder / "curves.json").read_text()) for folder in (out, expected))
    test_distributed.assert_alike(curves, others, ("train", "valid"))
    weights, theirs = (safetensors.torch.load_file(folder / lora.WEIGHTS_FILE) for folder in (out, expected))
    assert weights.keys() == theirs.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-6)
    assert not (out / "checkpoints").exists()


@pytest.fixture(scope="module")
def cut_in_two(common: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded run of two processes with GradCache, cut after its checkpoint of step 3."""
    out = tmp_path_factory.mktemp("sharded") / "adapter"
    together((two({**common, "chunk_users": 1}, out), CUT))
    return out


def test_sharded_layers_learn_what_one_process_learns_and_one_process_can_finish_it(
    common: Settings, cut_in_two: Path, tiny: Tiny, tmp_path: Path
) -> None:
    settings, out = {**common, "chunk_users": 1}, tmp_path / "out"
    shutil.copytree(cut_in_two, out)
    trained(one(settings, out))
    trained(one(settings, tmp_path / "one"))
    assert_alike(out, tmp_path / "one")
    ItemEncoder.load(str(tiny("qwen2_5_vl")), out, device="cpu", dtype="float32")  # checks the canary


def test_a_checkpoint_of_shards_holds_whole_weights_and_what_the_optimizer_remembers(cut_in_two: Path) -> None:
    (newest,) = (cut_in_two / "checkpoints").glob("checkpoint-*")
    weights = safetensors.torch.load_file(newest / "trainable.safetensors")
    optimizer = safetensors.torch.load_file(newest / "optimizer.safetensors")
    shapes = sorted(tuple(tensor.shape) for tensor in weights.values())
    assert sorted(tuple(tensor.shape) for name, tensor in optimizer.items() if name.endswith(".exp_avg")) == shapes


@pytest.mark.parametrize(
    ("change", "told", "fix"),
    [
        ({"batch_size": 4}, "2 processes and --batch-size 4, 8 users a step; now it is 1 process", "--batch-size 8"),
        ({"batch_size": 8, "lam": 0.5}, "begun with lam = ", "--no-resume"),
    ],
)
def test_another_number_of_processes_needs_the_same_users_in_every_step(
    common: Settings, cut_in_two: Path, change: Settings, told: str, fix: str
) -> None:
    settings = {**common, "chunk_users": 1, "out": str(cut_in_two), **change}
    with pytest.raises(ConfigError, match=told) as refused:
        trained(settings)
    assert fix in str(refused.value)


def test_another_number_of_processes_needs_the_same_negatives(
    common: Settings, cut_in_two: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(cut_in_two, out)
    begun = json.loads((out / "checkpoints" / "run.json").read_text())
    (out / "checkpoints" / "run.json").write_text(json.dumps({**begun, "negatives": "local"}))
    with pytest.raises(ConfigError, match="--negatives local, which hold a user against the targets of 4 users"):
        trained(one({**common, "chunk_users": 1}, out))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"quantize": "nf4"}, "--sharding fsdp with --quantize nf4"),
        ({"gradient_steps": 1}, "--sharding fsdp with --gradient-steps 1"),
        ({"method": "sda"}, "--sharding fsdp with --method sda"),
    ],
)
def test_what_needs_whole_weights_is_refused(common: Settings, tmp_path: Path, settings: Settings, told: str) -> None:
    given = {**common, "negatives": "local", "users": 0, "sharding": "fsdp", "out": str(tmp_path / "out"), **settings}
    with pytest.raises(ConfigError, match=told):
        trained(given)
    assert not (tmp_path / "out").exists()


def test_a_backbone_that_takes_each_prompt_alone_is_refused(tiny: Tiny) -> None:
    backbone = Backbone.load(str(tiny("qwen3_5")), device="cpu")
    add_lora(backbone, 2, 4.0, 0.0, 0)
    with pytest.raises(ConfigError, match="--sharding fsdp with a qwen3_5"):
        backbone.shard(torch.device("cpu"))


def test_one_process_alone_has_nothing_to_share(
    common: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained({**one(common, tmp_path / "out"), "sharding": "fsdp", "max_steps": 1})
    assert "one process alone holds the whole model" in " ".join(capsys.readouterr().err.split())
    assert "sharding" not in json.loads((tmp_path / "out" / "vlm2rec.json").read_text())["training"]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sft", "vlm2rec"])
def test_sharded_and_whole_processes_take_over_from_each_other(common: Settings, loss: str, tmp_path: Path) -> None:
    settings = {**common, "loss": loss}
    trained(one(settings, tmp_path / "one"))
    trained(one(settings, tmp_path / "begun"), CUT)
    for name in ("one-sharded", "one-whole"):
        shutil.copytree(tmp_path / "begun", tmp_path / name)
    whole, cut = two(settings, tmp_path / "sharded"), two(settings, tmp_path / "cut")
    together(
        (whole, 0),
        (cut, CUT),
        (cut, 0),
        (two(settings, tmp_path / "one-sharded"), 0),
        (two(settings, tmp_path / "one-whole", "none"), 0),
        (two(settings, tmp_path / "whole-one", "none"), CUT),
        (two(settings, tmp_path / "whole-sharded", "none"), CUT),
        (two(settings, tmp_path / "whole-sharded"), 0),
    )
    trained(one(settings, tmp_path / "whole-one"))
    for name in ("sharded", "one-sharded", "one-whole", "whole-one", "whole-sharded"):
        assert_alike(tmp_path / name, tmp_path / "one")
    again, first = ((tmp_path / name / lora.WEIGHTS_FILE).read_bytes() for name in ("cut", "sharded"))
    assert again == first, "the same number of processes goes on to the bit"


@pytest.mark.slow
def test_a_sharded_run_with_dropout_and_bfloat16_goes_on_to_the_bit(common: Settings, tmp_path: Path) -> None:
    settings = {**common, "lora_dropout": 0.2, "dtype": "bfloat16", "negatives": "local", "chunk_users": 2}
    whole, cut = two(settings, tmp_path / "whole"), two(settings, tmp_path / "cut")
    together((whole, 0), (cut, CUT), (cut, 0))
    again, first = ((tmp_path / name / lora.WEIGHTS_FILE).read_bytes() for name in ("cut", "whole"))
    assert again == first
