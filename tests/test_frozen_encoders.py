"""Frozen encoders: what their own folder says is what is done, whatever else is in the batch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from PIL import Image
from sentence_transformers import SentenceTransformer
from tiny_encoders import (
    CLIP_DIM,
    MEAN,
    WIDTH,
    sentence_folder,
    tiny_bert,
    tiny_clip,
    tiny_efficientnet,
    tiny_resnet,
    tiny_siglip,
    tiny_siglip2,
)
from torch import Tensor

from vlm2rec.embedder.backbones.images import ImageError
from vlm2rec.embedder.contract.errors import ConfigError, MissingDependencyError, ModelError, Vlm2RecError
from vlm2rec.embedder.encoders.frozen import frozen_fingerprint, load_frozen

TITLES = ["red chair", "A small Blue lamp of 1987", "x", "soft woollen hat, green"]
IMAGE_ENCODERS = {"resnet": (tiny_resnet, 40), "efficientnet": (tiny_efficientnet, 128)}
CLIPS: dict[str, Callable[[Path], Path]] = {"clip": tiny_clip, "siglip": tiny_siglip, "siglip2": tiny_siglip2}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def sentence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentence_folder(tmp_path_factory.mktemp("sentence"))


@pytest.fixture(scope="module", params=CLIPS)
def clip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CLIPS[request.param](tmp_path_factory.mktemp(request.param))


def states(folder: Path, title: str) -> Tensor:
    """Return the token states of one title alone, (T, d), from transformers itself."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder)
    inputs = tokenizer([title], return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state[0]


def text_of(folder: Path, titles: list[str], **settings: Any) -> np.ndarray:
    return load_frozen(folder, device="cpu", **settings).encode_items(titles, [None] * len(titles)).text


def images(count: int) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (40 + 9 * i, 64, 3), dtype=np.uint8)) for i in range(count)]


# --- image encoders ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=IMAGE_ENCODERS)
def image_encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    build, dim = IMAGE_ENCODERS[request.param]
    return build(tmp_path_factory.mktemp(request.param)), dim


