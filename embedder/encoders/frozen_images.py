"""Frozen image encoders that know no text, ResNet and EfficientNet, alone or beside a text encoder.

The vector of an image is what the model pools from its last layer. Alone they make a table of images: fused equals
image. Beside a text encoder (`--image-encoder`) text and image keep the lengths of their own encoders, and fused is
both end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from vlm2rec.embedder.backbones.pooling import concatenate
from vlm2rec.embedder.contract import schema
from vlm2rec.embedder.contract.errors import ModelError
from vlm2rec.embedder.encoders.item_encoder import EncodedItems, Picture, to_numpy
from vlm2rec.embedder.options import FusionNorm

IMAGES_AT_ONCE = 32
IMAGE = "image"  # the manifest's settings.source of an image encoder
PAIR = "text and image encoder"  # that of both
_CROP = 0.875  # of ResNet's images, if the processor's file does not say
# where a model's config has the length of its pooled vector
_WIDTHS: Final[Mapping[str, str]] = {"resnet": "hidden_sizes", "efficientnet": "hidden_dim"}
IMAGE_TYPES: Final = tuple(_WIDTHS)


class _Encoder(Protocol):
    def encode_items(self, titles: Sequence[str], images: Sequence[Picture]) -> EncodedItems: ...


def image_settings(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides an image's vector besides the weights, and its length.

    Args:
        folder: of the model.
        config: its config.json, of one of `IMAGE_TYPES`.

    Raises:
        ModelError: the config does not say how long a vector is.
    """
    key = _WIDTHS[str(config["model_type"])]
    width = config.get(key)
    width = width[-1] if isinstance(width, list) and width else width
    if type(width) is not int or width < 1:
        raise ModelError(
            f"{folder / 'config.json'} has {key} = {config.get(key)!r}",
            "the length of the model's pooled vector",
            "download the folder again",
        )
    # decoding may stop at twice the model's own size: see `images.open_image`
    return {"dim": width, "views": [schema.FUSED, schema.IMAGE], "max_pixels": _side(load_image_processor(folder)) ** 2}


def _side(processor: Any) -> int:
    """Return the side to which a processor shrinks a picture, before it crops it."""
    size = dict(processor.size)
    longest = max(int(value) for value in size.values() if value)
    return round(longest / (getattr(processor, "crop_pct", None) or _CROP)) if "shortest_edge" in size else longest


def pair_settings(text: Mapping[str, Any], image: Mapping[str, Any], fusion_norm: FusionNorm) -> dict[str, Any]:
    """Return the fingerprint of a text and an image encoder together, from those of both."""
    dims = {schema.FUSED: text["dim"] + image["dim"], schema.TEXT: text["dim"], schema.IMAGE: image["dim"]}
    names = (text[schema.MADE_WITH]["encoder"], image[schema.MADE_WITH]["encoder"])
    return {
        "source": PAIR,
        "dtype": text["dtype"],
        schema.MADE_WITH: dict(zip(("encoder", "image_encoder"), names, strict=True)),
        "dim": dims[schema.FUSED],
        "dims": dims,
        "views": list(schema.VIEWS),
        "fusion": "concatenated",
        "fusion_norm": fusion_norm,
        "max_pixels": image["max_pixels"],
        **{name: _own(each) for name, each in (("text_encoder", text), ("image_encoder", image))},
    }


def _own(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in (schema.MADE_WITH, "views", "max_pixels")}


def load_image_processor(folder: str | Path) -> Any:
    """Load the image processor of a model folder, which works on Pillow's images.

    Raises:
        ModelError: it is missing or damaged.
    """
    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the image processor of {folder} cannot be loaded ({str(error).splitlines()[0]})",
            "preprocessor_config.json",
            "download the folder again",
        ) from error


def fill_in(image: Tensor, images: Sequence[Picture], encode: Callable[[Sequence[Image.Image]], Tensor]) -> Tensor:
    """Write the vectors of the images that are there into their rows of `image`, (n, d), and return it.

    Args:
        image: the rows of the others stay as they are.
        images: n images, or why there is none.
        encode: returns (m, d) for m images; it gets `IMAGES_AT_ONCE` at a time.
    """
    seen = {row: picture for row, picture in enumerate(images) if isinstance(picture, Image.Image)}
    rows, pictures = list(seen), list(seen.values())
    for start in range(0, len(rows), IMAGES_AT_ONCE):
        part = slice(start, start + IMAGES_AT_ONCE)
        image[rows[part]] = encode(pictures[part])
    return image


class ImageEncoder:
    """Encodes images with a model that pools its last layer; the fused vector is the image vector."""

    def __init__(self, model: Any, settings: dict[str, Any]) -> None:
        self.model = model
        self._fingerprint = settings
        self.image_processor = load_image_processor(model.config.name_or_path)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides a vector, as JSON."""
        return self._fingerprint

    @torch.no_grad()
    def encode_items(self, titles: Sequence[str], images: Sequence[Picture]) -> EncodedItems:
        """Return the vectors of n images, NaN where there is none; titles are ignored, and the text vectors are NaN."""
        absent = torch.full((len(titles), self._fingerprint["dim"]), torch.nan)
        found = to_numpy(fill_in(absent, images, self._encode))
        return EncodedItems(found, np.full_like(found, np.nan), found, np.zeros(len(titles), bool))

    def _encode(self, pictures: Sequence[Image.Image]) -> Tensor:
        inputs = self.image_processor(images=list(pictures), return_tensors="pt").to(self.model.device)
        output = self.model(pixel_values=inputs["pixel_values"].to(self.model.dtype))
        return output.pooler_output.flatten(1).float().cpu()  # ResNet's is (n, d, 1, 1)


class PairEncoder:
    """Encodes titles with one encoder and images with another; fused is text and image end to end."""

    def __init__(self, text: _Encoder, image: _Encoder, settings: dict[str, Any]) -> None:
        self._text, self._image = text, image
        self._fingerprint = settings

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides a vector, as JSON."""
        return self._fingerprint

    def encode_items(self, titles: Sequence[str], images: Sequence[Picture]) -> EncodedItems:
        """Return text, image and fused vectors of n items; fused is NaN where one of the two is."""
        of_text = self._text.encode_items(titles, images)
        image = self._image.encode_items(titles, images).image
        together = torch.from_numpy(of_text.text), torch.from_numpy(image)
        fused = to_numpy(concatenate(*together, self._fingerprint["fusion_norm"]))
        return EncodedItems(fused, of_text.text, image, of_text.truncated)
