"""Tensors of several files read ahead in one order, within one budget.

    position = file's first + number among its wanted tensors
    next -> [group] -> started (bytes move) -> window -> taken one by one -> gone

Whoever takes tensors in the order of the walk finds them on their way. Whoever jumps is served
alone, and the walk goes on from there once two requests follow each other.
"""

from __future__ import annotations

import bisect
import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from .. import tensors
from ..errors import Fallback
from ..files.base import TensorFile
from ..files.cpu import HostFile
from ..files.cuda import ARENA, BUDGET
from ..files.prefetcher import Pending
from ..files.readahead import AHEAD
from ..layout import ARENA_ALIGNMENT
from ..locks import Guard, here, interrupted

if TYPE_CHECKING:
    import torch

__all__ = ["Bounds", "Walk"]

_log = logging.getLogger("fastst_patch")

_FEW = 512
"""Most tensors of one window: starting it stays short however small they are."""

_NEAR = 8
"""Requests so close behind each other follow the walk: some tensors may be left out of it."""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """How far a walk may run ahead.

    Attributes:
        nbytes: most bytes read and not taken.
        window: of one window; a larger tensor has one of its own.
        files: how many files behind the one in use may be started; None: any number.
    """

    nbytes: int
    window: int
    files: int | None = None

    @classmethod
    def of(cls, opened: TensorFile, budget: int | None, files: int | None = None) -> Bounds:
        """For files like this one.

        Args:
            opened: one of them.
            budget: ``device_memory_budget``.
            files: see the attribute.
        """
        if isinstance(opened, HostFile) and opened.mapped:
            # Pages of a cache, not memory of ours: far enough that a drive is never idle.
            return cls(2 * AHEAD, AHEAD // 2, files)
        given = BUDGET if budget is None else budget
        # A third: what is being used, what comes next, and what threads that share the walk
        # have not quite finished with.
        return cls(given, max(min(ARENA, given) // 3, 1), files)


@dataclasses.dataclass(eq=False)
class _Window:
    last: int  # position
    nbytes: int
    waiting: set[int]  # positions not taken
    under_way: Pending


class Walk:
    """See the module. Usable from any thread; waiting holds no lock.

    Args:
        files: in the order of the walk.
        numbers: of the tensors of each that may be asked for, ascending.
        bounds: see `Bounds`.
        held: bytes that count against the bound beside what waits here, such as tensors handed
            out; then one window is still read ahead at any time.
    """

    def __init__(
        self,
        files: Sequence[TensorFile],
        numbers: Sequence[Sequence[int]],
        bounds: Bounds,
        held: Callable[[], int] = lambda: 0,
    ) -> None:
        self._files = files
        self._numbers = numbers
        self._bounds = bounds
        self._elsewhere = held
        self._starts = list(accumulate((len(some) for some in numbers), initial=0))
        self._guard = Guard()
        self._windows: deque[_Window] = deque()
        self._at: dict[int, _Window] = {}
        self._recent: deque[int] = deque(maxlen=8)
        self._left_alone: set[int] = set()  # files that cannot be read ahead
        self._next = 0
        self._following: tuple[int, list[int], int] | None = None  # what `_group` said of _next
        self._current = 0  # file last asked for
        self._held = 0

    def begin(self) -> None:
        """Start reading what will be asked for first. Returns at once."""
        if interrupted():
            return  # it begins with the first request
        with self._guard.lock(self._let_go):
            here.inside = True
            try:
                self._recent.append(-1)
                self._advance()
            finally:
                here.inside = False

    def take(self, k: int, i: int) -> torch.Tensor:
        """Tensor i of file k, usable at once.

        Raises:
            Fallback: stock must do it.
            OSError, MemoryError, SafetensorError: its bytes could not be read.
        """
        if not tensors.ordinary_mode():
            return self._files[k].tensor(i)
        if interrupted():
            return self._alone(k, i)
        with self._guard.lock(self._let_go):
            here.inside = True
            try:
                window = self._requested(k, self._position(k, i))
            finally:
                here.inside = False
        if window is not None:
            return window.under_way.take(i)
        return self._alone(k, i)

    def _requested(self, k: int, position: int) -> _Window | None:
        """Where a tensor is that is asked for, if it is read ahead; the walk goes on from it."""
        self._current = k
        window = self._at.pop(position, None)
        if window is None and self._follows(position):
            window = self._enter(position)
        if window is not None:
            window.waiting.discard(position)
            if not window.waiting:
                self._forget(window)
        self._recent.append(position)
        self._advance()
        return window

    def drop(self) -> None:
        """Forget what was read ahead; what is in flight is cancelled. It is read anew if asked."""
        if interrupted():
            return  # it goes with the walk, or with what is asked for next
        with self._guard.lock(self._let_go):
            here.inside = True
            try:
                windows = self._let_go()
            finally:
                here.inside = False
        del windows  # ended without the lock: that may wait

    def _let_go(self) -> object:
        old = self._windows, self._at
        self._windows, self._at = deque(), {}
        self._held = 0
        self._next = self._starts[-1]
        self._following = None
        return old

    # ---- places ----

    def _position(self, k: int, i: int) -> int:
        numbers = self._numbers[k]
        at = i if isinstance(numbers, range) else bisect.bisect_left(numbers, i)
        return self._starts[k] + at

    def _file_of(self, position: int) -> int:
        return bisect.bisect_right(self._starts, position) - 1

    def _follows(self, position: int) -> bool:
        return any(0 < position - before <= _NEAR for before in self._recent)

    def _alone(self, k: int, i: int) -> torch.Tensor:
        opened = self._files[k]
        if k in self._left_alone or isinstance(opened, HostFile):
            return opened.tensor(i)
        return opened.ahead([i]).take(i)

    # ---- windows; with the lock held ----

    def _group(self, position: int) -> tuple[list[int], int]:
        """Numbers of the tensors from a position on that make a window, and their bytes."""
        k = self._file_of(position)
        layout, numbers = self._files[k].layout, self._numbers[k]
        chosen: list[int] = []
        total = 0
        for at in range(position, min(self._starts[k + 1], position + _FEW)):
            i = numbers[at - self._starts[k]]
            nbytes = -(-layout.nbytes(i) // ARENA_ALIGNMENT) * ARENA_ALIGNMENT
            if chosen and (total + nbytes > self._bounds.window or at in self._at):
                break
            chosen.append(i)
            total += nbytes
        return chosen, total

    def _start(self, position: int, numbers: list[int], nbytes: int) -> _Window | None:
        """Start a window; None, and the file is left alone, where that cannot be done."""
        k = self._file_of(position)
        try:
            under_way = self._files[k].ahead(numbers)
        except (Fallback, MemoryError, OSError) as error:
            # Whoever asks for one of them is told; until then it is nobody's trouble.
            _log.debug("%s is not read ahead: %s", self._files[k].device, error)
            error.__traceback__ = None
            self._left_alone.add(k)
            return None
        window = _Window(
            position + len(numbers) - 1,
            nbytes,
            set(range(position, position + len(numbers))),
            under_way,
        )
        self._windows.append(window)
        self._at.update(dict.fromkeys(window.waiting, window))
        self._held += nbytes
        return window

    def _enter(self, position: int) -> _Window | None:
        """A window from a position on, which is asked for now; the walk goes on behind it."""
        if self._file_of(position) in self._left_alone:
            return None
        numbers, nbytes = self._group(position)
        while self._windows and self._held + nbytes > self._room():
            self._give_up(self._windows[0])
        window = self._start(position, numbers, nbytes)
        if window is not None:
            self._next = window.last + 1
            self._at.pop(position)
        return window

    def _advance(self) -> None:
        """Start what comes next, as far as the bounds allow."""
        end = self._starts[-1]
        while self._next < end:
            if self._next in self._at:
                self._next = self._at[self._next].last + 1
                continue
            k = self._file_of(self._next)
            if k in self._left_alone:
                self._next = self._starts[k + 1]
                continue
            if self._bounds.files is not None and k > self._current + self._bounds.files:
                return
            if self._following is None or self._following[0] != self._next:
                self._following = (self._next, *self._group(self._next))
            _, numbers, nbytes = self._following
            if nbytes and self._held + nbytes > self._room():
                if not self._give_up_passed():
                    return
                continue
            self._following = None
            if self._start(self._next, numbers, nbytes) is not None:
                self._next += len(numbers)

    def _room(self) -> int:
        whole = self._bounds.nbytes
        return whole if not whole else max(whole - self._elsewhere(), self._bounds.window)

    def _give_up_passed(self) -> bool:
        """Give up the oldest window if the walk is well past it; whether there was one."""
        if self._windows and self._recent:
            oldest = self._windows[0]
            if oldest.last + 8 * _NEAR < self._recent[-1]:
                self._give_up(oldest)
                return True
        return False

    def _give_up(self, window: _Window) -> None:
        for position in window.waiting:
            if self._at.get(position) is window:
                del self._at[position]
        self._forget(window)

    def _forget(self, window: _Window) -> None:
        if window in self._windows:
            self._windows.remove(window)
            self._held -= window.nbytes
