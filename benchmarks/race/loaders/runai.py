"""run:ai model streamer: asynchronous reads into a ring of host buffers."""

from __future__ import annotations

from dataclasses import dataclass

from .base import First, Loader, Tensors, collected, setting


@dataclass(frozen=True)
class RunAI(Loader):
    """`SafetensorsStreamer`; on the CPU it hands its buffers over, so nothing is cloned."""

    strategy: str = ""

    def warm_imports(self, device: str) -> None:
        setting("RUNAI_STREAMER_FS_STRATEGY", self.strategy or None)
        import runai_model_streamer  # noqa: F401

    def load(self, files: list[str], device: str, first: First) -> Tensors:
        from runai_model_streamer import SafetensorsStreamer

        with SafetensorsStreamer() as streamer:
            streamer.stream_files(files, device=device)
            return collected(streamer.get_tensors(), device, first)


def _entrant(name: str, note: str, strategy: str = "") -> RunAI:
    return RunAI(
        name=name,
        family="runai",
        package="runai-model-streamer",
        least="0.17.0",  # whose tensors are the caller's
        lacks=("F8_E4M3FNUZ", "F8_E5M2FNUZ"),
        note=note,
        strategy=strategy,
    )


LOADERS: tuple[Loader, ...] = (
    _entrant("runai", "as it comes: io_uring with O_DIRECT where the host has it, else libaio"),
    _entrant(
        "runai-buffered",
        "RUNAI_STREAMER_FS_STRATEGY=io_uring_buffered,sync_buffered",
        "io_uring_buffered,sync_buffered",
    ),
)
