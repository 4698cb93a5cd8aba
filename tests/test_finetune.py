"""`vlm2rec finetune` on a drawn catalogue with a tiny random Qwen2.5-VL: what it leaves, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from children import COMMAND, Forked, command
from recommender_world import with_cold_items
from transformers import TrainerState

from vlm2rec.embedder import memory
from vlm2rec.embedder.adapters import lora
from vlm2rec.embedder.adapters.lora import read_adapter
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, DataError, ModelError
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.settings import fingerprint_of
from vlm2rec.embedder.training import checkpoints, train
from vlm2rec.embedder.training.recipes import METHODS
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


def test_a_backbone_that_has_moved_is_the_same_and_another_one_is_refused(
    tiny: Tiny, trained: Path, drawn_dataset: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(tiny("qwen2_5_vl"), tmp_path / "elsewhere")
    same = settings(tiny, drawn_dataset, trained, max_steps=5, checkpoint_steps=2, backbone=str(moved))
    assert finetune.run(same) is None
    (moved / "preprocessor_config.json").write_text((moved / "preprocessor_config.json").read_text() + " ")
    with pytest.raises(ConfigError, match="begun with processor_hash"):
        finetune.run(same)


def test_vlm2rec_json_tells_data_loss_and_backbone(tiny: Tiny, trained: Path, drawn_dataset: Path) -> None:
    saved = json.loads((trained / "vlm2rec.json").read_text())
    assert saved["dataset"]["sha256"] == json.loads((drawn_dataset / "dataset.json").read_text())["sha256"]
    assert (saved["training"]["method"], saved["training"]["loss"]) == ("vlm2rec", "vlm2rec")
    assert saved["training"]["loss_settings"]["lam"] == 0.1
    found = fingerprint_of(str(tiny("qwen2_5_vl")), trained, device="cpu")["made_with"]
    assert found["adapter"]["training"]["loss_settings"] == saved["training"]["loss_settings"]
    assert found["adapter"]["dataset"] == {name: saved["dataset"][name] for name in ("name", "sha256")}


def test_curves_hold_every_part_of_the_loss(trained: Path) -> None:
    curves = json.loads((trained / "curves.json").read_text())
    assert [row["step"] for row in curves["train"]] == [1, 2, 3, 4, 5]
    wanted = {"loss", "wpcl", "crtr", "margin_text", "margin_image", "weight", "alpha", "beta", "norm_ratio_user"}
    assert wanted | {"effective_negatives", "learning_rate"} <= curves["train"][0].keys()
    first = curves["train"][0]
    assert first["loss"] == pytest.approx(first["wpcl"] + 0.1 / 8 * first["crtr"], rel=1e-4)  # 8 users
    assert first["weight_min"] <= first["weight"] <= first["weight_max"]
    assert [row["step"] for row in curves["valid"]] == [0, 4, 5]


def test_provenance_names_what_made_the_adapter(trained: Path) -> None:
    saved = json.loads((trained / "vlm2rec.json").read_text())
    assert saved["training"]["steps"] == 5
    assert saved["encoder"]["prompt_mode"] == "raw"
    assert {"torch", "transformers", "peft"} <= saved["versions"].keys()
    assert "library_name: peft" in (trained / "README.md").read_text()


def test_a_validation_says_how_far_it_is(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    @contextmanager
    def progress(description: str, total: int | None) -> Iterator[Callable[..., None]]:
        yield lambda count, *, total=None, description=None: said.append(str(description))

    monkeypatch.setattr(finetune, "progress", progress)
    finetune.run(settings(tiny, drawn_dataset, tmp_path / "adapter", max_steps=1))
    first = said[: next(n for n, text in enumerate(said) if text.startswith("finetune"))]
    assert first[:2] == ["validation, 0% of 10 users", "validation, 100% of 10 users"]
    assert first[-1].startswith("validation, 100% of ") and first[-1].endswith(" items")
    assert said[-1].startswith("validation, 100%"), "and once more after the only epoch"


def test_a_finished_run_is_not_repeated_and_other_settings_are_refused(
    tiny: Tiny, drawn_dataset: Path, trained: Path
) -> None:
    same = settings(tiny, drawn_dataset, trained, max_steps=5, checkpoint_steps=2)
    assert finetune.run(same) is None
    with pytest.raises(ConfigError, match=r"begun with tau_crtr = 0.1, now it is 0.5") as refused:
        finetune.run(dataclasses.replace(same, tau_crtr=0.5, seed=7))
    assert "; seed = 0, now it is 7" in refused.value.found, "all that differs is named"
    assert refused.value.fix.endswith("--no-resume to start again, which replaces its adapter")


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


def test_alpha_and_beta_can_have_a_learning_rate_of_their_own(tiny: Tiny, drawn_dataset: Path, tmp_path: Path) -> None:
    def last(name: str, **more: object) -> dict[str, float]:
        result = finetune.run(settings(tiny, drawn_dataset, tmp_path / name, max_steps=3, **more))
        assert result is not None
        return result.curves["train"][-1]

    slow, quick = last("slow", learning_rate=1e-5), last("quick", learning_rate=1e-5, loss_learning_rate=0.1)
    assert abs(slow["beta"] - 1) < 1e-3 and abs(quick["beta"] - 1) > 0.05
    recorded = json.loads((tmp_path / "quick" / "vlm2rec.json").read_text())["config"]
    assert (recorded["loss_learning_rate"], recorded["max_grad_norm"], recorded["reduction"]) == (0.1, 1.0, "paper")


def test_the_gradient_is_clipped_as_told(tiny: Tiny, drawn_dataset: Path, tmp_path: Path) -> None:
    def weights(name: str, **more: object) -> dict[str, torch.Tensor]:
        # SGD's steps would show it at once; AdamW's first step has the same size for any gradient but a vanishing one
        finetune.run(settings(tiny, drawn_dataset, tmp_path / name, max_steps=2, **more))
        return safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors")

    clipped, free, vanishing = weights("a"), weights("b", max_grad_norm=0.0), weights("c", max_grad_norm=1e-9)
    assert any(not torch.equal(clipped[key], free[key]) for key in clipped)
    moved = {key: float((vanishing[key] - clipped[key]).abs().max()) for key in clipped if "lora_B" in key}
    assert max(moved.values()) > 1e-4  # AdamW's epsilon swallows what is left of the gradient


def test_an_adapter_from_before_the_reductions_reads_as_mean(
    tiny: Tiny, drawn_dataset: Path, trained: Path, tmp_path: Path
) -> None:
    old = shutil.copytree(trained, tmp_path / "old")
    recorded = json.loads((old / "vlm2rec.json").read_text())
    assert recorded["config"].pop("reduction") == "paper"
    del recorded["seal"]  # nor were there seals
    (old / "vlm2rec.json").write_text(json.dumps(recorded))
    assert read_adapter(old)["config"]["reduction"] == "mean"
    same = settings(tiny, drawn_dataset, old, max_steps=5, checkpoint_steps=2)
    with pytest.raises(ConfigError, match=r"begun with reduction = 'mean', now it is 'paper'"):
        finetune.run(same)
    assert finetune.run(dataclasses.replace(same, reduction="mean")) is None
    recorded["config"]["loss"] = "sft"  # which has no such balance
    (old / "vlm2rec.json").write_text(json.dumps(recorded))
    assert finetune.run(dataclasses.replace(same, loss="sft")) is None


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


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "idefics3", "llava_onevision", "qwen3_5", "smolvlm"])
def test_families_that_pack_in_their_own_way_train_like_the_others(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, family: str
) -> None:
    wanted = settings(tiny, drawn_dataset, tmp_path / "adapter", backbone=str(tiny(family)), max_steps=2, probe_users=0)
    result = finetune.run(dataclasses.replace(wanted, gradient_checkpointing=True))
    assert result is not None and result.steps == 2
    learned = safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in learned.items() if ".lora_B." in name)
    ItemEncoder.load(str(tiny(family)), tmp_path / "adapter", device="cpu", dtype="float32")  # checks the canary


def test_auto_trains_a_wide_model_in_the_processors_own_format_and_a_run_keeps_its_own(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny("qwen2_5_vl"), tmp_path / "wide")
    config = json.loads((tmp_path / "wide/config.json").read_text())
    config["text_config"] |= {"hidden_size": 512}
    (tmp_path / "wide/config.json").write_text(json.dumps(config))
    narrow = settings(tiny, drawn_dataset, tmp_path / "adapter", max_steps=4, checkpoint_steps=1)
    wide = dataclasses.replace(narrow, backbone=str(tmp_path / "wide"))
    assert [finetune._training_dtype(each) for each in (narrow, wide)] == ["float32", "auto"]
    assert finetune._training_dtype(dataclasses.replace(narrow, dtype="bfloat16")) == "bfloat16"
    for recorded, expected in (({"trained_in": "bfloat16"}, "bfloat16"), ({}, "float32")):
        (tmp_path / "adapter/checkpoints").mkdir(parents=True, exist_ok=True)
        (tmp_path / "adapter/checkpoints/run.json").write_text(json.dumps({"users_a_step": 8, **recorded}))
        assert finetune._training_dtype(wide) == expected  # earlier versions trained in float32, and recorded nothing
        assert finetune._training_dtype(dataclasses.replace(wide, resume=False)) == "auto"


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
    process = Forked(COMMAND, "finetune", *arguments, "--out", cut)
    deadline = time.monotonic() + 120
    while not list(cut.glob("checkpoints/checkpoint-[46]/trainer_state.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert not (cut / "vlm2rec.json").exists(), "the run must have been cut before its end"
    for out in (cut, whole):
        ended = command("finetune", *arguments, "--out", out)
        assert ended.returncode == 0, ended.stderr
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
    with pytest.raises(ConfigError, match=r"begun with learning_rate = 1e\+30, now it is 0.001.*checkpoint yet"):
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


# --- killed at any moment -----------------------------------------------------------------------------------
class Killed(BaseException):
    """Stands for SIGKILL where only the moment matters: nobody catches it."""


def short(tiny: Tiny, data: Path, out: Path, **more: object) -> FinetuneConfig:
    """Three steps an epoch, seven in all: the last epoch is cut short, and no point of the curves is at its end."""
    small = {"loss": "sft", "users": 12, "batch_size": 4, "max_steps": 7, "log_steps": 5, "valid_users": 6}
    return settings(tiny, data, out, **{**small, "probe_users": 4, "probe_steps": 2, "vision_cache": "off", **more})


@pytest.fixture(scope="module")
def undisturbed(tiny: Tiny, drawn_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    finetune.run(short(tiny, drawn_dataset, out))
    return out


def curves(out: Path) -> Any:
    found = json.loads((out / "curves.json").read_text())
    for row in found["probe"]:
        del row["seconds"]
    return found


def assert_same(out: Path, undisturbed: Path) -> None:
    assert curves(out) == curves(undisturbed)
    for name in (lora.WEIGHTS_FILE, lora.CANARY_FILE):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes()
    assert {path.name for path in out.iterdir()} == {path.name for path in undisturbed.iterdir()}


def at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, after: bool = False) -> None:
    """End the run at a call of a function, counted from 1, before it does anything or after it has done all."""
    plain, calls = getattr(owner, name), 0

    def ending(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            raise Killed
        found = plain(*given, **named)
        if calls == call:
            raise Killed
        return found

    monkeypatch.setattr(owner, name, ending)


def half_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(self: TrainerState, path: str) -> None:
        Path(path).touch()
        if self.global_step == 4:
            raise Killed
        plain(self, path)

    plain = TrainerState.save_to_json
    monkeypatch.setattr(TrainerState, "save_to_json", opened)


MOMENTS: dict[str, tuple[int, Callable[[pytest.MonkeyPatch], None]]] = {
    "trainer_state.json is opened": (1, half_a_state),
    "before a checkpoint has its checksums": (2, lambda m: at(m, checkpoints, "finish", 2)),
    "between an epoch's last checkpoint and its validation": (3, lambda m: at(m, train._Watch, "on_epoch_end", 1)),
    "during the validation of an epoch": (1, lambda m: at(m, finetune, "encode_rows_together", 3)),
    "after a validation, long after a checkpoint": (2, lambda m: at(m, train._Watch, "on_epoch_end", 2, after=True)),
    "before the last validation": (3, lambda m: at(m, train._Watch, "on_epoch_end", 3)),
    "after the last validation": (100, lambda m: at(m, train._Watch, "finish", 1)),
    "before the adapter is published": (2, lambda m: at(m, finetune, "save_adapter", 1)),
    "while the adapter is published": (2, lambda m: at(m, lora, "checksums", 1)),
    "when only the checkpoints have to go": (2, lambda m: at(m, checkpoints, "discard", 1)),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_fault_48_killed_at_any_moment_the_same_command_gives_the_same_to_the_bit(
    moment: str, tiny: Tiny, drawn_dataset: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every, kill = MOMENTS[moment]
    config = short(tiny, drawn_dataset, tmp_path / "out", checkpoint_steps=every)
    with monkeypatch.context() as patch:
        kill(patch)
        with pytest.raises(Killed):
            finetune.run(config)
    finetune.run(config)
    assert_same(config.out, undisturbed)


@pytest.fixture(scope="module")
def cut(tiny: Tiny, drawn_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
    """A run that was killed after step 4, with its two newest checkpoints."""
    out = tmp_path_factory.mktemp("cut") / "out"
    config = short(tiny, drawn_dataset, out, checkpoint_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        at(patch, checkpoints, "finish", 4, after=True)
        with pytest.raises(Killed):
            finetune.run(config)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["checkpoint-3", "checkpoint-4", "run.json"]
    return config


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": flip,
    "empty": lambda path: os.truncate(path, 0),
    "shorter": lambda path: os.truncate(path, path.stat().st_size - 2),
    "missing": Path.unlink,
}
CHECKPOINT = ("trainable", "best", "optimizer", "process-0")
CHECKPOINT_FILES = (*(f"{name}.safetensors" for name in CHECKPOINT), "trainer_state.json", "checksums.json")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", CHECKPOINT_FILES)
def test_any_damage_to_a_checkpoint_is_named_and_the_one_before_is_taken(
    file: str, damage: str, cut: FinetuneConfig, tmp_path: Path
) -> None:
    shutil.copytree(cut.out / "checkpoints", tmp_path / "checkpoints")
    DAMAGES[damage](tmp_path / "checkpoints" / "checkpoint-4" / file)
    told = Told()
    assert checkpoints.newest_whole(tmp_path / "checkpoints", told) == tmp_path / "checkpoints" / "checkpoint-3"
    (line,) = told.lines
    assert "checkpoint-4 is damaged" in line and file in line and "from step 3" in line
    assert not (tmp_path / "checkpoints" / "checkpoint-4").exists()


class Told:
    draws_bars = True

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str, *, warning: bool = False) -> None:
        self.lines.append(text)

    def progress(self, description: str, total: int | None) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("damaged", [("checkpoint-4",), ("checkpoint-3", "checkpoint-4")])
def test_a_run_with_damaged_checkpoints_goes_on_and_gives_the_same(
    damaged: tuple[str, ...], cut: FinetuneConfig, tmp_path: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(cut, out=tmp_path / "out")
    shutil.copytree(cut.out, config.out)
    for name in damaged:
        flip(config.out / "checkpoints" / name / "optimizer.safetensors")
    finetune.run(config)
    assert "is damaged: optimizer.safetensors does not have the bytes" in " ".join(capsys.readouterr().err.split())
    assert_same(config.out, undisturbed)


class Boom:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("boom",))


def test_planted_pickles_stay_unread_and_stand_where_they_are(
    cut: FinetuneConfig, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(cut, out=tmp_path / "out")
    shutil.copytree(cut.out, config.out)
    newest = config.out / "checkpoints" / "checkpoint-4"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin"):
        (newest / name).write_bytes(pickle.dumps(Boom()))
    with pytest.raises(ConfigError, match=r"checkpoint-4/scaler.pt, checkpoints/checkpoint-4/training_args.bin"):
        finetune.run(config)
    for name in ("scaler.pt", "training_args.bin"):
        (newest / name).unlink()
    finetune.run(config)
    assert not (tmp_path / "boom").exists()
    assert_same(config.out, undisturbed)


def test_a_checkpoint_of_an_earlier_version_is_refused_in_words(cut: FinetuneConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(cut, out=tmp_path / "out")
    shutil.copytree(cut.out, config.out)
    newest = config.out / "checkpoints" / "checkpoint-4"
    (newest / "checksums.json").unlink()
    (newest / "optimizer.pt").write_bytes(pickle.dumps(Boom()))
    with pytest.raises(ArtifactError, match=r"earlier version of vlm2rec.*--no-resume starts this training again"):
        finetune.run(config)
    assert (newest / "optimizer.pt").exists()


# --- whose folder is it? ------------------------------------------------------------------------------------
FOREIGN = (*lora.FILES, "checkpoints/mine", "checkpoints/run.json", "checkpoints/checkpoint-4/model.safetensors")


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("name", [*FOREIGN, "thesis.tex"])
def test_files_that_finetune_has_not_written_are_refused_before_any_work(
    name: str, resume: bool, tiny: Tiny, tmp_path: Path
) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("precious")
    with pytest.raises(ConfigError, match=Path(name).name):
        finetune.run(settings(tiny, tmp_path / "no data", tmp_path, resume=resume))
    assert (tmp_path / name).read_text() == "precious"


@pytest.mark.parametrize("name", ["README.md", "checkpoints/notes.txt", "checkpoints/checkpoint-4/notes.txt"])
def test_a_file_laid_into_an_unfinished_run_is_not_replaced(name: str, cut: FinetuneConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(cut, out=tmp_path / "out")
    shutil.copytree(cut.out, config.out)
    (config.out / name).write_text("precious")
    for resume in (True, False):
        with pytest.raises(ConfigError, match=name):
            finetune.run(dataclasses.replace(config, resume=resume))
    assert (config.out / name).read_text() == "precious"


def test_trained_again_only_files_of_finetune_are_replaced(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = short(tiny, drawn_dataset, tmp_path / "out", resume=False)
    shutil.copytree(undisturbed, config.out)
    (config.out / "notes.txt").write_text("precious")
    card = (config.out / "README.md").read_text()
    (config.out / "README.md").write_text("my own card")
    with pytest.raises(ConfigError, match=r"has not written.*README.md"):
        finetune.run(config)
    assert (config.out / "README.md").read_text() == "my own card"
    (config.out / "README.md").write_text(card)
    with monkeypatch.context() as patch:  # what is left of the old adapter is known as that
        at(patch, Path, "unlink", 2)
        with pytest.raises(Killed):
            finetune.run(config)
    finetune.run(dataclasses.replace(config, resume=True))
    assert (config.out / "notes.txt").read_text() == "precious"
    (config.out / "notes.txt").unlink()
    assert_same(config.out, undisturbed)


def test_fault_08_a_second_training_into_one_folder_is_refused(tiny: Tiny, drawn_dataset: Path, tmp_path: Path) -> None:
    config = short(tiny, drawn_dataset, tmp_path / "out")
    with checkpoints.alone(config.out / "checkpoints"):
        for resume in (True, False):
            with pytest.raises(ArtifactError, match="another finetune is writing to"):
                finetune.run(dataclasses.replace(config, resume=resume))
    assert not config.out.exists(), "nothing was written"


# --- the disk -----------------------------------------------------------------------------------------------
@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Limit how large files may grow, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("owner", "name", "most"),
    [
        (finetune, "_remember_run", 10),
        (checkpoints, "write_tensors", 10),
        (checkpoints, "write_tensors", 3000),
        (checkpoints, "finish", 100),
        (finetune, "save_adapter", 10),
        (finetune, "save_adapter", 3000),
    ],
)
def test_fault_05_a_full_disk_ends_in_words_and_the_same_command_goes_on(
    owner: Any,
    name: str,
    most: int,
    cut: FinetuneConfig,
    tmp_path: Path,
    undisturbed: Path,
    small_files: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = dataclasses.replace(cut, out=tmp_path / "out")
    shutil.copytree(cut.out, config.out)
    plain = getattr(owner, name)

    def without_room(*given: Any, **named: Any) -> Any:
        small_files(most)  # not longer than needed, as pytest keeps what is printed in files too
        try:
            return plain(*given, **named)
        finally:
            small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, without_room)
        with pytest.raises(ArtifactError) as refusal:
            finetune.run(config)
    assert refusal.value.exit_code == 5
    assert "File too large" in str(refusal.value) and "run the same command again" in str(refusal.value)
    assert not list(config.out.rglob("*.tmp")) and not (config.out / schema.ADAPTER_FILE).exists()
    finetune.run(config)
    assert_same(config.out, undisturbed)


def test_every_file_has_the_mode_that_the_umask_gives(undisturbed: Path, cut: FinetuneConfig) -> None:
    plain = undisturbed.parent / "plain"
    plain.touch()
    for file in (path for folder in (undisturbed, cut.out) for path in folder.rglob("*") if path.is_file()):
        assert file.stat().st_mode == plain.stat().st_mode, file


# --- --dry-run --------------------------------------------------------------------------------------------------
def everything_below(*folders: Path) -> dict[Path, tuple[int, int]]:
    found = {path: path.stat() for folder in folders for path in folder.rglob("*")}
    return {path: (state.st_size, state.st_mtime_ns) for path, state in found.items()}


def rehearsed(config: FinetuneConfig, **more: object) -> dict[str, Any]:
    found = finetune.run(dataclasses.replace(config, dry_run=True, **more))  # type: ignore[arg-type]
    assert isinstance(found, dict)
    return found


def test_a_dry_run_counts_steps_time_and_memory_and_writes_nothing(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = settings(tiny, drawn_dataset, tmp_path / "adapter", vision_cache="auto", epochs=2)
    before = everything_below(drawn_dataset)
    found = rehearsed(chosen)
    assert everything_below(drawn_dataset) == before and not list(tmp_path.iterdir())
    trained = len(Dataset(drawn_dataset).user_ids)
    assert (found["samples"], found["batch"], found["at_once"]) == (trained, 8, 8)
    assert found["steps"] == found["steps_left"] == 2 * -(-trained // 8)
    assert found["step_seconds"] > 0 and found["seconds"] == found["step_seconds"] * found["steps"]
    assert found["tokens"] > 8 * 20 and 8 < found["images"] <= 8 * 11
    assert 0 < found["more"] <= found["first"] and found["vision"] > 0 and found["features"] > 0
    assert found["fits"]["A10G, L4: 24 GB"] > 1000
    told = " ".join(capsys.readouterr().err.split())
    assert "nothing was written" in told and "H200: 141 GB" in told and "licence not stated here" in told
    json.dumps(found)


def test_what_a_dry_run_says_of_memory_is_what_a_training_holds(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real steps, whose batches have the longest histories four times, against the sum of the estimate."""
    found = rehearsed(settings(tiny, drawn_dataset, tmp_path / "adapter", batch_size=4))
    held: list[int] = []

    def counted(model: Any, samples: Any, out: Path, settings: Any, *_: Any) -> None:
        model.loss.to("cpu")
        optimizer = train._optimizer(model, settings)
        longest = sorted((samples[n] for n in range(len(samples))), key=lambda each: len(each.history))[-4:]
        train._checkpointing(model.encoder.backbone.language_model, "enable", train._RECOMPUTED)
        model.train()
        with torch.no_grad():
            model(**model.collate(longest))  # the images are known
        weights = [*model.parameters(), *model.buffers()]
        with memory.counted(torch.device("cpu"), weights) as count:
            for _ in range(2):
                model(**model.collate(longest))[0].backward()
                optimizer.step()
                optimizer.zero_grad()
        held.append(count.peak)
        state = [tensor for each in optimizer.state.values() for name, tensor in each.items() if name != "step"]
        held.append(memory.bytes_of(state))
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        finetune.run(settings(tiny, drawn_dataset, tmp_path / "adapter", batch_size=4))
    peak, state = held
    assert found["optimizer"] == state
    assert found["optimizer"] + found["first"] + 3 * found["more"] == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("method", ["sda", "llm2rec"])
