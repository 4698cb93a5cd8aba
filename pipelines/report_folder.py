"""What a run folder holds: each stage's output is found by its content and named by its folder.

`vlm2rec demo` lays a run out as `data/ adapter-sft/ embeddings-sft/ evaluate-sft/ recommender-SASRec-sft/ ... index/`.
Any folder with some of these works. A part that is damaged or unfinished becomes a note, so that one broken output
does not hide the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm2rec.embedder import schema
from vlm2rec.embedder.dataset import Dataset
from vlm2rec.embedder.errors import ArtifactError, Vlm2RecError

DEMO_FILE = "demo.json"
METRICS_FILE = "metrics.json"
USERS_FILE = "users.parquet"
CURVES_FILE = "curves.json"
ADAPTER_FILE = "vlm2rec.json"
INDEX_FILE = "index.json"

ID, VANILLA, SFT, VLM2REC = "id", "vanilla", "sft", "vlm2rec"
METHOD_NAMES = {ID: "ID", VANILLA: "Vanilla", SFT: "SFT", VLM2REC: "VLM2Rec"}

Json = dict[str, Any]


def method_name(method: str) -> str:
    """Return how a method is called in print: the paper's name, or the folder's own."""
    return METHOD_NAMES.get(method, method)


def in_order(methods: list[str]) -> list[str]:
    """Sort methods as the tables list them: ID, vanilla, anything else, SFT, VLM2Rec."""
    places = {ID: 0, VANILLA: 1, SFT: 3, VLM2REC: 4}
    return sorted(methods, key=lambda method: (places.get(method, 2), method))


@dataclass
class RunFolder:
    """The outputs found in a run folder, by method ("vanilla", "sft", "vlm2rec", or the folder's name)."""

    path: Path
    demo: Json | None = None
    dataset: Dataset | None = None
    adapters: dict[str, Json] = field(default_factory=dict)  # vlm2rec.json
    curves: dict[str, Json] = field(default_factory=dict)
    embeddings: dict[str, Path] = field(default_factory=dict)
    manifests: dict[str, Json] = field(default_factory=dict)
    evaluations: dict[str, Json] = field(default_factory=dict)  # Task 1 metrics.json
    recommenders: dict[str, dict[str, Json]] = field(default_factory=dict)  # model → method → Task 2 metrics.json
    users: dict[tuple[str, str], Path] = field(default_factory=dict)  # (model or "", method) → users.parquet
    index: Json | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether no stage's output was found."""
        return not (
            self.dataset or self.curves or self.embeddings or self.evaluations or self.recommenders or self.index
        )


def read_run(path: Path) -> RunFolder:
    """Find every stage's output in `path` and its subfolders.

    Raises:
        ArtifactError: `path` is not a folder, or nothing in it was written by vlm2rec.
    """
    if not path.is_dir():
        raise ArtifactError(
            f"{path} is not a folder", "a folder with the stages' outputs", "run `vlm2rec demo`, or give --run another"
        )
    run = RunFolder(path)
    folders = [path, *sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))]
    for folder in folders:
        for found in (_demo, _dataset, _adapter, _embeddings, _metrics, _index):
            try:
                found(run, folder)
            except Vlm2RecError as error:
                run.notes.append(str(error))
    run.recommenders = {model: run.recommenders[model] for model in sorted(run.recommenders, key=_model_place)}
    _dataset_of_the_embeddings(run)
    if run.empty:
        raise ArtifactError(
            f"{path} holds no output of vlm2rec{_and(run.notes)}",
            "subfolders written by prepare, finetune, export-items, evaluate, train-recommender or build-index",
            "give --run the folder above them",
        )
    return run


def _model_place(model: str) -> tuple[int, str]:
    known = ("SASRec", "GRU4Rec", "BERT4Rec")
    return (known.index(model) if model in known else len(known), model)


def _and(notes: list[str]) -> str:
    return f" that can be read ({notes[0].rstrip('.')})" if notes else ""


def _label(folder: Path, prefix: str) -> str:
    """`evaluate-SFT` → `sft`; a folder named otherwise keeps its name."""
    name = folder.name.removeprefix(prefix)
    return name.lower() if name.lower() in METHOD_NAMES else name


def _read(folder: Path, file: str, what: str) -> Json | None:
    if not (folder / file).is_file():
        return None
    return schema.read_json(folder / file, what, "run the stage again that wrote this folder")


def _demo(run: RunFolder, folder: Path) -> None:
    if folder == run.path:
        run.demo = _read(folder, DEMO_FILE, "what `vlm2rec demo` noted")


def _dataset(run: RunFolder, folder: Path) -> None:
    if run.dataset is None and (folder / schema.DATASET_FILE).is_file():
        dataset = Dataset(folder)
        assert dataset.items is not None  # reads the file: a damaged one is a note, here and now
        run.dataset = dataset


def _adapter(run: RunFolder, folder: Path) -> None:
    method = _label(folder, "adapter-")
    settings = _read(folder, ADAPTER_FILE, "the settings of an adapter")
    if settings is not None:
        run.adapters[method] = settings
    curves = _read(folder, CURVES_FILE, "the curves of a fine-tuning run")
    if curves is not None:
        run.curves[method] = curves


def _embeddings(run: RunFolder, folder: Path) -> None:
    unfinished = any(folder.glob("part-*.parquet")) and not (folder / schema.MANIFEST_FILE).is_file()
    if unfinished or (folder / schema.MANIFEST_FILE).is_file():
        method = _label(folder, "embeddings-")
        run.manifests[method] = schema.read_manifest(folder)
        run.embeddings[method] = folder


def _metrics(run: RunFolder, folder: Path) -> None:
    metrics = _read(folder, METRICS_FILE, "metrics of `vlm2rec evaluate` or `vlm2rec train-recommender`")
    if metrics is None:
        return
    if metrics.get("task") == 1:
        model, method = "", _label(folder, "evaluate-")
        run.evaluations[method] = metrics
    elif metrics.get("task") == 2:
        model = str(metrics.get("model"))
        method = ID if metrics.get("start") == ID else _label(folder, f"recommender-{model}-")
        run.recommenders.setdefault(model, {})[method] = metrics
    else:
        raise ArtifactError(
            f"{folder / METRICS_FILE} names task {metrics.get('task')!r}", "task 1 or 2", "run the stage again"
        )
    if (folder / USERS_FILE).is_file():
        run.users[model, method] = folder / USERS_FILE


def _index(run: RunFolder, folder: Path) -> None:
    found = _read(folder, INDEX_FILE, "what `vlm2rec build-index` measured")
    run.index = found if found is not None else run.index


def _dataset_of_the_embeddings(run: RunFolder) -> None:
    """Take titles and pictures from the dataset that the embeddings were exported from, if none lies in the run."""
    for manifest in run.manifests.values():
        data = manifest.get("data")
        if run.dataset is None and data and (Path(data) / schema.DATASET_FILE).is_file():
            try:
                _dataset(run, Path(data))
            except Vlm2RecError as error:
                run.notes.append(str(error))
