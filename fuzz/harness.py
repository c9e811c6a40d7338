"""One case of the differential fuzzer: a file, read by stock and by us in the same way."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import random
from collections.abc import Iterator, Sequence
from typing import Any

import fake_device
import pytest
import torch
from compare import check_agree, check_same
from fuzzed_calls import (
    OF_HEADER,
    device_options,
    fuzzed_calls,
    fuzzed_options,
    fuzzed_way,
)
from fuzzed_files import another_of_its_size, fuzzed_file
from generated_files import File
from loaders import loaders_now, stock_loaders
from lockstep import Side

import fastst_patch
from fastst_patch.dropin import eligibility

__all__ = ["Case", "Harness", "Result", "case_of"]

_FRAMEWORKS = {"array_handle": ("np", "numpy"), "handle": ("pt", "torch", "pytorch")}
_NO_CONTEXT = contextlib.nullcontext()
_WHOLE = ("load_file", "arrays")  # ways without a handle
_DRIVER_CASES = 500  # between two looks at all that the fake driver counts
_OUR_HANDLE = "FastHandle"
_MAPPED = {("io", "mmap"), ("tensors", "dlpack"), ("page_cache", "keep")}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is done with one file.

    Attributes:
        number: with the seed, it makes the case.
        file: its bytes, and what is in it.
        way: ``handle``, ``load_file``, ``arrays``, ``array_handle`` or ``file_object``.
        calls: in lockstep, of a handle; the first one opens it. Without a handle there are none.
        options: of ours.
        mapped: whether tensors share their storage as stock's do.
        in_place: whether the file before is overwritten, so that this one has its inode.
        before: what the file holds, and is loaded with, before it is overwritten by its content.
    """

    number: int
    file: File
    way: str
    calls: Sequence[tuple[Any, ...]]
    options: dict[str, Any]
    mapped: bool
    in_place: bool
    before: bytes | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """How a case that agreed went.

    Attributes:
        calls: that were compared.
        valid: whether stock accepts the file.
        fast: whether the fast path was taken.
    """

    calls: int
    valid: bool
    fast: bool


def case_of(seed: int, number: int, device: str) -> Case:
    """The same for the same arguments, on every machine with the same libraries."""
    rnd = random.Random(seed << 48 | number)
    file = fuzzed_file(rnd)
    way = fuzzed_way(rnd)
    if device == "cuda":
        way = {"arrays": "load_file", "array_handle": "handle"}.get(way, way)
    framework = rnd.choice(_FRAMEWORKS.get(way, ("pt",)))
    options = device_options(rnd) if device == "cuda" else fuzzed_options(rnd)
    mapped = device == "cpu" and _is_mapped(options)
    calls = [] if way in _WHOLE else fuzzed_calls(rnd, framework, writes=mapped)
    in_place = rnd.random() < 0.3
    before = another_of_its_size(rnd, file.content) if rnd.random() < 0.05 else None
    return Case(number, file, way, calls, options, mapped, in_place, before)


def _is_mapped(options: dict[str, Any]) -> bool:
    """Whether tensors share the file's map, so that a write shows in others, as with stock."""
    return not options or set(options.items()) <= _MAPPED


