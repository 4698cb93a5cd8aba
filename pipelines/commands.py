"""Finds a command by its name. What stands below the commands, a study or a laboratory, runs them this way."""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType


def module_of(name: str) -> ModuleType:
    """Return the module of a command, `export-items` or `export_items`; its libraries are loaded now, not before."""
    # RecBole, torch and polars each start a thread pool per core; tokenizers warn when a worker forks after use
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return import_module(f"vlm2rec.pipelines.{name.replace('-', '_')}")
