"""VBPR, FREEDOM, LATTICE, SLMRec: their losses and graphs against float64 references, the command, and refusals."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse
import torch
from embedding_folder import write_embeddings
from recommender_world import circle_vectors, cyclic_sequences, with_cold_items, write_dataset
from torch import Tensor

from vlm2rec.downstream import recommender
from vlm2rec.downstream.evaluation import metrics
from vlm2rec.downstream.multimodal import graphs, losses
from vlm2rec.downstream.multimodal import model as multimodal_model
from vlm2rec.downstream.multimodal.data import Interactions, read_features
from vlm2rec.downstream.multimodal.freedom import FREEDOM, item_matrix, kept_edges
from vlm2rec.downstream.multimodal.lattice import LATTICE
from vlm2rec.downstream.multimodal.model import Model
from vlm2rec.downstream.multimodal.recipes import MODELS, choose_features, is_read
from vlm2rec.downstream.multimodal.run import user_scores
from vlm2rec.downstream.multimodal.settings import Settings
from vlm2rec.downstream.multimodal.slmrec import SLMRec
from vlm2rec.downstream.multimodal.vbpr import VBPR
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, DataError, Vlm2RecError
from vlm2rec.pipelines import train_recommender
from vlm2rec.pipelines.config import TrainRecommenderConfig
from vlm2rec.pipelines.read_config import read_config

ITEMS = [f"i{number}" for number in range(30)]
SEQUENCES = cyclic_sequences(ITEMS, 60)
EVERY = pytest.mark.parametrize("model", MODELS)


def circle(seed: int, dim: int) -> np.ndarray:
    """Neighbours in the cycle look alike, and a sixth of each vector's square length is common to all."""
    vectors = circle_vectors(len(ITEMS), dim, seed)
    return vectors - 0.8 * vectors.mean(0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("world") / "data", SEQUENCES, ITEMS)


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "embeddings"
    write_embeddings(folder, ITEMS, circle(2, 8), text=circle(0, 8), image=circle(1, 8))
    return folder


@pytest.fixture(scope="module")
def text_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "text-only"
    write_embeddings(folder, ITEMS, circle(0, 8), text=circle(0, 8))
    return folder


def config(model: str, data: Path, embeddings: Path | None, out: Path, **values: Any) -> TrainRecommenderConfig:
    few = {"max_epochs": 4, "eval_step": 2, "hidden_size": 8, "batch_size": 64, "device": "cpu"}
    given = {"model": model, "data": data, "embeddings": embeddings, "out": out}
    return read_config(TrainRecommenderConfig, flags=few | given | values)


def settings_of(model: str, **values: Any) -> Settings:
    """The settings of a hand-sized model, with the defaults of the command."""
    given = {"model": model, "embeddings": Path("emb"), "out": Path("out"), "hidden_size": 4}
    found = read_config(TrainRecommenderConfig, flags=given | values)
    known = {f.name: getattr(found, f.name) for f in dataclasses.fields(Settings)}
    return Settings(**known | {"features": values.get("features", ("text", "image"))})


# --- hand-sized models against float64 ------------------------------------------------------------------------
# user 0 has item 1 twice; item 5 is in nobody's training sequence
HAND = [["a", "b", "b", "c", "f", "d"], ["b", "c", "d", "a"], ["c", "d", "e", "a", "f"]]
USERS = torch.tensor([0, 1, 2, 2, 0])
LIKED, OTHERS = torch.tensor([1, 2, 3, 4, 0]), torch.tensor([4, 4, 0, 1, 3])


@pytest.fixture
def by_hand(tmp_path: Path) -> Interactions:
    return Interactions(Dataset(write_dataset(tmp_path / "hand", HAND, list("abcdef"), candidates=1)))


def drawn(views: tuple[str, ...] = ("text", "image")) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {view: torch.randn(6, 5 if view == "text" else 3, generator=generator) for view in views}


def built(kind: type[Model], settings: Settings, interactions: Interactions, features: dict[str, Tensor]) -> Any:
    torch.manual_seed(0)
    model = kind(settings, interactions, features, torch.device("cpu"))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def wide(model: Any) -> dict[str, Tensor]:
    """The parameters in float64, as leaves of their own."""
    return {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}


