"""What a training run of any recommender writes and reports, of RecBole's models and of the multimodal ones.

The output folder holds recommender.json (the settings; written first), checkpoint.safetensors (the best epoch),
users.parquet (with a dataset folder) and metrics.json (written last). No pickle is written or read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from vlm2rec.embedder.contract import provenance, publish, schema
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError
from vlm2rec.embedder.contract.storage import Location, sha256_file

if TYPE_CHECKING:
    import torch

CHECKPOINT_FILE = "checkpoint.safetensors"
OLD_CHECKPOINT_FILE = "checkpoint.pth"  # a pickle of earlier versions: never opened
RECORD_FILE = "recommender.json"
WRITER = "vlm2rec train-recommender"
# of recommender.json; a run of an earlier version has none of them
DATA, EMBEDDINGS = "data", "embeddings"  # folders
VECTORS = "vectors"  # the hash of the shards of that embeddings folder
CHECKPOINT_SHA256 = "checkpoint_sha256"  # of metrics.json


# --- the course of training -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Epoch:
    """One finished epoch."""

    number: int  # from 1
    loss: float  # mean over batches
    seconds: float
    score: float | None  # the validation metric, in epochs that validate
    alignment: float | None = None  # the part of the loss that aligns vectors with a table from item ids


@dataclass
class TrainingLog:
    """The course of a training run."""

    epochs: list[Epoch] = field(default_factory=list)
    best_epoch: int = 0
    seconds: float = 0.0

    def as_metrics(self, valid_metric: str) -> dict[str, Any]:
        """Return the keys of metrics.json that tell the course."""
        return {
            "epochs": len(self.epochs),
            "best_epoch": self.best_epoch,
            "seconds": round(self.seconds, 3),
            "curve": [
                {"epoch": e.number, "loss": e.loss, valid_metric: e.score, "seconds": round(e.seconds, 3)}
                | ({} if e.alignment is None else {"alignment": e.alignment})
                for e in self.epochs
            ],
        }


class Watcher(Protocol):
    """Follows the progress of training."""

    def begin(self, epochs: int, batches: int, valid_metric: str) -> None:
        """Training starts: at most `epochs` epochs of `batches` batches."""

    def batch(self) -> None:
        """A batch is finished."""

    def epoch(self, epoch: Epoch) -> None:
        """An epoch is finished."""


class NoWatcher:
    """A `Watcher` that does nothing."""

    def begin(self, epochs: int, batches: int, valid_metric: str) -> None:
        """See `Watcher`."""

    def batch(self) -> None:
        """See `Watcher`."""

    def epoch(self, epoch: Epoch) -> None:
        """See `Watcher`."""


@dataclass(frozen=True)
class Outcome:
    """A trained recommender."""

    metrics: dict[str, Any]  # as in metrics.json
    model: Any  # with the best epoch's parameters, in eval mode
    config: Any  # RecBole's Config, or the settings of a multimodal model
    folder: Path


def loss_is_not_a_number(epoch: int) -> ConfigError:
    """Return the error for a loss that is NaN or infinite in an epoch, counted from 1."""
    return ConfigError(
        f"the training loss of epoch {epoch} is not a number",
        "a finite loss",
        "lower the learning rate, or check the embeddings for extreme values",
    )


# --- the output folder ------------------------------------------------------------------------------------------
def begin(out: Path) -> None:
    """Take over the output folder, and remove what an earlier run in it wrote.

    Raises:
        ConfigError: `out` holds something else.
        ArtifactError: it cannot be written.
    """
    check_out(out)
    publish.require_writable(out)
    for stale in (schema.METRICS_FILE, schema.USERS_FILE, CHECKPOINT_FILE):
        publish.discard(out / stale)


def check_out(out: Path) -> None:
    """Raise `ConfigError` unless `out` is free, or holds an earlier run, whose files may be replaced."""
    ours = schema.is_written_by(out / RECORD_FILE, WRITER)
    if not ours and (out / schema.METRICS_FILE).is_file():  # a run of a version that left no record
        with suppress(ArtifactError):
            earlier = schema.read_json(out / schema.METRICS_FILE, "metrics", "choose another --out")
            ours = earlier.get("task") == 2 and "recbole" in earlier
    publish.require_ours(out, "an earlier run of train-recommender", ours=ours)


def write_record(
    out: Path, settings: Mapping[str, Any], data: Location | None = None, embeddings: Location | None = None
) -> None:
    """Write recommender.json: who wrote the folder, when, with which settings, and from which data and vectors."""
    vectors = None if embeddings is None else schema.shards_sha256(schema.read_manifest(embeddings))
    record = {
        "written_by": WRITER,
        "created": provenance.created(),
        "settings": settings,
        DATA: None if data is None else str(data.resolve()),
        EMBEDDINGS: None if embeddings is None else str(embeddings.resolve()),
        VECTORS: vectors,
    }
    schema.write_text(out / RECORD_FILE, json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n")


def write_metrics(out: Path, metrics: Mapping[str, Any], users: Sequence[pa.Table]) -> dict[str, Any]:
    """Write users.parquet, if there are tables for it, and metrics.json; return what the latter holds."""
    with publish.plain_disk_errors(out):
        if users:
            with publish.whole_file(out / schema.USERS_FILE) as file:
                pq.write_table(pa.concat_tables(users), file)
        written = {**metrics, CHECKPOINT_SHA256: sha256_file(out / CHECKPOINT_FILE)}
        schema.write_json(out / schema.METRICS_FILE, written)
        return written


# --- weights ------------------------------------------------------------------------------------------------------
def save_weights(model: Any, path: Path, about: Mapping[str, Any]) -> None:
    """Write a model's state as safetensors, whole or not at all; `about` is kept as JSON in the file's metadata.

    Equal weights are equal bytes: with several keys, safetensors would write them in any order.
    """
    from safetensors.torch import save_file

    # copies, because parts of one storage, as a GRU's weights on a GPU are, cannot be written
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
    with publish.whole_file(path) as file:
        save_file(state, file, metadata={"vlm2rec": json.dumps(about, sort_keys=True)})


def load_weights(path: Path, device: Any) -> dict[str, Any]:
    """Read the state of a model that `save_weights` wrote, as tensors on a device.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state: dict[str, Any] = load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{path} is missing or damaged ({error})", "weights as safetensors", "run the same command again"
        ) from None
    return state


def description_of(path: Path) -> dict[str, Any]:
    """Return the `about` of a file that `save_weights` wrote; empty if it has none.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("vlm2rec", "{}"))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is missing or damaged ({error})", "weights as safetensors", "run the same command again"
        ) from None
    return about if isinstance(about, dict) else {}


def usable_device(name: str) -> torch.device:
    """Return a device by its name (cpu, cuda, mps), or raise `ConfigError` if this machine has none."""
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(name.partition(":")[0], False):
        raise ConfigError(
            f"device {name!r} is not available here",
            f"one of {', '.join(kind for kind, found in available.items() if found)}, or auto",
            "change --device",
        )
    return torch.device(name)
