"""What a terminal can show, and whether our own command runs in this process.

Every `import fastst_patch` imports this module, so modules whose import takes milliseconds are
imported when they are used.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import IO

__all__ = ["is_our_command", "marks", "nearest", "say", "width", "wrapped"]

_MARKS = {"ok": "✓", "warn": "!", "bad": "✗"}
_ASCII_MARKS = {"ok": "ok", "warn": "!", "bad": "x"}


def width() -> int:
    """Columns of the terminal, or of ``COLUMNS``; 80 where the output is piped."""
    import shutil

    return max(40, shutil.get_terminal_size((80, 24)).columns)


def marks(stream: IO[str] | None = None) -> dict[str, str]:
    """Marks for ``ok``, ``warn`` and ``bad``: ASCII where the stream cannot show others."""
    encoding = getattr(stream or sys.stdout, "encoding", None) or "ascii"
    try:
        "".join(_MARKS.values()).encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return _ASCII_MARKS
    return _MARKS


def say(text: str, stream: IO[str] | None = None) -> None:
    """Print text; characters that the stream's encoding lacks are escaped."""
    stream = sys.stdout if stream is None else stream
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def wrapped(lines: Iterable[str], columns: int) -> Iterator[str]:
    """Break lines that are too long; the rest of a line is indented by four more columns.

    A word longer than a line stays whole, so that a path can be copied.
    """
    import textwrap

    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()) + 4)
        yield from textwrap.wrap(
            line, columns, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False,
            drop_whitespace=True, replace_whitespace=False,
        ) or [""]  # fmt: skip


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most similar to another; None when none is similar."""
    import difflib

    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def is_our_command() -> bool:
    """Whether this process is ``fastst-patch``, or ``python -m fastst_patch``."""
    if sys.argv[:1] == ["-m"]:  # Python imports the package before it sets the path of __main__
        pairs = zip(sys.orig_argv, [*sys.orig_argv[1:], ""], strict=True)
        return any(
            (flag.endswith("m") and name in ("fastst_patch", "fastst_patch.__main__"))
            or flag == "-mfastst_patch"
            for flag, name in pairs
            if flag.startswith("-")
        )
    return os.path.basename((sys.argv or [""])[0]) == "fastst-patch"
