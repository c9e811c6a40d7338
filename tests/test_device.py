"""Which device a caller means, and what is read back of a first load."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch

from fastst_patch import device
from fastst_patch.errors import Fallback


@pytest.mark.parametrize(
    ("given", "name"),
    [(None, None), ("cpu", None), (0, "cuda:0"), (1, "cuda:1"), ("cuda", "cuda:0"),
     ("cuda:1", "cuda:1")],
)  # fmt: skip
def test_devices_that_stock_knows(cuda: Any, given: object, name: str | None) -> None:
    found = device.find_device(given)
    assert (found and found.name) == name
    assert found is None or found.argument == given


@pytest.mark.parametrize(
    "given",
    ["", "CPU", "mps", "cuda:", "cuda:x", "cuda:-1", "cuda:99999", -1, 1 << 16, True, 1.0,
     torch.device("cpu"), torch.device("cuda", 0), []],
    ids=repr,
)  # fmt: skip
def test_what_else_it_may_be_stock_says(cuda: Any, given: object) -> None:
    with pytest.raises(Fallback, match="is not accelerated"):
        device.find_device(given)


def test_a_device_that_cannot_be_used_goes_to_stock(cuda: Any) -> None:
    with pytest.raises(Fallback, match="cuda:77"):
        device.find_device("cuda:77")


def test_devices_as_torch_names_them(cuda: Any) -> None:
    assert device.parse_device(1) == torch.device("cuda", 1)
    assert device.parse_device(None) == device.parse_device("cpu") == torch.device("cpu")
    with pytest.raises(RuntimeError):
        device.parse_device("nonsense")
    assert device.device_of(torch.device("cpu")) is None
    found = device.device_of(torch.device("cuda", 1))
    assert found is not None
    assert found.name == "cuda:1"
    current = device.device_of(torch.device("cuda"))
    assert current is not None
    assert current.ordinal == cuda.current()


def test_the_sample_is_the_first_whole_chunk_or_the_largest_segment(cuda: Any) -> None:
    found = device.find_device("cuda")
    assert found is not None
    chunk = device.PROOF_BYTES
    assert device.sample_of(found, array("Q")) is None
    sample = device.sample_of(found, array("Q", [10, 5, 0, 20, 7, 512, 30, 6, 1024]))
    assert sample == (20, 7, 512)
    assert sample.end == 27
    sample = device.sample_of(found, array("Q", [10, 5, 0, 20, 2 * chunk, 512]))
    assert sample == (20, chunk, 512)


def test_a_small_sample_does_not_vouch_for_a_much_larger_one(cuda: Any) -> None:
    found = device.find_device("cuda")
    assert found is not None
    moved = source = torch.arange(4, dtype=torch.uint8)
    device.prove_tensor(found, moved, source)
    assert not found.wants(5)
    assert found.wants(64)
    with pytest.raises(Fallback, match="differed"):
        device.prove_tensor(found, torch.zeros(100), torch.ones(100))
    with pytest.raises(Fallback, match="differed"):  # from now on
        device.find_device("cuda")
    assert device.find_device("cuda:1") is not None
