"""Exact comparison of what two loaders gave or raised; fixtures known to every test.

`fuzz/differential.py` uses the functions without the fixtures.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

_ADDRESS = re.compile(r"0x[0-9a-f]+")


def storage_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The whole storage as bytes, whatever dtype (f4 included) or strides look at it."""
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return flat.set_(tensor.untyped_storage())


def _geometry(tensor: torch.Tensor) -> dict[str, Any]:
    return {
        "type": type(tensor),
        "dtype": tensor.dtype,
        "device": tensor.device,
        "shape": tuple(tensor.shape),
        "stride": tensor.stride(),
        "storage_offset": tensor.storage_offset(),
        "storage_nbytes": tensor.untyped_storage().nbytes(),
        "layout": tensor.layout,
        "requires_grad": tensor.requires_grad,
        "grad_fn": tensor.grad_fn,
        "is_leaf": tensor.is_leaf,
        "is_contiguous": tensor.is_contiguous(),
        "is_inference": tensor.is_inference(),
        "is_conj": tensor.is_conj(),
        "is_neg": tensor.is_neg(),
        "is_shared": tensor.is_shared(),
        "is_pinned": tensor.device.type == "cpu" and tensor.is_pinned(),
        "version": None if tensor.is_inference() else tensor._version,
        "attributes": dict(tensor.__dict__),
    }


def check_same_tensor(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Bit for bit, and in everything a caller can ask a tensor about its storage."""
    assert _geometry(ours) == _geometry(theirs)
    if ours.device.type != "meta":
        # Same geometry over storages equal in every byte is the same tensor, NaNs included.
        assert torch.equal(storage_bytes(ours), storage_bytes(theirs)), "different bytes"


def check_same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, torch.Tensor)
        check_same_tensor(ours, theirs)
    elif isinstance(theirs, dict):
        assert type(ours) is type(theirs)
        assert ours.keys() == theirs.keys()
        for name in theirs:
            check_same(ours[name], theirs[name])
    elif isinstance(theirs, (list, tuple)):
        assert (type(ours), len(ours)) == (type(theirs), len(theirs))
        for mine, other in zip(ours, theirs, strict=True):
            check_same(mine, other)
    elif type(theirs).__module__ == "numpy":
        assert (type(ours), ours.dtype) == (type(theirs), theirs.dtype)
        assert (ours.shape, ours.tobytes()) == (theirs.shape, theirs.tobytes())
        assert (ours.strides, str(ours.flags)) == (theirs.strides, str(theirs.flags))
    elif hasattr(theirs, "__array__"):  # of a library beside torch
        assert type(ours) is type(theirs)
        check_same(np.asarray(ours), np.asarray(theirs))
    elif type(theirs).__name__ in ("safe_open", "_safe_open_handle", "PySafeSlice"):
        pass  # a handle or a slice: what it answers is compared, not what it is
    else:
        assert type(ours) is type(theirs)
        assert ours == theirs


@pytest.fixture(scope="session")
def assert_same_tensor() -> Callable[[torch.Tensor, torch.Tensor], None]:
    return check_same_tensor


@pytest.fixture(scope="session")
def assert_same() -> Callable[[Any, Any], None]:
    return check_same


@dataclass(frozen=True)
class Outcome:
    """What a call did: ("ok", value) or ("raise", type, text without addresses and C++ stacks)."""

    kind: str
    value: Any = None
    error: type[BaseException] | None = None
    text: str = ""


def outcome_of(call: Callable[[], Any]) -> Outcome:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Outcome("ok", value=call())
        except BaseException as error:
            # What Rust calls a panic is no Exception; older versions panic on some arguments.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            text = str(error).split("\nException raised from ")[0]
            return Outcome("raise", error=type(error), text=_ADDRESS.sub("0x", text))


def check_agree(
    ours: Callable[[], Any], theirs: Callable[[], Any], *, text: bool = True, again: int = 64
) -> tuple[Any, Any]:
    """Run both; same value, or same exception type and text. Returns both values.

    Stock walks hash maps: among tensors at one offset, the one its error names changes from run
    to run. A differing error is compared with what `again` more runs of stock raise.
    `text=False` is for messages that the interpreter, not safetensors, puts together.
    """
    mine, other = outcome_of(ours), outcome_of(theirs)
    assert mine.kind == other.kind, (mine, other)
    if mine.kind == "ok":
        check_same(mine.value, other.value)
    elif mine.error is not other.error or (text and mine.text != other.text):
        seen = [other, *(outcome_of(theirs) for _ in range(again))]
        assert mine.error in {one.error for one in seen}, (mine, other)
        assert not text or mine.text in {one.text for one in seen}, (mine, other)
    return mine.value, other.value


@pytest.fixture(scope="session")
def outcome() -> Callable[[Callable[[], Any]], Outcome]:
    return outcome_of


@pytest.fixture(scope="session")
def agree() -> Callable[..., tuple[Any, Any]]:
    return check_agree


@pytest.fixture
def same(assert_same: Any, tmp_path: Path) -> Any:
    """Calls a function with and without the patch, and compares what happens."""
    from twice import Same

    return Same(assert_same, tmp_path)
