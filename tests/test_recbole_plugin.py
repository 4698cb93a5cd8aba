"""The flag: RecBole's row i holds the vector of the item RecBole calls i, in every model and for any id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from embedding_folder import write_embeddings
from recommender_world import ODD_IDS, circle_vectors, cyclic_sequences, write_atomic, write_dataset

from vlm2rec.downstream import recommender
from vlm2rec.downstream.multimodal.recipes import VECTORS_ONLY
from vlm2rec.downstream.recbole import compat, plugin, run
from vlm2rec.downstream.recbole.item_embedding import FusedEmbedding, ItemEmbedding, standardise
from vlm2rec.downstream.recbole.plugin import EmbeddingStart, aligned_vectors, read_flag
from vlm2rec.downstream.table import EmbeddingTable
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError

ITEMS = [*ODD_IDS, *(f"i{number}" for number in range(20 - len(ODD_IDS)))]
SEQUENCES = cyclic_sequences(ITEMS, 30)
TINY: dict[str, Any] = {
    "hidden_size": 16,
    "embedding_size": 16,
    "inner_size": 16,
    "n_heads": 1,
    "n_layers": 1,
    "epochs": 1,
    "train_batch_size": 64,
    "MAX_ITEM_LIST_LENGTH": 5,
    "seed": 3,
}
MODELS = pytest.mark.parametrize("model", schema.SEQUENTIAL)
Built = tuple[Any, Any, Any]  # model, RecBole's config, RecBole's dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset(write_dataset(tmp_path_factory.mktemp("world") / "data", SEQUENCES, ITEMS))


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return circle_vectors(len(ITEMS))


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory, vectors: np.ndarray) -> Path:
    """A table in another order than the dataset's, with two items the dataset does not know."""
    folder = tmp_path_factory.mktemp("world") / "embeddings"
    order = np.random.default_rng(5).permutation(len(ITEMS) + 2)
    ids = [*ITEMS, "stranger", "I0"]
    every = np.concatenate([vectors, np.full((2, vectors.shape[1]), 99, np.float32)])
    write_embeddings(folder, [ids[i] for i in order], every[order], text=-every[order], shard_size=7)
    return folder


def build(settings: dict[str, Any], data: Dataset | None, out: Path) -> Built:
    """Build RecBole's config, dataset and model as a run does, without training."""
    from recbole.data import data_preparation
    from recbole.utils import get_model, init_seed

    with compat.cured(out):
        config = run.recbole_config_of([settings], settings, data, out, "cpu")
        init_seed(config["seed"], config["reproducibility"])
        dataset = run._dataset(config, data)
        train_data, _, _ = data_preparation(config, dataset)
        plugin.install()
        init_seed(config["seed"], config["reproducibility"])
        model = get_model(config["model"])(config, train_data._dataset)
    return model, config, dataset


def row_of(dataset: Any, item: str) -> int:
    """RecBole's own answer to: which row is this item?"""
    return int(dataset.token2id(dataset.iid_field, item))


def test_what_a_study_keeps_from_rows_of_ids_are_the_settings_of_the_flag() -> None:
    settings = {key.removeprefix("item_embedding_") for key in plugin.KEYS}
    assert set(VECTORS_ONLY) == settings - {"init", "trainable"}


# --- which vector in which row ------------------------------------------------------------------------------
@MODELS
def test_row_i_holds_the_vector_of_the_item_recbole_calls_i(
    model: str, data: Dataset, embeddings: Path, vectors: np.ndarray, tmp_path: Path
) -> None:
    flag = {"model": model, "item_embedding_init": str(embeddings)}
    built, _, dataset = build(TINY | flag, data, tmp_path)
    table = built.item_embedding
    expected = standardise(torch.from_numpy(vectors))  # row j: item j of ITEMS
    assert isinstance(table, ItemEmbedding)
    assert dataset.item_num == len(ITEMS) + 1
    for place, item in enumerate(ITEMS):
        row = row_of(dataset, item)
        assert torch.allclose(table.vectors[row], expected[place], atol=1e-5), item
        adapted = expected[place] @ table.linear.weight.T
        assert torch.allclose(table(torch.tensor([row]))[0], adapted, atol=1e-6), item
    assert not table.weight[0].any()


