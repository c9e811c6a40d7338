"""Locks that a forked child never inherits held by a thread it does not have."""

from __future__ import annotations

import os
import threading

__all__ = ["fork_safe"]


def fork_safe(lock: threading.Lock | threading.RLock) -> None:
    """Carry a lock through every fork, for as long as the process lives."""
    if hasattr(os, "register_at_fork"):  # there is no fork elsewhere
        os.register_at_fork(
            before=lock.acquire,
            after_in_parent=lock.release,
            after_in_child=lock.release,
        )
