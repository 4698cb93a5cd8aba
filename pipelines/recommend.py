"""`vlm2rec recommend`: the first k items of every user, in the shards and with the promise of `export-items`.

--histories --embeddings           means of item vectors, exact search
--histories --index                means of item vectors, the index
--histories --users --embeddings   vectors of export-users (or --index)
--histories --recommender          a trained SASRec, GRU4Rec or BERT4Rec
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlm2rec.downstream.formats import read_ids
from vlm2rec.downstream.index.index import ItemIndex
from vlm2rec.downstream.serving.mean_vectors import mean_vectors
from vlm2rec.downstream.serving.top_items import ExactSearch, IndexSearch, Search, top_items, with_direction
from vlm2rec.downstream.table import EmbeddingTable, read_part, read_rows
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError
from vlm2rec.embedder.contract.storage import Location
from vlm2rec.embedder.export.distribute import Distribution, Job
from vlm2rec.embedder.export.export import fill_folder
from vlm2rec.embedder.export.lock import Hold
from vlm2rec.embedder.export.plan import Plan, plan_shards
from vlm2rec.embedder.export.processes import keep_freed_memory
from vlm2rec.embedder.export.ranked_file import RankedLayout, ranked_table
from vlm2rec.embedder.export.reuse import EarlierRows
from vlm2rec.embedder.export.shards import rows_of_shards
from vlm2rec.embedder.export.users import UserHistories
from vlm2rec.pipelines import console
from vlm2rec.pipelines.catalogue.histories import GivenHistories, digest_of, read_histories
from vlm2rec.pipelines.config import RecommendConfig
from vlm2rec.pipelines.console import TERMINAL
from vlm2rec.pipelines.export_users import MAX_HISTORY, SPACE, USER_IDS, history_rows, space_of
from vlm2rec.pipelines.verify import in_shards

if TYPE_CHECKING:
    from vlm2rec.downstream.serving.trained import Run

_AT_ONCE = 1024  # users whose vectors are searched for together


class Ranker(Protocol):
    """What ranks the items for the users of one shard at a time."""

    def prepare(self, number: int, users: range, histories: UserHistories) -> tuple[Search, dict[int, str]]:
        """Return a search by places in `users`, and why some of them, by place, cannot be ranked for."""


class Source(Protocol):
    """Where the ranking comes from: checked, and cheap to hand to another process."""

    @property
    def item_ids(self) -> Sequence[str]:
        """The catalogue; histories are rows of it."""

    @property
    def total(self) -> int:
        """How many of its items can be recommended."""

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the ranking."""

    @property
    def about(self) -> dict[str, Any]:
        """What the manifest says of the search besides."""

    def open(self) -> Ranker:
        """Load what ranks; called once in each process."""


def run(config: RecommendConfig) -> dict[str, Any]:
    """Write the folder of recommendations and return its manifest; an interrupted run continues where it stopped.

    Raises:
        ConfigError: settings that contradict each other, k above the number of items, or a recommender that cannot
            read histories.
        DataError: the histories cannot be read, or name no item of the catalogue.
        ArtifactError: users, index, vectors or run are unfinished or damaged, or do not fit each other; `out` belongs
            to something else or is in use; the disk is full.
    """
    _require_choice(config)
    source: Source = _recommender(config) if config.recommender is not None else _vectors(config)
    if config.k > source.total:
        raise ConfigError(
            f"--k {config.k:,} with {source.total:,} items that can be recommended",
            f"a number from 1 to {source.total:,}",
            "lower --k",
        )
    given = None if config.histories is None else read_histories(config.histories, source.item_ids, config)
    plan = _plan(config, source, given)
    histories = _histories(given, len(plan.item_ids))

    def job(earlier: EarlierRows | None, hold: Hold) -> RankJob:
        return RankJob(config.out, plan, hold, source, histories)

    found = fill_folder(
        plan,
        config.out,
        job,
        data=config.data,
        distribution=Distribution(num_workers=config.num_workers),
        reporter=TERMINAL,
        work_name="ranking for users",
        about={"search": source.about, **({} if given is None else {"histories": given.counts})},
        left_out=None if given is None else given.left_out,
    )
    assert found is not None  # nobody else makes shards
    _summarise(config, found, source, given)
    return found


