"""What a process and its device hold, as the kernel and the driver tell. torch comes late here."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from fastst_patch import engine

_WANTED = {
    "VmHWM": "peak_rss",
    "Rss": "rss",
    "Pss": "pss",
    "Pss_Anon": "pss_anonymous",
    "Pss_File": "pss_file",
    "RssAnon": "rss_anonymous",
    "RssFile": "rss_file",
}


def process_memory() -> dict[str, int]:
    """Read the peak from VmHWM: getrusage remembers the parent of before exec."""
    found = {}
    for source in ("/proc/self/status", "/proc/self/smaps_rollup"):
        with contextlib.suppress(OSError):
            for line in Path(source).read_text(encoding="ascii").splitlines():
                match = re.match(r"(\w+):\s+(\d+) kB$", line)
                if match and match[1] in _WANTED:
                    found[_WANTED[match[1]]] = int(match[2]) * 1024
    return found


def device_memory(device: str) -> dict[str, int]:
    """What the driver and torch's allocator say of the device, and what is pinned for copies."""
    if device == "cpu":
        return {}
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return {
        "device_used": total - free,
        "device_allocated": torch.cuda.memory_allocated(device),
        "device_reserved_peak": torch.cuda.max_memory_reserved(device),
        "pinned": engine.counters()["pinned_bytes"],
    }
