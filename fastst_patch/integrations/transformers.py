"""transformers' loading of weights: from storage straight to the device of each tensor.

``from_pretrained`` opens every file for the CPU, whatever the device_map, and copies tensor by
tensor from pageable memory. ``convert_and_load_state_dict_in_model`` first passes every tensor of
the checkpoint to ``spawn_materialize``, which returns a future, and then takes the tensors in the
same order: it merges, renames, casts and places them as the model needs. Here the future of a
tensor that goes to CUDA reads it ahead in that order, and casts it on the device. Everything else
is transformers' own code.

Tensors that become parameters have allocations of their own. Tensors that are merged or cast first
share blocks, which are freed after the last of them was used (the option ``tensors`` can change
that). Other conversions, such as those of quantized weights, may keep the tensors they get.

Tensors that stay on the CPU without a cast are made where they are taken, and not in threads.

Where transformers uses no threads (offload to disk, quantizing on the fly), a tensor is read when
it is asked for and not before.

With tensor parallelism, shards that are one piece of their tensor are read in the same way: see
`tensor_parallel`. Left to transformers: other shards, other devices, checkpoints that are not
safetensors files opened by us, and ``verify``.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import tensors
from ..device import Device, device_of, parse_device
from ..dropin.eligibility import check_move, fell_back
from ..dropin.slices import behind
from ..errors import Fallback, FaststError
from ..files.base import OpenedFile
from ..files.cuda import DeviceFile
from ..files.pending import PendingRows, PendingTensors
from ..layout import plan_rows
from ..stock import SafetensorError
from .lazy_future import AtOnce, LazyFuture, by_stock
from .prefetch import Kind, Request, RequestPrefetcher
from .tensor_parallel import Shards, cut_of, rows_of
from .uploads import PendingUpload

if TYPE_CHECKING:
    import torch

__all__ = ["convert_and_load", "deepcopy", "spawn_materialize"]

_log = logging.getLogger("fastst_patch")
_here = threading.local()  # .load: the `_Load` of the call that this thread is in


# ---- the calls ----


def convert_and_load(original: Any, args: Any, kwargs: Any) -> Any:
    """For ``convert_and_load_state_dict_in_model``: the load that the others belong to."""
    before = getattr(_here, "load", None)
    _here.load = load = _Load(*args[2:3])
    failed = True
    try:
        result = original(*args, **kwargs)
        failed = False
        return result
    finally:
        _here.load = before
        load.end(failed)


def spawn_materialize(original: Any, args: Any, kwargs: Any) -> Any:
    """For ``spawn_materialize``: the future of one tensor."""
    load: _Load | None = getattr(_here, "load", None)
    promised = None
    if load is not None:
        merged, load.merging = load.merging, False  # it concerns the next tensor only
        try:
            call = _Call.of(original, merged, args, kwargs)
            if call is not None:
                promised = _promised(load, call)
        except FaststError:  # fallback="error"
            raise
        except Exception as error:  # before anything was handed out
            load.failed(Fallback.alone(error))
    return original(*args, **kwargs) if promised is None else promised


def deepcopy(original: Any, args: Any, kwargs: Any) -> Any:
    """Reuse the last copy of a converter if transformers discarded it.

    transformers copies a converter for each tensor that it merges, and discards all but one. For a
    model of many experts that takes longer than reading the tensors. A discarded copy is unused: a
    copy that was kept has collected a tensor before the next copy is made.
    """
    load: _Load | None = getattr(_here, "load", None)
    if load is None or len(args) != 1 or kwargs or type(args[0]).__name__ != "WeightConverter":
        return original(*args, **kwargs)
    load.merging = not load.sharded and any(map(_merges, getattr(args[0], "operations", ())))
    source, copy = load.converters.get(id(args[0]), (None, None))
    if source is not args[0] or copy.collected_tensors or copy.layer_targets:
        copy = original(*args)
        load.converters[id(args[0])] = (args[0], copy)
    return copy


def _merges(operation: object) -> bool:
    """Whether an operation of a converter copies all that it is given into one tensor."""
    return not _MERGING.isdisjoint(kind.__name__ for kind in type(operation).__mro__)


# ---- one tensor ----


_ARGUMENTS = {"thread_pool", "tensor", "device", "dtype", "sharding_op", "tensor_idx"}


class _Call(NamedTuple):
    """One call of ``spawn_materialize``, for a tensor of a file that we opened.

    Attributes:
        opened: the file.
        i: number of the tensor.
        merged: whether a converter merges it with others.
        original: the function of transformers.
        stock: calls it with the arguments that it was called with.
        thread_pool: an argument of the call, as are those below.
        tensor: the slice of the tensor.
    """

    opened: OpenedFile
    i: int
    merged: bool
    original: Callable[..., Any]
    stock: Callable[[], Any]
    thread_pool: Any
    tensor: Any
    device: Any = None
    dtype: torch.dtype | None = None
    sharding_op: Any = None
    tensor_idx: int | None = None  # from 5.13 on, and of no use without a sharding_op

    @classmethod
    def of(cls, original: Any, merged: bool, args: Any, kwargs: Any) -> _Call | None:
        """A call whose tensor we read; None for another tensor or unknown arguments."""
        ours = behind(args[1] if len(args) > 1 else kwargs.get("tensor"))
        if ours is None or not kwargs.keys() <= _ARGUMENTS:
            return None
        stock = functools.partial(original, *args, **kwargs)
        return cls(*ours, merged, original, stock, *args, **kwargs)

    @property
    def to_cpu(self) -> bool:
        return self.device is None or str(self.device) == "cpu"

    @property
    def cast(self) -> bool:
        """Whether the tensor gets another dtype than its file's."""
        if self.dtype is None:
            return False
        return tensors.shape_and_dtype(self.opened.layout, self.i)[1] != self.dtype

    @property
    def passing(self) -> bool:
        """Whether the tensor is merged or cast; else it may become a parameter."""
        return self.merged or self.cast

    @property
    def at_once(self) -> bool:
        """Whether the tensor is a view of the file's map, which is made faster than by a thread.

        A thread would wait for the GIL, which the main thread holds for 5 ms at a time.
        """
        return (
            self.opened.mapped
            and self.to_cpu
            and not self.cast
            and tensors.ordinary_mode()  # transformers' threads are in none
        )

    def materialize(self, source: Any) -> Any:
        """The tensor that transformers makes of a slice, without its threads."""
        # Older versions do not have this argument.
        index = {} if self.tensor_idx is None else {"tensor_idx": self.tensor_idx}
        return self.original(
            AtOnce(), source, self.device, self.dtype, sharding_op=self.sharding_op, **index
        )