def _require_choice(config: RecommendConfig) -> None:
    """Raise `ConfigError` unless the settings choose one way to rank."""
    vectors = {"--embeddings": config.embeddings, "--index": config.index, "--users": config.users}
    given = [flag for flag, value in vectors.items() if value is not None]
    if config.recommender is not None:
        if config.users is not None or config.index is not None:
            raise ConfigError(
                f"--recommender with {' and '.join(flag for flag in given if flag != '--embeddings')}",
                "--recommender with --histories; --embeddings names the vectors that it was trained from",
                "leave the others out",
            )
        if config.max_history is not None or config.column != "fused":
            flag = "--column" if config.column != "fused" else "--max-history"
            raise ConfigError(f"{flag} with --recommender", "what the run was trained with", f"leave {flag} out")
    elif config.embeddings is None and config.index is None:
        raise ConfigError(
            "none of --embeddings, --index and --recommender is given",
            "one of them, to rank the items by",
            "give the embeddings folder of the items, an index of it, or a trained recommender",
        )
    if config.histories is None and (config.recommender is not None or config.users is None):
        raise ConfigError(
            "neither --histories nor --users is given",
            "the users to rank for",
            "give --histories FILE, such as the interactions that prepare read",
        )
    if config.histories is None and not config.keep_seen:
        raise ConfigError(
            "--users without --histories: it is not known which items the users have seen",
            "the file that export-users read, or --keep-seen",
            "give --histories, or --keep-seen to recommend seen items too",
        )


def _plan(config: RecommendConfig, source: Source, given: GivenHistories | None) -> Plan:
    """Return the plan; with a folder of users, a shard has the users of one of its shards."""
    settings: dict[str, Any] = {
        schema.TABLE: schema.RECOMMENDATIONS_TABLE,
        "k": config.k,
        "keep_seen": config.keep_seen,
        **source.settings,
    }
    if given is not None:
        settings["histories"] = given.digest(source.item_ids)
    bounds: list[int] = []
    if config.users is None:
        assert given is not None
        user_ids = given.user_ids
    else:
        manifest = schema.read_manifest(config.users, table=schema.USERS_TABLE)
        bounds = rows_of_shards(config.users)
        if given is None:
            user_ids = read_ids(config.users, schema.USERS_TABLE)
        else:
            user_ids = given.user_ids
            if digest_of(user_ids) != manifest["settings"].get(USER_IDS):
                raise ArtifactError(
                    f"{config.users} holds {manifest['num_items']:,} users, which are not the {len(user_ids):,} of"
                    f" {config.histories}",
                    "the histories that export-users read",
                    "give that file, or run export-users with this one into a new folder",
                )
    return plan_shards(user_ids, config.shard_size, settings, begun=bounds, layout=RankedLayout())


def _histories(given: GivenHistories | None, users: int) -> UserHistories:
    if given is None:
        return UserHistories(np.empty(0, np.int32), np.zeros(users + 1, np.int64), {})
    return UserHistories(given.rows, given.offsets, given.reasons)


# --- the shards ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class RankJob(Job):
    """The job of ranking the items for all users."""

    source: Source
    histories: UserHistories

    def maker(self) -> RankMaker:
        """See `Job`."""
        keep_freed_memory()
        return RankMaker(self.plan, self.histories, self.source)


