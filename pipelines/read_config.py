"""Reads settings: merges defaults, a YAML file, `key=value` overrides and flags into one checked config."""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal

from vlm2rec.downstream.multimodal.recipes import defaults_of
from vlm2rec.embedder.contract.errors import ConfigError, did_you_mean, one_of
from vlm2rec.embedder.options import defaults_of_style
from vlm2rec.embedder.training.recipes import loss_of, recipe_of
from vlm2rec.pipelines.config import Config, FinetuneConfig, ImportAdapterConfig, TrainRecommenderConfig

RENAMED = {"wording": "prompt_style"}
"""Settings that had another name before."""


def read_config(
    cls: type[Config],
    file: Path | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    *,
    section: tuple[str, Mapping[str, Any]] | None = None,
) -> Config:
    """Merge defaults, a YAML file, `key=value` overrides and flags into one checked config.

    `section` is a part of a file with settings of several commands: where it stands, and what it holds.

    Raises:
        ConfigError: unknown or missing key, or a value of the wrong type or out of bounds.
    """
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    also = {f.metadata["also"]: f.name for f in dataclasses.fields(cls) if f.metadata.get("also")}  # type: ignore[arg-type]
    values: dict[str, Any] = {}

    def named(given: dict[str, Any]) -> dict[str, Any]:
        return {also.get(key, key): value for key, value in given.items()}

    if file is not None:
        values.update(_known_only(named(read_yaml(file)), known, str(file), cls))
    if section is not None:
        where, given = section
        values.update(_known_only(named(dict(given)), known, where, cls))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text!r} has no '='", "--set key=value", "write the key, '=', and the value")
        values.update(_known_only(named({key.strip().replace("-", "_"): _parse(value)}), known, "--set", cls))
    values.update({key: value for key, value in (flags or {}).items() if value is not None})
    if cls in (FinetuneConfig, ImportAdapterConfig):  # an export asks its adapter first
        values = {**defaults_of_style(values.get("prompt_style")), **values}
    if cls is FinetuneConfig:
        values = {**recipe_of(str(values.get("method", FinetuneConfig.method))).defaults, **values}
        loss_of(str(values.get("loss", FinetuneConfig.loss)))
    if cls is TrainRecommenderConfig:
        values = {**defaults_of(values.get("model")), **values}
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if f.default is MISSING and f.default_factory is MISSING and f.name not in values:
            flag = f"--{f.name.replace('_', '-')}"
            text = f.metadata.get("help", f.name)
            fix = f"give {flag}, or put it in --config" if section is None else f"write `{f.name}: ...` there"
            raise ConfigError(f"{flag} is missing", text.rstrip("."), fix)
    config = _validate(cls, values)
    for key, value in values.items():
        if isinstance(value, str) and "://" in value and isinstance(getattr(config, key), Path):
            raise ConfigError(
                f"--{key.replace('_', '-')} {value} is an address",
                "a path on this machine",
                "use a local path, and copy the files",
            )
    return config


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a YAML mapping (safe loader: plain data only)."""
    import yaml

    if not file.is_file():
        raise ConfigError(f"config file {file} does not exist", "a YAML file", "check the path")
    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not YAML: {error}", "a mapping of settings", "correct the file") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"{file} holds a {type(loaded).__name__}", "a mapping of settings", "write `key: value` lines"
        )
    return {str(key): value for key, value in loaded.items()}


def _known_only(values: dict[str, Any], known: list[str], where: str, cls: type) -> dict[str, Any]:
    for key in values:
        if RENAMED.get(key) in known:
            raise ConfigError(f"{key} in {where}", f"its new name, {RENAMED[key]}", "use the new name")
        if key not in known:
            raise ConfigError(
                f"unknown setting {key!r} in {where}{did_you_mean(key, known)}",
                one_of(key, known, f"`{command_of(cls)} --help`"),
                "correct or remove it",
            )
    return values


def command_of(cls: type) -> str | None:
    """Return the command that a config class has the settings of, such as `vlm2rec prepare`; None for another class."""
    found = re.match(r"Settings of `(vlm2rec [a-z-]+)`", cls.__doc__ or "")
    return found and found[1]


def _parse(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _validate(cls: type[Config], values: dict[str, Any]) -> Config:
    import pydantic

    try:
        config = _checker(cls).validate_python(values)  # type: ignore[arg-type]
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else "settings"
        raise ConfigError(
            f"setting {key} = {first['input']!r} is not usable: {first['msg'].lower()}",
            f"{_type_text(cls, key)}",
            f"change --{key.replace('_', '-')}",
        ) from None
    for key in values:  # paths may have such bytes, and are no texts by now
        _refuse_broken_text(key, getattr(config, key))
    return config


def _refuse_broken_text(key: str, value: Any) -> None:
    """Raise `ConfigError` for a text of bytes that are not UTF-8, which Python keeps as lone surrogates."""
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ConfigError(
                f"setting {key} = {text!r} is not UTF-8", "text in UTF-8", f"change --{key.replace('_', '-')}"
            )


@functools.cache
def _checker(cls: Any) -> Any:
    """Return pydantic's checker of a config class, kept because making one takes a hundred times as long as a check."""
    import pydantic

    return pydantic.TypeAdapter(cls)


def _type_text(cls: type, key: str) -> str:
    hint = typing.get_type_hints(cls).get(key)
    if hint is None:
        return "a known setting"
    options = [
        str(value)
        for part in _union_parts(hint)
        if typing.get_origin(part) is Literal
        for value in typing.get_args(part)
    ]
    return f"one of {', '.join(options)}" if options else str(getattr(hint, "__name__", hint))


def _union_parts(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)
