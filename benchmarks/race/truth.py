"""What is in the files, found without any loader: the judge of all of them.

The header is read by Python's json, the bytes through a map of our own; each tensor's checksum is
the order-sensitive one of the timed processes (fst_touch), taken over the file itself.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastst_patch.bench.checkpoint_files import header
from fastst_patch.bench.failures import BenchError

# As str(torch.dtype) ends. What is not here keeps its own name, and so equals nothing.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}


@dataclass(frozen=True)
class Entry:
    """One tensor, as every loader must give it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    checksum: int


def of(files: Sequence[str]) -> list[Entry]:
    """Every tensor of all files, by file and offset: the order in which bytes are touched.

    Raises:
        BenchError: a name stands in two files, so a dict cannot hold both.
    """
    entries = [entry for file in files for entry in _of_file(file)]
    if len({entry.name for entry in entries}) != len(entries):
        raise BenchError("a tensor's name stands in two files of one workload")
    return entries


def _of_file(file: str) -> list[Entry]:
    import numpy

    from fastst_patch import engine

    entries, start = header(file)
    # A name decides between tensors without bytes, which share an offset.
    in_order = sorted(entries.items(), key=lambda one: (one[1]["data_offsets"], one[0]))
    with open(file, "rb") as opened:
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = numpy.frombuffer(mapped, dtype=numpy.uint8)
            base = int(view.ctypes.data) + start
            try:
                return [_entry(name, facts, base, engine.touch) for name, facts in in_order]
            finally:
                del view  # or the map could not be closed


def _entry(name: str, facts: dict[str, Any], base: int, touch: Callable[[int, int], int]) -> Entry:
    begin, end = facts["data_offsets"]
    dtype = DTYPES.get(facts["dtype"], facts["dtype"])
    return Entry(name, dtype, tuple(facts["shape"]), touch(base + begin, end - begin))


def dtypes(files: Sequence[str]) -> list[str]:
    """The dtypes of all tensors, as the files name them."""
    return sorted({facts["dtype"] for file in files for facts in header(file)[0].values()})


def write(entries: Sequence[Entry], path: Path) -> None:
    """Keep them for timed processes, which read them before their clock starts."""
    rows = [(one.name, one.dtype, one.shape, one.checksum) for one in entries]
    path.write_text(json.dumps(rows), encoding="utf-8")


def read(path: str) -> list[Entry]:
    """What `write` wrote."""
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    return [Entry(name, dtype, tuple(shape), checksum) for name, dtype, shape, checksum in rows]


def differences(
    entries: Sequence[Entry], tensors: dict[str, Any], sums: dict[str, int], device: str
) -> list[str]:
    """How loaded tensors differ from the files: nothing, for a loader that is right.

    ``sums`` holds a checksum of every tensor that could be touched. Strides count: a tensor of
    a file is contiguous. The order of names does not, since not every loader keeps one.
    """
    found = []
    for entry in entries:
        tensor = tensors.get(entry.name)
        if tensor is None:
            found.append(f"{entry.name}: missing")
            continue
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
            given = f"{dtype} {tuple(tensor.shape)}"
            found.append(f"{entry.name}: {given}, not {entry.dtype} {entry.shape}")
        elif not tensor.is_contiguous():
            found.append(f"{entry.name}: not contiguous")
        elif tensor.device.type != device.partition(":")[0]:
            found.append(f"{entry.name}: on {tensor.device.type}, not on {device}")
        elif sums.get(entry.name) != entry.checksum:
            found.append(f"{entry.name}: its bytes are not the file's")
    names = {entry.name for entry in entries}
    found += [f"{name}: in no file" for name in tensors if name not in names]
    return found
