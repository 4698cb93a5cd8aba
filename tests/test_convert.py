"""`vlm2rec convert`: each form is read by the tool it is for, and no item without a vector passes silently."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import yaml
from children import Forked
from embedding_folder import write_embeddings
from recommender_world import ODD_IDS, cyclic_sequences, load_as_mmrec, write_atomic, write_dataset

from vlm2rec.downstream import formats
from vlm2rec.downstream.recbole import compat
from vlm2rec.downstream.recbole.run import recbole_config_of
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, DataError, MissingDependencyError, Vlm2RecError
from vlm2rec.embedder.export.verify import verify
from vlm2rec.pipelines import cli, convert, import_vectors
from vlm2rec.pipelines.config import ConvertConfig, ImportVectorsConfig

ODD = [*ODD_IDS, "line\nend", "Zürich, €"]
ITEMS = [*ODD, *(f"i{number}" for number in range(20 - len(ODD)))]
DIM = 6
PICTURELESS = ["7", "i1"]  # text_only: no image vector
FAILED = "a b"  # no vector at all
UNTOUCHED = "i3"
SEQUENCES = cyclic_sequences([item for item in ITEMS if item != UNTOUCHED], 30)


def drawn(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(1, 1, (len(ITEMS), DIM)).astype(np.float32)


TEXT, IMAGE = drawn(0), drawn(1)


def row(item: str) -> int:
    return ITEMS.index(item)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("world") / "data", SEQUENCES, ITEMS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """An embeddings folder of three shards in another order than the catalogue, with a stranger at its end."""
    folder = tmp_path_factory.mktemp("whole") / "emb"
    order = np.random.default_rng(3).permutation(len(ITEMS))
    text, image = (np.concatenate([view[order], np.full((1, DIM), 9, np.float32)]) for view in (TEXT, IMAGE))
    ids = [*(ITEMS[i] for i in order), "stranger"]
    write_embeddings(folder, ids, text + image, text, image, shard_size=8, data=str(data))
    return folder


@pytest.fixture(scope="module")
def holed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The same items in the catalogue's order; two have no image vector, one has none at all."""
    folder = tmp_path_factory.mktemp("holed") / "emb"
    text, image = TEXT.copy(), IMAGE.copy()
    image[[row(item) for item in PICTURELESS]] = np.nan
    text[row(FAILED)] = image[row(FAILED)] = np.nan
    fused = np.where(np.isnan(image), text, text + image)
    write_embeddings(folder, ITEMS, fused, text, image, shard_size=8, data=str(data))
    return folder


def run(embeddings: Path, to: str, out: Path, **settings: Any) -> dict[str, Any]:
    return convert.run(ConvertConfig(embeddings=embeddings, to=to, out=out, **settings))  # type: ignore[arg-type]


def listed(out: Path) -> list[tuple[str, str, str]]:
    """Item, column and outcome of every line of missing.csv."""
    with (out / "missing.csv").open(newline="", encoding="utf-8") as file:
        return [(line["item_id"], line["column"], line["outcome"]) for line in csv.DictReader(file)]


def ids_of(out: Path) -> list[str]:
    loaded: list[str] = json.loads((out / "item_ids.json").read_text(encoding="utf-8"))
    return loaded


def mean_without(vectors: np.ndarray, *items: str) -> np.ndarray:
    return np.delete(vectors, [row(item) for item in items], 0).mean(0, dtype=np.float64)


# --- text and image end to end -----------------------------------------------------------------------------------
def test_concat_is_a_column_of_every_format_but_mmrec(whole: Path, holed: Path, data: Path, tmp_path: Path) -> None:
    record = run(holed, "npy", tmp_path / "npy", columns=("concat",))
    assert record["dims"] == {"concat": 2 * DIM}
    kept = [item for item in ITEMS if item not in (*PICTURELESS, FAILED)]
    assert ids_of(tmp_path / "npy") == kept
    both = np.concatenate([TEXT, IMAGE], axis=1)
    np.testing.assert_array_equal(np.load(tmp_path / "npy" / "concat.npy"), both[[row(item) for item in kept]])
    assert sorted(listed(tmp_path / "npy")) == sorted((item, "concat", "left out") for item in (*PICTURELESS, FAILED))
    run(whole, "cornac", tmp_path / "cornac", columns=("concat",))
    assert np.load(tmp_path / "cornac" / "features.npy").shape[1] == 2 * DIM
    run(whole, "npy", tmp_path / "all")
    assert not (tmp_path / "all" / "concat.npy").exists(), "a default has what is stored"
    with pytest.raises(ConfigError, match="concat with mmrec, whose models combine text and image themselves"):
        run(whole, "mmrec", tmp_path / "mmrec", columns=("concat",), data=data)


