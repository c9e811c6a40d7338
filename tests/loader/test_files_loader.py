"""The explicit loader to the CPU: every method against stock, lifetimes, filters."""

from __future__ import annotations

import gc
import itertools
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from loader_files import bits, loader_of
from numbered import file_of_numbers, right

import fastst_patch
from fastst_patch import (
    FastSafetensorsFile,
    FaststError,
    ParallelLoader,
    SafeTensorsFileLoader,
    engine,
    fastsafe_open,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

WAYS = [
    {},
    {"io": "mmap"},
    {"io": "buffered"},
    {"io": "direct"},
    {"tensors": "owned"},
    {"page_cache": "drop"},
    {"io": "buffered", "device_memory_budget": 0},
    {"io": "buffered", "device_memory_budget": 5_000},
]


# ---------------------------------------------------------------- every method, bit for bit


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_every_tensor(paths, expected, watch, options) -> None:
    with fastst_patch.config_context(fallback="error"), watch() as seen:
        loader = loader_of(paths, **options)
        names = loader.get_keys()
        assert sorted(names) == sorted(expected)
        with loader.copy_files_to_device() as buffer:
            for name in names:
                assert bits(buffer.get_tensor(name)) == expected[name], name
            for name in random.Random(3).sample(names, len(names)):
                assert bits(buffer.get_tensor(name)) == expected[name], name
            for name in names[::-1]:
                assert bits(buffer.get_sharded(name, -1)) == expected[name], name
        loader.close()
    for path in paths:
        seen.assert_fast(path)
    assert {report.call for report in seen.reports} == {"SafeTensorsFileLoader"}
    assert sum(report.tensors for report in seen.reports) == 3 * len(expected)


def test_every_method(paths, expected, stock) -> None:
    loader = loader_of(paths)
    buffer = loader.copy_file_to_device()
    by_path = {path: stock.load_file(path) for path in paths}
    for path, tensors in by_path.items():
        with stock.safe_open(path, "pt") as handle:
            for name, tensor in tensors.items():
                assert buffer.get_filename(name) == path
                shape = handle.get_slice(name).get_shape()
                assert loader.get_shape(name) == buffer.get_shape(name) == shape
                assert bits(buffer.push_tensor(name, 0)) == expected[name]
                assert bits(buffer.get_tensor_wrapped(name).get_raw()) == expected[name]
                for dim in range(-1, len(tensor.shape) + 1):  # in one process, any number
                    assert bits(buffer.get_sharded(name, dim)) == expected[name]
    wanted = dict.fromkeys(expected, 0)
    as_dict = buffer.as_dict(wanted)
    assert list(as_dict) == list(wanted)
    for name, wrapped in as_dict.items():
        assert bits(wrapped.get_raw()) == expected[name]
    for name, tensor in buffer.iter_local_tensors(loader.get_keys()):
        assert bits(tensor) == expected[name]
    assert set(buffer.key_to_rank_lidx) == set(expected)
    assert {rank for rank, _ in buffer.key_to_rank_lidx.values()} == {0}
    buffer.close()
    loader.close()


@pytest.mark.parametrize("argument", ["one", "path", "list", "dict"])
def test_fastsafe_open(paths, expected, watch, argument) -> None:
    given = {"one": paths[0], "path": Path(paths[0]), "list": paths, "dict": {0: paths}}[argument]
    few = argument in ("one", "path")
    with watch() as seen, fastsafe_open(given, framework="pt", device="cpu") as opened:
        names = opened.keys()
        assert names == opened.get_keys()
        chosen = {n: b for n, b in expected.items() if not few or n.startswith("file0.")}
        assert set(names) == set(chosen)
        kept = {name: opened.get_tensor(name) for name in names}
        assert opened.metadata() == {
            path: {"seed": str(k)} for k, path in enumerate(paths[:1] if few else paths)
        }
        assert bits(opened.get_tensor_wrapped(names[5]).get_raw()) == expected[names[5]]
    assert {name: bits(tensor) for name, tensor in kept.items()} == chosen
    assert {report.call for report in seen.reports} == {"fastsafe_open"}


def test_no_metadata_is_an_empty_dict(raw) -> None:
    path = raw.tensors({"a": torch.ones(2)})
    with fastsafe_open(path) as opened:
        assert opened.metadata() == {path: {}}


def test_a_file_as_a_mapping(paths, expected, stock, watch) -> None:
    theirs = stock.load_file(paths[1])
    with watch() as seen, FastSafetensorsFile(paths[1]) as file:
        assert len(file) == len(theirs)
        assert set(file) == set(file.keys()) == set(theirs)
        assert "nothing" not in file
        assert file.metadata == {"seed": "1"}
        assert file.path == paths[1]
        for name, tensor in file.items():
            assert bits(tensor) == expected[name]
        for name, info in file.get_tensors().items():
            with stock.safe_open(paths[1], "pt") as handle:
                piece = handle.get_slice(name)
                assert (info.name, info.dtype) == (name, piece.get_dtype())
                assert list(info.shape) == piece.get_shape()
            raw = Path(paths[1]).read_bytes()[slice(*info.offsets)]
            assert info.nbytes == len(raw)
            assert raw == expected[name][2]
        assert bits(file.get_slice("file1.I32.5x6")[1:3, 2:]) == bits(
            theirs["file1.I32.5x6"][1:3, 2:]
        )
        with pytest.raises(KeyError, match=r"did you mean 'file1.I32.5x6'"):
            file["file1.I32.5x7"]
    seen.assert_fast(paths[1])
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file["file1.I32.5x6"]
    with pytest.raises(ValueError, match="closed"):
        file.get_slice("file1.I32.5x6")
    assert len(file) == len(theirs)  # the header stays available


def test_a_wrapped_tensor_acts_as_its_tensor(sample, stock) -> None:
    with fastsafe_open(sample) as opened:
        w = opened.get_tensor_wrapped("w")
        plain = stock.load_file(sample)["w"]
        assert torch.equal(w, plain)
        assert torch.equal(torch.cat([w, w]), torch.cat([plain, plain]))
        assert torch.equal(plain + w, plain * 2)
        assert (w.shape, w.dtype, w.get_shape(), w.get_nbytes()) == (
            plain.shape, torch.float32, [32, 48], plain.nbytes,
        )  # fmt: skip
        for ours, theirs in (
            (w[3:5, 1], plain[3:5, 1]),
            (w.to(dtype="F16"), plain.half()),
            (w.to("cpu", torch.float64), plain.double()),
            (w.clone().detach().contiguous(), plain),
            (w.view("I32"), plain.view(torch.int32)),
            (w.reshape([-1]), plain.reshape(-1)),
        ):
            assert bits(ours.get_raw()) == bits(theirs)


# ---------------------------------------------------------------- dtypes


NAMED = [
    torch.bfloat16,
    "bfloat16",
    "torch.bfloat16",
    "BF16",
    "bf16",
    SimpleNamespace(value="BF16"),
]


@pytest.mark.parametrize("dtype", NAMED, ids=str)
def test_names_of_dtypes(sample, stock, dtype) -> None:
    theirs = {name: tensor.to(torch.bfloat16) for name, tensor in stock.load_file(sample).items()}
    loader = loader_of([sample])
    with loader.copy_files_to_device(dtype=dtype) as whole, loader.copy_files_to_device() as each:
        for name, tensor in theirs.items():
            assert bits(whole.get_tensor(name)) == bits(tensor)
            assert bits(each.get_tensor(name, dtype=dtype)) == bits(tensor)
            assert bits(each.get_sharded(name, 0, None, dtype)) == bits(tensor)
            assert bits(each.push_tensor(name, 0, None, dtype)) == bits(tensor)


@pytest.mark.parametrize("dtype", [None, "AUTO", SimpleNamespace(value="AUTO")], ids=str)
def test_the_files_own_dtypes(sample, stock, dtype) -> None:
    with loader_of([sample]).copy_files_to_device(dtype) as buffer:
        for name, tensor in stock.load_file(sample).items():
            assert bits(buffer.get_tensor(name, None, dtype)) == bits(tensor)


def test_every_dtype_to_every_other(paths, stock, outcome) -> None:
    """Larger ones, too; the error of a conversion that torch lacks names the tensor."""
    theirs = stock.load_file(paths[0])
    with loader_of(paths[:1]).copy_files_to_device() as buffer:
        for name, tensor in theirs.items():
            if tensor.shape != (5, 6):
                continue
            for dtype in {t.dtype for t in theirs.values()}:
                ours = outcome(lambda: buffer.get_tensor(name, dtype=dtype))  # noqa: B023
                want = outcome(lambda: tensor.to(dtype))  # noqa: B023
                assert (ours.kind, ours.error) == (want.kind, want.error)
                if ours.kind == "ok":
                    assert bits(ours.value) == bits(want.value)
                else:
                    assert name in ours.text


# ---------------------------------------------------------------- ownership


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("order", list(itertools.permutations(["buffer", "loader", "tensors"])))
def test_tensors_outlive_everything(paths, expected, options, order) -> None:
    loader = loader_of(paths[:1], **options)
    buffer = loader.copy_files_to_device()
    names = [name for name in loader.get_keys() if "7x130" in name]
    held = {name: buffer.get_tensor(name) for name in names}
    view = held[names[3]][2:]
    whole = expected[names[3]]
    for what in order:
        if what == "tensors":
            assert {name: bits(t) for name, t in held.items()} == {n: expected[n] for n in names}
            held.clear()
        elif what == "buffer":
            buffer.close()
            buffer.close()
            del buffer
        else:
            loader.close()
            loader.close()
            del loader
        gc.collect()
    assert bits(view)[2] == whole[2][-len(bits(view)[2]) :]


def test_never_closed(paths, expected) -> None:
    loader = loader_of(paths)
    tensor = loader.copy_files_to_device().get_tensor("file1.F32.7x130")  # the buffer is freed
    del loader
    gc.collect()
    assert bits(tensor) == expected["file1.F32.7x130"]


def test_closed(paths) -> None:
    loader = loader_of(paths[:1])
    buffer = loader.copy_files_to_device()
    name = loader.get_keys()[0]
    loader.close()
    assert buffer.get_tensor(name).dtype is not None  # a buffer outlives its loader
    assert loader.get_keys() == []
    buffer.close()
    for call in (
        lambda: buffer.get_tensor(name),
        lambda: buffer.get_sharded(name, 0),
        lambda: buffer.get_filename(name),
        lambda: buffer.get_shape(name),
        lambda: buffer.push_tensor(name, 0),
        lambda: buffer.get_multi_cols([name], 0),
        loader.copy_files_to_device,
        lambda: loader.add_filenames({0: paths}),
    ):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_reset_and_again(paths, expected) -> None:
    loader = loader_of(paths[:2])
    first = loader.copy_files_to_device()
    loader.reset()
    assert loader.get_keys() == []
    with pytest.raises(KeyError):
        loader.get_shape("file0.F32.7x130")
    loader.add_filenames({0: paths[2:]})
    second = loader.copy_files_to_device()
    assert all(name.startswith("file2.") for name in loader.get_keys())
    assert bits(first.get_tensor("file1.I8.5x6")) == expected["file1.I8.5x6"]
    assert bits(second.get_tensor("file2.I8.5x6")) == expected["file2.I8.5x6"]
    first.close()
    second.close()


def test_files_added_one_after_another(paths, expected) -> None:
    loader = SafeTensorsFileLoader(None)
    for path in paths:
        loader.add_filenames({0: [path]})
        loader.add_filenames({0: [path]})  # adding it again has no effect
    assert len(loader.get_keys()) == len(expected)
    with loader.copy_files_to_device() as buffer:
        assert [bits(buffer.get_tensor(name)) for name in expected] == list(expected.values())
    assert SafeTensorsFileLoader(None).copy_files_to_device().key_to_rank_lidx == {}


@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_a_cache_gives_copies(sample, stock, io) -> None:
    theirs = stock.load_file(sample)
    before = engine.counters()["bytes_buffered"]
    with loader_of([sample], disable_cache=False, io=io).copy_files_to_device() as buffer:
        first = buffer.get_tensor("w")
        read = engine.counters()["bytes_buffered"]
        first.zero_()
        assert bits(buffer.get_tensor("w")) == bits(theirs["w"])
        assert bits(buffer.get_tensor("w", dtype="F16")) == bits(theirs["w"].half())
        assert engine.counters()["bytes_buffered"] == read
        assert (read > before) == (io == "buffered")


# ---------------------------------------------------------------- filters and equal names


def test_filter(paths, expected) -> None:
    loader = loader_of(paths)
    names = loader.get_keys()
    loader.set_tensor_filter(lambda name: ".BF16." in name or "7x130" in name)
    kept = [name for name in names if ".BF16." in name or "7x130" in name]
    assert loader.get_keys() == kept
    gone = next(name for name in names if name not in kept)
    with pytest.raises(ValueError, match="filtered out"):
        loader.get_shape(gone)
    with loader.copy_files_to_device() as buffer:
        assert list(buffer.key_to_rank_lidx) == kept
        for name in [*kept, *kept[::-1]]:
            assert bits(buffer.get_tensor(name)) == expected[name]
        for call in (buffer.get_tensor, buffer.get_filename, buffer.get_shape):
            with pytest.raises(ValueError, match=f"key {gone} was not found in files"):
                call(gone)
    loader.set_tensor_filter(None)
    assert loader.get_keys() == names
    with pytest.raises(TypeError, match="tensor_filter='x'"):
        loader.set_tensor_filter("x")


def test_a_filter_leaves_bytes_unread(raw) -> None:
    path = file_of_numbers(raw, 40, 50_000)
    loader = loader_of([path], io="buffered")
    loader.set_tensor_filter(lambda name: int(name[1:]) % 10 == 3)
    before = engine.counters()["bytes_buffered"]
    with loader.copy_files_to_device() as buffer:
        for name in loader.get_keys():
            assert right(name, buffer.get_tensor(name))
    engine.shutdown()
    assert engine.counters()["bytes_buffered"] - before == 4 * 50_000


def test_names_must_be_unique(raw) -> None:
    one = raw.tensors({"a": torch.ones(2), "b": torch.ones(3)}, "one.safetensors")
    two = raw.tensors({"c": torch.ones(2), "b": torch.ones(4)}, "two.safetensors")
    loader = loader_of([one, two])
    with pytest.raises(FaststError, match=rf"'b' is in both {one} and {two}.*unique"):
        loader.copy_files_to_device()
    loader.set_tensor_filter(lambda name: name != "b")
    assert set(loader.copy_files_to_device().key_to_rank_lidx) == {"a", "c"}
    with pytest.raises(FaststError, match="unique"):
        fastsafe_open([one, two])
    # As with fastsafetensors, an iterator yields equal names of several files.
    assert [name for name, _ in ParallelLoader(None, [one, two], use_tqdm_on_load=False)
            .iterate_weights()] == ["a", "b", "b", "c"]  # fmt: skip


def test_unknown_names(sample) -> None:
    loader = loader_of([sample])
    with pytest.raises(KeyError):
        loader.get_shape("nothing")
    with loader.copy_files_to_device() as buffer:
        with pytest.raises(ValueError, match="key ww was not found in files; did you mean 'w'"):
            buffer.get_tensor("ww")
        with pytest.raises(ValueError, match="key 7 was not found"):
            buffer.get_tensor(7)
        with pytest.raises(TypeError, match="dim='0'"):
            buffer.get_sharded("w", "0")
        with pytest.raises(ValueError, match="rank 1 is not in the group"):
            buffer.push_tensor("w", 1)
        with pytest.raises(TypeError, match="dst_rank"):
            buffer.push_tensor("w", None)


# ---------------------------------------------------------------- stock, reports


def test_a_fallback_is_read_by_stock(raw, stock, watch) -> None:
    header = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},' + (
        '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    )
    path = raw.write(raw.pack(header, os.urandom(8)))
    with watch() as seen, fastsafe_open(path) as opened:
        assert opened.keys() == ["a"]
        assert bits(opened.get_tensor("a")) == bits(stock.load_file(path)["a"])
        assert opened.fb.get_shape("a") == [2]
    seen.assert_stock(path)
    with FastSafetensorsFile(path) as file:
        assert bits(file.get_slice("a")[1:]) == bits(stock.load_file(path)["a"][1:])
    with fastst_patch.config_context(fallback="error"):
        with pytest.raises(FaststError, match="left to stock"):
            fastsafe_open(path)
    with fastst_patch.config_context(fallback="warn"):
        with pytest.warns(fastst_patch.FallbackWarning, match="fastsafe_open of"):
            fastsafe_open(path).close()