@MODELS
def test_with_trainable_the_same_rows_start_an_ordinary_table(
    model: str, data: Dataset, embeddings: Path, vectors: np.ndarray, tmp_path: Path
) -> None:
    settings = TINY | {"model": model, "item_embedding_init": str(embeddings)}
    frozen, _, _ = build(settings, data, tmp_path / "a")
    trained, _, _ = build(settings | {"item_embedding_trainable": True}, data, tmp_path / "b")
    assert type(trained.item_embedding) is torch.nn.Embedding
    assert trained.item_embedding.weight.requires_grad
    assert torch.allclose(trained.item_embedding.weight, frozen.item_embedding.weight, atol=1e-7)
    assert not trained.item_embedding.weight[0].any()


def test_the_former_line_names_the_mode() -> None:
    assert [read_flag({"item_embedding_init": "e", "item_embedding_trainable": value}) for value in (True, False)] == [
        EmbeddingStart(Path("e"), mode="table"),
        EmbeddingStart(Path("e")),
    ]


@MODELS
@pytest.mark.parametrize("fuse", ["sum", "gate"])
def test_a_fused_row_is_the_adapted_vector_and_the_ids_own_row(
    model: str, fuse: str, data: Dataset, embeddings: Path, tmp_path: Path
) -> None:
    flag = {"model": model, "item_embedding_init": str(embeddings), "item_embedding_mode": "fuse"}
    built, _, dataset = build(TINY | flag | {"item_embedding_fuse": fuse}, data, tmp_path)
    table = built.item_embedding
    assert isinstance(table, FusedEmbedding)
    learned = {dataset.token2id(dataset.iid_field, data.item_ids[row]) for s in data.train_sequences() for row in s}
    assert table.known.nonzero().flatten().tolist() == sorted(learned)
    table.known[1] = False  # as of an item that only the test knows
    for mode in (True, False):
        table.train(mode).id_dropout = 0.0
        with torch.no_grad():
            adapted = table.linear(table.vectors[1:])
            gate = 1.0 if table.gate is None else torch.sigmoid(table.gate(adapted))
            expected = adapted + gate * table.ids[1:] * table.known[1:, None]
            torch.testing.assert_close(table.weight[1 : len(expected) + 1], expected)
            rows = torch.tensor([[1, 3], [0, 2]])
            torch.testing.assert_close(table(rows), table.weight[rows])
    assert torch.equal(table.weight[1], adapted[0]) and not table.weight[0].any()
    assert float(table.ids.detach().std()) == pytest.approx(float(adapted.std()), rel=0.5)


def test_training_leaves_out_id_rows_and_evaluation_does_not(data: Dataset, embeddings: Path, tmp_path: Path) -> None:
    flag = {"item_embedding_init": str(embeddings), "item_embedding_mode": "fuse", "item_embedding_id_dropout": 0.5}
    built, _, _ = build(TINY | {"model": "SASRec"} | flag, data, tmp_path)
    table = built.item_embedding.train()
    with torch.no_grad():
        adapted = table.linear(table.vectors[1:])
        drawn = [table.weight[1:] for _ in range(200)]
        left_out = torch.stack([(rows == adapted).all(1) for rows in drawn]).float().mean(0)
        assert (left_out[table.known[1:]] - 0.5).abs().max() < 0.2
        assert not (table.eval().weight[1:][table.known[1:]] == adapted[table.known[1:]]).all(1).any()


@MODELS
def test_with_init_the_vectors_are_trained_and_kept(
    model: str, data: Dataset, embeddings: Path, tmp_path: Path
) -> None:
    flag = TINY | {"model": model, "item_embedding_init": str(embeddings)}
    frozen, _, _ = build(flag, data, tmp_path / "a")
    built, _, _ = build(flag | {"item_embedding_mode": "init"}, data, tmp_path / "b")
    assert torch.equal(built.item_embedding.weight, frozen.item_embedding.weight)
    assert dict(built.named_parameters())["item_embedding.vectors"].requires_grad
    assert "item_embedding.vectors" in built.state_dict() and "item_embedding.vectors" not in frozen.state_dict()


