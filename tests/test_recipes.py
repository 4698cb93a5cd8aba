"""A loss and a training method are rows: new ones train through `finetune` without another file being touched."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sources import parsed
from torch import Tensor, nn

from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.training import losses
from vlm2rec.embedder.training.losses import InfoNCEObjective, VLM2RecLoss, VLM2RecObjective, info_nce
from vlm2rec.embedder.training.monitor import Collapse
from vlm2rec.embedder.training.recipes import LOSSES, METHODS, LossRecipe, Recipe
from vlm2rec.embedder.training.sda import ItemSamples
from vlm2rec.embedder.training.train import Model
from vlm2rec.pipelines import finetune
from vlm2rec.pipelines.config import FinetuneConfig
from vlm2rec.pipelines.finetune_probe import warning
from vlm2rec.pipelines.read_config import read_config

Tiny = Callable[[str], Path]
ROOT = Path(__file__).parents[1]


def settings(tiny: Tiny, data: Path, out: Path, **more: Any) -> FinetuneConfig:
    values: dict[str, Any] = {"data": data, "backbone": str(tiny("qwen2_5_vl")), "out": out, "device": "cpu"}
    values |= {"max_pixels": 56 * 56, "learning_rate": 1e-2, "valid_users": 5, "probe_users": 4, "log_steps": 1}
    return FinetuneConfig(**{**values, "max_steps": 3, **more})


def curves(out: Path) -> dict[str, list[dict[str, Any]]]:
    found = json.loads((out / "curves.json").read_text())
    assert isinstance(found, dict)
    return found


# --- a loss of one's own --------------------------------------------------------------------------------------
class Pull(nn.Module):
    """A toy: the mean squared distance of a user to the target item, times a scale that is learned."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.seen: list[tuple[list[str], list[int]]] = []

    def forward(
        self, users: Mapping[str, Tensor], items: Mapping[str, Tensor], targets: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen.append((list(users), targets.tolist()))
        distance = (users["fused"] - items["fused"]).square().mean()
        return self.scale.square() * distance, {"distance": distance, "scale": self.scale}


def refuse_internal(settings: Any) -> None:
    if settings.fusion == "internal":
        raise ConfigError("--fusion internal with --loss toy", "--fusion external", "change one of the two")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Pull]:
    """The losses that were built of the row `toy` of `LOSSES`, which takes its start from --lam."""
    built: list[Pull] = []

    def make(settings: Any) -> Pull:
        built.append(Pull(settings.lam))
        return built[-1]

    row = LossRecipe("a toy", make, refuse_internal, lambda settings, behind: ("--loss sft",) if behind else ())
    monkeypatch.setitem(LOSSES, "toy", row)
    return built


def test_a_new_loss_trains_by_its_row_and_learns_its_own_parameters(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, made: list[Pull]
) -> None:
    more: dict[str, Any] = {"loss": "toy", "lam": 0.5, "weight_decay": 0.9, "gradient_steps": 1, "lora_dropout": 0.0}
    result = finetune.run(settings(tiny, drawn_dataset, tmp_path / "a", **more))
    assert result is not None
    rows = curves(tmp_path / "a")["train"]
    assert [row["loss"] for row in rows] == pytest.approx([row["scale"] ** 2 * row["distance"] for row in rows])
    # what is common to all losses is logged by the model
    assert {"effective_negatives", "norm_ratio_user", "norm_ratio_item"} <= rows[0].keys()
    assert "margin_text" not in rows[0]
    # AdamW's first step is the learning rate; a decay would add 0.01 · 0.9 · 0.5 to it
    assert rows[0]["scale"] == 0.5 and rows[1]["scale"] == pytest.approx(0.5 - 1e-2, abs=1e-4)
    # gradients are compared with those of each modality alone, of which the loss knows nothing
    assert {"cos_total_text", "cos_total_image", "cos_text_image"} <= curves(tmp_path / "a")["gradients"][-1].keys()
    assert made[0].seen[0][0] == ["fused", "text", "image"] and len(made[0].seen[0][1]) == 8
    saved = json.loads((tmp_path / "a" / "vlm2rec.json").read_text())
    assert (saved["training"]["loss"], saved["config"]["loss"], saved["kind"]) == ("toy", "toy", "lora")
    ItemEncoder.load(str(tiny("qwen2_5_vl")), tmp_path / "a", dtype="float32", device="cpu")  # checks the canary


def test_a_loss_gets_the_views_that_the_encoder_makes(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, made: list[Pull]
) -> None:
    finetune.run(settings(tiny, drawn_dataset, tmp_path / "a", loss="toy", views="text", max_steps=1))
    assert made[0].seen[0][0] == ["fused", "text"]
    assert "norm_ratio_user" not in curves(tmp_path / "a")["train"][0]


def test_a_new_loss_brings_its_refusals_and_its_advice(tiny: Tiny, tmp_path: Path, made: list[Pull]) -> None:
    config = settings(tiny, tmp_path, tmp_path / "a", loss="toy")
    with pytest.raises(ConfigError, match="--fusion internal with --loss toy"):
        finetune.run(settings(tiny, tmp_path, tmp_path / "a", loss="toy", fusion="internal"))
    behind, flat = (Collapse(3, "text", rule, "seen") for rule in ("behind", "flat"))  # type: ignore[arg-type]
    assert warning([behind], config).endswith("Try --loss sft, or a --learning-rate below 0.01 or fewer steps.")
    assert warning([behind, flat], config).endswith("seen. Try a --learning-rate below 0.01 or fewer steps.")


