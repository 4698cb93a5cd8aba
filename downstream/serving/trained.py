"""A finished run of train-recommender, opened to serve: scores after any history, and its item table."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlm2rec.downstream import recommender
from vlm2rec.downstream.recbole import compat, plugin
from vlm2rec.downstream.recbole.alignment import ITEMS, hash_of
from vlm2rec.downstream.recbole.run import history_scores, recbole_config_of
from vlm2rec.downstream.recommender import CHECKPOINT_FILE, RECORD_FILE
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError
from vlm2rec.embedder.contract.storage import Location, location, sha256_file

_WHAT, _AGAIN = "a finished run of train-recommender", "run train-recommender again"
_ALIGNMENT = (plugin.ALIGN_WITH, plugin.ALIGN_WEIGHT, plugin.ALIGN_TAU)  # of the loss alone


@dataclass(frozen=True)
class Run:
    """What a folder of train-recommender says, checked but for the weights."""

    folder: Path
    model: str
    settings: dict[str, Any]  # RecBole's keys
    dataset: Dataset  # the items that were trained on or ranked
    embeddings: Location | None  # None: the model has no frozen vectors
    item_ids: list[str]  # of RecBole's items 1, 2, ...
    checkpoint_sha256: str
    unproven: str | None  # what a run of an earlier version does not record, and so could not be checked


def read_run(folder: Path, data: Location | None = None, embeddings: Location | None = None) -> Run:
    """Read the folder of a run.

    Args:
        folder: the run.
        data: its dataset folder; default: the one that it names.
        embeddings: the folder of its vectors; default: the one that it names.

    Raises:
        ConfigError: the model has no user but those of its training, or the run is of a dataset of RecBole's own.
        ArtifactError: the run is unfinished or damaged, or the dataset or the vectors are not those of the run.
    """
    record = schema.read_json(folder / RECORD_FILE, _WHAT, _AGAIN)
    metrics = schema.read_json(folder / schema.METRICS_FILE, f"{_WHAT}, whose {schema.METRICS_FILE} is last", _AGAIN)
    settings, model = record.get("settings"), metrics.get("model")
    if record.get("written_by") != recommender.WRITER or not isinstance(settings, dict):
        raise ArtifactError(f"{folder / RECORD_FILE} is not of train-recommender", _WHAT, _AGAIN)
    if model in schema.MULTIMODAL:
        raise ConfigError(
            f"{folder} is a run of {model}, which can rank only for the users it was trained on: it reads no history",
            f"a run of {', '.join(schema.SEQUENTIAL)}",
            "train one of these, or recommend by vectors with --embeddings",
        )
    if model not in schema.SEQUENTIAL:
        raise ArtifactError(f"{folder / schema.METRICS_FILE} names the model {str(model)[:40]!r}", _WHAT, _AGAIN)
    checkpoint = folder / CHECKPOINT_FILE
    about = recommender.description_of(checkpoint)
    sha256 = sha256_file(checkpoint)
    if metrics.get(recommender.CHECKPOINT_SHA256) not in (None, sha256):
        raise ArtifactError(f"{checkpoint} is not the file that the run wrote (SHA-256 differs)", _WHAT, _AGAIN)
    dataset = _dataset(folder, record, metrics, data)
    tokens = _item_tokens(dataset)
    if about.get(ITEMS) != hash_of(tokens):
        found = "does not record its items" if about.get(ITEMS) is None else f"has other items than {dataset.path}"
        raise ArtifactError(f"{folder} {found}", "the dataset folder that it was trained on", "name it with --data")
    start = plugin.read_flag({key: value for key, value in settings.items() if key not in _ALIGNMENT})
    vectors, unproven = None, None if recommender.CHECKPOINT_SHA256 in metrics else "the bytes of its checkpoint"
    if start is not None and start.mode != "table":
        vectors = embeddings or location(str(record.get(recommender.EMBEDDINGS) or start.folder))
        manifest = schema.read_manifest(vectors)
        recorded = record.get(recommender.VECTORS)
        if recorded not in (None, schema.shards_sha256(manifest)):
            raise ArtifactError(
                f"{vectors} holds other vectors than those that {folder} was trained from",
                "the embeddings folder of the run, unchanged",
                "name it with --embeddings, or train again",
            )
        unproven = unproven if recorded else "which vectors it was trained from"
    return Run(folder, str(model), settings, dataset, vectors, tokens, sha256, unproven)


def _dataset(folder: Path, record: dict[str, Any], metrics: dict[str, Any], data: Location | None) -> Dataset:
    if metrics.get("candidates") is None:
        raise ConfigError(
            f"{folder} is a run on a dataset of RecBole's own",
            "a run on a dataset folder (--data)",
            "run train-recommender with --data",
        )
    named = data or record.get(recommender.DATA)
    if not named:
        raise ConfigError(f"{folder} does not name its dataset folder", "the folder it was trained on", "give --data")
    return Dataset(named).warm()


def _item_tokens(dataset: Dataset) -> list[str]:
    compat.require_recbole()
    from vlm2rec.downstream.recbole.dataset import item_tokens_of

    return item_tokens_of(dataset)


class _Items:
    """What RecBole's models and the plugin ask of a dataset."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.iid_field, self.item_num, self.user_num = "item_id", len(tokens) + 1, 1
        self.field2id_token = {self.iid_field: np.array(["[PAD]", *tokens], object)}
        self.inter_feat: dict[str, Any] = {}

    def num(self, field: str) -> int:
        """Return how many values a field has."""
        return self.item_num


