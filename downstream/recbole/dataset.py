"""A vlm2rec dataset folder as a RecBole dataset. Imports RecBole: load it after `require_recbole`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch
from recbole.data.dataset import SequentialDataset
from recbole.data.interaction import Interaction, cat_interactions
from recbole.utils import FeatureSource, FeatureType

from vlm2rec.downstream.recbole import windows
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError


class FolderDataset(SequentialDataset):
    """The sequences of a dataset folder, passed to RecBole in memory.

    No atomic file is written. In such a file pandas would read the ids "NA", "null", "None" and "nan" as missing, and
    RecBole would drop their rows; tabs, quotes and line ends in an id would break the file. Here ids stay unchanged.

    The order of rows is that of an atomic file written user by user in time order, so ids, batches and metrics are
    the same as with RecBole's own dataset from such a file.

    Of several validation items of a user (the temporal split) the first is RecBole's, and of several test items, too;
    the other validation items are part of the history before it.
    """

    def __init__(self, config: Any, folder: Dataset) -> None:
        self.folder = folder
        super().__init__(config)

    def _load_data(self, token: str, dataset_path: str) -> None:
        sequences = whole_sequences(self.folder)
        lengths = np.array([len(sequence) for sequence in sequences])
        rows = np.concatenate(sequences)
        item_ids = np.array(self.folder.item_ids, object)
        columns = {
            (self.uid_field, FeatureType.TOKEN): np.repeat(np.array(self.folder.user_ids, object), lengths),
            (self.iid_field, FeatureType.TOKEN): item_ids[rows],
            # the position: RecBole keeps times as float32, which merges unix seconds within a minute
            (self.time_field, FeatureType.FLOAT): np.concatenate([np.arange(n, dtype=np.float64) for n in lengths]),
        }
        for field, kind in columns:
            self.set_field_property(field, kind, FeatureSource.INTERACTION, 1)
        self.inter_feat: Any = pd.DataFrame({field: values for (field, _), values in columns.items()})
        self.user_feat = None
        self.item_feat = None
        every = items_in_order(rows, len(item_ids))
        if len(every) > len(pd.unique(rows)):  # items without interactions are candidates too
            self.item_feat = pd.DataFrame({self.iid_field: item_ids[every]})
            self.field2source[self.iid_field] = FeatureSource.ITEM_ID

    def _data_filtering(self) -> None:
        """Filter nothing: `prepare` has filtered, and every user of the folder is evaluated."""

    def data_augmentation(self) -> None:
        """Turn each user's sequence into (prefix → next item) rows, the same as RecBole's in the same order.

        It works column by column instead of row by row, without RecBole's list of times, which no model here reads.
        """
        self._aug_presets()
        self.sort(by=[self.uid_field, self.time_field], ascending=True)
        users = self.inter_feat[self.uid_field].numpy()
        items = self.inter_feat[self.iid_field].numpy()
        opens = np.flatnonzero(np.diff(users, prepend=-1))  # the row where each user's sequence begins
        begin = np.repeat(opens, np.diff(np.append(opens, len(users))))
        ends = np.append(opens[1:], len(users))
        trained = np.array([len(sequence) for sequence in self.folder.train_sequences()])
        place = np.arange(len(users)) - begin
        first, last = (np.repeat(each, ends - opens) for each in (trained, ends - opens - 1))
        targets = np.flatnonzero((place > 0) & ((place <= first) | (place == last)))
        if windows.is_set(self.config.final_config_dict):
            self.inter_feat = self._windows(items, opens, trained)
        else:
            self.inter_feat = self._prefixes(items, begin[targets], targets)

    def _prefixes(self, items: np.ndarray, begin: np.ndarray, targets: np.ndarray) -> Interaction:
        """Return a row for each of `targets`, positions in `items`, with what precedes it from `begin` on."""
        lengths = np.minimum(targets - begin, self.max_item_list_len)
        lists = np.zeros((len(targets), self.max_item_list_len), np.int64)
        for position in range(self.max_item_list_len):
            filled = position < lengths
            lists[filled, position] = items[(targets - lengths + position)[filled]]
        rows = self.inter_feat[targets]
        rows.update(self._lists(lists, lengths))
        return rows

    def _windows(self, items: np.ndarray, opens: np.ndarray, trained: np.ndarray) -> Interaction:
        """Return rows that learn all positions of the training items (`windows`), and the two prefixes held out.

        `opens` are the positions in `items` where the sequences begin, and `trained` their numbers of training items.
        """
        ends = np.append(opens[1:], len(items))
        held = np.stack([opens + trained, ends - 1], axis=1).ravel()
        held_out = self._prefixes(items, np.repeat(opens, 2), held)
        found = windows.windows(opens, trained, self.max_item_list_len)
        read, learned = windows.lists(items, found, self.max_item_list_len)
        rows = self.inter_feat[found.start + found.length]  # the last target of each
        rows.update(self._lists(read, found.length))
        for part, targets in ((rows, learned), (held_out, np.zeros((len(held), self.max_item_list_len), np.int64))):
            part.update(Interaction({windows.TARGETS: torch.from_numpy(targets)}))
        return cat_interactions([rows, held_out])

    def _lists(self, lists: np.ndarray, lengths: np.ndarray) -> Interaction:
        """Return the columns of what is read: item numbers (rows, L), right-padded with 0, and how many (rows,)."""
        name = getattr(self, f"{self.iid_field}_list_field")
        columns = {self.item_list_length_field: torch.from_numpy(lengths), name: torch.from_numpy(lists)}
        return Interaction(columns)

    def _split_index_by_leave_one_out(self, grouped_index: Any, leave_one_num: int) -> list[list[int]]:
        """Split off the last two rows of every user.

        RecBole keeps one row for training even if there are only two, and so would train on the validation item of
        users with one training item.
        """
        parts: list[list[int]] = [[], [], []]
        for group in grouped_index:
            index = list(group)
            parts[0].extend(index[:-2])
            parts[1].append(index[-2])
            parts[2].append(index[-1])
        return parts


def items_in_order(rows: np.ndarray, count: int) -> np.ndarray:
    """Return the item rows in the order of RecBole's numbers: as they first occur in `rows`, then those that do not."""
    return np.concatenate([pd.unique(rows), np.setdiff1d(np.arange(count), rows)])


def item_tokens_of(folder: Dataset) -> list[str]:
    """Return the ids of RecBole's items 1, 2, ... for a dataset folder, without RecBole's dataset."""
    every = items_in_order(np.concatenate(whole_sequences(folder)), len(folder.item_ids))
    return [folder.item_ids[row] for row in every]


def whole_sequences(folder: Dataset) -> list[np.ndarray]:
    """Return each user's train and valid items and the first test item as item rows, oldest first."""
    folder.trained_sequences()  # refuses a user without any
    test = folder.histories("test").targets
    return [np.append(known, item) for known, item in zip(folder.known_sequences("test"), test, strict=True)]


def recbole_ids(tokens: list[str], item_ids: list[str]) -> np.ndarray:
    """Return RecBole's number of each of `item_ids`, (I,) int64, given the ids of RecBole's items 1, 2, ..."""
    places = pc.index_in(pa.array(item_ids, pa.string()), value_set=pa.array(tokens, pa.string()))
    if places.null_count:
        unknown = pc.filter(pa.array(item_ids, pa.string()), pc.is_null(places))[0].as_py()
        raise ArtifactError(
            f"RecBole has lost item {unknown!r}", "an id RecBole can hold", "use ids without NUL characters"
        )
    return places.to_numpy(zero_copy_only=False).astype(np.int64) + 1
