"""What stands for transformers' futures and thread pool where tensors are made without threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

__all__ = ["AtOnce", "LazyFuture", "by_stock"]


class LazyFuture(Future):  # type: ignore[type-arg]
    """A future that its reader keeps: its tensor is taken from the stream when asked for.

    Whatever is asked of a future looks at its state: `result`, `done`, callbacks,
    ``concurrent.futures.wait``. So the state is what keeps the promise, and never says that
    somebody else is about to. Timeouts are not looked at: nothing here waits for a queue.
    """

    def __init__(self, take: Callable[[], Any]) -> None:
        self._take: Callable[[], Any] | None = None
        super().__init__()
        self._take = take

    @property
    def _state(self) -> str:
        # The future's own lock, which whoever looks at several futures holds already, and which
        # may be taken again.
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
                # The error keeps this frame and its callers', which are not to keep it in turn.
                take = None
                self = None  # type: ignore[assignment]  # noqa: PLW0642

    @_state.setter
    def _state(self, state: str) -> None:
        self._reached = state

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What `result` would raise."""
        try:
            _ = self._state  # here, not in a frame that keeps us: as above
            return super().exception(timeout)
        finally:
            self = None  # type: ignore[assignment]  # noqa: PLW0642

    def cancel(self) -> bool:
        """Give the tensor up, unless it was asked for already."""
        with self._condition:
            self._take = None
            return super().cancel()


def by_stock(promise: Callable[[], Any]) -> Any:
    """A tensor as the original gives it, which promises it in its own way."""
    promised = promise()
    return promised.result() if isinstance(promised, Future) else promised()


class AtOnce:
    """In a thread pool's place: does what it is given, and returns what comes of it."""

    def submit(self, job: Callable[[], Any]) -> Any:
        """Call it."""
        return job()
