"""The process that is timed: `python -m fastst_patch.bench.child`, one JSON job on stdin.

Everything that is not loading happens before the clock starts (imports, patching, the
CUDA context) or after it stopped (digests, memory). Nothing here reads a file's bytes
before that, or the cache state under test would be gone.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import safetensors.torch
import torch

from fastst_patch import engine
from fastst_patch.device import find_device

from . import residency, settle
from .device_use import (
    device_memory,
    device_name,
    digest,
    open_context,
    process_memory,
    synchronize,
    touch,
)
from .job import LoadJob, Sample
from .process import end_with_parent, serve

H2D_BYTES = 2 << 30
H2D_SLOT = 128 << 20  # two of them
_REPLACED = "{} is already replaced as Python starts (a sitecustomize?): there is no stock to time"

Tensors = dict[str, torch.Tensor]
WaitAtGate = Callable[..., None]  # of process.serve


def act(message: dict[str, Any], gate: WaitAtGate) -> dict[str, Any]:
    """Do one of the jobs."""
    kind = message.pop("kind")
    try:
        return _load(message, gate) if kind == "load" else _KINDS[kind](message)
    except (safetensors.SafetensorError, OSError, MemoryError) as error:
        # What a file or the machine can cause is one line; a bug of ours keeps its traceback.
        raise SystemExit(f"{type(error).__name__}: {error}") from None


# ---- the clock ----------------------------------------------------------


class Clock:
    """A clock that starts behind the gate, and what was seen before it started and after it ended.

    Attributes:
        resident: fraction of the files in the page cache just before the start.
        memory_before, memory: bytes held then, and when the last lap was over.
        seconds: of each lap, by name.
        reports: the LoadReports made meanwhile; filled when the context ends.
    """

    def __init__(self, resident: float | None, memory: dict[str, int], reports: list[Any]) -> None:
        self.resident, self.memory_before, self.reports = resident, memory, reports
        self.memory: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Note the seconds since the start, or since the last lap."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Why stock did something."""
        return tuple(sorted({one.fallback_reason for one in self.reports if one.fallback_reason}))


@contextlib.contextmanager
def clock(loader: str, paths: Sequence[str], device: str, gate: WaitAtGate) -> Iterator[Clock]:
    """Wait at the gate, and hold a clock that starts when everything else is out of the way."""
    gate()
    settle.forget_peak()
    gc.collect()
    gc.freeze()  # the patched process imported more: neither shall pay for traversing that
    memory = process_memory() | device_memory(device)
    resident = residency.resident_fraction(paths)[0]
    with reports_of(loader) as reports:
        started = Clock(resident, memory, reports)
        yield started
    started.memory = process_memory() | device_memory(device)


# ---- a timed load -------------------------------------------------------


def _load(message: dict[str, Any], gate: WaitAtGate) -> dict[str, Any]:
    message["paths"] = tuple(message["paths"])
    message["orders"] = tuple(tuple(order) for order in message["orders"])
    return asdict(run(LoadJob(**message), gate))


def run(job: LoadJob, gate: WaitAtGate) -> Sample:
    """Time one load, and then collect what describes it.

    The sample's parts, of loads to a device: ``context`` (torch's, before the clock), ``engine``
    (library, streams; before the clock if the job is split, else not given and in the load) and
    ``pinning`` (within the load, by all workers together).
    """
    if job.loader == "patched":
        patch_with(job.options)
    else:
        require_stock()
    parts = _open_device(job)
    checksums = None
    with clock(job.loader, job.paths, job.device, gate) as timed:
        loaded = [_load_file(path, job.device) for path in job.paths]
        synchronize(job.device)
        timed.lap("load")
        if job.touch and _on_cpu(job.device):
            checksums = _touch(loaded, job.orders)
            timed.lap("touch")
    if not _on_cpu(job.device):
        parts["pinning"] = engine.counters()["pinned_nanoseconds"] / 1e9
    # A device's bytes are read now, after the clock: each once, in file order, as on the CPU.
    checksums = checksums or _touch(loaded, job.orders)
    tensors = [tensor for file in loaded for tensor in file.values()]
    return Sample(
        load_s=timed.seconds["load"],
        touch_s=timed.seconds.get("touch", 0.0),
        digests=tuple(map(digest, loaded, checksums)),
        tensors=len(tensors),
        bytes=sum(tensor.nbytes for tensor in tensors),
        path=_path_taken(job.loader, timed.reports),
        fallbacks=timed.fallbacks,
        resident_before=timed.resident,
        memory=timed.memory,
        memory_before=timed.memory_before,
        versions={"torch": torch.__version__, "safetensors": safetensors.__version__},
        device_name=device_name(job.device),
        parts=parts,
    )


