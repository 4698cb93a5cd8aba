"""Calls a command by its name. What stands below the commands, a study or a laboratory, runs them this way."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any


def call(command: str, config: Any, function: str = "run") -> Any:
    """Run a command in this process; its libraries are loaded now, not before.

    Args:
        command: as on the command line, `export-items`.
        config: its settings.
        function: of the command's module.
    """
    # RecBole, torch and polars each start a thread pool per core; tokenizers warn when a worker forks after use
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return getattr(import_module(f"vlm2rec.pipelines.{command.replace('-', '_')}"), function)(config)
