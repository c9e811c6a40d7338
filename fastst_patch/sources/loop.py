"""One thread with an event loop for obstore's requests, while a source needs it.

obstore's blocking calls outlive Ctrl-C. Its asynchronous ones are tasks here, which any thread can
cancel.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from ..locks import Carried
from .retry import Failure, Flight

__all__ = ["acquire", "release", "wait_for"]

_T = TypeVar("_T")


class _Loop:
    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.users = 0
        self.thread = threading.Thread(target=self._run, name="fastst-remote", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
            left = asyncio.all_tasks(self.loop)
            for task in left:
                task.cancel()
            if left:
                self.loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        finally:
            self.loop.close()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        # `join` would make a record of each of the engine's threads that calls it, and keep it.
        while self.thread.is_alive() and threading.get_ident() != self.thread.ident:
            time.sleep(0.0005)


_lock = Carried()
_current: _Loop | None = None
_first_process: int | None = None  # where obstore was used first


def _forked() -> Failure:
    return Failure(
        "this process was forked from one that had used obstore, whose threads do not survive a"
        " fork",
        remedy="start processes by 'spawn' or 'forkserver', or open object stores only in them",
    )


def acquire() -> None:
    """Start the thread, or share it. Each call is paired with one of `release`.

    Raises:
        Failure: in a forked child whose parent used obstore: its threads are not in the child, and
            requests would never end.
    """
    global _current, _first_process  # noqa: PLW0603 - one thread for the process
    with _lock.lock():
        _first_process = _first_process or os.getpid()
        if _first_process != os.getpid():
            raise _forked()
        if _current is None:
            _current = _Loop()
        _current.users += 1


def release() -> None:
    """Let go of the thread; the last one ends it."""
    global _current
    if _first_process != os.getpid():
        return
    with _lock.lock():
        ended = None
        if _current is not None:
            _current.users -= 1
            if _current.users <= 0:
                ended, _current = _current, None
    if ended is not None:
        ended.stop()


def wait_for(
    work: Callable[[], Coroutine[Any, Any, _T]], flight: Flight | None, seconds: float, late: str
) -> _T:
    """Run a coroutine in the thread, and wait for its result.

    Args:
        work: makes the coroutine.
        flight: through which another thread cancels it; None for nothing.
        seconds: after which it is cancelled.
        late: what the failure says then.

    Raises:
        Failure: it took too long, was cancelled, or the thread has ended.
    """
    if _first_process != os.getpid():
        raise _forked()
    current = _current
    if current is None:
        raise Failure("cancelled")
    failure: Failure | None = None
    task = asyncio.run_coroutine_threadsafe(work(), current.loop)
    try:
        if flight is not None:
            flight.on_abort(task.cancel)
        return task.result(seconds)
    except (TimeoutError, concurrent.futures.TimeoutError):
        failure = Failure(late, retry=True, remedy="check the network")
    except (concurrent.futures.CancelledError, asyncio.CancelledError):
        failure = Failure("cancelled")
    finally:
        task.cancel()  # without effect where it is done; after Ctrl-C, too
        if flight is not None:
            flight.on_abort(None)
    raise failure
