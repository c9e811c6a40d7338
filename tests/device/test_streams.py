"""Programs with several streams, over the fake driver: whose memory is used again, and when.

The fake hands a freed block out again on its own stream at once, as torch's allocator does, and
lets the copies of a program wait until their stream is waited for. So what is read from memory
that somebody else has by then comes out wrong.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loader_files import loader_of
from safetensors.torch import save_file

import fastst_patch
from fastst_patch import device, engine
from fastst_patch.config import current
from fastst_patch.files.base import open_checked
from fastst_patch.files.cuda import DeviceFile
from fastst_patch.integrations.uploads import PendingUpload

COUNT = 24
ROWS, COLUMNS = 64, 128
BOTH = pytest.mark.parametrize("tensors", ["dlpack", "owned"])
WINDOW = COUNT * ROWS * COLUMNS * 4 // 3


@pytest.fixture
def counted(tmp_path: Path) -> Path:
    """24 tensors of 32 KiB, in the order of the file; tensor i is full of i."""
    path = tmp_path / "counted.safetensors"
    rows = {f"{i:02}": torch.full((ROWS, COLUMNS), i, dtype=torch.int32) for i in range(COUNT)}
    save_file(rows, path)
    return path


@pytest.fixture
def opened(cuda: Any, counted: Path) -> Callable[..., DeviceFile]:
    """Opens that file on its way to the device."""

    def open_it(**options: Any) -> DeviceFile:
        found = device.find_device("cuda")
        assert found is not None
        with fastst_patch.config_context(**options):
            return DeviceFile(*open_checked(str(counted)), current(), found)

    return open_it


class Program:
    """Uses each tensor on the current stream, keeps none, and checks at the end what it read."""

    def __init__(self, cuda: Any) -> None:
        self.cuda = cuda
        self.seen: list[tuple[torch.Tensor, int]] = []
        cuda.driver.lib.fake_quarantine(0)  # freed blocks are used again at once

    def use(self, tensor: torch.Tensor, number: int) -> None:
        self.seen.append((self.cuda.copy(tensor, 0), number))

    def look(self, stream: int) -> None:
        with self.cuda.on(stream):
            self.cuda.synchronize(0)
        wrong = [number for copy, number in self.seen if not bool((copy == number).all())]
        assert wrong == []


def _churn(cuda: Any, stream: int) -> None:
    """Use up memory that was freed on a stream."""
    gc.collect()
    with cuda.on(stream):
        sizes = [COUNT * ROWS * COLUMNS * 4, WINDOW // 3, ROWS * COLUMNS * 4]
        junk = [cuda.empty([size], torch.uint8, 0) for size in sizes * 8]
        cuda.synchronize(0)
    del junk


# ---- derived tensors ----


@BOTH
@pytest.mark.parametrize(
    "index", [(slice(None), slice(None, None, 2)), 5, (slice(3, 9), slice(1, 2)), slice(4, 4)]
)
def test_a_slice_is_handed_out_when_its_copy_has_run(cuda, stock, counted, tensors, index) -> None:
    program = Program(cuda)
    with fastst_patch.config_context(tensors=tensors, fallback="error"):
        with fastst_patch.safe_open(counted, "pt", device="cuda") as handle:
            ours = handle.get_slice("02")[index]
            assert torch.equal(ours, stock.load_file(counted)["02"][index])  # as a kernel sees it
            assert ours.untyped_storage().nbytes() == ours.nbytes
            assert cuda.settled == ([0] if ours.numel() else [])
            other = cuda.new_stream()
            with cuda.on(other):
                program.use(ours, 2)
                program.look(other)


# ---- read ahead under one stream, used under another ----


@BOTH
@pytest.mark.parametrize("late", [False, True])
def test_a_handle_that_changes_streams(cuda, counted, tensors, late) -> None:
    """A thread does everything on stream b, and nothing else: stock is right then."""
    first, second = cuda.new_stream(), cuda.new_stream()
    program = Program(cuda)
    options = {"tensors": tensors, "device_memory_budget": WINDOW, "fallback": "error"}
    with fastst_patch.config_context(**options):
        handle = fastst_patch.safe_open(counted, "pt", device="cuda")
        names = handle.offset_keys()
        with cuda.on(first):
            for number in (0, 1):
                handle.get_tensor(names[number])
        for number in range(2, COUNT):
            with cuda.on(second):
                program.use(handle.get_tensor(names[number]), number)
            if not late:
                _churn(cuda, first)
        del handle
    _churn(cuda, first)
    program.look(second)
    assert cuda.recorded > 0


@BOTH
def test_nothing_is_recorded_on_one_stream(cuda, counted, tensors) -> None:
    """Recording costs an event for each block that is freed."""
    program = Program(cuda)
    stream = cuda.new_stream()
    with fastst_patch.config_context(tensors=tensors, fallback="error"), cuda.on(stream):
        with fastst_patch.safe_open(counted, "pt", device="cuda") as handle:
            for number, name in enumerate(handle.offset_keys()):
                program.use(handle.get_tensor(name), number)
        program.look(stream)
    assert cuda.recorded == 0


@BOTH
def test_slices_of_what_was_read_ahead_under_another_stream(cuda, counted, tensors) -> None:
    first, second = cuda.new_stream(), cuda.new_stream()
    program = Program(cuda)
    with fastst_patch.config_context(tensors=tensors, fallback="error"):
        with fastst_patch.safe_open(counted, "pt", device="cuda") as handle:
            names = handle.offset_keys()
            with cuda.on(first):
                handle.get_tensor(names[0]), handle.get_tensor(names[1])
            for number in range(2, COUNT):
                with cuda.on(second):
                    program.use(handle.get_slice(names[number])[::3, 1], number)
                _churn(cuda, first)
    program.look(second)


@BOTH
def test_a_loader_that_changes_streams(cuda, counted, tensors) -> None:
    first, second = cuda.new_stream(), cuda.new_stream()
    program = Program(cuda)
    loader = loader_of([str(counted)], "cuda", tensors=tensors, device_memory_budget=WINDOW)
    with cuda.on(first):
        buffer = loader.copy_files_to_device()
        buffer.get_tensor("00")
    for number in range(1, COUNT):
        with cuda.on(second):
            program.use(buffer.get_tensor(f"{number:02}"), number)
        _churn(cuda, first)
    buffer.close()
    loader.close()
    _churn(cuda, first)
    program.look(second)


@BOTH
def test_ahead_taken_under_another_stream(cuda, opened, tensors) -> None:
    first, second = cuda.new_stream(), cuda.new_stream()
    program = Program(cuda)
    file = opened(tensors=tensors)
    with cuda.on(first):
        ahead = file.ahead(range(COUNT))
    with cuda.on(second):
        for number in range(COUNT - 2):  # two are not taken
            program.use(ahead.take(number), number)
    del ahead
    _churn(cuda, first)
    program.look(second)


def test_rows_ahead_taken_under_another_stream(cuda, opened) -> None:
    first, second = cuda.new_stream(), cuda.new_stream()
    program = Program(cuda)
    file = opened()
    wanted = [(i, 3, 9 + i) for i in range(COUNT)]
    with cuda.on(first):
        ahead = file.rows_ahead(wanted)
    with cuda.on(second):
        for rows in wanted:
            program.use(ahead.take(rows), rows[0])
    del ahead
    _churn(cuda, first)
    program.look(second)


def test_uploads_taken_under_another_stream(cuda) -> None:
    first, second = cuda.new_stream(), cuda.new_stream()
    program = Program(cuda)
    sources = [torch.full((ROWS, COLUMNS), i, dtype=torch.int32) for i in range(COUNT)]
    found = device.find_device("cuda")
    assert found is not None
    with cuda.on(first):
        upload = PendingUpload(sources, found, current())
    with cuda.on(second):
        for number, source in enumerate(sources):
            program.use(upload.take(source), number)
    del upload
    _churn(cuda, first)
    program.look(second)


# ---- captures ----


@BOTH
@pytest.mark.parametrize("started", [False, True], ids=["from the start", "from the middle"])
def test_groups_in_flight_while_a_graph_is_captured(cuda, counted, tensors, started) -> None:
    """Another thread captures. A call of ours that would void its capture is a violation."""
    engine.shutdown()  # slots are pinned anew
    options = {"tensors": tensors, "device_memory_budget": WINDOW, "chunk_bytes": 65536}
    with fastst_patch.config_context(**options, fallback="error"):
        cuda.driver.lib.fake_capture(not started)
        with fastst_patch.safe_open(counted, "pt", device="cuda") as handle:
            names = handle.offset_keys()
            for number in range(COUNT):
                assert bool((handle.get_tensor(names[number]) == number).all())
                if number == 1:
                    cuda.driver.lib.fake_capture(1)
            piece = handle.get_slice(names[5])[:, 3]
        assert bool((piece == 5).all())
    engine.shutdown()
    assert cuda.driver.violations() == []
    assert cuda.driver.calls("cuEventSynchronize") > 0
    assert cuda.driver.calls("cuThreadExchangeStreamCaptureMode") > 0


# ---- the same asked for twice ----


@BOTH
@pytest.mark.parametrize("again", [[3, 3], [5, 3, 3, 4, 3], [0, 1, 1, 2, 2, 2, 23, 23]], ids=str)
def test_tensors_asked_for_twice(cuda, opened, tensors, again) -> None:
    """Each request gets a tensor of its own, as from stock; the bytes are read once."""
    file = opened(tensors=tensors)
    before = engine.counters()["bytes_copied"]
    ahead = file.ahead(again)
    taken = [(number, ahead.take(number)) for number in again]
    assert engine.counters()["bytes_copied"] - before == len(set(again)) * ROWS * COLUMNS * 4
    for number, tensor in taken:
        assert bool((tensor == number).all())
        tensor.fill_(-1)  # shows in no other
    assert len({tensor.data_ptr() for _, tensor in taken}) == len(again)
    with pytest.raises(KeyError):
        ahead.take(again[0])
    assert file.account.tensors == len(again)


@pytest.mark.parametrize(
    "wanted",
    [
        [(2, 0, 8), (2, 0, 8)],
        [(2, 0, 8), (2, 4, 12)],
        [(2, 4, 12), (2, 0, 64), (2, 0, 8), (2, 60, 64), (3, 0, 64)],
        [(1, 0, 4), (1, 4, 8), (1, 2, 6), (1, 2, 6), (1, 8, 9), (1, 5, 5)],
    ],
    ids=str,
)
def test_rows_asked_for_twice(cuda, opened, wanted) -> None:
    """Equal or overlapping ones; each byte is read once."""
    file = opened()
    before = engine.counters()["bytes_copied"]
    ahead = file.rows_ahead(wanted)
    taken = [(rows, ahead.take(rows)) for rows in wanted]
    needed = {(i, row) for i, start, stop in wanted for row in range(start, stop)}
    assert engine.counters()["bytes_copied"] - before == len(needed) * COLUMNS * 4
    for (i, start, stop), tensor in taken:
        assert tensor.shape == (stop - start, COLUMNS)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert bool((tensor == i).all())
        tensor.fill_(-1)
    places = {tensor.data_ptr() for _, tensor in taken if tensor.numel()}
    assert len(places) == sum(stop > start for _, start, stop in wanted)
    with pytest.raises(KeyError):
        ahead.take(wanted[0])


def test_what_failed_is_read_anew(cuda, opened) -> None:
    """Where several share a job, the error may belong to a tensor that was not asked for."""
    file = opened()
    for call in ("pread", "preadv"):
        engine.set_fault(call, errno=5)
    try:
        ahead = file.ahead([1, 1, 2])
        rows = file.rows_ahead([(3, 0, 8), (3, 4, 12), (3, 4, 12)])
        with pytest.raises(OSError, match="Input/output error"):
            ahead.take(1)
        with pytest.raises(OSError, match="Input/output error"):
            rows.take((3, 4, 12))
    finally:
        engine.clear_faults()
    taken = [ahead.take(1), ahead.take(2), rows.take((3, 0, 8)), rows.take((3, 4, 12))]
    for tensor, number in zip(taken, (1, 2, 3, 3), strict=True):
        assert bool((tensor == number).all())


def test_memory_asked_for_twice_goes_back(cuda, opened) -> None:
    file = opened(tensors="owned")
    ahead = file.ahead([1, 1, 2])
    rows = file.rows_ahead([(1, 0, 8), (1, 4, 12)])
    taken = [ahead.take(1), ahead.take(1), rows.take((1, 4, 12)), rows.take((1, 0, 8))]
    del ahead, rows
    gc.collect()
    assert cuda.driver.live().blocks == 4
    del taken
    assert cuda.driver.live().blocks == 0
