"""Headers as fastsafetensors describes them: against the JSON in files, and stock's judgement."""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from loader_files import loader_of

from fastst_patch import (
    DType,
    OptionError,
    SafeTensorsFileLoader,
    SafeTensorsMetadata,
    TensorFrame,
    fastsafe_open,
    stock,
)

pytestmark = pytest.mark.usefixtures("nothing_left")


def header_of(path: str) -> tuple[dict[str, Any], int]:
    """The parsed header, and the bytes before the first tensor's."""
    data = Path(path).read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), 8 + length


def assert_describes(meta: SafeTensorsMetadata, path: str) -> None:
    header, begin = header_of(path)
    metadata = header.pop("__metadata__", "")
    assert meta.metadata == metadata
    assert (meta.header_length, meta.size_bytes) == (begin, os.path.getsize(path))
    assert meta.aligned == (begin % 16 == 0)
    assert list(meta.tensors) == sorted(header, key=lambda name: header[name]["data_offsets"])
    for name, entry in header.items():
        frame = meta.tensors[name]
        assert frame.dtype is DType(entry["dtype"])
        assert (frame.shape, frame.data_offsets) == (entry["shape"], entry["data_offsets"])
        assert frame == TensorFrame.from_buffer(entry)
        assert (frame.offsets, frame.sliced) == ([0] * len(frame.shape), False)
        size = 1
        for length, stride in zip(frame.shape[::-1], frame.strides[::-1], strict=True):
            assert stride == size
            size *= length
        assert str(frame) == str({"dtype": frame.dtype, **{k: entry[k] for k in
                                  ("shape", "data_offsets")}})  # fmt: skip


# ---------------------------------------------------------------- where headers come from


def test_of_a_file(paths) -> None:
    for path in paths:
        meta = SafeTensorsMetadata.from_file(path, "pytorch")
        assert_describes(meta, path)
        assert (meta.src, meta.framework) == (path, "pytorch")
        assert not hasattr(meta, "ser")
        assert repr(meta) == str({"__metadata__": meta.metadata, "tensors": meta.tensors})


def test_of_a_descriptor(paths, monkeypatch) -> None:
    """However few bytes a read returns; the descriptor is left at the first tensor's bytes."""
    read = os.read
    monkeypatch.setattr(os, "read", lambda fd, length: read(fd, min(length, 100)))
    fd = os.open(paths[0], os.O_RDONLY)
    try:
        meta = SafeTensorsMetadata.from_fd(fd, "a name", "pt", keep_orig_dict=True)
        assert os.lseek(fd, 0, os.SEEK_CUR) == meta.header_length
    finally:
        os.close(fd)
    assert_describes(meta, paths[0])
    header, _ = header_of(paths[0])
    del header["__metadata__"]
    assert (meta.ser, meta.src) == (header, "a name")


def test_of_memory(paths) -> None:
    data = Path(paths[1]).read_bytes()
    kept = ctypes.create_string_buffer(data, len(data))
    meta = SafeTensorsMetadata.from_buffer(ctypes.addressof(kept), len(data), "memory", "torch")
    assert_describes(meta, paths[1])
    assert meta.src == ""
    with pytest.raises(ValueError, match="buf=0"):
        SafeTensorsMetadata.from_buffer(0, 100, "memory", "torch")


def test_of_a_text(paths) -> None:
    _, begin = header_of(paths[0])
    text, size = Path(paths[0]).read_bytes()[8:begin].decode(), os.path.getsize(paths[0])
    assert_describes(SafeTensorsMetadata(text, begin, size, "pt", paths[0]), paths[0])
    with pytest.raises(ValueError, match="header_length=7"):
        SafeTensorsMetadata(text, 7, size, "pt")
    for wrong in (-1, begin - 1, 1 << 63, 1 << 70):
        with pytest.raises(ValueError, match=f"size_bytes={wrong}"):
            SafeTensorsMetadata(text, begin, wrong, "pt")
    with pytest.raises(OptionError, match="framework='mxnet'"):
        SafeTensorsMetadata(text, begin, size, "mxnet")


class Framework:
    """As fastsafetensors' objects for frameworks."""

    def get_name(self) -> str:
        return "pytorch"


def test_a_framework_as_an_object(paths) -> None:
    framework = Framework()
    assert SafeTensorsMetadata.from_file(paths[0], framework).framework is framework


