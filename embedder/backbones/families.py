"""The processors of the model families: tokenizer and image processor, the same pixels on every machine.

Images always go through the PIL backend. torchvision's own resize differs in the third decimal, so a table exported
on a machine with torchvision would differ slightly from one exported without it. Its CPU release is also often missing
or broken. transformers' AutoProcessor requires torchvision for the video part of six families. vlm2rec needs no
video, so it assembles the family's own processor without that part.
Causal text models have only a tokenizer; `TextProcessor` lets them take the same path.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm2rec.embedder.backbones.model_files import (
    MODEL_FOLDER,
    UNLOADABLE,
    ModelFiles,
    Source,
    checked_weights,
    first_line,
    locate,
    no_hub_model,
    read_json,
    require_hub_id,
)
from vlm2rec.embedder.contract.errors import ConfigError, MissingDependencyError, ModelError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin


@dataclass(frozen=True)
class Family:
    """What differs between model families, as data. A new family is a new row of `FAMILIES`."""

    model_type: str
    processor: str  # class name in transformers
    placeholder: str  # stands for one image in a prompt, wrapped as the family's chat template wraps it
    area_budget: bool  # images keep their shape and `max_pixels` bounds their area; otherwise all get one fixed size
    note: str = ""  # shown to the user when the family is loaded
    text_only: bool = False  # a causal text model: no images, no processor
    blocks: str = ""  # where the tokens of an image see its later ones: in `all` layers, or in those with `windows`
    inputs: tuple[str, ...] = ()  # what the vision tower takes of the image processor besides pixels and grid
    several: bool = False  # an image is prepared as one of several; alone it would be cut into tiles
    needs: str = ""  # a library that the family's processor imports, with an extra of the same name as the family


_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("qwen2_vl", "Qwen2VLProcessor", _QWEN_IMAGE, area_budget=True),
        Family("qwen2_5_vl", "Qwen2_5_VLProcessor", _QWEN_IMAGE, area_budget=True),
        Family("qwen3_vl", "Qwen3VLProcessor", _QWEN_IMAGE, area_budget=True),
        # the processor adds <img> and </img> itself
        Family("internvl", "InternVLProcessor", "<IMG_CONTEXT>", area_budget=False),
        Family(
            "llava",
            "LlavaProcessor",
            "<image>",
            area_budget=False,
            note="LLaVA-1.5 spends 576 tokens on an image: more than seven images overflow its 4,096 positions",
        ),
        Family(
            "qwen3_5",
            "Qwen3VLProcessor",
            _QWEN_IMAGE,
            area_budget=True,
            note="most layers of Qwen3.5 carry a state along a row, so that each prompt runs by itself, unpacked",
        ),
        Family("gemma3", "Gemma3Processor", "<start_of_image>", area_budget=False, blocks="all"),
        Family(
            "gemma4",
            "Gemma4Processor",
            "<|image|>",
            area_budget=False,
            blocks="windows",
            inputs=("image_position_ids",),
        ),
        Family(
            "llava_onevision",
            "LlavaOnevisionProcessor",
            "<image>",
            area_budget=False,
            note="LLaVA-OneVision spends 730 tokens on an image: it is taken whole, as this model takes several",
            inputs=("image_sizes",),
            several=True,
        ),
        # SmolVLM is published under both types, and SmolVLM2 as smolvlm
        Family("idefics3", "Idefics3Processor", "<image>", area_budget=False),
        Family("smolvlm", "SmolVLMProcessor", "<image>", area_budget=False, needs="num2words"),
    )
}

# causal text models whose layers have the same names as Llama's
TEXT_FAMILIES: Mapping[str, Family] = {
    model_type: Family(model_type, processor="", placeholder="", area_budget=False, text_only=True)
    for model_type in ("qwen2", "qwen3", "llama", "mistral")
}

GEMMA4_TOKENS = (70, 140, 280, 560, 1120)
_TOKENIZER_AGAIN = "download the model folder again; it needs tokenizer.json and tokenizer_config.json"
_SMALLEST_TOKENIZER = 256  # a byte-level or byte-fallback vocabulary has at least one token for each byte


@dataclass(frozen=True)
class TextProcessor:
    """The processor of a causal text model: its tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    family: Family

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's template, or the default one of several; None if there is none."""
        template: Any = self.tokenizer.chat_template
        return template.get("default") if isinstance(template, dict) else template


