"""Slices: which rows an index needs, what is read for it, and verify."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fastst_patch
from fastst_patch import engine, stock
from fastst_patch.config import current
from fastst_patch.dropin import slices
from fastst_patch.dropin.eligibility import open_fast
from fastst_patch.dropin.slices import behind, leading_rows, stock_over


@pytest.mark.parametrize("index", [..., slice(3, 9), (slice(None), 5)], ids=str)
def test_verify_on_slices(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, index: Any
) -> None:
    def read() -> torch.Tensor:
        with fastst_patch.safe_open(checkpoint, "pt") as f:
            return f.get_slice("w1")[index]

    expected = read()
    with fastst_patch.config_context(verify=True, fallback="error"):
        assert torch.equal(read(), expected)
    right = slices.indexed
    monkeypatch.setattr(slices, "indexed", lambda *args: right(*args) + 1)
    with fastst_patch.config_context(verify=True), caplog.at_level(logging.ERROR, "fastst_patch"):
        assert torch.equal(read(), expected)  # stock's is handed out
    assert "a slice of 'w1' differs" in caplog.text
    with fastst_patch.config_context(verify=True, fallback="error"):
        with pytest.raises(fastst_patch.FaststError, match="a slice of 'w1' differs"):
            read()


@pytest.mark.parametrize("index", [slice(None, None, 2), (None, 0), (None, slice(-10, 8, 7))])
def test_verify_takes_slices_of_one_element(tmp_path: Path, index: Any) -> None:
    """Whose stride is anything, and which count as contiguous all the same."""
    path = tmp_path / "two.safetensors"
    save_file({"b": torch.arange(2)}, path)
    with stock.safe_open(path, "pt") as handle:
        try:
            expected = handle.get_slice("b")[index]
        except Exception as error:
            pytest.skip(f"this safetensors does not take such an index: {error}")
    with fastst_patch.config_context(verify=True), fastst_patch.safe_open(path, "pt") as handle:
        assert torch.equal(handle.get_slice("b")[index], expected)


@pytest.mark.parametrize("io", ["buffered", "direct"])
def test_slices_read_only_their_rows(tmp_path: Path, io: str) -> None:
    path = tmp_path / "rows.safetensors"
    source = torch.arange(1 << 20, dtype=torch.int32).view(1024, 1024)
    save_file({"pad": torch.ones(3, dtype=torch.uint8), "w": source}, path)
    with fastst_patch.config_context(io=io, small_file_bytes=0):
        with fastst_patch.safe_open(path, "pt") as f:
            piece = f.get_slice("w")
            before = engine.counters()["bytes_buffered"] + engine.counters()["bytes_direct"]
            assert torch.equal(piece[100:110], source[100:110])
            after = engine.counters()["bytes_buffered"] + engine.counters()["bytes_direct"]
            assert after - before == 10 * 4096
            for index in (
                3, -1, (slice(5, 9), slice(None, None, 3)), slice(7, 3),
                slice(-5, None), slice(None, None, 2), (Ellipsis, 0), None, [1, 5], slice(0, 0),
                (slice(1000, 5000), 17), slice(5000, 6000),
            ):  # fmt: skip
                assert torch.equal(piece[index], source[index]), index


@pytest.mark.parametrize(
    ("index", "shape", "rows"),
    [
        (slice(2, 5), [9, 3], (2, 5, slice(None))),
        (slice(-3, None), [9], (6, 9, slice(None))),
        (slice(7, 3), [9], (7, 7, slice(None))),
        (slice(5, 99), [9], (5, 9, slice(None))),
        ((slice(2, 5), 1), [9, 3], (2, 5, (slice(None), 1))),
        ((slice(2, 5, 1), None, ...), [9, 3], (2, 5, (slice(None), None, ...))),
        (slice(0, 9, 2), [9], None),
        (slice(None, None, -1), [9], None),
        (slice(0, 9, 0), [9], None),
        (slice("a", 3), [9], None),
        (slice(0, 1), [], None),
        (3, [9], None),
        ((), [9], None),
        ((3, slice(1, 2)), [9, 3], None),
        (..., [9], None),
    ],
    ids=repr,
)
def test_rows_of_a_leading_slice(index: Any, shape: list[int], rows: Any) -> None:
    assert leading_rows(index, shape) == rows


@pytest.mark.parametrize("io", ["auto", "buffered", "direct"])
@pytest.mark.parametrize("index", [slice(1, 3), (slice(0, 9), 1), 1], ids=str)
def test_slices_under_a_mode_of_torch(
    sample: str, stock: Any, fast: Any, assert_same: Any, io: str, index: Any
) -> None:
    """Rows are read into memory that torch makes: under a mode it may be no memory at all."""
    for mode in (torch.device("meta"), torch.inference_mode()):
        with fastst_patch.config_context(io=io), fast.safe_open(sample, "pt") as handle:
            ours = handle.get_slice("w")
        theirs = stock.safe_open(sample, "pt").get_slice("w")
        with mode:
            assert_same(ours[index], theirs[index])


def test_only_slices_of_ours_have_a_file_behind_them(sample: str, stock: Any, fast: Any) -> None:
    with fast.safe_open(sample, "pt") as handle:
        found = behind(handle.get_slice("w"))
        assert found is not None
        assert found[0].layout.names[found[1]] == "w"
    for other in (stock.safe_open(sample, "pt").get_slice("w"), torch.zeros(1), None):
        assert behind(other) is None


def test_stock_opens_the_file_that_is_open_here(sample: str, stock: Any) -> None:
    opened = open_fast(sample, current(), None)
    expected = stock.load_file(sample)
    Path(sample).unlink()
    assert torch.equal(stock_over(opened).get_tensor("w"), expected["w"])
