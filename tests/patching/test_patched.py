"""patched() as a decorator: of functions, of bodies that run later, without parentheses."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch

import fastst_patch


@pytest.fixture
def is_fast(sample: str, watch: Any) -> Callable[[], bool]:
    """Whether loads take the fast path now."""

    def is_fast() -> bool:
        with watch() as seen:
            safetensors.torch.load_file(sample)
            with safetensors.safe_open(sample, "pt") as handle:
                handle.get_tensor("w")
        paths = seen.paths(sample)
        assert len(paths) in (0, 2)  # both or none
        assert "stock" not in paths
        return paths != []

    return is_fast


def test_decorator(is_fast) -> None:
    @fastst_patch.patched(small_file_bytes=0)
    def inside(first: int, *, second: int = 2) -> tuple[bool, int]:
        """What it does."""
        return is_fast(), first + second

    assert inside.__name__ == "inside"
    assert inside.__doc__ == "What it does."
    for _ in range(2):
        assert inside(1, second=4) == (True, 5)
        assert not fastst_patch.is_patched()

    @fastst_patch.patched(small_file_bytes=0)
    def recursive(depth: int) -> bool:
        return is_fast() and (depth == 0 or recursive(depth - 1))

    assert recursive(3)
    assert not is_fast()

    @fastst_patch.patched(small_file_bytes=0)
    def failing() -> None:
        raise LookupError

    with pytest.raises(LookupError):
        failing()
    assert not fastst_patch.is_patched()


def test_decorated_bodies_that_run_later(is_fast) -> None:
    @fastst_patch.patched(small_file_bytes=0)
    async def coroutine(value: int) -> tuple[bool, int]:
        await asyncio.sleep(0)
        return is_fast(), value

    @fastst_patch.patched(small_file_bytes=0)
    def generator(value: int) -> Any:
        got = yield is_fast()
        return got + value

    for _ in range(2):
        waiting = coroutine(3)
        assert not fastst_patch.is_patched()
        assert asyncio.run(waiting) == (True, 3)
        assert not fastst_patch.is_patched()
        steps = generator(4)
        assert not fastst_patch.is_patched()
        assert next(steps) is True
        assert fastst_patch.is_patched()
        with pytest.raises(StopIteration) as ended:
            steps.send(5)
        assert ended.value.value == 9
        assert not fastst_patch.is_patched()
    next(steps := generator(0))
    steps.close()  # given up in the middle
    assert not fastst_patch.is_patched()
    assert coroutine.__name__ == "coroutine"
    assert inspect.iscoroutinefunction(coroutine)

    async def numbers() -> Any:
        yield 1

    with pytest.raises(TypeError, match="use `with` inside it"):
        fastst_patch.patched()(numbers)


def test_decorator_without_parentheses(is_fast) -> None:
    @fastst_patch.patched
    def inside(first: int) -> tuple[bool, int]:
        return is_fast(), first

    assert inside(1) == (True, 1)
    assert inside.__name__ == "inside"
    assert not fastst_patch.is_patched()
