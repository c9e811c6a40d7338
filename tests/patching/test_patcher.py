"""patch(), patched() and unpatch(): nesting, threads, single targets, decorators."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from typing import Any

import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from patch_targets import TINY, current_object

import fastst_patch


def test_unpatch_when_not_patched(stock) -> None:
    fastst_patch.unpatch()
    fastst_patch.unpatch()
    assert safetensors.safe_open is stock.safe_open


def test_nesting(is_fast) -> None:
    fast = lambda: is_fast(safetensors.safe_open) and is_fast(safetensors.torch.load_file)  # noqa: E731
    with fastst_patch.patched(**TINY):
        with fastst_patch.patched(**TINY):
            assert fast()
        assert fast()
        with fastst_patch.patched("safetensors.safe_open", **TINY):
            assert fast()
        assert fast()
    assert not fast()
    fastst_patch.patch(**TINY)
    with fastst_patch.patched(**TINY):
        assert fast()
    assert fast()  # leaving an inner patched() never undoes an outer patch()
    fastst_patch.unpatch()
    assert not fast()
    with fastst_patch.patched(**TINY):
        fastst_patch.patch(**TINY)
    assert fast()  # nor one made inside it
    fastst_patch.unpatch()
    assert not fast()
    outer, inner = fastst_patch.patched(**TINY), fastst_patch.patched(**TINY)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)  # left in the other order
    assert fast()
    inner.__exit__(None, None, None)
    assert not fast()


def test_exceptions_pass(is_fast) -> None:
    with pytest.raises(ZeroDivisionError), fastst_patch.patched(**TINY):
        _ = is_fast(safetensors.safe_open) / 0
    assert not is_fast(safetensors.safe_open)
    assert not fastst_patch.is_patched()


def test_threads(sample, stock) -> None:
    """Many threads enter and leave; nobody ever sees anything that does not load."""
    expected = stock.load_file(sample)
    wrong: list[BaseException] = []
    start = threading.Barrier(6)

    def work(number: int) -> None:
        try:
            start.wait(30)
            for _ in range(15):
                with fastst_patch.patched(**TINY):
                    assert fastst_patch.is_patched()
                    assert safetensors.safe_open is not stock.safe_open
                    tensors = safetensors.torch.load_file(sample)
                assert all(torch.equal(tensors[name], expected[name]) for name in expected)
                assert safetensors.safe_open(sample, "pt").keys() == sorted(expected)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not fastst_patch.is_patched()
    assert safetensors.safe_open is stock.safe_open


def test_one_target_at_a_time(targets, sample) -> None:
    for target in targets:
        before = {name: current_object(name) for name in targets}
        for given in (target, [target], (target,)):
            with fastst_patch.patched(given, **TINY):
                assert {name: fastst_patch.is_patched(name) for name in targets} == {
                    name: name == target for name in targets
                }
                assert fastst_patch.is_patched()
                assert {name for name in targets if current_object(name) is not before[name]} == {
                    target
                }
        assert not fastst_patch.is_patched(target)


def test_targets_are_patched_separately(targets, is_fast) -> None:
    fastst_patch.patch("safetensors.torch.load_file", **TINY)
    with fastst_patch.patched("safetensors.safe_open", **TINY):
        assert is_fast(safetensors.safe_open)
        assert is_fast(safetensors.torch.load_file)
        assert not fastst_patch.is_patched("safetensors.torch.load_model")
    assert not is_fast(safetensors.safe_open)
    assert fastst_patch.is_patched("safetensors.torch.load_file")
    fastst_patch.unpatch()
    assert not any(fastst_patch.is_patched(target) for target in targets)


def test_unknown_names_are_refused(stock) -> None:
    """A misspelt target or option must not pass for a patch that works."""
    for wrong in ("safetensors.safe_opne", "", ["safetensors.safe_open", "nope"]):
        with pytest.raises(Exception):
            fastst_patch.patch(wrong)
    with pytest.raises(Exception):
        fastst_patch.patch(small_file_byte=0)
    with pytest.raises(Exception):
        fastst_patch.get_original("safetensors.safe_opne")
    assert safetensors.safe_open is stock.safe_open
    assert not fastst_patch.is_patched()


def test_get_original(targets, stock, sample) -> None:
    before = {name: current_object(name) for name in targets}
    with fastst_patch.patched(**TINY):
        for name in targets:
            assert fastst_patch.get_original(name) is before[name]
    assert {name: fastst_patch.get_original(name) for name in targets} == before
    assert fastst_patch.get_original("safetensors.safe_open") is stock.safe_open
    assert isinstance(fastst_patch.get_original("safetensors.safe_open"), type)


def test_patch_map(targets) -> None:
    assert set(targets) <= set(fastst_patch.patch_map())
    unpatched = dict(fastst_patch.patch_map())
    with fastst_patch.patched(**TINY):
        assert all(fastst_patch.patch_map()[name] != unpatched[name] for name in targets)
    assert dict(fastst_patch.patch_map()) == unpatched


def test_fast_versions_without_patching(sample, is_fast, stock, assert_same) -> None:
    with fastst_patch.config_context(**TINY):
        assert is_fast(fastst_patch.safe_open)
        assert is_fast(fastst_patch.load_file)
        assert_same(fastst_patch.load_file(sample), stock.load_file(sample))
        model = torch.nn.Module()
        for name, tensor in stock.load_file(sample).items():
            model.register_buffer(name, torch.zeros_like(tensor))
        assert not any(fastst_patch.load_model(model, sample))  # missing, unexpected
        assert_same(model.w.clone(), stock.load_file(sample)["w"].clone())
    assert not fastst_patch.is_patched()
    assert safetensors.safe_open is stock.safe_open


def test_small_files_go_to_stock(sample, watch, is_fast) -> None:
    """Where the threshold is set. Its default, 0, is a measurement's: see docs/design-notes.md."""
    with watch() as seen, fastst_patch.patched(small_file_bytes=2**20):
        safetensors.torch.load_file(sample)
        with safetensors.safe_open(sample, "pt") as handle:
            handle.get_tensor("w")
    assert seen.paths(sample) == ["stock", "stock"]
    assert all("small" in r.fallback_reason for r in seen.reports)
    with fastst_patch.patched(small_file_bytes=1):
        assert is_fast(safetensors.torch.load_file)


