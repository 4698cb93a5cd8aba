"""`vlm2rec init`: writes the settings of the whole pipeline, with their help texts as comments, for `vlm2rec run`."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm2rec.embedder.contract import publish
from vlm2rec.embedder.contract.errors import ConfigError
from vlm2rec.pipelines import console
from vlm2rec.pipelines.config import FIRST, InitConfig, groups_of
from vlm2rec.pipelines.run import STAGES, read_stages

_WIDTH = 100
_HEAD = """\
The whole pipeline. `vlm2rec run` runs these stages one after the other and skips what is done. To leave a stage out,
remove it from this file. Paths are relative to the folder in which you start the command. Each stage shows the settings
that one needs first; a line that begins with # shows a default. `vlm2rec STAGE --help` lists all settings:
--some-setting there is some_setting here. &name gives a value a name, and *name repeats the value.
"""


def run(config: InitConfig) -> Path:
    """Write the file and return its path.

    Raises:
        ConfigError: the file exists, or a file that the settings name does not.
    """
    if config.out.exists():
        raise ConfigError(f"{config.out} exists", "a new file", "choose another --out, or remove it")
    given = {name: path for name in ("items", "interactions", "images") if (path := getattr(config, name)) is not None}
    for name, path in given.items():
        if not path.exists():
            raise ConfigError(f"--{name} {path} does not exist", "files that are there", "check the path")
    files = {"items": Path("items.parquet"), "interactions": Path("interactions.parquet")} | given
    if not given:
        files["images"] = Path("images")
    with publish.plain_disk_errors(config.out):
        config.out.parent.mkdir(parents=True, exist_ok=True)
        publish.write_whole(config.out, _text(config, files).encode("utf-8"))
    read_stages(config.out)  # what was written can be read
    rows: dict[str, object] = {"file": config.out, "stages": ", ".join(STAGES)}
    if missing := [f"{name} ({path})" for name, path in files.items() if not path.exists()]:
        rows["to fill in"] = ", ".join(missing)
    if "images" not in files:
        rows["views"] = "text alone, as there is no --images"
    console.summary("Settings written", rows)
    return config.out


class _Reference(str):
    """A value that stands elsewhere in the file."""


def _values(config: InitConfig, files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Return the settings of each stage that have a value; the other ones that one needs first are comments."""
    data, backbone, adapter, embeddings = map(_Reference, ("data", "backbone", "adapter", "embeddings"))
    text_only = {} if "images" in files else {"views": "text"}
    style = {"prompt_style": "qwen3-vl-embedding"} if "qwen3-vl-embedding" in config.backbone.lower() else {}
    return {
        "prepare": {**{name: str(path) for name, path in files.items()}, "out": "data"},
        "finetune": {
            **{"data": data, "backbone": config.backbone, "out": "adapter"},
            **({"loss": "sft"} if text_only else {}),
            **text_only,
            **style,
        },
        "export-items": {"data": data, "backbone": backbone, "adapter": adapter, "out": "embeddings"},
        "evaluate": {
            **{"data": data, "embeddings": embeddings, "out": "task1", "backbone": backbone, "adapter": adapter}
        },
        "train-recommender": {"data": data, "embeddings": embeddings, "model": "SASRec", "out": "sasrec"},
        "build-index": {"embeddings": embeddings, "out": "index"},
    }


_ANCHORS = {
    ("prepare", "out"): "data",
    ("finetune", "backbone"): "backbone",
    ("finetune", "out"): "adapter",
    ("export-items", "out"): "embeddings",
}
"""The values that other stages repeat, and the names they have for that."""


def _text(config: InitConfig, files: Mapping[str, Path]) -> str:
    lines = _comment(_HEAD, "")
    for stage, values in _values(config, files).items():
        cls = STAGES[stage][0]
        lines += ["", f"{stage}:"]
        groups = groups_of(cls)
        for field in dataclasses.fields(cls):
            if groups[field.name] != FIRST and field.name not in values:
                continue
            lines += _comment(str(field.metadata["help"]), "  ")
            if field.name in values:
                value, anchor = values[field.name], _ANCHORS.get((stage, field.name))
                shown = f"*{value}" if isinstance(value, _Reference) else _scalar(value)
                lines.append(f"  {field.name}: {f'&{anchor} ' if anchor else ''}{shown}")
            else:
                lines.append(f"  # {field.name}: {_scalar(field.default)}".rstrip())
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _scalar(value: Any) -> str:
    """Return a value as YAML on one line; nothing for None."""
    import yaml

    if value is None or value == ():
        return ""
    plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    text = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return text.removesuffix("...\n").strip()