def _load_file(path: str, device: str) -> Tensors:
    # Looked up at every call, as programs do that say safetensors.torch.load_file.
    return safetensors.torch.load_file(path, device=device)


def _touch(loaded: Sequence[Tensors], orders: Sequence[Sequence[str]]) -> list[dict[str, int]]:
    """Read every byte in file order. A tensor that is missing shows in the digest."""
    return [
        {name: touch(tensors[name]) for name in order if name in tensors}
        for tensors, order in zip(loaded, orders, strict=True)
    ]


# ---- stock or patched ---------------------------------------------------


def patch_with(options: Mapping[str, object]) -> None:
    """Patch, as a program would."""
    importlib.import_module("fastst_patch").patch(**options)
    import_what_loads_import()


def import_what_loads_import() -> None:
    """Import what our first load would: no loader's imports are timed.

    `benchmarks/start.py` measures what they take.
    """
    importlib.import_module("fastst_patch.dropin.handle")
    _ = importlib.import_module("fastst_patch.engine").Job


def require_stock() -> None:
    """Refuse to race ourselves, if FASTST_ENABLED or a sitecustomize has patched already."""
    for module in (safetensors, safetensors.torch):
        if type(module.safe_open) is not type:
            raise SystemExit(_REPLACED.format(f"{module.__name__}.safe_open"))
    if type(safetensors.torch.load_file) is not types.FunctionType:
        raise SystemExit(_REPLACED.format("safetensors.torch.load_file"))


@contextlib.contextmanager
def reports_of(loader: str) -> Iterator[list[Any]]:
    """Collect the LoadReports made inside; the list is filled when the context ends."""
    collected: list[Any] = []
    if loader != "patched":
        yield collected
        return
    with importlib.import_module("fastst_patch").profile() as profile:
        yield collected
    collected.extend(profile.reports)


def _path_taken(loader: str, reports: Sequence[Any]) -> str:
    if loader != "patched":
        return "stock"
    if not reports:
        raise SystemExit("no load went through fastst_patch: patch() had no effect here")
    return ", ".join(dict.fromkeys(str(report.path) for report in reports))


# ---- device -------------------------------------------------------------


def _on_cpu(device: str) -> bool:
    return device == "cpu"


def _open_device(job: LoadJob) -> dict[str, float]:
    if _on_cpu(job.device):
        return {}
    parts = {"context": open_context(job.device)}
    if job.split and job.loader == "patched":
        found = find_device(job.device)
        begin = time.perf_counter()
        if found is not None:
            found.native()
        parts["engine"] = time.perf_counter() - begin
    return parts


# ---- other jobs ---------------------------------------------------------


def _cuda(message: dict[str, Any]) -> dict[str, Any]:
    """Tell whether torch can use a device: asked here, so that the runner needs no torch."""
    try:
        name = torch.cuda.get_device_name(torch.device(message["device"]))
    except (RuntimeError, AssertionError, ValueError) as error:
        return {"usable": False, "reason": str(error).splitlines()[0]}
    return {"usable": True, "name": name}


def _h2d(message: dict[str, Any]) -> dict[str, Any]:
    """Time pinned host-to-device copies of reused buffers: what the bus gives."""
    from .copies import copy_to

    copied, seconds = copy_to(
        message["device"], H2D_BYTES, 1, pinned=True, slot=H2D_SLOT, streams=1
    )
    return {"bytes": copied, "seconds": seconds}


_KINDS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "cuda": _cuda,
    "h2d": _h2d,
}

if __name__ == "__main__":
    end_with_parent()
    serve(act)
