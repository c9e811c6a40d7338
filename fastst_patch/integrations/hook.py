"""How an integration names the functions that it wraps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

__all__ = ["Hook", "Integration"]


@dataclasses.dataclass(frozen=True)
class Hook:
    """One function or class to replace.

    Attributes:
        package: the package that it belongs to.
        module: dotted name.
        name: in the module; ``Class.method`` for a method.
        fast: called as ``fast(original, args, kwargs)``.
        parameters: the original's signature must begin with these; empty: it is not checked.
        elsewhere: replace it also in other modules that have imported it.
    """

    package: str
    module: str
    name: str
    fast: Callable[[Any, Any, Any], Any]
    parameters: tuple[str, ...] = ()
    elsewhere: bool = True


@dataclasses.dataclass(frozen=True)
class Integration:
    """A target of ``patch()`` that an integration defines.

    Attributes:
        name: of the target.
        summary: which work becomes faster, and how.
        tested: package, oldest and newest version.
        hooks: replaced together, or not at all.
        unreached: says what to tell a program whose library will load in a process that is not
            patched; None where there is nothing to tell.
    """

    name: str
    summary: str
    tested: tuple[str, str, str]
    hooks: tuple[Hook, ...]
    unreached: Callable[[], str | None] | None = None
