"""`vlm2rec build-index` and `vlm2rec search`: a FAISS index of item vectors, and its neighbours on stdout."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from vlm2rec.downstream.index.index import ItemIndex, Neighbour, build_index, check_out
from vlm2rec.downstream.index.plan import IndexPlan, plan_index
from vlm2rec.downstream.index.recall import TARGET_RECALL
from vlm2rec.downstream.index.unit_vectors import UnitBatch, Watch
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.embedder.contract.printable import cell, one_line
from vlm2rec.embedder.contract.storage import Location
from vlm2rec.pipelines.config import BuildIndexConfig, SearchConfig
from vlm2rec.pipelines.console import PlainConsole, log, progress, summary
from vlm2rec.pipelines.queries import described_with_titles, found_by
from vlm2rec.pipelines.search_html import check_html, write_page
from vlm2rec.pipelines.verify import of_catalogue


def run(config: BuildIndexConfig) -> dict[str, Any]:
    """Build an index folder, measure its recall, and return what `index.json` says."""
    check_out(config.out)
    if config.engine == "local" and config.num_workers > 1:
        raise ConfigError(
            f"--num-workers {config.num_workers} without --engine ray",
            "--engine ray; on one machine FAISS uses all threads by itself (OMP_NUM_THREADS)",
            "leave one out, or add the other",
        )
    plan = plan_index(
        config.embeddings,
        column=config.column,
        kind=config.kind,
        sample=config.sample,
        in_parts=config.engine == "ray",
    )
    _print_estimate(plan)
    meta = build_index(
        config.embeddings,
        config.out,
        column=config.column,
        kind=config.kind,
        data=config.data,
        sample=config.sample,
        seed=config.seed,
        plan=plan,
        watch=passes_over(config.embeddings),
        ray_tasks=config.num_workers if config.engine == "ray" else 0,
    )
    _print_result(config, meta)
    return meta


def passes_over(embeddings: Location) -> Watch:
    """Return what shows a bar for each pass over the vectors of an embeddings folder."""
    total = int(schema.read_manifest(embeddings)["num_items"])

    def watch(what: str, batches: Iterable[UnitBatch]) -> Iterator[UnitBatch]:
        with progress(what, total) as advance:
            for batch in batches:
                yield batch
                advance(len(batch.every))

    return watch


def _say(text: str, *, warning: bool = False) -> None:
    log.print(text, style="yellow" if warning else None, soft_wrap=True)  # never folded: one line in a log file


def _print_estimate(plan: IndexPlan) -> None:
    _say(
        f"{plan.factory} for {plan.rows:,} vectors of {plan.dim} dimensions: about {_size(plan.bytes)} on disk,"
        f" {_size(plan.memory)} of memory and {_duration(plan.seconds)}"
    )
    free = _free_memory()
    if free is not None and plan.memory > free:
        _say(
            f"only {_size(free)} of memory are free: --kind 'OPQ64_256,IVF4096,PQ64' needs far less, at a lower recall",
            warning=True,
        )


def _print_result(config: BuildIndexConfig, meta: dict[str, Any]) -> None:
    rows: dict[str, object] = {"index": f"{config.out}  {meta['factory']}, {_size(meta['bytes'])}"}
    some = of_catalogue(meta["export"])
    rows["items"] = f"{meta['rows']:,}{some} with a {meta['column']} vector, {meta['left_out']:,} left out"
    if meta["recall@10"] is not None:
        effort = "".join(f", {name} {value}" for name, value in meta["effort"].items())
        rows["recall@10"] = f"{meta['recall@10']:.4f} against exact search of {meta['recall_sample']:,} items{effort}"
        rows["search"] = f"{meta['search_ms_single']:.3f} ms a query, {meta['search_ms']:.3f} ms in a batch"
    rows["built in"] = _duration(meta["build_seconds"]) + f", checked in {_duration(meta['check_seconds'])}"
    summary("Index", rows)
    if not meta["titles"]:
        _say("no dataset folder was found, so the index has no titles; give --data to see titles in search results")
    elif meta["titles"] < meta["rows"]:
        _say(f"{meta['rows'] - meta['titles']:,} items have no title in {meta['titles_from']}")
    if meta["recall@10"] is not None and meta["recall@10"] < TARGET_RECALL:
        _say(f"recall@10 is below {TARGET_RECALL}: --kind flat is exact, --kind HNSW32 nearly so", warning=True)


def search(config: SearchConfig) -> list[Neighbour]:
    """Print the items nearest to an item, words, a picture or a history: a table, or tab-separated lines elsewhere."""
    if config.html is not None:
        check_html(config.html)
    index = ItemIndex.open(config.index)
    if config.embeddings is not None:
        index.require_fresh(config.embeddings)
        index.embeddings = config.embeddings
    found = found_by(index, config)
    _print_notes(index, config, len(found))
    if config.html is not None:
        write_page(index, config, found)
        _say(f"page: {config.html}")
    asked = one_line(described_with_titles(index, config))
    header = ("rank", schema.ITEM_ID, "cosine", schema.TITLE)
    if not sys.stdout.isatty():
        _say(f"Nearest to {asked}:")
        print("\t".join(header))
        for rank, each in enumerate(found, 1):
            print("\t".join((str(rank), cell(each.item_id), f"{each.cosine:.4f}", cell(each.title))))
        return found
    table = Table(title=f"Nearest to {asked}", title_justify="left", box=None)
    for name, justify in zip(header, ("right", "left", "right", "left"), strict=True):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for rank, each in enumerate(found, 1):
        table.add_row(str(rank), one_line(each.item_id), f"{each.cosine:.4f}", one_line(each.title))
    PlainConsole(highlight=False).print(table)
    return found


def _print_notes(index: ItemIndex, config: SearchConfig, count: int) -> None:
    # An index may be used without its embeddings folder, so a missing folder is no warning; one that differs is.
    # A folder in an object store is not checked, because every search would wait for the store.
    reason = index.stale() if isinstance(index.embeddings, Path) and index.embeddings.exists() else None
    if reason:
        _say(f"the index is stale: {reason}; run `vlm2rec build-index` again", warning=True)
    if index.unchecked:
        _say(
            f"{config.index} is of an older version and has no checksums, so damage cannot be told; run `vlm2rec"
            " build-index` again",
            warning=True,
        )
    if count < config.k:
        _say(f"the index found {count} neighbours, not {config.k}: it holds {len(index):,} items")


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return "under a second"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _free_memory() -> int | None:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # this system does not say
        return None