@pytest.mark.parametrize("mode", ["fuse", "init"])
@pytest.mark.parametrize("positions", ["last", "all"])
def test_a_run_in_this_mode_learns_and_says_so(
    mode: str, positions: str, data: Dataset, embeddings: Path, tmp_path: Path
) -> None:
    settings = TINY | {"model": "SASRec", "item_embedding_init": str(embeddings), "item_embedding_mode": mode}
    found = run.run(settings | {"train_positions": positions, "epochs": 3}, tmp_path, data=data, device="cpu")
    assert found.metrics["mode"] == mode and found.metrics["fuse"] == ("sum" if mode == "fuse" else None)
    losses = [row["loss"] for row in found.metrics["curve"]]
    assert losses[-1] < losses[0]


def test_bert4recs_mask_row_is_recboles_own_and_trained(data: Dataset, embeddings: Path, tmp_path: Path) -> None:
    stock, _, _ = build(TINY | {"model": "BERT4Rec"}, data, tmp_path / "a")
    flagged, _, _ = build(TINY | {"model": "BERT4Rec", "item_embedding_init": str(embeddings)}, data, tmp_path / "b")
    mask = len(ITEMS) + 1
    assert flagged.mask_token == mask
    assert flagged.item_embedding.weight.shape[0] == mask + 1
    assert torch.equal(flagged.item_embedding.weight[mask], stock.item_embedding.weight[mask])
    assert flagged.item_embedding.weight[mask].any()
    assert dict(flagged.named_parameters())["item_embedding.extra"].requires_grad


def test_a_table_in_another_order_starts_the_same_model(
    data: Dataset, embeddings: Path, vectors: np.ndarray, tmp_path: Path
) -> None:
    write_embeddings(tmp_path / "ordered", ITEMS, vectors)
    shuffled, _, _ = build(TINY | {"model": "SASRec", "item_embedding_init": str(embeddings)}, data, tmp_path / "a")
    ordered, _, _ = build(
        TINY | {"model": "SASRec", "item_embedding_init": str(tmp_path / "ordered")}, data, tmp_path / "b"
    )
    assert torch.allclose(shuffled.item_embedding.weight, ordered.item_embedding.weight, atol=1e-6)


def test_the_column_chooses_the_view(data: Dataset, embeddings: Path, tmp_path: Path) -> None:
    settings = TINY | {"model": "SASRec", "item_embedding_init": str(embeddings)}
    fused, _, _ = build(settings, data, tmp_path / "a")
    text, _, _ = build(settings | {"item_embedding_column": "text"}, data, tmp_path / "b")
    assert torch.allclose(fused.item_embedding.vectors, -text.item_embedding.vectors, atol=1e-5)


def test_rows_hold_the_right_vectors_in_recboles_own_dataset_too(tmp_path: Path) -> None:
    ids = ["007", "7", "a b", "x", "1e5", "7.0", "0"]
    vectors = np.eye(7, dtype=np.float32)
    write_embeddings(tmp_path / "embeddings", ids[::-1], vectors[::-1])
    write_atomic(tmp_path, "small", cyclic_sequences(ids, 12, longest=7), [f"u{n}" for n in range(12)])
    settings = TINY | {
        "model": "GRU4Rec",
        "dataset": "small",
        "data_path": str(tmp_path),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "item_embedding_init": str(tmp_path / "embeddings"),
    }
    built, _, dataset = build(settings, None, tmp_path / "out")
    expected = standardise(torch.from_numpy(vectors))
    for place, item in enumerate(ids):
        row = row_of(dataset, item)
        assert torch.allclose(built.item_embedding.vectors[row], expected[place], atol=1e-5), item


def test_recboles_own_reader_still_drops_ids_that_look_missing(tmp_path: Path) -> None:
    """Why a dataset folder is handed over in memory and not as an atomic file."""
    ids = ["a", "b", "c", "NA", "null", "d", "e"]
    write_atomic(tmp_path, "small", [ids, ids[::-1], ids], ["u0", "u1", "u2"])
    settings = TINY | {
        "model": "SASRec",
        "dataset": "small",
        "data_path": str(tmp_path),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    }
    _, _, dataset = build(settings, None, tmp_path / "out")
    assert set(dataset.field2token_id["item_id"]) == {"[PAD]", "a", "b", "c", "d", "e"}


