"""The explicit loader to a device, over the fake driver: bytes, casts, memory, GDS, streams."""

from __future__ import annotations

import gc
import itertools
import os
import random
import threading
from typing import Any

import pytest
import torch
from fake_device import StockOnCpu
from hypothesis import given
from hypothesis import strategies as st
from loader_files import bits, loader_of, of_all_dtypes, write
from waiting import in_threads

import fastst_patch
from fastst_patch import (
    FastSafetensorsFile,
    ParallelLoader,
    SafeTensorsFileLoader,
    engine,
    fastsafe_open,
)
from fastst_patch.loader import arguments
from fastst_patch.tensors import dtype_wanted

SIZE = 40_000
COUNT = 30
WAYS = [
    {"tensors": tensors, "io": io, "chunk_bytes": 65536}
    for tensors in ("dlpack", "owned")
    for io in ("auto", "direct")
]


@pytest.fixture(autouse=True)
def _nothing_goes_to_stock() -> Any:
    with fastst_patch.config_context(fallback="error"):
        yield


@pytest.fixture(scope="module")
def all_dtypes(tmp_path_factory) -> list[str]:
    return of_all_dtypes(tmp_path_factory.mktemp("all"), 2)


@pytest.fixture
def paths(raw) -> list[str]:
    """Three files of thirty tensors of 40,000 bytes."""
    return [
        raw.tensors(
            {f"{k}.{i:02}": torch.full((SIZE,), k * COUNT + i, dtype=torch.uint8)
             for i in range(COUNT)},
            f"model-{k}.safetensors",
        )
        for k in range(3)
    ]  # fmt: skip


def _right(name: str, tensor: torch.Tensor) -> bool:
    k, i = name.split(".")
    return tensor.shape == (SIZE,) and bool((tensor == int(k) * COUNT + int(i)).all())


def _loader(paths: list[str], device: Any = "cuda", **options: Any) -> SafeTensorsFileLoader:
    return loader_of(paths, device, **options)


def _copied() -> int:
    return engine.counters()["bytes_copied"]


def _all_gone(cuda: Any) -> bool:
    gc.collect()
    engine.shutdown()
    live = cuda.driver.live()
    return (live.blocks, live.ranges) == (0, 0)


# ---------------------------------------------------------------- bit for bit


@pytest.mark.parametrize("device", ["cuda", "cuda:1", 1, "gpu:0", torch.device("cuda:0")], ids=str)
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_every_tensor(cuda, stock, all_dtypes, options, device) -> None:
    expected = {n: bits(t) for path in all_dtypes for n, t in stock.load_file(path).items()}
    with fastst_patch.profile() as seen:
        loader = _loader(all_dtypes, device, **options)
        buffer = loader.copy_files_to_device()
        names = loader.get_keys()
        for name in [*names, *random.Random(1).sample(names, len(names))]:
            assert bits(buffer.get_tensor(name)) == expected[name], name
        buffer.close()
        loader.close()
    want = "cuda:1" if device in ("cuda:1", 1) else "cuda:0"
    assert {load.device for load in seen.reports} == {want}
    path = "ring+direct" if options["io"] == "direct" else "ring"
    assert {load.path for load in seen.reports} == {path}
    assert sum(load.tensors for load in seen.reports) == 2 * len(expected)
    assert _all_gone(cuda)


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_iteration_and_mapping(cuda, stock, all_dtypes, options) -> None:
    expected = {n: bits(t) for path in all_dtypes for n, t in stock.load_file(path).items()}
    weights = ParallelLoader(
        None, all_dtypes, device="cuda", use_tqdm_on_load=False, **options
    ).iterate_weights()
    assert {name: bits(tensor) for name, tensor in weights} == expected
    with FastSafetensorsFile(all_dtypes[0], "cuda:1", **options) as file:
        assert {name: bits(tensor) for name, tensor in file.items()}.items() <= expected.items()
    assert _all_gone(cuda)


