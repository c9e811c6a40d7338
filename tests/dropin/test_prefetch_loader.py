"""``handle.prefetch()``: what it hands out on the CPU, what it says, its bounds, and its end."""

from __future__ import annotations

import errno
import gc
import json
import os
import pickle
import random
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from generated_files import File, files
from hypothesis import assume, given
from hypothesis import strategies as st
from numbered import file_of_numbers, right
from safetensors import SafetensorError
from waiting import in_threads

import fastst_patch
from fastst_patch import engine

UPSTREAM = hasattr(safetensors.safe_open, "prefetch")
WAYS: dict[str, dict[str, Any]] = {
    "auto": {},
    "mmap": {"io": "mmap"},
    "buffered": {"io": "buffered"},
    "direct": {"io": "direct"},
    "owned": {"tensors": "owned"},
}
SIZE = 100_000
ALREADY = "tensor already delivered (prefetch hands each tensor out once, via take or iteration)"


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastst_patch.config_context(**WAYS[request.param], fallback="error"):
        yield request.param


@pytest.fixture
def numbered(raw: Any) -> str:
    """Forty tensors of 100,000 bytes; tensor i is full of i."""
    return file_of_numbers(raw, 40, 100, 1000)


# ---------------------------------------------------------------- what is handed out


@pytest.mark.usefixtures("nothing_left")
def test_everything(fast, stock, model, assert_same, watch, way) -> None:
    expected = stock.load_file(model)
    with watch() as seen:
        with fast.safe_open(model, "pt") as handle, handle.prefetch() as loader:
            names = loader.names()
            assert (sorted(names), len(loader)) == (sorted(expected), len(expected))
            # Tensors of their own have another storage than stock's views of the file have.
            assert_same({name: loader.take(name).clone() for name in names}, _clones(expected))
            assert dict(loader) == {}
        with fast.safe_open(model, "pt") as handle, handle.prefetch() as loader:
            assert_same(_clones(dict(loader)), _clones(expected))
    reports = [report for report in seen.reports if report.call == "prefetch"]
    assert [report.tensors for report in reports] == [len(expected)] * 2
    assert {report.bytes for report in reports} == {sum(t.nbytes for t in expected.values())}
    known = {
        "auto": {"mmap", "mmap+readahead"},
        "owned": {"owned"},
        "direct": {"direct", "buffered"},
    }
    assert {report.path for report in reports} <= known.get(way, {"mmap", way})
    assert {report.file for report in reports} == {model}


def _clones(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensors[name].clone() for name in sorted(tensors)}


def test_mapped_tensors_are_as_a_handles(fast, stock, sample, assert_same) -> None:
    """In their storage, too; and of another map than the handle's."""
    with fast.safe_open(sample, "pt") as handle, stock.safe_open(sample, "pt") as theirs:
        plan = {"w": None, "b": slice(3, 9), "h": (slice(1, 5), slice(2, 4))}
        with handle.prefetch(plan) as loader:
            ours = dict(loader)
        assert_same(ours["w"], theirs.get_tensor("w"))
        assert_same(ours["b"], theirs.get_slice("b")[3:9])
        assert_same(ours["h"], theirs.get_slice("h")[1:5, 2:4])
        ours["w"].zero_()
        assert_same(handle.get_tensor("w"), theirs.get_tensor("w"))


_options = st.fixed_dictionaries(
    {
        "io": st.sampled_from(["auto", "buffered", "direct"]),
        "tensors": st.sampled_from(["auto", "dlpack", "owned"]),
        "device_memory_budget": st.sampled_from([None, 0, 1, 100, 3000, 1 << 40]),
        "threads": st.sampled_from([0, 1, 3]),
        "fallback": st.just("error"),
    }
)


def _inside(rnd: random.Random, length: int) -> slice:
    start, stop = rnd.randint(0, length), rnd.randint(0, length)
    start = rnd.choice([start, start - length if start < length else start])
    return slice(rnd.choice([start, None]), rnd.choice([stop, None]))


