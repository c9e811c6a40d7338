"""``fastst-patch doctor``: what there is here, what ``patch()`` would do, and what not, and why.

CUDA is looked at in a child process, because initialising it would break children that this
process forks later.
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
from typing import Any

from . import engine, patcher, stock
from .config import config, unknown_variables
from .errors import Doubt, OptionError
from .integrations import INTEGRATIONS, Hook
from .machine import NETWORKED, cpu_limit, io_threads
from .targets import TESTED

__all__ = ["examine", "main"]

_PACKAGES = (
    "fastst-patch", "safetensors", "torch", "wrapt", "cffi", "numpy", "transformers",
    "diffusers", "accelerate", "sentence-transformers", "peft", "huggingface-hub",
)  # fmt: skip

_FILE_SYSTEMS = {
    0xEF53: "ext2/3/4", 0x58465342: "xfs", 0x9123683E: "btrfs", 0x01021994: "tmpfs",
    0x6969: "nfs", 0x65735546: "fuse", 0x0BD00BD0: "lustre", 0x794C7630: "overlayfs",
    0x2FC12FC1: "zfs", 0xFF534D42: "cifs", 0xFE534D42: "smb2", 0xF2F52010: "f2fs",
}  # fmt: skip
_LIBRARIES = {
    "libcuda.so.1": "CUDA driver",
    "libcufile.so.0": "GPU Direct Storage",
    "libamdhip64.so": "ROCm",
}

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
def engine(i):
    try:
        from fastst_patch import device, engine
        info = engine.device_info(device.Runtime().native(i))
        return f"ready, {info.free_bytes / 2**30:.1f} GiB free, NUMA node {info.numa_node}"
    except Exception as error:
        return f"cannot use it: {error}"
try:
    import torch
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            gpus.append({"name": p.name, "memory_bytes": p.total_memory, "engine": engine(i)})
    reason = None if gpus else (
        "this torch is built without CUDA" if torch.version.cuda is None and not torch.version.hip
        else "torch sees no usable GPU")
except Exception as error:
    reason = f"torch cannot tell: {error}"
print(json.dumps({"libraries": found, "gpus": gpus, "gpu_reason": reason}))
"""


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
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


def _file_system(path: str) -> dict[str, Any]:
    """What can be done with a file, or with those in a folder; reads headers, and no data."""
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
    except (OSError, Doubt) as error:
        result["error"] = f"{getattr(error, 'strerror', None) or error}; name a model file of it"
    return result


def _model_files(folder: str) -> list[str]:
    return sorted(str(path) for path in Path(folder).glob("*.safetensors") if path.is_file())


def _contents(files: Sequence[str]) -> dict[str, Any]:
    """What is in safetensors files, how much of them is cached, and which stock has to read."""
    tensors = nbytes = cached = 0
    left: dict[str, str] = {}
    for path in files:
        try:
            file = engine.open_file(path)
            nbytes += file.size
            cached += file.residency(0, file.size)[0]
            tensors += len(engine.read_layout(file).names)
        except (OSError, Doubt) as error:
            left[os.path.basename(path)] = str(error)
    return {
        "files": len(files),
        "tensors": tensors,
        "bytes": nbytes,
        "cached_bytes": cached,
        "left_to_stock": left,
    }


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
    """Of integrations whose package is installed."""
    return [
        hook
        for integration in INTEGRATIONS
        for hook in integration.hooks
        if importlib.util.find_spec(hook.package) is not None
    ]


def _tested() -> dict[str, list[str]]:
    ranges = {name: list(bounds) for name, bounds in TESTED.items()}
    for integration in INTEGRATIONS:
        package, *bounds = integration.tested
        ranges.setdefault(package, bounds)
    return ranges


def _patching() -> dict[str, Any]:
    """What ``patch()`` would replace. Patches for a moment, and puts everything back."""
    # Targets can be looked at only once they are imported.
    for module in ("safetensors.torch", *(hook.module for hook in _hooks())):
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    with patcher.patched() as report:
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
            "device other than cpu and cuda": "torch and stock know how",
            "framework other than torch": "numpy, tf, jax, mlx, paddle: stock does it",
            'backend="pread"': "stock's stricter indexing and copies are kept",
            "safetensors.torch.load(bytes)": "no file is read",
            **({f"files up to {small} bytes": "small_file_bytes says so"} if small else {}),
            "a torch mode, default device or inference mode": "tensors must come out its way",
        },
    }


