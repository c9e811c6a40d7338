"""The yardstick: `torch.load(mmap=True)` of the same tensors, saved as .pt files beside them."""

from __future__ import annotations

import contextlib
import importlib
import os
from dataclasses import dataclass
from pathlib import Path

from .base import First, Loader, Tensors, one_by_one


@dataclass(frozen=True)
class TorchLoad(Loader):
    """Reads FILE.pt for each FILE.safetensors; `make` writes them."""

    def reads(self, files: list[str]) -> list[str]:
        return [str(Path(file).with_suffix(".pt")) for file in files]

    def make(self, files: list[str]) -> None:
        import torch
        from safetensors.torch import load_file

        for file, saved in zip(files, self.reads(files), strict=True):
            if os.path.exists(saved):
                continue
            unfinished = f"{saved}.unfinished"
            torch.save(load_file(file), unfinished)  # over a map: needs no memory for the tensors
            with open(unfinished, "rb") as written:
                os.fsync(written.fileno())  # dirty pages cannot be evicted
            os.rename(unfinished, saved)

    def warm_imports(self, device: str) -> None:
        import torch  # noqa: F401

        with contextlib.suppress(ImportError):  # not in every torch; those with it import it late
            importlib.import_module("torch.utils.serialization.config")

    def load(self, files: list[str], device: str, first: First) -> Tensors:
        import torch

        return one_by_one(
            lambda file: torch.load(file, map_location=device, mmap=True, weights_only=True),
            self.reads(files),
            device,
            first,
        )


LOADERS: tuple[Loader, ...] = (
    TorchLoad(
        name="torch-load",
        family="torch",
        package="torch",
        note="torch.load(mmap=True, weights_only=True) of .pt files with the same tensors",
    ),
)
