"""Parts that ranks of a machine exchange on the host go through memory that they have in common.

And by gloo where that cannot be had, whichever rank it is that cannot.
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
LEADER = ("no call", "no pages", "no room", "a namesake")
OTHERS = ("out of reach", "no map")
TROUBLE = [*((what, [0]) for what in LEADER), *((what, [2]) for what in OTHERS)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two files of 6 MB, with a scalar, an empty tensor, and lengths that 4 does not divide."""
    folder = tmp_path_factory.mktemp("commons")
    found = []
    for number in range(2):
        path = folder / f"part-{number}.safetensors"
        tensors = [(f"{number}.w{k}", "BF16", (512 + k, 602)) for k in range(9)]
        tensors += [(f"{number}.F32.", "F32", ()), (f"{number}.none", "F32", (0, 4))]
        sharded.write_file(path, tensors, pad=number)
        found.append(str(path))
    return found


def _case(files: list[str], name: str, form: str = "columns", **arguments: Any) -> Case:
    return Case("cases_commons.load", {"files": files, "form": form, **arguments}, name=name)


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
        Case("cases_commons.tensor_by_tensor", {"files": files, "io": "direct"}, name="one by one"),
        Case("cases_commons.no_memory", {"files": files, "bad": 1}, name="no memory"),
    ]
    return nursery.run(cases, WORLD)


def _assert_all(values: Sequence[dict[str, Any]], **expected: Any) -> None:
    for one in values:
        assert {name: one[name] for name in expected} == expected, values


@pytest.mark.parametrize("form", ["columns", "whole", "alternating", "windows", "each its own"])
@pytest.mark.parametrize("way", WAYS)
def test_in_common(alone, way, form) -> None:
    _assert_all(alone.values(f"{way}: {form}"), **{"in common": 2, "by gloo": 0}, **NOTHING)


@pytest.mark.parametrize("way", WAYS)
def test_rows_and_a_scalar(alone, way) -> None:
    values = alone.values(f"{way}: rows")
    # The scalar is everybody's.
    _assert_all(values, **{"in common": 2, "by gloo": 0}, **NOTHING)


@pytest.mark.parametrize("slow", [[0], [3], [1, 2]], ids=str)
def test_who_is_late_finds_what_was_read(alone, slow) -> None:
    """The case itself compares every byte."""
    _assert_all(alone.values(f"slow {slow}"), **{"in common": 2, "by gloo": 0}, **NOTHING)


@pytest.mark.parametrize(("what", "where"), TROUBLE, ids=str)
def test_without_memory_in_common(alone, what, where) -> None:
    values = alone.values(f"{what} {where}")
    _assert_all(values, **{"in common": 0}, **NOTHING)
    assert all(one["by gloo"] > 0 for one in values)


def test_tensors_taken_one_by_one(alone) -> None:
    values = alone.values("one by one")
    _assert_all(values, **{"in common": 18, "by gloo": 0}, **NOTHING)
    assert len(values[0]["made"]) <= 2, values
    assert [one["made"] for one in values[1:]] == [[], [], []]


def test_no_memory_at_all(alone) -> None:
    for error in alone.values("no memory"):
        assert error["error"]["type"] == "RankError"
        assert error["error"]["rank"] == 1
        assert "none left" in error["error"]["text"]


def test_nodes_have_their_own(nursery, files) -> None:
    """And one that has none exchanges by gloo, beside one that has."""
    both = [_case(files, form, form, **WAYS["small"]) for form in ("columns", "whole")]
    one = _case(files, "one", where=[2], what="no call", **WAYS["small"])
    job = _case(files, "job", "columns", read_once="job", **WAYS["small"])
    ran = nursery.run([*both, one, job], WORLD, environments=NODES)
    for case in both:
        _assert_all(ran.values(case), **{"in common": 2, "by gloo": 0}, **NOTHING)
    values = ran.values(one)
    _assert_all(values[:2], **{"in common": 2, "by gloo": 0})
    _assert_all(values[2:], **{"in common": 0})
    assert all(one["by gloo"] > 0 for one in values[2:])
    values = ran.values(job)
    _assert_all(values, **{"in common": 0})
    assert all(one["by gloo"] > 0 for one in values)
    ran.assert_ended()


# ---------------------------------------------------------------- errors on the way


STRUCK = [(where, by_name) for where in ("preparing", "joining") for by_name in (False, True)]
FAILS = {"unmapped": "MemoryError: no map", "unread": "no such sector"}


@pytest.fixture(scope="module")
def failing(nursery, files) -> Ran:
    cases = [
        Case("cases_commons.struck", {"files": files, "bad": 1, "where": where, "by_name": name},
             name=f"{where} {name}")
        for where, name in STRUCK
    ]  # fmt: skip
    cases += [
        Case(f"cases_commons.{name}", {"files": files, "bad": 2}, name=name)
        for name in (*FAILS, "retried")
    ]
    return nursery.run(cases, 4)


@pytest.mark.parametrize(("where", "by_name"), STRUCK, ids=str)
def test_an_interrupt_is_told_once(failing, where, by_name) -> None:
    """And is an interrupt still, in the rank that it struck."""
    values = failing.values(f"{where} {by_name}")
    for rank, one in enumerate(values):
        assert one["error"]["type"] == ("KeyboardInterrupt" if rank == 1 else "RankError"), one
        assert one["seconds"] < 10
    assert {one["error"]["rank"] for one in values} == {None, 1}
    _assert_all(values, **NOTHING)


@pytest.mark.parametrize("what", FAILS)
def test_what_failed_is_told(failing, what) -> None:
    for one in failing.values(what):
        assert one["error"]["type"] == "RankError"
        assert one["error"]["rank"] == 2
        assert FAILS[what] in one["error"]["text"]
        assert one["seconds"] < 10


def test_nothing_adds_up(failing) -> None:
    for held in failing.values("retried"):
        assert held == [NOTHING] * 4


def test_all_ended(alone, failing) -> None:
    alone.assert_ended()
    failing.assert_ended()
