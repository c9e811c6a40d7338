"""Loads to a device, over the fake driver: bytes, exceptions, memory, and leaks."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import fake_device
import pytest
import safetensors.torch
import torch
from places import SUPPORT
from safetensors.torch import save_file, save_model

import fastst_patch
from fastst_patch import device, engine, report


@pytest.fixture
def model(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(5)
    tensors = {
        f"layer.{i:02}.w": torch.randn(257, 129 + i, generator=generator).to(torch.bfloat16)
        for i in range(24)
    }
    tensors |= {f"layer.{i:02}.b": torch.randn(3 + i, generator=generator) for i in range(24)}
    tensors["scalar"] = torch.tensor(3, dtype=torch.int64)
    tensors["empty"] = torch.empty(0, 7)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    return path


def _equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(ours[name], tensor), name


WAYS = [
    {"tensors": tensors, "io": io, "chunk_bytes": 65536}
    for tensors in ("dlpack", "owned")
    for io in ("auto", "buffered", "direct")
]


@pytest.mark.parametrize("device", ["cuda", "cuda:1", 0])
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_load_file(cuda, stock, model, options, device) -> None:
    with fastst_patch.config_context(**options, fallback="error"), report.profile() as seen:
        ours = fastst_patch.load_file(model, device=device)
    _equal(ours, stock.load_file(model))
    (load,) = seen.reports
    assert load.device == ("cuda:1" if device == "cuda:1" else "cuda:0")
    assert load.path == ("ring+direct" if options["io"] == "direct" else "ring")
    assert cuda.driver.lib.fake_pageable_copies() == 1  # the chunk that is read back
    del ours, load
    gc.collect()
    engine.shutdown()
    left = cuda.driver.live()
    assert (left.blocks, left.ranges) == (0, 0)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", 0])
def test_load_model(cuda, tmp_path, device) -> None:
    """Our function, and the patched one, which is stock's own code over our load_file."""
    source, path = torch.nn.Linear(64, 32), tmp_path / "linear.safetensors"
    save_model(source, str(path))
    with report.profile() as seen, fastst_patch.patched(fallback="error"):
        for load in (fastst_patch.load_model, safetensors.torch.load_model):
            model = torch.nn.Linear(64, 32)
            assert load(model, str(path), device=device) == (set(), [])
            assert torch.equal(model.weight, source.weight)
            assert torch.equal(model.bias, source.bias)
    assert [(load.path, load.tensors) for load in seen.reports] == [("ring", 2)] * 2
    assert {load.device for load in seen.reports} == {f"cuda:{1 if device == 'cuda:1' else 0}"}


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_handle_in_file_order(cuda, stock, model, options) -> None:
    expected = stock.load_file(model)
    with fastst_patch.config_context(**options, device_memory_budget=300_000, fallback="error"):
        with fastst_patch.safe_open(model, "pt", device="cuda") as handle:
            for _ in range(2):
                ours = {name: handle.get_tensor(name) for name in handle.offset_keys()}
                _equal(ours, expected)
        with fastst_patch.safe_open(model, "pt", "cuda:0") as handle:
            for name in reversed(handle.keys()):
                assert torch.equal(handle.get_tensor(name), expected[name])


@pytest.mark.parametrize("tensors", ["dlpack", "owned"])
def test_first_load_is_proved(cuda, model, tensors) -> None:
    with fastst_patch.config_context(tensors=tensors):
        fastst_patch.load_file(model, device="cuda")
        fastst_patch.load_file(model, device="cuda")
    assert cuda.driver.calls("cuMemcpyDtoHAsync_v2") == 1


@pytest.mark.parametrize("tensors", ["dlpack", "owned"])
@pytest.mark.parametrize("call", ["load_file", "walk", "rows"])
def test_the_proof_is_of_a_whole_chunk(cuda, tmp_path, monkeypatch, tensors, call) -> None:
    """The first tensor alone may be tiny. The proof precedes the first tensor handed out."""
    sizes = {"a": 3, "b": 100_001, "c": 700, "d": device.PROOF_BYTES + 5, "e": 6_000_001, "f": 9}
    save_file({k: torch.full((n,), 7, dtype=torch.uint8) for k, n in sizes.items()},
              tmp_path / "m.safetensors")  # fmt: skip
    compared: list[int] = []
    compare = engine.compare

    def note(*args: Any, **kwargs: int) -> bool:
        compared.append(kwargs["nbytes"])
        return compare(*args, **kwargs)

    monkeypatch.setattr(engine, "compare", note)
    options = {"tensors": tensors, "device_memory_budget": 64 << 20, "fallback": "error"}
    with fastst_patch.config_context(**options):
        if call == "load_file":
            fastst_patch.load_file(tmp_path / "m.safetensors", device="cuda")
        with fastst_patch.safe_open(tmp_path / "m.safetensors", "pt", "cuda") as handle:
            if call == "rows":
                handle.get_slice("b")[5:]
            if call == "walk":  # the first tensor comes alone, those behind it in groups
                handle.get_tensor("a")
                assert compared == [3]
                handle.get_tensor("b")
                assert compared == [3, device.PROOF_BYTES]
            for name in sizes:
                handle.get_tensor(name)
    expected = {
        "load_file": [device.PROOF_BYTES],
        "walk": [3, device.PROOF_BYTES],
        "rows": [100_001 - 5, device.PROOF_BYTES],
    }
    assert compared == expected[call]


