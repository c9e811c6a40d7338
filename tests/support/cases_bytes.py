"""Cases of ranks: what a load reads, moves and holds."""

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
    """What the kernel counts for this process: rchar by system calls, read_bytes by storage."""
    with open("/proc/self/io", encoding="ascii") as file:
        return {line.split(":")[0]: int(line.split(":")[1]) for line in file}


def _evicted(rank: Any, files: list[str]) -> bool:
    """Nothing of the files is cached; False where this file system keeps it."""
    cold = True
    if rank.rank == 0:
        cold = residency.prepare("cold", files).verified is not False
    return all(rank.everyone(cold))


def moved(rank: Any, files: list[str], form: str, cold: bool, **way: Any) -> dict[str, Any]:
    """A load, every byte of it touched, in figures.

    Returns:
        ``cold``: whether the files could be evicted; ``read``: bytes from storage, and
        ``read_ahead``, ``cached``: those before anything was touched, and how much of the tensors
        that are not left out was in the page cache by then (of that form only);
        ``bytes_*``: of the engine; ``result``: handed out; ``peak``: most device memory;
        ``ordinals``: of the devices that were used.
    """
    # No tensor of stock's may map the files, or they could not be evicted.
    me = Me(rank.rank, rank.world)
    plan, _ = FORMS[form](Outline(files), me)
    with way_of(rank, way) as options:
        seen: dict[str, Any] = {"peak": 0, "ordinals": set()}
        if rank.runtime is not None:
            # The first load to a device is read back and compared, and its file read again.
            load_sharded(files, None, plan, **options)
            engine.shutdown()
            _watch(rank.runtime, seen)
        rank.meet()  # nobody reads or maps them any more
        evicted = _evicted(rank, files) if cold else False
        if not cold and rank.rank == 0:
            for file in files:
                residency.warm(file)
        rank.meet()
        before, engine_before = _io(), engine.counters()
        result = load_sharded(files, None, plan, **options)
        ahead: dict[str, Any] = {}
        if form == "left out":
            engine.shutdown()  # waits for what this rank reads
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
    """How much of the tensors that are not left out is in the page cache; None: nobody can tell."""
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
    """Note the most memory of the device that was in use, whenever some is taken."""
    take = runtime._block

    def watched(nbytes: int, ordinal: int) -> int:
        taken = take(nbytes, ordinal)
        seen["peak"] = max(seen["peak"], int(runtime.driver.live().block_bytes))
        seen["ordinals"].add(ordinal)
        return taken

    runtime._block = watched


def current_device(rank: Any, files: list[str], device: str, current: int) -> dict[str, Any]:
    """Where a load goes: the current device, whatever the rank's number is."""
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
    """Over gloo a load goes to the CPU, whatever devices there are."""
    with rank.fake_cuda() as runtime:
        result = load_sharded(files)
        assert runtime.driver.live().blocks == 0
        return sorted({str(tensor.device) for tensor in result.values()})


def zero_copy(rank: Any, files: list[str], form: str) -> bool:
    """Whole tensors and rows are pages of the file: no memory of our own, no copies."""
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
    """Neighbours as one: the kernel splits a map where pages were written to."""
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if joined and joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return joined


def casts_on_the_device(rank: Any, files: list[str], **way: Any) -> Mapping[str, int]:
    """What crosses the bus is the file's bytes, whatever dtype is asked for."""
    with way_of(rank, way) as options:
        before = engine.counters()["bytes_copied"]
        result = load_sharded(files, None, None, dtype=torch.float32, **options)
        copied = engine.counters()["bytes_copied"] - before
        return {"copied": copied, "result": sum(t.nbytes for t in result.values())}
