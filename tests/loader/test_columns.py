"""get_multi_cols of the explicit loader: equal to torch.cat; errors where tensors do not fit."""

from __future__ import annotations

import itertools

import pytest
import torch
from loader_files import bits, loader_of, write

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F8_E4M3", "F8_E8M0", "BOOL", "I64", "F4"])
@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_columns_of_several_tensors(tmp_path, stock, dtype, dim) -> None:
    shapes = [[4, 6, 8], [4, 6, 8], [4, 6, 8]]
    for k, shape in enumerate(shapes):
        shape[dim] += 2 * k
    paths = [
        write(tmp_path / f"{k}.safetensors", {f"t{k}": (dtype, tuple(shape))}, k)
        for k, shape in enumerate(shapes)
    ]
    theirs = [stock.load_file(path)[f"t{k}"] for k, path in enumerate(paths)]
    buffer = loader_of(paths).copy_files_to_device()
    for order in itertools.permutations(range(3), 2):
        columns = buffer.get_multi_cols([f"t{k}" for k in order], dim).get_raw()
        raw = torch.cat([theirs[k].view(torch.uint8) for k in order], dim=dim)
        assert bits(columns) == bits(raw.view(theirs[0].dtype))
    assert bits(buffer.get_multi_cols(["t1"], dim).get_raw()) == bits(theirs[1])
    buffer.close()


def test_columns_that_do_not_fit(tmp_path) -> None:
    entries = {"a": ("F32", (4, 6)), "b": ("F32", (5, 6)), "c": ("F16", (4, 6)), "s": ("F32", ())}
    buffer = loader_of([write(tmp_path / "m.safetensors", entries)]).copy_files_to_device()
    with pytest.raises(ValueError, match=r"'b' of shape \[5, 6\] does not fit 'a'"):
        buffer.get_multi_cols(["a", "b"], 1)
    with pytest.raises(ValueError, match=r"'s' of shape \[\] does not fit 'a'"):
        buffer.get_multi_cols(["a", "s"], 1)
    with pytest.raises(ValueError, match=r"dtypes differ: 'a' torch.float32, 'c' torch.float16"):
        buffer.get_multi_cols(["a", "c"], 0)
    assert buffer.get_multi_cols(["a", "c"], 0, dtype=torch.float16).shape == (8, 6)
    with pytest.raises(IndexError, match="no dimension 2"):
        buffer.get_multi_cols(["a", "b"], 2)
    with pytest.raises(IndexError, match="no dimension 0"):
        buffer.get_multi_cols(["s"], 0)
    with pytest.raises(ValueError, match="no names"):
        buffer.get_multi_cols([], 0)
    buffer.close()
