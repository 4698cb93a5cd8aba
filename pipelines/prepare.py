"""`vlm2rec prepare`: turns items, interactions and images into a dataset folder.

Interactions become integers early: ten million of them take 160 MB, so they are filtered, sorted and split in memory.
Polars scans the input files, and the output is written row group by row group.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from vlm2rec.embedder.contract import publish, schema, storage
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, DataError, Vlm2RecError
from vlm2rec.pipelines import console
from vlm2rec.pipelines.catalogue import files
from vlm2rec.pipelines.catalogue.dataset_writer import write_candidates, write_items, write_sequences
from vlm2rec.pipelines.catalogue.filtering import (
    SHORTEST,
    Count,
    Log,
    filter_log,
    given,
    read_log,
    required,
    say_of_items,
)
from vlm2rec.pipelines.catalogue.ids import words_for_nothing
from vlm2rec.pipelines.catalogue.images import find_images, no_images, no_images_error
from vlm2rec.pipelines.catalogue.negatives import Sequences
from vlm2rec.pipelines.catalogue.rejects import INTERACTIONS, ITEMS, Rejects
from vlm2rec.pipelines.config import PrepareConfig
from vlm2rec.pipelines.reporting.paper import nearest, read_paper

WORKING_FOLDER = ".vlm2rec-prepare"

_LONG_NAMES = {
    "toysandgames": "Toys",
    "clothingshoesandjewelry": "Clothing",
    "sportsandoutdoors": "Sports",
}


def run(config: PrepareConfig) -> Dataset:
    """Write the dataset folder and return its reader.

    Raises:
        ConfigError: the output folder holds something else, or a setting is impossible.
        DataError: an input file or the images cannot be used, nothing is left after a step, or a user has too
            few items left for `candidates`.
    """
    _check(config)
    names = files.ColumnNames(
        config.items_id_column or config.item_id_column,
        config.title_column,
        config.user_id_column,
        config.time_column if config.order == "time" else None,
    )
    with _working_folder(config) as work, Rejects(work / schema.REJECTS_FILE) as rejects:
        items = files.read_items(config.items, names)
        console.log.print(f"items: {items.format}, {items.frame.height:,} rows")
        _warn_of_words(items.frame, config.items)
        names = replace(names, item_id=config.interactions_item_column or config.item_id_column)
        found = files.scan_interactions(config.interactions, names, scratch=work)
        console.log.print(f"interactions: {found.format}, {found.rows:,} rows")
        _say_of_ratings(found)
        catalogue, image_reasons = _with_images(config, items.frame)
        user_ids, log, steps = read_log(found, catalogue, rejects)
        compare = paper_name(_name(config)) is not None
        log, kept, steps = filter_log(log, user_ids, catalogue, image_reasons, config, steps, rejects, compare)
        if config.order == "time":
            _say_of_ties(log)
        rows = rejects.account(
            {ITEMS: items.frame.height, INTERACTIONS: found.rows}, {ITEMS: len(kept.catalogue), INTERACTIONS: len(log)}
        )
        user_ids, touched = user_ids.gather(kept.users), catalogue[schema.ITEM_ID].gather(kept.items)
        catalogue = catalogue[kept.catalogue]
        sequences = Sequences(log.item, np.concatenate([[0], np.cumsum(np.bincount(log.user))]))

        write_items(catalogue, work / schema.ITEMS_FILE)
        # training and ranking know the items with interactions only
        write_sequences(sequences, user_ids, touched, work / schema.SEQUENCES_FILE, config.split)
        write_candidates(sequences, user_ids, touched, config, work / schema.NEGATIVES_FILE)
        sources = {"items": items.format, "interactions": found.format}
        meta = _describe(config, steps, catalogue, rows, sources, work)
        if kept.variants:
            meta["variants"] = [asdict(each) for each in kept.variants]
        _publish(work, config.out, meta)
    _print(meta, config.out)
    return Dataset(config.out)


def _with_images(config: PrepareConfig, items: pl.DataFrame) -> tuple[pl.DataFrame, pl.Series]:
    """Return the catalogue with each item's image, and why an item has none."""
    names_images = config.images is not None and config.image_column in (None, schema.IMAGE_PATH)
    if schema.IMAGE_PATH in items.columns and not names_images:
        items = items.rename({schema.IMAGE_PATH: files.free_name(f"source_{schema.IMAGE_PATH}", items.columns)})
    if config.images is None:
        found = no_images(items)
        return items.with_columns(found.paths), found.reasons
    found = find_images(config.images, items, config.image_column)
    if "image" in required(config) and found.paths.null_count() == items.height:
        raise no_images_error(config.images, items, found, config.image_column)
    catalogue = items.with_columns(found.paths)
    if "image" not in required(config):
        without = np.flatnonzero(~given(catalogue, "image"))
        say_of_items(without, catalogue, "have no image and are kept", found.reasons)
    return catalogue, found.reasons


