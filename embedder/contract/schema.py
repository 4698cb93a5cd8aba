"""The embedding table and the dataset folder: names, columns, schemas. No torch in here.

These names are the contract between the three packages and with every reader outside vlm2rec.
Each is defined here and nowhere else.

    dataset folder     items.parquet  sequences.parquet  negatives.parquet  rejects.csv  dataset.json
    embeddings folder  part-00000.parquet ...  _manifest.json (written last)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm2rec.embedder.contract import precision
from vlm2rec.embedder.contract.errors import ArtifactError, did_you_mean
from vlm2rec.embedder.contract.publish import write_whole
from vlm2rec.embedder.contract.storage import Location, readable

SCHEMA_VERSION = 1
EMBEDDING_VERSION = 2  # the newest of an embeddings folder that can be read: 2 has vectors of int8 or binary
_STORED_AS = {"prompt_style": "wording"}


def stored_name(setting: str) -> str:
    """Return the key of a setting in manifests and records: the name under which it was first stored."""
    return _STORED_AS.get(setting, setting)


# --- dataset folder -----------------------------------------------------------------------------------------
ITEM_ID = "item_id"  # string, unique
TITLE = "title"  # string, never blank
IMAGE_PATH = "image_path"  # string, relative to the image root of dataset.json
CATEGORY_COLUMNS = ("category", "categories", "genres")  # of a catalogue, kept by `prepare`; the first one found
BRAND_COLUMNS = ("brand", "store")  # the same, for the maker's name
ALL_COLUMNS = "all"  # in a list of columns: all columns of the catalogue with text
USER_ID = "user_id"  # string, unique in sequences.parquet
TRAIN = "train"  # list<string>: item ids in time order, without those held out
VALID = "valid"  # string: the second to last item; list<string> with the temporal split
TEST = "test"  # string: the last item; list<string> with the temporal split
SEED = "seed"  # int32, in negatives.parquet
NEGATIVES = "negatives"  # list<string>: items the user never touched, in no order

ITEMS_FILE = "items.parquet"
SEQUENCES_FILE = "sequences.parquet"
NEGATIVES_FILE = "negatives.parquet"
DATASET_FILE = "dataset.json"
DATASET_TABLES = (ITEMS_FILE, SEQUENCES_FILE, NEGATIVES_FILE)  # dataset.json has the SHA-256 of each
SPLIT = "split"  # in dataset.json, if it is another than leave-one-out
LEAVE_ONE_OUT = "leave-one-out"  # one item to validate and one to test
TEMPORAL = "temporal"  # the last fifth of a user's interactions: several items each
REJECTS_FILE = "rejects.csv"  # every row of the inputs that `prepare` left out, and why; no reader needs it

# --- embeddings folder --------------------------------------------------------------------------------------
FUSED = "fused"
TEXT = "text"
IMAGE = "image"
VIEWS = (FUSED, TEXT, IMAGE)
MODALITIES = (TEXT, IMAGE)
CONCAT = "concat"  # no column of a shard: text and image end to end, made on reading
COLUMNS = (*VIEWS, CONCAT)
STATUS = "status"
ERROR = "error"
FULL_DIM = "full_dim"  # in a manifest's settings: length of the encoder's vectors, of which `dim` numbers were kept
SHORT = "short"  # in a manifest: how many neighbours of the full vectors the stored ones keep
INPUT = "input"  # string: hash of the title and the image that the row was made from; null for vectors from elsewhere
# whoever opens the folder as one Parquet table skips names that begin with an underscore or a dot
MANIFEST_FILE = "_manifest.json"
STATE_FILE = "_export.json"  # the settings of an unfinished export
_FORMER_NAMES = {MANIFEST_FILE: "manifest.json", STATE_FILE: "export.json"}  # see `files_of`
MADE_WITH = "made_with"  # in a manifest: names and origin of backbone and adapter, which decide no vector

ENCODER = "encoder"  # in a manifest: the settings of export-items that load the encoder again; they decide no vector

CATALOGUE = "catalogue"  # in a manifest: number of items in the dataset, of which the export may hold some alone
STATUS_OK = "ok"  # every requested view is there
STATUS_TRUNCATED = "truncated"  # every view is there; the title was cut to the token limit
STATUS_TEXT_ONLY = "text_only"  # the image was unreadable and the policy says to go on: fused == text
STATUS_FAILED = "failed"  # no vectors; `error` says why
STATUSES = (STATUS_OK, STATUS_TRUNCATED, STATUS_TEXT_ONLY, STATUS_FAILED)

# --- users and recommendations ------------------------------------------------------------------------------
TABLE = "table"  # in the settings of a manifest: what the rows are; without it, items
ITEMS_TABLE = "items"
USERS_TABLE = "users"  # a vector of each user, in the columns of an embeddings folder; `user_id` in place of `item_id`
RECOMMENDATIONS_TABLE = "recommendations"  # the first k items of each user
RANK = "rank"  # int32, from 1; null for a user without recommendations
SCORE = "score"  # float32
LEFT_OUT_FILE = "_left_out.csv"  # of users and recommendations: the rows of the histories that were left out, and why


# --- what other folders hold ------------------------------------------------------------------------------------
INDEX_FILE = "index.json"  # of an index folder, written last
ADAPTER_FILE = "vlm2rec.json"  # of an adapter folder, written last
CURVES_FILE = "curves.json"  # of an adapter folder: how the training went
FIXED_BATCH = "fixed_batch"  # of a row about gradients: the samples of the batch, which is the same at every step
METRICS_FILE = "metrics.json"  # of a folder of metrics, of either task, written last
USERS_FILE = "users.parquet"  # of a folder of metrics: those of each user
PROBE_FILE = "probe.json"  # of a folder of `probe-images`
DISTANCES = ("A_pos", "A_neg")  # columns of it in Task 1: the squared distances whose means are those of Eq. 5
METRICS = ("H@10", "H@20", "N@10", "N@20")  # hit rate and NDCG among the first 10 and 20
RETRIEVAL = "retrieval"  # recall, NDCG and precision among the first 20 of the catalogue, over all targets of a user
SEQUENTIAL = ("SASRec", "GRU4Rec", "BERT4Rec")  # RecBole's models that start from item ids or item vectors
MULTIMODAL = ("VBPR", "FREEDOM", "LATTICE", "SLMRec")  # models of users and items that need item vectors
RECOMMENDERS = (*SEQUENTIAL, *MULTIMODAL)


def table_of(described: Mapping[str, Any]) -> str:
    """Return what the rows of a folder are, from its manifest: items, users or recommendations."""
    settings = described.get("settings")
    return str(settings.get(TABLE, ITEMS_TABLE)) if isinstance(settings, Mapping) else ITEMS_TABLE


def id_column(table: str) -> str:
    """Return the column of the ids."""
    return ITEM_ID if table == ITEMS_TABLE else USER_ID


def embedding_schema(
    dim: int | Mapping[str, int],
    dtype: str = "float32",
    metadata: dict[str, str] | None = None,
    table: str = ITEMS_TABLE,
) -> pa.Schema:
    """Return the Arrow schema of one embedding shard: `fixed_size_list<dtype>[dim]` for each view.

    `dim` is one length for all views, or the length of each view (`dims_of`). Scales of int8 have columns of their own.
    """
    dims = dict.fromkeys(VIEWS, dim) if isinstance(dim, int) else dim
    return pa.schema(
        [
            pa.field(id_column(table), pa.string(), nullable=False),
            *(pa.field(view, precision.stored_type(dtype, dims[view])) for view in VIEWS),
            *(pa.field(scale_of(view), pa.float32()) for view in VIEWS if precision.has_scale(dtype)),
            pa.field(STATUS, pa.string(), nullable=False),
            pa.field(ERROR, pa.string()),
            pa.field(INPUT, pa.string()),
        ],
        metadata=metadata,
    )


def scale_of(view: str) -> str:
    """Return the column with the scales of a view's vectors."""
    return f"{view}_scale"


