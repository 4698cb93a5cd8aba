"""A small study for tests: five methods on a drawn catalogue, with a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlm2rec.pipelines.config import StudyConfig
from vlm2rec.pipelines.reporting import figures
from vlm2rec.pipelines.reporting.style import Picture

Tiny = Callable[[str], Path]
METHODS: list[dict[str, Any]] = [
    {"name": "ID", "source": "id", "paper": "ID"},
    {"name": "vanilla", "source": "backbone", "paper": "VLM vanilla (ext.)"},
    {
        "name": "SFT",
        "source": "finetune",
        "analyses": ["main", "ablation"],
        "finetune": {"loss": "sft", "gradient_steps": 1},
        "paper": "VLM SFT (ext.)",
    },
    {"name": "w/o CRTR", "source": "finetune", "analyses": ["ablation"], "finetune": {"crtr": False}},
    {
        "name": "VLM2Rec",
        "source": "finetune",
        "analyses": ["main", "ablation", "cross-domain"],
        "finetune": {"gradient_steps": 1},
        "paper": "VLM2Rec",
    },
]
SMALL: dict[str, Any] = {
    "methods": METHODS,
    "grids": [{"analysis": "sensitivity", "of": "VLM2Rec", "varies": "lam", "values": [0.1, 0.5]}],
    "finetune": {
        "max_steps": 2,
        "learning_rate": 0.01,
        "max_pixels": 3136,
        "valid_users": 5,
        "probe_users": 4,
        "log_steps": 1,
        "gradient_checkpointing": False,
    },
    "recommender": {"max_epochs": 1, "eval_step": 1, "hidden_size": 16},
    "export": {},
    "cold_start": [2, 4],
    "plan": {
        "main": {"seeds": [0, 1], "tasks": [1, 2], "models": ["SASRec"]},
        "ablation": {"seeds": [0], "tasks": [1], "models": []},
        "sensitivity": {"seeds": [0], "tasks": [1], "models": []},
        "cross-domain": {"seeds": [0], "tasks": [1], "models": []},
    },
}


def settings(tiny: Tiny, data: Path, folder: Path, flags: dict[str, Any] | None = None, **keys: Any) -> StudyConfig:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(SMALL | keys))
    values: dict[str, Any] = {
        "out": folder / "study",
        "data": data,
        "backbone": str(tiny("qwen2_5_vl")),
        "config": folder / "study.yaml",
        "device": "cpu",
        **(flags or {}),
    }
    return StudyConfig(**values)


def marks(out: Path) -> dict[str, str]:
    """Return a mark per step that is new whenever the step was run."""
    return {
        f"{path.parent.relative_to(out)}/{name}": record["mark"]
        for path in sorted(out.rglob("steps.json"))
        for name, record in json.loads(path.read_text()).items()
    }


@contextmanager
def blank_figures() -> Iterator[None]:
    """Make every figure of a page, but write a blank in place of what matplotlib would draw."""
    blank = f'<!-- {figures.OURS} --><svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"></svg>'

    def saved(figure: object, name: str, alt: str) -> figures.Drawn:
        return figures.Drawn(Picture(name, alt, blank), blank.encode())

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(figures, "_saved", saved)
        yield
