"""Cases of ranks: bytes that a load reads, moves and holds."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from typing import Any

import torch
from cases_forms import FORMS, Me, left_out, way_of
from sharded import Full, Outline, assert_tensors, data_offsets, load_sharded

from fastst_patch import engine
from fastst_patch.bench import residency


def _io() -> dict[str, int]:
    """The kernel's counts of this process: rchar by system calls, read_bytes from storage."""
    with open("/proc/self/io", encoding="ascii") as file:
        return {line.split(":")[0]: int(line.split(":")[1]) for line in file}


def _evicted(rank: Any, files: list[str]) -> bool:
    """Evict the files from the page cache; False where the file system keeps them."""
    cold = True
    if rank.rank == 0:
        cold = residency.prepare("cold", files).verified is not False
    return all(rank.everyone(cold))


def moved(rank: Any, files: list[str], form: str, cold: bool, **way: Any) -> dict[str, Any]:
    """Counts of a load, every byte of which is touched.

    Returns:
        ``cold``: whether the files could be evicted; ``read``: bytes from storage; for the form
        "left out", ``read_ahead``: of these, before any tensor was touched, and ``cached``: the
        fraction of the tensors not left out that was in the page cache by then; ``bytes_*``: of
        the engine; ``result``: bytes handed out; ``peak``: most device memory; ``ordinals``: of
        the devices used.
    """
    # Mapped files cannot be evicted, so stock must not load them yet.
    me = Me(rank.rank, rank.world)
    plan, _ = FORMS[form](Outline(files), me)
    with way_of(rank, way) as options:
        seen: dict[str, Any] = {"peak": 0, "ordinals": set()}
        if rank.runtime is not None:
            # The first load to a device is read back and compared, and its file read again.
            load_sharded(files, None, plan, **options)
            engine.shutdown()
            _watch(rank.runtime, seen)
        rank.meet()  # no rank reads or maps the files any more
        evicted = _evicted(rank, files) if cold else False
        if not cold and rank.rank == 0:
            for file in files:
                residency.warm(file)
        rank.meet()
        before, engine_before = _io(), engine.counters()
        result = load_sharded(files, None, plan, **options)
        ahead: dict[str, Any] = {}
        if form == "left out":
            engine.shutdown()  # waits for the reads of this rank
            rank.meet()
            read = _io()["read_bytes"] - before["read_bytes"]
            ahead = {"read_ahead": read, "cached": _cached(files) if cold else None}
            rank.meet()
        _touch(result)
        engine_after, after = engine.counters(), _io()
        rank.meet()
        full = Full(files)
        nbytes = assert_tensors(result, full, FORMS[form](full, me).expect)
        del result, full
        gc.collect()
        engine.shutdown()
        left = rank.runtime.driver.live().blocks if rank.runtime is not None else 0
    return {
        "cold": evicted,
        "read": after["read_bytes"] - before["read_bytes"],
        "rchar": after["rchar"] - before["rchar"],
        **{n: engine_after[n] - engine_before[n] for n in engine_after if n.startswith("bytes_")},
        **ahead,
        "result": nbytes,
        "peak": seen["peak"],
        "ordinals": sorted(seen["ordinals"]),
        "left": left,
    }


def _cached(files: list[str]) -> float | None:
    """Fraction of the tensors not left out that is in the page cache; None if it is unknown."""
    found = wanted = 0
    for path in files:
        opened = engine.open_file(path)
        start = opened.size - max(end for _, end in data_offsets(path).values())
        for name, (begin, end) in data_offsets(path).items():
            if not left_out(name):
                resident, probe = opened.residency(start + begin, end - begin)
                if probe == "none":
                    return None
                found += resident
                wanted += end - begin
    return found / wanted


def _touch(tensors: dict[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        engine.touch(tensor.data_ptr(), tensor.nbytes)


def _watch(runtime: Any, seen: dict[str, Any]) -> None:
    """Record the most device memory in use, whenever a block is allocated."""
    allocate = runtime._block

    def watched(nbytes: int, ordinal: int) -> int:
        block = allocate(nbytes, ordinal)
        seen["peak"] = max(seen["peak"], int(runtime.driver.live().block_bytes))
        seen["ordinals"].add(ordinal)
        return block

    runtime._block = watched


def current_device(rank: Any, files: list[str], device: str, current: int) -> dict[str, Any]:
    """A load goes to the current device, whatever the rank's number."""
    with rank.fake_cuda(devices=4) as runtime:
        before = runtime.driver.live().contexts
        seen: dict[str, Any] = {"peak": 0, "ordinals": set()}
        _watch(runtime, seen)
        runtime.current = lambda: current
        result = load_sharded(files, None, {}, device=device)
        full = Full(files)
        assert_tensors(result, full, lambda _, t: t)
        opened = runtime.driver.live().contexts - before
        return {"ordinals": sorted(seen["ordinals"]), "contexts": opened}


def default_device(rank: Any, files: list[str]) -> list[str]:
    """Over gloo, a load goes to the CPU by default."""
    with rank.fake_cuda() as runtime:
        result = load_sharded(files)
        assert runtime.driver.live().blocks == 0
        return sorted({str(tensor.device) for tensor in result.values()})


def zero_copy(rank: Any, files: list[str], form: str) -> bool:
    """Whole tensors and rows are pages of the file: nothing is allocated or copied."""
    full = Full(files)
    plan, expect = FORMS[form](full, Me(rank.rank, rank.world))
    before = engine.counters()
    result = load_sharded(files, None, plan)
    after = engine.counters()
    copied = {n: after[n] - before[n] for n in ("bytes_buffered", "bytes_direct", "arena_bytes")}
    assert set(copied.values()) == {0}, copied
    spans = _maps_of(files)
    for name, tensor in result.items():
        if tensor.nbytes:
            begin = tensor.data_ptr()
            assert any(a <= begin and begin + tensor.nbytes <= b for a, b in spans), name
    assert_tensors(result, full, expect)
    return True


def _maps_of(files: list[str]) -> list[tuple[int, int]]:
    wanted = {os.path.realpath(file) for file in files}
    spans = []
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and fields[5] in wanted:
                begin, end = fields[0].split("-")
                spans.append((int(begin, 16), int(end, 16)))
    return _joined(spans)


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge neighbours: the kernel splits a map where pages were written to."""
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if joined and joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return joined


def casts_on_the_device(rank: Any, files: list[str], **way: Any) -> Mapping[str, int]:
    """The file's own bytes are copied to the device, whatever dtype is requested."""
    with way_of(rank, way) as options:
        before = engine.counters()["bytes_copied"]
        result = load_sharded(files, None, None, dtype=torch.float32, **options)
        copied = engine.counters()["bytes_copied"] - before
        return {"copied": copied, "result": sum(t.nbytes for t in result.values())}
