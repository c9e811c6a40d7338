"""``framework=`` of the explicit loader: NumPy, JAX and TensorFlow, over the memory of the load."""

from __future__ import annotations

import gc
import importlib
import json
from typing import Any

import numpy as np
import pytest
import torch
from loader_files import WAYS, loader_of, of_all_dtypes, pair_of_ranks, said_without, write

import fastst_patch
from fastst_patch import (
    AutoLoader,
    FastSafetensorsFile,
    OptionError,
    ParallelLoader,
    SafeTensorsFileLoader,
    fastsafe_open,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

LIBRARIES = {"np": "numpy", "numpy": "numpy", "jax": "jax", "flax": "jax", "tf": "tensorflow"}
SMALL = {"F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "BF16"}
"""Dtypes for which NumPy needs ml_dtypes, or that it has not."""


@pytest.fixture(params=sorted(LIBRARIES))
def framework(request) -> str:
    pytest.importorskip(LIBRARIES[request.param])
    return request.param


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[str]:
    return of_all_dtypes(tmp_path_factory.mktemp("all"), 2)


@pytest.fixture(scope="module")
def expected(paths, stock) -> dict[str, Any]:
    found = {name: t for path in paths for name, t in stock.load_file(path).items()}
    return {name: described(t) for name, t in found.items() if kept(name)}


def kept(name: str) -> bool:
    return name.split(".")[1] not in SMALL


def described(tensor: Any) -> tuple[str, list[int], bytes]:
    if isinstance(tensor, torch.Tensor):
        raw = (
            tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0)
        )
        return str(tensor.dtype).split(".")[1], list(tensor.shape), raw.numpy().tobytes()
    array = np.asarray(tensor)
    return array.dtype.name, list(array.shape), array.tobytes()


def as_jax_has_it(wanted: tuple[str, list[int], bytes]) -> tuple[str, list[int], bytes]:
    """64-bit numbers become 32-bit ones, unless JAX is told otherwise."""
    name, shape, data = wanted
    narrow = {"int64": "int32", "uint64": "uint32", "float64": "float32"}.get(name)
    if narrow is None:
        return wanted
    return narrow, shape, np.frombuffer(data, name).astype(narrow).tobytes()


def wanted_by(framework: str, expected: dict[str, Any]) -> dict[str, Any]:
    if LIBRARIES[framework] != "jax":
        return expected
    return {name: as_jax_has_it(one) for name, one in expected.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_every_tensor(paths, expected, watch, framework, options) -> None:
    wanted = wanted_by(framework, expected)
    with fastst_patch.config_context(fallback="error"), watch() as seen:
        loader = loader_of(paths, framework=framework, **options)
        loader.set_tensor_filter(kept)
        with loader.copy_files_to_device() as buffer:
            for name, value in wanted.items():
                with np.errstate(all="ignore"):
                    tensor = buffer.get_tensor(name)
                assert type(tensor).__module__.split(".")[0] in (LIBRARIES[framework], "jaxlib")
                assert described(tensor) == value, name
                assert described(buffer.get_tensor(name)) == value, name
                del tensor
        loader.close()
    for path in paths:
        seen.assert_fast(path)


def test_small_dtypes(tmp_path) -> None:
    """As ml_dtypes has them, where it is installed; else NumPy says that it has none."""
    for dtype in sorted(SMALL):
        path = write(tmp_path / f"{dtype}.safetensors", {"a": (dtype, (4,))})
        with fastsafe_open(path, "pt") as theirs, fastsafe_open(path, "np") as ours:
            right = described(theirs.get_tensor("a"))
            try:
                importlib.import_module("ml_dtypes")
                np.dtype(right[0])
            except (ImportError, TypeError):
                with pytest.raises(TypeError, match=right[0]):
                    ours.get_tensor("a")
            else:
                assert described(ours.get_tensor("a")) == right


def test_every_class(paths, expected, tmp_path, monkeypatch, framework) -> None:
    name = "file0.F32.5x6"
    with ParallelLoader(
        None, paths, use_tqdm_on_load=False, framework=framework, tensor_filter=lambda n: n == name
    ) as loader:
        assert {n: described(t) for n, t in loader.iterate_weights()} == {name: expected[name]}
    with FastSafetensorsFile(paths[0], framework=framework) as file:
        assert described(file[name]) == expected[name]
        with pytest.raises(OptionError, match="slices are torch's, not"):
            file.get_slice(name)
    (tmp_path / "fastsafetensors.json").write_text(json.dumps({"framework": framework}))
    monkeypatch.chdir(tmp_path)
    auto = AutoLoader(None, [write(tmp_path / "one.safetensors", {"a": ("I16", (5, 6))})])
    ((_, tensor),) = auto.iterate_weights()
    assert described(tensor)[:2] == ("int16", [5, 6])
    del tensor
    auto.close()


def test_every_method(paths, expected, framework) -> None:
    name = "file0.F32.5x6"
    with loader_of(paths, framework=framework).copy_files_to_device() as buffer:
        for tensor in (
            buffer.get_sharded(name, 1), buffer.push_tensor(name, 0),
            buffer.get_tensor_wrapped(name).get_raw(), buffer.as_dict({name: 0})[name].get_raw(),
        ):  # fmt: skip
            assert described(tensor) == expected[name]
        assert described(buffer.get_tensor(name, "cpu", "F16"))[0] == "float16"
        wrapped = buffer.get_tensor_wrapped(name)
        assert (wrapped.get_shape(), wrapped.get_nbytes()) == ([5, 6], 120)
        assert described(wrapped[1:3].get_raw())[2] == expected[name][2][24:72]
        for method, *arguments in (
            ("clone",), ("detach",), ("contiguous",), ("to", "cpu"), ("view", "I32"),
            ("reshape", [30]),
        ):  # fmt: skip
            with pytest.raises(OptionError, match=f"{method}: of torch and paddle, not"):
                getattr(wrapped, method)(*arguments)
        del tensor, wrapped


def test_memory_is_kept(paths, expected, framework) -> None:
    loader = loader_of(paths, framework=framework, io="buffered")
    buffer = loader.copy_files_to_device()
    tensor = buffer.get_tensor("file0.F32.7x130")
    buffer.close()
    loader.close()
    del buffer, loader
    gc.collect()
    assert described(tensor) == expected["file0.F32.7x130"]


def test_arrays_share_memory_as_torchs_tensors_do(paths) -> None:
    with loader_of(paths, framework="np").copy_files_to_device() as buffer:
        first, second = (buffer.get_tensor("file0.F32.5x6") for _ in range(2))
        first[0] = 3
        assert second[0].tolist() == [3] * 6


def test_tensorflow_changes_no_other_tensor(paths, expected) -> None:
    tensorflow = pytest.importorskip("tensorflow")
    name = "file0.F32.7x130"
    with loader_of(paths, framework="tf").copy_files_to_device() as buffer:
        variable = tensorflow.Variable(buffer.get_tensor(name))
        variable.assign_add(tensorflow.ones_like(variable))
        assert described(buffer.get_tensor(name)) == expected[name]
        del variable


def test_jax_changes_no_other_array(paths, expected) -> None:
    jax = pytest.importorskip("jax")
    name = "file0.F32.7x130"
    with loader_of(paths, framework="jax").copy_files_to_device() as buffer:
        change = jax.jit(lambda x: x.at[0].set(77.0), donate_argnums=0)
        jax.block_until_ready(change(buffer.get_tensor(name)))
        assert described(buffer.get_tensor(name)) == expected[name]


def test_a_device_that_the_library_lacks(paths, cuda, framework) -> None:
    """Over the fake driver: these builds are for the CPU."""
    with pytest.raises(OptionError, match=r"device='cuda:0': this .* is a build without it"):
        loader_of(paths, "cuda:0", framework=framework)
    with pytest.raises(OptionError, match="device='meta'"):
        loader_of(paths, "meta", framework=framework)


@pytest.mark.parametrize("framework", ["jax", "tf"])
def test_a_device(paths, expected, cuda, monkeypatch, framework) -> None:
    """Over the fake driver, where memory of the CPU stands for the device's."""
    from fastst_patch.loader import frameworks

    pytest.importorskip(LIBRARIES[framework])
    monkeypatch.setattr(frameworks, "_has", lambda devices, kind: True)
    name = "file0.F32.5x6"
    loader = loader_of(paths, "cuda:0", framework=framework)
    with loader.copy_files_to_device() as buffer:
        assert described(buffer.get_tensor(name)) == expected[name]
    loader.close()
    with pytest.raises(OptionError, match="tensors='dlpack' is for torch"):
        loader_of(paths, "cuda:0", framework=framework, tensors="dlpack")


def test_a_group_is_refused(monkeypatch) -> None:
    with pytest.raises(OptionError, match="a group exchanges torch's tensors"):
        SafeTensorsFileLoader(pair_of_ranks(monkeypatch), framework="np")


@pytest.mark.parametrize(("framework", "module"), [("jax", "jax"), ("tf", "tensorflow")])
def test_without_the_library(sample, framework, module) -> None:
    assert f"framework='{module}' needs" in said_without(module, framework, sample)


def test_an_unknown_framework(sample) -> None:
    with pytest.raises(OptionError, match="allowed are pt, pytorch, torch, paddle, np, numpy, jax"):
        fastsafe_open(sample, "mxnet")
