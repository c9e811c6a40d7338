"""safetensors-streaming: made for HTTP and S3, and loads local files, too."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from .base import First, Loader, Tensors, one_by_one


@dataclass(frozen=True)
class Streaming(Loader):
    """`safetensors_streaming.load_file`, its own; its `patch()` leaves local files to stock."""

    def missing(self, device: str) -> str | None:
        reason = super().missing(device)
        if reason is not None or not device.startswith("cuda"):
            return reason
        if importlib.util.find_spec("safetensors_streaming_cu12") is None:
            return "its CUDA build is not installed: pip install safetensors-streaming-cu12"
        return None

    def warm_imports(self, device: str) -> None:
        import safetensors_streaming  # noqa: F401
        import torch  # noqa: F401

    def load(self, files: list[str], device: str, first: First) -> Tensors:
        from safetensors_streaming import load_file

        return one_by_one(lambda file: load_file(file, device=device), files, device, first)


_LACKS = ("C64", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0", "U16", "U32", "U64")

LOADERS: tuple[Loader, ...] = (
    Streaming(
        name="safetensors-streaming",
        family="safetensors-streaming",
        package="safetensors-streaming",
        lacks=_LACKS,
        note="safetensors_streaming.load_file of a local path, as it comes",
    ),
)
