"""``framework="paddle"``: stock's own tensors, and what is not cached is read ahead."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import subprocess
import sys
from typing import Any

import pytest

import fastst_patch
from fastst_patch import engine
from fastst_patch.dropin import eligibility

_root = logging.getLogger()
_before = _root.handlers[:], _root.level
paddle = pytest.importorskip("paddle", reason="needs PaddlePaddle: the extra `test-paddle`")
_root.handlers[:], _root.level = _before  # importing it makes every INFO of the process visible

ROWS = 1 << 12


@pytest.fixture(autouse=True)
def _small_files_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eligibility, "SMALL_FOR_ARRAYS", 0)


@pytest.fixture
def path(raw) -> str:
    header, data = {}, b""
    for i, (dtype, size) in enumerate((("F32", 4), ("BF16", 2), ("I64", 8), ("F32", 4))):
        one = os.urandom(ROWS * 64 * size)
        header[f"t{i}"] = raw.entry(dtype, [ROWS, 64], len(data), len(data) + len(one))
        data += one
    return raw.write(raw.pack(header, data))


def _evict(path: str) -> None:
    """Drop a file from the page cache; skips where the file system keeps it."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    file = engine.open_file(path)
    if file.residency(0, file.size)[0] > file.size // 2:
        pytest.skip("this file system keeps its files in memory")


def _described(tensor: Any) -> tuple[Any, ...]:
    return str(tensor.dtype), list(tensor.shape), tensor.contiguous().numpy().tobytes()


def _everything(stock: Any, safe_open: Any, path: str, how: str) -> list[Any]:
    """Every tensor once: PaddlePaddle 3.3 aborts when one address of stock's map is freed twice."""
    with safe_open(path, "paddle") as handle:
        if how == "all":
            return list(stock.all_tensors(handle).values())
        if how == "each":
            return [handle.get_tensor(name) for name in handle.keys()]  # noqa: SIM118
        parts = [slice(5, 9), (slice(None), slice(3, 5)), -1, slice(0, ROWS, 7)]
        return [
            handle.get_slice(name)[part] for name, part in zip(handle.keys(), parts, strict=True)
        ]


@pytest.mark.parametrize("options", [{}, {"verify": True}, {"threads": 1}], ids=str)
@pytest.mark.parametrize("how", ["all", "each", "slices"])
def test_a_cold_file(path, stock, fast, watch, options, how) -> None:
    expected = [_described(one) for one in _everything(stock, stock.safe_open, path, how)]
    _evict(path)
    with watch() as seen, fastst_patch.config_context(fallback="error", **options):
        found = _everything(stock, fast.safe_open, path, how)
    assert [_described(one) for one in found] == expected
    assert set(seen.paths(path)) == {"mmap+readahead"}


def test_a_whole_load_is_read_ahead_after_the_call(path, stock, fast) -> None:
    """Reading goes on as long as a tensor is there, although the handle is closed."""
    expected = [
        _described(one) for one in stock.all_tensors(stock.safe_open(path, "paddle")).values()
    ]
    _evict(path)
    arenas = engine.counters()["arenas"]
    load_file = importlib.import_module("safetensors.paddle").load_file
    found = load_file(path)
    assert engine.counters()["arenas"] == arenas + 1
    file = engine.open_file(path)
    for _ in range(1000):
        if file.residency(0, file.size)[0] == file.size:
            break
        paddle.ones([64, 64]).sum()
    assert [_described(one) for one in found.values()] == expected
    del found
    gc.collect()
    assert engine.counters()["arenas"] == arenas


def test_a_cached_file_is_stocks(path, stock, fast, watch) -> None:
    with open(path, "rb") as file:
        file.read()
    with watch() as seen, fastst_patch.config_context(fallback="error"):
        handle = fast.safe_open(path, "paddle")
    assert type(handle) is stock.safe_open
    (report,) = [one for one in seen.reports if one.file == path]
    assert report.fallback_reason == "the file is cached, and stock maps it"


@pytest.mark.parametrize(
    "options", [{"io": "direct"}, {"tensors": "owned"}, {"page_cache": "drop"}]
)
def test_options_that_copy_go_to_stock(path, stock, fast, watch, options) -> None:
    with watch() as seen, fastst_patch.config_context(**options):
        assert type(fast.safe_open(path, "paddle")) is stock.safe_open
    assert seen.paths(path) == ["stock"]


@pytest.mark.parametrize("device", ["cpu", "cuda", "gpu:0", "meta", None, 3])
def test_devices_are_stocks_to_judge(path, stock, fast, agree, device) -> None:
    _evict(path)

    def load(one: Any) -> Any:
        with one.safe_open(path, "paddle", device) as handle:
            return _described(handle.get_tensor("t1"))

    agree(lambda: load(fast), lambda: load(stock), text=False)


def test_errors_are_stocks(path, stock, fast, agree) -> None:
    _evict(path)
    handles = fast.safe_open(path, "paddle"), stock.safe_open(path, "paddle")
    for call in (
        lambda one: one.get_tensor("nope"), lambda one: one.get_slice("nope"),
        lambda one: one.get_slice("t0")["a"], lambda one: one.get_slice("t0")[ROWS + 7],
        lambda one: one.get_tensor(), lambda one: one.keys(),
    ):  # fmt: skip
        agree(lambda call=call: call(handles[0]), lambda call=call: call(handles[1]), text=False)


NO_TORCH = """
import sys
import fastst_patch
assert fastst_patch.patch().reason is None
from fastst_patch.dropin import eligibility
eligibility.SMALL_FOR_ARRAYS = 0
import safetensors
with fastst_patch.profile() as profile:
    with safetensors.safe_open(sys.argv[1], "paddle") as handle:
        handle.get_tensors()
print([report.path for report in profile.reports], "torch" in sys.modules)
"""


def test_no_torch_is_imported(path) -> None:
    _evict(path)
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, path],
        cwd=os.path.dirname(path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == ["['mmap+readahead'] False"], done