def version_for(dtype: object) -> int:
    """Return the version of an embeddings folder with vectors of this number format."""
    return SCHEMA_VERSION if dtype is None or dtype in precision.FLOATS else EMBEDDING_VERSION


def dims_of(described: Mapping[str, Any]) -> dict[str, int]:
    """Return the length of each view's vectors, from a manifest or the settings of an export.

    It is `dim`, unless `dims` gives a length for each view: a concatenation is as long as its parts together, and
    `dim` is then the length of `fused`.
    """
    return {view: int(described.get("dims", {}).get(view, described["dim"])) for view in VIEWS}


def dim_of(described: Mapping[str, Any], column: str) -> int:
    """Return the length of the vectors in a column: a view, or `CONCAT`."""
    dims = dims_of(described)
    return sum(dims[view] for view in stored_columns(column))


def stored_columns(column: str) -> tuple[str, ...]:
    """Return the columns of a shard that a column is read from; `CONCAT` needs both modalities."""
    return MODALITIES if column == CONCAT else (column,)


def read_columns(columns: Sequence[str], dtype: str) -> list[str]:
    """Return the columns of a shard that hold these views: their vectors, and their scales if the format has any."""
    return [*columns, *(scale_of(view) for view in columns if precision.has_scale(dtype))]


def vectors_of(batch: pa.RecordBatch, view: str, dim: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a view's vectors of some rows of a shard, (n, dim) float32, NaN where there is none, and the mask (n,)."""
    scales = batch[scale_of(view)] if precision.has_scale(dtype) else None
    return precision.floats_of(batch[view], scales, dtype, dim)


def columns_of(manifest: Mapping[str, Any]) -> list[str]:
    """Return the columns that can be read from a table: its views and, if it has both modalities, `CONCAT`."""
    views = [view for view in VIEWS if view in manifest.get("views", VIEWS)]
    return [*views, CONCAT] if {*MODALITIES} <= {*views} else views


def modalities_of(views: Sequence[str]) -> tuple[str, ...]:
    """Return the modalities (text, image) that the vectors of a table with these views are made of.

    A table of one modality has `fused` equal to it: (fused, text) is made of titles alone. One interleaved prompt
    leaves only `fused`, which is made of both.
    """
    return tuple(view for view in MODALITIES if view in views) or MODALITIES


_REACH = "check the path, its permissions and, for an object store, address and credentials"


def shard_name(number: int) -> str:
    """Return the file name of shard `number`."""
    return f"part-{number:05d}.parquet"


def write_json(path: Location, value: Any) -> None:
    """Write JSON as `write_text` does; a path that is no UTF-8 stands in it with JSON's own escapes."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, text.encode("utf-8", "backslashreplace"))


def write_text(path: Location, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it."""
    write_whole(path, text.encode("utf-8"))


def read_json(path: Location, what: str, fix: str) -> dict[str, Any]:
    """Read a JSON object, or raise `ArtifactError` naming `what` the file is."""
    try:
        if not path.is_file():
            raise ArtifactError(f"{path} does not exist", what, fix)
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        if _HALF.search(text):  # alone, half of a character; `write_json` writes bytes of paths as U+DC80 to U+DCFF
            json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror or error})", what, _REACH) from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deep, a number of 5,000 digits
        raise ArtifactError(f"{path} is damaged: not readable JSON ({error})", what, fix) from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} holds a {type(value).__name__}", what, fix)
    return value