class TrainedRecommender:
    """A run with its weights, in eval mode."""

    def __init__(self, run: Run, device: str = "auto") -> None:
        """Load the weights; every one of them has to fit.

        Raises:
            ArtifactError: the checkpoint is damaged, or is not of the settings of the run.
            ConfigError: the device is not usable, or RecBole refuses the settings.
        """
        compat.require_recbole()
        from recbole.utils import get_model

        self.run = run
        leave_out = _ALIGNMENT if run.embeddings is not None else plugin.KEYS
        settings = {key: value for key, value in run.settings.items() if key not in leave_out}
        if run.embeddings is not None:
            settings[plugin.INIT] = str(run.embeddings)
        with tempfile.TemporaryDirectory(prefix="vlm2rec-") as scratch, compat.cured(Path(scratch)):
            self.config = recbole_config_of([settings], settings, run.dataset, Path(scratch), device)
            if run.embeddings is not None:
                plugin.install()
            self.model = get_model(run.model)(self.config, _Items(run.item_ids)).to(self.config["device"])
        weights = recommender.load_weights(run.folder / CHECKPOINT_FILE, self.config["device"])
        try:
            self.model.load_state_dict(weights, strict=True)
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise ArtifactError(
                f"the weights of {run.folder} do not fit its settings ({first})", "those of one run", _AGAIN
            ) from None
        self.model.eval()

    def scores(self, histories: Sequence[np.ndarray]) -> torch.Tensor:
        """Return the score of each item of `run.item_ids` after n histories, (n, I); histories are rows of that list.

        Only the latest items count, as many as the model was trained with.
        """
        found = history_scores(self.model, self.config, [history.astype(np.int64) + 1 for history in histories])
        return found[:, 1 : len(self.run.item_ids) + 1].float()

    def table(self) -> np.ndarray:
        """Return the vector of each item of `run.item_ids` as the model reads it, (I, width) float32."""
        with torch.no_grad():
            rows = self.model.item_embedding.weight[1 : len(self.run.item_ids) + 1]
        return np.asarray(rows.detach().float().cpu().numpy(), np.float32)


@dataclass(frozen=True)
class ScoreSearch:
    """Searches by a recommender's scores. Its users are histories, none of them empty."""

    recommender: TrainedRecommender
    histories: Sequence[np.ndarray]

    def best(self, users: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See `top_items.Search`."""
        step = max(1, 2**24 // len(self.recommender.run.item_ids))
        rows, scores = [], []
        for start in range(0, len(users), step):
            found = self.recommender.scores([self.histories[user] for user in users[start : start + step]])
            best = found.topk(min(count, found.shape[1]), dim=1)
            rows.append(best.indices.cpu().numpy())
            scores.append(best.values.cpu().numpy())
        return np.concatenate(rows), np.concatenate(scores)
