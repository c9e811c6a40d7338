"""Lets `benchmarks/gpu.sh rehearse` and `gpu_race.sh rehearse` run where there is no GPU.

It is on PYTHONPATH there, and nowhere else.

The fake driver stands for CUDA (../fake_device.py), CPU memory for the device's. Of torch only
what the benchmarks call is replaced. Numbers mean nothing, every line is run.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import wrapt

sys.path.append(str(Path(__file__).resolve().parent.parent))


_PROPERTIES = SimpleNamespace(name="rehearsal", total_memory=1 << 35, major=0, minor=0)


class _Stream:  # a class, since annotations of others name it
    cuda_stream = 0

    def __init__(self, device: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _nothing() -> None:
    pass


def _nothing_went_wrong(*_: int) -> int:
    return 0


def _is_cuda(device: object) -> bool:
    return str(device).startswith("cuda")


@wrapt.when_imported("torch")
def _torch(torch: Any) -> None:
    made = torch.empty

    @functools.wraps(made)
    def empty(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Any:
        return made(*args, device=None if _is_cuda(device) else device, **kwargs)

    torch.empty = empty
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_properties = lambda device=None: _PROPERTIES
    torch.cuda.Stream = _Stream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.empty_cache = torch.cuda.init = _nothing
    torch.cuda.cudart = lambda: SimpleNamespace(
        cudaHostRegister=_nothing_went_wrong, cudaHostUnregister=_nothing_went_wrong
    )
    torch.cuda.current_stream = lambda device=None: SimpleNamespace(synchronize=lambda: None)
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.get_device_name = lambda device=None: "rehearsal"
    torch.cuda.mem_get_info = lambda device=None: (1 << 34, 1 << 35)
    torch.cuda.memory_allocated = lambda device=None: 0
    torch.cuda.max_memory_reserved = lambda device=None: 0


@wrapt.when_imported("safetensors.torch")
def _stock(module: Any) -> None:
    load = module.load_file

    def load_file(filename: Any, device: Any = "cpu", **kwargs: Any) -> Any:
        loaded = load(filename, device="cpu" if _is_cuda(device) else device, **kwargs)
        return {name: tensor.clone() for name, tensor in loaded.items()}

    module.load_file = load_file


@wrapt.when_imported("fastst_patch")  # the whole of it: the fake imports more than the device
def _package(_: Any) -> None:
    import fake_device

    from fastst_patch import device

    driver = fake_device.Driver(Path(os.environ["REHEARSAL_DRIVER"]))
    device._runtime = fake_device.FakeRuntime(driver)
    atexit.register(_must_be_clean, driver)


# ---- of the race alone --------------------------------------------------


@wrapt.when_imported("benchmarks.gpu_ceilings")
def _ceilings(module: Any) -> None:
    module.driver_copy = lambda: lambda to, source, count, _: not ctypes.memmove(to, source, count)


@wrapt.when_imported("benchmarks.race.loaders.base")
def _loaders(module: Any) -> None:
    module.no_driver = lambda kind: None


@wrapt.when_imported("benchmarks.race.truth")
def _truth(module: Any) -> None:
    judge = module.differences
    module.differences = lambda entries, tensors, sums, device: judge(entries, tensors, sums, "cpu")


def _must_be_clean(driver: Any) -> None:
    found = driver.violations()
    if found:
        print("the fake driver objects:", *found, sep="\n  ", file=sys.stderr, flush=True)
        os._exit(9)
