"""`vlm2rec prepare`: items, interactions and images become a dataset folder.

Interactions are turned into integers early: ten million of them are 160 MB, so that filtering, sorting and splitting
happen in memory, while the files are scanned by Polars and written row group by row group.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from rich.markup import escape
from rich.table import Table

from vlm2rec.embedder import schema, storage
from vlm2rec.embedder.dataset import Dataset
from vlm2rec.embedder.errors import ConfigError, DataError, Vlm2RecError
from vlm2rec.pipelines import catalogue_files, console, image_files
from vlm2rec.pipelines.candidates import Sequences, draw_candidates, untouched_counts
from vlm2rec.pipelines.config import PrepareConfig

SHORTEST = 3  # one interaction to train on, one to validate, one to test
WORKING_FOLDER = ".vlm2rec-prepare"
_USERS_PER_GROUP = 16_384
_ITEMS_PER_GROUP = 65_536

PAPER = {  # Table 3 of the VLM2Rec paper
    "Toys": {"users": 15921, "items": 8383, "interactions": 108336, "average_length": 6.8, "sparsity": 0.9992},
    "Beauty": {"users": 19757, "items": 9311, "interactions": 137300, "average_length": 6.9, "sparsity": 0.9993},
    "Clothing": {"users": 30757, "items": 17087, "interactions": 196614, "average_length": 6.4, "sparsity": 0.9996},
    "Sports": {"users": 32127, "items": 14820, "interactions": 222591, "average_length": 6.9, "sparsity": 0.9995},
}
_LONG_NAMES = {
    "toysandgames": "Toys",
    "clothingshoesandjewelry": "Clothing",
    "sportsandoutdoors": "Sports",
    **{name.lower(): name for name in PAPER},
}


@dataclass(frozen=True)
class Step:
    """What is left after one step."""

    step: str
    users: int
    items: int
    interactions: int


@dataclass(frozen=True)
class Log:
    """Interactions as integers, one row each, by user and then time; equal times keep the file's order."""

    user: np.ndarray  # (n,) int32
    item: np.ndarray  # (n,) int32
    time: np.ndarray  # (n,) int64 or float64

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: np.ndarray) -> Log:
        """Return the rows that an index or a mask selects."""
        return Log(self.user[rows], self.item[rows], self.time[rows])


def run(config: PrepareConfig) -> Dataset:
    """Write the dataset folder and return its reader.

    Raises:
        ConfigError: the output folder holds something else, or a setting is impossible.
        DataError: an input file or the images cannot be used, nothing is left after a step, or a user has touched too
            many items for `candidates`.
    """
    _check(config)
    names = catalogue_files.ColumnNames(
        config.item_id_column, config.title_column, config.user_id_column, config.time_column
    )
    with _working_folder(config) as work:
        items = catalogue_files.read_items(config.items, names)
        console.log.print(f"items: {items.format}, {items.frame.height:,} rows")
        found = catalogue_files.scan_interactions(config.interactions, names, scratch=work)
        console.log.print(f"interactions: {found.format}, {found.rows:,} rows")
        images = image_files.find_images(config.images, items.frame)

        catalogue = items.frame.with_columns(images)
        user_ids, log, steps = read_log(found, catalogue)
        log, kept, steps = filter_log(log, catalogue, config, steps)
        user_ids, catalogue = user_ids.gather(kept.users), catalogue[kept.items]
        sequences = Sequences(log.item, np.concatenate([[0], np.cumsum(np.bincount(log.user))]))

        _write_items(catalogue, work / schema.ITEMS_FILE)
        _write_sequences(sequences, user_ids, catalogue[schema.ITEM_ID], work / schema.SEQUENCES_FILE)
        _write_candidates(sequences, user_ids, catalogue[schema.ITEM_ID], config, work / schema.NEGATIVES_FILE)
        sources = {"items": items.format, "interactions": found.format}
        meta = _describe(config, steps, sources, work)
        _publish(work, config.out, meta)
    _print(meta, config.out)
    return Dataset(config.out)


def _check(config: PrepareConfig) -> None:
    seeds = config.candidate_seeds
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0 or max(seeds) >= 2**31:
        raise ConfigError(
            f"candidate_seeds is {list(seeds)}",
            "one or more different seeds from 0 to 2147483647",
            "give --candidate-seeds 0,1,2,3,4, for example",
        )
    columns = [config.item_id_column, config.title_column, config.user_id_column, config.time_column]
    if len(set(columns)) != len(columns):
        raise ConfigError(f"two of the columns {', '.join(columns)} are the same", "four columns", "correct the names")


