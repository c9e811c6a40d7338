"""Bytes that a sharded load reads, moves and holds, counted by the kernel, engine and driver.

The files have 48 MB in tensors of 8 MB, so that other reads (headers, the rest of a huge page) are
few in comparison.
"""

from __future__ import annotations

from typing import Any

import pytest
import sharded
from cases_forms import left_out
from ranks import Case, Ran

from fastst_patch import engine

pytestmark = pytest.mark.skipif(
    engine.native_error() is not None, reason=str(engine.native_error())
)

MIB = 1 << 20
MORE = 1.05  # issue 6: bytes read, as a factor of the bytes needed
WORLD = 4
NODES = [{"FASTST_NODE_ID": name} for name in ("a", "a", "b", "b")]
DIRECT: dict[str, Any] = {"io": "direct", "chunk_bytes": MIB}
CUDA: dict[str, Any] = {"device": "cuda", "chunk_bytes": MIB, "threads": 2}
FORMS = ("rows", "last", "whole", "alternating", "owners")
# Argument, current device, and expected device. Each device once, since its context stays.
CURRENT = [("cuda", 2, 2), ("cuda", 0, 0), ("cuda:1", 3, 1)]


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two files of three tensors each."""
    folder = tmp_path_factory.mktemp("big")
    found = []
    for number in range(2):
        path = folder / f"big-{number}.safetensors"
        sharded.write_file(path, [(f"{number}.w{k}", "BF16", (2048, 2048)) for k in range(3)])
        found.append(str(path))
    return found


def _needed(files: list[str], skipped: bool = False) -> int:
    """Bytes of the tensors that any rank takes."""
    return sum(
        end - begin
        for file in files
        for name, (begin, end) in sharded.data_offsets(file).items()
        if not (skipped and left_out(name))
    )


def _case(big: list[str], form: str, label: str, cold: bool = True, **way: Any) -> Case:
    arguments = {"files": big, "form": form, "cold": cold, **way}
    return Case("cases_bytes.moved", arguments, name=f"{label}: {form}")


def _summed(values: list[dict[str, Any]], name: str) -> int:
    return sum(one[name] for one in values)


# ---------------------------------------------------------------- storage

COLD: dict[str, dict[str, Any]] = {
    "default": {},
    "direct": DIRECT,
    "owned": {"tensors": "owned", "chunk_bytes": MIB},
    "cuda": CUDA,
    "cuda-direct": {**CUDA, "io": "direct"},
}


@pytest.fixture(scope="module")
def cold(nursery, big) -> Ran:
    cases = [
        _case(big, form, label, **way)
        for label, way in COLD.items()
        for form in (*FORMS, "left out")
    ]
    return nursery.run(cases, WORLD)


@pytest.mark.parametrize("form", [*FORMS, "left out"])
@pytest.mark.parametrize("way", COLD)
def test_storage_is_read_once(cold, big, way, form) -> None:
    """All ranks of the machine together read each byte once."""
    values = cold.values(f"{way}: {form}")
    if not values[0]["cold"]:
        pytest.skip("this file system keeps cached pages (tmpfs?)")
    read, needed = _summed(values, "read"), _needed(big, skipped=form == "left out")
    if read == 0:
        pytest.skip("this kernel does not count what processes read from storage")
    if way == "default" and form == "left out":
        # Reading ahead brings all that is needed; touching the tensors may add little.
        assert {one["cached"] for one in values} <= {1.0, None}
        assert 0.95 * needed <= _summed(values, "read_ahead") <= MORE * needed
    assert 0.95 * needed <= read <= MORE * needed


LEFT_OUT = ("whole or left out", "left out")
# Chunks have the default size, which fits whole huge pages.
THROUGH_THE_CACHE: dict[str, dict[str, Any]] = {
    "default": {},
    "buffered": {"io": "buffered"},
    "owned": {"tensors": "owned"},
    "cuda": {"device": "cuda", "threads": 2},
}


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A file of 96 MB, every other tensor left out, each of several huge pages."""
    names = [f"w{number}" for number in range(30)]
    kept = [name for name in names if not left_out(name)][:2]
    dropped = [name for name in names if left_out(name)][:2]
    path = tmp_path_factory.mktemp("long") / "long.safetensors"
    sharded.write_file(path, [
        (name, "BF16", (3, 2048, 2048)) for pair in zip(kept, dropped, strict=True) for name in pair
    ])  # fmt: skip
    return [str(path)]


