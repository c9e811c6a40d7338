"""fastsafetensors: as it comes, as its documentation tunes it, and as vLLM calls it.

Since 0.5 a tensor of the low-level loader shares the ownership of its file's one allocation, and
so stays valid when the loader is closed; nothing need be cloned. `borrowed` tensors do not, and are
cloned here before the close, as every consumer has to that keeps them. `ParallelLoader` clones by
itself.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass

from .base import First, Loader, Tensors, collected, setting


@dataclass(frozen=True)
class FastSafetensors(Loader):
    """The low-level loader: one allocation per file, filled by threads that pread."""

    odirect: bool = True
    tuned: bool = False
    borrowed: bool = False

    def warm_imports(self, device: str) -> None:
        setting("FASTSAFETENSORS_ODIRECT", None if self.odirect else "0")
        setting("FASTSAFETENSORS_ENABLE_GIL_RELEASE", "1" if self.tuned else None)
        warnings.filterwarnings("ignore", message="GDS device node")
        from fastsafetensors.frameworks import get_framework_op

        get_framework_op("pytorch")  # imports torch, which it would else do in the load

    def load(self, files: list[str], device: str, first: First) -> Tensors:
        from fastsafetensors import SafeTensorsFileLoader

        loader = SafeTensorsFileLoader(None, _indexed(device), **self._options())
        with contextlib.closing(loader):
            loader.add_filenames({0: files})
            buffers = loader.copy_files_to_device(borrowed_tensors=self.borrowed)
            with contextlib.closing(buffers):
                take = buffers.get_tensor
                if self.borrowed:
                    pairs = ((name, take(name).clone()) for name in loader.get_keys())
                else:
                    pairs = ((name, take(name)) for name in loader.get_keys())
                return collected(pairs, device, first)

    def _options(self) -> dict[str, object]:
        # docs/overview.md: "8 workers and bbuf_size_kb=256*1024 provide sixteen 16 MiB slots".
        return {"bbuf_size_kb": 256 << 10, "max_threads": 8, "nogds": True} if self.tuned else {}


@dataclass(frozen=True)
class Parallel(FastSafetensors):
    """`ParallelLoader`, which vLLM and SGLang use: the next file is read while this is handed out.

    Its tensors are clones, so the load holds the bytes twice.
    """

    def load(self, files: list[str], device: str, first: First) -> Tensors:
        from fastsafetensors import ParallelLoader

        loader = ParallelLoader(
            None, files, device=_indexed(device), use_tqdm_on_load=False, **self._options()
        )
        with contextlib.closing(loader):
            with contextlib.closing(loader.iterate_weights()) as weights:
                return collected(weights, device, first)


def _indexed(device: str) -> str:
    return "cuda:0" if device == "cuda" else device


def _entrant(name: str, note: str, kind: type = FastSafetensors, **options: bool) -> Loader:
    return kind(
        name=name,
        family="fastsafetensors",
        package="fastsafetensors",
        least="0.5.0",
        lacks=("C64", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
        note=note,
        **options,
    )


LOADERS: tuple[Loader, ...] = (
    _entrant("fastsafetensors", "as it comes: O_DIRECT, 16 threads, 512 KiB blocks, GDS if there"),
    _entrant("fastsafetensors-buffered", "as it comes, FASTSAFETENSORS_ODIRECT=0", odirect=False),
    _entrant(
        "fastsafetensors-tuned",
        "8 threads, sixteen slots of 16 MiB (its overview.md), GIL released, no GDS",
        tuned=True,
    ),
    _entrant(
        "fastsafetensors-tuned-buffered",
        "tuned, FASTSAFETENSORS_ODIRECT=0",
        tuned=True,
        odirect=False,
    ),
    _entrant(
        "fastsafetensors-borrowed",
        "tuned, borrowed_tensors=True, each cloned before the close",
        tuned=True,
        borrowed=True,
    ),
    _entrant(
        "fastsafetensors-parallel",
        "ParallelLoader as vLLM calls it, tuned; it clones each tensor",
        Parallel,
        tuned=True,
    ),
)
