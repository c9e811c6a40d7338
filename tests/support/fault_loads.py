"""The loads of the fault matrix (fault_matrix.py): one for each path that bytes can take.

They are small, with chunks of 64 KiB, so that every single call of a load can be tried.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import compare
import fake_device
import memory_source
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from fake_fixtures import let_modules_move
from fault_calls import Allocations, Calls, DriverCalls, PythonCalls, Reads, SystemCalls
from sharded import assert_owns
from torch import nn

import fastst_patch
from fastst_patch import engine
from fastst_patch.sources import partial as partial_file
from fastst_patch.sources import store

NO_DEVICE = ("Torch not compiled with CUDA enabled", "pin_memory=True requires a CUDA")
"""What a load raises that is left to stock: the fake is no device for torch."""

URL = "memory://here/model.safetensors"


def write_model(path: Path, seed: int, rows: int) -> None:
    """Odd lengths, a scalar and an empty tensor; larger than the megabyte that is read ahead."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    tensors = {f"w{i}": numbers(rows, 301 + i) for i in range(4)}
    tensors |= {"half": numbers(3, 5).to(torch.float16), "scalar": torch.tensor(1 << 40)}
    tensors |= {"empty": torch.empty(0, 4), "flags": numbers(33_333) > 127}
    safetensors.torch.save_file(tensors, path)


@dataclass(frozen=True)
class Place:
    """Files and a fake driver for loads.

    Attributes:
        folder: of all files.
        driver: the fake device driver.
        library: its path.
    """

    folder: Path
    driver: fake_device.Driver
    library: Path

    def file(self, name: str) -> str:
        """A model: small, or large; ``twin`` of it has the same bytes in another file."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            write_model(path, 7, 4500 if name.startswith("large") else 1000)
        return str(path)


@dataclass
class Load:
    """A load that can be repeated.

    Attributes:
        call: does it, with a patched safetensors.
        expected: stock's result.
        file: errors must name it.
        calls: what may fail, by kind.
        before: called before each load.
        settle: called after each load.
        owns: whether tensors need only be contiguous in memory of their own, as of `load_sharded`,
            which stock does not have.
        asked: stock, in the place of one on a device. Then nothing of ours is left there.
        driver: the fake's, if the load is to a device.
    """

    call: Callable[[], Any]
    expected: Any
    file: str
    calls: dict[str, Calls]
    before: Callable[[], None] = lambda: None
    settle: Callable[[], None] = lambda: None
    owns: bool = False
    asked: fake_device.StockOnCpu | None = None
    driver: fake_device.Driver | None = None

    def check(self, result: Any) -> None:
        """Assert that a result is the expected one."""
        if not isinstance(self.expected, dict):
            assert result == self.expected
            return
        assert set(result) == set(self.expected)
        for name, one in self.expected.items():
            try:
                if self.owns:
                    assert_owns(result[name], one, name)
                else:
                    compare.check_same(result[name], one)
            except AssertionError as error:
                raise AssertionError(f"{name} differs: {error}") from error


@dataclass(frozen=True)
class LoadPath:
    """A path of the matrix.

    Attributes:
        name: for people.
        ready: gives the load, ready to be repeated.
        fresh: each load is the first of its process: what is opened once fails, too.
        run: in the place of ``ready``: tries its own faults, and tells of them.
        thin: whether it is in the thinned matrix.
    """

    name: str
    ready: Callable[[Place], contextlib.AbstractContextManager[Load]] | None = None
    fresh: bool = False
    run: Callable[[Place, bool, Callable[..., None]], None] | None = None
    thin: bool = True


# ---------------------------------------------------------------- what programs call


def load_file(path: str, device: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path, device=device)


def walk(path: str, device: str) -> dict[str, torch.Tensor]:
    """Clones, so that nothing handed out is alive while the rest is loaded."""
    with safetensors.safe_open(path, "pt", device=device) as handle:
        return {name: handle.get_tensor(name).clone() for name in handle.offset_keys()}


def slices(path: str, device: str) -> dict[str, torch.Tensor]:
    with safetensors.safe_open(path, "pt", device=device) as handle:
        return {name: handle.get_slice(name)[5:700, 3:].clone() for name in ("w0", "w2", "w3")}


def prefetched(path: str, device: str) -> dict[str, torch.Tensor]:
    with safetensors.safe_open(path, "pt", device=device) as handle:
        if not hasattr(handle, "prefetch"):  # it went to stock, which is older
            return {name: handle.get_tensor(name).clone() for name in handle.offset_keys()}
        with handle.prefetch(None, device=device) as loader:
            return {name: tensor.clone() for name, tensor in loader}


def arrays(path: str, device: str) -> dict[str, Any]:
    return {name: array.copy() for name, array in safetensors.numpy.load_file(path).items()}


def shard(path: str, device: str) -> dict[str, torch.Tensor]:
    """This process is all ranks; the plan asks for parts."""
    plan = {"w0": slice(3, 501), "w1": (slice(None), slice(7, 99)), "w2": 0}
    return fastst_patch.load_sharded(path, None, plan, device=device, contiguous=True)


def _in_parts(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `shard` is to give."""
    return {**found, "w0": found["w0"][3:501].clone(), "w1": found["w1"][:, 7:99].contiguous()}


