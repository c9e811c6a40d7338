"""A stand-in for vLLM, a checkpoint, and models on devices that are not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_standin
from safetensors.torch import save_file
from vllm_standin import ELEMENTS, Model, Standin

import fastst_plugins


@pytest.fixture
def vllm(tmp_path: Path) -> Iterator[Standin]:
    with vllm_standin.standing_in(tmp_path / "site") as found:
        yield found


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    found: dict[str, torch.Tensor] = {"norm": torch.randn(3)}
    for layer in range(2):
        found[f"{layer}.w"] = torch.randn(64, 48)
        found[f"{layer}.b"] = torch.randn(5)
    for expert in range(4):
        found[f"0.experts.{expert}.weight"] = torch.randn(20, 32).to(torch.bfloat16)
    return found


@pytest.fixture
def folder(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Three shards, of which the tenth is the last."""
    path = tmp_path / "model"
    path.mkdir()
    names = list(tensors)
    for number, some in ((1, names[:3]), (2, names[3:6]), (10, names[6:])):
        save_file({name: tensors[name] for name in some}, path / f"m-{number}.safetensors")
    return path


@pytest.fixture
def on_cpu() -> Model:
    return Model(ELEMENTS, "cpu")


@pytest.fixture
def on_cuda() -> Model:
    return Model(ELEMENTS, "cuda:0")


@pytest.fixture
def little_memory(fake_driver) -> Iterator[Any]:
    """The driver, whose devices have 8 KiB."""
    fake_driver.lib.fake_device_bytes(8 << 10)
    yield fake_driver
    fake_driver.lib.fake_device_bytes(16 << 30)


@pytest.fixture
def registered(vllm: Standin) -> Standin:
    fastst_plugins._watch_loaders.cache_clear()
    fastst_plugins.register_vllm()
    return vllm
