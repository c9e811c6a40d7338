"""Ranks of a machine exchange parts on the host through shared memory.

They exchange by gloo where any of them cannot have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import sharded
from ranks import Case, Ran

from fastst_patch import engine

pytestmark = pytest.mark.skipif(
    engine.native_error() is not None, reason=str(engine.native_error())
)

WORLD = 4
NODES = [{"FASTST_NODE_ID": name} for name in ("a", "a", "b", "b")]
WAYS: dict[str, dict[str, Any]] = {
    "direct": {"io": "direct"},
    "buffered": {"io": "buffered"},
    "owned": {"tensors": "owned"},
    # Units of 128 KiB: more of them than there are buffers.
    "small": {"io": "direct", "device_memory_budget": 1 << 20},
}
NOTHING = {"maps": 0, "descriptors": 0}
LEADER = ("no call", "no pages", "no room", "wrong token")
OTHERS = ("out of reach", "no map")
TROUBLE = [*((what, [0]) for what in LEADER), *((what, [2]) for what in OTHERS)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two files of 6 MB, with a scalar, an empty tensor, and lengths that 4 does not divide."""
    folder = tmp_path_factory.mktemp("shared")
    found = []
    for number in range(2):
        path = folder / f"part-{number}.safetensors"
        tensors = [(f"{number}.w{k}", "BF16", (512 + k, 602)) for k in range(9)]
        tensors += [(f"{number}.F32.", "F32", ()), (f"{number}.none", "F32", (0, 4))]
        sharded.write_file(path, tensors, pad=number)
        found.append(str(path))
    return found


def _case(files: list[str], name: str, form: str = "columns", **arguments: Any) -> Case:
    return Case("cases_shared_buffer.load", {"files": files, "form": form, **arguments}, name=name)


@pytest.fixture(scope="module")
def alone(nursery, files) -> Ran:
    """Ranks of one machine."""
    cases = [
        _case(files, f"{label}: {form}", form, **way)
        for label, way in WAYS.items()
        for form in ("columns", "whole", "alternating", "windows", "each its own", "rows")
    ]
    cases += [
        _case(files, f"slow {slow}", "alternating", slow=slow, **WAYS["small"])
        for slow in ([0], [3], [1, 2])
    ]
    cases += [
        _case(files, f"{what} {where}", where=where, what=what, **WAYS["direct"])
        for what, where in TROUBLE
    ]
    cases += [
        Case(
            "cases_shared_buffer.tensor_by_tensor",
            {"files": files, "io": "direct"},
            name="one by one",
        ),
        Case("cases_shared_buffer.no_memory", {"files": files, "bad": 1}, name="no memory"),
    ]
    return nursery.run(cases, WORLD)


def _assert_all(values: Sequence[dict[str, Any]], **expected: Any) -> None:
    for one in values:
        assert {name: one[name] for name in expected} == expected, values


@pytest.mark.parametrize("form", ["columns", "whole", "alternating", "windows", "each its own"])
@pytest.mark.parametrize("way", WAYS)
def test_shared(alone, way, form) -> None:
    _assert_all(alone.values(f"{way}: {form}"), **{"shared": 2, "by gloo": 0}, **NOTHING)


@pytest.mark.parametrize("way", WAYS)
def test_rows_and_a_scalar(alone, way) -> None:
    values = alone.values(f"{way}: rows")
    # All ranks take the scalar.
    _assert_all(values, **{"shared": 2, "by gloo": 0}, **NOTHING)


@pytest.mark.parametrize("slow", [[0], [3], [1, 2]], ids=str)
def test_late_copies_find_their_units(alone, slow) -> None:
    """The case compares every byte."""
    _assert_all(alone.values(f"slow {slow}"), **{"shared": 2, "by gloo": 0}, **NOTHING)


@pytest.mark.parametrize(("what", "where"), TROUBLE, ids=str)
def test_without_shared_memory(alone, what, where) -> None:
    values = alone.values(f"{what} {where}")
    _assert_all(values, **{"shared": 0}, **NOTHING)
    assert all(one["by gloo"] > 0 for one in values)


def test_tensors_taken_one_by_one(alone) -> None:
    values = alone.values("one by one")
    _assert_all(values, **{"shared": 18, "by gloo": 0}, **NOTHING)
    assert len(values[0]["made"]) <= 2, values
    assert [one["made"] for one in values[1:]] == [[], [], []]


def test_no_memory_at_all(alone) -> None:
    for error in alone.values("no memory"):
        assert error["error"]["type"] == "RankError"
        assert error["error"]["rank"] == 1
        assert "none left" in error["error"]["text"]


def test_nodes_have_their_own(nursery, files) -> None:
    """Each node shares memory of its own; a node that has none exchanges by gloo."""
    both = [_case(files, form, form, **WAYS["small"]) for form in ("columns", "whole")]
    one = _case(files, "one", where=[2], what="no call", **WAYS["small"])
    job = _case(files, "job", "columns", read_once="job", **WAYS["small"])
    ran = nursery.run([*both, one, job], WORLD, environments=NODES)
    for case in both:
        _assert_all(ran.values(case), **{"shared": 2, "by gloo": 0}, **NOTHING)
    values = ran.values(one)
    _assert_all(values[:2], **{"shared": 2, "by gloo": 0})
    _assert_all(values[2:], **{"shared": 0})
    assert all(one["by gloo"] > 0 for one in values[2:])
    values = ran.values(job)
    _assert_all(values, **{"shared": 0})
    assert all(one["by gloo"] > 0 for one in values)
    ran.assert_ended()


# ---------------------------------------------------------------- errors


STRUCK = [(where, by_name) for where in ("preparing", "mapping") for by_name in (False, True)]
FAILS = {"unmapped": "MemoryError: no map", "unread": "no such sector"}


@pytest.fixture(scope="module")
def failing(nursery, files) -> Ran:
    cases = [
        Case("cases_shared_buffer.struck",
             {"files": files, "bad": 1, "where": where, "by_name": name}, name=f"{where} {name}")
        for where, name in STRUCK
    ]  # fmt: skip
    cases += [
        Case(f"cases_shared_buffer.{name}", {"files": files, "bad": 2}, name=name)
        for name in (*FAILS, "retried")
    ]
    return nursery.run(cases, 4)


@pytest.mark.parametrize(("where", "by_name"), STRUCK, ids=str)
def test_an_interrupt_is_raised_once(failing, where, by_name) -> None:
    """In the interrupted rank it stays an interrupt."""
    values = failing.values(f"{where} {by_name}")
    for rank, one in enumerate(values):
        assert one["error"]["type"] == ("KeyboardInterrupt" if rank == 1 else "RankError"), one
        assert one["seconds"] < 10
    assert {one["error"]["rank"] for one in values} == {None, 1}
    _assert_all(values, **NOTHING)


@pytest.mark.parametrize("what", FAILS)
def test_all_ranks_raise(failing, what) -> None:
    for one in failing.values(what):
        assert one["error"]["type"] == "RankError"
        assert one["error"]["rank"] == 2
        assert FAILS[what] in one["error"]["text"]
        assert one["seconds"] < 10


def test_nothing_accumulates(failing) -> None:
    for held in failing.values("retried"):
        assert held == [NOTHING] * 4


def test_all_ended(alone, failing) -> None:
    alone.assert_ended()
    failing.assert_ended()
