"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from tiny_models import tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny("qwen2_5_vl")` is the folder of a tiny random model of that family, built once per session."""

    @cache
    def build(family: str) -> Path:
        return tiny_model(family, tmp_path_factory.mktemp(family))

    return build
