"""One rank fails: within seconds all raise its number and cause, and then load again together.

Faults are injected into the engine's system calls, the fake driver or a plan of one rank
(cases_faults.py). The group's timeout is a minute, so an error found by the timeout is too late.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sharded
import torch
from ranks import Case, Failure, Outcome, Ran

from fastst_patch import engine

pytestmark = pytest.mark.skipif(
    engine.native_error() is not None, reason=str(engine.native_error())
)

SOON_S = 10.0  # issue 6
SMALL = {"chunk_bytes": 64 << 10, "threads": 2}
# Ways that read into memory. On a map, as with stock, a bad read is SIGBUS.
WAYS: dict[str, dict[str, Any]] = {
    "buffered": {"io": "buffered", **SMALL},
    "direct": {"io": "direct", **SMALL},
    "owned": {"tensors": "owned", **SMALL},
    "cuda": {"device": "cuda", **SMALL},
    "cuda-direct": {"device": "cuda", "io": "direct", **SMALL},
}
FORMS = ("rows", "last", "whole")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two files of 3 MB each, small, but with several chunks for each rank to read."""
    folder = tmp_path_factory.mktemp("files")
    found = []
    for number in range(2):
        path = folder / f"part-{number}.safetensors"
        tensors = [(f"{number}.w{k}", "BF16", (512 + k, 301)) for k in range(9)]
        if number == 0:
            tensors += [("F32.7x4", "F32", (7, 4)), ("F32.", "F32", ())]
        sharded.write_file(path, tensors, pad=number)
        found.append(str(path))
    return found


def raised(outcomes: Sequence[Outcome | dict[str, Any]]) -> list[tuple[Failure, float]]:
    """Errors and seconds of outcomes; a case may also return an outcome as its value."""
    found = []
    for rank, one in enumerate(outcomes):
        outcome = one if isinstance(one, dict) else vars(one)
        error = outcome["error"]
        assert error is not None, f"rank {rank} raised nothing"
        failure = error if isinstance(error, Failure) else Failure(**error)
        found.append((failure, outcome["seconds"]))
    return found


def assert_all_raise(
    outcomes: Sequence[Any], bad: int, kind: str, cause: str, soon: float = SOON_S
) -> list[Failure]:
    """All ranks raise a RankError that names the rank and the cause, within seconds.

    Args:
        outcomes: of all ranks.
        bad: the rank that failed.
        kind: type of its exception.
        cause: text that the errors must contain.
        soon: limit in seconds.
    """
    errors = raised(outcomes)
    for rank, (error, seconds) in enumerate(errors):
        assert error.type == "RankError", error.trace
        assert error.is_a("FaststError")
        assert error.rank == bad, error.text
        assert error.cause is not None
        assert cause in error.cause, error.text
        assert cause in error.text
        assert f"rank {bad}" in error.text
        assert seconds < soon, (rank, seconds)
    at_fault = errors[bad][0]
    assert kind in at_fault.cause_bases, at_fault.trace
    return [error for error, _ in errors]


# ---------------------------------------------------------------- storage

READS = [(2, way, form, first) for way in WAYS for form in FORMS for first in (1, 9)]
READS += [(4, way, form, 3) for way in ("direct", "cuda") for form in FORMS]


@pytest.fixture(scope="module")
def unreadable(nursery, files) -> dict[int, Ran]:
    ran = {}
    for world in (2, 4):
        cases = [
            Case("cases_faults.unreadable",
                 {"files": files, "form": form, "bad": world - 1, "first": first, **WAYS[way]},
                 name=f"{way} {form} {first}")
            for ranks, way, form, first in READS if ranks == world
        ]  # fmt: skip
        cases += [
            Case("cases_faults.unreadable_header",
                 {"files": files, "bad": bad, **WAYS.get(way, {})}, name=f"header {way} {bad}")
            for way in ("default", "direct", "cuda") for bad in (0, 1)
        ]  # fmt: skip
        ran[world] = nursery.run(cases, world)
    return ran


