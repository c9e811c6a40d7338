"""``handle.prefetch()`` to a device, over the fake driver: bytes, streams, memory, failures."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_device import on_device
from generated_files import files
from hypothesis import assume, given
from hypothesis import strategies as st
from numbered import file_of_numbers, right
from safetensors import SafetensorError
from waiting import in_threads

import fastst_patch
from fastst_patch import engine, stock

pytestmark = pytest.mark.usefixtures("cuda")
SIZE, COUNT = 40_000, 30
KINDS = pytest.mark.parametrize("tensors", ["dlpack", "owned"])


@pytest.fixture(autouse=True)
def _nothing_left(cuda: Any, nothing_left: Any) -> Iterator[None]:
    """Neither in the engine nor on the device, once the tensors handed out are freed."""
    yield
    cuda.driver.clear()
    gc.collect()
    engine.shutdown()
    left = cuda.driver.live()
    assert (left.blocks, left.ranges, cuda.driver.lib.fake_pending()) == (0, 0, 0)


@pytest.fixture
def path(raw: Any) -> str:
    """Thirty tensors of 40,000 bytes; tensor i is full of i."""
    return file_of_numbers(raw, COUNT, 200, 200)


@given(
    file=files(loadable=True),
    seed=st.integers(0, 1 << 32),
    options=st.fixed_dictionaries(
        {
            "tensors": st.sampled_from(["auto", "dlpack", "owned"]),
            "io": st.sampled_from(["auto", "buffered", "direct"]),
            "chunk_bytes": st.sampled_from([64 << 10, 4 << 20]),
            "device_memory_budget": st.sampled_from([None, 0, 1, 100, 3000]),
            "fallback": st.just("error"),
        }
    ),
)
def test_any_plan(cuda, raw, fast, assert_same, watch, file, seed, options) -> None:
    """To the handle's device, or to another one that the call names."""
    assume(not file.odd and file.tensors)
    rnd = random.Random(seed)
    path = raw.write(file.content)
    plan: dict[str, Any] = {}
    for name in rnd.sample(sorted(file.tensors), rnd.randint(1, len(file.tensors))):
        dtype, shape, *_ = file.tensors[name]
        bounds = (sorted(rnd.choices(range(length + 1), k=2)) for length in shape)
        cut = tuple(slice(*pair) for pair in bounds)[: rnd.randint(0, len(shape))]
        plan[name] = rnd.choice([None, *(() if dtype == "F4" else (cut, *cut[:1]))])
    handles, calls = rnd.choice([("cuda:1", {}), ("cpu", {"device": "cuda:1"}), (0, {"device": 1})])
    with watch() as seen, fastst_patch.config_context(**options):
        with fast.safe_open(path, "pt", device=handles) as handle:
            loader = handle.prefetch(plan, **calls)
        with loader:
            ours = {name: loader.take(name) for name in rnd.sample(sorted(plan), len(plan) // 2)}
            ours.update(loader)
    expected = stock.load_file(path)
    assert set(ours) == set(plan)
    for name, value in plan.items():
        theirs = expected[name] if value is None else on_device(expected[name][value])
        assert_same(ours[name], theirs)
    (report,) = (report for report in seen.reports if report.call == "prefetch")
    assert (report.device, report.tensors) == ("cuda:1", len(plan))
    assert report.path in ("ring", "ring+direct")


@KINDS
def test_ready_on_any_stream(cuda, path, fast, tensors) -> None:
    """Read ahead under one stream, taken under another, and its memory used again at once."""
    first, second = cuda.new_stream(), cuda.new_stream()
    cuda.driver.lib.fake_quarantine(0)
    plan = {f"t{i:02}": (slice(10, 90), slice(20, 40)) if i % 3 else None for i in range(COUNT)}
    options = {"tensors": tensors, "device_memory_budget": 8 * SIZE, "fallback": "error"}
    copies: list[tuple[str, torch.Tensor]] = []
    with fastst_patch.config_context(**options), cuda.on(first):
        loader = fast.safe_open(path, "pt").prefetch(plan, device="cuda")
    with cuda.on(second):
        for name, tensor in loader:
            assert right(name, tensor)  # as a kernel on any stream sees it now
            copies.append((name, cuda.copy(tensor, 0)))  # pending on this stream
            del tensor
        loader.close()
        cuda.synchronize(0)
    assert all(right(name, copy) for name, copy in copies)


@KINDS
@pytest.mark.parametrize("budget", [0, 1, 50_000, 4 * 40_192, 500_000, None])
@pytest.mark.parametrize("jump", [False, True])
def test_memory_stays_within_the_budget(cuda, path, fast, tensors, budget, jump) -> None:
    """What is not handed out is at most the budget, beside the tensor that is asked for."""
    most, moved = 0, engine.counters()["bytes_copied"]
    with fastst_patch.config_context(tensors=tensors, device_memory_budget=budget):
        with fast.safe_open(path, "pt", "cuda") as handle, handle.prefetch() as loader:
            engine.shutdown()
            started = cuda.driver.live().block_bytes
            names = loader.names()
            if jump:
                random.Random(1).shuffle(names)
            for name in names:
                assert right(name, loader.take(name))  # and let go of
                most = max(most, cuda.driver.live().block_bytes)
            engine.shutdown()
    limit = (256 << 20) if budget is None else budget
    # A block of a group that was given up lives as long as one of its tensors.
    assert started <= limit
    assert most <= limit + 40_192
    moved = engine.counters()["bytes_copied"] - moved
    assert moved == COUNT * SIZE if not jump or budget is None else moved <= 2 * COUNT * SIZE
    assert started > 0 or budget in (0, 1)


@KINDS
@pytest.mark.parametrize("budget", [0, 200_000, None])
def test_out_of_memory_at_every_allocation(
    cuda, asked, path, fast, assert_same, tensors, budget
) -> None:
    """Reading ahead does without; a tensor that does not fit is stock's, and ours are gone."""
    expected = stock.load_file(path)
    plan = {f"t{i:02}": slice(7, 99) if i % 2 else None for i in range(COUNT)}
    with fastst_patch.config_context(tensors=tensors, device_memory_budget=budget):
        for k in range(1, 80):
            cuda.allocated, cuda.refuse_from = 0, k
            asked.alive.clear()
            with fast.safe_open(path, "pt", "cuda") as handle, handle.prefetch(plan) as loader:
                for name in loader.names():
                    ours, value = loader.take(name), plan[name]
                    theirs = expected[name] if value is None else expected[name][value]
                    assert torch.equal(ours, theirs)
                    del ours
            assert set(asked.alive) <= {0}, k
            if cuda.allocated < k:
                break
    assert cuda.allocated < k


def test_a_driver_that_fails(cuda, asked, path, fast, watch) -> None:
    with fastst_patch.config_context(chunk_bytes=64 << 10), watch() as seen:
        with fast.safe_open(path, "pt", "cuda") as handle:
            cuda.driver.fail("cuMemcpyHtoDAsync_v2", 1, 1 << 40)
            with handle.prefetch() as loader:
                assert all(right(name, tensor) for name, tensor in loader)
    assert asked.asked == ["handle"]
    (report,) = (report for report in seen.reports if report.call == "prefetch")
    assert report.fallback_reason


def test_left_halfway(cuda, path, fast) -> None:
    for end in ("close", "drop", "handle"):
        handle = fast.safe_open(path, "pt", "cuda")
        loader = handle.prefetch()
        kept = loader.take("t20")
        if end == "close":
            loader.close()
            assert cuda.driver.live().blocks == 1  # what is kept, though the loader is
        elif end == "handle":
            handle.__exit__(None, None, None)
            assert right("t29", dict(loader)["t29"])
        del loader, handle
        gc.collect()
        engine.shutdown()
        assert right("t20", kept)
        del kept
        assert cuda.driver.live().blocks == 0


def test_two_devices_and_many_threads(cuda, path, fast) -> None:
    with fast.safe_open(path, "pt") as handle:
        loaders = [handle.prefetch(device=device) for device in ("cuda:0", "cuda:1")]
    found: list[str] = []

    def work() -> None:
        for loader in loaders:
            for name, tensor in loader:
                assert right(name, tensor)
                found.append(name)

    in_threads(work, 3)
    assert sorted(found) == sorted(2 * loaders[0].names())
    for loader in loaders:
        loader.close()


def test_a_device_that_is_missing(cuda, path, fast) -> None:
    """The installed safetensors refuses it, or the reason is raised."""
    with fast.safe_open(path, "pt") as handle, pytest.raises(SafetensorError) as caught:
        handle.prefetch(device="cuda:7")
    assert "CUDA" in str(caught.value)


@pytest.mark.skipif(hasattr(stock.safe_open, "prefetch"), reason="the installed one refuses it")
def test_a_device_that_is_missing_of_rocm(cuda, path, fast, monkeypatch) -> None:
    """The reason is raised there, too: no CUDA-enabled framework would help."""
    monkeypatch.setattr(torch.version, "hip", "6.0")
    monkeypatch.setattr(torch.version, "cuda", None)
    with fast.safe_open(path, "pt") as handle, pytest.raises(SafetensorError) as caught:
        handle.prefetch(device="cuda:7")
    assert str(caught.value) == "torch sees no device cuda:7"


def test_a_mode_of_torch(cuda, asked, path, fast) -> None:
    """A default device in force: stock does what is taken meanwhile, and nothing else."""
    with fast.safe_open(path, "pt", "cuda") as handle, handle.prefetch() as loader:
        with torch.device("cpu"):
            assert right("t01", loader.take("t01"))
        assert asked.asked == ["handle"]
        assert all(right(name, tensor) for name, tensor in loader)
        assert asked.asked == ["handle"]
