"""cattensors: wraps safetensors, and reads each file into the page cache before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from .base import First, Loader, Tensors, one_by_one


@dataclass(frozen=True)
class Cattensors(Loader):
    """`safetensors.torch.load_file` after `cattensors.patch()`."""

    def warm_imports(self, device: str) -> None:
        import cattensors
        import safetensors.torch

        cattensors.patch()
        if not safetensors.torch.load_file.__module__.startswith("cattensors"):
            raise RuntimeError("cattensors.patch() replaced nothing: this would time stock")

    def load(self, files: list[str], device: str, first: First) -> Tensors:
        from safetensors.torch import load_file

        return one_by_one(lambda file: load_file(file, device=device), files, device, first)


LOADERS: tuple[Loader, ...] = (
    Cattensors(
        name="cattensors",
        family="cattensors",
        devices=("cpu", "cuda"),
        package="cattensors",
        environment="cattensors==0.2.0",
        lacks=("F8_E4M3FNUZ", "F8_E5M2FNUZ"),  # of safetensors 0.7.0
        note="safetensors 0.7.0's load_file after cattensors.patch(), 8 threads, as it comes",
    ),
)
