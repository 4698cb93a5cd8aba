"""What is set for a process: the memory it keeps, and the variables of those it starts."""

from __future__ import annotations

import os
import sys

import pytest
from children import child

from vlm2rec.embedder.export.processes import environment, shared_cores


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library of other systems has no such switch")
def test_memory_that_was_freed_is_not_asked_of_the_system_again() -> None:
    code = """
import resource, sys
import torch
from vlm2rec.embedder.export.processes import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
torch.ones(20_000_000)
before = resource.getrusage(resource.RUSAGE_SELF)
for number in range(1, 11):
    torch.ones(20_000_000 - 1000 * number)  # 80 MB
after = resource.getrusage(resource.RUSAGE_SELF)
print(after.ru_minflt - before.ru_minflt)
"""
    usual, kept = (int(child(code, choice).communicate()[0]) for choice in ("usual", "keep"))
    assert usual > 100_000 and kept < usual / 5  # pages


def test_a_variable_is_set_for_a_while_and_workers_share_the_cores_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with environment("OMP_NUM_THREADS", "7"), shared_cores(2):
        assert os.environ["OMP_NUM_THREADS"] == "7"
    assert os.environ["OMP_NUM_THREADS"] == "3"
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    with shared_cores(5):
        assert os.environ["OMP_NUM_THREADS"] == "2"
    assert "OMP_NUM_THREADS" not in os.environ
