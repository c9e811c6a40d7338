"""Devices as torch sees them: which one a caller means, its memory, and the stream it came on.

`Runtime` is all that the layers above know of one; the tests put a runtime over the fake driver
in its place (`replaced`), where CPU memory stands for a device's.
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
    "Runtime",
    "Sample",
    "parse_device",
    "prove",
    "prove_tensor",
    "replaced",
    "sample_of",
    "target",
    "torch_target",
]

_NAMED = re.compile(r"cuda(?::([0-9]{1,4}))?", re.ASCII)

PROOF_BYTES = 4 << 20
"""Read back and compared after the first load to a device: one chunk."""

_MORE = 16  # Bytes that were right say little of so many times more.


class Runtime:
    """CUDA, or ROCm behind the same names, through torch. Nothing is touched before it is used."""

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
            # Asked on its own device: the question alone makes a context on the current one.
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

    def settle(self, ordinal: int) -> None:
        """Wait for what this thread has pending on a device."""
        import torch

        torch.cuda.current_stream(ordinal).synchronize()

    @contextlib.contextmanager
    def beside(self, ordinal: int) -> Iterator[None]:
        """Work of torch's goes to a stream of its own, behind what the current one has pending.

        Over when that work is, on errors too: memory that it used may be freed then.
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
        """A block from torch's caching allocator. The arena keeps what `record` takes for it.

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
        """Let memory be used again only behind what the current stream does until it is freed.

        Args:
            memory: a tensor from `empty`, or what an arena from `arena` keeps. Tensors over an
                arena are not torch's own memory, and torch would ignore them.
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

_runtime = Runtime()
# No lock: each update is one operation on one dict, and all that make it say the same.
_opened: dict[tuple[int, int], engine.DeviceHandle] = {}  # by runtime and ordinal
_proved: dict[tuple[int, int], int] = {}  # bytes of the largest sample that was right
_refused: dict[int, str] = {}  # ordinal -> why, once bytes came out wrong


class Device:
    """A device that a load goes to.

    Attributes:
        name: as tensors show it, such as ``cuda:0``.
        argument: as the caller named it; stock is given the same.
        ordinal: its number.
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

    def wants(self, nbytes: int) -> bool:
        """Whether so many bytes are to be read back: nothing near as many has been so far."""
        proved = _proved.get((id(self.runtime), self.ordinal), 0)
        return proved < PROOF_BYTES and nbytes >= _MORE * proved

    def room(self) -> int:
        """Bytes that can be allocated there now, in pieces of any size. Raises as `native`."""
        return engine.device_info(self.native()).free_bytes + self.runtime.cached(self.ordinal)

    def settle(self) -> None:
        """Wait for what this thread has pending there: then any stream may use it."""
        self.runtime.settle(self.ordinal)

    def stream(self) -> int:
        """Address of the stream on which this thread allocates there now."""
        return self.runtime.stream(self.ordinal)

    def hand_over(self, memory: Any, allocated_on: int) -> None:
        """Give memory to the calling thread, which may use it on its current stream.

        torch gives freed memory to the next owner on the stream that it was allocated on, and
        waits for no other. Whoever got the memory is to find the order of its own allocations.

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
                self.settle()
        except RuntimeError as error:
            if self.runtime.is_out_of_memory(error):
                raise
            raise Fallback.alone(error) from None
        return result

    def destination(self, pinned_bytes: int) -> engine.Destination:
        """For a job on memory that was allocated just now, by this thread."""
        return engine.Destination(self.native(), self.runtime.stream(self.ordinal), pinned_bytes)


def target(device: object) -> Device | None:
    """The device that a caller's argument means, as stock reads it; None for the CPU.

    Raises:
        Fallback: it is another kind of device, cannot be used now, or stock must say what is wrong.
    """
    if device is None or (type(device) is str and device == "cpu"):
        return None
    ordinal: int | None = None
    if type(device) is int:
        ordinal = device if 0 <= device < 1 << 16 else None
    elif type(device) is str:
        named = _NAMED.fullmatch(device)
        ordinal = int(named[1] or 0) if named else None
    if ordinal is None:
        raise Fallback(f"device {device!r} is not accelerated")
    found = Device(device, ordinal, _runtime)
    found.check()
    return found


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


