"""Loads to a real device, against stock's: what a fake driver cannot prove.

Run by ``pytest -m cuda`` where torch sees a GPU, and skipped elsewhere. Tests that need no
kernels also run over the fake driver, where CPU memory stands for the device's; that proves the
tests rather than the loads.
"""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fastst_patch
from fastst_patch import engine, report
from fastst_patch.dtypes import DTYPE_NAMES

MIB = 1 << 20
CHUNK = 256 << 10
REAL = torch.cuda.is_available()
real = [pytest.mark.cuda, pytest.mark.skipif(not REAL, reason="torch sees no CUDA device")]
on_gpu = pytest.mark.usefixtures("gpu")
BOTH = pytest.mark.parametrize("tensors", ["dlpack", "owned"])
IO = pytest.mark.parametrize("io", ["auto", "buffered", "direct", "gds"])


@dataclass(frozen=True)
class Place:
    """Where tensors go: a GPU, or the fake's idea of one."""

    real: bool
    device: str = "cuda:0"

    @property
    def stock_device(self) -> str:
        return self.device if self.real else "cpu"


@pytest.fixture(params=["fake", pytest.param("real", marks=real)])
def place(request: pytest.FixtureRequest) -> Place:
    if request.param == "fake":
        request.getfixturevalue("cuda")
    return Place(request.param == "real")


@pytest.fixture
def gpu() -> Iterator[None]:
    """Starts and ends with nothing of this test's on the device."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    yield
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    engine.shutdown()
    assert engine.counters()["pinned_bytes"] == 0


def real_only(test: Any) -> Any:
    for mark in (*real, on_gpu):
        test = mark(test)
    return test


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's bytes, on its own device, whatever its dtype."""
    assert tensor.is_contiguous()
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    begin = tensor.storage_offset() * tensor.element_size()
    return flat.set_(tensor.untyped_storage(), begin, (tensor.numel() * tensor.element_size(),))


def assert_equal(place: Place, ours: torch.Tensor, theirs: torch.Tensor, name: str = "") -> None:
    assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
    assert ours.device == torch.device(place.stock_device), name
    assert torch.equal(raw_bytes(ours.contiguous()), raw_bytes(theirs.contiguous())), name


