"""Ends a measurement soon after Ctrl-C, whatever the main thread is doing.

Python runs signal handlers between two of its own instructions, and the main thread may be in a
native read, in ``fsync`` or waiting for memory for many seconds. So a thread is told of signals
too, by the wakeup descriptor. It says at once that we stop, and ends the process where the main
thread has not unwound in time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

__all__ = ["removed", "stopping_soon"]

PATIENCE_S = 1.5
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_folders: set[Path] = set()


@contextlib.contextmanager
def removed(folder: Path) -> Iterator[Path]:
    """Remove a folder when the block ends, or when the process is ended early."""
    _folders.add(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _folders.discard(folder)


@contextlib.contextmanager
def stopping_soon(name: str) -> Iterator[None]:
    """Say "stopping" as a signal arrives within the block, and end two seconds later at most."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    over = threading.Event()
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(name, read, over), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        os.close(write)
        watcher.join()
        os.close(read)


def _watch(name: str, read: int, over: threading.Event) -> None:
    while received := os.read(read, 1):  # empty when the other end is closed
        if received[0] not in _SIGNALS:
            continue
        with contextlib.suppress(OSError, ValueError):
            print(f"\n{name}: stopping...", file=sys.stderr, flush=True)
        if not over.wait(PATIENCE_S):
            for folder in tuple(_folders):
                shutil.rmtree(folder, ignore_errors=True)
            os._exit(128 + received[0])  # children end with us: see `process.end_with_parent`
        return