def test_no_metadata(raw) -> None:
    import torch

    path = raw.tensors({"a": torch.ones(2)})
    assert SafeTensorsMetadata.from_file(path).metadata == ""
    with fastsafe_open(path) as opened:
        assert opened.metadata() == {path: {}}


# ---------------------------------------------------------------- wrong headers

ENTRY = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'

WRONG = [
    (b"1234567", "HeaderTooSmall"),
    ((200_000_000).to_bytes(8, "little") + b"{}", "HeaderTooLarge"),
    ((100).to_bytes(8, "little") + b"{}", "InvalidHeaderLength"),
    ((2).to_bytes(8, "little") + b"\xff\xfe", "InvalidHeader"),
]


@pytest.mark.parametrize(("data", "text"), WRONG, ids=lambda value: str(value)[:30])
def test_no_header(tmp_path, data, text) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    kept = ctypes.create_string_buffer(data, len(data))
    for read in (
        lambda: SafeTensorsMetadata.from_file(str(path)),
        lambda: SafeTensorsMetadata.from_buffer(ctypes.addressof(kept), len(data), str(path)),
    ):
        with pytest.raises(stock.SafetensorError, match=f"{path}: {text}"):
            read()
    with pytest.raises(stock.SafetensorError):
        stock.safe_open(path, "pt")


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (ENTRY, 4),
        (ENTRY, 12),
        (ENTRY.replace("[0,8]", "[4,12]"), 12),
        (ENTRY.replace("[2]", "[3]"), 8),
        (ENTRY.replace("F32", "F33"), 8),
        (ENTRY[:-1], 8),
        ("[]", 0),
    ],
)
def test_wrong_headers_raise_as_stock(raw, header, data) -> None:
    path = raw.write(raw.pack(header, b"\0" * data))
    with pytest.raises(Exception) as theirs:
        stock.safe_open(path, "pt")
    with pytest.raises(type(theirs.value)) as ours:
        SafeTensorsMetadata.from_file(path)
    assert path in str(ours.value)
    assert str(theirs.value) in str(ours.value)


@pytest.mark.parametrize("size", [1 << 32, 1 << 40])
def test_a_wrong_header_of_a_large_file(tmp_path, size) -> None:
    """Stock is asked, with a hole in the place of the tensors. Their bytes would take memory."""
    path = tmp_path / "large.safetensors"
    header = ENTRY.replace("F32", "F33").encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    try:
        os.truncate(path, size)
    except OSError as error:
        pytest.skip(f"no file of {size} bytes here: {error.strerror}")
    with pytest.raises(stock.SafetensorError) as theirs:
        stock.safe_open(path, "pt")
    with pytest.raises(stock.SafetensorError) as ours:
        SafeTensorsMetadata.from_file(str(path))
    assert str(theirs.value) in str(ours.value)