class Harness:
    """Both loaders in this process, over files in one folder.

    Args:
        device: ``cpu``, or ``cuda`` for the fake driver.
        folder: in memory, for the file of each case.
        library: the fake driver's.
    """

    def __init__(self, device: str, folder: str, library: str | None = None) -> None:
        self.device = device
        self.path = os.path.join(folder, "file.safetensors")
        self._stock = stock_loaders()  # before anything is patched
        self._driver = None
        if library is not None:
            self._driver = fake_device.Driver(library)
            self._driver.lib.fake_devices(4)
        self._until_look = 0
        self._inner = contextlib.ExitStack()
        self._complaints: list[logging.LogRecord] = []

    @contextlib.contextmanager
    def installed(self) -> Iterator[Harness]:
        """Patch this process, small files and arrays included; its reports tell the path."""
        torch.set_num_threads(1)
        with contextlib.ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(eligibility, "SMALL_FOR_ARRAYS", 0)
            stack.enter_context(fastst_patch.patched(small_file_bytes=0))
            self._fast = loaders_now()
            assert self._fast.safe_open is not self._stock.safe_open
            kept, logger = _Kept(self._complaints), logging.getLogger("fastst_patch")
            logger.addHandler(kept)
            stack.callback(logger.removeHandler, kept)
            self._profile = stack.enter_context(fastst_patch.profile())
            if self._driver is not None:
                fake_device.StockOnCpu(patch, self._driver)
            stack.callback(self._look)
            yield self

    def run(self, case: Case) -> Result:
        """Read the file both ways.

        Raises:
            AssertionError: results, exceptions, or what the fake driver allows, differ.
        """
        if self._driver is None:
            return self._run(case)
        if not self._until_look:
            self._look()
            self._inner.enter_context(fake_device.fake_cuda(self._driver))
            self._driver.lib.fake_mode(case.number & 1, case.number)
            self._until_look = _DRIVER_CASES
        self._until_look -= 1
        try:
            return self._run(case)
        except AssertionError:
            with contextlib.suppress(AssertionError):  # what it counted is this case's
                self._look()
            self._driver.clear()
            raise

    def _run(self, case: Case) -> Result:
        self._write(case)
        self._profile.reports.clear()
        context = fastst_patch.config_context(**case.options) if case.options else _NO_CONTEXT
        with context:
            if case.way in _WHOLE:
                calls, valid, made = self._load(case)
            else:
                calls, valid, made = self._lockstep(case)
        paths = [report.path for report in self._profile.reports]
        fast = valid and any(path != "stock" for path in paths)
        assert not self._complaints, self._complaints.pop().getMessage()  # of verify
        if case.file.ours and made and case.way not in ("arrays", "array_handle"):
            assert fast, f"left to stock: {self._profile.reports}"
        if self._driver is not None:
            assert self._driver.lib.fake_violations() == 0, self._driver.violations()
            assert self._driver.live().blocks == 0, "memory of the device is left"
        return Result(calls, valid, fast)

    def _look(self) -> None:
        """Close the fake device, which checks what it counted."""
        self._until_look = 0
        self._inner.close()

    def _write(self, case: Case) -> None:
        # Nothing of the file before is mapped any more.
        if not case.in_place:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        with open(self.path, "wb", buffering=0) as file:
            file.write(case.file.content if case.before is None else case.before)
        if case.before is not None:
            with contextlib.suppress(Exception):  # what it is makes no difference
                self._fast.load_file(self.path)
            with open(self.path, "r+b", buffering=0) as file:
                file.write(case.file.content)

    # ---- whole files ----

    def _load(self, case: Case) -> tuple[int, bool, int]:
        name = "load_arrays" if case.way == "arrays" else "load_file"
        where = () if self.device == "cpu" or case.way == "arrays" else (self.device,)
        ours, theirs = check_agree(
            lambda: getattr(self._fast, name)(self.path, *where),
            lambda: getattr(self._stock, name)(self.path),
        )
        if theirs is None:
            return 1, False, 0
        check_same(case.file.order(list(ours)), case.file.order(list(theirs)))
        return 1, True, sum(_size(one) for one in theirs.values())

    # ---- handles ----

    def _lockstep(self, case: Case) -> tuple[int, bool, int]:
        open_fast, open_stock = self._fast.safe_open, self._stock.safe_open
        if self.device != "cpu":
            open_fast = functools.partial(open_fast, device=self.device)
        if case.way == "file_object" and self._stock.handle is not None and self.device == "cpu":
            open_fast = functools.partial(_by_object, self._fast.handle)
            open_stock = functools.partial(_by_object, self._stock.handle)
        ours = Side(open_fast, case.file, self.path)
        theirs = Side(open_stock, case.file, self.path)
        done = 0
        for call in case.calls:
            if done and not theirs.handles:
                break  # it cannot be opened
            if self.device != "cpu" and call[0] not in OF_HEADER and not _is_ours(ours):
                continue  # a handle of stock's, which has no such device here
            self._both(case, ours, theirs, call)
            if call[0] in ("mutate", "zero"):  # seen through the same other tensors
                check_same(ours.tensors, theirs.tensors)
            done += 1
        for i in range(len(theirs.handles)):
            self._both(case, ours, theirs, ("exit", i))
        if case.mapped:
            check_same(ours.tensors, theirs.tensors)
        made = sum(_size(one) for one in ours.tensors)
        return done, bool(theirs.handles), made

    def _both(self, case: Case, ours: Side, theirs: Side, call: tuple[Any, ...]) -> None:
        moved = _as_it_is if case.mapped else _moved
        # A handle of stock's keeps the order in which it goes through tensors of one extent, and so
        # which of them it refuses: another handle is asked for what else it may say.
        first = iter([functools.partial(theirs.do, call)])
        again = functools.partial(_in_another_handle, theirs, call)
        check_agree(lambda: moved(ours.do(call)), lambda: moved(next(first, again)()))


def _in_another_handle(side: Side, call: tuple[Any, ...]) -> Any:
    if call[0] != "get_tensors":
        return side.do(call)
    with side.safe_open(side.path, side.framework) as handle:
        return handle.get_tensors()


class _Kept(logging.Handler):
    """Keeps what is logged as an error."""

    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__(logging.ERROR)
        self._records = records

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)


def _is_ours(side: Side) -> bool:
    return all(type(handle).__name__ == _OUR_HANDLE for handle in side.handles)


def _as_it_is(value: Any) -> Any:
    return value


def _moved(value: Any) -> Any:
    """A result as a copy of it: a slice that is read alone shares no storage with others."""
    return fake_device.on_device(value) if isinstance(value, torch.Tensor) else value


def _by_object(handle: Any, path: str, framework: str) -> Any:
    with open(path, "rb") as file:
        return handle(file, framework)


def _size(one: Any) -> int:
    return one.numel() if isinstance(one, torch.Tensor) else one.size
