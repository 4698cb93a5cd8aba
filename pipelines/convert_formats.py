"""The formats that `convert` writes: each is a row of `FORMATS`.

The command line reads this table for its choices and help, so the writers and their libraries are imported only when a
format is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm2rec.downstream.options import Missing, Repeats
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, did_you_mean

if TYPE_CHECKING:
    from vlm2rec.downstream.formats import Gap, Selection
    from vlm2rec.embedder.contract.dataset import Dataset

Settings = Any
"""The settings of `convert`, read by attribute: `ConvertConfig` takes its help from this table."""

Write = Callable[[Settings, Path, list[str], Missing], "list[Gap]"]


@dataclass(frozen=True)
class Format:
    """What a format can hold, and how to write it.

    Args:
        help: what it is, for `--help`.
        columns: returns the views to write by default, of the existing ones.
        most_columns: the largest number of views it holds.
        missing: the allowed choices for items without a vector, the default first.
        write: writes the format into a folder, and returns the items without their own vector.
        reads: how the other tool reads it.
        flags: the settings of `convert` that it uses, besides --out.
        notes: returns what else the user should know about a written folder, as rows of the summary.
        caches: pattern of the files that the other tool keeps in such a folder; they go when it is written again.
    """

    help: str
    columns: Callable[[Sequence[str]], list[str]]
    most_columns: int
    missing: tuple[Missing, ...]
    write: Write
    reads: str
    flags: tuple[str, ...] = ("columns", "missing", "normalize")
    notes: Callable[[Path], dict[str, str]] = lambda folder: {}
    caches: str = ""


def format_of(name: str) -> Format:
    """Return a format by its name; raise `ConfigError` if there is none of this name."""
    if name not in FORMATS:
        raise ConfigError(
            f"--to {name!r} is not known{did_you_mean(name, FORMATS)}", f"one of {', '.join(FORMATS)}", "change --to"
        )
    return FORMATS[name]


def dataset_name(config: Settings) -> str:
    """Return the dataset's name for file names."""
    name = config.name or config.out.resolve().name
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigError(
            f"the dataset's name is {name!r}", "letters, digits, '.', '-' and '_': it is a file name", "give --name"
        )
    return name


def _rows(writer: str) -> Write:
    """Return the writer of a format that takes every row of a selection; `writer` is a function of `formats`."""

    def write(config: Settings, folder: Path, columns: list[str], missing: Missing) -> list[Gap]:
        from vlm2rec.downstream import formats

        selection: Selection = formats.select(config.embeddings, columns, missing, config.normalize)
        getattr(formats, writer)(selection, folder)
        return selection.gaps

    return write


def _recbole(config: Settings, folder: Path, columns: list[str], missing: Missing) -> list[Gap]:
    from vlm2rec.downstream import formats

    name = dataset_name(config)
    selection = formats.select(config.embeddings, columns, missing, config.normalize)
    return selection.gaps + formats.write_recbole(selection, folder, name)


def _mmrec(config: Settings, folder: Path, columns: list[str], missing: Missing) -> list[Gap]:
    from vlm2rec.downstream import formats, mmrec

    name = dataset_name(config)
    repeats: Repeats = config.repeats or "keep"
    how = (columns, repeats, config.normalize)
    if config.like is None:
        written = mmrec.write_mmrec(config.embeddings, _dataset(config), folder, name, *how)
    elif config.data is not None:
        raise ConfigError(
            "--like with --data", "one of them: a published split, or a dataset folder", "leave --like or --data out"
        )
    else:
        written = mmrec.write_like(config.embeddings, config.like, folder, name, *how)
    if missing == "error":
        formats.refuse([gap for gap in written.gaps if gap.outcome == formats.MEAN_VECTOR])
    if written.repeats:
        mmrec.write_repeats(folder, written.repeats)
    return written.gaps


def _mmrec_notes(folder: Path) -> dict[str, str]:
    from vlm2rec.downstream import mmrec

    count = mmrec.count_repeats(folder)
    masked = f"{count:,} targets are in their user's training, where MMRec masks them: {mmrec.REPEATS_FILE}"
    return {"repeats": masked} if count else {}


def _dataset(config: Settings) -> Dataset:
    from vlm2rec.embedder.contract import schema
    from vlm2rec.embedder.contract.dataset import Dataset, dataset_of_export

    if config.data is not None:
        return Dataset(config.data)
    dataset, reason = dataset_of_export(config.embeddings, schema.read_manifest(config.embeddings))
    if dataset is None:
        raise ArtifactError(f"{config.embeddings}: {reason}", "a dataset folder", "give it with --data")
    return dataset


