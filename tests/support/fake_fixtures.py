"""Fixtures of the fake device, known to every test through conftest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastst_patch


@pytest.fixture(scope="session")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The fake device driver, built once; see fake_device.py."""
    import fake_device

    library = fake_device.build(tmp_path_factory.mktemp("fake"))
    if library is None:
        pytest.skip("needs a C compiler, to build the fake device driver")
    driver = fake_device.Driver(library)
    driver.lib.fake_devices(4)
    return driver


@pytest.fixture
def cuda(fake_driver: Any) -> Iterator[Any]:
    """A FakeRuntime in CUDA's place, on the fake driver."""
    import fake_device

    with fake_device.fake_cuda(fake_driver) as runtime:
        yield runtime


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, cuda: Any) -> Any:
    """Stock's handles on the CPU where a program asks for the device, and what they were asked."""
    import fake_device

    return fake_device.StockOnCpu(monkeypatch, cuda.driver)


@pytest.fixture
def pretrained_to_cuda(monkeypatch: pytest.MonkeyPatch, cuda: Any) -> Iterator[Any]:
    """``from_pretrained`` up to where it needs a real device; the runtime."""
    from transformers import modeling_utils

    monkeypatch.setattr(modeling_utils, "caching_allocator_warmup", lambda *a, **k: None)
    monkeypatch.setattr(modeling_utils, "get_device", lambda *a, **k: "cpu")
    monkeypatch.setattr(modeling_utils, "accelerate_dispatch", lambda *a, **k: None)
    with fastst_patch.patched(chunk_bytes=65536):
        yield cuda


def let_modules_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``Module.to`` move to the fake, with nothing too small to move.

    Stock's own conversion is told the CPU where a program says CUDA: given the moved copy it then
    does what it does on the device, a cast or nothing.
    """
    from fastst_patch.integrations import torch_module

    parse = torch._C._nn._parse_to

    def parse_for_stock(*args: Any, **kwargs: Any) -> Any:
        device, *rest = parse(*args, **kwargs)
        named_cuda = device is not None and device.type == "cuda"
        return (torch.device("cpu") if named_cuda else device, *rest)

    monkeypatch.setattr(torch_module, "_parsed", parse)
    monkeypatch.setattr(torch._C._nn, "_parse_to", parse_for_stock)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, device=None: self)
    monkeypatch.setattr(torch_module, "worth_it", lambda nbytes: True)


@pytest.fixture
def moving(monkeypatch: pytest.MonkeyPatch, cuda: Any) -> Iterator[Any]:
    """``Module.to`` patched over the fake; see `let_modules_move`."""
    let_modules_move(monkeypatch)
    with fastst_patch.patched("torch.nn.Module.to", chunk_bytes=65536):
        yield cuda
