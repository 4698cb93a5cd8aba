"""What one may do after a command: the next command, with the real paths. One place for all commands."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

Next = Callable[[Any, Any], str | None]


def what_now(name: str, config: Any, returned: Any) -> str | None:
    """Return the command that comes after one with these settings; None if there is none to name.

    Args:
        name: the command.
        config: its settings; None for a command without any.
        returned: what its function returned.
    """
    following = _NEXT.get(name)
    return None if following is None else following(config, returned)


def _call(command: str, *positional: Any, **flags: Any) -> str:
    """Return a call as one types it; a flag that is None is left out, and one in capital letters is to fill in."""
    words = ["vlm2rec", command, *map(str, positional)]
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _after_init(config: Any, returned: Any) -> str:
    default = type(config)().out
    return _call("run", config=None if config.out == default else config.out)


def _after_run(config: Any, returned: Any) -> str | None:
    outs = {each["stage"]: each["out"] for each in (returned or {}).get("stages", ()) if "done" in each["state"]}
    if "build-index" in outs:
        return _call("search", index=outs["build-index"], item="ITEM")
    return _call("verify", outs["export-items"]) if "export-items" in outs else None


def _after_prepare(config: Any, returned: Any) -> str:
    text_only = {"views": "text", "loss": "sft"} if config.images is None else {}
    return _call("finetune", data=config.out, backbone="BACKBONE", out="adapter", **text_only)


def _after_finetune(config: Any, returned: Any) -> str:
    if config.dry_run and returned is not None:  # None: the adapter is complete
        return "the same command without --dry-run"
    return _call("export-items", data=config.data, backbone=config.backbone, adapter=config.out, out="embeddings")


def _after_export(config: Any, returned: Any) -> str | None:
    if config.dry_run:
        return "the same command without --dry-run"
    if returned is None:
        return None  # other workers are still at it
    model = {"backbone": config.backbone, "adapter": config.adapter} if config.strategy is None else {}
    return _call("evaluate", data=config.data, embeddings=config.out, **model, out="task1")


def _after_evaluate(config: Any, returned: Any) -> str:
    return _call("train-recommender", data=config.data, model="SASRec", embeddings=config.embeddings, out="sasrec")


def _after_recommender(config: Any, returned: Any) -> str | None:
    if config.embeddings is None:
        if config.data is None:
            return None
        start = {"embeddings": "EMBEDDINGS", "out": "recommender-of-vectors"}
        return _call("train-recommender", data=config.data, model=config.model, **start)
    return _call("build-index", embeddings=config.embeddings, out="index")


def _after_study(config: Any, returned: Any) -> str:
    return "the same command without --plan-only" if config.plan_only else f"open {config.out / 'report.html'}"


_NEXT: dict[str, Next] = {
    "doctor": lambda config, returned: _call("demo"),
    "demo": lambda config, returned: _call(
        "search", index=config.out / "index", item=f"P{min(302, config.products - 1):04}", html="found.html"
    ),
    "make-backbone": lambda config, returned: _call("finetune", data="DATA", backbone=config.out, out="adapter"),
    "init": _after_init,
    "run": _after_run,
    "prepare": _after_prepare,
    "finetune": _after_finetune,
    "export-items": _after_export,
    "export-users": lambda config, returned: _call("verify", config.out),
    "import-adapter": lambda config, returned: _call(
        "export-items", data="DATA", backbone=config.backbone, adapter=config.out, out="embeddings"
    ),
    "import-vectors": lambda config, returned: _call("evaluate", data=config.data, embeddings=config.out, out="task1"),
    "shorten": lambda config, returned: _call("build-index", embeddings=config.out, out="index"),
    "verify": lambda config, returned: _call("failures", config.embeddings),
    "evaluate": _after_evaluate,
    "train-recommender": _after_recommender,
    "recommend": lambda config, returned: _call("verify", config.out),
    "export-recommender": lambda config, returned: _call("build-index", embeddings=config.out, out="index"),
    "build-index": lambda config, returned: _call("search", index=config.out, item="ITEM"),
    "search": lambda config, returned: (
        None if config.html else _call("search", index=config.index, item=config.item or "ITEM", html="page.html")
    ),
    "semantic-ids": lambda config, returned: _call(
        "semantic-ids", embeddings="EMBEDDINGS_WITH_NEW_ITEMS", like=config.out, out="OUT"
    ),
    "probe-images": lambda config, returned: _call(
        "finetune", data=config.data, backbone=config.backbone, out="adapter"
    ),
    "study": _after_study,
    "report": lambda config, returned: f"open {returned}" if returned else None,
}
"""The next command of each. `failures` says what to do in words of its own, and `convert` ends in another program."""