def _sentence_transformers(config: Settings, folder: Path, columns: list[str], missing: Missing) -> list[Gap]:
    from vlm2rec.embedder.adapters.lora import backbone_licence, is_foreign, kind
    from vlm2rec.embedder.backbones import model_files
    from vlm2rec.embedder.contract import schema
    from vlm2rec.embedder.contract.errors import ModelError
    from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
    from vlm2rec.embedder.encoders.sentence_export import model_readme, write_sentence_transformer
    from vlm2rec.embedder.encoders.settings import EncoderSettings, fingerprint_of

    if config.backbone is None:
        raise ConfigError(
            "--to sentence-transformers without --backbone", "the backbone of the export", "give --backbone"
        )
    exported = schema.read_manifest(config.embeddings)["settings"]
    if "source" in exported or "backbone_hash" not in exported:
        source = exported.get("source", "by hand")
        raise ModelError(
            f"the vectors of {config.embeddings} were not made by export-items, or made with --strategy ({source})",
            "an export of a backbone with vlm2rec's own prompts",
            "run export-items with a backbone, without --strategy",
        )
    given: dict[str, Any] = {"revision": config.revision, "dtype": exported["dtype"], "device": "cpu"}
    # with an adapter of ours, its settings apply; without one, the export's
    own = config.adapter is not None and not is_foreign(config.adapter)
    given |= {} if own else asdict(EncoderSettings.of_export(exported))
    found = fingerprint_of(config.backbone, config.adapter, **given)
    files = model_files.locate(config.backbone, config.revision)
    found["backbone_hash"] = model_files.hash_like(exported["backbone_hash"], files)
    for name in (
        "backbone_hash",
        *(("processor_hash",) if "processor_hash" in exported else ()),
        *("adapter", "adapter_settings", "prompt_hash"),
        *(schema.stored_name(field.name) for field in fields(EncoderSettings)),
    ):
        if found.get(name) != exported.get(name):
            raise ModelError(
                f"{config.embeddings} was exported with {name} {exported.get(name)!r}, this model has"
                f" {found.get(name)!r}",
                "the backbone and the adapter of the export",
                "give these with --backbone, --revision and --adapter",
            )
    settings = EncoderSettings.of_export(exported)
    if (settings.pooling, settings.prompt_style, settings.attention) != ("last", "vlm2rec", "causal"):
        raise ModelError(
            f"{config.embeddings} was exported with another method's prompts or pooling, or with bidirectional"
            " attention",
            "an export with VLM2Rec's prompts and pooling, which a chat template and a pooling module can express",
            "convert to another format",
        )
    if config.adapter is not None and kind(config.adapter) == "moda":
        raise ModelError(
            f"the adapter {config.adapter} has separate weights for text and for images",
            "an adapter with one set of weights, as sentence-transformers runs one model",
            "convert to another format",
        )
    try:
        encoder = ItemEncoder.load(config.backbone, config.adapter, **given)
    except RuntimeError as error:
        raise ModelError(
            f"the model cannot be loaded ({error})", "memory for the whole model", "free some memory"
        ) from error
    licence = backbone_licence(config.backbone)
    adapter = config.adapter.resolve().name if config.adapter else None
    short = exported["dim"] if schema.FULL_DIM in exported else None
    card = model_readme(encoder, files.described["backbone"], adapter, licence, short)
    write_sentence_transformer(encoder, folder, card)
    return []


def _fused(views: Sequence[str]) -> list[str]:
    return ["fused"]


def _modalities(views: Sequence[str]) -> list[str]:
    return [view for view in views if view != "fused"] or ["fused"]


_SKIP_FIRST: tuple[Missing, ...] = ("skip", "mean", "error")
FORMATS = {
    "mmrec": Format(
        "a dataset for FREEDOM, LATTICE and others",
        _modalities,
        2,
        ("mean", "error"),
        _mmrec,
        "MMRec: move the folder to data/{name} and {name}.yaml to src/configs/dataset, then `cd src` and"
        " `python main.py -m FREEDOM -d {name}`. It trains once for each combination of the lists that hyper_parameters"
        " names in src/configs/model/FREEDOM.yaml, up to 1000 epochs each: for one run, shorten each list to one value."
        " SLMRec needs text_feat.npy and image_feat.npy. When the vectors change, remove data/{name}/*_adj_*.pt: MMRec"
        " keeps its item graphs there and would use the old ones",
        ("columns", "missing", "normalize", "data", "name", "like", "repeats"),
        _mmrec_notes,
        "*_adj_*.pt",
    ),
    "cornac": Format(
        "a matrix and the ids of its rows, for cornac's ImageModality",
        _fused,
        1,
        ("mean", "error"),
        _rows("write_cornac"),
        "ImageModality(features=np.load('{out}/features.npy'), ids=json.load(open('{out}/item_ids.json')))",
    ),
    "recbole": Format(
        "an .itememb file",
        _fused,
        1,
        ("mean", "skip", "error"),
        _recbole,
        "RecBole: move {name}.itememb beside {name}.inter and add the lines of recbole.yaml",
        ("columns", "missing", "normalize", "name"),
    ),
    "npy": Format(
        "a matrix for each view, and ids",
        list,
        3,
        _SKIP_FIRST,
        _rows("write_npy"),
        "np.load('{out}/{column}.npy'), json.load(open('{out}/item_ids.json'))",
    ),
    "safetensors": Format(
        "all views and the ids in one file",
        list,
        3,
        _SKIP_FIRST,
        _rows("write_safetensors"),
        "safetensors.numpy.load_file('{out}/vectors.safetensors')",
    ),
    "lance": Format(
        "a table of Lance or LanceDB",
        list,
        3,
        _SKIP_FIRST,
        _rows("write_lance"),
        "lance.dataset('{out}/items.lance')",
    ),
    "sentence-transformers": Format(
        "the merged model, as a folder that SentenceTransformer opens",
        list,
        3,
        ("skip",),
        _sentence_transformers,
        "SentenceTransformer('{out}').encode([title, ...])",
        ("backbone", "adapter", "revision"),
    ),
}
"""The formats, by `--to`."""