_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # an escape of a surrogate, of which emoji take two


def is_written_by(path: Location, writer: str) -> bool:
    """Tell whether a JSON file names this command in `written_by`; a foreign file of the same name does not."""
    try:
        return read_json(path, "", "").get("written_by") == writer
    except ArtifactError:
        return False


_EXPORT_AGAIN = (
    "run the command that wrote it (for example `vlm2rec export-items`) again: it continues where it stopped"
)


def files_of(folder: Location) -> dict[str, Location]:
    """Return where the manifest and the state file of an embeddings folder lie, those that are there, by today's name.

    A folder has today's names or those of an earlier version (`_FORMER_NAMES`), until somebody continues its export.
    If it has one of today's, those count: a former one beside it is a copy that could not be removed. One that is no
    copy was put there by somebody, and nothing tells which of the two fits the parts.

    Raises:
        ArtifactError: the folder has files of both kinds of names, and they are not the same.
        OSError: the folder cannot be read.
    """
    former = {name: path for name, before in _FORMER_NAMES.items() if (path := folder / before).exists()}
    present = {name: path for name in _FORMER_NAMES if (path := folder / name).exists()}
    for name, path in former.items() if present else ():
        if not _is_copy(path, folder / name):
            raise ArtifactError(
                f"{folder} holds {path.name}, which an earlier version of vlm2rec wrote, beside"
                f" {' and '.join(present)}, and the two disagree",
                "the files of one export",
                f"delete the one that does not belong to these parts (a manifest lists the SHA-256 of each); then"
                f" `vlm2rec verify {folder}` tells whether the other one does",
            )
    return present or former


