"""The process that is timed: `python -m fastst_patch.bench.child`, one JSON job on stdin.

A load waits at a gate when all is imported: it says "ready", and goes on at the next line.

Everything that is not loading happens before the clock starts (imports, patching, the
CUDA context) or after it stopped (digests, memory). Nothing here reads a file's bytes
before that, or the cache state under test would be gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import importlib
import json
import signal
import sys
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
from .job import READY, LoadJob, Sample
from .memory import device_memory, process_memory

H2D_BYTES = 256 << 20
_H2D_REPEATS = 8
_PR_SET_PDEATHSIG = 1
_REPLACED = "{} is already replaced as Python starts (a sitecustomize?): there is no stock to time"

Tensors = dict[str, torch.Tensor]


def main() -> int:
    """Do the job on stdin and print the answer as one line of JSON."""
    end_with_parent()
    message = json.loads(sys.stdin.readline())
    try:
        answer = _KINDS[message.pop("kind")](message)
    except (safetensors.SafetensorError, OSError, MemoryError) as error:
        # What a file or the machine can cause is one line; a bug of ours keeps its traceback.
        raise SystemExit(f"{type(error).__name__}: {error}") from None
    print(json.dumps(answer), flush=True)
    return 0


def end_with_parent() -> None:
    """Have the kernel kill this process when the bench is gone, however that ended."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


# ---- a timed load -------------------------------------------------------


def _load(message: dict[str, Any]) -> dict[str, Any]:
    message["paths"] = tuple(message["paths"])
    message["orders"] = tuple(tuple(order) for order in message["orders"])
    return asdict(run(LoadJob(**message)))


def run(job: LoadJob) -> Sample:
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
    print(READY, flush=True)
    sys.stdin.readline()  # now there is memory
    settle.forget_peak()
    gc.collect()
    gc.freeze()  # the patched process imported more: neither shall pay for traversing that
    memory_before = process_memory() | device_memory(job.device)
    resident = residency.resident_fraction(job.paths)[0]

    with reports_of(job.loader) as reports:
        begin = time.perf_counter()
        loaded = [_load_file(path, job.device) for path in job.paths]
        synchronize(job.device)
        ready = time.perf_counter()
        touching = job.touch and _on_cpu(job.device)
        checksums = _touch(loaded, job.orders) if touching else None
        end = time.perf_counter() if touching else ready

    memory = process_memory() | device_memory(job.device)
    if not _on_cpu(job.device):
        parts["pinning"] = engine.counters()["pinned_nanoseconds"] / 1e9
    # A device's bytes are read now, after the clock: each once, in file order, as on the CPU.
    checksums = checksums or _touch(loaded, job.orders)
    tensors = [tensor for file in loaded for tensor in file.values()]
    return Sample(
        load_s=ready - begin,
        touch_s=end - ready,
        digests=tuple(map(_digest, loaded, job.orders, checksums)),
        tensors=len(tensors),
        bytes=sum(tensor.nbytes for tensor in tensors),
        path=_path_taken(job.loader, reports),
        fallbacks=tuple(sorted({r.fallback_reason for r in reports if r.fallback_reason})),
        resident_before=resident,
        memory=memory,
        memory_before=memory_before,
        versions={"torch": torch.__version__, "safetensors": safetensors.__version__},
        device_name=_device_name(job.device),
        parts=parts,
    )


def _load_file(path: str, device: str) -> Tensors:
    # Looked up at every call, as programs do that say safetensors.torch.load_file.
    return safetensors.torch.load_file(path, device=device)


def _touch(loaded: Sequence[Tensors], orders: Sequence[Sequence[str]]) -> list[list[int]]:
    """Read every byte in file order. A tensor that is missing shows in the digest."""
    sums: list[list[int]] = []
    for tensors, order in zip(loaded, orders, strict=True):
        sums.append([])
        for name in order:
            tensor = tensors.get(name)
            if tensor is not None:
                here = tensor.cpu()  # itself, unless it is on another device
                sums[-1].append(engine.touch(here.data_ptr(), here.nbytes))
    return sums


def _digest(tensors: Tensors, order: Sequence[str], checksums: Sequence[int]) -> str:
    """Hash what a caller can see: order of keys, names, dtypes, shapes, strides, bytes."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(list(tensors)).encode())
    present = [name for name in order if name in tensors]
    for name, checksum in zip(present, checksums, strict=True):
        tensor = tensors[name]
        seen = (name, str(tensor.dtype), list(tensor.shape), list(tensor.stride()), checksum)
        digest.update(json.dumps(seen).encode())
    return digest.hexdigest()


# ---- stock or patched ---------------------------------------------------


def patch_with(options: Mapping[str, object]) -> None:
    """Patch, as a program would."""
    importlib.import_module("fastst_patch").patch(**options)


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
    """Create the context, which costs a program its first second whatever it loads."""
    if _on_cpu(job.device):
        return {}
    begin = time.perf_counter()
    torch.empty(1, device=job.device)
    synchronize(job.device)
    parts = {"context": time.perf_counter() - begin}
    if job.split and job.loader == "patched":
        found = find_device(job.device)
        begin = time.perf_counter()
        if found is not None:
            found.native()
        parts["engine"] = time.perf_counter() - begin
    return parts


def synchronize(device: str) -> None:
    """Wait until everything asked of the device is done; nothing to wait for on the CPU."""
    if not _on_cpu(device):
        torch.cuda.synchronize(device)


def _device_name(device: str) -> str:
    return "cpu" if _on_cpu(device) else torch.cuda.get_device_name(device)


# ---- other jobs ---------------------------------------------------------


def _cuda(message: dict[str, Any]) -> dict[str, Any]:
    """Tell whether torch can use a device: asked here, so that the runner needs no torch."""
    try:
        name = torch.cuda.get_device_name(torch.device(message["device"]))
    except (RuntimeError, AssertionError, ValueError) as error:
        return {"usable": False, "reason": str(error).splitlines()[0]}
    return {"usable": True, "name": name}


def _h2d(message: dict[str, Any]) -> dict[str, Any]:
    """Time pinned host-to-device copies of one reused buffer: what the bus gives."""
    source = torch.empty(H2D_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(H2D_BYTES, dtype=torch.uint8, device=message["device"])
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize(message["device"])
    begin = time.perf_counter()
    for _ in range(_H2D_REPEATS):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize(message["device"])
    return {"bytes": H2D_BYTES * _H2D_REPEATS, "seconds": time.perf_counter() - begin}


_KINDS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "load": _load,
    "cuda": _cuda,
    "h2d": _h2d,
}

if __name__ == "__main__":
    sys.exit(main())
