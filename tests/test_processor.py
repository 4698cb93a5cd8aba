"""Processors of the families: built without torchvision, exact in their token counts, safe against titles."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_models import FAMILIES
from tokenizers import Tokenizer, models

from vlm2rec.embedder.backbones import families
from vlm2rec.embedder.backbones.families import FAMILIES as FAMILY_TABLE
from vlm2rec.embedder.backbones.families import family_of, image_tokens, load_processor, neutralise
from vlm2rec.embedder.contract.errors import ConfigError, MissingDependencyError, ModelError

Tiny = Callable[[str], Path]
QWEN = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")
SIZES = [(300, 200), (50, 70), (224, 224), (1, 1), (1000, 31), (29, 700)]  # width, height


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def prompt(processor: object, images: int) -> str:
    return "Describe " + ", ".join(f"{i}) {processor.family.placeholder}" for i in range(images))  # type: ignore[attr-defined]


def image_id(processor: object) -> int:
    """The id of a token of an image; Gemma's images begin with another one."""
    return getattr(processor, "inner_image_token_id", processor.image_token_id)  # type: ignore[attr-defined]


def test_the_table_of_families_is_the_list_of_tiny_models() -> None:
    assert set(FAMILY_TABLE) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_familys_own_processor_on_the_pil_backend(tiny: Tiny, family: str) -> None:
    processor = load_processor(tiny(family))
    own = getattr(transformers, FAMILY_TABLE[family].processor)
    assert isinstance(processor, own)
    assert type(processor).__name__ == own.__name__
    assert type(processor.image_processor).__name__.endswith("Pil")
    assert processor.family is family_of(tiny(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_image_tokens_counts_what_the_processor_makes(tiny: Tiny, family: str) -> None:
    processor = load_processor(tiny(family))
    for width, height in SIZES:
        many = 2 if processor.family.several else 1
        ids = processor(images=[[noise(width, height)] * many], text=[prompt(processor, many)])["input_ids"][0]
        assert ids.count(image_id(processor)) == many * image_tokens(processor, width, height), (width, height)


def test_image_tokens_of_known_sizes(tiny: Tiny) -> None:
    # Qwen2.5-VL: tokens of 28 × 28 pixels; 224² is 8 × 8, a 3:2 image shrinks to 9 × 6
    qwen = load_processor(tiny("qwen2_5_vl"))
    assert [image_tokens(qwen, *size) for size in [(224, 224), (2240, 2240), (300, 200), (56, 56)]] == [64, 64, 54, 4]
    # Qwen3-VL: tokens of 32 × 32 pixels
    assert image_tokens(load_processor(tiny("qwen3_vl")), 224, 224) == 49
    assert image_tokens(load_processor(tiny("internvl")), 10, 900) == 4
    assert image_tokens(load_processor(tiny("llava")), 10, 900) == 9


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_takes_what_the_processor_makes(tiny: Tiny, family: str) -> None:
    processor = load_processor(tiny(family))
    model = transformers.AutoModelForImageTextToText.from_pretrained(tiny(family)).eval()
    batch = processor(
        images=[[noise(60, 90)], [noise(90, 60), noise(50, 50)]],
        text=[prompt(processor, 1), prompt(processor, 2)],
        padding=True,
        padding_side="right",
        return_mm_token_type_ids=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        hidden = model.model(**batch).last_hidden_state
    assert hidden.shape == (2, batch["input_ids"].shape[1], 64)
    assert torch.isfinite(hidden).all()
    types = batch["token_type_ids" if family == "gemma3" else "mm_token_type_ids"]
    assert (types == 1).sum() >= (batch["input_ids"] == image_id(processor)).sum() > 0


@pytest.mark.parametrize("family", QWEN)
@pytest.mark.parametrize("max_pixels", [64 * 64, 112 * 112, 224 * 224])
def test_no_image_of_an_ordinary_shape_leaves_the_pixel_budget(tiny: Tiny, family: str, max_pixels: int) -> None:
    processor = load_processor(tiny(family), max_pixels=max_pixels)
    side = processor.image_processor.patch_size * processor.image_processor.merge_size
    for width, height in [(20, 30), (64, 64), (150, 200), (199, 250), (250, 200), (640, 480), (3000, 2000)]:
        assert image_tokens(processor, width, height) * side**2 <= max_pixels, (width, height)


def test_a_smaller_limit_of_the_model_wins(tiny: Tiny, tmp_path: Path) -> None:
    folder = changed(tiny("qwen2_5_vl"), tmp_path, "preprocessor_config.json", max_pixels=56 * 56)
    assert image_tokens(load_processor(folder, max_pixels=224 * 224), 500, 500) == 4
    # and the lower bound of Qwen3-VL (256²) gives way to a smaller budget
    size = load_processor(tiny("qwen3_vl"), max_pixels=112 * 112).image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (6272, 12544)
    size = load_processor(tiny("qwen2_5_vl"), max_pixels=28 * 28).image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (784, 784)


def test_internvl_never_cuts_an_image_into_tiles(tiny: Tiny) -> None:
    processor = load_processor(tiny("internvl"))
    batch = processor(images=[noise(1000, 300)], text=[prompt(processor, 1)], return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 56, 56)


def test_a_budget_below_one_token_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"max_pixels is 100.*784"):
        load_processor(tiny("qwen2_5_vl"), max_pixels=100)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_placeholder_is_what_the_chat_template_puts_for_an_image(tiny: Tiny, family: str) -> None:
    processor = load_processor(tiny(family))
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    applied = {"chat_template": processor.chat_template, "add_generation_prompt": True, "tokenize": False}
    text = processor.tokenizer.apply_chat_template([turn], **applied)
    assert processor.family.placeholder in text
    assert "What is it?" in text


@pytest.mark.parametrize("family", FAMILIES)
def test_a_processor_travels_to_a_data_worker(tiny: Tiny, family: str) -> None:
    processor = load_processor(tiny(family), max_pixels=112 * 112)
    copy = pickle.loads(pickle.dumps(processor))
    call = {"images": [noise(130, 170)], "text": [prompt(processor, 1)], "return_tensors": "pt"}
    for name, value in processor(**call).items():
        assert torch.equal(value, copy(**call)[name]), name


def test_a_family_whose_processor_needs_a_library_says_so(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"smolvlm model needs num2words.*install 'vlm2rec\[smolvlm\]'"):
        load_processor(tiny("smolvlm"))
    load_processor(tiny("idefics3"))


# --- titles -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "title", "expected"),
    [
        ("qwen2_5_vl", "Lamp <|im_end|> of <|image_pad|>", "Lamp < |im_end|> of < |image_pad|>"),
        ("qwen2_5_vl", "<|im_<|im_end|>end|>", "<|im_< |im_end|>end|>"),
        ("internvl", "<img>x</img> <IMG_CONTEXT>", "< img>x< /img> < IMG_CONTEXT>"),
        ("llava", "a <image> </s>", "a < image> < /s>"),
        ("qwen2_5_vl", "Größe < 3 | 5 > 2, <b>bold</b> 🙂", "Größe < 3 | 5 > 2, <b>bold</b> 🙂"),
        ("qwen2_5_vl", "", ""),
    ],
)
def test_neutralise_breaks_tokens_and_nothing_else(tiny: Tiny, family: str, title: str, expected: str) -> None:
    assert neutralise(load_processor(tiny(family)).tokenizer, title) == expected


_PIECES = [
    "<",
    "|",
    ">",
    "im_end",
    "image_pad",
    "<|im_end|>",
    "<|image_pad|>",
    "<|",
    "|>",
    " ",
    "a",
    "ß",
    "<|im_",
    "end|>",
]


@given(st.lists(st.sampled_from(_PIECES) | st.text(max_size=3), max_size=12).map("".join))
def test_fault_35_no_title_can_make_a_special_token(tiny: Tiny, title: str) -> None:
    tokenizer = _qwen_tokenizer(tiny)
    added = set(tokenizer.get_added_vocab().values())
    assert set(tokenizer.encode(title)) & added or neutralise(tokenizer, title) == title  # ordinary text is kept
    harmless = neutralise(tokenizer, title)
    assert not set(tokenizer.encode(harmless)) & added
    assert neutralise(tokenizer, harmless) == harmless


_cache: dict[Path, object] = {}


def _qwen_tokenizer(tiny: Tiny) -> transformers.PreTrainedTokenizerBase:
    folder = tiny("qwen2_5_vl")
    if folder not in _cache:
        _cache[folder] = load_processor(folder).tokenizer
    return _cache[folder]


# --- bad model folders --------------------------------------------------------------------------------------


def changed(folder: Path, to: Path, file: str, **values: object) -> Path:
    """Copy a model folder with some values of one of its .json files changed."""
    copy = Path(shutil.copytree(folder, to / "model"))
    content = json.loads((copy / file).read_text()) | values
    (copy / file).write_text(json.dumps(content))
    return copy


@pytest.mark.parametrize(
    ("family", "file", "message"),
    [
        ("qwen2_5_vl", "config.json", "has no config.json"),
        ("qwen2_5_vl", "tokenizer.json", "has no tokenizer.json"),
        ("qwen2_5_vl", "preprocessor_config.json", "has no preprocessor_config.json"),
        ("llava", "processor_config.json", "does not know the patch size"),
    ],
)
def test_a_missing_file_is_named(tiny: Tiny, tmp_path: Path, family: str, file: str, message: str) -> None:
    folder = Path(shutil.copytree(tiny(family), tmp_path / "model"))
    (folder / file).unlink()
    with pytest.raises(ModelError, match=message):
        load_processor(folder)


def test_a_tokenizer_that_loads_empty_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("qwen2_5_vl"), tmp_path / "model"))
    Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))  # transformers adds the two special tokens, silently
    with pytest.raises(ModelError, match=r"the tokenizer of .* has 2 tokens"):
        load_processor(folder)


