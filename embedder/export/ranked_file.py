"""One shard of recommendations: each user's first items in order, or one row with the reason why there are none.

user_id   rank  item_id  score   error
alice     1     42       0.91
alice     2     7        0.88
bob                              no item of the history is in the catalogue
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.storage import Location, readable
from vlm2rec.embedder.export.shard_file import ROW_GROUP_ROWS, ShardContent

if TYPE_CHECKING:
    from vlm2rec.embedder.export.plan import Plan

_ROW_BYTES = 8  # rank and score; ids are mostly dictionaries
_SCHEMA = pa.schema(
    [
        pa.field(schema.USER_ID, pa.string(), nullable=False),
        pa.field(schema.RANK, pa.int32()),
        pa.field(schema.ITEM_ID, pa.string()),
        pa.field(schema.SCORE, pa.float32()),
        pa.field(schema.ERROR, pa.string()),
    ]
)


@dataclass(frozen=True)
class RankedLayout:
    """A user has as many rows as recommendations, or one row with a reason."""

    def arrow_schema(self, settings: Mapping[str, Any], metadata: dict[str, str]) -> pa.Schema:
        """See `Layout`."""
        return _SCHEMA.with_metadata(metadata or None)

    def row_bytes(self, settings: Mapping[str, Any]) -> int:
        """See `Layout`: a row of the plan is a user."""
        return _ROW_BYTES * int(settings["k"])

    def described(self, plan: Plan) -> dict[str, Any]:
        """See `Layout`."""
        return {"k": plan.settings["k"], "num_users": len(plan.item_ids)}

    def write(self, table: pa.Table, file: Any) -> None:
        """See `Layout`."""
        pq.write_table(
            table,
            file,
            row_group_size=16 * ROW_GROUP_ROWS,
            compression="zstd",
            compression_level=1,
            use_dictionary=[schema.USER_ID, schema.RANK, schema.ITEM_ID, schema.ERROR],
            write_page_checksum=True,
        )

    def statuses(self, table: pa.Table) -> pa.ChunkedArray:
        """See `Layout`."""
        first = table.filter(_begins(table))
        failed = pc.is_valid(first[schema.ERROR])
        found = pc.if_else(failed, schema.STATUS_FAILED, schema.STATUS_OK)
        return found if isinstance(found, pa.ChunkedArray) else pa.chunked_array([found])

    def read(self, path: Location, views: Sequence[str]) -> ShardContent:
        """See `Layout`."""
        with readable(path) as source:
            table = pq.read_table(source, page_checksum_verification=True)
        users = table.filter(_begins(table))[schema.USER_ID].to_pylist()
        return ShardContent(users, self.statuses(table).to_pylist(), [None] * len(users), _problems(table))

    def read_keys(self, path: Location) -> tuple[list[str], list[str | None]]:
        """See `Layout`."""
        content = self.read(path, ())
        return content.ids, content.inputs


def ranked_table(
    plan: Plan,
    rows: Sequence[int],
    items: pa.Array,
    counts: np.ndarray,
    scores: np.ndarray,
    errors: Sequence[str | None],
) -> pa.Table:
    """Return the table of one shard.

    Args:
        plan: the plan.
        rows: the n positions in the plan.
        items: ids of all recommended items, user after user, the best first.
        counts: (n,) how many of them are each user's.
        scores: (sum of counts,) float32.
        errors: the reason why a user has none, or None.
    """
    bad = np.array([error is not None for error in errors], bool)
    assert not counts[bad].any()
    lines = np.where(bad, 1, counts)  # rows of the table
    starts = np.cumsum(lines) - lines
    user = np.repeat(np.arange(len(rows)), lines)
    rank = np.arange(int(lines.sum())) - starts[user] + 1
    absent = bad[user]
    ids = pa.array([plan.item_ids[row] for row in rows], pa.string())
    places = np.zeros(len(user), np.int64)
    places[~absent] = np.arange(len(items))
    values = np.zeros(len(user), np.float32)
    values[~absent] = scores
    columns = [
        ids.take(pa.array(user)),
        pa.array(rank.astype(np.int32), mask=absent),
        items.take(pa.array(places, mask=absent)),
        pa.array(values, mask=absent),
        pa.array(list(errors), pa.string()).take(pa.array(user)),
    ]
    return pa.Table.from_arrays(columns, schema=plan.schema)


def _begins(table: pa.Table) -> pa.ChunkedArray:
    """Return which rows are a user's first, or only, one."""
    return pc.fill_null(pc.less_equal(table[schema.RANK], 1), True)


def _problems(table: pa.Table) -> list[str]:
    """Return what is wrong with the rows: ranks that do not count up, scores that do not fall, lacks of a reason."""
    if not len(table):
        return []
    begins = _begins(table).to_numpy()
    failed = table[schema.ERROR].is_valid().to_numpy()
    has = table[schema.ITEM_ID].is_valid().to_numpy() & table[schema.RANK].is_valid().to_numpy()
    has &= table[schema.SCORE].is_valid().to_numpy()
    rank = pc.fill_null(table[schema.RANK], 0).to_numpy()
    score = pc.fill_null(table[schema.SCORE], 0).to_numpy()
    users = table[schema.USER_ID].combine_chunks().dictionary_encode().indices.to_numpy()
    follows = ~begins
    before = np.arange(len(table)) - 1
    broken = follows & ((rank != rank[before] + 1) | (users != users[before]) | ~(score <= score[before]))
    found = {
        "have neither an item nor a reason, or both": has == failed,
        "break the order of ranks and scores": broken | (has & begins & (rank != 1)),
        "hold a score that is not finite": ~np.isfinite(score),
    }
    ids = table[schema.USER_ID]
    return [
        f"{int(rows.sum())} rows {what}, the first is of user {ids[int(np.argmax(rows))].as_py()!r}"
        for what, rows in found.items()
        if rows.any()
    ]
