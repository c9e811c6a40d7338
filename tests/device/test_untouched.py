"""Loads to the CPU touch no device: a driver that is opened breaks forked children."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from places import SUPPORT

# The names under which the engine looks for drivers.
LIBRARIES = ("libcuda.so.1", "libcufile.so.0", "libamdhip64.so")

CPU_ONLY = """
import sys
path, folder = sys.argv[1:]

def opened():
    with open("/proc/self/maps") as maps:
        return folder in maps.read()

import fastst_patch
assert not opened(), "on import"
fastst_patch.patch(fallback="error")
import safetensors.torch
fastst_patch.patch_map()
assert not opened(), "on patch()"
for options in ({"io": io} for io in ("auto", "mmap", "buffered", "direct", "gds")):
    with fastst_patch.config_context(**options, progress=True):
        safetensors.torch.load_file(path)
        with safetensors.safe_open(path, "pt") as handle:
            handle.get_tensors(), handle.get_slice("w")[1:]
fastst_patch.stats()
fastst_patch.unpatch()
assert not opened(), "on loads to the CPU"
from fastst_patch import engine
from fastst_patch.cli import doctor
doctor.examine([path])
assert not opened(), "by doctor, in its own process"
engine.open_device(0, kind="cuda")
assert opened()  # this is what it would have looked like
"""

ONE_DEVICE = """
import sys
sys.path.insert(0, sys.argv[3])
import fake_device, fastst_patch
driver = fake_device.Driver(sys.argv[1])
driver.lib.fake_devices(4)
with fake_device.fake_cuda(driver, devices=4):
    for device in ("cuda:2", 2):
        kept = fastst_patch.load_file(sys.argv[2], device=device)
        with fastst_patch.safe_open(sys.argv[2], "pt", device) as handle:
            kept = handle.get_tensor("w")
    assert driver.calls("cuDevicePrimaryCtxRetain") == driver.live().contexts == 1
    fastst_patch.load_file(sys.argv[2], device="cuda:0")
    assert driver.live().contexts == 2
    del kept
"""


@pytest.mark.skipif(
    torch.version.cuda is not None or torch.version.hip is not None,
    reason="this torch opens the driver itself",
)
def test_nothing_but_a_device_load_opens_a_driver(
    fake_driver: Any, sample: str, tmp_path: Path
) -> None:
    folder = tmp_path / "drivers"
    folder.mkdir()
    for name in LIBRARIES:
        shutil.copy(fake_driver.path, folder / name)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CPU_ONLY, sample, str(folder)],
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120,
        env=os.environ | {"LD_LIBRARY_PATH": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_context_only_on_the_device_asked_for(
    fake_driver: Any, sample: str, tmp_path: Path, warm_python: Any
) -> None:
    arguments = (fake_driver.path, sample, SUPPORT)
    done = warm_python.run(ONE_DEVICE, *arguments, folder=tmp_path, quiet=True)
    assert done.returncode == 0, done.stderr