def examine(paths: Sequence[str] = ()) -> dict[str, Any]:
    """Everything ``doctor`` knows, as data.

    Args:
        paths: files or folders whose file systems are of interest; the current folder and
            the temporary one when empty.
    """
    native = {"loaded": engine.native_file(), "reason": engine.native_error()}
    try:
        options: dict[str, Any] = dataclasses.asdict(config())
    except OptionError as error:
        options = {"error": str(error)}
    result: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": _versions(),
        "tested": _tested(),
        "safetensors_module": str(stock.safe_open.__module__),
        "native": native,
        "options": options,
        "unknown_variables": unknown_variables(),
        "machine": _machine(),
        **_accelerators(),
    }
    if native["reason"] is None:
        chosen = list(paths) or [os.getcwd(), tempfile.gettempdir()]
        result["paths"] = [_file_system(path) for path in chosen]
        if "error" not in options:
            result["patch"] = _patching()
    return result


# ---- text ----


def _gib(nbytes: int | None) -> str:
    return "unknown" if nbytes is None else f"{nbytes / (1 << 30):.1f} GiB"


def _lines(found: dict[str, Any]) -> list[str]:
    machine, native = found["machine"], found["native"]
    installed = [f"{name} {v}" for name, v in found["versions"].items() if v]
    ranges = [f"{name} {low} to {high}" for name, (low, high) in found["tested"].items()]
    lines = [
        f"python {found['python']}; " + ", ".join(installed),
        "tested with " + ", ".join(ranges),
        f"native engine: loaded from {native['loaded']}"
        if native["reason"] is None
        else f"native engine: NOT LOADED, stock is used: {native['reason']}",
        f"machine: {machine['machine']}, Linux {machine['kernel']}, {machine['cpus_usable']:g} CPUs"
        f" usable, {machine['workers_per_load']} workers a load,"
        f" {_gib(machine['memory_headroom_bytes'])} of memory to take,"
        f" huge pages: {machine['transparent_huge_pages']}",
    ]
    for gpu in found["gpus"]:
        lines.append(f"GPU: {gpu['name']}, {_gib(gpu['memory_bytes'])}; engine: {gpu['engine']}")
    if found["gpu_reason"]:
        lines.append(f"GPU: none ({found['gpu_reason']})")
    for name, reason in found["libraries"].items():
        lines.append(f"{_LIBRARIES[name]} ({name}): {_library(reason)}")
    if "error" in found["options"]:
        lines.append(f"options: {found['options']['error']}")
    else:
        lines.append("options: " + ", ".join(f"{k}={v}" for k, v in found["options"].items()))
    if found["unknown_variables"]:
        names = ", ".join(found["unknown_variables"])
        lines.append(f"options: no such option, and no effect: {names}")
    return lines


def _library(reason: str | None) -> str:
    if reason is None:
        return "found"
    absent = "No such file or directory" in reason
    return "not found (needed only for such a device)" if absent else f"cannot be used: {reason}"


def _path_lines(found: dict[str, Any]) -> list[str]:
    lines = []
    for entry in found.get("paths", []):
        if "error" in entry:
            lines.append(f"{entry['path']}: {entry['error']}")
            continue
        lines.append(
            f"{entry['path']}: {_held(entry)}{entry['file_system']}, O_DIRECT {entry['o_direct']},"
            f" page cache seen through {entry['residency_probe']}"
        )
        for name, reason in entry.get("left_to_stock", {}).items():
            lines.append(
                f"  {name}: not accelerated, stock reads it or says what is wrong: {reason}"
            )
    return lines


def _held(entry: dict[str, Any]) -> str:
    if "files" not in entry:
        return ""
    cached = entry["cached_bytes"] / max(entry["bytes"], 1)
    files = f"{entry['files']} files, " if entry["files"] > 1 else ""
    return (
        f"{files}{entry['tensors']} tensors, {entry['bytes'] / 1e9:.3f} GB, {cached:.0%} cached; "
    )


def _patch_lines(found: dict[str, Any]) -> list[str]:
    patching = found.get("patch")
    if "error" in found["options"]:
        return ["patch() would raise OptionError: see options"]
    if patching is None:
        return ["patch() would do nothing"]
    if not patching["possible"]:
        return [f"patch() would do nothing: {patching['reason']}"]
    lines = ["patch() would replace:"]
    for status in patching["targets"]:
        state = "yes" if status["patched"] else f"no, {status['reason']}"
        lines.append(f"  {status['name']}: {state} ({status['summary']})")
        if status["aliases"]:
            lines.append(f"    and {', '.join(status['aliases'])}")
    lines.append("left to stock:")
    lines += [f"  {what}: {why}" for what, why in patching["left_to_stock"].items()]
    return lines


def main(paths: Sequence[str] = (), as_json: bool = False) -> int:
    """Print what `examine` found; 0 when the fast path can be taken here, else 1.

    Also 1 where a path that was named does not exist.
    """
    found = examine(paths)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(_lines(found) + _path_lines(found) + _patch_lines(found)))
    absent = any(not os.path.exists(path) for path in paths)
    usable = found["native"]["reason"] is None and "error" not in found["options"]
    return 0 if usable and not absent else 1