@pytest.fixture(scope="module")
def gaps(nursery, big, long) -> Ran:
    return nursery.run([
        _case(files, form, f"{way} {size}", **options)
        for size, files in (("big", big), ("long", long))
        for way, options in THROUGH_THE_CACHE.items() for form in LEFT_OUT
    ], WORLD)  # fmt: skip


@pytest.mark.parametrize("form", LEFT_OUT)
@pytest.mark.parametrize("way", THROUGH_THE_CACHE)
@pytest.mark.parametrize("size", ["big", "long"])
def test_tensors_left_out_stay_on_the_disk(gaps, big, long, size, way, form) -> None:
    """Although the kernel reads windows around faults, and ahead of marks that reads leave."""
    values = gaps.values(f"{way} {size}: {form}")
    read, needed = _summed(values, "read"), _needed(big if size == "big" else long, skipped=True)
    if not values[0]["cold"] or read == 0:
        pytest.skip("reads from storage are not counted here (tmpfs, or no /proc/self/io)")
    assert 0.95 * needed <= read <= MORE * needed


@pytest.mark.parametrize("form", ["last", "whole", "alternating"])
@pytest.mark.parametrize("way", ["direct", "cuda-direct"])
def test_reading_is_shared(cold, big, way, form) -> None:
    """Ranks read rows that all of them need in equal parts."""
    values = cold.values(f"{way}: {form}")
    share = _needed(big) / WORLD
    for one in values:
        moved = one["bytes_copied"] if way.startswith("cuda") else one["bytes_direct"]
        assert 0.8 * share <= moved <= 1.2 * share, values


@pytest.mark.parametrize("way", ["direct", "owned", "cuda", "cuda-direct"])
def test_rows_are_read_by_their_owners(cold, way) -> None:
    """Nothing is exchanged: each rank reads its own rows, and nothing else."""
    for one in cold.values(f"{way}: rows"):
        if way.startswith("cuda"):
            moved = one["bytes_copied"]
        else:
            moved = one["bytes_direct"] + one["bytes_buffered"]
        assert one["result"] <= moved <= MORE * one["result"]


# ---------------------------------------------------------------- the bus


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", ["cuda", "cuda-direct"])
def test_the_bus_is_crossed_once(cold, big, way, form) -> None:
    """Host-to-device bytes of all ranks together are the file's, for any shards."""
    copied = _summed(cold.values(f"{way}: {form}"), "bytes_copied")
    assert 0.99 * _needed(big) <= copied <= MORE * _needed(big)


@pytest.mark.parametrize("way", ["cuda", "cuda-direct"])
def test_nothing_is_left_on_the_device(cold, way) -> None:
    for form in FORMS:
        assert [one["left"] for one in cold.values(f"{way}: {form}")] == [0] * WORLD


@pytest.fixture(scope="module")
def warm(nursery, big) -> Ran:
    cases = [
        Case("cases_bytes.current_device", {"files": big[:1], "device": device, "current": current},
             name=f"current {device} {current}")
        for device, current, _ in CURRENT
    ]  # fmt: skip
    cases.append(Case("cases_bytes.casts_on_the_device", {"files": big, **CUDA}, name="cast"))
    cases.append(Case("cases_bytes.default_device", {"files": big[:1]}, name="default device"))
    cases += [
        Case("cases_bytes.zero_copy", {"files": big, "form": form}, name=f"zero copy {form}")
        for form in ("whole", "rows", "owners")
    ]
    cases += [
        _case(big, form, f"budget {tensors}", cold=False,
              device_memory_budget=BUDGET, tensors=tensors, **CUDA)
        for form in FORMS for tensors in ("dlpack", "owned")
    ]  # fmt: skip
    return nursery.run(cases, WORLD)


def test_casts_happen_on_the_device(warm, big) -> None:
    values = warm.values("cast")
    assert _summed(values, "copied") <= MORE * _needed(big)
    assert [one["result"] for one in values] == [2 * _needed(big)] * WORLD