class RankMaker:
    """Makes the shards of a folder of recommendations."""

    def __init__(self, plan: Plan, histories: UserHistories, source: Source) -> None:
        self.plan, self.histories, self.source = plan, histories, source
        self._ranker = source.open()
        self._item_ids = pa.array(source.item_ids, pa.string())

    def close(self) -> None:
        """Nothing was opened."""

    def shard(self, number: int, reuse_rows: np.ndarray, advance: Callable[[int], None]) -> tuple[pa.Table, None]:
        """Return the table of a shard; all of its rows are made."""
        users, settings = self.plan.rows(number), self.plan.settings
        search, reasons = self._ranker.prepare(number, users, self.histories)
        counts = np.zeros(len(users), np.int64)
        rows: list[np.ndarray] = [np.empty(0, np.int64)]
        scores: list[np.ndarray] = [np.empty(0, np.float32)]
        for start in range(0, len(users), _AT_ONCE):
            block = range(start, min(start + _AT_ONCE, len(users)))
            ranked = np.array([place for place in block if place not in reasons], np.int64)
            if len(ranked):
                seen = [self.histories.of(users[place]) for place in ranked]
                found = top_items(
                    _Part(search, ranked), seen, settings["k"], len(self._item_ids), keep_seen=settings["keep_seen"]
                )
                counts[ranked] = found.counts
                rows.append(found.rows)
                scores.append(found.scores)
                for place in ranked[found.counts == 0]:
                    reasons[int(place)] = "every item that was found is in the history"
            advance(len(block))
        items = self._item_ids.take(pa.array(np.concatenate(rows)))
        errors = [reasons.get(place) for place in range(len(users))]
        return ranked_table(self.plan, users, items, counts, np.concatenate(scores), errors), None


