"""What can fail below a load, by name, and how: the calls of the fault matrix (fault_matrix.py).

The names are read from the sources of the engine, so that a new call is in the matrix without
being listed anywhere.
"""

from __future__ import annotations

import ctypes
import errno
import inspect
import os
import random
import re
import shutil
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol
from unittest import mock

import fake_device
from places import ROOT

from fastst_patch import engine
from fastst_patch.sources.base import RemoteError

NATIVE = ROOT / "native"
FOREVER = 1 << 62
SEED = 20


class How(NamedTuple):
    """One way in which a call fails.

    Attributes:
        text: for people.
        count: of calls in a row that fail.
        code: an errno, or a driver's status; 0: a read is cut.
        short: bytes that are left of a read that is cut.
    """

    text: str
    count: int = 1
    code: int = 0
    short: int = 0


def numbers_of(count: int, how: How, thin: bool, key: str) -> list[int]:
    """Which of so many calls fail: all; or the first, the second, the last, and one by the seed.

    From the last on is as good as the last.
    """
    if not thin or count < 2:
        return list(range(1, count + 1))
    one = random.Random(f"{SEED} {key} {how.text}").randint(min(3, count), count)
    return sorted({1, one} if how.count != 1 else {1, 2, one, count})


class Calls(Protocol):
    """Calls of a kind."""

    def ways(self) -> dict[str, list[How]]:
        """The ways in which each call fails, by its name."""

    def count(self) -> None:
        """Count calls from now on; none fails."""

    def arm(self, name: str, how: How, n: int) -> None:
        """Let the n-th call from now fail."""

    def seen(self, name: str) -> int:
        """How many calls there were since `count` or `arm`."""

    def disarm(self) -> None:
        """No call fails from now on."""


def _twice(text: str, code: int) -> list[How]:
    """It fails once, and from then on."""
    return [How(text, 1, code), How(f"{text} from then on", FOREVER, code)]


def _by_errno(*names: str) -> list[How]:
    return [how for name in names for how in _twice(name, getattr(errno, name))]


def size_of(calls: Mapping[str, Calls], counts: Mapping[str, Mapping[str, int]]) -> int:
    """How many faults there are: each way of each call."""
    return sum(
        len(ways) * counts[kind][name]
        for kind, one in calls.items() for name, ways in one.ways().items()
    )  # fmt: skip


# ---------------------------------------------------------------- the table of system calls

# EINTR and EAGAIN come once: who gets them for ever tries for ever, until Ctrl-C.
_READ = [
    *_by_errno("EIO"), How("EINTR", 1, errno.EINTR), How("EAGAIN", 1, errno.EAGAIN),
    How("no bytes", 1, 0, 0), How("333 bytes", 1, 0, 333),
    How("333 bytes from then on", FOREVER, 0, 333),
]  # fmt: skip
_SYSTEM: dict[str, list[How]] = {
    "pread": [*_READ, *_by_errno("EINVAL", "EOPNOTSUPP")],  # O_DIRECT refused
    "preadv": _READ,
    "open": _by_errno("EMFILE", "ENOENT", "EACCES", "EINVAL"),
    "stat": _by_errno("EACCES"),
    "fstat": _by_errno("EIO"),
    "preadv2": _by_errno("EOPNOTSUPP", "EAGAIN"),
    "mmap": _by_errno("ENOMEM"),
    "madvise": _by_errno("EINVAL", "ENOMEM", "EAGAIN"),
    "readahead": _by_errno("EINVAL"),
    "cachestat": _by_errno("ENOSYS"),
    "mincore": _by_errno("ENOSYS"),
    "fadvise": _by_errno("EINVAL"),
    "pthread_create": _by_errno("EAGAIN", "EINVAL"),
}


def system_calls() -> list[str]:
    """The names in the engine's table."""
    text = (NATIVE / "base" / "fst_sys.h").read_text(encoding="utf-8")
    return re.findall(r"\bCALL\((\w+),", text)


class SystemCalls:
    """The engine's table of system calls.

    Args:
        blind: calls that always fail, with an errno; they are in other paths of the matrix.
    """

    def __init__(self, blind: dict[str, int] | None = None) -> None:
        self._blind = blind or {}

    def ways(self) -> dict[str, list[How]]:
        return {name: _SYSTEM[name] for name in system_calls() if name not in self._blind}

    def count(self) -> None:
        engine.clear_faults()
        for name in system_calls():
            engine.set_fault(name, first=FOREVER)
        for name, code in self._blind.items():
            engine.set_fault(name, errno=code)

    def arm(self, name: str, how: How, n: int) -> None:
        self.count()
        engine.set_fault(name, first=n, count=how.count, errno=how.code, short_bytes=how.short)

    def seen(self, name: str) -> int:
        return engine.fault_calls(name)

    def disarm(self) -> None:
        engine.clear_faults()