def same_loss_and_gradients(model: Any, reference: Callable[[dict[str, Tensor]], Tensor]) -> None:
    loss = model.loss(USERS, LIKED, OTHERS)
    loss.backward()
    doubles = wide(model)
    expected = reference(doubles)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        wanted = doubles[name].grad
        wanted = torch.zeros_like(doubles[name]) if wanted is None else wanted
        torch.testing.assert_close(
            found.double(), wanted, rtol=2e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def bpr64(users: Tensor, liked: Tensor, others: Tensor) -> Tensor:
    return -torch.log(1 / (1 + torch.exp(-(users * liked).sum(1) + (users * others).sum(1)))).mean()


def info64(rows: Tensor, columns: Tensor, temperature: float) -> Tensor:
    exponents = torch.exp(rows @ columns.T / temperature)
    return -torch.log(exponents.diag() / exponents.sum(1)).mean()


def pairs64(interactions: Interactions) -> Tensor:
    """Ones where a user has an item: (U, I), item 1 of user 0 once."""
    found = torch.zeros(3, 6, dtype=torch.float64)
    for user, sequence in enumerate(HAND):
        for item in sequence[:-2]:
            found[user, "abcdef".index(item)] = 1
    assert len(interactions) == 9 and found.sum() == 8
    return found


def nodes64(pairs: Tensor) -> Tensor:
    zeros = [torch.zeros(len(pairs), len(pairs)), torch.zeros(pairs.shape[1], pairs.shape[1])]
    return torch.cat([torch.cat([zeros[0], pairs], 1), torch.cat([pairs.T, zeros[1]], 1)]).double()


def symmetric64(matrix: Tensor) -> Tensor:
    sums = matrix.sum(1)
    root = torch.where(sums > 0, sums.clamp_min(1e-30) ** -0.5, 0.0)
    return root[:, None] * matrix * root[None, :]


def light64(graph: Tensor, nodes: Tensor, layers: int) -> Tensor:
    found = [nodes]
    for _ in range(layers):
        found.append(graph @ found[-1])
    return torch.stack(found).mean(0)


def nearest64(vectors: Tensor, count: int) -> Tensor:
    """The cosines of each row's nearest, 0 elsewhere, (I, I)."""
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    cosines = unit @ unit.T
    kept = torch.zeros_like(cosines)
    for row in range(len(vectors)):
        for column in np.argsort(-cosines[row].detach().numpy(), kind="stable")[:count]:
            kept[row, column] = 1
    return cosines * kept


def test_bpr_and_in_batch_info_nce_are_their_formulas() -> None:
    one, two, three = (torch.randn(7, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))
    assert losses.bpr(one, two, three).item() == pytest.approx(bpr64(one.double(), two.double(), three.double()).item())
    found = losses.in_batch_info_nce(one, two, 0.3).item()
    assert found == pytest.approx(info64(one.double(), two.double(), 0.3).item())
    huge = torch.full((2, 4), 1e4)
    assert losses.bpr(huge, -huge, huge).isfinite() and losses.bpr(huge, huge, -huge) == 0


@pytest.mark.parametrize("mode", ["adapter", "init"])
@pytest.mark.parametrize("views", [("text", "image"), ("image",)])
def test_vbpr_has_its_loss(views: tuple[str, ...], mode: str, by_hand: Interactions) -> None:
    settings, features = settings_of("VBPR", features=views, regularisation=0.3, mode=mode), drawn(views)
    model = built(VBPR, settings, by_hand, features)

    def reference(of: dict[str, Tensor]) -> Tensor:
        raw = {view: of[f"features.{view}"] if mode == "init" else features[view].double() for view in views}
        joined = torch.cat([raw[view] for view in views], 1)
        items = torch.cat([of["items"], joined @ of["linear.weight"].T + of["linear.bias"]], 1)
        users, liked, others = of["users"][USERS], items[LIKED], items[OTHERS]
        norms = sum((each**2).sum() ** 0.5 for each in (users, liked, others))
        return bpr64(users, liked, others) + 0.3 * norms / 5

    same_loss_and_gradients(model, reference)
    users, items = model.vectors()
    assert users.shape == (3, 8) and items.shape == (6, 8)


def test_freedoms_item_graph_is_a_tenth_image_and_the_rest_text() -> None:
    features = drawn()
    graph = item_matrix(features, 3, 0.1).toarray()
    expected = np.zeros((6, 6))
    for view, weight in (("image", 0.1), ("text", 0.9)):
        vectors = features[view].double().numpy()
        cosines = vectors @ vectors.T / np.outer(*(2 * [np.linalg.norm(vectors, axis=1)]))
        for row in range(6):
            for column in np.argsort(-cosines[row])[:3]:
                expected[row, column] += weight / 3
    np.testing.assert_allclose(graph, expected, atol=1e-6)
    alone = item_matrix({"image": features["image"]}, 3, 0.1).toarray()
    assert set(np.round(alone.ravel(), 5)) == {0.0, np.round(1 / 3, 5)} and (alone.sum(1) > 0.999).all()
    assert item_matrix(features, 10, 0.1).toarray() == pytest.approx(np.full((6, 6), 1 / 6), abs=1e-6)


@pytest.mark.parametrize(("mode", "pruning"), [("adapter", 0.0), ("init", 0.0), ("adapter", 0.5)])
def test_freedom_has_its_loss(mode: str, pruning: float, by_hand: Interactions) -> None:
    settings = settings_of("FREEDOM", mode=mode, pruning=pruning, neighbours=3, regularisation=0.2)
    features = drawn()
    model = built(FREEDOM, settings, by_hand, features)
    generator = np.random.default_rng(5)
    model.begin_epoch(generator)
    pairs = pairs64(by_hand)
    whole = pairs.clone()
    if pruning:
        coordinates = by_hand.matrix().tocoo()
        kept = kept_edges(coordinates, pruning, np.random.default_rng(5))
        pairs = torch.zeros_like(pairs)
        pairs[coordinates.row[kept], coordinates.col[kept]] = 1
        assert pairs.sum() == 4
    item_graph = sum(
        weight * symmetric64((nearest64(features[view].double(), 3) != 0).double())
        for view, weight in (("image", 0.1), ("text", 0.9))
    )

    def reference(of: dict[str, Tensor], pairs: Tensor = pairs) -> Tensor:
        users, items = vectors(of, pairs)
        total = bpr64(users[USERS], items[LIKED], items[OTHERS])
        for view in ("text", "image"):
            raw = of[f"features.{view}"] if mode == "init" else features[view].double()
            seen = raw @ of[f"linear.{view}.weight"].T + of[f"linear.{view}.bias"]
            total = total + 0.2 * bpr64(users[USERS], seen[LIKED], seen[OTHERS])
        return total

    def vectors(of: dict[str, Tensor], pairs: Tensor) -> tuple[Tensor, Tensor]:
        nodes = light64(symmetric64(nodes64(pairs)), torch.cat([of["users"], of["items"]]), 2)
        return nodes[:3], nodes[3:] + item_graph @ of["items"]

    same_loss_and_gradients(model, reference)
    for found, expected in zip(model.vectors(), vectors(wide(model), whole), strict=True):
        torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("views", [("text", "image"), ("text",)])
def test_lattice_has_its_loss_in_the_first_batch_and_in_the_others(
    views: tuple[str, ...], by_hand: Interactions
) -> None:
    settings = settings_of("LATTICE", features=views, neighbours=2, regularisation=0.4)
    features = drawn(views)
    model = built(LATTICE, settings, by_hand, features)
    looped = nodes64(pairs64(by_hand)) + torch.eye(9)
    graph = looped / looped.sum(1, keepdim=True)

    def averaged(of: dict[str, Tensor]) -> Tensor:
        weights = torch.softmax(of["view_weights"], 0)
        raw = sum(w * symmetric64(nearest64(features[v].double(), 2)) for w, v in zip(weights, views, strict=True))
        new = sum(
            w * nearest64(features[v].double() @ of[f"linear.{v}.weight"].T + of[f"linear.{v}.bias"], 2)
            for w, v in zip(weights, views, strict=True)
        )
        return 0.9 * raw + 0.1 * symmetric64(new)  # type: ignore[no-any-return]

    def vectors(of: dict[str, Tensor], items: Tensor) -> tuple[Tensor, Tensor]:
        nodes = light64(graph, torch.cat([of["users"], of["items"]]), 2)
        h = items @ of["items"]
        return nodes[:3], nodes[3:] + h / h.norm(dim=1, keepdim=True)

    def loss(of: dict[str, Tensor], items: Tensor) -> Tensor:
        users, all_items = vectors(of, items)
        parts = users[USERS], all_items[LIKED], all_items[OTHERS]
        return bpr64(*parts) + 0.4 * sum((each**2).sum() for each in parts) / 2 / 2048

    model.begin_epoch(np.random.default_rng(0))
    same_loss_and_gradients(model, lambda of: loss(of, averaged(of)))
    assert all(model.linear[view].weight.grad.abs().sum() > 0 for view in views)
    model.zero_grad()
    same_loss_and_gradients(model, lambda of: loss(of, averaged(of).detach()))
    expected = vectors(wide(model), averaged(wide(model)))
    for found, wanted in zip(model.vectors(), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted.detach(), rtol=1e-4, atol=1e-6)


def test_slmrec_has_its_loss(by_hand: Interactions) -> None:
    settings, features = settings_of("SLMRec", ssl_weight=0.7, temperature=0.3, ssl_temperature=0.6), drawn()
    model = built(SLMRec, settings, by_hand, features)
    graph = symmetric64(nodes64(pairs64(by_hand)))

    def apply(of: dict[str, Tensor], name: str, rows: Tensor) -> Tensor:
        return rows @ of[f"{name}.weight"].T + of[f"{name}.bias"]

    def parts(of: dict[str, Tensor]) -> dict[str, Tensor]:
        unit = {view: each.double() / each.double().norm(dim=1, keepdim=True) for view, each in features.items()}
        items = {"id": of["items"]} | {view: apply(of, f"linear.{view}", unit[view]) for view in features}
        return {name: light64(graph, torch.cat([of["users"], rows]), 3) for name, rows in items.items()}

    def vectors(of: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        joined = torch.cat([parts(of)[name] for name in ("id", "image", "text")], 1)
        return apply(of, "fuse_users", joined[:3]), apply(of, "fuse_items", joined[3:])

    def reference(of: dict[str, Tensor]) -> Tensor:
        users, items = (each / each.norm(dim=1, keepdim=True) for each in vectors(of))
        ids, images, texts = (parts(of)[name][3:][LIKED] for name in ("id", "image", "text"))
        first = apply(of, "id_to_image", ids)
        second = apply(of, "to_text_second", apply(of, "to_text_first", first))
        aligned = info64(first, apply(of, "image_to_id", images), 0.6)
        aligned = aligned + info64(second, apply(of, "text_to_id", texts), 0.6)
        return info64(users[USERS], items[LIKED], 0.3) + 0.7 * aligned

    same_loss_and_gradients(model, reference)
    for found, expected in zip(model.vectors(), vectors(wide(model)), strict=True):
        torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-4, atol=1e-6)


# --- graphs and negatives -----------------------------------------------------------------------------------------
def test_products_of_a_graph_have_the_gradients_of_the_dense_matrix() -> None:
    generator = np.random.default_rng(0)
    dense = np.where(generator.random((7, 5)) < 0.4, generator.normal(size=(7, 5)), 0)
    dense[3] = 0
    graph = graphs.Graph(scipy.sparse.csr_matrix(dense))
    inputs = torch.randn(5, 3, requires_grad=True)
    values = graph.values.clone().requires_grad_()
    weights = torch.randn(7, 3)
    (graph.product(inputs, values) * weights).sum().backward()
    twin, matrix = (
        inputs.detach().clone().requires_grad_(),
        torch.tensor(dense, dtype=torch.float32, requires_grad=True),
    )
    ((matrix @ twin) * weights).sum().backward()
    assert matrix.grad is not None
    torch.testing.assert_close(inputs.grad, twin.grad)
    torch.testing.assert_close(values.grad, matrix.grad[graph.rows.long(), graph.columns.long()])
    torch.testing.assert_close(graph.product(inputs.detach()), (matrix @ twin).detach())
    assert (graph.matrix(values) != graph.matrix().astype(np.float32)).nnz == 0


def test_neighbours_are_found_block_by_block_and_in_wide_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0))
    vectors[17] = 0
    monkeypatch.setattr(graphs, "_SCORES", 4000 * 300)
    cosines, rows = graphs.nearest(vectors, 5)
    unit = torch.nn.functional.normalize(vectors, dim=1)
    expected = (unit @ unit.T).topk(5)
    torch.testing.assert_close(cosines, expected.values)
    assert torch.equal(rows[:17], expected.indices[:17]) and not cosines[17].any() and cosines.isfinite().all()
    assert all(len(set(each)) == 5 for each in rows.tolist())
    wide_rows = torch.randn(3, 128 * 4 * 5 + 1)
    for found, wanted in zip(graphs._largest(wide_rows, 5), wide_rows.topk(5), strict=True):
        assert torch.equal(found, wanted)


