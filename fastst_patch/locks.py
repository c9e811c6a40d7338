"""All locks of the package. None waits for its own thread, and a forked child inherits none held.

A signal handler or a finalizer may run between any two instructions of a thread and load a file,
also while that thread holds a lock of ours. So every lock can be taken again by its thread, and
code under a lock allows for nested code of either kind: see the three below. Locks are held by
``with`` on an RLock itself: its ``__enter__`` is C, and no handler can raise between taking the
lock and being inside the block.

===============  ===========================================================================
lock             what it is for
===============  ===========================================================================
`shared`         short sections on state of the process or of several threads. There is only
                 one, so that nested code cannot take two in different orders. A leaf: code
                 under it takes no other lock. Updates are single operations, which nested code
                 cannot see half done, or a flag makes nested code do without the state.
                 At a fork: taken by the forking thread before, so the child finds the state whole
`Carried`        long sections of a module. Made at import; taken before `shared`. Nested code
                 that holds `shared` already lets go of it while it waits.
                 At a fork: like `shared`, in the order `Carried`, `shared`
`Guard`          sections of one object, which start reads. `here.inside` is set in them, so
                 that `interrupted()` is true for nested code, which then uses no guarded state.
                 At a fork: the child gets a new lock, and the object drops its state, which a
                 thread that does not exist in the child may have left half updated
===============  ===========================================================================

The native mutexes (in ``native/job/fst_queue.c`` and ``native/device/fst_{ring,gds,gpu}.c``) need
none of this. No Python code runs while one is held: torch's deleters, which may run any, are called
outside (`fst_arena_release`, `fst_batch_drop`), and workers have all signals blocked and take the
GIL only in the callbacks of remote files, outside as well. In a forked child each file makes its
own mutex anew (``pthread_atfork``).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

__all__ = ["Carried", "Guard", "here", "interrupted", "once", "shared"]

_T = TypeVar("_T")


class _Here(threading.local):
    """Whether a thread is in a guarded section. A forked child keeps the forking thread's."""

    inside = False


here = _Here()
"""``inside`` is set by code under a `Guard`'s lock, by assignment: a call could be interrupted."""

shared: Any = threading.RLock()

_forks = 0  # how many forks lie between the first process and this one


def _in_child() -> None:
    global _forks  # noqa: PLW0603 - of this process
    _forks += 1
    shared.release()


if hasattr(os, "register_at_fork"):  # there is no fork elsewhere
    os.register_at_fork(
        before=shared.acquire, after_in_parent=shared.release, after_in_child=_in_child
    )


class Carried:
    """A lock for a module, held through every fork by the thread that forks.

    Handlers for forks cannot be unregistered, so it is for modules and not for single objects.
    Used as ``with carried.lock(): ...``.
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock: Any = threading.RLock()
        if hasattr(os, "register_at_fork"):  # the lock registered last is taken first
            release = self._lock.release
            os.register_at_fork(
                before=self.__enter__, after_in_parent=release, after_in_child=release
            )

    def lock(self) -> Any:
        """The RLock itself, but for nested code that interrupted a section of `shared`."""
        return self if shared._is_owned() else self._lock

    def __enter__(self) -> None:
        """Take the lock; where its holder may be waiting for our `shared`, without that one.

        What is interrupted allows for nested code that takes `shared`, so also for other threads
        that do so meanwhile.
        """
        if not shared._is_owned():
            self._lock.acquire()
        elif not self._lock.acquire(blocking=False):
            depth = shared._release_save()
            try:
                self._lock.acquire()
            finally:
                shared._acquire_restore(depth)

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()


def interrupted() -> bool:
    """Whether this thread holds a lock, so that the caller runs nested in interrupted code.

    Called before a `Guard`'s lock is taken. Nested code must not wait for that lock: its holder may
    be waiting for a lock that this thread holds.
    """
    return here.inside or shared._is_owned()


class Guard:
    """The lock of one object, for sections of this form.

    if interrupted(): do without the guarded state; else::

        with guard.lock(self._abandon):
            here.inside = True
            try:
                ...
            finally:
                here.inside = False
    """

    __slots__ = ("_forks", "_lock")

    def __init__(self) -> None:
        self._lock: Any = threading.RLock()
        self._forks = _forks

    def lock(self, abandon: Callable[[], object]) -> Any:
        """This process's lock.

        Args:
            abandon: called once in a forked child, before its lock is first taken: it replaces
                the guarded state by a new one, and returns the old one.
        """
        if self._forks != _forks:
            self._renew(abandon)
        return self._lock

    def _renew(self, abandon: Callable[[], object]) -> None:
        old = None
        with shared:
            if self._forks != _forks:
                old = abandon()
                self._lock = threading.RLock()
                self._forks = _forks  # last: other threads read it without the lock
        del old  # may wait for reads to end: not under the lock


class once(Generic[_T]):  # noqa: N801 - a decorator
    """A property that is computed at its first use, and kept.

    Before Python 3.12 `functools.cached_property` computes under a lock of all instances, which a
    forked child may inherit held. Here threads that race compute the same, and one result is kept.
    """

    def __init__(self, compute: Callable[[Any], _T]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> _T:
        result: _T = instance.__dict__.setdefault(self._name, self._compute(instance))
        return result
