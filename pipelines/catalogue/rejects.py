"""Keeps account of every row that is left out: how many, why, and which, in `rejects.csv`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import polars as pl

from vlm2rec.embedder.contract import printable
from vlm2rec.embedder.contract.schema import ITEM_ID, USER_ID
from vlm2rec.pipelines.catalogue.ids import ROW

ITEMS, INTERACTIONS = "items", "interactions"
COLUMNS = ("file", ROW, ITEM_ID, USER_ID, "reason")
"""Of `rejects.csv`: items or interactions, the row counted from 1 below the header, its ids if it has them, and why."""

_ROWS_AT_A_TIME = 1 << 18


class Rejects:
    """The file of rejects, written as rows are left out, and the counts of each reason.

    Use it as a context; memory does not grow with the number of rows.
    """

    def __init__(self, path: Path) -> None:
        self.counts: dict[str, dict[str, int]] = {ITEMS: {}, INTERACTIONS: {}}
        self._path = path

    def __enter__(self) -> Rejects:
        self._file: IO[bytes] = self._path.open("wb")
        self._file.write((",".join(COLUMNS) + "\n").encode())
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def account(self, read: Mapping[str, int], kept: Mapping[str, int]) -> dict[str, dict[str, Any]]:
        """Return for either file the rows read, kept, and rejected by reason; close the file of rejects.

        Raises:
            RuntimeError: they do not add up; this is a mistake of the program.
        """
        self._file.close()
        for file, counts in self.counts.items():
            if read[file] != kept[file] + sum(counts.values()):
                raise RuntimeError(f"{file}: {read[file]} rows read, {kept[file]} kept, rejected: {counts}")
        return {
            file: {"read": read[file], "kept": kept[file], "rejected": counts} for file, counts in self.counts.items()
        }

    def add_items(self, rows: np.ndarray, ids: pl.Series, reason: str, details: pl.Series | None = None) -> None:
        """Leave out items: `rows` of the catalogue, (n,), whose ids are `ids`; `details` adds to each one's reason."""
        for part in _parts(len(rows)):
            more = None if details is None else details.gather(rows[part])
            self._write(ITEMS, {ROW: rows[part], ITEM_ID: ids.gather(rows[part])}, reason, more)

    def add_interactions(self, rows: np.ndarray, items: Iterable[Any], users: Iterable[Any], reason: str) -> None:
        """Leave out interactions: their rows in the file, (n,), and the `(ids, codes)` of their items and users."""
        (item_ids, item), (user_ids, user) = items, users
        for part in _parts(len(rows)):
            columns = {ROW: rows[part], ITEM_ID: item_ids.gather(item[part]), USER_ID: user_ids.gather(user[part])}
            self._write(INTERACTIONS, columns, reason)

    def stream_interactions(self, frame: pl.LazyFrame, counts: dict[str, int]) -> None:
        """Leave out the interactions of a frame (row, item_id, user_id, reason) that is read as it is written."""
        self._file.flush()
        columns = frame.with_columns(file=pl.lit(INTERACTIONS))
        columns.select(_safe_columns()).sink_csv(self._file, include_header=False, engine="streaming")
        self._count(INTERACTIONS, counts)

    def _write(self, file: str, columns: dict[str, Any], reason: str, details: pl.Series | None = None) -> None:
        text = pl.lit(reason) if details is None else f"{reason}: " + details
        frame = pl.DataFrame({USER_ID: None, **columns}).with_columns(
            pl.lit(file).alias("file"), text.alias("reason"), pl.col(USER_ID).cast(pl.String)
        )
        frame.select(_safe_columns()).write_csv(self._file, include_header=False)
        self._count(file, {reason: frame.height})

    def _count(self, file: str, counts: dict[str, int]) -> None:
        for reason, count in counts.items():
            if count:
                self.counts[file][reason] = self.counts[file].get(reason, 0) + count


def _parts(count: int) -> Iterable[slice]:
    return (slice(start, start + _ROWS_AT_A_TIME) for start in range(0, count, _ROWS_AT_A_TIME))


def _safe_columns() -> list[pl.Expr]:
    texts = [safe_text(pl.col(name)) if name != ROW else (pl.col(ROW).cast(pl.Int64) + 1) for name in COLUMNS]
    return [expression.alias(name) for name, expression in zip(COLUMNS, texts, strict=True)]


def safe_text(text: pl.Expr) -> pl.Expr:
    """Return a column of text as `printable.cell` makes each of its cells; null stays null."""
    line = text.str.replace_all(printable.CONTROLS, " ")
    return pl.when(line.str.contains(printable.FORMULA)).then(pl.concat_str(pl.lit("'"), line)).otherwise(line)
