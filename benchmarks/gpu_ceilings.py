"""What a GPU machine can give at most: copies, reads, pinning, allocating. Needs torch only.

    python benchmarks/gpu_ceilings.py [--file FILE] [--quick] [--device N] [--json FILE]

Every number is the best of a few repeats, as ceilings should be. The reads take FILE, or a
checkpoint written for the purpose; cold reads need no root.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastst_patch import engine
from fastst_patch.bench import guarded, hardware, residency, synthetic_checkpoint, write_json
from fastst_patch.bench.failures import UsageError
from fastst_patch.bench.job import run_json

MIB = 1 << 20
SLOTS = (4 * MIB, 64 * MIB)
STREAMS = (1, 2, 4, 8)
BUFFERED_THREADS = (1, 2, 4, 6, 8, 16)
DIRECT_THREADS = (4, 8, 16, 32)
CHUNK = 4 * MIB
BLOCK = 256 * MIB
SMALL = (256, 4096, 65536)


class Gpu:
    """The few things asked of torch.cuda. A rehearsal has a stand-in, so that the rest runs."""

    def __init__(self, ordinal: int) -> None:
        import torch

        self.torch = torch
        self.device = torch.device("cuda", ordinal)

    def bytes(self, count: int) -> Any:
        return self.torch.empty(count, dtype=self.torch.uint8, device=self.device)

    def pinned(self, count: int) -> Any:
        return self.torch.empty(count, dtype=self.torch.uint8, pin_memory=True)

    def pageable(self, count: int) -> Any:
        return self.torch.ones(count, dtype=self.torch.uint8)

    def stream(self) -> Any:
        return self.torch.cuda.Stream(self.device)

    def on(self, stream: Any) -> Any:
        return self.torch.cuda.stream(stream)

    def synchronize(self) -> None:
        self.torch.cuda.synchronize(self.device)

    def forget_pool(self) -> None:
        self.torch.cuda.empty_cache()

    def register(self, address: int, count: int) -> None:
        code = int(self.torch.cuda.cudart().cudaHostRegister(address, count, 0))
        if code:
            raise OSError(f"cudaHostRegister: error {code}")

    def unregister(self, address: int) -> None:
        self.torch.cuda.cudart().cudaHostUnregister(address)

    def small_copy(self) -> Callable[[int, int, int, int], int]:
        """The driver's asynchronous copy: (to, from, bytes, stream)."""
        call = ctypes.CDLL("libcuda.so.1").cuMemcpyHtoDAsync_v2
        call.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        return call

    def handle(self, stream: Any) -> int:
        return int(stream.cuda_stream)

    def facts(self) -> dict[str, Any]:
        p = self.torch.cuda.get_device_properties(self.device)
        return {
            "gpu": p.name,
            "device_memory": p.total_memory,
            "compute_capability": f"{p.major}.{p.minor}",
            "cuda": self.torch.version.cuda,
            "hip": self.torch.version.hip,
            "driver": _nvidia_smi("driver_version"),
            "pcie_gen": _nvidia_smi("pcie.link.gen.max"),
            "pcie_width": _nvidia_smi("pcie.link.width.max"),
        }


class StandIn(Gpu):
    """CPU memory for a GPU: numbers mean nothing, every line is run."""

    def __init__(self, _ordinal: int) -> None:
        import torch

        self.torch = torch
        self.device = torch.device("cpu")

    def pinned(self, count: int) -> Any:
        return self.pageable(count)

    def stream(self) -> Any:
        return None

    def on(self, stream: Any) -> Any:
        return contextlib.nullcontext(stream)

    def synchronize(self) -> None:
        pass

    def forget_pool(self) -> None:
        pass

    def register(self, address: int, count: int) -> None:
        pass

    def unregister(self, address: int) -> None:
        pass

    def small_copy(self) -> Callable[[int, int, int, int], int]:
        return lambda to, source, count, _: int(ctypes.memmove(to, source, count) == 0)

    def handle(self, stream: Any) -> int:
        return 0

    def facts(self) -> dict[str, Any]:
        return {"gpu": "rehearsal", "device_memory": 0}