# ---------------------------------------------------------------- the device's driver

LOST = 0  # as a How's count: the device does not come back
_OUT_OF_MEMORY = 2
_CANNOT_FAIL = ("cuGetErrorName", "hipGetErrorName", "cuFileHandleDeregister")
NOT_TAKEN_BACK = re.compile("Unregister|Deregister|Free")
"""Functions by which memory is given back. What a driver does not take stays with it."""

_MEMORY = re.compile("Host(Alloc|Register)|Malloc|MemAlloc")


def driver_calls() -> dict[str, list[str]]:
    """What the engine calls in each library: cuda, hip, cufile."""
    sources = "".join(
        path.read_text(encoding="utf-8")
        for pattern in ("*.def", "*.c") for path in sorted((NATIVE / "device").glob(pattern))
    )  # fmt: skip
    fake = (NATIVE / "tests" / "fake_driver.def").read_text(encoding="utf-8")
    names = set(re.findall(r'"((?:cu|hip)[A-Z]\w+)"', sources))
    names &= set(re.findall(r"\w+", fake))  # the others are parts of messages
    found: dict[str, list[str]] = {"cuda": [], "hip": [], "cufile": []}
    for name in sorted(names):
        kind = "hip" if name.startswith("hip") else "cufile" if name.startswith("cuF") else "cuda"
        found[kind].append(name)
    return found


class DriverCalls:
    """The fake driver's functions.

    Args:
        driver: the fake.
        kinds: of `driver_calls`.
    """

    def __init__(self, driver: fake_device.Driver, *kinds: str) -> None:
        self._driver = driver
        self._names = [name for kind in kinds for name in driver_calls()[kind]]

    def ways(self) -> dict[str, list[How]]:
        found = {}
        for name in self._names:
            if name in _CANNOT_FAIL:
                found[name] = []
            elif name.startswith("cuFile"):
                found[name] = _twice("5001", 5001)
            else:
                found[name] = [How("719", 1, 719), How("the device is lost", LOST, 719)]
                if _MEMORY.search(name):
                    found[name] += _twice("no memory", _OUT_OF_MEMORY)
        return found

    def count(self) -> None:
        self._driver.clear()

    def arm(self, name: str, how: How, n: int) -> None:
        self.count()
        self._driver.fail(name, n, how.count, how.code)

    def seen(self, name: str) -> int:
        return self._driver.calls(name)

    def disarm(self) -> None:
        self._driver.clear()
        self._driver.pop_contexts()  # a lost device pops none


# ---------------------------------------------------------------- allocations of the C code


class Allocations:
    """What the extension allocates, and the files that it opens by ``fopen``.

    Needs native/tests/preload_malloc.c, preloaded.
    """

    _KINDS = ("malloc", "fopen")

    def __init__(self) -> None:
        self._lib = ctypes.CDLL(None)
        for name, result in (
            ("seen", ctypes.c_uint64), ("blocks", ctypes.c_int64), ("mapped", ctypes.c_int64),
            ("site", ctypes.c_size_t),
        ):  # fmt: skip
            getattr(self._lib, f"fault_{name}").restype = result
        self._lib.fault_arm.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64]
        self._lib.fault_watch.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
        file = engine.native_file()
        assert file is not None
        with open("/proc/self/maps", encoding="utf-8") as maps:
            parts = [line.split() for line in maps if line.rstrip().endswith(file)]
        self._base = min(int(part[0].split("-")[0], 16) for part in parts)
        (code,) = [part[0].split("-") for part in parts if part[1].startswith("r-x")]
        self._lib.fault_watch(*(int(address, 16) for address in code))

    @staticmethod
    def preloaded() -> bool:
        """Whether this process can watch allocations."""
        return hasattr(ctypes.CDLL(None), "fault_watch")

    def ways(self) -> dict[str, list[How]]:
        return {name: _twice("ENOMEM", errno.ENOMEM) for name in self._KINDS}

    def count(self) -> None:
        for kind in range(len(self._KINDS)):
            self._lib.fault_arm(kind, 0, 0)

    def arm(self, name: str, how: How, n: int) -> None:
        self.count()
        self._lib.fault_arm(self._KINDS.index(name), n, how.count)

    def seen(self, name: str) -> int:
        return int(self._lib.fault_seen(self._KINDS.index(name)))

    def disarm(self) -> None:
        self.count()

    def held(self) -> tuple[int, int]:
        """Blocks that are not freed, and bytes that are mapped."""
        return int(self._lib.fault_blocks()), int(self._lib.fault_mapped())

    def sites(self) -> set[int]:
        """Offsets in the extension behind the calls that have allocated so far."""
        found = set()
        while site := self._lib.fault_site(len(found)):
            found.add(site - self._base)
        return found


