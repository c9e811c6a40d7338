"""``fastst-patch remote URL``: prints the path of a folder that stands for a remote model."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from ..config import config_context, misspelt_variables
from ..errors import FaststError, OptionError
from ..terminal import say

__all__ = ["main"]


def main(url: str, revision: str | None, cache: str | None, options: Mapping[str, str]) -> int:
    """Make the folder and print its path, alone on standard output.

    Returns:
        0; 1 where it cannot be made, and 2 where an option is wrong, with one line on stderr.
    """
    for warning in misspelt_variables():
        say(f"fastst-patch remote: {warning}", sys.stderr)
    try:
        from ..sources.folder import remote
        from ..stock import SafetensorError
    except ImportError as error:  # safetensors is missing
        say(f"fastst-patch remote: {error}", sys.stderr)
        return 1
    try:
        with config_context(**options):  # type: ignore[arg-type] # text, read as the environment
            path = remote(url, revision=revision, cache=cache)
    except (FaststError, OSError, ImportError, SafetensorError) as error:
        say(f"fastst-patch remote: {error}", sys.stderr)
        return 2 if isinstance(error, OptionError) else 1
    except KeyboardInterrupt:
        return 130  # as shells report SIGINT
    print(path, flush=True)
    return 0
