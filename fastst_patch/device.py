"""Devices as torch sees them: which one an argument names, its memory, its current stream.

The layers above reach a device's runtime only by `Runtime`. Tests replace it (`replaced`) with one
over the fake driver, where CPU memory stands for a device's.
"""

from __future__ import annotations

import contextlib
import logging
import re
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from . import engine
from .errors import Fallback

if TYPE_CHECKING:
    import torch

__all__ = [
    "Device",
    "Memory",
    "Runtime",
    "Sample",
    "device_of",
    "find_device",
    "parse_device",
    "prove",
    "prove_tensor",
    "replaced",
    "sample_of",
]

_NAMED = re.compile(r"cuda(?::([0-9]{1,4}))?", re.ASCII)

PROOF_BYTES = 4 << 20
"""Read back and compared after the first load to a device: one chunk."""

_MORE = 16  # A verified sample does not vouch for one so many times larger.


class Runtime:
    """CUDA, or ROCm by the same names, through torch. Nothing is initialised before it is used."""

    def fallback(self, ordinal: int) -> str | None:
        """Why a device cannot be used in this process now; None when it can."""
        import torch

        if torch.version.cuda is None and torch.version.hip is None:
            return "this torch is a build without CUDA"
        if torch.cuda._is_in_bad_fork():
            return "CUDA cannot be used again in a forked process"
        if not torch.cuda.is_available() or ordinal >= torch.cuda.device_count():
            return f"torch sees no device cuda:{ordinal}"
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            # On the device itself: this call creates a context on the current device.
            with torch.cuda.device(ordinal):
                if torch.cuda.is_current_stream_capturing():
                    return "a CUDA graph is being captured"
        return None

    def native(self, ordinal: int) -> engine.DeviceHandle:
        """The engine's device, in the primary context that torch uses too."""
        import torch

        torch.cuda.init()  # type: ignore[no-untyped-call]
        return engine.open_device(ordinal, kind="cuda" if torch.version.hip is None else "hip")

    def current(self) -> int:
        """Number of the device that ``"cuda"`` means in torch, now and in this thread."""
        import torch

        return torch.cuda.current_device()

    def stream(self, ordinal: int) -> int:
        """Address of the stream on which torch allocates now."""
        import torch

        return int(torch.cuda.current_stream(ordinal).cuda_stream)

    def synchronize(self, ordinal: int) -> None:
        """Wait for the work that is pending on this thread's current stream of a device."""
        import torch

        torch.cuda.current_stream(ordinal).synchronize()

    @contextlib.contextmanager
    def beside(self, ordinal: int) -> Iterator[None]:
        """Run torch's work on a side stream, after what is pending on the current one.

        The context ends when that work has run, on errors too: its memory may be freed then.
        """
        import torch

        side = _sides.get(ordinal)
        if side is None:
            stream = torch.cuda.Stream(ordinal)  # type: ignore[no-untyped-call]
            side = _sides.setdefault(ordinal, stream)
        side.wait_stream(torch.cuda.current_stream(ordinal))
        try:
            with torch.cuda.stream(side):
                yield
        finally:
            side.synchronize()

    def arena(self, nbytes: int, ordinal: int) -> engine.Arena:
        """A block from torch's caching allocator. `Arena.keep` is the block as `record` takes it.

        Raises:
            torch.OutOfMemoryError: there is none.
        """
        import torch

        block = torch.empty(nbytes, dtype=torch.uint8, device=f"cuda:{ordinal}")
        arena = engine.adopt_arena(torch._C._to_dlpack(block))
        arena.keep = block
        return arena

    def empty(self, shape: list[int], dtype: torch.dtype, ordinal: int) -> torch.Tensor:
        """A tensor with an allocation of its own. Raises as `arena`."""
        import torch

        # A number rather than a name, which would be parsed for every tensor.
        return torch.empty(shape, dtype=dtype, device=ordinal)

    def record(self, memory: Any, ordinal: int) -> None:
        """Let the allocator reuse memory only after the current stream's work up to its release.

        Args:
            memory: a tensor from `empty`, or ``keep`` of an arena from `arena`. Tensors over an
                arena are not memory of torch's allocator, which would ignore them.
            ordinal: of its device.
        """
        import torch

        memory.record_stream(torch.cuda.current_stream(ordinal))

    def copy(self, view: torch.Tensor, ordinal: int) -> torch.Tensor:
        """A copy of a tensor, which is pending on the current stream. Raises as `arena`."""
        return view.clone()

    def cached(self, ordinal: int) -> int:
        """Bytes of a device that torch has allocated and nobody uses."""
        import torch

        return torch.cuda.memory_reserved(ordinal) - torch.cuda.memory_allocated(ordinal)

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether an exception says that the device's memory is used up."""
        import torch

        return isinstance(error, torch.cuda.OutOfMemoryError)


_sides: dict[int, torch.cuda.Stream] = {}  # by ordinal


