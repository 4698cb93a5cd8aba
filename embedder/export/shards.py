"""The embeddings folder, written so that it is complete or the same command finishes it. pyarrow only, no torch.

What lies in the folder, in the order it is written:

    export.lock                              host and pid of the live writer; several workers have one each
    export.json                              the settings, before the first shard
    part-00000.parquet  part-00000.json      a finished shard, then its record: rows, bytes, SHA-256
    manifest.json                            last; it includes the records, which are then removed, as is export.json

A shard goes temporary file → fsync → read back → rename → record. In an object store, where an object appears whole or
not at all, it is temporary file → read back → upload → SHA-256 of what the store gives back → record. After a
kill at any moment, the next run keeps what is recorded, checks and adopts shards without a record, and writes the rest.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlm2rec.embedder.contract import provenance, publish, schema, storage
from vlm2rec.embedder.contract.errors import ArtifactError
from vlm2rec.embedder.contract.storage import Location, readable
from vlm2rec.embedder.export.lock import LOCK_FILE, Share, is_lock, is_writing
from vlm2rec.embedder.export.plan import INPUT_SETTINGS, Plan, flatten, refuse_older_hashes
from vlm2rec.embedder.export.shard_file import read_rows, write_parquet

STATE_FILE = "export.json"
_ATTEMPTS = 3  # a busy network disk may fail once
_HOPELESS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
_CONTINUE = "run the command that wrote it (for example `vlm2rec export-items`) again: it continues where it stopped"
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


def rows_of_shards(folder: Location) -> list[int]:
    """Return the row count of each shard that an export into this folder planned; empty if there is no export."""
    known = _known(folder)
    if known is None:
        return []
    return [shard["rows"] for shard in known["shards"]] if "shards" in known else list(known.get("rows", []))


def known_settings(folder: Location) -> dict[str, Any] | None:
    """Return the settings of the export in this folder, finished or not; None if there is none."""
    known = _known(folder)
    return None if known is None else dict(known.get("settings", {}))


def _known(folder: Location) -> dict[str, Any] | None:
    """Return the manifest, or the state file of an unfinished export, or None."""
    with _disk(folder):
        if (folder / schema.MANIFEST_FILE).exists():
            return schema.read_manifest(folder)
        if (folder / STATE_FILE).exists():
            return schema.read_json(folder / STATE_FILE, "the settings of an unfinished export", "choose another --out")
        return None


def begin(folder: Location, plan: Plan, revise: bool = False, share: Share | None = None) -> dict[int, Shard]:
    """Return the finished, undamaged shards of the plan, and prepare the folder for the others.

    Call it inside `writing(folder)`. It writes the settings into a new folder, and removes left-over temporary files
    and damaged shards; the log names the damaged shards.

    Args:
        folder: the embeddings folder.
        plan: what the folder will hold.
        revise: the inputs may differ from those of the folder: items were appended, titles or images changed. The
            caller then decides which rows to make again.
        share: check and repair only these shards; other writers are at work on the others.

    Raises:
        ArtifactError: the folder belongs to an export with other settings, or to something else.
    """
    with _disk(folder):
        return _begin(folder, plan, revise, share)


def _begin(folder: Location, plan: Plan, revise: bool, share: Share | None) -> dict[int, Shard]:
    known, recorded = _read_state(folder, plan, revise, share)
    complete = (folder / schema.MANIFEST_FILE).exists()
    mine = shards_of(plan, share)
    _remove_temporaries(folder, mine if share else None)
    sound = {n: shard for n, shard in recorded.items() if n not in mine or not _discard_damaged(folder, n, shard)}
    adopted = {} if complete else _adopt(folder, plan, [n for n in mine if n not in recorded])
    as_planned = known is not None and known.get("settings") == plan.settings
    if complete and len(sound) == len(plan) and as_planned and not revise:
        if not share:
            _remove_records(folder, plan)
        return sound
    schema.write_json(folder / STATE_FILE, _state(plan))
    for number, shard in (sound | adopted).items():
        if number in mine or not _record_path(folder, number).exists():
            schema.write_json(_record_path(folder, number), asdict(shard))
    (folder / schema.MANIFEST_FILE).unlink(missing_ok=True)  # from here on the folder is unfinished again
    return dict(sorted((sound | adopted).items()))


def recorded(folder: Location, plan: Plan, revise: bool = False) -> dict[int, Shard]:
    """Return the shards that are recorded as finished, without checking them; the folder need not exist.

    Raises:
        ArtifactError: as `begin`.
    """
    return _read_state(folder, plan, revise, None)[1] if folder.is_dir() else {}


def _read_state(
    folder: Location, plan: Plan, revise: bool, share: Share | None
) -> tuple[dict[str, Any] | None, dict[int, Shard]]:
    """Return the manifest or state file, and the shards that the folder records."""
    known = _known(folder)
    if known is None:
        try:
            _refuse_foreign(folder)
        except ArtifactError:
            known = _known(folder) if share else None  # another worker has begun the export meanwhile
            if known is None:
                raise
    if known is None:
        return None, {}
    _refuse_changed(folder, known, plan, revise)
    return known, _manifest_shards(known) if "shards" in known else recorded_shards(folder, plan)


def shards_of(plan: Plan, share: Share | None) -> range:
    """Return the numbers of the shards that a worker makes; all of them without a share."""
    return range(len(plan)) if share is None else range(share.worker, len(plan), share.workers)


def publish_shard(folder: Location, plan: Plan, number: int, table: pa.Table, seconds: float) -> Shard:
    """Write one shard, whole or not at all, and return its record.

    Raises:
        ArtifactError: the disk is full or fails; nothing was published.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return _commit(folder, plan, number, table, seconds)
        except OSError as error:
            if error.errno in _HOPELESS or attempt == _ATTEMPTS - 1:
                _remove_temporaries(folder, [number])
                raise _disk_error(folder, error) from None
            logger.warning("%s: %s; trying again", folder / schema.shard_name(number), error)
            time.sleep(0.2 * 2**attempt)
    raise AssertionError("unreachable")