def assert_all_equal(place: Place, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        assert_equal(place, ours[name], tensor, name)
        if place.real:  # storages of their own, exactly as large as stock's
            sizes = [t.untyped_storage().nbytes() for t in (ours[name], tensor)]
            assert sizes[0] == sizes[1], name


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Some 4 MB: tensors larger than CHUNK, tiny ones, a scalar, an empty one."""
    generator = torch.Generator().manual_seed(3)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    tensors = {f"large.{i}": numbers(500_003 + 7 * i) for i in range(4)}
    tensors |= {f"half.{i}": numbers(300, 701).to(torch.bfloat16) for i in range(4)}
    tensors |= {f"tiny.{i}": numbers(1 + i % 9).float() for i in range(120)}
    tensors |= {"scalar": torch.tensor(1 << 40), "empty": torch.empty(0, 4)}
    path = tmp_path / "mixed.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture
def counted(tmp_path: Path) -> Path:
    """64 tensors of 1 MiB; every 32-bit word of a tensor is its number."""
    path = tmp_path / "counted.safetensors"
    words = MIB // 4
    save_file({f"{i:03}": torch.full((words,), i, dtype=torch.int32) for i in range(64)}, path)
    return path


# ---- equal to stock ----


@BOTH
@IO
def test_load_file(place, stock, mixed, tensors, io) -> None:
    options = {"tensors": tensors, "io": io, "fallback": "error", "chunk_bytes": CHUNK}
    with fastst_patch.config_context(**options), report.profile() as seen:
        ours = fastst_patch.load_file(mixed, device=place.device)
    assert_all_equal(place, ours, stock.load_file(mixed, device=place.stock_device))
    (load,) = seen.reports
    assert load.device == place.device
    assert load.path.startswith(("ring", "gds"))


def _bits(dtype: str) -> int:
    return engine.dtype_bits(DTYPE_NAMES.index(dtype))


@BOTH
@pytest.mark.parametrize("dtype", sorted(DTYPE_NAMES))
def test_every_dtype(place, stock, raw, dtype, tensors) -> None:
    entries: dict[str, Any] = {}
    data = b""
    for name, shape in (("a", [4, 6]), ("b", [2, 0]), ("c", [1, 3, 8])):
        count = 1
        for length in shape:
            count *= length
        size = count * _bits(dtype) // 8
        entries[name] = raw.entry(dtype, shape, len(data), len(data) + size)
        data += bytes(i % 2 if dtype == "BOOL" else i * 37 % 251 for i in range(size))
    path = raw.write(raw.pack(entries, data))
    try:
        theirs = stock.load_file(path, device=place.stock_device)
    except Exception as error:
        pytest.skip(f"stock does not load it: {error}")
    with fastst_patch.config_context(tensors=tensors):
        ours = fastst_patch.load_file(path, device=place.device)
    assert_all_equal(place, ours, theirs)


@BOTH
@pytest.mark.parametrize("pad", range(8))
def test_misaligned(place, stock, raw, tensors, pad) -> None:
    entries: dict[str, Any] = {}
    data = b""
    for i in range(40):
        dtype, shape = [("U8", [1 + i]), ("F32", [5, i]), ("BF16", [3, 7]), ("I64", [i])][i % 4]
        size = shape[0] * (shape[1] if len(shape) > 1 else 1) * _bits(dtype) // 8
        entries[f"{i:02}"] = raw.entry(dtype, shape, len(data), len(data) + size)
        data += random.Random(i).randbytes(size)
    path = raw.write(raw.pack(json.dumps(entries) + " " * pad, data))
    theirs = stock.load_file(path, device=place.stock_device)
    with fastst_patch.config_context(tensors=tensors, fallback="error"):
        ours = fastst_patch.load_file(path, device=place.device)
    assert_all_equal(place, ours, theirs)


@BOTH
@pytest.mark.parametrize("order", ["file", "keys", "reversed", "random", "twice"])
def test_handles_in_any_order(place, stock, mixed, tensors, order) -> None:
    expected = stock.load_file(mixed, device=place.stock_device)
    options = {"tensors": tensors, "device_memory_budget": 2 * MIB, "fallback": "error"}
    with fastst_patch.config_context(**options):
        with fastst_patch.safe_open(mixed, "pt", device=place.device) as handle:
            names = list(handle.offset_keys() if order == "file" else handle.keys())
            if order == "reversed":
                names.reverse()
            elif order == "random":
                random.Random(8).shuffle(names)
            elif order == "twice":
                names = [name for name in names for _ in range(2)]
            kept = [(name, handle.get_tensor(name)) for name in names]
    for name, tensor in kept:
        assert_equal(place, tensor, expected[name], name)


@BOTH
def test_slices(place, stock, mixed, tensors) -> None:
    whole, some, columns = slice(None), slice(3, 250), slice(5, 9)
    indices = [whole, some, slice(0, 0), (some, columns), (whole, columns), slice(299, 300)]
    with fastst_patch.config_context(tensors=tensors, fallback="error"):
        with (
            fastst_patch.safe_open(mixed, "pt", device=place.device) as ours,
            stock.safe_open(mixed, "pt", device=place.stock_device) as theirs,
        ):
            for index in indices:
                mine = ours.get_slice("half.3")[index]
                other = theirs.get_slice("half.3")[index]
                assert (mine.dtype, mine.shape) == (other.dtype, other.shape), index
                assert mine.device == other.device
                assert torch.equal(mine, other), index


@BOTH
def test_from_several_threads(place, stock, mixed, counted, tensors) -> None:
    files = (mixed, counted) if place.real else (mixed, mixed)
    expected = {path: stock.load_file(path, device=place.stock_device) for path in files}
    with fastst_patch.config_context(tensors=tensors, fallback="error"), ThreadPoolExecutor(6) as p:
        paths = files * 4
        loads = p.map(lambda path: fastst_patch.load_file(path, device=place.device), paths)
        for path, ours in zip(paths, loads, strict=True):
            assert_all_equal(place, ours, expected[path])


@BOTH
def test_verify(place, mixed, tensors) -> None:
    if not place.real:
        pytest.skip("stock cannot load to the fake device")
    options = {"verify": True, "tensors": tensors, "fallback": "error"}
    with fastst_patch.config_context(**options):
        fastst_patch.load_file(mixed, device=place.device)


@real_only
def test_patched(stock, mixed) -> None:
    import safetensors.torch

    with fastst_patch.patched(fallback="error"):
        ours = safetensors.torch.load_file(mixed, device="cuda")
    assert_all_equal(Place(True), ours, stock.load_file(mixed, device="cuda"))


# ---- ordering: nothing is read too early, nothing written too late ----


def _busy(stream: torch.cuda.Stream, nbytes: int) -> None:
    """Leave kernels pending on a block, and give the block back to the allocator."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(5_000_000)  # cycles: some milliseconds
        junk = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        junk.fill_(0xEE)  # runs late, into memory that is somebody else's by then
        del junk


@real_only
@BOTH
@pytest.mark.parametrize("side", [False, True])
def test_blocks_with_pending_work(counted, tensors, side) -> None:
    stream = torch.cuda.Stream() if side else torch.cuda.current_stream()
    with fastst_patch.config_context(tensors=tensors, fallback="error"):
        for _ in range(10):
            for nbytes in (64 * MIB, MIB, MIB):
                _busy(stream, nbytes)
            with torch.cuda.stream(stream):
                loaded = fastst_patch.load_file(counted, device="cuda")
            torch.cuda.synchronize()
            for name, tensor in loaded.items():
                assert bool((tensor == int(name)).all()), name
            del loaded, tensor
    del stream


@real_only
@BOTH
@pytest.mark.parametrize("handle", [False, True])
def test_use_on_many_streams_under_churn(counted, tensors, handle) -> None:
    """Each tensor is read at once, on another stream than it came on, while others allocate."""
    streams = [torch.cuda.Stream() for _ in range(4)]
    stop = threading.Event()

    def churn(seed: int) -> None:
        numbers, stream = random.Random(seed), torch.cuda.Stream()
        while not stop.is_set():
            _busy(stream, numbers.randrange(1, 24 * MIB))
            stream.synchronize()

    def tensors_of() -> Iterator[tuple[str, torch.Tensor]]:
        if handle:
            with fastst_patch.safe_open(counted, "pt", device="cuda") as opened:
                for name in opened.offset_keys():
                    yield name, opened.get_tensor(name)
        else:
            yield from fastst_patch.load_file(counted, device="cuda").items()

    threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    options = {"tensors": tensors, "fallback": "error", "device_memory_budget": 8 * MIB}
    try:
        with fastst_patch.config_context(**options):
            for _ in range(5):
                wrong, held = [], []
                for i, (name, tensor) in enumerate(tensors_of()):
                    with torch.cuda.stream(streams[i % len(streams)]):
                        wrong.append((tensor != int(name)).sum())
                    held.append(tensor)  # torch's rule: keep what another stream still uses
                torch.cuda.synchronize()
                assert [int(count) for count in wrong] == [0] * 64
                del wrong, held, tensor
    finally:
        stop.set()
        for thread in threads:
            thread.join()


# ---- lifetime and memory ----


@real_only
@BOTH
def test_memory_comes_back(mixed, tensors) -> None:
    with fastst_patch.config_context(tensors=tensors, fallback="error"):
        fastst_patch.load_file(mixed, device="cuda")
        gc.collect()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            loaded = fastst_patch.load_file(mixed, device="cuda")
            total = sum(tensor.nbytes for tensor in loaded.values())
            taken = torch.cuda.memory_allocated() - before
            assert total <= taken <= 2 * total + 2 * MIB  # its blocks are rounded up
            del loaded
            gc.collect()
            assert torch.cuda.memory_allocated() == before


@real_only
def test_one_survivor(mixed) -> None:
    for tensors in ("dlpack", "owned"):
        before = torch.cuda.memory_allocated()
        with fastst_patch.config_context(tensors=tensors, fallback="error"):
            one = fastst_patch.load_file(mixed, device="cuda")["tiny.7"]
        gc.collect()
        copy = one.cpu()
        kept = torch.cuda.memory_allocated() - before
        assert kept <= 512 if tensors == "owned" else kept >= 2_000_000
        junk = torch.full((64 * MIB,), 0xEE, dtype=torch.uint8, device="cuda")
        assert torch.equal(one.cpu(), copy)
        del one, junk
        gc.collect()
        assert torch.cuda.memory_allocated() == before


@real_only
@BOTH
def test_a_closed_or_forgotten_handle(mixed, stock, tensors) -> None:
    expected = stock.load_file(mixed)
    with fastst_patch.config_context(tensors=tensors, fallback="error"):
        handle = fastst_patch.safe_open(mixed, "pt", device="cuda")
        names = handle.offset_keys()[:3]
        kept = {name: handle.get_tensor(name) for name in names}  # more is being read ahead
        del handle
        gc.collect()
        for name, tensor in kept.items():
            assert torch.equal(tensor.cpu(), expected[name])


@real_only
@BOTH
def test_out_of_memory(counted, tensors) -> None:
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    room = torch.cuda.memory_reserved() + 24 * MIB  # the file has 64
    before = torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        with fastst_patch.config_context(tensors=tensors):
            with pytest.raises(torch.cuda.OutOfMemoryError):
                fastst_patch.load_file(counted, device="cuda")
        gc.collect()
        assert torch.cuda.memory_allocated() == before
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    with fastst_patch.config_context(tensors=tensors, fallback="error"):
        assert len(fastst_patch.load_file(counted, device="cuda")) == 64


@real_only
def test_pinned_memory_is_bounded(counted) -> None:
    engine.shutdown()
    options = {"pinned_bytes": 8 * MIB, "chunk_bytes": MIB, "threads": 8, "fallback": "error"}
    with fastst_patch.config_context(**options):
        loaded = fastst_patch.load_file(counted, device="cuda")
    assert 0 < engine.counters()["pinned_bytes"] <= 8 * MIB
    assert all(bool((tensor == int(name)).all()) for name, tensor in loaded.items())


# ---- devices and processes ----


@real_only
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@BOTH
def test_two_devices(mixed, stock, tensors) -> None:
    with fastst_patch.config_context(tensors=tensors, fallback="error"):
        loaded = {i: fastst_patch.load_file(mixed, device=f"cuda:{i}") for i in (1, 0)}
        assert torch.cuda.current_device() == 0
        with torch.cuda.device(1):
            loaded[2] = fastst_patch.load_file(mixed, device="cuda:0")
            assert torch.cuda.current_device() == 1
    for i, ours in loaded.items():
        device = f"cuda:{i % 2}"
        assert_all_equal(Place(True, device), ours, stock.load_file(mixed, device=device))


IN_A_CHILD = """
import os, sys, torch, fastst_patch
path = sys.argv[1]
first = fastst_patch.load_file(path, device="cuda")
pid = os.fork()
if pid == 0:
    status = 1
    try:
        fastst_patch.load_file(path, device="cuda")
    except RuntimeError as error:  # stock's, which is torch's
        status = 0 if "fork" in str(error) else 2
    if status == 0 and len(fastst_patch.load_file(path)) != len(first):
        status = 3
    os._exit(status)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
again = fastst_patch.load_file(path, device="cuda")
assert all(torch.equal(again[name], first[name]) for name in first)
print("fine")
"""

AT_THE_END = """
import sys, torch, fastst_patch
handle = fastst_patch.safe_open(sys.argv[1], "pt", device="cuda")
kept = [handle.get_tensor(name) for name in handle.offset_keys()[:2]]
print("fine")
"""


@real_only
@pytest.mark.parametrize("script", [IN_A_CHILD, AT_THE_END], ids=["fork", "exit"])
def test_processes(mixed, script, tmp_path) -> None:
    command = [sys.executable, "-c", script, str(mixed)]
    environment = {**os.environ, "FASTST_LOG_LEVEL": "info"}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout.split()[-1:]) == (0, ["fine"]), done.stderr


@real_only
def test_not_while_a_graph_is_captured(counted) -> None:
    from fastst_patch import device

    graph, x = torch.cuda.CUDAGraph(), torch.zeros(8, device="cuda")
    with torch.cuda.graph(graph):
        x += 1
        fallback = device.Runtime().fallback(0)
    assert fallback is not None
    assert device.Runtime().fallback(0) is None
    del graph
