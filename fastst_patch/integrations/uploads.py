"""Moves CPU tensors to a device: workers copy them into pinned slots, the device copies the slots.

Each tensor gets an allocation of its own from torch, as with ``tensor.to``. Bytes come from
memory, not from files: changes made in place are carried over. Workers fault in the pages of a
file's map that are not there yet, many at a time.

A source may be a view with gaps, such as some columns of a larger tensor. Workers then copy its
contiguous runs one behind another into a slot, so that one copy to the device moves them all.
"""

from __future__ import annotations

import contextlib
import functools
import time
import traceback
from array import array
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from .. import device, engine
from ..config import Config
from ..dropin.eligibility import fell_back
from ..errors import Fallback
from ..files.cuda import PINNED
from ..machine import io_threads
from ..report import Account
from .prefetch import Kind, Request, RequestPrefetcher

if TYPE_CHECKING:
    import torch

__all__ = ["PendingUpload", "Uploads", "ordinary", "run_bytes", "worth_it"]

MIB = 1 << 20
FEWEST_BYTES = 8 * MIB
"""For fewer bytes, starting workers costs about as much time as they save."""

FEWEST_BYTES_AT_FIRST = 256 * MIB
"""The same while no memory is pinned yet: pinning runs at 1 to 2 GB/s."""


def worth_it(nbytes: int) -> bool:
    """Whether so many bytes are better moved by workers than by torch."""
    pinned = engine.counters()["pinned_bytes"]
    return nbytes >= (FEWEST_BYTES if pinned else FEWEST_BYTES_AT_FIRST)


def ordinary(candidates: Iterable[torch.Tensor | None]) -> list[torch.Tensor]:
    """The tensors that can be moved ahead: plain ones, each once, none overlapping another."""
    import torch

    plain = (torch.Tensor, torch.nn.Parameter)
    found: dict[int, torch.Tensor] = {}
    for t in candidates:
        if type(t) not in plain or t is None or id(t) in found:
            continue
        if (
            t.device.type == "cpu"
            and t.layout is torch.strided
            and t.numel() > 0
            and _dense(t)
            and not (t.is_quantized or t.is_inference() or t.is_conj() or t.is_neg())
            and not any(getattr(t, "names", ()))  # gone in torch 2.13
            # Parameters and gradients are converted under no_grad; buffers are not.
            and (type(t) is torch.nn.Parameter or not t.requires_grad)
            and not t.is_pinned()  # torch's own copy is at the limit
        ):
            found[id(t)] = t
    end = 0
    for t in sorted(found.values(), key=lambda tensor: tensor.data_ptr()):
        if t.data_ptr() < end:
            del found[id(t)]
        end = max(end, t.data_ptr() + t.nbytes)
    return list(found.values())


def _dense(t: torch.Tensor) -> bool:
    """Whether a tensor has the strides that a new one of its shape gets, and all of its memory.

    ``is_contiguous`` does not look at dimensions of one element, whose strides tell torch that
    the weights of a 1x1 convolution are in ``channels_last``.
    """
    if not t.is_contiguous():
        return False
    if 1 in t.shape:
        stride = 1
        for length, found in zip(reversed(t.shape), reversed(t.stride()), strict=True):
            if found != stride:
                return False
            stride *= length
    end = t.storage_offset() * t.itemsize + t.nbytes
    return end <= t.untyped_storage().nbytes()  # storages can be resized under their tensors


class Uploads:
    """Moves CPU tensors before a consumer asks for them, each by the tensor itself.

    A context: leaving it lets go of tensors that were not asked for, and reports.

    Args:
        call: what the consumer does, for reports.
        name: of the object that it works on, for reports.
        target: the device.
        config: for budget, threads, chunks and pinned memory.
    """

    def __init__(self, call: str, name: str, target: device.Device, config: Config) -> None:
        self._call = call
        self._name = name
        self._target = target
        self._config = config
        self._started = time.perf_counter()
        self._account = Account()
        self._fallback: Fallback | None = None
        self._prefetcher = RequestPrefetcher(config.device_memory_budget)
        start = functools.partial(PendingUpload, target=target, config=config)
        self._kinds = [Kind(cast, start, passing=cast) for cast in (False, True)]
        self._worked_on = False
        self._waiting: dict[int, tuple[Request, torch.Tensor, int, int]] = {}

    def expect_all(self, found: Iterable[torch.Tensor], dtype: torch.dtype | None) -> None:
        """Announce tensors in the order in which they will be asked for.

        Args:
            found: `ordinary` ones, which must not change until they are asked for.
            dtype: to which the consumer will cast floating-point and complex tensors.
        """
        try:
            for t in found:
                floats = t.is_floating_point() or t.is_complex()
                kind = self._kinds[dtype is not None and floats and t.dtype != dtype]
                # Keeps its memory of now: another thread may give the tensor other memory.
                version, held = t._version, t.detach()
                request = self._prefetcher.ask(kind, held, held.nbytes)
                self._waiting[id(t)] = (request, t, version, held.data_ptr())
        except BaseException:
            self.drop()
            raise

    def moved(self, t: torch.Tensor) -> torch.Tensor | None:
        """The copy of a tensor on the device, usable on any stream; None: torch has to move it."""
        request, source, version, place = self._waiting.pop(id(t), (None, None, 0, 0))
        # Only for the same tensor object, unchanged since it was announced.
        if request is None or source is not t:
            return None
        if t._version != version or t.data_ptr() != place:
            return None
        try:
            moved = self._prefetcher.take(request)
        except Exception as error:
            fallback = Fallback.alone(error)  # for each error: its traceback keeps our memory
            self._fallback = self._fallback or fallback
            return None
        self._account.tensors += 1
        self._account.bytes += moved.nbytes
        return moved

    def makes_room(self, error: Exception) -> bool:
        """Free everything moved ahead if the consumer ran out of memory; return whether it did.

        Stock moves one tensor at a time, already cast, and may still fit.
        """
        if not self._target.runtime.is_out_of_memory(error):
            return False
        traceback.clear_frames(error.__traceback__)  # they keep tensors that were moved
        self._fallback = self._fallback or Fallback(
            f"not enough memory on {self._target.name} beside it"
        )
        self.drop()
        return True

    def worked_on(self) -> None:
        """Note that the consumer has work pending on the device where stock would have none.

        Stock casts on the CPU and waits for its copy: any stream may use the result.
        """
        self._worked_on = True

    def drop(self) -> None:
        """Let go of tensors that were not asked for; torch has to move them from then on."""
        self._waiting.clear()
        self._prefetcher.drop()

    def __enter__(self) -> Uploads:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.drop()
        if self._worked_on:
            with contextlib.suppress(Exception) if error else contextlib.nullcontext():
                self._target.synchronize()
        account = self._account
        account.path = "upload" if account.tensors else "stock"
        account.seconds = time.perf_counter() - self._started
        account.reason = self._fallback.reason if self._fallback else None
        account.emit(self._call, self._name, self._target.name)
        if self._fallback is not None and error is None:  # else stock's error is what matters
            fell_back(self._config, self._call, self._name, self._fallback)


