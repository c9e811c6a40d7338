"""Calls into other libraries that Ctrl-C must not interrupt."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["uninterrupted"]


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C until the ``with`` block is over.

    For short calls into libraries that hold locks of their own. Python raises KeyboardInterrupt
    between any two instructions of the main thread. Between the two locks that tqdm takes, it
    leaves one taken, and the program's next bar waits forever.
    """
    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.getsignal(signal.SIGINT)
    if not callable(before):  # not ours to replace, or raises nothing
        yield
        return
    struck: list[FrameType | None] = []
    signal.signal(signal.SIGINT, lambda _number, frame: struck.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if struck:
            before(signal.SIGINT, struck[0])