# --- the embeddings folder itself -------------------------------------------------------------------------------
def test_duckdb_reads_the_parquet_shards_as_they_are(holed: Path) -> None:
    import duckdb

    found = duckdb.sql(f"select item_id, text, status from '{holed}/*.parquet'").fetchall()
    vectors = {item: vector for item, vector, _ in found}
    assert sorted(vectors) == sorted(ITEMS)
    assert vectors[FAILED] is None
    np.testing.assert_array_equal(np.float32(vectors["007"]), TEXT[0])
    vector = f"text::float[{DIM}]"  # DuckDB reads Parquet's fixed-size lists as lists
    (nearest,) = duckdb.sql(
        f"with items as (select item_id, {vector} as v from '{holed}/*.parquet' where text is not null)"
        " select b.item_id from items a, items b where a.item_id = 'i1' and b.item_id <> 'i1'"
        " order by array_cosine_similarity(a.v, b.v) desc limit 1"
    ).fetchall()
    unit = TEXT / np.linalg.norm(TEXT, axis=1, keepdims=True)
    cosine = unit @ unit[row("i1")]
    cosine[[row("i1"), row(FAILED)]] = -1
    assert nearest == (ITEMS[int(cosine.argmax())],)


def test_polars_reads_the_parquet_shards_as_they_are(holed: Path) -> None:
    import polars

    table = polars.read_parquet(holed / "*.parquet")
    assert table["item_id"].to_list() == ITEMS
    assert table.schema["image"] == polars.Array(polars.Float32, DIM)
    assert table.filter(polars.col("image").is_null())["item_id"].to_list() == [
        item for item in ITEMS if item in {*PICTURELESS, FAILED}
    ]
    np.testing.assert_array_equal(table["text"][0].to_numpy(), TEXT[0])


# --- cornac -----------------------------------------------------------------------------------------------------
def test_cornacs_vbpr_trains_on_the_matrix_and_every_item_keeps_its_own_row(whole: Path, tmp_path: Path) -> None:
    from cornac.data import ImageModality
    from cornac.eval_methods import BaseMethod
    from cornac.models import VBPR

    run(whole, "cornac", tmp_path / "out", columns=("image",))
    features, ids = np.load(tmp_path / "out" / "features.npy"), ids_of(tmp_path / "out")
    assert (features.shape, features.dtype) == ((21, DIM), np.float32)
    split = {
        name: [
            (f"u{user}", item, 1.0) for user, items in enumerate(SEQUENCES) for item in (items[:-1], items[-1:])[part]
        ]
        for part, name in enumerate(("train_data", "test_data"))
    }
    modality = ImageModality(features=features, ids=ids, normalized=False)
    method = BaseMethod.from_splits(**split, item_image=modality, exclude_unknowns=False, verbose=False)
    known = method.train_set.iid_map
    assert len(known) == len(ITEMS) - 1  # all that anybody touched
    for item, place in known.items():
        np.testing.assert_array_equal(modality.features[place], IMAGE[row(item)])
    model = VBPR(k=4, k2=4, n_epochs=2, batch_size=20, use_gpu=False, verbose=False, seed=0).fit(method.train_set)
    scores = model.score(0)
    assert scores.shape == (len(known),) and np.isfinite(scores).all() and scores.std() > 0


