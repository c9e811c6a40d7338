"""What a process measures of itself, and what it is asked about the machine."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

MIB = 1 << 20
COPY_BLOCK = 64 * MIB
COPY_ROUNDS = 4

# ---- of itself ----------------------------------------------------------


def held(device: str) -> dict[str, int]:
    """Memory held now; the peak is that since settle.forget_peak."""
    from fastst_patch.bench import memory

    found = memory.process_memory() | memory.device_memory(device)
    if device != "cpu":
        engines = found.pop("pinned", 0)
        found["pinned"] = max(engines, _pinned_by_torch(), _mapped_by_driver())
    return found


def _pinned_by_torch() -> int:
    import torch

    with contextlib.suppress(AttributeError, RuntimeError, KeyError):
        return int(torch.cuda.host_memory_stats()["allocated_bytes.current"])
    return 0


def _mapped_by_driver() -> int:
    """Size of what the NVIDIA driver has mapped here: cudaHostAlloc's memory is among it.

    Its pages count in no RSS. What was pinned by cudaHostRegister is ordinary memory, and is not
    seen by this.
    """
    total = 0
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith("/dev/nvidia"):
                begin, end = (int(one, 16) for one in fields[0].split("-"))
                total += end - begin
    return total


def done() -> dict[str, float]:
    """What this process has used up so far: CPU time, faults, and bytes by the kernel's count.

    ``storage_bytes`` is what was really fetched from a disk for it, also by its page faults.
    """
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found: dict[str, float] = {
        "user_s": usage.ru_utime,
        "system_s": usage.ru_stime,
        "minor_faults": usage.ru_minflt,
        "major_faults": usage.ru_majflt,
    }
    names = {"rchar": "read_bytes", "syscr": "read_calls", "read_bytes": "storage_bytes"}
    with contextlib.suppress(OSError):  # some containers forbid it
        for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(": ")
            if name in names:
                found[names[name]] = int(value)
    return found


def our_path(family: str) -> dict[str, Any] | None:
    """What fastst-patch says it did; None of everybody else. Stock under our name is no result."""
    if family != "fastst":
        return None
    import fastst_patch

    totals = fastst_patch.stats()
    carried = {name: one["bytes"] for name, one in totals["paths"].items()}
    return {"bytes": carried, "fallbacks": totals["fallbacks"]}


def versions(package: str | None) -> dict[str, str]:
    """The version that this very process sees of a distribution."""
    if package is None:
        return {}
    try:
        return {package: metadata.version(package)}
    except metadata.PackageNotFoundError:
        return {}


# ---- of the machine -----------------------------------------------------


def memory_speeds(threads: list[int]) -> dict[str, Any]:
    """GB/s of memcpy by so many threads, and of the routine that touches bytes, on one core."""
    from fastst_patch import engine

    blocks = []
    for _ in range(2 * max(threads)):
        block = ctypes.create_string_buffer(COPY_BLOCK)
        ctypes.memset(block, 1, COPY_BLOCK)
        blocks.append(block)
    engine.touch(ctypes.addressof(blocks[0]), COPY_BLOCK)
    begin = time.perf_counter()
    for _ in range(COPY_ROUNDS):
        for block in blocks[:2]:
            engine.touch(ctypes.addressof(block), COPY_BLOCK)
    touched = 2 * COPY_ROUNDS * COPY_BLOCK / (time.perf_counter() - begin) / 1e9
    return {"touch": touched, "copy": {str(count): _copies(blocks, count) for count in threads}}


def _copies(blocks: list[Any], count: int) -> float:
    def work(number: int) -> None:
        for _ in range(COPY_ROUNDS):  # ctypes lets go of the GIL
            ctypes.memmove(blocks[2 * number], blocks[2 * number + 1], COPY_BLOCK)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    begin = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return count * COPY_ROUNDS * COPY_BLOCK / (time.perf_counter() - begin) / 1e9


def device_copies(total: int) -> dict[str, Any]:
    """GB/s of copies to the device from pinned and from ordinary memory, by stream count."""
    from benchmarks import gpu_ceilings

    gpu = gpu_ceilings.Gpu(0)
    pinned = gpu_ceilings.pinned_copies(gpu, total, 1)
    pageable = gpu_ceilings.pageable_copies(gpu, total // 2, 1)
    return {
        "pinned": {_of_slot(one, "streams"): one["gb_per_s"] for one in pinned},
        "pageable": {_of_slot(one, "threads"): one["gb_per_s"] for one in pageable},
    }


def _of_slot(one: dict[str, Any], count: str) -> str:
    return f"{one[count]} x {one['slot'] // MIB} MiB"


def device_facts() -> dict[str, Any]:
    """Whether torch can use a CUDA device, and which it is."""
    import torch

    if not torch.cuda.is_available():
        built = "built without CUDA" if torch.version.cuda is None else "sees no usable device"
        return {"gpu": None, "reason": f"torch {torch.__version__} {built}"}
    from benchmarks import gpu_ceilings

    facts = gpu_ceilings.Gpu(0).facts()
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    return facts | {"uuid": None if uuid is None else f"GPU-{uuid}",
                    "device_free": torch.cuda.mem_get_info(0)[0]}  # fmt: skip


KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    "memory": memory_speeds,
    "copies": device_copies,
    "device": device_facts,
}


def host_facts() -> dict[str, Any]:
    """Facts beside fastst_patch.bench.hardware's that decide what a load time means."""
    facts: dict[str, Any] = {"glibc": os.confstr("CS_GNU_LIBC_VERSION")}
    for name, path in {
        "transparent_hugepage": "/sys/kernel/mm/transparent_hugepage/enabled",
        "swappiness": "/proc/sys/vm/swappiness",
        "io_uring_disabled": "/proc/sys/kernel/io_uring_disabled",
    }.items():
        with contextlib.suppress(OSError):
            text = Path(path).read_text(encoding="ascii").strip()
            chosen = re.search(r"\[(\w+)\]", text)
            facts[name] = chosen[1] if chosen else text
    facts["numa_nodes"] = len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or None
    return facts


def installed(packages: list[str]) -> dict[str, str | None]:
    """Versions of distributions in this environment."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found
