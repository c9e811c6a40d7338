"""The one harness: turns, bytes compared, caches proven; and what the scripts add to it."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
from places import BENCHMARKS

from fastst_patch import engine
from fastst_patch.bench import harness, residency
from fastst_patch.bench.failures import BenchError


@pytest.fixture
def scenario(monkeypatch: pytest.MonkeyPatch) -> Any:
    if engine.native_error() is not None or not BENCHMARKS.is_dir():
        pytest.skip("no native extension, or no benchmarks beside these tests")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("_scenario")


def test_each_round_begins_with_another() -> None:
    rounds = ["".join(harness.order(("a", "b", "c"), number)) for number in range(4)]
    assert rounds == ["abc", "bca", "cab", "abc"]


def test_no_round_begins_that_would_end_too_late() -> None:
    assert harness.race(["a"], 3, str, max_seconds=0) == {"a": ["a"]}


def test_answers_are_kept_by_name_and_round() -> None:
    answers = iter(range(6))
    found = harness.race(["a", "b"], 3, lambda _: next(answers))
    assert found == {"a": [0, 3, 4], "b": [1, 2, 5]}


def test_other_tensors_end_the_race() -> None:
    def run(name: str) -> dict[str, int]:
        return {"digest": 2 if name == "b" else 1}

    assert harness.race(["a"], 2, run, lambda one: one["digest"])
    with pytest.raises(BenchError, match="the b run gave tensors that differ"):
        harness.race(["a", "b"], 1, run, lambda one: one["digest"])


def gate(monkeypatch: pytest.MonkeyPatch, fraction: float) -> residency.CacheState:
    """Have every gate find the files in this state, which is to be cold."""
    state = residency.CacheState("cold", fraction, "cachestat")
    monkeypatch.setattr(harness, "Gate", lambda *_: SimpleNamespace(state=state))
    return state


@pytest.mark.parametrize("inside", [[0.0], [0.9, 0.0], [None]])
def test_run_in_another_state_is_repeated(monkeypatch, inside) -> None:
    state, seen = gate(monkeypatch, 0.0), iter(inside)
    run = harness.proven(
        "cold", ["x"], None, lambda gate: SimpleNamespace(resident_before=next(seen))
    )
    assert run.sample.resident_before == inside[-1]
    assert run.prepared is state
    assert run.verified is True


def test_state_that_never_comes_is_no_result(monkeypatch) -> None:
    gate(monkeypatch, 0.25)
    runs: list[object] = []

    def run(given: object) -> SimpleNamespace:
        runs.append(given)
        return SimpleNamespace(resident_before=0.9)

    with pytest.raises(BenchError, match=r"25.0% and then 90.0% cached"):
        harness.proven("cold", ["x"], None, run)
    assert len(runs) == harness.TRIES


def test_numbers_are_medians_of_the_rounds_own_ratios(scenario) -> None:
    runs = {"a": [SimpleNamespace(s=one) for one in (1.0, 4.0, 9.0)],
            "b": [SimpleNamespace(s=one) for one in (2.0, 4.0, 3.0)]}  # fmt: skip
    seconds = scenario.answer("s")
    table = scenario.Table([scenario.Column("ms", seconds, 1e3), scenario.ratio(seconds, "b"),
                            scenario.ratio(seconds, "absent")], facts=["cache"])  # fmt: skip
    table.add(runs, cache="cold")
    first, second = table.rows
    assert (first["/ b"]["median"], first["/ b"]["spread"]) == (1.0, 0.625)
    assert first["ms"]["median"] == 4000.0
    assert second["/ b"]["median"] == 1.0
    assert first["/ absent"] is None
    assert [one["s"] for one in first["runs"]] == [1.0, 4.0, 9.0]
    assert table.render().splitlines()[2].split()[:2] == ["cold", "a"]
