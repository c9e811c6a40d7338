"""What a process and its device hold, and the few things asked of a device. torch comes late."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fastst_patch import engine

if TYPE_CHECKING:
    import torch

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


def read_bytes() -> int:
    """What this process has had read from storage; known also after it became another user."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_inblock * 512


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


def open_context(device: str) -> float:
    """Create the context, which costs a program its first second whatever it loads; seconds."""
    if device == "cpu":
        return 0.0
    import torch

    begin = time.perf_counter()
    torch.empty(1, device=device)
    synchronize(device)
    return time.perf_counter() - begin


def synchronize(device: str) -> None:
    """Wait until everything asked of the device is done; nothing to wait for on the CPU."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize(device)


def device_name(device: str) -> str:
    """Return what the driver calls a device."""
    if device == "cpu":
        return device
    import torch

    return str(torch.cuda.get_device_name(device))


def touch(tensor: torch.Tensor) -> int:
    """Read every byte once: a checksum that depends on their order."""
    here = tensor.cpu().contiguous()  # itself, of an ordinary CPU tensor
    return engine.touch(here.data_ptr(), here.nbytes)


def digest(tensors: Mapping[str, torch.Tensor], sums: Mapping[str, int]) -> str:
    """Hash what a program can see: order of names, dtypes, shapes, strides, devices, bytes.

    Args:
        tensors: by name.
        sums: what `touch` returned of those that could be touched.
    """
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors.items():
        seen = (name, str(tensor.dtype), list(tensor.shape), list(tensor.stride()),
                str(tensor.device), sums.get(name))  # fmt: skip
        found.update(json.dumps(seen).encode())
    return found.hexdigest()
