"""Warnings of `patch()`, once each: at once, or when the package they are of is imported."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterable

from ..config import misspelt_variables
from ..errors import FallbackWarning, warn_caller
from ..integrations import INTEGRATIONS
from .imports import when_imported
from .targets import TESTED, warn_of_untested

__all__ = ["say_once", "warn_of_other_processes", "warn_of_this_process", "watch"]

_log = logging.getLogger("fastst_patch")


@functools.cache
def say_once(text: str) -> None:
    """Warn, once in a process."""
    warn_caller(f"fastst_patch: {text}", FallbackWarning)


def warn_of_this_process() -> None:
    """Warn of misspelt options, and of untested versions of what has been imported."""
    for text in misspelt_variables():
        warn_caller(f"fastst_patch: {text}", UserWarning)
    _warn_of_untested()


def _warn_of_untested() -> None:
    for package, (oldest, newest) in TESTED.items():
        if package in sys.modules:  # to ask for the versions of others may take long
            warn_of_untested(package, oldest, newest)


def warn_of_other_processes(targets: Iterable[str]) -> None:
    """Warn where a library of these targets will load in processes that are not patched."""
    for integration in INTEGRATIONS:
        if integration.unreached is not None and integration.name in targets:
            text = integration.unreached()
            if text is not None:
                say_once(text)


def watch(used: Callable[[], Iterable[str]]) -> None:
    """Give the same warnings of packages that are imported later.

    Args:
        used: names of the targets in use then.
    """
    owners = {found.hooks[0].package for found in INTEGRATIONS if found.unreached is not None}

    def warn(_: object) -> None:
        names = list(used())
        try:
            if names:
                _warn_of_untested()
            warn_of_other_processes(names)
        except Warning as error:  # an error here; the program's import is not to fail of it
            _log.warning("%s", error)

    for package in {*TESTED, *owners} - sys.modules.keys():
        when_imported(package, warn)
