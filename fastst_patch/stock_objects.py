"""Safetensors' own functions and classes, found behind what stands in their place.

Nothing here imports safetensors when it is imported: hooks that run inside safetensors' import need
it, and `stock`, which imports safetensors, may be waiting for that import then.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import operator
import os
import sys
import types
from typing import Any

__all__ = ["call", "extension_class", "original", "own", "trimmed", "unwrapped"]

_classes: dict[str, Any] = {}


def unwrapped(value: Any) -> Any:
    """The object behind wrapt proxies, ours and others'."""
    while hasattr(type(value), "__wrapped__") and hasattr(value, "__wrapped__"):
        value = value.__wrapped__
    return value


def extension_class(name: str) -> Any:
    """A class of safetensors' extension, also where other code has replaced it even there.

    None where the installed version has no such class.
    """
    if name in _classes:
        return _classes[name]
    extension = sys.modules.get("safetensors._safetensors_rust")
    found = unwrapped(getattr(extension or sys.modules.get("safetensors"), name, None))
    known = (found, *object.__subclasses__())
    found = next((one for one in known if _is_of_extension(one, name)), found)
    if extension is not None:  # else its import may not have come so far
        _classes[name] = found
    return found


def _is_of_extension(value: Any, name: str) -> bool:
    return (
        type(value) is type
        and value.__name__ == name
        and value.__module__.partition(".")[0] in ("builtins", "safetensors")
    )


def own(value: Any) -> bool:
    """Whether safetensors itself defines a class or function, and not code that has replaced it."""
    if type(value) is types.FunctionType:  # __module__ may be copied from what it wraps
        return str(value.__globals__.get("__name__")).partition(".")[0] == "safetensors"
    classes = extension_class("safe_open"), extension_class("_safe_open_handle")
    return value is not None and any(value is one for one in classes)


def original(module_name: str, name: str) -> Any:
    """The unpatched object behind a name of a module, or of a class in it (``Module.to``).

    Of safetensors it is its own object, also where other code has replaced it.

    Raises:
        AttributeError: the installed version has no such name.
        ImportError: its module cannot be imported.
    """
    # Not by an import when the module is there: a thread that is importing it may be waiting for
    # us in a post-import hook.
    module = sys.modules.get(module_name) or importlib.import_module(module_name)
    value = unwrapped(operator.attrgetter(name)(module))
    if module_name.partition(".")[0] != "safetensors":
        return value
    if module_name == "safetensors":
        return extension_class(name)
    for _ in range(32):  # some wrappers wrap themselves
        if own(value):
            return value
        value = getattr(value, "__wrapped__", None)
    return getattr(_copy(module_name), name)


@functools.cache
def _copy(module_name: str) -> types.ModuleType:
    """A module of safetensors once more, from its source; nobody else knows it."""
    spec = importlib.util.spec_from_file_location(module_name, sys.modules[module_name].__file__)
    if spec is None or spec.loader is None:
        raise ImportError(f"{module_name} has no source to read", name=module_name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(function: Any, args: Any, kwargs: Any) -> Any:
    """Call a function of stock, or one of torch that stock calls in the same case.

    This frame raises nothing of its own: `trimmed` recognizes their exceptions by it.
    """
    return function(*args, **kwargs)


_PACKAGE = os.path.dirname(__file__) + os.sep


def trimmed(error: BaseException) -> BaseException:
    """An exception, just caught, without our frames in its traceback.

    An exception that our own code raised keeps them, since they show the bug. Frames of other
    packages are never left out.
    """
    kept, last = [], None
    trace = error.__traceback__
    while trace is not None:
        last = trace.tb_frame.f_code
        if not last.co_filename.startswith(_PACKAGE):
            kept.append(trace)
        trace = trace.tb_next
    if last is None or (last.co_filename.startswith(_PACKAGE) and last is not call.__code__):
        return error
    for found in reversed(kept):
        trace = types.TracebackType(trace, found.tb_frame, found.tb_lasti, found.tb_lineno)
    return error.with_traceback(trace)
