"""Functions given to torch.compile may name and call what is patched, as they may name stock's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

import fastst_patch
from fastst_patch import engine

pytestmark = pytest.mark.skipif(
    engine.native_error() is not None, reason=str(engine.native_error())
)


def _load_file(x: torch.Tensor, path: str) -> torch.Tensor:
    return x + safetensors.torch.load_file(path)["b"]


def _handle(x: torch.Tensor, path: str) -> torch.Tensor:
    with safetensors.safe_open(path, "pt") as handle:
        return x + handle.get_tensor("b")


def _slice(x: torch.Tensor, path: str) -> torch.Tensor:
    return x + safetensors.safe_open(path, framework="pt").get_slice("b")[:]


def _missing(x: torch.Tensor, path: str) -> torch.Tensor:
    try:
        return x + safetensors.torch.load_file(path + ".not")["b"]
    except FileNotFoundError:
        return x - 1


def _unpatched(x: torch.Tensor, path: str) -> torch.Tensor:
    return x + fastst_patch.safe_open(path, framework="pt").get_tensor("b")


@pytest.mark.parametrize("function", [_load_file, _handle, _slice, _missing, _unpatched])
def test_compiled(function: Callable[..., Any], tmp_path: Path) -> None:
    path = str(tmp_path / "model.safetensors")
    safetensors.torch.save_file({"b": torch.arange(10.0)}, path)
    x = torch.zeros(10)
    expected = function(x, path)
    torch._dynamo.reset()
    with fastst_patch.patched():
        assert torch.equal(torch.compile(function, backend="eager")(x, path), expected)
    torch._dynamo.reset()
