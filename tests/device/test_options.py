"""Every option has its effect on loads to a device; every way to name one is stock's."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import fastst_patch
from fastst_patch import engine

KIB, MIB = 1 << 10, 1 << 20


def _load(fast: Any, stock: Any, path: str, **options: Any) -> fastst_patch.LoadReport:
    expected = stock.load_file(path)
    with fastst_patch.config_context(**options), fastst_patch.profile() as profile:
        found = fast.load_file(path, device="cuda")
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    (report,) = profile.reports
    return report


@pytest.mark.parametrize(
    ("pinned", "most"),
    [(0, 0), (64 * KIB - 1, 0), (64 * KIB, 64 * KIB), (200 * KIB, 192 * KIB), (None, MIB)],
)
def test_pinned_bytes(cuda, model, fast, stock, pinned, most) -> None:
    """Never more; without any, copies start from ordinary memory."""
    engine.shutdown()
    report = _load(fast, stock, model, pinned_bytes=pinned, chunk_bytes=64 * KIB, threads=3)
    assert report.path == "ring"
    held = engine.counters()["pinned_bytes"]
    assert held <= most
    assert cuda.driver.live().range_bytes == held
    assert (held > 0) == (most > 0)
    assert (cuda.driver.lib.fake_pageable_copies() > 1) == (most == 0)
    engine.shutdown()
    assert engine.counters()["pinned_bytes"] == 0


def test_chunk_bytes(cuda, model, fast, stock) -> None:
    calls = []
    for chunk in (64 * KIB, MIB):
        cuda.driver.clear()
        _load(fast, stock, model, chunk_bytes=chunk)
        calls.append(cuda.driver.calls("cuMemcpyHtoDAsync_v2"))
    assert calls[0] > 4 * calls[1]


@pytest.mark.parametrize("threads", [1, 2])
def test_threads(cuda, model, fast, stock, threads) -> None:
    engine.shutdown()
    _load(fast, stock, model, threads=threads, chunk_bytes=64 * KIB)
    assert engine.counters()["threads"] == threads


def test_tensors(cuda, model, fast, stock) -> None:
    allocated = {}
    for kind in ("auto", "dlpack", "owned"):
        before = cuda.allocated
        _load(fast, stock, model, tensors=kind)
        allocated[kind] = cuda.allocated - before
    assert allocated == {"auto": 5, "dlpack": 1, "owned": 5}


def test_device_memory_budget(cuda, model, fast, stock) -> None:
    """It is the largest block that tensors share, too."""
    _load(fast, stock, model, tensors="dlpack", device_memory_budget=1 << 40)
    assert cuda.allocated == 1
    _load(fast, stock, model, tensors="dlpack", device_memory_budget=0)
    assert cuda.allocated > 5


@pytest.mark.parametrize("io", ["buffered", "direct"])
def test_io(cuda, model, fast, stock, need_o_direct, io) -> None:
    need_o_direct(model)
    before = engine.counters()
    report = _load(fast, stock, model, io=io)
    after = engine.counters()
    assert report.path == ("ring+direct" if io == "direct" else "ring")
    assert after[f"bytes_{io}"] - before[f"bytes_{io}"] == report.bytes
    assert after["bytes_copied"] - before["bytes_copied"] == report.bytes


def test_io_mmap_is_stocks(cuda, asked, model, fast, stock) -> None:
    report = _load(fast, stock, model, io="mmap")
    assert report.path == "stock"
    assert "mmap" in report.fallback_reason
    assert asked.asked == ["load_file"]


def test_page_cache(cuda, model, fast, stock, evict, need_o_direct) -> None:
    need_o_direct(model)
    size = os.path.getsize(model)
    evict(model)
    with fastst_patch.config_context(page_cache="drop", fallback="error"):
        for _ in range(2):
            loaded = fast.load_file(model, device="cuda")
            assert engine.residency(model).resident_bytes < size // 20  # the header's page
    with fastst_patch.config_context(page_cache="drop", io="buffered"):
        assert fast.load_file(model, device="cuda").keys() == loaded.keys()
        assert engine.residency(model).resident_bytes < size // 20
    for kept in ("auto", "keep"):
        evict(model)
        with fastst_patch.config_context(page_cache=kept):
            fast.load_file(model, device="cuda")
        assert engine.residency(model).resident_bytes >= size - 8192


def test_a_file_too_large_to_be_cached(
    cuda, model, fast, stock, evict, need_o_direct, monkeypatch
) -> None:
    """Read around the page cache where it is cold, from there where it is not."""
    need_o_direct(model)
    monkeypatch.setattr(engine, "memory_headroom", lambda: os.path.getsize(model))
    evict(model)
    for page_cache, direct in (("auto", True), ("keep", False), ("auto", False)):
        before = engine.counters()
        with fastst_patch.config_context(page_cache=page_cache):
            loaded = fast.load_file(model, device="cuda")
        after = engine.counters()
        moved = {name: after[name] - before[name] for name in ("bytes_direct", "bytes_buffered")}
        most = "bytes_direct" if direct else "bytes_buffered"
        assert moved[most] > 0.9 * sum(moved.values()), (page_cache, moved)
    assert list(loaded) == list(stock.load_file(model))
    evict(model)
    monkeypatch.setattr(engine, "memory_headroom", lambda: 10 * os.path.getsize(model))
    assert _load(fast, stock, model).path == "ring"
    evict(model)
    monkeypatch.setattr(engine, "memory_headroom", lambda: None)  # nothing tells
    assert _load(fast, stock, model).path == "ring"


def test_progress(cuda, model, fast, stock, capsys) -> None:
    report = _load(fast, stock, model, progress=True, device_memory_budget=MIB)
    assert report.path == "ring"
    shown = capsys.readouterr().err
    assert "model.safetensors" in shown
    assert "100%" in shown


@pytest.mark.parametrize("right", [True, False])
def test_verify(cuda, asked, model, fast, stock, monkeypatch, caplog, right) -> None:
    if not right:
        monkeypatch.setattr("fastst_patch.dropin.eligibility.same", lambda ours, theirs: False)
        monkeypatch.setattr("fastst_patch.dropin.handle.same", lambda ours, theirs: False)
    with fastst_patch.config_context(verify=True):
        fast.load_file(model, device="cuda")
        with fast.safe_open(model, "pt", "cuda") as handle:
            handle.get_tensor("floats")
    assert asked.asked == ["load_file", "handle"]
    assert ("differs from stock's" in caplog.text) is not right


def test_small_files(cuda, asked, model, fast) -> None:
    with fastst_patch.config_context(small_file_bytes=1 << 30, fallback="error"):
        fast.load_file(model, device="cuda")
    assert asked.asked == ["load_file"]
    assert cuda.allocated == 0


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:1", "cuda:01", 0, 1])
def test_devices(cuda, model, fast, stock, watch, device) -> None:
    with watch() as seen, fastst_patch.config_context(fallback="error"):
        fast.load_file(model, device)
        with fast.safe_open(model, "pt", device=device) as handle:
            handle.get_tensor("scalar")
    ordinal = str(device)[-1] if str(device)[-1] in "01" else "0"
    assert {r.device for r in seen.reports} == {f"cuda:{ordinal}"}
    assert {r.path for r in seen.reports} == {"ring"}


@pytest.mark.parametrize(
    "device",
    [
        *("cuda:x", "cuda:-1", "cuda:", "cuda:+1", "cuda: 0", "CUDA", "cuda:0 ", "cuda:99999"),
        *(True, False, -1, 1 << 40, 1.0, b"cuda", "cuda:2", 2, "gpu", "", "meta", "mps", "xpu:0"),
        *(torch.device("cuda"), torch.device("cuda", 1), torch.device("cpu"), ["cuda"]),
    ],
    ids=repr,
)
def test_other_devices_are_stocks(cuda, model, fast, stock, agree, watch, device) -> None:
    """With its own exceptions; nothing of ours touches a device."""
    with watch() as seen:
        agree(lambda: fast.load_file(model, device), lambda: stock.load_file(model, device))
        agree(
            lambda: fast.safe_open(model, "pt", device).get_tensor("scalar"),
            lambda: stock.safe_open(model, "pt", device).get_tensor("scalar"),
        )
    assert all(r.path == "stock" for r in seen.reports)
    assert cuda.allocated == 0
    assert cuda.driver.calls("cuMemcpyHtoDAsync_v2") == 0


@pytest.mark.parametrize("framework", ["np", "numpy", "tf", "jax", "xx"])
def test_other_frameworks_are_stocks(cuda, model, fast, stock, agree, framework) -> None:
    agree(
        lambda: fast.safe_open(model, framework, "cuda").keys(),
        lambda: stock.safe_open(model, framework, "cuda").keys(),
    )
    assert cuda.allocated == 0


def test_torch_modes_are_stocks(cuda, asked, model, fast, stock) -> None:
    with torch.inference_mode():
        fast.load_file(model, device="cuda")
        handle = fast.safe_open(model, "pt", "cuda")
    with torch.device("meta"):
        fast.load_file(model, device="cuda")
    assert asked.asked == ["load_file", "load_file"]
    assert cuda.allocated == 0
    assert handle is not None