class Memory(NamedTuple):
    """Where a device's memory is, and what loads make of that. docs/devices.md has the reasons.

    Attributes:
        policy: both, in a line for users.
        shared: whether it is the host's. A file that stays cached is then in memory twice.
        counts_cached: whether the driver counts cached pages as taken, although the kernel gives
            them up when the device needs memory.
    """

    policy: str
    shared: bool
    counts_cached: bool


_NEVER = "(never run on such a device)"
_OWN = Memory("memory of its own; copies start from pinned memory", False, False)
_COHERENT = Memory(
    "memory of its own, reads the host's page tables; copies start from memory that the driver"
    f" allocates, never from a file's map {_NEVER}",
    False,
    False,
)
_SHARED = (
    "shares the host's memory; copies start from pinned memory, and files that are not cached are"
    f" read past the page cache {_NEVER}"
)


def _memory_of(kind: str, info: engine.DeviceInfo) -> Memory:
    if info.integrated:
        # CUDA tells the kernel's MemFree there, ROCm what is left of its own limit.
        return Memory(_SHARED, True, counts_cached=kind == "cuda")
    return _COHERENT if info.host_page_tables else _OWN


_runtime = Runtime()
# No lock: each update is one operation on one dict, and all threads write the same value.
_opened: dict[tuple[int, int], engine.DeviceHandle] = {}  # by runtime and ordinal
_memories: dict[tuple[int, int], Memory] = {}
_proved: dict[tuple[int, int], int] = {}  # bytes of the largest sample that was right
_refused: dict[int, str] = {}  # ordinal -> why, once bytes came out wrong


