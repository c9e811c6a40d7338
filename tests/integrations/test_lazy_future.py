"""What ``from_pretrained`` promises of tensors are futures, to whoever asks them in whichever way.

transformers itself only takes their results, in order (`test_from_pretrained`).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fastst_patch

pytest.importorskip("transformers")
loading = pytest.importorskip(
    "transformers.core_model_loading", reason="transformers before 5 loads in another way"
)

from fastst_patch.integrations.lazy_future import LazyFuture  # noqa: E402
from fastst_patch.integrations.transformers import _here, _Load  # noqa: E402

NAMES = [f"w{i}" for i in range(6)]


@pytest.fixture
def promised(cuda, raw) -> Iterator[tuple[dict[str, LazyFuture], dict[str, torch.Tensor]]]:
    """Promises of the tensors of a file, on their way to a device; and the tensors."""
    expected = {name: torch.randn(50, 30 + i) for i, name in enumerate(NAMES)}
    path = str(raw.tensors(expected))
    with fastst_patch.patched(chunk_bytes=65536), fastst_patch.safe_open(path, "pt") as handle:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            _here.load = load = _Load()
            try:
                promises = {
                    name: loading.spawn_materialize(pool, handle.get_slice(name), "cuda:0", None)
                    for name in NAMES
                }
                assert {type(promise) for promise in promises.values()} == {LazyFuture}
                with fastst_patch.profile() as seen:
                    yield promises, expected
                    kept = [n for n, promise in promises.items() if promise._take is None]
                    load.end(failed=False)
                (report,) = [r for r in seen.reports if r.call == "from_pretrained"]
                taken = [name for name in kept if not promises[name].cancelled()]
                assert (report.path, report.tensors) == ("ring" if taken else "stock", len(taken))
                assert report.bytes == sum(expected[name].nbytes for name in taken)
            finally:
                _here.load = None


def _poll(promises: list[LazyFuture]) -> None:
    unanswered = [promise for promise in promises if not promise.done()]
    assert unanswered == []  # whoever polls would do so for ever


def _await(promises: list[LazyFuture]) -> None:
    async def gather() -> None:
        await asyncio.gather(*map(asyncio.wrap_future, promises))

    asyncio.run(gather())


def _call_back(promises: list[LazyFuture]) -> None:
    called: list[Any] = []
    for promise in promises:
        promise.add_done_callback(called.append)
    assert called == promises


ASKING: dict[str, Callable[[list[LazyFuture]], Any]] = {
    "wait": concurrent.futures.wait,
    "wait for the first": lambda promises: concurrent.futures.wait(
        promises, return_when=concurrent.futures.FIRST_COMPLETED
    ),
    "wait a moment": lambda promises: concurrent.futures.wait(promises, timeout=0),
    "as_completed": lambda promises: list(concurrent.futures.as_completed(promises)),
    "exception": lambda promises: [promise.exception(timeout=0) for promise in promises],
    "poll": _poll,
    "callbacks": _call_back,
    "asyncio": _await,
}


@pytest.mark.parametrize("how", ASKING)
def test_whoever_asks_is_answered(promised, how) -> None:
    promises, expected = promised
    ASKING[how](list(promises.values()))
    for name, promise in promises.items():
        assert (promise.done(), promise.running(), promise.cancelled()) == (True, False, False)
        assert promise.cancel() is False
        assert promise.result(timeout=0) is promise.result()
        assert torch.equal(promise.result(), expected[name])


def test_given_up(promised) -> None:
    """Nothing is read for a promise that is cancelled, and the others are kept."""
    promises, expected = promised
    called: list[Any] = []
    assert promises["w1"].cancel()
    assert promises["w1"].cancel()
    promises["w1"].add_done_callback(called.append)
    assert called == [promises["w1"]]
    assert promises["w1"].done()
    assert promises["w1"].cancelled()
    with pytest.raises(concurrent.futures.CancelledError):
        promises["w1"].result()
    assert promises["w1"].cancel()
    assert torch.equal(promises["w2"].result(), expected["w2"])


def test_from_many_threads() -> None:
    """Each is kept once, whoever asks first, and those who wait for several meanwhile."""
    for _ in range(20):
        _ask_from_many_threads()


def _ask_from_many_threads() -> None:
    taken: list[int] = []
    promises = [LazyFuture(lambda i=i: taken.append(i) or i) for i in range(8)]
    asked: list[Any] = []
    ways: list[Callable[[], Any]] = [
        lambda: asked.append([promise.result() for promise in promises]),
        lambda: asked.append([promise.result() for promise in reversed(promises)][::-1]),
        lambda: asked.append([p.result() for p in promises if concurrent.futures.wait([p])]),
        lambda: concurrent.futures.wait(promises),
        lambda: list(concurrent.futures.as_completed(promises)),
    ]
    threads = [threading.Thread(target=way) for way in ways]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert sorted(taken) == list(range(8))
    assert asked == [list(range(8))] * 3


def test_an_error_is_everybodys_and_in_no_cycle() -> None:
    class Kept:
        pass

    def fails() -> None:
        kept = Kept()  # in a frame of the traceback
        alive.append(weakref.ref(kept))
        raise ValueError("no")

    alive: list[Any] = []
    gc.collect()
    gc.disable()
    try:
        for ask in (LazyFuture.result, LazyFuture.exception):
            promise = LazyFuture(fails)
            with contextlib.suppress(ValueError):
                ask(promise)
            del promise
    finally:
        gc.enable()
    assert [reference() for reference in alive] == [None, None]
    promise = LazyFuture(fails)
    assert concurrent.futures.wait([promise]).done == {promise}
    assert str(promise.exception()) == "no"
    with pytest.raises(ValueError, match="no"):
        promise.result()
