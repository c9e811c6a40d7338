"""What consumers need beyond safetensors' own names: one small module each.

A module says which functions it wraps, in which versions of the package it was tested, why, and
what it leaves to the original. Functions it was not written for, by their parameters, are left
alone. A wrapped function is called as ``fast(original, args, kwargs)`` and must give what the
original gives; whatever is out of the ordinary it hands to the original untouched.
"""

from __future__ import annotations

from . import diffusers, torch_module, transformers, vllm
from .hook import Hook, Integration

__all__ = ["INTEGRATIONS", "Hook", "Integration"]

INTEGRATIONS: tuple[Integration, ...] = (
    torch_module.INTEGRATION,
    transformers.INTEGRATION,
    diffusers.INTEGRATION,
    vllm.INTEGRATION,
)
