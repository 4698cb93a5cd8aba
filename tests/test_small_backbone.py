"""The small backbone: what it is trained on, and that it is an ordinary model folder that understands something."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import safetensors.torch
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from vlm2rec.embedder.backbones.backbone import Backbone
from vlm2rec.embedder.contract.errors import ConfigError, DataError
from vlm2rec.embedder.prompts import image_prompt, text_prompt
from vlm2rec.pipelines import make_backbone
from vlm2rec.pipelines.config import MakeBackboneConfig
from vlm2rec.pipelines.synthetic.drawn_catalogue import draw_catalogue
from vlm2rec.pipelines.synthetic.small_backbone import (
    ITEMS_IN_A_PROMPT,
    KINDS,
    TEXTS_PER_IMAGE,
    SmallBackboneSettings,
    answer_tokens,
    caption_words,
    draw_step,
    moved,
    rate,
    train_tokenizer,
)

QUICK: dict[str, Any] = {"hidden_size": 64, "layers": 1, "vocabulary": 700, "max_steps": 3, "max_pixels": 56 * 56}


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn catalogue of 100 products: items.parquet and images."""
    folder = tmp_path_factory.mktemp("catalogue")
    draw_catalogue(folder, products=100, users=5, seed=0)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder of the command with its default sizes and steps, run as a process of its own."""
    catalogue = tmp_path_factory.mktemp("catalogue")
    draw_catalogue(catalogue, products=300, users=5, seed=0)
    out = tmp_path_factory.mktemp("models") / "backbone"
    command = [Path(sys.executable).with_name("vlm2rec"), "make-backbone", "--items", catalogue / "items.parquet"]
    # its steps end it, not the clock: a busy machine makes the same backbone
    command += ["--images", catalogue / "images", "--out", out, "--minutes", "30"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "answered with a word of the item" in " ".join(done.stderr.split())
    return out


def quick(catalogue: Path, out: Path, **changes: Any) -> MakeBackboneConfig:
    paths = {"items": catalogue / "items.parquet", "images": catalogue / "images", "out": out}
    return MakeBackboneConfig(**(paths | QUICK | changes))


def ordinary(folder: Path) -> Qwen2_5_VLForConditionalGeneration:
    """Load a model folder with the stock classes, hold it against what is ordinary, and return the model."""
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, Qwen2_5_VLForConditionalGeneration)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = 'Ünïcode ☕ "mug", 2½ l\n東京'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == model.config.image_token_id
    return model


# --- the command with small sizes ---------------------------------------------------------------------------
def test_a_few_steps_lower_the_loss_of_held_out_titles_and_pictures(
    catalogue: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told = {}
    for steps in (2, 60):
        make_backbone.run(quick(catalogue, tmp_path / str(steps), max_steps=steps))
        told[steps] = json.loads((tmp_path / str(steps) / "vlm2rec.json").read_text())["training"]
        assert told[steps]["steps"] == steps
    for kind in ("text", "image"):
        assert told[60][kind]["items"] == 10
        assert told[60][kind]["loss"] < told[2][kind]["loss"] - 0.5
    ordinary(tmp_path / "60")
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "answered with a word of the item" in " ".join(printed.err.split())


# --- the command with default flags -------------------------------------------------------------------------
@pytest.mark.slow
def test_it_is_an_ordinary_model_folder_of_one_to_five_million_parameters(made: Path) -> None:
    assert 1e6 < sum(weight.numel() for weight in ordinary(made).parameters()) < 5e6


@pytest.mark.slow
def test_it_names_what_held_out_titles_and_pictures_show(made: Path) -> None:
    told = json.loads((made / "vlm2rec.json").read_text())
    assert told["training"]["steps"] > 300
    assert told["training"]["text"]["items"] == told["training"]["image"]["items"] == 30
    for kind in ("text", "image"):
        score = told["training"][kind]
        assert score["accuracy"] > 0.8
        assert score["majority"] < 0.6


@pytest.mark.slow
def test_on_products_it_has_never_seen_pictures_tell_looks_and_titles_tell_words(made: Path, tmp_path: Path) -> None:
    draw_catalogue(tmp_path, products=300, users=5, seed=1)
    items = pl.read_parquet(tmp_path / "items.parquet")
    backbone = Backbone.load(str(made), device="cpu")
    looks = backbone.encode_images([Image.open(tmp_path / "images" / path) for path in items["image_path"]])
    with torch.no_grad():
        image = torch.cat([backbone.encode([backbone.tokenize(image_prompt(1), [look])]) for look in looks])
        text = torch.cat([backbone.encode([backbone.tokenize(text_prompt([title]))]) for title in items["title"]])
    assert centroid_accuracy(image, items["colour"].to_list()) > 0.8
    assert centroid_accuracy(image, items["pattern"].to_list()) > 0.6
    assert centroid_accuracy(image, items["brand"].to_list()) < 0.3
    assert centroid_accuracy(text, items["brand"].to_list()) > 0.8
    assert centroid_accuracy(text, items["material"].to_list()) > 0.8
    assert centroid_accuracy(text, items["pattern"].to_list()) < 0.35  # one of five, and no title names it


def centroid_accuracy(vectors: torch.Tensor, labels: list[str]) -> float:
    """Share of the second half of `vectors` (N, d) whose nearest label mean, taken from the first half, is theirs."""
    names = sorted(set(labels))
    label = torch.tensor([names.index(one) for one in labels])
    unit = torch.nn.functional.normalize(vectors - vectors.mean(dim=0), dim=1)
    half = len(unit) // 2
    means = torch.stack([unit[:half][label[:half] == number].mean(dim=0) for number in range(len(names))])
    nearest = torch.cdist(unit[half:], means.nan_to_num(100.0)).argmin(dim=1)
    return (nearest == label[half:]).float().mean().item()


# --- bad input ----------------------------------------------------------------------------------------------
def test_a_strange_folder_is_left_alone(catalogue: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="not empty"):
        make_backbone.run(quick(catalogue, tmp_path))
    (tmp_path / "vlm2rec.json").write_text('{"written_by": "vlm2rec finetune"}')
    with pytest.raises(ConfigError, match="not empty"):
        make_backbone.run(quick(catalogue, tmp_path))
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_its_own_folder_is_replaced_and_nothing_else_is_left(catalogue: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    make_backbone.run(quick(catalogue, out))
    before = (out / "model.safetensors").read_bytes()
    make_backbone.run(quick(catalogue, out, seed=1))
    assert (out / "model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (out / "notes.txt").write_text("precious")
    with pytest.raises(ConfigError, match=r"holds notes\.txt"):
        make_backbone.run(quick(catalogue, out))
    assert (out / "notes.txt").read_text() == "precious"
    plain = tmp_path / "plain"
    plain.touch()
    assert {path.stat().st_mode for path in out.iterdir()} == {plain.stat().st_mode}, "as the umask says"


def test_the_same_seed_gives_the_same_weights(catalogue: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_backbone.run(quick(catalogue, tmp_path / name))
    one, two = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for key, weight in one.items():
        torch.testing.assert_close(weight, two[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption_column": "captoin"}, "no column 'captoin'.*did you mean 'caption'"),
        ({"caption_column": "empty"}, "none of the 100 items"),
        ({"title_column": "name"}, "title-column"),
    ],
)
def test_a_wrong_column_is_named(change: dict[str, str], message: str, catalogue: Path, tmp_path: Path) -> None:
    items = tmp_path / "items.parquet"
    pl.read_parquet(catalogue / "items.parquet").with_columns(empty=pl.lit(" -- ")).write_parquet(items)
    with pytest.raises(DataError, match=f"(?is){message}"):
        make_backbone.run(quick(catalogue, tmp_path / "model", items=items, **change))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"hidden_size": 100}, "hidden_size"), ({"vocabulary": 300}, "vocabulary"), ({"max_pixels": 9}, "max_pixels")],
)
def test_impossible_sizes_are_refused(change: dict[str, int], message: str, catalogue: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        make_backbone.run(quick(catalogue, tmp_path / "model", **change))


def test_unreadable_pictures_are_counted_and_their_titles_still_learnt(
    catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number, path in enumerate(sorted((catalogue / "images").iterdir())):
        (images / path.name).write_bytes(b"no picture" if number < 4 else path.read_bytes())
    make_backbone.run(quick(catalogue, tmp_path / "model", images=images))
    told = " ".join(capsys.readouterr().err.split())
    assert "4 images cannot be read" in told
    assert "100 items, 96 with an image" in told


def test_a_catalogue_whose_pictures_are_all_broken_is_an_error(catalogue: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for path in (catalogue / "images").iterdir():
        (images / path.name).write_bytes(b"no picture")
    with pytest.raises(DataError, match="image that can be read"):
        make_backbone.run(quick(catalogue, tmp_path / "model", images=images))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


def test_titles_serve_where_there_is_no_caption_and_lists_are_joined(catalogue: Path, tmp_path: Path) -> None:
    items = pl.read_parquet(catalogue / "items.parquet").select("item_id", "title", "image_path")
    items.write_parquet(tmp_path / "bare.parquet")
    make_backbone.run(quick(catalogue, tmp_path / "bare", items=tmp_path / "bare.parquet"))
    listed = items.with_columns(categories=pl.Series([["Home", "Mugs"], ["Home", "Lamps"]] * 50))
    listed.write_parquet(tmp_path / "listed.parquet")
    make_backbone.run(quick(catalogue, tmp_path / "listed", items=tmp_path / "listed.parquet"))
    words = {name: json.loads((tmp_path / name / "vlm2rec.json").read_text())["words"] for name in ("bare", "listed")}
    assert words["bare"] > 20
    assert words["listed"] == 2  # "Home" is in every caption and says nothing


# --- the pieces ---------------------------------------------------------------------------------------------
def test_words_of_captions() -> None:
    words = caption_words(["Adventure|Sci-Fi", "a red mug, red", "a blue mug", "a d'Or", "a", ""])
    assert words == [("Adventure", "Sci-Fi"), ("red", "mug"), ("blue", "mug"), ("d'Or",), ("a",), ()]


def test_an_answer_is_one_token_of_its_own() -> None:
    words = [("striped", "teal"), ("dotted", "orange")] * 20
    tokenizer = train_tokenizer(["Norwick mug"] * 40, words, 600)

    class Plain:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

        def decode(self, ids: list[int]) -> str:
            return tokenizer.decode(ids)

    assert len(answer_tokens(Plain(), ("1995", "teal"))) == 1
    assert len(answer_tokens(Plain(), ("1995",))) == 1
    answers = answer_tokens(Plain(), ("striped", "teal", "dotted", "orange"))
    assert len(set(answers)) == 4
    assert [tokenizer.decode([answer]) for answer in answers] == [" striped", " teal", " dotted", " orange"]
    assert tokenizer.get_vocab_size() <= 600


def test_steps_hold_the_shares_they_promise() -> None:
    random = np.random.default_rng(0)
    rows, pictured = np.arange(100), np.arange(60)
    steps = [draw_step(random, rows, pictured, 16) for _ in range(4000)]
    kinds = Counter(step.kind for step in steps)
    for kind, share in KINDS.items():
        assert kinds[kind] / 4000 == pytest.approx(share, abs=0.03)
    lengths = Counter(len(step.rows[0]) for step in steps)
    for length, share in ITEMS_IN_A_PROMPT.items():
        assert lengths[length] / 4000 == pytest.approx(share, abs=0.03)
    for step in steps:
        items = [row for rows in step.rows for row in rows]
        assert len(items) == (16 * (TEXTS_PER_IMAGE if step.kind == "text" else 1)) // len(step.rows[0]) * len(
            step.rows[0]
        )
        assert step.kind == "text" or max(items) < 60
    assert {draw_step(random, rows, pictured[:0], 16).kind for _ in range(50)} == {"text"}


def test_the_learning_rate_warms_up_falls_and_ends_with_the_time() -> None:
    rates = [rate(step, 1000, 0.0) for step in range(1000)]
    assert np.argmax(rates) in range(30, 60)
    assert rates[0] == pytest.approx(1 / 40)
    assert rates[500] == pytest.approx(0.5, abs=0.01)
    assert rates[-1] == pytest.approx(0.02)
    assert rate(100, 1000, 0.7) == rates[100]
    assert rate(100, 1000, 0.85) == pytest.approx(rates[100] / 2)
    assert rate(100, 1000, 1.0) == 0


def test_a_moved_picture_keeps_its_size_and_its_colours() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (48, 36, 3), np.uint8)
    random = np.random.default_rng(1)
    again = [np.asarray(moved(picture, random)) for _ in range(10)]
    assert {one.shape for one in again} == {picture.shape}
    assert len({one.tobytes() for one in again}) > 5
    assert all(set(map(tuple, one.reshape(-1, 3))) <= set(map(tuple, picture.reshape(-1, 3))) for one in again)


def test_the_settings_of_the_command_are_those_of_the_library() -> None:
    library = SmallBackboneSettings()
    command = MakeBackboneConfig(items=Path("i"), images=Path("d"), out=Path("o"))
    for name in SmallBackboneSettings.__dataclass_fields__:
        assert getattr(command, name) == getattr(library, name)
