"""Ours: patched as a program would be, by our own function, and with each `io`."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from .base import First, Loader, Tensors, collected, one_by_one


@dataclass(frozen=True)
class Patched(Loader):
    """`fastst_patch.patch()`, then stock's name."""

    io: str = "auto"

    def warm_imports(self, device: str) -> None:
        import safetensors.torch  # noqa: F401

        import fastst_patch

        fastst_patch.patch(io=self.io)
        if not fastst_patch.is_patched("safetensors.torch.load_file"):
            raise RuntimeError("patch() replaced nothing: this would time stock")

    def load(self, files: list[str], device: str, first: First) -> Tensors:
        import safetensors.torch

        return one_by_one(
            lambda file: safetensors.torch.load_file(file, device=device), files, device, first
        )


@dataclass(frozen=True)
class Explicit(Loader):
    """`fastst_patch.load_file`, nothing patched."""

    def warm_imports(self, device: str) -> None:
        import safetensors.torch  # noqa: F401

        import fastst_patch  # noqa: F401

    def load(self, files: list[str], device: str, first: First) -> Tensors:
        import fastst_patch

        return one_by_one(
            lambda file: fastst_patch.load_file(file, device=device), files, device, first
        )


@dataclass(frozen=True)
class Parallel(Loader):
    """`fastst_patch.ParallelLoader`, one walk over all files."""

    def warm_imports(self, device: str) -> None:
        import safetensors.torch  # noqa: F401

        from fastst_patch import ParallelLoader  # noqa: F401

    def load(self, files: list[str], device: str, first: First) -> Tensors:
        from fastst_patch import ParallelLoader

        with contextlib.closing(ParallelLoader(None, files, device=device)) as loader:
            return collected(loader.iterate_weights(), device, first)


def _patched(name: str, note: str, io: str = "auto", **options: object) -> Patched:
    settings = {"devices": ("cpu", "cuda"), "package": "fastst-patch", **options}
    return Patched(name=name, family="fastst", note=note, io=io, **settings)


LOADERS: tuple[Loader, ...] = (
    _patched("fastst", "patch(), then safetensors.torch.load_file"),
    Explicit(
        name="fastst-explicit",
        family="fastst",
        devices=("cpu", "cuda"),
        package="fastst-patch",
        note="fastst_patch.load_file, nothing patched",
    ),
    Parallel(
        name="fastst-parallel",
        family="fastst",
        devices=("cpu", "cuda"),
        package="fastst-patch",
        note="fastst_patch.ParallelLoader",
    ),
    _patched(
        "fastst-mmap",
        'io="mmap": no reading ahead of ours',
        "mmap",
        devices=("cpu",),
        elsewhere='to a device io="mmap" is stock',
    ),
    _patched("fastst-buffered", 'io="buffered"', "buffered"),
    _patched("fastst-direct", 'io="direct"', "direct"),
    _patched(
        "fastst-gds",
        'io="gds": cuFile',
        "gds",
        devices=("cuda",),
        elsewhere='on the CPU io="gds" is the default',
    ),
)
