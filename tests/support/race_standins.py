"""Loaders for the tests of the race: one that is right, and some that are wrong on purpose.

Timed processes find them as they find benchmarks/race/loaders.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.race.loaders import Loader


@dataclass(frozen=True)
class StandIn(Loader):
    """One way to load, or to fail."""

    family: str = "stand-in"
    devices: tuple[str, ...] = ("cpu",)
    package: str | None = "safetensors"
    note: str = "a stand-in"
    absent: str | None = None

    def missing(self, device: str) -> str | None:
        return self.absent or super().missing(device)

    def warm_imports(self, device: str) -> None:
        import safetensors.torch  # noqa: F401

    def load(self, files: list[str], device: str, first: Callable[[], None]) -> dict[str, Any]:
        from safetensors.torch import load_file

        tensors: dict[str, Any] = {}
        for file in files:
            tensors |= load_file(file, device=device)
            first()
        return getattr(self, "_" + self.name.replace("-", "_"), lambda given: given)(tensors)

    # ---- what each of them does to right tensors ----

    def _swaps_bytes(self, tensors):
        import torch

        name = max(tensors, key=lambda one: tensors[one].nbytes)
        raw = tensors[name].clone().view(torch.uint8).reshape(-1)
        left = next(i for i in range(raw.numel() - 1) if raw[i] != raw[i + 1])
        raw[[left, left + 1]] = raw[[left + 1, left]]
        shape, dtype = tensors[name].shape, tensors[name].dtype
        return tensors | {name: raw.view(dtype).reshape(shape)}

    def _swaps_tensors(self, tensors):
        alike: dict[Any, str] = {}
        for name, tensor in tensors.items():
            other = alike.setdefault((tensor.shape, tensor.dtype), name)
            if other != name and not tensor.equal(tensors[other]):
                return tensors | {name: tensors[other], other: tensor}
        raise AssertionError("no two tensors of one shape")

    def _forgets_one(self, tensors):
        return dict(list(tensors.items())[1:])

    def _adds_one(self, tensors):
        return tensors | {"another": next(iter(tensors.values()))}

    def _wrong_dtype(self, tensors):
        import torch

        name = max(tensors, key=lambda one: tensors[one].nbytes)
        return tensors | {name: tensors[name].view(torch.int16)}

    def _borrows(self, tensors):
        """Give tensors over memory that is overwritten when the loader's object is collected."""
        import torch

        class Buffer:
            def __init__(self, tensor):
                self.tensor, self.myself = tensor, self  # a cycle: only the collector ends it

            def __del__(self):
                self.tensor.zero_()

        given = {name: tensor.clone() for name, tensor in tensors.items()}
        Buffer(next(one.view(torch.uint8) for one in given.values() if one.nbytes > 64))
        return given

    def _raises(self, tensors):
        raise ValueError(f"no good in {Path(__file__).parent}/deep/file.bin")

    def _dies(self, tensors):
        os.abort()

    def _hangs(self, tensors):
        time.sleep(600)

    def _chatters(self, tensors):
        print("a line that is no answer", flush=True)
        os.write(1, b"another\n")
        return tensors


_NAMES = (
    "swaps-bytes", "swaps-tensors", "forgets-one", "adds-one", "wrong-dtype", "borrows", "raises",
    "dies", "hangs", "chatters",
)  # fmt: skip

LOADERS = (
    StandIn("stock-mmap", family="stock"),
    StandIn("again", family="stock"),
    *map(StandIn, _NAMES),
    StandIn("not-installed", absent="nowhere to be found: pip install nowhere"),
    StandIn("gpu-only", devices=("cuda",)),
    StandIn("beside", environment="other==1.0"),
)


def prepare(wheels, progress):
    return {"other==1.0": "pip could not install other==1.0: no network"}
