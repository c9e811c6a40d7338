"""Files for sharded loading, and comparison with torch's own slices of stock's tensors.

Used by tests and, in the ranks' processes, by their cases (cases_*.py).
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import fastst_patch

BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    "F4": 4,
}

# Uneven over 2 and 4 ranks, smaller than 4, empty, scalar; F4 halves the last dimension.
SHAPES = ((), (0,), (1,), (6,), (7, 4), (4, 6), (3, 2), (0, 4), (5, 0), (2, 5, 6), (9, 1, 2))

# Paths of loads without a fallback, as reports name them.
FAST = {
    *("mmap", "mmap+readahead", "buffered", "direct", "owned"),
    *("ring", "ring+direct", "exchange", "exchange+direct"),
}

Tensors = dict[str, torch.Tensor]
Expect = Callable[[str, torch.Tensor], "torch.Tensor | None"]


# ---------------------------------------------------------------- files


def write_file(path: Path, tensors: Sequence[tuple[str, str, Sequence[int]]], pad: int = 0) -> None:
    """Write random bytes, tensor after tensor in the given order, without alignment.

    Args:
        path: of the file.
        tensors: name, dtype as the format calls it, shape.
        pad: spaces after the header.
    """
    numbers = random.Random(str((tensors, pad)))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, dtype, shape in tensors:
        size = BITS[dtype] * math.prod(shape) // 8
        piece = numbers.randbytes(size)
        start = len(data)
        data += bytes(b & 1 for b in piece) if dtype == "BOOL" else piece
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode() + b" " * pad
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def loads(folder: Path, dtype: str) -> bool:
    """Whether this safetensors with this torch loads a dtype."""
    path = folder / f"{dtype}.safetensors"
    write_file(path, [("x", dtype, (2,))])
    try:
        return len(safetensors.torch.load_file(path)) == 1
    except Exception:
        return False
    finally:
        path.unlink()


def write_zoo(folder: Path) -> list[Path]:
    """Write three files with every dtype that stock can load, in every shape of `SHAPES`.

    Returns:
        The files. Names have the form ``DTYPE.SHAPE``, and are unique over the files.
    """
    wanted = []
    for dtype in sorted(d for d in BITS if loads(folder, d)):
        for shape in SHAPES:
            if dtype == "F4" and (not shape or shape[-1] % 2):
                continue
            wanted.append((f"{dtype}.{'x'.join(map(str, shape))}", dtype, shape))
    random.Random(5).shuffle(wanted)
    # Larger than chunks of 64 KiB, with odd lengths.
    big = [("big.rows", "BF16", (1021, 129)), ("big.columns", "F32", (37, 1201))]
    big += [("big.cube", "U8", (7, 211, 97)), ("big.flat", "I16", (100_003,))]
    files = []
    for number, pad in enumerate((0, 3, 5)):
        path = folder / f"zoo-{number + 1:05}-of-00003.safetensors"
        write_file(path, wanted[number::3] + big[number::3], pad)
        files.append(path)
    return files


class Full:
    """All tensors of some files, by stock.

    Attributes:
        tensors: by name.
        places: (file, begin, end) by name; empty tensors may share one.
    """

    def __init__(self, files: Sequence[str | Path]) -> None:
        assert type(safetensors.torch.safe_open) is type, (
            "safetensors is patched: there is no stock to compare with"
        )
        self.tensors: Tensors = {}
        self.places: dict[str, tuple[int, int, int]] = {}
        for number, file in enumerate(files):
            self.tensors.update(safetensors.torch.load_file(file))
            for name, span in data_offsets(file).items():
                self.places[name] = (number, *span)


class Outline(Full):
    """Shapes and places of tensors, read without mapping the files; no bytes or dtypes."""

    def __init__(self, files: Sequence[str | Path]) -> None:
        self.tensors, self.places = {}, {}
        for number, file in enumerate(files):
            for name, entry in header_of(file).items():
                self.tensors[name] = torch.empty(entry["shape"], device="meta")
                self.places[name] = (number, *entry["data_offsets"])


def header_of(file: str | Path) -> dict[str, dict[str, Any]]:
    """The header's entries by name, in the file's order."""
    with open(file, "rb") as opened:
        header: dict[str, Any] = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    header.pop("__metadata__", None)
    return header


def data_offsets(file: str | Path) -> dict[str, tuple[int, int]]:
    """Begin and end of each tensor's bytes, counted from the header's end, by offset."""
    spans = {name: tuple(one["data_offsets"]) for name, one in header_of(file).items()}
    return dict(sorted(spans.items(), key=lambda item: item[1]))


# ---------------------------------------------------------------- results of a rank


def chunk(tensor: torch.Tensor, dim: int, index: int, size: int) -> torch.Tensor:
    """Chunk `index` of `size`, as torch.chunk splits; empty after its last chunk."""
    chunks = torch.chunk(tensor, size, dim)
    if index < len(chunks):
        return chunks[index]
    return tensor.narrow(dim, 0, 0)


def storage_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The whole storage, as bytes."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def assert_owns(ours: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Assert the same bits, contiguous, in storage of exactly their size."""
    assert type(ours) is torch.Tensor, name
    whole = expected.detach().clone(memory_format=torch.contiguous_format)
    for each in ("dtype", "shape", "device", "requires_grad"):
        assert getattr(ours, each) == getattr(whole, each), (name, each, ours.shape, whole.shape)
    assert ours.is_contiguous(), name
    assert ours.storage_offset() == 0, name
    assert ours.untyped_storage().nbytes() == ours.nbytes == whole.nbytes, name
    assert torch.equal(storage_bytes(ours), storage_bytes(whole)), f"{name}: other bytes"


def assert_view(ours: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Assert the same bits and strides as torch's own slice, not copied."""
    if ours.untyped_storage().nbytes() == ours.nbytes:  # whole, complete rows, or joined regions
        assert_owns(ours, expected, name)
        return
    assert ours.stride() == expected.stride(), name
    assert ours.untyped_storage().nbytes() > ours.nbytes, name
    assert_owns(ours.clone(memory_format=torch.contiguous_format), expected, name)


def load_sharded(*arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
    """fastst_patch.load_sharded, by default without views, as `assert_owns` needs."""
    return fastst_patch.load_sharded(*arguments, **{"contiguous": True, **options})


def assert_tensors(
    ours: Mapping[str, torch.Tensor], full: Full, expect: Expect, *, views: bool = False
) -> int:
    """Assert a rank's result: names in file order, and the tensors that `expect` gives.

    Args:
        ours: the result.
        full: whole tensors.
        expect: function of a name and the whole tensor; None: the result does not have it.
        views: shards of maps may be views.

    Returns:
        The bytes of all tensors.
    """
    assert type(ours) is dict
    wanted = {name: expect(name, tensor) for name, tensor in full.tensors.items()}
    assert set(ours) == {name for name, one in wanted.items() if one is not None}
    places = [full.places[name] for name in ours]
    assert places == sorted(places)
    for name, tensor in ours.items():
        (assert_view if views else assert_owns)(tensor, wanted[name], name)
    return sum(tensor.nbytes for tensor in ours.values())