@dataclass(frozen=True)
class _Part:
    """A search for some of the users that a search was made for."""

    whole: Search
    places: np.ndarray

    def best(self, users: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Search`."""
        return self.whole.best(self.places[users], count)


# --- by vectors -----------------------------------------------------------------------------------------------------
@dataclass
class VectorSource:
    """Ranks by the cosine of a user's vector with those of the items."""

    item_ids: Sequence[str]
    total: int
    settings: dict[str, Any]
    about: dict[str, Any]
    column: str
    max_history: int
    users: Location | None
    embeddings: Location | None
    index: Path | None

    def open(self) -> Ranker:
        """See `Source`."""
        return _VectorRanker(self)


def _vectors(config: RecommendConfig) -> VectorSource:
    """Return the source by vectors: users, embeddings and index have to be of the same vectors."""
    settings: dict[str, Any] = {"source": "vectors", "column": config.column}
    about: dict[str, Any] = {"kind": "exact"}
    index, embeddings = None, config.embeddings
    if config.index is not None:
        index = ItemIndex.open(config.index)
        if index.meta["column"] != config.column:
            raise ArtifactError(
                f"{config.index} is an index of {index.meta['column']} vectors",
                f"an index of {config.column} vectors, as --column says",
                f"give --column {index.meta['column']}, or build another index",
            )
        if embeddings is not None:
            index.require_fresh(embeddings)
        elif isinstance(index.embeddings, Path) and index.stale() is None:
            embeddings = index.embeddings
        about = {
            "kind": index.meta["factory"],
            "recall@10": index.meta.get("recall@10"),
            "recall_sample": index.meta.get("recall_sample"),
        }
        settings["index"] = {name: entry["sha256"] for name, entry in index.meta.get("files", {}).items()}
    manifest = None if embeddings is None else schema.read_manifest(embeddings)
    if config.users is not None:
        _require_same_space(config, manifest, index)
        users = schema.read_manifest(config.users, table=schema.USERS_TABLE)
        settings["users_sha256"] = schema.shards_sha256(users)
    elif embeddings is None:
        assert index is not None
        raise ArtifactError(
            f"--histories needs the vectors that {config.index} was built from, and {index.stale()}",
            "the embeddings folder that the index was built from",
            "name it with --embeddings, or give vectors of the users with --users",
        )
    else:
        settings["max_history"] = config.max_history or MAX_HISTORY
    if embeddings is not None:
        assert manifest is not None
        if config.column not in manifest["views"]:
            raise ConfigError(
                f"{embeddings} has no {config.column} vectors",
                f"one of {', '.join(manifest['views'])}",
                "change --column",
            )
        settings["embeddings_sha256"] = schema.shards_sha256(manifest)
        item_ids = read_ids(embeddings)
        lacking = [schema.STATUS_FAILED, *([schema.STATUS_TEXT_ONLY] if config.column == schema.IMAGE else [])]
        total = len(item_ids) - sum(int(manifest["counts"].get(status, 0)) for status in lacking)
    if index is not None:
        total = len(index)
        if embeddings is None:
            item_ids = index.ids[schema.ITEM_ID].to_pylist()
    return VectorSource(
        item_ids,
        total,
        settings,
        about,
        config.column,
        config.max_history or MAX_HISTORY,
        config.users,
        embeddings,
        config.index,
    )


def _require_same_space(config: RecommendConfig, manifest: Mapping[str, Any] | None, index: ItemIndex | None) -> None:
    """Raise `ArtifactError` unless the users' vectors can be compared with the items'."""
    assert config.users is not None
    if config.max_history is not None:
        raise ConfigError(
            "--max-history with --users",
            "no --max-history: the vectors of --users are already made",
            "leave --max-history out",
        )
    users = schema.read_manifest(config.users, table=schema.USERS_TABLE)
    if config.column not in users["views"]:
        raise ConfigError(
            f"{config.users} has no {config.column} vectors", f"one of {', '.join(users['views'])}", "change --column"
        )
    if manifest is not None:
        fits = users["settings"].get(SPACE) == space_of(manifest)
    else:
        assert index is not None
        fits = users["settings"].get("embeddings_fingerprint") == index.meta["fingerprint"]
    if not fits:
        raise ArtifactError(
            f"{config.users} holds vectors of users that cannot be compared with those of"
            f" {config.index or config.embeddings}",
            "users and items of the same encoder and settings",
            "give the embeddings folder that export-users was given, or an index of it",
        )


class _VectorRanker:
    """Holds the items' vectors in memory, with an index those of the histories alone, and one shard's users."""

    def __init__(self, source: VectorSource) -> None:
        self._source = source
        self._table: EmbeddingTable | None = None
        self._held: np.ndarray | None = None  # rows of the catalogue that the table has; None for all
        self._index = None if source.index is None else ItemIndex.open(source.index)
        if self._index is not None:
            found = pc.index_in(self._index.ids[schema.ITEM_ID], value_set=pa.array(source.item_ids, pa.string()))
            self._rows = pc.fill_null(found, -1).to_numpy().astype(np.int64)
        else:
            assert source.embeddings is not None
            table = self._table = EmbeddingTable.open(source.embeddings, source.column)
            items, good = with_direction(np.where(table.present[:, None], table.vectors, 0))
            self._rows = np.flatnonzero(good)
            self._items = items if good.all() else items[good]

    def prepare(self, number: int, users: range, histories: UserHistories) -> tuple[Search, dict[int, str]]:
        """See `Ranker`."""
        reasons = {place: histories.reasons[user] for place, user in enumerate(users) if user in histories.reasons}
        mean = self._source.users is None
        vectors = self._means(users, histories, reasons) if mean else self._given(number, reasons)
        unit, good = with_direction(vectors)
        for place in np.flatnonzero(~good):
            reasons.setdefault(int(place), "the vector has no direction: it is zero, or not finite")
        if self._index is not None:
            return IndexSearch(unit, self._index, self._rows), reasons
        return ExactSearch(unit, self._items, self._rows), reasons

    def _means(self, users: range, histories: UserHistories, reasons: dict[int, str]) -> np.ndarray:
        """Return the means of the users' latest items, (n, d); adds the reason of users whose items have no vector."""
        table = self._table = self._table or self._read_held(histories)
        known = [place for place in range(len(users)) if place not in reasons]
        found = np.zeros((len(users), table.dim), np.float32)
        latest = [histories.of(users[place])[-self._source.max_history :] for place in known]
        if self._held is not None:
            latest = [np.searchsorted(self._held, rows) for rows in latest]
        if known:
            found[known] = mean_vectors({self._source.column: table}, latest)[self._source.column]
        for place in known:
            if np.isnan(found[place]).all():
                reasons[place] = f"no item of the history has a vector in {self._source.column}"
        return found

    def _read_held(self, histories: UserHistories) -> EmbeddingTable:
        """Read the vectors of the items that any user's history holds: the index has the others."""
        assert self._source.embeddings is not None
        self._held = np.unique(histories.rows)
        return read_rows(self._source.embeddings, self._source.column, self._held)

    def _given(self, number: int, reasons: dict[int, str]) -> np.ndarray:
        """Return the vectors of a shard of users, (n, d); the reasons become those of that folder."""
        folder, column = self._source.users, self._source.column
        assert folder is not None
        _, vectors, present = read_part(folder, number, column, schema.USERS_TABLE)
        reasons.clear()
        if not present.all():
            fix = f"run `vlm2rec verify {folder}`"
            errors = schema.read_table(folder / schema.shard_name(number), [schema.ERROR], fix=fix)[schema.ERROR]
            for place in np.flatnonzero(~present):
                reasons[int(place)] = errors[int(place)].as_py() or f"the user has no {column} vector"
        return vectors


# --- by a trained recommender ---------------------------------------------------------------------------------------
@dataclass
class RecommenderSource:
    """Ranks by the scores of a trained recommender after the history."""

    run: Run
    device: str
    settings: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def item_ids(self) -> Sequence[str]:
        """See `Source`."""
        return self.run.item_ids

    @property
    def total(self) -> int:
        """See `Source`."""
        return len(self.run.item_ids)

    def open(self) -> Ranker:
        """See `Source`."""
        return _ScoreRanker(self)


def _recommender(config: RecommendConfig) -> RecommenderSource:
    from vlm2rec.downstream.serving.trained import read_run

    assert config.recommender is not None
    found = read_run(config.recommender, config.data, config.embeddings)
    if found.unproven:
        TERMINAL.say(
            f"{found.folder} was written by an earlier vlm2rec and does not record {found.unproven}", warning=True
        )
    settings = {"source": "recommender", "model": found.model, "checkpoint_sha256": found.checkpoint_sha256}
    if found.embeddings is not None:
        settings["embeddings_sha256"] = schema.shards_sha256(schema.read_manifest(found.embeddings))
    about = {"kind": found.model, "run": str(found.folder.resolve())}
    return RecommenderSource(found, config.device, settings, about)


class _ScoreRanker:
    """Holds the recommender."""

    def __init__(self, source: RecommenderSource) -> None:
        import torch

        from vlm2rec.downstream.serving.trained import TrainedRecommender
        from vlm2rec.embedder.backbones.devices import speed_up_float32

        speed_up_float32(torch.device("cpu"))  # in every worker: equal bits need the same library
        self._recommender = TrainedRecommender(source.run, source.device)

    def prepare(self, number: int, users: range, histories: UserHistories) -> tuple[Search, dict[int, str]]:
        """See `Ranker`."""
        from vlm2rec.downstream.serving.trained import ScoreSearch

        reasons = {place: histories.reasons[user] for place, user in enumerate(users) if user in histories.reasons}
        return ScoreSearch(self._recommender, [histories.of(user) for user in users]), reasons


# --- summary --------------------------------------------------------------------------------------------------------
def _summarise(
    config: RecommendConfig, manifest: Mapping[str, Any], source: Source, given: GivenHistories | None
) -> None:
    counts, search = manifest["counts"], manifest["search"]
    how = "exact" if search["kind"] == "exact" else str(search["kind"])
    if search.get("recall@10") is not None:
        how += f", recall@10 {search['recall@10']:.4f} of {search['recall_sample']:,} items"
    rows: dict[str, object] = {
        "users": f"{counts[schema.STATUS_OK]:,} of {manifest['num_users']:,} {in_shards(manifest)}",
        "items": f"{source.total:,} of {len(source.item_ids):,}",
        "search": how,
        **({} if given is None else history_rows(given.counts)),
        "folder": config.out,
    }
    if failed := counts[schema.STATUS_FAILED]:
        rows["no recommendation"] = f"{failed:,} users; `vlm2rec failures {config.out}` lists them"
    if fewer := counts[schema.STATUS_OK] - _full(config.out, manifest):
        rows[f"fewer than {config.k}"] = f"{fewer:,} users, for whom no more items were found"
    console.summary("Recommendations", rows)


def _full(folder: Location, manifest: Mapping[str, Any]) -> int:
    """Return how many users have k items."""
    found = 0
    for shard in manifest["shards"]:
        fix = f"run `vlm2rec verify {folder}`"
        ranks = schema.read_table(folder / shard["file"], [schema.RANK], fix=fix)[schema.RANK]
        found += int(pc.sum(pc.equal(ranks, manifest["k"])).as_py() or 0)
    return found