def file_of(folder: Location, name: str) -> Location:
    """Return where a file of a folder lies that some command writes last; see `files_of`."""
    return files_of(folder).get(name, folder / name) if name in _FORMER_NAMES else folder / name


def former_name(name: str) -> str:
    """Return the name that the manifest or the state file had in an earlier version."""
    return _FORMER_NAMES[name]


def _is_copy(one: Location, other: Location) -> bool:
    """Tell whether two files have the same bytes, or whether the first has just been removed."""
    try:
        return one.read_bytes() == other.read_bytes()
    except FileNotFoundError:
        return not one.exists()


def read_manifest(folder: Location, *, check: bool = True, table: str | None = ITEMS_TABLE) -> dict[str, Any]:
    """Read the manifest of a finished embeddings folder, or of a folder of users or recommendations.

    Args:
        folder: the folder.
        check: refuse a manifest that `manifest_problems` finds fault with. Without it, only the version is checked.
        table: what the rows have to be; None takes any.

    Raises:
        ArtifactError: the folder has no manifest (the export is not complete), the manifest is damaged, it was
            written by a newer schema, or the rows are something else.
    """
    path = _manifest_of(folder)
    manifest = read_json(path, f"a finished embeddings folder, whose {MANIFEST_FILE} is written last", _EXPORT_AGAIN)
    require_version(folder, manifest, manifest.get("dtype"), "install a newer vlm2rec, or export again with this one")
    if table not in (None, table_of(manifest)):
        raise ArtifactError(
            f"{folder} is a folder of {table_of(manifest)}",
            f"a folder of {table}, as {_WRITERS[str(table)]} writes",
            f"give the folder that {_WRITERS[str(table)]} wrote",
        )
    if check and (problems := manifest_problems(manifest)):
        raise ArtifactError(f"{path} is damaged: {'; '.join(problems[:3])}", "a manifest as written", _EXPORT_AGAIN)
    return manifest


_WRITERS = {ITEMS_TABLE: "export-items", USERS_TABLE: "export-users", RECOMMENDATIONS_TABLE: "recommend"}


def require_version(folder: Location, known: Mapping[str, Any], dtype: object, fix: str) -> None:
    """Raise `ArtifactError` unless this program knows the version of an embeddings folder of this number format."""
    version, newest = known.get("schema_version"), version_for(dtype)
    if not isinstance(version, int) or version > newest:
        found = f"{folder} has embedding schema version {version!r}"
        raise ArtifactError(found, f"a version up to {newest}", fix)


def _manifest_of(folder: Location) -> Location:
    try:
        path = file_of(folder, MANIFEST_FILE)
        # whoever continues the export may have given it today's name at this moment
        return path if path.is_file() else file_of(folder, MANIFEST_FILE)
    except OSError as error:
        found = f"{folder} cannot be read ({error.strerror or error})"
        raise ArtifactError(found, "an embeddings folder", _REACH) from None


