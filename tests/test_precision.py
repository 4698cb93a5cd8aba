"""How exact matrix products are: oneDNN for float32 on a CPU, and `train_matmul_precision` of a recommender."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recommender_world import write_circle

from vlm2rec.downstream.recbole import precision
from vlm2rec.downstream.recbole.run import run
from vlm2rec.downstream.recommender import NoWatcher
from vlm2rec.embedder.backbones import devices
from vlm2rec.embedder.backbones.devices import speed_up_float32
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.pipelines import train_recommender
from vlm2rec.pipelines.config import TrainRecommenderConfig

ITEMS = [f"i{number}" for number in range(30)]
CPU = torch.device("cpu")
AMD = {"cpu_name": "AMD EPYC", "avx512_f": True}


@pytest.fixture(autouse=True)
def default_precision() -> Iterator[None]:
    """Start at torch's default, and leave what this process has chosen."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dataset whose users go round a circle of items, and vectors of the circle."""
    return write_circle(tmp_path_factory.mktemp("circle"), ITEMS, users=40)


class Precisions(NoWatcher):
    """Notes the precision of every batch."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def batch(self) -> None:
        self.seen.add(torch.get_float32_matmul_precision())


# --- float32 on a CPU ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("processor", "tiles", "expected"),
    [
        (AMD, False, "medium"),
        (AMD | {"avx512_f": False}, False, "highest"),
        (AMD, True, "highest"),  # it would round
        (AMD | {"cpu_name": "Intel(R) Xeon(R)"}, False, "highest"),  # MKL has code for it
        ({}, False, "highest"),
    ],
)
def test_onednn_multiplies_where_mkl_uses_half_of_the_processor(
    processor: dict[str, Any], tiles: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    speed_up_float32(CPU)
    assert torch.get_float32_matmul_precision() == expected


def test_a_gpu_or_a_choice_made_before_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMD)
    speed_up_float32(torch.device("meta"))
    assert torch.get_float32_matmul_precision() == "highest"
    torch.set_float32_matmul_precision("high")
    speed_up_float32(CPU)
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    speed_up_float32(CPU)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("shape", [(1, 576, 192), (7, 64, 3000), (300, 576, 1536), (513, 100, 33)])
def test_products_stay_float32_on_this_processor(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    generator = torch.Generator().manual_seed(rows)
    left, right = torch.randn(rows, inner, generator=generator), torch.randn(inner, columns, generator=generator)
    exact = left.double() @ right.double()
    size = left.double().abs() @ right.double().abs()  # what rounding errors are relative to
    speed_up_float32(CPU)
    for found in (left @ right, torch.nn.functional.linear(left, right.T.contiguous())):
        error = ((found.double() - exact).abs() / size).max()
        assert error < 1e-6  # factors rounded to bfloat16 have 1e-3


# --- a recommender's training --------------------------------------------------------------------------------------
@pytest.mark.parametrize("asked", ["highest", "high", "medium"])
def test_a_training_multiplies_as_it_is_asked_to_and_gives_the_process_back(
    asked: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = {"model": "SASRec", "n_layers": 1, "hidden_size": 16, "inner_size": 16, "MAX_ITEM_LIST_LENGTH": 6}
    settings |= {"loss_type": "CE", "epochs": 2, "topk": [5], "valid_metric": "NDCG@5", precision.KEY: asked}
    watcher = Precisions()
    outcome = run(settings, tmp_path / "run", data=folders[0], device="cpu", watcher=watcher)
    assert watcher.seen == {asked}
    assert torch.get_float32_matmul_precision() == "highest"
    assert outcome.metrics.get("matmul_precision", "highest") == asked


@pytest.mark.parametrize("asked", ["highest", "high", "medium"])
def test_a_library_that_the_process_has_chosen_is_kept(asked: Any) -> None:
    torch.set_float32_matmul_precision("medium")
    with precision.multiplying(asked):
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == "medium"


def test_a_precision_that_was_set_for_one_library_alone_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMD)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # torch has no common word for this
    try:
        assert devices.matmul_precision() == ""
        speed_up_float32(CPU)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        assert not devices.onednn_multiplies_float32()
        assert (torch.ones(2, 3) @ torch.ones(3, 2)).tolist() == [[3.0, 3.0], [3.0, 3.0]]
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_flag_reaches_the_training(folders: tuple[Path, Path], tmp_path: Path) -> None:
    metrics = train_recommender.run(config_of(folders, tmp_path, model="GRU4Rec"))
    assert metrics["matmul_precision"] == "medium"


def test_what_cannot_be_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one of highest, high, medium"):
        precision.read_precision({precision.KEY: "low"})
    with pytest.raises(ConfigError, match="--matmul-precision with VBPR"):
        train_recommender.run(config_of(folders, tmp_path, model="VBPR"))


def config_of(folders: tuple[Path, Path], tmp_path: Path, model: str) -> TrainRecommenderConfig:
    """Return the settings of a short training with bfloat16 allowed."""
    return TrainRecommenderConfig(
        data=folders[0],
        embeddings=folders[1],
        out=tmp_path / "run",
        model=model,
        matmul_precision="medium",
        hidden_size=16,
        max_epochs=1,
        device="cpu",
    )
