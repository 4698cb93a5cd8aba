"""Each cure for RecBole: still needed, sufficient, and gone afterwards."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from recommender_world import cyclic_sequences, write_atomic, write_dataset
from safetensors import safe_open

from vlm2rec.downstream import recommender
from vlm2rec.downstream.recbole import compat, run
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, MissingDependencyError

ITEMS = [f"i{number}" for number in range(24)]
SMALL = {"model": "SASRec", "hidden_size": 8, "inner_size": 8, "n_heads": 1, "epochs": 1, "train_neg_sample_args": None}


@pytest.fixture(scope="module")
def atomic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sequences = cyclic_sequences(ITEMS, 12)
    return write_atomic(tmp_path_factory.mktemp("atomic"), "small", sequences, [f"u{n}" for n in range(12)])


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A command line RecBole can read: pytest's own would be taken for its settings."""
    monkeypatch.setattr(sys, "argv", ["program"])
    return monkeypatch


def config(folder: Path, out: Path, **more: Any) -> Any:
    from recbole.config import Config

    settings = SMALL | {"dataset": "small", "data_path": str(folder), "checkpoint_dir": str(out), "gpu_id": "0"} | more
    settings["load_col"] = {"inter": ["user_id", "item_id", "timestamp"]}
    return Config(config_dict=settings)


# --- 1 quick_start and Ray ----------------------------------------------------------------------------------
def test_quick_start_cannot_be_imported_without_ray() -> None:
    script = "import sys; sys.modules['ray'] = None; import recbole.quick_start"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and "ray" in done.stderr


def test_training_works_without_ray_and_without_quick_start(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", cyclic_sequences(ITEMS, 12), ITEMS)
    script = f"""
import sys
sys.modules["ray"] = None
from vlm2rec.downstream.recbole.run import run
run({SMALL | {"eval_args": {"mode": "full"}}!r}, {str(tmp_path / "out")!r}, data={str(data)!r})
assert "recbole.quick_start" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "metrics.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]


# --- 2 NumPy names ------------------------------------------------------------------------------------------
def test_recbole_still_asks_numpy_for_names_it_removed(
    atomic: Path, tmp_path: Path, arguments: pytest.MonkeyPatch
) -> None:
    arguments.setattr(np, "bool", np.bool)  # what it sets before it fails is undone at the end of the test
    arguments.setattr(np, "int", None, raising=False)
    with pytest.raises(AttributeError, match=r"np\.float_"):
        config(atomic, tmp_path)


def test_numpy_is_afterwards_as_it_was_before(atomic: Path, tmp_path: Path) -> None:
    names = (*compat._REMOVED_NAMES, *compat._LEFT_BEHIND)
    before = {name: vars(np).get(name) for name in names}
    assert before["float_"] is None and before["unicode"] is None
    with compat.cured(tmp_path):
        config(atomic, tmp_path)
        assert None not in {name: vars(np).get(name) for name in names}.values()
    assert {name: vars(np).get(name) for name in names} == before


# --- 3 checkpoints ------------------------------------------------------------------------------------------
class Planted:
    """A pickle that ends the test as soon as it is opened."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return pytest.fail, ("a pickle was opened",)


def plant(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(Planted()))
    return path


def test_weights_come_back_from_safetensors_with_the_mode_of_the_umask(atomic: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        settings = SMALL | {"dataset": "small", "data_path": str(atomic), "load_col": None}
        outcome = run.run(settings, tmp_path / "out", device="cpu")
    finally:
        os.umask(before)
    checkpoint = tmp_path / "out" / "checkpoint.safetensors"
    loaded = recommender.load_weights(checkpoint, torch.device("cpu"))
    assert loaded.keys() == outcome.model.state_dict().keys()
    with safe_open(checkpoint, "pt") as file:
        about = json.loads(file.metadata()["vlm2rec"])
    assert about == {"written_by": "vlm2rec train-recommender", "model": SMALL["model"], "epoch": 1}
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(b"\x08")
    for name in ("checkpoint.safetensors", "none.safetensors"):
        with pytest.raises(ArtifactError, match=f"{name} is missing or damaged"):
            recommender.load_weights(tmp_path / name, "cpu")


def test_recbole_still_opens_a_pickle_that_lies_in_its_checkpoint_folder(
    atomic: Path, tmp_path: Path, arguments: pytest.MonkeyPatch
) -> None:
    from recbole.data.utils import create_dataset

    plant(tmp_path / "small-SequentialDataset.pth")
    with compat.cured(tmp_path), pytest.raises(pytest.fail.Exception, match="a pickle was opened"):
        create_dataset(config(atomic, tmp_path))


def test_pickles_planted_beside_an_earlier_run_are_not_opened(atomic: Path, tmp_path: Path) -> None:
    settings = SMALL | {"dataset": "small", "data_path": str(atomic), "load_col": None}
    first = run.run(settings, tmp_path / "out", device="cpu").metrics
    names = ("small-SequentialDataset", "small-Dataset", "small-for-SASRec-dataloader", "checkpoint", "SASRec-saved")
    planted = [plant(tmp_path / "out" / f"{name}.pth") for name in names]
    second = run.run(settings, tmp_path / "out", device="cpu").metrics
    assert second["recbole"] == first["recbole"]
    assert all(path.is_file() for path in planted)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dataset_save_path", "theirs.pth"),
        ("dataset_save_path", "without-an-ending"),
        ("dataloaders_save_path", "theirs.pth"),
        ("save_dataset", True),
        ("save_dataloaders", True),
        ("pre_model_path", "pretrained.pth"),
        ("pretrain_path", "saved"),
        ("checkpoint_file", "saved"),
        ("anything_else", "weights.PTH"),
        ("anything_else", "weights.pkl"),
    ],
)
def test_settings_that_lead_to_a_pickle_are_refused(key: str, value: Any, atomic: Path, tmp_path: Path) -> None:
    settings = SMALL | {"dataset": "small", "data_path": str(atomic), key: value}
    with pytest.raises(ConfigError, match=f"{key}.*pickle.*remove `{key}`"):
        run.run(settings, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_such_settings_are_let_pass_where_they_are_switched_off(atomic: Path, tmp_path: Path) -> None:
    off = {"dataset_save_path": None, "save_dataset": False, "dataloaders_save_path": None, "log_wandb": False}
    settings = SMALL | {"dataset": "small", "data_path": str(atomic), "load_col": None} | off
    assert run.run(settings, tmp_path / "out", device="cpu").metrics["epochs"] == 1


@pytest.mark.parametrize(("key", "value"), [("log_wandb", True), ("local_rank", 0)])
def test_settings_that_lead_to_other_machines_are_refused(key: str, value: Any, atomic: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{key}.*other machines"):
        run.run(SMALL | {"dataset": "small", "data_path": str(atomic), key: value}, tmp_path / "out", device="cpu")


# --- 4 pandas -----------------------------------------------------------------------------------------------
def test_filling_in_place_is_lost_with_the_semantics_of_pandas_3() -> None:
    def filled(**options: Any) -> float:
        with pd.option_context("mode.copy_on_write", options["copy_on_write"]):
            frame = pd.DataFrame({"x": [1.0, float("nan")]})
            with pytest.warns((FutureWarning, pd.errors.ChainedAssignmentError)):
                frame["x"].fillna(value=0, inplace=True)
        return float(frame["x"][1])

    assert filled(copy_on_write=False) == 0.0
    assert np.isnan(filled(copy_on_write=True))


def test_pandas_3_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pd, "__version__", "3.0.1")
    with pytest.raises(MissingDependencyError, match=r"pandas>=2.2,<3"):
        compat.require_recbole()


def test_a_missing_recbole_is_an_error_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "recbole.config", None)
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps recbole==1\.2\.1 thop"):
        compat.require_recbole()