def _check(config: PrepareConfig) -> None:
    seeds = config.candidate_seeds
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0 or max(seeds) >= 2**31:
        raise ConfigError(
            f"candidate_seeds is {list(seeds)}",
            "one or more different seeds from 0 to 2147483647",
            "give --candidate-seeds 0,1,2,3,4, for example",
        )
    if config.images is None and ("image" in config.require or config.image_column is not None):
        flag = "--require image" if "image" in config.require else "--image-column"
        raise ConfigError(f"{flag} without --images", "the folder of the images", f"give --images, or leave {flag} out")
    for who, least in (("user", config.min_user), ("item", config.min_item)):
        if 0 < least <= config.core and config.core > 1:
            raise ConfigError(
                f"--min-{who} {least} with --core {config.core}, which leaves only {who}s with {config.core}"
                " interactions anyway",
                f"--core 1 for the minima alone, or a --min-{who} above {config.core}",
                f"give --core 1, or leave --min-{who} out",
            )
    time = [config.time_column] if config.order == "time" else []
    for columns in (
        [config.items_id_column or config.item_id_column, config.title_column],
        [config.interactions_item_column or config.item_id_column, config.user_id_column, *time],
    ):
        if len(set(columns)) != len(columns):
            raise ConfigError(
                f"two of the columns {', '.join(columns)} are the same", "one column for each", "correct the names"
            )


def _warn_of_words(items: pl.DataFrame, path: Path) -> None:
    """Say so if items have an id or a title such as nan or None: text is kept as it is."""
    for column in (schema.ITEM_ID, schema.TITLE):
        for word, rows in words_for_nothing(items[column]).iter_rows():
            console.TERMINAL.say(
                f"{rows:,} of {items.height:,} items of {path} have the {column} {word!r}. It is kept, as the column"
                " holds text; if it stands for nothing, leave the field empty.",
                warning=True,
            )


def _say_of_ratings(found: files.Interactions) -> None:
    if found.rating is not None:
        console.TERMINAL.say(
            f"the column {found.rating!r} of {found.path} is not read: each of the {found.rows:,} rows counts as an"
            " interaction, whatever its rating. If only some shall count, such as high ratings, give a file with"
            " those rows alone."
        )


_MANY_TIES = 0.1  # of the interactions, or of the users' last ones: below that, nothing is said


def _say_of_ties(log: Log) -> None:
    """Say how many interactions the times leave without an order, and of how many users the last item is among them.

    `log` is sorted by user and time.
    """
    same = (log.user[1:] == log.user[:-1]) & (log.time[1:] == log.time[:-1])
    tied = int(np.count_nonzero(np.append(same, False) | np.append(False, same)))
    last = np.append(log.user[1:] != log.user[:-1], True)
    users, undecided = int(np.count_nonzero(last)), int(np.count_nonzero(last & np.append(False, same)))
    if tied >= _MANY_TIES * len(log) or undecided >= _MANY_TIES * users:
        console.TERMINAL.say(
            f"{tied:,} of {len(log):,} interactions ({tied / len(log):.0%}) have the same user and time as another."
            f" The file's order decides between them: for {undecided:,} of {users:,} users also which item is the"
            " last, and so for test. If the rows do not stand in their true order in the file, sort them there, or"
            " keep one of each user and time.",
            warning=True,
        )


