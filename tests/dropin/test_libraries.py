"""Libraries that make their tensors of arrays, against stock: real ones, and stand-ins."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest
from generated_files import BITS

import fastst_patch
from fastst_patch.dropin import eligibility

NAMES = {
    "jax": ("jax", "safetensors.flax"),
    "flax": ("jax", "safetensors.flax"),
    "tf": ("tensorflow", "safetensors.tensorflow"),
    "mlx": ("mlx", "safetensors.mlx"),
}
OPTIONS = [{}, {"io": "buffered"}, {"io": "direct"}, {"tensors": "owned"}, {"verify": True}]
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U32", "I16", "U16", "I8", "U8", "BOOL")


@pytest.fixture(autouse=True)
def _small_files_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eligibility, "SMALL_FOR_ARRAYS", 0)


SHAPES = ([], [0, 3], [6, 10], [40, 64])


def _content(
    raw: Any, dtypes: tuple[str, ...] = DTYPES, *, pad: int = 0, shapes: Any = SHAPES
) -> bytes:
    """Tensors of several shapes, the first of which lies ``pad`` bytes from a multiple of 64."""
    header, at, data = {}, 0, b""
    for dtype in dtypes:
        for shape in shapes:
            size = int(np.prod(shape)) * BITS[dtype] // 8
            header[f"{dtype}.{len(header)}"] = raw.entry(dtype, shape, at, at + size)
            data += bytes(i % 2 for i in range(size)) if dtype == "BOOL" else os.urandom(size)
            at += size
    for spaces in range(64):
        content = raw.pack({**header, "__metadata__": {"x": " " * spaces}}, data)
        if (len(content) - len(data)) % 64 == pad:
            return content
    raise AssertionError("no header of such a length")


def _described(tensor: Any) -> tuple[Any, ...]:
    array = np.asarray(tensor.numpy() if hasattr(tensor, "numpy") else tensor)
    more = [str(getattr(tensor, name, None)) for name in ("weak_type", "committed", "sharding")]
    return type(tensor), str(tensor.dtype), tuple(tensor.shape), *more, array.tobytes()


@pytest.mark.parametrize("pad", [0, 8])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("framework", sorted(NAMES))
def test_tensors_of_a_library(raw, stock, fast, watch, framework, options, pad) -> None:
    library, module = NAMES[framework]
    pytest.importorskip(library)
    path = raw.write(_content(raw, pad=pad))

    def everything(safe_open: Any) -> list[Any]:
        found: list[Any] = []
        with safe_open(path, framework) as handle:
            names = handle.keys()
            found += [handle.get_tensor(name) for name in names for _ in range(2)]
            found += stock.all_tensors(handle).values()
            for name in names:
                part = handle.get_slice(name)
                shape = part.get_shape()
                found += [] if 0 in shape else [part[...]]  # stock slices no empty tensor
                if len(shape) == 2 and 0 not in shape:
                    found += [part[1:3, 2], part[2:5], part[0]]
        return found

    expected = everything(stock.safe_open)
    with watch() as seen, fastst_patch.config_context(fallback="error", **options):
        ours = everything(fast.safe_open)
        loaded = importlib.import_module(module).load_file(path)
    assert list(map(_described, ours)) == list(map(_described, expected))
    assert list(map(_described, loaded.values())) == [
        _described(stock.safe_open(path, framework).get_tensor(name)) for name in loaded
    ]
    assert "stock" not in seen.paths(path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64"])
@pytest.mark.parametrize("framework", sorted(NAMES))
def test_dtypes_that_may_be_lacking(raw, stock, fast, agree, framework, dtype) -> None:
    pytest.importorskip(NAMES[framework][0])
    size = 2 * BITS[dtype] // 8
    path = raw.write(raw.pack({"a": raw.entry(dtype, [2], 0, size)}, bytes(size)))
    agree(*[
        lambda one=one: _described(one.safe_open(path, framework).get_tensor("a"))
        for one in (fast, stock)
    ])  # fmt: skip


# ---- stand-ins: what a library may do with memory that is its own ----


class Made:
    """A tensor over an array's memory."""

    def __init__(self, array: np.ndarray) -> None:
        assert array.flags.writeable
        assert array.flags.c_contiguous
        self.array, self.dtype, self.shape = array, array.dtype, array.shape

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.array


