"""Files of the soak: their content follows from a version, which each of them names.

A tensor's name begins with the version, and its bytes are a piece of one pool of random bytes. So
what was loaded is checked without its file, whoever has written that and whatever stands at its
path by now.
"""

from __future__ import annotations

import functools
import json
import math
import os
import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

POOL_BYTES = 32 << 20
DTYPES = {
    "U8": torch.uint8,
    "I16": torch.int16,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
}


class WrongBytesError(AssertionError):
    """A tensor is not the one that its file holds."""


@dataclass(frozen=True)
class Piece:
    """One tensor: where in the pool its bytes are, and how they are read."""

    dtype: str
    shape: tuple[int, ...]
    at: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Contents:
    """What files of every version hold.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        made = np.random.default_rng(seed).integers(0, 256, POOL_BYTES, np.uint8)
        self.pool = torch.from_numpy(made)
        self.pieces = functools.lru_cache(128)(self._pieces)

    def _pieces(self, version: int) -> dict[str, Piece]:
        numbers = random.Random(f"{self.seed}/{version}")
        left = int(2 ** numbers.uniform(12, 21)) if numbers.random() < 0.9 else 6 << 20
        pieces = {}
        for number in range(numbers.randint(1, 24)):
            dtype = numbers.choice(list(DTYPES))
            columns = numbers.choice((1, 3, 64, 129))
            most = left // (columns * DTYPES[dtype].itemsize)
            rows = numbers.randint(0, max(1, most // 2)) if most else 1
            piece = Piece(dtype, (rows, columns), 0)
            # Views need alignment; the file's offsets have none, because some sizes are odd.
            at = numbers.randrange(0, POOL_BYTES - piece.nbytes, 8)
            pieces[f"{version}.layer.{number}"] = Piece(dtype, piece.shape, at)
            left = max(0, left - piece.nbytes)
        return pieces

    def piece(self, name: str) -> Piece:
        return self.pieces(version_of(name))[name]

    def expected(self, name: str) -> torch.Tensor:
        piece = self.piece(name)
        raw = self.pool[piece.at : piece.at + piece.nbytes]
        return raw.view(DTYPES[piece.dtype]).view(piece.shape)

    def encode(self, version: int) -> bytes:
        pieces = self.pieces(version)
        header: dict[str, Any] = {"__metadata__": {"version": str(version)}}
        data = bytearray()
        for name in random.Random(version).sample(sorted(pieces), len(pieces)):
            piece, begin = pieces[name], len(data)
            data += _raw(self.expected(name)).numpy().tobytes()
            header[name] = {
                "dtype": piece.dtype,
                "shape": piece.shape,
                "data_offsets": [begin, len(data)],
            }
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data

    def write(self, path: Path, version: int) -> None:
        """Put a file in the place of the one that stands there."""
        beside = path.with_name(f".new-{version}-{path.name}")
        beside.write_bytes(self.encode(version))
        os.replace(beside, path)

    def check(self, name: str, found: Any, index: Any = ()) -> int:
        """Compare a tensor, or a part of one, in every byte; return how many there are."""
        wanted = self.expected(name)
        wanted = wanted[index] if index != () else wanted
        if not isinstance(found, torch.Tensor):
            found = torch.from_numpy(np.asarray(found))
        if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
            raise WrongBytesError(f"{name}, part {index}: {found.dtype} {found.shape}")
        mine, theirs = _raw(found), _raw(wanted)
        if not torch.equal(mine, theirs):
            different = (mine != theirs).nonzero().reshape(-1)
            where, seen = map_of(mine.data_ptr()), self._seen(mine[different])
            time.sleep(0.1)
            late = ", and right 0.1 s later" if torch.equal(mine, theirs) else ""
            raise WrongBytesError(
                f"{name}, part {index}, in {where}: {len(different)} of {len(mine)} bytes differ,"
                f" from {int(different[0])} to {int(different[-1])}: {seen}{late}"
            )
        return len(mine)

    def _seen(self, wrong: torch.Tensor) -> str:
        """Where wrong bytes may have come from."""
        values = wrong.unique().tolist()
        if len(values) < 3:
            return f"values {values}"
        some = wrong[:16].numpy().tobytes()
        return f"{some.hex()}, in the pool at {self.pool.numpy().tobytes().find(some)}"

    def check_names(self, names: Iterable[str]) -> None:
        """Names are those of one version, all of them."""
        found = set(names)
        version = version_of(min(found, default="-1."))
        if found != set(self.pieces(version)):
            raise WrongBytesError(f"names of version {version}: {sorted(found)}")

    def check_all(self, found: Mapping[str, Any]) -> int:
        """Compare all tensors of a file; return how many bytes they have."""
        self.check_names(found)
        return sum(self.check(name, one) for name, one in found.items())


def map_of(address: int) -> str:
    """The line of the process's maps that holds an address."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        begin, _, end = line.split()[0].partition("-")
        if int(begin, 16) <= address < int(end, 16):
            return line
    return "no map"


def version_of(name: str) -> int:
    """The version of the file that a tensor comes from."""
    return int(name.partition(".")[0])


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def evict(path: Path) -> None:
    """Ask the kernel to let go of a file's pages; it keeps those that are mapped or written."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