# --- the three ways to read the table -----------------------------------------------------------------------
@MODELS
@pytest.mark.parametrize("start", ["id", "adapter", "table"])
def test_predict_and_full_sort_predict_agree(
    model: str, start: str, data: Dataset, embeddings: Path, tmp_path: Path
) -> None:
    from recbole.data.interaction import Interaction

    flag = (
        {} if start == "id" else {"item_embedding_init": str(embeddings), "item_embedding_trainable": start == "table"}
    )
    settings = TINY | {"model": model, "learning_rate": 0.01} | flag
    trained = run.run(settings, tmp_path, data=data, device="cpu").model
    lists = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8], [9, 0, 0, 0, 0]])
    rows = {"item_id_list": lists, "item_length": torch.tensor([3, 5, 1])}
    with torch.no_grad():
        every = trained.full_sort_predict(Interaction(rows))
        for item in range(1, len(ITEMS) + 1):
            one = trained.predict(Interaction(rows | {"item_id": torch.full((3,), item)}))
            assert torch.allclose(one, every[:, item], rtol=0, atol=2e-6)
    assert float(every.std()) > 1e-3


@MODELS
def test_loss_and_prediction_see_the_same_table(model: str, data: Dataset, embeddings: Path, tmp_path: Path) -> None:
    """One step on the loss changes the scores of a prediction, and the vectors stay as they were."""
    from recbole.data.interaction import Interaction
    from recbole.data.transform import construct_transform

    built, config, dataset = build(TINY | {"model": model, "item_embedding_init": str(embeddings)}, data, tmp_path)
    lists = torch.tensor([[1, 2, 3, 4, 5], [4, 5, 6, 7, 8]] * 8)
    rows = Interaction(
        {"item_id_list": lists, "item_length": torch.full((16,), 5), "item_id": torch.tensor([6, 9] * 8)}
    )
    before = built.item_embedding.vectors.clone()
    built.eval()
    with torch.no_grad():
        old = built.full_sort_predict(rows)
    built.train()
    built.calculate_loss(construct_transform(config)(dataset, rows)).backward()
    gradient = built.item_embedding.linear.weight.grad
    assert gradient is not None and bool(gradient.any())
    with torch.no_grad():
        built.item_embedding.linear.weight -= 0.1 * gradient
    built.eval()
    with torch.no_grad():
        assert not torch.allclose(old, built.full_sort_predict(rows), atol=1e-6)
    assert torch.equal(before, built.item_embedding.vectors)


def test_a_table_checkpoint_loads_in_recbole_without_vlm2rec(data: Dataset, embeddings: Path, tmp_path: Path) -> None:
    settings = TINY | {"model": "SASRec"}
    flag = {"item_embedding_init": str(embeddings), "item_embedding_trainable": True}
    outcome = run.run(settings | flag, tmp_path / "flagged", data=data, device="cpu")
    stock, _, _ = build(settings, data, tmp_path / "stock")
    saved = recommender.load_weights(tmp_path / "flagged" / "checkpoint.safetensors", "cpu")
    assert stock.load_state_dict(saved).missing_keys == []
    assert torch.equal(stock.item_embedding.weight, outcome.model.item_embedding.weight)


def test_without_the_flag_a_wrapped_model_is_the_stock_model(data: Dataset, tmp_path: Path) -> None:
    from recbole.utils import get_model, init_seed

    wrapped, config, dataset = build(TINY | {"model": "SASRec"}, data, tmp_path)
    stock_class = get_model("SASRec")
    init_seed(config["seed"], config["reproducibility"])
    with compat.cured(tmp_path):
        stock = stock_class.__new__(stock_class)
        stock_class.__init__.__wrapped__(stock, config, dataset)
    assert type(wrapped) is stock_class
    assert all(torch.equal(a, b) for a, b in zip(wrapped.parameters(), stock.parameters(), strict=True))


def test_wrapping_twice_wraps_once() -> None:
    from recbole.utils import get_model

    plugin.install()
    first = get_model("GRU4Rec").__init__
    plugin.install()
    assert get_model("GRU4Rec").__init__ is first
    assert not hasattr(first.__wrapped__, "__wrapped__")


