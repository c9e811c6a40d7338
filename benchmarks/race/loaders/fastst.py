"""Ours: patched as a program would be, by our own function, and with each `io`."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from .base import First, Loader, Tensors, collected, one_by_one


def _import_what_loads_import() -> None:
    from fastst_patch.bench.child import import_what_loads_import

    import_what_loads_import()


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
        _import_what_loads_import()

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

        _import_what_loads_import()

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


_OURS = {"family": "fastst", "package": "fastst-patch"}
LOADERS: tuple[Loader, ...] = (
    Patched("fastst", note="patch(), then safetensors.torch.load_file", **_OURS),
    Explicit("fastst-explicit", note="fastst_patch.load_file, nothing patched", **_OURS),
    Parallel("fastst-parallel", note="fastst_patch.ParallelLoader", **_OURS),
    Patched(
        "fastst-mmap",
        note='io="mmap": no reading ahead of ours',
        io="mmap",
        devices=("cpu",),
        elsewhere='to a device io="mmap" is stock',
        **_OURS,
    ),
    Patched("fastst-buffered", note='io="buffered"', io="buffered", **_OURS),
    Patched("fastst-direct", note='io="direct"', io="direct", **_OURS),
    Patched(
        "fastst-gds",
        note='io="gds": cuFile',
        io="gds",
        devices=("cuda",),
        elsewhere='on the CPU io="gds" is the default',
        **_OURS,
    ),
)
