"""Tiny random models of every family, as ordinary model folders in the form the published ones have.

Real transformers classes, hidden size 64, two layers, a vision tower of two layers; seeded; a second or two each.
Causal text models are those of `TEXT_FAMILIES`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

FAMILIES = (
    *("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "internvl", "llava", "gemma3", "idefics3", "smolvlm", "qwen3_5"),
    *("gemma4", "llava_onevision"),
)
# adapted layers where these are not seven in each of two layers: one of Qwen3.5's has six, and two of Gemma 4's four
# take keys and values from others
ADAPTED = {"qwen3_5": 13, "gemma4": 24}
TEXT_FAMILIES = ("qwen2", "qwen3", "llama", "mistral")

LINES = [
    "Describe this item text sequence in one word, 0) red wooden chair, 1) small blue lamp",
    "Describe this item image sequence in one word, 0) , 1) , 2) ",
    "Describe this item sequence in one word, 0) green cotton shirt, 1) soft woollen hat",
]
QWEN_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
INTERNVL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")

SMOL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<end_of_utterance>"),
    *("<fake_token_around_image>", "<image>", "<global-img>"),
)

QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# text models take one string as content; a list of parts would be printed as Python
QWEN_TEXT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_TEXT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endfor %}"
)
SMOL_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA4_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    " {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tiny_model(family: str, folder: Path) -> Path:
    """Write a tiny random model of `family` into `folder` and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if family in TEXT_FAMILIES:
        return _tiny_text_model(family, folder)
    tokenizers = {"llava": _llama_tokenizer, "internvl": _internvl_tokenizer}
    tokenizers |= {"gemma3": _gemma_tokenizer, "gemma4": _gemma4_tokenizer, "llava_onevision": _onevision_tokenizer}
    tokenizers |= dict.fromkeys(("idefics3", "smolvlm"), _smol_tokenizer)
    ids = tokenizers.get(family, _qwen_tokenizer)(folder)
    config, image_processor = {
        "qwen2_5_vl": _qwen2_5_vl,
        "qwen2_vl": _qwen2_vl,
        "qwen3_vl": _qwen3_vl,
        "qwen3_5": _qwen3_5,
        "internvl": _internvl,
        "llava": _llava,
        "gemma3": _gemma3,
        "gemma4": _gemma4,
        "llava_onevision": _llava_onevision,
        "idefics3": _idefics3,
        "smolvlm": _smolvlm,
    }[family](ids, folder)
    _write(folder / "preprocessor_config.json", image_processor)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        model.save_pretrained(folder)
    return folder


def _tiny_text_model(family: str, folder: Path) -> Path:
    if family.startswith("qwen"):
        ids = _byte_level_bpe(folder, QWEN_TOKENS[:3], {"chat_template": QWEN_TEXT_TEMPLATE})
        text = _text(ids, tie_word_embeddings=True)
    else:
        ids = _llama_tokenizer(folder)
        _begin_with(folder, "<s>", ids)
        (folder / "chat_template.jinja").write_text(LLAMA_TEXT_TEMPLATE)
        text = _text(ids, bos_token_id=1, eos_token_id=2, pad_token_id=ids["<pad>"], max_position_embeddings=4096)
    if family == "qwen3":
        text["head_dim"] = 16
    config = transformers.AutoConfig.for_model(family, **text)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2))


# --- tokenizers ---------------------------------------------------------------------------------------------


