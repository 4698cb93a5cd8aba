"""The embeddings folder, written so that it is complete or the same command finishes it. pyarrow only, no torch.

What lies in the folder, in the order it is written:

    _export.lock                             the live writer; several workers have one each
    _export.json                             the plan's settings, before the first shard
    part-00000.parquet  _part-00000.json     a finished shard, then its record: rows, bytes, SHA-256, plan
    _manifest.json                           last; it includes the records, which are then removed, as is _export.json

Whoever opens the folder as one Parquet table skips what begins with an underscore or a dot. An earlier version wrote
the same names without the underscore. `schema.files_of` tells which a folder has; `begin` renames them.

A record names the plan that its shard belongs to. If the input has changed since (`--extend`, `--retry-failed`),
_export.json names the new plan at once. Each shard is recorded for the new plan only after its rows have been compared
with it. The manifest is written by whoever finds all shards recorded for its plan, one worker at a time.

A shard goes temporary file → fsync → read back → rename → record. In an object store, where an object appears whole or
not at all, it is temporary file → read back → upload → SHA-256 of what the store gives back → record. After a
kill at any moment, the next run keeps what is recorded, checks and adopts shards without a record, and writes the rest.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlm2rec.embedder.contract import provenance, publish, schema, storage
from vlm2rec.embedder.contract.errors import ArtifactError
from vlm2rec.embedder.contract.storage import Location, StorePath, readable
from vlm2rec.embedder.export.lock import (
    FORMER_LOCK_FILE,
    LOCK_FILE,
    Share,
    earlier_versions_kept_out,
    is_former_lock,
    is_lock,
    turn,
)
from vlm2rec.embedder.export.plan import INPUT_SETTINGS, Plan, flatten, identity_of, refuse_older_hashes, row_counts
from vlm2rec.embedder.export.shard_file import ITEM_VECTORS
from vlm2rec.embedder.export.short import Kept, in_all, is_short

_LOOKS = 3  # at the manifest and the state file, before the folder counts as one without both
_ATTEMPTS = 3  # a busy network disk may fail once
_HOPELESS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
_CONTINUE = "run the command that wrote it (for example `vlm2rec export-items`) again: it continues where it stopped"
_PLAN = "plan"  # in a record: which plan the shard belongs to
_LIBRARIES = ("python", "vlm2rec", "torch", "transformers", "peft", "pyarrow", "pillow", "numpy")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """The record of one finished shard: its entry in the manifest."""

    file: str
    rows: int
    bytes: int
    sha256: str
    counts: dict[str, int]  # rows of each status
    seconds: float  # spent on encoding it
    kept: Kept | None = None  # of short vectors: the neighbours that they keep; not known of a shard without a record

    @property
    def entry(self) -> dict[str, Any]:
        """The record as JSON."""
        return {key: value for key, value in asdict(self).items() if key != "kept" or value is not None}


def rows_of_shards(folder: Location) -> list[int]:
    """Return the row count of each shard that an export into this folder planned; empty if there is no export."""
    known = _known(folder)
    return [] if known is None else row_counts(known)


def known_settings(folder: Location) -> dict[str, Any] | None:
    """Return the settings of the export in this folder, finished or not; None if there is none."""
    known = _known(folder)
    return None if known is None else dict(known.get("settings", {}))


def _known(folder: Location) -> dict[str, Any] | None:
    """Return the manifest, or the state file of an unfinished export, or None.

    Another worker may begin or finish the folder at this moment: one of the two is always there, and which one may
    change between two looks.
    """
    with _disk(folder):
        for _ in range(_LOOKS):
            for name, path in schema.files_of(folder).items():  # the manifest first
                try:
                    if name == schema.MANIFEST_FILE:
                        return schema.read_manifest(folder, table=None)
                    return schema.read_json(path, "the settings of an unfinished export", "choose another --out")
                except ArtifactError:
                    if path.exists():
                        raise
        return None


class Found(NamedTuple):
    """What an export finds in its folder, by shard number."""

    finished: dict[int, Shard]  # recorded for this plan, those of other workers too
    earlier: dict[int, Shard]  # own shards of an earlier plan: some of their rows may still be right


def begin(folder: Location, plan: Plan, revise: bool = False, share: Share | None = None, retry: bool = False) -> Found:
    """Return the finished, undamaged shards of the plan, and prepare the folder for the others.

    Call it inside `writing(folder, share)`. It writes the settings into a new folder, and removes left-over temporary
    files, damaged shards, and shards of another plan; the log names those shards. A folder that is complete, and of
    which nothing has to be made again, is left as it is.

    Args:
        folder: the embeddings folder.
        plan: what the folder will hold.
        revise: the inputs may differ from those of the folder: items were appended, titles or images changed.
        share: check and repair only these shards; other writers are at work on the others.
        retry: keep the shards that may hold rows to make again as `earlier`; the caller decides about each row, and
            calls `confirm` or `publish_shard`.

    Raises:
        ArtifactError: the folder belongs to an export with other settings, or to something else.
    """
    with _disk(folder):
        mine = shards_of(plan, share)
        with turn(folder, share):
            _take_todays_names(folder, plan, revise)
            known = _read_state(folder, plan, revise)
            _remove_temporaries(folder, mine if share else None)
            found = _recorded(folder, plan, known)
            again = [n for n in mine if retry and n in found.finished and _has_failures(found.finished[n])]
            if complete := _is_complete(known, plan) and not again:
                _remove_records(folder, plan)  # of a worker that died after the manifest
            else:
                _open(folder, plan, known, again)
            for number in again:
                found.earlier[number] = found.finished.pop(number)
        return _checked(folder, plan, found, complete, retry, share)


def recorded(folder: Location, plan: Plan, revise: bool = False, retry: bool = False) -> Found:
    """Return what `begin` would, without checking or changing anything; the folder need not exist.

    Raises:
        ArtifactError: as `begin`.
    """
    if not folder.is_dir():
        return Found({}, {})
    found = _recorded(folder, plan, _read_state(folder, plan, revise))
    for number, shard in list(found.finished.items()):
        if retry and _has_failures(shard):
            found.earlier[number] = found.finished.pop(number)
    for number in [] if retry else list(found.earlier):
        if _holds(folder, plan, number):
            found.finished[number] = found.earlier[number]
        del found.earlier[number]
    return found


def confirm(folder: Location, plan: Plan, earlier: Mapping[int, Shard]) -> dict[int, Shard]:
    """Record shards of an earlier plan for this one, if all their rows are the same; return those."""
    confirmed = {}
    with _disk(folder):
        for number, shard in earlier.items():
            if _holds(folder, plan, number):
                _write_record(folder, number, shard, plan.identity)
                confirmed[number] = shard
    return confirmed


def _checked(folder: Location, plan: Plan, found: Found, complete: bool, retry: bool, share: Share | None) -> Found:
    """Return what was found, without those of our shards that are damaged or of another plan."""
    mine = shards_of(plan, share)
    finished = dict(found.finished)
    earlier = {number: shard for number, shard in found.earlier.items() if number in mine}
    own = [(number, shard) for shards in (finished, earlier) for number, shard in shards.items() if number in mine]
    if damaged := [number for number, shard in own if not _is_sound(folder, number, shard)]:
        with turn(folder, share):
            require_same_plan(folder, plan)
            _open(folder, plan, _known(folder), damaged)
            for number in damaged:
                path = folder / schema.shard_name(number)
                logger.warning("%s is %s: it is written again", path, "damaged" if path.exists() else "missing")
                _discard(folder, number)
                finished.pop(number, None)
                earlier.pop(number, None)
    elif complete:
        return Found(finished, {})
    if not retry:
        finished |= confirm(folder, plan, earlier)
        for number in earlier.keys() - finished.keys():
            logger.warning("%s was made from other items: it is written again", folder / schema.shard_name(number))
            _discard(folder, number)
        earlier = {}
    unrecorded = [number for number in mine if number not in finished and number not in earlier]
    for number, shard in _adopt(folder, plan, unrecorded).items():
        of_failures = retry and _has_failures(shard)
        _write_record(folder, number, shard, "" if of_failures else plan.identity)
        (earlier if of_failures else finished)[number] = shard
    return Found(dict(sorted(finished.items())), dict(sorted(earlier.items())))


def _read_state(folder: Location, plan: Plan, revise: bool) -> dict[str, Any] | None:
    """Return the manifest or the state file, if the folder may be continued with this plan; None if it is empty."""
    known = _known(folder)
    if known is None:
        _refuse_foreign(folder)
        return None
    _refuse_changed(folder, known, plan, revise)
    rows = row_counts(known)
    if rows != [len(plan.rows(number)) for number in range(len(plan))][: len(rows)]:
        raise ArtifactError(
            f"another export has changed {folder} while this one was planned",
            "one export at a time in a folder",
            "run the same command again",
        )
    return known


def _take_todays_names(folder: Location, plan: Plan, revise: bool) -> None:
    """Rename the files of an export that an earlier version wrote, before anything else is changed.

    Call it inside `turn`. Writers of that version are kept out meanwhile; afterwards they take the folder for a foreign
    one. The manifest, or the state file of an unfinished export, is renamed last: until then the former names count,
    and both versions can go on.

    Raises:
        ArtifactError: as `begin`; nothing was renamed.
    """
    former = [schema.former_name(name) for name in (schema.MANIFEST_FILE, schema.STATE_FILE)]
    if not any(path.name in former or is_former_lock(path.name) for path in folder.iterdir()):
        return
    with earlier_versions_kept_out(folder):
        if (known := _read_state(folder, plan, revise)) is None:
            return
        finished = "shards" in known
        decisive = schema.MANIFEST_FILE if finished else schema.STATE_FILE
        if finished:  # it includes what the others say
            (folder / schema.former_name(schema.STATE_FILE)).unlink(missing_ok=True)
        for name in sorted(path.name for path in folder.iterdir() if _A_RECORD.fullmatch(path.name)):
            if finished:
                (folder / name).unlink(missing_ok=True)
            elif not name.startswith("_"):
                publish.rename(folder, name, f"_{name}")
        if (folder / schema.former_name(decisive)).exists():
            publish.rename(folder, schema.former_name(decisive), decisive)


def _is_complete(known: Mapping[str, Any] | None, plan: Plan) -> bool:
    """Tell whether what is known of a folder is a manifest of this plan."""
    return known is not None and "shards" in known and identity_of(known) == plan.identity


def _recorded(folder: Location, plan: Plan, known: Mapping[str, Any] | None) -> Found:
    found = Found({}, {})
    if known is None:
        return found
    if "shards" in known:
        identity = identity_of(known)
        records = {number: (shard, identity) for number, shard in _manifest_shards(known).items()}
    else:
        records = _records(folder, plan)
    for number, (shard, identity) in records.items():
        if number < len(plan):
            (found.finished if identity == plan.identity else found.earlier)[number] = shard
    return found


def _open(folder: Location, plan: Plan, known: Mapping[str, Any] | None, again: Collection[int] = ()) -> None:
    """Make the folder an unfinished export of this plan: each step leaves one that some command can go on with.

    Call it inside `turn`. Until they are published or confirmed, nobody counts the shards in `again`.
    """
    if known is not None and "shards" in known:
        identity = identity_of(known)  # which may be that of another plan: no shard is taken for one of this plan
        for number, shard in _manifest_shards(known).items():
            _write_record(folder, number, shard, "" if number in again else identity)
    else:
        for number, (shard, identity) in _records(folder, plan, again).items():
            if identity == plan.identity:
                _write_record(folder, number, shard, "")
    if known is None or "shards" in known or identity_of(known) != plan.identity:
        schema.write_json(folder / schema.STATE_FILE, _state(plan))
    (folder / schema.MANIFEST_FILE).unlink(missing_ok=True)  # from here on the folder is unfinished again


def require_same_plan(folder: Location, plan: Plan) -> None:
    """Raise `ArtifactError` if the folder is no longer that of this plan: another worker began it anew meanwhile."""
    with _disk(folder):
        known = _known(folder)
    if known is None or identity_of(known) != plan.identity:
        raise ArtifactError(
            f"{folder} is no longer what this export began: "
            + (
                "its files are gone" if known is None else "another worker continues with other items, titles or images"
            ),
            "the same dataset and the same --extend and --retry-failed for all workers",
            "end the workers that still have an earlier dataset, then run the same command again for every worker",
        )


def _has_failures(shard: Shard) -> bool:
    return bool(shard.counts.get(schema.STATUS_FAILED))


def shards_of(plan: Plan, share: Share | None) -> range:
    """Return the numbers of the shards that a worker makes; all of them without a share."""
    return range(len(plan)) if share is None else range(share.worker, len(plan), share.workers)


def publish_shard(
    folder: Location, plan: Plan, number: int, table: pa.Table, seconds: float, kept: Kept | None = None
) -> Shard:
    """Write one shard, whole or not at all, and return its record; `kept` is what was measured of short vectors.

    Raises:
        ArtifactError: the disk is full or fails; nothing was published.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return _commit(folder, plan, number, table, seconds, kept)
        except OSError as error:
            if error.errno in _HOPELESS or attempt == _ATTEMPTS - 1:
                raise _disk_error(folder, error) from None
            logger.warning("%s: %s; trying again", folder / schema.shard_name(number), error)
            time.sleep(0.2 * 2**attempt)
    raise AssertionError("unreachable")


