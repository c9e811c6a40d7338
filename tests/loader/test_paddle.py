"""``framework="paddle"``: the tensors that stock makes for paddle, over the memory of the load."""

from __future__ import annotations

import gc
import json
import logging
from typing import Any

import pytest
import torch
from loader_files import DTYPES, WAYS, loader_of, pair_of_ranks, said_without, write

import fastst_patch
from fastst_patch import (
    AutoLoader,
    FastSafetensorsFile,
    OptionError,
    ParallelLoader,
    SafeTensorsFileLoader,
    engine,
    fastsafe_open,
)

_root = logging.getLogger()
_before = _root.handlers[:], _root.level
paddle = pytest.importorskip("paddle", reason="needs PaddlePaddle: the extra `paddle`")
_root.handlers[:], _root.level = _before  # importing it makes every INFO of the process visible

pytestmark = pytest.mark.usefixtures("nothing_left")

LACKING = {"U16", "F4", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
"""Dtypes that this paddle has not."""


@pytest.fixture(scope="module")
def expected(paths, stock) -> dict[str, Any]:
    found = {name: t for path in paths for name, t in stock.load_file(path).items()}
    return {name: described(t) for name, t in found.items() if kind(name) not in LACKING}


def kind(name: str) -> str:
    return name.split(".")[1]


def described(tensor: Any) -> tuple[str, list[int], bytes]:
    """Dtype, shape and bytes of a tensor of paddle's or torch's."""
    dtype = str(tensor.dtype).split(".")[1]
    raw = tensor
    if not isinstance(tensor, torch.Tensor):
        assert isinstance(tensor, paddle.Tensor)
        assert tensor.place.is_cpu_place()
        raw = torch.from_dlpack(tensor)
    raw = raw.contiguous().reshape(-1).view(torch.uint8) if raw.numel() else torch.empty(0)
    return dtype, list(tensor.shape), raw.numpy().tobytes()


def kept(name: str) -> bool:
    return kind(name) not in LACKING


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_every_tensor(paths, expected, watch, options) -> None:
    with fastst_patch.config_context(fallback="error"), watch() as seen:
        loader = loader_of(paths, framework="paddle", **options)
        loader.set_tensor_filter(kept)
        with loader.copy_files_to_device() as buffer:
            assert sorted(loader.get_keys()) == sorted(expected)
            for name, value in expected.items():
                assert described(buffer.get_tensor(name)) == value, name
        loader.close()
    for path in paths:
        seen.assert_fast(path)


def test_as_stock_makes_them(tmp_path, stock) -> None:
    """Stock makes no U32 and U64, nor most empty tensors, for paddle."""
    for dtype in DTYPES.keys() - LACKING - {"U32", "U64"}:
        path = write(tmp_path / f"{dtype}.safetensors", {f"f.{dtype}": (dtype, (3, 8))})
        with stock.safe_open(path, "paddle") as theirs, fastsafe_open(path, "paddle") as ours:
            tensor = theirs.get_tensor(f"f.{dtype}")
            assert described(ours.get_tensor(f"f.{dtype}")) == described(tensor)
            assert ours.get_tensor(f"f.{dtype}").dtype == tensor.dtype


def test_dtypes_that_paddle_lacks(tmp_path, stock) -> None:
    for dtype in LACKING - {"U16"}:
        path = write(tmp_path / f"{dtype}.safetensors", {"a": (dtype, (4,))})
        with pytest.raises(AttributeError) as theirs, stock.safe_open(path, "paddle") as handle:
            handle.get_tensor("a")
        with fastsafe_open(path, "paddle") as opened:
            with pytest.raises(AttributeError, match=str(theirs.value)):
                opened.get_tensor("a")
    path = write(tmp_path / "U16.safetensors", {"a": ("U16", (4,))})
    with fastsafe_open(path, "paddle") as opened:  # stock says bfloat16
        with pytest.raises(TypeError, match=r"paddle.uint16 is paddle.bfloat16"):
            opened.get_tensor("a")
        assert opened.fb.get_tensor("a", dtype="I32").dtype == paddle.int32


def test_every_class(paths, expected, tmp_path, monkeypatch) -> None:
    with ParallelLoader(
        None, paths, use_tqdm_on_load=False, framework="paddle", tensor_filter=kept
    ) as loader:
        assert {name: described(t) for name, t in loader.iterate_weights()} == expected
    with FastSafetensorsFile(paths[0], framework="paddle") as file:
        name = "file0.F32.5x6"
        assert described(file[name]) == expected[name]
        with pytest.raises(OptionError, match="slices are torch's, not paddle's"):
            file.get_slice(name)
    (tmp_path / "fastsafetensors.json").write_text(json.dumps({"framework": "paddle"}))
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "one.safetensors", {"a": ("BF16", (5, 6))})
    loader = AutoLoader(None, [path])
    assert [(name, t.dtype) for name, t in loader.iterate_weights()] == [("a", paddle.bfloat16)]
    loader.close()