def _stand_in(name: str, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType(name)
    *inner, last = function.split(".")
    place: Any = module
    for part in inner:
        setattr(place, part, types.SimpleNamespace())
        place = getattr(place, part)
    setattr(place, last, Made)
    vars(module)["executing_eagerly"] = lambda: False  # then TensorFlow lends no memory
    monkeypatch.setitem(sys.modules, name, module)


STAND_INS = [("tf", "tensorflow", "convert_to_tensor"), ("mlx", "mlx", "core.array")]


@pytest.mark.parametrize(("framework", "module", "function"), STAND_INS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_way_reaches_the_library(
    raw, stock, fast, watch, monkeypatch, framework, module, function, options
) -> None:
    if module in sys.modules or importlib.util.find_spec(module) is not None:
        pytest.skip(f"{module} is installed, and stock has met it")
    _stand_in(module, function, monkeypatch)
    path = raw.write(_content(raw, ("F32", "I16")))
    with watch() as seen, fastst_patch.config_context(fallback="error", **options):
        with fast.safe_open(path, framework) as handle:
            names = handle.keys()
            found = [handle.get_tensor(name) for name in names for _ in range(2)]
            found += stock.all_tensors(handle).values()
            part = handle.get_slice("F32.2")
            found += [part[...], part[1:3], part[2], part[1:3, 4]]
    assert {type(one) for one in found} == {Made}
    assert "stock" not in seen.paths(path)


@pytest.mark.parametrize("framework", ["jax", "tf"])
@pytest.mark.parametrize(
    ("pad", "options", "way"),
    [(8, {}, "owned"), (8, {"io": "mmap"}, "mmap"), (0, {}, "mmap")],
    ids=["not aligned", "told to map", "aligned"],
)
def test_a_file_that_is_not_aligned_is_read_to_where_it_is(
    raw, stock, fast, watch, monkeypatch, framework, pad, options, way
) -> None:
    library = NAMES[framework][0]
    real = library in sys.modules or importlib.util.find_spec(library) is not None
    if framework == "tf" and not real:
        _stand_in(library, "convert_to_tensor", monkeypatch)
    elif not real:
        pytest.skip(f"{library} is not installed")
    shapes = ([512, 600], [3], [0, 3], [])
    path = raw.write(_content(raw, ("F32", "I16"), pad=pad, shapes=shapes))
    with stock.safe_open(path, framework if real else "np") as handle:  # it gets those arrays
        expected = {name: _values(one) for name, one in stock.all_tensors(handle).items()}
    with watch() as seen, fastst_patch.config_context(fallback="error", **options):
        with fast.safe_open(path, framework) as handle:
            first = stock.all_tensors(handle)
            assert {name: _values(one) for name, one in first.items()} == expected
            if not real:
                for one in first.values():
                    aligned = one.array.__array_interface__["data"][0] % 64 == 0
                    assert aligned or way == "mmap" or not one.array.size
                    one.array[...] = 0
            again = stock.all_tensors(handle)
            assert {name: _values(one) for name, one in again.items()} == expected
    assert seen.paths(path) == [way]


def _values(tensor: Any) -> tuple[Any, ...]:
    _, dtype, shape, *_, data = _described(tensor)
    return dtype, shape, data


def test_a_library_writes_into_its_tensor(raw, fast, monkeypatch) -> None:
    """TensorFlow updates a variable in place if nobody else refers to its tensor."""
    if importlib.util.find_spec("tensorflow") is not None:
        pytest.skip("tensorflow is installed, and stock has met it")
    _stand_in("tensorflow", "convert_to_tensor", monkeypatch)
    path = raw.write(_content(raw, ("F32",)))
    with fast.safe_open(path, "tf") as handle:
        first = handle.get_tensor("F32.3")
        before = first.array.tobytes()
        first.array[...] = 5
        assert handle.get_tensor("F32.3").array.tobytes() == before
        assert handle.get_slice("F32.3")[...].array.tobytes() == before


def test_tensorflow_variables(raw, fast) -> None:
    tensorflow = pytest.importorskip("tensorflow")
    path = raw.write(_content(raw, ("F32",), shapes=[[40, 64]]))
    with fast.safe_open(path, "tf") as handle:
        tensor = handle.get_tensor("F32.0")
        before = tensor.numpy().tobytes()
        variable = tensorflow.Variable(tensor)
        del tensor
        variable.assign_add(tensorflow.ones_like(variable))
        variable.scatter_nd_update([[0]], [variable[1]])
        for _ in range(2):
            assert handle.get_tensor("F32.0").numpy().tobytes() == before


def test_jax_donation(raw, fast) -> None:
    jax = pytest.importorskip("jax")
    path = raw.write(_content(raw, ("F32",), shapes=[[40, 64]]))
    with fast.safe_open(path, "jax") as handle:
        tensor = handle.get_tensor("F32.0")
        before = np.asarray(tensor).tobytes()
        change = jax.jit(lambda x: x.at[0].set(77.0), donate_argnums=0)
        jax.block_until_ready(change(tensor))
        for _ in range(2):
            assert np.asarray(handle.get_tensor("F32.0")).tobytes() == before


def test_jax_takes_aligned_memory_as_it_is(raw, fast) -> None:
    pytest.importorskip("jax")
    path = raw.write(_content(raw, ("F32",), shapes=[[40, 64]]))
    with fast.safe_open(path, "jax") as handle:
        tensor = handle.get_tensor("F32.0")
    with open("/proc/self/maps", encoding="utf-8") as maps:
        spans = [line.split()[0].split("-") for line in maps if path in line]
    at = tensor.unsafe_buffer_pointer()
    assert any(int(low, 16) <= at < int(high, 16) for low, high in spans)


NO_TORCH = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

if sys.argv[3] == "absent":
    sys.meta_path.insert(0, Nothing())
import fastst_patch
assert fastst_patch.patch().reason is None
from fastst_patch.dropin import eligibility
eligibility.SMALL_FOR_ARRAYS = 0
import safetensors
with fastst_patch.profile() as profile:
    with safetensors.safe_open(sys.argv[1], sys.argv[2]) as handle:
        names = handle.keys()
        handle.get_tensors()
        for name in names:
            handle.get_tensor(name)
            if 0 not in handle.get_slice(name).get_shape():
                handle.get_slice(name)[...]
print({report.path for report in profile.reports} & {"stock"}, "torch" in sys.modules)
"""


@pytest.mark.parametrize("torch", ["there", "absent"])
@pytest.mark.parametrize("framework", ["np", "jax", "tf", "mlx"])
def test_no_torch_is_imported(raw, framework, torch) -> None:
    library = {"np": "numpy", **{name: module for name, (module, _) in NAMES.items()}}[framework]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    path = raw.write(_content(raw, ("F32", "I16")))
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, path, framework, torch],
        cwd=os.path.dirname(path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == ["set() False"], done
