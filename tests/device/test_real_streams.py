"""Several streams, and graphs, on a real device: what test_streams.py shows over the fake.

Run by ``pytest -m cuda`` where torch sees a GPU, and skipped elsewhere. The current stream is kept
busy by a kernel that only waits, so that what nobody waits for is certain to come too late.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fastst_patch
from fastst_patch import engine

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

MIB = 1 << 20
COUNT = 24
LONG = 500_000_000  # cycles: some 0.3 s
BOTH = pytest.mark.parametrize("tensors", ["auto", "dlpack", "owned"])


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    yield
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.fixture
def counted(tmp_path: Path) -> Path:
    """24 tensors of 4 MiB, in the order of the file; tensor i is full of i."""
    path = tmp_path / "counted.safetensors"
    save_file(
        {f"{i:02}": torch.full((1024, 1024), i, dtype=torch.int32) for i in range(COUNT)}, path
    )
    return path


@BOTH
@pytest.mark.parametrize(
    "index", [(..., slice(None, None, 2)), (slice(None), slice(None, None, 2)), 7], ids=str
)
def test_a_slice_may_be_used_on_any_stream_at_once(counted, tensors, index) -> None:
    side = torch.cuda.Stream()
    with fastst_patch.config_context(tensors=tensors, fallback="error"):
        with fastst_patch.safe_open(counted, "pt", device="cuda") as handle:
            for name in ("00", "01"):  # a group is on its way
                handle.get_tensor(name)
            torch.cuda.synchronize()
            torch.cuda._sleep(LONG)
            piece = handle.get_slice("02")[index]
            with torch.cuda.stream(side):
                wrong = int((piece != 2).sum())
    torch.cuda.synchronize()
    assert wrong == 0
    del side, piece


@BOTH
def test_tensors_read_ahead_under_another_stream(counted, tensors) -> None:
    """What stream b has still to read is not overwritten on a, where its memory comes from."""
    a, b = torch.cuda.Stream(), torch.cuda.Stream()
    with fastst_patch.config_context(tensors=tensors, fallback="error"):
        handle = fastst_patch.safe_open(counted, "pt", device="cuda")
        with torch.cuda.stream(a):
            for name in ("00", "01"):
                handle.get_tensor(name)
        with torch.cuda.stream(b):
            torch.cuda._sleep(LONG)
            wrong = [(handle.get_tensor(f"{i:02}") != i).sum() for i in range(2, COUNT)]
        del handle
        gc.collect()
        with torch.cuda.stream(a):
            sizes = [COUNT * 4 * MIB, 80 * MIB, 12 * MIB, 4 * MIB]
            junk = [torch.full((n,), 77, dtype=torch.uint8, device="cuda") for n in sizes * 16]
    torch.cuda.synchronize()
    assert sum(map(int, wrong)) == 0
    del junk, wrong, a, b


@BOTH
def test_a_graph_is_captured_while_groups_are_in_flight(counted, tensors) -> None:
    """In torch's default mode, in which calls of any other thread may void the capture."""
    y = torch.zeros(8, device="cuda")
    warm = torch.cuda.CUDAGraph()
    with torch.cuda.graph(warm):
        y += 1
    del warm
    options = {"tensors": tensors, "threads": 1, "chunk_bytes": 64 << 10, "fallback": "error"}
    moved, total = 0, 0
    with fastst_patch.config_context(**options):
        for _ in range(8):
            engine.shutdown()  # slots are pinned anew
            handle = fastst_patch.safe_open(counted, "pt", device="cuda")
            for name in ("00", "01"):
                handle.get_tensor(name)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                before = engine.counters()["bytes_copied"]
                y += 1
                time.sleep(0.02)
                moved += engine.counters()["bytes_copied"] - before
            graph.replay()
            total += 1
            for i in range(2, COUNT):
                assert bool((handle.get_tensor(f"{i:02}") == i).all())
            del handle, graph
    assert y.tolist() == [total] * 8
    if not moved:
        pytest.skip("the groups had landed before a graph was captured")
    del y