# --- from the files to integers -----------------------------------------------------------------------------


def read_log(found: catalogue_files.Interactions, catalogue: pl.DataFrame) -> tuple[pl.Series, Log, list[Step]]:
    """Read the interactions of catalogue items.

    Returns:
        All user ids, sorted; the interactions (`user` a row of the ids, `item` a row of `catalogue`); the counts.
    """
    user_ids = found.frame.select(schema.USER_ID).unique().collect(engine="streaming")[schema.USER_ID].sort()
    users = _lookup(user_ids, "user")
    items = _lookup(catalogue[schema.ITEM_ID], "item")
    table = (
        found.frame.join(items, on=schema.ITEM_ID, how="inner", maintain_order="left")
        .join(users, on=schema.USER_ID, how="left", maintain_order="left")
        .select("user", "item", catalogue_files.TIME)
        .collect(engine="streaming")
    )
    user, time = table["user"].to_numpy(), table[catalogue_files.TIME].to_numpy()
    order = np.lexsort((time, user))  # stable: equal times stay in the file's order
    log = Log(user[order], table["item"].to_numpy()[order], time[order])
    steps = [
        Step("as read", len(user_ids), catalogue.height, found.rows),
        Step("interactions of known items", _distinct(log.user), catalogue.height, len(log)),
    ]
    if not len(log):
        theirs = found.frame.select(schema.ITEM_ID).head(3).collect()[schema.ITEM_ID].to_list()
        ours = catalogue[schema.ITEM_ID].head(3).to_list()
        raise _nothing_left(
            steps,
            f"the interactions name items such as {theirs}, the catalogue holds {ours}",
            "take both files from one catalogue, or name the right columns with --item-id-column",
        )
    return user_ids, log, steps


def _lookup(ids: pl.Series, name: str) -> pl.LazyFrame:
    return pl.DataFrame([ids, pl.Series(name, np.arange(len(ids), dtype=np.int32))]).lazy()


def _distinct(codes: np.ndarray) -> int:
    return int(np.count_nonzero(np.bincount(codes))) if len(codes) else 0


# --- filtering ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """Rows that survived: of the user ids and of the catalogue."""

    users: np.ndarray
    items: np.ndarray


def filter_log(
    log: Log, catalogue: pl.DataFrame, config: PrepareConfig, steps: list[Step]
) -> tuple[Log, Kept, list[Step]]:
    """Drop items without title or image, exact duplicates, and what is not in the k-core; renumber what is left.

    Returns:
        The interactions left (users and items renumbered, order unchanged), the rows they come from, the counts.

    Raises:
        DataError: naming the step after which nothing is left.
    """
    steps = list(steps)
    alive = np.ones(catalogue.height, bool)
    titled = (catalogue[schema.TITLE].str.strip_chars() != "").fill_null(False).to_numpy()
    pictured = catalogue[schema.IMAGE_PATH].is_not_null().to_numpy()
    for name, has in (("items with a title", titled), ("items with an image", pictured)):
        alive &= has
        log = log.take(alive[log.item])
        steps.append(Step(name, _distinct(log.user), int(alive.sum()), len(log)))
        if not len(log):
            raise _nothing_left(steps, f"{int(has.sum()):,} of {len(has):,} items are {name}", "check the catalogue")
    log = log.take(first_occurrences(log))
    steps.append(Step("exact duplicates removed", _distinct(log.user), int(alive.sum()), len(log)))
    log = log.take(core_rows(log, max(config.core, SHORTEST), config.core))
    shortest = f", users with {SHORTEST} interactions" if config.core < SHORTEST else ""
    steps.append(Step(f"{config.core}-core{shortest}", _distinct(log.user), _distinct(log.item), len(log)))
    if not len(log):
        raise _nothing_left(
            steps,
            f"no group of users with {max(config.core, SHORTEST)} and items with {config.core} interactions is left",
            f"lower --core (now {config.core}), or bring more interactions",
        )
    users, user = np.unique(log.user, return_inverse=True)
    items, item = np.unique(log.item, return_inverse=True)
    return Log(user.astype(np.int32), item.astype(np.int32), log.time), Kept(users, items), steps