@pytest.mark.parametrize(("world", "way", "form", "first"), READS)
def test_bad_reads(unreadable, world, way, form, first) -> None:
    values = unreadable[world].values(f"{way} {form} {first}")
    assert_all_raise(values, world - 1, "OSError", "Input/output error")
    error = raised(values)[world - 1][0]
    assert error.cause_errno == errno.EIO
    assert "part-" in error.text
    assert {one.get("blocks", 0) for one in values} == {0}
    assert all(one.get("pending", []) == [] for one in values)


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("way", ["default", "direct", "cuda"])
@pytest.mark.parametrize("world", [2, 4])
def test_bad_headers(unreadable, world, way, bad) -> None:
    """They are found before any rank reads data, as the case asserts."""
    errors = assert_all_raise(
        unreadable[world].values(f"header {way} {bad}"), bad, "OSError", "Input/output error"
    )
    assert errors[bad].cause_errno == errno.EIO


# ---------------------------------------------------------------- device


@pytest.fixture(scope="module")
def device(nursery, files) -> Ran:
    cases = [
        Case("cases_faults.no_memory", {"files": files, "form": form, "bad": 1, "first": first},
             name=f"memory {form} {first}")
        for form in FORMS for first in (1, 2)
    ]  # fmt: skip
    return nursery.run(cases, 2)


@pytest.mark.parametrize("form", FORMS)
def test_out_of_device_memory(device, form) -> None:
    values = device.values(f"memory {form} 1")
    assert_all_raise(values, 1, torch.cuda.OutOfMemoryError.__name__, "out of memory")
    assert [one["blocks"] for one in values] == [0, 0]


@pytest.mark.parametrize("form", FORMS)
def test_out_of_device_memory_later(device, form) -> None:
    """At the second block, if there is one: all ranks load, or none does."""
    values = device.values(f"memory {form} 2")
    if any(one["error"] for one in values):
        assert_all_raise(values, 1, torch.cuda.OutOfMemoryError.__name__, "out of memory")
        assert [one["blocks"] for one in values] == [0, 0]


# ---------------------------------------------------------------- plans and files

RAISED = ("Planned", "MemoryError", "StopIteration", "KeyboardInterrupt", "SystemExit")
ONE_ALONE = {"name": "nobody", "scalar": "F32."}
OPTION_ALONE = {"option": "io", "read_once": "read_once"}


@pytest.fixture(scope="module")
def disagreed(nursery, files, tmp_path_factory) -> Ran:
    folder = tmp_path_factory.mktemp("others")
    others = {"longer": [(f"0.w{k}", "BF16", (512 + k, 302)) for k in range(9)]}
    # Exactly as long as the first file.
    tensors = [(f"0.w{k}", "BF16", (512 + k, 301)) for k in range(9)]
    tensors += [("F32.7x4", "F32", (4, 7)), ("F32.", "F32", ())]
    others["as long"] = tensors
    for name, wanted in others.items():
        sharded.write_file(folder / name, wanted)
    broken = folder / "broken"
    broken.write_bytes(Path(files[0]).read_bytes()[:-1])
    cases = [
        Case("cases_faults.bad_plan", {"files": files, "bad": 1, "error": error, **way},
             name=f"plan {error} {name}")
        for error in RAISED for name, way in (("default", {}), ("cuda", WAYS["cuda"]))
    ]  # fmt: skip
    cases += [
        Case("cases_faults.wrong_on_one", {"files": files, "bad": 2, "what": what}, name=what)
        for what in ONE_ALONE
    ]
    cases += [
        Case("cases_faults.other_file",
             {"files": files, "other": str(folder / name), "bad": bad, **way},
             name=f"{name} {bad} {label}")
        for name in others for bad in (2, 3)
        for label, way in (("default", {}), ("cuda", WAYS["cuda"]))
    ]  # fmt: skip
    cases += [
        Case("cases_faults.other_names", {"files": files, "bad": 3}, name="names"),
        Case("cases_faults.missing", {"files": files}, name="missing default"),
        Case("cases_faults.missing", {"files": files, **WAYS["cuda"]}, name="missing cuda"),
        Case("cases_faults.damaged", {"file": str(broken)}, name="damaged default"),
        Case("cases_faults.damaged", {"file": str(broken), **WAYS["cuda"]}, name="damaged cuda"),
        Case("cases_faults.picklable", {"files": files}, name="pickle"),
        Case("cases_faults.owner_names", {"files": files}, name="owner names"),
    ]
    return nursery.run(cases, 4)