def test_what_is_no_file(tmp_path) -> None:
    """It is not opened: a pipe's writer would be freed, and then find the pipe broken."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def waiting(number: int, frame: Any) -> None:
        raise TimeoutError("it waits for a writer")

    before = signal.signal(signal.SIGALRM, waiting)
    signal.alarm(10)
    try:
        for path, text in ((pipe, "it is no regular file"), (tmp_path, "Is a directory")):
            with pytest.raises(OSError, match=f"{path} could not be opened: {text}"):
                SafeTensorsMetadata.from_file(str(path))
        with pytest.raises(FileNotFoundError, match="nothing could not be opened: No such file"):
            SafeTensorsMetadata.from_file(str(tmp_path / "nothing"))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    reader, writer = os.pipe()
    with pytest.raises(OSError, match="a pipe could not be opened: it is no regular file"):
        SafeTensorsMetadata.from_fd(reader, "a pipe")
    os.close(reader)
    os.close(writer)


def test_a_file_that_cannot_be_read(paths, monkeypatch) -> None:
    def failing(fd: int, length: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "read", failing)
    with pytest.raises(OSError, match=f"{paths[0]} could not be opened: Input/output error"):
        SafeTensorsMetadata.from_file(paths[0])


def test_a_file_that_ends_early(tmp_path, monkeypatch) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes((60).to_bytes(8, "little") + b"{" * 60)
    monkeypatch.setattr(os, "read", lambda fd, length, read=os.read: read(fd, length)[:0])
    with pytest.raises(stock.SafetensorError, match="UnexpectedEOF"):
        SafeTensorsMetadata.from_file(str(path))
    with pytest.raises(FileNotFoundError):
        SafeTensorsMetadata.from_file(str(tmp_path / "nothing"))


def test_a_header_that_is_left_to_stock(raw) -> None:
    """A name that occurs twice: stock takes the last."""
    entry = ENTRY[1:-1]
    path = raw.write(raw.pack(f"{{{entry},{entry}}}", os.urandom(8)))
    meta = SafeTensorsMetadata.from_file(path)
    assert (list(meta.tensors), meta.tensors["a"].shape) == (["a"], [2])


# ---------------------------------------------------------------- ranges and slices


def test_byte_ranges(paths) -> None:
    meta = SafeTensorsMetadata.from_file(paths[0])
    begin = meta.header_length
    kept = set(list(meta.tensors)[::3])
    for gap in (0, 50, 4096, 1 << 30):
        ranges = meta.select_byte_ranges(kept.__contains__, gap)
        assert all(b[0] - a[1] > gap for a, b in itertools.pairwise(ranges))
        for name in kept:
            first, last = (begin + at for at in meta.tensors[name].data_offsets)
            assert first == last or any(lo <= first <= last <= hi for lo, hi in ranges)
        ends = {begin + at for name in kept for at in meta.tensors[name].data_offsets}
        assert {end for some in ranges for end in some} <= ends
    assert meta.select_byte_ranges(lambda name: True) == [(begin, meta.size_bytes)]
    assert meta.select_byte_ranges(lambda name: False) == []
    empty = [n for n, frame in meta.tensors.items() if 0 in frame.shape]
    assert meta.select_byte_ranges(empty.__contains__) == []


def test_slices_of_frames() -> None:
    """As slices of sequences: each picks the same rows."""
    rows, columns = 5, 6
    frame = TensorFrame.from_buffer(
        {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, rows * columns * 4]}
    )
    bounds = [None, -7, -5, -2, 0, 1, 4, 5, 9]
    for start, stop, step in itertools.product(bounds, bounds, [None, 1, 2, 3, -1, -2]):
        index = slice(start, stop, step)
        picked, part = list(range(rows))[index], frame[index]
        if not picked:
            assert (part.shape, part.strides, part.offsets, part.sliced) == ([], [], [], False)
            continue
        assert part.shape == [len(picked), columns]
        stride = part.strides[0] // columns
        assert [part.offsets[0] + stride * k for k in range(len(picked))] == picked
        assert (part.dtype, part.data_offsets, part.sliced) == (
            frame.dtype, frame.data_offsets, True,
        )  # fmt: skip
    for row in range(-rows, rows):
        part = frame[row]
        assert (part.shape, part.offsets) == ([1, columns], [row % rows, 0])
    part = frame[1:-1, ::2][0, -1]
    assert (part.shape, part.offsets, part.strides) == ([1, 1], [1, 2], [6, 2])
    assert frame[()].shape == frame.shape
    for index, error in (
        (5, IndexError), (-6, IndexError), ((0, 0, 0), IndexError), (slice(None, None, 0),
         ValueError), ("a", TypeError), ((0, None), TypeError),
    ):  # fmt: skip
        with pytest.raises(error):
            frame[index]


def test_dtypes_are_their_names() -> None:
    assert DType.BF16 == "BF16" == DType("BF16").value
    assert DType.AUTO.name == "AUTO"
    with pytest.raises(ValueError, match="F17"):
        DType("F17")


# ---------------------------------------------------------------- of loaders


def test_headers_of_a_loader(paths) -> None:
    loader = loader_of(paths)
    assert list(loader.meta) == paths
    for path, (meta, rank) in loader.meta.items():
        assert_describes(meta, path)
        assert (meta.src, rank) == (path, 0)
        assert loader.meta[path][0] is meta
    assert list(loader.frames) == loader.get_keys()
    for name, frame in loader.frames.items():
        assert frame.shape == loader.get_shape(name)
    with loader.copy_files_to_device(dtype=DType.F16) as buffer:
        assert str(buffer.get_tensor("file0.F32.5x6").dtype) == "torch.float16"
    loader.close()
    assert loader.meta == {} == loader.frames
    assert SafeTensorsFileLoader(None).meta == {}
