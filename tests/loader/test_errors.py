"""Errors: stock's exception types, and messages that name file, tensor, cause and remedy."""

from __future__ import annotations

import errno
import gc
import os
from typing import Any

import pytest
import torch
from loader_files import bits, write
from safetensors import SafetensorError

import fastst_patch
from fastst_patch import (
    FastSafetensorsFile,
    OptionError,
    ParallelLoader,
    SafeTensorsFileLoader,
    SingleGroup,
    engine,
    fastsafe_open,
)

pytestmark = pytest.mark.usefixtures("nothing_left")


def _add(paths: Any, **options: Any) -> SafeTensorsFileLoader:
    loader = SafeTensorsFileLoader(None, **options)
    loader.add_filenames({0: paths})
    return loader


OPENERS = {
    "loader": lambda path: _add([path]),
    "many": lambda path: _add([path] * 9),
    "open": fastsafe_open,
    "mapping": FastSafetensorsFile,
    "iterator": lambda path: list(
        ParallelLoader(None, [path], use_tqdm_on_load=False).iterate_weights()
    ),
}


@pytest.fixture(params=OPENERS)
def opener(request) -> Any:
    return OPENERS[request.param]


# ---------------------------------------------------------------- opening


def _header(text: bytes, data: int = 8, length: int | None = None) -> bytes:
    size = len(text) if length is None else length
    return size.to_bytes(8, "little") + text + bytes(data)


BROKEN = {
    "empty": b"",
    "short": b"abc",
    "too large": _header(b"{}", 0, 1 << 40),
    "longer than the file": _header(b"{}", 0, 999),
    "not JSON": _header(b"{{{"),
    "not UTF-8": _header(b'{"\xff":1}'),
    "truncated": _header(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}', 8),
    "trailing": _header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 8),
    "a hole": _header(
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
        b'"b":{"dtype":"U8","shape":[2],"data_offsets":[4,6]}}', 6,
    ),
    "wrong size": _header(b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', 8),
    "no such dtype": _header(b'{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}', 8),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_headers(raw, opener, stock, kind, outcome) -> None:
    path = raw.write(BROKEN[kind])
    theirs = outcome(lambda: stock.safe_open(path, "pt"))
    ours = outcome(lambda: opener(path))
    assert (ours.kind, ours.error) == ("raise", theirs.error)
    assert ours.text.startswith(f"{path} could not be opened: {theirs.text}")
    assert ours.text.endswith("the file is damaged or incomplete: download or write it again")


def test_missing_files(tmp_path, opener, stock) -> None:
    path = str(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError) as theirs:
        stock.safe_open(path, "pt")
    with pytest.raises(FileNotFoundError, match="check the path") as ours:
        opener(path)
    assert type(ours.value) is type(theirs.value)
    assert str(ours.value).count(path) >= 1


def test_folders_and_permissions(tmp_path, opener, stock, outcome) -> None:
    theirs = outcome(lambda: stock.safe_open(str(tmp_path), "pt"))
    ours = outcome(lambda: opener(str(tmp_path)))
    assert (ours.kind, ours.error) == ("raise", theirs.error)
    assert str(tmp_path) in ours.text


def test_one_bad_file_among_many(raw, sample) -> None:
    """No file is added, and none stays open."""
    bad = raw.write(b"abc", "bad.safetensors")
    good = [sample, *(raw.tensors({f"t{i}": torch.ones(3)}, f"{i}.safetensors") for i in range(9))]
    loader = SafeTensorsFileLoader(None)
    loader.add_filenames({0: [sample]})
    with pytest.raises(SafetensorError, match=bad):
        loader.add_filenames({0: [*good[1:], bad]})
    assert set(loader.get_keys()) == {"w", "b", "h"}
    weights = ParallelLoader(None, [*good, bad], use_tqdm_on_load=False).iterate_weights()
    with pytest.raises(SafetensorError, match=bad):  # before the first tensor is yielded
        next(weights)


# ---------------------------------------------------------------- reading


@pytest.fixture
def big(raw) -> str:
    return raw.tensors({f"t{i}": torch.full((300_000,), i, dtype=torch.uint8) for i in range(6)})


@pytest.mark.parametrize("options", [{"io": "buffered"}, {"io": "direct"}, {"tensors": "owned"}])
def test_a_file_that_is_truncated_meanwhile(big, options) -> None:
    loader = _add([big], device_memory_budget=0, **options)
    with loader.copy_files_to_device() as buffer:
        os.truncate(big, os.path.getsize(big) - 400_000)
        assert bool((buffer.get_tensor("t2") == 2).all())
        with pytest.raises(SafetensorError, match=rf"tensor 't5' of {big} could not be loaded: "):
            buffer.get_tensor("t5")
    loader.close()


@pytest.mark.parametrize("how", ["first", "later", "each"])
def test_a_failing_disk(big, how) -> None:
    loader = _add([big], io="buffered", device_memory_budget=0 if how == "each" else None)
    if how != "later":
        engine.set_fault("preadv", errno=errno.EIO)
    buffer = loader.copy_files_to_device()
    if how == "later":
        assert bool((buffer.get_tensor("t0") == 0).all())
        engine.shutdown()
        engine.set_fault("preadv", errno=errno.EIO)
        buffer.close()
        buffer = loader.copy_files_to_device()
    with pytest.raises(OSError, match=r"tensor 't4' of .*kernel's log") as caught:
        buffer.get_tensor("t4")
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, big)
    engine.clear_faults()
    for i in range(6):
        assert bool((buffer.get_tensor(f"t{i}") == i).all())
    buffer.close()
    loader.close()
    del caught


