"""How many CPUs a process may use: affinity, and the quotas of the cgroups it lies in."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from fastst_patch import machine

Tree = Callable[[str, Mapping[str, str]], None]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Make up /proc/self/cgroup and the files of /sys/fs/cgroup."""
    real = open

    def build(entries: str, files: Mapping[str, str]) -> None:
        (tmp_path / "cgroup").write_text(entries)
        for name, text in files.items():
            path = tmp_path / "sys" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def opened(path: str, *arguments: object, **options: object) -> object:
        chosen = tmp_path / "cgroup" if path == "/proc/self/cgroup" else path
        return real(chosen, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(machine, "_MOUNT", str(tmp_path / "sys"))
    monkeypatch.setattr(machine, "open", opened, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    machine._cgroup_cpus.cache_clear()
    yield build  # type: ignore[misc]
    machine._cgroup_cpus.cache_clear()


@pytest.mark.parametrize(("entries", "files", "cpus"), [
    ("", {}, 16),
    ("0::/\n", {}, 16),  # the root has no quota
    ("0::/\n", {"cpu.max": "max 100000\n"}, 16),
    ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),  # a container's own
    ("0::/a/b\n", {"a/b/cpu.max": "200000 100000\n"}, 2),
    ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
    ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "50000 100000\n"}, 0.5),
    ("0::/../x\n", {"cpu.max": "400000 100000\n"}, 4),  # outside our namespace
    ("3:cpu,cpuacct:/a\n2:memory:/m\n", {
        "cpu/a/cpu.cfs_quota_us": "250000\n", "cpu/a/cpu.cfs_period_us": "100000\n",
        "cpu/m/cpu.cfs_quota_us": "100\n", "cpu/m/cpu.cfs_period_us": "100000\n",
    }, 2.5),
    ("3:cpu,cpuacct:/a\n", {
        "cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n",
    }, 16),
    ("0::/\n", {"cpu.max": "nonsense\n"}, 16),
    ("0::/\n", {"cpu.max": "100000 0\n"}, 16),
    ("nonsense\n", {"cpu.max": "100000 100000\n"}, 16),
])  # fmt: skip
def test_quota(tree: Tree, entries: str, files: Mapping[str, str], cpus: float) -> None:
    tree(entries, files)
    assert machine.cpu_limit() == cpus


def test_no_proc(tree: Tree, tmp_path: Path) -> None:
    tree("", {"cpu.max": "100000 100000\n"})
    (tmp_path / "cgroup").unlink()
    assert machine.cpu_limit() == 16
