"""`finetune --negatives-file` and `--mine-from`: hard negatives in the losses, from files and from an export."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from drawn_lora import draw_lora
from embedding_folder import write_embeddings
from test_finetune import settings
from test_losses import ref_cosine, ref_kl
from torch import Tensor

from vlm2rec.embedder.adapters import lora
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.checksums import sealed
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, DataError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.item_features import ItemFeatures
from vlm2rec.embedder.training.gradients import modality_losses
from vlm2rec.embedder.training.losses import (
    HardNegatives,
    InfoNCEObjective,
    Matryoshka,
    VLM2RecObjective,
    effective_negatives,
)
from vlm2rec.embedder.training.recipes import LOSSES, METHODS, LossRecipe, check_settings
from vlm2rec.embedder.training.samples import Samples
from vlm2rec.embedder.training.vlm2rec import HistoryModel
from vlm2rec.pipelines import finetune
from vlm2rec.pipelines.config import FinetuneConfig
from vlm2rec.pipelines.finetune_negatives import GivenNegatives, MinedNegatives, add_hard_negatives
from vlm2rec.pipelines.read_config import read_config

Tiny = Callable[[str], Path]
Views = dict[str, Tensor]


# --- the losses -------------------------------------------------------------------------------------------------
def drawn(seed: int, *shape: int) -> Views:
    random = torch.Generator().manual_seed(seed)
    text, image = (torch.randn(*shape, generator=random, dtype=torch.float64).requires_grad_() for _ in range(2))
    return {schema.FUSED: text + image, schema.TEXT: text, schema.IMAGE: image}


def world(ids: list[int], hard_ids: list[list[int]]) -> tuple[Views, Views, Tensor, HardNegatives]:
    hard = HardNegatives(drawn(3, len(ids), len(hard_ids[0]), 5), torch.tensor(hard_ids))
    return drawn(1, len(ids), 5), drawn(2, len(ids), 5), torch.tensor(ids), hard


def negatives(view: str, i: int, items: Views, targets: Tensor, hard: HardNegatives) -> list[list[float]]:
    """N_u, one vector at a time: the targets of others, then the row's own that no row has as its target."""
    ids = targets.tolist()
    found = [items[view][j].tolist() for j in range(len(ids)) if ids[j] != ids[i]]
    own = zip(hard.ids[i].tolist(), hard.vectors[view][i].tolist(), strict=True)
    return found + [vector for name, vector in own if name >= 0 and name not in ids]


def ref_margin(view: str, i: int, users: Views, items: Views, targets: Tensor, hard: HardNegatives) -> float:
    user = users[view][i].tolist()
    others = [ref_cosine(user, each) for each in negatives(view, i, items, targets, hard)]
    return ref_cosine(user, items[view][i].tolist()) - math.fsum(others) / len(others) if others else 0.0


def ref_infonce(
    view: str, i: int, users: Views, items: Views, targets: Tensor, hard: HardNegatives, tau: float, w: float = 1.0
) -> float:
    user = users[view][i].tolist()
    positive = math.exp(ref_cosine(user, items[view][i].tolist()) / tau)
    others = (math.exp(ref_cosine(user, each) / tau) for each in negatives(view, i, items, targets, hard))
    return -math.log(positive / (positive + w * math.fsum(others)))


def ref_crtr(i: int, users: Views, items: Views, targets: Tensor, hard: HardNegatives, tau: float) -> float:
    shares = []
    for view in schema.MODALITIES:
        candidates = [items[view][i].tolist(), *negatives(view, i, items, targets, hard)]
        scores = [math.exp(ref_cosine(users[view][i].tolist(), each) / tau) for each in candidates]
        shares.append({place: score / math.fsum(scores) for place, score in enumerate(scores)})
    return (ref_kl(*shares) + ref_kl(*reversed(shares))) / 2


