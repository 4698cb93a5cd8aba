"""Reader of the dataset folder that `vlm2rec prepare` writes. No torch in here."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ArtifactError, DataError, Vlm2RecError, did_you_mean
from vlm2rec.embedder.contract.storage import Location, StorePath, location, readable

Split = Literal["valid", "test"]
_TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
_PREPARE_AGAIN = "run `vlm2rec prepare` again into a new folder"
_LOOKED_FOR = 1000  # images, before the folder counts as that of another catalogue


@dataclass(frozen=True)
class Histories:
    """Users of one split: each user's history, and the item that came next; of several targets, the first.

    `items` are rows of `items.parquet`; user u's history is `rows[offsets[u]:offsets[u + 1]]`, oldest first.
    """

    user_ids: list[str]
    rows: np.ndarray  # (sum of lengths,) int32
    offsets: np.ndarray  # (U + 1,) int64
    targets: np.ndarray  # (U,) int32

    def __len__(self) -> int:
        return len(self.user_ids)

    def of(self, user: int) -> np.ndarray:
        """Return the history of the user at position `user`, oldest item first."""
        return self.rows[self.offsets[user] : self.offsets[user + 1]]


class Dataset:
    """A prepared dataset: items, split sequences, stored candidates.

    Items are addressed by their row (int32) inside the program and by `item_id` in every file. A row is that of
    `items.parquet`; of `warm()`, it is the position among the items with an interaction.

    Args:
        path: the dataset folder.
        images: where the images are now. Default: where `dataset.json` says.
        cold_items: whether items without an interaction are among the items.
        only: ids of the items to keep, in any order; None keeps all. Users and candidates stay those of all items.
    """

    def __init__(
        self,
        path: Location | str,
        images: Location | str | None = None,
        cold_items: bool = True,
        only: Sequence[str] | None = None,
    ) -> None:
        self.path = location(path)
        self._images = None if images is None else location(images).resolve()
        self._cold_items = cold_items
        self._only = None if only is None else tuple(only)
        # an object store has no folders: reading dataset.json shows whether this is one
        if isinstance(self.path, Path) and not self.path.is_dir():
            raise ArtifactError(f"{self.path} is not a folder", "a dataset folder", "run `vlm2rec prepare --out` first")
        self.meta: dict[str, Any] = schema.read_json(
            self.path / schema.DATASET_FILE, "a dataset folder written by `vlm2rec prepare`", _PREPARE_AGAIN
        )
        version = self.meta.get("schema_version")
        if not isinstance(version, int) or version > schema.SCHEMA_VERSION:
            raise ArtifactError(
                f"{self.path} has dataset schema version {version!r}",
                f"a version up to {schema.SCHEMA_VERSION}",
                "install a newer vlm2rec, or prepare again with this one",
            )

    def __reduce__(self) -> tuple[type[Dataset], tuple[Location, Location | None, bool, tuple[str, ...] | None]]:
        """Pickle the arguments only: the data in memory may be large, so another process reads the folder itself."""
        return Dataset, (self.path, self._images, self._cold_items, self._only)

    def warm(self) -> Dataset:
        """Return the dataset with the items that have an interaction: what is trained on and ranked.

        `prepare` keeps cold items, so that they get vectors. A folder without any is its own answer.
        """
        return Dataset(self.path, self._images, False, self._only) if self.meta.get("cold_items") else self

    def restricted_to(self, item_ids: Sequence[str]) -> Dataset:
        """Return the dataset with some of its items alone, in the order of `items.parquet`.

        Raises:
            DataError: an id is not in the dataset.
        """
        known = {*self.item_ids}
        if unknown := [item_id for item_id in dict.fromkeys(item_ids) if item_id not in known]:
            raise DataError(
                f"{len(unknown):,} of {len({*item_ids}):,} wanted items are not in {self.path}, such as"
                f" {', '.join(map(repr, unknown[:3]))}",
                f"ids such as {', '.join(map(repr, self.item_ids[:3]))}",
                "correct them, or prepare the dataset with these items",
            )
        return Dataset(self.path, self._images, self._cold_items, item_ids)

    @cached_property
    def catalogue_size(self) -> int:
        """Number of items in `items.parquet`, whichever of them this dataset is restricted to."""
        if self._only is None:
            return len(self.item_ids)
        with readable(self.path / schema.ITEMS_FILE) as source:
            return int(pq.read_metadata(source).num_rows)

    def _setting(self, key: str) -> Any:
        if key not in self.meta:
            raise ArtifactError(
                f"{self.path / schema.DATASET_FILE} has no {key!r}",
                "a dataset folder written by `vlm2rec prepare`",
                _PREPARE_AGAIN,
            )
        return self.meta[key]

    @property
    def name(self) -> str:
        """The dataset's name, as given to `prepare`."""
        return str(self._setting("name"))

    @property
    def max_history(self) -> int:
        """How many of a user's latest items a model may see."""
        value = self._setting("max_history")
        if type(value) is not int or value < 1:
            raise ArtifactError(
                f"{self.path / schema.DATASET_FILE} is damaged: max_history is {value!r}",
                "a number from 1",
                _PREPARE_AGAIN,
            )
        return value

    @property
    def image_root(self) -> Location:
        """Folder that `image_path` is relative to.

        Raises:
            DataError: the dataset has no images.
        """
        if self._images is not None:
            return self._images
        root = self._setting("image_root")
        if root is None:
            raise DataError(
                f"{self.path} was prepared without images",
                "images, as these settings read them",
                "use --views text, or run `vlm2rec prepare --images` into a new folder",
            )
        if isinstance(self.path, StorePath) and Path(str(root)).is_absolute():
            return Path(str(root)).resolve()  # the items are in an object store, their images on this machine
        return (self.path / str(root)).resolve()

    @property
    def has_images(self) -> bool:
        """Whether the dataset was prepared with images; they need not be there now."""
        return self.meta.get("image_root") is not None

    def require_images(self) -> None:
        """Raise `DataError` unless the images are there: the root is a folder, and holds some item's file.

        A disk that is not mounted leaves an empty folder. Without this, every item would fail, one by one.
        """
        root = self.image_root
        named = [path for path in self.image_paths if path]
        if not self.image_paths:
            return  # nothing to look for
        if not named:
            raise DataError(
                f"no item of {self.path} has an image",
                "images, as these settings read them",
                "use --views text, or run `vlm2rec prepare --images` into a new folder",
            )
        try:
            if not root.is_dir():
                found = f"is {'not a folder' if root.exists() else 'missing'}"
            elif any(_is_there(root, path) for path in named[:: max(1, len(named) // _LOOKED_FOR)]):
                return
            else:
                found = f"holds none of the images, such as {', '.join(named[:3])}"
        except OSError as error:
            found = f"cannot be read ({error.strerror or error})"
        raise DataError(
            f"the folder of the images, {root}, {found}",
            f"the images of {self.path}",
            "mount the folder or move it back, or name its new place with --images",
        )

    @cached_property
    def items(self) -> pa.Table:
        """`items.parquet`: item_id, title, image_path, and any other columns of the catalogue."""
        self.__dict__["items_version"] = self.version_now()
        table = schema.read_table(self.path / schema.ITEMS_FILE, fix=_PREPARE_AGAIN)
        schema.require_columns(
            table.column_names,
            [schema.ITEM_ID, schema.TITLE, schema.IMAGE_PATH],
            schema.ITEMS_FILE,
            _PREPARE_AGAIN,
        )
        self._require_text(schema.ITEMS_FILE, table, [schema.ITEM_ID, schema.TITLE, schema.IMAGE_PATH])
        if self._only is not None:
            ids = table[schema.ITEM_ID].cast(pa.string())
            table = table.filter(pc.is_in(ids, value_set=pa.array(self._only, pa.string())))
        return table if self._cold_items else table.filter(self._is_warm(table[schema.ITEM_ID]))

    def _is_warm(self, item_ids: pa.ChunkedArray) -> pa.ChunkedArray:
        """Return which items have an interaction."""
        columns = [self.sequences[name] for name in (schema.TRAIN, schema.VALID, schema.TEST)]
        flat = [pc.list_flatten(column) if _holds_lists(column) else column for column in columns]
        seen = [pc.unique(column.cast(pa.string())) for column in flat]
        return pc.is_in(item_ids.cast(pa.string()), value_set=pc.unique(pa.concat_arrays(seen)))

    @cached_property
    def items_version(self) -> list[int]:
        """What `version_now` returned when `items` was read."""
        return self.version_now()

    def version_now(self) -> list[int]:
        """Return size, time and number of the files that describe the items; without reading them."""
        found: list[int] = []
        for name in (schema.ITEMS_FILE, schema.DATASET_FILE):
            try:
                stat = (self.path / name).stat()
            except OSError:
                found.append(-1)
            else:
                found += [stat.st_size, stat.st_mtime_ns, getattr(stat, "st_ino", 0)]
        return found

    @cached_property
    def sequences(self) -> pa.Table:
        """`sequences.parquet`: user_id, train, valid, test."""
        table = schema.read_table(self.path / schema.SEQUENCES_FILE, fix=_PREPARE_AGAIN)
        wanted = [schema.USER_ID, schema.TRAIN, schema.VALID, schema.TEST]
        schema.require_columns(table.column_names, wanted, schema.SEQUENCES_FILE, _PREPARE_AGAIN)
        held_out = [schema.VALID, schema.TEST]
        lists = [schema.TRAIN, *(held_out if self.has_several_targets else [])]
        columns = [schema.USER_ID, *(() if self.has_several_targets else held_out)]
        self._require_text(schema.SEQUENCES_FILE, table, columns, lists=lists)
        for name in lists[1:]:
            empty = table.filter(pc.equal(pc.coalesce(pc.list_value_length(table[name]), 0), 0))[schema.USER_ID]
            if len(empty):
                raise ArtifactError(
                    f"{self.path / schema.SEQUENCES_FILE} has {len(empty)} users without a {name} item, such as"
                    f" {', '.join(map(repr, empty[:3].to_pylist()))}",
                    "one or more for every user",
                    _PREPARE_AGAIN,
                )
        return table

    @property
    def has_several_targets(self) -> bool:
        """Whether users have several items to validate and to test (the temporal split), or one each."""
        split = self.meta.get(schema.SPLIT, schema.LEAVE_ONE_OUT)
        if split not in (schema.LEAVE_ONE_OUT, schema.TEMPORAL):
            raise ArtifactError(
                f"{self.path / schema.DATASET_FILE} has the split {split!r}",
                f"{schema.LEAVE_ONE_OUT} or {schema.TEMPORAL}",
                "install a newer vlm2rec, or prepare again with this one",
            )
        return bool(split == schema.TEMPORAL)

    def _require_text(self, file: str, table: pa.Table, columns: list[str], lists: Sequence[str] = ()) -> None:
        """Raise `ArtifactError` unless these columns hold text, or lists of it, and all text of the table is UTF-8."""
        for name in [*columns, *lists]:
            held = table.schema.field(name).type
            kind = held
            if name in lists:
                kind = held.value_type if pa.types.is_list(held) or pa.types.is_large_list(held) else None
            elif pa.types.is_dictionary(held):
                kind = held.value_type
            if kind is None or not any(is_text(kind) for is_text in _TEXT_TYPES):
                expected = "a list of item ids for each user" if name in lists else "text"
                raise ArtifactError(f"column {name!r} of {self.path / file} holds {held}", expected, _PREPARE_AGAIN)
        try:
            table.validate(full=True)
        except pa.ArrowException as error:
            raise ArtifactError(
                f"{self.path / file} is damaged ({str(error).splitlines()[0]})", "the file as written", _PREPARE_AGAIN
            ) from None

    @cached_property
    def item_ids(self) -> list[str]:
        """Item ids in the order of `items.parquet`."""
        return self.items[schema.ITEM_ID].to_pylist()

    @cached_property
    def titles(self) -> list[str]:
        """Titles in the order of `items.parquet`."""
        return self.items[schema.TITLE].to_pylist()

    @cached_property
    def image_paths(self) -> list[str]:
        """Image paths below `image_root`, in the order of the items; None for an item without an image."""
        return self.items[schema.IMAGE_PATH].to_pylist()

    @property
    def category_column(self) -> str | None:
        """The column of `items.parquet` with each item's category; None if there is none."""
        return self._first_of(schema.CATEGORY_COLUMNS)

    @property
    def brand_column(self) -> str | None:
        """The column of `items.parquet` with each item's brand; None if there is none."""
        return self._first_of(schema.BRAND_COLUMNS)

    @cached_property
    def categories(self) -> list[str]:
        """Each item's category, in the order of `items.parquet`; several are joined by commas, "" is unknown."""
        return self._names_in(self.category_column)

    @cached_property
    def brands(self) -> list[str]:
        """Each item's brand, in the order of `items.parquet`; "" is unknown."""
        return self._names_in(self.brand_column)

    def _first_of(self, columns: Sequence[str]) -> str | None:
        return next((column for column in columns if column in self.items.column_names), None)

    def _names_in(self, column: str | None) -> list[str]:
        if column is None:
            return [""] * len(self.items)
        named = (each if isinstance(each, list) else [each] for each in self.items[column].to_pylist())
        return [", ".join(str(name).strip() for name in names if name not in (None, "")) for names in named]

    @property
    def text_columns(self) -> list[str]:
        """The columns of `items.parquet` with text, or lists of it: the title, category and brand, then the others."""
        found = [
            field.name
            for field in self.items.schema
            if _holds_text(field.type) and field.name not in (schema.ITEM_ID, schema.IMAGE_PATH)
        ]
        first = [schema.TITLE, self.category_column, self.brand_column]
        return sorted(found, key=lambda name: (first.index(name) if name in first else len(first), found.index(name)))

    def attributes(self, columns: Sequence[str]) -> dict[str, list[str]]:
        """Return columns of `items.parquet` as texts, one for each item and "" where an item has none, by name.

        Args:
            columns: names; `category` is also that of `category_column`, and `all` stands for all `text_columns`.

        Raises:
            DataError: the catalogue has no such column.
        """
        named: list[str] = []
        for name in columns:
            if name == schema.ALL_COLUMNS and name not in self.items.column_names:
                named += self.text_columns
            elif name == schema.CATEGORY_COLUMNS[0] and self.category_column:
                named.append(self.category_column)
            elif name in self.items.column_names and name not in (schema.ITEM_ID, schema.IMAGE_PATH):
                named.append(name)
            else:
                raise DataError(
                    f"{self.path / schema.ITEMS_FILE} has no column {name!r}{did_you_mean(name, self.text_columns)} to"
                    f" take the items' text from; those with text are {', '.join(self.text_columns)}",
                    "a column that `prepare` kept from the catalogue",
                    f"correct --item-text, or run `vlm2rec prepare` again with a catalogue that has {name!r}",
                )
        return {name: self._names_in(name) for name in dict.fromkeys(named)}

    @cached_property
    def user_ids(self) -> list[str]:
        """User ids in the order of `sequences.parquet`."""
        return self.sequences[schema.USER_ID].to_pylist()

    def rows_of(self, item_ids: pa.Array | pa.ChunkedArray | list[str]) -> np.ndarray:
        """Return the rows in `items.parquet` of `item_ids`, int32; raise `ArtifactError` on an unknown id."""
        # the cast: other Parquet writers use large strings, and index_in needs the same type on both sides
        wanted = pa.array(item_ids, pa.string()) if isinstance(item_ids, list) else item_ids.cast(pa.string())
        rows = pc.index_in(wanted, value_set=self.items[schema.ITEM_ID].cast(pa.string()))
        if rows.null_count:
            unknown = pc.filter(wanted, pc.is_null(rows))[0].as_py()
            raise ArtifactError(
                f"item {unknown!r} is not in {self.path / schema.ITEMS_FILE}",
                "ids of this dataset",
                _PREPARE_AGAIN,
            )
        return np.asarray(rows.to_numpy() if isinstance(rows, pa.ChunkedArray) else rows.to_numpy(False), np.int32)

    @cached_property
    def _train(self) -> tuple[np.ndarray, np.ndarray]:
        """All training sequences as (rows, offsets)."""
        return self._lists(schema.TRAIN)

    def _lists(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a column of `sequences` as (rows, offsets); where it holds one item each, these are the lists."""
        if not _holds_lists(self.sequences[column]):
            rows = self.rows_of(self.sequences[column])
            return rows, np.arange(len(rows) + 1)
        lists = self.sequences[column].combine_chunks()
        offsets = lists.offsets.to_numpy().astype(np.int64)
        rows = self.rows_of(lists.values)
        return rows[offsets[0] : offsets[-1]], offsets - offsets[0]

    def train_sequences(self) -> list[np.ndarray]:
        """Return each user's whole training sequence as item rows, oldest first."""
        rows, offsets = self._train
        return [rows[a:b] for a, b in itertools.pairwise(offsets)]

    def trained_sequences(self) -> list[np.ndarray]:
        """Return `train_sequences`, or raise `ArtifactError` if there is no user, or one without a training item."""
        train = self.train_sequences()
        empty = [user for user, sequence in zip(self.user_ids, train, strict=True) if not len(sequence)]
        if empty or not train:
            named = f"{len(empty)} users without a training item, such as {', '.join(map(repr, empty[:3]))}"
            raise ArtifactError(
                f"{self.path} has {named if train else 'no user'}",
                "users with three interactions or more",
                "run `vlm2rec prepare` again",
            )
        return train

    def targets(self, split: Split) -> tuple[np.ndarray, np.ndarray]:
        """Return all items that are held out in `split`, as (rows, offsets (U + 1,)), each user's oldest first."""
        return self._lists(split)

    def known_sequences(self, split: Split) -> list[np.ndarray]:
        """Return each user's items before the targets of `split`, as item rows, oldest first.

        Those of `test` include the validation items: they came before.
        """
        train = self.train_sequences()
        if split == "valid":
            return train
        rows, offsets = self.targets("valid")
        return [np.append(s, rows[a:b]) for s, (a, b) in zip(train, itertools.pairwise(offsets), strict=True)]

    def histories(self, split: Split) -> Histories:
        """Return, for every user, the last `max_history` items before the targets of `split`, and the first target."""
        cut = [known[-self.max_history :] for known in self.known_sequences(split)]
        offsets = np.concatenate([[0], np.cumsum([len(h) for h in cut])]).astype(np.int64)
        rows = np.concatenate(cut).astype(np.int32) if cut else np.empty(0, np.int32)
        targets, starts = self.targets(split)
        return Histories(self.user_ids, rows, offsets, targets[starts[:-1]])

    def train_frequency(self) -> np.ndarray:
        """Return how often each item occurs in the training sequences, (I,) int64."""
        return np.bincount(self._train[0], minlength=len(self.item_ids)).astype(np.int64)

    def frequency(self) -> np.ndarray:
        """Return how often each item occurs in all sequences, with the validation and the test items, (I,) int64."""
        held_out = [self.targets("valid")[0], self.targets("test")[0]]
        return self.train_frequency() + np.bincount(np.concatenate(held_out), minlength=len(self.item_ids))

    @property
    def candidate_seeds(self) -> list[int]:
        """Seeds for which candidate sets are stored."""
        return [int(seed) for seed in self._setting("negatives")["seeds"]]

    @property
    def candidate_count(self) -> int:
        """How many candidates a user has in each stored set."""
        return int(self._setting("negatives")["count"])

    def negatives(self, seed: int) -> np.ndarray:
        """Return the stored candidates of `seed` as item rows, (U, N) int32, one row per user of `user_ids`.

        They were drawn from items the user never touched in any split, so they serve `valid` and `test` alike.
        """
        if seed not in self.candidate_seeds:
            raise ArtifactError(
                f"{self.path} has no candidate set for seed {seed}",
                f"one of {self.candidate_seeds}",
                "choose one of these, or run `vlm2rec prepare --candidate-seeds` again with more",
            )
        table = self._read_negatives(seed)
        if table[schema.USER_ID].to_pylist() != self.user_ids:
            raise ArtifactError(
                f"{self.path / schema.NEGATIVES_FILE} lists other users than {schema.SEQUENCES_FILE}",
                "one row per user and seed",
                _PREPARE_AGAIN,
            )
        lists = table[schema.NEGATIVES].chunks
        count = self.candidate_count
        if any(pc.any(pc.not_equal(pc.list_value_length(part), count)).as_py() for part in lists):
            raise ArtifactError(
                f"{self.path / schema.NEGATIVES_FILE} has users with more or fewer than {count} candidates",
                "as many as dataset.json says",
                _PREPARE_AGAIN,
            )
        rows = [self._rows_of_coded(part.flatten()) for part in lists]
        return np.concatenate([np.empty(0, np.int32), *rows]).reshape(len(self.user_ids), count)

    def _read_negatives(self, seed: int) -> pa.Table:
        file = self.path / schema.NEGATIVES_FILE
        try:
            if not file.is_file():
                raise ArtifactError(f"{file} does not exist", "the stored candidate sets", _PREPARE_AGAIN)
            with readable(file) as source:
                return pq.read_table(
                    source,
                    columns=[schema.USER_ID, schema.NEGATIVES],
                    filters=[(schema.SEED, "=", seed)],
                    # codes, not strings: a hundred ids for each of 10⁶ users would be gigabytes of text
                    read_dictionary=[f"{schema.NEGATIVES}.list.element"],
                )
        except (pa.ArrowException, OSError) as error:
            raise ArtifactError(
                f"{file} cannot be read ({error})", "the candidates as `prepare` wrote them", _PREPARE_AGAIN
            ) from None

    def _rows_of_coded(self, ids: pa.Array) -> np.ndarray:
        if not pa.types.is_dictionary(ids.type):
            return self.rows_of(ids)
        return self.rows_of(ids.dictionary)[ids.indices.to_numpy(zero_copy_only=False)]


def _holds_lists(column: pa.ChunkedArray) -> bool:
    return pa.types.is_list(column.type) or pa.types.is_large_list(column.type)


def _holds_text(kind: pa.DataType) -> bool:
    """Tell whether a column of this type holds text, or lists of it."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(is_text(kind) for is_text in _TEXT_TYPES) and not pa.types.is_null(kind)


def _is_there(root: Location, path: str) -> bool:
    """Tell whether there is a file of that name below the root; whether it can be read is found out when it is."""
    if path.startswith("/") or ".." in path.split("/"):
        return False
    try:
        return (root / path).is_file()
    except ValueError:  # a NUL character
        return False


def dataset_of_export(embeddings: Location, manifest: Mapping[str, Any]) -> tuple[Dataset | None, str]:
    """Return the dataset folder that an export names, if it may be opened and is there; else None and the reason.

    A manifest may come from anyone, and a request to a store carries the user's signature. So an address in a store is
    opened only in the bucket that the user has named himself, that of the embeddings folder. On a disk the folder is
    opened if it holds a dataset.json that is a regular file.
    """
    named = manifest.get("data")
    if not isinstance(named, str) or not named or "\0" in named:
        return None, "the export does not say which dataset it is of"
    if "://" in named and not (isinstance(embeddings, StorePath) and _same_bucket(embeddings, named)):
        return None, f"the export names {named}, and an address that only a manifest names is never opened"
    try:
        return Dataset(named), ""
    except (Vlm2RecError, OSError, ValueError):  # gone, damaged, or no name that a file can have
        return None, f"the dataset is no longer at the path of the export, {named}"


def _same_bucket(one: StorePath, address: str) -> bool:
    scheme, _, rest = address.partition("://")
    return scheme == one.scheme and rest.partition("/")[0] == one.key.partition("/")[0]