def _describe(
    config: PrepareConfig,
    steps: list[Count],
    catalogue: pl.DataFrame,
    rows: Mapping[str, Any],
    sources: Mapping[str, str],
    work: Path,
) -> dict[str, Any]:
    """Return the content of dataset.json. Nothing in it depends on the date or the machine's speed."""
    out, name = config.out.resolve(), _name(config)
    last = steps[-1]
    by_time = config.order == "time"
    cold = catalogue.height - last.items
    if cold:
        steps = [*steps, Count("cold items kept", last.users, catalogue.height, last.interactions)]
    return {
        "schema_version": schema.SCHEMA_VERSION,
        "name": name,
        "users": last.users,
        "items": catalogue.height,
        "cold_items": cold,  # of these, without an interaction; the sparsity is that of the others
        "interactions": last.interactions,
        "average_length": last.interactions / last.users,
        "sparsity": 1 - last.interactions / (last.users * last.items),
        "image_root": None
        if catalogue[schema.IMAGE_PATH].null_count() == catalogue.height
        else _image_root(config, out),
        "max_history": config.max_history,
        **({} if config.split == schema.LEAVE_ONE_OUT else {schema.SPLIT: config.split}),
        "negatives": {"count": config.candidates, "seeds": sorted(config.candidate_seeds)},
        "counts": [asdict(step) for step in steps],
        "rows": dict(rows),
        "paper": read_paper()["datasets"].get(paper_name(name)),
        "rules": {
            "core": config.core,
            **({"min_user": config.min_user} if config.min_user else {}),
            **({"min_item": config.min_item} if config.min_item else {}),
            **({"truncate": config.truncate} if config.truncate else {}),
            "required": list(required(config)),
            "shortest_sequence": SHORTEST,
            "ids": "text without white space at its ends; null, NaN and blank text are none",
            "duplicates": "rows equal in user, item and time count once" if by_time else "every row counts",
            "order": "by time; equal times keep the file's order" if by_time else "the file's order",
            "split": _SPLITS[config.split],
            "negatives": "uniform without replacement from the items the user never touched",
        },
        "sources": dict(sources),
        "sha256": {file: storage.sha256_file(work / file) for file in schema.DATASET_TABLES},
    }


_SPLITS = {
    schema.LEAVE_ONE_OUT: "leave-one-out: the last item is test, the last but one valid, the rest train",
    schema.TEMPORAL: "temporal: of a user's n items in order the last n // 5 are held out, at least two; the first half"
    " of these, rounded down, is valid, the others are test",
}


def _name(config: PrepareConfig) -> str:
    return config.name or config.out.resolve().name


def _image_root(config: PrepareConfig, out: Path) -> str:
    """Return the image root relative to the dataset folder, so that both can move together.

    If they have nothing but the root of the disk in common, it is absolute: then they will not move together.
    """
    assert config.images is not None
    root = config.images.resolve()
    return os.path.relpath(root, out) if os.path.commonpath([root, out]) != "/" else str(root)


def paper_name(name: str) -> str | None:
    """Return the paper's name of a dataset (`Toys_and_Games` → `Toys`), None if it has none."""
    known = {short.lower(): short for short in read_paper()["datasets"]} | _LONG_NAMES
    return known.get(re.sub(r"[^a-z]", "", name.lower()))


