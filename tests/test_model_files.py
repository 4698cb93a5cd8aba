"""The files of a backbone: hashes over all of them, and what a stranger may have put among them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from vlm2rec.embedder import chat_template
from vlm2rec.embedder.backbones import model_files
from vlm2rec.embedder.backbones.backbone import Backbone
from vlm2rec.embedder.backbones.families import checked_files, load_processor
from vlm2rec.embedder.contract import hash_cache, storage
from vlm2rec.embedder.contract.errors import ModelError
from vlm2rec.embedder.encoders.frozen import load_frozen
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.settings import fingerprint_of

Tiny = Callable[[str], Path]


@pytest.fixture
def model(tiny: Tiny, tmp_path: Path) -> Path:
    """A backbone that a test may spoil."""
    return shutil.copytree(tiny("qwen2_5_vl"), tmp_path / "model")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def large(path: Path, content: bytes = b"", age: float = 60) -> Path:
    """A file that is worth remembering, and that nobody has touched for a minute."""
    path.write_bytes(content.ljust(2**20 + 1, b"."))
    os.utime(path, (path.stat().st_atime - age, path.stat().st_mtime - age))
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of hashes, and every file on the disk is old enough for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hash_cache, "_SETTLED", -(2**62))
    return tmp_path / "cache" / "vlm2rec" / "sha256.json"


# --- hashes that are remembered -----------------------------------------------------------------------------------
def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    reads: list[Path] = []
    read = storage.sha256_file

    def counted(path: Any) -> str:
        reads.append(path)
        return read(path)

    monkeypatch.setattr(storage, "sha256_file", counted)
    return reads


def test_a_large_file_is_read_once_and_again_after_any_change(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, file = count_reads(monkeypatch), large(tmp_path / "weights")
    first = hash_cache.sha256(file)
    assert hash_cache.sha256(file) == first == storage.sha256_file(file)
    assert reads == [file, file]  # one of them by the line above
    before = file.stat()
    with file.open("r+b") as opened:
        opened.seek(2**19)
        opened.write(b"other")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as `touch -r`: size and time are what they were
    assert hash_cache.sha256(file) != first
    replaced = large(tmp_path / "another", b"another")
    os.utime(replaced, ns=(before.st_atime_ns, before.st_mtime_ns))
    replaced.replace(file)
    assert hash_cache.sha256(file) == storage.sha256_file(file)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"x": 1}', b"\xff", b"[" * 100_000])
def test_a_damaged_cache_is_replaced(cache: Path, tmp_path: Path, content: bytes) -> None:
    file = large(tmp_path / "weights")
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    assert hash_cache.sha256(file) == storage.sha256_file(file)
    assert json.loads(cache.read_text())[str(file)]["sha256"] == storage.sha256_file(file)


def test_a_file_that_was_written_just_now_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert hash_cache.sha256(large(tmp_path / "weights")) == storage.sha256_file(tmp_path / "weights")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("home", ["none", "a file", "relative"])
def test_without_a_folder_for_it_there_is_no_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    if home == "none":
        monkeypatch.delenv("XDG_CACHE_HOME")

        def homeless() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", homeless)
    else:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file") if home == "a file" else "file")
        monkeypatch.setattr(Path, "home", lambda: tmp_path / "file")
    file = large(tmp_path / "weights")
    assert hash_cache.sha256(file) == storage.sha256_file(file)
    assert not cache.exists()


# --- hashes of a model --------------------------------------------------------------------------------------------
def test_a_change_anywhere_in_the_weights_is_another_backbone(model: Path) -> None:
    tensors = {"model.a": torch.zeros(2**20), "model.b": torch.zeros(2**20), "model.c": torch.zeros(2**20)}
    edit_json(model / "config.json", text_config={}, vision_config={})
    hashes, older = set(), set()
    for changed in (None, *tensors):
        values = {name: tensor + (name == changed) for name, tensor in tensors.items()}
        safetensors.torch.save_file(values, model / "model.safetensors")
        hashes.add(model_files.backbone_hash(model))
        older.add(model_files.older_backbone_hash(model))
    assert len(hashes) == 4 and all(not model_files.is_older_kind(found) for found in hashes)
    assert len(older) == 3  # the hash of earlier versions does not see the middle


def test_shards_and_their_index_are_in_the_hash(tiny: Tiny, model: Path) -> None:
    shard(model, 2)
    whole = model_files.backbone_hash(model)
    last = safetensors.torch.load_file(model / "model-00002-of-00002.safetensors")
    safetensors.torch.save_file(
        {name: tensor + 1 for name, tensor in last.items()}, model / "model-00002-of-00002.safetensors"
    )
    assert model_files.backbone_hash(model) != whole


@pytest.mark.parametrize(
    "name",
    [
        *("preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "chat_template.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model"),
        *("special_tokens_map.json", "added_tokens.json", "additional_chat_templates/tool.jinja", "spiece.model"),
    ],
)
def test_every_file_of_tokenizer_image_processor_and_chat_template_is_in_the_hash(model: Path, name: str) -> None:
    before = model_files.processor_hash(model)
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_bytes((model / name).read_bytes() + b" " if (model / name).exists() else b"{}")
    assert model_files.processor_hash(model) != before


def test_a_copy_under_another_name_is_the_same_and_other_files_do_not_count(model: Path, tmp_path: Path) -> None:
    settings = fingerprint_of(str(model), device="cpu")
    copy = shutil.copytree(model, tmp_path / "elsewhere" / "copy")
    for name in ("README.md", "generation_config.json", ".gitattributes", "training_args.bin", "events.log"):
        (copy / name).write_text("{}")
    found = fingerprint_of(str(copy), device="cpu")
    assert found.pop("made_with") == {"backbone": "copy"} != settings.pop("made_with")
    assert found == settings


def test_a_changed_processor_is_another_encoder(model: Path) -> None:
    before = fingerprint_of(str(model), device="cpu")
    edit_json(model / "preprocessor_config.json", image_mean=[0.1, 0.1, 0.1])
    after = fingerprint_of(str(model), device="cpu")
    assert {key for key in before if before[key] != after[key]} == {"processor_hash"}


# --- the hub ------------------------------------------------------------------------------------------------------
@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with two commits of a model, of which `main` is the first."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub" / "models--shop--bb"
    shutil.copytree(model, folder / "snapshots" / "aaa")
    second = shutil.copytree(model, folder / "snapshots" / "bbb")
    weights = safetensors.torch.load_file(second / "model.safetensors")
    norm = next(name for name in weights if name.endswith(".norm.weight") and "layers" not in name)
    weights[norm] += 1
    safetensors.torch.save_file(weights, second / "model.safetensors", metadata={"format": "pt"})
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("aaa")
    return folder


def test_a_hub_model_is_its_commit_and_a_main_that_moves_is_another(hub: Path, model: Path) -> None:
    files = model_files.locate("shop/bb")
    assert (files.commit, files.described) == ("aaa", {"backbone": "shop/bb", "commit": "aaa"})
    before = model_files.backbone_hash("shop/bb")
    assert before == model_files.backbone_hash(model)  # a copy of the commit is the same backbone
    (hub / "refs" / "main").write_text("bbb")
    assert model_files.backbone_hash("shop/bb") != before
    assert model_files.backbone_hash(files) == before
    with pytest.raises(ModelError, match=r"no model of that name.*hf download shop/bb"):
        model_files.locate("shop/bb", "v2")


def test_all_of_an_encoder_is_of_one_commit_whatever_main_does_meanwhile(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    located = checked_files

    def moved(source: Any, revision: Any = None) -> Any:
        found = located(source, revision)
        (hub / "refs" / "main").write_text("bbb")
        return found

    monkeypatch.setattr("vlm2rec.embedder.encoders.item_encoder.checked_files", moved)
    encoder = ItemEncoder.load("shop/bb", dtype="float32", device="cpu")
    assert encoder.fingerprint["made_with"]["commit"] == "aaa"
    assert encoder.fingerprint["backbone_hash"] == model_files.backbone_hash(hub / "snapshots" / "aaa")
    loaded = encoder.backbone.language_model.norm.weight
    assert torch.equal(loaded, torch.ones_like(loaded))  # the other commit has 2 there


# --- strangers ----------------------------------------------------------------------------------------------------
def shard(folder: Path, count: int, **named: str) -> None:
    """Split the weights into shards; `named` changes the index."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    names, weight_map = sorted(tensors), {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::count]}
        safetensors.torch.save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map | {names[0]: named.get("first", weight_map[names[0]])}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def test_shards_are_loaded(model: Path) -> None:
    before = ItemEncoder.load(model, device="cpu", dtype="float32").encode_items(["red chair"], [None]).text
    shard(model, 3)
    after = ItemEncoder.load(model, device="cpu", dtype="float32").encode_items(["red chair"], [None]).text
    assert (before == after).all()


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "pytorch_model.bin", "a/b.safetensors", "..", "", "x\0.safetensors"],
)
def test_an_index_names_safetensors_of_its_own_folder_alone(model: Path, name: str) -> None:
    for path in (model.parent / "x.safetensors", model / "pytorch_model.bin"):
        shutil.copy(model / "model.safetensors", path)
    shard(model, 2, first=name)
    with pytest.raises(ModelError, match="as a file of weights"):
        Backbone.load(str(model), device="cpu")


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 3}])
def test_an_index_that_is_none_is_refused(model: Path, weight_map: Any) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match="as a file of weights"):
        Backbone.load(str(model), device="cpu")