def test_every_method(paths, expected) -> None:
    names = ["file0.F32.5x6", "file1.F32.5x6"]
    with loader_of(paths, framework="paddle").copy_files_to_device() as buffer:
        for name in names:
            for tensor in (
                buffer.get_sharded(name, 1), buffer.push_tensor(name, 0),
                buffer.get_tensor_wrapped(name).get_raw(),
                buffer.as_dict({name: 0})[name].get_raw(),
                dict(buffer.iter_local_tensors([name]))[name],
            ):  # fmt: skip
                assert described(tensor) == expected[name]
        columns = buffer.get_multi_cols(names, 0).get_raw()
        assert described(columns)[2] == b"".join(expected[name][2] for name in names)
        half = buffer.get_tensor(names[0], "cpu", "F16")
        assert half.dtype == paddle.float16
        wrapped = buffer.get_tensor_wrapped(names[0])
        assert (wrapped.get_shape(), wrapped.get_nbytes()) == ([5, 6], 120)
        for ours, theirs in (
            (wrapped[1:3], wrapped.get_raw()[1:3]),
            (wrapped.clone().detach().contiguous(), wrapped.get_raw()),
            (wrapped.reshape([30]), wrapped.get_raw().reshape([30])),
            (wrapped.view("I32"), wrapped.get_raw().view(paddle.int32)),
            (wrapped.to(dtype="F64"), wrapped.get_raw().astype("float64")),
            (wrapped.to("cpu"), wrapped.get_raw()),
        ):
            assert described(ours.get_raw()) == described(theirs)
        factory = buffer.rank_loaders[0][0]
        assert described(factory.tensors[names[0]].get_raw()) == expected[names[0]]


def test_memory_is_shared_and_kept(paths, expected) -> None:
    """No copy; what paddle holds lives on without the loader, and what it drops is freed."""
    loader = loader_of(paths, framework="paddle", io="buffered")
    buffer = loader.copy_files_to_device()
    name = "file0.F32.7x130"
    before = engine.counters()["arena_bytes"]
    tensor = buffer.get_tensor(name)
    inside = buffer._hand_out(torch.zeros(4))
    torch.from_dlpack(inside).fill_(7)
    assert inside.tolist() == [7] * 4
    buffer.close()
    loader.close()
    del buffer, loader
    gc.collect()
    assert described(tensor) == expected[name]
    assert engine.counters()["arena_bytes"] <= before
    del tensor
    gc.collect()
    assert engine.counters()["arena_bytes"] == 0


@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_a_tensor_that_is_requested_twice(paths, expected, io) -> None:
    """On the CPU both share memory, as torch's tensors do; and nothing is left."""
    with loader_of(paths, framework="paddle", io=io).copy_files_to_device() as buffer:
        names = [name for name in expected if name.startswith("file0.")]
        for _ in range(3):
            first = [buffer.get_tensor(name) for name in names]
            again = [buffer.get_tensor(name) for name in names[::-1]][::-1]
            for name, one, other in zip(names, first, again, strict=True):
                assert described(one) == described(other) == expected[name]
                shared = one.data_ptr() == other.data_ptr()
                assert shared == (io == "auto") or not one.size
            del first, one
            assert [described(tensor) for tensor in again] == [expected[name] for name in names]
            del again, other


def test_a_device(paths, expected, cuda, monkeypatch) -> None:
    """Over the fake driver, where memory of the CPU stands for the device's."""
    with pytest.raises(OptionError, match="device='cuda:0': this PaddlePaddle is a build without"):
        loader_of(paths, "cuda:0", framework="paddle")
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    with pytest.raises(OptionError, match="tensors='dlpack' is for torch"):
        loader_of(paths, "cuda:0", framework="paddle", tensors="dlpack")
    for device in ("cuda:0", "gpu:0"):
        loader = loader_of(paths, device, framework="paddle")
        loader.set_tensor_filter(kept)
        with loader.copy_files_to_device() as buffer:
            for name, value in expected.items():
                assert described(buffer.get_tensor(name)) == value, name
        loader.close()


def test_refused(monkeypatch) -> None:
    with pytest.raises(OptionError, match="a group exchanges torch's tensors"):
        SafeTensorsFileLoader(pair_of_ranks(monkeypatch), framework="paddle")
    with pytest.raises(OptionError, match="device='meta': this PaddlePaddle is a build without"):
        SafeTensorsFileLoader(None, "meta", framework="paddle")


def test_without_paddle(sample) -> None:
    assert "pip install 'fastst-patch[paddle]'" in said_without("paddle", "paddle", sample)
