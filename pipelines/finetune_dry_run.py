"""`finetune --dry-run`: how many steps a training has, and what memory and time they take, measured on a few users."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlm2rec.embedder import memory
from vlm2rec.embedder.backbones.backbone import ImageFeatures
from vlm2rec.embedder.contract import publish
from vlm2rec.embedder.contract.dataset import Dataset
from vlm2rec.embedder.contract.errors import ArtifactError
from vlm2rec.embedder.contract.printable import size
from vlm2rec.embedder.contract.storage import free_bytes
from vlm2rec.embedder.encoders.item_encoder import ItemEncoder
from vlm2rec.embedder.encoders.item_features import IMAGES_AT_ONCE, ItemFeatures
from vlm2rec.embedder.training import checkpoints
from vlm2rec.embedder.training.train import Model, TrainingSamples, TrainingSettings, rehearsal, steps_of

_PATIENCE = 120.0  # seconds that a step may be expected to take; of a slower one, the time is computed from one user's
_LOOKED_AT = 256  # samples, among which those with the longest histories are chosen
_STATE = 2  # AdamW keeps two numbers for each trained one
_WRITTEN = 3 + _STATE  # and a checkpoint has these, the weights, the best weights, and the one before until it is whole


class SeenItems(ItemFeatures):
    """Items that count whose images are asked for."""

    def __init__(self, dataset: Dataset, encoder: ItemEncoder) -> None:
        super().__init__(dataset, encoder)
        self.count, self.images = len(dataset.item_ids), 0

    def features(self, sequences: Sequence[Sequence[int]]) -> list[list[ImageFeatures]]:
        """See `ItemFeatures`."""
        self.images += len({int(row) for rows in sequences for row in rows})
        return super().features(sequences)


def require_writable(folder: Path) -> AbstractContextManager[None]:
    """Raise `ArtifactError` if a training could not write its checkpoints, or another one does; makes nothing.

    Returns:
        What holds the folder, if it is there.
    """
    if folder.is_dir():
        return checkpoints.alone(folder)
    with publish.plain_disk_errors(folder, ArtifactError):
        place = next(parent for parent in folder.absolute().parents if parent.exists())
        number = errno.EACCES if place.is_dir() else errno.ENOTDIR
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise OSError(number, os.strerror(number), str(place))
    return nullcontext()


def measured(
    model: Model,
    samples: TrainingSamples,
    items: SeenItems,
    settings: TrainingSettings,
    out: Path,
    begun: Path | None,
) -> dict[str, Any]:
    """Do a step with one, with two and with all users of a batch, and return what the training would take.

    No weight changes. Memory is counted for the longest histories, with the model's number format and device; time is
    that of a batch as the training draws them.

    Args:
        model: what would be trained; `items` are its items.
        samples: what it would learn from.
        items: titles and images.
        settings: how long and how fast.
        out: the adapter folder, which need not exist.
        begun: the newest checkpoint of a run that would go on.

    Returns:
        steps, steps_left, samples (of an epoch), batch (samples a step), at_once (samples whose activations are held
        together), tokens and images (of a step), parameters, trained (of these), bytes of `weights`, `optimizer`,
        `gradients`, `first` and `more` (activations of one sample, and of each further one), `vision` (while images
        are encoded), `features` (of images, kept) and `memory` (all together), step_seconds, seconds (of the steps that
        are left), seconds_from (samples they were measured on), disk_bytes, free_bytes, device, dtype, and `fits`
        (samples at once on each card).

    Raises:
        ModelError: the loss is not finite.
    """
    _, steps = steps_of(samples, settings)
    left = max(0, steps - (0 if begun is None else int(begun.name.rpartition("-")[2])))
    device, weights = model.encoder.backbone.device, [*model.parameters(), *model.buffers()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = min(settings.batch_size, len(samples))
    samples.set_epoch(0)
    order = np.random.default_rng([settings.seed, 7]).permutation(len(samples))
    batch = [samples[int(place)] for place in order[:count]]
    longest = sorted((samples[int(place)] for place in order[:_LOOKED_AT]), key=_length, reverse=True)[:2]
    chunk, model.chunk_users = model.chunk_users, 0
    at_once = min(count, chunk) if chunk else count
    with rehearsal(model, settings, steps) as step:
        with memory.counted(device, weights) as encoding:
            step(longest[:1], False)
        seen = items.images
        if len(longest) > 1:
            step(longest, False)  # so that all their images are encoded
        activations = []
        for number in (1, 2):
            with memory.counted(device, weights) as found:
                step(longest[:number], True)
            activations.append(found.peak)
        one = _seconds(device, lambda: step(longest[:1], True))
        model.chunk_users, items.images = chunk, 0
        whole = one * count <= _PATIENCE
        tokens = _Tokens()
        with tokens.of(model):
            step(batch if whole else batch[:1], False)
        images = items.images
        seconds = _seconds(device, lambda: step(batch, True)) if whole else one * count
    per_batch = 1 if whole else count
    first, more = activations[0], max(0, activations[1] - activations[0]) if len(longest) > 1 else activations[0]
    held, adapter = memory.bytes_of(weights), memory.bytes_of(trained)
    vision = encoding.peak * min(IMAGES_AT_ONCE, images * per_batch) // seen if seen else 0
    features = items.kept_bytes(items.count)
    fixed = held + _STATE * adapter + vision + features
    return {
        "samples": len(samples),
        "steps": steps,
        "steps_left": left,
        "batch": count,
        "at_once": at_once,
        "tokens": tokens.count * per_batch,
        "images": images * per_batch,
        "parameters": sum(each.numel() for each in model.parameters()),
        "trained": sum(each.numel() for each in trained),
        "weights": held,
        "optimizer": _STATE * adapter,
        "gradients": adapter,
        "first": first,
        "more": more,
        "vision": vision,
        "features": features,
        "memory": fixed + first + (at_once - 1) * more,
        "step_seconds": seconds,
        "seconds": seconds * left,
        "seconds_from": count if whole else 1,
        "disk_bytes": _WRITTEN * adapter,
        "free_bytes": free_bytes(out),
        "device": str(device),
        "dtype": str(model.encoder.backbone.model.dtype).removeprefix("torch."),
        "fits": dict(memory.most_on_cards(fixed, first, more)),
    }


def described(found: Mapping[str, Any]) -> dict[str, object]:
    """Return what was measured as the rows of a summary."""
    begun = found["steps"] - found["steps_left"]
    whole = found["seconds_from"] == found["batch"]
    timed = f"{found['step_seconds']:.2f} s a step, {'measured' if whole else 'computed from one sample'}"
    fits = [f"{name}: {min(most, found['samples']) or 'none'}" for name, most in found["fits"].items()]
    return {
        "steps": f"{found['steps']:,} with {found['batch']} samples each"
        + (f", {begun:,} of them done" if begun else ""),
        "a step": f"about {found['tokens']:,} tokens and {found['images']:,} images",
        "parameters": f"{found['parameters']:,}, of which {found['trained']:,} are trained",
        "time": f"about {_clock(found['seconds'])} ({timed}), validation not counted",
        "weights": f"{size(found['weights'])}; optimizer {size(found['optimizer'])} (computed)",
        "activations": f"{size(found['first'])} for the longest history, {size(found['more'])} for each further one",
        "images": f"{size(found['vision'])} while they are encoded, {size(found['features'])} for kept features",
        "memory": f"about {size(found['memory'])} with {found['at_once']} at once, counted in {found['dtype']} on"
        f" {found['device']}",
        "at once on": "; ".join(fits),
        "disk": f"about {size(found['disk_bytes'])} for checkpoints, {size(found['free_bytes'])} free",
    }


class _Tokens:
    """Counts the tokens that a language model's first layer receives."""

    def __init__(self) -> None:
        self.count = 0

    def of(self, model: Model) -> AbstractContextManager[Any]:
        """Count while the returned context is open."""
        layer = model.encoder.backbone.language_model.layers[0]
        return layer.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, layer: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        states = inputs[0] if inputs else named["hidden_states"]
        self.count += int(np.prod(states.shape[:-1]))


def _length(sample: Any) -> int:
    """Return the length of a sample's history; samples of items have none and are all alike."""
    return len(getattr(sample, "history", ()))


def _seconds(device: torch.device, act: Any) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    act()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def _clock(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 7200 else f"{seconds / 60:.1f} minutes"