def test_a_shard_that_is_missing_is_named(model: Path) -> None:
    shard(model, 2)
    (model / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model-00002-of-00002\.safetensors"):
        Backbone.load(str(model), device="cpu")


@pytest.mark.parametrize("kept", [0, 4, 100, 50_000])
def test_weights_that_were_cut_short_are_named_before_anything_is_loaded(model: Path, kept: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        fingerprint_of(str(model), device="cpu")


def test_pickled_weights_are_never_opened(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle, which is never opened"):
        Backbone.load(str(model), device="cpu")


@pytest.mark.parametrize("named", ["adapter_model.bin", "other.safetensors", "../model.safetensors"])
def test_a_config_does_not_choose_the_file_of_the_weights(model: Path, named: str) -> None:
    edit_json(model / "config.json", transformers_weights=named)
    with pytest.raises(ModelError, match="as its weights"):
        Backbone.load(str(model), device="cpu")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_a_stray_adapter_in_a_backbone_is_refused_by_name(model: Path, name: str) -> None:
    (model / name).write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(model)}))
    for load in (lambda: Backbone.load(str(model), device="cpu"), lambda: fingerprint_of(str(model), device="cpu")):
        with pytest.raises(ModelError, match=rf"holds {name} beside the model.*merge it into the model"):
            load()


