"""safetensors itself: the installed release, and the release candidate with `prefetch`."""

from __future__ import annotations

import contextlib
import types
from dataclasses import dataclass

from .base import First, Loader, Tensors, finish, one_by_one

CANDIDATE = "safetensors==0.9.0rc1"


@dataclass(frozen=True)
class Stock(Loader):
    """`safetensors.torch.load_file`, unpatched."""

    backend: str = "mmap"

    def warm_imports(self, device: str) -> None:
        import safetensors.torch

        if type(safetensors.torch.load_file) is not types.FunctionType:
            raise RuntimeError("safetensors.torch.load_file is replaced: this would not time stock")
        wanted = (self.environment or "").partition("==")[2]
        if wanted and safetensors.__version__.replace("-", "").replace("rc.", "rc") != wanted:
            raise RuntimeError(f"safetensors {safetensors.__version__} was imported, not {wanted}")

    def load(self, files: list[str], device: str, first: First) -> Tensors:
        from safetensors.torch import load_file

        # An old safetensors has no backends; its only one is what the others call mmap.
        options = {} if self.backend == "mmap" else {"backend": self.backend}
        return one_by_one(lambda file: load_file(file, device, **options), files, device, first)


@dataclass(frozen=True)
class Prefetch(Stock):
    """`safe_open(...).prefetch()`: reader threads, pinned slabs, tensors as their bytes land."""

    def load(self, files: list[str], device: str, first: First) -> Tensors:
        from safetensors import safe_open

        # The next file's readers start before this file's tensors are taken, so that the disk
        # never waits; all loaders of a process share one pinned pool.
        tensors: Tensors = {}
        with contextlib.ExitStack() as stack:
            loaders = []
            for number in range(len(files)):
                while len(loaders) < min(number + 2, len(files)):
                    handle = stack.enter_context(safe_open(files[len(loaders)], "pt", device))
                    loaders.append(stack.enter_context(handle.prefetch()))
                for name, tensor in loaders[number]:
                    if not tensors:
                        first()
                    tensors[name] = tensor
                loaders[number].close()
            finish(device)
        return tensors


_STOCK = {"family": "stock", "package": "safetensors"}
LOADERS: tuple[Loader, ...] = (
    Stock("stock-mmap", note="safetensors.torch.load_file, as it comes", **_STOCK),
    Stock(
        "stock-pread", note='load_file(backend="pread")', backend="pread", least="0.8.0", **_STOCK
    ),
    Stock("stock-0.9", note="load_file of the release candidate", environment=CANDIDATE, **_STOCK),
    Prefetch(
        "stock-0.9-prefetch",
        note="safe_open(...).prefetch(), 8 threads, the next file's started ahead",
        devices=("cuda",),
        elsewhere="prefetch loads to CUDA devices only (it raises SafetensorError on the CPU)",
        environment=CANDIDATE,
        **_STOCK,
    ),
)
