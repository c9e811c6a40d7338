"""What the person at the terminal sees of a race."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from .plan import Planner


class Screen:
    """A bar with the minutes left where stderr is a terminal, lines elsewhere.

    Without `bar` it shows lines only.
    """

    def __init__(self) -> None:
        self._bar: Any = None

    @contextlib.contextmanager
    def bar(self) -> Iterator[None]:
        """Show the bar as long as the context lasts."""
        shape = "{desc} |{bar:24}| {n_fmt} of {total_fmt} loads, {postfix}"
        with tqdm(total=1, disable=None, leave=False, bar_format=shape) as self._bar:
            yield
        self._bar = None

    def doing(self, text: str) -> None:
        """Name the step that begins now."""
        if self._bar is not None:
            self._bar.set_description_str(text)

    def step(self, loads: int) -> None:
        """So many loads are over."""
        if self._bar is not None:
            self._bar.update(loads)

    def estimate(self, planner: Planner) -> None:
        """What is left, as the planner sees it now."""
        if self._bar is not None:
            left = sum((planner.rounds - unit.done) * unit.loads for unit in planner.units)
            self._bar.total = self._bar.n + left
            self._bar.set_postfix_str(f"about {planner.left_s() / 60:.0f} min left")

    def tell(self, text: str) -> None:
        """Say something that stays on the screen."""
        tqdm.write(text, file=sys.stderr)
