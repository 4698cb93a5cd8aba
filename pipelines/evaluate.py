"""`vlm2rec evaluate` (Task 1): rank the held-out item by its similarity to the user's vector."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from vlm2rec.downstream.evaluation.geometry import Distances, dispersion, distances_from_rows
from vlm2rec.downstream.evaluation.metrics import TAIL
from vlm2rec.downstream.evaluation.protocol import SAME_VIEW, RankingTask, Views, mean_of_history, rank_vectors
from vlm2rec.downstream.table import EmbeddingTable, unit_rows
from vlm2rec.embedder.contract import publish, schema
from vlm2rec.embedder.contract.dataset import Dataset, Histories
from vlm2rec.embedder.contract.errors import ArtifactError
from vlm2rec.embedder.export.processes import keep_freed_memory
from vlm2rec.pipelines.config import EvaluateConfig
from vlm2rec.pipelines.console import log, progress, summary
from vlm2rec.pipelines.history_encoder import history_encoder, say_of_unreadable, user_source


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Rank the items, write `metrics.json` and `users.parquet`, print the table, and return the metrics."""
    dataset = Dataset(config.data, config.images).warm()
    seeds = list(config.seeds) or dataset.candidate_seeds
    check_out(config.out)
    manifest = schema.read_manifest(config.embeddings)
    publish.require_writable(config.out)
    keep_freed_memory()
    raw_items, missing = _item_vectors(config, dataset, manifest)
    histories = dataset.histories(config.split)
    source = user_source(config, manifest)
    if source == "sequence":
        raw_users = _encode_histories(config, dataset, histories, manifest)
    else:
        raw_users = {view: mean_of_history(vectors, histories) for view, vectors in raw_items.items()}
    items = {view: unit_rows(vectors) for view, vectors in raw_items.items()}
    users = {view: unit_rows(vectors) for view, vectors in raw_users.items()}

    task = RankingTask(dataset, config.split, seeds, config.tail_over)
    rankings = rank_vectors(task, users, items)
    means = {pair: ranked.means() for pair, ranked in rankings.items()}
    of_tail, of_cold = ({pair: found[group] for pair, found in means.items()} for group in ("tail", "cold"))
    negatives = task.negatives[seeds[0]]
    distances = {view: distances_from_rows(users[view], items[view], task.targets, negatives) for view in items}
    result = {
        "task": 1,
        "dataset": dataset.name,
        "split": config.split,
        "users_from": source,
        "users": len(histories),
        "items": len(dataset.item_ids),
        "missing": missing,
        "seeds": seeds,
        "embeddings": str(config.embeddings.resolve()),
        "fingerprint": manifest["fingerprint"],
        **{
            key: {pair: found[key] for pair, found in means.items()} for key in ("candidates", "candidates_std", "full")
        },
        "random": task.random_order(),
        **_over_all_targets(task, means),
        "tail": {
            "below": TAIL,
            **({} if config.tail_over == "train" else {"over": config.tail_over}),
            "users": int(task.tail.sum()),
            **{key: {pair: tail[key] for pair, tail in of_tail.items()} for key in ("candidates", "full")},
        },
        "cold": {
            "users": int(task.cold.sum()),
            **{key: {pair: cold[key] for pair, cold in of_cold.items()} for key in ("candidates", "full")},
        },
        "geometry": {view: found.geometry() for view, found in distances.items()},
        "dispersion": {view: dispersion(users[view], items[view]) for view in items},
    }
    tables = {pair: ranked.tables(pair) for pair, ranked in rankings.items()}
    for pair, view in SAME_VIEW.items():  # beside the first candidates; the other rows have nulls
        if pair in tables:
            tables[pair][0] = _with_distances(tables[pair][0], distances[view])
    by_candidates = [table for of_pair in tables.values() for table in of_pair[:-1]]
    by_catalogue = [of_pair[-1] for of_pair in tables.values()]
    rows = pa.concat_tables([*by_candidates, *by_catalogue], promote_options="default")
    of_sets = [name for name in rows.column_names if name.startswith(schema.RETRIEVAL)]
    keys = [name for name in rows.column_names if name not in (*schema.METRICS, *schema.DISTANCES, *of_sets)]
    users_table = rows.select([*keys, *schema.METRICS, *schema.DISTANCES, *of_sets]).replace_schema_metadata(
        {_STAMP: _WRITER}
    )
    with publish.plain_disk_errors(config.out):
        publish.discard(config.out / schema.METRICS_FILE)  # it is written last: never the old one beside new users
        with publish.whole_file(config.out / schema.USERS_FILE) as file:
            pq.write_table(users_table, file)
        schema.write_json(config.out / schema.METRICS_FILE, result)
    print_metrics(result)
    _summarise(config, result)
    return result


