"""What a GPU machine can give at most: `ceilings.py --device cuda`, and these measurements with it.

    python benchmarks/gpu_ceilings.py [--file FILE] [--quick] [--json FILE]

Copies, reads, pinning, allocating, starting. Needs torch only. Every number is the best of a few
repeats, as ceilings should be.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastst_patch.bench.copies import best, copy_to, in_threads, timed

MIB = 1 << 20
SLOTS = (4 * MIB, 64 * MIB)
STREAMS = (1, 2, 4, 8)
READERS = (1, 2, 4, 6, 8, 16)
CHUNK = 4 * MIB
BLOCK = 256 * MIB
SMALL = (256, 4096, 65536)
DEVICE = "cuda:0"


def facts() -> dict[str, Any]:
    """Which device it is, and whether torch can use it: "gpu" is None where not."""
    import torch

    if not torch.cuda.is_available():
        built = "built without CUDA" if torch.version.cuda is None else "sees no usable device"
        return {"gpu": None, "reason": f"torch {torch.__version__} {built}"}
    p = torch.cuda.get_device_properties(DEVICE)
    uuid = getattr(p, "uuid", None)
    return {
        "gpu": p.name,
        "device_memory": p.total_memory,
        "device_free": torch.cuda.mem_get_info(0)[0],
        "compute_capability": f"{p.major}.{p.minor}",
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "driver": _nvidia_smi("driver_version"),
        "pcie_gen": _nvidia_smi("pcie.link.gen.max"),
        "pcie_width": _nvidia_smi("pcie.link.width.max"),
        "uuid": None if uuid is None else f"GPU-{uuid}",
    }


def _nvidia_smi(field: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "--id=0"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()
    return None


def copies(total: int, repeats: int = 1) -> dict[str, dict[str, float]]:
    """GB/s of copies from pinned and from ordinary memory, by number of streams and their slots."""
    found: dict[str, dict[str, float]] = {"pinned": {}, "pageable": {}}
    for kind, speeds in found.items():
        for slot in SLOTS:
            for streams in STREAMS:
                how = {"pinned": kind == "pinned", "slot": slot, "streams": streams}
                share = total if kind == "pinned" else total // 2
                nbytes, seconds = copy_to(DEVICE, share, repeats, **how)
                speeds[f"{streams} x {slot // MIB} MiB"] = nbytes / seconds / 1e9
    return found


# ---- with --device cuda, beside reads and copies ------------------------


def sections(path: str, repeats: int) -> dict[str, Any]:
    """All of them. One that fails is no reason to lose the others."""
    found: dict[str, Any] = {}
    steps: dict[str, Callable[[], Any]] = {
        "start": start,
        "small_copy": small_copies,
        "read_and_copy": lambda: read_and_copy(path, repeats),
        "pinning": lambda: pinning(repeats),
        "allocation": allocation,
        "cufile": cufile,
    }
    for name, step in steps.items():
        try:
            found[name] = step()
        except Exception as error:
            found[name] = {"failed": f"{type(error).__name__}: {error}"}
    return found


def start() -> dict[str, Any]:
    """What the driver and the context take; nothing has used the device before."""
    import torch

    found: dict[str, Any] = {}
    with contextlib.suppress(OSError):
        driver = ctypes.CDLL("libcuda.so.1")
        found["cuInit_s"] = timed(lambda: driver.cuInit(0))
    found["torch_cuda_init_s"] = timed(torch.cuda.init)
    found["context_s"] = timed(lambda: (_on_device(1), torch.cuda.synchronize(DEVICE)))
    return found


def small_copies() -> list[dict[str, Any]]:
    """What a call of the driver's copy costs, through ctypes (which adds about 1 µs)."""
    import torch

    call, stream, number = driver_copy(), torch.cuda.Stream(DEVICE).cuda_stream, 2000
    source, target = _pinned(SMALL[-1]), _on_device(SMALL[-1])
    found = []
    for size in SMALL:

        def ask(size: int = size) -> None:
            for _ in range(number):
                if call(target.data_ptr(), source.data_ptr(), size, stream):
                    raise OSError("cuMemcpyHtoDAsync failed")

        asked = best(3, ask)
        seconds = best(3, lambda ask=ask: (ask(), torch.cuda.synchronize(DEVICE)))
        found.append({"bytes": size, "us_a_call": 1e6 * asked / number,
                      "us_each_until_done": 1e6 * seconds / number})  # fmt: skip
    return found