@given(file=files(loadable=True), options=_options, seed=st.integers(0, 1 << 32))
def test_any_plan(raw, fast, stock, assert_same, watch, file: File, options, seed) -> None:
    """Tensors in any order, whole and cut, some by `take` and the rest by iteration."""
    assume(not file.odd and file.tensors)
    rnd = random.Random(seed)
    path = raw.write(file.content)
    plan: dict[str, Any] = {}
    for name in rnd.sample(sorted(file.tensors), rnd.randint(1, len(file.tensors))):
        dtype, shape, *_ = file.tensors[name]
        cut = tuple(_inside(rnd, length) for length in shape[: rnd.randint(0, len(shape))])
        cut = () if dtype == "F4" else cut
        plan[name] = rnd.choice([None, cut, *cut[:1]])
    with watch() as seen, fastst_patch.config_context(**options):
        with fast.safe_open(path, "pt") as handle:
            loader = handle.prefetch(dict(plan), threads=rnd.choice([1, 8, 1000]))
        with loader:
            order = [file.tensors[name][2:] for name in loader.names()]
            assert order == sorted(order)
            taken = rnd.sample(sorted(plan), rnd.randint(0, len(plan)))
            ours = {name: loader.take(name) for name in taken}
            ours.update(loader)
        assert set(ours) == set(plan)
        expected = stock.load_file(path)
        for name, value in plan.items():
            whole = expected[name]
            assert_same(ours[name].clone(), (whole if value is None else whole[value]).clone())
    assert "stock" not in {report.path for report in seen.reports}


def test_packed_rows(raw, fast) -> None:
    """Two numbers a byte: rows of whole bytes can be cut, the numbers of a byte cannot."""
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this torch has no F4")
    content = raw.pack({"x": raw.entry("F4", [4, 2, 8], 0, 32)}, bytes(range(32)))
    path = raw.write(content)
    try:
        handle = fast.safe_open(path, "pt")
    except SafetensorError as error:
        pytest.skip(f"this safetensors has no F4: {error}")
    for options in WAYS.values():
        with fastst_patch.config_context(**options), fast.safe_open(path, "pt") as handle:
            rows = handle.prefetch({"x": slice(1, 3)}).take("x")
            assert (rows.shape, rows.view(torch.uint8).flatten().tolist()) == (
                (2, 2, 4), list(range(8, 24)),
            )  # fmt: skip
            part = handle.prefetch({"x": (slice(1, 3), slice(1, 2), slice(None))}).take("x")
            found = part.contiguous().view(torch.uint8).flatten().tolist()
            assert found == [12, 13, 14, 15, 20, 21, 22, 23]
            with pytest.raises(SafetensorError, match="last dimension of x: its dtype is packed"):
                handle.prefetch({"x": (slice(1, 3), slice(None), slice(0, 2))})


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.device("meta")])
def test_under_a_mode_of_torch(fast, stock, sample, assert_same, mode) -> None:
    """As `get_tensor` and slices there; what is taken outside is plain again."""
    with fast.safe_open(sample, "pt") as handle, stock.safe_open(sample, "pt") as theirs:
        loader = handle.prefetch({"w": None, "b": slice(2, 5), "h": None})
        with mode():
            assert_same(loader.take("w"), theirs.get_tensor("w"))
            assert_same(loader.take("b"), theirs.get_slice("b")[2:5])
        assert_same(loader.take("h"), theirs.get_tensor("h"))


# ---------------------------------------------------------------- what it says


