"""Host memory to a device through the engine: `engine.upload` over the fake driver."""

from __future__ import annotations

import gc
import weakref
from array import array
from typing import Any

import pytest
import torch

from fastst_patch import engine
from fastst_patch.errors import Fallback, FaststError
from fastst_patch.layout import ARENA_ALIGNMENT

pytestmark = pytest.mark.skipif(
    engine.native_error() is not None, reason=str(engine.native_error())
)

CHUNK = 64 << 10


def _sources(seed: int = 1) -> list[torch.Tensor]:
    """Odd and even sizes, scattered in memory, with a view inside a storage and an empty tensor."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(count: int) -> torch.Tensor:
        return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)

    made = [numbers(n) for n in (1, 255, 256, 257, 70_001, 300_000, 3, 0, 65_536)]
    return [*made, made[5][1_000:2_000].clone(), numbers(9_000)[17:5_000]]


def _plan(sources: list[torch.Tensor]) -> tuple[array[int], list[int], int]:
    """Segments by address, each source's place in the arena, and the arena's size."""
    segments, places, at = array("Q"), [0] * len(sources), 0
    for k in sorted(range(len(sources)), key=lambda k: sources[k].data_ptr()):
        places[k] = at
        segments.extend((sources[k].data_ptr(), sources[k].nbytes, at))
        at += -(-sources[k].nbytes // ARENA_ALIGNMENT) * ARENA_ALIGNMENT
    return segments, places, at


def _start(cuda: Any, sources: list[torch.Tensor], **changed: Any) -> tuple[Any, Any, list[int]]:
    segments, places, nbytes = _plan(sources)
    arena = cuda.arena(nbytes, 0)
    to = engine.Destination(cuda.native(0), cuda.stream(0), 1 << 20)
    options = {"threads": 3, "chunk_bytes": CHUNK, "to": to, "keep": sources} | changed
    return engine.upload(arena, segments, **options), arena, places


def _bytes_of(arena: engine.Arena) -> torch.Tensor:
    """What a kernel would see now: the fake's device memory is the host's."""
    from fastst_patch import tensors

    return torch.empty(0, dtype=torch.uint8).set_(tensors.whole_storage(arena))


def _assert_right(arena: engine.Arena, sources: list[torch.Tensor], places: list[int]) -> None:
    found = _bytes_of(arena)
    for source, place in zip(sources, places, strict=True):
        assert torch.equal(found[place : place + source.nbytes], source)


@pytest.mark.parametrize("mode", [0, 1])
def test_bytes_arrive_in_few_copies(cuda, mode) -> None:
    cuda.driver.lib.fake_mode(mode, 5)
    sources = _sources()
    total = sum(source.nbytes for source in sources)
    before = engine.counters()
    job, arena, places = _start(cuda, sources)
    stats = job.wait()
    _assert_right(arena, sources, places)
    after = engine.counters()
    assert (stats.bytes_done, stats.bytes_total, stats.done) == (total, total, True)
    for name in ("bytes_uploaded", "bytes_copied"):
        assert after[name] - before[name] == total
    assert after["bytes_buffered"] == before["bytes_buffered"]
    # One a chunk, not one a tensor; a chunk ends at a page of a source that goes on behind it.
    assert cuda.driver.calls("cuMemcpyHtoDAsync_v2") <= total // (CHUNK - 4096) + 2
    assert cuda.driver.lib.fake_pageable_copies() == 0


def test_waiting_for_a_part(cuda) -> None:
    sources = _sources()
    job, arena, places = _start(cuda, sources, threads=1)
    found = _bytes_of(arena)
    for k in sorted(range(len(sources)), key=lambda k: sources[k].data_ptr()):
        job.wait_until(sources[k].data_ptr() + sources[k].nbytes)
        assert torch.equal(found[places[k] : places[k] + sources[k].nbytes], sources[k])
    job.wait()


def test_sources_live_as_long_as_the_job(cuda, nothing_left) -> None:
    sources = _sources()
    expected = [source.clone() for source in sources]
    alive = [weakref.ref(source) for source in sources]
    job, arena, places = _start(cuda, sources)
    del sources
    gc.collect()
    assert all(reference() is not None for reference in alive)
    job.wait()
    _assert_right(arena, expected, places)
    del job
    gc.collect()
    assert all(reference() is None for reference in alive)
    del arena


@pytest.mark.parametrize("how", ["interrupt", "release", "collect"])
def test_what_is_given_up_is_over(cuda, nothing_left, how) -> None:
    """The arena may be freed then: the fake reports a copy that is pending, or comes later."""
    job, arena, _ = _start(cuda, [torch.ones(3_000_000, dtype=torch.uint8)], threads=1)
    if how == "interrupt":

        def interrupt(_: engine.JobStats) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            job.wait(interrupt)
    elif how == "release":
        job.release()
    del job, arena
    gc.collect()
    engine.shutdown()
    assert cuda.driver.live().blocks == 0
    assert cuda.driver.violations() == []


@pytest.mark.parametrize("name", ["cuMemcpyHtoDAsync_v2", "cuEventRecord", "cuEventSynchronize"])
@pytest.mark.parametrize("first", [1, 3])
def test_a_driver_that_fails_is_a_fallback(cuda, nothing_left, name, first) -> None:
    cuda.driver.fail(name, first, 1 << 40)
    with pytest.raises(Fallback, match="719"):
        _start(cuda, _sources())[0].wait()
    gc.collect()
    assert cuda.driver.live().blocks == 0


def test_no_memory_for_slots(cuda, nothing_left) -> None:
    engine.shutdown()
    engine.set_fault("mmap", first=1, errno=12)
    with pytest.raises(MemoryError):
        _start(cuda, _sources())[0].wait()


def test_segments_out_of_order(cuda, nothing_left) -> None:
    source = torch.ones(100, dtype=torch.uint8)
    arena = cuda.arena(256, 0)
    at = source.data_ptr()
    to = engine.Destination(cuda.native(0), cuda.stream(0), 1 << 20)
    for wrong in ((at, 8, 0, at + 7, 8, 8), (at, 8, 250)):
        with pytest.raises(FaststError, match="host memory: a segment is out of range"):
            engine.upload(
                arena, array("Q", wrong), threads=1, chunk_bytes=CHUNK, to=to, keep=source
            )
