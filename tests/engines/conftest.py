"""Stand-ins for engines, a checkpoint, and models on devices that are not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sglang_standin
import torch
import vllm_standin
from engine_standin import ELEMENTS, Model, Standin
from safetensors.torch import save_file

import fastst_plugins
from fastst_patch.integrations import parts


@pytest.fixture
def vllm(tmp_path: Path) -> Iterator[vllm_standin.Standin]:
    with vllm_standin.standing_in(tmp_path / "site") as found:
        yield found


@pytest.fixture
def sglang(tmp_path: Path) -> Iterator[sglang_standin.Standin]:
    with sglang_standin.standing_in(tmp_path / "site") as found:
        yield found


@pytest.fixture(params=["vllm", "sglang", "sglang in threads"])
def engine(request: pytest.FixtureRequest) -> Standin:
    """Each of them, and each of SGLang's two iterators."""
    name, *threads = request.param.split(maxsplit=1)
    found: Any = request.getfixturevalue(name)
    if name == "sglang":
        found.multithread = bool(threads)
    return found  # type: ignore[no-any-return]


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
def all_deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors are, and those of cached files."""
    monkeypatch.setattr(parts, "SMALL", 0)


@pytest.fixture
def registered(vllm: vllm_standin.Standin) -> vllm_standin.Standin:
    fastst_plugins._watch_loaders.cache_clear()
    fastst_plugins.register_vllm()
    return vllm
