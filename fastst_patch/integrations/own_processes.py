"""Libraries that load in processes of their own, which ``patch()`` may not reach."""

from __future__ import annotations

import sys

from ..config import environment_enabled

__all__ = ["TOLD", "of_sglang", "of_vllm"]

TOLD = {
    "vllm": (
        "vLLM loads in processes of its own, and patch() does not reach those that are spawned:"
        " set FASTST_ENABLED=1 before the program starts, or start it by `fastst-patch run`"
    ),
    "sglang": (
        "SGLang loads in processes of its own, which are spawned, and patch() does not reach them:"
        " set FASTST_ENABLED=1 before the program starts, or start it by `fastst-patch run`"
    ),
}
"""What to tell a program that has imported a package, and patches itself alone."""


def of_vllm() -> str | None:
    """What to tell this process; None if nothing."""
    multiprocessing = getattr(sys.modules.get("vllm.envs"), "VLLM_ENABLE_V1_MULTIPROCESSING", True)
    return _told("vllm") if multiprocessing else None


def of_sglang() -> str | None:
    """What to tell this process; None if nothing."""
    return _told("sglang")


def _told(package: str) -> str | None:
    if package not in sys.modules or environment_enabled() is not None:
        return None
    from multiprocessing import parent_process

    return TOLD[package] if parent_process() is None else None  # else it is a process of theirs