WORLDS = [
    ([0, 1, 2], [[8, 9], [9, 7], [6, 5]]),
    ([4, 4, 2], [[8, -1], [-1, -1], [4, 6]]),  # fewer, none, and one that is another row's target
    ([3, 1], [[3, 7], [7, -1]]),  # the own target
    ([5], [[6, 7]]),  # hard negatives alone
]


@pytest.mark.parametrize(("ids", "hard_ids"), WORLDS)
def test_sft_is_equation_3_over_the_larger_set(ids: list[int], hard_ids: list[list[int]]) -> None:
    given = world(ids, hard_ids)
    total, log = InfoNCEObjective(0.3)(*given)
    expected = math.fsum(ref_infonce(schema.FUSED, i, *given, tau=0.3) for i in range(len(ids))) / len(ids)
    assert total.item() == pytest.approx(expected, abs=1e-12)
    margin = math.fsum(ref_margin(schema.TEXT, i, *given) for i in range(len(ids))) / len(ids)
    assert log["margin_text"].item() == pytest.approx(margin, abs=1e-12)


@pytest.mark.parametrize("reduction", ["paper", "mean"])
@pytest.mark.parametrize(("ids", "hard_ids"), WORLDS)
def test_vlm2rec_s_weight_multiplies_them_and_crtr_compares_them(
    ids: list[int], hard_ids: list[list[int]], reduction: Any
) -> None:
    given = world(ids, hard_ids)
    loss = VLM2RecObjective(0.2, 0.4, 0.7, alpha=2.0, beta=0.5, reduction=reduction).double()
    total, log = loss(*given)
    weighted, crtr = [], []
    for i in range(len(ids)):
        text, image = (ref_margin(view, i, *given) for view in schema.MODALITIES)
        w = 1 + 0.5 * math.log(1 + math.exp(2 * abs(text - image)))
        weighted.append(ref_infonce(schema.FUSED, i, *given, tau=0.2, w=w))
        crtr.append(ref_crtr(i, *given, tau=0.4))
    size = len(ids)
    lam = 0.7 / size if reduction == "paper" else 0.7
    assert total.item() == pytest.approx((math.fsum(weighted) + lam * math.fsum(crtr)) / size, abs=1e-7)
    assert log["wpcl"].item() == pytest.approx(math.fsum(weighted) / size, abs=1e-7)


@pytest.mark.parametrize("normalised", [False, True])
def test_gradients_equal_finite_differences(normalised: bool) -> None:
    users, items, targets, hard = world([4, 1, 2], [[8, -1], [7, 1], [6, 5]])
    loss = VLM2RecObjective(
        0.5, 0.5, stop_gradient=False, fusion_norm="normalised" if normalised else "raw"
    ).double()  # a difference moves M_strong, too

    def total(user: Tensor, item: Tensor, text: Tensor, image: Tensor) -> Tensor:
        more = HardNegatives({schema.TEXT: text, schema.IMAGE: image}, hard.ids)
        return loss(users | {schema.TEXT: user}, items | {schema.IMAGE: item}, targets, more)[0]

    assert torch.autograd.gradcheck(
        total, (users[schema.TEXT], items[schema.IMAGE], hard.vectors[schema.TEXT], hard.vectors[schema.IMAGE])
    )


@pytest.mark.parametrize("loss", [InfoNCEObjective(), VLM2RecObjective(), Matryoshka(InfoNCEObjective(), (2, 3))])
def test_places_without_an_item_change_nothing_and_get_no_gradient(loss: Any) -> None:
    users, items, targets, hard = world([4, 1, 2], [[-1, -1]] * 3)
    total, plain = loss(users, items, targets, hard)[0], loss(users, items, targets)[0]
    torch.testing.assert_close(total, plain, rtol=0, atol=1e-14)
    total.backward()
    assert not hard.vectors[schema.TEXT].grad.any()
    assert effective_negatives(targets, hard).tolist() == effective_negatives(targets).tolist() == [2, 2, 2]


