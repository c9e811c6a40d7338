"""The installed safetensors, as it was before anybody patched it.

Everything that asks stock goes through here, so that no wrapper of ours is ever called by
ourselves. Importing safetensors does not import torch; ``safetensors.torch`` does, and is
only touched by functions that need it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import operator
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import safetensors

__all__ = [
    "HANDLE_METHODS",
    "SafetensorError",
    "load_file",
    "load_model",
    "original",
    "safe_open",
    "unwrapped",
    "with_globals",
]


def unwrapped(value: Any) -> Any:
    """What a wrapt proxy of ours (or anybody's) stands for."""
    while hasattr(type(value), "__wrapped__") and hasattr(value, "__wrapped__"):
        value = value.__wrapped__
    return value


SafetensorError: type[Exception] = safetensors.SafetensorError
safe_open: Any = unwrapped(safetensors.safe_open)
safe_open_handle: Any = unwrapped(getattr(safetensors, "_safe_open_handle", None))

HANDLE_METHODS = frozenset(name for name in dir(safe_open) if not name.startswith("_"))
"""Public methods of the installed version's handle; ours has no others."""

BACKENDS = "backend" in str(getattr(safe_open, "__text_signature__", ""))
"""Whether this version knows ``backend=`` (0.8 and later)."""


@functools.cache
def original(module_name: str, name: str) -> Any:
    """The unpatched object behind a name of a module, or of a class in it (``Module.to``).

    Raises:
        AttributeError: the installed version has no such name.
        ImportError: its module cannot be imported.
    """
    # Not through the import system where it can be helped: a thread in the middle of importing
    # the module may be waiting for us in a post-import hook.
    module = sys.modules.get(module_name) or importlib.import_module(module_name)
    return unwrapped(operator.attrgetter(name)(module))


@contextlib.contextmanager
def small_file(header: bytes, nbytes: int = 0) -> Iterator[Any]:
    """A file in memory with this header and zeros behind it, for questions to stock.

    Has ``name`` and ``fileno`` as a file object has.

    Raises:
        OSError: no descriptor is left.
    """
    fd = os.memfd_create("fastst_patch question", os.MFD_CLOEXEC)
    try:
        os.write(fd, len(header).to_bytes(8, "little") + header + b"\0" * nbytes)
        yield types.SimpleNamespace(name=f"/proc/self/fd/{fd}", fileno=lambda: fd)
    finally:
        os.close(fd)


def opens(header: bytes) -> bool:
    """Whether stock opens a file with this header and nothing behind it."""
    try:
        with small_file(header) as file, safe_open(file.name, "pt"):
            return True
    except Exception:  # whatever it raises, the user shall see it from stock
        return False


def loads(header: bytes, nbytes: int) -> bool:
    """Whether stock loads tensor ``x`` of a file with this header and zeros behind it."""
    try:
        with small_file(header, nbytes) as file, safe_open(file.name, "pt") as opened:
            opened.get_tensor("x")
            return True
    except Exception:  # whatever it raises, the user shall see it from stock
        return False


@functools.cache
def slice_class() -> Any:
    """The class of stock's slices, which it does not export."""
    header = b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    with small_file(header, 1) as file, safe_open(file.name, "pt") as opened:
        return type(opened.get_slice("x"))


def call(function: Any, args: Any, kwargs: Any) -> Any:
    """Call stock, from a frame that raises nothing of its own: `trimmed` tells by it."""
    return function(*args, **kwargs)


def trimmed(error: BaseException, package: str) -> BaseException:
    """An exception of stock's, or of the program's, without our frames in its traceback.

    Stays as it is where it was raised by ours: then these frames are what we want to see. Frames
    of others are never left out.

    Args:
        error: just caught.
        package: path of our folder, with a separator at its end.
    """
    kept, last = [], None
    trace = error.__traceback__
    while trace is not None:
        last = trace.tb_frame.f_code
        if not last.co_filename.startswith(package):
            kept.append(trace)
        trace = trace.tb_next
    if last is None or (last.co_filename.startswith(package) and last is not call.__code__):
        return error
    for found in reversed(kept):
        trace = types.TracebackType(trace, found.tb_frame, found.tb_lasti, found.tb_lineno)
    return error.with_traceback(trace)


def load_file(*args: Any, **kwargs: Any) -> Any:
    """Stock's ``safetensors.torch.load_file``, whatever it looks up while we are patched in."""
    return call(with_globals(_torch("load_file"), safe_open=safe_open), args, kwargs)


def load_model(fast_load_file: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stock's ``safetensors.torch.load_model`` with another ``load_file`` inside."""
    function = with_globals(_torch("load_model"), load_file=fast_load_file)
    return call(function, args, kwargs)


def _torch(name: str) -> Any:
    return original("safetensors.torch", name)


def with_globals(function: Any, **replaced: Any) -> Any:
    """A function that sees some other globals: its own code decides everything else.

    Anything but a plain function is returned as it is.
    """
    if not inspect.isfunction(function):
        return function
    copy = type(function)(
        function.__code__,
        {**function.__globals__, **replaced},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