def finish(folder: Location, plan: Plan, shards: Mapping[int, Shard], data: Location | None = None) -> dict[str, Any]:
    """Write the manifest, the last file of an export, and return it."""
    if (folder / schema.MANIFEST_FILE).exists():  # another worker wrote it, and may have died before it tidied up
        _tidy(folder, plan)
        return schema.read_manifest(folder)
    missing = [schema.shard_name(n) for n in range(len(plan)) if n not in shards]
    if missing:
        raise ValueError(f"shards are missing: {missing}")
    ordered = [shards[n] for n in range(len(plan))]
    manifest = {
        "schema_version": schema.SCHEMA_VERSION,
        "dim": plan.settings["dim"],
        **({"dims": plan.settings["dims"]} if "dims" in plan.settings else {}),
        "dtype": plan.settings["storage"],
        "views": plan.settings["views"],
        "num_items": len(plan.item_ids),
        "counts": {status: sum(shard.counts.get(status, 0) for shard in ordered) for status in schema.STATUSES},
        "shard_size": plan.shard_size,
        "shards": [asdict(shard) for shard in ordered],
        "settings": plan.settings,
        "fingerprint": plan.fingerprint,
        schema.MADE_WITH: plan.made_with,
        "created": provenance.created(),
        "versions": provenance.library_versions(*_LIBRARIES),
        "data": str(data.resolve()) if data else None,
        "seconds": round(sum(shard.seconds for shard in ordered), 3),
    }
    with _disk(folder):
        schema.write_json(folder / schema.MANIFEST_FILE, manifest)
    _tidy(folder, plan)
    return manifest


def require_space(folder: Location, plan: Plan, items: int) -> None:
    """Raise `ArtifactError` if `items` more rows cannot fit on the disk, however well they compress."""
    dims = schema.dims_of(plan.settings)
    width = np.dtype(plan.settings["storage"]).itemsize * sum(dims[view] for view in plan.settings["views"])
    free = storage.free_bytes(folder)
    # vectors computed in bfloat16 compress to about a third of their size, never to a quarter
    if free is not None and free < items * width / 4:
        raise ArtifactError(
            f"{folder} has {free / 2**20:.0f} MiB free and {items} items need about {items * width / 2**20:.0f} MiB",
            "room for the vectors",
            "free some space or choose another --out; --storage float16 halves the size",
        )


