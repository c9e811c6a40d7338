"""The one exception the bench shows to its user as a line instead of a traceback."""

from __future__ import annotations

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # as shells report SIGINT


class BenchError(Exception):
    """What went wrong, with which file, and what to do about it."""

    exit_code = EXIT_FAILED


class UsageError(BenchError):
    """The measurement asked for is impossible here; nothing was measured."""

    exit_code = EXIT_USAGE