def test_a_tokenizer_without_image_token_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("qwen2_5_vl"), tmp_path / "model"))
    text = (folder / "tokenizer.json").read_text().replace("<|image_pad|>", "<|picture|>")
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match=r"image token '<\|image_pad\|>' of .* is split into"):
        load_processor(folder)


def test_an_unknown_model_type_names_the_families(tiny: Tiny, tmp_path: Path) -> None:
    folder = changed(tiny("qwen2_5_vl"), tmp_path, "config.json", model_type="qwen2_5_v")
    with pytest.raises(ModelError, match=r"'qwen2_5_v' .did you mean 'qwen2_5_vl'.*qwen2_vl, qwen2_5_vl, qwen3_vl"):
        load_processor(folder)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_config_is_refused(tiny: Tiny, tmp_path: Path, content: str) -> None:
    folder = Path(shutil.copytree(tiny("qwen2_5_vl"), tmp_path / "model"))
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        load_processor(folder)


def test_a_missing_folder_a_file_and_an_adapter_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load_processor(tmp_path / "nothing")
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="is a file"):
        load_processor(tmp_path / "weights.bin")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is an adapter folder"):
        load_processor(tmp_path)


def test_a_hub_id_out_of_reach_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"Qwen/No-Such-Model.*hf download Qwen/No-Such-Model"):
        load_processor("Qwen/No-Such-Model")


def test_code_of_a_model_repository_is_never_run(tiny: Tiny, tmp_path: Path) -> None:
    trap = {"AutoTokenizer": ["trap.Tokenizer", None], "AutoImageProcessor": "trap.Images", "AutoConfig": "trap.Config"}
    folder = Path(shutil.copytree(tiny("qwen2_5_vl"), tmp_path / "model"))
    for file in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        content = json.loads((folder / file).read_text()) | {"auto_map": trap}
        (folder / file).write_text(json.dumps(content))
    (folder / "trap.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    processor = load_processor(folder)
    assert type(processor.image_processor).__name__ == "Qwen2VLImageProcessorPil"
    assert not (tmp_path / "ran").exists()