def test_a_dry_run_knows_every_method(tiny: Tiny, drawn_dataset: Path, tmp_path: Path, method: str) -> None:
    own = METHODS[method].defaults | {"batch_size": 4, "method": method}
    found = rehearsed(settings(tiny, drawn_dataset, tmp_path / "adapter", **own))
    assert found["batch"] == 4 and found["first"] > 0 and not list(tmp_path.iterdir())


def test_a_dry_run_of_a_run_that_goes_on_tells_what_is_left_and_leaves_it_alone(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path
) -> None:
    chosen = settings(tiny, drawn_dataset, tmp_path / "adapter", max_steps=4, checkpoint_steps=1, probe_users=0)
    finetune.run(chosen)
    assert finetune.run(dataclasses.replace(chosen, dry_run=True)) is None
    with pytest.raises(ConfigError, match=r"begun with tau_crtr"):
        rehearsed(chosen, tau_crtr=0.5)
    folder = tmp_path / "begun/checkpoints/checkpoint-3"
    folder.mkdir(parents=True)
    (folder / "checksums.json").write_text("{}")
    (folder.parent / "run.json").write_text(json.dumps(finetune._identity(chosen) | {"users_a_step": 8}))
    before = everything_below(tmp_path / "begun")
    found = rehearsed(chosen, out=tmp_path / "begun")
    assert (found["steps"], found["steps_left"]) == (4, 1) and everything_below(tmp_path / "begun") == before


def test_a_dry_run_refuses_what_a_training_would(tiny: Tiny, drawn_dataset: Path, tmp_path: Path) -> None:
    chosen = settings(tiny, drawn_dataset, tmp_path / "adapter")
    with pytest.raises(ModelError):
        rehearsed(chosen, backbone=str(tmp_path / "no backbone"))
    with pytest.raises(ConfigError, match="can be trained on"):
        rehearsed(chosen, users=10**6)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot be written"):
        rehearsed(chosen, out=tmp_path / "file" / "adapter")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange/notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        rehearsed(chosen, out=tmp_path / "strange")
