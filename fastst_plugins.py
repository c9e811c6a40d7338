"""The entry points that inference engines call in each of their processes.

    vllm.general_plugins -> register_vllm()
        FASTST_ENABLED is set            import fastst_patch, which patches where that is true
        vLLM's loaders are imported      load format "fastst", whose code is imported when it loads
    sglang.srt.plugins -> register_sglang()
        FASTST_ENABLED is set            the same import

It lies outside the package and imports nothing of it by itself. Importing fastst_patch takes some
20 ms of a core, which every process of an engine would spend, also where nothing is enabled.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

__all__ = ["FORMAT", "register_sglang", "register_vllm"]

FORMAT = "fastst"
"""What ``--load-format`` calls us."""

_LOADERS = "vllm.model_executor.model_loader"
_log = logging.getLogger("fastst_patch")


def register_sglang() -> None:
    """Patch where the environment says so. Never raises."""
    _patch_if_enabled()


def register_vllm() -> None:
    """Patch where the environment says so, and add the load format. Never raises."""
    _patch_if_enabled()
    try:
        _watch_loaders()
    except Exception as error:
        _not_added(error)


def _patch_if_enabled() -> None:
    try:
        if os.environ.get("FASTST_ENABLED"):
            import fastst_patch  # noqa: F401 - it patches
    except Exception as error:
        _log.warning("fastst_patch is not imported: %s", error)


@functools.cache
def _watch_loaders() -> None:
    import wrapt

    wrapt.register_post_import_hook(_add_format, _LOADERS)


def _add_format(loaders: Any) -> None:
    try:
        loaders.register_model_loader(FORMAT)(_registered_class(loaders.DefaultModelLoader))
    except Exception as error:  # inside an import of vLLM's
        _not_added(error)


def _not_added(error: Exception) -> None:
    _log.warning("vLLM: load format %r is not added: %s", FORMAT, error)


def _registered_class(default: Any) -> Any:
    """What vLLM calls to get a loader: gives an instance of the class that loads."""

    def new(_: type, load_config: Any) -> Any:
        from fastst_patch.integrations.vllm import loader_class

        return loader_class(default)(load_config)

    body = {"__doc__": _registered_class.__doc__, "__module__": __name__, "__new__": new}
    return type("FaststModelLoader", (default,), body)