def test_cornac_gets_a_row_of_every_item_and_refuses_to_leave_one_out(holed: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--missing skip with cornac"):
        run(holed, "cornac", tmp_path / "out", missing="skip")
    record = run(holed, "cornac", tmp_path / "out")
    features, ids = np.load(tmp_path / "out" / "features.npy"), ids_of(tmp_path / "out")
    assert ids == ITEMS
    fused = TEXT + IMAGE
    fused[[row(item) for item in PICTURELESS]] = TEXT[[row(item) for item in PICTURELESS]]
    np.testing.assert_allclose(features[row(FAILED)], mean_without(fused, FAILED), rtol=1e-6)
    np.testing.assert_array_equal(np.delete(features, row(FAILED), 0), np.delete(fused, row(FAILED), 0))
    assert listed(tmp_path / "out") == [(FAILED, "fused", "mean vector")]
    assert (record["mean_vector"], record["left_out"]) == ({"fused": 1}, 0)


# --- RecBole ----------------------------------------------------------------------------------------------------
def test_recbole_preloads_the_vector_of_each_of_its_items(holed: Path, tmp_path: Path) -> None:
    compat.require_recbole()
    from recbole.data import create_dataset

    plain = [item for item in ITEMS if not set(item) & set('\t\n"')]  # RecBole's own .inter cannot hold the others
    sequences = [[item for item in items if item in plain] for items in SEQUENCES]
    write_atomic(tmp_path / "dataset", "mine", sequences, [f"u{user}" for user in range(len(sequences))])
    run(holed, "recbole", tmp_path / "out", columns=("image",), name="mine")
    (tmp_path / "out" / "mine.itememb").rename(tmp_path / "dataset" / "mine" / "mine.itememb")
    settings = yaml.safe_load((tmp_path / "out" / "recbole.yaml").read_text())
    settings |= {"data_path": str(tmp_path / "dataset"), "dataset": "mine", "model": "SASRec"}
    with compat.cured(tmp_path):
        config = recbole_config_of([settings], settings, None, tmp_path, "cpu")
        dataset = create_dataset(config)
    matrix = dataset.get_preload_weight("vector_of")
    tokens = dataset.field2id_token["item_id"]
    held = [item for item in tokens[1:] if item in plain]
    assert matrix.shape == (len(tokens), DIM) and not matrix[0].any() and len(held) > 5
    mean = mean_without(IMAGE, *PICTURELESS, FAILED)
    for item in held:
        wanted = mean if item in {*PICTURELESS, FAILED} else IMAGE[row(item)]
        np.testing.assert_allclose(matrix[dataset.token2id("item_id", item)], wanted, rtol=1e-6)


def test_ids_that_recbole_reads_as_missing_are_left_out_and_named(whole: Path, tmp_path: Path) -> None:
    run(whole, "recbole", tmp_path / "out", name="mine")
    lost = ["NA", "null", "None", "nan", ""]
    assert sorted(item for item, _, _ in listed(tmp_path / "out")) == sorted(lost)
    read = pd.read_csv(tmp_path / "out" / "mine.itememb", sep="\t", dtype=str)  # as RecBole does
    assert read["vector_of:token"].notna().all()
    assert set(read["vector_of:token"]) == {*ITEMS, "stranger"} - set(lost)
    numbers = np.array([text.split() for text in read["item_vector:float_seq"]], np.float32)
    (place,) = np.flatnonzero(read["vector_of:token"] == 'q"uote')
    np.testing.assert_array_equal(numbers[place], (TEXT + IMAGE)[row('q"uote')])  # to the last bit


def test_the_list_of_ids_that_look_missing_is_that_of_pandas() -> None:
    from pandas._libs.parsers import STR_NA_VALUES

    assert set(formats._NOT_AVAILABLE) == set(STR_NA_VALUES)


# --- matrices ---------------------------------------------------------------------------------------------------
def test_npy_holds_one_matrix_a_view_of_the_items_that_have_all_of_them(holed: Path, tmp_path: Path) -> None:
    record = run(holed, "npy", tmp_path / "out")
    ids = ids_of(tmp_path / "out")
    assert ids == [item for item in ITEMS if item not in {*PICTURELESS, FAILED}]
    for view, vectors in {"text": TEXT, "image": IMAGE, "fused": TEXT + IMAGE}.items():
        np.testing.assert_array_equal(np.load(tmp_path / "out" / f"{view}.npy"), vectors[[row(item) for item in ids]])
    assert record["left_out"] == 3
    assert set(listed(tmp_path / "out")) == {
        *((item, "image", "left out") for item in PICTURELESS),
        *((FAILED, view, "left out") for view in schema.VIEWS),
    }


def test_npy_comes_back_through_import_as_the_table_it_was(whole: Path, data: Path, tmp_path: Path) -> None:
    run(whole, "npy", tmp_path / "out", columns=("fused",))
    settings: dict[str, Any] = {"data": data, "file": tmp_path / "out" / "fused.npy"}
    import_vectors.run(ImportVectorsConfig(**settings, ids=tmp_path / "out" / "item_ids.json", out=tmp_path / "emb"))
    assert verify(tmp_path / "emb") == []
    selection = formats.select(tmp_path / "emb", ["fused"], "error")
    ids, views = next(selection.batches())
    assert ids == ITEMS
    np.testing.assert_array_equal(views["fused"], TEXT + IMAGE)


def test_safetensors_holds_a_tensor_of_each_view(holed: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    run(holed, "safetensors", tmp_path / "out", columns=("text", "image"), missing="mean")
    tensors = load_file(tmp_path / "out" / "vectors.safetensors")
    assert set(tensors) == {"text", "image"} and ids_of(tmp_path / "out") == ITEMS
    np.testing.assert_array_equal(np.delete(tensors["text"], row(FAILED), 0), np.delete(TEXT, row(FAILED), 0))
    lacking = [row(item) for item in (*PICTURELESS, FAILED)]
    mean = mean_without(IMAGE, *PICTURELESS, FAILED)
    np.testing.assert_allclose(tensors["image"][lacking], [mean] * 3, rtol=1e-6)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "convert.json",
        "item_ids.json",
        "missing.csv",
        "vectors.safetensors",
    ]


def test_lance_finds_the_nearest_item(whole: Path, tmp_path: Path) -> None:
    import lance

    run(whole, "lance", tmp_path / "out")
    dataset = lance.dataset(str(tmp_path / "out" / "items.lance"))
    assert dataset.count_rows() == len(ITEMS) + 1
    found = dataset.to_table(nearest={"column": "image", "q": IMAGE[row("ünï")], "k": 1}, columns=["item_id", "text"])
    assert found["item_id"].to_pylist() == ["ünï"]
    np.testing.assert_array_equal(np.float32(found["text"].to_pylist()[0]), TEXT[row("ünï")])


def test_without_pylance_lance_says_what_to_install(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'vlm2rec\[lance\]'"):
        run(whole, "lance", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- MMRec, by its own rules ------------------------------------------------------------------------------------
@pytest.mark.parametrize("table", ["whole", "holed"])
def test_mmrec_finds_the_vectors_of_item_i_in_row_i(table: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    holes = {*PICTURELESS, FAILED} if table == "holed" else set()
    run(request.getfixturevalue(table), "mmrec", tmp_path / "toys")
    _, features, users, items = load_as_mmrec(tmp_path / "toys", "toys")
    mapping = pd.read_csv(tmp_path / "toys" / "i_id_mapping.csv", sep="\t", keep_default_na=False, dtype=str)
    number = dict(zip(mapping["asin"], mapping["itemID"].astype(int), strict=True))
    assert sorted(number.values()) == list(range(items)) and set(number) == set(ITEMS) - {UNTOUCHED}
    assert users == len(SEQUENCES)
    for view, vectors, lacking in (("vision", IMAGE, holes), ("text", TEXT, holes & {FAILED})):
        matrix = features[view]
        assert (matrix.shape, matrix.dtype) == ((items, DIM), np.float32) and np.isfinite(matrix).all()
        mean = mean_without(vectors, UNTOUCHED, *lacking)
        for item, place in number.items():
            np.testing.assert_allclose(matrix[place], mean if item in lacking else vectors[row(item)], rtol=1e-5)
        # what FREEDOM and LATTICE do first: cosines between all rows, without a guard against length 0
        unit = matrix / np.linalg.norm(matrix, axis=-1, keepdims=True)
        assert np.isfinite(unit @ unit.T).all()


def test_mmrecs_interactions_are_the_datasets_split(whole: Path, tmp_path: Path) -> None:
    run(whole, "mmrec", tmp_path / "toys")
    frame, _, _, _ = load_as_mmrec(tmp_path / "toys", "toys")
    names = pd.read_csv(tmp_path / "toys" / "i_id_mapping.csv", sep="\t", keep_default_na=False, dtype=str)["asin"]
    users = pd.read_csv(tmp_path / "toys" / "u_id_mapping.csv", sep="\t", dtype=str)
    assert users["user_id"].tolist() == [f"u{user}" for user in range(30)] and list(users) == ["user_id", "userID"]
    for user, sequence in enumerate(SEQUENCES):
        mine = frame[frame["userID"] == user]
        assert [names[item] for item in mine["itemID"]] == sequence
        assert mine["x_label"].tolist() == [0] * (len(sequence) - 2) + [1, 2]
    header = (tmp_path / "toys" / "toys.inter").read_text().splitlines()[0]
    assert header == "userID\titemID\trating\ttimestamp\tx_label"
    assert listed(tmp_path / "toys") == [(UNTOUCHED, "", "left out")]


def test_mmrec_counts_an_item_the_export_does_not_know_and_a_zero_vector_as_missing(data: Path, tmp_path: Path) -> None:
    text = TEXT.copy()
    text[row("i0")] = 0
    keep = [item != "i2" for item in ITEMS]
    ids = [item for item in ITEMS if item != "i2"]
    write_embeddings(tmp_path / "emb", ids, text[keep], text=text[keep], data=str(data))
    record = run(tmp_path / "emb", "mmrec", tmp_path / "toys")
    assert set(listed(tmp_path / "toys")) == {
        ("i0", "text", "mean vector"),
        ("i2", "text", "mean vector"),
        (UNTOUCHED, "", "left out"),
    }
    assert record["columns"] == ["text"] and not (tmp_path / "toys" / "image_feat.npy").exists()
    with pytest.raises(DataError, match="2 items lack a vector, the first is 'i0'"):
        run(tmp_path / "emb", "mmrec", tmp_path / "strict", missing="error")
    assert not (tmp_path / "strict").exists()


def test_mmrec_refuses_a_mean_of_zero_for_a_missing_vector(data: Path, tmp_path: Path) -> None:
    vectors = np.tile(np.float32([[1.0], [-1.0]]), (len(ITEMS) // 2, DIM))
    vectors[[row("i0"), row("i1")]] = np.nan  # one of each sign
    vectors[row(UNTOUCHED)] = 5  # left out, so it does not count
    vectors[row("i2")] = 0
    write_embeddings(tmp_path / "emb", ITEMS, vectors, text=vectors, data=str(data))
    with pytest.raises(DataError, match="the mean of the text vectors is zero, and 3 items have none"):
        run(tmp_path / "emb", "mmrec", tmp_path / "toys")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"columns": ("text", "fused")}, "--columns text,fused with mmrec, which takes two kinds of vectors"),
        ({"missing": "skip"}, "--missing skip with mmrec"),
        ({"name": "../up"}, "the dataset's name is '../up'"),
    ],
)
def test_mmrec_refuses_what_it_has_no_place_for(
    settings: dict[str, Any], message: str, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(whole, "mmrec", tmp_path / "toys", **settings)
    assert list(tmp_path.iterdir()) == []


def test_mmrec_takes_one_joint_vector_an_item_in_the_place_of_the_text_features(
    whole: Path, data: Path, tmp_path: Path
) -> None:
    run(whole, "mmrec", tmp_path / "chosen", columns=("fused",), name="toys")
    write_embeddings(tmp_path / "emb", ITEMS, TEXT + IMAGE, data=str(data))  # there is nothing else
    run(tmp_path / "emb", "mmrec", tmp_path / "alone", name="toys")
    kept = [number for number, item in enumerate(ITEMS) if item != UNTOUCHED]
    for folder in (tmp_path / "chosen", tmp_path / "alone"):
        _, features, _, items = load_as_mmrec(folder, "toys")
        assert list(features) == ["text"] and features["text"].shape == (items, DIM)
        np.testing.assert_array_equal(features["text"], (TEXT + IMAGE)[kept])


def test_mmrec_takes_the_dataset_of_the_export_or_the_one_it_is_given(whole: Path, data: Path, tmp_path: Path) -> None:
    write_embeddings(tmp_path / "emb", ITEMS, TEXT, text=TEXT)  # of an export that names no dataset
    with pytest.raises(ArtifactError, match="does not say which dataset"):
        run(tmp_path / "emb", "mmrec", tmp_path / "toys")
    run(tmp_path / "emb", "mmrec", tmp_path / "toys", data=data)
    assert (tmp_path / "toys" / "toys.inter").is_file()


# --- the folder -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("to", ["npy", "mmrec", "safetensors", "cornac"])
def test_vectors_of_length_one_are_a_choice_of_every_format(to: str, holed: Path, data: Path, tmp_path: Path) -> None:
    more = {"data": data} if to == "mmrec" else {}
    raw = run(holed, to, tmp_path / "raw", missing="mean", **more)
    unit = run(holed, to, tmp_path / "unit", missing="mean", normalize=True, **more)
    assert unit["normalize"] is True and "normalize" not in raw

    def matrices(folder: Path) -> dict[str, np.ndarray]:
        if to == "safetensors":
            return safetensors.numpy.load_file(folder / "vectors.safetensors")
        return {path.name: np.load(path) for path in folder.glob("*.npy")}

    found, expected = matrices(tmp_path / "unit"), matrices(tmp_path / "raw")
    assert found.keys() == expected.keys() and found
    for name, vectors in expected.items():
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        np.testing.assert_allclose(found[name], vectors / np.where(lengths > 0, lengths, 1), rtol=1e-5)


def test_a_model_has_no_vectors_to_normalize(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--normalize with --to sentence-transformers"):
        run(whole, "sentence-transformers", tmp_path / "out", normalize=True)


def test_a_second_conversion_takes_the_place_of_the_first(whole: Path, holed: Path, tmp_path: Path) -> None:
    run(holed, "npy", tmp_path / "out")
    record = run(whole, "npy", tmp_path / "out", columns=("text",))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["convert.json", "item_ids.json", "text.npy"]
    assert json.loads((tmp_path / "out" / "convert.json").read_text()) == record
    assert record["fingerprint"] == schema.read_manifest(whole)["fingerprint"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_but_a_conversion_to_the_same_form_is_replaced(whole: Path, tmp_path: Path) -> None:
    run(whole, "npy", tmp_path / "out", columns=("text",))
    with pytest.raises(ConfigError, match=r"not an earlier conversion to cornac .*: it holds convert\.json"):
        run(whole, "cornac", tmp_path / "out")
    (tmp_path / "out" / "mm_adj_freedomdsp_10_1.pt").touch()
    with pytest.raises(ConfigError, match=r"holds mm_adj_freedomdsp_10_1\.pt"):
        run(whole, "npy", tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        run(whole, "npy", tmp_path / "file")
    assert (tmp_path / "out" / "text.npy").is_file()


@pytest.mark.parametrize("to", ["npy", "mmrec", "safetensors", "recbole", "lance"])
def test_a_full_disk_leaves_the_earlier_conversion_and_nothing_beside_it(to: str, data: Path, tmp_path: Path) -> None:
    wide = np.random.default_rng(0).normal(size=(len(ITEMS), 2048)).astype(np.float32)
    write_embeddings(tmp_path / "emb", ITEMS, wide, text=wide, data=str(data))
    out = tmp_path / "made" / "out"
    arguments = ["convert", tmp_path / "emb", "--to", to, "--out", out, "--columns", "text"]
    # files of at most 100 kB, as a disk that fills up would have them
    code = (
        "import resource, sys\n"
        "from vlm2rec.pipelines import cli\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)\ncli.main()"
    )

    first = Forked(code, 10**8, *arguments)
    said = first.communicate()[1]
    assert first.returncode == 0, said
    before = (out / "convert.json").read_text()
    ran = Forked(code, 100_000, *arguments)
    said = ran.communicate()[1]
    assert ran.returncode == 5 and "cannot be written" in said, said
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "convert.json").read_text() == before


@pytest.mark.parametrize("to", ["npy", "cornac", "safetensors", "recbole", "lance"])
def test_missing_error_names_the_first_item_without_a_vector(to: str, holed: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 items lack a vector, the first is 'a b': text, unreadable image"):
        run(holed, to, tmp_path / "out", columns=("text",), missing="error")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("to", "columns", "error"),
    [("npy", ("image",), ConfigError), ("cornac", ("text", "fused"), ConfigError), ("mmrec", ("text",), ConfigError)],
)
def test_views_that_are_not_there_or_have_no_place_are_refused(
    to: str, columns: tuple[str, ...], error: type[Vlm2RecError], tmp_path: Path
) -> None:
    write_embeddings(tmp_path / "emb", ITEMS, TEXT, text=TEXT if to == "cornac" else None)
    with pytest.raises(error):
        run(tmp_path / "emb", to, tmp_path / "out", columns=columns)


def test_an_unfinished_embeddings_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "emb").mkdir()
    with pytest.raises(ArtifactError, match=r"_manifest.json does not exist"):
        run(tmp_path / "emb", "npy", tmp_path / "out")


def test_the_command_says_what_is_missing_and_how_to_read_the_rest(
    holed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["convert", str(holed), "--to", "cornac", "--columns", "image", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["vlm2rec", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert not ended.value.code
    assert "3 image, listed in missing.csv" in said and "ImageModality(features=np.load(" in said


# --- MMRec's published splits and masked targets ------------------------------------------------------------------
@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A split as MMRec's preprocessing writes it: its own order of items, eight users, of whom three buy again."""
    folder = tmp_path / "baby"
    folder.mkdir()
    order = [item for item in reversed(ITEMS) if item != UNTOUCHED]
    pd.DataFrame({"asin": order, "itemID": range(len(order))}).sample(frac=1, random_state=1).to_csv(
        folder / "i_id_mapping.csv", sep="\t", index=False
    )
    pd.DataFrame({"user_id": [f"A{u}" for u in range(8)], "userID": range(8)}).to_csv(
        folder / "u_id_mapping.csv", sep="\t", index=False
    )
    rows = [(u, (u + k) % len(order), 5.0, 100 + k, 0) for u in range(8) for k in range(12)]
    rows += [(u, u if u < 2 else (u + 12) % len(order), 5.0, 200, 1) for u in range(8)]
    rows += [(u, 3 if u == 2 else (u + 13) % len(order), 5.0, 300, 2) for u in range(8)]
    columns = ["userID", "itemID", "rating", "timestamp", "x_label"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "baby.inter", sep="\t", index=False)
    (folder / "image_adj_10.pt").write_bytes(b"of other vectors")
    return folder


def test_mmrec_takes_the_order_of_a_published_split(whole: Path, published: Path, tmp_path: Path) -> None:
    record = run(whole, "mmrec", tmp_path / "ours", like=published)
    frame, features, users, items = load_as_mmrec(tmp_path / "ours", "ours")
    mapping = pd.read_csv(published / "i_id_mapping.csv", sep="\t", keep_default_na=False, dtype=str)
    assert (users, items) == (8, len(ITEMS) - 1) and len(features["text"]) == items
    for item, number in zip(mapping["asin"], mapping["itemID"].astype(int), strict=True):
        np.testing.assert_array_equal(features["text"][number], TEXT[row(item)])
        np.testing.assert_array_equal(features["vision"][number], IMAGE[row(item)])
    theirs = pd.read_csv(published / "baby.inter", sep="\t")
    assert frame.equals(theirs[["userID", "itemID", "x_label"]])
    assert (tmp_path / "ours" / "i_id_mapping.csv").read_bytes() == (published / "i_id_mapping.csv").read_bytes()
    assert {gap[0] for gap in listed(tmp_path / "ours")} == {UNTOUCHED, "stranger"}
    assert record["like"] == str(published) and not list((tmp_path / "ours").glob("*.pt"))


@pytest.mark.parametrize("repeats", [None, "keep", "drop"])
def test_targets_that_mmrec_masks_are_counted_named_and_dropped_by_choice(
    whole: Path, published: Path, tmp_path: Path, repeats: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run(whole, "mmrec", tmp_path / "ours", like=published, repeats=repeats)
    names = dict(enumerate(item for item in reversed(ITEMS) if item != UNTOUCHED))
    frame = pd.read_csv(tmp_path / "ours" / "repeats.csv", keep_default_na=False, dtype=str)
    assert [tuple(found) for found in frame.itertuples(index=False)] == [
        *(("A0", names[0], "valid"), ("A1", names[1], "valid"), ("A2", names[3], "test"))
    ]
    assert "3 targets are in their user's training" in " ".join(capsys.readouterr().err.split())
    inter = load_as_mmrec(tmp_path / "ours", "ours")[0]
    assert len(inter) == 8 * 14 - (3 if repeats == "drop" else 0)
    train = inter[inter["x_label"] == 0].merge(inter[inter["x_label"] > 0], on=["userID", "itemID"])
    assert len(train.drop_duplicates(["userID", "itemID"])) == (0 if repeats == "drop" else 3)


@pytest.mark.parametrize("repeats", ["keep", "drop"])
def test_repeat_purchases_of_a_dataset_are_found_too(tmp_path: Path, repeats: Any) -> None:
    sequences = [["a", "b", "c", "a"], ["b", "c", "b", "a"], ["c", "a", "b", "d"], ["d", "c", "d", "d"]]
    data = write_dataset(tmp_path / "data", sequences, [*"abcdxyz"], candidates=2)
    write_embeddings(tmp_path / "emb", [*"abcd"], TEXT[:4], text=TEXT[:4], data=str(data))
    run(tmp_path / "emb", "mmrec", tmp_path / "ours", repeats=repeats)
    frame = pd.read_csv(tmp_path / "ours" / "repeats.csv", dtype=str)
    expected = [("u0", "a", "test"), ("u1", "b", "valid"), ("u3", "d", "valid"), ("u3", "d", "test")]
    assert [tuple(found) for found in frame.itertuples(index=False)] == expected
    inter = load_as_mmrec(tmp_path / "ours", "ours")[0]
    assert len(inter) == 16 - (4 if repeats == "drop" else 0)


def test_a_split_where_every_target_is_masked_cannot_drop_them(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", [["a", "b", "b", "a"], ["b", "a", "b", "a"]], [*"abxy"], candidates=2)
    write_embeddings(tmp_path / "emb", ["a", "b"], TEXT[:2], text=TEXT[:2], data=str(data))
    with pytest.raises(DataError, match=r"no valid target left .*--repeats keep"):
        run(tmp_path / "emb", "mmrec", tmp_path / "ours", repeats="drop")
    assert not (tmp_path / "ours").exists()


def edited(file: Path, before: str, after: str) -> None:
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after, 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edited(f / "i_id_mapping.csv", "\t3\n", "\t4\n"), "gives .* the itemID '4', which .* has already"),
        (lambda f: edited(f / "i_id_mapping.csv", "\t3\n", "\t99\n"), "gives .* the itemID '99'"),
        (lambda f: edited(f / "i_id_mapping.csv", "\t3\n", "\tx\n"), "gives .* the itemID 'x'"),
        (lambda f: edited(f / "i_id_mapping.csv", "itemID", "number"), "has the columns asin, number"),
        (lambda f: (f / "i_id_mapping.csv").write_text("asin,itemID\na,0\n"), "has not 2 fields"),
        (lambda f: (f / "i_id_mapping.csv").write_bytes(b"asin\titemID\n\xff\xfe\t0\n"), "cannot be read"),
        (lambda f: (f / "i_id_mapping.csv").unlink(), "cannot be read"),
        (lambda f: edited(f / "i_id_mapping.csv", "i0\t", "i1\t"), "has 'i1' twice"),
        (lambda f: (f / "baby.inter").unlink(), "has 0 .inter files"),
        (lambda f: (f / "more.inter").write_text(""), "has 2 .inter files"),
        (lambda f: edited(f / "baby.inter", "0\t1\t5.0", "0\t77\t5.0"), "has itemID '77'"),
        (lambda f: edited(f / "baby.inter", "x_label", "label"), "has no column x_label"),
    ],
)
def test_a_published_split_that_does_not_hold_together_is_refused(
    whole: Path, published: Path, tmp_path: Path, damage: Any, message: str
) -> None:
    damage(published)
    with pytest.raises(DataError, match=message):
        run(whole, "mmrec", tmp_path / "ours", like=published)
    assert not (tmp_path / "ours").exists()


def test_a_split_of_another_catalogue_is_refused_and_one_of_more_items_gets_mean_vectors(
    whole: Path, published: Path, data: Path, tmp_path: Path
) -> None:
    edited(published / "i_id_mapping.csv", "i0\t", "not-ours\t")
    run(whole, "mmrec", tmp_path / "ours", like=published)
    assert ("not-ours", "text", "mean vector") in listed(tmp_path / "ours")
    with pytest.raises(DataError, match="the first is 'not-ours'"):
        run(whole, "mmrec", tmp_path / "strict", like=published, missing="error")
    items = pd.read_csv(published / "i_id_mapping.csv", sep="\t", keep_default_na=False, dtype=str)
    items["asin"] = "B" + items["asin"]
    items.to_csv(published / "i_id_mapping.csv", sep="\t", index=False)
    with pytest.raises(DataError, match=r"19 of 19 items of .* are not in"):
        run(whole, "mmrec", tmp_path / "others", like=published)
    with pytest.raises(ConfigError, match="--like with --data"):
        run(whole, "mmrec", tmp_path / "others", like=published, data=data)
    with pytest.raises(ConfigError, match="--like with --to npy"):
        run(whole, "npy", tmp_path / "others", like=published)


def test_the_instruction_is_complete_and_item_graphs_of_former_vectors_go(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(whole, "mmrec", tmp_path / "toys")
    told = " ".join(capsys.readouterr().err.split())
    for part in ("cd src", "hyper_parameters", "FREEDOM.yaml", "SLMRec needs", "data/toys/*_adj_*.pt"):
        assert part in told
    graphs = ["mm_adj_freedomdsp_10_1.pt", "image_adj_10.pt"]
    for name in graphs:
        (tmp_path / "toys" / name).write_bytes(b"kept by MMRec")
    run(whole, "mmrec", tmp_path / "toys")
    assert "removed" in capsys.readouterr().err and not any((tmp_path / "toys" / name).exists() for name in graphs)
    (tmp_path / "toys" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds notes\.txt"):
        run(whole, "mmrec", tmp_path / "toys")