def test_prefixes_and_single_modalities_have_them_too() -> None:
    given = world([4, 1, 2], [[8, 9], [7, 4], [6, 5]])
    users, items, targets, hard = given
    short = [{view: each[:, :3] for view, each in side.items()} for side in (users, items)]
    cut = HardNegatives({view: each[..., :3] for view, each in hard.vectors.items()}, hard.ids)
    expected = (InfoNCEObjective()(*short, targets, cut)[0] + InfoNCEObjective()(*given)[0]) / 2
    torch.testing.assert_close(Matryoshka(InfoNCEObjective(), (3,))(*given)[0], expected)
    alone = modality_losses(users, items, targets, 0.3, hard)
    for view in schema.MODALITIES:
        wanted = math.fsum(ref_infonce(view, i, *given, tau=0.3) for i in range(3)) / 3
        assert alone[view].item() == pytest.approx(wanted, abs=1e-12)


def test_rows_that_do_not_fit_are_refused() -> None:
    users, items, targets, _ = world([4, 1], [[8], [7]])
    with pytest.raises(ValueError, match=r"hard negatives are \(3, 1, 5\) .*expected \(2, K, d\)"):
        InfoNCEObjective()(users, items, targets, HardNegatives(drawn(0, 3, 1, 5), torch.tensor([[8], [7], [6]])))


# --- the model --------------------------------------------------------------------------------------------------
HISTORIES = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]]
TARGETS = torch.tensor([12, 1, 3, 12])
HARD = torch.tensor([[20, 21], [22, -1], [-1, -1], [20, 1]])


@pytest.fixture
def model(tiny: Tiny, drawn_dataset: Path) -> HistoryModel:
    encoder = ItemEncoder.load(str(tiny("qwen2_5_vl")), max_pixels=56 * 56, dtype="float32", device="cpu")
    items = ItemFeatures(Dataset(drawn_dataset), encoder)
    wrapped = lora.add_lora(encoder.backbone, 2, 4.0, 0.2, 0)
    draw_lora(wrapped, "lora_", 0.1, seed=1)
    return HistoryModel(encoder, wrapped, items, VLM2RecObjective(0.5, 0.5), 0.5).eval()


