"""What a caller can reach of safetensors: the stock functions, and what stands in their place."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import safetensors
import safetensors.numpy
import safetensors.torch
import torch

_HAS_GET_TENSORS = hasattr(safetensors.safe_open, "get_tensors")  # since 0.8


@dataclass(frozen=True)
class Loaders:
    """One way to read: everything a caller can reach."""

    safe_open: Any
    handle: Any
    load_file: Callable[..., dict[str, torch.Tensor]]
    load_model: Callable[..., tuple[Any, Any]]
    load_arrays: Callable[..., dict[str, Any]]

    @staticmethod
    def all_tensors(handle: Any) -> dict[str, torch.Tensor]:
        """get_tensors(), or what stood for it before 0.8."""
        if _HAS_GET_TENSORS:
            return handle.get_tensors()
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118


def loaders_now(torchs: Any = safetensors.torch, numpys: Any = safetensors.numpy) -> Loaders:
    """The functions as they are at present: patched, where `patch()` is in force."""
    return Loaders(
        safetensors.safe_open,
        getattr(safetensors, "_safe_open_handle", None),  # came with 0.6
        torchs.load_file,
        torchs.load_model,
        numpys.load_file,
    )


def stock_loaders() -> Loaders:
    """The stock functions, which stay stock's; made before anything is patched.

    load_file looks safe_open up in its own module at call time, so the functions live in private
    copies of the modules, which no sweep of sys.modules can reach.
    """
    return loaders_now(_copy(safetensors.torch), _copy(safetensors.numpy))


def _copy(original: ModuleType) -> ModuleType:
    source = original.__file__
    assert source is not None
    name = f"_stock_{original.__name__.replace('.', '_')}"
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
