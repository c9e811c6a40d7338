"""Views with gaps on their way to a device: `PendingUpload` over the fake driver."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from array import array
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastst_patch import device, engine
from fastst_patch.config import current
from fastst_patch.errors import Fallback
from fastst_patch.integrations import uploads

pytestmark = pytest.mark.skipif(
    engine.native_error() is not None, reason=str(engine.native_error())
)

CHUNK = 64 << 10


def _start(views: list[torch.Tensor], **options: Any) -> uploads.PendingUpload:
    target = device.find_device("cuda")
    assert target is not None
    chosen = {"threads": 3, "chunk_bytes": CHUNK} | options
    return uploads.PendingUpload(views, target, dataclasses.replace(current(), **chosen))


def _numbers(*shape: int, dtype: torch.dtype = torch.uint8, seed: int = 1) -> torch.Tensor:
    count = dtype.itemsize
    for length in shape:
        count *= length
    made = torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))
    return made.to(torch.uint8).view(dtype).view(shape)


def _assert_copy(moved: torch.Tensor, view: torch.Tensor) -> None:
    expected = view.clone(memory_format=torch.contiguous_format)
    assert (moved.shape, moved.dtype) == (view.shape, view.dtype)
    assert moved.stride() == torch.empty(view.shape, device="meta").stride()
    raw = [t.reshape(-1).view(torch.uint8) for t in (moved, expected)]
    assert torch.equal(raw[0], raw[1])


@st.composite
def _cuts(draw: Any) -> tuple[tuple[int, ...], tuple[slice, ...], torch.dtype]:
    """Shape of a contiguous tensor, slices that leave something of it, and its dtype."""
    most = draw(st.sampled_from([6, 40, 500]))
    shape = draw(st.lists(st.integers(1, most), max_size={6: 5, 40: 3, 500: 2}[most]))
    index = []
    for length in shape:
        begin = draw(st.integers(0, length - 1))
        end = draw(st.integers(begin + 1, length))
        index.append(draw(st.sampled_from([
            slice(begin, end), slice(begin, end, draw(st.integers(1, 3))), slice(None),
        ])))  # fmt: skip
    dtype = draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.int64, torch.complex64]))
    return tuple(shape), tuple(index), dtype


@given(
    cuts=st.lists(_cuts(), min_size=1, max_size=5),
    options=st.fixed_dictionaries({
        "threads": st.sampled_from([1, 4]),
        "chunk_bytes": st.sampled_from([CHUNK, 80 << 10, 4 << 20]),
        "pinned_bytes": st.sampled_from([None, 0, CHUNK]),
    }),
    mode=st.sampled_from([0, 1]),
    order=st.randoms(use_true_random=False),
)  # fmt: skip
def test_any_slices_become_contiguous(cuda, cuts, options, mode, order) -> None:
    """Whatever is left out of several tensors, cast or not, in whatever order they are taken."""
    cuda.driver.lib.fake_mode(mode, 7)
    views = [
        _numbers(*shape, dtype=dtype, seed=seed)[index]
        for seed, (shape, index, dtype) in enumerate(cuts)
    ]
    before = engine.counters()["bytes_uploaded"]
    upload = _start(views, **options)
    asked = list(views)
    order.shuffle(asked)
    for view in asked:
        _assert_copy(upload.take(view), view)
    assert engine.counters()["bytes_uploaded"] - before == sum(view.nbytes for view in views)


def test_runs_of_a_slot_go_in_one_copy(cuda) -> None:
    views = [_numbers(1000, 1024)[:, 100:700], _numbers(7, 300, 800, seed=2)[:, 50:, 8:]]
    upload = _start(views)
    for view in views:
        _assert_copy(upload.take(view), view)
    total = sum(view.nbytes for view in views)
    # One a chunk; another where a chunk ends one tensor and begins the next.
    assert cuda.driver.calls("cuMemcpyHtoDAsync_v2") <= -(-total // CHUNK) + len(views)
    assert cuda.driver.lib.fake_pageable_copies() == 0


def test_segments_are_the_runs() -> None:
    base = _numbers(4, 3, 8, dtype=torch.int16)
    view = base[1:3, :2, 2:5]
    at = base.data_ptr()
    expected = array("Q")
    for place, (i, j) in enumerate([(1, 0), (1, 1), (2, 0), (2, 1)]):
        expected.extend((at + 2 * (24 * i + 8 * j + 2), 6, 1000 + 6 * place))
    assert uploads._segments(view, 1000) == expected
    assert uploads.run_bytes(view) == 6
    assert uploads._segments(base[1:3], 0) == array("Q", (at + 48, 96, 0))
    assert uploads.run_bytes(base[1:3]) == 96
    rows = base[1:3, :2]  # whole rows of the last dimension: longer runs
    assert uploads._segments(rows, 0) == array("Q", (at + 48, 32, 0, at + 96, 32, 32))
    assert uploads.run_bytes(rows) == 32
    assert uploads.run_bytes(base[:, :, ::2]) == 2
    assert uploads._segments(base[0, 0, 3], 5) == array("Q", (at + 6, 2, 5))


def test_a_view_is_there_when_its_last_run_is(cuda) -> None:
    """The end of its memory is far behind the beginning and as many bytes as it has."""
    cuda.driver.lib.fake_mode(1, 3)
    base = _numbers(64, 256 << 10)
    views = [base[:32, : 8 << 10], base[32:, 1000:9000]]
    for number in (0, 1):
        upload = _start(views, threads=1)
        _assert_copy(upload.take(views[number]), views[number])


def test_sources_live_until_they_have_landed(cuda, nothing_left) -> None:
    view = _numbers(3000, 1000)[:, :600]
    expected, alive = view.contiguous(), weakref.ref(view)
    upload = _start([view])
    key = id(view)
    del view
    gc.collect()
    assert alive() is not None
    upload._job.wait()
    source, moved = upload._made[key]
    assert torch.equal(moved, expected)
    del source, moved, upload
    gc.collect()
    assert alive() is None
    assert cuda.driver.live().blocks == 0


@pytest.mark.parametrize("shape", [(), (7,), (1, 9), (3, 4, 5), (1, 6, 1, 4)])
def test_first_elements(shape: tuple[int, ...]) -> None:
    whole = _numbers(*(2 * length for length in shape))
    view = whole[tuple(slice(0, length) for length in shape)]
    for count in range(1, view.numel() + 1):
        found = device._first(view, count)
        assert torch.equal(found, view.reshape(-1)[:count])


def test_no_more_is_copied_than_compared() -> None:
    view = _numbers(2, 1, 400, 100)[:, :, :300, :90]
    assert device._first(view, 5_000).untyped_storage().nbytes() <= 5_000 + 90
    assert device._first(view, 30_000).untyped_storage().nbytes() <= view.nbytes
    whole = _numbers(2, 300, 90)
    assert device._first(whole, 30_000).untyped_storage().data_ptr() == whole.data_ptr()


def test_wrong_bytes_of_a_view_are_noticed(cuda) -> None:
    """The first is read back, past its first run."""
    view = _numbers(100, 400)[:, :150]
    upload = _start([view])
    upload._job.wait()
    upload._made[id(view)][1][50, 3] ^= 1
    with pytest.raises(Fallback, match="differed"):
        upload.take(view)
    with pytest.raises(Fallback, match="differed"):
        device.find_device("cuda")
