"""Tensors over arenas, torch modes, and the names of dtypes."""

from __future__ import annotations

import gc
import types
from array import array
from typing import Any

import pytest
import torch

from fastst_patch import OptionError, engine, tensors
from fastst_patch.dtypes import DTYPE_NAMES
from fastst_patch.errors import Fallback
from fastst_patch.files.base import open_checked

pytestmark = pytest.mark.skipif(
    engine.native_error() is not None, reason=str(engine.native_error())
)


def test_a_batch_owns_its_arena_together(sample: str, stock: Any, assert_same: Any) -> None:
    file, layout = open_checked(sample)
    tensors.check(layout)
    before = engine.counters()["arenas"]
    arena = engine.map_arena(file)
    made = dict(zip(layout.names, tensors.import_batch(arena, layout), strict=True))
    assert_same(made, stock.load_file(sample))
    del arena, file
    last = made.pop("w")
    made.clear()
    gc.collect()
    assert engine.counters()["arenas"] == before + 1
    assert last.shape == (32, 48)
    del last
    assert engine.counters()["arenas"] == before


def test_some_tensors_at_given_places(raw: Any) -> None:
    path = raw.tensors({"a": torch.arange(4), "b": torch.arange(3, dtype=torch.uint8)})
    _, layout = open_checked(path)
    tensors.check(layout)
    arena = engine.alloc_arena(4096)
    wanted = array("Q", [layout.index["b"], layout.index["b"]])
    made = tensors.import_batch(arena, layout, wanted, array("Q", [0, 256]))
    assert [t.dtype for t in made] == [torch.uint8, torch.uint8]
    assert made[1].data_ptr() - made[0].data_ptr() == 256
    assert [t.untyped_storage().nbytes() for t in made] == [3, 3]


def test_stocks_recipe_gives_stocks_tensors(sample: str, stock: Any, assert_same: Any) -> None:
    file, layout = open_checked(sample)
    tensors.check(layout)
    storage = tensors.whole_storage(engine.map_arena(file))
    assert storage.nbytes() >= layout.data_begin + layout.data_bytes
    handle = stock.safe_open(sample, "pt")
    for i, name in enumerate(layout.names):
        made = tensors.by_stocks_recipe(storage, layout, i, for_slice=False)
        assert torch.equal(made, handle.get_tensor(name))


def test_modes_of_torch_are_noticed() -> None:
    assert tensors.ordinary_mode()
    with torch.device("cpu"):
        assert not tensors.ordinary_mode()
    with torch.inference_mode():
        assert not tensors.ordinary_mode()
    with torch.no_grad():
        assert tensors.ordinary_mode()


def test_memory_that_torch_does_not_get(raw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, layout = open_checked(raw.tensors({"a": torch.zeros(3, 2)}))
    assert tensors.empty(layout, 0, rows=2).shape == (2, 2)

    def refused(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(torch, "empty", refused)
    with pytest.raises(MemoryError, match="no memory"):
        tensors.empty(layout, 0)


def test_a_dtype_that_torch_lacks_goes_to_stock(raw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, layout = open_checked(raw.tensors({"a": torch.zeros(3), "b": torch.zeros(2).int()}))
    tensors.check(layout)
    found = tensors._dtypes()
    monkeypatch.setattr(found, "_loadable", found._loadable & ~(1 << DTYPE_NAMES.index("I32")))
    tensors.check(layout, layout.index["a"])
    for i in (None, layout.index["b"]):
        with pytest.raises(Fallback, match="lacks a dtype"):
            tensors.check(layout, i)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (None, None), ("AUTO", None), ("auto", None), ("BF16", torch.bfloat16),
        ("bf16", torch.bfloat16), ("float16", torch.float16), ("torch.float32", torch.float32),
        (torch.int8, torch.int8), (types.SimpleNamespace(value="F16"), torch.float16),
    ],
)  # fmt: skip
def test_names_of_dtypes(given: object, wanted: torch.dtype | None) -> None:
    assert tensors.dtype_wanted(given) == wanted


@pytest.mark.parametrize("given", ["float", "Tensor", "F99", 3, b"F32"])
def test_other_names_of_dtypes_are_refused(given: object) -> None:
    if given == "float":
        assert tensors.dtype_wanted(given) == torch.float32  # as torch has it
        return
    with pytest.raises(OptionError, match="allowed are torch dtypes"):
        tensors.dtype_wanted(given)
