"""`vlm2rec make-backbone`: builds and trains a small Qwen2.5-VL for one catalogue, in three minutes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from vlm2rec.embedder.backbones.backbone import Backbone
from vlm2rec.embedder.backbones.images import ImageError
from vlm2rec.embedder.contract import publish, schema
from vlm2rec.embedder.contract.errors import DataError, did_you_mean
from vlm2rec.pipelines import console
from vlm2rec.pipelines.catalogue import files
from vlm2rec.pipelines.catalogue.images import find_images, no_images_error
from vlm2rec.pipelines.config import MakeBackboneConfig
from vlm2rec.pipelines.synthetic.small_backbone import (
    MODEL_FILES,
    PROVENANCE_FILE,
    WRITTEN_BY,
    CaptionedItem,
    Score,
    SmallBackboneSettings,
    Training,
    caption_words,
    read_picture,
    save_weights,
    train,
    train_tokenizer,
    write_provenance,
    write_random_model,
)

CAPTION_COLUMNS = ("caption", "description", "genres", "category", "categories", schema.TITLE)
LARGEST_CATALOGUE = 20_000
"""Most items to read: a training of a thousand steps draws about this many, and their pictures stay in memory."""


def run(config: MakeBackboneConfig) -> Path:
    """Build and train the model; return its folder.

    A folder of an earlier `make-backbone` is replaced once the new model is complete.

    Raises:
        ConfigError: `out` holds something else, or a size is impossible.
        DataError: the catalogue has no such column, no captions, no images, or none that can be read.
    """
    settings = SmallBackboneSettings(
        **{field.name: getattr(config, field.name) for field in dataclasses.fields(SmallBackboneSettings)}
    )
    publish.require_ours(
        config.out,
        "a model of an earlier make-backbone with nothing else in it",
        ours=schema.is_written_by(config.out / PROVENANCE_FILE, WRITTEN_BY),
        only=MODEL_FILES,
    )
    catalogue, column = _read_catalogue(config)
    words = caption_words(catalogue["caption"].to_list())
    tokenizer = train_tokenizer(catalogue[schema.TITLE].to_list(), words, settings.vocabulary)

    with publish.whole_folder(config.out) as work:
        write_random_model(work, tokenizer, settings)
        backbone = Backbone.load(str(work), max_pixels=settings.max_pixels, dtype="float32", device="cpu")
        items = _with_pictures(config.images, catalogue, words, backbone)
        training = _train(backbone, items, settings)
        save_weights(backbone.model, work)
        vocabulary = len({word for of_item in words for word in of_item})
        write_provenance(work, settings, training, items=len(items), words=vocabulary)
    _summarise(config, backbone, items, column, vocabulary, training)
    return config.out


def _read_catalogue(config: MakeBackboneConfig) -> tuple[pl.DataFrame, str]:
    """Return item_id, title, caption and image_path (may be null) of items with words, and the caption column."""
    names = files.ColumnNames(item_id=config.item_id_column, title=config.title_column)
    frame = files.read_items(config.items, names).frame
    column = _caption_column(config, frame)
    images = find_images(config.images, frame, config.image_column)
    if images.paths.null_count() == frame.height:
        raise no_images_error(config.images, frame, images, config.image_column)
    frame = frame.with_columns(images.paths, _as_text(frame, column).alias("caption"))
    frame = frame.select(schema.ITEM_ID, schema.TITLE, "caption", schema.IMAGE_PATH)
    usable = frame.filter(pl.col(schema.TITLE).str.contains(r"\S"), pl.col("caption").str.contains(r"[^\W_]"))
    if usable.is_empty():
        raise DataError(
            f"none of the {frame.height} items of {config.items} has both a title and words in column {column!r}",
            "captions: a few words about what an item is or looks like",
            "name a column with captions with --caption-column",
        )
    if usable.height > LARGEST_CATALOGUE:
        console.log.print(f"Learning from {LARGEST_CATALOGUE:,} of {usable.height:,} items, drawn at random.")
        usable = usable.sample(LARGEST_CATALOGUE, seed=config.seed)
    return usable, column


def _caption_column(config: MakeBackboneConfig, frame: pl.DataFrame) -> str:
    if config.caption_column is None:
        return next(column for column in CAPTION_COLUMNS if column in frame.columns)
    # the reader has renamed the title
    column = schema.TITLE if config.caption_column == config.title_column else config.caption_column
    if column not in frame.columns:
        raise DataError(
            f"{config.items} has no column {column!r}{did_you_mean(column, frame.columns)}",
            f"a caption column; the file has {', '.join(frame.columns)}",
            "correct --caption-column",
        )
    return column


def _as_text(frame: pl.DataFrame, column: str) -> pl.Series:
    values = frame[column]
    if isinstance(values.dtype, pl.List):
        return values.cast(pl.List(pl.String)).list.join(" ")
    return values.cast(pl.String)


def _with_pictures(
    root: Path, catalogue: pl.DataFrame, words: Sequence[tuple[str, ...]], backbone: Backbone
) -> list[CaptionedItem]:
    """Read every picture once, small; the model learns an item without a readable picture from its title."""
    items: list[CaptionedItem] = []
    unreadable: list[str] = []
    with console.progress("reading images", catalogue.height) as advance:
        rows = zip(catalogue[schema.TITLE], catalogue[schema.IMAGE_PATH], words, strict=True)
        for title, path, of_item in rows:
            picture: np.ndarray | None = None
            if path is not None:
                try:
                    picture = read_picture(root, path, backbone.processor)
                except ImageError as error:
                    unreadable.append(f"{path} ({error})")
            items.append(CaptionedItem(title, of_item, picture))
            advance(1)
    if unreadable:
        console.log.print(
            f"{len(unreadable)} images cannot be read; the first is {unreadable[0]}", soft_wrap=True, markup=False
        )
    if not any(item.picture is not None for item in items):
        raise DataError(
            f"none of the {len(items)} items with a caption has an image that can be read",
            "images to learn from",
            f"check the files below {root}",
        )
    return items


def _train(backbone: Backbone, items: Sequence[CaptionedItem], settings: SmallBackboneSettings) -> Training:
    if not settings.max_steps:
        return train(backbone, items, settings)
    with console.progress("training", settings.max_steps) as advance:
        recent: list[float] = []

        def watch(step: int, loss: float) -> None:
            recent[:] = [*recent[-49:], loss]
            advance(1, description=f"training, loss {sum(recent) / len(recent):.2f}")

        return train(backbone, items, settings, watch)


def _summarise(
    config: MakeBackboneConfig,
    backbone: Backbone,
    items: Sequence[CaptionedItem],
    column: str,
    vocabulary: int,
    training: Training,
) -> None:
    parameters = sum(weight.numel() for weight in backbone.model.parameters())
    pictured = sum(item.picture is not None for item in items)
    rows: dict[str, object] = {
        "parameters": f"{parameters / 1e6:.1f} M",
        "learnt from": f"{len(items):,} items, {pictured:,} with an image; {vocabulary:,} words of column {column!r}",
        "training": f"{training.steps:,} steps, {training.seconds:.0f} s",
    }
    for name, score in (("titles", training.text), ("images", training.image)):
        if score is not None:
            rows[f"held-out {name}"] = _in_words(score)
    rows["model"] = config.out
    console.summary("Small backbone", rows)


def _in_words(score: Score) -> str:
    return (
        f"{score.accuracy:.0%} of {score.items} answered with a word of the item;"
        f" always giving the most common word is right for {score.majority:.0%}"
    )