def pooled(folder: Path, image: Image.Image) -> np.ndarray:
    """Return the vector of one image alone, (d,), from transformers itself."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(processor(images=[image], return_tensors="pt")["pixel_values"]).pooler_output.flatten().numpy()


def test_an_image_encoder_gives_what_the_model_pools(image_encoder: tuple[Path, int]) -> None:
    folder, dim = image_encoder
    settings = frozen_fingerprint(folder)
    assert (settings["source"], settings["dim"], settings["views"]) == ("image", dim, ["fused", "image"])
    assert settings["max_pixels"] == 32**2 and json.loads(json.dumps(settings)) == settings
    encoder = load_frozen(folder, device="cpu")
    assert encoder.fingerprint == settings
    pictures = images(3)
    found = encoder.encode_items(["a", "b", "c", "d"], [pictures[0], None, *pictures[1:]])
    for row, picture in ((0, pictures[0]), (2, pictures[1]), (3, pictures[2])):
        np.testing.assert_allclose(found.image[row], pooled(folder, picture), rtol=1e-4, atol=1e-5)
    assert np.isnan(found.image[1]).all() and np.isnan(found.text).all() and not found.truncated.any()
    np.testing.assert_array_equal(found.fused, found.image)
    assert len(np.unique(found.image[[0, 2, 3]], axis=0)) == 3


def test_the_head_of_a_classifier_is_left_out(tmp_path: Path) -> None:
    folder = tiny_resnet(tmp_path)
    expected = load_frozen(folder, device="cpu").encode_items(["a"], images(1)).image
    model = transformers.ResNetForImageClassification.from_pretrained(folder)
    model.resnet.load_state_dict(transformers.ResNetModel.from_pretrained(folder).state_dict())
    model.save_pretrained(folder)
    found = load_frozen(folder, device="cpu").encode_items(["a"], images(1)).image
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("norm", ["raw", "normalised"])
def test_beside_a_text_encoder_every_view_has_its_own_length(
    norm: Any, image_encoder: tuple[Path, int], sentence: Path
) -> None:
    folder, dim = image_encoder
    encoder = load_frozen(sentence, image_encoder=folder, fusion_norm=norm, device="cpu")
    settings = frozen_fingerprint(sentence, image_encoder=folder, fusion_norm=norm)
    assert encoder.fingerprint == settings and json.loads(json.dumps(settings)) == settings
    assert settings["dims"] == {"fused": WIDTH + dim, "text": WIDTH, "image": dim}
    found = encoder.encode_items(TITLES[:2], [images(1)[0], None])
    np.testing.assert_allclose(found.text, text_of(sentence, TITLES[:2]))
    np.testing.assert_allclose(found.image[0], pooled(folder, images(1)[0]), rtol=1e-4, atol=1e-5)
    assert np.isnan(found.image[1]).all() and np.isnan(found.fused[1]).all()
    lengths = np.linalg.norm(found.text[0]), np.linalg.norm(found.image[0])
    scale = (1.0, 1.0) if norm == "raw" else lengths
    expected = np.concatenate([found.text[0] / scale[0], found.image[0] / scale[1]])
    np.testing.assert_allclose(found.fused[0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("first", "second", "settings", "message"),
    [
        ("resnet", None, {"encoder_kind": "sentence"}, r"type 'resnet' as sentence.*leave --encoder-kind out"),
        ("resnet", None, {"pooling": "mean"}, r"--pooling with an image encoder"),
        ("bert", None, {"encoder_kind": "image"}, r"type 'bert' as image.*one of resnet, efficientnet"),
        ("resnet", "resnet", {}, r"--image-encoder .* \(image\) beside --encoder .* \(image\)"),
        ("clip", "resnet", {}, r"beside --encoder .* \(clip\)"),
        ("bert", "clip", {}, r"--image-encoder .* \(clip\) beside"),
    ],
)
def test_settings_that_do_not_fit_an_image_encoder_are_refused(
    first: str, second: str | None, settings: dict[str, Any], message: str, bert: Path, tmp_path: Path
) -> None:
    folders = {"bert": bert, "resnet": tiny_resnet(tmp_path / "resnet"), "clip": tiny_clip(tmp_path / "clip")}
    other = {} if second is None else {"image_encoder": folders[second]}
    with pytest.raises(ConfigError, match=message):
        frozen_fingerprint(folders[first], **other, **settings)  # type: ignore[arg-type]


def test_a_damaged_image_encoder_is_a_model_error(tmp_path: Path) -> None:
    folder = tiny_resnet(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_sizes": "many"}))
    with pytest.raises(ModelError, match="hidden_sizes = 'many'"):
        frozen_fingerprint(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match="image processor"):
        frozen_fingerprint(folder)


# --- text encoders ----------------------------------------------------------------------------------------------
def test_a_sentence_transformers_folder_gives_normalised_means_of_token_states(sentence: Path) -> None:
    expected = torch.stack([torch.nn.functional.normalize(states(sentence, t).mean(0), dim=0) for t in TITLES])
    np.testing.assert_allclose(text_of(sentence, TITLES), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "pool"),
    [
        ("cls_token", lambda hidden: hidden[0]),
        ("max_tokens", lambda hidden: hidden.amax(0)),
        ("mean_sqrt_len_tokens", lambda hidden: hidden.sum(0) / len(hidden) ** 0.5),
        (
            "weightedmean_tokens",
            lambda hidden: torch.arange(1.0, len(hidden) + 1) @ hidden / sum(range(len(hidden) + 1)),
        ),
        ("lasttoken", lambda hidden: hidden[-1]),
    ],
)
def test_every_pooling_of_the_folder_is_done_as_it_says(
    tmp_path: Path, mode: str, pool: Callable[[Tensor], Tensor]
) -> None:
    folder = sentence_folder(tmp_path, {f"pooling_mode_{mode}": True}, normalise=False)
    expected = torch.stack([pool(states(folder, title)) for title in TITLES])
    np.testing.assert_allclose(text_of(folder, TITLES), expected, atol=1e-5)


def test_several_poolings_are_concatenated_in_the_packages_order(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path, {**MEAN, "pooling_mode_cls_token": True}, normalise=False)
    hidden = states(folder, TITLES[1])
    found = text_of(folder, TITLES)
    assert found.shape == (4, 2 * WIDTH)
    np.testing.assert_allclose(found[1], torch.cat([hidden[0], hidden.mean(0)]), atol=1e-5)


def test_the_newer_form_of_the_pooling_file_is_read(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path, {"pooling_mode": "cls"}, normalise=False)
    np.testing.assert_allclose(text_of(folder, TITLES)[0], states(folder, TITLES[0])[0], atol=1e-5)
    both = sentence_folder(tmp_path, {"pooling_mode": ["cls", "mean"]}, normalise=False)
    assert text_of(both, TITLES).shape == (4, 2 * WIDTH)


def test_a_dense_module_maps_the_pooled_vector(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path, dense=9, normalise=False)
    weights = safetensors.torch.load_file(folder / "2_Dense" / "model.safetensors")
    pooled = states(folder, TITLES[0]).mean(0)
    expected = torch.tanh(weights["linear.weight"] @ pooled + weights["linear.bias"])
    found = text_of(folder, TITLES)
    assert frozen_fingerprint(folder)["dim"] == found.shape[1] == 9
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_a_folder_without_modules_is_pooled_by_the_mean_or_as_asked(bert: Path) -> None:
    hidden = states(bert, TITLES[1])
    for pooling, expected in (("auto", hidden.mean(0)), ("cls", hidden[0]), ("last", hidden[-1])):
        np.testing.assert_allclose(text_of(bert, TITLES, pooling=pooling)[1], expected, atol=1e-5)


@pytest.mark.parametrize("dense", [None, 9])
@pytest.mark.parametrize("mode", ["mean_tokens", "cls_token", "lasttoken"])
def test_a_folder_gives_the_vectors_that_sentence_transformers_itself_gives(
    tmp_path: Path, mode: str, dense: int | None
) -> None:
    folder = sentence_folder(tmp_path, {f"pooling_mode_{mode}": True}, dense=dense)
    theirs = SentenceTransformer(str(folder), device="cpu", local_files_only=True).encode(TITLES)
    np.testing.assert_allclose(text_of(folder, TITLES), theirs, atol=1e-6)


def test_means_and_dense_layers_stay_in_float32_beside_a_model_in_bfloat16(tmp_path: Path) -> None:
    encoder: Any = load_frozen(sentence_folder(tmp_path, dense=9), device="cpu", dtype="bfloat16")
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in encoder.head.parameters()} == {torch.float32}


def test_auto_is_float32(bert: Path) -> None:
    assert frozen_fingerprint(bert, dtype="auto") == frozen_fingerprint(bert, dtype="float32")


def test_a_title_does_not_depend_on_its_neighbours_or_the_budget(sentence: Path) -> None:
    together = text_of(sentence, TITLES)
    for budget in (1, 20):
        np.testing.assert_allclose(text_of(sentence, TITLES[::-1], token_budget=budget)[::-1], together, atol=1e-5)
    np.testing.assert_allclose(text_of(sentence, TITLES[2:3])[0], together[2], atol=1e-5)


def test_text_alone_is_the_fused_vector_too_and_there_is_no_image_vector(sentence: Path) -> None:
    encoder = load_frozen(sentence, device="cpu")
    found = encoder.encode_items(TITLES, [None] * 4)
    np.testing.assert_array_equal(found.fused, found.text)
    assert np.isnan(found.image).all()
    assert encoder.fingerprint["views"] == ["fused", "text"]


def test_long_titles_are_cut_to_the_folders_limit_and_flagged(sentence: Path) -> None:
    long = "red chair " * 5_000
    found = load_frozen(sentence, device="cpu").encode_items(["red chair", long], [None, None])
    assert found.truncated.tolist() == [False, True]
    shorter = " ".join(["red chair"] * 5)  # 10 words, [CLS] and [SEP]: 12 tokens
    np.testing.assert_allclose(found.text[1], text_of(sentence, [shorter])[0], atol=1e-5)


def test_a_default_prompt_stands_before_every_title(tmp_path: Path) -> None:
    prompts = {"prompts": {"item": "lamp "}, "default_prompt_name": "item"}
    folder = sentence_folder(tmp_path, normalise=False, prompts=prompts)
    np.testing.assert_allclose(text_of(folder, ["red"])[0], states(folder, "lamp red").mean(0), atol=1e-5)


def test_an_empty_title_has_a_vector_too(bert: Path) -> None:
    found = text_of(bert, ["\0 ", "red"])
    np.testing.assert_allclose(found[0], states(bert, "").mean(0), atol=1e-5)


def test_special_tokens_in_a_title_are_ordinary_text(bert: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    encoder: Any = load_frozen(bert, device="cpu")
    ids, _ = encoder.titles.tokenize(["red [SEP] chair [MASK]\0"])
    assert not set(ids[0][1:-1]) & set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}


def test_a_missing_pooler_is_no_matter_and_any_other_missing_weight_is(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path)
    before = text_of(folder, TITLES)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    without = {name: value for name, value in weights.items() if "pooler" not in name}
    assert len(without) == len(weights) - 2
    safetensors.torch.save_file(without, folder / "model.safetensors", metadata={"format": "pt"})
    np.testing.assert_array_equal(text_of(folder, TITLES), before)
    without.pop(next(name for name in without if "query.weight" in name))
    safetensors.torch.save_file(without, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights, among them .*query\.weight"):
        text_of(folder, TITLES)


# --- CLIP and SigLIP --------------------------------------------------------------------------------------------
def test_clip_vectors_are_the_models_own_features(clip: Path) -> None:
    model = transformers.AutoModel.from_pretrained(clip)
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    processor = transformers.AutoImageProcessor.from_pretrained(clip, backend="pil")
    length = model.config.text_config.max_position_embeddings
    padding: Any = True if model.config.model_type == "clip" else "max_length"
    found = load_frozen(clip, device="cpu").encode_items(TITLES, images(4))
    for row, (title, image) in enumerate(zip(TITLES, images(4), strict=True)):
        inputs = tokenizer([title], padding=padding, truncation=True, max_length=length, return_tensors="pt")
        kept = {name: inputs[name] for name in tokenizer.model_input_names if name != "token_type_ids"}
        with torch.no_grad():
            text = model.get_text_features(**kept).pooler_output[0]
            picture = model.get_image_features(**processor(images=[image], return_tensors="pt")).pooler_output[0]
        np.testing.assert_allclose(found.text[row], text, atol=1e-4)
        np.testing.assert_allclose(found.image[row], picture, atol=1e-4)
    np.testing.assert_array_equal(found.fused, found.text + found.image)
    assert found.fused.shape[1] == frozen_fingerprint(clip)["dim"]
    assert np.linalg.norm(found.image[0] - found.image[1]) > 1e-2


def test_unit_vectors_are_added_on_request_and_an_item_without_image_keeps_its_text(clip: Path) -> None:
    encoder = load_frozen(clip, device="cpu", fusion_norm="normalised")
    found = encoder.encode_items(TITLES[:2], [images(1)[0], ImageError("broken")])
    expected = found.text[0] / np.linalg.norm(found.text[0]) + found.image[0] / np.linalg.norm(found.image[0])
    np.testing.assert_allclose(found.fused[0], expected, atol=1e-6)
    assert np.isnan(found.image[1]).all()
    np.testing.assert_array_equal(found.fused[1], found.text[1])


def test_a_sentence_transformers_folder_around_clip_is_read_as_clip(tmp_path: Path) -> None:
    tiny_clip(tmp_path / "0_CLIPModel")
    listed = [{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    found = load_frozen(tmp_path, device="cpu").encode_items(TITLES, images(4))
    assert found.image.shape == (4, CLIP_DIM)


# --- what decides a vector --------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["sentence", "clip"])
def test_settings_are_known_before_the_weights_and_are_plain_json(sentence: Path, tmp_path: Path, kind: str) -> None:
    folder = sentence if kind == "sentence" else tiny_clip(tmp_path)
    settings = frozen_fingerprint(folder, device="cpu")
    assert load_frozen(folder, device="cpu").fingerprint == json.loads(json.dumps(settings)) == settings
    assert (settings["source"], settings["made_with"]) == (kind, {"encoder": folder.name})


def test_other_weights_and_other_pooling_are_other_settings(bert: Path, tmp_path: Path) -> None:
    other = tiny_bert(tmp_path, seed=1)
    assert frozen_fingerprint(bert)["encoder_hash"] != frozen_fingerprint(other)["encoder_hash"]
    assert frozen_fingerprint(bert) != frozen_fingerprint(bert, pooling="cls")


# --- bad input --------------------------------------------------------------------------------------------------
def name_module(folder: Path, kind: str) -> None:
    """Let the last module be of another class."""
    listed = json.loads((folder / "modules.json").read_text())
    listed[-1]["type"] = kind
    (folder / "modules.json").write_text(json.dumps(listed))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: name_module(folder, "sentence_transformers.models.LSTM"),
            "modules of .* Transformer, Pooling, LSTM.*import-vectors",
        ),
        (lambda folder: name_module(folder, "evil.Normalize"), "modules of .* Transformer, Pooling, evil.Normalize"),
        (lambda folder: name_module(folder, "sentence_transformers_evil.Normalize"), "sentence_transformers_evil"),
        (lambda folder: (folder / "modules.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "modules.json").write_text("{}"), "lists no modules"),
        (lambda folder: (folder / "modules.json").write_text("[]"), "modules of .* are none"),
        (lambda folder: (folder / "1_Pooling" / "config.json").write_text("{}"), "pools by nothing"),
        (
            lambda folder: (folder / "1_Pooling" / "config.json").write_text('{"include_prompt": false}'),
            "leaves the prompt out",
        ),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "never opened"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "is damaged"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot be loaded"),
    ],
)
def test_a_damaged_or_unknown_folder_is_a_model_error(
    tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    folder = sentence_folder(tmp_path / "model")
    damage(folder)
    with pytest.raises(ModelError, match=message):
        text_of(folder, TITLES)


@pytest.mark.parametrize("named", ["torch.hub.load", "torch.nn.modules.container.Sequential", "evil.Tanh"])
def test_a_dense_module_with_another_class_than_an_activation_is_refused(tmp_path: Path, named: str) -> None:
    folder = sentence_folder(tmp_path, dense=9)
    config = json.loads((folder / "2_Dense" / "config.json").read_text())
    (folder / "2_Dense" / "config.json").write_text(json.dumps(config | {"activation_function": named}))
    with pytest.raises(ModelError, match=f"has the activation {named}"):
        load_frozen(folder, device="cpu")


def test_a_dense_module_with_weights_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path, dense=9)
    safetensors.torch.save_file({"linear.weight": torch.zeros(9, WIDTH)}, folder / "2_Dense" / "model.safetensors")
    with pytest.raises(ModelError, match="weights of a Dense module"):
        load_frozen(folder, device="cpu")


def test_without_the_extra_a_text_encoder_is_refused_and_clip_is_not(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in {name for name in sys.modules if name.split(".")[0] == "sentence_transformers"}:
        monkeypatch.setitem(sys.modules, name, None)
    for call in (frozen_fingerprint, load_frozen):
        with pytest.raises(MissingDependencyError, match=r"pip install 'vlm2rec\[sentence\]'") as refused:
            call(bert, device="cpu")
        assert refused.value.exit_code == 7
    assert load_frozen(tiny_clip(tmp_path), device="cpu").fingerprint["source"] == "clip"


def test_a_dense_module_with_pickled_weights_is_refused(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path, dense=9)
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights are never opened"):
        load_frozen(folder, device="cpu")


@pytest.mark.parametrize(
    ("which", "settings", "error", "message"),
    [
        ("bert", {"encoder_kind": "clip"}, ConfigError, "--encoder-kind clip with a folder of type 'bert'"),
        ("clip", {"encoder_kind": "sentence"}, ConfigError, "--encoder-kind sentence with a clip folder"),
        ("clip", {"pooling": "cls"}, ConfigError, "--pooling with a CLIP"),
        ("nothing", {}, ModelError, "is not a folder"),
        ("t5", {}, ModelError, "is of type 't5'"),
    ],
)
def test_settings_that_do_not_fit_the_folder_are_refused(
    bert: Path, tmp_path: Path, which: str, settings: dict[str, Any], error: type[Vlm2RecError], message: str
) -> None:
    folder = bert if which == "bert" else tmp_path / which
    if which == "clip":
        tiny_clip(folder)
    elif which == "t5":
        folder.mkdir()
        transformers.T5Config(d_model=8).save_pretrained(folder)
    with pytest.raises(error, match=message):
        frozen_fingerprint(folder, **settings)
