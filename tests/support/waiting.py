"""Waiting: for workers in the background, and for threads of a test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


def until(condition: Callable[[], bool], seconds: float = 120.0) -> bool:
    """Whether a condition holds before a limit that is only there against hanging.

    Beside other programs a virtual disk was seen to stand still for half a minute.
    """
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(0.005)
    return True


def in_threads(work: Callable[[], object], count: int) -> None:
    """Run the same function in several threads at once, to the end of all."""
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
