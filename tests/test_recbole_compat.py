"""Each cure for RecBole: still needed, sufficient, and gone afterwards."""

from __future__ import annotations

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

from vlm2rec.downstream.recbole import compat, run
from vlm2rec.embedder.contract.errors import MissingDependencyError

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
@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4:UserWarning")
def test_torch_still_refuses_recboles_checkpoint_and_our_reader_takes_our_own(atomic: Path, tmp_path: Path) -> None:
    outcome = run.run(
        SMALL | {"dataset": "small", "data_path": str(atomic), "load_col": None}, tmp_path / "out", device="cpu"
    )
    checkpoint = tmp_path / "out" / "checkpoint.pth"
    with pytest.raises(pickle.UnpicklingError):
        torch.load(checkpoint)
    loaded = compat.load_own_checkpoint(checkpoint, torch.device("cpu"))
    assert loaded["state_dict"].keys() == outcome.model.state_dict().keys()


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