def _run_of(t: torch.Tensor) -> tuple[int, list[tuple[int, int]]]:
    """Elements of a view's contiguous runs, and lengths and strides of the dimensions around them.

    The innermost dimension comes first.
    """
    run = 1
    outer: list[tuple[int, int]] = []
    for length, stride in zip(reversed(t.shape), reversed(t.stride()), strict=True):
        if length == 1:
            continue
        if stride == run and not outer:
            run *= length
        else:
            outer.append((length, stride))
    return run, outer


def run_bytes(t: torch.Tensor) -> int:
    """Bytes of each contiguous run of a view that is cut out of a contiguous tensor."""
    return _run_of(t)[0] * t.itemsize


def _end(t: torch.Tensor) -> int:
    """The address behind a view's last element."""
    if t.is_contiguous():
        return t.data_ptr() + t.nbytes
    last = sum((length - 1) * stride for length, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr() + (last + 1) * t.itemsize


def _segments(t: torch.Tensor, place: int) -> array[int]:
    """Segments that put the runs of a view one behind another: flat (address, bytes, place).

    Args:
        t: the view.
        place: of the first run.
    """
    import torch

    if t.is_contiguous():
        return array("Q", (t.data_ptr(), t.nbytes, place))
    run, outer = _run_of(t)
    starts = torch.zeros(1, dtype=torch.int64, device="cpu")
    for length, stride in outer:
        steps = torch.arange(length, dtype=torch.int64, device="cpu") * stride
        starts = (steps[:, None] + starts).reshape(-1)
    count, nbytes = len(starts), run * t.itemsize
    flat = array("Q", bytes(24 * count))
    rows = torch.frombuffer(flat, dtype=torch.int64).view(count, 3)  # written in place
    rows[:, 0] = starts * t.itemsize + t.data_ptr()
    rows[:, 1] = nbytes
    rows[:, 2] = torch.arange(count, dtype=torch.int64, device="cpu") * nbytes + place
    return flat


class PendingUpload:
    """A `Pending` of copies of CPU tensors; its items are the sources. Each can be taken once.

    Keeps the sources until their bytes have landed. The copies are contiguous.

    Args:
        sources: CPU tensors with bytes: contiguous, or views cut by slices out of contiguous
            ones, so that elements ascend by address. From the first element to the last no two
            overlap, gaps included. No other code has these tensor objects, which could give
            them other memory.
        target: the device.
        config: for threads, chunks and pinned memory.

    Raises:
        Fallback: the device has not enough memory, or its driver failed.
    """

    def __init__(
        self, sources: Sequence[torch.Tensor], target: device.Device, config: Config
    ) -> None:
        self._target = target
        self._stream = target.stream()
        order = sorted(sources, key=lambda tensor: tensor.data_ptr())
        try:
            made = [
                target.runtime.empty(list(source.shape), source.dtype, target.ordinal)
                for source in order
            ]
        except Exception as error:
            if not target.runtime.is_out_of_memory(error):
                raise
            error.__traceback__ = None  # its frames keep the tensors that were made
            raise Fallback(f"not enough memory on {target.name} to move ahead") from None
        places = [tensor.data_ptr() for tensor in made]
        spans = [(place, tensor.nbytes) for place, tensor in zip(places, made, strict=True)]
        arena, base = engine.Arena.over(spans, made)
        segments = array("Q")
        for source, place in zip(order, places, strict=True):
            segments += _segments(source, place - base)
        self._made = {
            id(source): (source, tensor) for source, tensor in zip(order, made, strict=True)
        }
        self._job = engine.upload(
            arena,
            segments,
            threads=io_threads(config.threads),
            chunk_bytes=config.chunk_bytes,
            to=target.destination(PINNED if config.pinned_bytes is None else config.pinned_bytes),
            keep=order,
        )

    def landed(self) -> bool:
        """Whether nothing moves any more. Never blocks."""
        return self._job.stats().done

    def take(self, source: torch.Tensor) -> torch.Tensor:
        """The copy of a source, usable on any stream.

        Raises:
            Fallback: the device failed, or bytes came out wrong.
        """
        _, result = self._made.pop(id(source))
        self._job.wait_until(_end(source))
        device.prove_tensor(self._target, result, source)
        self._target.hand_over(result, self._stream)
        return result
