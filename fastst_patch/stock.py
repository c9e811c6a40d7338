"""The installed safetensors, as it is without a patch, ours or others'.

All calls to stock go through this module, so that our code never calls our own wrappers.
Importing safetensors does not import torch; ``safetensors.torch`` does, and only functions that
need it import it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import safetensors

from .stock_objects import call, extension_class, original, own, trimmed, unwrapped

__all__ = [
    "HANDLE_METHODS",
    "SafetensorError",
    "Signature",
    "call",
    "load_file",
    "load_model",
    "original",
    "own",
    "safe_open",
    "trimmed",
    "unwrapped",
    "with_globals",
]


class Signature(inspect.Signature):
    """The signature of a function of stock, which is looked at when it is needed.

    Importing ``safetensors.torch`` for it earlier would import torch.
    """

    def __init__(self, module_name: str, name: str) -> None:
        super().__init__()
        self._place = (module_name, name)

    def _found(self) -> inspect.Signature:
        try:
            return inspect.signature(original(*self._place))
        except (ImportError, ValueError):  # torch is missing, or the function shows no signature
            return inspect.signature(call)

    @property
    def parameters(self) -> types.MappingProxyType[str, inspect.Parameter]:
        """As of the function."""
        return self._found().parameters

    @property
    def return_annotation(self) -> Any:
        """As of the function."""
        return self._found().return_annotation

    def replace(self, **changes: Any) -> Any:
        """A plain signature with some changes."""
        return self._found().replace(**changes)

    def __reduce__(self) -> Any:
        """Pickle as a plain signature."""
        return self._found().__reduce__()


SafetensorError: type[Exception] = safetensors.SafetensorError
safe_open: Any = extension_class("safe_open")
safe_open_handle: Any = extension_class("_safe_open_handle")

HANDLE_METHODS = frozenset(name for name in dir(safe_open) if not name.startswith("_"))
"""Public methods of the installed version's handle; our handle has the same."""

BACKENDS = "backend" in str(getattr(safe_open, "__text_signature__", ""))
"""Whether this version knows ``backend=`` (0.8 and later)."""


def small_file(header: bytes, nbytes: int = 0) -> contextlib.AbstractContextManager[Any]:
    """A file in memory with this header and zeros behind it, to see what stock does with it.

    The zeros may stand for the bytes of a model. Otherwise as `hollow_file`.
    """
    begin = len(header).to_bytes(8, "little") + header
    return hollow_file(begin, len(begin) + nbytes)


@contextlib.contextmanager
def hollow_file(begin: bytes, nbytes: int) -> Iterator[Any]:
    """A file in memory that begins so, with a hole behind it: for what stock says of a header.

    Has ``name`` and ``fileno`` as a file object has.

    Args:
        begin: its first bytes.
        nbytes: its size. The hole takes no memory.

    Raises:
        OSError: no descriptor is left, or the size is too large.
    """
    fd = os.memfd_create("fastst_patch question", os.MFD_CLOEXEC)
    try:
        os.write(fd, begin)
        os.ftruncate(fd, nbytes)
        yield types.SimpleNamespace(name=f"/proc/self/fd/{fd}", fileno=lambda: fd)
    finally:
        os.close(fd)


def any_framework() -> str:
    """One that is there, where its name makes no difference; importing torch takes seconds."""
    return "pt" if "torch" in sys.modules else "np"


def opens(header: bytes, framework: str | None = None) -> bool:
    """Whether stock opens a file with this header and nothing behind it."""
    try:
        with small_file(header) as file, safe_open(file.name, framework or any_framework()):
            return True
    except Exception:  # of any class; the user's own call to stock raises it again
        return False


def loaded(header: bytes, nbytes: int, framework: str) -> Any:
    """Tensor ``x`` of a file with this header and zeros behind it. Raises what stock raises."""
    with small_file(header, nbytes) as file, safe_open(file.name, framework) as opened:
        return opened.get_tensor("x")


def loads(header: bytes, nbytes: int) -> bool:
    """Whether stock loads tensor ``x`` of a file with this header and zeros behind it for torch."""
    try:
        loaded(header, nbytes, "pt")
    except Exception:  # of any class; the user's own call to stock raises it again
        return False
    return True


@functools.cache
def slice_class() -> Any:
    """The class of stock's slices, which it does not export."""
    header = b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    with small_file(header, 1) as file, safe_open(file.name, any_framework()) as opened:
        return type(opened.get_slice("x"))


def load_file(*args: Any, **kwargs: Any) -> Any:
    """Stock's ``safetensors.torch.load_file`` over stock's ``safe_open``, under a patch too."""
    return call(
        with_globals(original("safetensors.torch", "load_file"), safe_open=safe_open), args, kwargs
    )


def load_model(fast_load_file: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stock's ``safetensors.torch.load_model`` with another ``load_file`` inside."""
    function = with_globals(original("safetensors.torch", "load_model"), load_file=fast_load_file)
    return call(function, args, kwargs)


def with_globals(function: Any, **replaced: Any) -> Any:
    """A copy of a stock function in which some global names are replaced.

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