# --- a method of one's own ------------------------------------------------------------------------------------
class Together(Model):
    """A toy: the text and the image vector of an item are drawn together."""

    def collate(self, batch: list[int]) -> dict[str, Any]:
        return {"rows": batch}

    def named(self, batch: dict[str, Any]) -> str:
        return f"items {batch['rows']}"

    def forward(  # type: ignore[override]
        self, rows: list[int], with_gradients: bool = False
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
        vectors = self.encode([[row] for row in rows])
        total = self.loss(vectors["text"], vectors["image"])
        return total, {"apart": total.detach()}, {}


def test_a_new_method_trains_by_its_row(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Recipe(
        help="a toy",
        own=("lam",),
        samples=lambda settings, dataset: ItemSamples(len(dataset.item_ids)),
        model=lambda settings, encoder, wrapped, items: Together(encoder, wrapped, items, nn.MSELoss()),
        title=lambda settings: "drawn together",
        advice=lambda settings, behind: ("something else",),
        shown=("apart",),
    )
    monkeypatch.setitem(METHODS, "toy", row)
    config = settings(tiny, drawn_dataset, tmp_path / "a", method="toy", lam=0.3, max_steps=8, lora_dropout=0.0)
    result = finetune.run(config)
    assert result is not None
    losses = [row["loss"] for row in curves(tmp_path / "a")["train"]]
    assert losses == [row["apart"] for row in curves(tmp_path / "a")["train"]] and losses[-1] < losses[0]
    saved = json.loads((tmp_path / "a" / "vlm2rec.json").read_text())
    assert (saved["training"]["method"], saved["training"]["loss"]) == ("toy", "drawn together")
    assert saved["training"]["effective_negatives"] is None
    assert saved["dataset"]["samples"] == 40 and saved["dataset"]["users"] == 0
    encoder = ItemEncoder.load(config.backbone, tmp_path / "a", dtype="float32", device="cpu")
    assert np.isfinite(encoder.encode_items(["Red mug"], [None]).fused).all()
    assert finetune.run(config) is None, "it is complete"
    assert "Try something else, or a --learning-rate" in warning([Collapse(3, "text", "flat", "seen")], config)
    # settings that it names are its own, settings of other methods are not
    with pytest.raises(ConfigError, match="--tau-crtr with --method toy, which has no such setting"):
        finetune.run(settings(tiny, drawn_dataset, tmp_path / "b", method="toy", tau_crtr=0.5))


# --- the rows that are there ----------------------------------------------------------------------------------
def test_the_rows_are_what_the_command_line_offers(made: list[Pull]) -> None:
    help_of = {field.name: field.metadata["help"] for field in fields(FinetuneConfig)}
    for name, rows in (("method", METHODS), ("loss", LOSSES)):
        assert all(f"{row}: " in help_of[name] for row in rows if row != "toy")
        given = {"data": "data", "backbone": "b", "out": "out"}
        for row in rows:
            assert getattr(read_config(FinetuneConfig, flags={**given, name: row}), name) == row
        with pytest.raises(ConfigError, match=f"--{name} 'vlm2re' is not known .did you mean 'vlm2rec'") as refused:
            read_config(FinetuneConfig, flags={**given, name: "vlm2re"})
        assert f"one of {', '.join(rows)}" in str(refused.value)


def test_settings_that_methods_name_are_settings_of_finetune() -> None:
    known = set(FinetuneConfig.__dataclass_fields__)
    for recipe in METHODS.values():
        assert {*recipe.own, *recipe.defaults} <= known


def test_losses_by_view_are_the_losses_themselves() -> None:
    random = torch.Generator().manual_seed(0)
    users, items = ({view: torch.randn(4, 6, generator=random) for view in ("fused", "text", "image")} for _ in "ui")
    targets = torch.tensor([3, 5, 3, 8])
    total, log = InfoNCEObjective(0.2)(users, items, targets)
    assert torch.equal(total, info_nce(users["fused"], items["fused"], targets, 0.2))
    assert list(log) == ["margin_text", "margin_image", "weak_is_image"]
    _, log = InfoNCEObjective()({"fused": users["fused"]}, {"fused": items["fused"]}, targets)
    assert log == {}
    loss = VLM2RecObjective(0.2, lam=0.5)
    total, log = loss(users, items, targets)
    parts = VLM2RecLoss(0.2, lam=0.5)(users["text"], users["image"], items["text"], items["image"], targets)
    assert torch.equal(total, parts.total) and torch.equal(log["crtr"], parts.crtr)
    assert torch.equal(log["margin_text"], parts.margin_text.mean())
    assert [name for name, _ in loss.named_parameters()] == ["raw_alpha", "raw_beta"], "as checkpoints name them"


# --- who may name them ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("file", ["finetune.py", "finetune_probe.py", "read_config.py"])
def test_the_commands_name_no_method_and_no_loss(file: str) -> None:
    tree = parsed(ROOT / "pipelines" / file)
    words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert words.isdisjoint({*METHODS, *LOSSES})
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    of_methods = {"training.sda", "training.vlm2rec", "training.losses", "training.samples", "adapters.moda"}
    assert imported.isdisjoint({f"vlm2rec.embedder.{module}" for module in of_methods})


@pytest.mark.parametrize("file", ["train.py", "vlm2rec.py"])
def test_the_trainer_and_the_model_of_histories_name_no_loss(file: str) -> None:
    tree = parsed(ROOT / "embedder" / "training" / file)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    every = {name for name, found in vars(losses).items() if isinstance(found, type) and issubclass(found, nn.Module)}
    assert {"VLM2RecLoss", "InfoNCEObjective"} <= every
    assert names.isdisjoint(every | {"info_nce"})
