"""Exceptions and warnings of the public API.

Bad *files* raise what stock safetensors raises; the classes here are for bad options, for
``fallback="error"`` and for results that ``verify`` found to differ.
"""

from __future__ import annotations

import sys
import types
import warnings

__all__ = [
    "FallbackWarning",
    "FaststError",
    "NameClashError",
    "OptionError",
    "RankError",
    "UntestedVersionWarning",
    "warn_caller",
]


class FaststError(Exception):
    """Base class of every error that fastst_patch itself raises."""


class OptionError(FaststError, ValueError):
    """An option has a bad name or value; the message names it and what is allowed."""


class NameClashError(FaststError, ValueError):
    """Two of the files that are loaded together hold a tensor of the same name."""


class RankError(FaststError):
    """A load by several ranks failed on one of them, and therefore on all.

    Attributes:
        rank: in the process group; None when it is not known which rank is gone.
        cause: text of the error there. On that rank ``__cause__`` is the exception itself.
    """

    def __init__(self, rank: int | None, cause: str) -> None:
        super().__init__(cause if rank is None else f"rank {rank}: {cause}")
        self.rank = rank
        self.cause = cause

    def __reduce__(self) -> tuple[type[RankError], tuple[int | None, str]]:
        """Pickle the arguments: torch sends exceptions between processes."""
        return type(self), (self.rank, self.cause)


class FallbackWarning(UserWarning):
    """A call went to stock safetensors; the message says why (``fallback="warn"``)."""


class UntestedVersionWarning(UserWarning):
    """An installed dependency is outside the range that the tests cover."""


_BETWEEN = ("fastst_patch", "wrapt", "importlib", "contextlib")


def warn_caller(text: str, category: type[Warning]) -> None:
    """Warn at the line of the program that called us, directly or by an import."""
    frame: types.FrameType | None = sys._getframe()
    level = 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        # `warnings.warn` does not count the import system's frames either.
        level += "importlib._bootstrap" not in frame.f_code.co_filename
        frame = frame.f_back
    warnings.warn(text, category, stacklevel=level + 1)


class Fallback(Exception):  # noqa: N818 - internal control flow, not an error
    """The fast path might differ from stock, so stock does the call. Never leaves the package."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    @classmethod
    def alone(cls, error: Exception) -> Fallback:
        """An exception as a Fallback without a traceback, cause or context.

        It is used after the ``except`` block. By then the memory of the failed attempt is free,
        and an exception of stock's has none of ours as its context.
        """
        if isinstance(error, Fallback):
            fallback = error
        elif isinstance(error, MemoryError):
            fallback = cls(f"not enough memory: {error}")
        else:
            fallback = cls(f"{type(error).__name__}: {error}")
        fallback.__cause__ = fallback.__context__ = None
        return fallback.with_traceback(None)