def load_processor(
    source: Source, revision: str | None = None, max_pixels: int = 224 * 224
) -> ProcessorMixin | TextProcessor:
    """Return the family's own processor, without its video part, on the PIL backend.

    Args:
        source: Local model folder or Hugging Face hub id, or its files.
        revision: Revision of a hub model.
        max_pixels: Largest image area in pixels for families with an area budget; a smaller limit of the model's own
            processor wins. Families of fixed image size ignore it.

    The result has the attribute `family`; for a causal text model it is a `TextProcessor`. Code of the model
    repository is never run.

    Raises:
        ModelError: no such model, an unknown family, or a tokenizer or image processor that does not belong to it.
        ConfigError: `max_pixels` is smaller than one token of the model.
        MissingDependencyError: a library that this family's processor imports is not installed.
    """
    import transformers

    files = _located(source, revision)
    family = family_of(files)
    _require_files(files.folder, family)
    if family.needs and not find_spec(family.needs):
        raise MissingDependencyError(
            f"the processor of a {family.model_type} model needs {family.needs}, which is not installed",
            family.needs,
            f"pip install 'vlm2rec[{family.model_type}]'",
        )
    source, where = str(files.folder), {"trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **where)
        if family.text_only:
            return _checked_text(TextProcessor(tokenizer, family), str(source))
        family_class = getattr(transformers, family.processor)
        image_processor = transformers.AutoImageProcessor.from_pretrained(source, backend="pil", **where)
        settings, _ = family_class.get_processor_dict(source)
        settings = _accepted(family_class, {"chat_template": tokenizer.chat_template} | settings)
        _set_image_size(image_processor, family, max_pixels)
        for part in _UNUSED & set(inspect.signature(family_class.__init__).parameters):
            settings[part] = None
        processor = _without_video(family)(image_processor=image_processor, tokenizer=tokenizer, **settings)
    except UNLOADABLE as error:
        raise ModelError(
            f"the tokenizer or image processor of {source!r} cannot be loaded ({first_line(error)})",
            f"{MODEL_FOLDER} of a {family.model_type} model",
            "download the whole model folder again, with all its .json files",
        ) from error
    if hasattr(processor, "fake_image_token"):  # what the Idefics family's processor writes around an image
        whole = getattr(processor, "global_image_token", None) or processor.global_image_tag
        processor.start_image_token = processor.fake_image_token + whole
        processor.end_image_token = processor.fake_image_token
    if family.model_type == "gemma4":
        processor.start_image_token, processor.end_image_token = processor.boi_token, processor.eoi_token
    elif hasattr(processor, "boi_token"):  # Gemma 3: an image begins with another token than it has inside
        processor.start_image_token = f"\n\n{processor.boi_token}"
        processor.end_image_token = f"{tokenizer.eoi_token}\n\n"
        processor.inner_image_token = tokenizer.image_token
        processor.inner_image_token_id = tokenizer.image_token_id
    _check(processor, source)
    return processor


def checked_files(source: Source, revision: str | None = None) -> ModelFiles:
    """Return the files of a backbone of a known family, once nothing speaks against opening them.

    Args:
        source: Local model folder or Hugging Face hub id, or its files.
        revision: Revision of a hub model.

    Raises:
        ModelError: as `family_of`, `locate` and `checked_weights`.
    """
    files = _located(source, revision)
    family_of(files)
    checked_weights(files.folder)
    return files


def _located(source: Source, revision: str | None) -> ModelFiles:
    family_of(source, revision)  # of a hub model, before all of it is downloaded
    return locate(source, revision)


def family_of(source: Source, revision: str | None = None) -> Family:
    """Return the family of a local model folder or hub id; reads `config.json` only.

    Raises:
        ModelError: no such folder or hub model, no readable `config.json`, or a `model_type` that is in neither
            `FAMILIES` nor `TEXT_FAMILIES`.
    """
    model_type = str(read_model_config(source, revision).get("model_type"))
    known = {**FAMILIES, **TEXT_FAMILIES}
    if model_type not in known:
        hint = did_you_mean(model_type, known)
        raise ModelError(
            f"{_named(source)} is a model of type {model_type!r}{hint}",
            f"one of {', '.join(FAMILIES)}, or for --views text one of {', '.join(TEXT_FAMILIES)}",
            "choose a vision-language model of one of these families; for InternVL, a repository whose name ends"
            " in -hf",
        )
    return known[model_type]


def _named(source: Source) -> str:
    return source.source if isinstance(source, ModelFiles) else str(source)


def read_model_config(source: Source, revision: str | None = None) -> dict[str, Any]:
    """Return `config.json` of a local model folder or hub id as a plain dict.

    Raises:
        ModelError: no such folder or hub model, or no readable `config.json`.
    """
    folder = source.folder if isinstance(source, ModelFiles) else Path(source).expanduser()
    if folder.is_dir():
        return _local_config(folder)
    require_hub_id(str(source))
    return _hub_config(str(source), revision)


def _local_config(folder: Path) -> dict[str, Any]:
    if (folder / "config.json").is_file():
        return read_json(folder / "config.json")
    adapter = (folder / "adapter_config.json").is_file()
    raise ModelError(
        f"{folder} is an adapter folder, not a model" if adapter else f"{folder} has no config.json",
        MODEL_FOLDER,
        "give it as --adapter and its base model as --backbone" if adapter else "check the path",
    )


def _hub_config(source: str, revision: str | None) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(source, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise no_hub_model(source, revision, error) from error
    return dict(config)


def _require_files(folder: Path, family: Family) -> None:
    """Raise `ModelError` naming a file that a model folder lacks."""
    tokenizer = ("tokenizer.json", "vocab.json", "tokenizer.model")
    images = ("preprocessor_config.json", "processor_config.json")
    for names in (tokenizer,) if family.text_only else (tokenizer, images):
        if not any((folder / name).is_file() for name in names):
            raise ModelError(f"{folder} has no {names[0]}", MODEL_FOLDER, "download the whole model folder again")


_UNUSED = {"video_processor", "feature_extractor"}  # parts of a processor for videos and sounds


def _accepted(family_class: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Keep the settings that the processor's constructor takes, without the parts that are loaded separately."""
    parts = {"image_processor", "tokenizer"} | _UNUSED
    names = set(inspect.signature(family_class.__init__).parameters) - parts
    return {name: value for name, value in settings.items() if name in names}


def _set_image_size(image_processor: Any, family: Family, max_pixels: int) -> None:
    if hasattr(image_processor, "max_soft_tokens"):  # Gemma 4 was trained with images of these sizes
        area = (image_processor.patch_size * image_processor.pooling_kernel_size) ** 2
        most = min(max_pixels // area, image_processor.max_soft_tokens)
        image_processor.max_soft_tokens = max(number for number in GEMMA4_TOKENS if number <= max(most, 70))
        return
    if not family.area_budget:
        # InternVL would cut an image into up to twelve tiles of 256 tokens: ask for one tile. Both attributes are set,
        # because releases of transformers differ in which one they read.
        if hasattr(image_processor, "crop_to_patches"):
            image_processor.crop_to_patches = False
            image_processor.max_patches = 1
        # Idefics would cut it into tiles of 64 tokens beside the whole
        if hasattr(image_processor, "do_image_splitting"):
            image_processor.do_image_splitting = False
        return
    smallest = (image_processor.patch_size * image_processor.merge_size) ** 2
    if max_pixels < smallest:
        raise ConfigError(
            f"max_pixels is {max_pixels}",
            f"at least {smallest}, the area of one image token of {family.model_type}",
            "raise --max-pixels, for instance to 50176 (224 × 224)",
        )
    own = image_processor.size
    longest = min(max_pixels, own["longest_edge"])
    # A small image is enlarged to `shortest_edge` and then rounded *up* to whole tokens. From half the budget, this
    # stays within the budget.
    shortest = min(own["shortest_edge"], max(longest // 2, smallest))
    image_processor.size = type(own)(**{"shortest_edge": shortest, "longest_edge": longest})


@cache
def _without_video(family: Family) -> type[Any]:
    """Return a subclass of the family's processor that needs no video processor."""
    import transformers

    family_class: Any = getattr(transformers, family.processor)

    class WithoutVideo(family_class):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name in _UNUSED and argument is None:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

        def __reduce__(self) -> tuple[Any, ...]:
            return _restore, (self.family.model_type, self.__dict__.copy())

    WithoutVideo.family = family
    # so that provenance and files name the family's own class
    WithoutVideo.__name__ = WithoutVideo.__qualname__ = family.processor
    return WithoutVideo


def _restore(model_type: str, state: dict[str, Any]) -> Any:
    """Rebuild a pickled processor in a data worker."""
    cls: Any = _without_video(FAMILIES[model_type])
    processor = cls.__new__(cls)
    processor.__dict__.update(state)
    return processor


def _check(processor: Any, source: str) -> None:
    """Refuse what transformers loads without complaint: an empty tokenizer, missing image tokens or sizes."""
    family, tokenizer = processor.family, processor.tokenizer
    _check_tokenizer(tokenizer, family, source)
    token, token_id = processor.image_token, processor.image_token_id
    ids = tokenizer.encode(token, add_special_tokens=False)
    if ids != [token_id] or token_id == tokenizer.unk_token_id:
        raise ModelError(
            f"the image token {token!r} of {source} is split into {len(ids)} tokens",
            f"one token: the special tokens of a {family.model_type} model",
            _TOKENIZER_AGAIN,
        )
    if getattr(processor, "patch_size", 0) is None:  # LLaVA keeps it outside the image processor
        raise ModelError(
            f"the processor of {source} does not know the patch size",
            "a processor_config.json with patch_size, vision_feature_select_strategy and num_additional_image_tokens",
            "download the model folder again; it needs processor_config.json",
        )


def _checked_text(processor: TextProcessor, source: str) -> TextProcessor:
    _check_tokenizer(processor.tokenizer, processor.family, source)
    return processor


def _check_tokenizer(tokenizer: Any, family: Family, source: str) -> None:
    if len(tokenizer) < _SMALLEST_TOKENIZER:
        raise ModelError(
            f"the tokenizer of {source} has {len(tokenizer)} tokens (its tokenizer.json is missing or empty)",
            f"the tokenizer of a {family.model_type} model, with at least {_SMALLEST_TOKENIZER} tokens",
            _TOKENIZER_AGAIN,
        )


def image_tokens(processor: ProcessorMixin, width: int, height: int) -> int:
    """Return how many image tokens an image of `width` × `height` pixels becomes, without opening it.

    Tokens that mark the ends of the image (`<|vision_start|>`, `<img>`) are not counted.

    Raises:
        ValueError: the image is more than 200 times as long as wide (Qwen families).
    """
    images = processor.image_processor
    if processor.family.area_budget:
        return int(images.get_number_of_image_patches(height, width, {})) // int(images.merge_size) ** 2
    if processor.family.model_type == "gemma4":
        (tokens,) = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_tokens"]
        return int(tokens)
    if processor.family.several:  # and a line break
        return int(processor.num_image_tokens + (processor.vision_feature_select_strategy != "default"))
    for name in ("image_seq_length", "image_seq_len"):
        if hasattr(processor, name):
            return int(getattr(processor, name))
    crop = images.crop_size
    tokens = (crop["height"] // processor.patch_size) * (crop["width"] // processor.patch_size)
    tokens += processor.num_additional_image_tokens
    return int(tokens - (processor.vision_feature_select_strategy == "default"))


def neutralise(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return `text` with every special or added token broken up by a space, so that it reads as ordinary text.

    A title that holds `<|im_end|>` must not end the prompt, and one that holds `<|image_pad|>` must not insert an
    image. Other text comes back unchanged.
    """
    pattern = _token_pattern(tuple(breakable_tokens(tokenizer)))
    if pattern is None:
        return text
    while pattern.search(text):  # each round breaks every match, but a break may complete another token
        text = pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
    return text


def breakable_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the special and added tokens of two or more characters, longest first; a space breaks them."""
    tokens = sorted(token for token in tokenizer.get_added_vocab() if len(token) > 1 and " " not in token)
    return sorted(tokens, key=len, reverse=True)


@lru_cache(maxsize=16)
def _token_pattern(tokens: tuple[str, ...]) -> re.Pattern[str] | None:
    """Match any of `tokens`, the first that fits."""
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None
