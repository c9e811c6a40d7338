"""Errors of files, whose text names the file, the tensor, the cause and a remedy.

The exception's type stays the one that stock safetensors raises.
"""

from __future__ import annotations

import errno
import traceback

from .. import stock
from ..sources.base import RemoteError

__all__ = ["explained"]

_REMEDIES = {
    errno.ENOENT: "check the path, and that all shards of the model were downloaded",
    errno.EACCES: "check the permissions of the file and of its folders",
    errno.EPERM: "check the permissions of the file and of its folders",
    errno.EISDIR: "give the path of a file, not of a folder",
    errno.ENODEV: "give the path of a file, not of a folder",
    errno.EIO: "the storage failed; look at the kernel's log, and try another copy of the file",
    errno.EMFILE: "close files, or raise the limit of open files (ulimit -n)",
    errno.ENOMEM: "free memory, or set a smaller device_memory_budget",
}


def explained(error: Exception, path: str, tensor: str | None = None) -> Exception:
    """An exception of the same type whose text names the place and a remedy.

    Args:
        error: the original exception.
        path: of the file.
        tensor: the requested tensor; None when the file was being opened.

    Returns:
        A new exception caused by ``error``; ``error`` itself where its type takes no text.
    """
    if isinstance(error, RemoteError):  # it names the place and a remedy
        return error
    # The frames of the traceback refer to the memory that was to be filled.
    traceback.clear_frames(error.__traceback__)
    place = f"tensor {tensor!r} of {path}" if tensor is not None else path
    cause = _cause(error)
    text = f"{place} could not be {'loaded' if tensor is not None else 'opened'}: {cause}"
    remedy = _remedy(error)
    if remedy is not None:
        text += f"; {remedy}"
    try:
        if isinstance(error, OSError) and error.errno is not None:
            new: Exception = OSError(error.errno, text, path)
        else:
            new = type(error)(text)
    except Exception:  # its type takes other arguments
        return error
    new.__cause__ = error
    new.__suppress_context__ = True
    return new


def _cause(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _remedy(error: Exception) -> str | None:
    if isinstance(error, MemoryError):
        return _REMEDIES[errno.ENOMEM]
    if isinstance(error, FileNotFoundError):
        return _REMEDIES[errno.ENOENT]
    if isinstance(error, OSError) and error.errno is not None:
        return _REMEDIES.get(error.errno)
    if isinstance(error, stock.SafetensorError):
        return "the file is damaged or incomplete: download or write it again"
    return None
