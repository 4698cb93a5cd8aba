"""The collapse monitor inside `vlm2rec finetune`: what it records, what it says, and that it changes nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from vlm2rec.downstream.evaluation.geometry import effective_rank, geometry_from_rows
from vlm2rec.embedder.adapters import lora
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.item_features import ItemFeatures, encode_rows
from vlm2rec.embedder.training import train
from vlm2rec.embedder.training.monitor import Collapse
from vlm2rec.pipelines import finetune
from vlm2rec.pipelines import finetune_probe as collapse_probe
from vlm2rec.pipelines.catalogue.negatives import draw_validation_candidates
from vlm2rec.pipelines.config import FinetuneConfig
from vlm2rec.pipelines.finetune_probe import make_probe, warning

Tiny = Callable[[str], Path]


def settings(tiny: Tiny, data: Path, out: Path, **more: object) -> FinetuneConfig:
    values: dict[str, object] = {
        "data": data,
        "backbone": str(tiny("qwen2_5_vl")),
        "out": out,
        "max_pixels": 56 * 56,
        "learning_rate": 1e-3,
        "valid_users": 10,
        "log_steps": 1,
        "max_steps": 6,
        "probe_users": 6,
        "probe_steps": 2,
        "device": "cpu",
        **more,
    }
    return FinetuneConfig(**values)  # type: ignore[arg-type]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / lora.WEIGHTS_FILE)


def curves(folder: Path) -> dict[str, list[dict[str, Any]]]:
    found = json.loads((folder / schema.CURVES_FILE).read_text())
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def watched(tiny: Tiny, drawn_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with probe and gradients, dropout and gradient checkpointing on."""
    out = tmp_path_factory.mktemp("watched") / "adapter"
    assert finetune.run(settings(tiny, drawn_dataset, out, gradient_steps=2)) is not None
    return out


def test_the_probe_is_measured_before_the_first_step_at_its_interval_and_after_the_last(watched: Path) -> None:
    rows = curves(watched)["probe"]
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    for row in rows:
        for view in ("fused", "text", "image"):
            assert row[f"S_{view}"] == pytest.approx(row[f"A_neg_{view}"] / row[f"A_pos_{view}"], rel=1e-6)
            assert row[f"U_{view}"] <= 0 and row[f"rank_{view}"] > 1
        assert row["probe_users"] == 6 and row["seconds"] > 0
        assert {"norm_ratio_user", "norm_ratio_item"} <= row.keys()
    assert rows[0]["S_text"] != rows[-1]["S_text"]
    shares = [row["weak_is_image"] for row in curves(watched)["train"]]
    assert len(shares) == 6 and all(0 <= share <= 1 for share in shares)


def test_gradients_are_compared_before_the_first_step_and_at_their_interval(watched: Path) -> None:
    rows = curves(watched)["gradients"]
    assert [row["step"] for row in rows] == [0, 2, 4]
    for row in rows:
        assert all(-1 <= row[key] <= 1 for key in ("cos_total_text", "cos_total_image", "cos_text_image"))
        assert all(row[f"norm_{name}"] > 0 for name in ("total", "text", "image"))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_compared_on_one_batch_without_dropout(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, checkpointing: bool
) -> None:
    # weights that hardly move: rows differ only if the batch or the dropout does
    more: dict[str, Any] = {"learning_rate": 1e-12, "lora_dropout": 0.5, "gradient_steps": 1, "samples": "random"}
    out = tmp_path / "a"
    config = settings(tiny, drawn_dataset, out, gradient_checkpointing=checkpointing, probe_users=0, **more)
    assert finetune.run(config) is not None
    rows = curves(out)["gradients"]
    assert len(rows) == 6 and {row["fixed_batch"] for row in rows} == {config.batch_size}
    for row in rows:
        assert row == pytest.approx(rows[0] | {"step": row["step"]}, rel=1e-4)
    losses = [row["loss"] for row in curves(out)["train"]]
    assert np.ptp(losses) > 1e-3, "the batches of the steps differ"
    # and it is the batch that is recorded, in evaluation mode
    drawn = np.random.default_rng([config.seed, 5]).choice(30, config.batch_size, replace=False)
    recorded = json.loads((out / schema.ADAPTER_FILE).read_text())["training"]["gradient_batch"]
    assert recorded == f"users (rows of sequences.parquet) {drawn.tolist()}"


@pytest.mark.parametrize("loss", ["vlm2rec", "sft"])
def test_watching_changes_no_bit_of_what_is_learned(tiny: Tiny, drawn_dataset: Path, tmp_path: Path, loss: str) -> None:
    few: dict[str, Any] = {"loss": loss, "max_steps": 3}
    finetune.run(settings(tiny, drawn_dataset, tmp_path / "plain", probe_users=0, **few))
    finetune.run(settings(tiny, drawn_dataset, tmp_path / "watched", probe_steps=1, gradient_steps=1, **few))
    plain, watched = weights(tmp_path / "plain"), weights(tmp_path / "watched")
    assert plain.keys() == watched.keys()
    assert all(torch.equal(tensor, watched[name]) for name, tensor in plain.items())
    with_probe, without = curves(tmp_path / "watched"), curves(tmp_path / "plain")
    assert with_probe["train"] == [row | {} for row in without["train"]]
    assert with_probe["valid"] == without["valid"]
    assert without["probe"] == without["gradients"] == without["warnings"] == []
    assert len(with_probe["probe"]) == 4 and len(with_probe["gradients"]) == 3
    assert "weak_is_image" in without["train"][0]


