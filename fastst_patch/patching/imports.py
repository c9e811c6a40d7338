"""Calls when modules have been imported.

wrapt makes them. Importing wrapt takes longer than all of ours, as it imports asyncio, so it is
imported when the first of the packages that we wait for is looked for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from typing import Any

__all__ = ["when_imported"]

_log = logging.getLogger("fastst_patch")

_waiting: dict[str, list[tuple[Callable[[Any], None], str]]] = {}
"""By package: hooks that wrapt has not got yet, each with the name of its module."""


def when_imported(module_name: str, hook: Callable[[Any], None]) -> None:
    """Have a hook called with a module when it has been imported, or now if it was.

    The hook may be called twice. It runs inside the import, and must not raise.

    Raises:
        ImportError: of wrapt.
    """
    package = module_name.partition(".")[0]
    _waiting.setdefault(package, []).append((hook, module_name))
    if _finder not in sys.meta_path:
        # Never removed: another thread that goes through the list would skip a finder.
        sys.meta_path.insert(0, _finder)
    if package in sys.modules or "wrapt" in sys.modules:
        _hand_over(package)


def _hand_over(package: str) -> None:
    """Give the hooks of a package to wrapt.

    Several threads may do so at a time. A hook leaves the list after wrapt has got it, so that
    none of them goes on to import the package before that; wrapt may get it twice.
    """
    hooks = _waiting[package]
    if not hooks:
        return
    import wrapt

    for entry in list(hooks):
        hook, module_name = entry
        wrapt.register_post_import_hook(hook, module_name)
        with contextlib.suppress(ValueError):
            hooks.remove(entry)


class _Finder:
    """Finds nothing itself: has wrapt imported in time."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not _waiting.get(name):
            return None
        try:
            _hand_over(name)
        except ImportError as error:  # the program's import is not to fail of it
            _waiting[name].clear()
            _log.warning("%s is not patched: wrapt cannot be imported: %s", name, error)
            return None
        return importlib.util.find_spec(name)  # wrapt's finder stands before all others now


_finder: Any = _Finder()
