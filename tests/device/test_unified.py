"""Devices that share memory or page tables with the host: what loads to them do differently."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import fake_device
import pytest
import torch

import fastst_patch
from fastst_patch import device, engine
from fastst_patch.cli import doctor, doctor_text

MIB = 1 << 20
KINDS = {"own": (0, 0), "coherent": (0, 1), "integrated": (1, 0), "integrated+coherent": (1, 1)}


@pytest.fixture(params=KINDS)
def kind(request, cuda) -> str:
    """The kind of device that the fake stands for, which is asked when a load needs it."""
    engine.shutdown()  # no slots of other devices
    cuda.driver.lib.fake_unified(*KINDS[request.param])
    return request.param


@pytest.fixture
def integrated(cuda) -> Any:
    cuda.driver.lib.fake_unified(1, 1)
    return cuda


def _found() -> device.Device:
    found = device.find_device("cuda")
    assert found is not None
    return found


def _load(fast: Any, stock: Any, path: str, **options: Any) -> fastst_patch.LoadReport:
    expected = stock.load_file(path)
    with fastst_patch.config_context(fallback="error", **options):
        with fastst_patch.profile() as profile:
            found = fast.load_file(path, device="cuda")
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    (report,) = profile.reports
    return report


def _load_cached(fast: Any, stock: Any, path: str, **options: Any) -> fastst_patch.LoadReport:
    """The same of a file in the page cache; again where the kernel has dropped some meanwhile.

    Tests in other processes take all the memory that there is.
    """
    for _ in range(10):
        Path(path).read_bytes()
        before = engine.counters()["bytes_direct"]
        report = _load(fast, stock, path, **options)
        if report.path == "ring":
            assert engine.counters()["bytes_direct"] == before
            break
    return report


def _cached(path: str) -> int:
    return engine.residency(path).resident_bytes


# ---------------------------------------------------------------- bytes and pinned memory


@pytest.mark.parametrize("tensors", ["dlpack", "owned"])
def test_loads_through_pinned_memory(cuda, kind, model, fast, stock, tensors) -> None:
    """None is copied from ordinary memory, nor from a map; the driver's is used where needed."""
    assert _load_cached(fast, stock, model, tensors=tensors, chunk_bytes=65536).path == "ring"
    expected = stock.load_file(model)
    with fast.safe_open(model, "pt", "cuda") as handle:
        for name in reversed(handle.keys()):
            assert torch.equal(handle.get_tensor(name), expected[name])
        assert torch.equal(handle.get_slice("floats")[7:9], expected["floats"][7:9])
    read_back = cuda.driver.calls("cuMemcpyDtoHAsync_v2")
    assert cuda.driver.lib.fake_pageable_copies() == read_back <= 2
    by_driver = "coherent" in kind
    assert (cuda.driver.calls("cuMemHostAlloc") > 0) == by_driver
    assert (cuda.driver.calls("cuMemHostRegister_v2") > 0) != by_driver
    engine.shutdown()
    assert cuda.driver.live().ranges == 0


@pytest.mark.parametrize("pinned", [0, 65536, 200_000])
def test_pinned_bytes(cuda, kind, model, fast, stock, pinned) -> None:
    _load(fast, stock, model, pinned_bytes=pinned, chunk_bytes=65536, threads=3)
    held = cuda.driver.live().range_bytes
    assert engine.counters()["pinned_bytes"] == held <= pinned
    assert (held > 0) == (pinned > 0)
    engine.shutdown()
    assert cuda.driver.live().range_bytes == 0


def test_refused_pinned_memory(cuda, kind, model, fast, stock) -> None:
    cuda.driver.lib.fake_refuse_pin(1, 1 << 40)
    _load(fast, stock, model, chunk_bytes=65536)
    assert cuda.driver.live().ranges == 0
    assert cuda.driver.lib.fake_pageable_copies() > 1
    engine.shutdown()


def test_modules_move_through_pinned_memory(kind, moving) -> None:
    module = torch.nn.Linear(300, 700)
    expected = module.weight.detach().clone()
    assert torch.equal(module.to("cuda").weight, expected)
    assert moving.driver.lib.fake_pageable_copies() == 0


# ---------------------------------------------------------------- the page cache


def test_a_cold_file_is_not_left_in_the_page_cache(
    integrated, model, fast, stock, evict, need_o_direct
) -> None:
    need_o_direct(model)
    expected, size = stock.load_file(model), os.path.getsize(model)
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    evict(model)
    with fastst_patch.config_context(fallback="error"), fastst_patch.profile() as profile:
        found = fast.load_file(model, device="cuda")
        assert _cached(model) < size // 20  # the header's page
        with fast.safe_open(model, "pt", "cuda") as handle:
            for name in handle.keys():  # noqa: SIM118 - stock's interface
                assert torch.equal(handle.get_tensor(name), expected[name])
    assert _cached(model) < size // 20
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [report.path for report in profile.reports] == ["ring+direct"] * 2