def torch_target(named: torch.device) -> Device | None:
    """The device that torch's own ``.to`` would move to; None unless it is a CUDA device.

    Raises:
        Fallback: it cannot be used now.
    """
    if named.type != "cuda":
        return None
    if named.index is None:
        Device("cuda", 0, _runtime).check()  # before asking for the current one makes a context
    found = Device(named, _runtime.current() if named.index is None else named.index, _runtime)
    found.check()
    return found


class Sample(NamedTuple):
    """Bytes of a load to be read back."""

    file_offset: int
    nbytes: int
    arena_offset: int

    @property
    def end(self) -> int:
        """File offset behind them."""
        return self.file_offset + self.nbytes


def sample_of(found: Device, segments: array[int]) -> Sample | None:
    """What `prove` shall read back: the first whole chunk, or all of the largest segment.

    Args:
        found: the device.
        segments: of the load: flat triples (file offset, bytes, arena offset).

    Returns:
        None for a load of nothing, or when enough was read back from the device before.
    """
    if not len(segments) or not found.wants(PROOF_BYTES):
        return None
    nbytes = min(max(segments[1::3]), PROOF_BYTES)
    if not found.wants(nbytes):
        return None
    at = next(at for at in range(0, len(segments), 3) if segments[at + 1] >= nbytes)
    return Sample(segments[at], nbytes, segments[at + 2])


def prove(found: Device, arena: engine.Arena, file: engine.File, sample: Sample | None) -> None:
    """After the first load of the process to a device: read a chunk back and compare.

    Where that was tiny, the next load that is much larger is proved, too.

    Args:
        found: the device.
        arena: where the sample's bytes have landed.
        file: where they come from.
        sample: of the load.

    Raises:
        Fallback: it differs. From then on everything for that device goes to stock.
    """
    if sample is None or not found.wants(sample.nbytes):
        return
    equal = engine.compare(found.native(), arena, file, **sample._asdict())
    _judge(found, sample.nbytes, bool(equal), file.path)


def prove_tensor(found: Device, moved: torch.Tensor, source: torch.Tensor) -> None:
    """The same for a tensor that came from memory, of which it is a contiguous copy.

    Of a source with gaps no more is copied than is compared. Raises as `prove`.
    """
    import torch

    nbytes = min(source.nbytes, PROOF_BYTES)
    if not found.wants(nbytes):
        return
    count = nbytes // source.itemsize
    raw = [_first(t.detach(), count).view(torch.uint8).cpu() for t in (moved, source)]
    _judge(found, nbytes, torch.equal(raw[0], raw[1]), "a tensor")


def _first(t: torch.Tensor, count: int) -> torch.Tensor:
    """So many of a tensor's elements, one behind another in memory."""
    import torch

    while t.dim() > 1:
        rest = t[0].numel()
        if rest < count:
            t = t[: -(-count // rest)]
            break
        t = t[0]
    flat = t.reshape(-1)[:count]
    # A single element may have any stride, also if a view with steps is contiguous.
    return flat if flat.stride(0) == 1 else flat.clone(memory_format=torch.contiguous_format)


def _judge(found: Device, nbytes: int, equal: bool, what: str) -> None:
    if equal:
        _proved[id(found.runtime), found.ordinal] = nbytes
        return
    why = f"bytes read back from {found.name} differed from the file's or the source's"
    _refused[found.ordinal] = why
    logging.getLogger("fastst_patch").error(
        "%s: %s; from now on stock loads to this device. Please report this.", what, why
    )
    raise Fallback(why)


@contextlib.contextmanager
def replaced(runtime: Runtime) -> Iterator[None]:
    """Let another runtime stand for CUDA, and forget what was learned of the last (tests)."""
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
    _proved.clear()
    _refused.clear()