class Device:
    """A device that a load goes to.

    Attributes:
        name: as tensors show it, such as ``cuda:0``.
        argument: as the caller named it, for calls of stock.
        ordinal: its number.
        runtime: how it is used.
    """

    def __init__(self, argument: object, ordinal: int, runtime: Runtime) -> None:
        self.name = f"cuda:{ordinal}"
        self.argument = argument
        self.ordinal = ordinal
        self.runtime = runtime

    def check(self) -> None:
        """Raise Fallback unless the device can be used in this process now."""
        why = _refused.get(self.ordinal) or self.runtime.fallback(self.ordinal)
        if why is not None:
            raise Fallback(why)

    def native(self) -> engine.DeviceHandle:
        """The engine's device, opened on first use in the process.

        Raises:
            Fallback: it cannot be opened.
        """
        key = (id(self.runtime), self.ordinal)
        found = _opened.get(key)
        if found is None:
            found = _opened.setdefault(key, self.runtime.native(self.ordinal))
        return found

    def memory(self) -> Memory:
        """Where its memory is. Raises as `native`."""
        key = (id(self.runtime), self.ordinal)
        found = _memories.get(key)
        if found is None:
            native = self.native()
            found = _memories[key] = _memory_of(native.kind, engine.device_info(native))
        return found

    def wants(self, nbytes: int) -> bool:
        """Whether a sample of so many bytes is to be verified: no similar one has been yet."""
        proved = _proved.get((id(self.runtime), self.ordinal), 0)
        return proved < PROOF_BYTES and nbytes >= _MORE * proved

    def room(self) -> int:
        """Bytes that can be allocated there now, in pieces of any size. Raises as `native`."""
        info = engine.device_info(self.native())
        free = info.free_bytes
        if self.memory().counts_cached:
            free = max(free, min(engine.memory_headroom() or 0, info.total_bytes))
        return free + self.runtime.cached(self.ordinal)

    def synchronize(self) -> None:
        """Wait for the work pending on this thread's current stream: then any stream may use it."""
        self.runtime.synchronize(self.ordinal)

    def stream(self) -> int:
        """Address of the stream on which this thread allocates there now."""
        return self.runtime.stream(self.ordinal)

    def hand_over(self, memory: Any, allocated_on: int) -> None:
        """Give memory to the calling thread, which may use it on its current stream.

        torch reuses freed memory on the stream that it was allocated on, without waiting for other
        streams. If the caller's stream is another one, the memory is recorded on it.

        Args:
            memory: as `Runtime.record` takes it.
            allocated_on: address of the stream that was current then.
        """
        if self.runtime.stream(self.ordinal) != allocated_on:
            self.runtime.record(memory, self.ordinal)

    def copy(self, view: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor there, which has run: any stream may use it.

        Raises:
            torch.OutOfMemoryError: there is no memory for it.
            Fallback: the device's driver failed.
        """
        try:
            result = self.runtime.copy(view, self.ordinal)
            if result.numel():
                self.synchronize()
        except RuntimeError as error:
            if self.runtime.is_out_of_memory(error):
                raise
            raise Fallback.alone(error) from None
        return result

    def destination(self, pinned_bytes: int) -> engine.Destination:
        """For a job on memory that was allocated just now, by this thread."""
        return engine.Destination(self.native(), self.runtime.stream(self.ordinal), pinned_bytes)


def find_device(argument: object) -> Device | None:
    """The device that a caller's argument names, as stock reads it; None for the CPU.

    Raises:
        Fallback: it is another kind of device, cannot be used now, or stock must judge it.
    """
    if argument is None or (type(argument) is str and argument == "cpu"):
        return None
    ordinal: int | None = None
    if type(argument) is int:
        ordinal = argument if 0 <= argument < 1 << 16 else None
    elif type(argument) is str:
        named = _NAMED.fullmatch(argument)
        ordinal = int(named[1] or 0) if named else None
    if ordinal is None:
        raise Fallback(f"device {argument!r} is not accelerated")
    device = Device(argument, ordinal, _runtime)
    device.check()
    return device


def parse_device(device: object) -> torch.device:
    """A device as torch names it. A number is a CUDA device's; None is the CPU.

    Raises:
        RuntimeError, TypeError: torch knows no such device.
    """
    import torch

    if isinstance(device, int) and not isinstance(device, bool):
        return torch.device("cuda", device)
    given: Any = "cpu" if device is None else device
    return torch.device(given)


def device_of(named: torch.device) -> Device | None:
    """The device that torch's own ``.to`` moves to; None unless it is a CUDA device.

    Raises:
        Fallback: it cannot be used now.
    """
    if named.type != "cuda":
        return None
    if named.index is None:
        Device("cuda", 0, _runtime).check()  # before asking for the current one makes a context
    device = Device(named, _runtime.current() if named.index is None else named.index, _runtime)
    device.check()
    return device


class Sample(NamedTuple):
    """Bytes of a load to be read back."""

    file_offset: int
    nbytes: int
    arena_offset: int

    @property
    def end(self) -> int:
        """File offset of the byte behind the last one."""
        return self.file_offset + self.nbytes


def sample_of(device: Device, segments: array[int]) -> Sample | None:
    """The bytes for `prove` to read back: the first whole chunk, or all of the largest segment.

    Args:
        device: that the load goes to.
        segments: of the load: flat triples (file offset, bytes, arena offset).

    Returns:
        None for a load of nothing, or when enough was read back from the device before.
    """
    if not len(segments) or not device.wants(PROOF_BYTES):
        return None
    nbytes = min(max(segments[1::3]), PROOF_BYTES)
    if not device.wants(nbytes):
        return None
    at = next(at for at in range(0, len(segments), 3) if segments[at + 1] >= nbytes)
    return Sample(segments[at], nbytes, segments[at + 2])


def prove(device: Device, arena: engine.Arena, file: engine.File, sample: Sample | None) -> None:
    """Read a chunk of the process's first load to a device back, and compare it with the file.

    If that load was tiny, the next one that is much larger is verified, too.

    Args:
        device: that the load went to.
        arena: in which the sample's bytes have landed.
        file: from which they come.
        sample: of the load.

    Raises:
        Fallback: it differs. From then on everything for that device goes to stock.
    """
    if sample is None or not device.wants(sample.nbytes):
        return
    equal = engine.compare(device.native(), arena, file, **sample._asdict())
    _judge(device, sample.nbytes, bool(equal), file.path)


def prove_tensor(device: Device, moved: torch.Tensor, source: torch.Tensor) -> None:
    """The same for a tensor that came from memory, of which it is a contiguous copy.

    Of a source with gaps only the bytes that are compared are copied. Raises as `prove`.
    """
    import torch

    from .tensors import raw_bytes

    nbytes = min(source.nbytes, PROOF_BYTES)
    if not device.wants(nbytes):
        return
    count = nbytes // source.itemsize
    raw = [raw_bytes(_first(t.detach(), count)).cpu() for t in (moved, source)]
    _judge(device, nbytes, torch.equal(raw[0], raw[1]), "a tensor")


def _first(t: torch.Tensor, count: int) -> torch.Tensor:
    """The first elements of a tensor, in one dimension."""
    while t.dim() > 1:
        rest = t[0].numel()
        if rest < count:
            t = t[: -(-count // rest)]
            break
        t = t[0]
    return t.reshape(-1)[:count]


def _judge(device: Device, nbytes: int, equal: bool, what: str) -> None:
    if equal:
        _proved[id(device.runtime), device.ordinal] = nbytes
        return
    why = f"bytes read back from {device.name} differed from the file's or the source's"
    _refused[device.ordinal] = why
    logging.getLogger("fastst_patch").error(
        "%s: %s; from now on stock loads to this device. Please report this.", what, why
    )
    raise Fallback(why)


@contextlib.contextmanager
def replaced(runtime: Runtime) -> Iterator[None]:
    """For tests: put another runtime in CUDA's place, and forget the state of the last one."""
    global _runtime  # noqa: PLW0603 - the one place where it changes
    before, _runtime = _runtime, runtime
    _forget()
    try:
        yield
    finally:
        _runtime = before
        _forget()


def _forget() -> None:
    _opened.clear()
    _memories.clear()
    _proved.clear()
    _refused.clear()
