"""Integrations with libraries that need more than safetensors' own names: a module for each.

A module says which functions it wraps and why, in which versions of the package it was tested, and
which cases it leaves to the original. A function whose parameters differ from the expected ones is
not wrapped. A wrapped function is called as ``fast(original, args, kwargs)`` and must return what
the original returns; it passes unusual calls on to the original unchanged.
"""

from __future__ import annotations

from . import diffusers, sglang, torch_module, transformers, vllm
from .hook import Hook, Integration

__all__ = ["INTEGRATIONS", "Hook", "Integration"]

INTEGRATIONS: tuple[Integration, ...] = (
    torch_module.INTEGRATION,
    transformers.INTEGRATION,
    diffusers.INTEGRATION,
    vllm.INTEGRATION,
    sglang.INTEGRATION,
)