@pytest.fixture
def both_fast(sample: str, watch: Any) -> Callable[[], bool]:
    """Whether loads take the fast path now."""

    def both_fast() -> bool:
        with watch() as seen:
            safetensors.torch.load_file(sample)
            with safetensors.safe_open(sample, "pt") as handle:
                handle.get_tensor("w")
        paths = seen.paths(sample)
        assert len(paths) in (0, 2)  # both or none
        assert "stock" not in paths
        return paths != []

    return both_fast


def test_decorator(both_fast) -> None:
    @fastst_patch.patched(small_file_bytes=0)
    def inside(first: int, *, second: int = 2) -> tuple[bool, int]:
        """What it does."""
        return both_fast(), first + second

    assert inside.__name__ == "inside"
    assert inside.__doc__ == "What it does."
    for _ in range(2):
        assert inside(1, second=4) == (True, 5)
        assert not fastst_patch.is_patched()

    @fastst_patch.patched(small_file_bytes=0)
    def recursive(depth: int) -> bool:
        return both_fast() and (depth == 0 or recursive(depth - 1))

    assert recursive(3)
    assert not both_fast()

    @fastst_patch.patched(small_file_bytes=0)
    def failing() -> None:
        raise LookupError

    with pytest.raises(LookupError):
        failing()
    assert not fastst_patch.is_patched()


def test_decorated_bodies_that_run_later(both_fast) -> None:
    @fastst_patch.patched(small_file_bytes=0)
    async def coroutine(value: int) -> tuple[bool, int]:
        await asyncio.sleep(0)
        return both_fast(), value

    @fastst_patch.patched(small_file_bytes=0)
    def generator(value: int) -> Any:
        got = yield both_fast()
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


def test_decorator_without_parentheses(both_fast) -> None:
    @fastst_patch.patched
    def inside(first: int) -> tuple[bool, int]:
        return both_fast(), first

    assert inside(1) == (True, 1)
    assert inside.__name__ == "inside"
    assert not fastst_patch.is_patched()