def gradient(model: HistoryModel, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_the_model_encodes_every_item_once_and_grad_cache_learns_the_same(model: HistoryModel) -> None:
    whole, log, _ = model(HISTORIES, TARGETS, hard=HARD)
    views = {row: model.encode([[row]]) for row in (20, 21, 22, 1)}
    none = {view: torch.zeros(model.encoder.dim) for view in schema.VIEWS}
    vectors = {
        view: torch.stack([torch.stack([views.get(int(n), none)[view].reshape(-1) for n in row]) for row in HARD])
        for view in schema.VIEWS
    }
    users = model.encode(HISTORIES)
    items = model.encode([[int(row)] for row in TARGETS])
    expected, _ = model.loss(users, items, TARGETS, HardNegatives(vectors, HARD))
    assert whole.item() == pytest.approx(expected.item(), abs=1e-6)
    assert log["hard_negatives"].item() == 1.0  # 2, 1, 0 and 1 (row 1 is a target), of 4 users
    assert log["effective_negatives"].item() == (2 + 3 + 3 + 2 + 4) / 4
    wanted = gradient(model, whole)
    for chunk in (1, 3):
        model.chunk_users = chunk
        torch.testing.assert_close(gradient(model, model(HISTORIES, TARGETS, hard=HARD)[0]), wanted, atol=1e-6, rtol=0)


# --- files ------------------------------------------------------------------------------------------------------
def config(data: Path, **more: Any) -> FinetuneConfig:
    return FinetuneConfig(data=data, backbone="b", out=Path("o"), **more)


def given(data: Path, file: Path, most: int = 4, **more: Any) -> tuple[Dataset, Samples]:
    dataset = Dataset(data)
    samples = Samples(dataset.train_sequences(), dataset.max_history, **more)
    add_hard_negatives(config(data, negatives_file=file, hard_negatives=most), dataset, samples)
    return dataset, samples


def rows_of(samples: Samples, place: int) -> set[int]:
    return {int(row) for row in samples[place].negatives if row >= 0}


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("form", ["long", "lists"])
@pytest.mark.parametrize("key", ["item_id", "user_id"])
def test_files_of_every_form_say_the_same(
    drawn_dataset: Path, tmp_path: Path, kind: str, form: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = Dataset(drawn_dataset)
    sample = Samples(dataset.train_sequences(), dataset.max_history)[3]
    own = {int(row) for row in dataset.train_sequences()[sample.user]}
    free = [row for row in range(40) if row not in own][:3]
    name = dataset.item_ids[sample.target] if key == "item_id" else dataset.user_ids[sample.user]
    wanted = [dataset.item_ids[row] for row in (*free, min(own))]  # what the user has had is left out
    table = pl.DataFrame({key: [name, "nobody"], "negatives": [[*wanted, "unheard-of"], wanted[:1]]})
    if form == "long":
        table = table.explode("negatives").rename({"negatives": "negative_id"})
    elif kind == "csv":
        table = table.with_columns(pl.col("negatives").map_elements(lambda x: json.dumps(list(x)), pl.String))
    file = tmp_path / f"negatives.{kind}"
    {"parquet": table.write_parquet, "csv": table.write_csv, "jsonl": table.write_ndjson}[kind](file)
    _, samples = given(drawn_dataset, file)
    assert rows_of(samples, 3) == {*free} and len(samples[3].negatives) == 4
    told = " ".join(capsys.readouterr().err.split())
    assert "unheard-of" in told and f"1 of 2 {key[:4]}s of" in told and "'nobody'" in told
    assert "have none" in told


def test_more_than_a_step_takes_are_drawn_anew_in_each_epoch(drawn_dataset: Path, tmp_path: Path) -> None:
    dataset = Dataset(drawn_dataset)
    file = tmp_path / "negatives.parquet"
    pl.DataFrame({"user_id": dataset.user_ids, "negatives": [dataset.item_ids] * len(dataset.user_ids)}).write_parquet(
        file
    )

    def epochs() -> list[list[int]]:
        _, samples = given(drawn_dataset, file, most=3, mode="random", seed=5)
        found = []
        for epoch in range(4):
            samples.set_epoch(epoch)
            sample = samples[2]
            assert len({*sample.negatives.tolist()} - {-1}) == 3
            assert not np.isin(sample.negatives, dataset.train_sequences()[sample.user]).any()
            found.append(sample.negatives.tolist())
        return found

    first = epochs()
    assert first == epochs() and len({*map(tuple, first)}) > 1


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        ({"item_id": ["1"], "user_id": ["a"], "negative_id": ["2"]}, "one of the two"),
        ({"item_id": ["1"], "other": ["2"]}, "negative_id .*or negatives"),
        ({"negative_id": ["2"]}, "item_id .the target. or user_id"),
        ({"user_id": ["nobody"], "negative_id": ["FIRST"]}, r"1 of 1 users .* not in the dataset, such as 'nobody'"),
        ({"item_id": ["FIRST"], "negative_id": ["nothing"]}, "such as 'nothing'"),
        ({"item_id": ["FIRST", "FIRST"], "negatives": [["FIRST"], ["FIRST"]]}, r"item .* has the rows 1 and 2"),
        ({"item_id": ["FIRST"], "negative_id": ["FIRST"]}, "none of .* samples has a hard negative"),
    ],
)
def test_files_that_say_nothing_are_refused(
    drawn_dataset: Path, tmp_path: Path, columns: dict[str, Any], error: str
) -> None:
    first = Dataset(drawn_dataset).item_ids[0]
    text = json.dumps(columns).replace("FIRST", first)
    pl.DataFrame(json.loads(text)).write_parquet(tmp_path / "negatives.parquet")
    with pytest.raises(DataError, match=error):
        given(drawn_dataset, tmp_path / "negatives.parquet")


