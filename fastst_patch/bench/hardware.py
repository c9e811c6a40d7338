"""Facts about this machine that decide what a load time means. Standard library only."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

MEMORY_FILESYSTEMS = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"})

_CGROUP_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Filesystem:
    """A line of /proc/self/mountinfo."""

    mount_point: str
    type: str
    source: str

    @property
    def in_memory(self) -> bool:
        """Whether its files live in memory, and so are never cold."""
        return self.type in MEMORY_FILESYSTEMS


def filesystem(path: str | os.PathLike[str]) -> Filesystem:
    """Find the filesystem that holds path in /proc/self/mountinfo."""
    real = os.path.realpath(path)
    found = Filesystem("/", "unknown", "unknown")
    for line in _read(Path("/proc/self/mountinfo")).splitlines():
        before, _, after = line.partition(" - ")
        mount_point = _unescape(before.split(" ")[4])
        fields = after.split(" ")
        prefix = mount_point.rstrip("/") + "/"
        # >=: of two mounts on one directory the later one is seen.
        if (real + "/").startswith(prefix) and len(mount_point) >= len(found.mount_point):
            found = Filesystem(mount_point, fields[0], _unescape(fields[1]))
    return found


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal.group(1), 8)), field)


def read_ahead_file(path: str | os.PathLike[str]) -> Path | None:
    """Find the sysfs file with the read-ahead (KiB) in force for path, if there is one.

    Network filesystems have a bdi of their own, partitions share their disk's queue.
    """
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    block = Path("/sys/dev/block") / number
    candidates = (
        block / "queue/read_ahead_kb",
        block.resolve().parent / "queue/read_ahead_kb",
        Path("/sys/class/bdi") / number / "read_ahead_kb",
    )
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def read_ahead_kb(path: str | os.PathLike[str]) -> int | None:
    """Return the read-ahead in force for path; None when it cannot be told."""
    sysfs = read_ahead_file(path)
    text = _read(sysfs).strip() if sysfs else ""
    return int(text) if text.isdigit() else None


def memory_available() -> int:
    """Return the bytes one may still fill: MemAvailable, or less under a cgroup limit."""
    return min([meminfo("MemAvailable"), *_cgroup_headrooms()])


def meminfo(field: str) -> int:
    """Return a field of /proc/meminfo in bytes; 0 where it is not there."""
    match = re.search(rf"^{field}:\s+(\d+) kB$", _read(Path("/proc/meminfo")), re.MULTILINE)
    return int(match.group(1)) * 1024 if match else 0


def _cgroup_headrooms() -> list[int]:
    """Return limit - usage of the cgroups that a container sees at the usual places."""
    pairs = (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    )
    headrooms = []
    for limit_name, usage_name in pairs:
        limit, usage = _read(_CGROUP_ROOT / limit_name), _read(_CGROUP_ROOT / usage_name)
        if limit.strip().isdigit() and usage.strip().isdigit():  # not "max", not absent
            headrooms.append(max(0, int(limit) - int(usage)))
    return headrooms


def cpu_count() -> int:
    """Return the CPUs this process may run on."""
    return len(os.sched_getaffinity(0))


def cpu_model() -> str:
    """Return the CPU's marketing name, or the architecture where there is none (Arm)."""
    match = re.search(r"^model name\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return match.group(1).strip() if match else platform.machine()


def environment(path: str | os.PathLike[str]) -> dict[str, object]:
    """Return what one needs to compare numbers with others'. No host or user names."""
    held_by = filesystem(path)
    return {
        "cpu": cpu_model(),
        "cpus": cpu_count(),
        "memory": meminfo("MemTotal"),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "fs": held_by.type,
        "block_device": os.path.basename(held_by.source),
        "read_ahead_kb": read_ahead_kb(path),
        "python": platform.python_version(),
        "torch": version("torch"),
        "safetensors": version("safetensors"),
        "fastst_patch": version("fastst-patch"),
    }


def version(distribution: str) -> str | None:
    """Return the installed version of a distribution."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