@pytest.mark.parametrize(("device", "current", "used"), CURRENT)
def test_the_rank_is_no_device(warm, device, current, used) -> None:
    """All four ranks use the current or the named device, and no other device has a context."""
    for one in warm.values(f"current {device} {current}"):
        assert one == {"ordinals": [used], "contexts": 1}


def test_gloo_means_the_cpu(warm) -> None:
    assert warm.values("default device") == [["cpu"]] * WORLD


@pytest.mark.parametrize("form", ["whole", "rows", "owners"])
def test_zero_copy_from_the_map(warm, form) -> None:
    """To the CPU by default, tensors are the file's own pages."""
    assert warm.values(f"zero copy {form}") == [True] * WORLD


# ---------------------------------------------------------------- memory

BUDGET = 16 * MIB


@pytest.mark.parametrize("tensors", ["dlpack", "owned"])
@pytest.mark.parametrize("form", FORMS)
def test_device_memory_is_bounded(warm, form, tensors) -> None:
    """Memory is at most the tensors handed out, and the budget for everything else."""
    for one in warm.values(f"budget {tensors}: {form}"):
        assert one["result"] <= one["peak"] <= one["result"] + BUDGET + MIB, one


# ---------------------------------------------------------------- several nodes

NODE_WAYS = {"direct": DIRECT, "cuda": CUDA, "cuda-direct": {**CUDA, "io": "direct"}}


@pytest.fixture(scope="module")
def nodes(nursery, big) -> Ran:
    """Two fake nodes of two ranks each."""
    return nursery.run([
        _case(big, form, f"{label} {scope}", read_once=scope, **way)
        for label, way in NODE_WAYS.items() for scope in ("node", "job")
        for form in ("rows", "last", "whole")
    ], WORLD, environments=NODES)  # fmt: skip


def _read(values: list[dict[str, Any]], way: str) -> int:
    return _summed(values, "bytes_copied" if way.startswith("cuda") else "bytes_direct")


@pytest.mark.parametrize("form", ["last", "whole"])
@pytest.mark.parametrize("way", NODE_WAYS)
def test_once_per_node(nodes, big, way, form) -> None:
    values = nodes.values(f"{way} node: {form}")
    for node in (values[:2], values[2:]):
        read, needed = _read(node, way), _needed(big)
        if form == "last":  # two of four ranks need half of each row; whole rows may be read
            needed //= 2
            assert needed <= read <= MORE * _needed(big)
        else:
            assert needed <= read <= MORE * needed


@pytest.mark.parametrize("form", ["last", "whole"])
@pytest.mark.parametrize("way", NODE_WAYS)
def test_once_per_job(nodes, big, way, form) -> None:
    """With read_once="job", each byte is read on one node."""
    values = nodes.values(f"{way} job: {form}")
    assert _needed(big) <= _read(values, way) <= MORE * _needed(big)
    for node in (values[:2], values[2:]):
        assert _read(node, way) >= 0.4 * _needed(big)


@pytest.mark.parametrize("scope", ["node", "job"])
@pytest.mark.parametrize("way", NODE_WAYS)
def test_rows_are_read_once_wherever_they_are(nodes, big, way, scope) -> None:
    values = nodes.values(f"{way} {scope}: rows")
    assert _needed(big) <= _read(values, way) <= MORE * _needed(big)


def test_nodes_that_see_other_files(nursery, big) -> None:
    """With node-local storage, each node reads its file for the other."""
    cases = [
        Case("cases_files.some_see",
             {"files": big, "seen": [[0, 1], [2, 3]], "form": form, "read_once": scope, **way},
             name=f"{form} {scope} {label}")
        for form in ("rows", "last", "whole") for scope in ("node", "job")
        for label, way in (("default", {}), ("cuda", CUDA))
    ]  # fmt: skip
    ran = nursery.run(cases, WORLD, environments=NODES)
    for case in cases:
        ran.values(case)
    ran.assert_ended()


def test_all_ended(cold, warm, nodes) -> None:
    for ran in (cold, warm, nodes):
        ran.assert_ended()