def _over_all_targets(task: RankingTask, means: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of metrics.json about all of a user's targets, if there are several."""
    if task.sets is None:
        return {}
    return {schema.RETRIEVAL: {pair: found[schema.RETRIEVAL] for pair, found in means.items()}} | task.about_targets()


def _with_distances(rows: pa.Table, found: Distances) -> pa.Table:
    """Add each user's A_pos and A_neg."""
    for name, values in found.of_users().items():
        rows = rows.append_column(name, pa.array(values, pa.float64()))
    return rows


_STAMP, _WRITER = b"vlm2rec.written_by", b"vlm2rec evaluate"


def check_out(out: Path) -> None:
    """Raise `ConfigError` unless `out` is free, or holds an earlier evaluation, whose files may be replaced."""
    ours = False
    try:
        if (out / schema.METRICS_FILE).is_file():
            earlier = schema.read_json(out / schema.METRICS_FILE, "metrics", "choose another --out")
            ours = earlier.get("task") == 1 and "fingerprint" in earlier
        elif (out / schema.USERS_FILE).is_file():  # killed before metrics.json, which is written last
            ours = (pq.read_schema(out / schema.USERS_FILE).metadata or {}).get(_STAMP) == _WRITER
    except (ArtifactError, pa.ArrowException, OSError):
        ours = False
    publish.require_ours(out, "an earlier evaluation", ours=ours)


def _item_vectors(config: EvaluateConfig, dataset: Dataset, manifest: dict[str, Any]) -> tuple[Views, int]:
    """Return each view in the order of `items.parquet`, and the number of items without a vector."""
    views, missing = {}, 0
    for view in manifest["views"]:
        table = EmbeddingTable.open(config.embeddings, view)
        rows = table.rows_of(dataset.item_ids)
        absent = rows < 0
        if absent.any() and config.missing == "error":
            table.take(dataset.item_ids, ", or give --missing zero")  # raises an error that names some of them
        missing = max(missing, int(absent.sum()))
        views[view] = np.where(absent[:, None], np.float32(0), table.vectors[rows])
    return views, missing


def _encode_histories(
    config: EvaluateConfig, dataset: Dataset, histories: Histories, manifest: dict[str, Any]
) -> Views:
    """Return the sequence encoder's user vectors; it must be the encoder that made the table."""
    from vlm2rec.embedder.encoders.item_features import ItemFeatures, encode_rows
    from vlm2rec.embedder.export.short import shorten_views

    encoder = history_encoder(config, dataset, manifest)
    items = ItemFeatures(dataset, encoder)
    sequences = [histories.of(user).tolist() for user in range(len(histories))]
    with progress("encoding histories", len(sequences)) as advance:
        vectors = encode_rows(encoder, items, sequences, advance)
    say_of_unreadable(items.unreadable)
    return shorten_views({view: vectors[view] for view in manifest["views"]}, manifest["settings"])


def print_metrics(result: dict[str, Any]) -> None:
    """Print the ranking metrics: for each pair of views, among the stored candidates and in the whole catalogue.

    If some users' targets are items of the long tail, or in nobody's training, their metrics among the candidates
    follow. Last comes what a random order has. If users have several targets, the table is about the first of them,
    and lines about all of them follow.
    """
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("", "ranked among", *schema.METRICS):
        table.add_column(name, justify="right" if name in schema.METRICS else "left")
    for pair in result["candidates"]:
        for protocol, name in (("candidates", pair), ("full", "")):
            cells = [f"{result[protocol][pair][metric]:.4f}" for metric in schema.METRICS]
            table.add_row(name, "all items" if protocol == "full" else protocol, *cells)
        if tail := result["tail"]["candidates"][pair]:
            table.add_row("", "candidates, tail", *(f"{tail[metric]:.4f}" for metric in schema.METRICS))
        if cold := result["cold"]["candidates"][pair]:
            table.add_row("", "candidates, cold", *(f"{cold[metric]:.4f}" for metric in schema.METRICS))
    for protocol, name in (("candidates", "random order"), ("full", "")):
        cells = [f"{result['random'][protocol][metric]:.4f}" for metric in schema.METRICS]
        table.add_row(name, "all items" if protocol == "full" else protocol, *cells, style="dim")
    log.result(table)
    for pair, found in result.get(schema.RETRIEVAL, {}).items():
        figures = "  ".join(f"{name} {value:.4f}" for name, value in found.items())
        log.result(f"{pair}, all {result['targets']:,} targets among all items: {figures}", markup=False)


def _summarise(config: EvaluateConfig, result: dict[str, Any]) -> None:
    cold = result["cold"]["users"]
    spread = {view: f"S {values['S']:.3f}, U {values['U']:.3f}" for view, values in result["geometry"].items()}
    summary(
        "Task 1",
        {
            "users": f"{result['users']}, vectors from the {_SOURCES[result['users_from']]}",
            "tail": f"{result['tail']['users']} users, whose target has fewer than {TAIL} interactions"
            + (" in training" if config.tail_over == "train" else ", the held-out ones among them"),
            **({"cold": f"{cold} users, whose target is in nobody's training"} if cold else {}),
            "items": f"{result['items']}, {result['missing']} without a vector",
            "geometry": "; ".join(f"{view}: {text}" for view, text in spread.items()),
            "metrics": Path(config.out) / schema.METRICS_FILE,
            "per user": Path(config.out) / schema.USERS_FILE,
        },
    )


_SOURCES = {"sequence": "sequence encoder", "mean": "mean of the history's items"}
