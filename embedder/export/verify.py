"""Check a finished embeddings folder against its manifest. No torch in here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm2rec.embedder.contract import schema, storage
from vlm2rec.embedder.contract.storage import Location, readable
from vlm2rec.embedder.export.lock import is_lock
from vlm2rec.embedder.export.plan import duplicates, fingerprint, without_inputs
from vlm2rec.embedder.export.ranked_file import RankedLayout
from vlm2rec.embedder.export.shard_file import Layout, ShardContent, VectorLayout
from vlm2rec.embedder.export.shards import is_temporary

_READERS = 4


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a folder."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


def verify(folder: Location) -> list[Problem]:
    """Compare a finished folder of items, users or recommendations with its manifest; return what is wrong with it.

    Finds missing, truncated, changed and foreign files, duplicate ids, wrong counts, NaN and infinity, wrong
    dimensions, and statuses that do not fit the vectors. Memory holds one shard, and eight bytes for each id.

    Raises:
        ArtifactError: there is no manifest that this version can read.
    """
    manifest = schema.read_manifest(folder, check=False, table=None)
    file = schema.file_of(folder, schema.MANIFEST_FILE).name
    problems = [Problem(file, what) for what in manifest_problems(manifest)]
    if problems:
        return problems
    hashes: dict[int, np.ndarray] = {}  # of the ids of each shard: a tenth of their memory
    status: Counter[str] = Counter()
    for number, entry in enumerate(manifest["shards"]):
        found, content = _verify_shard(folder, number, entry, manifest)
        problems += [Problem(schema.shard_name(number), what) for what in found]
        if content is not None:
            hashes[number] = np.fromiter(map(hash, content.ids), np.int64, len(content.ids))
            status.update(content.status)
    twice = _repeated_ids(folder, manifest, hashes)
    if twice:
        problems.append(Problem("all shards", f"{len(twice)} ids occur more than once, among them {twice[:5]}"))
    if not any(problem.file.endswith(".parquet") for problem in problems):  # else the sums are wrong anyway
        problems += [Problem(file, what) for what in _sum_problems(manifest, status)]
    known = {file, *(schema.shard_name(n) for n in range(len(manifest["shards"])))}
    if schema.table_of(manifest) != schema.ITEMS_TABLE:
        known.add(schema.LEFT_OUT_FILE)
    for name in sorted(path.name for path in folder.iterdir()):
        if name not in known and not is_lock(name) and (not name.startswith(".") or is_temporary(name)):
            problems.append(Problem(name, "is not part of this export"))
    return problems


def _repeated_ids(folder: Location, manifest: Mapping[str, Any], hashes: Mapping[int, np.ndarray]) -> list[str]:
    """Return the ids that occur more than once, sorted; only ids whose hashes do are read again."""
    values, counts = np.unique(np.concatenate([np.empty(0, np.int64), *hashes.values()]), return_counts=True)
    again = {*values[counts > 1].tolist()}
    if not again:
        return []
    found: list[str] = []
    for number in hashes:
        content = layout_of(manifest).read(folder / schema.shard_name(number), manifest.get("views", ()))
        found += [each for each in content.ids if hash(each) in again]
    return duplicates(found)


def file_problems(folder: Location, manifest: Mapping[str, Any]) -> list[Problem]:
    """Return what is wrong with the files that a sound manifest lists: all their bytes count, rows are not read.

    Raises:
        OSError: a file cannot be read.
    """
    with ThreadPoolExecutor(_READERS) as readers:
        found = readers.map(lambda entry: _file_problem(folder / entry["file"], entry, manifest), manifest["shards"])
        return [Problem(schema.shard_name(number), what) for number, what in enumerate(found) if what]


def manifest_problems(manifest: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the manifest itself: keys, fingerprint, names and records of its shards."""
    problems = schema.manifest_problems(manifest)
    if not problems and manifest["fingerprint"] != _fingerprint(manifest["settings"]):
        problems.append("the fingerprint is not that of the settings")
    return problems


def _fingerprint(settings: Mapping[str, Any]) -> str | None:
    try:
        return fingerprint(settings)
    except ValueError:  # NaN or infinity, or half a character: nothing that was ever written has them
        return None


def _verify_shard(
    folder: Location, number: int, entry: Mapping[str, Any], manifest: Mapping[str, Any]
) -> tuple[list[str], ShardContent | None]:
    path = folder / schema.shard_name(number)
    if broken := _file_problem(path, entry, manifest):
        return [broken], None
    try:
        content = layout_of(manifest).read(path, manifest.get("views", ()))
    except (pa.ArrowException, OSError) as error:
        return [f"cannot be read as Parquet ({error})"], None
    if len(content.ids) != entry["rows"]:
        return [*content.problems, f"has {len(content.ids)} rows, the manifest says {entry['rows']}"], content
    return content.problems, content


def _file_problem(path: Location, entry: Mapping[str, Any], manifest: Mapping[str, Any]) -> str | None:
    """Return what shows, without its rows, that a file is not the one that the manifest lists; None if it is."""
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"has {size} bytes, the manifest says {entry['bytes']}"
    if storage.sha256_file(path) != entry["sha256"]:
        return "its bytes have changed since it was written (SHA-256 differs)"
    try:
        with readable(path) as source, pq.ParquetFile(source, page_checksum_verification=True) as file:
            found = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        return f"cannot be read as Parquet ({error})"
    if not found.equals(layout_of(manifest).arrow_schema({"storage": manifest.get("dtype"), **manifest}, {})):
        if schema.table_of(manifest) == schema.RECOMMENDATIONS_TABLE:
            return "has other columns than recommendations"
        shown = schema.dims_of(manifest) if "dims" in manifest else f"[{manifest['dim']}]"
        return f"has other columns or another dimension than {manifest['dtype']}{shown}"
    stamp = (found.metadata or {}).get(b"vlm2rec.fingerprint")
    if stamp is not None and stamp.decode() != fingerprint(without_inputs(manifest["settings"])):
        return "was written with other settings than the manifest's"
    return None


def layout_of(manifest: Mapping[str, Any]) -> Layout:
    """Return how the rows of a folder lie in its shards."""
    table = schema.table_of(manifest)
    return RankedLayout() if table == schema.RECOMMENDATIONS_TABLE else VectorLayout(table)


def _sum_problems(manifest: Mapping[str, Any], status: Counter[str]) -> list[str]:
    problems = []
    key = "num_users" if schema.table_of(manifest) == schema.RECOMMENDATIONS_TABLE else "num_items"
    if status.total() != manifest[key]:
        problems.append(f"{key} is {manifest[key]}, the shards hold {status.total()} rows")
    for name in sorted({*schema.STATUSES, *manifest["counts"]}):
        found, stated = status[name], manifest["counts"].get(name, 0)
        if found != stated:
            problems.append(f"counts[{name}] is {stated}, the shards hold {found}")
    return problems