def driver_copy() -> Callable[[int, int, int, int], int]:
    """The driver's asynchronous copy: (to, from, bytes, stream)."""
    call = ctypes.CDLL("libcuda.so.1").cuMemcpyHtoDAsync_v2
    call.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return call


def read_and_copy(path: str, repeats: int) -> list[dict[str, Any]]:
    """The ring in a few lines of Python: threads read the page cache and copy from there."""
    import torch

    found, size = [], os.path.getsize(path)
    with open(path, "rb", buffering=0) as file:
        for count in READERS:
            streams = [torch.cuda.Stream(DEVICE) for _ in range(count)]
            pairs = [(_pinned(CHUNK), _on_device(CHUNK)) for _ in range(count)]

            def work(i, count=count, streams=streams, pairs=pairs) -> None:
                source, target = pairs[i]
                view = memoryview(source.numpy())
                with torch.cuda.stream(streams[i]):
                    for at in range(i * CHUNK, size, count * CHUNK):
                        os.preadv(file.fileno(), [view], at)
                        target.copy_(source, non_blocking=True)
                        streams[i].synchronize()

            seconds = best(repeats, lambda work=work, count=count: in_threads(count, work))
            found.append({"threads": count, "gb_per_s": size / seconds / 1e9})
    return found


def pinning(repeats: int) -> dict[str, Any]:
    """Registering touched pages, in one piece and by slots, and torch's own pinned memory."""
    found: dict[str, Any] = {}
    for name, piece in (("register_256MiB", BLOCK), ("register_4MiB_slots", CHUNK)):
        seconds = min(_register(piece) for _ in range(repeats))
        found[name + "_gb_per_s"] = BLOCK / seconds / 1e9
    seconds = timed(lambda: _pinned(BLOCK + MIB))  # a size that torch has not cached
    found["torch_pin_memory_gb_per_s"] = (BLOCK + MIB) / seconds / 1e9
    return found


def _register(piece: int) -> float:
    import torch

    runtime = torch.cuda.cudart()
    with mmap.mmap(-1, BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, BLOCK, CHUNK):
            memory[at : at + CHUNK] = b"\1" * CHUNK
        held = ctypes.c_char.from_buffer(memory)
        base = ctypes.addressof(held)
        begin = time.perf_counter()
        for at in range(0, BLOCK, piece):
            code = int(runtime.cudaHostRegister(base + at, piece, 0))
            if code:
                raise OSError(f"cudaHostRegister: error {code}")
        seconds = time.perf_counter() - begin
        for at in range(0, BLOCK, piece):
            runtime.cudaHostUnregister(base + at)
        del held
    return seconds


def allocation() -> dict[str, Any]:
    """Fresh from the driver, from torch's pool, and small ones."""
    import torch

    def allocate(fresh: bool) -> float:
        if fresh:
            torch.cuda.empty_cache()
        torch.cuda.synchronize(DEVICE)
        return timed(lambda: _on_device(BLOCK))

    fresh, number = min(allocate(True) for _ in range(4)), 10_000
    pooled = min(allocate(False) for _ in range(20))
    kept = [_on_device(512) for _ in range(number)]
    kept.clear()
    small = timed(lambda: kept.extend(_on_device(512) for _ in range(number)))
    return {
        "fresh_256MiB_ms": 1e3 * fresh,
        "pooled_256MiB_us": 1e6 * pooled,
        "pooled_512B_us": 1e6 * small / number,
    }


def cufile() -> dict[str, Any]:
    """Whether GPU Direct Storage is there, and whether its kernel module is."""
    why_not = None
    try:
        ctypes.CDLL("libcufile.so.0")
    except OSError as error:
        why_not = str(error)
    module = Path("/proc/driver/nvidia-fs").exists()
    return {"library": why_not is None, "why_not": why_not, "kernel_module": module}


def _pinned(count: int) -> Any:
    import torch

    return torch.empty(count, dtype=torch.uint8, pin_memory=True)


def _on_device(count: int) -> Any:
    import torch

    return torch.empty(count, dtype=torch.uint8, device=DEVICE)


if __name__ == "__main__":
    # This folder's files are no modules of others.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    sys.path.append(sys.path.pop(0))  # behind what is installed
    from benchmarks import ceilings

    sys.exit(ceilings.main(["--device", "cuda", *sys.argv[1:]]))