def test_small_files_go_to_stock_by_option(sample, stock, watch) -> None:
    with watch() as seen, fastst_patch.config_context(small_file_bytes=1 << 20):
        with fastsafe_open(sample) as opened:
            assert bits(opened.get_tensor("h")) == bits(stock.load_file(sample)["h"])
    seen.assert_stock(sample)


def test_torch_modes(sample, stock) -> None:
    with fastsafe_open(sample) as opened:
        with torch.inference_mode():
            ours, theirs = opened.get_tensor("w"), stock.safe_open(sample, "pt").get_tensor("w")
        assert (ours.is_inference(), bits(ours)) == (theirs.is_inference(), bits(theirs))


def test_verify(sample, stock, monkeypatch) -> None:
    import fastst_patch.loader.local_files as local

    with fastst_patch.config_context(verify=True):
        with fastsafe_open(sample) as opened:
            assert bits(opened.get_tensor("w")) == bits(stock.load_file(sample)["w"])
        monkeypatch.setattr(local, "same", lambda ours, theirs: False)
        with fastst_patch.config_context(fallback="error"), fastsafe_open(sample) as opened:
            with pytest.raises(FaststError, match="differs from stock"):
                opened.get_tensor("w")


def test_progress(sample, capsys) -> None:
    with fastst_patch.config_context(progress=True), fastsafe_open(sample) as opened:
        for name in opened.keys():  # noqa: SIM118
            opened.get_tensor(name)
    assert "100%" in capsys.readouterr().err


def test_open_files_are_reported_at_the_end(sample) -> None:
    from fastst_patch.dropin.handle import report_open_handles

    opened = fastsafe_open(sample)
    opened.get_tensor("w")
    with fastst_patch.profile() as seen:
        report_open_handles()
    assert [(r.call, r.tensors) for r in seen.reports if r.file == sample] == [("fastsafe_open", 1)]
    with fastst_patch.profile() as seen:
        opened.close()
    assert seen.reports == []


def test_the_package_imports_the_loader_lazily(tmp_path) -> None:
    code = """
import sys, fastst_patch
fastst_patch.patch()
assert not {"torch", "fastst_patch.loader", "fastst_patch.sharding"} & set(sys.modules)
assert "ParallelLoader" in dir(fastst_patch)
from fastst_patch import *
from fastst_patch import SingleGroup
assert SafeTensorsFileLoader.__module__ == "fastst_patch.loader.files_loader"
assert (SingleGroup().rank(), SingleGroup().size()) == (0, 1)
try:
    fastst_patch.nothing
except AttributeError as error:
    assert "nothing" in str(error)
"""
    command = [sys.executable, "-c", code]
    subprocess.run(command, check=True, cwd=tmp_path)
