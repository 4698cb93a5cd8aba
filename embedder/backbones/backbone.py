"""A vision-language or text model as an encoder: one vector for each prompt. All families take the same path.

The path: the family's own tokenizer and image processor, the inner model without its language-model head, prompts
packed one after the other (`packing`), explicit position ids (M-RoPE where the family has it), the last token's final
state or the mean of all. The vision tower is frozen everywhere in vlm2rec, so each image is encoded once and its
tokens serve every prompt. A causal text model takes the same path, with text prompts only. A model whose layers carry
a state along the row (Qwen3.5) runs its prompts one by one.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache, PreTrainedModel

from vlm2rec.embedder.backbones import modality, packing, quantized, sharding
from vlm2rec.embedder.backbones.devices import (
    IMAGES_AT_ONCE,
    in_halves,
    onto,
    pick_device,
    pick_dtype,
    quiet,
    speed_up_float32,
)
from vlm2rec.embedder.backbones.families import checked_files, image_tokens, load_processor, neutralise
from vlm2rec.embedder.backbones.model_files import UNLOADABLE, Source, first_line
from vlm2rec.embedder.backbones.packing import IndependentRows, Layout, Prefix, common_start
from vlm2rec.embedder.contract.errors import ConfigError, ModelError
from vlm2rec.embedder.options import Attention, DeviceName, DtypeName, Pooling, PromptMode, Quantize
from vlm2rec.embedder.prompts import CONSTANT_STARTS, READ_HERE, Prompt, SystemMessage, render

# The language model's projections in every family; vision towers have gate_proj, up_proj and down_proj too,
# so a list of bare names would adapt them silently. Text models have their layers right below `model`.
ADAPTED_LAYERS = (
    r"(model|.*\b(language|text)_model)\.layers\.\d+\."
    r"(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj|linear_attn\.(in_proj_qkv|in_proj_z|out_proj))"
)
_ATTENDING = {"full_attention", "sliding_attention"}  # layers in which a token sees others by attention alone
_FIRST_LETTERS = ("a", "Z", "7", "(", "é", "日")  # what a title may begin with


@dataclass(frozen=True)
class ImageFeatures:
    """The vision tower's output for one image: n merged tokens of width d."""

    tokens: Tensor  # (n, d)
    deepstack: tuple[Tensor, ...]  # one (n, d) for each early layer Qwen3-VL feeds; empty for the others
    grid: Tensor | None  # (3,) frames, rows, columns of patches, for M-RoPE; None for families without it

    def to(self, device: torch.device) -> ImageFeatures:
        """Return the features on a device; the grid stays on the CPU, where positions are computed."""
        return ImageFeatures(
            onto(device, self.tokens), tuple(onto(device, layer) for layer in self.deepstack), self.grid
        )

    @property
    def bytes(self) -> int:
        """Memory of the tensors."""
        return sum(t.numel() * t.element_size() for t in (self.tokens, *self.deepstack))


