"""Errors of files, told with the file, the tensor, the cause, and what to do about it.

The exception's type stays the one that stock safetensors raises.
"""

from __future__ import annotations

import errno
import traceback

from .. import stock

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
    """An exception of the same type that also says where it happened and what to do.

    Args:
        error: that was raised.
        path: of the file.
        tensor: that was wanted; None when the file was being opened.

    Returns:
        A new exception caused by ``error``; ``error`` itself where its type takes no text.
    """
    # A traceback keeps frames, and these the memory that was to be filled.
    traceback.clear_frames(error.__traceback__)
    what = f"tensor {tensor!r} of {path}" if tensor is not None else path
    cause = _cause(error)
    text = f"{what} could not be {'loaded' if tensor is not None else 'opened'}: {cause}"
    todo = _todo(error)
    if todo is not None:
        text += f"; {todo}"
    try:
        if isinstance(error, OSError) and error.errno is not None:
            new: Exception = OSError(error.errno, text, path)
        else:
            new = type(error)(text)
    except Exception:  # a type that wants other arguments
        return error
    new.__cause__ = error
    new.__suppress_context__ = True
    return new


def _cause(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _todo(error: Exception) -> str | None:
    if isinstance(error, MemoryError):
        return _REMEDIES[errno.ENOMEM]
    if isinstance(error, FileNotFoundError):
        return _REMEDIES[errno.ENOENT]
    if isinstance(error, OSError) and error.errno is not None:
        return _REMEDIES.get(error.errno)
    if isinstance(error, stock.SafetensorError):
        return "the file is damaged or incomplete: download or write it again"
    return None
