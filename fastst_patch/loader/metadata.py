"""A file's header, `SafeTensorsMetadata`, and its tensors, `TensorFrame`, for callers."""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import errno
import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from typing import Any

from .. import engine, stock
from ..dtypes import DTYPE_NAMES
from ..errors import Fallback
from ..layout import FileLayout
from ..locks import once
from .frameworks import framework_name
from .messages import explained
from .stock_file import layout_of

__all__ = ["DType", "SafeTensorsMetadata", "TensorFrame"]

_LONGEST = 100_000_000
"""Most bytes of a header, as in stock."""

_ALIGNMENT = 16
"""Bytes to which fastsafetensors wants the data aligned in a file; here it need not be."""

DType: Any = enum.EnumMeta.__call__(
    enum.Enum, "DType", {name: name for name in (*DTYPE_NAMES, "AUTO")}, type=str, module=__name__
)
"""Safetensors' dtypes, equal to their names; ``AUTO``: as in the file."""


@dataclasses.dataclass(repr=False)
class TensorFrame:
    """Where a tensor, or a slice of it, lies in a file.

    Attributes:
        dtype: a `DType`.
        shape: as in the header.
        data_offsets: of its first byte and of the byte behind its last, from the end of the header.
        strides: of each dimension, in elements.
        offsets: index of the first element in each dimension.
        sliced: whether it is a slice.
    """

    dtype: Any
    shape: list[int]
    data_offsets: list[int]
    strides: list[int]
    offsets: list[int]
    sliced: bool

    @classmethod
    def from_buffer(cls, entry: Mapping[str, Any]) -> TensorFrame:
        """A tensor's frame, given its entry in the header. KeyError, ValueError: it is no entry."""
        shape, offsets = entry["shape"], list(entry["data_offsets"])
        if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
            raise ValueError(f"shape={shape!r}: allowed is a list of whole numbers from 0 on")
        strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
        return cls(DType(entry["dtype"]), shape, offsets, strides, [0] * len(shape), False)

    def __getitem__(self, index: Any) -> TensorFrame:
        """The frame of a slice. A number keeps its dimension, of length 1.

        Raises:
            IndexError: the tensor has no such element or dimension.
            TypeError: an index is neither a number nor a slice.
            ValueError: a step is 0.
        """
        parts = index if isinstance(index, tuple) else (index,)
        if len(parts) > len(self.shape):
            raise IndexError(f"{index!r} has more dimensions than the shape {self.shape}")
        taken = [
            _taken(part, length, dim)
            for dim, (part, length) in enumerate(zip(parts, self.shape, strict=False))
        ]
        if not all(taken):
            return TensorFrame(self.dtype, [], self.data_offsets, [], [], False)
        rest = len(taken)
        return TensorFrame(
            self.dtype,
            [*map(len, taken), *self.shape[rest:]],
            self.data_offsets,
            [s * r.step for s, r in zip(self.strides, taken, strict=False)] + self.strides[rest:],
            [o + r.start for o, r in zip(self.offsets, taken, strict=False)] + self.offsets[rest:],
            True,
        )

    def __repr__(self) -> str:
        return str({name: getattr(self, name) for name in ("dtype", "shape", "data_offsets")})


def _taken(part: Any, length: int, dim: int) -> range:
    """The indices that a number or a slice takes of a dimension."""
    if isinstance(part, slice):
        return range(length)[part]
    if not isinstance(part, int):
        raise TypeError(f"index {part!r} of dimension {dim}: allowed are numbers and slices")
    if not -length <= part < length:
        raise IndexError(f"index {part} of dimension {dim} is out of range: its length is {length}")
    return range(part % length, part % length + 1)


