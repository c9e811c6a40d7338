"""Replacements of transformers' futures and thread pool, for tensors made without threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

__all__ = ["AtOnce", "LazyFuture", "by_stock"]


class LazyFuture(Future):  # type: ignore[type-arg]
    """A future that computes its result in the thread that first looks at it.

    `result`, `done`, callbacks and ``concurrent.futures.wait`` all read a future's state. So the
    state computes the result, and the future never looks pending. Timeouts have no effect: nothing
    here waits for a queue.
    """

    def __init__(self, take: Callable[[], Any]) -> None:
        self._take: Callable[[], Any] | None = None
        super().__init__()
        self._take = take

    @property
    def _state(self) -> str:
        # The future's own lock. It is reentrant: ``concurrent.futures.wait`` holds it already.
        with self._condition:
            take, self._take = self._take, None
            try:
                if take is not None:
                    self.set_result(take())
            except BaseException as error:
                self.set_exception(error)
            try:
                return self._reached
            finally:
                # The error keeps this frame and its callers' alive: they must not keep the future.
                take = None
                self = None  # type: ignore[assignment]  # noqa: PLW0642

    @_state.setter
    def _state(self, state: str) -> None:
        self._reached = state

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The exception that `result` would raise, or None."""
        try:
            _ = self._state  # computed here, since the caller's frame keeps the future: as above
            return super().exception(timeout)
        finally:
            self = None  # type: ignore[assignment]  # noqa: PLW0642

    def cancel(self) -> bool:
        """Give the tensor up, unless it is computed already."""
        with self._condition:
            self._take = None
            return super().cancel()


def by_stock(call: Callable[[], Any]) -> Any:
    """The tensor that the original makes: its call returns a future, or a function."""
    promised = call()
    return promised.result() if isinstance(promised, Future) else promised()


class AtOnce:
    """In a thread pool's place: runs each job at once, and returns its result."""

    def submit(self, job: Callable[[], Any]) -> Any:
        """Run the job."""
        return job()