def first_occurrences(log: Log) -> np.ndarray:
    """Return a mask, (n,) bool, without the later copies of rows that agree in user, item and time."""
    tied = np.zeros(len(log), bool)  # copies can only be among rows of one user and time, which stand together
    tied[1:] = (log.user[1:] == log.user[:-1]) & (log.time[1:] == log.time[:-1])
    tied[:-1] |= tied[1:]
    rows = np.flatnonzero(tied)
    rows = rows[np.lexsort((log.time[rows], log.item[rows], log.user[rows]))]  # stable: the first copy comes first
    same = [field[rows[1:]] == field[rows[:-1]] for field in (log.user, log.item, log.time)]
    mask = np.ones(len(log), bool)
    mask[rows[1:][same[0] & same[1] & same[2]]] = False
    return mask


def core_rows(log: Log, user_least: int, item_least: int) -> np.ndarray:
    """Return the rows of the largest subset in which every user and item has enough interactions, in order.

    Users and items below their minimum are dropped in turn until nobody is: the result does not depend on the order.
    """
    rows = np.arange(len(log))
    user, item = log.user, log.item
    while True:
        keep = (np.bincount(user) >= user_least)[user] if len(user) else np.empty(0, bool)
        keep &= (np.bincount(item) >= item_least)[item] if len(item) else keep
        if keep.all():
            return rows
        rows, user, item = rows[keep], user[keep], item[keep]


def _nothing_left(steps: list[Step], why: str, fix: str) -> DataError:
    before = next((step for step in reversed(steps[:-1]) if step.interactions), steps[0])
    return DataError(
        f"step {steps[-1].step!r} leaves nothing of {before.users:,} users, {before.items:,} items and"
        f" {before.interactions:,} interactions: {why}",
        "at least one user with three interactions",
        fix,
    )


# --- writing ------------------------------------------------------------------------------------------------


def _write_items(catalogue: pl.DataFrame, path: Path) -> None:
    first = [schema.ITEM_ID, schema.TITLE, schema.IMAGE_PATH]
    table = catalogue.select(*first, *(c for c in catalogue.columns if c not in first))
    arrow_schema = pa.schema(
        [
            pa.field(f.name, pa.string() if pa.types.is_large_string(f.type) else f.type)
            for f in _arrow(table[:0]).schema
        ]
    )
    with pq.ParquetWriter(path, arrow_schema, compression="zstd", write_page_checksum=True) as writer:
        for start in range(0, table.height, _ITEMS_PER_GROUP):
            writer.write_table(_arrow(table[start : start + _ITEMS_PER_GROUP]).cast(arrow_schema))