class SafeTensorsMetadata:
    """What the header of a file says. The file need not stay open.

    Args:
        string: the header, without its length.
        header_length: bytes before the first tensor's.
        size_bytes: of the file.
        framework: a framework's name.
        src: path of the file, or ``""``.
        keep_orig_dict: whether to keep the header in ``ser``.

    Attributes:
        src: as given.
        framework: as given.
        metadata: the free-form metadata; ``""`` when there is none.
        header_length: as given.
        size_bytes: as given.
        aligned: whether the first tensor's bytes begin at a multiple of 16.
        ser: the entries of the header, where ``keep_orig_dict`` was True.

    Raises:
        SafetensorError: the header is wrong, as stock judges.
        ValueError: ``header_length`` is not that of ``string``, or ``size_bytes`` is less; or the
            framework is unknown.
    """

    ser: dict[str, Any]

    def __init__(  # noqa: PLR0917 - the order is fastsafetensors'
        self,
        string: str,
        header_length: int,
        size_bytes: int,
        framework: Any = "pytorch",
        src: str = "",
        keep_orig_dict: bool = False,
    ) -> None:
        framework_name(framework)
        header = string.encode()
        if header_length != len(header) + 8:
            raise ValueError(f"header_length={header_length}: the header is of {len(header)} bytes")
        if not header_length <= size_bytes < 1 << 63:
            raise ValueError(f"size_bytes={size_bytes}: no size of a file with such a header")
        self._set(_parsed(header, size_bytes, src or "the header"), framework, src)
        if keep_orig_dict:
            self.ser = json.loads(string)
            self.ser.pop("__metadata__", None)

    def _set(self, layout: FileLayout, framework: Any, src: str) -> None:
        self._layout = layout
        self.framework = framework
        self.src = src
        self.header_length = layout.data_begin
        self.size_bytes = layout.data_begin + layout.data_bytes
        self.aligned = self.header_length % _ALIGNMENT == 0

    @classmethod
    def of_layout(cls, layout: FileLayout, framework: Any, src: str) -> SafeTensorsMetadata:
        """The same of a header that was parsed already."""
        made = cls.__new__(cls)
        made._set(layout, framework, src)
        return made

    @classmethod
    def from_file(cls, filename: str, framework: Any = "pytorch") -> SafeTensorsMetadata:
        """Of a regular file. Raises OSError, and as the class."""
        try:
            # To open and close a pipe would free its writer, and then break the pipe.
            _check_regular(os.stat(filename))
            # If it is a pipe by now, this does not wait; regular files ignore it.
            fd = os.open(filename, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise explained(error, filename) from error
        try:
            return cls.from_fd(fd, filename, framework)
        finally:
            os.close(fd)

    @classmethod
    def from_fd(
        cls, fd: int, filename: str, framework: Any = "pytorch", keep_orig_dict: bool = False
    ) -> SafeTensorsMetadata:
        """Of an open regular file at its beginning, which is left behind the header.

        Raises OSError, and as the class.

        Args:
            fd: its descriptor.
            filename: for messages, and ``src``.
            framework: as of the class.
            keep_orig_dict: as of the class.
        """

        def read(nbytes: int) -> bytes:
            found = b""
            while len(found) < nbytes:
                piece = os.read(fd, nbytes - len(found))
                if not piece:
                    raise _wrong(filename, "UnexpectedEOF", f"{len(found)} of {nbytes} bytes")
                found += piece
            return found

        try:
            status = os.fstat(fd)
            _check_regular(status)
            string = _header_text(read, status.st_size, filename)
        except OSError as error:
            raise explained(error, filename) from error
        length = len(string.encode()) + 8
        return cls(string, length, status.st_size, framework, filename, keep_orig_dict)

    @classmethod
    def from_buffer(
        cls, buf: int, buffer_len: int, filename: str, framework: Any = "pytorch"
    ) -> SafeTensorsMetadata:
        """Of a file in memory. Raises as the class.

        Args:
            buf: its address.
            buffer_len: its bytes.
            filename: for messages.
            framework: as of the class.
        """
        at = buf

        def read(nbytes: int) -> bytes:
            nonlocal at
            if not buf:
                raise ValueError(f"{filename}: buf=0 is no address")
            at += nbytes
            return ctypes.string_at(at - nbytes, nbytes)

        string = _header_text(read, buffer_len, filename)
        return cls(string, len(string.encode()) + 8, buffer_len, framework)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in offset order."""
        return self._layout.names

    @property
    def metadata(self) -> Any:
        """The free-form metadata; ``""`` when there is none."""
        found = self._layout.metadata
        return dict(found) if found else ""

    @once
    def tensors(self) -> dict[str, TensorFrame]:
        """Where each tensor lies, in offset order."""
        layout, begin = self._layout, self._layout.data_begin
        return {
            name: TensorFrame.from_buffer(
                {
                    "dtype": DTYPE_NAMES[layout.dtype(i)],
                    "shape": layout.shape(i),
                    "data_offsets": [at - begin for at in layout.extent(i)],
                }
            )
            for i, name in enumerate(layout.names)
        }

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of that name."""
        return name in self._layout.index

    def shape(self, name: str) -> list[int]:
        """Shape of a tensor, without making the frames of all. KeyError: there is none."""
        return self._layout.shape(self._layout.index[name])

    def select_byte_ranges(
        self, keep_tensor: Callable[[str], bool], merge_gap: int = 4096
    ) -> list[tuple[int, int]]:
        """Ranges of the file with the bytes of some tensors, by offset.

        Args:
            keep_tensor: True for the names of these tensors.
            merge_gap: most bytes between two of them that one range covers, too.
        """
        ranges: list[tuple[int, int]] = []
        for i, name in enumerate(self._layout.names):
            begin, end = self._layout.extent(i)
            if begin == end or not keep_tensor(name):
                continue
            if ranges and begin - ranges[-1][1] <= merge_gap:
                ranges[-1] = (ranges[-1][0], end)
            else:
                ranges.append((begin, end))
        return ranges

    def __repr__(self) -> str:
        return str({"__metadata__": self.metadata, "tensors": self.tensors})


def _check_regular(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.ENODEV, "it is no regular file")


def _header_text(read: Callable[[int], bytes], size: int, place: str) -> str:
    """The header of a file of so many bytes, which ``read`` gives from its beginning on."""
    if size < 8:
        raise _wrong(place, "HeaderTooSmall", f"it has {size} bytes")
    nbytes = int.from_bytes(read(8), "little")
    if nbytes > _LONGEST:
        raise _wrong(place, "HeaderTooLarge", f"{nbytes} bytes")
    if nbytes > size - 8:
        raise _wrong(place, "InvalidHeaderLength", f"{nbytes} bytes in a file of {size}")
    try:
        return read(nbytes).decode()
    except UnicodeDecodeError as error:
        raise _wrong(place, "InvalidHeader", str(error)) from None


def _wrong(place: str, kind: str, what: str) -> Exception:
    """An error that stock gives, too, under the name that safetensors has for it."""
    return stock.SafetensorError(f"{place}: {kind}: {what}")


def _parsed(header: bytes, size: int, place: str) -> FileLayout:
    """The layout that a header describes; where the engine leaves it to stock, as stock judges."""
    if engine.native_error() is None:
        try:
            return engine.parse_header(header, size)
        except Fallback:
            pass  # the code below runs without this exception as its context
    try:
        with stock.small_file(header, max(size - 8 - len(header), 0)) as file:
            with stock.safe_open(file.name, "pt", "cpu"):
                return layout_of(file.name)
    except Exception as error:
        raise explained(error, place) from error