def test_pruning_drops_edges_of_popular_items_first() -> None:
    pairs = scipy.sparse.coo_matrix(np.array([[1, 1, 0], [1, 0, 1], [1, 0, 0], [1, 0, 0]]))
    generator = np.random.default_rng(0)
    times = np.zeros(pairs.nnz)
    for _ in range(2000):
        kept = kept_edges(pairs, 0.8, generator)
        assert len(kept) == 1
        times[kept] += 1
    degree = np.bincount(pairs.row)[pairs.row] * np.bincount(pairs.col)[pairs.col]
    weights = degree**-0.5
    np.testing.assert_allclose(times / 2000, weights / weights.sum(), atol=0.04)
    assert len(kept_edges(pairs, 0.5, generator)) == 3 and len(set(kept_edges(pairs, 0.5, generator))) == 3
    assert len(kept_edges(pairs, 0.99, generator)) == 1 and len(kept_edges(pairs, 0.0, generator)) == pairs.nnz


def test_negatives_are_items_of_training_that_the_user_does_not_have(by_hand: Interactions) -> None:
    users = np.repeat([0, 1, 2], 300)
    found = by_hand.negatives(users, np.random.default_rng(0))
    free = {0: {3, 4}, 1: {0, 3, 4}, 2: {0, 1}}  # a to e are in training, f is not
    assert {(u, i) for u, i in zip(users.tolist(), found.tolist(), strict=True)} == {
        (user, item) for user, items in free.items() for item in items
    }
    counts = np.bincount(found[users == 1], minlength=6)[[0, 3, 4]]
    assert counts.min() > 70


