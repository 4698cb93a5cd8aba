"""Tiny random text and image encoders, as ordinary model folders: real transformers classes and tokenizers, seeded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

LINES = ["red wooden chair with arms", "small blue lamp", "green cotton shirt", "soft woollen hat 1987"] * 2
WIDTH = 32
CLIP_DIM = 24


def tiny_bert(folder: Path, seed: int = 0, **config: Any) -> Path:
    """Write a BERT with a lower-casing WordPiece tokenizer."""
    ids = _word_pieces(folder)
    with _seeded(seed):
        model = transformers.BertModel(
            transformers.BertConfig(
                vocab_size=len(ids),
                hidden_size=WIDTH,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                initializer_range=0.2,
                max_position_embeddings=40,
                **config,
            )
        )
        model.save_pretrained(folder)
    return folder


def sentence_folder(
    folder: Path,
    pooling: dict[str, Any] | None = None,
    dense: int | None = None,
    normalise: bool = True,
    settings: dict[str, Any] | None = None,
    prompts: dict[str, Any] | None = None,
) -> Path:
    """Write a sentence-transformers folder around a tiny BERT."""
    tiny_bert(folder)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": WIDTH, **(pooling or MEAN)})
    if dense:
        modules.append(("2_Dense", "Dense"))
        size = {"in_features": WIDTH, "out_features": dense, "bias": True}
        _write(folder / "2_Dense" / "config.json", {**size, "activation_function": "torch.nn.modules.activation.Tanh"})
        import safetensors.torch

        with _seeded(7):
            layer = torch.nn.Linear(WIDTH, dense)
        weights = {f"linear.{name}": value.detach() for name, value in layer.named_parameters()}
        safetensors.torch.save_file(weights, folder / "2_Dense" / "model.safetensors")
    if normalise:
        modules.append((f"{len(modules)}_Normalize", "Normalize"))
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    _write(folder / "modules.json", listed)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": 12, "do_lower_case": False, **(settings or {})})
    _write(folder / "config_sentence_transformers.json", prompts or {})
    return folder


MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}


def tiny_clip(folder: Path) -> Path:
    """Write a CLIP with a byte-level tokenizer that closes every text with <|endoftext|>."""
    ids = _bytes(folder, ["<|startoftext|>", "<|endoftext|>"], start="<|startoftext|>", end="<|endoftext|>")
    end = {"bos_token_id": ids["<|startoftext|>"], "eos_token_id": ids["<|endoftext|>"], "pad_token_id": 1}
    text = {**_tower(), "vocab_size": len(ids), "max_position_embeddings": 20, "projection_dim": CLIP_DIM, **end}
    vision = {**_tower(), "image_size": 28, "patch_size": 14, "projection_dim": CLIP_DIM}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=CLIP_DIM)
    _image_processor(folder, "CLIPImageProcessor", size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return _save(folder, transformers.CLIPModel, config)


def tiny_siglip(folder: Path) -> Path:
    """Write a SigLIP of fixed image size; its tokenizer hands over no attention mask."""
    ids = _bytes(folder, ["<pad>", "</s>"], end="</s>", names=["input_ids"], pad="<pad>")
    text = {**_tower(), "vocab_size": len(ids), "max_position_embeddings": 16, **_siglip_ids(ids, "</s>")}
    config = transformers.SiglipConfig(text_config=text, vision_config={**_tower(), "image_size": 28, "patch_size": 14})
    _image_processor(folder, "SiglipImageProcessor", size={"height": 28, "width": 28})
    return _save(folder, transformers.SiglipModel, config)


def tiny_siglip2(folder: Path) -> Path:
    """Write a SigLIP 2 that keeps the shape of its images."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]  # its tokenizer class in transformers insists on these
    ids = _bytes(folder, special, end="<eos>", names=["input_ids"], pad="<pad>")
    text = {**_tower(), "vocab_size": len(ids), "max_position_embeddings": 16, "projection_size": WIDTH}
    config = transformers.Siglip2Config(
        text_config=text | _siglip_ids(ids, "<eos>"), vision_config={**_tower(), "patch_size": 8, "num_patches": 16}
    )
    _image_processor(folder, "Siglip2ImageProcessor", patch_size=8, max_num_patches=16)
    return _save(folder, transformers.Siglip2Model, config)


def tiny_resnet(folder: Path) -> Path:
    """Write a ResNet whose pooled vector has 40 numbers."""
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 40], depths=[1, 1, 1, 1])
    _image_processor(folder, "ConvNextImageProcessor", size={"shortest_edge": 28}, crop_pct=0.875)
    return _save(folder, transformers.ResNetModel, config)


def tiny_efficientnet(folder: Path) -> Path:
    """Write an EfficientNet whose pooled vector has 128 numbers."""
    config = transformers.EfficientNetConfig(
        image_size=32, width_coefficient=0.1, depth_coefficient=0.1, hidden_dim=128, initializer_range=0.5
    )
    _image_processor(folder, "EfficientNetImageProcessor", size={"height": 32, "width": 32})
    return _save(folder, transformers.EfficientNetModel, config)


def _tower() -> dict[str, Any]:
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
    return {"hidden_size": WIDTH, "intermediate_size": 64, **layers}


def _siglip_ids(ids: dict[str, int], end: str) -> dict[str, int]:
    return {"bos_token_id": 0, "eos_token_id": ids[end], "pad_token_id": ids["<pad>"]}


def _image_processor(folder: Path, name: str, **more: Any) -> None:
    means = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.5, 0.5]}
    steps = {"do_resize": True, "do_rescale": True, "do_normalize": True}
    _write(folder / "preprocessor_config.json", {"image_processor_type": name, **steps, **means, **more})


def _save(folder: Path, model: Any, config: Any) -> Path:
    with _seeded(0):
        model(config).save_pretrained(folder)
    return folder


class _seeded:  # noqa: N801 - used as a context manager
    """Draw weights from a seed, and leave torch's own generator as it was."""

    def __init__(self, seed: int) -> None:
        self.seed, self.fork = seed, torch.random.fork_rng()

    def __enter__(self) -> None:
        self.fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *error: Any) -> None:
        self.fork.__exit__(*error)


def _word_pieces(folder: Path) -> dict[str, int]:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(97, 123)] + [str(digit) for digit in range(10)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=special, initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    ids = tokenizer.get_vocab()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")]
    )
    names = {f"{token[1:-1].lower()}_token": token for token in special}
    _tokenizer(folder, tokenizer, {**names, "model_max_length": 512})
    return ids


def _bytes(
    folder: Path, special: list[str], end: str, start: str = "", pad: str = "", names: list[str] | None = None
) -> dict[str, int]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    ids = tokenizer.get_vocab()
    around = [token for token in (start, "$A", end) if token]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(around), special_tokens=[(token, ids[token]) for token in around if token != "$A"]
    )
    settings = {"eos_token": end, "pad_token": pad or end, "model_max_length": 1000}
    _tokenizer(folder, tokenizer, settings | ({"model_input_names": names} if names else {}))
    return ids


def _tokenizer(folder: Path, tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **settings})


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))