# --- items without a vector ---------------------------------------------------------------------------------
@pytest.fixture
def holed(tmp_path: Path) -> Path:
    """Four items, of which "c" has no vector in the column and "d" is not in the table."""
    vectors = np.array([[3, 10, 0], [5, 10, 0], [np.nan] * 3], np.float32)
    write_embeddings(tmp_path / "holed", ["a", "b", "c"], vectors)
    return tmp_path / "holed"


def test_fault_46_missing_items_are_refused_by_default(holed: Path) -> None:
    with pytest.raises(ArtifactError, match=r"2 of 4 items, among them 'c', 'd'.*--missing mean"):
        aligned_vectors(["a", "c", "d", "b"], EmbeddingStart(holed), seed=0)


def test_a_mean_fill_is_the_centre_and_counted(holed: Path) -> None:
    vectors, filled, _ = aligned_vectors(["a", "c", "d", "b"], EmbeddingStart(holed, missing="mean"), seed=0)
    assert filled == 2
    assert vectors.tolist() == [[0, 0, 0], [-1, 0, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]]


def test_a_random_fill_has_length_one_and_follows_the_seed(holed: Path) -> None:
    start = EmbeddingStart(holed, missing="random")
    vectors, filled, _ = aligned_vectors(["a", "c", "d", "b"], start, seed=0)
    again, _, _ = aligned_vectors(["a", "c", "d", "b"], start, seed=0)
    other, _, _ = aligned_vectors(["a", "c", "d", "b"], start, seed=1)
    assert filled == 2
    assert torch.allclose(vectors[2:4].norm(dim=1), torch.ones(2))
    assert torch.equal(vectors, again) and not torch.equal(vectors[2], other[2])
    assert not torch.equal(vectors[2], vectors[3])


def test_fault_46_a_table_of_another_dataset_is_refused(holed: Path) -> None:
    with pytest.raises(ArtifactError, match="has none of the dataset's items"):
        aligned_vectors(["x", "y"], EmbeddingStart(holed, missing="mean"), seed=0)


def test_a_collapsed_table_is_refused(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "flat", ["a", "b"], np.ones((2, 3), np.float32))
    with pytest.raises(ArtifactError, match="the same vector for every item"):
        aligned_vectors(["a", "b"], EmbeddingStart(tmp_path / "flat"), seed=0)


def test_infinite_vectors_are_refused(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "odd", ["a", "b"], np.array([[1, 2], [np.inf, 0]], np.float32))
    with pytest.raises(ArtifactError, match="not finite"):
        aligned_vectors(["a", "b"], EmbeddingStart(tmp_path / "odd"), seed=0)


# --- fewer dimensions ---------------------------------------------------------------------------------------
@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """Twenty items and a stranger far away, of which the dataset knows nothing."""
    vectors = np.random.default_rng(0).normal(size=(21, 6)).astype(np.float32)
    vectors[20] = 1000
    write_embeddings(tmp_path / "wide", [*(f"i{row}" for row in range(20)), "stranger"], vectors)
    return tmp_path / "wide"


def test_components_are_those_of_the_datasets_own_items_and_their_share_is_told(wide: Path) -> None:
    table, tokens = EmbeddingTable.open(wide), [f"i{row}" for row in range(20)]
    vectors, _, explained = aligned_vectors(tokens, EmbeddingStart(wide, pca=3), seed=0)
    known = table.vectors[:20].astype(np.float64)
    _, lengths, directions = np.linalg.svd(known - known.mean(0))
    expected = (known - known.mean(0)) @ directions[:3].T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(np.abs(vectors[1:].numpy()), np.abs(expected), atol=1e-4)
    assert explained == pytest.approx((lengths[:3] ** 2).sum() / (lengths**2).sum(), abs=1e-5)
    assert aligned_vectors(tokens, EmbeddingStart(wide), seed=0)[2] is None


def test_random_fills_have_the_length_of_the_reduced_vectors(wide: Path) -> None:
    start = EmbeddingStart(wide, missing="random", pca=2)
    vectors, filled, _ = aligned_vectors([f"i{row}" for row in range(22)], start, seed=0)
    assert (tuple(vectors.shape), filled) == ((23, 2), 2)
    assert torch.allclose(vectors[21:].norm(dim=1), torch.ones(2))


