"""Every interleaving of processes that begin, fill, finish, extend and retry one folder, killed at any step.

`export_protocol.py` is the model; here it is explored, whole and with one guard left out at a time.
"""

from __future__ import annotations

import operator

import pytest
from export_protocol import GUARDS, SCENARIOS, Scenario, explore

from vlm2rec.embedder.export import lock, shards


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_no_interleaving_loses_mixes_or_blocks_anything(scenario: Scenario, capsys: pytest.CaptureFixture[str]) -> None:
    found = explore(scenario)
    with capsys.disabled():
        print(f"\n{scenario.name}: {found.states:,} states", end=" ")
    assert found.violations == []
    assert found.states > 100


@pytest.mark.parametrize("guard", GUARDS)
def test_without_one_guard_something_goes_wrong(guard: str) -> None:
    assert any(explore(scenario, without=guard).violations for scenario in SCENARIOS)


@pytest.mark.parametrize("guard", GUARDS)
def test_the_functions_that_the_model_stands_for_are_there(guard: str) -> None:
    rooms = {"lock": lock, "shards": shards}
    for name in GUARDS[guard]:
        room, _, function = name.partition(".")
        assert callable(operator.attrgetter(function)(rooms[room]))