def test_the_rank_is_not_the_device(cuda, all_dtypes, monkeypatch) -> None:
    """A device without a number is the current one."""
    monkeypatch.setattr(cuda, "current", lambda: 1)
    with fastst_patch.profile() as seen, fastsafe_open(all_dtypes[0], device="cuda") as opened:
        opened.get_tensor(opened.keys()[0])
    assert seen.reports[0].device == "cuda:1"


# ---------------------------------------------------------------- bytes copied to the device


CASTS = [("F32", "F16"), ("F16", "F32"), ("BF16", "F64"), ("I64", "F32"), ("F32", "F8_E4M3")]


@pytest.mark.parametrize(("source", "dtype"), CASTS)
@pytest.mark.parametrize("where", ["whole", "each"])
def test_casts_happen_on_the_device(cuda, tmp_path, stock, source, dtype, where) -> None:
    """The file's own bytes are copied, whether the result is smaller or larger."""
    path = write(tmp_path / "m.safetensors", {f"t{i}": (source, (50, 70 + i)) for i in range(8)})
    theirs = stock.load_file(path)
    before = _copied()
    buffer = _loader([path]).copy_files_to_device(dtype if where == "whole" else None)
    wanted = dtype_wanted(dtype)
    for name, tensor in theirs.items():
        ours = buffer.get_tensor(name, dtype=None if where == "whole" else dtype)
        # The fake device converts as the CPU does, so even payloads of NaNs are equal.
        assert bits(ours) == bits(tensor.to(wanted))
    buffer.close()
    engine.shutdown()
    assert _copied() - before == sum(tensor.nbytes for tensor in theirs.values())


def test_columns_on_the_device(cuda, tmp_path, stock) -> None:
    entries = {f"t{i}": ("BF16", (30, 10 + i)) for i in range(4)}
    path = write(tmp_path / "m.safetensors", entries)
    theirs = stock.load_file(path)
    before = _copied()
    with _loader([path]).copy_files_to_device() as buffer:
        columns = buffer.get_multi_cols(list(theirs), 1, dtype="F32").get_raw()
    assert bits(columns) == bits(torch.cat(list(theirs.values()), 1).float())
    engine.shutdown()
    assert _copied() - before == sum(tensor.nbytes for tensor in theirs.values())


def test_slices_read_their_rows(cuda, paths, stock) -> None:
    theirs = stock.load_file(paths[1])["1.07"]
    with FastSafetensorsFile(paths[1], "cuda") as file:
        piece = file.get_slice("1.07")
        assert piece.get_shape() == [SIZE]
        for index, most in (
            (slice(3, 8), 5),
            (slice(-4, None), 4),
            (slice(9, 3), 0),
            (slice(0, 9, 2), SIZE),
        ):
            before = _copied()
            assert torch.equal(piece[index], theirs[index])
            engine.shutdown()
            assert _copied() - before <= most


@st.composite
def _wanted(draw: Any) -> tuple[str, tuple[int, ...], str | None, int]:
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=0, max_size=3)))
    source = draw(st.sampled_from(["F32", "BF16", "I32", "U8", "F64"]))
    dtype = draw(st.sampled_from([None, "F16", "F32", "F64", "I64"]))
    return source, shape, dtype, draw(st.integers(-1, max(len(shape) - 1, -1)))