def shards_sha256(manifest: Mapping[str, Any]) -> str:
    """Return one hash of all shards of a finished folder: another one says that some row differs."""
    return hashlib.sha256("".join(shard["sha256"] for shard in manifest["shards"]).encode()).hexdigest()


_MANIFEST_KEYS = {
    "dim": int, "dtype": str, "views": list, "num_items": int, "counts": dict, "shards": list, "settings": dict
}  # fmt: skip
# more is damage, and would ask for all memory: numbers in a vector, rows for each byte of a shard
_LONGEST, _ROWS_A_BYTE = 2**20, 8
_RANKED_KEYS = {"k": int, "num_users": int, "counts": dict, "shards": list, "settings": dict}
_SHARD_KEYS = {"rows": int, "bytes": int, "sha256": str}


def manifest_problems(manifest: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with a manifest: keys that are missing or of another type, files outside the folder."""
    ranked = table_of(manifest) == RECOMMENDATIONS_TABLE
    problems = [
        f"{key} is missing or no {kind.__name__}"
        for key, kind in (_RANKED_KEYS if ranked else _MANIFEST_KEYS).items()
        if type(manifest.get(key)) is not kind
    ]
    if problems:
        return problems
    if not isinstance(manifest.get("fingerprint"), str):
        problems.append("fingerprint is missing or no str")
    return problems + ([] if ranked else _vector_problems(manifest)) + _shard_problems(manifest["shards"])


def _vector_problems(manifest: Mapping[str, Any]) -> list[str]:
    problems = []
    dims = manifest.get("dims", {})
    if not isinstance(dims, dict) or not all(type(dims.get(view, 0)) is int for view in VIEWS):
        problems.append(f"dims are {dims!r}, not a length for each view")
    elif not all(0 < dim <= _LONGEST for dim in (manifest["dim"], *dims.values())):
        problems.append(f"dim is {manifest['dim']} and dims are {dims}, not from 1 to {_LONGEST:,}")
    if manifest["dtype"] not in precision.PRECISIONS:
        problems.append(f"dtype is {manifest['dtype']!r}, not one of {', '.join(precision.PRECISIONS)}")
    if not all(view in VIEWS for view in manifest["views"]):
        problems.append(f"views are {manifest['views']}, not of {', '.join(VIEWS)}")
    return problems


def _shard_problems(shards: Sequence[Any]) -> list[str]:
    problems = []
    for number, entry in enumerate(shards):
        # a file name must not lead out of the folder
        if not isinstance(entry, dict) or entry.get("file") != shard_name(number):
            problems.append(f"shard {number} is not recorded as {shard_name(number)}")
        elif not all(type(entry.get(key)) is kind for key, kind in _SHARD_KEYS.items()):
            problems.append(f"the record of {entry['file']} lacks {', '.join(_SHARD_KEYS)}")
        elif not 0 <= entry["rows"] <= _ROWS_A_BYTE * entry["bytes"]:
            problems.append(f"the record of {entry['file']} has {entry['rows']} rows and {entry['bytes']} bytes")
    return problems


def require_columns(found: list[str], required: list[str], where: str, fix: str) -> None:
    """Raise `ArtifactError` naming the first missing column and the most similar one in the file."""
    for column in required:
        if column not in found:
            raise ArtifactError(
                f"{where} has no column {column!r}{did_you_mean(column, found)}; its columns are {', '.join(found)}",
                f"the columns {', '.join(required)}",
                fix,
            )


def read_table(path: Location, columns: list[str] | None = None, *, fix: str) -> pa.Table:
    """Read a Parquet file, or raise `ArtifactError` with what to do."""
    try:
        if not path.is_file():
            raise ArtifactError(f"{path} does not exist", "a file written by vlm2rec", fix)
        with readable(path) as source:
            table = pq.read_table(source, columns=columns, page_checksum_verification=True)
        _ = table.column_names  # raises if a name is no UTF-8: Arrow does not check that as it reads
        return table
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read as Parquet ({error})", "an undamaged Parquet file", fix) from None