def test_a_cached_file_is_read_from_there(integrated, model, fast, stock) -> None:
    assert _load_cached(fast, stock, model).path == "ring"
    assert _cached(model) >= os.path.getsize(model) - 8192


def test_keep_leaves_a_file_cached(integrated, model, fast, evict) -> None:
    evict(model)
    with fastst_patch.config_context(page_cache="keep"), fastst_patch.profile() as profile:
        fast.load_file(model, device="cuda")
    assert _cached(model) >= os.path.getsize(model) - 8192
    assert [report.path for report in profile.reports] == ["ring"]


@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_drop(integrated, model, fast, stock, evict, need_o_direct, io) -> None:
    need_o_direct(model)
    evict(model)
    with fastst_patch.config_context(page_cache="drop", io=io), fastst_patch.profile() as profile:
        found = fast.load_file(model, device="cuda")
    assert _cached(model) < os.path.getsize(model) // 20
    assert [report.path for report in profile.reports] == [
        "ring" if io == "buffered" else "ring+direct"
    ]
    assert all(torch.equal(found[name], t) for name, t in stock.load_file(model).items())


def test_where_o_direct_is_refused_the_report_says_so(
    integrated, model, fast, stock, evict, need_o_direct
) -> None:
    need_o_direct(model)
    expected = {name: tensor.clone() for name, tensor in stock.load_file(model).items()}
    evict(model)
    engine.set_fault("pread", first=1 << 62)  # counts those that open the file
    engine.read_layout(engine.open_file(model))
    opening = engine.fault_calls("pread")
    engine.clear_faults()
    # The kernel may be unable to read into memory of the driver's.
    engine.set_fault("pread", first=opening + 1, count=1, errno=errno.EFAULT)
    options = {"chunk_bytes": 65536, "fallback": "error"}
    try:
        with fastst_patch.config_context(**options), fastst_patch.profile() as profile:
            found = fast.load_file(model, device="cuda")
    finally:
        engine.clear_faults()
    (report,) = profile.reports
    assert report.path == "ring"
    assert "O_DIRECT was refused" in report.fallback_reason
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_other_devices_leave_a_cold_file_cached(cuda, model, fast, evict) -> None:
    cuda.driver.lib.fake_unified(0, 1)
    evict(model)
    fast.load_file(model, device="cuda")
    assert _cached(model) >= os.path.getsize(model) - 8192


def test_opening_a_handle_asks_no_device(cuda, model, fast) -> None:
    """A driver that is opened could not be used in a child that is forked now."""
    with fast.safe_open(model, "pt", "cuda"):
        pass
    assert cuda.driver.calls("cuDeviceGetAttribute") == 0
    assert cuda.driver.calls("cuMemGetInfo_v2") == 0


# ---------------------------------------------------------------- free memory


@pytest.mark.parametrize("driver", ["cuda", "hip"])
@pytest.mark.parametrize("shared", [False, True])
def test_room(fake_driver, monkeypatch, driver, shared) -> None:
    """Cached pages count as free where CUDA counts them as taken, but no more than there is."""
    with fake_device.fake_cuda(fake_driver, kind=driver) as runtime:
        fake_driver.lib.fake_device_bytes(100 * MIB)
        try:
            fake_driver.lib.fake_unified(shared, 0)
            block = runtime.arena(10 * MIB, 0)
            found = _found()
            free = engine.device_info(found.native()).free_bytes
            assert free < 100 * MIB
            for headroom, room in ((None, free), (MIB, free), (95 * MIB, 95 * MIB),
                                   (1 << 40, 100 * MIB)):  # fmt: skip
                monkeypatch.setattr(engine, "memory_headroom", lambda headroom=headroom: headroom)
                assert found.room() == (room if shared and driver == "cuda" else free)
            del block
        finally:
            fake_driver.lib.fake_device_bytes(16 << 30)


# ---------------------------------------------------------------- what users are told


def test_doctor_says_it_in_a_line(cuda, kind) -> None:
    state = doctor.describe(_found())
    assert state["engine"].startswith("ready, ")
    own = kind == "own"
    assert ("never run on such a device" in state["memory"]) != own
    assert ("past the page cache" in state["memory"]) == kind.startswith("integrated")
    found = {
        "missing": {}, "gpu_reason": None, "native": {"reason": None}, "options": {},
        "unknown_variables": {}, "paths": [], "frameworks": {}, "versions": dict.fromkeys(
            ("torch", "safetensors", "fastst-patch")
        ), "machine": {"workers_per_load": 4},
        "gpus": [{"name": "A", **state}, {"name": "A", **state}, {"name": "B", **state}],
    }  # fmt: skip
    lines = doctor_text.render(found, {"ok": "+", "warn": "!", "bad": "x"}, 999, verbose=False)
    assert f"  + GPU: 2 x A: {state['memory']}" in lines
    assert f"  + GPU: B: {state['memory']}" in lines