@pytest.mark.parametrize("among", ["own", "stored"])
def test_a_probe_row_is_the_geometry_of_seeded_validation_users_and_their_first_candidates(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, among: str
) -> None:
    config = settings(tiny, drawn_dataset, tmp_path, probe_users=5, valid_candidates=among)
    dataset = Dataset(drawn_dataset)
    encoder = ItemEncoder.load(config.backbone, max_pixels=config.max_pixels, dtype="float32", device="cpu")
    probe = make_probe(config, dataset, encoder)
    assert probe is not None and probe.users == 5
    row = probe.measure()

    histories = dataset.histories("valid")
    users = np.sort(np.random.default_rng([0, 4]).choice(len(histories), 5, replace=False))
    items = ItemFeatures(dataset, encoder)
    user_vectors = encode_rows(encoder, items, [histories.of(int(user)).tolist() for user in users])["image"]
    everything = encode_rows(encoder, items, [[item] for item in range(len(dataset.item_ids))])["image"]
    own = draw_validation_candidates(dataset.train_sequences(), histories.targets, users, dataset.candidate_count)
    negatives = own[:, :4] if among == "own" else dataset.negatives(0)[users, :4]
    expected = geometry_from_rows(user_vectors, everything, histories.targets[users], negatives)
    shown = np.unique(np.concatenate([histories.targets[users], negatives.ravel()]))
    assert {name: row[f"{name}_image"] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert row["rank_image"] == pytest.approx(effective_rank(everything[shown]), rel=1e-3)


def test_internal_fusion_is_probed_on_its_fused_vectors_and_has_no_gradients_to_compare(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path
) -> None:
    config = settings(tiny, drawn_dataset, tmp_path / "a", loss="sft", fusion="internal", max_steps=2)
    result = finetune.run(config)
    assert result is not None
    assert "S_fused" in result.curves["probe"][0] and "S_text" not in result.curves["probe"][0]
    with pytest.raises(ConfigError, match="gradients of text and image vectors"):
        finetune.run(dataclasses.replace(config, out=tmp_path / "b", gradient_steps=1))


def test_a_resumed_run_keeps_the_history_of_the_probe(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, watched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tiny, drawn_dataset, tmp_path / "cut", gradient_steps=2, checkpoint_steps=3)
    _cut_at(4, config, monkeypatch)
    assert finetune.run(config) is not None
    whole, resumed = curves(watched), curves(config.out)
    for key in ("probe", "gradients"):
        assert [row["step"] for row in resumed[key]] == [row["step"] for row in whole[key]]
        for ours, theirs in zip(resumed[key], whole[key], strict=True):
            ours.pop("seconds", None), theirs.pop("seconds", None)
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_a_probe_of_other_users_starts_a_history_of_its_own(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tiny, drawn_dataset, tmp_path / "cut", checkpoint_steps=3)
    _cut_at(4, config, monkeypatch)
    assert finetune.run(dataclasses.replace(config, probe_users=4)) is not None
    assert [(row["step"], row["probe_users"]) for row in curves(config.out)["probe"]] == [(3, 4), (4, 4), (6, 4)]


def _cut_at(step: int, config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until a step and stop as Ctrl-C would."""

    def interrupt(self: object, args: object, state: Any, control: object, **_: object) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train._Watch, "on_step_begin", interrupt, raising=False)
        with pytest.raises(KeyboardInterrupt):
            finetune.run(config)
    assert not (config.out / schema.ADAPTER_FILE).exists()


def test_a_space_that_draws_together_is_told_with_numbers_and_recorded(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # CRTR alone is least where every vector is the same
    config = settings(
        tiny, drawn_dataset, tmp_path / "a", wpcl=False, lam=50.0, learning_rate=3e-2, max_steps=24, lora_dropout=0.0
    )
    assert finetune.run(config) is not None
    said = " ".join(capsys.readouterr().err.split())
    recorded = curves(config.out)["warnings"]
    assert json.loads((config.out / schema.ADAPTER_FILE).read_text())["training"]["collapse"] == recorded != []
    assert {("text", "narrow"), ("image", "narrow")} <= {(entry["view"], entry["rule"]) for entry in recorded}
    for entry in recorded:
        assert f"Collapse at step {entry['step']}: " in said and entry["message"] in said
    assert "Try a smaller --lam (now 50)" in said


def test_the_advice_fits_the_loss_and_the_rule(tiny: Tiny, tmp_path: Path) -> None:
    behind, narrow = (Collapse(30, "image", rule, "what was seen") for rule in ("behind", "narrow"))  # type: ignore[arg-type]
    vlm2rec = settings(tiny, tmp_path, tmp_path)
    sft = dataclasses.replace(vlm2rec, loss="sft")
    assert warning([behind], sft).startswith("Collapse at step 30: what was seen. Try --loss vlm2rec")
    assert "a larger --beta (it starts at 1)" in warning([behind], vlm2rec)
    assert "seen; what was seen. Try a smaller --lam (now 0.1)" in warning([behind, narrow], vlm2rec)
    assert "--lam" not in warning([narrow], sft) and "--learning-rate below 0.001" in warning([narrow], sft)


def test_a_run_s_warnings_are_one_line_of_its_summary() -> None:
    line = collapse_probe.describe(
        [
            {"step": 30, "view": "image", "rule": "behind", "until": 50},
            {"step": 40, "view": "text", "rule": "narrow", "until": None},
        ]
    )
    assert line == "image falls behind, from step 30 until step 50; text in one point, from step 40 to the end"
