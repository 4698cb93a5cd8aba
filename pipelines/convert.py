"""`vlm2rec convert`: writes an embeddings folder in the format of another tool, whole or not at all."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from vlm2rec.downstream.formats import LEFT_OUT, MEAN_VECTOR, Gap
from vlm2rec.downstream.options import Missing
from vlm2rec.embedder.contract import provenance, publish, schema
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.embedder.contract.printable import cell
from vlm2rec.pipelines import console
from vlm2rec.pipelines.config import ConvertConfig
from vlm2rec.pipelines.convert_formats import FORMATS, Format, dataset_name, format_of

RECORD_FILE = "convert.json"
MISSING_FILE = "missing.csv"

Manifest = dict[str, Any]


def run(config: ConvertConfig) -> dict[str, Any]:
    """Write the folder and return the content of its `convert.json`.

    Raises:
        ConfigError: settings that contradict each other, an output folder with other content, or a full disk.
        ArtifactError: the embeddings or the dataset folder cannot be used, or a view has no vector.
        DataError: items without a vector, with `--missing error`.
        MissingDependencyError: lance without pylance.
        ModelError: for sentence-transformers, the vectors are not of this backbone and adapter.
    """
    manifest = schema.read_manifest(config.embeddings)
    form = format_of(config.to)
    check_out(config.out, config.to, form.caches)
    stale = sorted(path.name for path in config.out.glob(form.caches)) if form.caches and config.out.is_dir() else []
    _refuse_unused_flags(config)
    columns = _columns(config, form, manifest)
    missing = _missing(config, form)
    with publish.whole_folder(config.out) as folder, publish.plain_disk_errors(config.out):
        gaps = form.write(config, folder, columns, missing)
        if gaps:
            write_gaps(folder / MISSING_FILE, gaps)
        record = _record(config, manifest, folder, columns, missing, gaps)
        schema.write_json(folder / RECORD_FILE, record)
    _report(config, form, record, stale)
    return record


def check_out(out: Path, kind: str, caches: str = "") -> None:
    """Raise `ConfigError` unless `out` is free, empty, or holds only an earlier conversion to the same format.

    Args:
        out: the folder to write.
        kind: the format.
        caches: pattern of the files that the other tool may have added; none if empty.
    """
    record = out / RECORD_FILE
    earlier = schema.read_json(record, "a conversion", "choose another --out") if record.is_file() else {}
    files = earlier.get("files", ())
    ours = earlier.get("to") == kind and isinstance(files, list) and "vlm2rec_version" in earlier
    publish.require_ours(
        out,
        f"an earlier conversion to {kind} with nothing else in it",
        ours=ours,
        only=(RECORD_FILE, *files) if ours else None,
        ignored=lambda name: ours and bool(caches) and fnmatch(name, caches),
    )


def _refuse_unused_flags(config: ConvertConfig) -> None:
    """Raise `ConfigError` for a setting that this format does not use."""
    for flag in dict.fromkeys(flag for form in FORMATS.values() for flag in form.flags):
        forms = [name for name, form in FORMATS.items() if flag in form.flags]
        if getattr(config, flag) not in (None, (), "auto", False) and config.to not in forms:
            raise ConfigError(
                f"--{flag} with --to {config.to}", f"--{flag} with {' or '.join(forms)}", f"leave --{flag} out"
            )


def _columns(config: ConvertConfig, form: Format, manifest: Manifest) -> list[str]:
    views = schema.columns_of(manifest)
    chosen = list(dict.fromkeys(config.columns)) or form.columns([view for view in views if view != schema.CONCAT])
    absent = [column for column in chosen if column not in views]
    if absent:
        raise ConfigError(
            f"{config.embeddings} has no {' and no '.join(absent)} vectors",
            f"some of {', '.join(views)}",
            "choose other --columns, or another format",
        )
    if len(chosen) > form.most_columns:
        raise ConfigError(f"--columns {','.join(chosen)}: {config.to} holds one view", "one of them", "name one column")
    if config.to == "mmrec" and schema.CONCAT in chosen:
        raise ConfigError(
            f"--columns {','.join(chosen)} with mmrec, whose models combine text and image themselves",
            "text, image, or both",
            "leave concat out",
        )
    if config.to == "mmrec" and schema.FUSED in chosen and len(chosen) > 1:
        raise ConfigError(
            f"--columns {','.join(chosen)} with mmrec, which takes two kinds of vectors",
            "text, image, or both, which MMRec's models fuse; or fused alone",
            "leave fused out, or the others",
        )
    return chosen


def _missing(config: ConvertConfig, form: Format) -> Missing:
    if config.missing == "auto":
        return form.missing[0]
    if config.missing not in form.missing:
        raise ConfigError(
            f"--missing {config.missing} with {config.to}, which needs a row for every item",
            " or ".join(form.missing),
            "choose another --missing",
        )
    return config.missing


def write_gaps(path: Path, gaps: Sequence[Gap]) -> None:
    """Write the list of items without a vector of their own."""
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([schema.ITEM_ID, "column", "reason", "outcome"])
        rows.writerows(map(cell, (gap.item_id, gap.column, gap.reason, gap.outcome)) for gap in gaps)


def _record(
    config: ConvertConfig, manifest: Manifest, folder: Path, columns: list[str], missing: Missing, gaps: list[Gap]
) -> dict[str, Any]:
    return {
        "to": config.to,
        "columns": columns,
        "dims": {column: schema.dim_of(manifest, column) for column in columns},
        "missing": missing,
        **({"normalize": True} if config.normalize else {}),
        **({"like": str(config.like.resolve())} if config.like else {}),
        **({"repeats": config.repeats} if config.repeats else {}),
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


def _report(config: ConvertConfig, form: Format, record: dict[str, Any], stale: Sequence[str]) -> None:
    shapes = ", ".join(f"{column}[{dim}]" for column, dim in record["dims"].items())
    rows: dict[str, object] = {"format": f"{config.to}: {shapes}"}
    rows["files"] = ", ".join(record["files"])
    filled = ", ".join(f"{count:,} {column}" for column, count in record["mean_vector"].items() if count)
    if filled:
        rows["mean vector"] = f"{filled}, listed in {MISSING_FILE}"
    if record["left_out"]:
        rows["left out"] = f"{record['left_out']:,} items, listed in {MISSING_FILE}"
    rows |= form.notes(config.out)
    if stale:
        rows["removed"] = f"{', '.join(stale)}, which were made from the former vectors"
    rows["read it with"] = form.reads.format(
        out=config.out, name=dataset_name(config), column=next(iter(record["dims"]))
    )
    console.summary("Converted", rows)
