"""`vlm2rec finetune` on a drawn catalogue with a tiny random Qwen2.5-VL: what it leaves, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from recommender_world import with_cold_items

from vlm2rec.embedder.backbones import lora
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ConfigError, DataError, ModelError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.pipelines import finetune
from vlm2rec.pipelines.config import FinetuneConfig

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
        "device": "cpu",
        **more,
    }
    return FinetuneConfig(**values)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(tiny: Tiny, drawn_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "adapter"
    finetune.run(settings(tiny, drawn_dataset, out, max_steps=5, checkpoint_steps=2))
    return out


def test_the_folder_is_complete_and_loads(tiny: Tiny, trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "canary.safetensors",
        "curves.json",
        "vlm2rec.json",
    }
    encoder = ItemEncoder.load(str(tiny("qwen2_5_vl")), trained, device="cpu", dtype="float32")
    assert encoder.settings.max_pixels == 56 * 56


def test_curves_hold_every_part_of_the_loss(trained: Path) -> None:
    curves = json.loads((trained / "curves.json").read_text())
    assert [row["step"] for row in curves["train"]] == [1, 2, 3, 4, 5]
    wanted = {"loss", "wpcl", "crtr", "margin_text", "margin_image", "weight", "alpha", "beta", "norm_ratio_user"}
    assert wanted | {"effective_negatives", "learning_rate"} <= curves["train"][0].keys()
    first = curves["train"][0]
    assert first["loss"] == pytest.approx(first["wpcl"] + 0.1 * first["crtr"], rel=1e-4)
    assert [row["step"] for row in curves["valid"]] == [0, 4, 5]


def test_provenance_names_what_made_the_adapter(trained: Path) -> None:
    saved = json.loads((trained / "vlm2rec.json").read_text())
    assert saved["training"]["steps"] == 5
    assert saved["encoder"]["prompt_mode"] == "raw"
    assert {"torch", "transformers", "peft"} <= saved["versions"].keys()
    assert "library_name: peft" in (trained / "README.md").read_text()


def test_a_finished_run_is_not_repeated_and_other_settings_are_refused(
    tiny: Tiny, drawn_dataset: Path, trained: Path
) -> None:
    same = settings(tiny, drawn_dataset, trained, max_steps=5, checkpoint_steps=2)
    assert finetune.run(same) is None
    with pytest.raises(ConfigError, match=r"begun with tau_crtr = 0.1, now it is 0.5"):
        finetune.run(dataclasses.replace(same, tau_crtr=0.5))


def test_alpha_and_beta_are_learned_without_weight_decay_or_kept_fixed(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path
) -> None:
    def betas(**more: object) -> list[float]:
        result = finetune.run(
            settings(tiny, drawn_dataset, tmp_path / str(len(list(tmp_path.iterdir()))), max_steps=3, **more)
        )
        assert result is not None
        return [row["beta"] for row in result.curves["train"]]

    learned, fixed = betas(weight_decay=0.0), betas(learnable=False)
    decayed = betas(weight_decay=0.9)
    assert learned[0] == pytest.approx(1.0) and learned[-1] < 1.0
    assert fixed == pytest.approx([1.0, 1.0, 1.0])
    assert decayed[1] == pytest.approx(learned[1], abs=1e-6)


def test_sft_trains_infonce_and_internal_fusion_goes_with_it_only(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path
) -> None:
    result = finetune.run(
        settings(tiny, drawn_dataset, tmp_path / "sft", loss="sft", fusion="internal", max_steps=2, users=16)
    )
    assert result is not None
    assert "wpcl" not in result.curves["train"][0]
    assert json.loads((tmp_path / "sft" / "vlm2rec.json").read_text())["dataset"]["users"] == 16
    with pytest.raises(ConfigError, match="no text and image vectors to balance"):
        finetune.run(settings(tiny, drawn_dataset, tmp_path / "x", fusion="internal"))


def test_training_lowers_the_loss(tiny: Tiny, drawn_dataset: Path, tmp_path: Path) -> None:
    config = settings(tiny, drawn_dataset, tmp_path / "a", loss="sft", max_steps=40, learning_rate=5e-3)
    result = finetune.run(dataclasses.replace(config, lora_dropout=0.0))
    assert result is not None
    losses = [row["loss"] for row in result.curves["train"]]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_gradient_checkpointing_changes_nothing(tiny: Tiny, drawn_dataset: Path, tmp_path: Path) -> None:
    losses = []
    for flag in (True, False):
        out = tmp_path / str(flag)
        result = finetune.run(settings(tiny, drawn_dataset, out, max_steps=3, gradient_checkpointing=flag))
        assert result is not None
        losses.append([row["loss"] for row in result.curves["train"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_fault_48_a_killed_run_goes_on_and_ends_like_an_uninterrupted_one(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = ["--data", str(drawn_dataset), "--backbone", str(tiny("qwen2_5_vl")), "--max-pixels", "3136"]
    arguments += ["--learning-rate", "1e-3", "--valid-users", "5", "--log-steps", "1", "--max-steps", "12"]
    arguments += ["--checkpoint-steps", "2", "--device", "cpu"]
    command = [str(Path(sys.executable).with_name("vlm2rec")), "finetune", *arguments, "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, str(cut)], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(cut.glob("checkpoints/checkpoint-[46]/trainer_state.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cut / "vlm2rec.json").exists(), "the run must have been cut before its end"
    subprocess.run([*command, str(cut)], env=environment, check=True, capture_output=True)
    subprocess.run([*command, str(whole)], env=environment, check=True, capture_output=True)
    rows = [json.loads((out / "curves.json").read_text())["train"] for out in (whole, cut)]
    assert [row["step"] for row in rows[1]] == list(range(1, 13))
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]], "in float32 on a CPU, to the bit"
    weights = [safetensors.torch.load_file(out / lora.WEIGHTS_FILE) for out in (whole, cut)]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_fault_50_a_loss_that_is_not_finite_stops_naming_step_and_users(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"the loss is nan at step \d+, with users .*\[\d+, "):
        finetune.run(settings(tiny, drawn_dataset, tmp_path / "nan", learning_rate=1e30, max_steps=20))


def test_no_resume_starts_anew_and_its_own_settings_count_from_then_on(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path
) -> None:
    diverging = settings(tiny, drawn_dataset, tmp_path / "a", learning_rate=1e30, max_steps=20, resume=False)
    with pytest.raises(ModelError):
        finetune.run(diverging)
    with pytest.raises(ConfigError, match=r"begun with learning_rate = 1e\+30, now it is 0.001"):
        finetune.run(dataclasses.replace(diverging, learning_rate=1e-3, resume=True))
    anew = finetune.run(dataclasses.replace(diverging, learning_rate=1e-3, max_steps=1))
    assert anew is not None and anew.steps == 1


# --- images that are not there, and items that nobody has touched ---------------------------------------------
def copied(dataset: Path, folder: Path, **meta: object) -> Path:
    """Copy a dataset folder and its images, side by side."""
    shutil.copytree(dataset, folder / "data")
    shutil.copytree(Dataset(dataset).image_root, folder / "images")
    known = json.loads((folder / "data/dataset.json").read_text())
    (folder / "data/dataset.json").write_text(json.dumps(known | {"image_root": "../images", **meta}))
    return folder / "data"


def test_without_the_image_folder_training_does_not_begin_and_goes_on_where_it_is_now(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path
) -> None:
    data = copied(drawn_dataset, tmp_path)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    chosen = settings(tiny, data, tmp_path / "adapter", max_steps=2)
    unknown = dataclasses.replace(chosen, backbone=str(tmp_path / "no backbone"))
    with pytest.raises(DataError, match=r"images, is missing.*--images"):
        finetune.run(unknown)  # before the backbone is looked for
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(ModelError):
        finetune.run(dataclasses.replace(unknown, views="text", loss="sft"))
    there = dataclasses.replace(chosen, images=tmp_path / "elsewhere")
    assert finetune.run(there) is not None
    (tmp_path / "elsewhere").rename(tmp_path / "images")
    assert finetune.run(chosen) is None  # the place of the images is no setting of what is learned


def test_a_dataset_without_pictures_trains_on_titles_and_is_refused_in_words_with_images(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path
) -> None:
    data = copied(drawn_dataset, tmp_path, image_root=None)
    items = pq.read_table(data / "items.parquet")
    nothing = pa.array([None] * len(items), pa.string())
    pq.write_table(items.set_column(2, "image_path", nothing), data / "items.parquet")
    with pytest.raises(DataError, match=r"was prepared without images.*--views text"):
        finetune.run(settings(tiny, data, tmp_path / "adapter", max_steps=1))
    chosen = settings(tiny, data, tmp_path / "adapter", max_steps=1, views="text", loss="sft", probe_users=0)
    assert finetune.run(chosen) is not None


@pytest.mark.parametrize("method", ["vlm2rec", "sda"])
def test_cold_items_leave_training_as_it_is(tiny: Tiny, drawn_dataset: Path, tmp_path: Path, method: str) -> None:
    more: dict[str, object] = {"max_steps": 2, "method": method}
    if method == "sda":
        more |= {"pooling": "mean", "prompt_style": "sda", "experts": 1, "lora_rank": 8}
    data = with_cold_items(drawn_dataset, tmp_path / "data")
    finetune.run(settings(tiny, drawn_dataset, tmp_path / "before", **more))
    finetune.run(settings(tiny, data, tmp_path / "with", **more))
    before, now = ((tmp_path / run / "adapter_model.safetensors").read_bytes() for run in ("before", "with"))
    assert before == now