# --- mining -----------------------------------------------------------------------------------------------------
def mined(data: Path, folder: Path, **more: Any) -> Samples:
    dataset = Dataset(data)
    samples = Samples(dataset.train_sequences(), dataset.max_history, "all")
    add_hard_negatives(config(data, mine_from=folder, **more), dataset, samples)
    return samples


@pytest.mark.parametrize("margin", [1.0, 0.95, 0.5])
def test_mining_equals_a_search_by_hand(drawn_dataset: Path, tmp_path: Path, margin: float) -> None:
    dataset = Dataset(drawn_dataset)
    vectors = np.random.default_rng(0).normal(0.3, 1, (len(dataset.item_ids), 6)).astype(np.float32)
    vectors[7] = np.nan  # an item without a vector
    write_embeddings(tmp_path / "emb", dataset.item_ids, vectors)
    samples = mined(drawn_dataset, tmp_path / "emb", margin=margin, hard_negatives=3)

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    some = 0
    for place in range(len(samples)):
        sample, target = samples[place], vectors[samples[place].target]
        own = {int(row) for row in dataset.train_sequences()[sample.user]}
        history = vectors[[row for row in sample.history if row != 7]]
        expected: list[int] = []
        if sample.target != 7 and len(history):
            mean = history.mean(axis=0)
            positive = cosine(mean, target)
            candidates = [row for row in range(len(vectors)) if row not in own | {7}]
            kept = [r for r in candidates if cosine(mean, vectors[r]) <= positive - (1 - margin) * abs(positive)]
            expected = sorted(kept, key=lambda row: -cosine(vectors[row], target))[:3]
        assert [row for row in sample.negatives.tolist() if row >= 0] == expected
        some += len(expected)
    assert some


