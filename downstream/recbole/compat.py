"""What RecBole 1.2.1, the last release, needs with current libraries. The fixes apply only while RecBole runs.

1. `recbole.quick_start` imports Ray Tune, and RecBole pins a Ray release that exists for no current Python. Nothing
   here imports quick_start: `recbole.config`, `.data`, `.model` and `.trainer` do the same work without Ray, so
   RecBole is installed with `--no-deps`.
2. `Config` uses `np.float_`, `np.complex_` and `np.unicode_`, which NumPy 2 removed: `_numpy_names`. It also adds
   eight aliases such as `np.str` to NumPy; they are removed again.
3. RecBole keeps checkpoints, datasets and data loaders as pickles, and opens those that a setting names or that lie in
   its checkpoint folder under certain names. A pickle can run any code. `refuse_pickles` refuses the settings, `cured`
   lets RecBole look for no file, and `recommender.py` keeps the weights as safetensors.
4. pandas 3 turns RecBole's `fillna(inplace=True)` into a silent no-op, so that padding becomes a huge negative
   number: `require_recbole` refuses pandas 3.
5. Cross-entropy (the default loss of SASRec, GRU4Rec and BERT4Rec) stops with a ValueError unless
   `train_neg_sample_args` is null: `without_negative_sampling` says when to set it.
6. Importing any sequential model imports SINE, whose file turns on autograd's anomaly detection for the whole process:
   a stack trace is taken at every operation, and training takes about twice the time. `require_recbole` undoes that.

Besides, RecBole itself reads `sys.argv` (`--key=value` there overrides every file), sets CUDA_VISIBLE_DEVICES for the
whole process, logs to the root logger, and writes `./log_tensorboard`. `cured` keeps all that away from the caller.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vlm2rec.embedder.contract.errors import ConfigError, MissingDependencyError

LOG_FILE = "recbole.log"
TENSORBOARD = "tensorboard"
INSTALL = "pip install 'vlm2rec[recbole]' && pip install --no-deps recbole==1.2.1 thop"

# What `Config.compatibility_settings` reads and what it leaves behind
_REMOVED_NAMES = {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_}
_LEFT_BEHIND = ("bool", "int", "float", "complex", "object", "str", "long", "unicode")

# keys whose value is a file that RecBole unpickles, or that make it write one
_PICKLES = frozenset(
    {"dataset_save_path", "dataloaders_save_path", "save_dataset", "save_dataloaders"}
    | {"checkpoint_file", "resume_file", "model_file", "saved_model_file", "load_model", "load_checkpoint"}
    | {"pre_model_path", "pretrain_path", "mf_pretrain_path", "mlp_pretrain_path"}
)
_PICKLE_NAMES = (".pth", ".pt", ".pkl", ".pickle", ".ckpt", ".joblib")
# Weights & Biases; training over several machines, which `local_rank` switches on
_NETWORK = frozenset({"log_wandb", "local_rank"})

# (message, category) of warnings from libraries, with the versions of constraints.txt
_LIBRARY_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # RecBole 1.2.1 makes its gradient scaler by the old name, even if it is switched off
    (r"`torch\.cuda\.amp\.GradScaler\(args\.\.\.\)` is deprecated", FutureWarning),
    # RecBole sorts torch tensors with `np.argsort`
    (r"__array_wrap__ must accept context and return_scalar arguments", DeprecationWarning),
    # pandas 2 warns of what pandas 3 breaks, see 4
    (r"A value is trying to be set on a copy of a DataFrame or Series through chained assignment", FutureWarning),
)


def require_recbole() -> None:
    """Raise `MissingDependencyError` unless RecBole and a pandas below 3 can be imported."""
    import torch

    detecting = torch.is_anomaly_enabled()
    try:
        import pandas
        import recbole.config
        import recbole.data
        import recbole.model.sequential_recommender
        import recbole.trainer  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"RecBole cannot be imported ({error})", "RecBole 1.2.1 beside vlm2rec", INSTALL
        ) from None
    finally:
        torch.autograd.set_detect_anomaly(detecting)
    if int(pandas.__version__.split(".")[0]) >= 3:
        raise MissingDependencyError(
            f"pandas {pandas.__version__} is installed",
            "pandas below 3: RecBole silently misreads data with pandas 3",
            "pip install 'pandas>=2.2,<3'",
        )


@contextmanager
def cured(folder: Path) -> Iterator[None]:
    """Run RecBole inside this block, with the fixes; side effects stay in `folder` or are undone at the end.

    Args:
        folder: receives RecBole's own log, `recbole.log`, and its TensorBoard files. An old log is replaced.

    Raises:
        ConfigError: the folder for TensorBoard is a link to elsewhere.
    """
    with ExitStack() as stack:
        cures = (_numpy_names(), _no_arguments(), _same_devices(), _no_pickles(), _own_log(folder / LOG_FILE))
        for cure in cures:
            stack.enter_context(cure)
        stack.enter_context(_tensorboard_in(folder / TENSORBOARD))
        stack.enter_context(_without_library_warnings())
        stack.enter_context(_without_anomaly_detection())
        yield


def without_negative_sampling(settings: Mapping[str, Any], model_defaults: Mapping[str, Any]) -> bool:
    """Return whether `train_neg_sample_args: null` has to be added: for cross-entropy, if the settings lack the key.

    Args:
        settings: the user's settings.
        model_defaults: RecBole's own defaults of the model.
    """
    loss = settings.get("loss_type", model_defaults.get("loss_type"))
    return loss == "CE" and "train_neg_sample_args" not in settings


def refuse_pickles(settings: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for settings with which RecBole opens or writes pickles, or connects to an address."""
    for key, value in settings.items():
        if value is None or value is False or value == "":
            continue
        if key in _PICKLES or (isinstance(value, str) and value.lower().endswith(_PICKLE_NAMES)):
            raise ConfigError(
                f"the setting {key}: {value!r} names a file that RecBole keeps as a pickle, which can run any code",
                "no pickles: vlm2rec writes and reads weights as safetensors, and prepares the data again for each run",
                f"remove `{key}`",
            )
        if key in _NETWORK:
            raise ConfigError(
                f"the setting {key}: {value!r} makes RecBole connect to other machines",
                "a run on this machine alone",
                f"remove `{key}`",
            )