def _nvidia_smi(field: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "--id=0"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()
    return None


def best(repeats: int, run: Callable[[], float]) -> float:
    """The least of so many times, after one that is not counted."""
    run()
    return min(run() for _ in range(repeats))


def timed(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


# ---- copies -------------------------------------------------------------


def pinned_copies(gpu: Gpu, total: int, repeats: int) -> list[dict[str, Any]]:
    """One thread enqueues; every stream has two slots and a place of its own."""
    found = []
    for slot in SLOTS:
        for count in STREAMS:
            streams = [gpu.stream() for _ in range(count)]
            sources = [gpu.pinned(slot) for _ in range(2 * count)]
            targets = [gpu.bytes(slot) for _ in range(2 * count)]
            rounds = max(1, total // (slot * 2 * count))

            def once(streams=streams, sources=sources, targets=targets, rounds=rounds) -> None:
                for _ in range(rounds):
                    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
                        with gpu.on(streams[i % len(streams)]):
                            target.copy_(source, non_blocking=True)
                gpu.synchronize()

            moved = rounds * slot * 2 * count
            seconds = best(repeats, lambda once=once: timed(once))
            found.append({"slot": slot, "streams": count, "gb_per_s": moved / seconds / 1e9})
    return found


def pageable_copies(gpu: Gpu, total: int, repeats: int) -> list[dict[str, Any]]:
    """A thread and a stream each, from ordinary memory: what stock does with one."""
    found = []
    for slot in SLOTS:
        for count in STREAMS:
            streams = [gpu.stream() for _ in range(count)]
            sources = [gpu.pageable(slot) for _ in range(count)]
            targets = [gpu.bytes(slot) for _ in range(count)]
            rounds = max(1, total // (slot * count))

            def work(i, streams=streams, sources=sources, targets=targets, rounds=rounds) -> None:
                with gpu.on(streams[i]):
                    for _ in range(rounds):
                        targets[i].copy_(sources[i], non_blocking=True)

            def once(work=work, count=count) -> None:
                _in_threads(count, work)
                gpu.synchronize()

            seconds = best(repeats, lambda once=once: timed(once))
            moved = rounds * slot * count
            found.append({"slot": slot, "threads": count, "gb_per_s": moved / seconds / 1e9})
    return found


def small_copies(gpu: Gpu) -> list[dict[str, Any]]:
    """What a call of the driver's copy costs, through ctypes (which adds about 1 µs)."""
    call, stream = gpu.small_copy(), gpu.stream()
    found, number = [], 2000
    source, target = gpu.pinned(SMALL[-1]), gpu.bytes(SMALL[-1])
    for size in SMALL:

        def once(size=size) -> None:
            to, start, handle = target.data_ptr(), source.data_ptr(), gpu.handle(stream)
            for _ in range(number):
                if call(to, start, size, handle):
                    raise OSError("cuMemcpyHtoDAsync failed")

        asked = best(3, lambda once=once: timed(once))
        gpu.synchronize()

        def whole(once=once) -> None:
            once()
            gpu.synchronize()

        seconds = best(3, lambda whole=whole: timed(whole))
        found.append({"bytes": size, "us_a_call": 1e6 * asked / number,
                      "us_each_until_done": 1e6 * seconds / number})  # fmt: skip
    return found


def read_and_copy(gpu: Gpu, path: str, repeats: int) -> list[dict[str, Any]]:
    """The ring in a few lines of Python: threads read the page cache and copy from there."""
    found, size = [], os.path.getsize(path)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for count in BUFFERED_THREADS:
            streams = [gpu.stream() for _ in range(count)]
            sources = [gpu.pinned(CHUNK) for _ in range(count)]
            targets = [gpu.bytes(CHUNK) for _ in range(count)]

            def work(i, count=count, streams=streams, sources=sources, targets=targets) -> None:
                view = memoryview(sources[i].numpy())
                with gpu.on(streams[i]):
                    for at in range(i * CHUNK, size, count * CHUNK):
                        os.preadv(fd, [view], at)
                        targets[i].copy_(sources[i], non_blocking=True)
                        if streams[i] is not None:
                            streams[i].synchronize()

            def once(work=work, count=count) -> None:
                _in_threads(count, work)

            seconds = best(repeats, lambda once=once: timed(once))
            found.append({"threads": count, "gb_per_s": size / seconds / 1e9})
    finally:
        os.close(fd)
    return found


def _in_threads(count: int, work: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))


# ---- reads --------------------------------------------------------------


def reads(path: str, direct: bool, repeats: int) -> list[dict[str, Any]]:
    """Into slots that each thread uses again and again."""
    found = []
    for threads in DIRECT_THREADS if direct else BUFFERED_THREADS:
        rates = []
        for _ in range(repeats):
            state = residency.prepare("cold" if direct else "warm", [path])
            try:
                size, seconds = engine.read_ceiling(
                    path, direct=direct, threads=threads, chunk_bytes=CHUNK
                )
            except OSError as error:
                return [{"threads": threads, "gb_per_s": None, "unavailable": str(error)}]
            rates.append(size / seconds / 1e9)
        found.append({"threads": threads, "gb_per_s": max(rates), "verified": state.verified})
    return found


# ---- memory -------------------------------------------------------------


def pinning(gpu: Gpu, repeats: int) -> dict[str, Any]:
    """Registering touched pages, in one piece and by slots, and torch's own pinned memory."""
    found: dict[str, Any] = {}
    for name, piece in (("register_256MiB", BLOCK), ("register_4MiB_slots", CHUNK)):
        rates = []
        for _ in range(repeats):
            with mmap.mmap(-1, BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
                with contextlib.suppress(OSError):
                    memory.madvise(mmap.MADV_HUGEPAGE)
                for at in range(0, BLOCK, CHUNK):
                    memory[at : at + CHUNK] = b"\1" * CHUNK
                held = ctypes.c_char.from_buffer(memory)
                base = ctypes.addressof(held)
                begin = time.perf_counter()
                for at in range(0, BLOCK, piece):
                    gpu.register(base + at, piece)
                rates.append(BLOCK / (time.perf_counter() - begin) / 1e9)
                for at in range(0, BLOCK, piece):
                    gpu.unregister(base + at)
                del held
        found[name + "_gb_per_s"] = max(rates)
    seconds = timed(lambda: gpu.pinned(BLOCK + MIB))  # a size that torch has not cached
    found["torch_pin_memory_gb_per_s"] = (BLOCK + MIB) / seconds / 1e9
    return found


def allocation(gpu: Gpu) -> dict[str, Any]:
    """Fresh from the driver, from torch's pool, and small ones."""

    def allocate(count: int) -> float:
        gpu.synchronize()
        return timed(lambda: gpu.bytes(count))

    gpu.forget_pool()
    fresh = []
    for _ in range(4):
        gpu.forget_pool()
        fresh.append(allocate(BLOCK))
    gpu.bytes(BLOCK)
    pooled = min(allocate(BLOCK) for _ in range(20))
    number = 10_000
    kept = [gpu.bytes(512) for _ in range(number)]
    del kept
    kept = []
    small = timed(lambda: kept.extend(gpu.bytes(512) for _ in range(number)))
    return {
        "fresh_256MiB_ms": 1e3 * min(fresh),
        "pooled_256MiB_us": 1e6 * pooled,
        "pooled_512B_us": 1e6 * small / number,
    }


def start(device: int) -> dict[str, Any]:
    """In a process of its own: what the driver and the context take."""
    import torch

    found: dict[str, Any] = {}
    with contextlib.suppress(OSError):
        driver = ctypes.CDLL("libcuda.so.1")
        found["cuInit_s"] = timed(lambda: driver.cuInit(0))
    found["torch_cuda_init_s"] = timed(torch.cuda.init)

    def first() -> None:
        torch.empty(1, device=f"cuda:{device}")
        torch.cuda.synchronize(device)

    found["context_s"] = timed(first)
    return found


def cufile() -> dict[str, Any]:
    """Whether GPU Direct Storage is there, and whether its kernel module is."""
    try:
        ctypes.CDLL("libcufile.so.0")
        library = None
    except OSError as error:
        library = str(error)
    return {
        "library": library is None,
        "why_not": library,
        "kernel_module": Path("/proc/driver/nvidia-fs").exists(),
    }


# ---- all ----------------------------------------------------------------


def require_gpu(device: int) -> None:
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        raise UsageError(f"needs a GPU: this torch ({torch.__version__}) is built without CUDA")
    if not torch.cuda.is_available():
        raise UsageError("needs a GPU: torch is built with CUDA, but sees no usable device")
    if device >= torch.cuda.device_count():
        raise UsageError(f"needs cuda:{device}: torch sees {torch.cuda.device_count()} devices")


def sections(gpu: Gpu, path: str, args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Each measurement with its name. One that fails is no reason to lose the others."""
    total = 64 * MIB if args.rehearse else (1 << 30 if args.quick else 4 << 30)
    repeats = 1 if args.quick or args.rehearse else 3

    def script() -> Any:
        if args.rehearse:
            return {}
        return run_json([str(Path(__file__).resolve()), "--start"], {"device": args.device},
                        "starting CUDA")  # fmt: skip

    steps: dict[str, Callable[[], Any]] = {
        "start": script,
        "pinned_copy": lambda: pinned_copies(gpu, total, repeats),
        "pageable_copy": lambda: pageable_copies(gpu, total // 2, repeats),
        "small_copy": lambda: small_copies(gpu),
        "page_cache_read": lambda: reads(path, False, repeats),
        "read_and_copy": lambda: read_and_copy(gpu, path, repeats),
        "direct_read": lambda: reads(path, True, repeats),
        "pinning": lambda: pinning(gpu, repeats),
        "allocation": lambda: allocation(gpu),
        "cufile": cufile,
    }
    for name, step in steps.items():
        try:
            yield name, step()
        except Exception as error:
            yield name, {"failed": f"{type(error).__name__}: {error}"}


def run(args: argparse.Namespace) -> int:
    if not args.rehearse:
        require_gpu(args.device)
    gpu = StandIn(args.device) if args.rehearse else Gpu(args.device)
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        path = Path(args.file) if args.file else stack.enter_context(synthetic_checkpoint(args.dir))
        environment = hardware.environment(path) | gpu.facts()
        print(f"{environment['gpu']}; {environment['cpu']}, {environment['cpus']} CPUs; "
              f"{environment['fs']} on {environment['block_device']}", flush=True)  # fmt: skip
        for name, value in sections(gpu, str(path), args):
            found[name] = value
            _show(name, value)
    if args.json:
        write_json(args.json, {"environment": environment} | found)
    return 1 if any(isinstance(v, dict) and "failed" in v for v in found.values()) else 0


def _show(name: str, value: Any) -> None:
    rows = value if isinstance(value, list) else [value]
    for row in rows:
        cells = [f"{key} {_figure(key, one)}" for key, one in row.items() if one is not None]
        print(f"{name:16} {', '.join(cells)}", flush=True)


def _figure(key: str, value: object) -> str:
    if key == "slot":
        return f"{int(str(value)) >> 20} MiB"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", help="a file on the disk of interest; else one is written")
    parser.add_argument("--dir", help="where to write it")
    parser.add_argument("--device", type=int, default=0, metavar="N")
    parser.add_argument("--quick", action="store_true", help="fewer bytes, no repeats")
    parser.add_argument("--rehearse", action="store_true",
                        help="run every line without a GPU; the numbers mean nothing")  # fmt: skip
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--start", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        print(json.dumps(start(json.load(sys.stdin)["device"])), flush=True)
        return 0
    return run(args)


if __name__ == "__main__":
    sys.exit(guarded("gpu_ceilings", main))
