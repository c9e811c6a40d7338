"""A path object that answers what it is told to."""

from __future__ import annotations

from typing import Any


class FakePath:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __fspath__(self) -> Any:
        return self.answer