@pytest.mark.parametrize("tensors", ["dlpack", "owned"])
def test_gds(cuda, stock, model, tensors) -> None:
    with fastst_patch.config_context(io="gds", tensors=tensors, fallback="error", threads=3):
        with report.profile() as seen:
            ours = fastst_patch.load_file(model, device="cuda")
            with fastst_patch.safe_open(model, "pt", "cuda") as handle:
                row = handle.get_slice("layer.03.w")[5:9, 2:]
    expected = stock.load_file(model)
    _equal(ours, expected)
    assert torch.equal(row, expected["layer.03.w"][5:9, 2:])
    assert {load.path for load in seen.reports} == {"gds (compatibility mode)"}
    assert cuda.driver.calls("cuFileRead") >= 2
    assert cuda.driver.calls("cuMemHostRegister_v2") == 0


@pytest.mark.parametrize("name", ["cuFileHandleRegister", "cuFileBufRegister", "cuFileRead"])
@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("tensors", ["dlpack", "owned"])
def test_the_ring_takes_over_from_gds(cuda, stock, model, tensors, name, first) -> None:
    cuda.driver.fail(name, first=first, count=1 << 30, code=5001)
    options = {
        "io": "gds",
        "tensors": tensors,
        "fallback": "error",
        "chunk_bytes": 65536,
        "threads": 2,
    }
    with fastst_patch.config_context(**options), report.profile() as seen:
        for _ in range(2):  # the second registration of a file is the second load's
            ours = fastst_patch.load_file(model, device="cuda")
            _equal(ours, stock.load_file(model))
    reasons = [load.fallback_reason for load in seen.reports if load.fallback_reason]
    assert all("cuFile" in reason for reason in reasons)
    # One worker may have done it all, with one staging block.
    assert bool(reasons) == (cuda.driver.calls(name) >= first)


@pytest.mark.parametrize("tensors", ["dlpack", "owned"])
def test_rocm_by_the_same_code(fake_driver, stock, model, tensors) -> None:
    with fake_device.fake_cuda(fake_driver, kind="hip"):
        with fastst_patch.config_context(tensors=tensors, fallback="error", chunk_bytes=65536):
            ours = fastst_patch.load_file(model, device="cuda")
        _equal(ours, stock.load_file(model))
        assert fake_driver.calls("hipMemcpyHtoDAsync") > 0
        assert fake_driver.calls("cuMemcpyHtoDAsync_v2") == 0


def test_without_pinned_memory(cuda, stock, model) -> None:
    options = {"pinned_bytes": 0, "chunk_bytes": 65536, "fallback": "error"}
    with fastst_patch.config_context(**options):
        ours = fastst_patch.load_file(model, device="cuda")
    _equal(ours, stock.load_file(model))
    assert cuda.driver.calls("cuMemHostRegister_v2") == 0
    assert engine.counters()["pinned_bytes"] == 0


STDIN = """
import sys
sys.path.insert(0, sys.argv[3])
import fake_device, fastst_patch
driver = fake_device.Driver(sys.argv[1])
with fake_device.fake_cuda(driver):
    driver.lib.fake_close_stdin(1)
    with fastst_patch.config_context(io="gds", fallback="error"):
        loaded = fastst_patch.load_file(sys.argv[2], device="cuda")
    assert driver.calls("cuFileDriverOpen") == 1
    assert sys.stdin.read() == "still here"
    del loaded
"""


def test_gds_keeps_descriptor_0(fake_driver, model, tmp_path, warm_python) -> None:
    # In its own process: cuFile's driver is opened once in each.
    arguments = (fake_driver.path, model, SUPPORT)
    done = warm_python.run(STDIN, *arguments, folder=tmp_path, stdin="still here")
    assert done.returncode == 0, done.stderr