def _promised(load: _Load, call: _Call) -> Any:
    """A future or, without a pool, a function for a tensor; None where stock does it."""
    if call.sharding_op is not None:
        return None if call.thread_pool is None else _sharded(load, call)
    opened, i = call.opened, call.i
    if call.thread_pool is not None:
        if call.to_cpu:
            load.shards.whole(opened, i)
        if call.at_once:
            return LazyFuture(functools.partial(load.whole, call.tensor))
    file = load.file(opened, call.device)
    if file is None:
        return None
    if call.thread_pool is None:
        return functools.partial(load.now, file, call)
    asked = load.ask(file, i, call.passing)
    return LazyFuture(functools.partial(load.take, file, asked, call))


def _sharded(load: _Load, call: _Call) -> Any:
    """A future for this rank's shard of a tensor; None where stock's threads make it."""
    if not call.to_cpu:
        return _sharded_to(load, call)
    take = load.shards.local(
        call.opened, call.i, call.sharding_op,
        tensor_idx=call.tensor_idx, cast=call.cast, materialize=call.materialize,
    )  # fmt: skip
    return _left(load, call) if take is None else LazyFuture(take)


def _sharded_to(load: _Load, call: _Call) -> Any:
    """A future for one piece of a tensor on a device; None where stock's threads make it."""
    opened, i, sharding_op = call.opened, call.i, call.sharding_op
    file = load.file(opened, call.device)
    cut = None if file is None else cut_of(opened, i, sharding_op, call.tensor_idx)
    if file is None or cut is None:
        return None
    passing = call.passing
    rows = rows_of(cut, opened.layout.shape(i))
    if rows is not None:
        asked = load.ask_rows(file, (i, *rows), passing)
        return LazyFuture(functools.partial(load.take, file, asked, call))
    view = load.shards.view(opened, i, sharding_op.device_mesh, cut)
    if view is not None:
        asked = load.ask_view(file, view, passing)
        return LazyFuture(functools.partial(load.take, file, asked, call))
    return _left(load, call)