def test_an_export_of_other_items_is_refused_and_missing_ones_are_named(
    drawn_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = Dataset(drawn_dataset).item_ids
    vectors = np.random.default_rng(0).normal(size=(len(ids), 6)).astype(np.float32)
    write_embeddings(tmp_path / "others", [f"other-{n}" for n in range(9)], vectors[:9])
    with pytest.raises(ArtifactError, match="has none of the dataset's items"):
        mined(drawn_dataset, tmp_path / "others")
    write_embeddings(tmp_path / "some", ids[:-2], vectors[:-2])
    mined(drawn_dataset, tmp_path / "some", margin=1.0)
    told = " ".join(capsys.readouterr().err.split())
    assert f"2 of {len(ids)} items have no fused vector" in told and repr(ids[-2]) in told


# --- settings and runs ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"negatives_file": "n.csv", "mine_from": "emb"}, "--negatives-file with --mine-from"),
        ({"hard_negatives": 2}, "--hard-negatives 2 without --negatives-file or --mine-from"),
        ({"margin": 0.9, "negatives_file": "n.csv"}, r"--margin 0.9 without --mine-from"),
        ({"margin": 1.5, "mine_from": "emb"}, "margin = 1.5"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        check_settings(read_config(FinetuneConfig, None, (), {"data": "d", "backbone": "b", "out": "o", **values}))


@pytest.mark.parametrize("method", [name for name, recipe in METHODS.items() if "mine_from" not in recipe.own])
def test_other_methods_refuse_them_by_name(method: str) -> None:
    values = {"data": "d", "backbone": "b", "out": "o", "method": method, "mine_from": "emb"}
    with pytest.raises(ConfigError, match=f"--mine-from with --method {method}"):
        check_settings(read_config(FinetuneConfig, None, (), values))


def test_a_loss_that_takes_none_refuses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "own", LossRecipe("one more", lambda settings: InfoNCEObjective()))
    values = {"data": "d", "backbone": "b", "out": "o", "loss": "own", "mine_from": "emb"}
    with pytest.raises(ConfigError, match="--mine-from with --loss own, which takes no hard negatives"):
        check_settings(read_config(FinetuneConfig, None, (), values))


def test_a_missing_file_and_a_missing_export_are_named(tiny: Tiny, drawn_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    with pytest.raises(DataError, match=r"--negatives-file .*gone.parquet cannot be read"):
        finetune.run(settings(tiny, drawn_dataset, out, max_steps=1, negatives_file=tmp_path / "gone.parquet"))
    with pytest.raises(ArtifactError, match="gone"):
        finetune.run(settings(tiny, drawn_dataset, out, max_steps=1, mine_from=tmp_path / "gone"))
    assert not out.exists()


def test_a_run_records_its_negatives_and_goes_on_with_the_same_only(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path
) -> None:
    ids = Dataset(drawn_dataset).item_ids
    vectors = np.random.default_rng(0).normal(0.3, 1, (len(ids), 6)).astype(np.float32)
    write_embeddings(tmp_path / "emb", ids, vectors)
    write_embeddings(tmp_path / "later", ids, vectors + 1)
    same = settings(tiny, drawn_dataset, tmp_path / "adapter", max_steps=2, mine_from=tmp_path / "emb", margin=1.0)
    finetune.run(same)
    saved = json.loads((same.out / schema.ADAPTER_FILE).read_text())
    told = saved["training"]["loss_settings"]
    assert (told["mine_from"], told["margin"], told["hard_negatives"]) == (str(tmp_path / "emb"), 1.0, 4)
    row = json.loads((same.out / schema.CURVES_FILE).read_text())["train"][0]
    assert 0 < row["hard_negatives"] <= 4 and row["effective_negatives"] > row["hard_negatives"]
    assert "mine_from" in (same.out / "README.md").read_text()
    moved = (tmp_path / "emb").rename(tmp_path / "moved")
    assert finetune.run(dataclasses.replace(same, mine_from=moved)) is None
    for other in (
        {"mine_from": tmp_path / "later"},
        {"mine_from": moved, "hard_negatives": 2},
        {"mine_from": None, "margin": 0.95},
    ):
        with pytest.raises(ConfigError, match=r"begun with (mine_from|hard_negatives|margin) ="):
            finetune.run(dataclasses.replace(same, **{"margin": 1.0, **other}))  # type: ignore[arg-type]


def test_without_them_an_adapter_is_as_before(tiny: Tiny, drawn_dataset: Path, tmp_path: Path) -> None:
    same = settings(tiny, drawn_dataset, tmp_path / "adapter", max_steps=1)
    finetune.run(same)
    before = lora.fingerprint(same.out)
    saved = json.loads((same.out / schema.ADAPTER_FILE).read_text())
    names = {"negatives_file", "mine_from", "margin", "hard_negatives"}
    assert names.isdisjoint(saved["training"]["loss_settings"])
    for name in names:  # an adapter from before these settings
        del saved["config"][name]
    schema.write_json(same.out / schema.ADAPTER_FILE, sealed(saved))
    assert finetune.run(same) is None and lora.fingerprint(same.out) == before


def test_the_sources_are_what_samples_expect() -> None:
    samples = Samples([np.array([0, 1, 2])], max_history=3)
    samples.hard = GivenNegatives(2, schema.USER_ID, {0: np.array([2, 5], np.int32)})
    assert samples[0].negatives.tolist() == [5, -1]
    near, units = np.array([[5, 1, 4]], np.int32), np.eye(6, dtype=np.float32)
    samples.hard = MinedNegatives(
        2, 1.0, units, np.ones(6, np.float32), np.array([-1, -1, 0, -1, -1, -1], np.int32), near
    )
    assert samples[0].negatives.tolist() == [5, 4]
