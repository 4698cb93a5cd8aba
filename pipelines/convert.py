"""`vlm2rec convert`: an embeddings folder in the form another tool reads. The folder appears whole, or not at all."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vlm2rec.downstream import formats, mmrec
from vlm2rec.downstream.formats import LEFT_OUT, MEAN_VECTOR, Gap, Selection
from vlm2rec.downstream.options import Missing
from vlm2rec.embedder.contract import provenance, publish, schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ConfigError, ModelError
from vlm2rec.pipelines import console
from vlm2rec.pipelines.config import ConvertConfig

RECORD_FILE = "convert.json"
MISSING_FILE = "missing.csv"
SENTENCE_TRANSFORMERS = "sentence-transformers"

Manifest = dict[str, Any]
Write = Callable[[ConvertConfig, Path, list[str], Missing], list[Gap]]


@dataclass(frozen=True)
class Format:
    """What a form can hold, and how it is written."""

    columns: Callable[[Sequence[str]], list[str]]  # the default, from the views there are
    most_columns: int
    missing: tuple[Missing, ...]  # what it allows, the default first
    write: Write
    reads: str  # how the other tool takes it


def run(config: ConvertConfig) -> dict[str, Any]:
    """Write the folder and return what its `convert.json` says.

    Raises:
        ConfigError: settings that do not go together, an output folder with other things in it, or no room on the disk.
        ArtifactError: the embeddings or the dataset folder cannot be used, or a view has no vector.
        DataError: items without a vector, with `--missing error`.
        MissingDependencyError: lance without pylance.
        ModelError: sentence-transformers with a backbone or adapter that the vectors are not of.
    """
    manifest = schema.read_manifest(config.embeddings)
    check_out(config.out, config.to)
    _refuse_idle_flags(config)
    form = FORMATS[config.to]
    columns = _columns(config, form, manifest)
    missing = _missing(config, form)
    with publish.whole_folder(config.out) as folder, publish.plain_disk_errors(config.out):
        gaps = form.write(config, folder, columns, missing)
        if gaps:
            write_gaps(folder / MISSING_FILE, gaps)
        record = _record(config, manifest, folder, columns, missing, gaps)
        schema.write_json(folder / RECORD_FILE, record)
    _report(config, form, record)
    return record


def check_out(out: Path, kind: str) -> None:
    """Raise `ConfigError` unless `out` is free, empty, or an earlier conversion to the same form and nothing else."""
    record = out / RECORD_FILE
    earlier = schema.read_json(record, "a conversion", "choose another --out") if record.is_file() else {}
    publish.require_ours(
        out,
        f"an earlier conversion to {kind} with nothing else in it",
        ours=earlier.get("to") == kind,
        only=(RECORD_FILE, *earlier.get("files", ())),
    )


def _refuse_idle_flags(config: ConvertConfig) -> None:
    """Raise `ConfigError` for a setting that says nothing to this form."""
    for flag, forms in _FLAGS_OF.items():
        if getattr(config, flag) not in (None, (), "auto") and config.to not in forms:
            raise ConfigError(f"--{flag} with --to {config.to}", f"--{flag} with {' or '.join(forms)}", "leave it out")


def _columns(config: ConvertConfig, form: Format, manifest: Manifest) -> list[str]:
    there = [view for view in schema.VIEWS if view in manifest.get("views", schema.VIEWS)]
    chosen = list(dict.fromkeys(config.columns)) or form.columns(there)
    absent = [column for column in chosen if column not in there]
    if absent:
        raise ConfigError(
            f"{config.embeddings} has no {' and no '.join(absent)} vectors",
            f"some of {', '.join(there)}",
            "choose other --columns, or another format",
        )
    if len(chosen) > form.most_columns:
        raise ConfigError(f"--columns {','.join(chosen)}: {config.to} holds one view", "one of them", "name one column")
    if config.to == "mmrec" and schema.FUSED in chosen and len(chosen) > 1:
        raise ConfigError(
            f"--columns {','.join(chosen)} with mmrec, which has two places for vectors",
            "text, image, or both, which MMRec's models fuse; or fused alone",
            "leave fused out, or the others",
        )
    return chosen


def _missing(config: ConvertConfig, form: Format) -> Missing:
    if config.missing == "auto":
        return form.missing[0]
    if config.missing not in form.missing:
        raise ConfigError(
            f"--missing {config.missing} with {config.to}, which wants a row of every item",
            " or ".join(form.missing),
            "choose one of these",
        )
    return config.missing


def write_gaps(path: Path, gaps: Sequence[Gap]) -> None:
    """Write the list of items without a vector of their own."""
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([schema.ITEM_ID, "column", "reason", "outcome"])
        rows.writerows((gap.item_id, gap.column, gap.reason, gap.outcome) for gap in gaps)


def _record(
    config: ConvertConfig, manifest: Manifest, folder: Path, columns: list[str], missing: Missing, gaps: list[Gap]
) -> dict[str, Any]:
    return {
        "to": config.to,
        "columns": columns,
        "dims": {column: schema.dims_of(manifest)[column] for column in columns},
        "missing": missing,
        "left_out": len({gap.item_id for gap in gaps if gap.outcome == LEFT_OUT}),
        "mean_vector": {
            column: sum(gap.column == column and gap.outcome == MEAN_VECTOR for gap in gaps) for column in columns
        },
        "files": sorted({path.relative_to(folder).parts[0] for path in folder.iterdir()}),
        "embeddings": str(config.embeddings.resolve()),
        "fingerprint": manifest["fingerprint"],
        "created": provenance.created(),
        "vlm2rec_version": provenance.version_of("vlm2rec"),
    }


def _report(config: ConvertConfig, form: Format, record: dict[str, Any]) -> None:
    shapes = ", ".join(f"{column}, d = {dim}" for column, dim in record["dims"].items())
    rows: dict[str, object] = {"format": f"{config.to}: {shapes}"}
    rows["files"] = ", ".join(record["files"])
    filled = ", ".join(f"{count:,} {column}" for column, count in record["mean_vector"].items() if count)
    if filled:
        rows["mean vector"] = f"{filled}, listed in {MISSING_FILE}"
    if record["left_out"]:
        rows["left out"] = f"{record['left_out']:,} items, listed in {MISSING_FILE}"
    rows["read it with"] = form.reads.format(out=config.out, name=_name(config))
    console.summary("Converted", rows)


def _name(config: ConvertConfig) -> str:
    name = config.name or config.out.resolve().name
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigError(
            f"the dataset's name is {name!r}", "letters, digits, '.', '-' and '_': it is a file name", "give --name"
        )
    return name


# --- the forms ------------------------------------------------------------------------------------------------
def _whole(write: Callable[[Selection, Path], None]) -> Write:
    """Return how a form is written that takes every row of a selection."""

    def write_form(config: ConvertConfig, folder: Path, columns: list[str], missing: Missing) -> list[Gap]:
        selection = formats.select(config.embeddings, columns, missing)
        write(selection, folder)
        return selection.gaps

    return write_form


def _recbole(config: ConvertConfig, folder: Path, columns: list[str], missing: Missing) -> list[Gap]:
    name = _name(config)
    selection = formats.select(config.embeddings, columns, missing)
    return selection.gaps + formats.write_recbole(selection, folder, name)


def _mmrec(config: ConvertConfig, folder: Path, columns: list[str], missing: Missing) -> list[Gap]:
    gaps = mmrec.write_mmrec(config.embeddings, _dataset(config), folder, _name(config), columns)
    if missing == "error":
        formats.refuse([gap for gap in gaps if gap.outcome == MEAN_VECTOR])
    return gaps


def _dataset(config: ConvertConfig) -> Dataset:
    exported = schema.read_manifest(config.embeddings).get("data")
    if config.data is None and not exported:
        raise ConfigError(
            f"{config.embeddings} does not say which dataset it is of", "a dataset folder", "give it with --data"
        )
    return Dataset(config.data or str(exported))


def _sentence_transformers(config: ConvertConfig, folder: Path, columns: list[str], missing: Missing) -> list[Gap]:
    from vlm2rec.embedder.backbones.lora import backbone_licence, kind
    from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
    from vlm2rec.embedder.encoders.sentence_export import model_readme, write_sentence_transformer
    from vlm2rec.embedder.encoders.settings import EncoderSettings, fingerprint_of

    if config.backbone is None:
        raise ConfigError("--to sentence-transformers without --backbone", "the backbone of the export", "give it")
    exported = schema.read_manifest(config.embeddings)["settings"]
    if "source" in exported or "backbone_hash" not in exported:
        source = exported.get("source", "by hand")
        raise ModelError(
            f"the vectors of {config.embeddings} were not made by export-items, or with --strategy ({source})",
            "an export of a backbone with vlm2rec's own prompts",
            "export one",
        )
    given: dict[str, Any] = {"revision": config.revision, "dtype": exported["dtype"], "device": "cpu"}
    # an adapter brings its settings; without one they are the export's
    given |= {} if config.adapter else asdict(EncoderSettings.of_export(exported))
    found = fingerprint_of(config.backbone, config.adapter, **given)
    for name in (
        "backbone_hash",
        "adapter",
        "prompt_hash",
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
    if (settings.pooling, settings.prompt_style) != ("last", "vlm2rec"):
        raise ModelError(
            f"{config.embeddings} was exported with the prompts and the pooling of SDA",
            "an export with VLM2Rec's, which the folder's chat template and pooling can express",
            "convert to another format",
        )
    if config.adapter is not None and kind(config.adapter) == "moda":
        raise ModelError(
            f"the adapter {config.adapter} has weights of its own for text and for images",
            "an adapter of one set of weights, as sentence-transformers runs one model",
            "convert to another format",
        )
    try:
        encoder = ItemEncoder.load(config.backbone, config.adapter, **given)
    except RuntimeError as error:
        raise ModelError(f"the model cannot be loaded ({error})", "memory for the whole model", "free some") from error
    licence = backbone_licence(config.backbone)
    adapter = config.adapter.resolve().name if config.adapter else None
    write_sentence_transformer(encoder, folder, model_readme(encoder, exported["backbone"], adapter, licence))
    return []


def _one(there: Sequence[str]) -> list[str]:
    return [schema.FUSED]


def _modalities(there: Sequence[str]) -> list[str]:
    return [view for view in there if view in schema.MODALITIES] or [schema.FUSED]


_VECTORS = ("mmrec", "cornac", "recbole", "npy", "safetensors", "lance")
_FLAGS_OF = {
    "columns": _VECTORS,
    "missing": _VECTORS,
    "data": ("mmrec",),
    "name": ("mmrec", "recbole"),
    **dict.fromkeys(("backbone", "adapter", "revision"), (SENTENCE_TRANSFORMERS,)),
}
_SKIP_FIRST: tuple[Missing, ...] = ("skip", "mean", "error")
FORMATS = {
    "mmrec": Format(
        _modalities,
        2,
        ("mean", "error"),
        _mmrec,
        "MMRec: move the folder to data/{name} and {name}.yaml to src/configs/dataset, then"
        " python main.py -m FREEDOM -d {name}",
    ),
    "cornac": Format(
        _one,
        1,
        ("mean", "error"),
        _whole(formats.write_cornac),
        "ImageModality(features=np.load('{out}/features.npy'), ids=json.load(open('{out}/item_ids.json')))",
    ),
    "recbole": Format(
        _one,
        1,
        ("mean", "skip", "error"),
        _recbole,
        "RecBole: move {name}.itememb beside {name}.inter and add the lines of recbole.yaml",
    ),
    "npy": Format(
        list,
        3,
        _SKIP_FIRST,
        _whole(formats.write_npy),
        "np.load('{out}/fused.npy'), json.load(open('{out}/item_ids.json'))",
    ),
    "safetensors": Format(
        list,
        3,
        _SKIP_FIRST,
        _whole(formats.write_safetensors),
        "safetensors.numpy.load_file('{out}/vectors.safetensors')",
    ),
    SENTENCE_TRANSFORMERS: Format(
        list, 3, ("skip",), _sentence_transformers, "SentenceTransformer('{out}').encode([title, ...])"
    ),
    "lance": Format(list, 3, _SKIP_FIRST, _whole(formats.write_lance), "lance.dataset('{out}/items.lance')"),
}