def _left(load: _Load, call: _Call) -> Any:
    """Stock's future, which starts pending read-ahead when it is taken; None without any."""
    if not load.shards.waiting:
        return None
    return LazyFuture(functools.partial(load.result, call.stock()))


# ---- one load ----


class _File:
    """A file of the checkpoint on its way to one device."""

    def __init__(self, opened: OpenedFile, device: Device) -> None:
        self.opened = opened  # the handle's; kept so that no other file gets its id
        self.moving = DeviceFile(opened.file, opened.layout, opened.config, device)
        self.device = device
        self.worked_on = False  # casts may be pending on the device; stock casts on the CPU

    def start(self, owned: bool, numbers: Sequence[int]) -> PendingTensors:
        return self.moving.ahead(numbers, owned=owned)

    def start_rows(self, wanted: Sequence[tuple[int, int, int]]) -> PendingRows:
        return self.moving.rows_ahead(wanted)

    def start_views(self, views: Sequence[torch.Tensor]) -> _PendingViews:
        self.moving.check()
        return _PendingViews(self.moving, PendingUpload(views, self.device, self.moving.config))


def _owned(file: _File, passing: bool) -> bool:
    """Whether tensors get allocations of their own.

    Tensors that are merged or cast never reach the user: ``torch.stack``, ``torch.cat`` and ``.to``
    another dtype copy them, and then they are freed. By default they share blocks.
    """
    return file.moving.config.tensors == "owned" if passing else file.moving.owned


class _PendingViews:
    """Views of a file's map on their way to a device; the file counts them when they are taken."""

    def __init__(self, moving: DeviceFile, upload: PendingUpload) -> None:
        self._moving = moving
        self._upload = upload

    def landed(self) -> bool:
        return self._upload.landed()

    def take(self, view: torch.Tensor) -> torch.Tensor:
        result = self._upload.take(view)
        self._moving.count(1, result.nbytes)
        if self._moving.account.path == "gds":  # no read of the file has set it yet
            self._moving.account.path = "ring"
        return result


