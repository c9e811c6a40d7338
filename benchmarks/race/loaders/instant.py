"""InstantTensor: O_DIRECT by io_uring or libaio into a pinned ring, then to the GPU."""

from __future__ import annotations

from dataclasses import dataclass

from .base import First, Loader, Tensors, collected, setting


@dataclass(frozen=True)
class InstantTensor(Loader):
    """`instanttensor.safe_open(files).tensors()`; what it yields owns its memory."""

    backend: str = ""

    def warm_imports(self, device: str) -> None:
        setting("INSTANTTENSOR_BACKEND", self.backend or None)
        import instanttensor  # noqa: F401

    def load(self, files: list[str], device: str, first: First) -> Tensors:
        from instanttensor import safe_open

        index = int(device.partition(":")[2] or 0)
        with safe_open(files, framework="pt", device=index) as handle:
            return collected(handle.tensors(), device, first)


def _entrant(name: str, note: str, backend: str = "") -> InstantTensor:
    return InstantTensor(
        name=name,
        family="instanttensor",
        devices=("cuda",),
        package="instanttensor",
        least="0.2.2",
        elsewhere="it loads to CUDA devices only (ValueError on the CPU)",
        note=note,
        backend=backend,
    )


LOADERS: tuple[Loader, ...] = (
    _entrant("instanttensor", "as it comes: O_DIRECT by io_uring, else libaio"),
    _entrant("instanttensor-buffered", "INSTANTTENSOR_BACKEND=BUFFERED", "BUFFERED"),
)
