"""A device without a GPU: the fake driver, and a runtime that lets CPU memory stand for cuda:N.

What the driver leaves late or reordered is in native/tests/fake_cuda.h. Blocks come with work
still pending on the stream they were allocated on, as those of torch's allocator may, and are
poisoned when they are freed. Copies that the engine's users make of tensors (`FakeRuntime.copy`)
are pending, too, until their stream is waited for.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from places import NATIVE_TESTS

from fastst_patch import device, engine, stock
from fastst_patch.dropin import slices


def build(folder: Path) -> Path | None:
    """The fake driver as a shared library; None where there is no compiler.

    ``CFLAGS`` adds flags: fuzz/sanitized.sh has it instrumented.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    library = folder / "libfake_cuda.so"
    flags = ["-std=c11", "-g", "-O1", "-pthread", "-fPIC", "-shared", "-fvisibility=hidden"]
    flags += os.environ.get("CFLAGS", "").split()
    sources = sorted(str(path) for path in NATIVE_TESTS.glob("fake_*.c"))
    # A sanitizer that this process was started with is not for the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    subprocess.run([compiler, *flags, *sources, "-o", str(library)], check=True, env=environment)
    return library


class Counts(ctypes.Structure):
    """``fake_counts``: what of the driver is alive."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("contexts", "streams", "events", "ranges")),
        ("range_bytes", ctypes.c_uint64),
        *((name, ctypes.c_int32) for name in ("blocks", "file_driver")),
        ("block_bytes", ctypes.c_uint64),
        *((name, ctypes.c_int32) for name in ("file_handles", "file_buffers")),
    )


class Driver:
    """The control functions of a fake driver library."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.lib = ctypes.CDLL(self.path)
        self.streams: dict[int, int] = {}  # the allocator's, by ordinal
        for name, result, arguments in (
            ("fake_fail", ctypes.c_int, "suui"),
            ("fake_calls", ctypes.c_uint64, "s"),
            ("fake_refuse_pin", None, "uu"),
            ("fake_stream", ctypes.c_size_t, "i"),
            ("fake_block", ctypes.c_int, "uizp"),
            ("fake_record_stream", ctypes.c_int, "zz"),
            ("fake_synchronize", ctypes.c_int, "iz"),
            ("fake_copy_strided", ctypes.c_int, "zzippuiz"),
            ("fake_capture", None, "i"),
            ("fake_quarantine", None, "u"),
            ("fake_mode", None, "iu"),
            ("fake_device_bytes", None, "u"),
            ("fake_unified", None, "ii"),
            ("fake_violations", ctypes.c_uint64, ""),
            ("fake_violation_text", ctypes.c_char_p, "u"),
            ("fake_copied_bytes", ctypes.c_uint64, ""),
            ("fake_pageable_copies", ctypes.c_uint64, ""),
            ("fake_pending", ctypes.c_uint64, ""),
        ):
            function = getattr(self.lib, name)
            function.restype = result
            kinds = {"s": ctypes.c_char_p, "u": ctypes.c_uint64, "i": ctypes.c_int}
            kinds |= {"z": ctypes.c_size_t, "p": ctypes.c_void_p}
            function.argtypes = [kinds[letter] for letter in arguments]

    def clear(self) -> None:
        """Run what is pending; no faults, counters or violations; default settings."""
        self.lib.fake_clear()

    def pop_contexts(self) -> None:
        """Empty the calling thread's stack of contexts, which has room for so many."""
        while self.lib.fake_current_depth() > 0:
            assert self.lib.cuCtxPopCurrent_v2(None) == 0

    def fail(self, name: str, first: int = 1, count: int = 1, code: int = 719) -> None:
        """Make calls of a driver's function fail."""
        assert self.lib.fake_fail(name.encode(), first, count, code) == 0, name

    def calls(self, name: str) -> int:
        """Calls of a driver's function since the last `clear`."""
        return int(self.lib.fake_calls(name.encode()))

    def violations(self) -> list[str]:
        """Breaches of the driver's rules, and writes into freed memory."""
        count = min(self.lib.fake_violations(), 64)
        return [self.lib.fake_violation_text(i).decode() for i in range(count)]

    def live(self) -> Counts:
        """What is alive."""
        counts = Counts()
        self.lib.fake_live(ctypes.byref(counts))
        return counts