def finish(
    folder: Location,
    plan: Plan,
    shards: Mapping[int, Shard],
    data: Location | None = None,
    share: Share | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Write the manifest, the last file of an export, and return it.

    Args:
        folder: the embeddings folder.
        plan: what it holds.
        shards: those that this writer knows to be finished. One of several workers reads all records again.
        data: the dataset folder, to be named in the manifest.
        share: of one of several workers. One at a time comes here, and the one that finds every shard recorded writes
            the manifest.
        about: further keys of the manifest.

    Returns:
        The manifest, of this worker or of another; None if other workers still have shards to make.

    Raises:
        ArtifactError: another worker has begun the folder anew, or a shard is not there as it was recorded.
    """
    with _disk(folder), turn(folder, share):
        require_same_plan(folder, plan)
        if (folder / schema.MANIFEST_FILE).exists():  # another worker wrote it, and may have died before it tidied up
            _tidy(folder, plan)
            return schema.read_manifest(folder, table=None)
        if share is not None:
            shards = recorded_shards(folder, plan)
        missing = [schema.shard_name(n) for n in range(len(plan)) if n not in shards]
        if missing and share is not None:
            return None
        if missing:
            raise ValueError(f"shards are missing: {missing}")
        ordered = [shards[n] for n in range(len(plan))]
        _require_all_there(folder, ordered)
        manifest = {
            "schema_version": schema.version_for(plan.settings.get("storage")),
            **plan.layout.described(plan),
            "counts": {status: sum(shard.counts.get(status, 0) for shard in ordered) for status in schema.STATUSES},
            "shard_size": plan.shard_size,
            "shards": [shard.entry for shard in ordered],
            "settings": plan.settings,
            "fingerprint": plan.fingerprint,
            schema.MADE_WITH: plan.made_with,
            **({schema.ENCODER: plan.encoder} if plan.encoder else {}),
            **({} if plan.catalogue is None else {schema.CATALOGUE: plan.catalogue}),
            "created": provenance.created(),
            "versions": provenance.library_versions(*_LIBRARIES),
            "data": str(data.resolve()) if data else None,
            "seconds": round(sum(shard.seconds for shard in ordered), 3),
            **(about or {}),
        }
        if plan.layout == ITEM_VECTORS and is_short(plan.settings):
            manifest[schema.SHORT] = in_all((shard.kept for shard in ordered), plan.settings, plan.shard_size)
        schema.write_json(folder / schema.MANIFEST_FILE, manifest)
        _tidy(folder, plan)
        return manifest


def _require_all_there(folder: Location, shards: Iterable[Shard]) -> None:
    """Raise `ArtifactError` if a file has another size than its record says: somebody else wrote or removed it."""
    sizes = (
        {name: stat.st_size for name, stat in folder.tree().items()}
        if isinstance(folder, StorePath)
        else {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    )
    if wrong := [shard.file for shard in shards if sizes.get(shard.file) != shard.bytes]:
        raise ArtifactError(
            f"{folder} does not hold {', '.join(wrong[:3])} as recorded: it was changed during the export",
            "one export at a time in a folder, and nobody else who writes there",
            "run the same command again: it writes these shards again",
        )


def require_space(folder: Location, plan: Plan, items: int) -> None:
    """Raise `ArtifactError` if `items` more rows cannot fit on the disk, however well they compress."""
    width = plan.layout.row_bytes(plan.settings)
    free = storage.free_bytes(folder)
    # vectors computed in bfloat16 compress to about a third of their size, never to a quarter
    if free is not None and free < items * width / 4:
        raise ArtifactError(
            f"{folder} has {free / 2**20:.0f} MiB free and {items} items need about {items * width / 2**20:.0f} MiB",
            "room for the vectors",
            "free some space or choose another --out; --precision int8 or --dim needs less",
        )


def _commit(
    folder: Location, plan: Plan, number: int, table: pa.Table, seconds: float, kept: Kept | None = None
) -> Shard:
    path = folder / schema.shard_name(number)
    with publish.draft(path) as draft:
        with draft.open("wb") as file:
            plan.layout.write(table, file)
            publish.flush(file)
        if not pq.read_table(draft, page_checksum_verification=True).equals(table):
            raise OSError(errno.EIO, "the shard does not read back as it was written")
        if kept is None and (earlier := _records(folder, plan, [number])):  # of the same part, with a few other rows
            kept = earlier[number][0].kept
        shard = replace(_describe(draft, path.name, plan.layout.statuses(table), seconds), kept=kept)
        _record_path(folder, number).unlink(missing_ok=True)  # that of the replaced shard
        publish.put_in_place(draft, path, shard.sha256)
    _write_record(folder, number, shard, plan.identity)
    return shard


def _describe(path: Location, name: str, status: pa.ChunkedArray, seconds: float) -> Shard:
    counted = {entry["values"]: entry["counts"] for entry in pc.value_counts(status).to_pylist()}
    counts = {name: counted[name] for name in schema.STATUSES if name in counted}
    return Shard(name, len(status), path.stat().st_size, storage.sha256_file(path), counts, round(seconds, 3))


def _adopt(folder: Location, plan: Plan, numbers: Iterable[int]) -> dict[int, Shard]:
    """Return records for shards that were renamed but not recorded; remove those that do not match the plan."""
    adopted = {}
    for number in numbers:
        path = folder / schema.shard_name(number)
        if not path.exists():
            continue
        try:
            with readable(path) as source, pq.ParquetFile(source, page_checksum_verification=True) as file:
                as_planned = file.schema_arrow.equals(plan.schema, check_metadata=True)
            content = plan.layout.read(path, plan.settings.get("views", ())) if as_planned else None
        except (pa.ArrowException, OSError):
            content = None
        if content is None or (content.ids, content.inputs) != plan.keys(number) or content.problems:
            logger.warning("%s is not a shard of this export: it is written again", path)
            path.unlink()
            continue
        adopted[number] = _describe(path, path.name, pa.chunked_array([pa.array(content.status, pa.string())]), 0.0)
    return adopted


def _holds(folder: Location, plan: Plan, number: int) -> bool:
    """Tell whether a shard, which is as it was recorded, holds the rows that a plan puts there."""
    path = folder / schema.shard_name(number)
    try:
        with readable(path) as source, pq.ParquetFile(source, page_checksum_verification=True) as file:
            if not file.schema_arrow.equals(plan.schema, check_metadata=True):
                return False
        return plan.layout.read_keys(path) == plan.keys(number)
    except (pa.ArrowException, OSError):
        return False


def _is_sound(folder: Location, number: int, shard: Shard) -> bool:
    """Tell whether a shard has the bytes that were recorded."""
    path = folder / schema.shard_name(number)
    return path.is_file() and path.stat().st_size == shard.bytes and storage.sha256_file(path) == shard.sha256


def _discard(folder: Location, number: int) -> None:
    _record_path(folder, number).unlink(missing_ok=True)
    (folder / schema.shard_name(number)).unlink(missing_ok=True)


def _state(plan: Plan) -> dict[str, Any]:
    return {
        "schema_version": schema.version_for(plan.settings.get("storage")),
        "shard_size": plan.shard_size,
        "settings": plan.settings,
        "fingerprint": plan.fingerprint,
        schema.MADE_WITH: plan.made_with,
        "rows": [len(plan.rows(number)) for number in range(len(plan))],
    }


def _write_record(folder: Location, number: int, shard: Shard, identity: str) -> None:
    schema.write_json(_record_path(folder, number), shard.entry | {_PLAN: identity})


def record_name(number: int) -> str:
    """Return the file name of the record of shard `number`; an earlier version left the underscore out."""
    return f"_part-{number:05d}.json"


_A_RECORD = re.compile(r"_?part-\d{5,}\.json")


def _record_path(folder: Location, number: int) -> Location:
    return folder / record_name(number)


def recorded_shards(folder: Location, plan: Plan) -> dict[int, Shard]:
    """Return the shards of an unfinished export that are recorded for this plan, whoever wrote them."""
    return {n: shard for n, (shard, identity) in _records(folder, plan).items() if identity == plan.identity}


def _records(folder: Location, plan: Plan, numbers: Iterable[int] | None = None) -> dict[int, tuple[Shard, str]]:
    """Return each readable record, and the plan it is for; "" for one of a version that recorded no plan."""
    with _disk(folder):
        former = schema.file_of(folder, schema.STATE_FILE).name != schema.STATE_FILE
    found = {}
    for number in range(len(plan)) if numbers is None else numbers:
        with suppress(OSError, ValueError, TypeError, AttributeError):  # unreadable: `begin` checks the shard itself
            entry = json.loads(_record_to_read(folder, number, former).read_text(encoding="utf-8"))
            identity = str(entry.pop(_PLAN, ""))
            found[number] = Shard(**entry), identity
    return found


def _record_to_read(folder: Location, number: int, former: bool) -> Location:
    """Return where the record of a shard lies; with `former`, its new name may still be to come."""
    path = folder / record_name(number).removeprefix("_")
    return path if former and path.exists() else _record_path(folder, number)


def _manifest_shards(manifest: Mapping[str, Any]) -> dict[int, Shard]:
    try:
        return {number: Shard(**entry) for number, entry in enumerate(manifest["shards"])}
    except (KeyError, TypeError) as error:
        raise ArtifactError(
            f"{schema.MANIFEST_FILE} is not one that export-items wrote ({error})",
            "a manifest with a record of each shard",
            "choose a new --out folder",
        ) from None


def _refuse_changed(folder: Location, known: Mapping[str, Any], plan: Plan, revise: bool) -> None:
    """Raise `ArtifactError` naming every setting that differs from those of the export in the folder."""
    fix = "continue with the vlm2rec version that began it, or choose a new --out folder"
    schema.require_version(folder, known, known.get("settings", {}).get("storage"), fix)
    changed = differences(
        {"shard_size": known.get("shard_size"), **known.get("settings", {})},
        {"shard_size": plan.shard_size, **plan.settings},
    )
    if revise:
        changed = {key: what for key, what in changed.items() if key not in INPUT_SETTINGS}
    refuse_older_hashes(folder, known.get("settings", {}), plan.settings)
    if changed:
        fix = "set these back to continue, or choose a new --out folder"
        if changed.keys() <= {*INPUT_SETTINGS}:
            fix += (
                "; if items were appended, --extend encodes them; if titles or images have changed, --retry-failed"
                " encodes those items again"
            )
        raise ArtifactError(
            f"{folder} was begun with other settings: {'; '.join(changed.values())}",
            "the settings it was begun with, so that all its vectors are comparable",
            fix,
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings that differ, nested ones under dotted keys, each with a text that names both values."""
    old, new = flatten(old), flatten(new)
    return {
        key: f"{key} was {_shown(old, key)}, now {_shown(new, key)}"
        for key in dict.fromkeys([*old, *new])
        if key not in old or key not in new or old[key] != new[key]
    }


def _shown(settings: Mapping[str, Any], key: str) -> str:
    text = repr(settings[key]) if key in settings else "not set"
    return text if len(text) <= 80 else f"{text[:77]}…"


def _refuse_foreign(folder: Location) -> None:
    publish.require_ours(
        folder,
        "an export to continue",
        ours=False,
        ignored=lambda name: is_lock(name) or is_temporary(name),
        error=ArtifactError,
    )


def is_temporary(name: str) -> bool:
    """Tell whether a file name is a temporary name of ours."""
    documents = (schema.STATE_FILE, schema.MANIFEST_FILE)
    former = (FORMER_LOCK_FILE, *map(schema.former_name, documents))
    return publish.is_temporary(name, "part-", "_part-", LOCK_FILE, *documents, *former)


def _remove_temporaries(folder: Location, mine: Collection[int] | None = None) -> None:
    """Remove the temporary files of dead writers.

    Nobody but us may write here at this moment: at all, or, with other workers at work, the shards in `mine` and
    what is written inside `turn`. A file whose writer can be seen to live stays all the same.
    """
    for path in folder.iterdir():
        if not is_temporary(path.name):
            continue
        number = re.match(r"\._?part-(\d+)\.", path.name)
        writer = publish.writer_of(path.name)
        if (mine is None or number is None or int(number[1]) in mine) and not (writer and writer.lives()):
            path.unlink(missing_ok=True)


def _tidy(folder: Location, plan: Plan) -> None:
    """Remove what a finished folder no longer needs: records, and temporary files of dead workers."""
    _remove_records(folder, plan)
    _remove_temporaries(folder)


def _remove_records(folder: Location, plan: Plan) -> None:
    known = {_record_path(folder, number).name for number in range(len(plan))} | {schema.STATE_FILE}
    for path in folder.iterdir():
        if path.name in known:
            path.unlink(missing_ok=True)


@contextmanager
def _disk(folder: Location) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _disk_error(folder, error) from None


def _disk_error(folder: Location, error: OSError) -> ArtifactError:
    return ArtifactError(
        f"{folder} cannot be written ({error.strerror or error})",
        "enough space and a disk that works, or a store that accepts the vectors",
        f"free some space or repair the disk (or correct the store's address and credentials), then {_CONTINUE}",
    )