def _short_string(kind: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_large_string(kind) else kind


def _arrow(table: pl.DataFrame) -> pa.Table:
    return table.to_arrow(compat_level=pl.CompatLevel.oldest())


def _write_sequences(sequences: Sequences, user_ids: pl.Series, item_ids: pl.Series, path: Path) -> None:
    items, users = _arrow_ids(item_ids), _arrow_ids(user_ids)
    columns = [(schema.USER_ID, users.type), (schema.TRAIN, _LISTS), (schema.VALID, _CODED), (schema.TEST, _CODED)]
    with _id_writer(path, columns) as writer:
        for start in range(0, len(sequences), _USERS_PER_GROUP):
            ends = sequences.offsets[start : start + _USERS_PER_GROUP + 1]
            rows = sequences.items[ends[0] : ends[-1]]
            last = ends[1:] - ends[0] - 1
            train = np.ones(len(rows), bool)
            train[last] = train[last - 1] = False
            offsets = ends - ends[0] - 2 * np.arange(len(ends))
            writer.write_table(
                pa.Table.from_arrays(
                    [
                        users.slice(start, len(last)),
                        pa.ListArray.from_arrays(offsets.astype(np.int32), _coded(rows[train], items)),
                        _coded(rows[last - 1], items),
                        _coded(rows[last], items),
                    ],
                    schema=writer.schema,
                )
            )


def _require_untouched(sequences: Sequences, user_ids: pl.Series, num_items: int, count: int) -> None:
    if num_items - int(np.diff(sequences.offsets).max()) >= count:
        return  # nobody has touched so many, even without repeats
    left = untouched_counts(sequences, num_items)
    least, short = int(left.min()), int((left < count).sum())
    if short:
        raise DataError(
            f"{short:,} of {len(sequences):,} users have touched so much of the {num_items:,} items that fewer than"
            f" {count} are left to draw from; user {user_ids[int(left.argmin())]!r} has {least} left",
            f"at least {count} untouched items for every user",
            f"give --candidates {least} or less" if least else "bring more items: this user has touched every one",
        )


def _write_candidates(
    sequences: Sequences, user_ids: pl.Series, item_ids: pl.Series, config: PrepareConfig, path: Path
) -> None:
    count, num_items, num_users = config.candidates, len(item_ids), len(sequences)
    _require_untouched(sequences, user_ids, num_items, count)
    items, users = _arrow_ids(item_ids), _arrow_ids(user_ids)
    columns = [(schema.SEED, pa.int32()), (schema.USER_ID, users.type), (schema.NEGATIVES, _LISTS)]
    total = num_users * len(config.candidate_seeds)
    with _id_writer(path, columns) as writer, console.progress("candidates", total) as advance:
        for seed in sorted(config.candidate_seeds):
            for start in range(0, num_users, _USERS_PER_GROUP):
                group = range(start, min(start + _USERS_PER_GROUP, num_users))
                drawn = draw_candidates(sequences, group, num_items, count, seed)
                offsets = np.arange(len(group) + 1, dtype=np.int32) * np.int32(count)
                lists = pa.ListArray.from_arrays(offsets, _coded(drawn.ravel(), items))
                seeds = pa.array(np.full(len(group), seed, np.int32))
                writer.write_table(
                    pa.Table.from_arrays([seeds, users.slice(start, len(group)), lists], schema=writer.schema)
                )
                advance(len(group))


_CODED = pa.dictionary(pa.int32(), pa.string())
_LISTS = pa.list_(_CODED)


@contextmanager
def _id_writer(path: Path, columns: list[tuple[str, pa.DataType]]) -> Iterator[pq.ParquetWriter]:
    """Open a Parquet file whose item ids are handed over as codes: nothing is spelled out 10⁸ times.

    Without the stored Arrow schema readers see plain strings and lists of strings.
    """
    coded = [name if kind == _CODED else f"{name}.list.element" for name, kind in columns if kind in (_CODED, _LISTS)]
    with pq.ParquetWriter(
        path,
        pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns]),
        compression="zstd",
        use_dictionary=coded,
        # smallest and largest of random ids help no reader, and finding them takes longer than all the rest
        write_statistics=[name for name, kind in columns if kind not in (_CODED, _LISTS)],
        dictionary_pagesize_limit=1 << 28,  # the default falls back to plain strings at 1 MB of ids
        write_page_checksum=True,
        store_schema=False,
    ) as writer:
        yield writer


def _coded(codes: np.ndarray, ids: pa.Array) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), ids)


def _arrow_ids(ids: pl.Series) -> pa.Array:
    return ids.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(pa.string())


def _describe(config: PrepareConfig, steps: list[Step], sources: Mapping[str, str], work: Path) -> dict[str, Any]:
    """Return what dataset.json holds. Nothing in it depends on the day or the machine's speed."""
    out = config.out.resolve()
    name = config.name or out.name
    last = steps[-1]
    root = config.images.resolve()
    return {
        "schema_version": schema.SCHEMA_VERSION,
        "name": name,
        "users": last.users,
        "items": last.items,
        "interactions": last.interactions,
        "average_length": last.interactions / last.users,
        "sparsity": 1 - last.interactions / (last.users * last.items),
        "image_root": str(root.relative_to(out)) if root.is_relative_to(out) else str(root),
        "max_history": config.max_history,
        "negatives": {"count": config.candidates, "seeds": sorted(config.candidate_seeds)},
        "counts": [asdict(step) for step in steps],
        "paper": PAPER.get(paper_name(name) or ""),
        "rules": {
            "core": config.core,
            "shortest_sequence": SHORTEST,
            "duplicates": "rows equal in user, item and time count once",
            "order": "by time; equal times keep the file's order",
            "split": "leave-one-out: the last item is test, the last but one valid, the rest train",
            "negatives": "uniform without replacement from the items the user never touched",
        },
        "sources": dict(sources),
        "sha256": {
            file: storage.sha256_file(work / file)
            for file in (schema.ITEMS_FILE, schema.SEQUENCES_FILE, schema.NEGATIVES_FILE)
        },
    }