def test_a_user_with_every_item_of_training_gets_the_others_as_negatives(tmp_path: Path) -> None:
    greedy = [["a", "b", "c", "d", "a"], ["a", "b", "c"]]
    found = Interactions(Dataset(write_dataset(tmp_path / "one", greedy, list("abcde"), candidates=1)))
    assert set(found.negatives(np.zeros(50, np.int64), np.random.default_rng(0)).tolist()) == {3, 4}
    full = Interactions(Dataset(write_dataset(tmp_path / "two", [[*"abcde", "a", "b"]], list("abcde"), candidates=0)))
    with pytest.raises(DataError, match="has all 5 items"):
        full.negatives(np.zeros(1, np.int64), np.random.default_rng(0))


def test_the_distinct_rows_of_a_batch_are_found_once() -> None:
    found, (one, two) = multimodal_model.distinct(9, torch.tensor([4, 1, 4]), torch.tensor([8, 1]))
    assert found.tolist() == [1, 4, 8] and one.tolist() == [1, 0, 1] and two.tolist() == [2, 0]


def test_each_epoch_has_every_interaction_once(by_hand: Interactions) -> None:
    batches = list(by_hand.batches(4, np.random.default_rng(0)))
    assert [len(users) for users, _, _ in batches] == [4, 4, 1]
    pairs = sorted((u, i) for users, items, _ in batches for u, i in zip(users.tolist(), items.tolist(), strict=True))
    assert pairs == sorted(zip(by_hand.users.tolist(), by_hand.items.tolist(), strict=True))


