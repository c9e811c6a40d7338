"""fastst_patch: programs that read safetensors load at the speed of their hardware.

    import fastst_patch
    fastst_patch.patch()          # or: with fastst_patch.patched(): ...

Importing this package is cheap and imports no torch. See the README for options and limits.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import engine as _engine
from .config import Config, config, config_context, environment_enabled
from .errors import (
    FallbackWarning,
    FaststError,
    OptionError,
    RankError,
    UntestedVersionWarning,
)
from .handle import load_file, load_model, safe_open
from .patcher import (
    PatchReport,
    TargetStatus,
    get_original,
    is_patched,
    patch,
    patch_map,
    patched,
    unpatch,
)
from .report import LoadReport, Profile, profile, totals

if TYPE_CHECKING:
    from .loader import (
        FastSafetensorsFile,
        FilesBufferOnDevice,
        SafeTensorsFileLoader,
        fastsafe_open,
    )
    from .parallel_loader import ParallelLoader
    from .sharding import SingleGroup, load_sharded

__all__ = [
    "Config",
    "FallbackWarning",
    "FastSafetensorsFile",
    "FaststError",
    "FilesBufferOnDevice",
    "LoadReport",
    "OptionError",
    "ParallelLoader",
    "PatchReport",
    "Profile",
    "RankError",
    "SafeTensorsFileLoader",
    "SingleGroup",
    "TargetStatus",
    "UntestedVersionWarning",
    "config",
    "config_context",
    "fastsafe_open",
    "get_original",
    "is_patched",
    "load_file",
    "load_model",
    "load_sharded",
    "patch",
    "patch_map",
    "patched",
    "profile",
    "safe_open",
    "stats",
    "unpatch",
]


_LAZY = {
    "FastSafetensorsFile": "loader",
    "FilesBufferOnDevice": "loader",
    "ParallelLoader": "parallel_loader",
    "SafeTensorsFileLoader": "loader",
    "SingleGroup": "sharding",
    "fastsafe_open": "loader",
    "load_sharded": "sharding",
}
"""Names of the explicit interface, and the module that each comes from when it is asked for."""


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{module}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


def stats() -> dict[str, Any]:
    """Totals since the start of the process.

    Returns:
        ``"paths"``: per path (``mmap``, ``direct``, ``stock``, ...) the number of loads,
        tensors, bytes and the seconds spent in our calls; ``"fallbacks"``: how often each
        reason sent a load to stock; ``"native"``: what the engine holds and has moved.
    """
    return {**totals(), "native": _engine.counters()}


def load_ipython_extension(shell: Any) -> None:
    """``%load_ext fastst_patch``: patch, and add the magic ``fastst_profile``."""
    from . import ipython

    ipython.load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """``%unload_ext fastst_patch``: undo what loading it did."""
    from . import ipython

    ipython.unload(shell)


if environment_enabled():
    from . import launched as _launched

    _launched.begin(patch())