# --- 5 cross-entropy ----------------------------------------------------------------------------------------
def test_recbole_still_stops_at_cross_entropy_with_its_own_default_sampling(atomic: Path, tmp_path: Path) -> None:
    default = {"distribution": "uniform", "sample_num": 1}
    with compat.cured(tmp_path), pytest.raises(ValueError, match="should be None"):
        config(atomic, tmp_path, train_neg_sample_args=default)


@pytest.mark.parametrize(
    ("settings", "defaults", "expected"),
    [
        ({}, {"loss_type": "CE"}, True),
        ({"loss_type": "CE"}, {"loss_type": "BPR"}, True),
        ({"loss_type": "BPR"}, {"loss_type": "CE"}, False),
        ({"train_neg_sample_args": None}, {"loss_type": "CE"}, False),
        ({"train_neg_sample_args": {"distribution": "uniform"}}, {"loss_type": "CE"}, False),
        ({}, {}, False),
    ],
)
def test_sampling_is_switched_off_for_cross_entropy_only_where_the_settings_are_silent(
    settings: dict[str, Any], defaults: dict[str, Any], expected: bool
) -> None:
    assert compat.without_negative_sampling(settings, defaults) is expected


# --- 6 anomaly detection ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("before", "after"),
    [("import recbole.model.sequential_recommender", "True"), ("compat.require_recbole()", "False")],
)
def test_importing_a_recbole_model_still_slows_autograd_down_and_the_cure_lifts_that(
    before: str, after: str, tmp_path: Path
) -> None:
    script = f"""
import torch
from pathlib import Path
from vlm2rec.downstream.recbole import compat
{before}
with compat.cured(Path({str(tmp_path)!r})):
    print(torch.is_anomaly_enabled())
print(torch.is_anomaly_enabled())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["False", after], done.stderr


# --- side effects -------------------------------------------------------------------------------------------
def test_recbole_still_reads_the_command_line_and_the_cure_hides_it(
    atomic: Path, tmp_path: Path, arguments: pytest.MonkeyPatch
) -> None:
    arguments.setattr(sys, "argv", ["program", "--seed=7", "--hidden_size=4"])
    with compat._numpy_names():
        assert config(atomic, tmp_path)["seed"] == 7
    with compat.cured(tmp_path):
        assert config(atomic, tmp_path)["seed"] == 2020
    assert sys.argv == ["program", "--seed=7", "--hidden_size=4"]


def test_recbole_still_sets_the_visible_devices_and_the_cure_restores_them(
    atomic: Path, tmp_path: Path, arguments: pytest.MonkeyPatch
) -> None:
    arguments.setenv("CUDA_VISIBLE_DEVICES", "3")
    with compat.cured(tmp_path):
        config(atomic, tmp_path)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_recboles_tensorboard_files_stay_out_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import recbole.trainer.trainer as trainer

    monkeypatch.chdir(tmp_path)
    with compat.cured(tmp_path / "out"):
        trainer.get_tensorboard(logging.getLogger()).add_scalar("x", 1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    trainer.get_tensorboard(logging.getLogger()).close()
    assert (tmp_path / "log_tensorboard").is_dir()


def test_recboles_log_goes_to_a_file_and_only_its_warnings_to_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    with compat.cured(tmp_path):
        root.info("\x1b[1;34mepoch 0\x1b[0m training")
        root.warning("\x1b[1;31mline 7\x1b[0m will be removed")
    assert (root.handlers, root.level) == before
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == "RecBole: line 7 will be removed\n"
    written = (tmp_path / "recbole.log").read_text()
    assert "INFO epoch 0 training" in written and "WARNING line 7" in written