class FakeRuntime(device.Runtime):
    """Stands for CUDA up to the Python layer; tensors are the CPU's, over the fake's blocks."""

    def __init__(self, driver: Driver, devices: int = 2, kind: str = "cuda") -> None:
        self.driver = driver
        self.devices = devices
        self.kind = kind
        self.refuse_from: int | None = None  # allocations before memory runs out
        self.allocated = 0
        self.bytes = 0
        self.largest = 0
        self.settled: list[int] = []  # devices that were waited for
        self.recorded = 0  # calls of `record`
        self._here = threading.local()  # .streams: those current in a thread, by ordinal

    def fallback(self, ordinal: int) -> str | None:
        return None if ordinal < self.devices else f"torch sees no device cuda:{ordinal}"

    def native(self, ordinal: int) -> engine.DeviceHandle:
        return engine.open_device(ordinal, kind=self.kind, library=self.driver.path)

    def current(self) -> int:
        return 0

    def cached(self, ordinal: int) -> int:
        return 0

    def stream(self, ordinal: int) -> int:
        # Work pending on a block is ordered before nothing but what waits for its very stream.
        current: dict[int, int] = getattr(self._here, "streams", {})
        if ordinal in current:
            return current[ordinal]
        streams = self.driver.streams
        return streams.get(ordinal) or streams.setdefault(ordinal, self.new_stream(ordinal))

    def new_stream(self, ordinal: int = 0) -> int:
        """Another stream than the default one, as ``torch.cuda.Stream()``."""
        return int(self.driver.lib.fake_stream(ordinal))

    @contextmanager
    def on(self, stream: int, ordinal: int = 0) -> Iterator[None]:
        """Make a stream the calling thread's current one, as ``torch.cuda.stream()``."""
        before: dict[int, int] = getattr(self._here, "streams", {})
        self._here.streams = before | {ordinal: stream}
        try:
            yield
        finally:
            self._here.streams = before

    def synchronize(self, ordinal: int) -> None:
        self.settled.append(ordinal)
        code = self.driver.lib.fake_synchronize(ordinal, self.stream(ordinal))
        if code:
            raise RuntimeError(f"CUDA error: {code} (fake)")

    def record(self, memory: Any, ordinal: int) -> None:
        address = memory if isinstance(memory, int) else memory.data_ptr()
        self.recorded += 1
        if address:  # as torch, which has no block for a tensor without bytes
            code = self.driver.lib.fake_record_stream(address, self.stream(ordinal))
            assert code == 0, "no memory of the allocator's"

    def copy(self, view: torch.Tensor, ordinal: int) -> torch.Tensor:
        strides = view.to("meta").clone().stride()  # the copy's, which has no gaps
        result = self.empty([view.numel()], view.dtype, ordinal).as_strided(view.shape, strides)
        dims = sorted(range(view.dim()), key=lambda dim: (-strides[dim], -view.shape[dim]))
        shape = (ctypes.c_int64 * view.dim())(*[view.shape[dim] for dim in dims])
        steps = (ctypes.c_int64 * view.dim())(*[view.stride(dim) for dim in dims])
        if view.numel():
            code = self.driver.lib.fake_copy_strided(
                result.data_ptr(), view.data_ptr(), view.dim(), shape, steps, view.itemsize,
                ordinal, self.stream(ordinal),
            )  # fmt: skip
            assert code == 0
        return result

    @contextmanager
    def beside(self, ordinal: int) -> Iterator[None]:
        # torch's own work runs at once here: as if all that its stream waits for were over.
        self.driver.lib.fake_drain()
        yield

    def _block(self, nbytes: int, ordinal: int) -> int:
        managed = ctypes.c_void_p()
        self.allocated += 1
        self.bytes += nbytes
        self.largest = max(self.largest, nbytes)
        short = self.refuse_from is not None and self.allocated >= self.refuse_from
        code = 2 if short else self.driver.lib.fake_block(
            max(nbytes, 1), ordinal, self.stream(ordinal), ctypes.byref(managed)
        )  # fmt: skip
        if code == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory (fake)")
        assert code == 0
        assert managed.value is not None
        return managed.value

    def arena(self, nbytes: int, ordinal: int) -> engine.Arena:
        managed = self._block(nbytes, ordinal)
        try:
            arena = engine.adopt_arena(managed)
        except BaseException:  # then the struct is still ours
            torch._C._from_dlpack(_capsule(managed))
            raise
        arena.keep = ctypes.c_size_t.from_address(managed).value  # of the block's memory
        return arena

    def empty(self, shape: list[int], dtype: torch.dtype, ordinal: int) -> torch.Tensor:
        nbytes = dtype.itemsize
        for length in shape:
            nbytes *= length
        if nbytes == 0:  # no block, as torch's allocator does it
            return torch.empty(shape, dtype=dtype)
        raw: torch.Tensor = torch._C._from_dlpack(_capsule(self._block(nbytes, ordinal)))
        return raw[:nbytes].view(dtype).view(shape)


def _capsule(managed: int) -> Any:
    """A DLPack struct as Python hands it on."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(managed, b"dltensor", None)


@contextmanager
def fake_cuda(driver: Driver, **options: Any) -> Iterator[FakeRuntime]:
    """Let the fake stand for CUDA in a ``with`` block; breaches of its rules fail the test."""
    driver.clear()
    runtime = FakeRuntime(driver, **options)
    with device.replaced(runtime):
        yield runtime
    engine.shutdown()
    assert driver.violations() == []
    driver.clear()


class StockOnCpu:
    """Stock, which answers for a device with the CPU's tensors: no torch here has a device.

    Attributes:
        asked: what stock was asked for, by name of the call.
        alive: blocks of the device that were alive when it was.
        error: raised in its place, if set.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
        self.asked: list[str] = []
        self.alive: list[int] = []
        self.error: BaseException | None = None
        load_file, stock_handle = stock.load_file, slices.stock_handle

        def note(call: str) -> None:
            self.asked.append(call)
            self.alive.append(driver.live().blocks)
            if self.error is not None:
                raise self.error

        def load_on_cpu(filename: Any, device: Any = "cpu", **options: Any) -> Any:
            note("load_file")
            return load_file(filename, "cpu", **options)

        def handle_on_cpu(
            stock_class: Any, path: str, device: object = "cpu", framework: str = "pt"
        ) -> Any:
            if device != "cpu":  # else it is asked how a closed handle talks
                note("handle")
            return stock_handle(stock_class, path, framework=framework)

        monkeypatch.setattr(stock, "load_file", load_on_cpu)
        monkeypatch.setattr(slices, "stock_handle", handle_on_cpu)


def on_device(view: torch.Tensor) -> torch.Tensor:
    """What ``view.to(device)`` makes of a view: memory of its own, and the strides that it gets."""
    copy = torch.empty_strided(view.shape, view.to("meta").stride(), dtype=view.dtype)
    copy.data.copy_(view)
    return copy