def test_an_iterator_that_fails_frees_everything(big) -> None:
    weights = ParallelLoader(
        None, [big], use_tqdm_on_load=False, io="buffered", device_memory_budget=1
    ).iterate_weights()
    next(weights)
    engine.shutdown()
    engine.set_fault("preadv", errno=errno.EIO)
    with pytest.raises(OSError, match="tensor 't1' of"):
        next(weights)
    with pytest.raises(StopIteration):
        next(weights)


def test_memory_that_is_refused(big, stock) -> None:
    """Stock loads the tensor instead."""
    for options in ({"io": "buffered"}, {"io": "mmap"}):
        with fastst_patch.profile() as seen:
            loader = _add([big], device_memory_budget=0, **options)
            engine.set_fault("mmap", errno=errno.ENOMEM)
            with loader.copy_files_to_device() as buffer:
                assert bits(buffer.get_tensor("t3")) == bits(stock.load_file(big)["t3"])
            engine.clear_faults()
        (report,) = seen.reports
        assert "memory" in report.fallback_reason
        loader.close()


# ---------------------------------------------------------------- arguments


BAD = [
    ({"bbuf_size_kb": 0}, OptionError, "bbuf_size_kb=0: allowed are whole numbers above 0"),
    ({"bbuf_size_kb": 1.5}, OptionError, "bbuf_size_kb=1.5"),
    ({"max_threads": -1}, OptionError, "max_threads=-1"),
    ({"max_threads": True}, OptionError, "max_threads=True"),
    ({"nogds": "yes"}, OptionError, "nogds='yes': allowed are True and False"),
    ({"set_numa": None}, OptionError, "set_numa=None"),
    ({"disable_cache": 1}, OptionError, "disable_cache=1"),
    ({"debug_log": 0}, OptionError, "debug_log=0"),
    ({"use_fgds": 0}, OptionError, "use_fgds=0"),
    ({"framework": "mxnet"}, OptionError, "framework='mxnet': allowed are pt, pytorch"),
    ({"device": "nothing"}, RuntimeError, "nothing"),
    ({"device": 1.5}, TypeError, "device=1.5"),
    ({"io": "fast"}, OptionError, "option io='fast': allowed are"),
    ({"io": "mmap", "tensors": "owned"}, OptionError, "exclude each other"),
    ({"thread": 3}, TypeError, "unexpected keyword argument 'thread'"),
    ({"log_level": "info"}, TypeError, "unexpected keyword argument 'log_level'"),
    ({"pg": "group"}, TypeError, "pg='group': allowed are None, SingleGroup"),
]


@pytest.mark.parametrize(("options", "kind", "text"), BAD, ids=str)
def test_bad_arguments(options, kind, text) -> None:
    with pytest.raises(kind, match=text):
        SafeTensorsFileLoader(options.pop("pg", None), **options)


def test_devices_that_torch_lacks(sample) -> None:
    if torch.version.cuda or torch.version.hip:
        pytest.skip("this torch is a build with CUDA")
    with pytest.raises(AssertionError, match="CUDA"):  # as stock, but earlier
        SafeTensorsFileLoader(None, "cuda:0")
    with pytest.raises(AssertionError, match="CUDA"):
        fastsafe_open(sample, device="cuda")


@pytest.mark.parametrize("device", ["cpu", None, torch.device("cpu")], ids=str)
@pytest.mark.parametrize("framework", ["pt", "pytorch", "torch"])
def test_devices_and_frameworks(sample, device, framework) -> None:
    loader = SafeTensorsFileLoader(SingleGroup(), device, framework=framework)
    loader.add_filenames({0: [sample]})
    with loader.copy_files_to_device() as buffer:
        assert buffer.get_tensor("w", device=device).device.type == "cpu"


class Theirs:
    """As fastsafetensors' Device."""

    def as_str(self) -> str:
        return "cpu"


def test_tensors_are_moved_after_loading(sample, stock) -> None:
    with fastsafe_open(sample) as opened:
        buffer = opened.fb
        assert bits(buffer.get_tensor("w", Theirs())) == bits(stock.load_file(sample)["w"])
        assert buffer.get_tensor("w", "meta").device.type == "meta"
        assert buffer.get_tensor("w", "meta", "F16").dtype == torch.float16
        assert buffer.get_multi_cols(["w", "w"], 0, "meta").device.type == "meta"
        with pytest.raises(RuntimeError, match="nowhere"):
            buffer.get_tensor("w", "nowhere")
        with pytest.raises(OptionError, match="dtype='F17'"):
            buffer.get_tensor("w", dtype="F17")
        with pytest.raises(OptionError, match="dtype=3"):
            buffer.get_tensor("w", dtype=3)


