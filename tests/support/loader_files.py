"""Files and comparisons that the tests of the explicit loader share."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastst_patch import SafeTensorsFileLoader, SingleGroup, dtypes, sharding

# Bytes of one element; F4 has half of one.
DTYPES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2,
    "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "C64": 8, "F64": 8, "I64": 8, "U64": 8,
    "F4": 0.5, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
}  # fmt: skip
SHAPES = ((), (0,), (3, 0, 2), (1,), (5, 6), (2, 3, 4), (7, 130))

WAYS = [
    {},
    {"io": "direct"},
    {"tensors": "owned"},
    {"io": "buffered", "device_memory_budget": 5_000},
]
"""Options by which tensors come in different ways."""


def write(path: Path, entries: dict[str, tuple[str, tuple[int, ...]]], seed: int = 0) -> str:
    """Write a file of random bytes, whose tensors are not aligned to their dtypes."""
    rnd = random.Random(seed)
    header, data, at = {"__metadata__": {"seed": str(seed)}}, b"", 0
    for name, (dtype, shape) in entries.items():
        count = 1
        for length in shape:
            count *= length
        nbytes = int(count * DTYPES[dtype])
        piece = bytes(rnd.randrange(2) for _ in range(nbytes)) if dtype == "BOOL" else None
        data += piece if piece is not None else rnd.randbytes(nbytes)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    text += b" " * ((3 - len(text)) % 8)  # so that data begins at an odd offset
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return str(path)


def of_all_dtypes(folder: Path, files: int = 2) -> list[str]:
    """Files with every dtype that this torch and this safetensors load, in every shape."""
    known = [name for name in DTYPES if loads(folder, name)]
    assert {"BOOL", "U8", "F16", "BF16", "F32", "F64", "I64"} <= set(known)
    paths = []
    for k in range(files):
        entries = {
            f"file{k}.{dtype}.{'x'.join(map(str, shape)) or 'scalar'}": (dtype, shape)
            for dtype in known
            for shape in SHAPES
            if dtype != "F4" or (shape and shape[-1] % 2 == 0)
        }
        paths.append(write(folder / f"model-{k}.safetensors", entries, k))
    return paths


def loads(folder: Path, dtype: str) -> bool:
    """Whether stock loads a dtype."""
    from safetensors import safe_open

    path = folder / "one.safetensors"
    write(path, {"x": (dtype, (2,))})
    try:
        with safe_open(path, "pt") as handle:
            handle.get_tensor("x")
        return dtypes.dtype_named(dtype) is not None
    except Exception:
        return False
    finally:
        path.unlink()


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """Dtype, shape and bytes of a tensor, for comparison."""
    raw = torch.empty(0, dtype=torch.uint8)
    if tensor.numel():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), raw.numpy().tobytes()


def loader_of(paths: list[str], device: Any = "cpu", **options: Any) -> SafeTensorsFileLoader:
    """A loader of one process with these files."""
    loader = SafeTensorsFileLoader(SingleGroup(), device, **options)
    loader.add_filenames({0: paths})
    return loader


class Pair:
    """A process group of two ranks, as the loader takes one."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2


def pair_of_ranks(monkeypatch: pytest.MonkeyPatch) -> Pair:
    """A group whose other rank is not there, and agrees to all."""

    class Group:
        @classmethod
        def of(cls, pg: Any) -> Any:
            return cls()

        def agree(self, error: Exception) -> None:
            """All ranks have the same."""

    monkeypatch.setattr(sharding, "Group", Group)
    return Pair()


def said_without(module: str, framework: str, sample: str) -> str:
    """What the loader says for a framework without its library; torch's tensors are loaded."""
    code = f"""
import sys
sys.modules[{module!r}] = None
from fastst_patch import fastsafe_open
try:
    fastsafe_open({sample!r}, {framework!r})
except ImportError as error:
    print(error)
with fastsafe_open({sample!r}, "pt") as opened:
    opened.get_tensor("w")
"""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
