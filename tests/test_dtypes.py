"""The table of dtypes: complete, and of the sizes that the engine and torch know."""

from __future__ import annotations

import pytest
import torch

from fastst_patch import dtypes, engine

pytestmark = pytest.mark.skipif(
    engine.native_error() is not None, reason=str(engine.native_error())
)


def test_every_dtype_of_the_engine_has_a_row() -> None:
    assert len(set(dtypes.DTYPE_NAMES)) == len(dtypes.DTYPE_NAMES)
    assert set(dtypes.DTYPE_NAMES) == set(dtypes.TORCH)


@pytest.mark.parametrize("name", dtypes.DTYPE_NAMES)
def test_sizes_agree(name: str) -> None:
    held, bits = dtypes.dtype_named(name), engine.dtype_bits(dtypes.DTYPE_NAMES.index(name))
    if held is None:
        pytest.skip("this torch does not have it")
    assert held.itemsize * 8 == bits * dtypes.TORCH[name].per_element


def test_no_dtype_has_no_size() -> None:
    assert engine.dtype_bits(len(dtypes.DTYPE_NAMES)) == 0
    assert dtypes.dtype_named("F5") is None


def test_headers_count_numbers() -> None:
    assert dtypes.header_shape((3, 4), torch.float32) == [3, 4]
    assert dtypes.header_shape((), torch.uint8) == []
    packed = [dtypes.dtype_named(dtypes.DTYPE_NAMES[kind]) for kind in dtypes.PACKED]
    for dtype in packed:
        if dtype is not None:
            assert dtypes.header_shape((3, 4), dtype) == [3, 8]