# --- the command ----------------------------------------------------------------------------------------------------
@EVERY
def test_train_recommender_writes_what_it_writes_for_sequential_models(
    model: str, data: Path, embeddings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = train_recommender.run(config(model, data, embeddings, tmp_path / "a"))
    said = capsys.readouterr()
    assert said.out == "" and f"{model} on by hand" in said.err and "valid NDCG@20" in said.err
    assert found == schema.read_json(tmp_path / "a" / "metrics.json", "metrics", "")
    assert (found["task"], found["model"], found["start"], found["mode"]) == (2, model, "text+image", "adapter")
    assert (found["users"], found["items"], found["missing"], found["seeds"]) == (60, 30, 0, [0, 1])
    assert found["epochs"] == 4 and found["best_epoch"] in (2, 4) and found["parameters"] > 0
    assert set(found["candidates"]) == set(schema.METRICS) and found["tail"]["below"] == metrics.TAIL
    assert found["retrieval"] == {
        "R@20": found["full"]["H@20"],
        "N@20": found["full"]["N@20"],
        "P@20": pytest.approx(found["full"]["H@20"] / 20),
    }
    users = pq.read_table(tmp_path / "a" / "users.parquet").to_pandas()
    assert len(users) == 60 * 3 and users["H@10"][users["protocol"] == "full"].mean() == found["full"]["H@10"]
    record = json.loads((tmp_path / "a" / "recommender.json").read_text())
    assert record["written_by"] == recommender.WRITER and record["settings"]["model"] == model
    again = train_recommender.run(config(model, data, embeddings, tmp_path / "b"))
    other = train_recommender.run(config(model, data, embeddings, tmp_path / "b", seed=1))
    state = recommender.load_weights(tmp_path / "a" / "checkpoint.safetensors", "cpu")
    assert "features.text" not in state
    timeless = ("seconds", "curve")
    assert {k: v for k, v in again.items() if k not in timeless} == {
        k: v for k, v in found.items() if k not in timeless
    }
    assert other["curve"][0]["loss"] != found["curve"][0]["loss"]


def test_metrics_have_the_keys_of_a_sequential_model(data: Path, embeddings: Path, tmp_path: Path) -> None:
    ours = train_recommender.run(config("VBPR", data, embeddings, tmp_path / "a"))
    stock = train_recommender.run(config("GRU4Rec", data, embeddings, tmp_path / "b"))
    assert ours.keys() == stock.keys()
    assert ours["curve"][0].keys() == {"epoch", "loss", "NDCG@20", "seconds"}
    assert set(ours["retrieval"]) == set(stock["retrieval"]) and set(ours["tail"]) == set(stock["tail"])


@EVERY
def test_it_learns_and_its_checkpoint_is_the_best_epoch(
    model: str, data: Path, embeddings: Path, tmp_path: Path
) -> None:
    values = {"max_epochs": 120, "eval_step": 5, "learning_rate": 0.02, "hidden_size": 16, "pruning": 0.3}
    values = {name: value for name, value in values.items() if is_read(model, name)}
    found = train_recommender.run(config(model, data, embeddings, tmp_path / "a", **values))
    assert found["full"]["N@20"] > found["popularity"]["full"]["N@20"] + 0.1
    scores = {each["epoch"]: each["NDCG@20"] for each in found["curve"] if each["NDCG@20"] is not None}
    assert max(scores, key=lambda epoch: scores[epoch]) == found["best_epoch"]
    assert found["epochs"] == 120 or found["epochs"] - found["best_epoch"] == 20
    folder = Dataset(data)
    given = config(model, data, embeddings, tmp_path, **values)
    known = {f.name: getattr(given, f.name) for f in dataclasses.fields(Settings)} | {"features": ("text", "image")}
    settings = Settings(**known)
    twin = MODELS[model].load()(settings, Interactions(folder), read_features(settings, ITEMS)[0], torch.device("cpu"))
    twin.load_state_dict(recommender.load_weights(tmp_path / "a" / "checkpoint.safetensors", "cpu"))
    scores_of = np.concatenate([block for _, block in user_scores(twin.eval(), max_scores=100)])
    targets = folder.histories("test").targets
    seen, offsets = metrics.seen_items(folder.train_sequences(), folder.histories("valid").targets)
    counts = metrics.counts_among_all(scores_of, targets, seen, offsets)
    again = metrics.mean_over_users(metrics.expected_metrics(*counts))
    assert again == pytest.approx(found["full"])


def test_the_published_defaults_are_those_of_each_model() -> None:
    common = (64, 2048, 1000, 1e-3)
    for model, own in {
        "VBPR": {"weight_decay": 0.0, "regularisation": 0.01},
        "FREEDOM": {"weight_decay": 0.0, "graph_layers": 2, "neighbours": 10, "image_weight": 0.1, "pruning": 0.8},
        "LATTICE": {"weight_decay": 0.0, "graph_layers": 2, "neighbours": 10},
        "SLMRec": {"weight_decay": 1e-4, "graph_layers": 3, "temperature": 0.2},
    }.items():
        found = settings_of(model, hidden_size=None)
        assert (found.hidden_size, found.batch_size, found.max_epochs, found.learning_rate) == common
        assert {name: getattr(found, name) for name in own} == own
    sequential = read_config(TrainRecommenderConfig, flags={"model": "SASRec", "out": Path("out")})
    assert (sequential.hidden_size, sequential.batch_size, sequential.weight_decay) == (128, 256, 1e-4)
    assert set(MODELS) == set(schema.MULTIMODAL)


def test_one_view_alone_is_a_choice(data: Path, embeddings: Path, text_only: Path, tmp_path: Path) -> None:
    for model in ("FREEDOM", "LATTICE"):
        found = train_recommender.run(config(model, data, text_only, tmp_path / model, features=("text",)))
        assert found["start"] == "text"
    found = train_recommender.run(config("VBPR", data, text_only, tmp_path / "v"))
    assert found["start"] == "text"
    found = train_recommender.run(config("LATTICE", data, embeddings, tmp_path / "f", features=("fused",)))
    assert found["start"] == "fused"


def test_vbpr_takes_the_fused_vectors_of_a_table_that_has_no_others(data: Path, tmp_path: Path) -> None:
    write_embeddings(tmp_path / "emb", ITEMS, circle(0, 8))
    assert choose_features("VBPR", (), tmp_path / "emb") == ("fused",)
    assert train_recommender.run(config("VBPR", data, tmp_path / "emb", tmp_path / "out"))["start"] == "fused"
    with pytest.raises(ArtifactError, match=r"no text and no image vectors.*--features fused"):
        choose_features("LATTICE", (), tmp_path / "emb")


def test_items_without_a_vector_are_an_error_or_filled(data: Path, tmp_path: Path) -> None:
    image = circle(1, 8)
    image[[3, 4]] = np.nan
    write_embeddings(tmp_path / "emb", ITEMS, circle(2, 8), text=circle(0, 8), image=image)
    with pytest.raises(
        ArtifactError, match=r"no image vector for 2 of 30 items, among them 'i3', 'i4'.*--missing mean"
    ):
        train_recommender.run(config("FREEDOM", data, tmp_path / "emb", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    for missing in ("mean", "random"):
        found = train_recommender.run(config("FREEDOM", data, tmp_path / "emb", tmp_path / missing, missing=missing))
        assert found["missing"] == 2
    settings = settings_of("VBPR", missing="mean", embeddings=tmp_path / "emb")
    filled, count = read_features(settings, ITEMS)
    known = np.delete(image, [3, 4], 0)
    assert count == 2
    np.testing.assert_allclose(filled["image"][3].numpy(), known.mean(0), rtol=1e-5)
    drawn_vectors, _ = read_features(dataclasses.replace(settings, missing="random"), ITEMS)
    lengths = drawn_vectors["image"][3:5].norm(dim=1).numpy()
    np.testing.assert_allclose(lengths, np.linalg.norm(known, axis=1).mean(), rtol=1e-5)


def test_vectors_of_length_one_are_a_choice(data: Path, embeddings: Path, tmp_path: Path) -> None:
    settings = settings_of("VBPR", embeddings=embeddings)
    raw, _ = read_features(settings, ITEMS)
    unit, _ = read_features(dataclasses.replace(settings, normalize=True), ITEMS)
    for view in ("text", "image"):
        torch.testing.assert_close(unit[view], torch.nn.functional.normalize(raw[view], dim=1))
    found = train_recommender.run(config("VBPR", data, embeddings, tmp_path / "a", normalize=True))
    other = train_recommender.run(config("VBPR", data, embeddings, tmp_path / "b"))
    assert found["curve"][0]["loss"] != other["curve"][0]["loss"]
    refused(ConfigError, "--normalize with SASRec", config("SASRec", data, embeddings, tmp_path / "c", normalize=True))


def test_with_init_the_vectors_are_trained_and_kept(data: Path, embeddings: Path, tmp_path: Path) -> None:
    found = train_recommender.run(config("FREEDOM", data, embeddings, tmp_path / "out", mode="init"))
    state = recommender.load_weights(tmp_path / "out" / "checkpoint.safetensors", "cpu")
    assert found["mode"] == "init"
    change = (state["features.text"].numpy() - circle(0, 8)).std()
    assert 0 < change < 0.1


def test_cold_items_are_neither_trained_on_nor_ranked(data: Path, embeddings: Path, tmp_path: Path) -> None:
    cold = with_cold_items(data, tmp_path / "cold")
    one = train_recommender.run(config("FREEDOM", data, embeddings, tmp_path / "a"))
    other = train_recommender.run(config("FREEDOM", cold, embeddings, tmp_path / "b"))
    assert other["items"] == 30 and other["full"] == one["full"] and other["candidates"] == one["candidates"]


def test_zero_vectors_and_few_items_are_no_trouble(tmp_path: Path) -> None:
    items = [f"i{number}" for number in range(8)]
    data = write_dataset(tmp_path / "data", cyclic_sequences(items, 12, longest=5), items, candidates=2)
    image = np.ones((8, 4), np.float32)
    image[2] = 0
    write_embeddings(tmp_path / "emb", items, image, text=np.eye(8, 4, dtype=np.float32), image=image)
    for model in MODELS:
        found = train_recommender.run(config(model, data, tmp_path / "emb", tmp_path / model))
        assert all(np.isfinite(value) for value in found["full"].values()), model


# --- refusals -------------------------------------------------------------------------------------------------------
def refused(kind: type[Vlm2RecError], pattern: str, given: TrainRecommenderConfig) -> None:
    with pytest.raises(kind, match=pattern) as caught:
        train_recommender.run(given)
    text = str(caught.value)
    assert "\n" not in text and "Expected:" in text and "To fix it:" in text
    assert not given.out.exists()


@pytest.mark.parametrize("model", ["FREEDOM", "LATTICE", "SLMRec"])
def test_a_table_of_text_alone_is_refused_where_two_views_are_needed(
    model: str, data: Path, text_only: Path, tmp_path: Path
) -> None:
    fix = "VBPR" if model == "SLMRec" else "--features text"
    refused(
        ArtifactError,
        rf"no image vectors: its views are fused, text.*text and image vectors, which {model} takes.*{fix}",
        config(model, data, text_only, tmp_path / "out"),
    )


def test_a_view_that_was_chosen_must_be_there(data: Path, text_only: Path, tmp_path: Path) -> None:
    for features in (("image",), ("text", "image")):
        given = config("VBPR", data, text_only, tmp_path / "out", features=features)
        refused(ArtifactError, "has no image vectors", given)


def broken_users(folder: Path, data: Path, kind: str) -> Path:
    """Copy a dataset folder; its users lose what `kind` says."""
    write_dataset(folder, SEQUENCES, ITEMS)
    table = pq.read_table(data / schema.SEQUENCES_FILE)
    if kind == "no training item":
        lists = table[schema.TRAIN].to_pylist()
        lists[4], lists[9] = [], []
        column = pa.array(lists, pa.list_(pa.string()))
        table = table.set_column(table.column_names.index(schema.TRAIN), schema.TRAIN, column)
    else:
        table = table.slice(0, 0)
    pq.write_table(table, folder / schema.SEQUENCES_FILE)
    return folder


@pytest.mark.parametrize("model", ["VBPR", "FREEDOM", "SASRec"])
def test_users_without_interactions_are_named(model: str, data: Path, embeddings: Path, tmp_path: Path) -> None:
    broken = broken_users(tmp_path / "one", data, "no training item")
    pattern = r"2 users without a training item, such as 'u4', 'u9'"
    given = config(model, broken, embeddings, tmp_path / "out")
    with pytest.raises(ArtifactError, match=pattern):
        train_recommender.run(given)
    nobody = broken_users(tmp_path / "two", data, "no user")
    with pytest.raises(ArtifactError, match="has no user"):
        train_recommender.run(config(model, nobody, embeddings, tmp_path / "other"))


@pytest.mark.parametrize(
    ("values", "pattern"),
    [
        ({"model": "SLMRec", "features": ("text",)}, r"--features text with SLMRec.*aligns the two"),
        ({"model": "FREEDOM", "features": ("text", "fused")}, r"--features text,fused.*text,image, or one of"),
        ({"model": "FREEDOM", "column": "text"}, r"--column with FREEDOM.*SASRec, GRU4Rec, BERT4Rec.*--features"),
        ({"model": "VBPR", "pruning": 0.5}, r"--pruning with VBPR.*for FREEDOM"),
        ({"model": "LATTICE", "image_weight": 0.5}, r"--image-weight with LATTICE.*for FREEDOM"),
        ({"model": "SLMRec", "pca": 4}, r"--pca with SLMRec"),
        ({"model": "SASRec", "neighbours": 5}, r"--neighbours with SASRec.*for FREEDOM, LATTICE"),
        ({"model": "GRU4Rec", "features": ("text",)}, r"--features with GRU4Rec.*VBPR"),
        ({"model": "VBPR", "embeddings": None}, r"VBPR without --embeddings"),
        ({"model": "VBPR", "data": None}, r"VBPR without --data"),
        ({"model": "FREEDOM", "mode": "fuse"}, r"--mode fuse with FREEDOM.*adapter or init"),
        ({"model": "LATTICE", "positions": "all"}, r"--positions with LATTICE"),
        ({"model": "VBPR", "align_with": Path("run")}, r"--align-with with VBPR"),
        ({"model": "FREEDOM", "device": "mps"}, r"--device mps"),
        ({"model": "FREDOM"}, r"did you mean 'FREEDOM'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    values: dict[str, Any], pattern: str, data: Path, embeddings: Path, tmp_path: Path
) -> None:
    given = config("VBPR", data, embeddings, tmp_path / "out")
    refused(ConfigError, pattern, dataclasses.replace(given, batch_size=256, regularisation=1e-3, **values))


def test_a_recbole_yaml_cannot_name_a_multimodal_model(data: Path, embeddings: Path, tmp_path: Path) -> None:
    (tmp_path / "recbole.yaml").write_text("model: FREEDOM\n")
    given = TrainRecommenderConfig(config=tmp_path / "recbole.yaml", data=data, out=tmp_path / "out")
    refused(ConfigError, "give --model", given)
    both = dataclasses.replace(given, model="FREEDOM", embeddings=embeddings, hidden_size=64)
    refused(ConfigError, "--config with FREEDOM", both)


def test_vectors_that_are_not_finite_and_losses_too_are_refused(data: Path, tmp_path: Path) -> None:
    text = circle(0, 8)
    text[3, 2] = np.inf
    write_embeddings(tmp_path / "emb", ITEMS, circle(2, 8), text=text, image=circle(1, 8))
    refused(ArtifactError, "not finite", config("FREEDOM", data, tmp_path / "emb", tmp_path / "out"))
    write_embeddings(tmp_path / "large", ITEMS, circle(2, 8), text=1e30 * circle(0, 8), image=circle(1, 8))
    with pytest.raises(ConfigError, match="the training loss of epoch 1 is not a number"):
        train_recommender.run(config("VBPR", data, tmp_path / "large", tmp_path / "out"))


def test_a_folder_of_somebody_else_is_left_alone(data: Path, embeddings: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"mine\.txt|not empty|something else|holds"):
        train_recommender.run(config("VBPR", data, embeddings, tmp_path))
    assert (tmp_path / "mine.txt").read_text() == "mine" and not (tmp_path / "metrics.json").exists()
