"""The only importer of the native extension, and the exceptions that its errors become.

=====================  =====================================================================
native code            Python
=====================  =====================================================================
FST_FALLBACK           `Fallback`: the caller asks stock
FST_E_DEVICE           `Fallback`: stock uses the same device, and raises torch's own exception
FST_E_PYTHON           `Fallback`: torch or NumPy refused, and raises its own exception to stock
FST_E_SYS              OSError with errno, file and offset (a cancelled load: see `Job.wait`)
FST_E_NOMEM            MemoryError
FST_E_TRUNCATED        safetensors.SafetensorError
FST_E_FEED             what the source of a remote file raised (`keep_failure`)
FST_E_INVALID, other   FaststError (a bug of ours)
=====================  =====================================================================
"""

from __future__ import annotations

import copy
import errno
import itertools
import sys
from pathlib import Path
from typing import Any

from ..errors import Fallback, FaststError

__all__ = ["ffi", "keep_failure", "lib", "native_error", "native_file", "place_for", "raise_"]

try:
    from .._native import ffi, lib

    _native_error: str | None = None
except ImportError as error:  # no compiler at install time, or another platform
    import sysconfig  # only here: it takes 0.3 ms

    ffi = lib = None
    _native_error = f"the native extension cannot be loaded: {error}"
    _root = Path(__file__).parents[2]
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        _native_error = (
            "there is no native engine for free-threaded Python, whose lock it relies on: use a"
            " regular build of Python"
        )
    elif (_root / "build_native.py").exists():
        _native_error += (
            f"; {_root} is the source folder, in which nothing is built: run Python in another"
            " one, to use what `pip install .` has installed, or `pip install -e .`"
        )


def native_error() -> str | None:
    """Why the native engine cannot be used here; None when it can."""
    return _native_error


def native_file() -> str | None:
    """Path of the loaded extension."""
    if _native_error is not None:
        return None
    native: Any = sys.modules[f"{__package__.rpartition('.')[0]}._native"]
    return str(native.__file__)


def place_for(kind: str) -> Any:
    """Memory for the pointer to a native object: a file, an arena, a layout or a job.

    The object is released with this memory. So it does not leak if a signal handler raises between
    the call that creates it and the next line of Python.
    """
    return ffi.gc(ffi.new(f"fst_{kind} **"), getattr(lib, f"fst_{kind}_release"))


_FAILURES = 256
_failures: dict[int, BaseException] = {}  # by number, the newest last
_numbers = itertools.count(1)


def keep_failure(error: BaseException) -> int:
    """Keep an exception that a callback raised in a thread of the engine, for `raise_`.

    Only the newest are kept: nobody may ever wait for the read that failed.

    Returns:
        Its number, which the callback gives to the engine.
    """
    number = next(_numbers) % (1 << 31) or keep_failure(error)
    link: BaseException | None = error
    while link is not None:  # their frames refer to memory and connections
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    _failures[number] = error
    for old in list(_failures)[:-_FAILURES]:
        _failures.pop(old, None)
    return number


def _failure(number: int, message: str) -> BaseException:
    """A copy of an exception that was kept: raising it adds the caller's frames to it.

    Several threads may wait for one read, and each gets one.
    """
    kept = _failures.get(number)
    if kept is None:
        return OSError(errno.EIO, message)
    try:
        result = copy.copy(kept)
    except Exception:  # its class takes other arguments
        return OSError(errno.EIO, f"{message}: {kept}")
    result.__cause__, result.__context__ = kept.__cause__, kept.__context__
    result.__suppress_context__ = kept.__suppress_context__
    return result


def raise_(err: Any, filename: str | None = None, *, about: str = "") -> None:
    """Raise the exception of a filled-in ``fst_error``, by the table at the top.

    Args:
        err: the error.
        filename: attribute of an OSError.
        about: the file, for a MemoryError whose message does not name it.
    """
    code, message = err.code, ffi.string(err.message).decode("utf-8", "replace")
    if code in (lib.FST_FALLBACK, lib.FST_E_DEVICE, lib.FST_E_PYTHON):
        raise Fallback(message)
    if code == lib.FST_E_SYS:
        raise OSError(err.sys_errno, message, filename)
    if code == lib.FST_E_NOMEM:
        about = about or filename or ""
        raise MemoryError(message if about in message else f"{about}: {message}")
    if code == lib.FST_E_FEED:
        raise _failure(err.sys_errno, message)
    if code == lib.FST_E_TRUNCATED:
        from safetensors import SafetensorError

        raise SafetensorError(message)
    raise FaststError(message)
