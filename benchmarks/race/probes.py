"""What a process measures of itself, and what it is asked about the machine."""

from __future__ import annotations

import contextlib
import os
import re
import resource
from pathlib import Path
from typing import Any

# ---- of itself ----------------------------------------------------------


def held(device: str) -> dict[str, int]:
    """Memory held now; the peak is that since settle.forget_peak."""
    from fastst_patch.bench import device_use

    found = device_use.process_memory() | device_use.device_memory(device)
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


# ---- of the machine -----------------------------------------------------


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
