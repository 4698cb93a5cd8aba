"""`export-items --encoder` and `--strategy question`: folders that say what made them, and that readers take."""

from __future__ import annotations

import dataclasses
import functools
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_encoders import CLIP_DIM, WIDTH, sentence_folder, tiny_clip, tiny_resnet
from tiny_models import tiny_model

from vlm2rec.downstream.table import EmbeddingTable
from vlm2rec.embedder.backbones.images import open_image
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError, ConfigError, FailureLimitError
from vlm2rec.embedder.contract.schema import read_manifest
from vlm2rec.embedder.encoders.frozen import frozen_fingerprint
from vlm2rec.embedder.encoders.prompted import PromptedEncoder, prompted_fingerprint
from vlm2rec.embedder.export.verify import verify
from vlm2rec.embedder.options import PromptMode
from vlm2rec.embedder.prompts import DEFAULT_QUESTION, question, render
from vlm2rec.pipelines import cli, evaluate, export_items
from vlm2rec.pipelines.config import EvaluateConfig, ExportConfig
from vlm2rec.pipelines.read_config import read_config

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def sentence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentence_folder(tmp_path_factory.mktemp("sentence"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def vlm2rec(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Run a command with default flags in this process; it has to succeed and to leave stdout alone."""

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["vlm2rec", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert (ended.value.code or 0, capsys.readouterr().out) == (0, "")

    return run


def copy_of(data: Path, folder: Path) -> Path:
    """Copy a dataset folder so that its images can be damaged."""
    shutil.copytree(data, folder)
    meta = json.loads((folder / "dataset.json").read_text())
    shutil.copytree(Dataset(data).image_root, folder / "pictures")
    (folder / "dataset.json").write_text(json.dumps(meta | {"image_root": "pictures"}))
    return folder


def pictures(dataset: Dataset, rows: range, max_pixels: int) -> list[Image.Image]:
    return [open_image(dataset.image_root, dataset.image_paths[row], max_pixels) for row in rows]


# --- frozen encoders --------------------------------------------------------------------------------------------
def test_clip_with_default_flags_fills_three_views_of_every_item(
    drawn_dataset: Path, clip: Path, tmp_path: Path, vlm2rec: Callable[..., None]
) -> None:
    vlm2rec("export-items", "--data", drawn_dataset, "--encoder", clip, "--out", tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert verify(tmp_path / "out") == []
    assert (manifest["views"], manifest["dim"]) == (["fused", "text", "image"], CLIP_DIM)
    assert manifest["num_items"] == len(Dataset(drawn_dataset).item_ids)
    assert manifest["counts"]["failed"] == 0
    assert {key: manifest["settings"][key] for key in ("source", "model_type", "dtype")} == {
        "source": "clip",
        "model_type": "clip",
        "dtype": "float32",
    }


def test_a_text_and_an_image_encoder_make_a_table_of_two_lengths_that_readers_take(
    drawn_dataset: Path, sentence: Path, tmp_path: Path, vlm2rec: Callable[..., None]
) -> None:
    resnet = tiny_resnet(tmp_path / "resnet")
    given = ("--data", drawn_dataset, "--encoder", sentence, "--image-encoder", resnet, "--out", tmp_path / "out")
    vlm2rec("export-items", *given)
    manifest = read_manifest(tmp_path / "out")
    assert verify(tmp_path / "out") == [] and manifest["counts"]["failed"] == 0
    assert manifest["dims"] == {"fused": WIDTH + 40, "text": WIDTH, "image": 40}
    assert manifest["made_with"] == {"encoder": sentence.name, "image_encoder": "resnet"}
    vlm2rec("export-items", *given)  # goes on with it: nothing to do
    assert read_manifest(tmp_path / "out")["shards"] == manifest["shards"]
    vlm2rec("evaluate", "--data", drawn_dataset, "--embeddings", tmp_path / "out", "--out", tmp_path / "evaluation")
    found = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert set(found["full"]) == {"f2f", "t2t", "v2v"}
    vlm2rec(
        *("train-recommender", "--data", drawn_dataset, "--embeddings", tmp_path / "out", "--model", "FREEDOM"),
        *("--max-epochs", "1", "--eval-step", "1", "--normalize", "--out", tmp_path / "freedom", "--device", "cpu"),
    )
    assert json.loads((tmp_path / "freedom" / "metrics.json").read_text())["start"] == "text+image"
    vlm2rec("export-items", "--data", drawn_dataset, "--encoder", resnet, "--out", tmp_path / "images")
    alone = read_manifest(tmp_path / "images")
    assert (alone["views"], alone["dim"], alone["counts"]["failed"]) == (["fused", "image"], 40, 0)
    both = EmbeddingTable.open(tmp_path / "out", "image"), EmbeddingTable.open(tmp_path / "images", "fused")
    np.testing.assert_allclose(both[0].vectors, both[1].vectors, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="text_only"):
        export_items.run(
            ExportConfig(data=drawn_dataset, encoder=resnet, out=tmp_path / "no", on_image_error="text_only")
        )


def test_a_text_encoder_with_default_flags_never_opens_an_image(
    drawn_dataset: Path, sentence: Path, tmp_path: Path, vlm2rec: Callable[..., None]
) -> None:
    data = copy_of(drawn_dataset, tmp_path / "data")
    shutil.rmtree(data / "pictures")
    vlm2rec("export-items", "--data", data, "--encoder", sentence, "--out", tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert verify(tmp_path / "out") == []
    assert (manifest["views"], manifest["dim"], manifest["counts"]["failed"]) == (["fused", "text"], WIDTH, 0)
    assert manifest["settings"]["modules"] == ["Transformer", "Pooling", "Normalize"]
    fused, text = (EmbeddingTable.open(tmp_path / "out", view).vectors for view in ("fused", "text"))
    np.testing.assert_array_equal(fused, text)


def test_a_broken_image_is_a_row_with_a_reason(drawn_dataset: Path, clip: Path, tmp_path: Path) -> None:
    data = copy_of(drawn_dataset, tmp_path / "data")
    (data / "pictures" / Dataset(data).image_paths[3]).write_bytes(b"")
    with pytest.raises(FailureLimitError, match="complete, but 1 of"):
        export_items.run(ExportConfig(data=data, encoder=clip, out=tmp_path / "null", device="cpu"))
    assert verify(tmp_path / "null") == []
    manifest = export_items.run(
        ExportConfig(data=data, encoder=clip, out=tmp_path / "text", device="cpu", on_image_error="text_only")
    )
    assert manifest["counts"]["text_only"] == 1
    assert verify(tmp_path / "text") == []


def test_the_same_run_again_loads_no_model_and_another_one_is_refused(
    drawn_dataset: Path, sentence: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ExportConfig(data=drawn_dataset, encoder=sentence, out=tmp_path / "out", device="cpu")
    first = export_items.run(config)
    monkeypatch.setattr(export_items, "_load", lambda *args: pytest.fail("the model was loaded"))
    assert export_items.run(config) == first
    with pytest.raises(ArtifactError, match="pooling was"):
        export_items.run(ExportConfig(**{**vars(config), "pooling": "cls"}))


def test_task_1_takes_such_a_table_and_refuses_a_backbone_that_did_not_make_it(
    drawn_dataset: Path, clip: Path, tiny: Tiny, tmp_path: Path
) -> None:
    export_items.run(ExportConfig(data=drawn_dataset, encoder=clip, out=tmp_path / "table", device="cpu"))
    config = EvaluateConfig(data=drawn_dataset, embeddings=tmp_path / "table", out=tmp_path / "out")
    result = evaluate.run(config)
    assert (list(result["candidates"]), result["users_from"]) == (["f2f", "t2f", "v2f", "t2t", "v2v"], "mean")
    with pytest.raises(ArtifactError, match=r"another source \(clip\).*leave --backbone out"):
        evaluate.run(EvaluateConfig(**{**vars(config), "backbone": str(tiny("qwen2_5_vl"))}))


def test_the_settings_of_frozen_encoders_are_what_decides_a_vector_and_the_folder_s_name_apart(
    sentence: Path, clip: Path
) -> None:
    common = {"dtype": "float32", "views": ["fused", "text"]}
    text = frozen_fingerprint(sentence, device="cpu")
    assert text == common | {
        "source": "sentence",
        "made_with": {"encoder": sentence.name},
        "encoder_hash": text["encoder_hash"],
        "processor_hash": text["processor_hash"],
        "model_type": "bert",
        "dim": WIDTH,
        "modules": ["Transformer", "Pooling", "Normalize"],
        "pooling": ["mean"],
        "dense": [],
        "normalise": True,
        "lower_case": False,
        "max_tokens": 12,
        "prompt": "",
    }
    both = frozen_fingerprint(clip, device="cpu")
    assert both == {
        "source": "clip",
        "made_with": {"encoder": clip.name},
        "encoder_hash": both["encoder_hash"],
        "processor_hash": both["processor_hash"],
        "model_type": "clip",
        "dtype": "float32",
        "dim": CLIP_DIM,
        "views": ["fused", "text", "image"],
        "fusion": "external",
        "fusion_norm": "raw",
        "max_tokens": 20,
        "padding": "longest",
        "max_pixels": 28 * 28,
    }


# --- zero-shot prompting ----------------------------------------------------------------------------------------
def test_a_prompted_table_has_one_vector_an_item_and_says_what_was_asked(
    drawn_dataset: Path, tiny: Tiny, tmp_path: Path, vlm2rec: Callable[..., None]
) -> None:
    out, backbone = tmp_path / "out", tiny("qwen2_5_vl")
    vlm2rec("export-items", "--data", drawn_dataset, "--backbone", backbone, "--strategy", "question", "--out", out)
    manifest = read_manifest(out)
    assert verify(out) == []
    assert (manifest["views"], manifest["counts"]["failed"]) == (["fused"], 0)
    stored = manifest["settings"]
    assert (stored["source"], stored["instruction"], stored["prompt_mode"]) == ("prompt", DEFAULT_QUESTION, "chat")
    result = evaluate.run(EvaluateConfig(data=drawn_dataset, embeddings=out, out=tmp_path / "task1"))
    assert (list(result["candidates"]), result["users_from"]) == (["f2f"], "mean")
    with pytest.raises(ArtifactError, match=r"another source \(prompt\)"):
        evaluate.run(EvaluateConfig(data=drawn_dataset, embeddings=out, out=tmp_path / "task1", backbone=str(backbone)))


@pytest.mark.parametrize("mode", ["raw", "chat"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_the_vector_is_the_stock_models_state_at_the_end_of_the_question(
    drawn_dataset: Path, tiny: Tiny, family: str, mode: PromptMode
) -> None:
    dataset, asked = Dataset(drawn_dataset), "What is it?"
    encoder = PromptedEncoder.load(
        str(tiny(family)), instruction=asked, prompt_mode=mode, max_pixels=56 * 56, dtype="float32", device="cpu"
    )
    images = pictures(dataset, range(3), 56 * 56)
    found = encoder.encode_items(dataset.titles[:3], images)
    processor = encoder.backbone.processor
    for row, image in enumerate(images):
        text = render(question(dataset.titles[row], asked, mode), mode, processor)
        assert asked in text and dataset.titles[row] in text
        assert text.endswith("Answer:") == (mode == "raw")
        inputs = processor(text=[text], images=[image], return_tensors="pt")
        with torch.no_grad():
            stock = encoder.backbone.model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
        np.testing.assert_allclose(found.fused[row], stock, atol=1e-4)
    assert np.isnan(found.text).all() and np.isnan(found.image).all()


def test_an_item_without_image_is_a_failure_row(drawn_dataset: Path, tiny: Tiny, tmp_path: Path) -> None:
    data = copy_of(drawn_dataset, tmp_path / "data")
    (data / "pictures" / Dataset(data).image_paths[3]).unlink()
    manifest = export_items.run(
        ExportConfig(
            data=data,
            backbone=str(tiny("qwen2_5_vl")),
            strategy="question",
            out=tmp_path / "out",
            device="cpu",
            max_failures=0.1,
        )
    )
    assert manifest["counts"]["failed"] == 1
    assert verify(tmp_path / "out") == []


def test_settings_are_known_before_the_weights_and_change_with_the_question(tiny: Tiny) -> None:
    folder = str(tiny("qwen2_5_vl"))
    settings = prompted_fingerprint(folder, device="cpu")
    assert PromptedEncoder.load(folder, device="cpu").fingerprint == json.loads(json.dumps(settings)) == settings
    hashes = {
        prompted_fingerprint(folder, instruction=asked, prompt_mode=mode)["prompt_hash"]
        for asked in (None, "What is it?")
        for mode in ("raw", "chat")
    }
    assert len(hashes) == 4


def test_the_settings_of_a_question_hold_the_backbone_s_name_apart(tiny: Tiny) -> None:
    folder = tiny("qwen2_5_vl")
    settings = prompted_fingerprint(str(folder), device="cpu", dtype="float32")
    hashes = {name: settings[name] for name in ("backbone_hash", "processor_hash", "prompt_hash")}
    assert settings == hashes | {
        "source": "prompt",
        "instruction": DEFAULT_QUESTION,
        "made_with": {"backbone": folder.name},
        "model_type": "qwen2_5_vl",
        "adapter": None,
        "dim": 64,
        "dtype": "float32",
        "fusion": "prompt",
        "fusion_norm": "raw",
        "prompt_mode": "chat",
        "max_pixels": 224 * 224,
        "max_title_tokens": 64,
        "views": ["fused"],
        "pooling": "last",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"instruction": "  "}, "--instruction '  '"),
        ({"instruction": "What is <|image_pad|>?"}, "a question in words"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused(tiny: Tiny, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prompted_fingerprint(str(tiny("qwen2_5_vl")), **settings)


def test_chat_needs_a_template_and_auto_does_without(tmp_path: Path) -> None:
    folder = tiny_model("qwen2_5_vl", tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert prompted_fingerprint(str(folder))["prompt_mode"] == "raw"
    with pytest.raises(ConfigError, match="no chat template"):
        prompted_fingerprint(str(folder), prompt_mode="chat")


# --- what belongs together --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "neither --backbone nor --encoder is given"),
        ({"encoder": "E", "backbone": "B"}, "--backbone B with --encoder.*one of the two.*leave --backbone out"),
        ({"encoder": "E", "adapter": "A"}, "--adapter A with --encoder"),
        ({"encoder": "E", "revision": "main"}, "--revision main with --encoder"),
        ({"encoder": "E", "strategy": "visual"}, "--strategy visual with --encoder"),
        ({"encoder": "E", "strategy": "question"}, "--strategy question with --encoder"),
        ({"encoder": "E", "fusion": "internal"}, "--fusion internal with --encoder"),
        ({"encoder": "E", "views": "text"}, "--views text with --encoder"),
        ({"encoder": "E", "prompt_mode": "chat"}, "--prompt-mode chat with --encoder"),
        ({"encoder": "E", "prompt_style": "sda"}, "--prompt-style sda with --encoder"),
        ({"encoder": "E", "max_pixels": 9}, "--max-pixels 9 with --encoder"),
        ({"encoder": "E", "max_title_tokens": 9}, "--max-title-tokens 9 with --encoder"),
        ({"encoder": "E", "vision_cache": "V"}, "--vision-cache V with --encoder"),
        ({"encoder": "E", "instruction": "What?"}, "--instruction What\\? with --encoder.*leave --instruction out"),
        (
            {"backbone": "B", "instruction": "What?"},
            "--instruction of 5 characters with --prompt-style vlm2rec.*or --strategy question",
        ),
        ({"backbone": "B", "strategy": "dual", "instruction": "What?"}, "--instruction of 5 characters"),
        ({"backbone": "B", "encoder_kind": "clip"}, "--encoder-kind clip with --backbone.*or give --encoder"),
        ({"backbone": "B", "pooling": "cls"}, "--pooling cls with --backbone"),
        ({"backbone": "B", "strategy": "question", "adapter": "A"}, "--strategy question with --adapter A"),
        ({"backbone": "B", "strategy": "question", "views": "text"}, "--views text with --strategy question"),
        ({"backbone": "B", "strategy": "question", "fusion": "external"}, "--fusion external with --strategy question"),
        ({"backbone": "B", "strategy": "question", "fusion_norm": "raw"}, "--fusion-norm raw with --strategy question"),
        ({"backbone": "B", "strategy": "question", "pooling": "mean"}, "--pooling mean with --strategy question"),
        (
            {"backbone": "B", "strategy": "question", "prompt_style": "sda"},
            "--prompt-style sda with --strategy question",
        ),
        ({"backbone": "B", "strategy": "question", "vision_cache": "V"}, "--vision-cache V with --strategy question"),
    ],
)
def test_settings_of_two_sources_are_refused_before_anything_is_read(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    config = read_config(ExportConfig, flags={"data": tmp_path / "nothing", "out": tmp_path / "out", **given})
    with pytest.raises(ConfigError, match=message):
        export_items.run(config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"encoder": "E", "pooling": "cls", "fusion_norm": "normalised", "vision_cache": "off"}, "--encoder"),
        ({"backbone": "B", "strategy": "question", "prompt_mode": "auto", "pooling": "auto"}, "--strategy question"),
        ({"backbone": "B", "strategy": "dual", "fusion_norm": "raw", "vision_cache": "V"}, "--strategy"),
        ({"backbone": "B", "adapter": "A", "views": "both", "pooling": "auto", "prompt_mode": "raw"}, "--backbone"),
    ],
)
def test_each_source_takes_its_settings(given: dict[str, Any], name: str) -> None:
    source = export_items.source_of(read_config(ExportConfig, flags={"data": "d", "out": "o", **given}))
    assert source.name == name


def test_every_setting_of_a_source_is_a_setting_of_the_command() -> None:
    known = {field.name for field in dataclasses.fields(ExportConfig)}
    assert all(set(source.takes) <= known for source in export_items.SOURCES)


@pytest.mark.usefixtures("forked_workers")
def test_several_processes_make_the_folder_that_one_makes(drawn_dataset: Path, sentence: Path, tmp_path: Path) -> None:
    config = ExportConfig(data=drawn_dataset, encoder=sentence, out=tmp_path / "one", device="cpu", shard_size=16)
    one = export_items.run(config)
    two = export_items.run(dataclasses.replace(config, out=tmp_path / "two", num_workers=2))
    assert one is not None and two is not None and one["fingerprint"] == two["fingerprint"]
    tables = [EmbeddingTable.open(tmp_path / name).vectors for name in ("one", "two")]
    np.testing.assert_allclose(*tables, atol=1e-6)


@pytest.mark.parametrize("source", ["encoder", "question"])
def test_another_process_can_be_sent_the_way_to_load_an_encoder(
    drawn_dataset: Path, clip: Path, tiny: Tiny, tmp_path: Path, source: str
) -> None:
    own: dict[str, Any] = {"encoder": clip} if source == "encoder" else {"backbone": str(tiny("qwen2_5_vl"))}
    if source == "question":
        own["strategy"] = "question"
    config = ExportConfig(data=drawn_dataset, out=tmp_path, device="cpu", token_budget=100, **own)
    load = pickle.loads(pickle.dumps(functools.partial(export_items._load, config, Dataset(drawn_dataset))))
    encoder = load()
    assert encoder.token_budget == 100
    found = export_items.source_of(config)
    assert encoder.fingerprint == found.fingerprint(**found.given(config))


@pytest.mark.parametrize("source", ["encoder", "question"])
def test_a_dry_run_writes_nothing(
    drawn_dataset: Path, clip: Path, tiny: Tiny, tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own: dict[str, Any] = {"encoder": clip} if source == "encoder" else {"backbone": str(tiny("qwen2_5_vl"))}
    if source == "question":
        own["strategy"] = "question"
    found = export_items.run(ExportConfig(data=drawn_dataset, out=tmp_path / "out", device="cpu", dry_run=True, **own))
    items = len(Dataset(drawn_dataset).item_ids)
    numbers = 3 * CLIP_DIM if source == "encoder" else 64
    assert found is not None and (found["items_left"], found["bytes_left"]) == (items, items * numbers * 4)
    assert list(tmp_path.iterdir()) == [] and "Dry run" in capsys.readouterr().err