APIS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "load_file": load_file, "walk": walk, "slices": slices, "prefetch": prefetched,
    "sharded": shard,
}  # fmt: skip


def _expected(api: str, twin: str) -> Any:
    """Stock's result, of another file with the same bytes: a map keeps pages in the cache."""
    if api == "arrays":
        return arrays(twin, "cpu")
    whole = {name: tensor.clone() for name, tensor in load_file(twin, "cpu").items()}
    if api == "sharded":
        return _in_parts(whole)
    return slices(twin, "cpu") if api == "slices" else whole


# ---------------------------------------------------------------- to the CPU

SMALL = {"chunk_bytes": 64 << 10, "threads": 2}
LARGE = {"chunk_bytes": 4 << 20, "threads": 2}
NO_PROBE = {"cachestat": errno.ENOSYS, "mincore": errno.ENOSYS}
BLIND = {**NO_PROBE, "preadv2": errno.EOPNOTSUPP}


def _evict(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _memory() -> dict[str, Calls]:
    return {"memory": Allocations()} if Allocations.preloaded() else {}


@contextlib.contextmanager
def _on_cpu(
    place: Place,
    api: str,
    options: dict[str, Any],
    *,
    cold: bool = False,
    blind: dict[str, int] | None = None,
    file: str = "small",
) -> Iterator[Load]:
    path, twin = place.file(file), place.file(f"{file}-twin")
    expected = _expected(api, twin)
    calls: dict[str, Calls] = {"system": SystemCalls(blind), **_memory()}
    call = {**APIS, "arrays": arrays}[api]
    with fastst_patch.patched(small_file_bytes=0, **{**SMALL, **options}):
        load = Load(partial(call, path, "cpu"), expected, path, calls, owns=api == "sharded")
        if cold:
            os.sync()
            load.before = partial(_evict, path)
        yield load


CPU_WAYS: dict[str, dict[str, Any]] = {
    "mmap": {"io": "mmap"}, "buffered": {"io": "buffered"}, "direct": {"io": "direct"},
    "drop": {"page_cache": "drop"}, "owned": {"tensors": "owned"},
    "owned direct": {"tensors": "owned", "io": "direct"},
}  # fmt: skip
PROBES: dict[str, dict[str, Any]] = {
    "readahead": {"cold": True}, "readahead without probes": {"blind": BLIND},
    "readahead by mincore": {"cold": True, "blind": {"cachestat": errno.ENOSYS}},
    "readahead in huge pages": {"cold": True, "file": "large", "options": LARGE},
    "readahead in huge pages, without probes": {"blind": BLIND, "file": "large", "options": LARGE},
}  # fmt: skip


def _is_in_thin(ways: Iterable[str], way: str, api: str) -> bool:
    """The thinned matrix has every way once, and every function."""
    return api == list(APIS)[list(ways).index(way) % len(APIS)]


def _cpu_paths() -> Iterator[LoadPath]:
    for way, options in CPU_WAYS.items():
        for api in APIS:
            how = partial(_on_cpu, api=api, options=options)
            yield LoadPath(f"{way}, {api}", how, thin=_is_in_thin(CPU_WAYS, way, api))
    for way, how in PROBES.items():
        for api in ("load_file", "walk"):
            chosen = partial(_on_cpu, api=api, **{"options": {}, **how})
            yield LoadPath(f"{way}, {api}", chosen, thin=api == "load_file")
    for way in ("mmap", "buffered"):
        how = {"api": "arrays", "options": {**CPU_WAYS[way], "chunk_bytes": 1 << 20}}
        yield LoadPath(f"{way}, numpy", partial(_on_cpu, file="large", **how))


# ---------------------------------------------------------------- to a device


@contextlib.contextmanager
def _on_device(
    place: Place,
    api: str,
    options: dict[str, Any],
    *,
    kind: str = "cuda",
    before: Callable[[], None] = lambda: None,
    blind: dict[str, int] | None = None,
) -> Iterator[Load]:
    path, driver = place.file("small"), place.driver
    expected = _expected(api, place.file("small-twin"))
    kinds = ["cuda", "cufile"] if options.get("io") == "gds" else [kind]
    calls: dict[str, Calls] = {
        "system": SystemCalls(blind), **_memory(), "driver": DriverCalls(driver, *kinds)
    }  # fmt: skip
    with (
        fake_device.fake_cuda(driver, kind=kind),
        pytest.MonkeyPatch.context() as monkeypatch,
        fastst_patch.patched(small_file_bytes=0, **{**SMALL, **options}),
    ):
        asked = fake_device.StockOnCpu(monkeypatch, driver)
        call = partial(APIS[api], path, "cuda")
        load = Load(call, expected, path, calls, owns=api == "sharded", driver=driver)
        load.before, load.asked = before, asked
        yield load


@contextlib.contextmanager
def _unified(
    place: Place, integrated: int, page_tables: int, blind: dict[str, int] | None = None
) -> Iterator[Load]:
    """To a device whose memory is the host's, or which reads the host's page tables."""

    def before() -> None:  # what is cleared after a load
        place.driver.lib.fake_unified(integrated, page_tables)

    with _on_device(place, "load_file", {"io": "auto"}, before=before, blind=blind) as load:
        yield load


@contextlib.contextmanager
def _upload(place: Place) -> Iterator[Load]:
    """``Module.to`` of a module with tensors of a file."""
    path, driver = place.file("small"), place.driver
    expected = _expected("load_file", place.file("small-twin"))
    calls: dict[str, Calls] = {
        "system": SystemCalls(), **_memory(), "driver": DriverCalls(driver, "cuda")
    }  # fmt: skip

    def move() -> dict[str, torch.Tensor]:
        with fastst_patch.config_context(io="mmap"):
            loaded = safetensors.torch.load_file(path)
        module = nn.Module()
        for name, tensor in loaded.items():
            module.register_buffer(f"t_{name}", tensor)
        module.to("cuda")
        return {name[2:]: tensor for name, tensor in module.named_buffers()}

    with (
        fake_device.fake_cuda(driver),
        pytest.MonkeyPatch.context() as monkeypatch,
        fastst_patch.patched(**SMALL),
    ):
        let_modules_move(monkeypatch)
        yield Load(move, expected, path, calls, driver=driver)


DEVICE_WAYS: dict[str, dict[str, Any]] = {
    "ring": {"tensors": "dlpack", "io": "buffered"},
    "ring+direct": {"tensors": "dlpack", "io": "direct"},
    "ring owned": {"tensors": "owned", "io": "buffered"},
    "ring+direct owned": {"tensors": "owned", "io": "direct"},
    "gds": {"tensors": "dlpack", "io": "gds"},
    "gds owned": {"tensors": "owned", "io": "gds"},
    "auto": {"io": "auto"},
}
FRESH: dict[str, dict[str, Any]] = {
    "ring": {"options": DEVICE_WAYS["ring"]},
    "gds": {"options": DEVICE_WAYS["gds"]},
    "hip": {"options": DEVICE_WAYS["ring owned"], "kind": "hip"},
}


def _device_paths() -> Iterator[LoadPath]:
    for way, options in DEVICE_WAYS.items():
        for api in APIS:
            how = partial(_on_device, api=api, options=options)
            yield LoadPath(f"{way}, {api}", how, thin=_is_in_thin(DEVICE_WAYS, way, api))
    for way in ("ring", "auto"):
        hip = partial(_on_device, api="load_file", kind="hip", options=DEVICE_WAYS[way])
        yield LoadPath(f"hip {way}, load_file", hip)
    coherent = partial(_unified, integrated=0, page_tables=1)
    yield LoadPath("auto, slots that the driver allocates, load_file", coherent)
    shared = partial(_unified, integrated=1, page_tables=0, blind=NO_PROBE)
    yield LoadPath("auto, into the host's memory, load_file", shared)
    yield LoadPath("upload, Module.to", _upload)
    for way, chosen in FRESH.items():
        first = partial(_on_device, api="load_file", **chosen)
        yield LoadPath(f"{way}, first of its process", first, fresh=True)


# ---------------------------------------------------------------- of remote files

KEEPING = (partial_file, store)
"""The modules that write the folder of ``remote_cache``."""


@contextlib.contextmanager
def remote_load(
    place: Place, api: str, *, device: str = "cpu", keep: bool = False
) -> Iterator[Load]:
    content = Path(place.file("small")).read_bytes()
    expected = _expected(api, place.file("small-twin"))
    folder = place.folder / "kept"
    options: dict[str, Any] = {"host_memory_budget": 512 << 10}
    calls: dict[str, Calls] = {"system": SystemCalls(), **_memory()}
    with contextlib.ExitStack() as stack:
        served = stack.enter_context(memory_source.served({URL: content}))
        calls["source"] = Reads(served)
        driver = place.driver if device == "cuda" else None
        if driver is not None:
            stack.enter_context(fake_device.fake_cuda(driver))
            monkeypatch = stack.enter_context(pytest.MonkeyPatch.context())
            fake_device.StockOnCpu(monkeypatch, driver)
            calls["driver"] = DriverCalls(driver, "cuda")
        if keep:
            options["remote_cache"] = str(folder)
            calls["python"] = PythonCalls(KEEPING, errno.ENOSPC)
        stack.enter_context(fastst_patch.patched(small_file_bytes=0, **{**SMALL, **options}))
        name = ".safetensors" if keep else URL.rpartition("/")[2]  # a kept one has its own
        call = partial(APIS[api], URL, device)
        load = Load(partial(_twice, call) if keep else call, expected, name, calls, driver=driver)
        load.owns = api == "sharded"
        load.before = partial(_start_anew, served, folder)
        load.settle = _settled
        yield load


def _twice(call: Callable[[], Any]) -> Any:
    """Load a remote file, which is kept meanwhile, and the kept one."""
    call()
    _settled()
    return call()


def _start_anew(served: memory_source.Store, folder: Path) -> None:
    served.reads.clear()
    served.opened.clear()
    shutil.rmtree(folder, ignore_errors=True)


def _settled() -> None:
    """Wait for threads that name complete files, and forget the headers of these."""
    for thread in threading.enumerate():
        if thread.name == "fastst-cache":
            thread.join()
    module = sys.modules[engine.File.__module__]
    module._layouts = type(module._layouts)()


def _remote_paths() -> Iterator[LoadPath]:
    for api in APIS:
        here = partial(remote_load, api=api)
        yield LoadPath(f"remote, {api}", here, thin=api in ("load_file", "walk"))
    for api in APIS:
        to_device = partial(remote_load, api=api, device="cuda")
        yield LoadPath(f"remote to a device, {api}", to_device, thin=api == "load_file")
    yield LoadPath("remote and kept, load_file", partial(remote_load, api="load_file", keep=True))


# ---------------------------------------------------------------- measuring


@contextlib.contextmanager
def _ceiling(place: Place, direct: bool) -> Iterator[Load]:
    """What ``fastst-patch bench`` compares with."""
    path = place.file("small")
    calls: dict[str, Calls] = {"system": SystemCalls(), **_memory()}

    def read() -> int:
        return engine.read_ceiling(path, direct=direct, threads=2, chunk_bytes=64 << 10)[0]

    yield Load(read, os.path.getsize(path), path, calls)


def load_paths() -> Sequence[LoadPath]:
    """All paths."""
    return [
        *_cpu_paths(), *_device_paths(), *_remote_paths(),
        LoadPath("bench, page cache", partial(_ceiling, direct=False)),
        LoadPath("bench, O_DIRECT", partial(_ceiling, direct=True)),
    ]  # fmt: skip
