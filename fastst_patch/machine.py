"""How many CPUs this process may use, and how many workers that makes. No native code."""

from __future__ import annotations

import functools
import itertools
import os
from pathlib import PurePosixPath

__all__ = ["NETWORKED", "cpu_limit", "gds_obstacle", "io_threads"]

NETWORKED = frozenset((0x6969, 0x65735546, 0x0BD00BD0, 0xFF534D42, 0xFE534D42))
"""statfs types of NFS, FUSE, Lustre, CIFS and SMB2, where O_DIRECT is used on request only."""


_MOUNT = "/sys/fs/cgroup"


def _quota(folder: str) -> float | None:
    """CPUs that one cgroup (of either version) may use; None without a visible limit."""

    def fields(name: str) -> list[str]:
        with open(f"{folder}/{name}", encoding="ascii") as file:
            return file.read().split()

    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = itertools.chain.from_iterable(map(fields, files))
            return int(quota) / int(period) if int(quota) > 0 else None  # "max" is no number
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return None


@functools.lru_cache(maxsize=1)
def _cgroup_cpus() -> float | None:
    """The least quota of the process's cgroup and its ancestors; looked up once."""
    try:
        with open("/proc/self/cgroup", encoding="utf-8") as file:
            entries = [line.rstrip("\n").split(":", 2) for line in file]
    except (OSError, ValueError):
        return None
    folders = []
    for _, controllers, group in (entry for entry in entries if len(entry) == 3):
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = f"{_MOUNT}/cpu" if controllers else _MOUNT
        folders += [
            mount + str(place) for place in (PurePosixPath(group), *PurePosixPath(group).parents)
        ]
    quotas = [quota for quota in map(_quota, folders) if quota is not None]
    return min(quotas, default=None)


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
