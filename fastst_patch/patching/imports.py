"""Calls when modules have been imported.

Python holds one lock of all imports while a finder looks for a module. So ours imports nothing: it
would wait, with that lock held, for a module that another thread is importing, which may be waiting
for the lock. Hooks run when the module has been executed, without it. wrapt has such hooks, but
importing it takes longer than all of ours, as it imports asyncio.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

__all__ = ["is_being_imported", "when_imported"]

_hooks: dict[str, list[Callable[[Any], None]]] = {}
"""By module. They are never removed: a module may be executed again."""


def when_imported(module_name: str, hook: Callable[[Any], None] | None = None) -> None:
    """Have a hook called with a module whenever it has been executed, from now on.

    It runs inside the import, also inside ``importlib.reload``, and must not raise.

    Args:
        module_name: of the module.
        hook: None: those given before are to be called, also if our finder was removed since.
    """
    if hook is not None:
        _hooks.setdefault(module_name, []).append(hook)
    if _finder not in sys.meta_path:
        # Never removed: another thread that goes through the list would skip a finder.
        sys.meta_path.insert(0, _finder)


def is_being_imported(module_name: str) -> bool:
    """Whether a thread has begun to import a module, which may be past our finder."""
    module = sys.modules.get(module_name)
    if module is not None:
        return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))
    return module_name in getattr(sys.modules["_frozen_importlib"], "_module_locks", ())


class _Loader:
    """Has another loader load a module, and calls the hooks then."""

    def __init__(self, name: str, loader: Any) -> None:
        self._name, self._loader = name, loader

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # some look whether it is a SourceFileLoader
        return type(self._loader)

    def __getattr__(self, name: str) -> Any:
        if name in ("_name", "_loader"):  # a copy that is not made yet
            raise AttributeError(name)
        return getattr(self._loader, name)

    def exec_module(self, module: Any) -> None:
        spec: Any = getattr(module, "__spec__", None)
        with contextlib.suppress(AttributeError):  # some modules take none
            if getattr(module, "__loader__", None) is self:
                module.__loader__ = self._loader
            if getattr(spec, "loader", None) is self:
                spec.loader = self._loader
        self._loader.exec_module(module)
        for hook in tuple(_hooks[self._name]):
            hook(sys.modules.get(self._name, module))


class _Looking(threading.local):
    """Modules that this thread looks for: other finders may ask all finders, and so ours."""

    def __init__(self) -> None:
        self.names: set[str] = set()


class _Finder:
    """Finds modules by the finders behind it, and has the hooks called."""

    def __init__(self) -> None:
        self._looking = _Looking()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        looking = self._looking.names
        if name not in _hooks or name in looking:
            return None
        looking.add(name)
        try:
            return self._find(name, path, target)
        finally:
            looking.discard(name)

    def _find(self, name: str, path: Any, target: Any) -> ModuleSpec | None:
        finders: list[Any] = list(sys.meta_path)
        if self in finders:  # else another finder keeps ours
            finders = finders[finders.index(self) + 1 :]
        for finder in finders:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module") and not isinstance(spec.loader, _Loader):
                    spec.loader = _Loader(name, spec.loader)  # type: ignore[assignment]
                return spec
        return None


_finder: Any = _Finder()