COPY = [
    ({"dtype": "nothing"}, OptionError, "dtype='nothing': allowed are torch dtypes"),
    ({"use_buf_register": 1}, OptionError, "use_buf_register=1"),
    ({"max_copy_block_size": 0}, OptionError, "max_copy_block_size=0"),
    ({"allow_inflight": None}, OptionError, "allow_inflight=None"),
    ({"borrowed_tensors": 2}, OptionError, "borrowed_tensors=2"),
]


@pytest.mark.parametrize(("options", "kind", "text"), COPY, ids=str)
def test_bad_arguments_of_copying(sample, options, kind, text) -> None:
    with pytest.raises(kind, match=text):
        _add([sample]).copy_files_to_device(**options)


def test_arguments_of_copying_in_their_order(sample, stock) -> None:
    with _add([sample]).copy_files_to_device(torch.float64, False, 1, True, True) as buffer:
        assert bits(buffer.get_tensor("w")) == bits(stock.load_file(sample)["w"].double())


FILES = [
    (["a"], TypeError, "expected a dict of ranks"),
    ("a", TypeError, "expected a dict of ranks"),
    ({0: "a"}, TypeError, "expected a list of paths, not 'a'"),
    ({0: [3]}, TypeError, "expected a path, not 3"),
    ({0: [b"a"]}, TypeError, "expected a path, not b'a'"),
    ({"0": ["a"]}, TypeError, "rank '0' is not an integer"),
    ({1: ["a"]}, ValueError, "rank 1 is not in the group, whose size is 1"),
    ({-1: ["a"]}, ValueError, "rank -1 is not in the group"),
]


@pytest.mark.parametrize(("files", "kind", "text"), FILES, ids=str)
def test_bad_files(files, kind, text) -> None:
    with pytest.raises(kind, match=text):
        SafeTensorsFileLoader(None).add_filenames(files)


MEANT = [
    ({}, {}),
    ({"bbuf_size_kb": 16 * 1024, "max_threads": 16}, {}),  # their defaults
    ({"bbuf_size_kb": 1024}, {"chunk_bytes": 1 << 20}),
    ({"bbuf_size_kb": 1}, {"chunk_bytes": 64 << 10}),
    ({"bbuf_size_kb": 1 << 20}, {"chunk_bytes": 64 << 20}),
    ({"max_threads": 3}, {"threads": 3}),
    ({"max_threads": 999}, {"threads": 64}),
    ({"max_threads": 3, "threads": 5}, {"threads": 5}),
    ({"device_memory_budget": 1 << 20}, {"device_memory_budget": 1 << 20}),
    ({"io": "direct"}, {"io": "direct"}),
]


@pytest.mark.parametrize(("given", "meant"), MEANT, ids=str)
def test_arguments_set_options(given, meant) -> None:
    import dataclasses

    with fastst_patch.config_context(chunk_bytes="2MiB", threads=7):
        found = SafeTensorsFileLoader(None, **given)._settings.config
        assert found == dataclasses.replace(fastst_patch.config(), **meant)


def test_copy_blocks_are_chunks(sample, monkeypatch) -> None:
    seen = []
    read = engine.read
    monkeypatch.setattr(
        engine, "read", lambda *a, **k: seen.append(k["chunk_bytes"]) or read(*a, **k)
    )
    for block, chunk in ((1 << 40, 4 << 20), (1 << 20, 1 << 20), (5, 64 << 10)):
        with _add([sample], io="buffered").copy_files_to_device(max_copy_block_size=block) as b:
            b.get_tensor("w")
        assert seen[-1] == chunk


def test_debug_log(sample, capsys) -> None:
    loader = SafeTensorsFileLoader(None, debug_log=True)
    loader.add_filenames({0: [sample]})
    assert "1 files, 3 tensors" in capsys.readouterr().err
    loader.close()
    other = _add([sample], debug_log=True)
    del other
    gc.collect()
    capsys.readouterr()
    _add([sample])
    assert capsys.readouterr().err == ""
    assert fastst_patch.config().log_level is None


def test_f4_cannot_be_converted(tmp_path, stock) -> None:
    try:
        path = write(tmp_path / "m.safetensors", {"x": ("F4", (2, 4))})
        stock.load_file(path)
    except Exception:
        pytest.skip("this torch or this safetensors has no F4")
    with fastsafe_open(path) as opened:
        assert opened.fb.get_shape("x") == [2, 4]
        assert opened.get_tensor("x").shape == (2, 2)
        assert opened.get_tensor_wrapped("x").get_shape() == [2, 4]
        with pytest.raises((RuntimeError, NotImplementedError), match=rf"'x' of {path} is"):
            opened.fb.get_tensor("x", dtype="F32")
