"""`finetune --matryoshka`: the loss over prefixes of the vectors, its records, and short vectors of such an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_finetune import settings

from vlm2rec.embedder.adapters import lora
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.checksums import sealed
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.embedder.training.losses import InfoNCEObjective, Matryoshka, Views, VLM2RecObjective
from vlm2rec.embedder.training.recipes import METHODS, check_settings
from vlm2rec.pipelines import evaluate, export_items, finetune
from vlm2rec.pipelines.config import EvaluateConfig, ExportConfig, FinetuneConfig
from vlm2rec.pipelines.read_config import read_config

Tiny = Callable[[str], Path]
TARGETS = torch.tensor([3, 1, 4, 1])


def sides(dim: int = 12) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(0)

    def views() -> dict[str, torch.Tensor]:
        text, image = (torch.randn(4, dim, generator=random, dtype=torch.float64).requires_grad_() for _ in range(2))
        return {schema.FUSED: text + image, schema.TEXT: text, schema.IMAGE: image}

    return views(), views()


def cut(views: Views, length: int) -> dict[str, torch.Tensor]:
    return {
        view: vectors[:, :length] / vectors[:, :length].norm(dim=1, keepdim=True) for view, vectors in views.items()
    }


@pytest.mark.parametrize("lengths", [(1,), (3, 5), (2, 4, 11)])
def test_infonce_is_the_mean_over_prefixes_of_length_one(lengths: tuple[int, ...]) -> None:
    users, items = sides()
    total, log = Matryoshka(InfoNCEObjective(0.2), lengths)(users, items, TARGETS)
    parts = [InfoNCEObjective(0.2)(cut(users, n), cut(items, n), TARGETS)[0] for n in (*lengths, 12)]
    torch.testing.assert_close(total, torch.stack(parts).mean())
    torch.testing.assert_close(torch.stack([log[f"loss_{n}"] for n in lengths]), torch.stack(parts[:-1]))
    gradients = torch.autograd.grad(total, users[schema.TEXT])[0]
    expected = torch.autograd.grad(torch.stack(parts).mean(), users[schema.TEXT])[0]
    torch.testing.assert_close(gradients, expected)


def test_the_paper_s_loss_of_a_prefix_is_that_of_vectors_of_that_length() -> None:
    users, items = sides()
    loss = VLM2RecObjective(lam=0.5)
    total, log = Matryoshka(loss, (4, 6))(users, items, TARGETS)
    parts = []
    for length in (4, 6, 12):
        short = [{view: vectors[:, :length] for view, vectors in side.items()} for side in (users, items)]
        parts.append(loss(*short, TARGETS)[0])
    torch.testing.assert_close(total, torch.stack(parts).mean())
    torch.testing.assert_close(log["wpcl"], loss(users, items, TARGETS)[1]["wpcl"])  # of whole vectors


@pytest.mark.parametrize("lengths", [(0, 4), (4, 4), (8, 4), (-1,)])
def test_lengths_that_are_none_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="rising order"):
        Matryoshka(InfoNCEObjective(), lengths)
    with pytest.raises(ConfigError, match=r"--matryoshka .*rising order"):
        check_settings(FinetuneConfig(data=Path("d"), backbone="b", out=Path("o"), matryoshka=lengths))


@pytest.mark.parametrize("method", [name for name, recipe in METHODS.items() if "matryoshka" not in recipe.own])
def test_other_methods_refuse_it_by_name(method: str) -> None:
    given = {"data": "d", "backbone": "b", "out": "o", "method": method, "matryoshka": [8, 16]}
    with pytest.raises(ConfigError, match=f"--matryoshka with --method {method}"):
        check_settings(read_config(FinetuneConfig, None, (), given))


def test_a_fusion_whose_prefixes_are_no_fusions_is_refused() -> None:
    given = {"data": "d", "backbone": "b", "out": "o", "matryoshka": [8], "fusion_norm": "normalised"}
    with pytest.raises(ConfigError, match="--fusion-norm normalised and --loss vlm2rec"):
        check_settings(read_config(FinetuneConfig, None, (), given))
    check_settings(read_config(FinetuneConfig, None, (), given | {"loss": "sft"}))


@pytest.fixture(scope="module")
def trained(tiny: Tiny, drawn_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "adapter"
    finetune.run(settings(tiny, drawn_dataset, out, max_steps=2, matryoshka=(8, 16)))
    return out


def test_the_adapter_records_the_lengths_and_the_curves_each_loss(trained: Path) -> None:
    saved = json.loads((trained / schema.ADAPTER_FILE).read_text())
    assert saved["config"]["matryoshka"] == saved["training"]["loss_settings"]["matryoshka"] == [8, 16]
    assert "matryoshka [8, 16]" in (trained / "README.md").read_text()
    row = json.loads((trained / schema.CURVES_FILE).read_text())["train"][0]
    whole = row["wpcl"] + 0.1 / 8 * row["crtr"]
    assert row["loss"] == pytest.approx((row["loss_8"] + row["loss_16"] + whole) / 3, rel=1e-4)


def test_the_same_command_is_done_and_other_lengths_are_refused(tiny: Tiny, drawn_dataset: Path, trained: Path) -> None:
    assert finetune.run(settings(tiny, drawn_dataset, trained, max_steps=2, matryoshka=(8, 16))) is None
    for other in ((), (8,)):
        with pytest.raises(ConfigError, match=r"begun with matryoshka = \[8, 16\]"):
            finetune.run(settings(tiny, drawn_dataset, trained, max_steps=2, matryoshka=other))


def test_an_adapter_from_before_the_setting_goes_on_being_the_same(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path
) -> None:
    same = settings(tiny, drawn_dataset, tmp_path / "adapter", max_steps=1)
    finetune.run(same)
    before = lora.fingerprint(same.out)
    file = same.out / schema.ADAPTER_FILE
    saved = json.loads(file.read_text())
    assert "matryoshka" not in saved["training"]["loss_settings"] and saved["config"].pop("matryoshka") == []
    schema.write_json(file, sealed(saved))
    assert finetune.run(same) is None and lora.fingerprint(same.out) == before


def test_lengths_beyond_the_backbone_s_are_refused_before_training(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--matryoshka 8,64, but the backbone's vectors have 64 dimensions"):
        finetune.run(settings(tiny, drawn_dataset, tmp_path / "adapter", matryoshka=(8, 64)))


def test_short_vectors_rank_with_sequence_users_as_long_as_they_are(
    tiny: Tiny, drawn_dataset: Path, trained: Path, tmp_path: Path
) -> None:
    backbone = str(tiny("qwen2_5_vl"))
    common = {"data": drawn_dataset, "backbone": backbone, "adapter": trained, "device": "cpu"}
    export_items.run(ExportConfig(**common, out=tmp_path / "short", dim=16, storage="int8"))  # type: ignore[arg-type]
    result = evaluate.run(
        EvaluateConfig(**common, embeddings=tmp_path / "short", out=tmp_path / "metrics")  # type: ignore[arg-type]
    )
    assert result["users_from"] == "sequence" and 0 <= result["candidates"]["f2f"]["N@20"] <= 1
