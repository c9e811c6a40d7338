"""How many CPUs this process may use, and how many workers that makes. No native code."""

from __future__ import annotations

import os

__all__ = ["NETWORKED", "cpu_limit", "gds_obstacle", "io_threads"]

NETWORKED = frozenset((0x6969, 0x65735546, 0x0BD00BD0, 0xFF534D42, 0xFE534D42))
"""statfs types of NFS, FUSE, Lustre, CIFS and SMB2, where O_DIRECT is for who asks for it."""


def _cgroup_cpus() -> float | None:
    for path in ("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us"):
        try:
            with open(path, encoding="ascii") as file:
                fields = file.read().split()
            if len(fields) == 2:
                return None if fields[0] == "max" else int(fields[0]) / int(fields[1])
            with open("/sys/fs/cgroup/cpu/cpu.cfs_period_us", encoding="ascii") as file:
                return int(fields[0]) / int(file.read()) if int(fields[0]) > 0 else None
        except (OSError, ValueError, ZeroDivisionError, IndexError):
            continue
    return None


def cpu_limit() -> float:
    """CPUs this process may use: its affinity, or its cgroup's quota if that is less."""
    cpus = float(len(os.sched_getaffinity(0)))
    quota = _cgroup_cpus()
    return cpus if quota is None else min(cpus, quota)


def io_threads(configured: int) -> int:
    """Workers for one load. They mostly wait for storage: 8 keep a drive busy on 2 CPUs."""
    if configured:
        return configured
    return max(4, min(8, round(4 * cpu_limit())))


def gds_obstacle() -> str | None:
    """Why GPU Direct Storage cannot work here; None when it may. Opens no library."""
    if not os.path.exists("/proc/driver/nvidia-fs"):
        return "the kernel module nvidia-fs is not loaded"
    return None
