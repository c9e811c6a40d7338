"""Reading ahead to the CPU, below the layers that ask for each tensor once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastst_patch
from fastst_patch import engine
from fastst_patch.config import current
from fastst_patch.files.base import open_checked
from fastst_patch.files.cpu import HostFile

COUNT = 6
COPIED = [{"io": "buffered"}, {"io": "direct"}, {"tensors": "owned"}]


@pytest.fixture
def opened(raw) -> Callable[..., HostFile]:
    """Opens a file whose tensor i is full of i."""
    path = raw.tensors({f"{i}": torch.full((50, 40), i, dtype=torch.int32) for i in range(COUNT)})

    def open_it(**options: Any) -> HostFile:
        with fastst_patch.config_context(**options):
            return HostFile(*open_checked(path), current())

    return open_it


@pytest.mark.parametrize("options", [{}, {"io": "mmap"}, *COPIED], ids=str)
@pytest.mark.parametrize("again", [[3, 3], [5, 0, 5, 1, 5, 0]], ids=str)
def test_tensors_asked_for_twice(opened, options, again) -> None:
    """Each time as from a handle: memory of its own, or the same bytes of the map."""
    file = opened(**options)
    ahead = file.ahead(again)
    taken = [(i, ahead.take(i)) for i in again]
    assert len({id(tensor) for _, tensor in taken}) == len(again)
    for i, tensor in taken:
        assert bool((tensor == i).all())
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        if not file.mapped:
            tensor.fill_(-1)
    places = {tensor.data_ptr() for _, tensor in taken}
    assert len(places) == len(set(again) if file.mapped else again)
    assert file.account.tensors == len(again)
    with pytest.raises(KeyError):
        ahead.take(again[0])


@pytest.mark.parametrize("options", COPIED, ids=str)
def test_what_failed_is_read_anew(opened, options) -> None:
    file = opened(**options)
    engine.set_fault("pread", errno=5)
    engine.set_fault("preadv", errno=5)
    try:
        ahead = file.ahead([1, 1, 2])
        with pytest.raises(OSError, match="Input/output error"):
            ahead.take(1)
    finally:
        engine.clear_faults()
    for i in (1, 2):
        assert bool((ahead.take(i) == i).all())
