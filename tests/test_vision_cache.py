"""The vision cache: looked at once, bit for bit the same afterwards, and never the wrong image's tokens."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chairs import write_dataset
from PIL import Image

from vlm2rec.downstream.table import EmbeddingTable
from vlm2rec.embedder.backbones.backbone import Backbone, ImageFeatures
from vlm2rec.embedder.backbones.images import ImageError
from vlm2rec.embedder.backbones.vision_cache import NewImage, VisionCache
from vlm2rec.embedder.encoders import cache_choice
from vlm2rec.pipelines import export_items, finetune
from vlm2rec.pipelines.config import ExportConfig, FinetuneConfig

Tiny = Callable[[str], Path]


@pytest.fixture
def config(tiny: Tiny, tmp_path: Path) -> ExportConfig:
    data = write_dataset(tmp_path / "data", broken=(3,))
    return ExportConfig(
        data=data, backbone=str(tiny("qwen2_5_vl")), out=tmp_path / "cold", dtype="float32", max_failures=0.1
    )


def exported(config: ExportConfig) -> dict[str, np.ndarray]:
    export_items.run(config)
    return {view: EmbeddingTable.open(config.out, view).vectors for view in ("fused", "text", "image")}


def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> list[ImageFeatures]:
        raise AssertionError("the vision tower was asked")

    monkeypatch.setattr(Backbone, "run_vision_tower", never)


def test_a_second_export_asks_no_vision_tower_and_gives_the_same_bits(
    config: ExportConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without = exported(replace(config, out=config.out.with_name("without"), vision_cache="off"))
    assert not (config.data / "vision-cache").exists()
    cold = exported(config)
    assert "keeps the features of 20 images, about" in capsys.readouterr().err
    blind(monkeypatch)
    warm = exported(replace(config, out=config.out.with_name("warm")))
    told = capsys.readouterr().err
    assert "has the features of 19 images from earlier runs; of this dataset's 20 images, those" in told, (
        "one image is broken"
    )
    for view in cold:
        np.testing.assert_array_equal(cold[view], without[view])
        np.testing.assert_array_equal(cold[view], warm[view])


def test_what_training_looked_at_serves_the_export(
    tiny: Tiny, drawn_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    plain = Backbone.run_vision_tower
    monkeypatch.setattr(
        Backbone, "run_vision_tower", lambda self, images: asked.append(len(images)) or plain(self, images)
    )
    common = {"data": drawn_dataset, "backbone": str(tiny("qwen2_5_vl")), "dtype": "float32"}
    cache = str(tmp_path / "cache")
    finetune.run(
        FinetuneConfig(out=tmp_path / "adapter", max_steps=1, max_pixels=56 * 56, vision_cache=cache, **common)  # type: ignore[arg-type]
    )
    counts = {}
    tables = {}
    for name, where in (("cached", cache), ("fresh", "off")):
        asked.clear()
        config = ExportConfig(out=tmp_path / name, adapter=tmp_path / "adapter", vision_cache=where, **common)  # type: ignore[arg-type]
        tables[name] = exported(config)
        counts[name] = sum(asked)
    assert counts["cached"] < counts["fresh"]
    for view in tables["fresh"]:
        np.testing.assert_array_equal(tables["cached"][view], tables["fresh"][view])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "internvl", "llava"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_features_come_back_bit_for_bit(tiny: Tiny, tmp_path: Path, family: str, dtype: str) -> None:
    backbone = Backbone.load(str(tiny(family)), dtype=dtype, device="cpu")  # type: ignore[arg-type]
    random = np.random.default_rng(0)
    sizes = [(84, 56), (112, 112), (60, 140)]
    images = [Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    seen = backbone.encode_images(images)
    keys = [bytes([n]) * 32 for n in range(3)]
    VisionCache.open(tmp_path, backbone, "weights").add(keys, seen)
    cache = VisionCache.open(tmp_path, backbone, "weights")
    assert len(cache) == 3 and cache.find(b"x" * 32) is None
    for key, expected, (width, height) in zip(keys, seen, sizes, strict=True):
        found = cache.find(key)
        assert found is not None and found.tokens.dtype == expected.tokens.dtype
        assert torch.equal(found.tokens, expected.tokens)
        assert len(found.deepstack) == len(expected.deepstack) == backbone.image_layers - 1
        assert all(torch.equal(a, b) for a, b in zip(found.deepstack, expected.deepstack, strict=True))
        assert (found.grid is None) == (expected.grid is None)
        assert found.grid is None or expected.grid is None or torch.equal(found.grid, expected.grid)
        tokens = backbone.image_length(width, height)
        assert cache.image_bytes(tokens, backbone.image_layers) >= found.bytes


@pytest.fixture
def backbone(tiny: Tiny) -> Backbone:
    return Backbone.load(str(tiny("qwen2_5_vl")), device="cpu")


def test_other_weights_pixels_or_number_formats_share_nothing(tiny: Tiny, backbone: Backbone, tmp_path: Path) -> None:
    folders = {VisionCache.open(tmp_path, backbone, weights).folder for weights in ("one", "two")}
    for changes in ({"max_pixels": 56 * 56}, {"dtype": "bfloat16"}):
        other = Backbone.load(str(tiny("qwen2_5_vl")), device="cpu", **changes)  # type: ignore[arg-type]
        folders.add(VisionCache.open(tmp_path, other, "one").folder)
    assert len(folders) == 4


def write_image(path: Path, colour: str) -> None:
    Image.new("RGB", (84, 84), colour).save(path)


def test_a_changed_image_is_looked_at_again(backbone: Backbone, tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", "red")
    cache = VisionCache.open(tmp_path / "cache", backbone, "weights")
    new = cache.read(tmp_path, "a.png")
    assert isinstance(new, NewImage)
    cache.add([new.key], backbone.encode_images([new.image]))
    assert isinstance(cache.read(tmp_path, "a.png"), ImageFeatures)
    write_image(tmp_path / "a.png", "blue")
    assert isinstance(cache.read(tmp_path, "a.png"), NewImage)
    (tmp_path / "a.png").write_bytes(b"<html>")
    with pytest.raises(ImageError, match="not a JPEG"):
        cache.read(tmp_path, "a.png")


@pytest.mark.parametrize("damage", ["shorter tokens", "other tokens", "half a record", "no tokens"])
def test_damaged_segments_are_looked_at_again(backbone: Backbone, tmp_path: Path, damage: str) -> None:
    features = backbone.encode_images([Image.new("RGB", (84, 84), colour) for colour in ("red", "blue")])
    keys = [b"r" * 32, b"b" * 32]
    cache = VisionCache.open(tmp_path, backbone, "weights")
    cache.add(keys, features)
    (tokens,) = cache.folder.glob("*.tokens")
    index = tokens.with_suffix(".index")
    content = tokens.read_bytes()
    lost = {keys[1]}
    if damage == "shorter tokens":
        tokens.write_bytes(content[:-1])
    elif damage == "other tokens":
        tokens.write_bytes(content[:-4] + b"\1\2\3\4")
    elif damage == "half a record":
        index.write_bytes(index.read_bytes()[:-30])
    else:
        tokens.unlink()
        lost = set(keys)
    again = VisionCache.open(tmp_path, backbone, "weights")
    assert {key for key in keys if again.find(key) is None} == lost
    again.add(list(lost), [features[keys.index(key)] for key in lost])
    whole = VisionCache.open(tmp_path, backbone, "weights")
    for key, expected in zip(keys, features, strict=True):
        found = whole.find(key)
        assert found is not None and torch.equal(found.tokens, expected.tokens)


def test_no_flipped_bit_of_a_record_gives_other_features(backbone: Backbone, tmp_path: Path) -> None:
    features = backbone.encode_images([Image.new("RGB", (84, 112), colour) for colour in ("red", "blue")])
    keys = [b"r" * 32, b"b" * 32]
    cache = VisionCache.open(tmp_path, backbone, "weights")
    cache.add(keys, features)
    (index,) = cache.folder.glob("*.index")
    content = index.read_bytes()
    for bit in range(4 * len(content)):  # those of the first record
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        index.write_bytes(damaged)
        again = VisionCache(cache.folder, backbone.dim, backbone.model.dtype)
        assert again.find(keys[0]) is None, f"bit {bit}"
        other = again.find(keys[1])
        assert other is not None and torch.equal(other.tokens, features[1].tokens)


def test_a_segment_of_another_tower_is_not_believed(backbone: Backbone, tmp_path: Path) -> None:
    (feature,) = backbone.encode_images([Image.new("RGB", (84, 84), "red")])
    mine, other = (VisionCache.open(tmp_path, backbone, weights) for weights in ("mine", "other"))
    other.add([b"r" * 32], [feature])
    for path in other.folder.glob("segment-*"):
        shutil.copy(path, mine.folder)
    assert len(VisionCache.open(tmp_path, backbone, "mine")) == 1
    assert VisionCache.open(tmp_path, backbone, "mine").find(b"r" * 32) is None


def test_a_segment_cut_short_or_removed_while_it_is_in_use_is_looked_at_again(
    backbone: Backbone, tmp_path: Path
) -> None:
    features = backbone.encode_images([Image.new("RGB", (84, 84), colour) for colour in ("red", "blue")])
    VisionCache.open(tmp_path, backbone, "weights").add([b"r" * 32, b"b" * 32], features)
    reader = VisionCache.open(tmp_path, backbone, "weights")
    assert reader.find(b"b" * 32) is not None
    (tokens,) = reader.folder.glob("*.tokens")
    os.truncate(tokens, 10)
    assert reader.find(b"b" * 32) is None
    shutil.rmtree(reader.folder)
    assert reader.find(b"r" * 32) is None and reader.find(b"g" * 32) is None
    with pytest.raises(OSError):
        reader.add([b"r" * 32], features[:1])


def test_a_writer_whose_disk_was_full_for_a_moment_leaves_no_half_record(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = backbone.encode_images([Image.new("RGB", (84, 84), colour) for colour in ("red", "blue")])
    cache = VisionCache.open(tmp_path, backbone, "weights")
    plain = Path.open

    def full(self: Path, mode: str = "r", *more: Any, **named: Any) -> Any:
        if self.suffix == ".index" and "a" in mode:
            with plain(self, "ab") as file:
                file.write(b"half a record")
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(self, mode, *more, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(OSError, match="No space"):
            cache.add([b"r" * 32], features[:1])
    assert all(path.stat().st_size == 0 for path in cache.folder.glob("segment-*"))
    cache.add([b"b" * 32], features[1:])
    found = VisionCache.open(tmp_path, backbone, "weights").find(b"b" * 32)
    assert found is not None and torch.equal(found.tokens, features[1].tokens)


def test_several_writers_have_segments_of_their_own(backbone: Backbone, tmp_path: Path) -> None:
    features = backbone.encode_images([Image.new("RGB", (84, 84), colour) for colour in ("red", "blue", "green")])
    writers = [VisionCache.open(tmp_path, backbone, "weights") for _ in features]
    for number, (writer, feature) in enumerate(zip(writers, features, strict=True)):
        writer.add([bytes([number]) * 32, b"shared" + bytes(26)], [feature, features[0]])
    together = VisionCache.open(tmp_path, backbone, "weights")
    assert len(together) == 4
    for number, expected in enumerate(features):
        found = together.find(bytes([number]) * 32)
        assert found is not None and torch.equal(found.tokens, expected.tokens)


def test_a_writer_finds_what_another_has_added_since(backbone: Backbone, tmp_path: Path) -> None:
    features = backbone.encode_images([Image.new("RGB", (84, 84), colour) for colour in ("red", "blue", "green")])
    first, second = (VisionCache.open(tmp_path, backbone, "weights") for _ in range(2))
    for number, expected in enumerate(features):
        key = bytes([number]) * 32
        assert first.find(key) is None
        second.add([key], [expected])
        found = first.find(key)
        assert found is not None and torch.equal(found.tokens, expected.tokens)
        assert len(first) == len(second) == number + 1


def test_a_cache_without_room_is_left_out_and_said(
    config: ExportConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cache_choice, "MOST_BYTES", 100)
    exported(config)
    said = " ".join(capsys.readouterr().err.split())
    assert "every run encodes all images again" in said and "--vision-cache DIR" in said
    assert not list((config.data / "vision-cache").glob("*/*.index"))
    exported(replace(config, out=config.out.with_name("asked"), vision_cache=str(config.data / "mine")))
    assert list((config.data / "mine").glob("*/*.index")), "who names a folder has made up his mind"


def test_a_read_only_dataset_goes_without_a_cache(
    config: ExportConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (config.data / "vision-cache").write_text("a file where the folder should be")
    exported(config)
    assert "cannot be written" in " ".join(capsys.readouterr().err.split())