def test_more_components_than_there_are_is_refused(wide: Path) -> None:
    with pytest.raises(ConfigError, match="at most 6"):
        aligned_vectors([f"i{row}" for row in range(20)], EmbeddingStart(wide, pca=7), 0)


@MODELS
@pytest.mark.parametrize("adapter", ["two-linear", "mlp"])
def test_every_model_trains_through_two_layers_over_components(
    model: str, adapter: str, data: Dataset, embeddings: Path, tmp_path: Path
) -> None:
    flag = {"item_embedding_init": str(embeddings), "item_embedding_adapter": adapter, "item_embedding_pca": 3}
    outcome = run.run(TINY | {"model": model} | flag, tmp_path / "run", data=data, device="cpu")
    table = outcome.model.item_embedding
    assert (table.hidden.in_features, table.hidden.out_features, table.embedding_dim) == (3, 16, 16)
    assert (outcome.metrics["adapter"], outcome.metrics["pca"]["components"]) == (adapter, 3)
    assert 0 < outcome.metrics["pca"]["explained"] < 1
    start = build(TINY | {"model": model} | flag, data, tmp_path / "untrained")[0].item_embedding
    assert not torch.equal(start.hidden.weight, table.hidden.weight.cpu())


# --- reading the flag ---------------------------------------------------------------------------------------
def test_the_flag_is_off_when_it_is_not_there() -> None:
    assert read_flag({"model": "SASRec", "embedding_size": 64}) is None
    assert read_flag({"item_embedding_init": None}) is None


def test_the_flags_defaults_are_the_frozen_fused_view() -> None:
    assert read_flag({"item_embedding_init": "e"}) == EmbeddingStart(Path("e"), "fused", "adapter", "error")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"item_embedding_int": "e"}, "did you mean 'item_embedding_init'"),
        ({"item_embeding_init": "e"}, "did you mean 'item_embedding_init'"),
        ({"item_embedding_init": "e", "item_embedding_modus": "x"}, "unknown setting 'item_embedding_modus'"),
        ({"item_embedding_init": "e", "item_embedding_mode": "x"}, "one of adapter, table, fuse, init"),
        ({"item_embedding_init": "e", "item_embedding_fuse": "gate"}, "item_embedding_mode: fuse"),
        ({"item_embedding_init": "e", "item_embedding_mode": "fuse", "item_embedding_fuse": "mean"}, "sum or gate"),
        ({"item_embedding_init": "e", "item_embedding_mode": "fuse", "item_embedding_id_dropout": 1}, "below 1"),
        (
            {"item_embedding_init": "e", "item_embedding_mode": "init", "item_embedding_trainable": True},
            "one of the two",
        ),
        ({"item_embedding_column": "text"}, "item_embedding_column without item_embedding_init"),
        ({"item_embedding_init": "e", "item_embedding_column": "images"}, "one of fused, text, image, concat"),
        ({"item_embedding_init": "e", "item_embedding_trainable": "no"}, "true or false"),
        ({"item_embedding_init": "e", "item_embedding_missing": "zero"}, "one of error, mean, random"),
        ({"item_embedding_init": "e", "item_embedding_adapter": "two"}, "one of linear, two-linear, mlp"),
        ({"item_embedding_init": "e", "item_embedding_pca": 0}, "a number of components"),
        ({"item_embedding_init": "e", "item_embedding_pca": True}, "a number of components"),
        ({"item_embedding_pca": 8}, "item_embedding_pca without item_embedding_init"),
        ({"item_embedding_align_with": "run"}, "item_embedding_align_with without item_embedding_init"),
        ({"item_embedding_init": "e", "item_embedding_align_tau": 1}, "align_tau without item_embedding_align_with"),
        ({"item_embedding_init": "e", "item_embedding_align_with": 7}, "a path"),
        (
            {"item_embedding_init": "e", "item_embedding_align_with": "r", "item_embedding_align_weight": 0},
            "a number above 0",
        ),
        (
            {"item_embedding_init": "e", "item_embedding_align_with": "r", "item_embedding_align_tau": float("nan")},
            "a number above 0",
        ),
        ({"item_embedding_init": 7}, "a path"),
    ],
)
def test_a_wrong_flag_is_an_error_that_names_the_right_one(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_flag(settings)