@dataclass(frozen=True)
class Patches:
    """An image as the vision tower takes it: resized, cut into patches, and normalised unless the device does that."""

    values: Tensor  # (patches, pixels), or (1, 3, H, W) for families whose model cuts patches; uint8 if not normalised
    grid: Tensor | None  # (1, 3) frames, rows, columns of patches
    inputs: dict[str, Tensor] = field(default_factory=dict)  # of the family's `inputs`, (1, ...) each


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as token ids, with the features of its images in the order of their tokens."""

    ids: list[int]
    images: tuple[ImageFeatures, ...] = ()
    shared: int = 0  # leading tokens that every prompt of this kind starts with
    reads: tuple[int, ...] = ()  # tokens whose states are read besides the last one's (`Backbone.encode_reads`)

    def __len__(self) -> int:
        return len(self.ids)


class Backbone:
    """A model, its processor, and the few steps from prompts to vectors. Use `Backbone.load`."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        prompt_mode: PromptMode = "raw",
        max_title_tokens: int = 64,
        pooling: Pooling = "last",
        attention: Attention = "causal",
    ) -> None:
        self.model = model
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.prompt_mode: PromptMode = prompt_mode
        self.max_title_tokens = max_title_tokens
        self.pooling: Pooling = pooling
        self.attention: Attention = attention
        self.has_head = True  # its weights hold a language-model head
        self.sharded = False  # each process holds a part of every layer (`sharding`)
        self.pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        self.packs = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) <= _ATTENDING
        if attention == "bidirectional" and not self.packs:
            raise ConfigError(
                f"--attention bidirectional with a {model.config.model_type}, whose layers carry a state from left to"
                " right",
                "--attention causal",
                "choose another backbone, or leave --attention out",
            )
        self._starts: dict[tuple[str, ...], tuple[int, ...]] = {}
        self._prefixes: dict[tuple[str | None, tuple[int, ...]], Prefix] | None = None
        packing.prepare(model, self.language_model)

    @classmethod
    def load(
        cls,
        source: Source,
        *,
        revision: str | None = None,
        prompt_mode: PromptMode = "raw",
        max_pixels: int = 224 * 224,
        max_title_tokens: int = 64,
        pooling: Pooling = "last",
        attention: Attention = "causal",
        dtype: DtypeName | torch.dtype = "float32",
        device: DeviceName | torch.device = "auto",
        quantize: Quantize = "none",
    ) -> Backbone:
        """Load a backbone from a hub id or a local folder, in evaluation mode and without gradients.

        With `quantize`, the language model's matrices are in four bits (`quantized.require` says where that works).

        Raises:
            ModelError: no such model, unknown family, or weights that do not fit the config.
            ConfigError: the device is not available, or chat mode without a chat template.
        """
        files = checked_files(source, revision)
        source = files.source  # for messages
        processor = load_processor(files, None, max_pixels)
        if prompt_mode == "chat" and not processor.chat_template:
            raise ConfigError(f"{source} has no chat template", "a model with one", "use --prompt-mode raw")
        if prompt_mode == "chat":
            render(("",), prompt_mode, processor)  # a template that fails is refused before the weights are read
        target_device = device if isinstance(device, torch.device) else pick_device(device)
        number = dtype if isinstance(dtype, torch.dtype) else pick_dtype(dtype, target_device)
        speed_up_float32(target_device)
        text_only = processor.family.text_only
        loader = AutoModelForCausalLM if text_only else AutoModelForImageTextToText
        try:
            with quiet():
                model, info = loader.from_pretrained(
                    files.folder,
                    local_files_only=True,
                    dtype=number,
                    trust_remote_code=False,
                    use_safetensors=True,  # the other format is a pickle
                    output_loading_info=True,
                )
        except UNLOADABLE as error:
            raise ModelError(
                f"the weights of {source!r} cannot be loaded ({first_line(error)})",
                "safetensors weights that fit its config.json",
                "download the model folder again",
            ) from error
        # embedding and text models are often published without the head, which only LLM2Rec's training uses
        missing = sorted(key for key in info["missing_keys"] if not key.startswith("lm_head."))
        if missing:
            raise ModelError(
                f"{source!r} lacks {len(missing)} weights, among them {missing[0]}",
                "a complete model",
                "download the model folder again",
            )
        model.requires_grad_(False).eval()
        if quantize == "nf4":
            quantized.quantize(_language_model(model.model), number)
        model.to(target_device)
        backbone = cls(model, processor, prompt_mode, max_title_tokens, pooling, attention)
        backbone.has_head = not any(key.startswith("lm_head.") for key in info["missing_keys"])
        return backbone

    @property
    def body(self) -> Any:
        """The model without its language-model head; LoRA layers live inside it."""
        return self.model.model

    @property
    def language_model(self) -> Any:
        """The layers that LoRA adapts: the body without the vision tower; for a text model the body itself."""
        return _language_model(self.body)

    def require_equal_runs(self) -> None:
        """Raise `ConfigError` if prompts cannot share a row: processes with other prompts would run other times."""
        if not self.packs:
            raise ConfigError(
                f"--sharding fsdp with a {self.model.config.model_type}, whose layers carry a state from left to"
                " right, so that it takes each prompt alone",
                "a backbone that takes several prompts at once",
                "leave --sharding out, or choose another backbone",
            )

    def shard(self, device: torch.device) -> None:
        """Cut the language model's layers over all processes, with the adapter in them; the model is on the CPU."""
        self.require_equal_runs()
        sharding.shard(self.body, self.language_model, device)
        self.sharded = True

    def encode_spare(self) -> Tensor:
        """Run the language model on the shortest prompt, because another process has one run more; returns (0, d)."""
        return self.encode([EncodedPrompt([self.pad_id])])[:0]

    def adapted_layers(self) -> dict[str, nn.Linear]:
        """Return the linear layers of the language model that adapters change, by their names in `model`.

        Raises:
            ModelError: no layer has one of the names that all supported families use.
        """
        found = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and re.fullmatch(ADAPTED_LAYERS, name)
        }
        if not found:
            raise ModelError(
                "there is nothing to adapt in this backbone",
                f"linear layers whose names match {ADAPTED_LAYERS}",
                "choose a backbone of a supported family",
            )
        return found

    @property
    def dim(self) -> int:
        """Length d of a vector: the language model's hidden size."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def device(self) -> torch.device:
        """The device that holds the model."""
        return self.model.device

    @property
    def image_token_id(self) -> int:
        """Id of the token that stands for one merged image token."""
        return int(getattr(self.processor, "inner_image_token_id", self.processor.image_token_id))

    def prepare_title(self, title: str) -> tuple[str, bool]:
        """Return the title made safe for a prompt, and whether it was cut to `max_title_tokens`.

        White space is folded and special tokens are broken up, so that a title can neither end the prompt nor insert
        an image. Only the title's own tokens are cut, never image tokens.
        """
        # a very long title is cut by characters first: tokenising 100,000 of them only to drop them is wasted work
        text = " ".join(title.replace("\0", " ").split())[: 64 * self.max_title_tokens]
        text = neutralise(self.tokenizer, text)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        places, most = encoding["offset_mapping"], self.max_title_tokens
        if len(places) <= most:
            return text, False
        while most > 0 and places[most][0] < places[most - 1][1]:  # never cut inside a character of several bytes
            most -= 1
        return text[: places[most - 1][1] if most else 0].rstrip(), True

    @property
    def _blocks(self) -> str:
        """Where the tokens of an image see its later ones; the larger models of Gemma 4 alone do so."""
        blocks: str = self.processor.family.blocks
        if blocks != "windows":
            return blocks
        return blocks if self.model.config.get_text_config().use_bidirectional_attention == "vision" else ""

    def tokenize(self, prompt: Prompt, images: Sequence[ImageFeatures] = ()) -> EncodedPrompt:
        """Return the prompt's token ids, with one image token for each feature of an image."""
        text = render(prompt, self.prompt_mode, self.processor)
        if images:
            first, *rest = text.split(self.processor.image_token)
            if len(rest) != len(images):
                raise ValueError(f"the prompt has room for {len(rest)} images, {len(images)} were given")
            start = getattr(self.processor, "start_image_token", "")  # InternVL's processor marks the ends of an image
            end = getattr(self.processor, "end_image_token", "")
            token = getattr(self.processor, "inner_image_token", self.processor.image_token)
            text = first + "".join(
                f"{start}{token * len(image.tokens)}{end}{part}" for image, part in zip(images, rest, strict=True)
            )
        # tokens do not reach across a place where a state is read
        beginning, *later = text.split(READ_HERE)
        ids, reads = self._ids(beginning), []
        for piece in later:
            reads.append(len(ids) - 1)
            ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        limit = self.model.config.get_text_config().max_position_embeddings
        if len(ids) > limit:
            note = getattr(self.processor.family, "note", "")
            raise ConfigError(
                f"a prompt of {len(images)} images and {len(ids)} tokens{f' ({note})' if note else ''}",
                f"at most {limit} tokens, the number of positions of this backbone",
                "prepare the data with a smaller --max-history, or choose another backbone",
            )
        return EncodedPrompt(ids, tuple(images), self._shared(prompt, ids), tuple(reads))

    def _ids(self, text: str) -> list[int]:
        # a chat template may have written the begin-of-sequence token already; the tokenizer must not add another
        begun = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        return list(self.tokenizer(text, add_special_tokens=not begun)["input_ids"])

    def _shared(self, prompt: Prompt, ids: list[int]) -> int:
        """Return how many leading tokens are the same in every prompt of this kind."""
        system = [part for part in prompt[:1] if isinstance(part, SystemMessage)]
        first = (prompt[len(system) :] or ("",))[0] or ""
        constant: tuple[str, ...] = ("",) if system else CONSTANT_STARTS  # with one, all up to the user's turn
        if first in constant:  # constant up to the first image; an empty title leaves no text after the start
            image = getattr(self.processor, "image_token_id", None)
            return ids.index(image) if image in ids else 0
        start = next((start for start in constant if first.startswith(start)), None)
        if start is None:
            return 0
        key = (*system, start)
        if key not in self._starts:
            # a token may join the end of the start with what follows, so the common start of several titles is taken
            texts = (render((*system, start + title), self.prompt_mode, self.processor) for title in _FIRST_LETTERS)
            self._starts[key] = common_start([self._ids(text) for text in texts])
        known = self._starts[key]
        return len(known) if tuple(ids[: len(known)]) == known and len(known) < len(ids) else 0

    def patch(self, image: Image.Image) -> Patches:
        """Return an RGB image as the vision tower takes it, on the CPU. Safe to call from threads."""
        as_read = {"do_rescale": False, "do_normalize": False} if self.normalises_on_device else {}
        family = self.processor.family
        images: list[Any] = [[image, image]] if family.several else [image]
        inputs = self.processor.image_processor(images=images, return_tensors="pt", **as_read)
        values = inputs["pixel_values"][:1, 0] if family.several else inputs["pixel_values"]
        more = {name: inputs[name][:1] for name in family.inputs}
        return Patches(values.to(torch.uint8) if as_read else values, inputs.get("image_grid_thw"), more)

    @property
    def normalises_on_device(self) -> bool:
        """Whether images travel to the device as bytes, a quarter of what they are in float32."""
        own = self.processor.image_processor
        return self.device.type == "cuda" and bool(own.do_rescale and own.do_normalize)

    def _normalised(self, values: Tensor) -> Tensor:
        """Return uint8 patches or images as (x / 255 − mean) / deviation of their colour, in float32."""
        own = self.processor.image_processor
        mean, deviation = (onto(values.device, torch.tensor(c))[:, None] for c in (own.image_mean, own.image_std))
        colours = values.view(len(values), len(mean), -1)  # colours are the first axis, in patches and in images
        return ((colours * own.rescale_factor - mean) / deviation).view_as(values)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image | Patches]) -> list[ImageFeatures]:
        """Run the frozen vision tower over RGB images; returns features on the model's device, in the same order."""
        features: list[ImageFeatures] = []
        step = IMAGES_AT_ONCE[self.device.type]
        with IndependentRows():  # an image's features must not depend on the other images of its batch
            for start in range(0, len(images), step):
                for found in in_halves(self.run_vision_tower, images[start : start + step], lambda _: "an image"):
                    features += found
        return features

    def run_vision_tower(self, images: Sequence[Image.Image | Patches]) -> list[ImageFeatures]:
        """Run the vision tower over RGB images in one call.

        Unlike `encode_images`, gradients flow to the tower if its weights are trainable and grad mode is on.
        """
        patched = [image if isinstance(image, Patches) else self.patch(image) for image in images]
        values = onto(self.device, torch.cat([each.values for each in patched]))
        if values.dtype == torch.uint8:
            values = self._normalised(values)
        inputs: dict[str, Any] = {"pixel_values": values.to(self.model.dtype)}
        grids = None if patched[0].grid is None else torch.cat([p.grid for p in patched if p.grid is not None])
        if grids is not None:
            inputs["image_grid_thw"] = onto(self.device, grids)
        for name in self.processor.family.inputs:
            inputs[name] = onto(self.device, torch.cat([each.inputs[name] for each in patched]))
        if self.processor.family.several:
            inputs["batch_num_images"] = [max(2, len(patched))]
        output = self.body.get_image_features(**inputs, return_dict=True)
        deepstack = getattr(output, "deepstack_features", None) or ()  # a tuple for each layer, a tensor for each image
        # cloned: the parts are views of one buffer, and keeping one image must not keep its whole batch
        return [
            ImageFeatures(
                tokens.clone(),
                tuple(layer[i].clone() for layer in deepstack),
                None if grids is None else grids[i],
            )
            for i, tokens in enumerate(output.pooler_output)
        ]

    def share_prefixes(self, share: bool = True) -> None:
        """Encode the shared start of each kind of prompt once (`share`), or every time, while weights change.

        Call it again when a weight has changed.
        """
        self._prefixes = {} if share else None

    def forget_prefixes(self) -> None:
        """Drop the shared starts of prompts, as weights have changed; they are encoded again when needed."""
        self.share_prefixes(self._prefixes is not None)

    def encode(self, prompts: Sequence[EncodedPrompt]) -> Tensor:
        """Return the vector of each prompt, (B, d).

        With pooling `last` it is the final-layer state of the last token, in the model's dtype (Eq. 1). With `mean` it
        is the mean state of all tokens, including the instruction's, in float32 (SDA). The prompts share one packed
        row, but no prompt changes another's vector. Gradients flow to the language model's trainable weights if there
        are any and grad mode is on.
        """
        shares = self._prefixes is not None and self.packs and self.attention == "causal"
        if not shares or torch.is_grad_enabled():
            return self._encode_packed(prompts, None)
        by_start: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            by_start.setdefault(tuple(prompt.ids[: prompt.shared]), []).append(row)
        vectors = [self._encode_packed([prompts[row] for row in rows], start) for start, rows in by_start.items()]
        order = onto(self.device, torch.tensor([row for rows in by_start.values() for row in rows]))
        found = torch.cat(vectors)
        return torch.empty_like(found).index_copy_(0, order, found)

    def encode_reads(self, prompts: Sequence[EncodedPrompt]) -> Tensor:
        """Return states of each prompt: of the tokens that its `reads` name and of its last one, (B, R + 1, d).

        The prompts, which all read equally many states, share one packed row. Gradients flow as from `encode`.
        """
        ids, mask = self._pad(prompts)
        images = [image for prompt in prompts for image in prompt.images]
        own = mask == 1
        positions = self._positions(ids, mask, images)[..., own].unsqueeze(-2)
        layout = self._layout([len(prompt) for prompt in prompts], every_state=True)
        states = self._states(layout, ids[own][None], images, position_ids=positions)
        starts = [0, *itertools.accumulate(layout.lengths)]
        places = [
            [start + place for place in (*prompt.reads, len(prompt) - 1)]
            for start, prompt in zip(starts, prompts, strict=False)
        ]
        return states[onto(self.device, torch.tensor(places))]

    def _encode_packed(self, prompts: Sequence[EncodedPrompt], start: tuple[int, ...] | None) -> Tensor:
        """Encode prompts that all begin with `start`; the keys and values of `start` are computed once."""
        shared = len(start) if start else 0
        ids, mask = self._pad(prompts)
        images = [image for prompt in prompts for image in prompt.images]
        positions = self._positions(ids, mask, images)[..., shared:]
        own = mask[:, shared:] == 1  # (B, T - shared)
        row = ids[:, shared:][own][None]  # (1, T)
        arguments: dict[str, Any] = {"position_ids": positions[..., own].unsqueeze(-2)}  # (3, 1, T) or (1, T)
        if start:
            arguments["past_key_values"] = self._prefix(start).cache()
        layout = self._layout([len(prompt) - shared for prompt in prompts], shared, self.pooling == "mean")
        found = self._pooled(layout, row, images, **arguments)
        if self.pooling == "last":
            return found
        if start:
            found = found + self._prefix(start).pooled
        return found / onto(self.device, mask.sum(dim=1, keepdim=True))

    def _layout(self, lengths: Sequence[int], prefix: int = 0, every_state: bool = False) -> Layout:
        return Layout(tuple(lengths), prefix, self.device, self.attention == "bidirectional", every_state)

    def encode_states(self, texts: Sequence[Sequence[int]], bidirectional: bool) -> list[Tensor]:
        """Return the final states of all tokens of each text, (T, d) each; gradients flow as from `encode`.

        Args:
            texts: token ids, without images.
            bidirectional: whether a token sees those after it, whatever `attention` is.
        """
        layout = Layout(tuple(len(ids) for ids in texts), 0, self.device, bidirectional, every_state=True)
        row = torch.tensor([[token for ids in texts for token in ids]])
        positions = torch.cat([torch.arange(len(ids)) for ids in texts])[None]
        return list(self._states(layout, row, (), position_ids=positions).split(layout.lengths))

    def logits(self, states: Tensor) -> Tensor:
        """Return what the language-model head makes of final states, (n, d) to (n, vocabulary).

        Raises:
            ModelError: the backbone was published without its head.
        """
        self.require_head()
        head: nn.Module = self.model.get_output_embeddings()
        return torch.as_tensor(head(states))

    def require_head(self) -> None:
        """Raise `ModelError` if the backbone was published without its language-model head."""
        if not self.has_head or self.model.get_output_embeddings() is None:
            raise ModelError(
                "the backbone was published without its language-model head, which predicts tokens",
                "a model with one, as chat and base models have",
                "choose another --backbone",
            )

    @property
    def mask_id(self) -> int:
        """Id of the token that stands for a masked one: the tokenizer's own, or `_`."""
        own = self.tokenizer.mask_token_id
        return int(self.tokenizer("_", add_special_tokens=False)["input_ids"][-1] if own is None else own)

    def _pooled(self, layout: Layout, row: Tensor, images: Sequence[ImageFeatures], **arguments: Any) -> Tensor:
        """Return each prompt's last state or, with mean pooling, the sum of its states, (n, d); see `_states`."""
        states = self._states(layout, row, images, **arguments)
        if self.pooling == "mean":
            return layout.sums(states)
        return states if len(states) == len(layout.lengths) else states[layout.last]

    def _states(self, layout: Layout, row: Tensor, images: Sequence[ImageFeatures], **arguments: Any) -> Tensor:
        """Run the language model over a packed row of token ids, (1, T), with its images' features at the image tokens.

        Ids and positions are on the CPU, images on the model's device.
        Returns the final states of all tokens, (T, d), or those of each prompt's last one, (n, d) (`Layout`).

        The language model is called directly. The outer models take precomputed image features under names that change
        between releases of transformers, and silently ignore unknown names.
        """
        arguments["position_ids"] = onto(self.device, arguments["position_ids"])
        if getattr(self.language_model, "hidden_size_per_layer_input", 0):  # Gemma 4: each layer has embeddings
            text = row.masked_fill(row == self.image_token_id, self.language_model.padding_idx)
            arguments["per_layer_inputs"] = self.language_model.get_per_layer_inputs(onto(self.device, text))
        embedded = self.language_model.get_input_embeddings()(onto(self.device, row))  # (1, T, d)
        if images:
            of_image = row == self.image_token_id  # (1, T)
            tokens = torch.cat([image.tokens for image in images]).to(embedded)
            if int(of_image.sum()) != len(tokens):
                raise ValueError(
                    f"the prompts have room for {int(of_image.sum())} image tokens, {len(tokens)} were given"
                )
            is_image = onto(self.device, of_image)
            embedded = embedded.masked_scatter(is_image.unsqueeze(-1), tokens)
            if self._blocks:
                numbers = torch.arange(len(images)).repeat_interleave(torch.tensor([len(i.tokens) for i in images]))
                blocks = torch.full_like(row[0], -1).masked_scatter(of_image[0], numbers)
                in_windows = self._blocks == "windows"
                layout = dataclasses.replace(layout, blocks=blocks, blocks_in_windows=in_windows, _made={})
            if images[0].deepstack:
                arguments["visual_pos_masks"] = is_image
                arguments["deepstack_visual_embeds"] = [
                    torch.cat(layer).to(embedded) for layer in zip(*(image.deepstack for image in images), strict=True)
                ]
        if not self.packs:
            return self._states_one_by_one(layout, embedded, **arguments)
        with packing.packed(layout) as keywords:
            output = self.language_model(
                inputs_embeds=embedded, use_cache=False, return_dict=True, **arguments, **keywords
            )
        states: Tensor = output.last_hidden_state[0]
        return states

    def _states_one_by_one(self, layout: Layout, embedded: Tensor, position_ids: Tensor) -> Tensor:
        """Run the language model over each prompt of a row, where a layer would carry a state into the next prompt.

        On a GPU adjacent prompts of equal length share one call; on a CPU none do, so that no prompt changes a bit of
        another's vector. Arguments and result as of `_states`.
        """
        runs = layout.runs if self.device.type == "cuda" else [(1, length) for length in layout.lengths]
        found, start = [], 0
        for count, length in runs:
            own = slice(start, start + count * length)
            positions = position_ids[..., own].squeeze(-2).unflatten(-1, (count, length))  # (3, n, T) or (n, T)
            output = self.language_model(
                inputs_embeds=embedded[0, own].unflatten(0, (count, length)),
                position_ids=positions,
                use_cache=False,
                return_dict=True,
            )
            states: Tensor = output.last_hidden_state
            found.append(states.flatten(0, 1) if layout.every_state else states[:, -1])
            start += count * length
        return torch.cat(found)

    def _prefix(self, start: tuple[int, ...]) -> Prefix:
        assert self._prefixes is not None
        key = modality.current(), start  # an adapter may have different weights for each modality
        if key not in self._prefixes:
            cache = DynamicCache()
            row = torch.tensor([start])
            positions = torch.arange(len(start))[None]
            layout = self._layout([len(start)], every_state=self.pooling == "mean")
            pooled = self._pooled(layout, row, (), position_ids=positions, past_key_values=cache)
            self._prefixes[key] = Prefix(tuple((layer.keys, layer.values) for layer in cache.layers), pooled)
        return self._prefixes[key]

    def _pad(self, prompts: Sequence[EncodedPrompt]) -> tuple[Tensor, Tensor]:
        """Return ids and mask as a padded batch on the CPU, (B, T) each, from which the positions are computed."""
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), longest), self.pad_id)  # (B, T)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt.ids)
            mask[row, : len(prompt)] = 1
        return ids, mask

    def _positions(self, ids: Tensor, mask: Tensor, images: Sequence[ImageFeatures]) -> Tensor:
        """Return explicit positions: (3, B, T) under M-RoPE, else (B, T).

        All on the CPU: the family's own code reads each image's place out of the ids, for which a GPU would stop.
        """
        plain = (mask.cumsum(dim=1) - 1).clamp_min(0)  # (B, T)
        if not images or images[0].grid is None or not hasattr(self.body, "get_rope_index"):
            return plain
        # without the token types M-RoPE silently falls back to one-dimensional positions
        types = ((ids == self.image_token_id) & (mask == 1)).int()
        grids = torch.stack([image.grid for image in images if image.grid is not None])
        positions, _ = self.body.get_rope_index(ids, types, image_grid_thw=grids, attention_mask=mask)
        return positions

    @property
    def image_layers(self) -> int:
        """How many layers of tokens an image has: the merged tokens, and those that Qwen3-VL feeds to early layers."""
        return 1 + len(getattr(self.model.config.vision_config, "deepstack_visual_indexes", None) or ())

    def image_length(self, width: int, height: int) -> int:
        """Return how many tokens an image of this size becomes."""
        return image_tokens(self.processor, width, height)


def pick_token_budget(backbone: Backbone) -> int:
    """Return how many tokens to pack in one row: what keeps the device busy and fits into its memory."""
    if backbone.device.type != "cuda":
        return 4096  # more is no faster
    free, _ = torch.cuda.mem_get_info(backbone.device)
    text = backbone.model.config.get_text_config()
    # memory between two layers: gate, up and their product, then queries, keys, values, residuals and their copies
    per_token = backbone.model.dtype.itemsize * (4 * text.intermediate_size + 12 * text.hidden_size)
    return max(1024, min(16_384, int(0.3 * free) // per_token))


def _language_model(body: Any) -> Any:
    names = ("language_model", "text_model")  # the Idefics family has the second
    return next((getattr(body, name) for name in names if hasattr(body, name)), body)
