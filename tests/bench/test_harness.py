"""The harness of benchmarks/: turns, bytes compared, caches proven, the setting put back."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
from places import BENCHMARKS

from fastst_patch import engine
from fastst_patch.bench.failures import BenchError


@pytest.fixture
def harness(monkeypatch):
    if engine.native_error() is not None or not BENCHMARKS.is_dir():
        pytest.skip("no native extension, or no benchmarks beside these tests")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("_harness")


def test_each_round_begins_with_another(harness) -> None:
    rounds = ["".join(harness.order(("a", "b", "c"), number)) for number in range(4)]
    assert rounds == ["abc", "bca", "cab", "abc"]


def test_no_round_begins_that_would_end_too_late(harness) -> None:
    assert harness.race(["a"], 3, str, seconds=0) == {"a": ["a"]}


def test_answers_are_kept_by_name_and_round(harness) -> None:
    answers = iter(range(6))
    found = harness.race(["a", "b"], 3, lambda _: next(answers))
    assert found == {"a": [0, 3, 4], "b": [1, 2, 5]}


def test_other_tensors_end_the_race(harness) -> None:
    def run(name: str) -> dict[str, int]:
        return {"digest": 2 if name == "b" else 1}

    assert harness.race(["a"], 2, run, lambda one: one["digest"])
    with pytest.raises(BenchError, match="the b run gave tensors that differ"):
        harness.race(["a", "b"], 1, run, lambda one: one["digest"])


@pytest.mark.parametrize("inside", [[0.0], [0.9, 0.0], [None]])
def test_run_in_another_state_is_repeated(harness, monkeypatch, inside) -> None:
    state = SimpleNamespace(verified=True, fraction=0.0)
    monkeypatch.setattr(harness, "Gate", lambda *_: SimpleNamespace(state=state))
    seen = iter(inside)
    answer, gate = harness.proven("cold", ["x"], None, lambda gate: next(seen), lambda one: one)
    assert answer == inside[-1]
    assert gate.state is state


def test_state_that_never_comes_is_no_result(harness, monkeypatch) -> None:
    state = SimpleNamespace(verified=False, fraction=0.25)
    monkeypatch.setattr(harness, "Gate", lambda *_: SimpleNamespace(state=state))
    runs: list[object] = []
    with pytest.raises(BenchError, match=r"25.0% and then 90.0% cached"):
        harness.proven("cold", ["x"], None, runs.append, lambda _: 0.9)
    assert len(runs) == harness.TRIES


def test_numbers_are_medians_of_the_rounds_own_ratios(harness) -> None:
    assert harness.ratio([1.0, 4.0, 9.0], [2.0, 4.0, 3.0], "r") == {"r": 1.0, "r_spread": 0.625}
    assert harness.shown([2.0, 2.0], 1e3) == "2000 ±0"
    assert harness.shown_ratio([1.0], [4.0]) == "0.25"