@given(data=st.data())
def test_slices_and_casts(fake_driver, tmp_path_factory, stock, data) -> None:
    """Any dtype, shape, conversion, dimension and slice gives torch's result on stock's tensor."""
    import fake_device

    folder = tmp_path_factory.mktemp("any")
    wanted = data.draw(st.lists(_wanted(), min_size=1, max_size=5))
    entries = {f"t{i}": (source, shape) for i, (source, shape, _, _) in enumerate(wanted)}
    path = write(folder / "m.safetensors", entries, data.draw(st.integers(0, 99)))
    theirs = stock.load_file(path)
    device = data.draw(st.sampled_from(["cpu", "cuda"]))
    budget = data.draw(st.sampled_from([0, 300, None]))
    with fake_device.fake_cuda(fake_driver):
        loader = _loader([path], device, device_memory_budget=budget)
        with loader.copy_files_to_device() as buffer, FastSafetensorsFile(path, device) as file:
            for i, (_, shape, dtype, dim) in enumerate(wanted):
                name, to = f"t{i}", dtype_wanted(dtype)
                tensor = theirs[name]
                ours = buffer.get_sharded(name, dim, dtype=dtype)
                assert bits(ours) == bits(tensor if to is None else tensor.to(to))
                index = tuple(
                    slice(*sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))))
                    for n in shape
                )
                if index:
                    assert bits(file.get_slice(name)[index]) == bits(tensor[index])
        loader.close()
        del buffer, file, ours
    gc.collect()


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("tensors", ["dlpack", "owned"])
@pytest.mark.parametrize("budget", [0, 50_000, 200_000, 800_000, None])
def test_reading_files_in_order_stays_within_the_budget(cuda, paths, budget, tensors) -> None:
    limit = (256 << 20) if budget is None else budget
    loader = _loader(paths, device_memory_budget=budget, tensors=tensors, chunk_bytes=65536)
    buffer = loader.copy_files_to_device()
    engine.shutdown()
    assert _moved_at_most(cuda, limit)
    before, most = _copied(), cuda.driver.live().block_bytes
    ahead = most
    for name in loader.get_keys():
        assert _right(name, buffer.get_tensor(name))  # and freed at once
        most = max(most, cuda.driver.live().block_bytes)
    assert most <= limit + 40_192
    engine.shutdown()
    assert _copied() - before <= 3 * COUNT * SIZE  # each once
    assert _copied() - before >= 3 * COUNT * SIZE - ahead
    buffer.close()
    assert _all_gone(cuda)


def _moved_at_most(cuda: Any, limit: int) -> bool:
    return cuda.driver.live().block_bytes <= limit