@contextmanager
def _no_pickles() -> Iterator[None]:
    """Keep RecBole from looking for stored data loaders, and from storing them."""
    import recbole.data.utils as data

    load, save = data.load_split_dataloaders, data.save_split_dataloaders
    data.load_split_dataloaders = lambda config: None
    data.save_split_dataloaders = lambda config, dataloaders: None
    try:
        yield
    finally:
        data.load_split_dataloaders, data.save_split_dataloaders = load, save


@contextmanager
def _numpy_names() -> Iterator[None]:
    before = {name: vars(np)[name] for name in (*_REMOVED_NAMES, *_LEFT_BEHIND) if name in vars(np)}
    for name, value in _REMOVED_NAMES.items():
        if name not in before:
            setattr(np, name, value)
    try:
        yield
    finally:
        for name in (*_REMOVED_NAMES, *_LEFT_BEHIND):
            if name in before:
                setattr(np, name, before[name])
            elif name in vars(np):
                delattr(np, name)


@contextmanager
def _no_arguments() -> Iterator[None]:
    arguments = sys.argv
    sys.argv = arguments[:1]
    try:
        yield
    finally:
        sys.argv = arguments


@contextmanager
def _same_devices() -> Iterator[None]:
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        yield
    finally:
        if devices is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = devices


class _PlainText(logging.Formatter):
    """Removes the terminal colours that RecBole puts into its messages."""

    def format(self, record: logging.LogRecord) -> str:
        return re.sub(r"\x1b\[[0-9;]*m", "", super().format(record))


class _LogFile(logging.FileHandler):
    """Raises what goes wrong, a full disk for instance, where logging would print a stack trace and go on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        raise


class _ToStderr(logging.Handler):
    """Reads `sys.stderr` at each message, because a progress bar replaces it temporarily."""

    def emit(self, record: logging.LogRecord) -> None:
        name = "RecBole" if record.name == "root" else record.name
        print(f"{name}: {self.format(record)}", file=sys.stderr)


@contextmanager
def _own_log(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # a link would lead the log into another file
    to_file = _LogFile(path, mode="w", encoding="utf-8")
    to_file.setFormatter(_PlainText("%(asctime)s %(levelname)s %(message)s"))
    to_terminal = _ToStderr(logging.WARNING)
    to_terminal.setFormatter(_PlainText("%(message)s"))
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = [to_file, to_terminal]
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        to_file.close()


@contextmanager
def _tensorboard_in(folder: Path) -> Iterator[None]:
    import recbole.trainer.trainer as trainer
    from torch.utils.tensorboard import SummaryWriter

    if folder.is_symlink():
        raise ConfigError(f"{folder} is a link", "a folder of its own", "remove the link, or choose another --out")
    opened: list[Any] = []

    def writer(logger: logging.Logger) -> Any:
        opened.append(SummaryWriter(str(folder)))
        return opened[-1]

    original, trainer.get_tensorboard = trainer.get_tensorboard, writer
    try:
        yield
    finally:
        trainer.get_tensorboard = original
        for each in opened:
            each.close()


@contextmanager
def _without_anomaly_detection() -> Iterator[None]:
    import recbole.model.sequential_recommender  # noqa: F401
    from torch.autograd import set_detect_anomaly

    with set_detect_anomaly(False):
        yield


@contextmanager
def _without_library_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        for message, category in _LIBRARY_WARNINGS:
            warnings.filterwarnings("ignore", message, category)
        yield