def _said(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def test_what_a_loader_says(fast, sample) -> None:
    """As safetensors 0.9.0rc1 over a fake runtime."""
    with fast.safe_open(sample, "pt") as handle:
        loader = handle.prefetch({"w": None, "b": None})
    assert loader.__enter__() is loader
    walk = iter(loader)
    name, _ = next(walk)
    other = "w" if name == "b" else "b"
    refused = [
        (lambda: loader.take(name), "SafetensorError", f"{name}: {ALREADY}"),
        (lambda: loader.take("h"), "SafetensorError", "tensor h is not in the prefetch plan"),
        (lambda: loader.take(3), "TypeError", "'int' object is not an instance of 'str'"),
        (loader.close, "", ""),
        (loader.close, "", ""),
        (lambda: loader.take(name), "SafetensorError", f"{name}: {ALREADY}"),
        (lambda: loader.take(other), "SafetensorError", f"{other}: prefetch loader closed"),
        (lambda: loader.take("h"), "SafetensorError", "tensor h is not in the prefetch plan"),
        (lambda: next(walk), "SafetensorError", "prefetch loader closed"),
        (lambda: next(walk), "StopIteration", ""),
        (lambda: list(loader), "SafetensorError", "prefetch loader closed"),
    ]  # fmt: skip
    for call, error, text in refused:
        assert _said(call) == (error, text)
    assert (len(loader), sorted(loader.names())) == (2, ["b", "w"])
    done = fast.safe_open(sample, "pt").prefetch({"w": None})
    done.take("w")
    done.close()
    assert list(done) == []
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(loader)
    if UPSTREAM:
        assert isinstance(loader, safetensors.PrefetchLoader)


# ---------------------------------------------------------------- reading ahead, and its bounds


@pytest.mark.parametrize("tensors", ["auto", "owned"])
@pytest.mark.parametrize("budget", [0, 1, 150_000, 400_000, 1_000_000])
def test_reading_ahead_stays_within_the_budget(fast, numbered, tensors, budget) -> None:
    options = {"io": "buffered", "tensors": tensors, "device_memory_budget": budget}
    with fastst_patch.config_context(**options), fast.safe_open(numbered, "pt") as handle:
        before = engine.counters()["bytes_buffered"]

        def read() -> int:
            engine.shutdown()  # waits for what was started
            return engine.counters()["bytes_buffered"] - before

        with handle.prefetch() as loader:
            assert read() <= budget
            assert (read() > 0) == (budget >= 150_000)
            for count, (name, tensor) in enumerate(loader, 1):
                assert right(name, tensor)
                assert read() <= count * SIZE + budget
        assert read() == 40 * SIZE


@pytest.mark.parametrize("seed", range(3))
def test_any_order_stays_within_the_budget(fast, numbered, seed) -> None:
    """Groups that a jump leaves behind are given up; what is left of them is read alone."""
    rnd = random.Random(seed)
    options = {"io": "buffered", "device_memory_budget": 900_000}
    with fastst_patch.config_context(**options), fast.safe_open(numbered, "pt") as handle:
        before = engine.counters()
        loader = handle.prefetch()
        for name in rnd.sample(loader.names(), 40):
            assert right(name, loader.take(name))
            engine.shutdown()
            assert engine.counters()["arena_bytes"] - before["arena_bytes"] <= 900_000 + 400_000
        assert engine.counters()["bytes_buffered"] - before["bytes_buffered"] <= 2 * 40 * SIZE
        assert engine.counters()["arena_bytes"] == before["arena_bytes"]


def test_only_the_rows_of_a_plan_are_read(fast, numbered) -> None:
    plan = {f"t{i:02}": slice(i, i + 3) for i in range(40)}
    for options in ({"io": "buffered"}, {"io": "direct"}, {"tensors": "owned"}):
        with fastst_patch.config_context(**options), fast.safe_open(numbered, "pt") as handle:
            before = engine.counters()
            with handle.prefetch(plan) as loader:
                engine.shutdown()  # all of it was read ahead
                after = engine.counters()
                moved = ("bytes_buffered", "bytes_direct")
                assert sum(after[name] - before[name] for name in moved) == 40 * 3000
                assert all(right(name, tensor) for name, tensor in loader)


def test_a_cold_file_is_read_ahead(fast, raw, evict, on_disk, watch) -> None:
    path = file_of_numbers(raw, 16, 1 << 20)
    evict(Path(path))
    with watch() as seen, fast.safe_open(path, "pt") as handle:
        plan = {f"t{i:02}": slice(0, 1 << 19) if i % 2 else None for i in range(0, 16, 2)}
        plan |= {f"t{i:02}": slice(0, 1 << 19) for i in range(1, 16, 2)}
        with handle.prefetch(plan) as loader:
            engine.shutdown()
            found = engine.residency(path).resident_bytes
            assert found >= 8 * (1 << 20) + 8 * (1 << 19)
            assert all(right(name, tensor) for name, tensor in loader)
    assert "mmap+readahead" in seen.paths(path)


def test_threads_are_a_bound(fast, numbered, monkeypatch) -> None:
    """Both the argument's and the option's; the argument's default leaves the option alone."""
    asked: list[int] = []
    read = engine.read

    def spied(*args: Any, threads: int, **options: Any) -> Any:
        asked.append(threads)
        return read(*args, threads=threads, **options)

    monkeypatch.setattr(engine, "read", spied)
    for option, argument, expected in (
        (0, {"threads": 3}, 3), (2, {"threads": 3}, 2), (5, {}, 5), (0, {"threads": 10_000}, 64),
        (0, {"threads": 0}, 1),
    ):  # fmt: skip
        with fastst_patch.config_context(io="buffered", threads=option):
            with fast.safe_open(numbered, "pt") as handle:
                dict(handle.prefetch(**argument))
        assert set(asked) == {expected}
        asked.clear()


# ---------------------------------------------------------------- several users, failures, the end


@pytest.mark.parametrize("options", [{}, {"io": "buffered", "device_memory_budget": 900_000}])
def test_threads_share_a_loader(fast, numbered, options) -> None:
    """Each tensor goes to one of them, by `take` or by iteration."""
    found: list[str] = []
    with fastst_patch.config_context(**options):
        loader = fast.safe_open(numbered, "pt").prefetch()
    names = iter(loader.names())
    lock = threading.Lock()

    def takes() -> None:
        while True:
            with lock:
                name = next(names, None)
            if name is None:
                return
            taken = []
            said = _said(lambda n=name, t=taken: t.append(loader.take(n)))
            assert said in (("", ""), ("SafetensorError", f"{name}: {ALREADY}"))
            if taken:
                assert right(name, taken[0])
                found.append(name)

    def iterates() -> None:
        for name, tensor in loader:
            assert right(name, tensor)
            found.append(name)

    turns = iter([takes, iterates, takes, iterates])

    def work() -> None:
        next(turns)()

    in_threads(work, 4)
    assert sorted(found) == loader.names()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("end", ["close", "drop", "handle first", "iterator", "error"])
def test_left_halfway(fast, numbered, way, end) -> None:
    handle = fast.safe_open(numbered, "pt")
    loader = handle.prefetch()
    kept = [loader.take("t07")]
    if end == "close":
        loader.close()
    elif end == "handle first":
        handle.__exit__(None, None, None)
        kept.append(dict(loader)["t39"])
        loader.close()
    elif end == "iterator":
        kept.append(next(iter(loader))[1])
    elif end == "error":
        with pytest.raises(KeyError), loader:
            raise KeyError
    del loader, handle
    gc.collect()
    assert right("t07", kept[0])


@pytest.mark.parametrize("value", [None, slice(0, 30 << 20)])
def test_closing_ends_reading_ahead(fast, raw, evict, on_disk, monkeypatch, value) -> None:
    """Of a mapped file, too, whose tensors keep its map; but not of tensors that were taken."""
    count, nbytes = 3, 32 << 20  # each is a group
    entries = {
        f"t{i}": raw.entry("U8", [nbytes], i * nbytes, (i + 1) * nbytes) for i in range(count)
    }
    path = raw.write(raw.pack(entries))
    os.truncate(path, os.path.getsize(path) + count * nbytes)
    evict(Path(path))
    jobs: list[Any] = []
    cancelled: list[Any] = []
    prefetch = engine.prefetch

    def spied(*args: Any, **options: Any) -> Any:
        jobs.append(prefetch(*args, **options))
        return jobs[-1]

    def cancel(job: Any) -> None:
        cancelled.append(job)

    monkeypatch.setattr(engine, "prefetch", spied)
    monkeypatch.setattr(engine.Job, "cancel", cancel)
    with fast.safe_open(path, "pt") as handle:
        with handle.prefetch(dict.fromkeys(entries, value)) as loader:
            kept = loader.take("t0")
            assert (len(jobs), cancelled) == (count, [])
    assert cancelled == jobs[1:]
    assert not kept[::4096].any()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("how", ["take", "iterate"])
def test_a_read_that_fails(fast, numbered, how) -> None:
    """Raises as safetensors 0.9.0rc1, and the tensor may be taken again."""
    with fastst_patch.config_context(io="buffered", threads=1, device_memory_budget=900_000):
        handle = fast.safe_open(numbered, "pt")
        engine.set_fault("preadv", first=1, count=1 << 62, errno=errno.EIO)
        loader = handle.prefetch()
        text = f"io error: {os.strerror(errno.EIO)} (os error {errno.EIO})"
        first = loader.names()[0]
        with pytest.raises(SafetensorError) as caught:
            loader.take(first) if how == "take" else next(iter(loader))
        assert str(caught.value) == (f"{first}: {text}" if how == "take" else text)
        engine.clear_faults()
        del caught
        rest = dict(loader)
        assert sorted(rest) == loader.names()
        assert all(right(name, tensor) for name, tensor in rest.items())


@pytest.mark.usefixtures("nothing_left")
def test_a_file_that_was_cut(raw, fast) -> None:
    entries = {"a": raw.entry("U8", [1000], 0, 1000), "b": raw.entry("U8", [1000], 1000, 2000)}
    path = raw.write(raw.pack(entries, bytes(2000)))
    with fastst_patch.config_context(io="buffered"), fast.safe_open(path, "pt") as handle:
        os.truncate(path, os.path.getsize(path) - 500)
        loader = handle.prefetch()
        for _ in range(2):
            assert _said(lambda: loader.take("b")) == (
                "SafetensorError", "b: io error: failed to fill whole buffer",
            )  # fmt: skip
        assert loader.take("a").tolist() == [0] * 1000
        loader.close()


def test_memory_that_is_missing(fast, stock, numbered, assert_same, watch, monkeypatch) -> None:
    """Stock does the tensor, and the report says why."""
    from fastst_patch.files import cpu

    monkeypatch.setattr(cpu, "LOOK_EVERY", 0)
    monkeypatch.setattr(engine, "memory_headroom", lambda: 1000)
    expected = stock.load_file(numbered)
    plan = {"t03": None, "t05": slice(2, 4)}
    with fastst_patch.config_context(io="buffered", fallback="warn"), watch() as seen:
        with fast.safe_open(numbered, "pt") as handle, handle.prefetch(plan) as loader:
            with pytest.warns(fastst_patch.FallbackWarning, match="prefetch of .* was left to"):
                ours = dict(loader)
            assert_same(ours["t03"], expected["t03"])
            assert_same(ours["t05"].clone(), expected["t05"][2:4].clone())
    (report,) = (report for report in seen.reports if report.call == "prefetch")
    assert "do not fit the memory" in str(report.fallback_reason)


def test_verify(fast, numbered, caplog, monkeypatch) -> None:
    from fastst_patch.dropin import prefetch_loader

    plan = {"t03": None, "t05": slice(2, 4)}
    with fastst_patch.config_context(verify=True, fallback="error"):
        with fast.safe_open(numbered, "pt") as handle, handle.prefetch(plan) as loader:
            assert all(right(name, tensor) for name, tensor in loader)
    take = prefetch_loader._PendingGroup.take
    monkeypatch.setattr(prefetch_loader._PendingGroup, "take", lambda *args: take(*args) + 1)
    with fastst_patch.config_context(verify=True):
        with fast.safe_open(numbered, "pt") as handle, handle.prefetch(plan) as loader:
            assert all(right(name, tensor) for name, tensor in loader)  # stock's
    assert caplog.text.count("differs from stock's") == 2


# ---------------------------------------------------------------- the header


def test_get_tensor_meta(fast, stock, model) -> None:
    with open(model, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    with fast.safe_open(model, "pt") as handle, stock.safe_open(model, "pt") as theirs:
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            meta = handle.get_tensor_meta(name)
            assert (meta.dtype, meta.shape) == (entry["dtype"], entry["shape"])
            assert meta.data_offsets == tuple(entry["data_offsets"])
            if UPSTREAM:
                other = theirs.get_tensor_meta(name)
                assert isinstance(meta, type(other))
                assert repr(meta) == repr(other)
        assert meta != handle.get_tensor_meta(name)
        judge = theirs.get_tensor_meta if UPSTREAM else theirs.get_slice
        for name in ("no", 3, None):
            assert _said(lambda n=name: handle.get_tensor_meta(n)) == _said(lambda n=name: judge(n))
    assert _said(lambda: handle.get_tensor_meta("no")) == ("SafetensorError", "File is closed")