@pytest.mark.parametrize("queue", [-1, 0, 2])
@pytest.mark.parametrize("budget", [100_000, 400_000, 2_000_000, 1 << 40])
def test_iteration_stays_within_the_budget(cuda, paths, queue, budget) -> None:
    """Yielded tensors count: memory is the budget, or the tensors and one block if that is more."""
    loader = ParallelLoader(
        None, paths, queue_size=queue, device="cuda", use_tqdm_on_load=False,
        device_memory_budget=budget, tensors="owned", chunk_bytes=65536,
    )  # fmt: skip
    kept: list[torch.Tensor] = []
    for name, tensor in loader.iterate_weights():
        assert _right(name, tensor)
        kept.append(tensor)
        given = len(kept) * SIZE
        window = max(min(256 << 20, budget) // 3, 40_192)
        assert cuda.driver.live().block_bytes <= max(budget, given + window) + 40_192
    assert len(kept) == 3 * COUNT
    del tensor
    kept.clear()
    assert _all_gone(cuda)


@pytest.mark.parametrize("tensors", ["dlpack", "owned"])
@pytest.mark.parametrize("how", ["not_kept", "none_resident", "all_resident"])
def test_tensors_that_are_not_kept_do_not_count(cuda, paths, how, tensors) -> None:
    options: dict[str, Any] = {
        "not_kept": {"accumulate_resident": False},
        "none_resident": {"resident_tensor": lambda name: False},
        "all_resident": {},
    }[how]
    loader = ParallelLoader(
        None, paths, queue_size=5, device="cuda", use_tqdm_on_load=False,
        device_memory_budget=600_000, tensors=tensors, **options,
    )  # fmt: skip
    most = []
    for name, tensor in loader.iterate_weights():
        assert _right(name, tensor)
        del tensor
        most.append(cuda.driver.live().block_bytes)
    late = max(most[COUNT : 2 * COUNT])
    assert max(most) <= 600_000 + 40_192
    assert late <= 2 * 200_960 if how == "all_resident" else late > 400_000


@pytest.mark.parametrize(("queue", "files"), [(-1, 1), (0, 2), (1, 3), (9, 3)])
def test_queue_size_is_files_in_progress(cuda, paths, queue, files) -> None:
    before = _copied()
    weights = ParallelLoader(
        None, paths, queue_size=queue, device="cuda", use_tqdm_on_load=False
    ).iterate_weights()
    next(weights)
    engine.shutdown()
    assert _copied() - before == files * COUNT * SIZE
    weights.close()
    assert _all_gone(cuda)


def test_max_batch_bytes_bounds_blocks(cuda, paths) -> None:
    loader = ParallelLoader(
        None, paths, device="cuda", use_tqdm_on_load=False, max_batch_bytes=100_000,
        tensors="dlpack",
    )  # fmt: skip
    assert all(_right(name, tensor) for name, tensor in loader.iterate_weights())
    assert cuda.largest <= 100_000


def test_copying_starts_at_once_and_no_more_than_the_budget(cuda, paths) -> None:
    before = _copied()
    loader = _loader(paths, device_memory_budget=500_000)
    assert cuda.allocated == 0  # headers move nothing
    assert _copied() == before
    buffer = loader.copy_files_to_device()
    engine.shutdown()
    assert 0 < _copied() - before <= 500_000
    buffer.close()
    assert _all_gone(cuda)


def test_a_few_tensors_read_alone(cuda, paths) -> None:
    loader = _loader(paths, device_memory_budget=0)
    before = _copied()
    with loader.copy_files_to_device() as buffer:
        for name in ("1.05", "0.20", "2.11"):
            assert _right(name, buffer.get_tensor(name))
    engine.shutdown()
    assert _copied() - before == 3 * SIZE


@pytest.mark.parametrize("order", list(itertools.permutations(["buffer", "loader", "tensors"])))
@pytest.mark.parametrize("tensors", ["dlpack", "owned"])
def test_nothing_is_left(cuda, paths, order, tensors) -> None:
    loader = _loader(paths, tensors=tensors, device_memory_budget=300_000)
    buffer = loader.copy_files_to_device()
    held = [buffer.get_tensor(f"1.{i:02}") for i in range(5)]
    for what in order:
        if what == "tensors":
            assert all(_right(f"1.{i:02}", tensor) for i, tensor in enumerate(held))
            held.clear()
        else:
            (buffer if what == "buffer" else loader).close()
    del buffer, loader
    assert _all_gone(cuda)


@pytest.mark.parametrize("mode", [0, 1])
def test_threads_share_a_buffer(cuda, paths, mode) -> None:
    cuda.driver.lib.fake_mode(mode, 5)
    buffer = (loader := _loader(paths, device_memory_budget=400_000)).copy_files_to_device()
    todo, lock, wrong = iter(loader.get_keys() * 2), threading.Lock(), []

    def work() -> None:
        while True:
            with lock:
                name = next(todo, None)
            if name is None:
                return
            if not _right(name, buffer.get_tensor(name)):
                wrong.append(name)

    in_threads(work, 3)
    assert wrong == []
    buffer.close()


def test_a_cast_is_handed_out_when_it_has_run(cuda, paths) -> None:
    """Any stream may use it at once, and its input is freed only after the cast has run."""
    first, second = cuda.new_stream(), cuda.new_stream()
    with cuda.on(first), _loader(paths).copy_files_to_device() as buffer:
        buffer.get_tensor("0.00", dtype="F32")
        assert (cuda.settled, cuda.recorded) == ([0], 0)
        with cuda.on(second):
            buffer.get_tensor("0.01", dtype="F32")
        assert (cuda.settled, cuda.recorded) == ([0, 0], 1)


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("tensors", ["dlpack", "owned"])
def test_memory_that_runs_out(cuda, paths, monkeypatch, tensors) -> None:
    """Tensors read ahead are freed; then stock loads, which allocates tensor by tensor."""
    asked = StockOnCpu(monkeypatch, cuda.driver)
    with fastst_patch.config_context(fallback="auto"), fastst_patch.profile() as seen:
        loader = _loader(paths, device_memory_budget=300_000, tensors=tensors)
        buffer = loader.copy_files_to_device()
        assert _right("0.00", buffer.get_tensor("0.00"))
        cuda.refuse_from = cuda.allocated + 1
        for name in loader.get_keys():
            assert _right(name, buffer.get_tensor(name))
        buffer.close()
    assert "handle" in asked.asked
    assert any("not enough memory" in (r.fallback_reason or "") for r in seen.reports)
    cuda.refuse_from = None
    assert _all_gone(cuda)


def test_a_failing_disk(cuda, paths) -> None:
    loader = _loader(paths, device_memory_budget=300_000, io="buffered")
    engine.set_fault("pread", errno=5)
    try:
        with loader.copy_files_to_device() as buffer:
            with pytest.raises(OSError, match=r"tensor '0.03' of .*model-0.*Input/output error"):
                buffer.get_tensor("0.03")
            engine.clear_faults()
            for name in loader.get_keys():  # later requests succeed
                assert _right(name, buffer.get_tensor(name))
    finally:
        engine.clear_faults()
    loader.close()
    assert _all_gone(cuda)


def test_a_failing_driver(cuda, paths, monkeypatch) -> None:
    asked = StockOnCpu(monkeypatch, cuda.driver)
    cuda.driver.fail("cuMemcpyHtoDAsync_v2", first=1, count=1 << 30)
    with fastst_patch.config_context(fallback="auto"):
        with _loader(paths).copy_files_to_device() as buffer:
            assert _right("2.03", buffer.get_tensor("2.03"))
    assert "handle" in asked.asked


def test_mmap_goes_to_stock(cuda, paths, monkeypatch) -> None:
    asked = StockOnCpu(monkeypatch, cuda.driver)
    with fastst_patch.config_context(fallback="auto"), fastst_patch.profile() as seen:
        with fastst_patch.config_context(io="mmap"), fastsafe_open(paths[0], device="cuda") as f:
            assert _right("0.04", f.get_tensor("0.04"))
    assert [report.path for report in seen.reports] == ["stock"]
    assert asked.asked == ["handle"]


def test_stock_reads_the_file_whose_header_was_read(cuda, paths, monkeypatch) -> None:
    """Another file lies at the path by then."""
    StockOnCpu(monkeypatch, cuda.driver)
    with fastst_patch.config_context(fallback="auto", io="mmap"):
        loader = _loader(paths)
        os.replace(paths[1], paths[0])
        with loader.copy_files_to_device() as buffer:
            for name in ("0.04", "2.04"):
                assert _right(name, buffer.get_tensor(name))


# ---------------------------------------------------------------- GDS


@pytest.mark.parametrize("works", [True, False])
@pytest.mark.parametrize("asks", [{}, {"nogds": False}, {"nogds": True, "use_fgds": True}])
def test_nogds_false_requests_gds(cuda, paths, monkeypatch, works, asks) -> None:
    monkeypatch.setattr(arguments, "gds_obstacle", lambda: None if works else "no such module")
    with fastst_patch.profile() as seen:
        loader = _loader(paths, **asks)
        with loader.copy_files_to_device() as buffer:
            assert all(_right(name, buffer.get_tensor(name)) for name in loader.get_keys())
    want = {"gds (compatibility mode)"} if works else {"ring"}
    assert {report.path for report in seen.reports} == want
    reason = "GDS was requested (nogds=False) and cannot be used: no such module"
    assert {report.fallback_reason for report in seen.reports} == ({None} if works else {reason})


def test_gds_is_not_used_if_the_caller_forbids_it(cuda, paths, monkeypatch) -> None:
    monkeypatch.setattr(arguments, "gds_obstacle", lambda: None)
    with fastst_patch.profile() as seen:
        for options in ({"nogds": True}, {"io": "buffered"}):
            with _loader(paths, **options).copy_files_to_device() as buffer:
                buffer.get_tensor("0.01")
        with fastst_patch.config_context(io="direct"), fastsafe_open(paths, device="cuda") as f:
            f.get_tensor("0.01")
    assert {r.path for r in seen.reports} == {"ring", "ring+direct"}
    assert {r.fallback_reason for r in seen.reports} == {None}
