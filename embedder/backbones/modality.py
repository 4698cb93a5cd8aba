"""The modality of the current prompts, for layers that treat text and image differently."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token

from vlm2rec.embedder.contract.errors import ModelError

_modality: ContextVar[str | None] = ContextVar("modality", default=None)


class modality:  # noqa: N801, it reads like a keyword in a `with` statement
    """Encode prompts of one modality, `text` or `image`, inside this block. It may be entered repeatedly."""

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._tokens: list[Token[str | None]] = []

    def __enter__(self) -> None:
        self._tokens.append(_modality.set(self._name))

    def __exit__(self, *error: object) -> None:
        _modality.reset(self._tokens.pop())


def current() -> str | None:
    """Return the modality whose prompts are being encoded; None outside of `modality`."""
    return _modality.get()


def remembered() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a checkpointed layer's first run and of its recomputations, for `torch.utils.checkpoint`.

    A layer is recomputed several times if several losses are differentiated.
    """
    return nullcontext(), modality(current())


def required() -> str:
    """Return the modality of the current prompts, or raise `ModelError` if none is set."""
    name = _modality.get()
    if name is None:
        raise ModelError(
            "a model with MoDA was called without saying whether its input is text or an image",
            "prompts of one modality",
            "encode with ItemEncoder, or inside vlm2rec.embedder.backbones.modality.modality(...)",
        )
    return name