def _byte_level_bpe(folder: Path, special: Iterable[str], settings: dict[str, Any]) -> dict[str, int]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None, "bos_token": None}
    _write(folder / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer", **tokens, **settings})
    return tokenizer.get_vocab()


def _qwen_tokenizer(folder: Path) -> dict[str, int]:
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    return _byte_level_bpe(folder, QWEN_TOKENS, {"chat_template": QWEN_TEMPLATE.replace("IMAGE", image)})


def _internvl_tokenizer(folder: Path) -> dict[str, int]:
    # the processor asks the tokenizer for these by name
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    template = QWEN_TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>\n")
    return _byte_level_bpe(folder, INTERNVL_TOKENS, {"extra_special_tokens": names, "chat_template": template})


def _smol_tokenizer(folder: Path) -> dict[str, int]:
    ids = _byte_level_bpe(folder, SMOL_TOKENS, {"chat_template": SMOL_TEMPLATE})
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    tokens = {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"}
    tokens |= {"tokenizer_class": "GPT2Tokenizer", "unk_token": "<|endoftext|>"}
    _write(folder / "tokenizer_config.json", settings | tokens)
    return ids


def _gemma_tokenizer(folder: Path) -> dict[str, int]:
    special = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    ids = _byte_level_bpe(folder, (*special, *names.values()), {"chat_template": GEMMA_TEMPLATE})
    _begin_with(folder, "<bos>", ids)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "extra_special_tokens": names}
    _write(folder / "tokenizer_config.json", settings | tokens)
    return ids


def _gemma4_tokenizer(folder: Path) -> dict[str, int]:
    special = ("<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|video|>")
    names = {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>"}
    names |= {"boa_token": "<|audio>", "eoa_token": "<audio|>", "audio_token": "<|audio|>"}
    ids = _byte_level_bpe(folder, (*special, *names.values()), {"chat_template": GEMMA4_TEMPLATE})
    _begin_with(folder, "<bos>", ids)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "extra_special_tokens": names}
    _write(folder / "tokenizer_config.json", settings | tokens)
    return ids


def _onevision_tokenizer(folder: Path) -> dict[str, int]:
    template = QWEN_TEMPLATE.replace("IMAGE", "<image>\n")
    return _byte_level_bpe(folder, (*QWEN_TOKENS[:3], "<image>", "<video>"), {"chat_template": template})


def _llama_tokenizer(folder: Path) -> dict[str, int]:
    """Write a BPE with byte fallback and a begin-of-sequence token, the kind Llama has."""
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special + bytes_, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    plain = json.loads(tokenizer.to_str())
    # the bytes were special for the trainer only; in the tokenizer they are ordinary tokens
    plain["added_tokens"] = [token for token in plain["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(plain))
    tokenizer.add_special_tokens([AddedToken("<image>", normalized=False), AddedToken("<pad>", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    _write(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **tokens})
    return tokenizer.get_vocab()


def _begin_with(folder: Path, token: str, ids: dict[str, int]) -> None:
    """Let the tokenizer itself put `token` first, as Llama 3's does."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{token} $A", special_tokens=[(token, ids[token])])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    _write(folder / "tokenizer_config.json", settings | {"tokenizer_class": "PreTrainedTokenizerFast"})


# --- configs and image processors ---------------------------------------------------------------------------

_CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def _text(ids: dict[str, int], **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(ids),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,  # random layers of the usual 0.02 hardly tell two inputs apart
        "bos_token_id": None,
        "eos_token_id": ids.get("<|im_end|>"),
        "pad_token_id": ids.get("<|endoftext|>"),
        **more,
    }


def _qwen_ids(ids: dict[str, int]) -> dict[str, int]:
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    names |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    return {f"{name}_token_id": ids[token] for name, token in names.items()}


def _mrope(sections: list[int]) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": sections}


def _qwen_images(processor: str, **more: Any) -> dict[str, Any]:
    return {"temporal_patch_size": 2, "merge_size": 2, "processor_class": processor} | more


def _qwen2_5_vl(ids: dict[str, int], folder: Path) -> tuple[Any, dict[str, Any]]:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.1,
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=_text(ids, rope_parameters=_mrope([2, 3, 3])),
        vision_config=vision,
        tie_word_embeddings=True,
        **_qwen_ids(ids),
    )
    return config, _qwen_images(
        "Qwen2_5_VLProcessor",
        image_processor_type="Qwen2VLImageProcessor",
        min_pixels=3136,
        max_pixels=12845056,
        patch_size=14,
        **_CLIP,
    )


def _qwen2_vl(ids: dict[str, int], folder: Path) -> tuple[Any, dict[str, Any]]:
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 64,
        "mlp_ratio": 2,
        "num_heads": 2,
        "initializer_range": 0.1,
    }
    config = transformers.Qwen2VLConfig(
        text_config=_text(ids, rope_parameters=_mrope([2, 3, 3])),
        vision_config=vision,
        tie_word_embeddings=True,
        **_qwen_ids(ids),
    )
    return config, _qwen_images(
        "Qwen2VLProcessor",
        image_processor_type="Qwen2VLImageProcessor",
        min_pixels=3136,
        max_pixels=12845056,
        patch_size=14,
        **_CLIP,
    )


_QWEN3_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "initializer_range": 0.1,
}
_QWEN3_IMAGES = _qwen_images(
    "Qwen3VLProcessor",
    image_processor_type="Qwen2VLImageProcessorFast",
    size={"shortest_edge": 65536, "longest_edge": 16777216},
    patch_size=16,
    **_HALF,
)


def _qwen3_vl(ids: dict[str, int], folder: Path) -> tuple[Any, dict[str, Any]]:
    config = transformers.Qwen3VLConfig(
        text_config=_text(ids, head_dim=16, rope_parameters=_mrope([4, 2, 2]) | {"mrope_interleaved": True}),
        vision_config=_QWEN3_VISION | {"deepstack_visual_indexes": [0]},
        tie_word_embeddings=True,
        **_qwen_ids(ids),
    )
    return config, _QWEN3_IMAGES


def _qwen3_5(ids: dict[str, int], folder: Path) -> tuple[Any, dict[str, Any]]:
    """One layer carries a state along the row, the other attends; in the published models three of four carry one."""
    linear = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2}
    text = _text(ids, head_dim=32, layer_types=["linear_attention", "full_attention"], **linear)
    text |= {"linear_num_value_heads": 4, "rope_parameters": _mrope([2, 1, 1]) | {"partial_rotary_factor": 0.25}}
    config = transformers.Qwen3_5Config(
        text_config=text, vision_config=dict(_QWEN3_VISION), tie_word_embeddings=True, **_qwen_ids(ids)
    )
    return config, _QWEN3_IMAGES


# what the vision towers of most families have in common
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def _internvl(ids: dict[str, int], folder: Path) -> tuple[Any, dict[str, Any]]:
    """448 pixels and 256 tokens an image in the published models; 56 pixels and 4 tokens here."""
    vision = _TOWER | {
        "image_size": [56, 56],
        "patch_size": [14, 14],
        "initializer_range": 0.1,
    }
    config = transformers.InternVLConfig(
        text_config=_text(ids, model_type="qwen2", tie_word_embeddings=True),
        vision_config=vision,
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=4,
    )
    _write(folder / "processor_config.json", {"image_seq_length": 4, "processor_class": "InternVLProcessor"})
    return config, {
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "processor_class": "InternVLProcessor",
        "crop_to_patches": True,
        "size": {"height": 56, "width": 56},
        **_CLIP,
    }


def _llava(ids: dict[str, int], folder: Path) -> tuple[Any, dict[str, Any]]:
    """336 pixels and 576 tokens an image in the published models; 42 pixels and 9 tokens here."""
    vision = _TOWER | {
        "model_type": "clip_vision_model",
        "image_size": 42,
        "patch_size": 14,
        "projection_dim": 32,
    }
    text = _text(ids, model_type="llama", bos_token_id=1, eos_token_id=2, pad_token_id=ids["<pad>"])
    config = transformers.LlavaConfig(
        text_config=text | {"max_position_embeddings": 4096},
        vision_config=vision,
        image_token_index=ids["<image>"],
        image_seq_length=9,
        pad_token_id=ids["<pad>"],
    )
    _write(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "patch_size": 14,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
            "image_token": "<image>",
        },
    )
    (folder / "chat_template.jinja").write_text(LLAVA_TEMPLATE)
    return config, {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "size": {"shortest_edge": 42},
        "crop_size": {"height": 42, "width": 42},
        "do_center_crop": True,
        **_CLIP,
    }


def _gemma3(ids: dict[str, int], folder: Path) -> tuple[Any, dict[str, Any]]:
    """896 pixels, 256 tokens an image and windows of 1,024 keys in the published models; 56, 4 and 12 here."""
    vision = _TOWER | {
        "model_type": "siglip_vision_model",
        "image_size": 56,
        "patch_size": 14,
        "vision_use_head": False,
    }
    text = _text(ids, head_dim=16, query_pre_attn_scalar=16, sliding_window=12, max_position_embeddings=4096)
    text |= {"bos_token_id": ids["<bos>"], "eos_token_id": ids["<eos>"], "pad_token_id": ids["<pad>"]}
    config = transformers.Gemma3Config(
        text_config=text | {"layer_types": ["sliding_attention", "full_attention"]},
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
        initializer_range=0.1,
    )
    _write(folder / "processor_config.json", {"image_seq_length": 4, "processor_class": "Gemma3Processor"})
    return config, {
        "image_processor_type": "Gemma3ImageProcessor",
        "processor_class": "Gemma3Processor",
        "size": {"height": 56, "width": 56},
        **_HALF,
    }


def _gemma4(ids: dict[str, int], folder: Path) -> tuple[Any, dict[str, Any]]:
    """All that its models have, in one: embeddings of each layer, layers that share keys, images that see themselves.

    The published ones have 70 tokens an image or more, of 48 × 48 pixels each; here they are of 8 × 8.
    """
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    vision |= {"intermediate_size": 64, "head_dim": 16, "patch_size": 4, "pooling_kernel_size": 2}
    vision |= {"position_embedding_size": 320, "initializer_range": 0.1}
    text = _text(ids, head_dim=16, global_head_dim=32, sliding_window=12, max_position_embeddings=4096)
    text |= {"bos_token_id": ids["<bos>"], "eos_token_id": ids["<eos>"], "pad_token_id": ids["<pad>"]}
    text |= {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    text |= {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": len(ids)}
    config = transformers.Gemma4Config(
        text_config=text | {"use_bidirectional_attention": "vision"},
        vision_config=vision,
        audio_config=None,
        boi_token_id=ids["<|image>"],
        eoi_token_id=ids["<image|>"],
        image_token_id=ids["<|image|>"],
        video_token_id=ids["<|video|>"],
        boa_token_id=ids["<|audio>"],
        eoa_token_index=ids["<audio|>"],
        audio_token_id=ids["<|audio|>"],
        initializer_range=0.1,
    )
    _write(folder / "processor_config.json", {"image_seq_length": 70, "processor_class": "Gemma4Processor"})
    return config, {
        "image_processor_type": "Gemma4ImageProcessor",
        "processor_class": "Gemma4Processor",
        "patch_size": 4,
        "pooling_kernel_size": 2,
        "max_soft_tokens": 70,
    }


def _llava_onevision(ids: dict[str, int], folder: Path) -> tuple[Any, dict[str, Any]]:
    """384 pixels and 730 tokens an image in the published models; 42 pixels and 10 tokens here."""
    vision = _TOWER | {
        "model_type": "siglip_vision_model",
        "image_size": 42,
        "patch_size": 14,
        "vision_use_head": False,
    }
    grid = [[42, 42], [42, 84], [84, 42]]
    config = transformers.LlavaOnevisionConfig(
        text_config=_text(ids, model_type="qwen2", tie_word_embeddings=True),
        vision_config=vision,
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=grid,
    )
    own = {"num_image_tokens": 9, "vision_feature_select_strategy": "full", "image_token": "<image>"}
    _write(folder / "processor_config.json", {"processor_class": "LlavaOnevisionProcessor", **own})
    return config, {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "processor_class": "LlavaOnevisionProcessor",
        "size": {"height": 42, "width": 42},
        "image_grid_pinpoints": grid,
        **_HALF,
    }


def _idefics3(ids: dict[str, int], folder: Path, name: str = "Idefics3") -> tuple[Any, dict[str, Any]]:
    """512 pixels and 64 tokens an image in the published SmolVLM; 56 pixels and 4 tokens here."""
    vision = _TOWER | {
        "image_size": 56,
        "patch_size": 14,
        "initializer_range": 0.1,
    }
    text = _text(ids, model_type="llama", bos_token_id=ids["<|im_start|>"], eos_token_id=ids["<end_of_utterance>"])
    config = getattr(transformers, f"{name}Config")(
        text_config=text | {"max_position_embeddings": 4096, "pad_token_id": ids["<|im_end|>"]},
        vision_config=vision,
        image_token_id=ids["<image>"],
        scale_factor=2,
        tie_word_embeddings=False,
    )
    _write(folder / "processor_config.json", {"image_seq_len": 4, "processor_class": f"{name}Processor"})
    return config, {
        "image_processor_type": f"{name}ImageProcessor",
        "processor_class": f"{name}Processor",
        "do_image_splitting": True,
        "size": {"longest_edge": 112},
        "max_image_size": {"longest_edge": 56},
        **_HALF,
    }


def _smolvlm(ids: dict[str, int], folder: Path) -> tuple[Any, dict[str, Any]]:
    return _idefics3(ids, folder, "SmolVLM")
