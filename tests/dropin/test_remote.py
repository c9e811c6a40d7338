"""URLs in ``load_file`` and ``safe_open``: stock's results, over a source in memory."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from remote_model import (
    MIB,
    SECRET,
    URL,
    data_begin,
    failing_from,
    in_thread,
    model,
    wait_for,
)

import fastst_patch
from fastst_patch import FaststError, OptionError, engine
from fastst_patch.sources.base import (
    RemoteError,
)

pytestmark = pytest.mark.skipif(
    engine.native_error() is not None, reason=str(engine.native_error())
)


# ---- whole files ----


@pytest.mark.parametrize(
    "options",
    [
        {}, {"tensors": "owned"}, {"chunk_bytes": 64 << 10}, {"threads": 1}, {"io": "buffered"},
        {"host_memory_budget": 0}, {"host_memory_budget": 300 << 10}, {"page_cache": "drop"},
    ],
)  # fmt: skip
def test_load_file(stock, fast, bucket, twin, assert_same, options) -> None:
    with fastst_patch.config_context(**options), fastst_patch.profile() as seen:
        ours = fast.load_file(URL)
    assert_same(ours, stock.load_file(twin))
    (report,) = seen.reports
    assert (report.path, report.file, report.fallback_reason) == ("memory", URL, None)
    assert (report.tensors, report.bytes) == (len(ours), sum(t.nbytes for t in ours.values()))
    assert report.requests == len(bucket.reads)
    assert report.received == bucket.nbytes


def test_the_link_is_measured(fast, bucket) -> None:
    bucket.before = lambda offset, nbytes: time.sleep(0.005)  # several are on their way at a time
    with fastst_patch.config_context(chunk_bytes=64 << 10), fastst_patch.profile() as seen:
        fast.load_file(URL)
        with fast.safe_open(URL, "pt") as handle:  # too little to measure anything
            handle.get_tensor("scalar")
    large, small = seen.reports
    assert large.link > 0
    assert 0 < large.link_fraction <= 1
    assert (small.link, small.link_fraction) == (0, None)


def test_each_byte_is_asked_for_once(fast, bucket, twin) -> None:
    fast.load_file(URL)
    begin = data_begin(twin)
    asked = sorted(read for read in bucket.reads if read[0] >= begin)
    assert sum(nbytes for _, nbytes in asked) <= os.path.getsize(twin) - begin
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(asked))


def test_load_model(fast, bucket, twin) -> None:
    torch_model = torch.nn.Linear(3, 5)
    content = safetensors.torch.save({n: p.detach() + 1 for n, p in torch_model.named_parameters()})
    bucket.files["memory://here/linear.safetensors"] = content
    wanted = safetensors.torch.load(content)
    assert fast.load_model(torch_model, "memory://here/linear.safetensors") == (set(), [])
    for name, parameter in torch_model.named_parameters():
        assert torch.equal(parameter, wanted[name])


def test_ranges_in_flight_are_bounded(fast, bucket) -> None:
    with fastst_patch.config_context(chunk_bytes=64 << 10, host_memory_budget=512 << 10):
        fast.load_file(URL)  # 2 of 128 KiB
    assert 1 <= bucket.most <= 2
    bucket.most = 0
    with fastst_patch.config_context(chunk_bytes=64 << 10, threads=1):
        fast.load_file(URL)
    assert bucket.most == 1


def test_one_stream_is_read_in_order(fast, bucket, twin) -> None:
    bucket.sequential = True
    with fastst_patch.config_context(chunk_bytes=64 << 10):
        fast.load_file(URL)
    begin = data_begin(twin)
    asked = [read for read in bucket.reads if read[0] >= begin]
    assert asked == sorted(asked)
    assert bucket.most == 1


def test_progress(fast, bucket, capsys) -> None:
    with fastst_patch.config_context(progress=True):
        fast.load_file(SECRET)
    shown = capsys.readouterr().err
    assert "model.safetensors" in shown
    assert "B/s" in shown
    assert "SECRET" not in shown


# ---- handles ----


def orders(names: list[str]) -> dict[str, list[str]]:
    mixed = list(names)
    random.Random(5).shuffle(mixed)
    return {
        "file": names,
        "sorted": sorted(names),
        "backwards": names[::-1],
        "mixed": mixed,
        "twice": [name for name in sorted(names) for _ in range(2)],
    }


@pytest.mark.parametrize("order", ["file", "sorted", "backwards", "mixed", "twice"])
@pytest.mark.parametrize("options", [{}, {"host_memory_budget": 0}, {"tensors": "owned"}])
def test_handle(stock, fast, bucket, twin, assert_same_tensor, order, options) -> None:
    theirs = stock.load_file(twin)
    with fastst_patch.config_context(chunk_bytes=64 << 10, **options):
        with fastst_patch.profile() as seen, fast.safe_open(URL, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            for name in orders(list(theirs))[order]:
                assert_same_tensor(handle.get_tensor(name), theirs[name])
    (report,) = seen.reports
    assert (report.path, report.call, report.fallback_reason) == ("memory", "safe_open", None)


@pytest.mark.parametrize("options", [{}, {"tensors": "owned"}])
def test_beside_a_tensor_that_cannot_be_made(raw, stock, fast, bucket, agree, options) -> None:
    header = {f"t{i}": raw.entry("U8", [3], 3 * i, 3 * i + 3) for i in range(8)}
    header["t4"] = raw.entry("F6_E2M3", [4], 12, 15)
    content = raw.pack(header, bytes(range(24)))
    bucket.files[URL] = content
    path = raw.write(content)
    with fastst_patch.config_context(**options):
        with fast.safe_open(URL, "pt") as ours, stock.safe_open(path, "pt") as theirs:
            for i in (0, 1, 2, 3, 5, 6, 7, 4, 0):
                agree(lambda i=i: ours.get_tensor(f"t{i}"), lambda i=i: theirs.get_tensor(f"t{i}"))


def test_opening_reads_the_header_alone(fast, bucket, twin) -> None:
    with fast.safe_open(URL, "pt") as handle:
        handle.keys()
        assert max(offset + nbytes for offset, nbytes in bucket.reads) <= max(
            data_begin(twin), 16384
        )


def test_tensors_are_read_ahead(fast, bucket, twin) -> None:
    """The second request shows the order; what follows is there before it is asked for."""
    with fastst_patch.config_context(chunk_bytes=64 << 10), fast.safe_open(URL, "pt") as handle:
        names = sorted(handle.keys())
        handle.get_tensor(names[4])
        handle.get_tensor(names[5])
        wait_for(lambda: engine.counters()["jobs"] == 0)
        bucket.gate.clear()  # nothing more arrives
        for name in names[6:12]:
            assert handle.get_tensor(name).numel()
        bucket.gate.set()


def test_read_ahead_has_a_bound(fast, bucket, twin) -> None:
    budget = 1 * MIB
    with fastst_patch.config_context(chunk_bytes=64 << 10, host_memory_budget=budget):
        with fast.safe_open(URL, "pt") as handle:
            names = [name for name in sorted(handle.keys()) if name.startswith("layer")]
            for name in names[:3]:
                handle.get_tensor(name)
            wait_for(lambda: engine.counters()["jobs"] == 0)
            taken = sum(handle.get_slice(name).get_shape()[1] * 256 for name in names[:3])
            assert bucket.nbytes <= data_begin(twin) + 16384 + taken + budget // 2


def test_request_overtakes_read_ahead(fast, bucket, monkeypatch) -> None:
    read, begun = engine.read, set()

    def noted(*args: Any, **kwargs: Any) -> Any:
        job = read(*args, **kwargs)
        begun.add(threading.current_thread())
        return job

    monkeypatch.setattr(engine, "read", noted)
    with fastst_patch.config_context(chunk_bytes=64 << 10, threads=1):
        with fast.safe_open(URL, "pt") as handle:
            names = [name for name in sorted(handle.keys()) if name.startswith("layer")]
            handle.get_tensor(names[8])
            bucket.gate.clear()
            before = len(bucket.reads)
            threads = [in_thread(handle.get_tensor, names[9])]
            bucket.wait(1)  # it is on its way
            wait_for(lambda: engine.counters()["jobs"] >= 2)  # and read-ahead waits behind it
            threads.append(in_thread(handle.get_tensor, names[2]))  # which nothing predicts
            wait_for(lambda: threads[1] in begun)
            bucket.gate.set()
            for thread in threads:
                thread.join()
            begin, end = handle.get_tensor_meta(names[2]).data_offsets
            order = [nbytes for _, nbytes in bucket.reads[before:]]
            assert order.index(end - begin) <= 4


def test_get_slice_reads_its_rows(stock, fast, bucket, twin) -> None:
    theirs = stock.load_file(twin)["big"]
    with fast.safe_open(URL, "pt") as handle:
        before = bucket.nbytes
        part = handle.get_slice("big")[1000:2000]
        assert torch.equal(part, theirs[1000:2000])
        assert bucket.nbytes - before == part.nbytes
        before = bucket.nbytes
        row = handle.get_slice("big")[-3, 2:9]
        assert torch.equal(row, theirs[-3, 2:9])
        assert bucket.nbytes - before == theirs[0].nbytes


INDICES: list[Any] = [
    slice(None), ..., slice(3, 9), slice(0, 0), slice(None, None, 3), (slice(2, 5), slice(1, 4)),
    5, -1, (3, slice(None)), None, [1, 2], torch.tensor([3, 1]), True, 10**9, slice(None, None, 0),
    (1, 2, 3), "x",
]  # fmt: skip


@pytest.mark.parametrize("index", INDICES, ids=repr)
@pytest.mark.parametrize("framework", ["pt", "np"])
def test_slices(stock, fast, bucket, twin, outcome, agree, index, framework) -> None:
    def take(loaders: Any, path: str) -> Callable[[], Any]:
        def call() -> Any:
            with loaders.safe_open(path, framework) as handle:
                return handle.get_slice("layer.3.w")[index]

        return call

    agree(outcome(take(fast, URL)), outcome(take(stock, twin)))


def test_numpy(stock, fast, bucket, twin) -> None:
    wanted = {name: t for name, t in model().items() if t.dtype != torch.bfloat16}
    content = safetensors.torch.save(wanted)
    bucket.files[URL] = content
    with fastst_patch.profile() as seen:
        ours = safetensors.numpy.load_file(URL)
        with fast.safe_open(URL, "np") as handle:
            one = handle.get_tensor("layer.3.w")
    assert {report.path for report in seen.reports} == {"memory"}
    for name, array in ours.items():
        assert np.array_equal(array, wanted[name].numpy())
        assert array.flags.writeable
    assert np.array_equal(one, wanted["layer.3.w"].numpy())


def test_prefetch(stock, fast, bucket, twin, assert_same_tensor) -> None:
    theirs = stock.load_file(twin)
    plan = {"layer.3.w": None, "big": slice(100, 200), "half": (slice(3, 9), slice(0, 4))}
    with fast.safe_open(URL, "pt") as handle, handle.prefetch(plan, device="cpu") as loader:
        found = dict(loader)
    assert_same_tensor(found["layer.3.w"], theirs["layer.3.w"])
    assert torch.equal(found["big"], theirs["big"][100:200])
    assert torch.equal(found["half"], theirs["half"][3:9, :4])


def test_threads_share_a_handle(stock, fast, bucket, twin) -> None:
    theirs = stock.load_file(twin)
    wrong: list[str] = []

    def walk(handle: Any, names: list[str]) -> None:
        wrong.extend(n for n in names if not torch.equal(handle.get_tensor(n), theirs[n]))

    with fastst_patch.config_context(chunk_bytes=64 << 10), fast.safe_open(URL, "pt") as handle:
        threads = [in_thread(walk, handle, names) for names in orders(list(theirs)).values()]
        for thread in threads:
            thread.join()
    assert wrong == []


def test_tensors_and_slices_outlive_the_handle(stock, fast, bucket, twin) -> None:
    theirs = stock.load_file(twin)
    with fast.safe_open(URL, "pt") as handle:
        tensor, part = handle.get_tensor("half"), handle.get_slice("big")
    assert torch.equal(tensor, theirs["half"])
    assert torch.equal(part[5:9], theirs["big"][5:9])


def test_torch_modes(stock, fast, bucket, twin, assert_same_tensor) -> None:
    with torch.device("meta"):
        ours, theirs = fast.load_file(URL), stock.load_file(twin)
        with fast.safe_open(URL, "pt") as a, stock.safe_open(twin, "pt") as b:
            pairs = [(a.get_tensor("half"), b.get_tensor("half"))]
            pairs.append((a.get_slice("half")[2:5], b.get_slice("half")[2:5]))
    pairs += [(ours[name], theirs[name]) for name in theirs]
    for one, other in pairs:
        assert one.device == other.device
        if one.device.type == "cpu":
            assert_same_tensor(one, other)


# ---- what stock refuses, and what we do ----


def headers() -> dict[str, bytes]:
    good = safetensors.torch.save({"a": torch.arange(4)})
    length = int.from_bytes(good[:8], "little")

    def with_header(text: str, data: bytes = b"") -> bytes:
        return len(text).to_bytes(8, "little") + text.encode() + data

    return {
        "empty": b"",
        "short": b"abc",
        "no JSON": with_header("hello, world"),
        "not UTF-8": (4).to_bytes(8, "little") + b"{\xff\xfe}",
        "too long": (1 << 40).to_bytes(8, "little") + b"{}",
        "longer than the file": (5000).to_bytes(8, "little") + b"{}",
        "cut": good[:-3],
        "more": good + b"xyz",
        "gap": with_header('{"a":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}', b"abc"),
        "dtype": with_header('{"a":{"dtype":"U9","shape":[2],"data_offsets":[0,2]}}', b"ab"),
        "pickle": b"\x80\x04\x95" + bytes(40),
        "cut header": good[: length // 2],
    }


@pytest.mark.parametrize("name", headers())
def test_bad_files_raise_what_stock_raises(stock, fast, bucket, tmp_path, outcome, name) -> None:
    content = headers()[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    bucket.files[URL] = content
    for call in ("load_file", "safe_open"):
        more = ("pt",) if call == "safe_open" else ()
        with pytest.raises(Exception) as theirs:
            getattr(stock, call)(str(path), *more)
        with pytest.raises(type(theirs.value)) as ours:
            getattr(fast, call)(URL, *more)
        assert type(ours.value) is type(theirs.value)
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda of, path: of.load_file(path, "cpu", 3, 4),
        lambda of, path: of.load_file(path, colour="red"),
        lambda of, path: of.safe_open(path),
        lambda of, path: of.safe_open(path, "red"),
        lambda of, path: of.safe_open(path, "pt", "nowhere"),
        lambda of, path: of.safe_open(path, "pt", -1),
        lambda of, path: of.safe_open(path, "pt").get_tensor("no such name"),
        lambda of, path: of.safe_open(path, "pt").get_tensor(3),
        lambda of, path: of.safe_open(path, "pt").get_slice("no such name"),
        lambda of, path: of.safe_open(path, "pt").keys(1),
        lambda of, path: of.safe_open(path, "pt").no_such_method(),
        lambda of, path: of.safe_open(path, "pt").__reduce_ex__(2),
        lambda of, path: of.safe_open(path, "pt").get_slice("half").no_such_method(),
    ],
)
def test_bad_calls_raise_what_stock_raises(stock, fast, bucket, twin, call) -> None:
    with pytest.raises(Exception) as theirs:
        call(stock, twin)
    with pytest.raises(type(theirs.value)) as ours:
        call(fast, URL)
    assert str(ours.value).replace(URL, twin) == str(theirs.value)


def test_a_call_that_only_stock_can_do_is_an_error(fast, bucket) -> None:
    with pytest.raises(FaststError, match="reads no URLs"):
        fast.load_file(URL, device="xpu:0")
    with pytest.raises(FaststError, match="reads no URLs"):
        fast.safe_open(URL, "pt", "xpu:0")
    assert bucket.opened == []


def test_verify_is_refused(fast, bucket) -> None:
    with fastst_patch.config_context(verify=True):
        with pytest.raises(OptionError, match=r"verify=True.*`fastst-patch bench`") as caught:
            fast.load_file(SECRET)
    assert "SECRET" not in str(caught.value)
    assert bucket.opened == []


@pytest.mark.parametrize("io", ["mmap", "direct", "gds"])
def test_options_for_local_files_are_told(stock, fast, bucket, twin, assert_same, io) -> None:
    with fastst_patch.config_context(io=io), fastst_patch.profile() as seen:
        assert_same(fast.load_file(URL), stock.load_file(twin))
    assert seen.reports[0].fallback_reason == f"io={io!r} is for local files"


def test_local_file_of_that_name_goes_first(stock, fast, bucket, twin, tmp_path, monkeypatch):
    folder = tmp_path / "memory:" / "here"
    folder.mkdir(parents=True)
    content = safetensors.torch.save({"mine": torch.ones(3)})
    (folder / "model.safetensors").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    assert list(fast.load_file(URL)) == list(stock.load_file(URL)) == ["mine"]
    assert bucket.opened == []


def test_file_urls_are_local_files(stock, fast, twin, assert_same, monkeypatch) -> None:
    from fastst_patch.files import remote

    monkeypatch.setattr(remote, "local_path", lambda url, options: url.removeprefix("file://"))
    with fastst_patch.profile() as seen:
        assert_same(fast.load_file("file://" + twin), stock.load_file(twin))
        with fast.safe_open("file://" + twin, framework="pt") as handle:
            handle.get_tensor("half")
    assert all(report.path.startswith("mmap") for report in seen.reports)
    with pytest.raises(FileNotFoundError):
        fast.load_file("file:///no/such/file")


def test_nothing_changes_without_the_patch(stock, bucket) -> None:
    for call in (stock.load_file, safetensors.torch.load_file):
        with pytest.raises(FileNotFoundError):
            call(URL)
    with pytest.raises(FileNotFoundError):
        safetensors.safe_open(URL, "pt")
    assert bucket.opened == []


# ---- devices ----


@pytest.mark.parametrize("options", [{}, {"tensors": "dlpack"}, {"device_memory_budget": 0}])
def test_device(cuda, stock, fast, bucket, twin, assert_same, options) -> None:
    theirs = stock.load_file(twin)
    with fastst_patch.config_context(chunk_bytes=64 << 10, **options):
        with fastst_patch.profile() as seen:
            ours = fast.load_file(URL, device="cuda")
            assert_same(ours, theirs)
            with fast.safe_open(URL, "pt", "cuda") as handle:
                for name in sorted(theirs):
                    assert torch.equal(handle.get_tensor(name), theirs[name])
                assert torch.equal(handle.get_slice("big")[7:99], theirs["big"][7:99])
                assert torch.equal(handle.get_slice("half")[:], theirs["half"])
    assert {(report.path, report.device) for report in seen.reports} == {("memory", "cuda:0")}


def test_a_driver_that_fails(cuda, asked, stock, fast, bucket, twin, assert_same, watch) -> None:
    """Stock makes the tensors, of bytes that are read for it."""
    cuda.driver.fail("cuMemcpyHtoDAsync_v2", 1, 1 << 40)
    with watch() as seen:
        assert_same(fast.load_file(URL, device="cuda"), stock.load_file(twin))
    assert set(asked.asked) == {"handle"}
    (report,) = seen.reports
    assert "719" in report.fallback_reason


def test_no_memory_names_the_file(fast, bucket) -> None:
    engine.set_fault("mmap", errno=errno.ENOMEM)
    try:
        with pytest.raises(MemoryError, match=URL):
            fast.load_file(URL)
    finally:
        engine.clear_faults()


def test_device_errors(cuda, fast, bucket, twin) -> None:
    bucket.before = failing_from(data_begin(twin) + MIB)
    with pytest.raises(RemoteError, match="it broke"):
        fast.load_file(URL, device="cuda")
    bucket.before = lambda at, nbytes: None
    fast.load_file(URL, device="cuda")


def test_json_of_storage_options_reaches_the_source(fast, bucket, monkeypatch) -> None:
    seen = []
    from fastst_patch.files import remote

    def opening(url: str, options: Any = None, **more: Any) -> Any:
        seen.append(options)
        return bucket.open_source(url, options, **more)

    monkeypatch.setattr(remote, "open_source", opening)
    monkeypatch.setenv("FASTST_STORAGE_OPTIONS", json.dumps({"region": "here", "key": "SECRET"}))
    fastst_patch.config()
    fast.load_file(URL)
    assert seen == [{"region": "here", "key": "SECRET"}]
    assert "SECRET" not in repr(fastst_patch.config())