def paper_name(name: str) -> str | None:
    """Return the paper's name of a dataset (`Toys_and_Games` → `Toys`), None where it has none."""
    return _LONG_NAMES.get(re.sub(r"[^a-z]", "", name.lower()))


def _print(meta: Mapping[str, Any], out: Path) -> None:
    table = Table(title=escape(f"{meta['name']} → {out}"), title_justify="left")
    table.add_column("step")
    for column in ("users", "items", "interactions"):
        table.add_column(column, justify="right")
    for step in meta["counts"]:
        table.add_row(step["step"], *(f"{step[key]:,}" for key in ("users", "items", "interactions")))
    if meta["paper"]:
        table.add_section()
        label = f"the paper's {paper_name(meta['name'])}"
        table.add_row(label, *(f"{meta['paper'][key]:,}" for key in ("users", "items", "interactions")), style="dim")
    console.log.print(table)
    console.log.print(
        f"average length {meta['average_length']:.1f}, sparsity {meta['sparsity']:.2%},"
        f" {meta['negatives']['count']} candidates per user for seeds {', '.join(map(str, meta['negatives']['seeds']))}"
    )


# --- the output folder --------------------------------------------------------------------------------------


@contextmanager
def _working_folder(config: PrepareConfig) -> Iterator[Path]:
    """Make, lock and finally remove a folder inside `out` for files that are not finished."""
    out = config.out
    _refuse_foreign(config)
    existed = out.exists()
    work = out / WORKING_FOLDER
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (out / WORKING_FOLDER / "lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"--out {out} cannot be written ({error.strerror})", "a folder that may be written", "choose another"
        ) from None
    with lock:
        _take_lock(lock, out)
        try:
            for left in work.iterdir():
                if left.name != "lock":
                    left.unlink()
            yield work
        except OSError as error:
            raise _disk_error(out, error) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
            if not existed and not any(out.iterdir()):
                out.rmdir()


def _take_lock(lock: IO[str], out: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"another `vlm2rec prepare` is writing {out}", "one at a time", "wait for it, or choose another --out"
        ) from None


def _disk_error(out: Path, error: OSError) -> Vlm2RecError:
    return DataError(f"reading the inputs or writing {out} failed: {error}", "", "make room or check the rights")


def _refuse_foreign(config: PrepareConfig) -> None:
    """Raise unless `out` is new, empty, a dataset folder, or holds nothing but the images."""
    out = config.out
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"--out {out} is a file", "a folder", "choose another")
    for source in (config.items, config.interactions):
        if source.resolve().parent == out.resolve() and source.name in _FILES:
            raise ConfigError(f"--out {out} would overwrite the input {source.name}", "another folder", "choose one")
    names = {path.name for path in out.iterdir()}
    own = bool(names & {WORKING_FOLDER, schema.SEQUENCES_FILE})
    names = {name for name in names if not name.startswith(".")}
    root = config.images.resolve()
    if root.is_relative_to(out.resolve()) and root != out.resolve():
        names.discard(root.relative_to(out.resolve()).parts[0])
    if names and not own:
        raise ConfigError(
            f"--out {out} is not empty and not a dataset folder: it holds {', '.join(sorted(names)[:3])}",
            "a new or empty folder, or a dataset folder to replace",
            "choose another --out",
        )


_FILES = (schema.ITEMS_FILE, schema.SEQUENCES_FILE, schema.NEGATIVES_FILE, schema.DATASET_FILE)


def _publish(work: Path, out: Path, meta: Mapping[str, Any]) -> None:
    """Move the finished files into place; dataset.json goes first when it is old and comes last when it is new."""
    for name in meta["sha256"]:
        with (work / name).open("rb") as file:
            os.fsync(file.fileno())
    (out / schema.DATASET_FILE).unlink(missing_ok=True)
    # sequences.parquet first: by its name a later run knows a folder that was left half done as its own
    for name in (schema.SEQUENCES_FILE, schema.NEGATIVES_FILE, schema.ITEMS_FILE):
        (work / name).replace(out / name)
    storage.sync_folder(out)
    schema.write_json(out / schema.DATASET_FILE, meta)
