"""How an integration names the functions that it wraps, and what replaces them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
import sys
from collections.abc import Callable
from typing import Any

from ..config import current
from ..errors import FaststError
from ..locks import Carried

__all__ = ["Fast", "Hook", "Integration", "Late", "whole"]

Fast = Callable[[Any, Any, Any], Any]
"""Does a call instead of the original: ``fast(original, args, kwargs)``."""

_log = logging.getLogger("fastst_patch")
_importing = Carried()


def whole(name: str) -> Any:
    """Import a module of this package that loads need, with no fork meanwhile.

    The child would find modules half imported, and wait for them for ever.
    """
    importlib.import_module("safetensors")  # now: hooks of its import take other locks
    with _importing.lock():
        return importlib.import_module(name)


@functools.cache
def _say_once(text: str) -> None:
    _log.warning("%s", text)


class Late:
    """A function of this package, whose module is imported when it is first called.

    So ``patch()`` imports nothing that a program may never use. Where the import fails, as after
    an upgrade of the package beneath a running process, the original does the call.

    Attributes:
        function: does the call; once it is imported, without a detour.
    """

    __slots__ = ("_module", "_name", "function")

    def __init__(self, module: str, name: str) -> None:
        """Name a function.

        Args:
            module: in this package, such as ``dropin.handle``.
            name: of the function in it.
        """
        self._module, self._name = module, name
        self.function: Fast = self._first

    def __call__(self, original: Any, args: Any, kwargs: Any) -> Any:
        """Do a call."""
        return self.function(original, args, kwargs)

    def _first(self, original: Any, args: Any, kwargs: Any) -> Any:
        # torch may be in the middle of its import, and torch.compile cannot trace one of ours.
        compiler = getattr(sys.modules.get("torch"), "compiler", None)
        if compiler is not None and compiler.is_compiling():
            return original(*args, **kwargs)
        function = self.imported()
        return original(*args, **kwargs) if function is None else function(original, args, kwargs)

    def imported(self) -> Fast | None:
        """The function; None, and a line in the log, where it cannot be imported.

        Raises:
            FaststError: that, with ``fallback="error"``.
        """
        name = f"{__package__.partition('.')[0]}.{self._module}"
        try:
            self.function = getattr(whole(name), self._name)
        except Exception as error:
            text = f"{name} cannot be imported: {type(error).__name__}: {error}"
            if current().fallback == "error":
                raise FaststError(text) from error
            _say_once(f"{text}; the original does such calls")
            return None
        return self.function


@dataclasses.dataclass(frozen=True)
class Hook:
    """One function or class to replace.

    Attributes:
        package: the package that it belongs to.
        module: dotted name.
        name: in the module; ``Class.method`` for a method.
        fast: called in its place.
        parameters: the original's signature must begin with these; empty: it is not checked.
        elsewhere: replace it also in other modules that have imported it.
    """

    package: str
    module: str
    name: str
    fast: Fast
    parameters: tuple[str, ...] = ()
    elsewhere: bool = True


@dataclasses.dataclass(frozen=True)
class Integration:
    """A target of ``patch()`` for a library that needs more than safetensors' own names.

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
