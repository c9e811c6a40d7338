"""The bar over a race. Its end is what the time cap allows, not what was asked for."""

from __future__ import annotations

import time
from typing import Any

from tqdm import tqdm

__all__ = ["Progress"]


class Progress:
    """Counts runs, and after each round how many more rounds there will be. A context manager.

    Args:
        rounds: asked for.
        steps: runs in each round.
        max_seconds: no round begins that would end later.
    """

    def __init__(self, rounds: int, steps: int, max_seconds: float) -> None:
        self._rounds, self._steps, self._max_seconds = rounds, steps, max_seconds
        self._begin, self._done = time.monotonic(), 0
        # disable=None: no bar where stderr is no terminal.
        self._bar = tqdm(total=rounds * steps, unit="run", disable=None, leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: Any) -> None:
        self._bar.close()

    def step(self, description: str) -> None:
        """Say what runs now."""
        self._bar.set_description(description)

    def update(self) -> None:
        """Count a run, and look whether the rounds that are left still fit the cap."""
        self._done += 1
        self._bar.update()
        seconds = time.monotonic() - self._begin
        self._bar.total = self._steps * self.expected_rounds(self._done, seconds)
        self._bar.refresh()

    def expected_rounds(self, runs: int, seconds: float) -> int:
        """How many rounds there will be, from the runs so far and the time they took."""
        a_round = seconds / runs * self._steps
        under_way = -(-runs // self._steps)
        fit = int(self._max_seconds / a_round) if a_round else self._rounds
        return min(self._rounds, max(1, under_way, fit))