class _Load:
    """One call of ``convert_and_load_state_dict_in_model``.

    Args:
        options: its ``load_config``.
    """

    def __init__(self, options: Any = None) -> None:
        self._started = time.perf_counter()
        self._files: dict[tuple[int, object], _File | None] = {}
        self._prefetchers: dict[str, RequestPrefetcher] = {}
        self._failed = False
        self.converters: dict[int, tuple[Any, Any]] = {}  # the last copy of each
        self.merging = False  # whether the converter copied last merges its tensors
        self.shards = Shards()
        # Up to 5.13 spawn_materialize is not called for sharded tensors.
        self.sharded = getattr(options, "device_mesh", None) is not None

    def whole(self, tensor: Any) -> Any:
        """A tensor that is a view of the file's map."""
        self.shards.start()
        return tensor[...]

    def result(self, future: Any) -> Any:
        """The tensor that one of transformers' threads makes."""
        self.shards.start()
        return future.result()

    def file(self, opened: OpenedFile, device: Any) -> _File | None:
        """A file on its way to a device; None where stock does it."""
        key = (id(opened), str(device) if type(device) is not int else device)
        try:
            return self._files[key]
        except KeyError:  # of threads that race one file is kept
            return self._files.setdefault(key, self._new_file(opened, device))

    def _new_file(self, opened: OpenedFile, argument: Any) -> _File | None:
        if argument is None or opened.device != "cpu":
            return None
        try:
            device = device_of(parse_device(argument))
            if device is None:
                return None
            check_move(opened.config)  # it refuses torch modes: transformers' threads have none
            device.native()
            return _File(opened, device)
        except Fallback as fallback:
            opened.account.reason = fallback.reason
            fell_back(opened.config, "from_pretrained", opened.file.path, fallback)
        except (RuntimeError, TypeError):  # torch knows no such device: stock raises it
            pass
        return None

    def ask(self, file: _File, i: int, passing: bool) -> Request:
        """Announce that tensor i will be taken, after everything announced before."""
        kind = Kind(
            (id(file), passing), functools.partial(file.start, _owned(file, passing)), passing
        )
        return self._prefetcher(file).ask(kind, i, file.moving.layout.nbytes(i))

    def ask_rows(self, file: _File, rows: tuple[int, int, int], passing: bool) -> Request:
        """The same for rows of a tensor: its number, first row, and the row behind the last."""
        first, last = plan_rows(file.moving.layout, *rows)
        kind = Kind((id(file), passing, "rows"), file.start_rows, passing)
        return self._prefetcher(file).ask(kind, rows, last - first)

    def ask_view(self, file: _File, view: torch.Tensor, passing: bool) -> Request:
        """The same for a view of the file's map."""
        kind = Kind((id(file), passing, "views"), file.start_views, passing)
        return self._prefetcher(file).ask(kind, view, view.nbytes)

    def _prefetcher(self, file: _File) -> RequestPrefetcher:
        moving = file.moving
        prefetcher = self._prefetchers.get(moving.device)
        if prefetcher is None:
            budget = moving.config.device_memory_budget
            prefetcher = self._prefetchers.setdefault(moving.device, RequestPrefetcher(budget))
        return prefetcher

    def take(self, file: _File, asked: Request, call: _Call) -> Any:
        """The announced tensor, on its device and cast."""
        self.shards.start()
        prefetcher = self._prefetchers[file.moving.device]
        return self._cast(lambda: prefetcher.take(asked), file, call, prefetcher.drop)

    def now(self, file: _File, call: _Call) -> Any:
        """A tensor that was not announced: read now."""
        i, owned = call.i, _owned(file, call.passing)
        return self._cast(lambda: file.start(owned, [i]).take(i), file, call)

    def _cast(
        self,
        read: Callable[[], torch.Tensor],
        file: _File,
        call: _Call,
        make_room: Callable[[], None] = lambda: None,
    ) -> Any:
        tensor, dtype = None, call.dtype
        try:
            tensor = read()
            if dtype is None or dtype == tensor.dtype:
                return tensor
            file.worked_on = True
            return tensor.to(dtype=dtype)
        except (OSError, SafetensorError):
            raise  # its bytes cannot be read
        except Exception as error:
            fallback = Fallback.alone(error)
        del tensor
        file.moving.account.reason = file.moving.account.reason or fallback.reason
        try:
            result = by_stock(call.stock)
        except Exception as error:
            if not file.device.runtime.is_out_of_memory(error):
                raise
            result = None
        if result is None:  # tensors read ahead may take up the memory
            make_room()
            result = by_stock(call.stock)
        fell_back(file.moving.config, "from_pretrained", file.moving.file.path, fallback)
        return result

    def failed(self, fallback: Fallback) -> None:
        """Warn, once, that our code failed before it handed anything out."""
        if not self._failed:
            self._failed = True
            _log.warning("from_pretrained: left to transformers: %s", fallback.reason)

    def end(self, failed: bool) -> None:
        """Drop tensors that were not taken, and report.

        Args:
            failed: whether the call raises, so that no error in here may replace its exception.
        """
        for prefetcher in self._prefetchers.values():
            prefetcher.drop()
        pending = {f.device.name: f.device for f in self._files.values() if f and f.worked_on}
        for device in pending.values():
            with contextlib.suppress(Exception) if failed else contextlib.nullcontext():
                device.synchronize()  # then any stream may use the tensors, as with stock's
        seconds = time.perf_counter() - self._started
        files = [file for file in self._files.values() if file is not None]
        nbytes = sum(file.moving.account.bytes for file in files)
        for file in files:
            moving, account = file.moving, file.moving.account
            share = account.bytes / nbytes if nbytes else 1 / len(files)  # they were read together
            account.seconds = seconds * share
            if not account.tensors:
                account.path = "stock"
            account.emit("from_pretrained", moving.file.path, moving.device)


_MERGING = {"MergeModulelist", "Concatenate"}  # torch.stack and torch.cat
