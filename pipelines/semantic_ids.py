"""`vlm2rec semantic-ids`: every item's vector as a few codes, by residual k-means, with a table of what they keep."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from vlm2rec.downstream.semantic_ids.folder import IDS_FILE, SemanticIds, build
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.pipelines.build_index import passes_over
from vlm2rec.pipelines.config import SemanticIdsConfig
from vlm2rec.pipelines.console import log, summary


def run(config: SemanticIdsConfig) -> dict[str, Any]:
    """Write the folder of semantic ids and return what `semantic_ids.json` says."""
    if config.like is not None:
        _require_like(config, SemanticIds.open(config.like).record)
    record = build(
        config.embeddings,
        config.out,
        column=config.column,
        levels=config.levels,
        size=config.codebook,
        balanced=config.balanced,
        like=config.like,
        sample=config.sample,
        seed=config.seed,
        watch=passes_over(config.embeddings),
    )
    _print_result(config, record)
    return record


def _require_like(config: SemanticIdsConfig, earlier: dict[str, Any]) -> None:
    """Raise `ConfigError` for a size of codebook that is given, and is not that of the earlier one."""
    for name in ("levels", "codebook"):
        value, default = getattr(config, name), SemanticIdsConfig.__dataclass_fields__[name].default
        if value not in (default, earlier[name]):
            raise ConfigError(
                f"--{name} {value} with --like {config.like}, whose codebook has {earlier[name]}",
                "the codebook of the earlier folder",
                f"leave --{name} or --like out",
            )


def _print_result(config: SemanticIdsConfig, record: dict[str, Any]) -> None:
    quality = record["quality"]
    table = Table(box=None, title=f"neighbours: {quality['k']} of {quality['sampled']:,} items", title_justify="left")
    for name in ("level", "codewords used", "evenness", "variance told", "neighbours with the same codes", "by chance"):
        table.add_column(name, justify="right")
    for number, level in enumerate(quality["levels"], 1):
        same = "–" if level["neighbours"] is None else f"{level['neighbours']:.1%}"
        used = f"{level['used']} of {record['codebook']}"
        told = f"{level['explained']:.1%}"
        table.add_row(str(number), used, f"{level['even']:.2f}", told, same, f"{level['chance']:.2%}")
    log.result(table)
    rows: dict[str, object] = {
        "items": f"{record['items']:,} with codes, {record['left_out']:,} without a {record['column']} vector",
        "codes": f"{record['levels']} of {record['codebook']}, and a last one of {record['last']}",
        "same codes": f"{quality['sharing']:,} items share theirs with others, {quality['largest']} at most;"
        " the last code tells them apart",
    }
    if record["like"]:
        rows["codebook of"] = f"{record['like']}; {record['kept']:,} items keep their codes"
    if quality["recall"] is not None:
        rows[f"recall@{quality['k']}"] = f"{quality['recall']:.3f} of the neighbours are nearest by codes alone"
    rows["table"] = config.out / IDS_FILE
    summary("Semantic ids", rows)