def _print(meta: Mapping[str, Any], out: Path) -> None:
    table = Table(title=f"{meta['name']} → {out}", title_justify="left")
    table.add_column("step")
    for column in ("users", "items", "interactions"):
        table.add_column(column, justify="right")
    for step in meta["counts"]:
        table.add_row(step["step"], *(f"{step[key]:,}" for key in ("users", "items", "interactions")))
    if meta["paper"]:
        table.add_section()
        label = f"the paper's {paper_name(meta['name'])}"
        table.add_row(label, *(f"{meta['paper'][key]:,}" for key in ("users", "items", "interactions")), style="dim")
    counts = {name: meta[name] for name in ("users", "items", "interactions")}
    console.summary(str(meta["name"]), {**counts, "folder": out}, table)
    if meta["paper"] and meta.get("variants"):
        near = meta["variants"][nearest(meta["variants"], meta["paper"])]
        console.log.print(
            f"Of the ways to filter this log, `{near['step']}` comes nearest to the paper: {near['users']:,} users,"
            f" {near['items']:,} items, {near['interactions']:,} interactions.",
            markup=False,
        )
    console.log.print(
        f"average length {meta['average_length']:.1f}, sparsity {meta['sparsity']:.2%},"
        f" {meta['negatives']['count']} candidates per user for seeds {', '.join(map(str, meta['negatives']['seeds']))}"
    )
    if meta.get(schema.SPLIT) == schema.TEMPORAL:
        console.log.print("split 80/10/10 in each user's order: several items for validation and for test")
    left_out = {file: sum(of["rejected"].values()) for file, of in meta["rows"].items()}
    if any(left_out.values()):
        told = [f"{count:,} of {meta['rows'][file]['read']:,} {file}" for file, count in left_out.items() if count]
        console.TERMINAL.say(f"left out: {' and '.join(told)}; {out / schema.REJECTS_FILE} names each with its reason")


# --- the output folder --------------------------------------------------------------------------------------


@contextmanager
def _working_folder(config: PrepareConfig) -> Iterator[Path]:
    """Make and lock a folder inside `out` for unfinished files; it is removed at the end."""
    out = config.out
    _refuse_foreign(config)
    existed = out.exists()
    work = out / WORKING_FOLDER
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (out / WORKING_FOLDER / "lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"--out {out} cannot be written ({error.strerror})", "a writable folder", "choose another --out"
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
    return DataError(
        f"reading the inputs or writing {out} failed: {error}",
        "a readable and writable disk",
        "free some space, or check the permissions",
    )


def _refuse_foreign(config: PrepareConfig) -> None:
    """Raise unless `out` is new, empty, a dataset folder, or holds nothing but the images."""
    out = config.out
    for source in (config.items, config.interactions):
        if source.resolve().parent == out.resolve() and source.name in _FILES:
            raise ConfigError(
                f"--out {out} would overwrite the input {source.name}", "another folder", "choose another --out"
            )
    target = out.resolve()
    root = target if config.images is None else config.images.resolve()
    images = root.relative_to(target).parts[0] if root.is_relative_to(target) and root != target else None
    publish.require_ours(
        out,
        "a dataset folder",
        ours=(out / WORKING_FOLDER).exists() or _is_dataset(out),
        ignored=lambda name: name.startswith(".") or name == images,
    )


def _is_dataset(out: Path) -> bool:
    """Tell whether `prepare` has written a folder: its description, or the file that it publishes first, is there."""
    try:
        if {"sha256", "counts"} <= schema.read_json(out / schema.DATASET_FILE, "", "").keys():
            return True
    except ArtifactError:
        pass
    try:
        found = pq.read_schema(out / schema.SEQUENCES_FILE).names
    except (pa.ArrowException, OSError):
        return False
    return found == [schema.USER_ID, schema.TRAIN, schema.VALID, schema.TEST]


_FILES = (
    schema.ITEMS_FILE,
    schema.SEQUENCES_FILE,
    schema.NEGATIVES_FILE,
    schema.REJECTS_FILE,
    schema.DATASET_FILE,
)


def _publish(work: Path, out: Path, meta: Mapping[str, Any]) -> None:
    """Move the finished files into place: an old dataset.json is removed first, the new one is moved last."""
    for name in (*meta["sha256"], schema.REJECTS_FILE):
        publish.sync(work / name)
    (out / schema.DATASET_FILE).unlink(missing_ok=True)
    # sequences.parquet first: its name tells a later run that an unfinished folder is ours
    for name in (schema.SEQUENCES_FILE, schema.NEGATIVES_FILE, schema.ITEMS_FILE, schema.REJECTS_FILE):
        publish.put_in_place(work / name, out / name)
    schema.write_json(out / schema.DATASET_FILE, meta)