def allocation_sites() -> dict[int, str] | None:
    """Every call in the extension that allocates: the offset behind it, and what it is.

    That is its function and the two instructions before: the same for the copies that a compiler
    makes of one call in C. None where there is no ``objdump``.
    """
    file = engine.native_file()
    if file is None or shutil.which("objdump") is None:
        return None
    command = ["objdump", "-d", "--no-show-raw-insn", file]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[int, str] = {}
    function, call = "", ""
    before: deque[str] = deque(maxlen=2)
    for line in text.splitlines():
        if line.endswith(">:"):
            function = line.partition(" ")[2]
        instruction = re.match(r"\s*([0-9a-f]+):\s+(.*)", line)
        if instruction is None:
            continue
        if call:
            found[int(instruction[1], 16)] = call
        name = re.search(r"<(malloc|calloc|realloc|strdup)@plt>", instruction[2])
        call = f"{function} {'; '.join(before)}; {name[1]}" if name else ""
        before.append(" ".join(instruction[2].split()))
    return found


# ---------------------------------------------------------------- calls of Python's modules


_NEVER = ("os.access", "os.close", "os.getpid", "os.urandom")
"""Calls of which nothing is expected that can fail."""


def python_calls(*modules: Any) -> list[str]:
    """The calls of ``os``, ``fcntl`` and ``mmap`` in the sources of modules."""
    text = "".join(inspect.getsource(module) for module in modules)
    return sorted({*re.findall(r"\b(?:os|fcntl|mmap)\.[a-z_]+(?=\()", text)} - {*_NEVER})


class _Counted:
    """A module, some functions of which are counted and fail."""

    def __init__(self, module: Any, calls: PythonCalls) -> None:
        self._module = module
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        return self._calls.wrap(self._module.__name__, name, getattr(self._module, name))


class PythonCalls:
    """Functions of ``os``, ``fcntl`` and ``mmap`` that modules of ours call.

    Args:
        modules: in which ``os``, and so on, are replaced.
        code: the errno.
    """

    KILLED = -1
    """As a How's code: the process is killed at the call."""

    def __init__(self, modules: Sequence[Any], code: int) -> None:
        self._names = python_calls(*modules)
        self._code = code
        self._lock = threading.Lock()
        self._seen: dict[str, int] = {}
        self._armed: tuple[str, int, int] = ("", 0, 0)
        self._kills = False
        for module in modules:
            for name in {name.split(".")[0] for name in self._names} & set(vars(module)):
                mock.patch.object(module, name, _Counted(getattr(module, name), self)).start()

    def wrap(self, module: str, name: str, function: Any) -> Any:
        """The function, or one that counts and fails."""
        full = f"{module}.{name}"
        if full not in self._names:
            return function

        def call(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                number = self._seen[full] = self._seen.get(full, 0) + 1
                armed, first, count = self._armed
            if full == armed and first <= number < first + count:
                if self._kills:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(self._code, os.strerror(self._code))
            return function(*arguments, **options)

        return call

    def ways(self) -> dict[str, list[How]]:
        text = errno.errorcode[self._code]
        return {name: _twice(text, self._code) for name in self._names}

    def count(self) -> None:
        with self._lock:
            self._seen.clear()
            self._armed = ("", 0, 0)

    def arm(self, name: str, how: How, n: int) -> None:
        self.count()
        self._kills = how.code == self.KILLED
        self._armed = (name, n, how.count)

    def seen(self, name: str) -> int:
        return self._seen.get(name, 0)

    def disarm(self) -> None:
        self._armed = ("", 0, 0)


class Reads:
    """Reads of a remote file, over a store as of memory_source.py."""

    def __init__(self, store: Any) -> None:
        self._seen, self._first, self._count = 0, 0, 0
        self._lock = threading.Lock()
        store.before = self._before

    def _before(self, offset: int, nbytes: int) -> None:
        with self._lock:
            self._seen += 1
            number = self._seen
        if self._first and self._first <= number < self._first + self._count:
            raise RemoteError("here", "model.safetensors", "it broke", offset=offset, status=503)

    def ways(self) -> dict[str, list[How]]:
        return {"read of a source": _twice("RemoteError", 0)}

    def count(self) -> None:
        self._seen, self._first = 0, 0

    def arm(self, name: str, how: How, n: int) -> None:
        self._seen, self._first, self._count = 0, n, how.count

    def seen(self, name: str) -> int:
        return self._seen

    def disarm(self) -> None:
        self._first = 0