@pytest.mark.parametrize("way", ["default", "cuda"])
@pytest.mark.parametrize("error", RAISED[:3])
def test_plan_that_raises(disagreed, error, way) -> None:
    assert_all_raise(disagreed.values(f"plan {error} {way}"), 1, error, "no spec for")


@pytest.mark.parametrize("way", ["default", "cuda"])
@pytest.mark.parametrize("error", RAISED[3:])
def test_plan_that_ends_its_program(disagreed, error, way) -> None:
    """That rank raises its own exception; the others raise RankError."""
    errors = raised(disagreed.values(f"plan {error} {way}"))
    assert errors[1][0].is_a(error) or error in errors[1][0].cause_bases, errors[1][0].trace
    for rank in (0, 2, 3):
        failure, seconds = errors[rank]
        assert failure.type == "RankError"
        assert failure.rank == 1
        assert error in (failure.cause or "")
        assert seconds < SOON_S


@pytest.mark.parametrize("what", ONE_ALONE)
def test_argument_of_one_rank(disagreed, what) -> None:
    assert_all_raise(disagreed.values(what), 2, "ValueError", ONE_ALONE[what])


@pytest.mark.parametrize("what", OPTION_ALONE)
def test_option_of_one_rank(nursery, files, what) -> None:
    """It is refused before the ranks communicate; the others must not wait for the timeout."""
    case = Case("cases_faults.wrong_on_one", {"files": files, "bad": 2, "what": what}, name=what)
    ran = nursery.run([case], 4, timeout=20, limit=60)
    assert_all_raise(ran.values(case), 2, "ValueError", OPTION_ALONE[what])


@pytest.mark.parametrize("way", ["default", "cuda"])
@pytest.mark.parametrize("bad", [2, 3])
@pytest.mark.parametrize("other", ["longer", "as long"])
def test_another_file_on_one_rank(disagreed, other, bad, way) -> None:
    """It differs in size, or in its header alone. No rank reads data, as the case asserts."""
    for error, seconds in raised(disagreed.values(f"{other} {bad} {way}")):
        assert error.type == "RankError", error.trace
        assert error.rank == bad, error.text
        assert f"rank {bad}" in error.text
        assert "mine.safetensors" in error.text
        assert seconds < SOON_S


def test_fewer_files_on_one_rank(disagreed) -> None:
    for error, seconds in raised(disagreed.values("names")):
        assert error.type == "RankError", error.trace
        assert error.rank == 3, error.text
        assert seconds < SOON_S


@pytest.mark.parametrize("way", ["default", "cuda"])
def test_a_file_that_no_rank_has(disagreed, way) -> None:
    for error, seconds in raised(disagreed.values(f"missing {way}")):
        assert "FileNotFoundError" in (*error.bases, *error.cause_bases), error.trace
        assert "nowhere.safetensors" in error.text
        assert seconds < SOON_S


@pytest.mark.parametrize("way", ["default", "cuda"])
def test_a_file_that_is_damaged(disagreed, way) -> None:
    """Stock's own exception and text, in each rank or as the cause."""
    for error, seconds in raised(disagreed.values(f"damaged {way}")):
        assert "SafetensorError" in (*error.bases, *error.cause_bases), error.trace
        assert "incomplete metadata, file not fully covered" in error.text
        assert seconds < SOON_S


def test_rank_errors_are_pickled(disagreed) -> None:
    """Launchers send exceptions to their parents."""
    assert disagreed.values("pickle") == [True] * 4


