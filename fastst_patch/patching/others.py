"""Other code that puts functions of its own in the place of safetensors'.

It is found by what stands there: something that safetensors did not define. Packages are named only
where more is known of them.
"""

from __future__ import annotations

import types
from typing import Any

__all__ = ["KNOWN", "WRAPPERS", "lost", "maker", "package_of"]

KNOWN = {
    "cattensors": "fastst_patch reads ahead itself; a file is not read by both",
    "safetensors_streaming": "what is no file, such as a URL, still goes to it",
}
"""Packages that lose nothing where ours does a call in their place, and why."""

WRAPPERS = {
    "cattensors": "wraps safetensors by its own patch(): call that before fastst_patch's, which"
    " then reads ahead in its place",
    "safetensors_streaming": "wraps safetensors by its own patch(): call that before"
    " fastst_patch's, which leaves URLs to it",
    "unsloth": "wraps transformers' safe_open when it is imported: the fast version is called"
    " beneath, in either order",
}
"""Packages that wrap safetensors in a program, and what to know before."""


def maker(value: Any) -> str:
    """Where a function or class was written, as ``module.name``.

    `functools.wraps` copies ``__module__`` and ``__name__``: they do not tell.
    """
    if hasattr(type(value), "__wrapped__"):  # a wrapt proxy
        value = getattr(value, "_self_wrapper", value)
    value = getattr(value, "__func__", value)
    if type(value) is types.FunctionType:
        return f"{value.__globals__.get('__name__')}.{value.__code__.co_name}"
    named = value if getattr(value, "__module__", None) else type(value)
    return f"{named.__module__}.{getattr(named, '__qualname__', type(named).__qualname__)}"


def package_of(value: Any) -> str:
    """The package that a function or class was written in."""
    return maker(value).partition(".")[0]


def lost(name: str, wraps: str | None) -> str | None:
    """What does not happen any more while a name is patched; None when nothing is lost.

    Args:
        name: of the target.
        wraps: whose function stood there, as of `maker`; None: safetensors' own.
    """
    if wraps is None or wraps.partition(".")[0] in KNOWN:
        return None
    return (
        f"{wraps} stood in the place of {name}, and loads that fastst_patch speeds up do not call"
        f" it. To keep what it does, call patch() before it is put there, or leave {name} out of"
        " patch()'s targets."
    )
