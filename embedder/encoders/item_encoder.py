"""`ItemEncoder`: turns titles and images into fused, text and image vectors, with the adapter merged."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlm2rec.embedder import distributed, prompts
from vlm2rec.embedder.adapters import lora
from vlm2rec.embedder.adapters.late_fusion import LateFusion, mean_tokens_of
from vlm2rec.embedder.backbones import modality
from vlm2rec.embedder.backbones.backbone import Backbone, EncodedPrompt, ImageFeatures, Patches, pick_token_budget
from vlm2rec.embedder.backbones.devices import batches_by_tokens, in_halves, onto
from vlm2rec.embedder.backbones.families import checked_files
from vlm2rec.embedder.backbones.images import ImageError, open_image
from vlm2rec.embedder.backbones.packing import IndependentRows
from vlm2rec.embedder.backbones.pooling import fuse
from vlm2rec.embedder.backbones.vision_cache import NewImage, VisionCache
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ModelError
from vlm2rec.embedder.contract.storage import Location
from vlm2rec.embedder.encoders.settings import EncoderSettings, GivenSettings, fingerprint_of
from vlm2rec.embedder.options import (
    DeviceName,
    DtypeName,
    Quantize,
)

logger = logging.getLogger(__name__)

Picture = Image.Image | Patches | NewImage | ImageFeatures | ImageError | None
"""An image for an item encoder: a picture, patches, cached features, new to the vision cache, broken, or missing."""

ITEMS_AT_ONCE = 256  # images whose features are on the device together


@dataclass(frozen=True)
class EncodedItems:
    """Vectors of n items, float32; rows of NaN where a view is absent."""

    fused: np.ndarray  # (n, d)
    text: np.ndarray  # (n, d)
    image: np.ndarray  # (n, d)
    truncated: np.ndarray  # (n,) bool: the title was cut to the token limit


class ItemEncoder:
    """Encodes items and histories with one backbone, with or without an adapter. Use `ItemEncoder.load`."""

    def __init__(
        self, backbone: Backbone, settings: EncoderSettings, provenance: dict[str, Any], token_budget: int = 0
    ) -> None:
        self.backbone = backbone
        self.settings = settings
        self.provenance = provenance
        self.token_budget = token_budget or pick_token_budget(backbone)
        self.vision_cache: VisionCache | None = None
        self.late_fusion: LateFusion | None = None  # of an adapter of NoteLLM-2
        self._loaded_with: tuple[Any, ...] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle how to load the encoder, not its weights; another process loads it once."""
        if self._loaded_with is None:
            raise TypeError("an ItemEncoder that was not made by ItemEncoder.load cannot be pickled")
        return _load_once, (*self._loaded_with, json.dumps(self.provenance, sort_keys=True))

    @classmethod
    def load(
        cls,
        backbone: str | Path,
        adapter: str | Path | None = None,
        *,
        revision: str | None = None,
        dtype: DtypeName = "auto",
        device: DeviceName = "auto",
        token_budget: int = 0,
        quantize: Quantize = "none",
        **given: Unpack[GivenSettings],
    ) -> ItemEncoder:
        """Load a backbone, merge the adapter into it if one is given, and check the adapter's canary vectors.

        Args:
            backbone: hub id or folder.
            adapter: folder that `finetune` wrote, or another program in PEFT's format.
            revision: of a hub backbone.
            dtype: number format; auto is bfloat16 where the device multiplies it natively, else float32.
            device: where to run; auto is a GPU if there is one.
            token_budget: tokens in one packed row; 0 chooses a number that suits the device.
            quantize: nf4 has the language model's matrices in four bits, for training; without an adapter only.
            given: fields of `EncoderSettings`. The adapter decides those left out or None; without one, the defaults.

        Raises:
            ModelError: backbone or adapter cannot be loaded, or the adapter does not do what its folder says.
            ConfigError: a setting contradicts the adapter's, or a text model is asked for images.
        """
        files, adapter = checked_files(backbone, revision), None if adapter is None else Path(adapter)
        settings = EncoderSettings.resolve(adapter, **given)
        provenance = fingerprint_of(files, adapter, dtype=dtype, device=device, **given)
        model = Backbone.load(
            files,
            prompt_mode=settings.prompt_mode,
            max_pixels=settings.max_pixels,
            max_title_tokens=settings.max_title_tokens,
            pooling=settings.pooling,
            attention=settings.attention,
            dtype=dtype,
            device=device,
            quantize=quantize,
        )
        model.share_prefixes()
        encoder = cls(model, settings, provenance, token_budget)
        # the commit: a branch may have moved when another process loads the same
        choices = {**given, "revision": files.commit, "dtype": dtype, "device": device, "token_budget": token_budget}
        if quantize == "none":  # another process has no use for one in training
            encoder._loaded_with = (str(backbone), adapter, tuple(choices.items()))
        if adapter is not None:
            encoder._merge(adapter)
        return encoder

    def _merge(self, adapter: Path) -> None:
        """Merge an adapter and check what it does to the canary; one that another program made has none of its own."""
        canary = None if lora.is_foreign(adapter) else lora.read_canary(adapter)
        if self.settings.late_fusion == "gate":
            self.late_fusion = lora.load_late_fusion(adapter, self.dim).to(self.backbone.device)
        titles, images = lora.canary_items() if canary is None else (canary.titles, canary.images)
        before = self.encode_items(titles, images).fused
        lora.merge_adapter(self.backbone, adapter)
        self.backbone.share_prefixes()
        after = self.encode_items(titles, images).fused
        if canary is None:
            lora.require_effect(before, after, adapter)
        else:
            lora.check_canary(canary, before, after, adapter, self.provenance["dtype"])

    def shard(self, device: torch.device) -> None:
        """Cut the language model's layers over all processes that train together (`Backbone.shard`)."""
        self.backbone.shard(device)
        self.token_budget = pick_token_budget(self.backbone)  # it was loaded on the CPU

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything about the encoder that belongs in an export's fingerprint."""
        return self.provenance

    @property
    def dim(self) -> int:
        """Length d of a vector."""
        return self.backbone.dim

    @property
    def views(self) -> tuple[str, ...]:
        """Columns of the embedding table that this encoder fills."""
        return self.settings.columns

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities (text, image) that this encoder reads; it ignores the other."""
        return schema.modalities_of(self.views)

    @torch.no_grad()
    def encode_items(self, titles: Sequence[str], images: Sequence[Picture]) -> EncodedItems:
        """Encode items one by one, with the sequence prompts for a single item at index 0.

        Args:
            titles: n titles.
            images: n RGB images, or results of `vision_cache.read`. An item without an image has no image vector; with
                external fusion of both views, its fused vector is the text vector alone.
        """
        if len(titles) != len(images):
            raise ValueError(f"{len(titles)} titles and {len(images)} images")
        parts = [
            self._encode_items(titles[start : start + ITEMS_AT_ONCE], images[start : start + ITEMS_AT_ONCE])
            for start in range(0, len(titles), ITEMS_AT_ONCE)
        ]
        if not parts:
            nothing = np.empty((0, self.dim), np.float32)
            return EncodedItems(nothing, nothing, nothing, np.empty(0, bool))
        return EncodedItems(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(EncodedItems)))

    def _encode_items(self, titles: Sequence[str], images: Sequence[Picture]) -> EncodedItems:
        with_text, with_image = (view in self.modalities for view in schema.MODALITIES)
        prepared = [self.backbone.prepare_title(title) if with_text else ("", False) for title in titles]
        truncated = np.array([cut for _, cut in prepared], bool)
        features = self.encode_images(images) if with_image else [None] * len(titles)
        with IndependentRows():  # other items do not change a bit of a vector
            views = self.encode_sequences(
                [[title] for title, _ in prepared], [[feature] if feature else [] for feature in features]
            )
        return EncodedItems(**{view: to_numpy(vectors) for view, vectors in views.items()}, truncated=truncated)

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Compute in float32 inside this block, if memory suffices; afterwards the weights are the same to the bit.

        The vision cache is not used meanwhile, because it holds features in the usual number format.
        """
        backbone, cache = self.backbone, self.vision_cache
        tensors = (*backbone.model.parameters(), *backbone.model.buffers())
        usual = [(tensor, tensor.dtype) for tensor in tensors if tensor.is_floating_point()]
        try:
            for tensor, _ in usual:
                tensor.data = tensor.data.float()
        except torch.OutOfMemoryError:
            logger.warning("no memory for the weights in float32")
            _restore(usual)
        self.vision_cache = cache if backbone.model.dtype == usual[0][1] else None
        backbone.forget_prefixes()
        try:
            yield
        finally:
            _restore(usual)
            self.vision_cache = cache
            backbone.forget_prefixes()

    def open_image(self, root: Location, relative: str) -> Picture:
        """Read an image and make its patches, or take its features from the vision cache. Safe to call from threads.

        Raises:
            ImageError: as `images.open_image`.
        """
        pixels, cache = self.settings.max_pixels, self.vision_cache
        if cache is None:
            return self.backbone.patch(open_image(root, relative, pixels))
        found = cache.read(root, relative, pixels)
        if isinstance(found, NewImage) and isinstance(found.image, Image.Image):
            return NewImage(found.key, self.backbone.patch(found.image))
        return found

    @torch.no_grad()
    def encode_images(self, images: Sequence[Picture]) -> list[ImageFeatures | None]:
        """Return the features of each image, None if there is none; new features go into the vision cache."""
        device = self.backbone.device
        found: list[ImageFeatures | None] = [
            image.to(device) if isinstance(image, ImageFeatures) else None for image in images
        ]
        unseen = {row: image for row, image in enumerate(images) if isinstance(image, Image.Image | Patches | NewImage)}
        pictures = [image.image if isinstance(image, NewImage) else image for image in unseen.values()]
        new: dict[bytes, ImageFeatures] = {}
        for (row, image), feature in zip(unseen.items(), self.backbone.encode_images(pictures), strict=True):
            found[row] = feature
            if isinstance(image, NewImage):
                new[image.key] = feature
        if self.vision_cache is not None and new:
            try:
                self.vision_cache.add(list(new), list(new.values()))
            except OSError as error:  # the cache only saves time: a disk error must not end the work
                logger.warning("vision cache: %s (%s); continuing without it", error.strerror, self.vision_cache.folder)
                self.vision_cache = None
        return found

    def encode_sequences(
        self,
        titles: Sequence[Sequence[str]],
        images: Sequence[Sequence[ImageFeatures]],
        token_budget: int | None = None,
    ) -> dict[str, Tensor]:
        """Encode n sequences of items; returns `fused`, `text`, `image`, each (n, d) float32 with NaN for absent rows.

        Gradients flow if the backbone has trainable weights and grad mode is on.

        Args:
            titles: prepared titles of each sequence (`Backbone.prepare_title`), oldest first; not read by an encoder
                of images only.
            images: features of each sequence's images (`Backbone.encode_images`); an empty list if there are none.
                Not read by an encoder of titles only.
            token_budget: tokens in one packed row; default: the encoder's.
        """
        backbone, count, budget = self.backbone, len(titles), token_budget or self.token_budget
        if self.settings.fusion == "internal":
            complete = [row for row in range(count) if images[row] and len(images[row]) == len(titles[row])]
            prompt = {row: self._tokenize_together(titles[row], images[row]) for row in complete}
            absent = torch.full((count, self.dim), torch.nan, device=backbone.device)
            fused = self._encode_rows(prompt, count, budget)
            if self.settings.late_fusion == "gate" and self.late_fusion is None:
                raise ModelError(
                    "the settings say late_fusion: gate, but no adapter with a gate is loaded",
                    "an adapter that holds the gate",
                    "give the adapter that `vlm2rec finetune --method notellm2` wrote",
                )
            if self.late_fusion is not None and complete:
                rows = onto(fused.device, torch.tensor(complete))
                seen = mean_tokens_of([images[row][0] for row in complete])
                fused = fused.index_copy(0, rows, self.late_fusion(seen, fused[rows]))
            return {schema.FUSED: fused, schema.TEXT: absent, schema.IMAGE: absent.clone()}
        with_text, with_image = (view in self.modalities for view in schema.MODALITIES)
        asked = self.settings.prompt_style, self.settings.instruction
        texts = {row: backbone.tokenize(prompts.text_prompt(titles[row], *asked)) for row in range(count) if with_text}
        pictures = {
            row: backbone.tokenize(prompts.image_prompt(len(images[row]), *asked), images[row])
            for row in range(count)
            if with_image and images[row]
        }
        with modality.modality(schema.TEXT):
            text = self._encode_rows(texts, count, budget)
        with modality.modality(schema.IMAGE):
            image = self._encode_rows(pictures, count, budget)
        return {schema.FUSED: self._fuse(text, image), schema.TEXT: text, schema.IMAGE: image}

    def read_items(self, titles: Sequence[str], images: Sequence[ImageFeatures]) -> dict[str, Tensor]:
        """Return `fused`, the vectors of n items in one prompt each, and `image`, the states before the text if it is.

        Both are (n, d) float32, after the late fusion. Gradients flow as from `encode_sequences`.

        Args:
            titles: prepared titles.
            images: the features of the items' images.
        """
        pairs = zip(titles, images, strict=True)
        states = self.backbone.encode_reads([self._tokenize_together([title], [image]) for title, image in pairs])
        found = [state.float() for state in states.unbind(1)]  # (n, d) each; the last is that of the whole prompt
        if self.late_fusion is not None:
            seen = mean_tokens_of(images)
            found = [self.late_fusion(seen, state) for state in found]
        return {schema.FUSED: found[-1], **({schema.IMAGE: found[0]} if len(found) > 1 else {})}

    def tokenize_title(self, title: str) -> list[int]:
        """Return the token ids of a single item's text prompt; `title` is prepared."""
        asked = self.settings.prompt_style, self.settings.instruction
        return self.backbone.tokenize(prompts.text_prompt([title], *asked)).ids

    def _tokenize_together(self, titles: Sequence[str], images: Sequence[ImageFeatures]) -> EncodedPrompt:
        """Return the prompt that holds titles and images of a sequence, or of NoteLLM-2's single item."""
        settings = self.settings
        if settings.reads_histories:
            prompt = prompts.item_prompt(titles, settings.prompt_style, settings.instruction)
            return self.backbone.tokenize(prompt, images)
        (title,) = titles
        return self.backbone.tokenize(prompts.note_prompt(title, settings.prompt_style), images)

    def _fuse(self, text: Tensor, image: Tensor) -> Tensor:
        """Return the fused vectors: the sum, or the only view."""
        if self.settings.views != "both":
            return text if self.settings.views == schema.TEXT else image
        with_image = ~image.isnan().any(dim=1, keepdim=True)
        return torch.where(with_image, fuse(text, image, self.settings.fusion_norm), text)

    def _encode_rows(self, by_row: dict[int, EncodedPrompt], count: int, budget: int) -> Tensor:
        """Encode prompts in packed rows of at most `budget` tokens; rows without a prompt are NaN."""
        rows = list(by_row)
        order: list[int] = []
        vectors: list[Tensor] = []
        batches = list(batches_by_tokens([len(by_row[row]) for row in rows], budget, padded=False))
        spare = 0
        if self.backbone.sharded:  # agreed before any run, as the runs of the processes wait for each other
            spare = distributed.most(len(batches), self.backbone.device) - len(batches)
        for batch in batches:
            chosen = [by_row[rows[i]] for i in batch]
            if self.backbone.sharded:  # no process may run halves that the others do not have
                parts = [self.backbone.encode(chosen)]
            else:
                parts = in_halves(self.backbone.encode, chosen, _tokens_of, self._take_smaller_rows)
            vectors += [part.float() for part in parts]
            order += [rows[i] for i in batch]
        vectors += [self.backbone.encode_spare().float() for _ in range(spare)]
        result = torch.full((count, self.dim), torch.nan, device=self.backbone.device)
        if not vectors:
            return result
        # not in place, so that gradients flow
        return result.index_copy(0, onto(result.device, torch.tensor(order, dtype=torch.int64)), torch.cat(vectors))

    def _take_smaller_rows(self, batch: Sequence[EncodedPrompt]) -> None:
        self.token_budget = max(1, min(self.token_budget, sum(len(prompt) for prompt in batch)) // 2)
        logger.warning("out of memory: rows of %d tokens from now on", self.token_budget)


@functools.lru_cache(maxsize=1)
def _load_once(backbone: str, adapter: Path | None, choices: tuple[Any, ...], provenance: str) -> ItemEncoder:
    """Load the encoder that another process pickled; this process loads it once and shares it.

    Raises:
        ModelError: its files differ from those that the other process loaded.
    """
    encoder = ItemEncoder.load(backbone, adapter, **dict(choices))
    if json.dumps(encoder.provenance, sort_keys=True) != provenance:
        raise ModelError(
            f"{backbone} or its adapter {adapter} differs from that of the process that pickled the encoder",
            "the same files, number format and device settings everywhere",
            "share the folders, or give --dtype and --device explicitly",
        )
    return encoder


def _restore(tensors: Sequence[tuple[Tensor, torch.dtype]]) -> None:
    for tensor, dtype in tensors:
        tensor.data = tensor.data.to(dtype)


def _tokens_of(prompt: EncodedPrompt) -> str:
    return f"a prompt of {len(prompt)} tokens"


def to_numpy(vectors: Tensor) -> np.ndarray:
    """Return a tensor's values as a float32 array on the CPU."""
    return np.asarray(vectors.detach().float().cpu().numpy(), np.float32)