def test_each_rank_names_its_own(disagreed) -> None:
    values = disagreed.values("owner names")
    assert sum(values) == sum(
        spans[-1] for spans in [_ends(disagreed, name) for name in ("part-0", "part-1")]
    )


def _ends(ran: Ran, name: str) -> list[int]:
    found = next(ran.folder.parent.parent.rglob(f"{name}.safetensors"))
    return [end for _, end in sharded.data_offsets(found).values()]


# ---------------------------------------------------------------- files that some ranks see

SEEN = {
    "all but one": [[0, 1, 2], [0, 1, 2, 3]],
    "one alone": [[2], [0, 1, 2, 3]],
    "one file each": [[0, 3], [1]],
    "one has none": [[0, 1, 2], [0, 1, 2]],
}


@pytest.fixture(scope="module")
def partly(nursery, files) -> Ran:
    return nursery.run([
        Case("cases_files.some_see", {"files": files, "seen": seen, "form": form, **way},
             name=f"{name} {form} {label}")
        for name, seen in SEEN.items() for form in (*FORMS, "owners", "each its own")
        for label, way in (("default", {}), ("direct", WAYS["direct"]), ("cuda", WAYS["cuda"]))
    ], 4)  # fmt: skip


@pytest.mark.parametrize("way", ["default", "direct", "cuda"])
@pytest.mark.parametrize("form", [*FORMS, "owners", "each its own"])
@pytest.mark.parametrize("seen", SEEN)
def test_a_file_that_some_see(partly, seen, form, way) -> None:
    """The ranks that see it read it for the others."""
    partly.values(f"{seen} {form} {way}")


# ---------------------------------------------------------------- killed ranks

TIMEOUT_S = 5.0
DEATHS = {
    "plan": ("cases_faults.killed_in_plan", {}),
    "buffered rows": ("cases_faults.killed_reading", {"form": "rows", **WAYS["buffered"]}),
    "direct last": ("cases_faults.killed_reading", {"form": "last", **WAYS["direct"]}),
    "cuda whole": ("cases_faults.killed_reading", {"form": "whole", **WAYS["cuda"]}),
}


@pytest.mark.parametrize("how", DEATHS)
def test_a_killed_rank(nursery, files, how) -> None:
    """The others raise an error within the timeout."""
    call, arguments = DEATHS[how]
    case = Case(call, {"files": files, "bad": 1, **arguments}, name=how)
    ran = nursery.run([case], 4, timeout=TIMEOUT_S, limit=60, meet=False)
    assert ran.ends[1].status == -9
    for rank in (0, 2, 3):
        outcome = ran.outcomes[rank][how].value
        assert outcome["error"] is not None, ran.log()
        assert outcome["seconds"] < TIMEOUT_S + SOON_S
        assert (ran.ends[rank].status, ran.ends[rank].late) == (0, False), ran.log()
        assert not ran.ends[rank].orphans


def test_a_rank_that_hangs(nursery, files) -> None:
    """Its storage does not answer: the others raise within the timeout."""
    arguments = {"files": files, "form": "last", "bad": 1, **WAYS["direct"]}
    case = Case("cases_faults.stuck_reading", arguments, name="stuck")
    ran = nursery.run([case], 4, timeout=TIMEOUT_S, limit=40, meet=False, doomed=[1])
    assert ran.ends[1].late
    for rank in (0, 2, 3):
        outcome = ran.outcomes[rank]["stuck"].value
        assert outcome["error"] is not None, ran.log()
        assert outcome["seconds"] < TIMEOUT_S + SOON_S
        assert not ran.ends[rank].late, ran.log()


def test_a_rank_that_never_calls(nursery, files) -> None:
    case = Case("cases_faults.absent", {"files": files, "bad": 1}, name="absent")
    ran = nursery.run([case], 2, timeout=TIMEOUT_S, limit=60, meet=False)
    outcome = ran.outcomes[0]["absent"].value
    assert outcome["error"] is not None, ran.log()
    assert outcome["seconds"] < TIMEOUT_S + SOON_S