def _commit(folder: Location, plan: Plan, number: int, table: pa.Table, seconds: float) -> Shard:
    path = folder / schema.shard_name(number)
    with publish.draft(path) as draft:
        with draft.open("wb") as file:
            write_parquet(table, file)
            publish.flush(file)
        if not pq.read_table(draft, page_checksum_verification=True).equals(table):
            raise OSError(errno.EIO, "the shard does not read back as it was written")
        shard = _describe(draft, path.name, table[schema.STATUS], seconds)
        _record_path(folder, number).unlink(missing_ok=True)  # that of the replaced shard
        publish.put_in_place(draft, path, shard.sha256)
    schema.write_json(_record_path(folder, number), asdict(shard))
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
            rows = plan.rows(number)
            wanted = [plan.item_ids[row] for row in rows], plan.made_from(rows)
            content = read_rows(path, plan.settings["views"]) if as_planned else None
        except (pa.ArrowException, OSError):
            content = None
        if content is None or (content.ids, content.inputs) != wanted or content.problems:
            logger.warning("%s is not a shard of this export: it is written again", path)
            path.unlink()
            continue
        adopted[number] = _describe(path, path.name, pa.chunked_array([pa.array(content.status, pa.string())]), 0.0)
    return adopted


def _discard_damaged(folder: Location, number: int, shard: Shard) -> bool:
    """Tell whether a recorded shard is missing or changed; if so, log that and remove it."""
    path = folder / schema.shard_name(number)
    if path.is_file() and path.stat().st_size == shard.bytes and storage.sha256_file(path) == shard.sha256:
        return False
    logger.warning("%s is %s: it is written again", path, "damaged" if path.exists() else "missing")
    path.unlink(missing_ok=True)
    _record_path(folder, number).unlink(missing_ok=True)
    return True


def _state(plan: Plan) -> dict[str, Any]:
    return {
        "schema_version": schema.SCHEMA_VERSION,
        "shard_size": plan.shard_size,
        "settings": plan.settings,
        "fingerprint": plan.fingerprint,
        schema.MADE_WITH: plan.made_with,
        "rows": [len(plan.rows(number)) for number in range(len(plan))],
    }


def _record_path(folder: Location, number: int) -> Location:
    return (folder / schema.shard_name(number)).with_suffix(".json")


def recorded_shards(folder: Location, plan: Plan) -> dict[int, Shard]:
    """Return the shards of an unfinished export that are written and recorded, whoever wrote them."""
    found = {}
    for number in range(len(plan)):
        try:
            found[number] = Shard(**json.loads(_record_path(folder, number).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue  # no readable record: `begin` checks the shard itself
    return found


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
    version = known.get("schema_version")
    if not isinstance(version, int) or version > schema.SCHEMA_VERSION:
        raise ArtifactError(
            f"{folder} has embedding schema version {version!r}",
            f"a version up to {schema.SCHEMA_VERSION}",
            "continue with the vlm2rec version that began it, or choose a new --out folder",
        )
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
    return publish.is_temporary(name, "part-", LOCK_FILE, STATE_FILE, schema.MANIFEST_FILE)


def _remove_temporaries(folder: Location, mine: Collection[int] | None = None) -> None:
    """Remove the temporary files of dead writers; with other writers at work, only those of the shards in `mine`."""
    for path in folder.iterdir():
        if is_temporary(path.name):
            number = re.match(r"\.part-(\d+)\.", path.name)
            if mine is None or (number and int(number[1]) in mine):
                path.unlink(missing_ok=True)


def _tidy(folder: Location, plan: Plan) -> None:
    """Remove what a finished folder no longer needs: records, and temporary files of dead workers."""
    _remove_records(folder, plan)
    for path in folder.iterdir():
        if is_temporary(path.name) and not is_writing(path):
            path.unlink(missing_ok=True)


def _remove_records(folder: Location, plan: Plan) -> None:
    for number in range(len(plan)):
        _record_path(folder, number).unlink(missing_ok=True)
    (folder / STATE_FILE).unlink(missing_ok=True)


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
