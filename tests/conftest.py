"""Fixtures that several test files share."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Fixtures import what they build with: the process that only deals tests out to others needs no torch.

# A process that tests are dealt out to ends at once: to take a million objects apart takes ten seconds. It is
# registered first, so that it runs last.
WORKER = "PYTEST_XDIST_WORKER" in os.environ
if WORKER:
    atexit.register(os._exit, 0)

_drawn = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
settings.register_profile("default", _drawn, max_examples=25, derandomize=True)
settings.register_profile("nightly", _drawn, max_examples=1000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny("qwen2_5_vl")` is the folder of a tiny random model of that family, built once per session."""
    from tiny_models import tiny_model

    @cache
    def build(family: str) -> Path:
        return tiny_model(family, tmp_path_factory.mktemp(family))

    return build


@pytest.fixture(scope="session")
def drawn_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset folder prepared from a small drawn catalogue: 40 products, 30 users, 20 candidates, two seeds."""
    from vlm2rec.pipelines import prepare
    from vlm2rec.pipelines.config import PrepareConfig
    from vlm2rec.pipelines.synthetic.drawn_catalogue import draw_catalogue

    folder = tmp_path_factory.mktemp("drawn")
    draw_catalogue(folder / "catalogue", products=40, users=30, seed=0)
    prepare.run(
        PrepareConfig(
            items=folder / "catalogue" / "items.parquet",
            interactions=folder / "catalogue" / "interactions.parquet",
            images=folder / "catalogue" / "images",
            out=folder / "data",
            core=2,
            candidates=20,
            candidate_seeds=(0, 1),
        )
    )
    return folder / "data"


@pytest.fixture
def undrawn() -> Iterator[None]:
    """Leave the figures of a study's page blank: to draw them takes longer than a tiny training."""
    from study_world import blank_figures

    with blank_figures():
        yield


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the workers of an export come out of a process that has the libraries, which take seconds to import."""
    from children import CHILDREN

    from vlm2rec.embedder.export import distribute

    monkeypatch.setattr(distribute, "PROCESSES", CHILDREN)


_frozen_modules = 0


def _freeze() -> None:
    global _frozen_modules
    gc.collect()
    gc.freeze()
    _frozen_modules = len(sys.modules)


@pytest.hookimpl(wrapper=True)
def pytest_collection_finish() -> Iterator[None]:
    """Keep the modules and the tests out of every garbage collection: a million objects that stay until the end."""
    yield
    _freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Do the same for what tests have imported and what a file leaves behind: every training collects garbage."""
    yield
    if len(sys.modules) > _frozen_modules + 20 or nextitem is None or nextitem.path != item.path:
        _freeze()
    torch = sys.modules.get("torch")
    if torch is not None and torch.is_anomaly_enabled():  # importing RecBole turns it on, and training takes ten times
        torch.autograd.set_detect_anomaly(False)


def pytest_unconfigure() -> None:
    """Give everything back, or libraries report at exit what they take for leaks."""
    if not WORKER:
        gc.unfreeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what became of the damaged files of each format: see test_fuzz.py."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    told = [str(value) for report in reports for name, value in report.user_properties if name == "fuzz"]
    if told:
        terminalreporter.section("damaged files")
        for line in told:
            terminalreporter.write_line(line)
