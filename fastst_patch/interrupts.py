"""Code of others that an interrupt must not strike in the middle."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["uninterrupted"]


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until the ``with`` block is over, and then act as it would have.

    For short calls into libraries that hold locks of their own. Python raises KeyboardInterrupt
    between any two instructions of the main thread; between the two locks that tqdm takes, it
    leaves one taken, and the next bar of whatever program waits for ever.
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
