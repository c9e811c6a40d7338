"""The timed process: one job in, one answer out, and a gate between getting ready and the clock.

It is started by `process.begin`. torch is not imported before the loader, so that an import's time
is the loader's own; in a copy torch is there already, and no import is timed.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastst_patch.bench.process import serve

WaitAtGate = Callable[..., None]  # of process.serve

MAX_DIFFERENCES = 3  # told; the rest is counted


@dataclass(frozen=True)
class Job:
    """One timed load."""

    loader: str
    module: str  # that holds LOADERS
    folder: str | None  # put on sys.path for it
    device: str
    files: tuple[str, ...]
    read: tuple[str, ...]  # the files whose bytes the loader reads; most often the same
    truth: str  # file with the expected tensors


def main() -> None:
    """Do the job on stdin, and end."""
    serve(act)
    # What a library does at exit is not timed, and taking torch down took 0.2 s of a core.
    os._exit(0)


def act(message: dict[str, Any], gate: WaitAtGate) -> Mapping[str, Any]:
    """Do one of the jobs."""
    kind = message.pop("kind")
    if kind == "load":
        message |= {key: tuple(message[key]) for key in ("files", "read")}
        return load(Job(**message), gate)
    from benchmarks import ceilings, gpu_ceilings

    kinds: dict[str, Callable[..., dict[str, Any]]] = {
        "make": make,
        "memory": ceilings.memory_speeds,
        "copies": gpu_ceilings.copies,
        "sections": gpu_ceilings.sections,
        "device": gpu_ceilings.facts,
    }
    return kinds[kind](**message)


def make(module: str, folder: str | None, loader: str, files: list[str]) -> dict[str, Any]:
    """Let a loader write what it reads instead of the files, if it has to."""
    from . import entrants

    entrants.find(entrants.Source(module, folder), loader).make(files)
    return {}


def touched(tensors: dict[str, Any], expected: list[Any]) -> dict[str, int]:
    """Read every byte in file order: the checksum of each tensor that is there."""
    from fastst_patch.bench.device_use import touch

    return {one.name: touch(tensors[one.name]) for one in expected if one.name in tensors}


def load(job: Job, gate: WaitAtGate) -> dict[str, Any]:
    """Import, open the device, wait at the gate, load under the clock, judge, tell.

    ``touch_s`` is reading every byte in file order, on one core, by the same native routine for
    all loaders; part of the race on the CPU, where a loader may have put reading off.
    """
    from . import entrants, truth

    expected = truth.read(job.truth)
    loader = entrants.find(entrants.Source(job.module, job.folder), job.loader)
    copied = "torch" in sys.modules
    begin = time.perf_counter()
    loader.warm_imports(job.device)
    import torch  # which some import only when they load: everybody's import time has it

    import_s = None if copied else time.perf_counter() - begin
    # What the harness itself needs, after the loader's imports and before its clock.
    from fastst_patch.bench import hardware, residency, settle
    from fastst_patch.bench.device_use import open_context, synchronize

    from . import probes

    gate(import_s=import_s, context_s=open_context(job.device))

    settle.forget_peak()
    gc.collect()
    gc.freeze()  # who imported more shall not pay for traversing it
    held_before = probes.held(job.device)
    done_before = probes.done()
    resident = residency.resident_fraction(job.read)[0]
    modules = set(sys.modules)
    first_at: list[float] = []

    def first() -> None:
        if not first_at:
            first_at.append(time.perf_counter())

    started = time.perf_counter()
    tensors = loader.load(list(job.files), job.device, first)
    synchronize(job.device)
    ready = time.perf_counter()
    on_cpu = job.device == "cpu"
    sums = touched(tensors, expected) if on_cpu else {}
    ended = time.perf_counter() if on_cpu else ready
    done_after = probes.done()
    held_after = probes.held(job.device)
    late = sorted({name.partition(".")[0] for name in set(sys.modules) - modules})

    gc.collect()  # what the loader left to the collector is gone: tensors must stand alone
    again = touched(tensors, expected)
    wrong = truth.differences(expected, tensors, again, job.device)
    if on_cpu and not wrong and sums != again:
        wrong = ["bytes changed after the load"]
    versions = {loader.package: hardware.version(loader.package or ""), "torch": torch.__version__}
    return {
        "first_s": (first_at[0] if first_at else ready) - started,
        "load_s": ready - started,
        "touch_s": ended - ready,
        "tensors": len(tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "wrong": wrong[:MAX_DIFFERENCES],
        "wrong_count": len(wrong),
        "resident_before": resident,
        "before": held_before,
        "after": held_after,
        "done": {key: done_after[key] - done_before[key] for key in done_after},
        "late_imports": late,  # top-level names of what was imported under the clock
        "path": probes.our_path(loader.family),
        "versions": versions,
    }
