"""fastst_patch: programs that read safetensors load at the speed of their hardware.

    import fastst_patch
    fastst_patch.patch()          # or: with fastst_patch.patched(): ...

Importing this package is cheap and imports no torch. See the README for options and limits.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from . import engine as _engine
from .config import Config, config, config_context, environment_enabled
from .errors import FallbackWarning, FaststError, OptionError, RankError, UntestedVersionWarning
from .integrations.hook import whole
from .patching.patcher import (
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
from .terminal import is_our_command, say

if TYPE_CHECKING:
    # Editors and type checkers show stock's signatures and documentation.
    from safetensors import safe_open
    from safetensors.torch import load_file, load_model

    from .loader import (
        DType,
        FastSafetensorsFile,
        FilesBufferOnDevice,
        LazyTensorFactory,
        SafeTensorsFileLoader,
        SafeTensorsMetadata,
        TensorFrame,
        expert_parallel_filter,
        fastsafe_open,
        owned_expert_range,
    )
    from .loader.auto import AutoLoader, LoaderConfig, load_config
    from .loader.parallel import ParallelLoader
    from .sharding import SingleGroup, load_sharded
    from .sources.folder import remote

__all__ = [
    "AutoLoader",
    "Config",
    "DType",
    "FallbackWarning",
    "FastSafetensorsFile",
    "FaststError",
    "FilesBufferOnDevice",
    "LazyTensorFactory",
    "LoadReport",
    "LoaderConfig",
    "OptionError",
    "ParallelLoader",
    "PatchReport",
    "Profile",
    "RankError",
    "SafeTensorsFileLoader",
    "SafeTensorsMetadata",
    "SingleGroup",
    "TargetStatus",
    "TensorFrame",
    "UntestedVersionWarning",
    "config",
    "config_context",
    "expert_parallel_filter",
    "fastsafe_open",
    "get_original",
    "is_patched",
    "load_config",
    "load_file",
    "load_model",
    "load_sharded",
    "owned_expert_range",
    "patch",
    "patch_map",
    "patched",
    "profile",
    "remote",
    "safe_open",
    "stats",
    "unpatch",
]


_LATE = {
    **dict.fromkeys(("load_file", "load_model", "safe_open"), "dropin.handle"),
    **dict.fromkeys(("AutoLoader", "LoaderConfig", "load_config"), "loader.auto"),
    **dict.fromkeys(("DType", "SafeTensorsMetadata", "TensorFrame"), "loader"),
    **dict.fromkeys(("FastSafetensorsFile", "FilesBufferOnDevice", "LazyTensorFactory"), "loader"),
    **dict.fromkeys(("SafeTensorsFileLoader", "fastsafe_open"), "loader"),
    **dict.fromkeys(("expert_parallel_filter", "owned_expert_range"), "loader"),
    "ParallelLoader": "loader.parallel",
    **dict.fromkeys(("SingleGroup", "load_sharded"), "sharding"),
    "remote": "sources.folder",
}
"""Names that a program may never use, and the module that each comes from."""


def __getattr__(name: str) -> Any:
    module = _LATE.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if module == "dropin.handle":  # which a forked child needs as well
        whole(f"{__name__}.{module}")
    found = globals()[name] = getattr(importlib.import_module(f".{module}", __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})


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
    from .patching import ipython

    ipython.load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """``%unload_ext fastst_patch``: undo what loading it did."""
    from .patching import ipython

    ipython.unload(shell)


def _begin() -> None:
    """Patch where the environment says so."""
    try:
        if environment_enabled():
            from .patching import child_hook

            child_hook.begin(patch())
    except (ImportError, OptionError) as error:
        if not is_our_command():
            raise
        if isinstance(error, OptionError):  # one line, not the traceback of an import
            say(f"fastst-patch: {error}", sys.stderr)
            raise SystemExit(2) from None


_begin()