def test_a_stray_adapter_in_a_frozen_encoder_is_refused(tmp_path: Path) -> None:
    from tiny_encoders import tiny_clip

    folder = tiny_clip(tmp_path)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds adapter_config\.json"):
        load_frozen(folder, device="cpu")


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size"])
def test_a_config_far_beyond_its_weights_is_refused_before_anything_is_made(model: Path, key: str) -> None:
    config = json.loads((model / "config.json").read_text())
    edit_json(model / "config.json", text_config=config["text_config"] | {key: 10**9})
    with pytest.raises(ModelError, match=f"says {key} = 1000000000"):
        Backbone.load(str(model), device="cpu")


@pytest.mark.parametrize("text", ["{", "[1]", "\ud800", "[" * 200_000, '{"a": NaN'])
def test_a_config_that_is_none_is_a_model_error(model: Path, text: str) -> None:
    (model / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ModelError):
        Backbone.load(str(model), device="cpu")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{{ 'x' * 10**10 }}", "MemoryError"),
        ("{{ raise_exception('only tools') }}", "only tools"),
        ("{% if", "TemplateSyntaxError"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "SecurityError"),
        (
            "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
            "Memory",
        ),
        ("x" * 2**21, "characters"),
        ("{{ messages | map('nosuch') | list }}", "No filter"),
    ],
)
def test_a_chat_template_that_runs_away_is_refused_before_the_weights_are_read(
    model: Path, template: str, why: str
) -> None:
    (model / "chat_template.jinja").write_text(template)
    edit_json(model / "tokenizer_config.json", chat_template=template)
    with pytest.raises(ModelError, match=f"chat template of this backbone cannot be used .*{why}.*--prompt-mode raw"):
        Backbone.load(str(model), device="cpu", prompt_mode="chat")


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n else 'x' }}{% endmacro %}{{ f(60) }}",
    ],
)
def test_a_chat_template_that_never_ends_is_ended(model: Path, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    (model / "chat_template.jinja").write_text(template)
    edit_json(model / "tokenizer_config.json", chat_template=template)
    with pytest.raises(ModelError, match=r"takes more than 0\.5 seconds"):
        Backbone.load(str(model), device="cpu", prompt_mode="chat")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl", "llava"])
def test_a_chat_prompt_is_the_one_that_transformers_makes(tiny: Tiny, family: str) -> None:
    from vlm2rec.embedder.prompts import IMAGE_HERE, render

    processor: Any = load_processor(tiny(family))
    prompt = ("0) Grüne  Lampe <b>\n'\" {{ x }}", IMAGE_HERE, ", 1) ", IMAGE_HERE, "\ud800 😀")
    content = [{"type": "image"} if part is IMAGE_HERE else {"type": "text", "text": part} for part in prompt]
    stock = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert render(prompt, "chat", processor) == stock


def test_a_template_that_asks_for_the_day_gets_the_same_day_for_ever() -> None:
    asked = "{{ strftime_now('%d %b %Y') }}{% generation %} {{ messages[0].content }}{% endgeneration %}"
    assert chat_template.apply(asked, [{"role": "user", "content": "a"}], {}) == "26 Jul 2024 a"
